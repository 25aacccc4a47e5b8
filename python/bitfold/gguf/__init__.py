"""GGUF, the files of llama.cpp: read, quantized, written, converted and run. Needs the extra `gguf`."""
