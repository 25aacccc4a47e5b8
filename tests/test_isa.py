"""Every instruction set of this CPU: the conformance tests again under BITFOLD_ISA, and the sets against each other.

The choice is made once a process, so each set has a process of its own. test_encode_decode.py and the others run
on the best set; here the tests marked `isa` run on all the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bitfold import _C
from guard_pages import guarded

HERE = Path(__file__).parent
SETS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon")


def usable() -> list[str]:
    """Sets that are compiled in and that this CPU has, from `_C.cpu_features()`."""
    return [isa for isa in SETS if _C.cpu_features().get(isa)]


def run(isa: str | None, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "BITFOLD_ISA"} | variables
    environment["BITFOLD_TEST_DEVICES"] = "cpu"
    if isa is not None:
        environment["BITFOLD_ISA"] = isa
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=600,
    )


RESULTS = """
import hashlib, json, sys
import numpy as np, torch
from cases import block_formats, every_format, some_formats, weights, bits
from test_encode_decode import SHAPES
import bitfold
from bitfold import _C
from guard_pages import guarded
from bitfold.quantizers import gptq

digests, outputs = {}, {}
for format in every_format():
    rng = np.random.default_rng(7)
    digest = hashlib.sha256()
    for n, k in [*SHAPES, (3, 35), (2, 9000)]:
        encoded = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
        decoded = [encoded.decode(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
        for tensor in [*encoded.planes.values(), *decoded, *filter(torch.is_tensor, encoded.unpack())]:
            digest.update(bits(tensor).tobytes())
    digests[format] = digest.hexdigest()
for format in block_formats():  # with activations of 8 bits, products are the same to the bit
    rng = np.random.default_rng(9)
    digest = hashlib.sha256()
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, 37, 1280)), format)
    for m in (1, 5, 9, 40):
        x = torch.from_numpy(rng.standard_normal((m, 1280)).astype(np.float32))
        digest.update(bits(bitfold.linear(x, qtensor, activations="int8")).tobytes())
    digests[f"{format} int8"] = digest.hexdigest()
for format in some_formats():
    rng = np.random.default_rng(8)
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, 37, 321)), format)
    for m in (1, 5, 8, 9, 40):
        x = torch.from_numpy(rng.standard_normal((m, 321)).astype(np.float32))
        outputs[f"{format} m={m}"] = bitfold.linear(x, qtensor).double().tolist()
fused = hashlib.sha256()
rng = np.random.default_rng(6)
x = torch.from_numpy(rng.standard_normal((300, 150)).astype(np.float32))
for format in ("int4-g32", "int3-g17-asym", "nf4-b32"):
    solved = gptq.solve(torch.from_numpy(weights(rng, 70, 150)), x.t() @ x, format)
    for plane in solved.qtensor.planes.values():
        fused.update(bits(plane).tobytes())
json.dump({"isa": _C.isa(), "digests": digests, "outputs": outputs, "fused": fused.hexdigest()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    found = {}
    for isa in usable():
        done = run(isa, "-c", RESULTS)
        assert done.returncode == 0, done.stderr
        found[isa] = json.loads(done.stdout)
    return found


def test_scalar_is_always_there():
    assert "scalar" in usable()
    assert _C.isa() in usable()


def test_every_set_is_the_one_that_was_asked_for(results):
    for isa, result in results.items():
        assert result["isa"] == isa


def test_what_is_defined_to_the_bit_is_equal_on_every_set(results):
    for isa, result in results.items():
        different = [
            f for f, digest in result["digests"].items() if digest != results["scalar"]["digests"][f]
        ]
        assert not different, f"{isa} differs from scalar in {different}"


def test_gptq_gives_the_same_bits_on_every_set_that_fuses(results):
    """One weight that falls to another level changes all that follow: near is not enough."""
    digests = {isa: result["fused"] for isa, result in results.items() if isa != "scalar"}
    assert len(set(digests.values())) <= 1, digests


def test_linear_agrees_on_every_set_within_rounding(results):
    for isa, result in results.items():
        for what, output in result["outputs"].items():
            expected = np.array(results["scalar"]["outputs"][what])
            error = np.linalg.norm(np.array(output) - expected) / np.linalg.norm(expected)
            assert error <= 1e-5, f"{isa} {what}: {error:.3g} from scalar"


def marked_files() -> list[str]:
    return [
        file.name for file in sorted(HERE.glob("test_*.py")) if "@pytest.mark.isa" in file.read_text("utf-8")
    ]


def files_for(isa: str) -> list[str]:
    """Those that meet kernels of a set which the tests of others don't: avx512_bf16 has one of its own, tiles of bf16;
    all else is avx512_vnni's, which either runs whole here or is the default.
    """
    return ["test_linear.py"] if isa == "avx512_bf16" else marked_files()


@pytest.mark.parametrize("isa", [isa for isa in usable() if isa != _C.isa()])
def test_conformance(isa):
    """The tests marked `isa` under a set that is not the default (the default runs them anyway), between pages that
    nobody may touch.
    """
    choice = ["-m", "isa and not slow", "-p", "no:cacheprovider"]
    done = run(isa, "-m", "pytest", "-q", "-x", *choice, *files_for(isa), **guarded())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not guarded(), reason="memory can be guarded on Linux only")
@pytest.mark.parametrize("past", [0, 1])
def test_guarded_memory_ends_where_it_says(past):
    """What the test above relies on: a tensor's last byte can be read, the next one can't."""
    read = f"t = torch.empty(4096, dtype=torch.uint8); ctypes.string_at(t.data_ptr() + 4095 + {past}, 1)"
    done = run(None, "-c", f"import ctypes, torch; {read}", **guarded())
    assert done.returncode == (-signal.SIGSEGV if past else 0), done.stderr


ONE_LINE = (
    "import torch, bitfold; bitfold.linear(torch.ones(1, 32), bitfold.encode(torch.ones(2, 32), 'int8'))"
)


@pytest.mark.parametrize("isa", [isa for isa in SETS if isa not in usable()])
def test_a_set_that_the_cpu_lacks_is_an_error(isa):
    done = run(isa, "-c", ONE_LINE)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BITFOLD_ISA" in last
    assert isa in last
    assert "scalar" in last, "names what there is instead"
    assert "Illegal instruction" not in done.stderr


@pytest.mark.parametrize("isa", ["avx3", "AVX2", "sse", " scalar", "avx2,scalar"])
def test_a_misspelt_set_is_an_error(isa):
    done = run(isa, "-c", ONE_LINE)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BITFOLD_ISA" in last
    assert "scalar" in last


def test_without_the_variable_the_best_set_runs():
    done = run(None, "-c", "import torch; from bitfold import _C; print(_C.isa())")
    best = usable()[-1]
    if best == "avx512_bf16" and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        best = "avx512_vnni"  # other makers' bf16 instructions are slower than fp32's
    assert done.stdout.strip() == best
    empty = run("", "-c", ONE_LINE)
    assert empty.returncode == 0, "an empty variable is no choice"
