"""Put the study on one page: Tables 1-8 and Figures 1-3 from metrics.csv, the printed numbers beside ours.

A cell holds the mean over labels and runs (sd over runs), a 95 % interval, the printed number, and the
difference in combined standard errors. Layout of "From pre-training to downstream performance: does
domain-specific pre-training make sense?" (Krones 2026, arXiv:2605.08819).

    python evaluate/report.py --metrics results/metrics.csv --out results
    python evaluate/report.py --metrics results/metrics.csv --out results --predictions runs --runs runs \\
        --verdicts results/verdicts.csv results/published/verdicts.csv

Reads   metrics.csv; reported/ beside this script (printed numbers); experiments.yaml; if given: predictions
        (which file a number comes from), runs/<exp>/**/log.jsonl (learning curves) and run.json (what chose
        the epoch), runs/<exp>/pretrain/*.png (pictures), compare.py's verdicts.csv with the files beside it,
        Figure 1 of data_prep/describe.py.
Writes  OUT/tables/table<n>.md .tex .csv, OUT/figures/*.svg .png, OUT/report.html; Table 2 on the terminal.
        A table's CSV names, for each cell, the lines of metrics.csv behind it; tables/predictions.csv the
        prediction file behind each line.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from html import escape
from math import isnan, nan, sqrt
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
    parser.add_argument("--metrics", required=True, type=Path, help="metrics.csv of evaluate/metrics.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables, figures and report.html")
    parser.add_argument("--predictions", type=Path, help="folder with <exp>/predictions/, to name them")
    parser.add_argument("--verdicts", type=Path, nargs="+", default=[], help="verdicts.csv of compare.py")
    parser.add_argument("--runs", type=Path, help="folder with <exp>/**/log.jsonl and pretrain/*.png")
    parser.add_argument("--experiments", type=Path, help="the grid (default: this project's)")
    parser.add_argument("--figure1", type=Path, help="Figure 1 (default: figure1.* below OUT)")
    parser.add_argument("--title", default="Does domain-specific pre-training make sense?")
    parser.add_argument("--note", help="remark at the top of the page, e.g. which data are stand-ins")
    parser.error = fail                 # one sentence, like every other mistake
    return parser.parse_args()


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take a second
    options()

import matplotlib
import numpy as np
import pandas as pd
import yaml
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)

HERE = Path(__file__).resolve().parent
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high".split()
VERDICTS = ("family statement metric testset left right sign verdict effect ci_low ci_high p_holm source "
            "remark").split()
COMPONENTS = "exp dataset labels label runs ci_low ci_high se_runs se_patients source".split()
DETECTABLE = "dataset labels se_runs se_patients detectable source".split()
FACES = ("paper", "corrected")
TEST_SETS = {  # name in the tables, location, images according to the paper
    "nih_test": ("NIH", "Bethesda (USA)", "25,596"),
    "vindr_test": ("VinDr test", "Hanoi (Vietnam)", "3,000"),
    "padchest": ("PadChest", "San Juan (Spain)", "1,861"),
    "chexpert_test": ("CheXpert test", "Stanford (USA)", "38,240"),
    "chexpert_valid": ("CheXpert vali", "Stanford (USA)", "234")}
LABELS5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
THRESHOLDS = ("0.1", "0.2", "0.3", "0.4", "0.5")
REFERRALS = ("0", "0.05", "0.1", "0.15", "0.2", "0.25")
SIZES = {"50000": "50k", "100000": "100k", "250000": "250k"}
TABLE7 = {"Mean accuracy": "mean_accuracy", "Subset accuracy": "subset_accuracy", "FNR": "fnr",
          "Calibration error": "calibration_error"}
FURTHER = {"auprc": "AUPRC", "brier": "Brier score", "ece": "ECE", "adaptive_ece": "Adaptive ECE",
           "sensitivity_at_specificity_0.9": "Sensitivity at specificity 0.9",
           "sensitivity_at_specificity_0.95": "Sensitivity at specificity 0.95",
           "risk_coverage_area": "Area under risk–coverage"}
GROUPS = {"sex": ["F", "M"], "age": ["<=40", "41-60", "61-80", ">80"], "race": []}    # first in this order
FIGURE2_ARMS = ("1.1", "1.2", "2.1", "2.2", "3.2", "3.4", "3.6", "3.8")
STUDY_KEY = re.compile(r"(0\.[12]|4\.\d)\.\d([ab]|-\w+)?|[123]\.\d[ab]?")   # 3.4, 0.1.7b, 3.1b, 4.2.1-100k
STUDY, OTHER = "Arms of the study", "Rows outside the study"
NESTED, ALONE = "patients and runs (nested bootstrap)", "patients alone, average of the runs"    # intervals
PICTURES = {"recon": "reconstruction. Rows, from the top: the images, what the network saw of them, what it "
                     "made of that, and the images with only the hidden places filled in",
            "attention": "attention. A row an image: the image, then a map for each head of the last block, "
                         "white where its CLS token looks most"}
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


def write(path, content):
    """Text or bytes to a file that is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_csv(path, columns=(), maker=None):
    """A CSV with every cell as text; a missing, unreadable or incomplete file is the user's to mend."""
    if not Path(path).is_file():
        fail(f"{path} does not exist{f'; {maker} writes it' if maker else ''}")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        fail(f"{path} is no CSV table with a header row ({' '.join(str(error).split())})")
    for name in columns:
        if name not in frame.columns:
            fail(f"{path} has no column {name!r}; expected {', '.join(columns)}")
    return frame


def natural(text):
    """Sort key that puts 3.10 after 3.9 and words after numbers."""
    parts = [part for part in re.split(r"(\d+)", str(text)) if part]
    return [(not part.isdigit(), part.zfill(9) if part.isdigit() else part) for part in parts]


# ---------------------------------------------------------------------------- the number in a cell

@dataclass
class Cell:
    """One number of a table; runs = 0: there is none. `lines`: the lines of metrics.csv it comes from; a cell
    without lines was not measured, one with lines and no number is undefined."""
    value: float = nan
    sd: float = nan            # over runs, n - 1
    runs: int = 0
    low: float = nan
    high: float = nan
    resampled: str = ""        # what the interval is over: NESTED or ALONE
    over: str = ""             # "4 labels" of a mean over fewer than the label set has
    seed: str = ""             # the run shown, where the paper shows its best run instead of the mean
    chosen: float = nan        # the same number of the run that validation in fine-tuning would have chosen
    printed: str = ""
    printed_sd: str = ""
    printed_runs: int = 5
    lines: tuple = ()
    best: bool = False

    @property
    def difference(self):
        """Ours - printed in combined standard errors; a print without sd is one run, spread like ours."""
        if not self.runs or not self.printed:
            return nan
        theirs = float(self.printed_sd) ** 2 / self.printed_runs if self.printed_sd else self.sd ** 2
        error = sqrt(self.sd ** 2 / (1 if self.seed else self.runs) + theirs)
        return (self.value - float(self.printed)) / error if error > 1e-9 else nan

    def text(self, missing="–"):
        spread = f" ({self.sd:.4f})" if self.runs > 1 and not self.seed else ""
        return f"{self.value:.4f}{spread}" if self.runs else "undefined" if self.lines else missing

    def small_print(self):
        """{what: text} of the lines below the number."""
        lines = {"mean over": self.over,
                 "interval": "" if isnan(self.low) else f"[{self.low:.4f}, {self.high:.4f}]",
                 "run shown": f"seed {self.seed}" if self.runs and self.seed else "",
                 "validation's choice": "" if isnan(self.chosen) else f"{self.chosen:.4f}",
                 "printed": self.printed + (f" ({self.printed_sd})" if self.printed_sd else ""),
                 "difference": "" if isnan(self.difference) else f"{self.difference:+.1f} s.e."}
        return {what: text.replace("-", "−") for what, text in lines.items() if text}


def check_test_sets(path, frame):
    """Stop unless a test set has the same images and labels in all runs: they are averaged and compared."""
    facts = frame[frame["metric"].str.match(r"(images|patients|positives|auc_labels)\b")]
    for (name, size, metric), part in facts.groupby(["dataset", "labels", "metric"], sort=False):
        counts = part.groupby(["exp", "seed", "label"], sort=False)["value"].first().unstack()
        for label in counts.columns[counts.nunique(dropna=False) > 1][:1]:
            first, other = counts[label].drop_duplicates().iloc[:2].items()
            said = [f"{'no' if isnan(count) else f'{count:g}'} {metric}{f' of {label}' * bool(label)} in exp "
                    f"{exp}, seed {seed}" for (exp, seed), count in (first, other)]
            fail(f"{path}: {name} ({size} labels) has {' but '.join(said)}; predict the same images and "
                 "labels with both")


class Metrics:
    """metrics.csv, asked cell by cell.

    Args: components: compare.py's components.csv, whose intervals over runs and patients replace the averaged
        intervals of single runs, or None; chosen: {exp: seed}, of chosen_run.
    """
    KEY = ["exp", "dataset", "labels", "metric", "variant", "label", "threshold"]

    def __init__(self, path, components=None, chosen=None):
        frame = read_csv(path, COLUMNS, "evaluate/metrics.py")
        if frame.empty:
            fail(f"{path} has a header and no rows; nothing was evaluated")
        frame["line"] = np.arange(2, len(frame) + 2)          # the header is line 1
        for name in ("threshold", "value", "ci_low", "ci_high"):
            numbers = pd.to_numeric(frame[name], errors="coerce")
            for row in frame[numbers.isna() & ~frame[name].isin(["", "nan"])].head(1).to_dict("records"):
                fail(f"{path} line {row['line']}: {name} is {row[name]!r}; expected a number or nothing")
            frame[name] = numbers
        texts = {t: "" if isnan(t) else f"{t:g}" for t in frame["threshold"].round(4).unique()}
        frame["threshold"] = frame["threshold"].round(4).map(texts)
        for row in frame[frame.duplicated(self.KEY + ["seed"])].head(1).to_dict("records"):
            fail(f"{path} line {row['line']}: {row['metric']} of exp {row['exp']}, seed {row['seed']} on "
                 f"{row['dataset']} stands there a second time; remove one of the two rows")
        check_test_sets(path, frame)
        self.frame, self.chosen, self.components = frame, chosen or {}, components
        self.exps = sorted(frame["exp"].unique(), key=natural)
        self.seeds = frame.groupby("exp")["seed"].nunique()
        self.datasets = [name for name in TEST_SETS if name in set(frame["dataset"])]
        self.datasets += [name for name in frame["dataset"].unique() if name not in TEST_SETS]
        self.sizes = {name: sorted(sizes.unique(), key=lambda size: (size != "5", size))   # ["5", "14"]
                      for name, sizes in frame.groupby("dataset")["labels"]}
        self.rows = frame.groupby(self.KEY).indices
        self.columns = [frame[name].to_numpy() for name in ("seed", "value", "ci_low", "ci_high", "line")]
        counts = frame[frame["metric"].str.startswith("auc_labels")]
        self.counts = counts.set_index(["dataset", "labels", "metric"])["value"].to_dict()
        for attribute in re.findall(r"auc_gap(\[\w+\])", " ".join(frame["metric"].unique())):
            if f"auc_labels{attribute}" not in set(counts["metric"]):
                fail(f"{path} does not say over which labels the means of groups are; make it again with "
                     "evaluate/metrics.py")
        self.intervals = {} if components is None else {
            (c["exp"], c["dataset"], c["labels"], c["label"]): (
                float(c["ci_low"]), float(c["ci_high"]), ALONE if c["runs"] == "1" else NESTED)
            for c in components.to_dict("records") if c["ci_low"]}

    def cell(self, exp, dataset, labels, metric, face, label="", threshold="", run=None, printed=()):
        """The number of one cell. run: the seed to show, None for the mean; printed: (value, sd, runs)."""
        cell = Cell(**dict(zip(("printed", "printed_sd", "printed_runs"), printed)))
        rows = self.rows.get((exp, dataset, labels, metric, face, label, threshold))
        if rows is None:
            return cell
        seed, value, low, high, line = (column[rows] for column in self.columns)
        shown, defined = np.ones(len(seed), bool) if run is None else seed == run, ~np.isnan(value)
        known = shown & defined
        cell.lines = tuple(line[known if known.any() else shown])
        cell.over = "" if label else self.labels_of_mean(dataset, labels, metric)
        if known.any():
            cell.value, cell.runs, cell.seed = float(value[known].mean()), int(defined.sum()), run or ""
            cell.sd = float(value[defined].std(ddof=1)) if cell.runs > 1 else nan
            cell.low, cell.high = float(low[known].mean()), float(high[known].mean())
            cell.resampled = "" if isnan(cell.low) else ALONE
            if run is None and metric in ("auc", "auc_mean"):
                own = cell.low, cell.high, cell.resampled
                cell.low, cell.high, cell.resampled = self.intervals.get((exp, dataset, labels, label), own)
        return cell

    def labels_of_mean(self, dataset, labels, metric):
        """"4 labels" where a mean of AUCs is over fewer than the label set has, else ""."""
        if not re.match(r"auc_mean$|oracle_auc$|auc(_gap)?\[", metric):
            return ""
        attribute = re.search(r"\[\w+", metric)
        shared = f"auc_labels{attribute[0]}]" if attribute else "auc_labels"        # by all of its groups
        count = self.counts.get((dataset, labels, shared), nan)
        return "" if isnan(count) or f"{count:g}" == labels else f"{count:g} label" + "s" * (count != 1)

    def left_out(self, sets):
        """A sentence on the means that are over fewer labels than their set has. sets: (dataset, labels)."""
        aucs, parts = self.frame[(self.frame["metric"] == "auc") & (self.frame["variant"] == "corrected")], []
        for name, size in sets:
            if count := self.labels_of_mean(name, size, "auc_mean"):
                rows = aucs[(aucs["dataset"] == name) & (aucs["labels"] == size)]
                asked = LABELS5 if size == "5" else rows["label"].unique()
                without = [label for label in asked if label not in set(rows["label"][rows["value"].notna()])]
                parts.append(f"{TEST_SETS.get(name, (name,))[0]} {count}, without {' and '.join(without)}")
        return f" Means over the labels that have an AUC: {'; '.join(parts)}." if parts else ""

    def reliability(self, exp, dataset, metric, face, **where):
        """Tables 7 and 8. paper: the run with the best mean AUC on the evaluated images themselves;
        corrected: the mean over runs, and the run that validation in fine-tuning would have chosen."""
        size = self.sizes.get(dataset, "5")[0]
        if face == "paper":
            rows = self.rows.get((exp, dataset, size, "auc_mean", "paper", "", ""))
            best = "none" if rows is None else self.columns[0][
                rows[np.nan_to_num(self.columns[1][rows], nan=-1).argmax()]]
            return self.cell(exp, dataset, size, metric, face, run=best, **where)
        cell = self.cell(exp, dataset, size, metric, face, **where)
        if exp in self.chosen:
            run = self.chosen[exp]
            cell.chosen = self.cell(exp, dataset, size, metric, face, run=run, **where).value
        return cell

    def labels(self, dataset):
        """The labels of a test set, in the order of the file."""
        labels = self.frame.loc[self.frame["dataset"] == dataset, "label"].unique()
        return [label for label in labels if label]

    def groups(self):
        """{metric: head} of the subgroups' AUCs and of the gaps between them, by sex, age and race."""
        found = {(attribute, group) for metric in self.frame["metric"].unique()
                 for attribute, group in re.findall(r"auc\[(\w+)=(.+)\]", metric)}
        heads = {}
        for attribute, first in GROUPS.items():
            names = [group for _, group in sorted(found) if _ == attribute]
            names.sort(key=lambda group: (first.index(group) if group in first else len(first), group))
            heads |= {f"auc[{attribute}={group}]": f"{attribute} {group}" for group in names}
            heads |= {f"auc_gap[{attribute}]": f"{attribute}: gap"} if len(names) > 1 else {}
        return heads

    def fact(self, dataset, metric, label=""):
        """A number that does not depend on the model, such as the images of a test set; NaN if absent."""
        rows = self.frame[(self.frame["dataset"] == dataset) & (self.frame["metric"] == metric)
                          & (self.frame["label"] == label) & (self.frame["variant"] == "corrected")]
        rows = rows.sort_values("labels", key=lambda column: column != "5", kind="stable")
        return rows["value"].iloc[0] if len(rows) else nan


# ---------------------------------------------------------------------------- the tables

@dataclass
class Row:
    key: str
    section: str
    lead: list                                     # texts of the left columns
    cells: dict = field(default_factory=dict)      # face: one Cell a column

    def measured(self):
        return any(cell.runs for cells in self.cells.values() for cell in cells)


@dataclass
class Table:
    number: str
    title: str
    note: str
    lead: list                     # heads of the left columns
    columns: list                  # heads of the measured columns
    rows: list
    faces: list                    # those with cells of their own; "both" if they agree in every cell

    def sections(self):
        """(name, rows) of the sections that have rows, a measured one first."""
        parts = [(name, [row for row in self.rows if row.section == name]) for name in (STUDY, OTHER)]
        parts.sort(key=lambda part: not any(row.measured() for row in part[1]))
        return [part for part in parts if part[1]]

    def heads(self):
        """All column heads; with two faces each carries its face."""
        marks = ["" if len(self.faces) == 1 else f", {face}" for face in self.faces]
        return self.lead + [head + mark for mark in marks for head in self.columns]

    def lines(self):
        """(section, kind, left texts, Cells or texts) of every line of the table, small print included."""
        for section, rows in self.sections():
            for row in rows:
                cells = [cell for face in self.faces for cell in row.cells[face]]
                yield section, "number", row.lead, cells
                small = [cell.small_print() for cell in cells]
                for kind in dict.fromkeys(kind for texts in small for kind in texts):
                    lead = [kind] + [""] * (len(row.lead) - 1)
                    yield section, kind, lead, [texts.get(kind, "") for texts in small]


def mark_best(rows, lower):
    """Set `best` on every cell that nothing in its column beats, ties at the digits shown included."""
    for face in rows[0].cells:
        for column, smaller in zip(zip(*(row.cells[face] for row in rows)), lower):
            measured = [cell for cell in column if cell.runs]
            best = (min if smaller else max)((round(cell.value, 4) for cell in measured), default=None)
            for cell in measured:
                cell.best = len(measured) > 1 and round(cell.value, 4) == best


def build(number, title, note, lead, rows, columns, ask, faces=FACES, group=lambda row: "",
          lower=lambda row, column: False):
    """A table from its row and column keys.

    Args: rows: (section, key, left texts); columns: {key: head}; ask(row key, column key, face) -> Cell;
        group(row): rows compete for bold print within section and group; lower(row, column): less is better.
    """
    rows = [Row(key, section, texts, {face: [ask(key, column, face) for column in columns] for face in faces})
            for section, key, texts in rows]
    pairs = [pair for row in rows for pair in zip(*row.cells.values())] if len(faces) == 2 else []
    agree = pairs and all(
        paper.lines and corrected.lines and not paper.seed and abs(paper.value - corrected.value) < 5e-7
        for paper, corrected in pairs if paper.runs or corrected.runs)
    for _, corrected in [] if agree else pairs:
        corrected.printed = ""                    # the print follows the paper's definitions
    contests = {}
    for row in rows:
        row.cells = {"both": row.cells["corrected"]} if agree else row.cells
        contests.setdefault((row.section, group(row)), []).append(row)
    for contest in contests.values():
        mark_best(contest, [lower(contest[0], column) for column in columns])
    return Table(number, title, note, lead, list(columns.values()), rows, ["both"] if agree else list(faces))


def printed_numbers(folder):
    """{(table, row, column): (value, sd, runs)} as printed. ResNet arms (1.x) are three runs, others five."""
    numbers = {}
    for table, column, value, sd in (
            ("2", lambda r: (r["testset"], r["classes"]), "auc_mean", "auc_sd"),
            ("3", lambda r: r["label"], "auc_mean", "auc_sd"),
            ("4", lambda r: "", "auc_a", "sd_a"), ("4", lambda r: "b", "auc_b", "sd_b"),
            ("4", lambda r: " literature", "auc_literature", "sd_literature"),
            ("5", lambda r: "b", "auc_35", "sd_35"), ("5", lambda r: "", "auc_36", "sd_36"),
            ("6", lambda r: "-" + SIZES[r["pretraining_images"]], "auc_mean", "auc_sd"),
            ("7", lambda r: r["threshold"], "value", None),
            ("8", lambda r: r["referred"], "oracle_auc", None)):
        for r in read_csv(folder / f"table{table}.csv").to_dict("records"):
            row = (r["exp"], r["metric"]) if table == "7" else r["exp"]
            if r[value]:
                numbers[table, row, column(r)] = r[value], r.get(sd, ""), 3 if r["exp"][:2] == "1." else 5
    return numbers


def arm_facts(folder, experiments, exps):
    """{exp: cells of Table 1}: the study's from table1.csv, other measured rows from experiments.yaml."""
    facts = {row["exp"]: row for row in read_csv(folder / "table1.csv").to_dict("records")}
    try:
        grid = yaml.safe_load(experiments.read_text()) if experiments else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{experiments} cannot be read as YAML ({' '.join(str(error).split())})")
    if not isinstance(grid, dict):
        fail(f"{experiments} is no table of experiments; see experiments.yaml of this project")
    for exp in exps:
        if exp not in facts:
            row = {**grid.get("defaults", {}), **grid[exp]} if exp in grid else {}
            pretrain = row.get("pretrain") or {} if "pretrain" in grid.get(exp, {}) else {}
            facts[exp] = {"about": row.get("about", ""), "backbone": row.get("arch", ""),
                          "initialisation": row.get("init", ""), "strategy": pretrain.get("strategy", ""),
                          "pretraining_dataset": pretrain.get("dataset", "")}
    return facts


def short_name(exp, facts):
    """Figure 2's legend: number, backbone, strategy (sup: supervised), start (rand, IN), dataset."""
    words = {"Random": "rand", "ImageNet1k": "IN", "Supervised": "sup", "Self-supervised": "GMML", "None": "",
             "MIMIC-IV-CXR": "MIMIC", "NIH ChestX-ray": "NIH"}
    row = facts.get(exp, {})
    parts = [row.get(key, "") for key in ("backbone", "strategy", "initialisation", "pretraining_dataset")]
    about = row.get("about") or " ".join(words.get(part, part) for part in parts)
    return " ".join(f"{exp} {about}".split())


def study_rows(number, printed, facts, *columns):
    """The printed rows of a table, (b) marking the baselines, with more of its printed columns."""
    about = {r["exp"]: r for r in read_csv(HERE / "reported" / f"table{number}.csv").to_dict("records")}
    return [(STUDY, key, [key + " (b)" * (facts.get(key, {}).get("baseline") == "True")]
             + [about[key][column] for column in columns])
            for key in dict.fromkeys(row for table, row, _ in printed if table == number)]


def other_rows(metrics):
    """The measured experiments that are not the study's: the demo's, controls, anybody's."""
    return [(OTHER, exp, [exp]) for exp in metrics.exps if not STUDY_KEY.fullmatch(exp)]


def auc_tables(metrics, printed, facts):
    """Table 1 (the grid), Table 2 (test sets) and Tables 4 to 6 (NIH test, 14 labels)."""
    def nih14(number):
        """ask() where the column belongs to the experiment's key: 0.1.1b, 4.2.1-100k."""
        def ask(exp, column, face):
            alone = number == "5" and ("5", exp, "") not in printed         # 0.2.2 and 0.2.3: recipe b alone
            key = (exp if column == "b" else "") if alone else exp + column
            return metrics.cell(key, "nih_test", "14", "auc_mean", face,
                                printed=printed.get((number, exp, column), ()))
        return ask

    arms = study_rows("2", printed, facts) + other_rows(metrics)
    cells = ("backbone", "strategy", "initialisation", "domain", "pretraining_dataset", "finetuning_dataset")
    yield Table("1", "The experiments", "The paper's grid and the rows measured here that are not in it. "
                "Runs: fine-tuned models found in metrics.csv. (b): baseline.",
                ["Exp.", "Backbone", "Pre-training strategy", "Initialisation", "Pre-training domain",
                 "Pre-training data", "Fine-tuning", "Runs"], [],
                [Row(key, section, lead + [facts[key].get(cell, "") for cell in cells]
                     + [str(metrics.seeds.get(key, "none"))]) for section, key, lead in arms], [])
    sets = {("nih_test", "14"): "NIH, 14 labels", ("nih_test", "5"): "NIH, 5 labels",
            **{(key, "5"): words[0] for key, words in TEST_SETS.items() if key != "nih_test"},
            **{(key, metrics.sizes[key][0]): key for key in metrics.datasets if key not in TEST_SETS}}
    yield build("2", "Performance across data collection sites", "AUC, mean over labels and runs (sd over "
                "runs). NIH is in distribution, the others are not." + metrics.left_out(sets), ["Exp."], arms,
                sets, lambda exp, column, face: metrics.cell(exp, *column, "auc_mean", face,
                                                             printed=printed.get(("2", exp, column), ())))
    nih = "NIH test, mean AUC over 14 labels and runs (sd over runs). "
    yield build("4", "Backbones and strategies of the literature", nih + "Fine-tuning recipes (a) and (b).",
                ["Exp.", "Backbone", "Strategy", "Initialisation", "Pre-training data"],
                study_rows("4", printed, facts, *cells[:3], "pretraining_dataset"),
                {"": "Fine-tuning (a)", "b": "Fine-tuning (b)", " literature": "Literature"}, nih14("4"))
    yield build("5", "Training options", nih + "[35] is recipe (b), [36] the DeiT-style recipe.",
                ["Exp.", "Initialisation", "Epochs", "Image size", "Channels"],
                study_rows("5", printed, facts, "initialisation", "epochs", "image_size", "channels"),
                {"b": "Fine-tuned as [35]", "": "Fine-tuned as [36]"}, nih14("5"))
    yield build("6", "Number of pre-training images", nih + "300 epochs on MIMIC from random weights.",
                ["Exp.", "Strategy", "Channels", "Remark"],
                study_rows("6", printed, facts, "strategy", "channels", "note"),
                {f"-{size}": f"{int(images):,}" for images, size in SIZES.items()}, nih14("6"))


def reliability_tables(metrics, printed, facts, dataset):
    """Tables 3, 7, 8 and A, about one test set: the paper's is chexpert_valid."""
    rest, name = other_rows(metrics), TEST_SETS.get(dataset, (dataset,))[0]
    size = metrics.sizes.get(dataset, "5")[0]
    labels = LABELS5 if size == "5" else metrics.labels(dataset)

    def at(number, row, column):
        return printed.get((number, row, column), ()) if dataset == "chexpert_valid" else ()

    def thresholded(key, threshold, face):
        if key[1] == "Calibration error" and face == "corrected":
            return metrics.reliability(key[0], dataset, "ece", face)
        return metrics.reliability(key[0], dataset, TABLE7[key[1]], face, threshold=threshold,
                                   printed=at("7", key, threshold))

    yield build("3", f"Performance across diseases, {name}", "AUC of each label, mean (sd) over runs.",
                ["Exp."], study_rows("3", printed, facts) + rest, dict(zip(labels, labels)),
                lambda exp, label, face: metrics.cell(exp, dataset, size, "auc", face, label,
                                                      printed=at("3", exp, label)))
    best = "Paper face: the run with the best AUC on these very images. Corrected face: mean (sd) over runs. "
    negative = [metrics.fact(dataset, f"always_negative_{kind}accuracy") for kind in ("", "subset_")]
    here = "" if isnan(negative[0]) else " and {:.4f} and {:.4f} on the images here".format(*negative)
    keys = list(dict.fromkeys(row for number, row, _ in printed if number == "7"))
    keys += [(exp, metric) for _, exp, _ in rest for metric in TABLE7]
    yield build("7", f"Metrics that depend on the threshold, {name}", best + "Calibration error: the paper's "
                "definition; corrected: expected calibration error, which has no threshold. Bold: best, the "
                "lowest of FNR and calibration error. Always answering “negative” has mean and subset "
                f"accuracy 0.7238 and 0.3663 on the paper's 202 images{here}.", ["Exp.", "Metric"],
                [(STUDY if STUDY_KEY.fullmatch(key[0]) else OTHER, key, list(key)) for key in keys],
                dict(zip(THRESHOLDS, THRESHOLDS)), thresholded, group=lambda row: row.key[1],
                lower=lambda row, _: row.key[1] in ("FNR", "Calibration error"))
    yield build("8", f"Oracle AUC, {name}", best + "Columns: nominal share of images referred. The paper's "
                "referrals add up: its 0.05 … 0.25 are really about 0.05, 0.15, 0.30, 0.50 and 0.75.",
                ["Exp."], study_rows("8", printed, facts) + rest, dict(zip(REFERRALS, REFERRALS)),
                lambda exp, q, face: metrics.reliability(exp, dataset, "oracle_auc", face, threshold=q,
                                                         printed=at("8", exp, q)))
    yield build("A", f"Further metrics, {name}", "Not in the paper. Mean over labels and runs (sd over "
                "runs). Bold: best; the lowest of Brier score, calibration errors and risk–coverage area.",
                ["Exp."],
                [row for row in study_rows("2", printed, facts) if row[1] in metrics.exps] + rest, FURTHER,
                lambda exp, metric, face: metrics.cell(exp, dataset, size, metric, face),
                faces=("corrected",),
                lower=lambda _, metric: metric in ("brier", "ece", "adaptive_ece", "risk_coverage_area"))


def subgroup_table(metrics, facts):
    """Table B: AUC by sex, age band and race on every test set whose manifest knows them; or None."""
    groups = metrics.groups()
    if not groups:
        return None
    found = metrics.frame.loc[metrics.frame["metric"].isin(groups), ["exp", "dataset"]]
    found = set(found.itertuples(index=False, name=None))
    rows = [(STUDY if STUDY_KEY.fullmatch(exp) else OTHER, (exp, name),
             [exp, TEST_SETS.get(name, (name,))[0]])
            for exp in metrics.exps for name in metrics.datasets if (exp, name) in found]
    return build("B", "Subgroups", "Not in the paper. AUC, mean over labels (NIH: all 14) and runs (sd over "
                 "runs); a label without an AUC in one group is left out of all groups of that attribute. "
                 "Gap: from the worst to the best group, a mean over labels; it is never negative and grows "
                 "with the noise of small groups. Bold: best on the test set, the smallest of gaps.",
                 ["Exp.", "Test set"], rows, groups,
                 lambda key, metric, face: metrics.cell(*key, metrics.sizes[key[1]][-1], metric, face),
                 faces=("corrected",), group=lambda row: row.key[1],
                 lower=lambda _, metric: metric.startswith("auc_gap"))


MISSING = "“–”: not measured; “undefined”: measured, but without positive or negative images."


def markdown(table):
    lines = [f"**Table {table.number}. {table.title}.** {table.note} {MISSING}", "",
             "| " + " | ".join(table.heads()) + " |", "|" + "---|" * len(table.heads())]
    before = None
    for section, kind, lead, cells in table.lines():
        if section != before and len(table.sections()) > 1:
            lines.append(f"| *{section}* " + "| " * len(table.heads()))
        before = section
        texts = [f"**{c.text()}**" if c.best else c.text() for c in cells] if kind == "number" else cells
        lines.append("| " + " | ".join(lead + texts) + " |")
    return "\n".join(lines) + "\n"


def latex(table):
    """A table for LaTeX with the booktabs package."""
    special = {**{sign: f"\\{sign}" for sign in "&%_#$"}, "–": "--", "−": "$-$", "“": "``", "”": "''",
               "…": r"\dots{}"}

    def tex(text):
        return "".join(special.get(sign, sign) for sign in text)

    align = "l" * len(table.lead) + "r" * len(table.columns) * len(table.faces)
    lines = [r"\begin{table*}", r"\centering\scriptsize",
             rf"\caption{{{tex(f'{table.title}. {table.note} {MISSING}')}}}",
             rf"\label{{tab:{table.number}}}",
             rf"\begin{{tabular}}{{{align}}}", r"\toprule",
             " & ".join(map(tex, table.heads())) + r" \\"]
    before = None
    for section, kind, lead, cells in table.lines():
        if section != before:
            lines += [r"\midrule", rf"\multicolumn{{{len(align)}}}{{l}}{{\emph{{{tex(section)}}}}} \\"]
        before = section
        texts = [tex(cell.text() if kind == "number" else cell) for cell in cells]
        if kind == "number":
            texts = [rf"\textbf{{{text}}}" if cell.best else text for text, cell in zip(texts, cells)]
        lines.append(r"\quad " * (kind != "number") + " & ".join([*map(tex, lead), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"


def tidy(table, source):
    """One CSV row a cell, with the lines of `source` behind it; Table 1, which has no numbers, as it is."""
    rows = [dict(zip(table.lead, row.lead)) for row in table.rows]
    if table.columns:
        rows = [{"section": row.section, **lead, "column": head, "face": face, **vars(cell),
                 "difference": cell.difference, "lines": " ".join(map(str, cell.lines)),
                 "source": source if cell.lines else ""}
                for row, lead in zip(table.rows, rows) for face in table.faces
                for head, cell in zip(table.columns, row.cells[face])]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n", float_format="%.6f")


def terminal(table):
    """The measured rows of Table 2 for the terminal, printed numbers below ours."""
    first = max(len(row.lead[0]) for row in table.rows) + 2
    lines = [f"Table 2. {table.note}", " " * first + "".join(f"{head:>18}" for head in table.heads()[1:])]
    shown = False
    for _, kind, lead, cells in table.lines():
        if kind == "number":
            shown, cells = any(cell.runs for cell in cells), [cell.text() for cell in cells]
        if shown:
            name = lead[0] if kind == "number" else f"  {lead[0]}"
            lines.append(f"{name:<{first}}" + "".join(f"{text:>18}" for text in cells))
    missing = [row.key for row in table.rows if not row.measured()]
    return "\n".join(lines + [f"not measured: {', '.join(missing)}"] * bool(missing))


# ---------------------------------------------------------------------------- the figures

def look(position):
    """Colour, marker and line of the n-th arm; of 64 no two share colour and marker."""
    turn = position // 8                     # each turn has a line of its own and moves the markers on by one
    return {"color": PALETTE[position % 8], "marker": "osD^vPX*"[(position + turn) % 8],
            "linestyle": ("-", "--", "-.", ":")[turn % 4]}


def save(figure, path):
    """PNG and SVG; the SVG's ink follows the reader's light or dark mode. Returns the SVG's path."""
    for kind, options in (("png", {"dpi": 200, "facecolor": "white"}), ("svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches="tight", **options)
        content = buffer.getvalue()
        if kind == "svg":
            mode = "<style>svg{color:#1d2126}@media(prefers-color-scheme:dark){svg{color:#e4e7ea}}</style>"
            content = content.decode().replace(INK, "currentColor").replace("<defs>", mode + "<defs>", 1)
        write(path.with_suffix(f".{kind}"), content)
    plt.close(figure)
    return path.with_suffix(".svg")


def sites(table, facts, path):
    """Table 2 at a glance: AUC of each arm on each test set, 95 % interval; hollow: printed; or None."""
    rows = [row for _, part in table.sections() for row in part if row.measured()][::-1]    # the first on top
    if not rows:
        return None
    cells = [row.cells[table.faces[-1]] for row in rows]
    columns = [n for n in range(len(table.columns)) if any(line[n].runs for line in cells)]
    names = ["\n".join(textwrap.wrap(short_name(row.key, facts), 34)) for row in rows]
    height = .9 + .12 * len(rows) + .14 * sum(name.count("\n") + 1 for name in names)
    figure, axes = plt.subplots(1, len(columns), figsize=(2.4 + 1.5 * len(columns), height),
                                sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axis, n in zip(axes[0], columns):
        for place, cell in enumerate(line[n] for line in cells):
            if cell.printed:
                axis.plot(float(cell.printed), place, "D", color=PALETTE[1], markerfacecolor="none")
            axis.plot([cell.low, cell.high], [place, place], color=PALETTE[0])
            axis.plot(cell.value, place, "o", color=PALETTE[0])
        axis.set_title(table.columns[n], fontsize=8.5)
    axes[0, 0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0, 0].xaxis.set_major_locator(plt.MaxNLocator(3))
    figure.supxlabel("AUC", fontsize=9)
    return save(figure, path)


def figure2(by_number, section, face, facts, path):
    """(a) AUC by disease, (b) subset accuracy, (c) FNR by threshold, (d) Oracle AUC by referral; or None."""
    panels = [("3", "", "(a) AUC by disease", "", "AUC"),
              ("7", "Subset accuracy", "(b) Subset accuracy", "decision threshold", "subset accuracy"),
              ("7", "FNR", "(c) FNR (underdiagnosis)", "decision threshold", "FNR"),
              ("8", "", "(d) Oracle AUC", "share referred (nominal)", "AUC")]
    arms = [row.key for row in by_number["3"].rows if row.section == section and row.measured()
            and (section == OTHER or row.key in FIGURE2_ARMS)]
    if not arms:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.2), layout="constrained")
    handles = {}
    for axis, (number, metric, title, x_label, y_label) in zip(axes.flat, panels):
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        rows = {row.key: row for row in by_number[number].rows}
        for place, exp in enumerate(arms):
            row = rows.get((exp, metric) if metric else exp)
            if row is None:
                continue
            cells, style = row.cells.get(face) or row.cells["both"], look(place)
            if number == "3":                       # side by side, unconnected
                x, style["linestyle"] = np.arange(len(cells)) + .6 * ((place + .5) / len(arms) - .5), ""
            else:
                x = list(map(float, by_number[number].columns))
            bars = None if cells[0].seed else [cell.sd for cell in cells]
            drawn = axis.errorbar(x, [cell.value for cell in cells], bars, elinewidth=.7, **style)
            handles[short_name(exp, facts)] = drawn[0]         # of the last panel that has it: with its line
    diseases = [*by_number["3"].columns]
    axes[0, 0].set_xticks(range(len(diseases)), diseases, fontsize=8)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8, handlelength=4)
    return save(figure, path)


def figure3(table, path):
    """AUC over the number of pre-training images, a line a strategy, bars: sd over runs; dashed: printed."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes, rows = list(map(int, SIZES)), {row.key: row for row in table.rows}
    for place, (exp, name) in enumerate((("4.1.1", "DINO"), ("4.2.1", "GMML"), ("4.3.1", "SiT"))):
        printed, cells = rows[exp].cells[table.faces[0]], rows[exp].cells[table.faces[-1]]
        axis.errorbar(sizes, [float(c.printed) for c in printed], [float(c.printed_sd) for c in printed],
                      label=f"{name}, printed", alpha=.75,
                      **{**look(place), "linestyle": "--", "markerfacecolor": "none"})
        if any(cell.runs for cell in cells):
            axis.errorbar(sizes, [c.value for c in cells], [c.sd for c in cells], label=f"{name}, here",
                          **look(place))
    axis.set(xscale="log", xlabel="pre-training images", ylabel="AUC, NIH test, 14 labels")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.legend(loc="lower right", fontsize=8)
    return save(figure, path)


def pooled_bins(metrics, dataset):
    """Reliability bins of all labels together, a row an exp, seed and bin: images, and sums of p and of y."""
    bins = metrics.frame[(metrics.frame["dataset"] == dataset)
                         & (metrics.frame["labels"] == metrics.sizes[dataset][-1])
                         & metrics.frame["metric"].str.startswith("reliability_")]
    bins = bins.assign(bin=bins["threshold"].astype(float), metric=bins["metric"].str.slice(12))
    bins = bins.pivot(index=["exp", "seed", "bin", "label"], columns="metric", values="value")
    for name in ("predicted", "observed"):
        bins[name] *= bins["images"]
    return bins.groupby(["exp", "seed", "bin"]).sum().query("images > 0")


def reliability_curves(metrics, arms, dataset, facts, path):
    """Share of positives against the predicted probability, pooled over labels: a panel an arm, a thin line a
    run, a thick one all runs; a dot grows with its images. Returns the SVG's path, or None."""
    if not metrics.frame.loc[metrics.frame["dataset"] == dataset, "metric"].eq("reliability_images").any():
        return None
    bins = pooled_bins(metrics, dataset)
    exps = [exp for exp in arms if exp in bins.index]
    columns, rows = min(len(exps), 5), -(-len(exps) // 5)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns + .4, 2.5 * rows + .3), sharex=True,
                                sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(exps):]:
        axis.remove()
    for axis, exp in zip(axes.flat, exps):
        whole = bins.loc[exp].groupby("bin").sum()
        for curve, line in [*((run, .5) for _, run in bins.loc[exp].groupby("seed")), (whole, 1.6)]:
            x, y = (curve[name] / curve["images"] for name in ("predicted", "observed"))
            axis.plot(x, y, color=PALETTE[0], linewidth=line, alpha=1 if line > 1 else .6)
        axis.scatter(x, y, 60 * np.sqrt(whole["images"] / whole["images"].sum()), color=PALETTE[0])
        error = metrics.cell(exp, dataset, metrics.sizes[dataset][-1], "ece", "corrected")
        axis.plot([0, 1], [0, 1], color="#888", linewidth=.8, linestyle=":")
        axis.set_title("\n".join(textwrap.wrap(short_name(exp, facts), 26)), fontsize=8)
        axis.text(.04, .94, f"ECE {error.text()}", transform=axis.transAxes, fontsize=7.5, va="top")
        axis.set(xlim=(-.03, 1.03), ylim=(-.03, 1.03), xticks=(0, .5, 1), yticks=(0, .5, 1))
    for axis in axes.flat[max(len(exps) - columns, 0):len(exps)]:       # the lowest of its column
        axis.tick_params(labelbottom=True)
    figure.supxlabel("predicted probability", fontsize=9)
    figure.supylabel("share of positives", fontsize=9)
    return save(figure, path)


def read_logs(runs):
    """{(exp, "pretrain" or "finetune"): frame} of runs/<exp>/**/log.jsonl: its numbers, the run's seed, and
    what it chose its best epoch by (`select`)."""
    logs = {}
    for path in sorted(runs.glob("*/**/log.jsonl")):
        exp, part, *rest = path.relative_to(runs).parts
        lines, entries = path.read_text().splitlines(), []
        step = max(1, len(lines) // 2000)                    # a curve needs no more points; validation stays
        for number, line in enumerate(lines, 1):
            if number % step == 0 or '"val' in line:
                try:
                    entry = json.loads(line)
                    entries.append({key: v for key, v in entry.items() if isinstance(v, (int, float))})
                except (ValueError, AttributeError):
                    if number < len(lines):                  # a kill may cut the last line
                        fail(f"{path} line {number} is no JSON object; delete the line")
        if entries:
            frame = pd.DataFrame(entries).assign(seed=rest[0].removeprefix("seed"))
            frame["select"] = selection(path.with_name("run.json"))
            logs.setdefault((exp, part), []).append(frame)
    return {key: pd.concat(frames) for key, frames in logs.items()}


def selection(path):
    """What a run chose its best epoch by, "auc" or "loss", as its run.json says; None if that is silent."""
    try:
        return json.loads(path.read_text())["config"].get("select") if path.is_file() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is no record of a run with its config; remove it or run the stage again")


def chosen_run(log):
    """Seed of the run that validation would choose: the one with the highest val_auc of its exported epoch.

    classify.py exports the first epoch of the highest val_auc or of the lowest val_loss, as `select` says.
    None if no log tells. log: a frame of read_logs.
    """
    best = {}
    for seed, run in log.reset_index(drop=True).groupby("seed", sort=False):
        name, sign = {"auc": ("val_auc", 1), "loss": ("val_loss", -1)}.get(run["select"].iloc[0], ("", 1))
        if {name, "val_auc"} <= set(run) and run[name].notna().any():
            best[seed] = run.loc[(sign * run[name]).idxmax(), "val_auc"]
    best = pd.Series(best, dtype=float).dropna()
    return best.idxmax() if len(best) else None


def validation_auc(log):
    """Name of the log's column with the mean validation AUC, or None."""
    return next((key for key in ["val_auc", *log.columns] if key in log and re.match("val.*auc", key)), None)


def curves(logs, facts, path):
    """Pre-training loss, fine-tuning loss and validation AUC: mean over runs, band from lowest to highest."""
    panels = [("pretrain", lambda log: "loss", "step", "pre-training loss / its first value"),
              ("finetune", lambda log: "loss", "epoch", "fine-tuning loss"),
              ("finetune", validation_auc, "epoch", "validation AUC")]
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.4), layout="constrained")
    exps = sorted({exp for exp, part in logs if part in ("pretrain", "finetune")}, key=natural)
    handles = {}
    for axis, (part, column, x, title) in zip(axes, panels):
        axis.set(title=title, xlabel=x)
        for place, exp in enumerate(exps):
            log = logs.get((exp, part))
            if log is None or column(log) not in log or x not in log:
                continue
            y = log.dropna(subset=[column(log)]).groupby(x)[column(log)].agg(["mean", "min", "max"])
            y = y / y["mean"].iloc[0] if part == "pretrain" else y
            style = {**look(place), "markersize": 3, "markevery": max(1, len(y) // 10)}
            handles[short_name(exp, facts)], = axis.plot(y.index, y["mean"], **style)
            axis.fill_between(y.index, y["min"], y["max"], color=style["color"], alpha=.12, linewidth=0)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8, handlelength=4)
    return save(figure, path)


def pictures(runs):
    """(path, caption) of the last picture of each kind that each pre-training drew."""
    last = {}
    for path in sorted(runs.glob("*/pretrain/*.png"), key=natural):
        kind, _, epoch = path.stem.rpartition("_")
        exp, words = path.parts[-3], PICTURES.get(kind, kind)
        last[exp, kind] = path, f"{exp}, epoch {epoch.lstrip('0')}: {words}."
    return last.values()


# ---------------------------------------------------------------------------- the page

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2126;--soft:#5d6670;--line:#dde1e6;--tint:#f5f7f9;
--link:#0b5fa5;--holds:#0b6b4f;--contradicted:#b3401a;--undecided:#77663a}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e4e7ea;--soft:#9aa4ae;--line:#333a42;
--tint:#1d2227;--link:#7cc0ff;--holds:#5fd0a5;--contradicted:#ff9a70;--undecided:#d2bd7c}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:84rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:3.2rem 0 .6rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:2rem 0 .3rem}p,figcaption{max-width:46rem;margin:.5rem 0}a{color:var(--link)}
.note{border-left:4px solid var(--undecided);background:var(--tint);padding:.7rem 1rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin-top:1.2rem;font-size:.92rem}
.soft,small,figcaption{color:var(--soft);font-size:.88rem}
small{display:block;font-size:.76rem;line-height:1.35}
.scroll{overflow-x:auto;margin:.8rem 0}.box{border:1px solid var(--line);border-radius:6px}
table{border-collapse:separate;border-spacing:0;width:max-content;min-width:100%;font-size:.86rem;
font-variant-numeric:tabular-nums}
th,td{padding:.42rem .6rem;text-align:left;vertical-align:top;max-width:20rem;
border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;background:var(--tint)}tbody tr:last-child>*{border-bottom:0}
.number{white-space:nowrap}.missing{color:var(--soft)}.face{border-left:2px solid var(--line)}
.number i{display:block;white-space:normal;width:12rem}
.first{position:sticky;left:0;z-index:1;background:var(--paper);max-width:14rem}
td.first small{max-width:10rem;overflow-wrap:anywhere}
thead .first,.section th{background:var(--tint)}.section th,.not-run{color:var(--soft)}
.holds{color:var(--holds)}.contradicted{color:var(--contradicted)}.undecided{color:var(--undecided)}
figure{margin:1.2rem 0}img{display:block;width:100%;max-width:64rem;min-width:42rem;height:auto}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
.pictures figure{margin:0}.pictures img{min-width:0;width:auto;max-width:100%}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media(max-width:40rem){body{padding:1.4rem .9rem 3rem}h1{font-size:1.5rem}.first{max-width:8.5rem}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--tint:#f2f2f2}nav{display:none}
body{max-width:none;padding:0}.scroll{overflow:visible}table{width:100%;font-size:6.5pt}small{font-size:5.8pt}
h2,h3{break-after:avoid}tr,figure{break-inside:avoid}img{min-width:0}}
"""
READING = """<p>Each cell: the mean (standard deviation over runs) and, in smaller print, a 95 % interval, the
number <em>printed</em> in the paper, and Δ, our difference from it in standard errors of both together.
<b>Bold</b>: best of its column, ties included. “not measured”: metrics.csv has no such run; “undefined”: it
has, but without positive or negative images there is no such number; “over 4 labels”: such labels are left
out of the mean. The <em>paper face</em> repeats what the released code computes, the <em>corrected face</em>
is the textbook definition; where they agree in every cell, one stands for both. Pointing at a cell shows the
lines of metrics.csv behind it and what its interval is over. Intervals: """


def html_box(head, body):
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll box" tabindex="0">{table}</div>'


def html_cell(cell, source, css):
    words = {"run shown": "run of ", "validation's choice": "val. choice ", "printed": "printed ",
             "difference": "Δ ", "interval": "", "mean over": "over "}
    small = "".join(f"<small>{words[what]}{text}</small>" for what, text in cell.small_print().items())
    where = f"{source} line {', '.join(map(str, cell.lines))}" if cell.lines else ""
    where += f"; interval by {cell.resampled}" if cell.resampled else ""
    where = f' title="{escape(where)}"' if where else ""
    number = f"<b>{cell.text()}</b>" if cell.best else cell.text("not measured")
    return f'<td class="number{css}{"" if cell.runs else " missing"}"{where}>{number}{small}</td>'


def html_table(table, source, facts):
    """The table as HTML: both faces side by side, a section for the study's arms and one for all others."""
    width, edge = len(table.columns), [" face"] + [""] * (len(table.columns) - 1)
    words = {"both": "paper and corrected face, which agree in every cell"}
    faces = [words.get(face, f"{face} face") for face in table.faces]
    head = f'<th rowspan="2" class="first">{table.lead[0]}</th>'
    head += "".join(f'<th rowspan="2">{escape(name)}</th>' for name in table.lead[1:])
    head += "".join(f'<th class="face" colspan="{width}">{face}</th>' for face in faces)
    names = "".join(f'<th class="{css}">{escape(name)}</th>'
                    for _ in faces for name, css in zip(table.columns, edge))
    body, span = "", len(table.lead) + width * len(faces)
    for section, rows in table.sections():
        if len(table.sections()) > 1:
            body += f'<tr class="section"><th colspan="{span}">{section}</th></tr>'
        for row in rows:
            exp = row.lead[0].removesuffix(" (b)")
            about = short_name(exp, facts).removeprefix(exp) if width or section == OTHER else ""
            body += f'<tr><td class="first">{escape(row.lead[0])}<small>{escape(about)}</small></td>'
            body += "".join(f"<td>{escape(text)}</td>" for text in row.lead[1:])
            body += "".join(html_cell(cell, source, css) for face in table.faces
                            for cell, css in zip(row.cells[face], edge)) + "</tr>"
    return (f'<h3 id="table{table.number}">Table {table.number}. {escape(table.title)}</h3><p class="soft">'
            f"{escape(table.note)}</p>" + html_box(f"<tr>{head}</tr><tr>{names}</tr>", body))


def html_frame(frame):
    """A data frame as a scrolling table; long decimals are cut to four."""
    def row(cells, tag):
        texts = [f"{float(c):.4f}" if re.fullmatch(r"\d+\.\d{5,}", str(c)) else escape(str(c)) for c in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"
    return html_box(row([name.replace("_", " ") for name in frame.columns], "th"),
                    "".join(row(cells, "td") for cells in frame.itertuples(index=False)))


def html_picture(path, caption, widest=None):
    """A picture of the disk, inlined; a PNG is made at most `widest` pixels wide."""
    kind, data, caption = path.suffix[1:].replace("svg", "svg+xml"), path.read_bytes(), escape(caption)
    if widest:
        image, smaller = Image.open(path), io.BytesIO()
        image.thumbnail((widest, image.height))
        image.save(smaller, format="png")
        data = smaller.getvalue()
    image = f'<img alt="{caption}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    return (f'<figure><div class="scroll" tabindex="0">{image}</div><figcaption>{caption}</figcaption>'
            "</figure>")


def html_components(frame):
    """Standard errors from the choice of runs and of patients: an arm a row, a test set a column."""
    means = frame[frame["label"] == ""]
    sets = means[["dataset", "labels"]].drop_duplicates().itertuples(index=False, name=None)
    sets = {(name, size): TEST_SETS.get(name, (name,))[0] + f", {size} labels" * (name == "nih_test")
            for name, size in sets}
    columns = means[["exp", "dataset", "labels", "se_runs", "se_patients"]].itertuples(index=False, name=None)
    errors_of, body = {row[:3]: row[3:] for row in columns}, ""
    for exp in sorted(means["exp"].unique(), key=natural):
        body += f'<tr><td class="first">{escape(exp)}</td>'
        for key in sets:
            texts = [f"{float(error):.4f}" if error else "–" for error in errors_of.get((exp, *key), ())]
            largest = "" if "–" in texts else max(texts, default="")
            texts = [f"<b>{text}</b>" if text == largest else text for text in texts]
            body += f'<td class="number">{" · ".join(texts) or "–"}</td>'
        body += "</tr>"
    head = "".join(f"<th>{escape(name)}</th>" for name in sets.values())
    return html_box(f'<tr><th class="first">Exp.</th>{head}</tr>', body)


def html_detectable(frame):
    """detectable.csv with a head that says what it holds; without patients the number is a lower bound."""
    bound = frame["se_patients"].eq("") & frame["detectable"].ne("")
    frame = frame.map(lambda x: f"{float(x):.4f}" if re.fullmatch(r"\d*\.\d{5,}", x) else x or "–")
    frame["dataset"] = [TEST_SETS.get(name, (name,))[0] for name in frame["dataset"]]
    frame["detectable"] = ("≥ " + frame["detectable"] + ", runs alone").where(bound, frame["detectable"])
    return html_frame(frame.rename(columns={
        "dataset": "test set", "detectable": "difference found with 80 % power",
        "detectable_with_endless_runs": "the same with endless runs"}))


def effect_words(row):
    """Effect and interval of a claim: left minus right, or of spreads the logarithm of left over right."""
    ends = [f"{float(row[end]):.4f}" for end in ("ci_low", "ci_high") if row[end]]
    words = f"{float(row['effect']):+.4f}" + f" [{', '.join(ends)}]" * bool(ends) if row["effect"] else ""
    if not words or not row["left"].startswith("sd("):
        return words
    return f"log ratio {words}<br>ratio of standard deviations {np.exp(float(row['effect'])):.2f}"


def html_verdicts(frame):
    """The claims: a row a statement, a column a test set, a line a source (our runs, the published runs)."""
    marks = {"holds": "✓ holds", "contradicted": "✗ contradicted", "undecided": "? undecided",
             "not run": "not run"}
    counts = frame.groupby(["source", "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(marks), fill_value=0).rename_axis("judged on").reset_index()
    judged = frame[frame["verdict"] != "not run"]
    if len(judged):                                     # a source without any of the claims' arms: counts say it
        frame = frame[frame["source"].isin(judged["source"])]
    sets, body = [name for name in TEST_SETS if name in set(frame["testset"])], ""
    directions = {"1": ">", "-1": "<", "0": "against"}
    claims = frame.groupby(["family", "statement", "metric", "left", "sign", "right"], sort=False)
    for (family, statement, metric, left, sign, right), claim in claims:
        words = f"{family}: {left} {directions.get(sign, 'against')} {right}, {metric}"
        body += f'<tr><td class="first">{escape(statement)}<small>{escape(words)}</small></td>'
        for name in sets:
            body += '<td class="number">'
            for row in claim[claim["testset"] == name].to_dict("records"):
                lines = [effect_words(row), f"p = {float(row['p_holm']):.2g}" if row["p_holm"] else ""]
                lines = [line.replace("-", "−") for line in lines if line]
                lines += [f"<i>{escape(row['remark'])}</i>"] if row["remark"] else []
                body += (f'<span class="{row["verdict"].replace(" ", "-")}">{marks[row["verdict"]]}</span>'
                         f'<small>{"<br>".join([escape(row["source"]), *lines])}</small>')
            body += "</td>"
        body += "</tr>"
    head = "".join(f"<th>{TEST_SETS[name][0]}</th>" for name in sets)
    return (html_frame(counts) + "<p>Below: the direction claimed (&gt;, &lt;; against: none); left minus "
            "right, or for spreads over runs the logarithm of left over right; its 95 % interval; p adjusted "
            "by Holm in the claim’s family; remarks. Of the published runs only the spread over runs is "
            "known.</p>"
            + html_box(f'<tr><th class="first">Claim</th>{head}</tr>', body))


def test_sets(metrics):
    """Images, patients and positives of each test set, here and in the paper."""
    rows = []
    for name in metrics.datasets:
        words, place, printed = TEST_SETS.get(name, (name, "", ""))
        counts = [metrics.fact(name, what) for what in ("images", "patients")]
        positives = {label: metrics.fact(name, "positives", label) for label in metrics.labels(name)}
        groups = {head: metrics.fact(name, metric.replace("auc", "images", 1))
                  for metric, head in metrics.groups().items() if "=" in metric}
        rows.append({"Test set": words, "Location in the paper": place, "Images in the paper": printed,
                     **{what: "" if isnan(count) else f"{count:,.0f}"
                        for what, count in zip(("Images here", "Patients here"), counts)},
                     **{what: ", ".join(f"{k} {v:,.0f}" for k, v in counts.items() if v == v)
                        for what, counts in (("Positives here", positives), ("By group", groups)) if counts}})
    return pd.DataFrame(rows)


def prediction_files(predictions, metrics):
    """Which file each run's numbers come from, as a frame of exp, seed, dataset, file and SHA-256."""
    rows = []
    runs = metrics.frame[["exp", "seed", "dataset"]].drop_duplicates()
    for exp, seed, dataset in runs.itertuples(index=False):
        path = predictions / exp / "predictions" / f"seed{seed}" / f"{dataset}.csv"
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        rows.append({"exp": exp, "seed": seed, "dataset": dataset, "file": path, "sha256": digest})
    return pd.DataFrame(rows)


def page(title, notes, sections, sources):
    """The whole page. notes: texts; sections: {(id, head): html}; sources: the files that were read."""
    links = "".join(f'<a href="#{key}">{head}</a>' for key, head in [*sections, ("sources", "Sources")])
    body = "".join(f'<section><h2 id="{key}">{head}</h2>{html}</section>'
                   for (key, head), html in sections.items())
    read = [(path, path.read_bytes()) for path in sources]
    files = pd.DataFrame([(path, f"{len(data):,}", hashlib.sha256(data).hexdigest()[:16])
                          for path, data in read], columns=["File", "Bytes", "SHA-256"])
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in notes)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body><header><h1>{escape(title)}</h1>
<p>A rerun of “From pre-training to downstream performance: does domain-specific pre-training make sense?”
(Krones 2026, arXiv:2605.08819): models with different starting weights are fine-tuned on NIH ChestX-ray14 and
tested at several hospitals.</p>{notes}<nav>{links}</nav></header>
<main>{body}<section><h2 id="sources">Sources</h2>
<p>Every number was read from these files. <code>tables/table1.csv … table8.csv</code> name, cell by cell, the
lines of metrics.csv behind it; Markdown and LaTeX versions lie beside them, the figures in
<code>figures/</code>. The printed numbers are the paper’s (CC BY 4.0).</p>
{html_frame(files)}</section></main></body></html>
"""


def what_was_run(args, metrics, grid):
    """The first section: how much was run, Table 1, the test sets, Figure 1."""
    html = (f"<p>{len(metrics.exps)} experiments, {metrics.seeds.sum()} fine-tuned models, "
            f"{len(metrics.datasets)} test sets: {len(metrics.frame):,} rows of <code>"
            f"{escape(str(args.metrics))}</code>.</p>{grid}<h3>Test sets</h3>"
            + html_frame(test_sets(metrics)))
    drawn = [args.figure1] if args.figure1 else sorted(args.out.rglob("figure1.[ps][nv]g"))
    return html + (html_picture(drawn[0], "Figure 1. One example image of each dataset.") if drawn else "")


def intervals(table):
    """In words, what the intervals of a table's last face are over."""
    exps = {NESTED: {}, ALONE: {}}
    for row in table.rows:
        for cell in filter(lambda cell: cell.resampled, row.cells[table.faces[-1]]):
            exps[cell.resampled][row.key] = None
    words = " or ".join(f"by {how}" for how, keys in exps.items() if keys)
    return words + f" ({', '.join(exps[ALONE])})" * all(exps.values())


def across_hospitals(metrics, table, facts, folder):
    """How to read a cell, and Table 2 as a picture."""
    alone = f"by {ALONE}: what other seeds would change is not in them"
    nested = f"of AUCs (Tables 2 to 6) by {NESTED}, of an arm with one run by patients alone; of all else "
    html = f"{READING}{nested if metrics.intervals else ''}{alone}.</p>"
    if drawn := sites(table, facts, folder / "sites"):
        html += html_picture(drawn, f"Mean AUC over labels and runs, with 95 % interval {intervals(table)}; "
                             "hollow: printed in the paper (left out where the paper and the corrected face "
                             "differ).")
    return html


def both_figures2(by_number, facts, folder):
    """Figure 2 of the study's arms and of all others, in both faces."""
    words = {"paper": "paper face: (a) mean over runs, bars: sd; (b) to (d) the run with the best AUC on "
                      "these images",
             "corrected": "corrected face: mean over runs, bars: sd"}
    html = ""
    for section, face in ((section, face) for section in (STUDY, OTHER) for face in FACES):
        path = folder / f"figure2_{'study' if section == STUDY else 'other'}_{face}"
        if drawn := figure2(by_number, section, face, facts, path):
            html += html_picture(drawn, f"Figure 2. {section}; {words[face]}.")
    return html


def calibration(metrics, arms, facts, folder):
    """Reliability curves on the NIH test set, or on the first there is; empty without them."""
    dataset = "nih_test" if "nih_test" in metrics.datasets else metrics.datasets[0]
    drawn = reliability_curves(metrics, arms, dataset, facts, folder / "reliability")
    return drawn and (
        "<p>Of the images to which an arm gives a probability of 0.3, three in ten should have the finding. "
        "A curve below the diagonal promises too much, one above it too little.</p>" + html_picture(
            drawn, f"Reliability curves, {TEST_SETS.get(dataset, (dataset,))[0]}: all labels together, in 15 "
            "bins. Thick: all runs of an arm; thin: each run; larger dots: more images. ECE: mean of labels."
        ))


def learning(runs, logs, facts, folder):
    """Learning curves, and the last picture of each pre-training; empty without them."""
    html = html_picture(curves(logs, facts, folder / "curves"), "Learning curves, from "
                        f"{runs}/<exp>/**/log.jsonl; bands: lowest to highest run.") if logs else ""
    last = pictures(runs) if runs else []
    shown = "".join(html_picture(path, caption, widest=1200) for path, caption in last)
    return html + f'<div class="pictures">{shown}</div>' * bool(shown)


def compose(args, metrics, by_number, facts, logs, verdicts, beside):
    """Draw the figures and put the page together. verdicts: a frame or None; beside: {name: files}."""
    folder, notes = args.out / "figures", [args.note] if args.note else []
    table = {number: html_table(t, args.metrics.name, facts) for number, t in by_number.items()}
    frames = {name: show(pd.concat([read_csv(path, columns, "evaluate/compare.py") for path in beside[name]]))
              for name, show, columns in (("detectable", html_detectable, DETECTABLE),
                                          ("errata", html_frame, ())) if name in beside}
    if demo := [exp for exp in metrics.exps if exp.startswith(("demo.", "mini.", "nih."))]:
        notes.append(f"Stand-ins: {', '.join(demo)} were trained on drawn or miniature data, from starting "
                     "weights made here. They show that the chain works and say nothing about the question.")
    components = metrics.components
    sections = {
        ("run", "What was run"): what_was_run(args, metrics, table["1"]),
        ("sites", "Across hospitals"):
            across_hospitals(metrics, by_number["2"], facts, folder) + table["2"],
        ("claims", "The paper’s claims"): verdicts is not None and html_verdicts(verdicts),
        ("reliability", "Diseases, thresholds, referral"):
            both_figures2(by_number, facts, folder) + "".join(table[n] for n in "378A"),
        ("calibration", "Calibration"):
            calibration(metrics, [row.key for row in by_number["2"].rows], facts, folder),
        ("subgroups", "Subgroups"): table.get("B"),
        ("options", "Backbones, options, pre-training size"): "".join(table[n] for n in "456")
            + html_picture(figure3(by_number["6"], folder / "figure3"), "Figure 3. Pre-training size; "
                           "mean over runs, bars: sd; dashed: printed."),
        ("learning", "Learning curves and pictures"): learning(args.runs, logs, facts, folder),
        ("detectable", "What the test sets can tell"): "detectable" in frames and (
            "<p>The smallest difference in mean AUC between two arms that a two-sided test at the 5 % level "
            "finds with 80 % power, a mean over the pairs of arms (compare.py, detectable.csv). Of the "
            "published runs the patients are unknown: “≥ …, runs alone” would grow with their part.</p>"
            + frames["detectable"]),
        ("components", "Runs or patients"): components is not None and (
            "<p>The standard error of an arm’s mean AUC in two parts: what other runs would change · what "
            "other patients would change. <b>Bold</b>: the larger. –: unknown, of one run. More seeds "
            "lower the first, only more patients the second (compare.py, components.csv).</p>"
            + html_components(components)),
        ("errata", "Errata"): "errata" in frames and (
            "<p>Printed numbers and sentences that the author’s published runs contradict, recomputed by "
            "evaluate/compare.py.</p>" + frames["errata"])}
    sources = [args.metrics, *args.verdicts, *sum(beside.values(), []), *filter(None, [args.experiments]),
               *sorted((HERE / "reported").glob("table[1-8].csv"))]
    return page(args.title, notes, {head: html for head, html in sections.items() if html}, sources)


def main():
    args = options()
    for folder in filter(None, (args.predictions, args.runs)):
        if not folder.is_dir():
            fail(f"{folder} is no folder")
    grid = HERE.parent / "experiments.yaml"
    args.experiments = args.experiments or (grid if grid.is_file() else None)
    beside = {name: found for name in ("errata", "detectable", "components") if (
        found := [file for path in args.verdicts if (file := path.parent / f"{name}.csv").is_file()])}
    verdicts = [read_csv(path, VERDICTS, "evaluate/compare.py") for path in args.verdicts]
    logs = read_logs(args.runs) if args.runs else {}
    chosen = {exp: seed for (exp, part), log in logs.items()
              if part == "finetune" and (seed := chosen_run(log)) is not None}
    nested = [read_csv(path, COMPONENTS, "evaluate/compare.py") for path in beside.get("components", [])]
    nested = [part[part["source"] == "our runs"] for part in nested]
    nested = [part for part in nested if len(part)]
    metrics = Metrics(args.metrics, pd.concat(nested) if nested else None, chosen)
    facts = arm_facts(HERE / "reported", args.experiments, metrics.exps)
    printed = printed_numbers(HERE / "reported")
    dataset = "chexpert_valid" if "chexpert_valid" in metrics.datasets else metrics.datasets[0]
    tables = [*auc_tables(metrics, printed, facts), *reliability_tables(metrics, printed, facts, dataset),
              subgroup_table(metrics, facts)]
    by_number = {table.number: table for table in tables if table}
    try:
        for number, table in by_number.items():
            texts = {"md": markdown(table), "tex": latex(table), "csv": tidy(table, args.metrics.name)}
            for kind, text in texts.items():
                write(args.out / "tables" / f"table{number}.{kind}", text)
        if args.predictions:
            files = prediction_files(args.predictions, metrics)
            write(args.out / "tables" / "predictions.csv", files.to_csv(index=False, lineterminator="\n"))
        write(args.out / "report.html", compose(
            args, metrics, by_number, facts, logs, pd.concat(verdicts) if verdicts else None, beside))
    except OSError as error:
        fail(f"{args.out} cannot be written ({error.strerror}: {error.filename})")
    print(terminal(by_number["2"]))
    print(f"wrote {args.out / 'report.html'}, with tables/ and figures/ beside it")


if __name__ == "__main__":
    main()
