"""Facts about evaluate/predict.py, each against an independent formulation."""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
from conftest import blobs, load_script, run_here, run_script, write_pack
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

predict = load_script("evaluate/predict.py")
pack = load_script("data_prep/pack.py")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
LABELS = ["Atelectasis", "Cardiomegaly", "Effusion", "Consolidation", "Pleural_Thickening"]
FACTS = dict(arch="vit_small_patch16_224", model_args=VIT, in_chans=3, img_size=32,
             mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], labels=LABELS)
MEAN, STD = (torch.tensor(FACTS[key])[:, None, None] for key in ("mean", "std"))


def classifier(file, **changes):
    """A classifier.pt with random weights whose probabilities differ between images; returns the network."""
    facts = {**FACTS, **changes}
    torch.manual_seed(0)
    model = timm.create_model(facts["arch"], in_chans=facts["in_chans"], num_classes=len(facts["labels"]),
                              **facts["model_args"]).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    torch.save(dict(model=model.state_dict(), exp=None, seed=0, epoch=1, config={}, **facts), file)
    return model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "classifier.pt"
    return file, classifier(file)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """23 images of 40 x 40 in two splits, with CheXpert's spellings, an uncertain and a blank cell."""
    columns = {"path": [f"a/{i:02}.png" for i in range(23)], "patient": [f"{i // 2:05}" for i in range(23)],
               "split": ["val"] * 4 + ["test"] * 19, "Pleural Effusion": (["1", "0", "-1", ""] * 6)[:23],
               "Cardiomegaly": (["0.0", "1.0"] * 12)[:23], "Fracture": "1"}
    return write_pack(tmp_path_factory.mktemp("packed"), blobs(23), **columns)


def run(monkeypatch, *argv):
    run_here(predict, monkeypatch, "--device", "cpu", *argv)


def read(file):
    return pd.read_csv(file, dtype={"path": str, "patient": str})


def test_predictions_equal_a_plain_loop_with_timm_and_pillow(model_file, packed, tmp_path, monkeypatch):
    file, model = model_file
    run(monkeypatch, "--checkpoint", file, "--manifest", packed, "--out", tmp_path / "p.csv", "--batch", 8)
    found, images = read(tmp_path / "p.csv"), np.load(packed.parent / "images.npy")[4:]
    for row, image in zip(found.itertuples(), images):
        pixels = np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR), np.float32) / 255
        x = (torch.tensor(pixels) - MEAN) / STD
        with torch.inference_mode():
            p = 1 / (1 + np.exp(-model(x[None])[0].double().numpy()))
        # Pillow rounds pixels
        assert (row.prob_Cardiomegaly, row.prob_Effusion) == pytest.approx((p[1], p[2]), abs=1e-3)


def test_ten_crops_are_torchvisions(model_file, packed, tmp_path, monkeypatch):
    file, model = model_file
    run(monkeypatch, "--checkpoint", file, "--manifest", packed, "--out", tmp_path / "p.csv",
        "--test-crops", 10)
    images = torch.tensor(np.load(packed.parent / "images.npy")[4:])[:, None].float()
    large = tv.resize(images, [37, 37], antialias=True)                     # round(32 * 256 / 224)
    views = torch.stack(tv.ten_crop(large, 32))                             # [10, B, 1, 32, 32]
    x = (views.expand(-1, -1, 3, -1, -1) / 255 - MEAN) / STD
    with torch.inference_mode():
        p = model(x.flatten(0, 1)).sigmoid().unflatten(0, (10, -1)).mean(0)
    assert read(tmp_path / "p.csv")["prob_Effusion"].to_numpy() == pytest.approx(p[:, 2].numpy(), abs=1e-5)


def test_file_has_the_contracts_columns_and_order(model_file, packed, tmp_path, monkeypatch):
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", packed, "--split", "val,test",
        "--out", tmp_path / "new/p.csv")
    text = (tmp_path / "new/p.csv").read_text()
    assert text.startswith("path,patient,true_Cardiomegaly,true_Effusion,prob_Cardiomegaly,prob_Effusion\n"
                           "a/00.png,00000,0,1,0.")
    found = read(tmp_path / "new/p.csv")
    assert len(found) == 23 and os.listdir(tmp_path / "new") == ["p.csv"]
    assert found["true_Effusion"].tolist() == ([1, 0, 0, 0] * 6)[:23]       # uncertain and blank count as 0
    cells = [cell for line in text.splitlines()[1:] for cell in line.split(",")[4:]]
    assert cells == [f"{np.float32(cell):.8g}" for cell in cells]


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(model_file, packed, tmp_path, monkeypatch):
    flags = ["--checkpoint", model_file[0], "--set", f"one={packed}:test", "--set", f"all={packed}:all",
             "--batch", 3]
    run(monkeypatch, *flags, "--out", tmp_path / "1")
    result = run_script("evaluate/predict.py", *flags, "--device", "cpu", "--out", tmp_path / "3", nproc=3)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("one.csv", "all.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "3")) == ["all.csv", "one.csv"]


@pytest.mark.parametrize("source, columns, expected", [
    ("NIH", LABELS, dict(zip(LABELS, [[label] for label in LABELS]))),
    ("CheXpert", ["No Finding", "Atelectasis", "Pleural Effusion", "Pleural Other", "Consolidation"],
     {"Atelectasis": ["Atelectasis"], "Effusion": ["Pleural Effusion"], "Consolidation": ["Consolidation"]}),
    ("VinDr", ["Atelectasis", "Pleural effusion", "Pleural thickening", "Cardiomegaly"],
     {"Atelectasis": ["Atelectasis"], "Effusion": ["Pleural effusion"],
      "Pleural_Thickening": ["Pleural thickening"], "Cardiomegaly": ["Cardiomegaly"]}),
    ("PadChest", ["laminar atelectasis", "atelectasis", "lobar atelectasis", "pleural effusion",
                  "pericardial effusion", "loculated pleural effusion", "cardiomegaly"],
     {"Atelectasis": ["laminar atelectasis", "atelectasis", "lobar atelectasis"],
      "Effusion": ["pleural effusion"], "Cardiomegaly": ["cardiomegaly"]}),
])
def test_labels_are_found_under_every_sources_spelling(source, columns, expected):
    found = {label: predict.columns_of(label, columns) for label in LABELS}
    assert {label: names for label, names in found.items() if names} == expected
    cells = pd.DataFrame(np.eye(len(columns), dtype=int).astype(str), columns=columns)  # row i has finding i
    known = predict.truth("m.csv", cells, LABELS)
    for label, names in expected.items():
        assert known[label].tolist() == [int(column in names) for column in columns]


# Folders of files

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of every kind, two folders deep."""
    root = tmp_path_factory.mktemp("folder")
    (root / "sub").mkdir()
    images = blobs(7)
    Image.fromarray(images[0]).save(root / "grey.png")
    Image.fromarray(images[1].astype(np.uint16) * 200).save(root / "sub/sixteen.png")
    Image.fromarray(np.stack([images[2], images[3], images[4]], 2)).save(root / "colour.png")
    Image.fromarray(images[5][:, :37]).save(root / "narrow.jpg")
    deep = images[6].astype(np.uint16) * 16
    dicom(root / "plain.dcm", deep)
    dicom(root / "negative.dicom", deep, "MONOCHROME1", WindowCenter=2000, WindowWidth=1500)
    dicom(root / "sub/no_suffix", deep, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[3000, 9],
          WindowWidth=[2500, 9])
    dicom(root / "padded.dcm", np.where(np.eye(40), 4000, deep), PixelPaddingValue=4000)
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_gives_what_packing_it_gives(folder, tmp_path, monkeypatch):
    file = tmp_path / "classifier.pt"
    classifier(file, in_chans=1, mean=[0.485], std=[0.229])
    run(monkeypatch, "--checkpoint", file, "--images", folder, "--out", tmp_path / "folder.csv")
    found = read(tmp_path / "folder.csv")
    assert found["path"].tolist() == ["colour.png", "grey.png", "narrow.jpg", "negative.dicom", "padded.dcm",
                                      "plain.dcm", "sub/no_suffix", "sub/sixteen.png"]
    assert list(found.columns) == ["path", "patient", *[f"prob_{label}" for label in LABELS]]
    found[["path"]].assign(split="test").to_csv(tmp_path / "index.csv", index=False)
    result = run_script("data_prep/pack.py", "--index", tmp_path / "index.csv", "--raw", folder,
                        "--out", tmp_path / "packed", "--size", 32, "--workers", 1)
    assert result.returncode == 0, result.stderr
    run(monkeypatch, "--checkpoint", file, "--manifest", tmp_path / "packed/manifest.csv",
        "--out", tmp_path / "packed.csv")
    assert (tmp_path / "packed.csv").read_bytes() == (tmp_path / "folder.csv").read_bytes()


def test_dicom_files_are_read_as_the_packer_reads_them():
    compared = 0
    for file in sorted(Path(pydicom.data.__file__).parent.joinpath("test_files").glob("*.dcm")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                packed = np.asarray(pack.read_image(file)[0])
            except Exception:                           # no single grey image: the packer rejects it
                continue
            np.testing.assert_array_equal(predict.read_dicom(file), packed, err_msg=file.name)
        compared += 1
    assert compared >= 10


def test_mistakes_are_named_in_one_sentence(model_file, packed, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"\x89PNG not an image")
    (tmp_path / "color").mkdir()
    dicom(tmp_path / "color/b.dcm", np.zeros((4, 4)), "PALETTE COLOR")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    torch.save(dict(model={}, arch="resnet18", model_args={}, in_chans=3, img_size=32, mean=[], std=[]),
               tmp_path / "backbone.pt")
    torch.save({"model": {}, **FACTS}, tmp_path / "hollow.pt")
    table = pd.read_csv(packed, dtype=str, keep_default_na=False).assign(Cardiomegaly="maybe")
    table.to_csv(tmp_path / "maybe.csv", index=False)
    good, out = ["--checkpoint", model_file[0]], ["--out", tmp_path / "p.csv"]
    data = ["--manifest", packed, *out]
    for argv, part in (
            (["--checkpoint", tmp_path / "absent.pt", *data], "absent.pt does not exist"),
            (["--checkpoint", tmp_path / "garbage.pt", *data], "is not a plain tensor checkpoint"),
            (["--checkpoint", tmp_path / "backbone.pt", *data], "it has no 'labels'"),
            (["--checkpoint", tmp_path / "hollow.pt", *data], "does not fit vit_small_patch16_224"),
            ([*good, "--manifest", tmp_path / "none.csv", *out], "none.csv does not exist"),
            ([*good, *data, "--split", "dev"], "no rows of split 'dev'"),
            ([*good, "--manifest", tmp_path / "maybe.csv", *out],
             "maybe.csv row 6: label 'Cardiomegaly' is 'maybe'"),
            ([*good, "--set", "nih_test", *out], "--set nih_test; expected NAME=FILE:SPLIT"),
            ([*good, "--images", tmp_path / "nowhere", *out], "nowhere is not a folder"),
            ([*good, "--images", tmp_path / "empty", *out], "holds no image files"),
            ([*good, "--images", tmp_path / "broken", *out], "a.png cannot be read as an image"),
            ([*good, "--images", tmp_path / "color", *out], "b.dcm cannot be read as an image"),
            ([*good, "--manifest", packed, "--out", model_file[0] / "p.csv"], "cannot write")):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error: ") and part in error, error
    assert not (tmp_path / "p.csv").exists()


def test_a_manifest_without_the_labels_gets_probabilities_of_all(model_file, packed, tmp_path, monkeypatch):
    os.link(packed.parent / "images.npy", tmp_path / "images.npy")
    plain = tmp_path / "manifest.csv"
    pd.read_csv(packed, dtype=str)[["path"]].to_csv(plain, index=False)
    run(monkeypatch, "--checkpoint", model_file[0], "--manifest", plain, "--out", tmp_path / "p.csv")
    found = read(tmp_path / "p.csv")
    assert list(found.columns) == ["path", "patient", *[f"prob_{label}" for label in LABELS]]
    assert len(found) == 23


@pytest.mark.parametrize("arch", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_other_backbones_predict_too(arch, packed, tmp_path, monkeypatch):
    model = classifier(tmp_path / "c.pt", arch=arch, model_args={}, img_size=224)
    run(monkeypatch, "--checkpoint", tmp_path / "c.pt", "--manifest", packed, "--split", "val",
        "--out", tmp_path / "p.csv")
    images = torch.tensor(np.load(packed.parent / "images.npy")[:4])[:, None].float()
    x = tv.resize(images, [224, 224], antialias=True).expand(-1, 3, -1, -1) / 255
    with torch.inference_mode():
        p = model((x - MEAN) / STD).sigmoid()
    assert read(tmp_path / "p.csv")["prob_Effusion"].to_numpy() == pytest.approx(p[:, 2].numpy(), abs=1e-5)
