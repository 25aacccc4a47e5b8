"""Vocabularies of SentencePiece: pieces with scores, from tokenizer.model or from the merges of a fast tokenizer.

SentencePiece's BPE begins with characters (bytes, where the vocabulary lacks one) and again and again joins the two
neighbours whose union is the piece of the highest score, the leftmost of equals. llama.cpp does the same with the
scores of a GGUF file ("llama" in `tokenizer.ggml.model`). A fast tokenizer (tokenizer.json) has merges instead.

tokenizer.model is a protocol buffer, sentencepiece.ModelProto: pieces (1: text 1, score 2, type 3), trainer_spec (2:
model_type 3, ids of unknown, begin, end and padding 40 to 43) and normalizer_spec (3: add_dummy_prefix 3)
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.gguf.library import TokenType
from bitfold.shards import CheckpointError

SPACE = "\u2581"  # what stands for a space in pieces
ADDED_SCORE, GAP_SCORE = -1000.0, -10000.0  # of tokens that no merge makes
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BPE = 2  # model_type
_SPECIAL = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}


@dataclass(frozen=True)
class Piece:
    """A token. The types of SentencePiece and of GGUF have the same numbers."""

    text: str
    score: float
    type: TokenType


def placeholder(id: int) -> Piece:
    """What stands for a row of the embedding that has no token."""
    return Piece(f"[PAD{id}]", GAP_SCORE, TokenType.UNUSED)


@dataclass(frozen=True)
class Pieces:
    """A vocabulary by id. prefix: a space is put in front of text; special: ids by what they are for, as far as known:
    unk, bos, eos, pad.
    """

    pieces: list[Piece]
    prefix: bool
    special: dict[str, int]


# ---- tokenizer.model ----


def read_model(path: Path) -> Pieces:
    """The vocabulary of a tokenizer.model. Raises CheckpointError for one that is damaged or no BPE model."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {3: 1, 40: 0, 41: 1, 42: 2}  # what the format says of fields that aren't there
    prefix = True
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                pieces.append(_piece(value))
            elif field == 2:
                trainer |= dict(_fields(value))
            elif field == 3:
                prefix = bool(dict(_fields(value)).get(3, prefix))
        count = len(pieces)  # -1 is a huge number in a varint
        special = {
            name: trainer[field] for field, name in _SPECIAL.items() if trainer.get(field, count) < count
        }
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({type(error).__name__}: {error})") from None
    if not pieces:
        raise CheckpointError(f"{path} is no SentencePiece model: it has no pieces")
    if trainer[3] != _BPE:
        raise CheckpointError(
            f"{path} is a SentencePiece model of the type {trainer[3]}; bitfold knows BPE, type {_BPE}"
        )
    return Pieces(pieces, prefix, special)


def _piece(raw: Any) -> Piece:
    fields = dict(_fields(raw))
    kind = TokenType(fields.get(3, TokenType.NORMAL))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, kind)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: int of a varint, bytes of the others."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the kind {kind} at byte {at}")
        if at + length > len(raw):
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(raw)}")
        yield key >> 3, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number without an end at byte {at}")


# ---- tokenizer.json ----


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is the fast form of a SentencePiece BPE: characters, bytes for unknown ones."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def derive(tokenizer: Mapping[str, Any]) -> Pieces:
    """The vocabulary of a fast tokenizer, with scores that make the same tokens.

    Raises CheckpointError where its merges say what no scores can, and for a normalizer that SentencePiece has no word
    for.
    """
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    added = {token["content"]: bool(token["special"]) for token in tokenizer.get("added_tokens") or ()}
    kinds = {text: _kind(text, model.get("unk_token"), added) for text in vocabulary}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    scores = _scores(merges, kinds)
    pieces = [placeholder(id) for id in range(max(vocabulary.values()) + 1)]
    for text, id in vocabulary.items():
        pieces[id] = Piece(text, scores.get(text, ADDED_SCORE if text in added else 0.0), kinds[text])
    unknown = vocabulary.get(model.get("unk_token"))
    return Pieces(pieces, _prefix(tokenizer), {} if unknown is None else {"unk": unknown})


def _kind(text: str, unknown: str | None, added: Mapping[str, bool]) -> TokenType:
    if text == unknown:
        return TokenType.UNKNOWN
    if text in added:
        return TokenType.CONTROL if added[text] else TokenType.USER_DEFINED
    return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL


def _scores(merges: list[tuple[str, ...]], kinds: Mapping[str, TokenType]) -> dict[str, float]:
    """0 for what the first merges make, -1 for what the next ones do, and so on; characters come last."""
    scores: dict[str, float] = {}
    before = None
    for left, right in merges:
        text = left + right
        if text != before and text in scores:
            raise CheckpointError(
                f"its tokenizer.json has a merge for {text!r} behind merges for other tokens, which the scores of "
                "SentencePiece can't say: add its tokenizer.model"
            )
        scores.setdefault(text, -float(len(scores)))
        before = text
    _check_splits(merges, kinds)
    for text, kind in kinds.items():
        if kind == TokenType.NORMAL:
            scores.setdefault(text, -float(len(scores)))
    return scores


def _check_splits(merges: list[tuple[str, ...]], kinds: Mapping[str, TokenType]) -> None:
    """SentencePiece joins any two pieces whose union is a piece: each way to make one must be a merge."""
    there = set(merges)
    for text, kind in kinds.items():
        if kind != TokenType.NORMAL:
            continue
        for left, right in splits(text):
            normal = kinds.get(left) == kinds.get(right) == TokenType.NORMAL
            if normal and (left, right) not in there:
                raise CheckpointError(
                    f"its tokenizer.json has no merge of {left!r} and {right!r}, though {text!r} is a token, which the "
                    "scores of SentencePiece can't say: add its tokenizer.model"
                )


def splits(text: str) -> list[tuple[str, str]]:
    """All ways to cut a text in two, the longest beginnings first."""
    return [(text[:i], text[i:]) for i in range(len(text) - 1, 0, -1)]


def _prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of text; the three ways in which fast tokenizers spell SentencePiece's spaces."""
    normalizer, cut = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    replaces = all(
        step["pattern"] == {"String": " "} and step["content"] == SPACE
        for step in steps
        if step["type"] == "Replace"
    )
    # A cut at spaces does nothing where they are replaced before.
    on_spaces = not cut or (cut["type"] == "Split" and cut["pattern"] == {"String": " "})
    if kinds == ["Prepend", "Replace"] and steps[0]["prepend"] == SPACE and replaces and on_spaces:
        return True
    if kinds == ["Replace"] and replaces and on_spaces:
        return False
    if not kinds and cut.get("type") == "Metaspace" and not cut.get("split", True):
        return cut.get("prepend_scheme", "always") != "never"
    raise CheckpointError(
        f"its tokenizer.json has the normalizer {kinds or None} and the pre-tokenizer {cut.get('type')}, which "
        "SentencePiece has no word for"
    )
