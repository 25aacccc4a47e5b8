"""The build backend: scikit-build-core, told where torch is.

An isolated build sees no installed package, but `sysconfig` still names the site-packages of the environment that
bitfold is being installed into. A torch found there gives the headers; only where there is none does torch become
a build requirement. As a script, prints the folder of that torch (third_party/torch.cmake asks).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

TORCH_MINIMUM = (2, 10)
PYTHON_MINIMUM = (3, 10)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


TORCH_REQUIREMENT = f"torch>={_dotted(TORCH_MINIMUM)}"


def _stop(sentence: str) -> NoReturn:
    raise SystemExit(f"bitfold: {sentence}")


# ---- torch ----


def candidate_folders() -> list[Path]:
    """Where a torch may lie, the first choice first."""
    folders: list[Path] = []
    if named := os.environ.get("BITFOLD_TORCH_DIR"):
        folders.append(Path(named))
    spec = importlib.util.find_spec("torch")  # finds, does not import
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # A virtual environment that sees its base's packages, and the user's own: isolation hides both.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.is_file() and re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()):
        sites += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    # Builders that isolate by an environment of their own (uv, python -m build) leave the activated one's name.
    if active := os.environ.get("VIRTUAL_ENV"):
        active_vars = {"base": active, "platbase": active}
        sites += [
            sysconfig.get_path("purelib", vars=active_vars),
            sysconfig.get_path("platlib", vars=active_vars),
        ]
    folders += [Path(site, "torch") for site in sites if site]
    return folders


def torch_version(folder: Path) -> str | None:
    """The version of the torch in `folder`, or None where there is none."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return match.group(1) if match else None


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of the first torch among the candidates."""
    for folder in candidate_folders():
        version = torch_version(folder)
        if version is not None:
            return folder, version
    return None


def check_torch(version: str) -> None:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < TORCH_MINIMUM:
        _stop(
            f"torch {version} is too old, bitfold needs {TORCH_REQUIREMENT}: run `pip install '{TORCH_REQUIREMENT}'`."
        )


def require_torch() -> Path:
    """The folder of a torch that bitfold can be built against; ends the build where there is none."""
    found = find_torch()
    if found is None:
        _stop(
            f"torch was not found: run `pip install '{TORCH_REQUIREMENT}'`, or name its folder in BITFOLD_TORCH_DIR."
        )
    check_torch(found[1])
    return found[0]


def torch_requirements() -> list[str]:
    """What the build needs beyond pyproject.toml: torch, where the target environment has none."""
    found = find_torch()
    if found is None:
        return [TORCH_REQUIREMENT]
    check_torch(found[1])
    return []


# ---- the machine ----


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> None:
    if tuple(version[:2]) < PYTHON_MINIMUM:
        _stop(f"Python {_dotted(version[:2])} is too old: use Python {_dotted(PYTHON_MINIMUM)} or newer.")


def check_compiler() -> None:
    named = os.environ.get("CXX")
    if named:
        if shutil.which(named.split()[0]) is None:
            _stop(
                f"the variable CXX names '{named}', which is not there: name a C++20 compiler (GCC 11 or Clang 14)."
            )
        return
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        _stop(
            "no C++ compiler was found: install one (for example `apt install g++`, GCC 11 or newer), "
            "or name one in the variable CXX."
        )


def check_machine() -> None:
    check_python()
    check_compiler()


# ---- hooks (PEP 517, PEP 660) ----


def _backend():
    check_python()
    import scikit_build_core.build

    return scikit_build_core.build


def get_requires_for_build_sdist(config_settings=None):
    return _backend().get_requires_for_build_sdist(config_settings)


def get_requires_for_build_wheel(config_settings=None):
    check_machine()
    return _backend().get_requires_for_build_wheel(config_settings) + torch_requirements()


def get_requires_for_build_editable(config_settings=None):
    check_machine()
    return _backend().get_requires_for_build_editable(config_settings) + torch_requirements()


def build_sdist(sdist_directory, config_settings=None):
    return _backend().build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    check_machine()
    require_torch()  # without isolation nobody has asked for the requirements
    return _backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    check_machine()
    require_torch()  # without isolation nobody has asked for the requirements
    return _backend().build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)


if __name__ == "__main__":
    print(require_torch())
