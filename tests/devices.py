"""Where the conformance tests run: on the CPU, on the kernels for GPUs through the emulator, and on a GPU.

A test that uses the fixture `device` runs once on each. Tests hold CPU tensors; `use` puts other ops
in the place of `torch.ops.bitfold`: on "emulated" those of the module _emulated, which run csrc/cuda on CPU
tensors; on "cuda" ones that move every tensor to the GPU with its strides, and the results back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bitfold
import bitfold.ops_fp8
import bitfold.ops_kv
import bitfold.quantizers.gptq
import bitfold.quantizers.grid
import pytest
import torch
from toolchain import build, tool
from torch import Tensor
from torch.utils import _pytree

ROOT = Path(__file__).parents[1]
# Those that there are; a choice of them in BITFOLD_TEST_DEVICES, separated by commas.
ALL = ("cpu", "emulated", "cuda")
NAMES = tuple(os.environ.get("BITFOLD_TEST_DEVICES", ",".join(ALL)).split(","))
assert set(NAMES) <= set(ALL), f"BITFOLD_TEST_DEVICES names {NAMES}; there are {ALL}"
if not torch.cuda.is_available():
    NAMES = tuple(name for name in NAMES if name != "cuda")
OPS = (
    "encode",
    "decode",
    "pack",
    "unpack",
    "linear",
    "linear_grad_x",
    "embedding",
    "gptq_columns",
    "search_steps",
    "linear_fp8",
    "round_fp8",
    "kv_pack",
    "kv_unpack",
    "linear_int8",
    "kv_attention",
)


# ---- the emulator ----


@functools.cache
def emulated() -> ModuleType:
    """The module _emulated: built in build/emulated where its sources changed, or BITFOLD_EMULATED_DIR's."""
    folder = Path(os.environ.get("BITFOLD_EMULATED_DIR", ROOT / "build" / "emulated"))
    if "BITFOLD_EMULATED_DIR" not in os.environ:
        if not (ROOT / "csrc").is_dir():
            pytest.skip("the sources are not beside the tests")
        cmake = tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_BUILD_TYPE": "Debug",  # adds nothing to the flags but what follows
            "CMAKE_CXX_FLAGS_DEBUG": "-O1",
            "BITFOLD_CUDA": "off",
            "Python_EXECUTABLE": sys.executable,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *defines]
        build(folder, configure, [cmake, "--build", folder, "--target", "_emulated"])
    (path,) = folder.glob("_emulated.*.so")
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bitfold.ops.register("bitfold_emulated")
    bitfold.ops_fp8.register("bitfold_emulated")
    bitfold.ops_kv.register("bitfold_emulated")
    return module


def schedule(seed: str) -> dict[str, Any]:
    """A way to run launches, drawn from the name of a test."""
    draw = random.Random(seed)
    return {
        "seed": draw.randrange(2**32),
        "order": draw.choice(["sequential", "priority"]),
        "delivery": draw.choice(["late", "early", "random"]),
        "poison": draw.choice([0xFF, 0x00, 0x55]),
        "multiprocessors": draw.choice([132, 2]),
    }


# ---- a GPU ----


class ToGpu(torch.autograd.Function):
    """The same view of a copy of a tensor's storage. Its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        moved = torch.empty(0, dtype=tensor.dtype, device="cuda")
        storage = tensor.detach().untyped_storage().cuda()
        return moved.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.cpu()


def to_gpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else ToGpu.apply(tensor)


def on_gpu(op: Any) -> Any:
    """An op that takes and gives CPU tensors and runs on the GPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _pytree.tree_map_only(Tensor, to_gpu, (args, kwargs))
        return _pytree.tree_map_only(Tensor, Tensor.cpu, op(*args, **kwargs))

    return run


# ---- the place of torch.ops.bitfold ----


def ops() -> Any:
    """torch.ops.bitfold, or what stands in its place."""
    return bitfold.qtensor._ops


def plan_device() -> str:
    """The device of the plans of what runs: "cpu" or "cuda"."""
    return "cpu" if ops() is torch.ops.bitfold else "cuda"


@contextlib.contextmanager
def use(name: str, seed: str = "") -> Iterator[None]:
    """bitfold's functions run on `name`."""
    if name == "cpu":
        yield
        return
    if name == "emulated":
        emulated().configure(**schedule(seed))
        namespace: Any = torch.ops.bitfold_emulated
    else:
        if not bitfold._C.build_info()["cuda"]:
            pytest.fail("there is a GPU, and bitfold was built without CUDA")
        namespace = SimpleNamespace(**{op: on_gpu(getattr(torch.ops.bitfold, op)) for op in OPS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitfold.qtensor, "_ops", namespace)
        patch.setattr(bitfold.ops, "_linear", namespace.linear)
        patch.setattr(bitfold.ops_kv, "_pack", namespace.kv_pack)
        patch.setattr(bitfold.ops_kv, "_unpack", namespace.kv_unpack)
        patch.setattr(bitfold.ops_kv, "_attention", namespace.kv_attention)
        # The factor of CPU tensors is the CPU's, and so are blocks that are taken apart.
        cpu = torch.ops.bitfold
        columns = SimpleNamespace(gptq_factor=cpu.gptq_factor, gptq_columns=namespace.gptq_columns)
        patch.setattr(bitfold.quantizers.gptq, "_ops", columns)
        steps = SimpleNamespace(
            block_grid=cpu.block_grid,
            put_block_codes=cpu.put_block_codes,
            search_steps=namespace.search_steps,
        )
        patch.setattr(bitfold.quantizers.grid, "_ops", steps)
        yield
