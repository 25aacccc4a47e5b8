"""python base.py MODEL OUT: the first two decoder blocks of a Llama, as a model of its own to quantize.

Trained weights in matrices of a few hundred columns, so that every owner's library makes a checkpoint of it in
seconds.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYERS = 2


def main(source: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
