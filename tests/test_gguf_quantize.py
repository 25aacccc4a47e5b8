"""Models quantized into GGUF files: to llama-quantize's bytes, in little memory, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import bitfold
import gguf_files
import numpy as np
import pytest
import torch
from command import call, call_json
from tiny import one_thread  # noqa: F401

gguf = gguf_files.gguf

from bitfold.gguf import mixes, quantize  # noqa: E402
from bitfold.gguf.assign import Overrides, in_file_order  # noqa: E402
from bitfold.gguf.imatrix_file import read_importance  # noqa: E402
from bitfold.gguf.importance import Importance  # noqa: E402
from bitfold.gguf.quantize import facts_of, plan_gguf, quantize_gguf  # noqa: E402
from bitfold.gguf.reader import read_gguf  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo" / "model"
DATA = Path(__file__).parent / "data" / "gguf"
DIGESTS = json.loads((DATA / "demo-files.json").read_text())
Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return gguf_files.write_llama(tmp_path_factory.mktemp("source") / "f16.gguf")


def digest(path: Path) -> str:
    """As tests/data/gguf/README.md has it."""
    total = hashlib.sha256()
    for name, (kind, shape, content) in gguf_files.tensors_of(path).items():
        total.update(f"{name} {kind} {list(shape)}\n".encode() + content)
    return total.hexdigest()


def floats_of(path: Path) -> dict[str, np.ndarray]:
    """The weights of an unquantized file in float32."""
    return {
        name: gguf.quants.dequantize(
            np.frombuffer(content, np.uint8 if kind == "BF16" else {"F16": "<f2", "F32": "<f4"}[kind]), Kind[kind]
        ).reshape(shape)
        for name, (kind, shape, content) in gguf_files.tensors_of(path).items()
    }  # fmt: skip


# ---- bytes ----


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not beside the tests")
@pytest.mark.parametrize("key", DIGESTS)
def test_files_of_the_demo_model_are_llama_quantizes(key, tmp_path):
    mix, _, weighed = key.partition("+")
    importance = read_importance(DATA / "demo-imatrix.gguf") if weighed else None
    summary = quantize_gguf(DEMO, tmp_path / "q.gguf", mix, importance=importance)
    assert digest(tmp_path / "q.gguf") == DIGESTS[key]
    assert summary.plan.file_bytes == (tmp_path / "q.gguf").stat().st_size


@pytest.mark.parametrize("mix", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_plain_blocks_are_those_of_the_gguf_package(mix, dtype, tmp_path):
    """Its quantizers, in numpy, are an oracle of their own."""
    source = gguf_files.write_llama(
        tmp_path / "s.gguf", layers=1, hidden=96, ffn=160, heads=3, kv_heads=1, dtype=dtype
    )
    quantize_gguf(source, tmp_path / "q.gguf", mix, Overrides(pure=True))
    before = floats_of(source)
    for name, (kind, shape, content) in gguf_files.tensors_of(tmp_path / "q.gguf").items():
        assert kind == ("F32" if len(shape) == 1 else mix), name
        expected = before[name] if kind == "F32" else gguf.quants.quantize(before[name], Kind[mix])
        assert content == expected.tobytes(), name


@pytest.mark.parametrize("before", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("after", ["F32", "F16", "BF16"])
def test_floats_are_rounded_to_nearest_even(before, after, tmp_path):
    source = gguf_files.write_llama(tmp_path / "s.gguf", layers=1, hidden=32, ffn=64, dtype=before)
    quantize_gguf(source, tmp_path / "q.gguf", after)
    weights = floats_of(source)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, (kind, shape, content) in gguf_files.tensors_of(tmp_path / "q.gguf").items():
        assert kind == ("F32" if len(shape) == 1 else after)
        expected = torch.from_numpy(weights[name]).to(dtypes[kind])
        assert content == expected.view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q2_K", "Q8_0"])
def test_pieces_make_no_difference(mix, llama, tmp_path, monkeypatch):
    quantize_gguf(llama, tmp_path / "whole.gguf", mix)
    for values in (1, 700, 5000):
        monkeypatch.setattr(quantize, "PIECE", values)
        quantize_gguf(llama, tmp_path / f"{values}.gguf", mix)
        assert (tmp_path / f"{values}.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_split_files_make_the_same_file(llama, tmp_path):
    gguf_files.write_llama(tmp_path / "s.gguf", split_tensors=4)
    quantize_gguf(llama, tmp_path / "one.gguf", "q4_k_m")
    quantize_gguf(tmp_path / "s-00001-of-00006.gguf", tmp_path / "many.gguf", "q4_k_m")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_each_expert_goes_by_its_own_importance(tmp_path):
    source = gguf_files.write_llama(tmp_path / "s.gguf", layers=1, hidden=256, ffn=256, experts=3)
    name = "blk.0.ffn_up_exps.weight"
    means = torch.rand(3, 256) + 0.1
    quantize_gguf(
        source, tmp_path / "q.gguf", "q4_k_s", importance=Importance("i", {name: means.reshape(-1)})
    )
    weights = torch.from_numpy(floats_of(source)[name])
    expected = [
        bitfold.encode(weights[expert], "q4_k", importance=means[expert]).planes["blocks"]
        for expert in range(3)
    ]
    found = gguf_files.tensors_of(tmp_path / "q.gguf")
    assert found[name][2] == torch.stack(expected).numpy().tobytes()
    quantize_gguf(source, tmp_path / "p.gguf", "q4_k_s")
    plain = gguf_files.tensors_of(tmp_path / "p.gguf")
    assert {one for one in found if found[one] != plain[one]} == {name}, "all others have none"


# ---- metadata ----


def test_metadata_is_kept_and_says_what_was_done(llama, tmp_path):
    quantize_gguf(llama, tmp_path / "q.gguf", "q4_k_m")
    before, after = read_gguf(llama).metadata, read_gguf(tmp_path / "q.gguf").metadata
    replaced = ["general.quantization_version", "general.file_type"]
    kept = [key for key in before if key not in replaced]
    assert list(after) == [*kept, *replaced]
    assert all(after[key] == before[key] for key in kept)
    assert [(after[key].type.name, after[key].value) for key in replaced] == [("UINT32", 2), ("UINT32", 15)]


def test_metadata_of_importance(llama, tmp_path):
    path = "somewhere/" + "é" * 100
    importance = Importance(path, {"blk.0.attn_q.weight": torch.ones(256)}, "texts.txt", 7)
    quantize_gguf(llama, tmp_path / "q.gguf", "q4_0", importance=importance)
    metadata = read_gguf(tmp_path / "q.gguf").metadata
    found = {key: (value.type.name, value.value) for key, value in list(metadata.items())[-4:]}
    assert found == {
        "quantize.imatrix.file": ("STRING", path.encode()[:127].decode("utf-8", "surrogateescape")),
        "quantize.imatrix.dataset": ("STRING", "texts.txt"),
        "quantize.imatrix.entries_count": ("UINT32", 1),
        "quantize.imatrix.chunks_count": ("UINT32", 7),
    }
    unknown = Importance("i", importance.means)
    quantize_gguf(llama, tmp_path / "r.gguf", "q4_0", importance=unknown)
    assert list(read_gguf(tmp_path / "r.gguf").metadata)[-2:] == [
        "quantize.imatrix.file",
        "quantize.imatrix.entries_count",
    ]


def test_tensors_lie_in_the_order_of_the_layers(tmp_path):
    source = gguf_files.write_llama(tmp_path / "s.gguf", layers=11, hidden=32, ffn=32)
    quantize_gguf(source, tmp_path / "q.gguf", "q8_0")
    names = list(gguf_files.tensors_of(tmp_path / "q.gguf"))
    assert names == in_file_order(gguf_files.tensors_of(source))
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert names[-1] == "blk.10.ffn_up.weight"


def value(number: object, kind: str = "UINT32"):
    sub = gguf.GGUFValueType.UINT32 if kind == "ARRAY" else None
    return gguf.GGUFValue(number, gguf.GGUFValueType[kind], sub)


def test_facts_of_layers_that_differ():
    """Numbers of heads may be lists, one for each layer; the rules go by the first."""
    metadata = {
        "general.architecture": value("deci", "STRING"),
        "deci.block_count": value(3),
        "deci.attention.head_count": value([32, 16, 8], "ARRAY"),
        "deci.attention.head_count_kv": value([8, 0, 4], "ARRAY"),
        "deci.expert_count": value(4),
    }
    facts = facts_of(metadata)
    assert (facts.architecture, facts.layers, facts.sharing, facts.experts) == ("deci", 3, 4, 4)
    del metadata["deci.attention.head_count_kv"]
    assert facts_of(metadata).sharing == 1
    metadata["deci.attention.head_count_kv"] = value([0, 8], "ARRAY")
    assert facts_of(metadata).sharing == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": None}, "has no general.architecture"),
        ({"llama.block_count": None}, "has no 'llama.block_count'"),
        (
            {"llama.block_count": value("two", "STRING")},
            "'llama.block_count' .* is no whole number but 'two'",
        ),
        ({"llama.attention.head_count": value(1.5, "FLOAT32")}, "is no whole number but '1.5'"),
    ],
)
def test_metadata_that_does_not_say_enough(change, words, llama):
    metadata = {**read_gguf(llama).metadata, **change}
    with pytest.raises(CheckpointError, match=words):
        facts_of({key: one for key, one in metadata.items() if one is not None})


# ---- plan and report ----


@pytest.mark.parametrize("mix", mixes.MIXES)
def test_the_plan_is_what_is_written(mix, tmp_path):
    source = gguf_files.write_llama(tmp_path / "s.gguf", layers=2, hidden=256, ffn=320)
    names = [
        name
        for name, shape in ((n, s) for n, (_, s, _) in gguf_files.tensors_of(source).items())
        if len(shape) > 1
    ]
    wide = {name: torch.ones(320 if "ffn_down" in name else 256) for name in names}
    importance = Importance("i", wide) if mix == "Q2_K_S" else None
    plan = plan_gguf(source, mix, importance=importance)
    assert not (tmp_path / "q.gguf").exists()
    seen = []
    summary = quantize_gguf(
        source, tmp_path / "q.gguf", mix, importance=importance, progress=lambda *done: seen.append(done)
    )
    assert summary.plan == plan
    assert plan.file_bytes == (tmp_path / "q.gguf").stat().st_size
    written = gguf_files.tensors_of(tmp_path / "q.gguf")
    assert [(choice.name, choice.after, choice.shape) for choice in plan.choices] == [
        (name, kind, shape) for name, (kind, shape, _) in written.items()
    ]
    total = sum(len(content) for _, _, content in written.values())
    assert plan.tensor_bytes == sum(made.bytes_after for made in summary.tensors) == total
    assert plan.bits_per_weight == pytest.approx(8 * total / plan.parameters)
    assert summary.bytes_before == seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_errors_are_measured_where_asked(llama, tmp_path):
    summary = quantize_gguf(llama, tmp_path / "q.gguf", "q4_k_m", measure=True)
    weights = floats_of(llama)
    written = gguf_files.tensors_of(tmp_path / "q.gguf")
    for made in summary.tensors:
        name = made.choice.name
        if not made.choice.quantized:
            assert made.relative_rmse is None
            continue
        kind, shape, content = written[name]
        blocks = np.frombuffer(content, np.uint8).reshape(shape[0], -1)
        got = gguf.quants.dequantize(blocks, Kind[kind]).astype(np.float64)
        source = weights[name].astype(np.float64)
        expected = np.linalg.norm(got - source) / np.linalg.norm(source)
        assert made.relative_rmse == pytest.approx(expected, rel=1e-5)
    plain = quantize_gguf(llama, tmp_path / "p.gguf", "q4_k_m")
    assert {made.relative_rmse for made in plain.tensors} == {None}


# ---- sources that are quantized already ----


def test_what_is_quantized_is_not_quantized_again_unasked(llama, tmp_path):
    once = tmp_path / "q8.gguf"
    quantize_gguf(llama, once, "q8_0")
    with pytest.raises(CheckpointError, match=r"'output.weight' is Q8_0 already; .* --allow-requantize"):
        quantize_gguf(once, tmp_path / "q4.gguf", "q4_0")
    assert not (tmp_path / "q4.gguf").exists()
    quantize_gguf(once, tmp_path / "q4.gguf", "q4_0", Overrides(pure=True), allow_requantize=True)
    before, after = gguf_files.tensors_of(once), gguf_files.tensors_of(tmp_path / "q4.gguf")
    for name, (kind, shape, content) in before.items():
        if kind == "Q8_0":
            blocks = np.frombuffer(content, np.uint8).reshape(shape[0], -1)
            decoded = gguf.quants.dequantize(blocks, Kind.Q8_0)
            assert after[name][2] == gguf.quants.quantize(decoded, Kind.Q4_0).tobytes(), name
    quantize_gguf(once, tmp_path / "f32.gguf", "f32", allow_requantize=True)
    assert {kind for kind, _, _ in gguf_files.tensors_of(tmp_path / "f32.gguf").values()} == {"F32"}


def test_tensors_that_have_their_type_are_copied(llama, tmp_path):
    quantize_gguf(llama, tmp_path / "a.gguf", "q4_k_m")
    quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_types_that_cannot_be_decoded_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 66), np.uint8), raw_dtype=Kind.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"is IQ2_XXS, which bitfold can't decode to make it Q4_0"):
        quantize_gguf(tmp_path / "s.gguf", tmp_path / "q.gguf", "q4_0", allow_requantize=True)


# ---- what can't be ----


def spoil(tensor: str, row: int, column: int, number: float):
    def change(name: str, values: np.ndarray) -> np.ndarray:
        if name == tensor:
            values.reshape(-1, values.shape[-1])[row, column] = number
        return values

    return change


@pytest.mark.parametrize(
    ("tensor", "row", "number", "mix", "words"),
    [
        (
            "blk.1.ffn_up.weight",
            300,
            np.nan,
            "q4_k_m",
            "'blk.1.ffn_up.weight' holds nan in row 300, column 7",
        ),
        ("blk.1.ffn_up.weight", 300, np.inf, "q8_0", "'blk.1.ffn_up.weight' holds inf in row 300, column 7"),
        ("output_norm.weight", 0, np.nan, "q4_k_m", "'output_norm.weight' holds nan in row 0, column 7"),
        ("blk.0.attn_q.weight", 5, 1e10, "q4_k_m", "'blk.0.attn_q.weight', rows 4 to 5, can't be Q4_K: "),
        ("blk.0.attn_q.weight", 5, 1e10, "f16", "'blk.0.attn_q.weight' holds inf as F16 in row 5, column 7"),
    ],
)
def test_weights_that_have_no_place_in_their_type(tensor, row, number, mix, words, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "PIECE", 512)  # two rows
    change = spoil(tensor, row, 7, number)
    source = gguf_files.write_llama(tmp_path / "s.gguf", dtype="F32", change=change)
    with pytest.raises(ValueError, match=words) as caught:
        quantize_gguf(source, tmp_path / "q.gguf", mix)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]


def test_experts_of_numbers_below_mxfp4_are_zeros(tmp_path):
    """As in llama-quantize's files, down to the exponents that wrap; above 2^-126 neither has a word for them."""

    def experts(size: float):
        def change(name: str, values: np.ndarray) -> np.ndarray:
            if name == "blk.0.ffn_up_exps.weight":
                values[1, 5, 32:64] = size
            return values

        return gguf_files.write_llama(tmp_path / f"{size}.gguf", dtype="BF16", experts=2, change=change)

    quantize_gguf(experts(2.0**-130), tmp_path / "q.gguf", "mxfp4_moe")
    kind, _, blocks = gguf_files.tensors_of(tmp_path / "q.gguf")["blk.0.ffn_up_exps.weight"]
    assert kind == "MXFP4"
    row = np.frombuffer(blocks, np.uint8).reshape(2, 512, -1, 17)[1, 5]
    assert row[1].tolist() == [256 - 5] + 16 * [0]
    assert row[[0, 2], 1:].any(axis=1).all()
    with pytest.raises(
        ValueError, match=r"'blk.0.ffn_up_exps.weight', .* can't be MXFP4: .* mxfp4 can't hold"
    ):
        quantize_gguf(experts(2.0**-126), tmp_path / "r.gguf", "mxfp4_moe")


def test_damaged_blocks_are_not_copied(llama, tmp_path):
    quantize_gguf(llama, tmp_path / "a.gguf", "q8_0")
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    _, _, blocks = gguf_files.tensors_of(tmp_path / "a.gguf")["blk.0.attn_q.weight"]
    content[content.index(blocks) : content.index(blocks) + 2] = b"\x00\x7e"  # a scale that is no number
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' holds nan in row 0, column 0"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")


def test_q2_k_s_needs_importance(llama, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Q2_K_S needs importance \(--imatrix\) .* 'blk.0.attn_k.weight'"
    ):
        plan_gguf(llama, "q2_k_s")


def test_the_source_is_not_overwritten(llama, tmp_path):
    copy = tmp_path / "m.gguf"
    copy.write_bytes(llama.read_bytes())
    (tmp_path / "link.gguf").symlink_to(copy)
    for target in (copy, tmp_path / "link.gguf"):
        with pytest.raises(CheckpointError, match=r"is the model to quantize; choose another output"):
            quantize_gguf(copy, target, "q8_0", force=True)
    assert copy.read_bytes() == llama.read_bytes()


# ---- a Hugging Face directory ----


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not beside the tests")
def test_a_directory_and_its_gguf_make_the_same_file(tmp_path):
    quantize_gguf(DEMO, tmp_path / "f16.gguf", "f16")
    quantize_gguf(DEMO, tmp_path / "direct.gguf", "q4_k_m")
    quantize_gguf(tmp_path / "f16.gguf", tmp_path / "twice.gguf", "q4_k_m")
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "twice.gguf").read_bytes()


# ---- memory and kills ----

MEMORY = """
import threading, time
from bitfold.gguf.quantize import quantize_gguf
import torch
torch.set_num_threads(1)
def anon():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0])
quantize_gguf({warm!r}, {target!r}, {mix!r}, force=True)  # what is made once: threads, tables, arenas
before, peak, done = anon(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anon())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
quantize_gguf({source!r}, {target!r}, {mix!r}, force=True)
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("mix", ["q8_0", "f32"])
def test_memory_does_not_grow_with_the_model(mix, tmp_path):
    """A model of 150 MB, some of its matrices of 64 MB: a few pieces of 4 M weights are held, none of it all."""
    source = gguf_files.write_llama(tmp_path / "s.gguf", layers=1, hidden=2048, ffn=8192, vocab=1000)
    assert source.stat().st_size > 120e6
    warm = gguf_files.write_llama(tmp_path / "w.gguf", layers=1, hidden=256, ffn=256)
    code = MEMORY.format(warm=str(warm), source=str(source), target=str(tmp_path / "q.gguf"), mix=mix)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bytes_of_a_piece = quantize.PIECE * {"q8_0": 34 / 32, "f32": 4}[mix]
    assert int(done.stdout) * 1024 < 8 * bytes_of_a_piece + (32 << 20)


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
import bitfold.gguf.quantize as quantize
from bitfold.cli import main
convert = quantize._convert
def die(choice, piece):
    if choice.name == "blk.1.attn_q.weight":
        os.kill(os.getpid(), signal.{signal})
    return convert(choice, piece)
quantize._convert = die
sys.argv = ["bitfold", "quantize", {source!r}, {target!r}, "--recipe", "q8_0", *{more!r}]
main()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_what_was_there(name, there, llama, tmp_path):
    target = tmp_path / "q.gguf"
    if there:
        quantize_gguf(llama, target, "q4_0")
    before = target.read_bytes() if there else None
    code = KILLED.format(signal=name, source=str(llama), target=str(target), more=["--force"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}[name], done.stderr
    assert (target.read_bytes() if target.exists() else None) == before
    left = [path for path in tmp_path.iterdir() if path != target]
    assert len(left) == (1 if name == "SIGKILL" else 0)
    quantize_gguf(llama, target, "q8_0", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


# ---- the command ----


def test_the_command_and_its_dry_run_say_the_same(llama, tmp_path, capsys):
    target = tmp_path / "q.gguf"
    planned = call_json(capsys, "quantize", llama, target, "--recipe", "q4_k_m", "--dry-run")
    assert not target.exists()
    made = call_json(capsys, "quantize", llama, target, "--recipe", "q4_k_m", "--errors")
    assert made["file_bytes"] == planned["file_bytes"] == target.stat().st_size
    assert [one["name"] for one in planned["tensors"]] == list(gguf_files.tensors_of(target))
    for one, other in zip(planned["tensors"], made["tensors"], strict=True):
        assert one.items() <= other.items()
        assert (other["relative_rmse"] is None) == (not one["quantized"])
    code, out, _ = call(capsys, "quantize", llama, "--recipe", "q4_k_m", "--dry-run")
    assert code == 0
    assert f"a file of {planned['file_bytes']:,} bytes" in " ".join(out.split())
    assert re.search(r"^blk\.\*\.attn_v\.weight +1 +128 x 256 +F16 +Q6_K", out, re.MULTILINE)
    assert "Nothing was written" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_says_fallbacks(tmp_path, capsys):
    source = gguf_files.write_llama(tmp_path / "s.gguf", hidden=96, ffn=100)
    code, out, _ = call(capsys, "quantize", source, tmp_path / "q.gguf")
    assert code == 0
    assert "wanted as Q4_K are Q5_0: Q4_K has blocks of 256, which rows of 96 are no multiple of" in " ".join(
        out.split()
    )
    assert "is F16: " in " ".join(out.split())


def test_options_of_the_command(llama, tmp_path, capsys):
    arguments = ("--recipe", "q4_0", "--tensor-type", "attn_q=q8_0", "--tensor-type", "attn=q5_1",
                 "--token-embedding-type", "q6_k", "--output-tensor-type", "f16")  # fmt: skip
    call_json(capsys, "quantize", llama, tmp_path / "q.gguf", *arguments)
    kinds = {name: kind for name, (kind, _, _) in gguf_files.tensors_of(tmp_path / "q.gguf").items()}
    assert kinds["blk.1.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.attn_v.weight"] == "Q5_1"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q6_K", "F16")
    call_json(
        capsys, "quantize", llama, tmp_path / "r.gguf", "--recipe", "Q6_K", "--pure", "--leave-output-tensor"
    )
    kinds = {name: kind for name, (kind, _, _) in gguf_files.tensors_of(tmp_path / "r.gguf").items()}
    assert kinds["output.weight"] == "F16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("{s}", "{t}/q.gguf", "--recipe", "int4-g128"),
            "'int4-g128' is no file type of GGUF; it must be one of q2_k",
        ),
        (("{s}", "{t}/q", "--recipe", "q4_k_m"), "q4_k_m is a file type of GGUF: name the output {t}/q.gguf"),
        (("{s}", "{t}/q"), "{s} is no directory of a model; of a GGUF file another can be made"),
        (("{s}", "--recipe", "q8_0"), "OUT is missing; name the file to make"),
        (("{s}", "{s}", "--recipe", "q8_0", "--force"), "is the model to quantize"),
        (("{t}/none.gguf", "{t}/q.gguf"), "{t}/none.gguf is missing"),
        (("{t}", "{t}/q.gguf"), "{t}/config.json is missing"),
        (("{s}", "{t}/q.gguf", "--clamp"), "--clamp is given; a GGUF file has no use for it"),
        (("{t}", "{t}/q", "--pure"), "--pure is given, which is for GGUF files: name the output OUT.gguf"),
        (("{t}", "{t}/q", "--tensor-type", "a=q8_0"), "--tensor-type is given, which is for GGUF"),
        (("{s}", "{t}/q.gguf", "--tensor-type", "q8_0"), "--tensor-type is 'q8_0'; it must be PATTERN=TYPE"),
        (("{s}", "{t}/q.gguf", "--output-tensor-type", "q9"), "the type of the output is 'q9'"),
        (("{s}", "{t}/q.gguf", "--imatrix", "{t}/none.dat"), "{t}/none.dat is missing"),
        (("{s}", "{t}/q.gguf", "--imatrix", "{s}"), "{s} is a GGUF file, but no importance file"),
    ],
)
def test_bad_commands(arguments, words, llama, tmp_path, capsys):
    places = {"s": llama, "t": tmp_path}
    code, out, err = call(capsys, "quantize", *(text.format(**places) for text in arguments))
    assert (code, out) == (2, "")
    assert words.format(**places) in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_inspect(llama, capsys):
    data = call_json(capsys, "inspect", llama)
    assert data["file_type"] == "F16"
    assert data["metadata"]["llama.block_count"] == 2
    assert data["metadata"]["tokenizer.ggml.tokens"] == {
        "array_of": "STRING",
        "count": 64,
        "first": ["<0>é", "<1>é", "<2>é", "<3>é"],
    }
    found = {one["name"]: (one["format"], tuple(one["shape"]), one["nbytes"]) for one in data["entries"]}
    expected = gguf_files.tensors_of(llama)
    assert found == {name: (kind, shape, len(content)) for name, (kind, shape, content) in expected.items()}
    code, out, _ = call(capsys, "inspect", llama)
    assert code == 0
    assert "tokenizer.ggml.tokens" in out
    assert "(file type F16)" in out


def test_inspect_knows_a_gguf_file_by_its_content(llama, tmp_path, capsys):
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(llama.read_bytes())
    assert call_json(capsys, "inspect", blob)["file_type"] == "F16"


def test_environment_is_not_needed_for_a_dry_run(llama):
    """Neither transformers nor tokenizers are imported for a GGUF file, whatever the command."""
    script = (
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['tokenizers'] = None\n"
        "from bitfold.cli.app import run\n"
        f"sys.exit(run(['quantize', {str(llama)!r}, '--recipe', 'q4_k_m', '--dry-run']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
