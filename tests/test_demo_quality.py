"""On the demo model, which really learnt something: better formats are nearer to the 16-bit model,
measurably.

The distance is mean KL on held-out text; a gap counts where it is more than three standard errors of the
paired difference over the same windows.
"""

from __future__ import annotations

import copy
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold import hf
from bitfold.evaluate import Comparison, compare_all, cut, kl_gap
from tiny import one_thread  # noqa: F401

DEMO = Path(__file__).parents[1] / "examples" / "demo"
RECIPES = ("int8", "int4-g32", "int4-g128", "int4-tensor", "nf4-b64", "int4-g64-sfp32", "int4-mixed")
TOKENS = 8176  # 16 windows


@pytest.fixture(scope="module")
def measured() -> dict[str, Comparison]:
    base = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    models = {}
    for recipe in RECIPES:
        models[recipe] = copy.deepcopy(base)
        bitfold.quantize(models[recipe], recipe, quiet=True)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = hf.load_tokenizer(DEMO / "model")
    windows = cut(text, tokenizer, context=512, max_tokens=TOKENS, dtype=torch.float32)
    assert windows.protocol.windows == 16
    return compare_all(base, models, windows)


def test_the_model_has_learnt(measured):
    """Far below the 1024 of a model that knows nothing."""
    assert measured["int8"].base.perplexity.value < 40


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("int8", "int4-g32"),
        ("int4-g32", "int4-g128"),
        ("int4-g128", "int4-tensor"),
        ("nf4-b64", "int4-g64-sfp32"),
        ("int4-mixed", "int4-g128"),
    ],
)
def test_better_formats_are_nearer(measured, better, worse):
    gap = kl_gap(measured[better], measured[worse])
    assert gap.value > 3 * gap.error > 0, gap


def test_int8_is_next_to_the_base(measured):
    comparison = measured["int8"]
    assert comparison.mean_kl.value < 1e-4
    assert comparison.top1.value > 0.99
    ratio = comparison.model.perplexity.value / comparison.base.perplexity.value
    assert ratio == pytest.approx(1, abs=1e-3)
