"""Generating: batches, seeds, streaming."""

from __future__ import annotations

import copy

import bitfold
import pytest
import tiny
import torch
from bitfold.generate import generate
from tiny import one_thread  # noqa: F401

PROMPTS = ["def f(x):", "a", "The quick brown fox jumps over"]


@pytest.fixture(scope="module")
def model():
    model = tiny.llama(torch.float32, context=128)
    bitfold.quantize(model, "int4-g32", quiet=True)
    return model


def test_left_padded_batch_equals_single(model, tokenizer):
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert (batch["attention_mask"] == 0).any()
    together = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=1)
    for i, prompt in enumerate(PROMPTS):
        single = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**single, max_new_tokens=16, do_sample=False, pad_token_id=1)
        assert together[i, -16:].tolist() == alone[0, -16:].tolist(), prompt


def test_eight_layer_batch_equals_single():
    model = tiny.llama(torch.float32, layers=8, hidden=512, ffn=1024)
    bitfold.quantize(model, "int4-mixed", quiet=True)
    test_left_padded_batch_equals_single(model, tiny.tokenizer())


def test_greedy_is_transformers_greedy(model, tokenizer):
    result = generate(model, tokenizer, PROMPTS[0], max_new_tokens=10)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=1)
    count = inputs["input_ids"].shape[1]
    assert result.text == tokenizer.decode(ids[0, count:], skip_special_tokens=True)
    assert (result.prompt_tokens, result.tokens) == (count, 10)
    assert result.seconds > 0
    assert result.tokens_per_second > 0


def test_streamed_text_is_the_text(model, tokenizer):
    pieces: list[str] = []
    result = generate(model, tokenizer, PROMPTS[2], max_new_tokens=20, on_text=pieces.append)
    assert "".join(pieces) == result.text


def test_seed_decides_a_draw(model, tokenizer):
    def draw(seed: int) -> str:
        return generate(model, tokenizer, "x", max_new_tokens=24, temperature=1.5, seed=seed).text

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = draw(1)
    assert torch.equal(torch.rand(1), expected), "the global generator is left as it was"
    assert draw(1) == first
    assert draw(2) != first


@pytest.mark.parametrize(
    ("options", "words"), [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature")]
)
def test_bad_options(model, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, tokenizer, "x", **options)


def test_what_transformers_would_return_besides(model, tokenizer):
    """Settings of generation_config.json that make it return, or search, something else."""
    expected = generate(model, tokenizer, PROMPTS[0], max_new_tokens=6).text
    settings, before = model.generation_config, copy.deepcopy(model.generation_config)
    settings.update(return_dict_in_generate=True, output_hidden_states=True, num_beams=2)
    try:
        assert generate(model, tokenizer, PROMPTS[0], max_new_tokens=6).text == expected
    finally:
        model.generation_config = before
