"""evaluate/metrics.py against scikit-learn, SciPy, hand-worked cases, loops, and the published runs."""

import itertools
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from conftest import ROOT, assert_user_error, load_script, run_script

m = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
FIVE = list(m.STUDY5)
few = settings(deadline=None, max_examples=40, derandomize=True)
scores = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=30)   # with many ties


def sample(n, labels, patients=None, decimals=3, seed=0, prevalence=0.3):
    """Labels, informative scores with ties, and patients with several images."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, labels)) < prevalence).astype(int)
    p = 1 / (1 + np.exp(1 - y - rng.normal(size=y.shape)))
    return y, p.round(decimals), rng.integers(patients or n, size=n).astype(str)


# ------------------------------------------------------------------------------------------------- ranking

@few
@given(scores)
def test_auc_is_the_share_of_ordered_pairs_and_sklearns(rows):
    y, p = np.array(rows).T
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    if pairs:
        assert m.auc(y, p / 8) == pytest.approx(np.mean(pairs), abs=1e-12)
        assert m.auc(y, p / 8) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    else:
        assert np.isnan(m.auc(y, p / 8))


def test_auc_by_hand():
    y = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    p = np.array([[0.9, 0.1, 0.5], [0.5, 0.2, 0.5], [0.5, 0.3, 0.5], [0.1, 0.4, 0.5]])
    np.testing.assert_array_equal(m.auc(y, p), [3.5 / 4, np.nan, 0.5])
    np.testing.assert_array_equal(m.auc(y, p, "paper"), [3.5 / 4, 0, 0.5])
    assert np.isnan(m.auc(np.ones(3), np.arange(3) / 3, "paper"))          # no negatives: skipped, not 0


def test_a_score_that_is_nan_has_no_auc():
    y, p = np.array([0, 1, 1, 0]), np.array([0.1, np.nan, 0.3, 0.4])
    for call in (m.auc, m.auc_interval, lambda y, p: m.delong(y, np.ones(4), p)):
        with pytest.raises(ValueError, match="NaN"):
            call(y, p)
    for call in (m.auc, lambda y, p: m.oracle_auc(y, p, (0.5,))):
        with pytest.raises(ValueError, match="NaN"):
            call(np.c_[y, y], np.c_[y, p])


def test_paper_mean_leaves_out_a_truly_inverted_label_and_corrected_keeps_it():
    y, p = np.array([[1, 1, 0], [0, 0, 0]]), np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]])
    assert m.mean_over_labels(m.auc(y, p, "paper"), "paper") == 1
    assert m.mean_over_labels(m.auc(y, p)) == 0.5
    assert np.isnan(m.mean_over_labels(np.array([np.nan, np.nan])))


@few
@given(scores)
def test_average_precision_and_sensitivity_at_specificity_are_sklearns(rows):
    y, p = np.array(rows).T
    area, _ = m.average_precision(y, m.ranks(p))
    assert area == pytest.approx(sk.average_precision_score(y, p)) if y.any() else np.isnan(area)
    if y.any() and not y.all():
        fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False)
        for specificity in (0.5, 0.9, 0.95, 1):
            best = tpr[1 - fpr >= specificity - 1e-9].max()
            assert m.sensitivity_at(y, p, specificity) == pytest.approx(best)
    else:
        assert np.isnan(m.sensitivity_at(y, p, 0.9))


@pytest.mark.parametrize("patients", [None, 15])
def test_auc_interval_is_the_auc_and_its_delong_error(patients):
    y, p, patient = sample(60, 1, patients or 60, decimals=1, seed=3)
    y, p, cluster = y[:, 0], p[:, 0], np.arange(60) if patients is None else patient
    areas, variance = variance_by_pairs(y, [p, np.full(60, 0.5)], cluster)     # the second is constant
    value, low, high = m.auc_interval(y, p, None if patients is None else patient)
    assert value == pytest.approx(sk.roc_auc_score(y, p))
    assert (high - low) / 2 == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(variance), rel=1e-6)
    assert np.isnan(m.auc_interval(np.zeros(4), np.arange(4) / 4)).all()
    assert np.isnan(m.auc_interval([1, 0, 0], [0.9, 0.1, 0.2])[1:]).all()      # one positive: no spread
    perfect = m.auc_interval([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert perfect[0] == 1 and np.isnan(perfect[1:]).all()                     # nor between these


# ----------------------------------------------------------------------------------------------- decisions

def test_decisions_are_strictly_above_the_threshold():
    y, p = np.array([[1], [0]]), np.array([[0.3], [0.3]])
    assert m.fnr(y, p, 0.3)[0] == 1 and m.fnr(y, p, 0.29)[0] == 0
    assert m.mean_accuracy(y, p, 0.3) == m.subset_accuracy(y, p, 0.3) == 0.5


def test_rates_are_sklearns():
    y, p, _ = sample(200, 3)
    for k, threshold in enumerate((0.2, 0.5, 0.7)):
        truth, flagged = y[:, k], p[:, k] > threshold
        found = {name: value for name, value, _ in m.decisions(truth, p[:, k], threshold, "")}
        assert found["fnr"] == pytest.approx(1 - sk.recall_score(truth, flagged))
        assert found["fpr"] == pytest.approx(1 - sk.recall_score(1 - truth, ~flagged))
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, flagged))
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, flagged))
    assert m.subset_accuracy(y, p, 0.5) == sk.accuracy_score(y, p > 0.5)
    assert m.mean_accuracy(y, p, 0.5) == pytest.approx(((p > 0.5) == y).mean())
    np.testing.assert_allclose(m.fnr(y, p, 0.5), 1 - sk.recall_score(y, p > 0.5, average=None))


def test_paper_mean_accuracy_rounds_each_label_first():
    y, p = np.zeros((3, 2), int), np.array([[0.9, 0.9], [0.1, 0.9], [0.1, 0.1]])
    assert m.mean_accuracy(y, p, 0.5, "paper") == (0.6667 + 0.3333) / 2
    assert m.mean_accuracy(np.eye(3, 1, dtype=int), np.zeros((3, 1)), 0.5, "paper") == 0.6667
    assert m.mean_accuracy(np.eye(3, 1, dtype=int), np.zeros((3, 1)), 0.5) == 2 / 3


def test_fnr_mean_keeps_a_label_without_misses_and_drops_one_without_positives():
    y, p = np.array([[1, 1, 0], [1, 0, 0]]), np.array([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1]])
    np.testing.assert_array_equal(m.fnr(y, p, 0.5), [0, 1, np.nan])
    assert m.mean_over_labels(m.fnr(y, p, 0.5)) == 0.5


@few
@given(scores)
def test_chosen_thresholds_are_the_best_of_all_scores(rows):
    y, p = np.array(rows).T
    if y.min() == y.max():
        assert np.isnan(m.choose_threshold(y, p, "f1")) and np.isnan(m.choose_threshold(y, p, "youden"))
        return
    def gain(rule, t):
        if rule == "f1":
            return sk.f1_score(y, p > t, zero_division=0)
        return sk.balanced_accuracy_score(y, p > t)
    for rule in ("f1", "youden"):
        best = max(gain(rule, t) for t in [*p, -1])                         # -1: all are positive
        assert gain(rule, m.choose_threshold(y, p / 8, rule) * 8) == pytest.approx(best)


def test_risk_coverage_area_is_the_mean_risk_of_the_most_certain():
    y, p, _ = sample(50, 3, decimals=1)
    certain = sorted(range(50), key=lambda i: (-np.abs(p[i] - 0.5).mean(), i))
    wrong = (p > 0.5) != y
    risks = [wrong[certain[:c]].mean() for c in range(1, 51)]
    assert m.risk_coverage_area(y, p) == pytest.approx(np.mean(risks), abs=1e-12)


# --------------------------------------------------------------------------------------------- calibration

def calibration_error_as_written(y, p, threshold):
    """The released definition, bin by bin, one label."""
    total, unassigned = 0.0, np.ones(len(p), bool)
    confidence = np.abs(p - 0.5)
    right = (p > threshold) == (y == 1)
    for lower in np.linspace(0, 0.5, 16)[:-1]:
        inside = unassigned & (confidence >= lower) & (confidence < lower + 1 / 15)
        unassigned &= ~inside
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean()) / len(p)
    assert not unassigned.any()
    return total


@pytest.mark.parametrize("decimals", [1, 2, 8])            # coarse scores lie on the edges of bins
def test_paper_calibration_error_equals_the_loop_as_written(decimals):
    y, p, _ = sample(400, 3, decimals=decimals)
    p[:2] = [[0], [1]]
    expected = [[calibration_error_as_written(y[:, k], p[:, k], t) for k in range(3)] for t in m.THRESHOLDS]
    np.testing.assert_allclose(m.calibration_error(y, p), expected, atol=1e-12)


def test_first_bin_of_the_paper_calibration_error_is_twice_as_wide():
    wrong_then_right = np.array([[0.51], [0.55]])    # confidence 0.01 and 0.05, below 1/15
    expected = abs((0.01 + 0.05) / 2 - 1 / 2)
    assert m.calibration_error(np.array([[0], [1]]), wrong_then_right, [0.5])[0, 0] == pytest.approx(expected)


def test_paper_calibration_error_is_large_for_a_perfect_classifier():
    y = np.array([[0], [1]] * 50)
    assert m.calibration_error(y, y * 0.98 + 0.01, [0.5])[0, 0] == pytest.approx(0.51)
    assert m.ece(y, y * 0.98 + 0.01)[0] == pytest.approx(0.01)


def test_ece_and_reliability_are_sklearns_calibration_curve():
    y, p, _ = sample(500, 1)
    count, predicted, observed = m.reliability(y[:, 0], p[:, 0]).values()
    true, mean = calibration_curve(y[:, 0], p[:, 0], n_bins=15)
    np.testing.assert_allclose(observed[count > 0], true)
    np.testing.assert_allclose(predicted[count > 0], mean)
    weight = count[count > 0] / 500
    assert m.ece(y, p)[0] == pytest.approx((weight * np.abs(true - mean)).sum())


def test_adaptive_ece_has_bins_of_equal_count():
    y, p, _ = sample(152, 2, decimals=1)
    for k in range(2):
        order = np.argsort(p[:, k], kind="stable")
        cells = [order[np.arange(152) * 15 // 152 == b] for b in range(15)]
        gaps = [len(cell) * abs(p[cell, k].mean() - y[cell, k].mean()) / 152 for cell in cells]
        assert m.ece(y, p, adaptive=True)[k] == pytest.approx(sum(gaps))


def test_the_temperature_is_that_of_a_logistic_regression_where_a_sure_cell_is_wrong():
    rng = np.random.default_rng(5)
    y = np.repeat([0.0, 1.0], 200)
    p = np.clip(0.3 + 0.4 * y + rng.normal(0, 0.15, 400), 0.01, 0.99)
    p[0] = 1.0                                                      # sure, and wrong
    x = special.logit(np.clip(p, 1e-8, 1 - 1e-8))[:, None]
    fit = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(x, y)
    assert m.fit_temperature(y[:, None], p[:, None]) == pytest.approx(1 / fit.coef_.item(), rel=1e-4)


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 2)) - 1
    y = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(int)
    p = 1 / (1 + np.exp(-3 * logits))
    fitted = m.fit_temperature(y, p)
    losses = {t: sk.log_loss(y.ravel(), m.temper(p, t).ravel())
              for t in (fitted - 0.03, fitted, fitted + 0.03)}
    assert min(losses, key=losses.get) == fitted and fitted == pytest.approx(3, rel=0.05)
    assert m.ece(y, m.temper(p, fitted)).max() < 0.02 < m.ece(y, p).min()
    np.testing.assert_allclose(m.temper(p, 1), p, atol=1e-8)


# ----------------------------------------------------------------------------------------------- referral

def oracle_by_hand(y, p, fractions, cumulative):
    """Referral image by image: sorted by (uncertainty, row), true labels put in their place."""
    values, shares, now = [], [], p.copy()
    for q in fractions:
        now = now if cumulative else p.copy()
        for i in sorted(range(len(p)), key=lambda i: (np.abs(now[i] - 0.5).mean(), i))[:int(len(p) * q)]:
            now[i] = y[i]
        values.append([sk.roc_auc_score(y[:, k], now[:, k]) for k in range(y.shape[1])])
        shares.append((now == y).all(1).mean())
    return values, shares


@pytest.mark.parametrize("decimals", [1, 6])
def test_oracle_auc_equals_referral_image_by_image(decimals):
    y, p, _ = sample(202, 5, decimals=decimals)
    p = p.clip(0.01, 0.99)
    for variant in ("paper", "corrected"):
        values, shares = m.oracle_auc(y, p, m.FRACTIONS, variant)
        expected = oracle_by_hand(y, p, m.FRACTIONS, variant == "paper")
        np.testing.assert_allclose(values, expected[0], atol=1e-12)
        np.testing.assert_allclose(shares, expected[1], atol=1e-12)


def test_nominal_fractions_of_202_images_add_up_in_the_paper():
    y, p, _ = sample(202, 5)
    for variant, images in (("paper", [0, 10, 30, 60, 100, 150]), ("corrected", [0, 10, 20, 30, 40, 50])):
        shares = m.oracle_auc(y, p.clip(0.01, 0.99), m.FRACTIONS, variant)[1]
        np.testing.assert_array_equal(np.round(shares * 202), images)


def test_answers_tie_with_images_that_were_certain_of_the_other_class():
    y, p = np.array([[1, 1, 0, 0, 0, 1]]).T, np.array([[0.0, 0.5, 1.0, 0.5, 0.2, 1.0]]).T
    areas, shares = m.oracle_auc(y, p, [seen / 6 for seen in range(7)])
    for seen in range(7):
        order, now = np.argsort(np.abs(p[:, 0] - 0.5), kind="stable"), p.copy()
        now[order[:seen]] = y[order[:seen]]
        assert shares[seen] == seen / 6
        assert areas[seen, 0] == pytest.approx(sk.roc_auc_score(y, now), abs=1e-12)


def test_floating_point_never_refers_one_image_too_few():
    fractions = ("0.05", "0.1", "0.15", "0.2", "0.25")
    for n in range(1, 40_000, 7):
        seen = m.images_seen(n, [float(q) for q in fractions])
        assert seen.tolist() == [n * Fraction(q) // 1 for q in fractions]


# ---------------------------------------------------------------------------------------------- resampling

@pytest.mark.parametrize("n, patients, decimals",
                         [(300, 80, 2), (60, 20, 8), (40, 6, 1), (5, 1, 1), (1, 1, 1)])
def test_weighted_ranks_equal_the_naive_loop_over_resamples(n, patients, decimals):
    y, p, patient = sample(n, 3, patients, decimals, seed=n)
    index, draws = m.draw_patients(patient, 150)
    fast = m.auc_draws(y, p, index, draws, chunk=64)
    for draw, values in zip(draws, fast):
        rows = np.concatenate([np.flatnonzero(index == i) for i in np.repeat(np.arange(len(draw)), draw)])
        np.testing.assert_allclose(values, m.auc(y[rows], p[rows]), rtol=0, atol=1e-12)     # NaN where NaN


@pytest.mark.parametrize("times, decimals", [(1, 0), (60, 8), (250, 0), (250, 8)])    # 16 bits and more
def test_drawing_every_patient_as_often_changes_nothing(times, decimals):
    y, p, patient = sample(700, 2, 90, decimals)
    index, draws = m.draw_patients(patient, 3)
    found = m.auc_draws(y, p, index, np.full_like(draws, times))
    np.testing.assert_allclose(found, [m.auc(y, p)] * 3, rtol=0, atol=1e-12)


def test_a_resample_draws_as_many_patients_as_there_are_whatever_the_order_of_the_rows():
    _, _, patient = sample(100, 1, 30)
    index, draws = m.draw_patients(patient, 50)
    assert (draws.sum(1) == len(set(patient))).all() and draws.shape == (50, len(set(patient)))
    shuffled = np.random.default_rng(0).permutation(100)
    other, again = m.draw_patients(patient[shuffled], 50)
    np.testing.assert_array_equal(other, index[shuffled])
    np.testing.assert_array_equal(again, draws)
    assert not np.array_equal(m.draw_patients(patient, 50, seed=1)[1], draws)


def test_repeating_every_image_of_a_patient_tells_the_bootstrap_nothing_new():
    y, p, patient = sample(80, 2, 40)
    once = m.auc_draws(y, p, *m.draw_patients(patient, 100))
    index, draws = m.draw_patients(np.repeat(patient, 4), 100)
    four_times = m.auc_draws(np.repeat(y, 4, 0), np.repeat(p, 4, 0), index, draws)
    np.testing.assert_allclose(four_times, once, atol=1e-12)


def test_bootstrap_error_of_the_auc_is_delongs_where_images_are_independent():
    y, p, patient = sample(600, 1, decimals=8)
    index, draws = m.draw_patients(np.arange(600), 4000)
    _, influence = m.ranked_auc(y[:, 0], m.ranks(p[:, 0]))
    assert m.auc_draws(y, p, index, draws).std() == pytest.approx(np.sqrt((influence ** 2).sum()), rel=0.05)


def test_test_set_of_the_study_is_resampled_a_thousand_times_in_seconds():
    y, p, patient = sample(25_596, 14, 2797, decimals=8, prevalence=0.08)
    start = time.process_time()
    index, draws = m.draw_patients(patient, 1000)
    values = m.auc_draws(y, p, index, draws)
    assert time.process_time() - start < 10             # 0.5 s on an idle core
    assert values.shape == (1000, 14)
    rows = np.concatenate([np.flatnonzero(index == i) for i in np.repeat(np.arange(2797), draws[7])])
    np.testing.assert_allclose(values[7], m.auc(y[rows], p[rows]), rtol=0, atol=1e-12)


def resampled(y, p, patient, counts):
    """{metric: its value in every resample}, each computed anew on the drawn images."""
    values = {}
    for draw in counts:
        rows = np.repeat(np.arange(len(y)), draw[patient])
        yy, pp = y[rows], p[rows]
        here = {
            "auprc": sk.average_precision_score(yy, pp, average="macro"),
            "ece": m.ece(yy, pp).mean(),
            "brier": ((pp - yy) ** 2).mean(),
            "fnr|0.3": (1 - sk.recall_score(yy, pp > 0.3, average=None)).mean(),
            "fpr|0.3": (1 - sk.recall_score(1 - yy, pp <= 0.3, average=None)).mean(),
            "mean_accuracy|0.3": ((pp > 0.3) == yy).mean(),
            "subset_accuracy|0.3": sk.accuracy_score(yy, pp > 0.3),
        }
        for q, area in zip((0.1, 0.25), m.oracle_auc(yy, pp, (0.1, 0.25))[0]):
            here[f"oracle_auc|{q}"] = area.mean()
        for name, value in here.items():
            values.setdefault(name, []).append(value)
    return values


def scored(y, p, patient, resamples):
    """Rows and resamples, {key: values}, of a run named exp 1, seed 0, here."""
    labels, images = list("ABC"[:y.shape[1]]), np.arange(len(y)).astype(str)
    people = m.people_of(pd.DataFrame(index=range(len(y))))
    test = m.Predictions(labels, y.astype(np.int8), p, patient, images, people, "here.csv")
    rows, draws = m.score_file(("1", "0", "here"), test, None, resamples)
    return pd.DataFrame(rows, columns=m.COLUMNS), dict(zip(draws["1/0/here/rows"], draws["1/0/here"]))


def test_first_order_resamples_are_those_of_the_naive_bootstrap():
    """Within the second order; 1,000 resamples tell a spread to 2 %, bins of the ECE are the least smooth."""
    y, p, patient = sample(600, 3, 300, 6, seed=4)
    _, draws = scored(y, p, patient, 1000)
    index, counts = m.draw_patients(patient, 1000, m.zlib.crc32(b"here"))
    found = {"|".join(filter(None, name.split("|")[1:])): row for name, row in draws.items()
             if name.startswith("all")}
    for name, expected in resampled(y, p, index, counts).items():
        tight = name != "ece"
        assert np.std(found[name]) == pytest.approx(np.std(expected), rel=0.12 if tight else 0.4), name
        assert np.corrcoef(found[name], expected)[0, 1] > (0.93 if tight else 0.6), name


def interval(rows, metric, label="", threshold=""):
    """(value, ci_low, ci_high) of a row."""
    kept = rows[(rows.metric == metric) & (rows.label == label) & (rows.threshold == threshold)
                & (rows.variant == "corrected")]
    assert len(kept) == 1
    return kept[["value", "ci_low", "ci_high"]].to_numpy(float)[0]


def test_resamples_of_a_mean_add_the_mean_change_of_the_labels_that_are_defined_there():
    y, p, patient = sample(90, 3, seed=1)
    y[:, 2], p[:, :2], p[:, 2] = 0, 0.4 + 0.02 * y[:, :2] + 0.2 * p[:, :2], 0.1 * p[:, 2]
    y[:2, 2], p[:2, 2] = 1, 0.9                                   # two positives, far better than the others
    rows, draws = scored(y, p, np.arange(90).astype(str), 200)
    _, counts = m.draw_patients(np.arange(90).astype(str), 200, m.zlib.crc32(b"here"))
    areas, dropped = [sk.roc_auc_score(y[:, k], p[:, k]) for k in range(3)], 0
    for draw, found in zip(counts, draws["all|auc_mean||"]):
        images = np.repeat(np.arange(90), draw[np.argsort(np.argsort(np.arange(90).astype(str)))])
        here = [k for k in range(3) if 0 < y[images, k].sum() < len(images)]
        dropped += len(here) < 3
        changes = [sk.roc_auc_score(y[images, k], p[images, k]) - areas[k] for k in here]
        assert found == pytest.approx(np.mean(areas) + np.mean(changes), abs=1e-6)
    assert dropped > 10
    (_, low, high), (_, lower, upper) = interval(rows, "auc_mean"), interval(rows, "oracle_auc", "", "0")
    assert high - low == pytest.approx(upper - lower, rel=0.15)   # one number, by ranks and to first order


def test_a_label_with_one_patient_in_a_class_has_values_without_intervals(monkeypatch, tmp_path, capsys):
    path = run_folder(tmp_path) / "here.csv"
    number = np.arange(120) // 6                                  # of the patient, six images each
    frame = predictions(path, ["A", "B"]).assign(patient=number, sex=["F", "M"] * 60)
    frame["true_B"] = (number == 0).astype(int)                   # one patient has all positives
    frame.loc[frame.sex == "F", "true_A"] = (number[::2] == 1).astype(int)
    frame.to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    assert "too narrow or missing: B" in capsys.readouterr().out
    assert cell(table, "auc", label="B") == pytest.approx(sk.roc_auc_score(frame.true_B, frame.prob_B))
    assert cell(table, "rarer_class_patients", label="B") == 1
    # 20 patients drawn anew lack a given one in (19 / 20)^20 of the cases: 0.36, of 50 with an sd of 0.07
    assert cell(table, "undefined_resamples", label="B") == pytest.approx(0.95 ** 20, abs=0.2)
    blank = table[(table.ci_low == "") & (table.value != "") & table.metric.str.match(r"(auc|auprc)(\[|$)")
                  & (table.variant == "corrected")]
    assert set(zip(blank.metric, blank.label)) == {
        ("auc", "B"), ("auprc", "B"), ("auc[sex=F]", "A"), ("auc[sex=F]", "B"), ("auc[sex=M]", "B"),
        ("auc[sex=F]", "")}
    assert "|auc|A|" in (drawn := read_draws(tmp_path, "3.4/0/here")) and "|auc|B|" not in drawn
    change = drawn["all|auc_mean||"] - cell(table, "auc_mean")    # as if B erred as A does
    np.testing.assert_allclose(change, drawn["|auc|A|"] - cell(table, "auc", label="A"), atol=1e-6)
    frame.drop(columns=["true_A", "prob_A"]).to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    ranked = table[table.metric.isin(["auc", "auc_mean", "auprc", "oracle_auc", "random_referral_auc"])]
    assert set(ranked.ci_low) == {""} and "" not in set(ranked.value)


@pytest.mark.parametrize("most", [2, 60, 200, 240])
def test_intervals_are_as_wide_as_leaving_out_each_patient_changes_a_share(most):
    y, p, _ = sample(240, 2, seed=8)
    patient = np.array(["most"] * most + [f"{i // 2}" for i in range(240 - most)])
    y[::7, 1] = -1                                                # unknown
    rows, _ = scored(y, p, patient, 9)

    def subset(kept):
        known = kept & (y != -1).all(1)
        return sk.accuracy_score(y[known], p[known] > 0.3)

    def missed(kept):
        return 1 - sk.recall_score(y[kept, 0], p[kept, 0] > 0.3)
    everybody = np.full(240, True)
    for found, metric in ((interval(rows, "subset_accuracy", "", "0.3"), subset),
                          (interval(rows, "fnr", "A", "0.3"), missed)):
        value, low, high = found
        assert value == pytest.approx(metric(everybody))
        if most == 240:
            assert np.isnan(low) and np.isnan(high)               # one patient tells nothing
            continue
        changes = [metric(patient != one) - value for one in set(patient)]
        margin = stats.norm.ppf(0.975) * np.linalg.norm(changes)
        assert low == pytest.approx(max(value - margin, 0)) and high == pytest.approx(min(value + margin, 1))


def test_referring_at_random_is_the_mean_over_all_choices():
    y, p = np.array([[1, 0, 1, 0, 0, 1, 0]]).T, np.array([[0.9, 0.6, 0.3, 0.2, 0.8, 0.7, 0.1]]).T
    rows, _ = scored(y, p, np.arange(7).astype(str), 9)
    found = rows[rows.metric == "random_referral_auc"].set_index("threshold").value
    values = []
    for chosen in itertools.combinations(range(7), 1):                # floor(7 * 0.25) = 1
        now = p.copy()
        now[list(chosen)] = y[list(chosen)]
        values.append(sk.roc_auc_score(y[:, 0], now[:, 0]))
    assert found["0.25"] == pytest.approx(np.mean(values))
    assert found["0.1"] == pytest.approx(sk.roc_auc_score(y[:, 0], p[:, 0]))


def test_influence_is_the_change_of_auc_and_auprc_with_an_images_weight():
    y, p, _ = sample(40, 1, decimals=1)
    y, p = y[:, 0], p[:, 0]
    for i in range(40):
        weight = np.ones(40)
        weight[i] += 1e-6
        slope = (sk.roc_auc_score(y, p, sample_weight=weight) - sk.roc_auc_score(y, p)) / 1e-6
        assert m.ranked_auc(y, m.ranks(p))[1][i] == pytest.approx(slope, abs=1e-5)
        slope = (
            sk.average_precision_score(y, p, sample_weight=weight) - sk.average_precision_score(y, p)
        ) / 1e-6
        assert m.average_precision(y, m.ranks(p))[1][i] == pytest.approx(slope, abs=1e-5)


# ---------------------------------------------------------------------------------------------- statistics

def order(a, b):
    return (a > b) + 0.5 * (a == b)


def variance_by_pairs(y, models, cluster):
    """Obuchowski's covariance of two AUCs from sums over all pairs, one cluster after the other."""
    positive, negative, names = np.flatnonzero(y == 1), np.flatnonzero(y == 0), sorted(set(cluster))
    ten, one, areas = [], [], []
    for p in models:
        table = np.array([[order(p[i], p[j]) for j in negative] for i in positive])
        areas.append(table.mean())
        table = table - areas[-1]
        ten.append([sum(row.mean() for row, i in zip(table, positive) if cluster[i] == c) for c in names])
        one.append([sum(row.mean() for row, j in zip(table.T, negative) if cluster[j] == c) for c in names])
    ten, one, size = np.array(ten), np.array(one), len(names)
    m10, m01 = len(set(cluster[positive])), len(set(cluster[negative]))
    s10, s01 = m10 / (m10 - 1) / len(positive) * ten @ ten.T, m01 / (m01 - 1) / len(negative) * one @ one.T
    s11 = size / (size - 1) * ten @ one.T
    covariance = s10 / len(positive) + s01 / len(negative) + (s11 + s11.T) / (len(positive) * len(negative))
    return areas, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]


@pytest.mark.parametrize("patients", [None, 15])
def test_delong_equals_the_sums_over_pairs(patients):
    y, p, patient = sample(60, 2, patients or 60, decimals=1, seed=3)
    y, cluster = y[:, 0], np.arange(60) if patients is None else patient
    areas, variance = variance_by_pairs(y, p.T, cluster)
    found = m.delong(y, p[:, 0], p[:, 1], None if patients is None else patient)
    assert found["difference"] == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert found["se"] == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(found["difference"] / found["se"])))


def test_independent_delong_is_the_covariance_of_the_placements():
    y, p, _ = sample(80, 2, decimals=2, seed=5)
    y = y[:, 0]
    ten = [[np.mean([order(a, b) for b in q[y == 0]]) for a in q[y == 1]] for q in p.T]
    one = [[np.mean([order(a, b) for a in q[y == 1]]) for b in q[y == 0]] for q in p.T]
    covariance = np.cov(ten) / (y == 1).sum() + np.cov(one) / (y == 0).sum()
    expected = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert m.delong(y, *p.T)["se"] == pytest.approx(expected, rel=1e-9)


def test_clustered_delong_sees_through_repeated_images():
    y, p, patient = sample(80, 2, decimals=2, seed=5)
    alone = m.delong(y[:, 0], *p.T)["se"]
    y, p, patient = np.repeat(y[:, 0], 4), np.repeat(p, 4, 0), np.repeat(np.arange(80), 4)
    assert m.delong(y, *p.T, patient)["se"] == pytest.approx(alone, rel=1e-9)
    assert m.delong(y, *p.T)["se"] == pytest.approx(alone / 2, rel=0.02)


def test_delong_where_nothing_can_be_told():
    y, p = np.array([1, 0, 0, 1]), np.array([0.9, 0.2, 0.3, 0.4])
    assert m.delong(y, p, p)["p"] == 1 and m.delong(y, p, p)["difference"] == 0
    assert np.isnan(m.delong(np.array([1, 0, 0]), p[:3], p[1:])["p"])      # one positive: no variance
    assert np.isnan(m.delong(y, y * 0.5, np.full(4, 0.5))["p"])            # neither varies: 1 against 1/2
    with pytest.raises(ValueError, match="positives and negatives"):
        m.delong(np.zeros(4, int), p, p)


# --------------------------------------------------------------------------------- the study's published runs

def test_published_means_are_means_over_the_labels_with_an_auc_above_zero():
    runs = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"classes": str}).pivot(
        index=["exp", "seed", "testset", "classes"], columns="label", values="auc")
    labels = runs.drop(columns="mean").to_numpy()
    without_edema = runs.index.get_level_values("testset").isin(["vindr_test", "padchest"])
    np.testing.assert_array_equal((labels == 0).any(1), without_edema)
    np.testing.assert_allclose(m.mean_over_labels(labels, "paper"), runs["mean"], atol=6e-5)  # of 4 decimals


# ---------------------------------------------------------------------------------------------- the command

def predictions(path, labels=FIVE, n=120, patients=60, seed=0, score_seed=None, **columns):
    """Write a predictions file; returns its DataFrame. score_seed: other scores for the same images."""
    y, p, patient = sample(n, len(labels), patients, 6, seed)
    if score_seed is not None:
        noise = np.random.default_rng(score_seed).normal(size=y.shape)
        p = (1 / (1 + np.exp(1 - y - noise))).round(6)
    frame = pd.DataFrame({"path": [f"images/{i:04d}.png" for i in range(n)], "patient": patient,
                          **{f"true_{label}": y[:, k] for k, label in enumerate(labels)},
                          **{f"prob_{label}": p[:, k] for k, label in enumerate(labels)}, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return frame


def run_folder(root, exp="3.4", seed=0):
    return root / "runs" / exp / "predictions" / f"seed{seed}"


def command(monkeypatch, tmp_path, *args, bootstrap=50):
    """Run main() here; returns metrics.csv with every cell as text."""
    out = tmp_path / "metrics.csv"
    argv = ["metrics.py", "--out", str(out), "--bootstrap", str(bootstrap), "--workers", "1", *map(str, args)]
    monkeypatch.setattr(sys, "argv", argv)
    m.main()
    return pd.read_csv(out, dtype=str, keep_default_na=False)


def cell(table, metric, variant="corrected", label="", threshold="", **where):
    rows = table[(table.metric == metric) & (table.variant == variant) & (table.label == label)
                 & (table.threshold == threshold)]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1, rows
    return float(rows.value.iloc[0] or "nan")


def test_nih_is_scored_with_14_and_with_5_labels_and_the_path_tells_the_run(monkeypatch, tmp_path):
    frame = predictions(run_folder(tmp_path, "3.4", 11) / "nih_test.csv", m.NIH14)
    table = command(monkeypatch, tmp_path, run_folder(tmp_path, "3.4", 11) / "nih_test.csv")
    assert list(table.columns) == m.COLUMNS
    assert set(zip(table.exp, table.seed, table.dataset)) == {("3.4", "11", "nih_test")}
    for labels in (m.NIH14, FIVE):
        mean = np.mean([sk.roc_auc_score(frame[f"true_{label}"], frame[f"prob_{label}"]) for label in labels])
        for variant in ("paper", "corrected"):
            found = cell(table, "auc_mean", variant, labels=str(len(labels)))
            assert found == pytest.approx(mean)
        y, p = (frame[[f"{kind}_{label}" for label in labels]].to_numpy() for kind in ("true", "prob"))
        assert cell(table, "subset_accuracy", labels=str(len(labels)), threshold="0.5") == pytest.approx(
            sk.accuracy_score(y, p > 0.5))
        oracle = np.mean(oracle_by_hand(y, p, [0.1], False)[0])
        assert cell(table, "oracle_auc", labels=str(len(labels)), threshold="0.1") == pytest.approx(oracle)
    assert set(table.labels[table.label == ""]) == {"", "14", "5"}         # all are the 14
    keys = [key.split("|") for key in read_draws(tmp_path, "3.4/11/nih_test")]
    assert {metric for labels, metric, *_ in keys if labels == "14"} == {"auc_mean"}      # as compare.py asks
    assert {(metric, t) for labels, metric, _, t in keys if labels == "5"} >= {
        ("auc_mean", ""), ("fnr", "0.1"), ("subset_accuracy", "0.3"), ("mean_accuracy", "0.5"),
        ("oracle_auc", "0.25"), ("random_referral_auc", "0.1"), ("always_negative_accuracy", "")}
    assert not table.duplicated(["labels", "metric", "variant", "label", "threshold"]).any()


def test_every_metric_of_the_contract_is_written_with_its_thresholds(monkeypatch, tmp_path):
    frame = predictions(run_folder(tmp_path) / "chexpert_valid.csv")
    table = command(monkeypatch, tmp_path, run_folder(tmp_path) / "chexpert_valid.csv")
    y, p = (frame[[f"{kind}_{label}" for label in FIVE]].to_numpy() for kind in ("true", "prob"))
    for t in ("0.1", "0.2", "0.3", "0.4", "0.5"):
        accuracy = [sk.accuracy_score(y[:, k], p[:, k] > float(t)) for k in range(5)]
        balanced = [sk.balanced_accuracy_score(y[:, k], p[:, k] > float(t)) for k in range(5)]
        assert cell(table, "mean_accuracy", threshold=t) == pytest.approx(np.mean(accuracy))
        assert cell(table, "balanced_accuracy", threshold=t) == pytest.approx(np.mean(balanced))
        rounded = np.mean(np.round(accuracy, 4))
        assert cell(table, "mean_accuracy", "paper", threshold=t) == pytest.approx(rounded)
        assert cell(table, "subset_accuracy", threshold=t) == pytest.approx(
            sk.accuracy_score(y, p > float(t))
        )
        assert cell(table, "fnr", threshold=t) == pytest.approx(
            1 - sk.recall_score(y, p > float(t), average="macro"))
        expected = [calibration_error_as_written(y[:, k], p[:, k], float(t)) for k in range(5)]
        assert cell(table, "calibration_error", "paper", threshold=t) == pytest.approx(np.mean(expected))
    for variant in ("paper", "corrected"):
        values, _ = oracle_by_hand(y, p, m.FRACTIONS, variant == "paper")
        for q, value in zip(m.FRACTIONS, values):
            assert cell(table, "oracle_auc", variant, threshold=f"{q:g}") == pytest.approx(np.mean(value))
    order = np.argsort(np.abs(p - 0.5).mean(1), kind="stable")
    kept = order[12:]                                                        # of 120 the tenth is left out
    areas = [sk.roc_auc_score(y[kept, k], p[kept, k]) for k in range(5)]
    assert cell(table, "rejection_auc", threshold="0.1") == pytest.approx(np.mean(areas))
    alone = oracle_by_hand(y[:, [1]], p[:, [1]], [0.1], False)[0]
    assert cell(table, "oracle_auc_by_label", label=FIVE[1], threshold="0.1") == pytest.approx(alone[0][0])
    assert cell(table, "auprc") == pytest.approx(sk.average_precision_score(y, p, average="macro"))
    brier = [sk.brier_score_loss(y[:, k], p[:, k]) for k in range(5)]
    assert cell(table, "brier") == pytest.approx(np.mean(brier))
    count = table[(table.metric == "reliability_images") & (table.label == "Edema")].value.astype(float)
    assert count.sum() == 120
    assert {"ece", "adaptive_ece", "risk_coverage_area", "fpr", "random_referral_auc",
            "sensitivity_at_specificity_0.9", "sensitivity_at_specificity_0.95"} <= set(table.metric)


def read_draws(tmp_path, run):
    """{labels|metric|label|threshold: resamples} of one run in draws.npz."""
    with np.load(tmp_path / "draws.npz") as file:
        return dict(zip(file[f"{run}/rows"].tolist(), file[run]))


def test_draws_are_the_same_patients_for_every_run_and_make_the_intervals(monkeypatch, tmp_path):
    paths = [run_folder(tmp_path, exp) / "padchest.csv" for exp in ("2.2", "3.4")]
    frames = [predictions(path, score_seed=seed) for path, seed in zip(paths, (0, 1))]
    table = command(monkeypatch, tmp_path, *paths, bootstrap=200)
    index, counts = m.draw_patients(frames[0].patient.to_numpy(str), 200, m.zlib.crc32(b"padchest"))
    for exp, frame in zip(("2.2", "3.4"), frames):
        draws = read_draws(tmp_path, f"{exp}/0/padchest")
        y, p = (frame[[f"{kind}_{label}" for label in FIVE]].to_numpy() for kind in ("true", "prob"))
        for b in (0, 7, 199):
            rows = np.repeat(np.arange(120), counts[b][index])
            areas = [sk.roc_auc_score(y[rows, k], p[rows, k]) for k in range(5)]
            assert draws["5|auc_mean||"][b] == pytest.approx(np.mean(areas), abs=1e-6)
            assert draws["|auc|Edema|"][b] == pytest.approx(areas[3], abs=1e-6)
        for metric, key, threshold in (("auc_mean", "5|auc_mean||", ""), ("fnr", "5|fnr||0.3", "0.3")):
            row = table[(table.exp == exp) & (table.metric == metric) & (table.threshold == threshold)
                        & (table.variant == "corrected") & (table.label == "")].iloc[0]
            error = (float(row.ci_high) - float(row.ci_low)) / 2 / stats.norm.ppf(0.975)
            assert error == pytest.approx(np.std(draws[key]), rel=0.15 if metric == "fnr" else 1e-5)
            assert (float(row.ci_high) + float(row.ci_low)) / 2 == pytest.approx(float(row.value))
    assert {key.split("|")[1] for key in draws} >= {"auprc", "ece", "fnr", "subset_accuracy", "oracle_auc"}


def test_a_table_never_stands_beside_the_draws_of_another_call(monkeypatch, tmp_path):
    path, table, replace = run_folder(tmp_path) / "padchest.csv", tmp_path / "metrics.csv", os.replace
    predictions(path)
    command(monkeypatch, tmp_path, path)
    before, draws = table.read_bytes(), read_draws(tmp_path, "3.4/0/padchest")["5|auc_mean||"]
    predictions(path, score_seed=1)

    def killed_before_the_table(source, target):
        if target == table:
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(np, "savez", lambda *args, **resamples: os.close(-1))             # as on a full disk
        command(monkeypatch, tmp_path, path)
    assert table.read_bytes() == before and (draws == read_draws(tmp_path, "3.4/0/padchest")["5|auc_mean||"]).all()
    monkeypatch.setattr(os, "replace", killed_before_the_table)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, tmp_path, path)
    assert (draws != read_draws(tmp_path, "3.4/0/padchest")["5|auc_mean||"]).any() and not table.exists()


def test_an_unknown_label_counts_nowhere(monkeypatch, tmp_path):
    """A label that is blank (or -1) in every row leaves what a file without its columns gives."""
    path = run_folder(tmp_path) / "vindr_test.csv"
    frame = predictions(path, true_Edema="")
    blank = command(monkeypatch, tmp_path, path)
    frame.assign(true_Edema=-1).to_csv(path, index=False)
    pd.testing.assert_frame_equal(command(monkeypatch, tmp_path, path), blank)
    frame.drop(columns=["true_Edema", "prob_Edema"]).to_csv(path, index=False)
    pd.testing.assert_frame_equal(command(monkeypatch, tmp_path, path), blank)
    four = [label for label in FIVE if label != "Edema"]
    y, p = (frame[[f"{kind}_{label}" for label in four]].to_numpy(float) for kind in ("true", "prob"))
    assert cell(blank, "mean_accuracy", threshold="0.5") == pytest.approx(((p > 0.5) == y).mean())
    assert cell(blank, "auc_labels", labels="5") == 4 and "Edema" not in set(blank.label)


def test_unknown_cells_are_left_out_of_every_metric(monkeypatch, tmp_path):
    """Labels with blank cells against each label's known rows alone; for subsets, images with all known."""
    path = run_folder(tmp_path) / "here.csv"
    frame = predictions(path)
    rng = np.random.default_rng(1)
    for label in FIVE:
        frame[f"true_{label}"] = frame[f"true_{label}"].astype(str).mask(rng.random(120) < 0.2, "")
    frame.to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    accuracies = []
    for label in FIVE:
        known = frame[frame[f"true_{label}"] != ""]
        y, p = known[f"true_{label}"].astype(int).to_numpy(), known[f"prob_{label}"].to_numpy()
        assert cell(table, "positives", label=label) == y.sum()
        assert cell(table, "auc", label=label) == pytest.approx(sk.roc_auc_score(y, p))
        assert cell(table, "auprc", label=label) == pytest.approx(sk.average_precision_score(y, p))
        assert cell(table, "brier", label=label) == pytest.approx(sk.brier_score_loss(y, p))
        assert cell(table, "fnr", label=label, threshold="0.3") == pytest.approx(
            1 - sk.recall_score(y, p > 0.3)
        )
        assert cell(table, "fpr", label=label, threshold="0.3") == pytest.approx(
            1 - sk.recall_score(1 - y, p <= 0.3))
        assert cell(table, "ece", label=label) == pytest.approx(m.ece(y[:, None], p[:, None])[0])
        adaptive = m.ece(y[:, None], p[:, None], adaptive=True)[0]
        assert cell(table, "adaptive_ece", label=label) == pytest.approx(adaptive)
        assert cell(table, "calibration_error", "paper", label, "0.3") == pytest.approx(
            calibration_error_as_written(y, p, 0.3))
        accuracies.append(sk.accuracy_score(y, p > 0.3))
    assert cell(table, "mean_accuracy", threshold="0.3") == pytest.approx(np.mean(accuracies))
    complete = frame[(frame[[f"true_{label}" for label in FIVE]] != "").all(axis=1)]
    right = (complete[[f"prob_{label}" for label in FIVE]].to_numpy() > 0.3) == (
        complete[[f"true_{label}" for label in FIVE]].to_numpy() == "1")
    assert cell(table, "subset_accuracy", threshold="0.3") == pytest.approx(right.all(1).mean())
    p = frame[[f"prob_{label}" for label in FIVE]].to_numpy()
    asked = np.argsort(np.abs(p - 0.5).mean(1), kind="stable")[:12]
    areas = []
    for k, label in enumerate(FIVE):
        now, truth = p[:, k].copy(), frame[f"true_{label}"]
        for i in asked:
            now[i] = now[i] if truth[i] == "" else int(truth[i])
        known = truth != ""
        areas.append(sk.roc_auc_score(truth[known].astype(int), now[known]))
    assert cell(table, "oracle_auc", threshold="0.1") == pytest.approx(np.mean(areas))


def test_a_label_without_positives_is_an_empty_cell_and_the_mean_is_over_four(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "vindr_test.csv"
    frame = predictions(path, true_Edema=0)
    table = command(monkeypatch, tmp_path, path)
    four = [sk.roc_auc_score(frame[f"true_{x}"], frame[f"prob_{x}"]) for x in FIVE if x != "Edema"]
    assert cell(table, "auc_labels") == 4 and cell(table, "auc", "paper", "Edema") == 0
    for variant in ("paper", "corrected"):
        assert cell(table, "auc_mean", variant) == pytest.approx(np.mean(four))
        assert cell(table, "oracle_auc", variant, threshold="0") == pytest.approx(np.mean(four))
    row = table[(table.metric == "auc") & (table.variant == "corrected") & (table.label == "Edema")].iloc[0]
    assert row.value == row.ci_low == row.ci_high == ""
    assert cell(table, "rarer_class_patients", label="Edema") == 0
    assert cell(table, "undefined_resamples", label="Edema") == 1


def test_every_label_of_a_file_is_scored_and_only_the_studys_five_are_called_so(monkeypatch, tmp_path):
    for name, label in {"Pleural Effusion": "Effusion", "pleural effusion": "Effusion", "EDEMA": "Edema",
                        "Pleural thickening": "Pleural_Thickening", "Covid": "Covid"}.items():
        assert m.nih_name(name) == label
    spelt = ["atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural effusion", "Fracture"]
    frame = predictions(tmp_path / "a.csv", spelt)
    table = command(monkeypatch, tmp_path, tmp_path / "a.csv")
    areas = [sk.roc_auc_score(frame[f"true_{x}"], frame[f"prob_{x}"]) for x in spelt]
    assert cell(table, "auc_mean", labels="5") == pytest.approx(np.mean(areas[:5]))
    assert cell(table, "auc_mean", labels="all") == pytest.approx(np.mean(areas))
    assert set(table.label) == {"", *FIVE, "Fracture"}
    predictions(tmp_path / "b.csv", ["Nodule", "Mass", "Hernia", "Fracture", "Covid"])
    assert set(command(monkeypatch, tmp_path, tmp_path / "b.csv").labels) == {"", "all"}


@pytest.mark.parametrize("n, shown", [(2, True), (3, False)])
def test_the_terminal_has_every_labels_auc_of_one_or_two_runs(n, shown, monkeypatch, tmp_path, capsys):
    files = [tmp_path / f"{name}.csv" for name in "abc"[:n]]
    frames = [predictions(file, ["Lesion", "Scar"], score_seed=seed) for seed, file in enumerate(files)]
    monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, files), "--bootstrap", "20", "--workers", "1"])
    m.main()
    out = capsys.readouterr().out
    assert ("Scar" in out) == shown
    assert (f"{sk.roc_auc_score(frames[1].true_Scar, frames[1].prob_Scar):.4f}" in out) == shown


def test_two_files_of_ones_own_are_two_arms_on_one_test_set(monkeypatch, tmp_path, capsys):
    a, b = (predictions(tmp_path / f"{name}.csv", ["Lesion"], score_seed=seed)
            for seed, name in enumerate("ab"))
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"),
                                      "--bootstrap", "50", "--workers", "1"])
    m.main()
    out = capsys.readouterr().out
    for frame in (a, b):
        assert f"{sk.roc_auc_score(frame.true_Lesion, frame.prob_Lesion):.4f}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]        # nothing is written
    table = command(monkeypatch, tmp_path, tmp_path / "a.csv", tmp_path / "b.csv")
    assert set(zip(table.exp, table.seed, table.dataset)) == {("a", "0", "test"), ("b", "0", "test")}
    flags = ["--exp", "mine", "--seed", "7", "--dataset", "here"]
    table = command(monkeypatch, tmp_path, tmp_path / "a.csv", *flags)
    assert set(zip(table.exp, table.seed, table.dataset)) == {("mine", "7", "here")}


def test_the_runs_of_an_arm_also_make_an_ensemble_whatever_the_order_of_rows(monkeypatch, tmp_path):
    paths = [run_folder(tmp_path, "3.4", seed) / "padchest.csv" for seed in (0, 11)]
    frames = [predictions(path, score_seed=seed) for seed, path in enumerate(paths)]
    mean = frames[0].copy()
    for label in FIVE:
        mean[f"prob_{label}"] = (frames[0][f"prob_{label}"] + frames[1][f"prob_{label}"]) / 2
    shuffled = frames[1].sample(frac=1, random_state=0)[["path", "patient", *reversed(frames[1].columns[2:])]]
    shuffled.to_csv(paths[1], index=False)
    table = command(monkeypatch, tmp_path, *paths)
    mean.to_csv(tmp_path / "mean.csv", index=False)
    alone = command(monkeypatch, tmp_path, tmp_path / "mean.csv", "--dataset", "padchest")
    made = table[table.exp == "3.4-ensemble"].reset_index(drop=True)
    assert set(made.seed) == {""} and not made.empty
    pd.testing.assert_frame_equal(made.drop(columns=["exp", "seed", "value"]),
                                  alone.drop(columns=["exp", "seed", "value"]))
    np.testing.assert_allclose(*(pd.to_numeric(part.value) for part in (made, alone)), atol=1e-9)
    turned = command(monkeypatch, tmp_path, *reversed(paths))               # the shuffled file first
    for label in FIVE:
        area = sk.roc_auc_score(mean[f"true_{label}"], mean[f"prob_{label}"])
        assert cell(turned, "auc", label=label, exp="3.4-ensemble") == pytest.approx(area)


def test_runs_on_other_images_are_refused(monkeypatch, tmp_path, capsys):
    here, there = (run_folder(tmp_path, exp) / "padchest.csv" for exp in ("2.2", "3.4"))
    frame = predictions(here)
    for other, what in ((frame.assign(true_Edema=1 - frame.true_Edema), "true labels"),
                        (frame.assign(patient=frame.path), "patients"), (frame[:-1], "images"),
                        (frame.drop(columns=["true_Edema", "prob_Edema"]), "labels")):
        there.parent.mkdir(parents=True, exist_ok=True)
        other.to_csv(there, index=False)
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, tmp_path, here, there)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"have other {what};" in error
        assert str(here) in error and str(there) in error and not (tmp_path / "metrics.csv").exists()


def test_the_mark_of_stand_ins_stands_in_every_row(monkeypatch, tmp_path, capsys):
    path = run_folder(tmp_path) / "padchest.csv"
    predictions(path)
    assert set(command(monkeypatch, tmp_path, path).stand_in) == {""}
    path.with_suffix(".json").write_text('{"exp": "3.4", "stand_in": null}')
    assert set(command(monkeypatch, tmp_path, path).stand_in) == {""}
    path.with_suffix(".json").write_text('{"exp": "3.4", "stand_in": "drawn by data_prep/demo.py"}')
    assert set(command(monkeypatch, tmp_path, path).stand_in) == {"drawn by data_prep/demo.py"}
    assert "stand-in: drawn by data_prep/demo.py" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["", "nan", "NaN", "None"])
def test_images_of_nobody_are_patients_of_their_own(monkeypatch, tmp_path, spelling):
    path = run_folder(tmp_path) / "padchest.csv"
    predictions(path).assign(patient=spelling).to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    assert cell(table, "patients") == cell(table, "images") == 120
    predictions(path).assign(patient="7").to_csv(path, index=False)         # one patient tells no spread
    one = command(monkeypatch, tmp_path, path)
    assert cell(one, "patients") == 1 and set(one.ci_low) == {""}


def test_thresholds_and_temperature_come_from_the_validation_file(monkeypatch, tmp_path):
    folder = run_folder(tmp_path)
    test = predictions(folder / "padchest.csv")
    val = predictions(folder / "nih_val.csv", m.NIH14, n=200, seed=5)
    table = command(monkeypatch, tmp_path, folder / "padchest.csv", folder / "nih_val.csv")
    assert not table[table.dataset == "nih_val"].metric.str.contains("youden|temperature").any()
    t = m.choose_threshold(val.true_Edema.to_numpy(), val.prob_Edema.to_numpy(), "youden")
    assert cell(table, "threshold_youden", label="Edema", dataset="padchest") == pytest.approx(t)
    assert cell(table, "fnr_youden", label="Edema", dataset="padchest") == pytest.approx(
        1 - sk.recall_score(test.true_Edema, test.prob_Edema > t))
    y, p = (val[[f"{kind}_{label}" for label in m.NIH14]].to_numpy() for kind in ("true", "prob"))
    assert cell(table, "temperature", dataset="padchest") == pytest.approx(m.fit_temperature(y, p))
    tempered = m.temper(test[["prob_Edema"]].to_numpy(), m.fit_temperature(y, p))
    assert cell(table, "ece_temperature", label="Edema", dataset="padchest") == pytest.approx(
        m.ece(test[["true_Edema"]].to_numpy(), tempered)[0])
    (folder / "nih_val.csv").rename(tmp_path / "val.csv")
    given = command(monkeypatch, tmp_path, folder / "padchest.csv", "--validation", tmp_path / "val.csv")
    pd.testing.assert_frame_equal(given, table[table.dataset == "padchest"].reset_index(drop=True))
    assert not command(monkeypatch, tmp_path, folder / "padchest.csv").metric.str.contains("youden").any()


def people_of(frame):
    """Sex, age and race of the images of a predictions file."""
    rng = np.random.default_rng(0)
    races = ["White, non-Hispanic", "White", "Black or African American"]
    return pd.DataFrame({"path": frame.path, "sex": rng.choice(["F", "M", ""], len(frame)),
                         "age": rng.integers(20, 95, len(frame)), "race": rng.choice(races, len(frame))})


def test_a_group_of_ten_images_is_scored_one_of_nine_only_counted(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    frame = predictions(path)
    sick, well = (frame.path[frame.true_Edema == value].tolist() for value in (1, 0))
    race = {image: "White" for image in sick[:5] + well[:5]} | {image: "Black" for image in sick[5:10] + well[5:9]}
    frame.assign(race=frame.path.map(race).fillna("")).to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    assert [cell(table, f"images[race={name}]") for name in ("White", "Black")] == [10, 9]
    scored = table.metric[table.metric.str.startswith("auc[race=")]
    assert set(scored) == {"auc[race=White]"}


def test_subgroups_have_auc_fnr_fpr_and_calibration_of_their_own(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    frame = predictions(path)
    val = predictions(path.with_name("nih_val.csv"), seed=5)
    people = people_of(frame)
    people.sample(frac=1, random_state=0).to_csv(tmp_path / "manifest.csv", index=False)
    table = command(monkeypatch, tmp_path, path, "--manifest", tmp_path / "manifest.csv")
    groups = {
        "sex=F": people.sex == "F",
        "sex=M": people.sex == "M",
        "race=White": people.race.str[0] == "W",
        "race=Black": people.race.str[0] == "B",
        "age=<=40": people.age <= 40,
        "age=>80": people.age > 80,
        "age=41-60": people.age.between(41, 60),
        "age=61-80": people.age.between(61, 80),
    }
    youden = m.choose_threshold(val.true_Edema.to_numpy(), val.prob_Edema.to_numpy(), "youden")
    found = {}
    for name, here in groups.items():
        y, p = frame.true_Edema[here], frame.prob_Edema[here]
        assert cell(table, f"images[{name}]") == here.sum()
        found[name] = sk.roc_auc_score(y, p)
        assert cell(table, f"auc[{name}]", label="Edema") == pytest.approx(found[name])
        assert cell(table, f"fnr_youden[{name}]", label="Edema") == pytest.approx(
            1 - sk.recall_score(y, p > youden))
        assert cell(table, f"fpr_youden[{name}]", label="Edema") == pytest.approx(
            1 - sk.recall_score(1 - y, p <= youden))
        assert cell(table, f"ece[{name}]", label="Edema") == pytest.approx(
            m.ece(y.to_numpy()[:, None], p.to_numpy()[:, None])[0])
    shown = table.metric[table.metric.str.startswith("images[age=")]
    assert list(shown) == [f"images[age={band}]" for band in ("<=40", "41-60", "61-80", ">80")]
    ages = [value for name, value in found.items() if name.startswith("age")]
    assert cell(table, "auc_gap[age]", label="Edema") == pytest.approx(max(ages) - min(ages))
    assert cell(table, "auc_gap[sex]", label="Edema") == pytest.approx(abs(found["sex=F"] - found["sex=M"]))
    assert (table[table.metric.str.contains("_gap")].ci_low == "").all()       # they would lie too high
    row = table[(table.metric == "fnr_youden[sex=F]") & (table.label == "")].iloc[0]
    assert float(row.ci_low) < float(row.value) < float(row.ci_high)
    frame.merge(people, on="path").to_csv(path, index=False)  # the same, beside the predictions
    pd.testing.assert_frame_equal(command(monkeypatch, tmp_path, path), table)
    path.with_name("nih_val.csv").unlink()                                  # without validation at 0.5
    table, men = command(monkeypatch, tmp_path, path), people.sex == "M"
    y, p = frame.true_Edema[men], frame.prob_Edema[men]
    assert cell(table, "fnr[sex=M]", label="Edema", threshold="0.5") == pytest.approx(
        1 - sk.recall_score(y, p > 0.5))
    assert cell(table, "fpr[sex=M]", label="Edema", threshold="0.5") == pytest.approx(
        1 - sk.recall_score(1 - y, p <= 0.5))


def test_a_label_that_validation_lacks_has_no_threshold(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    predictions(path, ["Edema", "Effusion", "Fracture"], sex=["F", "M"] * 60)
    predictions(path.with_name("nih_val.csv"), ["Edema", "Effusion"], seed=5)
    table = command(monkeypatch, tmp_path, path)
    for name in ("fnr_youden", "fpr_youden", "fnr_youden[sex=F]", "fpr_youden_gap[sex]"):
        known = [cell(table, name, label=label) for label in ("Edema", "Effusion")]
        assert cell(table, name, labels="all", label="") == pytest.approx(np.mean(known))
        assert np.isnan(cell(table, name, label="Fracture"))


def test_means_of_subgroups_are_over_the_labels_that_all_groups_have(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    frame = predictions(path).assign(sex=["F", "M"] * 60)
    frame.loc[frame.sex == "F", "true_Edema"] = 0
    frame.to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    shared, gaps = [label for label in FIVE if label != "Edema"], []
    for sex in "FM":
        here = frame[frame.sex == sex]
        areas = [sk.roc_auc_score(here[f"true_{label}"], here[f"prob_{label}"]) for label in shared]
        assert cell(table, f"auc[sex={sex}]") == pytest.approx(np.mean(areas))
        gaps.append(areas)
    assert cell(table, "auc_gap[sex]") == pytest.approx(np.abs(np.subtract(*gaps)).mean())
    assert np.isnan(cell(table, "auc_gap[sex]", label="Edema"))


def test_manifests_that_differ_about_an_image_are_refused(monkeypatch, tmp_path, capsys):
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    frame = predictions(path).assign(sex="F")
    for name in ("a", "b"):
        frame[["path", "sex"]].to_csv(tmp_path / f"{name}.csv", index=False)
    given = "--manifest", tmp_path / "a.csv", tmp_path / "b.csv"
    assert cell(command(monkeypatch, tmp_path, path, *given), "images[sex=F]") == 120
    frame.assign(sex=["F"] * 119 + ["M"])[["path", "sex"]].to_csv(tmp_path / "b.csv", index=False)
    m.read_manifests.cache_clear()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path, path, *given)
    assert stop.value.code == 2 and "two people for image 'images/0119.png'" in capsys.readouterr().err


def test_processes_do_not_change_the_result_and_no_resamples_give_no_draws(monkeypatch, tmp_path):
    paths = [run_folder(tmp_path, exp, seed) / "padchest.csv" for exp in ("2.2", "3.4") for seed in (0, 11)]
    for i, path in enumerate(paths):
        predictions(path, score_seed=i)
    one = command(monkeypatch, tmp_path, *paths)
    pd.testing.assert_frame_equal(one, command(monkeypatch, tmp_path, *paths, "--workers", "2"))
    bare = command(monkeypatch, tmp_path, *paths, bootstrap=0)
    drawn = one.metric == "undefined_resamples"
    pd.testing.assert_series_equal(bare.value[~drawn], one.value[~drawn])
    assert set(bare.value[drawn]) == {""}
    assert set(bare.ci_low[bare.metric == "auc_mean"]) == {""}
    assert read_draws(tmp_path, "2.2/0/padchest")["5|auc_mean||"].shape == (0,)
    assert read_draws(tmp_path, "2.2/0/padchest")["5|fnr||0.3"].shape == (0,)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_leaves_costs_no_file(tmp_path):
    predictions(tmp_path / "a.csv")
    predictions(tmp_path / "b.csv", score_seed=1)
    here = ROOT / "evaluate"
    scored = [here / "metrics.py", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "metrics.csv"]
    compared = [here / "compare.py", "--metrics", tmp_path / "metrics.csv", "--out", tmp_path]
    for script in (scored, compared, [*compared, "--arms", "a", "b"]):
        running = subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.stdout.close()                                          # as `| head` does
        assert running.stderr.read() == b"" and running.wait() == -signal.SIGPIPE
    assert {"metrics.csv", "draws.npz", "verdicts.csv", "two_arms.csv"} <= {file.name for file in tmp_path.iterdir()}


def test_a_killed_worker_is_one_sentence(monkeypatch, tmp_path, capsys):
    predictions(tmp_path / "a.csv")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)                 # as Python starts
    monkeypatch.setattr(m, "score_arm", die)                      # as the kernel does where memory is short
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path, tmp_path / "a.csv", "--workers", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: a worker was killed") and error.count("\n") == 1
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN     # else the pipe to the worker ends the script, too
    assert not (tmp_path / "metrics.csv").exists()


def test_constant_scores_and_two_images(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "padchest.csv"
    predictions(path, **{f"prob_{label}": 0.5 for label in FIVE})
    assert cell(command(monkeypatch, tmp_path, path), "auc_mean") == 0.5
    path.write_text("path,patient,true_Edema,prob_Edema\na,,1,0.9\nb,,0,0.2\n")
    table = command(monkeypatch, tmp_path, path)
    assert cell(table, "auc_mean") == 1 and cell(table, "patients") == 2       # blank: a patient of its own


def test_always_negative_on_the_hand_labelled_images(shared, monkeypatch, tmp_path):
    """The "random guess" of Table 7 is the share of negatives on the 202 frontal images."""
    frame = pd.read_csv(shared / "fixtures" / "chexpert" / "valid_frontal_author.csv")
    names = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    patient = frame["Path"].str.extract(r"(patient\d+)")[0]
    rows = pd.DataFrame({"path": frame["Path"], "patient": patient, **{f"true_{x}": frame[x] for x in names},
                         **{f"prob_{x}": 0.0 for x in names}})
    path = run_folder(tmp_path) / "chexpert_valid.csv"
    path.parent.mkdir(parents=True)
    rows.to_csv(path, index=False)
    table = command(monkeypatch, tmp_path, path)
    printed = pd.read_csv(REPORTED / "table7_random_guess.csv", dtype=str).set_index("label").accuracy
    assert len(printed) == 5 and cell(table, "images") == 202 and cell(table, "patients") == 200
    for label, value in printed.items():
        assert f"{cell(table, 'random_guess_accuracy', 'paper', label):.4f}" == value
        negative = cell(table, "always_negative_accuracy", label=label)
        guessing = cell(table, "random_guess_accuracy", label=label)
        assert guessing == pytest.approx(negative ** 2 + (1 - negative) ** 2)
    assert f"{cell(table, 'always_negative_accuracy'):.4f}" == "0.7238"
    assert f"{cell(table, 'always_negative_subset_accuracy'):.4f}" == "0.3663"
    assert cell(table, "subset_accuracy", threshold="0.5") == cell(table, "always_negative_subset_accuracy")


# ------------------------------------------------------------------------------------------- users' mistakes

BASE = "path,patient,true_Edema,prob_Edema\na,1,1,0.9\nb,2,0,0.2\n"


@pytest.mark.parametrize("text, said", [
    ("", ["a.csv", "no CSV table"]),
    ("path,patient,true_Edema,prob_Edema\n", ["a.csv", "no rows"]),
    ("patient,true_Edema,prob_Edema\n1,1,0.9\n", ["no column 'path'"]),
    ("path,true_Edema,prob_Edema\na,1,0.9\n", ["no column 'patient'"]),
    ("path,patient\na,1\n", ["true_<label>"]),
    (BASE.replace(",prob_Edema", ",prob_Mass"), ["only one of true_Edema and prob_Edema"]),
    ("path,patient,true_Edema,prob_Edema,prob_Mass\na,1,1,0.9,0.1\n", ["only one of true_Mass and prob_Mass"]),
    (BASE.replace("0.9", "nan"), ["row 2", "prob_Edema is 'nan'", "0 to 1"]),
    (BASE.replace("0.2", ""), ["row 3", "prob_Edema is ''"]),
    (BASE.replace("0.2", "1.2"), ["row 3", "prob_Edema is '1.2'"]),
    (BASE.replace("b,2,0", "b,2,2"), ["row 3", "true_Edema is '2'", "1, 0 or blank"]),
    (BASE.replace("b,2,0", "b,2,yes"), ["row 3", "true_Edema is 'yes'"]),
    (BASE.replace("b,2", "a,2"), ["row 3", "image 'a'", "twice"]),
    (BASE.replace("b,2,0", "b,2,1"), ["both positives and negatives"]),
    ("path,patient,true_Edema,prob_Edema\na,1,1,0.9\n", ["both positives and negatives"]),
    ("path,patient,true_Effusion,true_Pleural Effusion,prob_Effusion,prob_Pleural Effusion\na,1,1,1,1,1\n",
     ["Effusion", "two spellings"]),
    (BASE.replace("Edema", "Edema | left"), ["'Edema | left'", "without |"]),
    # as a spreadsheet or pandas saves a table
    (BASE.replace("\n", ",\n"), ["column 5, '', has no name"]),
    ("," + BASE.replace("\na", "\n0,a").replace("\nb", "\n1,b"), ["column 1, '', has no name"]),
    (BASE.replace("0.9", "0.9,").replace("0.2", "0.2,"), ["line 2 has 5 cells, the header 4"]),
    (BASE.replace("0,0.2", "0"), ["line 3 has 3 cells, the header 4"]),
    (BASE.replace("prob_Edema", "true_Edema"), ["column 3, 'true_Edema', has no name of its own"])])
def test_a_mistake_in_the_file_is_one_sentence(text, said, monkeypatch, tmp_path, capsys):
    path = run_folder(tmp_path) / "a.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path, path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {path}") and error.count("\n") == 1
    assert all(fragment in error for fragment in said), error
    assert not (tmp_path / "metrics.csv").exists()


def test_an_arm_is_not_named_as_an_ensemble(monkeypatch, tmp_path, capsys):
    path = tmp_path / "mine-ensemble.csv"
    path.write_text(BASE)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path, path)
    assert stop.value.code == 2 and "mine-ensemble" in capsys.readouterr().err


def test_validation_of_another_run_or_of_other_images_is_refused(monkeypatch, tmp_path, capsys):
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]                        # two models in one folder
    runs = [run_folder(tmp_path, seed=seed) / "padchest.csv" for seed in (0, 11)]
    for path in (*files, *runs):
        predictions(path)
    predictions(tmp_path / "nih_val.csv", seed=5)
    predictions(runs[0].with_name("nih_val.csv"), seed=5)
    predictions(runs[1].with_name("nih_val.csv"), n=90, patients=30, seed=6)
    for given, said in ((files, "belongs to one run"), (runs, "nih_val.csv")):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, tmp_path, *given)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_people_who_are_unknown_or_few_are_no_group(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "padchest.csv"
    races = ["White"] * 60 + ["Unknown"] * 9 + ["Race and Ethnicity Unknown"] * 11 + ["Patient Refused"] * 20 + ["Asian"] * 11 + ["Black"] * 9
    predictions(path, race=races)
    table = command(monkeypatch, tmp_path, path)
    groups = {name: set(table.metric[table.metric.str.startswith(f"{name}[race=")]) for name in ("images", "auc")}
    assert groups["images"] == {"images[race=White]", "images[race=Asian]", "images[race=Black]"}
    assert groups["auc"] == {"auc[race=White]", "auc[race=Asian]"}          # 9 images: too few


def test_ages_as_in_dicom_headers_and_races_in_capitals_make_the_same_groups(monkeypatch, tmp_path):
    path = run_folder(tmp_path) / "padchest.csv"
    races = ["White", "Black or African American", "Asian - Historical", "CAUCASIAN"] * 30
    ages = [str(30 + number % 60) for number in range(120)]
    predictions(path, age=ages, race=races)
    expected = command(monkeypatch, tmp_path, path)
    assert {"images[age=41-60]", "images[race=Black]", "images[race=CAUCASIAN]"} <= {*expected.metric}
    assert cell(expected, "images[race=Asian]") == 30
    predictions(path, age=[f"0{age}Y" for age in ages], race=[race.upper() for race in races])
    pd.testing.assert_frame_equal(command(monkeypatch, tmp_path, path), expected)


def test_a_mistake_in_the_call_is_one_sentence(monkeypatch, tmp_path, capsys):
    here, there = run_folder(tmp_path) / "padchest.csv", run_folder(tmp_path, "2.2") / "padchest.csv"
    predictions(here), predictions(there)
    pd.DataFrame({"path": ["images/0001.png"], "sex": ["F"]}).to_csv(tmp_path / "manifest.csv", index=False)
    pd.DataFrame({"path": ["images/0001.png"], "age": [""]}).to_csv(tmp_path / "blank.csv", index=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "marked.csv").write_text(BASE)
    (tmp_path / "marked.json").write_text("[]")
    for args, said in [
            ([tmp_path / "absent.csv"], "does not exist"), (["."], ". is no CSV table"),
            ([here, here], "is a second file of exp 3.4, seed 0, padchest"),
            ([here, there, "--validation", here], "belongs to one run"),
            ([here, "--manifest", tmp_path / "blank.csv"], "knows no sex, age or race"),
            ([here, "--manifest", tmp_path / "manifest.csv"], "image 'images/0000.png' is in no manifest"),
            ([here, "--bootstrap", "-1"], "--bootstrap must be 0 or more"),
            ([here, "--manifest", tmp_path / "none.csv"], "none.csv does not exist"),
            ([tmp_path / "marked.csv"], "marked.json is not predict.py's"),
            ([here, "--out", "."], "--out . "), ([here, "--out", tmp_path / "results"], "name of a .csv"),
            ([here, "--out", tmp_path / "file" / "m.csv"], "cannot be written")]:
        monkeypatch.setattr(sys, "argv", ["metrics.py", "--out", str(tmp_path / "m.csv"), "--bootstrap", "9",
                                          "--workers", "1", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            m.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert said in error, error


def test_the_command_needs_no_torch_and_fails_politely(tmp_path):
    path = run_folder(tmp_path) / "padchest.csv"
    predictions(path)
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['metrics.py'] + sys.argv[1:]; "
            "runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    script, out = ROOT / "evaluate" / "metrics.py", tmp_path / "out" / "metrics.csv"
    done = subprocess.run([sys.executable, "-c", code, script, path, "--out", out, "--bootstrap", "20"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and out.read_text().startswith(",".join(m.COLUMNS) + "\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["draws.npz", "metrics.csv"]
    path.write_text(BASE.replace("0.9", "-0.1"))
    failed = run_script("evaluate/metrics.py", path, "--out", tmp_path / "m.csv")
    assert_user_error(failed, str(path), "row 2", "-0.1")
