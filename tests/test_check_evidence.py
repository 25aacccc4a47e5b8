"""`bitfold check`: what in sound layers looks like wrong zero points, and what tells it from them."""

from __future__ import annotations

import math

import numpy as np
import planted
import pytest
import torch
from bitfold.check.centre import Centre, Estimate, Verdict, measure, pooled
from bitfold.check.examine import examine
from tiny import one_thread  # noqa: F401

NOUGHT = {-1: 0, 1: 0, 0: 0}


def module(generator: np.random.Generator, shape, bits: int, group: int, zeros: np.ndarray):
    """Codes that use every level, with these zero points; scales of about a hundredth."""
    codes = generator.integers(0, 1 << bits, shape)
    scales = (0.01 * np.exp(0.3 * generator.standard_normal(zeros.shape))).astype(np.float16)
    return codes, zeros, scales


def overwritten(zeros: np.ndarray, bits: int) -> np.ndarray:
    """What is stored of zero points [n, G], if a 0 - 1 is all ones up to the end of its word."""
    stored = (zeros - 1) % (1 << bits)
    for row in range(1, len(stored)):
        if row % (32 // bits):
            stored[row] = np.where(stored[row - 1] == (1 << bits) - 1, (1 << bits) - 1, stored[row])
    return stored


@pytest.mark.parametrize("bits", [2, 4])
def test_a_borrow_that_runs_through_ones_is_sound(bits, tmp_path):
    """Where nearly all zero points are 1, a 0 makes all ones of the rest of its word, as overwriting does."""
    modules = {}
    for seed, name in enumerate(planted.NAMES):
        generator = np.random.default_rng(seed)
        zeros = np.where(generator.random((512, 8)) < 0.01, 0, 1)
        assert (zeros == 0).sum() > 20
        modules[name] = planted.gptq(*module(generator, (512, 128), bits, 16, zeros), bits, 1, 16)
    path = planted.write(tmp_path / "m", modules, planted.gptq_config(bits, 16, False, 1))
    report = examine(path)
    assert report.sound, report.problems


@pytest.mark.parametrize(("bits", "most"), [(2, 2), (4, 2), (4, 12)])
def test_overwritten_among_zero_points_that_differ(bits, most, tmp_path):
    """Zero points of 0 to `most`, in even parts: all ones above every 0 is no chance there."""
    modules = {}
    for seed, name in enumerate(planted.NAMES):
        generator = np.random.default_rng(seed)
        codes, zeros, scales = module(
            generator, (512, 128), bits, 16, generator.integers(0, most + 1, (512, 8))
        )
        modules[name] = planted.gptq(codes, overwritten(zeros, bits), scales, bits, 2, 16)
    path = planted.write(tmp_path / "m", modules, planted.gptq_config(bits, 16, False, 1))
    report = examine(path)
    assert [problem.kind for problem in report.problems] == ["zeros-overwritten"] * len(planted.NAMES)


def test_columns_that_lie_alike_by_chance_are_no_evidence():
    """Steps wider than most weights, and a mean of one step: nine codes in ten lie at z + 1, in some columns all."""
    generator = torch.Generator().manual_seed(1)
    zeros = torch.randint(1, 3, (32, 1), generator=generator, dtype=torch.int16)
    away = torch.rand((32, 1024), generator=generator) < 0.1
    codes = (zeros + 1 - away.to(torch.int16)).to(torch.uint8)
    assert int((~away).all(0).sum()) >= 8
    found = measure(codes, zeros, torch.full((32, 1), 0.01), 1024)
    assert found.exact == NOUGHT
    assert found.judge(1) is not Verdict.OFF


@pytest.mark.parametrize("shift", [-1, 1])
def test_dead_columns_are_evidence(shift):
    """The same where weights are spread over the codes, and eight columns are dead."""
    generator = torch.Generator().manual_seed(1)
    zeros = torch.randint(5, 9, (32, 1), generator=generator, dtype=torch.int16)
    codes = torch.randint(0, 16, (32, 1024), generator=generator, dtype=torch.uint8)
    codes[:, 100:108] = (zeros + shift).to(torch.uint8)
    found = measure(codes, zeros, torch.full((32, 1), 0.01), 1024)
    assert found.exact == {**NOUGHT, shift: 8}
    assert found.judge(shift) is Verdict.OFF
    assert found.judge(-shift) is Verdict.UNDECIDED


def centre(intercept: float, error: float = 0.01, mean: float = 1.0) -> Centre:
    estimate = Estimate(intercept, error)
    return Centre(4096, Estimate(mean, 0.01), estimate, estimate, NOUGHT)


def test_a_bent_intercept_is_no_evidence_however_certain_it_is():
    assert centre(0.55, 0.001).judge(1) is Verdict.UNDECIDED
    assert centre(0.95, 0.001).judge(1) is Verdict.OFF
    assert centre(0.8, 0.16).judge(1) is Verdict.UNDECIDED  # five errors from 0, fewer than two from the half


def test_matrices_together_have_the_error_of_their_scatter():
    agreed = pooled(
        [centre(value, mean=0.9 + 0.02 * i) for i, value in enumerate((0.9, 1.0, 1.1, 1.0, 0.95, 1.05))]
    )
    apart = pooled(
        [centre(value, mean=0.9 + 0.02 * i) for i, value in enumerate((0.1, 0.9, 1.9, 0.8, 0.2, 1.5))]
    )
    assert agreed.judge(1) is Verdict.OFF
    assert apart.by_spread.value > 0.7
    assert apart.judge(1) is Verdict.UNDECIDED
    values = np.array([0.1, 0.9, 1.9, 0.8, 0.2, 1.5])
    assert apart.by_spread.value == pytest.approx(values.mean(), abs=1e-3)
    assert apart.by_spread.error == pytest.approx(values.std(ddof=1) / math.sqrt(6), rel=1e-2)


def test_three_matrices_are_too_few_to_tell_their_scatter():
    none = Estimate()
    silent = Centre(64, Estimate(1.0, 0.01), none, none, NOUGHT)
    assert pooled([centre(1.0)] * 3 + [silent] * 5).judge(1) is Verdict.UNDECIDED
    assert pooled([centre(1.0)] * 4 + [silent] * 4).judge(1) is Verdict.OFF


def test_touched_zero_points_that_differ_from_the_rest_because_none_is_0(tmp_path):
    """Weights that lie above 0: zero points end at 0, where a group's mean follows them no more. Numbers above a 0 in
    a word of version 1 are never 0 themselves, so that their groups have other means than all others together.
    """
    modules = {}
    for seed, name in enumerate(planted.NAMES):
        generator = np.random.default_rng(seed)
        zeros = generator.choice(4, (512, 8), p=(0.5, 0.45, 0.04, 0.01))
        means = np.array([1.4, 1.7, 2.2, 2.5])[zeros]  # of the codes of a group
        codes = np.rint(means[..., None] + 0.5 * generator.standard_normal((512, 8, 16))).clip(0, 3)
        scales = np.full(zeros.shape, 0.01, np.float16)
        codes = codes.reshape(512, 128).astype(np.int64)
        modules[name] = planted.gptq(codes, zeros, scales, 2, 1, 16)
    path = planted.write(tmp_path / "m", modules, planted.gptq_config(2, 16, False, 1))
    report = examine(path)
    assert "zeros-borrow" not in {problem.kind for problem in report.problems}, report.problems
