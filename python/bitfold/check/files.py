"""The files of a directory against each other: what the index names, what the shards hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitfold.check.problem import Report
from bitfold.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    StoredTensor,
    read_header,
    read_json,
    read_tensors,
)

REWRITE = "the files are written anew with an index of what they hold"


def read_files(path: Path, report: Report) -> dict[str, StoredTensor]:
    """The tensors of a directory by name, as far as they can be found; what is wrong with the files goes to
    `report`.
    """
    index = path / INDEX_FILE
    shards = sorted(file for file in path.glob("*.safetensors"))
    if not shards:
        report.fault(
            "file-missing", path, "holds no safetensors file", f"it must have {SINGLE_FILE} or {INDEX_FILE}"
        )
        return {}
    named: dict[str, str] = {}
    if index.exists():
        try:
            table = read_json(index).get("weight_map")
        except CheckpointError as error:
            report.fault("index", index, str(error).removeprefix(f"{index} "), "it must be JSON", REWRITE)
            table = {}
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            report.fault("index", index, "has no weight_map", "it must name the file of each tensor", REWRITE)
            table = {}
        named = table
    elif path / SINGLE_FILE in shards:
        shards = [path / SINGLE_FILE]
    else:
        report.fault(
            "index", path, f"has {len(shards)} shards and no {INDEX_FILE}", "it must have one", REWRITE
        )
    held = _read_headers(shards, report)
    for file in sorted(set(named.values())):
        if not (path / file).exists():
            count = sum(other == file for other in named.values())
            report.fault(
                "file-missing",
                path / file,
                f"is missing, and {count} tensors are to be in it",
                "it must be there",
            )
    found: dict[str, StoredTensor] = {}
    for name, places in held.items():
        first = next((place for place in places if place.path.name == named.get(name)), places[0])
        found[name] = first
        if len(places) > 1:
            _duplicate(name, places, report)
        if index.exists() and name not in named:
            report.fault(
                "index",
                name,
                f"lies in {first.path.name}, and {INDEX_FILE} doesn't name it",
                "it must",
                REWRITE,
            )
        elif named and first.path.name != named[name]:
            report.fault(
                "index",
                name,
                f"lies in {first.path.name}, but {INDEX_FILE} says {named[name]}",
                "both must be the same file",
                REWRITE,
            )
    for name, file in named.items():
        if name not in held and (path / file).exists():
            report.fault(
                "tensor-missing", name, f"is in no file, and {INDEX_FILE} says {file}", "it must be there"
            )
    return found


def _read_headers(shards: list[Path], report: Report) -> dict[str, list[StoredTensor]]:
    held: dict[str, list[StoredTensor]] = {}
    for shard in shards:
        try:
            header = read_header(shard)
        except CheckpointError as error:
            found = str(error).removeprefix(f"{shard} ")
            report.fault("file-damaged", shard, found, "it must be a whole safetensors file")
            continue
        for name, tensor in header.items():
            held.setdefault(name, []).append(tensor)
    return held


def _duplicate(name: str, places: list[StoredTensor], report: Report) -> None:
    files = " and ".join(place.path.name for place in places)
    first = _bytes(places[0])
    same = all(
        (place.dtype, place.shape) == (places[0].dtype, places[0].shape) and torch.equal(first, _bytes(place))
        for place in places[1:]
    )
    if same:
        report.fault(
            "tensor-twice", name, f"is in {files}, with the same bytes", "it must be in one file", REWRITE
        )
    else:
        report.fault("tensor-twice", name, f"is in {files}, with different values", "it must be in one file")


def _bytes(tensor: StoredTensor) -> torch.Tensor:
    values = next(iter(read_tensors([tensor])))[1]
    return values.contiguous().reshape(-1).view(torch.uint8)


def read_one(tensor: StoredTensor) -> Tensor:
    """A tensor's values."""
    return next(iter(read_tensors([tensor])))[1]
