"""Saving and loading quantized models.

A checkpoint is a model directory as Hugging Face lays it out: safetensors files, config.json, tokenizer files. A
quantized module's planes are stored under its name ("model.layers.0.mlp.up_proj.codes"), everything else as it was.
What config.json says of them is in section.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.embeddings import QuantEmbedding, embedding_scale
from bitfold.experts import QuantStack, put_stack
from bitfold.nn import PlaneModule, QuantLinear, QuantModule, announce
from bitfold.section import ModuleEntry, QuantizationConfig, read_quantization
from bitfold.shards import (
    CONFIG_FILE,
    CheckpointError,
    StoredTensor,
    TensorSpec,
    listed,
    read_directory,
    read_tensors,
)
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target, files_to_copy


def save(
    model: nn.Module,
    path: str | Path,
    *,
    recipe: str = "",
    tokenizer_from: str | Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model with quantized modules as a checkpoint directory.

    Args:
        model: any torch model; of a transformers model the configurations are saved too, so that `load` can
            build it.
        path: the directory to make. A crash leaves nothing there.
        recipe: a name to note in the checkpoint.
        tokenizer_from: a model directory whose tokenizer files are copied along.
        force: replace a bitfold checkpoint that is there.
        shard_bytes: the largest size of a file.

    Raises:
        CheckpointError: the path is taken, or the disk too small.
        OSError: the path can't be written.
    """
    path = check_target(Path(path), force=force)
    state, _ = _unique_tensors(model)
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"'{name}' has no values (it is on the meta device), so the model can't be saved"
            )
    quantization = describe_quantization(model, recipe)
    config = _config_of(model, quantization.modules, state)
    config["quantization_config"] = quantization.to_json()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    with CheckpointWriter(path, specs, force=force, shard_bytes=shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            writer.add_json(hf.GENERATION_FILE, json.loads(generation.to_json_string()))
        for file in files_to_copy(Path(tokenizer_from)) if tokenizer_from is not None else ():
            if generation is None or file.name != hf.GENERATION_FILE:
                writer.add_copy(file)
        writer.commit(config)


def describe_quantization(model: nn.Module, recipe: str = "") -> QuantizationConfig:
    """What config.json must say of a model with quantized modules; recipe: a name to note."""
    modules = {
        name: _entry_of(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PlaneModule)
    }
    return QuantizationConfig(recipe, modules, _unique_tensors(model)[1])


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state to store, each tensor once, and the names of the others."""
    owners: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = owners.setdefault(id(tensor), name)
        if owner == name:
            state[name] = tensor.detach()
        else:
            tied[name] = owner
    return state, tied


def _entry_of(module: PlaneModule) -> ModuleEntry:
    if isinstance(module, QuantStack):
        return ModuleEntry(
            "experts", module.format, module.shape, module.layout, activations=module.activations
        )
    if isinstance(module, QuantEmbedding):
        return ModuleEntry("embedding", module.format, module.shape, module.layout, module.dtype)
    assert isinstance(module, QuantLinear)
    copy = module.outlier_weight
    return ModuleEntry(
        "linear",
        module.format,
        module.shape,
        module.layout,
        g_idx=module.g_idx is not None,
        activations=module.activations,
        outliers=0 if copy is None else copy.shape[1],
        outlier_dtype=None if copy is None else copy.dtype,
        x_scale=module.x_scale is not None,
    )


def _config_of(
    model: nn.Module, modules: Mapping[str, ModuleEntry], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """config.json of a transformers model, with the dtype its unquantized tensors have; {} of any other
    model.
    """
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    if to_json is None:
        return {}
    config = json.loads(to_json())
    planes = {f"{name}.{part}" for name, entry in modules.items() for part in entry.parts()}
    dtypes = [entry.dtype for entry in modules.values() if entry.dtype is not None]
    dtypes += [
        tensor.dtype for name, tensor in state.items() if tensor.is_floating_point() and name not in planes
    ]
    if dtypes:
        config["dtype"] = str(dtypes[0]).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    return config


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a checkpoint that bitfold wrote; the weights stay quantized and, on the CPU, memory-mapped.

    Args:
        path: the checkpoint directory. Its files must not change while the model lives.
        model: the unquantized model to load into (its own weights are dropped; the meta device will do).
            None: a transformers causal language model is built from config.json.
        device: where the model goes.
        dtype: compute in this dtype; norms, biases and kept weights are cast to it. None: as they are stored.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: files are missing, truncated or contradict each other, or a newer bitfold wrote them.
        MissingExtraError: transformers is needed and not installed.
    """
    path = Path(path)
    config = hf.read_config(path)
    quantization = read_quantization(path, config)
    stored = read_directory(path)
    values = read_tensors(sorted(stored.values(), key=lambda tensor: tensor.path))
    return assemble(path, config, quantization, stored, values, model=model, device=device, dtype=dtype)


def assemble(
    path: Path,
    config: dict[str, Any],
    quantization: QuantizationConfig,
    stored: Mapping[str, StoredTensor],
    values: Iterable[tuple[str, Tensor]],
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A quantized model of its parts, as `load` gives it.

    path: where they are from, for messages; config: config.json; stored: the shape of every tensor by its name in the
    quantized model; values: each of them once, in any order. model, device, dtype: as in `load`.
    """
    cast = dtype
    if model is None:
        if "model_type" not in config:
            raise CheckpointError(
                f"{path} holds no transformers model: pass the model to load into (model=...)"
            )
        cast = dtype or quantization.dtype or hf.config_dtype(config)
        model = hf.empty_causal_lm(path, config, cast)
    put_empty_modules(model, quantization.modules)
    _assign(model, path, stored, values, quantization, cast)
    if torch.device(device).type != "cpu":
        model.to(device)
    for name, module in model.named_modules():
        if isinstance(module, PlaneModule):
            if isinstance(module, QuantModule):
                check_values_of(path, name, module)
            module.prepare()
    announce(model, quantization.recipe)
    return model.eval()


def check_values_of(path: Path, name: str, module: QuantModule) -> None:
    """What no shape tells: whether g_idx gives each group its columns, and whether what a layer keeps for its
    activations can be. Raises CheckpointError."""
    try:
        if module.g_idx is not None:
            _ = module.qtensor
        if isinstance(module, QuantLinear):
            module.check_kept()
    except ValueError as error:
        raise CheckpointError(f"{path}: '{name}': {error}") from None


def put_empty_modules(model: nn.Module, modules: Mapping[str, ModuleEntry]) -> None:
    """Put quantized modules without values in the places that a checkpoint names.

    Raises CheckpointError where the model has nothing there, or something else.
    """
    for name, entry in modules.items():
        if entry.kind == "experts":
            _put_empty_stack(model, name, entry)
            continue
        try:
            old: Any = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"the checkpoint quantizes '{name}', which the model doesn't have"
            ) from None
        wanted = (nn.Linear, QuantLinear) if entry.kind == "linear" else (nn.Embedding, QuantEmbedding)
        if not isinstance(old, wanted):
            raise CheckpointError(
                f"the checkpoint has '{name}' as a {entry.kind}, the model as a {type(old).__name__}"
            )
        shape = old.shape if isinstance(old, QuantModule) else tuple(old.weight.shape)
        if shape != entry.shape:
            raise CheckpointError(
                f"the checkpoint quantizes '{name}' as {list(entry.shape)}, "
                f"but the model's configuration makes it {list(shape)}"
            )
        n, k = entry.shape
        new: QuantModule
        if entry.kind == "linear":
            bias: Any = old.bias.dtype if old.bias is not None else None
            new = QuantLinear.empty(
                entry.format,
                n,
                k,
                bias=bias is not None,
                device="meta",
                dtype=bias,
                layout=entry.layout,
                with_g_idx=entry.g_idx,
                activations=entry.activations,
                outliers=entry.outliers,
                outlier_dtype=entry.outlier_dtype,
                with_x_scale=entry.x_scale,
            )
        else:
            new = QuantEmbedding.empty(
                entry.format,
                n,
                k,
                padding_idx=getattr(old, "padding_idx", None),
                device="meta",
                dtype=entry.dtype or torch.float32,
                layout=entry.layout,
                scale=embedding_scale(old),
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def _put_empty_stack(model: nn.Module, name: str, entry: ModuleEntry) -> None:
    """Put a stack without values in the place of one parameter of a module of experts."""
    count, n, k = entry.shape
    try:
        stack = QuantStack.empty(entry.format, (count, n, k), "meta", entry.layout)
        stack.activations = entry.activations
        put_stack(model, name, stack)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint quantizes the experts '{name}', but {error}") from None


def _assign(
    model: nn.Module,
    path: Path,
    stored: Mapping[str, StoredTensor],
    values: Iterable[tuple[str, Tensor]],
    quantization: QuantizationConfig,
    dtype: torch.dtype | None,
) -> None:
    """Give every parameter and persistent buffer its stored tensor, without a copy; tied ones stay one
    object.
    """
    slots = _slots(model)
    check_shapes(path, stored, {name: old for name, (_, _, old) in slots.items()})
    planes = {
        f"{name}.{part}": spec.dtype
        for name, entry in quantization.modules.items()
        for part, spec in entry.parts().items()
    }
    fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    new: dict[int, Tensor] = {}
    for name, tensor in values:
        module, attribute, old = slots[name]
        if name in planes:
            if tensor.dtype != planes[name]:
                raise CheckpointError(
                    f"{path}: '{name}' is {tensor.dtype}, but its format has {planes[name]}"
                )
        elif dtype is not None and tensor.is_floating_point() and not set(name.split(".")) & set(fp32):
            tensor = tensor.to(dtype)
        if attribute in module._parameters:
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        new[id(old)] = tensor
    for alias, owner in quantization.tied.items():
        if alias not in slots or owner not in slots or id(slots[owner][2]) not in new:
            raise CheckpointError(
                f"{path / CONFIG_FILE} ties '{alias}' to '{owner}', but they are not both there"
            )
        new[id(slots[alias][2])] = new[id(slots[owner][2])]
    missing = [name for name, (_, _, old) in slots.items() if id(old) not in new]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}")
    for module, attribute, old in slots.values():
        home = module._parameters if attribute in module._parameters else module._buffers
        home[attribute] = new[id(old)]  # type: ignore[assignment]
    if dtype is not None:
        for module in model.modules():
            if isinstance(module, QuantEmbedding):
                module.dtype = dtype


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Where each tensor of the state_dict lives: module, attribute and the tensor that is there now."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for attribute, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is not None:
                slots[f"{prefix}.{attribute}" if prefix else attribute] = (module, attribute, tensor)
    return slots


def check_shapes(path: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where a stored tensor is unknown to the model or has another shape there."""
    extra = [name for name in stored if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{path} holds {listed(extra)}, which the model of its {CONFIG_FILE} doesn't have"
        )
    for name, tensor in stored.items():
        if tensor.shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{tensor.path}: tensor '{name}' has shape {list(tensor.shape)}, but {CONFIG_FILE} makes it "
                f"{list(wanted[name].shape)}"
            )
