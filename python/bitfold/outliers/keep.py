"""Which layers a recipe's rules with `keep_outlier_layers` pass over: measured on a text, written as plain rules.

A layer is computed as the rule would have it, on what it multiplies in the unquantized model, with the step or the
16-bit columns that calibration finds on this text. Above the rule's bound it goes to the next rule that matches it,
measured in its turn if that has a bound too, and keeps its source dtype where none is left. Weights are rounded to
nearest for it, whatever the rule's method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import layout, recipes
from bitfold.calibration import overlap
from bitfold.calibration.data import Calibration
from bitfold.calibration.ranges import Ranges, kept_for
from bitfold.experts import stack_name
from bitfold.layout import Source
from bitfold.nn import QuantLinear
from bitfold.outliers.measure import Maker, Outliers, Progress, measure
from bitfold.pipeline import Origin
from bitfold.quantize import encode_named
from bitfold.rules import Recipe, Rule, assign


@dataclass(frozen=True)
class Trial:
    """A layer, or the experts of a stack, under one rule with a bound. rule: its place among the recipe's, from 1 on;
    loss: of the expert that loses most; share: of columns with outliers, the same."""

    module: str
    rule: int
    loss: float
    share: float
    is_passed_over: bool


@dataclass(frozen=True)
class Resolved:
    """recipe: plain rules; trials: all that was measured; text: where it was measured, tokens: on how many; seen: the
    passages of the text."""

    recipe: Recipe
    trials: tuple[Trial, ...]
    text: str
    tokens: int
    seen: Mapping[str, object]

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Modules that a rule passed over, each once."""
        return tuple(dict.fromkeys(trial.module for trial in self.trials if trial.is_passed_over))

    @property
    def origin(self) -> Origin:
        """To be noted beside the checkpoint."""
        report = {
            "text": self.text,
            "tokens": self.tokens,
            "layers": [dataclasses.asdict(trial) for trial in self.trials],
        }
        return Origin(report, self.seen, "outliers")


def resolve(
    recipe: str | Path | Recipe,
    model: str | Path | Source,
    text: Calibration,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Resolved:
    """The plain rules that a recipe comes to for a model and a text (`calibration.data.read`).

    Raises ValueError where no rule has a bound; where one with a bound reaches what lies outside of the decoder blocks
    and can't be measured; where the text never reaches a layer; and what `recipes.assign` and `measure` raise.
    """
    recipe = recipes.get(recipe)
    if not recipe.keeps_outlier_layers:
        raise ValueError(
            f"no rule of recipe {recipe.name!r} has keep_outlier_layers; there is nothing to resolve"
        )
    source = model if isinstance(model, Source) else layout.read_source(Path(model))
    plain = tuple(dataclasses.replace(rule, keep_outlier_layers=None) for rule in recipe.rules)
    chains = {name: _chain(recipe, name, info) for name, info in source.infos.items()}
    assign(dataclasses.replace(recipe, rules=_sure(plain, chains)), source.infos)
    tried = {
        name: [i for i in chain if recipe.rules[i].keep_outlier_layers] for name, chain in chains.items()
    }

    def makers(layer: str) -> dict[str, Maker]:
        return {str(i): _as_rule(plain[i], layer) for i in tried.get(stack_name(layer), ())}

    found = measure(source, text.ids, ways=makers, dtype=dtype, device=device, progress=progress)
    measured = _by_module(found)
    trials: list[Trial] = []
    chosen: dict[str, int | None] = {}
    for name, chain in chains.items():
        chosen[name] = None
        for i in chain:
            bound = recipe.rules[i].keep_outlier_layers
            if bound is not None:
                if name not in measured:
                    raise ValueError(_unmeasured(name, recipe.rules[i], found))
                share, losses = measured[name]
                over = bound.is_exceeded(losses[str(i)], share)
                trials.append(Trial(name, i + 1, losses[str(i)], share, over))
                if over:
                    continue
            chosen[name] = i
            break
    rules = _rules(plain, chains, chosen)
    recipe = dataclasses.replace(recipe, rules=rules)
    return Resolved(
        recipe, tuple(trials), text.source, text.ids.numel(), overlap.to_json(overlap.sample_of(text.ids))
    )


def _chain(recipe: Recipe, name: str, info: Any) -> list[int]:
    """The rules that a module may come to, in their order: the last is the first without a bound."""
    chain = []
    for i, rule in enumerate(recipe.rules):
        if rule.matches(name, info):
            chain.append(i)
            if rule.keep_outlier_layers is None:
                break
    return chain


def _sure(plain: tuple[Rule, ...], chains: Mapping[str, list[int]]) -> tuple[Rule, ...]:
    """Without those rules that are reached only where another passes a module over: it may never do so, which is no
    mistake."""
    first = {chain[0] for chain in chains.values() if chain}
    later = {i for chain in chains.values() for i in chain[1:]} - first
    return tuple(rule for i, rule in enumerate(plain) if i not in later)


def _by_module(found: Outliers) -> dict[str, tuple[float, dict[str, float]]]:
    """Share of columns and losses by way; of a stack those of the expert that has most."""
    measured: dict[str, tuple[float, dict[str, float]]] = {}
    for layer in found.layers:
        module = stack_name(layer.name)
        share, losses = measured.get(module, (0.0, {}))
        losses = {way: max(loss, losses.get(way, 0.0)) for way, loss in layer.losses.items()}
        measured[module] = max(share, found.input_of(layer.name).sixteen), losses
    return measured


def _unmeasured(name: str, rule: Rule, found: Outliers) -> str:
    if name in {stack_name(layer) for layer in found.unreached}:
        return f"the text never reaches {name}, and rule {rule.pattern!r} has keep_outlier_layers: give a longer one"
    return (
        f"{name} lies outside of the decoder blocks, where nothing is measured, and rule {rule.pattern!r} has "
        f"keep_outlier_layers: put a rule for it first (match = {name!r})"
    )


def _rules(
    plain: tuple[Rule, ...], chains: Mapping[str, list[int]], chosen: Mapping[str, int | None]
) -> tuple[Rule, ...]:
    """Those that were passed over by their names, and behind them the rules that others still come to."""
    named = []
    for name, chain in chains.items():
        choice = chosen[name]
        if chain and choice != chain[0]:
            named.append(Rule(name) if choice is None else dataclasses.replace(plain[choice], pattern=name))
    used = {chain[0] for name, chain in chains.items() if chain and chosen[name] == chain[0]}
    rest = tuple(rule for i, rule in enumerate(plain) if i in used)
    return (*named, *rest)


# ---- a layer as a rule has it ----


def _as_rule(rule: Rule, layer: str) -> Maker:
    """What quantizing with this text makes of a layer: one that it wouldn't make is a ValueError here too. Experts keep
    nothing for their activations."""

    def make(weight: Tensor, ranges: Callable[[], Ranges]) -> Callable[[Tensor], Tensor]:
        assert rule.format is not None
        kept = {}
        if rule.activations.gains and stack_name(layer) == layer:
            try:
                kept = kept_for(rule.activations, ranges(), weight)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error
        activations = rule.activations.having(step="x_scale" in kept, outliers="outlier_weight" in kept)
        qtensor = encode_named(f"{layer}.weight", weight, rule.format)
        return QuantLinear(qtensor, None, activations, **kept).eval()

    return make
