"""The benchmark on a GPU, as far as it can be tested without one: settings, bars, the report of bench/gpu.sh."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitfold.bench.bars import GPU_BARS, verdicts
from bitfold.bench.run import Settings, run
from bitfold.bench.validate import WrongResultError, check_attention
from test_bench import TINY

ROOT = Path(__file__).parents[1]


def test_device_is_named():
    with pytest.raises(ValueError, match="device names 'tpu'; it must name some of cpu, cuda"):
        dataclasses.replace(TINY, device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(ValueError, match="device is 'cuda'; this torch sees no GPU"):
        run(dataclasses.replace(TINY, device="cuda"))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("linear:int4-g128", "a call is 'linear:int4-g128'; it must be linear:FORMAT:ROWS"),
        ("int8:0", "a call is 'int8:0'; it must be"),
        ("attention:int8:5", "a call is 'attention:int8:5'; it must be"),
    ],
)
def test_calls_for_a_profiler_are_named(call: str, sentence: str):
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "calls.py"), call]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]


DETAILS = """\
  void ns>::first_kernel<5>(Job) (16, 2, 1)x(96, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    Metric Name             Metric Unit Metric Value
    DRAM Throughput                   %        48.25
    Elapsed Cycles                cycle        9,000
    Duration                         us         5.50
    SM Active Cycles              cycle     6,000.40
  second_kernel(Job) (1, 1, 1)x(33, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us            2
"""
FIRST = [
    ("LDC", 96, 10, 0),
    ("S2R", 0, 0, 0),
    ("LOOP", 960, 50, 30),
    ("BRA", 950, 30, 20),
    ("EXIT", 96, 10, 1),
]
SOURCE = [("first_kernel", FIRST), ("second_kernel", [("EXIT", 2, 0, 0)])]


@pytest.fixture
def pages(tmp_path: Path):
    """Of a details page and a source page, as Nsight Compute writes them: (instruction, executed, samples, waits)."""
    head = [
        "Address",
        "Source",
        "# Samples",
        "Instructions Executed",
        "stall_wait",
        "stall_wait (Not Issued)",
    ]
    lines = ["[1] python@127.0.0.1"]
    for name, code in SOURCE:
        lines += [f'"Kernel Name","{name}"', ",".join(f'"{cell}"' for cell in head)]
        lines += [
            f'"0x{i}0","{op}","{n}","{times}","{waits}","{n}"' for i, (op, times, n, waits) in enumerate(code)
        ]
    details, source = tmp_path / "details.txt", tmp_path / "source.csv"
    details.write_text(DETAILS)
    source.write_text("\n".join(lines) + "\n")
    return details, source


def profile(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "profile.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_profiles_are_told_by_parts(pages):
    done = profile(*pages)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n\n")
    head, numbers, idle, samples, *parts = first.splitlines()
    assert head == "void ns>::first_kernel<5>(Job) 32 blocks of 96 threads"
    assert numbers.strip() == "5.5 microseconds, 48.25 per cent of DRAM"
    assert idle.strip() == "a multiprocessor had a warp for 6000 of 9000 cycles, 67%"
    assert samples.strip() == "100 samples: wait 51"
    assert [" ".join(part.split()) for part in parts] == [
        "0 to 0: 1 instructions, 1.00 times, 10.0%",
        "2 to 3: 2 instructions, 10.00 times, 80.0% wait 50",
        "4 to 4: 1 instructions, 1.00 times, 10.0% wait 1",
    ]
    assert second.splitlines()[0] == "second_kernel(Job) 1 blocks of 33 threads"
    assert len(profile(*pages, "--least", 20).stdout.splitlines()) == len(done.stdout.splitlines()) - 2


def test_both_pages_of_a_profile_are_of_one_report(pages):
    pages[0].write_text(DETAILS.partition("  second_kernel")[0])
    done = profile(*pages)
    assert done.returncode == 2
    assert "has 1 kernels and" in done.stderr.splitlines()[-1]
    assert "2; both must be of one report" in done.stderr
    done = profile(pages[0], "none.csv")
    assert done.returncode == 2
    assert "none.csv is no file; it must be a page of a report" in done.stderr.splitlines()[-1]


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


def test_bars_of_inputs_of_8_bits_and_of_the_cache():
    def row(op: str, name: str, m: int, seconds: float) -> dict:
        case = {"op": op, "n": 32, "k": 128, "m": m, "dtype": "bf16", "name": name}
        return {**case, "ms": {"median": seconds}, "over_torch": 3 / seconds}

    rows = [row("int8", "int8 llm-int8", m, 2 + m / 4096) for m in (1, 64, 4096)]
    rows += [row("kv", "torch bf16", 32768, 9), row("kv", "torch bf16, heads as rows", 32768, 3)]
    rows += [row("kv", "kv int8", 32768, 2), row("kv", "kv int8", 4096, 9)]
    found = {verdict["bar"]: (verdict["measured"], verdict["met"]) for verdict in verdicts(rows, GPU_BARS)}
    assert found["LLM.int8() over torch bf16"] == (1, True)
    assert found["LLM.int8() at m=4096 over torch bf16"] == (1, False)
    assert found["keys and values of 8 bits over 16 bits, 32768 tokens"] == (1.5, False)


def test_inputs_of_8_bits_and_the_cache_have_rows_of_their_own():
    settings = dataclasses.replace(TINY, ops=("int8", "kv"), tokens=(200,), dtypes=("bf16",), peers=())
    report = run(settings)
    found = {(row["op"], row["name"], row["m"]): row for row in report["rows"] if row["kind"] != "ceiling"}
    kv = ("torch bf16", "torch bf16, heads as rows", "kv int8", "kv fp8", "kv int4")
    assert set(found) == {
        *(("int8", name, m) for name in ("torch bf16", "int8 llm-int8") for m in (1, 9)),
        *(("kv", name, 200) for name in kv),
    }
    exact = 2 * 8 * 72 * 128 * 2  # two blocks of 64 tokens are packed, 72 are as they were
    assert found["kv", "torch bf16", 200]["bytes"] == 2 * 8 * 200 * 128 * 2
    assert exact < found["kv", "kv int4", 200]["bytes"] < found["kv", "kv int8", 200]["bytes"]
    assert all(0 < row["error"] < 1e-2 for row in found.values())


def test_attention_that_is_wrong_is_no_result():
    query, keys, values = torch.ones(1, 2, 1, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    right = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    right = right.transpose(1, 2)
    assert check_attention("one", query, keys, values, right) < 1e-6
    with pytest.raises(WrongResultError, match="one attends wrongly to 9 tokens in fp32"):
        check_attention("one", query, keys, values, right + 0.01)


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


# ---- bench/gpu.sh, with programs in the place of those that a machine with a GPU has ----

STANDS_IN = {
    "nvidia-smi": """
case "$*" in
  *compute_cap*) echo 9.0 ;;
  *) echo 'name, driver_version'; echo 'NVIDIA H200, 580.1' ;;
esac
""",
    # Of instructions, whose program it leaves at the place behind -o, and for its version.
    "nvcc": """
if [ "$1" = --version ]; then echo 'Build cuda_13.0'; exit 0; fi
[ -f tests/cuda/gpu_instructions.cu ] || exit 1
printf '#!/bin/sh\\necho all right\\n' >"${@: -1}"
chmod +x "${@: -1}"
""",
    # Of a program, which it runs, and of a report's pages.
    "ncu": 'if [ "$1" = -i ]; then echo a page; else while [[ "$1" != *python ]]; do shift; done; exec "$@"; fi',
    "cmake": 'if [ "$1" = --build ]; then touch build/gpu/_C.so; fi',
    # Of `python -m pytest`, `-m bitfold` and `-c "import ..."`: what was asked is one line of a file.
    "python": """
if [ "$1" = -c ]; then exit 0; fi
echo "$*" >>asked
case "$*" in
  *bench/gpu/report.py*) exec PYTHON "$@" ;;
  *bench/gpu/profile.py*) echo "what it saw" ;;
  "-m pytest"*test_linear.py*) echo "= 1 failed in 1s ="; exit 1 ;;
  "-m pytest"*) echo "= 2 passed in 1s =" ;;
  *"--ops linear"*) echo '{"bars": [{"bar": "fast", "measured": 2, "wanted": 1, "at": "here"}]}' >"${@: -1}" ;;
  *"--ops int8,kv"*) echo '{"half a re' >"${@: -1}" ;;
esac
""",
}


@pytest.fixture
def gpu_script(tmp_path):
    """The script in a copy of what it needs of the project; gives a way to run it."""
    for name in ("bench/gpu.sh", "bench/gpu/report.py", "tests/cuda/gpu_instructions.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python" / "bitfold").mkdir(parents=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in STANDS_IN.items():
        program = programs / name
        program.write_text("#!/usr/bin/env bash\n" + body.replace("PYTHON", sys.executable) + "\n")
        program.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"

    def run_script(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PATH": path, "PYTHON": str(programs / "python"), "COMMIT": "abc"}
        command = ["bash", "bench/gpu.sh", *arguments, "out"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run_script


def test_the_script_goes_on_after_a_failure(gpu_script, tmp_path):
    printed = gpu_script()
    assert printed.returncode == 0, printed.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["gpu"]["name"] == "NVIDIA H200"
    codes = {name: step["result"] for name, step in result["steps"].items()}
    assert codes.pop("sanitizer") == "skipped: there is no compute-sanitizer"
    assert codes.pop("kernels") == "skipped: google-benchmark or cuBLAS was not found"
    assert codes.pop("tests_conformance") == "1"
    assert codes == dict.fromkeys(
        ("tests_instructions", "configure", "compile", "tests_gpu", "tests_inputs", "bench", "bench_inputs"),
        "0",
    )
    assert "tests_instructions: all right" in printed.stdout
    assert "fast: 2 (wanted 1) here" in printed.stdout
    assert "bench_inputs: bench_inputs.json is no JSON" in printed.stdout
    asked = (tmp_path / "asked").read_text()
    named = set(re.findall(r"tests/[\w/]+\.py", asked))
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("grid", [(), ("--full",)])
def test_the_script_s_benchmarks_are_ones_that_there_are(gpu_script, tmp_path, grid):
    gpu_script(*grid)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines() if " bench " in line]
    assert len(asked) == 2
    for words in asked:
        options = dict(zip(words[3::2], words[4::2], strict=True))  # behind -m bitfold bench
        assert options.pop("--device") == "cuda"
        assert options.pop("--out").endswith(".json")
        settings = Settings(
            ops=tuple(options.pop("--ops").split(",")),
            formats=tuple(options.pop("--formats", "int8").split(",")),
            batches=tuple(map(int, options.pop("--batches").split(","))),
            tokens=tuple(map(int, options.pop("--tokens", "1").split(","))),
            dtypes=tuple(options.pop("--dtypes").split(",")),
        )
        assert settings.ops
        assert set(options) <= {"--shape", "--seconds", "--peers"}


def test_the_script_s_profiles_are_of_calls_that_there_are(gpu_script, tmp_path):
    printed = gpu_script("--profile")
    assert printed.returncode == 0, printed.stderr
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]["profile"]["result"] == "0"
    assert (tmp_path / "out" / "profile.txt").read_text() == "what it saw\n"
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines() if "calls.py" in line]
    assert len(asked) == 2
    for words in asked:
        calls = [word for word in words[1:] if word != "--timeline"]
        command = [sys.executable, str(ROOT / "bench" / "gpu" / "calls.py"), *calls]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "a call is" not in done.stderr


def test_the_script_names_an_option_that_it_lacks(gpu_script):
    printed = gpu_script("--fast")
    assert printed.returncode == 2
    assert printed.stderr == "bench/gpu.sh: --fast is no option; it must be --full or --profile\n"


def test_the_script_s_limits_add_up_to_nine_minutes():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    script = re.sub(r"  if \[ \$profiles = yes \]; then\n.*?\n  fi\n", "", script, flags=re.DOTALL)
    quick = re.sub(r"if \[ \$grid = full \]; then\n.*?\n  else\n", "", script, flags=re.DOTALL)
    quick = quick.replace("$([ $grid = full ] && echo 3000 || echo 35)", "35")
    limits = [int(limit) for limit in re.findall(r"\b(?:step|bench) \w+ (\d+) ", quick)]
    assert len(limits) == 11
    assert sum(limits) <= 540
