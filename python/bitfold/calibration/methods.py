"""The ways to choose codes, as the loop over the blocks sees them: the seam to bitfold.quantizers.

For each block the loop loads its weights, makes a BlockRun of it (collect.py: what may be asked and done), and calls

    prepare(run, names)     once, before anything is rounded, with all layers of the block that have the method: it may
                            rewrite the block, as long as the block computes the same (folding a scale into the norm
                            before a layer); what it sets as a parameter or buffer of run.module is what is stored
    round(run, name)        for each layer, group by group in the order in which they run, each after the groups
                            before it have been replaced by what was made of them

A method is a row of METHODS; its options are in `run.rules[name].options`, their type in bitfold.rules.METHODS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitfold.calibration import scaling, smoothing
from bitfold.calibration.collect import BlockRun
from bitfold.qtensor import QTensor
from bitfold.quantize import CalibrationSummary, encode_named
from bitfold.quantizers import gptq


@dataclass(frozen=True)
class Rounded:
    """A layer's new weight, and what is to be said of it (None: of plain rounding, where nothing was looked at)."""

    qtensor: QTensor
    summary: CalibrationSummary | None = None


@dataclass(frozen=True)
class Method:
    """See the head of this file.

    needs_inputs: a layer that no input reaches can't be rounded so; gather: what several processes must do together
    before one of them rounds the layer for all. Without it each of them rounds it.
    """

    round: Callable[[BlockRun, str], Rounded]
    prepare: Callable[[BlockRun, Sequence[str]], None] | None = None
    needs_inputs: bool = True
    gather: Callable[[BlockRun, str], object] | None = None


def _format(run: BlockRun, name: str) -> str:
    format = run.rules[name].format
    assert format is not None
    return format


def round_plainly(run: BlockRun, name: str) -> Rounded:
    """Rounding to nearest: the weight alone."""
    return Rounded(encode_named(f"{run.name}.{name}.weight", run.linear(name).weight, _format(run, name)))


def _round_gptq(run: BlockRun, name: str) -> Rounded:
    return _solve(run, name, run.rules[name].options or gptq.GptqOptions())


def _solve(run: BlockRun, name: str, options: gptq.GptqOptions) -> Rounded:
    try:
        # Handed on without a name here: solve lets go of it when it has its factor.
        solved = gptq.solve(run.linear(name).weight, run.take_hessian(name), _format(run, name), options)
    except ValueError as error:
        raise ValueError(f"{run.name}.{name}.weight: {error}") from error
    summary = CalibrationSummary(
        method=solved.method,
        output_error=_root(solved.error),
        rounding_error=_root(solved.rounding_error),
        damping=solved.damping,
        note=solved.note,
    )
    return Rounded(dataclasses.replace(solved.qtensor, g_idx=solved.g_idx), summary)


def _round_awq(run: BlockRun, name: str) -> Rounded:
    """What `scaling.prepare` made, or GPTQ of the scaled weight."""
    note: scaling.Note = run.notes[name]
    if note.qtensor is not None:
        return Rounded(note.qtensor, CalibrationSummary("awq", note.output_error, note.rounding_error))
    made = _solve(run, name, gptq.GptqOptions())
    assert made.summary is not None
    method = "awq" if made.summary.method == "rtn" else f"awq, {made.summary.method}"
    return Rounded(
        made.qtensor, dataclasses.replace(made.summary, method=method, rounding_error=note.rounding_error)
    )


def _round_smooth(run: BlockRun, name: str) -> Rounded:
    """The weight that `smoothing.prepare` made smoother, by plain rounding or GPTQ."""
    if smoothing.options(run, name).then == "round":
        return Rounded(round_plainly(run, name).qtensor, CalibrationSummary("smoothquant"))
    made = _solve(run, name, gptq.GptqOptions())
    assert made.summary is not None
    summary = dataclasses.replace(made.summary, method=f"smoothquant, {made.summary.method}")
    return Rounded(made.qtensor, summary)


def _root(squared: float) -> float | None:
    """The relative norm of an error whose relative square is known (NaN: it isn't)."""
    return None if math.isnan(squared) else math.sqrt(squared)


METHODS: dict[str, Method] = {
    "rtn": Method(round_plainly, needs_inputs=False),
    "gptq": Method(_round_gptq, gather=BlockRun.hessian),
    "awq": Method(_round_awq, prepare=scaling.prepare),
    "smoothquant": Method(_round_smooth, prepare=smoothing.prepare),
}
