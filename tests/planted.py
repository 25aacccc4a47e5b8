"""Small checkpoints of GPTQ and AWQ, packed here from the description of their formats, and faults to plant in
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NAMES = [
    f"model.layers.{i}.{part}" for i in range(2) for part in ("q_proj", "k_proj", "up_proj", "down_proj")
]
WORD = 1 << 32


def weights(
    n: int, k: int, seed: int, kind: str = "laplace", shift: float = 0.0, dead: int = 0
) -> np.ndarray:
    """float32 [n, k]; rows have norms of their own; shift: of the mean, in standard deviations; dead: columns
    of zeros.
    """
    generator = np.random.default_rng(seed)
    draw = {
        "normal": lambda: generator.standard_normal((n, k)),
        "laplace": lambda: generator.laplace(size=(n, k)) / 1.414,
        "student": lambda: generator.standard_t(4, size=(n, k)) / 1.414,
        "skewed": lambda: generator.exponential(size=(n, k)) - 1,
        "gamma": lambda: (generator.gamma(4, size=(n, k)) - 4) / 2,
        "uniform": lambda: generator.uniform(-1.73, 1.73, size=(n, k)),
    }[kind]()
    w = (draw + shift) * np.exp(0.4 * generator.standard_normal((n, 1))) * 0.02
    w[:, :dead] = 0
    return w.astype(np.float32)


def rounded(w: np.ndarray, bits: int, group: int, symmetric: bool = False, awq: bool = False):
    """Round to nearest as the owners do: codes [n, k], zero points and fp16 scales [n, G]."""
    n, k = w.shape
    size = k if group == -1 else group
    parts = w.reshape(n, k // size, size)
    top = (1 << bits) - 1
    low, high = parts.min(-1), parts.max(-1)
    if not awq:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / top, 1e-5).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.full_like(low, (top + 1) // 2) if symmetric else np.clip(np.rint(-low / wide), 0, top)
    codes = np.clip(np.rint(parts / wide[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(n, k).astype(np.int64), zeros.astype(np.int64), scales


def streams(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as little-endian int32 words, least significant bit first, by Python's whole numbers."""
    words = []
    for row in numbers.tolist():
        whole = sum(number << i * bits for i, number in enumerate(row))
        words.append([whole >> i & WORD - 1 for i in range(0, len(row) * bits, 32)])
    return np.array(words, dtype=np.uint32)


def gptq(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, version: int = 1, group: int = -1
):
    """The tensors of a module of GPTQ; version 1 subtracts 1 from every number of whole words, with 3 bits from
    each.
    """
    n, k = codes.shape
    packed = streams((zeros.T - 1) % 8 if version == 1 and bits == 3 else zeros.T, bits)
    if version == 1 and bits != 3:
        ones = streams(np.ones((1, n), dtype=np.int64), bits)
        packed = packed - ones
    size = k if group == -1 else group
    return {
        "qweight": _tensor(streams(codes, bits).T),
        "qzeros": _tensor(packed),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
        "g_idx": torch.arange(k, dtype=torch.int32) // size,
    }


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, order=AWQ_ORDER, zero_order=None):
    """The tensors of a module of AWQ: nibble i of a word is output order[i] of its eight."""
    n = len(codes)
    places = np.arange(n).reshape(-1, 8)
    return {
        "qweight": _tensor(streams(codes.T[:, places[:, list(order)].reshape(-1)], 4)),
        "qzeros": _tensor(streams(zeros.T[:, places[:, list(zero_order or order)].reshape(-1)], 4)),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }


def _tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words.astype(np.uint32)).view(np.int32))


def gptq_config(bits: int, group: int, symmetric: bool, version: int, desc_act: bool = False) -> dict:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": desc_act,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }


def awq_config(group: int, zero_point: bool = True) -> dict:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": zero_point,
        "version": "gemm",
    }


def write(path: Path, modules: dict[str, dict[str, torch.Tensor]], section: dict) -> Path:
    """A directory with the modules' tensors, a norm beside them, and a configuration."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()}
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": section}), encoding="utf-8")
    return path


def change(path: Path, edit) -> None:
    """Let a function change the tensors of a directory with one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def relabel(path: Path, **labels: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"].update(labels)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def gptq_directory(
    path: Path,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    version: int = 1,
    kind: str = "laplace",
    shift: float = 0.0,
    shape: tuple[int, int] = (96, 512),
    dead: int = 0,
) -> Path:
    modules = {}
    for seed, name in enumerate(NAMES):
        numbers = rounded(weights(*shape, seed, kind, shift, dead), bits, group, symmetric)
        modules[name] = gptq(*numbers, bits, version, group)
    return write(path, modules, gptq_config(bits, group, symmetric, version))


def awq_directory(
    path: Path, *, group: int = 32, order=AWQ_ORDER, zero_order=None, move: int = 0, symmetric: bool = False
) -> Path:
    """move: what is added to every zero point, modulo 16."""
    modules = {}
    for seed, name in enumerate(NAMES):
        codes, zeros, scales = rounded(weights(96, 512, seed), 4, group, symmetric, awq=True)
        modules[name] = awq(codes, (zeros + move) % 16, scales, order, zero_order)
    return write(path, modules, awq_config(group, not symmetric))
