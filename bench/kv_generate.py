"""Times generate() with a long past, whole: the demo model goes on from a text, with each cache and attention function.

    python bench/kv_generate.py --threads 2 --out bench/results/kv-generate-NAME.json

The prompt is --context tokens of the held-out text; the first token is its affair, and --new tokens follow. A token's
time is the mean from one to the next, so it has all that transformers does for each. 16 bits are DynamicCache with
"sdpa"; transformers' own QuantizedCache takes part with the backends that are installed. All take turns; ratios are
medians of the turns' ratios. Beside them: how many of the new tokens are those of 16 bits, before the first that isn't.

The model was trained on windows of 512 tokens, so a longer past is a matter of time alone, not of the text.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold.kv.blocks import FORMATS
from kv import peer_caches, tensors_of
from peer import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

DEMO = Path(__file__).parents[1] / "examples" / "demo"
BASE = "16 bits, sdpa"


class Clock:
    """A streamer that keeps when it was given what."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Contestant:
    """A cache for each call, and the attention function that it is used with."""

    name: str
    attention: str
    make: Callable[[Any], Any]
    prompt_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    nbytes: int = 0
    tokens: Tensor | None = None

    def turn(self, model: Any, ids: Tensor, new: int) -> None:
        model.set_attn_implementation(self.attention)
        cache, clock = self.make(model.config), Clock()
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=new + 1,
            do_sample=False,
            streamer=clock,
        )
        first, last = clock.times[1], clock.times[-1]  # the prompt is the first that a streamer is given
        self.prompt_seconds.append(first - begin)
        self.token_seconds.append((last - first) / new)
        self.nbytes = tensors_of(cache.layers, set())
        self.tokens = out[0, ids.shape[1] :]


def contestants(with_peers: bool) -> list[Contestant]:
    found = [Contestant(BASE, "sdpa", lambda config: DynamicCache(config=config))]
    for attention in ("bitfold", "sdpa"):
        for format in FORMATS:
            make = functools.partial(bitfold.QuantizedCache, format=format)
            found.append(Contestant(f"bitfold {format}, {attention}", attention, make))
    if with_peers:
        found += [Contestant(f"{name}, sdpa", "sdpa", make) for name, make in peer_caches().items()]
    return found


def alike(got: Tensor, wanted: Tensor) -> int:
    """Tokens before the first that is another."""
    same = (got == wanted).long()
    return int(same.cumprod(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # as long as is asked for
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "heldout.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.context]
    all_of_them = contestants(options.peers)
    for each in all_of_them:
        each.turn(model, ids, 2)
        each.prompt_seconds.clear()
        each.token_seconds.clear()
    for _ in range(options.rounds):
        for each in all_of_them:
            each.turn(model, ids, options.new)
    base = all_of_them[0]
    assert base.tokens is not None
    report: dict[str, Any] = {}
    lines = [
        f"{ids.shape[1]} tokens, then {options.new}, demo model ({model.config.num_hidden_layers} layers, "
        f"{model.config.num_key_value_heads} key-value heads of {model.config.head_dim}), bf16, {options.rounds} turns",
        f"{'':34}{'prompt':>11}{'a token':>11}{'x':>7}{'cache':>10}{'of 16 bits':>11}{'alike':>7}",
    ]
    for each in all_of_them:
        assert each.tokens is not None
        speed = statistics.median(b / a for a, b in zip(each.token_seconds, base.token_seconds, strict=True))
        found = {
            "prompt_seconds": statistics.median(each.prompt_seconds),
            "token_seconds": statistics.median(each.token_seconds),
            "speed": speed,
            "bytes": each.nbytes,
            "bytes_ratio": each.nbytes / base.nbytes,
            "alike": alike(each.tokens, base.tokens),
            "turns": list(zip(each.prompt_seconds, each.token_seconds, strict=True)),
        }
        report[each.name] = found
        lines.append(
            f"{each.name:34}{found['prompt_seconds'] * 1e3:8.0f} ms{found['token_seconds'] * 1e3:8.2f} ms{speed:7.2f}"
            f"{each.nbytes / 1e6:7.2f} MB{found['bytes_ratio']:11.3f}{found['alike']:7}"
        )
    save(options.out, "kv-generate", report, "\n".join(lines), options.threads)


if __name__ == "__main__":
    main()
