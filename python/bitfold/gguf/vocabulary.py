"""A tokenizer of transformers from the metadata of a GGUF file: what tokenizer.py does, undone.

A file has tokens with types, merges or scores, and names the rest. Normalizer, pre-tokenizer and decoder are put
together here to do what llama.cpp does; the library tokenizers runs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bitfold import hf
from bitfold.gguf.keys import Keys
from bitfold.gguf.library import TokenType
from bitfold.gguf.model import GgufModel
from bitfold.gguf.pretokenizers import PreTokenizer, by_name
from bitfold.gguf.sentencepiece import SPACE, splits
from bitfold.shards import CheckpointError

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_IDS = {
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0}
}  # what llama.cpp takes where a file says nothing


def tokenizer_of(file: GgufModel) -> Any:
    """The tokenizer of a file, as transformers has them.

    Raises CheckpointError where it has none, or one that bitfold doesn't know.
    """
    transformers = hf.require_transformers()
    keys, tokenizer = Keys(file.metadata, "tokenizer.ggml."), Keys(file.metadata, "tokenizer.")
    if "model" not in keys:
        raise CheckpointError("the file has no tokenizer")
    kind = keys.text("model")
    if kind not in _KINDS:
        raise CheckpointError(
            f"the file's tokenizer.ggml.model is {kind!r}, and bitfold knows {', '.join(map(repr, _KINDS))}"
        )
    tokens, types = _tokens(keys)
    special = _special(keys, kind, tokens)
    backend = _KINDS[kind](keys, tokens, types, special)
    _add_tokens(backend, tokens, types)
    whole = kind == "llama" or by_name(keys.text("pre", "default")).whole
    begins, ends = keys.flag("add_bos_token", whole), keys.flag("add_eos_token", False)
    _set_ends(
        backend, special.get("bos_token") if begins else None, special.get("eos_token") if ends else None
    )
    name = Keys(file.metadata, "general.").text("architecture", "")
    context = Keys(file.metadata, f"{name}.")
    more: dict[str, Any] = {}
    if "context_length" in context:
        more["model_max_length"] = context.whole("context_length")
    if "chat_template" in tokenizer:
        more["chat_template"] = tokenizer.text("chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(_SPECIAL) | special | more,
    )


def _tokens(keys: Keys) -> tuple[list[str], list[float]]:
    """Texts and types by id."""
    tokens = keys.texts("tokens")
    types = keys.numbers("token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"the file has {len(tokens)} tokens, but {len(types)} token types")
    if len(set(tokens)) < len(tokens):
        (twice, _), *_ = Counter(tokens).most_common(1)
        raise CheckpointError(f"the file has the token {twice!r} twice")
    return tokens, types


def _special(keys: Keys, kind: str, tokens: Sequence[str]) -> dict[str, str]:
    """The texts of special tokens, by what they are for."""
    usual, last = _IDS.get(kind, {}), len(tokens) - 1
    ids = {name: usual[name] for name in usual if usual[name] <= last}
    ids |= {name: keys.whole(key, least=0, most=last) for name, key in _SPECIAL.items() if key in keys}
    return {name: tokens[id] for name, id in ids.items()}


# ---- the two kinds of vocabulary ----


def _byte_level(keys: Keys, tokens: Sequence[str], types: Sequence[float], special: Mapping[str, str]) -> Any:
    """BPE on bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    row = by_name(keys.text("pre", "default"))
    merges = keys.texts("merges")
    vocabulary = _numbered(tokens, types)
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not all(part in vocabulary for part in (left, right, left + right)):
            raise CheckpointError(f"the file's merge {merge!r} is none of two tokens that make a third")
        pairs.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=row.whole))
    if row.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _cutter(row)
    backend.decoder = decoders.ByteLevel()
    return backend


def _cutter(row: PreTokenizer) -> Any:
    from tokenizers import Regex, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=row.pattern is None)
    if row.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if row.pattern is None:
        return level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(row.pattern), "isolated"), level])


def _sentencepiece(
    keys: Keys, tokens: Sequence[str], types: Sequence[float], special: Mapping[str, str]
) -> Any:
    """SentencePiece's BPE: every way to cut a piece in two pieces is a merge, in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = keys.numbers("scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"the file has {len(tokens)} tokens, but {len(scores)} scores")
    vocabulary = _numbered(tokens, types)
    pieces = {text: -scores[id] for text, id in vocabulary.items() if types[id] == TokenType.NORMAL}
    merges = [
        (left, right)
        for text in sorted(pieces, key=pieces.__getitem__)
        for left, right in splits(text)
        if left in pieces and right in pieces
    ]
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=special.get("unk_token"),
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    prefix = keys.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


# ---- what they share ----


def _numbered(texts: Sequence[str], types: Sequence[float]) -> dict[str, int]:
    """The tokens with their ids; rows of the embedding that have no token stay without one."""
    return {
        text: id
        for id, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind != TokenType.UNUSED or text != f"[PAD{id}]"
    }


def _add_tokens(backend: Any, tokens: Sequence[str], types: Sequence[float]) -> None:
    """Tokens that are found in text whole, before it is cut."""
    from tokenizers import AddedToken

    special, plain = [], []
    for text, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(AddedToken(text, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            plain.append(AddedToken(text, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _set_ends(backend: Any, begin: str | None, end: str | None) -> None:
    """Let text begin and end with these tokens (None: with no token)."""
    from tokenizers import processors

    one = [*([begin] if begin else []), "$A", *([end] if end else [])]
    two = [*one, *([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])]
    ids = {token: backend.token_to_id(token) for token in (begin, end) if token}
    backend.post_processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=list(ids.items())
    )
