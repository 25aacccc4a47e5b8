"""python gptqmodel_models.py BASE OUT TEXT [NAME ...]: checkpoints by GPTQModel, one directory each, calibrated
on TEXT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its own default is one too few
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

CASES = {
    "gptq-4-g128-sym": {"bits": 4, "group_size": 128},
    "gptq-4-g32-asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-4-g128-asym-v2": {"bits": 4, "group_size": 128, "sym": False, "format": "gptq_v2"},
    "gptq-4-g128-sym-v2": {"bits": 4, "group_size": 128, "format": "gptq_v2"},
    "gptq-4-g128-sym-act": {"bits": 4, "group_size": 128, "desc_act": True},
    "gptq-4-g32-asym-act": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "gptq-4-channel-sym": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "gptq-4-channel-asym": {"bits": 4, "group_size": -1, "sym": False, "act_group_aware": False},
    "gptq-8-g128-sym": {"bits": 8, "group_size": 128},
    "gptq-8-g32-asym": {"bits": 8, "group_size": 32, "sym": False},
    "gptq-3-g128-sym": {"bits": 3, "group_size": 128},
    "gptq-3-g32-asym": {"bits": 3, "group_size": 32, "sym": False},
    "gptq-3-g128-asym-v2": {"bits": 3, "group_size": 128, "sym": False, "format": "gptq_v2"},
    "gptq-2-g32-sym": {"bits": 2, "group_size": 32},
    "gptq-2-g32-asym": {"bits": 2, "group_size": 32, "sym": False},
    "gptq-2-g32-asym-v2": {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-8-channel-asym-v2": {
        "bits": 8,
        "group_size": -1,
        "sym": False,
        "format": "gptq_v2",
        "act_group_aware": False,
    },
}
ROWS, LENGTH = 32, 512


def main(base: str, out: str, text: str, *names: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer(Path(text).read_text(encoding="utf-8")[: ROWS * LENGTH * 3])["input_ids"]
    rows = [{"input_ids": tokens[i * LENGTH : (i + 1) * LENGTH]} for i in range(len(tokens) // LENGTH)][:ROWS]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    for name in names or CASES:
        case = {"desc_act": False, "sym": True, **CASES[name]}
        config = QuantizeConfig(**case, offload_to_disk=False)
        model = GPTQModel.load(base, config, dtype=torch.float16, device="cpu")
        model.quantize(rows, batch_size=1, backend=BACKEND.AUTO)
        model.save(str(Path(out) / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
