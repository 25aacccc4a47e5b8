"""Huge pages: planes stay where and what they are, whatever the system does."""

from __future__ import annotations

import re
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold.hugepages import huge_page, use_huge_pages
from bitfold.nn import QuantLinear


def in_huge_pages() -> int:
    """Bytes of this process that are in huge pages, as the kernel counts them."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found
    return int(found[1]) << 10


def test_a_large_tensor_is_put_into_huge_pages():
    if not huge_page():
        pytest.skip("this system has no huge pages")
    tensor = torch.arange(4 * huge_page() // 4, dtype=torch.int32)
    address, values = tensor.data_ptr(), tensor.clone()
    done = use_huge_pages(tensor)
    if not done:
        pytest.skip("the system refused")
    assert 2 * huge_page() <= done <= tensor.nbytes
    assert in_huge_pages() >= done  # memory that is used again may have been in some before
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, values)


def test_small_tensors_and_other_devices_are_left_alone():
    assert use_huge_pages(torch.zeros(100)) == 0
    assert use_huge_pages(torch.zeros(0)) == 0
    assert use_huge_pages(torch.zeros(1 << 24, device="meta")) == 0
    assert use_huge_pages(torch.zeros(4096, 4096).T) == 0


def test_a_prepared_module_computes_the_same(rng):
    weight = torch.from_numpy(rng.standard_normal((4096, 4096)).astype("float32"))
    module = QuantLinear(bitfold.encode(weight, "int8"))
    planes = {name: (plane.data_ptr(), plane.clone()) for name, plane in module.named_parameters()}
    x = torch.from_numpy(rng.standard_normal((2, 4096)).astype("float32"))
    y = module(x)
    module.prepare()
    assert torch.equal(module(x), y)
    for name, plane in module.named_parameters():
        assert (plane.data_ptr(), True) == (planes[name][0], torch.equal(plane, planes[name][1]))
