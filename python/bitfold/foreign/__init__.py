"""Checkpoints of other libraries: their tensors as QTensors, and QTensors as their tensors (docs/foreign.md)."""
