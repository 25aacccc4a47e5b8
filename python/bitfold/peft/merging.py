"""Adapters that become part of the weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from bitfold.dequantize import check_range, dequantize
from bitfold.nn import QuantModule
from bitfold.peft.layer import QuantLoraLinear


@dataclass(frozen=True)
class MergeSummary:
    """What merging into a quantized base cost. errors: by layer, norm of (merged as stored - merged) over norm of
    merged."""

    errors: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"merged adapters into {len(self.errors)} quantized weights and rounded them again: relative error "
            f"{mean:.4f} on average, at most {self.errors[worst]:.4f} ({worst})"
        )


def merge(model: PeftModel, dtype: torch.dtype | None = None, *, quiet: bool = False) -> nn.Module:
    """A model without adapters, which are in its weights; the PeftModel is used up.

    dtype: None: quantized weights take them in and are rounded again, in their formats; how much that changes is
    printed, unless quiet, and is the model's `merge_summary`. torch.float16, bfloat16, float32: every weight of the
    model becomes an unquantized one of that dtype.

    Raises ValueError, naming the layer, where an adapter holds NaN or a merged weight is beyond the dtype's range.
    Layers before it are merged then, it and those behind it as they were.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}; it must be a PeftModel")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, QuantLoraLinear) and isinstance(module.base_layer, QuantModule)
    }
    errors = {}
    for name, layer in layers.items():
        try:
            if dtype is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that it was rounded, and that it was merged before
                    layer.merge()
                if layer.merge_error is not None:
                    errors[name] = layer.merge_error
            else:
                _put_plain(name, layer, dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name not in str(error) else str(error)) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: Any = model.merge_and_unload(safe_merge=True)
    if dtype is not None:
        _forget_quantization(dequantize(merged, dtype))
        for (
            parameter
        ) in merged.parameters():  # no buffers: those of transformers' rotary embeddings stay float32
            parameter.data = parameter.data.to(dtype)
    elif errors:
        merged.merge_summary = MergeSummary(errors)
        if not quiet:
            print(merged.merge_summary)
    return merged


def _put_plain(name: str, layer: QuantLoraLinear, dtype: torch.dtype) -> None:
    """Put an unquantized base with the adapters in its weight under the adapters."""
    names = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    names = list(dict.fromkeys([*layer.merged_adapters, *names]))
    plain = layer.merge_plain(names)
    plain.weight = nn.Parameter(plain.weight.to(dtype), requires_grad=False)
    check_range(f"{name}.weight", plain.weight)
    if plain.bias is not None:
        plain.bias = nn.Parameter(plain.bias.to(dtype), requires_grad=False)
    layer.base_layer, layer.merged_adapters, layer._unmerged = plain, names, ()


def _forget_quantization(model: nn.Module) -> None:
    """So that save_pretrained writes an ordinary model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
