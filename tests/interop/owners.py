"""What the tests with the owners of other formats share: a small trained model, its text, logits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import bitfold
import pytest
import torch
from bitfold.convert import convert_checkpoint

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "examples" / "demo"
TEXT = DEMO / "heldout.txt"
CLOSE = 1e-3  # of the largest logit
IDS = torch.randint(3, 1000, (2, 48), generator=torch.Generator().manual_seed(1))


def script(name: str) -> ModuleType:
    """One of the scripts that make checkpoints (make/)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / "make" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The first two blocks of the demo model, unquantized."""
    if not DEMO.is_dir():
        pytest.skip("the demo model is not beside the tests")
    path = tmp_path_factory.mktemp("base") / "model"
    script("base").main(str(DEMO / "model"), str(path))
    return path


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


def by_transformers(path: Path, **options):
    """The checkpoint on the owner's own code, through transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **options)


def converted(base: Path, target: Path, recipe: str, to: str) -> Path:
    """The base quantized by bitfold and converted, every tensor exactly."""
    quantized = target.with_name(f"{target.name}-bitfold")
    bitfold.quantize_checkpoint(base, quantized, recipe)
    assert convert_checkpoint(quantized, target, to=to).exact
    return target


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    error = ((one - other).abs().max() / other.abs().max()).item()
    assert error <= CLOSE, f"logits differ by {error:.3g} of the largest"
