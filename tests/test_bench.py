"""`bitfold bench`: who takes part, the order of turns, validation, bars, and the report. No time decides anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import sys
from pathlib import Path
from types import ModuleType

import bitfold
import numpy as np
import pytest
import torch
from bitfold.bench import bars, ceilings, contestants, ggml, machine, peers
from bitfold.bench.bars import BARS, Bar, verdicts
from bitfold.bench.cases import Timing, encode_cases, linear_cases
from bitfold.bench.clock import CALLS_PER_TURN, CpuClock, Spread, take_turns
from bitfold.bench.run import FORMATS, Settings, run
from bitfold.bench.validate import WrongResultError
from bitfold.cli.app import run as command
from tiny import one_thread  # noqa: F401

TINY = Settings(
    ops=("linear", "encode", "decode"),
    formats=("int4-g128", "nf4"),
    shapes=((32, 128),),
    batches=(1, 9),
    dtypes=("bf16", "fp32"),
    peers=("aten",),
    threads=1,
    seconds=0,
    min_rounds=1,
    rotation=1 << 20,
)
TIMING = Timing(threads=1, seconds=0, min_rounds=1)
ONE_PRODUCT = [
    "--ops",
    "linear",
    "--formats",
    "nf4",
    "--shape",
    "32x128",
    "--batches",
    "1",
    "--threads",
    "1",
    "--seconds",
    "0",
]


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(json.dumps(run(TINY)))


@pytest.fixture
def small_rotation(monkeypatch):
    """For what goes through the command line, which has no option for it."""
    monkeypatch.setattr("bitfold.bench.run.rotation_bytes", lambda: 1 << 20)


@pytest.fixture
def reader() -> ceilings.Ceiling:
    return dataclasses.replace(ceilings.readers(1 << 20, 1)[0], name="read")


# ---- the report ----


def test_every_case_has_a_row_for_each_contestant(report):
    """Built from the settings by hand: aten's kernels take bf16 only."""
    ours = {"int4-g128", "nf4"}
    aten = {"aten int4pack g128", "aten int8pack"}
    expected = {}
    for m in (1, 9):
        expected["linear", m, "bf16"] = ours | aten | {"torch bf16", "read"}
        expected["linear", m, "fp32"] = ours | {"torch fp32", "read"}
    for dtype in ("bf16", "fp32"):
        expected["encode", None, dtype] = ours | {"read", "copy, fresh", "copy, existing"}
        expected["decode", None, dtype] = ours | {"read", "copy, fresh", "copy, existing"}
    found: dict = {}
    for row in report["rows"]:
        found.setdefault((row["op"], row["m"], row["dtype"]), set()).add(row["name"])
    assert found == expected


def test_rows_say_what_was_measured(report):
    for row in report["rows"]:
        ms = row["ms"]
        assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
        assert ms["samples"] >= 1
        assert row["kind"] in ("bitfold", "torch", "peer", "ceiling")
        assert row["GB_per_s"] == pytest.approx(row["bytes"] / ms["median"] / 1e6, rel=1e-3)
        if row["kind"] != "ceiling":
            assert "read" in row["shares"]
            assert 0 <= row["error"] < 1
        assert ("plan" in row) == (row["kind"] == "bitfold" and row["op"] == "linear")
        assert (row.get("over_torch") is not None) == (row["op"] == "linear" and row["kind"] != "ceiling")
    plans = {row["m"]: row["plan"] for row in report["rows"] if row["name"] == "nf4" and "plan" in row}
    for m, plan in plans.items():
        assert plan == dataclasses.asdict(bitfold.plan_linear("nf4", m, 32, 128, torch.float32)) or plan == (
            dataclasses.asdict(bitfold.plan_linear("nf4", m, 32, 128, torch.bfloat16))
        )


def test_bytes_of_the_packed_weights(report):
    rows = {row["name"]: row for row in report["rows"] if row["op"] == "linear" and row["m"] == 1}
    assert rows["nf4"]["bytes"] == 32 * 128 // 2 + 32 * 2 * 4  # a float32 scale for each 64 weights
    assert rows["torch fp32"]["bytes"] == 32 * 128 * 4
    assert rows["aten int8pack"]["bytes"] == 32 * 128 + 32 * 2


def test_report_names_the_machine_and_nobody(report):
    assert report["schema"] == 1
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["bitfold"] == bitfold.__version__
    assert {"cpu", "caches", "isa"} <= set(report["machine"])
    assert report["settings"]["threads"] == 1
    assert report["settings"]["rotation"] == 1 << 20
    assert report["ceilings"]["read, 1 thread"]["GB_per_s"] > 0
    assert platform.node() not in json.dumps(report["machine"]).split('"')


def test_every_bar_has_a_verdict(report):
    assert [verdict["bar"] for verdict in report["bars"]] == [bar.text for bar in BARS]
    for verdict in report["bars"]:
        assert (verdict["met"] is None) == (verdict["measured"] is None) == ("why" in verdict)
    missing = next(v for v in report["bars"] if "Linear4bit" in v["bar"])
    assert "bitsandbytes nf4" in missing["why"]


# ---- peers ----


def test_absent_peers_are_named(monkeypatch, capsys, tmp_path, small_rotation):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = tmp_path / "out.json"
    options = [*ONE_PRODUCT, "--dtypes", "bf16", "--peers", "bitsandbytes", "--out", str(out)]
    assert command(["bench", *options]) == 0
    printed = capsys.readouterr().out
    assert "absent: bitsandbytes, not installed" in printed
    assert "nf4" in printed
    assert json.loads(out.read_text())["absent"] == {"bitsandbytes": "not installed"}
    assert command(["bench", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["absent"] == {"bitsandbytes": "not installed"}


@pytest.mark.slow
def test_every_installed_peer_computes_rightly():
    """Whatever is installed here: their imports take seconds. A wrong result would end the run."""
    settings = dataclasses.replace(
        TINY, shapes=((64, 256),), peers=peers.LIBRARIES, formats=(*TINY.formats, *ggml.BLOCK_TYPES)
    )
    found = run(settings)
    names = {row["name"] for row in found["rows"]} | {entry["peer"] for entry in found["refused"]}
    assert {peer.name for peer in peers.PEERS if peer.library not in found["absent"]} <= names
    assert "aten" not in found["absent"]


def test_a_broken_peer_is_absent_with_its_error(monkeypatch, tmp_path):
    (tmp_path / "torchao.py").write_text("raise OSError('no such library')")
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.absence("torchao", 1) == "its import fails: no such library"


def test_shapes_that_a_peer_refuses_are_said():
    settings = dataclasses.replace(TINY, ops=("linear",), shapes=((10, 96),), batches=(1,), dtypes=("bf16",))
    found = run(settings)
    assert [(entry["peer"], entry["n"], entry["k"]) for entry in found["refused"]] == [
        ("aten int4pack g128", 10, 96)
    ]
    assert "aten int8pack" in {row["name"] for row in found["rows"]}


# ---- validation ----


def test_a_wrong_product_is_an_error(reader):
    def wrong(weight: torch.Tensor) -> contestants.Multiplier:
        right = contestants.torch_multiplier(weight, "bf16")
        return dataclasses.replace(right, copy=lambda: lambda x: 1.05 * right.copy()(x))

    with pytest.raises(
        WrongResultError, match=r"torch bf16 at 32x64 m=3 bf16 is wrong: relative error 5\.\d*e-02"
    ):
        list(linear_cases(32, 64, [wrong], [3], ["bf16"], reader, TIMING))


@pytest.mark.parametrize("row", [0, 50, 99])
def test_one_wrong_row_or_column_is_seen(reader, row):
    def wrong(weight: torch.Tensor, axis: int) -> contestants.Multiplier:
        right = contestants.torch_multiplier(weight, "fp32")

        def call(x: torch.Tensor) -> torch.Tensor:
            y = right.copy()(x)
            y.select(axis, row).neg_()
            return y

        return dataclasses.replace(right, copy=lambda: call)

    for axis in (0, 1):
        with pytest.raises(WrongResultError):
            list(linear_cases(100, 64, [lambda w, a=axis: wrong(w, a)], [100], ["fp32"], reader, TIMING))


def test_what_is_not_finite_or_of_another_dtype_is_an_error(reader):
    for spoil in (lambda y: y * float("nan"), lambda y: y.float(), lambda y: y[:, 1:]):

        def wrong(weight: torch.Tensor, spoil=spoil) -> contestants.Multiplier:
            right = contestants.torch_multiplier(weight, "bf16")
            return dataclasses.replace(right, copy=lambda: lambda x: spoil(right.copy()(x)))

        with pytest.raises(WrongResultError, match="it must be finite"):
            list(linear_cases(32, 64, [wrong], [3], ["bf16"], reader, TIMING))


def test_a_wrong_encoder_is_an_error(reader):
    right = contestants.bitfold_coder("int4-g128")
    wrong = dataclasses.replace(right, decode=lambda qtensor, dtype: -qtensor.decode(dtype))
    with pytest.raises(WrongResultError, match="int4-g128 encodes wrongly"):
        list(encode_cases(32, 128, [wrong], ["fp32"], reader, TIMING))


def test_a_wrong_result_ends_the_command(monkeypatch, capsys, small_rotation):
    forward = bitfold.QuantLinear.forward
    monkeypatch.setattr(bitfold.QuantLinear, "forward", lambda self, x: forward(self, x) + 1)
    assert command(["bench", *ONE_PRODUCT, "--peers", "none"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # a busy machine is remarked on before
    assert error.startswith("error: nf4 at 32x128 m=1 bf16 is wrong")


# ---- turns ----


def test_contestants_take_turns():
    calls: list[str] = []
    rounds, names = 8, "abc"
    contestants = {name: lambda n=name: calls.append(n) for name in names}
    spreads = take_turns(contestants, 0, clock=CpuClock(1), min_rounds=rounds)
    first = [name for name in names for _ in range(2)]  # one that warms up, one that finds how long a turn is
    assert calls[: len(first)] == first
    turns = calls[len(first) :][::CALLS_PER_TURN]
    assert calls[len(first) :] == [name for name in turns for _ in range(CALLS_PER_TURN)]
    orders = ["".join(turns[i : i + len(names)]) for i in range(0, len(turns), len(names))]
    assert len(orders) == rounds
    assert {"".join(sorted(order)) for order in orders} == {names}
    assert len(set(orders)) > 2, "another order in each round"
    assert spreads["a"].samples == rounds * (CALLS_PER_TURN - 1)


def test_spread():
    spread = Spread.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (spread.q1, spread.median, spread.q3, spread.samples) == (2, 3, 4, 5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 1)
    assert spread.as_ms() == {"median": 3000, "q1": 2000, "q3": 4000, "samples": 5}


def test_no_matrix_is_used_twice_in_a_turn():
    call = ceilings.rotate([lambda i=i: i for i in range(CALLS_PER_TURN)])
    assert len({call() for _ in range(CALLS_PER_TURN)}) == CALLS_PER_TURN


# ---- ceilings and the machine ----


def test_readers_read_the_whole_buffer():
    words = np.arange(1 << 18, dtype=np.float32)
    for way in ceilings.readers(1 << 20, 2):
        assert way.nbytes == 1 << 20
        found = way.run()
        if way.name == "torch mv fp32":
            np.testing.assert_allclose(found.numpy(), words.reshape(-1, 4096).sum(1), rtol=1e-5)
        elif way.name == "torch sum int64":
            assert found == words.view(np.int64).sum()
        else:
            assert found == list(words.view(np.uint8).reshape(len(found), -1).max(1))


def test_rotation_exceeds_the_cache(monkeypatch):
    monkeypatch.setattr(ceilings, "last_level_cache", lambda: 260 << 20)
    assert ceilings.rotation_bytes() == 520 << 20
    monkeypatch.setattr(ceilings, "last_level_cache", lambda: 0)
    assert ceilings.rotation_bytes() == 96 << 20


def test_caches_are_read_from_sysfs(monkeypatch, tmp_path):
    for i, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"), (3, "Unified", "266240K")]
    ):
        index = tmp_path / f"index{i}"
        index.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{value}\n")
    monkeypatch.setattr(machine, "_SYSFS_CACHES", tmp_path)
    assert machine.caches() == {"L1": 48 << 10, "L2": 2 << 20, "L3": 260 << 20}
    assert machine.last_level_cache() == 260 << 20
    monkeypatch.setattr(machine, "_SYSFS_CACHES", tmp_path / "none")
    assert machine.last_level_cache() == 0


# ---- bars ----


def _row(name: str, ms: float, **fields) -> dict:
    return {
        "op": "linear",
        "n": 8,
        "k": 8,
        "m": 1,
        "dtype": "bf16",
        "name": name,
        "ms": {"median": ms},
        "shares": {"read": 0.6},
        **fields,
    }


def test_verdicts_take_the_worst_case():
    bar = Bar("x", "linear", ("nf4",), "over", 1.5, against={"nf4": ("peer",)})
    rows = [_row("nf4", 1), _row("peer", 2), _row("nf4", 2, m=8), _row("peer", 2.8, m=8)]
    (verdict,) = verdicts(rows, [bar])
    assert (verdict["measured"], verdict["met"]) == (1.4, False)
    assert verdict["at"] == "nf4 linear 8x8 m=8 bf16"
    assert [case["measured"] for case in verdict["cases"]] == [2, 1.4]
    (verdict,) = verdicts(rows[:2], [bar])
    assert (verdict["measured"], verdict["met"]) == (2, True)


def test_verdicts_of_shares_and_upper_bounds():
    share = Bar("x", "linear", ("nf4",), "share:read", 0.7)
    upper = Bar("y", "import", ("bitfold",), "ms", 300, at_most=True)
    rows = [_row("nf4", 1), {"op": "import", "name": "bitfold", "ms": {"median": 80}}]
    assert [verdict["met"] for verdict in verdicts(rows, [share, upper])] == [False, True]


def test_a_missing_peer_leaves_a_bar_open():
    bar = Bar("x", "linear", ("nf4",), "over", 1.5, against={"nf4": ("peer",)})
    (verdict,) = verdicts([_row("nf4", 1)], [bar])
    assert verdict["met"] is None
    assert verdict["why"] == "not measured in this run: peer"


def test_bars_name_what_exists():
    known = {peer.name for peer in peers.PEERS}
    for bar in (*bars.BARS, *bars.BLOCK_BARS):
        assert {name for rivals in bar.against.values() for name in rivals} <= known
        assert bar.op == "import" or all(
            bitfold.formats.parse(name.removesuffix(" int8")) for name in bar.names
        )
        if bar in bars.BARS and bar.op in ("linear", "encode", "decode"):
            assert set(bar.names) <= set(FORMATS)  # the default run measures all of them


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ops": ("lineer",)}, "ops names 'lineer'"),
        ({"peers": ("numpy",)}, "peers names 'numpy'"),
        ({"dtypes": ("int8",)}, "dtypes names 'int8'"),
        ({"formats": ("int5",)}, "int5"),
        ({"batches": (8, 0)}, "batches is or holds 0; it must be at least 1"),
        ({"seconds": -1}, "seconds is or holds -1"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_bad_options(capsys, tmp_path):
    for option, value in (
        ("--shape", "12"),
        ("--batches", "1,x"),
        ("--out", str(tmp_path / "no" / "x.json")),
    ):
        assert command(["bench", option, value]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option}")


# ---- the repository's scripts ----


def script(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / f"{name}.py"
    if not path.is_file():
        pytest.skip("the repository is not beside the tests")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plot_shows_every_contestant(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "report.json"), str(tmp_path / "p.svg")])
    plot = script("plot")
    plot.main()
    first = (tmp_path / "p-light.svg").read_text()
    for name in ("int4-g128", "nf4", "aten int4pack g128", "aten int8pack", "32 x 128, m = 9"):
        assert f">{name}<" in first
    assert (tmp_path / "p-dark.svg").read_text() != first
    plot.main()
    assert (tmp_path / "p-light.svg").read_text() == first


def test_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    end_to_end = script("end_to_end")
    tiny_shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    monkeypatch.setattr(end_to_end, "TINYLLAMA", tiny_shape)
    out = tmp_path / "out.json"
    options = ["--threads", "1", "--tokens", "4", "--rounds", "1", "--layers", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *options])
    end_to_end.main()
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"torch bf16", "int4-g128", "nf4"}
    for row in rows.values():
        assert row["linears"] == 2 * 7 + 1  # seven in each layer, and the head
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms"]["median"], rel=1e-3)
        assert row["over_linears"] > 0
    assert rows["torch bf16"]["over_torch"] == 1
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    head = 2 * 100 * 128  # stays in bf16
    assert rows["torch bf16"]["bytes"] == 2 * weights + head
    assert rows["nf4"]["bytes"] == 4.5 / 8 * weights + head
    (verdict,) = report["bars"]
    assert verdict["measured"] == max(rows[name]["over_linears"] for name in ("int4-g128", "nf4"))
