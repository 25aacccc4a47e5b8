"""Times bitfold's GGUF formats beside llama.cpp's own libraries, in one run, each answer validated first.

    python bench/gguf_speed.py encode q4_k [--importance]
    python bench/gguf_speed.py decode q4_k
    python bench/gguf_speed.py linear q4_k 1 4096 4096 [--threads 2] [--dtype bf16]

The libraries come from an installed llama_cpp package or from the folder that BITFOLD_LLAMA_CPP names.
Encoded bytes must be the library's, decoded bits too; products must be near float64 of the decoded weights.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import bitfold
import torch
from bitfold.bench import ggml
from bitfold.bench.ceilings import rotate, rotation_bytes
from bitfold.bench.clock import CALLS_PER_TURN, CpuClock, Spread, take_turns
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 1e-3, "int8": 2e-2}  # int8: activations of 8 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    verbs = parser.add_subparsers(dest="verb", required=True)
    encode = verbs.add_parser("encode")
    encode.add_argument("type", choices=ggml.BLOCK_TYPES)
    encode.add_argument("--importance", action="store_true")
    encode.add_argument("--dtype", choices=DTYPES, default="fp32", help="of bitfold's source")
    encode.add_argument("--rows", type=int, default=256)
    decode = verbs.add_parser("decode")
    decode.add_argument("type", choices=ggml.BLOCK_TYPES)
    decode.add_argument("--rows", type=int, default=1024, help="few enough that memory is used again")
    linear = verbs.add_parser("linear")
    linear.add_argument("type", choices=ggml.BLOCK_TYPES)
    for size in ("m", "n", "k"):
        linear.add_argument(size, type=int)
    linear.add_argument("--threads", type=int, default=1)
    linear.add_argument("--dtype", choices=DTYPES, default="bf16", help="of bitfold's activations")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(getattr(args, "threads", 1))
    with torch.inference_mode():
        VERBS[args.verb](args)


def time_encode(args: argparse.Namespace) -> None:
    library, k = ggml.library(), 4096
    weight = torch.randn(args.rows, k).to(DTYPES[args.dtype])
    importance = torch.rand(k) + 0.1 if args.importance else None
    theirs = weight.float()
    expected = library.quantize(theirs, args.type, importance)
    show_agreement(encode(weight, args.type, importance), expected)
    spreads = take_turns(
        {
            "bitfold": lambda: encode(weight, args.type, importance),
            "llama.cpp": lambda: library.quantize(theirs, args.type, importance),
        },
        args.seconds,
        clock=CpuClock(1),
    )
    show_rates(spreads, weight.numel())


def encode(weight: Tensor, type: str, importance: Tensor | None) -> Tensor:
    return bitfold.encode(weight, type, importance=importance).planes["blocks"]


def time_decode(args: argparse.Namespace) -> None:
    library, k = ggml.library(), 4096
    blocks = library.quantize(torch.randn(args.rows, k), args.type)
    ours = bitfold.QTensor(args.type, (args.rows, k), {"blocks": blocks})
    show_agreement(
        ours.decode().view(torch.uint8), library.dequantize(blocks, args.type, k).view(torch.uint8)
    )
    sources = ring(blocks)
    spreads = take_turns(
        {
            "bitfold": lambda: bitfold.QTensor(args.type, (args.rows, k), {"blocks": next(sources)}).decode(),
            "llama.cpp": lambda: library.dequantize(next(sources), args.type, k),
        },
        args.seconds,
        clock=CpuClock(1),
    )
    show_rates(spreads, args.rows * k)


def time_linear(args: argparse.Namespace) -> None:
    library = ggml.library()
    m, n, k = args.m, args.n, args.k
    blocks = library.quantize(torch.randn(256, k), args.type).repeat(-(-n // 256), 1)[:n].contiguous()
    weight = library.dequantize(blocks, args.type, k).double()
    x = torch.randn(m, k)
    exact = x.double() @ weight.T
    ours = x.to(DTYPES[args.dtype])
    calls: dict[str, Callable[[], Tensor]] = {}
    copies = [bitfold.QTensor(args.type, (n, k), {"blocks": blocks.clone()}) for _ in range(matrices(blocks))]
    exact_ours = ours.double() @ weight.T
    for kind, tolerance in (("float", TOLERANCE[args.dtype]), ("int8", TOLERANCE["int8"])):
        name = f"bitfold {args.dtype}" if kind == "float" else "bitfold int8"
        calls[name] = rotate([lambda w=w, a=kind: bitfold.linear(ours, w, activations=a) for w in copies])
        check(calls[name](), exact_ours, tolerance, name)
    for place in library.buffer_types():
        try:
            theirs = [ggml.Matrix(args.type, n, k, args.threads, place) for _ in range(matrices(blocks))]
        except ValueError as error:
            print(error)
            continue
        for matrix in theirs:
            matrix.fill(blocks)
        name = f"llama.cpp {place}"
        calls[name] = rotate([lambda w=w: w(x) for w in theirs])
        check(calls[name](), exact, TOLERANCE["int8"], name)
    scrub = torch.ones(rotation_bytes() // 4)
    spreads = take_turns({**calls, "read": scrub.sum}, args.seconds, clock=CpuClock(args.threads))
    del spreads["read"]
    best = min(spread.median for name, spread in spreads.items() if name.startswith("llama"))
    for name, spread in spreads.items():
        print(
            f"{name:24}{spread.median * 1e6:10.0f} us  ({spread.q1 * 1e6:.0f} {spread.q3 * 1e6:.0f})"
            f"{blocks.nbytes / spread.median / 1e9:8.1f} GB/s{2 * m * n * k / spread.median / 1e9:9.0f} GFLOP/s"
            f"{best / spread.median:8.2f}x llama.cpp's best"
        )


def matrices(blocks: Tensor) -> int:
    """As many as a turn makes calls, and so many that small ones don't stay in the second cache."""
    return max(CALLS_PER_TURN, -(-(64 << 20) // blocks.nbytes))


def ring(blocks: Tensor) -> Iterator[Tensor]:
    return itertools.cycle([blocks.clone() for _ in range(max(CALLS_PER_TURN, (64 << 20) // blocks.nbytes))])


def check(y: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    error = float((y.double() - exact).norm() / exact.norm())
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}, it must be at most {tolerance:.0e}")
    print(f"{name}: relative error {error:.1e}")


def show_agreement(ours: Tensor, theirs: Tensor) -> None:
    if torch.equal(ours, theirs):
        print("bytes: identical")
    else:
        rows = int((ours != theirs).any(1).sum())
        print(f"bytes: DIFFER in {rows} of {len(ours)} rows (bench/gguf_exact.py shows where)")


def show_rates(spreads: dict[str, Spread], weights: int) -> None:
    for name, spread in spreads.items():
        low, high = weights / spread.q3 / 1e6, weights / spread.q1 / 1e6
        print(f"{name:12}{weights / spread.median / 1e6:10.1f} M weights/s  ({low:.1f} {high:.1f})")
    print(f"ratio: {spreads['llama.cpp'].median / spreads['bitfold'].median:.2f}x")


VERBS = {"encode": time_encode, "decode": time_decode, "linear": time_linear}


if __name__ == "__main__":
    main()
