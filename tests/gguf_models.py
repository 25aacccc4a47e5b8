"""Small models of every architecture that GGUF and bitfold share, tokenizers trained on the spot, and files written by
the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import bitfold
import gguf
import torch
import transformers
from bitfold.gguf.pretokenizers import by_name
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ROWS = 640  # of the embedding; the tokenizers have fewer tokens
CORPUS = [
    "The quick brown fox jumps over the lazy dog; packed boxes hold five dozen jugs.",
    "def f(x):\n    return [y for y in range(x) if y % 2 == 0]  # don't, we'll see, I'm 12345",
    "In 1984 und 2024: Straßen, Äpfel, ÖL; naïve café, déjà vu. Привет, мир! 你好，世界。",
    "aaaa aaa aa a  b   c    d\t\te\r\n\r\n\nbanana bananas ananas",
] * 3
TRICKY = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  two in front",
    "behind  ",
    "tabs\tand\nlines\r\n\r\n\n   x",
    "I'm we'll DON'T 'S it's",
    "1234567 3.14159 0x1F 1,000",
    "naïve café déjà e\u0301 (composed and not)",
    "日本語 とても 🦊🦊 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<|im_start|>user<eos> <s></s> x<bos>y",
    "aaaaaaaaaaaaaaa banananana     spaces      ",
    "\u0000\u0001\u007f\u00a0\u2581\u2028",
    "CamelCase HTTPServer snake_case kebab-case //path/to/x",
    "".join(chr(c) for c in range(32, 127)),
]


def byte_level(pre: str = "llama-bpe", bos: bool = True) -> PreTrainedTokenizerFast:
    """A BPE of bytes that cuts words as the row `pre` says, with special and with plain added tokens."""
    row = by_name(pre)
    backend = Tokenizer(models.BPE(ignore_merges=row.whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=row.pattern is None)
    if row.pattern is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(row.pattern), "isolated"), level]
        )
    elif row.digits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), level]
        )
    else:
        backend.pre_tokenizer = level
    if row.composed:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<bos>", "<eos>", "<pad>", "<|im_start|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    if bos:
        ids = [("<bos>", backend.token_to_id("<bos>"))]
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def pieces(size: int = 200) -> list[str]:
    """Pieces as SentencePiece's BPE would learn them, best first; characters at the end."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size + 120, show_progress=False))
    merges = json.loads(backend.to_str())["model"]["merges"]
    joined = dict.fromkeys("".join(merge) for merge in merges)
    letters = sorted({letter for text in joined for letter in text} | {"▁"})
    return [*list(joined)[:size], *letters]


def sentencepiece(prefix: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """The fast form of a SentencePiece BPE, as Llama 2 (prefix) and Gemma have it: every way to cut a piece in two
    pieces is a merge."""
    own = pieces()
    ids = {
        text: i
        for i, text in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *own])
    }
    merges = [
        (text[:i], text[i:])
        for text in own
        for i in range(len(text) - 1, 0, -1)
        if text[:i] in own and text[i:] in own
    ]
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
KINDS: dict[str, dict] = {
    "llama": {"head_dim": 64},  # not hidden size / heads
    "llama3": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": None, "rms_norm_eps": 1e-5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
    "phi3": {"sliding_window": None},
    "phi3-long": {
        "sliding_window": None,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 16 for i in range(16)],
            "long_factor": [1.5 + i / 4 for i in range(16)],
            "original_max_position_embeddings": 128,
        },
    },
}
TOKENIZERS = {
    "llama": lambda: sentencepiece(),
    "llama3": lambda: byte_level("llama-bpe"),
    "mistral": lambda: byte_level("tekken"),
    "qwen2": lambda: byte_level("qwen2", bos=False),
    "qwen3": lambda: byte_level("qwen2", bos=False),
    "gemma2": lambda: sentencepiece(prefix=False),
    "gemma3_text": lambda: sentencepiece(prefix=False),
    "phi3": lambda: sentencepiece(bos=False),
}


def model_of(kind: str, dtype: torch.dtype = torch.float32, **fields) -> torch.nn.Module:
    """A model of random weights, norms and biases too, in eval mode; kind: of KINDS."""
    sizes = {
        **_SIZES,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **KINDS[kind],
        **fields,
    }
    config = transformers.AutoConfig.for_model(kind.partition("-")[0].replace("llama3", "llama"), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(len(kind))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = name.endswith("norm.weight") and "gemma" not in kind
        parameter.data = noise * (0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5) + (
            1.0 if norm else 0.0
        )
    model.tie_weights()
    model.generation_config.eos_token_id = None  # random weights would end anywhere
    return model.to(dtype)


def write_directory(path: Path, kind: str, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """A model directory as transformers saves it, with a tokenizer."""
    model_of(kind, dtype, **fields).save_pretrained(path)
    TOKENIZERS.get(kind, lambda: byte_level("gpt-2"))().save_pretrained(path)
    return path


def write_file(model, path: Path, kind: str = "", decode: bool = False, stacks: bool = False) -> Path:
    """A GgufModel as a file, by the gguf package's writer.

    kind: the type of the matrices (none: as they are), which the package encodes itself or, where it can't, bitfold;
    decode: write the values of that type as F32; stacks: of experts get the type too.
    """
    writer = gguf.GGUFWriter(path, model.metadata["general.architecture"].value)
    for key, value in model.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for tensor in model.tensors.values():
        values = tensor.read(0, tensor.rows).contiguous()
        packed = values.dtype in (torch.bfloat16, torch.uint8)
        array = values.view(torch.uint8).numpy() if packed else values.numpy()
        type = tensor.type
        if (
            kind
            and tensor.name.endswith(".weight")
            and (len(tensor.shape) == 2 or (stacks and len(tensor.shape) == 3))
            and "gate_inp" not in tensor.name
        ):
            type = gguf.GGMLQuantizationType[kind.upper()]
            try:
                array = gguf.quants.quantize(array, type)
            except NotImplementedError:
                array = bitfold.encode(values, kind).planes["blocks"].numpy()
            if decode:
                array, type = gguf.quants.dequantize(array, type), gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, array.reshape(*tensor.shape[:-1], -1), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
