"""Small model directories for tests: random Llamas as transformers saves them, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<bos>", "<eos>"
VOCAB = 258
TEXT = "The quick brown fox jumps over the lazy dog; packed boxes hold five dozen jugs.\n" * 12

# The configuration of Llama-2-7B: from its paper (Touvron et al. 2023) and its public config.json.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "float16",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For modules that import it: models this small gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(
    *, layers: int = 2, hidden: int = 64, ffn: int = 128, tied: bool = False, context: int = 64
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes) -> LlamaForCausalLM:
    """A Llama of random weights in eval mode, with its rotary frequencies in float32 whatever the dtype."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**sizes), dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # random weights would end anywhere
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and BOS in front of what it encodes."""
    vocab = {token: i for i, token in enumerate([BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def write_llama(
    path: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", seed: int = 0, **sizes
) -> Path:
    """A model directory with tokenizer."""
    llama(dtype, seed, **sizes).save_pretrained(path, max_shard_size=shard)
    tokenizer().save_pretrained(path)
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory, read with the safetensors library alone."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found.update({name: handle.get_tensor(name).clone() for name in handle.keys()})  # noqa: SIM118
    return found


def rewrite(path: Path, change) -> None:
    """Apply `change` to the dict of tensors of a single-file model directory and write it back."""
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(path: Path, **fields: object) -> None:
    """Set fields of config.json."""
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, **fields}))
