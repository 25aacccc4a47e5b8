"""What must come of a command that refuses. The models to spoil are fixtures of conftest.py."""

from __future__ import annotations

from pathlib import Path

from bitfold.cli.app import run


def listing(path: Path) -> list[str]:
    return sorted(str(entry) for entry in path.rglob("*"))


def check_sentence(err: str, *parts: str) -> None:
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert err.endswith((".\n", "?\n"))
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err


def refuse(capsys, tmp_path: Path, arguments: list, *parts: str) -> None:
    """The command fails as it should, and the directory looks as before."""
    before = listing(tmp_path)
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert out == ""
    check_sentence(err, *parts)
    assert listing(tmp_path) == before
