"""What `import bitfold` gives, and what it does not import."""

import subprocess
import sys

import bitfold
import pytest

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
    for name in bitfold.__all__:
        assert getattr(bitfold, name) is not None


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = bitfold.quantise


def test_public_functions_and_classes_are_documented():
    for name in bitfold.__all__:
        value = getattr(bitfold, name)
        if callable(value):
            assert value.__doc__, name
