"""One weight at a time, one candidate at a time: KL on a text, errors of the output and of the weight, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitfold.outfile import check_output
from bitfold.qtensor import QTensor
from bitfold.quantize import relative_rmse
from bitfold.sensitivity import ground as grounds
from bitfold.sensitivity import result
from bitfold.sensitivity.cache import measure_caches
from bitfold.sensitivity.candidates import Candidate, Part, default, for_part, read_all
from bitfold.sensitivity.ground import Texts
from bitfold.sensitivity.result import Caches, Entry, Sensitivity, Together
from bitfold.sensitivity.walk import Ground, Stop, walk
from bitfold.shards import CheckpointError

Progress = Callable[[str, int, int], None]
"""Told as work goes on: what is worked on, the work done so far, the work to do in all."""
_RUN = 1000  # units of progress for a run of the whole model over the text
_CACHES = 10 * _RUN  # five runs of few tokens at a time, about as long as ten


def measure(
    model: str | Path,
    texts: Texts,
    candidates: Sequence[str] = (),
    *,
    include: Sequence[str] = (),
    additivity: bool = True,
    caches: bool = False,
    output: Path | None = None,
    restart: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Sensitivity:
    """How far the model's predictions move when one weight alone is quantized, for every weight and candidate.

    Args:
        model: a Hugging Face model directory, unquantized.
        texts: to measure on, and to calibrate on where a candidate needs it.
        candidates: formats, with a method in front or without; none: `candidates.default`.
        include: patterns that spell the names of embeddings or the head that are to take part.
        additivity: also quantize all weights as each candidate, to see whether the KLs add up.
        caches: also measure the KV cache in each format.
        output: the file to write, after every block. What is there of the same model, texts and version is kept and
            not measured again.
        restart: measure all anew, whatever `output` holds.
        dtype, device: to compute in, and where.
        progress: told as work goes on.

    Raises CheckpointError for what is no model, or a file of another measurement; ValueError for an output that is no
    such file, texts that don't do, unknown candidates, and a candidate that needs a calibration text where there is
    none.
    """
    if output is not None:
        check_output("output", output, result.FILE)
    asked = asked_of(candidates, texts)
    with grounds.prepare(model, texts, include, dtype=dtype, device=device) as ground:
        job = Job(ground, choices(ground, asked), additivity, output, progress, want_caches=caches)
        if output is not None and output.exists() and not restart:
            job.resume(result.read(output))
        return job.run()


def asked_of(candidates: Sequence[str], texts: Texts) -> tuple[Candidate, ...]:
    """The candidates that are named. Raises ValueError for one that there isn't, or that lacks a calibration text."""
    asked = read_all(candidates)
    for candidate in asked:
        if candidate.needs_calibration and not texts.calibration:
            raise ValueError(
                f"candidate {str(candidate)!r} needs a text to calibrate on: give --calibration FILE"
            )
    return asked


def choices(ground: Ground, asked: Sequence[Candidate]) -> dict[str, tuple[Candidate, ...]]:
    """What each part is measured as, by its name: those of `asked` that fit it, or where none are asked for, the
    default ones."""
    found = {}
    for part in ground.parts:
        if asked:
            found[part.name] = tuple(c for c in for_part(part, asked) if c.format is not None)
        else:
            found[part.name] = default(part, ground.calibration is not None)
    if not any(found.values()):
        raise ValueError(f"none of the candidates fits a weight of the model: {', '.join(map(str, asked))}")
    return found


@dataclass
class Job:
    """A measurement under way. wanted: candidates by part; want_caches: whether the KV cache is measured too; entries,
    caches: what is there, entries by part and candidate."""

    ground: Ground
    wanted: Mapping[str, Sequence[Candidate]]
    additivity: bool
    output: Path | None
    progress: Progress | None
    want_caches: bool = False
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    together: dict[str, Together] = field(default_factory=dict)
    zero: float = 0.0
    caches: Caches | None = None
    _done: int = 0

    def __post_init__(self) -> None:
        self.of = grounds.fingerprint(self.ground)

    def resume(self, before: Sensitivity) -> None:
        """Take over what an earlier run measured."""
        for name, value in self.of.items():
            if before.of.get(name) != value:
                raise CheckpointError(
                    f"{self.output} was measured with another {name}: name another file, or measure anew (--restart)"
                )
        if before.window_tokens != self.ground.windows.scored:
            raise CheckpointError(
                f"{self.output} was measured on another number of tokens: name another file, or measure anew "
                "(--restart)"
            )
        names = {part.name for part in self.ground.parts}
        self.entries = {(e.module, e.candidate): e for e in before.entries if e.module in names}
        self.zero, self.caches = before.zero, before.caches
        if set(before.modules) == names:
            self.together = {one.candidate: one for one in before.additivity}

    def run(self) -> Sensitivity:
        self._total = self._work()
        if self.want_caches and self.caches is None:  # first: a model or a text that won't do is said at once
            self.caches = measure_caches(self.ground, self._tell)
            self._done += _CACHES
            self._save(finished=False)
        if self._missing():
            self._measure_each()
        if self.additivity:
            for candidate, assignment in uniform(self.ground.parts, self.wanted).items():
                if str(candidate) not in self.together:
                    self.together[str(candidate)] = self._all_as(candidate, assignment)
                    self._save(finished=False)
        return self._save(finished=True)

    def _measure_each(self) -> None:
        block = None
        for stop in walk(self.ground, {}, alone=True):
            if stop.start != block:
                if block is not None:
                    self._save(finished=False)
                block = stop.start
                self._check_zero(stop)
            for candidate in self.wanted[stop.part.name]:
                if (stop.part.name, str(candidate)) not in self.entries:
                    self._tell(f"{stop.part.name} as {candidate}")
                    entry = measure_one(stop, candidate)
                    self.entries[entry.module, entry.candidate] = entry
                    self._done += self._cost(stop.part)

    def _check_zero(self, stop: Stop) -> None:
        """The unchanged model, run from this block on, gives the same logits to the bit."""
        sums = self.ground.probe.divergence(stop.start, stop.inputs)
        self.zero = max([self.zero, *map(abs, sums)])
        if self.zero != 0.0:
            raise CheckpointError(
                f"the unchanged model, run from block {stop.start} on, is {self.zero:.3g} nats away from itself: its "
                "blocks don't follow one another in a chain, and bitfold can't measure them one at a time"
            )

    def _all_as(self, candidate: Candidate, assignment: Mapping[str, Candidate]) -> Together:
        modules = grounds.build(self.ground, assignment, lambda what: self._tell(f"all weights: {what}"))
        sums = grounds.divergence(self.ground, modules)
        added = math.fsum(
            self.entries[name, str(one)].kl(self.ground.windows.scored).value
            for name, one in assignment.items()
        )
        self._done += _RUN
        return Together(str(candidate), added, grounds.mean(self.ground, sums))

    # ---- how much there is to do ----

    def _cost(self, part: Part) -> int:
        """Of a run from the part's block on, in units of progress; what comes behind the blocks is about as much as
        one of them."""
        count = len(self.ground.blocks.names)
        runs = 1 if part.is_head else count + 1 - (part.block or 0)
        return max(1, _RUN * runs // (count + 1))

    def _missing(self) -> list[tuple[str, Candidate]]:
        """What is still to be measured alone."""
        return [
            (name, candidate)
            for name, wanted in self.wanted.items()
            for candidate in wanted
            if (name, str(candidate)) not in self.entries
        ]

    def _work(self) -> int:
        names = {part.name: part for part in self.ground.parts}
        left = sum(self._cost(names[name]) for name, _ in self._missing())
        if self.additivity:
            left += sum(_RUN for c in uniform(self.ground.parts, self.wanted) if str(c) not in self.together)
        if self.want_caches and self.caches is None:
            left += _CACHES
        return max(1, left)

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, self._done, self._total)

    def _save(self, finished: bool) -> Sensitivity:
        ground = self.ground
        found = Sensitivity(
            of=self.of,
            protocol=ground.windows.protocol,
            window_tokens=ground.windows.scored,
            calibration="" if ground.calibration is None else ground.calibration.source,
            modules={
                part.name: {
                    "names": part.names,
                    "shape": part.shape,
                    "kept_bytes": part.kept,
                    "block": part.block,
                }
                for part in ground.parts
            },
            entries=tuple(self.entries.values()),
            zero=self.zero,
            additivity=tuple(self.together.values()),
            seen=grounds.seen(ground),
            overlap=grounds.shared_passages(ground),
            finished=finished,
            caches=self.caches,
        )
        if self.output is not None:
            result.write(self.output, found)
        return found


def measure_one(stop: Stop, candidate: Candidate) -> Entry:
    """The weight of a stop as one candidate."""
    qtensor: QTensor = stop.round(candidate)
    return Entry(
        module=stop.part.name,
        candidate=str(candidate),
        nbytes=stop.part.nbytes(candidate),
        window_kl=stop.divergence(qtensor),
        output_error=stop.output_error(qtensor),
        weight_error=relative_rmse(stop.weight, qtensor),
    )


def uniform(
    parts: Iterable[Part], wanted: Mapping[str, Sequence[Candidate]]
) -> dict[Candidate, dict[str, Candidate]]:
    """For each candidate that all parts of the decoder blocks were measured as: all parts as that, those outside of
    the blocks as what it means for them, or kept."""
    parts = tuple(parts)
    inside = [part for part in parts if part.block is not None]
    common = (
        [c for c in wanted[inside[0].name] if all(c in wanted[part.name] for part in inside)]
        if inside
        else []
    )
    found: dict[Candidate, dict[str, Candidate]] = {}
    for candidate in common:
        found[candidate] = {
            part.name: fitting
            for part in parts
            for fitting in for_part(part, [candidate])
            if fitting in wanted[part.name]
        }
    return found
