"""The measures against plain numpy, on models whose answers are known."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import bitfold
import numpy as np
import pytest
import tiny
import torch
from bitfold import evaluate
from bitfold.evaluate import Estimate, compare, compare_all, cut, kl_gap, percentile, perplexity, ratio
from hypothesis import given
from hypothesis import strategies as st
from tiny import one_thread  # noqa: F401
from torch import nn

VOCAB = tiny.VOCAB


class Bigram(nn.Module):
    """The next token depends on the last alone: logits are a row of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def table(seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


@given(
    tokens=st.integers(8, 90),
    context=st.integers(2, 40),
    stride=st.none() | st.integers(1, 39),
    bos=st.booleans(),
)
def test_every_token_is_scored_once(tokens, context, stride, bos):
    text = "".join(chr(97 + i % 26) for i in range(tokens))
    if (stride or 1) >= context or tokens < context:
        return
    windows = cut(text, tiny_tokenizer(), context=context, stride=stride, bos=bos)
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    scored = []
    for row, count in zip(windows.ids, windows.scored, strict=True):
        assert len(row) <= context
        assert count < len(row)
        assert (row[0] == 0) == bos
        scored += row[-count:].tolist()
    assert scored == (ids if bos else ids[1:])
    protocol = windows.protocol
    assert protocol.tokens == tokens
    assert protocol.scored == len(scored)
    assert protocol.windows == len(windows.ids)
    assert all(count == protocol.stride for count in windows.scored[:-1])


_TOKENIZER = None


def tiny_tokenizer():
    global _TOKENIZER
    _TOKENIZER = _TOKENIZER or tiny.tokenizer()
    return _TOKENIZER


def test_overlapping_windows_give_full_context(tokenizer):
    windows = cut("abcdefghij" * 5, tokenizer, context=20, stride=5, bos=False)
    stream = tokenizer("abcdefghij" * 5, add_special_tokens=False)["input_ids"]
    assert windows.ids[3].tolist() == stream[1:21]
    assert all(len(row) == 20 for row in windows.ids[3:])


def test_protocol_pins_what_was_measured(tokenizer):
    windows = cut(tiny.TEXT, tokenizer, context=33, dtype=torch.bfloat16)
    protocol = windows.protocol
    assert protocol.text_sha256 == hashlib.sha256(tiny.TEXT.encode()).hexdigest()
    assert (protocol.text_bytes, protocol.bos, protocol.dtype) == (len(tiny.TEXT), True, "bfloat16")
    assert (protocol.context, protocol.stride) == (33, 32)
    for part in ("33", "32", "BOS", protocol.text_sha256[:16], "bfloat16", str(protocol.scored)):
        assert part in str(protocol)
    part = cut(tiny.TEXT, tokenizer, context=33, max_tokens=100).protocol
    assert part.tokens == 100
    assert part.text_sha256 == hashlib.sha256(tiny.TEXT[:100].encode()).hexdigest()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 5000}, r"the text has 960 tokens.*5000"),
        ({"context": 1}, "at least 2"),
        ({"context": 8, "stride": 8}, "from 1 to 7"),
        ({"context": 8, "stride": -1}, "from 1 to 7"),
    ],
)
def test_bad_windows(tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        cut(tiny.TEXT, tokenizer, **options)


def test_uniform_model_has_the_vocabulary_as_perplexity(tokenizer):
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    result = perplexity(model, cut(tiny.TEXT, tokenizer, context=50))
    assert result.perplexity.value == pytest.approx(VOCAB)
    assert result.perplexity.error == pytest.approx(0, abs=1e-9)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_against_numpy(tokenizer, bos, dtype):
    model = Bigram(table(0).to(dtype))
    windows = cut(tiny.TEXT, tokenizer, context=40, bos=bos)
    result = perplexity(model, windows)
    ids = np.array(tokenizer(tiny.TEXT, add_special_tokens=False)["input_ids"])
    log_p = log_softmax(model.table.detach().double().numpy())
    if bos:  # each window's first token follows BOS, but the last window is filled up to the left
        first = np.arange(len(ids)) % 39 == 0
        first[len(ids) // 39 * 39] = False
        before = np.where(first, 0, np.roll(ids, 1))
        nll = -log_p[before, ids]
    else:
        nll = -log_p[ids[:-1], ids[1:]]
    blocks = [nll[i : i + 39] for i in range(0, len(nll), 39)]
    mean = nll.mean()
    residual = np.array([block.sum() - mean * len(block) for block in blocks])
    error = np.sqrt(len(blocks) / (len(blocks) - 1) * (residual**2).sum()) / len(nll)
    assert result.nll.value == pytest.approx(mean, rel=1e-10)
    assert result.nll.error == pytest.approx(error, rel=1e-8)
    assert result.perplexity.value == pytest.approx(np.exp(mean), rel=1e-10)
    assert result.perplexity.error == pytest.approx(np.exp(mean) * error, rel=1e-8)
    assert result.bits_per_byte == pytest.approx(nll.sum() / np.log(2) / len(tiny.TEXT.encode()), rel=1e-10)


def test_comparison_against_numpy(tokenizer):
    p, q = table(0), table(0) + 0.3 * table(1, 1.0)
    windows = cut(tiny.TEXT, tokenizer, context=30)
    result = compare(Bigram(p), Bigram(q), windows)
    log_p, log_q = log_softmax(p.double().numpy()), log_softmax(q.double().numpy())
    kl_of = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    same_of = log_p.argmax(-1) == log_q.argmax(-1)
    kl, same, sums = [], [], []
    for row, scored in zip(windows.ids, windows.scored, strict=True):
        before = row[-scored - 1 : -1].numpy()
        kl += kl_of[before].tolist()
        same += same_of[before].tolist()
        sums.append(kl_of[before].sum())
    assert result.mean_kl.value == pytest.approx(np.mean(kl), rel=1e-9)
    assert result.p99_kl.value == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-9)
    assert result.top1.value == pytest.approx(np.mean(same))
    assert result.window_kl == pytest.approx(sums)
    assert result.base.nll.value == pytest.approx(perplexity(Bigram(p), windows).nll.value, rel=1e-12)
    assert result.model.nll.value == pytest.approx(perplexity(Bigram(q), windows).nll.value, rel=1e-12)
    both = compare_all(Bigram(p), {"a": Bigram(q), "b": Bigram(p)}, windows)
    assert both["a"] == result
    assert both["b"].mean_kl == Estimate(0.0, 0.0)
    assert both["b"].top1.value == 1.0


def test_impossible_tokens(tokenizer):
    """A token that the base rules out adds nothing; one that only the model rules out makes KL infinite."""
    p = table(0)
    p[:, 5] = -math.inf
    windows = cut(tiny.TEXT, tokenizer, context=30)
    assert compare(Bigram(p), Bigram(p.clone()), windows).mean_kl.value == 0
    assert compare(Bigram(table(0)), Bigram(p), windows).mean_kl.value == math.inf


def test_nan_logits_are_an_error(tokenizer):
    broken = table(0)
    broken[7] = math.nan
    broken[tokenizer("q", add_special_tokens=False)["input_ids"][0]] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        perplexity(Bigram(broken), cut(tiny.TEXT, tokenizer, context=30))


def test_vocabularies_must_agree(tokenizer):
    with pytest.raises(ValueError, match="vocabulary"):
        compare(Bigram(table(0)), Bigram(table(0)[:, :-1]), cut(tiny.TEXT, tokenizer, context=30))


def test_gap_is_paired(tokenizer):
    p = table(0)
    near, far = Bigram(p + 0.1 * table(1, 1.0)), Bigram(p + 0.11 * table(1, 1.0))
    result = compare_all(Bigram(p), {"near": near, "far": far}, cut(tiny.TEXT, tokenizer, context=30))
    gap = kl_gap(result["near"], result["far"])
    assert gap.value == pytest.approx(result["far"].mean_kl.value - result["near"].mean_kl.value)
    assert gap.value > 3 * gap.error
    assert gap.error < math.hypot(result["near"].mean_kl.error, result["far"].mean_kl.error)
    other = compare(Bigram(p), near, cut(tiny.TEXT, tokenizer, context=31))
    with pytest.raises(ValueError, match="protocol"):
        kl_gap(result["near"], other)


def test_standard_errors_cover(rng):
    """Over many simulated texts the errors match the spread of the estimates."""
    means, errors, tails, tail_errors = [], [], [], []
    for _ in range(300):
        sizes = rng.integers(20, 60, 40)
        level = rng.gamma(4.0, 1.0, 40)
        values = [torch.from_numpy(a * rng.exponential(1.0, n)) for a, n in zip(level, sizes, strict=True)]
        mean = ratio([float(v.sum()) for v in values], sizes.tolist())
        tail = percentile(values, 0.9)
        means.append(mean.value)
        errors.append(mean.error)
        tails.append(tail.value)
        tail_errors.append(tail.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert np.mean(tail_errors) == pytest.approx(np.std(tails), rel=0.25)


def test_one_window_has_no_error(tokenizer):
    windows = cut("abc" * 5, tokenizer, context=16)
    result = compare(Bigram(table(0)), Bigram(table(1)), windows)
    assert windows.protocol.windows == 1
    assert result.mean_kl.error is result.p99_kl.error is result.model.perplexity.error is None


def test_logits_in_parts_make_no_difference(tokenizer, monkeypatch):
    windows = cut(tiny.TEXT, tokenizer, context=30)
    whole = compare(Bigram(table(0)), Bigram(table(1)), windows)
    monkeypatch.setattr(evaluate, "_LOGIT_CHUNK", 7 * VOCAB)
    parts = compare(Bigram(table(0)), Bigram(table(1)), windows)
    assert parts.mean_kl.value == pytest.approx(whole.mean_kl.value, rel=1e-12)
    assert parts.p99_kl == whole.p99_kl


def test_quantized_llama_is_near_its_base(tokenizer):
    base, model = tiny.llama(), tiny.llama()
    bitfold.quantize(model, "int8", quiet=True)
    windows = cut(tiny.TEXT, tokenizer, context=evaluate.default_context(base), max_tokens=400)
    seen: list[tuple[int, int]] = []
    result = compare(base, model, windows, progress=lambda *args: seen.append(args))
    assert windows.protocol.context == 64
    assert 0 < result.mean_kl.value < 0.01
    assert result.top1.value > 0.9
    assert seen[-1] == (400, 400)
