"""The same bits whatever order warps and blocks run in, whenever copies arrive, whatever shared memory held before."""

from __future__ import annotations

from itertools import product

import devices
import pytest
import torch
from cases import block_formats, plane_families

SCHEDULES = [
    {"seed": seed, "order": order, "delivery": delivery, "poison": poison}
    for seed, ((order, delivery), poison) in enumerate(
        zip(
            product(("sequential", "priority"), ("late", "early", "random")),
            (0xFF, 0x00, 0x55, 0x00, 0xFF, 0x00),
            strict=True,
        )
    )
]


def assert_same(call, what: str) -> None:
    """`call` gives the same bits under every schedule."""
    emulator, results = devices.emulated(), []
    for schedule in SCHEDULES:
        emulator.configure(**schedule)
        found = call()
        results.append(
            [t.contiguous().view(torch.uint8) for t in ([found] if torch.is_tensor(found) else found)]
        )
    for schedule, result in zip(SCHEDULES, results, strict=True):
        for tensor, first in zip(result, results[0], strict=True):
            assert torch.equal(tensor, first), f"{what} under {schedule}"


@pytest.mark.parametrize("format", [row["default"] for row in plane_families()] + block_formats())
def test_every_op(format, rng):
    ops = (devices.emulated(), torch.ops.bitfold_emulated)[1]
    n, k = 33, 256
    weight = torch.from_numpy(rng.standard_normal((n, k)))
    planes = torch.ops.bitfold.encode(weight, format)
    assert_same(lambda: ops.encode(weight, format), f"encode {format}")
    assert_same(lambda: ops.decode(planes, format, n, k, torch.float16), f"decode {format}")
    ids = torch.tensor([5, 0, 32])
    assert_same(lambda: ops.embedding(ids, planes, format, n, k, torch.float32), f"embedding {format}")
    if format not in block_formats():
        assert_same(lambda: ops.unpack(planes, format, n, k), f"unpack {format}")
    for dtype, batches in {torch.float16: (1, 8, 9, 40), torch.bfloat16: (3,), torch.float32: (2,)}.items():
        bias = torch.from_numpy(rng.standard_normal(n)).to(dtype)
        for m in batches:
            x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
            assert_same(lambda: ops.linear(x, planes, format, n, k, bias), f"linear {format} m={m} {dtype}")  # noqa: B023
        grad = torch.from_numpy(rng.standard_normal((3, n))).to(dtype)
        assert_same(lambda: ops.linear_grad_x(grad, planes, format, n, k), f"linear_grad_x {format} {dtype}")  # noqa: B023
