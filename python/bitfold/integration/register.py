"""bitfold enters transformers' tables of quantization methods when transformers reads them."""

from __future__ import annotations

import sys
import warnings

from bitfold import versions
from bitfold.integration.hook import after_import
from bitfold.kv import attention

TABLES = "transformers.quantizers.auto"
"""The module that has the tables; every from_pretrained needs it."""
ATTENTION = "transformers.modeling_utils"
"""The module that has the table of attention functions."""


def register() -> None:
    """See that transformers knows bitfold, whether it is imported before or after bitfold, or never."""
    after_import(TABLES, _enter)
    after_import(ATTENTION, attention.enter)


def _enter() -> None:
    # A version that bitfold doesn't know must stay usable for everything else.
    try:
        versions.FROM_PRETRAINED.check(
            "loading quantized models with from_pretrained", sys.modules["transformers"].__version__
        )
    except versions.MissingExtraError as error:
        warnings.warn(f"{error}; bitfold.load works without it", stacklevel=2)
        return
    from bitfold.integration import quantizer

    quantizer.enter()
