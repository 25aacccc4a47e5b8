"""`bitfold quantize --target-bpw` and `--target-size`: within the budget to the byte, what was predicted beside what
was measured, a recipe that makes the same again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import bitfold
import calibrated
import pytest
import torch
from bitfold import budget, evaluate, hf, layout, recipes
from bitfold.allocation.allocate import Target, allocate
from bitfold.allocation.choose import allowed_of, choose, limit_of, options_of
from bitfold.allocation.rounds import neighbours
from bitfold.allocation.solver import Option
from bitfold.calibration import overlap
from bitfold.sensitivity import measure, result
from bitfold.sensitivity.ground import Texts
from bitfold.shards import CheckpointError
from command import call, call_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import one_thread  # noqa: F401

pytest.importorskip("scipy", reason="scipy is not installed")

FORMATS = ("int2-g32", "int3-g32", "gptq-int3-g32", "int4-g32", "int8")
CALIBRATION = {"samples": 6, "sequence_length": 32}
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model, text.txt, calibration.txt, found.json: the measurements of all weights, the embedding too."""
    folder = tmp_path_factory.mktemp("allocation")
    calibrated.write_model(folder / "model", layers=2, tied=True)
    calibrated.write_text(folder / "text.txt", words=120)
    calibrated.write_text(folder / "calibration.txt", seed=1)
    measure.measure(
        folder / "model", texts(folder), FORMATS, include=["*.embed_tokens"], output=folder / "found.json"
    )
    return folder


def texts(folder: Path, calibration: bool = True) -> Texts:
    text = (folder / "text.txt").read_text()
    return Texts(text, 330, 32, folder / "calibration.txt" if calibration else "", **CALIBRATION)


@pytest.fixture(scope="module")
def source(folder) -> layout.Source:
    return layout.read_source(folder / "model")


@pytest.fixture(scope="module")
def found(folder) -> result.Sensitivity:
    return result.read(folder / "found.json")


# ---- choosing ----


@given(share=st.floats(0, 1), plain=st.booleans())
@settings(max_examples=30, deadline=None)
def test_never_over_the_budget_and_better_with_more_room(source, found, share, plain):
    allowed = allowed_of(found, ["int2-g32", "int4-g32", "int8"] if plain else [])
    options = options_of(found, allowed)
    least = sum(min(o.nbytes for o in one.values()) for one in options.values())
    most = sum(one["kept_bytes"] for one in found.modules.values())
    room = least + int(share * (most - 1 - least))
    fixed = sum(t.nbytes for t in source.stored.values()) - most
    limit = limit_of(source, found, allowed, nbytes=fixed + room)
    choice = choose(found, limit, allowed)
    assert choice.nbytes <= limit.nbytes == fixed + room
    assert choice.nbytes == fixed + sum(options[n][c].nbytes for n, c in choice.candidates.items())
    costs = math.fsum(options[n][c].cost for n, c in choice.candidates.items())
    assert choice.predicted.value == pytest.approx(costs, rel=1e-9)
    if room > least + 4000:
        tighter = choose(found, limit_of(source, found, allowed, nbytes=fixed + room - 4000), allowed)
        assert tighter.predicted.value >= choice.predicted.value


def test_bits_are_those_of_the_weights_that_take_part(source, found):
    weights = sum(math.prod(module["shape"]) for module in found.modules.values())
    limit = limit_of(source, found, found.candidates, bits=4.25)
    assert limit.room == math.floor(4.25 * weights / 8)
    choice = choose(found, limit, found.candidates)
    assert 8 * (choice.nbytes - limit.fixed) / weights <= 4.25


def test_embeddings_are_kept_unless_they_are_asked_for(folder):
    target = Target(bits=4.5)
    kept = allocate(folder / "model", target, Texts(""), sensitivity=folder / "found.json")
    assert EMBEDDING not in kept.allocation.candidates
    assert all(rule.pattern not in (EMBEDDING, "lm_head") for rule in kept.recipe.rules)
    asked = allocate(
        folder / "model", target, Texts(""), sensitivity=folder / "found.json", include=["*.embed_tokens"]
    )
    assert EMBEDDING in asked.allocation.candidates
    model = layout.read_source(folder / "model")
    given = recipes.assign(asked.recipe, model.infos)
    assert given[EMBEDDING].format == given["lm_head"].format
    assert not asked.rounds
    assert asked.measured is None


def test_without_a_calibration_text_everything_is_rounded_plainly(folder):
    outcome = allocate(folder / "model", Target(bits=3.6), Texts(""), sensitivity=folder / "found.json")
    assert not outcome.needs_calibration
    assert not any("gptq" in candidate for candidate in outcome.allocation.candidates.values())


def test_a_round_measures_the_whole_model_and_keeps_the_better_choice(folder, found):
    told = []
    outcome = allocate(
        folder / "model", Target(bits=3.6), texts(folder), sensitivity=found, rounds=2, told=told.append
    )
    assert list(outcome.rounds) == told
    assert outcome.rounds[0].number == 0
    assert outcome.measured.value == min(one.measured.value for one in outcome.rounds)
    assert all(one.allocation.nbytes <= one.allocation.limit.nbytes for one in outcome.rounds)
    assert outcome.allocation.nbytes == budget.plan_checkpoint(folder / "model", outcome.recipe).nbytes
    again = allocate(folder / "model", Target(bits=3.6), texts(folder), sensitivity=found, rounds=2)
    assert again.rounds == outcome.rounds
    assert again.recipe == outcome.recipe


def test_neighbours():
    options = {
        "a": Option(1, 9.0), "b": Option(2, 5.0), "dear": Option(3, 6.0), "c": Option(4, 3.0), "d": Option(5, 2.0),
        "keep": Option(6, 0.0),
    }  # fmt: skip
    assert neighbours(options, "c") == ["a", "b", "c", "d", "keep"]
    assert neighbours(options, "a") == ["a", "b", "c"]
    assert neighbours(options, "keep", 1) == ["d", "keep"]
    assert neighbours(options, "dear", 1) == ["b", "dear", "c"]


# ---- the command ----


def command(folder: Path, *more: object) -> tuple[object, ...]:
    return ("quantize", folder / "model", *more)


CALIBRATE = ("--samples", 6, "--sequence-length", 32)
TEXT = ("--tokens", 330, "--window", 32)


def test_what_is_measured_is_what_the_checkpoint_does(capsys, folder, tmp_path):
    """Calibrated candidates and all: predicted, measured, stored, and measured again by `bitfold eval`'s means."""
    data = call_json(
        capsys,
        *command(folder, tmp_path / "q", "--target-bpw", 3.6, "--sensitivity", folder / "found.json"),
        *("--text", folder / "text.txt", *TEXT, "--calibration", folder / "calibration.txt", *CALIBRATE),
        *("--save-recipe", tmp_path / "mine.toml"),
    )
    choice = data["allocation"]
    assert data["bytes_after"] == choice["bytes"] <= choice["bytes_at_most"]
    assert any("gptq" in candidate for candidate in choice["candidates"].values())
    noted = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())
    assert noted["allocation"] == choice
    base = hf.load_causal_lm(folder / "model", dtype=torch.float32)
    windows = evaluate.cut(
        (folder / "text.txt").read_text(), hf.load_tokenizer(folder / "model"), context=32, max_tokens=330
    )
    kl = evaluate.compare(base, bitfold.load(tmp_path / "q", dtype=torch.float32), windows).mean_kl
    assert choice["measured_kl"]["value"] == pytest.approx(kl.value, rel=1e-3)
    assert choice["predicted_kl"]["value"] == pytest.approx(kl.value, rel=0.5)
    # The recipe by itself makes the same bytes.
    bitfold.quantize_calibrated(
        folder / "model",
        tmp_path / "again",
        tmp_path / "mine.toml",
        folder / "calibration.txt",
        **CALIBRATION,
    )
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "q" / weights).read_bytes()
    # Neither text is fit to judge it by.
    assert overlap.share_seen(tmp_path / "q", windows.ids) == 1.0
    assert overlap.share_seen(tmp_path / "again", windows.ids) == 0.0


def test_measured_on_the_spot(capsys, folder, tmp_path):
    code, out, err = call(
        capsys,
        *command(folder, tmp_path / "q", "--target-bpw", 4.2, "--text", folder / "text.txt", *TEXT),
        *("--formats", "int2-g32,int4-g32,int8", "--save-recipe", tmp_path / "mine.toml"),
    )
    assert code == 0, err
    assert "by what weights lose alone" in out
    assert "predicted KL" in out
    assert "4.2 bits per weight" in out
    assert recipes.read(tmp_path / "mine.toml").name == "mine"
    code, out, err = call(capsys, "explain", tmp_path / "mine.toml")
    assert code == 0, err
    assert "'model.layers.*" in out
    code, _, err = call(capsys, "plan", folder / "model", "--recipe", tmp_path / "mine.toml")
    assert code == 0, err
    code, _, err = call(
        capsys, "eval", tmp_path / "q", "--text", folder / "text.txt", "--context", 32, "--max-tokens", 330
    )
    assert code == 0
    assert "100% of the passages" in err


def test_a_file_that_is_not_there_is_made_and_gone_on_from(folder, tmp_path, monkeypatch):
    path, asked = tmp_path / "new.json", ["int2-g32", "int8"]
    few = Texts((folder / "text.txt").read_text(), 100, 32)

    def stop(what, done, total):
        if "layers.1.mlp" in what:
            raise InterruptedError

    arguments = {"sensitivity": path, "candidates": asked, "rounds": 0}
    with pytest.raises(InterruptedError):
        allocate(folder / "model", Target(bits=4), few, **arguments, progress=stop)
    assert not result.read(path).finished
    first = allocate(folder / "model", Target(bits=4), few, **arguments)
    assert result.read(path).finished
    monkeypatch.setattr(measure, "measure_one", None)  # nothing is measured again
    assert allocate(folder / "model", Target(bits=4), few, **arguments).recipe == first.recipe


def test_a_dry_run_writes_nothing(capsys, folder, tmp_path):
    size = budget.plan_checkpoint(folder / "model", "int4-g32").nbytes
    data = call_json(
        capsys,
        *command(
            folder,
            "--dry-run",
            "--target-size",
            f"{size / 1e3:.3f}kB",
            "--sensitivity",
            folder / "found.json",
        ),
    )
    assert data["bytes"] == data["allocation"]["bytes"] <= size
    assert data["allocation"]["measured_kl"] is None
    assert list(tmp_path.iterdir()) == []


def test_stdout_is_json_alone_whatever_the_solver_prints(folder):
    """In a process of its own: what native code prints doesn't pass through Python."""
    arguments = ["quantize", str(folder / "model"), "--dry-run", "--target-bpw", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bitfold", *arguments, "--sensitivity", str(folder / "found.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-bpw", 4], "without anything to choose by"),
        (["--target-bpw", 4, "--target-size", "1MB", "--sensitivity", "FOUND"], "both given"),
        (["--target-bpw", 1.5, "--sensitivity", "FOUND"], "less than the smallest that the candidates allow, 2.5"),
        (["--target-bpw", 16, "--sensitivity", "FOUND"], "takes 16 bits per weight: there is nothing to choose"),
        (["--target-bpw", -4, "--sensitivity", "FOUND"], "a positive number"),
        (["--target-size", "1kB", "--sensitivity", "FOUND"], "1,000 bytes, less than the smallest"),
        (["--target-size", "1GB", "--sensitivity", "FOUND"], "nothing to choose"),
        (["--target-size", "huge", "--sensitivity", "FOUND"], "--target-size is 'huge'"),
        (["--target-bpw", 4, "--sensitivity", "FOUND", "--recipe", "nf4"], "--recipe is given too"),
        (["--target-bpw", 4, "--sensitivity", "FOUND", "--formats", "nf4"], "was not measured"),
        (["--target-bpw", 4, "--sensitivity", "FOUND", "--rounds", -1], "at least 0"),
        (["--target-bpw", 4, "--sensitivity", "FOUND", "--formats", "gptq-int3-g32"], "needs a text to calibrate"),
        (["--target-bpw", 4, "--sensitivity", "nowhere.json"], "nowhere.json does not exist"),
        (["--target-bpw", 4, "--sensitivity", "no/where.json"], "no/where.json does not exist"),
        (["--target-bpw", 4, "--text", "nowhere.txt"], "nowhere.txt"),
        (["--sensitivity", "FOUND"], "--sensitivity is given, which is for --target-bpw"),
        (["--target-bpw", 4, "--sensitivity", "FOUND", "--save-recipe", "no/where.toml"], "doesn't exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(capsys, folder, tmp_path, arguments, words):
    given = [str(folder / "found.json") if one == "FOUND" else one for one in arguments]
    code, out, err = call(capsys, *command(folder, tmp_path / "q", *given))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_measurements_of_something_else_are_refused(folder, tmp_path, found):
    other = calibrated.write_model(tmp_path / "other", layers=2, tied=True, seed=3)
    with pytest.raises(CheckpointError, match="another model"):
        allocate(other, Target(bits=4), Texts(""), sensitivity=found)
    more = Texts("", calibration=folder / "calibration.txt", samples=5, sequence_length=32)
    with pytest.raises(CheckpointError, match="another calibration text"):
        allocate(folder / "model", Target(bits=4), more, sensitivity=found)
    (tmp_path / "half.json").write_text(
        (folder / "found.json").read_text().replace('"finished": true', '"finished": false')
    )
    with pytest.raises(CheckpointError, match="unfinished"):
        allocate(folder / "model", Target(bits=4), Texts(""), sensitivity=tmp_path / "half.json")


def test_a_gguf_file_has_no_chosen_formats(capsys, folder, tmp_path):
    arguments = (tmp_path / "q.gguf", "--target-bpw", 4, "--sensitivity", folder / "found.json")
    code, _, err = call(capsys, *command(folder, *arguments))
    assert (code, "directories alone" in err) == (2, True)


def test_without_scipy_the_extra_is_named(folder):
    program = (
        "import sys; sys.modules['scipy'] = None; from bitfold.cli.app import run; "
        f"sys.exit(run(['quantize', {str(folder / 'model')!r}, '--dry-run', '--target-bpw', '4', '--sensitivity', "
        f"{str(folder / 'found.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bitfold[allocate]" in done.stderr
    assert done.stderr.count("\n") == 1
