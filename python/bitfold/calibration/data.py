"""Calibration data: a text, JSON lines or a data set becomes rows of token ids, all of one length.

Documents are tokenized one by one, in an order that the seed gives, and joined, with EOS behind each but the last if
the tokenizer has one. The stream is cut into rows; what is left is dropped. Of the rows as many as asked for are
drawn by the seed, without repetition. Where the tokenizer puts BOS in front of texts, each row begins with it, as it
would in use.

Reading stops at STREAM_FACTOR times the tokens that are needed, so that a large corpus costs no more than a small one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.hf import reason
from bitfold.versions import MissingExtraError

SAMPLES = 128  # rows, as in the GPTQ paper
SEQUENCE_LENGTH = 2048  # tokens of a row; the model's own limit where that is smaller
STREAM_FACTOR = 4
DATASET_PREFIX = "dataset:"


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    ids: int64 [samples, tokens of a row]; source: where the text is from, as it was given; seed: that drew the rows.
    """

    ids: Tensor
    source: str
    seed: int

    @property
    def sha256(self) -> str:
        """Of the token ids, as little-endian int64, row after row."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def read(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
) -> Calibration:
    """Rows of tokens from a text.

    Args:
        source: a UTF-8 text file; a file of JSON lines (.jsonl) with a string "text" in each; or
            "dataset:NAME[:CONFIG[:SPLIT]]", a Hugging Face data set with a column "text" (split: "train"), which
            the extra `datasets` reads.
        tokenizer: a transformers tokenizer.
        samples: rows to draw.
        sequence_length: tokens of a row, BOS included.
        seed: of the order of documents and of the draw.

    Raises ValueError where the text is empty or too short, or is not what it must be; OSError where it can't be read;
    MissingExtraError where the library for data sets is not installed.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, it must be at least 1")
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}, it must be at least 2")
    texts = documents(source)
    if not any(text.strip() for text in texts):
        raise ValueError(f"the calibration text {source} is empty")
    bos = _bos(tokenizer)
    body = sequence_length - len(bos)
    rng = random.Random(seed)
    order = rng.sample(range(len(texts)), len(texts))
    stream = _tokens((texts[i] for i in order), tokenizer, STREAM_FACTOR * samples * body)
    rows = len(stream) // body
    if rows < samples:
        raise ValueError(
            f"the calibration text {source} has {len(stream)} tokens, enough for {rows} samples of {sequence_length}, "
            f"not for {samples}: give a longer text, or fewer or shorter samples"
        )
    drawn = rng.sample(range(rows), samples)
    ids = torch.tensor([bos + stream[row * body : (row + 1) * body] for row in drawn], dtype=torch.int64)
    return Calibration(ids, str(source), seed)


def _bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: [BOS] or nothing."""
    start = tokenizer.bos_token_id
    if start is None:
        return []
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [start] if ids and ids[0] == start else []


def _tokens(texts: Iterator[str], tokenizer: Any, enough: int) -> list[int]:
    """The documents' tokens in one list, `enough` or a few more."""
    stream: list[int] = []
    for text in texts:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= enough:
            break
    return stream


def documents(source: str | Path) -> Sequence[str]:
    """The texts of a source, see `read`."""
    text = str(source)
    if text.startswith(DATASET_PREFIX):
        return _dataset(text.removeprefix(DATASET_PREFIX))
    path = Path(source)
    try:
        content = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"the calibration text {path} does not exist; it must be a file, or {DATASET_PREFIX}NAME for a data set"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} doesn't fit") from None
    return _json_lines(path, content) if path.suffix == ".jsonl" else [content]


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise ValueError(
                f'{path}, line {number} has no "text"; each line must be an object with a string of that name'
            )
        texts.append(fields["text"])
    return texts


def _dataset(spec: str) -> Sequence[str]:
    """The column "text" of a data set, by NAME[:CONFIG[:SPLIT]]."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            "reading data sets needs datasets: run pip install 'bitfold[datasets]'"
        ) from None
    name, config, split, *more = [*spec.split(":"), "", ""]
    if not name or any(more):
        raise ValueError(f"the data set {spec!r} must be NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # whatever a data set may make the library raise
        raise ValueError(f"the data set {spec!r} can't be read: {reason(error)}") from error
    if "text" not in table.column_names:
        raise ValueError(
            f'the data set {spec!r} has the columns {", ".join(table.column_names)}; one must be "text"'
        )
    return table["text"]
