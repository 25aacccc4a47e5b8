"""Compares bitfold's GGUF encoders and decoders with llama.cpp's own, byte for byte, on hard data.

    python bench/gguf_exact.py q4_k [--importance] [--rows 16] [--columns 1024]

The families are those that showed a difference in some implementation once: outliers, constants, zeros,
subnormals, grids with exact ties. Prints for each how many blocks agree, and the first that doesn't.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import bitfold
import torch
from bitfold.bench import ggml
from torch import Tensor

Shape = tuple[int, int]


def _student(shape: Shape, freedom: float) -> Tensor:
    chi = torch.distributions.Chi2(freedom).sample(shape)
    return torch.randn(shape) / (chi / freedom).sqrt()


def _outliers(shape: Shape, every: int, size: float = 30.0) -> Tensor:
    x = torch.randn(shape)
    x[:, ::every] *= size
    return x


def _near_powers(shape: Shape) -> Tensor:
    powers = torch.exp2(torch.randint(-20, 20, shape).float())
    below = (powers.view(torch.int32) - torch.randint(1, 64, shape, dtype=torch.int32)).view(torch.float32)
    return below * torch.randn(shape).sign()


def _sparse(shape: Shape) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.1)


def _zeroed_parts(shape: Shape) -> Tensor:
    n, k = shape
    x = torch.randn(n, k // 16, 16)
    x[torch.rand(n, k // 16) < 0.4] = 0
    return x.view(shape)


def _mixed_scales(shape: Shape) -> Tensor:
    n, k = shape
    return (torch.randn(n, k // 32, 32) * 10 ** (torch.rand(n, k // 32, 1) * 18 - 12)).view(shape)


def _rows(values: Tensor, shape: Shape) -> Tensor:
    return values[:, None].expand(shape).contiguous()


def _alternating(shape: Shape) -> Tensor:
    return torch.tensor([1.0, -1.0]).repeat(shape[0], shape[1] // 2)


FAMILIES: dict[str, Callable[[Shape], Tensor]] = {
    "gaussian": torch.randn,
    "weights": lambda s: torch.randn(s) * 0.02,
    "student": lambda s: _student(s, 2),
    "cauchy": lambda s: _student(s, 1),
    "laplace": lambda s: torch.distributions.Laplace(0.0, 1.0).sample(s),
    "gaussian 1e-8": lambda s: torch.randn(s) * 1e-8,
    "gaussian 1e-14": lambda s: torch.randn(s) * 1e-14,
    "gaussian 1e-15": lambda s: torch.randn(s) * 1e-15,
    "gaussian 1e-16": lambda s: torch.randn(s) * 1e-16,
    "gaussian 1e-30": lambda s: torch.randn(s) * 1e-30,
    "subnormal": lambda s: torch.randn(s) * 1e-40,
    "smallest": lambda s: torch.randint(-3, 4, s).float() * 1.4e-45,
    "constant": lambda s: _rows(torch.randn(s[0]), s),
    "plus and minus": lambda s: _rows(torch.randn(s[0]), s) * torch.randn(s).sign(),
    "zeros": torch.zeros,
    "zeros of both signs": lambda s: torch.zeros(s) * torch.randn(s),
    "an outlier in 32": lambda s: _outliers(s, 32),
    "an outlier in 256": lambda s: _outliers(s, 256),
    "negative": lambda s: -torch.randn(s).abs(),
    "positive": lambda s: torch.randn(s).abs(),
    "alternating sign": lambda s: torch.randn(s).abs() * _alternating(s),
    "alternating": lambda s: _rows(torch.randn(s[0]), s) * _alternating(s),
    "offset 1": lambda s: 1 + torch.randn(s) * 0.01,
    "offset -1": lambda s: -1 + torch.randn(s) * 0.01,
    "integers": lambda s: torch.randint(-8, 9, s).float(),
    "halves": lambda s: torch.randint(-16, 17, s).float() / 2,
    "few integers": lambda s: torch.randint(-1, 2, s).float(),
    "bf16 grid": lambda s: torch.randn(s).bfloat16().float(),
    "f16 grid": lambda s: torch.randn(s).half().float(),
    "bf16 weights": lambda s: (torch.randn(s) * 0.02).bfloat16().float(),
    "sparse": _sparse,
    "zeroed parts": _zeroed_parts,
    "mixed scales": _mixed_scales,
    "gaussian 1e4": lambda s: torch.randn(s) * 1e4,
    "gaussian 1e7": lambda s: torch.randn(s) * 1e7,
    "gaussian 1e18": lambda s: torch.randn(s) * 1e18,
    "below powers of two": _near_powers,
    "powers of two": lambda s: torch.exp2(torch.randint(-20, 20, s).float()) * torch.randn(s).sign(),
    "ramp": lambda s: torch.linspace(-1, 1, s[1]).repeat(s[0], 1),
}

IMPORTANCES: dict[str, Callable[[int], Tensor]] = {
    "chi-square": lambda k: torch.randn(k).square(),
    "ones": torch.ones,
    "log-normal": lambda k: (2 * torch.randn(k)).exp(),
    "30% zeros": lambda k: torch.rand(k) * (torch.rand(k) > 0.3),
    "1e-10": lambda k: torch.rand(k) * 1e-10,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("type", choices=[*ggml.BLOCK_TYPES, "all"])
    parser.add_argument("--importance", action="store_true", help="with each of several importance vectors")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--values", action="store_true", help="print the values of the first wrong block")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of bitfold's source"
    )
    args = parser.parse_args()
    types = list(ggml.BLOCK_TYPES) if args.type == "all" else [args.type]
    wrong = [type for type in types if not sweep(type, args)]
    if wrong:
        sys.exit(1)


def sweep(type: str, args: argparse.Namespace) -> bool:
    """Whether every block of every family, encoded and decoded, is the library's."""
    torch.manual_seed(args.seed)
    vectors: dict[str, Tensor | None] = {"none": None}
    if args.importance:
        vectors = {name: make(args.columns) for name, make in IMPORTANCES.items()}
    total = wrong = 0
    shown = False
    for family, make in FAMILIES.items():
        weight = make((args.rows, args.columns))
        source = weight.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype])
        weight = source.float()
        if not bool(weight.isfinite().all()):
            continue  # a family too large for the dtype
        for name, importance in vectors.items():
            different = compare(type, source, weight, importance)
            total, wrong = total + different.numel(), wrong + int(different.sum())
            if bool(different.any()):
                of = f"{type} {family}" + (f", importance {name}" if args.importance else "")
                print(f"{of}: {int(different.sum())} of {different.numel()} blocks differ")
                if not shown:
                    show(type, source, weight, importance, different, args.values)
                    shown = True
    decoded = compare_decoding(type, args)
    print(f"{type}: {total - wrong} of {total} blocks encoded as llama.cpp does, {decoded}")
    return wrong == 0 and "differ" not in decoded


def encode(source: Tensor, type: str, importance: Tensor | None) -> Tensor:
    # clamp: where no float16 holds a scale, llama.cpp writes an infinite one, and so does bitfold with it.
    return bitfold.encode(source, type, importance=importance, clamp=True).planes["blocks"]


def compare(type: str, source: Tensor, weight: Tensor, importance: Tensor | None) -> Tensor:
    """bool [rows, blocks in a row]: which blocks differ."""
    ours, theirs = encode(source, type, importance), ggml.library().quantize(weight, type, importance)
    return (ours != theirs).view(len(ours), -1, block_bytes(type)).any(2)


def block_bytes(type: str) -> int:
    return ggml.library().call["ggml_type_size"](ggml.TYPES[type])


def block_values(type: str) -> int:
    return ggml.library().call["ggml_blck_size"](ggml.TYPES[type])


def show(
    type: str, source: Tensor, weight: Tensor, importance: Tensor | None, different: Tensor, values: bool
) -> None:
    """The first block that differs: both byte strings, which bytes, and its values as C would read them."""
    row, block = (int(index) for index in different.nonzero()[0])
    size, width = block_bytes(type), block_values(type)
    at, part = slice(block * size, (block + 1) * size), slice(block * width, (block + 1) * width)
    mine = encode(source, type, importance)[row, at]
    wanted = ggml.library().quantize(weight, type, importance)[row, at]
    print(f"  first: row {row}, block {block}, bytes {(mine != wanted).nonzero().flatten().tolist()}")
    print(f"  bitfold   {bytes(mine.tolist()).hex()}")
    print(f"  llama.cpp {bytes(wanted.tolist()).hex()}")
    if values:
        print(f"  values {[float.hex(v) for v in weight[row, part].tolist()]}")
    if values and importance is not None:
        print(f"  importance {[float.hex(v) for v in importance[part].tolist()]}")


def compare_decoding(type: str, args: argparse.Namespace) -> str:
    """Random bytes, finite where the library finds them so, and encoded gaussians: bit for bit."""
    library = ggml.library()
    size = library.row_bytes(type, args.columns)
    random = torch.randint(0, 256, (4 * args.rows, size), dtype=torch.uint8)
    encoded = library.quantize(torch.randn(args.rows, args.columns), type)
    wrong = total = 0
    for blocks in (random, encoded):
        shape = (len(blocks), args.columns)
        ours = bitfold.QTensor(type, shape, {"blocks": blocks}).decode()
        theirs = library.dequantize(blocks, type, args.columns)
        same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
        wrong, total = wrong + int((~same).sum()), total + same.numel()
    return f"{wrong} of {total} decoded values differ" if wrong else f"all {total} values decoded as it does"


if __name__ == "__main__":
    main()
