"""Facts about evaluate/predict.py, each against an independent formulation, through the command line."""

import contextlib
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, blobs, fork_script, load_script, run_here, write_pack
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from sklearn.linear_model import LogisticRegression

predict = load_script("evaluate/predict.py")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
LABELS = ["Pleural_Thickening", "Cardiomegaly", "Effusion", "Atelectasis", "Consolidation"]     # unsorted
FACTS = dict(arch="vit_small_patch16_224", model_args=VIT, in_chans=3, img_size=32,
             mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], labels=LABELS, exp="3.4", seed=11)


def network(**facts):
    """A random network with outputs that differ between images, and the content of its checkpoint."""
    facts = {**FACTS, **facts}
    torch.manual_seed(0)
    model = timm.create_model(facts["arch"], in_chans=facts["in_chans"], num_classes=len(facts["labels"]),
                              **facts["model_args"]).eval()
    for parameter in model.get_classifier().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, {"model": model.state_dict(), **facts}


def classifier(file, **facts):
    model, content = network(**facts)
    torch.save(content, file)
    return model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "classifier.pt"
    return file, classifier(file)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """23 images of 40 x 40 in two splits, with CheXpert's spellings, uncertain and blank cells."""
    columns = {"path": [f"a/{i:02}.png" for i in range(23)], "patient": [f"{i // 2:05}" for i in range(23)],
               "split": ["val"] * 4 + ["test"] * 19, "Pleural Effusion": (["1", "0", "-1", ""] * 6)[:23],
               "Cardiomegaly": (["0.0", "1.0"] * 12)[:23], "Fracture": "1", "Consolidation": ""}
    return write_pack(tmp_path_factory.mktemp("packed"), blobs(23), **columns)


def run(monkeypatch, *argv):
    run_here(predict, monkeypatch, "--device", "cpu", *argv)


def refused(monkeypatch, capsys, *argv):
    """The one sentence of a mistake; nothing is written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def read(file):
    return pd.read_csv(file, dtype={"path": str, "patient": str})


def stretch(pixels, size=32):
    """A channel [H, W] by Pillow's bilinear filter, float [size, size], not rounded to whole levels."""
    image = Image.fromarray(pixels.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.BILINEAR), np.float64)


def by_hand(model, pixels):
    """Probabilities [K] and pooled features [D] of one image, [H, W] or [H, W, 3], by Pillow and NumPy."""
    channels = [stretch(channel) for channel in np.atleast_3d(pixels).transpose(2, 0, 1)]
    pixels = np.broadcast_to(np.stack(channels, 2) / 255, (32, 32, 3))
    x = torch.tensor((pixels - FACTS["mean"]) / FACTS["std"]).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed(x))))
        logits = model.head(tokens[:, 0])
    return (1 / (1 + np.exp(-logits[0].double().numpy()))), tokens[0, 0].numpy()


def test_predictions_equal_a_plain_loop_with_timm_and_pillow(model_file, packed, tmp_path, monkeypatch):
    file, model = model_file
    run(monkeypatch, "--checkpoint", file, "--manifest", packed, "--out", tmp_path / "p.csv", "--batch", 8)
    found, images = read(tmp_path / "p.csv"), np.load(packed.parent / "images.npy")[4:]
    assert len(found) == 19 and found["prob_Effusion"].std() > 0.01
    for row, image in zip(found.itertuples(), images):
        p, _ = by_hand(model, image)
        assert (row.prob_Cardiomegaly, row.prob_Effusion) == pytest.approx((p[1], p[2]), abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_the_networks_size_are_not_touched(channels, model_file, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)[:3 if channels == 1 else 4], np.uint8)
    manifest = write_pack(tmp_path, images, split="test")
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", manifest, "--out", tmp_path / "p.csv")
    expected = [by_hand(model_file[1], image)[0] for image in images]
    found = read(tmp_path / "p.csv")
    assert list(found.columns) == ["path", "patient", *[f"prob_{label}" for label in LABELS]]
    np.testing.assert_allclose(found.iloc[:, 2:], expected, rtol=0, atol=2e-6)          # of fp32


def test_colour_becomes_grey_for_one_channel_as_pillow_does(tmp_path, monkeypatch):
    colour = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    classifier(tmp_path / "c.pt", in_chans=1, mean=[0.485], std=[0.229])
    for name, images in (("colour", colour), ("grey", grey)):
        (tmp_path / name).mkdir()
        run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--out", tmp_path / f"{name}.csv",
            "--manifest", write_pack(tmp_path / name, images, split="test"))
    found = [read(tmp_path / f"{name}.csv").iloc[:, 2:] for name in ("colour", "grey")]
    np.testing.assert_allclose(*found, rtol=0, atol=3e-3)                   # Pillow rounds to whole levels


def test_ten_crops_are_corners_and_centre_of_image_and_mirror(model_file, packed, tmp_path, monkeypatch, capsys):
    file, model = model_file
    run(monkeypatch, "--checkpoint", file, "--manifest", packed, "--out", tmp_path / "p.csv",
        "--test-crops", 10, "--features")
    found, features = read(tmp_path / "p.csv"), np.load(tmp_path / "p.npy")
    assert f"; {features.shape[1]} features an image in {tmp_path / 'p.npy'}\n" in capsys.readouterr().out
    for number, image in enumerate(np.load(packed.parent / "images.npy")[4:8]):
        large = stretch(image, 37)                                          # round(32 * 256 / 224)
        places = (0, 0), (0, 5), (5, 0), (5, 5), (2, 2)
        pairs = [by_hand(model, side[top:top + 32, left:left + 32])
                 for side in (large, large[:, ::-1]) for top, left in places]
        p, pooled = (np.mean(values, 0) for values in zip(*pairs))
        assert found["prob_Effusion"][number] == pytest.approx(p[2], abs=1e-5)
        np.testing.assert_allclose(features[number], pooled, rtol=0, atol=1e-4)


def test_file_has_the_contracts_columns_and_order(model_file, packed, tmp_path, monkeypatch):
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", packed, "--split", "val,test",
        "--out", tmp_path / "new/p.csv")
    text = (tmp_path / "new/p.csv").read_text()
    # Consolidation is blank in every row: not known, hence not there
    assert text.startswith("path,patient,true_Cardiomegaly,true_Effusion,prob_Cardiomegaly,prob_Effusion\n"
                           "a/00.png,00000,0,1,0.")
    found = read(tmp_path / "new/p.csv")
    assert len(found) == 23 and sorted(os.listdir(tmp_path / "new")) == ["p.csv", "p.json"]
    assert found["true_Effusion"].tolist() == ([1, 0, 0, 0] * 6)[:23]       # uncertain and blank count as 0
    cells = [cell for line in text.splitlines()[1:] for cell in line.split(",")[4:]]
    assert cells == [f"{np.float32(cell):.8g}" for cell in cells]


def test_cells_that_are_uncertain_or_blank_can_stay_unknown(model_file, packed, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", model_file[0], "--manifest", packed, "--split", "all", "--out", tmp_path / "p.csv"]
    run(monkeypatch, *flags)
    assert "11 unknown cells count as 0, with --mask" in capsys.readouterr().out
    run(monkeypatch, *flags, "--mask")
    assert "11 unknown cells are left out" in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "p.csv", dtype=str, keep_default_na=False)
    assert found["true_Effusion"].tolist() == (["1", "0", "", ""] * 6)[:23]
    assert found["true_Cardiomegaly"].tolist() == (["0", "1"] * 12)[:23] and "true_Consolidation" not in found


def test_rows_in_another_order_have_the_same_values(model_file, packed, tmp_path, monkeypatch):
    order = np.random.default_rng(0).permutation(23)
    np.save(tmp_path / "images.npy", np.load(packed.parent / "images.npy")[order])
    table = pd.read_csv(packed, dtype=str, keep_default_na=False)
    table.loc[order].to_csv(tmp_path / "manifest.csv", index=False)
    for name, manifest in (("a", packed), ("b", tmp_path / "manifest.csv")):
        run(monkeypatch, "--checkpoint", model_file[0], "--manifest", manifest, "--split", "all",
            "--batch", 5, "--features", "--out", tmp_path / f"{name}.csv")
    a, b = (read(tmp_path / f"{name}.csv") for name in "ab")
    pd.testing.assert_frame_equal(a.loc[order].reset_index(drop=True), b, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy")[order], np.load(tmp_path / "b.npy"), atol=1e-5)


def test_another_csv_beside_the_pack_takes_its_pixels_by_path(model_file, packed, tmp_path, monkeypatch, capsys):
    shutil.copytree(packed.parent, tmp_path / "data")
    table = pd.read_csv(packed, dtype=str, keep_default_na=False)
    table[::-2].to_csv(tmp_path / "data/some.csv", index=False)             # fewer rows, from the last on
    table.replace(table["path"][4], "x.png").to_csv(tmp_path / "data/alien.csv", index=False)
    shutil.copytree(tmp_path / "data", tmp_path / "twice")
    table.replace(table["path"][4], table["path"][0]).to_csv(tmp_path / "twice/manifest.csv", index=False)
    flags = ["--checkpoint", model_file[0], "--split", "all", "--out", tmp_path / "p.csv", "--manifest"]
    run(monkeypatch, *flags, packed)
    whole = read(tmp_path / "p.csv").set_index("path")
    run(monkeypatch, *flags, tmp_path / "data/some.csv")
    some = read(tmp_path / "p.csv").set_index("path")
    assert list(some.index) == list(table["path"][::-2])
    pd.testing.assert_frame_equal(some, whole.loc[some.index], rtol=0, atol=1e-6)
    said = refused(monkeypatch, capsys, *flags, tmp_path / "data/alien.csv")
    assert "alien.csv" in said and "'x.png'" in said
    assert "23 rows of 22 paths" in refused(monkeypatch, capsys, *flags, tmp_path / "twice/manifest.csv")
    mine = tmp_path / "data/some.csv"
    said = refused(monkeypatch, capsys, *flags[:-2], mine, "--manifest", mine)
    assert "some.csv" in said and len(pd.read_csv(mine)) == 12
    for name in ("images.csv", "pack.csv", "p.lr0.1"):      # images.npy, pack.json; a card p.json for two
        refused(monkeypatch, capsys, *flags[:-2], tmp_path / "data" / name, "--manifest", mine)
    assert np.load(tmp_path / "data/images.npy").dtype == np.uint8


def test_labels_whose_names_differ_in_signs_stay_apart(packed, tmp_path, monkeypatch):
    labels = ["HER2+", "HER2-", "Atelectasis", "No atelectasis"]
    classifier(tmp_path / "c.pt", labels=labels)
    table = pd.read_csv(packed, dtype=str, keep_default_na=False)[["path"]]
    for place, label in enumerate(labels):
        table[label] = [str((row + place) % 2) for row in range(23)]
    shutil.copytree(packed.parent, tmp_path / "data")
    table.to_csv(tmp_path / "data/own.csv", index=False)
    run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--manifest", tmp_path / "data/own.csv", "--out", tmp_path / "p.csv")
    found = pd.read_csv(tmp_path / "p.csv", dtype=str)
    for label in labels:
        assert found[f"true_{label}"].astype(float).tolist() == table[label].astype(float).tolist(), label


def test_any_number_of_processes_writes_the_same_bytes(model_file, packed, tmp_path):
    for n in (1, 3):
        result = fork_script("evaluate/predict.py", "--checkpoint", model_file[0], "--device", "cpu",
                             "--set", f"one={packed}", "--set", f"all={packed}:all", "--batch", 3,
                             "--features", "--out", tmp_path / str(n), nproc=n)
        assert result.returncode == 0, result.stderr[-2000:]
    files = [f"{name}.{kind}" for name in ("all", "one") for kind in ("csv", "json", "npy")]
    assert sorted(os.listdir(tmp_path / "1")) == sorted(os.listdir(tmp_path / "3")) == files
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert len(read(tmp_path / "3/one.csv")) == 19 and len(read(tmp_path / "3/all.csv")) == 23


def test_processes_wait_for_the_one_that_packs_a_large_folder(model_file, packed, tmp_path, monkeypatch):
    def begin(backend, timeout=timedelta(minutes=30)):                      # gloo's own
        sys.exit(int(timeout < timedelta(days=1)))
    monkeypatch.setattr(predict, "WORLD_SIZE", 2)
    monkeypatch.setattr(predict.dist, "init_process_group", begin)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--checkpoint", model_file[0], "--images", packed.parent, "--out", "p.csv")
    assert stopped.value.code == 0


def test_several_checkpoints_are_predicted_as_one_by_one(packed, tmp_path, monkeypatch, capsys):
    files = []
    for seed in (3, 14):
        files.append(tmp_path / f"{seed}.pt")
        classifier(files[-1], seed=seed, mean=[seed / 20] * 3)
    sets = ["--set", f"one={packed}", "--set", f"all={packed}:all"]
    run(monkeypatch, "--checkpoint", *files, *sets, "--out", tmp_path / "both/seed{seed}")
    for file in files:
        run(monkeypatch, "--checkpoint", file, *sets, "--out", tmp_path / f"alone/seed{file.stem}")
        for name in ("one.csv", "one.json", "all.csv", "all.json"):
            both, alone = (tmp_path / f"{way}/seed{file.stem}/{name}" for way in ("both", "alone"))
            assert both.read_bytes() == alone.read_bytes()
    assert not read(tmp_path / "both/seed3/one.csv").equals(read(tmp_path / "both/seed14/one.csv"))
    for checkpoints, out in ((files, "all.csv"), ([*files, files[0]], "{seed}.csv")):   # one would hide another
        said = refused(monkeypatch, capsys, "--checkpoint", *checkpoints, "--manifest", packed, "--out", tmp_path / out)
        assert "--checkpoint" in said and "{seed}" in said
    said = refused(monkeypatch, capsys, "--checkpoint", *files, "--images", tmp_path, "--out", tmp_path / "{seed}.csv")
    assert "--images" in said or "--manifest" in said


@pytest.mark.parametrize("columns, expected", [
    (LABELS, {label: [label] for label in LABELS}),                         # NIH; CheXpert, VinDr, PadChest:
    (["No Finding", "Atelectasis", "Pleural Effusion", "Pleural Other", "Consolidation"],
     {"Atelectasis": ["Atelectasis"], "Effusion": ["Pleural Effusion"], "Consolidation": ["Consolidation"]}),
    (["Atelectasis", "Cardiomegaly", "Pleural effusion", "Pleural thickening"],
     {"Atelectasis": ["Atelectasis"], "Effusion": ["Pleural effusion"],
      "Pleural_Thickening": ["Pleural thickening"], "Cardiomegaly": ["Cardiomegaly"]}),
    (["laminar atelectasis", "atelectasis", "lobar atelectasis", "pleural effusion", "pericardial effusion",
      "loculated pleural effusion", "cardiomegaly"],
     {"Atelectasis": ["laminar atelectasis", "atelectasis", "lobar atelectasis"],
      "Effusion": ["pleural effusion"], "Cardiomegaly": ["cardiomegaly"]}),
], ids=["NIH", "CheXpert", "VinDr", "PadChest"])
def test_labels_are_found_under_every_sources_spelling(columns, expected, model_file, tmp_path, monkeypatch):
    n = len(columns)                                                        # image i has finding i alone
    cells = dict(zip(columns, np.eye(n, dtype=int).astype(str)))
    manifest = write_pack(tmp_path, blobs(n), **{**cells, "split": "test"})
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", manifest, "--out", tmp_path / "p.csv")
    found = read(tmp_path / "p.csv")
    known = [label for label in LABELS if label in expected]
    assert list(found.columns[2:]) == [f"{kind}_{label}" for kind in ("true", "prob") for label in known]
    for label in known:
        assert found[f"true_{label}"].tolist() == [int(column in expected[label]) for column in columns]


def test_a_classifier_with_another_sources_spelling_finds_the_labels_too(tmp_path, monkeypatch):
    classifier(tmp_path / "c.pt", labels=["Cardiomegaly", "Pleural Effusion"])
    manifest = write_pack(tmp_path, blobs(3), Effusion=["1", "0", "1"], split="test")
    run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--manifest", manifest, "--out", tmp_path / "p.csv")
    found = read(tmp_path / "p.csv")
    assert list(found.columns[2:]) == ["true_Pleural Effusion", "prob_Pleural Effusion"]
    assert found["true_Pleural Effusion"].tolist() == [1, 0, 1]


def test_of_several_columns_a_positive_counts_and_an_unknown_one_hides_a_negative(model_file, tmp_path, monkeypatch):
    cells = {"atelectasis": ["0", "0", "1", "-1"], "lobar atelectasis": ["0", "-1", "", ""], "split": "test"}
    manifest = write_pack(tmp_path, blobs(4), **cells)
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", manifest, "--out", tmp_path / "p.csv", "--mask")
    found = pd.read_csv(tmp_path / "p.csv", dtype=str, keep_default_na=False)
    assert found["true_Atelectasis"].tolist() == ["0", "", "1", ""]


# Features

def test_features_are_what_the_classifier_gets(model_file, packed, tmp_path, monkeypatch):
    file, model = model_file
    run(monkeypatch, "--checkpoint", file, "--manifest", packed, "--out", tmp_path / "p.csv", "--features")
    features, found = np.load(tmp_path / "p.npy"), read(tmp_path / "p.csv")
    assert features.dtype == np.float32 and features.shape == (19, 48)
    images = np.load(packed.parent / "images.npy")[4:]
    np.testing.assert_allclose(features, [by_hand(model, image)[1] for image in images], rtol=0, atol=1e-4)
    head = LogisticRegression()                         # of these features, with the last layer's weights
    head.classes_ = np.array([0, 1])
    head.coef_, head.intercept_ = (value[2:3].detach().numpy() for value in model.head.parameters())
    expected = head.predict_proba(features)[:, 1]
    assert found["prob_Effusion"].to_numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("arch, args, width", [
    ("vit_small_patch16_224", VIT, 48), ("vit_small_patch16_224", {**VIT, "global_pool": "avg"}, 48),
    ("resnet18", {}, 512)])
def test_a_backbone_gives_features_alone(arch, args, width, packed, tmp_path, monkeypatch, capsys):
    model, content = network(arch=arch, model_args=args, labels=[])
    del content["labels"]
    torch.save(content, tmp_path / "backbone.pt")
    flags = ["--checkpoint", tmp_path / "backbone.pt", "--manifest", packed, "--split", "val",
             "--out", tmp_path / "p.csv"]
    assert "labels" in refused(monkeypatch, capsys, *flags)
    run(monkeypatch, *flags, "--features")
    assert list(read(tmp_path / "p.csv").columns) == ["path", "patient"]
    pixels = [stretch(image) / 255 for image in np.load(packed.parent / "images.npy")[:4]]
    x = torch.tensor((np.stack(pixels)[..., None] - FACTS["mean"]) / FACTS["std"]).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        maps = model.forward_features(x)
        pooled = maps.mean((2, 3)) if arch == "resnet18" else maps[:, 0]
        if "global_pool" in args:
            pooled = model.fc_norm(maps[:, 1:].mean(1))
    features = np.load(tmp_path / "p.npy")
    assert features.shape == (4, width)
    np.testing.assert_allclose(features, pooled.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch, width", [
    ("resnet18", 512), ("swin_tiny_patch4_window7_224", 768),
    ("mobilenetv3_small_050", 1024)])                                       # the head widens 288
def test_other_backbones_predict_too(arch, width, packed, tmp_path, monkeypatch, capsys):
    model = classifier(tmp_path / "c.pt", arch=arch, model_args={}, img_size=224)
    run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--manifest", packed, "--split", "val",
        "--out", tmp_path / "p.csv", "--features")
    assert f"; {width} features" in capsys.readouterr().out
    assert np.load(tmp_path / "p.npy").shape == (4, width)
    images = torch.tensor(np.load(packed.parent / "images.npy")[:4])[:, None].float()
    x = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear").expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(FACTS[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        p = model((x - mean) / std).sigmoid()
    assert read(tmp_path / "p.csv")["prob_Effusion"].to_numpy() == pytest.approx(p[:, 2].numpy(), abs=1e-5)


# Files of people: unpacked manifests and folders

def dicom(file, pixels, photometric="MONOCHROME2", **elements):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, photometric, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    ds.save_as(file, enforce_file_format=True)


def test_unpacked_png_and_jpeg_are_read_as_pillow_does(model_file, tmp_path, monkeypatch):
    file, model = model_file
    images = blobs(6)
    colour = np.stack(images[3:], 2)
    Image.fromarray(images[0]).save(tmp_path / "grey.png")
    Image.fromarray(images[1][:, :37]).save(tmp_path / "narrow.jpg")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour).convert("P").save(tmp_path / "palette.png")
    names = ["narrow.jpg", "colour.png", "grey.png", "palette.png"]
    pd.DataFrame({"path": names}).to_csv(tmp_path / "manifest.csv", index=False)
    run(monkeypatch, "--checkpoint", file, "--manifest", tmp_path / "manifest.csv",
        "--out", tmp_path / "p.csv")
    for name, row in zip(names, read(tmp_path / "p.csv").iloc[:, 2:].to_numpy()):
        with Image.open(tmp_path / name) as image:
            expected, _ = by_hand(model, np.asarray(image.convert("RGB")))
        assert row == pytest.approx(expected, abs=1e-5)


def test_unpacked_files_of_other_kinds_are_refused_with_the_remedy(model_file, tmp_path, monkeypatch, capsys):
    grey = blobs(1)[0]
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "sixteen.png")
    Image.fromarray(grey.astype(np.int32) * 200).save(tmp_path / "signed.tif")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "sixteen.pgm").write_bytes(b"P5 40 40 65535\n" + (grey.astype(">u2") * 200).tobytes())
    Image.fromarray(grey).save(tmp_path / "eight.tif")
    dicom(tmp_path / "plain.dcm", grey)
    with open(tmp_path / "plain.dcm", "rb") as whole, open(tmp_path / "eight.tif", "rb") as tiff:
        head, body = tiff.read(8), whole.read()
    (tmp_path / "tiff_preamble.dcm").write_bytes(head + body[8:])
    (tmp_path / "cut.png").write_bytes((tmp_path / "sixteen.png").read_bytes()[:90])
    for name in ("sixteen.png", "signed.tif", "float.tif", "sixteen.pgm", "eight.tif", "plain.dcm",
                 "tiff_preamble.dcm", "cut.png", "none.png"):
        pd.DataFrame({"path": [name]}).to_csv(tmp_path / "manifest.csv", index=False)
        said = refused(monkeypatch, capsys, "--checkpoint", model_file[0], "--manifest",
                       tmp_path / "manifest.csv", "--out", tmp_path / "p.csv")
        assert name in said and ("pack" in said or name[-3:] == "dcm" or name in ("cut.png", "none.png"))
        assert not (tmp_path / "p.csv").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files of many kinds, two folders deep."""
    root = tmp_path_factory.mktemp("folder")
    (root / "sub, 1").mkdir()
    images = blobs(6)
    Image.fromarray(images[0]).save(root / "grey.png")
    Image.fromarray(images[1].astype(np.uint16) * 257).save(root / "sub, 1/sixteen.png")
    Image.fromarray(np.stack([images[2], images[3], images[4]], 2)).save(root / "colour.png")
    Image.fromarray(images[5][:, :37]).save(root / "narrow.jpg")
    window = {"WindowCenter": 2048, "WindowWidth": 4096}                    # the whole range of 12 bits
    deep = np.rint(images / 255 * 4095)
    dicom(root / "window.dcm", deep[0], **window)
    dicom(root / "sub, 1/negative", 4095 - deep[1], "MONOCHROME1", **window)
    dicom(root / "no_syntax.dcm", deep[2], **window)
    content = (root / "no_syntax.dcm").read_bytes()
    at = content.index(b"\x02\x00\x10\x00UI")                               # (0002,0010), as in VinDr-CXR
    length = 8 + int.from_bytes(content[at + 6:at + 8], "little")
    group = content.index(b"\x02\x00\x00\x00UL") + 8                        # the length of the header's group
    shorter = int.from_bytes(content[group:group + 4], "little") - length
    content = content[:group] + shorter.to_bytes(4, "little") + content[group + 4:at] + content[at + length:]
    (root / "no_syntax.dcm").write_bytes(content)
    return root


def test_a_folder_gives_what_its_pixels_give(folder, tmp_path, monkeypatch):
    """Bits, window, inversion and a file without transfer syntax, at the network's size."""
    file = tmp_path / "classifier.pt"
    model = classifier(file, in_chans=1, mean=[0.485], std=[0.229])
    run(monkeypatch, "--checkpoint", file, "--images", folder, "--out", tmp_path / "out/p.csv", "--features")
    found, images = read(tmp_path / "out/p.csv"), blobs(6)
    grey = {"grey.png": images[0], "sub, 1/sixteen.png": images[1], "window.dcm": images[0],
            "sub, 1/negative": images[1], "no_syntax.dcm": images[2]}
    assert set(found["path"]) == {*grey, "colour.png", "narrow.jpg"} and found["patient"].isna().all()
    assert list(found.columns) == ["path", "patient", *[f"prob_{label}" for label in LABELS]]
    for name, pixels in grey.items():
        small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.BICUBIC)) / 255
        with torch.inference_mode():
            p = model(torch.tensor((small - 0.485) / 0.229)[None, None].float()).sigmoid()[0]
        row = found[found["path"] == name].iloc[0, 2:].astype(float)
        assert row.to_numpy() == pytest.approx(p.numpy(), abs=1e-5), name
    assert np.load(tmp_path / "out/p.npy").shape == (7, 48)
    assert (tmp_path / "out/p.csv.rejected.csv").read_text().splitlines() == ["path,reason"]
    assert sorted(os.listdir(tmp_path / "out")) == ["p.csv", "p.csv.rejected.csv", "p.json", "p.npy"]


@pytest.mark.parametrize("columns, noted", [
    ({"Edema": "1"}, False), ({"Cardiomegaly": "1"}, True), ({"Cardiomegaly": "1", "patient": "7"}, False)])
def test_images_stand_for_patients_aloud_where_there_is_truth_of_them(columns, noted, model_file, tmp_path,
                                                                      monkeypatch, capsys):
    manifest = write_pack(tmp_path, blobs(2), path=["a", "b"], **columns)
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", manifest, "--split", "all",
        "--out", tmp_path / "p.csv")
    assert ("no column patient" in capsys.readouterr().out) == noted


def test_bad_files_are_listed_and_the_rest_is_predicted(folder, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "._grey.png").write_bytes(b"\0\5\x16\7")
    (images / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (images / "cut.png").write_bytes((images / "grey.png").read_bytes()[:90])
    (images / "more").symlink_to(folder)                                    # of images that are not below
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "Icon\r").touch()                                            # macOS, of a folder with a picture
    classifier(tmp_path / "c.pt", in_chans=1, mean=[0.485], std=[0.229])
    for name in ("a", "b"):
        flags = ["--images", folder if name == "a" else images, "--out", tmp_path / f"{name}.csv"]
        with pytest.raises(SystemExit) if name == "b" else contextlib.nullcontext() as stopped:
            run(monkeypatch, "--checkpoint", tmp_path / "c.pt", *flags)
    assert stopped.value.code == 3 and "b.csv.rejected.csv" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    rejected = pd.read_csv(tmp_path / "b.csv.rejected.csv")
    assert sorted(rejected["path"]) == ["._grey.png", "DICOMDIR", "Icon", "cut.png", "gone.png", "more"]
    assert rejected["reason"].notna().all()


def test_a_folder_of_bad_files_alone_is_a_mistake(tmp_path, monkeypatch, capsys, model_file):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"\x89PNG not an image")
    said = refused(monkeypatch, capsys, "--checkpoint", model_file[0], "--images", tmp_path / "images",
                   "--out", tmp_path / "p.csv")
    assert str(tmp_path / "images") in said and str(tmp_path / "p.csv.rejected.csv") in said
    assert pd.read_csv(tmp_path / "p.csv.rejected.csv")["path"].tolist() == ["a.png"]
    assert sorted(os.listdir(tmp_path)) == ["images", "p.csv.rejected.csv"]


def test_the_pack_of_a_folder_can_be_kept(folder, model_file, tmp_path, monkeypatch):
    flags = ["--checkpoint", model_file[0], "--images", folder, "--keep"]
    run(monkeypatch, *flags, "--out", tmp_path / "p.csv")
    assert np.load(tmp_path / "p.csv.pack/images.npy").shape == (7, 32, 32, 3)          # in colour
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", tmp_path / "p.csv.pack/manifest.csv",
        "--out", tmp_path / "q.csv")
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "q.csv").read_bytes()


def test_a_kept_pack_is_used_again_but_not_for_files_that_have_changed(tmp_path, model_file, monkeypatch, capsys):
    images, out = tmp_path / "images", tmp_path / "p.csv"
    images.mkdir()
    for number, pixels in enumerate(blobs(2)):
        Image.fromarray(pixels).save(images / f"{number}.png")
    (images / "bad.png").write_bytes(b"bad")
    flags = ["--checkpoint", model_file[0], "--images", images, "--out", out, "--keep"]
    written = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *flags)
        assert stopped.value.code == 3
        written.append([out.read_bytes(), Path(f"{out}.rejected.csv").read_bytes()])
        Path(f"{out}.rejected.csv").unlink()
    assert written[0] == written[1]
    Image.fromarray(255 - blobs(1)[0]).save(images / "0.png")               # other pixels, the same name
    assert f"remove the folder {out}.pack" in refused(monkeypatch, capsys, *flags)
    assert out.read_bytes() == written[0][0]


def test_a_copy_of_the_script_alone_says_what_it_needs_for_folders(folder, model_file, packed, tmp_path,
                                                                   monkeypatch, capsys):
    (tmp_path / "copy").mkdir()
    shutil.copy(ROOT / "evaluate/predict.py", tmp_path / "copy")
    spec = importlib.util.spec_from_file_location("copied_predict", tmp_path / "copy/predict.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    monkeypatch.setattr("test_predict.predict", copied)
    flags = ["--checkpoint", model_file[0], "--out", tmp_path / "p.csv"]
    assert f"pack.py, which reads the files; copy it to {tmp_path}/copy" in refused(monkeypatch, capsys, *flags, "--images", folder)
    assert sorted(os.listdir(tmp_path)) == ["copy"]
    run(monkeypatch, *flags, "--manifest", packed)
    assert len(read(tmp_path / "p.csv")) == 19
    shutil.copy(ROOT / "data_prep/pack.py", tmp_path / "copy")              # beside it: all that is needed
    with contextlib.suppress(SystemExit):                                   # 3: some files are rejected
        run(monkeypatch, *flags, "--images", folder)
    assert len(read(tmp_path / "p.csv")) != 19


# What lies beside the predictions

@pytest.mark.parametrize("data, weights, expected", [
    (None, None, None), ("drawn", None, "drawn"), (None, "drawn", "drawn"), ("drawn", "drawn", "drawn"),
    ("drawn here", "drawn there", "drawn here; drawn there")])
def test_a_stand_in_follows_the_data_into_the_facts(data, weights, expected, packed, tmp_path, monkeypatch):
    shutil.copytree(packed.parent, tmp_path / "data")
    if data:
        (tmp_path / "data/pack.json").write_text(json.dumps({"stand_in": data}))
    classifier(tmp_path / "c.pt", **({"stand_in": weights} if weights else {}))
    run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--manifest", tmp_path / "data/manifest.csv",
        "--out", tmp_path / "p.csv")
    assert json.loads((tmp_path / "p.json").read_text()) == {
        "checkpoint": str(tmp_path / "c.pt"), "exp": "3.4", "seed": 11, "n": 19, "split": "test",
        "test_crops": 1, "manifest": str(tmp_path / "data/manifest.csv"), "stand_in": expected}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["head.bias", "blocks.1.mlp.fc2.bias"])
def test_outputs_that_are_not_finite_are_refused(value, place, packed, tmp_path, monkeypatch, capsys):
    content = network()[1]
    content["model"][place][1] = value                  # of the head: the bias of Cardiomegaly alone
    torch.save(content, tmp_path / "diverged.pt")
    said = refused(monkeypatch, capsys, "--checkpoint", tmp_path / "diverged.pt", "--manifest", packed,
                   "--out", tmp_path / "p.csv")
    assert str(tmp_path / "diverged.pt") in said and os.listdir(tmp_path) == ["diverged.pt"]


@pytest.mark.parametrize("size", [0, 100, 600])         # too small for the table
def test_a_full_disk_leaves_what_was_there(size, model_file, packed, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", model_file[0], "--manifest", packed, "--out", tmp_path / "p.csv"]
    run(monkeypatch, *flags)
    before = [(tmp_path / name).read_bytes() for name in ("p.csv", "p.json")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))            # no file can grow larger
    try:
        said = refused(monkeypatch, capsys, *flags, "--test-crops", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in said and sorted(os.listdir(tmp_path)) == ["p.csv", "p.json"]
    assert [(tmp_path / name).read_bytes() for name in ("p.csv", "p.json")] == before


def test_a_kill_leaves_no_table_beside_the_facts_of_another_call(model_file, packed, tmp_path, monkeypatch):
    flags = ["--checkpoint", model_file[0], "--manifest", packed, "--out", tmp_path / "p.csv"]
    run(monkeypatch, *flags)
    replace = os.replace

    def killed_before_the_table(source, target):
        if target == tmp_path / "p.csv":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed_before_the_table)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--test-crops", 10)
    assert json.loads((tmp_path / "p.json").read_text())["test_crops"] == 10
    assert os.listdir(tmp_path) == ["p.json"]


def test_mistakes_are_named_in_one_sentence(model_file, packed, tmp_path, monkeypatch, capsys):
    file, content = model_file[0], network()[1]
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    torch.save({**content, "model": {}}, tmp_path / "hollow.pt")
    torch.save({**content, "labels": LABELS[:2]}, tmp_path / "two.pt")
    torch.save({**content, "mean": [0.1, 0.2]}, tmp_path / "mean.pt")
    torch.save({**content, "arch": "vit_ant"}, tmp_path / "ant.pt")
    torch.save([1], tmp_path / "list.pt")
    table = pd.read_csv(packed, dtype=str, keep_default_na=False)
    table.loc[7, "Cardiomegaly"] = "maybe"
    (tmp_path / "data").mkdir()
    shutil.copy(packed.parent / "images.npy", tmp_path / "data")
    table.to_csv(tmp_path / "data/maybe.csv", index=False)
    (tmp_path / "data/long.csv").write_text("path,split\na.png,test,1\n")
    (tmp_path / "data/pack.json").write_text("[")
    table.drop(columns="Cardiomegaly").to_csv(tmp_path / "data/manifest.csv", index=False)
    good, data, out = ["--checkpoint", file], ["--manifest", packed], ["--out", tmp_path / "p.csv"]
    before = sorted(os.listdir(tmp_path))
    for argv, parts in (
            *((["--checkpoint", tmp_path / name, *data, *out], [name]) for name in (
                "absent.pt", "garbage.pt", "hollow.pt", "two.pt", "mean.pt", "list.pt", "empty")),
            (["--checkpoint", tmp_path / "ant.pt", *data, *out], ["ant.pt", "vit_ant"]),
            ([*good, "--manifest", tmp_path / "none.csv", *out], ["none.csv"]),
            ([*good, "--manifest", tmp_path / "data", *out], ["/data"]),
            ([*good, "--manifest", tmp_path / "data/long.csv", *out], ["long.csv", "row 2"]),
            ([*good, "--manifest", tmp_path / "data/maybe.csv", *out],
             ["maybe.csv row 9", "Cardiomegaly", "'maybe'"]),
            ([*good, "--manifest", tmp_path / "data/manifest.csv", *out], ["pack.json"]),
            ([*good, *data, *out, "--split", "dev"], ["manifest.csv", "dev", "test, val"]),
            ([*good, *out, "--set", "nih_test"], ["--set", "nih_test"]),
            ([*good, *out, "--set", f"a={data[1]}:val", "--set", f"a={data[1]}:test"], ["--set", "NAME"]),
            ([*good, *out], ["--manifest", "--images", "--set"]),
            ([*good, *data, *out, "--images", tmp_path / "empty"], ["--images"]),
            ([*good, *data, *out, "--batch", 0], ["--batch"]),
            ([*good, *data, *out, "--test-crops", 5], ["--test-crops"]),
            *(([*good, "--out", tmp_path / "new/p.csv", "--images", tmp_path / name], [name, "not a folder with files"])
              for name in ("nowhere", "empty", "garbage.pt")),
            ([*good, *data, "--out", file / "p.csv"], [f"{file}/p."]),
            ([*good, "--images", packed.parent, "--out", tmp_path / "new/p"], ["new/p", ".csv"])):     # at once
        said = refused(monkeypatch, capsys, *argv)
        assert not [part for part in parts if part not in said], said
        assert sorted(os.listdir(tmp_path)) == before, said
