"""Fine-tune the demo model on another kind of text, in 16 bits and as QLoRA, and print both side by side.

    python examples/qlora.py                      a few minutes on two cores; uses a GPU where there is one
    python examples/qlora.py --steps 20           to see it run
    python examples/qlora.py --recipe int4-g32    another base; any recipe that looks at the weights alone
    python examples/qlora.py --text FILE          another text
    python examples/qlora.py --keep DIR           keep the adapters, and the merged model

QLoRA (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs") trains adapters of 16 or 32 bits on a
frozen base of 4 bits (nf4 with scales that are quantized themselves). The gradient goes through the packed weights to
their inputs, never into them.

The demo model has read programs; it is to learn prose, the reference of the Python language as `help()` shows it, which
comes with every Python. All is done by transformers' Trainer and PEFT; bitfold brings the base.

What is to be seen: the loss on text that neither run has seen falls as far with a base of 4 bits as with one of 16.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import bitfold
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

HERE = Path(__file__).resolve().parent
CONTEXT = 128  # tokens of a row
HELD_OUT = 8  # of so many rows one is for evaluation


@dataclass(frozen=True)
class Run:
    """One fine-tuning. before, after: loss on the rows held out, nats per token; base: bytes of the base's tensors."""

    title: str
    before: float
    after: float
    base: int
    trained: int
    seconds: float

    @property
    def fall(self) -> float:
        return self.before - self.after


def rows(tokenizer, text: str, context: int) -> list[dict[str, list[int]]]:
    """The text in rows of `context` tokens, BOS in front of each."""
    pieces = text.splitlines(keepends=True)
    ids = [id for piece in pieces for id in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    width = context - 1
    found = [[tokenizer.bos_token_id, *ids[i : i + width]] for i in range(0, len(ids) - width, width)]
    return [{"input_ids": row, "labels": row} for row in found]


def fine_tune(title: str, model: nn.Module, train: list, held_out: list, options: argparse.Namespace) -> Run:
    """Put adapters on all linear layers of a model and train them; `model` is wrapped, and has them afterwards."""
    set_seed(0)
    base = sum(parameter.nbytes for parameter in model.parameters())
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted = get_peft_model(model, bitfold.peft.prepare(config, model))
    arguments = TrainingArguments(
        output_dir=str(options.keep / "trainer") if options.keep else "trainer",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        gradient_checkpointing=options.checkpointing,
        bf16=options.bf16,
        optim=options.optim,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=max(1, options.steps // 5),
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(adapted, arguments, train_dataset=train, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"]
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    if options.keep:
        adapted.save_pretrained(options.keep / title)
        bitfold.peft.merge(adapted) if title != "16 bits" else adapted.merge_and_unload()
        model.save_pretrained(options.keep / f"{title} merged")
    return Run(title, before, after, base, trained, seconds)


def compare(options: argparse.Namespace) -> tuple[Run, Run]:
    """The same fine-tuning on the 16-bit model and on the quantized one."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8") if options.text else "\n\n".join(topics.values())
    cut = rows(tokenizer, text, CONTEXT)
    held_out = cut[HELD_OUT - 1 :: HELD_OUT][: options.eval_rows]
    train = [row for place, row in enumerate(cut) if place % HELD_OUT != HELD_OUT - 1]
    print(f"{len(train)} rows of {CONTEXT} tokens to train on, {len(held_out)} held out")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    runs = []
    for title, quantization in (("16 bits", None), (options.recipe, bitfold.Config(options.recipe))):
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, quantization_config=quantization
        )
        runs.append(fine_tune(title, model, train, held_out, options))
    return runs[0], runs[1]


def show(runs: tuple[Run, Run]) -> None:
    plain, packed = runs
    print(
        f"\n{'base':10} {'before':>8} {'after':>8} {'fall':>8} {'base, MB':>9} {'trained':>9} {'seconds':>8}"
    )
    for run in runs:
        print(
            f"{run.title:10} {run.before:8.4f} {run.after:8.4f} {run.fall:8.4f} {run.base / 1e6:9.2f} "
            f"{run.trained:9,} {run.seconds:8.1f}"
        )
    print(
        f"With {packed.title} the loss falls by {packed.fall / plain.fall:.1%} of what it falls by in 16 bits."
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "demo" / "model")
    parser.add_argument(
        "--text", type=Path, help="a UTF-8 text; default: the reference of the Python language"
    )
    parser.add_argument("--recipe", default="nf4-dq")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--optim", default="adamw_torch", help="adamw_bnb_8bit: with bitsandbytes; paged_adamw_8bit: on a GPU"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again, not keep them"
    )
    parser.add_argument("--keep", type=Path, help="a folder for adapters and merged models")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    show(compare(parse()))
