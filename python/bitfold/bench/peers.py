"""Other libraries' kernels for the same work: one row of PEERS each, on weights as their users have them.

A library that isn't installed is absent, and named so; nothing stands in for it.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfold.bench import ggml, llama
from bitfold.bench.contestants import Coder, Multiplier, Peer

GROUP = 128  # of aten's int4
BLOCK = 64  # of bitsandbytes' nf4 and fp4, its default
PEER_TOLERANCE = {"bf16": 1e-2}
BOTH = ("cpu", "cuda")


# ---- aten ----


def _int4pack_needs(n: int, k: int) -> str | None:
    return None if n % 16 == 0 and k % GROUP == 0 else f"n must be a multiple of 16 and k of {GROUP}"


def _int4pack(weight: Tensor) -> Multiplier:
    n, k = weight.shape
    groups = weight.view(n, k // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()  # aten means (q - 8) * scale + zero
    codes = ((groups - zero) / scale + 8).round().clamp(0, 15)
    decoded = ((codes - 8) * scale + zero).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    scales_zeros = torch.cat([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()

    def fresh() -> Callable[[Tensor], Tensor]:
        own, own_scales = packed.clone(), scales_zeros.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, GROUP, own_scales)

    return _multiplier("aten int4pack g128", packed.nbytes + scales_zeros.nbytes, decoded, fresh)


def _int8pack(weight: Tensor) -> Multiplier:
    scale = (weight.abs().amax(1) / 127).bfloat16()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    decoded = codes.float() * scale.float()[:, None]

    def fresh() -> Callable[[Tensor], Tensor]:
        own, own_scale = codes.clone(), scale.clone()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, own, own_scale)

    return _multiplier("aten int8pack", codes.nbytes + scale.nbytes, decoded, fresh)


# ---- bitsandbytes ----


def _blocks_need(n: int, k: int) -> str | None:
    return None if k % BLOCK == 0 and n % 32 == 0 else f"n must be a multiple of 32 and k of {BLOCK}"


def _linear4bit(nested: bool) -> Callable[[Tensor], Multiplier]:
    def make(weight: Tensor) -> Multiplier:
        import bitsandbytes as bnb

        n, k = weight.shape

        # Its layer repacks itself for AVX512-BF16 at the first call, and un-nests the scales then: what is
        # copied is a layer that has been called.
        data, state = bnb.functional.quantize_4bit(
            weight.bfloat16(), blocksize=BLOCK, compress_statistics=nested, quant_type="nf4"
        )
        decoded = bnb.functional.dequantize_4bit(data, state).clone()

        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            data, state.as_dict(packed=True), requires_grad=False, device=weight.device, module=layer
        )
        layer.eval().requires_grad_(False)
        layer(torch.zeros(1, k, dtype=torch.bfloat16))
        nbytes = layer.weight.nbytes + _state_bytes(layer.weight.quant_state)
        name = f"bitsandbytes nf4{' nested' if nested else ''}"
        return _multiplier(name, nbytes, decoded, lambda: copy.deepcopy(layer))

    return make


def _state_bytes(state: Any) -> int:
    nested = state.state2.absmax.nbytes if getattr(state, "nested", False) else 0
    return int(state.absmax.nbytes + nested)


def _clone_bnb(packed: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    data, state = packed
    return data.clone(), copy.deepcopy(state)


def _coder4bit(kind: str, nested: bool = False) -> Callable[[], Coder]:
    def make() -> Coder:
        from bitsandbytes import functional

        def encode(weight: Tensor) -> tuple[Tensor, Any]:
            return functional.quantize_4bit(
                weight, blocksize=BLOCK, compress_statistics=nested, quant_type=kind
            )

        def decode(packed: tuple[Tensor, Any], dtype: torch.dtype) -> Tensor:
            data, state = packed
            state.dtype = dtype  # of the output
            return functional.dequantize_4bit(data, state)

        name = f"bitsandbytes {kind}{' nested' if nested else ''}"
        return Coder(name, "peer", 4, encode, decode, _clone_bnb, lambda p: p[0].nbytes + _state_bytes(p[1]))

    return make


def _coder8bit() -> Coder:
    from bitsandbytes import functional

    def decode(packed: tuple[Tensor, Any], dtype: torch.dtype) -> Tensor:
        data, state = packed
        state.dtype = dtype
        return functional.dequantize_blockwise(data, state)

    return Coder(
        "bitsandbytes int8 blockwise",
        "peer",
        8,
        lambda weight: functional.quantize_blockwise(weight, blocksize=256, nested=False),
        decode,
        _clone_bnb,
        lambda p: p[0].nbytes + _state_bytes(p[1]),
    )


# ---- torchao ----


def _torchao_int8(weight: Tensor) -> Multiplier:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    packed: Any = layer.weight

    def fresh() -> Callable[[Tensor], Tensor]:
        own = packed.detach().clone()
        return lambda x: torch.nn.functional.linear(x, own)

    nbytes = packed.qdata.nbytes + packed.scale.nbytes
    return _multiplier("torchao int8 weight-only", nbytes, packed.dequantize(torch.float32), fresh)


def _torchao_coder8() -> Coder:
    from torchao.quantization import Int8Tensor, PerRow

    return Coder(
        "torchao int8",
        "peer",
        8,
        lambda weight: Int8Tensor.from_hp(weight, PerRow()),
        lambda packed, dtype: packed.dequantize(dtype),
        lambda packed: packed.detach().clone(),
        lambda packed: packed.qdata.nbytes + packed.scale.nbytes,
    )


def _multiplier(
    name: str, nbytes: int, decoded: Tensor, fresh: Callable[[], Callable[[Tensor], Tensor]]
) -> Multiplier:
    return Multiplier(name, "peer", nbytes, ("bf16",), lambda: decoded.double(), fresh, PEER_TOLERANCE)


def _any_shape(n: int, k: int) -> str | None:
    return None


PEERS = (
    Peer("aten int4pack g128", "aten", _int4pack_needs, linear=_int4pack),
    Peer("aten int8pack", "aten", _any_shape, linear=_int8pack),
    Peer(
        "bitsandbytes nf4",
        "bitsandbytes",
        _blocks_need,
        linear=_linear4bit(False),
        coder=_coder4bit("nf4"),
        devices=BOTH,
    ),
    Peer(
        "bitsandbytes nf4 nested",
        "bitsandbytes",
        _blocks_need,
        linear=_linear4bit(True),
        coder=_coder4bit("nf4", nested=True),
        devices=BOTH,
    ),
    Peer("bitsandbytes fp4", "bitsandbytes", _blocks_need, coder=_coder4bit("fp4"), devices=BOTH),
    Peer("bitsandbytes int8 blockwise", "bitsandbytes", _any_shape, coder=_coder8bit, devices=BOTH),
    Peer("torchao int8 weight-only", "torchao", _any_shape, linear=_torchao_int8, devices=BOTH),
    Peer("torchao int8", "torchao", _any_shape, coder=_torchao_coder8, devices=BOTH),
    *llama.PEERS,
)
LIBRARIES = tuple(dict.fromkeys(peer.library for peer in PEERS))


def absence(library: str, threads: int) -> str | None:
    """Why `library` can't take part here, None where it can; imports it, to use `threads` threads.

    A library that is installed and broken is absent with the error of its import, as it is for its users.
    """
    if library == "aten":
        wanted = ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu", "_weight_int8pack_mm")
        missing = [name for name in wanted if not hasattr(torch.ops.aten, name)]
        return f"this torch has no aten::{missing[0]}" if missing else None
    if library == llama.LIBRARY:
        return ggml.absence()
    before = os.environ.get("OMP_NUM_THREADS")
    try:
        # Its OpenMP pool is not torch's, and reads its size when it is loaded.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == library else f"its import fails: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"its import fails: {error}"
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return None
