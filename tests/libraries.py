"""What some tests need of a library that Python's version decides about."""

from __future__ import annotations

import sys

import pytest

# The last transformers for Python 3.10 is 5.20.2; the KV cache needs 5.23 (bitfold/versions.py).
KV_CACHE = sys.version_info >= (3, 11)
needs_kv_cache = pytest.mark.skipif(
    not KV_CACHE, reason="the KV cache needs transformers 5.23, which Python 3.10 can't have"
)
