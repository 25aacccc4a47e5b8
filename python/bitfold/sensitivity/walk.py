"""A walk through a model, block after block, that stops at each weight that takes part: to round it, to measure it.

With a text for calibration a weight is rounded for what it multiplies in the model as it is then: the blocks and layers
before it that have been replaced are. So a walk in which everything is replaced in its turn makes what
`bitfold.quantize_calibrated` makes, and one in which nothing is makes each weight's codes as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import BlockModel
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.data import Calibration
from bitfold.calibration.methods import METHODS
from bitfold.calibration.workers import Workers
from bitfold.evaluate import Windows
from bitfold.layout import Source
from bitfold.qtensor import QTensor, embedding
from bitfold.quantize import encode_named, quantized_like
from bitfold.rules import Rule
from bitfold.sensitivity.candidates import Candidate, Part
from bitfold.sensitivity.probe import Probe

_ROWS = 1 << 18  # weights whose output's error is summed at a time
_ANY = Rule("*", "int8-channel")  # of a layer that isn't to be rounded by a rule


@dataclass(frozen=True)
class Ground:
    """What is walked on. parts: the weights that take part; calibration: rows of tokens, None where nothing needs
    them; unquantized: the modules of the parts as they are, by name."""

    source: Source
    blocks: BlockModel
    probe: Probe
    windows: Windows
    calibration: Calibration | None
    workers: Workers
    parts: tuple[Part, ...]
    unquantized: Mapping[str, nn.Module]

    @property
    def rows(self) -> Tensor:
        """The windows of the text: [windows, tokens]."""
        return torch.stack(self.windows.ids)


class Stop:
    """A weight, when its turn comes.

    start: the first block that runs when it is replaced; its inputs are `inputs` [windows, tokens, hidden] (None: the
    whole model runs).
    """

    def __init__(
        self,
        ground: Ground,
        part: Part,
        start: int,
        inputs: Tensor | None,
        text: BlockRun | None,
        calibration: BlockRun | None,
    ) -> None:
        self.part, self.start, self.inputs = part, start, inputs
        self._ground, self._text, self._calibration = ground, text, calibration

    @property
    def weight(self) -> Tensor:
        """As it is stored."""
        weight: Any = self._ground.unquantized[self.part.name].weight
        return weight.detach()

    def round(self, candidate: Candidate) -> QTensor:
        """Raises ValueError where the calibration text never reaches the layer, and what rounding raises."""
        assert candidate.format is not None
        name = self.part.name
        if not candidate.needs_calibration:
            return encode_named(f"{name}.weight", self.weight, candidate.format)
        run = self._calibration
        assert run is not None
        layer = _within(run, name)
        if layer in run.never_run:
            raise ValueError(
                f"the calibration text never reaches {name}: give a longer one, or plain formats"
            )
        run.rules[layer] = candidate.rule
        return METHODS[candidate.method].round(run, layer).qtensor

    def modules(self, qtensor: QTensor) -> dict[str, nn.Module]:
        """Quantized modules for all names of the part; they share the planes."""
        ground = self._ground
        return {
            name: quantized_like(ground.unquantized[name], qtensor, ground.blocks.dtype)
            for name in self.part.names
        }

    def divergence(self, qtensor: QTensor | None) -> tuple[float, ...]:
        """Sums of KL over each window, of the model as it is with this weight replaced; None: with its own."""
        ground = self._ground
        own = {name: ground.unquantized[name] for name in self.part.names}
        with ground.probe.replaced(own if qtensor is None else self.modules(qtensor)):
            try:
                return ground.probe.divergence(self.start, self.inputs)
            except ValueError as error:
                format = "its own dtype" if qtensor is None else qtensor.format
                raise ValueError(f"with {self.part.name} in {format}, {error}") from error

    def output_error(self, qtensor: QTensor) -> float | None:
        """Norm of the change of the layer's output on the text over norm of the output; None for an embedding, and
        where the walk doesn't measure it."""
        if self._text is None:
            return None
        hessian = self._text.hessian(_within(self._text, self.part.name))
        error = energy = 0.0
        weight = self.weight
        n, k = weight.shape
        rows = max(1, _ROWS // k)
        for first in range(0, n, rows):
            ids = torch.arange(first, min(n, first + rows))
            part = weight[first : first + rows].float()
            change = embedding(ids, qtensor, torch.float32).sub_(part)
            error += float((change @ hessian).mul_(change).sum(dtype=torch.float64))
            energy += float((part @ hessian).mul_(part).sum(dtype=torch.float64))
        return math.sqrt(max(0.0, error) / energy) if energy > 0 else 0.0


def _within(run: BlockRun, name: str) -> str:
    return name.removeprefix(f"{run.name}.")


def walk(
    ground: Ground, replaced: Mapping[str, nn.Module], *, with_text: bool = True, alone: bool = False
) -> Iterator[Stop]:
    """Every part in the order in which it runs, those outside of the blocks last.

    replaced: the modules that the model has in the places of its own; what is put into it while a stop is yielded,
    counts from then on. with_text: whether stops can measure; alone: whether nothing is replaced, so that errors of
    outputs can be told.
    """
    inputs = _inputs(ground, ground.rows) if with_text else None
    rows = ground.calibration
    calibrated = None if rows is None else _inputs(ground, rows.ids)
    with ground.probe.replaced(replaced):
        if inputs is not None:
            text_calls = ground.blocks.first_inputs(ground.rows[:2], lambda sample, x: None)
            for window, hidden in enumerate(ground.probe.first_inputs()):
                inputs.write_first(window, hidden[0])
        if rows is not None and calibrated is not None:
            calls = ground.blocks.first_inputs(rows.ids, calibrated.write_first)
        for index, name in enumerate(ground.blocks.names):
            parts = {p.name.removeprefix(f"{name}."): p for p in ground.parts if p.block == index}
            rules = dict.fromkeys(parts, _ANY)
            text = run = None
            if inputs is not None:
                block = ground.probe.blocks[index]
                known = rules if alone else {}
                text = _run(ground, name, block, known, text_calls[index], inputs)
                if text.never_run:
                    raise ValueError(f"the text never reaches {name}.{text.never_run[0]}: give a longer one")
            if calibrated is not None:
                run = _run(ground, name, ground.blocks.load(index), rules, calls[index], calibrated)
            for group in _groups(run or text, parts):
                for layer in group:
                    yield Stop(
                        ground,
                        parts[layer],
                        index,
                        None if inputs is None else inputs.data,
                        text if alone else None,
                        run,
                    )
                for layer in group:
                    module: Any = replaced.get(f"{name}.{layer}")
                    if run is not None and module is not None:
                        run.replace(layer, module.qtensor)
            for one, activations in ((text, inputs), (run, calibrated)):
                if one is not None and activations is not None:
                    one.write_outputs()
                    activations.advance()
        last = len(ground.blocks.names)
        for part in ground.parts:
            if part.block is None:
                behind = part.is_head
                yield Stop(
                    ground,
                    part,
                    last if behind else 0,
                    inputs.data if behind and inputs is not None else None,
                    None,
                    None,
                )


def _inputs(ground: Ground, rows: Tensor) -> Activations:
    hidden = ground.source.model_config.get_text_config(decoder=True).hidden_size
    return Activations((*rows.shape, hidden), ground.blocks.dtype, None)


def _run(
    ground: Ground, name: str, block: nn.Module, rules: Mapping[str, Rule], call: Any, inputs: Activations
) -> BlockRun:
    return BlockRun(
        name,
        block,
        rules,
        call,
        inputs,
        ground.workers,
        ground.blocks.dtype,
        config=ground.source.model_config,
    )


def _groups(run: BlockRun | None, parts: Mapping[str, Part]) -> Sequence[Sequence[str]]:
    """Layers by their input in the order in which they run; all at once where nothing depends on it."""
    if run is None or not run.rules:
        return (tuple(parts),)
    return (*run.groups, run.never_run) if run.never_run else run.groups
