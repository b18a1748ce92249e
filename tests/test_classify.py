"""Facts about finetune/classify.py, each against an independent formulation."""

import json
import math
import os
import re
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
import yaml
from conftest import fork_script, load_script, log_of, run_here, write_pack
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import nn

classify = load_script("finetune/classify.py")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
LABELS = ["C", "A", "B"]
SMALL = ["--model_args", json.dumps(VIT), "--device", "cpu", "--warmup_epochs", 1]
EASY = ["--crop_scale", "[0.8, 1]", "--rotation", 0, "--drop_path", 0, "--lr", "3e-3"]
run = partial(run_here, classify)


def make_pack(folder, n, shares=(1 / 3, 1 / 3, 1 / 3), shuffled=False):
    """Grey noise with a bright bar for each of three labels, two images a patient, labels shuffled or not."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    labels, images = rng.integers(0, 2, (n, 3)), rng.integers(60, 120, (n, 32, 32), dtype=np.uint8)
    for k in range(3):
        images[:, 4 + 10 * k:9 + 10 * k, 8:24] += (labels[:, k, None, None] * 90).astype(np.uint8)
    split = np.repeat(["train", "val", "test"], np.diff([0, *np.round(np.cumsum(shares) * n).astype(int)]))
    labels = rng.permutation(labels) if shuffled else labels
    return write_pack(folder, images, split=split, patient=[f"p{i // 2}" for i in range(n)],
                      **dict(zip(LABELS, labels.T)))


def changed_pack(pack, folder, **columns):
    """The same images under a manifest with other columns; None leaves one out."""
    table = pd.read_csv(pack, dtype=str).assign(**{name: x for name, x in columns.items() if x is not None})
    folder.mkdir()
    os.link(pack.parent / "images.npy", folder / "images.npy")
    table = table.drop(columns=[name for name, x in columns.items() if x is None])
    table.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


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
    small = dict(model_args=VIT, img_size=32, mean=[0.485], std=[0.229], exp=None, label_names=LABELS)
    return {**classify.DEFAULTS, **classify.RECIPES[recipe], "recipe": recipe, **small, **changes}


def load(file):
    return torch.load(file, weights_only=True)


def assert_close(found, wanted, atol):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=name, check_stride=False)


# Recipes

def rates_of(config, values):
    """The first epoch's rate, and after each step of the scheduler by `value`, from the definition.

    Linear from warmup_lr to lr, then half a cosine over all epochs. value: of an epoch; the slip: a loss.
    """
    rates = []
    for value in (0, *values):
        warm, share = value / max(1, config["warmup_epochs"]), value / config["epochs"]
        cosine = config["lr"] * (1 + math.cos(math.pi * share)) / 2 + \
            config["min_lr"] * (1 - math.cos(math.pi * share)) / 2
        linear = config["lr"] * warm + config["warmup_lr"] * (1 - warm)
        rates.append(linear if value < config["warmup_epochs"] else cosine)
    return rates


def scheduled(config, values):
    """Rates of the script's own scheduler, likewise."""
    optimizer, scheduler = classify.make_optimizer(nn.Linear(2, 2), config)
    rates = [optimizer.param_groups[0]["lr"]]
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("recipe", ["a", "b", "deit"])
def test_rate_of_every_epoch_is_warm_up_and_cosine(recipe):
    config, epochs = config_of(recipe), range(1, 31)
    assert scheduled(config, epochs) == pytest.approx(rates_of(config, epochs), rel=1e-12)


@pytest.mark.parametrize("recipe, lowest, highest", [("a", 1e-6, 1.3e-6), ("b", 0.00998, 0.01)])
def test_a_schedule_stepped_by_the_loss_stays_where_it_begins(recipe, lowest, highest):
    config, losses = config_of(recipe), [0.69, 0.4, 0.2]
    rates = scheduled(config, losses)
    assert rates == pytest.approx(rates_of(config, losses), rel=1e-12)
    assert all(lowest <= rate <= highest for rate in rates)


@pytest.mark.parametrize("variant, recipe", [
    ("corrected", "a"), ("paper", "a"), ("paper", "b"), ("paper", "deit")])
def test_every_step_has_the_rate_of_its_recipe(variant, recipe, pack, tmp_path, monkeypatch):
    flags = ["--recipe", recipe, "--variant", variant, "--epochs", 3, "--batch", 12, "--log-steps", 1]
    run(monkeypatch, "--train", pack, "--out", tmp_path, *SMALL[:-2], "--seeds", 0, *flags)
    log, config = log_of(tmp_path / "seed0"), config_of(recipe, epochs=3)
    losses = [line["val_loss"] for line in log if "val_loss" in line]
    slipped = variant == "paper" and recipe != "deit"
    expected = np.repeat(rates_of(config, losses[:2] if slipped else [1, 2]), 2)     # 24 images: two steps
    assert [line["lr"] for line in log] == pytest.approx(expected, rel=1e-9)


def test_plateau_halves_after_six_epochs_that_are_no_better_and_through_a_resume(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, "--out", tmp_path, *SMALL, "--seeds", 0, "--recipe", "resnet", "--lr", "1e-7",
             "--epochs", 14, "--batch", 24, "--patience", 100]
    for steps in (4, 9, 14):                                            # one step an epoch
        run(monkeypatch, *flags, "--steps", steps)
    rates = [line["lr"] for line in log_of(tmp_path / "seed0")]
    assert rates == pytest.approx([1e-7] * 7 + [5e-8] * 6 + [2.5e-8])   # the first epoch is the best


def test_plateau_is_of_the_validation_loss(pack, tmp_path, monkeypatch):
    """Counted out where the loss falls too; better is by 1e-4 of the lowest."""
    run(monkeypatch, "--train", pack, "--out", tmp_path, *SMALL, *EASY, "--seeds", 0, "--recipe", "resnet",
        "--lr", "1e-3", "--epochs", 12, "--batch", 24, "--patience", 100)
    log, rate, lowest, stale = log_of(tmp_path / "seed0"), 1e-3, math.inf, 0
    better = []
    for line in log:
        assert line["lr"] == pytest.approx(rate)
        better.append(line["val_loss"] < lowest * (1 - 1e-4))
        lowest, stale = (line["val_loss"], 0) if better[-1] else (lowest, stale + 1)
        if stale == 6:
            rate, stale = rate / 2, 0
    assert sum(better) > 7                                              # counting epochs would halve it


def test_a_rate_that_would_rise_is_pointed_out(pack, tmp_path, monkeypatch, capsys):
    flags = ["--train", pack, *SMALL, "--batch", 12, "--epochs", 2, "--steps", 1, "--seeds", 0]
    for rate, rises in (("9e-6", True), ("1.1e-5", False)):             # of deit the cosine ends at 1e-5
        run(monkeypatch, *flags, "--lr", rate, "--out", tmp_path / rate)
        assert ("rate rises" in capsys.readouterr().err) == rises
    run(monkeypatch, *flags, "--lr", "9e-6", "--schedule", "plateau", "--out", tmp_path / "plateau")
    assert "rate rises" not in capsys.readouterr().err


def test_sigterm_in_the_last_step_ends_a_seed_as_ever(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "catch_sigterm", lambda: lambda: True)
    run(monkeypatch, "--train", pack, "--out", tmp_path, *SMALL, "--seeds", 0, "--batch", 12, "--steps", 1)
    assert load(tmp_path / "seed0/last.pt")["step"] == load(tmp_path / "seed0/classifier.pt")["step"] == 1


def spared(arch, name):
    """What timm's no_weight_decay() of each architecture says, and biases and norms."""
    tokens = name in ("pos_embed", "cls_token")
    norm = "norm" in name or "bn" in name or "downsample.1" in name
    tables = name.endswith("relative_position_bias_table")
    return norm or name.endswith("bias") or arch != "resnet18" and (tokens or tables)


@pytest.mark.parametrize("arch", ["vit_small_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("recipe, kind", [
    ("a", torch.optim.AdamW), ("b", torch.optim.SGD), ("deit", torch.optim.AdamW),
    ("resnet", torch.optim.Adam)])
def test_optimisers_and_what_weight_decay_spares(arch, recipe, kind):
    small = dict(vit=dict(depth=1), swin=dict(depths=[1, 1], embed_dim=24, num_heads=[1, 1]), resnet18={})
    model = timm.create_model(arch, num_classes=3, **small[arch.split("_")[0]])
    config = config_of(recipe)
    optimizer, _ = classify.make_optimizer(model, config)
    assert type(optimizer) is kind and config["wd"] == (0.05 if kind is torch.optim.AdamW else 0)
    decay = {parameter: group["weight_decay"]
             for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: decay[parameter] for name, parameter in model.named_parameters()} == {
        name: 0 if spared(arch, name) else config["wd"] for name, _ in model.named_parameters()}
    first = config["lr"] if recipe in ("b", "resnet") else config["warmup_lr"]
    assert all(group["lr"] == first for group in optimizer.param_groups)
    if kind is torch.optim.SGD:
        assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


# Starts, rows, precedence

def test_stochastic_depth_is_of_images_in_networks_with_several_rows_an_image(pack, tmp_path, monkeypatch):
    drop = classify.DropPath()
    drop.kept = torch.tensor([0.0, 1.25])
    rows = drop(torch.ones(6, 4, 5))                        # three rows an image, as in MobileViT
    assert (rows[:3] == 0).all() and (rows[3:] == 1.25).all()
    run(monkeypatch, "--train", pack, "--out", tmp_path, "--arch", "mobilevit_xxs", "--img_size", 32,
        "--device", "cpu", "--batch", 4, "--steps", 1, "--seeds", 0)
    assert len(log_of(tmp_path / "seed0")) == 1


@pytest.mark.parametrize("arch", ["vit_small_patch16_224", "resnet18"])
def test_a_network_takes_images_of_the_rows_size(arch):
    model, _ = classify.initial_model(config_of(arch=arch, model_args={}, img_size=64))
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, len(model.get_classifier().bias))


def test_the_new_head_is_small_and_depends_on_the_seed_alone():
    heads = [classify.initial_model(config_of(seed=seed))[0].get_classifier() for seed in (0, 0, 11)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.std().item() == pytest.approx(0.01, rel=0.2) and not heads[0].bias.any()


@pytest.mark.parametrize("zeroed", [True, False])
def test_last_norms_of_a_resnet_start_at_zero_or_not_as_the_row_says(zeroed):
    model, _ = classify.initial_model(config_of("resnet", arch="resnet18", model_args={"zero_init_last": zeroed}))
    assert all((block.bn2.weight == 1 - zeroed).all() for block in (*model.layer1, *model.layer4))


def resolved(monkeypatch, tmp_path, rows, *argv):
    """The configuration and seeds that a command line resolves to."""
    file = tmp_path / "experiments.yaml"
    file.write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(sys, "argv", [classify.__file__, "--experiments", str(file), *map(str, argv)])
    return classify.resolve(*classify.options("finetune"))


def test_flags_beat_the_row_and_the_row_beats_recipe_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = tmp_path / "runs/x/pretrain/backbone.pt"
    backbone.parent.mkdir(parents=True)
    facts = dict(arch="vit_base_patch16_224", in_chans=3, img_size=96, mean=[0.1] * 3, std=[0.2] * 3)
    torch.save({"model": {}, **facts, "model_args": {"depth": 2, "img_size": 96}}, backbone)
    torch.save({"arch": "vit_small", "state_dict": {}}, tmp_path / "moco.pth")          # as MoCo-v3 stores it
    rows = {"defaults": {"in_chans": 1, "arch": "resnet50", "init": "random", "finetune": {"recipe": "deit"}},
            "x": {"pretrain": {"img_size": 96}, "finetune": {"recipe": "b", "lr": 0.5}},
            "y": {"init": "exp:x", "img_size": 224, "in_chans": 1,
                  "finetune": {"seeds": [3, 4], "drop_path": 0.2, "label_names": ["No Finding", "É"]}},
            "w": {"init": "timm", "pretrain": {}}, "v": {"pretrain": {}, "finetune": {"init": "moco.pth"}},
            "z": {}, "miniature": {"arch": "resnet18", "finetune": {"lr": 0.25}}}
    row = partial(resolved, monkeypatch, tmp_path, rows, "--exp")
    config, seeds = row("x", "--wd", 0.25)
    assert config["init"] == "exp:x" and {key: config[key] for key in facts} == facts
    assert config["model_args"] == {"depth": 2, "img_size": 96} and seeds == [0, 11, 21, 42, 100]
    assert (config["optimizer"], config["lr"], config["wd"], config["min_lr"]) == ("sgd", 0.5, 0.25, 1e-5)
    config, seeds = row("y")
    assert (config["in_chans"], config["img_size"], config["mean"], seeds) == (1, 224, [0.485], [3, 4])
    assert (config["lr"], config["drop_path"]) == (6.25e-5, 0.2)
    assert config["label_names"] == ["No Finding", "É"]
    assert row("y", "--recipe", "a")[0]["drop_path"] == 0.2 and row("z", "--recipe", "a")[0]["drop_path"] == 0
    assert (row("x", "--img-size", 64)[0]["img_size"], row("x", "--mean=0.4")[0]["mean"]) == (64, [0.4] * 3)
    (tmp_path / "runs/w/pretrain").mkdir(parents=True)
    torch.save({}, tmp_path / "runs/w/pretrain/backbone.pt")
    assert row("w")[0]["init"] == "exp:w"               # timm's weights are where its pre-training started
    assert row("v")[0]["init"] == "moco.pth"
    config, _ = row("x", "--init", "random")
    assert (config["init"], config["arch"]) == ("random", "resnet50")
    assert row("z", "--init", "moco.pth")[0]["arch"] == "resnet50"
    card = {**facts, "model_args": {}}
    torch.save({"model": {}, "step": 1, "config": {"lr": 9.0}, **card}, tmp_path / "last.pt")      # of an unfinished run
    config, _ = row("z", "--init", "last.pt")
    assert {key: config[key] for key in facts} == facts and config["lr"] == 6.25e-5
    config, _ = row("x", "--miniature", "true")
    assert (config["arch"], config["lr"], config["optimizer"]) == ("resnet18", 0.25, "sgd")
    assert row("z", "--seeds", "5,6")[1] == [5, 6] and row("z", "--seeds", "7")[1] == [7]
    assert row("z", "--seed", 7)[1] == [7]
    assert row("z", "--label_names", "C,A")[0]["label_names"] == ["C", "A"]


@pytest.mark.parametrize("way", ["finetune", "probe"])
def test_a_row_has_its_own_folder_for_each_way_of_learning(way, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"defaults": {}, "3.4": {"arch": "vit_small_patch16_224", "model_args": VIT, "in_chans": 1}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(row))
    run(monkeypatch, "--experiments", "rows.yaml", "--exp", "3.4", f"--probe={way == 'probe'}", "--train", pack,
        "--batch", 12, "--epochs", 1, "--steps", 1, "--seeds", 5, "--device", "cpu")
    assert [*tmp_path.glob("runs/**/classifier.pt")] == [tmp_path / "runs/3.4" / way / "seed5/classifier.pt"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_network_of_simmim_is_read_out_by_the_mean_of_its_patch_tokens(shared, pack, tmp_path, monkeypatch):
    """As row 0.1.2 asks for by model_args: mean, then its norm; drop path 0.1 over the recipe's 0.

    The bias table of all blocks may become one a block.
    """
    shape = {**VIT, "init_values": 0.1, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    beit = "beit_base_patch16_224"
    encoder = timm.create_model(beit, num_classes=0, in_chans=1, global_pool="token", **shape).state_dict()
    torch.save({"model": {f"encoder.{name}": x for name, x in encoder.items()}}, tmp_path / "simmim.pth")
    seen, take = [], classify.replace_drop_path
    monkeypatch.setattr(classify, "replace_drop_path", lambda model: seen.append(model) or take(model))
    args = {**shape, "global_pool": "avg", "use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    run(monkeypatch, "--train", pack, "--out", tmp_path, "--init", tmp_path / "simmim.pth", "--device", "cpu",
        "--arch", beit, "--model_args", json.dumps(args), "--seeds", 0, "--recipe", "a", "--drop_path", 0.1,
        "--lr", "1e-3", "--epochs", 2, "--batch", 12)
    model = seen[0].eval()
    drops = [module.drop_prob for module in model.modules() if isinstance(module, classify.DropPath)]
    assert drops == pytest.approx([0.05, 0.05, 0.1, 0.1])
    x, features = torch.randn(2, 1, 32, 32), []
    model.blocks[-1].register_forward_hook(lambda *args: features.append(args[-1]))
    found = model(x)
    assert torch.allclose(found, model.head(model.fc_norm(features[0][:, 1:].mean(1))), atol=1e-6)
    for name, value in model.named_parameters():                        # all is learnt
        assert name not in encoder or not torch.equal(value, encoder[name]), name
    assert load(tmp_path / "seed0/classifier.pt")["labels"] == LABELS


# Labels

@pytest.mark.parametrize("uncertain, blank, values, known", [
    ("zeros", "zero", [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]), ("ones", "zero", [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]),
    ("ignore", "ignore", [1, 0, 0, 0, 1], [1, 1, 0, 0, 1])])
def test_uncertain_and_blank_cells_follow_their_policies(uncertain, blank, values, known):
    rows = {"path": list("vwxyz"), "row": range(2, 7), "A": ["1", "0", "-1", "", "1.0"]}
    found = classify.read_labels("m.csv", rows, ["A"], uncertain, blank)
    assert found[0][:, 0].tolist() == values and found[1][:, 0].tolist() == known


@pytest.mark.parametrize("flags, n", [([], 3), (["--uncertain", "ignore"], 2),
                                      (["--uncertain", "ignore", "--blank", "ignore"], None)])
def test_unknown_labels_that_count_are_said(pack, tmp_path, monkeypatch, capsys, flags, n):
    cells = ["-1" if i in (0, 50) else "" if i in (1, 5, 60, 71) else str(i % 2) for i in range(72)]
    odd = changed_pack(pack, tmp_path / "odd", A=cells, split=["train"] * 48 + ["val"] * 24)
    run(monkeypatch, "--train", odd, "--out", tmp_path / "out", *SMALL, "--batch", 12, "--epochs", 1,
        "--steps", 1, "--seeds", 0, "--log_steps", 0, *flags)
    out = capsys.readouterr().out
    for part in ("training", "validation"):
        said = re.search(rf"note: (\d+) uncertain or blank {part} labels count", out)
        assert said is None if n is None else int(said[1]) == n


def test_labels_of_one_class_in_training_or_validation_are_pointed_out(pack, tmp_path, monkeypatch, capsys):
    in_train = np.repeat([True, False], [48, 24])
    truth = {name: pd.read_csv(pack, dtype=str)[name] for name in LABELS}
    cells = dict(C=np.where(in_train, "1", truth["C"]), A=np.where(in_train, truth["A"], "0"),
                 B=np.where(in_train, "", truth["B"]))
    odd = changed_pack(pack, tmp_path / "odd", **cells, split=["train"] * 48 + ["val"] * 24)
    flags = ["--train", odd, *SMALL, "--batch", 12, "--epochs", 2, "--steps", 1, "--seeds", 0]
    run(monkeypatch, *flags, "--blank", "ignore", "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert "training images do not have both classes of C, B\n" in error
    assert "validation images do not have both classes of A\n" in error


def test_loss_and_balance_equal_a_loop_over_known_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    known = (torch.rand(5, 3, generator=generator) < 0.7).float()
    values = (torch.rand(5, 3, generator=generator) < 0.5).float() * known
    weight, total = torch.tensor([1.0, 4.0, 0.5]), 0.0
    for i in range(5):
        for k in range(3):
            p = 1 / (1 + np.exp(-logits[i, k].item()))
            total -= known[i, k].item() * (np.log(p) * weight[k].item() if values[i, k] else np.log(1 - p))
    assert classify.label_loss(logits, values, known, weight).item() == pytest.approx(total, rel=1e-5)
    balanced = classify.positive_weight("balanced", values, known)
    for k in range(3):
        seen = values[known[:, k] > 0, k]
        assert balanced[k] == max(1, (seen == 0).sum()) / max(1, (seen == 1).sum())
    assert classify.positive_weight([1, 4, 0.5], values, known).tolist() == weight.tolist()
    assert classify.positive_weight(2, values, known).tolist() == [2, 2, 2]


def test_validation_scores_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (40, 3)).astype(np.float32)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    values[:, 2] = 0
    known = (rng.random((40, 3)) < 0.8).astype(np.float32)
    found = classify.scores_of(*map(torch.tensor, (logits, values, known)), LABELS)
    kept = [known[:, k] > 0 for k in range(3)]
    aucs = [roc_auc_score(values[kept[k], k], logits[kept[k], k]) for k in range(2)]
    assert [found[f"val_auc_{label}"] for label in LABELS[:2]] == aucs and f"val_auc_{LABELS[2]}" not in found
    assert found["val_auc"] == pytest.approx(np.mean(aucs))
    p = 1 / (1 + np.exp(-logits.astype(float)))
    wanted = log_loss(values[known > 0], p[known > 0], labels=[0, 1])
    assert found["val_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 11])
def test_a_share_of_the_labels_is_taken_by_patient_and_by_rarest_finding(seed):
    rng = np.random.default_rng(seed)
    patient = np.array([f"p{i}" for i in rng.integers(0, 300, 1000)], object)
    path = np.array([f"{i}.png" for i in range(1000)], object)
    positive = rng.random((1000, 4)) < [0.3, 0.1, 0.02, 0.004]
    findings = {p: positive[patient == p].any(0) for p in set(patient)}
    frequency = sum(findings.values())
    group = {p: min(np.flatnonzero(has), key=lambda k: frequency[k], default=-1)
             for p, has in findings.items()}

    def subset(share, order, patient=patient):
        rows, values = {"path": path[order], "patient": patient[order]}, torch.tensor(positive[order]).float()
        return classify.patient_subset(rows, values, share, seed)

    before, as_read = set(), np.arange(1000)
    for share in (0.01, 0.07, 0.1, 0.5, 1):
        chosen = subset(share, as_read)
        kept = set(patient[chosen])
        assert sorted(chosen) == list(np.flatnonzero(np.isin(patient, list(kept))))     # whole patients
        assert before <= kept                                                           # nested
        for k in set(group.values()):
            members = [p for p in group if group[p] == k]
            assert len(kept & set(members)) == math.ceil(round(share * len(members), 6))
        order = rng.permutation(1000)
        assert {*path[order][subset(share, order)]} == {*path[chosen]}                  # in any order
        before = kept
    assert len(subset(0.5, as_read, patient * 0)) == pytest.approx(500, abs=3)          # nameless
    other = classify.patient_subset({"path": path, "patient": patient}, torch.tensor(positive), 0.1, seed + 1)
    assert {*patient[other]} != {*patient[subset(0.1, as_read)]}


def test_few_and_ignored_labels_train_in_the_order_asked_for(pack, tmp_path, monkeypatch, capsys):
    augment, seen = classify.augment, []
    monkeypatch.setattr(classify, "augment", lambda images, u, config: (
        seen.extend(image.numpy().tobytes() for image in images), augment(images, u, config))[1])
    marked = pd.read_csv(pack, dtype=str)["A"].where(np.arange(72) % 3 > 0, "-1")
    manifest = changed_pack(pack, tmp_path / "pack", A=marked)
    run(monkeypatch, "--train", manifest, "--out", tmp_path / "run", *SMALL, "--seeds", 0, "--epochs", 2,
        "--labels", 0.5, "--uncertain", "ignore", "--pos_weight", "balanced", "--label_names", "[B, A]",
        "--batch", 2)
    table, images = pd.read_csv(manifest)[:24], np.load(pack.parent / "images.npy")
    values = torch.tensor(table[["B", "A"]].to_numpy() == 1).float()
    chosen = classify.patient_subset({name: table[name].tolist() for name in table}, values, 0.5, 0)
    assert {*seen} == {images[place].tobytes() for place in chosen} and 2 < len(chosen) < 24
    out = capsys.readouterr().out
    assert "2 labels" in out and "24 to validate" in out and " 24 images" not in out
    assert load(tmp_path / "run/seed0/classifier.pt")["labels"] == ["B", "A"]


# Views

@pytest.mark.parametrize("text", ['"Mass, left",Épanchement', '["Mass, left", "Épanchement"]'])
def test_a_label_may_have_commas_and_any_letters(pack, tmp_path, monkeypatch, capsys, text):
    table = pd.read_csv(pack)
    odd = changed_pack(pack, tmp_path / "odd", **{"Mass, left": table["B"], "Épanchement": table["A"]})
    run(monkeypatch, "--train", odd, "--out", tmp_path, *SMALL, "--batch", 12, "--epochs", 1, "--seeds", 0,
        "--label_names", text)
    assert load(tmp_path / "seed0/classifier.pt")["labels"] == ["Mass, left", "Épanchement"]
    assert {"val_auc_Mass, left", "val_auc_Épanchement"} < log_of(tmp_path / "seed0")[0].keys()
    said = capsys.readouterr().out
    assert "val_auc 0." in said and "val_auc_" not in said and max(map(len, said.splitlines()[1:])) < 200     # a line for people


def test_validation_view_is_pillows_resize_and_centre_crop(pack):
    images = np.load(pack.parent / "images.npy")[:4]
    for crop_pct, edge in ((0.875, 2), (1.0, 0)):
        config = config_of(img_size=28, crop_pct=crop_pct)
        view = classify.validation_view(torch.tensor(images)[:, None], config)
        for image, found in zip(images, view):
            whole = np.asarray(Image.fromarray(image).resize((28 + 2 * edge,) * 2, Image.BILINEAR))
            found = ((found[0] * 0.229 + 0.485) * 255).numpy()
            error = np.abs(found - whole[edge:edge + 28, edge:edge + 28])
            assert error.max() < 1.01 and error.mean() < 0.4                            # Pillow rounds twice


@pytest.mark.parametrize("rotation, noise, worst", [(7, 8, None), (0, 60, 1.01)])       # Pillow rounds twice
def test_training_view_is_torchvisions_crop_flip_and_rotation(rotation, noise, worst):
    coarse = np.random.default_rng(0).integers(0, 256, (6, noise, noise), dtype=np.uint8)
    images = [Image.fromarray(image).resize((60, 60), Image.BICUBIC) for image in coarse]
    u = torch.rand(6, classify.N_CROP + 1, generator=torch.Generator().manual_seed(1))
    pixels = torch.tensor(np.stack([np.array(image) for image in images]))[:, None]
    views = classify.augment(pixels, u, config_of(img_size=48, rotation=rotation))
    begin, length = map(torch.stack, zip(*classify.crop_boxes(u, 60, 60, (0.08, 1))))
    for i, row in enumerate(u.tolist()):
        (top, left), (height, width) = begin[:, i].int().tolist(), length[:, i].int().tolist()
        wanted = tv.resized_crop(images[i], top, left, height, width, [48, 48])
        wanted = tv.hflip(wanted) if row[22] < 0.5 else wanted
        angle = rotation * (2 * row[classify.N_CROP] - 1)
        found = ((views[i, 0] * 0.229 + 0.485) * 255).numpy()
        error = min((np.abs(found - np.asarray(tv.rotate(wanted, sign * angle))) for sign in (1, -1)),
                    key=np.mean)                    # a turn picks the nearest pixel: either one at a tie
        assert error.max() <= worst if worst else error.mean() < 1


# Training written out

class Skip(nn.Module):
    """Stochastic depth of the loops below: an image passes, over 1 - p, where its number is at least p."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, branch):
        if not self.training:
            return branch
        return torch.stack([x / (1 - self.p) if u >= self.p else 0 * x for x, u in zip(branch, self.u)])


def plain_model(seed, drop_path, **args):
    """timm's network and head as a seed starts them, with its stochastic depth replaced by Skip."""
    torch.manual_seed(seed)
    args = dict(in_chans=1, num_classes=3, drop_path_rate=drop_path, **args)
    model = timm.create_model("vit_small_patch16_224", **args)
    nn.init.normal_(model.head.weight, std=0.01)
    nn.init.zeros_(model.head.bias)
    skips = []
    for number, block in enumerate(model.blocks):
        for name in ("drop_path1", "drop_path2") if number else ():
            skips.append(Skip(drop_path * number / (len(model.blocks) - 1)))
            setattr(block, name, skips[-1])
    return model, skips


def plain_groups(model, wd):
    groups = {0: [], wd: []}
    for name, p in model.named_parameters():
        groups[0 if p.ndim == 1 or name in ("pos_embed", "cls_token") else wd].append(p)
    return [dict(params=part, weight_decay=decay) for decay, part in groups.items()]


def without_key_biases(state):
    """Their gradient is zero by the mathematics, where Adam makes steps of rounding noise."""
    for name in state:
        if name.endswith("qkv.bias"):
            state[name][len(state[name]) // 3:len(state[name]) * 2 // 3] = 0
    return state


def draws(seed, step, batch, n):
    """The uniforms of a step, [batch, n], from (seed, step)."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(int(state[0])))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam"])
def test_eight_steps_in_double_precision_are_those_of_a_plain_loop(optimizer, pack, tmp_path, monkeypatch):
    start, augment, views, widths = classify.initial_model, classify.augment, [], set()
    args = {**VIT, "depth": 2}                      # whose last block is left out with 1/2: exact in fp32
    monkeypatch.setattr(classify, "initial_model", lambda config: (start(config)[0].double(), ""))
    monkeypatch.setattr(classify, "augment", lambda images, u, config: views.append(
        augment(images, u, config).double()) or widths.add(u.shape[1]) or views[-1])
    monkeypatch.setattr(classify, "forward_all", lambda *_: torch.randn(24, 3))      # not in double precision
    run(monkeypatch, "--train", pack, "--out", tmp_path, *SMALL, "--seeds", 0, "--epochs", 4, "--batch", 12,
        "--model_args", json.dumps(args), "--optimizer", optimizer, "--lr", 1e-3, "--warmup_lr", 1e-4,
        "--wd", 0.3, "--drop_path", 0.5)
    model, skips = plain_model(0, 0.5, **args)
    model.double()
    kind = dict(adamw=torch.optim.AdamW, sgd=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
                adam=torch.optim.Adam)[optimizer]
    trained, labels = kind(plain_groups(model, 0.3), lr=1), pd.read_csv(pack)[LABELS].to_numpy()[:24]
    rates = rates_of(config_of(epochs=4, lr=1e-3, warmup_lr=1e-4, warmup_epochs=1), [1, 2, 3])
    assert len(views) == 8 and widths == {classify.N_CROP + 1}              # none that skip a block
    for step, view in enumerate(views):
        order = np.random.default_rng([0, step // 2]).permutation(24)[step % 2 * 12:][:12]
        for skip, column in zip(skips, draws(0, step, 12, 24 + len(skips))[:, 24:].T):
            skip.u = column
        y, p = torch.tensor(labels[order]), model(view).sigmoid()
        loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        for group in trained.param_groups:
            group["lr"] = rates[step // 2]
        trained.zero_grad()
        loss.backward()
        trained.step()
    found = load(tmp_path / "seed0/last.pt")["model"]
    assert_close(without_key_biases(found), without_key_biases(model.state_dict()), 1e-9)


def test_a_run_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Two epochs of four steps, seed 11: labels, unknown cells, weights of positives, micro-batches, log."""
    table = pd.read_csv(pack, dtype=str)
    table.loc[table.index % 5 == 0, "A"] = "-1"
    manifest = changed_pack(pack, tmp_path / "pack", A=table["A"])
    run(monkeypatch, "--train", manifest, "--out", tmp_path, *SMALL, "--seeds", 11, "--epochs", 2,
        "--batch", 6, "--micro-batch", 4, "--log-steps", 3, "--drop_path", 0.3, "--lr", 2e-3, "--wd", 0.3,
        "--select", "loss", "--uncertain", "ignore", "--pos_weight", "[3, 1, 0.5]")
    last, saved = load(tmp_path / "seed11/last.pt"), load(tmp_path / "seed11/classifier.pt")
    log = log_of(tmp_path / "seed11")

    config = config_of(lr=2e-3, epochs=2, warmup_epochs=1)
    images = torch.tensor(np.load(pack.parent / "images.npy"))[:, None]
    cells = table[saved["labels"]].astype(float).to_numpy()
    known, values = torch.tensor(cells >= 0), torch.tensor(cells > 0).float()
    model, skips = plain_model(11, 0.3, **VIT)
    optimizer = torch.optim.AdamW(plain_groups(model, 0.3))
    rates, losses, kept = rates_of(config, [1]), [], []
    for step in range(8):
        epoch, number = divmod(step, 4)
        order = np.random.default_rng([11, epoch]).permutation(24)[6 * number:6 * number + 6]
        u = draws(11, step, 6, 24 + len(skips))
        for skip, column in zip(skips, u[:, 24:].T):
            skip.u = column
        p = model(classify.augment(images[order], u, config)).sigmoid()
        weights = torch.tensor([3, 1, 0.5])
        loss = -(weights * values[order] * p.log() + (1 - values[order]) * (1 - p).log())[known[order]].mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rates[epoch]
        optimizer.step()
        losses.append(loss.item())
        kept.append({"step": step + 1, "epoch": epoch + 1, "lr": rates[epoch]})
        if number == 3:
            model.eval()
            with torch.no_grad():
                scores = model(classify.validation_view(images[24:48], config))
            model.train()
            truth, seen, p = values[24:48].numpy(), known[24:48].numpy(), scores.sigmoid().double().numpy()
            aucs = {f"val_auc_{label}": roc_auc_score(truth[seen[:, k], k], p[seen[:, k], k])
                    for k, label in enumerate(LABELS)}
            kept[-1] |= {"val_loss": log_loss(truth[seen], p[seen]), **aucs}
            kept[-1]["val_auc"] = np.mean([*aucs.values()])
        if step in (2, 3, 5, 7):                                        # every third and every epoch
            kept[-1]["loss"] = np.mean(losses)
            losses = []
    lines = [line for line in kept if "loss" in line]
    assert len(log) == len(lines) and all(found.keys() - wanted.keys() == {"img_per_s", "time"}
                                          for found, wanted in zip(log, lines))
    for found, wanted in zip(log, lines):
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    trained = without_key_biases(model.state_dict())
    assert_close(without_key_biases(last["model"]), trained, 1e-6)
    assert saved["labels"] == LABELS and (saved["seed"], saved["step"], saved["epoch"]) == (
        11, *((8, 2) if lines[3]["val_loss"] < lines[1]["val_loss"] else (4, 1)))
    if saved["epoch"] == 2:
        assert_close(without_key_biases(saved["model"]), trained, 1e-6)
    fresh = timm.create_model(saved["arch"], in_chans=saved["in_chans"], num_classes=3, **saved["model_args"])
    fresh.load_state_dict(saved["model"], strict=True)
    assert saved["config"]["select"] == "loss" and saved["config"]["pos_weight"] == [3, 1, 0.5]


# Whole runs

def test_the_best_epoch_is_stored(pack, tmp_path, monkeypatch):
    for select, key, sign in (("auc", "val_auc", 1), ("loss", "val_loss", -1)):
        run(monkeypatch, "--train", pack, *SMALL, *EASY, "--epochs", 8, "--batch", 12, "--seeds", 0, "--out",
            tmp_path / select, "--select", select)
        scores = [sign * line[key] for line in log_of(tmp_path / select / "seed0") if key in line]
        saved = load(tmp_path / select / "seed0/classifier.pt")
        assert saved["epoch"] == 1 + np.argmax(scores) and len(scores) == 8


def test_a_run_ends_when_patience_is_exceeded_and_so_does_a_resumed_one(tmp_path, monkeypatch):
    noise = make_pack(tmp_path / "noise", 72, shuffled=True)            # validation gets worse
    flags = ["--train", noise, *SMALL, *EASY, "--epochs", 20, "--batch", 12, "--seeds", 0, "--patience", 2]
    run(monkeypatch, *flags, "--out", tmp_path / "whole")
    log = log_of(tmp_path / "whole/seed0")
    losses = [line["val_loss"] for line in log if "val_loss" in line]
    stale = [epoch - np.argmin(losses[:epoch + 1]) for epoch in range(len(losses))]
    assert 3 < len(losses) < 20 and stale[-1] == 3 and max(stale[:-1]) <= 2
    end = 2 * len(losses)
    for steps in (1, end - 3, end - 2, 40, 40):                         # the last finds that nothing is left
        run(monkeypatch, *flags, "--out", tmp_path / "parts", "--steps", steps)
        assert (tmp_path / "parts/seed0/classifier.pt").exists()
    assert_same_run(tmp_path / "whole/seed0", tmp_path / "parts/seed0", ("loss", "meter"))     # more lines


def assert_same_run(one, other, but=()):
    """The same checkpoints and log lines with scores, apart from times and what is said."""
    for file in ("last.pt", "classifier.pt"):
        a, b = load(one / file), load(other / file)
        for name in ("model", "optimizer", "meter", "curve"):
            flat = classify.flatten({name: a.pop(name, {})}), classify.flatten({name: b.pop(name, {})})
            if name not in but:
                assert_close(flat[0], flat[1], 0)
        assert a == b
    apart = {"time", "img_per_s", *but}
    logs = [[{key: x for key, x in line.items() if key not in apart} for line in log_of(folder)
             if "val_loss" in line] for folder in (one, other)]
    assert logs[0] == logs[1]


def test_steps_that_end_within_an_epoch_leave_a_line_and_a_classifier(pack, tmp_path, monkeypatch):
    run(monkeypatch, "--train", pack, *SMALL, "--batch", 6, "--seeds", 0, "--steps", 3, "--out", tmp_path)
    assert [line["step"] for line in log_of(tmp_path / "seed0")] == [3]
    assert load(tmp_path / "seed0/classifier.pt")["step"] == 3


def test_a_run_stopped_between_two_lines_of_the_log_goes_on_with_their_mean(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, *SMALL, "--epochs", 2, "--batch", 6, "--seeds", 0, "--lr", "1e-2", "--out"]
    run(monkeypatch, *flags, tmp_path / "whole")
    asked = iter([False, False, True])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(classify, "catch_sigterm", lambda: lambda: next(asked))
        run(monkeypatch, *flags, tmp_path / "parts")
    assert stopped.value.code == 75 and load(tmp_path / "parts/seed0/last.pt")["step"] == 3
    run(monkeypatch, *flags, tmp_path / "parts")
    assert_same_run(tmp_path / "whole/seed0", tmp_path / "parts/seed0")


def test_weights_of_timm_that_change_between_two_seeds_stop_the_run(pack, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()

    def put(seed):
        torch.manual_seed(seed)
        model = timm.create_model("vit_small_patch16_224", in_chans=1, **VIT)
        torch.save(model.state_dict(), "weights/vit_small_patch16_224.pth")
    flags = ["--train", pack, "--init", "timm", *SMALL, "--epochs", 1, "--batch", 12, "--seeds", "0,11"]
    put(0)
    run(monkeypatch, *flags, "--out", "one")
    put(1)
    assert "made with start=" in mistake(monkeypatch, capsys, *flags, "--out", "one")
    save_run = classify.save_run
    monkeypatch.setattr(classify, "save_run", lambda *args, **more: (save_run(*args, **more), put(2)))
    assert "have changed since the previous seed" in mistake(monkeypatch, capsys, *flags, "--out", "two")
    assert (tmp_path / "two/seed0/last.pt").exists() and not (tmp_path / "two/seed11/last.pt").exists()


def test_probe_is_a_logistic_regression_on_features_of_whole_images(pack, tmp_path, monkeypatch):
    flags = ["--train", pack, "--out", tmp_path, *SMALL, "--probe", "true"]
    monkeypatch.setattr(classify, "PROBE_C", [0.01, 0.1])
    run(monkeypatch, *flags)
    saved = load(tmp_path / "seed0/classifier.pt")
    torch.manual_seed(0)
    frozen = timm.create_model(saved["arch"], in_chans=1, num_classes=3, **VIT).eval()
    trunk = {name: value for name, value in frozen.state_dict().items() if not name.startswith("head")}
    assert_close({name: saved["model"][name] for name in trunk}, trunk, 0)
    images, table = np.load(pack.parent / "images.npy"), pd.read_csv(pack)
    x = (torch.tensor(images)[:, None] / 255 - 0.485) / 0.229
    with torch.inference_mode():
        features = frozen.forward_features(x)[:, 0].numpy()
        frozen.load_state_dict(saved["model"])
        logits = frozen(x).numpy()
    train, val = ((table["split"] == split).to_numpy() for split in ("train", "val"))
    features = StandardScaler().fit(features[train]).transform(features)
    log, aucs = log_of(tmp_path / "seed0")[-1], []
    for k, label in enumerate(saved["labels"]):
        tried = []
        for strength in (0.01, 0.1):
            regression = LogisticRegression(C=strength, max_iter=1000)
            score = regression.fit(features[train], table[label][train]).decision_function(features)
            tried.append((roc_auc_score(table[label][val], score[val]), -strength, score))
        best = max(tried, key=lambda one: one[:2])
        np.testing.assert_allclose(logits[:, k], best[2], atol=2e-3)
        aucs.append(best[0])
        assert log[f"val_auc_{label}"] == pytest.approx(best[0])
    made = (tmp_path / "seed0/classifier.pt").stat().st_mtime_ns
    run(monkeypatch, *flags)
    assert log["val_auc"] == pytest.approx(np.mean(aucs))
    assert (tmp_path / "seed0/classifier.pt").stat().st_mtime_ns == made               # not made again


def test_a_new_beginning_removes_the_old_classifier_and_a_probe_is_another_run(pack, tmp_path, monkeypatch, capsys):
    flags = ["--train", pack, "--out", tmp_path, *SMALL, "--batch", 12, "--epochs", 1, "--seeds", 0]
    run(monkeypatch, *flags, "--crop_pct", 1)
    said = mistake(monkeypatch, capsys, *flags, "--crop_pct", 1, "--probe")
    assert "last.pt" in said and "probe" in said
    assert (tmp_path / "seed0/classifier.pt").exists()
    assert "NaN" in mistake(monkeypatch, capsys, *flags, "--resume", "never", "--lr", 1e30,
                            "--warmup_epochs", 0, "--log_steps", 1)
    assert not (tmp_path / "seed0/classifier.pt").exists()


def test_a_label_with_one_class_gets_a_constant_probe(pack, tmp_path, monkeypatch):
    manifest = changed_pack(pack, tmp_path / "pack", A="1", B="0")
    run(monkeypatch, "--train", manifest, "--out", tmp_path, *SMALL, "--probe", "true")
    model = load(tmp_path / "seed0/classifier.pt")["model"]
    assert model["head.bias"][1:].tolist() == [10, -10] and not model["head.weight"][1:].any()


def test_scores_of_two_processes_are_of_the_network_that_is_saved(pack, tmp_path):
    """A ResNet's, whose processes normalise by their own share: its statistics too are those of the file."""
    flags = ["--device", "cpu", "--arch", "resnet18", "--model_args", '{"channels": [8, 8, 8, 8]}',
             "--img_size", 32, "--crop_pct", 1, "--batch", 12, "--epochs", 2, "--warmup_epochs", 0,
             "--lr", "1e-2", "--seeds", 0]
    result = fork_script("finetune/classify.py", "--train", pack, "--out", tmp_path, *flags, nproc=2)
    assert result.returncode == 0, result.stderr
    saved = load(tmp_path / "seed0/classifier.pt")
    line = [line for line in log_of(tmp_path / "seed0") if line["epoch"] == saved["epoch"]][-1]
    model = timm.create_model("resnet18", in_chans=1, num_classes=3, channels=[8, 8, 8, 8]).eval()
    model.load_state_dict(saved["model"])
    rows = pd.read_csv(pack)
    place = np.flatnonzero(rows["split"] == "val")
    x = torch.tensor(np.load(pack.parent / "images.npy")[place, None] / 255.0).float()
    with torch.no_grad():
        p = model((x - 0.485) / 0.229).sigmoid().double().numpy()
    truth = rows[LABELS].to_numpy()[place]
    assert line["val_loss"] == pytest.approx(log_loss(truth.ravel(), p.ravel()), rel=1e-5)
    assert line["val_auc"] == pytest.approx(roc_auc_score(truth, p))


def test_shuffled_labels_cannot_be_predicted(tmp_path, monkeypatch):
    aucs = {}
    for shuffled in (False, True):
        manifest = make_pack(tmp_path / f"pack{shuffled}", 500, (0.4, 0.6, 0), shuffled)
        out = tmp_path / f"run{shuffled}"
        run(monkeypatch, "--train", manifest, "--out", out, *SMALL, *EASY, "--seeds", 0, "--epochs", 5,
            "--batch", 20)
        aucs[shuffled] = log_of(out / "seed0")[-1]["val_auc"]
    # the last epoch, chosen by nothing; sd of an AUC of 150 against 150 without signal, mean of three labels
    sd = np.sqrt((150 + 150 + 1) / (12 * 150 * 150) / 3)
    assert abs(aucs[True] - 0.5) < 3.3 * sd and aucs[False] > 0.5 + 6 * sd, aucs


# Mistakes

def test_a_packs_manifest_in_another_order_is_refused_but_not_one_beside_it(tmp_path, monkeypatch, capsys):
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    index = make_pack(raw, 72)
    for name, image in zip(pd.read_csv(index)["path"], np.load(raw / "images.npy")):
        Image.fromarray(image).save(raw / name)
    assert fork_script("data_prep/pack.py", "--index", index, "--raw", raw, "--out", packed,
                       "--size", 32).returncode == 0
    mixed = pd.read_csv(packed / "manifest.csv").sample(frac=1, random_state=0)
    mixed.to_csv(packed / "mine.csv", index=False)
    flags = [*SMALL, "--batch", 12, "--epochs", 1, "--seeds", 0, "--crop_pct", 1, "--out"]
    run(monkeypatch, "--train", packed / "mine.csv", *flags, tmp_path / "mine")
    mixed.assign(path=[raw / name for name in mixed["path"]]).to_csv(tmp_path / "files.csv", index=False)
    run(monkeypatch, "--train", tmp_path / "files.csv", *flags, tmp_path / "files")
    logs = [log_of(tmp_path / name / "seed0")[-1] for name in ("mine", "files")]
    assert all(logs[0][key] == logs[1][key] for key in ("loss", "val_loss", "val_auc"))
    mixed.to_csv(packed / "manifest.csv", index=False)
    said = mistake(monkeypatch, capsys, "--train", packed / "manifest.csv", *flags, tmp_path / "out")
    assert f"are not the images of {packed}/manifest.csv in its order" in said
    assert not (tmp_path / "out").exists()


def test_images_of_training_are_validated_on_only_by_intent(pack, tmp_path, monkeypatch, capsys):
    unsplit = changed_pack(pack, tmp_path / "pack", split=None)
    flags = ["--train", unsplit, *SMALL, "--epochs", 1, "--seeds", 0, "--out"]
    assert "has no column split" in mistake(monkeypatch, capsys, *flags, tmp_path / "a")
    spelled = f"{unsplit.parent}/../{unsplit.parent.name}/{unsplit.name}"
    assert "has no column split" in mistake(monkeypatch, capsys, *flags, tmp_path / "a", "--val", spelled)
    assert not (tmp_path / "a").exists()
    run(monkeypatch, *flags, tmp_path / "b", "--val-split", "all")
    error = capsys.readouterr().err
    assert "72 paths are in training" in error and "36 patients are in training and in validation" in error
    shifted = changed_pack(pack, tmp_path / "val", split=None, path=[f"v{i}.png" for i in range(72)],
                           patient=[f"p{i // 2 + 35}" for i in range(72)])
    run(monkeypatch, *flags, tmp_path / "c", "--val", shifted)
    error = capsys.readouterr().err
    assert "1 patients are in training and in validation" in error and "paths" not in error
    flags = ["--train", pack, *SMALL, "--epochs", 2, "--seeds", 0, "--batch", 12]
    run(monkeypatch, *flags, "--out", tmp_path / "d")
    assert capsys.readouterr().err == ""


def test_a_batch_that_processes_or_images_do_not_allow_is_refused(pack, tmp_path, monkeypatch, capsys):
    flags = ["--train", pack, *SMALL, "--seeds", 0, "--out", tmp_path, "--batch"]
    assert "at most the 24 images" in mistake(monkeypatch, capsys, *flags, 25)
    assert "multiple" in mistake(monkeypatch, capsys, *flags, 0)
    monkeypatch.setattr(classify, "init_processes", lambda device: (0, 2, torch.device("cpu")))
    assert "--batch 9 has to be at most the 24 images and a multiple of the processes, 2" in mistake(monkeypatch, capsys, *flags, 9)
    assert not (tmp_path / "seed0").exists()


def test_mistakes_are_named_in_one_sentence(pack, tmp_path, monkeypatch, capsys):
    cells = ["yes" if i == 7 else "0" for i in range(72)]
    odd = changed_pack(pack, tmp_path / "odd", A=cells)
    same = changed_pack(pack, tmp_path / "same", A="0", B="0", C="0")
    bare = changed_pack(pack, tmp_path / "bare", A=None, B=None, C=None)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "misfit.pt")
    torch.save("no weights", tmp_path / "text.pt")
    flags = ["--train", pack, "--out", tmp_path / "out", *SMALL, "--batch", 12, "--epochs", 1]
    for argv, parts in (
            (["--train", odd], [f"{odd} row 9", "'A'", "'yes'"]),
            (["--train", same], ["no AUC", "--select loss"]),
            (["--train", bare], [str(bare), "label columns (none)"]),
            (["--val", tmp_path / "none.csv"], ["none.csv"]),
            (["--val-split", "dev"], ["split 'dev'"]),
            (["--label_names", "[A, Bb]"], [str(pack), "label columns C, A, B", "label_names", "A, Bb"]),
            (["--label_names", "A,A"], ["label_names"]),
            (["--labels", 2], ["labels is 2.0"]),
            (["--crop_pct", 0], ["crop_pct is 0.0"]),
            (["--seeds", "one"], ["'one'", "seeds"]),
            (["--seeds", "0,-1"], ["'-1'", "seeds"]),
            (["--seeds", ""], ["seeds are []"]),
            (["--pos_weight", "[1, 2]"], ["[1, 2]", "pos_weight"]),
            (["--pos_weight", "much"], ["much", "pos_weight"]),
            (["--recipe", "c"], ["recipe", "deit"]),
            (["--init", tmp_path / "text.pt"], ["text.pt"]),
            (["--init", "exp:nope"], ["runs/nope/pretrain/backbone.pt"]),
            (["--init", tmp_path / "misfit.pt"], ["misfit.pt"]),
            (["--arch", "densenet121", "--model_args", "{}"], ["drop_path_rate", "model_args {} (null leaves"]),
            (["--arch", "vit_giant_ant"], ["vit_giant_ant"])):
        error = mistake(monkeypatch, capsys, *flags, *argv)
        assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()                              # before anything is trained


def test_a_full_gpu_is_told_with_the_passes_that_would_fit(pack, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError
    monkeypatch.setattr(classify, "label_loss", full)
    flags = ["--train", pack, *SMALL, "--out", tmp_path, "--batch", 24, "--micro-batch", 12]
    said = mistake(monkeypatch, capsys, *flags)
    assert "12 images per pass; try --micro-batch 6" in said
