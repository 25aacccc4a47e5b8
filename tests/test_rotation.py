"""Models with a rotated residual stream, and smoothed ones: what they compute stays."""

from __future__ import annotations

import pytest
import tiny_architectures as tiny
import torch
from bitfold.calibration import mappings
from bitfold.calibration.rotation import rotate
from bitfold.quantizers.transforms import smooth_scales
from tiny import one_thread  # noqa: F401

POST_NORMS = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name not in POST_NORMS])
def test_a_rotated_model_computes_the_same(name):
    model = tiny.model(name)
    expected = tiny.logits(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rotate(model, seed=3)
    assert tiny.relative_difference(tiny.logits(model), expected) < 1e-5
    stream = [
        key for key in before if key.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
    ]
    for key in stream:
        assert tiny.relative_difference(model.state_dict()[key].double(), before[key].double()) > 0.5, key


def test_a_channel_that_stands_out_is_spread_over_all():
    model = tiny.model("llama")
    model.model.embed_tokens.weight.data[:, 7] *= 50
    ids = torch.randint(2, 64, (1, 24))  # 1 is the padding, a row of zeros

    def peak() -> float:
        hidden = (
            model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            .hidden_states[0][0]
            .detach()
        )
        return float((hidden.abs().amax(1) / hidden.square().mean(1).sqrt()).mean())

    before = peak()
    rotate(model)
    assert before > 6  # of at most sqrt(48) = 6.9
    assert peak() < 3


@pytest.mark.parametrize("name", POST_NORMS)
def test_norms_between_layers_and_stream_are_refused_by_name(name):
    model = tiny.model(name)
    expected = tiny.logits(model)
    with pytest.raises(ValueError, match=f"the model is a '{name}', which has norms between its layers and"):
        rotate(model)
    assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_smoothed_model_computes_the_same_and_its_inputs_are_level(name):
    """Norms' outputs, by scales of alpha 1: all maxima become 1, where the norm's own rounding doesn't matter."""
    model = tiny.model(name)
    expected = tiny.logits(model)
    block = model.model.layers[0]
    for fold in mappings.folds(block, model.config):
        if isinstance(fold.source, torch.nn.Linear):
            continue
        found = []
        handle = fold.targets[0].register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
        tiny.logits(model)
        fold.apply(
            smooth_scales(found[0].abs().amax((0, 1)), [target.weight for target in fold.targets], 1.0)
        )
        tiny.logits(model)
        handle.remove()
        torch.testing.assert_close(found[1].abs().amax((0, 1)), torch.ones(48), rtol=1e-4, atol=0)
    assert tiny.relative_difference(tiny.logits(model), expected) < 1e-5
