"""GPTQ's loop over columns on GPUs (csrc/cuda/gptq.cu): the bits of the CPU's, whatever the schedule. That `solve`
gives the paper's result with it is in test_gptq.py."""

from __future__ import annotations

import math

import bitfold
import devices
import numpy as np
import pytest
import torch
from bitfold.quantizers import gptq
from bitfold.quantizers import grid as grids
from cases import block_formats, columns, refusal, weights

GPUS = [name for name in devices.NAMES if name != "cpu"]
FORMATS = ["int8-channel", "int4-g32", "int4-g16-asym", "int3-g24", "int2-g16-asym", "int4-tensor",
           "nf4-b33", "fp4-b32", "nf4-b64-dq", *block_formats()]  # fmt: skip
# Rows, columns before, columns and columns behind; None: errors aren't asked for.
SHAPES = [(1, 0, 1, None), (9, 2, 83, 0), (33, 0, 97, None), (70, 5, 64, 131), (32, 0, 31, 1)]

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator"),
    pytest.mark.skipif(bitfold._C.isa() == "scalar", reason="this CPU rounds products before it adds them"),
]


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


def arguments(rng, format: str, n: int, before: int, c: int, behind: int | None) -> list[object]:
    """Of `gptq_columns`, but for `round`: a grid, and columns in any order; some steps are 0."""
    k = before + c + (behind or 0)
    if format in block_formats():
        wide = torch.from_numpy(weights(rng, n, columns(format)))
        grid = grids.fit(wide, format)
        order = torch.from_numpy(rng.permutation(columns(format))[:c].copy())
        group, weight, order = grid.groups(order), wide[:, order].contiguous(), torch.arange(c)
    else:
        weight = torch.from_numpy(weights(rng, n, c))
        grid = grids.fit(weight, format)
        order = torch.from_numpy(rng.permutation(c))
        group = grid.groups(order)
    x = rng.standard_normal((2 * k, k)) @ (np.eye(k) + rng.standard_normal((k, k)) / math.sqrt(k))
    factor = torch.from_numpy(np.linalg.cholesky(x.T @ x / k).T.astype(np.float32)).contiguous()
    errors = None if behind is None else torch.from_numpy(rng.standard_normal((behind, n)).astype(np.float32))
    return [
        weight,
        order,
        factor,
        before,
        grid.step,
        grid.offset,
        group,
        grid.table,
        grid.low,
        grid.high,
        errors,
    ]


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_cpus_bits(format, rounds, gpu, rng):
    for shape in SHAPES:
        given = arguments(rng, format, *shape)
        wanted = torch.ops.bitfold.gptq_columns(*given, round=rounds)
        got = devices.ops().gptq_columns(*given, round=rounds)
        for name, a, b in zip(("codes", "errors", "loss"), got, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"{name} of {shape}"


def test_bits_do_not_depend_on_the_schedule(gpu, rng):
    if gpu != "emulated":
        pytest.skip("a GPU has no schedule to choose")
    given = arguments(rng, "nf4-b32", 40, 3, 100, 150)
    wanted = torch.ops.bitfold.gptq_columns(*given)
    for seed in range(6):
        devices.emulated().configure(**devices.schedule(str(seed)))
        got = devices.ops().gptq_columns(*given)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_nothing_to_do(gpu):
    """No rows, or no columns: the loss is 0."""
    one = torch.arange(0)
    for n, c in ((0, 0), (0, 3), (4, 0)):
        order, scales = torch.arange(c), torch.ones(1, n)
        codes, _, loss = devices.ops().gptq_columns(
            torch.ones(n, c), order, torch.eye(c), 0, scales, scales, one.new_zeros(c), None, 0, 3
        )
        assert codes.shape == (n, c)
        assert loss.tolist() == [0.0] * n


def test_the_ops_refuse(gpu):
    w, one, order = torch.zeros(4, 8), torch.ones(1, 4), torch.arange(8)
    call = devices.ops().gptq_columns
    refusal(
        lambda: call(w, order + 1, torch.eye(8), 0, one, one, order * 0, None, 0, 3),
        "order holds 8",
        "below 8",
    )
    refusal(
        lambda: call(w, order, torch.eye(8), 0, one, one, order * 0 + 1, None, 0, 3),
        "group holds 1",
        "below 1",
    )
    if gpu == "emulated":
        factor = torch.ops.bitfold_emulated.gptq_factor
        refusal(lambda: factor(torch.eye(8), order, 1.0, 0.0), "hessian is on a GPU", "must be on the CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_factor_is_the_cpus_to_rounding(dtype, rng):
    """What a GPU's Hessians get; here torch makes it on the CPU."""
    x = rng.standard_normal((300, 97)) @ (np.eye(97) + rng.standard_normal((97, 97)) / 10)
    hessian, order = torch.from_numpy(x.T @ x).to(dtype), torch.from_numpy(rng.permutation(97))
    before = hessian.clone()
    factor, info = gptq._torch_factor(hessian, order, 300.0, 0.01)
    wanted, _ = torch.ops.bitfold.gptq_factor(hessian, order, 300.0, 0.01)
    assert int(info) == 0
    assert factor.is_contiguous()
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))
    assert torch.equal(hessian, before)
    assert int(gptq._torch_factor(-hessian, order, 300.0, 0.01)[1]) > 0
