"""evaluate/plan.py: what rows cost, in which order they have to be run, and what they read."""

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
    """What the command prints for a table of experiments."""
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
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


def test_steps_and_images_are_those_of_the_row(capsys, monkeypatch, tmp_path):
    table = {
        **TABLE,
        "3.1": {"pretrain": {"strategy": "gmml", "dataset": "nih_pretrain", "batch": 100, "epochs": 7}},
    }
    found = lines(capsys, monkeypatch, tmp_path, table, "--exp", "3.1", "--data", tmp_path / "none")
    stage = next(line.split() for line in found if line.startswith("3.1 ") and "pretrain" in line)
    assert stage[2:4] == ["70", "7,000"]                    # 1,000 // 100 steps an epoch
    # ViT-S/16: 4.6 billion multiply-adds a view, two views, forward and twice backward
    assert float(stage[4].replace(",", "")) == pytest.approx(7000 * 2 * 3 * 2 * 4.6e9 / 1e15, abs=1)
    assert any(line.startswith(f"missing: {tmp_path / 'none'}/nih_pretrain") for line in found)


def test_weights_are_found_by_their_whole_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/vit_small_patch16_224_in21k.pth").touch()
    table = {"defaults": TABLE["defaults"], "x": {"init": "timm"}}
    assert "download" in plan.inputs(table, "x", "data")["weights/vit_small_patch16_224"]
    (tmp_path / "weights/vit_small_patch16_224.safetensors").touch()
    assert plan.inputs(table, "x", "data")["weights/vit_small_patch16_224"] == ""


@pytest.mark.parametrize("table, flags, said", [
    ({**TABLE, 5.1: {}}, [], "the key 5.1 is read as a number; write it in quotes"),
    (TABLE, ["--exp", "3.11"], "no experiment '3.11'; nearest: 3.1"),
    (TABLE, ["--exp", "miniature"], "no experiment 'miniature'")])
def test_mistakes_are_one_sentence(capsys, monkeypatch, tmp_path, table, flags, said):
    with pytest.raises(SystemExit) as stop:
        lines(capsys, monkeypatch, tmp_path, table, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
