"""The build: what the backend requires, how it refuses, what an sdist holds, and that it builds a wheel without git."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def backend(monkeypatch):
    """A fresh copy of the backend module, in an environment that names no torch and no compiler."""
    for name in ("BITFOLD_TORCH_DIR", "VIRTUAL_ENV", "CXX"):
        monkeypatch.delenv(name, raising=False)
    path = ROOT / "third_party" / "backend" / "bitfold_build.py"
    spec = importlib.util.spec_from_file_location("bitfold_build_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide_torch(backend, monkeypatch, site: Path) -> None:
    """What an isolated build sees: no torch on the path, and `site` as the target's site-packages."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name, vars=None: str(site))


def fake_torch(site: Path, version: str) -> Path:
    folder = site / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = '{version}'\ndebug = False\n"
    )
    return folder


def assert_one_sentence(text: str) -> None:
    assert text.startswith("bitfold: ")
    assert "\n" not in text
    assert text.endswith(".")


# ---- torch as a build requirement ----


def test_torch_of_the_target_is_used_and_not_required_again(backend, monkeypatch, tmp_path):
    hide_torch(backend, monkeypatch, tmp_path)
    folder = fake_torch(tmp_path, "2.13.0+cpu")
    assert backend.find_torch() == (folder, "2.13.0+cpu")
    assert backend.torch_requirements() == []
    assert not any("torch" in name for name in backend.get_requires_for_build_wheel())


def test_torch_is_required_where_the_target_has_none(backend, monkeypatch, tmp_path):
    hide_torch(backend, monkeypatch, tmp_path)
    assert backend.find_torch() is None
    assert backend.torch_requirements() == ["torch>=2.10"]
    assert "torch>=2.10" in backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in backend.get_requires_for_build_editable()
    assert not any("torch" in name for name in backend.get_requires_for_build_sdist())


def test_torch_of_the_activated_environment_is_seen(backend, monkeypatch, tmp_path):
    folder = fake_torch(tmp_path / "active", "2.11.0")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        backend.sysconfig,
        "get_path",
        lambda name, vars=None: str((vars or {}).get("base", tmp_path / "isolated")),
    )
    assert backend.find_torch() is None
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    assert backend.find_torch() == (folder, "2.11.0")


def test_named_torch_comes_first(backend, monkeypatch, tmp_path):
    hide_torch(backend, monkeypatch, tmp_path)
    fake_torch(tmp_path, "2.13.0")
    named = fake_torch(tmp_path / "named", "2.10.1")
    monkeypatch.setenv("BITFOLD_TORCH_DIR", str(named))
    assert backend.find_torch() == (named, "2.10.1")


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "nightly"])
def test_old_torch_is_one_sentence(backend, monkeypatch, tmp_path, version):
    hide_torch(backend, monkeypatch, tmp_path)
    fake_torch(tmp_path, version)
    with pytest.raises(SystemExit) as stop:
        backend.get_requires_for_build_wheel()
    assert_one_sentence(str(stop.value))
    assert version in str(stop.value)
    assert "pip install 'torch>=2.10'" in str(stop.value)


def test_no_torch_without_isolation_is_one_sentence(backend, monkeypatch, tmp_path):
    hide_torch(backend, monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as stop:
        backend.build_wheel(str(tmp_path))
    assert_one_sentence(str(stop.value))
    assert "pip install 'torch>=2.10'" in str(stop.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git123", "3.0.0"])
def test_supported_torch_is_accepted(backend, version):
    backend.check_torch(version)


# ---- the machine ----


def test_missing_compiler_is_one_sentence(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        backend.build_wheel(str(tmp_path))
    assert_one_sentence(str(stop.value))
    assert "install one" in str(stop.value)


def test_wrong_compiler_name_is_one_sentence(backend, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    with pytest.raises(SystemExit) as stop:
        backend.check_compiler()
    assert_one_sentence(str(stop.value))
    assert "no-such-c++" in str(stop.value)


def test_old_python_is_one_sentence(backend):
    with pytest.raises(SystemExit) as stop:
        backend.check_python((3, 9))
    assert_one_sentence(str(stop.value))
    backend.check_python((3, 10))


# ---- one home for each number ----


def test_minimum_versions_are_those_of_pyproject(backend):
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"{backend.TORCH_REQUIREMENT}"' in text
    assert f'requires-python = ">={backend._dotted(backend.PYTHON_MINIMUM)}"' in text
    major, minor = backend.TORCH_MINIMUM
    target = f"TORCH_TARGET_VERSION=0x{major:02X}{minor:02X}{'0' * 12}"
    assert target in (ROOT / "third_party" / "torch.cmake").read_text()


def test_version_is_that_of_pyproject():
    bitfold_c = pytest.importorskip("bitfold._C")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert bitfold_c.__version__ == version


# ---- sdist ----


def build_sdist(source: Path, out: Path) -> Path:
    out.mkdir()
    code = f"import bitfold_build; bitfold_build.build_sdist({str(out)!r})"
    environment = {**os.environ, "PYTHONPATH": "third_party/backend"}
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=environment)
    (archive,) = out.iterdir()
    return archive


def unpack(archive: Path, out: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(out)
    (folder,) = out.iterdir()
    return folder


def relative_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("scikit_build_core")
    return build_sdist(ROOT, tmp_path_factory.mktemp("sdist") / "out")


def test_sdist_holds_the_sources_and_nothing_else(sdist, tmp_path):
    files = relative_files(unpack(sdist, tmp_path))
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    kept = (".py", ".html", ".css", ".js")
    tracked |= {str(p.relative_to(ROOT)) for p in (ROOT / "python").rglob("*") if p.suffix in kept}
    tracked |= {
        "CMakeLists.txt",
        "pyproject.toml",
        "third_party/backend/bitfold_build.py",
        "third_party/torch.cmake",
    }
    tracked |= {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "requirements-dev.txt",
        "requirements-cuda.txt",
        "tests/test_build.py",
    }
    assert tracked <= files
    junk = re.compile(r"(^|/)(\.git|\.venv|build|dist|shared|__pycache__|\..*_cache)/|\.(so|o|a|pyc)$")
    assert not [name for name in files if junk.search(name)]


def test_sdist_needs_no_version_control(sdist, tmp_path):
    folder = unpack(sdist, tmp_path / "first")
    again = unpack(build_sdist(folder, tmp_path / "out"), tmp_path / "second")
    assert relative_files(again) == relative_files(folder)


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_works(sdist, tmp_path):
    """Without git, without isolation; the wheel carries no path of this machine, and runs where it is unpacked."""
    source = unpack(sdist, tmp_path / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--config-settings=cmake.define.BITFOLD_CUDA=off",
        "--config-settings=build-dir=build",  # beside the sources, so that ccache knows them
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"bitfold"}
    (module,) = (site / "bitfold").glob("_C*.so")
    binary = module.read_bytes()
    assert b"$ORIGIN/../torch/lib" in binary
    assert str(tmp_path).encode() not in binary
    assert sys.prefix.encode() not in binary
    code = f"""
import torch, bitfold
assert bitfold.__file__.startswith({str(site)!r}), bitfold.__file__
w, x = torch.randn(8, 64), torch.randn(2, 64)
q = bitfold.encode(w, "int8")
torch.testing.assert_close(bitfold.linear(x, q), x @ q.decode().T)
from bitfold.figures import demo_figures
assert demo_figures().recipes
from bitfold.explore.page import render
from bitfold.pages import asset
assert "numberLine" in render() and asset("report", "report.html")
"""
    # -S: the editable install's import hook must not answer; torch's site-packages are named instead.
    torch_site = Path(importlib.util.find_spec("torch").origin).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{torch_site}"}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_isolated_build_downloads_no_second_torch(sdist, tmp_path):
    """`pip install .` as users type it, into an environment whose torch is this one's."""
    source = unpack(sdist, tmp_path / "source")
    target = tmp_path / "target"
    venv.create(target, with_pip=True)
    python = target / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (site / "torch").symlink_to(Path(importlib.util.find_spec("torch").origin).parent)
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--verbose",
        "--no-deps",
        "--config-settings=cmake.define.BITFOLD_CUDA=off",
        "--config-settings=build-dir=build",
        str(source),
    ]
    # A torch that is asked for all the same is a failure, not gigabytes.
    (tmp_path / "no-torch.txt").write_text("torch==0\n")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(tmp_path / "no-torch.txt"))
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    if re.search(
        "Could not find a version that satisfies the requirement (scikit-build-core|pybind11)", output
    ):
        pytest.skip("no package index in reach")
    assert result.returncode == 0, output[-4000:]
    assert not re.search(r"(Collecting|Downloading) torch\b", output)
    assert list((site / "bitfold").glob("_C*.so"))
    shutil.rmtree(target)
