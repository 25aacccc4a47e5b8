"""The outlier features of a model, and what 8 bits lose in each of its layers, measured on a text.

The decoder blocks are walked through as calibration does it: one has weights at a time, and what is held of the text is
what goes into a block for each sequence. Nothing is quantized on the way: each layer is measured alone, on what it
multiplies in the model as it is. A sequence is one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitfold import layout
from bitfold.calibration import mappings
from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import BlockModel, Call, Compute
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.ranges import Ranges
from bitfold.calibration.workers import Workers
from bitfold.layout import Source, Step
from bitfold.outliers.columns import ACTIVATION_THRESHOLD, Columns, Inputs, Tally, weight_columns
from bitfold.outliers.ways import WAYS, Way, prepare
from bitfold.pipeline import check_finite, give_back_memory
from bitfold.rules import Assignment, Rule

# What makes a feature systematic (Dettmers et al. 2022, section 4.1).
LAYER_SHARE, TOKEN_SHARE = 0.25, 0.06
_ANY = Rule("*", "int8-channel")  # of all layers: BlockRun looks at those that have a rule

Maker = Callable[[Tensor, Callable[[], Ranges]], Callable[[Tensor], Tensor]]
"""Makes of a weight [n, k] the layer without bias as a function of x: float32 [tokens, k] of one call -> [tokens, n].
What calibration knows of its inputs is found when it is asked for: one more pass over the text."""

Progress = Callable[[str, int, int], None]
"""Told as work goes on: what is worked on, the work done so far, the work to do in all."""


@dataclass(frozen=True)
class Layer:
    """A linear layer. name: in the model; weight: its columns with outliers; losses: by way (ways.py) the norm of the
    change of the layer's output over norm of the output."""

    name: str
    shape: tuple[int, int]
    weight: Columns
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Recurring:
    """A channel of the residual stream that is an outlier behind several norms. norms: how many; share: of all norms;
    token_share: of tokens, mean over these norms; peak: its largest magnitude."""

    index: int
    norms: int
    share: float
    token_share: float
    peak: float

    @property
    def is_systematic(self) -> bool:
        """Whether it is an outlier feature by the paper's rule."""
        return self.share >= LAYER_SHARE and self.token_share >= TOKEN_SHARE


@dataclass(frozen=True)
class Outliers:
    """What was measured. inputs: what goes into layers, in the order in which they run; layers: the same, each of them;
    unreached: layers that no token of the text comes to."""

    threshold: float
    tokens: int
    sequences: int
    inputs: tuple[Inputs, ...]
    layers: tuple[Layer, ...]
    unreached: tuple[str, ...]

    def input_of(self, layer: str) -> Inputs:
        return next(one for one in self.inputs if layer in one.names)

    @property
    def recurring(self) -> tuple[Recurring, ...]:
        """Channels of the residual stream with outliers behind norms, those behind most norms first."""
        norms = [one for one in self.inputs if one.stream]
        found: dict[int, list] = {}
        for one in norms:
            for feature in one.outliers:
                found.setdefault(feature.index, []).append(feature)
        channels = [
            Recurring(
                index,
                len(features),
                len(features) / len(norms),
                sum(f.token_share for f in features) / len(features),
                max(f.peak for f in features),
            )
            for index, features in found.items()
        ]
        return tuple(sorted(channels, key=lambda c: (-c.norms, -c.peak, c.index)))


def measure(
    model: str | Path | Source,
    rows: Tensor,
    *,
    threshold: float = ACTIVATION_THRESHOLD,
    ways: Mapping[str, Way] | Callable[[str], Mapping[str, Maker]] = WAYS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Outliers:
    """Measure the linear layers of a model's decoder blocks on a text.

    Args:
        model: a Hugging Face model directory, unquantized, or what `layout.read_source` makes of it.
        rows: token ids [sequences, tokens], int64.
        threshold: from which magnitude on a value is an outlier.
        ways: to compute layers in 8 bits; none: nothing is rounded. Or a function that has for a layer's name any ways
            to compute it.
        dtype, device: of the model while it runs, and where. Ways compute in float32.
        progress: told as work goes on.

    Raises CheckpointError for what is no unquantized model or can't be run block by block, ValueError for a threshold
    that is not a positive number, for no rows, and where inputs aren't finite.
    """
    if not 0 < threshold < float("inf"):
        raise ValueError(f"threshold is {threshold}; it must be a positive number")
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(
            f"rows has shape {list(rows.shape)}; it must be [sequences, tokens], neither of them 0"
        )
    source = model if isinstance(model, Source) else layout.read_source(Path(model))
    kept = {name: Assignment(None, None, "") for name in source.infos}
    steps = layout.steps(source, kept)
    blocks = BlockModel(source, steps, dtype, torch.device(device))
    hidden = source.model_config.get_text_config(decoder=True).hidden_size
    held = Activations((*rows.shape, hidden), dtype, None)
    tell = progress or (lambda what, done, total: None)
    makers = ways if callable(ways) else partial(_makers, ways, threshold)
    walk = _Walk(threshold, makers, [], [], [])
    with Workers() as workers:
        calls = blocks.first_inputs(rows, held.write_first)
        for index, name in enumerate(blocks.names):
            tell(name, index, len(blocks.names))
            run = _run_of(source, steps, blocks, index, calls[index], held, workers)
            walk.add(run, _behind_norms(run, source))
            run.write_outputs()
            held.advance()
            del run
            give_back_memory()
    tell("", len(blocks.names), len(blocks.names))
    return Outliers(
        threshold, rows.numel(), len(rows), tuple(walk.inputs), tuple(walk.layers), tuple(walk.unreached)
    )


def _run_of(
    source: Source,
    steps: Sequence[Step],
    blocks: BlockModel,
    index: int,
    call: Call,
    held: Activations,
    workers: Workers,
) -> BlockRun:
    name = blocks.names[index]
    layers = [
        layer
        for step in steps
        if step.name.startswith(f"{name}.") and (info := source.infos.get(step.module)) is not None
        if info.obstacle is None and not info.is_default_kept
        for layer in step.layers
    ]
    module = blocks.load(index)
    for key, parameter in module.named_parameters():
        check_finite(f"{name}.{key}", parameter)
    rules = {layer.removeprefix(f"{name}."): _ANY for layer in layers}
    return BlockRun(name, module, rules, call, held, workers, blocks.dtype, config=source.model_config)


def _behind_norms(run: BlockRun, source: Source) -> set[str]:
    """The layers of a block that a norm feeds, as far as the architecture is known."""
    with contextlib.suppress(ValueError):
        folds = mappings.folds(run.module, source.model_config.get_text_config(decoder=True))
        return {
            name for fold in folds if not isinstance(fold.source, nn.Linear) for name in fold.feed.targets
        }
    return set()


def _makers(ways: Mapping[str, Way], threshold: float, name: str) -> dict[str, Maker]:
    def maker(way: Way) -> Maker:
        return lambda weight, ranges: prepare(way, weight, threshold)

    return {label: maker(way) for label, way in ways.items()}


@dataclass
class _Walk:
    """What has been found so far. makers: ways to compute a layer, by its name."""

    threshold: float
    makers: Callable[[str], Mapping[str, Maker]]
    inputs: list[Inputs]
    layers: list[Layer]
    unreached: list[str]

    def add(self, run: BlockRun, behind_norms: set[str]) -> None:
        """A block, its layers in the order in which they run."""
        for group in _by_input(run):
            names = [f"{run.name}.{name}" for name in group]
            weights = {name: run.linear(own).weight.detach() for name, own in zip(names, group, strict=True)}
            tally = self._look(run, group[0])
            self.inputs.append(tally.inputs(names, group[0] in behind_norms))
            losses = self._compute(run, group[0], weights)
            for name, weight in weights.items():
                n, k = weight.shape
                self.layers.append(Layer(name, (n, k), weight_columns(name, weight), losses[name]))
        self.unreached += [f"{run.name}.{name}" for name in run.never_run]

    def _look(self, run: BlockRun, layer: str) -> Tally:
        """What a layer multiplies."""
        tally = Tally(run.linear(layer).in_features, self.threshold)
        for xs in run.inputs_by_wave(layer):
            for x in xs:
                if not x.isfinite().all():
                    raise ValueError(
                        f"{run.name}: the inputs of {layer} are not finite: another dtype, such as float32, may do"
                    )
                tally.add(x)
        return tally

    def _compute(
        self, run: BlockRun, layer: str, weights: Mapping[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """The losses of layers that share an input, by name and by way; layer: the first of them, within the block."""
        ranges = partial(run.ranges, layer)
        ways = {
            name: {label: make(weight, ranges) for label, make in self.makers(name).items()}
            for name, weight in weights.items()
        }
        wanted = [name for name in weights if ways[name]]
        energies = dict.fromkeys(weights, 0.0)
        changes = {name: dict.fromkeys(own, 0.0) for name, own in ways.items()}

        def work(item: tuple[str, Tensor]) -> tuple[float, list[float]]:
            """Squared norms of a layer's output for one sequence, and of its change in each way."""
            name, x = item
            y = Compute(torch.float32).linear(x, weights[name])
            return _square(y), [_square(compute(x) - y) for compute in ways[name].values()]

        for xs in run.inputs_by_wave(layer) if wanted else ():
            items = [(name, x.to(torch.float32)) for name in wanted for x in xs if len(x)]
            for (name, _), (energy, found) in zip(items, run.map(work, items), strict=True):
                energies[name] += energy
                for label, change in zip(ways[name], found, strict=True):
                    changes[name][label] += change
        return {
            name: {
                label: (change / energies[name]) ** 0.5 if energies[name] > 0 else 0.0
                for label, change in own.items()
            }
            for name, own in changes.items()
        }


def _by_input(run: BlockRun) -> list[tuple[str, ...]]:
    """Layers that have the same input; an expert's is its own."""
    return [tuple(names) for group in run.groups for names in run.share_input(group)]


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
