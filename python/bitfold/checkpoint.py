"""Saving and loading quantized models.

A checkpoint is a model directory as Hugging Face lays it out: safetensors files, config.json, tokenizer
files. A quantized module's planes are stored under its name ("model.layers.0.mlp.up_proj.codes"), everything
else as it was. config.json has the section

    "quantization_config": {
        "quant_method": "bitfold", "format_version": 1, "bitfold_version": "...", "load_with": "...",
        "recipe": "int4-g128",
        "modules": {"model.layers.0.mlp.up_proj": {"kind": "linear", "format": "int4-g128", "shape": [n, k],
                                                   "layout": "rows"}, ...},
        "tied": {"lm_head.weight": "model.embed_tokens.weight"}}

where a stack of experts has the kind "experts" and the shape [experts, n, k], and planes whose first dimension are the
experts, an embedding also names its output "dtype", and `tied` maps the name of a tensor that is not stored to the one
that it is. A layer that does something with its input says so ("activations": "llm-int8-exact"; without that word it is
"float"), and where it has a 16-bit copy of columns, of how many and in which dtype ("outliers": 12, "outlier_dtype":
"bfloat16").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import _C, activations, hf
from bitfold.activations import FLOAT, Activations
from bitfold.experts import QuantStack, put_stack
from bitfold.formats import parse, plane_shapes
from bitfold.nn import (
    OUTLIER_DTYPES,
    PlaneModule,
    QuantEmbedding,
    QuantLinear,
    QuantModule,
    announce,
    embedding_scale,
)
from bitfold.shards import (
    CONFIG_FILE,
    CheckpointError,
    StoredTensor,
    TensorSpec,
    read_directory,
    read_tensors,
)
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target, files_to_copy

FORMAT_VERSION = 1
QUANT_METHOD = "bitfold"
# For whoever opens config.json because transformers said that it skips a quantization it doesn't know.
LOAD_WITH = (
    "bitfold.load(path), or transformers' from_pretrained(path) behind `import bitfold`; pip install bitfold"
)
_KINDS = {"linear": 2, "embedding": 2, "experts": 3}  # of modules, and how many sizes their shapes have


@dataclass(frozen=True)
class ModuleEntry:
    """What config.json says of one quantized module.

    kind: "linear", "embedding" or "experts"; format: canonical; shape: (n, k), of experts (experts, n, k); dtype: of
    an embedding's output, else None; g_idx: whether the weight has one; activations: of a linear layer or of experts;
    x_scale: whether a linear layer has one (static ones always do); outliers, outlier_dtype: the columns of which it
    has a copy, and its dtype.
    """

    kind: str
    format: str
    shape: tuple[int, ...]
    layout: str = "rows"
    dtype: torch.dtype | None = None
    g_idx: bool = False
    activations: Activations = FLOAT
    outliers: int = 0
    outlier_dtype: torch.dtype | None = None
    x_scale: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_scale", self.x_scale or self.activations.is_static)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight, or of each expert's."""
        return self.shape[-2], self.shape[-1]

    def weight_of(self, name: str) -> str:
        """What the weight is called where it isn't quantized; name: of the module."""
        return name if self.kind == "experts" else f"{name}.weight"

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = {
            "kind": self.kind,
            "format": self.format,
            "shape": list(self.shape),
            "layout": self.layout,
        }
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.g_idx:
            fields["g_idx"] = True
        if not self.activations.is_float:
            fields["activations"] = str(self.activations)
        if self.x_scale and not self.activations.is_static:
            fields["x_scale"] = True
        if self.outliers:
            fields["outliers"] = self.outliers
            fields["outlier_dtype"] = str(self.outlier_dtype).removeprefix("torch.")
        return fields

    def parts(self) -> dict[str, TensorSpec]:
        """What the weight is stored as, by names within the module: its planes, and g_idx and what the activations take
        where it has them."""
        (n, k), experts = self.matrix, self.shape[:-2]
        shapes = plane_shapes(self.format, n, k, self.layout)
        found = {
            law.name: TensorSpec(law.name, law.dtype, (*experts, *shapes[law.name]))
            for law in parse(self.format).planes
        }
        if self.g_idx:
            found["g_idx"] = TensorSpec("g_idx", torch.int32, (k,))
        if self.x_scale:
            found["x_scale"] = TensorSpec("x_scale", torch.float32, ())
        if self.outliers and self.outlier_dtype is not None:
            found["outlier_columns"] = TensorSpec("outlier_columns", torch.int32, (self.outliers,))
            found["outlier_weight"] = TensorSpec("outlier_weight", self.outlier_dtype, (n, self.outliers))
        return found


@dataclass(frozen=True)
class QuantizationConfig:
    """The section quantization_config of config.json."""

    recipe: str
    modules: Mapping[str, ModuleEntry]
    tied: Mapping[str, str]
    version: str = _C.__version__

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model computes in, where a quantized embedding tells it; else None."""
        return next((entry.dtype for entry in self.modules.values() if entry.dtype is not None), None)

    def to_json(self) -> dict[str, object]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bitfold_version": self.version,
            "load_with": LOAD_WITH,
            "recipe": self.recipe,
            "modules": {name: entry.to_json() for name, entry in self.modules.items()},
            "tied": dict(self.tied),
        }


def read_quantization(path: Path, config: Mapping[str, Any]) -> QuantizationConfig:
    """The checked quantization_config of a checkpoint's config.json.

    Raises CheckpointError where the model is not quantized, was quantized by another library or by a newer
    bitfold, or where the section is malformed.
    """
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} is not quantized: its {CONFIG_FILE} has no quantization_config")
    return parse_quantization(str(path), section)


def parse_quantization(origin: str, section: Mapping[str, Any]) -> QuantizationConfig:
    """A section quantization_config, checked; origin: what has it, for messages. Raises as `read_quantization`."""
    if section.get("quant_method") != QUANT_METHOD:
        method = section.get("quant_method")
        raise CheckpointError(f"{origin} was quantized by '{method}', which bitfold doesn't read")
    version = section.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{origin} has the format_version {version!r}, which must be a number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{origin} has checkpoint version {version} (bitfold {section.get('bitfold_version')}), and this "
            f"bitfold, {_C.__version__}, reads up to version {FORMAT_VERSION}: install a newer one"
        )
    try:
        modules = {name: _read_entry(fields) for name, fields in section["modules"].items()}
        tied = {str(alias): str(owner) for alias, owner in section.get("tied", {}).items()}
        return QuantizationConfig(
            str(section.get("recipe")), modules, tied, str(section.get("bitfold_version"))
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{origin} has a malformed quantization_config: {error}") from None


def _read_entry(fields: Mapping[str, Any]) -> ModuleEntry:
    kind = fields["kind"]
    if kind not in _KINDS:
        raise ValueError(f"the kind '{kind}' must be {', '.join(list(_KINDS)[:-1])} or {list(_KINDS)[-1]}")
    shape = tuple(int(size) for size in fields["shape"])
    if len(shape) != _KINDS[kind]:
        raise ValueError(f"the shape {list(shape)} of a {kind} must have {_KINDS[kind]} sizes")
    dtype = getattr(torch, fields["dtype"]) if "dtype" in fields else None
    g_idx = fields.get("g_idx", False)
    if not isinstance(g_idx, bool):
        raise ValueError(f"g_idx is {g_idx!r}; it must be true or false")
    if g_idx and kind == "experts":
        raise ValueError("experts have a g_idx; they must have none")
    entry = ModuleEntry(
        kind,
        parse(fields["format"]).canonical,
        shape,
        fields["layout"],
        dtype,
        g_idx,
        activations.read(fields.get("activations", "float")),
        fields.get("outliers", 0),
        getattr(torch, fields["outlier_dtype"]) if "outlier_dtype" in fields else None,
        fields.get("x_scale", False) is True,
    )
    _check_activations(entry)
    return entry


def _check_activations(entry: ModuleEntry) -> None:
    entry.activations.check(entry.format)
    multiplies = entry.kind != "embedding" or entry.activations.is_float
    if not multiplies or (entry.kind == "experts" and entry.activations.needs_calibration):
        raise ValueError(
            f"a module of the kind '{entry.kind}' can't have the activations '{entry.activations}'"
        )
    outliers = entry.outliers
    if not isinstance(outliers, int) or isinstance(outliers, bool) or not 0 <= outliers <= entry.shape[-1]:
        raise ValueError(f"outliers is {outliers!r}; it must be a number of columns of {list(entry.shape)}")
    if entry.x_scale and entry.kind != "linear":
        raise ValueError(f"a module of the kind '{entry.kind}' has an x_scale, which is for linear layers")
    if outliers and (entry.kind != "linear" or entry.outlier_dtype not in OUTLIER_DTYPES):
        raise ValueError(
            f"outlier_dtype of a module of the kind '{entry.kind}' is {entry.outlier_dtype}; outliers are for linear "
            "layers, in float16 or bfloat16"
        )
    if entry.activations.exact_outliers and not outliers:
        raise ValueError(f"the activations '{entry.activations}' take outliers, but there are none")


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
            writer.add_json("generation_config.json", json.loads(generation.to_json_string()))
        for file in files_to_copy(Path(tokenizer_from)) if tokenizer_from is not None else ():
            if generation is None or file.name != "generation_config.json":
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


def listed(names: list[str]) -> str:
    """'1 tensor ('a')', '3 tensors ('a', 'b', ...)'."""
    shown = ", ".join(f"'{name}'" for name in names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
