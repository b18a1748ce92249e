"""Time evaluate/ at the study's size: 14 experiments x 5 seeds x 5 test sets, 2,000 resamples of patients.

Predictions are drawn (two images a patient), then scored, compared and reported by the scripts as a person
runs them; the bootstrap by weighted ranks is timed against a loop over scikit-learn's roc_auc_score.
Run by hand:

    python tests/bench/evaluate.py --folder /tmp/bench --out bench_evaluate.json
    python tests/bench/evaluate.py --folder /tmp/bench --scale 0.02 --out /tmp/bench.json      # a minute

Writes  FOLDER/runs/<exp>/predictions/seed<k>/<test set>.csv (0.7 GB; kept, and used again), FOLDER/results;
        --out: JSON, a row a measurement; a Markdown table on the terminal. CPU s: user and system.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
EXPS = "1.1 1.2 2.1 2.2 2.3 2.4 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8".split()
SEEDS = (0, 11, 21, 42, 100)
RESAMPLES, NAIVE_RESAMPLES = 2000, 5
NIH14 = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation "
         "Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
STUDY5 = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion"]
SETS = {"nih_test": (25596, NIH14), "vindr_test": (3000, [x for x in NIH14 if x != "Edema"]),
        "padchest": (1860, [x for x in STUDY5 if x != "Edema"]),
        "chexpert_test": (38240, STUDY5), "chexpert_valid": (202, STUDY5)}


def draw(path, images, labels, exp, seed):
    """One predictions file: truth and patients belong to the test set, scores to experiment and seed."""
    truth, run = np.random.default_rng([images, len(labels)]), np.random.default_rng([EXPS.index(exp), seed])
    y = truth.random((images, len(labels))) < np.geomspace(0.2, 0.02, len(labels))
    y[:2] = [[True], [False]]
    strength = 1 + 0.05 * EXPS.index(exp) + 0.05 * run.standard_normal()
    hint = truth.standard_normal(y.shape) + run.standard_normal(y.shape)       # runs see partly the same
    p = 1 / (1 + np.exp(2 - hint - strength * y))
    frame = pd.DataFrame({"path": [f"images/{i:08d}.png" for i in range(images)],
                          "patient": [f"patient{i // 2:05d}" for i in range(images)]})
    frame = frame.join(pd.DataFrame(y.astype(int), columns=[f"true_{label}" for label in labels]))
    frame = frame.join(pd.DataFrame(p, columns=[f"prob_{label}" for label in labels]))
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path.with_suffix(".part"), index=False, float_format="%.8g")
    os.replace(path.with_suffix(".part"), path)


def make(runs, scale):
    """All files of the study that are not there yet; returns {path: images}."""
    files = {runs / exp / "predictions" / f"seed{seed}" / f"{name}.csv":
             (max(int(scale * n), 100), labels, exp, seed)
             for exp in EXPS for seed in SEEDS for name, (n, labels) in SETS.items()}
    with ProcessPoolExecutor() as pool:
        for job in [pool.submit(draw, path, *of) for path, of in files.items() if not path.exists()]:
            job.result()
    return {path: of[0] for path, of in files.items()}


def timed(action, who):
    """(result, wall s, CPU s) of a call; who: resource.RUSAGE_SELF or RUSAGE_CHILDREN."""
    before, start = resource.getrusage(who), time.perf_counter()
    result = action()
    after = resource.getrusage(who)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, time.perf_counter() - start, cpu


def script(*command):
    """Run a script of evaluate/ as a person would: (None, wall s, CPU s)."""
    call = [sys.executable, str(ROOT / "evaluate" / command[0]), *map(str, command[1:])]
    return timed(lambda: subprocess.run(call, check=True, stdout=subprocess.DEVNULL),
                 resource.RUSAGE_CHILDREN)


def bootstraps(path):
    """The AUC bootstrap of one file by weighted ranks and by a loop; they must agree to 1e-12."""
    spec = importlib.util.spec_from_file_location("metrics", ROOT / "evaluate" / "metrics.py")
    metrics = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metrics)
    test = metrics.read_predictions(path)
    index, draws = metrics.draw_patients(test.patient, RESAMPLES)

    def loop():
        return np.array([[roc_auc_score(y, p, sample_weight=counts[index])
                          for y, p in zip(test.y.T, test.p.T)] for counts in draws[:NAIVE_RESAMPLES]])

    ranks = timed(lambda: metrics.auc_draws(test.y, test.p, index, draws), resource.RUSAGE_SELF)
    naive = timed(loop, resource.RUSAGE_SELF)
    gap = np.abs(ranks[0][:NAIVE_RESAMPLES] - naive[0]).max()
    assert gap < 1e-12, f"the two bootstraps differ by {gap}"
    shape = f"{len(test.y):,} x {test.y.shape[1]}"
    yield f"AUC bootstrap by weighted ranks, {shape}, one process", len(test.y), RESAMPLES, *ranks[1:]
    what = f"the same, roc_auc_score in a loop (differs by {gap:.0e})"
    yield what, len(test.y), NAIVE_RESAMPLES, *naive[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made and kept")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the study's images (1)")
    args = parser.parse_args()
    runs, results = args.folder / "runs", args.folder / "results"
    files, rows = make(runs, args.scale), []
    images = sum(files.values())

    def note(what, images, resamples, wall, cpu):
        rows.append({"what": what, "images": images, "resamples": resamples, "wall_s": round(wall, 2),
                     "cpu_s": round(cpu, 2)})
        print(f"| {what} | {images:,} | {resamples:,} | {wall:.1f} | {cpu:.1f} |", flush=True)

    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {len(files)} files\n"
          f"\n| what | images | resamples | wall s | CPU s |\n|---|--:|--:|--:|--:|")
    commands = {
        "metrics.py": ["metrics.py", *files, "--out", results / "metrics.csv", "--bootstrap", RESAMPLES],
        "compare.py": ["compare.py", "--metrics", results / "metrics.csv", "--out", results],
        "report.py": ["report.py", "--metrics", results / "metrics.csv", "--out", results,
                      "--predictions", runs, "--verdicts", results / "verdicts.csv"]}
    for name, command in commands.items():
        note(name, images, RESAMPLES if "--bootstrap" in command else 0, *script(*command)[1:])
    for row in bootstraps(runs / EXPS[0] / "predictions" / f"seed{SEEDS[0]}" / "nih_test.csv"):
        note(*row)
    facts = {"cores": os.cpu_count(), "load": os.getloadavg(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
