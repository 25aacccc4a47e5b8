"""Timing on a GPU: its clocks, its ceiling, and what a result must name of it.

A launch from Python takes longer than many of these kernels: ops that can be captured are timed as a CUDA graph, which
is also how who serves a model runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.bench.ceilings import Ceiling
from bitfold.bench.clock import CALLS_PER_TURN, take_turns

MIN_ROTATION = 256 << 20
_QUEUED = 200_000  # cycles that the GPU is kept busy while a turn is queued behind them: some 0.1 ms
_WARM_UP = 3


@dataclass(frozen=True)
class GraphClock:
    """The time of CALLS_PER_TURN calls in one CUDA graph, divided by their number: what the GPU takes, no launches."""

    def turn(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run() for _ in range(CALLS_PER_TURN)]  # outputs of their own, as a model has them
        del kept
        return lambda: [_between_events(graph.replay) / CALLS_PER_TURN]


@dataclass(frozen=True)
class EventClock:
    """The time of one call that waits for the GPU itself and so can't be captured: launches count."""

    def turn(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        for _ in range(_WARM_UP):
            run()
        return lambda: [_between_events(run) for _ in range(CALLS_PER_TURN)]


def _between_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_QUEUED)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def rotation_bytes() -> int:
    """Distinct bytes between two uses of the same matrix: four times the second cache, at least 256 MiB."""
    return int(max(4 * torch.cuda.get_device_properties().L2_cache_size, MIN_ROTATION))


def copy_ceiling(nbytes: int, seconds: float) -> tuple[Ceiling, dict[str, Any]]:
    """A copy within the GPU's memory, bytes read and written counted, and what it reached."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ceiling = Ceiling("copy", lambda: target.copy_(source), 2 * nbytes)
    median = take_turns({"copy": ceiling.run}, seconds, clock=GraphClock())["copy"].median
    facts = {"GB_per_s": round(2 * nbytes / median / 1e9, 1), "way": "torch copy_", "bytes": 2 * nbytes}
    return ceiling, facts


def gpu() -> dict[str, Any]:
    """Name, compute capability, multiprocessors, bytes of memory and of the second cache, and the CUDA of torch."""
    found = torch.cuda.get_device_properties()
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "L2": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }
