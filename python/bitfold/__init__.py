"""bitfold folds the weights of a language model into fewer bits and computes with them directly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (the extension links torch's libraries: they come first)

from bitfold._C import __version__
from bitfold.embeddings import QuantEmbedding
from bitfold.formats import FORMATS, Format
from bitfold.integration.register import register as _register
from bitfold.nn import QuantLinear
from bitfold.qtensor import LinearPlan, QTensor, Unpacked, embedding, encode, linear, pack, plan_linear
from bitfold.quantize import QuantizationSummary, quantize
from bitfold.recipes import RECIPES, Recipe, Rule

if TYPE_CHECKING:
    from bitfold.budget import plan_checkpoint
    from bitfold.calibration.run import quantize_calibrated
    from bitfold.checkpoint import save
    from bitfold.convert import convert_checkpoint
    from bitfold.evaluate import compare, perplexity
    from bitfold.gguf.quantize import quantize_gguf
    from bitfold.hub import load, load_tokenizer
    from bitfold.integration.config import Config
    from bitfold.kv.cache import QuantizedCache
    from bitfold.pipeline import quantize_checkpoint

# Names whose modules are imported at first use (PEP 562): they reach for transformers.
_LAZY = {
    "Config": "integration.config",
    "QuantizedCache": "kv.cache",
    "compare": "evaluate",
    "convert_checkpoint": "convert",
    "load": "hub",
    "load_tokenizer": "hub",
    "perplexity": "evaluate",
    "plan_checkpoint": "budget",
    "quantize_calibrated": "calibration.run",
    "quantize_checkpoint": "pipeline",
    "quantize_gguf": "gguf.quantize",
    "save": "checkpoint",
}

# Packages that are imported at first use: `bitfold.peft` without `import bitfold.peft`.
_LAZY_PACKAGES = ("peft", "qat")

__all__ = [
    "FORMATS",
    "RECIPES",
    "Config",
    "Format",
    "LinearPlan",
    "QTensor",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizationSummary",
    "QuantizedCache",
    "Recipe",
    "Rule",
    "Unpacked",
    "__version__",
    "compare",
    "convert_checkpoint",
    "embedding",
    "encode",
    "linear",
    "load",
    "load_tokenizer",
    "pack",
    "perplexity",
    "plan_checkpoint",
    "plan_linear",
    "quantize",
    "quantize_calibrated",
    "quantize_checkpoint",
    "quantize_gguf",
    "save",
]


_register()


def __getattr__(name: str) -> Any:
    if name in _LAZY_PACKAGES:
        return importlib.import_module(f"bitfold.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'bitfold' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bitfold.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY_PACKAGES])
