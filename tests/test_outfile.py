"""Files that commands write beside models: never in the place of another file, whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import gguf_models
import pytest
from bitfold import outfile
from bitfold.allocation import recipe
from bitfold.bench import run as bench
from bitfold.cli.app import run
from bitfold.outfile import Kind, check_output, write_file, write_text
from bitfold.sensitivity import result
from bitfold.shards import CheckpointError
from refusals import refuse
from tiny import one_thread  # noqa: F401

NOTE = Kind("note", re.compile("note:"))
KEEP = '[[rules]]\nmatch = "*"\nformat = "int8"\nkeep_outlier_layers = { share = 0.5 }\n'
FEW = ["--formats", "int4-g32", "--tokens", "64"]
WRITERS = {
    "report": ["report", "{q}", "-o", "{x}"],
    "explore": ["explore", "-o", "{x}"],
    "sensitivity": ["sensitivity", "{m}", "--text", "{t}", "-o", "{x}", "--restart", *FEW],
    "bench": ["bench", "--out", "{x}"],
    "outliers": ["outliers", "{m}", "--text", "{t}", "--recipe", "{r}", "--save-recipe", "{x}"],
    "quantize": [
        "quantize",
        "{m}",
        "{o}",
        "--text",
        "{t}",
        "--target-bpw",
        "5",
        "--save-recipe",
        "{x}",
        *FEW,
    ],
    "imatrix": ["imatrix", "{m}", "--text", "{t}", "-o", "{x}.gguf", "--force"],
}


@pytest.fixture
def places(model, quantized, text, tmp_path):
    (tmp_path / "mine.toml").write_text(KEEP)
    return {
        "m": model,
        "q": quantized,
        "t": text,
        "r": tmp_path / "mine.toml",
        "o": tmp_path / "out",
        "x": tmp_path / "x",
    }


def spelled(command: str, places: dict) -> list[str]:
    return [part.format(**places) for part in WRITERS[command]]


@pytest.mark.parametrize("command", WRITERS)
def test_another_file_is_not_overwritten(capsys, places, tmp_path, command):
    """Whatever it is: a text, JSON, a recipe that somebody wrote, a page of somebody else."""
    x = tmp_path / ("x.gguf" if command == "imatrix" else "x")
    for content in ("The quick brown fox", '{"a": 1}', KEEP, "<!doctype html><title>mine</title>", "\0\xff"):
        x.write_text(content, encoding="latin-1")
        refuse(capsys, tmp_path, spelled(command, places), x.name, "so it is not overwritten; choose another")
        assert x.read_text(encoding="latin-1") == content


@pytest.mark.parametrize("command", [command for command in WRITERS if command != "imatrix"])
def test_what_is_no_place_for_a_file(capsys, places, tmp_path, command):
    (tmp_path / "x").mkdir()
    refuse(capsys, tmp_path, spelled(command, places), "x', which is a directory; it must be a file")
    (tmp_path / "x").rmdir()
    nowhere = places | {"x": tmp_path / "no" / "x"}
    refuse(capsys, tmp_path, spelled(command, nowhere), "no/x', in a directory that doesn't exist")


def test_plots_want_a_directory(capsys, places, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["report", places["q"], "-o", page, "--plots", places["r"]]
    refuse(capsys, tmp_path, arguments, "mine.toml', which is a file; it must be a directory")


@pytest.mark.parametrize("command", ["report", "explore", "sensitivity", "bench", "outliers", "quantize"])
def test_what_a_command_wrote_it_replaces(capsys, places, tmp_path, monkeypatch, command):
    monkeypatch.setattr("bitfold.cli.bench.run", lambda settings, told: BENCHED)
    monkeypatch.setattr("bitfold.cli.bench._show_end", lambda report: None)
    written = []
    for out in ("once", "twice"):
        arguments = spelled(command, places | {"o": tmp_path / out})
        assert run(arguments) == 0, capsys.readouterr().err
        written.append((tmp_path / "x").read_text())
    assert written[0] == written[1]
    assert not list(tmp_path.glob(".x*"))


BENCHED = {"schema": bench.SCHEMA, "machine": {"cpu": "none"}, "rows": []}


def test_kinds_don_t_take_each_other_for_their_own(capsys, places, tmp_path):
    """Each kind's mark is in what its command writes, and in that alone."""
    kinds = {
        "report": outfile.PAGE,
        "explore": outfile.PAGE,
        "sensitivity": result.FILE,
        "outliers": recipe.RECIPE,
    }
    texts = {}
    for command in kinds:
        assert run(spelled(command, places)) == 0, capsys.readouterr().err
        texts[command] = (tmp_path / "x").read_text()
        (tmp_path / "x").unlink()
    for command, text in texts.items():
        for kind in {*kinds.values(), bench.RESULTS}:
            assert bool(kind.mark.match(text)) == (kind is kinds[command]), (command, kind.name)


def test_the_report_of_a_conversion_is_not_put_over_another_file(capsys, tmp_path):
    source = gguf_models.write_directory(tmp_path / "source", "llama")
    beside = tmp_path / "m.gguf.json"
    beside.write_text('{"mine": 1}')
    arguments = ["convert", source, tmp_path / "m.gguf", "--force"]
    refuse(capsys, tmp_path, arguments, "m.gguf.json', which exists and is no report of a conversion")
    assert beside.read_text() == '{"mine": 1}'
    beside.unlink()
    for _ in range(2):
        assert run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    assert "source" in beside.read_text()


def test_an_empty_file_is_filled(tmp_path):
    path = tmp_path / "x"
    path.touch()
    check_output("x", path, NOTE)
    write_text(path, "note: grüße")
    assert path.read_text(encoding="utf-8") == "note: grüße"


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("note: 1")
    link.symlink_to(target)
    check_output("x", link, NOTE)
    write_text(link, "note: 2")
    assert link.is_symlink()
    assert target.read_text() == "note: 2"


def test_a_pipe_is_written_to():
    code = "from bitfold.cli.app import run; import sys; sys.exit(run(['explore', '-o', '/dev/stdout', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.startswith(b"<!doctype html>")
    assert b"</html>" in done.stdout


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("note: before")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "note: after")
    assert caught.value.filename == str(path)
    assert path.read_text() == "note: before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_came_into_being_meanwhile(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="has come into being"):
        write_file(tmp_path / "x", b"ours", replace=False)
    assert (tmp_path / "x").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
