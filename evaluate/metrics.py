"""Score prediction files: every metric of the study, most with a 95 % interval and patient resamples.

Variant "paper" repeats what printed the tables of "From pre-training to downstream performance: does
domain-specific pre-training make sense?" (Krones 2026, arXiv:2605.08819) where that differs from the usual
definition, "corrected". To import: of y [n, K], 1, 0, else unknown, and p float [n, K], 0 to 1, arrays: auc,
oracle_auc, mean_accuracy, subset_accuracy, fnr, calibration_error, ece; of one label, [n]: auc, auc_interval,
delong. Comparing arms (intervals over runs, verdicts) is compare.py's.

    python evaluate/metrics.py a.csv b.csv                     two models of yours, a table on the terminal
    python evaluate/metrics.py runs/*/predictions/seed*/*.csv --out results/metrics.csv

Reads   predictions: path, patient, true_<label> (1, 0, blank if unknown), prob_<label> (0 to 1), a row an
        image; sex, age, race if there, or from --manifest. A blank patient has no other image. "Pleural
        Effusion" and other spellings become NIH's. Experiment, seed and test set: from
        runs/<exp>/predictions/seed<k>/<test set>.csv, else the file's name, 0 and "test". nih_val.csv beside
        a file chooses thresholds and a temperature; any NAME.json beside NAME.csv holds the mark "stand_in".
Writes  metrics.csv: exp, seed, dataset, labels, metric, variant, label, threshold, value, ci_low, ci_high,
        stand_in. labels: what a mean is over: 5 (at least four of the study's), 14 (NIH's), all (if others).
        label: of one label; both blank: of whole images. threshold: of p > threshold, the share referred, or
        a bin's lower edge. value: blank if undefined, as where validation chooses no threshold for a label.
        ci: blank if unknown, as for the AUC of a label with fewer than two patients in a class.
        <exp>-ensemble, no seed: mean probability of its runs.
        draws.npz beside it (NAME.draws.npz of NAME.csv): for "exp/seed/dataset" float32 [rows, resamples],
        the values of a metric when patients are drawn with replacement, the same ones for every run;
        "exp/seed/dataset/rows": which, as labels|metric|label|threshold: AUCs, and for labels 5, else all,
        most other means.
Cells that are unknown are left out of every metric; a label that no image knows is not scored.
"""

import argparse
import csv
import json
import os
import re
import signal
import sys
import zlib
from collections import defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import expit, logit, ndtr
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
RACES = {rf"(?i).*\b{race}.*": race for race in ("White", "Black", "Asian")}     # not Caucasian
UNKNOWN = "(?i)^(|nan|none|na|n/a|<na>|null|.*unknown|patient refused)$"      # patient, sex, race
NORMAL = 1.959964                                    # half width of a 95 % interval in standard errors
MEANS = {"auc": "auc_mean", "accuracy": "mean_accuracy"}        # names of means over labels
UNREAD = re.compile("balanced_accuracy|.*_(f1|youden)$")        # whose resamples no script reads
WHOLE = {("", ""): [0]}                              # the place of a number about all images
COLUMNS = "exp seed dataset labels metric variant label threshold value ci_low ci_high stand_in".split()


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --------------------------------------------------------------------------------------------------- ranking
# y [n, K] is 1, 0, anything else is unknown and counts nowhere; p float [n, K] in [0, 1]; a row is an image,
# a column a label; functions "of one label" take [n]. Values are [K], NaN is undefined. Influences, [n, K]:
# what a little more weight of each image adds to a value.

undefined_is_nan = np.errstate(invalid="ignore", divide="ignore")


def is_known(y):
    return (y == 1) | (y == 0)


@undefined_is_nan
def mean_over_labels(values, variant="corrected"):
    """Mean of the defined values over the last axis; "paper" leaves out zeros too. NaN if none is left."""
    used = values > 0 if variant == "paper" else ~np.isnan(values)
    return np.where(used, values, 0).sum(-1) / used.sum(-1)


def each_label(metric, *tables):
    """(values [K], influences [n, K]) of a metric of one label, from tables of its arguments, [n, K]."""
    columns = zip(*(table.T for table in tables))
    values, influences = zip(*(metric(*column) for column in columns))
    return np.array(values), np.array(influences).T


def ranks(p):
    """Rank of each score, int [n], equal scores sharing one. Raises: ValueError if one is NaN."""
    scores, rank = np.unique(p, return_inverse=True)
    if scores[-1] != scores[-1]:                        # NaN, which sorts last
        raise ValueError("a score or a patient is NaN")
    return rank


def levels(y, p):
    """Ranks of each label's scores, and of an expert's answers, 1 or 0, in their place, int [n, K] each."""
    columns = [ranks(np.append(score, [0, 1])) for score in p.T]
    table = np.array(columns).T
    return table[:-2], (y == 1) * table[-1]


def class_counts(y, level):
    """How many positives and how many negatives of one label have each rank, int [2, ranks]."""
    size = level.max() + 1
    counts = [np.bincount(level[y == kind], minlength=size) for kind in (1, 0)]
    return np.array(counts)


@undefined_is_nan
def placements(y, level):
    """AUC of one label, and the shares of its positives and negatives below each rank, [2, ranks]."""
    counts = class_counts(y, level)
    total = counts.sum(1)
    below = (counts.cumsum(1) - counts / 2) / total[:, None]                # a tie is 1/2
    return counts[0] @ below[1] / total[0], below


def level_auc(y, level, variant="corrected"):
    """auc() from ranks."""
    areas = [placements(*column)[0] for column in zip(y.T, level.T)]
    return np.where((y == 1).any(0) | (variant != "paper"), areas, 0)


def auc(y, p, variant="corrected"):
    """Area under the ROC curve per label, float [K] (a float for 1-D input): pairs in order, a tie is 1/2.

    Undefined without both classes; "paper" gives 0 to a label without positives.
    """
    if np.ndim(y) == 1:
        return auc(np.c_[y], np.c_[p], variant)[0]
    return level_auc(y, levels(y, p)[0], variant)


@undefined_is_nan
def ranked_auc(y, level):
    """AUC of one label from ranks, and the influences.

    Influence of a positive: its share of negatives below it (ties 1/2) less the AUC, over the number of
    positives; of a negative likewise. Source: DeLong et al. 1988, by ranks as in Sun & Xu 2014.
    """
    area, below = placements(y, level)
    beaten, above = below[:, level]                                         # of each image
    high, low = y == 1, y == 0
    influence = high * (above - area) / high.sum()
    influence += low * (1 - beaten - area) / low.sum()
    return area, influence


@undefined_is_nan
def average_precision(y, level):
    """AUPRC (average precision) of one label from ranks, and the influences.

    The mean over positives of the precision at their score; a further image above a score changes it there.
    """
    counts = class_counts(y, level)
    high, positives = counts[0], counts[0].sum()
    true, false = counts[:, ::-1].cumsum(1)[:, ::-1]                        # that score at least as high
    flagged = np.maximum(true + false, 1)
    precision = true / flagged
    area = high @ precision / positives
    gain = np.cumsum(high * false / flagged ** 2)
    loss = np.cumsum(high * true / flagged ** 2)
    influence = (y == 1) * (precision - area + gain)[level]
    influence -= (y == 0) * loss[level]
    return area, influence / positives


def class_patients(y, patient):
    """How many patients have positives and how many have negatives of each label, int [2, K]."""
    counts = [pd.DataFrame(y == kind).groupby(patient).any().sum() for kind in (1, 0)]
    return np.array(counts)


def interval(value, error):
    """Ends of a 95 % interval within 0 and 1; NaN where there is no spread at all, which tells nothing."""
    margin = NORMAL * error if error > 1e-12 else np.nan
    return max(value - margin, 0), min(value + margin, 1)


def clustered_error(y, influence, patient=None):
    """Standard error of an AUC, or a difference of AUCs, of one label from its influences, float [n].

    Images of one `patient` are a cluster (all alone by default). NaN if a class has fewer than two patients.
    Source: Obuchowski 1997; with one image a patient DeLong et al. 1988.
    """
    cluster = ranks(np.arange(len(y)) if patient is None else patient)
    classes = y == 1, y == 0
    (m,), (n,) = class_patients(y, cluster)
    if min(m, n) < 2:
        return np.nan
    ten, one = (np.bincount(cluster, influence * members) for members in classes)
    variance = m / (m - 1) * ten @ ten
    variance += n / (n - 1) * one @ one
    variance += 2 * len(ten) / (len(ten) - 1) * ten @ one
    return np.sqrt(max(variance, 0))


def auc_interval(y, p, patient=None):
    """(AUC, lower, upper end of its 95 % interval) of one label, NaN if undefined.

    y [n]: 1, 0, else unknown; p [n]: any scores; patient [n]: that of each image, if not all differ.
    AUC +- 1.96 standard errors (clustered_error) within 0 and 1; no interval without any spread.
    """
    y = np.asarray(y)
    area, influence = ranked_auc(y, ranks(p))
    error = clustered_error(y, influence, patient)
    return float(area), *map(float, interval(area, error))


def delong(y, p_left, p_right, patient=None):
    """DeLong's test of equal AUC of two models on the same images, one label; arguments as of auc_interval.

    Returns: {difference, se, z, p}; se as clustered_error, z and p NaN where it tells nothing.
    Raises: ValueError without both classes.
    """
    y = np.asarray(y)
    left, left_influence = ranked_auc(y, ranks(p_left))
    right, right_influence = ranked_auc(y, ranks(p_right))
    difference = left - right
    if np.isnan(difference):
        raise ValueError("DeLong's test needs positives and negatives")
    se = clustered_error(y, left_influence - right_influence, patient)
    z = 0.0 if difference == se == 0 else difference / (se or np.nan)
    p = 2 * ndtr(-abs(z))
    return {"difference": difference, "se": se, "z": z, "p": p}


# ------------------------------------------------------------------------------------------------ resampling

@lru_cache(maxsize=8)
def resample_counts(size, resamples, seed):
    """How often each of `size` units is drawn in every bootstrap resample, uint8 [B, size]."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, size), np.uint8, order="F")     # read patient by patient
    for row in counts:
        drawn = rng.integers(size, size=size)
        row[:] = np.bincount(drawn, minlength=size)
    return counts


def draw_patients(patient, resamples, seed=0):
    """Bootstrap over patients: each image's patient, int [n], and how often each is drawn, uint8 [B, P].

    The draws depend on the set of patients and the seed alone: two models on one test set get the same ones.
    """
    index = ranks(patient)
    return index, resample_counts(index.max() + 1, resamples, seed)


def drawn_auc(weights, positives, negatives):
    """AUC of one label, [b], where patients have these weights, float32 [P, b]: exact up to 2^22 images.

    positives: the patient of each, by score; negatives: a sparse matrix [positives + 1, P] in which each
    stands twice, at the first positive that is not below it and at the first above it. The sum of the rows up
    to a positive is then twice the weight of the negatives below it, a tie 1/2.
    """
    drawn = weights[positives]
    below = np.cumsum(negatives @ weights, 0)
    ordered = np.einsum("ij,ij->j", drawn, below[:-1], dtype=np.float64)
    return ordered / (drawn.sum(0) * below[-1].astype(float))


@undefined_is_nan
def auc_draws(y, p, patient, counts, chunk=64):
    """AUC per label of every resample, float [B, K], by weighted ranks; patient, counts: of draw_patients."""
    labels, draws = [], []
    for truth, score in zip(y.T, p.T):
        high, low = (np.flatnonzero(truth == kind) for kind in (1, 0))
        high = high[np.argsort(score[high])]
        rows = [np.searchsorted(score[high], score[low], side) for side in ("left", "right")]
        cells = np.concatenate(rows), np.tile(patient[low], 2)
        ones = np.ones(len(cells[0]), np.float32)
        shape = len(high) + 1, counts.shape[1]
        negatives = csr_matrix((ones, cells), shape)
        labels.append((patient[high], negatives))
    for block in np.array_split(counts, len(counts) // chunk + 1):      # few enough for weights to be cached
        weights = block.T.astype(np.float32, order="C")
        draws.append([drawn_auc(weights, *label) for label in labels])
    return np.concatenate(draws, axis=1).T


def linear_draws(values, changes, counts, chunk=128):
    """M metrics in every resample, to first order, float [M, B]; changes [M, P]: influence of each patient.

    The infinitesimal jackknife (Efron 1982): its spread is the bootstrap's where the metric is smooth.
    """
    sums = np.stack(changes, 1)
    draws, sums = values - sums.sum(0), sums.astype(np.float32)
    for start in range(0, len(sums), chunk):                # few enough for their draws to be cached
        block = counts[:, start:start + chunk].astype(np.float32)
        draws = draws + block @ sums[start:start + chunk]
    return draws.T


# ------------------------------------------------------------------------------------- decisions and referral

@undefined_is_nan
def share(hits, among):
    """Share of `among` that are `hits`, per column, and the influences."""
    total = among.sum(0)
    value = hits.sum(0) / total
    return value, (hits - value * among) / total


def is_right(y, p, threshold):
    """Whether each cell is on its side of p > threshold, bool [n, K]; False where unknown."""
    return np.where(p > threshold, y == 1, y == 0)


def mean_accuracy(y, p, threshold, variant="corrected"):
    """Accuracy at p > threshold, averaged over labels; "paper" rounds each label to 4 decimals first."""
    accuracy, _ = share(is_right(y, p, threshold), is_known(y))
    if variant == "paper":
        accuracy = accuracy.round(4)
    return accuracy.mean()


def subset_accuracy(y, p, threshold):
    """Share of images with every label right at p > threshold, of those with every label known."""
    right = is_right(y, p, threshold).all(1)
    return share(right, is_known(y).all(1))[0]


def fnr(y, p, threshold):
    """Missed share of the positives per label at p > threshold, float [K]; undefined without positives."""
    return share((y == 1) & (p <= threshold), y == 1)[0]


def decisions(y, p, threshold, suffix):
    """Yields (name, values, influences) at p > threshold, a number or one a label; NaN is undefined."""
    y = np.where(np.isnan(threshold), -1, y)
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
    return seen.cumsum().clip(max=n) if variant == "paper" else seen


def turns(u):
    """Place of each image in the order in which an expert is asked: least u first, ties by row."""
    order = np.argsort(u, 0, kind="stable")
    return np.argsort(order, 0)


def certainty(p):
    """Mean over labels of |p - 0.5|, float [n, 1]."""
    return np.abs(p - 0.5).mean(1, keepdims=True)


def referrals(p, level, answers, fractions=FRACTIONS, variant="corrected"):
    """Ranks, int [n, K], when an expert answers the images of least certainty, for each fraction."""
    turn = turns(certainty(p))
    return [np.where(turn < seen, answers, level) for seen in images_seen(len(p), fractions, variant)]


def oracle_auc(y, p, fractions, variant="corrected"):
    """Oracle AUC per label, float [Q, K], and the share of images that the expert saw, float [Q].

    "paper" gives 0 to a label without positives, and its referrals add up.
    """
    referred = referrals(p, *levels(y, p), fractions, variant)
    values = [level_auc(y, level, variant) for level in referred]
    return np.array(values), images_seen(len(p), fractions, variant) / len(p)


def risk_coverage_area(y, p):
    """Share of wrong labels among the 1, 2, ... n most certain images, averaged (Geifman et al. 2019)."""
    certain_first = np.argsort(-certainty(p)[:, 0], kind="stable")
    accuracy, _ = share(is_right(y, p, 0.5).T, is_known(y).T)           # NaN where nothing is known
    accuracy = pd.Series(accuracy[certain_first]).dropna()
    return 1 - accuracy.expanding().mean().mean()


# ------------------------------------------------------------------------------------------------ calibration

@undefined_is_nan
def binned_error(bins, excess, known):
    """Sum over bins of count |mean excess| / n of one label, and the influences."""
    excess, n = excess * known, known.sum()
    sums = np.bincount(bins, excess)
    error = np.abs(sums).sum() / n
    influence = np.sign(sums)[bins] * excess - error * known
    return error, influence / n


def calibration_error(y, p, thresholds=THRESHOLDS):
    """The paper's "calibration error", float [T, K]: |p - 0.5| held against the accuracy at the threshold.

    Bin i starts at i/30 but is 1/15 wide, and an item goes to the first bin that holds it, which is the first
    whose upper end lies above it. Source: the released evaluation code.
    """
    start = np.linspace(0, 0.5, BINS + 1)[:-1]
    upper = start + 1 / BINS
    confidence = np.abs(p - 0.5)
    known = is_known(y)
    bins = np.searchsorted(upper, confidence, "right")
    excesses = [confidence - is_right(y, p, t) for t in thresholds]
    errors = [each_label(binned_error, bins, excess, known)[0] for excess in excesses]
    return np.array(errors)


def probability_bins(p):
    """Bin of each probability: BINS of equal width, closed above."""
    edges = np.linspace(0, 1, BINS + 1)
    return np.searchsorted(edges[1:-1], p)


@undefined_is_nan
def ece_of(y, p, adaptive=False):
    """ece() and the influences; adaptive: BINS of equal count."""
    known, bins = is_known(y), probability_bins(p)
    if adaptive:
        turn = turns(np.where(known, p, 2))             # the unknown ones last
        bins = turn * BINS // known.sum(0)
    return each_label(binned_error, bins, p - y, known)


def ece(y, p, adaptive=False):
    """Expected calibration error per label, float [K]: p against the share of positives (Guo et al. 2017)."""
    return ece_of(y, p, adaptive)[0]


@undefined_is_nan
def reliability(y, p):
    """Reliability curve of one label: images, mean p, share of positives in each bin, [BINS] each."""
    y, p = y[is_known(y)], p[is_known(y)]
    bins = probability_bins(p)
    count = np.bincount(bins, minlength=BINS)
    predicted = np.bincount(bins, p, BINS) / count
    observed = np.bincount(bins, y, BINS) / count
    return {"images": count, "predicted": predicted, "observed": observed}


def logits(p):
    """logit(p), with p kept 1e-8 off 0 and 1, the precision of a predictions file."""
    return logit(np.clip(p, 1e-8, 1 - 1e-8))


def temper(p, temperature):
    return expit(logits(p) / temperature)


def fit_temperature(y, p):
    """The temperature in 0.05-20 of least cross-entropy on all known cells (Guo et al., arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar          # takes half a second and is not always needed
    signed = np.where(y == 1, -1, 1) * logits(p)
    wrong = signed[is_known(y)]

    def cross_entropy(log_temperature):
        return np.logaddexp(0, wrong / np.exp(log_temperature)).mean()
    found = minimize_scalar(cross_entropy, bounds=np.log([0.05, 20]), method="bounded")
    return float(np.exp(found.x))


# ------------------------------------------------------------------------------------------- operating points

@undefined_is_nan
def sensitivity_at(y, level, specificity):
    """Highest sensitivity of p > t of one label with at least that specificity; NaN without both classes."""
    counts = class_counts(y, level)
    missed, right = counts.cumsum(1) / counts.sum(1, keepdims=True)
    sensitivity = np.where(right >= specificity - 1e-9, 1 - missed, 0 * right)
    return sensitivity.max()


def choose_threshold(y, p, rule):
    """The lowest score t of one label where p > t is best by `rule`: "f1", or "youden" for
    sensitivity + specificity; -0.1, below them all, if all positive is best. NaN without both classes.
    """
    scores, level = np.unique([-0.1, *p], return_inverse=True)
    counts = class_counts(y, level[1:])
    positives, negatives = totals = counts.sum(1)
    if not totals.all():
        return np.nan
    true, false = totals[:, None] - counts.cumsum(1)
    youden = true / positives - false / negatives
    f1 = true / (true + false + positives)                          # half of it
    return scores[np.argmax(f1 if rule == "f1" else youden)]


# ------------------------------------------------------------------------------------------ lists of metrics
# Names are "[paper ]metric[@threshold]"; after the values come influences where there is an interval.

def ranked(metric, y, level, rarer):
    """each_label() of a metric by ranks; influences are NaN if a class has fewer than two patients."""
    values, influences = each_label(metric, y, level)
    return values, np.where(rarer < 2, np.nan, influences)


def label_metrics(y, p, level, rarer, chosen, temperature):
    """Yields the metrics of each label of which means are taken.

    chosen: {rule: thresholds, [K]} and temperature: of validation, {} and None without.
    """
    known = is_known(y)
    negative, influence = share(y == 0, known)
    yield "auc", *ranked(ranked_auc, y, level, rarer)
    yield "paper auc", level_auc(y, level, "paper")
    yield "auprc", *ranked(average_precision, y, level, rarer)
    yield "brier", *share((p - y) ** 2 * known, known)
    yield "ece", *ece_of(y, p)
    yield "adaptive_ece", ece(y, p, adaptive=True)
    yield "always_negative_accuracy", negative, influence
    yield "random_guess_accuracy", (1 - negative) ** 2 + negative ** 2
    yield "paper random_guess_accuracy", negative
    for least in SPECIFICITIES:
        found = [sensitivity_at(*column, least) for column in zip(y.T, level.T)]
        yield f"sensitivity_at_specificity_{least:g}", found
    for t, error in zip(THRESHOLDS, calibration_error(y, p)):
        found = list(decisions(y, p, t, f"@{t:g}"))
        yield from found
        yield f"paper accuracy@{t:g}", found[-1][1].round(4)
        yield f"paper calibration_error@{t:g}", error
    for rule, t in chosen.items():
        yield f"threshold_{rule}", t
        yield from decisions(y, p, t, f"_{rule}")
    if temperature:
        yield "ece_temperature", ece(y, temper(p, temperature))


def group_metrics(people, places, y, p, level, patient, chosen):
    """Yields (places, name, values, influences) of each group of people, and of the gap between the best and
    the worst group, which has no interval: resampling adds noise to every group, hence to the gap.

    Means are over the labels that are defined in every group that has any. Of groups of fewer than LEAST
    images only the number is told.
    """
    t, suffix = (chosen["youden"], "_youden{}") if chosen else (0.5, "{}@0.5")
    groups = {}
    for group, inside in pd.get_dummies(people, people.name, "=").items():
        n = inside.sum()
        if n:
            yield WHOLE, f"images[{group}]", n
        if n >= LEAST:
            theirs = np.where(np.c_[inside], y, -1)                         # of all others nothing is known
            rarer = class_patients(theirs, patient).min(0)
            missed, alarms, *_ = decisions(theirs, p, t, suffix)
            area = "auc{}", *ranked(ranked_auc, theirs, level, rarer)
            groups[f"[{group}]"] = area, ("ece{}", *ece_of(theirs, p)), missed, alarms
    for parts in zip(*groups.values()):                                     # a metric in each group
        table = pd.DataFrame([values for _, values, _ in parts])            # [groups, K]
        shared = table.dropna(how="all").notna().all()
        kept = {place: [k for k in columns if place[1] or shared[k]] for place, columns in places.items()}
        for group, (name, *estimate) in zip(groups, parts):
            yield kept, name.format(group), *estimate
        gaps = table.max() - table.min()
        if len(parts) > 1:
            yield kept, name.format(f"_gap[{people.name}]"), gaps.where(table.count() > 1)


def single_metrics(y, p, level, rarer, answers):
    """Yields the metrics of one label, [n, 1], of which no mean is taken; an expert answers it alone."""
    yield "positives", (y == 1).sum()
    for q, referred in zip(FRACTIONS, referrals(p, level, answers)):
        yield f"oracle_auc_by_label@{q:g}", level_auc(y, referred)
    for name, curve in reliability(y, p).items():
        for place, value in enumerate(curve):
            yield f"reliability_{name}@{place / BINS:g}", value


def joint_metrics(y, p, level, rarer, answers):
    """Yields the metrics of several labels together.

    An expert answers the uncertain images (oracle), or as many at random, or they are left out (rejection).
    """
    yield "risk_coverage_area", risk_coverage_area(y, p)
    yield "always_negative_subset_accuracy", subset_accuracy(y, 0 * y, 0.5)
    known = is_known(y).all(1)
    for t in THRESHOLDS:
        yield f"subset_accuracy@{t:g}", *share(is_right(y, p, t).all(1), known)
    scored = [ranked(ranked_auc, y, referred, rarer) for referred in referrals(p, level, answers)]
    areas, influences = (mean_over_labels(np.array(part)) for part in zip(*scored))
    yield "auc_labels", np.isfinite(scored[0][0]).sum()
    slopes = np.gradient(areas, FRACTIONS)                              # what a larger share would add
    asked_for = referrals(p, False, True)
    for q, asked, area, slope, influence in zip(FRACTIONS, asked_for, areas, slopes, influences):
        n, k = len(asked), asked.sum()
        # a resample refers the same share: where it has more images above the cut, the cut moves
        yield f"oracle_auc@{q:g}", area, influence + slope * (k / n - asked[:, 0]) / n
        untouched = (n - k) * (n - k - 1) / (n * (n - 1))               # share of the pairs, at random
        yield f"random_referral_auc@{q:g}", 1 - untouched * (1 - areas[0]), untouched * influences[0]
        rejection = level_auc(np.where(asked, -1, y), level)
        yield f"rejection_auc@{q:g}", mean_over_labels(rejection)
    for q, referred in zip(FRACTIONS, referrals(p, level, answers, variant="paper")):
        yield f"paper oracle_auc@{q:g}", mean_over_labels(level_auc(y, referred), "paper")


# ---------------------------------------------------------------------------------------------- reading files

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


# One predictions file: its K labels, y int8 [n, K] (-1: unknown), p float64 [n, K], patient and path of the
# image str [n], people: sex, age band and race, a DataFrame of str by image; the file; the mark of stand-ins.
Predictions = namedtuple("Predictions", "labels y p patient path people file mark", defaults=[""])


def nih_name(label):
    """NIH's spelling of a label ("Pleural effusion": "Effusion"); a label that NIH lacks keeps its own."""
    spelt = {name.replace("_", "").lower(): name for name in NIH14}
    spelt["pleuraleffusion"] = "Effusion"
    letters = re.sub(r"[\W_]", "", label).lower()
    return spelt.get(letters, label)


def read_cells(path, cells, allowed, expected):
    """A table of text as float [n, K]. Raises InputError for the first cell that is not `allowed`."""
    numbers = cells.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    for row, k in np.argwhere(~allowed(numbers))[:1]:
        found = f"{path} row {row + 2}: {cells.columns[k]} is '{cells.iat[row, k]}'"
        raise InputError(f"{found}; expected {expected}")
    return numbers


def read_predictions(path):
    """One predictions file, checked. Raises InputError that names file, row and what was expected."""
    frame = read_csv(path, ["path", "patient"], {"path": str, "patient": str})
    truths = frame.filter(regex="^true_").replace("", "-1")
    scores = frame.filter(regex="^prob_")
    names = truths.columns.str[5:]
    for name in names.symmetric_difference(scores.columns.str[5:]):
        raise InputError(f"{path} has only one of true_{name} and prob_{name}; add the other or drop it")
    labels = names.map(nih_name)
    for label in labels[labels.duplicated()]:
        raise InputError(f"{path} has label {label} under two spellings; keep one")
    for label in labels[labels.str.contains("|", regex=False)]:
        raise InputError(f"{path} has a label '{label}'; rename it without |, which separates names")
    for row in np.flatnonzero(frame["path"].duplicated()):
        raise InputError(f"{path} row {row + 2}: image '{frame['path'][row]}' is there twice; keep one row")
    y = read_cells(path, truths, lambda cells: np.isin(cells, (-1, 0, 1)), "1, 0 or blank (unknown)")
    p = read_cells(path, scores["prob_" + names], lambda cells: (cells >= 0) & (cells <= 1),
                   "a probability from 0 to 1")
    if not any({0, 1} <= set(truth) for truth in y.T):
        raise InputError(f"{path} has no column true_<label> with both positives and negatives, so nothing "
                         "can be ranked; add images, or predict again with evaluate/predict.py")
    scored = is_known(y).any(0)
    nobody = frame["patient"].str.fullmatch(UNKNOWN)
    patient = frame["patient"].mask(nobody, "image " + frame["path"]).to_numpy(str)
    y = y[:, scored].astype(np.int8)
    p = p[:, scored]
    images = frame["path"].to_numpy(str)
    return Predictions(list(labels[scored]), y, p, patient, images, people_of(frame), path)


def people_of(frame):
    """Sex, age band and race, those that there are, NaN if unknown; "White, non-Hispanic" is White."""
    people = frame.filter(["sex", "age", "race"]).astype(str)
    people = people.replace(UNKNOWN, pd.NA, regex=True)
    if "age" in people:
        ages = pd.to_numeric(people["age"].str.rstrip("Y"), errors="coerce")        # 061Y, in DICOM
        ends = [-np.inf, *AGES.values()]
        people["age"] = pd.cut(ages, ends, labels=list(AGES))
    return people.replace({"race": RACES}, regex=True)


@lru_cache(maxsize=1)
def read_manifests(manifests):
    """people_of every image of the manifests, by path."""
    frame = pd.concat([read_csv(path, ["path"]) for path in manifests])
    people = people_of(frame).assign(path=frame["path"])
    people = people.drop_duplicates().set_index("path")
    for path in people.index[people.index.duplicated()]:
        raise InputError(f"the manifests know two people for image '{path}'; give the one that the "
                         "predictions were made from")
    if people.isna().all(axis=None):
        raise InputError(f"{manifests[0]} knows no sex, age or race of any image; leave --manifest out")
    return people


def read_mark(path):
    """The sentence "stand_in" of the facts beside a predictions file, "" without."""
    facts = path.with_suffix(".json")
    if not facts.is_file():
        return ""
    try:
        return json.loads(facts.read_text())["stand_in"] or ""
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{facts} is not predict.py's, with 'stand_in'; move it or predict again") from None


# --------------------------------------------------------------------------------------------- scoring a file

def label_sets(labels):
    """{(name, ""): columns} that means are over: 5 (at least four), 14, and all if that is another set."""
    sets = {}
    for name, members, least in (("5", STUDY5, 4), ("14", NIH14, 14), ("all", labels, 1)):
        columns = [labels.index(label) for label in members if label in labels]
        if len(columns) >= least and len(columns) not in map(len, sets.values()):
            sets[name, ""] = columns
    return sets


def by_patient(influence, patient):
    """Sum of each patient's influences, [n], over 1 - its share of the images that have any, [P].

    As if the patient was left out (jackknife), or one with most of the images would seem to agree with the
    value.
    """
    images = np.bincount(patient, influence != 0)
    rest = 1 - images / max(images.sum(), 1)
    sums = np.bincount(patient, influence)
    return sums / np.where(rest > 0, rest, 1)


def choose(validation, labels):
    """What validation predictions decide: {rule: threshold of each label, [K], NaN if they lack it}."""
    chosen = {}
    for rule in ("f1", "youden"):
        found = [choose_threshold(*column, rule) for column in zip(validation.y.T, validation.p.T)]
        chosen[rule] = pd.Series(found, validation.labels).reindex(labels).to_numpy()
    return chosen


def all_metrics(test, validation, patient, rarer, undefined):
    """Yields (places, name, values, influences if any) of every metric of a file.

    places: {(labels, label): columns of which a row holds the mean}; undefined: share of resamples, [K].
    """
    each = {("", label): [k] for k, label in enumerate(test.labels)}
    sets = label_sets(test.labels)
    level, answers = levels(test.y, test.p)
    tables = test.y, test.p, level, rarer, answers
    chosen, temperature = {}, None
    yield WHOLE, "images", len(patient)
    yield WHOLE, "patients", patient.max() + 1
    if validation:
        chosen = choose(validation, test.labels)
        temperature = fit_temperature(validation.y, validation.p)
        yield WHOLE, "temperature", temperature
    yield each, "rarer_class_patients", rarer
    yield each, "undefined_resamples", undefined
    for part in label_metrics(*tables[:4], chosen, temperature):
        yield each | sets, *part
    for metrics, places in ((joint_metrics, sets), (single_metrics, each)):
        for place, columns in places.items():
            for part in metrics(*(table[..., columns] for table in tables)):
                yield {place: [0]}, *part
    for attribute in test.people:
        yield from group_metrics(test.people[attribute], each | sets, *tables[:3], patient, chosen)


@undefined_is_nan
def score_file(run, test, validation, resamples):
    """Rows and resamples of the predictions of a run (exp, seed, dataset), with its validation or None.

    A row is the mean of the values that are defined, +- 1.96 standard errors: of AUCs those of resamples by
    ranks, elsewhere from influences, and there the means over the main label set have linear resamples. Those
    of a mean AUC are its value plus the mean change of the labels that are defined there. A label with fewer
    than two patients in a class has no resamples of its AUC; its share of a mean's error is taken to be like
    the others', which is too little.
    """
    seed = zlib.crc32(run[-1].encode())                 # of the test set's name
    patient, counts = draw_patients(test.patient, resamples, seed)
    rarer = class_patients(test.y, patient).min(0)
    drawn = pd.DataFrame(auc_draws(test.y, test.p, patient, counts))
    undefined = drawn.isna().mean()
    drawn.loc[:, rarer < 2] = np.nan
    main, _ = next(iter(label_sets(test.labels)))
    rows, ranked_draws, linear = [], {}, {}
    for places, metric, values, *influences in all_metrics(test, validation, patient, rarer, undefined):
        name, _, threshold = metric.removeprefix("paper ").partition("@")
        variant = "paper" if metric.startswith("paper") else "corrected"
        least = 0 if metric == "paper auc" else -1      # the released mean is of AUCs > 0
        values = np.atleast_1d(values)
        changes = np.full((1, len(values)), np.nan)
        if influences:
            changes = np.c_[np.apply_along_axis(by_patient, 0, *influences, patient)]
        for (labels, label), columns in places.items():
            kept = [k for k in columns if label or values[k] > least]
            value = values[kept].sum() / len(kept)
            change = mean_over_labels(changes[:, kept])
            error = np.linalg.norm(change)
            shown = name if label else MEANS.get(name, name)
            key = "|".join((labels, shown, label, threshold))
            spread = not np.isnan(value + error)
            if spread and metric == "auc":
                ranked_draws[key] = value + (drawn[kept] - values[kept]).mean(axis=1)
                error = ranked_draws[key].std(ddof=0)
            elif spread and labels == main and not UNREAD.match(shown):
                linear[key] = value, change
            place = labels, shown, variant, label, threshold
            rows.append((*run, *place, value, *interval(value, error), test.mark))
    first_order = linear_draws(*zip(*linear.values()), counts)
    draws = np.array([*ranked_draws.values(), *first_order], np.float32)
    name = "/".join(run)
    return rows, {name: draws, f"{name}/rows": np.array([*ranked_draws, *linear])}


def digest(test):
    """(file, {what: digest}) of what all runs on a test set share, in any order of rows and columns."""
    rows, columns = np.argsort(test.path), np.argsort(test.labels)
    parts = {"labels": np.sort(test.labels), "images": test.path[rows], "patients": test.patient[rows],
             "true labels": test.y[rows][:, columns]}
    return test.file, {name: zlib.crc32(part.tobytes()) for name, part in parts.items()}


def check_same(one, other):
    """Refuse two files of a test set, or their nih_val.csv, whose digests differ."""
    (path, found), (first, expected) = one, other
    for name in found:
        if found[name] != expected[name]:
            raise InputError(f"{path} and {first}, or nih_val.csv beside them, are named as of one test set "
                             f"but have other {name}; predict the same images with both, with or without "
                             "--mask, or score them one by one")


def mean_of(runs):
    """Predictions of the mean probability of several runs on the same images."""
    for run in runs:
        check_same(digest(run), digest(runs[0]))
    tables = [pd.DataFrame(run.p, run.path, run.labels) for run in runs]
    total = sum(tables).reindex_like(tables[0])                     # by image and label
    mark = max(run.mark for run in runs)
    return runs[0]._replace(p=total.to_numpy() / len(runs), mark=mark)


def read_run(path, val, args):
    """Predictions of a file and of validation, None without."""
    test, validation = read_predictions(path), None
    if args.validation or val != path and val.is_file():
        validation = read_predictions(val)
    if args.manifest:
        people = read_manifests(tuple(args.manifest))
        for image in test.path[~np.isin(test.path, people.index)]:
            raise InputError(f"{path}: image '{image}' is in no manifest; give the one that the predictions "
                             "were made from")
        test = test._replace(people=people.loc[test.path])
    return test._replace(mark=read_mark(path)), validation


def score_arm(args, arm, files):
    """score_file() of an arm's runs on a test set and their ensemble, and the digest; files: see arms_of."""
    exp, dataset = arm
    runs = {(exp, seed, dataset): read_run(*paths, args) for seed, paths in files.items()}
    tests, validations = zip(*runs.values())
    if len(files) > 1:
        validation = mean_of(validations) if all(validations) else None
        runs[f"{exp}-ensemble", "", dataset] = mean_of(tests), validation
    scored = [score_file(run, *sets, args.bootstrap) for run, sets in runs.items()]
    return scored, digest(tests[0])


# ------------------------------------------------------------------------------------------------------- main

def arms_of(args):
    """{(exp, dataset): {seed: (file, its validation file)}}, each from the flags, else its path or name."""
    arms, models = defaultdict(dict), {}
    for path in args.predictions:
        found = re.search(r"([^/]+)/predictions/seed(\d+)/([^/]+)\.csv$", path.absolute().as_posix())
        exp, seed, dataset = found.groups() if found else (path.stem, "0", "test")
        exp, seed, dataset = args.exp or exp, args.seed or seed, args.dataset or dataset
        if exp.endswith("-ensemble"):
            raise InputError(f"exp {exp} of {path} is named as the mean of runs is; give another --exp")
        val = args.validation or path.parent / "nih_val.csv"
        if models.setdefault(val, (exp, seed)) != (exp, seed) and val.is_file():
            raise InputError(f"{val} belongs to one run and would choose thresholds for others, as {path}; "
                             "give each run a folder of its own, with its nih_val.csv")
        if seed in arms[exp, dataset]:
            raise InputError(f"{path} is a second file of exp {exp}, seed {seed}, {dataset}; rename it (the "
                             "name is the arm's), or its runs to <exp>/predictions/seed<k>/<test set>.csv")
        arms[exp, dataset][seed] = path, val
    return arms


def run(args):
    """Score all runs, several at a time, and write their rows and resamples."""
    given = [path.resolve() for path in args.predictions]
    if args.out and (args.out.suffix != ".csv" or args.out.resolve() in given):
        raise InputError(f"--out {args.out} is one of the predictions or not the name of a .csv; give one, "
                         "such as metrics.csv")
    if args.bootstrap < 0 or args.workers < 1:
        raise InputError("--bootstrap must be 0 or more, --workers 1 or more")
    arms, rows, resamples, first = arms_of(args), [], {}, {}
    with ProcessPoolExecutor(args.workers, initializer=threadpool_limits, initargs=(1,)) as pool:
        apply = pool.map if args.workers > 1 else map
        results = apply(score_arm, repeat(args), arms, arms.values())
        for (_, dataset), (scored, found) in zip(arms, results):
            check_same(found, first.setdefault(dataset, found))
            for lines, draws in scored:
                rows += lines
                resamples |= draws
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` ends it without a word (a dead worker may not)
    table = pd.DataFrame(rows, columns=COLUMNS)
    if args.out:
        draws = args.out.with_name(f"{args.out.stem}.draws.npz".removeprefix("metrics."))

        def save(file):
            np.savez(file, **resamples)
            args.out.unlink(missing_ok=True)        # after a kill there is no table that has others' draws
        write(draws, save)
        write(args.out, lambda file: table.to_csv(file, index=False, float_format="%.10g"))
        print(f"{args.out}: {len(rows):,} rows of {len(args.predictions)} files; {draws.name} beside it")
    names = ["auc_mean"] if len(args.predictions) > 2 else ["auc", "auc_mean"]      # two at most: each label
    shown = table.query("metric in @names and variant == 'corrected'")
    shown = shown.drop(columns=["variant", "threshold", "stand_in"])
    print(shown.to_string(index=False, float_format="%.4f", na_rep=""))
    few = table.query("metric == 'rarer_class_patients' and value < 10")
    if len(few):
        print("fewer than 10 patients in a class, so intervals of AUC and AUPRC are too narrow or missing:",
              ", ".join(sorted(set(few["label"]))))
    for mark in sorted(set(table["stand_in"]) - {""}):
        print(f"stand-in: {mark}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, help="predictions files, of any number of runs")
    add("--out", type=Path, help="the metrics.csv to write (default: the terminal alone)")
    add("--exp", help="experiment, in place of the path's")
    add("--seed", help="seed of the run, in place of the path's")
    add("--dataset", help="name of the test set, in place of the path's")
    add("--bootstrap", type=int, default=2000, help="resamples of patients (2000); 0: no intervals of AUC")
    add("--validation", type=Path, help="validation predictions (default: nih_val.csv beside a file)")
    add("--manifest", nargs="+", type=Path, default=[], help="manifests with sex, age and race of the images")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.error = fail                 # one sentence, like every other mistake
    try:
        run(parser.parse_args())
    except InputError as mistake:
        fail(mistake)
    except BrokenProcessPool:
        fail("a worker was killed, as happens where memory is short; give fewer --workers")


if __name__ == "__main__":
    main()
