"""Models of every architecture in llama.cpp itself: the same logits and the same tokens as transformers has.

Needs the package llama-cpp-python (the extra `interop`; it builds llama.cpp when it is installed).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import bitfold
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama_cpp is not installed: pip install bitfold[interop]"
)
pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_models  # noqa: E402
from bitfold.gguf.export import read_directory  # noqa: E402
from bitfold.gguf.pretokenizers import PRE_TOKENIZERS  # noqa: E402

LONGROPE = {  # llama.cpp takes the long factors wherever its context, 256 tokens at least, is larger than this
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 512,
    "rope_parameters": {
        **gguf_models.KINDS["phi3-long"]["rope_parameters"],
        "original_max_position_embeddings": 256,
    },
}
MODELS = {
    **{kind: (kind, {}) for kind in gguf_models.KINDS if kind != "phi3-long"},
    "phi3-short": ("phi3-long", LONGROPE),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}),
    "gemma3-27b": ("gemma3_text", {"num_hidden_layers": 62, "query_pre_attn_scalar": 32}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
            "final_logit_softcapping": 5.0,
        },
    ),
    "qwen3-yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e6,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
COUNT = 100  # tokens


def opened(path: Path):
    """With keys and values in F32: its halves would hide errors."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Every architecture and every way to scale rotary frequencies, in F32. Gemma's GELU is a table of halves there."""
    kind, fields = MODELS[name]
    directory = gguf_models.write_directory(tmp_path / "model", kind, **fields)
    file = gguf_models.write_file(read_directory(directory), tmp_path / "model.gguf")
    ids = torch.randint(0, 400, (1, COUNT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits[0].numpy()
        ours = bitfold.load(file)(ids).logits[0].numpy()
    model = opened(file)
    model.eval(ids[0].tolist())
    theirs = np.array(model.scores[:COUNT])
    bar = 5e-3 if "gemma" in name else 1e-5
    assert np.abs(theirs - wanted).max() < bar * np.abs(wanted).max()
    assert np.abs(theirs - ours).max() < bar * np.abs(ours).max()


def texts() -> list[str]:
    draw = random.Random(11)
    pieces = [*"abcXYZ019 '.,/_-\t\néßЖя中文🦊²½ʰ५…가", "  ", "\r\n", "'s", "'LL"]
    return gguf_models.TRICKY + ["".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(300)]


@pytest.mark.parametrize(
    "name", [*(row.names[0] for row in PRE_TOKENIZERS), "sentencepiece", "sentencepiece-bare"]
)
def test_tokens_are_those_of_transformers(name, tmp_path):
    """Every way to cut words, and SentencePiece with and without a space in front."""
    gguf_models.model_of("llama").save_pretrained(tmp_path / "model")
    if name.startswith("sentencepiece"):
        made = gguf_models.sentencepiece(prefix=name == "sentencepiece")
    else:
        made = gguf_models.byte_level(name)
    made.save_pretrained(tmp_path / "model")
    file = gguf_models.write_file(read_directory(tmp_path / "model"), tmp_path / "model.gguf")
    model, ours = opened(file), bitfold.load_tokenizer(file)
    compared = 0
    for text in texts():
        if "\0" in text or "\u0301" in text:
            continue  # the one ends a text in C; composing the other (NFC) is left to its caller by llama.cpp
        ids = made(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert model.tokenize(text.encode(), add_bos=True, special=True) == ids, text
        compared += 1
    assert compared > 300


def test_the_demo_has_the_same_tokens(tmp_path):
    demo = Path(__file__).parents[2] / "examples" / "demo"
    if not demo.is_dir():
        pytest.skip("the demo is not beside the tests")
    file = gguf_models.write_file(read_directory(demo / "model"), tmp_path / "model.gguf")
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[:50000]
    ids = AutoTokenizer.from_pretrained(demo / "model")(text)["input_ids"]
    assert opened(file).tokenize(text.encode(), add_bos=True, special=True) == ids
