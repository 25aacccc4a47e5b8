"""The table of owners: whose checkpoints bitfold reads and writes beside its own and GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.foreign import awq, bitsandbytes, compressed_tensors, finegrained, gptq
from bitfold.foreign.scheme import Config
from bitfold.shards import CONFIG_FILE, CheckpointError, read_json

QUANTIZE_CONFIG_FILE = "quantize_config.json"  # GPTQ's and AWQ's own, beside config.json


@dataclass(frozen=True)
class Owner:
    """A library whose checkpoints these are.

    name: as quant_method of quantization_config has it; title: in prose; signature: a module that has one of these
    tensors is quantized; parts: the names of a module's tensors; beside: those that a scheme may use; read_config:
    section and file -> checked.
    """

    name: str
    title: str
    signature: tuple[str, ...]
    parts: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Path], Config]
    beside: tuple[str, ...] = ()

    def modules(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Of the names of all tensors of a checkpoint the quantized modules, each with the names of its own tensors
        within it, those that bitfold doesn't use included.
        """
        present = set(names)
        found = sorted(
            {
                name.removesuffix(f".{part}")
                for name in present
                for part in self.signature
                if name.endswith(f".{part}")
            }
        )
        parts = (*self.parts, *self.beside)
        return {module: tuple(part for part in parts if f"{module}.{part}" in present) for module in found}


OWNERS: dict[str, Owner] = {
    owner.name: owner
    for owner in (
        Owner("gptq", "GPTQ", gptq.SIGNATURE, gptq.PARTS, gptq.read_config),
        Owner("awq", "AWQ", awq.SIGNATURE, awq.PARTS, awq.read_config),
        Owner(
            "compressed-tensors",
            "compressed-tensors",
            compressed_tensors.SIGNATURE,
            compressed_tensors.PARTS,
            compressed_tensors.read_config,
            compressed_tensors.ACTIVATIONS,
        ),
        Owner(
            "bitsandbytes",
            "bitsandbytes",
            bitsandbytes.SIGNATURE,
            bitsandbytes.PARTS,
            bitsandbytes.read_config,
        ),
        Owner(
            "fp8",
            "transformers (fine-grained fp8)",
            finegrained.SIGNATURE,
            finegrained.PARTS,
            finegrained.read_config,
            finegrained.ACTIVATIONS,
        ),
    )
}


def read_owner(path: Path) -> tuple[Owner, Config] | None:
    """Whose checkpoint a model directory is, and its checked configuration; None where config.json names none of
    OWNERS, and where there is no config.json.

    Old GPTQ checkpoints have the configuration in quantize_config.json alone.

    Raises CheckpointError where the two files contradict each other and as the owners' read_config does.
    """
    if not (path / CONFIG_FILE).is_file():
        return None
    config, beside = read_json(path / CONFIG_FILE), path / QUANTIZE_CONFIG_FILE
    section = config.get("quantization_config")
    own = read_json(beside) if beside.is_file() else None
    if section is None:
        if own is None:
            return None
        section, origin = {"quant_method": "gptq", **own}, beside
    else:
        origin = path / CONFIG_FILE
    if not isinstance(section, dict):
        raise CheckpointError(f"{origin}: quantization_config is {section!r}; it must be an object")
    owner = OWNERS.get(str(section.get("quant_method")))
    if owner is None:
        return None
    if own is not None and origin != beside:
        _check_same(origin, section, beside, own)
    return owner, owner.read_config(section, origin)


def _check_same(origin: Path, section: Mapping[str, Any], beside: Path, own: Mapping[str, Any]) -> None:
    for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format"):
        if key in own and key in section and own[key] != section[key]:
            raise CheckpointError(
                f"{beside} says {key} {own[key]!r}, but quantization_config in {origin} says {section[key]!r}"
            )
