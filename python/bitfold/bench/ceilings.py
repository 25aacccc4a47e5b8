"""What this machine's memory gives: the ceilings that the kernels are held against.

A ceiling is measured with whatever reads or copies fastest here: most reductions of torch and numpy are
slower than memory on one core, and differently so from CPU to CPU. docs/benchmarks.md has a comparison with
a loop in C.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.bench.clock import CALLS_PER_TURN, CpuClock, take_turns
from bitfold.bench.machine import last_level_cache

MIN_ROTATION = 96 << 20
_COLUMNS = 4096  # of the matrix that `mv` sees, fp32
_PARTS = 8  # of the buffer for each thread: a thread that is held up takes fewer


def rotation_bytes() -> int:
    """Distinct bytes between two uses of the same matrix: twice the last-level cache, at least 96 MiB."""
    return max(2 * last_level_cache(), MIN_ROTATION)


@dataclass(frozen=True)
class Ceiling:
    """A way to use memory. run: one pass; nbytes: that a pass reads and writes."""

    name: str
    run: Callable[[], object]
    nbytes: int


def readers(nbytes: int, threads: int) -> list[Ceiling]:
    """Ways to read one buffer of about `nbytes` bytes once, with `threads` threads."""
    count = threads * _PARTS
    words = max(1, nbytes // (4 * _COLUMNS * count)) * count * _COLUMNS
    buffer = torch.arange(words, dtype=torch.float32)  # no two pages alike: a hypervisor can't merge them
    vector = torch.ones(_COLUMNS)
    parts = [part.view(torch.uint8).numpy() for part in buffer.view(count, -1).unbind()]
    matrix, integers = buffer.view(-1, _COLUMNS), buffer.view(torch.int64)
    # numpy's reductions leave the interpreter's lock, so plain threads run them side by side.
    pool = ThreadPoolExecutor(threads)

    def scan() -> list[object]:
        return [part.max() for part in parts] if threads == 1 else list(pool.map(np.max, parts))

    ways: dict[str, Callable[[], object]] = {
        "numpy max of bytes": scan,
        "torch mv fp32": lambda: torch.mv(matrix, vector),
        "torch sum int64": lambda: integers.sum(),
    }
    return [Ceiling(name, run, buffer.nbytes) for name, run in ways.items()]


def fastest_reader(nbytes: int, threads: int, seconds: float) -> tuple[Ceiling, dict[str, Any]]:
    """The fastest of `readers`, and what each of them reached in GB/s."""
    ways = readers(nbytes, threads)
    times = take_turns({way.name: way.run for way in ways}, seconds, clock=CpuClock(threads))
    speeds = {way.name: way.nbytes / times[way.name].median / 1e9 for way in ways}
    best = max(ways, key=lambda way: speeds[way.name])
    facts = {
        "GB_per_s": round(speeds[best.name], 2),
        "way": best.name,
        "bytes": best.nbytes,
        "all": {name: round(speed, 2) for name, speed in speeds.items()},
    }
    return best, facts


def copies(source: Callable[[], Tensor]) -> list[Ceiling]:
    """Copies into fresh memory, as an op returns its output, and into memory that exists.

    source: gives the matrix to copy, another one each time. nbytes counts what is read and what is written.
    """
    targets = [torch.zeros_like(source()) for _ in range(CALLS_PER_TURN)]
    existing = rotate([lambda t=target: t.copy_(source()) for target in targets])
    nbytes = 2 * targets[0].nbytes
    return [
        Ceiling("copy, fresh", lambda: source().clone(), nbytes),
        Ceiling("copy, existing", existing, nbytes),
    ]


def rotate(calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    """A function that makes one after another of `calls`, over and over."""
    turn = 0

    def call(*arguments: object) -> Any:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn](*arguments)

    return call
