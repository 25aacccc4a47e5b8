"""Train the demo model: a small Llama on the Python standard library's sources.

The quantization examples and tests need a model whose weights were really learnt, small enough to
be kept in the repository and free of download. This script makes one on the CPU, in the time it
is given, and writes, next to itself:

    model/       config, fp16 weights and tokenizer, as `transformers` loads them
    heldout.txt  source text the model has not seen, to measure it on
    train.log    what this script printed

Run it with torch, transformers and tokenizers installed:

    python examples/demo/train.py --minutes 20

The schedule follows the clock, so a slower machine makes fewer steps in the same time: the data,
the tokenizer and the starting weights are the same from run to run, the final weights are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB = 1024
CONTEXT = 512
SEED = 0
HELDOUT_BYTES = 200_000
SHORT_PART = 0.6  # of the time goes to rows of half the context, which cost less per token
# Tests, character tables, generated prose and files that the installation wrote are left out.
SKIP_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
SKIP_DIRS |= {"pydoc_data", "__pycache__"}
SKIP_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


def stdlib_files() -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out, one file in 24, each in an order of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[tuple[str, str]] = []
    heldout: list[tuple[str, str]] = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if SKIP_DIRS & set(parts) or any(part.startswith(SKIP_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256("/".join(parts).encode()).hexdigest()
        (heldout if int(digest, 16) % 24 == 0 else train).append((digest, text))
    return [text for _, text in sorted(train)], [text for _, text in sorted(heldout)]


def take_whole(texts: list[str], limit: int) -> str:
    """The texts, one after another, leaving out those that would go over `limit` bytes."""
    taken, size = [], 0
    for text in texts:
        n = len(text.encode())
        if size + n <= limit:
            taken.append(text)
            size += n
    return "".join(taken)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS in front of what it encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class name that both transformers 4 and 5 know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(stream: torch.Tensor, bos: int, length: int = CONTEXT) -> torch.Tensor:
    """Cut a token stream into rows of `length` tokens, each with BOS in front."""
    rows = stream[: len(stream) // (length - 1) * (length - 1)].view(-1, length - 1)
    return F.pad(rows, (1, 0), value=bos)


def batches(stream: torch.Tensor, bos: int, tokens: int, length: int) -> Iterator[torch.Tensor]:
    """Random batches without end; each pass over the stream cuts it at other places."""
    size = max(1, tokens // length)
    while True:
        rows = windows(stream[int(torch.randint(length, (1,))) :], bos, length)
        order = torch.randperm(len(rows))
        for i in range(0, len(rows) - size + 1, size):
            yield rows[order[i : i + size]]


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy (nats) of every token but the first of each row."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, bos: int) -> tuple[float, int]:
    """Sum of the loss over a stream, window by window, and the number of tokens scored."""
    model.eval()
    total = 0.0
    rows = windows(stream, bos)
    for batch in rows.split(8):
        total += loss_of(model, batch, "sum").item()
    rest = stream[rows.shape[0] * (CONTEXT - 1) :]
    if len(rest):
        total += loss_of(model, F.pad(rest, (1, 0), value=bos)[None], "sum").item()
    model.train()
    return total, len(stream)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warmup over the first 3 %, then a cosine down to 2 % of the peak."""
    if progress < 0.03:
        return peak * max(progress, 1e-4) / 0.03
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall-clock time to train for")
    parser.add_argument("--batch", type=int, default=1024, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    log_file = (args.out / "train.log").open("w", encoding="utf-8")

    def log(line: str) -> None:
        print(line, flush=True)
        print(line, file=log_file, flush=True)

    log(
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, seed {SEED}, {args.minutes:g} minutes, "
        f"{args.batch} tokens per step, peak lr {args.lr:g}, {args.threads} threads"
    )
    train_texts, heldout_texts = stdlib_files()
    heldout_text = take_whole(heldout_texts, HELDOUT_BYTES)
    (args.out / "heldout.txt").write_bytes(heldout_text.encode())
    tokenizer = train_tokenizer(train_texts)
    save_tokenizer(tokenizer, args.out / "model")
    bos = tokenizer.bos_token_id

    encoded = tokenizer(train_texts, verbose=False)["input_ids"]  # BOS comes with each file
    stream = torch.tensor([t for ids in encoded for t in [*ids, tokenizer.eos_token_id]])
    heldout = torch.tensor(tokenizer(heldout_text, add_special_tokens=False, verbose=False)["input_ids"])
    n_bytes = len(heldout_text.encode())
    bytes_per_token = n_bytes / len(heldout)
    log(
        f"train: {len(train_texts)} files, {sum(len(t.encode()) for t in train_texts)} bytes, "
        f"{len(stream)} tokens; held out: {n_bytes} bytes, {len(heldout)} tokens "
        f"({bytes_per_token:.3f} bytes per token)"
    )

    model = new_model(tokenizer)
    log(f"parameters: {model.num_parameters()}")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    probe = heldout[: 16 * (CONTEXT - 1)]  # what is scored while training
    budget = args.minutes * 60
    start = last_report = time.monotonic()
    short = batches(stream, bos, args.batch, CONTEXT // 2)
    full = batches(stream, bos, args.batch, CONTEXT)
    seen, losses, step = 0, [], 0
    model.train()
    while (progress := (time.monotonic() - start) / budget) < 1:
        step += 1
        rows = next(short if progress < SHORT_PART else full)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seen += rows.numel()
        now = time.monotonic()
        if step == 1 or now - last_report >= min(30.0, budget / 10):
            total, n = evaluate(model, probe, bos)
            log(
                f"step {step:5d}  {now - start:6.0f} s  {seen / 1e6:6.2f} M tokens  "
                f"{seen / (now - start):6.0f} tokens/s  lr {optimizer.param_groups[0]['lr']:.2e}  "
                f"train {sum(losses) / len(losses):.4f}  held-out {total / n:.4f}"
            )
            losses, last_report = [], now

    model.half().save_pretrained(args.out / "model")
    saved = LlamaForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    total, n = evaluate(saved, heldout, bos)
    log(
        f"saved after {step} steps, {seen} tokens; the saved fp16 weights on all of "
        f"heldout.txt: {total / n:.4f} nats per token, "
        f"{total / math.log(2) / n_bytes:.4f} bits per byte"
    )
    log_file.close()


if __name__ == "__main__":
    main()
