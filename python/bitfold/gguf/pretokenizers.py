"""How byte-level vocabularies cut text into words before merging: the names that GGUF has for it.

A file names one (`tokenizer.ggml.pre`), where a Hugging Face tokenizer spells out normalizer and pre-tokenizer in
tokenizer.json. The patterns are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfold.shards import CheckpointError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS}|{_SPACES}"
# Words that begin in upper case and go on in lower case; tekken and gpt-4o share them.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TITLE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_TITLE}|{_CAPITALS}|\p{{N}}|{_SLASHED}|{_SPACES}"
_GPT4O = rf"{_TITLE}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """A row of the table.

    names: in files, the one that is written first; pattern: what words are, None for GPT-2's own; digits: each digit is
    a word, before anything else; whole: a word that is a token is taken as it is, whatever the merges say; composed:
    text is put into Unicode's NFC first, which llama.cpp leaves to its caller.
    """

    names: tuple[str, ...]
    pattern: str | None
    digits: bool = False
    whole: bool = False
    composed: bool = False


PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2",), None),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3"), _LLAMA3, whole=True),
    PreTokenizer(("dbrx", "smaug-bpe"), _LLAMA3),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), _QWEN2, composed=True),
    PreTokenizer(("tekken",), _TEKKEN, whole=True),
    PreTokenizer(("gpt-4o",), _GPT4O),
    PreTokenizer(("smollm",), None, digits=True),
)


def by_name(name: str) -> PreTokenizer:
    """The row of a file. Raises CheckpointError for a name that isn't in the table."""
    for row in PRE_TOKENIZERS:
        if name in row.names:
            return row
    known = ", ".join(row.names[0] for row in PRE_TOKENIZERS)
    raise CheckpointError(f"the file's tokenizer.ggml.pre is '{name}', and bitfold knows {known}")


def recognize(tokenizer: Mapping[str, Any]) -> PreTokenizer:
    """The row that does what a byte-level tokenizer.json does. Raises CheckpointError where none does.

    Whether text is composed first (NFC) is not compared: no file says it, and llama.cpp never does it.
    """
    pattern, digits = _cutting(tokenizer)
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise CheckpointError(
            f"its tokenizer.json changes text by {_short(normalizer)}, which GGUF has no name for"
        )
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for row in PRE_TOKENIZERS:
        if (row.pattern, row.digits, row.whole) == (pattern, digits, whole):
            return row
    words = "words as GPT-2 has them" if pattern is None else f"the words {pattern!r}"
    digits_too = ", each digit by itself" if digits else ""
    whole_too = ", takes words that are tokens as they are (ignore_merges)" if whole else ""
    known = ", ".join(row.names[0] for row in PRE_TOKENIZERS)
    raise CheckpointError(
        f"its tokenizer.json cuts text into {words}{digits_too}{whole_too}, which is none of {known}"
    )


def _cutting(tokenizer: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Pattern and digits of a tokenizer.json."""
    given = tokenizer.get("pre_tokenizer") or {}
    steps = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
    *cuts, level = steps
    unknown = CheckpointError(f"its tokenizer.json cuts text by {_short(given)}, which GGUF has no name for")
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        raise unknown
    own = level.get("use_regex", True)
    if not cuts and own:
        return None, False
    if len(cuts) != 1:
        raise unknown
    (cut,) = cuts
    if cut.get("type") == "Digits" and cut.get("individual_digits") and own:
        return None, True
    isolated = cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut.get("invert")
    if isolated and "Regex" in cut["pattern"] and not own:
        return cut["pattern"]["Regex"], False
    raise unknown


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:120] + " ..."
