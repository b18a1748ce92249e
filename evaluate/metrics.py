"""Score prediction files: every metric of the study, as the paper computed it and as the textbook defines it.

Variant "paper" repeats what printed the tables of "From pre-training to downstream performance: does
domain-specific pre-training make sense?" (Krones 2026, arXiv:2605.08819), "corrected" is the usual one.
To import: each metric, the patient bootstrap by weighted ranks, DeLong's test (clustered too). What compares
experiments (verdicts, Holm, variance of runs and of patients, detectable differences) is compare.py.

    python evaluate/metrics.py runs/*/predictions/seed*/*.csv --out results/metrics.csv
    python evaluate/metrics.py test.csv --exp mine --seed 0 --dataset here --out metrics.csv
    python evaluate/metrics.py runs/*/predictions/*/nih_test.csv --manifest data/nih/manifest.csv --out m.csv

Reads   predictions: path, patient, true_<label> (0 or 1), prob_<label> (0 to 1), one row an image. A blank
        patient has no other image; "Pleural Effusion" and other spellings become NIH's. The path tells
        experiment, seed and test set. nih_val.csv beside a file (or --validation) chooses thresholds.
Writes  metrics.csv: exp, seed, dataset, labels, metric, variant, label, threshold, value, ci_low, ci_high.
        labels: size of the label set: 14 (all NIH's are there), 5 (at least four of the study's), else all.
        label: blank for the mean over the defined labels (auc_labels says how many) and for whole images.
        threshold: of the decision p > threshold, or the referred fraction, or the lower edge of a bin.
        value: blank if undefined. Intervals: 95 %, by patient; of auc, accuracies, fnr, brier, subgroups.
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import expit, logit, ndtr, ndtri, xlogy
from threadpoolctl import threadpool_limits

NIH14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
         "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
STUDY5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)        # nominal share of images referred to an expert
SPECIFICITIES = (0.9, 0.95)
BINS = 15                                            # of calibration errors and reliability curves
AGES = {"<=40": 40, "41-60": 60, "61-80": 80, ">80": np.inf}    # upper end of each band, years
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high".split()


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


def delong(y, p_left, p_right, patient=None):
    """delong_test of two models, for one label; all arguments 1-D, length n.

    Images count as independent, with `patient` those of one patient as a cluster (the same where every
    patient has one image). Raises ValueError without both classes.
    """
    if (y == 1).all() or not (y == 1).any():
        raise ValueError("DeLong's test needs positives and negatives")
    cluster = np.unique(np.arange(len(y)) if patient is None else patient, return_inverse=True)[1]
    contrast = auc_influence(y, p_left) - auc_influence(y, p_right)
    classes = [y == 1, y != 1]
    parts = [np.bincount(cluster[members], contrast[members], cluster.max() + 1) for members in classes]
    return delong_test(auc(y, p_left) - auc(y, p_right), parts,
                       [len(np.unique(cluster[members])) for members in classes])


def stable_order(values):
    """np.argsort(values, kind="stable") of floats [n], several times as fast where few are equal."""
    order = np.argsort(values)
    ranked = values[order]
    tied = np.flatnonzero(ranked[1:] == ranked[:-1])
    tied = np.union1d(tied, tied + 1)
    order[tied] = order[tied][np.lexsort((order[tied], ranked[tied]))]
    return order


# ------------------------------------------------------------------------------------- decisions and referral

def mean_accuracy(y, p, threshold, variant="corrected"):
    """Accuracy at p > threshold, averaged over labels; "paper" rounds each label to 4 decimals first."""
    accuracy = ((p > threshold) == (y == 1)).mean(0)
    return (accuracy.round(4) if variant == "paper" else accuracy).mean()


def subset_accuracy(y, p, threshold):
    """Share of images with every label right at p > threshold."""
    return ((p > threshold) == (y == 1)).all(1).mean()


def fnr(y, p, threshold):
    """Missed share of the positives per label at p > threshold, float [K]; undefined without positives."""
    positive = y == 1
    with np.errstate(invalid="ignore"):
        return (positive & (p <= threshold)).sum(0) / positive.sum(0)


def images_seen(n, fractions, variant="corrected"):
    """How many of n images an expert has seen at each nominal fraction, int [Q]: floor(n q); in "paper" they
    add up (an answered image has u = 0.5 and is not asked about again).
    """
    seen = np.array([int(n * q) for q in fractions])
    return np.minimum(seen.cumsum() if variant == "paper" else seen, n)


def referral_auc(y, p, seen):
    """AUC per label when the `seen` most uncertain images are answered, and when they are left out: [Q, K].

    Uncertain: small u = mean over labels of |p - 0.5|, in stable order of (u, row). An answer is the truth as
    a probability. Its pairs are in order but for ties, so the images without one have to be ranked only.
    """
    order, all_low = stable_order(np.abs(p - 0.5).mean(1)), (y == 0).sum(0)
    all_high, answered, left_out = len(y) - all_low, [], []
    for count in seen:
        truth, score = (np.asfortranarray(values[order[count:]]) for values in (y, p))
        low, tied = (truth == 0).sum(0), score == 1 - truth      # p equals the answer to the other class
        high, tied_low = len(truth) - low, (tied & (truth == 0)).sum(0)
        left_out.append(auc(truth, score))
        ordered = np.where(high * low, left_out[-1], 0) * high * low
        ordered += (all_high - high) * (all_low - tied_low / 2)
        ordered += (all_low - low) * (high - (tied.sum(0) - tied_low) / 2)
        with np.errstate(invalid="ignore"):
            answered.append(ordered / (all_high * all_low))
    return np.array(answered), np.array(left_out)


def oracle_auc(y, p, fractions, variant="corrected"):
    """Oracle AUC per label, float [Q, K], and the share of images that the expert saw, float [Q].

    "paper" gives 0 to a label without positives, and its referrals add up.
    """
    seen = images_seen(len(p), fractions, variant)
    values = referral_auc(y, p, seen)[0]
    if variant == "paper":
        values[:, ~(y == 1).any(0)] = 0
    return values, seen / len(p)


def risk_coverage_area(y, p, threshold=0.5):
    """Share of wrong labels among the 1, 2, ... n most certain images, averaged (Geifman et al. 2019)."""
    certain_first = stable_order(-np.abs(p - 0.5).mean(1))
    wrong = ((p > threshold) != (y == 1)).mean(1)[certain_first]
    return (np.cumsum(wrong) / np.arange(1, len(y) + 1)).mean()


# ------------------------------------------------------------------------------------------------ calibration

def bin_gap(bins, confidence, outcome):
    """Sum over bins of count |mean confidence - mean outcome| / n per label, float [K]; the counts cancel."""
    excess = zip(bins.T, (confidence - outcome).T)
    return np.array([np.abs(np.bincount(*column)).sum() for column in excess]) / len(bins)


def calibration_error(y, p, thresholds=THRESHOLDS):
    """The paper's "calibration error", float [T, K]: |p - 0.5| held against the accuracy at the threshold.

    Bin i starts at i/30 but is 1/15 wide, and an item goes to the first bin that holds it, which is the first
    whose upper end lies above it. Source: the released evaluation code (evaluation.md, section 2).
    """
    confidence, upper = np.abs(p - 0.5), np.linspace(0, 0.5, BINS + 1)[:-1] + 1 / BINS
    bins = np.searchsorted(upper, confidence, "right")
    return np.array([bin_gap(bins, confidence, (p > threshold) == (y == 1)) for threshold in thresholds])


def probability_bins(p, adaptive=False):
    """Bin of each probability, int [n, K]: BINS equal widths, closed above, or (adaptive) equal counts."""
    if not adaptive:
        return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], p)
    bins = np.empty(p.shape, int)
    for column, scores in zip(bins.T, p.T):
        column[stable_order(scores)] = np.arange(len(p)) * BINS // len(p)
    return bins


def ece(y, p, adaptive=False):
    """Expected calibration error per label, float [K]: p against the share of positives (Guo et al. 2017)."""
    return bin_gap(probability_bins(p, adaptive), p, y)


def reliability(y, p):
    """Reliability curve of one label (1-D): images, mean p, share of positives in each bin, float [BINS]."""
    bins = probability_bins(p)
    count, predicted, observed = (np.bincount(bins, weights, BINS) for weights in (None, p, y))
    with np.errstate(invalid="ignore"):
        return count, predicted / count, observed / count


def temper(p, temperature):
    """sigmoid(logit(p) / temperature), with p kept 1e-8 off 0 and 1, the precision of a predictions file."""
    return expit(logit(np.clip(p, 1e-8, 1 - 1e-8)) / temperature)


def fit_temperature(y, p):
    """The temperature in 0.05-20 of least cross-entropy over all labels (Guo et al., arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar          # takes half a second and is not always needed

    def cross_entropy(log_temperature):
        q = temper(p, np.exp(log_temperature))
        return -(xlogy(y, q) + xlogy(1 - y, 1 - q)).mean()
    return float(np.exp(minimize_scalar(cross_entropy, bounds=np.log([0.05, 20]), method="bounded").x))


# ------------------------------------------------------------------------------------------- operating points

def operating_points(y, p):
    """One label (1-D): its distinct scores t, ascending, and how many positives and negatives have p > t."""
    order = np.argsort(p)
    scores, positive = p[order], y[order] == 1
    last = np.flatnonzero(np.append(scores[1:] > scores[:-1], True))        # of the images with each score
    above = positive.sum() - np.cumsum(positive)[last]
    return scores[last], above, len(p) - 1 - last - above


def average_precision(y, p):
    """Area under the precision-recall steps (AUPRC) per label, float [K]; undefined without positives."""
    values = np.full(y.shape[1], np.nan)
    for k in np.flatnonzero(y.any(0)):
        _, true, false = operating_points(y[:, k], p[:, k])
        from_t = np.append(y[:, k].sum(), true[:-1])                # positives with p >= t
        flagged = np.append(len(y), (true + false)[:-1])
        values[k] = ((from_t - true) * from_t / flagged).sum() / from_t[0]
    return values


def sensitivity_at(y, p, specificities=SPECIFICITIES):
    """Highest sensitivity with at least each specificity, float [S, K]; undefined without both classes."""
    values = np.full((len(specificities), y.shape[1]), np.nan)
    for k in np.flatnonzero(y.any(0) & ~y.all(0)):
        _, true, false = operating_points(y[:, k], p[:, k])
        specificity = 1 - false / (y[:, k] == 0).sum()
        values[:, k] = true[np.searchsorted(specificity, np.array(specificities) - 1e-12)] / y[:, k].sum()
    return values


def choose_threshold(y, p, rule):
    """The lowest score t of one label (1-D) where p > t is best by `rule`: "f1", or "youden" for
    sensitivity + specificity. NaN without both classes.
    """
    positives, negatives = (y == 1).sum(), (y == 0).sum()
    if not positives or not negatives:
        return np.nan
    scores, true, false = operating_points(y, p)
    gain = {"f1": 2 * true / (true + false + positives), "youden": true / positives - false / negatives}[rule]
    return scores[np.argmax(gain)]


def rates(y, p, threshold):
    """Accuracy, sensitivity, specificity, ... of p > threshold (one or [K]) by name, float [K] each."""
    positive, flagged = y == 1, p > threshold
    hit, passed = (positive & flagged).sum(0), (~positive & ~flagged).sum(0)
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = hit / positive.sum(0), passed / (~positive).sum(0)
        f1 = np.where(positive.any(0), 2 * hit / (positive.sum(0) + flagged.sum(0)), np.nan)
    return {"accuracy": (hit + passed) / len(y), "sensitivity": sensitivity, "specificity": specificity,
            "balanced_accuracy": (sensitivity + specificity) / 2, "f1": f1}


# ---------------------------------------------------------------------------------------------- reading files

class InputError(ValueError):
    """A mistake in the user's files; the text is the sentence to print."""


class Predictions(NamedTuple):
    """One predictions file: the K labels, y int8 [n, K], p float64 [n, K], patient and path str [n]."""
    labels: list
    y: np.ndarray
    p: np.ndarray
    patient: np.ndarray
    path: np.ndarray

    def of(self, labels):
        """y and p of some of the labels."""
        columns = [self.labels.index(label) for label in labels]
        return self.y[:, columns], self.p[:, columns]


def nih_name(label):
    """NIH's spelling of a label ("Pleural effusion": "Effusion"); a label that NIH lacks keeps its own."""
    spelt = {name.replace("_", "").lower(): name for name in NIH14} | {"pleuraleffusion": "Effusion"}
    return spelt.get(re.sub(r"[\W_]", "", label).lower(), label)


def read_csv(path, columns, **options):
    """A CSV that holds `columns` and at least one row. Raises InputError."""
    try:
        frame = pd.read_csv(path, keep_default_na=False, low_memory=False, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"{path} is no CSV table with a header row ({reason})") from None
    for column in columns:
        if column not in frame:
            raise InputError(f"{path} has no column '{column}'; add it")
    if frame.empty:
        raise InputError(f"{path} has a header and no rows; make it again")
    return frame


def read_predictions(path):
    """One predictions file, checked. Raises InputError that names file, row and what was expected."""
    frame = read_csv(path, ["path", "patient"], dtype={"path": str, "patient": str})
    names = {kind: [name[5:] for name in frame if name.startswith(kind)] for kind in ("true_", "prob_")}
    for kind, other in (("true_", "prob_"), ("prob_", "true_")):
        for name in sorted(set(names[kind]) - set(names[other])):
            raise InputError(f"{path} has a column {kind}{name} but no {other}{name}; add it or drop both")
    labels = [nih_name(name) for name in names["true_"]]
    if not labels:
        raise InputError(f"{path} has no column true_<label>; a label needs true_<label> and prob_<label>")
    if len(set(labels)) < len(labels):
        raise InputError(f"{path} has label {max(labels, key=labels.count)} under two spellings; keep one")
    for row in np.flatnonzero(frame["path"].duplicated())[:1]:
        raise InputError(f"{path} row {row + 1}: image '{frame['path'][row]}' is there twice; keep one row")
    parts = []
    for kind, expected in (("true_", "0 or 1"), ("prob_", "a probability from 0 to 1")):
        columns = [frame[kind + name] for name in names["true_"]]
        part = np.array([pd.to_numeric(column, errors="coerce").to_numpy(float) for column in columns])
        wrong = ~((part >= 0) & (part <= 1)) if kind == "prob_" else ~np.isin(part, (0, 1))
        for k, row in np.argwhere(wrong)[:1]:
            name, cell = columns[k].name, columns[k][row]
            raise InputError(f"{path} row {row + 1}: {name} is '{cell}'; expected {expected}")
        parts.append(part.T)
    y, p = parts[0].astype(np.int8), parts[1]
    if not (y.any(0) & ~y.all(0)).any():
        raise InputError(f"{path} has no label with both positives and negatives, so nothing can be ranked; "
                         "check true_<label> or add images")
    patient = np.where(frame["patient"] == "", "image " + frame["path"], frame["patient"]).astype(str)
    return Predictions(labels, y, p, patient, frame["path"].to_numpy(str))


def label_sets(labels):
    """What means are over, by size: 14 if all of NIH's labels are there, 5 if four of STUDY5, else all."""
    study = [label for label in STUDY5 if label in labels]
    sets = ({14: list(NIH14)} if set(NIH14) <= set(labels) else {}) | ({5: study} if len(study) >= 4 else {})
    return sets or {len(labels): labels}


@lru_cache(maxsize=1)
def read_groups(manifests):
    """Sex, age band and race of every image of the manifests: DataFrame of str by path, blank if unknown."""
    frame = pd.concat([read_csv(path, ["path"], dtype=str) for path in manifests])
    frame = frame.reindex(columns=["path", "sex", "age", "race"]).fillna("").drop_duplicates().set_index("path")
    for path in frame.index[frame.index.duplicated()][:1]:
        raise InputError(f"the manifests know two people for image '{path}'; give the one that the predictions "
                         "were made from")
    bands = pd.cut(pd.to_numeric(frame["age"], errors="coerce"), [-np.inf, *AGES.values()], labels=list(AGES))
    frame["age"] = bands.astype(object).fillna("")
    if (frame == "").all(axis=None):
        raise InputError(f"{manifests[0]} knows no sex, age or race of any image; leave --manifest out")
    for race in ("White", "Black", "Asian"):                # also "White, non-Hispanic" and the like
        frame.loc[frame["race"].str.contains(race), "race"] = race
    return frame


# --------------------------------------------------------------------------------------------- scoring a file

def choose(validation):
    """What validation predictions decide: {rule: {label: threshold}}, and one temperature for the model."""
    thresholds = {rule: {label: choose_threshold(y, p, rule)
                         for label, y, p in zip(validation.labels, validation.y.T, validation.p.T)}
                  for rule in ("f1", "youden")}
    return thresholds, fit_temperature(validation.y, validation.p)


class Score:
    """Collects the rows of one file, from `labels` to `ci_high`; `sets`: the label sets that means are over.

    What belongs to a label is computed once and written in every set that holds the label.
    """

    def __init__(self, test, sets, patient, draws):
        self.rows, self.patient, self.draws = [], patient, draws
        self.labels = [label for label in test.labels if any(label in labels for labels in sets.values())]
        self.y, self.p = test.of(self.labels)
        self.sets = {size: [self.labels.index(label) for label in labels] for size, labels in sets.items()}

    def of_sets(self):
        """(size, y, p) of every label set, for what is computed from all labels of an image."""
        return [(size, self.y[:, columns], self.p[:, columns]) for size, columns in self.sets.items()]

    def put(self, size, metric, value, threshold=np.nan, variant="corrected", draws=None, influence=None):
        """One row without a label, with an interval if there are draws [B]."""
        low, high = (np.nan, np.nan) if draws is None else interval(draws, value, influence)
        self.rows.append((size, metric, variant, "", threshold, value, low, high))

    def put_labels(self, metric, values, threshold=np.nan, variant="corrected", draws=None, influence=None,
                   mean=True):
        """A row a label, one for the mean of the defined; values [K], draws [B, K], influence [P, K].

        mean: whether there is such a row, or bool [K]: over which labels.
        """
        spans = [(np.nan, np.nan) if draws is None else
                 interval(draws[:, k], values[k], None if influence is None else influence[:, k])
                 for k in range(len(values))]
        for size, columns in self.sets.items():
            self.rows += [(size, metric, variant, self.labels[k], threshold, values[k], *spans[k])
                          for k in columns]
            if mean is not False:
                over = [k for k in columns if mean is True or mean[k]]
                self.put(size, metric, mean_over_labels(values[over]), threshold, variant,
                         None if draws is None else mean_over_labels(draws[:, over]))

    def baselines(self):
        """What is in the file, and what an answer without a look at the image scores."""
        prevalence = self.y.mean(0)
        for size, y, _ in self.of_sets():
            self.put(size, "images", len(y))
            self.put(size, "patients", self.draws.shape[1])
            self.put(size, "always_negative_subset_accuracy", (y == 0).all(1).mean())
        self.put_labels("positives", self.y.sum(0), mean=False)
        self.put_labels("random_guess_accuracy", 1 - prevalence, variant="paper")
        self.put_labels("random_guess_accuracy", prevalence ** 2 + (1 - prevalence) ** 2)
        self.put_labels("always_negative_accuracy", 1 - prevalence)

    def ranking(self, bca=False):
        """Metrics without a threshold."""
        draws, influence = auc_draws(self.y, self.p, self.patient, self.draws), None
        if bca:
            influence = np.zeros((self.draws.shape[1], len(self.labels)))
            for k in np.flatnonzero(self.y.any(0) & ~self.y.all(0)):
                added = auc_influence(self.y[:, k], self.p[:, k])
                influence[:, k] = np.bincount(self.patient, added, len(influence))
        for variant in ("paper", "corrected"):
            values = auc(self.y, self.p, variant)
            self.put_labels("auc", values, variant=variant, draws=draws, influence=influence, mean=False)
            for size, columns in self.sets.items():
                self.put(size, "auc_mean", mean_over_labels(values[columns], variant), variant=variant,
                         draws=mean_over_labels(draws[:, columns]),
                         influence=influence[:, columns].sum(1) if bca else None)
        for size, columns in self.sets.items():
            self.put(size, "auc_labels", np.count_nonzero(~np.isnan(values[columns])))
        if len(draws):
            self.put_labels("undefined_resamples", np.isnan(draws).mean(0), mean=False)
        self.put_labels("auprc", average_precision(self.y, self.p))
        for specificity, values in zip(SPECIFICITIES, sensitivity_at(self.y, self.p)):
            self.put_labels(f"sensitivity_at_specificity_{specificity:g}", values)

    def decisions(self):
        """Metrics of p > threshold, and the Brier score; the rates of a resample are ratios of its sums."""
        positive, squares = self.y == 1, (self.p - self.y) ** 2
        counted = [positive, ~positive]
        for threshold in THRESHOLDS:
            wrong = (self.p > threshold) != positive
            spoilt = np.stack([wrong[:, columns].any(1) for columns in self.sets.values()], 1)
            counted += [wrong & positive, wrong & ~positive, spoilt]
        sums = sum_draws(np.hstack(counted, dtype=np.float32), self.patient, self.draws)
        ends = np.cumsum([part.shape[1] for part in counted])[:-1]
        positives, negatives, *sums = np.split(sums.astype(float), ends, 1)
        images = (positives + negatives)[:, :1]
        self.put_labels("brier", squares.mean(0), draws=sum_draws(squares, self.patient, self.draws) / images)
        for threshold, missed, alarms, spoilt in zip(THRESHOLDS, sums[::3], sums[1::3], sums[2::3]):
            here = rates(self.y, self.p, threshold)
            right, whole = 1 - (missed + alarms) / images, 1 - spoilt / images
            with np.errstate(invalid="ignore"):
                missed, alarms = missed / positives, alarms / negatives
            self.put_labels("accuracy", here["accuracy"], threshold, draws=right, mean=False)
            self.put_labels("balanced_accuracy", here["balanced_accuracy"], threshold,
                            draws=1 - (missed + alarms) / 2)
            for variant in ("paper", "corrected"):
                self.put_labels("fnr", fnr(self.y, self.p, threshold), threshold, variant, missed)
                for i, (size, y, p) in enumerate(self.of_sets()):
                    mean, subset = mean_accuracy(y, p, threshold, variant), subset_accuracy(y, p, threshold)
                    rights = right[:, self.sets[size]].mean(1)
                    self.put(size, "mean_accuracy", mean, threshold, variant, rights)
                    self.put(size, "subset_accuracy", subset, threshold, variant, whole[:, i])

    def calibration(self):
        """How far p is from a probability."""
        for threshold, values in zip(THRESHOLDS, calibration_error(self.y, self.p)):
            self.put_labels("calibration_error", values, threshold, "paper")
        self.put_labels("ece", ece(self.y, self.p))
        self.put_labels("adaptive_ece", ece(self.y, self.p, adaptive=True))
        curves = np.array([reliability(y, p) for y, p in zip(self.y.T, self.p.T)])      # [K, 3, BINS]
        for edge, curve in zip(np.arange(BINS) / BINS, curves.T):
            for name, values in zip(("images", "predicted", "observed"), curve):
                self.put_labels(f"reliability_{name}", values, edge, mean=False)

    def referral(self):
        """An expert answers the uncertain images (oracle), or they are left out (rejection)."""
        for size, y, p in self.of_sets():
            seen = {variant: images_seen(len(p), FRACTIONS, variant) for variant in ("paper", "corrected")}
            counts = np.unique(np.concatenate(list(seen.values())))
            answered, left_out = referral_auc(y, p, counts)
            for variant, images in seen.items():
                for fraction, count, at in zip(FRACTIONS, images, np.searchsorted(counts, images)):
                    self.put(size, "oracle_auc", mean_over_labels(answered[at], variant), fraction, variant)
                    self.put(size, "referred", count / len(p), fraction, variant)
            for fraction, at in zip(FRACTIONS, np.searchsorted(counts, seen["corrected"])):
                self.put(size, "rejection_auc", mean_over_labels(left_out[at]), fraction)
            self.put(size, "risk_coverage_area", risk_coverage_area(y, p))
        alone = [oracle_auc(self.y[:, [k]], self.p[:, [k]], FRACTIONS)[0] for k in range(len(self.labels))]
        for fraction, values in zip(FRACTIONS, np.hstack(alone)):
            self.put_labels("oracle_auc_by_label", values, fraction)

    def chosen_on_validation(self, thresholds, temperature):
        """The thresholds and the temperature of `choose`, applied."""
        for rule, chosen in thresholds.items():
            at = np.array([chosen.get(label, np.nan) for label in self.labels])
            self.put_labels(f"threshold_{rule}", at, mean=False)
            for name, values in rates(self.y, self.p, at).items():
                self.put_labels(f"{name}_{rule}", np.where(np.isnan(at), np.nan, values))
        tempered = temper(self.p, temperature)
        self.put_labels("ece_temperature", ece(self.y, tempered))
        self.put_labels("brier_temperature", ((tempered - self.y) ** 2).mean(0))
        for size in self.sets:
            self.put(size, "temperature", temperature)

    def subgroups(self, groups):
        """AUC of each sex, age band and race, and per label the gap between best and worst.

        Means are over the labels that are defined in every group that has any. A gap has no interval: resampling
        adds noise to every group, hence to the largest difference, and its percentiles would lie too high.
        """
        for attribute in groups:
            if not (names := sorted(set(groups[attribute]) - {""})):
                continue
            here = [(groups[attribute] == name).to_numpy() for name in names]
            values = np.array([auc(self.y[rows], self.p[rows]) for rows in here])           # [groups, K]
            shared = ~np.isnan(values[~np.isnan(values).all(1)]).any(0)    # a group of one image has no AUC
            for name, rows, areas in zip(names, here, values):
                draws = auc_draws(self.y[rows], self.p[rows], self.patient[rows], self.draws)
                self.put_labels(f"auc[{attribute}={name}]", areas, draws=draws, mean=shared)
                for size in self.sets:
                    self.put(size, f"images[{attribute}={name}]", rows.sum())
            if len(names) > 1:
                self.put_labels(f"auc_gap[{attribute}]", gap(values), mean=shared)
                for size, columns in self.sets.items():
                    self.put(size, f"auc_labels[{attribute}]", shared[columns].sum())


def gap(values):
    """Largest minus smallest defined value along the first axis; NaN with fewer than two."""
    span = np.fmax.reduce(values) - np.fmin.reduce(values)                  # which pass over NaN
    return np.where(np.count_nonzero(~np.isnan(values), axis=0) > 1, span, np.nan)


def score_file(path, resamples, chosen=None, groups=None, bca=False):
    """Rows of one file, from `labels` to `ci_high`, and remarks to print."""
    test = read_predictions(path)
    score = Score(test, label_sets(test.labels), *draw_patients(test.patient, resamples))
    score.baselines()
    score.ranking(bca)
    score.decisions()
    score.calibration()
    score.referral()
    if chosen is not None:
        score.chosen_on_validation(*chosen)
    if groups is not None:
        places = groups.index.get_indexer(test.path)
        for row in np.flatnonzero(places < 0)[:1]:
            raise InputError(f"{path} row {row + 1}: image '{test.path[row]}' is in no manifest; give the "
                             "one that the predictions were made from")
        score.subgroups(groups.iloc[places])
    left_out = sorted(set(test.labels) - set(score.labels))
    remarks = [f"not scored: {', '.join(left_out)}"] if left_out else []
    for size, y, p in score.of_sets():
        defined = [score.labels[k] for k, value in zip(score.sets[size], auc(y, p)) if not np.isnan(value)]
        if len(defined) < size:
            remarks.append(f"mean of {size} over {len(defined)}: {', '.join(defined)}")
    return score.rows, remarks


def score_run(paths, validation, manifests, resamples, bca):
    """score_file for the files of one run, whose thresholds and temperature come from its validation."""
    chosen = choose(read_predictions(validation)) if validation else None
    groups = read_groups(manifests) if manifests else None
    return [score_file(path, resamples, None if path == validation else chosen, groups, bca)
            for path in paths]


# ------------------------------------------------------------------------------------------------------- main

def identify(path, args):
    """(exp, seed, dataset) of a file: the flags, and what they leave open from its path."""
    found = re.search(r"([^/]+)/predictions/seed(\d+)/([^/]+)\.csv$", path.absolute().as_posix())
    flags = (args.exp, args.seed, args.dataset)
    if found is None and None in flags:
        raise InputError(f"{path} does not lie at runs/<exp>/predictions/seed<k>/<test set>.csv, so its path "
                         "does not tell enough; give --exp, --seed and --dataset")
    parts = found.groups() if found else flags
    return tuple(part if flag is None else flag for flag, part in zip(flags, parts))


def write_metrics(path, rows):
    """metrics.csv, whole or not at all: a temporary file beside it, flushed to disk, then renamed."""
    table = pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, float_format="%.10g", lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".tmp"), "w", encoding="utf-8", newline="") as file:
            file.write(table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as problem:
        raise InputError(f"{path} cannot be written ({problem.strerror}); choose another --out") from None


def run(args):
    """Score all files, a process for each run, and write their rows."""
    if args.bootstrap < 0 or args.workers < 1:
        raise InputError("--bootstrap must be 0 or more, --workers 1 or more")
    names, folders = {}, defaultdict(list)
    for path in args.predictions:
        name = identify(path, args)
        if name in names.values():
            raise InputError(f"{path} is a second file of exp {name[0]}, seed {name[1]}, {name[2]}; give one")
        names[path] = name
        folders[path.parent].append(path)
    if args.validation and len(folders) > 1:
        raise InputError(f"--validation {args.validation} belongs to one run, but the files lie in "
                         f"{len(folders)} folders; give one run, or put nih_val.csv beside each")
    rows, bca, manifests = [], args.interval == "bca", tuple(args.manifest)
    jobs = [(paths, args.validation or next(folder.glob("nih_val.csv"), None), manifests, args.bootstrap, bca)
            for folder, paths in folders.items()]
    workers = min(args.workers, len(jobs))                  # a process a core: BLAS threads would only fight
    with ProcessPoolExecutor(workers, initializer=threadpool_limits, initargs=(1,)) as pool:
        for (paths, *_), scores in zip(jobs, pool.map(score_run, *zip(*jobs))):
            for path, (scored, remarks) in zip(paths, scores):
                rows += [names[path] + row for row in scored]
                means = [f"{row[5]:.4f} ({row[0]})" for row in scored
                         if row[1:3] == ("auc_mean", "corrected")]
                print(*names[path], "AUC", *means, *(f"[{remark}]" for remark in remarks), flush=True)
    write_metrics(args.out, rows)
    print(f"{args.out}: {len(rows):,} rows of {len(names)} files")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="+", type=Path, help="predictions files, of any number of runs")
    parser.add_argument("--out", type=Path, required=True, help="the metrics.csv to write")
    parser.add_argument("--exp", help="experiment, where the path does not tell")
    parser.add_argument("--seed", help="seed of the run, where the path does not tell")
    parser.add_argument("--dataset", help="name of the test set, where the path does not tell")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples (2000); 0: no intervals")
    parser.add_argument("--interval", choices=("percentile", "bca"), default="percentile",
                        help="of the AUCs (percentile); the other metrics have percentile intervals")
    parser.add_argument("--validation", type=Path, help="validation predictions (nih_val.csv beside)")
    parser.add_argument("--manifest", nargs="+", type=Path, default=[],
                        help="manifests with sex, age and race of the images: scores subgroups as well")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.error = fail                 # one sentence, like every other mistake
    try:
        run(parser.parse_args())
    except InputError as mistake:
        fail(mistake)


if __name__ == "__main__":
    main()
