"""Inputs for the kernels that round x to 8 bits, row by row, and the CPU's bits."""

from __future__ import annotations

import numpy as np
import torch
from case_file import Case, Contents, matrix, normal, qtensor
from cases import bits, oracle_planes

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
        for gpu in ({}, {"capability": 80}, {"capability": 100})  # the last begins early
        for m, n, k in ((9, 75, 1040), (40, 30, 592), (130, 140, 320))
    ),
]


def linear_int8(case: Case, rng: np.random.Generator) -> Contents:
    """x with columns that reach the threshold, many of them for some rows alone."""
    q = qtensor(case, rng)
    x, bias = normal(case, rng, case.m, case.k), normal(case, rng, case.n) if case.bias else None
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
    values = matrix(x) | {"threshold": 6 if found else 0, "per_row": int(arguments[1]), "copies": count}
    tensors = oracle_planes(q) | {"x": bits(x), "expected out y": bits(y)}
    tensors |= {} if bias is None else {"bias": bits(bias)}
    tensors |= {} if scale is None else {"x_scale": scale.numpy()}
    tensors |= {"columns": columns.numpy(), "copy": bits(copy)} if count else {}
    return values, tensors
