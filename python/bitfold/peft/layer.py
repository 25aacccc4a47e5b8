"""PEFT's LoRA layer around a QuantLinear: what PEFT would ask of a plain weight is answered here, or refused.

The products are PEFT's (`lora.Linear.forward`: the base layer's output plus B A x). Of a weight PEFT asks when it
merges, in DoRA's norms, and in initialisations that look at it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from bitfold.dequantize import check_range
from bitfold.nn import KEPT_PARTS, QuantLinear, QuantModule
from bitfold.quantize import relative_rmse, requantize

INITIALISATIONS = (True, False, "gaussian")
"""What init_lora_weights may be; the others take something out of the weight, or need the one before quantizing."""


class QuantLoraLinear(lora.Linear):
    """A QuantLinear with adapters.

    merge_error: of the last merge into the quantized base, norm of (merged as stored - merged) over norm of merged.
    """

    merged_adapters: list[str]
    base_layer: Any  # a QuantLinear, but for the time of a merge
    merge_error: float | None = None
    _unmerged: tuple[QuantLinear, ...] = ()  # the base layer before adapters were merged: no submodule

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # No dtype: that of no plane is one for adapters.
        return next(base_layer.parameters()).device, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        initial = config.init_lora_weights
        if not any(initial is one or initial == one for one in INITIALISATIONS):
            raise ValueError(
                f"init_lora_weights is {initial!r}, which starts from the 16-bit weight and changes it; for a "
                "quantized base it must be True, False or 'gaussian'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is None:
            return None
        if type(variant) is DoraLinearVariant:
            return _DoraVariant()
        raise ValueError(
            f"the config asks for {type(variant).__name__}; on a quantized base it must be LoRA, rank-stabilised LoRA "
            "(use_rslora) or DoRA (use_dora)"
        )

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the packed weight, which is rounded anew, with new scales; always checked for NaN."""
        if not isinstance(self.base_layer, QuantModule):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        base: Any = self._unmerged[0] if self._unmerged else self.base_layer
        plain = self.merge_plain(names)
        qtensor = requantize(plain.weight, base.qtensor)
        self.merge_error = relative_rmse(plain.weight, qtensor)
        bias = None if plain.bias is None else plain.bias.to(base.bias.dtype)
        merged = QuantLinear(qtensor, bias, base.activations, **_kept(base, plain.weight))
        merged.prepare()
        self._unmerged, self.base_layer, self.merged_adapters = (base,), merged, names
        warnings.warn(
            "adapters were merged into quantized weights, which were rounded again; bitfold.peft.merge says how far",
            stacklevel=2,
        )

    def unmerge(self) -> None:
        """Put back the packed weight from before the merge: the same bits."""
        if not self._unmerged:
            super().unmerge()
            return
        device = next(self.base_layer.parameters()).device
        self.base_layer = self._unmerged[0].to(device)
        self._unmerged, self.merged_adapters, self.merge_error = (), [], None

    def merge_plain(self, adapter_names: Sequence[str]) -> nn.Linear:
        """What the layer would be with these adapters in its weight: float32, by PEFT's own arithmetic."""
        current, merged = self.base_layer, self.merged_adapters
        base: Any = self._unmerged[0] if self._unmerged else self.base_layer
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        plain.weight = nn.Parameter(base.decode(torch.float32), requires_grad=False)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().to(torch.float32), requires_grad=False)
        self.base_layer, self.merged_adapters = plain, []
        try:
            super().merge(safe_merge=True, adapter_names=list(adapter_names))
        finally:
            self.base_layer, self.merged_adapters = current, merged
        return plain


def _kept(base: QuantLinear, merged: Tensor) -> dict[str, Tensor | None]:
    """What a layer keeps for its activations, for its merged weight: copies of columns change as the columns do."""
    kept: dict[str, Tensor | None] = {name: getattr(base, name) for name in KEPT_PARTS}
    if base.outlier_columns is not None and base.outlier_weight is not None:
        columns = base.outlier_columns.long()
        change = (merged - base.decode(torch.float32)).index_select(1, columns)
        copy = (base.outlier_weight.float() + change).to(base.outlier_weight.dtype)
        check_range("outlier_weight", copy)
        kept["outlier_weight"] = copy
    return kept


# ---- DoRA, whose norms are of the decoded weight, one layer at a time ----


class _DoraVariant(DoraLinearVariant):
    """DoRA with a layer that decodes what it looks at."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = _DoraLayer(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer


class _DoraLayer(DoraLinearLayer):
    def update_layer(self, *, base_layer: nn.Module, **kwargs: Any) -> None:
        super().update_layer(base_layer=_decoded(base_layer), **kwargs)

    def forward(self, x: Tensor, *, base_layer: nn.Module, **kwargs: Any) -> Tensor:
        return super().forward(x, base_layer=_decoded(base_layer, x.dtype), **kwargs)


def _decoded(base: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer with its decoded weight, for as long as the caller holds it."""
    if not isinstance(base, QuantLinear):
        return base
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(base.decode(dtype), requires_grad=False)
    if base.bias is not None:
        plain.bias = base.bias
    return plain
