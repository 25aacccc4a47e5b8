"""Importance: measured by running a model, against numpy and against llama-imatrix; what quantizing makes of it."""

from __future__ import annotations

from pathlib import Path

import bitfold
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
from refusals import check_sentence, listing
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
