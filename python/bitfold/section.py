"""What config.json says of a quantized model: its section quantization_config, and the checks that it must pass.

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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold import _C, activations
from bitfold.activations import FLOAT, Activations
from bitfold.fields import Fields, shown
from bitfold.formats import LAYOUTS, floating_dtype, parse, plane_shapes
from bitfold.nn import OUTLIER_DTYPES
from bitfold.shards import CONFIG_FILE, CheckpointError, TensorSpec

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
    if section is None:
        raise CheckpointError(f"{path} is not quantized: its {CONFIG_FILE} has no quantization_config")
    if not isinstance(section, dict):
        Fields(config, path / CONFIG_FILE, "").refuse("quantization_config", "an object")
    return parse_quantization(path / CONFIG_FILE, section)


def parse_quantization(origin: Path | str, section: Mapping[str, Any]) -> QuantizationConfig:
    """A section quantization_config, checked; origin: the file that has it, for messages. Raises as
    `read_quantization`."""
    if section.get("quant_method") != QUANT_METHOD:
        method = shown(section.get("quant_method"))
        raise CheckpointError(
            f"{origin} says that {method} quantized the model; this takes what bitfold did, and 'bitfold convert' "
            "makes that of the checkpoints that it reads"
        )
    fields = Fields(section, origin)
    version = fields.take("format_version", int)
    if version < 1:
        fields.refuse("format_version", "at least 1")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{origin} has checkpoint version {version} (bitfold {section.get('bitfold_version')}), and this "
            f"bitfold, {_C.__version__}, reads up to version {FORMAT_VERSION}: install a newer one"
        )
    return QuantizationConfig(
        str(section.get("recipe")),
        {name: _read_entry(entry) for name, entry in fields.objects("modules").items()},
        fields.texts("tied"),
        str(section.get("bitfold_version")),
    )


def _read_entry(fields: Fields) -> ModuleEntry:
    kind = fields.take("kind", str, None, tuple(_KINDS))
    g_idx = fields.take("g_idx", bool, False)
    if g_idx and kind == "experts":
        fields.refuse("g_idx", "false: experts have none")
    entry = ModuleEntry(
        kind,
        fields.read("format", parse).canonical,
        fields.sizes("shape", _KINDS[kind]),
        fields.take("layout", str, None, LAYOUTS),
        fields.read("dtype", floating_dtype) if "dtype" in fields else None,
        g_idx,
        fields.read("activations", activations.read, "float"),
        fields.take("outliers", int, 0),
        fields.read("outlier_dtype", floating_dtype) if "outlier_dtype" in fields else None,
        fields.take("x_scale", bool, False),
    )
    try:
        _check_activations(entry)
    except ValueError as error:
        raise CheckpointError(f"{fields.name}: {error}") from None
    return entry


def _check_activations(entry: ModuleEntry) -> None:
    entry.activations.check(entry.format)
    multiplies = entry.kind != "embedding" or entry.activations.is_float
    if not multiplies or (entry.kind == "experts" and entry.activations.needs_calibration):
        raise ValueError(
            f"a module of the kind '{entry.kind}' can't have the activations '{entry.activations}'"
        )
    outliers = entry.outliers
    if not 0 <= outliers <= entry.shape[-1]:
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
