"""evaluate/compare.py against SciPy, simulation, loops and constructed arms; the claims of the paper."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, load_script, run_here
from scipy import stats

compare = load_script("evaluate/compare.py")
metrics = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
nan = np.nan


# ------------------------------------------------------------------------------------------------ statistics

def arm(values, draws=None, seeds=None, source="our runs"):
    """An Arm of runs with these values and, if given, these resamples, [runs, B]."""
    seeds = seeds or [str(place) for place in range(len(values))]
    rows = np.column_stack([values] if draws is None else [values, draws])
    return compare.make_arm(dict(zip(seeds, rows)), source)


def printed(mean, sd, runs):
    return compare.Arm(mean, sd, runs, sd ** 2 / runs, "printed", None, {})


def estimate(*terms, offset=0.0):
    return SimpleNamespace(**compare.estimate(terms, offset))


def test_two_arms_without_resamples_are_compared_by_welchs_test():
    left, right = [0.81, 0.83, 0.80, 0.84, 0.82], [0.78, 0.80, 0.79]
    found = estimate((1, arm(left)), (-1, arm(right)))
    expected = stats.ttest_ind(left, right, equal_var=False)
    interval = expected.confidence_interval()
    assert found.effect == pytest.approx(np.mean(left) - np.mean(right))
    assert (found.ci_low, found.ci_high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p == pytest.approx(expected.pvalue) and found.freedom == pytest.approx(expected.df)
    assert np.isnan(found.se_patients)


def test_printed_cells_are_compared_by_welchs_test_of_mean_sd_and_n():
    arms = {("a", "s", "k"): printed(0.81, 0.002, 5), ("b", "s", "k"): printed(0.80, 0.009, 3)}
    found = compare.compare(arms, [(1, ("a", "s", "k")), (-1, ("b", "s", "k"))])
    expected = stats.ttest_ind_from_stats(0.81, 0.002, 5, 0.80, 0.009, 3, equal_var=False)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["remarks"] == ["seeds only"] and found["sources"] == {"printed"}


def test_cells_of_one_experiment_are_paired_by_run():
    left, right = [0.80, 0.82, 0.79, 0.85], [0.78, 0.81, 0.76, 0.84]
    arms = {("a", "s", "A"): arm([0.1, *left], seeds="x0123"), ("b", "s", "A"): arm([0.7, 0.71, 0.73]),
            ("a", "s", "B"): arm([*right, 0.9], seeds="0123y")}
    terms = [(1, ("a", "s", "A")), (-1, ("a", "s", "B"))]
    found = compare.compare(arms, terms)                     # by seed, over those of both
    assert found["p"] == pytest.approx(stats.ttest_rel(left, right).pvalue)
    assert compare.compare(arms, terms, 0.01)["effect"] == pytest.approx(found["effect"] - 0.01)
    three = compare.compare(arms, [*terms, (-1, ("b", "s", "A"))])
    expected = stats.ttest_ind(np.subtract(left, right), [0.7, 0.71, 0.73], equal_var=False)
    assert three["p"] == pytest.approx(expected.pvalue)


def test_cells_of_one_experiment_without_a_common_run_are_two_samples():
    left, right = [0.80, 0.82, 0.79], [0.78, 0.81, 0.76]
    arms = {("a", "s", "k"): arm(left, seeds="012"),
            ("a", "t", "k"): arm(right, seeds="345", source="stand-ins")}
    found = compare.compare(arms, [(1, ("a", "s", "k")), (-1, ("a", "t", "k"))])
    assert found["p"] == pytest.approx(stats.ttest_ind(left, right, equal_var=False).pvalue)
    assert found["sources"] == {"our runs", "stand-ins"}


def test_intervals_end_where_differences_of_areas_can():
    cells = [(exp, "s", "k") for exp in "abc"]
    arms = dict(zip(cells, (arm([0.2, 0.9]), arm([0.1, 0.6]), arm([0.3, 0.5]))))
    pair, three = [(1, cells[0]), (-1, cells[1])], [(1, cells[0]), (-1, cells[1]), (-1, cells[2])]
    for terms, offset, ends in ((pair, 0, [-1, 1]), (pair, 0.2, [-1.2, 0.8]), (three, 0, [-2, 1])):
        free = compare.estimate([(sign, arms[cell]) for sign, cell in terms], offset)
        assert free["ci_low"] < ends[0] and free["ci_high"] > ends[1]
        found = compare.compare(arms, terms, offset)
        assert [found["ci_low"], found["ci_high"]] == pytest.approx(ends) and found["p"] == free["p"]


def test_the_parts_of_the_error_are_those_of_runs_and_patients():
    """Scores = run + patient + run x patient: with many of both, the two parts are the known variances."""
    rng = np.random.default_rng(0)
    runs, patients = 400, 300
    common, own = rng.normal(size=patients), rng.normal(size=(runs, patients)) * 2
    scores = 0.05 * rng.normal(size=(runs, 1)) + common + own
    counts = rng.multinomial(patients, [1 / patients] * patients, size=800) / patients
    found = estimate((1, arm(scores.mean(1), scores @ counts.T)))
    error = np.hypot(found.se_runs, found.se_patients)
    assert found.se_patients == pytest.approx(common.std() / np.sqrt(patients), rel=0.1)
    assert found.se_runs == pytest.approx(0.05 / np.sqrt(runs), rel=0.4)    # s^2 less 4 / 300, run x patient
    assert found.ci_high - found.effect == pytest.approx(stats.t.ppf(0.975, found.freedom) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.effect) / error, found.freedom))


def test_the_interaction_of_runs_and_patients_is_subtracted_once():
    rng = np.random.default_rng(0)
    values, draws = np.array([0.7, 0.8, 0.9]), rng.normal(0, 0.1, (3, 40))
    interaction = 0.0
    for run in range(3):
        deviations = [draws[run, b] - draws[:, b].mean() for b in range(40)]
        interaction += np.mean(np.square(deviations - np.mean(deviations))) / 2
    found = arm(values, draws)
    assert found.run_variance == pytest.approx((0.1 ** 2 - interaction) / 3)
    assert arm([0.8, 0.8, 0.8], draws).run_variance == 0                     # never below


def test_the_degrees_of_freedom_are_satterthwaites_with_plenty_for_patients():
    rng = np.random.default_rng(0)
    left, right = rng.normal(0.8, 0.01, 5), rng.normal(0.8, 0.03, 3)
    draws = rng.normal(0, 0.02, (2, 300))
    found = estimate((1, arm(left, left[:, None] + draws[0])), (-1, arm(right, right[:, None] + draws[1])))
    parts = np.array([left.var(ddof=1) / 5, right.var(ddof=1) / 3])
    total = parts.sum() + (draws[0] - draws[1]).var()
    assert found.freedom == pytest.approx(total ** 2 / (parts ** 2 / [4, 2]).sum())
    assert found.se_runs == pytest.approx(np.sqrt(parts.sum()))


def test_the_degrees_of_freedom_are_never_fewer_than_those_of_the_fewest_runs():
    """Where the spread of runs is their interaction with patients alone, Satterthwaite's fall below R - 1."""
    rng = np.random.default_rng(0)
    values = np.array([0.7, 0.8, 0.9])
    noise = rng.normal(0, 0.15, (3, 400))
    draws = values[:, None] + noise - noise.mean(0) + rng.normal(0, 0.01, 400)
    found = estimate((1, arm(values, draws)))
    error = np.hypot(found.se_runs, found.se_patients)
    assert found.freedom == 2 and found.ci_high - found.effect == pytest.approx(stats.t.ppf(0.975, 2) * error)
    more = estimate((1, arm(values, draws)), (-1, arm([*values, 0.8, 0.8])))
    assert more.freedom >= 2


def coverage(runs, spread, arms, simulations=1200):
    """Share of simulated 95 % intervals that hold 0; spread: sd of a run's effect."""
    rng, hits, patients = np.random.default_rng(runs), 0, 60
    for _ in range(simulations):
        counts = rng.multinomial(patients, [1 / patients] * patients, size=200) / patients
        common, terms = rng.normal(size=patients) * 0.5, []
        for sign in (1, -1)[:arms]:
            scores = rng.normal(size=(runs, 1)) * spread + common + rng.normal(size=patients) * 0.3
            scores = scores + rng.normal(size=(runs, patients)) * 0.5
            terms.append((sign, arm(scores.mean(1), scores @ counts.T)))
        result = estimate(*terms)
        hits += result.ci_low <= 0 <= result.ci_high
    return hits / simulations


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.5, 0.0])                # runs dominate, patients dominate
def test_the_interval_of_a_pair_covers_the_truth(runs, spread):
    assert 0.93 <= coverage(runs, spread, 2) <= 0.98 - 0.005 * (spread > 0)


def test_the_interval_of_one_arm_with_two_runs_covers_less_as_the_help_says():
    assert 0.84 <= coverage(2, 0.5, 1) <= 0.90
    assert 0.91 <= coverage(5, 0.5, 1) <= 0.96


def test_an_arm_of_one_run_has_the_interval_of_patients_and_says_so():
    draws = np.random.default_rng(0).normal(0.8, 0.01, (1, 500))
    found = estimate((1, arm([0.8], draws)))
    assert found.ci_high - 0.8 == pytest.approx(stats.norm.ppf(0.975) * draws.std())
    assert np.isnan(found.se_runs)
    assert np.isnan(estimate((1, arm([0.8]))).p)             # nothing is known
    remarks = compare.compare({("a", "s", "k"): arm([0.8], draws)}, [(1, ("a", "s", "k"))])["remarks"]
    assert remarks == ["an arm has one run, whose spread is unknown"]


@pytest.mark.parametrize("left, right", [([0.81], [0.78]), ([0.8, 0.8], [0.7, 0.7]),
                                         ([0.1 + 0.2, 0.3], [0.2, 0.2])])       # 0.30000000000000004: equal
def test_arms_without_any_spread_tell_no_error_and_no_p(left, right):
    found = estimate((1, arm(left)), (-1, arm(right)))
    assert found.effect == pytest.approx(left[0] - right[0])
    assert np.isnan([found.ci_low, found.ci_high, found.p]).all()


@pytest.mark.parametrize("p, shown", [(9e-5, "< 0.0001"), (1e-4, "0.0001"), (0.04321, "0.0432"), (nan, "")])
def test_a_p_on_the_terminal_has_four_digits(p, shown):
    assert compare.show_p(p) == shown


def test_holm_is_the_step_down_loop_and_absent_comparisons_count():
    p = [0.01, 0.04, 0.03, nan, 0.005]
    expected, running = {}, 0.0
    for step, (value, place) in enumerate(sorted((1.0 if np.isnan(v) else v, i) for i, v in enumerate(p))):
        running = max(running, min(1, (5 - step) * value))
        expected[place] = running
    np.testing.assert_allclose(compare.holm(p), [expected[i] for i in range(5)])
    assert compare.holm([0.02])[0] == 0.02 and compare.holm([0.02, nan, nan])[0] == pytest.approx(0.06)


@pytest.mark.parametrize("freedom", [1, 4, 30.5, 1e25])
def test_the_detectable_difference_is_found_with_80_percent_power(freedom):
    """By SciPy's noncentral t: the share of tests that exceed the critical value."""
    rows = [("s", "5", "auc_mean", 0.03, 0.04, freedom), ("s", "5", "auc_mean", nan, 0.9, 9),
            ("s", "", "auc", 0.9, 0.9, 9), ("s", "5", "auc[age=>80]", 0.9, 0.9, 9)]     # none of these counts
    pairs = pd.DataFrame(rows, columns=["dataset", "labels", "metric", "se_runs", "se_patients", "freedom"])
    pairs["source"] = "stand-ins"
    sizes = pd.DataFrame({"images": ["9"], "patients": ["7"]}, index=["s"])
    found, = compare.detectable(pairs, sizes).itertuples()
    effect, degrees = found.detectable / 0.05, freedom
    power = stats.nct.sf(stats.t.ppf(0.975, degrees), degrees, effect)
    power = stats.norm.sf(1.959964 - effect) if degrees > 1e9 else power
    assert power == pytest.approx(0.8, abs=1e-3)
    assert (found.images, found.patients, found.pairs, found.se_runs) == ("9", "7", 1, 0.03)
    assert found.source == "stand-ins"


def test_the_detectable_difference_is_the_mean_over_pairs():
    rows = [("s", "5", "auc_mean", error, nan, 1e9, "our runs") for error in (0.01, 0.03)]
    columns = ["dataset", "labels", "metric", "se_runs", "se_patients", "freedom", "source"]
    found = compare.detectable(pd.DataFrame(rows, columns=columns), pd.DataFrame())
    in_errors = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert found.detectable[0] == pytest.approx(in_errors * 0.02, rel=1e-4)


# -------------------------------------------------------------------------------------- verdicts, constructed

SETS = ("nih_test", "vindr_test")
NOISE = np.array([-0.0012, 0.0012, 0, 0.0006, -0.0006])      # of five runs: 0.02 apart is clear, 0.0005 not


def world(**means):
    """Arms with five runs: {arm: mean AUC on each set}."""
    return {(exp, testset, "5|auc_mean||"): arm(mean + NOISE) for exp, both in means.items()
            for testset, mean in zip(SETS, both) if mean is not None}


def verdict(arms, test, left, right, margin=nan, metric="auc_mean5", sets=" ".join(SETS), more=()):
    claim = dict(id="1", family="F", place="", ours="0", statement="", test=test, metric=metric,
                 testsets=sets, left=left, right=right, margin=margin)
    table = compare.verdicts([claim, *more], arms)
    return table[table.id == "1"].set_index("testset")


def overall(*args, **named):
    return verdict(*args, **named).verdict["all"]


def test_greater_and_every():
    arms = world(a=(0.84, 0.84), b=(0.82, 0.82), c=(0.84, 0.8202), d=(0.80, 0.86))
    for test in ("greater", "every"):
        assert overall(arms, test, "a", "b") == "holds"
        assert overall(arms, test, "b", "a") == "contradicted"
        assert overall(arms, test, "c", "b") == "undecided"                  # one set is not clear
        assert overall(arms, test, "d", "b") == "contradicted"               # clearly less somewhere
        assert overall(arms, test, "x", "b") == "not run"
    assert verdict(arms, "greater", "d", "b").verdict.tolist() == ["contradicted", "holds", "contradicted"]
    assert overall(arms, "every", "a|d", "b|c") == "contradicted"            # pairwise: d against c on NIH
    assert overall(arms, "every", "a|c", "b") == "undecided"


def test_an_unknown_arm_leaves_a_verdict_open_and_is_named():
    arms = world(a=(0.84, 0.84), b=(0.82, None), d=(0.80, 0.80))
    table = verdict(arms, "every", "a", "b")
    assert table.verdict.tolist() == ["holds", "not run", "undecided"]
    assert "no 5 auc_mean of b on vindr_test" in table.remark["vindr_test"]
    assert table.remark["all"].startswith("not run on vindr_test") and "not run" not in table.remark["nih_test"]
    assert overall(arms, "every", "d", "b") == "contradicted"                # what is known is enough


def test_not_every_is_the_negation_of_every():
    arms = world(a=(0.84, 0.84), b=(0.82, 0.82), c=(0.84, 0.8202), d=(0.80, 0.86))
    assert overall(arms, "not_every", "d", "b") == "holds"                   # less on one set is enough
    assert overall(arms, "not_every", "a", "b") == "contradicted"
    assert overall(arms, "not_every", "c", "b") == "undecided"
    assert verdict(arms, "not_every", "d", "b").decided_by["all"] == "d - b, nih_test"


def test_no_gain_asks_every_upper_limit_to_lie_below_the_margin():
    arms = world(a=(0.82, 0.82), b=(0.82, 0.82), c=(0.828, 0.82), d=(0.84, 0.80))
    half = stats.t.ppf(0.975, 8) * np.sqrt(2 * np.var(NOISE, ddof=1) / 5)
    assert overall(arms, "no_gain", "a", "b", margin=half * 1.001) == "holds"
    assert overall(arms, "no_gain", "a", "b", margin=half * 0.999) == "undecided"
    assert overall(arms, "no_gain", "a|d", "b", margin=0.5) == "contradicted"   # clearly greater on NIH
    table = verdict(arms, "no_gain", "a|c", "b", margin=0.5)
    assert table.verdict["all"] == "contradicted" and table.decided_by["all"] == "c - b, nih_test"
    assert overall(arms, "no_gain", "a|x", "b", margin=0.5) == "undecided"      # of x no upper limit is known


def test_a_contradicted_no_gain_shows_what_contradicts_it():
    arms = world(a=(0.83, None), b=(0.80, None))
    arms["wide", "nih_test", "5|auc_mean||"] = arm(0.80 + 40 * NOISE)        # the largest upper limit, not clear
    row = verdict(arms, "no_gain", "a|wide", "b", margin=0.01, sets="nih_test").loc["nih_test"]
    assert (row.verdict, row.decided_by) == ("contradicted", "a - b, nih_test") and row.ci_low > 0


def test_highest_and_lowest_give_the_rank_too():
    arms = world(a=(0.84, 0.8302), b=(0.82, 0.83), c=(0.80, 0.80))
    for test, left, right, testset, expected, rank in (
            ("highest", "a", "b|c", "nih_test", "holds", "1 of 3"),
            ("highest", "b", "a|c", "nih_test", "contradicted", "2 of 3"),
            ("highest", "a", "b|c", "vindr_test", "undecided", "1 of 3"),
            ("lowest", "c", "a|b", "nih_test", "holds", "1 of 3"),
            ("lowest", "a", "b|c", "nih_test", "contradicted", "3 of 3"),
            ("lowest", "c", "a|b|x", "nih_test", "undecided", "1 of 3")):
        row = verdict(arms, test, left, right).loc[testset]
        assert (row.verdict, row["rank"]) == (expected, rank), (test, left, right)
    assert verdict(arms, "highest", "a", "b|c").decided_by["nih_test"] == "a - b, nih_test"
    assert verdict(arms, "lowest", "c", "a|b").decided_by["nih_test"] == "c - b, nih_test"


def test_no_winner():
    assert overall(world(a=(0.84, 0.80), b=(0.80, 0.84)), "no_winner", "a|b", "") == "holds"
    assert overall(world(a=(0.84, 0.84), b=(0.80, 0.80)), "no_winner", "a|b", "") == "contradicted"
    assert overall(world(a=(0.84, 0.8201), b=(0.80, 0.82)), "no_winner", "a|b", "") == "undecided"
    three = world(a=(0.84, 0.80), b=(0.82, 0.84), c=(0.86, 0.86))
    assert overall(three, "no_winner", "a|b|c", "") == "contradicted"


def test_most_is_more_than_half_of_the_arms():
    arms = {}
    for exp, (a, b) in {"a": (0.84, 0.80), "b": (0.84, 0.80), "c": (0.80, 0.84), "d": (0.80, 0.7999)}.items():
        for label, mean in (("A", a), ("B", b)):
            noise = np.random.default_rng(ord(exp) + ord(label)).normal(0, 0.001, 5)
            arms[exp, "nih_test", f"|auc|{label}|"] = arm(mean + noise)

    def most(exps, metric="auc:A-B"):
        return verdict(arms, "most", exps, "", metric=metric, sets="nih_test").loc["nih_test"]
    assert most("a|b|c").verdict == "holds" and most("a|b|c").remark.startswith("clearly so in 2 of 3 arms")
    assert most("a|b|c|d").verdict == "undecided"            # exactly half is not most
    assert most("a|b|c", "auc:B-A").verdict == "contradicted"


def test_a_verdict_does_not_depend_on_which_other_arms_exist():
    """Holm counts the family's comparisons that cannot be made: p = 0.03 alone is not clear beside two."""
    arms = world(a=(0.8217, None), b=(0.82, None))
    claim = dict(arms=arms, test="greater", left="a", right="b", sets="nih_test")
    alone = verdict(**claim)
    assert 0.02 < alone.p["nih_test"] < 0.05 and alone.verdict["nih_test"] == "holds"
    other = dict(id="2", family="F", place="", ours="0", statement="", test="greater", metric="auc_mean5",
                 testsets="nih_test vindr_test", left="x", right="b", margin=nan)
    beside = verdict(**claim, more=[other])
    assert beside.p_holm["nih_test"] == pytest.approx(3 * alone.p["nih_test"])
    assert beside.verdict["nih_test"] == "undecided"
    assert verdict(**claim, more=[other | {"family": "G"}]).verdict["nih_test"] == "holds"


def test_a_comparison_that_stands_in_several_claims_counts_once():
    arms = world(a=(0.8217, None), b=(0.82, None), c=(0.8216, None))
    claim = dict(arms=arms, test="greater", left="a", right="b", sets="nih_test")
    other = dict(id="2", family="F", place="", ours="0", statement="", test="not_every", metric="auc_mean5",
                 testsets="nih_test", left="a", right="b", margin=nan)
    alone = verdict(**claim).p["nih_test"]
    for same in (other, other | {"left": "b", "right": "a"}):                # as it is, turned round
        assert verdict(**claim, more=[same]).p_holm["nih_test"] == alone
    absent = [other | {"id": n, "left": f"x+0.{n}"} for n in "23"]             # two, neither can be made
    assert verdict(**claim, more=absent).p_holm["nih_test"] == pytest.approx(3 * alone)
    different = other | {"left": "c"}
    assert verdict(**claim, more=[different]).p_holm["nih_test"] == pytest.approx(2 * alone)


def test_both_directions_of_a_pair_count_once_in_no_winner():
    arms = world(a=(0.8216, None), b=(0.82, None))
    assert 0.025 < verdict(arms, "greater", "a", "b", sets="nih_test").p["nih_test"] < 0.05
    assert verdict(arms, "no_winner", "a|b", "", sets="nih_test").verdict["nih_test"] == "contradicted"


def test_a_known_arm_with_a_hyphen_is_no_difference():
    arms = world(**{"c.10-moco": (0.85, 0.85), "c.10": (0.80, 0.80), "moco": (0.1, 0.1), "b": (0.82, 0.80)})
    for left, right, effect in (("c.10-moco", "b", 0.03), ("c.10-moco@vindr_test", "b", 0.03),
                                ("c.10-moco-c.10", "b-c.10", 0.03), ("c.10-b", "b-c.10", -0.04)):
        found = verdict(arms, "greater", left, right, sets="nih_test")
        assert found.effect["nih_test"] == pytest.approx(effect), left


@pytest.mark.parametrize("left, right, metric, effect", [
    ("a", "always_negative", "mean_accuracy14@0.5", 0.75 - 0.9),
    ("a@t", "always_negative@t", "mean_accuracy@0.5", 0.65 - 0.5),
    ("a@t", "always_negative@s", "mean_accuracy@0.5", 0.65 - 0.7),
    ("a", "always_negative", "subset_accuracy@0.5", 0.3 - 0.2)])
def test_the_constant_answer_is_an_arm_of_its_own(left, right, metric, effect):
    arms = {("a", "s", "14|mean_accuracy||0.5"): 0.75, ("a", "s", "14|always_negative_accuracy||"): 0.9,
            ("a", "t", "5|mean_accuracy||0.5"): 0.65, ("a", "t", "5|always_negative_accuracy||"): 0.5,
            ("a", "s", "5|always_negative_accuracy||"): 0.7, ("a", "s", "5|subset_accuracy||0.5"): 0.3,
            ("a", "s", "5|always_negative_subset_accuracy||"): 0.2}
    arms = compare.complete({cell: arm([value, value]) for cell, value in arms.items()}, {})
    assert verdict(arms, "greater", left, right, metric=metric, sets="s").effect["s"] == pytest.approx(effect)


def test_operands():
    arms = world(a=(0.84, 0.82), b=(0.82, 0.82), **{"4.2.1-50k": (0.80, 0.80), "4.2.1-100k": (0.82, 0.82)})
    arms["a", "nih_test", "5|oracle_auc||0.1"] = arm([0.9, 0.92])
    arms["a", "nih_test", "5|random_referral_auc||0.1"] = arm([0.85, 0.86])
    arms["a", "nih_test", "5|always_negative_accuracy||"] = arm([0.7, 0.7])
    arms["a", "nih_test", "5|mean_accuracy||0.5"] = arm([0.8, 0.81])
    arms = compare.complete(arms, {})
    for left, right, metric, effect in (
            ("a-b", "4.2.1-100k-4.2.1-50k", "auc_mean5", 0.0), ("a", "b+0.01", "auc_mean5", 0.01),
            ("a@nih_test", "a@vindr_test", "auc_mean5", 0.02), ("4.2.1-100k", "4.2.1-50k", "auc_mean5", 0.02),
            ("a:uncertain", "a:random", "oracle_auc@0.10", 0.055),
            ("a", "always_negative", "mean_accuracy@0.5", 0.105),
            ("always_negative", "a", "mean_accuracy@0.5", -0.105),
            ("a", "", "auc_mean5-oracle_auc@0.1", -0.07)):
        found = verdict(arms, "greater", left, right, metric=metric, sets="nih_test")
        assert found.effect["nih_test"] == pytest.approx(effect), (left, right)


@pytest.mark.parametrize("left, right, metric, absent", [
    ("a:Edema", "a", "fnr@0.5", "no 5 fnr Edema 0.5 of a on s"),
    ("a:random", "a", "fnr@0.5", "no 5 fnr random 0.5 of a"),
    ("a:rare", "a", "oracle_auc@0.1", "no 5 oracle_auc rare 0.1 of a"),
    ("a", "always_negative", "fnr@0.5", "no 5 always_negative_fnr of always_negative")])
def test_what_a_claim_asks_of_no_arm_is_not_run(left, right, metric, absent):
    keys = "5|fnr||0.5", "5|oracle_auc||0.1", "5|random_referral_auc||0.5"
    arms = {("a", "s", key): arm([0.5, 0.6]) for key in keys}
    row = verdict(compare.complete(arms, {}), "greater", left, right, metric=metric, sets="s").loc["s"]
    assert row.verdict == "not run" and absent in row.remark


def test_the_mean_over_four_labels_is_that_of_the_labels_of_all_test_sets():
    rng, arms = np.random.default_rng(0), {}
    values = {label: rng.normal(0.8, 0.02, 3) for label in (*compare.FOUR_LABELS, "Edema")}
    for label, of in values.items():
        arms["a", "nih_test", f"|auc|{label}|"] = arm(of)
    arms["a", "vindr_test", "|auc|Effusion|"] = arm([0.7])       # three labels are missing: no mean
    known = compare.complete(arms, {})
    expected = sum(values[label] for label in compare.FOUR_LABELS) / 4
    assert known["a", "nih_test", "4|auc_mean||"].mean == pytest.approx(expected.mean())
    assert known["a", "nih_test", "4|auc_mean||"].sd == pytest.approx(expected.std(ddof=1))
    assert set(known) - set(arms) == {("a", "nih_test", "4|auc_mean||")}


def test_printed_cells_stand_in_for_absent_runs_and_best_runs_are_compared_with_best_runs():
    mean, fnr = ("a", "s", "5|auc_mean||"), ("a", "s", "5|fnr||0.1")
    runs = {mean: arm([0.8, 0.82]), fnr: arm([0.3, 0.4])}
    tables = {mean: printed(0.9, 0.01, 5), fnr: printed(0.25, nan, 5),
              ("b", *mean[1:]): printed(0.7, 0.01, 5)}
    known = compare.complete(runs, tables)
    assert known[mean].mean == 0.81 and known["b", "s", "5|auc_mean||"].source == "printed"
    assert known[fnr].mean == 0.25                           # Table 7 prints one run of each arm, the best


def test_arms_that_saw_the_test_images_in_pre_training_say_so():
    arms = world(**{"3.1": (0.84, 0.84), "3.3": (0.82, 0.82)})
    table = verdict(arms, "greater", "3.1", "3.3")
    assert "22,772 of 25,596" in table.remark["nih_test"] and "22,772" in table.remark["all"]
    assert "22,772" not in table.remark["vindr_test"]
    assert "22,772" not in verdict(arms, "greater", "3.3", "3.3").remark["nih_test"]


def test_the_remark_on_seen_test_images_is_not_cut_off_and_its_arms_are_those_of_the_report():
    shown = yaml.safe_load((ROOT / "evaluate/report.yaml").read_text())
    rows = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    assert {exp for exp in rows if compare.SAW_TEST.fullmatch(exp)} == set(shown["saw NIH test"])
    assert compare.SAW_TEST.fullmatch("3.2-ensemble")
    arms = world(**{"3.1": (0.84, 0.84), "z": (0.82, 0.82)})
    row = verdict(arms, "every", "p|q|r|s|t|3.1", "z", sets="nih_test").loc["nih_test"]
    assert row.remark.startswith("an arm saw NIH test images") and "no 5 auc_mean of p" in row.remark


@pytest.mark.parametrize("testset, labels", [("chexpert_test", 5), ("vindr_test", 4)])
def test_spreads_are_compared_by_the_log_ratio_over_arms_on_the_same_labels(testset, labels):
    rng, arms, ratios = np.random.default_rng(0), {}, []
    for exp in ("1.1", "2.1", "3.4"):
        spreads = []
        for place, width in (("nih_test", 0.002), (testset, 0.01)):
            values = 0.8 + width * rng.normal(size=4)
            arms[exp, place, f"{labels}|auc_mean||"] = arm(values)
            arms[exp, place, f"{9 - labels}|auc_mean||"] = arm(values[::-1] ** 2)
            spreads.append(np.std(values, ddof=1))
        ratios.append(np.log(spreads[1] / spreads[0]))
    arms["2.3", testset, f"{labels}|auc_mean||"] = printed(0.8, 0.01, 5)     # not known on NIH: left out
    found = verdict(arms, "greater", "sd(ood)", "sd(nih_test)", sets=testset).loc[testset]
    expected = stats.ttest_1samp(ratios, 0)
    assert found.effect == pytest.approx(np.mean(ratios)) and found.p == pytest.approx(expected.pvalue)
    assert found.ci_low == pytest.approx(expected.confidence_interval().low)
    assert found.remark == "log ratio of the sd over runs, 3 arms; a smaller test set spreads them more"


# ------------------------------------------------------------------------------------ the study's own claims

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The tables made of the published and printed numbers, through the command line."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        run_here(compare, patch, "--reported", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def decided(published):
    return pd.read_csv(published / "verdicts.csv", dtype={"id": str, "rank": str})


def test_printed_csv_holds_every_cell_of_tables_2_to_8_once():
    """number, exp, dataset, labels, metric, label, threshold, value, sd; of tables 7 and 8 the best run of each arm."""
    def table(number):
        return pd.read_csv(REPORTED / f"table{number}.csv", dtype=str, keep_default_na=False).itertuples()
    cells = [("2", r.exp, r.testset, r.classes, "auc_mean", "", "", r.auc_mean, r.auc_sd) for r in table(2)]
    cells += [("2", *cell[1:3], "4", *cell[4:]) for cell in cells       # they have no edema
              if cell[2] in ("vindr_test", "padchest") and cell[3] == "5"]
    cells += [("3", r.exp, r.testset, "", "auc", r.label, "", r.auc_mean, r.auc_sd) for r in table(3)]
    nih = [("4", r.exp, r.auc_a, r.sd_a) for r in table(4)] + [("4", f"{r.exp}b", r.auc_b, r.sd_b) for r in table(4)]
    nih += [("5", r.exp, r.auc_36 or r.auc_35, r.sd_36 or r.sd_35) for r in table(5)]   # two rows by recipe b alone
    nih += [("5", f"{r.exp}b", r.auc_35, r.sd_35) for r in table(5)]
    nih += [("6", f"{r.exp}-{int(r.pretraining_images) // 1000}k", r.auc_mean, r.auc_sd) for r in table(6)]
    cells += [(number, exp, "nih_test", "14", "auc_mean", "", "", *texts) for number, exp, *texts in nih]
    names = {"Mean accuracy": "mean_accuracy", "Subset accuracy": "subset_accuracy", "FNR": "fnr",
             "Calibration error": "calibration_error"}
    best = [("7p", r.exp, names[r.metric], r.threshold, r.value) for r in table(7)]
    best += [("8p", r.exp, "oracle_auc", r.referred, r.oracle_auc) for r in table(8)]
    cells += [(number, exp, "chexpert_valid", "5", metric, "", threshold, value, "")
              for number, exp, metric, threshold, value in best]
    negative = np.mean([float(r.accuracy) for r in table("7_random_guess")])
    cells.append(("7", "always_negative", "chexpert_valid", "5", "always_negative_accuracy", "", "",
                  f"{negative:.5f}", "0"))
    text = pd.read_csv(REPORTED / "text_numbers.csv", dtype=str).set_index("id").loc["exp0.1.7_val20"]
    cells.append(("text", "0.1.7", "nih_val", "14", "auc_mean", "", "", text.value, text.sd))
    found = pd.read_csv(REPORTED / "printed.csv", dtype=str, keep_default_na=False)
    kept = found[["number", "exp", "dataset", "labels", "metric", "label", "threshold", "value", "sd"]]
    assert sorted(kept.itertuples(index=False, name=None)) == sorted(cells)
    resnet, best = found.exp.str.startswith("1."), found.number.isin(["7p", "8p"])
    assert set(found.runs[resnet & ~best]) == {"3"} and set(found.runs[best]) == {"1"}
    assert set(found.runs[~resnet & ~best & (found.number != "7")]) == {"5"}
    assert (found.variant == np.where(best, "best", "corrected")).all()


def published_runs():
    return pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype=str).astype({"auc": float})


def test_arms_of_the_published_runs_are_their_mean_and_sd(published):
    runs = published_runs()
    runs = runs[(runs.auc > 0) & ((runs.label == "mean") | (runs.classes == "5"))]    # 0.0: "no positives"
    runs["place"] = runs.label.where(runs.label != "mean", runs.classes)
    expected = runs.groupby(["exp", "testset", "place"]).auc.agg(["mean", "std"])
    arms = pd.read_csv(published / "arms.csv", dtype={"exp": str, "labels": str})
    arms = arms[arms.metric.isin(["auc", "auc_mean"])]
    found = arms.set_index(["exp", "dataset", arms.label.fillna(arms.labels)])[["value", "sd"]].sort_index()
    assert list(found.index) == list(expected.index)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_labels_of_the_published_14_class_runs_are_misnamed_for_vits():
    """Why they are left out: what stands under NIH's k-th label is the AUC of the k-th in the alphabet."""
    nih = published_runs().query("testset == 'nih_test' and label != 'mean'")
    five, fourteen = (nih[nih.classes == classes].pivot(index=["exp", "seed"], columns="label", values="auc")
                      for classes in ("5", "14"))
    renamed = fourteen[list(metrics.NIH14)].set_axis(sorted(metrics.NIH14), axis=1)
    resnet = five.index.get_level_values("exp").isin(["1.1", "1.2"])
    assert (five == fourteen[five.columns]).all(axis=1).tolist() == resnet.tolist()
    assert (five == renamed[five.columns]).all(axis=1).tolist() == (~resnet).tolist()


def test_claims_on_the_published_numbers(decided):
    last = decided.drop_duplicates("id", keep="last").set_index("id")
    assert last.verdict.value_counts().to_dict() == {
        "holds": 32, "undecided": 31, "not run": 3, "contradicted": 2}
    assert set(last.index[last.verdict == "contradicted"]) == {"F10", "K2"}
    assert set(last.index[last.verdict == "not run"]) == {"L2", "M2", "N8"}          # in no run and no table
    one = decided[(decided.id == "A1")].set_index("testset")
    assert one.verdict.to_dict() == {**dict.fromkeys(one.index, "holds")}
    assert one.effect["nih_test"] == pytest.approx(0.8198 - 0.8052, abs=2e-4)
    measured = decided[decided.effect.notna() & (decided.family != "H")]  # H is about spreads themselves
    assert measured.remark.str.contains("seeds only").all()
    assert last["rank"]["N1s"] == "3 of 5" and last["rank"]["N6"] == "1 of 9"
    undecided = last.loc["N9"]  # one printed run: an effect, no spread
    assert undecided.effect == pytest.approx(0.7545 - 0.72378, abs=1e-4) and np.isnan(undecided.ci_low)


def test_a_printed_pair_is_welchs_test_on_table_2(decided):
    printed = pd.read_csv(REPORTED / "table2.csv", dtype=str).set_index(["exp", "testset", "classes"])
    cells = [printed.loc[(exp, "nih_test", "5")].astype(float) for exp in ("3.3", "2.3")]
    runs = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype=str).query(
        "exp == '3.3' and testset == 'nih_test' and classes == '5' and label == 'mean'").auc.astype(float)
    expected = stats.ttest_ind_from_stats(runs.mean(), runs.std(), 5, cells[1].auc_mean, cells[1].auc_sd, 5,
                                          equal_var=False)
    resnet = decided[(decided.id == "F2") & (decided.testset == "vindr_test")].iloc[0]       # of three runs
    ours, theirs = (printed.loc[(exp, "vindr_test", "5")].astype(float) for exp in ("3.2", "1.2"))
    three = stats.ttest_ind_from_stats(ours.auc_mean, ours.auc_sd, 5, theirs.auc_mean, theirs.auc_sd, 3,
                                       equal_var=False)
    assert resnet.p == pytest.approx(three.pvalue, rel=0.02)                # ours are published unrounded
    found = decided[(decided.id == "C1") & (decided.testset == "nih_test")].iloc[0]
    assert found.p == pytest.approx(expected.pvalue, rel=1e-5)
    assert found.source == "printed and published runs"


# ------------------------------------------------------------------------------------------------ the command

def score(tmp_path, monkeypatch, arms, seeds=(0, 1, 2), patients=60, bootstrap=200):
    """metrics.csv and draws.npz of drawn predictions: {arm: how well it tells}."""
    rng, files = np.random.default_rng(0), []
    labels = list(metrics.STUDY5)
    y = rng.integers(0, 2, (120, 5))
    for (exp, strength), seed in itertools.product(arms.items(), seeds):
        logits = strength * y + rng.normal(size=y.shape)
        frame = pd.DataFrame({"path": range(120), "patient": np.arange(120) % patients})
        frame[[f"true_{label}" for label in labels]] = y
        frame[[f"prob_{label}" for label in labels]] = 1 / (1 + np.exp(-logits))
        files.append(tmp_path / f"runs/{exp}/predictions/seed{seed}/nih_test.csv")
        files[-1].parent.mkdir(parents=True)
        frame.to_csv(files[-1], index=False)
    run_here(metrics, monkeypatch, *files, "--out", tmp_path / "metrics.csv", "--bootstrap", bootstrap,
             "--workers", 1)
    return tmp_path / "metrics.csv"


def test_two_arms_are_compared_without_claims(tmp_path, monkeypatch, capsys):
    path = score(tmp_path, monkeypatch, {"good": 2.0, "fair": 1.0, "bad": 0.5})
    capsys.readouterr()
    run_here(compare, monkeypatch, "--metrics", path, "--arms", "good", "bad", "--out", tmp_path / "two")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "auc_mean" in line)
    n_rows = len(pd.read_csv(tmp_path / "two/two_arms.csv"))
    assert said.startswith(f"effect: good less bad; --out writes all {n_rows} metrics\n") and "ece" not in said
    rows = pd.read_csv(path).query("metric == 'auc_mean' and variant == 'corrected'")
    values = rows.groupby("exp").value.mean()
    assert f"{values['good']:.4f}" in line and f"{values['bad']:.4f}" in line
    assert f"{values['good'] - values['bad']:.4f}" in line
    two = pd.read_csv(tmp_path / "two/two_arms.csv").query("metric == 'auc_mean'").iloc[0]
    assert two.effect == pytest.approx(two["left_value"] - two["right_value"], abs=1e-5)
    assert 0 < two.ci_low < two.effect < two.ci_high
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["two_arms.csv"]
    with np.load(tmp_path / "draws.npz") as file:
        place = file["good/0/nih_test/rows"].tolist().index("5|auc_mean||")
        pooled = [np.mean([file[f"{exp}/{seed}/nih_test"][place] for seed in range(3)], 0, dtype=float)
                  for exp in ("good", "bad")]
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "out")
    pairs = pd.read_csv(tmp_path / "out/comparisons.csv").query("label.isna()")
    pair = pairs.query("left == 'good' and right == 'bad'").iloc[0]
    assert pair.se_patients == pytest.approx(np.std(pooled[0] - pooled[1]), rel=1e-4)
    assert (pair.effect, pair.p) == (two.effect, two.p) and pair.ci_low > 0 and pair.p < 0.05
    for _, family in pairs.groupby(pairs.left.str.endswith("-ensemble")):   # these know no spread over runs
        np.testing.assert_allclose(family.p_holm, compare.holm(family.p), rtol=1e-4)
    assert (pairs.p_holm > pairs.p).any() and set(pairs.source) == {"our runs"}


def test_every_metric_with_resamples_has_an_interval_over_runs_and_patients(tmp_path, monkeypatch):
    path = score(tmp_path, monkeypatch, {"3.4": 2.0, "2.2": 1.0})
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "out")
    arms = pd.read_csv(tmp_path / "out/arms.csv")
    assert set(arms.exp) == {"2.2", "2.2-ensemble", "3.4", "3.4-ensemble"}
    pairs = pd.read_csv(tmp_path / "out/comparisons.csv")
    ends = arms[["ci_low", "ci_high"]].stack().dropna()
    assert ends.between(0, 1).all() and (ends == 1).any()                   # shares and areas
    kinds = {frozenset(pair) for pair in zip(pairs.left, pairs.right)}
    assert kinds == {frozenset(("2.2", "3.4")), frozenset(("2.2-ensemble", "3.4-ensemble"))}
    run_here(compare, monkeypatch, "--metrics", path, "--arms", "3.4", "3.4-ensemble")      # who asks, gets
    means = arms[(arms.exp == "3.4") & arms.label.isna()].fillna({"threshold": -1})
    means = means.set_index(["metric", "threshold"])
    for metric, threshold in (("auprc", -1), ("ece", -1), ("fnr", 0.3), ("subset_accuracy", 0.5),
                              ("oracle_auc", 0.1)):
        row = means.loc[(metric, threshold)]
        assert float(row.ci_low) < float(row.value) < float(row.ci_high), metric
        assert float(row.se_patients) > 0, metric
    verdicts = pd.read_csv(tmp_path / "out/verdicts.csv")
    assert len(set(verdicts.id)) == 68 and (verdicts.query("id == 'A2'").verdict == "not run").all()
    one = verdicts.query("id == 'A1' and testset == 'nih_test'").iloc[0]
    pair = pd.read_csv(tmp_path / "out/comparisons.csv").query("metric == 'auc_mean'")
    pair = pair.query("left == '3.4' and right == '2.2'").iloc[0]
    assert (one.effect, one.ci_low, one.p) == (pair.effect, pair.ci_low, pair.p)


def test_other_peoples_claims_and_the_constant_answer(tmp_path, monkeypatch):
    path = score(tmp_path, monkeypatch, {"x": 1.2, "y": 0.2})
    (tmp_path / "claims.csv").write_text(
        "id,family,place,ours,statement,test,metric,testsets,left,right,margin\n"
        "1,A,,1,x beats y,greater,auc_mean5,nih_test,x,y,\n"
        "2,A,,1,x beats a constant,greater,mean_accuracy@0.5,nih_test,x,always_negative,\n"
        "3,B,,1,asking helps,greater,oracle_auc@0.25-oracle_auc@0,nih_test,x,,\n")
    run_here(compare, monkeypatch, "--metrics", path, "--claims", tmp_path / "claims.csv", "--out", tmp_path)
    found = pd.read_csv(tmp_path / "verdicts.csv").set_index("id")
    assert found.verdict.tolist() == ["holds"] * 3
    rows = pd.read_csv(path).query("exp == 'x' and variant == 'corrected' and labels == 5")
    accuracy = rows.query("metric == 'mean_accuracy' and threshold == 0.5").value.mean()
    negative = rows.query("metric == 'always_negative_accuracy'").value.iloc[0]
    assert found.effect[2] == pytest.approx(accuracy - negative, abs=1e-5)


def test_claims_on_ones_own_labels(tmp_path, monkeypatch):
    rng, files, labels = np.random.default_rng(0), [], ["Größe > 5 mm", "a & b", "Support Devices"]
    y = rng.integers(0, 2, (90, 3))
    for exp, strength in {"x (1)": 2.0, "y": 0.2}.items():
        p = 1 / (1 + np.exp(-strength * y - rng.normal(size=y.shape)))
        frame = pd.DataFrame({"path": range(90), "patient": range(90)})
        for k, label in enumerate(labels):
            frame[f"true_{label}"], frame[f"prob_{label}"] = y[:, k], p[:, k]
        files.append(tmp_path / f"{exp}.csv")
        frame.to_csv(files[-1], index=False)
    run_here(metrics, monkeypatch, *files, "--out", tmp_path / "metrics.csv", "--bootstrap", 200, "--workers", 1)
    (tmp_path / "claims.csv").write_text(
        "id,family,place,ours,statement,test,metric,testsets,left,right,margin\n"
        "1,A,,1,mean,greater,auc_meanall,test,x (1),y,\n"
        "2,A,,1,threshold,greater,mean_accuracyall@0.5,test,x (1),y,\n"
        "3,A,,1,label,greater,auc,test,x (1):Größe > 5 mm,y:a & b,\n"
        "4,A,,1,labels of one arm,greater,auc:a & b-Support Devices,test,x (1),,\n")
    run_here(compare, monkeypatch, "--metrics", tmp_path / "metrics.csv", "--claims", tmp_path / "claims.csv",
             "--out", tmp_path)
    effects = pd.read_csv(tmp_path / "verdicts.csv").effect
    found = pd.read_csv(tmp_path / "metrics.csv", dtype=str, keep_default_na=False)
    found = found.query("variant == 'corrected'").set_index(["exp", "metric", "label", "labels", "threshold"]).value

    def value(exp, metric, label="", labels="", threshold=""):
        return float(found[exp, metric, label, labels, threshold])
    expected = [value("x (1)", "auc_mean", "", "all") - value("y", "auc_mean", "", "all"),
                value("x (1)", "mean_accuracy", "", "all", "0.5") - value("y", "mean_accuracy", "", "all", "0.5"),
                value("x (1)", "auc", labels[0]) - value("y", "auc", labels[1]),
                value("x (1)", "auc", labels[1]) - value("x (1)", "auc", labels[2])]
    assert effects.tolist() == pytest.approx(expected, abs=1e-5)


def test_arms_called_like_a_column_keep_their_values(tmp_path, monkeypatch, capsys):
    path = score(tmp_path, monkeypatch, {"p": 8.0, "effect": 0.5}, seeds=(0,))
    capsys.readouterr()
    run_here(compare, monkeypatch, "--metrics", path, "--arms", "p", "effect", "--out", tmp_path / "two")
    two = pd.read_csv(tmp_path / "two/two_arms.csv").query("metric == 'auc_mean'").iloc[0]
    assert two["left_value"] - two["right_value"] == pytest.approx(two.effect, abs=1e-5) and two.p < 1e-4
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "all")
    pairs = (tmp_path / "all/comparisons.csv").read_text()                  # without ensembles: six digits
    assert "p,effect" in pairs and "." in pairs and not re.search(r"\.\d{13}", pairs)
    assert "-0.0000" not in capsys.readouterr().out


def test_the_claims_differ_from_the_first_list_where_it_said_more_than_the_paper(shared):
    first, ours = (pd.read_csv(folder / "claims.csv", dtype=str, keep_default_na=False).set_index("id")
                   for folder in (shared / "reported", REPORTED))
    assert set(ours.index) - set(first.index) == {"P1"} and set(first.index) <= set(ours.index)
    differs = (ours.loc[first.index] != first).stack()
    fairer = {("O3", "statement"), ("B5", "statement"), ("C1", "statement"), ("C2", "statement"), ("K1", "place"),
              ("K2", "ours"), ("O1", "ours")}
    reliability = [name for name in ours.index if name.startswith("N") and name < "N7"]     # of chest X-ray arms
    fairer |= {(name, column) for name in reliability for column in ("statement", "right")}
    assert set(differs.index[differs]) == fairer and "lies above" in ours.statement["O3"]


def test_verdicts_on_stand_ins_say_so(tmp_path, monkeypatch, capsys):
    path = score(tmp_path, monkeypatch, {"3.4": 2.0, "2.2": 0.2})
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[frame.exp == "3.4", "stand_in"] = "drawn by data_prep/demo.py"
    frame.to_csv(path, index=False)
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path)
    table = pd.read_csv(tmp_path / "verdicts.csv").query("testset == 'nih_test'").set_index("id")
    assert table.source["A1"] == "our runs and stand-ins"
    assert set(pd.read_csv(tmp_path / "arms.csv").query("exp == '3.4'").source) == {"stand-ins"}
    assert "our runs and stand-ins" in capsys.readouterr().out


def test_what_metrics_csv_lacks_is_not_compared(tmp_path, monkeypatch):
    path = score(tmp_path, monkeypatch, {"a": 1.0}, seeds=(0,))
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame[frame.metric != "fnr"].to_csv(path, index=False)
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "out")
    metrics_left = set(pd.read_csv(tmp_path / "out/arms.csv").metric)
    assert "ece" in metrics_left and "fnr" not in metrics_left
    assert (tmp_path / "out/comparisons.csv").read_text().count("\n") == 1          # one arm has no pair


def test_without_resamples_the_interval_is_welchs(tmp_path, monkeypatch):
    path = score(tmp_path, monkeypatch, {"a": 1.0, "b": 0.5}, bootstrap=0)
    run_here(compare, monkeypatch, "--metrics", path, "--arms", "a", "b", "--out", tmp_path / "out")
    found = pd.read_csv(tmp_path / "out/two_arms.csv").query("metric == 'auprc'").iloc[0]
    rows = pd.read_csv(path).query("metric == 'auprc' and variant == 'corrected' and labels == 5")
    values = [rows[rows.exp == exp].value for exp in "ab"]
    assert found.p == pytest.approx(stats.ttest_ind(*values, equal_var=False).pvalue, rel=1e-4)
    assert found.remark == "seeds only"


@pytest.mark.parametrize("change, said", [
    (dict(draws=None), "draws.npz is not as"), (dict(draws=b"PK\x03\x04 cut short"), "draws.npz is not as"),
    (dict(flags=["--arms", "a", "z"]), "both 'a' and 'z'; known: a"),
    (dict(flags=["--claims", "gone.csv"]), "gone.csv does not exist: give --claims FILE, or --arms LEFT RIGHT"),
    (dict(claim="1,A,,0,s,greater,auc_mean5,nih_test,a b,c,"), "claim 1: 'auc_mean5' of 'a b' cannot"),
    (dict(claim="1,A,,0,s,greater,auc_mean5@x,nih_test,a,c,"), "claim 1: 'auc_mean5@x' of 'a' cannot"),
    (dict(claim="1,A,,0,s,greater,auc_mean5,nih_test,,c,"), "claim 1: 'auc_mean5' of '' cannot"),
    (dict(claim="1,A,,0,s,better,auc_mean5,nih_test,a,c,"), "claim 1: needs test sets, a test of greater"),
    (dict(claim="1,A,,0,s,greater,auc_mean5,,a,c,"), "claim 1: needs test sets, a test of greater"),
    (dict(claim="1,A,,0,s,no_gain,auc_mean5,nih_test,a,c,little"), "no_gain a margin"),
    (dict(claim="1,A,,0,s,no_winner,auc_mean5,nih_test,a,,"), "no_winner several arms")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, change, said):
    path = score(tmp_path, monkeypatch, {"a": 1.0}, seeds=(0,))
    claims = tmp_path / "claims.csv"
    row = change.get("claim", "1,A,,0,s,greater,auc_mean5,nih_test,a,b,")
    claims.write_text(",".join(compare.CLAIM) + "\n" + row + "\n")
    if "draws" in change:
        (tmp_path / "draws.npz").unlink()
        if change["draws"]:
            (tmp_path / "draws.npz").write_bytes(change["draws"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_here(compare, monkeypatch, "--metrics", path, "--claims", claims, "--out", tmp_path / "out",
                 *change.get("flags", []))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert said in error and not (tmp_path / "out").exists(), error
