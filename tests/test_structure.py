"""Who may look at whom (docs/architecture.md): includes, imports, intrinsics, the symbols of each instruction set."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "bitfold"
ARCHITECTURE = ROOT / "docs" / "architecture.md"

# room -> rooms whose headers it may include
ROOMS = {
    "formats": {"formats"},
    "search": {"formats", "search"},
    "cpu": {"formats", "search", "cpu"},
    "cuda": {"formats", "search", "cuda"},
    "torch": {"formats", "cpu", "cuda", "torch"},
}
# Left to right: a module imports only what stands before it. `__init__` and `__main__` see all.
MODULES = [
    "_C",
    "formats",
    "activations",
    "ops",
    "ops_int8",
    "ops_fp8",
    "ops_kv",
    "qtensor",
    "grids",
    "quantizers",
    "hugepages",
    "nn",
    "embeddings",
    "experts",
    "bounds",
    "rules",
    "presets",
    "recipes",
    "quantize",
    "dequantize",
    "qat",
    "shards",
    "fields",
    "versions",
    "hf",
    "writer",
    "outfile",
    "section",
    "checkpoint",
]
MODULES += [
    "layout",
    "pipeline",
    "kv",
    "integration",
    "peft",
    "memory",
    "budget",
    "training",
    "calibration",
    "outliers",
    "gguf",
    "foreign",
    "check",
    "hub",
    "convert",
    "imatrix",
]
MODULES += [
    "figures",
    "explain",
    "evaluate",
    "generate",
    "sensitivity",
    "allocation",
    "text",
    "pages",
    "report",
    "explore",
    "bench",
    "cli",
]

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests")


def sources(folder: Path = CSRC) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".hpp", ".cpp", ".inl", ".h", ".cu", ".cuh")
    ]
    assert found, f"no sources under {folder}"
    return found


def includes(path: Path) -> list[tuple[str, str]]:
    """("<" or a quote, name) for every include."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', text, re.MULTILINE)


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


# ---- C++ ----


def test_every_source_lies_in_a_room():
    assert {path.relative_to(CSRC).parts[0] for path in sources()} <= set(ROOMS)


def test_rooms_include_only_what_stands_to_their_left():
    for path in sources():
        room = path.relative_to(CSRC).parts[0]
        for quote, name in includes(path):
            if quote == '"':
                assert name.split("/")[0] in ROOMS[room], f"{path.relative_to(ROOT)} includes {name}"
                assert (CSRC / name).is_file(), (
                    f"{path.relative_to(ROOT)} includes {name}, which is no file of csrc"
                )


def test_only_csrc_torch_sees_torch_and_python():
    """Everywhere else only the C++ standard library is included, or what simd/ needs for its instructions, dispatch.cpp
    to ask the CPU for them, and pages.cpp for what the system says of memory."""
    others = (("cpu", "simd"), ("cpu", "dispatch.cpp"), ("cpu", "pages.cpp"))
    for path in sources():
        parts = path.relative_to(CSRC).parts
        if parts[0] in ("torch", "cuda"):
            continue
        for quote, name in includes(path):
            if quote == "<" and parts[:2] not in others:
                assert re.fullmatch(r"[a-z_0-9]+", name), f"{path.relative_to(ROOT)} includes <{name}>"
        words = without_comments(path.read_text(encoding="utf-8"))
        found = re.findall(r"\b(?:at|c10|torch|pybind11|py)::\w+|\bPy[A-Z]\w+|\bcuda[A-Z]\w+", words)
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}"


def test_csrc_torch_uses_the_stable_abi_alone():
    for path in sources(CSRC / "torch"):
        for quote, name in includes(path):
            if quote == "<" and "/" in name and not name.startswith("pybind11/"):
                stable = name.startswith(
                    ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
                )
                assert stable, f"{path.relative_to(ROOT)} includes <{name}>"


def test_intrinsics_live_in_simd_and_ptx_alone():
    """And the switch between the emulator's fibers is assembly."""
    homes = (CSRC / "cpu" / "simd", CSRC / "cuda" / "gpu", CSRC / "cuda" / "emulator" / "fiber.cpp")
    pattern = (
        r"\b_mm\d*_\w+|\b__m\d+\w*|\bv(?:ld1|st1|dup|add|mul|fma)q?_\w+|\b(?:immintrin|arm_neon)\b|\basm\b"
    )
    for path in sources():
        if not any(path.is_relative_to(home) for home in homes):
            found = re.findall(pattern, without_comments(path.read_text(encoding="utf-8")))
            assert not found, f"{path.relative_to(ROOT)} uses {found[0]}"


def device_functions(path: Path) -> dict[str, list[str]]:
    """Name -> its parameters, one text for each overload; without the places that the emulator is told."""
    text = re.sub(r"\s+", " ", without_comments(path.read_text(encoding="utf-8")))
    text = re.sub(r"(?:, )?const (emulator::)?Where& where = (emulator::)?Where::current\(\)", "", text)
    found: dict[str, list[str]] = {}
    for name, parameters in re.findall(r"BITFOLD_DEVICE [^(;{}]*?(\w+)\(((?:[^()]|\([^()]*\))*)\) \{", text):
        found.setdefault(name, []).append(re.sub(r" \w+(?=,|$)", "", parameters))
    return found


@pytest.mark.parametrize("name", ["device", "ptx_memory", "ptx_mma", "ptx_numbers", "ptx_warp"])
def test_the_emulator_has_every_instruction_of_the_gpu(name):
    gpu, emulator = (device_functions(CSRC / "cuda" / twin / f"{name}.hpp") for twin in ("gpu", "emulator"))
    gpu.pop("shared_address", None)  # of other instructions' operands
    assert gpu
    assert emulator == gpu


def test_one_header_chooses_between_the_gpu_and_the_emulator():
    for path in sources(CSRC / "cuda"):
        text = without_comments(path.read_text(encoding="utf-8"))
        if path.parent == CSRC / "cuda" and path.name != "device.hpp":
            assert "__CUDA" not in text, f"{path.name} asks which compiler it is"
            chosen = [name for _, name in includes(path) if name.startswith(("cuda/gpu/", "cuda/emulator/"))]
            assert not chosen, f"{path.name} includes {chosen[0]}"


def test_no_kernel_for_gpus_counts_trailing_zeros_by_the_standard_library():
    """nvcc 13.0 makes std::countr_zero(a) 32 whatever a is, without a word, and the emulator's compiler doesn't."""
    for path in [path for folder in ("cuda", "search", "formats") for path in sources(CSRC / folder)]:
        if not path.is_relative_to(CSRC / "cuda" / "emulator"):
            text = without_comments(path.read_text(encoding="utf-8"))
            assert "std::countr_" not in text, f"{path.relative_to(ROOT)} uses std::countr_: see lowest_one"


def test_kernel_bodies_name_no_instruction_set():
    for path in sources(CSRC / "cpu" / "kernels") + sources(CSRC / "search"):
        found = re.findall(
            r"(?i)avx\w*|neon|__SSE\w*|\bscalar\b", without_comments(path.read_text(encoding="utf-8"))
        )
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}"


# ---- Python ----


def imported(path: Path) -> set[str]:
    """Modules of bitfold that a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} imports relatively"
            module = node.module or ""
            submodules = module == "bitfold"
            names = [f"bitfold.{alias.name}" for alias in node.names] if submodules else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("bitfold.")}
    return found - {"__version__"}


def test_modules_import_only_what_stands_to_their_left():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ("__init__", "__main__"):
            continue
        assert name in MODULES, f"{name} has no place in MODULES of this test and in docs/architecture.md"
        allowed = set(MODULES[: MODULES.index(name)]) | {name}
        wrong = imported(path) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_order_is_that_of_the_architecture_page():
    chain = re.search(
        r"    csrc/formats ->.*?\n\n", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL
    ).group()
    named = [
        name
        for name in re.findall(r"\b(\w+)(?:\.py|/)", chain.partition("csrc/torch ->")[2])
        if name in MODULES
    ]
    assert len(named) > 5
    assert named == sorted(named, key=MODULES.index)


def test_loading_a_model_imports_neither_transformers_nor_the_command_line():
    """`import bitfold` beside torch is light: what reaches for transformers is imported at first use."""
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {
                "transformers",
                "tokenizers",
                "typer",
                "rich",
                "bitsandbytes",
                "peft",
            }
            assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)} at its top"


# ---- symbols ----


def objects() -> list[Path]:
    """Objects of the newer instruction sets in the build directory: BITFOLD_BUILD_DIR, or build/."""
    build = Path(os.environ.get("BITFOLD_BUILD_DIR", ROOT / "build"))
    found = [path for path in build.rglob("*.o") if re.search(r"_(avx2|avx512|neon)\.cpp\.o$", path.name)]
    if not found:
        pytest.skip(f"no object files under {build}: set BITFOLD_BUILD_DIR")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    return sorted(found)


def symbols(path: Path) -> list[tuple[str, str]]:
    """(letter, name) of every symbol that is not local to the object; nm's letters, U is undefined."""
    text = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^[0-9a-f ]{16} ([A-Zuvw]) (.+)$", text, re.MULTILINE)
    assert found, f"nm found nothing in {path}"
    return found


def test_newer_instruction_sets_export_no_inline_functions():
    """A weak function may be merged with another object's: the linker could hand AVX-512 code to an older CPU.

    Weak constants (V, u: the tables of csrc/formats) are the same bytes everywhere.
    """
    for path in objects():
        shared = [name for letter, name in symbols(path) if letter in "Ww"]
        assert not shared, f"{path.name} defines the weak function {shared[0]}"


def test_newer_instruction_sets_export_their_table_alone():
    for path in objects():
        isa = re.search(r"_(avx2|avx512|neon)\.cpp\.o$", path.name).group(1)
        exported = [name for letter, name in symbols(path) if letter in "TDBR"]
        assert exported, path.name
        for name in exported:
            assert re.fullmatch(rf"bitfold::cpu::fill_\w+_{isa}\(bitfold::cpu::Kernels&\)", name), (
                f"{path.name}: {name}"
            )


def test_newer_instruction_sets_call_nothing_of_the_standard_library():
    """Only plain C functions are called: anything in std:: would be instantiated with the newer instructions."""
    for path in objects():
        called = [name for letter, name in symbols(path) if letter == "U" and "::" in name]
        assert not called, f"{path.name} calls {called[0]}"


def test_the_module_exports_its_entry_alone():
    from bitfold import _C

    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-DC", "--defined-only", _C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exported = [line.split(" ", 2)[2] for line in text.splitlines() if " T " in line]
    assert exported == ["PyInit__C"]


# ---- tests ----


def test_the_files_that_are_handed_out_first_exist():
    assert [name for name in conftest.LONG if not (ROOT / "tests" / name).is_file()] == []
