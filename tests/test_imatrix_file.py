"""Importance files, sound and damaged, in both forms that llama-imatrix writes."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bitfold.gguf.imatrix import Entry, Imatrix
from bitfold.gguf.imatrix_file import read_imatrix, read_importance, write_imatrix
from bitfold.shards import CheckpointError
from cases import refusal
from refusals import listing
from tiny import one_thread  # noqa: F401

DATA = Path(__file__).parent / "data" / "gguf"
FORMS = (".gguf", ".dat")


# ---- files ----


def some_imatrix() -> Imatrix:
    generator = torch.Generator().manual_seed(1)

    def entry(experts: int, columns: int) -> Entry:
        sums = torch.rand(experts, columns, generator=generator) * 100
        return Entry(sums, torch.randint(1, 500, (experts,), generator=generator))

    entries = {"blk.0.attn_q.weight": entry(1, 32), "blk.0.ffn_up_exps.weight": entry(5, 64)}
    return Imatrix(entries, ("some text", "another"), 7, 256)


@pytest.mark.parametrize("form", FORMS)
def test_llama_imatrix_files_are_written_as_they_were(form, tmp_path):
    """The GGUF form comes back byte for byte, and the older one is made of it as llama-imatrix makes it."""
    imatrix = read_imatrix(DATA / "demo-imatrix.gguf")
    assert imatrix.datasets == ("heldout-40000.txt",)
    write_imatrix(tmp_path / f"again{form}", imatrix)
    assert (tmp_path / f"again{form}").read_bytes() == (DATA / f"demo-imatrix{form}").read_bytes()


def test_both_forms_of_llama_imatrix_say_the_same():
    new, old = (read_importance(DATA / f"demo-imatrix{form}") for form in FORMS)
    assert (new.dataset, new.chunks) == (old.dataset, old.chunks) == ("heldout-40000.txt", 12)
    assert list(new.means) == list(old.means)
    assert len(new.means) == 28
    for name, means in new.means.items():
        assert torch.allclose(means, old.means[name], rtol=3e-7, atol=0)


def test_round_trip(tmp_path):
    imatrix = some_imatrix()
    write_imatrix(tmp_path / "a.gguf", imatrix)
    again = read_imatrix(tmp_path / "a.gguf")
    assert (again.datasets, again.chunks, again.chunk_size) == (imatrix.datasets, 7, 256)
    assert list(again.entries) == list(imatrix.entries)
    for name, entry in imatrix.entries.items():
        assert torch.equal(again.entries[name].sums, entry.sums)
        assert torch.equal(again.entries[name].counts, entry.counts)
    write_imatrix(tmp_path / "a.dat", imatrix)
    older = read_imatrix(tmp_path / "a.dat")
    assert (older.datasets, older.chunks) == (("some text",), 7)
    for name, entry in imatrix.entries.items():
        assert torch.allclose(older.entries[name].mean().reshape(entry.sums.shape), entry.mean(), rtol=2e-7)


def test_importance_is_the_mean_in_binary32(tmp_path):
    imatrix = some_imatrix()
    write_imatrix(tmp_path / "a.gguf", imatrix)
    means = read_importance(tmp_path / "a.gguf").means
    for name, entry in imatrix.entries.items():
        sums, counts = entry.sums.numpy(), entry.counts.numpy().astype(np.float32)
        assert (means[name].numpy() == sums / counts[:, None]).all()


def legacy(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, len(values))]
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + tail


def test_the_older_form_without_calls_or_tail(tmp_path):
    """Files of the first versions end behind the entries; no calls means that values are means."""
    (tmp_path / "a.dat").write_bytes(legacy((b"a", 0, [1, 2]), (b"b", -3, [4]), (b"c", 4, [4, 8])))
    importance = read_importance(tmp_path / "a.dat")
    assert (importance.dataset, importance.chunks) == ("", 0)
    assert {name: means.flatten().tolist() for name, means in importance.means.items()} == {
        "a": [1, 2],
        "b": [4],
        "c": [1, 2],
    }


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    for form in FORMS:
        target = tmp_path / f"a{form}"
        with monkeypatch.context() as patch:
            patch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
            with pytest.raises(OSError, match="no space") as caught:
                write_imatrix(target, some_imatrix())
        assert caught.value.filename == str(target)
        assert listing(tmp_path) == []


def test_existing_targets(tmp_path):
    imatrix = some_imatrix()
    for form in FORMS:
        target = tmp_path / f"a{form}"
        write_imatrix(target, imatrix)
        refusal(lambda t=target: write_imatrix(t, imatrix), "exists already", "force", error=CheckpointError)
        write_imatrix(target, imatrix, force=True)
        read_imatrix(target)
        target.write_bytes(b"something else")
        refusal(
            lambda t=target: write_imatrix(t, imatrix, force=True), "no importance", error=CheckpointError
        )
        assert target.read_bytes() == b"something else"
    for name in ("a.bin", "a", "a.GGUF"):
        refusal(lambda name=name: write_imatrix(tmp_path / name, imatrix), r"\.gguf", r"\.dat")


# ---- damaged files ----


def refused(path: Path, *needles: str) -> None:
    refusal(lambda: read_imatrix(path), *needles, error=CheckpointError)


def one(sums: list[list[float]], counts: list[int]) -> Imatrix:
    return Imatrix({"blk.0.x.weight": Entry(torch.tensor(sums), torch.tensor(counts))}, ("t",), 1, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_numbers(form, value, tmp_path):
    write_imatrix(tmp_path / f"a{form}", one([[1.0, value, 1.0]], [1]))
    refused(tmp_path / f"a{form}", "column 1", r"blk\.0\.x\.weight", "finite")


@pytest.mark.parametrize("form", FORMS)
def test_zero_importance(form, tmp_path):
    write_imatrix(tmp_path / f"a{form}", one([[0.0, 0.0]], [3]))
    refused(tmp_path / f"a{form}", "zero importance", r"blk\.0\.x\.weight")


def test_zero_importance_of_one_expert(tmp_path):
    write_imatrix(tmp_path / "a.gguf", one([[1.0], [0.0], [0.0]], [3, 0, 4]))
    refused(tmp_path / "a.gguf", "zero importance", "expert 2", r"blk\.0\.x\.weight")


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        (b"", ["4 bytes at 0"]),
        (b"\1\2", ["no importance file"]),
        (legacy(), ["no tensor"]),
        (struct.pack("<i", -5), ["no tensor"]),
        (struct.pack("<i", 2**31 - 1), ["entry 0"]),
        (struct.pack("<iii", 1, 2**31 - 1, 0), ["2147483647"]),
        (struct.pack("<ii", 1, -1), ["-1"]),
        (struct.pack("<iicii", 1, 1, b"a", 1, 2**31 - 1), ["importance of 'a'"]),
        (struct.pack("<iicii", 1, 1, b"a", 1, -1), ["'a'"]),
        (legacy((b"a", 1, [])), ["'a'", "without values"]),
        (legacy((b"a", 1, [1]), (b"a", 1, [1])), ["'a'", "twice"]),
        (legacy((b"a", 1, [1]), tail=b"\1"), ["number of chunks"]),
        (legacy((b"a", 1, [1]), tail=struct.pack("<ii", 1, 9)), ["data set"]),
        (b"just some text that is no importance file at all", ["no importance file"]),
    ],
)
def test_damaged_older_files(content, needles, tmp_path):
    (tmp_path / "a.dat").write_bytes(content)
    refused(tmp_path / "a.dat", "a.dat", *needles)


def test_no_file(tmp_path):
    refused(tmp_path / "none.gguf", "missing")
    refused(tmp_path, "directory")


def write_gguf(path: Path, metadata: dict | None = None, tensors: dict | None = None) -> None:
    """A GGUF file made by the gguf package. metadata: what differs from an importance file's, None to leave it out."""
    fields = {
        "general.type": "imatrix",
        "imatrix.datasets": ["t"],
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": 8,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    ones = np.ones((1, 4), np.float32)
    for name, array in (tensors or {"a.in_sum2": ones, "a.counts": ones[:, :1]}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_the_gguf_package(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    assert read_imatrix(tmp_path / "a.gguf").entries["a"].sums.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("metadata", "needle"),
    [
        ({"general.type": "model"}, "general.type"),
        ({"general.type": None}, "general.type"),
        ({"imatrix.datasets": None}, "imatrix.datasets"),
        ({"imatrix.datasets": [1, 2]}, "imatrix.datasets"),
        ({"imatrix.chunk_count": None}, "imatrix.chunk_count"),
        ({"imatrix.chunk_size": "8"}, "imatrix.chunk_size"),
    ],
)
def test_gguf_files_with_other_metadata(metadata, needle, tmp_path):
    write_gguf(tmp_path / "a.gguf", metadata)
    refused(tmp_path / "a.gguf", "a.gguf", needle)


SUMS, COUNTS = np.ones((2, 4), np.float32), np.ones((2, 1), np.float32)


@pytest.mark.parametrize(
    ("tensors", "needle"),
    [
        ({"a.in_sum2": SUMS}, "without 'a.counts'"),
        ({"a.counts": COUNTS}, "'a.counts'"),
        ({"a.in_sum2": SUMS, "a.counts": COUNTS, "b": SUMS}, "'b'"),
        ({"a.in_sum2": SUMS, "a.counts": COUNTS[:1]}, "1 counts for 2 rows"),
        ({"a.in_sum2": SUMS.astype(np.float16), "a.counts": COUNTS}, "F16"),
        ({"a.in_sum2": SUMS[None].repeat(2, 0), "a.counts": COUNTS}, r"\[2, 2, 4\]"),
        ({"a.in_sum2": SUMS, "a.counts": COUNTS * np.float32("nan")}, "count for 'a'"),
        ({"a.in_sum2": SUMS, "a.counts": -COUNTS}, "count for 'a'"),
        ({"a.in_sum2": SUMS, "a.counts": COUNTS * np.float32(1e30)}, "count for 'a'"),
    ],
)
def test_gguf_files_with_other_tensors(tensors, needle, tmp_path):
    write_gguf(tmp_path / "a.gguf", tensors=tensors)
    refused(tmp_path / "a.gguf", needle)


@pytest.mark.parametrize("form", FORMS)
def test_any_damage_is_a_sentence(form, tmp_path, rng):
    """Cut anywhere, or with bytes changed: a sentence, or numbers that are sound."""
    write_imatrix(tmp_path / f"whole{form}", some_imatrix())
    whole = (tmp_path / f"whole{form}").read_bytes()
    path = tmp_path / f"a{form}"
    refusals = 0
    for trial in range(600):
        data = bytearray(whole)
        if trial < 150:
            data = data[: int(rng.integers(len(whole)))]
        else:
            reach = 200 if trial % 2 else len(data)  # most of what can go wrong lies at the front
            for at in rng.integers(0, reach, rng.integers(1, 5)):
                data[at] = rng.integers(256) if trial % 3 else data[at] ^ (1 << rng.integers(8))
        path.write_bytes(data)
        try:
            imatrix = read_imatrix(path)
        except CheckpointError as error:
            message, imatrix = str(error), Imatrix({})
            refusals += 1
            assert "\n" not in message
        for entry in imatrix.entries.values():
            assert entry.mean().isfinite().all()
            assert (entry.mean() >= 0).all()
    assert refusals > 200
