"""Relative norm errors of products in fp16, whatever sign x has: at most 1e-3 (docs/cuda.md)."""

from __future__ import annotations

import bitfold
import product_errors
import pytest
import torch


@pytest.mark.parametrize("m", product_errors.ROWS)
@pytest.mark.parametrize("format", ["int4-g128", "nf4-b64", "nf4-b64-dq", "fp4-b64", "q5_k", "q6_k"])
def test_x_of_one_sign(format: str, m: int):
    """Roundings of a number that many columns have add up, if they don't cancel."""
    generator = torch.Generator().manual_seed(1)
    qtensor = bitfold.encode(torch.randn(product_errors.N, product_errors.K, generator=generator), format)
    x = torch.randn(m, product_errors.K, generator=generator).half().abs()
    assert product_errors.relative_error(x, qtensor) <= 1e-3
