"""`bitfold check`: what is wrong with a checkpoint, found in its tensors, and repaired where that is sure
(docs/check.md).
"""
