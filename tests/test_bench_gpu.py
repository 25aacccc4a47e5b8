"""The benchmark on a GPU, as far as it can be tested without one: settings, bars, the report of bench/gpu.sh."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitfold.bench.bars import GPU_BARS, verdicts
from bitfold.bench.run import run
from test_bench import TINY

ROOT = Path(__file__).parents[1]


def test_device_is_named():
    with pytest.raises(ValueError, match="device names 'tpu'; it must name some of cpu, cuda"):
        dataclasses.replace(TINY, device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(ValueError, match="device is 'cuda'; this torch sees no GPU"):
        run(dataclasses.replace(TINY, device="cuda"))


def test_bars_know_the_rows_of_a_run():
    def row(name: str, kind: str, m: int, seconds: float, nbytes: int) -> dict:
        case = {"op": "linear", "n": 8192, "k": 28672, "m": m, "dtype": "bf16", "name": name, "kind": kind}
        baseline = 16.0 / seconds
        return {
            **case,
            "ms": {"median": seconds},
            "shares": {"copy": 0.9},
            "over_torch": baseline,
            "of_fewer_bytes": baseline * nbytes / 16,
        }

    rows = [row("int4-g128", "bitfold", m, 4.0 + m / 8, 4) for m in (1, 16, 64)]
    found = {verdict["bar"]: verdict for verdict in verdicts(rows, GPU_BARS)}
    share = "share of the gain that their fewer bytes allow over torch bf16"
    assert found[f"4 bits at m=1, {share}"]["measured"] == pytest.approx(4 / 4.125)
    assert found[f"4 bits at m=1, {share}"]["met"] is True
    assert found[f"4 bits at m=16, {share}"]["met"] is False
    assert found["4 bits at m=64, over torch bf16"]["measured"] == pytest.approx(16 / 12)
    assert found["4 bits at m=4096, over torch bf16"]["measured"] is None


def test_rows_tell_the_share_of_the_gain_of_fewer_bytes():
    report = run(dataclasses.replace(TINY, ops=("linear",), peers=()))
    for row in report["rows"]:
        if row["kind"] == "bitfold":
            dense = row["n"] * row["k"] * {"bf16": 2, "fp32": 4}[row["dtype"]]
            assert row["of_fewer_bytes"] == pytest.approx(row["over_torch"] * row["bytes"] / dense)


def test_report_of_a_run(tmp_path):
    (tmp_path / "steps.tsv").write_text("compile\t0\t80\ntests_gpu\t1\t12\nkernels\tskipped: no cuBLAS\t0\n")
    (tmp_path / "tests_gpu.log").write_text("...F\n===== 1 failed, 3 passed in 2.00s =====\n")
    (tmp_path / "gpu.csv").write_text("name, driver_version\nNVIDIA H200, 580.1\n")
    script = [sys.executable, str(ROOT / "bench" / "gpu" / "report.py"), str(tmp_path)]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "tests_gpu: 1 failed, 3 passed in 2.00s" in printed
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["gpu"] == {"name": "NVIDIA H200", "driver_version": "580.1"}
    assert result["steps"]["tests_gpu"] == {"result": "1", "seconds": 12}
    assert result["steps"]["kernels"] == {"result": "skipped: no cuBLAS", "seconds": 0}
    assert result["bench"] is None


def test_the_script_is_a_script():
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)
