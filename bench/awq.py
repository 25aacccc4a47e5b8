"""Times AWQ's two searches on one matrix beside AutoAWQ's, with the same weights and inputs.

    python bench/awq.py --peer PYTHON --threads 2 --out bench/results/awq-NAME.json

PYTHON is the interpreter of an environment that has autoawq; without it bitfold is timed alone. bitfold's times are
those from the inputs on: the Gram matrix is part of them. The clipping search, which takes AutoAWQ minutes, is made on
the first rows. Weights are gaussian, inputs are gaussian, mixed, and of different size by column.

Before that the error that the scale search tells is held against the outputs themselves. At the end both matrices are
multiplied with all inputs, so that errors can be compared: AutoAWQ's scales are rounded with by bitfold, whose format
has them in fp16, and, beside that, by AutoAWQ itself, which doesn't round scales here.

Both take turns, in processes of their own, and tell the time on the wall and that of their threads: where others use
the machine too, the second is what can be compared.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold.calibration.workers import Workers
from bitfold.quantizers import awq
from peer import Peer, command_line, save, summary, time_lines, timed
from torch import Tensor

FORMAT, GROUP = "int4-g128", 128
SCALE_BAR, CLIP_BAR = 0.5, 0.1  # of AutoAWQ's seconds
CHECK = 2e-3  # of the error that the search tells
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# AutoAWQ's side: answers "scales" and "clip" with the seconds of one search, and leaves the matrices it rounds.
PEER = """
import sys, time, torch
from awq.quantize.quantizer import AwqQuantizer
from torch import nn

folder, threads, clip_rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
problem = torch.load(folder + "/problem.pt")
weight, x = problem["weight"], problem["x"]
quantizer = object.__new__(AwqQuantizer)
settings = {"w_bit": 4, "group_size": 128, "zero_point": False, "duo_scaling": False, "max_chunk_memory": 1 << 30}
for name, value in {**settings, "n_parallel_calib_samples": None}.items():
    setattr(quantizer, name, value)
block = nn.Module()
block.norm = nn.LayerNorm(weight.shape[1])
block.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
scaled = weight
for line in sys.stdin:
    with torch.no_grad():
        block.linear.weight.copy_(weight)
        wall, busy = time.perf_counter(), time.process_time()
        if line.strip() == "scales":
            layers = [block.linear]
            found = quantizer._search_best_scale(block, block.norm, layers, x[None], module2inspect=block.linear)
        else:
            most = quantizer._compute_best_clip(scaled[:clip_rows], x[None] / scales)
        print("seconds", time.perf_counter() - wall, time.process_time() - busy, flush=True)
        if line.strip() == "scales":
            scales = found[2].to(weight.dtype)
            scaled = weight * scales
            rounded = quantizer.pseudo_quantize_tensor(scaled.clone())[0] / scales
            torch.save({"rounded": rounded, "scales": scales}, folder + "/scaled.pt")
        else:
            groups = scaled[:clip_rows].unflatten(1, (-1, 128))
            clipped = groups.clamp(-most, most).flatten(1)
            torch.save(quantizer.pseudo_quantize_tensor(clipped)[0] / scales, folder + "/clipped.pt")
"""


def problem(n: int, k: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Weights, and inputs [tokens, k]."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=draw) * 0.02
    mix = torch.randn(k, 64, generator=draw)
    x = torch.randn(tokens, k, generator=draw) + 0.3 * torch.randn(tokens, 64, generator=draw) @ mix.t()
    return weight, x * torch.exp(0.7 * torch.randn(k, generator=draw))


def error_of(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """The squared change of the outputs over their squares; sums of squares in float64."""
    wide, inputs = weight.float(), x.float()
    outputs = [(rounded.float() - wide) @ inputs.t(), wide @ inputs.t()]
    change, whole = (float(output.square_().sum(dtype=torch.float64)) for output in outputs)
    return change / whole


def search_scales(weight: Tensor, x: Tensor, workers: Workers) -> tuple[awq.Scaled, Tensor]:
    """bitfold's search from the inputs on, and their Gram matrix."""
    inputs = x.float()
    gram = inputs.t() @ inputs
    magnitudes = inputs.abs().mean(0)
    return awq.search_scales([weight], [FORMAT], gram, magnitudes, map=workers.map), gram


def measure(
    n: int, k: int, tokens: int, clip_rows: int, runs: int, threads: int, dtype: str, python: str | None
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    weight, x = (tensor.to(DTYPES[dtype]) for tensor in problem(n, k, tokens))
    report: dict[str, Any] = {
        "n": n,
        "k": k,
        "tokens": tokens,
        "clip_rows": clip_rows,
        "dtype": dtype,
        "format": FORMAT,
    }
    times: dict[str, dict[str, list[tuple[float, float]]]] = {"scales": {}, "clip": {}}
    with Workers() as workers, tempfile.TemporaryDirectory() as folder:
        scaled, gram = search_scales(weight, x, workers)
        factors = scaled.scales.float()
        wide = weight.float() * factors
        rounded = bitfold.encode(wide, FORMAT).decode() / factors
        errors = {"rounding": error_of(weight, bitfold.encode(weight, FORMAT).decode(), x)}
        errors["scaled"] = error_of(weight, rounded, x)
        told = scaled.errors[0] / scaled.energy[0]
        if abs(told / errors["scaled"] - 1) > CHECK:
            raise SystemExit(f"the search tells an error of {told}, the outputs have {errors['scaled']}")
        torch.save({"weight": weight, "x": x}, Path(folder) / "problem.pt")
        peer = Peer("AutoAWQ", python, PEER, folder, threads, clip_rows) if python else None
        top = wide[:clip_rows]

        def clip() -> Tensor:
            return awq.search_clip(top, FORMAT, gram, columns=scaled.scales, map=workers.map)

        calls: dict[str, Callable[[], Any]] = {
            "scales": lambda: search_scales(weight, x, workers),
            "clip": clip,
        }
        for search, call in calls.items():
            for _ in range(runs if search == "scales" else 1):
                times[search].setdefault("bitfold", []).append(timed(call)[:2])
                if peer:
                    times[search].setdefault("AutoAWQ", []).append(peer.run(search))
        made = awq.quantize(top, FORMAT, clip()).decode() / factors
        errors["clipped"] = error_of(weight[:clip_rows], made, x)
        if peer:
            peer.close()
            theirs = torch.load(Path(folder) / "scaled.pt")
            errors["scaled, AutoAWQ's own rounding"] = error_of(weight, theirs["rounded"], x)
            factors = theirs["scales"].float()
            rounded = bitfold.encode(weight.float() * factors, FORMAT).decode() / factors
            errors["scaled, AutoAWQ"] = error_of(weight, rounded, x)
            errors["clipped, AutoAWQ"] = error_of(
                weight[:clip_rows], torch.load(Path(folder) / "clipped.pt"), x
            )
    report["alpha"], report["errors"] = scaled.alpha, errors
    report |= {search: summary(found) for search, found in times.items()}
    return report


def table(report: dict[str, Any]) -> str:
    errors = report["errors"]
    lines = [
        f"AWQ, {report['n']} x {report['k']}, {report['format']}, {report['tokens']} tokens, {report['dtype']}; "
        f"clipping of {report['clip_rows']} rows"
    ]
    for search, bar in (("scales", SCALE_BAR), ("clip", CLIP_BAR)):
        lines += time_lines(report[search], bar, f"{search:8}")
    lines.append(f"squared error of the output over its square: plain rounding {errors['rounding']:.6g}")
    for kind in ("scaled", "clipped"):
        lines.append(f"{kind:8}bitfold {errors[kind]:.6g}")
        for peer in (f"{kind}, AutoAWQ", f"{kind}, AutoAWQ's own rounding"):
            if peer in errors:
                ratio = errors[kind] / errors[peer]
                lines.append(f"{peer}: {errors[peer]:.6g}; bitfold's is {ratio:.4f} of it")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, "autoawq", 1, "of the scale search")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--clip-rows", type=int, default=512, help="rows that are clipped, a multiple of 64 for AutoAWQ"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and inputs"
    )
    options = parser.parse_args()
    sizes = (options.size, options.size, options.tokens, options.clip_rows, options.runs, options.threads)
    reports = [measure(*sizes, dtype, options.peer) for dtype in options.dtypes]
    text = "\n\n".join(table(report) for report in reports)
    save(options.out, "awq", reports, text, options.threads)


if __name__ == "__main__":
    sys.exit(main())
