"""Facts about pretrain/supervised.py."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
from conftest import load_script, log_of, run_here, run_script
from PIL import Image

supervised = load_script("pretrain/supervised.py")
TINY = ["--model_args", '{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}',
        "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1]
RESNET = ["--arch", "resnet10t", "--img_size", 32, "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1]


def write_pack(folder, labels):
    """72 noisy images with up to three bright bands, 48 in split pretrain; labels: of [N, 3] truth."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (72, 3))
    images = rng.integers(0, 60, (72, 32, 32))
    for band, top in enumerate([0, 11, 22]):
        images[:, top:top + 10] += 150 * truth[:, band, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(72)],
                         "split": ["pretrain"] * 48 + ["val"] * 24, "age": 50})
    rows.join(labels(truth)).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """One column a label; negatives are 0, uncertain or blank."""
    cells = lambda truth: np.where(truth == 1, "1", np.array(["0", "-1", ""])[np.arange(72) % 3][:, None])
    return write_pack(tmp_path_factory.mktemp("findings"),
                      lambda truth: pd.DataFrame(cells(truth), columns=["Edema", "Mass", "No Finding"]))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """One column with the class number, here how many bands are bright; 7, 8, 9, 10 sort as numbers."""
    return write_pack(tmp_path_factory.mktemp("classes"),
                      lambda truth: pd.DataFrame({"class": truth.sum(1) + 7}))


def train_here(monkeypatch, manifest, out, *flags):
    run_here(supervised, monkeypatch, "--manifest", manifest, "--out", out, *flags)


# Views

@pytest.mark.parametrize("box", [(0, 0, 100, 80), (10, 7, 61, 40), (3, 50, 20, 28)])
def test_bilinear_crops_equal_pillows_resize_of_the_box(box):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (100, 80), dtype=np.uint8))
    top, left, h, w = box
    wanted = np.array(noise.crop((left, top, left + w, top + h)).resize((48, 48), Image.BILINEAR), np.float32)
    got = supervised.crop_resize(torch.from_numpy(np.array(noise))[None, None],
                                 [torch.tensor([float(v)]) for v in box],
                                 torch.tensor([False]), 48, cubic=False)[0, 0].numpy()
    assert np.abs(got - wanted).max() <= 1.01                           # Pillow rounds twice


def test_rotation_equals_torchvisions_and_stays_within_the_stated_angle():
    images = torch.rand(5, 2, 40, 40, generator=torch.Generator().manual_seed(2)) * 255
    u = torch.tensor([0.0, 0.2, 0.5, 0.83, 1.0])
    turned = supervised.rotate(images, u, 7.0)
    for image, got, angle in zip(images, turned, (2 * u.double() - 1) * 7):
        wanted = tv.rotate(image[None], float(angle))[0]    # nearest, filled with 0
        assert (got == wanted).float().mean() > 0.995       # at ties of two pixels either may be the nearest
    assert torch.equal(turned[2], images[2])


def test_views_are_the_crop_turned_and_normalised():
    images = torch.randint(0, 256, (3, 1, 50, 50), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(3))
    u = torch.rand(3, supervised.N_CROP + 1, generator=torch.Generator().manual_seed(4))
    config = {**supervised.DEFAULTS, "img_size": 32, "in_chans": 3,
              "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    crops = supervised.random_resized_crop(images, u, (0.08, 1.0), 32, cubic=False)
    views = supervised.augment(images, u, config)
    for channel, (mean, std) in enumerate(zip(config["mean"], config["std"])):
        wanted = (supervised.rotate(crops, u[:, -1], 7.0)[:, 0] / 255 - mean) / std
        assert torch.allclose(views[:, channel], wanted, atol=1e-5)


# Labels

def read(manifest, task="auto"):
    return supervised.read_targets(manifest, supervised.read_manifest(manifest, "all"), task)


def test_uncertain_and_blank_labels_count_as_negative(findings):
    values, names = read(findings)
    table = pd.read_csv(findings, dtype=str, keep_default_na=False)
    assert names == ["Edema", "Mass", "No Finding"] and values.dtype == np.float32
    assert ((values == (table[names] == "1").to_numpy()).all()
            and set(np.unique(table[names])) == {"0", "1", "-1", ""})


def test_a_single_column_holds_the_class_numbers_in_numeric_order(classes):
    values, names = read(classes)
    table = pd.read_csv(classes)
    assert names == ["7", "8", "9", "10"] and (values == table["class"] - 7).all()


def test_columns_with_exactly_one_1_in_every_row_are_classes(tmp_path):
    truth = np.array([2, 0, 1, 2])
    pd.DataFrame(np.eye(3, dtype=int)[truth], columns=list("abc")).assign(path=list("wxyz")).to_csv(
        tmp_path / "m.csv", index=False)
    values, names = read(tmp_path / "m.csv")
    assert names == list("abc") and (values == truth).all() and values.dtype == np.int64
    assert (read(tmp_path / "m.csv", "multilabel")[0] == np.eye(3)[truth]).all()


def test_loss_equals_a_loop_over_images_and_labels():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)) * 3
    truth = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    total = 0.0
    for row, values in zip(logits.tolist(), truth.tolist()):
        for logit, value in zip(row, values):
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p) if value else math.log(1 - p)
    assert abs(float(supervised.label_loss(logits, truth)) - total / 12) < 1e-6
    total = sum(math.log(sum(math.exp(v) for v in row)) - row[place]
                for row, place in zip(logits.tolist(), [2, 0, 1, 1]))
    assert abs(float(supervised.label_loss(logits, torch.tensor([2, 0, 1, 1]))) - total / 4) < 1e-6


def test_validation_images_are_of_split_val_and_in_the_paper_face_the_first_training_images(findings):
    rows = supervised.read_manifest(findings, "pretrain", 40)
    config = {**supervised.DEFAULTS, "val_samples": 10}
    assert list(supervised.validation_rows(findings, rows, config).index) == list(range(48, 58))
    assert list(supervised.validation_rows(
        findings, rows, {**config, "variant": "paper"}).index) == list(range(10))


# Whole runs

@pytest.mark.parametrize("task", ["multilabel", "classes"])
def test_a_run_is_the_definition_written_out(task, findings, classes, tmp_path, monkeypatch):
    """Warm-up and cosines, mean cross-entropy, each gradient clipped, AdamW: 5 steps by hand.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    seen, augment = [], supervised.augment
    monkeypatch.setattr(supervised, "augment",
                        lambda images, *args: seen.append((images, augment(images, *args))) or seen[-1][1])
    manifest = dict(multilabel=findings, classes=classes)[task]
    train_here(monkeypatch, manifest, tmp_path, *TINY, "--batch", 10, "--samples", 30, "--epochs", 3,
               "--lr", 0.05, "--min_lr", 0.01, "--wd", 2, "--wd_end", 5, "--clip", 1e-5, "--drop_path", 0,
               "--steps", 5)
    packed, table = torch.from_numpy(np.load(manifest.parent / "images.npy")), pd.read_csv(manifest)
    torch.manual_seed(0)
    n_outputs = dict(multilabel=3, classes=4)[task]
    model = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=n_outputs,
                              **json.loads(TINY[1]))
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups])
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.linspace(0, 0.05, 3), falling(0.05, 0.01, 6)]) * 10 / 256    # 3 steps an epoch
    for (images, views), rate, decay, line in zip(seen, rates, falling(2, 5, 9), log_of(tmp_path)):
        rows = table.iloc[[int((packed == image).all((1, 2)).nonzero()) for image in images]]
        logits = model(views)
        if task == "multilabel":
            truth = torch.tensor((rows[["Edema", "Mass", "No Finding"]] == 1).to_numpy())
            loss = -torch.where(truth, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
        else:
            loss = -logits.softmax(1).log()[range(10), rows["class"].to_numpy() - 7].mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad *= min(1, 1e-5 / (float(parameter.grad.norm()) + 1e-6))
        for group, wd in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=rate, weight_decay=wd)
        optimizer.step()
        assert abs(line["loss"] - loss.item()) < 1e-5 and abs(line["lr"] - rate) < 1e-12
    assert len(seen) == 5
    last = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(last[name], value, rtol=0, atol=1e-6), name


def test_processes_and_micro_batches_do_not_change_the_weights(findings, tmp_path, monkeypatch):
    flags = [*TINY, "--batch", 12, "--steps", 5, "--lr", 0.02, "--drop_path", 0.3]
    train_here(monkeypatch, findings, tmp_path / "one", *flags)
    train_here(monkeypatch, findings, tmp_path / "parts", *flags, "--micro-batch", 5)
    result = run_script("pretrain/supervised.py", "--manifest", findings, "--out", tmp_path / "three",
                        *flags, nproc=3)
    assert result.returncode == 0, result.stderr
    one = torch.load(tmp_path / "one/last.pt", weights_only=True)["model"]
    for name in ("parts", "three"):
        other = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5, name
        for here, there in zip(log_of(tmp_path / "one"), log_of(tmp_path / name), strict=True):
            assert abs(here["loss"] - there["loss"]) < 1e-5
            assert abs(here.get("val_auc", 0) - there.get("val_auc", 0)) < 1e-6


def test_batch_norm_of_a_resnet_sees_the_images_of_all_processes(findings, tmp_path, monkeypatch):
    flags = [*RESNET, "--batch", 12, "--steps", 2, "--lr", 0.02, "--drop_path", 0.3, "--val_samples", 0]
    train_here(monkeypatch, findings, tmp_path / "one", *flags)
    result = run_script("pretrain/supervised.py", "--manifest", findings, "--out", tmp_path / "two",
                        *flags, nproc=2)
    assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                for name in ("one", "two"))
    # AdamW makes a whole step of the rounding in a gradient near 0: only few weights may differ, and by that
    gaps = torch.cat([(one[key] - two[key]).abs().flatten() for key in one if "num_batches" not in key])
    assert (gaps > 1e-5).float().mean() < 1e-3 and gaps.max() < 2 * 0.02 * 12 / 256
    for here, there in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert abs(here["loss"] - there["loss"]) < 1e-5


def test_a_run_in_two_pieces_gives_the_same_bytes(classes, tmp_path, monkeypatch):
    flags = [*TINY, "--batch", 10, "--epochs", 4, "--lr", 0.002, "--val_epochs", 2]
    train_here(monkeypatch, classes, tmp_path / "whole", *flags)
    train_here(monkeypatch, classes, tmp_path / "cut", *flags, "--steps", 6)  # within the second epoch
    (tmp_path / "cut/backbone.pt").unlink()
    train_here(monkeypatch, classes, tmp_path / "cut", *flags)
    assert (tmp_path / "whole/backbone.pt").read_bytes() == (tmp_path / "cut/backbone.pt").read_bytes()
    assert ([line["loss"] for line in log_of(tmp_path / "whole")]
            == [line["loss"] for line in log_of(tmp_path / "cut")])
    assert [line["step"] for line in log_of(tmp_path / "whole") if "val_accuracy" in line] == [8, 16]


def test_backbones_load_strictly_into_timm_without_this_project(findings, tmp_path, monkeypatch):
    for name, net in (("vit", TINY), ("resnet50", ["--arch", "resnet50", "--in_chans", 3, *RESNET[2:]])):
        train_here(monkeypatch, findings, tmp_path / name, *net, "--batch", 8, "--steps", 1,
                   "--val_samples", 0)
    code = ("import sys, timm, torch\nfor file in sys.argv[1:]:\n c = torch.load(file, weights_only=True)\n"
            " m = timm.create_model(c['arch'], in_chans=c['in_chans'], num_classes=0, **c['model_args'])\n"
            " m.load_state_dict(c['model'], strict=True)\n"
            " print(m.eval()(torch.zeros(1, c['in_chans'], 32, 32)).shape[1])")
    result = subprocess.run([sys.executable, "-I", "-c", code,
                             *(str(tmp_path / name / "backbone.pt") for name in ("vit", "resnet50"))],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == ["48", "2048"], result.stderr


def test_it_learns_labels_and_classes(findings, classes, tmp_path, monkeypatch):
    for name, manifest in (("findings", findings), ("classes", classes)):
        train_here(monkeypatch, manifest, tmp_path / name, *TINY, "--batch", 16, "--epochs", 50, "--lr", 0.03,
                   "--val_epochs", 50, "--crop_scale", "[0.8, 1.0]", "--log-steps", 15)
    first, *_, last = log_of(tmp_path / "findings")
    assert last["loss"] < 0.5 < first["loss"] and last["val_auc"] > 0.9     # chance: 0.5
    assert log_of(tmp_path / "classes")[-1]["val_accuracy"] > 0.6           # commonest: 0.42


@pytest.mark.parametrize("content, flags, words", [
    ("path,a,b\nx.png,1,0\ny.png,1,yes\n", [], "row 3: label 'b' is 'yes'; expected 1, 0, -1 or blank"),
    ("path,class\nx.png,1\ny.png,\n", [], "row 3: no class in column 'class'"),
    ("path,split\nx.png,pretrain\n", [], "no label column"),
    ("path,a,b\nx.png,1,0\ny.png,1,1\n", ["--task", "classes"], "row 3: 2 of the classes are 1"),
    ("path,a,b\nx.png,1,0\ny.png,1,1\n", ["--task", "labels"], "task is 'labels'"),
])
def test_unusable_labels_are_refused(tmp_path, monkeypatch, capsys, content, flags, words):
    (tmp_path / "manifest.csv").write_text(content)
    with pytest.raises(SystemExit) as leaving:
        train_here(monkeypatch, tmp_path / "manifest.csv", tmp_path / "run", *TINY, *flags)
    assert leaving.value.code == 2 and words in capsys.readouterr().err


def test_parameter_count_at_default_size():
    model = supervised.make_model(supervised.DEFAULTS, 14, 0.1)
    assert sum(p.numel() for p in model.parameters()) == 21_469_056 + 14 * 385
