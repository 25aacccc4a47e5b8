"""Huge pages for large tensors: a matrix of 8 MB in pages of 4 KB is 2,000 translations to look up for one product.

Linux puts the pages together when it is asked to (madvise with MADV_COLLAPSE, since 6.1), in place: addresses and
contents stay what they are. Elsewhere, and where the system has none left, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

from torch import Tensor

_FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25  # linux/mman.h


@lru_cache(maxsize=1)
def huge_page() -> int:
    """Bytes of a huge page; 0 where the system has none, or whoever runs it wants none."""
    try:
        if sys.platform != "linux" or "[never]" in (_FOLDER / "enabled").read_text():
            return 0
        return int((_FOLDER / "hpage_pmd_size").read_text())
    except OSError:
        return 0


def use_huge_pages(tensor: Tensor) -> int:
    """Have the memory of a contiguous CPU tensor put into huge pages, as far as it fills them.

    Returns the bytes that now are in such; 0 for a tensor on another device or too small for one, and where the system
    refuses.
    """
    size = huge_page()
    if not size or tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < size:
        return 0
    begin = -(-tensor.data_ptr() // size) * size
    end = (tensor.data_ptr() + tensor.nbytes) // size * size
    if end <= begin:
        return 0
    refused = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_MADV_COLLAPSE)
    )
    return 0 if refused else end - begin
