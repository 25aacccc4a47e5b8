"""What `import bitfold` gives, and what it does not import."""

import subprocess
import sys

import bitfold
import pytest
from libraries import KV_CACHE

# Modules that cost seconds to import: not ours to load before they are needed.
HEAVY = (
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "typer",
    "rich",
    "numpy.f2py",
)

NAMES = [name for name in bitfold.__all__ if KV_CACHE or name != "QuantizedCache"]


def test_import_is_light():
    code = f"""
import sys, torch
before = set(sys.modules)
import bitfold
print(*[name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_every_public_name_is_there():
    assert set(bitfold.__all__) <= set(dir(bitfold))
    for name in NAMES:
        assert getattr(bitfold, name) is not None


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = bitfold.quantise


def test_a_library_that_is_too_old_is_named():
    """transformers 5.20.2, the last one for Python 3.10, lacks what the KV cache is made of."""
    code = """
import bitfold, transformers
transformers.__version__ = "5.20.2"
vars(transformers.cache_utils).pop("DummyLayer", None)
try:
    bitfold.QuantizedCache
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a quantized KV cache needs transformers 5.23 or newer and below 6, not 5.20.2" in result.stdout


def test_public_functions_and_classes_are_documented():
    for name in NAMES:
        value = getattr(bitfold, name)
        if callable(value):
            assert value.__doc__, name
