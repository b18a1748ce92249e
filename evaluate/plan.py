"""What every experiment costs before it is run: steps, images, FLOPs, GPU-hours, and what is missing for it.

    python evaluate/plan.py                        every row of experiments.yaml
    python evaluate/plan.py --exp '3.4,4.*' --rates gpu.json        these rows, by measured rates, too
    python evaluate/plan.py --exp '3.4,4.*' --list      a line a row: exp, strategy, data, parent, seeds

Reads experiments.yaml and the DEFAULTS written in the training scripts (as text, nothing is run). FLOPs are
counted by PyTorch on the real architecture (two per multiply-add) for one forward pass and multiplied by the
passes of the method; a backward pass counts as two. Hours of a V100 assume that it does TFLOPS of them;
measured hours are those on the GPU of a gpu.json that tests/bench/gpu.py wrote, where it ran the script with
this network and image size, as if validating and predicting an image took as long as training on it.
"""

import argparse
import ast
import difflib
import fnmatch
import json
import math
import signal
import sys
from functools import lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
TFLOPS = 31.25                  # an assumption: a quarter of a V100's peak
N_TRAIN, N_VAL, N_TEST = 75_312, 11_212, 25_596 + 3_000 + 1_860 + 38_240 + 202
# Forward passes an image: three for a view that learns, one for a teacher's view; DINO's local crops apart.
PASSES = {"gmml": 6, "sit": 8, "moco_v3": 8, "dino": 8, "simmim": 3, "supervised": 3}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def chosen_rows(table, patterns):
    """Rows that the comma-separated patterns name, in their order."""
    known = [exp for exp in table if not str(exp).startswith(("defaults", "miniature"))]
    for exp in known:
        if not isinstance(exp, str):
            fail(f"experiments.yaml: the key {exp} is read as a number; write it in quotes")
    rows = []
    for part in patterns.split(","):
        found = fnmatch.filter(known, part)
        if not found:
            near = ", ".join(difflib.get_close_matches(part, known, n=3))
            fail(f"experiments.yaml has no experiment '{part}'" + (f"; nearest: {near}" if near else ""))
        rows += found
    return list(dict.fromkeys(rows))


def start(table, exp):
    """What a row starts from: kind and name, as ("exp", "3.1") or ("timm", "")."""
    row = table["defaults"] | table[exp]
    if "pretrain" not in table[exp]:
        row |= row["finetune"]
    kind, _, name = row["init"].partition(":")
    return kind, name


def list_rows(table, rows, miniature):
    """A line a row, parents first, tab-separated: exp, strategy, data, parent and seeds ("-": none; a parent
    that was not asked for is not fine-tuned). In the miniature c.0 stands in for timm's and torchvision's.
    """
    listed = {}

    def add(exp):
        kind, parent = start(table, exp)
        if miniature and kind in ("timm", "torchvision"):
            kind, parent = "exp", "c.0"
        if kind != "exp":
            parent = "-"
        elif parent in table and parent not in listed:
            add(parent)
        pretrain = table[exp].get("pretrain", {"strategy": "-", "dataset": "-"})
        finetune = table["defaults"]["finetune"] | table[exp].get("finetune", {})
        if miniature:
            finetune |= table["miniature"]["finetune"]
        seeds = ",".join(map(str, finetune["seeds"])) if exp in rows else "-"
        listed[exp] = [exp, pretrain["strategy"], pretrain["dataset"], parent, seeds]

    for exp in rows:
        if exp not in listed:
            add(exp)
    for line in listed.values():
        print(*line, sep="\t")


def configuration(table, exp, stage, script):
    """A stage of a row, pretrain or finetune: the script's literal DEFAULTS < defaults of the file < row."""
    nodes = ast.parse((ROOT / script).read_text()).body
    call = next(node.value for node in nodes if ast.unparse(node).startswith("DEFAULTS = "))
    config = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    for row in (table["defaults"], table[exp]):
        config |= row | (row.get(stage) or {})
    config["img_size"] = config["model_args"].get("img_size", config["img_size"])
    return config


@lru_cache
def forward(arch, in_chans, model_args, size):
    """FLOPs of one image's forward pass through a backbone, counted on the meta device."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    args = dict(model_args)
    if timm.models.get_pretrained_cfg(arch).fixed_input_size:
        args["img_size"] = size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = timm.create_model(arch, num_classes=0, in_chans=in_chans, **args).eval()
        model(torch.empty(1, in_chans, size, size))
    return counter.get_total_flops()


def cost(table, exp, stage, rates):
    """Steps, images, FLOPs and hours of a stage of a row; fine-tuning with validation and prediction."""
    script = table[exp]["pretrain"]["strategy"] if stage == "pretrain" else "classify"
    config = configuration(table, exp, stage, f"{stage}/{script}.py")
    arch, size, epochs = config["arch"], config["img_size"], config["epochs"]
    network = arch, config["in_chans"], tuple(config["model_args"].items())
    flops = forward(*network, size)
    if stage == "pretrain":
        steps = config["samples"] // config["batch"] * epochs
        images = seen = steps * config["batch"]
        flops *= images * PASSES[script]
        if script == "dino":
            local = config.get("local_size") or round(size * 96 / 224 / 16) * 16
            flops += images * 3 * config["n_local_crops"] * forward(*network, local)
    else:
        runs = len(config["seeds"])
        steps = N_TRAIN // config["batch"] * epochs * runs
        images = N_TRAIN * epochs * runs
        tested = (N_VAL * epochs + N_VAL + N_TEST) * runs
        seen = images + tested
        flops *= 3 * images + tested
    rate = rates.get((script, arch, size), math.nan)
    return {"steps": f"{steps:,}", "images": f"{images:,}", "PFLOP": f"{flops / 1e15:,.0f}",
            "V100 h": flops / TFLOPS / 1e12 / 3600, "measured h": seen / rate / 3600}


def missing(table, exp, data):
    """What a row reads that is not there: packs, files of weights (timm and torchvision fetch theirs)."""
    packs = ["nih", "vindr_cxr", "padchest", "chexpert"]
    if "pretrain" in table[exp]:
        packs.append(table[exp]["pretrain"]["dataset"])
    absent = [f"{data}/{pack}" for pack in packs if not Path(data, pack, "manifest.csv").is_file()]
    kind, _ = start(table, exp)
    if kind not in ("random", "exp", "timm", "torchvision") and not Path(kind).is_file():
        absent.append(kind)
    return absent


def measured(path):
    """Images a second by (script, network, image size), as tests/bench/gpu.py measured them, and the card."""
    try:
        found = json.loads(Path(path).read_text())
        rows = [row for row in found["parts"]["fast"].values() if "loop" in row]
        rates = {(row["script"], row["arch"], row["img_size"]): row["loop"]["median"] for row in rows}
        return rates, found.get("card", "a card of which a run was cut short")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        fail(f"--rates {path}: not a gpu.json of tests/bench/gpu.py ({problem!r}); measure again")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
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
    rows = chosen_rows(table, args.exp)
    if args.list:
        return list_rows(table, rows, args.miniature)
    import pandas as pd                 # here: --list is quick without
    rates, card = measured(args.rates) if args.rates else ({}, "")
    costs, absent = [], {}
    for exp in rows:
        for stage in ("pretrain", "finetune"):
            if stage == "finetune" or stage in table[exp]:
                costs.append({"row": exp, "stage": stage, **cost(table, exp, stage, rates)})
        for name in missing(table, exp, args.data):
            absent.setdefault(name, []).append(exp)
    frame = pd.DataFrame(costs)
    if not args.rates:
        del frame["measured h"]
    print(frame.to_string(index=False, na_rep="-", float_format="{:,.1f}".format))
    for name in frame.filter(like=" h"):
        print(f"{name}: {frame[name].sum():,.0f} for {frame[name].count()} of {len(frame)} stages")
    if card:
        print(f"measured on {card}")
    for name, users in sorted(absent.items()):
        print(f"missing: {name}  (for {', '.join(users)})")


if __name__ == "__main__":
    main()
