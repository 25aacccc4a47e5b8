"""The KV cache in fewer bits (docs/kv-cache.md): blocks of packed keys and values, one layer's tokens, transformers'
Cache on top of them, and the attention function that reads them packed."""
