"""A case of a kernel, what several of them are made of, and the file of one, which case_file.hpp reads."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bitfold
import numpy as np
import torch
from cases import DTYPES, block_formats, plane_families, random_planes, to_qtensor, weights

PLANES = [row["default"] for row in plane_families() if row["grid"] != "cast"]
# Values and tensors by their names; what a kernel should give is a tensor named "expected ...".
Contents = tuple[dict[str, object], dict[str, np.ndarray]]


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


def qtensor(case: Case, rng: np.random.Generator) -> bitfold.QTensor:
    if case.format in block_formats() or (case.format.startswith(("fp", "bf")) and case.format[:3] != "fp4"):
        # Random codes could be infinite.
        return bitfold.encode(torch.from_numpy(weights(rng, case.n, case.k)), case.format)
    planes = random_planes(rng, case.format, case.n, case.k, case.layout)
    return to_qtensor(planes, case.format, case.n, case.k, case.layout)


def normal(case: Case, rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[case.dtype])


def matrix(tensor: torch.Tensor) -> dict[str, object]:
    rows, columns = tensor.shape
    return {
        "rows": rows,
        "columns": columns,
        "row_stride": tensor.stride(0),
        "column_stride": tensor.stride(1),
    }


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bitfold-cases-")


def write(case: Case, contents: Contents) -> Path:
    common = ("op", "format", "layout", "n", "k", "dtype", "multiprocessors", "capability")
    values, tensors = {name: getattr(case, name) for name in common} | contents[0], contents[1]
    lines = [f"{name} {value}" for name, value in values.items()]
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    lines += [f"tensor {name} {array.nbytes}" for name, array in arrays.items()]
    path = Path(_folder().name) / str(case)
    path.write_bytes(
        "\n".join([*lines, "", ""]).encode() + b"".join(array.tobytes() for array in arrays.values())
    )
    return path
