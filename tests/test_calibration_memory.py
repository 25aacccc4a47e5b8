"""Calibrating a model that is larger than the memory it takes; bench/calibration_memory.py shows it at 8 GB."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "calibration_memory.py"

pytestmark = [
    pytest.mark.skipif(not BENCH.is_file(), reason="bench/ is not beside the tests"),
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status"),
]


def test_memory_is_that_of_a_block_and_not_of_the_model(tmp_path):
    """Twice the blocks are no byte more, but for what the level wavers by; the model itself is never in memory."""
    spec = importlib.util.spec_from_file_location("calibration_memory", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    sizes = {
        "hidden": 768,
        "ffn": 1536,
        "samples": 2,
        "tokens": 64,
        "recipe": "gptq-int4-g128",
        "activations": "ram",
    }
    found = []
    for layers in (4, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        found.append(bench.measure(argparse.Namespace(**sizes, layers=layers), folder))
    few, many = found
    assert few["holds"]
    assert many["holds"]
    assert many["model_bytes"] - few["model_bytes"] == pytest.approx(4 * few["block_bytes"], rel=0.01)
    assert many["above_imports_bytes"] - few["above_imports_bytes"] < 2 * few["block_bytes"]
