"""The page of formats: what it is given, and that clicks on it give the numbers that numpy and the library give."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import bitfold
import browser as chromium
import numpy as np
import oracle
import oracle_floats
import oracle_outliers
import pytest
import torch
from bitfold.cli.app import run
from bitfold.explore import tables as explore_tables
from bitfold.explore.page import render
from bitfold.explore.tables import CHANNEL, COUNT, GROUPS, OUTLIERS, SCALED, example, tables
from browser import browser  # noqa: F401
from tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("explore") / "explore.html"
    path.write_text(render(), encoding="utf-8")
    return path


# ---- what the page is given ----


def test_values_are_those_of_the_specification():
    for entry in tables()["formats"]:
        codes = np.arange(2 ** entry["bits"], dtype=np.uint8)
        wanted = oracle.parse(entry["name"]).grid.value(codes, None)
        given = [np.nan if value is None else float(value) for value in entry["values"]]
        np.testing.assert_array_equal(np.float32(given), wanted, err_msg=entry["name"])


def test_layouts_are_those_of_numpy_and_ieee():
    layouts = {entry["name"]: entry for entry in tables()["floats"]}
    half, single = np.finfo(np.float16), np.finfo(np.float32)
    for name, info in (("fp16", half), ("fp32", single)):
        assert layouts[name]["mantissa"] == info.nmant
        assert layouts[name]["exponent"] == info.iexp
        assert layouts[name]["bias"] == info.maxexp - 1
    assert {k: layouts["bf16"][k] for k in ("bits", "exponent", "bias")} == {
        "bits": 16,
        "exponent": 8,
        "bias": 127,
    }
    assert (layouts["fp8-e4m3"]["exponent"], layouts["fp8-e4m3"]["mantissa"]) == (4, 3)
    assert (layouts["fp8-e5m2"]["exponent"], layouts["fp8-e5m2"]["mantissa"]) == (5, 2)


def test_bits_per_weight_are_those_of_the_encoded_weights():
    weights = example()[None]
    for entry in tables()["formats"]:
        for group, cost in entry["groups"].items():
            q = bitfold.encode(weights, cost["format"])
            assert cost["bits"] == pytest.approx(q.bits_per_weight)
            assert (len(q.planes["scales"].flatten()) == COUNT // group) or group == COUNT


def test_the_page_is_one_file():
    html = render()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", html)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    assert len(html) < 200_000
    assert "$" not in re.sub(r"\$\{", "", html)  # every place of the template was filled


def test_the_command(capsys, tmp_path):
    path = tmp_path / "explore.html"
    assert run(["explore", "-o", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == str(path)
    assert data["bytes"] == path.stat().st_size
    assert data["tables"]["weights"] == tables()["weights"]
    assert run(["explore", "-o", str(tmp_path / "no" / "x.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the page in a browser ----


@pytest.mark.parametrize("width", chromium.WIDTHS)
@pytest.mark.parametrize("theme", chromium.THEMES)
def test_the_page_loads_nothing_and_fits(browser, page, width, theme):  # noqa: F811
    chromium.visit(browser, page, width, theme)
    assert chromium.console(browser) == []
    assert chromium.requests(browser) == []
    assert chromium.overflowing(browser) <= 0
    assert (sum(chromium.background(browser)) > 3 * 128) == (theme == "light")
    assert chromium.covering_labels(browser, ".picture svg") == []
    browser.find_element("id", "outliers-on").click()
    browser.find_element("id", "line-zoom").send_keys("\ue014\ue014\ue014")
    assert chromium.covering_labels(browser, ".picture svg") == []
    assert chromium.console(browser) == []


def test_the_switch_overrides_the_system(browser, page):  # noqa: F811
    chromium.visit(browser, page, theme="light")
    browser.find_element("id", "theme-dark").click()
    assert sum(chromium.background(browser)) < 3 * 128
    browser.find_element("id", "theme-light").click()
    assert sum(chromium.background(browser)) > 3 * 128


def choose(browser, select: str, value: str) -> None:  # noqa: F811
    browser.find_element("css selector", f"#{select} option[value='{value}']").click()


def type_number(browser, field: str, text: str) -> None:  # noqa: F811
    browser.find_element("id", field).clear()
    browser.find_element("id", field).send_keys(text)


def bits(browser) -> str:  # noqa: F811
    return browser.execute_script("return document.getElementById('bits-row').textContent")


def shown(browser) -> float:  # noqa: F811
    text = browser.find_element("id", "bits-value").get_attribute("data-value")
    return float(text.replace("Infinity", "inf").replace("NaN", "nan"))


DECODERS = {
    "fp32": lambda code: np.uint32(code).view(np.float32),
    "fp16": lambda code: np.uint16(code).view(np.float16),
    "bf16": lambda code: np.uint32(code << 16).view(np.float32),
    "fp8-e4m3": lambda code: oracle_floats.E4M3.value(np.array([code]))[0],
    "fp8-e5m2": lambda code: oracle_floats.E5M2.value(np.array([code]))[0],
    "int8": lambda code: code - 128,
    "int4": lambda code: code - 8,
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_click_turns_a_bit_over(browser, page, name):  # noqa: F811
    chromium.visit(browser, page)
    choose(browser, "bits-format", name)
    buttons = browser.find_elements("css selector", "#bits-row button")
    step = max(1, len(buttons) // 4)
    for button in buttons[::step]:
        before = bits(browser)
        button.click()
        after = bits(browser)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        wanted = float(DECODERS[name](int(after, 2)))
        assert shown(browser) == wanted or (np.isnan(shown(browser)) and np.isnan(wanted))
        pressed = button.get_attribute("aria-pressed")
        assert pressed == ("true" if button.text == "1" else "false")


def test_codebook_bits_are_the_library_s_table(browser, page):  # noqa: F811
    chromium.visit(browser, page)
    for name in ("nf4", "fp4"):
        choose(browser, "bits-format", name)
        codes = torch.arange(16, dtype=torch.uint8)[None].repeat(1, 4)
        q = bitfold.pack(codes, torch.ones(1, 1), format=f"{name}-b64")
        for button in browser.find_elements("css selector", "#bits-row button"):
            button.click()
            assert shown(browser) == q.decode()[0, int(bits(browser), 2)].item()


@pytest.mark.parametrize("text", ["0.7", "-1e-7", "65504", "3.14159265", "0"])
def test_a_typed_number_shows_its_bits(browser, page, text):  # noqa: F811
    chromium.visit(browser, page)
    for name, dtype, width in (("fp32", np.float32, "032b"), ("fp16", np.float16, "016b")):
        choose(browser, "bits-format", name)
        type_number(browser, "bits-number", text)
        wanted = dtype(float(text))
        assert bits(browser) == format(int(wanted.view(f"u{wanted.itemsize}")), width)
        assert shown(browser) == float(wanted)
    choose(browser, "bits-format", "fp8-e4m3")
    type_number(browser, "bits-number", text)
    wanted = oracle_floats.E4M3.value(oracle_floats.E4M3.code(np.array([np.float32(text)]), saturate=True))[0]
    assert shown(browser) == oracle_floats.E4M3.value(np.array([int(bits(browser), 2)]))[0] == wanted


def test_bits_by_keyboard(browser, page):  # noqa: F811
    chromium.visit(browser, page)
    choose(browser, "bits-format", "fp16")
    type_number(browser, "bits-number", "1")
    first = browser.find_element("css selector", "#bits-row button")
    first.send_keys(" ")
    assert shown(browser) == -1.0
    first.send_keys("\ue014")  # right arrow
    focused = browser.switch_to.active_element
    assert focused.get_attribute("data-bit") == "14"
    focused.send_keys("1")
    assert bits(browser)[:2] == "11"
    browser.switch_to.active_element.send_keys("\ue012")  # left arrow
    browser.switch_to.active_element.send_keys("0")
    assert bits(browser)[:2] == "01"


def test_codes_of_the_16_bit_floats(browser, page):  # noqa: F811
    chromium.visit(browser, page)
    script = """
        const layout = layouts.get(arguments[0]);
        return arguments[1].map((code) => {
          const value = floatValue(layout, code);
          return [Number.isFinite(value) ? value : String(value), floatCode(layout, value)];
        });
    """
    codes = np.unique(
        np.r_[np.arange(0, 65536, 37), np.arange(0, 65536, 128), np.arange(127, 65536, 128)]
    ).astype(np.uint32)
    for name, values in (
        ("fp16", codes.astype(np.uint16).view(np.float16).astype(np.float64)),
        ("bf16", np.where(codes & 0x7FFF > 0x7F80, np.nan, (codes << 16).view(np.float32))),
    ):
        rows = browser.execute_script(script, name, codes.tolist())
        given = np.array([float(str(value).replace("Infinity", "inf")) for value, _ in rows])
        np.testing.assert_array_equal(given, values)
        back = np.array([code for _, code in rows])
        np.testing.assert_array_equal(back[~np.isnan(values)], codes[~np.isnan(values)])


def test_rounding_to_floats(browser, page, rng):  # noqa: F811
    chromium.visit(browser, page)
    numbers = np.concatenate(
        [rng.normal(size=400) * 10.0 ** rng.integers(-9, 6, 400), [2049, 2051, 65519.9, 65520, 6e-8]]
    )
    script = "const l = layouts.get(arguments[0]); return arguments[1].map((x) => String(roundToFloat(l, x)))"
    with np.errstate(over="ignore"):
        rounded = {"fp16": numbers.astype(np.float16), "fp32": numbers.astype(np.float32)}
    for name, wanted in rounded.items():
        given = browser.execute_script(script, name, numbers.tolist())
        np.testing.assert_array_equal([float(x.replace("Infinity", "inf")) for x in given], wanted)


def weights_with(size: float | None) -> torch.Tensor:
    """The example's weights, with outliers of so many sigmas."""
    weights = example()
    sigma = tables()["sigma"]
    for i, place in enumerate(OUTLIERS if size is not None else ()):
        weights[place] = (-1) ** i * size * sigma
    return weights


def relative(weights: torch.Tensor, decoded: torch.Tensor) -> float:
    w, d = weights.double().numpy(), decoded.double().numpy()
    return float(np.linalg.norm(d - w) / np.linalg.norm(w))


def test_the_page_encodes_as_the_library(browser, page):  # noqa: F811
    """Every weight, under every size of groups, with outliers and without: the same values."""
    chromium.visit(browser, page)
    script = """
        const [name, size] = arguments;
        Object.assign(example, { on: size !== null, size });
        return tables.groups.map((group) => [...quantize(formats.get(name), currentWeights(), group).decoded]);
    """
    costs = {entry["name"]: entry["groups"] for entry in tables()["formats"]}
    for name, size in product(SCALED, (None, 16.0)):
        weights = weights_with(size)
        for group, decoded in zip(GROUPS, browser.execute_script(script, name, size), strict=True):
            wanted = bitfold.encode(weights[None], costs[name][group]["format"]).decode()[0]
            np.testing.assert_array_equal(
                np.float32(decoded), wanted.numpy(), err_msg=f"{name}, {group}, {size}"
            )


def test_outliers_switch_and_the_grid_reacts(browser, page):  # noqa: F811
    chromium.visit(browser, page)

    def state() -> tuple[float, int, str]:
        error = float(browser.find_element("id", "outliers-error").get_attribute("data-value"))
        rows = {
            row.text.rsplit(" ", 1)[0]: row.text
            for row in browser.find_elements("css selector", "#outliers-table tr")
        }
        near = next(int(re.search(r"(\d+) of", text).group(1)) for text in rows.values() if " of " in text)
        lines = browser.find_element("css selector", "#outliers-picture .grid").get_attribute("d")
        return error, near, lines

    quiet = state()
    browser.find_element("id", "outliers-on").click()
    loud = state()
    for (error, _, _), size in ((quiet, None), (loud, 16.0)):
        weights = weights_with(size)
        wanted = relative(weights, bitfold.encode(weights[None], f"int4-g{COUNT}").decode()[0])
        assert error == pytest.approx(wanted, rel=1e-6)
    assert loud[0] > 2 * quiet[0]
    assert loud[1] < quiet[1] / 2
    assert loud[2].count("M") < quiet[2].count("M")
    assert browser.find_element("id", "scales-outliers").is_selected()
    browser.find_element("id", "outliers-on").click()
    assert state() == quiet


@pytest.mark.parametrize("size", [1, 60, 200])
def test_one_large_channel(browser, page, size):  # noqa: F811
    """What the page says of the other channels, by the numpy of test_outliers.py."""
    chromium.visit(browser, page)
    browser.execute_script(
        "const s = find('features-size'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", size
    )
    cells = [
        [cell.text for cell in row.find_elements("css selector", "td")]
        for row in browser.find_elements("css selector", "#features-table tr")
    ]
    errors = [
        float(span.get_attribute("data-value"))
        for span in browser.find_elements("css selector", "#features-table .feature-error")
    ]
    x = example().double().numpy() / tables()["sigma"]
    x[CHANNEL] = size
    others = np.arange(COUNT) != CHANNEL
    kept = np.abs(x) >= 6
    taken_out = np.where(kept, x, oracle_outliers.rounded(np.where(kept, 0, x)[None])[0])
    wanted = (oracle_outliers.rounded(x[None])[0], oracle_outliers.rounded(x[None], 128)[0], taken_out)
    for error, result in zip(errors, wanted, strict=True):
        loss = np.linalg.norm((result - x)[others]) / np.linalg.norm(x[others])
        assert error == pytest.approx(loss, rel=1e-6)
    assert [row[3] for row in cells] == ["0", "0", str(int(kept.sum()))]
    steps = np.rint(wanted[0] / (np.abs(x).max() / 127))[others]
    assert int(cells[0][1]) == len(set(steps))
    assert (errors[0] > 4 * errors[2]) == (size > 20)


def test_many_scales_against_one(browser, page):  # noqa: F811
    chromium.visit(browser, page)
    browser.find_element("id", "scales-outliers").click()
    choose(browser, "scales-format", "nf4")
    weights = weights_with(16.0)
    errors = []
    for group in GROUPS:
        cell = browser.find_element("css selector", f"#scales-table [data-group='{group}']")
        errors.append(float(cell.get_attribute("data-value")))
        wanted = relative(weights, bitfold.encode(weights[None], f"nf4-b{group}").decode()[0])
        assert errors[-1] == pytest.approx(wanted, rel=1e-6)
    assert errors == sorted(errors, reverse=True)
    bands = [len(browser.find_elements("css selector", "#scales-picture .band"))]
    browser.find_element("id", "scales-group").send_keys("\ue014")
    bands.append(len(browser.find_elements("css selector", "#scales-picture .band")))
    assert bands == [8, 16]
    assert browser.find_element("css selector", "#scales-table [aria-current] th").text == "64"


def test_the_number_line_thins(browser, page):  # noqa: F811
    chromium.visit(browser, page)
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")]
        for row in browser.find_elements("css selector", "#line-table tr")
    ]
    counts = {row[0]: int(row[4].replace(",", "")) for row in rows}
    half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    inside = np.unique(half[(half >= -1) & (half < 1)])
    assert counts["fp16"] == len(inside)
    assert counts["fp32"] == 2 * int(np.float32(1).view(np.uint32))
    assert counts["fp32"] > counts["bf16"] > counts["int8"] > counts["int4"] > 0
    nearest = {row[0]: float(row[2].replace("−", "-")) for row in rows}
    assert nearest["fp16"] == pytest.approx(float(np.float16(0.7)), rel=1e-8)
    weights = torch.tensor([[0.7] + [1.0] * 63])
    for name, text in (("int8", "int8-g64"), ("int4", "int4-g64"), ("nf4", "nf4-b64"), ("fp4", "fp4-b64")):
        assert nearest[name] == pytest.approx(bitfold.encode(weights, text).decode()[0, 0].item(), rel=1e-8)
    browser.find_element("id", "line-zoom").send_keys("\ue014" * 6)
    zoomed = browser.find_elements("css selector", "#line-table tr")[0].text.split()[-1]
    assert int(zoomed.replace(",", "")) < counts["fp32"]


def test_shown_formats_are_in_the_table():
    assert set(explore_tables.SCALED) <= set(bitfold.FORMATS)
