"""Times decoding with a long past: one token's attention, and putting it into the cache, beside 16 bits.

    python bench/kv.py --threads 2 --out bench/results/kv-NAME.json

One layer of attention at a batch of 1, with bf16 keys and values and a step as transformers does it: cache.update, then
the attention function. 16 bits are DynamicCache and torch's scaled_dot_product_attention; its attention is timed alone
too, for update copies the whole past. transformers' own QuantizedCache takes part with the backends that are
installed. Before that every output is held against float64: of the exact keys and values, which says what the format
costs, and bitfold's of the decoded ones, which says what the kernel does.

For other attention functions bitfold's cache decodes its tokens in every call: that is timed alone too, beside a copy
of the same tensors, and beside torch's own ops, which give the same bits.

All take turns; ratios are medians of the turns' ratios, so that what slows the machine down slows both.
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
from bitfold.kv import attention
from bitfold.kv.blocks import FORMATS, BlockFormat, value_group_of
from bitfold.kv.store import Store
from peer import save
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_hqq_available, is_optimum_quanto_available

SPEED_BAR = 1.5  # times 16 bits, at the longest past
ERROR_BAR = 4e-3  # relative, bf16, against float64 of the decoded numbers


@dataclass
class Contestant:
    """Someone who decodes: `update` puts a token's keys and values into a cache, `attend` what it returned together."""

    name: str
    cache: Any
    attend: Callable[..., tuple[Tensor, None]]
    update_seconds: list[float] = field(default_factory=list)
    attend_seconds: list[float] = field(default_factory=list)
    error: float = 0.0

    def step(self, module: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        begin = time.perf_counter()
        whole = self.cache.update(keys, values, 0)
        between = time.perf_counter()
        out = self.attend(module, query, *whole, None, scaling=query.shape[-1] ** -0.5)[0]
        self.update_seconds.append(between - begin)
        self.attend_seconds.append(time.perf_counter() - between)
        return out


def peer_caches() -> dict[str, Callable[[Any], Any]]:
    """transformers' own caches in fewer bits, of a model's configuration: those whose backends are installed."""
    backends: list[tuple[str, dict[str, int]]] = [("fp8", {})]
    if is_optimum_quanto_available():
        backends.append(("quanto", {"nbits": 4}))
    if is_hqq_available():
        backends += [("hqq", {"nbits": bits, "axis_key": 1, "axis_value": 1}) for bits in (8, 4)]
    found = {}
    for backend, options in backends:
        name = f"transformers {backend}" + (f" {options['nbits']} bits" if options else "")
        found[name] = functools.partial(QuantizedCache, backend, **options)
    return found


def contestants(config: Any, with_peers: bool) -> list[Contestant]:
    found = [Contestant("16 bits", DynamicCache(config=config), sdpa_attention_forward)]
    for format in FORMATS:
        found.append(
            Contestant(f"bitfold {format}", bitfold.QuantizedCache(config, format), attention.forward)
        )
    plain = LlamaConfig(**(config.to_dict() | {"attn_implementation": "sdpa"}))
    found.append(
        Contestant("bitfold int8, decoded", bitfold.QuantizedCache(plain, "int8"), sdpa_attention_forward)
    )
    if with_peers:
        found += [
            Contestant(name, make(config), sdpa_attention_forward) for name, make in peer_caches().items()
        ]
    return found


def tensors_of(thing: Any, seen: set[int]) -> int:
    """Bytes of all tensors that an object holds, each storage once."""
    if isinstance(thing, Tensor):
        parts = [getattr(thing, name) for name in ("_data", "_scale", "_shift") if hasattr(thing, name)]
        if parts and type(thing) is not Tensor:
            return sum(tensors_of(part, seen) for part in parts)
        pointer = thing.untyped_storage().data_ptr()
        new = pointer not in seen
        seen.add(pointer)
        return thing.untyped_storage().nbytes() if new else 0
    if isinstance(thing, dict):
        return sum(tensors_of(item, seen) for item in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(tensors_of(item, seen) for item in thing)
    if type(thing).__module__.startswith(("bitfold.kv", "transformers.cache_utils")):
        return tensors_of(vars(thing), seen)
    return 0


def exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[1, 1, heads, head size] in float64."""
    heads, head = keys.shape[1], query.shape[-1]
    queries = query.double().reshape(heads, -1, head)  # those that share a key-value head
    outs = []
    for q, k, v in zip(queries, keys[0], values[0], strict=True):
        outs.append(torch.softmax(q @ k.double().t() * head**-0.5, -1) @ v.double())
    return torch.cat(outs)[None, None]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def measure(
    tokens: int, heads: int, shared: int, head: int, rounds: int, peers: bool
) -> tuple[dict[str, Any], str]:
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=heads * shared, num_key_value_heads=heads,
        hidden_size=heads * shared * head, head_dim=head, attn_implementation="bitfold",
    )  # fmt: skip
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = shared, True
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Keys with channels of their own mean and size, as models have them.
    keys = (randn(1, heads, tokens, head) * randn(head).exp() + 2 * randn(head)).bfloat16()
    values, query = (
        randn(1, heads, tokens, head).bfloat16(),
        (randn(1, heads * shared, 1, head) / 4).bfloat16(),
    )
    past = keys[:, :, :-1], values[:, :, :-1]
    last = keys[:, :, -1:], values[:, :, -1:]
    wanted = exact(query, keys, values)
    all_of_them = contestants(config, peers)
    for each in all_of_them:
        each.cache.update(*past, 0)
        out = each.step(module, query, *last)
        each.error = relative(out, wanted)
        if "bitfold" in each.name:
            decoded = each.cache.layers[0].store.decode()
            kernel = relative(out, exact(query, *decoded))
            assert kernel <= ERROR_BAR, f"{each.name}: {kernel:.2g} from float64 of its own numbers"
        each.update_seconds.clear()
        each.attend_seconds.clear()
    nbytes = {each.name: tensors_of(each.cache.layers, set()) for each in all_of_them}
    for _ in range(rounds):
        for each in all_of_them:
            each.step(module, query, *last)
    first = all_of_them[0]
    report: dict[str, Any] = {}
    lines = [
        f"{tokens} tokens, {heads * shared} query heads, {heads} key-value heads of {head}, bf16, {rounds} turns",
        f"{'':22}{'attention':>11}{'update':>11}{'attention x':>12}{'both x':>9}"
        f"{'bytes':>11}{'of 16 bits':>11}{'error':>10}",
    ]
    for each in all_of_them:
        pairs = list(
            zip(
                each.update_seconds,
                each.attend_seconds,
                first.update_seconds,
                first.attend_seconds,
                strict=True,
            )
        )
        # Of those who decode in update, that is part of attending: only both together compare.
        found = {
            "attention_seconds": statistics.median(each.attend_seconds),
            "update_seconds": statistics.median(each.update_seconds),
            "attention_speed": statistics.median(b / a for _, a, _, b in pairs),
            "speed": statistics.median((u + b) / (t + a) for t, a, u, b in pairs),
            "bytes": nbytes[each.name],
            "bytes_ratio": nbytes[each.name] / nbytes[first.name],
            "error": each.error,
            "turns": [(t, a) for t, a, _, _ in pairs],
        }
        report[each.name] = found
        lines.append(
            f"{each.name:22}{found['attention_seconds'] * 1e3:8.2f} ms{found['update_seconds'] * 1e3:8.2f} ms"
            f"{found['attention_speed']:12.2f}{found['speed']:9.2f}{found['bytes'] / 1e6:8.1f} MB"
            f"{found['bytes_ratio']:11.3f}{found['error']:10.2g}"
        )
    return report, "\n".join(lines)


def decode_anywhere(store: Store) -> tuple[Tensor, Tensor]:
    """What store.decode() gives, by torch's own ops."""
    parts, left = [], store.packed
    for page in store.pages:
        parts.append(store.blocks.unpack_anywhere(page[:, :, :left], store.keys.dtype))
        left -= page.shape[2]
    parts.append(store.exact())
    return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)


def copied(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def measure_decoding(tokens: int, heads: int, head: int, rounds: int) -> tuple[dict[str, Any], str]:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, heads, tokens, head, generator=generator).bfloat16() for _ in range(2))
    report: dict[str, Any] = {}
    lines = [
        f"decoding {tokens} tokens, {heads} key-value heads of {head}, to bf16, {rounds} turns",
        f"{'':22}{'kv_unpack':>11}{'a copy':>11}{'its share':>11}{'torch':>14}",
    ]
    for format in FORMATS:
        store = Store.like(BlockFormat(format, 64, head, value_group_of(format, head)), 64, keys)
        store.append_prompt(keys, values)
        decoded = store.decode()
        assert all(map(torch.equal, decoded, decode_anywhere(store)))
        ways = {
            "kv_unpack": store.decode,
            "copy": functools.partial(copied, *decoded),
            "torch": functools.partial(decode_anywhere, store),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name, decode in ways.items():
                if name == "torch" and turn >= 3:
                    continue
                begin = time.perf_counter()
                made = decode()
                seconds[name].append(time.perf_counter() - begin)
                del made
        share = statistics.median(b / a for a, b in zip(seconds["kv_unpack"], seconds["copy"], strict=True))
        median = {name: statistics.median(each) for name, each in seconds.items()}
        report[format] = {"seconds": median, "share_of_a_copy": share, "turns": seconds}
        lines.append(
            f"{'bitfold ' + format:22}{median['kv_unpack'] * 1e3:8.2f} ms{median['copy'] * 1e3:8.2f} ms"
            f"{share:11.2f}{median['torch'] * 1e3:11.1f} ms"
        )
    return report, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reports, texts = {}, []
    with torch.no_grad():
        for tokens in options.tokens:
            reports[str(tokens)], text = measure(tokens, 8, 4, 128, options.rounds, options.peers)
            texts.append(text)
        for tokens in options.tokens:
            reports[f"decoding {tokens}"], text = measure_decoding(tokens, 8, 128, options.rounds)
            texts.append(text)
    longest = reports[str(max(options.tokens))]
    speed = longest["bitfold int8"]["attention_speed"]
    texts.append(
        f"int8 over 16 bits, attention alone: {speed:.2f}, wanted {SPEED_BAR}, met: {speed >= SPEED_BAR}"
    )
    save(options.out, "kv", reports, "\n\n".join(texts), options.threads)


if __name__ == "__main__":
    main()
