"""Times products of 8-bit weights with inputs that are rounded to 8 bits, beside 16-bit ones and other libraries.

    python bench/int8.py [--shape 11008x4096] [--batches 1,8,128] [--threads 2 | --cpu-time] [--out NAME.json]

On a machine with other work --cpu-time counts the seconds that one thread computed, not those that it waited.

Half a percent of the input's columns have outliers, of 20 to 60 where the others are gaussian. bitfold takes part with
plain int8, with LLM.int8() and with LLM.int8() and a copy of the outlier columns; torch with bf16 and with its product
of bytes (`torch._int_mm`), which is given its input rounded and returns sums; bitsandbytes, where it is installed, with
Linear8bitLt. Every answer is compared with float64 of the weights before they were rounded, then all take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfold
import torch
import torch.nn.functional as F
from bitfold.bench.ceilings import fastest_reader, rotate, rotation_bytes
from bitfold.bench.clock import CALLS_PER_TURN, Clock, CpuClock, Spread, take_turns
from bitfold.bench.machine import machine, versions
from bitfold.nn import QuantLinear
from torch import Tensor

FORMAT = "int8-channel-sfp32"
OUTLIERS = 0.005  # share of the columns
BARS = {1: 1.8, 8: 1.0, 128: 1.3}  # LLM.int8() over torch bf16
# Of the norm: 8 bits of both cost about 1 %, and 16 bits of one next to nothing.
TOLERANCE = {"torch bf16": 5e-3, "torch _int_mm": 0.6, "bitfold int8": 0.6}
TOLERATED = 2e-2

Product = Callable[[Tensor], Tensor]


class ThreadClock:
    """Seconds that the calling thread computes."""

    def turn(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        def seconds() -> float:
            start = time.thread_time()
            run()
            return time.thread_time() - start

        seconds()
        return lambda: [seconds() for _ in range(CALLS_PER_TURN)][1:]


def outlier_columns(k: int) -> Tensor:
    """Which columns of the input have outliers: int64, ascending."""
    count = max(1, round(OUTLIERS * k))
    return torch.randperm(k, generator=torch.Generator().manual_seed(1))[:count].sort().values


def inputs(m: int, k: int) -> Tensor:
    x = torch.randn(m, k).clamp(-5, 5)
    columns = outlier_columns(k)
    x[:, columns] = torch.randn(m, len(columns)).sign() * (20 + 40 * torch.rand(m, len(columns)))
    return x.bfloat16()


def of_bitfold(activations: str) -> Callable[[Tensor], Product]:
    def make(weight: Tensor) -> Product:
        columns = outlier_columns(weight.shape[1])
        exact = {"outlier_columns": columns.int(), "outlier_weight": weight[:, columns].contiguous()}
        layer = QuantLinear(
            bitfold.encode(weight, FORMAT),
            activations=activations,
            **(exact if "exact" in activations else {}),
        )
        layer.prepare()
        return layer.eval()

    return make


def of_torch(weight: Tensor) -> Product:
    own = weight.clone()
    return lambda x: F.linear(x, own)


def of_int_mm(weight: Tensor) -> Product:
    """No rounding of the input and no scales in the time: both are done beforehand and outside."""
    scales = weight.float().abs().amax(dim=1) / 127
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    rounded: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if id(x) not in rounded:
            steps = x.float().abs().amax(dim=1) / 127
            rounded[id(x)] = ((x.float() / steps[:, None]).round().to(torch.int8), steps)
            return torch._int_mm(rounded[id(x)][0], codes.t()) * (steps[:, None] * scales)
        return torch._int_mm(rounded[id(x)][0], codes.t())

    return run


def of_bitsandbytes(weight: Tensor) -> Product:
    import bitsandbytes as bnb

    n, k = weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


CONTESTANTS: dict[str, Callable[[Tensor], Product]] = {
    "torch bf16": of_torch,
    "bitfold int8": of_bitfold("int8"),
    "bitfold llm-int8": of_bitfold("llm-int8"),
    "bitfold llm-int8-exact": of_bitfold("llm-int8-exact"),
    "torch _int_mm": of_int_mm,
    "bitsandbytes Linear8bitLt": of_bitsandbytes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="11008x4096", help="n x k")
    parser.add_argument("--batches", default="1,8,128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each batch")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(threads)
    clock = ThreadClock() if args.cpu_time else CpuClock(threads)
    n, k = map(int, args.shape.split("x"))
    with torch.inference_mode():
        report = run(n, k, [int(m) for m in args.batches.split(",")], threads, args.seconds, clock)
    show(report)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(n: int, k: int, batches: list[int], threads: int, seconds: float, clock: Clock) -> dict[str, Any]:
    count = max(2, -(-rotation_bytes() // (n * k)))  # of 8-bit matrices: from memory, not from the cache
    weights = [torch.randn(n, k).mul_(k**-0.5).bfloat16() for _ in range(count)]
    products: dict[str, list[Product]] = {}
    absent = {}
    for name, make in CONTESTANTS.items():
        try:
            products[name] = [make(weight) for weight in weights]
        except ImportError as error:
            absent[name] = str(error)
    reader, ceiling = fastest_reader(rotation_bytes(), threads, 2.0)
    rows = []
    for m in batches:
        x = inputs(m, k)
        truth = x.double() @ weights[0].double().t()
        errors = {}
        for name, calls in products.items():
            try:
                y = calls[0](x)
            except RuntimeError as error:  # torch's product of bytes may want more rows
                absent[f"{name} at m={m}"] = str(error).splitlines()[0]
                continue
            errors[name] = float((y.double() - truth).norm() / truth.norm())
            assert y.isfinite().all(), name
            assert errors[name] <= TOLERANCE.get(name, TOLERATED), (name, m, errors[name])
            for call in calls[1:]:
                call(x)
        turns: dict[str, Callable[[], object]] = {name: bind(rotate(products[name]), x) for name in errors}
        times = take_turns({**turns, "read": reader.run}, seconds, clock=clock)
        read = reader.nbytes / times["read"].median
        for name, error in errors.items():
            nbytes = n * k * (2 if name == "torch bf16" else 1)
            rows.append(row(m, name, times[name], times["torch bf16"], nbytes, read, error))
    return {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "n": n,
            "k": k,
            "threads": threads,
            "matrices": count,
            "outlier columns": len(outlier_columns(k)),
            "clock": type(clock).__name__,
        },
        "absent": absent,
        "ceiling": ceiling,
        "rows": rows,
        "bars": [
            {
                "m": m,
                "wanted": wanted,
                "measured": (
                    found := min(r["over_torch"] for r in rows if r["m"] == m and "llm-int8" in r["name"])
                ),
                "met": found >= wanted,
            }
            for m, wanted in BARS.items()
            if m in batches and (n, k) == (11008, 4096)
        ],
    }


def bind(product: Product, x: Tensor) -> Callable[[], object]:
    return lambda: product(x)


def row(
    m: int, name: str, time: Spread, torch_time: Spread, nbytes: int, read: float, error: float
) -> dict[str, Any]:
    return {
        "m": m,
        "name": name,
        "ms": time.as_ms(),
        "over_torch": round(torch_time.median / time.median, 3),
        "share_of_read": round(nbytes / time.median / read, 3),
        "error": error,
    }


def show(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(
        f"{settings['n']}x{settings['k']}, {settings['threads']} threads, bf16 inputs, "
        f"{settings['outlier columns']} columns with outliers"
    )
    print(
        f"{'m':>4}  {'':<26} {'ms':>8} {'quartiles':>17} {'over torch':>11} {'share of read':>14} {'error':>9}"
    )
    for r in report["rows"]:
        ms = r["ms"]
        quartiles = f"{ms['q1']:.2f} .. {ms['q3']:.2f}"
        print(
            f"{r['m']:>4}  {r['name']:<26} {ms['median']:>8.2f} {quartiles:>17} {r['over_torch']:>10.2f}x "
            f"{r['share_of_read']:>13.0%} {r['error']:>9.1e}"
        )
    for name, why in report["absent"].items():
        print(f"left out: {name}: {why}")
    for bar in report["bars"]:
        print(
            f"m={bar['m']}: {bar['wanted']}x wanted, {bar['measured']}x {'met' if bar['met'] else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
