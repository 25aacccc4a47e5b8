"""The results of bench/gpu.sh in one JSON, and a summary of them: report.py FOLDER."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(out: Path) -> None:
    steps = [line.split("\t") for line in (out / "steps.tsv").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {
        "commit": os.environ.get("COMMIT") or tool("git", "describe", "--always", "--dirty"),
        "gpu": gpu(out / "gpu.csv"),
        "nvcc": last(tool("nvcc", "--version")),
        "steps": {name: {"result": code, "seconds": int(seconds)} for name, code, seconds in steps},
        "tests": {name: last(log(out / f"{name}.log")) for name, *_ in steps if name.startswith("tests")},
        "bench": load(out / "bench.json"),
        "bench_inputs": load(out / "bench_inputs.json"),
        "kernels": load(out / "kernels.json"),
    }
    path = out / "gpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['gpu']} commit {result['commit']}")
    for name, line in result["tests"].items():
        print(f"{name}: {line}")
    for name in ("bench", "bench_inputs", "kernels"):
        if result[name] and "incomplete" in result[name]:
            print(f"{name}: {result[name]['incomplete']}")
    for name in ("bench", "bench_inputs"):
        for bar in (result[name] or {}).get("bars", ()):
            print(
                f"{bar['bar']}: {bar['measured']} (wanted {bar['wanted']}) {bar.get('at') or bar.get('why')}"
            )
    print(path)


def gpu(path: Path) -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    rows = list(csv.reader(log(path).splitlines(), skipinitialspace=True))
    return dict(zip(rows[0], rows[1], strict=True)) if len(rows) > 1 else {"nvidia-smi": log(path).strip()}


def tool(*command: str) -> str:
    """What a program prints; the reason where it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^=+ | =+$", "", lines[-1]) if lines else ""


def log(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def load(path: Path) -> Any:
    """What a benchmark wrote; what there is as text, and why, where its limit cut it off."""
    text = log(path)
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        return {"incomplete": f"{path.name} is no JSON: {error}", "text": text}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
