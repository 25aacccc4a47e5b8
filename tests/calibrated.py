"""What tests of calibrated quantizing share: a tiny model, a text, and a run that is killed."""

from __future__ import annotations

import random
from pathlib import Path

import tiny
import torch

OPTIONS = {"samples": 6, "sequence_length": 32}
RECIPE = "gptq-int4-g32"


def write_text(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """Words in a random order: no passage comes twice."""
    rng = random.Random(seed)
    path.write_text(" ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(words)))
    return path


def write_model(path: Path, **sizes) -> Path:
    return tiny.write_llama(path, torch.bfloat16, **{"layers": 3, **sizes})


def contents(path: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
