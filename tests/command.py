"""The command line, run in this process."""

from __future__ import annotations

import json

from bitfold.cli.app import run


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def call_json(capsys, *arguments: object) -> dict:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)
