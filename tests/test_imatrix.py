"""Importance: measured by running a model, against numpy and against llama-imatrix; its files, sound and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import bitfold
import gguf
import gguf_models
import numpy as np
import oracle_gguf
import pytest
import tiny
import torch
from bitfold import hf
from bitfold.gguf.imatrix import Entry, Imatrix
from bitfold.gguf.imatrix_file import read_imatrix, read_importance, write_imatrix
from bitfold.gguf.quantize import read_model
from bitfold.gguf.reader import read_gguf
from bitfold.imatrix import chunks_of, measure
from bitfold.shards import CheckpointError
from cases import refusal
from command import call, call_json
from numpy_llama import Inputs, forward
from oracle_gguf_encode import encode as oracle_encode
from test_bad_input import check_sentence, listing
from tiny import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

DATA = Path(__file__).parent / "data" / "gguf"
DEMO = Path(__file__).parent.parent / "examples" / "demo"
FORMS = (".gguf", ".dat")


def mixtral(experts: int = 4) -> torch.nn.Module:
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def expected(model, chunks, weights: dict[str, np.ndarray] | None = None) -> Inputs:
    weights = weights or {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    inputs = Inputs()
    for ids in chunks:
        forward(ids.numpy(), weights, model.config, inputs)
    return inputs


def assert_measured(imatrix: Imatrix, wanted: Inputs, names: set[str], tolerance: float = 2e-5) -> None:
    assert list(imatrix.entries) == sorted(names)
    for name, entry in imatrix.entries.items():
        assert entry.sums.dtype == torch.float32
        for expert, count in enumerate(entry.counts.tolist()):
            assert count == wanted.counts[name].get(expert, 0), f"{name}, expert {expert}"
            sums = wanted.sums[name].get(expert, np.zeros(entry.sums.shape[1]))
            np.testing.assert_allclose(entry.sums[expert].numpy(), sums, rtol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


# ---- chunks ----


def test_chunks_begin_with_bos_and_drop_what_is_left(tokenizer):
    text = tiny.TEXT[:200]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 201
    assert ids[0] == 0
    chunks = chunks_of(text, tokenizer, chunk_size=50)
    assert len(chunks) == 4
    for i, chunk in enumerate(chunks):
        assert chunk.tolist() == [0, *ids[50 * i + 1 : 50 * i + 50]]
    assert len(chunks_of(text, tokenizer, chunk_size=50, max_chunks=3)) == 3
    assert len(chunks_of(text, tokenizer, chunk_size=201)) == 1


def test_chunks_without_bos():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    ids = tokenizer(tiny.TEXT[:120])["input_ids"]
    chunks = chunks_of(tiny.TEXT[:120], tokenizer, chunk_size=50)
    assert torch.cat(chunks).tolist() == ids[:100]


def test_bad_chunks(tokenizer):
    refusal(lambda: chunks_of("short", tokenizer, chunk_size=50), "6 tokens", "50")
    refusal(lambda: chunks_of("short", tokenizer, chunk_size=1), "chunk_size is 1")
    refusal(lambda: chunks_of("short", tokenizer, max_chunks=-1), "max_chunks is -1")


# ---- measuring ----


LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SPARSE = (*LAYER[:4], "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def names_of(layers: int, kinds: tuple[str, ...]) -> set[str]:
    return {f"blk.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_llama(tokenizer, tied, head):
    model = tiny.llama(tied=tied)
    chunks = chunks_of(tiny.TEXT, tokenizer, chunk_size=40, max_chunks=5)
    told = []
    imatrix = measure(
        model, chunks, dataset="fox", head=head, progress=lambda done, total: told.append((done, total))
    )
    assert (imatrix.datasets, imatrix.chunks, imatrix.chunk_size) == (("fox",), 5, 40)
    assert told == [(i, 5) for i in range(1, 6)]
    names = names_of(2, LAYER) | ({"output.weight"} if head and not tied else set())
    assert_measured(imatrix, expected(model, chunks), names)
    assert imatrix.entries["blk.0.attn_q.weight"].counts.tolist() == [200]


def test_experts(tokenizer):
    """transformers keeps them as one stack; the file too, and with how many tokens each of them saw."""
    model = mixtral()
    before = model.config._experts_implementation
    chunks = chunks_of(tiny.TEXT, tokenizer, chunk_size=40, max_chunks=3)
    imatrix = measure(model, chunks)
    assert_measured(imatrix, expected(model, chunks), names_of(2, SPARSE), tolerance=1e-4)
    counts = imatrix.entries["blk.1.ffn_down_exps.weight"].counts
    assert counts.sum() == 2 * 120
    assert counts.unique().numel() > 1
    assert imatrix.entries["blk.0.ffn_down_exps.weight"].sums.shape == (4, 96)
    assert model.config._experts_implementation == before


def test_an_expert_that_saw_no_token_counts_every_column_alike(tokenizer, tmp_path):
    model = mixtral(experts=32)
    imatrix = measure(model, [torch.tensor([5, 6, 7])])
    entry = imatrix.entries["blk.0.ffn_up_exps.weight"]
    idle = entry.counts == 0
    assert idle.any()
    assert (entry.mean()[idle] == 1).all()
    assert not (entry.mean()[~idle] == 1).all()
    for form in FORMS:
        write_imatrix(tmp_path / f"idle{form}", imatrix)
        means = read_importance(tmp_path / f"idle{form}").means["blk.0.ffn_up_exps.weight"]
        assert torch.equal(means.reshape(32, 64), entry.mean())


def test_quantized_model(tokenizer, tmp_path):
    """Inputs of QuantLinear layers, from the decoded weights."""
    tiny.write_llama(tmp_path / "model", torch.float32)
    bitfold.quantize_checkpoint(tmp_path / "model", tmp_path / "small", "int8")
    model = bitfold.load(tmp_path / "small")
    chunks = chunks_of(tiny.TEXT, tokenizer, chunk_size=40, max_chunks=2)
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, bitfold.QuantLinear):
            weights[f"{name}.weight"] = module.qtensor.decode().double().numpy()
    assert_measured(measure(model, chunks), expected(model, chunks, weights), names_of(2, LAYER))
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks are left behind"


def test_half_precision(tokenizer):
    model = tiny.llama(dtype=torch.bfloat16)
    chunks = chunks_of(tiny.TEXT, tokenizer, chunk_size=40, max_chunks=2)
    assert_measured(measure(model, chunks), expected(model, chunks), names_of(2, LAYER), tolerance=0.1)


def test_what_is_not_finite_is_an_error():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    refusal(lambda: measure(model, [torch.arange(9)]), r"blk\.1\.attn_[kqv]\.weight", "float32")


def test_no_chunks_are_an_error():
    refusal(lambda: measure(tiny.llama(), []), "chunks is empty")


def test_other_architectures_are_an_error():
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    refusal(lambda: measure(model, [torch.arange(9)]), "gpt2", "llama", error=CheckpointError)


def test_the_demo_model_is_measured_as_llama_imatrix_does(tmp_path, capsys):
    """Its float32 sums are 5e-6 away: it sums in float32 itself."""
    text = tmp_path / "text.txt"
    text.write_bytes((DEMO / "heldout.txt").read_bytes()[:40000])
    sizes = ["--chunk-size", 128, "--max-chunks", 12, "--dtype", "float32"]
    call_json(capsys, "imatrix", DEMO / "model", "--text", text, "-o", tmp_path / "demo.gguf", *sizes)
    ours, theirs = read_imatrix(tmp_path / "demo.gguf"), read_imatrix(DATA / "demo-imatrix.gguf")
    assert list(ours.entries) == list(theirs.entries)
    assert (ours.chunks, ours.chunk_size) == (theirs.chunks, theirs.chunk_size)
    for name, entry in theirs.entries.items():
        assert torch.equal(ours.entries[name].counts, entry.counts)
        assert torch.allclose(ours.entries[name].sums, entry.sums, rtol=2e-5, atol=0), name


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


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imatrix")
    tiny.write_llama(path / "model", torch.float32)
    (path / "text.txt").write_text(tiny.TEXT)
    return path


def test_command(folder, tmp_path, capsys):
    options = ["--text", folder / "text.txt", "--chunk-size", 40]
    result = call_json(capsys, "imatrix", folder / "model", *options, "-o", tmp_path / "a.gguf")
    assert (result["entries"], result["chunks"], result["chunk_size"]) == (14, 24, 40)
    imatrix = read_imatrix(tmp_path / "a.gguf")
    assert imatrix.datasets == (str(folder / "text.txt"),)
    model = tiny.llama()
    chunks = chunks_of(tiny.TEXT, tiny.tokenizer(), chunk_size=40)
    assert_measured(imatrix, expected(model, chunks), names_of(2, LAYER))
    more = ["-o", tmp_path / "b.dat", "--head", "--max-chunks", 2]
    code, out, _ = call(capsys, "imatrix", folder / "model", *options, *more)
    assert code == 0
    assert "15 matrices" in out
    assert "2 chunks of 40 tokens" in out
    assert "output.weight" in read_imatrix(tmp_path / "b.dat").entries


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"--chunk-size": 5000}, ["961 tokens", "5000"]),
        ({"--chunk-size": 0}, ["chunk_size is 0"]),
        ({"--max-chunks": -1}, ["max_chunks is -1"]),
        ({"-o": "a.bin"}, ["a.bin", ".gguf", ".dat"]),
        ({"--text": "none.txt"}, ["none.txt"]),
        ({"--dtype": "int8"}, ["--dtype", "int8"]),
    ],
)
def test_bad_commands(folder, tmp_path, capsys, options, parts):
    given = {"--text": folder / "text.txt", "-o": "a.gguf", "--chunk-size": 40, **options}
    if "a." in str(given["-o"]):
        given["-o"] = tmp_path / given["-o"]
    arguments = [part for pair in given.items() for part in pair]
    code, out, err = call(capsys, "imatrix", folder / "model", *arguments)
    assert (code, out) == (2, "")
    check_sentence(err, *parts)
    assert listing(tmp_path) == []


def test_the_command_replaces_nothing_unasked(folder, tmp_path, capsys):
    target = tmp_path / "a.gguf"
    arguments = ["imatrix", folder / "model", "--text", folder / "text.txt", "--chunk-size", 40, "-o", target]
    target.write_bytes(b"GGUF but broken")
    code, _, err = call(capsys, *arguments, "--force")
    assert code == 2
    check_sentence(err, "no importance file")
    assert target.read_bytes() == b"GGUF but broken"
    target.unlink()
    call_json(capsys, *arguments)
    before = target.read_bytes()
    code, _, err = call(capsys, *arguments, "--max-chunks", 1)
    assert code == 2
    check_sentence(err, "exists already")
    assert target.read_bytes() == before
    call_json(capsys, *arguments, "--max-chunks", 1, "--force")
    assert target.read_bytes() != before


# ---- what quantizing makes of it ----


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose rows are whole blocks of 256, and its importance in both forms."""
    path = tmp_path_factory.mktemp("wide")
    gguf_models.write_directory(path / "model", "llama", hidden_size=256, intermediate_size=256)
    model, tokenizer = hf.load_causal_lm(path / "model"), hf.load_tokenizer(path / "model")
    chunks = chunks_of(tiny.TEXT, tokenizer, chunk_size=30, max_chunks=3)
    imatrix = measure(model, chunks, dataset="fox")
    for form in FORMS:
        write_imatrix(path / f"imatrix{form}", imatrix)
    return path


@pytest.mark.parametrize("recipe", ["q4_k_m", "q3_k_m", "iq4_xs", "q4_0", "q5_1"])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_files_weigh_by_it(wide, form, recipe, tmp_path, capsys):
    """Every tensor has the bytes that the oracle finds with the mean squares of the file."""
    importance = wide / f"imatrix{form}"
    call_json(
        capsys, "quantize", wide / "model", tmp_path / "a.gguf", "--recipe", recipe, "--imatrix", importance
    )
    source, made = read_model(wide / "model"), read_gguf(tmp_path / "a.gguf")
    means = read_importance(importance).means
    weighed = 0
    for name, tensor in made.tensors.items():
        kind = tensor.type.name.lower()
        if kind not in oracle_gguf.LAYOUTS:
            continue
        w = source.tensors[name].read(0, tensor.rows).float().numpy()
        q = means[name].reshape(-1).numpy() if name in means else None
        assert (tensor.read(0, tensor.rows).numpy() == oracle_encode(w, kind, q)).all(), f"{name} in {kind}"
        weighed += q is not None
    assert weighed == 14
    values = {key: value.value for key, value in made.metadata.items()}
    assert values["quantize.imatrix.file"] == str(importance)[:127]
    assert values["quantize.imatrix.dataset"] == "fox"
    assert values["quantize.imatrix.entries_count"] == 14
    assert values["quantize.imatrix.chunks_count"] == 3


def refuse_to_quantize(wide: Path, importance: Path, tmp_path: Path, capsys, *parts: str) -> None:
    before = listing(tmp_path)
    code, out, err = call(
        capsys, "quantize", wide / "model", tmp_path / "a.gguf", "--recipe", "q4_k_m", "--imatrix", importance
    )
    assert (code, out) == (2, "")
    check_sentence(err, *parts)
    assert listing(tmp_path) == before


def test_importance_of_another_model(wide, tmp_path, capsys):
    tensor = "blk.0.attn_q.weight"
    other = Imatrix({tensor: Entry(torch.ones(1, 64), torch.tensor([5]))}, ("t",), 1, 8)
    write_imatrix(tmp_path / "narrow.gguf", other)
    refuse_to_quantize(wide, tmp_path / "narrow.gguf", tmp_path, capsys, "another model", tensor, "64", "256")
    write_imatrix(
        tmp_path / "names.dat", Imatrix({"encoder.0.q": Entry(torch.ones(1, 256), torch.tensor([5]))})
    )
    refuse_to_quantize(wide, tmp_path / "names.dat", tmp_path, capsys, "another model", "encoder.0.q")


def test_bad_importance_stops_quantizing(wide, tmp_path, capsys):
    name = "blk.0.attn_q.weight"
    for what, value in [("zero importance", 0.0), ("nan", float("nan")), ("inf", float("inf"))]:
        sums = torch.full((1, 256), value)
        write_imatrix(
            tmp_path / "bad.gguf", Imatrix({name: Entry(sums, torch.tensor([5]))}, ("t",)), force=False
        )
        refuse_to_quantize(wide, tmp_path / "bad.gguf", tmp_path, capsys, "bad.gguf", name, what)
        (tmp_path / "bad.gguf").unlink()
    refuse_to_quantize(wide, tmp_path / "none.gguf", tmp_path, capsys, "none.gguf", "missing")
    refuse_to_quantize(wide, wide / "model" / "config.json", tmp_path, capsys, "config.json", "no importance")
