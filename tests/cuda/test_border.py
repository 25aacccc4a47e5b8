"""Bad input where the kernels for GPUs run, as far as the emulator can show it; test_gpu.py has the rest."""

from __future__ import annotations

import bitfold
import devices
import pytest
import torch


def test_planes_that_start_anywhere_are_refused(rng):
    devices.emulated()
    qtensor = bitfold.encode(torch.ones(4, 64), "int8")
    buffer = torch.zeros(4 * 64 + 1, dtype=torch.uint8)
    codes = buffer[1:].view(4, 64).copy_(qtensor.planes["codes"])
    planes = [codes, qtensor.planes["scales"]]
    assert torch.equal(torch.ops.bitfold.decode(planes, "int8", 4, 64, torch.float32), qtensor.decode())
    with pytest.raises(ValueError, match=r"planes\[0\] \(codes\) starts at byte \d+; .* multiple of 16"):
        torch.ops.bitfold_emulated.decode(planes, "int8", 4, 64, torch.float32)


def test_ids_out_of_range_are_a_trap():
    devices.emulated()
    planes = torch.ops.bitfold.encode(torch.ones(5, 40), "int8")
    for bad in (-1, 5, 2**31, 2**62, -(2**63)):
        with pytest.raises(RuntimeError, match=r"decode.*trap"):
            torch.ops.bitfold_emulated.embedding(
                torch.tensor([0, 1, bad]), planes, "int8", 5, 40, torch.float32
            )


def test_whole_number_activations_are_refused():
    devices.emulated()
    planes = torch.ops.bitfold.encode(torch.ones(5, 64), "q8_0")
    with pytest.raises(ValueError, match="activations is 'int8'"):
        torch.ops.bitfold_emulated.linear(
            torch.ones(1, 64).half(), planes, "q8_0", 5, 64, None, "rows", "int8"
        )
