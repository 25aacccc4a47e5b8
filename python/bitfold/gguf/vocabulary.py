"""A tokenizer of transformers from the metadata of a GGUF file: what tokenizer.py does, undone.

A file has tokens with types, merges or scores, and names the rest. Normalizer, pre-tokenizer and decoder are put
together here to do what llama.cpp does; the library tokenizers runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitfold import hf
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
# What llama.cpp takes where a file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"pre": "default", "add_eos_token": False},
    "llama": {
        "add_space_prefix": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    },
}


def tokenizer_of(file: GgufModel) -> Any:
    """The tokenizer of a file, as transformers has them.

    Raises CheckpointError where it has none, or one that bitfold doesn't know.
    """
    transformers = hf.require_transformers()
    prefix = "tokenizer.ggml."
    keys = {
        key.removeprefix(prefix): value.value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    kind = keys.get("model")
    if kind not in _KINDS:
        raise CheckpointError(
            f"the file's tokenizer.ggml.model is {kind!r}, and bitfold knows {', '.join(map(repr, _KINDS))}"
            if kind is not None
            else "the file has no tokenizer"
        )
    keys = _DEFAULTS[kind] | keys
    tokens, types = _tokens(keys)
    backend = _KINDS[kind](keys, tokens, types)
    _add_tokens(backend, tokens, types)
    named = {name: tokens[id] for name, key in _SPECIAL.items() if (id := _id(keys, key, tokens)) is not None}
    begins = keys.get("add_bos_token", kind == "gpt2" and by_name(keys["pre"]).whole)
    ends = {"bos_token": begins, "eos_token": keys["add_eos_token"]}
    _set_ends(backend, [named[name] if wanted and name in named else None for name, wanted in ends.items()])
    template = file.metadata.get("tokenizer.chat_template")
    architecture = file.metadata.get("general.architecture")
    context = file.metadata.get(f"{architecture.value}.context_length") if architecture is not None else None
    more: dict[str, Any] = {} if context is None else {"model_max_length": context.value}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=None if template is None else template.value,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(_SPECIAL) | named | more,
    )


def _tokens(keys: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = keys.get("tokens"), keys.get("token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise CheckpointError("the file has no list of tokens")
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"the file has {len(tokens)} tokens, but not as many token types")
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise CheckpointError(f"the file has the token {twice!r} twice")
    return tokens, types


def _id(keys: Mapping[str, Any], key: str, tokens: Sequence[str]) -> int | None:
    """The id that a key names, None where there is none."""
    id = keys.get(key)
    if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens)):
        raise CheckpointError(f"the file's tokenizer.ggml.{key} is {id!r}, but it has {len(tokens)} tokens")
    return id


# ---- the two kinds of vocabulary ----


def _byte_level(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Any:
    """BPE on bytes. Where a file doesn't say, llama.cpp begins text with BOS if whole words are taken."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    row = by_name(keys["pre"])
    merges = keys.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError("the file has a byte-level tokenizer without merges")
    vocabulary = _numbered(tokens, types)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise CheckpointError(
                f"the file's merge {' '.join(pair)!r} is none of two tokens that make a third"
            )
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


def _sentencepiece(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Any:
    """SentencePiece's BPE: every way to cut a piece in two pieces is a merge, in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = keys.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"the file has {len(tokens)} tokens, but not as many scores")
    vocabulary = _numbered(tokens, types)
    pieces = {text: -scores[id] for text, id in vocabulary.items() if types[id] == TokenType.NORMAL}
    merges = [
        (left, right)
        for text in sorted(pieces, key=pieces.__getitem__)
        for left, right in splits(text)
        if left in pieces and right in pieces
    ]
    unknown = _id(keys, "unknown_token_id", tokens)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    prefix = keys["add_space_prefix"]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


# ---- what they share ----


def _numbered(texts: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The tokens with their ids; rows of the embedding that have no token stay without one."""
    return {
        text: id
        for id, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind != TokenType.UNUSED or text != f"[PAD{id}]"
    }


def _add_tokens(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
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


def _set_ends(backend: Any, ends: Sequence[str | None]) -> None:
    """Let text begin and end with these tokens (None: with no token)."""
    from tokenizers import processors

    begin, end = ends
    one = [*([begin] if begin else []), "$A", *([end] if end else [])]
    two = [*one, *([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])]
    ids = {token: backend.token_to_id(token) for token in ends if token}
    backend.post_processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=list(ids.items())
    )
