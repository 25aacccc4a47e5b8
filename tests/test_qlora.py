"""Training on packed weights: what the backward pass needs, checkpointing, autocast, Trainer, the plan of memory."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold import layout, recipes
from bitfold.training import Training, adapter_parameters, optimizer_bytes, plan_training
from tiny import LLAMA_2_7B, one_thread, write_llama  # noqa: F401
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "qlora.py"
IDS = torch.arange(64).reshape(2, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("source") / "model", torch.float32, hidden=128, ffn=256, layers=3
    )


def qlora(source: Path, dtype: torch.dtype = torch.float32, checkpointing: bool = False, rank: int = 8):
    base = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=bitfold.Config("nf4-dq")
    )
    torch.manual_seed(0)
    model = get_peft_model(base, bitfold.peft.prepare(LoraConfig(r=rank, target_modules="all-linear"), base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    if checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def gradients(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, **options).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# ---- what is kept ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_decoded_weight_is_kept_for_the_backward_pass(dtype):
    """The forward pass saves the planes themselves, and x not at all: only x has a gradient."""
    torch.manual_seed(0)
    layer = bitfold.QuantLinear(bitfold.encode(torch.randn(96, 256), "nf4-b64-dq"))
    x = torch.randn(8, 256, dtype=dtype, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert {tensor.data_ptr() for tensor in saved} == {plane.data_ptr() for plane in layer.planes()}
    y.float().square().sum().backward()
    assert all(plane.grad is None and not plane.requires_grad for plane in layer.planes())
    decoded = layer.qtensor.decode().double()
    expected = (2 * (x.detach().double() @ decoded.T)) @ decoded
    error = (x.grad.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_checkpointing_gives_the_same_gradients(source):
    plain, again = gradients(qlora(source)), gradients(qlora(source, checkpointing=True))
    assert set(plain) == set(again)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_bfloat16_and_autocast(source):
    """A base in bf16, and autocast as Trainer's bf16=True has it: as far from float32 as plain layers are with the
    decoded weights. Adapters stay float32, and planes what they are."""

    def error(found, exact):
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        ours, wanted = (torch.cat([each[name].flatten() for name in exact]) for each in (found, exact))
        return ((ours - wanted).norm() / wanted.norm()).item()

    def plain(dtype):
        model = qlora(source, dtype)
        for module in list(model.modules()):
            if isinstance(getattr(module, "base_layer", None), bitfold.QuantLinear):
                weight = module.base_layer.qtensor.decode(dtype)
                module.base_layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                module.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        return model

    exact = gradients(plain(torch.float32))
    assert error(gradients(qlora(source)), exact) < 1e-4
    bound = 1.25 * error(gradients(plain(torch.bfloat16)), exact)
    assert 0 < bound < 0.5
    assert error(gradients(qlora(source, torch.bfloat16)), exact) < bound
    with torch.autocast("cpu", torch.bfloat16):
        bound = 1.25 * error(gradients(plain(torch.float32)), exact)
        model = qlora(source)
        assert 0 < error(gradients(model), exact) < bound
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer
    assert {plane.dtype for plane in layer.planes()} == {torch.uint8, torch.float32}


# ---- Trainer ----


def test_trainer_refuses_a_model_without_adapters(source, tmp_path):
    from transformers import Trainer, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=bitfold.Config("nf4-dq"))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(base, arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}])


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="examples/ is not beside the tests")
def test_the_example_in_small(tmp_path, capsys, monkeypatch):
    """The loss falls as with a base of 16 bits; the adapter that it kept loads. Of a text that is the same with every
    Python, as the default isn't."""
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLE))
    options = example["parse"](
        [
            "--steps",
            "8",
            "--batch",
            "4",
            "--eval-rows",
            "8",
            "--learning-rate",
            "1e-2",
            "--text",
            str(EXAMPLE.parents[1] / "LICENSE"),
            "--keep",
            str(tmp_path),
        ]
    )
    runs = example["compare"](options)
    example["show"](runs)
    plain, packed = runs
    assert packed.base < 0.25 * plain.base
    assert plain.fall > 0.05
    assert packed.fall > 0.9 * plain.fall
    assert "With nf4-dq the loss falls by" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=bitfold.Config("nf4-dq"))
    bitfold.peft.load(base, tmp_path / "nf4-dq")
    AutoModelForCausalLM.from_pretrained(tmp_path / "nf4-dq merged")


# ---- the plan of memory ----


def test_llama_65b(tmp_path, monkeypatch):
    """The figures of the QLoRA paper's largest model: 65 billion parameters on one GPU of 48 GB."""
    shape = {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_2_7B, **shape}))
    source = layout.read_source(tmp_path, config_suffices=True)
    monkeypatch.setattr("bitfold.training.LAYERS", (1, 2))
    plan = plan_training(source, recipes.get("nf4-dq"), Training(rank=64, adapter_dtype="bf16"))
    assert round(plan.linears / 1e9, 1) == 33.4
    assert round(plan.weights / 1e9, 1) == 34.5
    assert round(plan.adapters / 1e9, 1) == 1.6
    assert round(2 * adapter_parameters(source.infos, 8) / 1e9, 1) == 0.2
    assert plan.total < 48e9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prediction_is_what_the_profiler_counts(source, checkpointing):
    """Bytes of tensors in a second step, parameters and the optimizer's state included, within 10%."""
    training = Training(rank=8, context=64, batch=4, checkpointing=checkpointing)
    plan = plan_training(layout.read_source(source), recipes.get("nf4-dq"), training)
    model = qlora(source, checkpointing=checkpointing)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, 250, (4, 64))

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert plan.weights + plan.adapters == parameters
    state = sum(value.nbytes for each in optimizer.state.values() for value in each.values() if value.dim())
    assert plan.optimizer == state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert plan.total == pytest.approx(parameters + state + peak, rel=0.1)


def test_few_layers_stand_for_many(tmp_path, monkeypatch):
    """Five layers, run with one and two of them, are what five layers are."""
    source = layout.read_source(write_llama(tmp_path / "many", layers=5))
    training = Training(rank=4, context=32)
    found = []
    for layers in ((1, 2), (4, 5)):
        monkeypatch.setattr("bitfold.training.LAYERS", layers)
        found.append(plan_training(source, recipes.get("nf4"), training).activations)
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_optimizers_and_what_training_refuses():
    assert optimizer_bytes(1000, 4000, "adamw") == 8000
    assert optimizer_bytes(1000, 4000, "adamw-8bit") == 2 * (1000 + 4 * 4)
    for wrong, message in (
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of adamw, adamw-8bit"),
        ({"adapter_dtype": "fp8"}, "adapter_dtype is 'fp8'; it must be one of fp32, bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            Training(**wrong)


def test_optimizer_bytes_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameter = nn.Parameter(torch.randn(64, 512))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {
        name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)
    }
    held = sum(value.nbytes for name, value in state.items() if "qmap" not in name)  # one for all parameters
    assert held == optimizer_bytes(parameter.numel(), parameter.nbytes, "adamw-8bit")


def test_the_command(source, capsys):
    from command import call, call_json

    code, out, _ = call(capsys, "plan", source, "--train", "qlora", "--rank", "4", "--fit", "1GB")
    assert code == 0
    assert "rank 4 in fp32" in out
    assert "Into 1 GB fit: nf4-dq" in out
    plan = call_json(capsys, "plan", source, "--train", "qlora", "--recipe", "int4-g32", "--no-checkpointing")
    assert plan["recipes"]["int4-g32"]["total"] > plan["recipes"]["int4-g32"]["weights"]
    code, _, err = call(capsys, "plan", source, "--train", "full")
    assert code != 0
    assert "--train is 'full'; it must be one of qlora" in err
