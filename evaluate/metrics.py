"""Score prediction files: every metric of the study, its 95 % interval and its patient resamples.

Variant "paper" repeats what printed the tables of "From pre-training to downstream performance: does
domain-specific pre-training make sense?" (Krones 2026, arXiv:2605.08819) where that differs from the usual
definition, "corrected". To import: auc, auc_interval, delong, oracle_auc, mean_accuracy, subset_accuracy,
fnr, calibration_error, ece. Comparing arms (intervals over runs, verdicts) is compare.py's.

    python evaluate/metrics.py a.csv b.csv                     two models of yours, a table on the terminal
    python evaluate/metrics.py runs/*/predictions/seed*/*.csv --out results/metrics.csv

Reads   predictions: path, patient, true_<label> (1, 0, blank if unknown), prob_<label> (0 to 1), a row an
        image; sex, age, race if there, or from --manifest. A blank patient has no other image. "Pleural
        Effusion" and other spellings become NIH's. Experiment, seed and test set: from
        runs/<exp>/predictions/seed<k>/<test set>.csv, else the file's name, 0 and "test". nih_val.csv beside
        a file chooses thresholds and a temperature; <test set>.json beside it may hold the mark "stand_in".
Writes  metrics.csv: exp, seed, dataset, labels, metric, variant, label, threshold, value, ci_low, ci_high,
        stand_in. labels: what a mean is over: 5 (at least four of the study's), 14 (NIH's), all (if others).
        label: of one label; both blank: of whole images. threshold: of p > threshold, the share referred, or
        a bin's lower edge. value: blank if undefined. <exp>-ensemble, no seed: mean probability of its runs.
        draws.npz beside it (NAME.draws.npz of NAME.csv): for "exp/seed/dataset" float32 [rows, resamples],
        the values of a metric when patients are drawn with replacement, the same ones for every run;
        "exp/seed/dataset/rows": which, as labels|metric|label|threshold: AUCs, and for labels 5, else 14,
        else all, the other means.
Cells that are unknown are left out of every metric; a label that no image knows is not scored.
"""

import argparse
import csv
import json
import os
import re
import sys
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import expit, logit, ndtr, xlogy
from threadpoolctl import threadpool_limits

NIH14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
         "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
STUDY5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)        # nominal share of images referred to an expert
SPECIFICITIES = (0.9, 0.95)
BINS = 15                                            # of calibration errors and reliability curves
AGES = {"<=40": 40, "41-60": 60, "61-80": 80, ">80": np.inf}    # upper end of each band, years
LEAST = 10                                           # images of a group of people that is scored
UNKNOWN = "(?i)^(|nan|none|na|n/a|<na>|null|unknown|patient refused)$"      # patient, sex, race
NORMAL = 1.959964                                    # half width of a 95 % interval in standard errors
MEANS = {"auc": "auc_mean", "accuracy": "mean_accuracy"}        # names of means over labels
GROUPED = {True: ("auc", "ece", "fnr_youden", "fpr_youden"),    # by sex, age and race, with validation
           False: ("auc", "ece", "fnr@0.5", "fpr@0.5")}         # and without
UNREAD = re.compile("balanced_accuracy|.*_(f1|youden)$")        # whose resamples no script reads
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high stand_in".split()
TERMINAL = ["exp", "seed", "dataset", "labels", "metric", "label", "value", "ci_low", "ci_high"]


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --------------------------------------------------------------------------------------------------- ranking
# y [n, K] is 1, 0, anything else is unknown; p float [n, K] in [0, 1]; a row is an image, a column a label.
# Functions "of one label" take y and p, [n], of its known images. NaN is undefined. Influences, [n]: what a
# little more weight of each image adds to a metric.

def is_known(y):
    return (y == 1) | (y == 0)


def known_columns(y, p):
    """Yields y and p of the known images of each label."""
    for truth, score in zip(y.T, p.T):
        yield truth[is_known(truth)], score[is_known(truth)]


@np.errstate(invalid="ignore")
def mean_over_labels(values, variant="corrected"):
    """Mean of the defined values over the last axis; "paper" leaves out zeros too. NaN if none is left."""
    used = values > 0 if variant == "paper" else ~np.isnan(values)
    return np.where(used, values, 0).sum(-1) / used.sum(-1)


def ranks(p):
    """Rank of each score, int [n], equal scores sharing one."""
    return np.unique(p, return_inverse=True)[1]


def class_counts(y, level):
    """How many positives and how many negatives have each rank, int [2, ranks]."""
    size = level.max(initial=0) + 1
    positives = np.bincount(level[y == 1], minlength=size)
    return np.array([positives, np.bincount(level[y == 0], minlength=size)])


def ranked_auc(y, level, spread=True):
    """AUC of one label from ranks, and if `spread` the influences, [n]; NaN and zeros without both classes.

    Influence of a positive: its share of negatives below it (ties 1/2) less the AUC, over the number of
    positives; of a negative likewise. Source: DeLong et al. 1988, by ranks as in Sun & Xu 2014.
    """
    high, low = class_counts(y, level)
    positives, negatives = high.sum(), low.sum()
    if not positives or not negatives:
        return np.nan, np.zeros(len(y))
    below = (np.cumsum(low) - low / 2) / negatives
    above = 1 - (np.cumsum(high) - high / 2) / positives
    area = high @ below / positives
    if not spread:
        return area, np.zeros(len(y))
    influence = (y == 1) * (below[level] - area) / positives
    return area, influence + (y == 0) * (above[level] - area) / negatives


def average_precision(y, level):
    """AUPRC (average precision) of one label from ranks, and the influences, [n]; NaN without positives.

    The mean over positives of the precision at their score; a further image above a score changes it there.
    """
    counts = class_counts(y, level)
    high, positives = counts[0], counts[0].sum()
    if not positives:
        return np.nan, np.zeros(len(y))
    true, false = counts[:, ::-1].cumsum(1)[:, ::-1]            # that score at least as high
    flagged = np.maximum(true + false, 1)
    precision = true / flagged
    area = high @ precision / positives
    gain = np.cumsum(high * false / flagged ** 2)
    loss = np.cumsum(high * true / flagged ** 2)
    influence = (y == 1) * (precision - area + gain)[level] - (y == 0) * loss[level]
    return area, influence / positives


def auc_of(y, p):
    """AUC of one label and the influences, float [n]."""
    return ranked_auc(y, ranks(p))


def auc(y, p, variant="corrected"):
    """Area under the ROC curve per label, float [K] (a float for 1-D input): pairs in order, a tie is 1/2.

    Undefined without both classes; "paper" gives 0 to a label without positives.
    """
    if np.ndim(y) == 1:
        return auc(np.c_[y], np.c_[p], variant)[0]
    values = np.array([auc_of(*column)[0] for column in zip(y.T, p.T)])
    if variant == "paper":
        values[~(y == 1).any(0)] = 0
    return values


def clustered_error(y, influence, patient=None):
    """Standard error of an AUC, or a difference of AUCs, of one label from its influences, float [n].

    Images of one `patient` are a cluster (all alone by default). NaN if a class has fewer than two patients.
    Source: Obuchowski 1997; with one image a patient DeLong et al. 1988.
    """
    cluster = np.arange(len(y)) if patient is None else ranks(patient)
    size = cluster.max() + 1
    positive, negative = y == 1, y == 0
    m = len(np.unique(cluster[positive]))
    n = len(np.unique(cluster[negative]))
    if min(m, n) < 2:
        return np.nan
    ten = np.bincount(cluster[positive], influence[positive], size)
    one = np.bincount(cluster[negative], influence[negative], size)
    variance = m / (m - 1) * ten @ ten + n / (n - 1) * one @ one
    variance += 2 * size / (size - 1) * ten @ one
    return np.sqrt(max(variance, 0))


def auc_interval(y, p, patient=None):
    """(AUC, lower, upper end of its 95 % interval) of one label; 1-D y and p in scikit-learn's order.

    AUC +- 1.96 standard errors (DeLong), clustered by `patient` if given, within 0 and 1; NaN if undefined.
    """
    y = np.asarray(y)
    area, influence = auc_of(y, p)
    margin = NORMAL * clustered_error(y, influence, patient)
    return float(area), float(max(area - margin, 0)), float(min(area + margin, 1))


def delong(y, p_left, p_right, patient=None):
    """DeLong's test of equal AUC of two models on the same images, one label, all arguments 1-D.

    Returns: {difference, se, z, p}; se as clustered_error, z and p NaN where it tells nothing.
    Raises: ValueError without both classes.
    """
    y = np.asarray(y)
    left, left_influence = auc_of(y, p_left)
    right, right_influence = auc_of(y, p_right)
    difference = left - right
    if np.isnan(difference):
        raise ValueError("DeLong's test needs positives and negatives")
    se = clustered_error(y, left_influence - right_influence, patient)
    z = difference / se if se > 0 else (0.0 if se == difference == 0 else np.nan)
    return {"difference": difference, "se": se, "z": z, "p": 2 * ndtr(-abs(z))}


# ------------------------------------------------------------------------------------------------ resampling

@lru_cache(maxsize=8)
def resample_counts(size, resamples, seed):
    """How often each of `size` units is drawn in every bootstrap resample, uint8 [B, size]."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, size), np.uint8, order="F")     # read patient by patient
    for row in counts:
        row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
    return counts


def draw_patients(patient, resamples, seed=0):
    """Bootstrap over patients: each image's patient, int [n], and how often each is drawn, uint8 [B, P].

    The draws depend on the set of patients and the seed alone: two models on one test set get the same ones.
    """
    index = ranks(patient)
    return index, resample_counts(index.max() + 1, resamples, seed)


@np.errstate(invalid="ignore")
def auc_draws(y, p, patient, counts, chunk=128):
    """AUC per label of every resample, float [B, K], by weighted ranks; patient and counts of draw_patients.

    Positives of one score share a row. A row of `steps` holds the negatives between its positives and those
    before, by patient (twice; a tie: once here, once in the next), a row of `drawn` its positives. A resample
    costs two sparse products and a cumulative sum over rows, by blocks of 32 rows times a triangle of ones:
    twice as fast as np.cumsum. Exact in 16 bits where a row's counts fit, else in float32 up to 2^22 images.
    """
    values = np.full((len(counts), y.shape[1]), np.nan)
    triangle, most, maps = np.tri(32, dtype=np.float32), int(counts.max(initial=0)), []
    for truth, score in zip(y.T, p.T):
        high, low = truth == 1, truth == 0
        leaders, at = np.unique(score[high], return_inverse=True)
        between = [np.searchsorted(leaders, score[low], side) for side in ("left", "right")]
        shape = (len(leaders) // 32 + 1) * 32, counts.shape[1]
        negatives = np.concatenate(between), np.tile(patient[low], 2)
        for rows, owners in (negatives, (at, patient[high])):
            fits = np.bincount(rows).max(initial=0) * most < 2 ** 16
            ones = np.ones(len(rows), np.uint16 if fits else np.float32)
            maps.append(csr_matrix((ones, (rows, owners)), shape))
    for start in range(0, len(counts), chunk):
        block = counts[start:start + chunk].T                                       # [P, b]
        weights = {kind: block.astype(kind, order="C") for kind in {rows.dtype for rows in maps}}
        products = ((rows @ weights[rows.dtype]).astype(np.float32, copy=False) for rows in maps)
        for k, (steps, drawn) in enumerate(zip(products, products)):                # [rows, b]
            below = triangle @ steps.reshape(-1, 32, steps.shape[1])
            below[1:] += np.cumsum(below[:-1, -1], 0)[:, None]                      # of the blocks before
            below = below.reshape(drawn.shape)
            ordered = np.einsum("ij,ij->j", drawn, below, dtype=np.float64)
            pairs = drawn.sum(0, dtype=np.float64) * below[-1]
            values[start:start + chunk, k] = ordered / pairs
    return values


def linear_draws(values, sums, counts, chunk=128):
    """M metrics in every resample, to first order, float [B, M]; sums [P, M]: influence of each patient.

    The infinitesimal jackknife (Efron 1982): its spread is the bootstrap's where the metric is smooth.
    """
    sums, draws = sums.astype(np.float32), values - sums.sum(0)
    for start in range(0, len(sums), chunk):                # few enough for their draws to be cached
        block = counts[:, start:start + chunk].astype(np.float32)
        draws = draws + block @ sums[start:start + chunk]
    return draws


# ------------------------------------------------------------------------------------- decisions and referral

@np.errstate(invalid="ignore")
def share(hits, among):
    """Share of `among` that are `hits`, and the influences, [n]; or per column, [M] and [n, M]."""
    total = among.sum(0)
    value = hits.sum(0) / total
    return value, (hits - value * among) / total


def is_right(y, p, threshold):
    """Whether each cell is on its side of p > threshold, bool [n, K]; False where unknown."""
    return np.where(p > threshold, y == 1, y == 0)


def mean_accuracy(y, p, threshold, variant="corrected"):
    """Accuracy at p > threshold, averaged over labels; "paper" rounds each label to 4 decimals first."""
    accuracy, _ = share(is_right(y, p, threshold), is_known(y))
    return (accuracy.round(4) if variant == "paper" else accuracy).mean()


def all_right(y, p, threshold):
    """share() of the images with every label right among those with every label known."""
    return share(is_right(y, p, threshold).all(1), is_known(y).all(1))


def subset_accuracy(y, p, threshold):
    """Share of images with every label right at p > threshold, of those with every label known."""
    return all_right(y, p, threshold)[0]


def fnr(y, p, threshold):
    """Missed share of the positives per label at p > threshold, float [K]; undefined without positives."""
    return share((y == 1) & (p <= threshold), y == 1)[0]


def decisions(y, p, threshold, suffix):
    """Yields (name, value, influences) of one label at p > threshold."""
    missed, missed_influence = share((y == 1) & (p <= threshold), y == 1)
    alarms, alarms_influence = share((y == 0) & (p > threshold), y == 0)
    yield f"fnr{suffix}", missed, missed_influence
    yield f"fpr{suffix}", alarms, alarms_influence
    influence = -(missed_influence + alarms_influence) / 2
    yield f"balanced_accuracy{suffix}", 1 - (missed + alarms) / 2, influence
    yield f"accuracy{suffix}", *share(is_right(y, p, threshold), is_known(y))


def images_seen(n, fractions, variant="corrected"):
    """How many of n images an expert has seen at each nominal fraction, int [Q]: floor(n q); in "paper" they
    add up (an answered image has u = 0.5 and is not asked about again).
    """
    seen = np.array([int(n * q) for q in fractions])
    return np.minimum(seen.cumsum() if variant == "paper" else seen, n)


def answer_levels(p):
    """Ranks of each label's scores, int [n + 2, K]; the last two rows are those of the answers 0 and 1."""
    columns = [ranks(np.append(score, [0, 1])) for score in p.T]
    return np.stack(columns, 1)


class Referral:
    """Images in the order in which an expert is asked, ties by row.

    Args: level [n + 2, K] of answer_levels; u: |p - 0.5|, [n, K], for each label alone, or its mean, [n, 1].
    """

    def __init__(self, y, level, u):
        self.y, self.level, self.answers = y, level[:-2], (y == 1) * level[-1]
        self.turns = np.argsort(np.argsort(u, 0, kind="stable"), 0)

    def auc(self, seen, rows=slice(None), spread=False):
        """AUCs, [K], and if `spread` influences on their mean, [n], after the first `seen` were answered."""
        answered = np.where(self.turns < seen, self.answers, self.level)
        columns = zip(self.y[rows].T, answered[rows].T)
        areas, influences = zip(*(ranked_auc(*column, spread) for column in columns))
        count = np.count_nonzero(~np.isnan(areas))
        return np.array(areas), sum(influences) / max(count, 1)


def certainty(p):
    """Mean over labels of |p - 0.5|, float [n, 1]."""
    return np.abs(p - 0.5).mean(1, keepdims=True)


def oracle_auc(y, p, fractions, variant="corrected"):
    """Oracle AUC per label, float [Q, K], and the share of images that the expert saw, float [Q].

    "paper" gives 0 to a label without positives, and its referrals add up.
    """
    seen = images_seen(len(p), fractions, variant)
    referral = Referral(y, answer_levels(p), certainty(p))
    values = np.array([referral.auc(count)[0] for count in seen])
    if variant == "paper":
        values[:, ~(y == 1).any(0)] = 0
    return values, seen / len(p)


def risk_coverage_area(y, p, threshold=0.5):
    """Share of wrong labels among the 1, 2, ... n most certain images, averaged (Geifman et al. 2019)."""
    certain_first = np.argsort(-certainty(p)[:, 0], kind="stable")
    known = is_known(y)
    wrong = known & ~is_right(y, p, threshold)
    risk = pd.Series(wrong.sum(1) / known.sum(1))[certain_first]        # NaN where nothing is known
    return risk.dropna().expanding().mean().mean()


# ------------------------------------------------------------------------------------------------ calibration

def binned_error(bins, excess):
    """Sum over bins of count |mean excess| / n of one label, and the influences, float [n]."""
    sums = np.bincount(bins, excess)
    error = np.abs(sums).sum() / len(bins)
    return error, (np.sign(sums)[bins] * excess - error) / len(bins)


def released_calibration(y, p, thresholds):
    """calibration_error of one label, float [T]."""
    upper = np.linspace(0, 0.5, BINS + 1)[:-1] + 1 / BINS
    confidence = np.abs(p - 0.5)
    bins = np.searchsorted(upper, confidence, "right")
    errors = [binned_error(bins, confidence - is_right(y, p, t)) for t in thresholds]
    return np.array([error for error, _ in errors])


def calibration_error(y, p, thresholds=THRESHOLDS):
    """The paper's "calibration error", float [T, K]: |p - 0.5| held against the accuracy at the threshold.

    Bin i starts at i/30 but is 1/15 wide, and an item goes to the first bin that holds it, which is the first
    whose upper end lies above it. Source: the released evaluation code.
    """
    return np.array([released_calibration(*column, thresholds) for column in known_columns(y, p)]).T


def probability_bins(p, adaptive=False):
    """Bin of each probability of one label, int [n]: BINS equal widths, closed above, or equal counts."""
    if adaptive:
        return np.argsort(np.argsort(p, kind="stable")) * BINS // len(p)
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], p)


def ece_of(y, p, adaptive=False):
    """Expected calibration error of one label, and the influences, float [n]."""
    return binned_error(probability_bins(p, adaptive), p - y)


def ece(y, p, adaptive=False):
    """Expected calibration error per label, float [K]: p against the share of positives (Guo et al. 2017)."""
    return np.array([ece_of(*column, adaptive)[0] for column in known_columns(y, p)])


@np.errstate(invalid="ignore")
def reliability(y, p):
    """Reliability curve of one label: images, mean p, share of positives in each bin, float [BINS] each."""
    bins = probability_bins(p)
    count = np.bincount(bins, minlength=BINS)
    predicted = np.bincount(bins, p, BINS) / count
    return {"images": count, "predicted": predicted, "observed": np.bincount(bins, y, BINS) / count}


def temper(p, temperature):
    """sigmoid(logit(p) / temperature), with p kept 1e-8 off 0 and 1, the precision of a predictions file."""
    return expit(logit(np.clip(p, 1e-8, 1 - 1e-8)) / temperature)


def fit_temperature(y, p):
    """The temperature in 0.05-20 of least cross-entropy on all known cells (Guo et al., arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar          # takes half a second and is not always needed
    y, p = y[is_known(y)], p[is_known(y)]

    def cross_entropy(log_temperature):
        q = temper(p, np.exp(log_temperature))
        return -(xlogy(y, q) + xlogy(1 - y, 1 - q)).mean()
    found = minimize_scalar(cross_entropy, bounds=np.log([0.05, 20]), method="bounded")
    return float(np.exp(found.x))


# ------------------------------------------------------------------------------------------- operating points

def sensitivity_at(y, p, specificity):
    """Highest sensitivity of p > t of one label with at least that specificity; NaN without both classes."""
    if y.all() or not y.any():
        return np.nan
    threshold = np.quantile(p[y == 0], specificity - 1e-9, method="inverted_cdf")
    return (p[y == 1] > threshold).mean()


def choose_threshold(y, p, rule):
    """The lowest score t of one label where p > t is best by `rule`: "f1", or "youden" for
    sensitivity + specificity. NaN without both classes.
    """
    scores, level = np.unique(p, return_inverse=True)
    counts = class_counts(y, level)
    positives, negatives = counts.sum(1)
    if not positives or not negatives:
        return np.nan
    true, false = counts.sum(1, keepdims=True) - counts.cumsum(1)
    youden = true / positives - false / negatives
    f1 = true / (true + false + positives)                    # half of it
    return scores[np.argmax(f1 if rule == "f1" else youden)]


# ------------------------------------------------------------------------------------------ lists of metrics
# Names are "[paper ]metric[@threshold]"; after the value come influences, [n], where there is an interval.

def label_metrics(y, p, level, chosen, temperature):
    """Yields the metrics of one label.

    chosen: {rule: threshold} and temperature: of validation, {} and None without.
    """
    area, influence = ranked_auc(y, level)
    prevalence, known = y.mean(), y >= 0
    yield "auc", area, influence
    yield "paper auc", area if y.any() else 0
    yield "auprc", *average_precision(y, level)
    yield "brier", *share((p - y) ** 2, known)
    yield "ece", *ece_of(y, p)
    yield "adaptive_ece", ece_of(y, p, adaptive=True)[0]
    yield "always_negative_accuracy", *share(y == 0, known)
    yield "random_guess_accuracy", prevalence ** 2 + (1 - prevalence) ** 2
    yield "paper random_guess_accuracy", 1 - prevalence
    for least in SPECIFICITIES:
        yield f"sensitivity_at_specificity_{least:g}", sensitivity_at(y, p, least)
    for t, error in zip(THRESHOLDS, released_calibration(y, p, THRESHOLDS)):
        yield from decisions(y, p, t, f"@{t:g}")
        yield f"paper accuracy@{t:g}", is_right(y, p, t).mean().round(4)
        yield f"paper calibration_error@{t:g}", error
    for rule, t in chosen.items():
        yield f"threshold_{rule}", t
        yield from decisions(y, p, t, f"_{rule}")
    if temperature:
        yield "ece_temperature", ece_of(y, temper(p, temperature))[0]


def joint_metrics(y, p, level):
    """Yields the metrics of several labels together; level of answer_levels.

    An expert answers the uncertain images (oracle), or as many at random, or they are left out (rejection).
    """
    yield "risk_coverage_area", risk_coverage_area(y, p)
    yield "always_negative_subset_accuracy", subset_accuracy(y, 0 * y, 0.5)
    for t in THRESHOLDS:
        yield f"subset_accuracy@{t:g}", *all_right(y, p, t)
    n = len(y)
    seen = images_seen(n, FRACTIONS)
    referral = Referral(y, level, certainty(p))
    areas, influences = zip(*(referral.auc(k, spread=True) for k in seen))
    yield "auc_labels", np.count_nonzero(~np.isnan(areas[0]))
    values = mean_over_labels(np.array(areas))
    slopes = np.gradient(values, FRACTIONS)                             # what a larger share would add
    for q, k, value, slope, influence in zip(FRACTIONS, seen, values, slopes, influences):
        left = referral.turns[:, 0] >= k
        # a resample refers the same share: where it has more images above the cut, the cut moves
        yield f"oracle_auc@{q:g}", value, influence + slope * (k / n - ~left) / n
        untouched = (n - k) * (n - k - 1) / (n * (n - 1))               # share of the pairs, at random
        at_random = 1 - untouched * (1 - values[0])
        yield f"random_referral_auc@{q:g}", at_random, untouched * influences[0]
        yield f"rejection_auc@{q:g}", mean_over_labels(referral.auc(k, left)[0])
    for q, k in zip(FRACTIONS, images_seen(n, FRACTIONS, "paper")):
        yield f"paper oracle_auc@{q:g}", mean_over_labels(referral.auc(k)[0], "paper")


# ---------------------------------------------------------------------------------------------- reading files

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


class Predictions(NamedTuple):
    """One predictions file: its K labels, y int8 [n, K] (-1: unknown), p float64 [n, K], patient and path
    str [n], people: sex, age band and race, a DataFrame of str by image; and the mark of stand-ins.
    """
    labels: list
    y: np.ndarray
    p: np.ndarray
    patient: np.ndarray
    path: np.ndarray
    people: pd.DataFrame
    mark: str = ""


def nih_name(label):
    """NIH's spelling of a label ("Pleural effusion": "Effusion"); a label that NIH lacks keeps its own."""
    spelt = {name.replace("_", "").lower(): name for name in NIH14}
    spelt["pleuraleffusion"] = "Effusion"
    return spelt.get(re.sub(r"[\W_]", "", label).lower(), label)


def read_cells(path, cells, allowed, expected):
    """A table of text as float [n, K]. Raises InputError for the first cell that is not `allowed`."""
    numbers = cells.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    for row, k in np.argwhere(~allowed(numbers))[:1]:
        found = f"{path} row {row + 1}: {cells.columns[k]} is '{cells.iat[row, k]}'"
        raise InputError(f"{found}; expected {expected}")
    return numbers


def read_predictions(path):
    """One predictions file, checked. Raises InputError that names file, row and what was expected."""
    frame = read_csv(path, ["path", "patient"], {"path": str, "patient": str})
    truths, scores = frame.filter(regex="^true_"), frame.filter(regex="^prob_")
    if truths.empty:
        raise InputError(f"{path} has no columns true_<label>, prob_<label>, as evaluate/predict.py writes")
    names = truths.columns.str[5:]
    for name in names.symmetric_difference(scores.columns.str[5:]):
        has, lacks = ("true", "prob") if name in names else ("prob", "true")
        raise InputError(f"{path} has a column {has}_{name} but no {lacks}_{name}; add it or drop both")
    labels = names.map(nih_name)
    for label in labels[labels.duplicated()]:
        raise InputError(f"{path} has label {label} under two spellings; keep one")
    for row in np.flatnonzero(frame["path"].duplicated()):
        raise InputError(f"{path} row {row + 1}: image '{frame['path'][row]}' is there twice; keep one row")
    truths, scores = truths.replace("", -1), scores["prob_" + names]
    y = read_cells(path, truths, lambda cells: np.isin(cells, (-1, 0, 1)), "1, 0 or blank (unknown)")
    p = read_cells(path, scores, lambda cells: (cells >= 0) & (cells <= 1), "a probability from 0 to 1")
    rankable = (y == 1).any(0) & (y == 0).any(0)
    if not rankable.any():
        raise InputError(f"{path} has no label with both positives and negatives, so nothing can be ranked; "
                         "check true_<label> or add images")
    scored = is_known(y).any(0)
    nobody = frame["patient"].str.fullmatch(UNKNOWN)
    patient = frame["patient"].mask(nobody, "image " + frame["path"]).to_numpy(str)
    y, p = y[:, scored].astype(np.int8), p[:, scored]
    path = frame["path"].to_numpy(str)
    return Predictions(list(labels[scored]), y, p, patient, path, people_of(frame))


def people_of(frame):
    """Sex, age band and race, those that there are, "" if unknown; "White, non-Hispanic" is White."""
    people = frame.filter(["sex", "age", "race"]).astype(str).replace(UNKNOWN, "", regex=True)
    if "age" in people:
        ages = pd.to_numeric(people["age"], errors="coerce")
        bands = pd.cut(ages, [-np.inf, *AGES.values()], labels=list(AGES))
        people["age"] = bands.astype(object).fillna("")
    for race in ("White", "Black", "Asian") if "race" in people else ():
        people.loc[people["race"].str.contains(race), "race"] = race
    return people


@lru_cache(maxsize=1)
def read_manifests(manifests):
    """people_of every image of the manifests, by path."""
    frame = pd.concat([read_csv(path, ["path"]) for path in manifests]).fillna("")
    people = people_of(frame).assign(path=frame["path"])
    people = people.drop_duplicates().set_index("path")
    for path in people.index[people.index.duplicated()][:1]:
        raise InputError(f"the manifests know two people for image '{path}'; give the one that the "
                         "predictions were made from")
    if (people == "").all(axis=None):
        raise InputError(f"{manifests[0]} knows no sex, age or race of any image; leave --manifest out")
    return people


def find_people(test, path, manifests):
    """The predictions of the file with sex, age band and race from the manifests."""
    people = read_manifests(manifests)
    for image in test.path[~np.isin(test.path, people.index)][:1]:
        raise InputError(f"{path}: image '{image}' is in no manifest; give the one that the predictions "
                         "were made from")
    return test._replace(people=people.loc[test.path].reset_index(drop=True))


def read_mark(path):
    """The sentence "stand_in" of the facts beside a predictions file, "" without."""
    facts = path.with_suffix(".json")
    try:
        return json.loads(facts.read_text())["stand_in"] or "" if facts.is_file() else ""
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{facts} holds no facts of predictions with 'stand_in'; predict again") from None


def label_sets(labels):
    """{name: labels} that means are over: 5 (at least four), 14 and all, unless that is one of them."""
    study = [label for label in STUDY5 if label in labels]
    sets = {"5": study} if len(study) >= 4 else {}
    if set(NIH14) <= set(labels):
        sets["14"] = list(NIH14)
    if len(labels) not in map(len, sets.values()):
        sets["all"] = labels
    return sets


# --------------------------------------------------------------------------------------------- scoring a file

class Score:
    """The rows of one predictions file, from `labels` on, and their patient resamples."""

    def __init__(self, test, resamples, seed, validation):
        self.labels, self.people, self.mark = test.labels, test.people, test.mark
        self.y, self.p = test.y, test.p
        self.sets, self.level = label_sets(test.labels), answer_levels(test.p)
        self.main = next(iter(self.sets))
        self.patient, self.counts = draw_patients(test.patient, resamples, seed)
        draws = auc_draws(test.y, test.p, self.patient, self.counts)
        self.auc_draws = pd.DataFrame(draws, columns=test.labels)
        self.rows, self.drawn, self.linear = [], {}, {}
        self.chosen, self.temperature = choose(validation) if validation else ({}, None)

    def put(self, metric, value, sums=np.nan, labels="", label="", group=""):
        """One row: value +- 1.96 standard errors; sums: influence of each patient, [P], or NaN.

        AUCs have resamples by ranks; of everything else the means over the main label set have linear ones.
        """
        name, _, threshold = metric.removeprefix("paper ").partition("@")
        name = (name if label or group else MEANS.get(name, name)) + group
        key = "|".join((labels, name, label, threshold))
        error = np.linalg.norm(sums)
        if metric + group == "auc" and not np.isnan(value):
            draws = self.auc_draws[self.sets.get(labels, [label])].mean(axis=1)
            error, self.drawn[key] = draws.std(ddof=0), draws
        elif labels == self.main and not np.isnan(value + error) and not UNREAD.match(name):
            self.linear[key] = value, sums
        margin = NORMAL * error if error > 1e-12 else np.nan        # no spread at all tells nothing
        variant = "paper" if metric.startswith("paper") else "corrected"
        ends = max(value - margin, 0), min(value + margin, 1)
        self.rows.append((labels, name, variant, label, threshold, value, *ends, self.mark))

    def by_patient(self, rows, influence=None):
        """Influence of each patient, float [P], from those of the images `rows`; NaN without."""
        if influence is None:
            return np.nan
        return np.bincount(self.patient[rows], influence, self.counts.shape[1])

    def collect(self, inside=True):
        """{metric: {label: (value, influence by patient)}} of the images `inside`, bool [n]."""
        found = defaultdict(dict)
        for k, label in enumerate(self.labels):
            rows = np.flatnonzero(inside & is_known(self.y[:, k]))
            y, p, level = (table[rows, k] for table in (self.y, self.p, self.level))
            chosen = self.chosen.get(label, {})
            metrics = label_metrics(y, p, level, chosen, self.temperature)
            for name, value, *influence in metrics if len(rows) else ():
                found[name][label] = value, self.by_patient(rows, *influence)
        return found

    def put_labels(self, metric, parts, over, group=""):
        """A row for each label of `parts`, {label: (value, sums)}, and for the means over those in `over`."""
        for label, part in parts.items():
            self.put(metric, *part, label=label, group=group)
        for labels, members in self.sets.items():
            kept = [parts[label] for label in members if label in over]
            part = [np.mean(values, 0) for values in zip(*kept)] or [np.nan]
            self.put(metric, *part, labels=labels, group=group)

    def put_whole(self):
        """Rows of all images."""
        self.put("images", len(self.y))
        self.put("patients", self.counts.shape[1])
        if self.temperature:
            self.put("temperature", self.temperature)
        for metric, parts in self.collect().items():
            least = 0 if metric == "paper auc" else -1              # the released mean is over AUCs above 0
            over = [label for label, (value, _) in parts.items() if value > least]
            self.put_labels(metric, parts, over)
        for labels, members in self.sets.items():
            columns = [self.labels.index(label) for label in members]
            tables = (table[:, columns] for table in (self.y, self.p, self.level))
            for metric, value, *influence in joint_metrics(*tables):
                self.put(metric, value, self.by_patient(slice(None), *influence), labels=labels)

    def put_each(self):
        """Rows of each label of which no mean is taken."""
        undefined = self.auc_draws.isna().mean()
        alone = Referral(self.y, self.level, np.abs(self.p - 0.5))
        referred = [alone.auc(seen)[0] for seen in images_seen(len(self.y), FRACTIONS)]
        for k, (y, p) in enumerate(known_columns(self.y, self.p)):
            label = self.labels[k]
            self.put("positives", y.sum(), label=label)
            self.put("undefined_resamples", undefined[label], label=label)
            for q, areas in zip(FRACTIONS, referred):
                self.put(f"oracle_auc_by_label@{q:g}", areas[k], label=label)
            for name, curve in reliability(y, p).items():
                for place, value in enumerate(curve):
                    self.put(f"reliability_{name}@{place / BINS:g}", value, label=label)

    def put_groups(self, attribute):
        """Rows of each group of people and of the gap between the best and the worst group.

        Means are over the labels that are defined in every group that has any. Of groups of fewer than LEAST
        images only the number is a row. A gap has no interval: resampling adds noise to every group, hence to
        the largest difference.
        """
        people, groups = self.people[attribute], defaultdict(dict)
        for group in sorted(set(people) - {""}):
            inside = (people == group).to_numpy()
            self.put("images", inside.sum(), group=f"[{attribute}={group}]")
            for metric, parts in self.collect(inside).items() if inside.sum() >= LEAST else ():
                groups[metric][group] = parts
        for metric in GROUPED[bool(self.chosen)] if groups else ():
            values = pd.DataFrame(groups[metric])                                       # [labels, groups]
            values = values.map(lambda part: part[0], na_action="ignore").astype(float)
            shared = values.dropna(axis=1, how="all").dropna().index
            for group, parts in groups[metric].items():
                self.put_labels(metric, parts, shared, f"[{attribute}={group}]")
            gaps = values.max(axis=1) - values.min(axis=1)
            gaps[values.count(axis=1) < 2] = np.nan
            if len(groups[metric]) > 1:
                parts = {label: [gap] for label, gap in gaps.items()}
                self.put_labels(metric, parts, shared, f"_gap[{attribute}]")

    def draws(self):
        """(names, float32 [rows, B]) of the resamples; a name is labels|metric|label|threshold."""
        values, sums = zip(*self.linear.values())
        linear = linear_draws(np.array(values), np.stack(sums, 1), self.counts)
        names = [*self.drawn, *self.linear]
        rows = [*self.drawn.values(), *linear.T]
        return np.array(names), np.array(rows, np.float32)


def choose(validation):
    """What validation predictions decide: {label: {rule: threshold}}, and one temperature for the model."""
    chosen = {}
    for label, (y, p) in zip(validation.labels, known_columns(validation.y, validation.p)):
        if 0 < y.sum() < len(y):
            chosen[label] = {rule: choose_threshold(y, p, rule) for rule in ("f1", "youden")}
    return chosen, fit_temperature(validation.y, validation.p)


def score_file(test, dataset, resamples, validation=None):
    """(rows, names of the resamples, resamples) of one set of predictions."""
    score = Score(test, resamples, zlib.crc32(dataset.encode()), validation)
    score.put_whole()
    score.put_each()
    for attribute in test.people:
        score.put_groups(attribute)
    return score.rows, *score.draws()


def digest(test):
    """{what: digest} of what must be the same in all runs on a test set, in any order of rows and columns."""
    truth = pd.DataFrame(test.y, test.path, test.labels).sort_index(axis=1)
    parts = {"images": truth[[]], "patients": truth[[]].assign(patient=test.patient), "true labels": truth}
    hashes = {name: pd.util.hash_pandas_object(part, categorize=False).sum() for name, part in parts.items()}
    return {"labels": list(truth), **hashes}


def check_same(path, found, other, expected):
    """Refuse two files of a test set, or their nih_val.csv, whose digests differ."""
    for name in [name for name in found if found[name] != expected[name]][:1]:
        raise InputError(f"{path} and {other}, or nih_val.csv beside them, are named as of one test set but "
                         f"have other {name}; predict the same images with both, with or without --mask, or "
                         "score them one by one")


def mean_of(runs):
    """Predictions of the mean probability of several runs on the same images."""
    first, *others = runs
    total = pd.DataFrame(first.p, first.path, first.labels)
    for other in others:
        total += pd.DataFrame(other.p, other.path, other.labels)        # by image and label
    mark = " ".join(sorted({run.mark for run in runs})).strip()
    return first._replace(p=total.to_numpy() / len(runs), mark=mark)


def read_run(path, manifests, val):
    """Predictions of a file and of the validation set: `val`, else nih_val.csv beside it, else None."""
    test, validation = read_predictions(path), None
    beside = val or path.with_name("nih_val.csv")
    if val or beside != path and beside.is_file():
        validation = read_predictions(beside)
    if manifests:
        test = find_people(test, path, manifests)
    return test._replace(mark=read_mark(path)), validation


def score_arm(arm, files, manifests, val, resamples):
    """{run: score_file()} of an arm on a test set, files {seed: path}, with its ensemble; and a digest."""
    exp, dataset = arm
    runs = {(exp, seed, dataset): read_run(path, manifests, val) for seed, path in files.items()}
    tests, validations = zip(*runs.values())
    path, *others = files.values()
    for sets in (validations, tests) if all(validations) else (tests,):
        expected = digest(sets[0])
        for other, found in zip(others, map(digest, sets[1:])):
            check_same(other, found, path, expected)
    if others:
        runs[f"{exp}-ensemble", "", dataset] = mean_of(tests), all(validations) and mean_of(validations)
    return {run: score_file(test, dataset, resamples, validation)
            for run, (test, validation) in runs.items()}, expected


# ------------------------------------------------------------------------------------------------------- main

def identify(path, args):
    """(exp, seed, dataset) of a file: the flags, else its path, else its name."""
    found = re.search(r"([^/]+)/predictions/seed(\d+)/([^/]+)\.csv$", path.absolute().as_posix())
    exp, seed, dataset = found.groups() if found else (path.stem, "0", "test")
    return args.exp or exp, args.seed or seed, args.dataset or dataset


def arms_of(args):
    """{(exp, dataset): {seed: file}} of the predictions given."""
    arms, models = defaultdict(dict), defaultdict(set)
    for path in args.predictions:
        exp, seed, dataset = identify(path, args)
        val = args.validation or path.with_name("nih_val.csv")
        models[val].add((exp, seed))
        if len(models[val]) > 1 and val.is_file():
            raise InputError(f"{val} belongs to one run and would choose thresholds for others, as {path}; "
                             "give each run a folder of its own, with its nih_val.csv")
        if seed in arms[exp, dataset]:
            raise InputError(f"{path} is a second file of exp {exp}, seed {seed}, {dataset}; give one, or "
                             "another name to one: the file's name is the arm's")
        arms[exp, dataset][seed] = path
    return arms


def run(args):
    """Score all runs, several at a time, and write their rows and resamples."""
    if args.out and args.out.resolve() in map(Path.resolve, args.predictions):
        raise InputError(f"--out {args.out} is one of the predictions; choose another name")
    if args.bootstrap < 0 or args.workers < 1:
        raise InputError("--bootstrap must be 0 or more, --workers 1 or more")
    rows, resamples, first = [], {}, {}
    arms, given = arms_of(args), (tuple(args.manifest), args.validation, args.bootstrap)
    with ProcessPoolExecutor(args.workers, initializer=threadpool_limits, initargs=(1,)) as pool:
        apply = pool.map if args.workers > 1 else map
        results = apply(score_arm, arms, arms.values(), *map(repeat, given))
        for (arm, files), (scored, found) in zip(arms.items(), results):
            path = next(iter(files.values()))
            check_same(path, found, *first.setdefault(arm[-1], (path, found)))
            for run, (lines, names, draws) in scored.items():
                rows += [(*run, *line) for line in lines]
                resamples |= {"/".join(run): draws, "/".join((*run, "rows")): names}
    table = pd.DataFrame(rows, columns=COLUMNS)
    names = ["auc_mean", "auc"] if len(args.predictions) <= 2 else ["auc_mean"]     # two at most: each label
    shown = table[table.metric.isin(names) & (table.variant == "corrected")][TERMINAL]
    print(shown.to_string(index=False, float_format="%.4f", na_rep=""))
    for mark in sorted(set(table["stand_in"]) - {""}):
        print(f"stand-in: {mark}")
    if args.out:
        text = table.to_csv(index=False, float_format="%.10g", lineterminator="\n").encode()
        draws = args.out.with_name(f"{args.out.stem}.draws.npz".removeprefix("metrics."))
        write(draws, lambda file: np.savez(file, **resamples))
        write(args.out, lambda file: file.write(text))
        print(f"{args.out}: {len(rows):,} rows of {len(args.predictions)} files; {draws.name} beside it")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, help="predictions files, of any number of runs")
    add("--out", type=Path, help="the metrics.csv to write (default: the terminal alone)")
    add("--exp", help="experiment, in place of the path's")
    add("--seed", help="seed of the run, in place of the path's")
    add("--dataset", help="name of the test set, in place of the path's")
    add("--bootstrap", type=int, default=2000, help="resamples of patients (2000); 0: none")
    add("--validation", type=Path, help="validation predictions (default: nih_val.csv beside a file)")
    add("--manifest", nargs="+", type=Path, default=[], help="manifests with sex, age and race of the images")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.error = fail                 # one sentence, like every other mistake
    try:
        run(parser.parse_args())
    except InputError as mistake:
        fail(mistake)


if __name__ == "__main__":
    main()
