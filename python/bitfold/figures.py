"""What the presets cost on the demo model, as it was measured.

The file data/demo-kl.json is written by `python examples/demo/run.py --recipes all --json ...` and holds machine and
commit of the measurement; no figure of it is written anywhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

FILE = "data/demo-kl.json"


@dataclass(frozen=True)
class Figure:
    """One preset on the demo model. bits_per_weight: of the quantized weights; mean_kl: in nats a token, with its
    standard error; top1: share of tokens where both models put the same token first."""

    bits_per_weight: float
    bytes: int
    mean_kl: float
    mean_kl_error: float
    p99_kl: float
    top1: float
    perplexity: float


@dataclass(frozen=True)
class DemoFigures:
    """All presets, and where they were measured: commit, machine, instruction set, protocol."""

    commit: str
    machine: str
    isa: str
    torch: str
    protocol: str
    base_bytes: int
    base_perplexity: float
    recipes: dict[str, Figure]


def demo_figures() -> DemoFigures:
    """The figures that come with this bitfold."""
    text = resources.files("bitfold").joinpath(FILE).read_text(encoding="utf-8")
    data = json.loads(text)
    recipes = {name: Figure(**fields) for name, fields in data.pop("recipes").items()}
    known = {name: data[name] for name in DemoFigures.__dataclass_fields__ if name != "recipes"}
    return DemoFigures(recipes=recipes, **known)
