"""Compare arms: differences with 95 % intervals over runs and patients, and verdicts on the study's claims.

An interval is effect +- t * error, of a difference within -1 and 1; error^2 is the variance from the choice
of runs (seeds) plus that from the choice of patients; of published and printed numbers only the runs are
known: "seeds only". In simulations it covered the truth in 95 to 97 % for pairs of arms with 2, 3 or 5 runs,
in 88, 92 and 94 % for one arm where runs dominate; that of a single run is over patients.

    python evaluate/compare.py --metrics metrics.csv --arms a b                two models of yours
    python evaluate/compare.py --metrics results/metrics.csv --out results     all arms, the study's claims
    python evaluate/compare.py --reported --out results/published              claims on the published numbers

Reads   metrics.csv and draws.npz beside it, or reported/raw_runs_auc.csv, printed.csv; claims.csv, table2.csv
Writes  verdicts.csv     a row per claim and test set, and one over all: verdict, the deciding comparison
        arms.csv         a row per arm, metric in draws.npz: mean, sd, interval, standard errors
        comparisons.csv  a row per pair of arms and AUC; p_holm: over the pairs of one
        detectable.csv   a row per test set, labels: the smallest difference detected with 80 % power
        two_arms.csv     with --arms, instead: a row per metric of both

Claims: test, metric, test sets (blank-separated), left and right arms (separated by "|"), margin.
    greater, every   left > right everywhere         not_every  left clearly less somewhere
    highest, lowest  left above, below each right    most       left > right in more than half of the arms
    no_gain          left - right below the margin   no_winner  no arm beats all others on every test set
Operands: arm 3.4, label 3.4:Edema, test set 3.4@nih_test, difference 2.2-2.1, offset 3.4:Edema+0.20, random
referral 3.4:random, always_negative, sd over runs sd(ood). Metric auc_mean (5), auc_mean14, auc_meanall: the
mean over these labels; fnr@0.3, fnrall@0.3: at a threshold; a-b: a left and b right; labels: auc:A-B.
"""

import argparse
import csv
import os
import re
import signal
import sys
import zipfile
from collections import defaultdict
from itertools import combinations, permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import nctdtrinc, stdtr, stdtrit

REPORTED = Path(__file__).resolve().parent / "reported"
SAW_TEST = re.compile(r"(3\.[12]b?|0\.1\.[567]b?|c\.8\.[567][ab])(-ensemble)?")      # as in report.yaml
SAW_REMARK = ("an arm saw NIH test images in pre-training, without labels (3.1 and 3.2 22,772 of 25,596; "
              "whether the paper's 0.1.5-0.1.7 did is unknown)")
FOUR_LABELS = "Atelectasis Cardiomegaly Consolidation Effusion".split()
TESTS = "greater every not_every no_gain highest lowest no_winner most".split()
KEY = ["labels", "metric", "label", "threshold"]
ENDS = ["ci_low", "ci_high"]
INTERVAL = ["effect", *ENDS, "p"]
SHOWN = ["id", "statement", "verdict", "effect", *ENDS, "p_holm", "source"]         # on the terminal
CLAIM = "id family place ours statement test metric testsets left right margin".split()
VERDICT = """id family place ours statement test metric testset left right margin verdict effect ci_low
    ci_high p p_holm decided_by rank source remark""".split()
ARMS = """exp dataset labels metric label threshold runs value sd ci_low ci_high se_runs se_patients
    freedom source""".split()
PAIRS = """dataset labels metric label threshold left right effect ci_low ci_high p p_holm se_runs
    se_patients freedom source""".split()
TWO = ["dataset", *KEY, "left_value", "right_value", *INTERVAL, "remark", "source"]
DETECTABLE = "dataset labels images patients pairs se_runs se_patients detectable source".split()
ARM = r"[A-Za-z0-9_.]+(?:-\d+k|-ensemble)?"             # 3.4, 0.1.7b, 4.2.1-100k, 3.4-ensemble
OPERAND = r"(ARM)(?::([^@+-]+))?(?:@(\w+))?(?:-(ARM))?(\+\d*\.?\d+)?"  # arm:part@test set-arm+offset
METRIC = re.compile(r"([a-z_]+?)(\d*|all)(?:@(\d*\.?\d+))?")     # name, labels of a mean, threshold
REFERRED = {"uncertain": "oracle_auc", "random": "random_referral_auc"}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# ------------------------------------------------------------------------------------------------ statistics
class Arm(NamedTuple):
    """One metric of one arm on one test set; NaN or None: unknown."""
    mean: float
    sd: float                       # over runs, sample standard deviation
    runs: int
    run_variance: float             # of the mean, from the choice of runs
    source: str
    resampled: np.ndarray | None    # the mean in each resample of patients, float [B]
    rows: dict                      # {seed: float [1 + B]}: the value of a run, then its resampled values


def make_arm(rows, source="our runs"):
    """An Arm from the rows of its runs, all on the same resamples of patients."""
    table = np.array(list(rows.values()))               # [R, 1 + B]
    values, draws = table[:, 0], table[:, 1:]
    runs = len(table)
    sd = values.std(ddof=1) if runs > 1 else np.nan
    run_variance = sd ** 2 / runs
    resampled = draws.mean(0) if draws.size else None
    if runs > 1 and draws.size:
        # The spread of runs includes their interaction with patients, as the resamples do: subtract it once
        interaction = np.nanvar(draws - resampled, axis=1).sum() / (runs - 1)
        run_variance = max(run_variance - interaction / runs, 0)
    return Arm(values.mean(), sd, runs, run_variance, source, resampled, rows)


def combine(terms):
    """The Arm of sum(sign * value) by run, over seeds that all have; None without. terms: [(sign, Arm)]."""
    _, first = terms[0]
    rows = {}
    for seed in first.rows:
        if all(seed in arm.rows for _, arm in terms):
            rows[seed] = sum(sign * arm.rows[seed] for sign, arm in terms)
    return make_arm(rows, first.source) if rows else None


def estimate(terms, offset=0.0):
    """The sum of sign * mean less an offset: effect, 95 % interval, p for "it is 0" and standard errors.

    terms: [(sign, Arm)]. Student's t with Satterthwaite's degrees of freedom: R - 1 for the runs of an arm,
    unlimited for patients, no fewer than of the arm with the fewest runs; without resamples this is Welch's
    test. Of one run it is over patients alone.
    """
    effect = sum(sign * arm.mean for sign, arm in terms) - offset
    run_variances = [arm.run_variance for _, arm in terms]
    variance, patient_variance = sum(run_variances), np.nan
    if all(arm.resampled is not None for _, arm in terms):
        patient_variance = np.nanvar(sum(sign * arm.resampled for sign, arm in terms))
        variance = np.nansum(run_variances) + patient_variance
    several = [arm for _, arm in terms if arm.runs > 1]
    denominator = sum((arm.sd ** 2 / arm.runs) ** 2 / (arm.runs - 1) for arm in several)
    freedom = np.inf
    if denominator:
        fewest = min(arm.runs for arm in several)
        freedom = max(variance ** 2 / denominator, fewest - 1)
    error = np.sqrt(variance) if variance > 1e-24 else np.nan           # without any spread nothing is known
    margin = stdtrit(freedom, 0.975) * error
    p = 2 * stdtr(freedom, -abs(effect) / error)
    return {"effect": effect, "ci_low": effect - margin, "ci_high": effect + margin, "p": p,
            "se_runs": np.sqrt(sum(run_variances)), "se_patients": np.sqrt(patient_variance),
            "freedom": freedom}


def holm(p):
    """Holm's adjusted p-values (1979) as a Series; a comparison without data (NaN) counts as p = 1."""
    ordered = pd.Series(p).fillna(1).sort_values()
    steps = ordered * np.arange(len(ordered), 0, -1)
    return steps.cummax().clip(upper=1).sort_index()


# ---------------------------------------------------------------------------------------------------- numbers
# Below, arms is {cell: Arm}, cell is (exp, test set, key), and key is "labels|metric|label|threshold".
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


def read_runs(path):
    """(arms, {}, sizes of the test sets) of metrics.csv and draws.npz beside it; arms: {cell: Arm}."""
    frame = read_csv(path, ["exp", "seed", "dataset", *KEY, "variant", "value", "stand_in"])
    file = path.with_name(f"{path.stem}.draws.npz".removeprefix("metrics."))
    try:
        drawn = dict(np.load(file))
        frame["number"] = pd.to_numeric(frame["value"])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        fail(f"{path} or {file} is not as evaluate/metrics.py writes it ({problem}); run it again")
    frame["key"] = ["|".join(names) for names in frame[KEY].to_numpy()]
    runs = defaultdict(dict)
    kept = frame.query("variant == 'corrected' and value != ''")
    for (exp, seed, dataset), rows in kept.groupby(["exp", "seed", "dataset"], sort=False):
        name = f"{exp}/{seed}/{dataset}"
        if name not in drawn:
            fail(f"{file} lacks exp {exp}, seed {seed}, {dataset}; run evaluate/metrics.py again")
        values = dict(zip(rows["key"], rows["number"]))
        for key, draws in zip(drawn[f"{name}/rows"], drawn.pop(name)):
            if key in values:
                runs[exp, dataset, key][seed] = np.append(values[key], draws)
    marks = frame.groupby(["exp", "dataset"])["stand_in"].max()
    arms = {cell: make_arm(rows, "stand-ins" if marks[cell[:2]] else "our runs")
            for cell, rows in runs.items()}
    counts = frame.query("metric in ['images', 'patients']")
    return arms, {}, counts.pivot_table("value", "dataset", "metric", "first")


def read_reported():
    """(arms of the author's published runs, arms as printed in the tables, no sizes)."""
    runs, printed = defaultdict(dict), {}
    for row in read_csv(REPORTED / "raw_runs_auc.csv").itertuples():
        mean = row.label == "mean"
        key = f"{row.classes}|auc_mean||" if mean else f"|auc|{row.label}|"
        # Left out: an AUC without positives; a label of 14-class runs, for ViTs these are misnamed
        if row.auc != "0.0" and (mean or row.classes == "5"):
            runs[row.exp, row.testset, key][row.seed] = np.array([float(row.auc)])
    for row in read_csv(REPORTED / "printed.csv").to_dict("records"):
        cell = row["exp"], row["dataset"], "|".join(row[name] for name in KEY)
        mean, sd, count = float(row["value"]), float(row["sd"] or "nan"), int(row["runs"])
        printed.setdefault(cell, Arm(mean, sd, count, sd ** 2 / count, "printed", None, {}))
    arms = {cell: make_arm(rows, "published runs") for cell, rows in runs.items()}
    return arms, printed, pd.DataFrame()


def complete(arms, printed):
    """The arms that claims use: measured, else printed; with auc_mean4, over the labels of all test sets."""
    known = printed | arms
    for exp, dataset in {cell[:2] for cell in arms}:
        parts = [(0.25, arms.get((exp, dataset, f"|auc|{label}|"))) for label in FOUR_LABELS]
        mean = combine(parts) if all(arm for _, arm in parts) else None
        if mean:
            known[exp, dataset, "4|auc_mean||"] = mean
    for (_, dataset, key), arm in arms.items():         # of the test set alone, but stored with each arm
        if "|always_negative" in key:
            known["always_negative", dataset, key] = arm._replace(runs=1, run_variance=0.0)
    # Tables 7 and 8 print the best run of each arm: take it for every arm, to compare like with like
    return known | {cell: arm for cell, arm in printed.items() if np.isnan(arm.sd)}


# ---------------------------------------------------------------------------------------------------- claims
def terms_of(claim, left, right, testset, pattern):
    """([(sign, cell)], offset) of a comparison of two operands."""
    first, _, second = claim["metric"].partition("-")
    if first.startswith("auc:"):                        # two labels of one arm
        left, right = f"{left}:{first[4:]}", f"{left}:{second}"
        first = second = "auc"
    right, second = right or left, second or first
    terms, offset = [], 0.0
    for sign, metric, text in ((1, first, left), (-1, second, right)):
        operand, measure = pattern.fullmatch(text), METRIC.fullmatch(metric)
        if not operand or not measure:
            fail(f"claim {claim['id']}: '{metric}' of '{text}' cannot be read; --help says how to write it")
        exp, part, place, minus, plus = operand.groups("")
        name, labels, threshold = measure.groups("")
        labels = "" if name == "auc" else labels or 5
        threshold = threshold and f"{float(threshold):g}"
        if name == "oracle_auc" and part in REFERRED:
            name, part = REFERRED[part], ""
        if exp == "always_negative":                    # at any threshold
            name, threshold = f"always_negative_{name.removeprefix('mean_')}", ""
        dataset, key = place or testset, f"{labels}|{name}|{part}|{threshold}"
        terms.append((sign, (exp, dataset, key)))
        if minus:
            terms.append((-sign, (minus, dataset, key)))
        offset -= sign * float(plus or 0)
    return terms, offset


def compare(arms, terms, offset=0.0):
    """The estimate of sum(sign * cell) less an offset; cells, remarks, sources. Arms are paired by run.

    The interval ends where the sum can, which for two arms is -1 and 1.
    """
    cells = frozenset(cell for _, cell in terms)
    same = cells, abs(offset)                           # equal for one comparison, also turned round
    by_exp = defaultdict(list)
    for sign, cell in terms:
        exp, dataset, key = cell
        if cell not in arms:
            metric = " ".join(filter(None, key.split("|")))
            return {"cells": same, "remarks": [f"no {metric} of {exp} on {dataset}"], "sources": set()}
        by_exp[exp].append((sign, arms[cell]))
    used, remarks = [], []
    for own in by_exp.values():
        paired = combine(own) if len(own) > 1 else None
        used += [(1, paired)] if paired else own
    if any(dataset == "nih_test" and SAW_TEST.fullmatch(exp) for exp, dataset, _ in cells):
        remarks.append(SAW_REMARK)
    if any(arm.resampled is None for _, arm in used):
        remarks.append("seeds only")
    if any(np.isnan(arm.run_variance) for _, arm in used):
        remarks.append("an arm has one run, whose spread is unknown")
    sources = {arms[cell].source for cell in cells}
    found = estimate(used, offset)
    signs = [sign for sign, _ in terms]                 # of metrics that lie in 0 to 1
    found["ci_low"] = max(found["ci_low"], -signs.count(-1) - offset)
    found["ci_high"] = min(found["ci_high"], signs.count(1) - offset)
    return found | {"cells": same, "remarks": remarks, "sources": sources}


def compare_spreads(arms, testset):
    """As compare, of the mean over Table 2's arms of log(sd on a test set / sd on NIH), sd over runs."""
    ratios, sources = {}, set()
    key = "4|auc_mean||" if testset in ("vindr_test", "padchest") else "5|auc_mean||"       # these: no edema
    for exp in read_csv(REPORTED / "table2.csv")["exp"].unique():
        here, nih = arms.get((exp, testset, key)), arms.get((exp, "nih_test", key))
        if here and nih and here.sd > 0 and nih.sd > 0:
            ratios[exp] = np.log([here.sd / nih.sd])
            sources |= {here.source, nih.source}
    remark = f"log ratio of the sd over runs, {len(ratios)} arms; a smaller test set spreads them more"
    row = {"cells": testset, "remarks": [remark], "sources": sources}
    return row | estimate([(1, make_arm(ratios))]) if len(ratios) > 1 else row


def verdict_row(claim, testset, comparisons):
    """A row of verdicts.csv, with the comparison that decides, such as the least clear one of `every`."""
    test, direction = claim["test"], comparisons["direction"]
    remarks = comparisons["remarks"].explode().dropna().drop_duplicates()
    absent = remarks.str.startswith("no ")
    remarks = [*remarks[~absent], *remarks[absent & (testset != "all")]]     # these stand at their test set
    counts = comparisons.groupby("testset", sort=False)["effect"].count()
    if counts.any() and not counts.all():
        remarks.insert(0, f"not run on {', '.join(counts.index[counts == 0])}")
    if test == "most":
        remarks.insert(0, f"clearly so in {sum(direction == 1)} of {len(direction)} arms")
    sources = set().union(*comparisons["sources"])
    row = dict(claim, testset=testset, verdict="not run", remark="; ".join(remarks[:4]),
               source=" and ".join(sorted(sources)))
    known, order = comparisons.dropna(subset="effect"), ["clearness", "effect"]
    if known.empty:
        return row
    worst = comparisons.groupby("left")["direction"].min()              # of each arm
    answers = {"lowest": -direction.max(), "not_every": -direction.min(), "no_winner": -worst.max(),
               "most": direction.median()}              # 1: more than half
    answer = answers.get(test, direction.min())
    if test == "no_gain":
        answer = -1
        if direction.max() <= 0:
            answer = comparisons["ci_high"].lt(claim["margin"]).all()
            order = ["ci_high"]
    row["verdict"] = {1: "holds", -1: "contradicted"}.get(answer, "undecided")
    known = known.sort_values(order)
    if len(known) == 1 or test not in ("no_winner", "most"):
        shown = known.iloc[-1 if test in ("lowest", "no_gain") else 0]
        row |= shown[[*INTERVAL, "p_holm"]].to_dict()
        right = shown["right"]
        if re.search(r"[+-]", right):
            right = f"({right})"
        row["decided_by"] = f"{shown['left']} - {right}, {shown['testset']}".replace(" - ,", ",")
    sign = {"highest": -1, "lowest": 1}.get(test)
    if sign and testset != "all":
        better = sign * known["effect"] > 0
        row["rank"] = f"{better.sum() + 1} of {len(known) + 1}"
    return row


def verdicts(claims, arms):
    """verdicts.csv: for each claim a row per test set, and one over all where there are several."""
    # A known arm's name, such as c.10-moco, is no difference of two
    names = sorted({re.escape(cell[0]) for cell in arms}, key=len, reverse=True)
    pattern = re.compile(OPERAND.replace("ARM", "|".join([*names, ARM])))
    rows = []
    for number, claim in enumerate(claims):
        testsets, test = claim["testsets"].split(), claim["test"]
        lefts, rights = claim["left"].split("|"), claim["right"].split("|")
        pairs = zip(lefts, rights) if len(lefts) == len(rights) else product(lefts, rights)
        if test == "no_winner":
            pairs = list(permutations(lefts, 2))
        unknown = test == "no_gain" and np.isnan(claim["margin"])
        if test not in TESTS or not testsets or not pairs or unknown:
            fail(f"claim {claim['id']}: needs test sets, a test of {', '.join(TESTS)}; no_gain a margin, "
                 "no_winner several arms")
        for testset, (left, right) in product(testsets, pairs):
            row = dict(claim=number, family=claim["family"], testset=testset, left=left, right=right)
            row |= dict.fromkeys(INTERVAL, np.nan)
            if left == "sd(ood)":
                row |= compare_spreads(arms, testset)
            else:
                row |= compare(arms, *terms_of(claim, left, right, testset, pattern))
            rows.append(row)
    table = pd.DataFrame(rows)
    same = ["family", "cells", "p"]                     # in C2 and C3, turned round in B5 and B6: counts once
    once = table[same].drop_duplicates()
    once["p_holm"] = once.groupby("family")["p"].transform(holm)
    table = table.merge(once, how="left", on=same)
    sign = np.sign(table["effect"])
    table["direction"] = sign.where(table["p_holm"] < 0.05, 0)          # then the interval is without 0, too
    table["clearness"] = sign * (1 - table["p"].fillna(1))
    decided = []
    for number, own in table.groupby("claim"):
        parts = list(own.groupby("testset", sort=False))
        if len(parts) > 1:
            parts.append(("all", own))
        decided += [verdict_row(claims[number], testset, part) for testset, part in parts]
    return pd.DataFrame(decided, columns=VERDICT)


# ------------------------------------------------------------------------------------------ arms and pairs
def arms_table(arms):
    """arms.csv."""
    rows = []
    for (exp, dataset, key), arm in arms.items():
        row = dict(zip(KEY, key.split("|")), exp=exp, dataset=dataset, value=arm.mean)
        rows.append(row | arm._asdict() | estimate([(1, arm)]))
    table = pd.DataFrame(rows, columns=ARMS)
    table[ENDS] = table[ENDS].clip(0, 1)                # all these metrics lie there
    return table


def pairs_of(arms, exps, metric=""):
    """A row per pair of arms of `exps`, test set and key that contains `metric`, as dicts."""
    rows = []
    for dataset, key in dict.fromkeys(cell[1:] for cell in arms if metric in cell[2]):
        cells = [(exp, dataset, key) for exp in exps if (exp, dataset, key) in arms]
        for left, right in combinations(cells, 2):
            row = dict(zip(KEY, key.split("|")), dataset=dataset, left=left[0], right=right[0])
            row |= dict(left_value=arms[left].mean, right_value=arms[right].mean)
            row |= compare(arms, [(1, left), (-1, right)])
            row["remark"] = "; ".join(row["remarks"])
            row["source"] = " and ".join(sorted(row["sources"]))
            rows.append(row)
    return rows


def detectable(pairs, sizes):
    """detectable.csv: the difference in mean AUC that a two-sided t-test at 5 % detects with 80 % power, mean
    over pairs of arms with several runs each. Without resamples of patients it is a lower bound.
    """
    errors = dict.fromkeys(["se_runs", "se_patients", "freedom"], float)
    means = pairs.query("metric == 'auc_mean' and se_runs.notna()").astype(errors)
    needed = nctdtrinc(means["freedom"], 0.2, stdtrit(means["freedom"], 0.975))         # in standard errors
    means["detectable"] = needed * np.hypot(means["se_runs"], means["se_patients"].fillna(0))
    places = means.groupby(["dataset", "labels", "source"], sort=False)
    table = places[["se_runs", "se_patients", "detectable"]].mean()
    table = table.assign(pairs=places.size()).reset_index()
    return table.join(sizes, on="dataset").reindex(columns=DETECTABLE)


def show_p(p):
    """A p-value for the terminal, blank if unknown."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}".replace("nan", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    given.add_argument("--metrics", type=Path, help="metrics.csv of evaluate/metrics.py, draws.npz beside it")
    given.add_argument("--reported", action="store_true", help="use the published runs and printed tables")
    add("--arms", nargs=2, metavar=("LEFT", "RIGHT"), help="compare these two, without claims")
    add("--claims", type=Path, default=REPORTED / "claims.csv", help="the claims to decide (the study's)")
    add("--out", type=Path, help="folder for the CSVs (default: the terminal alone)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    try:
        arms, printed, sizes = read_reported() if args.reported else read_runs(args.metrics)
        exps = list(dict.fromkeys(cell[0] for cell in arms))
        if args.arms:
            rows = pairs_of(arms, args.arms)
            if not rows:
                fail(f"no metric of both '{args.arms[0]}' and '{args.arms[1]}'; known: {', '.join(exps)}")
            tables = {"two_arms": pd.DataFrame(rows, columns=TWO)}
            shown = tables["two_arms"].query("metric in ('auc_mean', 'auc')")
            said = "effect: {} less {}; --out writes all {} metrics".format(*args.arms, len(rows))
        else:
            if not args.claims.is_file():
                fail(f"{args.claims} does not exist: give --claims FILE, or --arms LEFT RIGHT for two models")
            claims = read_csv(args.claims, CLAIM)
            claims["margin"] = pd.to_numeric(claims["margin"], errors="coerce")
            decided = verdicts(claims.to_dict("records"), complete(arms, printed))
            rows = []
            for kind in (False, True):                                          # each among themselves
                family = [exp for exp in exps if exp.endswith("-ensemble") == kind]
                rows += pairs_of(arms, family, "|auc")
            pairs = pd.DataFrame(rows, columns=PAIRS)
            ensemble = pairs["left"].str.endswith("-ensemble")
            pairs["p_holm"] = pairs.groupby([ensemble, "dataset", *KEY])["p"].transform(holm)
            tables = {"verdicts": decided, "arms": arms_table(arms), "comparisons": pairs,
                      "detectable": detectable(pairs, sizes)}
            last = decided.drop_duplicates("id", keep="last")                    # over all test sets
            shown = last.loc[last["verdict"] != "not run", SHOWN]
            said = f"{len(shown)} of {len(last)} claims are about arms with numbers"
        for name, table in tables.items() if args.out else ():
            write(args.out / f"{name}.csv", lambda file: table.to_csv(file, index=False, float_format="%.6g"))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it without a word
        print(said)
        if len(shown):
            print(shown.to_string(index=False, float_format="{:z.4f}".format, na_rep="", max_colwidth=60,
                                  formatters={"p": show_p, "p_holm": show_p}))
        if args.out:
            print(f"wrote {', '.join(tables)} (.csv) to {args.out}")
    except InputError as mistake:
        fail(mistake)


if __name__ == "__main__":
    main()
