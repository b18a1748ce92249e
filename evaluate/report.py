"""Put the study on one page: what was asked, what was run and the answers first, then tables and figures.

A cell holds the mean over labels and runs (sd over runs), its 95 % interval and, where the paper has one, the
printed number. Layout of "From pre-training to downstream performance: does domain-specific pre-training make
sense?" (Krones 2026, arXiv:2605.08819).

    python evaluate/report.py --metrics results/metrics.csv --out results
    python evaluate/report.py --metrics results/metrics.csv --out results --runs runs --predictions runs \\
        --verdicts results/verdicts.csv results/published/verdicts.csv

Reads   metrics.csv; reported/ and report.template.html beside this script; if given: verdicts.csv
        of compare.py with arms.csv, comparisons.csv, detectable.csv beside it, runs/<exp>/**/log.jsonl
        (learning curves) and pretrain/*.png, <exp>/predictions/seed<k>/<test set>.csv (ROC, precision-recall
        and decision curves).
Writes  OUT/report.html and OUT/printed.html (the paper's tables), OUT/tables/*.csv and *.tex,
        OUT/figures/*.svg and *.png; the table of test sets on the terminal.
Arms whose data are drawn carry the mark that metrics.csv has in its column stand_in at every number. Pictures
of MIMIC and VinDr, which must not be passed on, are left out unless asked for.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--metrics", required=True, type=Path, help="metrics.csv of evaluate/metrics.py")
    add("--out", required=True, type=Path, help="folder for report.html, tables and figures")
    add("--verdicts", type=Path, nargs="+", default=[], help="verdicts.csv of compare.py, of our runs first")
    add("--runs", type=Path, help="folder with <exp>/**/log.jsonl and pretrain/*.png")
    add("--predictions", type=Path, help="folder with <exp>/predictions/, for the curves of one arm")
    add("--baseline", default="2.2", help="arm that the first figure subtracts (2.2)")
    add("--arm", default="3.4", help="arm of the ROC, precision-recall and decision curves (3.4)")
    add(
        "--with-pictures",
        action="store_true",
        help="embed pictures of MIMIC and VinDr; do not pass the page on",
    )
    add("--experiments", type=Path, help="experiments.yaml, for what each arm is (default: this project's)")
    add("--figure1", type=Path, help="Figure 1 of describe.py (default: figure1.* below OUT)")
    add("--title", default="Does domain-specific pre-training make sense?")
    add("--note", help="remark at the top of the page")
    parser.error = fail                 # one sentence, like every other mistake
    return parser.parse_args()


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take a second
    options()

import jinja2  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import yaml  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)

HERE = Path(__file__).resolve().parent
REPORTED = HERE / "reported"
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high stand_in".split()
KEY = ["exp", "dataset", "labels", "metric", "variant", "label", "threshold"]
TEST_SETS = {
    "nih_test": "NIH",
    "vindr_test": "VinDr",
    "padchest": "PadChest",
    "chexpert_test": "CheXpert test",
    "chexpert_valid": "CheXpert vali",
}
LABELS5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
THRESHOLDS = ("0.1", "0.2", "0.3", "0.4", "0.5")
REFERRALS = ("0", "0.05", "0.1", "0.15", "0.2", "0.25")
PRINTED_METRICS = {"Mean accuracy": "mean_accuracy", "Subset accuracy": "subset_accuracy", "FNR": "fnr",
                   "Calibration error": "calibration_error"}
FURTHER = {"auprc": "AUPRC", "brier": "Brier score", "ece": "ECE", "adaptive_ece": "Adaptive ECE",
           "sensitivity_at_specificity_0.9": "Sensitivity at specificity 0.9",
           "sensitivity_at_specificity_0.95": "at 0.95", "risk_coverage_area": "Area under risk–coverage"}
LOW_IS_GOOD = re.compile("fnr|fpr|ece|brier|calibration|risk|gap")
HEADLINES = ("A1", "A2", "B6", "C2", "E2", "D4", "F4", "I1", "N7")  # claims of the first screen, six at most
SAW_TEST = ("3.1", "3.2", "3.1b", "3.2b")
FOOTNOTES = {"†": "pre-trained on 100,000 NIH images of which 22,772 are test images, without their labels"}
CREDENTIALED = re.compile("mimic|vindr", re.IGNORECASE)
# Told apart by colour-blind readers, on white and on black (Okabe and Ito, with olive for their yellow).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C2E", "#8B6BB1")
INK = "#1b1b1c"    # in an SVG this colour follows the reader's light or dark mode
plt.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#8886", "grid.linewidth": .5, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "svg.hashsalt": "the same figure, the same bytes",
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)})


# --- begin copy: files ---
class InputError(ValueError):
    """A mistake in the user's files; the text is the sentence to print."""


def read_csv(path, columns=(), dtype=str):
    """A CSV, blank cells as "". Raises InputError unless every row has the header's number of cells, every
    column a name of its own, and `columns` and at least one row are there.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    raise InputError(f"{path} line {rows.line_num} has {len(row)} cells, the header "
                                     f"{len(header)}; mend the line")
        frame = pd.read_csv(path, dtype=dtype, keep_default_na=False, low_memory=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, csv.Error) as problem:           # pandas' errors are ValueErrors
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{path} is no CSV table with a header row ({problem}); make it again") from None
    for place, name in enumerate(header, 1):
        if not name.strip():
            raise InputError(f"{path}: column {place} has no name; name it or delete it")
        if header.count(name) > 1:
            raise InputError(f"{path} has two columns '{name}'; keep one")
    for name in columns:
        if name not in header:
            raise InputError(f"{path} has no column '{name}'; expected {', '.join(columns)}")
    if frame.empty:
        raise InputError(f"{path} has a header and no rows; make it again")
    return frame


def write(path, save):
    """A file, whole or not at all: `save` fills a temporary one beside it, which is then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".tmp"), "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as problem:
        raise InputError(f"{path} cannot be written ({problem.strerror}); choose another --out") from None
# --- end copy: files ---


def natural(text):
    """Sort key that puts 3.10 after 3.9 and words after numbers."""
    parts = [part for part in re.split(r"(\d+)", str(text)) if part]
    return [(not part.isdigit(), part.zfill(9) if part.isdigit() else part) for part in parts]


def numbers(path, frame, columns):
    """The frame with text columns as numbers, blank cells NaN; a word among them is an InputError."""
    for name in columns:
        values = pd.to_numeric(frame[name], errors="coerce")
        for row in np.flatnonzero(values.isna() & ~frame[name].isin(["", "nan"]))[:1]:
            raise InputError(
                f"{path} line {row + 2}: {name} is '{frame[name][row]}'; expected a number or nothing"
            )
        frame[name] = values
    return frame


# --------------------------------------------------------------------------------------- the number in a cell

class Results:
    """metrics.csv by cell: mean over runs, sd, number of runs and interval, the last from arms.csv if given.

    Variant "best" is the run with the best mean AUC (paper) on the evaluated images, as in Tables 7 and 8.
    """

    def __init__(self, path, arms=None):
        frame = numbers(path, read_csv(path, COLUMNS[:11]), ["value", "ci_low", "ci_high"])
        numbers(path, frame[["threshold"]].copy(), ["threshold"])  # stays text, but has to be a number
        frame["stand_in"] = frame.get("stand_in", pd.Series("", frame.index)).fillna("")
        for row in np.flatnonzero(frame.duplicated([*KEY, "seed"]))[:1]:
            line = frame.loc[row]
            raise InputError(
                f"{path} line {row + 2}: {line['metric']} of exp {line['exp']}, seed {line['seed']} on "
                f"{line['dataset']} stands there a second time; remove one of the two rows"
            )
        self.frame = frame
        groups = frame.groupby(KEY, sort=False)
        cells = groups.agg(value=("value", "mean"), sd=("value", "std"), runs=("value", "count"),
                           ci_low=("ci_low", "first"), ci_high=("ci_high", "first"))
        cells.loc[cells["runs"] > 1, ["ci_low", "ci_high"]] = np.nan       # those are of single runs
        if arms is not None:
            known = arms.assign(variant="corrected").set_index(KEY)[["ci_low", "ci_high"]]
            cells.update(known)
        self.cells = {**cells.to_dict("index"), **self.best_runs()}
        self.exps = sorted(frame["exp"].unique(), key=natural)
        self.datasets = sorted(frame["dataset"].unique(), key=lambda name: [*TEST_SETS, name].index(name))
        marks = frame[frame["stand_in"] != ""].drop_duplicates(["exp", "dataset"])
        self.marks = dict(zip(zip(marks["exp"], marks["dataset"]), marks["stand_in"]))

    def best_runs(self):
        """{key with variant "best": cell} of each arm's best run on a test set."""
        means = self.frame.query("metric == 'auc_mean' and variant == 'paper' and labels != '14'")
        best = means.loc[means.groupby(["exp", "dataset"])["value"].idxmax(), ["exp", "dataset", "seed"]]
        rows = self.frame.merge(best, on=["exp", "dataset", "seed"])
        rows = rows.sort_values("variant", ascending=False).drop_duplicates(
            [n for n in KEY if n != "variant"]
        )
        rows = rows.assign(variant="best", sd=np.nan, runs=1)              # "paper" where it differs
        return rows.set_index(KEY)[["value", "sd", "runs", "ci_low", "ci_high", "seed"]].to_dict("index")

    def labels_of(self, dataset):
        """The label set that tables of a test set are about: 5, else 14, else all."""
        sizes = set(self.frame.loc[self.frame["dataset"] == dataset, "labels"])
        return next(name for name in ("5", "14", "all", "") if name in sizes)

    def diseases(self, dataset):
        """The labels of a test set's tables."""
        rows = self.frame[(self.frame["dataset"] == dataset) & (self.frame["metric"] == "auc")]
        names = [name for name in rows["label"].unique() if name]
        return [name for name in LABELS5 if name in names] if self.labels_of(dataset) == "5" else names

    def cell(self, place, printed):
        """What one table cell shows, a dict; place: a dict with some of KEY; printed: {key: text}."""
        key = tuple(
            {"labels": "", "variant": "corrected", "label": "", "threshold": "", **place}[n] for n in KEY
        )
        found = self.cells.get(key)
        mark = "°" if (key[0], key[1]) in self.marks else ""
        mark += "†" if key[1] == "nih_test" and key[0].removesuffix("-ensemble") in SAW_TEST else ""
        cell = {"value": np.nan, "text": "", "mark": mark, "interval": "", "printed": "", "best": False}
        if found is None:
            return cell
        if not found["runs"] or np.isnan(found["value"]):
            return cell | {"text": "undefined"}
        cell |= {"value": found["value"], "text": f"{found['value']:.4f}"}
        if found["runs"] > 1:
            cell["text"] += f" ({found['sd']:.4f})"
        if found["ci_low"] == found["ci_low"]:
            cell["interval"] = f"[{found['ci_low']:.4f}, {found['ci_high']:.4f}]"
        if "°" not in mark:                             # what was drawn has no printed number
            cell["printed"] = printed.get(key, "")
        return cell


def printed_numbers():
    """{KEY: text} of the printed Tables 2 to 8. Tables 7 and 8 show an arm's best run."""
    found = {}

    def put(exp, dataset, labels, metric, mean, sd="", variant="corrected", label="", threshold=""):
        if mean:
            text = f"{mean} ({sd})" if sd else mean
            found.setdefault((exp, dataset, labels, metric, variant, label, threshold), text)

    for row in read_csv(REPORTED / "table2.csv").itertuples():
        put(row.exp, row.testset, row.classes, "auc_mean", row.auc_mean, row.auc_sd)
    for row in read_csv(REPORTED / "table3.csv").itertuples():
        put(row.exp, row.testset, "", "auc", row.auc_mean, row.auc_sd, label=row.label)
    for row in read_csv(REPORTED / "table4.csv").itertuples():
        put(row.exp, "nih_test", "14", "auc_mean", row.auc_a, row.sd_a)
        put(f"{row.exp}b", "nih_test", "14", "auc_mean", row.auc_b, row.sd_b)
    for row in read_csv(REPORTED / "table5.csv").itertuples():
        put(row.exp, "nih_test", "14", "auc_mean", row.auc_36, row.sd_36)
        put(f"{row.exp}b" if row.auc_36 else row.exp, "nih_test", "14", "auc_mean", row.auc_35, row.sd_35)
    for row in read_csv(REPORTED / "table6.csv").itertuples():
        name = f"{row.exp}-{row.pretraining_images[:-3]}k"
        put(name, "nih_test", "14", "auc_mean", row.auc_mean, row.auc_sd)
    for row in read_csv(REPORTED / "table7.csv").itertuples():
        put(row.exp, "chexpert_valid", "5", PRINTED_METRICS[row.metric], row.value, variant="best",
            threshold=row.threshold)
    for row in read_csv(REPORTED / "table8.csv").itertuples():
        put(
            row.exp,
            "chexpert_valid",
            "5",
            "oracle_auc",
            row.oracle_auc,
            variant="best",
            threshold=row.referred,
        )
    return found


def arm_names(experiments, exps):
    """{exp: what it is in a few words}, of the study's grid, else of experiments.yaml."""
    words = {
        "Random": "random",
        "ImageNet1k": "ImageNet",
        "Supervised": "supervised",
        "Self-supervised": "GMML",
        "None": "",
        "MIMIC-IV-CXR": "MIMIC",
        "NIH ChestX-ray": "NIH",
    }
    names = {}
    for row in read_csv(REPORTED / "table1.csv").itertuples():
        parts = [words.get(part, part) for part in (row.strategy, row.pretraining_dataset)]
        start = words.get(row.initialisation, row.initialisation)
        names[row.exp] = " ".join(filter(None, [row.backbone, *parts, f"from {start}"]))
    try:
        grid = yaml.safe_load(experiments.read_text()) if experiments.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{experiments} cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(grid, dict):
        raise InputError(f"{experiments} is no table of experiments; see experiments.yaml of this project")
    for exp in exps:
        plain = exp.removesuffix("-ensemble")
        about = names.get(plain) or (grid.get(plain) or {}).get("about", "")
        names[exp] = about if exp == plain else f"mean probability of the runs of {plain}"
    return names


# ------------------------------------------------------------------------------------------------- the tables

def make_table(results, printed, number, title, note, heads, rows, columns):
    """One table of the page; None without a measured cell.

    Args: heads: of the left columns; rows: [(left texts, place)]; columns: [(head, place)]; place: a dict
        with some of KEY. Only rows and columns with a number are kept.
    """
    body = []
    for lead, place in rows:
        cells = [results.cell({**place, **column}, printed) for _, column in columns]
        if any(cell["text"] for cell in cells):
            body.append(
                {"lead": lead, "cells": cells, "of": place.get("metric", columns[0][1].get("metric", ""))}
            )
    filled = [any(row["cells"][n]["text"] for row in body) for n in range(len(columns))]
    columns = [column for column, some in zip(columns, filled) if some]
    for row in body:
        row["cells"] = [cell for cell, some in zip(row["cells"], filled) if some]
    for metric in {row["of"] for row in body}:
        contest = [row["cells"] for row in body if row["of"] == metric]
        for (_, place), column in zip(columns, zip(*contest)):
            low = LOW_IS_GOOD.match(place.get("metric", metric))
            values = [round(cell["value"], 4) for cell in column if cell["value"] == cell["value"]]
            for cell in column if len(values) > 1 else ():
                cell["best"] = round(cell["value"], 4) == (min if low else max)(values)
    marks = sorted({mark for row in body for cell in row["cells"] for mark in cell["mark"]})
    return body and {"number": number, "title": title, "note": note, "heads": heads, "rows": body,
                     "columns": [head for head, _ in columns], "marks": marks}


def table_specs(results):
    """(section, number, title, note, heads, rows, columns) of every table of the page."""
    arms = [([exp], {"exp": exp}) for exp in results.exps]
    labels = {name: results.labels_of(name) for name in results.datasets}
    sets = [("NIH, 14 labels", {"dataset": "nih_test", "labels": "14"})] if "nih_test" in labels else []
    sets += [(set_name(name), {"dataset": name, "labels": labels[name]}) for name in labels]
    sets = [(head, {"metric": "auc_mean", **place}) for head, place in sets]
    note = "Mean over labels and runs. NIH is in distribution, the others are not."
    if {"vindr_test", "padchest"} & set(labels):
        note += " VinDr and PadChest have no edema: four labels."
    yield "sites", "2", "AUC on each test set", note, ["Arm"], arms, sets
    name = "chexpert_valid" if "chexpert_valid" in labels else results.datasets[0]
    columns = [(label, {"dataset": name, "metric": "auc", "label": label})
               for label in results.diseases(name)]
    title = f"AUC of each disease, {set_name(name)}"
    yield "diseases", "3", title, "Mean over runs.", ["Arm"], arms, columns
    here = {"dataset": name, "labels": labels[name]}
    single = [exp for exp in results.exps if not exp.endswith("-ensemble")]
    yield from reliability_specs(results, here, single)
    columns = [(head, {**here, "metric": metric}) for metric, head in FURTHER.items()]
    title = f"Calibration and further metrics, {set_name(name)}"
    yield "calibration", "A", title, "Means over labels and runs.", ["Arm"], arms, columns
    yield from group_specs(results, labels, single)
    note = "NIH test, mean AUC over 14 labels and runs. b: fine-tuned by recipe b."
    for number, key, title in (("4", r"0\.1\.\d[ab]?", "Backbones and strategies of the literature"),
                               ("5", r"(3\.[12]|0\.2\.\d)b?", "Training options"),
                               ("6", r"4\.\d\.\d-\d+k", "Number of pre-training images")):
        rows = [row for row in arms if re.fullmatch(key, row[0][0])]
        yield "size", number, title, note, ["Arm"], rows, sets[:1]


def reliability_specs(results, here, arms):
    """Tables 7 and 8: by threshold and by share referred, means over runs and (p) as the paper shows them."""
    at = f", {set_name(here['dataset'])}"
    thresholds = [(t, {**here, "threshold": t}) for t in THRESHOLDS]
    referrals = [(q, {**here, "threshold": q}) for q in REFERRALS]

    def rows(metrics, **more):
        return [([exp, head], {"exp": exp, "metric": metric, **more})
                for metric, head in metrics.items() for exp in arms]
    negative = []
    for kind in ("", "subset_"):
        place = {**here, "exp": arms[0], "metric": f"always_negative_{kind}accuracy"}
        negative.append(results.cell(place, {})["text"] or "unknown")
    note = "Means over labels and runs. Always negative: mean accuracy {}, subset accuracy {} here."
    decisions = {"mean_accuracy": "Mean accuracy", "subset_accuracy": "Subset accuracy"}
    decisions |= {"fnr": "FNR", "fpr": "FPR"}
    yield ("thresholds", "7", "By decision threshold" + at, note.format(*negative), ["Arm", "Metric"],
           rows(decisions), thresholds)
    best = "Of each arm the run with the best AUC on these very images, by the paper's definitions."
    shown = {metric: head for head, metric in PRINTED_METRICS.items()}
    yield ("thresholds", "7p", "By decision threshold, as printed" + at, best, ["Arm", "Metric"],
           rows(shown, variant="best"), thresholds)
    oracle = {"oracle_auc": "uncertain", "random_referral_auc": "at random", "rejection_auc": "left out"}
    note = ("The most uncertain images are answered by an expert (Oracle AUC), or as many at random, or the "
            "uncertain ones are left out.")
    yield ("thresholds", "8", "AUC by share of images referred" + at, note, ["Arm", "Referred"], rows(oracle),
           referrals)
    best += " The paper's shares add up: its 0.05 … 0.25 are about 0.05, 0.15, 0.30, 0.50 and 0.75."
    yield ("thresholds", "8p", "Oracle AUC, as printed" + at, best, ["Arm", "Referred"],
           rows({"oracle_auc": "uncertain"}, variant="best"), referrals)


def group_specs(results, labels, arms):
    """Tables of the metrics by sex, age band and race, one a test set and metric."""
    pattern = r"^([a-z]+(?:_youden)?)\[(\w+)=(.+)\]$"
    found = results.frame["metric"].str.extract(pattern).dropna().drop_duplicates()
    groups = sorted(set(zip(found[1], found[2])))
    youden = "fnr_youden" in set(found[0])
    rule = "at Youden's thresholds of validation" if youden else "at 0.5"
    metrics = {"auc": ("AUC", ""), "ece": ("ECE", ""), "fnr": (f"FNR (underdiagnosis) {rule}", "0.5"),
               "fpr": (f"FPR {rule}", "0.5")}
    note = ("Means over the labels that all groups have, and over runs. Gap: worst to best group; it grows "
            "with the noise of small groups.")
    for dataset in results.datasets if groups else ():
        for metric, (head, threshold) in metrics.items():
            if threshold and youden:
                metric, threshold = f"{metric}_youden", ""
            place = {"dataset": dataset, "labels": labels[dataset], "threshold": threshold}
            columns = [(f"{attribute} {group}", {"metric": f"{metric}[{attribute}={group}]"})
                       for attribute, group in groups]
            for attribute in dict.fromkeys(attribute for attribute, _ in groups):
                columns.append((f"{attribute}: gap", {"metric": f"{metric}_gap[{attribute}]"}))
            rows = [([exp], {**place, "exp": exp}) for exp in arms]
            yield "groups", "B", f"{head} by group, {set_name(dataset)}", note, ["Arm"], rows, columns


def as_frame(table):
    """A table as text, for CSV, LaTeX and the terminal."""
    rows = [[*row["lead"], *(cell["text"] + cell["mark"] for cell in row["cells"])] for row in table["rows"]]
    return pd.DataFrame(rows, columns=[*table["heads"], *table["columns"]])


# ------------------------------------------------------------------------------------------- the first screen

def set_name(name):
    return TEST_SETS.get(name, name)


def effect_text(row):
    """"+0.0147 [0.0117, 0.0176]" of a verdict or comparison; "" without an effect."""
    if not row["effect"]:
        return ""
    text = f"{float(row['effect']):+.3f}"
    if row["ci_low"]:
        text += f" [{float(row['ci_low']):.3f}, {float(row['ci_high']):.3f}]"
    return text.replace("-", "−")


def headlines(verdicts):
    """Three to five sentences made from the verdicts on our runs, the study's main questions first."""
    claims, sentences = verdicts[verdicts["verdict"] != "not run"], []
    ids = [key for key in HEADLINES if key in set(claims["id"])]
    ids += [key for key in claims["id"].unique() if key not in ids][:max(3 - len(ids), 0)]
    for key in ids[:5]:
        whole = claims[claims["id"] == key].iloc[-1]
        rows = claims[(claims["id"] == key) & (claims["testset"] != "all")].to_dict("records")
        counts = {
            word: sum(row["verdict"] == word for row in rows)
            for word in ("holds", "contradicted", "undecided")
        }
        said = ", ".join(f"{word} on {count}" for word, count in counts.items() if count)
        sets = f" of {len(rows)} test sets" if len(rows) > 1 else f" {set_name(rows[0]['testset'])}"
        said = said + sets if len(rows) > 1 else said.removesuffix(" 1") + sets
        effects = [f"{set_name(row['testset'])} {text}" for row in rows if (text := effect_text(row))]
        sentences.append({"verdict": whole["verdict"], "statement": whole["statement"], "said": said,
                          "effect": effects[0] if effects else "", "more": effects[1:3]})
    return sentences


def differences(pairs, baseline, labels):
    """{exp: {dataset: (effect, low, high)}}, mean AUC less the baseline's; labels: {dataset: label set}."""
    found = {}
    for row in pairs[pairs["metric"] == "auc_mean"].itertuples():
        if baseline in (row.left, row.right) and labels.get(row.dataset) == row.labels:
            sign, exp = (1, row.left) if row.right == baseline else (-1, row.right)
            ends = sorted(sign * float(end or "nan") for end in (row.ci_low, row.ci_high))
            if not exp.endswith("-ensemble"):
                found.setdefault(exp, {})[row.dataset] = (sign * float(row.effect), *ends)
    return dict(sorted(found.items(), key=lambda item: natural(item[0]), reverse=True))     # the first on top


def difference_figure(found, names, baseline, datasets, path, narrow):
    """Difference in AUC to the baseline, a row an arm: a panel a test set, or (narrow) all in one panel."""
    size = (4, .9 + .3 * len(found)) if narrow else (12.4, .9 + .22 * len(found))
    figure, axes = plt.subplots(1, 1 if narrow else len(datasets), figsize=size, sharey=True, squeeze=False,
                                layout="constrained")
    for place, dataset in enumerate(datasets):
        axis = axes[0, 0 if narrow else place]
        shift = (place - (len(datasets) - 1) / 2) * -.16 if narrow else 0
        for row, values in enumerate(found.values()):
            if dataset in values:
                effect, low, high = values[dataset]
                axis.plot([low, high], [row + shift] * 2, color=PALETTE[place % 8])
                axis.plot(effect, row + shift, "o", color=PALETTE[place % 8], markersize=3.5,
                          label=set_name(dataset))
        axis.axvline(0, color=INK, linewidth=.8)
        if not narrow:
            axis.set_title(set_name(dataset), fontsize=9)
            axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    labels = [exp if narrow else f"{exp} {names.get(exp, '')}".strip() for exp in found]
    axes[0, 0].set_yticks(range(len(found)), labels, fontsize=8)
    figure.supxlabel(f"difference in AUC to {baseline}, 95 % interval", fontsize=8)
    if narrow:
        entries = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=3, fontsize=7)
    return save(figure, path)


# -------------------------------------------------------------------------------------------------- figures

def look(position):
    """Colour, marker and line of the n-th arm; of 64 no two share colour and marker."""
    turn = position // 8
    return {"color": PALETTE[position % 8], "marker": "osD^vPX*"[(position + turn) % 8],
            "linestyle": ("-", "--", "-.", ":")[turn % 4]}


def save(figure, path):
    """PNG and SVG; the SVG's ink follows the reader's light or dark mode. Returns the SVG's data URI."""
    mode = "<style>svg{color:#1d2126}@media(prefers-color-scheme:dark){svg{color:#e4e7ea}}</style>"
    for kind, extra in (("png", {"dpi": 160, "facecolor": "white"}), ("svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches="tight", **extra)
        content = buffer.getvalue()
        if kind == "svg":
            text = content.decode().replace(INK, "currentColor")
            content = text.replace("<defs>", mode + "<defs>", 1).encode()
        write(path.with_suffix(f".{kind}"), lambda file: file.write(content))
    plt.close(figure)
    return data_uri("svg+xml", content)


def data_uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def line_figure(results, panels, names, path):
    """Figure 2: a panel for (title, x label, [(tick, place)]), a line an arm, bars: 95 % interval."""
    arms = [exp for exp in results.exps if not exp.endswith("-ensemble")]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")
    handles = {}
    for axis, (title, x_label, columns) in zip(axes.flat, panels):
        axis.set(title=title, xlabel=x_label)
        axis.set_xticks(range(len(columns)), [tick for tick, _ in columns], fontsize=8)
        for place, exp in enumerate(arms):
            keys = [tuple({"labels": "", "label": "", "threshold": "", **column, "exp": exp,
                           "variant": "corrected"}[name] for name in KEY) for _, column in columns]
            cells = [results.cells.get(key) for key in keys]
            if all(cells):
                values = np.array([cell["value"] for cell in cells])
                ends = np.array([[cell["ci_low"], cell["ci_high"]] for cell in cells]).T
                x = np.arange(len(cells)) + .5 * ((place + .5) / len(arms) - .5)
                drawn = axis.errorbar(x, values, np.abs(ends - values), elinewidth=.6, **look(place))
                handles[f"{exp} {names.get(exp, '')}"] = drawn[0]
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8, handlelength=4)
    return save(figure, path) if handles else plt.close(figure)


def pooled_bins(results, dataset):
    """Reliability bins of all labels and runs together, a row an arm and bin: images, sum of p, positives."""
    rows = results.frame[
        (results.frame["dataset"] == dataset)
        & ~results.frame["exp"].str.endswith("-ensemble")
        & results.frame["metric"].str.startswith("reliability_")
    ]
    bins = rows.assign(threshold=rows["threshold"].astype(float)).pivot(
        index=["exp", "seed", "threshold", "label"], columns="metric", values="value").fillna(0)
    images = bins.get("reliability_images", pd.Series(dtype=float))
    sums = pd.DataFrame({"images": images})
    for name, column in (("p", "reliability_predicted"), ("y", "reliability_observed")):
        sums[name] = images * bins.get(column, 0)
    return sums.groupby(["exp", "threshold"]).sum().query("images > 0")


def reliability_figure(results, dataset, path):
    """Share of positives against the predicted probability, pooled over labels and runs: a panel an arm."""
    sums = pooled_bins(results, dataset)
    if sums.empty:
        return None
    exps = sorted(sums.index.unique("exp"), key=natural)
    columns, rows = min(len(exps), 5), -(-len(exps) // 5)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns + .4, 2.3 * rows + .3), sharex=True,
                                sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(exps):]:
        axis.remove()
    for axis, exp in zip(axes.flat, exps):
        curve = sums.loc[exp]
        x, y = curve["p"] / curve["images"], curve["y"] / curve["images"]
        axis.plot([0, 1], [0, 1], color="#888", linewidth=.8, linestyle=":")
        axis.plot(x, y, color=PALETTE[0])
        axis.scatter(x, y, 60 * np.sqrt(curve["images"] / curve["images"].sum()), color=PALETTE[0])
        axis.set_title(exp, fontsize=8)
    figure.supxlabel("predicted probability", fontsize=9)
    figure.supylabel("share of positives", fontsize=9)
    return save(figure, path)


def net_benefit(y, flagged, threshold):
    """TP/n - FP/n * t / (1 - t) of one label, y and flagged bool [n] (Vickers & Elkin 2006)."""
    return (flagged & y).mean() - (flagged & ~y).mean() * threshold / (1 - threshold)


def decision_figure(folder, exp, dataset, path):
    """ROC, precision-recall and decision curves (net benefit, mean over labels) of one arm on one test set,
    by the mean probability of its runs; None without its predictions.
    """
    files = sorted(folder.glob(f"{exp}/predictions/seed*/{dataset}.csv"))
    if not files:
        return None
    from sklearn.metrics import precision_recall_curve, roc_curve
    frames = [read_csv(file, ["path"]).set_index("path") for file in files]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    thresholds, benefit, everybody = np.linspace(.01, .6, 60), [], []
    names = [name[5:] for name in frames[0] if name.startswith("true_")]
    for place, name in enumerate(names):
        known = frames[0].index[frames[0][f"true_{name}"].isin(["0", "1", "0.0", "1.0"])]
        y = frames[0].loc[known, f"true_{name}"].astype(float).to_numpy() == 1
        p = np.mean([frame.loc[known, f"prob_{name}"].astype(float) for frame in frames], 0)
        if not 0 < y.sum() < len(y):
            continue
        style = {**look(place), "marker": "", "label": name}
        axes[0].plot(*roc_curve(y, p)[:2], **style)
        precision, recall, _ = precision_recall_curve(y, p)
        axes[1].plot(recall, precision, **style)
        benefit.append([net_benefit(y, p > t, t) for t in thresholds])
        everybody.append([net_benefit(y, p >= 0, t) for t in thresholds])
    axes[0].set(title="ROC", xlabel="1 − specificity", ylabel="sensitivity")
    axes[1].set(title="Precision–recall", xlabel="recall", ylabel="precision")
    axes[2].set(title="Decision curve", xlabel="threshold", ylabel="net benefit", ylim=(-.05, None))
    for values, label, line in ((benefit, "model", "-"), (everybody, "treat all", "--")):
        axes[2].plot(thresholds, np.mean(values, 0), label=label, linestyle=line)
    axes[2].axhline(0, color=INK, linewidth=.8, label="treat none")
    axes[2].legend(fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return save(figure, path)


def read_logs(runs):
    """{(exp, "pretrain" or "finetune"): frame} of the numbers in runs/<exp>/**/log.jsonl."""
    logs = {}
    for path in sorted(runs.glob("*/**/log.jsonl")):
        exp, part, *_ = path.relative_to(runs).parts
        lines, entries = path.read_text().splitlines(), []
        step = max(1, len(lines) // 1000)                    # a curve needs no more points; validation stays
        for number, line in enumerate(lines, 1):
            if number % step == 0 or '"val' in line:
                try:
                    entry = json.loads(line)
                    entries.append({key: v for key, v in entry.items() if isinstance(v, (int, float))})
                except (ValueError, AttributeError):
                    if number < len(lines):                  # a kill may cut the last line
                        raise InputError(f"{path} line {number} is no JSON object; delete the line") from None
        logs.setdefault((exp, part), []).append(pd.DataFrame(entries))
    return {key: pd.concat(frames) for key, frames in logs.items()}


def learning_figure(logs, path):
    """Pre-training loss, fine-tuning loss and validation AUC: mean over runs, band from lowest to highest."""
    panels = (
        ("pretrain", "loss", "step", "pre-training loss / its first value"),
        ("finetune", "loss", "epoch", "fine-tuning loss"),
        ("finetune", "val_auc", "epoch", "validation AUC"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.2), layout="constrained")
    exps, handles = sorted({exp for exp, _ in logs}, key=natural), {}
    for axis, (part, column, x, title) in zip(axes, panels):
        axis.set(title=title, xlabel=x)
        for place, exp in enumerate(exps):
            log = logs.get((exp, part), pd.DataFrame())
            if not {column, x} <= set(log):
                continue
            y = log.dropna(subset=[column]).groupby(x)[column].agg(["mean", "min", "max"])
            y = y / y["mean"].iloc[0] if part == "pretrain" else y
            style = {**look(place), "markersize": 3, "markevery": max(1, len(y) // 10)}
            handles[exp], = axis.plot(y.index, y["mean"], **style)
            axis.fill_between(y.index, y["min"], y["max"], color=style["color"], alpha=.12, linewidth=0)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=8, fontsize=8)
    return save(figure, path)


def pictures(runs, results, names, allowed):
    """([(caption, data URI)], arms left out) of the last picture of each kind that each pre-training drew."""
    last, shown, left_out = {}, [], []
    drawn = {exp for exp, _ in results.marks}
    for path in sorted(runs.glob("*/pretrain/*.png"), key=natural):
        last[path.parts[-3], path.stem.rpartition("_")[0]] = path
    for (exp, kind), path in last.items():
        if CREDENTIALED.search(names.get(exp, exp)) and exp not in drawn and not allowed:
            left_out.append(exp)
        else:
            shown.append((f"{exp}: {kind}", data_uri("png", path.read_bytes())))
    return shown, sorted(set(left_out), key=natural)


def size_figure(results, printed, path):
    """Figure 3: AUC over the number of pre-training images, a line a strategy; hollow: printed."""
    strategies, sizes = {"4.1.1": "DINO", "4.2.1": "GMML", "4.3.1": "SiT"}, ("50k", "100k", "250k")
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    measured = False
    for place, (exp, name) in enumerate(strategies.items()):
        places = [
            {"exp": f"{exp}-{size}", "dataset": "nih_test", "labels": "14", "metric": "auc_mean"}
            for size in sizes
        ]
        cells = [results.cell(where, printed) for where in places]
        measured |= any(cell["text"] for cell in cells)
        axis.plot(sizes, [cell["value"] for cell in cells], label=name, **look(place))
        theirs = [
            float(printed[where["exp"], "nih_test", "14", "auc_mean", "corrected", "", ""][:6])
            for where in places
        ]
        axis.plot(sizes, theirs, **{**look(place), "linestyle": ":", "markerfacecolor": "none"})
    axis.set(xlabel="pre-training images", ylabel="AUC, NIH test, 14 labels")
    axis.legend(fontsize=8)
    return save(figure, path) if measured else plt.close(figure)


# ------------------------------------------------------------------------------------------------- the page

def claim_rows(verdicts):
    """A row a claim that has a verdict: its texts and {test set or "all": a verdict's row}."""
    rows = []
    for _, claim in verdicts.groupby("id", sort=False):
        if (claim["verdict"] != "not run").any():
            first = claim.iloc[0].to_dict()
            cells = {row["testset"]: row | {"text": effect_text(row)} for row in claim.to_dict("records")}
            cells.setdefault("all", cells[first["testset"]])
            rows.append(first | {"cells": cells})
    return rows


def beside(paths, name, columns):
    """Rows of the tables called `name` beside the verdicts, None without."""
    files = [path.with_name(name) for path in paths if path.with_name(name).is_file()]
    found = [read_csv(file, columns) for file in files if file.read_text().count("\n") > 1]    # one arm: no pairs
    return pd.concat(found).fillna("") if found else None


def first_screen(args, results, names, verdicts, sets):
    """What the first screen and the claims need. verdicts: on our runs, or None; sets: test sets in order."""
    arms = [exp for exp in results.exps if not exp.endswith("-ensemble")]
    grid = dict.fromkeys(read_csv(REPORTED / "table1.csv")["exp"])
    models = results.frame[results.frame["exp"].isin(arms)].drop_duplicates(["exp", "seed"])
    marks = sorted(set(results.marks.values()))
    footnotes = FOOTNOTES | {"°": "stand-in: " + "; ".join(marks)}
    page = {"exps": arms, "models": len(models), "not_run": [exp for exp in grid if exp not in arms],
            "marks": marks, "footnotes": footnotes, "first": [], "sentences": [], "claims": []}
    page["baseline"] = args.baseline if args.baseline in arms else arms[0]
    if verdicts is not None:
        page |= {"sentences": headlines(verdicts), "claims": claim_rows(verdicts)}
    columns = "dataset labels metric left right effect ci_low ci_high".split()
    pairs = beside(args.verdicts[:1], "comparisons.csv", columns)
    labels = {name: results.labels_of(name) for name in sets}
    found = {} if pairs is None else differences(pairs, page["baseline"], labels)
    for kind in ("wide", "narrow") if found else ():
        path = args.out / "figures" / f"differences_{kind}"
        drawn = difference_figure(found, names, page["baseline"], sets, path, kind == "narrow")
        page["first"].append(drawn)
    return page


def draw_figures(args, results, printed, names, dataset, arm):
    """{name: data URI or None} of all other figures; dataset: the test set that they are about."""
    folder, here = args.out / "figures", {"dataset": dataset, "labels": results.labels_of(dataset)}
    diseases = results.diseases(dataset)[:6]
    columns = [(label, {"dataset": dataset, "metric": "auc", "label": label}) for label in diseases]
    panels = [("(a) AUC by disease", "", columns)]
    for title, metric, x_label, ticks in (("(b) Subset accuracy", "subset_accuracy", "threshold", THRESHOLDS),
                                          ("(c) FNR", "fnr", "threshold", THRESHOLDS),
                                          ("(d) Oracle AUC", "oracle_auc", "share referred", REFERRALS)):
        columns = [(tick, {**here, "metric": metric, "threshold": tick}) for tick in ticks]
        panels.append((title, x_label, columns))
    logs = read_logs(args.runs) if args.runs else {}
    return {"diseases": line_figure(results, panels, names, folder / "figure2"),
            "calibration": reliability_figure(results, dataset, folder / "reliability"),
            "curves": args.predictions and decision_figure(args.predictions, arm, dataset, folder / "curves"),
            "size": size_figure(results, printed, folder / "figure3"),
            "learning": learning_figure(logs, folder / "learning") if logs else None}


def compose(args):
    """Everything that the template shows; figures are drawn on the way."""
    arms = beside(args.verdicts[:1], "arms.csv", [*KEY[:4], "label", "threshold", "ci_low", "ci_high"])
    if arms is not None:
        arms = numbers(args.verdicts[0].with_name("arms.csv"), arms, ["ci_low", "ci_high"])
    results, printed = Results(args.metrics, arms), printed_numbers()
    names = arm_names(args.experiments or HERE.parent / "experiments.yaml", results.exps)
    made = [(spec[0], make_table(results, printed, *spec[1:])) for spec in table_specs(results)]
    columns = ["id", "testset", "verdict", "effect", "ci_low", "ci_high", "source"]
    ours, *others = [read_csv(path, columns) for path in args.verdicts] or [None]
    sets = [name for name in results.datasets if name in TEST_SETS] or results.datasets
    page = first_screen(args, results, names, ours, sets)
    dataset = "chexpert_valid" if "chexpert_valid" in sets else sets[0]
    arm = args.arm if args.arm in page["exps"] else page["exps"][-1]
    shown, left_out = pictures(args.runs, results, names, args.with_pictures) if args.runs else ([], [])
    for path in [args.figure1] if args.figure1 else sorted(args.out.rglob("figure1.[ps][nv]g"))[:1]:
        if args.with_pictures:                       # it shows images of MIMIC and VinDr
            kind = path.suffix[1:].replace("svg", "svg+xml")
            shown.insert(0, ("Figure 1: an image of each data set", data_uri(kind, path.read_bytes())))
        else:
            left_out.append("Figure 1")
    errata = read_csv(REPORTED / "errata.csv", ["kind", "place", "printed", "found", "how"])
    detectable = beside(args.verdicts, "detectable.csv", ["dataset", "labels", "detectable"])
    paths = [args.metrics, *args.verdicts, *sorted(REPORTED.glob("*.csv"))]
    read = [(path, path.read_bytes()) for path in paths]
    return page | {
        "title": args.title, "note": args.note, "names": names, "printed_page": False, "arm": arm,
        "set_names": {name: set_name(name) for name in sets}, "dataset": set_name(dataset),
        "tables": [(section, table) for section, table in made if table],
        "elsewhere": {row["id"]: row["cells"]["all"] for frame in others for row in claim_rows(frame)},
        "figures": draw_figures(args, results, printed, names, dataset, arm),
        "pictures": shown, "left_out": left_out,
        "errata": {kind: rows.to_dict("records") for kind, rows in errata.groupby("kind", sort=False)},
        "detectable": detectable is not None and (list(detectable), detectable.to_numpy().tolist()),
        "sources": [(path, f"{len(data):,}", hashlib.sha256(data).hexdigest()[:16]) for path, data in read]}


def printed_page(published):
    """What printed.html shows: the paper's tables, and the verdicts on the published numbers."""
    tables = [(path.stem.replace("table", "Table "), read_csv(path)) for path in
              sorted(REPORTED.glob("table*.csv"), key=natural)]
    return {"title": "The printed tables", "printed_page": True, "claims": claim_rows(published),
            "set_names": TEST_SETS, "plain_tables": [(name, list(frame), frame.to_numpy().tolist())
                                                     for name, frame in tables], "elsewhere": {}}


def run(args):
    for folder in filter(None, (args.predictions, args.runs)):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
    if args.experiments and not args.experiments.is_file():
        raise InputError(f"{args.experiments} cannot be read as YAML (no such file)")
    page = compose(args)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    template = environment.get_template("report.template.html")
    for place, (_, table) in enumerate(page["tables"]):
        frame = as_frame(table)
        name = f"table{table['number']}" + f"_{place}" * (table["number"] == "B")
        texts = {"csv": frame.to_csv(index=False, lineterminator="\n"),
                 "tex": frame.to_latex(index=False, escape=True, caption=table["title"], label=f"tab:{name}")}
        for kind, text in texts.items():
            write(args.out / "tables" / f"{name}.{kind}", lambda file: file.write(text.encode()))
    published = read_csv(args.verdicts[1]) if len(args.verdicts) > 1 else pd.DataFrame(columns=["id"])
    for name, content in (("printed.html", printed_page(published)), ("report.html", page)):
        html = template.render(**content).encode()
        write(args.out / name, lambda file: file.write(html))
    if page["tables"] and page["tables"][0][1]["number"] == "2":
        print(as_frame(page["tables"][0][1]).to_string(index=False))
    print(f"wrote {args.out / 'report.html'}, with printed.html, tables/ and figures/ beside it")


def main():
    try:
        run(options())
    except InputError as mistake:
        fail(mistake)


if __name__ == "__main__":
    main()
