"""The results of a case against float64, before anything is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfold.bench.contestants import DTYPES, Coder, Multiplier

ROWS, COLUMNS = 4, 64  # of y that are compared: some rows in full, and some columns in full
# Largest relative RMSE of a rounded gaussian matrix, by bits, with one scale for the whole matrix even.
ROUNDING = {2: 1.05, 3: 0.75, 4: 0.35, 5: 0.25, 6: 0.18, 8: 0.1, 16: 0.01}
# Relative norm error of a decoded matrix: its rounding to the dtype, and what bf16 scales cost the peers.
DECODING = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 1e-6}
# Of attention: keys and values that were decoded to the dtype first, and torch's weights in it.
ATTENTION = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-5}


class WrongResultError(RuntimeError):
    """A contestant computed something else than it should have."""


def check_product(multiplier: Multiplier, call_on: Tensor, y: Tensor, weights: Tensor, dtype: str) -> float:
    """Relative norm error of y [m, n] = x @ W^T, over some rows and columns of y.

    call_on: x [m, k]; weights: float64 [n, k]. Raises WrongResultError where y isn't finite, isn't of x's dtype
    and the shape [m, n], or is further from float64 than the multiplier's tolerance.
    """
    x, (m, n) = call_on, (call_on.shape[0], weights.shape[0])
    what = f"{multiplier.name} at {n}x{weights.shape[1]} m={m} {dtype}"
    if tuple(y.shape) != (m, n) or y.dtype != x.dtype or not bool(y.isfinite().all()):
        raise WrongResultError(
            f"{what} gives {y.dtype} of shape {list(y.shape)}, finite: {bool(y.isfinite().all())}; "
            f"it must be finite {x.dtype} of shape {[m, n]}"
        )
    rows = torch.linspace(0, m - 1, min(m, ROWS)).long()
    columns = torch.linspace(0, n - 1, min(n, COLUMNS)).long()
    by_rows = x[rows].double() @ weights.T
    by_columns = x.double() @ weights[columns].T
    error = max(_relative(y[rows], by_rows), _relative(y[:, columns], by_columns))
    if not error <= multiplier.tolerance[dtype]:
        limit = multiplier.tolerance[dtype]
        raise WrongResultError(f"{what} is wrong: relative error {error:.2e}, it must be at most {limit:.0e}")
    return error


def check_encoding(coder: Coder, weight: Tensor, packed: object) -> float:
    """Relative RMSE of `weight`, of which the coder made `packed`. Raises WrongResultError where it is no rounding."""
    error = _relative(coder.decode(packed, torch.float32), weight.double())
    if not error <= ROUNDING[coder.bits]:
        raise WrongResultError(
            f"{coder.name} encodes wrongly: relative error {error:.2e}, "
            f"it must be at most {ROUNDING[coder.bits]} for {coder.bits} bits"
        )
    return error


def check_decoding(coder: Coder, packed: object, dtype: str) -> float:
    """Relative norm error of decoding to `dtype`, against the same codes in float64 (peers: in float32).

    Raises WrongResultError where it is more than the rounding to the dtype.
    """
    widest = torch.float64 if coder.kind == "bitfold" else torch.float32
    exact = coder.decode(packed, widest).double()
    error = _relative(coder.decode(packed, DTYPES[dtype]), exact)
    if not error <= DECODING[dtype]:
        raise WrongResultError(
            f"{coder.name} decodes wrongly to {dtype}: relative error {error:.2e}, "
            f"it must be at most {DECODING[dtype]:.0e}"
        )
    return error


def check_agreement(coders: list[Coder], packed: dict[str, Any]) -> None:
    """Contestants of one block format must have made the same bytes of a matrix, and read the same floats in them.

    packed: what each made of it, by name. Raises WrongResultError where they differ.
    """
    first: dict[str, tuple[Coder, Tensor]] = {}
    for coder in coders:
        if coder.blocks is None or coder.format is None:
            continue
        mine = coder.blocks(packed[coder.name])
        other, theirs = first.setdefault(coder.format, (coder, mine))
        if not torch.equal(mine, theirs):
            rows = int((mine != theirs).any(1).sum())
            raise WrongResultError(
                f"{coder.name} and {other.name} encode {rows} of {len(mine)} rows to other bytes; "
                "they must be the same"
            )
        values, others = (one.decode(packed[one.name], torch.float32) for one in (coder, other))
        if not torch.equal(values.view(torch.int32), others.view(torch.int32)):
            raise WrongResultError(
                f"{coder.name} and {other.name} decode the same bytes to other floats; they must be the same"
            )


def check_attention(name: str, query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> float:
    """Relative norm error of out [1, 1, heads, head], the attention of query [1, heads, 1, head] to all of keys and
    values [1, key-value heads, tokens, head], against float64.

    Raises WrongResultError where it is more than the rounding of weights and sums to the dtype.
    """
    dtype = next(text for text, found in DTYPES.items() if found == query.dtype)
    heads, head = query.shape[1], query.shape[3]
    queries = query.double().reshape(keys.shape[1], -1, head)
    each = [
        torch.softmax(q @ k.double().T * head**-0.5, -1) @ v.double()
        for q, k, v in zip(queries, keys[0], values[0], strict=True)
    ]
    error = _relative(out, torch.cat(each).reshape(1, 1, heads, head))
    if not error <= ATTENTION[dtype]:
        raise WrongResultError(
            f"{name} attends wrongly to {keys.shape[2]} tokens in {dtype}: relative error {error:.2e}, "
            f"it must be at most {ATTENTION[dtype]:.0e}"
        )
    return error


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
