"""Score prediction files: every metric of the study, as the paper computed it and as the textbook defines it."""

import sys
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import ndtr, ndtri


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --- begin copy: metric definitions ---
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
    for k in range(y.shape[1]):
        positive, negative = p[y[:, k] == 1, k], np.sort(p[y[:, k] == 0, k])
        if len(positive) and len(negative):
            twice = np.searchsorted(negative, positive) + np.searchsorted(negative, positive, "right")
            values[k] = twice.sum() / (2 * len(positive) * len(negative))
        elif variant == "paper" and not len(positive):
            values[k] = 0.0
    return values


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


def oracle_auc(y, p, fractions, variant="corrected", how="replace"):
    """AUC per label, float [Q, K], after an expert saw the most uncertain images; the share seen, float [Q].

    For each fraction q the floor(n q) images of smallest u = mean over labels of |p - 0.5|, in stable order
    of (u, row), take their true labels as probabilities; how="drop" leaves them out (rejection). "corrected"
    starts each q from the untouched p, "paper" from what the q before left, so that its referrals add up.
    """
    values, shares, referred, order = [], [], np.zeros(len(p), bool), None
    for q in fractions:
        if variant == "paper" or order is None:
            u = np.abs(np.where(referred[:, None], y, p) - 0.5).mean(1)
            order = np.argsort(u, kind="stable")
        if variant == "corrected":
            referred = np.zeros(len(p), bool)
        referred[order[:int(len(p) * q)]] = True
        kept = ~referred if how == "drop" else slice(None)
        values.append(auc(y[kept], np.where(referred[:, None], y, p)[kept], variant))
        shares.append(referred.mean())
    return np.array(values), np.array(shares)


@lru_cache(maxsize=8)
def resample_counts(size, resamples, seed):
    """How often each of `size` units is drawn in every bootstrap resample, uint8 [B, size], read-only."""
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(resamples)]
    draws = np.array(draws, np.uint8).reshape(resamples, size)
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
    between a row and the one before (a tie: half here, half in the next), by patient: a resample costs one
    sparse product and one cumulative sum. Weights are counts: float32 adds them exactly up to 2^23 images.
    """
    maps, values = [], np.full((len(draws), y.shape[1]), np.nan)
    for k in range(y.shape[1]):
        positive, negative = y[:, k] == 1, y[:, k] == 0
        score, order = p[positive, k], np.sort(p[negative, k])
        outranked = np.searchsorted(order, score) + np.searchsorted(order, score, "right")
        _, first, row = np.unique(outranked, return_index=True, return_inverse=True)
        next_row = [np.searchsorted(score[first], p[negative, k], side) for side in ("left", "right")]
        halves, doubled = np.full(2 * negative.sum(), 0.5, np.float32), np.tile(patient[negative], 2)
        step = csr_matrix((halves, (np.concatenate(next_row), doubled)), (len(first) + 1, draws.shape[1]))
        ones = np.ones(len(score), np.float32)
        maps.append((step, csr_matrix((ones, (row, patient[positive])), (len(first), draws.shape[1]))))
    for start in range(0, len(draws), chunk):
        weight = draws[start:start + chunk].T.astype(np.float32, order="C")     # [P, b]
        for k, (step, at) in enumerate(maps):
            below, at = step @ weight, at @ weight                              # [rows + 1, b], [rows, b]
            np.cumsum(below, axis=0, out=below)
            ordered = np.einsum("ij,ij->j", at, below[:-1], dtype=np.float64)
            with np.errstate(invalid="ignore"):
                values[start:start + chunk, k] = ordered / (at.sum(0, dtype=np.float64) * below[-1])
    return values


def sum_draws(columns, patient, draws, chunk=128):
    """Column sums of every resample, float [B, M], for columns float [n, M]: rates are ratios of such sums."""
    shape, images = (draws.shape[1], len(patient)), np.arange(len(patient))
    by_patient = csr_matrix((np.ones(len(patient)), (patient, images)), shape) @ columns
    sums = np.empty((len(draws), columns.shape[1]))
    for start in range(0, len(draws), chunk):
        sums[start:start + chunk] = draws[start:start + chunk].astype(float) @ by_patient
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
    return tuple(np.quantile(draws, tails))
# --- end copy: metric definitions ---
