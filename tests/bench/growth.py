"""How GMML's pre-training grows: time and memory against images in the pack, image size and processes.

A small network is trained for some steps by pretrain/gmml.py as a person would start it, one thread a
process. The packs are sparse files, so 100,000 images of 224 pixels cost no disk; they are mapped, and memory
that a process has for itself (RssAnon) should not depend on their number.

    python tests/bench/growth.py --out growth.json --plot growth.png         some minutes

Writes  a Markdown table on the terminal; --out: JSON, a row a run; --plot: the same as a picture.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(patch_size=16, embed_dim=96, depth=4, num_heads=3)
BASE = dict(images=10_000, size=128, processes=1)           # of which each series varies one
SERIES = dict(images=[1_000, 10_000, 100_000], size=[64, 96, 128, 192, 224], processes=[1, 2])
BATCH = 64


def sparse_pack(folder, images, size):
    """A pack of `images` black images and its manifest."""
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (images, size, size)).flush()
    lines = "".join(f"{i}.png,pretrain\n" for i in range(images))
    (folder / "manifest.csv").write_text("path,split\n" + lines)


def own_memory(root):
    """Largest RssAnon, in MiB, among the Python processes below `root` that run the training script."""
    largest = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command = status.with_name("cmdline").read_bytes()
            if str(root).encode() in command and b"torch.distributed.run" not in command:
                anon = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
                largest = max(largest, int(anon.split()[1]) / 1024)
        except (OSError, StopIteration):            # gone in the meantime, or a kernel thread
            pass
    return largest


def measure(images, size, processes, steps):
    """Seconds of a step (median) and peak memory of a process, from a run of the script."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sparse_pack(folder, images, size)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, ROOT / "pretrain/gmml.py", "--manifest", folder / "manifest.csv",
                   "--out", folder / "run", "--model_args", json.dumps({**MODEL, "img_size": size}),
                   "--batch", BATCH, "--steps", steps, "--log-steps", 1, "--device", "cpu",
                   "--picture-epochs", 1000]
        peak, done = [0], threading.Event()

        def watch():
            while not done.wait(0.2):
                peak[0] = max(peak[0], own_memory(folder))
        watcher = threading.Thread(target=watch)
        watcher.start()
        result = subprocess.run([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                capture_output=True, text=True)
        done.set()
        watcher.join()
        if result.returncode:
            sys.exit(result.stderr[-2000:])
        times = [json.loads(line)["time"] for line in (folder / "run/log.jsonl").open()]
    return dict(step_s=statistics.median(np.diff(times)[1:]), own_mib=peak[0])


def draw(rows, path):
    """Step time over each of the three, memory of a process over the images."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, (name, what) in zip(axes, [("images", "step_s"), ("size", "step_s"), ("processes", "step_s"),
                                         ("images", "own_mib")]):
        points = sorted((row[name], row[what]) for row in rows if row["series"] == name)
        axis.plot(*zip(*points), "o-", color="#0072B2")
        axis.set(xlabel=dict(images="images in the pack", size="side in pixels", processes="processes")[name],
                 title=dict(step_s="seconds a step", own_mib="MiB of a process")[what], ylim=(0, None))
        if name == "images":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run (12)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()
    rows, begun = [], time.monotonic()
    print("| varied | images | size | processes | step, s | img/s | own memory, MiB |\n"
          "|---|---|---|---|---|---|---|")
    for name, values in SERIES.items():
        for value in values:
            setting = {**BASE, name: value}
            rows.append(dict(series=name, **setting, **measure(**setting, steps=args.steps)))
            row = rows[-1]
            print(f"| {name} | {row['images']:,} | {row['size']} | {row['processes']} | "
                  f"{row['step_s']:.3f} | {BATCH / row['step_s']:.0f} | {row['own_mib']:.0f} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(dict(seconds=time.monotonic() - begun, rows=rows), indent=1) + "\n")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
