"""tests/bench: what the benchmarks compute from their measurements."""

from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, fork_script, load_script, run_here
from scipy import stats
from sklearn.metrics import roc_auc_score

SMALL = '{"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}'


def paired_interval(values, draws):
    """Mean difference and its limits: values [R], of the runs; draws [R, B], the same in each resample."""
    runs, mean = len(values), np.mean(values)
    pooled = np.array([np.mean([draws[r][b] for r in range(runs)]) for b in range(len(draws[0]))])
    spread, own = np.var(values, ddof=1) / runs, 0
    for r in range(runs):
        own += np.var(draws[r] - values[r] - (pooled - mean)) / (runs - 1) / runs
    error = (max(spread - own, 0) + pooled.var()) ** 0.5
    freedom = max(error ** 4 / (spread ** 2 / (runs - 1)), runs - 1)
    margin = stats.t.ppf(0.975, freedom) * error
    return mean, mean - margin, mean + margin


def test_the_table_of_starts_has_the_aucs_and_their_differences_in_pairs_of_seeds(tmp_path, monkeypatch):
    starts, rng = load_script("tests/bench/starts.py"), np.random.default_rng(0)
    seeds, labels, aucs, files, true = [0, 7, 9], ["A", "B"], {}, [], rng.integers(0, 2, (60, 2))
    for way in ("probe", "finetune"):
        for seed in seeds:
            hard = rng.random((60, 2)) * (2 + seed)                         # alike for both arms of a seed
            for arm in ("random", "better"):
                prob = (true + hard + rng.random((60, 2)) * (1 if arm == "better" else 3)) / 20
                file = tmp_path / f"{arm}-{way}/predictions/seed{seed}/test.csv"
                file.parent.mkdir(parents=True)
                columns = {"path": range(60), "patient": range(60)}
                columns |= {f"true_{label}": true[:, k] for k, label in enumerate(labels)}
                columns |= {f"prob_{label}": prob[:, k] for k, label in enumerate(labels)}
                pd.DataFrame(columns).to_csv(file, index=False)
                files.append(file)
                aucs[arm, way, seed] = np.mean([roc_auc_score(true[:, k], prob[:, k]) for k in range(2)])
    run_here(load_script("evaluate/metrics.py"), monkeypatch, *files, "--bootstrap", 300,
             "--out", tmp_path / "metrics.csv")
    pairs = [("better", "random"), ("random", "better")]
    text = starts.table(tmp_path / "metrics.csv", ["random", "better"], ["probe", "finetune"], pairs)
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[0] for row in rows] == ["random", "better", "better - random", "random - better"]
    for arm, *cells in rows[:2]:
        for way, cell in zip(head[1:], cells):
            values = [aucs[arm, way, seed] for seed in seeds]
            assert cell == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
    stored = np.load(tmp_path / "draws.npz")

    def draws_of(run):
        return stored[run][list(stored[f"{run}/rows"]).index("all|auc_mean||")].astype(float)

    for (left, right), (_, *cells) in zip(pairs, rows[2:]):
        for way, cell in zip(head[1:], cells):
            gains = [aucs[left, way, seed] - aucs[right, way, seed] for seed in seeds]
            draws = [draws_of(f"{left}-{way}/{seed}/test") - draws_of(f"{right}-{way}/{seed}/test")
                     for seed in seeds]
            mean, low, high = paired_interval(gains, draws)
            assert cell.strip("*") == f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            assert not cell.startswith("**") or low * high > 0


def draw_pack(folder, splits, side, labels=()):
    """A pack of noise: {split: number of images}."""
    rng, n = np.random.default_rng(0), sum(splits.values())
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", rng.integers(0, 256, (n, side, side), dtype=np.uint8))
    names = np.repeat(list(splits), list(splits.values()))
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "split": names})
    rows.assign(**{label: rows.index % 2 for label in labels}).to_csv(folder / "manifest.csv", index=False)


def test_kinds_pretrain_on_equal_numbers_alike_but_for_the_images(tmp_path):
    starts = load_script("tests/bench/starts.py")
    for place, kind in enumerate(starts.KINDS):
        draw_pack(tmp_path / kind, dict(pretrain=9 + place, val=3), 4)
    random, *arms = starts.arms_of_kinds(Namespace(raw=tmp_path))
    assert random.script is None and len(arms) == len(starts.STRATEGIES) * len(starts.KINDS)
    flags = {}
    for arm in arms:
        kind = next(kind for kind in starts.KINDS if arm.name.endswith(f"-{kind}"))
        place = arm.pretrain.index(tmp_path / kind / "manifest.csv")
        flags.setdefault(arm.script, []).append(arm.pretrain[:place] + arm.pretrain[place + 1:])
        assert arm.pretrain[arm.pretrain.index("--samples") + 1] == 9
    for alike in flags.values():
        assert len(alike) == len(starts.KINDS) and all(row == alike[0] for row in alike)


@pytest.mark.slow
def test_real_images_of_one_kind_from_packs_to_the_table(tmp_path, monkeypatch, capsys):
    starts = load_script("tests/bench/starts.py")
    monkeypatch.setattr(starts, "KINDS", ["natural"])
    monkeypatch.setattr(starts, "STRATEGIES", {"gmml": ["--batch", 4]})
    monkeypatch.setattr(starts, "MODEL", SMALL)
    monkeypatch.setattr(starts, "PRETRAIN", ["--epochs", 2, "--warmup_epochs", 1])
    monkeypatch.setattr(starts, "WAYS", {"probe-all": ["--probe"]})
    # without the seconds of importing
    monkeypatch.setattr(starts.subprocess, "run", lambda command, **_: fork_script(*command[1:]))
    draw_pack(tmp_path / "raw/natural", dict(pretrain=9, val=3), 20)
    draw_pack(tmp_path / "raw/pneumonia", dict(train=20, val=10, test=12), 12, ["Pneumonia"])
    out = tmp_path / "out"
    run_here(starts, monkeypatch, "--raw", tmp_path / "raw", "--out", out, "--seeds", 0, 1)
    text = capsys.readouterr().out
    assert text == (out / "starts.md").read_text()
    names = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert names == ["random", "gmml-natural", "gmml-natural - random"]
    for seed in (0, 1):
        run = torch.load(out / f"gmml-natural/pretrain/seed{seed}/backbone.pt", weights_only=True)
        classifier = torch.load(out / f"gmml-natural/probe-all/seed{seed}/classifier.pt", weights_only=True)
        assert run["step"] == 4 and run["seed"] == seed == classifier["seed"]
        kernel = "patch_embed.proj.weight"                                  # a probe leaves it as it was
        assert torch.equal(run["model"][kernel], classifier["model"][kernel])


def test_the_rows_that_are_measured_are_rows_of_the_study():
    starts, table = load_script("tests/bench/starts.py"), yaml.safe_load((ROOT / "experiments.yaml").read_text())
    strategies = [table[row].get("pretrain", {}).get("strategy") for row in starts.ROWS]
    assert strategies == [None, "supervised", "gmml", "sit", "dino", "moco_v3", "simmim"]
