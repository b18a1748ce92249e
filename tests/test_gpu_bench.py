"""tests/bench/gpu.py: all of it in small on the CPU, and what it computes from its measurements."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT, load_script


@pytest.mark.slow
def test_everything_runs_in_small(tmp_path):
    flags = ["--device", "cpu", "--quick", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, ROOT / "tests/bench/gpu.py", *flags], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/gpu.json").read_text())
    right, fast, real = (result["parts"][name] for name in ("right", "fast", "real"))
    assert right["failed"] == {} and right["passed"] > 10
    assert {name: row["failed"] for name, row in fast.items() if "failed" in row} == {}
    assert len(fast) == 10 and fast.pop("matrix")["median"] > 0
    assert all(row["loop"]["median"] > 0 for row in fast.values())
    scripts = {"gmml", "sit", "dino", "moco_v3", "simmim", "supervised", "classify", "predict"}
    assert {row["script"] for row in fast.values()} == scripts                  # for plan.py --rates
    assert {(row["arch"], row["img_size"]) for row in fast.values()} == {("vit_small_patch16_224", 32)}
    assert real["drawn"] and {len(aucs) for ways in real["auc"].values() for aucs in ways.values()} == {2}
    assert "missed" not in done.stdout              # in small no goal is met or missed


def test_rates_and_goals_are_those_worked_out_by_hand():
    gpu = load_script("tests/bench/gpu.py")
    lines = [dict(step=10, time=100.0), dict(step=20, time=102.0), dict(step=30, time=103.0)]
    assert gpu.rates(lines, 256) == dict(median=1920, least=1280, greatest=2560, n=2)
    of = lambda value: dict(median=value)
    gmml = dict(loop=of(2500), compiled=of(2900), step=of(2600), views=of(30000), eager=of(2000), pipeline=400,
                flops=8e10, peak_gib=39)
    found = dict(matrix=of(8e14), gmml=gmml, dino=dict(loop=of(900), step=of(1000)))
    values = [(goal["value"], goal["met"]) for goal in gpu.goals(found)]
    expected = [(0.9, False), (2600 / 30000, True), (1.3, True), (1.45, True), (6.25, False), (0.26, True),
                (100_000 * 1000 / 2500 / 3600, True), (39, True), (None, False)]
    for (value, met), (wanted, reached) in zip(values, expected, strict=True):
        assert met is reached and (value is wanted or math.isclose(value, wanted))
