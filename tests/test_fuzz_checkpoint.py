"""Damaged model directories: work done, or one sentence. `-m slow` runs the ten thousand of fuzz_checkpoint.py."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("gguf")
import fuzz_checkpoint
from tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> list[Path]:
    return fuzz_checkpoint.sound_models(tmp_path_factory.mktemp("sound"))


def test_some_damaged_directories(sound, tmp_path):
    counts = Counter(fuzz_checkpoint.outcome(sound, number, 1, tmp_path) for number in range(120))
    assert counts["refused"] > 60, counts
    assert counts["done"] > 6, counts
    assert list(tmp_path.iterdir()) == []


def test_what_a_finding_is(sound, tmp_path, monkeypatch):
    """What is no sentence, what is left behind and what isn't for users."""

    def first_ones() -> None:
        for number in range(20):
            fuzz_checkpoint.outcome(sound, number, 1, tmp_path)

    def finds(text: str) -> None:
        with pytest.raises(fuzz_checkpoint.Finding, match=text):
            first_ones()

    with monkeypatch.context() as patch:
        patch.setattr(fuzz_checkpoint, "LONGEST_MESSAGE", 5)
        finds("no sentence")

    def leaves(words: list[str]) -> int:
        (tmp_path / "left").write_text("")
        print("error: a sentence.", file=sys.stderr)
        return 2

    with monkeypatch.context() as patch:
        patch.setattr(fuzz_checkpoint, "run", leaves)
        finds("left behind")

    def breaks(words: list[str]) -> int:
        raise KeyError("kind")

    with monkeypatch.context() as patch:
        patch.setattr(fuzz_checkpoint, "run", breaks)
        finds("KeyError")


@pytest.mark.slow
def test_ten_thousand_damaged_directories():
    done = subprocess.run(
        [sys.executable, fuzz_checkpoint.__file__, "--directories", "10000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
