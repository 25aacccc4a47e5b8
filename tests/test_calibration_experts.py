"""Experts within the loop over the blocks: what each is calibrated on, and what comes of those that nothing reaches."""

from __future__ import annotations

import json
from pathlib import Path

import bitfold
import mixtures
import pytest
import tiny
import torch
from bitfold import hf, quantize_calibrated
from bitfold.calibration import collect, data, scaling
from bitfold.calibration.workers import Workers
from bitfold.experts import QuantExperts, routed, stack_name
from bitfold.quantizers.awq import AwqOptions
from bitfold.recipes import Recipe, Rule
from calibrated import (
    BUNDLES,
    OPTIONS,
    block_run,
    check_nearly_the_same,
    contents,
    prepared,
    quantize_by_two_processes,
    quantize_with_kills,
)
from mixtures import EXPERTS, KINDS
from tiny import one_thread  # noqa: F401
from tiny_architectures import relative_difference

IDS = torch.randint(2, tiny.VOCAB, (5, 24), generator=torch.Generator().manual_seed(0))
RECIPES = ("gptq-int4-g32", "awq-int4-g32")


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory) -> Path:
    return mixtures.write(tmp_path_factory.mktemp("mixture") / request.param, request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return mixtures.write(tmp_path_factory.mktemp("mixture") / "mixtral", "mixtral")


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(mixtral, recipe, text, tmp_path_factory) -> Path:
    """Mixtral, by a run that nothing interrupts."""
    target = tmp_path_factory.mktemp("whole") / "q"
    quantize_calibrated(mixtral, target, recipe, text, **OPTIONS)
    return target


# ---- what an expert is calibrated on ----


def block_inputs(model, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts of a layer are called with: hidden states and numbers of experts, of all tokens."""
    seen = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        for row in ids:  # one at a time, as the loop runs them
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([index for _, index in seen])


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_those_of_the_tokens_that_are_sent_to_an_expert(kind, tmp_path):
    """In float64, from what transformers' own model does."""
    fields = {"mlp_only_layers": []} if kind == "qwen3_moe" else {}
    mixtures.write(tmp_path, kind, torch.float32, **fields)
    model = mixtures.model(kind, torch.float32, **fields)
    x, index = block_inputs(model, 0, IDS)
    experts = model.model.layers[0].mlp.experts
    with Workers() as workers:
        run, _ = block_run(tmp_path, bitfold.recipes.get("gptq-int4-g32"), IDS, workers)
        stacks = {stack_name(name) for group in run.groups for name in group if stack_name(name) != name}
        assert stacks == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        for e in range(EXPERTS):
            rows = x[(index == e).any(1)].double()
            gate, up = (rows @ experts.gate_up_proj[e].detach().double().T).chunk(2, dim=-1)
            for leaf, inputs in (("gate_up_proj", rows), ("down_proj", nn_silu(gate) * up)):
                name = f"mlp.experts.{e}.{leaf}"
                assert run.tokens(name) == len(rows)
                assert relative_difference(run.hessian(name).double(), inputs.T @ inputs) < 1e-5
                assert relative_difference(run.magnitudes(name), inputs.abs().mean(0)) < 1e-5
        found = run.routing("mlp.experts")
        assert found.counts.tolist() == [int((index == e).sum()) for e in range(EXPERTS)]
        assert relative_difference(found.magnitudes, x.double().abs().mean(0)) < 1e-6


def nn_silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


@torch.no_grad()
def test_the_measured_errors_are_those_of_the_experts(mixtral, text, tmp_path):
    """Of the last layer, whose inputs the finished model itself makes."""
    quantize_calibrated(mixtral, tmp_path / "q", "gptq-int4-g32", text, **OPTIONS)
    ids = data.read(text, tiny.tokenizer(), **OPTIONS).ids
    made, base = (
        bitfold.load(tmp_path / "q", dtype=torch.float32),
        hf.load_causal_lm(mixtral, dtype=torch.float32),
    )
    x, index = block_inputs(made, 1, ids)
    experts, own = made.model.layers[1].mlp.experts, base.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts)
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())["modules"]
    reported = {module["name"]: module["calibration"] for module in report}
    for e, tokens, _ in routed(index):
        hidden = x[tokens]
        gate, up = experts.gate_up_proj(hidden, e).chunk(2, dim=-1)
        for leaf, inputs in (("gate_up_proj", hidden), ("down_proj", torch.nn.functional.silu(gate) * up)):
            weight = getattr(own, leaf)[e].double()
            quantized = getattr(experts, leaf).matrix(e).decode(torch.float64)
            plain = bitfold.encode(weight, "int4-g32").decode(torch.float64)
            found = reported[f"model.layers.1.mlp.experts.{e}.{leaf}"]
            output = inputs.double() @ weight.T
            for key, changed in (("output_error", quantized), ("rounding_error", plain)):
                error = (inputs.double() @ (changed - weight).T).norm() / output.norm()
                assert found[key] == pytest.approx(float(error), rel=1e-3)
            assert found["output_error"] < found["rounding_error"]


# ---- AWQ ----


@pytest.mark.parametrize("kept", ["", "*.experts.down_proj", "*.gate_up_proj", "*.self_attn.*"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_block_computes_what_it_did(kind, kept, tmp_path):
    """Of a bfloat16 checkpoint, as it will be stored: with the router, norms and kept matrices in bfloat16."""
    mixtures.write(tmp_path, kind, **({"mlp_only_layers": []} if kind == "qwen3_moe" else {}))
    keep = (Rule(kept, "keep"),) if kept else ()
    recipe = Recipe("awq", "", (*keep, Rule("*", "int3-g16", "awq", AwqOptions(then="gptq"))))
    run, layers, changed = prepared(tmp_path, recipe, IDS, scaling.prepare)
    assert set(run.notes) == set(layers)
    assert max(note.alpha for note in run.notes.values()) > 0
    if kept != "*.gate_up_proj":  # whose norm isn't scaled then, unless a shared expert wants it
        assert {"mlp.gate.weight", "post_attention_layernorm.weight"} <= changed
    if kept != "*.experts.down_proj":
        assert {f"mlp.experts.{e}.down_proj.weight" for e in range(EXPERTS)} <= changed


def test_every_kind_is_nearer_than_plain_rounding(source, recipe, text, tmp_path):
    summary = quantize_calibrated(source, tmp_path / "q", recipe.replace("int4", "int3"), text, **OPTIONS)
    errors = [(m.calibration.output_error, m.calibration.rounding_error) for m in summary.modules]
    assert sum(error for error, _ in errors) < sum(error for _, error in errors)
    bitfold.quantize_checkpoint(source, tmp_path / "rtn", "int3-g32")
    ids = data.read(text, tiny.tokenizer(), **OPTIONS).ids
    with torch.no_grad():
        expected = hf.load_causal_lm(source).float()(input_ids=ids).logits
        made, rounded = (
            relative_difference(bitfold.load(tmp_path / n).float()(input_ids=ids).logits, expected)
            for n in ("q", "rtn")
        )
    assert made < rounded


# ---- the same bytes ----


@pytest.mark.parametrize("activations", ["ram", "disk"])
@pytest.mark.parametrize("at", ["model.layers.0.mlp.experts.2.gate_up_proj", "model.layers.0"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    at,
    activations,
    mixtral,
    recipe,
    text,
    whole,
    tmp_path,
    threads,
):
    def stop(what: str, done: int, total: int) -> None:
        if what == at:
            raise KeyboardInterrupt

    arguments = (mixtral, tmp_path / "q", recipe, text)
    options = {**OPTIONS, "activations": activations}
    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(*arguments, **options, progress=stop)
    threads(3)
    quantize_calibrated(*arguments, **options)
    assert contents(tmp_path / "q") == contents(whole)


def test_few_hessians_at_a_time_are_the_same(mixtral, recipe, text, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "_EXPERT_BYTES", 1)
    quantize_calibrated(mixtral, tmp_path / "q", recipe, text, **OPTIONS)
    assert contents(tmp_path / "q") == contents(whole)


def test_both_ways_to_store_experts_give_the_same_bytes(recipe, text, whole, tmp_path):
    fused = mixtures.fuse(mixtures.write(tmp_path / "fused", "mixtral"))
    quantize_calibrated(fused, tmp_path / "q", recipe, text, **OPTIONS)
    one, two = tiny.tensors_of(tmp_path / "q"), tiny.tensors_of(whole)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(mixtral, recipe, text, whole, tmp_path):
    quantize_with_kills(mixtral, tmp_path / "q", recipe, text, "disk")
    assert contents(tmp_path / "q") == contents(whole)


def test_two_processes_make_what_one_makes(mixtral, recipe, text, tmp_path):
    quantize_by_two_processes(mixtral, tmp_path / "two", recipe, text)
    one = quantize_calibrated(mixtral, tmp_path / "one", recipe, text, **BUNDLES)
    check_nearly_the_same(tmp_path / "one", tmp_path / "two", one)


# ---- experts that nothing reaches ----


def shy(path: Path, kind: str, experts: tuple[int, ...]) -> Path:
    """A model in whose layers some experts get no token: a channel is the same for all, and their routers abhor it."""
    mixtures.write(path, kind)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 0] = 5
        for name, tensor in tensors.items():
            if name.endswith((".o_proj.weight", "down_proj.weight", ".w2.weight")):
                tensor[0] = 0
            if name.endswith("post_attention_layernorm.weight"):
                tensor[0] = 1
            if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
                tensor.mul_(0.1)[:, 0] = 0
                tensor[list(experts), 0] = -20

    tiny.rewrite(path, change)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_that_nothing_reaches_are_named(kind, recipe, text, tmp_path):
    model = shy(tmp_path / "m", kind, (1, 3))
    layer = 1 if kind == "qwen3_moe" else 0
    names = ", ".join(f"model.layers.{layer}.mlp.experts.{e}" for e in (1, 3))
    with pytest.raises(ValueError, match=f"never reaches {names}: .*--allow-uncalibrated") as error:
        quantize_calibrated(model, tmp_path / "q", recipe, text, **OPTIONS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "q").exists()


def test_they_are_rounded_plainly_and_marked_where_that_is_allowed(recipe, text, tmp_path):
    model = shy(tmp_path / "m", "mixtral", (3,))
    with pytest.raises(ValueError, match=r"never reaches model\.layers\.0\.mlp\.experts\.3:"):
        quantize_calibrated(model, tmp_path / "q", recipe, text, **OPTIONS)
    quantize_calibrated(model, tmp_path / "q", recipe, text, **OPTIONS, allow_uncalibrated=True)
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())["modules"]
    for module in report:
        found = module["calibration"]
        if ".experts.3." in module["name"]:
            assert (found["method"], found["output_error"]) == ("rtn", None)
            assert found["note"] == "rounded plainly: the calibration text never reaches it"
        else:
            assert found["method"] in ("gptq", "awq"), module
            assert found["note"] == ""
    made = bitfold.load(tmp_path / "q")
    if recipe.startswith("gptq"):
        weight = tiny.tensors_of(model)["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
        stack = made.model.layers[1].mlp.experts.down_proj
        for plane, values in bitfold.encode(weight, "int4-g32").planes.items():
            assert torch.equal(stack.matrix(3).planes[plane], values)
    else:  # its columns are divided as all others are: what it makes of a token is hardly changed
        base = mixtures.model("mixtral", torch.float32)
        base.load_state_dict(hf.load_causal_lm(model, dtype=torch.float32).state_dict())
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
        index, weights = torch.full((7, 1), 3), torch.ones(7, 1)
        norms = [m.model.layers[0].post_attention_layernorm.weight.float() for m in (base, made)]
        with torch.no_grad():
            wanted = base.model.layers[0].mlp.experts(x * norms[0], index, weights)
            got = made.model.layers[0].mlp.experts(x * norms[1], index, weights)
        assert relative_difference(got, wanted) < 0.25


def test_experts_that_are_rounded_anyway_need_no_token(text, tmp_path):
    model = shy(tmp_path / "m", "mixtral", (0, 2))
    recipe = Recipe("x", "", (Rule("*.experts", "int4-g32"), Rule("*", "int4-g32", "gptq")))
    quantize_calibrated(model, tmp_path / "q", recipe, text, **OPTIONS)
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())["modules"]
    assert all(("calibration" in module) == ("self_attn" in module["name"]) for module in report)


# ---- what is kept ----


@pytest.mark.parametrize("kept", ["*.experts", "*.gate_up_proj", "*.experts.down_proj"])
def test_kept_experts_are_gone_on_with(kept, mixtral, recipe, text, tmp_path):
    """AWQ scales what it keeps, where a norm or an up projection feeds what it doesn't."""
    method, format = recipe.partition("-")[0], "int8-g32"
    rules = Recipe("kept", "", (Rule(kept, "keep"), Rule("*", format, method)))

    def stop(what: str, done: int, total: int) -> None:
        if what == "model.layers.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(mixtral, tmp_path / "q", rules, text, **OPTIONS, progress=stop)
    quantize_calibrated(mixtral, tmp_path / "q", rules, text, **OPTIONS)
    quantize_calibrated(mixtral, tmp_path / "whole", rules, text, **OPTIONS)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")
    made, base = bitfold.load(tmp_path / "q"), hf.load_causal_lm(mixtral)
    for leaf in ("gate_up_proj", "down_proj"):
        stack = getattr(made.model.layers[1].mlp.experts, leaf)
        source = getattr(base.model.layers[1].mlp.experts, leaf)
        if kept not in ("*.experts", f"*.{leaf}", f"*.experts.{leaf}"):
            assert stack.format == format
        elif method == "gptq" or kept == "*.experts":
            assert torch.equal(stack, source)
        else:  # by powers of two, which change no digit
            assert stack.dtype == torch.bfloat16
            assert torch.equal(torch.frexp(stack.float()).mantissa, torch.frexp(source.float()).mantissa)
    ids = data.read(text, tiny.tokenizer(), **OPTIONS).ids
    with torch.no_grad():
        made, base = (model.float()(input_ids=ids).logits for model in (made, base))
    # Of some tokens an expert is exchanged for another: the router's choice is no continuous function.
    assert ((made - base).norm(dim=-1) / base.norm(dim=-1)).median() < 0.05


def test_experts_of_another_kind_are_kept_and_run(text, tmp_path):
    """gpt-oss: its attention is calibrated through experts that bitfold only runs."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        layer_types=["full_attention"] * 2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    recipe = Recipe("attention", "", (Rule("*.experts", "keep"), Rule("*", "int4-g32", "gptq")))
    summary = quantize_calibrated(tmp_path / "m", tmp_path / "q", recipe, text, **OPTIONS)
    assert all("self_attn" in module.name for module in summary.modules)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(tiny.tensors_of(tmp_path / "q")[name], tiny.tensors_of(tmp_path / "m")[name])
