"""GPTQModel: its checkpoints on bitfold's kernels, and bitfold's on its own, through transformers, with the
same logits.
"""

from __future__ import annotations

import json
import os

import bitfold
import pytest

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install gptqmodel optimum")
pytest.importorskip("optimum", reason="transformers loads GPTQ with optimum: pip install optimum")

import torch
from bitfold.check.examine import examine
from owners import TEXT, assert_close, base, by_transformers, converted, logits, script  # noqa: F401
from transformers import GPTQConfig

THEIRS = [
    "gptq-4-g128-sym",
    "gptq-4-g32-asym",
    "gptq-4-g128-asym-v2",
    "gptq-4-g128-sym-act",
    "gptq-3-g32-asym",
    "gptq-2-g32-asym",
    "gptq-8-g32-asym",
]
OURS = [
    ("int4-g32", "gptq"),
    ("int4-g128-asym", "gptq"),
    ("int4-g32-asym", "gptq-v2"),
    ("int8-g32-asym", "gptq"),
    ("int3-g32-asym", "gptq"),
    ("int2-g32-asym", "gptq"),
]


def on_theirs(path, bits: int):
    """GPTQModel's layers in plain torch: its CPU kernels are compiled when they are first used, for minutes."""
    return by_transformers(path, quantization_config=GPTQConfig(bits=bits, backend="torch"))


@pytest.mark.parametrize(("recipe", "to"), OURS)
def test_they_load_ours(recipe, to, base, tmp_path):  # noqa: F811
    path = converted(base, tmp_path / "m", recipe, to)
    assert_close(logits(on_theirs(path, int(recipe[3]))), logits(bitfold.load(path, dtype=torch.float32)))


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_theirs(name, base, tmp_path):  # noqa: F811
    """And `bitfold check` finds nothing wrong with it, but for the label of the other version."""
    script("gptqmodel_models").main(str(base), str(tmp_path), str(TEXT), name)
    path = tmp_path / name
    assert_close(logits(bitfold.load(path, dtype=torch.float32)), logits(on_theirs(path, int(name[5]))))
    assert examine(path).sound
    if name == "gptq-8-g32-asym":
        return  # a step of 8 bits is too small to tell versions apart
    for file in ("config.json", "quantize_config.json"):
        config = json.loads((path / file).read_text(encoding="utf-8"))
        section = config.get("quantization_config", config)
        section["checkpoint_format"] = "gptq" if section["checkpoint_format"] == "gptq_v2" else "gptq_v2"
        (path / file).write_text(json.dumps(config), encoding="utf-8")
    assert {problem.kind for problem in examine(path).problems} == {"zeros-off-by-one"}
