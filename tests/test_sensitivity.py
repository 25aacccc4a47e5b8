"""One weight at a time: against swapping it in a whole model, the zero control, additivity, files, threads."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import bitfold
import calibrated
import pytest
import tiny
import tiny_architectures
import torch
from bitfold import evaluate, hf
from bitfold.allocation.allocate import Target, allocate
from bitfold.nn import QuantModule
from bitfold.recipes import Recipe, Rule
from bitfold.sensitivity import candidates, ground, measure, result
from bitfold.sensitivity.ground import Texts
from bitfold.sensitivity.walk import walk
from bitfold.shards import CheckpointError
from command import call, call_json
from tiny import one_thread  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

FORMATS = ("int4-g32", "gptq-int3-g32", "int2-g32")
CALIBRATION = {"samples": 6, "sequence_length": 32}
EMBEDDING = "model.embed_tokens"
HIDDEN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return calibrated.write_model(tmp_path_factory.mktemp("sensitivity") / "model", tied=True)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    return calibrated.write_text(tmp_path_factory.mktemp("text") / "calibration.txt", seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return calibrated.write_text(tmp_path_factory.mktemp("text") / "text.txt", words=120).read_text()


@pytest.fixture(scope="module")
def texts(text, calibration) -> Texts:
    return Texts(text, tokens=330, context=32, calibration=calibration, **CALIBRATION)


@pytest.fixture(scope="module")
def found(source, texts) -> result.Sensitivity:
    return measure.measure(source, texts, FORMATS, include=["*.embed_tokens"])


# ---- the numbers ----


def alone(source: Path, text: str, name: str, format: str) -> evaluate.Comparison:
    """A weight of the whole model swapped, by transformers' own forward pass."""
    base = hf.load_causal_lm(source, dtype=torch.float32)
    windows = evaluate.cut(text, hf.load_tokenizer(source), context=32, dtype=torch.float32, max_tokens=330)
    model = copy.deepcopy(base)
    rules = (Rule(name, format), *([Rule("lm_head", format)] if name == EMBEDDING else []))
    bitfold.quantize(model, Recipe("one", "", rules), quiet=True)
    return evaluate.compare(base, model, windows)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", HIDDEN, EMBEDDING])
def test_kl_is_that_of_this_weight_alone(source, text, found, name):
    entry = found.find(name, "int4-g32")
    expected = alone(source, text, name, "int4-g32")
    assert found.protocol == expected.protocol
    assert found.window_tokens == expected.window_tokens
    assert entry.window_kl == pytest.approx(expected.window_kl, rel=1e-3, abs=1e-7)
    assert found.kl(entry).value == pytest.approx(expected.mean_kl.value, rel=1e-3)
    assert found.kl(entry).error == pytest.approx(expected.mean_kl.error, rel=1e-2)


def test_the_unchanged_model_is_at_zero_exactly_from_every_block_on(source, texts, found):
    assert found.zero == 0.0
    with ground.prepare(source, texts) as prepared:
        starts = set()
        for stop in walk(prepared, {}, alone=True):
            starts.add(stop.start)
            assert set(prepared.probe.divergence(stop.start, stop.inputs)) == {0.0}
            assert set(stop.divergence(None)) == {0.0}
        assert starts == {0, 1, 2}


def test_a_model_that_is_no_chain_fails_the_control(source, texts, monkeypatch):
    first = ground.Probe.divergence
    monkeypatch.setattr(
        ground.Probe,
        "divergence",
        lambda self, start=0, inputs=None: first(self, start, None if inputs is None else inputs + 1e-3),
    )
    with pytest.raises(CheckpointError, match="away from itself"):
        measure.measure(source, texts, ["int4-g32"])


def test_output_errors_are_those_of_the_layer(source, text, found):
    model = hf.load_causal_lm(source, dtype=torch.float32)
    windows = evaluate.cut(text, hf.load_tokenizer(source), context=32, max_tokens=330)
    layer = model.get_submodule(HIDDEN)
    inputs = []
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
    with torch.no_grad():
        for ids in windows.ids:
            model(input_ids=ids[None], use_cache=False)
        x = torch.cat(inputs).double()
        stored = layer.weight.to(torch.bfloat16)
        change = bitfold.encode(stored, "int4-g32").decode(torch.float32).double() - layer.weight.double()
        norms = change.norm(), layer.weight.double().norm()
        expected = (x @ change.T).norm() / (x @ layer.weight.double().T).norm()
    entry = found.find(HIDDEN, "int4-g32")
    assert entry.output_error == pytest.approx(float(expected), rel=1e-4)
    assert entry.weight_error == pytest.approx(float(norms[0] / norms[1]), rel=1e-6)
    assert found.find(EMBEDDING, "int4-g32").output_error is None


def test_bytes_are_those_of_the_planes(found):
    for entry in found.entries:
        n, k = found.modules[entry.module]["shape"]
        format = candidates.read(entry.candidate).format
        assert entry.nbytes == bitfold.encode(torch.ones(n, k), format).nbytes


def test_calibrating_helps_the_output(found):
    plain, solved = (measure_of(found, candidate) for candidate in ("int2-g32", "gptq-int3-g32"))
    assert solved < plain


def measure_of(found, candidate: str) -> float:
    return sum(
        e.output_error for e in found.entries if e.candidate == candidate and e.output_error is not None
    )


def test_embeddings_take_part_only_when_they_are_named_and_are_rounded_plainly(source, texts, found):
    names = {entry.candidate for entry in found.entries if entry.module == EMBEDDING}
    assert names == {"int4-g32", "int3-g32", "int2-g32"}
    assert found.modules[EMBEDDING]["names"] == (EMBEDDING, "lm_head")
    with ground.prepare(source, texts) as prepared:
        assert EMBEDDING not in {part.name for part in prepared.parts}


def test_an_untied_head_runs_nothing_but_itself(tmp_path, text):
    model = calibrated.write_model(tmp_path / "m", layers=1)
    texts = Texts(text, tokens=100, context=32)
    both = measure.measure(model, texts, ["int4-g32"], include=["lm_head", "*.embed_tokens"])
    assert set(both.modules) >= {"lm_head", EMBEDDING}
    for name in ("lm_head", EMBEDDING):
        base = hf.load_causal_lm(model, dtype=torch.float32)
        windows = evaluate.cut(text, hf.load_tokenizer(model), context=32, max_tokens=100)
        other = copy.deepcopy(base)
        bitfold.quantize(other, Recipe("one", "", (Rule(name, "int4-g32"),)), quiet=True)
        expected = evaluate.compare(base, other, windows).window_kl
        assert both.find(name, "int4-g32").window_kl == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("columns", [64, 96, 256, 768, 11008])
@pytest.mark.parametrize("calibrates", [False, True])
def test_default_candidates_fit_whatever_the_columns_are(columns, calibrates):
    part = candidates.Part(("layer",), (32, columns), 64 * columns, 0, False)
    found = candidates.default(part, calibrates)
    assert len(found) >= 7
    bits = [8 * part.nbytes(candidate) / part.weights for candidate in found]
    assert min(bits) < 3.1 < 4 < 5 < max(bits) < 8.6
    for candidate in found:
        bitfold.encode(torch.randn(32, columns), candidate.format)
    assert any(candidate.method == "gptq" for candidate in found) == calibrates
    outside = candidates.Part(("layer",), (32, columns), 64 * columns, None, True)
    assert {candidate.method for candidate in candidates.default(outside, calibrates)} == {"rtn"}


SMALL = {"vocab_size": tiny.VOCAB, "num_hidden_layers": 2}
MIXTURES = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "qwen3_moe"])
def test_other_architectures_are_zero_too_and_their_budgets_are_kept(name, text, calibration, tmp_path):
    """Sliding windows, fused layers; stacks of experts are kept, and a rule says so."""
    torch.manual_seed(0)
    kind = tiny_architectures.MODELS.get(name, {"head_dim": 12, **MIXTURES})
    config = AutoConfig.for_model(name, **{**tiny_architectures._SIZES, **kind, **SMALL})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    texts = Texts(text, tokens=100, context=32, calibration=calibration, **CALIBRATION)
    found = measure.measure(tmp_path / "m", texts, ["int4-g16", "gptq-int4-g16"])
    assert found.zero == 0.0
    assert all(found.kl(entry).value > 0 for entry in found.entries)
    pytest.importorskip("scipy", reason="scipy is not installed")
    outcome = allocate(tmp_path / "m", Target(bits=6), texts, sensitivity=found, rounds=0)
    assert outcome.allocation.nbytes <= outcome.allocation.limit.nbytes
    experts = {rule.pattern: rule.format for rule in outcome.recipe.rules if "experts" in rule.pattern}
    wanted = {f"model.layers.*.mlp.experts.{leaf}": None for leaf in ("gate_up_proj", "down_proj")}
    assert experts == (wanted if "moe" in name else {})


# ---- together ----


def test_all_at_once_is_what_quantizing_makes(source, texts, calibration, tmp_path):
    """To the byte, calibrated as it is: each block after those before it have been quantized."""
    bitfold.quantize_calibrated(source, tmp_path / "q", "gptq-int3-g32", calibration, **CALIBRATION)
    stored = bitfold.load(tmp_path / "q", dtype=torch.float32)
    with ground.prepare(source, texts) as prepared:
        assignment = {part.name: candidates.read("gptq-int3-g32") for part in prepared.parts}
        made = ground.build(prepared, assignment)
    assert set(made) == {name for name, m in stored.named_modules() if isinstance(m, QuantModule)}
    for name, module in made.items():
        for plane, values in module.qtensor.planes.items():
            assert torch.equal(values, stored.get_submodule(name).qtensor.planes[plane]), name


def test_additivity(source, text, found):
    assert [one.candidate for one in found.additivity] == list(FORMATS)
    one = found.additivity[0]
    base = hf.load_causal_lm(source, dtype=torch.float32)
    windows = evaluate.cut(text, hf.load_tokenizer(source), context=32, dtype=torch.float32, max_tokens=330)
    rules = (Rule(EMBEDDING, "int4-g32"), Rule("lm_head", "int4-g32"), Rule("*", "int4-g32"))
    model = copy.deepcopy(base)
    bitfold.quantize(model, Recipe("all", "", rules), quiet=True)
    assert one.together.value == pytest.approx(evaluate.compare(base, model, windows).mean_kl.value, rel=1e-3)
    added = sum(found.kl(found.find(name, "int4-g32")).value for name in found.modules)
    assert one.added == pytest.approx(added)
    assert one.ratio == pytest.approx(one.together.value / added)


# ---- the same again ----


def test_threads_change_nothing(source, texts, found):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = measure.measure(source, texts, FORMATS, include=["*.embed_tokens"])
    finally:
        torch.set_num_threads(before)
    assert again == found


def test_files_there_and_back(found, tmp_path):
    path = tmp_path / "found.json"
    result.write(path, found)
    again = result.read(path)
    assert json.loads(json.dumps(dataclasses.asdict(again))) == json.loads(
        json.dumps(dataclasses.asdict(found))
    )
    assert again.find(HIDDEN, "int4-g32") == found.find(HIDDEN, "int4-g32")


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(source, texts, found, tmp_path, monkeypatch):
    path = tmp_path / "found.json"

    def stop(what, done, total):
        if what.startswith("model.layers.2.self_attn.o_proj"):
            raise Stop

    arguments = {"include": ["*.embed_tokens"], "output": path}
    with pytest.raises(Stop):
        measure.measure(source, texts, FORMATS, **arguments, progress=stop)
    part = result.read(path)
    assert not part.finished
    assert {entry.module.split(".")[2] for entry in part.entries} == {"0", "1"}
    measured = []
    real = measure.measure_one
    monkeypatch.setattr(
        measure, "measure_one", lambda at, candidate: (measured.append(at.part.name), real(at, candidate))[1]
    )
    assert measure.measure(source, texts, FORMATS, **arguments) == found
    assert {name.split(".")[2] for name in measured if "layers" in name} == {"2"}
    # Further formats are added to what is there.
    measured.clear()
    more = measure.measure(source, texts, [*FORMATS, "int8"], **arguments)
    assert len(measured) == len(found.modules)
    assert more.entries[: len(found.entries)] == found.entries


def test_progress_comes_to_its_end(source, texts):
    told = []
    measure.measure(source, texts, ["int4-g32"], progress=lambda *now: told.append(now))
    done = [now[1] for now in told]
    assert done == sorted(done)
    assert 0 < done[-1] < told[-1][2]
    assert len({now[2] for now in told}) == 1


# ---- the command ----


@pytest.fixture
def files(source, text, tmp_path) -> dict[str, Path]:
    (tmp_path / "text.txt").write_text(text)
    return {"model": source, "text": tmp_path / "text.txt", "found": tmp_path / "found.json"}


OPTIONS = ("--tokens", 100, "--context", 32, "--formats", "int4-g32,int2-g32")


def test_the_command(capsys, files):
    code, out, err = call(
        capsys, "sensitivity", files["model"], "--text", files["text"], "-o", files["found"], *OPTIONS
    )
    assert code == 0, err
    assert "from every block on: 0\n" in out
    row = next(line for line in out.splitlines() if line.startswith(HIDDEN))
    assert row.count("%") == 2
    last = next(line for line in out.splitlines() if line.startswith("int2-g32 "))
    assert len(last.split()) == 6
    assert result.read(files["found"]).finished


def test_the_command_as_json(capsys, files):
    data = call_json(capsys, "sensitivity", files["model"], "--text", files["text"], *OPTIONS)
    assert data["zero"] == 0
    assert len(data["entries"]) == 2 * len(data["modules"])
    assert data["entries"][0]["kl"]["value"] > 0
    assert data["additivity"][0]["ratio"] > 0


def test_the_same_text_twice_is_warned_of(capsys, files):
    options = ("--tokens", 300, "--context", 32, "--formats", "gptq-int4-g32", "--no-additivity")
    calibrate = ("--calibration", files["text"], "--samples", 6, "--sequence-length", 32)
    code, _, err = call(capsys, "sensitivity", files["model"], "--text", files["text"], *options, *calibrate)
    assert code == 0
    assert "calibration text too" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--formats", "awq-int4-g32"], "by awq, which changes several layers"),
        (["--formats", "gptq-int4-g32"], "needs a text to calibrate on"),
        (["--formats", "int4-mixed"], "several formats"),
        (["--formats", "int5"], "int5"),
        (["--formats", "recipe.toml"], "is a file"),
        (["--formats", "q4_k"], "none of the candidates fits"),
        (["--include", "lm_hed"], "names no module"),
        (["--tokens", "7"], "fewer than a window"),
        (["--dtype", ""], "--dtype is empty"),
        (["-o", "/nowhere/found.json"], "doesn't exist"),
    ],
)
def test_bad_input_is_one_sentence(capsys, files, arguments, words):
    code, out, err = call(
        capsys, "sensitivity", files["model"], "--text", files["text"], "--context", 32, *arguments
    )
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_files_of_something_else_are_refused(capsys, files, tmp_path):
    command = ("sensitivity", files["model"], "--text", files["text"], "-o", files["found"], *OPTIONS)
    assert call(capsys, *command)[0] == 0
    other = calibrated.write_model(tmp_path / "other", tied=True, seed=5)
    code, _, err = call(capsys, command[0], other, *command[2:])
    assert (code, "measured with another model" in err) == (2, True)
    code, _, err = call(capsys, *command, "--context", 40)
    assert (code, "another length of windows" in err) == (2, True)
    assert call(capsys, *command, "--context", 40, "--restart")[0] == 0
    files["found"].write_text("{}")
    code, _, err = call(capsys, *command)
    assert (code, "no sensitivity file" in err) == (2, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data: data["entries"][1].update(module="x"),
            r"entries\[1\].module is 'x'; it must be one of",
        ),
        (lambda data: data["entries"][0]["window_kl"].pop(), r"entries\[0\].window_kl is .* numbers"),
        (lambda data: data["protocol"].pop("bos"), "protocol.bos is missing; it must be true or false"),
        (
            lambda data: data["additivity"][0]["together"].update(value="x"),
            r"together.value is 'x'; .* a number",
        ),
        (
            lambda data: next(iter(data["modules"].values())).update(shape=[0, 3]),
            r"shape is \[0, 3\]; it must be",
        ),
        (lambda data: data["window_tokens"].append(0.5), "window_tokens is .* whole numbers from 1"),
    ],
)
def test_damaged_files_are_refused(found, tmp_path, change, words):
    path = tmp_path / "found.json"
    result.write(path, found)
    data = json.loads(path.read_text())
    assert result.read(path).entries == found.entries
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=words):
        result.read(path)
