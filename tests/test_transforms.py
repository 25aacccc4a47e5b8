"""The algebra of scaling channels, against numpy in float64 from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitfold.quantizers import transforms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode


def scales_of(channels: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * (2 * torch.rand(channels, generator=generator, dtype=torch.float64) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_columns_undo_what_a_norm_of_any_dtype_really_lost(dtype, offset):
    """Also where the quotient is rounded coarsely: of bf16 and an offset of 1 to less than 1 part in 10."""
    torch.manual_seed(0)
    weight = (torch.randn(256) * 0.2 + 1 - offset).to(dtype)
    asked = scales_of(256, 1)
    divided, scales = transforms.divide_norm(weight, asked, offset)
    assert divided.dtype == dtype
    before = weight.double().numpy() + offset
    after = divided.double().numpy() + offset
    np.testing.assert_allclose(after * scales.numpy(), before, rtol=1e-15)
    assert (np.abs(np.log(scales.numpy() / asked.numpy())) < 0.35).all()


def test_a_silent_channel_of_a_norm_keeps_its_scale():
    divided, scales = transforms.divide_norm(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert divided.tolist() == [0.0, 0.5]
    assert scales.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [(torch.bfloat16, 1.0, 1e4), (torch.float16, 0.0, 1e9), (torch.float16, 0.0, 1e-9)],
)
def test_a_norm_is_not_divided_to_zero_or_infinity(dtype, offset, scale):
    weight = torch.full((3,), 1.5 - offset, dtype=dtype)
    with pytest.raises(ValueError, match=r"scales\[1\] is .* can't divide the norm's 1.5 by"):
        transforms.divide_norm(weight, torch.tensor([1.0, scale, 1.0]), offset)


@pytest.mark.parametrize(("n", "k"), [(10, 6), (3000, 700)], ids=["small", "several strips"])
def test_rows_and_columns_against_numpy(n, k):
    torch.manual_seed(0)
    weight, bias, last = torch.randn(n, k), torch.randn(n), slice(6, n)
    rows, columns = scales_of(n - 6, 1), scales_of(k, 2)
    expected = weight.double().numpy().copy()
    expected[6:] /= rows.numpy()[:, None]
    np.testing.assert_allclose(transforms.divide_rows(weight, rows, last), expected, rtol=1e-7)
    expected = bias.double().numpy().copy()
    expected[6:] /= rows.numpy()
    np.testing.assert_allclose(transforms.divide_rows(bias, rows, last), expected, rtol=1e-7)
    scaled = transforms.multiply_columns(weight, columns)
    np.testing.assert_allclose(scaled, weight.double().numpy() * columns.numpy(), rtol=1e-7)


class Widest(TorchDispatchMode):
    """Notes how many numbers the largest tensor in float64 has that an op makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_matrix_is_in_float64_as_a_whole():
    """A decoder block is held in float32 while it is scaled: a matrix in float64 would be twice as large."""
    weight = torch.randn(3000, 700)
    with Widest() as widest:
        transforms.divide_rows(weight, scales_of(3000, 1))
        transforms.multiply_columns(weight, scales_of(700, 2))
    assert 0 < widest.numbers <= weight.numel() / 2


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_powers_of_two_are_folded_without_any_rounding(seed, exponent):
    torch.manual_seed(seed)
    weight = torch.randn(5, 7)
    scales = torch.full((7,), 2.0**exponent)
    back = transforms.multiply_columns(transforms.multiply_columns(weight, scales), 1 / scales)
    assert torch.equal(back, weight)
    divided, left = transforms.divide_norm(weight[0], scales)
    assert torch.equal(left, scales.double())
    assert torch.equal(divided * scales, weight[0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_is_the_formula_of_the_paper(alpha):
    torch.manual_seed(0)
    x = torch.randn(100, 8) * torch.tensor([1, 1, 40, 1, 1, 0.1, 1, 0])
    weights = [torch.randn(5, 8), 3 * torch.randn(3, 8)]
    found = transforms.smooth_scales(x.abs().amax(0), weights, alpha).numpy()
    largest = np.maximum(np.abs(x.double().numpy()).max(0), 1e-5)
    columns = np.abs(np.concatenate([w.double().numpy() for w in weights])).max(0)
    np.testing.assert_allclose(found, largest**alpha / columns ** (1 - alpha), rtol=1e-12)


def test_bad_input_is_named():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"scales has shape \[2\]; it must be \[3\]"):
        transforms.multiply_columns(torch.ones(2, 3), torch.ones(2))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scales\[2\] is .*; it must be positive and finite"):
            transforms.divide_rows(ones, torch.tensor([1.0, 1.0, bad]))
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must be from 0 to 1"):
        transforms.smooth_scales(ones, [torch.ones(2, 3)], alpha=1.5)
    with pytest.raises(ValueError, match="largest has a negative or not finite entry"):
        transforms.smooth_scales(-ones, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="weights is empty"):
        transforms.smooth_scales(ones, [])


# ---- rotations ----


@pytest.mark.parametrize(
    ("size", "mixed"),
    [
        *((2**p, True) for p in range(8)),
        *(
            (size, True)
            for size in (12, 20, 24, 28, 36, 44, 48, 60, 80, 108, 768, 896, 1536, 2304, 2560, 3584)
        ),
        *((size, False) for size in (3, 6, 10, 92, 172, 184)),
    ],
)
def test_a_hadamard_rotation_is_orthogonal_and_mixes_all_columns(size, mixed):
    """Entries are all of one size; where no Hadamard matrix is known they are so within blocks of a power of two."""
    rotation = transforms.hadamard_rotation(size, 5)
    q = rotation.apply(torch.eye(size, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-13)
    width = size if mixed else size & -size
    inside = np.kron(np.eye(size // width), np.ones((width, width)))
    np.testing.assert_allclose(np.abs(q), inside / np.sqrt(width), atol=1e-13)
    x = torch.randn(3, 2, size, dtype=torch.float64)
    np.testing.assert_allclose(rotation.apply(x), x.numpy() @ q, atol=1e-12)
    np.testing.assert_allclose(rotation.undo(rotation.apply(x)), x, atol=1e-12)


def test_signs_come_from_the_seed():
    one, same, other = (transforms.hadamard_rotation(64, seed).signs for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="size is 0; it must be at least 1"):
        transforms.hadamard_rotation(0, 0)
