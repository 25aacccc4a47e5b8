"""What fine-tuning a quantized model takes in memory, before anything is computed: `bitfold plan --train qlora`.

The sum of

    weights      of the base, packed, and what isn't quantized: as in the checkpoint
    adapters     A [r, k] and B [n, r] of every linear layer but the output head
    gradients    of the adapters, in their dtype
    optimizer    Adam's two moments: in the adapters' dtype, or in 8 bits with a float32 maximum for each 256 of them
    activations  the most that a step holds beside these, at one time: what the backward pass needs of the forward
                 pass, and what is on its way

The first four follow from shapes. For the last one the step is run, with PEFT's own layers and the model's own code,
on tensors that have shapes and no data (torch's FakeTensorMode), while the bytes of all storages that are alive are
counted. A model of many decoder layers is run with few of them, twice: they are taken to be alike. With checkpointing a
decoder layer keeps its input alone and computes the rest again.

Memory that kernels take for themselves, Python, torch and the allocator's gaps come on top.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bitfold import hf, layout, versions
from bitfold.embeddings import QuantEmbedding, embedding_scale
from bitfold.experts import QuantStack, put_stack
from bitfold.formats import ceil_div
from bitfold.layout import Source
from bitfold.nn import QuantLinear, put_module
from bitfold.quantize import refuse_calibration
from bitfold.rules import Assignment, ModuleInfo, Recipe, assign

ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = ("adamw", "adamw-8bit")
OPTIMIZER_BLOCK = 256  # numbers that share a maximum in 8-bit optimizers (Dettmers et al. 2021)
LAYERS = (4, 8)  # that the step is run with, where there are more
CONTEXT = 512  # tokens of a sequence, where none are named: the QLoRA paper's


@dataclass(frozen=True)
class Training:
    """How it is to be trained. adapter_dtype: of ADAPTER_DTYPES; optimizer: of OPTIMIZERS."""

    rank: int = 16
    adapter_dtype: str = "fp32"
    optimizer: str = "adamw"
    context: int = CONTEXT
    batch: int = 1
    checkpointing: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, known in (("adapter_dtype", tuple(ADAPTER_DTYPES)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes; see the head of this file. linears: of weights, those of quantized linear layers; parameters: of the
    adapters."""

    weights: int
    linears: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    parameters: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations


def plan_training(source: Source, recipe: Recipe, training: Training) -> TrainingMemory:
    """What training adapters on a model takes; config.json is enough, no weight is read.

    Raises ValueError where the recipe doesn't fit the model, or where its code can't be run on shapes alone (experts
    that are chosen by values), MissingExtraError where PEFT is not installed.
    """
    refuse_calibration(recipe)
    versions.PEFT.require("a plan of training")
    assignments = assign(recipe, source.infos)
    steps = layout.steps(source, assignments, compare_tied=False)
    linears = {
        step.module
        for step in steps
        if step.format is not None and source.infos[step.module].kind == "linear"
    }
    parameters = adapter_parameters(source.infos, training.rank)
    adapters = parameters * ADAPTER_DTYPES[training.adapter_dtype].itemsize
    return TrainingMemory(
        weights=sum(step.nbytes for step in steps),
        linears=sum(step.nbytes for step in steps if step.module in linears),
        adapters=adapters,
        gradients=adapters,
        optimizer=optimizer_bytes(parameters, adapters, training.optimizer),
        activations=activation_bytes(source, assignments, training),
        parameters=parameters,
    )


def adapter_parameters(infos: Mapping[str, ModuleInfo], rank: int) -> int:
    """Numbers in the adapters of all linear layers but the output head."""
    layers = [info for info in infos.values() if info.kind == "linear" and not info.is_head]
    return sum(rank * (info.shape[0] + info.shape[1]) for info in layers)


def optimizer_bytes(parameters: int, adapters: int, optimizer: str) -> int:
    """Of two moments of each of `parameters` numbers, which have `adapters` bytes themselves."""
    if optimizer == "adamw-8bit":
        return 2 * (parameters + 4 * ceil_div(parameters, OPTIMIZER_BLOCK))
    return 2 * adapters


# ---- a step without data ----


def activation_bytes(source: Source, assignments: Mapping[str, Assignment], training: Training) -> int:
    """The most bytes that a training step holds beside parameters and their gradients."""
    model = _adapted(source, assignments, training)
    layers = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList()
    )
    count, (few, more) = len(layers), LAYERS
    try:
        if count <= more:
            return _run(model, training)
        del layers[more:]
        second = _run(model, training)
        del layers[few:]
        each = (second - _run(model, training)) / (more - few)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"the activations of {source.model_config.model_type} can't be told from shapes alone: {hf.reason(error)}"
        ) from error
    return round(second + (count - more) * each)


def _run(model: nn.Module, training: Training) -> int:
    """A forward and a backward pass: the most bytes that were alive."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _put_fake_tensors(model)
        ids = torch.zeros(training.batch, training.context, dtype=torch.int64)
        with _Alive() as alive:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(alive.leave_out_gradient)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return alive.peak


def _adapted(source: Source, assignments: Mapping[str, Assignment], training: Training) -> nn.Module:
    """The model with quantized modules and adapters, its parameters on the meta device."""
    from peft import LoraConfig, get_peft_model

    from bitfold.peft import prepare

    dtype = hf.config_dtype(source.config)
    base: Any = hf.empty_causal_lm(source.path, source.config, dtype)
    for name, item in assignments.items():
        if item.format is None:
            continue
        if source.infos[name].kind == "experts":
            put_stack(base, name, QuantStack.empty(item.format, source.infos[name].shape, "meta"))
            continue
        old = base.get_submodule(name)
        n, k = source.infos[name].shape
        new: QuantLinear | QuantEmbedding
        if isinstance(old, nn.Embedding):
            new = QuantEmbedding.empty(
                item.format, n, k, old.padding_idx, "meta", dtype, scale=embedding_scale(old)
            )
        else:
            new = QuantLinear.empty(item.format, n, k, old.bias is not None, "meta", dtype)
        put_module(base, old, new)
    config = prepare(LoraConfig(r=training.rank, target_modules="all-linear"), base)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(ADAPTER_DTYPES[training.adapter_dtype])
    if training.checkpointing:
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # of its next name, which older versions don't know
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _put_fake_tensors(model: nn.Module) -> None:
    """Within FakeTensorMode: tensors of a CPU, without data, in the places of all parameters and buffers."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for home in (module._parameters, module._buffers):
            for name, old in list(home.items()):
                if old is None:
                    continue
                if id(old) not in made:
                    fake = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = (
                        nn.Parameter(fake, old.requires_grad) if home is module._parameters else fake
                    )
                home[name] = made[id(old)]  # type: ignore[assignment]


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that were made since it was entered and are still alive; peak: the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # bytes by the storage's identity
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            id(item.untyped_storage()) for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)
        }
        for item in tree_iter(result):
            if isinstance(item, torch.Tensor):
                self._see(item.untyped_storage(), known)
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self._alive or id(storage) in known:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key)

    def leave_out_gradient(self, parameter: torch.Tensor) -> None:
        """Count the gradient of a parameter no more."""
        if parameter.grad is not None:
            self._forget(parameter.grad.untyped_storage()._cdata)

    def _forget(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)
