"""llama.cpp's golden blocks (tests/data/gguf/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FOLDER = Path(__file__).parent / "data" / "gguf"


@cache
def golden(name: str) -> SimpleNamespace:
    """The arrays of a block type, named as in its file; not to be written to."""
    with np.load(FOLDER / f"{name.upper()}.npz") as file:
        return SimpleNamespace(**{key: file[key] for key in file.files})
