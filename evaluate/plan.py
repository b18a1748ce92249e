"""What every experiment costs before it is run: steps, images, FLOPs, GPU-hours, disk, and its inputs.

    python evaluate/plan.py                        every row of experiments.yaml
    python evaluate/plan.py --exp '3.4,4.*'        these rows; all: the study's and the controls
    python evaluate/plan.py --exp '3.4,4.*' --list      a line a row: exp, strategy, data, parent, seeds

--list puts a row after its parent, the row whose pre-trained weights it starts from, and adds parents.

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
from functools import lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
GPUS = {"V100": (125e12, 0.25), "A100": (312e12, 0.35), "H100": (989e12, 0.30)}     # peak, assumed share
N_TRAIN, N_VAL, N_TEST = 75_312, 11_212, 25_596 + 3_000 + 1_860 + 38_240 + 202
TESTS = ("nih", "vindr_cxr", "padchest", "chexpert")
# Views an image that the student, the teacher sees (DINO's local crops apart), parameters of the heads.
METHODS = {"gmml": (2, 0, 0.7e6), "sit": (2, 2, 20.2e6), "moco_v3": (2, 2, 21.5e6), "dino": (2, 2, 22.4e6),
           "simmim": (1, 0, 3.1e6), "supervised": (1, 0, 0)}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def resolve(table, exp, section, script):
    """Configuration of one half of a row: the script's literal DEFAULTS < YAML defaults < row."""
    nodes = ast.parse((ROOT / script).read_text()).body
    call = next(
        node.value for node in nodes if isinstance(node, ast.Assign) and node.targets[0].id == "DEFAULTS"
    )
    config = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    for row in (table["defaults"], table[exp]):
        config |= {key: value for key, value in row.items() if key not in ("pretrain", "finetune")}
        config |= row.get(section) or {}
    config["img_size"] = config["model_args"].get("img_size", config["img_size"])
    return config


@lru_cache
def forward(arch, in_chans, size, model_args):
    """FLOPs of one image's forward pass, and parameters, of a backbone: counted on the meta device."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    args = dict(model_args)
    if timm.models.get_pretrained_cfg(arch).fixed_input_size:
        args["img_size"] = size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = timm.create_model(arch, num_classes=0, in_chans=in_chans, **args).eval()
        model(torch.empty(1, in_chans, size, size))
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def network(config, size=None):
    """forward() of a configuration, at its own or another image size."""
    args = tuple(config["model_args"].items())
    return forward(config["arch"], config["in_chans"], size or config["img_size"], args)


def pretraining(table, exp):
    """Steps, images and FLOPs of a row's pre-training, and bytes of what it leaves."""
    strategy = table[exp]["pretrain"]["strategy"]
    config = resolve(table, exp, "pretrain", f"pretrain/{strategy}.py")
    images = config["samples"] or {"nih": N_TRAIN, "imagenet": 1_281_167}.get(config["dataset"], 1_000)
    steps = images // config["batch"] * config["epochs"]
    flops, parameters = network(config)
    student, teacher, head = METHODS[strategy]
    an_image = (3 * student + teacher) * flops
    if strategy == "dino":
        patch = config["model_args"].get("patch_size", 16)
        local = config.get("local_size") or max(1, round(config["img_size"] * 96 / 224 / patch)) * patch
        an_image += 3 * config["n_local_crops"] * network(config, local)[0]
    # exported weights; last.pt: what learns with Adam's two moments, and its moving average
    size = 4 * (parameters + (3 + (teacher > 0)) * (parameters + head))
    return steps, steps * config["batch"], steps * config["batch"] * an_image, size


def finetuning(table, exp):
    """Steps, images, FLOPs and bytes of all seeds' fine-tuning, with validation and prediction."""
    config = resolve(table, exp, "finetune", "finetune/classify.py")
    flops, parameters = network(config)
    runs, epochs = len(config["seeds"]), config["epochs"]
    steps = N_TRAIN // (config.get("batch") or 64) * epochs * runs
    passes = epochs * (3 * N_TRAIN + N_VAL) + N_VAL + N_TEST
    return steps, epochs * N_TRAIN * runs, passes * flops * runs, runs * 4 * 4 * parameters


def inputs(table, exp, data):
    """What a row reads: {name: "" if it is there, else what has to be done}."""
    row = {**table["defaults"], **table[exp]}
    pretrain = table[exp].get("pretrain")
    if not pretrain:
        row |= row.get("finetune") or {}                # whose start is another row's pre-training
    found = {}
    for name in dict.fromkeys([*([pretrain["dataset"]] if pretrain else []), *TESTS]):
        found[f"{data}/{name}"] = "" if Path(data, name, "manifest.csv").is_file() else "missing"
    kind, _, name = row["init"].partition(":")
    name = name or row.get("arch")
    if kind == "exp":
        there = Path(f"runs/{name}/pretrain/backbone.pt").is_file()
        found[f"weights of {name}"] = "" if there else "made by its row"
    elif kind in ("timm", "torchvision"):
        there = any(Path("weights", f"{name}{end}").is_file() for end in (".pth", ".safetensors"))
        found[f"weights/{name}"] = "" if there else f"else a download by {kind}"
    elif kind != "random":
        found[row["init"]] = "" if Path(row["init"]).is_file() else "missing"
    return found


def chosen_rows(table, patterns):
    """Rows that the comma-separated patterns name, in their order."""
    known = [exp for exp in table if exp != "defaults" and not str(exp).startswith("miniature")]
    for exp in known:
        if not isinstance(exp, str):
            fail(f"experiments.yaml: the key {exp} is read as a number; write it in quotes")
    if patterns == "all":
        patterns = "[0-9]*,c.*"
    rows = []
    for part in (patterns or "*").split(","):
        found = fnmatch.filter(known, part)
        if not found:
            near = ", ".join(difflib.get_close_matches(part, known, n=3))
            fail(f"experiments.yaml has no experiment '{part}'" + (f"; nearest: {near}" if near else ""))
        rows += found
    return list(dict.fromkeys(rows))


def list_rows(table, rows, miniature):
    """A line a row, parents first, tab-separated: exp, strategy, data, parent and seeds ("-": none; a parent
    that was not asked for is not fine-tuned). In the miniature c.0 stands in for timm's and torchvision's.
    """
    listed = {}

    def add(exp, asked):
        row = table[exp]
        init = {**row, **(row.get("finetune") or {})}.get("init", row.get("init", ""))
        if miniature and init.partition(":")[0] in ("timm", "torchvision"):
            init = "exp:c.0"
        parent = init.removeprefix("exp:") if init.startswith("exp:") else "-"
        if parent in table and parent not in listed:
            add(parent, parent in rows)
        pretrain = row.get("pretrain") or {}
        parts = [table["defaults"], row, table["miniature"] if miniature else {}]
        seeds = [part["finetune"]["seeds"] for part in parts if "seeds" in (part.get("finetune") or {})][-1]
        seeds = ",".join(map(str, seeds)) if asked else "-"
        facts = exp, pretrain.get("strategy", "-"), pretrain.get("dataset", "-"), parent, seeds
        listed.setdefault(exp, "\t".join(facts))

    for exp in rows:
        add(exp, True)
    print("\n".join(listed.values()))


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--exp", help="rows or patterns, comma-separated (default: every row of the file)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the packed datasets")
    parser.add_argument("--list", action="store_true", help="the rows and what each starts from, no cost")
    parser.add_argument("--miniature", action="store_true", help="with --list: the seeds of the miniature")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it without a word
    table = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    rows = chosen_rows(table, args.exp)
    if args.list:
        return list_rows(table, rows, args.miniature)
    print("GPU-hours assume", ", ".join(f"{share:.0%} of {name}'s {peak / 1e12:.0f} TFLOPS"
                                        for name, (peak, share) in GPUS.items()))
    heads = " ".join(f"{name + ' h':>8}" for name in GPUS)
    print(f"{'row':24} {'stage':9} {'steps':>10} {'images':>12} {'PFLOP':>10} {heads} {'disk GB':>8}")
    totals, missing = dict.fromkeys(GPUS, 0.0), {}
    for exp in rows:
        stages = {"pretrain": pretraining} if table[exp].get("pretrain") else {}
        for stage, cost in {**stages, "finetune": finetuning}.items():
            steps, images, flops, size = cost(table, exp)
            hours = {name: flops / peak / share / 3600 for name, (peak, share) in GPUS.items()}
            totals = {name: totals[name] + hours[name] for name in GPUS}
            cells = " ".join(f"{hour:8,.1f}" for hour in hours.values())
            print(
                f"{exp:24} {stage:9} {steps:10,} {images:12,} {flops / 1e15:10,.0f} {cells} {size / 1e9:8.2f}"
            )
        reads = inputs(table, exp, args.data)
        print(
            "    reads " + ", ".join(f"{name} ({state})" if state else name for name, state in reads.items())
        )
        for name in [name for name, state in reads.items() if state == "missing"]:
            missing.setdefault(name, []).append(exp)
    print(f"{'all':24} {'':44} " + " ".join(f"{total:8,.0f}" for total in totals.values()))
    for name, users in sorted(missing.items()):
        print(f"missing: {name}  (for {', '.join(users[:6])}{' ...' * (len(users) > 6)})")


if __name__ == "__main__":
    main()
