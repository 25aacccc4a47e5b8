"""Quantizing by what layers multiply: the numbers against a plain loop over the whole model, the report, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import bitfold
import calibrated
import pytest
import tiny
import tiny_architectures
import torch
from bitfold import hf, quantize_calibrated
from bitfold.calibration import data, overlap
from bitfold.calibration import run as runs
from bitfold.evaluate import compare_all, cut, kl_gap
from bitfold.quantizers import gptq
from bitfold.recipes import Recipe, Rule
from bitfold.shards import CheckpointError
from calibrated import (
    BUNDLES,
    OPTIONS,
    RECIPE,
    check_nearly_the_same,
    contents,
    quantize_by_two_processes,
    quantize_with_kills,
)
from command import call, call_json
from tiny import one_thread  # noqa: F401
from torch import nn

ROOT = Path(__file__).parents[1]
GROUPS = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


@pytest.fixture(scope="module")
def whole(source, text, tmp_path_factory) -> Path:
    """The result of a run that nothing interrupts."""
    target = tmp_path_factory.mktemp("whole") / "q"
    quantize_calibrated(source, target, RECIPE, text, **OPTIONS)
    return target


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.calibration"


# ---- what comes out ----


class Stop(Exception):
    pass


def stop_at(name: str):
    def progress(what, done, total):
        if what == name:
            raise Stop

    return progress


@torch.no_grad()
def test_codes_are_those_of_gptq_with_hooks_in_the_whole_model(source, text, whole):
    """For each group of layers a forward pass of the whole model, in which all layers before it are those that came
    out, and a Hessian in float64. One code that differs makes others differ, so the groups aren't chained here."""
    ids = data.read(text, tiny.tokenizer(), **OPTIONS).ids
    model, found = hf.load_causal_lm(source, dtype=torch.float32), bitfold.load(whole, dtype=torch.float32)
    same = total = 0
    for layer, quantized in zip(model.model.layers, found.model.layers, strict=True):
        for group in GROUPS:
            xs = []
            hook = layer.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, args, xs=xs: xs.append(args[0])
            )
            model(input_ids=ids, use_cache=False)
            hook.remove()
            x = torch.cat(xs).flatten(0, 1).double()
            for name in group:
                expected = gptq.solve(
                    layer.get_submodule(name).weight.bfloat16(), x.t() @ x, "int4-g32"
                ).qtensor
                module = quantized.get_submodule(name)
                one, two = expected.unpack(), module.qtensor.unpack()
                assert torch.equal(one.scales, two.scales)
                same, total = same + int((one.codes == two.codes).sum()), total + one.codes.numel()
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, module)
    assert total == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert same / total > 0.999


def test_the_report_says_what_was_done_and_what_it_cost(source, text, whole):
    report = json.loads((whole / "bitfold_report.json").read_text())
    assert report["recipe"] == RECIPE
    assert len(report["modules"]) == 21
    for module in report["modules"]:
        found = module["calibration"]
        assert found["method"] == "gptq"
        assert 0 < found["output_error"] < found["rounding_error"] < 0.3
        assert found["damping"] == 0.01
        assert found["note"] == ""
        assert module["bits_per_weight"] == pytest.approx(4.5)
        assert module["bytes_before"] == 2 * module["shape"][0] * module["shape"][1]
    described = report["calibration"]
    assert described["sha256"] == data.read(text, tiny.tokenizer(), **OPTIONS).sha256
    assert (described["samples"], described["sequence_length"], described["seed"]) == (6, 32, 0)
    assert described["source"] == str(text)


def test_everything_else_is_as_plain_rounding_leaves_it(source, whole, tmp_path):
    bitfold.quantize_checkpoint(source, tmp_path / "plain", "int4-g32")
    plain, found = tiny.tensors_of(tmp_path / "plain"), tiny.tensors_of(whole)
    assert plain.keys() == found.keys()
    for name, tensor in plain.items():
        if name.endswith((".codes", ".scales")):
            assert found[name].shape == tensor.shape
        else:
            assert torch.equal(found[name], tensor), name
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "plain", whole)]
    sections = [config.pop("quantization_config") for config in configs]
    assert configs[0] == configs[1]
    assert sections[0]["modules"] == sections[1]["modules"]
    assert not work_of(whole).exists()


def test_the_measured_error_is_that_of_the_layer(source, text, whole):
    """Of the last layer of all, whose inputs the finished model itself makes."""
    ids = data.read(text, tiny.tokenizer(), **OPTIONS).ids
    model, base = bitfold.load(whole, dtype=torch.float32), hf.load_causal_lm(source, dtype=torch.float32)
    name = "model.layers.2.mlp.down_proj"
    xs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: xs.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    x = torch.cat(xs).flatten(0, 1).double()
    weight = base.get_submodule(name).weight.detach().double()
    plain = bitfold.encode(weight, "int4-g32").decode(torch.float64)
    quantized = model.get_submodule(name).qtensor.decode(torch.float64)
    report = json.loads((whole / "bitfold_report.json").read_text())
    found = next(module["calibration"] for module in report["modules"] if module["name"] == name)
    output = x @ weight.t()
    assert found["output_error"] == pytest.approx(
        float((x @ quantized.t() - output).norm() / output.norm()), rel=1e-3
    )
    assert found["rounding_error"] == pytest.approx(
        float((x @ plain.t() - output).norm() / output.norm()), rel=1e-3
    )


@pytest.mark.parametrize("name", [*tiny_architectures.MODELS])
def test_every_architecture_loads_and_is_nearer_than_plain_rounding(name, text, tmp_path):
    tiny_architectures.model(name, torch.bfloat16).save_pretrained(tmp_path / "m")
    small = tiny.tokenizer()
    small.save_pretrained(tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert fields["vocab_size"] == 64
    ids = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    summary = run_with_ids(tmp_path, ids, "gptq-int3-g16")
    for module in summary.modules:
        assert module.calibration.output_error < module.calibration.rounding_error, module
    model, base = bitfold.load(tmp_path / "q"), hf.load_causal_lm(tmp_path / "m")
    with torch.no_grad():
        error = tiny_architectures.relative_difference(
            model.float()(input_ids=ids).logits, base.float()(input_ids=ids).logits
        )
    assert error < 0.6


def run_with_ids(path: Path, ids: torch.Tensor, recipe, **options):
    """A run on given token ids, for models whose vocabulary no tokenizer has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.data, "read", lambda *args, **kwargs: data.Calibration(ids, "ids", 0))
        return quantize_calibrated(path / "m", path / "q", recipe, "ids", **options)


def test_a_recipe_may_mix_methods(source, text, tmp_path):
    options = gptq.GptqOptions(damping=0.05, order="none")
    recipe = Recipe(
        "mixed",
        "",
        (
            Rule("*.v_proj", "keep"),
            Rule("*.self_attn.*", "int8-channel"),
            Rule("*.down_proj", "int3-g32", "gptq", options),
            Rule("lm_head", "int8-channel", "gptq"),
            Rule("*", "int4-g32", "gptq"),
        ),
    )
    quantize_calibrated(source, tmp_path / "q", recipe, text, **OPTIONS)
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())
    found = {module["name"]: module for module in report["modules"]}
    assert "model.layers.0.self_attn.v_proj" not in found
    assert "calibration" not in found["model.layers.0.self_attn.q_proj"]
    assert found["model.layers.1.mlp.down_proj"]["calibration"]["damping"] == 0.05
    assert found["lm_head"]["calibration"]["method"] == "rtn"
    assert "outside" in found["lm_head"]["calibration"]["note"]
    model = bitfold.load(tmp_path / "q")
    assert model.model.layers[0].mlp.down_proj.format == "int3-g32"
    assert isinstance(model.model.layers[0].self_attn.v_proj, nn.Linear)
    expected = bitfold.encode(tiny.tensors_of(source)["lm_head.weight"], "int8-channel")
    assert torch.equal(model.lm_head.qtensor.planes["codes"], expected.planes["codes"])


def test_groups_along_the_order_are_stored_and_gone_on_with(source, text, tmp_path):
    rule = Rule("*", "int4-g16", "gptq", gptq.GptqOptions(order="groups"))
    arguments = (source, tmp_path / "q", Recipe("act-order", "", (rule,)), text)
    with pytest.raises(Stop):
        quantize_calibrated(*arguments, **OPTIONS, progress=stop_at("model.layers.1"))
    summary = quantize_calibrated(*arguments, **OPTIONS)
    quantize_calibrated(source, tmp_path / "whole", *arguments[2:], **OPTIONS)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")
    assert all(
        module.calibration.output_error < module.calibration.rounding_error for module in summary.modules
    )
    assert max(module.relative_rmse for module in summary.modules) < 0.5
    layer = bitfold.load(tmp_path / "q").model.layers[2].mlp.down_proj
    assert layer.g_idx is not None
    assert sorted(layer.g_idx.tolist()) == [i // 16 for i in range(128)]


def test_threads_change_no_byte(source, text, whole, tmp_path, threads):
    threads(3)
    quantize_calibrated(source, tmp_path / "q", RECIPE, text, **OPTIONS)
    assert contents(tmp_path / "q") == contents(whole)


def test_the_seed_and_the_text_change_the_codes(source, text, whole, tmp_path):
    quantize_calibrated(source, tmp_path / "q", RECIPE, text, **OPTIONS, seed=1)
    one, two = tiny.tensors_of(whole), tiny.tensors_of(tmp_path / "q")
    assert not torch.equal(one["model.layers.0.mlp.up_proj.codes"], two["model.layers.0.mlp.up_proj.codes"])


def test_progress_goes_on_to_the_end(source, text, tmp_path):
    seen = []
    quantize_calibrated(
        source, tmp_path / "q", RECIPE, text, **OPTIONS, progress=lambda *args: seen.append(args)
    )
    done = [row[1] for row in seen]
    assert done == sorted(done)
    assert {row[2] for row in seen} == {done[-1]}
    assert {"model.layers.2.mlp.down_proj", "model.layers.0.self_attn.q_proj"} <= {row[0] for row in seen}


# ---- stopped and gone on ----


@pytest.mark.parametrize("activations", ["ram", "disk"])
@pytest.mark.parametrize(
    "at", ["model.layers.0.mlp.up_proj", "model.layers.1", "model.layers.2.mlp.down_proj"]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(at, activations, source, text, whole, tmp_path):
    arguments = (source, tmp_path / "q", RECIPE, text)
    options = {**OPTIONS, "activations": activations}
    with pytest.raises(Stop):
        quantize_calibrated(*arguments, **options, progress=stop_at(at))
    assert not (tmp_path / "q").exists()
    reports = list(work_of(tmp_path / "q").glob("block-*.json"))
    assert len(reports) == int(at.split(".")[2]) + (at == "model.layers.1")
    seen = []
    quantize_calibrated(*arguments, **options, progress=lambda *args: seen.append(args[0]))
    finished = {f"model.layers.{i}" for i in range(len(reports))}
    assert not any(what.startswith(f"{name}.") for what in seen for name in finished)
    assert contents(tmp_path / "q") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("activations", ["ram", "disk"])
def test_a_block_that_was_rewritten_is_gone_on_from_as_it_is_stored(
    activations, source, text, tmp_path, threads
):
    """AWQ folds scales into norms, which are stored in 16 bits; and another number of threads goes on."""
    arguments = (source, tmp_path / "q", "awq-int4-g32", text)
    options = {**OPTIONS, "activations": activations}
    with pytest.raises(Stop):
        quantize_calibrated(*arguments, **options, progress=stop_at("model.layers.1"))
    threads(2)
    quantize_calibrated(*arguments, **options)
    quantize_calibrated(source, tmp_path / "whole", *arguments[2:], **options)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 5}, r"another number of samples \(6, now 5\)"),
        ({"sequence_length": 31}, r"another sequence length \(32, now 31\)"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"recipe": "gptq-int4-g16"}, "another recipe"),
        ({"dtype": torch.bfloat16}, r"another dtype \(torch.float32, now torch.bfloat16\)"),
        ({"text": 1}, "another calibration text"),
        ({"model": 1}, "another model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_of_something_else_is_refused_and_restart_starts_anew(changes, message, source, text, tmp_path):
    target = tmp_path / "q"
    with pytest.raises(Stop):
        quantize_calibrated(source, target, RECIPE, text, **OPTIONS, progress=stop_at("model.layers.0"))
    changes = dict(changes)
    recipe = changes.pop("recipe", RECIPE)
    if changes.pop("text", None):
        text = calibrated.write_text(tmp_path / "other.txt", seed=1)
    if changes.pop("model", None):
        source = calibrated.write_model(tmp_path / "other", seed=1)
    options = {**OPTIONS, **changes}
    with pytest.raises(CheckpointError, match=message) as error:
        quantize_calibrated(source, target, recipe, text, **options)
    assert "restart" in str(error.value)
    assert not target.exists()
    quantize_calibrated(source, target, recipe, text, **options, restart=True)
    quantize_calibrated(source, tmp_path / "anew", recipe, text, **options)
    assert contents(target) == contents(tmp_path / "anew")


def test_one_changed_weight_is_another_model(source, text, tmp_path):
    model = calibrated.write_model(tmp_path / "m")
    with pytest.raises(Stop):
        quantize_calibrated(
            model, tmp_path / "q", RECIPE, text, **OPTIONS, progress=stop_at("model.layers.0")
        )
    name = "model.layers.0.mlp.up_proj.weight"
    tiny.rewrite(model, lambda tensors: tensors[name].__setitem__((3, 5), 0.25))
    with pytest.raises(CheckpointError, match="another model"):
        quantize_calibrated(model, tmp_path / "q", RECIPE, text, **OPTIONS)


def test_the_work_folder_may_be_named_and_must_be_ours(source, text, whole, tmp_path):
    work, target = tmp_path / "work", tmp_path / "q"
    with pytest.raises(Stop):
        quantize_calibrated(
            source, target, RECIPE, text, **OPTIONS, work_dir=work, progress=stop_at("model.layers.1")
        )
    assert (work / "block-00001.json").exists()
    assert not work_of(target).exists()
    with (
        runs.Journal(work, json.loads((work / "fingerprint.json").read_text())),
        pytest.raises(CheckpointError, match="in use"),
    ):
        quantize_calibrated(source, target, RECIPE, text, **OPTIONS, work_dir=work)
    quantize_calibrated(source, target, RECIPE, text, **OPTIONS, work_dir=work)
    assert contents(target) == contents(whole)
    assert not work.exists()
    work.mkdir()
    for name in (
        "thesis.tex",
        "fingerprint.json",
    ):  # the second of another program, which has such a file too
        (work / name).write_text('{"of": "a finger"}')
        with pytest.raises(CheckpointError, match="other files"):
            quantize_calibrated(source, tmp_path / "q2", RECIPE, text, **OPTIONS, work_dir=work, restart=True)
    assert sorted(contents(work)) == ["fingerprint.json", "thesis.tex"]


def test_files_that_somebody_put_into_the_work_folder_stay(source, text, whole, tmp_path):
    work, target = tmp_path / "work", tmp_path / "q"
    for options in ({}, {"restart": True}):
        with pytest.raises(Stop):
            quantize_calibrated(
                source,
                target,
                RECIPE,
                text,
                **OPTIONS,
                work_dir=work,
                progress=stop_at("model.layers.1"),
                **options,
            )
        (work / "notes.txt").write_text("mine")
    quantize_calibrated(source, target, RECIPE, text, **OPTIONS, work_dir=work)
    assert contents(target) == contents(whole)
    assert contents(work) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("activations", ["ram", pytest.param("disk", marks=pytest.mark.slow)])
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(activations, source, text, whole, tmp_path):
    quantize_with_kills(source, tmp_path / "q", RECIPE, text, activations)
    assert contents(tmp_path / "q") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


# ---- the command line ----


def test_the_command_quantizes_and_eval_warns_of_the_same_text(source, text, whole, tmp_path, capsys):
    options = ("--recipe", RECIPE, "--calibration", text, "--samples", 6, "--sequence-length", 32)
    found = call_json(capsys, "quantize", source, tmp_path / "q", *options)
    assert contents(tmp_path / "q") == contents(whole)
    assert found["modules"][0]["calibration"]["method"] == "gptq"
    code, out, _ = call(capsys, "quantize", source, tmp_path / "q", *options, "--force", "--seed", 3)
    assert code == 0
    assert "output error" in out
    evaluate = ("eval", whole, "--context", 64, "--text")
    code, out, err = call(capsys, *evaluate, text, "--json")
    assert code == 0
    share = json.loads(out)["calibration_overlap"]
    assert share > overlap.NOTABLE
    assert f"was calibrated on {share:.0%} of the passages of this text" in err
    other = calibrated.write_text(tmp_path / "other.txt", words=300, seed=5)
    code, out, err = call(capsys, *evaluate, other, "--json")
    assert code == 0
    assert json.loads(out)["calibration_overlap"] == 0
    assert "calibrated" not in err


# ---- several processes ----


@pytest.mark.parametrize("recipe", [RECIPE, "awq-int4-g32"])
def test_two_processes_make_what_one_makes(recipe, source, text, tmp_path):
    printed = quantize_by_two_processes(source, tmp_path / "two", recipe, text, "--activations", "disk")
    assert printed.count("parameters quantized") == 1
    one = quantize_calibrated(source, tmp_path / "one", recipe, text, **BUNDLES)
    check_nearly_the_same(tmp_path / "one", tmp_path / "two", one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


# ---- quality ----


def test_on_the_demo_model_the_divergence_is_smaller_than_that_of_rounding(tmp_path):
    demo = ROOT / "examples" / "demo"
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "first.txt").write_text(text[:60_000])
    base = hf.load_causal_lm(demo / "model", dtype=torch.float32)
    options = {"samples": 16, "sequence_length": 256}
    quantize_calibrated(
        demo / "model", tmp_path / "gptq", "gptq-int4-g128", tmp_path / "first.txt", **options
    )
    bitfold.quantize_checkpoint(demo / "model", tmp_path / "rtn", "int4-g128")
    models = {name: bitfold.load(tmp_path / name, dtype=torch.float32) for name in ("gptq", "rtn")}
    windows = cut(text[100_000:], hf.load_tokenizer(demo / "model"), context=512, max_tokens=8176)
    measured = compare_all(base, models, windows)
    gap = kl_gap(measured["gptq"], measured["rtn"])
    assert gap.value > 3 * gap.error > 0, gap
    assert overlap.share_seen(tmp_path / "gptq", windows.ids) < overlap.NOTABLE
