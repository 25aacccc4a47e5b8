"""Hugging Face models through GGUF files and back: the same logits, tokens and text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import gguf  # noqa: E402
import gguf_models  # noqa: E402
import tiny  # noqa: E402
from bitfold.gguf import export, load, reader, vocabulary  # noqa: E402
from bitfold.gguf.model import GgufModel  # noqa: E402
from bitfold.nn import PlaneModule  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402
from gguf_models import KINDS, TRICKY  # noqa: E402
from tiny import one_thread  # noqa: E402, F401

EXACT = [
    kind for kind in KINDS if not kind.startswith("gemma")
]  # whose values only move; Gemma's norms are shifted


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory):
    """(kind, directory, GGUF file) of an F32 model."""
    path = tmp_path_factory.mktemp(request.param)
    directory = gguf_models.write_directory(path / "model", request.param)
    return (
        request.param,
        directory,
        gguf_models.write_file(export.read_directory(directory), path / "model.gguf"),
    )


def logits(model, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def test_logits_are_the_same(converted):
    kind, directory, file = converted
    original = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    loaded = load.load(file)
    ids = torch.randint(0, gguf_models.ROWS, (2, 40), generator=torch.Generator().manual_seed(1))
    wanted, found = logits(original, ids), logits(loaded, ids)
    assert wanted.std() > 0.1
    if kind in EXACT:
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tokens_are_the_same(converted):
    _, directory, file = converted
    original = transformers.AutoTokenizer.from_pretrained(directory)
    rebuilt = vocabulary.tokenizer_of(reader.read_gguf(file))
    for text in TRICKY:
        ids = original(text)["input_ids"]
        assert rebuilt(text)["input_ids"] == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
        assert rebuilt.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
    assert (rebuilt.bos_token, rebuilt.eos_token) == (original.bos_token, original.eos_token)
    assert rebuilt.pad_token == original.pad_token
    assert rebuilt.chat_template == original.chat_template


def test_text_is_the_same(converted):
    _, directory, file = converted
    original = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    loaded, rebuilt = load.load(file), vocabulary.tokenizer_of(reader.read_gguf(file))
    texts = []
    for model, words in ((original, tokenizer), (loaded, rebuilt)):
        ids = words("The quick brown", return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(words.decode(made[0]))
    assert texts[0] == texts[1]


def test_the_gguf_package_reads_the_file(converted):
    """The values in the file, by the package's reader and the rules of the format's description."""
    kind, directory, file = converted
    config = transformers.AutoConfig.from_pretrained(directory)
    state = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    read = gguf.GGUFReader(file)
    name = read.get_field("general.architecture").contents()
    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    checked = 0
    for source, values in state.items():
        if "experts" in source or (source == "lm_head.weight" and config.tie_word_embeddings):
            continue
        target = names.get_name(source, (".weight", ".bias"))
        wanted = values.float()
        if kind.startswith("gemma") and source.endswith("norm.weight"):
            wanted = wanted + 1
        projection = source.split(".")[-2]
        if name == "llama" and projection in heads:
            wanted = torch.stack(  # half-split to interleaved, row by row
                [
                    wanted[head * size + s * size // 2 + r]
                    for size in [wanted.shape[0] // heads[projection]]
                    for head in range(heads[projection])
                    for r in range(size // 2)
                    for s in range(2)
                ]
            )
        assert torch.equal(found[target], wanted.squeeze() if target.endswith("shexp.weight") else wanted), (
            target
        )
        checked += 1
    assert checked > 10
    assert ("output.weight" in found) == (not config.tie_word_embeddings)
    tokens = read.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == len(set(tokens)) == gguf_models.ROWS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_halves_stay_what_they_are(kind, dtype, tmp_path):
    """A model in halves: the file has them as they are, norms in F32, and computes in the same dtype."""
    directory = gguf_models.write_directory(tmp_path / "model", kind, dtype)
    model = export.read_directory(directory)
    kinds = {tensor.type.name for tensor in model.tensors.values() if len(tensor.shape) > 1}
    assert kinds == {"F16" if dtype == torch.float16 else "BF16"}
    assert all(tensor.type.name == "F32" for tensor in model.tensors.values() if len(tensor.shape) < 2)
    loaded = load.load(gguf_models.write_file(model, tmp_path / "model.gguf"))
    original = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    ids = torch.randint(0, gguf_models.ROWS, (1, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(loaded, ids), logits(original, ids))


# ---- packed weights ----

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q4_k", "q6_k"])
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "gemma2", "phi3", *MIXTURES])
def test_packed_weights_compute_what_they_mean(kind, format, tmp_path):
    """A file of blocks computes as one whose blocks were decoded by the gguf package; nothing is decoded on loading."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2 if kind != "gemma2" else 3}
    if "moe" in kind:
        sizes |= {"moe_intermediate_size": 256}
    if kind == "qwen2_moe":
        sizes |= {"shared_expert_intermediate_size": 256}
    directory = gguf_models.write_directory(tmp_path / "model", kind, **sizes)
    model = export.read_directory(directory)
    packed = load.load(gguf_models.write_file(model, tmp_path / "packed.gguf", format, stacks=True))
    file = gguf_models.write_file(model, tmp_path / "decoded.gguf", format, decode=True, stacks=True)
    decoded = load.load(file)
    if kind in MIXTURES:
        decoded.set_experts_implementation("eager")
    linears = {
        name.rpartition(".")[2] for name, m in packed.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert linears <= {"shared_expert_gate"}
    quantized = [module for module in packed.modules() if isinstance(module, PlaneModule)]
    assert {module.format for module in quantized} == {format}
    ids = torch.randint(0, gguf_models.ROWS, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted, found = logits(decoded, ids), logits(packed, ids)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    if packed.config.tie_word_embeddings:
        assert packed.lm_head.blocks is packed.get_input_embeddings().blocks


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether it lies where the kernel says that the file is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if line.endswith(str(file)) and int(first, 16) <= tensor.data_ptr() < int(last, 16):
            return True
    return False


def test_blocks_are_mapped(tmp_path):
    """Weights whose rows stay in order lie in the file; loading copies only Llama's q and k."""
    directory = gguf_models.write_directory(tmp_path / "model", "llama")
    file = gguf_models.write_file(export.read_directory(directory), tmp_path / "model.gguf", "q8_0")
    packed = load.load(file)
    source = reader.read_gguf(file)
    owned = {
        name
        for name, plane in packed.named_parameters()
        if name.endswith("blocks") and not is_mapped(plane, file)
    }
    assert owned == {f"model.layers.{i}.self_attn.{p}_proj.blocks" for i in range(2) for p in "qk"}
    blocks = packed.model.layers[1].mlp.down_proj.blocks
    assert torch.equal(blocks, source.tensors["blk.1.ffn_down.weight"].read(0, blocks.shape[0]))


def test_parameters_may_be_written_to_and_the_file_stays(tmp_path):
    """As training of norms and load_state_dict do."""
    directory = gguf_models.write_directory(tmp_path / "model", "qwen2")
    ids = torch.randint(0, gguf_models.ROWS, (2, 24), generator=torch.Generator().manual_seed(1))
    for kind in ("", "q4_0"):
        file = gguf_models.write_file(export.read_directory(directory), tmp_path / f"{kind}.gguf", kind)
        before = file.read_bytes()
        model, other = load.load(file), load.load(file)
        wanted = logits(model, ids)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert file.read_bytes() == before
        torch.save(other.state_dict(), tmp_path / "state")
        assert (tmp_path / "state").stat().st_size < 2 * len(before)
        model.load_state_dict(torch.load(tmp_path / "state"))
        assert torch.equal(logits(model, ids), wanted)
        assert torch.equal(logits(load.load(file), ids), wanted)


def test_blocks_of_experts_are_mapped(tmp_path):
    """The down projections; gate and up projection, two tensors in the file, are put together."""
    directory = gguf_models.write_directory(tmp_path / "model", "mixtral")
    file = gguf_models.write_file(export.read_directory(directory), tmp_path / "a.gguf", "q8_0", stacks=True)
    experts = load.load(file).model.layers[1].mlp.experts
    down, both = experts.down_proj.blocks, experts.gate_up_proj.blocks
    assert is_mapped(down, file)
    assert not is_mapped(both, file)
    source = {name: tensor.read(0, tensor.rows) for name, tensor in reader.read_gguf(file).tensors.items()}
    assert torch.equal(down.flatten(0, 1), source["blk.1.ffn_down_exps.weight"])
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(gate.flatten(0, 1), source["blk.1.ffn_gate_exps.weight"])
    assert torch.equal(up.flatten(0, 1), source["blk.1.ffn_up_exps.weight"])


# ---- what can't be loaded ----


def edited(model: GgufModel, metadata=None, tensors=None, drop=()) -> GgufModel:
    """With other values (None: without the key), other tensors, or without some."""
    values = {**model.metadata, **(metadata or {})}
    kept = {name: tensor for name, tensor in (model.tensors | (tensors or {})).items() if name not in drop}
    return GgufModel({key: value for key, value in values.items() if value is not None}, kept)


def u32(value: int) -> gguf.GGUFValue:
    return gguf.GGUFValue(value, gguf.GGUFValueType.UINT32)


def text(value: str) -> gguf.GGUFValue:
    return gguf.GGUFValue(value, gguf.GGUFValueType.STRING)


def many(values: list[int]) -> gguf.GGUFValue:
    return gguf.GGUFValue(values, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"metadata": {"general.architecture": text("mamba")}},
            "is 'mamba', and bitfold runs those of llama",
        ),
        ({"metadata": {"llama.block_count": None}}, "has no llama.block_count"),
        (
            {"metadata": {"llama.attention.head_count_kv": many([2, 4])}},
            "head_count_kv is [2, 4]; it must be",
        ),
        ({"metadata": {"llama.embedding_length": u32(64)}}, "has shape [640, 128], but"),
        (
            {"metadata": {"llama.attention.value_length": u32(32)}},
            "keys of 64 numbers and values of",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": text("fractal")}},
            "scales rotary frequencies by 'fractal'",
        ),
        ({"metadata": {"llama.block_count": u32(3)}}, "lacks 9 tensors ('blk.2.attn_norm.weight'"),
        (
            {"metadata": {"llama.expert_count": u32(4), "general.architecture": text("qwen3")}},
            "no qwen3.block_count",
        ),
        ({"drop": ["blk.1.attn_q.weight"]}, "lacks 1 tensor ('blk.1.attn_q.weight')"),
        ({"drop": ["token_embd.weight"]}, "lacks"),
        ({"metadata": {"llama.attention.head_count": u32(3)}}, ""),
        ({"metadata": {"llama.embedding_length": u32(0)}}, ""),
    ],
)
def test_files_that_are_no_model_are_one_sentence(changes, words, tmp_path):
    directory = gguf_models.write_directory(tmp_path / "model", "llama")
    file = gguf_models.write_file(edited(export.read_directory(directory), **changes), tmp_path / "a.gguf")
    with pytest.raises(CheckpointError) as caught:
        load.load(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_cannot_be_computed_with(tmp_path):
    directory = gguf_models.write_directory(
        tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=256
    )
    model = export.read_directory(directory)
    norm = model.tensors["blk.0.attn_norm.weight"]
    extra = {"blk.0.mystery.weight": replace(norm, name="blk.0.mystery.weight")}
    file = gguf_models.write_file(edited(model, tensors=extra), tmp_path / "extra.gguf")
    with pytest.raises(CheckpointError, match=r"holds 1 tensor \('blk.0.mystery.weight'\)"):
        load.load(file)
    ternary = gguf.GGMLQuantizationType.TQ2_0
    row = gguf.quants.quantize(np.zeros((256, 256), np.float32), ternary)
    odd = replace(
        model.tensors["blk.0.attn_q.weight"],
        type=ternary,
        read=lambda begin, end: torch.from_numpy(row[begin:end]),
    )
    file = gguf_models.write_file(edited(model, tensors={odd.name: odd}), tmp_path / "odd.gguf")
    with pytest.raises(CheckpointError, match="is TQ2_0, which bitfold can't compute with"):
        load.load(file)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'; GGUF's llama can only say 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "by 'dynamic'",
        ),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types are not those of gemma2"),
        ("gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ],
)
def test_configurations_without_a_word_in_gguf(kind, fields, words, tmp_path):
    directory = gguf_models.write_directory(tmp_path / "model", kind)
    tiny.rewrite_config(directory, **fields)
    with pytest.raises(CheckpointError) as caught:
        export.read_directory(directory)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(directory))


def test_directories_that_contradict_themselves(tmp_path):
    directory = gguf_models.write_directory(tmp_path / "model", "qwen2")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tiny.tensors_of(directory)

    def refusal(change) -> str:
        tiny.rewrite(directory, change)
        with pytest.raises(CheckpointError) as caught:
            export.read_directory(directory)
        tiny.rewrite(directory, lambda stored: stored.clear() or stored.update(tensors))
        return str(caught.value)

    assert f"lacks '{name}'" in refusal(lambda stored: stored.pop(name))
    assert "has shape [5, 128]" in refusal(lambda stored: stored.update({name: tensors[name][:5].clone()}))
    assert "is I32; GGUF wants weights" in refusal(lambda stored: stored.update({name: tensors[name].int()}))
    assert "holds 1 tensor ('other')" in refusal(lambda stored: stored.update(other=torch.zeros(3)))
    assert "matrices of torch.float32" in refusal(lambda stored: stored.update({name: tensors[name].half()}))
    assert export.read_directory(directory).tensors
    tiny.rewrite_config(directory, model_type="gpt2")
    with pytest.raises(CheckpointError, match="models of the type 'gpt2' can't be made GGUF"):
        export.read_directory(directory)


ODD = [u32(0), u32(1), u32(2**31), u32(2**32 - 1), text("x"), text("\ud800"), many([]), many([1, 2]), None]
ODD += [gguf.GGUFValue(number, gguf.GGUFValueType.FLOAT32) for number in (0.0, float("nan"), float("inf"))]
ODD += [gguf.GGUFValue(-1, gguf.GGUFValueType.INT32), gguf.GGUFValue(True, gguf.GGUFValueType.BOOL)]


@pytest.mark.parametrize("kind", ["llama3", "gemma3_text", "phi3-long"])
def test_odd_metadata_is_loaded_or_refused(kind, tmp_path):
    """Every key with every odd value: a model, or one sentence; nothing else, and nothing large on the way."""
    model = export.read_directory(gguf_models.write_directory(tmp_path / "model", kind, num_hidden_layers=1))
    path = tmp_path / "model.gguf"
    messages = []
    for key in model.metadata:
        make = (
            vocabulary.tokenizer_of if key.startswith("tokenizer.") else lambda file: load.build(file, path)
        )
        for value in ODD:
            try:
                make(edited(model, {key: value}))
            except CheckpointError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_a_name_that_llama_cpp_takes_for_phi_3_needs_its_tokens(tmp_path):
    """It looks for them in the vocabulary of every model so named, and doesn't load one that lacks any."""
    for name in ("tiny-phi3", "xPHI3y"):
        directory = gguf_models.write_directory(tmp_path / name, "llama")
        with pytest.raises(CheckpointError, match=r"for Phi-3, .* lacks .* <\|endoftext\|>, .*; rename"):
            export.read_directory(directory)
    own = gguf_models.byte_level()
    own.add_special_tokens({"additional_special_tokens": ["<unk>", "<s>", "</s>", "<|endoftext|>"]})
    own.save_pretrained(tmp_path / "tiny-phi3")
    assert "Phi3" in export.read_directory(tmp_path / "tiny-phi3").metadata["general.name"].value
    assert export.read_directory(directory.rename(tmp_path / "tiny-phi-2"))
