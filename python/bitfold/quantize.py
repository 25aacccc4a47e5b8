"""Quantizes the linear layers and embeddings of a torch model in memory, in place, by a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import experts
from bitfold.activations import FLOAT, Activations
from bitfold.embeddings import QuantEmbedding, embedding_scale
from bitfold.experts import QuantStack
from bitfold.formats import parse
from bitfold.nn import QuantLinear, announce, put_module
from bitfold.qtensor import QTensor, column_order, embedding, encode
from bitfold.recipes import get
from bitfold.rules import ModuleInfo, Recipe, assign

# An untied output head of a model that has no get_output_embeddings() is recognised by these names.
HEAD_NAMES = ("lm_head", "output", "embed_out")
# Weights decoded at a time when an error is measured.
ROW_BLOCK = 1 << 18

Progress = Callable[[str, int, int], None]
"""Told after each module: its name, the weights done so far, the weights to do in all."""


@dataclass(frozen=True)
class CalibrationSummary:
    """How a weight was quantized by what its layer multiplied.

    method: "gptq", ...; "rtn" where that could not be done, and `note` says why; output_error, rounding_error: norm of
    the change of the layer's output over the calibration data, over norm of the output, with these codes and with those
    of plain rounding (None: not measured); damping: of the Hessian, relative to its mean diagonal; x_scale: the step of
    static activations; outliers: columns of which there is a 16-bit copy (None: the layer has no use for any).
    """

    method: str
    output_error: float | None = None
    rounding_error: float | None = None
    damping: float | None = None
    note: str = ""
    x_scale: float | None = None
    outliers: int | None = None


@dataclass(frozen=True)
class ModuleSummary:
    """One quantized weight. relative_rmse: norm of (decoded - source) over norm of source; bytes of weight
    and planes; calibration: None where the weight was rounded to nearest."""

    name: str
    format: str
    shape: tuple[int, int]
    relative_rmse: float
    bytes_before: int
    bytes_after: int
    calibration: CalibrationSummary | None = None


@dataclass(frozen=True)
class QuantizationSummary:
    """What was quantized. parameters, bytes_before, bytes_after: of the whole model, shared weights counted
    once."""

    recipe: str
    modules: tuple[ModuleSummary, ...]
    parameters: int
    bytes_before: int
    bytes_after: int

    @property
    def quantized_parameters(self) -> int:
        return sum(math.prod(module.shape) for module in self.modules)

    @property
    def share(self) -> float:
        """Share of the model's parameters that are quantized, 0 to 1."""
        return self.quantized_parameters / max(1, self.parameters)

    def __str__(self) -> str:
        return (
            f"{self.recipe}: quantized {len(self.modules)} weights, {self.share:.1%} of {self.parameters:,} "
            f"parameters, {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        )


def describe(model: nn.Module) -> dict[str, ModuleInfo]:
    """What a recipe may know of a model's linear layers, embeddings and expert stacks, by dotted name; reads
    no weights.

    The output head is what model.get_output_embeddings() returns; in a model without such a method it is a
    linear layer that shares its weight with an embedding, or is named as one of HEAD_NAMES and as wide as
    some embedding is long. A 3-D parameter outside of a convolution, none of its sizes 1, is a stack of
    experts; what stands beside it with one matrix, a row for each expert or a single one, is a router (Qwen2's
    gate of the shared expert has a single row). Quantized modules are left out.
    """
    infos: dict[str, ModuleInfo] = {}
    owners: dict[int, str] = {}
    head = _output_head(model)
    routers = _routers(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
            owner = owners.setdefault(id(module.weight), name)
            infos[name] = ModuleInfo(
                kind=base.__name__.lower(),
                shape=tuple(module.weight.shape),
                is_head=module is head,
                is_router=module in routers,
                tied_to=None if owner == name else owner,
                obstacle=_obstacle(module),
            )
        elif module in routers:
            obstacle = f"it is a {type(module).__name__}, no nn.Linear"
            weight: Any = module.weight
            infos[name] = ModuleInfo("linear", tuple(weight.shape), is_router=True, obstacle=obstacle)
        for leaf, stack in experts.stacks(module).items():
            why = experts.obstacle(module)
            infos[f"{name}.{leaf}" if name else leaf] = ModuleInfo(
                "experts", tuple(stack.shape), obstacle=why
            )
    return infos


def _routers(model: nn.Module) -> set[nn.Module]:
    """The modules that say to which experts a token goes, or how much of a shared one it gets."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        counts = {count for child in parent.children() if (count := experts.count(child))}
        for child in parent.children() if counts else ():
            inside = [m for m in child.modules() if isinstance(getattr(m, "weight", None), Tensor)]
            inside = [m for m in inside if m.weight.dim() == 2]  # type: ignore[operator]
            if len(inside) == 1 and len(inside[0].weight) in {1, *counts}:  # type: ignore[arg-type]
                found.add(inside[0])
    return found


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        head = getter()
        return head if isinstance(head, nn.Module) else None
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = {id(module.weight) for module in embeddings}
    lengths = {module.num_embeddings for module in embeddings}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            named = name.rpartition(".")[2] in HEAD_NAMES and module.out_features in lengths
            if named or id(module.weight) in tied:
                return module
    return None


def quantize(
    model: nn.Module,
    recipe: str | Path | Recipe,
    *,
    clamp: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> QuantizationSummary:
    """Swaps the nn.Linear and nn.Embedding modules of a model, and its experts, for quantized ones, in place.

    recipe: what `recipes.get` takes; see there for which modules it reaches. Weights that are shared are
    encoded once and stay shared; a bias stays the same Parameter. clamp: as in `encode`. Prints one line with
    the share of the parameters that is quantized, unless quiet.

    Raises ValueError. Whatever names and shapes can tell (unknown recipe, a rule without effect, expert
    stacks, subclasses) is told before anything changes. Each source weight is freed as soon as it is encoded,
    so an error in a weight (a NaN, a scale out of range), which names the module, leaves the modules before
    it quantized, it and those behind it as they were: a model that runs.
    """
    recipe = get(recipe)
    infos = describe(model)
    refuse_calibration(recipe)
    assignments = assign(recipe, infos)
    formats = {name: item.format for name, item in assignments.items() if item.format is not None}
    activations = {name: assignments[name].activations for name in formats}
    for name in formats:
        check_swappable(name, model, infos[name])
    tied: dict[str, list[str]] = {}  # modules of one weight, by the first of them
    for name in formats:
        tied.setdefault(infos[name].tied_to or name, []).append(name)

    parameters, bytes_before = _count(model)
    total = sum(math.prod(infos[name].shape) for name in tied)
    done = 0
    summaries = []
    for name, names in tied.items():
        if infos[name].kind == "experts":
            stack = model.get_parameter(name)
            summaries += put_stack(model, name, stack, formats[name], clamp, activations[name])
        else:
            summaries.append(_swap(model, names, formats[name], clamp, activations))
        done += math.prod(infos[name].shape)
        if progress is not None:
            progress(name, done, total)

    announce(model, recipe.name)
    summary = QuantizationSummary(recipe.name, tuple(summaries), parameters, bytes_before, _count(model)[1])
    if not quiet:
        print(summary)
    return summary


def refuse_calibration(recipe: Recipe) -> None:
    """Raises ValueError where a recipe can't be followed by looking at the weights alone."""
    if recipe.needs_calibration:
        methods = sorted({rule.calibrates for rule in recipe.rules if rule.needs_calibration})
        raise ValueError(
            f"recipe {recipe.name!r} needs a text to calibrate on ({', '.join(methods)}): give --calibration FILE "
            "(bitfold.quantize_calibrated)"
        )


def _obstacle(module: nn.Linear | nn.Embedding) -> str | None:
    """Why a layer computes in another way than bitfold's do; None: it doesn't."""
    if isinstance(module, nn.Embedding):
        try:
            embedding_scale(module)
        except ValueError as error:
            return str(error)
    elif type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, a subclass of nn.Linear"
    return None


def check_swappable(name: str, model: nn.Module, info: ModuleInfo, *, with_values: bool = True) -> None:
    """Raises ValueError where a quantized module can't take the place of the one that has the weight; with_values: it
    must hold data."""
    home = name.rpartition(".")[0] if info.kind == "experts" else name
    module = model.get_submodule(home)
    if not home:
        raise ValueError("model is itself the layer to swap; it must be a module that contains it")
    parts = home.split(".")
    for end in range(1, len(parts)):
        outer = type(model.get_submodule(".".join(parts[:end])))
        if outer.__module__.startswith("peft.tuners"):
            raise ValueError(
                f"module {home} is inside of PEFT's {outer.__name__}; it must be quantized before it has adapters: "
                "then bitfold.peft.prepare and get_peft_model"
            )
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        raise ValueError(f"module {home} has hooks, which a swap would lose: remove them first")
    weight = info.weight_of(name)
    if with_values and model.get_parameter(weight).is_meta:
        raise ValueError(f"{weight} is on the meta device; it must hold data: load the model first")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(f"module {name} has max_norm, which rewrites its weight: keep it by a rule")


def _swap(
    model: nn.Module, names: list[str], format: str, clamp: bool, activations: Mapping[str, Activations]
) -> ModuleSummary:
    """Encodes the one weight of the modules `names` and puts quantized modules in their places."""
    weight: Any = model.get_submodule(names[0]).weight
    qtensor = encode_named(f"{names[0]}.weight", weight, format, clamp=clamp)
    summary = summarize(names[0], weight, qtensor)
    put_modules(model, names, qtensor, weight.dtype, activations)
    return summary


def put_modules(
    model: nn.Module,
    names: list[str],
    qtensor: QTensor,
    dtype: torch.dtype,
    activations: Mapping[str, Activations],
) -> None:
    """Puts quantized modules that share one weight in the places of the modules `names`; dtype: of an embedding's
    output; activations: of each of them."""
    modules = [model.get_submodule(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        quantized = quantized_like(module, qtensor, dtype, activations[name])
        quantized.train(module.training)
        qtensor = quantized.qtensor  # of this module's parameters, so that the next one shares them
        quantized.prepare()
        put_module(model, module, quantized)


def quantized_like(
    module: nn.Module, qtensor: QTensor, dtype: torch.dtype, activations: Activations = FLOAT
) -> QuantLinear | QuantEmbedding:
    """The quantized module for the place of an nn.Linear or an nn.Embedding; dtype: of an embedding's output."""
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(qtensor, module.padding_idx, dtype, embedding_scale(module))
    return QuantLinear(qtensor, module.bias, activations)  # type: ignore[arg-type]


def put_stack(
    model: nn.Module,
    name: str,
    weight: Tensor,
    format: str,
    clamp: bool = False,
    activations: Activations = FLOAT,
) -> list[ModuleSummary]:
    """Encodes the matrices of one stack of experts [experts, n, k] and puts a QuantStack in the place that it has in a
    model."""
    stack = QuantStack.empty(format, tuple(weight.shape), weight.device)
    stack.activations = activations
    summaries = []
    for expert, matrix in enumerate(weight.detach()):
        own = experts.expert_name(name, expert)
        qtensor = encode_named(own, matrix, format, clamp=clamp)
        summaries.append(summarize(own, matrix, qtensor))
        stack.put(expert, qtensor)
    experts.put_stack(model, name, stack)
    stack.prepare()
    return summaries


def encode_named(name: str, weight: Tensor, format: str, *, clamp: bool = False) -> QTensor:
    """`encode`, with the tensor's name in front of what it raises; clamp goes to cast formats only."""
    try:
        return encode(weight, format, clamp=clamp and parse(format).grid == "cast")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def requantize(weight: Tensor, like: QTensor) -> QTensor:
    """A changed weight in the format of the one it was, each group with a new scale; g_idx stays what it is.

    Raises what `encode` raises, and ValueError for the layout "flat".
    """
    if like.layout != "rows":
        raise ValueError(f"the weight has the layout {like.layout!r}; to be encoded again it must be 'rows'")
    if like.g_idx is None:
        return encode(weight, like.format)
    qtensor = encode(weight.index_select(1, column_order(like.g_idx)), like.format)
    return QTensor(like.format, like.shape, qtensor.planes, like.layout, like.g_idx)


def summarize(name: str, weight: Tensor, qtensor: QTensor) -> ModuleSummary:
    """The error and the sizes of one quantized weight."""
    return ModuleSummary(
        name, qtensor.format, qtensor.shape, relative_rmse(weight, qtensor), weight.nbytes, qtensor.nbytes
    )


def relative_rmse(weight: Tensor, qtensor: QTensor) -> float:
    """Norm of (decoded - weight) over norm of weight, 0 for a zero weight; float64 sums, a few rows decoded
    at a time."""
    n, k = qtensor.shape
    rows = max(1, ROW_BLOCK // max(1, k))
    error = norm = 0.0
    for start in range(0, n, rows):
        source = weight[start : start + rows].detach().to(torch.float32)
        ids = torch.arange(start, start + source.shape[0], device=weight.device)
        difference = embedding(ids, qtensor, torch.float32).sub_(source)
        error += torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
        norm += torch.linalg.vector_norm(source, dtype=torch.float64).item() ** 2
    return math.sqrt(error / norm) if norm > 0 else 0.0


def _count(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes of a model, shared ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
