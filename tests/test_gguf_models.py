"""Hugging Face models through GGUF files and back: the same logits, tokens and text."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import gguf  # noqa: E402
import gguf_models  # noqa: E402
from bitfold.gguf import export, load, reader, vocabulary  # noqa: E402
from bitfold.nn import QuantModule  # noqa: E402
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


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q4_k", "q6_k"])
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "gemma2", "phi3"])
def test_packed_weights_compute_what_they_mean(kind, format, tmp_path):
    """A file of blocks computes as one whose blocks were decoded by the gguf package; nothing is decoded on loading."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2 if kind != "gemma2" else 3}
    directory = gguf_models.write_directory(tmp_path / "model", kind, **sizes)
    model = export.read_directory(directory)
    packed = load.load(gguf_models.write_file(model, tmp_path / "packed.gguf", format))
    decoded = load.load(gguf_models.write_file(model, tmp_path / "decoded.gguf", format, decode=True))
    linears = [module for module in packed.modules() if isinstance(module, torch.nn.Linear)]
    assert not linears
    quantized = [module for module in packed.modules() if isinstance(module, QuantModule)]
    assert {module.format for module in quantized} == {format}
    ids = torch.randint(0, gguf_models.ROWS, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted, found = logits(decoded, ids), logits(packed, ids)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    if packed.config.tie_word_embeddings:
        assert packed.lm_head.blocks is packed.get_input_embeddings().blocks


def test_blocks_are_mapped(tmp_path):
    """Weights whose rows stay in order lie in the file; loading copies only Llama's q and k."""
    directory = gguf_models.write_directory(tmp_path / "model", "llama")
    file = gguf_models.write_file(export.read_directory(directory), tmp_path / "model.gguf", "q8_0")
    packed = load.load(file)
    source = reader.read_gguf(file)
    owned = {
        name
        for name, plane in packed.named_parameters()
        if name.endswith("blocks") and plane.untyped_storage().nbytes() == plane.nbytes
    }
    assert owned == {f"model.layers.{i}.self_attn.{p}_proj.blocks" for i in range(2) for p in "qk"}
    blocks = packed.model.layers[1].mlp.down_proj.blocks
    assert torch.equal(blocks, source.tensors["blk.1.ffn_down.weight"].read(0, blocks.shape[0]))
