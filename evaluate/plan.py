"""What every experiment costs before it is run: steps, images, FLOPs, GPU-hours, disk, and its inputs.

    python evaluate/plan.py                        every row of experiments.yaml
    python evaluate/plan.py --exp '3.4,4.*'        these rows; all: the study's and the controls
    bash run_all.sh --plan                         the same

Reads experiments.yaml, the DEFAULTS written in the training scripts (as text, nothing is run), and looks
which files exist. FLOPs are counted by PyTorch on the real architecture (two per multiply-add) for one
forward pass and multiplied by the passes of the method; a backward pass counts as two forward passes.
GPU-hours divide them by the tensor cores' peak rate times a utilisation that is an assumption, stated in
GPUS: measure and scale.
"""

import argparse
import ast
import difflib
import fnmatch
import signal
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
GPUS = {"V100": (125e12, 0.25), "A100": (312e12, 0.35), "H100": (989e12, 0.30)}     # peak, assumed share
N_IMAGES = {                        # images of a packed dataset, where the study does not say how many to use
    "nih": (75_312, 11_212), "imagenet": (1_281_167, 0)}
TEST_IMAGES = 25_596 + 3_000 + 1_860 + 38_240 + 202
TESTS = ("nih", "vindr_cxr", "padchest", "chexpert")
# Passes an image: student (forward and backward), teacher (forward); DINO's local crops are counted apart.
PASSES = {"gmml": (2, 0), "sit": (2, 2), "moco_v3": (2, 2), "dino": (2, 2), "simmim": (1, 0),
          "supervised": (1, 0)}
# Parameters of the heads that learn beside the backbone, at the published widths.
HEADS = {"gmml": 0.7e6, "sit": 20.2e6, "moco_v3": 21.5e6, "dino": 22.4e6, "simmim": 3.1e6, "supervised": 0}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def defaults_of(script):
    """The literal DEFAULTS = dict(...) at the top level of a training script, read without running it."""
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "DEFAULTS":
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
    raise LookupError(f"{script} has no DEFAULTS = dict(...)")


def resolve(table, exp, section, script):
    """Configuration of one half of a row: script defaults < YAML defaults < row."""
    config = defaults_of(script)
    for row in (table["defaults"], table[exp]):
        config |= {key: value for key, value in row.items() if key not in ("pretrain", "finetune")}
        config |= row.get(section) or {}
    config["img_size"] = config["model_args"].get("img_size", config["img_size"])
    return config


forward_cache = {}


def forward(config, size=None):
    """FLOPs of one image's forward pass, and parameters, of a row's backbone: counted on the meta device."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    size = size or config["img_size"]
    key = (config["arch"], config["in_chans"], size, str(config["model_args"]))
    if key not in forward_cache:
        args = dict(config["model_args"])
        if timm.models.get_pretrained_cfg(config["arch"]).fixed_input_size:
            args["img_size"] = size
        with torch.device("meta"):
            model = timm.create_model(config["arch"], num_classes=0, in_chans=config["in_chans"], **args)
            model.eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, config["in_chans"], size, size))
        forward_cache[key] = counter.get_total_flops(), sum(p.numel() for p in model.parameters())
    return forward_cache[key]


def pretraining(table, exp):
    """steps, images seen, FLOPs, parameters of a row's pre-training."""
    strategy = table[exp]["pretrain"]["strategy"]
    config = resolve(table, exp, "pretrain", f"pretrain/{strategy}.py")
    n = config["samples"] or N_IMAGES.get(config["dataset"], (1_000,))[0]
    steps = n // config["batch"] * config["epochs"]
    flops, parameters = forward(config)
    student, teacher = PASSES[strategy]
    an_image = (3 * student + teacher) * flops
    if strategy == "dino":
        patch = config["model_args"].get("patch_size", 16)
        local = config.get("local_size") or max(1, round(config["img_size"] * 96 / 224 / patch)) * patch
        an_image += 3 * config["n_local_crops"] * forward(config, local)[0]
    return steps, steps * config["batch"], steps * config["batch"] * an_image, parameters


def finetuning(table, exp):
    """Steps, images, FLOPs and parameters of all seeds' fine-tuning, with validation and prediction."""
    config = resolve(table, exp, "finetune", "finetune/classify.py")
    n_train, n_val = N_IMAGES["nih"]
    flops, parameters = forward(config)
    recipe_batch, n_seeds = config.get("batch") or 64, len(config["seeds"])
    steps = n_train // recipe_batch * config["epochs"] * n_seeds
    passes = config["epochs"] * (3 * n_train + n_val) + n_val + TEST_IMAGES
    return steps, config["epochs"] * n_train * n_seeds, passes * flops * n_seeds, parameters


def inputs(table, exp, data):
    """What a row reads: {name: "" if it is there, else what has to be done}."""
    row = {**table["defaults"], **table[exp]}
    if not table[exp].get("pretrain"):
        row |= row.get("finetune") or {}                # whose start is another row's pre-training
    packs = dict.fromkeys([*([row["pretrain"]["dataset"]] if table[exp].get("pretrain") else []), *TESTS])
    found = {f"{data}/{name}": "" if Path(data, name, "manifest.csv").is_file() else "missing"
             for name in packs}
    kind, _, name = row["init"].partition(":")
    if kind == "exp":
        there = Path(f"runs/{name}/pretrain/backbone.pt").is_file()
        found[f"weights of {name}"] = "" if there else "made by its row"
    elif kind in ("timm", "torchvision"):
        name = name or row["arch"]
        there = any(Path("weights").glob(f"{name}*"))
        found[f"weights/{name}"] = "" if there else f"else a download by {kind}"
    elif kind != "random":
        found[row["init"]] = "" if Path(row["init"]).is_file() else "missing"
    return found


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--exp", help="rows or patterns, comma-separated (default: every row of the file)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the packed datasets")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it without a word
    table = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    known = [exp for exp in table if exp != "defaults"]
    if args.exp == "all":
        rows = [exp for exp in known if exp[0].isdigit() or exp.startswith("c.")]
    else:
        rows = [exp for part in (args.exp or "*").split(",") for exp in fnmatch.filter(known, part) or [part]]
    for exp in rows:
        if exp not in known:
            near = ", ".join(difflib.get_close_matches(exp, table, n=3))
            fail(f"experiments.yaml has no experiment '{exp}'" + (f"; nearest: {near}" if near else ""))

    print("GPU-hours assume", ", ".join(f"{share:.0%} of {name}'s {peak / 1e12:.0f} TFLOPS"
                                        for name, (peak, share) in GPUS.items()))
    print(f"{'row':24} {'stage':9} {'steps':>10} {'images':>12} {'PFLOP':>10} "
          + " ".join(f"{name + ' h':>8}" for name in GPUS) + f" {'disk GB':>8}")
    totals, missing = [0.0] * len(GPUS), {}
    for exp in rows:
        stages = [("pretrain", pretraining)] if table[exp].get("pretrain") else []
        for stage, cost in [*stages, ("finetune", finetuning)]:
            steps, images, flops, parameters = cost(table, exp)
            hours = [flops / peak / share / 3600 for peak, share in GPUS.values()]
            totals = [total + hour for total, hour in zip(totals, hours)]
            seeds = {**table["defaults"]["finetune"], **(table[exp].get("finetune") or {})}["seeds"]
            strategy = (table[exp].get("pretrain") or {}).get("strategy")
            n_runs, learnt, teacher = len(seeds), parameters, 0
            if stage == "pretrain":
                n_runs, learnt, teacher = 1, parameters + HEADS[strategy], PASSES[strategy][1] > 0
            # what is exported; last.pt: what learns with Adam's two moments, and its moving average
            disk = n_runs * 4 * (parameters + (3 + teacher) * learnt) / 1e9
            print(f"{exp:24} {stage:9} {steps:10,} {images:12,} {flops / 1e15:10,.0f} "
                  + " ".join(f"{hour:8,.1f}" for hour in hours) + f" {disk:8.2f}")
        reads = inputs(table, exp, args.data)
        print("    reads " + ", ".join(f"{name} ({state})" if state else name for name, state in reads.items()))
        for name, state in reads.items():
            if state == "missing":
                missing.setdefault(name, []).append(exp)
    print(f"{'all':24} {'':9} {'':10} {'':12} {'':10} " + " ".join(f"{total:8,.0f}" for total in totals))
    for name, users in sorted(missing.items()):
        print(f"missing: {name}  (for {', '.join(users[:6])}{' ...' if len(users) > 6 else ''})")


if __name__ == "__main__":
    main()
