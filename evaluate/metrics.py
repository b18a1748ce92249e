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
        stand_in. labels: what a mean is over: 14 (NIH's), 5 (at least four of the study's), all (if others).
        label: of one label; both blank: of whole images. threshold: of p > threshold, the share referred, or
        a bin's lower edge. value: blank if undefined. <exp>-ensemble, no seed: mean probability of its runs.
        draws.npz beside it: for "exp/seed/dataset" float32 [rows, resamples], the values of a metric when
        patients are drawn with replacement, the same ones for every run; "exp/seed/dataset/rows": which.
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
NORMAL = 1.959964                                    # half width of a 95 % interval in standard errors
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high stand_in".split()


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --------------------------------------------------------------------------------------------------- ranking
# Throughout: y [n, K] is 1, 0, anything else is unknown; p float [n, K] in [0, 1]; a row is an image, a
# column a label; NaN is undefined. Influence of an image: what a little more of its weight adds to a metric.

def is_known(y):
    return (y == 1) | (y == 0)


def mean_over_labels(values, variant="corrected"):
    """Mean of the defined values over the last axis; "paper" leaves out zeros too. NaN if none is left."""
    used = values > 0 if variant == "paper" else ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(used, values, 0).sum(-1) / used.sum(-1)


def ranked_auc(y, level):
    """AUC of one label; level int [n]: the rank of each score, ties equal. NaN without both classes."""
    size = level.max(initial=0) + 1
    high = np.bincount(level[y == 1], minlength=size)
    low = np.bincount(level[y == 0], minlength=size)
    with np.errstate(invalid="ignore"):
        return high @ (np.cumsum(low) - low / 2) / (high.sum() * low.sum())


def auc_influence(y, level):
    """Each image's influence on the AUC of one label, float [n], zeros without both classes.

    For a positive, its share of negatives below it (ties 1/2) less the AUC, over the number of positives; for
    a negative likewise. Source: DeLong et al. 1988, by ranks as in Sun & Xu 2014.
    """
    positive, negative = y == 1, y == 0
    high, low = (np.bincount(level[members], minlength=level.max() + 1) for members in (positive, negative))
    if not positive.any() or not negative.any():
        return np.zeros(len(y))
    below = (np.cumsum(low) - low / 2) / low.sum()
    above = 1 - (np.cumsum(high) - high / 2) / high.sum()
    area = high @ below / high.sum()
    return positive * (below[level] - area) / high.sum() + negative * (above[level] - area) / low.sum()


def levels(scores):
    """Rank of each score, int [n], equal scores sharing one."""
    return np.unique(scores, return_inverse=True)[1]


def auc(y, p, variant="corrected"):
    """Area under the ROC curve per label, float [K] (a float for 1-D input): pairs in order, a tie is 1/2.

    Undefined without both classes; "paper" gives 0 to a label without positives.
    """
    if np.ndim(y) == 1:
        return auc(np.asarray(y)[:, None], np.asarray(p)[:, None], variant)[0]
    values = np.array([ranked_auc(truth, levels(score)) for truth, score in zip(y.T, p.T)])
    if variant == "paper":
        values[~(y == 1).any(0)] = 0
    return values


def clustered_error(y, influence, patient=None):
    """Standard error of an AUC, or a difference of AUCs, of one label from its influences, float [n].

    Images of one `patient` are a cluster (all alone by default). NaN if a class has fewer than two patients.
    Source: Obuchowski 1997; with one image a patient DeLong et al. 1988.
    """
    cluster = levels(np.arange(len(y)) if patient is None else patient)
    size, sums, counts = cluster.max() + 1, [], []
    for members in (y == 1, y == 0):
        sums.append(np.bincount(cluster[members], influence[members], size))
        counts.append(len(np.unique(cluster[members])))
    (ten, one), (m, n) = sums, counts
    if min(m, n) < 2:
        return np.nan
    variance = m / (m - 1) * ten @ ten + n / (n - 1) * one @ one
    variance += 2 * size / (size - 1) * ten @ one
    return np.sqrt(max(variance, 0))


def auc_interval(y, p, patient=None):
    """(AUC, lower, upper end of its 95 % interval) of one label; 1-D y and p in scikit-learn's order.

    AUC +- 1.96 standard errors (DeLong), clustered by `patient` if given, within 0 and 1; NaN if undefined.
    """
    y, p = np.asarray(y), np.asarray(p)
    area, margin = auc(y, p), NORMAL * clustered_error(y, auc_influence(y, levels(p)), patient)
    return float(area), float(max(area - margin, 0)), float(min(area + margin, 1))


def delong(y, p_left, p_right, patient=None):
    """DeLong's test of equal AUC of two models on the same images, one label, all arguments 1-D.

    Returns: {difference, se, z, p}; se as clustered_error, z and p NaN where it tells nothing.
    Raises: ValueError without both classes.
    """
    difference = auc(y, p_left) - auc(y, p_right)
    if np.isnan(difference):
        raise ValueError("DeLong's test needs positives and negatives")
    influence = auc_influence(y, levels(p_left)) - auc_influence(y, levels(p_right))
    se = clustered_error(y, influence, patient)
    z = difference / se if se > 0 else (0.0 if se == difference == 0 else np.nan)
    return {"difference": difference, "se": se, "z": z, "p": 2 * ndtr(-abs(z))}


def average_precision(y, p):
    """AUPRC (average precision) of one label and each image's influence on it, [n]; NaN without positives.

    The mean over positives of the precision at their score; a further image above a score changes it there.
    """
    positive, negative = y == 1, y == 0
    high, low = np.sort(p[positive]), np.sort(p[negative])
    if not len(high):
        return np.nan, np.zeros(len(p))
    true = len(high) - np.searchsorted(high, high)            # positives that score at least as high, each
    false = len(low) - np.searchsorted(low, high)
    flagged = true + false
    area = (true / flagged).mean()
    reached = np.searchsorted(high, p, "right")               # positives that do not score higher, each image
    gain, loss = (np.append(0, np.cumsum(part / flagged ** 2))[reached] for part in (false, true))
    own = (true / flagged)[np.maximum(reached - 1, 0)]
    return area, (positive * (own - area + gain) - negative * loss) / len(high)


# ------------------------------------------------------------------------------------------------ resampling

@lru_cache(maxsize=8)
def resample_counts(size, resamples, seed):
    """How often each of `size` units is drawn in every bootstrap resample, uint8 [B, size], read-only."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, size), np.uint8, order="F")     # read patient by patient
    for row in counts:
        row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
    counts.flags.writeable = False
    return counts


def draw_patients(patient, resamples, seed=0):
    """Bootstrap over patients: each image's patient, int [n], and how often each is drawn, uint8 [B, P].

    The draws depend on the set of patients and the seed alone: two models on one test set get the same ones.
    """
    index = levels(patient)
    return index, resample_counts(index.max() + 1, resamples, seed)


def auc_draws(y, p, patient, counts, chunk=128):
    """AUC per label of every resample, float [B, K], by weighted ranks; patient and counts of draw_patients.

    Positives that outrank the same negatives share a row; `steps` holds the negatives between a row and the
    one before, by patient (twice; a tie: once here, once in the next), `at` a row's positives. A resample
    costs two sparse products and a cumulative sum over rows, by blocks of 32 rows times a triangle of ones:
    twice as fast as np.cumsum. Exact in 16 bits where a row's counts fit, else in float32 up to 2^22 images.
    """
    values = np.full((len(counts), y.shape[1]), np.nan)
    triangle, most, maps = np.tri(32, dtype=np.float32), int(counts.max(initial=0)), []
    for truth, score in zip(y.T, p.T):
        high, low = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
        ranked = np.sort(score[low])
        outranked = np.searchsorted(ranked, score[high]) + np.searchsorted(ranked, score[high], "right")
        _, first, at = np.unique(outranked, return_index=True, return_inverse=True)
        leaders = score[high][first]
        steps = np.concatenate([np.searchsorted(leaders, score[low], side) for side in ("left", "right")])
        shape = (len(leaders) // 32 + 1) * 32, counts.shape[1]
        largest = max(np.bincount(rows).max(initial=0) for rows in (steps, at))
        kind = np.uint16 if largest * most < 2 ** 16 else np.float32
        for cells in ((steps, np.tile(patient[low], 2)), (at, patient[high])):
            maps.append(csr_matrix((np.ones(len(cells[0]), kind), cells), shape))
    for start in range(0, len(counts), chunk):
        block = counts[start:start + chunk].T
        weights = {kind: block.astype(kind, order="C") for kind in {part.dtype for part in maps}}   # [P, b]
        products = ((part @ weights[part.dtype]).astype(np.float32, copy=False) for part in maps)
        for k, (steps, drawn) in enumerate(zip(products, products)):                # [rows, b]
            below = triangle @ steps.reshape(-1, 32, steps.shape[1])
            below[1:] += np.cumsum(below[:-1, -1], 0)[:, None]                      # of the blocks before
            below = below.reshape(drawn.shape)
            ordered = np.einsum("ij,ij->j", drawn, below, dtype=np.float64)
            pairs = drawn.sum(0, dtype=np.float64) * below[-1]
            with np.errstate(invalid="ignore"):
                values[start:start + chunk, k] = ordered / pairs
    return values


def linear_draws(influences, counts, chunk=128):
    """What each resample adds to a metric, to first order, float32 [B, M]; influences [P, M], by patient.

    The infinitesimal jackknife (Efron 1982): its spread is the bootstrap's where the metric is smooth.
    """
    influences = influences.astype(np.float32)
    sums = np.zeros((len(counts), influences.shape[1]), np.float32) - influences.sum(0)
    for start in range(0, len(influences), chunk):          # few enough for their draws to be cached
        sums += counts[:, start:start + chunk].astype(np.float32) @ influences[start:start + chunk]
    return sums


# ------------------------------------------------------------------------------------- decisions and referral

def share(hits, among):
    """Share of `among` that are `hits` per column, float [M], and each image's influence on it, [n, M]."""
    total = among.sum(0)
    with np.errstate(invalid="ignore"):
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
    """share() of the images with every label right among those with every label known, one column."""
    return share(is_right(y, p, threshold).all(1)[:, None], is_known(y).all(1)[:, None])


def subset_accuracy(y, p, threshold):
    """Share of images with every label right at p > threshold, of those with every label known."""
    return all_right(y, p, threshold)[0][0]


def misses(y, p, threshold):
    """{"fnr": share() of positives that are missed, "fpr": of negatives that are not} at p > threshold."""
    flagged, positive, negative = p > threshold, y == 1, y == 0
    return {"fnr": share(positive & ~flagged, positive), "fpr": share(negative & flagged, negative)}


def fnr(y, p, threshold):
    """Missed share of the positives per label at p > threshold, float [K]; undefined without positives."""
    return misses(y, p, threshold)["fnr"][0]


def images_seen(n, fractions, variant="corrected"):
    """How many of n images an expert has seen at each nominal fraction, int [Q]: floor(n q); in "paper" they
    add up (an answered image has u = 0.5 and is not asked about again).
    """
    seen = np.array([int(n * q) for q in fractions])
    return np.minimum(seen.cumsum() if variant == "paper" else seen, n)


def answer_levels(p):
    """Ranks of p per label, int [n + 2, K]; the last two rows are those of the answers 0 and 1."""
    return np.stack([levels(np.append(score, [0, 1])) for score in p.T], 1)


def referral_turns(p):
    """When each image is referred, int [n]: by u = mean over labels of |p - 0.5|, ties by row."""
    turns = np.empty(len(p), int)
    turns[np.argsort(np.abs(p - 0.5).mean(1), kind="stable")] = np.arange(len(p))
    return turns


def answered(y, turns, level, count):
    """Ranks [n, K] after the first `count` images in turn were answered: the truth as a probability."""
    return np.where((turns < count)[:, None], (y == 1) * level[-1], level[:-2])


def referral_auc(y, turns, level, seen):
    """AUC per label, float [Q, K], after the first `seen` images in turn were answered.

    Args: turns int [n] of referral_turns, level int [n + 2, K] of answer_levels.
    """
    tables = [answered(y, turns, level, count) for count in seen]
    return np.array([[ranked_auc(*column) for column in zip(y.T, table.T)] for table in tables])


def oracle_auc(y, p, fractions, variant="corrected"):
    """Oracle AUC per label, float [Q, K], and the share of images that the expert saw, float [Q].

    "paper" gives 0 to a label without positives, and its referrals add up.
    """
    seen = images_seen(len(p), fractions, variant)
    values = referral_auc(y, referral_turns(p), answer_levels(p), seen)
    if variant == "paper":
        values[:, ~(y == 1).any(0)] = 0
    return values, seen / len(p)


def risk_coverage_area(y, p, threshold=0.5):
    """Share of wrong labels among the 1, 2, ... n most certain images, averaged (Geifman et al. 2019)."""
    certain_first = np.argsort(-np.abs(p - 0.5).mean(1), kind="stable")
    known = is_known(y)[certain_first]
    wrong = known & ~is_right(y, p, threshold)[certain_first]
    some = known.any(1)
    risk = wrong[some].sum(1) / known[some].sum(1)
    return (np.cumsum(risk) / np.arange(1, len(risk) + 1)).mean()


# ------------------------------------------------------------------------------------------------ calibration

def binned_error(bins, excess):
    """Sum over bins of count |mean excess| / n of one label, and each image's influence on it, float [n]."""
    sums = np.bincount(bins, excess)
    error = np.abs(sums).sum() / len(bins)
    return error, (np.sign(sums)[bins] * excess - error) / len(bins)


def calibration_error(y, p, thresholds=THRESHOLDS):
    """The paper's "calibration error", float [T, K]: |p - 0.5| held against the accuracy at the threshold.

    Bin i starts at i/30 but is 1/15 wide, and an item goes to the first bin that holds it, which is the first
    whose upper end lies above it. Source: the released evaluation code.
    """
    upper, values = np.linspace(0, 0.5, BINS + 1)[:-1] + 1 / BINS, np.empty((len(thresholds), y.shape[1]))
    for k, (truth, score) in enumerate(zip(y.T, p.T)):
        truth, score = truth[is_known(truth)], score[is_known(truth)]
        confidence = np.abs(score - 0.5)
        bins = np.searchsorted(upper, confidence, "right")
        for t, threshold in enumerate(thresholds):
            values[t, k] = binned_error(bins, confidence - is_right(truth, score, threshold))[0]
    return values


def probability_bins(p, adaptive=False):
    """Bin of each probability of one label, int [n]: BINS equal widths, closed above, or equal counts."""
    if not adaptive:
        return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], p)
    bins = np.empty(len(p), int)
    bins[np.argsort(p, kind="stable")] = np.arange(len(p)) * BINS // len(p)
    return bins


def ece_and_influence(y, p, adaptive=False):
    """Expected calibration error per label, float [K], and each image's influence on it, [n, K]."""
    values, influence = np.empty(y.shape[1]), np.zeros(y.shape)
    for k, known in enumerate(is_known(y).T):
        truth, score = y[known, k], p[known, k]
        values[k], influence[known, k] = binned_error(probability_bins(score, adaptive), score - truth)
    return values, influence


def ece(y, p, adaptive=False):
    """Expected calibration error per label, float [K]: p against the share of positives (Guo et al. 2017)."""
    return ece_and_influence(y, p, adaptive)[0]


def reliability(y, p):
    """Reliability curve of one label (1-D): images, mean p, share of positives in each bin, float [BINS]."""
    y, p = y[is_known(y)], p[is_known(y)]
    bins = probability_bins(p)
    count, predicted, observed = (np.bincount(bins, weights, BINS) for weights in (None, p, y))
    with np.errstate(invalid="ignore"):
        return count, predicted / count, observed / count


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
    return float(np.exp(minimize_scalar(cross_entropy, bounds=np.log([0.05, 20]), method="bounded").x))


# ------------------------------------------------------------------------------------------- operating points

def sensitivity_at(y, p, specificity):
    """Highest sensitivity of p > t with at least that specificity, per label [K]; NaN without a class."""
    values = np.full(y.shape[1], np.nan)
    for k in np.flatnonzero((y == 1).any(0) & (y == 0).any(0)):
        low = np.sort(p[y[:, k] == 0, k])
        least = int(np.ceil(specificity * len(low) - 1e-9))           # negatives that must not be flagged
        threshold = low[least - 1] if least else -1
        values[k] = (p[y[:, k] == 1, k] > threshold).mean()
    return values


def choose_threshold(y, p, rule):
    """The lowest score t of one label (1-D) where p > t is best by `rule`: "f1", or "youden" for
    sensitivity + specificity. NaN without both classes.
    """
    high, low, scores = np.sort(p[y == 1]), np.sort(p[y == 0]), np.unique(p[is_known(y)])
    if not len(high) or not len(low):
        return np.nan
    true = len(high) - np.searchsorted(high, scores, "right")
    false = len(low) - np.searchsorted(low, scores, "right")
    gain = true / len(high) - false / len(low) if rule == "youden" else true / (true + false + len(high))
    return scores[np.argmax(gain)]


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
    str [n], and people: sex, age band and race, a DataFrame of str by image.
    """
    labels: list
    y: np.ndarray
    p: np.ndarray
    patient: np.ndarray
    path: np.ndarray
    people: pd.DataFrame


def nih_name(label):
    """NIH's spelling of a label ("Pleural effusion": "Effusion"); a label that NIH lacks keeps its own."""
    spelt = {name.replace("_", "").lower(): name for name in NIH14}
    spelt["pleuraleffusion"] = "Effusion"
    return spelt.get(re.sub(r"[\W_]", "", label).lower(), label)


def read_predictions(path):
    """One predictions file, checked. Raises InputError that names file, row and what was expected."""
    frame = read_csv(path, ["path", "patient"], {"path": str, "patient": str})
    true, prob = ([name[5:] for name in frame if name.startswith(kind)] for kind in ("true_", "prob_"))
    for name in sorted(set(true) ^ set(prob)):
        has, lacks = ("true", "prob") if name in true else ("prob", "true")
        raise InputError(f"{path} has a column {has}_{name} but no {lacks}_{name}; add it or drop both")
    labels = np.array([nih_name(name) for name in true])
    if not true:
        raise InputError(f"{path} has no column true_<label>; a label needs true_<label> and prob_<label>")
    if len(set(labels)) < len(labels):
        twice = max(labels, key=list(labels).count)
        raise InputError(f"{path} has label {twice} under two spellings; keep one")
    for row in np.flatnonzero(frame["path"].duplicated())[:1]:
        raise InputError(f"{path} row {row + 1}: image '{frame['path'][row]}' is there twice; keep one row")
    tables = []
    for kind, expected in (("true_", "1, 0 or blank (unknown)"), ("prob_", "a probability from 0 to 1")):
        cells = frame[[kind + name for name in true]]
        numbers = cells.replace("", -1) if kind == "true_" else cells
        numbers = numbers.apply(pd.to_numeric, errors="coerce").to_numpy(float)
        good = np.isin(numbers, (-1, 0, 1)) if kind == "true_" else (numbers >= 0) & (numbers <= 1)
        for row, k in np.argwhere(~good)[:1]:
            raise InputError(f"{path} row {row + 1}: {cells.columns[k]} is '{cells.iat[row, k]}'; expected "
                             f"{expected}")
        tables.append(numbers)
    scored = is_known(tables[0]).any(0)
    y, p = tables[0][:, scored].astype(np.int8), tables[1][:, scored]
    if not ((y == 1).any(0) & (y == 0).any(0)).any():
        raise InputError(f"{path} has no label with both positives and negatives, so nothing can be ranked; "
                         "check true_<label> or add images")
    nobody = frame["patient"].str.lower().isin(["", "nan", "none", "na", "n/a", "<na>", "null"])
    patient = np.where(nobody, "image " + frame["path"], frame["patient"]).astype(str)
    return Predictions(list(labels[scored]), y, p, patient, frame["path"].to_numpy(str), people_of(frame))


def people_of(frame):
    """Sex, age band and race of every row, blank if unknown; "White, non-Hispanic" and the like are White."""
    people = frame.reindex(columns=["sex", "age", "race"], fill_value="").astype(str)
    ages = pd.to_numeric(people["age"], errors="coerce")
    people["age"] = pd.cut(ages, [-np.inf, *AGES.values()], labels=list(AGES)).astype(object).fillna("")
    for race in ("White", "Black", "Asian"):
        people.loc[people["race"].str.contains(race), "race"] = race
    return people


@lru_cache(maxsize=1)
def read_manifests(manifests):
    """people_of every image of the manifests, by path."""
    frame = pd.concat([read_csv(path, ["path"]) for path in manifests]).fillna("")
    people = people_of(frame).assign(path=frame["path"]).drop_duplicates().set_index("path")
    for path in people.index[people.index.duplicated()][:1]:
        raise InputError(f"the manifests know two people for image '{path}'; give the one that the "
                         "predictions were made from")
    if (people == "").all(axis=None):
        raise InputError(f"{manifests[0]} knows no sex, age or race of any image; leave --manifest out")
    return people


def read_mark(path):
    """The sentence "stand_in" of the facts beside a predictions file, "" without."""
    facts = path.with_suffix(".json")
    try:
        return json.loads(facts.read_text())["stand_in"] or "" if facts.is_file() else ""
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{facts} holds no facts of predictions with 'stand_in'; predict again") from None


def label_sets(labels):
    """{name: columns} that means are over: 14, 5 (of at least four) and all, unless that is one of them."""
    study = [labels.index(label) for label in STUDY5 if label in labels]
    sets = {"14": [labels.index(label) for label in NIH14]} if set(NIH14) <= set(labels) else {}
    if len(study) >= 4:
        sets["5"] = study
    if len(labels) not in map(len, sets.values()):
        sets["all"] = list(range(len(labels)))
    return sets


# --------------------------------------------------------------------------------------------- scoring a file

def choose(validation):
    """What validation predictions decide: {rule: {label: threshold}}, and one temperature for the model."""
    thresholds = {"f1": {}, "youden": {}}
    for label, y, p in zip(validation.labels, validation.y.T, validation.p.T):
        for rule in thresholds:
            thresholds[rule][label] = choose_threshold(y, p, rule)
    return thresholds, fit_temperature(validation.y, validation.p)


class Score:
    """Collects the rows of one predictions file, from `labels` to `ci_high`, and their patient resamples."""

    def __init__(self, test, resamples, seed):
        self.labels, self.y, self.p, self.people = test.labels, test.y, test.p, test.people
        self.sets = label_sets(test.labels)
        self.patient, self.counts = draw_patients(test.patient, resamples, seed)
        self.level, self.known = answer_levels(test.p), is_known(test.y)
        self.rows, self.drawn, self.linear = [], {}, {}

    def put(self, metric, value, influence=None, draws=None, labels="", label="", threshold="",
            variant="corrected"):
        """One row: value +- 1.96 standard errors, from its draws [B] or the images' influence [n].

        AUCs, and of everything else the means, have resamples of patients.
        """
        error, threshold = np.nan, f"{threshold:g}" if threshold != "" else ""
        key = "|".join((labels, metric, label, threshold))
        if draws is not None and not np.isnan(draws).all():
            error, self.drawn[key] = np.nanstd(draws), draws
        elif influence is not None and not np.isnan(value):
            by_patient = np.bincount(self.patient, influence, self.counts.shape[1])
            error = np.sqrt(by_patient @ by_patient)
            if not label:
                self.linear[key] = value, by_patient
        margin = NORMAL * error if error > 1e-12 else np.nan        # no spread at all tells nothing
        ends = max(value - margin, 0), min(value + margin, 1)
        self.rows.append((labels, metric, variant, label, threshold, value, *ends))

    def put_each(self, metric, values, influence=None, draws=None, **where):
        """A row a label; values [K], influence [n, K], draws [B, K]."""
        for k, label in enumerate(self.labels):
            columns = [None if part is None else part[:, k] for part in (influence, draws)]
            self.put(metric, values[k], *columns, label=label, **where)

    def put_labels(self, metric, values, influence=None, draws=None, over=True, **where):
        """put_each, and for every label set the mean of the defined; over: bool [K], labels in the means."""
        self.put_each(metric, values, influence, draws, **where)
        name = {"auc": "auc_mean", "accuracy": "mean_accuracy"}.get(metric, metric)
        used = ~np.isnan(values) & over
        for labels, columns in self.sets.items():
            kept = [k for k in columns if used[k]]
            means = [None if influence is None else influence[:, kept].mean(1) if kept else None,
                     None if draws is None else mean_over_labels(draws[:, columns])]
            self.put(name, mean_over_labels(values[kept]), *means, labels=labels, **where)

    def draws(self):
        """(names, float32 [rows, B]) of the resamples; a name is labels|metric|label|threshold."""
        values, influences = zip(*self.linear.values())
        linear = np.array(values) + linear_draws(np.stack(influences, 1), self.counts)
        drawn = [*self.drawn.values(), *linear.T]
        return np.array([*self.drawn, *self.linear]), np.array(drawn, np.float32)

    def baselines(self):
        """What is in the file, and what an answer without a look at the image scores."""
        prevalence, _ = share(self.y == 1, self.known)
        self.put("images", len(self.y))
        self.put("patients", self.counts.shape[1])
        self.put_each("positives", (self.y == 1).sum(0))
        self.put_each("known", self.known.sum(0))
        self.put_labels("random_guess_accuracy", 1 - prevalence, variant="paper")
        self.put_labels("random_guess_accuracy", prevalence ** 2 + (1 - prevalence) ** 2)
        self.put_labels("always_negative_accuracy", *share(self.y == 0, self.known))
        for labels, columns in self.sets.items():
            y = self.y[:, columns]
            self.put("always_negative_subset_accuracy", subset_accuracy(y, 0 * y, 0.5), labels=labels)

    def ranking(self):
        """Metrics without a threshold."""
        values = np.array([ranked_auc(y, level) for y, level in zip(self.y.T, self.level[:-2].T)])
        draws = auc_draws(self.y, self.p, self.patient, self.counts)
        self.put_labels("auc", values, None, draws)
        paper = np.where((self.y == 1).any(0), values, 0)
        self.put_each("auc", paper, variant="paper")
        for labels, columns in self.sets.items():
            self.put("auc_mean", mean_over_labels(paper[columns], "paper"), labels=labels, variant="paper")
            self.put("auc_labels", np.count_nonzero(~np.isnan(values[columns])), labels=labels)
        if len(draws):
            self.put_each("undefined_resamples", np.isnan(draws).mean(0))
        areas, influences = zip(*(average_precision(y, p) for y, p in zip(self.y.T, self.p.T)))
        self.put_labels("auprc", np.array(areas), np.stack(influences, 1))
        for specificity in SPECIFICITIES:
            sensitivity = sensitivity_at(self.y, self.p, specificity)
            self.put_labels(f"sensitivity_at_specificity_{specificity:g}", sensitivity)

    def decisions(self):
        """Metrics of p > threshold, and the Brier score."""
        self.put_labels("brier", *share(self.known * (self.p - self.y) ** 2, self.known))
        for t in THRESHOLDS:
            (missed, missed_influence), (alarms, alarms_influence) = misses(self.y, self.p, t).values()
            self.put_labels("fnr", missed, missed_influence, threshold=t)
            self.put_labels("fpr", alarms, alarms_influence, threshold=t)
            influence = -(missed_influence + alarms_influence) / 2
            self.put_labels("balanced_accuracy", 1 - (missed + alarms) / 2, influence, threshold=t)
            self.put_labels("accuracy", *share(is_right(self.y, self.p, t), self.known), threshold=t)
            for labels, columns in self.sets.items():
                y, p, where = self.y[:, columns], self.p[:, columns], {"labels": labels, "threshold": t}
                self.put("mean_accuracy", mean_accuracy(y, p, t, "paper"), variant="paper", **where)
                value, influence = all_right(y, p, t)
                self.put("subset_accuracy", value[0], influence[:, 0], **where)

    def calibration(self):
        """How far p is from a probability."""
        for t, values in zip(THRESHOLDS, calibration_error(self.y, self.p)):
            self.put_labels("calibration_error", values, threshold=t, variant="paper")
        self.put_labels("ece", *ece_and_influence(self.y, self.p))
        self.put_labels("adaptive_ece", ece(self.y, self.p, adaptive=True))
        curves = np.array([reliability(y, p) for y, p in zip(self.y.T, self.p.T)])      # [K, 3, BINS]
        for edge, curve in zip(np.arange(BINS) / BINS, curves.T):
            for name, values in zip(("images", "predicted", "observed"), curve):
                self.put_each(f"reliability_{name}", values, threshold=edge)

    def referral(self):
        """An expert answers the uncertain images (oracle), or as many at random, or they are left out."""
        n = len(self.y)
        seen, paper = (images_seen(n, FRACTIONS, variant) for variant in ("corrected", "paper"))
        for labels, columns in self.sets.items():
            y, p, level = self.y[:, columns], self.p[:, columns], self.level[:, columns]
            turns, counts = referral_turns(p), np.union1d(seen, paper)
            values = dict(zip(counts, referral_auc(y, turns, level, counts)))
            plain, slopes = mean_over_labels(values[0]), np.gradient(
                [mean_over_labels(values[k]) for k in seen], FRACTIONS)      # what a larger share would add
            for q, k, slope in zip(FRACTIONS, seen, slopes):
                where, left = {"labels": labels, "threshold": q}, turns >= k
                pairs = zip(y.T, answered(y, turns, level, k).T)
                influence = sum(auc_influence(*pair) for pair in pairs) / max((~np.isnan(values[k])).sum(), 1)
                # a resample refers the same share: where it has more images above the cut, the cut moves
                cut = slope * (k / n - ~left) / n
                self.put("oracle_auc", mean_over_labels(values[k]), influence + cut, **where)
                if k == 0:
                    at_random = influence
                untouched = (n - k) * (n - k - 1) / (n * (n - 1))           # share of the pairs, at random
                value = 1 - untouched * (1 - plain)
                self.put("random_referral_auc", value, untouched * at_random, **where)
                rejected = [ranked_auc(*column) for column in zip(y[left].T, level[:-2][left].T)]
                self.put("rejection_auc", mean_over_labels(np.array(rejected)), **where)
            for q, k in zip(FRACTIONS, paper):
                where = {"labels": labels, "threshold": q, "variant": "paper"}
                self.put("oracle_auc", mean_over_labels(values[k], "paper"), **where)
                self.put("referred", k / n, **where)
            self.put("risk_coverage_area", risk_coverage_area(y, p), labels=labels)
        for k in range(len(self.labels)):
            turns, level = referral_turns(self.p[:, [k]]), self.level[:, [k]]
            for q, (value,) in zip(FRACTIONS, referral_auc(self.y[:, [k]], turns, level, seen)):
                self.put("oracle_auc_by_label", value, label=self.labels[k], threshold=q)

    def chosen_on_validation(self, thresholds, temperature):
        """The thresholds and the temperature of `choose`, applied."""
        for rule, chosen in thresholds.items():
            at = np.array([chosen.get(label, np.nan) for label in self.labels])
            self.put_each(f"threshold_{rule}", at)
            for name, (values, influence) in misses(self.y, self.p, at).items():
                self.put_labels(f"{name}_{rule}", np.where(np.isnan(at), np.nan, values), influence)
        tempered = temper(self.p, temperature)
        self.put_labels("ece_temperature", ece(self.y, tempered))
        self.put_labels("brier_temperature", *share(self.known * (tempered - self.y) ** 2, self.known))
        self.put("temperature", temperature)

    def subgroups(self, chosen):
        """AUC, ECE, FNR and FPR of each sex, age band and race, and the gap between best and worst group.

        FNR and FPR at THRESHOLDS and at Youden's thresholds of validation. Means are over the labels that are
        defined in every group that has any. A gap has no interval: resampling adds noise to every group,
        hence to the largest difference.
        """
        at = {f"@{t:g}": t for t in THRESHOLDS}
        if chosen:
            at["_youden"] = np.array([chosen[0]["youden"].get(label, np.nan) for label in self.labels])
        for attribute in self.people:
            found = defaultdict(dict)                           # metric: {group: (values [K], influence)}
            for group in sorted(set(self.people[attribute]) - {""}):
                inside = (self.people[attribute] == group).to_numpy()
                self.put(f"images[{attribute}={group}]", inside.sum())
                y = np.where(inside[:, None], self.y, -1)       # the others are unknown
                ranks = list(zip(y.T, self.level[:-2].T))
                areas = np.array([ranked_auc(truth, level) for truth, level in ranks])
                influences = [auc_influence(truth, level) for truth, level in ranks]
                found["auc"][group] = areas, np.stack(influences, 1)
                found["ece"][group] = ece_and_influence(y, self.p)
                for suffix, t in at.items():
                    for name, part in misses(y, self.p, t).items():
                        found[name + suffix][group] = part
            for metric, groups in found.items():
                self.put_groups(attribute, metric, groups)

    def put_groups(self, attribute, metric, groups):
        """Rows of one metric, "name" or "name@threshold", for {group: (values [K], influence [n, K])}."""
        name, _, threshold = metric.partition("@")
        threshold = float(threshold) if threshold else ""
        values = np.array([value for value, _ in groups.values()])                  # [groups, K]
        shared = ~np.isnan(values[~np.isnan(values).all(1)]).any(0)    # a group of one image has no AUC
        for group, part in groups.items():
            self.put_labels(f"{name}[{attribute}={group}]", *part, over=shared, threshold=threshold)
        if len(groups) > 1:
            span = np.fmax.reduce(values) - np.fmin.reduce(values)              # which pass over NaN
            span[np.count_nonzero(~np.isnan(values), axis=0) < 2] = np.nan
            self.put_labels(f"{name}_gap[{attribute}]", span, over=shared, threshold=threshold)


def digest(test):
    """Checksum of images, patients, labels and truths, whatever the order of rows and columns."""
    rows, columns = np.argsort(test.path), np.argsort(test.labels)
    texts = [*np.array(test.labels)[columns], *test.path[rows], *test.patient[rows]]
    return zlib.crc32("\n".join(texts).encode() + test.y[np.ix_(rows, columns)].tobytes())


def average(runs):
    """Predictions of the ensemble of an arm's runs on the same images: their mean probability."""
    first, total = runs[0], 0
    for run in runs:
        rows = pd.Index(run.path).get_indexer(first.path)
        columns = [run.labels.index(label) for label in first.labels]
        total = total + run.p[np.ix_(rows, columns)]
    return first._replace(p=total / len(runs))


def score_file(test, dataset, resamples, validation=None):
    """(rows, names of the resamples, resamples) of one set of predictions."""
    score = Score(test, resamples, zlib.crc32(dataset.encode()))
    chosen = choose(validation) if validation else None
    score.baselines()
    score.ranking()
    score.decisions()
    score.calibration()
    score.referral()
    if chosen:
        score.chosen_on_validation(*chosen)
    score.subgroups(chosen)
    return score.rows, *score.draws()


def score_set(exp, dataset, paths, validation, manifests, resamples):
    """All runs of one arm on one test set, {seed: path}, and their ensemble.

    Returns: [(exp, seed, rows, names, resamples)], the mark of stand-ins, the checksum of the images.
    """
    results, tests, vals = [], [], []
    for seed, path in paths.items():
        test = read_predictions(path)
        if tests and digest(test) != digest(tests[0]):
            raise InputError(unlike(path, next(iter(paths.values()))))
        if manifests:
            people = read_manifests(manifests)
            for image in test.path[~np.isin(test.path, people.index)][:1]:
                raise InputError(f"{path}: image '{image}' is in no manifest; give the one that the "
                                 "predictions were made from")
            test = test._replace(people=people.loc[test.path].reset_index(drop=True))
        beside = validation or path.with_name("nih_val.csv")
        val = read_predictions(beside) if beside != path and (validation or beside.is_file()) else None
        results.append((exp, seed, *score_file(test, dataset, resamples, val)))
        tests.append(test)
        vals.append(val)
    if len(tests) > 1:
        val = average(vals) if None not in vals and len(set(map(digest, vals))) == 1 else None
        results.append((f"{exp}-ensemble", "", *score_file(average(tests), dataset, resamples, val)))
    return results, " ".join(sorted({read_mark(path) for path in paths.values()})).strip(), digest(tests[0])


# ------------------------------------------------------------------------------------------------------- main

def identify(path, args):
    """(exp, seed, dataset) of a file: the flags, else its path, else its name."""
    found = re.search(r"([^/]+)/predictions/seed(\d+)/([^/]+)\.csv$", path.absolute().as_posix())
    parts = found.groups() if found else (path.stem, "0", "test")
    flags = (args.exp, args.seed, args.dataset)
    return tuple(part if flag is None else flag for flag, part in zip(flags, parts))


def unlike(path, other):
    return (f"{path} and {other} have the same test set's name but other images, patients or true labels; "
            "predict the same images with both, or give each its own --dataset")


def summary(table):
    """Means over the runs of every arm and test set, as text; the intervals are those of single runs."""
    shown = table["metric"].isin(["auc_mean", "auprc", "brier", "ece", "fnr"]) & table["labels"].ne("")
    shown &= table["variant"].eq("corrected") & table["threshold"].isin(["", "0.5"])
    means = table[shown].pivot_table("value", ["exp", "dataset", "labels"], "metric", sort=False)
    aucs = table[shown & table["metric"].eq("auc_mean")].groupby(means.index.names, sort=False)
    means.insert(0, "runs", aucs.size())
    for end in ("ci_high", "ci_low"):
        means.insert(2, end, aucs[end].first().where(means["runs"] == 1))
    means = means.rename(columns={"fnr": "fnr at 0.5"}).reset_index()
    return means.to_string(index=False, float_format="%.4f", na_rep="")


def run(args):
    """Score all files, a process an arm and test set, and write their rows and resamples."""
    if args.bootstrap < 0 or args.workers < 1:
        raise InputError("--bootstrap must be 0 or more, --workers 1 or more")
    if args.validation and len({path.parent for path in args.predictions}) > 1:
        raise InputError(
            f"--validation {args.validation} belongs to one run; put nih_val.csv beside the files"
        )
    sets = defaultdict(dict)
    for path in args.predictions:
        exp, seed, dataset = identify(path, args)
        if seed in sets[exp, dataset]:
            raise InputError(f"{path} is a second file of exp {exp}, seed {seed}, {dataset}; give one")
        sets[exp, dataset][seed] = path
    jobs = [(*key, paths, args.validation, tuple(args.manifest), args.bootstrap)
            for key, paths in sets.items()]
    rows, resamples, first = [], {}, {}
    with ProcessPoolExecutor(args.workers, initializer=threadpool_limits, initargs=(1,)) as pool:
        apply = pool.map if args.workers > 1 else map
        scored = apply(score_set, *zip(*jobs))
        for (_, dataset, paths, *_), (results, mark, checksum) in zip(jobs, scored):
            path = next(iter(paths.values()))
            other, expected = first.setdefault(dataset, (path, checksum))
            if checksum != expected:
                raise InputError(unlike(path, other))
            for exp, seed, lines, names, draws in results:
                rows += [(exp, seed, dataset, *line, mark) for line in lines]
                resamples |= {f"{exp}/{seed}/{dataset}": draws, f"{exp}/{seed}/{dataset}/rows": names}
    table = pd.DataFrame(rows, columns=COLUMNS)
    print(summary(table))
    for mark in sorted(set(table["stand_in"]) - {""}):
        print(f"stand-in: {mark}")
    if args.out:
        text = table.to_csv(index=False, float_format="%.10g", lineterminator="\n").encode()
        write(args.out.with_name("draws.npz"), lambda file: np.savez(file, **resamples))
        write(args.out, lambda file: file.write(text))
        print(f"{args.out}: {len(rows):,} rows of {len(args.predictions)} files; draws.npz beside it")


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
