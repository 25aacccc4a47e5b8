"""Tokenizers on their way into GGUF files and back: tables, scores, special tokens, and what can't be said."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf_models  # noqa: E402
from bitfold.gguf import sentencepiece  # noqa: E402
from bitfold.gguf.model import GgufModel  # noqa: E402
from bitfold.gguf.pretokenizers import PRE_TOKENIZERS, by_name  # noqa: E402
from bitfold.gguf.tokenizer import read_tokenizer  # noqa: E402
from bitfold.gguf.vocabulary import tokenizer_of  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402
from gguf import GGUFValue, GGUFValueType, TokenType  # noqa: E402
from gguf_models import ROWS, TRICKY, byte_level  # noqa: E402

DATA = Path(__file__).parent / "data" / "gguf"
PIECES = [
    *"abcXYZ019 '.,/_-\t\n",
    "  ",
    "\r\n",
    "'s",
    "'LL",
    "é",
    "É",
    "ß",
    "Ж",
    "я",
    "中",
    "文",
    "🦊",
    "²",
    "½",
]
PIECES += ["\u0301", "\u200d", "\u00a0", "ǅ", "ʰ", "HTTP", "<think>", "<|im_start|>", "५", "…", "가"]


def rebuilt(keys: dict[str, GGUFValue]):
    return tokenizer_of(GgufModel(keys, {}))


def value(keys: dict[str, GGUFValue], name: str):
    return keys[f"tokenizer.ggml.{name}"].value


def saved(path: Path, tokenizer) -> Path:
    tokenizer.save_pretrained(path)
    return path


def change(path: Path, edit) -> None:
    """Edit tokenizer.json."""
    data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(data)
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def texts(count: int) -> list[str]:
    draw = random.Random(7)
    return TRICKY + ["".join(draw.choices(PIECES, k=draw.randint(1, 40))) for _ in range(count)]


# ---- bytes ----


@pytest.mark.parametrize("name", [row.names[0] for row in PRE_TOKENIZERS])
@pytest.mark.parametrize("bos", [True, False])
def test_every_row_of_the_table_comes_back(name, bos, tmp_path):
    original = byte_level(name, bos)
    keys = read_tokenizer(saved(tmp_path, original), ROWS)
    assert (value(keys, "model"), value(keys, "pre")) == ("gpt2", name)
    assert (value(keys, "add_bos_token"), value(keys, "add_eos_token")) == (bos, False)
    again = rebuilt(keys)
    for text in texts(200):
        assert again(text)["input_ids"] == original(text)["input_ids"], text


def test_tokens_have_types_and_special_ones_ids(tmp_path):
    original = byte_level("qwen2")
    keys = read_tokenizer(saved(tmp_path, original), ROWS)
    tokens, types = value(keys, "tokens"), value(keys, "token_type")
    assert len(tokens) == len(types) == ROWS
    kinds = {tokens[id]: TokenType(kind) for id, kind in enumerate(types)}
    assert kinds["<bos>"] == kinds["<|im_start|>"] == TokenType.CONTROL
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert kinds[f"[PAD{ROWS - 1}]"] == TokenType.UNUSED
    assert kinds["Ġ"] == TokenType.NORMAL
    for name in ("bos", "eos"):
        assert value(keys, f"{name}_token_id") == original.convert_tokens_to_ids(f"<{name}>")
    assert value(keys, "padding_token_id") == original.convert_tokens_to_ids("<pad>")
    assert keys["tokenizer.chat_template"].value == original.chat_template


def test_merges_of_both_forms(tmp_path):
    """ "a b" and ["a", "b"]."""
    keys = read_tokenizer(saved(tmp_path, byte_level()), ROWS)
    change(tmp_path, lambda data: data["model"].update(merges=[" ".join(m) for m in data["model"]["merges"]]))
    assert value(read_tokenizer(tmp_path, ROWS), "merges") == value(keys, "merges")
    assert len(value(keys, "merges")) > 100


def test_names_that_files_also_have():
    """Aliases are read, though never written; transformers' own table agrees where both have a name."""
    for row in PRE_TOKENIZERS:
        for name in row.names:
            assert by_name(name) is row
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    agreed = 0
    for row in PRE_TOKENIZERS:
        for name in row.names:
            if name in mapping.GGUF_PRE_TOKENIZER_SPLITS:
                assert mapping.GGUF_PRE_TOKENIZER_SPLITS[name] == row.pattern, name
                agreed += 1
    assert agreed > 5


# ---- SentencePiece ----


@pytest.mark.parametrize(("name", "prefix"), [("llama", True), ("gemma", False)])
def test_tokenizer_model_makes_the_ids_of_the_library(name, prefix, tmp_path):
    """tests/data/gguf/sentencepiece.json has what the sentencepiece library makes of the same models."""
    shutil.copy(DATA / f"sentencepiece-{name}.model", tmp_path / "tokenizer.model")
    keys = read_tokenizer(tmp_path, ROWS)
    assert value(keys, "model") == "llama"
    assert value(keys, "add_space_prefix") == prefix
    assert [value(keys, f"{token}_token_id") for token in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert value(keys, "add_bos_token")
    again = rebuilt(keys)
    known = json.loads((DATA / "sentencepiece.json").read_text(encoding="utf-8"))
    for text, ids in zip(known["texts"], known["ids"][name], strict=True):
        assert again(text)["input_ids"] == [1, *ids], text
    assert len(known["texts"]) > 100


def test_types_and_scores_are_the_models_own(tmp_path):
    shutil.copy(DATA / "sentencepiece-gemma.model", tmp_path / "tokenizer.model")
    keys = read_tokenizer(tmp_path, ROWS)
    tokens, types, scores = (value(keys, name) for name in ("tokens", "token_type", "scores"))
    own = sentencepiece.read_model(DATA / "sentencepiece-gemma.model").pieces
    assert scores[: len(own)] == [piece.score for piece in own]
    assert scores[len(own) :] == [-10000.0] * (ROWS - len(own))
    kinds = {text: TokenType(kind) for text, kind in zip(tokens, types, strict=True)}
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == TokenType.CONTROL
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["\n\n"] == kinds["   "] == TokenType.USER_DEFINED  # found in text as they are, with spaces
    assert kinds["an"] == TokenType.NORMAL


def test_the_model_goes_before_the_merges(tmp_path):
    """Where both files are there, scores are those of tokenizer.model, and added tokens those of tokenizer.json."""
    original = gguf_models.sentencepiece()
    derived = read_tokenizer(saved(tmp_path, original), ROWS)
    shutil.copy(DATA / "sentencepiece-llama.model", tmp_path / "tokenizer.model")
    keys = read_tokenizer(tmp_path, ROWS)
    count = len(sentencepiece.read_model(tmp_path / "tokenizer.model").pieces)
    assert value(keys, "tokens")[259:count] != value(derived, "tokens")[259:count]
    id = original.convert_tokens_to_ids("<think>")
    assert value(keys, "tokens")[id] == "<think>"
    assert value(keys, "token_type")[id] == TokenType.USER_DEFINED


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_derived_from_merges_make_the_same_tokens(prefix, tmp_path):
    """By the naive algorithm: join the two neighbours whose union has the highest score, the leftmost first."""
    original = gguf_models.sentencepiece(prefix, bos=False)
    keys = read_tokenizer(saved(tmp_path, original), ROWS)
    scores = dict(zip(value(keys, "tokens"), value(keys, "scores"), strict=True))
    normal = {
        text
        for text, kind in zip(value(keys, "tokens"), value(keys, "token_type"), strict=True)
        if kind == TokenType.NORMAL
    }
    ids = {text: id for id, text in enumerate(value(keys, "tokens"))}
    for text in texts(100):
        if "<" in text:
            continue  # added tokens are cut out before
        symbols = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
        while True:
            unions = [(a + b, i) for i, (a, b) in enumerate(pairwise(symbols))]
            joined = [(-scores[union], i) for union, i in unions if union in normal]
            if not joined:
                break
            _, i = min(joined)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        found = []
        for symbol in symbols:
            found += (
                [ids[symbol]] if symbol in normal else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            )
        assert original(text)["input_ids"] == found, text
        assert rebuilt(keys)(text)["input_ids"] == found, text


@pytest.mark.parametrize(
    ("scheme", "prefix"),
    [("first", True), ("always", True), ("never", False)],
    ids=["first", "always", "never"],
)
def test_spaces_as_newer_tokenizers_spell_them(scheme, prefix, tmp_path):
    """Metaspace instead of a normalizer: the same file."""
    keys = read_tokenizer(saved(tmp_path, gguf_models.sentencepiece(prefix)), ROWS)
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    change(tmp_path, lambda data: data.update(normalizer=None, pre_tokenizer=space))
    assert read_tokenizer(tmp_path, ROWS) == keys


# ---- what can't be ----


def refusal(path: Path, rows: int = ROWS) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(path, rows)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directories_without_a_word_in_gguf(tmp_path):
    assert "neither tokenizer.json nor tokenizer.model" in refusal(tmp_path)
    saved(tmp_path, byte_level())
    assert "with id 320, but the embedding has 320 rows" in refusal(tmp_path, 320)
    original = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")

    def after(edit) -> str:
        (tmp_path / "tokenizer.json").write_text(original, encoding="utf-8")
        change(tmp_path, edit)
        return refusal(tmp_path)

    pattern = {"Regex": r"\w+|\s"}
    assert "cuts text into the words '\\\\w+|\\\\s'" in after(
        lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern=pattern)
    )
    assert "which is none of gpt-2, llama-bpe" in after(
        lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern=pattern)
    )
    assert "changes text by" in after(lambda data: data.update(normalizer={"type": "Lowercase"}))
    assert "cuts text by" in after(lambda data: data.update(pre_tokenizer={"type": "Whitespace"}))
    assert "has no merges" in after(lambda data: data["model"].update(merges=[]))
    assert "'<bos>' twice" in after(lambda data: data["added_tokens"][1].update(content="<bos>"))
    assert "a tokenizer of the kind Unigram" in after(
        lambda data: data["model"].update(type="Unigram", vocab=[["a", 0.0]])
    )
    assert "can't be read" in after(lambda data: data.pop("model"))


def test_merges_that_scores_cannot_say(tmp_path):
    saved(tmp_path, gguf_models.sentencepiece())
    original = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    merges = json.loads(original)["model"]["merges"]
    several = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    change(tmp_path, lambda data: data["model"]["merges"].pop(several))
    left, right = merges[several]
    assert f"has no merge of {left!r} and {right!r}, though {left + right!r} is a token" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text(original, encoding="utf-8")
    change(tmp_path, lambda data: data["model"]["merges"].append(data["model"]["merges"].pop(several)))
    assert f"has a merge for {left + right!r} behind merges for other tokens" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text(original, encoding="utf-8")
    change(tmp_path, lambda data: data.update(normalizer={"type": "NFKC"}))
    assert "which SentencePiece has no word for" in refusal(tmp_path)


def test_damaged_models_are_one_sentence(tmp_path):
    """Every truncation and many flipped bytes: read, or refused in one sentence."""
    whole = (DATA / "sentencepiece-llama.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    draw = random.Random(3)
    damaged = [whole[:end] for end in range(0, len(whole), 29)]
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(raw))
    messages = []
    for raw in damaged:
        path.write_bytes(raw)
        try:
            sentencepiece.read_model(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > len(damaged) // 4
    assert all(message.startswith(f"{path} is ") and "\n" not in message for message in messages)


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def array(values: list, kind: GGUFValueType) -> GGUFValue:
    return GGUFValue(values, GGUFValueType.ARRAY, kind)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": text("rwkv")}, "tokenizer.ggml.model is 'rwkv'"),
        ({"pre": text("mystery")}, "tokenizer.ggml.pre is 'mystery'"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"token_type": array([1], GGUFValueType.INT32)}, "but 1 token types"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"merges": array(["a b c"], GGUFValueType.STRING)}, "merge 'a b c'"),
        ({"merges": array(["a b"], GGUFValueType.STRING)}, "merge 'a b'"),
        ({"bos_token_id": GGUFValue(ROWS, GGUFValueType.UINT32)}, f"bos_token_id is {ROWS}"),
        ({"tokens": array(["a"] * ROWS, GGUFValueType.STRING)}, "the token 'a' twice"),
    ],
)
def test_files_whose_tokenizer_cannot_be_made(changed, words, tmp_path):
    keys = read_tokenizer(saved(tmp_path, byte_level()), ROWS)
    for name, new in changed.items():
        keys.pop(f"tokenizer.ggml.{name}")
        if new is not None:
            keys[f"tokenizer.ggml.{name}"] = new
    with pytest.raises(CheckpointError) as caught:
        rebuilt(keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_must_be_as_many_as_tokens(tmp_path):
    keys = read_tokenizer(saved(tmp_path, gguf_models.sentencepiece()), ROWS)
    keys["tokenizer.ggml.scores"] = array([0.0], GGUFValueType.FLOAT32)
    with pytest.raises(CheckpointError, match="tokens, but 1 scores"):
        rebuilt(keys)
