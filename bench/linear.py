"""Times bitfold.linear and the encoders against torch on this machine's CPU, and writes what it saw as JSON.

    python bench/linear.py --out bench/results/NAME.json

Every case is validated against float64 first. The contestants of a case take turns, so that a busy machine slows
them alike; the medians and the ratio of the medians are reported. Weights rotate over enough matrices that the
last-level cache does not answer for memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bitfold
import torch
import torch.nn.functional as F
from bitfold import _C

FORMATS = (
    "int8",
    "int4-g128",
    "int4-g128-asym",
    "int3-g64",
    "int2-g64",
    "nf4",
    "nf4-dq",
    "fp4",
    "fp8",
    "fp16",
)
CACHE_BYTES = 48 << 20  # what the rotating matrices exceed together


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def take_turns(contestants: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; at least nine rounds, longer until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 9:
        for name, run in contestants.items():
            before = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - before) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def rotating(
    make: Callable[[], object], nbytes: int, use: Callable[[object], object]
) -> Callable[[], object]:
    """Calls `use` on one after another of enough matrices to exceed the cache."""
    items = [make() for _ in range(max(2, CACHE_BYTES // max(nbytes, 1) + 1))]

    def endless() -> Iterator[object]:
        while True:
            yield from items

    source = endless()
    return lambda: use(next(source))


def measure(n: int, k: int, batches: list[int], seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    weight = torch.randn(n, k)
    encoded = {name: bitfold.encode(weight, name) for name in FORMATS}
    for m in batches:
        x = torch.randn(m, k, dtype=torch.bfloat16)
        wide = x.float()
        contestants = {
            "torch bf16": rotating(weight.bfloat16, n * k * 2, lambda w, x=x: F.linear(x, w)),
            "torch fp32": rotating(weight.clone, n * k * 4, lambda w, x=wide: F.linear(x, w)),
        }
        for name, qtensor in encoded.items():
            exact = x.double() @ qtensor.decode(torch.float64).T
            error = (bitfold.linear(x, qtensor).double() - exact).norm() / exact.norm()
            if error > 4e-3:
                raise SystemExit(f"{name} at m={m} is wrong: relative error {error:.2e}")
            contestants[name] = rotating(
                lambda q=qtensor: bitfold.QTensor(
                    q.format, q.shape, {p: t.clone() for p, t in q.planes.items()}
                ),
                qtensor.nbytes,
                lambda q, x=x: bitfold.linear(x, q),
            )
        medians = take_turns(contestants, seconds)
        for name, ms in medians.items():
            nbytes = encoded[name].nbytes if name in encoded else n * k * (2 if name == "torch bf16" else 4)
            rows.append(
                {
                    "op": "linear",
                    "n": n,
                    "k": k,
                    "m": m,
                    "name": name,
                    "ms": round(ms, 4),
                    "weight_GB_per_s": round(nbytes / ms / 1e6, 2),
                    "speed_over_torch_bf16": round(medians["torch bf16"] / ms, 3),
                    "speed_over_torch_fp32": round(medians["torch fp32"] / ms, 3),
                }
            )
            print(f"{n}x{k} m={m:<5}{name:16}{ms:10.3f} ms {rows[-1]['speed_over_torch_bf16']:8}x bf16")
    for name, qtensor in encoded.items():
        runs = {"encode": lambda f=name: bitfold.encode(weight, f), "decode": qtensor.decode}
        for op, ms in take_turns(runs, seconds / 4).items():
            rate = n * k / ms / 1e3
            rows.append(
                {
                    "op": op,
                    "n": n,
                    "k": k,
                    "name": name,
                    "ms": round(ms, 4),
                    "M_weights_per_s": round(rate, 1),
                }
            )
            print(f"{n}x{k} {op} {name:16}{ms:10.3f} ms {rate:10.1f} M weights/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each batch size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    report = {
        "cpu": cpu_model(),
        "isa": _C.isa(),
        "threads": args.threads,
        "torch": torch.__version__,
        "bitfold": bitfold.__version__,
        "commit": commit(),
        "rows": measure(*args.shape, args.batches, args.seconds),
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
