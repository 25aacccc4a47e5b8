"""Times `bitfold quantize` of a whole GGUF beside llama-quantize, and compares every tensor's bytes.

    python bench/gguf_file.py --recipe q4_k_m --threads 2 --out bench/results/NAME.json

The model has 1.1 B random parameters in F16 (bench/gguf_model.py, 2.2 GB, written to a temporary folder and read
once before, so that the page cache is warm). Both programs are timed from their start to their end, imports
included. bitfold waits for its output to be on the disk, llama-quantize doesn't: that wait is taken off bitfold's
time, and given for both apart. llama-quantize is taken from the folder that BITFOLD_LLAMA_CPP names, or the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf_model
from bitfold.bench import ggml
from bitfold.bench.bars import FILE_BARS, verdicts
from bitfold.bench.clock import Spread
from bitfold.bench.machine import machine, versions

SAMPLE = 0.005  # seconds between two looks at a program's memory


# bitfold's command line, with the seconds that it waits for the disk written to the file of the first argument.
INSIDE = """
import os, sys, time

fsync, waited = os.fsync, 0.0

def timed(fd):
    global waited
    start = time.perf_counter()
    fsync(fd)
    waited += time.perf_counter() - start

os.fsync = timed
_, notes, *sys.argv[1:] = sys.argv
from bitfold.cli import main

try:
    main()
finally:
    with open(notes, "w") as file:
        file.write(str(waited))
"""


@dataclass(frozen=True)
class Run:
    """One run of a program. seconds: without the wait for the disk, which is sync; anon: peak RssAnon, bytes."""

    seconds: float
    sync: float
    anon: int


def program(name: str) -> str:
    """The path of one of llama.cpp's programs."""
    folder = os.environ.get(ggml.VARIABLE)
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        raise SystemExit(f"no {name} in {folder or 'the PATH'}; {ggml.VARIABLE} names the folder it lies in")
    return found


def run(command: list[str], output: Path, threads: int) -> Run:
    """Runs a program that writes `output`. Ends with what it said if it fails."""
    output.unlink(missing_ok=True)
    os.sync()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    ) as child:
        peaks: list[int] = [0]
        watcher = threading.Thread(target=watch, args=(child, peaks))
        watcher.start()
        said, _ = child.communicate()
        seconds = time.perf_counter() - start
        watcher.join()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    notes = notes_of(output)
    waited = float(notes.read_text()) if notes.is_file() else 0.0
    notes.unlink(missing_ok=True)
    start = time.perf_counter()
    os.sync()
    return Run(seconds - waited, waited + time.perf_counter() - start, max(peaks))


def notes_of(output: Path) -> Path:
    return output.with_suffix(".waited")


def watch(child: subprocess.Popen[str], peaks: list[int]) -> None:
    """Notes RssAnon of a program (Linux tells no peak of it) until it ends."""
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
        except (FileNotFoundError, ProcessLookupError):
            return  # it has just ended
        peaks[0] = max([peaks[0], *(int(line.split()[1]) << 10 for line in lines)])
        time.sleep(SAMPLE)


def check_same(ours: Path, theirs: Path) -> int:
    """Compares types, shapes and bytes of all tensors. Returns their number; ends the run at a difference."""
    first, second = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    if list(first) != list(second):
        raise SystemExit(f"the files hold other tensors: {sorted(first.keys() ^ second.keys())}")
    for name, tensor in first.items():
        other = second[name]
        same_kind = (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape))
        if not same_kind or tensor.data.tobytes() != other.data.tobytes():
            raise SystemExit(f"{name} differs: {tensor.tensor_type!r} here, {other.tensor_type!r} there")
    return len(first)


def measure(
    programs: dict[str, Callable[[Path], list[str]]], folder: Path, threads: int, rounds: int
) -> dict[str, list[Run]]:
    """The programs take turns, `rounds` times; each leaves its output NAME.gguf in the folder."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, command in programs.items():
            output = folder / f"{name}.gguf"
            runs[name].append(run(command(output), output, threads))
            last = runs[name][-1]
            print(
                f"{name}: {last.seconds:.2f} s, sync {last.sync:.2f} s, {last.anon / 1e6:.0f} MB",
                file=sys.stderr,
            )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--recipe", default="q4_k_m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=gguf_model.LAYERS)
    parser.add_argument("--model", type=Path, help="an F16 GGUF that exists, in place of the random one")
    parser.add_argument("--only", choices=("bitfold", "llama-quantize"), help="leave the other out")
    args = parser.parse_args()
    facts = machine()  # before the run is a load itself
    theirs, library = program("llama-quantize"), ggml.library()
    with tempfile.TemporaryDirectory(prefix="bitfold-bench-") as text:
        folder = Path(text)
        source = args.model
        if source is None:
            source = folder / "model-f16.gguf"
            gguf_model.write(source, args.layers)
            os.sync()
        source.read_bytes()  # into the page cache
        programs: dict[str, Callable[[Path], list[str]]] = {
            "bitfold": lambda output: [
                *(sys.executable, "-c", INSIDE, str(notes_of(output))),
                *("quantize", str(source), str(output), "--recipe", args.recipe),
            ],
            "llama-quantize": lambda output: [
                *(theirs, str(source), str(output), args.recipe.upper(), str(args.threads))
            ],
        }
        if args.only:
            programs = {args.only: programs[args.only]}
        runs = measure(programs, folder, args.threads, args.rounds)
        tensors = None if args.only else check_same(*(folder / f"{name}.gguf" for name in programs))
        sizes = {name: (folder / f"{name}.gguf").stat().st_size for name in programs}
        report = {
            "schema": 1,
            "machine": facts,
            "versions": {**versions(), "llama.cpp": library.version},
            "settings": {
                "recipe": args.recipe,
                "layers": args.layers,
                "threads": args.threads,
                "rounds": args.rounds,
                "source_bytes": source.stat().st_size,
            },
            "identical_tensors": tensors,
            "rows": [row(name, found, sizes[name]) for name, found in runs.items()],
        }
    report["bars"] = verdicts(report["rows"], FILE_BARS)
    show(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def row(name: str, runs: list[Run], size: int) -> dict[str, Any]:
    return {
        "op": "quantize a file",
        "name": name,
        "kind": "bitfold" if name == "bitfold" else "peer",
        "ms": Spread.of([one.seconds for one in runs]).as_ms(),
        "sync_s": statistics.median(one.sync for one in runs),
        "peak_anon": max(one.anon for one in runs),
        "bytes": size,
    }


def show(report: dict[str, Any]) -> None:
    for entry in report["rows"]:
        print(
            f"{entry['name']:16}{entry['ms']['median'] / 1e3:8.2f} s, its sync {entry['sync_s']:.2f} s apart, "
            f"peak RssAnon {entry['peak_anon'] / 1e6:.0f} MB, {entry['bytes']} bytes written"
        )
    if report["identical_tensors"]:
        print(f"all {report['identical_tensors']} tensors have the same types, shapes and bytes")
    for verdict in report["bars"]:
        print(f"{verdict['bar']}: {verdict['measured']}, wanted {verdict['wanted']}, met: {verdict['met']}")


if __name__ == "__main__":
    main()
