"""Scales folded into a model of each architecture: what it computes stays."""

from __future__ import annotations

import copy

import pytest
import tiny_architectures as tiny
import torch
from bitfold.calibration import mappings
from tiny import one_thread  # noqa: F401


def fold_all(model, seed: int = 0) -> int:
    """Every feed of every block, by random scales from 1/8 to 8. Returns how many columns got another value."""
    generator = torch.Generator().manual_seed(seed)
    columns = 0
    for block in model.model.layers:
        for fold in mappings.folds(block, model.config):
            scales = 8 ** (2 * torch.rand(fold.channels, generator=generator, dtype=torch.float64) - 1)
            before = [target.weight.clone() for target in fold.targets]
            factors = fold.apply(scales)
            torch.testing.assert_close(factors, scales[fold.spread], rtol=1e-5, atol=0)
            for target, old in zip(fold.targets, before, strict=True):
                columns += int((target.weight != old).any(0).sum())
    return columns


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_model_with_folded_scales_computes_the_same(name):
    model = tiny.model(name)
    expected = tiny.logits(model)
    folded = copy.deepcopy(model)
    changed = fold_all(folded)
    inputs = sum(
        sum(target.in_features for target in fold.targets)
        for block in model.model.layers
        for fold in mappings.folds(block, model.config)
    )
    assert changed == inputs  # nothing is left out
    assert tiny.relative_difference(tiny.logits(folded), expected) < 1e-5


@pytest.mark.parametrize("name", tiny.MODELS)
def test_each_feed_is_exact_by_itself_and_not_by_chance(name):
    """And the columns alone, without their source, are another model: the test above can fail."""
    model = tiny.model(name)
    expected = tiny.logits(model)
    for at in range(len(mappings.folds(model.model.layers[0], model.config))):
        folded = copy.deepcopy(model)
        fold = mappings.folds(folded.model.layers[0], folded.config)[at]
        scales = 1 + torch.arange(fold.channels, dtype=torch.float64) % 7
        before = {name: value.clone() for name, value in fold.source.named_parameters()}
        fold.apply(scales)
        assert tiny.relative_difference(tiny.logits(folded), expected) < 1e-5, fold.feed
        targets = [target.weight.clone() for target in fold.targets]
        fold.source.load_state_dict(before, strict=False)
        assert tiny.relative_difference(tiny.logits(folded), expected) > 1e-3, fold.feed
        assert all(torch.equal(old, new.weight) for old, new in zip(targets, fold.targets, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_of_16_bits_lose_nothing_to_their_own_rounding(name, dtype):
    """The columns, in float32, are multiplied by what division left: only float32 rounding remains."""
    model = tiny.model(name)
    norms = [
        fold.source
        for block in model.model.layers
        for fold in mappings.folds(block, model.config)
        if not isinstance(fold.source, torch.nn.Linear)
    ]
    for norm in norms:
        norm.weight.data = norm.weight.data.to(dtype)
    expected = tiny.logits(model)
    for block in model.model.layers:
        for fold in mappings.folds(block, model.config):
            if not isinstance(fold.source, torch.nn.Linear):
                scales = 4 ** (torch.arange(fold.channels, dtype=torch.float64) / fold.channels)
                fold.apply(scales)
                assert fold.source.weight.dtype == dtype
    assert tiny.relative_difference(tiny.logits(model), expected) < 1e-5


def test_grouped_heads_share_the_scales_of_their_values():
    """4 query heads of 12 on 2 value heads: columns 0-11 and 12-23 read value head 0, the others head 1."""
    model = tiny.model("llama")
    fold = mappings.folds(model.model.layers[0], model.config)[1]
    assert (fold.feed.source, fold.channels) == ("self_attn.v_proj", 24)
    head = list(range(12))
    second = [12 + i for i in head]
    assert fold.spread.tolist() == head + head + second + second
    assert fold.reduce(torch.arange(48.0)).tolist() == [6.0 + i for i in head] + [30.0 + i for i in head]


def test_an_unknown_architecture_is_named():
    from transformers import GPT2Config

    with pytest.raises(
        ValueError, match="the model is a 'gpt2', and which layers feed which is known only of llama"
    ):
        mappings.architecture(GPT2Config())


def test_bad_scales_change_nothing():
    model = tiny.model("qwen2")
    before = copy.deepcopy(model.state_dict())
    for fold in mappings.folds(model.model.layers[0], model.config):
        with pytest.raises(ValueError, match=r"scales\[0\] is 0.0; it must be positive and finite"):
            fold.apply(torch.zeros(fold.channels))
        with pytest.raises(ValueError, match="one for each channel"):
            fold.apply(torch.ones(fold.channels + 1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
