"""`keep_outlier_layers`: which layers a recipe's rules pass over, against what each layer loses by itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import bitfold
import demo_outliers
import mixtures
import pytest
import tiny
import torch
from bitfold import hf, layout, recipes
from bitfold.allocation.recipe import to_toml
from bitfold.bounds import OutlierBound
from bitfold.calibration import data
from bitfold.evaluate import cut
from bitfold.explain.names import explain_name
from bitfold.outliers.keep import resolve
from bitfold.outliers.measure import measure
from bitfold.pipeline import REPORT_FILE
from bitfold.recipes import Recipe, Rule
from command import call, call_json
from demo_outliers import DEMO
from tiny import one_thread  # noqa: F401

FORMAT = "int8-channel-sfp32"
W8A8 = {"format": FORMAT, "activations": "int8"}


def rule(bound: OutlierBound | None = None, pattern: str = "*", **fields) -> Rule:
    return Rule(pattern, **{**W8A8, **fields}, keep_outlier_layers=bound)


@pytest.fixture(scope="module")
def rows(source, text) -> data.Calibration:
    return data.read(text, hf.load_tokenizer(source), samples=4, sequence_length=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return demo_outliers.script().write(tmp_path_factory.mktemp("wide") / "model", silent=True)


@pytest.fixture(scope="module")
def wide_rows() -> data.Calibration:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(text, hf.load_tokenizer(DEMO / "model"), context=256, max_tokens=510)
    return data.Calibration(torch.stack(windows.ids), "heldout.txt", 0)


def test_layers_above_the_bound_are_kept(wide, wide_rows):
    """In the model with outlier features layers behind norms lose 10% to 50% in int8, the others at most 2.5%."""
    resolved = resolve(Recipe("mine", "", (rule(OutlierBound(loss=0.05)),)), wide, wide_rows)
    behind = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    infos = layout.read_source(wide).infos
    expected = {name for name in infos if name.endswith(behind)}
    assert len(expected) == 20
    assert set(resolved.passed_over) == expected
    assigned = recipes.assign(resolved.recipe, infos)
    for name, info in infos.items():
        wanted = FORMAT if info.kind == "linear" and not info.is_head and name not in expected else None
        assert assigned[name].format == wanted, name
        assert str(assigned[name].activations) == ("int8" if wanted else "float")
    losses = {layer.name: layer.losses["int8"] for layer in measure(wide, wide_rows.ids).layers}
    assert {trial.module for trial in resolved.trials} == set(losses)
    for trial in resolved.trials:
        assert trial.loss == pytest.approx(losses[trial.module], rel=0.02)
        assert trial.is_passed_over == (trial.loss > 0.05)


def test_the_next_rule_takes_what_one_passes_over(wide, wide_rows):
    """Under LLM.int8() with exact outliers the same layers lose less than 1%, without them up to 15%."""
    llm = rule(OutlierBound(loss=0.02), activations="llm-int8-exact")
    resolved = resolve(Recipe("mine", "", (rule(OutlierBound(loss=0.05)), llm)), wide, wide_rows)
    second = [trial for trial in resolved.trials if trial.rule == 2]
    assert len(second) == 20
    exact = {layer.name: layer.losses["llm-int8-exact"] for layer in measure(wide, wide_rows.ids).layers}
    for trial in second:
        assert not trial.is_passed_over
        assert trial.loss == pytest.approx(exact[trial.module], rel=0.1)
    assigned = recipes.assign(resolved.recipe, layout.read_source(wide).infos)
    kinds = {str(item.activations) for item in assigned.values() if item.format is not None}
    assert kinds == {"int8", "llm-int8-exact"}
    assert max(layer.losses["llm-int8"] for layer in measure(wide, wide_rows.ids).layers) > 0.1
    plain = rule(OutlierBound(loss=0.02), activations="llm-int8")
    same = resolve(Recipe("mine", "", (rule(OutlierBound(loss=0.05)), plain)), wide, wide_rows)
    assert same.trials == resolved.trials  # a text gives them exact outliers


@torch.no_grad()
@pytest.mark.parametrize(
    "activations", ["llm-int8", "llm-int8-t1", "llm-int8-t1-exact", "llm-int8-t100-exact", "int8-static"]
)
def test_a_layer_is_measured_as_it_is_then_made(source, text, rows, tmp_path, activations):
    """The first block's first layers multiply the same in a quantized model: there the loss can be had from what is
    stored. -t1: more columns reach the threshold than are kept; -t100: none does."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    recipe = Recipe("mine", "", (rule(OutlierBound(loss=10), activations=activations),))
    resolved = resolve(recipe, source, rows)
    bitfold.quantize_calibrated(
        source, tmp_path / "out", resolved.recipe, text, samples=4, sequence_length=32
    )
    made = bitfold.load(tmp_path / "out", dtype=torch.float32)
    model = hf.load_causal_lm(source, dtype=torch.float32)
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for row in rows.ids:
        model(input_ids=row[None], use_cache=False)
    hook.remove()
    measured = {trial.module: trial.loss for trial in resolved.trials}
    for name in names:
        stored, layer = made.get_submodule(name), model.get_submodule(name)
        copied = 0 if stored.outlier_columns is None else len(stored.outlier_columns)
        reach = int((torch.cat(inputs).abs() >= 1).any(0).sum())
        if "-t1-" in activations or activations.endswith("-t1"):
            assert 0 < copied == layer.in_features // 32 < reach
        elif activations != "llm-int8":
            assert copied == 0
        change = energy = 0.0
        for x in inputs:
            y = torch.nn.functional.linear(x, layer.weight)
            change += float((stored(x) - layer(x)).double().square().sum())
            energy += float(y.double().square().sum())
        assert measured[name] == pytest.approx((change / energy) ** 0.5, rel=1e-3)


def test_inputs_without_a_step_are_refused_as_calibration_does(source, text, rows, tmp_path):
    """A norm of zeros: its layers have nothing to find a step by."""
    silent = tmp_path / "silent"
    shutil.copytree(source, silent)
    tiny.rewrite(silent, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].zero_())
    recipe = Recipe("mine", "", (rule(OutlierBound(loss=10), activations="int8-static"),))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs are zero throughout"
    ):
        resolve(recipe, silent, rows)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs are zero throughout"
    ):
        bitfold.quantize_calibrated(
            silent, tmp_path / "out", rule_alone(recipe), text, samples=4, sequence_length=32
        )


def rule_alone(recipe: Recipe) -> Recipe:
    """Without bounds."""
    return Recipe(
        "plain", "", tuple(dataclasses.replace(one, keep_outlier_layers=None) for one in recipe.rules)
    )


def test_a_share_of_columns_is_a_bound_too(wide, wide_rows):
    resolved = resolve(Recipe("mine", "", (rule(OutlierBound(share=0.01)),)), wide, wide_rows)
    assert len(resolved.passed_over) == 20  # 4 of 256 columns
    none = resolve(Recipe("mine", "", (rule(OutlierBound(share=0.05)),)), wide, wide_rows)
    assert none.passed_over == ()
    assert none.recipe.rules == (rule(),)


def test_all_or_nothing(source, rows):
    every = resolve(Recipe("mine", "", (rule(OutlierBound(loss=0)),)), source, rows)
    assert len(every.passed_over) == 21
    assert {r.format for r in every.recipe.rules} == {None}
    none = resolve(Recipe("mine", "", (rule(OutlierBound(loss=10)),)), source, rows)
    assert none.recipe.rules == (rule(),)


def test_static_steps_are_those_of_the_text(source, rows):
    """A step for all rows loses more than one for each; of weights alone nearly nothing is lost."""
    found = {}
    for activations in ("float", "int8", "int8-static"):
        recipe = Recipe("mine", "", (rule(OutlierBound(loss=1.0), activations=activations),))
        trials = resolve(recipe, source, rows).trials
        found[activations] = {trial.module: trial.loss for trial in trials}
    for module, loss in found["float"].items():
        assert loss < found["int8"][module] < found["int8-static"][module] < 0.1


def test_experts_go_together(tmp_path, rows):
    path = mixtures.write(tmp_path / "mixture", "mixtral")
    bound = OutlierBound(loss=0.0)
    recipe = Recipe("mine", "", (rule(bound, "*.experts.down_proj"), rule(pattern="*")))
    resolved = resolve(recipe, path, rows)
    stacks = [name for name in layout.read_source(path).infos if name.endswith("experts.down_proj")]
    assert stacks
    assert {trial.module for trial in resolved.trials} == set(stacks) == set(resolved.passed_over)
    assigned = recipes.assign(resolved.recipe, layout.read_source(path).infos)
    assert {assigned[name].format for name in stacks} == {FORMAT}  # by the rule behind it


# ---- recipes ----


def write(path: Path, *rules: str) -> Path:
    path.write_text("".join(f"[[rules]]\n{text}\n" for text in rules))
    return path


def test_toml(tmp_path):
    one = f'format = "{FORMAT}"\nactivations = "int8"\n'
    read = recipes.read(write(tmp_path / "a.toml", one + "keep_outlier_layers = 0.05"))
    assert read.rules == (rule(OutlierBound(loss=0.05)),)
    assert read.keeps_outlier_layers
    both = write(tmp_path / "b.toml", one + "keep_outlier_layers = { loss = 0.1, share = 0.02 }")
    assert recipes.read(both).rules == (rule(OutlierBound(0.1, 0.02)),)
    (tmp_path / "c.toml").write_text(to_toml(recipes.read(both)))
    assert recipes.read(tmp_path / "c.toml").rules == recipes.read(both).rules
    said = dict(explain_name(str(both))[0].facts)["rule"]
    assert "lose more than 0.1 of their output or have outliers in more than 0.02" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("-0.1", "loss is -0.1"),
        ("nan", "loss is nan"),
        ('"much"', "loss is 'much'"),
        ("true", "loss is True"),
        ("{}", "has no bound"),
        ("{ share = 1.5 }", "share is 1.5"),
        ("{ lose = 1 }", "unknown key 'lose'"),
    ],
)
def test_bounds_that_cannot_be(tmp_path, value, said):
    path = write(tmp_path / "a.toml", f'format = "int8"\nkeep_outlier_layers = {value}')
    with pytest.raises(ValueError, match="keep_outlier_layers") as raised:
        recipes.read(path)
    assert said in str(raised.value)


def test_what_is_kept_needs_no_bound():
    with pytest.raises(ValueError, match="keeps its modules anyway"):
        Rule("*", keep_outlier_layers=OutlierBound(loss=0.1))


def test_without_a_text_there_is_no_answer(source, tmp_path, rows):
    recipe = Recipe("mine", "", (rule(OutlierBound(loss=0.05)),))
    with pytest.raises(ValueError, match="--calibration FILE"):
        bitfold.quantize_checkpoint(source, tmp_path / "out", recipe)
    with pytest.raises(ValueError, match="--calibration FILE"):
        bitfold.plan_checkpoint(source, recipe)
    with pytest.raises(ValueError, match="nothing to resolve"):
        resolve("int8", source, rows)
    head = Recipe("mine", "", (rule(OutlierBound(loss=0.05), "lm_head"), rule(pattern="*")))
    with pytest.raises(ValueError, match="lm_head lies outside of the decoder blocks"):
        resolve(head, source, rows)
    typo = Recipe("mine", "", (rule(OutlierBound(loss=0.05), "*.q_prj"), rule(pattern="*")))
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        resolve(typo, source, rows)
    hidden = Recipe("mine", "", (rule(pattern="*"), rule(OutlierBound(loss=0.05), "*.q_proj")))
    with pytest.raises(ValueError, match="never wins"):
        resolve(hidden, source, rows)


# ---- the commands ----


def test_quantizing_with_a_text(capsys, tmp_path, wide):
    one = f'format = "{FORMAT}"\nactivations = "int8"\nkeep_outlier_layers = 0.05'
    recipe = write(tmp_path / "a.toml", one)
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000])
    options = ("--recipe", recipe, "--calibration", text, "--samples", 4, "--sequence-length", 128)
    out = tmp_path / "out"
    code, shown, error = call(capsys, "quantize", wide, out, *options)
    assert code == 0, error
    assert "20 of 28 layers are above the bound" in shown
    report = json.loads((out / REPORT_FILE).read_text())
    assert sum(layer["is_passed_over"] for layer in report["outliers"]["layers"]) == 20
    assert (out / "bitfold_calibration.json").exists()  # the passages that it was chosen by
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {name.split(".")[-1] for name in section["modules"]} == {"o_proj", "down_proj"}
    model = bitfold.load(out, dtype=torch.float32)
    windows = cut(text.read_text(), hf.load_tokenizer(wide), context=128, max_tokens=508, dtype=torch.float32)
    base = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    found = bitfold.compare(base, model, windows)
    assert abs(found.model.perplexity.value / found.base.perplexity.value - 1) < 0.005
    data = call_json(capsys, "quantize", wide, "--dry-run", *options)
    assert sum(module["format"] == FORMAT for module in data["modules"]) == 8
    behind = write(tmp_path / "b.toml", one, f'format = "{FORMAT}"\nactivations = "llm-int8"')
    found = call_json(capsys, "quantize", wide, tmp_path / "llm", "--recipe", behind, *options[2:])
    kept = {
        module["name"]: module["calibration"]["outliers"]
        for module in found["modules"]
        if module.get("calibration")
    }
    assert len(kept) == 20
    assert set(kept.values()) <= {4, 5}  # LLM.int8() gets the exact outliers that it was measured with
    code, _, error = call(capsys, "quantize", wide, tmp_path / "no", "--recipe", recipe)
    assert code == 2
    assert "add --calibration FILE" in error


def test_the_command_outliers_writes_plain_rules(capsys, tmp_path, source, text):
    recipe = write(tmp_path / "a.toml", f'format = "{FORMAT}"\nkeep_outlier_layers = 0')
    plain = tmp_path / "plain.toml"
    options = ("--text", text, "--tokens", 130, "--context", 32)
    data = call_json(capsys, "outliers", source, *options, "--recipe", recipe, "--save-recipe", plain)
    assert len(data["recipe"]["layers"]) == 21
    assert not recipes.read(plain).keeps_outlier_layers
    code, shown, _ = call(capsys, "outliers", source, *options, "--recipe", recipe)
    assert code == 0
    assert "21 of 21 layers" in shown
    for wrong in (
        ("--save-recipe", plain),
        ("--recipe", recipe, "--save-recipe", tmp_path / "no" / "x.toml"),
    ):
        code, _, error = call(capsys, "outliers", source, *options, *wrong)
        assert code == 2
        assert "--save-recipe is" in error
