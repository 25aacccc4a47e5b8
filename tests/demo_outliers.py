"""The demo model with outlier features, made by examples/demo/outliers.py; and models whose layers compute in int8 as
the papers say, in float64, for tests of whole models."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEMO = Path(__file__).parents[1] / "examples" / "demo"


def script() -> Any:
    """examples/demo/outliers.py as a module."""
    spec = importlib.util.spec_from_file_location("demo_outliers_script", DEMO / "outliers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Int8Oracle(nn.Module):
    """A linear layer in int8, x [..., tokens, k]; a batch is one call.

    threshold: of outliers, None: there are none; exact: whether their columns of the weight stay as they are.
    """

    def __init__(self, weight: Tensor, threshold: float | None, exact: bool) -> None:
        super().__init__()
        self.weight = weight.detach().double()
        self.rounded = _round(self.weight)
        self.threshold, self.exact = threshold, exact

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).double()
        kept = torch.zeros(rows.shape[1], dtype=torch.bool)
        if self.threshold is not None:
            kept = (rows.abs() >= self.threshold).any(0)
        y = _round(rows[:, ~kept]) @ self.rounded[:, ~kept].T
        y += rows[:, kept] @ (self.weight if self.exact else self.rounded)[:, kept].T
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _round(values: Tensor) -> Tensor:
    if not values.shape[1]:
        return values
    step = values.abs().amax(1, keepdim=True) / 127
    return torch.where(step > 0, (values / step).round() * step, 0.0)


def in_int8(model: nn.Module, threshold: float | None = None, exact: bool = False) -> nn.Module:
    """A copy of a model whose decoder blocks compute their linear layers by the oracle."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Oracle(layer.weight, threshold, exact))
    return model
