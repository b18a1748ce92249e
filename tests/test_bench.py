"""tests/bench: what the benchmarks compute from their measurements."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import yaml
from conftest import ROOT, load_script, run_here
from sklearn.metrics import roc_auc_score


def test_the_table_of_starts_is_the_gain_over_the_first_row(tmp_path, monkeypatch):
    starts, rng = load_script("tests/bench/starts.py"), np.random.default_rng(0)
    seeds, labels, aucs, files, true = [0, 7, 9], ["A", "B"], {}, [], rng.integers(0, 2, (60, 2))
    for row in ("random", "better"):
        for name in ("probe", "finetune"):
            for seed in seeds:
                prob = (true + rng.random((60, 2)) * (2 if row == "better" else 9)) / 10
                file = tmp_path / f"{row}-{name}/predictions/seed{seed}/test.csv"
                file.parent.mkdir(parents=True)
                columns = {"path": range(60), "patient": range(60)}
                columns |= {f"true_{label}": true[:, k] for k, label in enumerate(labels)}
                columns |= {f"prob_{label}": prob[:, k] for k, label in enumerate(labels)}
                pd.DataFrame(columns).to_csv(file, index=False)
                files.append(file)
                aucs[row, name, seed] = np.mean([roc_auc_score(true[:, k], prob[:, k]) for k in range(2)])
    run_here(load_script("evaluate/metrics.py"), monkeypatch, *files, "--bootstrap", 0,
             "--out", tmp_path / "metrics.csv")
    text = starts.table(SimpleNamespace(rows=["random", "better"], seeds=seeds),
                        pd.read_csv(tmp_path / "metrics.csv"))
    cells = [cell.strip() for cell in text.splitlines()[3].split("|")[2:-1]]
    for name, mean, gain in zip(("probe", "finetune"), cells[::2], cells[1::2]):
        base, better = (np.array([aucs[row, name, seed] for seed in seeds]) for row in ("random", "better"))
        gains = better - base
        assert mean == f"{better.mean():.3f} ({better.std(ddof=1):.3f})"
        assert gain == f"{gains.mean():+.3f} ± {gains.std(ddof=1) / 3 ** 0.5:.3f}" and gains.mean() > 0
    assert "+0.000 ± 0.000" in text.splitlines()[2]


def test_the_rows_whose_starts_are_measured_are_rows_of_the_study():
    starts, table = load_script("tests/bench/starts.py"), yaml.safe_load((ROOT / "experiments.yaml").read_text())
    strategies = [table[row].get("pretrain", {}).get("strategy") for row in starts.ROWS]
    assert strategies == [None, "supervised", "gmml", "sit", "dino", "moco_v3", "simmim"]
