"""Small inputs for each CUDA kernel, and what should come out, as files for kernel_tests.cpp.

The expected results are the CPU backend's: its conformance with the oracles is tested elsewhere. The shapes are chosen
for the kernels' insides: ragged rows and columns, several rounds of each pipeline, more tiles than multiprocessors.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path

import case_file
import format_cases
import gptq_cases
import int8_cases
import kv_cases
import numpy as np
import product_cases
from case_file import Case, Contents

KERNELS = {
    "linear_rows": product_cases.ROWS,
    "linear_tile": product_cases.TILE,
    "linear_few": product_cases.FEW,
    "linear_wgmma": product_cases.WGMMA,
    "linear_int8": int8_cases.INT8,
    "linear_floor": product_cases.FLOOR,
    "linear_grad_x": product_cases.GRAD,
    "decode": format_cases.DECODE,
    "encode": format_cases.ENCODE,
    "pack": format_cases.PACK,
    "gptq_columns": gptq_cases.GPTQ,
    "search_steps": gptq_cases.STEPS,
    "kv_pack": kv_cases.PACK,
    "kv_unpack": kv_cases.UNPACK,
    "kv_attention": kv_cases.ATTENTION,
}
CONTENTS: dict[str, Callable[..., Contents]] = {  # by op
    "linear": product_cases.linear,
    "linear_int8": int8_cases.linear_int8,
    "linear_grad_x": product_cases.linear_grad_x,
    "decode": format_cases.decode,
    "encode": format_cases.encode,
    "pack": format_cases.pack,
    "gptq_columns": gptq_cases.gptq_columns,
    "search_steps": gptq_cases.search_steps,
    "kv_pack": kv_cases.contents,
    "kv_unpack": kv_cases.contents,
    "kv_attention": kv_cases.contents,
}

# What runs in every test run: of units with one format each, these formats, and everything that is encoded, since most
# formats have a search of their own, decoded, in one unit, or rounded by GPTQ, whose kernels are two. The others are
# slow tests.
QUICK_UNITS = "[^/]*|[^/]*/k(Int4|Nf4|Q4K|Ragged)|linear_rows/kQ6K"
QUICK_FAMILIES = ("int4", "nf4", "q4_k")
QUICK_ROWS = "q6_k"  # of at most 8 rows alone: the others' way into shared memory


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
        or (case.format == QUICK_ROWS and case in product_cases.ROWS)
    ]


def last_of_each_format(cases: list[Case]) -> list[Case]:
    return list({case.format: case for case in cases}.values())


@functools.cache
def write(case: Case) -> Path:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    return case_file.write(case, CONTENTS[case.op](case, rng))
