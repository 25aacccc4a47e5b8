"""bitfold.quantize on plain torch models and on transformers models: what is swapped, tied, kept, refused."""

import copy
import importlib
import math

import bitfold
import numpy as np
import oracle_fp8
import oracle_rows_int8
import pytest
import torch
from bitfold import QuantEmbedding, QuantLinear, Recipe, Rule
from bitfold.quantize import describe, relative_rmse
from torch import nn

transformers = pytest.importorskip("transformers")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, width, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.mlp(self.attn["qkv"](self.norm(x)))


class Plain(nn.Module):
    """A language model that knows nothing of transformers."""

    def __init__(self, tied: bool = False, width: int = 32, vocabulary: int = 20):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(vocabulary, width, padding_idx=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


IDS = torch.arange(20).reshape(2, 10)
SWAPPED = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.0", "mlp.2")]


def quantize(model, recipe, **more):
    return bitfold.quantize(model, recipe, quiet=True, **more)


def everything(format):
    return Recipe("all", "", (Rule("output", format), Rule("tok_embeddings", format), Rule("*", format)))


def decoded_twin(model, quantized):
    """The source model with the decoded weights in it, whose inputs are rounded where the quantized one rounds them:
    what that must compute."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                twin.get_submodule(name).weight.copy_(module.qtensor.decode())
            if isinstance(module, QuantLinear) and not module.activations.is_float:
                twin.get_submodule(name).register_forward_pre_hook(ROUND_INPUT[str(module.activations)])
    return twin


def to_int8(x, threshold=0.0):
    taken = oracle_rows_int8.outliers(x, threshold, False, [])
    codes, steps = oracle_rows_int8.quantize(x, taken, None)
    return np.where(taken, x, codes * steps[:, None])


def before(round):
    """Told before a layer runs: its input [..., k] becomes what its rows are when they are rounded."""

    def hook(module, inputs):
        (x,) = inputs
        return torch.from_numpy(round(x.detach().flatten(0, -2).numpy())).to(x.dtype).view(x.shape)

    return hook


ROUND_INPUT = {
    "int8": before(to_int8),
    "llm-int8": before(lambda x: to_int8(x, 6.0)),
    "fp8": before(oracle_fp8.rounded),
}


# ---- what is swapped ----


@pytest.mark.parametrize(
    "recipe", [name for name, recipe in bitfold.RECIPES.items() if not recipe.needs_calibration]
)
def test_every_preset(recipe):
    source = Plain()
    model = copy.deepcopy(source)
    summary = quantize(model, recipe)
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == SWAPPED
    assert type(model.tok_embeddings) is nn.Embedding
    assert type(model.output) is nn.Linear
    assert model.blocks[0].norm.weight.dtype == torch.float32
    torch.testing.assert_close(model(IDS), decoded_twin(source, model)(IDS), rtol=1e-4, atol=1e-4)
    assert [module.name for module in summary.modules] == SWAPPED
    assert all(0 <= module.relative_rmse < 0.8 for module in summary.modules)
    kept = {"attn.qkv": "int8-channel", "mlp.0": "int4-g128", "mlp.2": "int4-g128"}
    for module in summary.modules:
        expected = (
            kept[module.name[9:]] if recipe == "int4-mixed" else bitfold.RECIPES[recipe].rules[0].format
        )
        assert module.format == expected == model.get_submodule(module.name).format


def test_a_recipe_that_needs_calibration_is_refused_before_anything_changes():
    model = Plain()
    with pytest.raises(
        ValueError, match=r"'gptq-int4-g128' needs a text to calibrate on \(gptq\): give --calibration"
    ):
        quantize(model, "gptq-int4-g128")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_biases_stay_the_same_parameters():
    model = Plain()
    bias = model.blocks[0].mlp[0].bias
    bias.requires_grad_(False)
    quantize(model, "int8")
    assert model.blocks[0].mlp[0].bias is bias
    assert not bias.requires_grad
    assert model.blocks[0].attn["qkv"].bias is None


def test_training_flag_is_kept():
    model = Plain().eval()
    quantize(model, "int8")
    assert not any(module.training for module in model.modules())


def test_embedding_and_head_by_name():
    source = Plain().bfloat16()
    model = copy.deepcopy(source)
    summary = quantize(model, everything("int8"))
    assert isinstance(model.output, QuantLinear)
    assert isinstance(model.tok_embeddings, QuantEmbedding)
    assert model.tok_embeddings.padding_idx == 1
    assert model.tok_embeddings.dtype == torch.bfloat16
    assert model(IDS).dtype == torch.bfloat16
    assert len(summary.modules) == len(SWAPPED) + 2
    torch.testing.assert_close(model(IDS), decoded_twin(source, model)(IDS), rtol=0.05, atol=0.05)


def test_a_module_in_two_places_is_swapped_in_both():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.append(model[0])
    summary = quantize(model, "int8")
    assert model[0] is model[2]
    assert isinstance(model[2], QuantLinear)
    assert len(summary.modules) == 2


# ---- tied weights ----


def test_tied_weights_are_encoded_once_and_stay_tied():
    model = Plain(tied=True)
    calls = []
    summary = quantize(model, everything("int4-g32"), progress=lambda *call: calls.append(call))
    assert model.output.codes is model.tok_embeddings.codes
    assert model.output.scales is model.tok_embeddings.scales
    assert [module.name for module in summary.modules] == ["tok_embeddings", *SWAPPED]
    assert calls[-1][1] == calls[-1][2]
    for twin in (copy.deepcopy(model), model.half()):
        assert twin.output.codes is twin.tok_embeddings.codes


def test_tied_weights_are_kept_by_default():
    model = Plain(tied=True)
    quantize(model, "int4-g32")
    assert model.output.weight is model.tok_embeddings.weight


def test_two_formats_for_one_weight():
    model = Plain(tied=True)
    with pytest.raises(ValueError, match="tok_embeddings and output share one weight"):
        quantize(model, Recipe("bad", "", (Rule("output", "int8"), Rule("*", "int4"))))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


# ---- what it tells ----


def test_summary_and_progress():
    model = Plain()
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(model.get_submodule(name).weight.numel() for name in SWAPPED)
    calls = []
    summary = quantize(model, "int8", progress=lambda *call: calls.append(call))
    assert summary.recipe == "int8"
    assert summary.parameters == parameters
    assert summary.quantized_parameters == linear
    assert summary.share == pytest.approx(linear / parameters)
    assert summary.bytes_before == 4 * parameters
    assert summary.bytes_after == sum(p.nbytes for p in model.parameters())
    assert [call[0] for call in calls] == SWAPPED
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert calls[-1][1:] == (linear, linear)
    first = summary.modules[0]
    assert (first.shape, first.bytes_before) == ((32, 32), 4 * 32 * 32)
    assert first.bytes_after == model.get_submodule(first.name).qtensor.nbytes


def test_the_share_is_printed(capsys):
    summary = bitfold.quantize(Plain(), "nf4")
    printed = capsys.readouterr().out
    assert printed == f"{summary}\n"
    assert f"{summary.share:.1%}" in printed
    quantize(Plain(), "nf4")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("format", ["int4-g32", "fp16"])
def test_relative_rmse(format, monkeypatch):
    monkeypatch.setattr(importlib.import_module("bitfold.quantize"), "ROW_BLOCK", 100)
    weight = torch.randn(37, 48)
    qtensor = bitfold.encode(weight, format)
    error = (qtensor.decode(torch.float64) - weight.double()).norm() / weight.double().norm()
    assert relative_rmse(weight, qtensor) == pytest.approx(error.item(), rel=1e-5)
    assert relative_rmse(torch.zeros(3, 4), bitfold.encode(torch.zeros(3, 4), format)) == 0


def test_source_weights_are_freed_on_the_way():
    import weakref

    model = Plain()
    weights = {name: weakref.ref(model.get_submodule(name).weight) for name in SWAPPED}
    alive = []
    quantize(model, "int4", progress=lambda name, *_: alive.append(weights[name]() is not None))
    assert alive == [False] * len(SWAPPED)


# ---- what it refuses ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = Plain()
    with torch.no_grad():
        model.blocks[1].attn["qkv"].weight[3, 5] = value
    with pytest.raises(ValueError, match=r"^blocks\.1\.attn\.qkv\.weight: .*3, (column )?5") as error:
        quantize(model, "int4-g32")
    assert "\n" not in str(error.value)
    # A model that runs: what lies before is quantized, the rest as it was.
    kinds = [type(model.get_submodule(name)) for name in SWAPPED]
    assert kinds == [QuantLinear] * 3 + [nn.Linear] * 3
    model(IDS)


def test_nothing_changes_when_names_are_wrong():
    for recipe in (
        "int44",
        Recipe("typo", "", (Rule("*.atn.*", "int8"), Rule("*", "int4"))),
        Recipe("shadow", "", (Rule("*", "int4"), Rule("*.mlp.*", "int8"))),
    ):
        model = Plain()
        with pytest.raises(ValueError, match=r"unknown|matches no module|never wins"):
            quantize(model, recipe)
        assert not any(isinstance(module, QuantLinear) for module in model.modules())


class Lora(nn.Linear):
    pass


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 8))


@pytest.mark.parametrize(("odd", "message"), [(Lora(32, 32), "Lora"), (Stack(), "stack in a Stack")])
def test_what_cannot_be_swapped_is_an_error_unless_kept(odd, message):
    model = Plain()
    model.blocks[1].add_module("odd", odd)
    with pytest.raises(ValueError, match=rf"module blocks\.1\.odd.* it is a .*{message}"):
        quantize(model, "int4")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    quantize(model, Recipe("kept", "", (Rule("*.odd", None), Rule("*", "int4"))))
    assert model.blocks[1].odd is odd


def test_convolutions_and_position_tables_are_no_experts():
    model = Plain()
    model.conv = nn.Conv1d(4, 4, 3)
    model.position = nn.Module()
    model.position.table = nn.Parameter(torch.zeros(1, 10, 32))
    quantize(model, "int4")


def test_multihead_attention_must_be_kept():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj .*NonDynamicallyQuantizableLinear"):
        quantize(model, "int8")


def test_hooks_and_max_norm_would_be_lost():
    model = Plain()
    handle = model.blocks[0].mlp[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.0 has hooks"):
        quantize(model, "int8")
    handle.remove()
    model.tok_embeddings.max_norm = 1.0
    with pytest.raises(ValueError, match="tok_embeddings has max_norm"):
        quantize(model, everything("int8"))
    quantize(model, "int8")


def test_meta_and_bare_layers():
    with pytest.raises(ValueError, match="meta"):
        quantize(Plain().to("meta"), "int8")
    with pytest.raises(ValueError, match="model is itself"):
        quantize(nn.Linear(4, 4), "int8")
    with pytest.raises(ValueError, match="no linear layer"):
        quantize(nn.ReLU(), "int8")


def test_a_second_time_finds_nothing():
    model = Plain()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="matches no module"):
        quantize(model, "int4")


def test_clamp_reaches_casts_only():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    recipe = Recipe("two", "", (Rule("0", "fp16"), Rule("1", "int8")))
    with pytest.raises(ValueError, match=r"0\.weight"):
        quantize(model, recipe)
    quantize(model, recipe, clamp=True)
    assert model[0].qtensor.decode()[0, 0] == 65504


# ---- describe ----


def test_heads():
    def head(model):
        return [name for name, info in describe(model).items() if info.is_head]

    assert head(Plain()) == ["output"]
    assert head(Plain(tied=True)) == ["output"]
    assert describe(Plain(tied=True))["output"].tied_to == "tok_embeddings"
    model = Plain()
    model.scores, model.output = model.output, nn.Identity()
    assert head(model) == []
    model.scores.weight = model.tok_embeddings.weight
    assert head(model) == ["scores"]
    assert head(nn.Sequential(nn.Linear(4, 4))) == []


# ---- transformers ----


def llama(tied=False, **more):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **more,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def generate(model):
    ids = torch.arange(12).reshape(2, 6) + 3
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["int8", "int4-mixed", "nf4-dq"])
def test_llama(tied, recipe):
    source = llama(tied)
    model = copy.deepcopy(source)
    summary = quantize(model, recipe)
    assert len(summary.modules) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(generate(model), generate(decoded_twin(source, model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_with_everything_quantized_and_tied(dtype):
    model = llama(tied=True).to(dtype)
    rules = (Rule("lm_head", "int8"), Rule("*.embed_tokens", "int8"), Rule("*", "int4-g32"))
    summary = quantize(model, Recipe("all", "", rules))
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert summary.share > 0.95
    assert model(torch.tensor([[1, 2]])).logits.dtype == dtype
    assert torch.equal(generate(model), generate(copy.deepcopy(model)))


def test_experts_of_another_kind_are_refused():
    """Those of gpt-oss are transposed, have biases, and gate in their own way."""
    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        head_dim=8,
    )
    model = transformers.GptOssForCausalLM(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj .*GptOssExperts"):
        quantize(model, "int4")
    summary = quantize(model, Recipe("kept", "", (Rule("*.experts", None), Rule("*", "int4"))))
    assert all("self_attn" in module.name for module in summary.modules)
    assert summary.share < 0.5


def test_transformers_names_its_head():
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.GPTNeoXForCausalLM(config)
    heads = [name for name, info in describe(model).items() if info.is_head]
    assert [model.get_submodule(name) for name in heads] == [model.get_output_embeddings()]
    quantize(model, "int4-mixed")
    assert model.gpt_neox.layers[0].attention.query_key_value.format == "int8-channel"
    assert type(model.get_output_embeddings()) is nn.Linear
