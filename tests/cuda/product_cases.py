"""Inputs for the kernels that multiply by a matrix of any format, and how far from float64 their products may be."""

from __future__ import annotations

import bitfold
import numpy as np
import torch
from case_file import PLANES, Case, Contents, matrix, normal, qtensor
from cases import DTYPES, bits, block_formats, columns, oracle_planes


def product(format: str, m: int, n: int, k: int, dtype: str = "fp16", **more) -> Case:
    return Case("linear", format, n, k, m, dtype, **more)


def columns_of_a_block(format: str) -> int:
    return bitfold.formats.parse(format).group


ROWS = [
    # GPUs with 99 KB of shared memory
    *(product(format, 3, 33, 2048, multiprocessors=1, capability=86) for format in ("int4-g128", "nf4-b64", "q4_k")),
    *(product(format, m, 75, 1024, dtype) for format in PLANES for m, dtype in ((3, "bf16"), (8, "fp16"))),
    *(product(format, 5, 33, 520, "bf16", bias=True)
      for format in ("int4-g32-asym", "int3-g33", "nf4-b33", "fp8-e5m2-tensor")),
    product("int4-g128", 8, 530, 1280, "bf16", multiprocessors=1),  # many tiles for each block
    product("int4-g128", 4, 17, 16384, "bf16", multiprocessors=1),  # several rounds of the pieces on their way
    product("int4-channel", 8, 50, 16384, "bf16", multiprocessors=1),  # k in slices
    product("int4-g128-asym", 8, 50, 16384, infinite=True, multiprocessors=1),  # the same, and one is infinite
    product("nf4-b64", 8, 250, 5632, "bf16", multiprocessors=1),  # a block has x two slices at a time
    *(product(format, m, 37, 2048 if m == 8 else 1024, dtype)
      for format in block_formats() for m, dtype in ((3, "bf16"), (8, "fp16"))),
    *(product(format, 3, 33, 512, "bf16")  # the other two ways of scales and zero points
      for format in ("int4-g64-asym", "int3-g64-asym", "int4-g128-sfp32", "int4-g32-asym-sbf16", "fp4-b64")),
    product("int4-g128-asym", 3, 641, 384, "bf16", multiprocessors=1),  # an odd number of scales
    product("q4_k", 2, 33, 8192, "bf16", multiprocessors=1),  # two rooms; a warp brings the slices that it multiplies
    product("int4-g128-asym", 3, 224, 512, multiprocessors=1),  # the last word of a plane, tiles after the first
    product("int4-g32", 5, 33, 544),  # pieces of 32 columns
    product("nf4-b64-dq", 1, 17, 192),
]  # fmt: skip
TILE = [  # the largest first: ThreadSanitizer gets the last of each format; without wgmma
    *(product("int4-g128", m, 75, 512, "bf16", capability=100) for m in (9, 40)),  # without wgmma, but early
    *(product(format, 3, 33, 1024, "bf16", capability=86) for format in ("q5_0", "q5_1", "q6_k")),
    product("int4-g128", 80, 140, 1024, "bf16", multiprocessors=132, capability=80),
    product("q4_k", 128, 130, 1024, multiprocessors=1, capability=80),
    *(product(format, m, 75, 512, dtype, capability=80) for format in (*PLANES, *block_formats())
      for m, dtype in ((9, "bf16"), (40, "fp16"))),
    *(product(format, 3, 33, 288 if columns_of_a_block(format) == 32 else 256, "bf16", bias=True)
      for format in block_formats()),
    *(product(format, 20, 33, 296, "bf16", bias=True, capability=80)
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(product(format, 9, 140, 1536, "bf16", multiprocessors=132, capability=80)  # k over several blocks
      for format in ("int4-g128-asym", "q4_k", "q6_k")),
    product("nf4-b64-dq", 16, 17, 192, capability=80),
    product("int4-g32", 9, 128, 288, capability=80),  # whole rows that end within a chunk
]  # fmt: skip
FEW = [  # the largest first, as above
    product("int4-g128", 30, 530, 1536, "bf16", multiprocessors=1),  # more stages than wait in shared memory
    product("nf4-b64", 12, 260, 1920, bias=True, multiprocessors=1),  # the last stage is half of one
    *(product(format, m, 75, 1024, dtype, multiprocessors=1) for format in (*PLANES, *block_formats())
      for m, dtype in ((9, "bf16"), (32, "fp16"))),
    *(product(format, 20, 33, 296, "bf16", bias=True)  # rows that begin anywhere
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(product(format, 9, 288, 1536, "bf16", multiprocessors=132)  # k over several blocks, some of which begin late
      for format in ("int4-g128-asym", "nf4-b64", "q4_k", "q6_k")),
    product("nf4-b64-dq", 16, 17, 192),
    *(product(format, 13, 40, 2048, dtype, infinite=True, multiprocessors=1)
      for format, dtype in (("int4-g128-asym", "bf16"), ("int3-g64", "fp16"), ("int8-channel", "bf16"))),
    *(product(format, m, 40, 640, multiprocessors=1)  # one load for all scales; the last stage is half of one
      for format in ("int4-g32", "int4-g32-asym", "int4-g64-asym", "nf4-b32", "nf4-b64-dq") for m in (11, 26)),
    product("int4-g64-asym-sbf16", 14, 40, 640, multiprocessors=1),  # scales in the other 16 bits
    *(product(format, 25, 256, 288) for format in ("int4-g32", "q4_0", "q8_0")),  # whole rows end within a stage
]  # fmt: skip
WGMMA = [  # the largest first, as above
    product("int4-g128", 330, 1500, 128, "bf16", multiprocessors=1),  # three blocks of tokens, of which one isn't full
    product("int4-g32", 200, 700, 96, multiprocessors=1),  # four quarters, scales of 32 columns
    product("q4_k", 190, 450, 256, multiprocessors=1),  # three, with minima
    product("nf4-b64", 130, 450, 128, "bf16", bias=True, multiprocessors=1),
    product("nf4-b64", 40, 75, 1280, "bf16", multiprocessors=1),  # more chunks than stages
    product("q4_k", 40, 40, 2560, "bf16", multiprocessors=1),  # the same with minima
    *(product(format, m, 300, 544, multiprocessors=1)  # blocks of 256 rows, and what is left of one
      for format, m in (("int4-g128", 64), ("int4-g32-asym", 40), ("int8-g32", 33), ("nf4-b64-dq", 40), ("q8_0", 60))),
    product("q4_k", 50, 300, 512, multiprocessors=1),
    product("int4-g64", 64, 600, 2560, multiprocessors=3),  # more chunks than stages, k over blocks
    *(product(format, 36, 260, 1024, "bf16", far=True, multiprocessors=1) for format in ("int4-g64-asym", "q5_1")),
    *(product(format, 70, 140, 1024, "bf16", multiprocessors=132)  # k over several blocks
      for format in ("int4-g128-asym", "q4_k", "q6_k", "q2_k")),
    *(product(format, m, 75, 512, dtype) for format in (*PLANES, *block_formats())
      for m, dtype in ((65, "bf16"), (40, "fp16"))),
    *(product(format, 33, 33, 296, "bf16", bias=True)
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(product(format, 66, 150, 288, "fp16", bias=True) for format in ("q4_0", "q8_0", "mxfp4")),
    *(product("int4-g32", m, n, 288, multiprocessors=1)  # whole rows end within a chunk; scales of 32 columns
      for m, n in ((70, 192), (40, 256))),
    *(product(format, 40, 80, 640, multiprocessors=1)  # all scales of 128 columns by one load; chunks that end within
      for format in ("int8-g32-asym", "int4-g32-asym", "int2-g64-asym", "int2-g32-asym", "nf4-b32-dq", "nf4-b64-dq")),
    product("q4_k", 66, 140, 2560, "bf16", far=True, multiprocessors=1),  # they change for some of a warpgroup's warps
    *(product(format, 66, 140, 1024, "bf16", far=True, multiprocessors=1)  # powers of two of rows change
      for format in ("int4-g64-asym", "nf4-b64", "nf4-b64-dq", "q4_k", "q4_0", "q5_1")),
]  # fmt: skip
FLOOR = [
    *(product(format, 3, 7, columns(format), "fp32", bias=True) for format in (*PLANES, *block_formats())),
    product("nf4-b64-dq", 2, 5, 35, "fp64", layout="flat"),
]
GRAD = [
    Case("linear_grad_x", format, 37, columns(format), 5, "fp32") for format in (*PLANES, *block_formats())
]


def spread_scales(q: bitfold.QTensor, rng: np.random.Generator) -> None:
    """Scales of a row (and minima of blocks) become up to 2^10 times smaller, each in its own way."""
    halves = {"q4_k": 2, "q4_0": 1, "q5_1": 2}.get(q.format)
    if halves is not None:
        blocks = q.planes["blocks"].view(q.shape[0], q.shape[1] // columns_of_a_block(q.format), -1)
        scales = blocks[:, :, : 2 * halves].contiguous().view(torch.float16)
        powers = torch.from_numpy(rng.integers(-10, 1, (*scales.shape[:2], 1)))
        blocks[:, :, : 2 * halves] = (scales.float() * 2.0**powers).half().view(torch.uint8)
        return
    scales = q.planes["nested_scales" if q.format.endswith("-dq") else "scales"]
    scales *= 2.0 ** torch.from_numpy(rng.integers(-10, 1, scales.shape))


def expected(
    case: Case, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> dict[str, np.ndarray]:
    """x w^T + bias in float64 and how far from it a kernel may be: one rounding to the result's dtype, and for each
    product an independent rounding of its weight to fp16, ten standard deviations of it."""
    x, w = x.double(), w.double()
    y = x @ w.T + (0 if bias is None else bias.double())
    spread = (x.square() @ w.square().T).sqrt()
    rounding = torch.finfo(DTYPES[case.dtype]).eps
    exact = case.dtype in ("fp32", "fp64")
    return {
        "expected y": y.numpy(),
        "tolerance": (y.abs() * rounding + spread * (2.0**-20 if exact else 2.0**-9) + 2.0**-24).numpy(),
    }


def linear(case: Case, rng: np.random.Generator) -> Contents:
    q = qtensor(case, rng)
    if case.far:
        spread_scales(q, rng)
    w = q.decode(torch.float32)
    x, bias = normal(case, rng, case.m, case.k), normal(case, rng, case.n) if case.bias else None
    # Of each row one large number, which its power of two is made of.
    x[torch.arange(case.m), torch.from_numpy(rng.integers(0, case.k, case.m))] *= 256
    if case.infinite:
        x[0, 15 * 128 + 5] = float("inf")
    tensors = oracle_planes(q) | {"x": bits(x)} | ({} if bias is None else {"bias": bits(bias)})
    return matrix(x), tensors | expected(case, x, w, bias)


def linear_grad_x(case: Case, rng: np.random.Generator) -> Contents:
    q = qtensor(case, rng)
    dy = normal(case, rng, case.m, case.n)
    wanted = expected(case, dy, q.decode(torch.float32).T, None)
    return matrix(dy), oracle_planes(q) | {"dy": bits(dy)} | wanted
