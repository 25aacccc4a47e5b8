"""Small inputs for each CUDA kernel, and what should come out, as files for kernel_tests.cpp.

The expected results are the CPU backend's: its conformance with the oracles is tested elsewhere. The shapes are chosen
for the kernels' insides: ragged rows and columns, several rounds of each pipeline, more tiles than multiprocessors.
"""

from __future__ import annotations

import functools
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import bitfold
import kv_cases
import numpy as np
import torch
import wgmma_rounding
from bitfold.quantizers import grid as grids
from cases import DTYPES, bits, block_formats, columns, plane_families, random_planes, to_qtensor, weights

PLANES = [row["default"] for row in plane_families() if row["grid"] != "cast"]


@dataclass(frozen=True)
class Case:
    op: str  # of csrc/cuda/cuda.hpp; "pack" is unpack too
    format: str
    n: int
    k: int
    m: int = 0  # rows of x, how many rows to decode (0: all in order), or columns behind (0: no errors are asked for)
    dtype: str = "fp16"
    layout: str = "rows"
    bias: bool = False
    importance: bool = False
    far: bool = False  # scales of a row far apart: linear_wgmma
    infinite: bool = False  # the first row of x has an infinity, of linear_rows' last warp
    outliers: str = ""  # linear_int8: some of "found", "per_row", "copied", "static"
    round: bool = True  # gptq_columns: to the format's grid
    multiprocessors: int = 2
    capability: int = 90  # of the GPU

    def __str__(self) -> str:
        shape = f"{self.m}x{self.n}x{self.k}" if self.m else f"{self.n}x{self.k}"
        words = [self.op, self.format, shape, self.dtype, *(["bias"] if self.bias else [])]
        words += ["importance"] if self.importance else []
        words += ["far"] if self.far else []
        words += ["infinite"] if self.infinite else []
        words += self.outliers.split()
        words += [] if self.round else ["free"]
        words += [] if self.capability == 90 else [f"sm{self.capability}"]
        return "-".join([*words, *(["flat"] if self.layout == "flat" else [])])


@dataclass(frozen=True)
class KvCase(Case):
    """n: packed tokens; k: the head size; m: rows of queries."""

    batch: int = 2
    heads: int = 2
    shared: int = 2  # query heads of a key-value head
    group: int = 16
    value_group: int = 0  # 0: the head size
    first: int = 0
    recent: int = 0
    mask: str = ""
    page: int = 3  # blocks

    def __str__(self) -> str:
        numbers = (self.heads, self.shared, self.group, self.value_group, self.first, self.recent, self.page)
        return "-".join([super().__str__(), *map(str, numbers), self.mask])


def linear(format: str, m: int, n: int, k: int, dtype: str = "fp16", **more) -> Case:
    return Case("linear", format, n, k, m, dtype, **more)


def columns_of_a_block(format: str) -> int:
    return bitfold.formats.parse(format).group


# ---- what there is of each kernel ----

ROWS = [
    # GPUs with 99 KB of shared memory
    *(linear(format, 3, 33, 2048, multiprocessors=1, capability=86) for format in ("int4-g128", "nf4-b64", "q4_k")),
    *(linear(format, m, 75, 1024, dtype) for format in PLANES for m, dtype in ((3, "bf16"), (8, "fp16"))),
    *(linear(format, 5, 33, 520, "bf16", bias=True)
      for format in ("int4-g32-asym", "int3-g33", "nf4-b33", "fp8-e5m2-tensor")),
    linear("int4-g128", 8, 530, 1280, "bf16", multiprocessors=1),  # many tiles for each block
    linear("int4-g128", 4, 17, 16384, "bf16", multiprocessors=1),  # several rounds of the pieces on their way
    linear("int4-channel", 8, 50, 16384, "bf16", multiprocessors=1),  # k in slices
    linear("int4-g128-asym", 8, 50, 16384, infinite=True, multiprocessors=1),  # the same, and one is infinite
    linear("nf4-b64", 8, 250, 5632, "bf16", multiprocessors=1),  # a block has x two slices at a time
    *(linear(format, m, 37, 2048 if m == 8 else 1024, dtype)
      for format in block_formats() for m, dtype in ((3, "bf16"), (8, "fp16"))),
    *(linear(format, 3, 33, 512, "bf16")  # the other two ways of scales and zero points
      for format in ("int4-g64-asym", "int3-g64-asym", "int4-g128-sfp32", "int4-g32-asym-sbf16", "fp4-b64")),
    linear("int4-g128-asym", 3, 641, 384, "bf16", multiprocessors=1),  # an odd number of scales
    linear("q4_k", 2, 33, 8192, "bf16", multiprocessors=1),  # two rooms; a warp brings the slices that it multiplies
    linear("int4-g128-asym", 3, 224, 512, multiprocessors=1),  # the last word of a plane, tiles after the first
    linear("int4-g32", 5, 33, 544),  # pieces of 32 columns
    linear("nf4-b64-dq", 1, 17, 192),
]  # fmt: skip
TILE = [  # the largest first: ThreadSanitizer gets the last of each format; without wgmma
    *(linear("int4-g128", m, 75, 512, "bf16", capability=100) for m in (9, 40)),  # without wgmma, but early
    *(linear(format, 3, 33, 1024, "bf16", capability=86) for format in ("q5_0", "q5_1", "q6_k")),
    linear("int4-g128", 80, 140, 1024, "bf16", multiprocessors=132, capability=80),
    linear("q4_k", 128, 130, 1024, multiprocessors=1, capability=80),
    *(linear(format, m, 75, 512, dtype, capability=80) for format in (*PLANES, *block_formats())
      for m, dtype in ((9, "bf16"), (40, "fp16"))),
    *(linear(format, 3, 33, 288 if columns_of_a_block(format) == 32 else 256, "bf16", bias=True)
      for format in block_formats()),
    *(linear(format, 20, 33, 296, "bf16", bias=True, capability=80)
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(linear(format, 9, 140, 1536, "bf16", multiprocessors=132, capability=80)  # k over several blocks
      for format in ("int4-g128-asym", "q4_k", "q6_k")),
    linear("nf4-b64-dq", 16, 17, 192, capability=80),
    linear("int4-g32", 9, 128, 288, capability=80),  # whole rows that end within a chunk
]  # fmt: skip
FEW = [  # the largest first, as above
    linear("int4-g128", 30, 530, 1536, "bf16", multiprocessors=1),  # more stages than wait in shared memory
    linear("nf4-b64", 12, 260, 1920, bias=True, multiprocessors=1),  # the last stage is half of one
    *(linear(format, m, 75, 1024, dtype, multiprocessors=1) for format in (*PLANES, *block_formats())
      for m, dtype in ((9, "bf16"), (32, "fp16"))),
    *(linear(format, 20, 33, 296, "bf16", bias=True)  # rows that begin anywhere
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(linear(format, 9, 288, 1536, "bf16", multiprocessors=132)  # k over several blocks, some of which begin late
      for format in ("int4-g128-asym", "nf4-b64", "q4_k", "q6_k")),
    linear("nf4-b64-dq", 16, 17, 192),
    *(linear(format, m, 40, 640, multiprocessors=1)  # one load for all scales; the last stage is half of one
      for format in ("int4-g32", "int4-g32-asym", "int4-g64-asym", "nf4-b32", "nf4-b64-dq") for m in (11, 26)),
    *(linear(format, 25, 256, 288) for format in ("int4-g32", "q4_0", "q8_0")),  # whole rows end within a stage
]  # fmt: skip
WGMMA = [  # the largest first, as above
    linear("int4-g128", 330, 1500, 128, "bf16", multiprocessors=1),  # three blocks of tokens, of which one isn't full
    linear("int4-g32", 200, 700, 96, multiprocessors=1),  # four quarters, scales of 32 columns
    linear("q4_k", 190, 450, 256, multiprocessors=1),  # three, with minima
    linear("nf4-b64", 130, 450, 128, "bf16", bias=True, multiprocessors=1),
    linear("nf4-b64", 40, 75, 1280, "bf16", multiprocessors=1),  # more chunks than stages
    linear("q4_k", 40, 40, 2560, "bf16", multiprocessors=1),  # the same with minima
    *(linear(format, m, 300, 544, multiprocessors=1)  # blocks of 256 rows, and what is left of one
      for format, m in (("int4-g128", 64), ("int4-g32-asym", 40), ("int8-g32", 33), ("nf4-b64-dq", 40), ("q8_0", 60))),
    linear("q4_k", 50, 300, 512, multiprocessors=1),
    linear("int4-g64", 64, 600, 2560, multiprocessors=3),  # more chunks than stages, k over blocks
    *(linear(format, 36, 260, 1024, "bf16", far=True, multiprocessors=1) for format in ("int4-g64-asym", "q5_1")),
    *(linear(format, 70, 140, 1024, "bf16", multiprocessors=132)  # k over several blocks
      for format in ("int4-g128-asym", "q4_k", "q6_k", "q2_k")),
    *(linear(format, m, 75, 512, dtype) for format in (*PLANES, *block_formats())
      for m, dtype in ((65, "bf16"), (40, "fp16"))),
    *(linear(format, 33, 33, 296, "bf16", bias=True)
      for format in ("int4-g32-asym", "int3-g64-asym", "nf4-b32", "fp8-e5m2-tensor")),
    *(linear(format, 66, 150, 288, "fp16", bias=True) for format in ("q4_0", "q8_0", "mxfp4")),
    *(linear("int4-g32", m, n, 288, multiprocessors=1)  # whole rows end within a chunk; scales of 32 columns
      for m, n in ((70, 192), (40, 256))),
    linear("q4_k", 66, 140, 2560, "bf16", far=True, multiprocessors=1),  # they change for some of a warpgroup's warps
    *(linear(format, 66, 140, 1024, "bf16", far=True, multiprocessors=1)  # powers of two of rows change
      for format in ("int4-g64-asym", "nf4-b64", "nf4-b64-dq", "q4_k", "q4_0", "q5_1")),
]  # fmt: skip
INT8 = [
    *(
        Case("linear_int8", format, n, k, m, dtype, bias=bias, outliers=outliers, multiprocessors=1)
        for format, m, n, k, dtype, outliers, bias in (
            ("int8-channel", 3, 75, 1040, "bf16", "found", True),  # rows of whole pieces, and of none
            ("int8-channel-asym", 8, 33, 515, "fp16", "found copied", False),
            ("int8-tensor", 1, 17, 4160, "bf16", "static copied", False),
            ("int8-channel-sbf16", 5, 130, 2112, "fp16", "per_row", True),
            ("int8-tensor-asym", 2, 5, 66000, "fp32", "found", False),  # two parts of columns
            ("int8-channel-asym", 10, 5, 65700, "bf16", "", False),
            ("int8-channel", 300, 65, 320, "bf16", "found", True),  # parts of x's rows
            ("int8-channel", 17, 35, 67, "bf16", "found", True),
            ("int8-channel-asym", 9, 75, 1040, "bf16", "found copied", True),
            ("int8-channel", 33, 140, 528, "fp16", "per_row copied", False),  # more columns than a table has
            ("int8-tensor-asym-sfp32", 12, 66, 1040, "fp32", "per_row", False),
            ("int8-channel", 11, 20, 272, "fp32", "found", False),
        )
    ),
    # More columns than wgmma's stages have at once, by one block.
    Case("linear_int8", "int8-channel-asym", 20, 1104, 130, "bf16", outliers="found", multiprocessors=1),
    *(  # k over several blocks, with wgmma and without
        Case(
            "linear_int8", "int8-channel-asym", n, k, m, "bf16", outliers="found", multiprocessors=132, **gpu
        )
        for gpu in ({}, {"capability": 80})
        for m, n, k in ((9, 75, 1040), (40, 30, 592), (130, 140, 320))
    ),
]
FLOOR = [
    *(linear(format, 3, 7, columns(format), "fp32", bias=True) for format in (*PLANES, *block_formats())),
    linear("nf4-b64-dq", 2, 5, 35, "fp64", layout="flat"),
]
GRAD = [
    Case("linear_grad_x", format, 37, columns(format), 5, "fp32") for format in (*PLANES, *block_formats())
]
DECODE = [
    *(Case("decode", format, 7, columns(format), m, dtype) for format in (*PLANES, *block_formats(), "fp16", "bf16")
      for m, dtype in ((0, "fp32"), (4, "fp16"), (9, "bf16"))),
    *(Case("decode", format, 6, 256, 0, "bf16") for format in PLANES),  # whole runs of eight
    *(Case("decode", format, 5, 4352, m, "bf16") for format in ("nf4-b64-dq", "int4-g128-asym") for m in (0, 3)),
    *(Case("decode", format, 5, 1792, 0, "fp16") for format in ("int8-channel", "q4_k", "q4_0")),
    Case("decode", "int3-g64-asym", 6, 256, 0, "bf16"),
    *(Case("decode", format, 5, 35, 0, "fp32", layout="flat") for format in ("nf4-b64-dq", "fp4-b33")),
]  # fmt: skip
ENCODE = [
    Case("encode", format, 5, columns(format), 5, "fp32")
    for format in (*PLANES, "int4-g17-asym", "int8-tensor-asym", "nf4-b64-dq", "fp16", *block_formats())
] + [Case("encode", format, 5, 512, 5, "fp32", importance=True) for format in block_formats()]  # fmt: skip
PACK = [
    Case("pack", format, 5, 83)
    for format in ("int8-channel-asym", "int4-g32-asym", "int3-g17-asym", "int2-g64", "nf4-b64")
]
# Panels of 32 columns, pieces of 64 behind them, blocks of 32 rows.
GPTQ = [
    Case("gptq_columns", format, n, k, m, "fp32", round=rounds)
    for format, n, k, m, rounds in (
        ("int4-g16-asym", 37, 83, 0, True),
        ("int4-g32", 33, 70, 161, True),
        ("nf4-b32", 40, 200, 0, True),
        ("nf4-b33", 7, 31, 0, True),
        ("int4-g32", 35, 61, 130, False),
        ("int8-channel", 5, 40, 64, True),
        ("fp4-b32", 32, 96, 0, True),
    )
]
# Rows and columns beyond the 32 of each that a block holds; steps that are as many as its threads have places for.
STEPS = [
    Case("search_steps", format, n, k, dtype="fp32", importance=importance)
    for format, n, k, importance in (
        ("int4-g33-asym", 37, 83, True),
        ("int3-g64", 33, 70, False),
        ("int4-channel-sbf16", 40, 65, True),
        ("nf4-b32", 5, 96, False),
        ("fp4-b33-sfp32", 32, 40, True),
        ("int8-tensor", 3, 31, False),
    )
]
KV_PACK = [
    KvCase("kv_pack", format, 48, k, 0, dtype, group=group, value_group=value_group)
    for format in ("int8", "fp8", "int4")
    for k, value_group, group, dtype in ((7, 0, 16, "fp32"), (160, 32, 48, "bf16"), (300, 0, 16, "fp16"))
]
KV_UNPACK = [
    *(KvCase("kv_unpack", format, n, k, 0, dtype, group=group, value_group=value_group, first=first, recent=recent)
      for format in ("int8", "fp8", "int4")
      for n, k, value_group, group, first, recent, dtype in (
          (96, 7, 0, 16, 21, 5, "fp32"),
          (240, 160, 32, 80, 1, 3, "bf16"),  # tiles of tokens and of channels, and a part of one each
          (128, 72, 0, 64, 64, 0, "fp16"),
          (32, 65, 0, 16, 7, 2, "fp16"),
      )),
    KvCase("kv_unpack", "int8", 16 * 100, 16, 0, "bf16", batch=1, first=20, recent=1, page=1),  # two launches
    KvCase("kv_unpack", "fp8", 32, 20, 0, "bf16", first=3, recent=3),  # copied by fours
    KvCase("kv_unpack", "int4", 16, 3, 0, "fp16", first=16, recent=9),
]  # fmt: skip
KV_ATTENTION = [
    *(KvCase("kv_attention", format, 96, 7, 3, group=16, shared=3, first=21, recent=70, mask="bool")
      for format in ("int8", "fp8", "int4")),
    KvCase("kv_attention", "int8", 64, 1100, 2, batch=1, heads=1, recent=3),  # a slice more, a query at a time
    KvCase("kv_attention", "int8", 33 * 256, 16, 2, batch=1, heads=1, shared=1, group=256, recent=300, page=2),
    KvCase("kv_attention", "int4", 16 * 100, 16, 1, batch=1, shared=1, page=1, mask="float"),  # two launches
    KvCase("kv_attention", "int8", 16, 48, 5, recent=0, first=16, mask="float"),
    KvCase("kv_attention", "int8", 0, 16, 1),  # nothing
    KvCase("kv_attention", "int8", 16, 16, 1, "bf16", batch=1, heads=1, shared=1, recent=2100),  # chunks: 132
    *(KvCase("kv_attention", format, 64 * 19, k, 2, dtype, shared=3, group=64, value_group=64, first=100, recent=20,
             mask="float", page=2, multiprocessors=1)  # several turns of a warp
      for format, k, dtype in (("int8", 128, "fp16"), ("fp8", 64, "fp32"), ("int4", 128, "bf16"))),
    KvCase("kv_attention", "int8", 64 * 6, 128, 1, "fp32", heads=1, shared=1, group=64),
    *(KvCase("kv_attention", format, 576, 160, 2, "bf16", group=32, value_group=32, first=1, recent=40, mask="float")
      for format in ("int8", "fp8", "int4")),
]  # fmt: skip
KERNELS = {
    "linear_rows": ROWS,
    "linear_tile": TILE,
    "linear_few": FEW,
    "linear_wgmma": WGMMA,
    "linear_int8": INT8,
    "linear_floor": FLOOR,
    "linear_grad_x": GRAD,
    "decode": DECODE,
    "encode": ENCODE,
    "pack": PACK,
    "gptq_columns": GPTQ,
    "search_steps": STEPS,
    "kv_pack": KV_PACK,
    "kv_unpack": KV_UNPACK,
    "kv_attention": KV_ATTENTION,
}

# What runs in every test run: of units with one format each, these formats, and everything that is encoded, since most
# formats have a search of their own, decoded, in one unit, or rounded by GPTQ, whose kernels are two. The others are
# slow tests.
QUICK_UNITS = "[^/]*|[^/]*/k(Int4|Nf4|Q4K|Ragged)"
QUICK_FAMILIES = ("int4", "nf4", "q4_k")


def quick(cases: list[Case]) -> list[Case]:
    return [
        case
        for case in cases
        if case.op
        in (
            "encode",
            "decode",
            "gptq_columns",
            "search_steps",
            "linear_int8",
            "kv_pack",
            "kv_unpack",
            "kv_attention",
        )
        or case.format.split("-")[0] in QUICK_FAMILIES
    ]


def last_of_each_format(cases: list[Case]) -> list[Case]:
    return list({case.format: case for case in cases}.values())


# ---- files ----


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


def qtensor(case: Case, rng: np.random.Generator) -> bitfold.QTensor:
    if case.format in block_formats() or (case.format.startswith(("fp", "bf")) and case.format[:3] != "fp4"):
        # Random codes could be infinite.
        return bitfold.encode(torch.from_numpy(weights(rng, case.n, case.k)), case.format)
    planes = random_planes(rng, case.format, case.n, case.k, case.layout)
    return to_qtensor(planes, case.format, case.n, case.k, case.layout)


def product(
    case: Case,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    rounded: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """x w^T + bias in float64 and how far from it a kernel may be: one rounding to the result's dtype, and for each
    product an independent rounding of its weight, or of another number, to fp16, ten standard deviations of it."""
    x, w = x.double(), w.double()
    y = x @ w.T + (0 if bias is None else bias.double())
    spread = (x.square() @ (w if rounded is None else rounded).square().T).sqrt()
    rounding = torch.finfo(DTYPES[case.dtype]).eps
    exact = case.dtype in ("fp32", "fp64")
    return {
        "expected y": y.numpy(),
        "tolerance": (y.abs() * rounding + spread * (2.0**-20 if exact else 2.0**-9) + 2.0**-24).numpy(),
    }


def gptq_columns(case: Case, rng: np.random.Generator) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Columns of a weight in any order, behind some that have no part in it, and the CPU's bits for them."""
    begin = 5 if case.m else 0
    total = begin + case.k + case.m
    weight = torch.from_numpy(weights(rng, case.n, case.k))
    x = rng.standard_normal((2 * total, total)) @ (np.eye(total) + rng.standard_normal((total, total)) / 9)
    factor = torch.from_numpy(np.linalg.cholesky(x.T @ x / total).T.astype(np.float32)).contiguous()
    behind = torch.from_numpy(rng.standard_normal((case.m, case.n)).astype(np.float32)) if case.m else None
    grid = grids.fit(weight, case.format)
    order = torch.from_numpy(rng.permutation(case.k))
    group = grid.groups(order)
    codes, errors, loss = torch.ops.bitfold.gptq_columns(
        weight, order, factor, begin, grid.step, grid.offset, group, grid.table, grid.low, grid.high, behind, case.round
    )  # fmt: skip
    values: dict[str, object] = {"total": total, "begin": begin, "groups": len(grid.step)}
    values |= {"low": grid.low, "high": grid.high, "round": int(case.round)}
    tensors = {"weight": weight, "order": order, "group": group, "factor": factor, "step": grid.step}
    tensors |= {"offset": grid.offset, "expected out loss": loss}
    tensors |= {} if grid.table is None else {"table": grid.table}
    tensors |= {} if behind is None else {"behind": behind, "expected out errors": errors}
    tensors |= {"expected out codes": codes} if case.round else {}
    return values, {name: tensor.numpy() for name, tensor in tensors.items()}


def search_steps(case: Case, rng: np.random.Generator) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Steps around those of plain rounding, and the CPU's bits of the best."""
    weight = torch.from_numpy(weights(rng, case.n, case.k))
    grid = grids.fit(weight, case.format)
    stored, zeros = grid.logical["scales"].dtype, grid.logical.get("zeros")
    zeros = None if zeros is None else zeros.t().float().expand(-1, case.n).contiguous()
    factors = torch.linspace(1.1, 0.2, 64 if case.importance else 21)
    importance = torch.linspace(0, 1, case.k) if case.importance else None
    levels = (grid.table, grid.low, grid.high)
    group = grid.width or case.k
    step, cost = torch.ops.bitfold.search_steps(
        weight, group, grid.step, factors, stored, zeros, importance, *levels
    )
    values: dict[str, object] = {"group": group, "tried": len(factors), "low": grid.low, "high": grid.high}
    values |= {"stored": {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}[stored]}
    tensors = {"weight": weight, "start": grid.step, "factors": factors, "zeros": zeros}
    tensors |= {"importance": importance, "table": grid.table}
    tensors |= {"expected out step": step, "expected out cost": cost}
    return values, {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def linear_int8(
    case: Case, q: bitfold.QTensor, x: torch.Tensor, bias: torch.Tensor | None, rng: np.random.Generator
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """x with columns that reach the threshold (many of them for some rows alone), and the CPU's bits."""
    words = case.outliers.split()
    found = "found" in words or "per_row" in words
    column = torch.from_numpy(rng.random(case.k) < 0.02)
    alone = torch.from_numpy(rng.random((case.m, case.k)) < 0.2 / case.m)
    x[column.expand_as(x) | alone] *= 40
    count = min(case.k // 3, 150) if "copied" in words else 0  # more than a table has
    columns = torch.from_numpy(np.sort(rng.choice(case.k, count, replace=False)).astype(np.int32))
    copy = torch.from_numpy(rng.standard_normal((case.n, count))).half()
    scale = torch.tensor([0.05]) if "static" in words else None
    arguments = (6.0 if found else 0.0, "per_row" in words, scale)
    arguments += (columns, copy) if count else (None, None)
    y = torch.ops.bitfold.linear_int8(x, list(q.planes.values()), q.format, case.n, case.k, bias, *arguments)
    assert y.isfinite().all()
    values: dict[str, object] = {
        "threshold": 6 if found else 0,
        "per_row": int(arguments[1]),
        "copies": count,
    }
    tensors = {"x": bits(x), "expected out y": bits(y)}
    tensors |= {} if bias is None else {"bias": bits(bias)}
    tensors |= {} if scale is None else {"x_scale": scale.numpy()}
    tensors |= {"columns": columns.numpy(), "copy": bits(copy)} if count else {}
    return values, tensors


def matrix(tensor: torch.Tensor) -> dict[str, object]:
    rows, columns = tensor.shape
    return {
        "rows": rows,
        "columns": columns,
        "row_stride": tensor.stride(0),
        "column_stride": tensor.stride(1),
    }


def contents(case: Case) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    values: dict[str, object] = {
        "op": case.op,
        "format": case.format,
        "layout": case.layout,
        "n": case.n,
        "k": case.k,
    }
    values |= {"dtype": case.dtype, "multiprocessors": case.multiprocessors, "capability": case.capability}
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    if case.op == "encode":
        source = torch.from_numpy(weights(rng, case.n, case.k))
        importance = torch.linspace(0, 1, case.k) if case.importance else None
        planes = bitfold.encode(source, case.format, importance=importance).planes
        expected = {f"expected out {name}": bits(plane) for name, plane in planes.items()}
        given = {} if importance is None else {"importance": importance.numpy()}
        return values | matrix(source), {"w": source.numpy(), **given, **expected}
    if case.op in ("gptq_columns", "search_steps"):
        more, tensors = (gptq_columns if case.op == "gptq_columns" else search_steps)(case, rng)
        return values | more, tensors
    if isinstance(case, KvCase):
        more, tensors = kv_cases.contents(case, rng)
        return values | more, tensors
    q = qtensor(case, rng)
    if case.far:
        spread_scales(q, rng)
    if case.op == "pack":
        codes, _, zeros, *_ = q.unpack()
        tensors = {
            "codes": codes.numpy(),
            "expected out codes": bits(q.planes["codes"]),
            "expected out logical codes": codes.numpy(),
        }
        values |= {"packed_bytes": q.planes["codes"].nbytes, "packed_zeros_bytes": 0}
        if zeros is not None:
            tensors |= {"zeros": zeros.numpy(), "expected out zeros": bits(q.planes["zeros"])}
            values |= {"packed_zeros_bytes": q.planes["zeros"].nbytes}
        return values, tensors
    tensors = {name: bits(plane) for name, plane in q.planes.items()}
    if case.op == "decode":
        decoded = q.decode(dtype)
        if case.m:
            ids = torch.from_numpy(rng.integers(0, case.n, case.m))
            tensors["ids"] = ids.numpy()
            decoded = decoded[ids]
        return values | {"rows": len(decoded)}, tensors | {"expected out": bits(decoded)}
    w = q.decode(torch.float32)
    if case.op == "linear_grad_x":
        dy = normal(case.m, case.n)
        return values | matrix(dy), tensors | {"dy": bits(dy)} | product(case, dy, w.T, None)
    x, bias = normal(case.m, case.k), normal(case.n) if case.bias else None
    if case.op == "linear_int8":
        more, given = linear_int8(case, q, x, bias, rng)
        return values | matrix(x) | more, tensors | given
    # Of each row one large number, which its power of two is made of.
    x[torch.arange(case.m), torch.from_numpy(rng.integers(0, case.k, case.m))] *= 256
    if case.infinite:
        x[0, 15 * 128 + 5] = float("inf")
    tensors |= {"x": bits(x)} | ({} if bias is None else {"bias": bits(bias)})
    with_wgmma = case.m > 32 and case.capability == 90
    rounded = torch.from_numpy(wgmma_rounding.products(q, w.numpy())) if with_wgmma else None
    return values | matrix(x), tensors | product(case, x, w, bias, rounded)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bitfold-cases-")


@functools.cache
def write(case: Case) -> Path:
    values, tensors = contents(case)
    lines = [f"{name} {value}" for name, value in values.items()]
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    lines += [f"tensor {name} {array.nbytes}" for name, array in arrays.items()]
    path = Path(_folder().name) / str(case)
    path.write_bytes(
        "\n".join([*lines, "", ""]).encode() + b"".join(array.tobytes() for array in arrays.values())
    )
    return path
