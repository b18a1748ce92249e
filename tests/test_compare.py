"""evaluate/compare.py against SciPy, simulation, loops and constructed arms; the claims of the paper."""

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, load_script, run_here
from scipy import stats

compare = load_script("evaluate/compare.py")
metrics = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
nan = np.nan


# ------------------------------------------------------------------------------------------------ statistics

def test_two_arms_without_resamples_are_compared_by_welchs_test():
    left, right = [0.81, 0.83, 0.80, 0.84, 0.82], [0.78, 0.80, 0.79]
    found = compare.estimate([(1, compare.make_arm(left)), (-1, compare.make_arm(right))])
    expected = stats.ttest_ind(left, right, equal_var=False)
    interval = expected.confidence_interval()
    assert found.effect == pytest.approx(np.mean(left) - np.mean(right))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p == pytest.approx(expected.pvalue) and found.freedom == pytest.approx(expected.df)
    assert np.isnan(found.se_patients)


def test_printed_cells_are_compared_by_welchs_test_of_mean_sd_and_n():
    numbers = compare.Numbers("published runs")
    numbers.printed = {
        ("a", "s", "5|auc_mean||"): (0.81, 0.002, 5),
        ("b", "s", "5|auc_mean||"): (0.80, 0.009, 3),
    }
    found, remarks, sources = compare.compare(
        numbers, [(1, "a", "s", "5|auc_mean||"), (-1, "b", "s", "5|auc_mean||")]
    )
    expected = stats.ttest_ind_from_stats(0.81, 0.002, 5, 0.80, 0.009, 3, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue) and remarks == ["seeds only"] and sources == {"printed"}


def test_one_arm_on_both_sides_is_paired_by_run():
    numbers = compare.Numbers("our runs")
    left, right = [0.80, 0.82, 0.79, 0.85], [0.78, 0.81, 0.76, 0.84]
    for key, values in (("|auc|A|", left), ("|auc|B|", right)):
        numbers.values["a", "s", key] = dict(zip("0123", values))
    found, _, _ = compare.compare(numbers, [(1, "a", "s", "|auc|A|"), (-1, "a", "s", "|auc|B|")])
    assert found.p == pytest.approx(stats.ttest_rel(left, right).pvalue)
    difference, _, _ = compare.compare(numbers, [(1, "a", "s", "|auc|A|"), (-1, "a", "s", "|auc|B|")], 0.01)
    assert difference.effect == pytest.approx(found.effect - 0.01)


def test_the_parts_of_the_error_are_those_of_runs_and_patients():
    """Scores = run + patient + run x patient: with many of both, the two parts are the known variances."""
    rng = np.random.default_rng(0)
    runs, patients = 400, 300
    common, own = rng.normal(size=patients), rng.normal(size=(runs, patients)) * 2
    scores = 0.05 * rng.normal(size=(runs, 1)) + common + own
    counts = rng.multinomial(patients, [1 / patients] * patients, size=800) / patients
    found = compare.estimate([(1, compare.make_arm(scores.mean(1), scores @ counts.T))])
    assert found.se_patients == pytest.approx(common.std() / np.sqrt(patients), rel=0.1)
    assert found.se_runs == pytest.approx(
        0.05 / np.sqrt(runs), rel=0.4
    )  # s^2 less 4 / 300 from run x patient
    assert found.high - found.effect == pytest.approx(
        stats.t.ppf(0.975, found.freedom) * np.hypot(found.se_runs, found.se_patients))
    assert found.p == pytest.approx(
        2 * stats.t.sf(abs(found.effect) / np.hypot(found.se_runs, found.se_patients), found.freedom))


def coverage(runs, spread, arms, simulations=1200):
    """Share of simulated 95 % intervals that hold 0; spread: sd of a run's effect."""
    rng, hits, patients = np.random.default_rng(runs), 0, 60
    for _ in range(simulations):
        counts = rng.multinomial(patients, [1 / patients] * patients, size=200) / patients
        common, terms = rng.normal(size=patients) * 0.5, []
        for sign in (1, -1)[:arms]:
            scores = rng.normal(size=(runs, 1)) * spread + common + rng.normal(size=patients) * 0.3
            scores = scores + rng.normal(size=(runs, patients)) * 0.5
            terms.append((sign, compare.make_arm(scores.mean(1), scores @ counts.T)))
        result = compare.estimate(terms)
        hits += result.low <= 0 <= result.high
    return hits / simulations


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.5, 0.0])                # runs dominate, patients dominate
def test_the_interval_of_a_pair_covers_the_truth(runs, spread):
    assert 0.93 <= coverage(runs, spread, 2) <= 0.98 - 0.005 * (spread > 0)


def test_the_interval_of_one_arm_with_two_runs_covers_less_as_the_help_says():
    assert 0.84 <= coverage(2, 0.5, 1) <= 0.90
    assert 0.91 <= coverage(5, 0.5, 1) <= 0.96


def test_an_arm_of_one_run_is_judged_by_patients_and_says_so():
    draws = np.random.default_rng(0).normal(0.8, 0.01, (1, 500))
    found = compare.estimate([(1, compare.make_arm([0.8], draws))])
    assert found.high - 0.8 == pytest.approx(stats.norm.ppf(0.975) * draws.std()) and np.isnan(found.se_runs)
    assert np.isnan(compare.estimate([(1, compare.make_arm([0.8]))]).p)          # nothing is known
    numbers = compare.Numbers("our runs")
    numbers.values["a", "s", "k"], numbers.draws["a", "s", "k"] = {"0": 0.8}, {"0": draws[0]}
    assert compare.compare(numbers, [(1, "a", "s", "k")])[1] == [
        "an arm has one run, whose spread is unknown"
    ]


def test_holm_is_the_step_down_loop_and_absent_comparisons_count():
    p = [0.01, 0.04, 0.03, nan, 0.005]
    expected, running = {}, 0.0
    for step, (value, place) in enumerate(sorted((1.0 if np.isnan(v) else v, i) for i, v in enumerate(p))):
        running = max(running, min(1, (5 - step) * value))
        expected[place] = running
    np.testing.assert_allclose(compare.holm(p), [expected[i] for i in range(5)])
    assert compare.holm([0.02])[0] == 0.02 and compare.holm([0.02, nan, nan])[0] == pytest.approx(0.06)


def test_the_detectable_difference_is_found_with_80_percent_power():
    for freedom in (3, 8, 1e6):
        shift = compare.noncentrality(freedom)
        power = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift)
        assert power == pytest.approx(0.8, abs=1e-3)


# -------------------------------------------------------------------------------------- verdicts, constructed

SETS = ("nih_test", "vindr_test")


def world(**arms):
    """Numbers with five runs an arm: {arm: mean on each set}; sd 0.001: 0.02 apart is clear, 0.0005 not."""
    numbers = compare.Numbers("our runs")
    for exp, means in arms.items():
        for testset, mean in zip(SETS, means):
            if mean is not None:
                values = mean + np.array([-0.0012, 0.0012, 0, 0.0006, -0.0006])
                numbers.values[exp, testset, "5|auc_mean||"] = dict(zip("01234", values))
    return numbers


def verdict(
    numbers, test, left, right, margin="", metric="auc_mean5", sets=" ".join(SETS), family="F", more=()
):
    claim = dict(id="1", family=family, place="", ours="0", statement="", test=test, metric=metric,
                 testsets=sets, left=left, right=right, margin=margin)
    table = compare.verdicts([claim, *more], numbers)
    return table[table.id == "1"].set_index("testset")


def overall(*args, **named):
    return verdict(*args, **named).verdict["all"]


def test_greater_and_every():
    numbers = world(a=(0.84, 0.84), b=(0.82, 0.82), c=(0.84, 0.8202), d=(0.80, 0.86))
    for test in ("greater", "every"):
        assert overall(numbers, test, "a", "b") == "holds"
        assert overall(numbers, test, "b", "a") == "contradicted"
        assert overall(numbers, test, "c", "b") == "undecided"                  # one set is not clear
        assert overall(numbers, test, "d", "b") == "contradicted"               # clearly less somewhere
        assert overall(numbers, test, "x", "b") == "not run"
    table = verdict(numbers, "greater", "d", "b")
    assert table.verdict.tolist() == ["contradicted", "holds", "contradicted"]
    assert "holds on 1 of 2 test sets" in table.remark["all"]
    assert overall(numbers, "every", "a|d", "b|c") == "contradicted"            # pairwise: d against c on NIH
    assert overall(numbers, "every", "a|c", "b") == "undecided"


def test_not_every_is_the_negation_of_every():
    numbers = world(a=(0.84, 0.84), b=(0.82, 0.82), c=(0.84, 0.8202), d=(0.80, 0.86))
    assert overall(numbers, "not_every", "d", "b") == "holds"                   # less on one set is enough
    assert overall(numbers, "not_every", "a", "b") == "contradicted"
    assert overall(numbers, "not_every", "c", "b") == "undecided"
    assert verdict(numbers, "not_every", "d", "b").decided_by["all"] == "d - b, nih_test"


def test_no_gain_asks_every_upper_limit_to_lie_below_the_margin():
    numbers = world(a=(0.82, 0.82), b=(0.82, 0.82), c=(0.828, 0.82), d=(0.84, 0.80))
    half = stats.t.ppf(0.975, 8) * np.sqrt(2 * np.var([-0.0012, 0.0012, 0, 0.0006, -0.0006], ddof=1) / 5)
    assert overall(numbers, "no_gain", "a", "b", margin=half * 1.001) == "holds"
    assert overall(numbers, "no_gain", "a", "b", margin=half * 0.999) == "undecided"
    assert overall(numbers, "no_gain", "a|d", "b", margin=0.5) == "contradicted"  # clearly greater on NIH
    table = verdict(numbers, "no_gain", "a|c", "b", margin="0.5")
    assert table.verdict["all"] == "contradicted" and table.decided_by["all"] == "c - b, nih_test"


def test_highest_and_lowest_give_the_rank_too():
    numbers = world(a=(0.84, 0.8302), b=(0.82, 0.83), c=(0.80, 0.80))
    assert verdict(numbers, "highest", "a", "b|c").verdict["nih_test"] == "holds"
    assert verdict(numbers, "highest", "a", "b|c")["rank"]["nih_test"] == "1 of 3"
    assert verdict(numbers, "highest", "b", "a|c").verdict["nih_test"] == "contradicted"
    assert verdict(numbers, "highest", "b", "a|c")["rank"]["nih_test"] == "2 of 3"
    assert verdict(numbers, "highest", "a", "b|c").verdict["vindr_test"] == "undecided"
    assert verdict(numbers, "lowest", "c", "a|b").verdict["nih_test"] == "holds"
    assert verdict(numbers, "lowest", "c", "a|b")["rank"]["nih_test"] == "1 of 3"
    assert verdict(numbers, "lowest", "a", "b|c").verdict["nih_test"] == "contradicted"
    assert verdict(numbers, "lowest", "a", "b|c")["rank"]["nih_test"] == "3 of 3"


def test_no_winner():
    assert overall(world(a=(0.84, 0.80), b=(0.80, 0.84)), "no_winner", "a|b", "") == "holds"
    assert overall(world(a=(0.84, 0.84), b=(0.80, 0.80)), "no_winner", "a|b", "") == "contradicted"
    assert overall(world(a=(0.84, 0.8201), b=(0.80, 0.82)), "no_winner", "a|b", "") == "undecided"
    three = world(a=(0.84, 0.80), b=(0.82, 0.84), c=(0.86, 0.86))
    assert overall(three, "no_winner", "a|b|c", "") == "contradicted"


def test_most_is_more_than_half_of_the_arms():
    numbers = compare.Numbers("our runs")
    for exp, (a, b) in {"a": (0.84, 0.80), "b": (0.84, 0.80), "c": (0.80, 0.84), "d": (0.80, 0.7999)}.items():
        for label, mean in (("A", a), ("B", b)):
            noise = np.random.default_rng(ord(exp) + ord(label)).normal(0, 0.001, 5)
            numbers.values[exp, "nih_test", f"|auc|{label}|"] = dict(zip("01234", mean + noise))

    def most(arms, metric="auc:A-B"):
        return verdict(numbers, "most", arms, "", metric=metric, sets="nih_test").verdict["nih_test"]
    assert most("a|b|c") == "holds" and most("a|b|c|d") == "undecided"           # exactly half is not most
    assert most("a|b|c", "auc:B-A") == "contradicted"


def test_a_verdict_does_not_depend_on_which_other_arms_exist():
    """Holm counts the family's comparisons that cannot be made: p = 0.03 alone is not clear beside two."""
    numbers = world(a=(0.8217, None), b=(0.82, None))
    claim = dict(numbers=numbers, test="greater", left="a", right="b", sets="nih_test")
    alone = verdict(**claim)
    assert 0.02 < alone.p["nih_test"] < 0.05 and alone.verdict["nih_test"] == "holds"
    other = dict(id="2", family="F", place="", ours="0", statement="", test="greater", metric="auc_mean5",
                 testsets="nih_test vindr_test", left="x", right="b", margin="")
    beside = verdict(**claim, more=[other])
    assert beside.p_holm["nih_test"] == pytest.approx(3 * alone.p["nih_test"])
    assert beside.verdict["nih_test"] == "undecided"
    assert verdict(**claim, more=[other | {"family": "G"}]).verdict["nih_test"] == "holds"


def test_operands():
    numbers = world(a=(0.84, 0.82), b=(0.82, 0.82), **{"4.2.1-50k": (0.80, 0.80), "4.2.1-100k": (0.82, 0.82)})
    for left, right, effect in (("a-b", "4.2.1-100k-4.2.1-50k", 0.0), ("a@nih_test", "a@vindr_test", 0.02),
                                ("a", "b+0.01", 0.01), ("4.2.1-100k", "4.2.1-50k", 0.02)):
        found = verdict(numbers, "greater", left, right, sets="nih_test")
        assert found.effect["nih_test"] == pytest.approx(effect), left
    numbers.values["a", "nih_test", "5|oracle_auc||0.1"] = {"0": 0.9, "1": 0.92}
    numbers.values["a", "nih_test", "5|random_referral_auc||0.1"] = {"0": 0.85, "1": 0.86}
    found = verdict(numbers, "greater", "a:uncertain", "a:random", metric="oracle_auc@0.10", sets="nih_test")
    assert found.effect["nih_test"] == pytest.approx(0.055)


def test_arms_that_saw_the_test_images_in_pre_training_say_so():
    numbers = world(**{"3.1": (0.84, 0.84), "3.3": (0.82, 0.82)})
    table = verdict(numbers, "greater", "3.1", "3.3")
    assert "22,772 of the 25,596" in table.remark["nih_test"] and "22,772" in table.remark["all"]
    assert "22,772" not in table.remark["vindr_test"]
    assert "22,772" not in verdict(numbers, "greater", "3.3", "3.3").remark["nih_test"]


def test_spreads_are_compared_by_the_log_ratio_over_arms():
    numbers, ratios = compare.Numbers("our runs"), []
    rng = np.random.default_rng(0)
    for exp in ("1.1", "2.1", "3.4"):
        spreads = []
        for testset, width in (("nih_test", 0.002), ("chexpert_test", 0.01)):
            values = 0.8 + width * rng.normal(size=4)
            numbers.values[exp, testset, "5|auc_mean||"] = dict(zip("0123", values))
            spreads.append(np.std(values, ddof=1))
        ratios.append(np.log(spreads[1] / spreads[0]))
    found = verdict(numbers, "greater", "sd(ood)", "sd(nih_test)", sets="chexpert_test").loc["chexpert_test"]
    expected = stats.ttest_1samp(ratios, 0)
    assert found.effect == pytest.approx(np.mean(ratios)) and found.p == pytest.approx(expected.pvalue)
    assert found.ci_low == pytest.approx(expected.confidence_interval().low)


# ------------------------------------------------------------------------------------ the study's own claims

@pytest.fixture(scope="module")
def judged():
    """Verdicts of the published and printed numbers."""
    numbers = compare.read_reported(REPORTED)
    return compare.verdicts(compare.read_claims(REPORTED / "claims.csv"), numbers)


def test_claims_on_the_published_numbers(judged):
    last = judged.drop_duplicates("id", keep="last").set_index("id")
    assert last.verdict.value_counts().to_dict() == {
        "holds": 31, "undecided": 31, "not run": 3, "contradicted": 2}
    assert set(last.index[last.verdict == "contradicted"]) == {"F10", "K2"}
    assert set(last.index[last.verdict == "not run"]) == {"L2", "M2", "N8"}          # in no run and no table
    one = judged[(judged.id == "A1")].set_index("testset")
    assert one.verdict.to_dict() == {**dict.fromkeys(one.index, "holds")}
    assert one.effect["nih_test"] == pytest.approx(0.8198 - 0.8052, abs=2e-4)
    measured = judged[judged.effect.notna() & (judged.family != "H")]  # H is about spreads themselves
    assert measured.remark.str.contains("seeds only").all()
    assert last["rank"]["N1s"] == "4 of 6" and last["rank"]["N6"] == "1 of 12"
    undecided = last.loc["N9"]  # one printed run: an effect, no spread
    assert undecided.effect == pytest.approx(0.7545 - 0.72378, abs=1e-4) and np.isnan(undecided.ci_low)


def test_a_printed_pair_is_welchs_test_on_table_2(judged):
    printed = pd.read_csv(REPORTED / "table2.csv", dtype=str).set_index(["exp", "testset", "classes"])
    cells = [printed.loc[(exp, "nih_test", "5")].astype(float) for exp in ("3.3", "2.3")]
    runs = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype=str).query(
        "exp == '3.3' and testset == 'nih_test' and classes == '5' and label == 'mean'").auc.astype(float)
    expected = stats.ttest_ind_from_stats(runs.mean(), runs.std(), 5, cells[1].auc_mean, cells[1].auc_sd, 5,
                                          equal_var=False)
    resnet = judged[(judged.id == "F2") & (judged.testset == "vindr_test")].iloc[0]       # of three runs
    ours, theirs = (printed.loc[(exp, "vindr_test", "5")].astype(float) for exp in ("3.2", "1.2"))
    three = stats.ttest_ind_from_stats(ours.auc_mean, ours.auc_sd, 5, theirs.auc_mean, theirs.auc_sd, 3,
                                       equal_var=False)
    assert resnet.p == pytest.approx(three.pvalue, rel=0.02)                # ours are published unrounded
    found = judged[(judged.id == "C1") & (judged.testset == "nih_test")].iloc[0]
    assert found.p == pytest.approx(expected.pvalue) and found.source == "printed and published runs"


# ------------------------------------------------------------------------------------------------ the command

def score(tmp_path, monkeypatch, arms, seeds=(0, 1, 2), patients=60):
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
    run_here(metrics, monkeypatch, *files, "--out", tmp_path / "metrics.csv", "--bootstrap", 200,
             "--workers", 1)
    return tmp_path / "metrics.csv"


def test_two_arms_are_compared_without_claims(tmp_path, monkeypatch, capsys):
    path = score(tmp_path, monkeypatch, {"good": 2.0, "bad": 0.5})
    capsys.readouterr()
    run_here(compare, monkeypatch, "--metrics", path, "--arms", "good", "bad")
    line = next(line for line in capsys.readouterr().out.splitlines() if "auc_mean" in line)
    values = (
        pd.read_csv(path).query("metric == 'auc_mean' and variant == 'corrected'").groupby("exp").value.mean()
    )
    assert f"{values['good']:.4f}" in line and f"{values['bad']:.4f}" in line
    assert f"{values['good'] - values['bad']:.4f}" in line
    with np.load(tmp_path / "draws.npz") as file:
        place = file["good/0/nih_test/rows"].tolist().index("5|auc_mean||")
        pooled = [np.mean([file[f"{exp}/{seed}/nih_test"][place] for seed in range(3)], 0, dtype=float)
                  for exp in ("good", "bad")]
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "out")
    pairs = pd.read_csv(tmp_path / "out/comparisons.csv").query(
        "label.isna() and left == 'good' and right == 'bad'"
    )
    assert pairs.se_patients.iloc[0] == pytest.approx(np.std(pooled[0] - pooled[1]), rel=1e-4)
    assert (pairs.ci_low.iloc[0] > 0) and pairs.p.iloc[0] < 0.05


def test_every_metric_with_resamples_has_an_interval_over_runs_and_patients(tmp_path, monkeypatch):
    path = score(tmp_path, monkeypatch, {"3.4": 2.0, "2.2": 1.0})
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path / "out", "--exp", "3.*")
    arms = pd.read_csv(tmp_path / "out/arms.csv")
    assert set(arms.exp) == {"3.4", "3.4-ensemble"}
    means = (
        arms[(arms.exp == "3.4") & arms.label.isna()]
        .fillna({"threshold": -1})
        .set_index(["metric", "threshold"])
    )
    for metric, threshold in (
        ("auprc", -1),
        ("ece", -1),
        ("fnr", 0.3),
        ("subset_accuracy", 0.5),
        ("oracle_auc", 0.1),
    ):
        row = means.loc[(metric, threshold)]
        assert (
            float(row.ci_low) < float(row.value) < float(row.ci_high) and float(row.se_patients) > 0
        ), metric
    verdicts = pd.read_csv(tmp_path / "out/verdicts.csv")
    assert len(set(verdicts.id)) == 67 and (verdicts.query("id == 'A1'").verdict == "not run").all()


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


def test_verdicts_on_stand_ins_say_so(tmp_path, monkeypatch, capsys):
    path = score(tmp_path, monkeypatch, {"3.4": 2.0, "2.2": 0.2})
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[frame.exp == "3.4", "stand_in"] = "drawn by data_prep/demo.py"
    frame.to_csv(path, index=False)
    run_here(compare, monkeypatch, "--metrics", path, "--out", tmp_path)
    table = pd.read_csv(tmp_path / "verdicts.csv").query("testset == 'nih_test'").set_index("id")
    assert table.source["A1"] == "our runs and stand-ins"
    assert set(pd.read_csv(tmp_path / "arms.csv").query("exp == '3.4'").source) == {"stand-ins"}
    assert "67 claims on our runs, some of them stand-ins" in capsys.readouterr().out


@pytest.mark.parametrize("change, said", [
    (dict(draws=None), "draws.npz is not there"), (dict(flags=["--exp", "9.*"]), "no experiment like 9.*"),
    (dict(flags=["--arms", "a", "z"]), "both 'a' and 'z'; there are a"),
    (dict(claim="1,A,,0,s,greater,auc_mean5,nih_test,a b,c,"), "operand 'a b' cannot be read"),
    (dict(claim="1,A,,0,s,greater,auc_mean6,nih_test,a,c,"), "metric 'auc_mean6' cannot be read"),
    (dict(claim="1,A,,0,s,better,auc_mean5,nih_test,a,c,"), "test 'better'"),
    (dict(claim="1,A,,0,s,no_gain,auc_mean5,nih_test,a,c,"), "no_gain with a margin")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, change, said):
    path = score(tmp_path, monkeypatch, {"a": 1.0}, seeds=(0,))
    claims = tmp_path / "claims.csv"
    claims.write_text(
        ",".join(compare.CLAIM)
        + "\n"
        + change.get("claim", "1,A,,0,s,greater,auc_mean5,nih_test,a,b,")
        + "\n"
    )
    if "draws" in change:
        (tmp_path / "draws.npz").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_here(compare, monkeypatch, "--metrics", path, "--claims", claims, "--out", tmp_path / "out",
                 *change.get("flags", []))
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
    ), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("freedom", [0.05, 1, 4, 30.5, 1e25])
def test_the_detectable_effect_is_found_with_80_percent_power(freedom):
    """By scipy's noncentral t: the share of tests that exceed the critical value; below 1 degree as at 1."""
    from scipy.stats import nct, norm
    from scipy.stats import t as student
    found, degrees = float(compare.noncentrality(freedom)), max(1, freedom)
    power = norm.sf(1.959964 - found) if degrees > 1e9 else nct.sf(student.ppf(0.975, degrees), degrees, found)
    assert abs(power - 0.8) < 1e-3
