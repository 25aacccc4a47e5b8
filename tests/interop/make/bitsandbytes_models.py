"""python bitsandbytes_models.py BASE OUT [NAME ...]: checkpoints by bitsandbytes through transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
CASES = {
    "bnb-nf4": dict(FOUR, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-nested": dict(FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-fp4": dict(FOUR, bnb_4bit_quant_type="fp4"),
    "bnb-fp4-nested": dict(FOUR, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "bnb-int8": {"load_in_8bit": True},
}


def main(base: str, out: str, *names: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in names or CASES:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**CASES[name])
        )
        model.save_pretrained(str(Path(out) / name))  # before any forward, which on a CPU repacks the weights
        tokenizer.save_pretrained(str(Path(out) / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
