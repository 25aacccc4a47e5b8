"""What becomes of a weight that transformers has read for a model that is to be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from bitfold.integration.quantizer import Quantizer, tie_planes
from bitfold.nn import QuantModule
from bitfold.pipeline import give_back_memory
from bitfold.quantize import encode_named, put_modules, put_stack
from bitfold.shards import CheckpointError


class Encode(ConversionOps):
    """Encodes a weight and puts quantized modules in the places of those that have it."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        model, missing = kwargs["model"], kwargs["missing_keys"]
        ((target, values),) = input_dict.items()
        weight = values[0] if isinstance(values, list) else values
        name = target.removesuffix(".weight")
        names = next(group for group in self.quantizer.tied.values() if name in group)
        if self.quantizer.error is None:
            try:
                self._swap(model, name, names, weight)
            except ValueError as error:
                # transformers would go on, and tell of it among others at the end.
                self.quantizer.error = error
        if missing is not None:
            missing.difference_update([target, *(f"{each}.weight" for each in names)])
        return {}

    def _swap(self, model: Any, name: str, names: list[str], weight: Tensor) -> None:
        quantizer = self.quantizer
        if name in quantizer.formats:  # a stack of experts, which is no module's "weight"
            clamp = quantizer.quantization_config.clamp
            put_stack(model, name, weight, quantizer.formats[name], clamp, quantizer.activations[name])
            planes = model.get_submodule(name).parts()
        else:
            planes = self._swap_module(model, name, names, weight)
        for plane in planes:
            plane._is_hf_initialized = True
        if len(names) > 1:
            tie_planes(model)
        give_back_memory()

    def _swap_module(self, model: Any, name: str, names: list[str], weight: Tensor) -> list[nn.Parameter]:
        quantizer = self.quantizer
        module = model.get_submodule(name)
        if isinstance(module, QuantModule):
            _check_same(name, weight, module)  # of tied weights that are stored twice
            return []
        if tuple(weight.shape) != tuple(module.weight.shape):
            raise CheckpointError(
                f"tensor '{name}.weight' has shape {list(weight.shape)}, but config.json makes it "
                f"{list(module.weight.shape)}"
            )
        format = quantizer.formats[f"{name}.weight"]
        qtensor = encode_named(f"{name}.weight", weight, format, clamp=quantizer.quantization_config.clamp)
        put_modules(model, names, qtensor, weight.dtype, quantizer.activations)
        return model.get_submodule(name).parts()


def _check_same(name: str, weight: Tensor, module: QuantModule) -> None:
    again = encode_named(f"{name}.weight", weight, module.format)
    planes = zip(again.planes.values(), module.planes(), strict=True)
    if not all(torch.equal(one, other) for one, other in planes):
        raise CheckpointError(
            f"config.json ties '{name}.weight' to another tensor, but both are stored and their values differ"
        )
