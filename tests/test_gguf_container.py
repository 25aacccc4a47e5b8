"""GGUF files: read within bounds, written as a whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import ARRAY, BOOL, F32, STRING, U32, array, pair, raw, string, tensor

gguf = gguf_files.gguf

from bitfold.gguf.layout import TensorInfo, lay_out  # noqa: E402
from bitfold.gguf.reader import read_gguf  # noqa: E402
from bitfold.gguf.scan import read_header  # noqa: E402
from bitfold.gguf.writer import GgufWriter, check_target_file  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402

Kind = gguf.GGUFValueType
Type = gguf.GGMLQuantizationType


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def rewrite(source: Path, target: Path, **options) -> None:
    """Read a file and write what was read."""
    model = read_gguf(source)
    infos = [TensorInfo(one.name, one.shape, one.type) for one in model.tensors.values()]
    with GgufWriter(target, lay_out(model.metadata, infos), **options) as writer:
        for one in model.tensors.values():
            for row in range(one.rows):
                writer.write(one.name, one.read(row, row + 1))
        writer.commit()


# ---- reading and writing ----

VALUES = {
    "u8": (200, Kind.UINT8),
    "i8": (-100, Kind.INT8),
    "u16": (60000, Kind.UINT16),
    "i16": (-30000, Kind.INT16),
    "u32": (4_000_000_000, Kind.UINT32),
    "i32": (-2_000_000_000, Kind.INT32),
    "u64": (2**64 - 1, Kind.UINT64),
    "i64": (-(2**63), Kind.INT64),
    "f32": (0.1, Kind.FLOAT32),
    "f64": (0.1, Kind.FLOAT64),
    "yes": (True, Kind.BOOL),
    "no": (False, Kind.BOOL),
    "text": ("Grüße, 世界\n", Kind.STRING),
}


def all_values(path: Path) -> Path:
    """A file with a value of every type, an array of every type, and a tensor of every plain type and of two blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in VALUES.items():
        writer.add_key_value(key, value, kind)
        writer.add_key_value(f"array.{key}", [value] * 3, Kind.ARRAY, kind)
    writer.add_key_value("nested", [[1, 2], [3], [4, 5, 6]], Kind.ARRAY)
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(np.dtype(dtype).name, (100 * rng.normal(size=(3, 7))).astype(dtype))
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("stack", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("blocks", rng.integers(0, 255, (4, 3 * 34), dtype=np.uint8), raw_dtype=Type.Q8_0)
    writer.add_tensor("other", rng.integers(0, 255, (2, 66), dtype=np.uint8), raw_dtype=Type.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_type_of_value(tmp_path):
    model = read_gguf(all_values(tmp_path / "a.gguf"))
    for key, (value, kind) in VALUES.items():
        expected = struct.unpack("f", struct.pack("f", value))[0] if kind == Kind.FLOAT32 else value
        found = model.metadata[key]
        assert (found.value, found.type, found.sub_type) == (expected, kind, None), key
        found = model.metadata[f"array.{key}"]
        assert (found.value, found.type, found.sub_type) == ([expected] * 3, Kind.ARRAY, kind), key
    nested = model.metadata["nested"]
    assert nested.sub_type == Kind.ARRAY
    assert [inner.value for inner in nested.value] == [[1, 2], [3], [4, 5, 6]]
    keys = gguf_files.keys_of(tmp_path / "a.gguf")
    assert list(model.metadata) == keys


def test_every_type_of_tensor(tmp_path):
    path = all_values(tmp_path / "a.gguf")
    model = read_gguf(path)
    expected = gguf_files.tensors_of(path)
    assert list(model.tensors) == list(expected)
    for name, (kind, shape, content) in expected.items():
        found = model.tensors[name]
        assert (found.type.name, found.shape) == (kind, shape), name
        assert found.read(0, found.rows).numpy().tobytes() == content, name
        stride = len(content) // found.rows
        middle = found.read(found.rows // 2, found.rows)
        assert middle.numpy().tobytes() == content[found.rows // 2 * stride :], name
    assert model.tensors["float16"].read(1, 3).dtype == torch.float16
    assert model.tensors["float16"].read(1, 3).shape == (2, 7)
    assert model.tensors["blocks"].read(0, 4).shape == (4, 102)
    assert model.tensors["vector"].read(0, 1).tolist() == [[0, 1, 2, 3, 4]]
    assert model.tensors["stack"].read(3, 4).tolist() == [[12, 13, 14, 15]]
    with pytest.raises(IndexError, match="rows 2 to 4 of 'float16', which has 3"):
        model.tensors["float16"].read(2, 4)


def test_what_is_read_and_written_again_is_the_same_file(tmp_path):
    path = all_values(tmp_path / "a.gguf")
    rewrite(path, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    path = gguf_files.write_llama(tmp_path / "c.gguf")
    rewrite(path, tmp_path / "d.gguf")
    assert (tmp_path / "d.gguf").read_bytes() == path.read_bytes()


def test_strings_that_are_no_utf8_survive(tmp_path):
    broken = b"\xff\xfe half of \xe4\xb8"
    content = raw(
        [pair("text", STRING, string(broken)), pair("list", ARRAY, array(STRING, 1, string(broken)))]
    )
    rewrite(save(tmp_path / "a.gguf", content), tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == content


def test_empty_strings_and_arrays_survive(tmp_path):
    content = raw(
        [pair("text", STRING, string("")), pair("list", ARRAY, array(F32, 0)), pair("", U32, bytes(4))]
    )
    rewrite(save(tmp_path / "a.gguf", content), tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == content


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 4096])
def test_alignment(alignment, tmp_path):
    key = pair("general.alignment", U32, struct.pack("<I", alignment))
    tensors, data = [], b""
    for i in range(3):
        data += bytes(-len(data) % alignment)
        tensors.append(tensor(f"t{i}", (3,), offset=len(data)))
        data += np.full(3, i, np.float32).tobytes()
    data += bytes(-len(data) % alignment)
    path = save(tmp_path / "a.gguf", raw([key], tensors, data, alignment=alignment))
    assert read_gguf(path).tensors["t2"].read(0, 1).tolist() == [[2, 2, 2]]
    rewrite(path, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_version_2_is_read(tmp_path):
    path = save(tmp_path / "a.gguf", raw([], [tensor("t", (2,))], bytes(32), version=2))
    assert read_gguf(path).tensors["t"].shape == (2,)


def test_a_large_vocabulary_takes_no_time(tmp_path):
    tokens = b"".join(string(f"token{i}") for i in range(128_000))
    path = save(tmp_path / "a.gguf", raw([pair("tokens", ARRAY, array(STRING, 128_000, tokens))]))
    start = time.perf_counter()
    model = read_gguf(path)
    seconds = time.perf_counter() - start
    assert model.metadata["tokens"].value[127_999] == "token127999"
    assert seconds < 5, "some 0.1 s on a machine that does nothing else"


# ---- files that are split ----


def test_split_files_are_one_model(tmp_path):
    whole = gguf_files.write_llama(tmp_path / "whole.gguf")
    gguf_files.write_llama(tmp_path / "m.gguf", split_tensors=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 5
    model, expected = read_gguf(parts[0]), read_gguf(whole)
    assert model.metadata == expected.metadata
    assert list(model.tensors) == list(expected.tensors)
    assert model.files == tuple(parts)
    for name, one in expected.tensors.items():
        assert torch.equal(model.tensors[name].read(0, one.rows), one.read(0, one.rows)), name


def test_split_files_that_are_no_model(tmp_path):
    gguf_files.write_llama(tmp_path / "m.gguf", split_tensors=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    with pytest.raises(
        CheckpointError, match=r"00002-of-00005.gguf is no first file of a model; give .*00001-of"
    ):
        read_gguf(parts[1])
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(
        CheckpointError, match=r"one of 5 files of a model; its name must end in -00001-of-00005"
    ):
        read_gguf(renamed)
    renamed.rename(parts[0])
    content = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(
        CheckpointError, match=r"00003-of-00005.gguf is to be part 2 of 5 by its name, but has split.no 1"
    ):
        read_gguf(parts[0])
    parts[2].write_bytes(content)
    parts[4].unlink()
    with pytest.raises(CheckpointError, match=r"00005-of-00005.gguf is missing"):
        read_gguf(parts[0])


# ---- bad files ----

LONG = 1 << 40
BAD = {
    "empty": (b"", "empty, no GGUF file"),
    "magic": (raw(magic=b"GGML"), "begins with b'GGML'"),
    "short magic": (b"GG", "begins with b'GG'"),
    "version 1": (raw(version=1), "version is 1; it must be 2 or 3"),
    "version 4": (raw(version=4), "version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3) + bytes(7), "the number of tensors needs 8 bytes at 8, where 7"),
    "pairs": (raw(pair_count=LONG), f"header of {LONG} key/value pairs"),
    "tensors": (raw(tensor_count=LONG), f"header of {LONG} tensors"),
    "one pair too many": (raw([pair("a", U32, bytes(4))], pair_count=3), "needs 4 bytes at 94, where 2 are left"),
    "key": (raw([struct.pack("<Q", LONG)]), "the key of pair 1 needs"),
    "string": (raw([pair("a", STRING, struct.pack("<Q", LONG))]), f"'a' needs {LONG} bytes"),
    "value type": (raw([pair("a", 13, bytes(8))]), "'a' has the type 13"),
    "element type": (raw([pair("a", ARRAY, array(99, 1, bytes(8)))]), "'a' has the type 99"),
    "bool": (raw([pair("a", BOOL, b"\2")]), "'a' is a truth value of 2"),
    "bools": (raw([pair("a", ARRAY, array(BOOL, 3, b"\0\1\7"))]), "'a' is a truth value of 7"),
    "array of numbers": (raw([pair("a", ARRAY, array(F32, LONG))]), f"'a', an array of {LONG} elements"),
    "array of strings": (raw([pair("a", ARRAY, array(STRING, LONG))]), f"'a', an array of {LONG} elements"),
    "array of 2^64 - 1": (raw([pair("a", ARRAY, array(U32, 2**64 - 1))]), "an array of 18446744073709551615"),
    "array of arrays": (raw([pair("a", ARRAY, array(ARRAY, LONG))]), f"'a', an array of {LONG} elements"),
    "a string in an array": (
        raw([pair("a", ARRAY, array(STRING, 2, string("x") + struct.pack("<Q", LONG)))]),
        "'a' has 2 strings, and number 1 goes beyond the end",
    ),
    "arrays in arrays": (raw([pair("a", ARRAY, array(ARRAY, 1) * 9 + array(U32, 0))]), "1 arrays in an array, 4 deep"),
    "many arrays in an array": (
        raw([pair("a", ARRAY, array(ARRAY, 70_000, array(U32, 0) * 70_000))]), "70000 arrays in an array"),
    "a key twice": (raw([pair("a", U32, bytes(4))] * 2), "the key 'a' is there twice"),
    "alignment 0": (raw([pair("general.alignment", U32, bytes(4))]), "'general.alignment' is 0"),
    "alignment 24": (raw([pair("general.alignment", U32, struct.pack("<I", 24))]), "is 24; it must be a power of two"),
    "alignment as text": (raw([pair("general.alignment", STRING, string("32"))]), "has the type STRING"),
    "tensor name": (raw([], [struct.pack("<Q", LONG) + bytes(40)]), "the name of tensor 0 needs"),
    "a tensor twice": (raw([], [tensor("t", (1,))] * 2, bytes(64)), "the tensor 't' is there twice"),
    "dimensions": (raw([], [tensor("t", (1,) * 5)], bytes(32)), "'t' has 5 dimensions"),
    "2^32 - 1 dimensions": (
        raw([], [string("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]), "'t' has 4294967295 dimensions"),
    "dimension 0": (raw([], [tensor("t", (4, 0))], bytes(32)), r"a dimension of 0 in \[0, 4\]"),
    "tensor type": (raw([], [tensor("t", (32,), 77)], bytes(32)), "the tensor type 77"),
    "removed type": (raw([], [tensor("t", (32,), 4)], bytes(32)), "the tensor type 4"),
    "rows": (raw([], [tensor("t", (33,), 8)], bytes(64)), "'t' is Q8_0 with rows of 33"),
    "product": (raw([], [tensor("t", (2**40, 2**40))], bytes(32)), "'t' ends at byte"),
    "product of 2^64": (raw([], [tensor("t", (2**63, 2))], bytes(32)), "'t' ends at byte"),
    "offset": (raw([], [tensor("t", (8,), offset=1 << 62)], bytes(32)), "'t' ends at byte"),
    "odd offset": (raw([], [tensor("t", (2,), offset=4)], bytes(32)), "offset 4; it must be a multiple of 32"),
    "overlap": (raw([], [tensor("t", (16,)), tensor("u", (8,), offset=32)], bytes(64)), "'t' and 'u' overlap"),
    "same place": (raw([], [tensor("t", (8,)), tensor("u", (8,))], bytes(64)), "overlap"),
    "data": (raw([], [tensor("t", (8,))], bytes(31)), "'t' ends at byte .* the file at"),
}  # fmt: skip


@pytest.fixture
def peak():
    """A function that says how many bytes Python and numpy held at most so far."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case, tmp_path, peak):
    content, words = BAD[case]
    path = save(tmp_path / "bad.gguf", content)
    before = peak()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf(path)
    seconds = time.perf_counter() - start
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 400
    assert seconds < 5
    assert peak() - before < 1 << 20, "nothing is made before it is known to be there"


def test_not_even_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x.gguf is missing"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is no file; it must be a GGUF file"):
        read_gguf(tmp_path)


def test_truncation_anywhere(tmp_path):
    content = gguf_files.write_llama(tmp_path / "a.gguf", layers=1, hidden=32, ffn=32, vocab=4).read_bytes()
    for length in [*range(0, 2000, 7), *range(2000, len(content) - 32, 997)]:
        with pytest.raises(CheckpointError):
            read_header(Path("cut"), content[:length])


def mutations(content: bytes, count: int, seed: int, header: int):
    """Copies with some bytes of the header changed, in one place or a few, cut, or with numbers blown up."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            at = rng.randrange(header)
            kind = rng.randrange(5)
            if kind == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                changed[at] = rng.randrange(256)
            elif kind == 2:
                changed[at : at + 8] = struct.pack(
                    "<Q", rng.choice((LONG, 2**63, 2**64 - 1, rng.randrange(1 << 32)))
                )
            elif kind == 3:
                del changed[at : at + rng.randrange(1, 16)]
            else:
                changed[at:at] = rng.randbytes(rng.randrange(1, 16))
        if rng.randrange(8) == 0:
            del changed[rng.randrange(len(changed)) :]
        yield bytes(changed)


def what_reading_says(path: Path) -> str:
    """The error of reading a file and all of its tensors, "" if there is none."""
    try:
        for one in read_gguf(path).tensors.values():
            one.read(0, one.rows).view(torch.uint8).sum()
    except CheckpointError as error:
        return str(error)
    return ""


def survive(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Read so many mutations, and all tensors of those that are still files: how many were refused and read."""
    content = gguf_files.write_llama(path, layers=1, hidden=32, ffn=32, vocab=8).read_bytes()
    header = len(content) - sum(len(data) for _, _, data in gguf_files.tensors_of(path).values())
    refused = passed = 0
    for changed in mutations(content, count, seed, header):
        save(path, changed)
        message = what_reading_says(path)
        assert "\n" not in message.replace(str(path), ""), "one sentence"
        refused, passed = refused + bool(message), passed + (not message)
    return refused, passed


def test_mutated_files_are_refused_or_read(tmp_path, peak):
    refused, passed = survive(tmp_path / "m.gguf", 3000, seed=1)
    assert refused > 1000
    assert passed > 100, "some bytes are but letters of names"
    assert peak() < 8 << 20


@pytest.mark.slow
def test_many_mutated_files(tmp_path):
    for seed in range(2, 12):
        survive(tmp_path / "m.gguf", 4000, seed)


# ---- writing ----


def small_layout() -> tuple:
    metadata = {"general.architecture": gguf.GGUFValue("llama", Kind.STRING)}
    return lay_out(metadata, [TensorInfo("a", (2, 8), Type.F32), TensorInfo("b", (3,), Type.F32)])


def write_pieces(target: Path, pieces: list[tuple[str, int]], *, before=None, **options) -> None:
    """Write so many ones of each; before: called before the end."""
    with GgufWriter(target, small_layout(), **options) as writer:
        for name, count in pieces:
            writer.write(name, torch.ones(count))
        if before is not None:
            before()
        writer.commit()


def write_small(target: Path, **options) -> None:
    write_pieces(target, [("a", 8), ("a", 8), ("b", 3)], **options)


def test_layout_says_what_is_written(tmp_path):
    write_small(tmp_path / "a.gguf")
    layout = small_layout()
    assert (tmp_path / "a.gguf").stat().st_size == layout.nbytes
    assert layout.nbytes % 32 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    found = gguf_files.tensors_of(tmp_path / "a.gguf")
    assert found["b"] == ("F32", (3,), np.ones(3, np.float32).tobytes())


@pytest.mark.parametrize("pieces", [[("b", 3)], [("a", 8), ("b", 3)], [("a", 17)], [("a", 16), ("a", 1)]])
def test_tensors_come_in_order_and_whole(pieces, tmp_path):
    with pytest.raises(RuntimeError, match="bytes of"):
        write_pieces(tmp_path / "a.gguf", pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_committed_half(tmp_path):
    with pytest.raises(RuntimeError, match="'b' and what follows were not written"):
        write_pieces(tmp_path / "a.gguf", [("a", 16)])
    assert list(tmp_path.iterdir()) == []


def test_values_that_their_types_cannot_hold():
    for value, kind in (
        (300, Kind.UINT8),
        (-1, Kind.UINT32),
        ("x", Kind.FLOAT32),
        (3, Kind.STRING),
        (7, Kind.ARRAY),
    ):
        metadata = {
            "general.architecture": gguf.GGUFValue("llama", Kind.STRING),
            "key": gguf.GGUFValue(value, kind),
        }
        with pytest.raises(ValueError, match=f"the value of 'key' is no {kind.name}"):
            lay_out(metadata, [])


def test_a_long_name_is_refused():
    metadata = {"general.architecture": gguf.GGUFValue("llama", Kind.STRING)}
    with pytest.raises(CheckpointError, match="a name of 64 bytes; GGUF allows 63"):
        lay_out(metadata, [TensorInfo("a" * 64, (1,), Type.F32)])


def test_an_existing_target(tmp_path):
    path = tmp_path / "a.gguf"
    write_small(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"a.gguf exists already; --force"):
        write_small(path)
    write_small(path, force=True)
    assert path.read_bytes() == before
    path.write_text("a diary")
    with pytest.raises(CheckpointError, match="exists and is no GGUF file, so it is not overwritten"):
        write_small(path, force=True)
    assert path.read_text() == "a diary"
    with pytest.raises(CheckpointError, match="exists and is no file"):
        check_target_file(tmp_path, force=True)


def test_an_interrupt_leaves_nothing_and_what_was_there(tmp_path):
    path = tmp_path / "a.gguf"
    write_small(path)
    before = path.read_bytes()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_small(path, force=True, before=interrupt)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]


def test_an_error_of_the_writing_thread_is_told(tmp_path, monkeypatch):
    def fail(fd: int, offset: int, data: bytes) -> None:
        if offset > 0:  # the header is written
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitfold.gguf.writer.write_at", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_small(tmp_path / "a.gguf")
    assert caught.value.filename == str(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_comes_into_being_is_not_overwritten(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="has come into being"):
        write_small(path, before=lambda: path.write_text("a diary"))
    assert path.read_text() == "a diary"
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]


def test_a_full_disk_is_said_at_the_start(tmp_path):
    metadata = {"general.architecture": gguf.GGUFValue("llama", Kind.STRING)}
    huge = lay_out(metadata, [TensorInfo("a", (1 << 30, 1 << 20), Type.F32)])
    with pytest.raises(CheckpointError, match="MB are free"), GgufWriter(tmp_path / "a.gguf", huge):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_missing_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught:
        write_small(tmp_path / "file" / "a.gguf")
    assert str(tmp_path / "file" / "a.gguf") == caught.value.filename


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from test_gguf_container import small_layout
from bitfold.gguf.writer import GgufWriter
from pathlib import Path
with GgufWriter(Path({target!r}), small_layout(), force=True) as writer:
    writer.write("a", torch.zeros(2, 8))
    os.kill(os.getpid(), signal.{signal})
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_removes_the_rest(there, tmp_path):
    path = tmp_path / "a.gguf"
    if there:
        write_small(path)
    code = KILLED.format(tests=str(Path(__file__).parent), target=str(path), signal="SIGKILL")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == there
    left = [one for one in tmp_path.iterdir() if one != path]
    assert len(left) == 1, "the killed run was to leave its partial file"
    assert left[0].name.startswith(".a.gguf.partial-")
    with GgufWriter(path, small_layout(), force=True) as busy:
        write_small(path, force=True)  # removes what nobody holds, not what another run is writing
        assert len(list(tmp_path.iterdir())) == 2
        busy.write("a", torch.zeros(2, 8))
        busy.write("b", torch.zeros(3))
        busy.commit()
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]
