"""Judge the study's findings: each claim holds, is contradicted, or cannot be told, with effect, interval, p.

On predictions (anybody's) both runs and patients are resampled; of the author's published per-run numbers
only the spread over runs is known. With --reported every printed number that those runs can rebuild is
rebuilt, and what differs is listed. Study: "From pre-training to downstream performance: does domain-specific
pre-training make sense?" (Krones 2026, arXiv:2605.08819).

    python evaluate/compare.py --predictions runs --out results
    python evaluate/compare.py --reported --out results/published

Reads   <exp>/predictions/seed<k>/<testset>.csv below --predictions (path, patient, true_<label>,
        prob_<label>), or raw_runs_*.csv and table*.csv below --reported; claims.csv.
Writes  verdicts.csv     a row a claim: verdict, effect (left - right), 95 % interval, p, p adjusted by Holm
        comparisons.csv  a row a pair of arms on a test set: mean over labels (label blank) and each label
        components.csv   a row an arm: mean over runs, its interval, what runs and patients add to its error
        detectable.csv   a row a test set: the smallest difference of two arms that is found with 80 % power;
                         of published runs a lower bound, as what patients add is unknown
        errata.csv       with --reported: printed, recomputed, difference
        A standard error that is unknown is blank: se_runs with one run, se_patients without predictions.

A claim compares two operands. An operand is an experiment, with :label for one label, @testset for another
test set, +0.20 for an offset. 2.2-2.1 is a difference, sd(ood) and sd(nih_test) are spreads over runs,
always_negative is the constant answer, 3.4:uncertain and 3.4:random say which images an expert sees.
Metrics: auc_mean5, auc_mean14, auc_mean4 (without edema), auc (of a label), mean_accuracy@t,
subset_accuracy@t, fnr@t, oracle_auc@q; "a-b" takes a on the left and b on the right.
"""

import argparse
import fnmatch
import itertools
import os
import re
import sys
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import nctdtrinc, ndtr, ndtri, stdtr, stdtrit

REPORTED = Path(__file__).resolve().parent / "reported"
NIH14 = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation "
         "Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
STUDY5 = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion"]
LABELS = {"auc_mean14": NIH14, "auc_mean5": STUDY5, "auc_mean4": [x for x in STUDY5 if x != "Edema"]}
CLAIM = "id family statement metric testset left right sign".split()
VERDICT = CLAIM + ("verdict effect ci_low ci_high p p_holm p_holm_all se_runs se_patients runs source "
                   "remark").split()
PAIR = ("dataset labels label left right effect ci_low ci_high p p_holm p_welch p_delong se_runs "
        "se_patients freedom").split()
EXP = r"[A-Za-z0-9_.]+(?:-\d+k)?"                     # 3.4, 0.1.7a, 4.2.1-100k
OPERAND = re.compile(rf"(?P<exp>{EXP})(?::(?P<part>\w+))?(?:@(?P<testset>\w+))?(?:-(?P<minus>{EXP}))?"
                     r"(?P<offset>\+[\d.]+)?")
METRIC = re.compile(r"auc|auc_mean(5|14|4)|(mean_accuracy|subset_accuracy|fnr|oracle_auc)@\d*\.?\d+")
TEXT = {"atelectasis_mimic_chexpert": ("3.3", "chexpert_test", "Atelectasis"),     # sentences of section 3.3
        "effusion_mimic_chexpert": ("3.3", "chexpert_test", "Effusion")}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --- begin copy: AUC and resampling ---
# Throughout: y is 0/1 [n, K], p float [n, K] in [0, 1]; a row is an image, a column a label; NaN: undefined.
def mean_over_labels(values, variant="corrected"):
    """Mean of the defined values over the last axis; "paper" leaves out zeros too. NaN if none is left."""
    used = values > 0 if variant == "paper" else ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(used, values, 0).sum(-1) / used.sum(-1)


def auc(y, p, variant="corrected"):
    """Area under the ROC curve per label, float [K] (a float for 1-D input): pairs in order, a tie is 1/2.

    Undefined without both classes; "paper" gives 0 to a label without positives.
    """
    if np.ndim(y) == 1:
        return auc(y[:, None], p[:, None], variant)[0]
    values = np.full(y.shape[1], np.nan)
    for k, (truth, score) in enumerate(zip(y.T, p.T)):
        positive, negative = (np.sort(score[np.flatnonzero(truth == c)]) for c in (1, 0))    # mask is slower
        if len(positive) and len(negative):
            below = np.searchsorted(negative, positive)
            tied = negative[np.minimum(below, len(negative) - 1)] == positive
            ties = np.searchsorted(negative, positive[tied], "right") - below[tied]
            values[k] = (below.sum() + ties.sum() / 2) / (len(positive) * len(negative))
        elif variant == "paper" and not len(positive):
            values[k] = 0.0
    return values


def auc_influence(y, p):
    """What each image adds to the AUC of one label (1-D, both classes), float [n].

    A positive: (share of the negatives below it, ties 1/2, - AUC) / positives; a negative likewise with the
    positives above it. The components of DeLong et al. (1988), by ranks as in Sun & Xu (2014).
    """
    positive = y == 1
    below_or_at = [np.searchsorted(ranked, p) + np.searchsorted(ranked, p, "right")
                   for ranked in (np.sort(p[~positive]), np.sort(p[positive]))]
    negatives, positives = (~positive).sum(), positive.sum()
    placed = np.where(positive, below_or_at[0] / (2 * negatives), 1 - below_or_at[1] / (2 * positives))
    return (placed - placed[positive].mean()) / np.where(positive, positives, negatives)


def delong_test(difference, parts, clusters):
    """Test of equal AUC of two models on the same images (DeLong et al. 1988; Obuchowski 1997); one label.

    parts float [2, P]: auc_influence, left - right, summed over the positives and the negatives of each
    patient; clusters: how many patients have a positive, a negative. Returns a dict: difference, se, z, p;
    se is NaN if a class has one patient, z and p where se tells nothing.
    """
    (ten, one), (m, n), size, se = parts, clusters, len(parts[0]), np.nan
    if min(m, n) > 1:
        variance = m / (m - 1) * ten @ ten + n / (n - 1) * one @ one + 2 * size / (size - 1) * ten @ one
        se = np.sqrt(max(variance, 0))
    z = difference / se if se > 0 else (0.0 if se == difference == 0 else np.nan)
    return {"difference": difference, "se": se, "z": z, "p": 2 * ndtr(-abs(z))}


@lru_cache(maxsize=8)
def resample_counts(size, resamples, seed):
    """How often each of `size` units is drawn in every bootstrap resample, uint8 [B, size], read-only."""
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, size), np.uint8, order="F")     # read patient by patient
    for row in draws:
        row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
    draws.flags.writeable = False
    return draws


def draw_patients(patient, resamples, seed=0):
    """Bootstrap over patients: each image's patient, int [n], and how often each is drawn, uint8 [B, P].

    The draws depend on the set of patients and the seed alone: two models on one test set get the same ones.
    """
    names, index = np.unique(patient, return_inverse=True)
    return index, resample_counts(len(names), resamples, seed)


def auc_draws(y, p, patient, draws, chunk=128):
    """AUC per label of every resample, float [B, K], by weighted ranks; patient and draws from draw_patients.

    Scores are sorted once. Positives that outrank the same negatives share a row; `step` holds the negatives
    between a row and the one before (twice; a tie: once here, once in the next), by patient: a resample costs
    one sparse product and one cumulative sum, here by blocks of 32 rows times a triangle of ones, twice as
    fast as np.cumsum. Counts are exact, in 16 bits where all rows of a label fit (half the time), or in
    float32, up to 2^22 images.
    """
    triangle, patients, sides = np.tri(32, dtype=np.float32), draws.shape[1], ("left", "right")
    maps, values, most = [], np.full((len(draws), y.shape[1]), np.nan), int(draws.max(initial=0))
    for k in range(y.shape[1]):
        order = np.argsort(p[:, k])
        score, owner, positive = p[order, k], patient[order], y[order, k] == 1
        high, low = score[positive], score[~positive]
        outranked = sum(np.searchsorted(low, high, side) for side in sides)
        _, first, row = np.unique(outranked, return_index=True, return_inverse=True)
        next_row = np.concatenate([np.searchsorted(high[first], low, side) for side in sides])
        entries = (next_row, np.tile(owner[~positive], 2)), (row, owner[positive])
        shape = (len(first) // 32 + 1) * 32, patients
        largest = max(np.bincount(rows).max(initial=0) for rows, _ in entries)
        kind = np.uint16 if largest * most < 2 ** 16 else np.float32
        maps.append([csr_matrix((np.ones(len(cells[0]), kind), cells), shape) for cells in entries])
    for start in range(0, len(draws), chunk):
        block = draws[start:start + chunk].T
        weights = {kind: block.astype(kind, order="C") for kind in {step.dtype for step, _ in maps}}
        for k, (step, at) in enumerate(maps):
            weight = weights[step.dtype]                                        # [P, b]
            below, drawn = ((cells @ weight).astype(np.float32, copy=False) for cells in (step, at))
            below = triangle @ below.reshape(-1, 32, below.shape[1])
            below[1:] += np.cumsum(below[:-1, -1], 0)[:, None]                  # what the blocks before hold
            below = below.reshape(drawn.shape)                                  # [rows, b]
            ordered, positives = np.einsum("ij,ij->j", drawn, below, dtype=np.float64), drawn.sum(0)
            with np.errstate(invalid="ignore"):
                values[start:start + chunk, k] = ordered / (positives.astype(np.float64) * below[-1])
    return values


def sum_draws(columns, patient, draws, chunk=128):
    """Sums of float columns [n, M] in every resample, [B, M]: the rates of a resample are ratios of these.

    float32 is exact for counts below 2^24, and twice as fast.
    """
    ones, shape = np.ones(len(patient), columns.dtype), (draws.shape[1], len(patient))
    by_patient = csr_matrix((ones, (patient, np.arange(len(patient)))), shape) @ columns
    sums = np.zeros((len(draws), columns.shape[1]), columns.dtype)
    for start in range(0, len(by_patient), chunk):          # few enough for their draws to be cached
        sums += draws[:, start:start + chunk].astype(columns.dtype) @ by_patient[start:start + chunk]
    return sums


def interval(draws, value=None, influence=None, level=0.95):
    """Percentile interval of draws [B], NaN left out; BCa (Efron 1987) if value and influence [P] are given.

    influence: how much each patient adds to the value. BCa needs draws on both sides of the value.
    """
    draws, tails = draws[~np.isnan(draws)], np.array([(1 - level) / 2, (1 + level) / 2])
    if not len(draws):
        return np.nan, np.nan
    if influence is not None and draws.min() < value < draws.max():
        bias = ndtri(((draws < value).mean() + (draws <= value).mean()) / 2)
        skew = (influence ** 3).sum() / (6 * (influence ** 2).sum() ** 1.5)
        tails = ndtr(bias + (bias + ndtri(tails)) / (1 - skew * (bias + ndtri(tails))))
    return tuple(np.interp(tails * (len(draws) - 1), np.arange(len(draws)), np.sort(draws)))
# --- end copy: AUC and resampling ---


class InputError(ValueError):
    """A mistake in the user's files; the text is the sentence to print."""


def read_csv(path, columns=(), dtype=str):
    """A CSV, by default with every cell as text, that has rows and the columns that are needed."""
    try:
        frame = pd.read_csv(path, dtype=dtype, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV table with a header ({' '.join(str(error).split())})") from None
    for name in columns:
        if name not in frame:
            raise InputError(f"{path} has no column {name!r}; expected {', '.join(columns)}")
    if frame.empty:
        raise InputError(f"{path} has a header and no rows")
    return frame


# ---------------------------------------------------------------------------- from runs to an estimate

# values [R]: a number of every run, or a combination of several. pooled [B]: its mean over runs in every
# resample of patients; nested [B]: the same with the runs resampled too; None where predictions are missing.
# variance: what the choice of runs adds to the variance of the mean over runs; NaN (unknown) with one run.
Arm = namedtuple("Arm", "values pooled nested variance")
# se_runs, se_patients: NaN where unknown; freedom: degrees of freedom behind p, inf for a normal test.
Estimate = namedtuple("Estimate", "effect low high p se_runs se_patients freedom runs")


def make_arm(exp, values, draws=None):
    """An arm from its runs: values float [R]; draws float [R, B], the same patients for all runs.

    R runs drawn with replacement show (R - 1)/R of their variance: the deviation from the mean is enlarged.
    What comes from the choice of patients (run x patient) is taken off the variance between runs.
    """
    values, count = np.asarray(values, float), len(values)
    pooled = None if draws is None else draws.mean(0)
    if count == 1:                                         # no other run would change the constant answer
        return Arm(values, pooled, pooled, 0.0 if exp == "always_negative" else np.nan)
    if draws is None:
        return Arm(values, None, None, values.var(ddof=1) / count)
    picks = np.random.default_rng(zlib.crc32(exp.encode())).integers(count, size=draws.shape)
    nested = pooled + np.sqrt(count / (count - 1)) * (np.take_along_axis(draws, picks, 0).mean(0) - pooled)
    own = draws - values[:, None] - (pooled - values.mean())
    interaction = np.nanvar(own, axis=1, ddof=1).sum() / (count - 1)
    return Arm(values, pooled, nested, max(values.var(ddof=1) - interaction, 0) / count)


def estimate(arms, offset=0.0):
    """The sum of sign * (mean over an arm's runs), minus an offset, with 95 % interval and p for "it is 0".

    Interval: percentiles of the nested bootstrap, which errs on the wide side (Owen 2007, "pigeonhole").
    p: Student's t; the runs' part of the standard error has R - 1 degrees of freedom an arm, the patients'
    part has plenty (Satterthwaite). From runs alone both are Welch's. With predictions, both leave out what
    an arm's runs add where it is unknown: one run is judged by its patients.

    Args: arms: [(sign, Arm)].
    """
    counts = [len(arm.values) for _, arm in arms]
    effect = sum(sign * arm.values.mean() for sign, arm in arms) - offset
    parts = np.array([arm.variance for _, arm in arms])
    predictions = arms[0][1].pooled is not None
    patients = np.nanvar(sum(sign * arm.pooled for sign, arm in arms), ddof=1) if predictions else np.nan
    error = np.sqrt(np.nansum(parts) + patients if predictions else parts.sum())
    lost = sum(part ** 2 / (count - 1) for part, count in zip(parts, counts) if part > 0)
    freedom = error ** 4 / lost if lost else np.inf
    if predictions:
        low, high = interval(sum(sign * arm.nested for sign, arm in arms) - offset)
    else:
        low, high = effect + stdtrit(freedom, [0.025, 0.975]) * error if error else (np.nan, np.nan)
    p = 2 * stdtr(freedom, -abs(effect) / error) if error else (np.nan if effect else 1.0)
    return Estimate(effect, low, high, p, np.sqrt(parts.sum()), np.sqrt(patients), freedom, counts)


def noncentrality(freedom):
    """The effect, in standard errors, that a two-sided t-test at 5 % finds with 80 % power; 2.80 for inf."""
    return nctdtrinc(freedom, 0.2, stdtrit(freedom, 0.975))


def holm(p):
    """Holm's adjusted p-values (1979), float [m]; NaN stays and does not count."""
    p = np.asarray(p, float)
    order = np.argsort(p)[:np.count_nonzero(~np.isnan(p))]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


# ---------------------------------------------------------------------------- numbers of our own runs

Run = namedtuple("Run", "labels auc draws parts clusters images patients digest")


def read_run(path):
    """One prediction file, sorted by path and by label.

    Returns: labels (NIH's spelling), y int8 [n, K], p float [n, K], patient [n] and path [n] of str.
    """
    frame = read_csv(path, ["path", "patient"], dtype={"path": str, "patient": str})
    names = [name[5:] for name in frame if name.startswith("true_")]
    alone = {name[5:] for name in frame if name.startswith("prob_")} ^ set(names)
    if alone or not names:
        raise InputError(f"{path} needs columns true_<label> and prob_<label> for every label"
                         + (f"; {sorted(alone)[0]!r} has one of them" if alone else ""))
    spelling = {re.sub("_", "", label).lower(): label for label in NIH14} | {"pleuraleffusion": "Effusion"}
    labels = [spelling.get(re.sub(r"[\W_]", "", name).lower(), name) for name in names]
    if len(set(labels)) < len(labels):
        raise InputError(f"{path} has label {max(labels, key=labels.count)} under two spellings; keep one")
    for row in frame.index[frame["path"].duplicated()][:1]:
        image = frame["path"][row]
        raise InputError(f"{path} row {row + 1}: image {image!r} stands there twice; keep one row an image")
    columns = []
    for kind, expected in (("true", "0 or 1"), ("prob", "a probability from 0 to 1")):
        numbers = np.array([pd.to_numeric(frame[f"{kind}_{name}"], errors="coerce") for name in names]).T
        wrong = ~np.isin(numbers, (0, 1)) if kind == "true" else ~((numbers >= 0) & (numbers <= 1))
        for row, k in np.argwhere(wrong)[:1]:
            column = f"{kind}_{names[k]}"
            found = str(frame[column][row])
            raise InputError(f"{path} row {row + 1}: {column} is {found!r}; expected {expected}")
        columns.append(numbers)
    paths = frame["path"].to_numpy(str)
    rows, order = np.argsort(paths, kind="stable"), np.argsort(labels)
    y, p = (numbers[rows][:, order] for numbers in columns)
    patient = np.where(frame["patient"] == "", "image " + frame["path"], frame["patient"]).astype(str)
    return [labels[k] for k in order], y.astype(np.int8), p, patient[rows], paths[rows]


def score_run(path, resamples):
    """AUC of every label of one file: points [K], draws [B, K], and what DeLong's test needs.

    parts float32 [2, P, K]: auc_influence, summed over a patient's positives and negatives; clusters [2, K]:
    patients with an image of the class.
    """
    labels, y, p, patient, paths = read_run(path)
    index, draws = draw_patients(patient, resamples, zlib.crc32(path.stem.encode()))
    areas, shape = auc(y, p), (2, draws.shape[1], len(labels))
    parts, clusters = np.zeros(shape, np.float32), np.zeros((2, len(labels)), int)
    for k in np.flatnonzero(~np.isnan(areas)):
        added = auc_influence(y[:, k], p[:, k])
        for c, members in enumerate((y[:, k] == 1, y[:, k] == 0)):
            parts[c, :, k] = np.bincount(index[members], added[members], draws.shape[1])
            clusters[c, k] = len(np.unique(index[members]))
    digest = zlib.crc32("\n".join([*labels, *paths, *patient]).encode() + y.tobytes())
    return Run(labels, areas, auc_draws(y, p, index, draws), parts, clusters, len(y), draws.shape[1], digest)


def delong_p(left, right, k):
    """p of "AUC(left) = AUC(right)" for label k; left, right: lists of Runs, whose AUCs are averaged."""
    sides = [(np.mean([run.auc[k] for run in runs]),
              sum(run.parts[..., k] for run in runs).astype(float) / len(runs)) for runs in (left, right)]
    difference, parts = (a - b for a, b in zip(*sides))
    return delong_test(difference, parts, left[0].clusters[:, k])["p"]


def rate(y, p, name, threshold):
    """Numerator and denominator, float [n, M]: a rate at p > threshold is the mean of M ratios of sums."""
    right = (p > threshold) == (y == 1)
    if name == "fnr":
        return (~right & (y == 1)).astype(float), (y == 1).astype(float)
    right = right.mean(1) if name == "mean_accuracy" else right.all(1)
    return right[:, None].astype(float), np.ones((len(y), 1))


def oracle_draws(y, p, index, draws, fraction, which):
    """Mean Oracle AUC of every resample, float [B], when an expert sees floor(n * fraction) of n images.

    A pair with a referred image is in order (p elsewhere lies strictly between 0 and 1), so with V of W pairs
    untouched the AUC is 1 - V/W (1 - AUC of the untouched). "uncertain" refers the images of smallest mean
    |p - 0.5|; "random" is the mean over all choices of k images: V/W = (n - k)(n - k - 1) / (n(n - 1)).
    """
    weight = draws[:, index].astype(np.int64)                          # [B, n], copies of each image
    images = weight.sum(1, keepdims=True)
    referred = (images * fraction).astype(np.int64)
    if which == "random":
        untouched = (images - referred) * (images - referred - 1) / (images * (images - 1))
        return mean_over_labels(1 - untouched * (1 - auc_draws(y, p, index, draws)))
    order = np.argsort(np.abs(p - 0.5).mean(1), kind="stable")
    before = np.cumsum(weight[:, order], 1) - weight[:, order]
    kept = np.empty_like(weight)
    kept[:, order] = weight[:, order] - np.clip(referred - before, 0, weight[:, order])
    untouched, pairs = ((part @ (y == 1)) * (part @ (y == 0)) for part in (kept, weight))      # [B, K]
    areas = auc_draws(y, p, np.arange(len(y)), kept.astype(np.uint8))
    with np.errstate(invalid="ignore"):
        lost = np.where(untouched == 0, 0, untouched * (1 - areas)) / pairs
    return mean_over_labels(1 - lost)


class Predictions:
    """Numbers from prediction files, each with its resamples over patients."""
    source = "our runs"

    def __init__(self, root, resamples, exps="*"):
        """root: folder of experiments; exps: those to read, as "3.4,4.*"."""
        self.resamples, self.files = resamples, {}
        for path in sorted(root.glob("*/predictions/seed*/*.csv")):
            exp, _, seed, _ = path.relative_to(root).parts
            asked = any(fnmatch.fnmatchcase(exp, pattern) for pattern in exps.split(","))
            if asked and not path.stem.endswith("_val"):   # what thresholds are chosen on is no test set
                self.files.setdefault((exp, path.stem), {})[seed.removeprefix("seed")] = path
        for pattern in exps.split(","):
            if not fnmatch.filter({exp for exp, _ in self.files}, pattern):
                raise InputError(f"{root} holds no {pattern}/predictions/seed<k>/<testset>.csv of predict.py")
        paths = sorted((path for files in self.files.values() for path in files.values()),
                       key=lambda path: (path.stem, path))      # a process draws a test set's patients once
        with ProcessPoolExecutor(min(len(paths), os.cpu_count())) as pool:
            runs = dict(zip(paths, pool.map(score_run, paths, itertools.repeat(resamples))))
        self.runs = {key: [runs[path] for path in files.values()] for key, files in self.files.items()}
        for _, group in itertools.groupby(paths, key=lambda path: path.stem):
            first, *others = group
            for other in others:
                if runs[other].digest != runs[first].digest:
                    raise InputError(f"{other} and {first} cannot be compared: {difference(first, other)}")

    def values(self, exp, testset, metric, part=None):
        """(seeds, values [R], draws [R, B]) of an arm; None if it was not run or the metric is undefined."""
        name, _, level = metric.partition("@")
        exp = exp if (exp, testset) in self.files else exp.removesuffix("a")     # recipe a has the plain key
        if name in LABELS or name == "auc":
            runs = self.runs.get((exp, testset), [])
            wanted = [part] if name == "auc" else LABELS[name]
            columns = [runs[0].labels.index(label) for label in wanted if runs and label in runs[0].labels]
            if len(columns) < (4 if name == "auc_mean5" else len(wanted)):
                return None
            found = {seed: (mean_over_labels(run.auc[columns]), mean_over_labels(run.draws[:, columns]))
                     for seed, run in zip(self.files[exp, testset], runs)}
        else:
            constant = exp == "always_negative"                # the same for all predictions of the test set
            files = self.files.get((exp, testset), {})
            for key, others in self.files.items() if constant else ():
                files = dict([*others.items()][:1]) if key[1] == testset else files
            found = {seed: self.decide(path, name, float(level), part, constant)
                     for seed, path in files.items()}
        if not found or np.isnan([value for value, _ in found.values()]).any():
            return None
        return list(found), np.array([v for v, _ in found.values()]), np.array([d for _, d in found.values()])

    @lru_cache(maxsize=None)
    def decide(self, path, name, level, part, constant):
        """Value and draws [B], over a file's five labels, of a metric with a threshold or referred share."""
        labels, y, p, patient, _ = read_run(path)
        columns = [k for k, label in enumerate(labels) if label in STUDY5]
        y, p = y[:, columns], np.zeros((len(y), len(columns))) if constant else p[:, columns]
        index, draws = draw_patients(patient, self.resamples, zlib.crc32(path.stem.encode()))
        if name == "oracle_auc":
            once = np.ones((1, draws.shape[1]), np.uint8)
            return [oracle_draws(y, p, index, counts, level, part) for counts in (once, draws)]
        over, under = rate(y, p, name, level)
        with np.errstate(invalid="ignore"):
            return [mean_over_labels(over.sum(0) / under.sum(0)),
                    mean_over_labels(sum_draws(over, index, draws) / sum_draws(under, index, draws))]

    def delong(self, left, right, testset, label):
        left, right = self.runs[left, testset], self.runs[right, testset]
        return delong_p(left, right, left[0].labels.index(label))

    def sizes(self, testset):
        """Images and patients of a test set."""
        run = next(runs[0] for key, runs in self.runs.items() if key[1] == testset)
        return run.images, run.patients


def difference(first, other):
    """In words, how two prediction files that should be about the same images differ."""
    labels, y, _, patient, paths = read_run(first)
    labels2, y2, _, patient2, paths2 = read_run(other)
    if labels != labels2:
        return f"label {sorted(set(labels) ^ set(labels2))[0]!r} is in one of them only"
    if len(paths) != len(paths2) or (paths != paths2).any():
        odd = str(sorted(set(paths) ^ set(paths2))[0])
        return f"image {odd!r} is in one of them only; predict the same images with both"
    row = np.flatnonzero((y != y2).any(1) | (patient != patient2))[0]
    return f"patient or true labels of image {str(paths[row])!r} differ"


# ------------------------------------------------------------------ numbers that the author published

class Published:
    """The author's per-run numbers: there are no predictions, so only the spread over runs is known."""
    source = "published runs"
    NAMES = {"mean_acc": "mean_accuracy", "subset_acc": "subset_accuracy", "underdiagnosis_mean": "fnr",
             "calibration_error": "calibration_error"}

    def __init__(self, folder):
        self.numbers = {}

        def keep(r, metric, part, value):
            self.numbers.setdefault((r["exp"], r["testset"], metric, part), {})[r["seed"]] = float(value)

        columns = "exp seed testset classes label auc".split()
        for r in read_csv(folder / "raw_runs_auc.csv", columns).to_dict("records"):
            if float(r["auc"]) > 0:                        # 0.0 stands for "no positives"
                mean = r["label"] == "mean"
                keep(r, f"auc_mean{r['classes']}" if mean else "auc", None if mean else r["label"], r["auc"])
        columns = "exp seed testset threshold metric value".split()
        for r in read_csv(folder / "raw_runs_threshold.csv", columns).to_dict("records"):
            keep(r, f"{self.NAMES[r['metric']]}@{float(r['threshold']):g}", None, r["value"])
        columns = "exp seed testset referred oracle_auc".split()
        for r in read_csv(folder / "raw_runs_oracle.csv", columns).to_dict("records"):
            keep(r, f"oracle_auc@{float(r['referred']):g}", "uncertain", r["oracle_auc"])
        self.files = dict.fromkeys(key[:2] for key in self.numbers)

    def values(self, exp, testset, metric, part=None):
        """(seeds, values [R], None) of an arm, or None."""
        name, _, level = metric.partition("@")
        metric = f"{name}@{float(level):g}" if level else name
        asked = [("auc", label) for label in LABELS[name]] if name == "auc_mean4" else [(metric, part)]
        runs = [self.numbers.get((exp, testset, *key)) for key in asked]
        if None in runs:
            return None
        return list(runs[0]), np.mean([list(numbers.values()) for numbers in runs], 0), None

    def delong(self, *_):
        return np.nan

    def sizes(self, _):
        return "", ""


# ---------------------------------------------------------------------------- claims and verdicts

def read_claims(path):
    """The claims, each with its two operands taken apart."""
    claims = read_csv(path, CLAIM).to_dict("records")
    for line, claim in enumerate(claims, 2):
        metric, _, other = claim["metric"].partition("-")
        claim["sides"] = []
        for sign, name, text in ((1, metric, claim["left"]), (-1, other or metric, claim["right"])):
            spread, operand = re.fullmatch(r"sd\((\w+)\)", text), OPERAND.fullmatch(text)
            if not METRIC.fullmatch(name) or not (spread or operand) or claim["sign"] not in ("1", "0", "-1"):
                raise InputError(f"{path} line {line}: metric {name!r} of {text!r}, sign {claim['sign']!r}, "
                                 "cannot be read; --help says how a claim is written")
            claim["sides"].append((sign, name, spread[1] if spread else operand))
    return claims


def judge_spread(claim, source):
    """Is the spread over runs larger on one test set? Mean over arms of log(sd left / sd right), t over arms.

    The arms are those of Table 2, of which the paper says it: stand-ins and controls have no say.
    """
    ratios, arms = [], set(read_csv(REPORTED / "table2.csv", ["exp"])["exp"])
    for exp in dict.fromkeys(exp for exp, _ in source.files if exp in arms):
        spreads = []
        for _, metric, name in claim["sides"]:
            testset = claim["testset"] if name == "ood" else name
            found = source.values(exp, testset, metric) or source.values(exp, testset, "auc_mean5")
            spreads.append(np.std(found[1], ddof=1) if found and len(found[1]) > 1 else 0)
        if min(spreads) > 0:
            ratios.append(np.log(spreads[0] / spreads[1]))
    if len(ratios) < 2:
        return None, "fewer than two arms of Table 2 have several runs on both sets"
    return estimate([(1, make_arm("", ratios))]), f"log ratio of the sd over runs, {len(ratios)} arms"


def judge(claim, source):
    """(Estimate or None, remark) of left - right. What concerns one arm on both sides is paired by run."""
    if isinstance(claim["sides"][0][2], str):
        return judge_spread(claim, source)
    terms, offset = {}, 0.0
    for sign, metric, operand in claim["sides"]:
        testset = operand["testset"] or claim["testset"]
        for side, exp in ((sign, operand["exp"]), (-sign, operand["minus"])):
            if exp and (found := source.values(exp, testset, metric, operand["part"])) is None:
                return None, f"no {metric} of {exp} on {testset}"
            if exp:
                terms.setdefault(exp, []).append((side, *found))
        offset -= sign * float(operand["offset"] or 0)
    arms = []
    for exp, parts in terms.items():
        seeds = [seed for seed in parts[0][1] if all(seed in part[1] for part in parts)]
        if not seeds:
            return None, f"no run of {exp} is on both sides"
        rows = [[part[1].index(seed) for seed in seeds] for part in parts]
        values, draws = (sum(part[0] * part[n][row] for part, row in zip(parts, rows))
                         if parts[0][n] is not None else None for n in (2, 3))
        arms.append((1, make_arm(exp, values, draws)))
    remarks = ["the paper claims no direction; read as left > right"] if claim["sign"] == "0" else []
    if any(np.isnan(arm.variance) for _, arm in arms):
        remarks.append("an arm has one run: its spread over runs is unknown")
    return estimate(arms, offset), "; ".join(remarks)


def verdicts(claims, source):
    """A row a claim. "holds", "contradicted": interval without 0, p < 0.05 after Holm in the family."""
    judged = [judge(claim, source) for claim in claims]
    p = np.array([np.nan if result is None else result.p for result, _ in judged])
    family, adjusted = np.array([claim["family"] for claim in claims]), np.full(len(p), np.nan)
    for name in set(family):
        adjusted[family == name] = holm(p[family == name])
    rows = []
    for claim, (result, remark), q, q_all in zip(claims, judged, adjusted, holm(p)):
        row = {**{name: claim[name] for name in CLAIM}, "verdict": "not run"}
        if result:
            clear = q < 0.05 and (result.low > 0 or result.high < 0)
            toward = int(clear * np.sign(result.effect)) * (int(claim["sign"]) or 1)
            row |= {"verdict": ("undecided", "holds", "contradicted")[toward], "effect": result.effect,
                    "ci_low": result.low, "ci_high": result.high, "p": result.p, "p_holm": q,
                    "p_holm_all": q_all, "se_runs": result.se_runs, "se_patients": result.se_patients,
                    "runs": " ".join(map(str, result.runs))}
        rows.append({**row, "source": source.source, "remark": remark})
    return pd.DataFrame(rows, columns=VERDICT)


def all_pairs(source):
    """Every arm, and every pair of arms, on every test set: components and comparisons, as DataFrames."""
    components, comparisons = [], []
    asked = [("14", "", "auc_mean14", None), ("5", "", "auc_mean5", None)]
    asked += [("5" if label in STUDY5 else "14", label, "auc", label) for label in NIH14]
    sets = dict.fromkeys(testset for _, testset in source.files)
    for testset, (labels, label, metric, part) in itertools.product(sets, asked):
        arms = {exp: make_arm(exp, *found[1:]) for exp, name in source.files
                if name == testset and (found := source.values(exp, testset, metric, part))}
        where, rows = {"dataset": testset, "labels": labels, "label": label}, []
        for exp, arm in arms.items():
            one, count = estimate([(1, arm)]), len(arm.values)
            sd = arm.values.std(ddof=1) if count > 1 else np.nan
            components.append({"exp": exp, **where, "runs": count, "value": one.effect, "ci_low": one.low,
                               "ci_high": one.high, "sd_runs": sd, "se_runs": one.se_runs,
                               "se_patients": one.se_patients, "source": source.source})
        for left, right in itertools.combinations(arms, 2):
            pair = estimate([(1, arms[left]), (-1, arms[right])])
            runs = [(sign, make_arm(exp, arms[exp].values)) for sign, exp in ((1, left), (-1, right))]
            rows.append({**where, "left": left, "right": right, "effect": pair.effect, "ci_low": pair.low,
                         "ci_high": pair.high, "p": pair.p, "p_welch": estimate(runs).p,
                         "p_delong": source.delong(left, right, testset, label) if label else np.nan,
                         "se_runs": pair.se_runs, "se_patients": pair.se_patients,
                         "freedom": pair.freedom})
        comparisons += [{**row, "p_holm": q} for row, q in zip(rows, holm([row["p"] for row in rows]))]
    return pd.DataFrame(components), pd.DataFrame(comparisons, columns=PAIR)


def detectable(comparisons, source):
    """What two arms must differ by to be told apart with 80 % power: the mean of what each pair must.

    The mean, as the median of spreads over few runs lies low. Pairs with an arm of one run do not count;
    where se_patients is unknown, the difference is what runs alone ask for, a lower bound.
    """
    rows, means = [], comparisons[comparisons["label"] == ""]
    for (dataset, labels), pairs in means.groupby(["dataset", "labels"], sort=False):
        runs, patients = pairs["se_runs"], pairs["se_patients"]
        needed = noncentrality(pairs["freedom"]) * np.hypot(runs, patients.fillna(0))
        rows.append((dataset, labels, *source.sizes(dataset), len(pairs), runs.mean(), patients.mean(),
                     needed.mean(), noncentrality(np.inf) * patients.mean(), source.source))
    return pd.DataFrame(rows, columns="dataset labels images patients pairs se_runs se_patients detectable "
                                      "detectable_with_endless_runs source".split())


# ---------------------------------------------------------------------------- errata

def rebuild(folder, published):
    """Rebuild every printed number that the published runs can give, at the printed 4 decimals.

    Returns: rows of errata; {table: (rebuilt, compared)}.
    """
    errata, count = [], {}

    def check(where, exp, testset, quantity, printed, recomputed, note):
        equal = float(printed) == round(recomputed, 4)
        count[where] = [a + b for a, b in zip(count.get(where, (0, 0)), (equal, 1))]
        if not equal:
            change = round(recomputed, 4) - float(printed)
            kind = "last digit" if abs(change) < 1.5e-4 else "number"
            errata.append({"where": where, "exp": exp, "testset": testset, "quantity": quantity,
                           "printed": printed, "recomputed": f"{recomputed:.4f}",
                           "difference": f"{change:+.4f}", "kind": kind, "note": note})

    def check_runs(where, exp, testset, metric, part, quantity, mean, sd):
        """Mean and sd over the published runs; does leaving one run out give what was printed?"""
        if (found := published.values(exp, testset, metric, part)) is None:
            return
        seeds, values, note = found[0], found[1], ""
        for out in range(len(seeds)):
            rest = np.delete(values, out)
            if (round(rest.mean(), 4), round(rest.std(ddof=1), 4)) == (float(mean), float(sd)):
                note = f"the print leaves out the run of seed {seeds[out]}"
        if metric == "auc":
            note = "published with 4 decimals, so the last digit may be rounding"
        check(where, exp, testset, quantity, mean, values.mean(), note)
        check(where, exp, testset, f"{quantity}, sd over runs", sd, values.std(ddof=1), note)

    printed = {n: read_csv(folder / f"table{n}.csv").to_dict("records") for n in (2, 3, 5, 7, 8)}
    for r in printed[2]:
        check_runs("Table 2", r["exp"], r["testset"], f"auc_mean{r['classes']}", None,
                   f"AUC, {r['classes']} labels", r["auc_mean"], r["auc_sd"])
    for r in printed[3]:
        check_runs("Table 3", r["exp"], r["testset"], "auc", r["label"], f"AUC, {r['label']}",
                   r["auc_mean"], r["auc_sd"])
    for r in printed[5]:
        if r["auc_36"]:
            check_runs("Table 5", r["exp"], "nih_test", "auc_mean14", None, "AUC, 14 labels",
                       r["auc_36"], r["sd_36"])
    for r in read_csv(folder / "text_numbers.csv").to_dict("records"):
        if r["id"] == "exp3.1_table5":
            check_runs("Text", "3.1", "nih_test", "auc_mean14", None, r["quantity"], r["value"], r["sd"])
        elif r["id"] in TEXT:                               # in whole percent
            exp, testset, label = TEXT[r["id"]]
            if found := published.values(exp, testset, "auc", label):
                check("Text", exp, testset, r["quantity"], float(r["value"]) / 100, round(found[1].mean(), 2), "")
    names = {"Mean accuracy": "mean_accuracy", "Subset accuracy": "subset_accuracy", "FNR": "fnr",
             "Calibration error": "calibration_error"}
    asked = [("Table 7", r["exp"], f"{names[r['metric']]}@{r['threshold']}", None,
              f"{r['metric']} at {r['threshold']}", r["value"]) for r in printed[7]]
    asked += [("Table 8", r["exp"], f"oracle_auc@{r['referred']}", "uncertain",
               f"Oracle AUC at {r['referred']}", r["oracle_auc"]) for r in printed[8]]
    for where, exp, metric, part, quantity, number in asked:
        found = published.values(exp, "chexpert_valid", metric, part)
        means = published.values(exp, "chexpert_valid", "auc_mean5")
        if found and means:                                  # the run that is best on the evaluated images
            seed = means[0][int(np.argmax(means[1]))]
            value = found[1][found[0].index(seed)]
            check(where, exp, "chexpert_valid", quantity, number, value, f"run of seed {seed}")
    return errata, count


def images_behind(published, testset, near):
    """The number of images, closest to `near`, that lets every published subset accuracy be a whole count."""
    shares = np.array([value for key, runs in published.numbers.items() for value in runs.values()
                       if key[1] == testset and key[2].startswith("subset_accuracy")])
    sizes = np.arange(max(near - 60, 1), near + 61)[:, None]
    fits = (np.abs(np.round(shares * sizes) / sizes - shares) < 5.1e-5).all(1)      # 4 decimals are published
    return min(sizes[fits, 0].tolist(), key=lambda size: abs(size - near), default=None)


def contradictions(folder, published):
    """Heads, captions and sentences that the published runs, or the printed tables themselves, contradict."""
    errata = []

    def add(where, exp, testset, quantity, printed, recomputed, note):
        change = f"{recomputed - printed:+d}" if isinstance(printed, int) else ""
        errata.append({"where": where, "exp": exp, "testset": testset, "quantity": quantity,
                       "printed": printed, "recomputed": recomputed, "difference": change,
                       "kind": "statement", "note": note})

    printed = {n: read_csv(folder / f"table{n}.csv") for n in (2, 7, 8)}
    for testset, head in (("chexpert_valid", 234), ("padchest", 1861)):
        if (images := images_behind(published, testset, head)) != head:
            add("Table 2, head", "", testset, "images", head, images,
                "every published subset accuracy is a whole number of these")
    images, seen = images_behind(published, "chexpert_valid", 234), 0
    for nominal in sorted(set(map(float, printed[8]["referred"]))):
        seen += int(images * nominal)
        if seen > images * nominal + 1:
            add("Table 8, Figure 2(d)", "", "chexpert_valid", "share of images referred", f"{nominal:g}",
                f"{seen / images:.3f}", f"referrals add up to {seen} of {images} images")
    for testset in dict.fromkeys(key[1] for key in published.files):
        defined = {key[3] for key in published.numbers if key[1:3] == (testset, "auc")} & set(STUDY5)
        if len(defined) < 5:
            add("Table 2", "", testset, "labels in the five-class mean", 5, len(defined),
                f"no positive image: {', '.join(set(STUDY5) - defined)}")
    for exp in dict.fromkeys(key[0] for key in published.files):
        seeds, values, _ = published.values(exp, "nih_test", "auc_mean14")
        if len(seeds) < 5:
            add("Captions", exp, "", "fine-tuning runs", 5, len(seeds), f"published seeds {', '.join(seeds)}")
    for number, by, column in ((7, ["metric", "threshold"], "value"), (8, ["referred"], "oracle_auc")):
        for key, group in printed[number].groupby(by, sort=False):
            values = group.set_index("exp")[column].astype(float)
            values = -values if key[0] in ("FNR", "Calibration error") else values
            if (rank := int((values > values["3.4"]).sum()) + 1) > 3:
                add("0.A.7", "3.4", "chexpert_valid", f"rank in Table {number}, {' at '.join(key)}",
                    "at most 3", f"{rank} of {len(values)}", "“outperforms … or is at least under the top 3”")
    cells = printed[2].assign(key=printed[2]["testset"] + " " + printed[2]["classes"])
    mean, sd = (cells.pivot(index="exp", columns="key", values=name).astype(float)
                for name in ("auc_mean", "auc_sd"))
    for key, spread in sd.drop(columns=["nih_test 14", "nih_test 5"]).items():
        for exp in spread.index[spread < sd["nih_test 14"]]:
            add("Section 3.2", exp, key[:-2], "sd over runs against NIH, 14 labels",
                f"above {sd['nih_test 14'][exp]:.4f}", f"{spread[exp]:.4f}",
                "“notably larger for out-of-distribution datasets across all datasets”")
    for exp in ("2.3", "2.4", "3.1", "3.2", "3.3", "3.4"):
        if (above := int((mean.loc[exp] > mean.loc["1.2"]).sum())) < 6:
            add("Section 4.1", exp, "", "columns of Table 2 above 1.2", 6, above,
                "“the standard ResNet50 is consistently outperformed” by matched pre-training")
    for exp in dict.fromkeys(key[0] for key in published.files):
        if found := published.values(exp, "chexpert_valid", "auc_mean5"):
            add("Tables 7 and 8", exp, "chexpert_valid", "AUC of the run shown, above the mean of the runs",
                "not stated", f"{found[1].max() - found[1].mean():+.4f}", "chosen on the evaluated images")
    return errata


def write(frame, path):
    """A CSV that is never half written; numbers with 6 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        frame.to_csv(file, index=False, lineterminator="\n", float_format="%.6g")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--predictions", type=Path, help="folder with <exp>/predictions/seed<k>/<testset>.csv")
    given.add_argument("--reported", type=Path, nargs="?", const=REPORTED,
                       help="judge on the published runs (default folder: reported/ beside this script)")
    parser.add_argument("--exp", default="*", help="with --predictions: these experiments, as '3.4,4.*'")
    parser.add_argument("--out", required=True, type=Path, help="folder for the CSVs")
    parser.add_argument("--claims", type=Path, default=REPORTED / "claims.csv")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples of patients and runs")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    if args.bootstrap < 100:
        fail(f"--bootstrap {args.bootstrap} is too few for a 95 % interval; give at least 100")
    try:
        claims = read_claims(args.claims)
        source = (Published(args.reported) if args.reported
                  else Predictions(args.predictions, args.bootstrap, args.exp))
        components, comparisons = all_pairs(source)
        tables = {"verdicts": verdicts(claims, source), "components": components, "comparisons": comparisons,
                  "detectable": detectable(comparisons, source)}
        if args.reported:
            errata, count = rebuild(args.reported, source)
            tables["errata"] = pd.DataFrame(errata + contradictions(args.reported, source))
            for where, (equal, compared) in count.items():
                print(f"{where}: {equal} of {compared} printed numbers are those of the published runs")
        for name, table in tables.items():
            write(table, args.out / f"{name}.csv")
    except InputError as error:
        fail(error)
    except OSError as error:
        fail(f"{args.out} cannot be written ({error.strerror}: {error.filename})")
    counts = tables["verdicts"]["verdict"].value_counts()
    print(f"{len(claims)} claims on {source.source}:", ", ".join(f"{n} {name}" for name, n in counts.items()))
    print(f"wrote {', '.join(f'{name}.csv' for name in tables)} to {args.out}")


if __name__ == "__main__":
    main()
