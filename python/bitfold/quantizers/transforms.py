"""Changes of a model's weights that leave what it computes alone, and make them easier to round.

Where the outputs of one matrix (or of a norm) are the inputs of others, a channel may be divided by any s > 0 on one
side and multiplied on the other: (W diag(s)) (x / s) = W x. AWQ and SmoothQuant choose s.

What is divided is rounded to the dtype it is stored in. Gemma's norms, which are stored as the distance from 1, lose
most of their digits where 1 + w becomes small. So a norm is divided first, and the scales are what division really did:
`divide_norm` returns them, and the columns are multiplied by those.

A whole residual stream may be rotated, x Q with Q Q^T = 1, where only norms without weights and matrices read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STRIP = 1 << 20  # numbers of a matrix that are held in float64 at a time


def _strips(n: int, k: int) -> Iterator[slice]:
    """The rows of a matrix [n, k], some at a time."""
    rows = max(1, _STRIP // max(1, k))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def check_scales(scales: Tensor, channels: int) -> Tensor:
    """The scales in float64. Raises ValueError unless they are `channels` positive finite numbers."""
    if scales.shape != (channels,):
        raise ValueError(
            f"scales has shape {list(scales.shape)}; it must be [{channels}], one for each channel"
        )
    wrong = ~((scales > 0) & scales.isfinite())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"scales[{at}] is {scales[at].item()}; it must be positive and finite")
    return scales.to(torch.float64)


def divide_norm(weight: Tensor, scales: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """A norm that multiplies by `offset + weight`, divided by `scales`.

    weight: [c], of any floating dtype; scales: [c]; offset: 1 for Gemma's norms. Returns the new weight, in the dtype
    of `weight`, and the scales by which it really is smaller (float64 [c]): these and no others belong to the columns.
    Channels that the norm silences keep the scales that were asked for.

    Raises ValueError where scales are not positive and finite, or divide a channel to zero.
    """
    scales = check_scales(scales, len(weight))
    before = weight.to(torch.float64) + offset
    divided = (before / scales - offset).to(weight.dtype)
    after = divided.to(torch.float64) + offset
    lost = (before != 0) & ((after == 0) | ~after.isfinite() | (after.sign() != before.sign()))
    if lost.any():
        at = int(lost.nonzero()[0])
        raise ValueError(
            f"scales[{at}] is {scales[at].item():.4g}, which {weight.dtype} can't divide the norm's "
            f"{before[at].item():.4g} by; it must be nearer to 1"
        )
    return divided, torch.where(before == 0, scales, before / after)


def divide_rows(tensor: Tensor, scales: Tensor, rows: slice = slice(None)) -> Tensor:
    """A weight [n, k] or a bias [n] whose rows `rows` are divided by `scales`; the others are as they were.

    Raises ValueError where scales are not positive and finite, one for each of the rows.
    """
    divided = tensor.clone()
    part = divided[rows]
    scales = check_scales(scales, len(part))
    for some in _strips(len(part), part[0].numel() if len(part) else 1):
        by = scales[some, None] if tensor.dim() == 2 else scales[some]
        part[some] = part[some].to(torch.float64) / by
    return divided


def multiply_columns(weight: Tensor, scales: Tensor) -> Tensor:
    """weight [n, k] whose columns are multiplied by `scales` [k], in its dtype.

    Raises ValueError where scales are not positive and finite.
    """
    n, k = weight.shape
    scales = check_scales(scales, k)
    multiplied = torch.empty_like(weight)
    for some in _strips(n, k):
        multiplied[some] = weight[some].to(torch.float64) * scales
    return multiplied


@dataclass(frozen=True)
class SmoothOptions:
    """SmoothQuant's. alpha: how much of the spread of the inputs goes into the weights, 0 to 1; then: "round" to
    nearest, or "gptq"."""

    alpha: float = 0.5
    then: str = "round"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be from 0 to 1")
        if self.then not in ("round", "gptq"):
            raise ValueError(f"then is {self.then!r}; it must be 'round' or 'gptq'")


def smooth_scales(
    largest: Tensor, weights: Sequence[Tensor], alpha: float = 0.5, smallest: float = 1e-5
) -> Tensor:
    """SmoothQuant's scales (Xiao et al. 2022, equation 4): s = max|x|^alpha / max|w|^(1 - alpha), channel by channel.

    largest: [k], the largest absolute input of each channel; weights: [n, k], those that share the input; alpha: how
    much of the spread goes from the inputs into the weights, 0 to 1; smallest: maxima are at least so large. Returns
    float64 [k], for the columns; inputs are divided by it.

    Raises ValueError where alpha is out of range, there are no weights, or an input is negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 to 1")
    if not weights:
        raise ValueError("weights is empty; it must have the matrices that share the input")
    if not (largest.isfinite() & (largest >= 0)).all():
        raise ValueError(
            "largest has a negative or not finite entry; it must hold the largest absolute inputs"
        )
    columns = torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0)
    x, w = (side.to(torch.float64).clamp(min=smallest) for side in (largest, columns))
    return x**alpha / w ** (1 - alpha)


# ---- rotations ----


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q = diag(signs) (I_blocks x H_power x H_small) / sqrt(power * small), orthogonal; x is the Kronecker product.

    Where size = m 2^p with an m of which a Hadamard matrix is built here (m = 1, or Paley's: q + 1 for a prime q = 3
    mod 4, 2 (q + 1) for a prime q = 1 mod 4), all columns are mixed. Otherwise Q is block-diagonal, with blocks of the
    largest power of two that divides size.
    """

    signs: Tensor  # float64 [size], 1 or -1
    blocks: int
    power: int
    small: Tensor  # float64 [m, m], entries 1 and -1

    def apply(self, x: Tensor) -> Tensor:
        """x Q for x [..., size], computed in float64, in the dtype of x."""
        y = (x.to(torch.float64) * self.signs).unflatten(-1, (self.blocks, self.power, len(self.small)))
        y = y @ self.small
        return (_walsh(y) / self._norm()).flatten(-3).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        """x Q^T: what `apply` made of x becomes x again."""
        y = x.to(torch.float64).unflatten(-1, (self.blocks, self.power, len(self.small)))
        y = _walsh(y @ self.small.T) / self._norm()
        return (y.flatten(-3) * self.signs).to(x.dtype)

    def _norm(self) -> float:
        return math.sqrt(self.power * len(self.small))


def hadamard_rotation(size: int, seed: int) -> Rotation:
    """A Hadamard matrix with random signs (Ashkboos et al. 2024, QuaRot): it spreads outliers over all channels.

    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    power = size & -size  # the largest power of two that divides it
    small, order = torch.ones(1, 1, dtype=torch.float64), size // power
    while order > 1 and order <= size:
        if order % 4 == 0 and (found := _paley(order)) is not None:
            return Rotation(signs, 1, size // order, found)
        if size % (2 * order):
            return Rotation(signs, size // power, power, small)
        order *= 2
    return Rotation(signs, 1, power, small)


def _walsh(y: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix times the second to last dimension, whose size is a power of two."""
    rows, columns = y.shape[-2:]
    half = 1
    while half < rows:
        pair = y.unflatten(-2, (rows // (2 * half), 2, half))
        top, bottom = pair[..., 0, :, :], pair[..., 1, :, :]
        y = torch.stack([top + bottom, top - bottom], dim=-3).reshape(*y.shape[:-2], rows, columns)
        half *= 2
    return y


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix (1933) of a prime q, float64 [order, order]; None where he has none."""
    q, kind = (order - 1, 1) if _is_prime(order - 1) else (order // 2 - 1, 2)
    if not _is_prime(q) or q % 4 != (3 if kind == 1 else 1):
        return None
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor(
        [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64
    )
    index = torch.arange(q)
    core = character[(index[:, None] - index) % q]  # Jacobsthal's matrix
    edge = torch.ones(q + 1, q + 1, dtype=torch.float64)
    edge[0, 0] = 0
    edge[1:, 1:] = core
    if kind == 1:
        edge[1:, 0] = -1
        return edge + torch.eye(order, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(edge, pair) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))
