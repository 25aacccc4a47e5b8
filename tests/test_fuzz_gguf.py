"""Damaged GGUF files: a file or one sentence. `-m slow` runs the hundred thousand of fuzz_gguf.py."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("gguf")
import fuzz_gguf
from tiny import one_thread  # noqa: F401


def test_the_sound_models_are_sound(tmp_path):
    """The first of the outcomes, and every field of their headers found: what is damaged was whole before."""
    for number, model in enumerate(fuzz_gguf.sound_models()):
        assert fuzz_gguf.outcome(model, tmp_path, number) == "made"
        for data in model.values():
            places = fuzz_gguf.fields(data)
            assert [place.start for place in places] == [
                0,
                *(place.start + place.size for place in places[:-1]),
            ]


def test_some_damaged_files(tmp_path):
    models = fuzz_gguf.sound_models()
    counts: Counter[str] = Counter()
    for number, model in fuzz_gguf.all_of(models, 300, seed=1):
        counts[fuzz_gguf.outcome(model, tmp_path, number)] += 1
    assert min(counts[name] for name in ("made", "refused")) > 20, counts


def test_what_a_finding_is(tmp_path, monkeypatch):
    """A message of two lines, and a file that is left, are findings."""
    (model, *_) = fuzz_gguf.sound_models()
    name = next(iter(model))
    broken = {name: model[name][:40]}
    (tmp_path / "left").write_text("")
    with pytest.raises(fuzz_gguf.Finding, match="left behind"):
        fuzz_gguf.outcome(broken, tmp_path, 0)
    (tmp_path / "left").unlink()
    monkeypatch.setattr(fuzz_gguf, "LONGEST_MESSAGE", 5)
    with pytest.raises(fuzz_gguf.Finding, match="no sentence"):
        fuzz_gguf.outcome(broken, tmp_path, 0)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files():
    done = subprocess.run(
        [sys.executable, fuzz_gguf.__file__, "--files", "100000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
