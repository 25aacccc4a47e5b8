"""Calls of ops on the GPU, for a profiler to look at.

    calls.py [--timeline] [--shape NxK] CALL...        CALL: linear:FORMAT:ROWS, int8:ROWS or kv:FORMAT:TOKENS

Each is called once between the profiler's start and stop, after other bytes have gone through the second cache:

    ncu --profile-from-start off --clock-control none --set full -o out python bench/gpu/calls.py linear:int4-g128:16

With --timeline some are called in a row, on matrices in turn, and CUPTI says when each of their kernels began and
ended, in microseconds: what kernels cost one another, and what lies between them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bitfold
import torch
from bitfold.kv.attention import attend
from bitfold.kv.blocks import DEFAULT_GROUP, BlockFormat, value_group_of
from bitfold.kv.store import DEFAULT_RESIDUAL, Store

KINDS = {"linear": 2, "int8": 1, "kv": 2}  # of calls, and what is said of each behind its name
HEADS, SHARED, HEAD = 8, 4, 128  # of the cache: key-value heads, queries that share one, numbers of each
OUTLIERS = 200  # every so many-th column of x for int8
ROTATION, WARM, IN_A_ROW = 4, 4, 8


class Call(NamedTuple):
    kind: str
    format: str
    size: int  # rows of x, or tokens

    def __str__(self) -> str:
        return ":".join([self.kind, *([self.format] if KINDS[self.kind] == 2 else []), str(self.size)])


def parse(text: str) -> Call:
    """ValueError: text is no call."""
    kind, *rest = text.split(":")
    if kind not in KINDS or len(rest) != KINDS[kind] or not rest[-1].isdecimal() or int(rest[-1]) < 1:
        raise ValueError(f"a call is {text!r}; it must be linear:FORMAT:ROWS, int8:ROWS or kv:FORMAT:TOKENS")
    return Call(kind, rest[0] if len(rest) == 2 else "int8", int(rest[-1]))


def parse_shape(text: str) -> tuple[int, int]:
    """ValueError: text is no shape."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"--shape is {text!r}; it must be NxK, two positive numbers")
    return int(n), int(k)


class Weights:
    """Matrices of a format, of which calls take one after the other."""

    def __init__(self, shape: tuple[int, int], how_many: int) -> None:
        self.shape, self._how_many = shape, how_many
        self._made: dict[str, list[bitfold.QTensor]] = {}

    def __call__(self, format: str, number: int) -> bitfold.QTensor:
        if format not in self._made:
            weights = (torch.randn(self.shape, device="cuda") for _ in range(self._how_many))
            self._made[format] = [bitfold.encode(weight, format) for weight in weights]
        return self._made[format][number % self._how_many]


def prepare(call: Call, weights: Weights) -> Callable[[int], object]:
    """The call, with the number of its matrix."""
    n, k = weights.shape
    if call.kind == "kv":
        law = BlockFormat(call.format, DEFAULT_GROUP, HEAD, value_group_of(call.format, HEAD))
        past = [torch.randn(1, HEADS, call.size, HEAD, device="cuda").bfloat16() for _ in range(2)]
        store = Store.like(law, DEFAULT_RESIDUAL, past[0])
        store.append_prompt(*past)
        query = torch.randn(1, HEADS * SHARED, 1, HEAD, device="cuda").bfloat16()
        return lambda _: attend(query, store, store.tokens, None, HEAD**-0.5)
    x = torch.randn(call.size, k, device="cuda").bfloat16()
    if call.kind == "linear":
        return lambda number: bitfold.linear(x, weights(call.format, number))
    x[:, ::OUTLIERS] *= 30

    def int8(number: int) -> torch.Tensor:
        planes = list(weights("int8", number).planes.values())
        return torch.ops.bitfold.linear_int8(x, planes, "int8", n, k, None, 6.0)

    return int8


def profile(calls: list[Callable[[int], object]]) -> None:
    others = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for call in calls:
        call(0)
        others.zero_()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def timeline(name: str, call: Callable[[int], object]) -> None:
    for number in range(WARM):
        call(number)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for number in range(IN_A_ROW):
            call(number)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"]
    )
    begin = kernels[0]["ts"]
    whole = (kernels[-1]["ts"] + kernels[-1]["dur"] - begin) / IN_A_ROW
    print(f"{name}: {whole:.1f} a call, of {IN_A_ROW} in a row; the kernels of three in their middle")
    each = len(kernels) // IN_A_ROW
    for kernel in kernels[3 * each : 6 * each]:
        first, last = kernel["ts"] - begin, kernel["ts"] + kernel["dur"] - begin
        print(f"  {first:9.2f} {last:9.2f} {kernel['dur']:8.2f}  {kernel['name'][:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calls", nargs="+", metavar="CALL")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--shape", default="8192x28672", metavar="NxK")
    options = parser.parse_args()
    try:
        calls, shape = [parse(text) for text in options.calls], parse_shape(options.shape)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    torch.manual_seed(0)
    weights = Weights(shape, ROTATION if options.timeline else 1)
    prepared = [prepare(call, weights) for call in calls]
    if not options.timeline:
        return profile(prepared)
    for call, run in zip(calls, prepared, strict=True):
        timeline(str(call), run)


if __name__ == "__main__":
    main()
