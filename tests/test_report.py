"""report.py: printed numbers come out of the published runs, layouts are the paper's, the page is whole."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, assert_user_error, load_script, run_script
from PIL import Image

report = load_script("evaluate/report.py")
REPORTED = ROOT / "evaluate" / "reported"
ARMS = [f"{a}.{b}" for a, n in ((1, 2), (2, 4), (3, 8)) for b in range(1, n + 1)]


def rows_of(*rows):
    """metrics.csv as a DataFrame; a row is the first nine columns, exp to value."""
    frame = pd.DataFrame(rows, columns=report.COLUMNS[:9])
    return frame.assign(ci_low=frame["value"] - 0.01, ci_high=frame["value"] + 0.02)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The author's published runs in the form of a metrics.csv."""
    rows = []
    for r in pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"exp": str}).itertuples(index=False):
        metric, label = ("auc_mean", "") if r.label == "mean" else ("auc", r.label)
        rows += [(r.exp, r.seed, r.testset, r.classes, metric, face, label, "", r.auc)
                 for face in report.FACES]
    names = {"mean_acc": "mean_accuracy", "subset_acc": "subset_accuracy", "underdiagnosis_mean": "fnr",
             "calibration_error": "calibration_error"}
    for r in pd.read_csv(REPORTED / "raw_runs_threshold.csv", dtype={"exp": str}).itertuples(index=False):
        rows.append((r.exp, r.seed, r.testset, 5, names[r.metric], "paper", "", r.threshold, r.value))
    for r in pd.read_csv(REPORTED / "raw_runs_oracle.csv", dtype={"exp": str}).itertuples(index=False):
        rows.append((r.exp, r.seed, r.testset, 5, "oracle_auc", "paper", "", r.referred, r.oracle_auc))
    path = tmp_path_factory.mktemp("published") / "metrics.csv"
    rows_of(*rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def tables(published):
    """{number: Table} of the published runs."""
    return all_tables(report.Metrics(published))


def all_tables(metrics, dataset="chexpert_valid"):
    facts, printed = report.arm_facts(REPORTED, None, metrics.exps), report.printed_numbers(REPORTED)
    first, second = report.auc_tables, report.reliability_tables
    made = [*first(metrics, printed, facts), *second(metrics, printed, facts, dataset)]
    return {table.number: table for table in made}


def small(tmp_path, *rows):
    path = tmp_path / "metrics.csv"
    rows_of(*rows).to_csv(path, index=False)
    return path


def cells(table):
    """(row key, column head, face, Cell) of every cell."""
    return [(row.key, head, face, cell) for row in table.rows for face in table.faces
            for head, cell in zip(table.columns, row.cells[face])]


# ---------------------------------------------------------------------------- the printed numbers

KNOWN_ERRATA = {  # printed cells that the published runs contradict
    "2": {("1.1", "NIH, 14 labels"), ("1.2", "NIH, 14 labels"), ("3.1", "NIH, 14 labels")},
    "3": {("2.1", "Consolidation"), ("3.1", "Cardiomegaly"), ("3.1", "Consolidation"), ("3.1", "Edema"),
          ("3.3", "Cardiomegaly")},
    "7": set(), "8": set()}


@pytest.mark.parametrize("number, expected", [("2", 60), ("3", 35), ("7", 20), ("8", 42)])
def test_printed_numbers_are_rebuilt_digit_by_digit(tables, number, expected):
    compared, different = 0, set()
    for key, head, face, cell in cells(tables[number]):
        if face != "corrected" and cell.runs and cell.printed:
            compared += 1
            printed = f"{float(cell.printed):.4f}" + (f" ({cell.printed_sd})" if cell.printed_sd else "")
            if cell.text() != printed:
                different.add((key, head))
    assert compared == expected
    assert different == KNOWN_ERRATA[number]


def test_the_paper_face_shows_the_run_that_is_best_on_the_evaluated_images(tables):
    shown = {row.key: row.cells["paper"][0].seed for row in tables["8"].rows if row.measured()}
    assert shown == {"1.1": "2", "1.2": "2", "2.1": "0", "3.1": "21", "3.3": "11", "3.5": "100", "3.7": "0"}


def test_four_labels_carry_the_mean_where_one_has_no_positives(tables):
    row = next(row for row in tables["2"].rows if row.key == "3.4")
    cell = row.cells[tables["2"].faces[-1]][tables["2"].columns.index("VinDr test")]
    assert cell.text() == "0.9143 (0.0125)"


# ---------------------------------------------------------------------------- the arithmetic

def test_a_cell_is_mean_and_sample_sd_over_runs_with_the_averaged_interval(tmp_path):
    values = [0.81, 0.84, 0.80]
    metrics = report.Metrics(small(tmp_path, *[("3.4", s, "nih_test", 5, "auc_mean", "corrected", "", "", v)
                                               for s, v in enumerate(values)]))
    cell = metrics.cell("3.4", "nih_test", "5", "auc_mean", "corrected")
    mean = sum(values) / 3
    assert cell.value == pytest.approx(mean)
    assert cell.sd == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    assert (cell.low, cell.high) == (pytest.approx(mean - 0.01), pytest.approx(mean + 0.02))
    assert cell.lines == (2, 3, 4)


def test_the_difference_is_in_combined_standard_errors():
    cell = report.Cell(value=0.80, sd=0.03, runs=9, printed="0.77", printed_sd="0.02", printed_runs=4)
    assert cell.difference == pytest.approx(0.03 / math.sqrt(0.03 ** 2 / 9 + 0.02 ** 2 / 4))
    one = report.Cell(value=0.80, sd=0.03, runs=9, seed="0", printed="0.77")      # one run against one run
    assert one.difference == pytest.approx(0.03 / math.sqrt(2 * 0.03 ** 2))
    assert math.isnan(report.Cell(printed="0.77").difference)


def components_of(*rows):
    """components.csv as read; a row is exp, runs, ci_low, ci_high, se_runs, se_patients, on NIH, 5 labels."""
    return pd.DataFrame([(exp, "nih_test", "5", "", *rest, "our runs") for exp, *rest in rows],
                        columns=report.COMPONENTS)


def test_intervals_of_compare_replace_the_averaged_ones(tmp_path):
    path = small(tmp_path, ("3.4", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8))
    components = components_of(("3.4", "5", "0.7", "0.9", "0.01", "0.02"))
    cell = report.Metrics(path, components).cell("3.4", "nih_test", "5", "auc_mean", "corrected")
    assert (cell.low, cell.high, cell.resampled) == (0.7, 0.9, report.NESTED)


@pytest.mark.parametrize("known, words", [
    ({"3.4": "5", "2.2": "5"}, f"by {report.NESTED}"),
    ({"3.4": "5", "2.2": "1"}, f"by {report.NESTED} or by {report.ALONE} (2.2)"),
    ({"3.4": "5"}, f"by {report.NESTED} or by {report.ALONE} (2.2)"),
    ({}, f"by {report.ALONE}")])
def test_a_caption_says_whether_seeds_are_in_the_interval(tmp_path, known, words):
    rows = [(exp, s, "nih_test", 5, "auc_mean", face, "", "", 0.8) for exp in ("3.4", "2.2") for s in (0, 11)
            for face in report.FACES]
    components = components_of(*[(exp, runs, "0.7", "0.9", "", "0.02") for exp, runs in known.items()])
    metrics = report.Metrics(small(tmp_path, *rows), components if known else None)
    table = all_tables(metrics)["2"]
    assert report.intervals(table) == words
    html = report.across_hospitals(metrics, table, {}, tmp_path / "figures")
    assert f"with 95 % interval {words};" in html
    assert (f"Intervals: of AUCs (Tables 2 to 6) by {report.NESTED}" in html) == bool(known)
    assert f"by {report.ALONE}: what other seeds would change is not in them" in html


def test_the_corrected_face_names_the_run_that_validation_chose(tmp_path):
    path = small(tmp_path, *[("3.4", s, "chexpert_valid", 5, "subset_accuracy", "corrected", "", 0.3, v)
                             for s, v in ((0, 0.30), (11, 0.40))])
    cell = report.Metrics(path, chosen={"3.4": "11"}).reliability("3.4", "chexpert_valid", "subset_accuracy",
                                                                  "corrected", threshold="0.3")
    assert (cell.value, cell.chosen) == (pytest.approx(0.35), pytest.approx(0.40))


@pytest.mark.parametrize("select, chosen", [("auc", "0"), ("loss", "11"), (None, None)])
def test_validation_judges_each_run_by_the_epoch_that_was_exported(tmp_path, select, chosen):
    # seed: val_loss and val_auc of the epochs. Seed 0 has the highest AUC of all, but not where its loss is
    # lowest; of seed 11's two epochs with the lowest loss the first is exported.
    logs = {"0": [(0.5, 0.6), (0.7, 0.9), (0.6, 0.8)], "11": [(0.4, 0.7), (0.4, 0.1), (0.9, 0.75)]}
    for seed, epochs in logs.items():
        folder = tmp_path / "3.4" / "finetune" / f"seed{seed}"
        folder.mkdir(parents=True)
        lines = [{"step": step, "val_loss": loss, "val_auc": auc} for step, (loss, auc) in enumerate(epochs)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if select:
            (folder / "run.json").write_text(json.dumps({"config": {"select": select}}))
    assert report.chosen_run(report.read_logs(tmp_path)["3.4", "finetune"]) == chosen


def test_bold_is_the_best_of_a_column_with_its_ties(tmp_path):
    values = {"2.1": 0.7, "3.3": 0.80001, "3.4": 0.80003, "demo.x": 0.9}
    path = small(tmp_path, *[(exp, 0, "nih_test", 5, "auc_mean", face, "", "", v)
                             for face in report.FACES for exp, v in values.items()])
    best = [key for key, head, _, cell in cells(all_tables(report.Metrics(path))["2"]) if cell.best]
    assert best == ["3.3", "3.4"]            # the row outside the study does not compete, and has no rival


def test_lower_is_better_for_fnr(tmp_path):
    path = small(tmp_path, *[(exp, 0, "chexpert_valid", 5, "fnr", "corrected", "", 0.1, v)
                             for exp, v in (("2.2", 0.6), ("3.4", 0.4))])
    table = all_tables(report.Metrics(path))["7"]
    assert [key for key, _, _, cell in cells(table) if cell.best] == [("3.4", "FNR")]


# ---------------------------------------------------------------------------- the layouts

def test_layouts_are_the_papers(tables):
    keys = {number: [row.key for row in table.rows if row.section == report.STUDY]
            for number, table in tables.items()}
    assert keys["1"] == keys["2"] == keys["3"] == ARMS
    assert keys["4"] == [f"0.1.{n}" for n in range(1, 8)]
    assert keys["5"] == ["3.1", "0.2.2", "0.2.3", "0.2.4", "0.2.5", "3.2", "0.2.7"]
    assert keys["6"] == ["4.1.1", "4.1.2", "4.2.1", "4.2.2", "4.3.1", "4.3.2", "4.3.3"]
    assert keys["7"] == [(exp, metric) for exp in ("1.2", "2.2", "3.2", "3.4", "3.6", "3.8")
                         for metric in report.TABLE7]
    assert keys["8"] == [exp for exp in ARMS if exp not in ("2.3", "2.4")]
    assert [len(tables[n].columns) for n in "2345678"] == [6, 5, 3, 2, 3, 5, 6]
    assert tables["2"].rows[1].lead == ["1.2 (b)"] and tables["2"].rows[3].lead == ["2.2 (b)"]


def test_recipes_and_sizes_are_part_of_the_key(tmp_path):
    keys = ("0.1.1", "0.1.1b", "3.1", "3.1b", "0.2.2", "4.2.1-100k")
    path = small(tmp_path, *[(exp, 0, "nih_test", 14, "auc_mean", face, "", "", 0.5 + n / 100)
                             for face in report.FACES for n, exp in enumerate(keys)])
    tables = all_tables(report.Metrics(path))
    found = {(number, key, head): round(cell.value, 2) for number in "456"
             for key, head, _, cell in cells(tables[number]) if cell.runs}
    assert found == {("4", "0.1.1", "Fine-tuning (a)"): 0.50, ("4", "0.1.1", "Fine-tuning (b)"): 0.51,
                     ("5", "3.1", "Fine-tuned as [36]"): 0.52, ("5", "3.1", "Fine-tuned as [35]"): 0.53,
                     ("5", "0.2.2", "Fine-tuned as [35]"): 0.54, ("6", "4.2.1", "100,000"): 0.55}
    assert not report.other_rows(report.Metrics(path))


def test_missing_is_shown_as_missing_beside_the_printed_number(tables):
    text = report.markdown(tables["2"])
    assert re.search(r"\| 2\.3 \| – \| – \| – \| – \| – \| – \|\n\| printed \| 0\.7234 \(0\.0002\)", text)
    html = report.html_table(tables["2"], "metrics.csv", {})
    assert '<td class="number face missing">not measured<small>printed 0.7234 (0.0002)</small></td>' in html
    literature = next(row for row in tables["4"].rows if row.key == "0.1.7").cells["both"][2]
    assert (literature.text(), literature.small_print()["printed"]) == ("–", "0.8128")


def test_undefined_is_told_from_not_measured(tmp_path):
    rows = [("3.4", 0, "chexpert_valid", 5, "auc", face, label, "", value) for face in report.FACES
            for label, value in (("Edema", math.nan), ("Effusion", 0.8))]
    table = all_tables(report.Metrics(small(tmp_path, *rows)))["3"]
    texts = {(key, head): cell.text("not measured") for key, head, _, cell in cells(table)}
    assert texts["3.4", "Edema"] == "undefined" and texts["3.4", "Effusion"] == "0.8000"
    assert texts["3.4", "Atelectasis"] == texts["2.2", "Edema"] == "not measured"
    for text in (report.markdown(table), report.latex(table), report.READING):
        assert "undefined" in text and "not measured" in text
    assert '>undefined<' in report.html_table(table, "metrics.csv", {})


def test_a_mean_over_fewer_labels_says_so(tmp_path):
    rows = []
    for name, edema in (("vindr_test", math.nan), ("chexpert_valid", 0.7)):
        values = dict.fromkeys(report.LABELS5, 0.8) | {"Edema": edema}
        for face in report.FACES:
            rows += [("3.4", 0, name, 5, "auc", face, label, "", value) for label, value in values.items()]
            rows += [("3.4", 0, name, 5, metric, face, "", t, 0.8)
                     for metric, t in (("auc_mean", ""), ("oracle_auc", 0.1))]
        rows += [("3.4", 0, name, 5, "auc_labels", "corrected", "", "", 5 - math.isnan(edema))]
    metrics = report.Metrics(small(tmp_path, *rows))
    table = all_tables(metrics)["2"]
    assert table.note.endswith(" Means over the labels that have an AUC: VinDr test 4 labels, without Edema.")
    over = {head: cell.over for key, head, _, cell in cells(table) if cell.runs}
    assert over == {"VinDr test": "4 labels", "CheXpert vali": ""}
    assert "<small>over 4 labels</small>" in report.html_table(table, "metrics.csv", {})
    assert "| mean over |" in report.markdown(table)
    oracle = [cell.over for *_, cell in cells(all_tables(metrics, "vindr_test")["8"]) if cell.runs]
    assert oracle == ["4 labels"] * 2
    whole = report.Metrics(small(tmp_path, *[row for row in rows if row[2] != "vindr_test"]))
    assert "Means over" not in all_tables(whole)["2"].note


def test_faces_that_agree_stand_once_and_others_side_by_side(tmp_path, tables):
    rows = [("3.4", 0, "nih_test", 5, "auc_mean", face, "", "", 0.8) for face in report.FACES]
    assert all_tables(report.Metrics(small(tmp_path, *rows)))["2"].faces == ["both"]
    rows[1] = (*rows[1][:8], 0.81)
    two = all_tables(report.Metrics(small(tmp_path, *rows)))["2"]
    assert two.faces == ["paper", "corrected"]
    assert two.heads()[1] == "NIH, 14 labels, paper" and two.heads()[7] == "NIH, 14 labels, corrected"
    printed = {face: cell.printed for key, head, face, cell in cells(two)
               if (key, head) == ("3.4", "NIH, 5 labels")}
    assert printed == {"paper": "0.8198", "corrected": ""}
    assert tables["8"].faces == ["paper", "corrected"]


def test_rows_outside_the_study_have_a_section_that_comes_first_when_it_alone_is_measured(tmp_path):
    rows = [(exp, 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.7) for exp in ("demo.gmml", "c.4a")]
    table = all_tables(report.Metrics(small(tmp_path, *rows)))["2"]
    assert [name for name, _ in table.sections()] == [report.OTHER, report.STUDY]
    assert [row.key for row in table.sections()[0][1]] == ["c.4a", "demo.gmml"]


def test_tables_fall_back_on_the_test_set_there_is_and_then_show_no_printed_number(tmp_path):
    path = small(tmp_path, ("mine", 0, "my_hospital", 5, "auc", "corrected", "Edema", "", 0.7))
    table = all_tables(report.Metrics(path), "my_hospital")["3"]
    assert "my_hospital" in table.title
    assert not any(cell.printed for *_, cell in cells(table))


def test_latex_is_balanced_and_every_line_has_the_same_number_of_cells(tables):
    for table in tables.values():
        text = report.latex(table)
        assert "\\begin{tabular}" in text and text.isascii()
        depth = 0
        for sign in re.sub(r"\\[{}\\]", "", text):
            depth += {"{": 1, "}": -1}.get(sign, 0)
            assert depth >= 0
        assert depth == 0
        assert re.findall(r"\\begin\{(.*?)\}", text) == re.findall(r"\\end\{(.*?)\}", text)[::-1]
        width = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
        body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].splitlines()
        for line in body:
            assert line == "\\midrule" or line.endswith("\\\\"), line
            if line != "\\midrule" and "multicolumn" not in line:
                assert len(re.findall(r"(?<!\\)&", line)) == width - 1, line
        assert not re.search(r"(?<!\\)[%#_]", text.split("\\label")[0])


def test_markdown_lines_have_the_same_number_of_cells(tables):
    for table in tables.values():
        lines = [line for line in report.markdown(table).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
    assert "**0.8106 (0.0024)**" in report.markdown(tables["2"])


def test_every_cell_can_be_traced_to_lines_that_give_its_number(tables, published):
    lines = published.read_text().splitlines()
    traced = 0
    for number in "238":
        path = pd.read_csv(pd.io.common.StringIO(report.tidy(tables[number], "metrics.csv")), dtype=str)
        for row in path.dropna(subset=["lines"]).itertuples(index=False):
            values = [float(lines[int(n) - 1].split(",")[8]) for n in row.lines.split()]
            assert np.mean(values) == pytest.approx(float(row.value), abs=1e-6)
            assert row.source == "metrics.csv"
            traced += 1
    assert traced == 60 + 35 + 42


# ---------------------------------------------------------------------------- figures and page

# ---------------------------------------------------------------------------- what the paper does not show

def test_other_peoples_test_sets_and_labels_have_their_columns(tmp_path):
    rows = [("mine", 0, "clinic", 2, "auc_mean", face, "", "", 0.9) for face in report.FACES]
    rows += [("mine", 0, "clinic", 2, "auc", face, label, "", 0.9) for face in report.FACES
             for label in ("Stone", "Cyst")]
    made = all_tables(report.Metrics(small(tmp_path, *rows)), "clinic")
    assert made["2"].columns[-1] == "clinic" and made["3"].columns == ["Stone", "Cyst"]
    assert [cell.value for cell in made["2"].rows[-1].cells["both"]][-1] == 0.9
    assert [cell.value for cell in made["3"].rows[-1].cells["both"]] == [0.9, 0.9]


def test_subgroups_stand_in_order_with_their_gap_and_only_where_they_were_scored(tmp_path):
    values = {"auc[age=>80]": 0.6, "auc[age=<=40]": 0.9, "auc_gap[age]": 0.3, "auc[sex=M]": 0.8}
    rows = [(exp, 0, "padchest", 5, metric, "corrected", "", "", value + (exp == "2.2") / 100)
            for exp in ("2.2", "3.4") for metric, value in values.items()]
    rows += [(exp, 0, "padchest", 5, "auc_labels[age]", "corrected", "", "", 3) for exp in ("2.2", "3.4")]
    rows += [("2.2", 0, "vindr_test", 5, "auc_mean", "corrected", "", "", 0.7)]
    metrics = report.Metrics(small(tmp_path, *rows))
    table = report.subgroup_table(metrics, {})
    assert table.columns == ["sex M", "age <=40", "age >80", "age: gap"]
    assert [row.lead for row in table.rows] == [["2.2", "PadChest"], ["3.4", "PadChest"]]
    assert [[cell.best for cell in row.cells["corrected"]] for row in table.rows] == [
        [True, True, True, False], [False, False, False, True]]              # of gaps the smallest
    assert [cell.over for cell in table.rows[0].cells["corrected"]] == ["", *["3 labels"] * 3]
    assert report.subgroup_table(report.Metrics(small(tmp_path, rows[-1])), {}) is None


def test_reliability_bins_pool_all_labels(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "3.4" / "predictions" / "seed0"
    p = rng.random((400, 3)).round(3)
    y = (rng.random(p.shape) < p).astype(int)
    frame = pd.DataFrame({"path": [f"{i}.png" for i in range(400)], "patient": ""})
    frame = frame.join(pd.DataFrame(y).add_prefix("true_L")).join(pd.DataFrame(p).add_prefix("prob_L"))
    folder.mkdir(parents=True)
    frame.to_csv(folder / "here.csv", index=False)
    result = run_script("evaluate/metrics.py", folder / "here.csv", "--out", tmp_path / "metrics.csv",
                        "--bootstrap", "0")
    assert result.returncode == 0, result.stderr
    bins = report.pooled_bins(report.Metrics(tmp_path / "metrics.csv"), "here").loc["3.4", "0"]
    cell = np.ceil(p * 15).clip(1, 15).astype(int) - 1                       # closed above
    for column, weights in (("images", np.ones_like(p)), ("predicted", p), ("observed", y)):
        expected = np.bincount(cell.ravel(), weights.ravel(), 15)
        np.testing.assert_allclose(bins[column], expected, atol=1e-6)


def test_components_show_the_error_of_runs_and_of_patients_and_mark_the_larger():
    rows = [("3.4", "padchest", "5", "", "0.001", "0.02"), ("2.2", "nih_test", "14", "", "0.3", "0.1"),
            ("3.4", "padchest", "5", "Edema", "0.9", "0.9"), ("2.1", "nih_test", "14", "", "", "0.0123")]
    frame = pd.DataFrame(rows, columns="exp dataset labels label se_runs se_patients".split())
    html = report.html_components(frame)
    assert "0.0010 · <b>0.0200</b>" in html and "<b>0.3000</b> · 0.1000" in html and "0.9" not in html
    assert "<th>PadChest</th>" in html and "<th>NIH, 14 labels</th>" in html
    assert '<td class="number">– · 0.0123</td>' in html             # one run: neither is known to be larger


def test_what_runs_alone_can_tell_is_a_lower_bound():
    rows = [("nih_test", "14", "0.001", "0.002", "0.0066274", "our runs"),
            ("padchest", "5", "0.004", "", "0.0125728", "published runs"),
            ("here", "5", "", "0.004", "", "our runs")]
    html = report.html_detectable(pd.DataFrame(rows, columns=report.DETECTABLE))
    assert "<th>difference found with 80 % power</th>" in html
    assert [re.findall("<td>(.*?)</td>", row)[4] for row in html.split("<tr>")[2:]] == [
        "0.0066", "≥ 0.0126, runs alone", "–"]


def verdict(**cells):
    """verdicts.csv with one row, as read."""
    plain = dict(family="A", statement="Larger", metric="auc_mean5", testset="padchest", left="3.4",
                 right="2.2", sign="1", verdict="holds", effect="0.25", ci_low="0.1", ci_high="0.4",
                 p_holm="0.01", source="our runs", remark="")
    return pd.DataFrame([plain | cells], columns=report.VERDICTS)


@pytest.mark.parametrize("sign, words", [("1", "A: 3.4 &gt; 2.2"), ("-1", "A: 3.4 &lt; 2.2"),
                                         ("0", "A: 3.4 against 2.2")])
def test_a_claim_shows_its_direction_and_its_remark(sign, words):
    html = report.html_verdicts(verdict(sign=sign, remark="no direction; read as left > right"))
    assert f"{words}, auc_mean5" in html and "our runs<br>+0.2500 [0.1000, 0.4000]<br>p = 0.01<br>" in html
    assert "<i>no direction; read as left &gt; right</i>" in html
    assert "<i>" not in report.html_verdicts(verdict(sign=sign))


def test_a_ratio_of_spreads_is_called_one():
    spread = report.html_verdicts(verdict(left="sd(ood)", right="sd(nih_test)", effect="2.5459"))
    assert "log ratio +2.5459 [0.1000, 0.4000]<br>ratio of standard deviations 12.75" in spread
    assert "log ratio" not in report.html_verdicts(verdict())


@pytest.mark.parametrize("kind, words",
                         [("recon", "from the top"), ("attention", "each head"), ("other", "other.")])
def test_the_last_picture_of_every_pre_training_is_shown_with_its_meaning(tmp_path, kind, words):
    for exp in ("3.4", "2.3"):
        (tmp_path / exp / "pretrain").mkdir(parents=True)
        for epoch in (900, 1000, 5):
            Image.new("L", (2400, 60)).save(tmp_path / exp / "pretrain" / f"{kind}_{epoch:04}.png")
    found = list(report.pictures(tmp_path))
    assert [path.name for path, _ in found] == [f"{kind}_1000.png"] * 2
    assert all("epoch 1000" in caption and words in caption for _, caption in found)
    data = re.search("base64,([^\"]+)", report.html_picture(*found[0], widest=1200))[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1200, 30)


def test_no_two_arms_look_alike_in_the_legend_that_is_drawn(tmp_path, monkeypatch):
    looks = [report.look(n) for n in range(64)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 64
    exps = [f"mini.{n}" for n in range(20)]
    rows = [(exp, 0, "chexpert_valid", 5, "auc", "corrected", "Edema", "", 0.7) for exp in exps]
    rows += [(exp, 0, "chexpert_valid", 5, metric, "corrected", "", t, 0.4) for exp in exps
             for metric, t in (("subset_accuracy", 0.1), ("fnr", 0.1), ("oracle_auc", 0))]
    tables = all_tables(report.Metrics(small(tmp_path, *rows)))
    monkeypatch.setattr(report, "save", lambda figure, path: figure)
    figure = report.figure2(tables, report.OTHER, "corrected", {}, tmp_path / "figure2")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == exps
    drawn = [(line.get_color(), line.get_marker()) for line in legend.legend_handles]
    lines = [line.get_linestyle() for line in legend.legend_handles]
    assert len(set(drawn)) == 20 and "None" not in lines
    assert lines == [("-", "--", "-.")[n // 8] for n in range(20)]
    report.plt.close(figure)


class Balanced(HTMLParser):
    """Collects tags that are not closed and everything a page asks for."""
    def __init__(self):
        super().__init__()
        self.open, self.asked = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make_runs(folder):
    """Logs and pictures as the training scripts leave them."""
    for exp in ("3.4", "demo.gmml"):
        (folder / exp / "pretrain").mkdir(parents=True)
        steps = [json.dumps({"step": s, "epoch": s // 5, "loss": 1 / (s + 1), "lr": 1e-4, "time": s})
                 for s in range(20)]
        (folder / exp / "pretrain" / "log.jsonl").write_text("\n".join([*steps, '{"st']))
        for epoch in (2, 10):
            Image.new("L", (8, 8)).save(folder / exp / "pretrain" / f"recon_{epoch:04}.png")
        for seed, top in ((0, 0.7), (11, 0.8)):
            run = folder / exp / "finetune" / f"seed{seed}"
            run.mkdir(parents=True)
            (run / "run.json").write_text('{"config": {"select": "auc"}}')
            (run / "log.jsonl").write_text("".join(
                json.dumps({"step": e, "epoch": e, "loss": 1 - e / 9, "val_auc": top - 1 / (e + 5)}) + "\n"
                for e in range(4)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One whole call: study and demo rows, verdicts, logs, pictures, Figure 1."""
    folder = tmp_path_factory.mktemp("report")
    rows = [(exp, seed, dataset, labels, "auc_mean", face, "", "", 0.8 + seed / 1000)
            for exp in ("3.4", "2.2", "demo.gmml") for seed in (0, 11) for face in report.FACES
            for dataset, labels in report_sets()]
    rows += [(exp, seed, "chexpert_valid", 5, "auc", face, label, "", 0.7)
             for exp in ("3.4", "2.2", "demo.gmml") for seed in (0, 11) for face in report.FACES
             for label in report.LABELS5]
    rows += [(exp, seed, "chexpert_valid", 5, metric, face, "", t, 0.4) for exp in ("3.4", "2.2", "demo.gmml")
             for seed in (0, 11) for face in report.FACES for metric in report.TABLE7.values()
             for t in report.THRESHOLDS]
    rows += [("3.4", 0, "nih_test", 14, "images", "corrected", "", "", 321)]
    rows_of(*rows).to_csv(folder / "metrics.csv", index=False)
    (folder / "runs" / "3.4" / "predictions" / "seed0").mkdir(parents=True)
    (folder / "runs" / "3.4" / "predictions" / "seed0" / "nih_test.csv").write_text("path,patient\n")
    make_runs(folder / "runs")
    (folder / "out" / "figures").mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "out" / "figures" / "figure1.png")
    result = run_script("evaluate/compare.py", "--reported", "--out", folder / "published")
    assert result.returncode == 0, result.stderr
    result = run_script("evaluate/report.py", "--metrics", folder / "metrics.csv", "--out", folder / "out",
                        "--runs", folder / "runs", "--predictions", folder / "runs",
                        "--verdicts", folder / "published" / "verdicts.csv", "--note", "A <remark> of ours")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def report_sets():
    return [("nih_test", 14)] + [(name, 5) for name in report.TEST_SETS]


def test_the_page_stands_alone_and_is_well_formed(made):
    html = (made[0] / "out" / "report.html").read_text()
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert page.asked and all(value.startswith(("data:image/", "#")) for value in page.asked)
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    anchors = set(re.findall(r'href="#(\w+)"', html))
    assert anchors <= set(re.findall(r'id="(\w+)"', html))


def test_the_page_follows_light_and_dark_scrolls_and_prints(made):
    html = (made[0] / "out" / "report.html").read_text()
    assert "prefers-color-scheme:dark" in html and "@media print" in html
    assert 'name="viewport"' in html and html.count('<div class="scroll box"') >= 9
    svg = (made[0] / "out" / "figures" / "figure2_study_corrected.svg").read_text()
    assert "currentColor" in svg and report.INK not in svg and "prefers-color-scheme" in svg


def test_the_page_says_what_is_a_stand_in_and_shows_what_was_learnt(made):
    html = (made[0] / "out" / "report.html").read_text()
    assert "Stand-ins: demo.gmml" in html and "A &lt;remark&gt; of ours" in html
    assert "3.4, epoch 10: reconstruction" in html and "epoch 2:" not in html
    assert "Figure 1." in html and "Learning curves" in html and "321" in html
    assert "the print leaves out the run of seed 100" in html            # errata
    assert "✗ contradicted" in html and "published runs" in html         # verdicts
    assert "val. choice 0.4000" in html                                  # of seed 11, better on validation
    assert "≥ 0.0" in html and ", runs alone" in html                    # detectable.csv, published runs
    assert "log ratio +2.5459 [2.2804, 2.8115]<br>ratio of standard deviations 12.76" in html
    assert "(a) mean over runs, bars: sd; (b) to (d) the run with the best AUC on these images" in html
    assert f"with 95 % interval by {report.ALONE};" in html              # there are no components of our runs


def test_figures_and_tables_lie_beside_the_page(made):
    out = made[0] / "out"
    for name in ("figure2_study_paper", "figure2_study_corrected", "figure2_other_corrected", "figure3",
                 "curves", "sites"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 5000
        assert Image.open(out / "figures" / f"{name}.png").width > 800
    for number in "12345678A":
        assert all((out / "tables" / f"table{number}.{kind}").is_file() for kind in ("md", "tex", "csv"))
    files = pd.read_csv(out / "tables" / "predictions.csv", dtype=str)
    assert (files["sha256"] != "missing").sum() == 1
    assert not list(out.rglob("*.partial"))


def test_the_terminal_shows_table_2_with_the_printed_numbers(made):
    text = made[1]
    assert re.search(r"3\.4 +0\.8055 \(0\.0078\)", text) and re.search(r"printed +0\.8036 \(0\.0019\)", text)
    assert "not measured: 1.1, 1.2, 2.1, 2.3" in text


def test_the_same_numbers_give_the_same_figure(tables, tmp_path):
    for kind in ("svg", "png"):
        first, second = (report.figure3(tables["6"], tmp_path / name).with_suffix(f".{kind}").read_bytes()
                         for name in ("first", "second"))
        assert first == second


# ---------------------------------------------------------------------------- users' mistakes

def message(capsys, monkeypatch, *args):
    """What main() says to a user whose call it refuses with exit code 2."""
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        report.main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith("error: ") and "\n" not in said
    return said


@pytest.mark.parametrize("metric, label, values, words", [
    ("images", "", {"3.4,0": 40, "3.4,11": 25},
     "40 images in exp 3.4, seed 0 but 25 images in exp 3.4, seed 11"),
    ("positives", "Edema", {"2.2,0": 7, "3.4,0": 7, "3.4,11": 6},
     "7 positives of Edema in exp 2.2, seed 0 but 6 positives of Edema in exp 3.4, seed 11"),
    ("auc_labels", "", {"2.2,0": 5, "3.4,0": 4},
     "5 auc_labels in exp 2.2, seed 0 but 4 auc_labels in exp 3.4, seed 0"),
])
def test_runs_on_other_images_or_labels_are_not_averaged(tmp_path, capsys, monkeypatch, metric, label, values,
                                                         words):
    rows = [(*run.split(","), "padchest", 5, *row) for run, count in values.items()
            for row in (("auc_mean", "corrected", "", "", 0.8), (metric, "corrected", label, "", count),
                        ("positives", "corrected", "Effusion", "", 9))]
    said = message(capsys, monkeypatch, "--metrics", small(tmp_path, *rows), "--out", tmp_path / "out")
    assert f"padchest (5 labels) has {words}; predict the same" in said


def test_a_label_of_some_runs_only_is_not_averaged(tmp_path, capsys, monkeypatch):
    rows = [("3.4", seed, "padchest", 5, "positives", "corrected", label, "", 9)
            for seed, label in ((0, "Edema"), (0, "Effusion"), (11, "Effusion"))]
    said = message(capsys, monkeypatch, "--metrics", small(tmp_path, *rows), "--out", tmp_path / "out")
    assert "9 positives of Edema in exp 3.4, seed 0 but no positives of Edema in exp 3.4, seed 11" in said


def test_groups_whose_labels_are_not_told_are_refused(tmp_path, capsys, monkeypatch):
    path = small(tmp_path, ("3.4", 0, "padchest", 5, "auc_gap[sex]", "corrected", "", "", 0.1))
    said = message(capsys, monkeypatch, "--metrics", path, "--out", tmp_path / "out")
    assert "does not say over which labels" in said and "evaluate/metrics.py" in said


@pytest.mark.parametrize("text, words", [
    ("", "is no CSV table"),
    ("exp,seed\n3.4,0\n", "has no column 'dataset'"),
    (",".join(report.COLUMNS) + "\n", "no rows"),
    (",".join(report.COLUMNS) + "\n3.4,0,nih_test,5,auc_mean,paper,,,high,,\n", "line 2: value is 'high'"),
    (",".join(report.COLUMNS) + "\n" + "3.4,0,nih_test,5,auc_mean,paper,,,0.8,,\n" * 2,
     "line 3: auc_mean of exp 3.4"),
])
def test_a_bad_metrics_file_is_one_sentence(tmp_path, capsys, monkeypatch, text, words):
    (tmp_path / "metrics.csv").write_text(text)
    said = message(capsys, monkeypatch, "--metrics", tmp_path / "metrics.csv", "--out", tmp_path / "out")
    assert "metrics.csv" in said and words in said
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_sentence_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    path = small(tmp_path, ("3.4", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8))
    out = tmp_path / "out"
    (tmp_path / "half.csv").write_text("id,family\nA01,A\n")
    (tmp_path / "grid.yaml").write_text("a: [")
    (tmp_path / "runs" / "3.4" / "pretrain").mkdir(parents=True)
    (tmp_path / "runs" / "3.4" / "pretrain" / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    (tmp_path / "runs2" / "3.4" / "finetune" / "seed0").mkdir(parents=True)
    (tmp_path / "runs2" / "3.4" / "finetune" / "seed0" / "log.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "runs2" / "3.4" / "finetune" / "seed0" / "run.json").write_text("[]")
    for words, *more in (("none is no folder", "--runs", tmp_path / "none"),
                         ("none.csv does not exist", "--verdicts", tmp_path / "none.csv"),
                         ("half.csv has no column 'statement'", "--verdicts", tmp_path / "half.csv"),
                         ("grid.yaml cannot be read as YAML", "--experiments", tmp_path / "grid.yaml"),
                         ("log.jsonl line 2 is no JSON object", "--runs", tmp_path / "runs"),
                         ("run.json is no record of a run", "--runs", tmp_path / "runs2")):
        assert words in message(capsys, monkeypatch, "--metrics", path, "--out", out, *more)
    assert not out.exists()


def test_the_script_refuses_from_the_command_line_too(tmp_path):
    result = run_script("evaluate/report.py", "--metrics", tmp_path / "none.csv", "--out", tmp_path)
    assert_user_error(result, "none.csv does not exist; evaluate/metrics.py writes it")


def test_the_command_needs_no_torch(tmp_path):
    path = small(tmp_path, ("3.4", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8))
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['report.py'] + sys.argv[1:]; "
            "runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "evaluate" / "report.py", "--metrics", path,
                           "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys, monkeypatch):
    path = small(tmp_path, ("3.4", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8))
    (tmp_path / "out").write_text("a file")
    assert "cannot be written" in message(capsys, monkeypatch, "--metrics", path, "--out", tmp_path / "out")


def test_experiments_stand_in_order_of_their_numbers_then_their_words():
    names = ["mini.sit", "3.10", "mini.dino-imagenet", "4.1.1-100k", "3.9", "mini.dino", "4.1.1-50k"]
    assert sorted(names, key=report.natural) == [
        "3.9", "3.10", "4.1.1-50k", "4.1.1-100k", "mini.dino", "mini.dino-imagenet", "mini.sit"]
