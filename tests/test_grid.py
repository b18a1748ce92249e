"""Every row of experiments.yaml starts: pre-training, fine-tuning and prediction run two steps each, with
tiny stand-ins for backbones, images and published weights. Rows that differ in nothing a script can notice
run once."""

import contextlib
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import ROOT, load_script, run_here, write_pack

TABLE = yaml.safe_load((ROOT / "experiments.yaml").read_text())
ROWS = [exp for exp in TABLE if exp != "defaults" and not exp.startswith("miniature")]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 12}
TINY = {
    "vit_small_patch16_224": VIT,
    "vit_base_patch16_224": VIT,
    "beit_base_patch16_224": VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
                                    "init_values": 0.1, "global_pool": "token"},
    "swin_base_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
    "resnet50": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_width": 16},
}
LABELS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
          "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]


def test_every_row_has_a_key_of_its_own():
    """Of two equal keys YAML takes the last without a word."""
    keys = re.findall(r'^"?([^\s"]+)"?:', (ROOT / "experiments.yaml").read_text(), re.M)
    assert len(keys) == len(set(keys)) == len(TABLE) > 60


def whole(exp, section):
    """A row as a script sees it: defaults below the row, what holds for all below what a section says."""
    both = {}
    for row in (TABLE["defaults"], TABLE[exp]):
        both |= {k: v for k, v in row.items() if k not in ("pretrain", "finetune")} | (row.get(section) or {})
    return both


def tiny_args(row):
    """The stand-in's arguments: small, but with the row's own window and image size where it names them."""
    args = TINY[row["arch"]] | {key: value for key, value in row.get("model_args", {}).items() if key != "num_heads"}
    if row["arch"].startswith("swin"):
        six = row.get("model_args", {}).get("window_size") == 6
        args |= {"img_size": 96 if six else 112, "window_size": 6 if six else 7}
    return args


def standin_weights(folder):
    """Files where the published ones would lie, with their key styles and the stand-ins' shapes."""
    folder.mkdir()

    def state(arch, in_chans=3, **changes):
        args = TINY[arch] | changes
        return timm.create_model(arch, in_chans=in_chans, num_classes=0, **args).state_dict()

    vit = state("vit_small_patch16_224")
    torch.save(vit, folder / "vit_small_patch16_224.pth")
    torch.save(vit, folder / "vit_base_patch16_224.augreg_in21k_ft_in1k.pth")
    torch.save(vit, folder / "deit_small_patch16_224.fb_in1k.pth")
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in vit.items()}},
               folder / "SiT_Small_ImageNet.pth")
    beit = state("beit_base_patch16_224") | {"mask_token": torch.zeros(1, 1, 48)}
    torch.save({"model": {f"encoder.{k}": v for k, v in beit.items()}},
               folder / "simmim_pretrain__vit_base__img224__800ep.pth")
    swin = state("swin_base_patch4_window7_224", img_size=96, window_size=6)
    torch.save(state("swin_base_patch4_window7_224", img_size=112, window_size=7),
               folder / "swin_base_patch4_window7_224.pth")
    released = {k.replace("layers.1.downsample", "layers.0.downsample"): v for k, v in swin.items()}
    torch.save({"model": {f"encoder.{k}": v for k, v in released.items()}},
               folder / "simmim_pretrain__swin_base__img192_window6__800ep.pth")
    torch.save(state("resnet50"), folder / "resnet50.pth")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (48, 32, 32), dtype=np.uint8)
    for pack in ("data", "drawn"):
        (folder / pack).mkdir()
        write_pack(folder / pack, images, patient=range(48),
                   split=np.repeat(["pretrain", "train", "val", "test"], 12),
                   **{label: np.tile([0, 1], 24) for label in LABELS})
    (folder / "drawn/pack.json").write_text('{"stand_in": "drawn for a test"}')
    standin_weights(folder / "weights")
    return folder


def signature(exp):
    """What the scripts can notice of a row; names of datasets and row, epochs and sample sizes are not."""
    unnoticed = ("about", "dataset", "samples", "epochs", "seeds")
    rows = [{k: v for k, v in whole(exp, section).items() if k not in unnoticed}
            for section in ("pretrain", "finetune")]
    return json.dumps([rows[0] if "pretrain" in TABLE[exp] else None, rows[1]], sort_keys=True)


FIRST = {}
for exp in ROWS:
    if not exp.startswith("c.8"):       # rows of Table 4 but for the schedule, see below
        FIRST.setdefault(signature(exp), exp)


def run(monkeypatch, script, *argv):
    """main() of a script here, with its output kept back; a user's mistake shows its sentence."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            run_here(load_script(script), monkeypatch, *argv)
    except SystemExit as stop:
        assert not stop.code, output.getvalue()[-2000:]


def pretrain(monkeypatch, exp):
    strategy = TABLE[exp]["pretrain"]["strategy"]
    run(monkeypatch, f"pretrain/{strategy}.py", "--exp", exp, *pretrain_flags(exp))


def pretrain_flags(exp):
    row = whole(exp, "pretrain")
    defaults = load_script(f"pretrain/{row['strategy']}.py").DEFAULTS
    small = dict(hidden_dim=32, out_dim=32, mask_unit=16, n_local_crops=2)
    flags = [item for key, value in small.items() if key in defaults for item in (f"--{key}", value)]
    return [*flags, "--samples", 12, "--split", "pretrain", "--warmup_epochs", 0, "--batch", 4, "--steps", 2,
            "--model_args", json.dumps(tiny_args(row)), "--device", "cpu", "--manifest", "drawn/manifest.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("exp", FIRST.values())
def test_row_starts(exp, place, monkeypatch):
    monkeypatch.chdir(place)
    init = whole(exp, "finetune").get("init", "")
    for parent in [init[4:]] if init.startswith("exp:") else []:
        if not (place / f"runs/{parent}/pretrain/backbone.pt").exists():
            pretrain(monkeypatch, parent)
    if "pretrain" in TABLE[exp]:
        pretrain(monkeypatch, exp)
        backbone = torch.load(place / f"runs/{exp}/pretrain/backbone.pt", weights_only=True)
        assert backbone["exp"] == exp and backbone["in_chans"] == whole(exp, "pretrain")["in_chans"]
    run(monkeypatch, "finetune/classify.py", "--exp", exp, "--train", "data/manifest.csv", "--seeds", 0,
        "--batch", 4, "--steps", 2, "--device", "cpu",
        "--model_args", json.dumps(tiny_args(whole(exp, "finetune"))))
    classifier = torch.load(place / f"runs/{exp}/finetune/seed0/classifier.pt", weights_only=True)
    assert classifier["labels"] == LABELS
    run(monkeypatch, "evaluate/predict.py", "--checkpoint", f"runs/{exp}/finetune/seed0/classifier.pt",
        "--manifest", "data/manifest.csv", "--out", f"runs/{exp}/predictions/seed0/nih_test.csv",
        "--device", "cpu")
    predictions = pd.read_csv(place / f"runs/{exp}/predictions/seed0/nih_test.csv")
    assert len(predictions) == 12 and predictions.filter(like="prob_").notna().all(axis=None)
    facts = json.loads((place / f"runs/{exp}/predictions/seed0/nih_test.json").read_text())
    drawn = "pretrain" in TABLE[exp] or init.startswith("exp:")             # the mark follows the weights
    assert facts["stand_in"] == ("drawn for a test" if drawn else None)


@pytest.mark.parametrize("strategy", ["gmml", "sit", "dino", "moco_v3", "simmim", "supervised"])
def test_a_row_of_another_strategy_is_refused(strategy, monkeypatch, capsys):
    exp, other = ("3.1", "gmml") if strategy != "gmml" else ("2.3", "supervised")
    with pytest.raises(SystemExit) as leaving:
        run_here(load_script(f"pretrain/{strategy}.py"), monkeypatch, "--exp", exp)
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in (f"row {exp}:", "strategy", f"'{other}'", f"'{strategy}'"))


@pytest.mark.parametrize("strategy", ["gmml", "sit", "dino", "moco_v3", "simmim", "supervised"])
def test_the_rows_that_a_script_names_are_of_its_strategy(strategy):
    text = (ROOT / f"pretrain/{strategy}.py").read_text()
    rows = re.findall(r"(?:[.]py --exp|row of experiments.yaml, as in) ([\w.-]+)", text)
    assert len(rows) > 1 and {TABLE[exp]["pretrain"]["strategy"] for exp in rows} == {strategy}


def test_every_row_of_the_study_is_there():
    wanted = [f"{a}.{b}" for a, n in ((1, 2), (2, 4), (3, 8)) for b in range(1, n + 1)]
    wanted += [f"0.1.{i}{b}" for i in range(1, 8) for b in ("", "b")] + [f"0.2.{i}" for i in (2, 3, 4, 5, 7)]
    wanted += [f"4.{s}.1-{n}k" for s in (1, 2, 3) for n in (50, 100, 250)]
    wanted += ["4.1.2-50k", "4.2.2-50k", "4.3.2-50k", "4.3.3-50k"]
    assert set(wanted) <= set(ROWS)


def test_channels_and_starts_follow_the_papers_tables():
    for exp in ("2.2", "2.4", "3.2", "3.4", "3.6", "3.8"):
        assert whole(exp, "pretrain")["init"] == "timm" and whole(exp, "pretrain")["in_chans"] == 3
    for exp in ("2.1", "2.3", "3.1", "3.3", "3.5", "3.7"):
        assert whole(exp, "pretrain")["init"] == "random" and whole(exp, "pretrain")["in_chans"] == 1
    assert [whole(exp, "finetune")["seeds"] for exp in ("1.1", "3.4")] == [[0, 1, 2], [0, 11, 21, 42, 100]]


def test_the_slip_is_where_the_numbers_were_printed_with_it_and_c8_is_without():
    """Table 4 and the recipe-b column of Table 5; at the top of a row it would change SimMIM's pre-training too."""
    for exp in ROWS:
        recipe, variant = (whole(exp, "finetune").get(key) for key in ("recipe", "variant"))
        assert (variant == "paper") == (recipe in ("a", "b") and not exp.startswith("c.8")), exp
        assert "variant" not in TABLE[exp], exp
    for number in range(1, 8):
        for recipe, suffix in (("a", ""), ("b", "b")):
            printed, corrected = (dict(whole(exp, "finetune")) for exp in (f"0.1.{number}{suffix}", f"c.8.{number}{recipe}"))
            assert printed.pop("variant") == "paper"
            starts = printed.pop("init"), corrected.pop("init")
            assert starts[0] == starts[1] or starts[1] == f"exp:0.1.{number}"
            assert {**printed, "about": ""} == {**corrected, "about": ""}


def test_images_and_decay_are_those_of_the_captions():
    for exp in ("0.2.2", "0.2.3", "0.2.4", "0.2.5", "0.2.7"):
        assert whole(exp, "pretrain")["samples"] == 86_524, exp               # train and validation, Table 5
    assert {whole(exp, "pretrain")["dataset"] for exp in ("3.1", "3.2", "0.1.7")} == {"nih_pretrain"}
    assert all(whole(exp, "pretrain")["wd_end"] == 0.04 for exp in ROWS if exp.startswith("4.1"))
    swin_or_simmim = [exp for exp in ROWS if whole(exp, "finetune")["arch"].startswith(("swin", "beit"))]
    assert len(swin_or_simmim) == 20 and all(whole(exp, "finetune")["drop_path"] == 0.1 for exp in swin_or_simmim)


def test_rows_keep_their_channels_where_the_miniature_has_weights_of_three_for_imagenet(tmp_path, monkeypatch):
    facts = dict(arch="vit_small_patch16_224", model_args={}, in_chans=3, img_size=64, mean=[0.5] * 3, std=[0.2] * 3)
    torch.save({"model": {}, **facts}, tmp_path / "c.0.pt")
    classify, found = load_script("finetune/classify.py"), {}
    rows = [exp for exp in ROWS if "pretrain" not in TABLE[exp] and whole(exp, "finetune")["init"].startswith("timm")]
    for exp in rows:
        monkeypatch.setattr("sys.argv", ["x", "--exp", exp, "--miniature", "true", "--init", str(tmp_path / "c.0.pt")])
        found[exp] = classify.resolve(*classify.options("finetune"))[0]["in_chans"]
    assert found == {exp: whole(exp, "finetune")["in_chans"] for exp in rows} and found["c.1"] == 1


@pytest.mark.parametrize("exp", ["2.1", "2.2", "3.3", "3.4", "3.5", "4.1.1-50k", "4.3.1-50k", "c.10-moco", "c.10-simmim"])
def test_the_miniature_is_laid_over_a_row(exp, monkeypatch):
    for section, script in (("pretrain", TABLE[exp].get("pretrain", {}).get("strategy")), ("finetune", "classify")):
        if script is None:
            continue
        module = load_script(f"{'pretrain' if section == 'pretrain' else 'finetune'}/{script}.py")
        monkeypatch.setattr("sys.argv", ["x", "--exp", exp, "--miniature", "true", "--lr", "0.5"])
        _, config = module.options(section)
        wanted = whole(exp, section)
        for name in ("miniature", f"miniature.{TABLE[exp].get('pretrain', {}).get('strategy')}"):
            part = TABLE.get(name, {})
            wanted |= {k: v for k, v in part.items() if k not in ("pretrain", "finetune")} | part.get(section, {})
        wanted |= {"lr": 0.5} | ({"seeds": str(wanted["seeds"])} if section == "finetune" else {})
        assert {key: config[key] for key in wanted if key in config} == {key: wanted[key] for key in wanted if key in config}
        assert config["exp"] == exp and config["model_args"]["embed_dim"] == 64
