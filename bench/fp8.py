"""Times products with 8-bit floats beside torch's bf16 F.linear, in one run: weights with a scale for each row or for
128 x 128, inputs as they are or rounded row by row.

    python bench/fp8.py [--threads 2 | --cpu-time] --out bench/results/fp8-NAME.json

On a machine with other work --cpu-time counts the seconds that one thread computed, not those that it waited.
Each is held against float64 of its decoded weights and rounded inputs first. Contestants take turns, each on several
copies of its weight in a circle, so that a call finds none of it in the caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import bitfold
import torch
from bitfold.bench.clock import CALLS_PER_TURN, CpuClock, take_turns
from bitfold.nn import QuantLinear
from bitfold.qtensor import QTensor
from int8 import ThreadClock
from torch import Tensor
from torch.nn import functional

BATCHES = (1, 8, 128)
FORMATS = ("fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e4m3-b128x128")
TOLERANCE = 4e-3  # of a bf16 product (docs/architecture.md)


def rounded(x: Tensor) -> Tensor:
    """What "fp8" makes of an input, in float64."""
    codes, scales = torch.ops.bitfold.round_fp8(x)
    return codes.view(torch.float8_e4m3fn).double() * scales[..., None].double()


def circle(copies: list[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], Tensor]:
    turns = itertools.cycle(copies)
    return lambda: next(turns)(x)


def layer(qtensor: QTensor, activations: str) -> QuantLinear:
    planes = {name: plane.clone() for name, plane in qtensor.planes.items()}
    module = QuantLinear(QTensor(qtensor.format, qtensor.shape, planes), activations=activations).eval()
    module.prepare()
    return module


def contestants(weight: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    count = CALLS_PER_TURN + 1
    plain = weight.to(torch.bfloat16)
    copies = [plain.clone() for _ in range(2)]  # of 90 MB: one drives the other out
    found = {"torch bf16": circle([lambda x, w=w: functional.linear(x, w) for w in copies], x)}
    for format in FORMATS:
        qtensor = bitfold.encode(weight, format)
        decoded = qtensor.decode(torch.float64)
        for activations in ("float", "fp8"):
            modules = [layer(qtensor, activations) for _ in range(count if weight.numel() < 1 << 22 else 3)]
            expected = (rounded(x) if activations == "fp8" else x.double()) @ decoded.t()
            y = modules[0](x).double()
            error = float((y - expected).norm() / expected.norm())
            assert error <= TOLERANCE, f"{format} {activations}: {error}"
            found[f"{format} {activations}"] = circle(modules, x)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread")
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = 1 if args.cpu_time else args.threads
    clock = ThreadClock() if args.cpu_time else CpuClock(threads)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.rows, args.columns, generator=generator) * 0.02
    load = os.getloadavg()[0]
    print(
        f"load of the last minute {load:.1f}, {os.cpu_count()} cores; quartiles are in the JSON file",
        flush=True,
    )
    results = []
    for m in BATCHES:
        x = torch.randn(m, args.columns, generator=generator).to(torch.bfloat16)
        spreads = take_turns(contestants(weight, x), args.seconds, clock=clock)
        base = spreads["torch bf16"].median
        for name, spread in spreads.items():
            ratio = base / spread.median
            results.append(
                {"m": m, "name": name, "ms": spread.as_ms(), "speed over torch bf16": round(ratio, 3)}
            )
            print(f"m={m:<4} {name:<28} {1e3 * spread.median:9.3f} ms {ratio:6.2f} x torch bf16", flush=True)
    if args.out is not None:
        data = {
            "what": f"x [m, {args.columns}] bf16 times a weight [{args.rows}, {args.columns}]",
            "threads": threads,
            "seconds": "that the thread computed" if args.cpu_time else "on the wall",
            "load of the last minute": round(load, 1),
            "cores": os.cpu_count(),
            "isa": bitfold._C.isa(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "bitfold": bitfold.__version__,
            "results": results,
        }
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
