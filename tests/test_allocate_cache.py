"""The KV cache in budgets: its KL against a loop of single tokens in float64, its bytes against a full
cache, its choice against all choices there are."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import bitfold
import calibrated
import numpy as np
import pytest
import torch
from bitfold import evaluate, hf, layout, recipes
from bitfold.allocation.allocate import Target, allocate, caches_of
from bitfold.allocation.choose import allowed_of, cache_options, choose, limit_of, options_of, sizes_of
from bitfold.kv.blocks import FORMATS
from bitfold.kv.through import Through
from bitfold.sensitivity import measure, result
from bitfold.sensitivity.ground import Texts
from bitfold.shards import CheckpointError
from command import call, call_json
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_kv_cache
from tiny import one_thread  # noqa: F401
from transformers import MistralConfig

pytest.importorskip("scipy", reason="scipy is not installed")
pytestmark = needs_kv_cache

PLAIN = ("int2-g32", "int4-g32", "int8")
CONTEXT = 576  # tokens of the model: eight packed blocks, a whole page, and the recent ones
WINDOW = 256
TOKENS = 2 * (WINDOW - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model, text.txt, found.json: the measurements of all weights and of the KV cache."""
    folder = tmp_path_factory.mktemp("caches")
    calibrated.write_model(folder / "model", layers=2, context=CONTEXT)
    calibrated.write_text(folder / "text.txt", words=200)
    measure.measure(folder / "model", texts(folder), PLAIN, caches=True, output=folder / "found.json")
    return folder


def texts(folder: Path) -> Texts:
    return Texts((folder / "text.txt").read_text(), TOKENS, WINDOW)


@pytest.fixture(scope="module")
def source(folder) -> layout.Source:
    return layout.read_source(folder / "model")


@pytest.fixture(scope="module")
def found(folder) -> result.Sensitivity:
    return result.read(folder / "found.json")


def loop(model, ids: torch.Tensor, cache) -> np.ndarray:
    """Log probabilities [tokens, vocabulary] in float64, one token at a time."""
    with torch.no_grad():
        logits = [model(input_ids=ids[None, i : i + 1], cache=cache).logits[0, 0] for i in range(len(ids))]
    x = torch.stack(logits).double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_kl_is_that_of_decoding_token_by_token(folder, found):
    from transformers import DynamicCache

    model = hf.load_causal_lm(folder / "model", dtype=torch.float32)
    text = (folder / "text.txt").read_text()
    windows = evaluate.cut(text, hf.load_tokenizer(folder / "model"), context=WINDOW, max_tokens=TOKENS)
    assert len(windows.ids) == 2
    assert found.caches.zero == 0.0
    assert [entry.format for entry in found.caches.entries] == list(FORMATS)
    for window, (ids, scored) in enumerate(zip(windows.ids, windows.scored, strict=True)):
        base = loop(model, ids, DynamicCache(config=model.config))[-scored - 1 : -1]
        for format in FORMATS:
            ours = loop(model, ids, bitfold.QuantizedCache(model.config, format))[-scored - 1 : -1]
            kl = float((np.exp(base) * (base - ours)).sum())
            entry = found.caches.find(format)
            assert entry.window_kl[window] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    kls = {format: found.caches.find(format).kl(found.window_tokens).value for format in FORMATS}
    assert 0 < kls["int8"] < kls["fp8"] < kls["int4"]


def test_the_bytes_are_those_of_a_full_cache(source, folder):
    model = hf.load_causal_lm(folder / "model")
    caches = caches_of(source, Target(nbytes=1, context=CONTEXT, batch=3))
    assert list(caches) == ["bf16", *FORMATS]
    assert caches["bf16"] == 2 * 2 * 2 * 2 * 16 * CONTEXT * 3  # keys, values; layers; heads; bytes
    for format in FORMATS:
        cache = bitfold.QuantizedCache(model.config, format)
        with torch.no_grad():
            model(torch.zeros(3, CONTEXT, dtype=torch.long), cache=cache)
        assert caches[format] == cache.nbytes
    assert all(caches[format] < caches["bf16"] for format in FORMATS)


@pytest.mark.parametrize(("window", "context"), [(70, 1400), (200, 1400), (200, 150), (640, 1400)])
def test_a_window_never_holds_more_than_is_counted(tmp_path, window, context):
    """A token or eight at a time, to the context: the most that there ever was, against what is counted."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    config = MistralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=window, dtype="bfloat16",
        max_position_embeddings=2000, architectures=["MistralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    source = layout.read_source(tmp_path, config_suffices=True)
    caches = caches_of(source, Target(nbytes=1, context=context))
    x = torch.randn(1, 1, context, 16).to(torch.bfloat16)
    for format in FORMATS:
        most = 0
        for step in (1, 8, context):
            cache = bitfold.QuantizedCache(config, format)
            for part in x.split(step, 2):
                cache.update(part, part, 0)
                most = max(most, cache.nbytes)
        assert most <= caches[format]
        assert most == caches[format] or window < 128  # below, tokens leave before they fill a group


@given(share=st.floats(0, 1), batch=st.integers(1, 4), first=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_the_best_of_all(source, found, share, batch, first):
    """Three weights and the cache: every assignment there is."""
    few = result.restrict(found, sorted(found.modules)[first : first + 3])
    allowed = allowed_of(few, [])
    caches = caches_of(source, Target(nbytes=1, context=CONTEXT, batch=batch))
    options = options_of(few, allowed)
    fixed, kept = sizes_of(source, few)
    least = (
        fixed + min(caches.values()) + sum(min(o.nbytes for o in one.values()) for one in options.values())
    )
    nbytes = least + int(share * (fixed + kept + caches["bf16"] - 1 - least))
    limit = limit_of(source, few, allowed, nbytes=nbytes, caches=caches)
    choice = choose(few, limit, allowed)
    assert choice.total == choice.nbytes + caches[choice.cache] <= nbytes

    costs = {"bf16": 0.0} | {one.format: one.kl(few.window_tokens).value for one in few.caches.entries}
    assert {name: option.cost for name, option in cache_options(few, limit).items()} == costs
    best = min(
        math.fsum([costs[cache], *(option.cost for option in picked)])
        for cache in caches
        for picked in itertools.product(*(one.values() for one in options.values()))
        if fixed + caches[cache] + sum(option.nbytes for option in picked) <= nbytes
    )
    assert choice.predicted.value == pytest.approx(best, rel=1e-9)


def test_one_byte_decides(source, found):
    """With all weights in their place the cache gets its 16 bits only where the last byte is there."""
    caches = caches_of(source, Target(nbytes=1, context=CONTEXT))
    fixed, kept = sizes_of(source, found)
    allowed = allowed_of(found, ["int8"])
    whole = fixed + kept + caches["bf16"]
    with pytest.raises(ValueError, match=r"with its KV cache takes .* nothing to choose"):
        limit_of(source, found, allowed, nbytes=whole, caches=caches)
    assert (
        choose(found, limit_of(source, found, allowed, nbytes=whole - 1, caches=caches), allowed).total
        < whole
    )
    smallest = (
        min(caches.values())
        + fixed
        + sum(min(option.nbytes for option in one.values()) for one in options_of(found, allowed).values())
    )
    assert (
        choose(found, limit_of(source, found, allowed, nbytes=smallest, caches=caches), allowed).cache
        == "int4"
    )
    with pytest.raises(ValueError, match="less than the smallest"):
        limit_of(source, found, allowed, nbytes=smallest - 1, caches=caches)


def test_what_is_measured_is_what_checkpoint_and_cache_do(capsys, folder, tmp_path, source):
    caches = caches_of(source, Target(nbytes=1, context=CONTEXT, batch=4))
    size = bitfold.plan_checkpoint(folder / "model", "int4-g32").nbytes + caches["int8"]
    arguments = ("--target-size", f"{size}B", "--context", CONTEXT, "--batch", 4, "--tokens", TOKENS)
    data = call_json(
        capsys, "quantize", folder / "model", tmp_path / "q", *arguments, "--window", WINDOW,
        "--text", folder / "text.txt", "--sensitivity", folder / "found.json", "--save-recipe", tmp_path / "mine.toml",
    )  # fmt: skip
    choice = data["allocation"]
    cache = choice["kv_cache"]
    assert cache["quantized"]
    assert cache["bytes_by_format"] == caches
    assert cache["bytes"] == caches[cache["format"]]
    assert data["bytes_after"] == choice["bytes"] <= choice["bytes_at_most"] - cache["bytes"]
    assert json.loads((tmp_path / "q" / "bitfold_report.json").read_text())["allocation"] == choice
    base = hf.load_causal_lm(folder / "model", dtype=torch.float32)
    windows = evaluate.cut(
        (folder / "text.txt").read_text(),
        hf.load_tokenizer(folder / "model"),
        context=WINDOW,
        max_tokens=TOKENS,
    )
    quantized = Through(bitfold.load(tmp_path / "q", dtype=torch.float32), cache["format"])
    kl = evaluate.compare(Through(base, None), quantized, windows).mean_kl
    assert choice["measured_kl"]["value"] == pytest.approx(kl.value, rel=1e-3)
    assert choice["predicted_kl"]["value"] == pytest.approx(kl.value, rel=0.5)
    # The format of the cache is told wherever the checkpoint or the recipe goes.
    assert recipes.read(tmp_path / "mine.toml").kv_cache == cache["format"]
    text = ("--text", folder / "text.txt", "--context", WINDOW, "--max-tokens", TOKENS)
    for given_one, told in (((), True), (("--kv", cache["format"]), False)):
        code, _, err = call(capsys, "eval", tmp_path / "q", *text, *given_one)
        assert code == 0, err
        assert ("were chosen for a budget with a KV cache in" in err) is told
    code, _, err = call(capsys, "generate", tmp_path / "q", "--prompt", "a", "--max-new-tokens", 1)
    assert code == 0
    assert f"--kv {cache['format']}" in err
    code, out, err = call(capsys, "explain", tmp_path / "mine.toml")
    assert code == 0, err
    assert "KV cache" in out


def test_a_round_looks_at_the_cache_too(folder, found, source):
    caches = caches_of(source, Target(nbytes=1, context=CONTEXT, batch=4))
    size = bitfold.plan_checkpoint(folder / "model", "int4-g32").nbytes + caches["fp8"]
    target = Target(nbytes=size, context=CONTEXT, batch=4)
    outcome = allocate(folder / "model", target, texts(folder), sensitivity=found, rounds=2)
    assert len(outcome.rounds) > 1
    for one in outcome.rounds:
        assert one.allocation.total <= size
        assert one.allocation.cache in caches
        assert one.measured == evaluate.ratio(one.window_kl, found.window_tokens)
    again = allocate(folder / "model", target, texts(folder), sensitivity=found, rounds=2)
    assert again.rounds == outcome.rounds


def test_old_files_stay_readable_and_the_cache_is_measured_later(capsys, folder, tmp_path):
    data = json.loads((folder / "found.json").read_text())
    caches = data.pop("caches")
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data))
    assert result.read(old).caches is None
    with pytest.raises(ValueError, match="no KV cache in int8: measure it too"):
        allocate(folder / "model", Target(nbytes=200_000, context=CONTEXT), Texts(""), sensitivity=old)
    options = ("--formats", ",".join(PLAIN), "--tokens", TOKENS, "--window", WINDOW, "--kv", "-o", old)
    shown = call_json(capsys, "sensitivity", folder / "model", "--text", folder / "text.txt", *options)
    assert shown["kv_cache"]["zero"] == 0
    assert json.loads(old.read_text())["caches"] == caches
    caches["entries"][0]["window_kl"].pop()
    old.write_text(json.dumps({**data, "caches": caches}))
    with pytest.raises(CheckpointError, match=r"caches.entries\[0\].window_kl is .* a list of 2 numbers"):
        result.read(old)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-size", "200kB", "--context", 0], "context is 0; it must be at least 1"),
        (["--target-size", "200kB", "--context", -5], "context is -5; it must be at least 1"),
        (["--target-size", "200kB", "--context", 577], "context is 577, it must be at most 576"),
        (["--target-size", "200kB", "--context", 64, "--batch", 0], "batch is 0; it must be at least 1"),
        (["--target-size", "200kB", "--batch", 2], "--batch is 2, which is for --context"),
        (["--target-bpw", 4, "--context", 64], "--context is given with --target-bpw"),
        (["--context", 64], "is given, which is for --target-bpw or --target-size"),
        (["--target-size", "1kB", "--context", 64], "less than the smallest"),
    ],
)
def test_bad_input_is_one_sentence(capsys, folder, tmp_path, arguments, words):
    code, out, err = call(
        capsys,
        "quantize",
        folder / "model",
        tmp_path / "q",
        *arguments,
        "--sensitivity",
        folder / "found.json",
    )
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_windows_in_which_nothing_is_packed_are_refused(folder):
    with pytest.raises(ValueError, match="have 128 tokens, it must be at least 256"):
        measure.measure(folder / "model", Texts(texts(folder).text, TOKENS, 128), PLAIN, caches=True)


def test_a_model_with_another_cache_is_refused(folder, tmp_path):
    config = json.loads((folder / "model" / "config.json").read_text())
    other = calibrated.write_model(tmp_path / "other", layers=2, context=CONTEXT)
    (other / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 16}))
    with pytest.raises(ValueError, match=r"no KV cache that can be counted.*kv_lora_rank"):
        caches_of(layout.read_source(other), Target(nbytes=1, context=CONTEXT))


def test_recipes_name_caches_that_there_are(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('kv_cache = "int3"\n[[rules]]\nformat = "int8"\n')
    with pytest.raises(ValueError, match="kv_cache is 'int3'; it must be one of int8, fp8, int4"):
        recipes.read(path)
