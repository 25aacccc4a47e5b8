"""The best assignment of formats to weights for so many bytes (docs/allocation.md)."""
