"""The eight readers: exact counts on the real metadata, the traps of every layout, and hostile downloads."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, assert_user_error, load_script, run_script
from hypothesis import HealthCheck, given, settings, strategies as st

DATASETS = ("nih", "mimic_cxr", "chexpert", "padchest", "vindr_cxr", "covidx_ct", "oct", "imagenet")
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]
NIH = load_script("data_prep/nih.py").LABELS
CHEXPERT = load_script("data_prep/chexpert.py").LABELS
VINDR = load_script("data_prep/vindr_cxr.py").LABELS
MIMIC = load_script("data_prep/mimic_cxr.py").LABELS
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data folder {SHARED} is absent")


def run(dataset, raw, out, *flags):
    """Call a reader as from the command line, in this process; returns its index and its index.json."""
    command, sys.argv = sys.argv, [f"{dataset}.py", "--raw", str(raw), "--out", str(out), *map(str, flags)]
    try:
        load_script(f"data_prep/{dataset}.py").main()
    finally:
        sys.argv = command
    index = pd.read_csv(out, dtype=str, keep_default_na=False)
    return index, json.loads(Path(out).with_suffix(".json").read_text())


@pytest.fixture
def read(tmp_path):
    return lambda dataset, raw, *flags: run(dataset, raw, tmp_path / "out" / "index.csv", *flags)


@pytest.fixture
def refused(read, capsys):
    """Call a reader that refuses its input. Returns: its one sentence."""
    def sentence(dataset, raw, *flags):
        with pytest.raises(SystemExit) as exit:
            read(dataset, raw, *flags)
        assert exit.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return sentence


def write(root, files):
    """{path: text, bytes or rows of cells} as files below root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = pd.DataFrame(content[1:], columns=content[0]).to_csv(index=False)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def patients(table):
    return table.groupby("split").patient.nunique().to_dict()


# ---- small downloads, in the layouts of data.md; all ids are invented ----

ENTRY = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
         "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n")


def nih_files():
    rows = [("00000007_000", "Cardiomegaly|Effusion", "58", "M", "PA"),
            ("00000007_001", "No Finding", "59", "M", "AP"),
            ("00000008_000", "Hernia", "0", "F", "PA"), ("00000009_000", "Mass", "44", "F", "AP"),
            ("00000010_000", "Pleural_Thickening", "71", "M", "PA")]
    size = "2500,2048,0.171,0.171"
    entry = ENTRY + "".join(f"{name}.png,{finding},{name[-1]},{int(name[:8])},{age},{sex},{view},{size}\n"
                            for name, finding, age, sex, view in rows)
    return {"Data_Entry_2017_v2020.csv": entry, "train_list.txt": "00000007_000.png\n00000007_001.png\n",
            "val_list.txt": "00000008_000.png", "test_list.txt": "00000009_000.png\n00000010_000.png\n",
            **{f"images/{name}.png": b"" for name, *_ in rows}}


def mimic_files(n=12, gz=".gz"):
    dicoms = [f"{i:08x}-11111111-22222222-33333333-44444444" for i in range(n)]
    subject, study = [str(19000000 + i // 3) for i in range(n)], [str(59000000 + i // 2) for i in range(n)]
    split = ["train"] * (n - 6) + ["validate"] * 3 + ["test"] * 3
    views = ["AP", "PA", "LATERAL", "", "LL", "AP AXIAL"]
    metadata = [["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition",
                 "Rows"],
                *[[d, s, t, "CHEST (PORTABLE AP)", views[i % 6], "3056"]
                  for i, (d, s, t) in enumerate(zip(dicoms, subject, study))]]
    labelled = dict.fromkeys(zip(subject[:-1], study[:-1]))             # the last study has no labels
    labels = [["subject_id", "study_id", *MIMIC],
              *[[s, t, "1.0", "", "-1.0", "0.0", *[""] * 10] for s, t in labelled]]
    splits = [["dicom_id", "study_id", "subject_id", "split"], *map(list, zip(dicoms, study, subject, split))]
    return {f"mimic-cxr-2.0.0-{name}.csv{gz}": rows for name, rows in
            (("split", splits), ("metadata", metadata), ("chexpert", labels))}


CHEXPERT_HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT]


def chexpert_row(split, patient, view="frontal", release="CheXpert-v1.0-small", one="1.0", **cells):
    row = dict.fromkeys(CHEXPERT_HEADER, "") | {
        "Path": f"{release}/{split}/patient{patient:05}/study1/view1_{view}.jpg", "Sex": "Female",
        "Age": "61", "Frontal/Lateral": view.capitalize(), "AP/PA": "AP" if view == "frontal" else "",
        "Cardiomegaly": "-1.0", "Edema": "0.0", "Pleural Effusion": one} | cells
    return list(row.values())


def chexpert_files(release="CheXpert-v1.0-small"):
    train = [chexpert_row("train", 1, release=release), chexpert_row("train", 1, "lateral", release=release),
             chexpert_row("train", 2, release=release, Sex="Unknown", Age="0"),
             *[chexpert_row("train", patient, release=release) for patient in (3, 4)]]
    valid = [chexpert_row("valid", 90, view, release=release) for view in ("frontal", "lateral")]
    split = "\n".join([",index,split", "0,0,train", "1,2,validate", "2,3,test", "3,4,test", ""])
    return {"CheXpert-v1.0-small/train.csv": [CHEXPERT_HEADER, *train],
            "CheXpert-v1.0-small/valid.csv": [CHEXPERT_HEADER, *valid],
            "CheXpert-v1.0-small/chexpert_split_2021_08_20.csv": split}


PADCHEST_CSV = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
PADCHEST_HEADER = ["", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth",
                   "PatientSex_DICOM", "ViewPosition_DICOM", "Projection", "MethodProjection", "Report",
                   "Labels", "labelCUIS"]


def padchest_row(number, **cells):
    row = dict(zip(PADCHEST_HEADER, [
        str(number), f"image{number}.png", "0", "20140102", f"{10 ** 37 + number}",
        f"{9 * 10 ** 37 + number}", "1950.0", "F", "POSTEROANTERIOR", "PA", "Manual review of DICOM fields",
        "texto breve .", "['cardiomegaly']", "['C0000001']"]))
    return list((row | cells).values())


def padchest_files():
    return {PADCHEST_CSV: [PADCHEST_HEADER, padchest_row(1), padchest_row(2, Labels="['normal']"),
                           padchest_row(3)]}


def vindr_files(header=VINDR):
    def image(i):
        return f"{i:032x}"

    def cells(*positive):
        return [str(int(label in positive)) for label in header]

    test = [[image(2), *cells("No finding")], [image(1), *cells("Cardiomegaly")]]      # not sorted
    train = [[image(3), f"R{r}", *cells(*(["Nodule/Mass"] * (r < 3) + ["COPD"] * (r == 1)))]
             for r in (1, 2, 3)]
    return {"annotations/image_labels_test.csv": [["image_id", *header], *test],
            "annotations/image_labels_train.csv": [["image_id", "rad_id", *header], *train]}


def covidx_files(release="3A"):
    metadata = ("patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality\n"
                "NCP_9999,CNCB,China,,,COVID-19,Yes,Expert,Axial,CT\n"
                "patient45,COVID-CTset,Iran,F,77,COVID-19,Yes,Expert,Axial,CT\n"
                "LIDC-IDRI-0234,LIDC-IDRI,USA,,,Pneumonia,Yes,Automatic,Axial,CT\n"
                "volume-covid19-A-0003,TCIA,,M,40,COVID-19,Yes,Expert,Axial,CT\n")
    return {"metadata.csv": metadata,
            f"train_COVIDx_CT-{release}.txt": "NCP_9999_1234_0017.png 2 0 130 512 429\n",
            f"val_COVIDx_CT-{release}.txt": "137covid_patient45_SR_2_IM00010.png 2 0 71 560 413\n"
                                            "LIDC-IDRI-0234-1.3.6.1.4.1.14519-0019.png 1 10 10 400 400\n",
            f"test_COVIDx_CT-{release}.txt": "volume-covid19-A-0003_ct-0007.png 2 10 10 400 400"}


def oct_files(root="CellData/OCT"):
    return {f"{root}/train/CNV/CNV-101-1.jpeg": b"", f"{root}/train/CNV/CNV-101-2.jpeg": b"",
            f"{root}/train/NORMAL/NORMAL-102-1.jpeg": b"", f"{root}/test/DRUSEN/DRUSEN-101-3.jpeg": b""}


def imagenet_files():
    return {"ILSVRC/Data/CLS-LOC/train/n02000000/n02000000_18.JPEG": b"",
            "ILSVRC/Data/CLS-LOC/train/n01000000/n01000000_7.JPEG": b"",
            "ILSVRC/Data/CLS-LOC/train/n01000000/n01000000_9.JPEG": b"",
            "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": b"",
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
                                    "ILSVRC2012_val_00000001,n02000000 85 1 499 272 \n"}


FILES = {"nih": nih_files, "mimic_cxr": mimic_files, "chexpert": chexpert_files, "padchest": padchest_files,
         "vindr_cxr": vindr_files, "covidx_ct": covidx_files, "oct": oct_files, "imagenet": imagenet_files}
ALL = {name: ["--n-pretrain", "all"] for name in ("mimic_cxr", "covidx_ct", "oct", "imagenet")}


# ---- the exact counts, on the real metadata ----

def link(folder, *files):
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def fixtures():
    if not SHARED.is_dir():
        pytest.skip(f"real data folder {SHARED} is absent")
    return SHARED / "fixtures"


@pytest.fixture(scope="module")
def expected(fixtures):
    return json.loads((fixtures / "expected_counts.json").read_text())


@pytest.fixture(scope="module")
def real_nih(fixtures, tmp_path_factory):
    return link(tmp_path_factory.mktemp("nih"), *(fixtures / "nih").iterdir())


@pytest.fixture(scope="module")
def nih_index(real_nih, tmp_path_factory):
    return run("nih", real_nih, tmp_path_factory.mktemp("nih_out") / "index.csv")


@pytest.fixture(scope="module")
def real_chexpert(fixtures, tmp_path_factory):
    folder = fixtures / "chexpert"
    return link(tmp_path_factory.mktemp("chexpert"), folder / "train.csv.gz", folder / "valid.csv")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_nih_split_has_the_exact_counts(nih_index, expected, split):
    table, facts = nih_index
    rows, want = table[table.split == split], expected[f"nih/{split}"]
    tables = expected["tables"]["nih"][split]
    assert (len(rows), rows.patient.nunique()) == (want["images"], want["patients"]) == (
        facts["splits"][split]["images"], facts["splits"][split]["patients"])
    assert {label: (rows[label] == "1").sum() for label in NIH} == want["positives"]
    assert rows[NIH].isin(["0", "1"]).all(axis=None)
    assert rows.view.value_counts().to_dict() == want["view"]
    assert rows.drop_duplicates("patient").sex.value_counts().to_dict() == want["sex_of_patients"]
    age = rows.age.astype(int)
    assert [age.min(), age.max()] == want["age_min_max"] and age.sum() == tables["age_sum"]
    assert round(age.mean(), 2) == want["age_mean"]
    # at the first image
    assert round(age[~rows.patient.duplicated()].mean(), 2) == want["age_mean_by_patient"]
    assert (rows.sex == "F").sum() == tables["female_scans"]
    assert rows[rows.sex == "F"].patient.nunique() == tables["female_patients"]
    assert (rows[NIH] == "0").all(axis=1).sum() == tables["no_finding"]


def test_nih_index_is_whole_and_no_patient_stands_in_two_splits(nih_index, expected):
    table, facts = nih_index
    assert (len(table), table.patient.nunique()) == (expected["nih/all"]["images"],
                                                     expected["nih/all"]["patients"])
    assert (table[NIH] == "0").all(axis=1).sum() == expected["nih/all"]["no_finding"]
    groups = [set(rows.patient) for _, rows in table.groupby("split")]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert facts["fallback_split"] is False
    assert list(table.columns) == FACTS + NIH and list(table.path) == sorted(table.path)


def test_nih_labels_equal_those_of_the_official_lists(nih_index, fixtures):
    table = nih_index[0].assign(name=nih_index[0].path.str.rpartition("/")[2]).set_index("name")
    for split in ("train", "val", "test"):
        listed = pd.read_csv(fixtures / "nih" / f"Xray14_{split}_official.txt.gz", sep=" ", header=None,
                             dtype=str)
        assert (table.loc[listed[0], NIH].to_numpy() == listed.iloc[:, 1:].to_numpy()).all()


def test_nih_boxes_lie_in_the_test_split(nih_index, fixtures, expected):
    boxes = pd.read_csv(fixtures / "nih" / "BBox_List_2017.csv.gz", dtype=str)
    want = expected["nih/bbox"]
    assert (len(boxes), boxes["Image Index"].nunique()) == (want["rows"], want["images"])
    assert boxes["Finding Label"].value_counts().to_dict() == want["finding"]
    table = nih_index[0]
    test = set(table.path[table.split == "test"].str.rpartition("/")[2])
    assert set(boxes["Image Index"]) <= test


def test_nih_fallback_split_has_the_studys_sizes(real_nih, fixtures, nih_index, read, tmp_path):
    table = nih_index[0]
    names = table.path.str.rpartition("/")[2]
    raw = link(tmp_path / "raw", real_nih / "Data_Entry_2017_v2020.csv.gz")
    write(raw, {"train_val_list.txt": "\r\n".join(names[table.split != "test"]),
                "test_list.txt": "\n".join(names[table.split == "test"])})
    drawn, facts = read("nih", raw, "--seed", 7)
    assert drawn.split.value_counts().to_dict() == {"train": 75_312, "val": 11_212, "test": 25_596}
    assert drawn.groupby("patient").split.nunique().max() == 1
    assert facts["fallback_split"] is True
    assert set(drawn.path[drawn.split == "test"]) == set(table.path[table.split == "test"])
    both, draw = table.patient[table.split != "test"], load_script("data_prep/nih.py").draw_validation
    assert draw(both, 11_212, 7) == set(drawn.patient[drawn.split == "val"]) != draw(both, 11_212, 42)
    assert all(both.isin(draw(both, 11_212, seed)).sum() == 11_212 for seed in range(5))


def test_nih_sample_is_the_seeded_permutation_and_counts_its_test_images(nih_index, real_nih, read):
    table = nih_index[0]
    sample, facts = read("nih", real_nih, "--pretrain", "all")
    order = np.random.default_rng(42).permutation(112_120)[:100_000]
    assert list(sample.path) == list(np.array(sorted(table.path))[order])
    test = sample.path.isin(table.path[table.split == "test"])
    assert set(sample.split) == {"pretrain"} and facts["dataset"] == "nih_pretrain"
    assert facts["test_images"] == test.sum() == 22_772


def test_nih_trainval_sample_holds_no_test_image(nih_index, real_nih, read):
    sample, facts = read("nih", real_nih, "--pretrain", "trainval", "--n-pretrain", "all")
    table = nih_index[0]
    assert facts["test_images"] == 0 and len(sample) == 86_524
    assert set(sample.path) == set(table.path[table.split != "test"])


@needs_shared
def test_nih_bundle_of_1000_real_images_is_found_whole(read):
    table, facts = read("nih", SHARED / "realdata" / "nih")
    assert table.split.value_counts().to_dict() == {"train": 599, "val": 96, "test": 305}
    assert facts["available"] == 1000 and table.groupby("patient").split.nunique().max() == 1
    assert all((SHARED / "realdata" / "nih" / path).is_file() for path in table.path)


def chexpert_counts(rows):
    """The counts of expected_counts.json from an index; `blank` and the rest are cells a label."""
    cells = {name: {label: int((rows[label] == value).sum()) for label in CHEXPERT}
             for name, value in (("positive", "1"), ("uncertain", "-1"), ("negative", "0"), ("blank", ""))}
    return {"images": len(rows), "patients": rows.patient.nunique(), **cells}


def assert_chexpert(rows, want):
    got = chexpert_counts(rows)
    assert got == {key: want[key] for key in got}


@pytest.fixture(scope="module")
def chexpert_indexes(real_chexpert, fixtures, tmp_path_factory):
    """{views, form of the split: index}; the races of the validation set under the demographics' names."""
    people = pd.read_csv(fixtures / "chexpert" / "valid_metadata.csv", dtype=str, keep_default_na=False)
    people = people.rename(columns={"patient_id": "PATIENT", "race": "PRIMARY_RACE"})
    raw = tmp_path_factory.mktemp("chexpert_raw")
    people.to_csv(raw / "CHEXPERT DEMO.csv", index=False)
    tables = {}
    for name, views in (("chexpert_split_2021_08_20.csv.gz", "all"), ("CheXpert_test_Glocker.csv.gz", "frontal")):
        link(raw, *real_chexpert.iterdir(), fixtures / "chexpert" / name)
        tables[views], _ = run("chexpert", raw, raw / "out" / "index.csv", "--views", views)
        (raw / name).unlink()
    return tables


@pytest.mark.parametrize("views, key", [("frontal", "valid_frontal"), ("all", "valid")])
def test_chexpert_validation_has_the_exact_counts(chexpert_indexes, expected, views, key):
    table = chexpert_indexes[views]
    table = table[table.split == "val"]
    assert_chexpert(table, expected[f"chexpert/{key}"])
    if views == "all":
        for group, want in expected["tables"]["chexpert_valid"].items():
            rows = table if group == "all" else table[table.race.str.contains(group.capitalize())]
            assert (rows.patient.nunique(), len(rows)) == (want["patients"], want["scans"])
            assert (rows.sex == "F").sum() == want["female_scans"]
            assert rows[rows.sex == "F"].patient.nunique() == want["female_patients"]
            age = rows.age.astype(int)
            assert (age.sum(), age.min(), age.max()) == (want["age_sum"], want["age_min"], want["age_max"])
            assert {label: (rows[label] == "1").sum() for label in CHEXPERT} == want["positive"]
    else:
        races = table.race.replace("", "NaN").value_counts().to_dict()
        assert races == expected["chexpert/valid_metadata"]["race_label"]
        guess = {label: round(1 - (table[label] == "1").mean(), 4) for label in
                 ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")}
        assert guess == expected["chexpert/valid_frontal"]["random_guess"]


@pytest.mark.parametrize("views", ["all", "frontal"])       # by row numbers, by the rows themselves
def test_chexpert_test_split_has_the_exact_counts(chexpert_indexes, fixtures, expected, views):
    table = chexpert_indexes[views]
    test = table[table.split == "test"]
    assert_chexpert(test, expected["chexpert/test_glocker"])
    want, age = expected["tables"]["glocker_test"]["all"], test.age.astype(int)
    assert (age.sum(), age.min(), age.max()) == (want["age_sum"], want["age_min"], want["age_max"])
    assert (test.sex == "F").sum() == want["female_scans"]
    assert test[test.sex == "F"].patient.nunique() == want["female_patients"]
    glocker = pd.read_csv(fixtures / "chexpert" / "CheXpert_test_Glocker.csv.gz", usecols=["Path"]).Path
    assert set(test.path) == set(glocker.str.partition("/")[2])
    patients = load_script("data_prep/chexpert.py").SPLIT_PATIENTS
    assert patients == {split: facts["patients"] for split, facts in expected["chexpert/glocker_split"].items()
                        if split in patients}


def test_chexpert_train_has_the_exact_counts(real_chexpert, expected):
    train, want = load_script("data_prep/chexpert.py").read_rows(real_chexpert / "train.csv.gz"), \
        expected["chexpert/train"]
    assert_chexpert(train, want)
    assert train.view[train.view != "Lateral"].value_counts().to_dict() == {
        key: n for key, n in want["AP/PA"].items() if key != "blank"}
    assert (train.view == "Lateral").sum() == want["AP/PA"]["blank"]
    sexes = train.sex.map({"M": "Male", "F": "Female"}).fillna("Unknown")
    assert sexes.value_counts().to_dict() == want["sex"]
    assert (train.age == "").sum() == want["age_zero"] and train.age[train.age != ""].astype(int).max() == 90
    frontal = train[train.view != "Lateral"]
    assert (len(frontal), frontal.patient.nunique()) == (want["frontal"], want["frontal_patients"])


def test_chexpert_row_numbers_do_not_fit_a_re_sorted_train_csv(real_chexpert, fixtures, refused, tmp_path):
    train = pd.read_csv(real_chexpert / "train.csv.gz", dtype=str, keep_default_na=False)
    raw = link(tmp_path / "raw", real_chexpert / "valid.csv",
               fixtures / "chexpert" / "chexpert_split_2021_08_20.csv.gz")
    train.sort_values("Age", kind="stable").to_csv(raw / "train.csv", index=False)
    message = refused("chexpert", raw)
    assert "order" in message and "train.csv" in message


def test_padchest_original_table_has_the_exact_counts(fixtures, expected, read, tmp_path):
    source = fixtures / "padchest_original" / "original_folder0.csv.gz"
    (tmp_path / "raw").mkdir()
    shutil.copy(source, tmp_path / "raw" / f"{PADCHEST_CSV}.gz")
    table, facts = read("padchest", tmp_path / "raw")
    want, positives = expected["padchest/original"], dict(expected["padchest/original"]["positives"])
    assert (facts["available"], len(table), table.patient.nunique()) == (
        want["folder0_rows"], want["images"], want["patients"]) == (3_004, 1_861, 1_758)
    assert (table.sex == "F").sum() == want["female_images"]
    some = [name for name in table.columns[8:] if "atelectasis" in name]
    assert (table[some] == "1").any(axis=1).sum() == positives.pop("any atelectasis")
    assert {label: (table[label] == "1").sum() for label in positives} == positives
    assert facts["release"] == "the original table" and table.patient.str.len().min() > 30


def test_padchest_authors_copy_has_the_exact_counts(fixtures, expected, read, tmp_path):
    table, facts = read("padchest", link(tmp_path / "raw", *(fixtures / "padchest").iterdir()))
    want, tables = expected["padchest/filtered"], expected["tables"]["padchest"]
    labels = table.drop(columns=FACTS).astype(int)
    assert (len(table), table.patient.nunique()) == (want["images"], want["patients"])
    assert table.sex.value_counts().to_dict() == want["sex"]
    assert table.view.value_counts().to_dict() == tables["view"]
    source = pd.read_csv(next((fixtures / "padchest").iterdir()), usecols=["ImageID"]).ImageID
    # two rounded ids merge sexes
    first = table.set_index("path").loc["0/" + source].drop_duplicates("patient")
    assert (first.sex == "F").sum() == want["female_patients"]
    assert labels.shape[1] == tables["distinct_labels"] and set(table.split) == {"test"}
    for label, n in want["from_label_strings"].items():
        assert labels.get(label, pd.Series(0)).sum() == n
    some = [name for name in labels if "atelectasis" in name]
    assert labels[some].sum().to_dict() == tables["atelectasis_labels"]
    assert labels[some].any(axis=1).sum() == want["atelectasis_any"]
    effusion = [name for name in labels if "pleural effusion" in name]
    assert labels[effusion].any(axis=1).sum() == want["pleural effusion_any"]
    assert facts["release"] == "the authors' copy, ids rounded"
    age = table.age.astype(int)
    assert (age.min(), age.max(), round(age.mean(), 1)) == (0, 98, 59.2)


def test_covidx_has_the_exact_counts(fixtures, expected, read, tmp_path):
    raw = link(tmp_path / "raw", *(fixtures / "covidx_ct").iterdir())
    table, facts = read("covidx_ct", raw, "--n-pretrain", 0)
    for split in ("val", "test"):
        rows, want = table[table.split == split], expected[f"covidx_ct/{split}"]
        assert (len(rows), rows.patient.nunique()) == (want["images"], want["patients"])
        for number, name in enumerate(("Normal", "Pneumonia", "COVID-19")):
            positive = rows[rows[name] == "1"]
            assert len(positive) == want["class_images"][str(number)]
            assert positive.patient.nunique() == want["class_patients"][str(number)]
    assert facts["patients_in_two_lists"] == expected["covidx_ct/val&test shared patients"] == 0
    assert facts["absent_lists"] == ["train"]
    metadata = load_script("data_prep/covidx_ct.py").read_table(fixtures / "covidx_ct" / "metadata.csv.gz")
    assert metadata.finding.value_counts().to_dict() == expected["covidx_ct/metadata"]["finding"]


def test_mimic_paper_sample_is_the_released_loaders(expected):
    want = expected["mimic/author_100k_row_numbers"]
    rows = load_script("data_prep/mimic_cxr.py").released_rows(want["population"], 100_000, want["seed"])
    assert list(rows[:8]) == want["first_8"] and int(rows.sum()) == want["sum"]
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == want["sha256_int64_le"]
    choice = np.random.RandomState(want["seed"]).choice(want["population"], 100_000, replace=False)
    series = pd.Series(range(want["population"])).sample(100_000, random_state=want["seed"])
    assert (choice == rows).all() and (series.to_numpy() == rows).all()


# ---- NIH ----

def test_nih_findings_become_labels_and_patients_keep_their_zeros(read, tmp_path):
    table, _ = read("nih", write(tmp_path / "raw", nih_files()))
    row = table.set_index("path").loc["images/00000007_000.png"]
    assert row[row == "1"].index.to_list() == ["Cardiomegaly", "Effusion"]
    assert (row.patient, row.study, row.split, row["view"], row.sex, row.age) == (
        "00000007", "00000007_000", "train", "PA", "M", "58")


def test_nih_twelve_columns_and_ages_of_the_older_file(read, tmp_path):
    files = nih_files()
    text = files.pop("Data_Entry_2017_v2020.csv").replace("\n", ",\n")
    text = text.replace(",58,", ",058Y,").replace(",44,", ",413,")
    table, _ = read("nih", write(tmp_path / "raw", files | {"Data_Entry_2017.csv": text}))
    assert list(table.age) == ["58", "59", "0", "", "71"]
    assert list(table["view"]) == ["PA", "AP", "PA", "AP", "PA"] and (table.Hernia == "1").sum() == 1


@pytest.mark.parametrize("place", ["images/{}", "{}", "images_001/images/{}", "images-224/images-224/{}"])
def test_nih_images_are_found_in_every_layout_and_the_sample_is_the_same(read, tmp_path, place):
    files = {name: text for name, text in nih_files().items() if not name.startswith("images/")}
    names = [f"{name}.png" for name in ("00000007_000", "00000007_001", "00000008_000", "00000009_000",
                                        "00000010_000")]
    raw = write(tmp_path / "raw" / "nih", files | {place.format(name): b"" for name in names}).parent
    table, _ = read("nih", raw)
    assert list(table.path) == [f"nih/{place.format(name)}" for name in names]
    for seed, flags in ((42, []), (0, ["--seed", 0])):
        sample, _ = read("nih", raw, "--pretrain", "all", "--n-pretrain", 3, *flags)
        order = np.random.default_rng(seed).permutation(5)[:3]
        assert list(sample.path) == [f"nih/{place.format(names[i])}" for i in order]


def test_nih_re_release_of_224_pixels_has_its_lists_under_other_names(read, tmp_path):
    files = {name.replace("images/", "images-224/images-224/"): text for name, text in nih_files().items()}
    for split in ("train", "val"):
        del files[f"{split}_list.txt"]
    files["Data_Entry_2017.csv"] = files.pop("Data_Entry_2017_v2020.csv")
    files["train_val_list_NIH.txt"] = "00000007_000.png\n00000007_001.png\n00000008_000.png"
    files["test_list_NIH.txt"] = files.pop("test_list.txt")
    table, facts = read("nih", write(tmp_path / "raw", files))
    assert facts["fallback_split"] and patients(table[table.split == "test"]) == {"test": 2}
    assert set(table.patient[table.split != "test"]) == {"00000007", "00000008"}


@pytest.mark.parametrize("n", ["6", "0", "-1", "1e3", "some"])
def test_a_sample_that_cannot_be_drawn_is_refused(refused, tmp_path, n):
    message = refused("nih", write(tmp_path / "raw", nih_files()), "--pretrain", "all", "--n-pretrain", n)
    assert f"--n-pretrain {n}: 5 images are eligible" in message


@pytest.mark.parametrize("dataset, flags", [
    ("nih", []), ("nih", ["--pretrain", "all", "--n-pretrain", 2]), ("mimic_cxr", ["--n-pretrain", 2]),
    ("covidx_ct", ["--n-pretrain", 2]), ("oct", ["--n-pretrain", 2]), ("imagenet", ["--n-pretrain", 2])])
def test_a_negative_seed_is_refused(refused, tmp_path, dataset, flags):
    message = refused(dataset, write(tmp_path / "raw", FILES[dataset]()), "--seed", "-1", *flags)
    assert "--seed" in message and "-1" in message


def test_ages_that_are_not_whole_are_rounded(read, tmp_path):
    text = nih_files()["Data_Entry_2017_v2020.csv"].replace(",58,M", ",58.7,M")
    table, _ = read("nih", write(tmp_path / "raw", nih_files() | {"Data_Entry_2017_v2020.csv": text}))
    assert list(table.age) == ["59", "59", "0", "44", "71"]
    rows = {PADCHEST_CSV: [PADCHEST_HEADER, padchest_row(1, PatientBirth="1950.7")]}
    assert list(read("padchest", write(tmp_path / "pad", rows))[0].age) == ["63"]


def test_nih_image_in_two_sizes_is_taken_from_the_shorter_path(read, tmp_path):
    small = {f"images-224/images-224/{Path(name).name}": b"" for name in nih_files() if name.endswith(".png")}
    table, _ = read("nih", write(tmp_path / "raw", nih_files() | small))
    assert all(path.startswith("images/") for path in table.path)


def test_nih_whole_findings_are_compared_and_unknown_ones_refused(refused, tmp_path):
    files = nih_files()
    text = files["Data_Entry_2017_v2020.csv"].replace("Hernia", "Hernial")
    message = refused("nih", write(tmp_path / "raw", files | {"Data_Entry_2017_v2020.csv": text}))
    assert "row 4" in message and "'Hernial'" in message


@pytest.mark.parametrize("change, said", [
    ({"val_list.txt": None}, "no Xray14_val_official.txt* or val_list*.txt*"),
    ({"val_list.txt": "00000007_001.png"}, "'00000007_001.png' is not in"),
    ({"test_list.txt": None}, "test_list*.txt*"),
    ({"test_list.txt": "00000099_000.png"}, "test_list.txt: '00000099_000.png' is not in"),
    ({"train_list.txt": "00000007_000.png\n00000007_002.png\n"}, "train_list.txt: '00000007_002.png' is not in"),
    ({"Data_Entry_2017_v2020.csv": None}, "Data_Entry"),
])
def test_nih_lists_that_cannot_be_are_refused(refused, tmp_path, change, said):
    files = {name: text for name, text in (nih_files() | change).items() if text is not None}
    assert said in refused("nih", write(tmp_path / "raw", files))


def test_nih_images_in_no_list_are_left_out(read, tmp_path):
    table, facts = read("nih", write(tmp_path / "raw", nih_files() | {"test_list.txt": "00000010_000.png\r\n"}))
    assert "00000009" not in set(table.patient) and (len(table), facts["available"]) == (4, 5)
    assert facts["in_no_list"] == 1


# ---- MIMIC-CXR ----

def test_mimic_usage_lines_that_filter_write_an_index_of_their_own():
    usage = re.findall(r"^    python (data_prep/.*)$", load_script("data_prep/mimic_cxr.py").__doc__, re.M)
    filtered = [line for line in usage if "--views" in line]
    assert len(filtered) == 1 and filtered[0].endswith("--out data/mimic_cxr_supervised/index.csv")


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "2.0.0", "physionet.org/files/mimic-cxr-jpg/2.0.0"])
def test_mimic_is_found_below_its_download_tree_packed_or_not(read, tmp_path, gz, below):
    write(tmp_path / "raw" / below, mimic_files(gz=gz))
    table, facts = read("mimic_cxr", tmp_path / "raw", "--n-pretrain", 0)
    first = table.set_index("study").loc["59000000"].iloc[0]
    beginning = f"{below}/".lstrip("/")
    assert first.path == f"{beginning}files/p19/p19000000/s59000000/{first.path[-48:]}"
    assert facts["available"] == len(table) == 12
    assert table.split.value_counts().to_dict() == {"train": 6, "val": 3, "test": 3}


def test_mimic_labels_go_to_every_image_of_a_study_and_stay_as_they_are(read, tmp_path):
    table, facts = read("mimic_cxr", write(tmp_path / "raw", mimic_files()), "--n-pretrain", 0)
    study = table[table.study == "59000001"]
    assert len(study) == 2 and (study.Atelectasis == "1").all() and (study.Consolidation == "-1").all()
    assert (study.Edema == "0").all() and (study.Pneumonia == "").all()
    assert (table["view"] == "").sum() == 2 and list(table.columns) == FACTS + MIMIC


def test_mimic_study_without_labels_is_kept_blank_or_left_out_on_request(read, tmp_path):
    files = mimic_files()
    files["mimic-cxr-2.0.0-chexpert.csv.gz"] = files["mimic-cxr-2.0.0-chexpert.csv.gz"][:-1]
    raw = write(tmp_path / "raw", files)
    table, facts = read("mimic_cxr", raw, "--n-pretrain", 0)
    assert len(table) == 12 and (table[table.study == "59000005"][MIMIC] == "").all(axis=None)
    labelled, _ = read("mimic_cxr", raw, "--n-pretrain", 0, "--labelled-only")
    assert len(labelled) == 10


def test_mimic_samples_are_nested_and_come_from_official_train(read, tmp_path):
    raw = write(tmp_path / "raw", mimic_files(306))
    large, facts = read("mimic_cxr", raw, "--n-pretrain", 250)
    small, _ = read("mimic_cxr", raw, "--n-pretrain", 100)
    assert list(large.split[:250]) == ["pretrain"] * 250 and facts["eligible"] == 300
    assert list(large.path[:100]) == list(small.path[:100])
    everything, _ = read("mimic_cxr", raw, "--n-pretrain", 0)
    train = sorted(everything.path[everything.split == "train"])
    assert list(large.path[:250]) == [train[i] for i in np.random.default_rng(42).permutation(300)[:250]]
    assert set(large.split[250:]) == {"val", "test"} and list(large.path[250:]) == sorted(large.path[250:])


def test_mimic_paper_sample_takes_rows_in_file_order(read, tmp_path):
    files = mimic_files(306)
    split = files["mimic-cxr-2.0.0-split.csv.gz"]
    files["mimic-cxr-2.0.0-split.csv.gz"] = [split[0], *split[:0:-1]]  # so that file order is not path order
    table, _ = read("mimic_cxr", write(tmp_path / "raw", files), "--n-pretrain", 20, "--sample-like", "paper",
                    "--seed", 7)
    train = [row[0] for row in split[:0:-1] if row[3] == "train"]
    chosen = np.random.RandomState(7).choice(300, 20, replace=False)
    assert [path[-48:-4] for path in table.path[:20]] == [train[i] for i in chosen]
    assert list(table.split) == ["pretrain"] * 20 + ["val"] * 3 + ["test"] * 3


def test_mimic_views_and_splits_restrict_the_sample(read, refused, tmp_path):
    raw = write(tmp_path / "raw", mimic_files(306))
    table, facts = read("mimic_cxr", raw, "--views", "frontal", "--n-pretrain", "all")
    assert set(table["view"]) == {"AP", "PA"}
    assert table.split.value_counts().to_dict() == {"pretrain": 100, "val": 2}
    assert "100 images are eligible" in refused("mimic_cxr", raw, "--views", "frontal", "--n-pretrain", 250_000)
    every = "--views", "frontal", "--splits", "train", "validate", "test", "--n-pretrain"
    table, facts = read("mimic_cxr", raw, *every, "all")
    assert set(table["view"]) == {"AP", "PA"} and set(table.split) == {"pretrain"} and len(table) == 102
    assert "102 images are eligible" in refused("mimic_cxr", raw, *every, 250_000)
    assert "--splits" in refused("mimic_cxr", raw, "--splits", "valid")


@pytest.mark.parametrize("name, keys", [("chexpert", "subject_id and study_id"), ("metadata", "dicom_id")])
def test_mimic_ids_that_became_decimal_numbers_are_refused(refused, tmp_path, name, keys):
    files = mimic_files()
    header, *rows = files[f"mimic-cxr-2.0.0-{name}.csv.gz"]
    damaged = [[f"{cell}.0" if column in ("subject_id", "study_id") else cell
                for column, cell in zip(header, row)] for row in rows]
    raw = write(tmp_path / "raw", files | {f"mimic-cxr-2.0.0-{name}.csv.gz": [header, *damaged]})
    message = refused("mimic_cxr", raw, "--n-pretrain", 0)
    assert f"{name}.csv.gz: no image has a row in it" in message and keys in message
    assert "'19000000.0'" in message and "'19000000'" in message


def test_mimic_a_table_of_few_studies_is_said_with_its_share(read, tmp_path, capsys):
    files = mimic_files()
    files["mimic-cxr-2.0.0-chexpert.csv.gz"] = files["mimic-cxr-2.0.0-chexpert.csv.gz"][:2]     # 2 of 12 images
    table, _ = read("mimic_cxr", write(tmp_path / "raw", files), "--n-pretrain", 0)
    assert (table[MIMIC] != "").any(axis=1).sum() == 2
    assert "chexpert.csv.gz: rows for 16.7% of the images" in capsys.readouterr().out


def test_mimic_study_listed_twice_is_refused_rather_than_doubling_images(refused, tmp_path):
    files = mimic_files()
    labels = files["mimic-cxr-2.0.0-chexpert.csv.gz"]
    files["mimic-cxr-2.0.0-chexpert.csv.gz"] = labels + [labels[1]]
    message = refused("mimic_cxr", write(tmp_path / "raw", files))
    assert "chexpert.csv.gz: a row" in message and "twice" in message


# ---- CheXpert ----

@pytest.mark.parametrize("release", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_chexpert_release_in_the_path_need_not_be_the_folder(read, tmp_path, release):
    table, _ = read("chexpert", write(tmp_path / "raw", chexpert_files(release)))
    assert list(table.path) == [f"CheXpert-v1.0-small/train/patient0000{i}/study1/view1_frontal.jpg"
                                for i in (3, 4)] \
        + ["CheXpert-v1.0-small/valid/patient00090/study1/view1_frontal.jpg"]
    assert list(table.split) == ["test", "test", "val"] and table.study[0] == "patient00003/study1"
    assert list(table.columns) == FACTS + CHEXPERT


@pytest.mark.parametrize("below", ["chexpertchestxrays-u20210408", "download/chexpertchestxrays-u20210408"])
def test_chexpert_full_release_in_parts_is_put_together(read, tmp_path, below):
    files = {Path(name).name: rows for name, rows in chexpert_files().items()}
    first = "CheXpert-v1.0 batch 1 (validate & csv)"
    parts = "CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 3 (train 2)"
    raw = tmp_path / "raw"
    write(raw / below, {
        **{f"{first}/{name}": rows for name, rows in files.items()},
        f"{first}/valid/patient00090/study1/view1_frontal.jpg": b"",
        f"{parts[0]}/patient00003/study1/view1_frontal.jpg": b"",
        f"{parts[0]}/patient00004/study2/view1_frontal.jpg": b"",
        f"{parts[1]}/patient00004/study1/view1_frontal.jpg": b""})
    table, _ = read("chexpert", raw)
    assert all((raw / path).is_file() for path in table.path)
    folders = [path.removeprefix(f"{below}/").split("/")[0] for path in table.path]
    assert folders == [first, parts[0], parts[1]]


def test_chexpert_laterals_are_left_out_unless_all_views_are_asked(read, tmp_path):
    raw = write(tmp_path / "raw", chexpert_files())
    frontal, _ = read("chexpert", raw)
    every, _ = read("chexpert", raw, "--views", "all")
    assert list(frontal["view"]) == ["AP"] * 3 and sorted(every["view"]) == ["AP"] * 3 + ["Lateral"]


def test_chexpert_labels_sex_and_age_are_untouched_where_known(read, tmp_path):
    files = chexpert_files()
    files["CheXpert-v1.0-small/train.csv"][4] = chexpert_row("train", 3, one="1", Sex="Unknown", Age="0")
    table, _ = read("chexpert", write(tmp_path / "raw", files))
    row = table.set_index("patient").loc["patient00003"]
    assert (row["Pleural Effusion"], row.Edema, row.Cardiomegaly, row.Fracture) == ("1", "0", "-1", "")
    assert (row.sex, row.age) == ("", "")
    assert set(table["Pleural Effusion"]) == {"1"} and table.sex[1] == "F" and table.age[1] == "61"


DEMO = ["PATIENT", "GENDER", "AGE_AT_CXR", "PRIMARY_RACE", "ETHNICITY"]


def test_chexpert_race_is_the_patients_as_given(read, tmp_path, capsys):
    write(tmp_path / "raw", {"CHEXPERT DEMO.csv": [
        DEMO, ["patient00003", "F", "61", "White, non-Hispanic", "Non-Hispanic/Non-Latino"],
        ["patient00003", "F", "61", "", "Unknown"],
        ["patient00090", "F", "61", "Black or African American", "Unknown"]]})
    table, _ = read("chexpert", write(tmp_path / "raw", chexpert_files()))
    assert list(table.race) == ["White, non-Hispanic", "", "Black or African American"]
    assert "DEMO.csv: rows for 66.7% of the images" in capsys.readouterr().out


def test_chexpert_demographics_as_they_are_downloaded_are_said_to_be_passed_over(read, tmp_path, capsys):
    folder = tmp_path / "raw" / "chexpertchestxrays-u20210408"
    write(folder, chexpert_files() | {"CHEXPERT DEMO.xlsx": b"PK"})
    table, _ = read("chexpert", tmp_path / "raw")
    assert (table.race == "").all() and "DEMO.xlsx" in capsys.readouterr().out
    write(folder, {"CHEXPERT DEMO.csv": [DEMO, ["patient00003", "F", "61", "Asian", ""]]})
    table, _ = read("chexpert", tmp_path / "raw")
    assert "Asian" in set(table.race) and "DEMO.xlsx" not in capsys.readouterr().out


def test_chexpert_demographics_whose_patients_are_mere_numbers_are_refused(refused, tmp_path):
    raw = write(tmp_path / "raw", chexpert_files() | {"CHEXPERT DEMO.csv": [DEMO, ["3", "F", "61", "White", ""]]})
    message = refused("chexpert", raw)
    assert "DEMO.csv: no image has a row in it" in message and "['3']" in message and "patient0" in message


@pytest.mark.parametrize("split, said", [
    (",index,split\n0,1,test\n", "order"), (",index,split\n0,0,train\n1,5,test\n", "order"),
    (",index,split\n0,0,train\n1,0,test\n", "order"),                       # a patient in two splits
    (",index,split\n0,zero,train\n", "order"), (",index,split\n0,0,holdout\n", "order"),
    ("number,part\n0,train\n", "index"), ("index,split,split\n0,train,test\n", "'split', or two")])
def test_chexpert_split_files_that_do_not_fit_are_refused(refused, tmp_path, split, said):
    files = chexpert_files() | {"CheXpert-v1.0-small/chexpert_split_2021_08_20.csv": split}
    assert said in refused("chexpert", write(tmp_path / "raw", files))


def test_chexpert_published_split_must_give_the_published_patients(refused, tmp_path, monkeypatch):
    raw = write(tmp_path / "raw", chexpert_files())
    # of 127,118: this is that split
    monkeypatch.setattr(load_script("data_prep/chexpert.py"), "SPLIT_ROWS", 4)
    assert "order" in refused("chexpert", raw)


@pytest.mark.parametrize("cells, said", [({"Path": "CheXpert-v1.0/train/../../etc/passwd"}, "row 2"),
                                         ({"Path": "/etc/passwd"}, "row 2"),
                                         ({"Path": ""}, "row 2")])
def test_chexpert_rows_that_cannot_be_are_refused(refused, tmp_path, cells, said):
    files = chexpert_files()
    files["CheXpert-v1.0-small/valid.csv"][1] = chexpert_row("valid", 90, **cells)
    assert said in refused("chexpert", write(tmp_path / "raw", files))


def test_chexpert_names_what_it_misses(refused, tmp_path):
    files = chexpert_files()
    del files["CheXpert-v1.0-small/chexpert_split_2021_08_20.csv"]
    raw = write(tmp_path / "raw", files)
    assert "chexpert_split_2021_08_20.csv" in refused("chexpert", raw)


# ---- PadChest ----

def padchest(tmp_path, *rows):
    return write(tmp_path / "raw", {PADCHEST_CSV + ".gz": [PADCHEST_HEADER, *rows]})


def test_padchest_filter_takes_reviewed_pa_and_ap_of_archive_0(read, tmp_path):
    raw = padchest(tmp_path, padchest_row(1), padchest_row(2, Projection="AP", ImageDir="0.0"),
                   padchest_row(3, Projection="L"), padchest_row(4, Projection="AP_horizontal"),
                   padchest_row(5, ImageDir="10"), padchest_row(6, MethodProjection="Predicted by ResNet50"),
                   padchest_row(7, Labels=""), padchest_row(8, Labels="None"), padchest_row(9, Labels="[]"),
                   padchest_row(10, ImageDir=""))
    table, facts = read("padchest", raw)
    assert sorted(table.path) == ["0/image1.png", "0/image2.png", "0/image9.png"]
    assert facts["without_labels"] == 2 and facts["available"] == 10
    assert table.set_index("path").cardiomegaly.to_dict() == {"0/image1.png": "1", "0/image2.png": "1",
                                                              "0/image9.png": "0"}


def test_padchest_ids_of_38_digits_that_differ_in_the_last_stay_two_patients(read, tmp_path):
    table, _ = read("padchest", padchest(tmp_path, padchest_row(1), padchest_row(2)))
    assert table.patient.nunique() == 2 and table.patient[0] == "90000000000000000000000000000000000001"
    assert table.study[1] == "10000000000000000000000000000000000002"


def test_padchest_line_breaks_in_reports_and_spaces_in_labels(read, tmp_path):
    raw = padchest(tmp_path, padchest_row(1, Report="texto\nbreve , otra\r\nlinea",
                                          Labels="[' laminar atelectasis ', '', 'pleural effusion']"),
                   padchest_row(2))
    table, _ = read("padchest", raw)
    assert list(table.columns) == FACTS + ["cardiomegaly", "laminar atelectasis", "pleural effusion"]
    assert table.set_index("path").loc["0/image1.png", "laminar atelectasis"] == "1"


@pytest.mark.parametrize("text", ["normal", "['normal'", "{'normal': 1}", "['normal', 3]", "[" * 3000,
                                  "'normal'", "__import__('os').mkdir('evaluated')"])
def test_padchest_labels_are_read_never_evaluated(refused, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("padchest", padchest(tmp_path, padchest_row(1), padchest_row(2, Labels=text)))
    assert "row 3" in message and "not a list" in message and not (tmp_path / "evaluated").exists()


def test_padchest_images_may_lie_in_one_flat_folder(read, tmp_path):
    raw = write(padchest(tmp_path, padchest_row(1)), {"images/image1.png": b""})
    assert list(read("padchest", raw)[0].path) == ["images/image1.png"]


def test_padchest_age_is_year_of_study_less_year_of_birth(read, tmp_path):
    raw = padchest(tmp_path, padchest_row(1), padchest_row(2, PatientBirth=""),
                   padchest_row(3, PatientBirth="1800.0"), padchest_row(4, PatientSex_DICOM="O"),
                   padchest_row(5, StudyDate_DICOM="unknown"))
    table, _ = read("padchest", raw)
    assert list(table.age) == ["64", "", "", "64", ""] and list(table.sex) == ["F", "F", "F", "O", "F"]


# ---- VinDr-CXR ----

@pytest.mark.parametrize("below", ["", "vindr-cxr/1.0.0", "physionet.org/files/vindr-cxr/1.0.0"])
@pytest.mark.parametrize("ending", [".dicom", ".dcm"])
def test_vindr_images_are_found_under_both_endings(read, tmp_path, below, ending):
    images = {f"test/{1:032x}{ending}": b""}
    write(tmp_path / "raw" / below, vindr_files() | images)
    table, _ = read("vindr_cxr", tmp_path / "raw")
    beginning = f"{below}/".lstrip("/")
    assert list(table.path) == [f"{beginning}test/{1:032x}{ending}", f"{beginning}test/{2:032x}.dicom"]
    assert set(table.split) == {"test"} and set(table["view"]) == {"PA"} and table.patient[0] == f"{1:032x}"


def test_vindr_columns_go_by_name_and_a_missing_one_is_blank(read, tmp_path):
    header = [{"Other diseases": "Other disease", "COPD": "copd", "No finding": "No Finding"}.get(name, name)
              for name in VINDR if name != "Edema"]
    table, facts = read("vindr_cxr", write(tmp_path / "raw", vindr_files(header)), "--with-train")
    assert list(table.columns) == FACTS + VINDR and (table.Edema == "").all()
    assert facts["blank_labels"] == ["Edema"] and set(table["Other diseases"]) == {"0"}


@pytest.mark.parametrize("rule, nodule, copd", [([], "1", "0"), (["--train-vote", "majority"], "1", "0"),
                                                (["--train-vote", "any"], "1", "1")])
def test_vindr_training_labels_are_votes(read, tmp_path, rule, nodule, copd):
    table, _ = read("vindr_cxr", write(tmp_path / "raw", vindr_files()), "--with-train", *rule)
    row = table[table.split == "train"].iloc[0]
    assert (row["Nodule/Mass"], row.COPD, row.ILD) == (nodule, copd, "0")


def test_vindr_of_kaggle_cannot_stand_in(refused, tmp_path):
    raw = write(tmp_path / "raw",
                {"train.csv": "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"})
    assert "image_labels_test.csv" in refused("vindr_cxr", raw)


# ---- COVIDx ----

def test_covidx_patient_of_every_family_of_names():
    patient_of = load_script("data_prep/covidx_ct.py").patient_of
    known = {"NCP_9999", "COVIDCTMD-P001", "COVIDCTMD-normal043", "volume-covid19-A-0003", "LIDC-IDRI-0234",
             "coronacases_001", "radiopaedia_10_85902_1", "HUST-Patient1", "STOIC-10011", "A002304",
             "patient45"}
    names = {"NCP_9999_1234_0017.png": "NCP_9999", "COVIDCTMD-P001-IM0001.png": "COVIDCTMD-P001",
             "COVIDCTMD-normal043-IM0001.png": "COVIDCTMD-normal043",
             "LIDC-IDRI-0234-1.3.6.1-0019.png": "LIDC-IDRI-0234",
             "volume-covid19-A-0003_ct-0007.png": "volume-covid19-A-0003",
             "volume-covid19-A-0003_1_ct-0007.png": "volume-covid19-A-0003",
             "coronacases_001-0001.png": "coronacases_001",
             "radiopaedia_10_85902_1-0011.png": "radiopaedia_10_85902_1",
             "HUST-Patient1-0011.png": "HUST-Patient1", "STOIC-10011-0011.png": "STOIC-10011",
             "A002304-12.png": "A002304",
             "137covid_patient45_SR_2_IM00010.png": "patient45",
             "normal2_patient45_SR_3_IM1.png": "patient45",
             "stranger-1-2.png": None, "NCP_99990_1_2.png": None}
    assert {name: patient_of(name, known) for name in names} == names


def test_covidx_sample_is_drawn_from_all_splits(read, tmp_path):
    table, facts = read("covidx_ct", write(tmp_path / "raw", covidx_files()), "--n-pretrain", "all")
    assert list(table.split) == ["pretrain"] * 4 and facts["available"] == 4
    row = table.set_index("patient").loc["patient45"]
    assert (row.sex, row.age, row["COVID-19"], row.Normal, row["view"]) == ("F", "77", "1", "0", "Axial")
    some, _ = read("covidx_ct", tmp_path / "raw", "--n-pretrain", 3)
    assert list(some.path) == list(table.path[:3])                      # nested


def test_covidx_lists_that_are_absent_are_named(refused, tmp_path, capsys):
    files = {name: text for name, text in covidx_files().items() if not name.startswith("train")}
    raw = write(tmp_path / "raw", files)
    with pytest.raises(SystemExit):
        run("covidx_ct", raw, tmp_path / "out/index.csv", "--n-pretrain", 4)
    said = capsys.readouterr()
    assert "3 images are eligible" in said.err and "train" not in said.out
    assert all(f"list: {split}_COVIDx_CT-3A.txt" in said.out for split in ("val", "test"))
    table, facts = run("covidx_ct", raw, tmp_path / "out/index.csv", "--n-pretrain", "all")
    assert facts["absent_lists"] == ["train"] and len(table) == 3


def test_covidx_lists_that_lie_there_twice_or_have_companions_of_macos_count_once(read, tmp_path):
    files = covidx_files()
    files |= {"val_COVIDx_CT-3A.txt.gz": files["val_COVIDx_CT-3A.txt"], "._val_COVIDx_CT-3A.txt": b"\0\5\x16\7\xff"}
    table, facts = read("covidx_ct", write(tmp_path / "raw", files), "--n-pretrain", "all")
    assert len(table) == table.path.nunique() == facts["available"] == 4


@pytest.mark.parametrize("folder", ["3A_images", "images", "COVIDx_CT-3A"])
def test_covidx_image_folder_is_found_by_its_names(read, tmp_path, folder):
    files = {("splits/v3/" if name.endswith(".txt") else "") + name: text
             for name, text in covidx_files().items()}
    raw = write(tmp_path / "raw", files | {f"{folder}/NCP_9999_1234_0017.png": b""})
    table, _ = read("covidx_ct", raw, "--n-pretrain", "all")
    assert {path.rpartition("/")[0] for path in table.path} == {folder}


def test_covidx_3b_is_read_when_asked(read, refused, tmp_path):
    raw = write(tmp_path / "raw", covidx_files("3B"))
    assert "3A.txt" in refused("covidx_ct", raw)
    table, facts = read("covidx_ct", raw, "--release", "3B", "--n-pretrain", "all")
    assert len(table) == 4 and facts["dataset"] == "covidx_ct"


def test_covidx_tells_unknown_and_shared_patients(read, tmp_path, capsys):
    files = covidx_files()
    files["train_COVIDx_CT-3A.txt"] += "stranger_1_5.png 0 0 0 9 9\nNCP_9999_1235_0017.png 0 0 130 512 429\n"
    files["test_COVIDx_CT-3A.txt"] += "\nNCP_9999_1234_0018.png 2 0 130 512 429\n"
    table, facts = read("covidx_ct", write(tmp_path / "raw", files), "--n-pretrain", 0)
    assert table.set_index("path").loc["3A_images/stranger_1_5.png", "patient"] == "stranger_1"
    assert "metadata.csv: rows for 85.7% of the images" in capsys.readouterr().out      # 6 of 7
    assert facts["patients_in_two_lists"] == 1


def test_covidx_metadata_of_other_patients_are_refused(refused, tmp_path):
    files = covidx_files()
    files["metadata.csv"] = files["metadata.csv"].splitlines()[0] + "\nNCP_1,CNCB,China,,,COVID-19,Yes,Expert,,CT\n"
    message = refused("covidx_ct", write(tmp_path / "raw", files), "--n-pretrain", "all")
    assert "metadata.csv: no image has a row in it" in message and "NCP_1" in message and "volume-covid19-A-0003_ct" in message


@pytest.mark.parametrize("line", ["a_1_2.png 3 0 0 9 9", "a_1_2.png 2 0 0 9", "a_1_2.png 2 0 0 9 -9",
                                  "a_1_2.png", "a 1.png 2 0 0 9 9"])
def test_covidx_lines_that_cannot_be_are_refused(refused, tmp_path, line):
    files = covidx_files()
    files["val_COVIDx_CT-3A.txt"] += line + "\n"
    message = refused("covidx_ct", write(tmp_path / "raw", files), "--n-pretrain", "all")
    assert "val_COVIDx_CT-3A.txt" in message and ("row 3" in message or "line 3" in message)


# ---- OCT ----

@pytest.mark.parametrize("root", ["CellData/OCT", "OCT2017", "OCT2017 ", "archive/OCT2017 /OCT2017 "])
def test_oct_is_found_in_every_release(read, tmp_path, root):
    table, facts = read("oct", write(tmp_path / "raw", oct_files(root)), "--n-pretrain", "all")
    assert sorted(table.path) == sorted(oct_files(root)) and set(table.split) == {"pretrain"}
    assert sorted(table.patient) == ["101", "101", "101", "102"] and facts["test_patients_in_train"] == 1
    normal = table.set_index("path").loc[f"{root}/train/NORMAL/NORMAL-102-1.jpeg"]
    assert normal[["CNV", "DME", "DRUSEN", "NORMAL"]].to_list() == ["0", "0", "0", "1"]


def test_oct_passes_over_companions_and_childrens_radiographs(read, tmp_path):
    raw = write(tmp_path / "raw", oct_files() | {
        "CellData/OCT/train/CNV/._CNV-101-1.jpeg": b"", "CellData/OCT/train/CNV/.DS_Store": b"",
        "CellData/chest_xray/train/NORMAL/NORMAL-28501-0001.jpeg": b"",
        "ChestXRay2017/Chest_XRay/test/NORMAL/NORMAL-28502-0001.jpeg": b"",
        "__MACOSX/OCT/train/CNV/._CNV-101-2.jpeg": b""})
    assert sorted(read("oct", raw, "--n-pretrain", "all")[0].path) == sorted(oct_files())


@pytest.mark.parametrize("change", [("/DRUSEN/", "/Drusen/"), ("/train/", "/Train/"), ("/NORMAL/", "/NORMAL /")])
def test_oct_folders_may_be_spelt_otherwise(read, tmp_path, change):
    table, facts = read("oct", write(tmp_path / "raw", oct_files()), "--n-pretrain", "all")
    other = {name.replace(*change): b"" for name in oct_files()} | {"CellData/OCT/train/AMD/AMD-1-1.jpeg": b""}
    same, said = read("oct", write(tmp_path / "other", other), "--n-pretrain", "all")
    assert sorted(same.path.str.replace(*change[::-1])) == sorted(table.path)
    columns = ["patient", "CNV", "DME", "DRUSEN", "NORMAL"]
    assert sorted(same[columns].values.tolist()) == sorted(table[columns].values.tolist())
    assert facts["in_other_folders"] == 0 and said["in_other_folders"] == 1         # counted aloud
    assert said["test_patients_in_train"] == facts["test_patients_in_train"] == 1


def test_oct_files_of_unprintable_paths_are_counted_aloud(read, tmp_path, capsys):
    odd = {"CellData/OCT/train/CNV/CNV-1\n1-1.jpeg": b"", "new\nline/train/CNV/CNV-9-1.jpeg": b""}
    table, _ = read("oct", write(tmp_path / "raw", oct_files() | odd), "--n-pretrain", "all")
    assert len(table) == 4 and "warning: 2 files left out" in capsys.readouterr().out


def test_oct_second_copy_of_the_tree_counts_once(read, tmp_path):
    raw = write(tmp_path / "raw", oct_files("OCT2017 ") | oct_files("oct2017/OCT2017 "))
    table, facts = read("oct", raw, "--n-pretrain", "all")
    assert sorted(table.path) == sorted(oct_files("OCT2017 "))
    assert facts["second_copies"] == 4


def test_oct_with_too_few_images_names_the_release(refused, tmp_path):
    message = refused("oct", write(tmp_path / "raw", oct_files()))
    assert "4 images" in message and "v3" in message


def test_oct_folder_wins_over_the_name(read, tmp_path):
    files = oct_files() | {"CellData/OCT/train/DME/CNV-103-1.jpeg": b"",
                           "CellData/OCT/train/DME/scan.jpeg": b""}
    table, facts = read("oct", write(tmp_path / "raw", files), "--n-pretrain", "all")
    assert (table.DME == "1").sum() == 2 and "scan" in set(table.patient)


# ---- ImageNet ----

def test_imagenet_classes_are_wnids_in_sorted_order_and_flat_validation_has_its_table(read, tmp_path):
    table, facts = read("imagenet", write(tmp_path / "raw", imagenet_files()), "--n-pretrain", "all")
    assert dict(zip(table.patient, table["class"])) == {"n02000000_18": "1", "n01000000_7": "0",
                                                        "n01000000_9": "0",
                                                        "ILSVRC2012_val_00000001": "1"}
    assert sorted(table.split) == ["pretrain"] * 3 + ["val"] and facts["wnids"] == ["n01000000", "n02000000"]


def test_imagenet_validation_may_lie_in_class_folders(read, tmp_path):
    raw = write(tmp_path / "raw", {"train/n01000000/a.JPEG": b"", "val/n02000000/b.JPEG": b"",
                                   "test/c.JPEG": b""})
    table, _ = read("imagenet", raw, "--n-pretrain", "all")
    assert dict(zip(table.path, table["class"])) == {"train/n01000000/a.JPEG": "0",
                                                     "val/n02000000/b.JPEG": "1"}


def test_imagenet_tar_files_and_missing_answers_are_named(refused, tmp_path):
    assert "tar -xf" in refused("imagenet", write(tmp_path / "a", {"ILSVRC2012_img_train.tar": b""}))
    files = imagenet_files() | {"LOC_val_solution.csv": "ImageId,PredictionString\n"}
    assert "ILSVRC2012_val_00000001" in refused("imagenet", write(tmp_path / "b", files))


def test_imagenet_without_answers_of_a_flat_validation_set_is_training_images_alone(read, tmp_path, capsys):
    files = imagenet_files()
    del files["LOC_val_solution.csv"]
    table, _ = read("imagenet", write(tmp_path / "raw", files), "--n-pretrain", "all")
    assert set(table.split) == {"pretrain"} and "of val/ left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagenet", "oct"])
def test_a_folder_that_cannot_be_listed_is_named(name, refused, tmp_path, monkeypatch):
    """As on a network drive that has lost it."""
    raw = write(tmp_path / "raw", {f"train/{folder}/{folder}-1-1.jpeg": b"" for folder in ("CNV", "n01000000")})
    scandir = os.scandir

    def lost(path):
        if str(path).endswith(("CNV", "n01000000")):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", lost)
    assert "Stale file handle" in refused(name, raw)


@pytest.mark.parametrize("dataset, name, said", [
    ("oct", "train/CNV/CNV-{}-1.jpeg", "100,001 images, not 109,309"),
    ("imagenet", "train/n01000000/{}.JPEG", "100,001 training images, not 1,281,167")])
def test_a_download_with_files_missing_is_told_that_its_sample_is_another(
        read, tmp_path, monkeypatch, capsys, dataset, name, said):
    names = [name.format(number) for number in range(100_001)]
    monkeypatch.setattr(load_script(f"data_prep/{dataset}.py"), "scan", lambda raw, *endings: names)
    read(dataset, tmp_path)
    assert f"warning: {said}" in capsys.readouterr().out


@needs_shared
def test_imagenet_real_images_one_a_class(read):
    table, facts = read("imagenet", SHARED / "realdata" / "imagenet", "--n-pretrain", "all")
    assert len(table) == len(facts["wnids"]) == 1000
    wnids = table.path.str.split("/").str[1]
    assert [facts["wnids"][int(k)] for k in table["class"]] == list(wnids)


# ---- all of them ----

@pytest.mark.parametrize("dataset", DATASETS)
def test_index_has_the_contracts_columns_and_the_same_bytes_again(read, tmp_path, dataset):
    raw = write(tmp_path / "raw", FILES[dataset]())
    table, facts = read(dataset, raw, *ALL.get(dataset, []))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert list(table.columns[:8]) == FACTS and set(table.split) <= {"pretrain", "train", "val", "test"}
    assert facts["dataset"] == dataset and set(written) == {"index.csv", "index.json"}
    assert facts["splits"] == {split: {"images": len(rows), "patients": rows.patient.nunique()}
                               for split, rows in table.groupby("split")}
    assert b"\r" not in written["index.csv"]
    read(dataset, raw, *ALL.get(dataset, []))
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name not in ("nih", "oct", "imagenet")])
def test_images_that_are_absent_stay_in_the_index_at_the_place_of_the_download(read, tmp_path, dataset):
    raw = write(tmp_path / "raw", FILES[dataset]())
    table, _ = read(dataset, raw, *ALL.get(dataset, []))
    assert len(table) and not any((raw / path).exists() for path in table.path)
    write(raw, dict.fromkeys(table.path, b""))
    assert list(read(dataset, raw, *ALL.get(dataset, []))[0].path) == list(table.path)


@pytest.mark.parametrize("dataset", DATASETS)
def test_missing_folder_unknown_flag_and_unwritable_output_are_said_in_a_sentence(refused, tmp_path, dataset):
    assert "nowhere" in refused(dataset, tmp_path / "nowhere")
    assert "--odd" in refused(dataset, tmp_path, "--odd")
    write(tmp_path, {"out": b"a file where the folder should be"})
    assert "--out" in refused(dataset, write(tmp_path / "raw", FILES[dataset]()), *ALL.get(dataset, []))


@pytest.mark.parametrize("dataset", DATASETS)
def test_help_tells_source_terms_size_and_command(dataset, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{dataset}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        load_script(f"data_prep/{dataset}.py").main()
    assert exit.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"python data_prep/{dataset}.py" in words and ("https://" in words or "kaggle" in words)
    assert f"(raw/{dataset})" in words and f"(data/{dataset}/index.csv)" in words       # the defaults
    assert "--n-pretrain" not in words or "(100000)" in words and "(42)" in words       # the study's
    assert re.search(r"(\d|Tens of) [GT]B", words)
    assert any(term in words for term in ("Free use", "credentialed", "agreement", "research use", "CC BY",
                                          "Creative Commons", "non-commercial"))
    assert any(command in words for command in ("wget", "kaggle", "azcopy", "unzip"))


def test_a_mistake_on_the_command_line_exits_with_two():
    assert_user_error(run_script("data_prep/nih.py", "--raw", "/nonexistent"), "Data_Entry_2017", "--raw")
    assert run_script("data_prep/oct.py", "--n-pretrain", "some").returncode == 2


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace("No Finding", "No F\xefnding").encode("latin-1"), "utf-8"),
    (lambda text: text.replace("Patient Age", "Age").encode(), "Patient Age"),
    (lambda text: gzip.compress(text.encode())[:-20], "not a readable table"),
    (lambda text: b"", "not a readable table"),
    (lambda text: text.replace("\n00000008", "\n\"00000008").encode(), "not a readable table"),
    (lambda text: text.replace("View Position", "Patient Age").encode(), "no column 'Patient Age', or two"),
    (lambda text: text.replace("8,0,F", "8,,0,F").encode(), "line 4")])
def test_damaged_metadata_is_refused(refused, tmp_path, damage, said):
    files = nih_files()
    files["Data_Entry_2017_v2020.csv"] = damage(files["Data_Entry_2017_v2020.csv"])
    message = refused("nih", write(tmp_path / "raw", files))
    assert "Data_Entry_2017_v2020.csv" in message and said in message


def test_byte_order_marks_crlf_and_blank_lines_do_no_harm(read, tmp_path):
    plain, _ = read("nih", write(tmp_path / "a", nih_files()))
    text = nih_files()["Data_Entry_2017_v2020.csv"].replace("\n", "\r\n\r\n")
    dressed, _ = read("nih",
                      write(tmp_path / "b", nih_files() | {"Data_Entry_2017_v2020.csv": "\ufeff" + text}))
    assert dressed.equals(plain)


@pytest.mark.parametrize("dataset, name", [
    ("mimic_cxr", "mimic-cxr-2.0.0-chexpert.csv"), ("mimic_cxr", "mimic-cxr-2.0.0-split.csv"),
    ("chexpert", "CheXpert-v1.0-small/valid.csv"), ("padchest", PADCHEST_CSV),
    ("vindr_cxr", "annotations/image_labels_test.csv"), ("covidx_ct", "metadata.csv")])
@pytest.mark.parametrize("change, row", [
    (lambda lines: [lines[0], "a," + lines[1], *lines[2:]], 2),             # one cell more than the header
    (lambda lines: [lines[0], "a,b," + lines[1], *lines[2:]], 2),
    (lambda lines: [lines[0], *(line + "," for line in lines[1:])], 2),     # a comma at the end of all rows
    (lambda lines: [*lines[:-1], lines[-1].rpartition(",")[0]], None)])     # a download that broke off
def test_a_row_of_more_or_fewer_cells_than_the_header_is_refused(refused, tmp_path, dataset, name, change, row):
    files = mimic_files(gz="") if dataset == "mimic_cxr" else FILES[dataset]()
    raw = write(tmp_path / "raw", files)
    lines = change((raw / name).read_text().splitlines())
    (raw / name).write_text("\n".join(lines))
    message = refused(dataset, raw)
    assert str(raw / name) in message and f"row {row or len(lines)}: more or fewer cells" in message


@pytest.mark.parametrize("blank", ["NA", "N/A", "None", "nan"])          # of R, COVIDx, PadChest, pandas
def test_words_for_a_missing_value_are_blank(read, tmp_path, blank):
    plain, _ = read("mimic_cxr", write(tmp_path / "a", mimic_files(gz="")), *ALL["mimic_cxr"])
    raw = write(tmp_path / "b", mimic_files(gz=""))
    table = raw / "mimic-cxr-2.0.0-chexpert.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *(",".join(cell or blank for cell in row.split(",")) for row in rows)]))
    assert read("mimic_cxr", raw, *ALL["mimic_cxr"])[0].equals(plain)


def test_a_failed_run_leaves_the_index_of_the_last_one(read, refused, tmp_path):
    raw = write(tmp_path / "raw", nih_files())
    read("nih", raw)
    before = (tmp_path / "out" / "index.csv").read_bytes()
    (raw / "test_list.txt").unlink()
    refused("nih", raw)
    assert (tmp_path / "out" / "index.csv").read_bytes() == before


def test_a_disk_that_is_full_leaves_the_index_and_its_facts_as_they_were(read, refused, tmp_path):
    raw, out = write(tmp_path / "raw", nih_files()), tmp_path / "out"
    read("nih", raw)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before["index.json"]) < len(before["index.csv"])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["index.json"]), hard))        # bytes a file
    try:
        message = refused("nih", raw, "--pretrain", "all", "--n-pretrain", "all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot be written" in message
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


# ---- hostile downloads ----

@pytest.mark.parametrize("dataset", DATASETS)
def test_images_in_a_folder_whose_name_is_not_utf8_are_missing_in_packing_or_refused(read, refused, tmp_path, dataset):
    """As an archive unpacked under another locale leaves it."""
    pack, raw = load_script("data_prep/pack.py"), tmp_path / "raw"
    write(raw / os.fsdecode(b"\xe9tude"), FILES[dataset]())
    if dataset in ("oct", "imagenet"):
        assert "at any depth" in refused(dataset, raw)
        return
    table, _ = read(dataset, raw, *ALL.get(dataset, []))
    assert len(table) and all("tude/" in path for path in table.path)
    for path in table.path:
        with pytest.raises(pack.Rejected, match="missing"):
            pack.locate(raw, path)


def test_a_raw_folder_may_itself_be_a_link(read, tmp_path):
    write(tmp_path / "elsewhere", nih_files())
    (tmp_path / "raw").symlink_to(tmp_path / "elsewhere")
    table, _ = read("nih", tmp_path / "raw")
    assert len(table) == 5 and table.path[0] == "images/00000007_000.png"


CELLS = ["", " ", "NaN", "None", "../../../etc/passwd", "/etc/passwd", "C:\\x", "..\\x", "a/../../b", "\x00",
         "\n", "é", "1e308", "-1", "2", "inf", "9" * 400, "[[[", "=1+1", "train", "0", "\u202e", "x" * 5000,
         "|", ",", '"', "00000007_000.png"]


@st.composite
def damages(draw):
    """One way to spoil a download: which file, which line and cell, and what is done to it."""
    kind = draw(st.sampled_from(["cell", "drop column", "drop line", "double line", "cut", "bytes", "crlf",
                                 "spaces", "header", "empty", "link out", "folder", "odd name", "gone"]))
    file, line, cell = (draw(st.integers(0, high)) for high in (9, 9, 30))
    return kind, file, line, cell, draw(st.sampled_from(CELLS))


def spoil(raw, outside, damage):
    kind, file, line, cell, value = damage
    files = sorted(path for path in raw.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    path = files[file % len(files)]
    data = path.read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    try:
        text = (gzip.decompress(data) if packed else data).decode(errors="replace")
    except (OSError, EOFError, zlib.error):         # an earlier damage went through the archive
        return
    lines = text.splitlines() or [""]
    mark = "," if "," in lines[0] else " "
    cells = lines[line % len(lines)].split(mark)
    if kind == "cell":
        cells[cell % len(cells)] = value
        lines[line % len(lines)] = mark.join(cells)
    elif kind == "drop column":
        lines = [mark.join(part for i, part in enumerate(row.split(mark)) if i != cell % len(cells))
                 for row in lines]
    elif kind == "drop line":
        del lines[line % len(lines)]
    elif kind == "double line":
        lines.append(lines[line % len(lines)])
    elif kind == "header":
        lines[0] = lines[0].upper()
    elif kind == "spaces":
        lines = [mark.join(f" {part} " for part in row.split(mark)) for row in lines]
    text = ("\r\n" if kind == "crlf" else "\n").join(lines)
    data = gzip.compress(text.encode()) if packed else text.encode()
    if kind == "cut":
        data = data[:len(data) * (line + 1) // 11]
    elif kind == "bytes":
        data = data[:cell] + b"\xff\xfe\x80" + data[cell:]
    elif kind == "empty":
        data = b""
    path.unlink()
    if kind == "link out":
        path.symlink_to(outside / "secret.csv")
    elif kind == "folder":
        path.mkdir()
    elif kind == "odd name" and path.suffix.lower() in (".png", ".jpeg"):
        path.with_name(f"{path.stem}\n\udcff{path.suffix}").write_bytes(data)
    elif kind != "gone":
        path.write_bytes(data)


@pytest.mark.parametrize("dataset", DATASETS)
@settings(deadline=None, derandomize=True, max_examples=30,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoils=st.lists(damages(), min_size=1, max_size=3))
def test_spoilt_download_gives_an_index_or_one_sentence_and_packing_reads_nothing_outside(
        dataset, tmp_path_factory, capsys, spoils):
    base = tmp_path_factory.mktemp("hostile")
    outside = write(base / "outside", {"secret.csv": "secret", "train/CNV/CNV-1-1.jpeg": b""})
    raw = write(base / "raw", FILES[dataset]())
    (raw / "link").symlink_to(outside)
    for damage in spoils:
        spoil(raw, outside, damage)
    try:
        table, _ = run(dataset, raw, base / "out" / "index.csv", *ALL.get(dataset, []))
    except SystemExit as exit:
        assert exit.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not list((base / "out").glob("*")) if (base / "out").exists() else True
    else:
        pack = load_script("data_prep/pack.py")
        for path in table.path:
            with contextlib.suppress(pack.Rejected):
                assert Path(pack.locate(raw, path)).is_relative_to(os.path.realpath(raw))
        assert set(table.split) <= {"pretrain", "train", "val", "test"}
        if dataset not in ("chexpert", "mimic_cxr"):                # their cells are checked where they are used
            labels = table.drop(columns=[*FACTS, "class"], errors="ignore")
            assert labels.isin(["1", "0", "-1", ""]).all(axis=None)
    finally:
        capsys.readouterr()
        shutil.rmtree(base)
