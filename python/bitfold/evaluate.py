"""How good a model is on a text, and how far a quantized model is from its base, both under a stated
protocol.

A text of tokens t_0 ... t_(N-1) is cut into windows. With BOS, a window is BOS and up to context - 1 tokens
of the text; without, it is up to context tokens, of which the first is only looked at. Every window scores
the `stride` tokens at its end, which no window has scored before (by default as many as fit), the last one
what is left, with as much of the text before it as fits. So every token is scored once, except t_0 where
there is no BOS.

Standard errors treat windows, not tokens, as independent, for tokens of one window depend on each other: a
mean over tokens is a ratio of sums over windows, and its error that of the ratio estimator (Cochran, Sampling
Techniques, 3rd ed., section 6.4). For a percentile it is Woodruff's (1952): the error of the share below it,
carried back through the sorted values. There is none for a single window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.embeddings import QuantEmbedding
from bitfold.nn import PlaneModule

DEFAULT_CONTEXT = 2048  # tokens; the model's own limit where that is smaller
_LOGIT_CHUNK = 1 << 22  # logits turned to float64 at a time

Progress = Callable[[int, int], None]
"""Told after each window: the tokens scored so far, the tokens to score in all."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (None: not to be had from one window)."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Protocol:
    """How a text is measured; two results with the same protocol can be compared.

    tokens: of the text, without BOS; scored: how many of them are predicted; context: tokens of a window;
    stride: tokens that a window scores; bos: whether each window starts with BOS; dtype: of the activations.
    """

    text_sha256: str
    text_bytes: int
    tokens: int
    scored: int
    windows: int
    context: int
    stride: int
    bos: bool
    dtype: str

    def __str__(self) -> str:
        bos = "BOS in front of each" if self.bos else "no BOS"
        text = f"{self.text_bytes} bytes, sha256 {self.text_sha256[:16]}"
        return (
            f"{self.scored} of {self.tokens} tokens ({text}), {self.windows} windows of context {self.context}, "
            f"stride {self.stride}, {bos}, {self.dtype}"
        )


@dataclass(frozen=True)
class Windows:
    """A text cut for scoring: rows of token ids, and how many tokens at the end of each row are scored."""

    ids: tuple[Tensor, ...]
    scored: tuple[int, ...]
    protocol: Protocol


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measures. nll: mean negative log likelihood, in nats a token."""

    protocol: Protocol
    nll: Estimate
    perplexity: Estimate
    bits_per_byte: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measures of a model against its base.

    base, model: perplexities; mean_kl, p99_kl: mean and 99th percentile over tokens of KL(base || model), in
    nats; top1: share of tokens for which both rank the same token first. window_kl: sums of KL over the
    scored tokens of each window, for paired comparisons.
    """

    protocol: Protocol
    base: Perplexity
    model: Perplexity
    mean_kl: Estimate
    p99_kl: Estimate
    top1: Estimate
    window_kl: tuple[float, ...]
    window_tokens: tuple[int, ...]


def cut(
    text: str,
    tokenizer: Any,
    *,
    context: int,
    stride: int | None = None,
    bos: bool | None = None,
    dtype: torch.dtype | str = "",
    max_tokens: int | None = None,
) -> Windows:
    """Tokenize a text and cut it into windows (see the head of this file).

    Args:
        text: the text; its hash and size are those of its UTF-8 bytes.
        tokenizer: a transformers tokenizer.
        context: tokens of a window, BOS included.
        stride: tokens that a window scores; None: context - 1, which is also the most.
        bos: put BOS in front of each window; None: if the tokenizer does so by itself.
        dtype: named in the protocol.
        max_tokens: use so many tokens of the text; size and hash are then those of the text they spell.

    Raises ValueError where the text is shorter than the context, or the stride doesn't fit.
    """
    if context < 2:
        raise ValueError(f"context is {context}, it must be at least 2")
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride is {stride}, it must be from 1 to {context - 1}, one less than the context")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if max_tokens is not None and len(tokens) > max_tokens:
        tokens = tokens[:max_tokens]
        text = tokenizer.decode(tokens, skip_special_tokens=False)
    if bos is None:
        bos = _adds_bos(tokenizer)
    elif bos and tokenizer.bos_token_id is None:
        raise ValueError("bos is asked for, but the tokenizer has no BOS token")
    body = context - 1 if bos else context
    if len(tokens) < body:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than a window of context {context} takes ({body}): "
            "give a longer text or a smaller context"
        )
    stream = torch.tensor(tokens)
    rows, scored = [], []
    start = 0 if bos else 1  # the first token that is scored
    for first in range(start, len(tokens), stride):
        stop = min(first + stride, len(tokens))
        row = stream[max(0, stop - body) : stop]
        if bos:
            row = torch.cat([torch.tensor([tokenizer.bos_token_id]), row])
        rows.append(row)
        scored.append(stop - first)
    data = text.encode()
    protocol = Protocol(
        text_sha256=hashlib.sha256(data).hexdigest(),
        text_bytes=len(data),
        tokens=len(tokens),
        scored=sum(scored),
        windows=len(rows),
        context=context,
        stride=stride,
        bos=bos,
        dtype=str(dtype).removeprefix("torch."),
    )
    return Windows(tuple(rows), tuple(scored), protocol)


def _adds_bos(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def default_context(model: nn.Module) -> int:
    """The context of a transformers model, at most DEFAULT_CONTEXT."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's activations: that of its first weights that are not planes."""
    for module in model.modules():
        if isinstance(module, QuantEmbedding):
            return module.dtype
        if not isinstance(module, PlaneModule):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    return parameter.dtype
    return torch.get_default_dtype()


def perplexity(model: nn.Module, windows: Windows, *, progress: Progress | None = None) -> Perplexity:
    """The perplexity of a causal language model: `model(ids).logits` are the logits of the next tokens.

    Windows are run one at a time; probabilities are float64 from logits in the model's dtype.

    Raises ValueError where the model gives NaN, or its embedding has no row for a token.
    """
    sums: list[float] = []
    done = 0
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        nll = [-_chosen(log_probs(part), targets) for part, targets in _scored_logits(model, ids, scored)]
        sums.append(float(torch.cat(nll).sum()))
        done += scored
        if progress is not None:
            progress(done, windows.protocol.scored)
    return _perplexity(sums, windows)


def compare(
    base: nn.Module, model: nn.Module, windows: Windows, *, progress: Progress | None = None
) -> Comparison:
    """Measure a model against its base, window by window, so that no more than one window's logits are held."""
    return compare_all(base, {"": model}, windows, progress=progress)[""]


def compare_all(
    base: nn.Module, models: Mapping[str, nn.Module], windows: Windows, *, progress: Progress | None = None
) -> dict[str, Comparison]:
    """`compare` for several models of one base, which is run once."""
    base_nll: list[float] = []
    tallies = {name: _Tally([], [], []) for name in models}
    done = 0
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        reference = list(_scored_logits(base, ids, scored))
        base_nll.append(sum(float(-_chosen(log_probs(part), targets).sum()) for part, targets in reference))
        for name, model in models.items():
            tallies[name].add(reference, list(_scored_logits(model, ids, scored)))
        done += scored
        if progress is not None:
            progress(done, windows.protocol.scored)
    first = _perplexity(base_nll, windows)
    return {name: tally.comparison(first, windows) for name, tally in tallies.items()}


@dataclass(frozen=True)
class _Tally:
    """What is kept of one model: per window, its nll, the KL of each token, the number of agreements."""

    nll: list[float]
    kl: list[Tensor]
    agreed: list[float]

    def add(self, base: Sequence[tuple[Tensor, Tensor]], model: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One window: pairs of logits and targets of the base and of the model, cut alike."""
        nll, kl, agreed = 0.0, [], 0
        for (base_logits, targets), (model_logits, _) in zip(base, model, strict=True):
            if base_logits.shape != model_logits.shape:
                raise ValueError(
                    f"the base has {base_logits.shape[-1]} tokens in its vocabulary and the model "
                    f"{model_logits.shape[-1]}: they must be the same"
                )
            log_p, log_q = log_probs(base_logits), log_probs(model_logits)
            nll += float(-_chosen(log_q, targets).sum())
            agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            kl.append(divergence(log_p, log_q))
        self.nll.append(nll)
        self.kl.append(torch.cat(kl))
        self.agreed.append(float(agreed))

    def comparison(self, base: Perplexity, windows: Windows) -> Comparison:
        sums = [float(kl.sum()) for kl in self.kl]
        return Comparison(
            protocol=windows.protocol,
            base=base,
            model=_perplexity(self.nll, windows),
            mean_kl=ratio(sums, windows.scored),
            p99_kl=percentile(self.kl, 0.99),
            top1=ratio(self.agreed, windows.scored),
            window_kl=tuple(sums),
            window_tokens=windows.scored,
        )


def kl_gap(better: Comparison, worse: Comparison) -> Estimate:
    """Mean KL of `worse` minus mean KL of `better`, with the standard error of the paired difference.

    Both must have been measured on the same windows: differences are taken window by window, so what makes a
    window hard for both cancels.
    """
    if (better.protocol, better.window_tokens) != (worse.protocol, worse.window_tokens):
        raise ValueError("the comparisons were made under different protocols, they must be the same")
    differences = [b - a for a, b in zip(better.window_kl, worse.window_kl, strict=True)]
    return ratio(differences, better.window_tokens)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Sum of `sums` over sum of `counts`, with the standard error of the ratio of independent windows."""
    total, n = sum(counts), len(counts)
    value = math.fsum(sums) / total
    if n < 2:
        return Estimate(value, None)
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(squares * n / (n - 1)) / total)


def percentile(windows: Sequence[Tensor], share: float) -> Estimate:
    """The `share` quantile of all values, with Woodruff's standard error over windows."""
    values = torch.cat(list(windows)).sort().values
    last = len(values) - 1

    def quantile(p: float) -> float:
        return float(values[min(last, max(0, math.ceil(p * len(values)) - 1))])

    value = quantile(share)
    below = ratio([float((window <= value).sum()) for window in windows], [len(window) for window in windows])
    if below.error is None:
        return Estimate(value, None)
    return Estimate(value, (quantile(share + below.error) - quantile(share - below.error)) / 2)


def _perplexity(sums: Sequence[float], windows: Windows) -> Perplexity:
    nll = ratio(sums, windows.scored)
    value = math.exp(min(nll.value, 700.0))
    error = None if nll.error is None else value * nll.error
    bits = math.fsum(sums) / math.log(2) / windows.protocol.text_bytes
    return Perplexity(windows.protocol, nll, Estimate(value, error), bits)


@torch.no_grad()
def _scored_logits(model: nn.Module, ids: Tensor, scored: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [part, vocabulary] that predict the last `scored` tokens of a window, in parts, each with its
    targets.
    """
    hf.check_tokens(model, ids)
    device = next(model.parameters()).device
    logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, -scored - 1 : -1]
    if logits.isnan().any():
        raise ValueError(
            f"the model gives NaN in its dtype, {logits.dtype}: another dtype, such as float32, may do"
        )
    targets = ids[-scored:].to(logits.device)
    size = max(1, _LOGIT_CHUNK // logits.shape[-1])
    yield from zip(logits.split(size), targets.split(size), strict=True)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row of log probabilities [rows, vocabulary], in nats; what p rules out adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.float64), dim=-1)


def _chosen(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets[:, None])[:, 0]
