"""report.py: printed numbers come out of the published runs, the first screen answers, marks and pictures."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, assert_user_error, load_script, run_here, run_script
from PIL import Image

report = load_script("evaluate/report.py")
compare = load_script("evaluate/compare.py")
metrics = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
LABELS5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
ARMS = [f"{a}.{b}" for a, n in ((1, 2), (2, 4), (3, 8)) for b in range(1, n + 1)]


def rows_of(*rows):
    """metrics.csv as a DataFrame; a row is the first nine columns, exp to value."""
    columns = "exp seed dataset labels metric variant label threshold value".split()
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(ci_low=frame["value"] - 0.01, ci_high=frame["value"] + 0.02, stand_in="")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The author's published runs in the form of a metrics.csv."""
    rows = []
    for r in pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"exp": str}).itertuples(index=False):
        metric, label, labels = ("auc_mean", "", r.classes) if r.label == "mean" else ("auc", r.label, "")
        rows += [(r.exp, r.seed, r.testset, labels, metric, face, label, "", r.auc)
                 for face in ("paper", "corrected")]
    rows = list({row[:8]: row for row in rows}.values())  # a label stands there with 5 and with 14 classes
    names = {"mean_acc": "mean_accuracy", "subset_acc": "subset_accuracy", "underdiagnosis_mean": "fnr",
             "calibration_error": "calibration_error"}
    for r in pd.read_csv(REPORTED / "raw_runs_threshold.csv", dtype={"exp": str}).itertuples(index=False):
        rows.append((r.exp, r.seed, r.testset, 5, names[r.metric], "paper", "", r.threshold, r.value))
    for r in pd.read_csv(REPORTED / "raw_runs_oracle.csv", dtype={"exp": str}).itertuples(index=False):
        rows.append((r.exp, r.seed, r.testset, 5, "oracle_auc", "paper", "", f"{r.referred:g}", r.oracle_auc))
    path = tmp_path_factory.mktemp("published") / "metrics.csv"
    rows_of(*rows).to_csv(path, index=False)
    return path


def tables_of(path, arms=None):
    """{number: cells} of the tables of a metrics.csv."""
    results = report.Results(report.read_metrics(path), arms)
    grid = report.fill_tables(results, report.table_specs(results))
    return dict(list(grid.groupby("number", sort=False)))


def small(tmp_path, *rows):
    path = tmp_path / "metrics.csv"
    rows_of(*rows).to_csv(path, index=False)
    return path


def cells(table):
    """{(arm, row's head if it has one, column): cell}."""
    found = {}
    for cell in table.to_dict("records"):
        found[tuple(filter(None, (cell["exp"], cell["head"], cell["column"])))] = cell
    return found


def drawn_figures(monkeypatch):
    """The list that the figures go to which are drawn from now on, instead of to files."""
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, *args, **kwargs: figures.append(figure))
    return figures


# ---------------------------------------------------------------------------------------- the printed numbers

KNOWN_ERRATA = {  # printed cells that the published runs contradict, in errata.csv
    "2": {("1.1", "NIH, 14 labels"), ("1.2", "NIH, 14 labels"), ("3.1", "NIH, 14 labels")},
    "3": {("2.1", "Consolidation"), ("3.1", "Cardiomegaly"), ("3.1", "Consolidation"), ("3.1", "Edema"),
          ("3.3", "Cardiomegaly")},
    "7p": set(), "8p": set()}


@pytest.mark.parametrize("number, expected", [("2", 60), ("3", 35), ("7p", 20), ("8p", 42)])
def test_printed_numbers_are_rebuilt_digit_by_digit(published, number, expected):
    compared, different = 0, set()
    for key, cell in cells(tables_of(published)[number]).items():
        if cell["text"] and cell["printed"]:
            compared += 1
            mean, *spread = cell["printed"].split(" ")
            if cell["text"] != " ".join([f"{float(mean):.4f}", *spread]):
                different.add(key)
    assert compared == expected
    assert different == KNOWN_ERRATA[number]


def test_as_printed_shows_the_run_that_is_best_on_the_evaluated_images(published):
    best = report.best_runs(report.read_metrics(published), dict.fromkeys(report.TEST_SETS, "5"))
    shown = best.xs("chexpert_valid", level="dataset").reset_index("exp").set_index("exp")["seed"].to_dict()
    assert shown == {"1.1": "2", "1.2": "2", "2.1": "0", "3.1": "21", "3.3": "11", "3.5": "100", "3.7": "0"}


# --------------------------------------------------------------------------------------------- the arithmetic

def test_a_cell_is_mean_and_sample_sd_over_runs_with_the_interval_of_compare(tmp_path):
    values = [0.81, 0.84, 0.80]
    path = small(tmp_path, *[("3.4", s, "padchest", 5, "auc_mean", "corrected", "", "", v)
                             for s, v in enumerate(values)])
    cell = cells(tables_of(path)["2"])["3.4", "PadChest"]
    assert cell["text"] == f"{np.mean(values):.4f} ({np.std(values, ddof=1):.4f})" and cell["interval"] == ""
    assert cell["printed"] == "0.8996 (0.0029)" and cell["mark"] == ""
    arms = pd.DataFrame([("3.4", "padchest", "5", "auc_mean", "", "", np.mean(values), 0.7, 0.9)],
                        columns="exp dataset labels metric label threshold value ci_low ci_high".split())
    assert cells(tables_of(path, arms)["2"])["3.4", "PadChest"]["interval"] == "[0.7000, 0.9000]"
    one = small(tmp_path, ("3.4", 0, "padchest", 5, "auc_mean", "corrected", "", "", 0.8))
    assert (
        cells(tables_of(one)["2"])["3.4", "PadChest"]["interval"] == "[0.7900, 0.8200]"
    )  # of the single run


def test_arms_csv_of_other_runs_is_refused(folder, tmp_path, monkeypatch, capsys):
    path = small(tmp_path, *[("3.4", s, "padchest", 5, "auc_mean", "corrected", "", "", 0.8) for s in (0, 1)])
    text = "exp,dataset,labels,metric,label,threshold,value,ci_low,ci_high\n"
    text += "3.4,padchest,5,auc_mean,,,{},0.7,0.9\n"
    (tmp_path / "verdicts.csv").write_text("id,testset,verdict,effect,ci_low,ci_high,source\nA,s,not run,,,,\n")
    command = ["--metrics", path, "--out", tmp_path / "out", "--verdicts", tmp_path / "verdicts.csv"]
    for wrong in (text.format(0.80002), text.format(0.8) + "3.5,padchest,5,auc_mean,,,0.8,0.7,0.9\n",
                  (folder / "published/arms.csv").read_text()):      # whose verdicts would pass for ours
        (tmp_path / "arms.csv").write_text(wrong)
        with pytest.raises(SystemExit) as stop:
            run_here(report, monkeypatch, *command)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "arms.csv beside the verdicts has a mean of exp" in error
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    (tmp_path / "arms.csv").write_text(text.format(0.800009))               # six digits are written
    run_here(report, monkeypatch, *command)
    assert "None of the claims applies to these arms." in (tmp_path / "out/report.html").read_text()


def test_printed_numbers_are_those_of_the_table_they_stand_in(tmp_path):
    rows = [("3.1", 0, "nih_test", 14, "auc_mean", "corrected", "", "", 0.8)]
    tables = tables_of(small(tmp_path, *rows))
    for number, mean, sd in (("2", "auc_mean", "auc_sd"), ("5", "auc_36", "sd_36")):
        printed = pd.read_csv(REPORTED / f"table{number}.csv", dtype=str).query("exp == '3.1'")
        if number == "2":
            printed = printed.query("testset == 'nih_test' and classes == '14'")
        expected = f"{printed[mean].item()} ({printed[sd].item()})"
        assert set(tables[number].printed) == {expected}, number


def test_figure_3_goes_from_small_to_large_and_learning_ends_with_the_first_run(tmp_path, monkeypatch):
    rows = [(f"4.1.1-{size}k", 0, "nih_test", 14, "auc_mean", "corrected", "", "", size / 1000)
            for size in (100, 250, 50)]
    grid = tables_of(small(tmp_path, *rows))["6"]
    figures = drawn_figures(monkeypatch)
    report.size_figure(grid, dict.fromkeys(grid.exp, ""), tmp_path / "x")
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [50, 100, 250]
    for seed, values in ((0, [.9, .7]), (11, [.5, .5, .6])):
        run = tmp_path / f"runs/3.4/finetune/seed{seed}"
        run.mkdir(parents=True)
        lines = [json.dumps({"epoch": epoch, "val_auc": value}) + "\n" for epoch, value in enumerate(values, 1)]
        (run / "log.jsonl").write_text("".join(lines))
    report.learning_figure(report.read_logs(tmp_path / "runs"), ["3.4"], tmp_path / "x")
    lines = [list(line.get_ydata()) for axis in figures[1].axes for line in axis.lines if len(line.get_ydata())]
    assert lines == [pytest.approx([.7, .6])]


@pytest.mark.parametrize("truths", [(-1, 0, 1), (-1, 0)])
def test_unknown_truths_are_in_no_curve(tmp_path, monkeypatch, truths):
    frame = pd.DataFrame({"path": range(60), "true_A": np.resize([0, 1], 60), "true_B": np.resize(truths, 60)})
    rng = np.random.default_rng(0)
    frame["prob_A"], frame["prob_B"] = rng.random((2, 60))
    (tmp_path / "a/predictions/seed0").mkdir(parents=True)
    frame.to_csv(tmp_path / "a/predictions/seed0/s.csv", index=False)
    figures = drawn_figures(monkeypatch)
    (tmp_path / "a/predictions/seed7").mkdir()                  # of a run that is not in metrics.csv
    frame.assign(prob_B=1 - frame.prob_B).to_csv(tmp_path / "a/predictions/seed7/s.csv", index=False)
    report.decision_figure(tmp_path, "a", ["0"], "s", tmp_path / "x")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert set(lines) == ({"A", "B"} if 1 in truths else {"A"})
    if 1 in truths:
        from sklearn.metrics import auc, roc_auc_score
        known = frame[frame.true_B >= 0]
        found = auc(*lines["B"].get_data())
        assert found == pytest.approx(roc_auc_score(known.true_B, known.prob_B))


def test_other_test_sets_show_all_their_labels_and_the_constant_answer_of_whoever_has_it(tmp_path):
    rows = [("b", 0, "mine", labels, "auc_mean", "corrected", "", "", 0.8) for labels in ("5", "all")]
    rows += [("a", 0, "other", "5", "auc_mean", "corrected", "", "", 0.8)]
    rows += [("b", 0, "mine", "", "auc", "corrected", label, "", 0.8) for label in (*LABELS5, "Fracture", "Other")]
    rows += [("b", s, "mine", "all", "always_negative_accuracy", "corrected", "", "", 0.7067) for s in (0, 1)]
    rows = rows[2:3] + rows[:2] + rows[3:]
    path = small(tmp_path, *rows)
    results = report.Results(report.read_metrics(path), None)
    assert results.labels["mine"] == "all" and results.arms == ["a", "b"]
    results.main = "mine"
    specs = {spec["number"]: spec for spec in report.table_specs(results)}
    assert len(specs["3"]["columns"]) == 7 and "mean accuracy 0.7067, subset accuracy unknown" in specs["7"]["note"]
    grid = report.fill_tables(results, specs.values())
    with pytest.MonkeyPatch.context() as patch:
        figures = drawn_figures(patch)
        report.disease_figure(results, grid, {"a": "", "b": ""}, tmp_path / "x")
    assert figures[0].axes[0].get_xlabel() == "6 of 7"


@pytest.mark.parametrize("flag", ["--baseline", "--arm"])
def test_an_arm_that_was_asked_for_has_to_be_there(tmp_path, monkeypatch, capsys, flag):
    path = small(tmp_path, ("a", 0, "s", 5, "auc_mean", "corrected", "", "", 0.8))
    with pytest.raises(SystemExit) as stop:
        run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path / "out", flag, "nosuch")
    assert stop.value.code == 2 and "has no arm 'nosuch'; known: a" in capsys.readouterr().err


def test_bold_is_the_best_with_ties_and_the_lowest_of_errors(tmp_path):
    values = {"2.1": 0.7, "3.3": 0.80001, "3.4": 0.80003}
    rows = [(exp, 0, "chexpert_valid", 5, metric, "corrected", "", t, v) for exp, v in values.items()
            for metric, t in (("auc_mean", ""), ("fnr", "0.3"), ("mean_accuracy", "0.3"), ("auprc", ""),
                              ("brier", ""),
                              ("ece", ""), ("adaptive_ece", ""), ("auc_gap[sex]", ""))]
    rows += [("2.1", 0, "chexpert_valid", 5, "auc[sex=F]", "corrected", "", "", np.nan)]
    tables = tables_of(small(tmp_path, *rows))
    def best(number):
        return {key[:-1] for key, cell in cells(tables[number]).items() if cell["best"]}
    assert best("2") == {("3.3",), ("3.4",)}
    assert {key for key, cell in cells(tables["A"]).items() if cell["best"]} == {
        ("3.3", "AUPRC"), ("3.4", "AUPRC"), ("2.1", "Brier score"), ("2.1", "ECE"), ("2.1", "Adaptive ECE")}
    assert best("B_chexpert_valid_auc") == {("2.1",)}                       # the smallest gap
    assert best("7") == {("2.1", "FNR"), ("3.3", "Mean accuracy"), ("3.4", "Mean accuracy")}


def test_arms_that_were_not_run_fill_no_table_and_undefined_is_said(tmp_path):
    rows = [("3.4", 0, "chexpert_valid", 5, "auc_mean", "corrected", "", "", 0.8)]
    rows += [("3.4", 0, "chexpert_valid", "", "auc", "corrected", label, "", value)
             for label, value in (("Edema", np.nan), ("Effusion", 0.8))]
    table = tables_of(small(tmp_path, *rows))["3"]
    assert set(table["exp"]) == {"3.4"}
    found = {head: cell["text"] for (_, head), cell in cells(table).items()}
    assert found == {"Edema": "undefined", "Effusion": "0.8000"}


def test_arms_that_saw_the_test_images_are_marked_on_nih_alone(tmp_path):
    rows = [(exp, 0, name, 5, "auc_mean", "corrected", "", "", 0.8) for exp in ("3.1", "3.2-ensemble", "3.3")
            for name in ("nih_test", "padchest")]
    table = tables_of(small(tmp_path, *rows))["2"]
    marked = {key for key, cell in cells(table).items() if cell["mark"] == "†"}
    assert marked == {("3.1", "NIH"), ("3.2-ensemble", "NIH")}


def test_net_benefit_by_hand():
    y, p = np.array([1, 1, 0, 0, 0], bool), np.array([0.9, 0.2, 0.8, 0.1, 0.1])
    found = report.net_benefit(y, p, np.array([0.2, 0.5]))
    assert found == pytest.approx([1 / 5 - 1 / 5 * 0.25, 1 / 5 - 1 / 5])
    everybody = report.net_benefit(y, np.ones(5), np.array([0.4]))
    assert everybody == pytest.approx([2 / 5 - 3 / 5 * 2 / 3])


# ----------------------------------------------------------------------------------------------- a whole page

class Page(HTMLParser):
    """Collects what a reader meets: tags with their attributes, text, and the stack of open tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, metrics.csv and verdicts of a small study with two stand-in-free arms on two test sets."""
    root, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    files = []
    for dataset, n in (("nih_test", 160), ("chexpert_valid", 120)):
        y = rng.integers(0, 2, (n, 5))
        for exp, strength in (("2.2", 0.6), ("3.4", 1.8)):
            for seed in (0, 11, 21, 42):
                p = 1 / (1 + np.exp(-(strength * (y - 0.5) + rng.normal(size=y.shape))))
                frame = pd.DataFrame({"path": range(n), "patient": np.arange(n) // 2})
                frame["sex"] = np.where(np.arange(n) % 4 < 2, "F", "M")
                for k, label in enumerate(LABELS5):
                    frame[f"true_{label}"], frame[f"prob_{label}"] = y[:, k], p[:, k].round(4)
                files.append(root / f"runs/{exp}/predictions/seed{seed}/{dataset}.csv")
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                frame.to_csv(files[-1], index=False)
    log = [
        {"step": step, "epoch": step, "loss": 1 / step, "val_auc": 0.5 + step / 100} for step in range(1, 5)
    ]
    for exp, part in (("3.4", "pretrain"), ("3.4", "finetune/seed0"), ("2.2", "finetune/seed0")):
        (root / f"runs/{exp}/{part}").mkdir(parents=True)
        lines = "".join(json.dumps(line) + "\n" for line in log)
        (root / f"runs/{exp}/{part}/log.jsonl").write_text(lines)
    for exp in ("3.4", "3.6", "4.1.1-50k", "mine"):         # on MIMIC, OCT, MIMIC and unknown data
        (root / f"runs/{exp}/pretrain").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 90).save(root / f"runs/{exp}/pretrain/recon_0004.png")
    context = pytest.MonkeyPatch()
    run_here(metrics, context, *files, "--out", root / "metrics.csv", "--bootstrap", 200, "--workers", 1)
    run_here(compare, context, "--metrics", root / "metrics.csv", "--out", root)
    run_here(compare, context, "--reported", "--out", root / "published")
    context.undo()
    return root


def make(folder, out, monkeypatch, *flags):
    """Run report.py; returns report.html, parsed."""
    run_here(
        report,
        monkeypatch,
        "--metrics",
        folder / "metrics.csv",
        "--out",
        out,
        "--runs",
        folder / "runs",
        "--predictions",
        folder / "runs",
        "--verdicts",
        folder / "verdicts.csv",
        folder / "published/verdicts.csv",
        *flags,
    )
    return Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """(folder of the outputs, report.html parsed) without flags."""
    out, context = tmp_path_factory.mktemp("report"), pytest.MonkeyPatch()
    page = make(folder, out, context)
    context.undo()
    return out, page


def test_the_first_screen_answers(folder, made):
    _, page = made
    text = " ".join(" ".join(page.text).split())
    first = text[:text.index("Test sets Claims")]
    assert "Does domain-specific pre-training make sense?" in first and "2 arms, 8 models" in first
    assert "No data are marked as stand-ins" in first
    verdict = pd.read_csv(folder / "verdicts.csv", dtype=str, keep_default_na=False).query(
        "id == 'A1' and testset == 'nih_test'").iloc[0]
    assert verdict.verdict == "holds"
    sentence = "GMML on chest X-rays (MIMIC, from ImageNet) beats ImageNet weights alone: "
    effect = f"NIH {float(verdict.effect):+.3f} [{float(verdict.ci_low):.3f}, {float(verdict.ci_high):.3f}]"
    assert sentence in first and effect in first
    assert "; 95 % intervals, each by itself." in first and "over runs and patients" not in first        # not known of one run
    sources = [dict(attributes) for tag, attributes in page.tags if tag == "img"]
    assert [image.get("class") for image in sources[:2]] == ["wide", "narrow"] and all(
        i["alt"] for i in sources
    )


def test_the_first_figure_is_the_difference_to_the_baseline(folder):
    pairs = pd.read_csv(folder / "comparisons.csv", dtype={"labels": str})
    labels = {"nih_test": "5", "chexpert_valid": "5"}
    found = report.differences(pairs, "2.2", labels).query("exp == '3.4' and dataset == 'nih_test'")
    runs = pd.read_csv(folder / "metrics.csv").query(
        "metric == 'auc_mean' and variant == 'corrected' and dataset == 'nih_test'"
    )
    means = runs.groupby("exp").value.mean()
    (effect, low, high), = found[["effect", "ci_low", "ci_high"]].to_numpy()
    assert effect == pytest.approx(means["3.4"] - means["2.2"], abs=1e-5) and low < effect < high
    turned = report.differences(pairs, "3.4", {"nih_test": "5"}).query("exp == '2.2'")
    turned = turned[["effect", "ci_low", "ci_high"]].to_numpy()
    assert turned == pytest.approx(np.array([[-effect, -high, -low]]))


def test_the_page_is_whole_and_a_screen_reader_finds_its_headers(made):
    _, page = made
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == tags.count("main") == 1 and ("html", {"lang": "en"}) in page.tags
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert tags.count("table") == tags.count("caption") > 8
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    links = {
        attributes["href"][1:] for tag, attributes in page.tags if tag == "a" and attributes["href"][0] == "#"
    }
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert links <= set(ids) and len(set(ids)) == len(ids)
    assert ids == ["sites", "claims", "diseases", "thresholds", "calibration", "groups", "size", "learning",
                   "errata", "overlap", "detectable", "sources"]
    text = " ".join(page.text)
    assert "Standard error, runs" in text and not re.search("se_runs|(every|no_winner) ,", text)     # for readers
    outside = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href") and not value.startswith(("data:", "#")) and value != "printed.html"
    ]
    assert not outside                                                          # one file, to be passed on
    text = " ".join(" ".join(page.text).split())
    assert "Not run: 1.1, 1.2, 2.1, 2.3, 2.4, 3.1, 3.2" in text
    for words in (
        "FNR (underdiagnosis) at 0.5 by group",
        "sex F",
        "sex: gap",
        "3.4-ensemble",
        "at random",
    ):
        assert words in text, words
    assert "{{" not in text and "{%" not in text and "nan" not in re.findall(r"\bnan\b", text)


def test_the_printed_tables_have_a_page_of_their_own(made):
    printed = Page((made[0] / "printed.html").read_text())
    text = " ".join(" ".join(printed.text).split())
    for number in range(1, 14):
        assert f"Table {number} " in text
    assert "0.9143" in text and "rank 3 of 5" in text and "seeds only" in text and printed.open == []


def test_stand_ins_are_marked_at_every_number_and_have_no_printed_one(folder, tmp_path, monkeypatch):
    frame = pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)
    frame.loc[frame.dataset == "nih_test", "stand_in"] = "drawn by data_prep/demo.py"
    frame.to_csv(tmp_path / "metrics.csv", index=False)
    for table in tables_of(tmp_path / "metrics.csv").values():
        for cell in table.to_dict("records"):
            drawn = cell["dataset"] == "nih_test"
            assert ("°" in cell["mark"]) == drawn
            assert not (drawn and cell["printed"])
    for name in ("verdicts", "arms", "comparisons", "detectable"):
        (tmp_path / f"{name}.csv").write_bytes((folder / f"{name}.csv").read_bytes())
    run_here(report, monkeypatch, "--metrics", tmp_path / "metrics.csv", "--out", tmp_path / "out",
             "--verdicts", tmp_path / "verdicts.csv", "--runs", folder / "runs")
    html = (tmp_path / "out/report.html").read_text()
    assert "3.6: recon" in html and "3.4: recon" not in html        # its test set is drawn, its own images are not
    packs = {"3.4": "mimic_cxr", "4.1.1-50k": "mimic_cxr_supervised", "3.6": "oct"}
    for pack, mark in (("mimic_cxr", "drawn by data_prep/demo.py"), ("mimic_cxr_supervised", None)):
        (tmp_path / pack).mkdir()
        (tmp_path / pack / "pack.json").write_text(json.dumps({"stand_in": mark}, indent=1))
    for data, drawn in ((tmp_path, ["3.4: recon"]), (None, []), (tmp_path / "nowhere", [])):
        marked = report.packs_with(b'"stand_in": "', data, "pack.json")
        shown, left_out = report.pictures(folder / "runs", packs, marked, False)
        assert [caption for caption, _ in shown] == [*drawn, "3.6: recon"]
        assert left_out == ["3.4", "4.1.1-50k", "mine"][len(drawn):]
    text = " ".join(" ".join(Page(html).text).split())
    assert "° Stand-in data: drawn by data_prep/demo.py" in text and "Verdicts on our runs°" in text
    assert "\u2060°" in html and not re.search(r"\d\)?(</b>)?°", html)      # no line may end before a mark
    answers = re.findall(r"<li>(.*?)</li>", html, re.S)
    assert answers and all("°" in answer for answer in answers)
    table = pd.read_csv(tmp_path / "out/tables/table2.csv", dtype=str)
    assert table["NIH"].str.contains("°").all() and not table["CheXpert valid"].str.contains("°").any()


def test_the_mark_of_pre_training_on_test_images_stands_at_every_row_that_had_them():
    names, packs = report.read_experiments(report.HERE.parent / "experiments.yaml", [])
    saw = {exp for exp, pack in packs.items() if pack == "nih_pretrain" and not exp.startswith("miniature")}
    assert saw == set(report.SHOWN["saw NIH test"]) > {"3.1", "3.2", "0.1.7"}


def test_marks_of_drawn_and_of_seen_images_stand_together(folder, tmp_path):
    """Of two runs one is on stand-ins: its mark may not hide behind the other."""
    frame = pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)
    frame = frame[(frame.exp == "3.4") & (frame.dataset == "nih_test")].assign(exp="3.1")
    frame.loc[frame.seed == frame.seed.max(), "stand_in"] = "drawn by data_prep/demo.py"
    frame.to_csv(tmp_path / "metrics.csv", index=False)
    cells = report.mean_over_runs(report.read_metrics(tmp_path / "metrics.csv"))
    assert set(cells.mark[cells.runs > 1]) == {"†°"}


def test_an_answer_over_all_test_sets_is_the_verdict_over_all():
    """"Nobody wins everywhere" holds because some test sets contradict that somebody does."""
    loader = report.jinja2.FileSystemLoader(report.HERE)
    parts = report.jinja2.Environment(loader=loader).get_template("report.parts.html")
    parts = parts.make_module({"results": None, "set_names": {"nih_test": "NIH", "vindr_test": "VinDr"}})
    row = {"statement": "Nobody wins", "effect": "", "verdict": "contradicted"}
    for test, said in (("no_winner", "holds over 2 test sets"), ("greater", "contradicted on 2 of 2 test sets")):
        over_all = report.pd.Series({**row, "verdict": "holds", "test": test})
        answer = parts.answer({"all": over_all, "nih_test": row, "vindr_test": row})
        assert said in " ".join(re.sub("<.*?>", "", answer).split()), answer


def test_an_answer_has_its_remark_and_the_colour_of_its_word():
    loader = report.jinja2.FileSystemLoader(report.HERE)
    parts = report.jinja2.Environment(loader=loader).get_template("report.parts.html")
    parts = parts.make_module({"results": None, "set_names": {"nih_test": "NIH"}})
    row = {"statement": "s", "effect": "-0.0001", "ci_low": "-0.0002", "ci_high": "0.2", "verdict": "holds",
           "test": "greater", "p": "4e-108", "p_holm": "4e-107", "remark": "an arm has one run", "ours": "1", "place": "0.A.6",
           "left": "", "right": "", "metric": "auc"}
    claim = {"all": report.pd.Series({**row, "verdict": "undecided"}), "nih_test": row}
    answer = parts.answer(claim)
    assert '<b class="holds">holds on NIH</b>' in answer and "(an arm has one run)." in answer
    assert "NIH +0.000 [0.000, 0.200]" in answer
    claims = {"J4": {"all": row}, "J1": {"all": row | {"ours": "0"}}}
    table = " ".join(parts.claim_table("c", claims, {}).split())
    assert "J4, ours:" in table and "J1, section 0.A.6:" in table and "p < 0.0001" in table
    named = row | {"decided_by": "a - b, nih_test"}         # over all it is that of one test set
    table = parts.claim_table("c", {"J4": {"all": named, "nih_test": named}}, {})
    assert table.count("a - b, nih_test") == 1


def test_a_gap_is_the_mean_of_the_gaps_of_labels(folder):
    table = cells(tables_of(folder / "metrics.csv")["B_nih_test_auc"])
    gaps = []
    for file in folder.glob("runs/3.4/predictions/*/nih_test.csv"):
        frame = pd.read_csv(file)
        for label in LABELS5:
            both = [metrics.auc(own[f"true_{label}"], own[f"prob_{label}"]) for _, own in frame.groupby("sex")]
            gaps.append(abs(both[0] - both[1]))
    assert table["3.4", "sex: gap"]["value"] == pytest.approx(np.mean(gaps))
    assert "of each label from its worst to its best group" in " ".join(report.SHOWN["groups"][0]["note"].split())


def test_learning_curves_are_means_of_each_run_before_they_are_compared(tmp_path, monkeypatch):
    for seed, losses in ((0, [[4, 2], [1]]), (11, [[5, 3], [2]])):                 # by epoch, several lines each
        run = tmp_path / f"runs/3.4/finetune/seed{seed}"
        run.mkdir(parents=True)
        (run / "log.jsonl").write_text("".join(
            json.dumps({"epoch": epoch, "loss": loss}) + "\n" for epoch, own in enumerate(losses, 1) for loss in own)
            + '{"epoch": 2, "loss": "abc"}\n{"epoch": 2, "lo')
    figures = drawn_figures(monkeypatch)
    report.learning_figure(report.read_logs(tmp_path / "runs"), ["3.4"], tmp_path / "learning")
    lines = [line for axis in figures[0].axes for line in axis.lines]
    assert [list(line.get_ydata()) for line in lines if len(line.get_ydata())] == [[3.5, 1.5]]
    band = next(axis.collections[0].get_paths()[0].vertices for axis in figures[0].axes
                if axis.lines and len(axis.lines[0].get_ydata()))
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 4)                       # of runs, not of lines


def test_pictures_of_credentialed_data_only_if_asked_for_and_titles_are_text(
    folder, made, tmp_path, monkeypatch
):
    asked = make(folder, tmp_path, monkeypatch, "--with-pictures", "--title", "<script>alert(1)</script>")
    assert "script" not in [tag for tag, _ in asked.tags]
    assert "<script>alert(1)</script>" in " ".join(asked.text)
    for page, shown in ((made[1], False), (asked, True)):
        alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
        text = " ".join(" ".join(page.text).split())
        assert "3.6: recon" in alts
        for exp in ("3.4", "4.1.1-50k", "mine"):
            assert (f"{exp}: recon" in alts) == shown
        assert ("must not be passed on: 3.4, 4.1.1-50k, mine; --with-pictures embeds them" in text) != shown


def test_tables_are_written_for_spreadsheets_and_latex(made):
    tmp_path, _ = made
    table = pd.read_csv(tmp_path / "tables/table2.csv", dtype=str)
    assert table.columns[:3].tolist() == ["Arm", "NIH", "CheXpert valid"]
    text = (tmp_path / "tables/table8p.tex").read_text()
    assert all(
        part in text
        for part in (r"\begin{tabular}", r"\toprule", r"\bottomrule", "3.4", r"\label{tab:table8p}")
    )
    figures = {path.name for path in (tmp_path / "figures").glob("*.svg")}
    assert figures == {"differences_wide.svg", "differences_narrow.svg", "figure2.svg", "reliability.svg",
                       "curves.svg", "learning.svg"}
    assert "prefers-color-scheme:dark" in (tmp_path / "figures/figure2.svg").read_text()


def test_reliability_bins_are_pooled_over_labels_and_runs(folder):
    results = report.Results(report.read_metrics(folder / "metrics.csv"), None)
    bins = report.pooled_bins(results).loc["3.4"]
    frames = [pd.read_csv(file) for file in folder.glob("runs/3.4/predictions/*/chexpert_valid.csv")]
    p = np.concatenate([frame[[f"prob_{label}" for label in LABELS5]].to_numpy().ravel() for frame in frames])
    y = np.concatenate([frame[[f"true_{label}" for label in LABELS5]].to_numpy().ravel() for frame in frames])
    inside = (p > 7 / 15) & (p <= 8 / 15)
    row = bins.iloc[np.argmin(np.abs(bins.index - 7 / 15))]
    assert len(frames) == 4 and row.images == inside.sum()
    assert row.predicted == pytest.approx(p[inside].mean())
    assert row.observed == pytest.approx(y[inside].mean())


def test_somebody_elses_labels_and_test_set_make_a_page_too(tmp_path, monkeypatch):
    rng, y = np.random.default_rng(0), np.arange(60) % 2
    for name in ("a", "b"):
        frame = pd.DataFrame(
            {"path": range(60), "patient": "", "true_Lesion": y, "prob_Lesion": rng.random(60)}
        )
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    run_here(metrics, monkeypatch, tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "metrics.csv",
             "--bootstrap", 50, "--workers", 1)
    run_here(report, monkeypatch, "--metrics", tmp_path / "metrics.csv", "--out", tmp_path / "out")
    text = " ".join(Page((tmp_path / "out/report.html").read_text()).text)
    assert "Lesion" in text and "No verdicts: run evaluate/compare.py" in text
    assert "2 arms, 2 models, tested on" in " ".join(text.split()) and "fine-tuned on NIH" not in text


def test_published_aucs_alone_make_a_page(published, tmp_path, monkeypatch):
    run_here(report, monkeypatch, "--metrics", published, "--out", tmp_path)
    assert "GMML on OCT from random" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "figures/reliability.svg").exists()


def test_images_that_pretraining_and_test_packs_share_are_named(tmp_path, monkeypatch):
    metrics_csv = small(tmp_path, *((exp, 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8)
                                    for exp in ("2.2", "3.4", "3.1")))

    def page(**files):
        for name, rows in files.items():
            (tmp_path / name).write_text("pack,other,images,other_images,equal,near\n" + rows)
        run_here(report, monkeypatch, "--metrics", metrics_csv, "--out", tmp_path, "--overlaps",
                 *(tmp_path / name for name in files))
        text = Page((tmp_path / "report.html").read_text()).text
        return " ".join(" ".join(text).split()).split("Test sets Claims")
    mimic = ("data/mimic_cxr,data/nih:test,250000,25596,1200,34\n"
             "data/mimic_cxr,data/chexpert:val,250000,202,0,0\n")
    oct_ = "data/oct,data/nih:test,100000,25596,0,0\n"
    first, rest = page(a=mimic, b=oct_)
    sentence = "among the pre-training images: 1,234 of data/mimic_cxr are in data/nih:test. Which arms"
    assert sentence in first and "data/oct" not in first and "chexpert" not in first
    assert "data/mimic_cxr 250000 data/nih:test 1200 34 3.4 data" in rest        # 3.4 alone was made from it
    assert "data/oct 100000 data/nih:test 0 0" in rest
    assert "among the pre-training images" not in page(b=oct_)[0]
    with pytest.raises(SystemExit) as stop:
        page(b="data/oct,data/nih:test,100000,25596,some,0\n")
    assert stop.value.code == 2


def test_an_arm_fine_tuned_from_another_rows_weights_has_its_data():
    expected = {"3.4": "mimic_cxr", "3.1b": "nih_pretrain", "2.2": "", "4.1.1-50k": "mimic_cxr", "mine": ""}
    names, packs = report.read_experiments(ROOT / "experiments.yaml", expected)
    assert {name: packs[name] for name in expected} == expected
    assert names["3.4"] == "GMML on MIMIC from ImageNet" and names["mine"] == ""


def test_figures_of_many_arms_draw_those_whose_lines_can_be_told_apart(tmp_path, monkeypatch):
    arms = [*ARMS, "0.1.1", "0.1.1b", "0.1.2", "0.1.2b"]
    rows = [(arm, 0, "chexpert_valid", "", "auc", "corrected", label, "", 0.8) for arm in arms
            for label in LABELS5]
    rows += [(arm, 0, "chexpert_valid", 5, "auc_mean", "corrected", "", "", 0.8) for arm in arms]
    path = small(tmp_path, *rows)
    for arm in (*arms, "parent"):
        (tmp_path / f"runs/{arm}/finetune/seed0").mkdir(parents=True)
        (tmp_path / f"runs/{arm}/finetune/seed0/log.jsonl").write_text('{"epoch": 1, "loss": 1}\n')
    results, figures = report.Results(report.read_metrics(path), None), drawn_figures(monkeypatch)
    grid = report.fill_tables(results, report.table_specs(results))
    report.disease_figure(results, grid, dict.fromkeys(arms, ""), tmp_path)
    logs = report.read_logs(tmp_path / "runs")
    report.learning_figure(logs, arms, tmp_path)
    report.learning_figure(logs[logs.exp.isin(["parent", "3.4", "1.1"])], arms, tmp_path)
    for figure, expected in zip(figures, (arms[:16], arms[:16], ["1.1", "3.4", "parent"]), strict=True):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        assert [label.strip() for label in labels] == expected
        lines = [getattr(handle, "lines", [handle])[0] for handle in handles]   # of an error bar or a line
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(expected)
    monkeypatch.undo()
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path / "out", "--runs", tmp_path / "runs")
    text = " ".join(Page((tmp_path / "out/report.html").read_text()).text)
    assert "on CheXpert valid, the first 16 of 18 arms." in text and "at most 16 arms" in text


def test_a_figure_without_data_is_left_out(tmp_path, monkeypatch):
    path = small(tmp_path, ("a", 0, "mine", "all", "auc_mean", "corrected", "", "", 0.8))
    (tmp_path / "runs/a/other").mkdir(parents=True)
    (tmp_path / "runs/a/other/log.jsonl").write_text('{"epoch": 1, "loss": 1, "val_auc": 0.5}\n')
    head = "dataset,labels,metric,left,right,effect,ci_low,ci_high\n"          # compared without a
    (tmp_path / "comparisons.csv").write_text(head + "mine,all,auc_mean,b,c,0.1,0,0.2\n")
    (tmp_path / "verdicts.csv").write_text("id,testset,verdict,effect,ci_low,ci_high,source\nA,s,not run,,,,\n")
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path / "out", "--runs", tmp_path / "runs",
             "--verdicts", tmp_path / "verdicts.csv")
    assert not (tmp_path / "out/figures").exists()


def test_predictions_that_cannot_be_drawn_are_said(tmp_path, monkeypatch):
    """No files of the arm; none with probabilities; a label whose name has "true_" in it is one as others."""
    path = small(tmp_path, ("a", 0, "s", "all", "auc_mean", "corrected", "", "", 0.8))
    file = tmp_path / "a/predictions/seed0/s.csv"
    command = ["--metrics", path, "--out", tmp_path / "out", "--predictions", tmp_path]
    frame = pd.DataFrame({"path": range(8), "true_not_true_x": np.arange(8) % 2})
    for written, drawn in ((None, False), (frame, False), (frame.assign(prob_not_true_x=0.3), True)):
        if written is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            written.to_csv(file, index=False)
        run_here(report, monkeypatch, *command)
        text = " ".join(" ".join(Page((tmp_path / "out/report.html").read_text()).text).split())
        assert ("No curves: no true_ and prob_ columns of a on s" in text) != drawn
        caption = "decision curves of a on s, mean probability of its runs, the last a mean over labels"
        assert (caption in text) == drawn


def test_an_arms_rows_stay_beside_its_name_however_many_test_sets(tmp_path, monkeypatch):
    sets = [f"set{k}" for k in range(10)]
    path = small(tmp_path, *((arm, 0, name, "all", "auc_mean", "corrected", "", "", 0.8)
                             for arm in "abc" for name in sets))
    results, figures = report.Results(report.read_metrics(path), None), drawn_figures(monkeypatch)
    found = pd.DataFrame([(arm, name, 0.0, -0.1, 0.1) for arm in "bc" for name in sets],
                         columns=["exp", "dataset", "effect", "ci_low", "ci_high"])
    report.difference_figure(found, results, dict.fromkeys("abc", ""), "a", tmp_path, True)
    rows = [container.lines[0].get_ydata() for container in figures[0].axes[0].containers]
    assert len(rows) == 10 and all(list(row.astype(float).round()) == [0, 1] for row in rows)


@pytest.mark.filterwarnings("error::UserWarning")               # matplotlib's, of axes that leave no room
def test_long_names_of_arms_leave_room_for_the_narrow_figure(tmp_path, monkeypatch):
    arms = ["a", "ConvNeXt-Base pretrained on our 2.3M images", "resnet50_imagenet1k_v2_seed_avg_long_underscores"]
    path = small(tmp_path, *((arm, 0, "s", "all", "auc_mean", "corrected", "", "", 0.8) for arm in arms))
    results = report.Results(report.read_metrics(path), None)
    found = pd.DataFrame([(arm, "s", 0.0, -0.1, 0.1) for arm in arms[1:]],
                         columns=["exp", "dataset", "effect", "ci_low", "ci_high"])
    for kind in ("wide", "narrow"):
        report.difference_figure(found, results, dict.fromkeys(arms, ""), "a", tmp_path / kind, kind == "narrow")
    width = Image.open(tmp_path / "narrow.png").width / 160
    assert 3.5 < width < 4.5                                    # inches


def test_the_name_of_a_group_does_not_decide_what_is_best(tmp_path):
    rows = [(arm, 0, "s", "all", metric, "corrected", "", "", value) for arm, value in (("a", .7), ("b", .8))
            for metric in ("auc_mean", "auc[race=Singaporean]", "ece[race=Singaporean]")]
    tables = tables_of(small(tmp_path, *rows))
    best = {number: set(table.exp[table.best]) for number, table in tables.items()}
    assert best["B_s_auc"] == {"b"} and best["B_s_ece"] == {"a"}


def test_the_first_screen_of_ones_own_arms_has_their_differences(tmp_path, monkeypatch):
    path = small(tmp_path, *[(arm, 0, "s", "all", "auc_mean", "corrected", "", "", 0.8) for arm in ("a", "b")])
    (tmp_path / "verdicts.csv").write_text("id,testset,verdict,effect,ci_low,ci_high,source\nA,s,not run,,,,\n")
    (tmp_path / "comparisons.csv").write_text("dataset,labels,metric,label,left,right,effect,ci_low,ci_high\n"
        "s,all,auc_mean,,a,b,-0.0304,-0.05,0.01\ns,14,auc_mean,,a,b,0.2,0.1,0.3\n")       # 14: not shown here
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path, "--verdicts", tmp_path / "verdicts.csv")
    html = (tmp_path / "report.html").read_text()
    answers = re.search(r'<ul class="answers">(.*?)</ul>', html, re.S)[1]
    assert re.findall(r"<li>(.*?)</li>", answers) == ["b less a on s: +0.030 [−0.010, 0.050]."]
    assert "Undecided: p after Holm" not in html


def test_a_test_set_of_ones_own_may_be_called_validation_and_that_of_the_thresholds_is_none(tmp_path, monkeypatch):
    names = "nih_val", "external_val", "nih_test"
    path = small(tmp_path, *[(arm, 0, name, "all", "auc_mean", "corrected", "", "", 0.8)
                             for arm in "ab" for name in names])
    pairs = [f"{name},all,auc_mean,,a,b,-0.03,-0.05,0.01\n" for name in names]
    (tmp_path / "comparisons.csv").write_text("dataset,labels,metric,label,left,right,effect,ci_low,ci_high\n" + "".join(pairs))
    (tmp_path / "verdicts.csv").write_text("id,testset,verdict,effect,ci_low,ci_high,source\nA,s,not run,,,,\n")
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path, "--verdicts", tmp_path / "verdicts.csv")
    html = (tmp_path / "report.html").read_text()
    answers = re.search(r'<ul class="answers">(.*?)</ul>', html, re.S)[1]
    assert re.findall(r"<li>b less a on (.*?):", answers) == ["external_val", "NIH"]
    assert (tmp_path / "tables/table2.csv").read_text().startswith("Arm,NIH,external_val\n")


def test_figures_show_the_names_of_labels_as_they_are(tmp_path, monkeypatch):
    labels = ["$x_1$", "5 $ \\foo $", "a long name of a finding"]
    path = small(tmp_path, *[("a", 0, "s", "", "auc", "corrected", label, "", 0.8) for label in labels],
                 ("a", 0, "s", "all", "auc_mean", "corrected", "", "", 0.8))
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path)
    assert all(label in (tmp_path / "figures/figure2.svg").read_text() for label in labels)     # in its comments
    results, figures = report.Results(report.read_metrics(path), None), drawn_figures(monkeypatch)
    report.disease_figure(results, report.fill_tables(results, report.table_specs(results)), {"a": ""}, tmp_path)
    ticks = figures[0].axes[0].get_xticklabels()
    assert [tick.get_rotation() for tick in ticks] == [15] * 3              # long ones would run into each other


def test_a_drawn_validation_split_is_said(tmp_path, monkeypatch):
    path = small(tmp_path, ("2.1", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8))
    for name, fallback in (("nih", True), ("nih_pretrain", False)):
        (tmp_path / "data" / name).mkdir(parents=True)
        facts = {"dataset": "nih", "fallback_split": fallback}                  # as data_prep/nih.py writes it
        (tmp_path / "data" / name / "index.json").write_text(json.dumps(facts, indent=1))
    for data, said in ((["--data", tmp_path / "data"], True), ([], False)):
        run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path, *data)
        text = " ".join(" ".join(Page((tmp_path / "report.html").read_text()).text).split())
        assert ("by a seeded draw of patients, as the lists of the study are not there: nih." in text) == said


@pytest.mark.parametrize("mark, drawn", [("drawn by data_prep/demo.py", True), ("another split", False)])
def test_only_of_drawings_it_is_said_that_they_tell_nothing_of_the_truth(tmp_path, monkeypatch, mark, drawn):
    path = tmp_path / "metrics.csv"
    row = ("2.1", 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8)
    rows_of(row).assign(stand_in=mark).to_csv(path, index=False)
    run_here(report, monkeypatch, "--metrics", path, "--out", tmp_path)
    text = " ".join(" ".join(Page((tmp_path / "report.html").read_text()).text).split())
    assert f"° Stand-in data: {mark}." in text and ("not what is true" in text) == drawn


def test_latex_takes_the_names_of_test_sets_and_groups(tmp_path, monkeypatch):
    rows = [("a", 0, "my_set & 50%", "all", metric, "corrected", "", "", 0.8)
            for metric in ("auc_mean", "auc[age=<=40]", "auc[age=>80]")]
    run_here(report, monkeypatch, "--metrics", small(tmp_path, *rows), "--out", tmp_path)
    text = (tmp_path / "tables/tableB_my_set & 50%_auc.tex").read_text()
    assert r"\caption{AUC by group, my\_set \& 50\%}" in text
    assert "age $<$=40" in text and "age $>$80" in text     # bare they are set as "¡" and "¿"


def test_one_arm_and_one_model_of_somebody_are_no_plural_and_no_part_of_the_study(tmp_path, monkeypatch):
    def page(*exps):
        rows = [(exp, 0, "nih_test", 5, "auc_mean", "corrected", "", "", 0.8) for exp in exps]
        run_here(report, monkeypatch, "--metrics", small(tmp_path, *rows), "--out", tmp_path)
        return " ".join(" ".join(Page((tmp_path / "report.html").read_text()).text).split())
    mine, study = page("mine"), page("2.1", "2.2")
    assert " 1 arm, 1 model, tested on NIH" in mine and "Not run" not in mine
    assert "NIH is in distribution" in study and "NIH is in distribution" not in mine
    assert " 2 arms, 2 models fine-tuned" in study and "Not run: 1.1, 1.2, 2.3" in study


def test_in_print_a_table_keeps_its_title_and_note_together():
    printed = (ROOT / "evaluate/report.css").read_text().split("@media print")[1]
    names = re.search(r"([^{}]+)\{break-inside:avoid\}", printed)[1]
    assert {"tr", "caption", "figure"} == set(names.strip().split(","))


def test_a_long_name_is_broken_and_not_written_over_the_numbers_beside_it():
    """Rows' heads have a greatest width, and a name with underscores is one word."""
    css = (ROOT / "evaluate/report.css").read_text()
    assert re.search(r"tbody th\{[^}]*max-width", css)
    assert re.search(r"\nbody\{[^}]*overflow-wrap:break-word", css)


def test_the_note_of_a_wide_table_ends_at_the_edge_of_a_telephone():
    css = (ROOT / "evaluate/report.css").read_text()
    assert re.search(r"\ncaption\{[^}]*max-width:[^}]*100vw", css)


def luminance(colour):
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = np.array([int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_contrast_in_light_dark_and_print():
    css = (ROOT / "evaluate/report.css").read_text()
    blocks = re.findall(r":root\{.*?\}", css, re.S)
    light, dark, printed = [dict(re.findall(r"--(\w+):(#\w+)", block)) for block in blocks]
    words = {"ink", "soft", "link", "holds", "contradicted", "undecided"}
    assert words | {"paper", "tint", "line"} == set(light) == set(dark)
    for colours in (light, dark, light | printed):
        for name in words:
            for ground in ("paper", "tint"):
                darker, lighter = sorted(luminance(colours[key]) for key in (name, ground))
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (name, ground)


def test_mistakes_are_one_sentence(tmp_path):
    result = run_script("evaluate/report.py", "--metrics", tmp_path / "none.csv", "--out", tmp_path / "out")
    assert_user_error(result, "none.csv does not exist")
    assert not (tmp_path / "out").exists()


def test_a_locale_of_another_encoding_changes_nothing(tmp_path):
    flags = "--metrics", tmp_path / "none.csv", "--out", tmp_path / "out"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert_user_error(run_script("evaluate/report.py", *flags, **ascii_locale), "none.csv does not exist")
