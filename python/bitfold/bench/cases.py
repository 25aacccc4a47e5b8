"""The cases: which contestants an op, shape, batch and dtype have, and the rows that timing them gives.

Every round of a case also reads a buffer of `rotation_bytes`. That measures the ceiling beside the kernels,
and it empties the cache: no contestant finds there what it read a round ago. Within its turn it uses as many
matrices as it makes calls.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfold.bench.ceilings import Ceiling, copies, rotate
from bitfold.bench.clock import CALLS_PER_TURN, MIN_ROUNDS, Clock, CpuClock, Spread, take_turns
from bitfold.bench.contestants import DTYPES, Coder, Multiplier
from bitfold.bench.gpu import EventClock, GraphClock
from bitfold.bench.validate import check_agreement, check_decoding, check_encoding, check_product


@dataclass(frozen=True)
class Timing:
    """How cases are timed: `take_turns` has the meaning. device: "cpu" or "cuda"; threads: the CPU's."""

    threads: int
    seconds: float
    min_rounds: int = MIN_ROUNDS
    device: str = "cpu"

    def spreads(self, runs: Mapping[str, Callable[[], object]], *, waits: bool = False) -> dict[str, Spread]:
        """What the calls of each contestant take. waits: they wait for the GPU, as encode does."""
        clock: Clock = CpuClock(self.threads)
        if self.device == "cuda":
            clock = EventClock() if waits else GraphClock()
        return take_turns(runs, self.seconds, clock=clock, min_rounds=self.min_rounds)


@dataclass(frozen=True)
class Case:
    """One comparison. m: rows of the activations (linear, int8), None for encode and decode. Of kv: n query heads of k
    numbers, and m tokens that they attend to."""

    op: str
    n: int
    k: int
    m: int | None
    dtype: str

    def __str__(self) -> str:
        batch = "" if self.m is None else f" m={self.m}"
        return f"{self.op} {self.n}x{self.k}{batch} {self.dtype}"


Rows = list[dict[str, Any]]


class Contestant(Protocol):
    """What every contestant of a case has: a name, what it is ("bitfold", "torch" or "peer"), and a format or None."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def format(self) -> str | None: ...


def linear_cases(
    n: int,
    k: int,
    makers: list[Callable[[Tensor], Multiplier]],
    batches: list[int],
    dtypes: list[str],
    reader: Ceiling,
    timing: Timing,
    op: str = "linear",
    draw: Callable[[int, int], Tensor] = torch.randn,
) -> Iterator[tuple[Case, Rows]]:
    """Every batch and dtype on one weight [n, k]; rows of (contestants, ceiling) for each case. draw: an x [m, k]."""
    weight = torch.randn(n, k)
    inputs = {(m, dtype): draw(m, k).to(DTYPES[dtype]) for dtype in dtypes for m in batches}
    calls: dict[str, Callable[..., Any]] = {}
    multipliers, errors = [], {}
    for make in makers:
        multiplier = make(weight)
        multipliers.append(multiplier)
        calls[multiplier.name] = rotate([multiplier.copy() for _ in range(CALLS_PER_TURN)])
        exact = multiplier.weights()
        for (m, dtype), x in inputs.items():
            if dtype in multiplier.dtypes:
                own = multiplier.activations(x)
                y = calls[multiplier.name](own)
                errors[multiplier.name, m, dtype] = check_product(multiplier, own, y, exact, dtype)
    for (m, dtype), x in inputs.items():
        case = Case(op, n, k, m, dtype)
        here = [multiplier for multiplier in multipliers if dtype in multiplier.dtypes]
        runs = {
            multiplier.name: partial(calls[multiplier.name], multiplier.activations(x)) for multiplier in here
        }
        spreads = timing.spreads({**runs, reader.name: reader.run})
        rows = []
        for multiplier in here:
            row = row_of(case, multiplier, spreads)
            row["error"] = errors[multiplier.name, m, dtype]
            row["bytes"] = multiplier.nbytes
            row["flop"] = 2 * m * n * k
            if multiplier.plan is not None:
                row["plan"] = dataclasses.asdict(multiplier.plan(m, DTYPES[dtype]))
            rows.append(row)
        complete = with_ceilings(rows, spreads, [reader], f"torch {dtype}")
        for row, multiplier in zip(rows, here, strict=False):  # how much of the gain that fewer bytes allow
            row["of_fewer_bytes"] = row["over_torch"] * multiplier.nbytes / (n * k * DTYPES[dtype].itemsize)
        yield case, complete


def encode_cases(
    n: int,
    k: int,
    coders: list[Coder],
    dtypes: list[str],
    reader: Ceiling,
    timing: Timing,
    op: str = "encode",
) -> Iterator[tuple[Case, Rows]]:
    """Encoding of a matrix of each dtype. bytes: of the matrix and of its packed form."""
    for dtype in dtypes:
        case = Case(op, n, k, None, dtype)
        first = torch.randn(n, k).to(DTYPES[dtype])
        packed = {coder.name: coder.encode(first) for coder in coders}
        errors = {coder.name: check_encoding(coder, first, packed[coder.name]) for coder in coders}
        check_agreement(coders, packed)
        source = _ring(first, -(-reader.nbytes // first.nbytes))  # shared: nobody's are in the cache
        runs: dict[str, Callable[[], object]] = {
            coder.name: partial(_encode_next, coder, source) for coder in coders
        }
        ceilings = [*copies(source), reader]
        runs |= {ceiling.name: ceiling.run for ceiling in ceilings}
        spreads = timing.spreads(runs, waits=True)
        rows = [row_of(case, coder, spreads) for coder in coders]
        for row, coder in zip(rows, coders, strict=True):
            row["error"] = errors[coder.name]
            row["bytes"] = first.nbytes + coder.nbytes(packed[coder.name])
            row["weights_per_s_per_core"] = n * k / spreads[coder.name].median / timing.threads
        yield case, with_ceilings(rows, spreads, ceilings, None)


def decode_cases(
    n: int, k: int, coders: list[Coder], dtypes: list[str], reader: Ceiling, timing: Timing
) -> Iterator[tuple[Case, Rows]]:
    """Decoding to each dtype. bytes: of the packed matrix and of the output."""
    weight = torch.randn(n, k)
    packed = {coder.name: coder.encode(weight) for coder in coders}
    check_agreement(coders, packed)
    clones = {
        coder.name: [coder.clone(packed[coder.name]) for _ in range(CALLS_PER_TURN)] for coder in coders
    }
    for dtype in dtypes:
        case = Case("decode", n, k, None, dtype)
        here = [coder for coder in coders if dtype in coder.dtypes]
        errors = {coder.name: check_decoding(coder, packed[coder.name], dtype) for coder in here}
        runs: dict[str, Callable[[], object]] = {
            coder.name: rotate(
                [partial(coder.decode, matrix, DTYPES[dtype]) for matrix in clones[coder.name]]
            )
            for coder in here
        }
        ceilings = [*copies(_ring(weight.to(DTYPES[dtype]), 2 * CALLS_PER_TURN)), reader]
        runs |= {ceiling.name: ceiling.run for ceiling in ceilings}
        spreads = timing.spreads(runs)
        rows = [row_of(case, coder, spreads) for coder in here]
        for row, coder in zip(rows, here, strict=True):
            row["error"] = errors[coder.name]
            row["bytes"] = coder.nbytes(packed[coder.name]) + n * k * DTYPES[dtype].itemsize
            row["weights_per_s_per_core"] = n * k / spreads[coder.name].median / timing.threads
        yield case, with_ceilings(rows, spreads, ceilings, None)


def _encode_next(coder: Coder, source: Callable[[], Tensor]) -> object:
    return coder.encode(source())


def _ring(matrix: Tensor, count: int) -> Callable[[], Tensor]:
    """Gives one after another of `count` copies of a matrix, at least as many as a turn has calls."""
    return itertools.cycle([matrix.clone() for _ in range(max(CALLS_PER_TURN, count))]).__next__


def row_of(case: Case, one: Contestant, spreads: dict[str, Spread]) -> dict[str, Any]:
    facts = {"name": one.name, "kind": one.kind, "format": one.format, "ms": spreads[one.name].as_ms()}
    return {**dataclasses.asdict(case), **facts}


def with_ceilings(
    rows: Rows, spreads: dict[str, Spread], ceilings: list[Ceiling], baseline: str | None
) -> Rows:
    """The rows with GB/s, shares of the ceilings, the speed over `baseline` and bitfold's over the fastest peer of
    the same format; then a row for each ceiling."""
    speeds = {ceiling.name: ceiling.nbytes / spreads[ceiling.name].median for ceiling in ceilings}
    case = {name: rows[0][name] for name in ("op", "n", "k", "m", "dtype")} if rows else {}
    for row in rows:
        median = spreads[row["name"]].median
        row["GB_per_s"] = row["bytes"] / median / 1e9
        row["shares"] = {name: row["bytes"] / median / speed for name, speed in speeds.items()}
        row["over_torch"] = spreads[baseline].median / median if baseline else None
        rivals = [
            spreads[other["name"]].median
            for other in rows
            if other["kind"] == "peer" and other["format"] == row["format"] is not None
        ]
        row["over_peer"] = min(rivals) / median if rivals and row["kind"] == "bitfold" else None
    for ceiling in ceilings:
        ms = spreads[ceiling.name].as_ms()
        row = {**case, "name": ceiling.name, "kind": "ceiling", "ms": ms, "bytes": ceiling.nbytes}
        rows.append({**row, "GB_per_s": speeds[ceiling.name] / 1e9})
    return rows
