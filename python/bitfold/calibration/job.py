"""What one calibration is of: the model, the recipe, the text; and how that is told from another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold import _C
from bitfold.calibration import data
from bitfold.calibration.blocks import BlockModel
from bitfold.calibration.workers import Workers
from bitfold.layout import Source, Step
from bitfold.rules import Assignment, Recipe

_PIECE = 1 << 24  # bytes of a file that are hashed at a time


@dataclass(frozen=True)
class Job:
    """steps: the tensors of the source, and what each becomes; blocks: where they run; text: what is read."""

    source: Source
    recipe: Recipe
    assignments: Mapping[str, Assignment]
    steps: list[Step]
    blocks: BlockModel
    text: data.Calibration

    def fingerprint(self, workers: Workers) -> dict[str, Any]:
        """What must be the same for a run to go on where an earlier one was stopped, by the name that a message has."""
        return {
            "model": model_sha256(self.source, self.steps, workers),
            "recipe": "; ".join(
                f"{r.pattern} = {r.format} {r.method} {r.options} {r.activations}" for r in self.recipe.rules
            ),
            "number of samples": self.text.ids.shape[0],
            "sequence length": self.text.ids.shape[1],
            "seed": self.text.seed,
            "calibration text or tokenizer": self.text.sha256,
            "dtype": str(self.blocks.dtype),
            "device": self.blocks.device.type,
            "version of bitfold": _C.__version__,
        }

    def described(self) -> dict[str, object]:
        """What the report says of the calibration."""
        samples, tokens = self.text.ids.shape
        return {
            "source": self.text.source,
            "sha256": self.text.sha256,
            "samples": samples,
            "sequence_length": tokens,
            "seed": self.text.seed,
            "dtype": str(self.blocks.dtype).removeprefix("torch."),
        }


def model_sha256(source: Source, steps: Sequence[Step], workers: Workers) -> str:
    """Of config.json and of all files that have a tensor of the model."""
    files = sorted({part.path for step in steps for part in step.parts})
    hashes = workers.map(_sha256, [source.path / "config.json", *files])
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
