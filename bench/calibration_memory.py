"""What calibrating takes of memory, on a model that is larger than it: `python bench/calibration_memory.py`.

Makes a Llama of random weights (by default 8 GB on disk, in few large blocks), quantizes it in a process of its own,
and samples that process's RssAnon + RssShmem: what it has beyond the pages of files, which the system may take back.
The bar: the peak is above what the imports need by at most two blocks as they are stored, the activations, and 1 GB.
Everything it writes goes into --folder and is removed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bitfold.shards import TensorSpec
from bitfold.writer import CheckpointWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 256
ALLOWANCE = 1 << 30  # bytes
_PIECE = 1 << 22  # random numbers that are made, and then repeated

MEASURED = """
import json, sys, threading, time
import torch, transformers, bitfold
from bitfold.calibration.run import quantize_calibrated
def level():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
source, target, recipe, text, options, small = sys.argv[1:7]
# What is imported, and what libraries make at their first use, belongs to no model.
quantize_calibrated(small, target + "-small", recipe, text, samples=2, sequence_length=32)
start = peak = level()
running, at, now = True, "", ""
def watch():
    global peak, at
    while running:
        if level() > peak:
            peak, at = level(), now
        time.sleep(0.005)
def progress(what, done, total):
    global now
    now = what
thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
try:
    quantize_calibrated(source, target, recipe, text, progress=progress, **json.loads(options))
finally:
    running = False
thread.join()
print(json.dumps({"above": peak - start, "at": at, "seconds": time.perf_counter() - began}))
"""


def config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def tensors(args: argparse.Namespace) -> list[TensorSpec]:
    """Names and shapes of the model, a block after the other."""
    d, f = args.hidden, args.ffn
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (d, d),
        "self_attn.v_proj": (d, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    named = {"model.embed_tokens": (VOCABULARY, d), "model.norm": (d,), "lm_head": (VOCABULARY, d)}
    for layer in range(args.layers):
        named.update({f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()})
    return [TensorSpec(f"{name}.weight", torch.bfloat16, shape) for name, shape in named.items()]


def write_model(path: Path, args: argparse.Namespace) -> int:
    """Write the model; returns the bytes of a block."""
    specs = tensors(args)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, specs, shard_bytes=2 << 30) as writer:
        for spec in specs:
            if len(spec.shape) == 1:
                writer.write(spec.name, torch.ones(spec.shape, dtype=spec.dtype))
                continue
            count = math.prod(spec.shape)
            piece = (
                torch.randn(min(count, _PIECE), generator=generator) / math.sqrt(spec.shape[1])
            ).bfloat16()
            writer.write(spec.name, piece.repeat(-(-count // len(piece)))[:count].view(spec.shape))
        fields = json.loads(config(args).to_json_string(use_diff=False))
        writer.commit({**fields, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    return sum(spec.nbytes for spec in specs if spec.name.startswith("model.layers.0."))


def write_tokenizer(path: Path) -> None:
    """One token a byte."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(path)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    block = write_model(folder / "model", args)
    small = argparse.Namespace(hidden=128, ffn=128, layers=1)
    write_model(folder / "small", small)
    for name in ("model", "small"):
        write_tokenizer(folder / name)
    letters = "".join(
        random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=2 * args.samples * args.tokens)
    )
    (folder / "text.txt").write_text(letters)
    options = {"samples": args.samples, "sequence_length": args.tokens, "activations": args.activations}
    command = [
        sys.executable,
        "-c",
        MEASURED,
        folder / "model",
        folder / "quantized",
        args.recipe,
        folder / "text.txt",
    ]
    command += [json.dumps(options), folder / "small"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    activations = 0 if args.activations == "disk" else 4 * args.samples * args.tokens * args.hidden
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    allowed = 2 * block + activations + ALLOWANCE
    return {
        "shape": {"hidden": args.hidden, "ffn": args.ffn, "layers": args.layers},
        "recipe": args.recipe,
        "samples": args.samples,
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "model_bytes": size,
        "block_bytes": block,
        "activation_bytes": activations,
        "allowed_bytes": allowed,
        "above_imports_bytes": found["above"],
        "peak_at": found["at"],
        "seconds": found["seconds"],
        "holds": found["above"] <= allowed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of calibrating on a synthetic model.")
    parser.add_argument("--hidden", type=int, default=8192, help="a multiple of 128")
    parser.add_argument("--ffn", type=int, default=12288)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--recipe", default="gptq-int4-g128")
    parser.add_argument("--activations", default="ram", choices=["ram", "disk"])
    parser.add_argument(
        "--folder", type=Path, help="where the model goes (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="calibration-memory-", dir=args.folder))
    try:
        found = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
