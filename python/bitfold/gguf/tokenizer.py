"""The tokenizer of a Hugging Face directory as metadata of a GGUF file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.gguf import sentencepiece
from bitfold.gguf.library import GGUFValue, GGUFWriter, SpecialVocab, TokenType
from bitfold.gguf.pretokenizers import recognize
from bitfold.gguf.sentencepiece import ADDED_SCORE, SPACE, Piece, placeholder
from bitfold.shards import CheckpointError, read_json

_SPECIAL_LOOKS = re.compile(r"<\|.*\|>|<pad>|<mask>|<unused\d+>", re.DOTALL)


def read_tokenizer(
    path: Path, rows: int, remark: Callable[[str], None] | None = None
) -> dict[str, GGUFValue]:
    """All tokenizer.* keys of a model whose embedding has so many rows; remark: told what they don't say.

    Raises CheckpointError where there is no tokenizer, or one that GGUF or llama.cpp has no word for.
    """
    fast = read_json(path / "tokenizer.json") if (path / "tokenizer.json").exists() else None
    slow = path / "tokenizer.model"
    try:
        if fast is not None and _is_byte_level(fast):
            return _byte_level(path, fast, rows, remark)
        if slow.exists():
            return _sentencepiece(path, sentencepiece.read_model(slow), _added(path, fast), rows)
        if fast is not None and sentencepiece.is_sentencepiece(fast):
            return _sentencepiece(path, sentencepiece.derive(fast), _added(path, fast), rows)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a tokenizer that can't be read ({type(error).__name__}: {error})"
        ) from error
    if fast is None:
        raise CheckpointError(
            f"{path} has neither tokenizer.json nor tokenizer.model, which a GGUF file needs"
        )
    kind = fast.get("model", {}).get("type")
    raise CheckpointError(
        f"{path} has a tokenizer of the kind {kind}; GGUF files take BPE on bytes and SentencePiece's BPE"
    )


def _is_byte_level(fast: Mapping[str, Any]) -> bool:
    model, decoder = fast["model"], fast.get("decoder") or {}
    kinds = [step.get("type") for step in decoder.get("decoders", [decoder])]
    return model.get("type") == "BPE" and not model.get("byte_fallback") and "ByteLevel" in kinds


# ---- added tokens ----


@dataclass(frozen=True)
class _Added:
    id: int
    text: str
    special: bool

    @property
    def type(self) -> TokenType:
        looks = self.special or _SPECIAL_LOOKS.fullmatch(self.text) is not None
        return TokenType.CONTROL if looks else TokenType.USER_DEFINED


def _added(path: Path, fast: Mapping[str, Any] | None) -> list[_Added]:
    """The tokens beside the model's own, from whichever file tells of them."""
    if fast is not None:
        return [
            _Added(token["id"], token["content"], token["special"])
            for token in fast.get("added_tokens") or ()
        ]
    found: dict[int, _Added] = {}
    if (path / "added_tokens.json").exists():
        found |= {id: _Added(id, text, False) for text, id in read_json(path / "added_tokens.json").items()}
    if (path / "tokenizer_config.json").exists():
        for id, token in read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            found[int(id)] = _Added(int(id), token["content"], bool(token.get("special")))
    return list(found.values())


# ---- the two kinds of vocabulary ----


def _byte_level(
    path: Path, fast: Mapping[str, Any], rows: int, remark: Callable[[str], None] | None
) -> dict[str, GGUFValue]:
    """BPE on bytes: "gpt2". The texts of added tokens are plain, those of all others are bytes spelled as letters."""
    row = recognize(fast)
    if remark is not None and (fast.get("normalizer") is not None) != row.composed:
        does = "doesn't put" if row.composed else "puts"
        remark(
            f"its tokenizer {does} text into Unicode's NFC, unlike other models with {row.names[0]} in their files"
        )
    pieces = _numbered(fast["model"]["vocab"], rows)
    for token in _added(path, fast):
        _put(pieces, token.id, Piece(token.text, ADDED_SCORE, token.type))
    writer = _common("gpt2", row.names[0], pieces)
    special = _special(path, rows, load_merges=True)
    if not special.merges:
        raise CheckpointError("its tokenizer.json has no merges")
    _add_special(writer, special, first=False)
    return _keys(writer)


def _numbered(vocabulary: Mapping[str, int], rows: int) -> list[Piece]:
    """A token for each row of the embedding, where the vocabulary has none a placeholder."""
    pieces = [placeholder(id) for id in range(rows)]
    for text, id in vocabulary.items():
        _put(pieces, id, Piece(text, 0.0, TokenType.NORMAL))
    return pieces


def _sentencepiece(
    path: Path, vocabulary: sentencepiece.Pieces, added: Sequence[_Added], rows: int
) -> dict[str, GGUFValue]:
    """SentencePiece's BPE: "llama"."""
    pieces = _numbered({}, rows)
    for id, piece in enumerate(vocabulary.pieces):
        _put(pieces, id, _spaced(piece))
    for token in added:
        if token.id < len(vocabulary.pieces) and token.type == TokenType.CONTROL:
            own = vocabulary.pieces[token.id]
            if own.type in (TokenType.UNKNOWN, TokenType.BYTE) and own.text == token.text:
                continue
        score = pieces[token.id].score if token.id < len(vocabulary.pieces) else ADDED_SCORE
        _put(pieces, token.id, _spaced(Piece(token.text, score, token.type)))
    writer = _common("llama", "default", pieces)
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_add_space_prefix(vocabulary.prefix)
    special = _special(path, rows)
    special.special_token_ids = vocabulary.special | special.special_token_ids
    _add_special(writer, special, first=not (path / "tokenizer.json").exists())
    return _keys(writer)


def _spaced(piece: Piece) -> Piece:
    """Tokens that are found in text before anything else are written as they stand there."""
    if piece.type == TokenType.USER_DEFINED:
        return Piece(piece.text.replace(SPACE, " "), piece.score, piece.type)
    return piece


# ---- what they share ----


def _put(pieces: list[Piece], id: int, piece: Piece) -> None:
    if not 0 <= id < len(pieces):
        raise CheckpointError(
            f"its tokenizer has the token {piece.text!r} with id {id}, but the embedding has {len(pieces)} rows"
        )
    pieces[id] = piece


def _common(model: str, pre: str, pieces: Sequence[Piece]) -> GGUFWriter:
    """A writer that holds the keys of both kinds; llama.cpp wants every text once."""
    seen: dict[str, int] = {}
    for id, piece in enumerate(pieces):
        if seen.setdefault(piece.text, id) != id:
            raise CheckpointError(
                f"its tokenizer has the token {piece.text!r} twice, as {seen[piece.text]} and as {id}"
            )
    writer = GGUFWriter(None, "")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_types([int(piece.type) for piece in pieces])
    return writer


def _special(path: Path, rows: int, *, load_merges: bool = False) -> SpecialVocab:
    """Merges, special tokens and chat template, as the gguf package reads them; what it says of pairs of texts, which
    GGUF has no word for, goes unheard."""
    log = logging.getLogger("gguf.vocab")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return SpecialVocab(path, load_merges=load_merges, n_vocab=rows)
    finally:
        log.setLevel(level)


def _add_special(writer: GGUFWriter, special: SpecialVocab, *, first: bool) -> None:
    """Ids of special tokens, whether text begins and ends with them (first: what holds of the beginning where no file
    says it) and the chat template."""
    added = special.add_special_token
    special.add_special_token = {"bos": added.get("bos", first), "eos": added.get("eos", False)}
    special.add_to_gguf(writer, quiet=True)


def _keys(writer: GGUFWriter) -> dict[str, GGUFValue]:
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
