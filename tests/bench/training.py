"""Time and memory of the training scripts on this machine, alone or against another checkout, in turn.

Each script trains a few steps on drawn 224-pixel images as a person would start it, twice: the whole loop, and
the step alone (views computed once). Seconds are the median between two lines of log.jsonl; memory is the peak
of the process. With --against the two trees run one after the other, round by round, and their ratio is printed:
machines drift, ratios less so.

    python tests/bench/training.py --out training.json                  some 6 minutes on two cores
    python tests/bench/training.py --against ../before --methods gmml classify --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIZE, N_IMAGES, N_LABELS = 224, 64, 14
FINE = ["--train-split", "pretrain", "--val-split", "pretrain", "--seeds", "0"]
METHODS = {             # name: script, its flags, images a step
    "gmml": ("pretrain/gmml.py", [], 8),
    "sit": ("pretrain/sit.py", [], 8),
    "dino": ("pretrain/dino.py", [], 8),
    "moco_v3": ("pretrain/moco_v3.py", [], 8),
    "simmim": ("pretrain/simmim.py", [], 16),
    "supervised": ("pretrain/supervised.py", ["--val_samples", "0"], 16),
    "classify": ("finetune/classify.py", FINE, 16),
    "classify resnet50": ("finetune/classify.py", [*FINE, "--arch", "resnet50", "--recipe", "resnet"], 16),
}
# Runs a script's main(); with "step" its views are computed once for each size and count and then kept.
DRIVER = """
import importlib.util, re, sys
part, path, *words = sys.argv[1:]
spec = importlib.util.spec_from_file_location("script", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def once(function):
    known = {}
    def recall(images, *args, **how):
        key = len(images), *(arg for arg in args if isinstance(arg, int))
        if key not in known:
            known[key] = function(images, *args, **how)
        return known[key].clone()
    return recall

for name in ("augment", "strong_view", "random_resized_crop") if part == "step" else ():
    if hasattr(module, name):
        setattr(module, name, once(getattr(module, name)))
sys.argv = [path, *words]
module.main()
print("PEAK", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def draw_pack(folder):
    """Smooth random images with labels, packed; returns the manifest."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (N_IMAGES, 14, 14), dtype=np.uint8)
    np.save(folder / "images.npy", coarse.repeat(SIZE // 14, 1).repeat(SIZE // 14, 2))
    labels = rng.integers(0, 2, (N_IMAGES, N_LABELS))
    header = "path,split," + ",".join(f"label{k}" for k in range(N_LABELS))
    rows = [f"{i}.png,pretrain," + ",".join(map(str, labels[i])) for i in range(N_IMAGES)]
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "manifest.csv"


def measure(root, method, part, manifest, steps):
    """Seconds an image and the peak in MiB of a run of a few steps of the script in a checkout."""
    script, flags, batch = METHODS[method]
    source = "--train" if script.startswith("finetune") else "--manifest"
    with tempfile.TemporaryDirectory() as out:
        words = [source, manifest, "--out", out, "--device", "cpu", "--batch", batch, "--warmup_epochs", 1,
                 "--steps", steps + 3, "--log-steps", 1, *flags]
        if "picture_epochs" in (root / script).read_text():
            words += ["--picture-epochs", 1000]
        command = [sys.executable, "-c", DRIVER, part, root / script, *words]
        done = subprocess.run([*map(str, command)], cwd=root, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {root / script} failed: {done.stderr[-1500:]}")
        log = next(Path(out).rglob("log.jsonl")).read_text().splitlines()
    times = [line["time"] for line in map(json.loads, log) if "loss" in line]
    return dict(seconds=statistics.median(np.diff(times)[1:steps + 1]) / batch,
                mib=int(done.stdout.split("PEAK")[1]) / 1024)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=6, help="steps timed of each run (6)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each script and tree (1)")
    parser.add_argument("--against", type=Path, help="another checkout, for instance of a git worktree")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    trees = {"here": ROOT} | ({"there": args.against.resolve()} if args.against else {})
    rows, begun = [], time.monotonic()
    print("| script, batch | loop, img/s | step, img/s | MiB |" + " there/here: loop | step | memory |" * (len(trees) > 1))
    print("|---" * (4 + 3 * (len(trees) > 1)) + "|")
    for method in args.methods:
        runs = {(tree, part): [] for tree in trees for part in ("loop", "step")}
        with tempfile.TemporaryDirectory() as folder:
            manifest = draw_pack(Path(folder))
            for _ in range(args.rounds):
                for tree, part in runs:
                    runs[tree, part].append(measure(trees[tree], method, part, manifest, args.steps))
        rows.append(dict(method=method, runs={f"{tree} {part}": found for (tree, part), found in runs.items()}))

        def ratio(part, what):
            ratios = [there[what] / here[what] for there, here in zip(runs["there", part], runs["here", part])]
            return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

        loop, step = (statistics.median(run["seconds"] for run in runs["here", part]) for part in ("loop", "step"))
        mib = statistics.median(run["mib"] for run in runs["here", "loop"])
        line = f"| {method}, {METHODS[method][2]} | {1 / loop:.1f} | {1 / step:.1f} | {mib:.0f} |"
        if len(trees) > 1:
            line += f" {ratio('loop', 'seconds')} | {ratio('step', 'seconds')} | {ratio('loop', 'mib')} |"
        print(line, flush=True)
    if args.out:
        facts = dict(seconds=time.monotonic() - begun, cores=os.cpu_count(), rows=rows)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
