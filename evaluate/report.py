"""Put the study on one page: what was asked, what was run and the answers first, then tables and figures.

A cell: mean over labels and runs (sd over runs), 95 % interval, number printed in the paper (2605.08819).

    python evaluate/compare.py --metrics metrics.csv --out cmp                     two models of yours: this,
    python evaluate/report.py --metrics metrics.csv --verdicts cmp/verdicts.csv --out page        then this
    python evaluate/report.py --metrics results/metrics.csv --out results --runs runs --predictions runs \\
        --verdicts results/verdicts.csv results/published/verdicts.csv

Reads   metrics.csv; report.yaml (what stands where), report.*.html, report.css and reported/ beside this
        script; what the options name, with arms.csv, comparisons.csv and detectable.csv beside verdicts.csv
Writes  OUT/report.html, printed.html (the paper's tables), tables/*.csv and *.tex, figures/*.svg and *.png;
        stand-in numbers carry a mark, pictures of MIMIC, VinDr, unknown data stay out unless asked for
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
import textwrap
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
    add("--overlaps", type=Path, nargs="+", default=[], help="overlaps.csv of describe.py --overlap")
    add("--runs", type=Path, help="learning curves and pictures: <exp>/**/log.jsonl and <exp>/pretrain/*.png")
    add("--predictions", type=Path, help="curves: <exp>/predictions/seed<k>/<test set>.csv")
    add("--data", type=Path, help="packs: which are drawings, that may be shown; which have a fallback split")
    add("--baseline", help="arm that the first figure subtracts (2.2, else the first)")
    add("--arm", help="arm of the ROC, precision-recall and decision curves (3.4, else the last)")
    add("--with-pictures", action="store_true", help="embed them all; do not pass the page on")
    add("--experiments", type=Path, help="experiments.yaml, for what each arm is (default: this project's)")
    add("--title", default="Does domain-specific pre-training make sense?", help="of the page")
    parser.error = fail                 # one sentence, like every other mistake
    return parser.parse_args()


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take a second
    options()
import jinja2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import yaml  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
REPORTED = HERE / "reported"
SHOWN = yaml.safe_load((HERE / "report.yaml").read_bytes())
KEY = "exp dataset labels metric variant label threshold".split()           # of a cell
ENDS = ["ci_low", "ci_high"]
TEST_SETS = SHOWN["test sets"]                  # {name: as it is shown}
LOW_IS_GOOD = r"^[^[]*(?:fnr|fpr|ece|brier|calibration|risk|gap)"        # before the [group]
plt.rcParams.update(SHOWN["style"])
INK = plt.rcParams["text.color"]                # in an SVG it follows the reader's light or dark mode


# ------------------------------------------------------------------------------------------------ the numbers
def read_tables(paths, columns, numeric=()):
    """Tables of the same kind as one, None without a path; numeric columns: numbers, NaN where blank."""
    tables = []
    for path in paths:
        table = read_csv(path, [*columns, *numeric])
        for name in numeric:
            texts = table[name]
            table[name] = pd.to_numeric(texts, errors="coerce")
            wrong = texts[table[name].isna() & ~texts.isin(["", "nan"])]
            for row, text in wrong[:1].items():
                raise InputError(f"{path} line {row + 2}: {name} is '{text}'; expected a number or nothing")
        tables.append(table)
    return pd.concat(tables) if tables else None


def read_metrics(path):
    """metrics.csv, checked: value and interval as numbers, the rest as text, and the mark of each number."""
    frame = read_tables([path], [*KEY, "seed", "stand_in"], ["value", *ENDS])
    twice = frame.duplicated([*KEY, "seed"])
    for row, line in frame[twice][:1].iterrows():
        raise InputError(f"{path} line {row + 2}: {line.metric} of exp {line.exp}, seed {line.seed} on "
                         f"{line.dataset} stands there a second time; remove one of the two rows")
    saw = frame.exp.str.removesuffix("-ensemble").isin(SHOWN["saw NIH test"])
    saw &= frame.dataset == "nih_test"
    frame["mark"] = np.where(saw, "†", "")              # in this order the largest of runs is that of all
    frame["mark"] += np.where(frame.stand_in == "", "", "°")
    return frame


def mean_over_runs(frame, arms=None):
    """Cells: mean, sample sd and number of runs, mark, interval (of several runs: that of arms.csv)."""
    groups = frame.groupby(KEY, sort=False)
    cells = groups["value"].agg(value="mean", sd="std", runs="count")
    cells = cells.join(groups[[*ENDS, "mark"]].max())
    cells.loc[cells.runs > 1, ENDS] = np.nan            # those are of single runs
    if arms is not None:
        arms = arms.assign(variant="corrected").set_index(KEY)
        ours = cells.value.reindex(arms.index, fill_value=np.inf)
        gap = (arms.value - ours).abs()
        for exp, dataset, *_ in gap.index[gap > 1e-5][:1]:
            raise InputError(f"arms.csv beside the verdicts has a mean of exp {exp} on {dataset} that "
                             "metrics.csv has not; run evaluate/compare.py on it and give its verdicts first")
        cells.update(arms[ENDS])
    return cells


def best_runs(frame, labels):
    """Cells of variant "best": each arm's run with the best mean AUC here; labels: {test set: label set}."""
    means = frame.query("metric == 'auc_mean' and variant == 'paper' and labels == dataset.map(@labels)")
    means = means.dropna(subset="value")
    place = means.groupby(["exp", "dataset"]).value.idxmax()
    best = frame.loc[place, ["exp", "dataset", "seed"]]
    rows = frame.merge(best).sort_values("variant", ascending=False)        # "paper" before "corrected"
    rows = rows.assign(variant="best", sd=np.nan, runs=1).drop_duplicates(KEY)
    return rows.set_index(KEY)


def printed_numbers():
    """The numbers that the paper prints: texts by number of a table and KEY."""
    table = read_csv(REPORTED / "printed.csv").set_index(["number", *KEY])
    spread = " (" + table.sd + ")"
    table["printed"] = table.value + spread.where(table.sd != "", "")
    return table.printed


class Results:
    """Arms, test sets and cells of metrics.csv: a frame by KEY with value, interval and texts to show."""

    def __init__(self, frame, arms):
        self.frame = frame
        self.exps = frame.exp.unique()
        self.arms = [exp for exp in self.exps if not exp.endswith("-ensemble")]
        self.runs = frame.query("exp in @self.arms").groupby(["exp", "seed"]).ngroups
        names = frame.dataset.unique()
        names = [name for name in names if name != "nih_val"] or names              # for thresholds
        names = sorted(names, key=[*TEST_SETS, *names].index)
        self.datasets = {name: TEST_SETS.get(name, name) for name in names}
        self.main = "chexpert_valid" if "chexpert_valid" in names else names[0]
        self.labels = {}                                # that tables are about: the study's, or all of others
        for name, sizes in frame.query("dataset in @names").groupby("dataset").labels.agg(set).items():
            order = "5", "14", "all", ""
            if name not in TEST_SETS:
                order = "all", "14", "5", ""
            self.labels[name] = next(size for size in order if size in sizes)
        means = mean_over_runs(frame, arms)
        best = best_runs(frame, self.labels)
        self.cells = cells = pd.concat([means, best])
        four = "{:.4f}".format
        spread = " (" + cells.sd.map(four) + ")"
        spread = spread.where(cells.runs > 1, "")
        cells["text"] = cells.value.map(four) + spread
        cells.loc[cells.value.isna(), "text"] = "undefined"
        interval = "[" + cells.ci_low.map(four) + ", " + cells.ci_high.map(four) + "]"
        cells["interval"] = interval.where(cells.ci_low.notna(), "")


# ------------------------------------------------------------------------------------------------- the tables
def table_specs(results):
    """The tables of report.yaml, with columns for the test sets, diseases and groups that are there."""
    sets = {"NIH, 14 labels": {"dataset": "nih_test", "labels": "14", "metric": "auc_mean"}}
    for name, shown in results.datasets.items():
        sets[shown] = {"dataset": name, "metric": "auc_mean"}
    main, labels = results.main, results.labels[results.main]
    aucs = results.frame.query("metric == 'auc' and label != '' and dataset == @main")
    diseases = SHOWN["diseases"] if labels == "5" else aucs.label.unique()
    diseases = {label: {"labels": "", "label": label} for label in diseases}
    columns = {"test sets": sets, "diseases": diseases}
    shown = results.frame.query("dataset == @main and labels == @labels")
    shown = shown.groupby("metric").value.first().map("{:.4f}".format)
    negative = [shown.get(f"always_negative_{kind}accuracy", "unknown") for kind in ("", "subset_")]
    for spec in SHOWN["tables"]:
        yield spec | {"title": spec["title"].format(results.datasets[main]),
                      "note": spec["note"].format(*negative),
                      "columns": columns.get(str(spec["columns"]), spec["columns"])}
    metrics = results.frame.metric.drop_duplicates()
    groups = metrics.str.extract(r"^auc\[(\w+)=(.+)\]$").dropna()
    groups = groups.sort_values(0, kind="stable").to_numpy()        # ages as metrics.py has them
    parts = {f"{attribute} {group}": f"[{attribute}={group}]" for attribute, group in groups}
    parts |= {f"{attribute}: gap": f"_gap[{attribute}]" for attribute, _ in groups}
    youden = metrics.str.startswith("fnr_youden[").any()
    for dataset, shown in results.datasets.items():
        for spec in SHOWN["groups"]:
            if spec.get("youden", youden) == youden:
                metric = spec["metric"]
                yield spec | {"number": f"B_{dataset}_{metric}", "title": spec["title"].format(shown),
                              "columns": {head: {"metric": metric + part} for head, part in parts.items()},
                              "place": {"dataset": dataset, **spec.get("place", {})}}


def places(results, spec):
    """The places of a table's cells: dicts of KEY, and the table's number, the row's head and the column."""
    same = {"dataset": results.main, "variant": "corrected", "label": "", "threshold": ""}
    same |= spec.get("place", {})
    exps = results.exps if "ensembles" in spec else results.arms
    arms = re.compile(spec.get("arms", ".*"))
    for head, metric in spec.get("rows", {"": "auc"}).items():
        for exp in filter(arms.fullmatch, exps):
            for column, place in spec["columns"].items():
                place = {**same, "metric": metric, **place, "exp": exp}
                place.setdefault("labels", results.labels.get(place["dataset"]))
                place |= {"number": spec["number"], "head": head, "column": column}
                yield place


def fill_tables(results, specs):
    """The cells of all tables in a frame, only rows and columns with a number; best: of its column."""
    grid = [place for spec in specs for place in places(results, spec)]
    grid = pd.DataFrame(grid).join(results.cells, on=KEY)
    grid = grid.join(printed_numbers(), on=["number", *KEY])
    drawn = grid.mark.str.contains("°", na=True)        # what was drawn has no printed number
    grid.loc[drawn | grid.value.isna(), "printed"] = ""
    low = grid.metric.str.contains(LOW_IS_GOOD)
    score = grid.value.round(4) * (1 - 2 * low)
    contest = score.groupby([grid.number, grid.column, grid.metric])
    several = contest.transform("count") > 1
    grid["best"] = several & (score == contest.transform("max"))
    grid["there"] = grid.text.notna()
    row = grid.groupby(["number", "head", "exp"]).there.transform("any")
    column = grid.groupby(["number", "column"]).there.transform("any")
    texts = ["text", "interval", "printed", "mark"]
    grid[texts] = grid[texts].fillna("")
    return grid[row & column]


# ------------------------------------------------------------------------------------------------ the figures
def data_uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def save(figure, path, legend=0):
    """Write SVG and PNG, a legend of so many columns; returns the SVG's data URI, None without data."""
    if not any(len(line.get_xdata()) for axis in figure.axes for line in axis.lines):
        return plt.close(figure)
    entries = {}
    for axis in figure.axes:
        lines, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, lines))
    if legend:
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=legend)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    svg = svg.getvalue().replace(INK, "currentColor")
    svg = svg.replace("<defs>", SHOWN["ink"] + "<defs>", 1).encode()
    write(path.with_suffix(".svg"), lambda file: file.write(svg))
    write(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", facecolor="white"))
    plt.close(figure)
    return data_uri("svg+xml", svg)


def differences(pairs, baseline, labels):
    """Mean AUC of an arm less the baseline's: exp, dataset, effect, ci_low, ci_high, of comparisons.csv."""
    pairs = pairs.query("metric == 'auc_mean' and labels == dataset.map(@labels)")
    turned = pairs.rename(columns={"left": "right", "right": "left"})
    turned[["effect", *ENDS]] = -pairs[["effect", "ci_high", "ci_low"]].to_numpy()
    found = pd.concat([pairs, turned]).query("right == @baseline")
    return found.rename(columns={"left": "exp"})


def difference_figure(found, results, names, baseline, path, narrow):
    """Difference in AUC to the baseline, a row an arm: a panel a test set, or (narrow) all in one panel."""
    exps = [exp for exp in results.arms if exp in set(found.exp)]
    n = len(results.datasets)
    panels, width, height = n, 12.4, .22
    if narrow:
        panels, width, height = 1, 4, .3
    size = width, .9 + height * len(exps)
    figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
    for place, (dataset, shown) in enumerate(results.datasets.items()):
        axis = axes[0, place % panels]
        axis.axvline(0, color=INK, linewidth=.8)
        axis.set_title("" if narrow else shown)
        rows = found.query("dataset == @dataset and exp in @exps")
        errors = [rows.effect - rows.ci_low, rows.ci_high - rows.effect]
        shift = .8 / n * (place - (n - 1) / 2)
        y = rows.exp.map(exps.index) + shift * narrow
        axis.errorbar(rows.effect, y, xerr=errors, fmt="o", color=f"C{place}", label=shown)
    shown = [textwrap.fill(exp, 24) if narrow else f"{exp} {names[exp]}" for exp in exps]
    axis.set_yticks(range(len(exps)), shown)
    axis.set_ylim(len(exps) - .5, -.5)                  # the first on top
    axes[0, panels // 2].set_xlabel(f"difference in AUC to {baseline}, 95 % interval")
    return save(figure, path, legend=3 * narrow)


def draw_line(axis, x, cells, label):
    """The values of cells and their 95 % intervals, in the next style."""
    errors = np.abs([cells.ci_low - cells.value, cells.ci_high - cells.value])
    axis.errorbar(x, cells.value, errors, elinewidth=.6, label=label)


def disease_figure(results, grid, names, path):
    """Figure 2: the lines of single arms in the tables of diseases, thresholds and referral."""
    exps = results.arms[:SHOWN["lines"]]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6))
    for axis, panel in zip(axes.flat, SHOWN["figure 2"]):
        cells = grid.query("number == @panel['table'] and head == @panel['head']")
        columns = cells.column.unique()
        ticks = list(columns[:6])
        shown = panel["x"] if len(columns) < 7 else f"6 of {len(columns)}"
        axis.set(title=panel["title"], xlabel=shown)
        axis.set_xticks(range(len(ticks)), ticks, rotation=15 * any(len(tick) > 13 for tick in ticks))
        for place, exp in enumerate(exps):
            line = cells.query("exp == @exp and column in @ticks")
            shift = (place + .5) / len(exps) - .5               # side by side
            x = line.column.map(ticks.index) + .5 * shift
            draw_line(axis, x, line, f"{exp} {names[exp]}")
    return save(figure, path, legend=2)


def size_figure(grid, names, path):
    """Figure 3: AUC over the number of pre-training images, a line a strategy."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    cells = grid.query("number == '6' and exp.str.contains(r'^4\\.\\d\\.1-')")
    sizes = cells.exp.str.extract(r"-(\d+)k")[0].astype(int)
    cells = cells.assign(size=sizes).sort_values("size")
    for _, line in cells.groupby(cells.exp.str.slice(0, 5)):                # 4.1.1-50k
        draw_line(axis, line["size"], line, names[line.exp.iloc[0]])
    axis.set(xlabel="thousands of pre-training images", ylabel="AUC, NIH test, 14 labels")
    return save(figure, path, legend=3)


def pooled_bins(results):
    """Reliability bins of all labels and runs together by arm and threshold: images, means of p and of y."""
    rows = results.frame.query(
        "dataset == @results.main and exp in @results.arms and metric.str.startswith('reliability_')")
    rows = rows.astype({"threshold": float})
    rows["metric"] = rows.metric.str.slice(12)
    index = ["exp", "threshold", "seed", "label"]
    bins = rows.pivot(index=index, columns="metric", values="value")
    images = bins.pop("images")
    sums = bins.mul(images, axis=0).assign(images=images)
    sums = sums.groupby(index[:2]).sum().query("images > 0")
    for name in ("predicted", "observed"):
        sums[name] /= sums.images
    return sums


def reliability_figure(results, path):
    """Share of positives against the predicted probability, pooled over labels and runs: a panel an arm."""
    if "reliability_images" not in set(results.frame.metric):
        return None
    bins = pooled_bins(results)
    rows = -(-len(results.arms) // 5)
    figure, axes = plt.subplots(rows, 5, figsize=(11.4, 2.3 * rows), sharex=True, sharey=True)
    for axis, exp in zip(axes.flat, results.arms):
        curve = bins.query("exp == @exp")
        areas = 60 * np.sqrt(curve.images / curve.images.sum())
        axis.axline((0, 0), (1, 1), color="#888", linewidth=.8)
        axis.plot(curve.predicted, curve.observed, marker="")
        axis.scatter(curve.predicted, curve.observed, areas)
        axis.set_title(exp)
    for axis in axes.flat[len(results.arms):]:
        axis.remove()
    figure.supxlabel("predicted probability")
    figure.supylabel("share of positives")
    return save(figure, path)


def net_benefit(y, p, thresholds):
    """TP/n - FP/n * t / (1 - t) of p > t, for thresholds t [T]; y 0 or 1, p: [n] (Vickers & Elkin 2006)."""
    harm = thresholds / (1 - thresholds)
    gain = np.where(y[:, None], 1, -harm)
    return (gain * (p[:, None] > thresholds)).mean(0)


def decision_figure(folder, exp, seeds, dataset, path):
    """ROC, precision-recall and decision curves (mean over labels) of an arm's mean probability over runs."""
    files = [file for seed in seeds for file in folder.glob(f"{exp}/predictions/seed{seed}/{dataset}.csv")]
    if not files:
        return None
    from sklearn.metrics import precision_recall_curve, roc_curve
    runs = [read_csv(file, ["path"]).set_index("path") for file in files]
    table = pd.concat(runs).filter(regex="^(true|prob)_").apply(pd.to_numeric, errors="coerce")
    known = (table >= 0) & (table <= 1)                         # others are unknown
    table = table.where(known).groupby("path").mean()
    figure, (roc, recalls, decision) = plt.subplots(1, 3, figsize=(12, 4))
    thresholds, benefits = np.linspace(.01, .6, 60), []
    for label in table.filter(regex="^true_").columns.str.removeprefix("true_"):
        both = table.reindex(columns=[f"true_{label}", f"prob_{label}"]).dropna()
        y, p = both.to_numpy().T
        if len(set(y)) == 2:
            precision, recall, _ = precision_recall_curve(y, p)
            fpr, tpr, _ = roc_curve(y, p)
            roc.plot(fpr, tpr, marker="", label=label)
            recalls.plot(recall, precision, marker="")
            everybody = net_benefit(y, np.ones(len(y)), thresholds)
            benefits.append([net_benefit(y, p, thresholds), everybody])
    if not benefits:
        return plt.close(figure)
    model, everybody = np.mean(benefits, 0)
    decision.plot(thresholds, model, "-", color=INK, label="model")
    decision.plot(thresholds, everybody, ":", color=INK, label="treat all")
    decision.axhline(0, color=INK, linewidth=.8, label="treat none")
    decision.set_ylim(-.05, None)
    for axis, words in zip(figure.axes, SHOWN["curves"]):
        axis.set(**words)
    return save(figure, path, legend=6)


def read_logs(runs):
    """runs/<exp>/**/log.jsonl as one frame; a last line that a kill has cut is left out."""
    entries = []
    for path in sorted(runs.glob("*/**/log.jsonl")):
        exp, part, *_ = path.relative_to(runs).parts
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                entries.append(dict(entry, exp=exp, part=part, run=path))
            except (ValueError, TypeError):
                if number < len(lines):
                    raise InputError(f"{path} line {number} is no JSON object; delete the line") from None
    numbers = ["epoch", "loss", "val_auc"]
    logs = pd.DataFrame(entries, columns=["exp", "part", "run", *numbers])
    return logs.assign(**logs[numbers].apply(pd.to_numeric, errors="coerce"))


def learning_figure(logs, arms, path):
    """Losses and validation AUC by epoch: mean over runs, band from lowest to highest; arms come first."""
    known = [*arms, *logs.exp]
    exps = sorted(logs.exp.unique(), key=known.index)[:SHOWN["lines"]]
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.2))
    for axis, (title, part, column) in zip(axes, SHOWN["learning"]):
        axis.set(title=title, xlabel="epoch")
        for exp in exps:
            own = logs.query("exp == @exp and part == @part").dropna(subset=column)
            means = own.groupby(["run", "epoch"])[column].mean()
            y = means.unstack().dropna(axis="columns")              # [runs, epochs], as long as the shortest
            if part == "pretrain":
                y /= y.mean().head(1).sum()
            line, = axis.plot(y.mean(), label=exp, markevery=.1)
            axis.fill_between(y.columns, y.min(), y.max(), color=line.get_color(), alpha=.12)
    return save(figure, path, legend=8)


def packs_with(text, data, name):
    """Names of the packs in data, a folder or None, whose JSON file of this name has this text."""
    files = data.glob(f"*/{name}") if data else ()
    return [file.parent.name for file in files if text in file.read_bytes()]


def pictures(runs, packs, drawn, allowed):
    """([(caption, data URI)], arms left out): the last picture of each kind; packs: {arm: its pack}."""
    last, shown, left_out = {}, [], []
    for path in sorted(runs.glob("*/pretrain/*.png")):
        last[path.parts[-3], path.stem.rpartition("_")[0]] = path
    for (exp, kind), path in last.items():
        pack = packs.get(exp)
        if allowed or pack in drawn or pack and not re.search("mimic|vindr", pack):
            shown.append((f"{exp}: {kind}", data_uri("png", path.read_bytes())))
        else:
            left_out.append(exp)
    return shown, left_out


def read_experiments(path, arms):
    """({arm: what it is in a few words}, {arm: data of its pre-training or ""}) by experiments.yaml."""
    names, packs = {}, {}
    try:
        grid = dict(yaml.safe_load(path.read_text()))
        for arm in (*grid, *arms):
            row = grid.get(arm) or {}
            names[arm] = row.get("about", "")
            while "pretrain" not in row and str(row.get("init")).startswith("exp:"):
                row = grid.get(row["init"][4:]) or {}       # the row whose weights it starts from
            packs[arm] = row.get("pretrain", {}).get("dataset", "")
    except Exception as error:
        raise InputError(f"{path} cannot be read as YAML ({' '.join(str(error).split())})") from None
    return names, packs


def read_claims(path):
    """{id: {test set or "all": a row of verdicts.csv}} of the claims that have a verdict."""
    claims = {}
    verdicts = read_csv(path, ["id", "testset", "verdict", "effect", *ENDS, "source"])
    for name, rows in verdicts.groupby("id", sort=False):
        if (rows.verdict != "not run").any():
            rows = rows.set_index("testset").to_dict("index")
            claims[name] = {"all": next(iter(rows.values())), **rows}
    return claims


def beside(paths, name):
    """The files called `name` beside those of the paths, if they have rows: one arm has no pairs."""
    files = [path.with_name(name) for path in paths]
    return [file for file in files if file.is_file() and file.read_text().count("\n") > 1]


def compose(args):
    """What the template shows of the runs; figures are drawn on the way."""
    intervals = beside(args.verdicts[:1], "arms.csv")
    intervals = read_tables(intervals, [*KEY[:4], "label", "threshold"], ["value", *ENDS])
    results = Results(read_metrics(args.metrics), intervals)
    arms = results.arms
    args.baseline = args.baseline or ("2.2" if "2.2" in arms else arms[0])
    args.arm = args.arm or ("3.4" if "3.4" in arms else arms[-1])
    for arm in (args.baseline, args.arm):
        if arm not in arms:
            raise InputError(f"{args.metrics} has no arm '{arm}'; known: {', '.join(arms)}")
    names, packs = read_experiments(args.experiments or HERE.parent / "experiments.yaml", arms)
    specs = list(table_specs(results))
    grid = fill_tables(results, specs)
    page = vars(args) | {
        "results": results, "names": names, "packs": packs, "shown": SHOWN,
        "own": not any(names[arm] for arm in arms),             # somebody's, outside the grid
        "cut": packs_with(b'"fallback_split": true', args.data, "index.json"),
        "set_names": results.datasets,
        "tables": [(spec, grid.query("number == @spec['number']")) for spec in specs],
        "study": list(read_csv(REPORTED / "table1.csv").exp),
        "claims": [read_claims(path) for path in args.verdicts],
        "overlaps": read_tables(args.overlaps, ["pack", "other", "images"], ["equal", "near"]),
        "errata": read_csv(REPORTED / "errata.csv").rename(columns=str.capitalize),
        "detectable": read_tables(beside(args.verdicts, "detectable.csv"), ["dataset", "detectable"]),
    }
    page["sources"] = {path: hashlib.sha256(path.read_bytes()).hexdigest()
                       for path in (args.metrics, *args.verdicts, *args.overlaps)}
    pairs = beside(args.verdicts[:1], "comparisons.csv")
    pairs = read_tables(pairs, ["metric", "labels", "left", "right"], ["effect", *ENDS])
    logs = args.runs and read_logs(args.runs)
    names = dict(names)                                 # of the figures; the tables have marks
    for exp in results.frame.query("stand_in != '' and exp in @arms").exp.unique():
        names[exp] += " (stand-ins)"
    folder = args.out / "figures"                       # written once everything is read
    if args.predictions:
        seeds = results.frame.query("exp == @args.arm").seed.unique()
        page["curves"] = decision_figure(args.predictions, args.arm, seeds, results.main, folder / "curves")
    if args.runs:
        page["learning"] = learning_figure(logs, arms, folder / "learning")
        drawn = packs_with(b'"stand_in": "', args.data, "pack.json")
        page["pictures"] = pictures(args.runs, packs, drawn, args.with_pictures)
    if pairs is not None:
        found = page["found"] = differences(pairs, args.baseline, results.labels)
        for kind in ("wide", "narrow") if len(found) else ():
            path = folder / f"differences_{kind}"
            page[kind] = difference_figure(found, results, names, args.baseline, path, kind == "narrow")
    page["figure2"] = disease_figure(results, grid, names, folder / "figure2")
    page["figure3"] = size_figure(grid, names, folder / "figure3")
    page["reliability"] = reliability_figure(results, folder / "reliability")
    return page


def write_tables(tables, folder):
    """The tables for spreadsheets and LaTeX; Table 2 on the terminal."""
    for spec, cells in tables:
        if len(cells):
            lead = {"exp": "Arm"}
            if "of" in spec:
                lead["head"] = spec["of"]
            cells = cells.assign(shown=cells.text + cells.mark)
            frame = cells.set_index([*lead, "column"]).shown.unstack(sort=False)
            frame = frame.reset_index().rename(columns=lead)
            name = f"table{spec['number']}"
            caption = re.sub("([&%$#_{}])", r"\\\1", spec["title"])
            latex = frame.to_latex(index=False, escape=True, caption=caption, label=f"tab:{name}")
            latex = latex.replace("<", "$<$").replace(">", "$>$")           # bare they are set as ¡ and ¿
            for kind, text in (("csv", frame.to_csv(index=False)), ("tex", latex)):
                write(folder / f"{name}.{kind}", lambda file: file.write(text.encode()))
            if spec["number"] == "2":
                print(spec["title"], frame.to_string(index=False), sep="\n")


def main():
    args = options()
    try:
        for folder in (args.predictions, args.runs):
            if folder and not folder.is_dir():
                raise InputError(f"{folder} is no folder")
        page = compose(args)
        write_tables(page["tables"], args.out / "tables")
        tables = {path.stem: read_csv(path) for path in REPORTED.glob("table*.csv")}
        printed = {"title": "The printed tables", "set_names": TEST_SETS, "printed": tables,
                   "claims": page["claims"]}
        loader = jinja2.FileSystemLoader(HERE)
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
        for name, content in (("printed.html", printed), ("report.html", page)):
            html = environment.get_template("report.template.html").render(content).encode()
            write(args.out / name, lambda file: file.write(html))
    except InputError as mistake:
        fail(mistake)
    print(f"wrote {args.out / 'report.html'}, with printed.html, tables/ and figures/ beside it")


# ------------------------------------------------------------------------------------------ shared by scripts
# --- begin copy: files ---
class InputError(Exception):
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
        raise InputError(f"{path} is no CSV table with a header row ({problem}); make it again") from None
    for place, name in enumerate(header, 1):
        if not name.strip() or header.count(name) > 1:
            raise InputError(f"{path}: column {place}, '{name}', has no name of its own; name or delete it")
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


if __name__ == "__main__":
    main()
