"""Quantizers of one matrix that know its inputs. They know tensors, never a model or a file."""
