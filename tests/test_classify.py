"""Facts about finetune/classify.py, each against an independent formulation."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
import yaml
from conftest import ROOT, load_script, log_of, run_here, run_script, write_pack
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from timm.scheduler import CosineLRScheduler

classify = load_script("finetune/classify.py")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TINY = ["--model_args", json.dumps(VIT), "--device", "cpu", "--seeds", 0, "--warmup_epochs", 1]
EASY = ["--crop_scale", "[0.8, 1]", "--rotation", 0, "--drop_path", 0, "--lr", "3e-3"]
run = partial(run_here, classify)


def make_pack(folder, n, shares=(1 / 3, 1 / 3, 1 / 3), shuffled=False, side=32):
    """Grey noise with a bright bar for each of three labels, two images a patient, labels shuffled or not."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    labels, images = rng.integers(0, 2, (n, 3)), rng.integers(60, 120, (n, side, side), dtype=np.uint8)
    for k in range(3):
        images[:, 4 + 10 * k:9 + 10 * k, 8:24] += (labels[:, k, None, None] * 90).astype(np.uint8)
    split = np.repeat(["train", "val", "test"], np.diff([0, *np.round(np.cumsum(shares) * n).astype(int)]))
    labels = rng.permutation(labels) if shuffled else labels
    return write_pack(folder, images, split=split, patient=[f"p{i // 2}" for i in range(n)],
                      **dict(zip("ABC", labels.T)))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return make_pack(tmp_path_factory.mktemp("pack"), 72)


def mistake(monkeypatch, capsys, *argv):
    """The sentence of a user's mistake."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: "), error
    return error


def config_of(recipe="deit", **changes):
    return {**classify.DEFAULTS, **classify.RECIPES[recipe], "recipe": recipe, "model_args": VIT,
            "img_size": 32, "mean": [0.485], "std": [0.229], "exp": None, "label_names": ["A", "B", "C"],
            **changes}


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# Recipes

def timms_rates(config, steps):
    """Rates of timm's scheduler: of the first epoch, and after each `step(value)`."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config["lr"])
    scheduler = CosineLRScheduler(optimizer, t_initial=config["epochs"], lr_min=config["min_lr"],
                                  warmup_t=config["warmup_epochs"], warmup_lr_init=config["warmup_lr"])
    rates = [optimizer.param_groups[0]["lr"]]
    for value in steps:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("recipe", ["a", "b", "deit"])
def test_rate_of_every_epoch_is_timms(recipe):
    config = config_of(recipe)
    ours = [classify.learning_rate(epoch, config) for epoch in range(31)]
    assert ours == pytest.approx(timms_rates(config, range(1, 31)), rel=1e-12)


@pytest.mark.parametrize("recipe, lowest, highest", [("a", 1e-6, 1.3e-6), ("b", 0.00998, 0.01)])
def test_a_schedule_stepped_by_the_loss_stays_where_it_begins(recipe, lowest, highest):
    config, losses = config_of(recipe), [0.69, 0.4, 0.2]
    ours = [classify.learning_rate(value, config) for value in (0, *losses)]
    assert ours == pytest.approx(timms_rates(config, losses), rel=1e-12)
    assert all(lowest <= rate <= highest for rate in ours)


@pytest.mark.parametrize("variant, recipe", [
    ("corrected", "a"), ("paper", "a"), ("paper", "b"), ("paper", "deit")])
def test_every_step_has_the_rate_of_its_recipe(variant, recipe, pack, tmp_path, monkeypatch):
    run(monkeypatch, "--train", pack, "--out", tmp_path, *TINY[:-2], "--recipe", recipe, "--variant", variant,
        "--epochs", 3, "--batch", 12, "--log-steps", 1)
    log, config = log_of(tmp_path / "seed0"), config_of(recipe, epochs=3)
    losses = [line["val_loss"] for line in log if "val_loss" in line]
    slipped = variant == "paper" and recipe != "deit"
    expected = np.repeat(timms_rates(config, losses[:2] if slipped else [1, 2]), 2)     # 24 images: two steps
    assert [line["lr"] for line in log if "lr" in line] == pytest.approx(expected, rel=1e-9)


def test_plateau_halves_after_the_sixth_epoch_that_is_no_better(pack, tmp_path, monkeypatch):
    run(monkeypatch, "--train", pack, "--out", tmp_path, *TINY, "--recipe", "resnet", "--lr", "1e-7",
        "--epochs", 14, "--batch", 24)
    rates = [line["lr"] for line in log_of(tmp_path / "seed0") if "lr" in line]
    assert rates == pytest.approx([1e-7] * 7 + [5e-8] * 6 + [2.5e-8])     # the first epoch is the best


def test_recipes_optimisers_and_decay_groups():
    model = timm.create_model("resnet18", num_classes=3)
    kinds = dict(a=torch.optim.AdamW, b=torch.optim.SGD, deit=torch.optim.AdamW, resnet=torch.optim.Adam)
    for recipe, kind in kinds.items():
        config = config_of(recipe)
        optimizer = classify.make_optimizer(model, config)
        assert type(optimizer) is kind
        decayed, spared = optimizer.param_groups
        assert decayed["lr"] == config["lr"]
        assert (decayed["weight_decay"], spared["weight_decay"]) == (config["wd"], 0)
        vectors = {name for name, p in model.named_parameters() if name.endswith("bias") or "bn" in name
                   or "downsample.1" in name}
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in spared["params"]} == vectors
        assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - vectors
        if kind is torch.optim.SGD:
            assert decayed["nesterov"] and decayed["momentum"] == 0.9
    assert classify.RECIPES["deit"]["lr"] == 5e-4 * 64 / 512


# Starts

@pytest.mark.parametrize("arch, first", [("vit_small_patch16_224", "patch_embed.proj"), ("resnet18", "conv1"),
                                         ("convnext_atto", "stem.0"), ("efficientnet_b0", "conv_stem")])
def test_channels_are_adapted_as_named(arch, first, tmp_path):
    args = VIT if arch.startswith("vit") else {}
    for chans, other in ((3, 1), (1, 3)):
        source = timm.create_model(arch, in_chans=chans, num_classes=0, **args).state_dict()
        kernel = source[f"{first}.weight"]
        kernel.copy_(torch.arange(kernel.numel()).view_as(kernel))
        torch.save({"model": source}, tmp_path / "start.pt")
        red, green, blue = (kernel[:, c % chans] for c in range(3))
        expected = {"average": (red + green + blue) / 3, "sum": red + green + blue} if chans == 3 else \
            {"duplicate": red, "duplicate_mean": red / 3}
        for how, wanted in expected.items():
            model, _ = classify.start(config_of(arch=arch, model_args=args, in_chans=other, channel_adapt=how,
                                                init=str(tmp_path / "start.pt")))
            adapted = model.state_dict()[f"{first}.weight"]
            assert adapted.shape[1] == other
            for channel in range(other):
                torch.testing.assert_close(adapted[:, channel], wanted)


def test_the_new_head_is_small_and_depends_on_the_seed_alone():
    heads = [classify.start(config_of(seed=seed))[0].get_classifier() for seed in (0, 0, 11)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.std().item() == pytest.approx(0.01, rel=0.2) and not heads[0].bias.any()


def resolved(monkeypatch, tmp_path, rows, *argv):
    """The configuration and seeds that a command line resolves to."""
    file = tmp_path / "experiments.yaml"
    file.write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(sys, "argv", ["x", "--experiments", str(file), *map(str, argv)])
    parser = classify.argparse.ArgumentParser()
    parser.add_argument("--exp")
    parser.add_argument("--experiments")
    parser.add_argument("--probe", action="store_true")
    args, config = classify.experiment_row(parser, classify.DEFAULTS, "finetune")
    seeds = classify.resolve(args, config)
    return config, seeds


def test_flags_beat_the_row_and_the_row_beats_recipe_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = tmp_path / "runs/x/pretrain/backbone.pt"
    backbone.parent.mkdir(parents=True)
    torch.save(dict(model={}, arch="vit_base_patch16_224", model_args={"depth": 2}, in_chans=3, img_size=96,
                    mean=[0.1] * 3, std=[0.2] * 3), backbone)
    rows = {"defaults": {"in_chans": 1, "arch": "resnet50", "init": "random"},
            "x": {"pretrain": {"img_size": 96}, "finetune": {"recipe": "b", "lr": 0.5}},
            "y": {"init": "exp:x", "img_size": 224, "in_chans": 1, "finetune": {"seeds": [3, 4]}},
            "z": {}, "paper": {"variant": "paper", "finetune": {"recipe": "resnet"}}}
    config, seeds = resolved(monkeypatch, tmp_path, rows, "--exp", "x", "--wd", 0.25)
    assert config["init"] == "exp:x" and (config["arch"], config["in_chans"], config["img_size"]) == (
        "vit_base_patch16_224", 3, 96)
    assert config["mean"] == [0.1] * 3 and config["model_args"] == {"depth": 2}
    assert (config["optimizer"], config["lr"], config["wd"], config["min_lr"]) == ("sgd", 0.5, 0.25, 1e-5)
    assert seeds == [0, 11, 21, 42, 100]
    config, seeds = resolved(monkeypatch, tmp_path, rows, "--exp", "y")
    assert (config["in_chans"], config["img_size"], config["mean"], seeds) == (1, 224, [0.485], [3, 4])
    config, _ = resolved(monkeypatch, tmp_path, rows, "--exp", "x", "--init", "random")
    assert (config["init"], config["arch"]) == ("random", "resnet50")
    assert resolved(monkeypatch, tmp_path, rows, "--exp", "paper")[1] == [0, 1, 2]
    assert resolved(monkeypatch, tmp_path, rows, "--exp", "z", "--seeds", "5,6")[1] == [5, 6]
    assert resolved(monkeypatch, tmp_path, rows, "--exp", "z", "--seeds", "7")[1] == [7]


# Labels

def test_uncertain_and_blank_cells_follow_their_policies():
    rows = pd.DataFrame({"A": ["1", "0", "-1", "", "1.0"]})
    for uncertain, blank, values, known in (("zeros", "zero", [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]),
                                            ("ones", "zero", [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]),
                                            ("ignore", "ignore", [1, 0, 0, 0, 1], [1, 1, 0, 0, 1])):
        found = classify.read_labels("m.csv", rows, ["A"], uncertain, blank)
        assert found[0][:, 0].tolist() == values and found[1][:, 0].tolist() == known


def test_loss_equals_a_loop_over_known_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    values = (torch.rand(5, 3, generator=generator) < 0.5).float()
    known = (torch.rand(5, 3, generator=generator) < 0.7).float()
    weight = torch.tensor([1.0, 4.0, 0.5])
    total = 0.0
    for i in range(5):
        for k in range(3):
            p = 1 / (1 + np.exp(-logits[i, k].item()))
            total -= known[i, k].item() * (np.log(p) * weight[k].item() if values[i, k] else np.log(1 - p))
    assert classify.label_loss(logits, values, known, weight).item() == pytest.approx(total, rel=1e-5)
    balanced = classify.positive_weight("balanced", values, known, "cpu")
    for k in range(3):
        seen = values[known[:, k] > 0, k]
        assert balanced[k] == max(1, (seen == 0).sum()) / max(1, (seen == 1).sum())


def test_validation_scores_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (40, 3)).astype(np.float32)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    values[:, 2] = 0
    known = (rng.random((40, 3)) < 0.8).astype(np.float32)
    data = type("data", (), dict(values=torch.tensor(values), known=torch.tensor(known)))
    found = classify.scores(torch.tensor(logits), data, ["A", "B", "C"])
    kept = [known[:, k] > 0 for k in range(3)]
    aucs = [roc_auc_score(values[kept[k], k], logits[kept[k], k]) for k in range(2)]
    assert (found["val_auc_A"], found["val_auc_B"], found["val_auc_C"]) == (*aucs, None)
    assert found["val_auc"] == pytest.approx(np.mean(aucs))
    p = 1 / (1 + np.exp(-logits.astype(float)))
    loss = log_loss(values[known > 0], p[known > 0], labels=[0, 1])
    assert found["val_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 11])
def test_a_share_of_the_labels_is_taken_by_patient_and_by_rarest_finding(seed):
    rng = np.random.default_rng(seed)
    patient = np.array([f"p{i}" for i in rng.integers(0, 300, 1000)], object)
    positive = rng.random((1000, 4)) < [0.3, 0.1, 0.02, 0.004]
    rows = pd.DataFrame({"path": [str(i) for i in range(1000)], "patient": patient})
    findings = {p: positive[patient == p].any(0) for p in set(patient)}
    frequency = sum(findings.values())
    group = {p: min(np.flatnonzero(has), key=lambda k: frequency[k], default=-1)
             for p, has in findings.items()}
    before = set()
    for share in (0.01, 0.1, 0.5):
        chosen = classify.patient_subset(rows, positive, share, seed)
        kept = set(patient[chosen])
        assert sorted(chosen) == list(np.flatnonzero(np.isin(patient, list(kept))))         # whole patients
        assert before <= kept                                                               # nested
        for k in set(group.values()):
            members = [p for p in group if group[p] == k]
            assert len(kept & set(members)) == np.ceil(share * len(members))
        before = kept
    nameless = classify.patient_subset(rows.assign(patient=""), positive, 0.5, seed)
    assert len(nameless) == pytest.approx(500, abs=3)


# Views

def test_validation_view_is_pillows_resize_and_centre_crop(pack):
    images = np.load(pack.parent / "images.npy")[:4]
    view = classify.validation_view(torch.tensor(images)[:, None], config_of(img_size=28))
    for image, found in zip(images, view):
        whole = np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR))         # 28 / 0.875
        found = (found[0] * 0.229 + 0.485) * 255
        assert (found.numpy() - whole[2:30, 2:30]).__abs__().max() < 0.51                   # Pillow rounds


def test_training_view_is_torchvisions_crop_flip_and_rotation():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    images = np.stack([np.array(Image.fromarray(c).resize((60, 60), Image.BICUBIC)) for c in coarse])
    u = torch.rand(6, classify.N_CROP + 1, generator=torch.Generator().manual_seed(1))
    views = classify.augment(torch.tensor(images)[:, None], u, config_of(img_size=48, rotation=7.0))
    boxes = torch.stack(classify.crop_boxes(u, 60, 60, (0.08, 1)), 1).int().tolist()
    for image, row, (top, left, height, width), view in zip(images, u, boxes, views):
        wanted = tv.resized_crop(Image.fromarray(image), top, left, height, width, [48, 48])
        wanted = tv.hflip(wanted) if row[22] < 0.5 else wanted
        angle = 7 * (2 * row[classify.N_CROP].item() - 1)
        turned = [np.asarray(tv.rotate(wanted, sign * angle)) for sign in (1, -1)]
        found = ((view[0] * 0.229 + 0.485) * 255).numpy()
        # rotation picks the nearest pixel: either of two neighbours at a tie
        assert min(np.abs(found - one).mean() for one in turned) < 1


# Training

def test_processes_and_micro_batches_do_not_change_the_weights(tmp_path, monkeypatch):
    uneven = make_pack(tmp_path / "pack", 78)       # batches of 12, 12 and 2: the third process has none
    flags = ["--train", uneven, *TINY, "--epochs", 3, "--batch", 12, "--lr", "1e-3", "--drop_path", 0.3]
    run(monkeypatch, *flags, "--out", tmp_path / "1")
    run(monkeypatch, *flags, "--out", tmp_path / "micro", "--micro-batch", 5)
    result = run_script("finetune/classify.py", *flags, "--out", tmp_path / "3", nproc=3)
    assert result.returncode == 0, result.stderr[-2000:]
    one = weights(tmp_path / "1/seed0/last.pt")
    assert largest_difference(one, weights(tmp_path / "micro/seed0/last.pt")) < 1e-5        # six steps
    assert largest_difference(one, weights(tmp_path / "3/seed0/last.pt")) < 1e-5
    for one, three in zip(log_of(tmp_path / "1/seed0"), log_of(tmp_path / "3/seed0")):
        assert one.get("val_loss", 0) == pytest.approx(three.get("val_loss", 0), rel=1e-5)


@pytest.mark.slow
def test_batch_norm_sees_the_images_of_all_processes(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *TINY[2:], "--arch", "resnet18", "--img_size", 32, "--recipe", "b",
             "--model_args", '{"channels": [16, 16, 32, 32], "layers": [1, 1, 1, 1]}', "--epochs", 2,
             "--batch", 12]
    run(monkeypatch, *flags, "--out", tmp_path / "1")
    result = run_script("finetune/classify.py", *flags, "--out", tmp_path / "2", nproc=2)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (weights(tmp_path / f"{n}/seed0/last.pt") for n in (1, 2))
    assert largest_difference(one, two) < 1e-5


def test_steps_then_the_rest_equals_a_whole_run(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *TINY, "--epochs", 3, "--batch", 12]
    whole, parts = (tmp_path / name / "seed0/classifier.pt" for name in ("whole", "parts"))
    run(monkeypatch, *flags, "--out", tmp_path / "whole")
    run(monkeypatch, *flags, "--out", tmp_path / "parts", "--steps", 1)
    assert parts.exists()                                               # the grid is walked with --steps 2
    run(monkeypatch, *flags, "--out", tmp_path / "parts")
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_network_learns_the_same(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *TINY, "--model_args", json.dumps({**VIT, "depth": 2}), "--epochs", 2,
             "--batch", 12, "--drop_path", 0.3, "--lr", "1e-3"]
    for name, more in dict(eager=[], compiled=["--compile"]).items():
        run(monkeypatch, *flags, "--out", tmp_path / name, *more)
    eager, compiled = (weights(tmp_path / name / "seed0/last.pt") for name in ("eager", "compiled"))
    assert largest_difference(eager, compiled) < 1e-5


def test_a_full_gpu_is_told_with_the_passes_that_would_fit(pack, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError
    monkeypatch.setattr(classify, "label_loss", full)
    said = mistake(monkeypatch, capsys, "--train", pack, *TINY, "--out", tmp_path, "--batch", 24,
                   "--micro-batch", 12)
    assert said == "error: GPU memory is too small for 12 images a pass; try --micro-batch 6"


def test_finished_seeds_are_not_repeated(pack, tmp_path, monkeypatch, capsys):
    flags = ["--train", pack, *TINY, "--epochs", 1, "--out", tmp_path]
    run(monkeypatch, *flags)
    classifier, other = tmp_path / "seed0/classifier.pt", tmp_path / "seed11"
    made = classifier.stat().st_mtime_ns
    run(monkeypatch, *flags, "--seeds", "0,11")
    assert "seed0: finished" in capsys.readouterr().out
    assert classifier.stat().st_mtime_ns == made and (other / "curve.png").exists()
    assert largest_difference(weights(tmp_path / "seed0/last.pt"), weights(other / "last.pt")) > 0
    assert "made with lr" in mistake(monkeypatch, capsys, *flags, "--lr", 1)


def test_the_best_epoch_is_stored_and_patience_ends_a_run(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *TINY, *EASY, "--epochs", 12, "--batch", 12]
    for select, key, sign in (("auc", "val_auc", 1), ("loss", "val_loss", -1)):
        out = tmp_path / select
        run(monkeypatch, *flags, "--out", out, "--select", select)
        scores = [sign * line[key] for line in log_of(out / "seed0") if key in line]
        best = torch.load(out / "seed0/classifier.pt", weights_only=True)
        assert best["epoch"] == 1 + np.argmax(scores) and len(scores) == 12
    noise = make_pack(tmp_path / "noise", 72, shuffled=True)        # nothing to learn: validation gets worse
    run(monkeypatch, *flags, "--train", noise, "--out", tmp_path / "patient", "--patience", 2)
    losses = [line["val_loss"] for line in log_of(tmp_path / "patient/seed0") if "val_loss" in line]
    stale = [loss >= min(losses[:i]) if i else False for i, loss in enumerate(losses)]
    assert stale[-2:] == [True, True] and (True, True) not in zip(stale[:-2], stale[1:-1])


def test_a_tiny_set_is_learnt_by_heart(tmp_path, monkeypatch):
    manifest = make_pack(tmp_path / "pack", 16, (1, 0, 0))
    run(monkeypatch, "--train", manifest, "--val-split", "train", "--out", tmp_path / "run", *TINY, *EASY,
        "--epochs", 80, "--crop_scale", "[1, 1]", "--crop_pct", 1, "--lr", "3e-4")
    assert [line["val_auc"] for line in log_of(tmp_path / "run/seed0") if "val_auc" in line][-1] == 1.0


def test_shuffled_labels_cannot_be_predicted(tmp_path, monkeypatch):
    aucs = {}
    for shuffled in (False, True):
        manifest = make_pack(tmp_path / f"pack{shuffled}", 500, (0.4, 0.6, 0), shuffled)
        out = tmp_path / f"run{shuffled}"
        run(monkeypatch, "--train", manifest, "--out", out, *TINY, *EASY, "--epochs", 5, "--batch", 20)
        aucs[shuffled] = [line["val_auc"] for line in log_of(out / "seed0") if "val_auc" in line][-1]
    # the last epoch, chosen by nothing; sd of an AUC of 150 against 150 without signal, mean of three labels
    sd = np.sqrt((150 + 150 + 1) / (12 * 150 * 150) / 3)
    assert abs(aucs[True] - 0.5) < 3.3 * sd and aucs[False] > 0.5 + 6 * sd, aucs


def test_classifier_loads_strictly_into_timm_without_this_project(pack, tmp_path, monkeypatch):
    run(monkeypatch, "--train", pack, "--out", tmp_path, *TINY, "--epochs", 1, "--in_chans", 3)
    code = """
import sys, timm, torch
c = torch.load(sys.argv[1], weights_only=True)
model = timm.create_model(c["arch"], in_chans=c["in_chans"], num_classes=len(c["labels"]), **c["model_args"])
model.load_state_dict(c["model"], strict=True)
print(c["labels"], c["img_size"], c["mean"], c["exp"], c["seed"], c["epoch"], c["config"]["recipe"])
"""
    command = [sys.executable, "-I", "-c", code, tmp_path / "seed0/classifier.pt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "['A', 'B', 'C'] 32 [0.485, 0.456, 0.406] None 0 1 deit", result.stderr


def test_probe_is_a_logistic_regression_on_frozen_features(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "PROBE_C", [0.1])
    run(monkeypatch, "--train", pack, "--out", tmp_path, *TINY, "--probe", "--crop_pct", 1)
    saved = torch.load(tmp_path / "seed0/classifier.pt", weights_only=True)
    torch.manual_seed(0)
    frozen = timm.create_model(saved["arch"], in_chans=1, num_classes=3, **VIT).eval()
    trunk = {name: value for name, value in frozen.state_dict().items() if not name.startswith("head")}
    assert largest_difference(trunk, {name: saved["model"][name] for name in trunk}) == 0
    images, table = np.load(pack.parent / "images.npy"), pd.read_csv(pack)
    x = (torch.tensor(images)[:, None] / 255 - 0.485) / 0.229
    with torch.inference_mode():
        features = frozen.forward_features(x)[:, 0].numpy()
        frozen.load_state_dict(saved["model"])
        logits = frozen(x).numpy()
    train = (table["split"] == "train").to_numpy()
    features = StandardScaler().fit(features[train]).transform(features)
    for k, label in enumerate("ABC"):
        regression = LogisticRegression(C=0.1, max_iter=1000).fit(features[train], table[label][train])
        np.testing.assert_allclose(logits[:, k], regression.decision_function(features), atol=2e-3)


@pytest.mark.slow
def test_two_processes_probe_as_one_does(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *TINY, "--probe", "--seeds", "0,1"]
    run(monkeypatch, *flags, "--out", tmp_path / "1")
    result = run_script("finetune/classify.py", *flags, "--out", tmp_path / "2", nproc=2)
    assert result.returncode == 0, result.stderr[-2000:]
    for seed in ("seed0", "seed1"):
        one, two = (torch.load(tmp_path / n / seed / "classifier.pt", weights_only=True) for n in "12")
        assert largest_difference(one["model"], two["model"]) == 0


def test_few_labels_and_ignored_labels_train(pack, tmp_path, monkeypatch, capsys):
    table = pd.read_csv(pack, dtype=str)
    table.loc[table.index % 3 == 0, "A"] = "-1"
    (tmp_path / "pack").mkdir()
    os.link(pack.parent / "images.npy", tmp_path / "pack/images.npy")
    table.to_csv(tmp_path / "pack/manifest.csv", index=False)
    run(monkeypatch, "--train", tmp_path / "pack/manifest.csv", "--out", tmp_path / "run", *TINY,
        "--epochs", 2, "--labels", 0.5, "--uncertain", "ignore", "--pos_weight", "balanced",
        "--label_names", "[A, C]")
    out = capsys.readouterr().out
    assert "2 labels" in out and "24 to validate" in out and " 24 images" not in out
    assert torch.load(tmp_path / "run/seed0/classifier.pt", weights_only=True)["labels"] == ["A", "C"]


# Mistakes

def test_mistakes_are_named_in_one_sentence(pack, tmp_path, monkeypatch, capsys):
    flags = ["--train", pack, "--out", tmp_path / "out", *TINY]
    table = pd.read_csv(pack, dtype=str)
    (tmp_path / "odd").mkdir()
    os.link(pack.parent / "images.npy", tmp_path / "odd/images.npy")
    odd = tmp_path / "odd/manifest.csv"
    table.assign(A=["yes" if i == 7 else "0" for i in range(len(table))]).to_csv(odd, index=False)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "misfit.pt")
    for argv, part in (
            (["--train", odd], "odd/manifest.csv row 9: label 'A' is 'yes'; expected 1, 0, -1 or blank"),
            (["--train", tmp_path / "none.csv"], "none.csv does not exist"),
            (["--val-split", "dev"], "no rows of split 'dev'"),
            (["--label_names", "[A, Bee]"], "no label column 'Bee'"),
            (["--recipe", "c"], "recipe is 'c'; expected a, b, deit, resnet"),
            (["--select", "best"], "select is 'best'"),
            (["--lr", "fast"], "lr is 'fast'; expected a number"),
            (["--epochs", 0], "epochs is 0"),
            (["--labels", 2], "labels is 2.0"),
            (["--seeds", "one"], "seeds is 'one'"),
            (["--pos_weight", "[1, 2]"], "pos_weight is [1, 2]"),
            (["--init", tmp_path / "absent.pt"], "absent.pt does not exist"),
            (["--init", tmp_path / "misfit.pt"], "misfit.pt fills 0 of"),
            (["--init", "exp:nope"], "runs/nope/pretrain/backbone.pt does not exist"),
            (["--arch", "vit_giant_ant"], "timm cannot make vit_giant_ant"),
            (["--exp", "99.9"], "no experiment '99.9'")):
        assert part in mistake(monkeypatch, capsys, *flags, *argv)
    table.assign(A="0", B="0", C="0").to_csv(odd, index=False)
    assert "no label has both classes" in mistake(monkeypatch, capsys, *flags, "--train", odd, "--epochs", 1)
    monkeypatch.setattr(classify, "init_distributed", lambda device: (0, 2, torch.device("cpu")))
    said = mistake(monkeypatch, capsys, *flags, "--batch", 9)
    assert "2 processes do not divide the global batch of 9" in said


def test_patients_on_both_sides_are_pointed_out(pack, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--train", pack, "--val-split", "train", "--out", tmp_path, *TINY, "--epochs", 1)
    assert "warning: 12 patients are in training and in validation" in capsys.readouterr().err


def test_the_copied_file_alone_learns_from_image_files_of_any_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        shape = (40 + i, 36) if i % 2 else (40 + i, 36, 3)                  # grey and colour
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    pd.DataFrame({"path": names, "split": ["train"] * 8 + ["val"] * 4, "ill": [0, 1] * 6}).to_csv(
        tmp_path / "manifest.csv", index=False)
    (tmp_path / "classify.py").write_bytes((ROOT / "finetune/classify.py").read_bytes())
    spec = importlib.util.spec_from_file_location("copied_classify", tmp_path / "classify.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    monkeypatch.chdir(tmp_path)
    run_here(copied, monkeypatch, "--train", "manifest.csv", "--out", "run", *TINY, "--epochs", 1,
             "--in_chans", 3)
    assert torch.load(tmp_path / "run/seed0/classifier.pt", weights_only=True)["labels"] == ["ill"]
