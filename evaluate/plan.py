"""What experiments cost before they are run: steps, images, FLOPs, GPU-hours; and the files they lack.

    python evaluate/plan.py --exp '3.4,4.*' --rates gpu.json    rows of experiments.yaml (all without --exp)
    python evaluate/plan.py --exp '3.4,4.*' --list              exp, strategy, data, parent, seeds ("-": none)

As in run_all.sh, rows that others start from are pre-trained, too. PyTorch counts the FLOPs of the backbone,
two a multiply-add; a backward pass is two forward passes. Hours of a V100 assume a quarter of its peak,
measured ones that predicting an image takes as long as training does. "-": not known.
"""

import argparse
import ast
import difflib
import fnmatch
import json
import signal
import sys
from functools import lru_cache
from math import nan
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
V100_HOUR = 31.25e12 * 3600                                     # FLOPs
N_TRAIN, N_VAL, N_TEST = 75_312, 11_212, 68_898                 # images of NIH; of all five test sets
# Forward passes an image, elsewhere 3: three a view that learns, one a teacher's; DINO's local crops apart
PASSES = {"gmml": 6, "sit": 8, "moco_v3": 8, "dino": 8}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def keys_of(table, exp, stage, miniature=False):
    """The keys of a stage: of the defaults, the row and the miniature, each time those of the stage last."""
    keys = {}
    for name in ["defaults", exp] + ["miniature"] * miniature:
        keys |= table[name] | table[name].get(stage, {})
    return keys


def lines_of(table, exp, rows, miniature):
    """The line of a row, after those of the rows that it starts from; only `rows` are fine-tuned."""
    row = {"strategy": "-", "dataset": "-"} | keys_of(table, exp, "pretrain")
    kind, _, parent = row["init"].partition(":")
    if kind != "exp":                           # in the miniature c.0 stands in for ImageNet weights
        parent = "c.0" if miniature and kind in ("timm", "torchvision") else "-"
    before = lines_of(table, parent, rows, miniature) if parent != "-" else []
    seeds = keys_of(table, exp, "finetune", miniature)["seeds"] if exp in rows else "-"
    seeds = str(seeds).strip("[]").replace(" ", "")
    return [*before, (exp, row["strategy"], row["dataset"], parent, seeds)]


@lru_cache
def forward(arch, in_chans, model_args, size):
    """FLOPs of one image's forward pass through a backbone, counted on the meta device."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    args = dict(model_args, in_chans=in_chans, num_classes=0)
    if timm.models.get_pretrained_cfg(arch).fixed_input_size:
        args["img_size"] = size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(arch, **args).eval()
        model(torch.empty(1, in_chans, size, size))
    return counter.get_total_flops()


def cost(stage, keys, rates):
    """Steps, images, PFLOP, hours, measured hours of a stage; fine-tuning with validation and prediction."""
    script = keys["strategy"] if stage == "pretrain" else "classify"
    text = (ROOT / stage / f"{script}.py").read_text().partition("\nDEFAULTS = ")[2]
    defaults = ast.parse(text.partition("\n)")[0] + "\n)", mode="eval").body
    row = {keyword.arg: ast.literal_eval(keyword.value) for keyword in defaults.keywords} | keys
    batch, epochs = row["batch"], row["epochs"]
    network = row["arch"], row["in_chans"], tuple(row["model_args"].items())
    size = row["model_args"].get("img_size", row["img_size"])
    if stage == "pretrain":
        steps, tested = (row["samples"] or nan) // batch * epochs, 0        # 0: all, however many
    else:
        runs = str(row["seeds"]).count(",") + 1
        steps = N_TRAIN // batch * epochs * runs
        tested = (N_VAL * epochs + N_VAL + N_TEST) * runs
    images = steps * batch
    flops = (PASSES.get(script, 3) * images + tested) * forward(*network, size)
    if script == "dino":
        local = round(size * 96 / 224 / 16) * 16
        flops += 3 * row["n_local_crops"] * images * forward(*network, local)
    rate = rates.get((script, row["arch"], size), nan)
    return steps, images, flops / 1e15, flops / V100_HOUR, (images + tested) / rate / 3600


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exp", default="*", help="rows or patterns, comma-separated (default: every row of the file)")
    add("--data", default="data", help="folder of the packed datasets (data)")
    add("--rates", help="a gpu.json of tests/bench/gpu.py")
    add("--list", action="store_true", help="a row after the row it starts from, which is added; no cost")
    add("--miniature", action="store_true", help="with --list: starts and seeds of the miniature")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it without a word
    rows = []
    try:
        table = yaml.safe_load((ROOT / "experiments.yaml").read_text())
        known = [exp for exp in map(str, table) if not exp.startswith(("defaults", "miniature"))]
        for part in args.exp.split(","):
            found = fnmatch.filter(known, part)
            if not found:
                near = ", ".join(difflib.get_close_matches(part, known))
                fail(f"experiments.yaml has no experiment '{part}'; nearest: {near or 'none'}")
            rows += found
        lines = dict.fromkeys(line for exp in rows for line in lines_of(table, exp, rows, args.miniature))
    except Exception as problem:        # no YAML; a row that is empty, has no quotes, starts from itself
        what = f"{type(problem).__name__} {' '.join(str(problem).split())}"
        fail(f"cannot list {args.exp} of experiments.yaml, whose keys stand in quotes: {what}")
    if args.list:
        return print(*map("\t".join, lines), sep="\n")
    import numpy as np                  # here: --list is quick without
    rates, card = {}, "no GPU"
    if args.rates:
        try:
            found = json.loads(Path(args.rates).read_text())
            tried = [row for row in found["parts"]["fast"].values() if "loop" in row]
            rates = {(row["script"], row["arch"], row["img_size"]): row["loop"]["median"] for row in tried}
            card = found["card"]
        except Exception as problem:
            fail(f"--rates {args.rates}: not a gpu.json of tests/bench/gpu.py ({problem!r}); measure again")
    print("       row    stage     steps       images  PFLOP  V100 h  measured h")
    costs, files = [], set()
    for exp, strategy, dataset, _, seeds in lines:
        for stage, asked in ("pretrain", strategy), ("finetune", seeds):
            if asked != "-":
                costs.append(cost(stage, keys_of(table, exp, stage), rates))
                numbers = "{:9,} {:12,} {:6,.0f} {:7,.1f} {:11,.1f}".format(*costs[-1])
                print(f"{exp:>10} {stage}", numbers.replace("nan", "  -"))
        packs = {"nih", "vindr_cxr", "padchest", "chexpert", dataset} - {"-"}
        files |= {f"{args.data}/{pack}/manifest.csv" for pack in packs}
        init = table[exp].get("init", "")
        if "/" in init:                                     # a file; timm and torchvision fetch theirs
            files.add(init)
    hours, measured = np.nansum(costs, 0)[3:]
    print(f"V100: {hours:,.0f} h; {card}: {measured:,.0f} h where measured")
    print("missing:", *sorted(file for file in files if not Path(file).is_file()), sep="\n")


if __name__ == "__main__":
    main()
