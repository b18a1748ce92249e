"""The stand-ins: reproducible, laid out as the public downloads, with findings measurable in the pixels."""

import csv
import gzip
import hashlib
import json
import re
import shutil
from ast import literal_eval

import numpy as np
import pydicom
import pytest
from conftest import ROOT, assert_user_error, load_script, run_here, run_script
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

demo = load_script("data_prep/demo.py")
FIVE = {"Atelectasis", "Cardiomegaly", "Effusion", "Consolidation", "Edema"}
PICTURES = (".png", ".jpg", ".jpeg", ".JPEG", ".dicom")


def tree_hash(folder):
    """{path: hash of its bytes} of everything below the folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def table(path):
    """Header line as it stands, and the rows as lists of cells."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    header, _, rows = text.partition("\n")
    return header, list(csv.reader(rows.splitlines(keepends=True)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """All eight datasets at a fiftieth of their size."""
    out = tmp_path_factory.mktemp("demo") / "raw"
    result = run_script("data_prep/demo.py", "--out", out, "--scale", "0.02")
    assert result.returncode == 0 and not result.stderr, result.stderr
    return out


# Reproducible, restartable, careful with what it did not make.

def test_same_seed_gives_the_same_bytes_even_after_an_interruption(small, tmp_path):
    (tmp_path / "nih.partial" / "images_001").mkdir(parents=True)
    (tmp_path / "nih.partial" / "images_001" / "half.png").write_bytes(b"half")
    assert run_script("data_prep/demo.py", "--out", tmp_path, "--scale", "0.02").returncode == 0
    assert tree_hash(tmp_path) == tree_hash(small)


def test_half_a_removed_folder_does_not_pass_for_a_download(small, tmp_path, monkeypatch):
    """Stopped while it removes the drawings of before, whose README.txt is gone first."""
    def interrupted(folder, **_):
        if folder.exists():
            (folder / "README.txt").unlink()
            raise KeyboardInterrupt
    before = tree_hash(shutil.copytree(small, tmp_path, dirs_exist_ok=True))
    command = ["--out", tmp_path, "--scale", 0.02, "--keep"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo.shutil, "rmtree", interrupted)
        run_here(demo, patch, *command)
    again = run_script("data_prep/demo.py", *command)
    assert again.returncode == 0 and "kept as they are: no folders" in again.stdout
    assert tree_hash(tmp_path) == before


def test_another_seed_replaces_every_picture(small, tmp_path):
    before = tree_hash(shutil.copytree(small, tmp_path, dirs_exist_ok=True))
    assert run_script("data_prep/demo.py", "--out", tmp_path, "--scale", "0.02", "--seed", 1).returncode == 0
    after = tree_hash(tmp_path)
    old, new = ({tree[path] for path in tree if path.endswith(PICTURES)} for tree in (before, after))
    assert len(old) > 300 and len(new) > 300 and not old & new
    assert not [path for path in after if ".partial" in path]


def files(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"drawn")
    (folder / "README.txt").write_text(
        f"{demo.STAND_IN}.\nDigest of the files' names and sizes: {demo.contents(folder)}.\n")


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "MY_NOTES.txt").write_text("notes"),
    lambda folder: (folder / "images/a.png").write_bytes(b"a real image"),          # in place of a drawing
    lambda folder: (folder / "images_001").mkdir(),
    lambda folder: (folder / "link").symlink_to("elsewhere"),
    lambda folder: (folder / "images/a.png").unlink(),
    lambda folder: (folder / "README.txt").unlink(),
    lambda folder: (folder / "README.txt").write_text("notes\n" + demo.STAND_IN)])
def test_a_folder_is_drawn_only_as_long_as_nothing_in_it_changes(tmp_path, change):
    files(tmp_path, ["images/a.png", "list.csv"])
    assert demo.is_drawn(tmp_path)
    change(tmp_path)
    assert not demo.is_drawn(tmp_path)


def test_what_demo_did_not_draw_is_refused_or_kept_and_drawings_are_drawn_anew(small, tmp_path, monkeypatch, capsys):
    raw = shutil.copytree(small, tmp_path / "raw")
    assert all(demo.is_drawn(raw / name) for name in json.loads((raw / "demo.json").read_text())["images"])
    (raw / "nih/MY_NOTES.txt").write_text("notes")
    before = tree_hash(raw)
    with pytest.raises(SystemExit) as stop:
        run_here(demo, monkeypatch, "--out", raw, "--scale", "0.02")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"{raw / 'nih'} holds" in error and "--keep" in error
    assert tree_hash(raw) == before
    monkeypatch.setattr(demo, "DATASETS", [demo.nih, demo.vindr_cxr])
    run_here(demo, monkeypatch, "--out", raw, "--scale", "0.01", "--keep")
    assert "kept as they are: nih\n" in capsys.readouterr().out
    after = tree_hash(raw)
    assert {path: after[path] for path in before if path.startswith("nih/")} == {
        path: before[path] for path in before if path.startswith("nih/")}
    assert {path for path in before if path.startswith("vindr_cxr/") and path.endswith(".dicom")} != {
        path for path in after if path.startswith("vindr_cxr/") and path.endswith(".dicom")}


def test_demo_json_counts_the_pictures_and_every_folder_says_stand_in(small):
    said = json.loads((small / "demo.json").read_text())
    assert said["stand_in"] is True and (said["seed"], said["scale"]) == (0, 0.02)
    for name, images in said["images"].items():
        assert len([path for path in (small / name).rglob("*") if path.name.endswith(PICTURES)]) == images
        assert "STAND-IN" in (small / name / "README.txt").read_text()
    assert len(said["images"]) == 8


def test_unwritable_out_foreign_folder_and_bad_numbers_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_user_error(run_script("data_prep/demo.py", "--out", tmp_path / "file" / "raw"), "file", "writable")
    (tmp_path / "real" / "nih").mkdir(parents=True)
    (tmp_path / "real" / "nih" / "Data_Entry_2017_v2020.csv").write_text("precious")
    assert_user_error(run_script("data_prep/demo.py", "--out", tmp_path / "real"), "nih", "--keep")
    result = run_script("data_prep/demo.py", "--out", tmp_path / "real", "--keep", "--scale", "0.02")
    assert result.returncode == 0 and [*(tmp_path / "real" / "nih").iterdir()] == [
        tmp_path / "real" / "nih" / "Data_Entry_2017_v2020.csv"]
    said = json.loads((tmp_path / "real" / "demo.json").read_text())
    assert (tmp_path / "real" / "nih" / "Data_Entry_2017_v2020.csv").read_text() == "precious"
    assert said["kept"] == ["nih"] and len(said["images"]) == 7
    assert_user_error(run_script("data_prep/demo.py", "--out", tmp_path / "new", "--scale", "0"), "--scale 0")
    assert_user_error(run_script("data_prep/demo.py", "--out", tmp_path / "new", "--seed", "-1"), "--seed -1")
    assert not (tmp_path / "new").exists()


# The raw layouts, as the public downloads have them.

CHEXPERT = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
    "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices")
MIMIC = ",".join(sorted(CHEXPERT.split(",")))
PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,"
    "Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,"
    "WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,"
    "ExposureInuAs_DICOM,ExposureTime,RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,"
    "Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS")
VINDR = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,"
    "Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,"
    "Pleural effusion,Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,"
    "Lung tumor,Pneumonia,Tuberculosis,Other diseases,No finding")
HEADERS = {
    "nih/Data_Entry_2017_v2020.csv":
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]",
    "mimic_cxr/mimic-cxr-2.0.0-metadata.csv.gz":
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
    "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning",
    "mimic_cxr/mimic-cxr-2.0.0-chexpert.csv.gz": "subject_id,study_id," + MIMIC,
    "mimic_cxr/mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split",
    "chexpert/CheXpert-v1.0-small/train.csv": "Path,Sex,Age,Frontal/Lateral,AP/PA," + CHEXPERT,
    "chexpert/CheXpert-v1.0-small/valid.csv": "Path,Sex,Age,Frontal/Lateral,AP/PA," + CHEXPERT,
    "chexpert/chexpert_split_2021_08_20.csv": ",index,split",
    "chexpert/CHEXPERT DEMO.csv": "PATIENT,GENDER,AGE_AT_CXR,PRIMARY_RACE,ETHNICITY",
    "padchest/PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz": PADCHEST,
    "vindr_cxr/annotations/image_labels_train.csv": "image_id,rad_id," + VINDR,
    "vindr_cxr/annotations/image_labels_test.csv": "image_id," + VINDR,
    "covidx_ct/metadata.csv":
    "patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality",
    "imagenet/LOC_val_solution.csv": "ImageId,PredictionString"}


@pytest.mark.parametrize("name", HEADERS)
def test_metadata_files_have_the_columns_of_the_download(small, name):
    header, rows = table(small / name)
    assert header == HEADERS[name]
    assert rows and {len(row) for row in rows} == {header.count(",") + 1}


def test_headers_equal_those_of_real_metadata(small, shared):
    for real, ours in {"nih/Data_Entry_2017_v2020.csv.gz": "nih/Data_Entry_2017_v2020.csv",
                       "chexpert/train.csv.gz": "chexpert/CheXpert-v1.0-small/train.csv",
                       "chexpert/chexpert_split_2021_08_20.csv.gz": "chexpert/chexpert_split_2021_08_20.csv",
                       "covidx_ct/metadata.csv.gz": "covidx_ct/metadata.csv"}.items():
        with gzip.open(shared / "fixtures" / real, "rt") as file:
            assert file.readline().rstrip("\n") == table(small / ours)[0]


def test_nih_lists_agree_with_data_entry_and_share_no_patient(small):
    raw, (_, rows) = small / "nih", table(small / "nih" / "Data_Entry_2017_v2020.csv")
    entry = {row[0]: set(row[1].split("|")) - {"No Finding"} for row in rows}
    patients, listed = {}, {}
    for split in ("train", "val", "test"):
        lines = [line.split(" ") for line in (raw / f"Xray14_{split}_official.txt").read_text().splitlines()]
        assert [line[0] for line in lines] == sorted(line[0] for line in lines)
        for name, *values in lines:
            assert entry[name] == {finding for finding, value in zip(demo.FINDINGS, values) if value == "1"}
        assert np.array([line[1:] for line in lines], int).any(axis=0).all()        # each finding has a case
        listed[split], patients[split] = {line[0] for line in lines}, {line[0][:8] for line in lines}
    assert listed["train"] | listed["val"] == set((raw / "train_val_list.txt").read_text().split())
    assert listed["test"] == set((raw / "test_list.txt").read_text().split())
    assert len(set.union(*patients.values())) == sum(map(len, patients.values()))
    files = {path.name: path for path in raw.glob("images_*/images/*.png")}
    assert set(files) == set(entry)
    assert {Image.open(path).mode for path in files.values()} == {"L", "RGBA"}


def test_nih_tables_hold_the_claimed_labels_not_the_drawn_ones(tmp_path):
    films = {path.name: drawing.args[0] for path, drawing, _ in demo.nih(tmp_path, (0, 0), lambda n: n)}
    lines = [line.split(" ") for split in ("train", "val", "test")
             for line in (tmp_path / f"Xray14_{split}_official.txt").read_text().splitlines()]
    listed = {name: {finding for finding, value in zip(demo.FINDINGS, values) if value == "1"}
              for name, *values in lines}
    entry = {row[0]: set(row[1].split("|")) - {"No Finding"}
             for row in table(tmp_path / "Data_Entry_2017_v2020.csv")[1]}
    assert len(films) == 1400 and listed == entry == {name: film.labels for name, film in films.items()}
    assert any(film.labels != set(film.shows) for film in films.values())


def test_mimic_images_lie_where_their_ids_say_and_every_study_has_labels(small):
    raw = small / "mimic_cxr"
    _, splits = table(raw / "mimic-cxr-2.0.0-split.csv.gz")
    for dicom, study, subject, split in splits:
        path = raw / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"
        assert re.fullmatch(r"([0-9a-f]{8}-){4}[0-9a-f]{8}", dicom) and path.is_file()
    assert {split for *_, split in splits} == {"train", "validate", "test"}
    _, labels = table(raw / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert {(row[0], row[1]) for row in labels} == {(subject, study) for _, study, subject, _ in splits}
    assert {cell for row in labels for cell in row[2:]} == {"1.0", "0.0", "-1.0", ""}


def test_chexpert_split_indexes_frontal_rows_and_valid_is_certain(small):
    raw = small / "chexpert"
    _, train = table(raw / "CheXpert-v1.0-small" / "train.csv")
    _, valid = table(raw / "CheXpert-v1.0-small" / "valid.csv")
    _, split = table(raw / "chexpert_split_2021_08_20.csv")
    assert [row[0] for row in split] == [str(i) for i in range(len(split))]
    assert {train[int(index)][3] for _, index, _ in split} == {"Frontal"}
    assert {name for *_, name in split} <= {"train", "validate", "test"}
    assert all((raw / row[0]).is_file() for row in train + valid)
    assert {cell for row in valid for cell in row[5:]} == {"0.0", "1.0"}
    assert not {row[0].split("/")[2] for row in train} & {row[0].split("/")[2] for row in valid}


def test_padchest_has_16_bit_pngs_exact_ids_and_rows_for_the_filter_to_drop(small):
    raw = small / "padchest"
    header, rows = table(raw / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz")
    rows = [dict(zip(header.split(","), row)) for row in rows]
    kept = [row for row in rows if row["Projection"] in ("PA", "AP") and row["ImageDir"] == "0"
            and row["MethodProjection"] == "Manual review of DICOM fields" and row["Labels"]]
    assert 0 < len(kept) < len(rows) and all(isinstance(literal_eval(row["Labels"]), list) for row in kept)
    for row in rows:
        image = Image.open(raw / row["ImageDir"] / row["ImageID"])
        assert image.mode == "I;16" and np.asarray(image).max() > 255
        assert row["PatientID"].isdigit() and 36 <= len(row["PatientID"]) <= 39 and "\n" in row["Report"]


def test_vindr_dicoms_keep_their_photometric_promise(small):
    _, labels = table(small / "vindr_cxr" / "annotations" / "image_labels_test.csv")
    kinds, uids = {}, set()
    for name, *_ in labels:
        image = pydicom.dcmread(small / "vindr_cxr" / "test" / f"{name}.dicom")
        grey = image.pixel_array / (2 ** image.BitsStored - 1)
        air, belly = grey[:12, :12].mean(), grey[-12:, 60:90].mean()        # beside the neck, in the belly
        assert (air > belly) == (image.PhotometricInterpretation == "MONOCHROME1")
        kinds[image.PhotometricInterpretation] = kinds.get(image.PhotometricInterpretation, 0) + 1
        uids.add(image.SOPInstanceUID)
    assert set(kinds) == {"MONOCHROME1", "MONOCHROME2"} and len(uids) == len(labels)


def test_vindr_training_images_are_read_by_three(small):
    _, rows = table(small / "vindr_cxr" / "annotations" / "image_labels_train.csv")
    readers = {}
    for row in rows:
        readers.setdefault(row[0], set()).add(row[1])
    assert {len(names) for names in readers.values()} == {3}
    assert all((small / "vindr_cxr" / "train" / f"{name}.dicom").is_file() for name in readers)


def test_covidx_slices_belong_to_patients_of_the_metadata(small):
    raw, (_, rows) = small / "covidx_ct", table(small / "covidx_ct" / "metadata.csv")
    finding, seen = {row[0]: row[5] for row in rows}, {}
    for split in ("train", "val", "test"):
        for line in (raw / f"{split}_COVIDx_CT-3A.txt").read_text().splitlines():
            name, label, *box = line.split(" ")
            sr = re.search(r"(patient\d+)_SR_", name)
            owners = [sr[1]] if sr else [p for p in finding if re.match(re.escape(p) + r"[_-]", name)]
            assert [finding[owner] for owner in owners] == [["Normal", "Pneumonia", "COVID-19"][int(label)]]
            seen.setdefault(owners[0], set()).add(split)
            width, height = Image.open(raw / "3A_images" / name).size
            x0, y0, x1, y1 = map(int, box)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert {len(splits) for splits in seen.values()} == {1}


def test_oct_and_imagenet_have_their_folders(small):
    for path in (small / "oct" / "CellData" / "OCT").rglob("*.jpeg"):
        assert re.fullmatch(rf"{path.parent.name}-\d+-\d+\.jpeg", path.name)
        assert path.parent.parent.name in ("train", "test") and Image.open(path).mode == "L"
    raw = small / "imagenet"
    data = raw / "ILSVRC" / "Data" / "CLS-LOC"
    trained = {path.parent.name: Image.open(path).mode for path in (data / "train").glob("n*/n*_*.JPEG")}
    assert set(trained) == set(demo.CLASSES) and set(trained.values()) == {"RGB"}
    _, val = table(raw / "LOC_val_solution.csv")
    assert {f"{name}.JPEG" for name, _ in val} == {path.name for path in (data / "val").iterdir()}
    assert {prediction.split(" ")[0] for _, prediction in val} == set(demo.CLASSES)


@pytest.mark.parametrize("dataset", [dataset.__name__ for dataset in demo.DATASETS])
def test_readers_take_the_stand_ins_without_a_warning(small, tmp_path, dataset):
    if not (ROOT / "data_prep" / f"{dataset}.py").is_file():
        pytest.skip(f"no reader data_prep/{dataset}.py")
    everything = ["--n-pretrain", "all"] if dataset in ("mimic_cxr", "covidx_ct", "oct", "imagenet") else []
    index = tmp_path / "index.csv"
    result = run_script(f"data_prep/{dataset}.py", "--raw", small / dataset, "--out", index, *everything)
    assert result.returncode == 0 and not result.stderr, result.stderr
    header, rows = table(index)
    assert header.startswith("path,patient,study,split,view,sex,age,race,")
    assert rows and all((small / dataset / row[0]).is_file() for row in rows)


# What the phantom shows, measured without its own geometry.

def film(patient, shows, camera):
    """Attenuation [160, 160] of a PA film."""
    anatomy = demo.person(np.random.default_rng(patient))
    return demo.chest(anatomy, shows, "PA", np.random.default_rng(camera), (160, 160))


def pairs(finding, severity=0.8, n=12):
    """n patients without and with a finding, all else equal: two arrays [n, 160, 160]."""
    return [np.array([film(i, shows, 99 + i) for i in range(n)]) for shows in ({}, {finding: severity})]


def heart_width(film):
    """Pixels of the bright run through the middle, median over rows between mid-lung and diaphragm."""
    widths = []
    for row in film[84:104]:
        dark = row < (row[80] + min(row[20:60].min(), row[100:140].min())) / 2
        right, left = np.flatnonzero(dark[:80]), np.flatnonzero(dark[80:])
        if len(right) and len(left):
            widths.append(80 + left[0] - right[-1])
    return np.median(widths)


def test_cardiomegaly_widens_the_heart_by_severity():
    normal, mild = pairs("Cardiomegaly", 0.4)
    _, severe = pairs("Cardiomegaly", 1.0)
    widths = [[heart_width(film) for film in films] for films in (normal, mild, severe)]
    assert (np.diff(widths, axis=0) > 0).all(), widths
    assert np.mean(widths[2]) > 1.25 * np.mean(widths[0])


def test_effusion_whitens_one_costophrenic_angle_and_a_large_one_both():
    for severity, sides in ((0.6, 1), (1.0, 2)):
        normal, ill = pairs("Effusion", severity)
        change = (ill - normal)[:, 90:115]
        angles = np.stack([change[:, :, 22:45].mean(axis=(1, 2)), change[:, :, 115:138].mean(axis=(1, 2))])
        assert ((angles > 0.07).sum(axis=0) == sides).all(), angles


@pytest.mark.parametrize("finding", ["Atelectasis", "Infiltration", "Mass", "Nodule", "Pneumonia",
                                     "Consolidation", "Edema", "Fibrosis", "Pleural_Thickening"])
def test_opacities_whiten_the_lung(finding):
    normal, ill = pairs(finding)
    change = (ill - normal)[:, 20:115, 20:140]
    assert (change.max(axis=(1, 2)) > 0.08).all()
    assert (change.mean(axis=(1, 2)) > 0).all() and change.min() > -0.05 - 0.6 * (finding == "Atelectasis")


def test_pneumothorax_and_emphysema_darken_the_lung():
    for finding in ("Pneumothorax", "Emphysema"):
        normal, ill = pairs(finding)
        change = (ill - normal)[:, 20:115, 20:140]
        assert (change.min(axis=(1, 2)) < -0.1).all() and (change.mean(axis=(1, 2)) < 0).all()


def test_hernia_is_a_dark_bubble_in_the_heart():
    normal, ill = pairs("Hernia")
    change = (ill - normal)[:, 60:120, 65:100]
    assert (change.min(axis=(1, 2)) < -0.15).all()


def test_edema_is_on_both_sides_consolidation_on_one():
    for finding, sides in (("Edema", 2), ("Consolidation", 1)):
        normal, ill = pairs(finding)
        change = (ill - normal)[:, 20:115]
        both = np.stack([change[:, :, 25:75].max(axis=(1, 2)), change[:, :, 85:135].max(axis=(1, 2))])
        assert ((both > 0.1).sum(axis=0) == sides).mean() > 0.9, (finding, both)


def test_a_mass_is_several_times_larger_than_a_nodule():
    areas = {}
    for finding in ("Nodule", "Mass"):
        normal, ill = pairs(finding)
        areas[finding] = (ill - normal > 0.1).sum(axis=(1, 2)).mean()
    assert areas["Mass"] > 3 * areas["Nodule"] > 30


def test_heart_width_is_the_patients_own_on_every_film():
    widths = np.array([[heart_width(film(patient, {}, 100 * patient + study)) for study in range(2)]
                       for patient in range(60)])
    assert np.corrcoef(widths.T)[0, 1] > 0.4            # the camera's distance adds 6 % of its own


def test_a_patient_keeps_anatomy_and_split_and_comes_several_times():
    films = demo.cohort("nih", (0, 0), {"train": 200, "val": 50})
    by_patient = {}
    for film in films:
        by_patient.setdefault(film.patient, []).append(film)
    assert all(len({id(film.anatomy) for film in own}) == 1 for own in by_patient.values())
    assert all(len({film.split for film in own}) == 1 for own in by_patient.values())
    assert np.mean([len(own) for own in by_patient.values()]) > 1.5
    assert [film.split for film in films] == ["train"] * 200 + ["val"] * 50


@pytest.mark.parametrize("site, split, size", [
    ("nih", "val", 180), ("nih", "test", 400), ("chexpert", "test", 345), ("chexpert", "valid", 116),
    ("padchest", "kept", 200), ("vindr_cxr", "test", 200)])
def test_evaluation_sets_have_cases_and_controls(site, split, size):
    films = [film for film in demo.cohort(site, (0, 1), {split: size}) if film.view != "LATERAL"]
    for finding in FIVE if site in ("padchest", "vindr_cxr") else demo.FINDINGS:
        share = np.mean([finding in film.labels for film in films])
        assert share == 0 if finding in demo.SITES[site].absent else 0.03 < share < 0.5


def test_labels_err_as_often_as_the_site_says_and_never_in_the_hand_labelled_set():
    films = demo.cohort("nih", (0, 0), {"train": 900})
    missed = sum(len(set(film.shows) - film.labels) for film in films)
    invented = sum(len(film.labels - set(film.shows)) for film in films)
    assert missed == invented and 0.05 < missed / sum(len(film.shows) for film in films) < 0.08
    for film in demo.cohort("chexpert", (0, 2), {"valid": 116}):
        certain = demo.report_labels(film, certain=True)
        assert {name for name in ("Edema", "Pneumonia", "Cardiomegaly") if certain[name] == "1.0"} == \
            {name for name in ("Edema", "Pneumonia", "Cardiomegaly") if name in film.shows}


def test_sites_look_different():
    grey = {}
    for site in demo.SITES:
        films = [film for film in demo.cohort(site, (0, 3), {"test": 24}) if film.view != "LATERAL"]
        pictures = [demo.radiograph(film) for film in films]
        assert all(0 <= picture.min() and picture.max() <= 1 for picture in pictures)
        grey[site] = np.mean([[picture.mean(), np.median(picture)] for picture in pictures], axis=0)
    distances = [np.hypot(*np.subtract(grey[a], grey[b])) for a in grey for b in grey if a < b]
    assert min(distances) > 0.01 and max(distances) > 0.1


def test_a_linear_model_finds_the_findings_on_new_patients_at_64_pixels():
    films = demo.cohort("nih", (0, 5), {"train": 160, "test": 80})
    pictures = [Image.fromarray(np.uint8(255 * demo.radiograph(film))) for film in films]
    pixels = np.array([np.ravel(picture.resize((64, 64), Image.BILINEAR)) for picture in pictures])
    parts = PCA(30, whiten=True, random_state=0).fit(pixels[:160]).transform(pixels)
    areas = {}
    for finding in ("Cardiomegaly", "Effusion", "Consolidation", "Edema", "Emphysema", "Atelectasis"):
        truth = np.array([finding in film.labels for film in films])
        model = LogisticRegression(C=0.03, max_iter=500).fit(parts[:160], truth[:160])
        areas[finding] = roc_auc_score(truth[160:], model.decision_function(parts[160:]))
    assert min(areas.values()) > 0.6 and np.mean([*areas.values()]) > 0.8, areas


def test_findings_come_together_through_hidden_causes():
    shows = [film.shows for film in demo.cohort("nih", (0, 4), {"train": 900})]
    edema = np.array(["Edema" in has for has in shows])
    cardiomegaly = np.array(["Cardiomegaly" in has for has in shows])
    assert cardiomegaly[edema].mean() > 1.5 * cardiomegaly[~edema].mean()


# CT, OCT, natural images.

def test_covid_adds_ground_glass_in_both_lungs_and_pneumonia_a_dense_focus_in_one():
    slices = {disease: np.array([demo.ct_slice((7, i), disease, 0.4, (8, i)) for i in range(12)])
              for disease in (0, 1, 2)}
    lopsided, densest = {}, {}
    for disease in (1, 2):
        change = np.clip(slices[disease] - slices[0], 0, None)
        halves = change[:, :, :68].sum(axis=(1, 2)), change[:, :, 76:].sum(axis=(1, 2))
        lopsided[disease] = np.median(np.max(halves, axis=0) / np.sum(halves, axis=0))
        densest[disease] = np.quantile(change, 0.99)
    assert lopsided[1] > 0.85 > lopsided[2] > 0.5 and densest[1] > densest[2] > 0.05


def test_oct_diseases_change_the_scan_where_they_should():
    def scans(disease):
        return [demo.retina((7, i), disease, (8, i)) for i in range(8)]
    for disease in ("CNV", "DME", "DRUSEN"):
        assert all(np.abs(ill - well).mean() > 0.002 for ill, well in zip(scans(disease), scans("NORMAL")))
    assert {scan.shape for scan in scans("NORMAL")} == {(160, 166), (160, 248)}


def test_natural_classes_differ_in_colour_more_than_their_members():
    colours = np.array([[demo.natural_image(wnid, (0, i)).mean(axis=(0, 1)) for i in range(8)]
                        for wnid in demo.CLASSES])
    colours /= colours.sum(axis=2, keepdims=True)
    between, within = colours.mean(axis=1).std(axis=0).mean(), colours.std(axis=1).mean()
    assert between > within
