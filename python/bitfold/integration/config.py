"""bitfold's section of a model's configuration, as transformers wants one: `bitfold.Config`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold import recipes, versions
from bitfold.rules import Recipe
from bitfold.section import QUANT_METHOD, QuantizationConfig, parse_quantization

_ORIGIN = "the model's config.json"


class Config(QuantizationConfigMixin):
    """How from_pretrained is to quantize a model while it loads: `quantization_config=bitfold.Config("nf4-dq")`.

    recipe: what `bitfold.quantize` takes; clamp: as in `bitfold.encode`, for cast formats.

    A model that is quantized has one too (model.config.quantization_config), whose `section` says what
    config.json says of its modules.

    Raises ValueError for an unknown recipe, MissingExtraError where bitfold doesn't work with this transformers.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        *,
        clamp: bool = False,
        section: QuantizationConfig | None = None,
    ):
        versions.FROM_PRETRAINED.require("bitfold.Config")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types it as one of its own
        # A checkpoint's is a name to note, of whatever it was made by.
        self.recipe = recipes.get(recipe) if section is None else None
        self.clamp = clamp
        self.section = section

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Of the section of a config.json (raises CheckpointError where it is malformed or of a newer bitfold), or of
        {"quant_method": "bitfold", "recipe": ..., "clamp": ...}.
        """
        if "modules" in config_dict or "format_version" in config_dict:
            section = parse_quantization(_ORIGIN, config_dict)
            config = cls(section.recipe, section=section)
        else:
            unknown = sorted(set(config_dict) - {"quant_method", "recipe", "clamp"})
            if unknown or "recipe" not in config_dict:
                what = f"has the unknown key {unknown[0]!r}" if unknown else "names no recipe"
                raise ValueError(
                    f"quantization_config {what}; it must be "
                    '{"quant_method": "bitfold", "recipe": "nf4-dq"} or bitfold.Config("nf4-dq")'
                )
            config = cls(config_dict["recipe"], clamp=bool(config_dict.get("clamp", False)))
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def name(self) -> str:
        """Of the recipe."""
        if self.recipe is not None:
            return self.recipe.name
        return self.section.recipe if self.section is not None else ""

    def to_dict(self) -> dict[str, Any]:
        if self.section is not None:
            return dict(self.section.to_json())
        return {"quant_method": QUANT_METHOD, "recipe": self.name, "clamp": self.clamp}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        done = "" if self.section is None else f", {len(self.section.modules)} quantized modules"
        return f"Config({self.name!r}{done})"
