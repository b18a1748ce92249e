"""compare.py: verdicts on known effects, statistics against SciPy and brute force, errata rebuilt."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, assert_user_error, load_script, run_script
from scipy import stats

compare = load_script("evaluate/compare.py")
metrics = load_script("evaluate/metrics.py")
REPORTED = ROOT / "evaluate" / "reported"
SEEDS = (0, 11, 21)


@pytest.fixture(scope="module")
def published():
    return compare.Published(REPORTED)


@pytest.fixture(scope="module")
def claims():
    return compare.read_claims(REPORTED / "claims.csv")


def write_predictions(root, exp, seed, testset, y, p, patient, labels=tuple(compare.STUDY5)):
    """One prediction file as predict.py leaves it."""
    frame = pd.DataFrame({"path": [f"images/{i:04}.png" for i in range(len(y))], "patient": patient})
    for k, label in enumerate(labels):
        frame[f"true_{label}"] = y[:, k]
    for k, label in enumerate(labels):
        frame[f"prob_{label}"] = p[:, k]
    path = root / exp / "predictions" / f"seed{seed}" / f"{testset}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.8g")
    return path


def truth(rng, images=240, patients=110, labels=5):
    """True labels that patients share in part, and the patient of every image."""
    patient = rng.integers(patients, size=images)
    y = (rng.normal(size=(patients, labels))[patient] + rng.normal(size=(images, labels)) > 0.6).astype(int)
    return y, np.array([f"p{n}" for n in patient])


def probabilities(rng, y, strength):
    """Predictions whose ranking improves with strength; 0 is chance."""
    return 1 / (1 + np.exp(-(strength * (2 * y - 1) + rng.normal(size=y.shape) - 1)))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Predictions with known order: 3.4 far above 2.2, 3.6 like 2.2 but for noise, 1.2 without any skill."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(7)
    for testset in ("nih_test", "chexpert_valid"):
        y, patient = truth(rng)
        shared = rng.normal(size=y.shape)
        for exp, strength in (("3.4", 1.6), ("2.2", 0.6), ("3.6", 0.6), ("1.2", 0.0)):
            for seed in SEEDS:
                p = probabilities(rng, y, strength + 0.02 * rng.normal()) * 0.7 + 0.3 / (1 + np.exp(-shared))
                write_predictions(root, exp, seed, testset, y, p.clip(0.001, 0.999), patient)
    return root


def judged(source, *rows):
    """Verdicts of claims (metric, testset, left, right, sign), all of one family."""
    columns = compare.CLAIM
    texts = [dict(zip(columns, (f"X{n}", "X", "a statement", *row))) for n, row in enumerate(rows)]
    path = source.tmp / "claims.csv"
    pd.DataFrame(texts, columns=columns).to_csv(path, index=False)
    return compare.verdicts(compare.read_claims(path), source)


@pytest.fixture(scope="module")
def ours(known, tmp_path_factory):
    source = compare.Predictions(known, 400)
    source.tmp = tmp_path_factory.mktemp("claims")
    return source


# ---------------------------------------------------------------------------- verdicts

def test_verdicts_on_a_known_effect(ours):
    table = judged(ours,
                   *[("auc_mean5", "nih_test", left, right, sign) for left, right, sign in (
                       ("3.4", "2.2", "1"), ("2.2", "3.4", "1"), ("2.2", "3.6", "1"), ("2.2", "9.9", "1"),
                       ("2.2", "3.4", "-1"), ("3.4", "2.2", "0"))])
    assert list(table["verdict"]) == ["holds", "contradicted", "undecided", "not run", "holds", "holds"]
    assert table["remark"][3] == "no auc_mean5 of 9.9 on nih_test"
    assert "no direction" in table["remark"][5]
    assert table["effect"][0] == -table["effect"][1] and table["p"][0] == table["p"][1]
    decided = table[table["verdict"] != "not run"]
    assert ((decided["ci_low"] < decided["effect"]) & (decided["effect"] < decided["ci_high"])).all()
    assert (decided["p_holm"] >= decided["p"]).all()


def test_the_effect_is_the_difference_of_the_means_over_runs_of_the_means_over_labels(ours, known):
    table = judged(ours, ("auc_mean5", "nih_test", "3.4", "2.2", "1"),
                   ("auc_mean4", "nih_test", "3.4", "2.2", "1"),
                   ("auc", "nih_test", "3.4:Edema", "2.2:Edema", "1"))
    areas = {}
    for exp in ("3.4", "2.2"):
        frames = [pd.read_csv(known / exp / "predictions" / f"seed{seed}" / "nih_test.csv") for seed in SEEDS]
        areas[exp] = np.array([[metrics.auc(f[f"true_{x}"].to_numpy(), f[f"prob_{x}"].to_numpy())
                                for x in compare.STUDY5] for f in frames]).mean(0)
    gap = areas["3.4"] - areas["2.2"]
    assert table["effect"].tolist() == pytest.approx([gap.mean(), np.delete(gap, 3).mean(), gap[3]])


def test_thresholds_offsets_and_the_constant_answer(ours, known):
    table = judged(ours, ("mean_accuracy@0.5", "chexpert_valid", "3.4", "always_negative", "1"),
                   ("fnr@0.3", "chexpert_valid", "3.4", "2.2", "-1"),
                   ("subset_accuracy@0.3", "chexpert_valid", "3.4", "always_negative", "1"),
                   ("auc", "chexpert_valid", "3.4:Edema", "3.4:Effusion+0.20", "1"))
    frames = [pd.read_csv(known / "3.4" / "predictions" / f"seed{seed}" / "chexpert_valid.csv")
              for seed in SEEDS]
    y, p = ([f[[f"{kind}_{x}" for x in compare.STUDY5]].to_numpy() for f in frames]
            for kind in ("true", "prob"))
    accuracy = np.mean([metrics.mean_accuracy(a, b, 0.5) for a, b in zip(y, p)])
    assert table["effect"][0] == pytest.approx(accuracy - (1 - y[0].mean()))
    subset = np.mean([metrics.subset_accuracy(a, b, 0.3) for a, b in zip(y, p)])
    assert table["effect"][2] == pytest.approx(subset - (y[0] == 0).all(1).mean())
    areas = np.mean([metrics.auc(a, b) for a, b in zip(y, p)], 0)
    assert table["effect"][3] == pytest.approx(areas[3] - areas[4] - 0.20)
    assert table["verdict"][1] == "holds" and table["verdict"][3] == "contradicted"


def test_a_set_against_another_and_a_difference_of_differences(ours):
    table = judged(ours, ("auc_mean5", "nih_test", "3.4@chexpert_valid", "3.4@nih_test", "1"),
                   *[("auc_mean5", "nih_test", *sides, "1")
                     for sides in (("3.4-2.2", "3.6-1.2"), ("3.4", "2.2"), ("3.6", "1.2"))])
    nih, chexpert = (ours.values("3.4", name, "auc_mean5")[1].mean()
                     for name in ("nih_test", "chexpert_valid"))
    assert table["effect"][0] == pytest.approx(chexpert - nih)
    assert table["runs"].tolist() == ["3", "3 3 3 3", "3 3", "3 3"]           # one arm: paired run by run
    assert table["effect"][1] == pytest.approx(table["effect"][2] - table["effect"][3])


class Given:
    """A source of numbers that are simply given: {arm: values over runs}."""
    source, files = "given", {}

    def __init__(self, tmp, arms):
        self.tmp, self.arms = tmp, arms

    def values(self, exp, *_):
        return list(range(len(self.arms[exp]))), np.array(self.arms[exp]), None

    def sizes(self, _):
        return "", ""


def test_holm_within_the_family_can_undo_a_verdict(tmp_path):
    source = Given(tmp_path, {"1": [0.80, 0.82, 0.84], "2": [0.76, 0.77, 0.79], "3": [0.81, 0.82, 0.83]})
    claim, empty = ("auc_mean5", "nih_test", "1", "2", "1"), ("auc_mean5", "nih_test", "1", "3", "1")
    alone, family = judged(source, claim), judged(source, claim, *[empty] * 4)
    assert alone["verdict"][0] == "holds" and 0.02 < alone["p"][0] == alone["p_holm"][0] < 0.05
    assert family["verdict"][0] == "undecided" and family["p_holm"][0] == pytest.approx(5 * family["p"][0])
    assert family["ci_low"][0] > 0                               # the interval alone would have said "holds"


def test_identical_predictions_cannot_be_told_apart(tmp_path):
    y, patient = truth(np.random.default_rng(1))
    p = probabilities(np.random.default_rng(2), y, 1)
    for exp, seed in itertools.product(("3.4", "2.2"), SEEDS):
        write_predictions(tmp_path, exp, seed, "nih_test", y, p, patient)
    source = compare.Predictions(tmp_path, 200)
    source.tmp = tmp_path
    row = judged(source, ("auc_mean5", "nih_test", "3.4", "2.2", "1")).iloc[0]
    assert row["verdict"] == "undecided"
    assert row[["effect", "p", "ci_low", "ci_high"]].tolist() == [0, 1, 0, 0]


@pytest.fixture(scope="module")
def some_single(tmp_path_factory):
    """Arm 3.4 with one run, 2.2 and 3.6 with three."""
    root, rng = tmp_path_factory.mktemp("single"), np.random.default_rng(3)
    y, patient = truth(rng)
    for exp, strength, seeds in (("3.4", 2.0, SEEDS[:1]), ("2.2", 0.3, SEEDS), ("3.6", 0.4, SEEDS)):
        for seed in seeds:
            write_predictions(root, exp, seed, "nih_test", y, probabilities(rng, y, strength), patient)
    source = compare.Predictions(root, 200)
    source.tmp = root
    return source


def test_an_arm_of_one_run_is_judged_by_its_patients_and_its_spread_over_runs_is_unknown(some_single):
    table = judged(some_single, ("auc_mean5", "nih_test", "3.4", "2.2", "1"),
                   ("mean_accuracy@0.5", "nih_test", "3.4", "always_negative", "1"),
                   ("mean_accuracy@0.5", "nih_test", "2.2", "always_negative", "1"))
    assert table["verdict"][0] == "holds" and table["ci_low"][0] > 0 < table["se_patients"][0]
    assert table["se_runs"].isna().tolist() == [True, True, False]       # the constant answer has no spread
    assert table["remark"].str.contains("one run").tolist() == [True, True, False]
    compare.write(table, some_single.tmp / "verdicts.csv")
    assert pd.read_csv(some_single.tmp / "verdicts.csv", dtype=str, keep_default_na=False)["se_runs"][0] == ""


def test_components_pairs_and_detectable_difference_with_an_arm_of_one_run(some_single):
    components, comparisons = compare.all_pairs(some_single)
    assert components.groupby("exp")["se_runs"].agg(lambda errors: errors.isna().mean()).to_dict() == {
        "3.4": 1, "2.2": 0, "3.6": 0}
    single = comparisons[["left", "right"]].eq("3.4").any(axis=1)
    for name in ("se_runs", "p_welch"):
        assert (comparisons[name].isna() == single).all()
    assert comparisons[["p", "ci_low", "ci_high", "se_patients"]].notna().all(axis=None)
    row = compare.detectable(comparisons, some_single).iloc[0]
    means = comparisons[comparisons["label"] == ""]
    pair = means[means["se_runs"].notna()].iloc[0]                       # the one that counts
    error = np.hypot(pair["se_runs"], pair["se_patients"])
    assert row["detectable"] == pytest.approx(compare.noncentrality(pair["freedom"]) * error)
    row = compare.detectable(comparisons[single], some_single).iloc[0]
    assert np.isnan(row["detectable"]) and row["detectable_with_endless_runs"] > 0


def test_the_table_has_all_its_columns_when_nothing_was_run(ours):
    table = judged(ours, ("auc_mean5", "nih_test", "9.9", "9.8", "1"))
    assert list(table) == compare.VERDICT and np.isnan(table["effect"][0])


def test_only_the_experiments_that_are_asked_for_are_read(known, tmp_path):
    (tmp_path / "3.4").symlink_to(known / "3.4")
    (tmp_path / "2.2").symlink_to(known / "2.2")
    rng = np.random.default_rng(13)
    y, patient = truth(rng, images=50)
    write_predictions(tmp_path, "demo.x", 0, "nih_test", y, probabilities(rng, y, 1), patient)
    with pytest.raises(compare.InputError, match="cannot be compared"):
        compare.Predictions(tmp_path, 100)
    assert {exp for exp, _ in compare.Predictions(tmp_path, 100, "3.4,2.*").files} == {"3.4", "2.2"}
    with pytest.raises(compare.InputError, match=r"holds no 3\.9/predictions/seed<k>"):
        compare.Predictions(tmp_path, 100, "3.4,3.9")


def test_row_order_label_order_and_spelling_do_not_matter(tmp_path):
    rng = np.random.default_rng(4)
    y, patient = truth(rng)
    p = {seed: probabilities(rng, y, 1) for seed in SEEDS}
    for seed in SEEDS:
        write_predictions(tmp_path / "a", "3.4", seed, "nih_test", y, p[seed], patient)
        names = ["Pleural Effusion", "edema", *compare.STUDY5[2::-1]]
        path = write_predictions(tmp_path / "b", "3.4", seed, "nih_test", y[:, ::-1], p[seed][:, ::-1],
                                 patient, names)
        pd.read_csv(path).sample(frac=1, random_state=seed).to_csv(path, index=False)
    a, b = (compare.Predictions(tmp_path / name, 100).values("3.4", "nih_test", "auc_mean5") for name in "ab")
    assert a[1] == pytest.approx(b[1]) and a[2] == pytest.approx(b[2])


def test_recipe_a_is_found_under_its_plain_key_and_validation_files_are_no_test_set(tmp_path):
    rng = np.random.default_rng(5)
    y, patient = truth(rng)
    write_predictions(tmp_path, "0.1.7", 0, "nih_test", y, probabilities(rng, y, 1), patient)
    write_predictions(tmp_path, "0.1.7", 0, "nih_val", y, probabilities(rng, y, 1), patient)
    source = compare.Predictions(tmp_path, 100)
    assert source.values("0.1.7a", "nih_test", "auc_mean5") is not None
    assert {key[1] for key in source.files} == {"nih_test"}


# ---------------------------------------------------------------------------- claims

def test_every_claim_is_understood(claims):
    assert len(claims) == len(pd.read_csv(REPORTED / "claims.csv")) == 99
    sides = {claim["id"]: claim["sides"] for claim in claims}
    operand = sides["E01"][0][2]
    assert (operand["exp"], operand["minus"], operand["part"]) == ("2.2", "2.1", None)
    assert sides["J01"][1][2]["exp"] == "4.2.1-50k" and sides["K01"][0][2]["exp"] == "0.1.7a"
    assert (sides["M03"][1][2]["part"], sides["M03"][1][2]["offset"]) == ("Atelectasis", "+0.20")
    assert [side[1] for side in sides["G01"]] == ["auc_mean5", "auc_mean14"]
    assert [side[2] for side in sides["H01"]] == ["ood", "nih_test"]
    assert (sides["L01"][0][2]["exp"], sides["L01"][0][2]["testset"]) == ("3.4", "vindr_test")


@pytest.mark.parametrize("metric, left, sign", [("accuracy", "3.4", "1"), ("auc_mean5", "3.4 > 2.2", "1"),
                                                ("auc_mean5", "3.4", "2"), ("fnr@high", "3.4", "1")])
def test_a_claim_that_cannot_be_read_is_named(tmp_path, metric, left, sign):
    pd.DataFrame([["A01", "A", "s", metric, "nih_test", left, "2.2", sign]], columns=compare.CLAIM).to_csv(
        tmp_path / "claims.csv", index=False)
    with pytest.raises(compare.InputError, match="claims.csv line 2.*cannot be read"):
        compare.read_claims(tmp_path / "claims.csv")


# ---------------------------------------------------------------------------- statistics

def test_from_runs_alone_the_test_is_welchs(published):
    left, right = (published.values(exp, "padchest", "auc_mean5")[1] for exp in ("3.4", "1.2"))
    found = compare.estimate([(1, compare.make_arm("a", left)), (-1, compare.make_arm("b", right))])
    expected = stats.ttest_ind(left, right, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval(), rel=1e-9)
    assert found.effect == pytest.approx(left.mean() - right.mean())


def test_one_arm_on_both_sides_is_a_paired_test(published, claims):
    claim = next(claim for claim in claims if claim["id"] == "L01")
    found, _ = compare.judge(claim, published)
    areas = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"exp": str})
    four = areas.query("exp == '3.4' and classes == 5 and label in @compare.LABELS['auc_mean4']")
    runs = four.groupby(["testset", "seed"])["auc"].mean()
    expected = stats.ttest_rel(runs["vindr_test"], runs["nih_test"])
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.effect == pytest.approx((runs["vindr_test"] - runs["nih_test"]).mean())


def test_the_spread_claim_is_a_t_test_on_log_ratios(published, claims):
    found, _ = compare.judge(next(claim for claim in claims if claim["id"] == "H03"), published)
    areas = pd.read_csv(REPORTED / "raw_runs_auc.csv", dtype={"exp": str})
    sd = areas.query("label == 'mean' and classes == 5").groupby(["testset", "exp"])["auc"].std()
    ratios = np.log((sd["chexpert_test"] / sd["nih_test"]).dropna())
    assert found.effect == pytest.approx(ratios.mean())
    assert found.p == pytest.approx(stats.ttest_1samp(ratios, 0).pvalue)


def test_the_spread_claim_is_about_the_arms_of_table_2(published, claims):
    claim = next(claim for claim in claims if claim["id"] == "H03")
    stand_ins = {(f"mini.{key[0]}", *key[1:]): values for key, values in published.numbers.items()}
    alone, beside = copy.copy(published), copy.copy(published)
    alone.numbers, beside.numbers = stand_ins, published.numbers | stand_ins
    for source in (alone, beside):
        source.files = dict.fromkeys(key[:2] for key in source.numbers)
    found, remark = compare.judge(claim, alone)
    assert found is None and "fewer than two arms of Table 2" in remark
    (found, remark), (expected, said) = (compare.judge(claim, source) for source in (beside, published))
    assert (found.effect, found.p, found.runs, remark) == (expected.effect, expected.p, [7], said)


def test_p_welch_is_welchs_test_on_the_runs(ours):
    _, comparisons = compare.all_pairs(ours)
    for row in comparisons[comparisons["label"].isin(["", "Effusion"])].to_dict("records"):
        asked = ("auc", row["label"]) if row["label"] else (f"auc_mean{row['labels']}", None)
        left, right = (ours.values(row[side], row["dataset"], *asked)[1] for side in ("left", "right"))
        expected = stats.ttest_ind(left, right, equal_var=False)
        assert row["p_welch"] == pytest.approx(expected.pvalue, rel=1e-9)
        # p, which counts the patients too, comes from the row's own errors and degrees of freedom
        t = abs(row["effect"]) / np.hypot(row["se_runs"], row["se_patients"])
        assert row["p"] == pytest.approx(2 * stats.t.sf(t, row["freedom"]), rel=1e-6)


def step_down(p):
    """Holm's adjusted p-values, one after the other from the smallest; NaN stays."""
    adjusted, largest, left = [np.nan] * len(p), 0, int(np.isfinite(p).sum())
    for i in sorted(np.flatnonzero(np.isfinite(p)), key=lambda i: p[i]):
        largest = max(largest, min(1, left * p[i]))
        adjusted[i], left = largest, left - 1
    return adjusted


def test_p_holm_is_over_the_family_and_p_holm_all_over_the_whole_table(published, claims):
    table = compare.verdicts(claims, published)
    assert table["p"].notna().sum() == 45
    assert table["p_holm_all"].tolist() == pytest.approx(step_down(table["p"].to_numpy()), nan_ok=True)
    for _, family in table.groupby("family"):
        assert family["p_holm"].tolist() == pytest.approx(step_down(family["p"].to_numpy()), nan_ok=True)
    _, pairs = compare.all_pairs(published)
    for _, asked in pairs.groupby(["dataset", "labels", "label"]):
        assert asked["p_holm"].tolist() == pytest.approx(step_down(asked["p"].to_numpy()), nan_ok=True)


def test_holm_by_hand():
    assert compare.holm([0.01, np.nan, 0.04, 0.03]).tolist()[::2] == pytest.approx([0.03, 0.06])
    assert compare.holm([0.01, np.nan, 0.04, 0.03])[3] == pytest.approx(0.06)
    assert np.isnan(compare.holm([np.nan, 0.5])[0]) and compare.holm([0.9, 0.8]).tolist() == [1, 1]


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, level = rng.random(8) ** 3, 0.05
        rejected, ranked = set(), np.argsort(p)
        for step, i in enumerate(ranked):
            if p[i] > level / (8 - step):
                break
            rejected.add(i)
        assert rejected == set(np.flatnonzero(compare.holm(p) <= level))


@pytest.mark.parametrize("patients", [110, 10_000])
def test_delong_of_single_runs_is_the_textbooks(tmp_path, patients):
    rng = np.random.default_rng(6)
    y, patient = truth(rng, patients=patients)
    p = [probabilities(rng, y, strength) for strength in (0.8, 0.5)]
    for exp, scores in zip(("3.4", "2.2"), p):
        write_predictions(tmp_path, exp, 0, "nih_test", y, scores.round(2).clip(0.01, 0.99), patient)
    source = compare.Predictions(tmp_path, 100)
    for k, label in enumerate(compare.STUDY5):
        expected = metrics.delong(y[:, k], *(s.round(2).clip(0.01, 0.99)[:, k] for s in p), patient)
        assert source.delong("3.4", "2.2", "nih_test", label) == pytest.approx(expected["p"], rel=1e-4)


def test_the_nested_interval_covers_the_truth():
    """Normal runs and patients with interaction: 95 % intervals contain the true 0 about that often."""
    rng, hits, rejected, trials = np.random.default_rng(8), 0, 0, 150
    for trial in range(trials):
        arms = []
        patients = rng.normal(size=200)                          # what both arms share does not matter
        draws = rng.multinomial(200, np.full(200, 1 / 200), size=300) / 200          # [B, P]
        for exp in ("a", "b"):
            scores = patients + 0.7 * rng.normal(size=(1, 200)) + rng.normal(size=(5, 1)) * 0.06 \
                + 0.5 * rng.normal(size=(5, 200))                # runs [5, P]
            arms.append(compare.make_arm(exp, scores.mean(1), scores @ draws.T))
        found = compare.estimate([(1, arms[0]), (-1, arms[1])])
        hits += found.low <= 0 <= found.high
        rejected += found.p < 0.05
    assert 0.92 <= hits / trials <= 1                            # conservative by construction
    assert rejected / trials <= 0.10                             # 0.05 + three binomial sd


def test_variance_is_told_apart():
    """Without differences between runs the error is the patients'; without patients it is the runs'."""
    rng = np.random.default_rng(9)
    shared = 0.8 + 0.02 * rng.normal(size=500)
    same = compare.estimate([(1, compare.make_arm("a", [shared.mean()] * 4, np.tile(shared, (4, 1))))])
    assert same.se_runs == 0 and same.se_patients == pytest.approx(shared.std(ddof=1))
    runs = np.array([0.80, 0.82, 0.85, 0.79])
    fixed = compare.estimate([(1, compare.make_arm("a", runs, np.tile(runs[:, None], 500)))])
    assert fixed.se_patients == pytest.approx(0, abs=1e-12)
    assert fixed.se_runs == pytest.approx(runs.std(ddof=1) / 2)
    noise = 0.01 * rng.normal(size=500)                          # two runs that other patients move apart
    draws = np.stack([0.80 + noise, 0.84 - noise])
    moved = compare.estimate([(1, compare.make_arm("a", [0.80, 0.84], draws))])
    assert moved.se_runs == pytest.approx(np.sqrt((0.04 ** 2 / 2 - 2 * noise.var(ddof=1)) / 2))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.6])
def test_oracle_auc_equals_its_definition_on_the_images_themselves(fraction):
    rng = np.random.default_rng(10)
    y, patient = truth(rng, 90, 40)
    p = probabilities(rng, y, 0.7).round(3).clip(0.001, 0.999)
    index, draws = metrics.draw_patients(patient, 20, 1)
    once = compare.oracle_draws(y, p, index, np.ones((1, draws.shape[1]), np.uint8), fraction, "uncertain")
    assert once[0] == pytest.approx(np.nanmean(metrics.oracle_auc(y, p, [fraction])[0]))
    several = compare.oracle_draws(y, p, index, draws, fraction, "uncertain")
    for value, counts in zip(several, draws):
        images = np.repeat(np.arange(len(y)), counts[index])     # a patient drawn twice comes twice
        assert value == pytest.approx(np.nanmean(metrics.oracle_auc(y[images], p[images], [fraction])[0]))


def test_random_referral_is_the_mean_over_all_choices_of_images():
    rng = np.random.default_rng(11)
    y = np.array([[1, 0, 1, 0, 0, 1, 0]]).T
    p = rng.uniform(0.1, 0.9, size=y.shape)
    values = []
    for seen in itertools.combinations(range(7), 3):             # floor(7 * 0.5)
        q = p.copy()
        q[list(seen)] = y[list(seen)]
        values.append(metrics.auc(y, q)[0])
    found = compare.oracle_draws(y, p, np.arange(7), np.ones((1, 7), np.uint8), 0.5, "random")
    assert found[0] == pytest.approx(np.mean(values))


@pytest.mark.parametrize("freedom", [2, 3.7, 8, 40, 1e6, np.inf])
def test_a_t_test_at_the_noncentrality_has_80_percent_power(freedom):
    away, limit = compare.noncentrality(freedom), stats.t.ppf(0.975, freedom)
    power = stats.nct.sf(limit, freedom, away) + stats.nct.cdf(-limit, freedom, away)
    assert power == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("runs", [3, 5])
def test_the_detectable_difference_is_found_in_four_of_five_comparisons(runs, tmp_path):
    """Between arms of few runs; 2.8 standard errors, which would do for many runs, find 0.45 and 0.65."""
    rng = np.random.default_rng(runs)
    found = [compare.estimate([(1, compare.make_arm("a", a)), (-1, compare.make_arm("b", b))])
             for a, b in rng.normal(size=(3000, 2, runs))]
    pairs = pd.DataFrame(found).assign(dataset="nih_test", labels="5", label="")
    row = compare.detectable(pairs, Given(tmp_path, {})).iloc[0]
    assert np.isnan(row["se_patients"]) and np.isnan(row["detectable_with_endless_runs"])

    def power(gap):
        left, right = np.random.default_rng(14).normal(size=(2, runs, 10_000))
        return (stats.ttest_ind(left + gap, right, equal_var=False).pvalue < 0.05).mean()

    assert power(row["detectable"]) == pytest.approx(0.8, abs=0.05)     # spreads are estimates too
    assert power(2.8 * row["se_runs"]) < 0.7


def test_the_detectable_difference_of_our_runs(ours):
    components, comparisons = compare.all_pairs(ours)
    row = compare.detectable(comparisons, ours).query("dataset == 'chexpert_valid'").iloc[0]
    assert row["detectable_with_endless_runs"] == pytest.approx(
        (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * row["se_patients"], rel=1e-5)
    assert row["detectable_with_endless_runs"] < row["detectable"] and row["images"] == 240
    pairs = comparisons[(comparisons["dataset"] == "nih_test") & (comparisons["label"] == "")]
    assert len(pairs) == 6 and pairs["p_delong"].isna().all()
    assert len(components.query("dataset == 'nih_test' and label == ''")) == 4


# ---------------------------------------------------------------------------- the published runs

def test_errata_are_those_that_were_found_by_hand(published):
    errata, count = compare.rebuild(REPORTED, published)
    assert count == {"Table 2": [116, 120], "Table 3": [64, 70], "Table 5": [1, 4], "Table 7": [20, 20],
                     "Table 8": [42, 42], "Text": [2, 4]}       # the quotation of Table 5 is as wrong as Table 5
    found = {(e["where"], e["exp"], e["quantity"]): (e["printed"], e["recomputed"], e["kind"])
             for e in errata}
    assert found["Table 2", "3.1", "AUC, 14 labels"] == ("0.8020", "0.7983", "number")
    assert found["Table 2", "3.1", "AUC, 14 labels, sd over runs"] == ("0.0020", "0.0085", "number")
    assert found["Table 2", "1.2", "AUC, 14 labels"] == ("0.8028", "0.8029", "last digit")
    assert found["Table 2", "1.1", "AUC, 14 labels, sd over runs"][:2] == ("0.0065", "0.0066")
    assert found["Table 5", "3.2", "AUC, 14 labels, sd over runs"][:2] == ("0.0025", "0.0024")
    assert found["Text", "3.1", "exp 3.1 as quoted in the text"] == ("0.8021", "0.7983", "number")
    assert found["Table 3", "3.1", "AUC, Edema"][:2] == ("0.7932", "0.7931")
    notes = {e["note"] for e in errata if e["where"] == "Table 2" and e["exp"] == "3.1"}
    assert notes == {"the print leaves out the run of seed 100"}


def test_sentences_and_heads_are_contradicted_by_numbers(published):
    errata = pd.DataFrame(compare.contradictions(REPORTED, published))
    of = {where: rows for where, rows in errata.groupby("where")}
    images = of["Table 2, head"].set_index("testset")["recomputed"]
    assert images.to_dict() == {"chexpert_valid": 202, "padchest": 1860}
    assert of["Table 8, Figure 2(d)"]["recomputed"].tolist() == ["0.149", "0.297", "0.495", "0.743"]
    assert set(of["Section 3.2"]["exp"]) == {"2.2", "3.2", "3.4", "3.7", "3.8"}
    above = of["Section 4.1"].set_index("exp")["recomputed"]
    assert above.to_dict() == {"2.3": 0, "2.4": 4, "3.1": 5, "3.3": 5}
    assert set(of["Captions"]["exp"]) == {"1.1", "1.2"}
    assert of["0.A.7"]["recomputed"].tolist() == ["4 of 6"] + ["6 of 6"] * 5 + ["4 of 12"]
    lifts = of["Tables 7 and 8"]["recomputed"].astype(float)
    assert len(lifts) == 7 and (lifts.min(), lifts.max()) == (0.0057, 0.0179)


def test_verdicts_on_the_published_runs(tmp_path):
    result = run_script("evaluate/compare.py", "--reported", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "verdicts.csv", dtype={"left": str, "right": str}).set_index("id")
    assert len(table) == 99
    assert table["verdict"]["A01"] == "holds" and table["verdict"]["F07"] == "contradicted"
    assert table["verdict"]["B01"] == "undecided" and table["verdict"]["C01"] == "not run"
    assert table["se_patients"].isna().all()                    # without predictions nobody knows
    for name in ("components", "comparisons", "detectable", "errata"):
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) > 5


# ---------------------------------------------------------------------------- users' mistakes

def test_the_command_line_writes_its_tables(known, tmp_path):
    result = run_script("evaluate/compare.py", "--predictions", known, "--out", tmp_path, "--bootstrap", 100)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "verdicts.csv", dtype={"left": str, "right": str}).set_index("id")
    assert table["verdict"]["A01"] == "holds" and table["verdict"]["A06"] == "not run"
    assert not list(tmp_path.glob(".*"))


def two_arms(tmp_path):
    rng = np.random.default_rng(12)
    y, patient = truth(rng, 30, 20)
    return [write_predictions(tmp_path / "runs", exp, 0, "nih_test", y, probabilities(rng, y, 1), patient)
            for exp in ("2.2", "3.4")]


@pytest.mark.parametrize("spoil, words", [
    (lambda f: f.drop(columns="patient"), ["has no column 'patient'"]),
    (lambda f: f.drop(columns="prob_Edema"), ["for every label", "'Edema'"]),
    (lambda f: f.drop(columns=["true_Edema", "prob_Edema"]), ["cannot be compared", "'Edema' is in one"]),
    (lambda f: f.iloc[1:], ["cannot be compared", "image 'images/0000.png' is in one of them only"]),
    (lambda f: f.assign(true_Edema=1 - f["true_Edema"]), ["compared", "of image 'images/0000.png'"]),
    (lambda f: pd.concat([f, f[:1]]), ["row 31", "stands there twice"]),
    (lambda f: f.assign(prob_Edema=[1.2] + [0.5] * 29), ["row 1: prob_Edema is '1.2'", "from 0 to 1"]),
    (lambda f: f.assign(prob_Edema=[None] + [0.5] * 29), ["row 1: prob_Edema is ''"]),
    (lambda f: f.assign(true_Edema=["yes"] + [0] * 29), ["row 1: true_Edema is 'yes'", "0 or 1"]),
    (lambda f: f.assign(**{f"{kind}_Pleural Effusion": 1 for kind in ("true", "prob")}),
     ["has label Effusion under two spellings; keep one"]),
    (lambda f: f[:0], ["has a header and no rows"]),
])
def test_a_bad_prediction_file_is_one_sentence(tmp_path, spoil, words):
    path = two_arms(tmp_path)[1]
    spoil(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(compare.InputError) as said:
        compare.Predictions(tmp_path / "runs", 100)
    assert all(word in str(said.value) for word in ["3.4/predictions/seed0/nih_test.csv", *words])


def test_other_mistakes_are_one_sentence(tmp_path):
    two_arms(tmp_path)[1].write_text("")
    call = ("evaluate/compare.py", "--out", tmp_path / "out")
    assert_user_error(run_script(*call, "--predictions", tmp_path / "runs"), "nih_test.csv is no CSV table")
    assert_user_error(run_script(*call, "--predictions", tmp_path), "holds no */predictions/seed<k>")
    assert_user_error(run_script(*call, "--reported", tmp_path), "raw_runs_auc.csv does not exist")
    assert not (tmp_path / "out").exists()
