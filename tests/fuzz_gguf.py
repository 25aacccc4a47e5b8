"""Damaged GGUF files for the reader and the quantizer: each must give a file or one sentence, soon, in little memory.

    python tests/fuzz_gguf.py --files 100000 --workers 2

A few small models are written with the gguf package and then damaged: cut, bits flipped, numbers of the header made
absurd, fields copied over other fields, bytes inserted and taken out. What a file number means is fixed by the
seed, so that a finding can be repeated: `--first N --files 1`. The work runs in processes of their own, with a limit
on memory and on the time of each file; one that dies is a finding, and another goes on behind it.

This file is also what test_fuzz_gguf.py uses for the short run of every day.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gguf
import numpy as np

SECONDS = 10  # for one file; the slowest sound one takes some hundredths
MEMORY = 256 << 20  # bytes of address space beyond what the process has when it starts
LONGEST_MESSAGE = 600
ENOUGH = 10  # kinds of findings after which nothing is started again
ABSURD = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 60,
)
ABSURD += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)
MIXES = ("q4_k_m", "q8_0", "q2_k", "q5_1", "q3_k_s", "iq4_xs", "q4_0")

Files = dict[str, bytes]  # of one model, by name; the first is the one to read


# ---- sound files ----


def _tiny_llama(
    path: Path, types: dict[str, gguf.GGMLQuantizationType], alignment: int | None = None
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_file_type(1)
    for kind, value in (("uint8", 3), ("int8", -3), ("uint16", 9), ("int16", -9), ("uint64", 1 << 40)):
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    for kind, number in (("float32", 0.5), ("float64", 0.25), ("bool", True), ("string", "a text, ä")):
        getattr(writer, f"add_{kind}")(f"test.{kind}", number)
    for name, array in (("numbers", [1, 2, 3]), ("floats", [0.5, 1.5]), ("truths", [True, False])):
        writer.add_array(f"test.{name}", array)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(8)])
    writer.add_token_scores([-float(i) for i in range(8)])
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (8, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_q.weight": (8, 256),
    }
    shapes |= {
        "blk.0.attn_v.weight": (4, 256),
        "blk.0.ffn_down.weight": (8, 256),
        "output_norm.weight": (256,),
    }
    shapes |= {
        "output.weight": (8, 256),
        "blk.0.ffn_up_exps.weight": (2, 4, 256),
        "blk.0.ffn_gate.weight": (4, 96),
    }
    default = types["default"]
    for name, shape in shapes.items():
        data = random.standard_normal(shape, np.float32)
        kind = (
            types.get(name, default)
            if len(shape) > 1 and shape[-1] % 256 == 0
            else gguf.GGMLQuantizationType.F32
        )
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        elif kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            values, size = gguf.GGML_QUANT_SIZES[kind]
            raw = random.integers(0, 256, (*shape[:-1], shape[-1] // values * size), np.uint8)
            writer.add_tensor(name, raw & 0x3B, raw_dtype=kind)  # no infinite scale
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sound_models() -> list[Files]:
    """F16, a mixture with blocks, another alignment, and a model in two files."""
    kinds = gguf.GGMLQuantizationType
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        _tiny_llama(folder / "a.gguf", {"default": kinds.F16})
        mixture = {"default": kinds.Q4_K, "output.weight": kinds.Q6_K, "token_embd.weight": kinds.BF16}
        _tiny_llama(folder / "b.gguf", mixture)
        _tiny_llama(
            folder / "c.gguf", {"default": kinds.Q8_0, "blk.0.attn_q.weight": kinds.F16}, alignment=64
        )
        models = [{path.name: path.read_bytes()} for path in sorted(folder.iterdir())]
    return [*models, _split()]


def _split() -> Files:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
        writer.add_block_count(1)
        writer.add_head_count(4)
        for name in ("token_embd.weight", "output.weight"):
            writer.add_tensor(name, np.ones((8, 256), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- where the fields of a header lie ----


@dataclass(frozen=True)
class Field:
    """A number or text of a header: where it begins, its bytes, whether it is a number."""

    start: int
    size: int
    is_number: bool


_NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def fields(data: bytes) -> list[Field]:
    """Every field of a sound header, in order."""
    found: list[Field] = []
    at = 0

    def number(size: int) -> int:
        nonlocal at
        found.append(Field(at, size, True))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text(size: int) -> None:
        nonlocal at
        found.append(Field(at, size, False))
        at += size

    def value(kind: int) -> None:
        if kind == _STRING:
            text(number(8))
        elif kind == _ARRAY:
            of, count = number(4), number(8)
            for _ in range(count):
                value(of)
        else:
            number(_NUMBER_BYTES[kind])

    text(4)
    number(4)
    tensors, pairs = number(8), number(8)
    for _ in range(pairs):
        text(number(8))
        value(number(4))
    for _ in range(tensors):
        text(number(8))
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


# ---- damage ----


def _cut(data: bytearray, places: list[Field], rng: random.Random) -> None:
    end = rng.choice(places).start + rng.randint(0, 8) if rng.random() < 0.7 else rng.randint(0, len(data))
    del data[end:]


def _flip(data: bytearray, places: list[Field], rng: random.Random) -> None:
    end = places[-1].start + 8 if rng.random() < 0.8 else len(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)


def _absurd(data: bytearray, places: list[Field], rng: random.Random) -> None:
    field = rng.choice([place for place in places if place.is_number])
    number = rng.choice((*ABSURD, len(data), len(data) - 1, rng.getrandbits(64), rng.randrange(64)))
    data[field.start : field.start + field.size] = (number % (1 << 8 * field.size)).to_bytes(
        field.size, "little"
    )


def _splice(data: bytearray, places: list[Field], rng: random.Random) -> None:
    """The bytes of a field over another one, of the same size or not."""
    one, other = rng.choice(places), rng.choice(places)
    data[one.start : one.start + one.size] = data[other.start : other.start + other.size]


def _insert(data: bytearray, places: list[Field], rng: random.Random) -> None:
    at = rng.choice(places).start
    data[at:at] = rng.choice((rng.randbytes(rng.randint(1, 40)), bytes(data[at : at + rng.randint(1, 200)])))


def _remove(data: bytearray, places: list[Field], rng: random.Random) -> None:
    field = rng.choice(places)
    del data[field.start : field.start + rng.choice((field.size, 1, rng.randint(1, 100)))]


def _garble(data: bytearray, places: list[Field], rng: random.Random) -> None:
    """Texts that are no UTF-8, hold zeros or lead out of the folder."""
    field = rng.choice([place for place in places if not place.is_number])
    text = rng.choice((b"\xff\xfe", b"\0", b"../../x", b"\n", b"%n", rng.randbytes(field.size)))
    data[field.start : field.start + field.size] = (text * (field.size + 1))[: field.size]


def _swap(data: bytearray, places: list[Field], rng: random.Random) -> None:
    size = rng.randint(1, 64)
    i, j = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[i : i + size], data[j : j + size] = data[j : j + size], data[i : i + size]


def _weights(data: bytearray, places: list[Field], rng: random.Random) -> None:
    """Infinities and NaN among the weights."""
    begin = places[-1].start + 8
    at = rng.randrange(begin, max(begin + 1, len(data) - 4))
    data[at : at + 4] = rng.choice((struct.pack("<f", float("inf")), b"\xff\xff\xff\xff", b"\0\x7c\0\x7c"))


DAMAGES: tuple[Callable[[bytearray, list[Field], random.Random], None], ...] = (
    *(_cut, _flip, _flip, _absurd, _absurd, _absurd, _splice, _splice),
    *(_insert, _remove, _garble, _swap, _weights),
)


def damaged(models: list[Files], number: int, seed: int) -> Files:
    """Model number `number`: one to three damages to one file of a sound model."""
    rng = random.Random(f"{seed}-{number}")
    model = dict(rng.choice(models))
    name = rng.choice(list(model))
    data, places = bytearray(model[name]), fields(model[name])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            rng.choice(DAMAGES)(data, places, rng)
    return {**model, name: bytes(data)}


# ---- what must come of it ----


class Finding(AssertionError):
    """Something else than a file or a sentence."""


def outcome(model: Files, folder: Path, number: int) -> str:
    """Reads and quantizes a model; its files are put into `folder`, which is left empty.

    Returns "made", "read" or "refused". Raises Finding, or whatever came that isn't an error for users.
    """
    from bitfold.gguf.quantize import quantize_gguf
    from bitfold.gguf.reader import read_gguf
    from bitfold.shards import CheckpointError

    for name, data in model.items():
        (folder / name).write_bytes(data)
    target = folder / "out.gguf"
    result = "refused"
    try:
        source = read_gguf(folder / next(iter(model)))
        for tensor in source.tensors.values():
            tensor.read(0, min(1, tensor.rows))
            tensor.read(max(0, tensor.rows - 1), tensor.rows)
        result = "read"
        quantize_gguf(source, target, MIXES[number % len(MIXES)], allow_requantize=True)
        result = "made"
        read_gguf(target)
    except (CheckpointError, ValueError) as error:
        text = str(error)
        if not text.strip() or "\n" in text or len(text) > LONGEST_MESSAGE:
            raise Finding(f"the message is no sentence: {text[:2000]!r}") from error
    left = sorted(
        {path.name for path in folder.iterdir()} - set(model) - {"out.gguf" if result == "made" else ""}
    )
    if left:
        raise Finding(f"left behind: {left}")
    for path in folder.iterdir():
        path.unlink()
    return result


# ---- many of them ----


@dataclass
class Tally:
    """What came of files: outcomes, and findings by kind, each with its first file and how often it came."""

    at: int = 0  # the file in work
    counts: dict[str, int] = field(default_factory=dict)
    findings: dict[str, tuple[str, int]] = field(default_factory=dict)
    slowest: float = 0.0  # seconds
    peak: int = 0  # bytes that the process took at most

    def count(self, result: str) -> None:
        self.counts[result] = self.counts.get(result, 0) + 1

    def find(self, kind: str, text: str, times: int = 1) -> None:
        first, before = self.findings.get(kind, (text, 0))
        self.findings[kind] = (first, before + times)

    def add(self, other: Tally) -> None:
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for kind, (text, times) in other.findings.items():
            self.find(kind, text, times)
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)


def work(first: int, last: int, seed: int, progress: Path) -> None:
    """Files first to last - 1, in this process; `progress` holds the tally so far, the file in work among it."""
    import torch

    torch.set_num_threads(1)
    models = sound_models()
    tally = Tally()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as text:
        outcome(models[0], Path(text), 0)  # imports what is needed, before the limit
        os.fsync = lambda fd: None  # the disk is not what is tried here
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for tally.at in range(first, last):
            progress.write_text(json.dumps(asdict(tally)))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            start = time.perf_counter()
            try:
                tally.count(outcome(damaged(models, tally.at, seed), Path(text), tally.at))
            except Exception as error:
                place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
                kind = f"{type(error).__name__} in {Path(place.filename).name}, {place.name}"
                tally.find(kind, f"file {tally.at}: {''.join(traceback.format_exception(error))[-2000:]}")
                for path in Path(text).iterdir():
                    path.unlink()
            tally.slowest = max(tally.slowest, time.perf_counter() - start)
            faulthandler.cancel_dump_traceback_later()
    tally.at, tally.peak = last, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    progress.write_text(json.dumps(asdict(tally)))


def campaign(first: int, files: int, seed: int, workers: int) -> Tally:
    """The tally of processes that share the files; one that dies is a finding, and another goes on behind it."""
    step = -(-files // workers)
    total = Tally()
    with tempfile.TemporaryDirectory() as text:
        shares = [(begin, min(begin + step, first + files)) for begin in range(first, first + files, step)]
        running = [_Share(begin, end, seed, Path(text) / f"{begin}") for begin, end in shares]
        for share in running:
            share.start()
        while running:
            share = running.pop(0)
            died = share.wait()
            tally = Tally(**json.loads(share.progress.read_text()))
            total.add(tally)
            if died is not None:
                total.find(died[0], f"file {tally.at}: {died[1]}")
                share.begin = tally.at + 1
                if share.begin < share.end and len(total.findings) < ENOUGH:
                    share.start()
                    running.append(share)
    return total


@dataclass
class _Share:
    begin: int
    end: int
    seed: int
    progress: Path

    def start(self) -> None:
        self.progress.write_text(json.dumps(asdict(Tally(self.begin))))
        numbers = [str(self.begin), str(self.end), str(self.seed)]
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--work", *numbers, str(self.progress)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> tuple[str, str] | None:
        """How it died and what it said, if it did."""
        said, _ = self._child.communicate()
        code = self._child.returncode
        return (f"died with exit code {code}", said[-2000:]) if code else None


def all_of(models: list[Files], files: int, seed: int) -> Iterator[tuple[int, Files]]:
    return ((number, damaged(models, number, seed)) for number in range(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        first, last, seed = (int(text) for text in args.work[:3])
        return work(first, last, seed, Path(args.work[3]))
    tally = campaign(args.first, args.files, args.seed, args.workers)
    for kind, (text, times) in tally.findings.items():
        print(f"{kind}, {times} times, first in {text}\n")
    print(
        f"files {args.first} to {args.first + args.files - 1} of seed {args.seed}: {tally.counts}, "
        f"{len(tally.findings)} kinds of findings; the slowest took {tally.slowest:.3f} s, the largest process "
        f"{tally.peak / 1e6:.0f} MB"
    )
    return sys.exit(1 if tally.findings else 0)


if __name__ == "__main__":
    main()
