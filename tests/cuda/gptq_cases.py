"""Inputs for the kernels of GPTQ: its loop over columns and its search for steps, and the CPU's bits."""

from __future__ import annotations

import numpy as np
import torch
from bitfold.quantizers import grid as grids
from case_file import Case, Contents
from cases import weights

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


def gptq_columns(case: Case, rng: np.random.Generator) -> Contents:
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


def search_steps(case: Case, rng: np.random.Generator) -> Contents:
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
