"""Compare arms: differences with intervals over runs and patients, a verdict on each finding of the study.

An effect has the interval effect +- t * error, error^2 = what the choice of runs adds + what the choice of
patients adds, and the p-value of the same t. Of published or printed numbers only the spread over runs
(seeds) is known: "seeds only". Study: "From pre-training to downstream performance: does domain-specific
pre-training make sense?" (Krones 2026, arXiv:2605.08819).

    python evaluate/compare.py --metrics metrics.csv --arms a b                two models of yours
    python evaluate/compare.py --metrics results/metrics.csv --out results     all arms, the study's claims
    python evaluate/compare.py --reported --out results/published              claims on the printed numbers

Reads   metrics.csv and draws.npz beside it (evaluate/metrics.py); or of --reported, a folder, the author's
        published runs (raw_runs_*.csv) and, where an arm is not among them, the printed tables; claims.csv.
Writes  verdicts.csv     a row a claim and test set, and one over all: verdict, the comparison that decides
        arms.csv         a row an arm and metric: mean, sd and interval, what runs and patients add
        comparisons.csv  a row a pair of arms and AUC; p_holm: over the pairs
        detectable.csv   a row a test set: the smallest difference of two arms found with 80 % power

In 1,200 simulations the 95 % interval of a pair of arms with 2, 3 or 5 runs each covered the truth 95 to 97
times in 100, whether runs or patients dominate. That of one arm alone, where runs dominate: 87 (2 runs), 93
(3) and 93 (5): two runs do not tell their spread. That of a single run is by patients alone.

Claims (claims.csv): test, metric, testsets, left and right operands, arms separated by "|".
    greater, every  left > right               not_every  clearly less somewhere
    no_gain         left - right below margin  most       in more than half of the arms
    highest, lowest left against each right    no_winner  no arm beats all others on every test set
An operand: 3.4, 3.4:Effusion (a label), 3.4@nih_test, 2.2-2.1, 3.3:Atelectasis+0.20, sd(ood),
always_negative, 3.4:random (images referred at random). A metric a-b takes a and b of the same arm, auc:A-B
two labels.
"""

import argparse
import csv
import fnmatch
import itertools
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import nctdtrinc, stdtr, stdtrit

REPORTED = Path(__file__).resolve().parent / "reported"
STUDY5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
SAW_TEST = {"3.1", "3.2", "3.1b", "3.2b"}
SAW_REMARK = "3.1 and 3.2 saw 22,772 of the 25,596 NIH test images in pre-training, without labels"
CLAIM = "id family place ours statement test metric testsets left right margin".split()
VERDICT = (
    "id family place ours statement test metric testset left right margin verdict effect ci_low ci_high "
    "p p_holm decided_by rank source remark"
).split()
TESTS = ("greater", "every", "not_every", "no_gain", "highest", "lowest", "no_winner", "most")
ARM = r"[A-Za-z0-9_.]+(?:-\d+k)?"                     # 3.4, 0.1.7b, 4.2.1-100k
OPERAND = re.compile(rf"(?P<arm>{ARM})(?::(?P<part>\w+))?(?:@(?P<testset>\w+))?(?:-(?P<minus>{ARM}))?"
                     r"(?P<offset>\+[\d.]+)?")
METRIC = re.compile(r"auc|auc_mean(5|14|4)|(mean_accuracy|subset_accuracy|fnr|oracle_auc)@\d*\.?\d+")
PRINTED_METRICS = {"Mean accuracy": "mean_accuracy", "Subset accuracy": "subset_accuracy", "FNR": "fnr",
                   "Calibration error": "calibration_error", "mean_acc": "mean_accuracy",
                   "subset_acc": "subset_accuracy", "underdiagnosis_mean": "fnr",
                   "calibration_error": "calibration_error"}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# ------------------------------------------------------------------------------------------------ statistics

class Arm(NamedTuple):
    """One metric of one arm. mean: over its runs; sd: over its runs, NaN of one; runs: how many; added: what
    the choice of runs adds to the variance of the mean, NaN if unknown; pooled: the mean over runs in every
    resample of patients, float [B], None if unknown.
    """
    mean: float
    sd: float
    runs: int
    added: float
    pooled: np.ndarray | None = None
    source: str = "our runs"


class Estimate(NamedTuple):
    """A mean or difference; p for "it is 0"; se_runs, se_patients, NaN if unknown: its error in two parts."""
    effect: float
    low: float
    high: float
    p: float
    se_runs: float
    se_patients: float
    freedom: float


def make_arm(values, draws=None, source="our runs"):
    """An Arm from its runs: values float [R]; draws float [R, B], the same resamples of patients for all.

    The spread between runs on the same patients holds what is peculiar to a run on these patients; that is in
    the resamples already and is taken off.
    """
    values, runs = np.asarray(values, float), len(values)
    pooled = None if draws is None else np.mean(draws, 0, dtype=float)
    sd = values.std(ddof=1) if runs > 1 else np.nan
    added = sd ** 2 / runs
    if runs > 1 and pooled is not None:
        own = draws - values[:, None] - (pooled - values.mean())
        added = max(added - np.nanvar(own, axis=1).sum() / (runs - 1) / runs, 0)
    return Arm(values.mean(), sd, runs, added, pooled, source)


def estimate(terms, offset=0.0):
    """The sum of sign * mean, less an offset, as an Estimate. terms: [(sign, Arm)].

    Student's t with Satterthwaite's degrees of freedom: an arm's part of the runs has R - 1, the patients'
    part plenty; without resamples that is Welch's test. Where an arm has one run, its part is unknown: with
    resamples the patients' part stands alone, without there is no interval.
    """
    arms = [arm for _, arm in terms]
    effect = sum(sign * arm.mean for sign, arm in terms) - offset
    added, patients = np.array([arm.added for arm in arms]), np.nan
    if all(arm.pooled is not None for arm in arms):
        patients = np.nanvar(sum(sign * arm.pooled for sign, arm in terms)) if len(arms[0].pooled) else np.nan
    known = np.nansum(added) if patients >= 0 else added.sum()
    error = np.sqrt(known + np.nan_to_num(patients))
    lost = sum((arm.sd ** 2 / arm.runs) ** 2 / (arm.runs - 1) for arm in arms if arm.runs > 1)
    freedom = error ** 4 / lost if lost else np.inf
    if not error > 1e-12:
        return Estimate(effect, np.nan, np.nan, np.nan, np.sqrt(added.sum()), np.sqrt(patients), freedom)
    margin, p = stdtrit(freedom, 0.975) * error, 2 * stdtr(freedom, -abs(effect) / error)
    return Estimate(
        effect, effect - margin, effect + margin, p, np.sqrt(added.sum()), np.sqrt(patients), freedom
    )


def holm(p):
    """Holm's adjusted p-values (1979), float [m]; a comparison without data (NaN) counts as p = 1."""
    p = np.nan_to_num(np.asarray(p, float), nan=1)
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def noncentrality(freedom):
    """The effect, in standard errors, that a two-sided t-test at 5 % finds with 80 % power; 2.80 for inf."""
    freedom = np.maximum(freedom, 1)                    # below, scipy's search need not end
    return nctdtrinc(freedom, 0.2, stdtrit(freedom, 0.975))


# ---------------------------------------------------------------------------------------------------- numbers

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


class Numbers:
    """What is known of each arm: values {(exp, dataset, key): {seed: value}}, draws likewise {seed: [B]},
    printed {(exp, dataset, key): (mean, sd, runs)}; key: labels|metric|label|threshold.
    """

    def __init__(self, source):
        self.source, self.values, self.draws, self.printed = source, defaultdict(dict), defaultdict(dict), {}
        self.sizes, self.drawn = {}, set()  # {dataset: (images, patients)}, (exp, dataset) of stand-ins

    def add_four_label_means(self):
        """The mean over the study's labels but edema, which two test sets lack: auc_mean4."""
        keys = [f"|auc|{label}|" for label in STUDY5 if label != "Edema"]
        for exp, dataset in {place[:2] for place in self.values}:
            for numbers in (self.values, self.draws):
                parts = [numbers.get((exp, dataset, key), {}) for key in keys]
                if all(parts):
                    means = {seed: np.mean([part[seed] for part in parts], 0) for seed in parts[0]}
                    numbers[exp, dataset, "4|auc_mean||"] = means

    def runs(self, exp, dataset, key):
        """{seed: value} and {seed: draws} of an arm, empty if unknown; recipe "a" has the plain name."""
        place = (
            (exp, dataset, key)
            if (exp, dataset, key) in self.values
            else (exp.removesuffix("a"), dataset, key)
        )
        return self.values.get(place, {}), self.draws.get(place, {})

    def source_of(self, exp, dataset):
        return "stand-ins" if (exp, dataset) in self.drawn else self.source

    def arm(self, exp, dataset, key):
        """The Arm of its runs, else of what is printed, else None."""
        values, draws = self.runs(exp, dataset, key)
        if values:
            rows = np.array([draws[seed] for seed in values]) if draws else None
            arm = make_arm(list(values.values()), rows, self.source_of(exp, dataset))
            return arm._replace(added=0.0) if exp == "always_negative" else arm      # no run would change it
        return self.printed_arm(exp, dataset, key)

    def printed_arm(self, exp, dataset, key):
        """The Arm that is printed, or None."""
        if (exp, dataset, key) not in self.printed:
            return None
        mean, sd, runs = self.printed[exp, dataset, key]
        return Arm(mean, sd, runs, 0.0 if exp == "always_negative" else sd ** 2 / runs, None, "printed")


def read_runs(path, patterns):
    """Numbers of metrics.csv and of draws.npz beside it, of experiments that are like one of `patterns`."""
    columns = "exp seed dataset labels metric variant label threshold value".split()
    frame = read_csv(path, columns)
    numbers, file = Numbers("our runs"), path.with_name("draws.npz")
    try:
        drawn = np.load(file)
    except (OSError, ValueError):
        raise InputError(
            f"{file} is not there or unreadable; evaluate/metrics.py writes it with {path}"
        ) from None
    if "stand_in" in frame:
        marked = frame[frame["stand_in"] != ""]
        numbers.drawn = set(zip(marked["exp"], marked["dataset"]))
    for dataset, sizes in frame[frame["metric"].isin(["images", "patients"])].groupby("dataset"):
        numbers.sizes[dataset] = tuple(sizes.groupby("metric")["value"].first())
    kept = frame["variant"].eq("corrected") & frame["value"].ne("")
    kept &= frame["label"].eq("") | frame["metric"].eq("auc")
    for (exp, seed, dataset), rows in frame[kept].groupby(["exp", "seed", "dataset"], sort=False):
        if not any(fnmatch.fnmatchcase(exp.removesuffix("-ensemble"), pattern) for pattern in patterns):
            continue
        name = f"{exp}/{seed}/{dataset}"
        if name not in drawn:
            raise InputError(f"{file} lacks exp {exp}, seed {seed}, {dataset}; run evaluate/metrics.py again")
        draws = dict(zip(drawn[f"{name}/rows"].tolist(), drawn[name]))
        keys = rows[["labels", "metric", "label", "threshold"]].agg("|".join, axis=1)
        try:
            values = dict(zip(keys, rows["value"].astype(float)))
        except ValueError as problem:
            raise InputError(
                f"{path}: a value of exp {exp}, seed {seed}, {dataset} is no number ({problem})"
            ) from None
        for key in draws:
            numbers.values[exp, dataset, key][seed] = values[key]
            if draws[key].size:
                numbers.draws[exp, dataset, key][seed] = draws[key]
        negative = "5|always_negative_accuracy||"
        if negative in draws:                        # the same for every run and at every threshold
            for t in (0.1, 0.2, 0.3, 0.4, 0.5):
                place = "always_negative", dataset, f"5|mean_accuracy||{t:g}"
                numbers.values[place] = {seed: values[negative]}
                numbers.draws[place] = {seed: draws[negative]} if draws[negative].size else {}
    if not numbers.values:
        raise InputError(f"{path} has no experiment like {', '.join(patterns)}")
    numbers.add_four_label_means()
    return numbers


def read_reported(folder):
    """Numbers of the author's published runs and of the printed tables."""
    numbers = Numbers("published runs")
    for row in read_csv(
        folder / "raw_runs_auc.csv", "exp seed testset classes label auc".split()
    ).itertuples():
        mean = row.label == "mean"
        key = f"{row.classes}|auc_mean||" if mean else f"|auc|{row.label}|"
        if float(row.auc) > 0:                                          # 0.0 stands for "no positives"
            numbers.values[row.exp, row.testset, key][row.seed] = float(row.auc)
    for row in read_csv(folder / "raw_runs_threshold.csv").itertuples():
        key = f"5|{PRINTED_METRICS[row.metric]}||{float(row.threshold):g}"
        numbers.values[row.exp, row.testset, key][row.seed] = float(row.value)
    for row in read_csv(folder / "raw_runs_oracle.csv").itertuples():
        key = f"5|oracle_auc||{float(row.referred):g}"
        numbers.values[row.exp, row.testset, key][row.seed] = float(row.oracle_auc)
    numbers.add_four_label_means()

    def put(exp, dataset, key, mean, sd="nan"):
        runs = 1 if sd == "nan" else 3 if exp.startswith("1.") else 5
        if mean:
            numbers.printed.setdefault((exp, dataset, key), (float(mean), float(sd), runs))

    for row in read_csv(folder / "table2.csv").itertuples():
        put(row.exp, row.testset, f"{row.classes}|auc_mean||", row.auc_mean, row.auc_sd)
        if row.testset in ("vindr_test", "padchest"):                   # printed as five, means over four
            put(row.exp, row.testset, "4|auc_mean||", row.auc_mean, row.auc_sd)
    for row in read_csv(folder / "table3.csv").itertuples():
        put(row.exp, row.testset, f"|auc|{row.label}|", row.auc_mean, row.auc_sd)
    nih = "nih_test", "14|auc_mean||"
    for row in read_csv(folder / "table4.csv").itertuples():
        put(row.exp, *nih, row.auc_a, row.sd_a)
        put(f"{row.exp}b", *nih, row.auc_b, row.sd_b)
    for row in read_csv(folder / "table5.csv").itertuples():
        put(row.exp, *nih, row.auc_36, row.sd_36)
        put(f"{row.exp}b" if row.auc_36 else row.exp, *nih, row.auc_35, row.sd_35)
    for row in read_csv(folder / "table6.csv").itertuples():
        put(f"{row.exp}-{row.pretraining_images[:-3]}k", *nih, row.auc_mean, row.auc_sd)
    for row in read_csv(folder / "table7.csv").itertuples():
        put(row.exp, "chexpert_valid", f"5|{PRINTED_METRICS[row.metric]}||{row.threshold}", row.value)
    for row in read_csv(folder / "table8.csv").itertuples():
        put(row.exp, "chexpert_valid", f"5|oracle_auc||{row.referred}", row.oracle_auc)
    for row in read_csv(folder / "text_numbers.csv").itertuples():
        if row.id == "exp0.1.7_val20":
            put("0.1.7", "nih_val", "14|auc_mean||", row.value, row.sd)
    negative = read_csv(folder / "table7_random_guess.csv")["accuracy"].astype(float).mean()
    for t in (0.1, 0.2, 0.3, 0.4, 0.5):
        put("always_negative", "chexpert_valid", f"5|mean_accuracy||{t:g}", negative)
    return numbers


# ---------------------------------------------------------------------------------------------------- claims

class Comparison(NamedTuple):
    """One elementary comparison of a claim; estimate: None without data."""
    testset: str
    left: str
    right: str
    estimate: Estimate | None
    remarks: list
    sources: set


def read_claims(path):
    """The rows of claims.csv, each operand and metric checked."""
    claims = read_csv(path, CLAIM).to_dict("records")
    for line, claim in enumerate(claims, 2):
        texts = [text for side in ("left", "right") for text in claim[side].split("|") if text]
        metrics = ["auc"] if claim["metric"].startswith("auc:") else claim["metric"].split("-")
        for text in texts:
            if not OPERAND.fullmatch(text) and not re.fullmatch(r"sd\(\w+\)", text):
                raise InputError(f"{path} line {line}: operand '{text}' cannot be read; --help says how")
        for metric in metrics:
            if not METRIC.fullmatch(metric):
                raise InputError(f"{path} line {line}: metric '{metric}' cannot be read; --help says how")
        if claim["test"] not in TESTS or claim["test"] == "no_gain" and not claim["margin"]:
            raise InputError(f"{path} line {line}: test '{claim['test']}' with margin '{claim['margin']}'; "
                             f"expected one of {', '.join(TESTS)}, no_gain with a margin")
    return claims


def key_of(metric, part):
    """Key of a claim's metric: auc_mean5, auc (of the label `part`), fnr@0.1, oracle_auc@0.10 (random)."""
    name, _, threshold = metric.partition("@")
    if name == "auc":
        return f"|auc|{part}|"
    if name.startswith("auc_mean"):
        return f"{name.removeprefix('auc_mean')}|auc_mean||"
    name = "random_referral_auc" if part == "random" else name
    return f"5|{name}||{float(threshold):g}"


def terms_of(claim, left, right, testset):
    """[(sign, exp, dataset, key)] and the offset of a comparison of two operands."""
    metric = claim["metric"]
    if metric.startswith("auc:"):
        labels = metric[4:].split("-")
        return [(sign, left, testset, f"|auc|{label}|") for sign, label in zip((1, -1), labels)], 0.0
    metrics = metric.split("-")
    terms, offset = [], 0.0
    for sign, name, text in ((1, metrics[0], left), (-1, metrics[-1], right or left)):
        operand = OPERAND.fullmatch(text)
        place = operand["testset"] or testset, key_of(name, operand["part"])
        terms.append((sign, operand["arm"], *place))
        if operand["minus"]:
            terms.append((-sign, operand["minus"], *place))
        offset -= sign * float(operand["offset"] or 0)
    return terms, offset


def compare(numbers, terms, offset=0.0):
    """(Estimate or None, remarks, sources) of the sum of sign * arm; an arm there twice is paired by run."""
    by_exp, arms = defaultdict(list), []
    for sign, exp, dataset, key in terms:
        by_exp[exp].append((sign, dataset, key))
    for exp, parts in by_exp.items():
        found = [numbers.runs(exp, *part[1:]) for part in parts]
        seeds = [seed for seed in found[0][0] if all(seed in values for values, _ in found)]
        if len(parts) > 1 and seeds:
            signs = [part[0] for part in parts]
            values = [sum(s * f[0][seed] for s, f in zip(signs, found)) for seed in seeds]
            drawn = all(draws for _, draws in found)
            draws = [sum(s * f[1][seed] for s, f in zip(signs, found)) for seed in seeds] if drawn else None
            source = numbers.source_of(exp, parts[0][1])
            arms.append((1, make_arm(values, draws if draws is None else np.array(draws), source)))
            continue
        for sign, dataset, key in parts:
            arm = numbers.arm(exp, dataset, key)
            if arm is None:
                metric = " ".join(filter(None, key.split("|")))
                return None, [f"no {metric} of {exp} on {dataset}"], set()
            arms.append((sign, arm))
    if any(arm.source == "printed" and np.isnan(arm.added) for _, arm in arms) and len(arms) == len(terms):
        # Tables 7 and 8 print the best of an arm's runs: like is compared with like
        arms = [(sign, numbers.printed_arm(exp, *place) or arm)
                for (sign, exp, *place), (_, arm) in zip(terms, arms)]
    remarks = [] if all(arm.pooled is not None for _, arm in arms) else ["seeds only"]
    if any(np.isnan(arm.added) for _, arm in arms):
        remarks.append("an arm has one run, whose spread is unknown")
    if any(exp in SAW_TEST and dataset == "nih_test" for _, exp, dataset, _ in terms):
        remarks.append(SAW_REMARK)
    return estimate(arms, offset), remarks, {arm.source for _, arm in arms}


def compare_spreads(numbers, claim, testset):
    """Is the spread over runs larger on one test set? Mean over Table 2's arms of log(sd left / sd right)."""
    sides = [
        re.fullmatch(r"sd\((\w+)\)", claim[side])[1].replace("ood", testset) for side in ("left", "right")
    ]
    ratios, sources, labels = [], set(), "4" if testset in ("vindr_test", "padchest") else "5"
    for exp in dict.fromkeys(read_csv(REPORTED / "table2.csv")["exp"]):
        for key in (f"{labels}|auc_mean||", "5|auc_mean||"):             # the same labels on both, if known
            arms = [numbers.arm(exp, side, key) for side in sides]
            if all(arm and arm.sd > 0 for arm in arms):
                ratios.append(np.log(arms[0].sd / arms[1].sd))
                sources |= {arm.source for arm in arms}
                break
    if len(ratios) < 2:
        return None, ["fewer than two arms of Table 2 have several runs on both sets"], set()
    return estimate([(1, make_arm(ratios))]), [f"log ratio of the sd over runs, {len(ratios)} arms"], sources


def comparisons_of(claim, numbers):
    """All elementary comparisons of a claim."""
    lefts, rights = claim["left"].split("|"), claim["right"].split("|")
    pairs = list(zip(lefts, rights) if len(lefts) == len(rights) else itertools.product(lefts, rights))
    if claim["test"] == "no_winner":
        pairs = list(itertools.combinations(lefts, 2))
    found = []
    for testset, (left, right) in itertools.product(claim["testsets"].split(), pairs):
        if left.startswith("sd("):
            result = compare_spreads(numbers, claim, testset)
        else:
            result = compare(numbers, *terms_of(claim, left, right, testset))
        found.append(Comparison(testset, left, right, *result))
    return found


def direction(comparison, q):
    """1: clearly greater, -1: clearly less, 0: not clear; q: p after Holm."""
    result = comparison.estimate
    clear = result and q < 0.05 and (result.low > 0 or result.high < 0)
    return int(np.sign(result.effect)) if clear else 0


def beaten_and_best(arms, comparisons, directions):
    """Of arms compared pair by pair: those that some other clearly beats somewhere; those that beat all."""
    beaten, wins = set(), dict.fromkeys(arms, 0)
    for pair, sign in zip(comparisons, directions):
        if sign:
            winner, loser = (pair.left, pair.right) if sign > 0 else (pair.right, pair.left)
            beaten.add(loser)
            wins[winner] += 1
    return beaten, [arm for arm in arms if wins[arm] == 2 * len(comparisons) / len(arms)]


def judge(claim, comparisons, directions):
    """"holds", "contradicted", "undecided" or "not run", from clear directions of all comparisons."""
    if all(comparison.estimate is None for comparison in comparisons):
        return "not run"
    test, half = claim["test"], len(directions) / 2
    if test == "lowest":
        directions = [-sign for sign in directions]
    above, below = directions.count(1), directions.count(-1)
    everywhere, nowhere = above == len(directions), below > 0
    holds, contradicted = everywhere, nowhere                           # greater, every, highest, lowest
    if test == "not_every":
        holds, contradicted = nowhere, everywhere
    elif test == "most":
        holds, contradicted = above > half, below > half
    elif test == "no_gain":
        highs = [comparison.estimate.high if comparison.estimate else np.nan for comparison in comparisons]
        holds, contradicted = all(high < float(claim["margin"]) for high in highs), above > 0
    elif test == "no_winner":
        arms = claim["left"].split("|")
        beaten, best = beaten_and_best(arms, comparisons, directions)
        holds, contradicted = len(beaten) == len(arms), len(best) > 0
    return "contradicted" if contradicted else "holds" if holds else "undecided"


def clearness(comparison):
    """From -1, clearly less, over 0, nothing is known, to 1, clearly greater; then the effect itself."""
    result = comparison.estimate
    return np.sign(result.effect) * (1 - np.nan_to_num(result.p, nan=1)), result.effect


def deciding(claim, comparisons):
    """The comparison that a verdict hangs on, such as the least clear one of `every`; None without data."""
    known = [comparison for comparison in comparisons if comparison.estimate]
    if not known or claim["test"] in ("no_winner", "most") and len(known) > 1:
        return None
    if claim["test"] == "no_gain":
        return max(known, key=lambda comparison: np.nan_to_num(comparison.estimate.high, nan=np.inf))
    return (max if claim["test"] == "lowest" else min)(known, key=clearness)


def rank_of(claim, comparisons):
    """Rank of the left arm's point estimate among all arms of a `highest` or `lowest`, as "2 of 6"."""
    known = [comparison.estimate.effect for comparison in comparisons if comparison.estimate]
    sign = {"highest": 1, "lowest": -1}.get(claim["test"])
    better = sum(sign * effect < 0 for effect in known) if sign else 0
    return f"{better + 1} of {len(known) + 1}" if sign and known else ""


def verdicts(claims, numbers):
    """verdicts.csv: for each claim a row a test set, and one over all where there are several."""
    found = [comparisons_of(claim, numbers) for claim in claims]
    adjusted = {}
    for family in dict.fromkeys(claim["family"] for claim in claims):
        members = [c for claim, several in zip(claims, found) if claim["family"] == family for c in several]
        q = holm([c.estimate.p if c.estimate else np.nan for c in members])
        adjusted |= {id(member): value for member, value in zip(members, q)}
    rows = []
    for claim, several in zip(claims, found):
        sets, outcomes = claim["testsets"].split(), []
        for testset in sets + ["all"] * (len(sets) > 1):
            here = [c for c in several if testset in (c.testset, "all")]
            directions = [direction(c, adjusted[id(c)]) for c in here]
            verdict, shown = judge(claim, here, directions), deciding(claim, here)
            remarks = [remark for c in here for remark in c.remarks]
            if testset == "all":
                remarks = [remark for remark in remarks if not remark.startswith("no ")]
                remarks.insert(0, f"holds on {outcomes.count('holds')} of {len(sets)} test sets")
            if claim["test"] == "most":
                remarks.insert(0, f"clearly so in {directions.count(1)} of {len(here)} arms")
            row = {name: claim[name] for name in CLAIM if name != "testsets"} | {
                "testset": testset, "verdict": verdict, "rank": rank_of(claim, here),
                "source": " and ".join(sorted(set().union(*(c.sources for c in here)))),
                "remark": "; ".join(list(dict.fromkeys(remarks))[:4])}
            if shown:
                result = shown.estimate
                row |= {"effect": result.effect, "ci_low": result.low, "ci_high": result.high, "p": result.p,
                        "p_holm": adjusted[id(shown)],
                        "decided_by": f"{shown.left} - {shown.right}, {shown.testset}".replace(" - ,", ",")}
            rows.append(row)
            outcomes.append(verdict)
    return pd.DataFrame(rows, columns=VERDICT)


# ------------------------------------------------------------------------------------------ arms and pairs

def split(key):
    return dict(zip(("labels", "metric", "label", "threshold"), key.split("|")))


def all_arms(numbers):
    """arms.csv, and {(dataset, key): {exp: Arm}}."""
    rows, places = [], defaultdict(dict)
    for exp, dataset, key in numbers.values:
        if exp == "always_negative" or key.startswith("4|"):               # known for the claims alone
            continue
        arm = places[dataset, key][exp] = numbers.arm(exp, dataset, key)
        one = estimate([(1, arm)])
        rows.append({"exp": exp, "dataset": dataset, **split(key), "runs": arm.runs, "value": arm.mean,
                     "sd": arm.sd, "ci_low": one.low, "ci_high": one.high, "se_runs": one.se_runs,
                     "se_patients": one.se_patients, "freedom": one.freedom, "source": arm.source})
    return pd.DataFrame(rows), places


def all_pairs(places):
    """comparisons.csv: every pair of arms, for the AUCs."""
    rows = []
    for (dataset, key), arms in places.items():
        if "|auc" not in key:
            continue
        results = [(left, right, estimate([(1, arms[left]), (-1, arms[right])]))
                   for left, right in itertools.combinations(arms, 2)]
        adjusted = holm([result.p for *_, result in results])
        for (left, right, result), q in zip(results, adjusted):
            rows.append(
                {
                    "dataset": dataset,
                    **split(key),
                    "left": left,
                    "right": right,
                    "effect": result.effect,
                    "ci_low": result.low,
                    "ci_high": result.high,
                    "p": result.p,
                    "p_holm": q,
                    "se_runs": result.se_runs,
                    "se_patients": result.se_patients,
                    "freedom": result.freedom,
                }
            )
    columns = "dataset labels metric label threshold left right effect ci_low ci_high p p_holm".split()
    return pd.DataFrame(rows, columns=columns + ["se_runs", "se_patients", "freedom"])


def detectable(pairs, numbers):
    """What two arms must differ by to be told apart with 80 % power: the mean of what each pair must.

    Pairs with an arm of one run do not count. Without resamples it is what runs alone ask for, a lower bound.
    """
    rows = []
    means = pairs[(pairs["label"] == "") & pairs["se_runs"].notna()]
    for (dataset, labels), part in means.groupby(["dataset", "labels"], sort=False):
        images, patients = numbers.sizes.get(dataset, ("", ""))
        error = np.hypot(part["se_runs"], part["se_patients"].fillna(0))
        needed = (noncentrality(part["freedom"]) * error).mean()
        rows.append((dataset, labels, images, patients, len(part), part["se_runs"].mean(),
                     part["se_patients"].mean(), needed, numbers.source))
    columns = "dataset labels images patients pairs se_runs se_patients detectable source"
    return pd.DataFrame(rows, columns=columns.split())


def two_arms(numbers, left, right):
    """The table of two arms: every metric that both have on a test set."""
    rows = []
    for exp, dataset, key in numbers.values:
        if exp != left or not numbers.runs(right, dataset, key)[0]:
            continue
        result, remarks, _ = compare(numbers, [(1, left, dataset, key), (-1, right, dataset, key)])
        arms = [numbers.arm(name, dataset, key).mean for name in (left, right)]
        rows.append(
            {
                "dataset": dataset,
                **split(key),
                left: arms[0],
                right: arms[1],
                "difference": result.effect,
                "ci_low": result.low,
                "ci_high": result.high,
                "p": result.p,
                "remark": "; ".join(remarks),
            }
        )
    if not rows:
        known = ", ".join(sorted({place[0] for place in numbers.values} - {"always_negative"})[:20])
        raise InputError(f"no metric is known of both '{left}' and '{right}'; there are {known}")
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--metrics", type=Path, help="metrics.csv of evaluate/metrics.py, draws.npz beside it")
    given.add_argument("--reported", type=Path, nargs="?", const=REPORTED,
                       help="judge on the published and printed numbers (default folder: reported/ beside)")
    parser.add_argument("--exp", default="*", help="with --metrics: these experiments, as '3.4,4.*'")
    parser.add_argument(
        "--arms", nargs=2, metavar=("LEFT", "RIGHT"), help="compare these two, without claims"
    )
    parser.add_argument("--claims", type=Path, default=REPORTED / "claims.csv", help="the findings to judge")
    parser.add_argument("--out", type=Path, help="folder for the CSVs (default: the terminal alone)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    try:
        numbers = (
            read_runs(args.metrics, args.exp.split(",")) if args.metrics else read_reported(args.reported)
        )
        tables = {}
        if args.arms:
            tables["two_arms"] = two_arms(numbers, *args.arms)
            print(tables["two_arms"].to_string(index=False, float_format="%.4f", na_rep=""))
        else:
            tables["verdicts"] = verdicts(read_claims(args.claims), numbers)
            tables["arms"], places = all_arms(numbers)
            tables["comparisons"] = all_pairs(places)
            tables["detectable"] = detectable(tables["comparisons"], numbers)
            last = tables["verdicts"].drop_duplicates("id", keep="last")             # over all test sets
            shown = last[["id", "statement", "testset", "verdict", "effect", "ci_low", "ci_high", "p_holm"]]
            print(shown.to_string(index=False, float_format="%.4f", na_rep="", max_colwidth=60))
            marked = ", some of them stand-ins" if numbers.drawn else ""
            counts = ", ".join(f"{count} {name}" for name, count in last["verdict"].value_counts().items())
            print(f"{len(last)} claims on {numbers.source}{marked}: {counts}")
        for name, table in tables.items() if args.out else ():
            text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
            write(args.out / f"{name}.csv", lambda file: file.write(text))
        if args.out:
            print(f"wrote {', '.join(f'{name}.csv' for name in tables)} to {args.out}")
    except InputError as mistake:
        fail(mistake)


if __name__ == "__main__":
    main()
