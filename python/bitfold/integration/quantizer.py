"""What transformers' from_pretrained asks of a quantization method.

It makes the model on the meta device, lets the quantizer change it (`_process_model_before_weight_loading`), reads the
tensors one by one, handing those that the quantizer claims to its operation (encode.py), ties weights, and lets the
quantizer have a last look.

A checkpoint of bitfold's gets its quantized modules before, and its planes are loaded as any tensor. A model that is
to be quantized keeps its own modules until their weight comes: it is encoded, and the quantized module takes their
place before the next weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from bitfold.activations import Activations
from bitfold.checkpoint import check_values_of, describe_quantization, put_empty_modules
from bitfold.embeddings import QuantEmbedding
from bitfold.formats import stored_bytes
from bitfold.integration.config import Config
from bitfold.nn import LISTENERS, PlaneModule, QuantModule
from bitfold.quantize import check_swappable, describe, refuse_calibration
from bitfold.rules import ModuleInfo, assign
from bitfold.section import QUANT_METHOD, ModuleEntry, QuantizationConfig
from bitfold.shards import CheckpointError, StoredTensor, listed, read_header


def enter() -> None:
    """Put bitfold into transformers' tables."""
    register_quantization_config(QUANT_METHOD)(Config)
    register_quantizer(QUANT_METHOD)(Quantizer)
    LISTENERS.append(adopt)


def adopt(model: nn.Module, recipe: str = "") -> None:
    """Make a model of transformers that bitfold quantized or loaded like one of from_pretrained's: it saves itself as
    quantized, and Trainer knows that it is. Other models are left alone.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        section = describe_quantization(model, recipe)
        if section.modules:
            adopted: Any = model
            adopted.hf_quantizer = Quantizer(Config(recipe, section=section), pre_quantized=True)
            tie_planes(model)


class Quantizer(HfQuantizer):
    """Loads bitfold's checkpoints, and quantizes others while they load; see the head of this file."""

    quantization_config: Config

    def __init__(self, quantization_config: Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.formats: dict[str, str] = {}  # of each weight that is to be encoded, by its name
        self.activations: dict[str, Activations] = {}  # of each module
        self.tied: dict[str, list[str]] = {}  # modules of one weight, by the first of them
        self.planes: set[str] = set()  # names of a checkpoint's planes
        self.error: ValueError | None = None  # of a weight, told when transformers can be left

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        section = self.quantization_config.section
        if self.pre_quantized and section is None:
            raise CheckpointError("the model's quantization_config names no quantized modules")
        if not self.pre_quantized and section is not None:
            raise ValueError(
                "quantization_config is that of a quantized model; to quantize another one give "
                "bitfold.Config with a recipe"
            )
        if not self.pre_quantized:
            refuse_calibration(self.quantization_config.recipe)  # type: ignore[arg-type]
            if isinstance(device_map, Mapping) and "disk" in device_map.values():
                raise ValueError(
                    "device_map puts modules on the disk, which goes with a quantized checkpoint alone: save the "
                    "model when it is quantized, and load that"
                )

    def update_attn_implementation(self, config: Any) -> Any:
        # Called before the dtype is chosen: where an embedding is quantized, transformers' save_pretrained takes the
        # dtype of its scales for the model's.
        section = self.quantization_config.section
        if section is not None and section.dtype is not None:
            config.dtype = section.dtype
        return config

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # through adapters: gradients go through the packed weights to the inputs

    @property
    def is_compileable(self) -> bool:
        return True

    # ---- before the weights ----

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._put_modules(model, checkpoint_files)
        else:
            self._choose(model)

    def _put_modules(self, model: Any, checkpoint_files: Sequence[str] | None) -> None:
        """The modules of a checkpoint, without values."""
        section = self.quantization_config.section
        assert section is not None
        if not checkpoint_files:
            raise ValueError("a state_dict was given; a checkpoint of bitfold's is loaded from its directory")
        modules = _localize(model, section.modules)
        stored: dict[str, StoredTensor] = {}
        for file in checkpoint_files:
            stored.update(read_header(Path(file)))
        _check_planes(Path(checkpoint_files[0]).parent, stored, section.modules, section.tied)
        put_empty_modules(model, modules)
        self.planes = {f"{name}.{part}" for name, entry in modules.items() for part in entry.parts()}
        for module in model.modules():
            if isinstance(module, QuantEmbedding):
                module.dtype = model.config.dtype  # that which from_pretrained was asked for
        tie_planes(model)

    def _choose(self, model: Any) -> None:
        """Which weights are to be encoded, and how."""
        recipe = self.quantization_config.recipe
        assert recipe is not None
        infos = _with_ties(describe(model), model.all_tied_weights_keys)
        assignments = assign(recipe, infos)
        formats = {name: item.format for name, item in assignments.items() if item.format is not None}
        self.activations = {name: assignments[name].activations for name in formats}
        for name, format in formats.items():
            check_swappable(name, model, infos[name], with_values=False)
            owner = infos[name].tied_to or name
            self.tied.setdefault(owner, []).append(name)
            self.formats[infos[name].weight_of(name)] = format

    # ---- the weights ----

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.formats

    def get_quantize_ops(self) -> Any:
        # transformers imports what this builds on after the tables that bitfold enters.
        from bitfold.integration.encode import Encode

        return Encode(self)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        format = self.formats.get(param_name)
        if format is None:
            return param.element_size()
        n, k = param.shape[-2:]
        return stored_bytes(format, n, k) / max(1, n * k)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # A plane has the dtype of its format, whatever the model is loaded in.
        if converter.target_patterns[0] in self.planes:
            return None
        return super().get_new_dtype(converter, param, dtype)

    # ---- behind the weights ----

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        for name, module in model.named_modules():
            if not isinstance(module, PlaneModule):
                continue
            for plane in module.parts():
                plane.requires_grad_(False)  # transformers makes float parameters trainable
            if isinstance(module, QuantModule):
                check_values_of(model.name_or_path, name, module)
            module.prepare()
        self._describe(model)

    def _describe(self, model: Any) -> QuantizationConfig:
        config = self.quantization_config
        config.section = describe_quantization(model, config.name)
        return config.section

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Told before the model is saved: its configuration is to say what it is now."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            if self._describe(model).modules:
                model.config.quantization_config = self.quantization_config
                # transformers would give tensors the names of older checkpoints, and take stacks of experts apart.
                model._weight_conversions = []
            else:  # its weights were decoded since
                self.remove_quantization_config(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from bitfold.dequantize import dequantize

        return dequantize(model, dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Called where no weight of the model is quantized any more."""
        super().remove_quantization_config(model)
        tie_weights(model)


def _with_ties(infos: Mapping[str, ModuleInfo], tied: Mapping[str, str]) -> dict[str, ModuleInfo]:
    """Modules of a model whose weights transformers is yet to tie, as they will be; tied: names of tensors."""
    owners = {alias.removesuffix(".weight"): owner.removesuffix(".weight") for alias, owner in tied.items()}
    return {
        name: dataclasses.replace(info, tied_to=owners[name]) if owners.get(name) in infos else info
        for name, info in infos.items()
    }


_TIES = "_ties_before_bitfold"  # what _tied_weights_keys was, an attribute of the model


def tie_planes(model: nn.Module) -> None:
    """Where a quantized weight is tied, name its planes in transformers' tables of tied tensors."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        expanded = module.get_expanded_tied_weights_keys(all_submodels=False)
        planes: dict[str, str] = {}
        for alias, owner in expanded.items():
            taken, given = _owner_of(module, alias), _owner_of(module, owner)
            if isinstance(taken, QuantModule) and isinstance(given, QuantModule):
                stems = alias.rpartition(".")[0], owner.rpartition(".")[0]
                planes |= {f"{stems[0]}.{name}": f"{stems[1]}.{name}" for name in given.plane_names}
            else:
                planes[alias] = owner
        if planes != expanded:  # its names of anything but weights and biases are patterns
            patterns = {f"{re.escape(alias)}$": f"{re.escape(owner)}$" for alias, owner in planes.items()}
            module.__dict__.setdefault(_TIES, module._tied_weights_keys)
            module._tied_weights_keys = patterns
    if isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def tie_weights(model: Any) -> None:
    """Undo `tie_planes`: the tied tensors are weights again."""
    for module in model.modules():
        if _TIES in module.__dict__:
            module._tied_weights_keys = module.__dict__.pop(_TIES)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _owner_of(model: nn.Module, tensor: str) -> nn.Module | None:
    try:
        return model.get_submodule(tensor.rpartition(".")[0])
    except AttributeError:
        return None


def _localize(model: Any, modules: Mapping[str, ModuleEntry]) -> dict[str, ModuleEntry]:
    """Entries by the names that their modules have in `model`: those of a headless model (AutoModel) have no prefix.

    What another class of models lacks, such as the output head, is left out, which transformers reports; the class
    that was quantized must have everything.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    found = {}
    for name, entry in modules.items():
        local = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in names), name)
        if local in names or same_class:
            found[local] = entry
    return found


def _check_planes(
    path: Path,
    stored: Mapping[str, StoredTensor],
    modules: Mapping[str, ModuleEntry],
    tied: Mapping[str, str],
) -> None:
    """Raises CheckpointError unless every plane is there, in the dtype and shape of its format.

    transformers fills what is missing with random numbers, and casts what has another dtype.
    """
    missing = []
    for module, entry in modules.items():
        for part, spec in entry.parts().items():
            name = tied.get(f"{module}.{part}", f"{module}.{part}")
            if name not in stored:
                missing.append(name)
                continue
            tensor = stored[name]
            if tensor.torch_dtype != spec.dtype or tensor.shape != spec.shape:
                raise CheckpointError(
                    f"{tensor.path}: '{name}' is {tensor.torch_dtype} of shape {list(tensor.shape)}; for "
                    f"{entry.format} it must be {spec.dtype} of shape {list(spec.shape)}"
                )
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}")
