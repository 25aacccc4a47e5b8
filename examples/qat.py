"""Train the demo model knowing how its weights will be rounded, and print how much of what rounding loses comes back.

    python examples/qat.py                            a few minutes on two cores; uses a GPU where there is one
    python examples/qat.py --steps 10                 to see it run
    python examples/qat.py --recipe int2-g64          another format (again for more)
    python examples/qat.py --learned-steps            train the scales too (symmetric integers)
    python examples/qat.py --keep DIR                 keep the quantized models

The model computes with rounded weights and learns to predict what the 16-bit model predicts (its distribution of the
next token, not the text: distillation), from the texts that the model was made of. What is measured is the KL
divergence from the 16-bit model on text that neither has seen: after plain rounding, and after this.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import time
from dataclasses import dataclass
from pathlib import Path

import bitfold
import torch
import torch.nn.functional as F
from bitfold import hf, qat
from bitfold.evaluate import compare_all, cut
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RECIPES = ("int4-channel", "int3-g64")


@dataclass(frozen=True)
class Result:
    """Mean KL from the 16-bit model in nats: of plain rounding, and of the trained model."""

    recipe: str
    rounded: float
    trained: float
    seconds: float

    @property
    def recovered(self) -> float:
        """Share of what rounding loses that training brings back."""
        return 1 - self.trained / self.rounded


def rows(model: Path, context: int, count: int, seed: int = 0) -> Tensor:
    """Rows of `context` tokens of the texts that the demo model was trained on, shuffled: at least [count, context]."""
    texts, _ = runpy.run_path(str(HERE / "demo" / "train.py"))["stdlib_files"]()
    tokenizer = hf.load_tokenizer(model)
    tokenizer.model_max_length = 1 << 30
    width = context - 1
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [[tokenizer.bos_token_id, *ids[i : i + width]] for i in range(0, len(ids) - width, width)]
        if len(found) >= count:
            break
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(found)[shuffled]


def distill(teacher: nn.Module, student: nn.Module, data: Tensor, options: argparse.Namespace) -> None:
    """Let the student predict what the teacher predicts, with AdamW and a rate that falls to nothing."""
    device = next(teacher.parameters()).device
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / options.steps)
    )
    for step in range(options.steps):
        start = step * options.batch % (len(data) - options.batch)
        ids = data[start : start + options.batch].to(device)
        with torch.no_grad():
            wanted = F.log_softmax(teacher(ids).logits.float(), -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            found = student(ids).logits
        loss = (
            F.kl_div(F.log_softmax(found.float(), -1), wanted, log_target=True, reduction="none")
            .sum(-1)
            .mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, options.steps // 5) == 0 or step == options.steps - 1:
            print(f"  step {step:4}  KL {loss.item():.4f}", flush=True)


def run(options: argparse.Namespace) -> list[Result]:
    """All recipes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = hf.load_causal_lm(options.model, device=device, dtype=torch.float32).requires_grad_(False)
    tokenizer = hf.load_tokenizer(options.model)
    text = (HERE / "demo" / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(text, tokenizer, context=512, max_tokens=options.tokens, dtype=torch.float32)
    data = rows(options.model, options.context, options.rows)
    results = []
    for recipe in options.recipe or RECIPES:
        print(recipe)
        rounded = copy.deepcopy(teacher)
        bitfold.quantize(rounded, recipe, quiet=True)
        student = copy.deepcopy(teacher).requires_grad_(True)
        qat.prepare(student, recipe, learned_steps=options.learned_steps)
        start = time.perf_counter()
        distill(teacher, student, data, options)
        seconds = time.perf_counter() - start
        qat.convert(student)
        found = compare_all(teacher, {"rounded": rounded, "trained": student}, windows)
        results.append(
            Result(recipe, found["rounded"].mean_kl.value, found["trained"].mean_kl.value, seconds)
        )
        if options.keep:
            bitfold.save(
                student, options.keep / recipe, recipe=recipe, tokenizer_from=options.model, force=True
            )
    return results


def show(results: list[Result]) -> None:
    print(f"\n{'recipe':14} {'KL rounded':>11} {'KL trained':>11} {'recovered':>10} {'seconds':>8}")
    for one in results:
        print(
            f"{one.recipe:14} {1e3 * one.rounded:11.2f} {1e3 * one.trained:11.2f} {one.recovered:10.1%} "
            f"{one.seconds:8.1f}"
        )
    print("KL in thousandths of a nat, from the 16-bit model, on text that was not trained on.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "demo" / "model")
    parser.add_argument("--recipe", action="append", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rows", type=int, default=8000, help="to choose from")
    parser.add_argument("--context", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--learned-steps", action="store_true", help="train the scales too")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    parser.add_argument("--tokens", type=int, default=8176, help="of the text that is measured on")
    parser.add_argument("--keep", type=Path, help="a folder for the quantized models")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    show(run(parse()))
