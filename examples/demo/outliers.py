"""The demo model with outlier features: a few hidden channels become many times larger than the others, and it computes
what it computed.

    python examples/demo/outliers.py OUT          the model as a directory

In each norm in front of linear layers the weights of CHANNELS are multiplied by FACTOR, and the columns of the layers
that read them are divided by it. As FACTOR is a power of two, not a bit of any output changes in float32. Large
language models have such channels by themselves (Dettmers et al. 2022); int8 with one step for a row leaves the other
channels hardly a value there. `bench/outliers.py` chooses CHANNELS and FACTOR, and measures what 8 bits lose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitfold import hf
from bitfold.calibration.mappings import folds
from torch import nn

MODEL = Path(__file__).resolve().parent / "model"
CHANNELS, FACTOR = (225, 148, 145, 244), 64.0
QUIET = {"mlp.down_proj": 64.0, "self_attn.o_proj": 4.0}
"""What the inputs of these layers are divided by to lie below 6, which few of them do in the demo model."""


def widen(model: Any, channels: Sequence[int], factor: float) -> None:
    """Make hidden channels of a transformers model `factor` times larger behind each norm, in place; the layers that
    read them make up for it."""
    for block in model.model.layers:
        for fold in folds(block, model.config):
            if not isinstance(fold.source, nn.Linear):
                scales = torch.ones(fold.channels)
                scales[list(channels)] = 1 / factor
                fold.apply(scales)


def quiet(model: Any) -> None:
    """Divide the inputs of QUIET, all columns alike, in place: int8 with a step for each row can't tell, and the
    threshold of outliers is above them."""
    for block in model.model.layers:
        for fold in folds(block, model.config):
            if fold.feed.targets[0] in QUIET:
                fold.apply(torch.full((fold.channels,), QUIET[fold.feed.targets[0]]))


def write(target: Path, *, silent: bool = False) -> Path:
    """The model in float32, with its tokenizer; silent: `quiet` too."""
    model: Any = hf.load_causal_lm(MODEL, dtype=torch.float32)
    widen(model, CHANNELS, FACTOR)
    if silent:
        quiet(model)
    model.save_pretrained(target)
    hf.load_tokenizer(MODEL).save_pretrained(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument(
        "--quiet", action="store_true", help="the inputs of output and down projections below 6, too"
    )
    args = parser.parse_args()
    hf.require_transformers().utils.logging.disable_progress_bar()
    print(write(args.out, silent=args.quiet))


if __name__ == "__main__":
    main()
