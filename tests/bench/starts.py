"""What each start is worth on labelled images of anybody: a linear probe and fine-tuning against random.

    python tests/bench/starts.py --manifest packed/manifest.csv --out /tmp/starts --model \\
        '{"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}' --mask_unit 4
    python tests/bench/starts.py --raw PACKS --out /tmp/kinds --workers 2

--manifest  which strategy: rows of experiments.yaml pre-train a small transformer on the training images,
            their labels unseen (but for the supervised row, which learns from them all); few labels follow
--raw       which images: the study's question in small. GMML and MoCo-v3 pre-train on equal numbers of images
            of PACKS/cxr, oct, chest_ct and natural for equal steps; the labels, 5 % and all, are those
            of PACKS/pneumonia; 2.5 hours of one core
A seed draws all of a run: the network's pre-training, the labelled images, the head, the order of training.

Reads   packs (see data_prep/pack.py): manifest.csv and images.npy; the labelled one has train, val and test.
Writes  --out: the run folders, a log of each, metrics.csv, draws.npz and starts.md, which is also printed:
        test AUC, mean over the labels, as mean (standard deviation) of the seeds; below, differences in pairs
        of seeds with 95 % intervals over seeds and test patients, by evaluate/compare.py; bold: p < 0.05
        after Holm over all differences. Called again, it goes on: what is there is not made again.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
# random, supervised, GMML, SiT, DINO, MoCo-v3, SimMIM: strategies of rows; the images are the manifest's
ROWS = ["2.1", "2.3", "3.3", "4.3.1-100k", "4.1.1-100k", "c.10-moco", "c.10-simmim"]
KINDS = ["cxr", "oct", "chest_ct", "natural"]
# of --raw: one setting for all kinds, chosen on an equal mixture of them; read out by the mean of the tokens
MODEL = ('{"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 4, "num_heads": 4,'
         ' "global_pool": "avg", "fc_norm": false}')
STRATEGIES = {
    "gmml": ["--batch", 16, "--lr", 3.2e-2, "--drop", 0.5, "--crop_scale", [0.5, 1.0]],
    "moco_v3": ["--batch", 32, "--lr", 8e-3, "--crop_scale", [0.2, 1.0], "--hidden_dim", 256,
                "--out_dim", 64],
}
PRETRAIN = ["--epochs", 20, "--warmup_epochs", 2]
TUNE = ["--lr", 5e-4, "--warmup_epochs", 0, "--crop_scale", [0.6, 1.0]]
WAYS = {
    "probe-5%": ["--labels", 0.05, "--probe"],
    "finetune-5%": ["--labels", 0.05, "--batch", 16, "--epochs", 20],
    "probe-all": ["--probe"],
    "finetune-all": ["--batch", 32, "--epochs", 2],
}


class Arm(NamedTuple):
    """A start: script and flags of its pre-training, None for random; flags of its fine-tuning."""
    name: str
    script: str | None
    pretrain: list
    finetune: list


def load(name):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(log, script, *flags, processes=1):
    """A script of the project, its output to a log; what it has to say of a failure ends this program."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [ROOT / script, *flags]
    with open(log, "a") as file:
        done = subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text().splitlines()[-15:]
        sys.exit("\n".join(tail) + f"\nerror: {script} failed; its words are above and in {log}")


def arms_of_rows(args):
    """The arms of --manifest: rows of experiments.yaml in the miniature."""
    rows = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    for row in args.rows:
        strategy = rows[row].get("pretrain", {}).get("strategy")
        common = ["--exp", row, "--miniature", "--model_args", args.model]
        flags = [*common, "--manifest", args.manifest, "--split", "train"]
        if strategy == "simmim" and args.mask_unit:
            flags += ["--mask_unit", args.mask_unit]
        yield Arm(row, strategy and f"pretrain/{strategy}.py", flags, common)


def arms_of_kinds(args):
    """The arms of --raw: random, then each strategy on as many images of each kind as the smallest has."""
    common = ["--model_args", MODEL]
    manifests = {kind: args.raw / kind / "manifest.csv" for kind in KINDS}
    numbers = [pd.read_csv(manifest)["split"].eq("pretrain").sum() for manifest in manifests.values()]
    yield Arm("random", None, [], [*common, *TUNE])
    for strategy, kind in itertools.product(STRATEGIES, KINDS):
        flags = ["--manifest", manifests[kind], "--samples", min(numbers)]
        flags += [*common, *PRETRAIN, *STRATEGIES[strategy]]
        yield Arm(f"{strategy}-{kind}", f"pretrain/{strategy}.py", flags, [*common, *TUNE])


def train(args, arm, seed):
    """Pre-train an arm with a seed, then probe and fine-tune it in every way."""
    run, start = args.out / arm.name, "random"
    run.mkdir(exist_ok=True)
    log, folder = run / f"log{seed}.txt", run / f"pretrain/seed{seed}"
    print(f"{arm.name}, seed {seed} ...", file=sys.stderr, flush=True)
    if arm.script:
        call(log, arm.script, *arm.pretrain, "--seed", seed, "--out", folder, processes=args.processes)
        start = folder / "backbone.pt"
    for way, flags in args.ways.items():
        call(log, "finetune/classify.py", *arm.finetune, *flags, "--init", start, "--train", args.manifest,
             "--seeds", seed, "--out", run / way)


def predict(args, arm, module):
    """Predict the test images with an arm's classifiers, here: a process of its own takes longer to start."""
    for way, seed in itertools.product(args.ways, args.seeds):
        file = args.out / f"{arm.name}-{way}/predictions/seed{seed}/test.csv"
        classifier = args.out / arm.name / way / f"seed{seed}/classifier.pt"
        flags = ["--checkpoint", classifier, "--manifest", args.manifest, "--out", file]
        if not file.exists():
            sys.argv = [module.__file__, *map(str, flags)]
            with contextlib.redirect_stdout(None):
                module.main()
        yield file


def difference(compare, arms, left, right, key):
    """left - right in pairs of seeds, an estimate: its error is over the pairs and over test patients."""
    pairs = compare.combine([(1, arms[left, "test", key]), (-1, arms[right, "test", key])])
    return compare.estimate([(1, pairs)])


def table(metrics, arms, ways, pairs):
    """Markdown: the AUCs of the arms, then the differences of pairs of arms, a column a way."""
    compare = load("evaluate/compare.py")
    measured, *_ = compare.read_runs(metrics)
    known = {key for *_, key in measured}
    key = next(key for key in ("all|auc_mean||", "14|auc_mean||", "5|auc_mean||") if key in known)
    lines = [f"| test AUC | {' | '.join(ways)} |", "|---" * (1 + len(ways)) + "|"]
    for arm in arms:
        found = [measured[f"{arm}-{way}", "test", key] for way in ways]
        cells = [f"{runs.mean:.3f} ({runs.sd:.3f})" for runs in found]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    found = [difference(compare, measured, f"{left}-{way}", f"{right}-{way}", key)
             for left, right in pairs for way in ways]
    cells = []
    for result, p in zip(found, compare.holm([result["p"] for result in found])):
        cell = f"{result['effect']:+.3f} ({result['ci_low']:+.3f} to {result['ci_high']:+.3f})"
        cells.append(f"**{cell}**" if p < 0.05 else cell)
    for place, (left, right) in enumerate(pairs):
        row = cells[place * len(ways):][:len(ways)]
        lines.append(f"| {left} - {right} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--manifest", type=Path, help="manifest.csv of labelled images")
    images.add_argument("--raw", type=Path, help="folder of packs: cxr, oct, chest_ct, natural, pneumonia")
    add("--out", type=Path, required=True, help="folder to write into")
    add("--seeds", type=int, nargs="+", default=[*range(10)], help="two or more (0 to 9)")
    add("--workers", type=int, default=1, help="runs side by side (1)")
    add("--model", metavar="JSON", help="--manifest: model_args of the transformer, with its img_size")
    add("--rows", nargs="+", default=ROWS, help="--manifest: rows of experiments.yaml, random first")
    add("--labels", type=float, default=0.05, help="--manifest: share of the patients with labels (0.05)")
    add("--epochs", type=int, default=50, help="--manifest: of fine-tuning (50)")
    add("--mask_unit", type=int, help="--manifest: pixels of SimMIM's squares (that of its row)")
    add("--processes", type=int, default=1, help="of a pre-training (1)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"                 # a core an arm
    if args.raw:
        arms, args.ways, args.manifest = [*arms_of_kinds(args)], WAYS, args.raw / "pneumonia/manifest.csv"
        pairs = []
        for strategy in STRATEGIES:
            names = {kind: f"{strategy}-{kind}" for kind in KINDS}
            pairs += [(name, "random") for name in names.values()]
            pairs += [(names[kind], names["natural"]) for kind in KINDS[:-1]]
            pairs += [(names["cxr"], names[kind]) for kind in KINDS[1:-1]]
    else:
        arms, labels = [*arms_of_rows(args)], ["--labels", args.labels]
        args.ways = {"probe": [*labels, "--probe"], "finetune": [*labels, "--epochs", args.epochs]}
        pairs = [(arm.name, arms[0].name) for arm in arms[1:]]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda run: train(args, *run), itertools.product(arms, args.seeds)))
    module = load("evaluate/predict.py")
    files = [file for arm in arms for file in predict(args, arm, module)]
    call(args.out / "log.txt", "evaluate/metrics.py", *files, "--workers", args.workers,
         "--out", args.out / "metrics.csv")
    text = table(args.out / "metrics.csv", [arm.name for arm in arms], args.ways, pairs)
    (args.out / "starts.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
