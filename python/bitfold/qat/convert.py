"""A model's layers, swapped for ones that round, and those for packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bitfold import recipes
from bitfold.activations import FLOAT, Activations
from bitfold.embeddings import QuantEmbedding
from bitfold.nn import QuantLinear, put_module
from bitfold.qat.fake import check_learned
from bitfold.qat.modules import FakeQuantEmbedding, FakeQuantLinear, first_steps, trainable_activations
from bitfold.quantize import check_swappable, describe, refuse_calibration
from bitfold.rules import Recipe, assign


def prepare(
    model: nn.Module,
    recipe: str | Path | Recipe,
    *,
    activations: str | Activations | None = None,
    learned_steps: bool = False,
) -> nn.Module:
    """Swap the layers that a recipe names for ones that compute with rounded weights, in place; returns the model.

    Args:
        model: its parameters stay the same objects, under the same names, so that optimizers and checkpoints of
            training go on as they were. Shared weights stay shared.
        recipe: what `bitfold.quantize` takes.
        activations: what all linear layers do with their inputs, "int8", "fp8", "llm-int8" or "float", in the place of
            what the recipe says (None). Packed layers do it too where they can; int8 goes with int8 weights and GGUF's
            blocks, and in front of other weights is for training alone.
        learned_steps: train the scales too (symmetric integers): each layer gets a parameter `steps`.

    Raises ValueError, before anything changes, for a recipe that is unknown, doesn't fit the model or needs
    calibration, for experts, for steps that can't be learned, and where none of the weights trains.
    """
    given = None if activations is None else trainable_activations(activations)
    recipe = recipes.get(recipe)
    refuse_calibration(recipe)
    infos = describe(model)
    assigned = assign(recipe, infos)
    formats = {name: item.format for name, item in assigned.items() if item.format is not None}
    for name, format in formats.items():
        if infos[name].kind == "experts":
            raise ValueError(f"{name} is a stack of experts, which can't be trained so: keep it by a rule")
        check_swappable(name, model, infos[name])
        if learned_steps:
            check_learned(format)
    weights = [model.get_submodule(name).weight for name in formats]
    if not any(weight.requires_grad for weight in weights):
        raise ValueError(
            f"none of the {len(weights)} weights to quantize trains: requires_grad is False for all"
        )
    steps: dict[str, Any] = {}
    for name, format in formats.items():
        owner = infos[name].tied_to or name
        old: Any = model.get_submodule(name)
        if learned_steps and owner not in steps:
            steps[owner] = first_steps(old.weight, format)
        new: FakeQuantLinear | FakeQuantEmbedding
        if isinstance(old, nn.Embedding):
            new = FakeQuantEmbedding(name, old, format, steps.get(owner))
        else:
            wanted = assigned[name].activations if given is None else given
            new = FakeQuantLinear(name, old, format, steps.get(owner), wanted)
        put_module(model, old, new.train(old.training))
    return model


def convert(model: nn.Module) -> nn.Module:
    """Swap the layers of `prepare` for packed ones, in place; returns the model.

    The codes and scales are, bit for bit, those that a forward pass now would use. Raises ValueError where there are
    no such layers, and for a weight that holds NaN, which it names.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (FakeQuantLinear, FakeQuantEmbedding))
    }
    if not layers:
        raise ValueError("the model has no layers that round their weights: bitfold.qat.prepare makes them")
    packed: dict[int, Any] = {}  # by the weight, which tied layers share
    for module in layers.values():
        key = id(module.weight)
        if key not in packed:
            packed[key] = module.qtensor()
        new: QuantLinear | QuantEmbedding
        if isinstance(module, FakeQuantEmbedding):
            new = QuantEmbedding(packed[key], module.padding_idx, module.weight.dtype, module.scale)
        else:
            bias: Any = module.bias
            does = module.activations if module.activations.fits(module.format) else FLOAT
            new = QuantLinear(packed[key], bias, does)
        packed[key] = new.qtensor  # of this module's parameters, so that the next one shares them
        new.train(module.training)
        new.prepare()
        put_module(model, module, new)
    return model
