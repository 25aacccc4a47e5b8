"""`bitfold doctor`: what bitfold finds on this machine, and what it will use."""

from __future__ import annotations

import os
import platform

import torch

from bitfold import _C, __version__
from bitfold.cli.console import Json, out, print_json
from bitfold.versions import installed

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
    "gguf",
    "bitsandbytes",
)


def doctor(json: Json = False) -> None:
    """Show versions, the CPU's features, the instruction set chosen, and CUDA."""
    facts = diagnose()
    if json:
        print_json(facts)
        return
    for section, entries in facts.items():
        out.print(f"[bold]{section}[/bold]")
        for key, value in entries.items():
            out.print(f"  {key:<16} {_text(value)}", markup=False)


def diagnose() -> dict[str, dict[str, object]]:
    """All that `doctor` shows, by section."""
    return {
        "bitfold": {"version": __version__, "extension": _C.__file__, **_C.build_info()},
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        "cpu": {
            "features": _C.cpu_features(),
            "isa": _C.isa(),
            "BITFOLD_ISA": os.environ.get("BITFOLD_ISA", ""),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "torch built for": torch.version.cuda or "no CUDA",
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "kernels": _kernels(),
        },
        "libraries": {name: installed(name) or "not installed" for name in LIBRARIES},
    }


def _kernels() -> str:
    build = _C.build_info()
    if not build["cuda"]:
        return "none: built for the CPU alone (BITFOLD_CUDA=on builds them)"
    return f"{build['cuda_architectures']}, by CUDA {build['cuda']}"


def _text(value: object) -> str:
    if isinstance(value, dict):
        flags = [key for key, on in value.items() if on is True]
        others = [f"{key}={on}" for key, on in value.items() if not isinstance(on, bool)]
        return " ".join([*flags, *others]) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in ("", None) else "-"
