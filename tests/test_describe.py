"""The audit of Tables 9-13: cells from counts, disagreements found and named, leaks told, Figure 1 drawn."""

import json
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, assert_user_error, load_script, run_script
from hypothesis import HealthCheck, given, settings, strategies as st

describe = load_script("data_prep/describe.py")
REPORTED = {n: pd.read_csv(describe.REPORTED / f"table{n}.csv", dtype=str, keep_default_na=False)
            for n in range(9, 14)}


def index(folder, dataset, rows, **facts):
    """Write an index and its index.json: rows are dicts, `facts` of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"path": f"{i}.png", "patient": str(i), "split": "test"} | row for i, row in enumerate(rows)]
    table = pd.DataFrame(rows)
    first = [name for name in describe.FACTS if name in table]
    table = table[first + [name for name in table if name not in first]].fillna("")
    table.to_csv(folder / "index.csv", index=False)
    (folder / "index.json").write_text(json.dumps({"dataset": dataset, **facts}))
    return folder / "index.csv"


def cells(*paths):
    return describe.compare([describe.read_index(path) for path in paths], REPORTED)


def cell(frame, table, quantity, group="", part=None):
    found = frame[(frame.table == table) & (frame.quantity == quantity) & (frame.group == group)]
    return (found if part is None else found[found.part == part]).iloc[0]


@pytest.mark.parametrize("numerator, denominator, like, text", [
    (1, 8, "0.0", "0.1"), (1250, 100, "5", "13"), (1150, 100, "5", "12"), (45, 1000, "0.00", "0.05"),
    (104 * 100, 1860, "5.7", "5.6"), (51 * 100, 1860, "2.8", "2.7"), (33152 * 100, 75312, "44.0", "44.0"),
    (0, 7, "0", "0"), (100, 1, "5.0", "100.0")])
def test_percentages_round_half_up_to_the_printed_decimals(numerator, denominator, like, text):
    assert describe.half_up(numerator, denominator, like) == text
    step = Fraction(1, 10 ** len(like.partition(".")[2]))               # floor(x / step + 1/2) * step
    assert Fraction(Decimal(text)) == (Fraction(numerator, denominator) / step + Fraction(1, 2)) // 1 * step


# ---- on the real metadata ----

@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """Indexes of all real metadata at hand, made by the readers, and what describe.py writes about them."""
    if not SHARED.is_dir():
        pytest.skip(f"real data folder {SHARED} is absent")
    base, fixtures = tmp_path_factory.mktemp("audit"), SHARED / "fixtures"
    split = "--split-file", fixtures / "chexpert" / "CheXpert_test_Glocker.csv.gz"
    race = "--demographics", fixtures / "chexpert" / "valid_metadata.csv"
    for name, reader, *flags in [("nih", "nih"), ("nih_pretrain", "nih", "--pretrain", "all"),
                                 ("chexpert", "chexpert", "--views", "all", *split, *race),
                                 ("padchest", "padchest"),
                                 ("covidx_ct", "covidx_ct", "--n-pretrain", "0")]:
        call(f"data_prep/{reader}.py", "--raw", fixtures / reader, "--out", base / name / "index.csv", *flags)
    code = call("data_prep/describe.py", "--index", *sorted(base.glob("*/index.csv")), "--out", base / "out",
                "--check")
    return base, code


def call(script, *args):
    """main() of a script in this process; its exit code."""
    command, sys.argv = sys.argv, [script, *map(str, args)]
    try:
        load_script(script).main()
        return 0
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = command


def test_real_metadata_pass_the_check_and_every_table_agrees_but_for_the_known_errors(audit):
    base, code = audit
    assert code == 0
    frame = pd.read_csv(base / "out" / "distributions.csv", dtype=str, keep_default_na=False)
    verdicts = {table: rows.agrees.value_counts().to_dict()
                for table, rows in frame[frame.printed != ""].groupby("table")}
    # no race in the test split
    assert verdicts["10"] == {"yes": 100, "": 60}
    assert verdicts["11"] == {"yes": 40}
    wrong = frame[(frame.agrees == "no") & (frame.table != "9")]
    columns = ["quantity", "printed", "computed", "numerator", "denominator"]
    assert list(wrong[columns].itertuples(index=False, name=None)) == [
        ("Scans", "1861", "1860", "1860", ""), ("Atelectasis", "5.7", "5.6", "104", "1860"),
        ("Pleural Effusion", "2.8", "2.7", "51", "1860")]
    assert (frame.why[frame.agrees == "no"] != "").all()
    nine = frame[frame.table == "9"].set_index("quantity")
    assert nine.loc["CheXpert vali used", "agrees"] == "yes"
    assert nine.loc["CheXpert vali available", "computed"] == "234"
    assert nine.loc["NIH ChestX-ray8 used", "numerator"] == "100000"


def test_the_numerators_are_the_expected_counts(audit):
    tables = json.loads((SHARED / "fixtures" / "expected_counts.json").read_text())["tables"]
    frame = cells(*sorted(audit[0].glob("*/index.csv")))
    for group, want in tables["chexpert_valid"].items():
        printed = {"Enlarged Cardiomediastinum": "Enlarged Cardiom.", "Support Devices": "Support device"}
        got = {label: cell(frame, 10, printed.get(label, label), group, "chexpert_valid").numerator
               for label in want["positive"]}
        assert got == want["positive"]
        women, age = (cell(frame, 10, what, group, "chexpert_valid") for what in ("Female", "Age mean"))
        assert (women.numerator, women.denominator,
                age.numerator) == (want["female_scans"], want["scans"], want["age_sum"])
    for split, want in tables["nih"].items():
        assert cell(frame, 11, "Female", split).numerator == want["female_scans"]
        assert cell(frame, 11, "Age mean", split).numerator == want["age_sum"]


def test_the_exact_counts_in_the_script_are_those_of_the_metadata(audit):
    expected = json.loads((SHARED / "fixtures" / "expected_counts.json").read_text())
    keys = {("chexpert", "val"): "chexpert/valid_frontal", ("chexpert", "val, all views"): "chexpert/valid",
            ("chexpert", "test"): "chexpert/test_glocker", ("padchest", "test"): "padchest/filtered"}
    for (dataset, split), (images, patients, labels) in describe.EXACT.items():
        want = expected[keys.get((dataset, split), f"{dataset}/{split}")]
        assert images == want["images"] and patients in (want["patients"], None)
        if dataset in ("nih", "chexpert"):
            assert labels == list((want.get("positives") or want["positive"]).values())
    told = describe.leaks([describe.read_index(path) for path in sorted(audit[0].glob("*/index.csv"))])
    assert ("nih_pretrain", "images of the sample in NIH's test split", 22_772, False) in told
    assert all(n == 0 for _, _, n, zero in told if zero)


def test_one_wrong_label_one_lost_row_and_one_shared_patient_fail_the_check_by_name(audit, tmp_path, capsys):
    rows = pd.read_csv(audit[0] / "padchest" / "index.csv", dtype=str, keep_default_na=False)
    rows.loc[rows.index[rows.cardiomegaly == "1"][0], "cardiomegaly"] = "0"
    (tmp_path / "padchest").mkdir()
    rows.iloc[:-1].to_csv(tmp_path / "padchest" / "index.csv", index=False)
    shared = index(tmp_path / "oddly", "mimic_cxr",
                   [{"patient": "1", "split": "pretrain"}, {"patient": "1", "split": "val"}])
    code = call("data_prep/describe.py", "--index", tmp_path / "padchest" / "index.csv", shared, "--out",
                tmp_path / "out", "--check")
    lines = capsys.readouterr().err.splitlines()
    assert code == 1
    assert lines[:2] == ["check failed: padchest test, images: expected 1,860, found 1,859",
                         "check failed: padchest test, cardiomegaly: expected 162, found 161"]
    assert "check failed: mimic_cxr, patients in pretrain and val: expected 0, found 1" in lines
    # told, not failed
    assert call("data_prep/describe.py", "--index", shared, "--out", tmp_path / "out") == 0


# ---- small indexes, by hand ----

def test_percentages_and_ages_are_over_images_and_unknown_ages_do_not_count(tmp_path):
    frame = cells(index(tmp_path / "nih", "nih", [
        {"patient": "a", "sex": "F", "age": "40", "split": "train", "Effusion": "1"},
        {"patient": "a", "sex": "F", "age": "41", "split": "train", "Effusion": "0"},
        {"patient": "b", "sex": "M", "age": "", "split": "train", "Effusion": "1"}]))
    women, age, effusion = (cell(frame, 11, what, "train")
                            for what in ("Female", "Age mean", "Pleural Effusion"))
    assert (women.numerator, women.denominator, women.computed) == (2, 3, "66.7")
    assert (age.numerator, age.denominator, age.computed) == (81, 2, "40.5")
    assert (effusion.numerator, effusion.computed, effusion.agrees) == (2, "66.7", "no")
    assert cell(frame, 11, "Patients", "train").numerator == 2
    assert cell(frame, 11, "Age max", "train").computed == "41.0"
    assert cell(frame, 11, "Patients", "test").computed == ""  # no such rows: not computable, not wrong


def test_race_groups_go_by_substring_whatever_the_ethnicity(tmp_path):
    races = ["White", "White, non-Hispanic", "Black or African American", "Asian - Historical", "Other", ""]
    frame = cells(index(tmp_path / "chexpert", "chexpert",
                        [{"race": race, "split": "val"} for race in races]))
    assert [cell(frame, 10, "Scans", group, "chexpert_valid").numerator
            for group in ("all", "white", "black", "asian")] \
        == [6, 2, 1, 1]


def test_padchest_atelectasis_is_any_label_that_contains_it_and_effusion_the_exact_one(tmp_path):
    frame = cells(index(tmp_path / "padchest", "padchest", [
        {"atelectasis": "1", "laminar atelectasis": "1", "pleural effusion": "0",
         "loculated pleural effusion": "1"},
        {"atelectasis": "0", "laminar atelectasis": "1", "pleural effusion": "1",
         "loculated pleural effusion": "0"},
        {"atelectasis": "0", "laminar atelectasis": "0", "pleural effusion": "0",
         "loculated pleural effusion": "0"}]))
    findings = "Atelectasis", "Pleural Effusion", "Edema"
    assert [cell(frame, 12, what).numerator for what in findings] == [2, 1, 0]


def test_vindr_blank_edema_and_sex_cannot_be_computed(tmp_path):
    frame = cells(index(tmp_path / "vindr_cxr", "vindr_cxr", [{"Edema": "", "Pleural effusion": "1"}]))
    assert cell(frame, 13, "Edema").computed == cell(frame, 13, "Female").computed == ""
    assert cell(frame, 13, "Pleural Effusion").numerator == 1 and "quoted" in cell(frame, 13, "Female").why


def test_frontal_index_is_told_from_one_with_laterals(tmp_path):
    rows = [{"view": "AP", "split": "val"}] * 202
    frontal = describe.read_index(index(tmp_path / "a", "chexpert", rows))
    every = describe.read_index(index(tmp_path / "b", "chexpert",
                                      rows + [{"view": "Lateral", "split": "val"}] * 31))
    said = "\n".join(describe.misses([frontal]))
    assert "chexpert val, images" not in said and "all views" not in said
    assert "chexpert val, all views, images: expected 234, found 233" in describe.misses([frontal, every])


def test_sampled_covidx_is_not_held_against_the_lists(tmp_path):
    sampled = describe.read_index(index(tmp_path / "covidx_ct", "covidx_ct",
                                        [{"split": "pretrain"}, {"split": "val"}],
                                        patients_in_two_lists=3))
    assert describe.misses([sampled]) == []
    told = "covidx_ct", "patients in two lists, before the sample was drawn", 3, False
    assert told in describe.leaks([sampled])


def test_markdown_and_csv_hold_every_cell_and_come_out_the_same_again(tmp_path, capsys):
    path = index(tmp_path / "padchest", "padchest", [{"atelectasis": "1", "sex": "F"}])
    args = "--index", path, "--out", tmp_path / "out"
    assert call("data_prep/describe.py", *args) == 0
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(first) == {"distributions.csv", "distributions.md"}
    assert "| 12 | 8 |" in capsys.readouterr().out                              # the summary alone
    text = first["distributions.md"].decode()
    assert "| Atelectasis | **100.0 (1/1)** ✗ printed 5.7 |" in text
    assert "| Patients | **1** ✗ printed 1754 |" in text
    assert len(pd.read_csv(tmp_path / "out" / "distributions.csv")) == 22 + 160 + 60 + 8 + 7
    assert call("data_prep/describe.py", *args) == 0
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def pack(folder, dataset, image):
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", image[None])
    (folder / "pack.json").write_text(json.dumps({"dataset": dataset}))
    return folder


def test_figure1_shows_the_first_image_of_each_pack_in_its_place(tmp_path):
    from PIL import Image
    black, red = np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    path = index(tmp_path / "oct", "oct", [{}])
    packs = pack(tmp_path / "a", "imagenet", red), pack(tmp_path / "b", "nih_pretrain", black)
    assert call("data_prep/describe.py", "--index", path, "--out", tmp_path / "out", "--packs", *packs) == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "figure1.png").convert("RGB"))
    height, width, _ = picture.shape
    assert tuple(picture[height // 4, width // 8]) == (255, 0, 0)  # ImageNet: first of the first row
    assert tuple(picture[height * 3 // 4, width // 8]) == (0, 0, 0)             # NIH: first of the second row
    assert tuple(picture[height // 4, width * 3 // 8]) != (0, 0, 0)             # MIMIC-CXR: not given
    svg = (tmp_path / "out" / "figure1.svg").read_bytes()
    assert call("data_prep/describe.py", "--index", path, "--out", tmp_path / "out", "--packs", *packs) == 0
    assert (tmp_path / "out" / "figure1.svg").read_bytes() == svg
    assert not list((tmp_path / "out").glob("*.tmp*"))


@pytest.mark.parametrize("mistake, said", [
    ("absent", "index.csv"), ("no split", "no column 'split'"), ("not json", "index.csv"),
    ("binary", "index.csv"),
    ("no pack", "no pack with images"), ("reported", "--reported"), ("out is a file", "--out")])
def test_mistakes_are_said_in_one_sentence(tmp_path, capsys, mistake, said):
    path = index(tmp_path / "oct", "oct", [{}])
    flags = {"no pack": ["--packs", tmp_path], "reported": ["--reported", tmp_path]}.get(mistake, [])
    if mistake == "absent":
        path.unlink()
    elif mistake == "no split":
        path.write_text("path\na.png\n")
    elif mistake == "not json":
        path.with_suffix(".json").write_text("{")
    elif mistake == "binary":
        path.write_bytes(b"\xff\xfe\x00path")
    elif mistake == "out is a file":
        (tmp_path / "out").write_text("")
    assert call("data_prep/describe.py", "--index", path, "--out", tmp_path / "out", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


CELLS = ["", " ", "nan", "yes", "1", "-1", "1e9", "é", '"', ",", "\n", "\r\n", "\0", "\ufeff", "../x",
         "/etc/passwd", "val", "test", "path", "split", "patient", "9" * 400]


@pytest.mark.parametrize("dataset", ["nih", "chexpert", "padchest", "vindr_cxr"])
@settings(deadline=None, derandomize=True, max_examples=10,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.lists(st.sampled_from([*describe.FACTS, "Edema", "Atelectasis", ""]), max_size=10),
       cells=st.lists(st.sampled_from(CELLS), max_size=40), encoding=st.sampled_from(["utf-8", "utf-16"]))
def test_any_index_gives_tables_or_one_sentence(tmp_path, capsys, dataset, columns, cells, encoding):
    columns = ["path", "split", *columns]
    rows = [",".join(cells[i:i + len(columns)]) for i in range(0, len(cells), len(columns))]
    (tmp_path / "index.csv").write_bytes("\n".join([",".join(columns), *rows]).encode(encoding))
    (tmp_path / "index.json").write_text(json.dumps({"dataset": dataset}))
    code = call("data_prep/describe.py", "--index", tmp_path / "index.csv", "--out", tmp_path / "out",
                "--check")
    error = capsys.readouterr().err
    if code == 2:
        assert error.count("\n") == 1 and error.startswith("error: ")
    else:
        assert code == int("check failed: " in error) and len(list((tmp_path / "out").iterdir())) == 2


def test_from_the_command_line():
    assert "Table" in run_script("data_prep/describe.py", "--help").stdout
    assert_user_error(run_script("data_prep/describe.py", "--index", "/nonexistent/index.csv", "--out",
                                 "/tmp"), "/nonexistent")
