"""Shared fixtures and settings."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import bitfold
import devices
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "bitfold",
    derandomize=True,
    deadline=None,
    max_examples=60,
    print_blob=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` is the same for all examples
)
settings.load_profile("bitfold")


# The files that take more than half a minute, the longest first: processes that share the tests begin with them, so
# that none is busy with one when the others have nothing left. One that is missing here costs a little time, no more.
LONG = (
    "cuda/test_mutations.py",
    "test_isa.py",
    "cuda/test_sanitizers.py",
    "test_linear.py",
    "test_encode_decode.py",
    "test_cuda_wgmma.py",
    "test_calibration_experts.py",
    "test_gguf_blocks.py",
    "test_cuda_few.py",
    "test_calibration_activations.py",
    "test_kv_cache.py",
    "test_gguf_quantize.py",
    "test_cuda_rows.py",
    "test_calibration_run.py",
    "test_report.py",
    "test_cuda_tile.py",
    "test_calibration_awq.py",
    "test_gptq.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run again by test_isa.py under every instruction set of the CPU")


def pytest_report_header() -> str:
    missing = "" if torch.cuda.is_available() else "; torch sees no GPU, so nothing runs on one"
    return f"bitfold runs on: {', '.join(devices.NAMES)}{missing}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes (pytest-xdist)
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    gc.freeze()  # some 12,000 tests and their modules, which stay: no collection has to go through them again


@pytest.fixture(params=devices.NAMES)
def device(request: pytest.FixtureRequest):
    """Where bitfold's ops run: once on each of "cpu", "emulated" and "cuda" (devices.py)."""
    with devices.use(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test alone, not on what ran before it."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def threads():
    """A function that sets torch's number of threads; what it was before comes back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory to calibrate; many modules have a `source` of their own."""
    import calibrated  # needs transformers

    return calibrated.write_model(tmp_path_factory.mktemp("calibration") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    import calibrated

    return calibrated.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, in transformers' wrapping."""
    import tiny  # needs transformers

    return tiny.tokenizer()


# Models to spoil; many modules have a `model` of their own.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write_llama(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture(scope="module")
def pristine_quantized(pristine: Path) -> Path:
    bitfold.quantize_checkpoint(pristine, pristine.parent / "quantized", "int4-g32")
    return pristine.parent / "quantized"


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def quantized(pristine_quantized: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine_quantized, tmp_path / "quantized"))
