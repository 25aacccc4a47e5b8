"""What tests of calibrated quantizing share: a tiny model, a text, a block of a model."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from bitfold import layout, recipes
from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import BlockModel
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.workers import Workers
from bitfold.quantize import QuantizationSummary
from bitfold.recipes import Recipe
from tiny_architectures import relative_difference

OPTIONS = {"samples": 6, "sequence_length": 32}
BUNDLES = {"samples": 7, "sequence_length": 512}  # four rows are a bundle: each of two processes gets one
RECIPE = "gptq-int4-g32"


def write_text(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """Words in a random order: no passage comes twice."""
    rng = random.Random(seed)
    path.write_text(" ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(words)))
    return path


def write_model(path: Path, **sizes) -> Path:
    return tiny.write_llama(path, torch.bfloat16, **{"layers": 3, **sizes})


def contents(path: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def block_run(path: Path, recipe: Recipe, ids: torch.Tensor, workers: Workers) -> tuple[BlockRun, list[str]]:
    """The first block of a model, its inputs from token ids [samples, tokens], and the layers whose feeds AWQ or
    SmoothQuant is to scale."""
    source = layout.read_source(path)
    assignments = recipes.assign(recipe, source.infos)
    steps = layout.steps(source, assignments)
    blocks = BlockModel(source, steps, torch.float32, torch.device("cpu"))
    inputs = Activations((*ids.shape, source.model_config.hidden_size), torch.float32, None)
    call = blocks.first_inputs(ids, inputs.write_first)[0]
    prefix = f"{blocks.names[0]}."
    rules, stored = {}, {}
    for step in steps:
        if not step.name.startswith(prefix):
            continue
        layers = [layer.removeprefix(prefix) for layer in step.layers]
        if step.format is not None:
            rules.update(dict.fromkeys(layers, assignments[step.module].rule))
        elif step.experts:
            stored.update({f"{layer}.weight": step.dtype for layer in layers})
        else:
            stored[step.name.removeprefix(prefix)] = step.dtype
    run = BlockRun(
        prefix[:-1],
        blocks.load(0),
        rules,
        call,
        inputs,
        workers,
        torch.float32,
        config=source.model_config,
        stored=stored,
    )
    return run, [name for name, rule in rules.items() if rule.method in ("awq", "smoothquant")]


def outputs(run: BlockRun) -> torch.Tensor:
    """What the block makes of all samples."""
    return torch.stack([run.compute(lambda s=s: run._run(s)) for s in range(run.samples)])


def prepared(
    path: Path, recipe: Recipe, ids: torch.Tensor, prepare: Callable[[BlockRun, list[str]], None]
) -> tuple[BlockRun, list[str], set[str]]:
    """A block that was changed before it is quantized, its layers, and the names of the tensors that changed, after a
    check that it computes what it did."""
    with Workers() as workers:
        run, layers = block_run(path, recipe, ids, workers)
        expected = outputs(run)
        before = {key: value.clone() for key, value in run.module.state_dict().items()}
        prepare(run, layers)
        run.settle(run.stored)
        found = outputs(run)
    assert relative_difference(found.double(), expected.double()) < 1e-5
    return (
        run,
        layers,
        {key for key, value in run.module.state_dict().items() if not torch.equal(value, before[key])},
    )


def quantize_by_two_processes(source: Path, target: Path, recipe: str, text: Path, *more: str) -> str:
    """What torchrun and the command line make of BUNDLES rows; returns what they print."""
    command = ["quantize", source, target, "--recipe", recipe, "--calibration", text, *more]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in BUNDLES.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "-m", "bitfold", *command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_nearly_the_same(one: Path, other: Path, summary: QuantizationSummary) -> None:
    """Two checkpoints of one calibration that summed in another order. summary: of the first."""
    first, second = tiny.tensors_of(one), tiny.tensors_of(other)
    assert first.keys() == second.keys()
    codes = [name for name in first if name.endswith(".codes")]
    same = sum(int((first[name] == second[name]).sum()) for name in codes)
    assert same / sum(first[name].numel() for name in codes) > 0.999
    report = json.loads((other / "bitfold_report.json").read_text())
    for module, entry in zip(summary.modules, report["modules"], strict=True):
        assert module.name == entry["name"]
        assert entry["calibration"]["output_error"] == pytest.approx(
            module.calibration.output_error, rel=5e-3
        )


KILLED = """
import sys, torch, bitfold
torch.set_num_threads(2)
print("ready", flush=True)
bitfold.quantize_calibrated(*sys.argv[1:5], samples=6, sequence_length=32, activations=sys.argv[5])
"""


def quantize_with_kills(source: Path, target: Path, recipe: str, text: Path, activations: str) -> None:
    """Start quantizing again and again, with OPTIONS, and kill it at a random time, three to ten times, until `target`
    is there. Where it is there too soon, since a machine with other work was slow when the time was taken, all begins
    anew and it is killed twice as early.
    """

    def start(target: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, source, target, recipe, text, activations]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    def killed(seconds: float) -> int:
        rng = random.Random(0)
        for kills in range(10):
            process = start(target)
            time.sleep(rng.uniform(0.0, 0.6 * seconds))
            process.send_signal(signal.SIGKILL)
            # A kill behind the end finds everything done.
            if process.wait() == 0 or target.exists():
                return kills
            assert process.returncode == -signal.SIGKILL
        assert start(target).wait() == 0
        return 10

    # How long it takes when nobody kills it.
    spare = target.with_name("spare")
    process, began = start(spare), time.perf_counter()
    assert process.wait() == 0
    seconds = time.perf_counter() - began
    shutil.rmtree(spare)
    while killed(seconds) < 3:
        seconds /= 2
        shutil.rmtree(target)
