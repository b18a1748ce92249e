"""Every number of reported/errata.csv, recomputed from the published runs, printed tables or metadata."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, load_script

metrics = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
ERRATA = pd.read_csv(REPORTED / "errata.csv", dtype=str, keep_default_na=False).set_index("id")
RUNS = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"exp": str, "seed": str, "classes": str})
FOUR = ["Atelectasis", "Cardiomegaly", "Consolidation", "Effusion"]


def table(number):
    return pd.read_csv(REPORTED / f"table{number}.csv", dtype=str, keep_default_na=False)


def runs(exp, testset="nih_test", classes="14", label="mean"):
    """{seed: AUC} of the published runs."""
    rows = RUNS[
        (RUNS.exp == exp) & (RUNS.testset == testset) & (RUNS.classes == classes) & (RUNS.label == label)
    ]
    return rows.set_index("seed").auc


def mean_sd(values):
    return [f"{values.mean():.4f}", f"{values.std(ddof=1):.4f}"]


def whole(testset, size):
    """Whether every published subset accuracy (4 decimals) is a whole number of `size` images."""
    rows = pd.read_csv(REPORTED / "raw_runs_threshold.csv").query(
        "testset == @testset and metric == 'subset_acc'"
    )
    return bool((np.abs(np.round(rows.value * size) / size - rows.value) < 5.1e-5).all())


def columns_of_tables_7_and_8():
    """{(metric, threshold): {exp: value}}, larger is better, of the metrics in Figure 2 and mean accuracy."""
    found = {}
    for row in table(7).itertuples():
        if row.metric != "Calibration error":
            sign = -1 if row.metric == "FNR" else 1
            found.setdefault((row.metric, row.threshold), {})[row.exp] = sign * float(row.value)
    for row in table(8).itertuples():
        found.setdefault(("Oracle AUC", row.referred), {})[row.exp] = float(row.oracle_auc)
    return found


def numbers(row):
    """All numbers with a decimal point in printed and found, in order."""
    return re.findall(r"\d+\.\d+", f"{row.printed} {row.found}")


def test_an_arm_without_one_of_its_runs():
    arm = runs("3.1")
    assert numbers(ERRATA.loc["E1"]) == [*mean_sd(arm.drop("100")), *mean_sd(arm)] and len(arm) == 5
    printed = table(2).query("exp == '3.1' and testset == 'nih_test' and classes == '14'").iloc[0]
    assert [printed.auc_mean, printed.auc_sd] == mean_sd(arm.drop("100"))
    others = table(2).query("exp == '3.1'").drop(printed.name)
    for row in others.itertuples():
        assert [row.auc_mean, row.auc_sd] == mean_sd(runs("3.1", row.testset, row.classes))


@pytest.mark.parametrize(
    "key, number, exp, place",
    [("E2", 2, "1.2", 0), ("E3", 2, "1.1", 1), ("C13", 5, "3.1", None), ("C14", 5, "3.2", 1)],
)
def test_means_and_spreads(key, number, exp, place):
    printed = table(number).query("exp == @exp").iloc[0]
    printed = [printed.auc_mean, printed.auc_sd] if number == 2 else [printed.auc_36, printed.sd_36]
    found, pick = mean_sd(runs(exp)), slice(None) if place is None else slice(place, place + 1)
    assert numbers(ERRATA.loc[key]) == printed[pick] + found[pick] and printed[pick] != found[pick]
    for value in re.findall(r"\(([\d.]{8})\)", ERRATA.how[key]):
        assert value in (f"{runs(exp).mean():.6f}", f"{runs(exp).std(ddof=1):.6f}")


def test_counts_of_images_and_runs():
    assert whole("chexpert_valid", int(ERRATA.found["E6"])) and not whole("chexpert_valid", 234)
    assert whole("padchest", 1860) and not whole("padchest", 1861) and ERRATA.found["C4"] == "1,860"
    counts = RUNS.groupby("exp").seed.nunique()
    assert ERRATA.found["E7"] == "3 runs each" and {exp for exp in counts.index[counts == 3]} == {
        "1.1",
        "1.2",
    }
    assert set(counts[2:]) == {5}
    assert f"{RUNS.testset.nunique()} test sets" in ERRATA.found["E11"]


def test_referrals_add_up():
    seen = metrics.images_seen(202, (0.05, 0.1, 0.15, 0.2, 0.25), "paper")
    assert ERRATA.found["E8"] == ", ".join(f"{count / 202:.3f}" for count in seen)
    assert seen.tolist() == [10, 30, 60, 100, 150] and "10, 30, 60, 100 and 150" in ERRATA.how["E8"]


def test_the_sentences_about_3_4_and_chest_x_rays():
    ranks, elsewhere, columns = {}, {}, columns_of_tables_7_and_8()
    shown = set(table(7).exp)
    for key, values in columns.items():
        here = {exp: value for exp, value in values.items() if exp in shown}
        ranks[key] = sum(value > here["3.4"] for value in here.values()) + 1
        best = max(values, key=values.get)
        if best not in ("3.1", "3.2", "3.3", "3.4"):
            elsewhere[key] = (
                best,
                values[best],
                max(values.get(exp, -9) for exp in ("3.1", "3.2", "3.3", "3.4")),
            )
    assert {key: rank for key, rank in ranks.items() if rank > 3} == {("Subset accuracy", "0.1"): 4}
    assert ERRATA.found["E9"] == "rank 4 of 6" and len(shown) == 6
    assert columns["Subset accuracy", "0.1"]["3.4"] == 0.3168
    assert elsewhere == {
        ("FNR", "0.5"): ("3.6", -0.8897, -0.8958),
        ("Oracle AUC", "0.25"): ("3.6", 0.9993, 0.9986),
    }
    assert ERRATA.found["E10"] == "3.6: FNR 0.8897 at 0.5, Oracle AUC 0.9993 at 0.25"
    assert len(columns) - len(elsewhere) == 19


def test_what_choosing_the_best_run_adds():
    lifts, seeds = [], []
    for exp in ("1.1", "1.2", "2.1", "3.1", "3.3", "3.5", "3.7"):
        values = runs(exp, "chexpert_valid", "5")
        lifts.append(values.max() - values.mean())
        seeds.append(f"{exp} seed {values.idxmax()}")
    assert ERRATA.found["C1"].startswith(f"{min(lifts):.3f} to {max(lifts):.3f} above")
    assert ", ".join(seeds) in ERRATA.how["C1"]


def test_four_labels():
    for testset in ("vindr_test", "padchest"):
        rows = RUNS[(RUNS.testset == testset) & (RUNS.classes == "5") & (RUNS.label != "mean")]
        assert set(rows.label[rows.auc > 0]) == set(FOUR) and ERRATA.found["C2"].startswith("4 labels")
    means = {}
    for testset in ("vindr_test", "nih_test"):
        means[testset] = np.mean([runs("3.4", testset, "5", label).mean() for label in FOUR])
    printed = runs("3.4", "vindr_test", "5").mean() - runs("3.4", "nih_test", "5").mean()
    assert ERRATA.found["C3"] == f"{printed:+.4f} and {means['vindr_test'] - means['nih_test']:+.4f}"


def test_calibration_error_and_always_negative():
    y = np.array([[0], [1]] * 50)
    assert f"{metrics.calibration_error(y, y * 0.98 + 0.01, [0.5])[0, 0]:.2f} for" in ERRATA.found["C5"]
    row = table(7).query("exp == '3.4' and metric == 'Calibration error' and threshold == '0.1'").iloc[0]
    assert row.value == ERRATA.printed["C5"]
    negative = pd.read_csv(REPORTED / "table7_random_guess.csv").accuracy
    assert ERRATA.printed["C6"] == f"mean {negative.mean():.4f}"
    best = {
        metric: max(table(7).query("metric == @metric").value)
        for metric in ("Mean accuracy", "Subset accuracy")
    }
    drawn = (negative ** 2 + (1 - negative) ** 2).mean()
    assert re.findall(r"0\.\d{4}", ERRATA.how["C6"]) == [f"{drawn:.4f}", *best.values(), "0.3663"]


def test_last_digits_of_table_3_may_be_rounding():
    for exp, label, what, printed, found in (
            ("3.3", "Cardiomegaly", 0, "0.8303", "0.8304"), ("3.1", "Edema", 0, "0.7932", "0.7931"),
            ("3.1", "Edema", 1, "0.0341", "0.0342"), ("2.1", "Consolidation", 1, "0.0262", "0.0261"),
            ("3.1", "Consolidation", 1, "0.0203", "0.0204"), ("3.1", "Cardiomegaly", 1, "0.0105", "0.0104")):
        row = table(3).query("exp == @exp and label == @label").iloc[0]
        assert [row.auc_mean, row.auc_sd][what] == printed and printed in ERRATA.printed["C7"]
        assert mean_sd(runs(exp, "chexpert_valid", "5", label))[what] == found and found in ERRATA.found["C7"]
        assert abs(float(printed) - float(found)) < 1.5e-4
    wrong = [row for row in table(3).itertuples() if len(arm := runs(row.exp, row.testset, "5", row.label))
             and [row.auc_mean, row.auc_sd] != mean_sd(arm)]
    assert len(wrong) == 5


def test_test_images_in_pre_training_and_the_footnote():
    assert (
        100_000 - 75_312 - 11_212 == 13_476
        and "13,476" in ERRATA.found["C8"]
        and "86,524" in ERRATA.how["C8"]
    )
    text = pd.read_csv(REPORTED / "text_numbers.csv").set_index("id")
    on_test = float(table(4).set_index("exp").auc_a["0.1.7"])
    assert ERRATA.found["C11"] == f"{100 * (text.value['exp0.1.7_val20'] - on_test):.1f} points"


def test_shares_of_women_and_atelectasis_from_the_metadata(shared):
    entries = pd.read_csv(shared / "fixtures/nih/Data_Entry_2017_v2020.csv.gz").set_index("Image Index")
    shares = {"images": [], "patients": []}
    for part in ("train", "test"):
        names = pd.read_csv(shared / f"fixtures/nih/Xray14_{part}_official.txt.gz", header=None, sep=r"\s+")[
            0
        ]
        rows = entries.loc[names]
        shares["images"].append((rows["Patient Gender"] == "F").mean())
        shares["patients"].append((rows.groupby("Patient ID")["Patient Gender"].first() == "F").mean())
    assert [f"{100 * share:.1f}" for share in shares["images"]] == re.findall(
        r"\d+\.\d", ERRATA.printed["E13"]
    )[:2]
    assert [f"{100 * share:.1f}" for share in shares["patients"]] == re.findall(
        r"\d+\.\d", ERRATA.found["E13"]
    )[:2]
    valid = pd.read_csv(shared / "fixtures/chexpert/valid.csv")
    assert len(valid) == int(ERRATA.found["E12"])
    padchest = pd.read_csv(next((shared / "fixtures/padchest").glob("*.csv.gz")), low_memory=False)
    women = padchest.PatientSex_DICOM == "F"
    of_patients = women.groupby(padchest.PatientID).first().mean()
    assert f"{100 * of_patients:.1f} %" in ERRATA.found["E13"] and f"{100 * women.mean():.1f}" == "54.7"
    assert f"{women.sum():,} of {len(padchest):,}" in ERRATA.how["E13"]
    mentions = padchest.Labels.str.count("atelectasis").fillna(0)
    assert ERRATA.found["E14"] == f"{100 * (mentions > 0).mean():.1f} % of scans"
    assert ERRATA.printed["E14"] == f"{100 * mentions.sum() / len(padchest):.1f} % of scans"
    assert (
        f"{(mentions > 0).sum()} of" in ERRATA.how["E14"]
        and f"; {mentions.sum():.0f} are" in ERRATA.how["E14"]
    )


def test_women_of_table_10_and_boxes_of_nih_from_the_metadata(shared):
    valid = pd.read_csv(shared / "fixtures/chexpert/valid.csv")
    races = pd.read_csv(shared / "fixtures/chexpert/valid_metadata.csv")
    for rows in (valid, races):
        rows["patient"] = rows.Path.str.extract(r"(patient\d+)")[0]
    race = valid.patient.map(races.groupby("patient").race.first()).fillna("")
    images, patients = [], []
    for group in ("", "White", "Black", "Asian"):
        women = valid[race.str.contains(group)].set_index("patient").Sex == "Female"
        images.append(f"{100 * women.mean():.0f}")
        patients.append(f"{100 * women.groupby('patient').first().mean():.1f}")
    assert re.findall(r"\d+", ERRATA.printed["E4"]) == images
    assert re.findall(r"\d+\.\d", ERRATA.found["E4"]) == patients
    boxes = pd.read_csv(shared / "fixtures/nih/BBox_List_2017.csv.gz")
    assert ERRATA.found["E5"] == f"{len(boxes)} boxes on {boxes['Image Index'].nunique()} images"


def test_quotations_are_the_papers(shared):
    text = " ".join((shared / "paper.txt").read_text().split())
    quoted = re.findall(r'"([^"]+)"', " ".join(ERRATA.printed + " " + ERRATA.how))
    assert len(quoted) >= 8 and not [words for words in quoted if words not in text]


def test_every_row_is_one_of_two_kinds_and_complete():
    assert set(ERRATA.kind) == {"erratum", "caveat"} and ERRATA.index.is_unique
    assert (ERRATA[["place", "printed", "found", "how"]] != "").all(axis=None)
