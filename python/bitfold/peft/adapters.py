"""Configs that know bitfold's layers, and adapters that fit the model they are loaded on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from bitfold.nn import PlaneModule, QuantLinear
from bitfold.peft.layer import QuantLoraLinear
from bitfold.shards import CheckpointError, listed

ALL_LINEAR = "all-linear"
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


def prepare(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Tell a LoraConfig of quantized layers, in place; returns it. It goes before every get_peft_model and add_adapter.

    model: what it is for, needed where config.target_modules is "all-linear": PEFT finds nn.Linear alone. All linear
    layers but the output head are then named. With it modules_to_save is looked at too.

    Raises ValueError for what PEFT can't do on packed weights.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"config is a {type(config).__name__}; it must be a LoraConfig: PEFT has no door for others"
        )
    if config.fan_in_fan_out:
        raise ValueError("fan_in_fan_out is True; it must be False: quantized weights lie as nn.Linear's do")
    if config.target_modules == ALL_LINEAR:
        if model is None:
            raise ValueError(
                "target_modules is 'all-linear', which PEFT takes for nn.Linear alone: give the model too, "
                "prepare(config, model)"
            )
        config.target_modules = _linear_names(model)
    if model is not None:
        _check_saved(config, model)
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    return config


def _check_saved(config: LoraConfig, model: nn.Module) -> None:
    """Raises ValueError where a module that is to be trained whole is quantized."""
    ends = tuple(f".{name}" for name in config.modules_to_save or ())
    for name, module in model.named_modules():
        if isinstance(module, PlaneModule) and f".{name}".endswith(ends):
            raise ValueError(
                f"modules_to_save is {config.modules_to_save}, and {name} is quantized; it must name others"
            )


def _linear_names(model: nn.Module) -> list[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear)) and module is not head
    ]


def load(model: nn.Module, path: str | Path, *, is_trainable: bool = False, **options: Any) -> PeftModel:
    """PeftModel.from_pretrained on a quantized model.

    path: a directory that PEFT's save_pretrained wrote, or its name on a hub; the adapter may have been trained on
    another base of the same architecture, the 16-bit one for instance. options: of PeftModel.from_pretrained.

    Raises CheckpointError where the adapter's names or shapes are not those of the model's layers, ValueError where it
    is none that bitfold's layers can have.
    """
    config = PeftConfig.from_pretrained(str(path))
    prepare(config, model)
    _check_fits(path, load_peft_weights(str(path), device="cpu"), model)
    config.inference_mode = not is_trainable
    return PeftModel.from_pretrained(model, str(path), config=config, is_trainable=is_trainable, **options)


def _check_fits(path: str | Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises CheckpointError unless every A [r, k] and B [n, r] belongs to a layer of n x k."""
    modules = dict(model.named_modules())
    unknown = []
    for name, weight in weights.items():
        found = _MATRIX.fullmatch(name)
        if found is None:
            continue  # magnitudes, embeddings: PEFT compares them with what it made of the config
        module: Any = modules.get(found["module"])
        if module is None:
            unknown.append(found["module"])
            continue
        if not isinstance(module, (QuantLinear, nn.Linear)):
            continue
        side, axis = (module.in_features, 1) if found["letter"] == "A" else (module.out_features, 0)
        if weight.dim() == 2 and weight.shape[axis] != side:
            raise CheckpointError(
                f"{path} is an adapter for another model: '{name}' is {list(weight.shape)}, but the layer is "
                f"{module.out_features} x {module.in_features}"
            )
    if unknown:
        raise CheckpointError(
            f"{path} is an adapter for another model: it has {listed(sorted(set(unknown)))}, "
            "which this one lacks"
        )
    if not any(_MATRIX.fullmatch(name) for name in weights):
        raise CheckpointError(f"{path} has no matrices of LoRA ('base_model.model. ... .lora_A.weight')")
