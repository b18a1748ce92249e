"""MedMNIST's files as packs: labels in their order, splits, pixels, and the form of pack.py."""

import errno
import hashlib
import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import load_script, run_here, run_script
from PIL import Image

medmnist = load_script("data_prep/medmnist.py")
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]
# MedMNIST's own words (INFO of the package medmnist), number by number.
CHEST = ("atelectasis cardiomegaly effusion infiltration mass nodule pneumonia pneumothorax consolidation "
         "edema emphysema fibrosis pleural hernia").split()
OCT = {0: ("choroidal neovascularization", "CNV"), 1: ("diabetic macular edema", "DME"),
       2: ("drusen", "DRUSEN"), 3: ("normal", "NORMAL")}
ORGAN = {0: "bladder", 1: "femur-left", 2: "femur-right", 3: "heart", 4: "kidney-left", 5: "kidney-right",
         6: "liver", 7: "lung-left", 8: "lung-right", 9: "pancreas", 10: "spleen"}


def make(folder, name, labels, n=(7, 3, 4), side=12, seed=0, **changes):
    """A file in MedMNIST's form. labels: highest number and columns of the labels. Returns: its arrays."""
    rng, (highest, width) = np.random.default_rng(seed), labels
    arrays = {}
    for split, count in zip(("train", "val", "test"), n):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, highest + 1, (count, width)).astype(np.uint8)
    np.savez_compressed(folder / f"{name}.npz", **arrays | changes)
    return arrays


def call(monkeypatch, folder, name, *flags, out="out"):
    run_here(medmnist, monkeypatch, "--raw", folder / f"{name}.npz", "--out", folder / out, *flags)
    manifest = pd.read_csv(folder / out / "manifest.csv", dtype=str, keep_default_na=False)
    return manifest, np.load(folder / out / "images.npy", mmap_mode="r")


def test_chest_labels_are_nihs_in_medmnists_order_and_rows_describe_their_images(tmp_path, monkeypatch):
    arrays = make(tmp_path, "chestmnist_64", (1, 14))
    manifest, images = call(monkeypatch, tmp_path, "chestmnist_64")
    assert list(manifest.columns[:8]) == FACTS
    nih = load_script("data_prep/nih.py").LABELS
    assert list(manifest.columns[8:]) == nih
    assert [name.lower().split("_")[0] for name in nih] == CHEST
    row = 0
    for split in ("train", "val", "test"):
        for image, marks in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"]):
            assert (images[row] == image).all() and manifest.split[row] == split
            assert list(manifest.iloc[row, 8:]) == [str(mark) for mark in marks]
            row += 1
    assert row == len(manifest) == len(images) and manifest.path.is_unique and (manifest.sex == "").all()


@pytest.mark.parametrize("name, columns", [
    ("octmnist_28", [short for _, short in OCT.values()]), ("organamnist", list(ORGAN.values())),
    ("organcmnist_128", list(ORGAN.values())), ("organsmnist_224", list(ORGAN.values()))])
def test_a_class_becomes_one_column_of_1_and_the_others_of_0(tmp_path, monkeypatch, name, columns):
    arrays = make(tmp_path, name, (len(columns) - 1, 1), n=(30, 5, 9))
    manifest, _ = call(monkeypatch, tmp_path, name)
    numbers = np.concatenate([arrays[f"{split}_labels"] for split in ("train", "val", "test")]).ravel()
    assert [list(row).index("1") for row in manifest[columns].to_numpy()] == list(numbers)
    assert list(manifest.columns) == FACTS + columns and (manifest[columns] == "1").sum(axis=1).eq(1).all()


def test_pneumonia_is_a_single_yes_or_no_under_nihs_name(tmp_path, monkeypatch):
    arrays = make(tmp_path, "pneumoniamnist", (1, 1))
    manifest, _ = call(monkeypatch, tmp_path, "pneumoniamnist")
    numbers = np.concatenate([arrays[f"{split}_labels"] for split in ("train", "val", "test")]).ravel()
    assert list(manifest.columns) == [*FACTS, "Pneumonia"]
    assert list(manifest.Pneumonia.astype(int)) == list(numbers)


def test_pretrain_rows_are_those_splits_in_a_seeded_order_with_their_images(tmp_path, monkeypatch):
    arrays = make(tmp_path, "octmnist", (3, 1), n=(1500, 30, 9), side=6)
    manifest, images = call(monkeypatch, tmp_path, "octmnist", "--pretrain", "train,val")
    assert set(manifest.split) == {"pretrain"} and len(manifest) == len(images) == 1530
    order = np.random.default_rng(42).permutation(1530)
    both = np.concatenate([arrays["train_images"], arrays["val_images"]])
    assert (images == both[order]).all() and manifest.path[0] == f"octmnist/train/{order[0]:06}"
    labels = np.concatenate([arrays["train_labels"], arrays["val_labels"]]).ravel()
    columns = manifest[["CNV", "DME", "DRUSEN", "NORMAL"]].to_numpy()
    assert [list(row).index("1") for row in columns] == list(labels[order])


def test_the_folder_is_what_pack_py_writes(tmp_path, monkeypatch, capsys):
    arrays = make(tmp_path, "pneumoniamnist", (1, 1), side=28)
    make(tmp_path, "again", (1, 1))
    call(monkeypatch, tmp_path, "pneumoniamnist")
    out = tmp_path / "out"
    facts = json.loads((out / "pack.json").read_text())
    pixels = np.concatenate([arrays[f"{split}_images"].ravel() for split in ("train", "val", "test")]) / 255
    assert facts["mean"] == pytest.approx(pixels.mean(), abs=1e-12)
    assert facts["std"] == pytest.approx(pixels.std(), abs=1e-12)
    assert (facts["size"], facts["N"], facts["dataset"]) == (28, 14, "out")
    paths = "".join(path + "\n" for path in pd.read_csv(out / "manifest.csv", dtype=str).path)
    assert facts["order"] == hashlib.sha256(paths.encode()).hexdigest()
    Image.fromarray(arrays["train_images"][0]).save(tmp_path / "0.png")
    (tmp_path / "index.csv").write_text("path\n0.png\n")
    assert run_script("data_prep/pack.py", "--index", tmp_path / "index.csv", "--raw", tmp_path, "--out",
                      tmp_path / "packed").returncode == 0
    packed = json.loads((tmp_path / "packed/pack.json").read_text())
    assert packed.pop("stand_in") is None and "not the study's" in facts.pop("stand_in")    # other splits
    types = ({key: type(value) for key, value in pack.items()} for pack in (facts, packed))
    assert next(types) == next(types)
    files = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {path.name for path in out.iterdir()} == files | {"index.csv", "index.json"}
    assert (out / "index.csv").read_bytes() == (out / "manifest.csv").read_bytes()
    assert json.loads((out / "index.json").read_text())["splits"]["val"] == {"images": 3, "patients": 3}
    assert "warning" in capsys.readouterr().out                     # 7 of train, not the published 4,708
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    call(monkeypatch, tmp_path, "pneumoniamnist")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_pack_of_another_maker_is_not_replaced(tmp_path, monkeypatch, capsys):
    make(tmp_path, "pneumoniamnist", (1, 1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pack.json").write_text('{"dataset": "nih", "stand_in": null}\n')
    (tmp_path / "out/index.csv").write_text("path\n0.png\n")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, tmp_path, "pneumoniamnist")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "another maker" in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pack.json", "index.csv"}
    assert (tmp_path / "out/index.csv").read_text() == "path\n0.png\n"


def test_pack_py_does_not_replace_a_medmnist_pack(tmp_path, monkeypatch):
    make(tmp_path, "pneumoniamnist", (1, 1), side=28)
    call(monkeypatch, tmp_path, "pneumoniamnist")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(tmp_path / "0.png")
    (tmp_path / "index.csv").write_text("path\n0.png\n")
    said = run_script("data_prep/pack.py", "--index", tmp_path / "index.csv", "--raw", tmp_path, "--out",
                      tmp_path / "out")
    assert said.returncode == 2 and f"{tmp_path / 'out'}: its index_sha256 is" in said.stderr
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_published_sizes_are_medmnists():
    sizes = {name: facts[2] for name, facts in medmnist.SETS.items()}
    assert sizes == {"chestmnist": (78468, 11219, 22433), "octmnist": (97477, 10832, 1000),
                     "pneumoniamnist": (4708, 524, 624), "organamnist": (34561, 6491, 17778),
                     "organcmnist": (12975, 2392, 8216), "organsmnist": (13932, 2452, 8827)}
    assert sum(sizes["chestmnist"]) == 112_120 and sum(sizes["octmnist"]) == 109_309       # of their sources
    assert sum(sizes["pneumoniamnist"]) == 5_856


@pytest.mark.parametrize("change, said", [
    ({"val_labels": np.full((3, 1), 2)}, "val_labels"), ({"val_labels": np.zeros((3, 2))}, "val_labels"),
    ({"val_labels": np.zeros(3)}, "val_labels"),
    ({"train_images": np.zeros((7, 4, 5), np.uint8)}, "train_images"),
    ({"test_images": np.zeros((3, 4, 4), np.uint8)}, "test_images"),
    ({"test_images": np.zeros((4, 12, 12), np.float32)}, "test_images float32"),
    ({"val_images": np.zeros((3, 4, 4), np.uint8)}, "val_images"),          # images of two sizes
    ({"train_images": np.zeros(7, np.uint8)}, "train_images"), ({"train_images": np.uint8(7)}, "train_images"),
    ({"test_labels": np.array([["x"]] * 4, object)}, "test_labels")])
def test_a_file_of_another_form_is_refused_by_the_array(tmp_path, monkeypatch, capsys, change, said):
    make(tmp_path, "pneumoniamnist", (1, 1), **change)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, tmp_path, "pneumoniamnist")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.glob("out/*"))


def test_a_disk_without_room_is_a_sentence_before_an_image_is_written(tmp_path, monkeypatch, capsys):
    def full(descriptor, start, size):
        assert (start, size) == (0, os.fstat(descriptor).st_size) and size > 14 * 12 * 12
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make(tmp_path, "pneumoniamnist", (1, 1))
    monkeypatch.setattr(medmnist.os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, tmp_path, "pneumoniamnist")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "No space left on device" in error
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.unlink(), "No such file"), (lambda path: path.write_bytes(b""), "no array"),
    (lambda path: path.write_bytes(path.read_bytes()[:300]), "no array"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b"train_labels", b"x" * 12)), "no array"),
    (lambda path: np.save(open(path, "wb"), np.zeros(3)), "no array"),
    (lambda path: np.savez(path, other=np.zeros(3)), "no array train_labels"),
    (lambda path: path.rename(path.with_name("retinamnist.npz")), "No such file")])
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, damage, said):
    make(tmp_path, "pneumoniamnist", (1, 1))
    damage(tmp_path / "pneumoniamnist.npz")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, tmp_path, "pneumoniamnist")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("name, flags, said", [
    ("retinamnist", (), "retinamnist.npz"), ("pneumoniamnist", ("--pretrain", "all"), "--pretrain all"),
    ("pneumoniamnist", ("--out", "{}/pneumoniamnist.npz/x"), "cannot be written")])
def test_other_mistakes_are_a_sentence(tmp_path, monkeypatch, capsys, name, flags, said):
    make(tmp_path, name, (1, 1))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, tmp_path, name, *(flag.format(tmp_path) for flag in flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_help_names_source_licence_and_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medmnist.py", "--help"])
    with pytest.raises(SystemExit):
        medmnist.main()
    words = capsys.readouterr().out
    assert "CC BY 4.0" in words and "https://zenodo.org/records/10519652" in words and "wget" in words
