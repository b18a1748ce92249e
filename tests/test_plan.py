"""evaluate/plan.py: what rows cost, in which order they have to be run, and what they read."""

import json

import pytest
import yaml
from conftest import ROOT, load_script, run_here

plan = load_script("evaluate/plan.py")
TABLE = {
    "defaults": {
        "arch": "vit_small_patch16_224",
        "in_chans": 1,
        "init": "random",
        "pretrain": {"samples": 1000},
        "finetune": {"recipe": "deit", "seeds": [0, 7]},
    },
    "miniature": {"img_size": 64},
    "2.1": {},
    "1.2": {"init": "torchvision", "finetune": {"seeds": [3]}},
    "5.2b": {"init": "exp:5.2"},
    "5.2": {"init": "exp:3.1", "pretrain": {"strategy": "sit", "dataset": "oct"}},
    "3.1": {"pretrain": {"strategy": "gmml", "dataset": "nih_pretrain"}},
}


def lines(capsys, monkeypatch, tmp_path, table, *flags):
    """What the command prints for a table of experiments, or for the text of its file."""
    text = table if isinstance(table, str) else yaml.safe_dump(table, sort_keys=False)
    (tmp_path / "experiments.yaml").write_text(text)
    for folder in ("pretrain", "finetune"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(plan.signal, "signal", lambda *_: None)
    run_here(plan, monkeypatch, *flags)
    return capsys.readouterr().out.splitlines()


def test_a_row_is_listed_after_the_rows_it_starts_from(capsys, monkeypatch, tmp_path):
    found = lines(capsys, monkeypatch, tmp_path, TABLE, "--list", "--exp", "5.2b,2.*")
    assert [line.split("\t") for line in found] == [
        ["3.1", "gmml", "nih_pretrain", "-", "-"], ["5.2", "sit", "oct", "3.1", "-"],
        ["5.2b", "-", "-", "5.2", "0,7"], ["2.1", "-", "-", "-", "0,7"]]
    every = lines(capsys, monkeypatch, tmp_path, TABLE, "--list")
    assert [line.split("\t")[0] for line in every] == ["2.1", "1.2", "3.1", "5.2", "5.2b"]
    assert every[1].split("\t")[4] == "3"


@pytest.mark.parametrize("seeds, listed, runs", [(7, "7", 1), ("0,11", "0,11", 2), ([0, 11, 21], "0,11,21", 3)])
def test_seeds_may_be_a_number_or_a_text_as_in_the_script(capsys, monkeypatch, tmp_path, seeds, listed, runs):
    table = {**TABLE, "x": {"finetune": {"seeds": seeds, "epochs": 1}}}
    assert lines(capsys, monkeypatch, tmp_path, table, "--list", "--exp", "x") == [f"x\t-\t-\t-\t{listed}"]
    stage = lines(capsys, monkeypatch, tmp_path, table, "--exp", "x")[1].split()
    assert stage[:3] == ["x", "finetune", f"{75_312 // 64 * runs:,}"]


def test_the_plan_counts_what_the_chain_runs_of_parents(capsys, monkeypatch, tmp_path):
    """5.2b starts from 5.2, which starts from 3.1: they are pre-trained, not fine-tuned, on packs of theirs."""
    found = lines(capsys, monkeypatch, tmp_path, TABLE, "--exp", "5.2b", "--data", tmp_path)
    stages = [line.split()[:2] for line in found[1:4]]
    assert stages == [["3.1", "pretrain"], ["5.2", "pretrain"], ["5.2b", "finetune"]]
    hours = sum(float(line.split()[5]) for line in found[1:4])
    assert float(found[4].split()[1]) == pytest.approx(hours, abs=0.6)
    assert {f"{tmp_path}/{pack}/manifest.csv" for pack in ("nih_pretrain", "oct", "nih")} <= {*found}
    assert f"{tmp_path}/-/manifest.csv" not in found


def test_the_cost_of_all_images_of_a_pack_is_unknown_and_not_nothing(capsys, monkeypatch, tmp_path):
    table = {**TABLE, "x": {"pretrain": {"strategy": "gmml", "dataset": "oct", "samples": 0}}}
    found = lines(capsys, monkeypatch, tmp_path, table, "--exp", "x")
    assert found[1].split() == ["x", "pretrain", *"-----"]
    assert found[3] == f"V100: {float(found[2].split()[5]):.0f} h; no GPU: 0 h where measured"


def test_steps_and_images_are_those_of_the_row(capsys, monkeypatch, tmp_path):
    table = {
        **TABLE,
        "3.1": {"pretrain": {"strategy": "gmml", "dataset": "nih_pretrain", "batch": 100, "epochs": 7}},
    }
    found = lines(capsys, monkeypatch, tmp_path, table, "--exp", "3.1", "--data", tmp_path / "none")
    stage = next(line.split() for line in found if line.split()[:2] == ["3.1", "pretrain"])
    assert stage[2:4] == ["70", "7,000"]                    # 1,000 // 100 steps an epoch
    # ViT-S/16: 4.6 billion multiply-adds a view, two views, forward and twice backward
    assert float(stage[4].replace(",", "")) == pytest.approx(7000 * 2 * 3 * 2 * 4.6e9 / 1e15, abs=1)
    assert f"{tmp_path / 'none'}/nih_pretrain/manifest.csv" in found[found.index("missing:"):]


def test_files_of_weights_and_packs_are_missing_until_they_are_there(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    table = {**TABLE, "x": {"init": "weights/net.pth"}}

    def missing():
        found = lines(capsys, monkeypatch, tmp_path, table, "--exp", "x,5.2,2.1")
        return found[found.index("missing:") + 1:]
    packs = [f"data/{name}/manifest.csv" for name in ("chexpert", "nih", "padchest", "vindr_cxr")]
    needed = ["weights/net.pth", "data/nih_pretrain/manifest.csv", "data/oct/manifest.csv"]     # 5.2: of 3.1 too
    assert missing() == sorted([*packs, *needed])
    for file in [*needed, "data/nih/manifest.csv"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert missing() == [packs[0], *packs[2:]]


def test_in_the_miniature_c0_stands_in_for_imagenet_weights(capsys, monkeypatch, tmp_path):
    table = {**TABLE, "miniature": {"finetune": {"seeds": [4, 5]}}, "2.2": {"init": "timm:deit"},
             "c.0": {"pretrain": {"strategy": "supervised", "dataset": "imagenet"}}}
    flags = ["--list", "--exp", "1.2,2.2,2.1", "--miniature"]
    assert [line.split("\t") for line in lines(capsys, monkeypatch, tmp_path, table, *flags)] == [
        ["c.0", "supervised", "imagenet", "-", "-"], ["1.2", "-", "-", "c.0", "4,5"],
        ["2.2", "-", "-", "c.0", "4,5"], ["2.1", "-", "-", "-", "4,5"]]
    assert [line.split("\t") for line in lines(capsys, monkeypatch, tmp_path, table, *flags[:3])] == [
        ["1.2", "-", "-", "-", "3"], ["2.2", "-", "-", "-", "0,7"], ["2.1", "-", "-", "-", "0,7"]]


def test_hours_by_measured_rates_stand_beside_the_estimate(capsys, monkeypatch, tmp_path):
    """3.1: 3 epochs of 1,000 images, 1,000 // 256 steps of 256; 2.1: two seeds of 2 epochs."""
    table = {**TABLE, "3.1": {"pretrain": {"strategy": "gmml", "dataset": "nih_pretrain", "epochs": 3}},
             "2.1": {"finetune": {"epochs": 2, "seeds": [0, 7]}}}
    rows = {"gmml": dict(script="gmml", arch="vit_small_patch16_224", img_size=224, loop=dict(median=0.64)),
            "classify": dict(script="classify", arch="vit_small_patch16_224", img_size=224,
                             loop=dict(median=500)),
            "sit": dict(script="sit", arch="vit_small_patch16_224", img_size=224),       # that failed
            "matrix": dict(median=1e12)}
    (tmp_path / "gpu.json").write_text(json.dumps({"card": "a card", "parts": {"fast": rows}}))
    flags = ["--exp", "3.1,2.1,1.2", "--rates", tmp_path / "gpu.json"]
    found = lines(capsys, monkeypatch, tmp_path, table, *flags)
    assert found[0].split()[-2:] == ["measured", "h"]
    hours = {tuple(line.split()[:2]): line.split()[-2:] for line in found[1:5]}
    assert hours["3.1", "pretrain"][1] == "1.0"             # 2,304 images at 0.64 a second
    trained, tested = 75_312 * 2 * 2, 2 * (2 * 11_212 + 11_212 + 68_898)
    assert float(hours["2.1", "finetune"][1]) == pytest.approx((trained + tested) / 500 / 3600, abs=0.05)
    steps = next(line.split()[2] for line in found if line.split()[:2] == ["2.1", "finetune"])
    assert steps == f"{75_312 // 64 * 2 * 2:,}"
    flops = (3 * trained + tested) * 2 * 4.6e9
    assert float(hours["2.1", "finetune"][0]) == pytest.approx(flops / 31.25e12 / 3600, abs=0.06)
    total = sum(float(pair[1]) for pair in hours.values())
    assert any(line.endswith(f"a card: {total:.0f} h where measured") for line in found)
    rows["gmml"]["img_size"] = 32                           # a small network, as of gpu.py --quick
    (tmp_path / "gpu.json").write_text(json.dumps({"card": "", "parts": {"fast": rows}}))
    found = lines(capsys, monkeypatch, tmp_path, table, *flags)
    assert [line.split()[-1] for line in found[1:5]][0] == "-"


@pytest.mark.parametrize("table, flags, said", [
    (TABLE, ["--exp", "3.11"], "no experiment '3.11'; nearest: 3.1"),
    (TABLE, ["--exp", "miniature"], "no experiment 'miniature'"),
    (TABLE, ["--rates", "absent.json"], "--rates absent.json: not a gpu.json"),
    (TABLE, ["--rates", ROOT / "experiments.yaml"], "experiments.yaml: not a gpu.json"),
    (TABLE, ["--rates", "list.json"], "list.json: not a gpu.json"),
    ("a: {b: c", ["--exp", "2.1"], "experiments.yaml"),
    ({**TABLE, "x": None}, ["--exp", "x"], "cannot list x of experiments.yaml"),
    ({**TABLE, 9.1: {}}, ["--exp", "9.1"], "keys stand in quotes: KeyError '9.1'"),
    ({**TABLE, "x": {"init": "exp:9.9"}}, ["--exp", "2.1,x", "--list"], "KeyError '9.9'"),
    ({**TABLE, "x": {"init": "exp:y"}, "y": {"init": "exp:x"}}, ["--exp", "x"], "RecursionError")])
def test_mistakes_are_one_sentence(capsys, monkeypatch, tmp_path, table, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SystemExit) as stop:
        lines(capsys, monkeypatch, tmp_path, table, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
