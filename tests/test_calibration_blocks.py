"""The decoder blocks of transformers' own classes, one at a time, compute what they compute in the whole model."""

from __future__ import annotations

import sys
import weakref

import pytest
import tiny
import tiny_architectures
import torch
from bitfold import layout, recipes
from bitfold.calibration import methods
from bitfold.calibration.activations import Activations, are_kept
from bitfold.calibration.blocks import BlockModel, find_blocks
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.workers import Workers
from bitfold.quantizers import gptq
from bitfold.recipes import Recipe, Rule
from bitfold.shards import CheckpointError
from tiny import one_thread  # noqa: F401
from torch import nn

IDS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(0))
KEEP_ALL = Recipe("keep", "", (Rule("*", "keep"),))
ALL_INT8 = Recipe("int8", "", (Rule("*", "int8-channel"),))
GROUPS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.fixture
def workers(threads):
    threads(2)
    with Workers() as made:
        yield made


def opened(path) -> BlockModel:
    source = layout.read_source(path)
    steps = layout.steps(source, recipes.assign(KEEP_ALL, source.infos))
    return BlockModel(source, steps, torch.float32, torch.device("cpu"))


def saved(name, path, dtype=torch.float32):
    """A model directory, and the model with float32 weights of the same values."""
    model = tiny_architectures.model(name, dtype)
    model.save_pretrained(path)
    return model.float()


def rules_of(blocks: BlockModel, index: int) -> dict[str, Rule]:
    """One rule for all linear layers of a block."""
    prefix = f"{blocks.names[index]}."
    names = [name for name, info in blocks.source.infos.items() if info.kind == "linear"]
    return {name.removeprefix(prefix): Rule("*", "int8-channel") for name in names if name.startswith(prefix)}


@torch.no_grad()
def hidden_states(model: nn.Module) -> list[torch.Tensor]:
    """What goes into each block, and what comes out of the last, as hooks in the whole model see it."""
    layers = model.model.layers
    found = []
    handles = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda _, args, output: found.append(output)))
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", tiny_architectures.MODELS)
def test_blocks_run_one_at_a_time_as_in_the_model(name, dtype, tmp_path, workers):
    model = saved(name, tmp_path, dtype)
    expected = hidden_states(model)
    blocks = opened(tmp_path)
    inputs = Activations((3, 24, 48), torch.float32, None)
    calls = blocks.first_inputs(IDS, inputs.write_first)
    assert len(calls) == len(blocks.names) == 2
    for index, call in enumerate(calls):
        # An embedding's factor (Gemma) has the dtype of its weights: bfloat16 rounds it.
        limit = 1e-5 if dtype == torch.float32 else 2e-3
        assert tiny_architectures.relative_difference(inputs.data, expected[index]) < limit
        inputs.data.copy_(expected[index])
        run = BlockRun(blocks.names[index], blocks.load(index), {}, call, inputs, workers, torch.float32)
        run.write_outputs()
        inputs.advance()
        assert tiny_architectures.relative_difference(inputs.data, expected[index + 1]) < 2e-6


@pytest.mark.parametrize("name", tiny_architectures.MODELS)
def test_layers_with_one_input_are_a_group_in_the_order_in_which_they_run(name, tmp_path, workers):
    saved(name, tmp_path)
    blocks = opened(tmp_path)
    inputs = Activations((3, 24, 48), torch.float32, None)
    calls = blocks.first_inputs(IDS, inputs.write_first)
    run = BlockRun(
        blocks.names[1], blocks.load(1), rules_of(blocks, 1), calls[1], inputs, workers, torch.float32
    )
    found = [tuple(layer.rpartition(".")[2] for layer in group) for group in run.groups]
    fused = [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)]
    assert found == (fused if name.startswith("phi3") else GROUPS)
    assert run.never_run == ()


def test_the_hessian_is_the_sum_over_all_inputs(tmp_path, workers):
    model = saved("llama", tmp_path, torch.bfloat16)
    blocks = opened(tmp_path)
    inputs = Activations((3, 24, 48), torch.float32, None)
    calls = blocks.first_inputs(IDS, inputs.write_first)
    run = BlockRun(
        blocks.names[0], blocks.load(0), rules_of(blocks, 0), calls[0], inputs, workers, torch.float32
    )
    layers = dict(model.model.layers[0].named_modules())
    for layer in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        xs = []
        with (
            layers[layer].register_forward_pre_hook(lambda _, args, xs=xs: xs.append(args[0])),
            torch.no_grad(),
        ):
            model(input_ids=IDS, use_cache=False)
        x = torch.cat(xs).flatten(0, 1).double()
        assert tiny_architectures.relative_difference(run.hessian(layer), x.t() @ x) < 1e-5
        assert tiny_architectures.relative_difference(torch.cat(list(run.inputs(layer))), x) < 1e-5
    assert run.hessian("mlp.gate_proj") is run.hessian("mlp.up_proj")


def test_the_last_layer_of_a_group_takes_the_hessian_along(tmp_path, workers):
    """And the solver lets go of it when it has its factor: from then on nothing holds it."""
    saved("llama", tmp_path, torch.bfloat16)
    blocks = opened(tmp_path)
    inputs = Activations((3, 24, 48), torch.float32, None)
    calls = blocks.first_inputs(IDS, inputs.write_first)
    run = BlockRun(
        blocks.names[0], blocks.load(0), rules_of(blocks, 0), calls[0], inputs, workers, torch.float32
    )
    held = []

    def columns(*args, of=gptq._columns):
        held.append(hessian() is not None)
        return of(*args)

    for name in ("mlp.gate_proj", "mlp.up_proj"):
        hessian = weakref.ref(run.hessian(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gptq, "_columns", columns)
            methods.METHODS["gptq"].round(run, name)
    assert held[0]
    assert held[-1] == (sys.version_info < (3, 11))  # whose callers hold what they have handed on


def test_a_hessian_of_many_strips_and_waves_has_the_same_bits_for_any_number_of_threads(tmp_path, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        with Workers() as workers:
            blocks = opened_wide(tmp_path)
            inputs = Activations((5, 24, 640), torch.float32, None)
            calls = blocks.first_inputs(IDS[[0, 1, 2, 0, 1]], inputs.write_first)
            run = BlockRun(
                blocks.names[0], blocks.load(0), rules_of(blocks, 0), calls[0], inputs, workers, torch.float32
            )
            hessians = [run.hessian(layer) for layer in ("self_attn.q_proj", "mlp.down_proj")]
            run.write_outputs()
            inputs.advance()
            found.append([*hessians, inputs.data])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    assert torch.equal(found[0][0], found[0][0].t())


def opened_wide(path) -> BlockModel:
    if not path.joinpath("config.json").exists():
        tiny.llama(torch.bfloat16, layers=1, hidden=640, ffn=700).save_pretrained(path)
    return opened(path)


def test_arguments_are_those_that_call_a_part_again(tmp_path, workers):
    model = saved("llama", tmp_path)
    blocks = opened(tmp_path)
    inputs = Activations((3, 24, 48), torch.float32, None)
    calls = blocks.first_inputs(IDS, inputs.write_first)
    run = BlockRun(blocks.names[0], blocks.load(0), {}, calls[0], inputs, workers, torch.float32)
    outputs = []
    with (
        model.model.layers[0].self_attn.register_forward_hook(
            lambda _, args, output: outputs.append(output[0])
        ),
        torch.no_grad(),
    ):
        model(input_ids=IDS, use_cache=False)
    part = run.module.self_attn
    for sample, (args, kwargs) in enumerate(run.arguments("self_attn")):
        found = run.compute(lambda args=args, kwargs=kwargs: part(*args, **kwargs))[0]
        assert tiny_architectures.relative_difference(found[0], outputs[0][sample]) < 1e-5
    assert sample == 2


# ---- what can't be found or run ----


def test_blocks_that_are_no_chain_are_refused(tmp_path):
    saved("llama", tmp_path)
    blocks = opened(tmp_path)
    forward = blocks.model.forward

    def parallel(input_ids, use_cache):
        x = blocks.model.model.embed_tokens(input_ids)
        return [layer(x * 1) for layer in blocks.model.model.layers]

    blocks.model.forward = parallel
    with pytest.raises(CheckpointError, match="no chain"):
        blocks.first_inputs(IDS, lambda sample, x: None)
    blocks.model.forward = lambda input_ids, use_cache: blocks.model.model.layers[0](
        blocks.model.model.embed_tokens(input_ids)
    )
    with pytest.raises(CheckpointError, match="runs 1 of its 2 blocks"):
        blocks.first_inputs(IDS, lambda sample, x: None)
    blocks.model.forward = forward
    assert len(blocks.first_inputs(IDS, lambda sample, x: None)) == 2


def test_arguments_that_depend_on_the_text_are_refused(tmp_path):
    saved("llama", tmp_path)
    blocks = opened(tmp_path)
    inner = blocks.model.model

    def forward(input_ids, use_cache):
        x = inner.embed_tokens(input_ids)
        for layer in inner.layers:
            x = layer(x, text=input_ids)

    blocks.model.forward = forward
    with pytest.raises(CheckpointError, match="depends on the text"):
        blocks.first_inputs(IDS, lambda sample, x: None)


@pytest.mark.parametrize(("lists", "message"), [(0, "no list of 2 modules"), (2, r"2 lists of 2 modules")])
def test_a_model_whose_blocks_can_not_be_found(lists, message, tmp_path):
    saved("llama", tmp_path)
    source = layout.read_source(tmp_path)
    layers = source.model.model.layers
    if lists == 0:
        source.model.model.layers = nn.Sequential(*layers)
    else:
        source.model.encoder = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(CheckpointError, match=rf"can't be found: its model has {message}"):
        find_blocks(source)


# ---- activations ----


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_outputs_become_inputs(where, tmp_path):
    folder = tmp_path if where == "disk" else None
    inputs = Activations((2, 3, 4), torch.float32, folder)
    first = torch.arange(24.0).view(2, 3, 4)
    for sample in range(2):
        inputs.write_first(sample, first[sample])
    for block in range(3):
        for sample in range(2):
            inputs.write(sample, inputs.data[sample] + 1)
        inputs.advance()
        assert torch.equal(inputs.data, first + block + 1)


def test_activations_on_the_disk_outlive_the_run(tmp_path):
    shape = (2, 3, 4)
    inputs = Activations(shape, torch.float32, tmp_path)
    for sample in range(2):
        inputs.write_first(sample, torch.zeros(3, 4))
        inputs.write(sample, torch.full((3, 4), 7.0))
    assert not are_kept(tmp_path, shape, torch.float32, 0)
    inputs.advance()
    assert are_kept(tmp_path, shape, torch.float32, 1)
    assert not are_kept(tmp_path, (2, 3, 5), torch.float32, 1)
    again = Activations(shape, torch.float32, tmp_path, 1)
    assert (again.data == 7).all()
