"""How much each weight of a model minds each format: measured one at a time (docs/allocation.md)."""
