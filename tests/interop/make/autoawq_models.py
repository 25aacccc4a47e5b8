"""python autoawq_models.py BASE OUT TEXT [NAME ...]: checkpoints by AutoAWQ, scales searched on TEXT."""

from __future__ import annotations

import sys
from pathlib import Path

from awq import AutoAWQForCausalLM
from transformers import PreTrainedTokenizerFast

CASES = {
    "awq-4-g128": {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
    "awq-4-g32": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    "awq-4-g64-sym": {"zero_point": False, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
}
ROWS, LENGTH = 16, 512


def main(base: str, out: str, text: str, *names: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(base) / "tokenizer.json"))
    paragraphs = Path(text).read_text(encoding="utf-8")[: ROWS * LENGTH * 4].split("\n\n")
    for name in names or CASES:
        model = AutoAWQForCausalLM.from_pretrained(base, device_map="cpu", safetensors=True)
        model.quantize(
            tokenizer,
            quant_config=CASES[name],
            calib_data=paragraphs,
            max_calib_samples=ROWS,
            max_calib_seq_len=LENGTH,
        )
        model.save_quantized(str(Path(out) / name))
        tokenizer.save_pretrained(str(Path(out) / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
