"""Mixtures of experts: QuantExperts against transformers' modules on decoded weights, and the ways to and from disk."""

from __future__ import annotations

import json
import shutil

import bitfold
import mixtures
import pytest
import tiny
import torch
import transformers
from bitfold import Recipe, Rule
from bitfold.dequantize import dequantize
from bitfold.experts import QuantExperts, QuantStack, expert_name, put_stack, routed, stack_name
from bitfold.nn import PlaneModule, set_activations
from bitfold.shards import CheckpointError
from command import call, call_json
from mixtures import EXPERT, EXPERTS, HIDDEN, KINDS
from tiny import one_thread  # noqa: F401
from torch import nn

IDS = torch.tensor([[0, 5, 77, 33, 101, 8, 64, 12, 90, 91], [0, 200, 13, 4, 4, 150, 7, 31, 255, 1]])
# The bars of the linear op, for one product; a block has a few.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    """A model directory as transformers writes it."""
    return mixtures.write(tmp_path_factory.mktemp("mixture") / request.param, request.param)


def decoded(quantized: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """transformers' own model with the decoded weights of a quantized one."""
    twin = mixtures.model(kind, dtype)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            home = name.removesuffix(".weight")
            try:
                module = quantized.get_submodule(home)
            except AttributeError:
                module = None
            if isinstance(module, QuantStack):
                for expert in range(EXPERTS):
                    parameter[expert].copy_(module.matrix(expert).decode())
            elif hasattr(module, "qtensor"):
                parameter.copy_(module.qtensor.decode())
            else:
                parameter.copy_(quantized.get_parameter(name))
    return twin


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_transformers_computes_with_the_decoded_weights(kind, dtype):
    model = mixtures.model(kind, dtype)
    bitfold.quantize(model, "int8-g32", quiet=True)  # in 8 bits bf16 holds the decoded weights nearly
    twin = decoded(model, kind, dtype)
    blocks = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert len(blocks) == (1 if kind == "qwen3_moe" else 2)
    generator = torch.Generator().manual_seed(1)
    own = next(m for m in twin.modules() if type(m).__name__.endswith("Experts"))
    # Every shape of a batch: a single token, none, and one that leaves experts without a token.
    for tokens, allowed in ((37, EXPERTS), (1, EXPERTS), (0, EXPERTS), (9, 2)):
        x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        index = torch.stack(
            [torch.randperm(allowed, generator=generator)[:2] for _ in range(tokens)] or [IDS[0, :2]]
        )
        index = index[:tokens]
        weights = torch.rand(tokens, 2, generator=generator).to(dtype)
        got, wanted = blocks[0](x, index, weights), own(x, index, weights)
        assert got.dtype == dtype
        assert got.shape == (tokens, HIDDEN)
        assert not tokens or relative(got, wanted) < CLOSE[dtype]


@pytest.mark.parametrize(
    "format",
    ["int4-g32", "int3-g16-asym", "nf4-b64", "nf4-b64-dq", "fp8-e4m3-channel", "fp8-e4m3-b128x128", "bf16"],
)
def test_every_kind_of_format_in_a_whole_model(format):
    model = mixtures.model("qwen2_moe")
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 3}
    bitfold.quantize(model, format, quiet=True)
    twin = decoded(model, "qwen2_moe", torch.float32)
    assert relative(model(IDS).logits, twin(IDS).logits) < 1e-4
    for name, weight in weights.items():  # per expert: its planes are those of its matrix alone
        stack = model.get_submodule(name)
        for expert in range(EXPERTS):
            for plane, values in bitfold.encode(weight[expert], format).planes.items():
                assert torch.equal(getattr(stack, plane)[expert], values), (name, expert, plane)


def test_a_token_is_routed_once_to_each_of_its_experts():
    index = torch.tensor([[2, 0], [0, 3], [3, 2]])
    found = {number: (tokens.tolist(), places.tolist()) for number, tokens, places in routed(index)}
    assert found == {0: ([0, 1], [1, 0]), 2: ([0, 2], [0, 1]), 3: ([1, 2], [1, 0])}


def test_gradients_reach_the_input_and_the_router():
    model = mixtures.model("mixtral")
    bitfold.quantize(model, "int8-g32", quiet=True)
    twin = decoded(model, "mixtral", torch.float32)
    experts, own = model.model.layers[0].mlp.experts, twin.model.layers[0].mlp.experts
    index = torch.tensor([[0, 1], [1, 3], [2, 0]])
    gradients = []
    for module in (experts, own):
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weights = torch.full((3, 2), 0.5).requires_grad_()
        module(x, index, weights).square().sum().backward()
        gradients.append((x.grad, weights.grad))
    for got, wanted in zip(*gradients, strict=True):
        assert relative(got, wanted) < 1e-4


def test_a_stack_keeps_its_dtypes_and_says_what_it_is():
    model = mixtures.model("mixtral")
    bitfold.quantize(model, "int4-g32", quiet=True)
    stack = model.model.layers[0].mlp.experts.down_proj
    assert (
        str(stack)
        == f"QuantStack(experts={EXPERTS}, in_features={EXPERT}, out_features={HIDDEN}, format=int4-g32)"
    )
    before = [plane.clone() for plane in stack.planes()]
    model.to(torch.bfloat16)
    for plane, values in zip(stack.planes(), before, strict=True):
        assert plane.dtype == values.dtype
        assert torch.equal(plane, values)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert stack.nbytes == sum(plane.nbytes for plane in before)


def test_partly_quantized_experts():
    """One of the two stacks, the other as it was; and later the other one too."""
    model = mixtures.model("mixtral")
    rules = Recipe("down", "", (Rule("*.experts.down_proj", "int8-g32"),))
    bitfold.quantize(model, rules, quiet=True)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.down_proj, QuantStack)
    assert isinstance(experts.gate_up_proj, nn.Parameter)
    twin = decoded(model, "mixtral", torch.float32)
    assert relative(model(IDS).logits, twin(IDS).logits) < 1e-4
    summary = bitfold.quantize(model, "int4-g32", quiet=True)
    assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, QuantStack)
    names = {module.name for module in summary.modules}
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names
    assert not any(name.endswith((".down_proj", ".gate")) for name in names)


# ---- directories ----


def quantized(source, target, recipe="int4-g32"):
    return bitfold.quantize_checkpoint(source, target, recipe)


def test_a_directory_is_quantized_as_the_model_is(source, tmp_path):
    summary = quantized(source, tmp_path / "q")
    loaded = bitfold.load(tmp_path / "q")
    model = mixtures.model(source.name, torch.bfloat16)
    inside = bitfold.quantize(model, "int4-g32", quiet=True)
    state, wanted = loaded.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    assert {module.name: module.relative_rmse for module in summary.modules} == {
        module.name: module.relative_rmse for module in inside.modules
    }
    assert summary.bytes_after == sum(tensor.nbytes for tensor in tiny.tensors_of(tmp_path / "q").values())
    assert (summary.parameters, summary.bytes_before) == (inside.parameters, inside.bytes_before)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["modules"]["model.layers.1.mlp.experts.down_proj"] == {
        "kind": "experts",
        "format": "int4-g32",
        "shape": [EXPERTS, HIDDEN, EXPERT],
        "layout": "rows",
    }


def test_both_ways_to_store_experts_give_the_same_bytes(source, tmp_path):
    fused = mixtures.fuse(mixtures.write(tmp_path / "fused", source.name))
    assert any(tensor.dim() == 3 for tensor in tiny.tensors_of(fused).values())
    quantized(source, tmp_path / "a")
    quantized(fused, tmp_path / "b")
    one, two = tiny.tensors_of(tmp_path / "a"), tiny.tensors_of(tmp_path / "b")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_experts_that_lie_in_several_files(tmp_path):
    many = mixtures.write(tmp_path / "many", "mixtral", shard="20KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    bitfold.quantize_checkpoint(many, tmp_path / "a", "int4-g32", shard_bytes=20_000)
    quantized(mixtures.write(tmp_path / "one", "mixtral"), tmp_path / "b")
    one, two = tiny.tensors_of(tmp_path / "a"), tiny.tensors_of(tmp_path / "b")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert torch.equal(bitfold.load(tmp_path / "a")(IDS).logits, bitfold.load(tmp_path / "b")(IDS).logits)


def test_kept_experts_are_written_as_they_are(source, tmp_path):
    recipe = Recipe("kept", "", (Rule("*.experts", None), Rule("*", "int4-g32")))
    quantized(source, tmp_path / "q", recipe)
    model = mixtures.model(source.name, torch.bfloat16)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(tiny.tensors_of(tmp_path / "q")[name], model.get_parameter(name))
    bitfold.quantize(model, recipe, quiet=True)
    loaded = bitfold.load(tmp_path / "q")
    loaded.set_experts_implementation("eager")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_saving_and_loading_again(tmp_path):
    model = mixtures.model("qwen3_moe")
    bitfold.quantize(model, Recipe("down", "", (Rule("*.experts.down_proj", "nf4-dq"),)), quiet=True)
    bitfold.save(model, tmp_path / "q")
    again = bitfold.load(tmp_path / "q")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    bitfold.save(again, tmp_path / "r")
    one, two = tiny.tensors_of(tmp_path / "q"), tiny.tensors_of(tmp_path / "r")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_by_transformers(source, tmp_path):
    """from_pretrained loads, quantizes while it loads, and save_pretrained writes what both load."""
    quantized(source, tmp_path / "q")
    wanted = bitfold.load(tmp_path / "q")(IDS).logits
    auto = transformers.AutoModelForCausalLM
    assert torch.equal(auto.from_pretrained(tmp_path / "q").eval()(IDS).logits, wanted)
    made = auto.from_pretrained(source, quantization_config=bitfold.Config("int4-g32")).eval()
    assert torch.equal(made(IDS).logits, wanted)
    made.save_pretrained(tmp_path / "s")
    assert tiny.tensors_of(tmp_path / "s").keys() == tiny.tensors_of(tmp_path / "q").keys()
    assert torch.equal(bitfold.load(tmp_path / "s")(IDS).logits, wanted)
    assert torch.equal(auto.from_pretrained(tmp_path / "s").eval()(IDS).logits, wanted)


def test_the_way_back():
    model = mixtures.model("qwen3_moe")
    bitfold.quantize(model, "int4-g32", quiet=True)
    twin = decoded(model, "qwen3_moe", torch.float32)
    dequantize(model)
    assert not any(isinstance(module, PlaneModule) for module in model.modules())
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_the_plan_says_what_is_written(source, tmp_path, capsys):
    plan = bitfold.plan_checkpoint(source, "int4-g32")
    quantized(source, tmp_path / "q")
    assert plan.nbytes == sum(tensor.nbytes for tensor in tiny.tensors_of(tmp_path / "q").values())
    assert plan.class_bytes()["experts"] == sum(
        tensor.nbytes for name, tensor in tiny.tensors_of(tmp_path / "q").items() if ".experts." in name
    )
    assert any(
        "mlp.gate" in note and "the router of the experts is kept by default" in note for note in plan.notes
    )
    code, shown, _ = call(capsys, "quantize", source, "--dry-run", "--recipe", "int4-g32")
    assert code == 0
    assert "mlp.experts.down_proj" in shown
    assert "the router of the experts is kept by default" in " ".join(shown.split())


def test_the_commands(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    target = tmp_path / "q"
    code, shown, err = call(capsys, "quantize", source, target, "--recipe", "int4-g32")
    assert code == 0, err
    assert f"{EXPERTS} x {HIDDEN} x {EXPERT}" in shown
    assert "the largest error of one of them" in shown
    rows = {row["name"]: row for row in call_json(capsys, "inspect", target)["entries"]}
    row = rows["model.layers.1.mlp.experts.down_proj"]
    assert row["shape"] == [EXPERTS, HIDDEN, EXPERT]
    assert row["bits_per_weight"] == 4.5
    report = json.loads((target / "bitfold_report.json").read_text())["modules"]
    errors = [m["relative_rmse"] for m in report if stack_name(m["name"]) == row["name"]]
    assert len(errors) == EXPERTS
    assert row["relative_rmse"] == max(errors)
    # As far from the base as transformers' own model with the decoded weights.
    dequantize(bitfold.load(target, dtype=torch.float32)).save_pretrained(tmp_path / "decoded")
    shutil.copy(source / "tokenizer.json", tmp_path / "decoded")
    measured, decoded_too = (
        call_json(
            capsys, "eval", path, "--base", source, "--text", text, "--max-tokens", 100, "--dtype", "float32"
        )["mean_kl"]
        for path in (target, tmp_path / "decoded")
    )
    assert measured["value"] > 0
    assert measured["value"] == pytest.approx(decoded_too["value"], rel=1e-4)
    assert call_json(capsys, "generate", target, "--prompt", "The", "--max-new-tokens", 4)["tokens"]


def test_check_looks_at_every_expert(source, tmp_path, capsys):
    quantized(source, tmp_path / "q")
    assert call(capsys, "check", tmp_path / "q")[0] == 0
    name = "model.layers.1.mlp.experts.down_proj.scales"
    tiny.rewrite(tmp_path / "q", lambda tensors: tensors[name].__setitem__((2, 5, 0), float("nan")))
    code, shown, err = call(capsys, "check", tmp_path / "q")
    assert code != 0
    assert "model.layers.1.mlp.experts.2.down_proj.scales" in "".join((shown + err).split())


def test_experts_are_not_moved_into_formats_without_them(source, tmp_path, capsys):
    quantized(source, tmp_path / "q")
    for asked, way in (
        (("--to", "gptq"), "quantize the unquantized model"),
        (("--decode", "float32"), "dequantize()"),
    ):
        code, _, err = call(capsys, "convert", tmp_path / "q", tmp_path / "g", *asked)
        assert code == 2
        assert f"is a stack of experts, which a conversion doesn't move; {way}" in err.replace(
            "from_pretrained, ", ""
        )


def test_the_report_has_the_experts_of_a_layer_as_one(source, tmp_path, capsys):
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(tiny.TEXT)
    quantized(source, tmp_path / "q")
    few = ("--tokens", 60, "--attribution-tokens", 60, "--context", 30)
    code, _, err = call(
        capsys, "report", tmp_path / "q", "--base", source, "--text", text, "--output", page, *few
    )
    assert code == 0, err
    assert "model.layers.1.mlp.experts" in page.read_text()


# ---- bad input ----


def test_a_missing_expert_is_named(tmp_path):
    source = mixtures.write(tmp_path / "m", "mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tiny.rewrite(source, lambda tensors: tensors.pop(lost))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensor \('model\.layers\.1\.mlp\.experts\.2\.w3\.weight'\)"
    ):
        quantized(source, tmp_path / "q")


def test_an_expert_too_many_of_another_shape_or_dtype(tmp_path):
    source = mixtures.write(tmp_path / "m", "qwen3_moe")
    stem = "model.layers.1.mlp.experts"
    whole = tiny.tensors_of(source)

    def changed(name, value):
        tiny.rewrite(source, lambda tensors: tensors.update({**whole, name: value}))
        with pytest.raises(CheckpointError) as caught:
            quantized(source, tmp_path / "q")
        tiny.rewrite(source, lambda tensors: tensors.pop(name))
        return str(caught.value)

    shape = whole[f"{stem}.0.up_proj.weight"]
    assert f"{stem}.4.up_proj.weight" in changed(f"{stem}.4.up_proj.weight", shape.clone())
    assert "has shape [32, 32]" in changed(f"{stem}.0.up_proj.weight", shape[:, :32].contiguous())
    said = changed(f"{stem}.2.up_proj.weight", shape.float())
    assert "BF16" in said
    assert "F32" in said
    assert f"'{stem}.gate_up_proj'" in said


def test_a_nan_in_an_expert_is_named(tmp_path):
    source = mixtures.write(tmp_path / "m", "qwen2_moe")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tiny.rewrite(source, lambda tensors: tensors[name].__setitem__((3, 5), float("nan")))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.1\.gate_up_proj.*\[35, 5\]"):
        quantized(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [64, 32]}, "a list of 3 whole numbers"),
        ({"shape": [3, 64, 32]}, "makes it"),
        ({"g_idx": True}, "it must be false: experts have none"),
        ({"kind": "expert"}, "must be linear or embedding or experts"),
    ],
)
def test_entries_that_are_no_experts(change, words, tmp_path):
    quantized(mixtures.write(tmp_path / "m", "mixtral"), tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.experts.down_proj"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        bitfold.load(tmp_path / "q")


def test_stacks_go_only_where_they_fit():
    model = mixtures.model("mixtral")
    stack = QuantStack.empty("int4-g32", (EXPERTS, HIDDEN, EXPERT))
    for name, words in (
        ("model.layers.0.mlp.experts.up_proj", "doesn't have it"),
        ("model.layers.9.mlp.experts.down_proj", "doesn't have it"),
        ("model.layers.0.mlp.experts.gate_up_proj", r"it is \[4, 64, 32\], but .* \[4, 64, 64\]"),
        ("model.layers.0.self_attn.q_proj.weight", "it is a stack in a Linear, which has weight"),
    ):
        with pytest.raises(ValueError, match=words):
            put_stack(model, name, stack)
    with pytest.raises(ValueError, match="for int4-g32 they must be codes, scales"):
        QuantStack("int4-g32", (2, 4, 32), {"codes": torch.zeros(2, 4, 16, dtype=torch.uint8)})
    planes = {
        "codes": torch.zeros(2, 4, 8, dtype=torch.uint8),
        "scales": torch.zeros(2, 4, 1, dtype=torch.float16),
    }
    with pytest.raises(ValueError, match=r"plane codes is .*for 2 matrices 4x32"):
        QuantStack("int4-g32", (2, 4, 32), planes)
    bitfold.quantize(model, Recipe("x", "", (Rule("*.experts", "int4-g32"),)), quiet=True)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.mlp\.experts"):
        set_activations(model, "int8")
    assert stack_name(expert_name("a.experts.down_proj", 7)) == "a.experts.down_proj"
