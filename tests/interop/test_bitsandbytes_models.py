"""bitsandbytes through transformers: its checkpoints on bitfold's kernels, and bitfold's on its own.

On a CPU, bitsandbytes 0.50.2 multiplies 4-bit weights in bf16 whatever it is asked for, and rounds the inputs
of int8 layers to 8 bits. Logits are therefore compared through the weights that it decodes, in layers of plain
torch; its own products are held to what bf16 and 8 bits can do.
"""

from __future__ import annotations

import bitfold
import pytest

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install bitfold[interop]"
)
pytest.importorskip(
    "accelerate", reason="transformers loads bitsandbytes with accelerate: pip install accelerate"
)

import torch  # noqa: E402
from bitfold.check.examine import examine  # noqa: E402
from owners import assert_close, base, by_transformers, converted, logits, script  # noqa: E402, F401

OURS = ["nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq", "int8-channel"]
THEIRS = ["bnb-nf4", "bnb-nf4-nested", "bnb-fp4", "bnb-fp4-nested", "bnb-int8"]
OWN_PRODUCTS = 0.02  # of the largest logit


def decoded(model):
    """The model with torch's layers of the weights that bitsandbytes decodes, before any product has repacked
    them.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = module.weight.data.float() * scales[:, None] / 127
        else:
            continue
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight.data = weight.float()
        if module.bias is not None:
            plain.bias.data = module.bias.data.float()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return torch.nn.Module.float(model)  # transformers' own refuses


def compare(path) -> None:
    ours = logits(bitfold.load(path, dtype=torch.float32, activations="float"))
    assert_close(logits(decoded(by_transformers(path))), ours)
    own = logits(by_transformers(path))
    assert (own - ours).abs().max() <= OWN_PRODUCTS * ours.abs().max()


@pytest.mark.parametrize("recipe", OURS)
def test_they_load_ours(recipe, base, tmp_path):  # noqa: F811
    compare(converted(base, tmp_path / "m", recipe, "bitsandbytes"))


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_theirs(name, base, tmp_path):  # noqa: F811
    script("bitsandbytes_models").main(str(base), str(tmp_path), name)
    compare(tmp_path / name)
    assert examine(tmp_path / name).sound
