"""Outlier features and what 8 bits lose to them: against numpy, transformers' own forward pass, and whole models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import demo_outliers
import mixtures
import numpy as np
import oracle_outliers
import pytest
import torch
from bitfold import hf
from bitfold.evaluate import cut, perplexity
from bitfold.outliers.columns import WEIGHT_THRESHOLD, Tally, weight_columns
from bitfold.outliers.measure import Outliers, measure
from bitfold.outliers.ways import WAYS, prepare
from bitfold.shards import CheckpointError
from command import call, call_json
from demo_outliers import DEMO, in_int8
from tiny import one_thread  # noqa: F401

THRESHOLD = 2.5  # reached by some columns of a tiny model, and not by others


# ---- one matrix ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 64.0], ids=["without outliers", "with outliers"])
def test_ways_are_those_of_the_papers(rng, way, scale):
    x = rng.standard_normal((20, 256)).astype(np.float32)
    w = (0.05 * rng.standard_normal((48, 256))).astype(np.float32)
    x[:, [3, 200]] *= scale
    w[:, [3, 200]] /= scale
    x[7] = 0  # a row without a step
    y = prepare(WAYS[way], torch.from_numpy(w), 6.0)(torch.from_numpy(x)).numpy()
    wanted = oracle_outliers.WAYS[way](x.astype(np.float64), w.astype(np.float64), 6.0)
    assert np.linalg.norm(y - wanted) <= 1e-4 * np.linalg.norm(wanted)
    assert (y[7] == 0).all()


def test_the_last_group_may_be_short(rng):
    x, w = rng.standard_normal((5, 300)), rng.standard_normal((4, 300))
    y = prepare(WAYS["int8-g128"], torch.from_numpy(w).float(), 6.0)(torch.from_numpy(x).float()).numpy()
    wanted = oracle_outliers.int8(x, w, 128)
    assert np.linalg.norm(y - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_features_are_counted(rng):
    calls = [rng.standard_normal((tokens, 12)) * np.linspace(0.5, 4, 12) for tokens in (30, 1, 17)]
    tally = Tally(12, 6.0)
    for x in calls:
        tally.add(torch.from_numpy(x))
    tally.add(torch.empty(0, 12))  # an expert to which nothing of a sequence goes
    found = tally.inputs(["a", "b"], stream=True)
    wanted = oracle_outliers.features(calls, 6.0)
    assert wanted
    assert {f.index for f in found.outliers} == set(wanted)
    for feature in found.outliers:
        for name, value in wanted[feature.index].items():
            assert getattr(feature, name) == pytest.approx(value, rel=1e-6), (feature.index, name)
    x = np.concatenate(calls)
    assert [f.peak for f in found.outliers] == sorted((f.peak for f in found.outliers), reverse=True)
    assert found.tokens == len(x)
    assert found.token_share == np.mean([(np.abs(row) >= 6).any() for row in x])
    assert found.sixteen == pytest.approx(np.mean([(np.abs(call) >= 6).any(0).mean() for call in calls]))
    assert found.peak == pytest.approx(np.abs(x).max())
    with pytest.raises(ValueError, match="never reaches a"):
        Tally(4, 6.0).inputs(["a"], stream=False)


def test_weights_have_outliers_of_their_own(rng):
    w = rng.standard_normal((300, 40)).astype(np.float32)
    w[5, 7], w[9, 30] = 100, -60
    found = weight_columns("w", torch.from_numpy(w).to(torch.bfloat16))
    rms = float(np.sqrt((w.astype(np.float64) ** 2).mean()))
    assert [c.index for c in found.outliers] == [7, 30]
    assert [c.peak for c in found.outliers] == pytest.approx([100 / rms, 60 / rms], rel=5e-3)
    assert found.peak == found.outliers[0].peak >= WEIGHT_THRESHOLD > found.median
    assert weight_columns("zero", torch.zeros(3, 4)).outliers == ()


# ---- a model ----


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(2, 250, (5, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(source, rows) -> Outliers:
    return measure(source, rows, threshold=THRESHOLD)


def seen_by_hooks(path: Path, rows: torch.Tensor) -> tuple[dict[str, list[np.ndarray]], torch.nn.Module]:
    """What each linear layer of the blocks multiplies, by transformers' own forward pass, a row of tokens at a time."""
    model = hf.load_causal_lm(path, dtype=torch.float32)
    seen: dict[str, list[np.ndarray]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name:
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0].double().numpy())
            )
    with torch.no_grad():
        for ids in rows:
            model(input_ids=ids[None], use_cache=False)
    return seen, model


def test_a_model_is_measured_as_its_own_forward_pass_and_numpy_say(source, rows, found):
    seen, model = seen_by_hooks(source, rows)
    assert {layer.name for layer in found.layers} == set(seen)
    assert sum(len(one.names) for one in found.inputs) == len(seen)
    hits = 0
    for layer in found.layers:
        calls = seen[layer.name]
        w = model.get_submodule(layer.name).weight.detach().double().numpy()
        assert layer.shape == w.shape
        wanted = oracle_outliers.losses(calls, w, THRESHOLD)
        for way, loss in layer.losses.items():
            assert loss == pytest.approx(wanted[way], rel=0.02), (layer.name, way)
        inputs = found.input_of(layer.name)
        features = oracle_outliers.features(calls, THRESHOLD)
        assert {f.index for f in inputs.outliers} == set(features)
        for feature in inputs.outliers:
            assert feature.token_share == pytest.approx(features[feature.index]["token_share"])
        hits += len(features)
        assert inputs.stream == (
            layer.name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        )
    assert hits
    assert found.unreached == ()


def test_channels_that_come_again(source, rows, found):
    norms = [one for one in found.inputs if one.stream]
    assert len(norms) == 6
    for channel in found.recurring:
        behind = [f for one in norms for f in one.outliers if f.index == channel.index]
        assert channel.norms == len(behind) > 0
        assert channel.share == len(behind) / 6
        assert channel.token_share == pytest.approx(np.mean([f.token_share for f in behind]))
        assert channel.is_systematic == (channel.share >= 0.25 and channel.token_share >= 0.06)


def test_bits_do_not_depend_on_threads(source, rows, found, threads):
    threads(3)
    assert measure(source, rows, threshold=THRESHOLD) == found


def test_nothing_is_computed_where_no_way_is_asked_for(source, rows, found):
    bare = measure(source, rows, threshold=THRESHOLD, ways={})
    assert bare.inputs == found.inputs
    assert all(layer.losses == {} for layer in bare.layers)


def test_experts_are_measured_on_their_own_tokens(tmp_path, rows):
    path = mixtures.write(tmp_path / "mixture", "mixtral")
    found = measure(path, rows, threshold=THRESHOLD)
    experts = [one for one in found.inputs if "experts" in one.names[0]]
    assert experts
    assert all(one.tokens <= rows.numel() for one in experts)
    gates = [one for one in experts if one.names[0].endswith("layers.0.mlp.experts.0.gate_up_proj")]
    assert (
        len(gates) + sum(name.endswith("layers.0.mlp.experts.0.gate_up_proj") for name in found.unreached)
        == 1
    )
    total = sum(one.tokens for one in experts if ".layers.0." in one.names[0] and "gate_up" in one.names[0])
    assert total % rows.numel() == 0  # each token goes to so many experts


# ---- bad input ----


@pytest.mark.parametrize("threshold", [0.0, -6.0, math.nan, math.inf])
def test_a_threshold_is_a_positive_number(source, rows, threshold):
    with pytest.raises(ValueError, match="threshold is"):
        measure(source, rows, threshold=threshold)


def test_rows_must_be_there(source, rows):
    for wrong in (rows[0], rows[:0], rows[:, :0]):
        with pytest.raises(ValueError, match="rows has shape"):
            measure(source, wrong)


def test_what_is_no_model_is_refused(tmp_path, rows):
    with pytest.raises(CheckpointError):
        measure(tmp_path, rows)


# ---- the command ----


def test_the_command(capsys, source, text):
    data = call_json(
        capsys, "outliers", source, "--text", text, "--tokens", 130, "--context", 32, "--threshold", 2.5
    )
    assert data["threshold"] == 2.5
    assert data["tokens"] == sum(one["tokens"] for one in data["inputs"][:1])
    assert len(data["layers"]) == 3 * 7
    assert set(data["layers"][0]["losses"]) == set(WAYS) == set(data["ways"])
    code, shown, _ = call(
        capsys, "outliers", source, "--text", text, "--tokens", 130, "--context", 32, "--threshold", 2.5
    )
    assert code == 0
    for name in (
        "layers.0.self_attn.{q,k,v}_proj",
        "model.layers.2.mlp.down_proj",
        "llm-int8-exact",
        "systematic",
    ):
        assert name in shown


def test_what_the_command_refuses(capsys, source, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for arguments, said in (
        (("--text", empty), "is empty"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
        (("--text", text, "--threshold", 0), "--threshold is 0"),
        (("--text", text, "--threshold", "nan"), "--threshold is nan"),
        (("--text", text, "--dtype", "int8"), "--dtype is 'int8'"),
    ):
        code, _, message = call(capsys, "outliers", source, *arguments)
        assert code == 2
        assert said in message
        assert message.count("\n") == 1


# ---- the demo model with outlier features ----


@pytest.fixture(scope="module")
def demo() -> tuple:
    """The demo model, the same with outlier features, and four windows of text."""
    base = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    script = demo_outliers.script()
    wide = copy.deepcopy(base)
    script.widen(wide, script.CHANNELS, script.FACTOR)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(text, hf.load_tokenizer(DEMO / "model"), context=512, max_tokens=2044, dtype=torch.float32)
    return base, wide, windows, script


@torch.no_grad()
def test_the_function_stays_to_the_bit(demo):
    base, wide, windows, script = demo
    silent = copy.deepcopy(wide)
    script.quiet(silent)
    for ids in windows.ids[:2]:
        logits = base(input_ids=ids[None]).logits
        assert torch.equal(wide(input_ids=ids[None]).logits, logits)
        assert torch.equal(silent(input_ids=ids[None]).logits, logits)
    widened = wide.model.layers[1].input_layernorm.weight / base.model.layers[1].input_layernorm.weight
    assert set(widened.nonzero()[:, 0][widened != 1].tolist()) == set(script.CHANNELS)
    odd = copy.deepcopy(base)
    script.widen(odd, script.CHANNELS, 70.0)  # any factor will do, up to rounding
    logits, ids = base(input_ids=windows.ids[0][None]).logits, windows.ids[0][None]
    assert torch.linalg.vector_norm(odd(input_ids=ids).logits - logits) < 1e-5 * torch.linalg.vector_norm(
        logits
    )


def test_int8_breaks_on_it_and_llm_int8_does_not(demo):
    base, wide, windows, _ = demo
    first = perplexity(base, windows).perplexity.value

    def lost(model: torch.nn.Module) -> float:
        return perplexity(model, windows).perplexity.value / first - 1

    assert lost(in_int8(base)) < 0.005  # nothing is wrong with int8 where there are no such features
    assert lost(in_int8(wide)) > 0.20
    rounded, exact = (lost(in_int8(wide, 6.0, exact)) for exact in (False, True))
    assert exact < 0.001 < rounded < 0.02


def test_its_features_are_found(demo, tmp_path):
    _, _, windows, script = demo
    found = measure(script.write(tmp_path / "wide", silent=True), torch.stack(windows.ids))
    systematic = {channel.index for channel in found.recurring if channel.is_systematic}
    assert systematic == set(script.CHANNELS)
    for layer in found.layers:
        if found.input_of(layer.name).stream:
            assert layer.losses["int8"] > 0.1 > 0.01 > layer.losses["llm-int8-exact"]
        else:  # without outliers LLM.int8() is int8
            assert layer.losses["llm-int8"] == layer.losses["llm-int8-exact"] == layer.losses["int8"]
    assert json.dumps([channel.peak for channel in found.recurring])
