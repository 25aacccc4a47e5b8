"""bitfold as a quantization method of transformers."""
