"""Quantizing by what a model does on a text: its blocks one after the other, from mapped files (docs/calibration.md).

data.py makes rows of tokens of a text; blocks.py finds the decoder blocks of a transformers model and loads one at a
time; activations.py holds what goes into a block; collect.py looks at what its layers multiply; mappings.py knows which
layers feed which; methods.py is the seam to the quantizers; journal.py keeps finished blocks; run.py puts all of this
together.
"""
