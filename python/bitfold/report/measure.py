"""All that a report says, measured: from a checkpoint, and as far as they are given from its base model, a
text, and other recipes of the same model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import _C, hf
from bitfold.checkpoint import load
from bitfold.evaluate import Comparison, Estimate, Protocol, Windows, compare, cut, default_context
from bitfold.experts import QuantExperts, QuantStack
from bitfold.nn import PlaneModule
from bitfold.outliers import measure as outliers
from bitfold.outliers.columns import Columns, Inputs, weight_columns
from bitfold.outliers.measure import Outliers
from bitfold.pipeline import noted_errors
from bitfold.quantize import quantize, relative_rmse
from bitfold.report.attribution import attribute, quantized_groups
from bitfold.report.histogram import Histogram, histogram
from bitfold.report.sizes import ClassSize, TensorSize, class_sizes, tensor_sizes
from bitfold.section import QuantizationConfig, read_quantization
from bitfold.sensitivity.result import Sensitivity
from bitfold.shards import CheckpointError, read_directory

Progress = Callable[[str, int, int], None]
"""Told as work goes on: what is done, how much of it, of how much in all."""

_WINDOWS = 8  # at least so many for attributions, so that they have a standard error


@dataclass(frozen=True)
class Options:
    """What to measure.

    base: directory of the unquantized model; text: to measure on; calibration: text whose activations are
    looked at (None: `text`); others: further checkpoints of the same base; recipes: to try in memory; tokens,
    attribution_tokens: of the texts to use, 0 for all and for no attribution; context: 0 for the model's;
    dtype: to compute in; sensitivity: what `bitfold sensitivity` measured of the base model.
    """

    base: Path | None = None
    text: str | None = None
    calibration: str | None = None
    others: Sequence[Path] = ()
    recipes: Sequence[str] = ()
    tokens: int = 8192
    attribution_tokens: int = 2048
    context: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class ModuleError:
    """One quantized weight, or all experts of a layer, and what quantizing it did.

    names: of all modules that share it; relative_rmse: norm of (decoded - source) over norm of source, None
    where neither the base nor a note of quantizing tells it (of experts only the base does); kl: mean KL in nats
    a token when this weight alone is quantized, None where not measured.
    """

    names: tuple[str, ...]
    format: str
    shape: tuple[int, ...]
    relative_rmse: float | None
    kl: Estimate | None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Tried:
    """A recipe as a whole. checkpoint: None where it was quantized in memory; nbytes: of all tensors as
    stored; bits_per_weight: of the quantized weights.
    """

    name: str
    checkpoint: Path | None
    nbytes: int
    bits_per_weight: float
    comparison: Comparison


@dataclass(frozen=True)
class Report:
    """Everything on the page. What wasn't measured, for want of a base or a text, is None or empty."""

    path: Path
    recipe: str
    version: str
    made_by: str
    base: Path | None
    base_bytes: int | None
    tensors: tuple[TensorSize, ...]
    classes: tuple[ClassSize, ...]
    modules: tuple[ModuleError, ...]
    histograms: tuple[Histogram, ...]
    weight_columns: tuple[Columns, ...]
    outliers: Outliers | None
    tried: tuple[Tried, ...]
    attribution_protocol: Protocol | None
    calibration_protocol: Protocol | None
    sensitivity: Sensitivity | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def activation_columns(self) -> tuple[Inputs, ...]:
        """What the layers of the base model's decoder blocks multiply."""
        return () if self.outliers is None else self.outliers.inputs


def measure(path: Path, options: Options, progress: Progress | None = None) -> Report:
    """Measure the checkpoint at `path`.

    Raises ValueError where a text, other checkpoints or recipes are given without a base, where the base is
    another model, and what loading, cutting and quantizing raise.
    """
    tell = progress or (lambda what, done, total: None)
    quantization = read_quantization(path, hf.read_config(path))
    _check(options)
    tensors = tensor_sizes(path, quantization, options.base)
    model = load(path, device=options.device, dtype=options.dtype)
    base = None
    if options.base is not None:
        base = hf.load_causal_lm(options.base, device=options.device, dtype=options.dtype)
        _check_base(base, options.base, path, quantization)
    groups = quantized_groups(model)
    if options.sensitivity is not None:
        _check_sensitivity(options.sensitivity, groups, model, path)
    text = _cut_texts(options, base) if base is not None else None
    kls: dict[str, Comparison] = {}
    if text is not None and text.attribution is not None and base is not None:
        kls = attribute(
            base, model, groups, text.attribution, progress=lambda n, m: tell("one weight at a time", n, m)
        )
    noted = noted_errors(path)
    modules, histograms, columns = [], [], []
    for i, (first, names) in enumerate(groups.items()):
        quantized: Any = model.get_submodule(first)
        kl = kls[first].mean_kl if kls else None
        if isinstance(quantized, QuantExperts):
            modules.append(_of_experts(names, quantized, base, kl))
            tell("weights on their grid", i + 1, len(groups))
            continue
        weight: Any = base.get_submodule(first).weight if base is not None else None
        error = relative_rmse(weight, quantized.qtensor) if weight is not None else noted.get(first)
        modules.append(ModuleError(names, quantized.format, quantized.shape, error, kl))
        if (found := histogram(first, quantized.qtensor, weight)) is not None:
            histograms.append(found)
        if weight is not None:
            columns.append(weight_columns(first, weight))
        tell("weights on their grid", i + 1, len(groups))
    found_outliers = None
    if text is not None and text.calibration is not None and options.base is not None:
        found_outliers = outliers.measure(
            options.base,
            torch.stack(text.calibration.ids),
            dtype=options.dtype,
            device=options.device,
            progress=lambda what, n, m: tell("activations", n, m),
        )
    tried = _try_all(path, quantization, model, base, text, options, tell)
    return Report(
        path=path,
        recipe=quantization.recipe,
        version=_C.__version__,
        made_by=quantization.version,
        base=options.base,
        base_bytes=_stored_bytes(options.base) if options.base is not None else None,
        tensors=tensors,
        classes=class_sizes(tensors),
        modules=tuple(modules),
        histograms=tuple(histograms),
        weight_columns=tuple(columns),
        outliers=found_outliers,
        tried=tried,
        attribution_protocol=text.attribution.protocol if text and text.attribution and kls else None,
        calibration_protocol=text.calibration.protocol if text and text.calibration else None,
        sensitivity=options.sensitivity,
    )


def _check(options: Options) -> None:
    if options.base is None:
        wanting = [
            name
            for name, value in (
                ("--text", options.text),
                ("--calibration", options.calibration),
                ("--try", options.recipes),
                ("a further checkpoint", options.others),
            )
            if value
        ]
        if wanting:
            raise ValueError(
                f"{wanting[0]} is given without a base model to compare with: add --base MODEL, the "
                "directory that was quantized"
            )
    elif options.text is None and (options.recipes or options.others or options.calibration):
        raise ValueError("there is no text to measure on: add --text FILE")
    for name, value in (("--tokens", options.tokens), ("--attribution-tokens", options.attribution_tokens)):
        if value < 0:
            raise ValueError(f"{name} is {value}, it must be 0 or more")


def _of_experts(
    names: tuple[str, ...], experts: QuantExperts, base: nn.Module | None, kl: Estimate | None
) -> ModuleError:
    """The error of all matrices that are quantized in a layer's experts, together."""
    found = {leaf: stack for leaf, stack in experts.named_children() if isinstance(stack, QuantStack)}
    error = None
    if base is not None:
        changes = values = 0.0
        for leaf, stack in found.items():
            for number, weight in enumerate(base.get_parameter(f"{names[0]}.{leaf}").detach()):
                norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
                changes += (relative_rmse(weight, stack.matrix(number)) * norm) ** 2
                values += norm**2
        error = math.sqrt(changes / values) if values else 0.0
    formats = ", ".join(dict.fromkeys(stack.format for stack in found.values()))
    return ModuleError(names, formats, next(iter(found.values())).shape, error, kl)


def _check_base(base: nn.Module, base_path: Path, path: Path, quantization: QuantizationConfig) -> None:
    for name, entry in quantization.modules.items():
        try:
            weight = base.get_parameter(entry.weight_of(name))
        except AttributeError:
            raise CheckpointError(
                f"{base_path} has no weight '{name}', which {path} quantizes: it is not its base model"
            ) from None
        if tuple(weight.shape) != entry.shape:
            raise CheckpointError(
                f"'{name}' is {list(weight.shape)} in {base_path} and {list(entry.shape)} in {path}: it is "
                "not its base model"
            )


def _check_sensitivity(
    found: Sensitivity, groups: Mapping[str, Sequence[str]], model: nn.Module, path: Path
) -> None:
    """Names and shapes must be those of the checkpoint; of which weights they are, its base alone could tell."""
    for name in groups:
        quantized: Any = model.get_submodule(name)
        measured = found.modules.get(name)
        if measured is not None and tuple(measured["shape"]) != tuple(quantized.shape):
            raise CheckpointError(
                f"'{name}' is {list(measured['shape'])} in the measurements of --sensitivity and "
                f"{list(quantized.shape)} in {path}: they are of another model"
            )
    if not set(groups) & set(found.modules):
        raise CheckpointError(
            f"the measurements of --sensitivity have no weight of {path}: they are of another model"
        )


@dataclass(frozen=True)
class _Texts:
    """The texts, cut with the base's tokenizer; None where nothing is to be measured on them."""

    whole: Windows
    attribution: Windows | None
    calibration: Windows | None


def _cut_texts(options: Options, base: nn.Module) -> _Texts | None:
    if options.base is None or options.text is None:
        return None
    tokenizer = hf.load_tokenizer(options.base)
    context = options.context or default_context(base)
    few = options.attribution_tokens
    short = min(context, max(2, few // _WINDOWS))

    def windows(text: str, tokens: int, context: int) -> Windows:
        return cut(text, tokenizer, context=context, dtype=options.dtype, max_tokens=tokens or None)

    calibration = options.text if options.calibration is None else options.calibration
    return _Texts(
        whole=windows(options.text, options.tokens, context),
        attribution=windows(options.text, few, short) if few else None,
        calibration=windows(calibration, few, short) if few else None,
    )


def _try_all(
    path: Path,
    quantization: QuantizationConfig,
    model: nn.Module,
    base: nn.Module | None,
    text: _Texts | None,
    options: Options,
    tell: Progress,
) -> tuple[Tried, ...]:
    """The checkpoint itself, further checkpoints, and recipes: one after another, so that memory holds the base
    and one more."""
    if base is None or text is None or options.base is None:
        return ()
    windows = text.whole

    def against(name: str, checkpoint: Path | None, candidate: nn.Module, nbytes: int) -> Tried:
        comparison = compare(base, candidate, windows, progress=lambda n, m: tell(name, n, m))
        return Tried(name, checkpoint, nbytes, _bits(candidate), comparison)

    tried = [against(quantization.recipe or path.name, path, model, _stored_bytes(path))]
    for other in options.others:
        config = read_quantization(other, hf.read_config(other))
        _check_base(base, options.base, other, config)
        loaded = load(other, device=options.device, dtype=options.dtype)
        tried.append(against(config.recipe or other.name, other, loaded, _stored_bytes(other)))
    for recipe in options.recipes:
        # In the dtype that is stored, so that the sizes are those of a checkpoint; computed as the others are.
        fresh = hf.load_causal_lm(options.base, device=options.device)
        summary = quantize(fresh, recipe, quiet=True)
        fresh.to(options.dtype)
        tried.append(against(summary.recipe, None, fresh, summary.bytes_after))
    return tuple(tried)


def _bits(model: nn.Module) -> float:
    """Bits of a quantized weight on average, each weight counted once."""
    unique = {id(m.planes()[0]): m for m in model.modules() if isinstance(m, PlaneModule)}.values()
    weights = sum(math.prod(q.shape) for q in unique)
    return 8 * sum(q.nbytes for q in unique) / max(1, weights)


def _stored_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in read_directory(path).values())
