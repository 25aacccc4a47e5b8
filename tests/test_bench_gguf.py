"""`bitfold bench` on GGUF blocks, and the scripts that time them beside llama.cpp. No time decides anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold.bench import bars, ceilings, contestants, ggml, peers
from bitfold.bench.cases import decode_cases, encode_cases
from bitfold.bench.run import run
from bitfold.bench.validate import WrongResultError
from test_bench import TIMING, TINY, script
from tiny import one_thread  # noqa: F401


@pytest.fixture
def reader() -> ceilings.Ceiling:
    return dataclasses.replace(ceilings.readers(1 << 20, 1)[0], name="read")


BLOCKS = dataclasses.replace(
    TINY,
    ops=("encode", "importance", "decode", "linear"),
    formats=("q4_0", "q8_0"),
    dtypes=("fp32",),
    peers=(),
)


def test_blocks_are_encoded_with_importance_where_they_search():
    found = run(BLOCKS)
    names = {(row["op"], row["name"]) for row in found["rows"] if row["kind"] == "bitfold"}
    assert names == {
        *((op, name) for op in ("encode", "decode", "linear") for name in ("q4_0", "q8_0")),
        ("importance", "q4_0"),
        *(("linear", f"{name} int8") for name in ("q4_0", "q8_0")),
    }
    assert [verdict["bar"] for verdict in found["bars"]] == [bar.text for bar in bars.BLOCK_BARS]


def test_other_bytes_or_floats_of_a_block_are_an_error(reader):
    right = contestants.bitfold_coder("q4_0")

    def spoiled(weight: torch.Tensor) -> bitfold.QTensor:
        found = right.encode(weight)
        found.planes["blocks"][3, 5] ^= 1
        return found

    other = dataclasses.replace(right, name="other", encode=spoiled)
    with pytest.raises(WrongResultError, match="other and q4_0 encode 1 of 32 rows to other bytes"):
        list(encode_cases(32, 128, [right, other], ["fp32"], reader, TIMING))
    other = dataclasses.replace(right, name="other", decode=lambda q, dtype: -q.decode(dtype))
    with pytest.raises(WrongResultError, match="other and q4_0 decode the same bytes to other floats"):
        list(decode_cases(32, 128, [right, other], ["fp32"], reader, TIMING))


def test_every_block_format_has_its_limit_of_rounding(reader):
    coders = [contestants.bitfold_coder(type) for type in ggml.BLOCK_TYPES]
    ((_, rows),) = encode_cases(4, 256, coders, ["fp32"], reader, TIMING)
    assert {row["name"] for row in rows if row["kind"] == "bitfold"} == set(ggml.BLOCK_TYPES)


def test_the_speed_over_peers_of_the_same_format(reader):
    right = contestants.bitfold_coder("q4_0")
    other = dataclasses.replace(right, name="other", kind="peer")
    stranger = dataclasses.replace(right, name="stranger", kind="peer", format=None)
    ((_, rows),) = encode_cases(32, 128, [right, other, stranger], ["fp32"], reader, TIMING)
    ours, theirs, _ = rows[:3]
    assert ours["over_peer"] == pytest.approx(theirs["ms"]["median"] / ours["ms"]["median"], rel=1e-2)
    assert theirs["over_peer"] is None


def test_absent_llama_cpp_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(ggml.VARIABLE, raising=False)
    ggml.library.cache_clear()
    assert peers.absence("llama.cpp", 1) == f"llama_cpp is not installed, and {ggml.VARIABLE} names no folder"
    monkeypatch.setenv(ggml.VARIABLE, str(tmp_path))
    assert peers.absence("llama.cpp", 1).startswith("no libggml-base.")
    for name in ("base", "cpu"):
        (tmp_path / f"libggml-{name}.{ggml.SUFFIX}").write_text("no library")
    assert peers.absence("llama.cpp", 1).startswith(f"the libraries in {tmp_path} can't be used")


# ---- the repository's scripts ----


def test_the_random_model_is_one(tmp_path):
    """One layer of it: what the benchmarks of whole files begin with."""
    pytest.importorskip("gguf")
    from bitfold.gguf.quantize import plan_gguf
    from bitfold.gguf.reader import read_gguf

    gguf_model = script("gguf_model")
    path = tmp_path / "m.gguf"
    parameters = gguf_model.write(path, layers=1)
    found = read_gguf(path)
    assert parameters == sum(tensor.rows * tensor.columns for tensor in found.tensors.values())
    head = found.tensors["output.weight"].read(0, 100).float()
    assert head.std() == pytest.approx(gguf_model.SPREAD, rel=0.01)
    assert plan_gguf(found, "q4_k_m").bits_per_weight < 6


def test_the_hard_data_is_finite_and_what_it_says():
    gguf_exact = script("gguf_exact")
    torch.manual_seed(0)
    made = {name: make((4, 256)) for name, make in gguf_exact.FAMILIES.items()}
    for name, weight in made.items():
        assert weight.shape == (4, 256), name
        assert weight.dtype == torch.float32, name
        assert bool(weight.isfinite().all()), name
    assert 0 < made["subnormal"].abs().max() < 2**-126
    assert torch.equal(made["bf16 grid"], made["bf16 grid"].bfloat16().float())
    assert bool((made["zeros of both signs"].signbit()).any())
    assert not bool(made["zeros of both signs"].any())


def test_the_memory_of_a_program(tmp_path, monkeypatch):
    """One that takes 64 MB is seen to; one that fails ends the run."""
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")  # scripts import their neighbours
    gguf_file = script("gguf_file")
    output = tmp_path / "out.gguf"
    text = "import sys, time; x = bytearray(64 << 20); open(sys.argv[1], 'w').write('x'); time.sleep(0.2)"
    found = gguf_file.run([gguf_file.sys.executable, "-c", text, str(output)], output, 1)
    assert 64 << 20 < found.anon < 256 << 20
    assert found.seconds > 0.2
    with pytest.raises(SystemExit, match="no such thing"):
        gguf_file.run([gguf_file.sys.executable, "-c", "raise SystemExit('no such thing')"], output, 1)
