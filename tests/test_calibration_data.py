"""Calibration data: documents become rows of tokens, by the seed alone; and what of another text is in them."""

from __future__ import annotations

import hashlib
import json

import pytest
import tiny
import torch
from bitfold.calibration import data, overlap
from bitfold.shards import CheckpointError

LENGTH = 16


def read(source, tokenizer, **changes):
    return data.read(source, tokenizer, **{"samples": 6, "sequence_length": LENGTH, **changes})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(60)))
    return path


def windows(text: str, tokenizer, body: int) -> list[list[int]]:
    """All rows that a single text can be cut into, one token a byte."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


def test_rows_are_pieces_of_the_text_with_bos_in_front(text, tokenizer):
    found = read(text, tokenizer)
    assert found.ids.shape == (6, LENGTH)
    assert found.ids.dtype == torch.int64
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    possible = windows(text.read_text(), tokenizer, LENGTH - 1)
    rows = found.ids[:, 1:].tolist()
    assert all(row in possible for row in rows)
    assert len({tuple(row) for row in rows}) == 6


def test_a_tokenizer_without_bos_gives_rows_of_text_alone(text, tokenizer, monkeypatch):
    plain = tiny.tokenizer()
    plain.bos_token = None
    found = read(text, plain)
    possible = windows(text.read_text(), plain, LENGTH)
    assert all(row in possible for row in found.ids.tolist())


def test_the_seed_decides_alone(text, tokenizer):
    one, again, other = (read(text, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, again.ids)
    assert one.sha256 == again.sha256
    assert not torch.equal(one.ids, other.ids)
    assert one.sha256 != other.sha256


def test_json_lines_and_a_data_set_of_the_same_documents_are_the_same(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"document {i} " * 4, "id": i}) for i in range(30)]
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    one = read(path, tokenizer)
    two = read(f"dataset:{tmp_path / 'set'}", tokenizer)
    assert torch.equal(one.ids, two.ids)
    assert (one.ids == tokenizer.eos_token_id).any()  # between documents
    assert torch.equal(read(f"dataset:{tmp_path / 'set'}:default:train", tokenizer).ids, one.ids)


def test_no_more_of_a_corpus_is_tokenized_than_is_needed(tmp_path, tokenizer):
    seen = []

    class Counting:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, text, **options):
            seen.append(text)
            return tokenizer(text, **options)

    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 4}) for i in range(1000)))
    read(path, Counting())
    assert sum(map(len, seen)) < 6 * LENGTH * (data.STREAM_FACTOR + 1)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {}, "is empty"),
        (" \n ", {}, "is empty"),
        ("a few words of text, and no more", {}, r"32 tokens, enough for 2 samples of 16, not for 6"),
        ("text", {"samples": 0}, "samples is 0"),
        ("text", {"sequence_length": 1}, "sequence_length is 1"),
    ],
)
def test_text_that_will_not_do(content, changes, message, tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(path, tokenizer, **changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('{"content": "x"}', 'line 2 has no "text"'),
        ('["x"]', 'line 2 has no "text"'),
    ],
)
def test_lines_that_will_not_do(line, message, tmp_path, tokenizer):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read(path, tokenizer)


def test_files_that_will_not_do(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "nowhere.txt", tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="byte 3"):
        read(tmp_path / "latin.txt", tokenizer)


def test_data_sets_that_will_not_do(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="can't be read"):
        read(f"dataset:{tmp_path / 'nowhere'}", tokenizer)
    with pytest.raises(ValueError, match="NAME:CONFIG:SPLIT"):
        read("dataset:a:b:c:d", tokenizer)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(ValueError, match=r'columns content; one must be "text"'):
        read(f"dataset:{tmp_path / 'set'}", tokenizer)


# ---- overlap ----


def hashes_by_hand(rows) -> set[int]:
    """The same numbers, one run at a time with Python's integers."""
    kept, mask = set(), (1 << 64) - 1
    for row in rows.tolist():
        for start in range(len(row) - overlap.NGRAM + 1):
            value = 0
            for token in row[start : start + overlap.NGRAM]:
                value = (value * 0x9E3779B97F4A7C15 + token + 1) & mask
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            value ^= value >> 31
            if value % overlap.KEEP_ONE_IN == 0:
                kept.add(value)
    return kept


def test_hashes_are_those_of_all_runs_of_tokens():
    rows = torch.randint(0, 50_000, (4, 200), generator=torch.Generator().manual_seed(0))
    found = overlap.sample_of(rows)
    assert set(found.tolist()) == hashes_by_hand(rows)
    assert 20 < len(found) < 80  # one in 16 of 752


def test_the_share_of_a_text_that_was_seen(tmp_path):
    rows = torch.randint(0, 50_000, (8, 400), generator=torch.Generator().manual_seed(0))
    (tmp_path / overlap.FILE).write_text(json.dumps(overlap.to_json(overlap.sample_of(rows[:4]))))
    assert overlap.share_seen(tmp_path, rows[:4]) == 1
    assert overlap.share_seen(tmp_path, rows[4:]) == 0
    assert overlap.share_seen(tmp_path, rows) == pytest.approx(0.5, abs=0.15)
    assert overlap.share_seen(tmp_path, [torch.cat([rows[5, :100], rows[2, 50:]])]) > 0.5
    assert overlap.share_seen(tmp_path, [rows[0, : overlap.NGRAM - 1]]) is None
    assert overlap.share_seen(tmp_path / "elsewhere", rows) is None


@pytest.mark.parametrize(
    ("change", "message"), [({"ngram": 8}, "another version"), ({"hashes": "???"}, "no readable hashes")]
)
def test_a_file_that_is_not_what_it_must_be(change, message, tmp_path):
    known = overlap.to_json(overlap.sample_of(torch.arange(40)[None]))
    (tmp_path / overlap.FILE).write_text(json.dumps({**known, **change}))
    with pytest.raises(CheckpointError, match=message):
        overlap.share_seen(tmp_path, torch.arange(40)[None])
