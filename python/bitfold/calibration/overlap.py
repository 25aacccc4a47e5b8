"""Whether a text that a model is measured on was calibrated on: then the figures flatter the model.

Beside a calibrated model lie hashes of the runs of NGRAM tokens that it has seen, one in KEEP_ONE_IN of them, chosen by
the hash itself: so the sample of another text has a run if and only if the run is in both, and a few thousand numbers
say which share of that text is known. Shared boilerplate makes a share of its own; above NOTABLE it is worth a warning.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitfold.pipeline import SEEN_FILE as FILE
from bitfold.shards import CheckpointError, read_json

NGRAM = 13  # tokens; as in the decontamination of GPT-3 (Brown et al. 2020, appendix C), which counts words
KEEP_ONE_IN = 16
NOTABLE = 0.01

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64 (Steele et al. 2014)


def sample_of(rows: Iterable[Tensor]) -> NDArray[np.uint64]:
    """The kept hashes of all runs of NGRAM tokens within rows of token ids, sorted, each once."""
    kept = [np.empty(0, np.uint64)]
    for row in rows:
        hashes = _hashes(row.cpu().numpy())
        kept.append(hashes[hashes % np.uint64(KEEP_ONE_IN) == 0])
    return np.unique(np.concatenate(kept))


def _hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One hash for each run of NGRAM ids: a polynomial modulo 2^64, then splitmix64's mixing of its bits."""
    count = len(ids) - NGRAM + 1
    if count < 1:
        return np.empty(0, np.uint64)
    values = ids.astype(np.uint64) + np.uint64(1)
    sums = np.zeros(count, np.uint64)
    for i in range(NGRAM):
        sums = sums * _MULTIPLIER + values[i : i + count]
    for shift, factor in zip((30, 27), _MIX, strict=True):
        sums = (sums ^ (sums >> np.uint64(shift))) * factor
    return sums ^ (sums >> np.uint64(31))


def to_json(hashes: NDArray[np.uint64]) -> dict[str, object]:
    """What the file beside a calibrated model holds."""
    return {
        "ngram": NGRAM,
        "keep_one_in": KEEP_ONE_IN,
        "hashes": base64.b64encode(hashes.astype("<u8").tobytes()).decode("ascii"),
    }


def share_seen(model: Path, rows: Iterable[Tensor]) -> float | None:
    """Which share of a text's runs of tokens the model in a directory was calibrated on, 0 to 1.

    rows: the text's token ids by the model's own tokenizer. None where the model has no calibration file, or the text
    is too short to say.

    Raises CheckpointError where the file is not what this version writes.
    """
    path = model / FILE
    if not path.is_file():
        return None
    known = from_json(read_json(path), path)
    found = sample_of(rows)
    return share(found, known) if len(found) else None


def from_json(data: Mapping[str, Any], path: Path) -> NDArray[np.uint64]:
    """The hashes that `to_json` wrote; path: where they are from. Raises CheckpointError for anything else."""
    if (data.get("ngram"), data.get("keep_one_in")) != (NGRAM, KEEP_ONE_IN):
        raise CheckpointError(
            f"{path} was written by another version of bitfold: its runs of tokens are not comparable"
        )
    try:
        return np.frombuffer(base64.b64decode(data["hashes"], validate=True), "<u8")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable hashes: {json.dumps(str(error))}") from None


def share(found: NDArray[np.uint64], known: NDArray[np.uint64]) -> float:
    """Which share of the hashes of one text is among those of another, 0 to 1; 0 for a text too short to say."""
    return float(np.isin(found, known).mean()) if len(found) else 0.0
