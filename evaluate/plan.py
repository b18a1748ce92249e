"""What every experiment costs before it is run: steps, images, FLOPs, GPU-hours, and what is missing for it.

    python evaluate/plan.py                        every row of experiments.yaml
    python evaluate/plan.py --exp '3.4,4.*' --rates gpu.json        these rows, by measured rates, too
    python evaluate/plan.py --exp '3.4,4.*' --list      a line a row: exp, strategy, data, parent, seeds

Reads experiments.yaml and the DEFAULTS written in the training scripts (as text, nothing is run). FLOPs are
counted by PyTorch on the real architecture (two per multiply-add) for one forward pass and multiplied by the
passes of the method; a backward pass counts as two. Hours of a V100 assume a quarter of its peak; measured
hours are those on the GPU of a gpu.json that tests/bench/gpu.py wrote, where it ran the script with this
network and image size, as if validating and predicting an image took as long as training on it.
"""

import argparse
import ast
import difflib
import fnmatch
import json
import math
import signal
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
V100_HOUR = 31.25e12 * 3600                                     # FLOPs
N_TRAIN, N_VAL, N_TEST = 75_312, 11_212, 25_596 + 3_000 + 1_860 + 38_240 + 202
# Forward passes an image: three for a view that learns, one for a teacher's view; DINO's local crops apart.
PASSES = {"gmml": 6, "sit": 8, "moco_v3": 8, "dino": 8, "simmim": 3, "supervised": 3, "classify": 3}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def choose(table, patterns):
    """The rows that comma-separated patterns name, in their order, as keys of a dict."""
    for exp in table:
        if not isinstance(exp, str):
            fail(f"experiments.yaml: the key {exp} is read as a number; write it in quotes")
    known = [exp for exp in table if not exp.startswith(("defaults", "miniature"))]
    rows = {}
    for part in patterns.split(","):
        found = fnmatch.filter(known, part)
        if not found:
            near = ", ".join(difflib.get_close_matches(part, known)) or "none"
            fail(f"experiments.yaml has no experiment '{part}'; nearest: {near}")
        rows |= dict.fromkeys(found)
    return rows


def keys_of(table, exp, *stages):
    """The keys of a row: the defaults of the file, then its own; each time those of the stages last."""
    keys = {}
    for name in ("defaults", exp):
        keys |= table[name]
        for stage in stages:
            keys |= table[name].get(stage, {})
    return keys


def list_rows(table, rows, miniature):
    """A line a row, parents first, tab-separated: exp, strategy, data, parent and seeds ("-": none; a parent
    that was not asked for is not fine-tuned). In the miniature c.0 stands in for timm's and torchvision's.
    """
    lines = {}

    def add(exp):
        row = {"strategy": "-", "dataset": "-", **keys_of(table, exp, "finetune", "pretrain")}
        kind, _, parent = row["init"].partition(":")
        if miniature:
            row |= table["miniature"]["finetune"]
            if kind in ("timm", "torchvision"):
                kind, parent = "exp", "c.0"
        if kind != "exp":
            parent = "-"
        elif parent in table:
            add(parent)
        seeds = ",".join(map(str, row["seeds"])) if exp in rows else "-"
        lines[exp] = f"{exp}\t{row['strategy']}\t{row['dataset']}\t{parent}\t{seeds}"

    for exp in rows:
        add(exp)
    print(*lines.values(), sep="\n")


@lru_cache
def forward(arch, in_chans, model_args, size):
    """FLOPs of one image's forward pass through a backbone, counted on the meta device."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    args = dict(model_args)
    if timm.models.get_pretrained_cfg(arch).fixed_input_size:
        args["img_size"] = size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(arch, num_classes=0, in_chans=in_chans, **args).eval()
        model(torch.empty(1, in_chans, size, size))
    return counter.get_total_flops()


def cost(table, exp, stage, rates):
    """Steps, images, FLOPs and hours of a stage of a row; fine-tuning with validation and prediction."""
    row = keys_of(table, exp, stage)
    script = row["strategy"] if stage == "pretrain" else "classify"
    text = (ROOT / stage / f"{script}.py").read_text().partition("\nDEFAULTS = ")[2]
    defaults = ast.parse(text.partition("\n)")[0] + "\n)", mode="eval").body
    row = {keyword.arg: ast.literal_eval(keyword.value) for keyword in defaults.keywords} | row
    arch, batch, epochs = row["arch"], row["batch"], row["epochs"]
    network = arch, row["in_chans"], tuple(row["model_args"].items())
    size = row["model_args"].get("img_size", row["img_size"])
    if stage == "pretrain":
        steps, tested = row["samples"] // batch * epochs, 0
        images = steps * batch
    else:
        runs = len(row["seeds"])
        steps = N_TRAIN // batch * epochs * runs
        images = N_TRAIN * epochs * runs
        tested = (N_VAL * epochs + N_VAL + N_TEST) * runs
    flops = (PASSES[script] * images + tested) * forward(*network, size)
    if script == "dino":
        local = round(size * 96 / 224 / 16) * 16
        flops += 3 * row["n_local_crops"] * images * forward(*network, local)
    rate = rates.get((script, arch, size), math.nan)
    return {"row": exp, "stage": stage, "steps": f"{steps:,}", "images": f"{images:,}",
            "PFLOP": f"{flops / 1e15:,.0f}", "V100 h": flops / V100_HOUR,
            "measured h": (images + tested) / rate / 3600}


def measured(path):
    """Images a second by (script, network, image size), as tests/bench/gpu.py measured them, and the card."""
    try:
        found = json.loads(Path(path).read_text())
        rows = [row for row in found["parts"]["fast"].values() if "loop" in row]
        rates = {(row["script"], row["arch"], row["img_size"]): row["loop"]["median"] for row in rows}
        return rates, found.get("card", "a card that is not named")
    except (OSError, ValueError, LookupError, TypeError) as problem:
        fail(f"--rates {path}: not a gpu.json of tests/bench/gpu.py ({problem!r}); measure again")


def print_missing(table, rows, data):
    """What rows read that is not there: packs and files of weights (timm and torchvision fetch theirs)."""
    users = defaultdict(list)
    for exp in rows:
        row = keys_of(table, exp, "pretrain")
        for pack in {"nih", "vindr_cxr", "padchest", "chexpert", row.get("dataset", "nih")}:
            users[f"{data}/{pack}/manifest.csv"].append(exp)
        kind = row["init"].partition(":")[0]
        if kind not in ("random", "exp", "timm", "torchvision"):
            users[kind].append(exp)
    for file in sorted(users):
        if not Path(file).is_file():
            print(f"missing: {file.removesuffix('/manifest.csv')}  (for {', '.join(users[file])})")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exp", default="*", help="rows or patterns, comma-separated (default: every row of the file)")
    add("--data", default="data", metavar="DIR", help="folder of the packed datasets")
    add("--rates", metavar="FILE", help="a gpu.json of tests/bench/gpu.py")
    add("--list", action="store_true", help="a row after the row it starts from, which is added; no cost")
    add("--miniature", action="store_true", help="with --list: starts and seeds of the miniature")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it without a word
    table = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    rows = choose(table, args.exp)
    if args.list:
        return list_rows(table, rows, args.miniature)
    import pandas as pd                 # here: --list is quick without
    rates, card = measured(args.rates) if args.rates else ({}, "")
    stages = [(exp, stage) for exp in rows for stage in ("pretrain", "finetune")]
    stages = [(exp, stage) for exp, stage in stages if stage in ("finetune", *table[exp])]
    frame = pd.DataFrame([cost(table, *stage, rates) for stage in stages])
    if not args.rates:
        del frame["measured h"]
    print(frame.to_string(index=False, na_rep="-", float_format="{:,.1f}".format))
    for name in frame.filter(like=" h"):
        print(f"{name}: {frame[name].sum():,.0f} for {frame[name].count()} of {len(frame)} stages")
    if args.rates:
        print(f"measured on {card}")
    print_missing(table, rows, args.data)


if __name__ == "__main__":
    main()
