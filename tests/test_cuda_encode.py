"""Encoding on GPUs (csrc/cuda/encode*.cu) writes the CPU's bytes and says the CPU's sentences: every format, ragged
shapes, any dtype and stride, numbers of every size, faults wherever they lie and whatever the schedule.
"""

from __future__ import annotations

import bitfold
import devices
import numpy as np
import pytest
import torch
from cases import DTYPES, bits, block_formats, every_format, some_formats

GPUS = [name for name in devices.NAMES if name != "cpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")

# Columns beside a group's end, a byte's, a thread's eight.
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 8), (3, 31), (2, 33), (5, 67), (3, 130), (9, 300)]
BLOCK_SHAPES = [(0, 256), (1, 256), (3, 512), (35, 256)]  # the last: more blocks than threads of a block


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


def outcome(op, *args) -> list[np.ndarray] | str:
    """The planes' bytes, or the sentence that refuses."""
    try:
        return [bits(plane) for plane in op(*args)]
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def assert_like_the_cpu(w: torch.Tensor, format: str, what: str, *options) -> list[np.ndarray] | str:
    expected = outcome(torch.ops.bitfold.encode, w, format, *options)
    actual = outcome(devices.ops().encode, w, format, *options)
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected, what
        return expected
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        assert np.array_equal(a, b), f"{what}: plane {i} differs at {np.argwhere(a != b)[:3].tolist()}"
    return expected


def draw(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Weights of one of the kinds that matter: ordinary, of all sizes, ties and zeros, all of one sign."""
    kind = rng.integers(4)
    w = rng.standard_normal((n, k)) * 0.05
    if kind == 1:
        w = w * 2.0 ** rng.integers(-12, 8, (n, k))
    elif kind == 2:
        w = rng.integers(-4, 5, (n, k)) * rng.choice([0.25, -0.25])
    elif kind == 3:
        w = np.abs(w) * rng.choice([1.0, -1.0])
    w[rng.random((n, k)) < 0.1] = rng.choice([0.0, -0.0])
    if n > 2:
        w[n // 2] = 0.0
    return w.astype(np.float32)


def strided(w: np.ndarray, dtype: str, rng: np.random.Generator) -> torch.Tensor:
    """The same numbers in order, transposed, or as a part of a wider matrix."""
    tensor = torch.from_numpy(w).to(DTYPES[dtype])
    n, k = tensor.shape
    match rng.integers(3):
        case 0:
            return tensor
        case 1:
            return tensor.T.contiguous().T
        case _:
            wide = torch.zeros(n, 2 * k + 3, dtype=tensor.dtype)
            view = wide[:, 1 : 2 * k + 1 : 2]
            view.copy_(tensor)
            return view


# ---- the formats with planes ----


@pytest.mark.parametrize("format", every_format())
def test_planes(format, gpu, rng):
    for n, k in SHAPES:
        dtype = str(rng.choice(list(DTYPES)))
        assert_like_the_cpu(strided(draw(rng, n, k), dtype, rng), format, f"{format} {n}x{k} {dtype}")


@pytest.mark.parametrize("format", ["nf4-b32-dq", "fp4-b33-dq"])
def test_scales_of_a_matrix_are_nested(format, gpu, rng):
    for n, k in [(40, 1100), (5, 8192)]:  # beyond what is summed at a time
        w = torch.from_numpy(draw(rng, n, k))
        planes = assert_like_the_cpu(w, format, f"{format} {n}x{k}")
        assert planes[1].size > 1024
        assert_like_the_cpu(w, format, f"{format} {n}x{k}, offset", torch.tensor([0.03125]))


@pytest.mark.parametrize("format", some_formats())
def test_the_first_fault(format, gpu, rng):
    n, k = 7, 130
    for what in ("nan", "inf", "large", "both", "small"):
        w = draw(rng, n, k).astype(np.float64)
        at = rng.integers(0, n, 6), rng.integers(0, k, 6)
        if what in ("nan", "inf"):
            w[at] = np.nan if what == "nan" else -np.inf
        elif what == "small":
            w = w * 1e-9
        else:
            w[at] = 1e38
            if what == "both":
                w[-1, -1] = np.inf  # comes first, though it lies last
        assert_like_the_cpu(torch.from_numpy(w).float(), format, f"{format}, {what}")


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_casts_clamp(format, gpu, rng):
    w = draw(rng, 5, 67) * np.float32(1e6 if format == "fp16" else 1e36)
    w[1, 3], w[2, 5] = 3.4028235e38, -3.4028235e38
    for clamp in (False, True):
        refused = assert_like_the_cpu(torch.from_numpy(w), format, f"{format}, {clamp}", None, clamp)
        assert isinstance(refused, str) == (not clamp)


# ---- GGUF's blocks ----


def importance_of(k: int, rng: np.random.Generator) -> torch.Tensor:
    importance = rng.random(k).astype(np.float32) ** 4
    importance[rng.random(k) < 0.2] = 0.0
    importance[0] = 1.0
    return torch.from_numpy(importance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("format", block_formats())
def test_blocks(format, weighted, gpu, rng):
    for n, k in BLOCK_SHAPES:
        dtype = str(rng.choice(list(DTYPES)))
        w = strided(draw(rng, n, k), dtype, rng)
        importance = importance_of(k, rng) if weighted else None
        assert_like_the_cpu(w, format, f"{format} {n}x{k} {dtype}", None, False, importance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("format", block_formats())
def test_blocks_of_numbers_of_every_size(format, weighted, gpu, rng):
    k = 512
    w = np.exp2(rng.uniform(-149, 127, (6, k))) * rng.choice([-1.0, 1.0], (6, k))
    w[1] *= 1e-20
    w[2] = w[2, 0]  # one number
    w[3, 1:] = 0.0
    w[4] = np.where(rng.random(k) < 0.5, 0.0, -0.0)
    w = torch.from_numpy(w.astype(np.float32))
    importance = importance_of(k, rng) if weighted else None
    for clamp in (True, False):
        assert_like_the_cpu(w, format, f"{format}, clamp {clamp}", None, clamp, importance)


@pytest.mark.parametrize("format", block_formats())
def test_the_first_fault_among_blocks(format, gpu, rng):
    for what in ("nan", "large", "both"):
        w = draw(rng, 9, 512)
        w[rng.integers(0, 9, 4), rng.integers(0, 512, 4)] = np.nan if what == "nan" else 3e38
        if what == "both":
            w[8, 511] = -np.inf
        assert_like_the_cpu(torch.from_numpy(w), format, f"{format}, {what}")


def test_faults_do_not_depend_on_the_schedule(gpu, rng):
    if gpu != "emulated":
        pytest.skip("a GPU has no schedule to choose")
    w = draw(rng, 300, 257)
    w[rng.integers(0, 300, 40), rng.integers(0, 257, 40)] = np.nan
    sentences = set()
    for seed in range(8):
        devices.emulated().configure(**devices.schedule(str(seed)))
        sentences.add(outcome(devices.ops().encode, torch.from_numpy(w), "int4-g16"))
    assert len(sentences) == 1
    assert isinstance(sentences.pop(), str)


def test_a_round_trip_through_the_module(gpu, rng):
    w = torch.from_numpy(draw(rng, 16, 256))
    q = bitfold.encode(w, "int4-g128")
    assert (q.decode(torch.float32) - w).abs().max() <= w.abs().max() / 14 * 1.01
