"""What some tests need of a library around bitfold, where an older one is installed as often as not."""

from __future__ import annotations

import pytest
from bitfold import versions


def _too_old(support: versions.Support) -> str:
    """Why a library isn't in the range that bitfold needs; "" where it is."""
    try:
        support.require("the test")
    except versions.MissingExtraError as error:
        return str(error)
    return ""


# For Python 3.10 there is no transformers that is new enough.
NO_KV_CACHE = _too_old(versions.KV_CACHE)
needs_kv_cache = pytest.mark.skipif(bool(NO_KV_CACHE), reason=NO_KV_CACHE)
