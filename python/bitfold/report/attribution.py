"""What each quantized weight does alone: the base model with one weight swapped, against the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitfold.evaluate import Comparison, Progress, Windows, compare_all
from bitfold.experts import QuantExperts
from bitfold.nn import QuantModule


class _Swapped(nn.Module):
    """The base model, with some of its modules replaced while it runs."""

    def __init__(self, base: nn.Module, replacements: Mapping[str, nn.Module]):
        super().__init__()
        self.base = base
        self.replacements = dict(replacements)  # a dict of modules, not submodules: the base owns the device

    def forward(self, **inputs: Any) -> Any:
        originals = {name: self.base.get_submodule(name) for name in self.replacements}
        try:
            for name, module in self.replacements.items():
                self.base.set_submodule(name, module)
            return self.base(**inputs)
        finally:
            for name, module in originals.items():
                self.base.set_submodule(name, module)


def quantized_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the quantized modules that share one weight, by the first of them; a layer's experts are one."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantExperts):
            groups[id(module)] = [name]
        elif isinstance(module, QuantModule):
            groups.setdefault(id(module.planes()[0]), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def attribute(
    base: nn.Module,
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    windows: Windows,
    *,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """Each weight of `groups` (see `quantized_groups`) swapped alone from `model` into `base`, compared with
    `base` under the protocol of evaluate.py. Both models compute in one dtype.
    """
    swapped = {
        first: _Swapped(base, {name: model.get_submodule(name) for name in names})
        for first, names in groups.items()
    }
    return compare_all(base, swapped, windows, progress=progress)
