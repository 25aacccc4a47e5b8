"""Embeddings that multiply their output by a number, as Gemma's do: every way to quantize one, and the ways back."""

from __future__ import annotations

import copy

import bitfold
import pytest
import tiny_architectures
import torch
from bitfold import qat
from bitfold.convert import convert_checkpoint
from bitfold.dequantize import dequantize
from bitfold.embeddings import QuantEmbedding, ScaledEmbedding, embedding_scale
from bitfold.rules import Recipe, Rule
from bitfold.shards import read_directory
from tiny import one_thread  # noqa: F401
from tiny_architectures import logits, relative_difference
from torch import nn
from transformers import AutoModelForCausalLM

KINDS = ["gemma", "gemma2", "gemma3_text"]
EMBEDDING = "model.embed_tokens"
ALL = Recipe("all", "", tuple(Rule(pattern, "int4-g16") for pattern in (f"*{EMBEDDING}", "lm_head", "*")))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind) / "model"
    tiny_architectures.model(kind).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wanted(kind) -> torch.Tensor:
    """Of the architecture's own model, whose matrices are decoded ones."""
    model = tiny_architectures.model(kind)
    with torch.no_grad():
        for module in model.modules():
            if (isinstance(module, nn.Linear) and module is not model.lm_head) or isinstance(
                module, nn.Embedding
            ):
                module.weight.copy_(bitfold.encode(module.weight, "int4-g16").decode())
    assert model.lm_head.weight is model.get_submodule(EMBEDDING).weight
    return logits(model)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("q") / "q"
    bitfold.quantize_checkpoint(source, target, ALL)
    return target


def check(model: nn.Module, wanted: torch.Tensor, scale: float | None = 48**0.5) -> None:
    embedding = model.get_submodule(EMBEDDING)
    assert embedding.scale == scale if isinstance(embedding, QuantEmbedding) else scale is None
    assert relative_difference(logits(model), wanted) < 1e-5


def test_quantizing_in_memory(kind, wanted):
    model = tiny_architectures.model(kind)
    bitfold.quantize(model, ALL)
    check(model, wanted)
    assert type(model.lm_head) is bitfold.QuantLinear
    again = dequantize(copy.deepcopy(model), torch.float32)
    assert type(again.get_submodule(EMBEDDING)) is ScaledEmbedding
    check(again, wanted, None)
    bitfold.quantize(again, ALL)  # its own codes once more
    check(again, wanted)


def test_checkpoints(source, checkpoint, wanted, tmp_path):
    check(bitfold.load(checkpoint, dtype=torch.float32), wanted)
    check(AutoModelForCausalLM.from_pretrained(checkpoint), wanted)
    check(AutoModelForCausalLM.from_pretrained(source, quantization_config=bitfold.Config(ALL)), wanted)
    convert_checkpoint(checkpoint, tmp_path / "plain", decode=torch.float32)
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), wanted, None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).dequantize()
    check(model, wanted, None)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(read_directory(tmp_path / "saved")) == sorted(read_directory(source))
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), wanted, None)


def test_training(kind, wanted):
    model = qat.prepare(tiny_architectures.model(kind), ALL)
    check(model, wanted, None)
    check(qat.convert(model), wanted)


def test_in_bfloat16(kind):
    """The number is rounded to the dtype of the rows, as the architecture has it."""
    model = tiny_architectures.model(kind, torch.bfloat16)
    plain = model.get_submodule(EMBEDDING)
    with torch.no_grad():
        plain.weight.copy_(bitfold.encode(plain.weight, "int4-g16").decode())
    ids = torch.arange(64)
    wanted = plain(ids)
    bitfold.quantize(model, ALL)
    assert torch.equal(model.get_submodule(EMBEDDING)(ids), wanted)


def test_what_does_more_than_scale_is_refused():
    class More(ScaledEmbedding):
        def __init__(self, *sizes: int):
            super().__init__(*sizes)
            self.other = nn.Parameter(torch.zeros(1))

    class Another(nn.Embedding):
        pass

    for embedding in (More(4, 16), Another(4, 16)):
        with pytest.raises(
            ValueError, match=f"it is a {type(embedding).__name__}, a subclass of nn.Embedding"
        ):
            embedding_scale(embedding)
        with pytest.raises(
            ValueError, match=f"it is a {type(embedding).__name__}, a subclass of nn.Embedding: put a"
        ):
            bitfold.quantize(nn.Sequential(embedding), Recipe("all", "", (Rule("0", "int4-g16"),)))
