"""The module with CUDA's kernels, linked, where there is no GPU: it loads beside torch for CPUs, works there, and says
what it misses where it would need one. `make cuda` builds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import torch

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build-cuda" / "site"

pytestmark = [
    pytest.mark.skipif(not list(SITE.glob("bitfold/_C.*.so")), reason="`make cuda` was not run"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA"),
]


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Python with the bitfold that has CUDA's kernels."""
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300, cwd=SITE
    )


def run(code: str) -> str:
    result = python("-c", "import bitfold, torch\n" + code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_is_the_module_with_kernels():
    path, cuda, architectures = run(
        "info = bitfold._C.build_info(); print(bitfold._C.__file__, info['cuda'], info['cuda_architectures'])"
    ).split(" ", 2)
    assert Path(path).is_relative_to(SITE)
    assert cuda.count(".") >= 1
    assert architectures


def test_it_needs_no_library_of_cuda_s():
    (module,) = SITE.glob("bitfold/_C.*.so")
    text = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in text.split("\n") if "(NEEDED)" in line]
    assert any(
        name.startswith("libtorch.so") for name in needed
    )  # the umbrella, through which CUDA's symbols are seen
    assert not [name for name in needed if "cuda" in name or "cublas" in name]


def test_the_cpu_s_ops_are_the_same():
    code = """
import hashlib
torch.manual_seed(1)
w, x, digest = torch.randn(48, 256), torch.randn(5, 256), hashlib.sha256()
for format in ("int8", "int4-g128-asym", "nf4-dq", "q4_k", "q6_k"):
    qtensor = bitfold.encode(w, format)
    for tensor in (*qtensor.planes.values(), qtensor.decode(), bitfold.linear(x, qtensor)):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""
    here = subprocess.run(
        [sys.executable, "-c", "import bitfold, torch\n" + code], capture_output=True, text=True
    )
    assert run(code) == here.stdout.strip() != ""


def test_meta_tensors_and_plans_need_no_gpu():
    shape, regimes = run(
        """
planes = [plane.to("meta") for plane in bitfold.encode(torch.ones(8, 64), "nf4").planes.values()]
y = torch.ops.bitfold.linear(torch.empty(3, 64, device="meta"), planes, "nf4", 8, 64)
print(tuple(y.shape), end=";")
print([bitfold.plan_linear("int4-g128", m, 8, 256, torch.bfloat16, device="cuda").regime for m in (1, 32, 64, 512)])
"""
    ).split(";")
    assert shape == "(3, 8)"
    assert json.loads(regimes.replace("'", '"')) == ["rows", "tile", "wgmma", "matmul"]


def test_a_stream_that_torch_does_not_tell_is_an_error():
    result = python("-c", "import bitfold; bitfold._C.current_stream(0)")
    assert result.returncode != 0
    last = result.stderr.strip().split("\n")[-1]
    assert (
        last
        == "RuntimeError: torch does not tell its current CUDA stream (aoti_torch_get_current_cuda_stream)"
    )
    with pytest.raises(RuntimeError, match="aoti_torch_get_current_cuda_stream"):
        bitfold._C.current_stream(0)


def test_doctor_says_for_which_gpus():
    result = python("-m", "bitfold", "doctor", "--json")
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)["cuda"]["kernels"]
    assert kernels.endswith(run("print(bitfold._C.build_info()['cuda'])"))
    assert kernels.startswith(run("print(bitfold._C.build_info()['cuda_architectures'])"))


@pytest.mark.parametrize("file", ["test_ops.py", "test_qtensor.py"])
def test_tests_of_the_cpu_pass_with_it(file: str):
    result = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"),
        str(ROOT / "tests" / file),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
