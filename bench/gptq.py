"""Times GPTQ of one matrix beside llm-compressor's, with the same weights, Hessian and scales.

    python bench/gptq.py --peer PYTHON --threads 2 --out bench/results/gptq-NAME.json

PYTHON is the interpreter of an environment that has llmcompressor; without it bitfold is timed alone. bitfold searches
for the scales, which is part of its time; llm-compressor is given them, and its own search is not timed. Before that
the error of the first rows over the Hessian is held against a run of the paper's algorithm in float64, column by
column, at the same damping. Weights are gaussian, inputs are gaussian, mixed, and of different size from column to
column.

Both take turns, in processes of their own, and tell the time on the wall and that of their threads: where others use
the machine too, the second is what can be compared. Threads that wait for each other count as busy in it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold.quantizers import gptq
from peer import Peer, command_line, save, summary, time_lines, timed
from torch import Tensor

FORMAT, GROUP = "int4-g128", 128
PEER_NAME = "llm-compressor"
TIME_BAR = 0.6  # of llm-compressor's seconds
ERROR_BAR = 1.005  # times the error of the float64 run
ORDERS = [order + search for order in gptq.ORDERS for search in ("", "+search")]
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

    def solve() -> gptq.Solved:
        return gptq.solve(weight, hessian, FORMAT, options)

    solved = solve().qtensor
    rounded, scale = solved.decode(), solved.unpack().scales
    assert scale is not None
    exact = float64_run(weight[:ROWS], hessian, scale[:ROWS], options.damping)
    error = error_of(weight, rounded, hessian)
    report: dict[str, Any] = {
        "n": n,
        "k": k,
        "format": FORMAT,
        "damping": options.damping,
        "search": options.search,
        "error": error,
        "rounding_error": error_of(weight, bitfold.encode(weight, FORMAT).decode(), hessian),
        "error_over_float64": error / error_of(weight[:ROWS], exact.float(), hessian),
    }
    times: dict[str, list[tuple[float, float]]] = {"bitfold": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            {"weight": weight, "hessian": hessian, "scale": scale.float()}, Path(folder) / "problem.pt"
        )
        arguments = (PEER, folder, threads, options.damping)
        peer = Peer(PEER_NAME, python, *arguments) if python else None
        for _ in range(runs):
            times["bitfold"].append(timed(solve)[:2])
            if peer:
                times.setdefault(PEER_NAME, []).append(peer.run())
        if peer:
            peer.close()
            theirs = torch.load(Path(folder) / "rounded.pt")
            report["peer_error"] = error_of(weight, theirs, hessian)
    return report | {"times": summary(times)}


def table(report: dict[str, Any]) -> str:
    lines = [
        f"GPTQ, {report['n']} x {report['k']}, {report['format']}, damping {report['damping']}, "
        f"search {report['search']}"
    ]
    lines += time_lines(report["times"], TIME_BAR)
    if "peer_error" in report:
        lines.append(f"error {report['error']:.6g}, {PEER_NAME}'s {report['peer_error']:.6g}")
    met = report["error_over_float64"] <= ERROR_BAR
    lines.append(f"error over plain rounding's: {report['error'] / report['rounding_error']:.3f}")
    lines.append(
        f"error over that of float64, {ROWS} rows: {report['error_over_float64']:.5f}, wanted {ERROR_BAR}, met: {met}"
    )
    return "\n".join(lines)


def options_table(n: int, k: int) -> str:
    """The error of every order, with and without the search for scales, over plain rounding's."""
    weight, hessian = problem(n, k)
    lines = [f"error over plain rounding's, {n} x {k}", f"{'':14} " + " ".join(f"{o:>12}" for o in ORDERS)]
    for format in ("int4-g128", "int3-g64", "int2-g64-asym"):
        ratios = []
        for order in ORDERS:
            name, _, search = order.partition("+")
            options = gptq.GptqOptions(order=name, search=bool(search))
            solved = gptq.solve(weight, hessian, format, options)
            ratios.append(solved.error / solved.rounding_error)
        lines.append(f"{format:14} " + " ".join(f"{ratio:12.3f}" for ratio in ratios))
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, "llmcompressor", 5)
    parser.add_argument("--orders", action="store_true", help="only the errors of all orders, no times")
    options = parser.parse_args()
    if options.orders:
        print(options_table(options.size, options.size))
        return
    report = measure(options.size, options.size, options.runs, options.threads, options.peer)
    save(options.out, "gptq", report, table(report), options.threads)


if __name__ == "__main__":
    sys.exit(main())
