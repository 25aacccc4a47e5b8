"""The measured cost of the presets: complete, shown as it is stored, and what measuring gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold import RECIPES, hf
from bitfold.activations import COPIED
from bitfold.cli.app import run
from bitfold.evaluate import compare, cut, default_context
from bitfold.figures import demo_figures
from tiny import one_thread  # noqa: F401

DEMO = Path(__file__).parents[1] / "examples" / "demo"


def test_every_preset_was_measured():
    figures = demo_figures()
    assert set(figures.recipes) == set(RECIPES)
    assert figures.commit != "unknown"
    assert figures.machine
    assert figures.protocol.startswith("8192 ")


def test_sizes_are_those_of_the_plan():
    """Copies of outlier columns come on top: how many, a text says."""
    for name, figure in demo_figures().recipes.items():
        plan = bitfold.plan_checkpoint(DEMO / "model", name)
        planned = (plan.nbytes, plan.quantized_bits_per_weight)
        if name != "llm-int8-exact":
            assert planned == (figure.bytes, figure.bits_per_weight)
            continue
        weights = sum(entry.parameters for entry in plan.entries if entry.quantized)
        copies = figure.bytes - plan.nbytes
        assert 0 < copies <= weights / COPIED * 2 * 1.05  # of 16 bits, and a number for each column
        assert figure.bits_per_weight - plan.quantized_bits_per_weight == pytest.approx(8 * copies / weights)


def test_the_file_is_what_measuring_gives():
    """One preset, the way the demo does it; instruction sets differ in the last digits."""
    base = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    model = copy.deepcopy(base)
    bitfold.quantize(model, "int4-g128", quiet=True)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = hf.load_tokenizer(DEMO / "model")
    windows = cut(text, tokenizer, context=default_context(base), dtype=torch.float32, max_tokens=8192)
    figures = demo_figures()
    assert str(windows.protocol) == figures.protocol
    measured = compare(base, model, windows)
    figure = figures.recipes["int4-g128"]
    assert measured.mean_kl.value == pytest.approx(figure.mean_kl, rel=0.01)
    assert measured.mean_kl.error == pytest.approx(figure.mean_kl_error, rel=0.05)
    assert measured.base.perplexity.value == pytest.approx(figures.base_perplexity, rel=1e-4)


def test_recipes_command(capsys):
    assert run(["recipes", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["recipes"]) == list(RECIPES)
    assert data["recipes"]["nf4"]["demo"]["mean_kl"] == demo_figures().recipes["nf4"].mean_kl
    assert data["recipes"]["int4-mixed"]["rules"][1] == {
        "pattern": "*",
        "format": "int4-g128",
        "method": "rtn",
        "options": None,
        "activations": {"kind": "float", "threshold": 0.0, "per_row": False, "exact_outliers": False},
        "keep_outlier_layers": None,
    }
    assert data["measured"]["commit"] == demo_figures().commit
    assert run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name, recipe in RECIPES.items():
        row = next(line for line in out.splitlines() if line.startswith(name + " "))
        assert f"{1e3 * demo_figures().recipes[name].mean_kl:.3f}" in row
        assert recipe.use
        assert recipe.use.split()[0] in out


def test_a_preset_without_figures_says_so(capsys, monkeypatch):
    new = bitfold.Recipe("new", "a new one", (bitfold.Rule("*", "int4"),), "to be measured")
    monkeypatch.setitem(RECIPES, "new", new)
    assert run(["recipes"]) == 0
    assert "not measured" in capsys.readouterr().out
