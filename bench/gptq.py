"""Times GPTQ of one matrix beside llm-compressor's, with the same weights, Hessian and scales.

    python bench/gptq.py --peer PYTHON --threads 2 --out bench/results/gptq-NAME.json

PYTHON is the interpreter of an environment that has llmcompressor; without it bitfold is timed alone. Before that the
error of the first rows over the Hessian is held against a run of the paper's algorithm in float64, column by column, at
the same damping. Weights are gaussian, inputs are gaussian, mixed, and of different size from column to column.

Both take turns, in processes of their own, and tell the time on the wall and that of their threads: where others use
the machine too, the second is what can be compared. Threads that wait for each other count as busy in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold.bench.machine import machine, versions
from bitfold.quantizers import gptq
from peer import Peer, timed
from torch import Tensor

FORMAT, GROUP = "int4-g128", 128
TIME_BAR = 0.6  # of llm-compressor's seconds
ERROR_BAR = 1.005  # times the error of the float64 run
ORDERS = [order + mse for order in gptq.ORDERS for mse in ("", "+mse")]
ROWS = 64  # that errors are told of

# llm-compressor's side: answers every line with the seconds of one run, and leaves the weights.
PEER = """
import sys, time, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

folder, threads, damping = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(threads)
problem = torch.load(folder + "/problem.pt")
scale = problem["scale"]
arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128, actorder="static")
for line in sys.stdin:
    weight, hessian = problem["weight"][None].clone(), problem["hessian"][None].clone()
    wall, busy = time.perf_counter(), time.process_time()
    rounded = quantize_weight(
        weight, hessian, scale[None], torch.zeros_like(scale, dtype=torch.int8)[None], None, arguments,
        percdamp=damping,
    )[0]
    print("seconds", time.perf_counter() - wall, time.process_time() - busy, flush=True)
    torch.save(rounded[0], folder + "/rounded.pt")
"""


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights and a Hessian."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=draw) * 0.02
    mix = torch.randn(k, 64, generator=draw)
    tokens = k + k // 4
    x = torch.randn(tokens, k, generator=draw) + 0.3 * torch.randn(tokens, 64, generator=draw) @ mix.t()
    x *= torch.exp(0.7 * torch.randn(k, generator=draw))
    return weight, x.t() @ x / tokens


def float64_run(weight: Tensor, hessian: Tensor, scale: Tensor, damping: float) -> Tensor:
    """The paper's algorithm 1 without blocks, columns by falling diagonal: the rounded weights."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    moved, steps = weight.double()[:, order], scale.double()[:, order // GROUP]
    rounded = torch.empty_like(moved)
    for i in range(len(order)):
        rounded[:, i] = (moved[:, i] / steps[:, i]).round().clamp(-8, 7) * steps[:, i]
        error = (moved[:, i] - rounded[:, i]) / upper[i, i]
        moved[:, i:] -= error[:, None] * upper[i, i:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def error_of(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ)."""
    wide, error = weight[:ROWS].double(), (weight - rounded)[:ROWS].double()
    return float(((error @ hessian.double()) * error).sum() / ((wide @ hessian.double()) * wide).sum())


def measure(n: int, k: int, runs: int, threads: int, python: str | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    weight, hessian = problem(n, k)
    options = gptq.GptqOptions(measure=False)
    scale = bitfold.encode(weight, FORMAT).unpack().scales
    assert scale is not None

    def solve() -> gptq.Solved:
        return gptq.solve(weight, hessian, FORMAT, options)

    rounded = solve().qtensor.decode()
    exact = float64_run(weight[:ROWS], hessian, scale[:ROWS], options.damping)
    error = error_of(weight, rounded, hessian)
    report: dict[str, Any] = {
        "n": n,
        "k": k,
        "format": FORMAT,
        "damping": options.damping,
        "error": error,
        "rounding_error": error_of(weight, bitfold.encode(weight, FORMAT).decode(), hessian),
        "error_over_float64": error / error_of(weight[:ROWS], exact.float(), hessian),
    }
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            {"weight": weight, "hessian": hessian, "scale": scale.float()}, Path(folder) / "problem.pt"
        )
        arguments = (PEER, folder, threads, options.damping)
        peer = Peer("llm-compressor", python, *arguments) if python else None
        for _ in range(runs):
            ours.append(timed(solve)[:2])
            if peer:
                theirs.append(peer.run())
        if peer:
            peer.close()
            theirs_rounded = torch.load(Path(folder) / "rounded.pt")
            report["peer_error"] = error_of(weight, theirs_rounded, hessian)
    for name, times in (("bitfold", ours), ("llm-compressor", theirs)):
        if times:
            walls, busy = zip(*times, strict=True)
            report[name] = {
                "seconds": list(walls),
                "busy_seconds": list(busy),
                "median": statistics.median(walls),
                "busy_median": statistics.median(busy),
            }
    if theirs:
        report["time_ratio"] = report["bitfold"]["median"] / report["llm-compressor"]["median"]
        report["busy_ratio"] = report["bitfold"]["busy_median"] / report["llm-compressor"]["busy_median"]
    return report


def table(report: dict[str, Any]) -> str:
    lines = [f"GPTQ, {report['n']} x {report['k']}, {report['format']}, damping {report['damping']}"]
    for name in ("bitfold", "llm-compressor"):
        if name in report:
            times = report[name]
            lines.append(
                f"{name:16} {times['median']:8.2f} s on the wall, {times['busy_median']:8.2f} s of its threads"
            )
    if "time_ratio" in report:
        met = report["time_ratio"] <= TIME_BAR
        lines.append(
            f"time over llm-compressor's: {report['time_ratio']:.3f} (threads' {report['busy_ratio']:.3f}), "
            f"wanted {TIME_BAR}, met: {met}"
        )
        lines.append(f"error {report['error']:.6g}, llm-compressor's {report['peer_error']:.6g}")
    met = report["error_over_float64"] <= ERROR_BAR
    lines.append(f"error over plain rounding's: {report['error'] / report['rounding_error']:.3f}")
    lines.append(
        f"error over that of float64, {ROWS} rows: {report['error_over_float64']:.5f}, wanted {ERROR_BAR}, met: {met}"
    )
    return "\n".join(lines)


def options_table(n: int, k: int) -> str:
    """The error of every order, with and without the search by squared error, over plain rounding's."""
    weight, hessian = problem(n, k)
    lines = [f"error over plain rounding's, {n} x {k}", f"{'':14} " + " ".join(f"{o:>12}" for o in ORDERS)]
    for format in ("int4-g128", "int3-g64", "int2-g64-asym"):
        ratios = []
        for order in ORDERS:
            name, _, mse = order.partition("+")
            solved = gptq.solve(weight, hessian, format, gptq.GptqOptions(order=name, mse=bool(mse)))
            ratios.append(solved.error / solved.rounding_error)
        lines.append(f"{format:14} " + " ".join(f"{ratio:12.3f}" for ratio in ratios))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help="a Python that has llmcompressor")
    parser.add_argument("--out", type=Path, help="a JSON file; the table goes beside it as .txt")
    parser.add_argument("--orders", action="store_true", help="only the errors of all orders, no times")
    options = parser.parse_args()
    if options.orders:
        print(options_table(options.size, options.size))
        return
    report = measure(options.size, options.size, options.runs, options.threads, options.peer)
    text = table(report)
    print(text)
    if options.out:
        whole = {"machine": machine(), "versions": versions(), "threads": options.threads, "gptq": report}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")
        options.out.with_suffix(".txt").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
