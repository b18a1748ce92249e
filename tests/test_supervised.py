"""Facts about pretrain/supervised.py, and its starts: networks other than transformers."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from conftest import load_script, log_of, run_here

supervised = load_script("pretrain/supervised.py")
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
LABELS = ["Mass", "No Finding", "Edema"]                # not sorted


def config_of(**changes):
    return {**supervised.DEFAULTS, "mean": [0.485], "std": [0.229], "exp": None, **changes}


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write_pack(folder, labels):
    """72 noisy images with up to three bright bands, the first 24 in split val; labels: of [N, 3] truth."""
    rng = np.random.default_rng(0)
    truth = (rng.random((72, 3)) < [0.6, 0.5, 0.3]).astype(int)
    images = rng.integers(0, 60, (72, 32, 32))
    for band, top in enumerate([0, 11, 22]):
        images[:, top:top + 10] += 150 * truth[:, band, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(72)], "age": 50})
    rows = rows.assign(split=["val"] * 24 + ["pretrain"] * 48).join(labels(truth))
    rows.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """One column a label; negatives are 0, uncertain or blank."""
    cells = lambda truth: np.where(truth == 1, "1", np.array(["0", "-1", ""])[np.arange(72) % 3][:, None])
    return write_pack(tmp_path_factory.mktemp("findings"),
                      lambda truth: pd.DataFrame(cells(truth), columns=LABELS))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """One column with the class number, here how many bands are bright; 8, 9, 10, 11 sort as numbers."""
    return write_pack(tmp_path_factory.mktemp("classes"),
                      lambda truth: pd.DataFrame({"class": truth.sum(1) + 8}))


# Views

def test_rotation_equals_torchvisions_and_stays_within_the_stated_angle():
    images, u = uniform(2, 5, 2, 40, 40) * 255, torch.tensor([0.0, 0.2, 0.5, 0.83, 1.0])
    turned = supervised.rotate(images, u, 7.0)
    for image, got, angle in zip(images, turned, (2 * u.double() - 1) * 7):
        wanted = tv.rotate(image[None], float(angle))[0]    # nearest, filled with 0
        assert (got == wanted).float().mean() > 0.995       # at ties of two pixels either may be the nearest
    assert torch.equal(turned[2], images[2]) and not torch.equal(turned[1], images[1])


def test_resizing_equals_torchvisions_whatever_the_sizes():
    images = [(uniform(i, 3, *sides) * 255).byte() for i, sides in enumerate([(50, 40), (20, 33), (32, 32)])]
    for image, got in zip(images, supervised.resize(images, 32)):
        assert torch.allclose(got, tv.resize(image.float(), [32, 32], antialias=True), atol=1e-3)


def test_views_are_the_bilinear_crop_turned_and_normalised():
    images = (uniform(3, 6, 1, 50, 50) * 255).byte()
    u = uniform(4, 6, supervised.N_CROP + 1)
    config = config_of(img_size=32, in_chans=3, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    views = supervised.augment(images, u, config)
    begin, length = map(torch.stack, zip(*supervised.crop_boxes(u, 50, 50, (0.08, 1.0))))
    for i, (top, left, h, w) in enumerate(torch.cat([begin, length]).T.int().tolist()):
        crop = tv.resized_crop(images[i].float(), top, left, h, w, [32, 32])
        crop = crop.flip(2) if u[i, 22] < 0.5 else crop
        crop = tv.rotate(crop, (2 * float(u[i, 23]) - 1) * 7)
        wanted = tv.normalize(crop.expand(3, -1, -1) / 255, config["mean"], config["std"])
        assert (views[i] - wanted).abs().lt(1e-4).float().mean() > 0.99, i      # ties of two pixels, as above


# Labels

def read(manifest, task="auto"):
    return supervised.read_targets(manifest, supervised.read_manifest(manifest), task)


def test_uncertain_and_blank_labels_count_as_negative(findings):
    values, names = read(findings)
    table = pd.read_csv(findings, dtype=str, keep_default_na=False)
    assert names == LABELS and values.dtype == torch.float32
    assert (values.numpy() == (table[LABELS] == "1").to_numpy()).all()
    assert set(np.unique(table[LABELS])) == {"0", "1", "-1", ""}


@pytest.mark.parametrize("uncertain, blank, values, known", [
    ("zeros", "zero", [1, 0, 0, 0], [1, 1, 1, 1]),
    ("ones", "zero", [1, 0, 1, 0], [1, 1, 1, 1]),
    ("ignore", "zero", [1, 0, 0, 0], [1, 1, 0, 1]),
    ("zeros", "ignore", [1, 0, 0, 0], [1, 1, 1, 0])])
def test_policies_of_uncertain_and_blank_cells(uncertain, blank, values, known):
    rows = {"a": ["1", "0", "-1", ""], "b": ["1.0", "0.0", "-1.0", ""], "row": torch.arange(4)}
    got = supervised.read_labels("m.csv", rows, ["b", "a"], uncertain, blank)
    for table, wanted in zip(got, (values, known)):
        assert table.dtype == torch.float32 and table.T.tolist() == [wanted, wanted]


def test_a_single_column_holds_the_class_numbers_in_numeric_order(classes):
    values, names = read(classes)
    assert names == ["8", "9", "10", "11"] and values.tolist() == (pd.read_csv(classes)["class"] - 8).tolist()


def test_a_single_column_with_uncertain_cells_or_said_to_be_a_label_is_one():
    for cells, task in ((["1", "0", "-1"], "auto"), (["1.0", "0.0", "-1.0"], "auto"),
                        (["1", "0", "0"], "multilabel"), (["1", "0", ""], "multilabel")):
        rows = {"A": cells, "row": [2, 3, 4]}
        values, labels = supervised.read_targets("m.csv", rows, task)
        assert labels == ["A"] and values.tolist() == [[1], [0], [0]]


def test_columns_with_exactly_one_1_in_every_row_are_classes(tmp_path):
    truth = [2, 0, 1, 2]
    table = pd.DataFrame(np.eye(3, dtype=int)[truth], columns=list("bca")).assign(path=list("wxyz"))
    table.to_csv(tmp_path / "m.csv", index=False)
    values, names = read(tmp_path / "m.csv")
    assert names == list("bca") and values.tolist() == truth
    assert read(tmp_path / "m.csv", "multilabel")[0].tolist() == np.eye(3)[truth].tolist()


def test_loss_equals_a_loop_over_images_and_labels():
    logits = uniform(5, 4, 3) * 9 - 4
    truth = [[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    total = 0.0
    for row, values in zip(logits.tolist(), truth):
        for logit, value in zip(row, values):
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p) if value else math.log(1 - p)
    assert abs(float(supervised.label_loss(logits, torch.tensor(truth))) - total / 12) < 1e-6
    total = sum(math.log(sum(math.exp(v) for v in row)) - row[place]
                for row, place in zip(logits.tolist(), [2, 0, 1, 1]))
    assert abs(float(supervised.label_loss(logits, torch.tensor([2, 0, 1, 1]))) - total / 4) < 1e-6


def test_validation_images_are_spread_over_split_val_or_in_the_paper_face_the_first_trained_on(findings, tmp_path):
    def numbers(val_samples=10, **changes):
        config = config_of(samples=40, val_samples=val_samples, **changes)
        rows, n_images = supervised.read_rows(findings, "pretrain", config)
        assert rows["row"][:n_images] == list(range(26, 66))
        return rows["row"][n_images:]
    assert numbers() == [2, 4, 6, 9, 11, 14, 16, 18, 21, 23] and numbers(variant="paper") == list(range(26, 36))
    assert numbers(24) == numbers(25) == list(range(2, 26)) and numbers(0) == []
    (tmp_path / "m.csv").write_text("path,a\nx,1\n")
    rows, n_images = supervised.read_rows(tmp_path / "m.csv", "pretrain", config_of())
    assert rows["path"] == ["x"] and n_images == 1                          # none to validate


def mean_auc(logits, truth):
    """By counting pairs, over the labels that have positives and negatives."""
    aucs = []
    for score, positive in zip(logits.T, truth.T == 1):
        pairs = [float((p > n) + (p == n) / 2) for p in score[positive] for n in score[~positive]]
        aucs += [np.mean(pairs)] if pairs else []
    return np.mean(aucs)


def test_scores_are_the_loss_and_the_mean_auc_over_labels_with_both_values():
    logits, truth = (uniform(6, 30, 3) * 10).round() / 10, (uniform(7, 30, 3) < 0.4).float()
    truth[:, 1] = 0
    got = supervised.scores(logits, truth)
    assert math.isclose(got["val_auc"], mean_auc(logits.numpy(), truth.numpy()), rel_tol=1e-9)
    assert math.isclose(got["val_loss"], supervised.label_loss(logits, truth).item())
    assert set(supervised.scores(logits[:, 1:2], truth[:, 1:2])) == {"val_loss"}
    numbers = supervised.scores(torch.tensor([[1.0, 2], [3, 1], [0, 1]]), torch.tensor([1, 0, 0]))
    assert math.isclose(numbers["val_accuracy"], 2 / 3, rel_tol=1e-6)


# Starts

def facebooks(state):
    """ConvNeXt's tensors under the names and shapes of its release."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("head.norm", "norm").replace("stem.", "downsample_layers.0.")
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name).replace(".blocks.", ".")
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[name] = value[..., 0, 0] if "pwconv" in name and value.ndim == 4 else value
    return {"model": renamed}


@pytest.mark.parametrize("arch, kwargs, write", [
    ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)), facebooks),
    ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)), lambda state: state),
    ("resnet10t", {}, lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()
                                                    if "num_batches_tracked" not in name}}),
    ("densenet121", dict(growth_rate=4, block_config=(1, 1)), lambda state: state)])
def test_the_backbone_of_any_network_is_filled_and_its_classifier_stays(arch, kwargs, write, tmp_path):
    source = timm.create_model(arch, num_classes=5, **kwargs)
    for number, value in enumerate(source.state_dict().values()):
        if value.is_floating_point():
            value.copy_(uniform(number, *value.shape))
    torch.save(write(source.state_dict()), tmp_path / "weights.pth")
    fresh = timm.create_model(arch, num_classes=2, **kwargs)
    head = {name: value.clone() for name, value in fresh.get_classifier().state_dict().items()}
    supervised.load_backbone(fresh, config_of(arch=arch, in_chans=3, init=str(tmp_path / "weights.pth")))
    x = uniform(8, 2, 3, 64, 64)
    source.reset_classifier(0)
    with torch.no_grad():
        features = fresh.forward_head(fresh.eval().forward_features(x), pre_logits=True)
        assert torch.equal(features, source.eval()(x))
    assert all(torch.equal(fresh.get_classifier().state_dict()[name], value) for name, value in head.items())


@pytest.mark.parametrize("adapt, factor", [("average", 1 / 3), ("sum", 1)])
def test_the_first_convolution_of_a_resnet_takes_one_channel(adapt, factor, tmp_path):
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    fresh = timm.create_model("resnet18", in_chans=1)
    config = config_of(arch="resnet18", init=str(tmp_path / "weights.pth"), channel_adapt=adapt)
    assert "1 adapted: conv1.weight" in supervised.load_backbone(fresh, config)
    x = uniform(9, 2, 1, 32, 32)
    assert torch.allclose(fresh.conv1(x), source.conv1(x.expand(-1, 3, -1, -1)) * factor, atol=1e-5)


# Whole runs

def logits_of(w, x):
    """A ViT with weights w and its classifier on the CLS token, written out: x [B, 1, 32, 32]."""
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    t = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    t = torch.cat([w["cls_token"].expand(len(x), -1, -1), t], 1) + w["pos_embed"]
    norm = lambda t, name: F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    linear = lambda t, name: t @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    for n in range(VIT["depth"]):
        qkv = linear(norm(t, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = qkv.view(*t.shape[:2], 3, 3, 16).unbind(2)
        attention = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        t = t + linear(torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2), f"blocks.{n}.attn.proj")
        hidden = F.gelu(linear(norm(t, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        t = t + linear(hidden, f"blocks.{n}.mlp.fc2")
    return linear(norm(t, "norm")[:, 0], "head")


def written_out_loss(logits, truth):
    """Of labels, from probabilities; of classes, from the softmax."""
    if truth.ndim == 2:
        return -torch.where(truth == 1, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
    return -logits.softmax(1).log()[range(len(truth)), truth].mean()


@pytest.mark.parametrize("task", ["multilabel", "classes"])
def test_eight_steps_are_those_of_a_loop_of_its_own(task):
    """Network, loss, schedule, clipping and AdamW in float64, from plain operators: weights agree to 1e-9."""
    torch.manual_seed(3)
    model = timm.create_model("vit_small_patch16_224", num_classes=4, in_chans=1, **VIT).double()
    w = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    decayed = [value for value in w.values() if value.ndim > 1]
    spared = [value for value in w.values() if value.ndim == 1]
    loop = torch.optim.AdamW([dict(params=decayed), dict(params=spared)])
    ours = torch.optim.AdamW(supervised.decay_groups(model))
    rates = [0, 0.02, *(0.002 + 0.018 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]
    decays = [0.4 - 0.3 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    for step, (rate, decay) in enumerate(zip(rates, decays)):
        x, truth = uniform(step, 6, 1, 32, 32).double(), (uniform(20 + step, 6, 4) < 0.4).double()
        truth = truth if task == "multilabel" else truth.argmax(1)
        ours.param_groups[0].update(lr=supervised.cosine(step, 8, 0.02, 0.002, 2),
                                    weight_decay=supervised.cosine(step, 8, 0.1, 0.4))
        ours.param_groups[1].update(lr=supervised.cosine(step, 8, 0.02, 0.002, 2), weight_decay=0.0)
        loss = supervised.label_loss(model(x), truth)
        ours.zero_grad()
        loss.backward()
        supervised.clip_each(model.parameters(), 0.02)
        ours.step()

        wanted = written_out_loss(logits_of(w, x), truth)
        assert abs(wanted.item() - loss.item()) < 1e-9
        loop.zero_grad()
        wanted.backward()
        for value in w.values():
            value.grad *= min(1.0, 0.02 / (float(value.grad.norm()) + 1e-6))
        loop.param_groups[0].update(lr=rate, weight_decay=decay)
        loop.param_groups[1].update(lr=rate, weight_decay=0.0)
        loop.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(w[name], value, rtol=0, atol=1e-9), name


@pytest.mark.parametrize("task", ["multilabel", "classes"])
def test_a_run_is_the_definition_written_out(task, findings, classes, tmp_path, monkeypatch):
    """Two epochs from the command line, seed 11, a line every third step, odd micro-batches, against a loop.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    seen, augment, manifest = [], supervised.augment, dict(multilabel=findings, classes=classes)[task]
    monkeypatch.setattr(supervised, "augment", lambda images, u, config: seen.append(
        (images, u, augment(images, u, config))) or seen[-1][2])
    run_here(supervised, monkeypatch, "--manifest", manifest, "--out", tmp_path, "--device", "cpu",
             "--model_args", json.dumps(VIT), "--batch", 10, "--samples", 42, "--epochs", 2,
             "--warmup_epochs", 1, "--lr", 0.05, "--min_lr", 0.01, "--wd", 2, "--wd_end", 5, "--clip", 1e-5,
             "--drop_path", 0, "--seed", 11, "--log-steps", 3, "--micro-batch", 3, "--val_epochs", 1,
             "--val_samples", 22)
    packed, table = np.load(manifest.parent / "images.npy"), pd.read_csv(manifest)
    truth = (table[LABELS] == 1).to_numpy(float) if task == "multilabel" else table["class"].to_numpy() - 8
    torch.manual_seed(11)
    n_outputs = dict(multilabel=3, classes=4)[task]
    model = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=n_outputs, **VIT)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups])
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.linspace(0, 0.05, 4), falling(0.05, 0.01, 4)]) * 10 / 256    # 4 steps an epoch
    losses, validated, numbers = [], [], []
    for step, ((images, u, views), rate, decay) in enumerate(zip(seen, rates, falling(2, 5, 8))):
        rows = [int(np.flatnonzero((packed == image[0].numpy()).all((1, 2)))[0]) for image in images]
        loss = written_out_loss(model(views), torch.from_numpy(truth[rows]))
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad *= min(1, 1e-5 / (float(parameter.grad.norm()) + 1e-6))
        for group, wd in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=rate, weight_decay=wd)
        optimizer.step()
        losses.append(loss.item())
        numbers.append(rows)
        assert torch.equal(u, uniform(supervised.step_seed(11, step), 10, 24))
        if step in (3, 7):
            val = [24 * i // 22 for i in range(22)]
            with torch.no_grad():
                logits = model((torch.from_numpy(packed[val, None]) / 255 - 0.485) / 0.229)
            score = mean_auc(logits.numpy(), truth[val]) if task == "multilabel" else \
                (logits.argmax(1).numpy() == truth[val]).mean()
            validated.append([written_out_loss(logits, torch.from_numpy(truth[val])).item(), score])

    log, key = log_of(tmp_path), dict(multilabel="val_auc", classes="val_accuracy")[task]
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1), (4, 1), (6, 2), (8, 2)]
    assert len(losses) == 8
    wanted = [np.mean(losses[:3]), losses[3], np.mean(losses[4:6]), np.mean(losses[6:])]
    assert np.allclose([line["loss"] for line in log], wanted, rtol=0, atol=1e-5)
    assert np.allclose([line["lr"] for line in log], rates[[2, 3, 5, 7]], rtol=0, atol=1e-12)
    assert np.allclose([line["wd"] for line in log], falling(2, 5, 8)[[2, 3, 5, 7]])
    got = [[line["val_loss"], line[key]] for line in log if "val_loss" in line]
    assert np.allclose(got, validated, rtol=0, atol=1e-5)
    assert ["val_loss" in line for line in log] == [False, True, False, True]
    last = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(last[name], value, rtol=0, atol=1e-6), name

    # the images of an epoch are 40 different ones of the first 42 of the split, in another order each time
    first, second = sum(numbers[:4], []), sum(numbers[4:], [])
    assert len(set(first)) == len(set(second)) == 40 and first != second
    assert min(first + second) >= 24 and max(first + second) < 24 + 42
    assert first == list(24 + np.random.default_rng([11, 0]).permutation(42)[:40])

    content = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert content["classes"] == (LABELS if task == "multilabel" else ["8", "9", "10", "11"])
    timm.create_model(content["arch"], in_chans=1, num_classes=0, **VIT).load_state_dict(content["model"])


def test_a_resnet_is_exported_without_its_classifier_and_with_its_statistics(findings, tmp_path, monkeypatch):
    run_here(supervised, monkeypatch, "--manifest", findings, "--out", tmp_path, "--device", "cpu", "--arch",
             "resnet10t", "--img_size", 32, "--in_chans", 3, "--batch", 24, "--epochs", 2, "--val_epochs", 1)
    content, last = (torch.load(tmp_path / name, weights_only=True)["model"]
                     for name in ("backbone.pt", "last.pt"))
    timm.create_model("resnet10t", in_chans=3, num_classes=0).load_state_dict(content)
    assert set(last) - set(content) == {"fc.weight", "fc.bias"}
    assert content["bn1.num_batches_tracked"] == 4          # validated after two steps, and not one of them


def test_validation_is_optional_and_its_images_in_training_are_pointed_out(findings, tmp_path, monkeypatch, capsys):
    flags = ["--manifest", findings, "--device", "cpu", "--model_args", json.dumps(VIT), "--batch", 16, "--epochs", 2]
    n_val = (pd.read_csv(findings)["split"] == "val").sum()
    run_here(supervised, monkeypatch, *flags, "--out", tmp_path / "apart", "--val_epochs", 0)
    assert "in validation" not in capsys.readouterr().err
    assert ["val_auc" in line for line in log_of(tmp_path / "apart")] == [True]         # at the end alone
    run_here(supervised, monkeypatch, *flags, "--out", tmp_path / "all", "--split", "all")
    assert f"warning: {n_val} images are in training and in validation" in capsys.readouterr().err


def test_unknown_labels_that_count_and_the_task_are_said(findings, classes, tmp_path, monkeypatch, capsys):
    flags = ["--device", "cpu", "--model_args", json.dumps(VIT), "--batch", 16, "--steps", 1]
    run_here(supervised, monkeypatch, "--manifest", findings, "--out", tmp_path / "a", *flags)
    table = pd.read_csv(findings, dtype=str, keep_default_na=False)
    n = table.loc[table["split"] == "pretrain", LABELS].isin(["-1", ""]).to_numpy().sum()
    out = capsys.readouterr().out
    assert f"note: {n} uncertain or blank training labels count as 0" in out and "3 labels; 48 images" in out
    run_here(supervised, monkeypatch, "--manifest", classes, "--out", tmp_path / "b", *flags)
    out = capsys.readouterr().out
    assert "note:" not in out and "4 classes; 48 images" in out


def test_sigterm_in_the_last_step_ends_the_run_as_ever(findings, tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "catch_sigterm", lambda: lambda: True)
    run_here(supervised, monkeypatch, "--manifest", findings, "--out", tmp_path, "--device", "cpu",
             "--model_args", json.dumps(VIT), "--batch", 16, "--steps", 1)
    assert torch.load(tmp_path / "backbone.pt", weights_only=True)["step"] == 1


def test_it_learns_labels(findings, tmp_path, monkeypatch):
    run_here(supervised, monkeypatch, "--manifest", findings, "--out", tmp_path, "--device", "cpu",
             "--model_args", json.dumps(VIT), "--batch", 16, "--epochs", 40, "--warmup_epochs", 1,
             "--lr", 0.03, "--val_epochs", 40, "--crop_scale", "[0.8, 1.0]", "--log-steps", 15)
    last = log_of(tmp_path)[-1]
    assert last["loss"] < 0.5 and last["val_auc"] > 0.9, last               # chance: 0.69, 0.5


@pytest.mark.parametrize("content, flags, words", [
    ("path,a,b\nx.png,1,0\ny.png,1,yes\n", [], ["row 3", "'b'", "'yes'"]),
    ("path,class\nx.png,1\ny.png,\n", [], ["row 3", "no class in column 'class'"]),
    ("path,split\nx.png,pretrain\n", [], ["no label column"]),
    ("path,class\nx.png,1\ny.png,\n", ["--task", "auto"], ["multilabel"]),
    ("path,class\nx.png,cat\ny.png,cat\n", [], ["'cat'", "'class'"]),
    ("path,a,b\nx.png,1,0\ny.png,1,1\n", ["--task", "classes"], ["row 3", "task=classes"]),
    ("path,a,b\nx.png,1,0\ny.png,1,1\n", ["--task", "labels"], ["task", "labels"]),
])
def test_unusable_labels_are_refused(tmp_path, monkeypatch, capsys, content, flags, words):
    (tmp_path / "manifest.csv").write_text(content)
    with pytest.raises(SystemExit) as leaving:
        run_here(supervised, monkeypatch, "--manifest", tmp_path / "manifest.csv", "--out", tmp_path / "run",
                 "--device", "cpu", *flags)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_parameter_count_at_default_size():
    with torch.device("meta"):
        model = supervised.make_model(config_of(), 14)
    assert sum(p.numel() for p in model.parameters()) == 21_469_056 + 14 * 385
