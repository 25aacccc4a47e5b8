"""AWQ's searches against the paper in float64 (oracle_awq.py), and what must hold for any matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import bitfold
import numpy as np
import oracle_awq
import pytest
import torch
from bitfold.quantizers import awq
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import one_thread  # noqa: F401

ALL = awq.AwqOptions(finalists=20)  # every point of the grid by the product with G


def layer(n: int, k: int, seed: int, tokens: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs of very different sizes, that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    sizes = torch.exp(1.2 * torch.randn(k, generator=generator))
    common = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, k, generator=generator)
    return weight, (torch.randn(tokens, k, generator=generator) + common) * sizes


def search(weights, formats, x, options=ALL, **more) -> awq.Scaled:
    gram = x.double().T @ x.double()
    return awq.search_scales(weights, formats, gram, x.abs().mean(0), options, **more)


# ---- scales ----


@pytest.mark.parametrize(
    "format", ["int4-g32", "int3-g16", "int4-g32-asym", "nf4-b32", "int8-channel", "int2-g16"]
)
def test_the_scales_are_the_papers(format):
    weight, x = layer(24, 72, 3)
    found = search([weight], [format], x)
    w, inputs = weight.double().numpy(), x.double().numpy()
    magnitudes = np.abs(inputs).mean(0)
    errors = oracle_awq.scale_errors(w, format, inputs, magnitudes, 20)
    best = int(np.argmin(errors))
    assert found.alpha == best / 20
    np.testing.assert_allclose(found.scales, oracle_awq.scales(magnitudes, best / 20), rtol=1e-5)
    np.testing.assert_allclose(found.errors[0], errors[best], rtol=1e-4)
    np.testing.assert_allclose(found.rounding_errors[0], errors[0], rtol=1e-4)
    np.testing.assert_allclose(found.energy[0], ((w @ inputs.T) ** 2).sum(), rtol=1e-4)


@pytest.mark.parametrize("format", ["int4-g32", "int3-g32", "int4-g64-asym"])
def test_a_few_finalists_find_what_all_of_the_grid_finds(format):
    """To 1 % of the error, on layers of a size at which the ranking has something to go by."""
    for seed in range(4):
        weight, x = layer(128, 256, seed, tokens=512)
        all_of_it = search([weight], [format], x)
        few = search([weight], [format], x, awq.AwqOptions())
        assert few.errors[0] <= 1.01 * all_of_it.errors[0]
        assert few.errors[0] < few.rounding_errors[0]


def test_matrices_with_one_input_share_their_scales():
    """What counts is the sum of their errors; formats may differ, and splitting a matrix changes nothing."""
    weight, x = layer(40, 64, 5)
    whole = search([weight], ["int4-g32"], x)
    parts = search([weight[:10], weight[10:]], ["int4-g32", "int4-g32"], x)
    assert (parts.alpha, sum(parts.errors)) == (whole.alpha, pytest.approx(whole.errors[0], rel=1e-6))
    w, inputs = weight.double().numpy(), x.double().numpy()
    magnitudes = np.abs(inputs).mean(0)
    mixed = search([weight[:10], weight[10:]], ["int3-g16", "nf4-b32"], x)
    errors = np.add(
        oracle_awq.scale_errors(w[:10], "int3-g16", inputs, magnitudes, 20),
        oracle_awq.scale_errors(w[10:], "nf4-b32", inputs, magnitudes, 20),
    )
    assert mixed.alpha == np.argmin(errors) / 20


def test_columns_that_read_one_channel_share_its_scale():
    """As the heads of a group do: the oracle gets the magnitudes of the channels, repeated."""
    weight, x = layer(16, 64, 7)
    spread = torch.arange(64) % 32
    magnitudes = x.abs().mean(0).reshape(2, 32).mean(0)
    gram = x.double().T @ x.double()
    found = awq.search_scales([weight], ["int3-g32"], gram, magnitudes, ALL, spread=spread)
    assert found.scales.shape == (32,)
    w, inputs = weight.double().numpy(), x.double().numpy()
    errors = oracle_awq.scale_errors(w, "int3-g32", inputs, magnitudes.double().numpy()[spread], 20)
    assert found.alpha == np.argmin(errors) / 20
    np.testing.assert_allclose(found.errors[0], min(errors), rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    k=st.sampled_from([16, 40, 96]),
    format=st.sampled_from(
        ["int4-g32", "int3-g64", "int2-g16-asym", "fp4-b32", "fp8-g16", "q4_0", "nf4-b32-dq"]
    ),
    power=st.integers(-6, 6),
)
def test_never_worse_than_plain_rounding_and_the_same_at_any_size(seed, n, k, format, power):
    weight, x = layer(n, 96 if format == "q4_0" else k, seed, tokens=16)
    found = search([weight], [format], x, awq.AwqOptions(grid=8))
    assert found.errors[0] <= found.rounding_errors[0]
    if format == "q4_0":  # whose fp16 scales are rounded otherwise where they are subnormal
        return
    larger = search([weight], [format], x * 2.0**power, awq.AwqOptions(grid=8))
    torch.testing.assert_close(larger.scales, found.scales, rtol=1e-9, atol=0)
    assert larger.errors[0] == pytest.approx(found.errors[0] * 4.0**power, rel=1e-4)


def test_a_ranking_that_is_off_costs_nothing_against_plain_rounding():
    """Two equal inputs: their errors add up, which the ranking can't see; alpha 0 is always among the finalists."""
    weight, x = layer(8, 32, 1)
    x[:, 1::2] = -x[:, ::2]
    found = search([weight], ["int2-g16"], x, awq.AwqOptions(finalists=1))
    assert found.errors[0] <= found.rounding_errors[0]


def test_scales_that_a_dtype_cannot_hold_are_out_of_the_race():
    """Groups so small that fp16 holds their scales as they are, but not those of all columns scaled down."""
    weight, x = layer(8, 64, 2)
    weight *= 2e-6
    x[:, 32:] *= 100  # so the first half is scaled down
    found = search([weight], ["int4-g32"], x)
    assert 0 < found.errors[0] <= found.rounding_errors[0]
    bitfold.encode(weight * found.scales.float(), "int4-g32")
    refused = 0
    for scales in awq.candidates(x.abs().mean(0), 20).float():
        try:
            bitfold.encode(weight * scales, "int4-g32")
        except ValueError:
            refused += 1
    assert 0 < refused < 20


def test_silent_columns_and_silent_layers_have_finite_scales():
    weight, x = layer(8, 32, 2)
    x[:, 5] = 0
    found = search([weight], ["int4-g16"], x)
    assert found.scales.isfinite().all()
    assert (found.scales > 0).all()
    silent = search([weight], ["int4-g16"], torch.zeros_like(x))
    assert torch.equal(silent.scales, torch.ones(32, dtype=torch.float64))
    assert (silent.alpha, silent.errors, silent.energy) == (0.0, (0.0,), (0.0,))


# ---- clipping ----


@pytest.mark.parametrize(
    "format", ["int4-g32", "int3-g16", "int3-g32-asym", "nf4-b32", "fp8-g16", "int4-channel"]
)
def test_each_group_is_clipped_as_the_paper_clips_it(format):
    """k is no multiple of the group: the last one is shorter."""
    weight, x = layer(12, 72, 4)
    weight[:, ::7] *= 4  # something to clip
    gram = x.double().T @ x.double()
    found = awq.search_clip(weight, format, gram).numpy()
    width = 72 if format == "int4-channel" else int(format.split("-")[1][1:])
    assert found.shape == (12, -(-72 // width))
    clipped = 0
    for row in range(12):
        for group in range(found.shape[1]):
            span = slice(group * width, (group + 1) * width)
            errors = oracle_awq.clip_errors(
                weight[row, span].numpy(),
                format,
                x[:, span].double().numpy(),
                list(awq.SHRINK),
                "asym" in format,
            )
            chosen = errors[[np.float32(s) for s in awq.SHRINK].index(found[row, group])]
            assert chosen <= min(errors) * (1 + 1e-4)
            clipped += found[row, group] < 1
    assert clipped > 0


def test_scaled_columns_are_clipped_by_their_inputs_of_now():
    weight, x = layer(12, 64, 6)
    factors = torch.exp(torch.linspace(-1, 1, 64, dtype=torch.float64))
    gram = x.double().T @ x.double()
    now = (x.double() / factors).T @ (x.double() / factors)
    scaled = weight * factors.float()
    found = awq.search_clip(scaled, "int3-g16", gram, columns=factors)
    assert torch.equal(found, awq.search_clip(scaled, "int3-g16", now))
    assert not torch.equal(found, awq.search_clip(scaled, "int3-g16", gram))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), format=st.sampled_from(["int4-g32", "int2-g16-asym", "nf4-b32", "fp8-g32"])
)
def test_clipping_lowers_the_error_of_every_group(seed, format):
    weight, x = layer(6, 80, seed, tokens=16)
    gram = (x.T @ x).double()
    shares = awq.search_clip(weight, format, gram)
    assert ((shares <= 1) & (shares >= 0.5)).all()
    width = int(format.split("-")[1][1:])
    plain = (bitfold.encode(weight, format).decode() - weight).double()
    clipped = (awq.quantize(weight, format, shares).decode() - weight).double()
    for start in range(0, 80, width):
        block = gram[start : start + width, start : start + width]
        before, after = (
            torch.einsum(
                "ri,ij,rj->r",
                *(
                    e[:, start : start + width] @ block,
                    torch.eye(len(block)).double(),
                    e[:, start : start + width],
                ),
            )
            for e in (plain, clipped)
        )
        assert (after <= before * (1 + 1e-3) + 1e-9 * before.max()).all()


def test_without_clipping_a_matrix_is_rounded_plainly():
    weight, _ = layer(6, 80, 0)
    for format in ("int4-g32", "int3-g16-asym", "q8_0", "fp16", "int4-tensor", "nf4-b64-dq"):
        weight = weight[:, :64] if format == "q8_0" else weight
        plain = bitfold.encode(weight, format)
        planes = [awq.quantize(weight, format).planes]
        if awq.can_clip(format):
            ones = torch.ones(6, -(-weight.shape[1] // int(format.split("-")[1][1:])))
            planes.append(awq.quantize(weight, format, ones).planes)
        for found in planes:
            assert all(torch.equal(found[name], plane) for name, plane in plain.planes.items()), format


# ---- both ----


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    """And for pieces of any size, but for the order in which errors are added up."""
    weight, x = layer(64, 96, 8)
    gram = x.T @ x
    monkeypatch.setattr(awq, "_PIECE", 8 * 96)
    one = awq.search_scales([weight], ["int3-g32"], gram, x.abs().mean(0))
    shares = awq.search_clip(weight, "int3-g32", gram)
    with ThreadPoolExecutor(4) as pool:
        many = awq.search_scales([weight], ["int3-g32"], gram, x.abs().mean(0), map=pool.map)
        assert torch.equal(many.scales, one.scales)
        assert (many.errors, many.rounding_errors, many.energy) == (
            one.errors,
            one.rounding_errors,
            one.energy,
        )
        assert torch.equal(awq.search_clip(weight, "int3-g32", gram, map=pool.map), shares)
    monkeypatch.undo()
    whole = awq.search_scales([weight], ["int3-g32"], gram, x.abs().mean(0))
    assert torch.equal(whole.scales, one.scales)
    assert whole.errors == pytest.approx(one.errors, rel=1e-6)


@pytest.mark.parametrize("k", [1, 511, 512, 513, 1100])
def test_half_of_the_products_are_the_whole_quadratic_form(k):
    torch.manual_seed(k)
    x, e = torch.randn(30, k), torch.randn(5, k)
    gram = x.T @ x
    found = awq.quadratic(e, gram)
    expected = ((e.double() @ x.double().T) ** 2).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_error_of_a_quantized_matrix_is_that_of_its_outputs():
    weight, x = layer(12, 64, 6)
    factors = torch.exp(torch.linspace(-1, 1, 64, dtype=torch.float64))
    qtensor = bitfold.encode(weight * factors.float(), "int3-g32")
    found = awq.output_error(weight * factors.float(), qtensor, x.T @ x, columns=factors)
    w, changed = weight.double().numpy(), qtensor.decode(torch.float64).numpy() / factors.numpy()
    assert found == pytest.approx(oracle_awq.output_error(w, changed, x.double().numpy()), rel=1e-4)


def test_bad_input_is_named():
    weight, x = layer(4, 32, 0)
    gram, magnitudes = x.T @ x, x.abs().mean(0)
    with pytest.raises(ValueError, match="grid is 0; it must be at least 1"):
        awq.AwqOptions(grid=0)
    with pytest.raises(ValueError, match="finalists is 0; it must be at least 1"):
        awq.AwqOptions(finalists=0)
    with pytest.raises(ValueError, match=r"a weight has shape \[4, 31\]; it must be \[n, 32\]"):
        awq.search_scales([weight[:, :31]], ["int4-g16"], gram, magnitudes)
    with pytest.raises(ValueError, match="there are 1 weights and 2 formats"):
        awq.search_scales([weight], ["int4-g16"] * 2, gram, magnitudes)
    with pytest.raises(ValueError, match=r"gram has shape \[32, 31\]; it must be square"):
        awq.search_scales([weight], ["int4-g16"], gram[:, :31], magnitudes)
    with pytest.raises(
        ValueError, match="magnitudes are of 31 columns; they must be of the 32 that gram has"
    ):
        awq.search_scales([weight], ["int4-g16"], gram, magnitudes[:31])
    with pytest.raises(ValueError, match="magnitudes has a negative or not finite entry"):
        awq.search_scales([weight], ["int4-g16"], gram, magnitudes * float("nan"))
    with pytest.raises(ValueError, match="k is 31; for q4_0 it must be a multiple of 32"):
        awq.search_scales([weight[:, :31]], ["q4_0"], gram[:31, :31], magnitudes[:31])
    for format in ("q4_0", "int4-tensor", "nf4-b64-dq", "bf16"):
        with pytest.raises(ValueError, match="it must have ranges that each group's largest weights set"):
            awq.search_clip(weight, format, gram)
    broken = weight.clone()
    broken[2, 3] = float("inf")
    with pytest.raises(ValueError, match=r"weight\[2, 3\] is inf; it must be finite"):
        awq.search_scales([broken], ["int4-g16"], gram, magnitudes)
