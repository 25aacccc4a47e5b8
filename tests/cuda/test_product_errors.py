"""Relative norm errors of products in fp16, whatever x is: at most 1e-3 (docs/cuda.md)."""

from __future__ import annotations

import re

import bitfold
import numpy as np
import oracle
import product_errors
import pytest
import torch
from programs import ROOT


@pytest.mark.parametrize("capability", product_errors.CAPABILITIES)
@pytest.mark.parametrize("kind", ["one sign", "outliers"])
@pytest.mark.parametrize(
    "format",
    ["int4-g128", "int2-g64", "nf4-b64", "nf4-b64-dq", "fp4-b64", "q4_1", "q2_k", "q4_k", "q5_k", "q6_k"],
)
def test_x_that_is_hard(format: str, kind: str, capability: int):
    """Roundings of a number that many columns have add up, if they don't cancel; large numbers take bits of others."""
    generator = torch.Generator().manual_seed(1)
    qtensor = bitfold.encode(torch.randn(product_errors.N, product_errors.K, generator=generator), format)
    for m in product_errors.ROWS:
        x = product_errors.KINDS[kind](torch.randn(m, product_errors.K, generator=generator).half())
        assert product_errors.relative_error(x, qtensor, capability) <= 1e-3, f"m={m}"


def mean_rounding(up: float) -> float:
    """Of nf4's numbers times `up` to halves, over normal weights in blocks of 64, by the numbers' root mean square."""
    numbers = np.asarray(oracle.NF4, dtype=np.float64)
    weights = np.random.default_rng(0).standard_normal((4000, 64))
    nearest = np.abs((weights / np.abs(weights).max(1, keepdims=True))[..., None] - numbers).argmin(-1)
    shares = np.bincount(nearest.ravel(), minlength=16) / nearest.size
    errors = (numbers * up).astype(np.float16).astype(np.float64) / up - numbers
    return float(abs(shares @ errors) / np.sqrt(shares @ numbers**2))


def test_roundings_of_nf4_cancel():
    source = (ROOT / "csrc" / "cuda" / "plane_codes.hpp").read_text()
    up = float(re.search(r"row == kNf4 \? ([\d.]+)f", source)[1])
    assert mean_rounding(1.0) > 2.5e-5
    assert mean_rounding(up) < 5e-6
