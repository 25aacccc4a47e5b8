"""python llmcompressor_models.py BASE OUT TEXT [NAME ...]: compressed-tensors checkpoints by llm-compressor,
calibrated on TEXT where GPTQ is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

INT, FLOAT = "int", "float"
DYNAMIC8 = {"num_bits": 8, "type": INT, "symmetric": True, "strategy": "token", "dynamic": True}
DYNAMIC_FP8 = {"num_bits": 8, "type": FLOAT, "symmetric": True, "strategy": "token", "dynamic": True}


def group(bits: int, size: int, symmetric: bool = True, **more: object) -> dict[str, object]:
    return dict(num_bits=bits, type=INT, symmetric=symmetric, strategy="group", group_size=size, **more)


def whole(bits: int, type: str, strategy: str, symmetric: bool = True) -> dict[str, object]:
    return {"num_bits": bits, "type": type, "symmetric": symmetric, "strategy": strategy}


# name: weights, input activations, whether by GPTQ
CASES: dict[str, tuple[dict, dict | None, bool]] = {
    "ct-pack-4-g128-sym": (group(4, 128), None, False),
    "ct-pack-4-g32-asym": (group(4, 32, False), None, False),
    "ct-pack-4-channel-asym": (whole(4, INT, "channel", False), None, False),
    "ct-pack-8-g32-asym": (group(8, 32, False), None, False),
    "ct-pack-8-channel-sym": (whole(8, INT, "channel"), None, False),
    "ct-pack-3-g32-asym": (group(3, 32, False), None, False),
    "ct-pack-2-g32-sym": (group(2, 32), None, False),
    "ct-pack-4-g128-sym-gptq-static": (group(4, 128, actorder="static"), None, True),
    "ct-pack-4-g128-asym-gptq": (group(4, 128, False), None, True),
    "ct-pack-4-g128-sym-gptq-group": (group(4, 128, actorder="group"), None, True),
    "ct-int-8-channel": (whole(8, INT, "channel"), DYNAMIC8, False),
    "ct-int-8-tensor": (whole(8, INT, "tensor"), DYNAMIC8, False),
    "ct-int-8-channel-asym": (whole(8, INT, "channel", False), DYNAMIC8, False),
    "ct-float-8-channel": (whole(8, FLOAT, "channel"), DYNAMIC_FP8, False),
    "ct-float-8-tensor": (whole(8, FLOAT, "tensor"), DYNAMIC_FP8, False),
    "ct-float-8-block": (
        {**whole(8, FLOAT, "block"), "block_structure": [128, 128]},
        DYNAMIC_FP8,
        False,
    ),
    "ct-float-8-tensor-static": (
        whole(8, FLOAT, "tensor"),
        {"num_bits": 8, "type": FLOAT, "symmetric": True, "strategy": "tensor", "dynamic": False},
        False,
    ),
}
ROWS, LENGTH = 32, 512


def main(base: str, out: str, text: str, *names: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer(Path(text).read_text(encoding="utf-8")[: ROWS * LENGTH * 3])["input_ids"]
    rows = [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(len(tokens) // LENGTH)][:ROWS]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    for name in names or CASES:
        weights, inputs, gptq = CASES[name]
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=QuantizationArgs(**inputs) if inputs else None,
        )
        kind = GPTQModifier if gptq else QuantizationModifier
        recipe = kind(config_groups={"group_0": scheme}, ignore=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=recipe,
            dataset=data,
            num_calibration_samples=len(rows),
            max_seq_length=LENGTH,
        )
        model.save_pretrained(str(Path(out) / name), save_compressed=True)
        tokenizer.save_pretrained(str(Path(out) / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
