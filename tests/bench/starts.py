"""What each start is worth on labelled images of anybody: every strategy against random, with few labels.

Each row of experiments.yaml that is named pre-trains a small transformer on the training images, their labels
unseen (but for the supervised row, which learns from them all). What it learnt is then measured twice: by a
linear probe on frozen features, and by fine-tuning, both with few labels, drawn anew by each seed.

    python tests/bench/starts.py --manifest packed/manifest.csv --out /tmp/starts --model \\
        '{"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}' --mask_unit 4

Reads   a manifest with splits train, val and test and labels, images.npy beside it (see data_prep/pack.py).
Writes  --out: the run folders, log.txt, metrics.csv, and starts.md, which is also printed: mean AUC over
        the labels, as mean (standard deviation) of the seeds; gain over the first row, in pairs of seeds, with
        its standard error. Called again, it goes on: what is there is not made again.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
# random, supervised, GMML, SiT, DINO, MoCo-v3, SimMIM: strategies of rows; the images are the manifest's
ROWS = ["2.1", "2.3", "3.3", "4.3.1-100k", "4.1.1-100k", "c.10-moco", "c.10-simmim"]


def call(args, script, *flags, processes=1):
    """A script of the project, its output to log.txt; what it has to say of a failure ends this program."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [ROOT / script, *flags]
    with open(args.out / "log.txt", "a") as log:
        done = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        tail = (args.out / "log.txt").read_text().splitlines()[-15:]
        sys.exit("\n".join(tail) + f"\nerror: {script} failed; its words are above and in {args.out}/log.txt")


def measure(args, row):
    """Pre-train a row, then probe and fine-tune it with every seed and predict the test images."""
    run, start = args.out / row, "random"
    rows = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    strategy = rows[row].get("pretrain", {}).get("strategy")
    if strategy:
        flags = ["--mask_unit", args.mask_unit] if strategy == "simmim" and args.mask_unit else []
        call(args, f"pretrain/{strategy}.py", "--exp", row, "--miniature", "--manifest", args.manifest,
             "--split", "train", "--model_args", args.model, "--out", run / "pretrain", *flags,
             processes=args.processes)
        start = run / "pretrain/backbone.pt"
    for name, flags in (("probe", ["--probe"]), ("finetune", [])):
        call(args, "finetune/classify.py", "--exp", row, "--miniature", "--init", start, "--train", args.manifest,
             "--model_args", args.model, "--labels", args.labels, "--epochs", args.epochs,
             "--seeds", ",".join(map(str, args.seeds)), "--out", run / name, *flags)
        for seed in args.seeds:
            predictions = args.out / f"{row}-{name}/predictions/seed{seed}/test.csv"
            if not predictions.exists():
                call(args, "evaluate/predict.py", "--checkpoint", run / name / f"seed{seed}/classifier.pt",
                     "--manifest", args.manifest, "--out", predictions)
            yield predictions


def table(args, metrics):
    """The AUCs of all rows as Markdown; the first row is what the others are compared with."""
    auc = metrics.query("metric == 'auc_mean' and variant == 'corrected' and labels == labels.max()")
    auc = auc.set_index(["exp", "seed"])["value"]
    lines = ["| start | probe | gain | fine-tuned | gain |", "|---|---|---|---|---|"]
    for row in args.rows:
        cells = []
        for name in ("probe", "finetune"):
            values, base = (auc[f"{which}-{name}"].loc[args.seeds] for which in (row, args.rows[0]))
            gain = values - base
            cells += [f"{values.mean():.3f} ({values.std():.3f})", f"{gain.mean():+.3f} ± {gain.sem():.3f}"]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="manifest.csv of the images")
    add("--model", required=True, metavar="JSON", help="model_args of the transformer, with its img_size")
    add("--out", type=Path, required=True, help="folder to write into")
    add("--rows", nargs="+", default=ROWS, metavar="ROW", help="rows of experiments.yaml, random first")
    add("--labels", type=float, default=0.05, help="share of the patients whose labels are used (0.05)")
    add("--epochs", type=int, default=50, help="of fine-tuning (50)")
    add("--seeds", type=int, nargs="+", default=[0, 11, 21, 42, 100], help="two or more (0 11 21 42 100)")
    add("--mask_unit", type=int, help="pixels of SimMIM's squares, whole patches (that of its row)")
    add("--processes", type=int, default=1, help="of pre-training (1)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = []
    for row in args.rows:
        print(f"{row} ...", file=sys.stderr, flush=True)
        files += measure(args, row)
    call(args, "evaluate/metrics.py", *files, "--bootstrap", 0, "--out", args.out / "metrics.csv")
    text = table(args, pd.read_csv(args.out / "metrics.csv"))
    (args.out / "starts.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
