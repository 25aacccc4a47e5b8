"""What a number becomes, how numbers are rounded, what names mean."""

from __future__ import annotations

import dataclasses
import math
import re
import struct

import numpy as np
import oracle
import oracle_encode
import pytest
import torch
from bitfold import FORMATS, RECIPES
from bitfold.explain import gguf
from bitfold.explain.names import explain_name
from bitfold.explain.number import explain_number
from bitfold.explain.walk import walk
from bitfold.gguf import example, mixes
from bitfold.gguf.assign import assign
from command import call, call_json

NUMBERS = [3.14159265, -0.73, 1.0, 0.0, 1e-3, -300.0, 448.0, 65504.0, 2.0**-149]
TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
}


def by_format(number: float, absmax: float | None = None) -> dict:
    return {one.format: one for one in explain_number(number, absmax)}


# ---- one number ----


def test_every_format_is_there():
    alone = [f for f in FORMATS if FORMATS[f].grid != "block"]  # a block is no format of one number
    assert list(by_format(1.0)) == [
        "fp32",
        *sorted(alone, key=lambda f: FORMATS[f].grid in ("integer", "codebook")),
    ]


@pytest.mark.parametrize("number", NUMBERS)
def test_floats_are_those_of_torch(number):
    for name, dtype in TORCH.items():
        one = by_format(number)[name]
        limits = torch.finfo(dtype)
        expected = torch.tensor(max(-limits.max, min(limits.max, number)), dtype=torch.float32).to(dtype)
        assert one.value == expected.float().item(), name
        assert one.error == one.value - number
        assert (one.smallest, one.largest) == (limits.smallest_normal * limits.eps, limits.max), name
        width = {32: torch.int32, 16: torch.int16, 8: torch.uint8}[limits.bits]
        pattern = int(expected.view(width)) & ((1 << limits.bits) - 1)
        assert (one.code, one.bits.replace(" ", "")) == (pattern, f"{pattern:0{limits.bits}b}"), name


def test_bits_of_pi():
    """Worked out by hand: 3.14159265 = 1.5707963 * 2^1; a bias of 15 makes the exponent 16, one of 127, 128."""
    found = {name: one.bits for name, one in by_format(3.14159265).items()}
    pattern = f"{struct.unpack('>I', struct.pack('>f', 3.14159265))[0]:032b}"
    assert found["fp32"] == f"{pattern[0]} {pattern[1:9]} {pattern[9:]}"
    assert found["fp16"] == "0 10000 1001001000"  # 1 + 584 / 1024
    assert found["bf16"] == "0 10000000 1001001"
    assert found["fp8-e4m3"] == "0 1000 101"  # 1 + 5 / 8: 3.25
    assert found["fp8-e5m2"] == "0 10000 10"  # 1 + 2 / 4: 3


@pytest.mark.parametrize("number", [3.14159265, -0.73, 1e-3, 100.0, -65504.0])
def test_spacing_is_that_of_the_binary_exponent(number):
    for name, dtype in TORCH.items():
        one, limits = by_format(number)[name], torch.finfo(dtype)
        if abs(one.value) == limits.max or one.note:
            continue
        exponent = (
            max(math.floor(math.log2(abs(one.value))), math.log2(limits.smallest_normal))
            if one.value
            else None
        )
        wanted = limits.eps * 2.0**exponent if exponent is not None else limits.smallest_normal * limits.eps
        assert one.spacing == wanted, name
    half = by_format(number)["fp16"]
    assert half.spacing == abs(float(np.spacing(np.float16(half.value)))) or abs(half.value) == 65504


@pytest.mark.parametrize(
    ("number", "absmax"), [(3.14159265, 4.0), (-0.73, 2.01), (0.001, 1.0), (0.0, 1.0), (2.0, 2.0)]
)
def test_codes_are_those_of_the_specification(number, absmax):
    weight = np.array([[number, absmax]], np.float32)
    for name, one in by_format(number, absmax).items():
        if one.scale is None:
            continue
        planes = oracle_encode.encode(weight, one.used)
        logical = oracle.decode(planes, one.used, 1, 2)
        assert np.float32(one.value) == logical[0, 0], name
        assert np.float32(one.scale) == planes["scales"].view(np.float32)[0, 0], name
        assert abs(one.error) <= one.spacing or one.format == "int2"
        assert one.largest == pytest.approx(absmax, rel=1e-6), name


def test_scale_of_a_single_number():
    int4 = by_format(3.14159265)["int4"]
    assert (int4.code, int4.bits) == (5, "1101")  # 3.14159265 / (4 / 7) = 5.498, stored as 5 + 8
    assert int4.scale == pytest.approx(4 / 7, rel=1e-7)
    assert by_format(-0.3)["nf4"].scale == 0.5


def test_what_does_not_fit_is_said():
    found = by_format(-1e5)
    assert (found["fp16"].value, found["fp16"].note) == (
        -65504.0,
        "beyond the largest number: stored as the largest",
    )
    assert found["fp8-e4m3"].value == -448.0
    assert by_format(1e-9)["fp16"].note == "too small: stored as 0"
    for number, absmax, words in (
        (math.inf, None, "finite"),
        (1e39, None, "32-bit"),
        (3.0, 2.0, "absmax is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            explain_number(number, absmax)


def test_command_on_a_number(capsys):
    data = call_json(capsys, "explain", "3.14159265")
    assert [one["format"] for one in data["formats"]] == list(by_format(3.14159265))
    code, out, _ = call(capsys, "explain", "3.14159265")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "0 10000 1001001000" in out
    assert "largest weight is 4" in out
    assert call_json(capsys, "explain", "-0.5", "--absmax", "2")["formats"][-1]["scale"] == 2
    assert "stored as the largest" in call(capsys, "explain", "-1e5")[1]


# ---- several numbers ----

FOUR = [0.73, -1.24, 2.01, -0.15]


def test_the_plain_scale_clamps():
    """(2.01 + 1.24) / 255 = 0.0127451: 57.28, -97.29, 157.71 and -11.77, and there is no code above 127."""
    plain = walk(FOUR, 8)[0]
    assert [step.code for step in plain.steps] == [57, -97, 127, -12]
    assert [step.rounded for step in plain.steps] == [57, -97, 158, -12]
    assert [step.decoded for step in plain.steps] == pytest.approx(
        [c * 3.25 / 255 for c in (57, -97, 127, -12)]
    )
    assert plain.largest_error == pytest.approx(2.01 - 127 * 3.25 / 255)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_other_schemes_are_the_specification(bits):
    weight = np.array([FOUR], np.float32)
    _, asymmetric, symmetric, grouped = walk(FOUR, bits, 2)
    for scheme, format, rows in (
        (asymmetric, f"int{bits}-tensor-asym-sfp32", weight),
        (symmetric, f"int{bits}-tensor-sfp32", weight),
        (grouped, f"int{bits}-channel-sfp32", weight.reshape(2, 2)),
    ):
        expected = oracle.decode(oracle_encode.encode(rows, format), format, *rows.shape).reshape(-1)
        assert [np.float32(step.decoded) for step in scheme.steps] == expected.tolist()
        for step in scheme.steps:
            assert step.decoded == pytest.approx(
                (step.code - (step.zero or 0)) * step.scale, rel=1e-6, abs=1e-12
            )
            assert scheme.lowest <= step.code <= scheme.highest
            assert step.error == step.decoded - step.number
    assert len({step.scale for step in grouped.steps}) == 2


def test_zero_point_and_groups_are_nearer_than_the_plain_scale():
    plain, asymmetric, symmetric, grouped = (scheme.largest_error for scheme in walk(FOUR, 8))
    assert asymmetric < symmetric < plain
    assert grouped <= symmetric


def test_command_on_numbers(capsys):
    """Negative numbers are arguments, wherever they stand."""
    arguments = ("explain", "0.73", "-1.24", "2.01", "-0.15", "--bits", "8")
    data = call_json(capsys, *arguments)
    assert data["numbers"] == FOUR
    assert [step["code"] for step in data["schemes"][0]["steps"]] == [57, -97, 127, -12]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "127 (clamped from 158)" in out
    assert call_json(capsys, "explain", "-1", "-2", "--bits", "4", "--group", "1")["bits"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["1", "2", "--bits", "5"], "bits is 5; it must be one of 8, 4, 3, 2"),
        (["1", "1"], "not all the same"),
        (["1", "nan"], "finite"),
        (["1", "2", "--group", "-1"], "group is -1"),
        (["1", "int4"], "'int4' is no number"),
        (["1", "--bitz", "4"], "--bitz is no option"),
        (["inf"], "the number is inf"),
        (["q4_k_n"], "did you mean q4_k_"),
        (["int4-g128-foo"], "foo"),
        (["int44"], "did you mean int4"),
        (["model.gguf"], "no type in its name"),
        (["nowhere.toml"], "can't be read"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, words):
    code, out, err = call(capsys, "explain", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


# ---- names ----


def test_every_preset_and_family_has_a_meaning():
    for name in (*RECIPES, *FORMATS, "int4-g128-asym", "nf4-b64-dq", "int8-tensor"):
        for meaning in explain_name(name):
            labels = [label for label, _ in meaning.facts]
            assert "use" in labels, name
            assert all(text for _, text in meaning.facts)


def test_a_recipe_is_followed_by_its_formats(tmp_path):
    assert [(m.kind, m.name) for m in explain_name("int4-mixed")] == [
        ("recipe", "int4-mixed"),
        ("format", "int8-channel"),
        ("format", "int4-g128"),
    ]
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nmatch = "*.mlp.*"\nformat = "nf4"\n')
    mine, nf4 = explain_name(str(path))
    assert ("rule", "'*.mlp.*' gets nf4-b64") in mine.facts
    assert nf4.bits_per_weight == 4.5


def test_format_facts():
    (meaning,) = explain_name("int4-g64-asym")
    facts = dict(meaning.facts)
    assert meaning.bits_per_weight == 4 + 16 / 64 + 4 / 64
    assert facts["scale"] == "one in fp16 for 64 consecutive weights of a row"
    assert facts["levels"].startswith("0 to 15")
    assert dict(explain_name("int8")[1].facts)["scale"] == "one in fp16 for each row"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("q4_k_m", "Q4_K_M"),
        ("Q4_K", "Q4_K_M"),
        ("llama-2-7b.Q4_K_M.gguf", "Q4_K_M"),
        ("/models/Some-Model-8B-Instruct-IQ4_XS-00001-of-00002.gguf", "IQ4_XS"),
        ("mistral-7b-v0.1.q5_0.GGUF", "Q5_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4_MOE"),
        ("model-f16.gguf", "F16"),
    ],
)
def test_gguf_names(text, name):
    (meaning,) = explain_name(text)
    assert (meaning.kind, meaning.name) == ("GGUF", name)
    assert dict(meaning.facts)["bitfold"].endswith(f"--recipe {name.lower()}")


@pytest.mark.parametrize("text", ["q4_k", "q8_0", "iq4_xs"])
def test_a_format_and_the_file_type_of_its_name(text):
    assert [(meaning.kind, meaning.name) for meaning in explain_name(text)] == [
        ("format", text),
        ("GGUF", {"q4_k": "Q4_K_M"}.get(text, text.upper())),
    ]


def test_gguf_is_not_mistaken_for_a_preset():
    assert explain_name("fp16")[0].kind == "recipe"
    assert gguf.find("int4-g128") is None
    assert gguf.find("qwen-q4.gguf") is None


@pytest.mark.parametrize("mix", mixes.MIXES.values(), ids=lambda mix: mix.name)
def test_gguf_exceptions_are_those_of_the_rules(mix):
    """Whatever type a tensor of some model gets beside the file type's own is named, with its role."""
    text = "; ".join(gguf.exceptions(mix))
    for facts in (example.FACTS, dataclasses.replace(example.FACTS, kv_heads=8, experts=8)):
        for choice in assign(mix, facts, example.items()):
            if choice.quantized and choice.after != mix.default and mix.name != "MXFP4_MOE":
                role = mixes.role_of(choice.name)
                assert re.search(rf"{role}\b[^;]* {choice.after}\b", text), (choice.name, choice.after, text)


def test_gguf_blocks_are_described():
    assert list(gguf.STRUCTURES) == [*mixes.BLOCKS, *mixes.FLOATS]


def test_command_on_names(capsys):
    data = call_json(capsys, "explain", "q4_k_m")
    assert data["meanings"][0]["name"] == "Q4_K_M"
    code, out, _ = call(capsys, "explain", "int4-g128")
    assert code == 0
    assert "4.125 bits per weight" in out
    assert max(map(len, out.splitlines())) <= 80
