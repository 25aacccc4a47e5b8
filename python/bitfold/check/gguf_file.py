"""GGUF files: what their reader refuses, and weights that are no numbers."""

from __future__ import annotations

from pathlib import Path

from bitfold.check.problem import Progress, Report
from bitfold.gguf.library import GGMLQuantizationType
from bitfold.gguf.reader import PLAIN, read_gguf
from bitfold.qtensor import QTensor
from bitfold.shards import CheckpointError

_WEIGHTS_AT_ONCE = 1 << 22


def examine_file(path: Path, progress: Progress | None) -> Report:
    """A GGUF file, or the first of a split one."""
    report = Report(path, "gguf")
    try:
        model = read_gguf(path)
    except CheckpointError as error:
        report.fault(
            "file-damaged", path, str(error).removeprefix(f"{path} "), "it must be a whole GGUF file"
        )
        return report
    report.modules = sum(tensor.type not in PLAIN for tensor in model.tensors.values())
    for done, (name, tensor) in enumerate(model.tensors.items()):
        columns = tensor.shape[-1] if tensor.shape else 1
        rows = max(1, _WEIGHTS_AT_ONCE // max(1, columns))
        for begin in range(0, tensor.rows, rows):
            piece = tensor.read(begin, min(begin + rows, tensor.rows))
            if tensor.type in PLAIN:
                if not piece.is_floating_point():
                    break
            else:
                format = GGMLQuantizationType(tensor.type).name.lower()
                try:
                    piece = QTensor(format, (len(piece), columns), {"blocks": piece}).decode()
                except ValueError:
                    report.doubt(
                        name,
                        f"its type {format} has no decoder in bitfold, so its weights were not looked at",
                    )
                    break
            wrong = ~piece.isfinite()
            if wrong.any():
                row, column = wrong.nonzero()[0].tolist()
                report.fault(
                    "scale-not-finite" if tensor.type not in PLAIN else "weight-not-finite",
                    name,
                    f"row {begin + row}, column {column} is {piece[row, column].item()}",
                    "all weights must be finite",
                )
                break
        if progress is not None:
            progress(name, done + 1, len(model.tensors))
    return report
