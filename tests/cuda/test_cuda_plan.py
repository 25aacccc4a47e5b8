"""Which kernel multiplies on a GPU: a pure function, so no GPU is asked."""

from __future__ import annotations

import bitfold
import pytest
import torch
from cases import block_formats, refusal, some_formats

HALVES = (torch.float16, torch.bfloat16)


def plan(*args, **options) -> bitfold.LinearPlan:
    return bitfold.plan_linear(*args, device="cuda", **options)


def tile_has(format: str) -> bool:
    """Whether 32 columns share a scale, or 64 where codes are narrow."""
    group = bitfold.formats.parse(format).group
    return group <= 0 or group % (64 if format.startswith(("int2", "int3")) else 32) == 0


@pytest.fixture
def capability(monkeypatch):
    """capability(80): plans are those of such a GPU."""
    return lambda number: monkeypatch.setattr(bitfold.qtensor, "_capability", lambda device: number)


@pytest.mark.parametrize("format", some_formats() + block_formats())
def test_regimes_without_wgmma(format, capability):
    capability(80)
    for dtype in HALVES:
        regimes = [plan(format, m, 64, 256, dtype).regime for m in (0, 1, 8, 9, 128, 129, 4096)]
        if format in ("fp16", "bf16"):
            assert set(regimes) == {"matmul"}
        else:
            tile = "tile" if tile_has(format) else "matmul"
            assert regimes == ["rows", "rows", "rows", tile, tile, "matmul", "matmul"]


@pytest.mark.parametrize("number", [86, 89, 120])
@pytest.mark.parametrize("format", block_formats())
def test_few_rows_on_gpus_with_99_kb_of_shared_memory(format, number, capability):
    """Where two pieces of a row have no room for each warp, the tile kernel multiplies one row, too."""
    capability(number)
    wide = format in ("q5_0", "q5_1", "q6_k")
    assert [plan(format, m, 64, 256, HALVES[0]).regime for m in (1, 8, 9)] == [
        "tile" if wide else "rows"
    ] * 2 + ["tile"]


@pytest.mark.parametrize("format", some_formats() + block_formats())
def test_regimes_with_wgmma(format, capability):
    """More than 128 rows are its own where W has so many that bringing x into order is less than decoding W."""
    capability(90)
    for dtype in HALVES:
        regimes = [plan(format, m, 8192, 256, dtype).regime for m in (8, 32, 33, 128, 129, 512, 4096, 16384)]
        few = [plan(format, m, 1024, 256, dtype).regime for m in (33, 128, 512, 4096)]
        if format in ("fp16", "bf16"):
            assert set(regimes + few) == {"matmul"}
        elif not tile_has(format):
            assert regimes == ["rows"] + 7 * ["matmul"]
        elif format == "q6_k":
            assert regimes == ["rows", "tile", "wgmma", "wgmma", "wgmma", "matmul", "matmul", "matmul"]
            assert few == ["wgmma", "wgmma", "matmul", "matmul"]
        else:
            assert regimes == ["rows", "tile"] + 4 * ["wgmma"] + 2 * ["matmul"]
            assert few == ["wgmma", "wgmma", "matmul", "matmul"]


@pytest.mark.parametrize("format", some_formats() + block_formats())
def test_the_floor(format):
    for dtype in (torch.float32, torch.float64):
        for m in (1, 9, 4096):
            assert plan(format, m, 64, 256, dtype).regime == "floor"
            assert plan(format, m, 64, 256, dtype).operands == "float64"


def test_what_a_plan_says():
    for m, dtype, operands in (
        (1, torch.bfloat16, "float16"),
        (9, torch.float16, "float16"),
        (40, torch.bfloat16, "float16"),
        (999, torch.bfloat16, "bfloat16"),
    ):
        found = plan("int4", m, 64, 256, dtype)
        assert found.operands == operands
        assert found.isa == "cuda"
        assert found.reason
    assert plan("nf4", 1, 3, 57, torch.float16, layout="flat").regime == "floor"
    assert plan("nf4", 1, 3, 57) == bitfold.plan_linear("nf4", 1, 3, 57, device="cuda:1")


def test_what_is_refused():
    refusal(lambda: plan("q4_k", 1, 64, 256, activations="int8"), "activations", "GPU")
    refusal(lambda: plan("int4", 1, 64, 256, torch.int32), "int32")
    refusal(lambda: plan("int4", 1, 64, 256, layout="columns"), "layout")
    refusal(lambda: bitfold.plan_linear("int4", 1, 64, 256, device="meta"), "device is 'meta'")
