"""bitfold.QuantizedCache in transformers: generate and forward passes beside DynamicCache."""

from __future__ import annotations

import bitfold
import pytest
import tiny
import torch
from bitfold.kv.attention import Packed, forward
from bitfold.kv.blocks import FORMATS
from command import call, call_json
from libraries import needs_kv_cache
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytestmark = needs_kv_cache
one_thread = tiny.one_thread
ATTENTION = ("sdpa", "eager", "bitfold")
# What a step of the format is over the range that shares it, times what a few layers make of it.
NEAR = {"int8": 0.01, "fp8": 0.1, "int4": 0.25}


def config_of(kind: str):
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 512, "bos_token_id": 0,
             "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.1}  # fmt: skip
    if kind == "llama":
        return tiny.config(layers=3, context=512)
    if kind == "mistral":
        return MistralConfig(num_hidden_layers=2, sliding_window=40, **sizes)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(num_hidden_layers=3, sliding_window=24, layer_types=types, **sizes)


KINDS = ("llama", "mistral", "gemma")


def model_of(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation=attention, dtype=dtype)
    model.generation_config.eos_token_id = None  # as long as is asked for
    return model.eval()


def cache_of(model, format: str = "int8", **options):
    return bitfold.QuantizedCache(model.config, format, **({"group": 16, "residual": 4} | options))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: Tensor, cache, steps: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Of all tokens, which are given in calls of these lengths, then one at a time."""
    parts, at = [], 0
    while at < ids.shape[1]:
        step = steps[len(parts)] if len(parts) < len(steps) else 1
        seen = None if mask is None else mask[:, : at + step]
        parts.append(model(ids[:, at : at + step], attention_mask=seen, cache=cache).logits)
        at += step
    return torch.cat(parts, 1)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


STEPS = {"prompt": (60,), "pieces": (13, 30, 1, 1, 7, 8, 9), "tokens": ()}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_logits_are_near_those_of_16_bits(kind, attention, steps):
    model, ids = model_of(kind, attention), tokens(2, 100)
    wanted = logits(model, ids, DynamicCache(config=model.config), steps)
    for format in FORMATS:
        got = logits(model, ids, cache_of(model, format), steps)
        assert 0 < error(got, wanted) < NEAR[format], format
    assert error(logits(model, ids, cache_of(model, residual=200), steps), wanted) < 1e-5, "all exact"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_decoded_are_the_same(kind, monkeypatch):
    """Each call that reads blocks as they lie gives what attention in float64 gives for the same cache decoded. (One
    cache, as two that are given numbers apart by rounding soon hold codes that are neighbours.)"""
    errors = []

    def both(module, query, key, value, mask, scaling, **kwargs):
        got, _ = forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        if isinstance(key, Packed):
            keys, values = (tensor.double() for tensor in key.store.decode(key.visible))
            wanted, _ = sdpa_attention_forward(module, query.double(), keys, values, mask, scaling=scaling)
            errors.append(error(got, wanted))
        return got, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "bitfold", both)
    model, ids = model_of(kind, "bitfold"), tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    for format in FORMATS:
        for given in (None, mask):
            cache = cache_of(model, format)
            logits(model, ids, cache, (41, 1, 1, 6), given)
            assert "read as they lie" in repr(cache)
    calls = len(FORMATS) * 2 * (1 + 1 + 1 + 100 - 49) * model.config.num_hidden_layers
    assert len(errors) == calls
    assert max(errors) < 2e-6


def test_decoding_makes_no_decoded_copy(monkeypatch):
    model, ids = model_of("gemma", "bitfold"), tokens(1, 60)
    cache = cache_of(model)
    logits(model, ids, cache, (50,))
    store = cache.layers[1].store
    monkeypatch.setattr(type(store), "decode", lambda self: pytest.fail("decoded"))
    logits(model, tokens(1, 20, 1), cache, (8,))
    keys, values = cache.layers[1].update(*[torch.ones(1, 2, 3, 20)] * 2)
    assert isinstance(keys, Packed)
    assert keys.shape == (1, 2, 60 + 20 + 3, 20)
    assert values.dtype == torch.float32
    with pytest.raises(AttributeError, match="another attn_implementation"):
        keys.transpose(1, 2)
    with pytest.raises(TypeError):
        torch.matmul(torch.ones(1, 2, 3, 20), keys)


@pytest.mark.parametrize("attention", ["sdpa", "bitfold"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, attention):
    """Greedy, sampled and beams, batches padded on the left: with int8 as with 16 bits for as long as no two tokens are
    near; all exact, the same tokens throughout."""
    model, ids = model_of(kind, attention), tokens(3, 50)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, :3] = 0, 0
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5},
                    {"num_return_sequences": 2, "num_beams": 2, "do_sample": False}):  # fmt: skip
        results = []
        for cache in (DynamicCache(config=model.config), cache_of(model, residual=200), cache_of(model)):
            torch.manual_seed(3)
            results.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=40, cache=cache, **options)
            )
        assert torch.equal(results[0], results[1]), options
        assert results[2].shape == results[0].shape
        assert torch.equal(results[2][:, :52], results[0][:, :52]), options


def test_beams_follow_their_own_past():
    """Reordered and repeated, each row goes on as it would have by itself."""
    model, ids = model_of("gemma", "bitfold"), tokens(3, 70)
    cache, order = cache_of(model), torch.tensor([2, 0, 0, 1])
    logits(model, ids, cache, (60,))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    cache.reorder_cache(order)
    got = logits(model, ids[order][:, :9], cache, ())
    for row, source in enumerate(order):
        alone = cache_of(model)
        logits(model, ids[source : source + 1], alone, (60,))
        wanted = logits(model, ids[source : source + 1, :9], alone, ())
        assert error(got[row : row + 1], wanted) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "bitfold"])
@pytest.mark.parametrize("kind", KINDS)
def test_crop_takes_tokens_back(kind, attention):
    model, ids = model_of(kind, attention), tokens(2, 90)
    for left in (89, 80, 64, 59, 50, 33, 32, 16, 5):
        cache = cache_of(model)
        if kind != "llama":
            cache.activate_past_recording()
        logits(model, ids, cache, (70,))
        cache.crop(left - 90)
        assert cache.get_seq_length() == left
        got = logits(model, ids[:, left:], cache, ())
        wanted = logits(model, ids, DynamicCache(config=model.config), (70,))[:, left:]
        assert error(got, wanted) < NEAR["int8"], left
    cache.crop(-90)
    assert (
        error(logits(model, ids, cache, (40,)), logits(model, ids, DynamicCache(config=model.config), (40,)))
        < 0.01
    )


def test_a_window_that_forgot_refuses_to_go_back():
    model, ids = model_of("mistral"), tokens(1, 80)
    cache = cache_of(model)
    logits(model, ids, cache, (60,))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-30)
    with pytest.raises(ValueError, match="must be negative"):
        cache.crop(30)
    with pytest.raises(ValueError, match="the cache has 80 tokens"):
        cache.crop(-81)
    cache.crop(0)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_window_that_records_its_past_may_be_shorter_than_the_exact_tokens(attention):
    """What a call sees then begins among those."""
    model, ids = model_of("gemma", attention), tokens(2, 60)
    for steps in ((), (35, 1, 12, 1)):
        cache = cache_of(model, residual=40)
        cache.activate_past_recording()
        wanted = logits(model, ids, DynamicCache(config=model.config), steps)
        assert error(logits(model, ids, cache, steps), wanted) < 0.01


def test_gradients_end_at_the_cache():
    """A call of many tokens passes them on to its own keys and values, as with 16 bits."""
    model, ids = model_of("llama"), tokens(1, 80)
    found = []
    for cache in (DynamicCache(config=model.config), cache_of(model, residual=200), cache_of(model)):
        logits(model, ids[:, :50], cache, (50,))
        model(ids[:, 50:], cache=cache).logits.square().mean().backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        model.zero_grad()
    assert error(found[1], found[0]) < 1e-5
    assert 0 < error(found[2], found[0]) < 0.02


def test_assisted_generation():
    model, helper = model_of("llama", "bitfold"), model_of("llama", "bitfold")
    ids = tokens(1, 40)
    wanted = model.generate(ids, max_new_tokens=30, do_sample=False)
    for residual in (200, 4):
        cache = cache_of(model, residual=residual)
        got = model.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=helper, cache=cache)
        assert got.shape == wanted.shape
        assert residual == 4 or torch.equal(got, wanted)


def test_reset_begins_anew():
    model, ids = model_of("gemma"), tokens(2, 60)
    cache = cache_of(model)
    first = logits(model, ids, cache, (40,))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert torch.equal(logits(model, ids, cache, (40,)), first)


def test_masks_have_the_sizes_of_dynamic_cache():
    for kind in KINDS:
        model = model_of(kind)
        caches = cache_of(model), DynamicCache(config=model.config)
        for length in (1, 10, 5, 30, 1, 1, 60, 2):
            for layer in range(model.config.num_hidden_layers):
                sizes = [cache.get_mask_sizes(length, layer) for cache in caches]
                assert sizes[0] == sizes[1], (kind, length)
            for cache in caches:
                for layer in range(model.config.num_hidden_layers):
                    head = getattr(model.config, "head_dim", None) or 16
                    new = torch.zeros(1, 2, length, head)
                    keys, _ = cache.update(new, new, layer)
                    assert keys.shape[2] == cache.get_mask_sizes(0, layer)[0] or cache.is_sliding[layer]
            assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_that_of_the_blocks(format):
    """Long pasts cost what the description says; windows let go of what they don't see."""
    model = model_of("gemma", dtype=torch.bfloat16)
    cache = cache_of(model, format)
    logits(model, tokens(1, 400), cache, (300,))
    full, window = cache.layers[1].store, cache.layers[0].store
    assert full.packed * 16 + full.recent == 400
    assert window.tokens <= 24
    assert len(window.pages) <= 2
    pages = -(-full.packed // 8)
    assert full.nbytes == pages * 8 * 2 * full.blocks.nbytes + 2 * full.keys.nbytes


def test_eval_measures_what_the_cache_changes(tmp_path, capsys):
    """Against the same model with 16 bits; a cache that keeps everything exact changes nothing."""
    from bitfold.evaluate import compare, cut
    from bitfold.kv.through import Through

    source, text = tiny.write_llama(tmp_path / "m"), tmp_path / "t.txt"
    text.write_text(tiny.TEXT)
    command = ("eval", source, "--text", text, "--context", 300, "--kv")
    found = {format: call_json(capsys, *command, format) for format in FORMATS}
    divergence = {format: result["mean_kl"]["value"] for format, result in found.items()}
    assert 0 < divergence["int8"] < divergence["fp8"] < divergence["int4"]
    assert found["int8"]["kv"] == "int8"
    assert found["int4"]["kv_bytes"] < found["int8"]["kv_bytes"]
    code, _, err = call(capsys, *command, "int5")
    assert code != 0
    assert "'int5'; it must be one of" in err
    code, out, _ = call(capsys, *command, "fp8")
    assert code == 0
    assert "KV cache     fp8, " in out
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = bitfold.load_tokenizer(source)
    windows = cut(tiny.TEXT, tokenizer, context=300)
    plain, cached = compare(model, Through(model, None), windows), Through(model, "int8", residual=400)
    assert plain.mean_kl.value < 1e-8, "a token at a time or all at once"
    assert compare(Through(model, None), cached, windows).mean_kl.value < 1e-12


def test_positions_beyond_the_model_are_as_in_transformers():
    """A cache has no end of its own: positions go on as with DynamicCache."""
    model, ids = model_of("llama"), tokens(1, 530)
    wanted = logits(model, ids, DynamicCache(config=model.config), (520,))
    assert error(logits(model, ids, cache_of(model), (520,)), wanted) < 0.01


def test_what_does_not_fit_is_said():
    model = model_of("llama", "bitfold")
    with pytest.raises(ValueError, match="'int3'; it must be one of int8, fp8, int4"):
        bitfold.QuantizedCache(model.config, "int3")
    with pytest.raises(ValueError, match=r"config is a LlamaForCausalLM; it must be .* model\.config"):
        bitfold.QuantizedCache(model)
    with pytest.raises(ValueError, match="group is 24; it must be a multiple of 16"):
        bitfold.QuantizedCache(model.config, group=24)
    with pytest.raises(ValueError, match="residual is -1"):
        bitfold.QuantizedCache(model.config, residual=-1)
    cache = bitfold.QuantizedCache(model.config, value_group=48)
    with pytest.raises(ValueError, match="value_group is 48; it must be the head size, 16"):
        logits(model, tokens(1, 3), cache, ())
    cache = bitfold.QuantizedCache(model.config)
    with pytest.raises(ValueError, match="both to be the same"):
        cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 8), 0)
    logits(model, tokens(1, 3), cache, ())
    keys, values = cache.update(*[torch.ones(1, 2, 1, 16)] * 2, 0)
    with pytest.raises(ValueError, match="softcap"):
        bitfold.kv.attention.forward(model, torch.ones(1, 4, 1, 16), keys, values, None, softcap=30.0)
    from transformers import Qwen3NextConfig

    with pytest.raises(ValueError, match="layers of the kind 'linear_attention'"):
        bitfold.QuantizedCache(Qwen3NextConfig(num_hidden_layers=4))
