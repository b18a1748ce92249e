"""Fine-tuning: a network with any start learns the labels of radiographs by one of the study's recipes.

A recipe is a block of values: a and b are those of Ma et al., "Benchmarking and boosting transformers for
medical image classification" (DART 2022), deit that of Marikkar et al., "LT-ViT" (ICIP 2023), resnet that of
Hosseinzadeh Taher et al., "A systematic benchmarking analysis of transfer learning for medical image
analysis" (DART 2021). Every seed is a run of its own; several are trained one after the other.

    torchrun --nproc_per_node=4 finetune/classify.py --exp 3.4                 all seeds of a row, on 4 GPUs
    python finetune/classify.py --init weights.pth --train my/manifest.csv --out my/run --seeds 0
    python finetune/classify.py --exp 3.4 --labels 0.01                        1 % of the patients have labels
    python finetune/classify.py --exp 3.4 --probe                              frozen backbone, linear probe

Reads   manifest.csv with split train and val (+ images.npy beside it) and, for the start, a checkpoint.
        A flag or a key of the row beats what a checkpoint of ours says of architecture, channels, size and
        normalisation, which beats the defaults; a key beats the recipe.
Writes  --out/seed<k>: classifier.pt (weights of the best epoch for timm, with their labels), last.pt (to
        resume), log.jsonl, curve.png, run.json.
Killed or stopped, the same command continues where it left off and repeats no finished seed; SIGTERM saves
first and exits with code 75.
"""

import argparse
import collections
import contextlib
import copy
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPES = dict(     # warm-up from warmup_lr over warmup_epochs, then a cosine; crop_pct: 224 cut out of 256
    a=dict(optimizer="adamw", lr=2.5e-6, warmup_epochs=5, warmup_lr=1e-6, min_lr=5e-7, wd=0.05,
           schedule="cosine", drop_path=0.0, crop_pct=0.875, select="loss"),
    b=dict(optimizer="sgd", lr=0.01, warmup_epochs=0, warmup_lr=1e-6, min_lr=1e-5, wd=0.0,
           schedule="cosine", drop_path=0.0, crop_pct=0.875, select="loss"),
    deit=dict(optimizer="adamw", lr=6.25e-5, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, wd=0.05,
              schedule="cosine", drop_path=0.1, crop_pct=0.875, select="auc"),
    resnet=dict(optimizer="adam", lr=2e-4, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0, wd=0.0,
                schedule="plateau", drop_path=0.0, crop_pct=1.0, select="loss"),
)

DEFAULTS = dict(
    arch="vit_small_patch16_224",   # any timm model
    model_args={},                  # further arguments of timm.create_model, e.g. {"depth": 4}
    in_chans=1,                     # 1 or 3; grey images are repeated to 3
    img_size=224,                   # pixels
    mean=None, std=None,            # of pixels in 0..1; none: 0.485 / 0.229, in 3 channels ImageNet's
    init="random",                  # random | timm[:NAME] | torchvision | exp:KEY | a checkpoint file
    init_key=None,                  # which weights of the file (teacher, student, ...); none: the usual one
    channel_adapt="average",        # 3 -> 1: average (as in the study) | sum; 1 -> 3: duplicate[_mean]
    dataset="nih",                  # folder below --data with the packed images
    label_names=None,               # columns to learn, in this order; none: NIH's 14 or else all of them
    labels=1.0,                     # share of the training patients whose labels are used
    uncertain="zeros",              # label cells of -1 count as: zeros | ones | ignore
    blank="zero",                   # blank label cells count as: zero | ignore
    pos_weight=None,                # weight of positives in the loss: a number, a list, or balanced
    recipe="deit",                  # a | b | deit | resnet: values of the keys below that are none
    optimizer=None,                 # adamw | sgd (Nesterov, momentum 0.9) | adam
    lr=None, warmup_lr=None, min_lr=None,   # peak (whatever the batch), begin of the warm-up, end
    warmup_epochs=None,
    schedule=None,                  # cosine | plateau: halved after 5 epochs without a lower validation loss
    wd=None, drop_path=None,        # weight decay, stochastic depth
    select=None,                    # best epoch: auc (highest mean validation AUC) | loss (lowest)
    crop_pct=None,                  # central share of the side of a validation image that is seen
    epochs=30,
    batch=64,                       # images an optimiser step, over all processes together
    patience=10,                    # stop after so many epochs without a lower validation loss; none: never
    crop_scale=[0.08, 1.0],         # area of the random resized crop
    rotation=7.0,                   # degrees, either way
    seed=0,                         # of the row's pre-training; those of fine-tuning are:
    seeds=None,                     # runs; none: 0, 11, 21, 42, 100 (recipe resnet as in the paper: 0, 1, 2)
    variant="corrected",            # paper: recipes a and b step their schedule by the validation loss
)
PROBE_C = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]     # inverse penalties of the linear probe; validation AUC chooses
NIH14 = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
         "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --- begin copy: experiment row ---
# Least and largest value of keys whose others would be found out late, or not at all.
LIMITS = {**dict.fromkeys(("samples", "epochs", "batch", "img_size", "align", "patience"), (1, math.inf)),
          **dict.fromkeys(("seed", "warmup_epochs", "lr", "min_lr", "wd", "wd_end", "clip"), (0, math.inf)),
          **dict.fromkeys(("drop_path", "drop", "replace"), (0, 0.99)), "n_local_crops": (0, math.inf),
          **dict.fromkeys(("crop_scale", "global_crop_scale", "local_crop_scale"), (1e-6, 1)),
          "mean": (-math.inf, math.inf), "std": (1e-6, math.inf)}


def check_limits(config):
    """Refuse values outside LIMITS, those of lists one by one, and what is no number."""
    for key, (least, largest) in LIMITS.items():
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            try:
                fits = value is None or least <= float(value) <= largest        # YAML reads 1e-3 as a text
            except (ValueError, TypeError):
                fits = False
            if not fits or key == "samples" and not isinstance(value, (int, type(None))):
                fail(f"{key} is {values!r}; expected a number from {least:g} to {largest:g}")


def from_one(text):
    """Type of a flag: a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def cast(value, default, name):
    """Give a value from YAML or the command line the type of its default (None: as YAML reads it)."""
    if default is None or value is None:
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if isinstance(default, int) and float(value) != int(float(value)):
            raise ValueError
        if isinstance(default, (list, dict)) and not isinstance(value, type(default)):
            raise ValueError
        if isinstance(default, list) and len(value) != len(default):
            raise ValueError
        return type(default)(float(value) if isinstance(default, int) else value)
    except (ValueError, TypeError, KeyError):
        fail(f"{name} is {value!r}; expected {type(default).__name__} such as {default!r}")


def experiment_row(parser, defaults, section):
    """Parse the command line and resolve the row: script defaults < YAML defaults < YAML row < flags.

    What a row says of the pre-training or the fine-tuning alone stands below its key `section`.
    Returns (args, config): config has the keys of `defaults` and "exp"; args.row is the row as written,
    args.flags are the keys given on the command line.
    """
    import yaml
    parser.error = fail                 # one sentence, like every other mistake
    for key, value in defaults.items():
        parser.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=f"default {value!r}")
    args = vars(parser.parse_args())
    flags = {key: args.pop(key) for key in list(args) if key in defaults}
    config, exp, file = copy.deepcopy(defaults), args["exp"], args["experiments"]
    args.update(row={}, flags=flags)
    if exp is not None:
        try:
            table = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
            fail(f"{file} cannot be read as YAML: {' '.join(str(problem).split())}")
        if exp not in table or exp == "defaults":
            near = difflib.get_close_matches(exp, [str(key) for key in table if key != "defaults"], n=3)
            fail(f"{file} has no experiment '{exp}'" + (f"; nearest: {', '.join(near)}" if near else ""))
        args["row"] = table[exp] or {}
        known = [*defaults, "about", "pretrain", "finetune"]
        for where in ("defaults", exp):
            row = table.get(where) or {}
            if not isinstance(row, dict) or not isinstance(row.get(section) or {}, dict):
                fail(f"{file} row '{where}': expected `key: value` pairs, not {str(row)[:60]!r}")
            for key, value in {**row, **(row.get(section) or {})}.items():
                if key in ("about", "pretrain", "finetune"):
                    continue
                if key not in defaults:
                    near = difflib.get_close_matches(key, known, n=1) or ["no known key"]
                    fail(f"{file} row '{where}': unknown key '{key}'; nearest: {near[0]}")
                config[key] = cast(value, defaults[key], f"{file} row '{where}': {key}")
    for key, text in flags.items():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            fail(f"--{key} {text!r} cannot be read as a YAML value")
        config[key] = cast(text if isinstance(defaults[key], str) else value, defaults[key], f"--{key}")
    return argparse.Namespace(**args), fit_to_channels({"exp": exp, **config})


def fit_to_channels(config):
    """Check values and give mean and std one value a channel; an image size among model_args counts."""
    check_limits(config)
    if config["variant"] not in ("corrected", "paper"):
        fail(f"variant is {config['variant']!r}; expected corrected, paper")
    if "img_size" in config["model_args"]:
        config["img_size"] = config["model_args"]["img_size"]
    if config["in_chans"] not in (1, 3):
        fail(f"in_chans is {config['in_chans']}; expected 1 or 3")
    rgb = config["in_chans"] == 3
    config["mean"] = config["mean"] or ([0.485, 0.456, 0.406] if rgb else [0.485])
    config["std"] = config["std"] or ([0.229, 0.224, 0.225] if rgb else [0.229])
    for key in ("mean", "std"):
        values = config[key] if isinstance(config[key], list) else [config[key]]
        config[key] = [float(value) for value in values] * (config["in_chans"] // len(values) or 1)
        if len(config[key]) != config["in_chans"]:
            fail(f"{key} has {len(values)} values for {config['in_chans']} channels")
    return config
# --- end copy: experiment row ---


def options():
    """The command line and the row it names: (args, config)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--exp", help="row of experiments.yaml, e.g. 3.4; none: the defaults below and the flags")
    add("--experiments", metavar="FILE", default=Path(__file__).resolve().parent.parent / "experiments.yaml")
    add("--data", default="data", metavar="DIR", help="folder of the packed datasets (default data)")
    add("--train", metavar="FILE", help="manifest to learn from (default <data>/<dataset>/manifest.csv)")
    add("--val", metavar="FILE", help="manifest to choose the best epoch on (default: that of --train)")
    add("--train-split", default="train", help="its splits to use, comma-separated, or all (default train)")
    add("--val-split", default="val", help="likewise (default val)")
    add("--out", metavar="DIR", help="folder of the seeds (default runs/<exp>/finetune, or runs/finetune)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--steps", type=from_one, metavar="N", help="stop each seed after N steps of the schedule")
    add("--resume", choices=["auto", "never"], default="auto", help="go on from last.pt (default auto)")
    add("--micro-batch", type=from_one, metavar="N", help="images a pass and process, accumulated")
    add("--workers", type=from_one, default=4, metavar="N", help="threads that decode loose files (default 4)")
    add("--log-steps", type=from_one, default=50, metavar="N", help="a log line every N steps (default 50)")
    add("--save-minutes", type=float, default=10, metavar="M", help="last.pt every M minutes (default 10)")
    add("--probe", action="store_true", help="no fine-tuning: a linear probe on the frozen backbone")
    add("--compile", action="store_true", help="torch.compile the network")
    args, config = experiment_row(parser, DEFAULTS, "finetune")
    return args, config


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take seconds
    options()

import numpy as np
import pandas as pd
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image


# --- begin copy: distributed ---
def init_distributed(device):
    """Join the processes torchrun started (plain python is one process); returns rank, world size, device."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda, but PyTorch sees no GPU here; use --device cpu")
        place, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= n_gpus:
            fail(f"process {place} of this machine has no GPU, there are {n_gpus}; lower --nproc_per_node")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        # what is computed in fp32, scores above all, is not to be rounded to TF32
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:     # one machine
        # the store of torchrun --max-restarts still has the addresses of the processes before the restart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # with one channel the stride of that dimension means nothing, and DDP says so at length
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # gloo beside nccl: small agreements between the processes need no GPU synchronisation
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            store=store, rank=rank, world_size=world_size)
    return rank, world_size, device


def any_process(flag):
    """True in every process if `flag` is true in one of them."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def mean_over_processes(value):
    """The mean of a tensor over all processes (of its own where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def end_if_peer_died(problem, rank):
    """For an `except RuntimeError`: torchrun reports the process that died, the others need no traceback."""
    if not any(name in str(problem) for name in ("gloo", "NCCL")):
        raise problem
    if rank == 0:
        said = " ".join(str(problem).split())[:150]
        print(f"error: another process died, torchrun says which ({said}); run the same command again",
              file=sys.stderr)
    sys.exit(1)


def leave():
    """In a `finally`: out of the process group. After an error at once, or NCCL would wait for the others."""
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    if not dist.is_initialized():
        return
    if code in (0, 75):
        dist.destroy_process_group()
        return
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def catch_sigterm():
    """SIGTERM (SLURM: before the time limit) sets `stop["now"]`: save at the end of the step, leave."""
    stop = {"now": False}
    signal.signal(signal.SIGTERM, lambda *_: stop.update(now=True))
    return stop


def autocast(device):
    """Mixed precision on a GPU (bf16 where it is native, else fp16 with a loss scaler); fp32 on the CPU."""
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if bf16 else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bf16)
    return lambda: torch.autocast(device.type, dtype=half, enabled=cuda), scaler
# --- end copy: distributed ---


# --- begin copy: packed images ---
def read_manifest(manifest, split, samples=None):
    """Rows of a manifest.csv whose `split` is one of the comma-separated names (or `all`), in its order.

    The index of the returned frame are the row numbers of the file, which are those of images.npy.
    """
    if not Path(manifest).is_file():
        fail(f"{manifest} does not exist; pack the dataset (data_prep/pack.py) or name another --manifest")
    try:
        table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as problem:
        fail(f"{manifest} cannot be read as CSV: {' '.join(str(problem).split())}")
    if "path" not in table:
        fail(f"{manifest} has no column 'path'; its columns are {', '.join(table.columns[:8])}")
    table.attrs["n_rows"] = len(table)
    if "split" in table and split != "all":
        kept = table[table["split"].isin(split.split(","))]
        if kept.empty:
            fail(f"{manifest} has no rows of split '{split}'; only {', '.join(sorted(set(table['split'])))}")
        table = kept
    if samples is not None and samples > len(table):
        fail(f"{manifest} has {len(table)} rows of split '{split}', fewer than samples={samples}")
    return table if samples is None else table.iloc[:samples]


class ImageSource:
    """Images of manifest rows as uint8 batches on the device.

    Packed (images.npy beside the manifest): a gather, from GPU memory if it fits, else from the mapped file.
    Not packed: files are decoded by `workers` threads and may differ in size; a batch is then a list.
    """

    def __init__(self, manifest, rows, in_chans, device, workers=4):
        folder, self.rows = Path(manifest).parent, rows.index.to_numpy()
        self.in_chans, self.device = in_chans, device
        self.pool, self.ahead = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        self.packed = None
        if (folder / "images.npy").is_file():
            try:
                self.packed = np.lib.format.open_memmap(folder / "images.npy", mode="r")
            except (ValueError, EOFError, OSError) as problem:
                fail(f"{folder / 'images.npy'} is not a NumPy array file ({problem}); pack the dataset again")
            n_rows = rows.attrs["n_rows"]
            n, *sides = self.packed.shape
            fits = len(sides) == 2 or len(sides) == 3 and sides[2] == 3
            if self.packed.dtype != np.uint8 or n != n_rows or not fits or 0 in sides:
                fail(f"{folder / 'images.npy'} holds {self.packed.dtype} {self.packed.shape}, "
                     f"but {manifest} has {n_rows} rows; pack the dataset again")
            if device.type == "cuda" and self.packed.nbytes < torch.cuda.mem_get_info(device)[0] // 3:
                packed, self.packed = self.packed, torch.empty(
                    (len(self.rows), *self.packed.shape[1:]), dtype=torch.uint8, device=device)
                for begin in range(0, len(self.rows), 4096):                # host memory for a part at a time
                    part = slice(begin, begin + 4096)
                    self.packed[part] = torch.from_numpy(packed[self.rows[part]])
                self.rows = np.arange(len(self.rows))
        else:
            pack = folder / "pack.json"
            try:
                root = Path(json.loads(pack.read_text()).get("raw", folder)) if pack.is_file() else folder
            except (ValueError, AttributeError, TypeError):
                fail(f"{pack} was not written by pack.py; pack the dataset again")
            self.files = [root / path for path in rows["path"]]

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """indices: int64 array [B] into the selected rows -> uint8 [B, C, H, W], or a list of [C, H, W]."""
        if self.packed is None:
            images = list(self.pool.map(self.read, indices))
            channels = max(len(image) for image in images)                  # grey and colour may be mixed
            return [image.expand(channels, -1, -1).to(self.device) for image in images]
        rows = self.rows[indices]
        if isinstance(self.packed, torch.Tensor):
            images = self.packed[torch.from_numpy(rows).to(self.device, non_blocking=True)]
        else:
            order = np.argsort(rows, kind="stable")             # ascending reads from the mapped file
            images = torch.empty((len(rows), *self.packed.shape[1:]), dtype=torch.uint8)
            images.numpy()[order] = self.packed[rows[order]]
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
        return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)

    def read(self, index):
        path = self.files[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):  # convert("L") would clip at 255 instead of scaling
                    image = Image.fromarray((np.asarray(image, np.float32) / 257 + 0.5).astype(np.uint8))
                grey = image.mode in ("1", "L", "LA", "I", "F") or self.in_chans == 1
                pixels = np.array(image.convert("L" if grey else "RGB"))
        except (OSError, SyntaxError, ValueError) as problem:
            fail(f"{path} cannot be read as an image ({problem}); pack.py sorts such files out")
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)

    def prefetch(self, plans):
        """Yield each plan (a tuple beginning with indices) of a generator with its batch.

        The next plan and batch are made by a thread in the meantime.
        """
        def fetch():
            plan = next(plans, None)
            return plan, None if plan is None else self.batch(plan[0])

        waiting = self.ahead.submit(fetch)
        while True:
            plan, images = waiting.result()
            if plan is None:
                return
            waiting = self.ahead.submit(fetch)
            yield plan, images


def epoch_order(n, seed, epoch):
    """The order in which epoch `epoch` visits n images: the same in every process."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_generator(seed, step, stream=0, device="cpu"):
    """A generator made from (seed, step, stream) alone: any process count and any resume draw the same."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(2)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 ^ int(state[1]))
# --- end copy: packed images ---


# --- begin copy: label columns ---
# Columns of a manifest that are not labels.
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]


def read_labels(manifest, rows, columns, uncertain="zeros", blank="zero"):
    """Label columns of manifest rows: values 0 or 1 and whether they count, float32 [N, K] each."""
    codes = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1, "": 2}
    table = np.empty((len(rows), len(columns)), np.float32)
    for place, column in enumerate(columns):
        code = rows[column].map(codes)
        for row in rows.index[code.isna()][:1]:
            fail(f"{manifest} row {row + 2}: label '{column}' is '{rows[column][row]}'; "
                 "expected 1, 0, -1 or blank")
        table[:, place] = code
    known = ~((table == -1) & (uncertain == "ignore") | (table == 2) & (blank == "ignore"))
    values = (table == 1) | (table == -1) & (uncertain == "ones")
    return values.astype(np.float32), known.astype(np.float32)
# --- end copy: label columns ---


# --- begin copy: crops ---
N_CROP = 23     # uniforms a random resized crop and flip consume: 10 areas, 10 aspect ratios, top, left, flip


def crop_boxes(u, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop: ten tries, then the central crop of admissible aspect.

    Args: u uniform in [0, 1) [B, >= 22]; height, width of the images; scale: area range as a fraction.
    Returns: top, left, height, width of each box, integers [B] (float tensors on the device of u).
    """
    area = height * width * (scale[0] + u[:, :10] * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + u[:, 10:20] * (math.log(ratio[1]) - math.log(ratio[0])))
    w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    centre_w = min(width, round(height * ratio[1]))
    centre_h = min(height, round(width / ratio[0]))
    w, h = torch.where(fits, w, centre_w), torch.where(fits, h, centre_h)
    top = torch.where(fits, (u[:, 20] * (height - h + 1)).floor(), ((height - h) / 2).round())
    left = torch.where(fits, (u[:, 21] * (width - w + 1)).floor(), ((width - w) / 2).round())
    return top, left, h, w


def resample_matrix(start, length, in_size, out_size, cubic=True):
    """Antialiased bicubic or bilinear resampling (Pillow's) of [start, start + length): [B, out, in]."""
    scale = (length / out_size)[:, None, None]                              # source pixels a target pixel
    source = torch.arange(in_size, device=start.device) + 0.5
    target = torch.arange(out_size, device=start.device)[:, None] + 0.5
    offset = source - start[:, None, None]
    t = ((offset - target * scale) / scale.clamp_min(1)).abs_().clamp_(max=2)
    if cubic:
        weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)
    else:
        weights = (1 - t).clamp_(min=0)
    weights = weights * ((offset > 0) & (offset < length[:, None, None]))  # nothing outside the box
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images, boxes, flip, size, cubic=True):
    """Cut, stretch to size x size and mirror a batch; antialiased as Pillow does it.

    PyTorch's kernel for 8-bit images on the CPU is the fastest and takes them one by one; on a GPU hundreds
    of small kernels would take longer than the images, so two matrix products do the whole batch.

    Args: images uint8 [B, C, H, W]; boxes: top, left, height, width, each [B]; flip bool [B].
    Returns: float32 [B, C, size, size], 0-255, on the CPU rounded.
    """
    if images.device.type == "cpu":
        mode = "bicubic" if cubic else "bilinear"
        cuts = (image[None, :, top:top + h, left:left + w]
                for image, (top, left, h, w) in zip(images, torch.stack(boxes, 1).int().tolist()))
        views = torch.cat([F.interpolate(cut, (size, size), mode=mode, antialias=True) for cut in cuts])
        views[flip] = views[flip].flip(3)
        return views.float()
    boxes = (side.to(images.device, torch.float32, non_blocking=True) for side in boxes)
    return crop_by_matrices(images.float(), *boxes, flip.to(images.device, non_blocking=True), size, cubic)


def crop_by_matrices(x, top, left, h, w, flip, size, cubic=True):
    """crop_resize of float images: rows and columns of all of them are resampled by a matrix each."""
    rows = resample_matrix(top, h, x.shape[2], size, cubic)
    columns = resample_matrix(left, w, x.shape[3], size, cubic)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ x @ columns.mT[:, None]).clamp_(0, 255)


def random_resized_crop(images, u, scale, size, cubic=True):
    """Random resized crop and flip of a batch, or a list of images of any size, from uniforms [B, N_CROP]."""
    if isinstance(images, list):
        return torch.cat([random_resized_crop(image[None], row[None], scale, size, cubic)
                          for image, row in zip(images, u)])
    boxes = crop_boxes(u, images.shape[2], images.shape[3], scale)
    return crop_resize(images, boxes, u[:, 22] < 0.5, size, cubic)
# --- end copy: crops ---


# --- begin copy: rotation ---
def rotate(x, u, degrees):
    """Turn images about their centres by U(-degrees, degrees): nearest pixel, black outside.

    Args: x float [B, C, S, S]; u uniform [B].
    """
    angle = torch.deg2rad((2 * u - 1) * degrees).to(x.device, non_blocking=True)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, x.shape, align_corners=False), "nearest", align_corners=False)
# --- end copy: rotation ---


# --- begin copy: resize ---
def resize(images, size):
    """Stretch uint8 [B, C, H, W], or a list of [C, H, W], to float [B, C, size, size] (Pillow's bilinear)."""
    if isinstance(images, list):
        return torch.cat([resize(image[None], size) for image in images])
    if images.shape[2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
# --- end copy: resize ---


# --- begin copy: normalise ---
def normalise(x, config):
    """Pixels 0-255 [B, 1 or 3, H, W] to the network's input [B, in_chans, H, W]; grey images are repeated."""
    mean, std = (torch.tensor(config[key], dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
                 for key in ("mean", "std"))
    if x.shape[1] > config["in_chans"]:
        grey = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).to(x.device, non_blocking=True)
        x = (x * grey.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return torch.addcmul(-mean / std, x, 1 / (255 * std))    # in one pass; a grey channel broadcasts to three
# --- end copy: normalise ---


# --- begin copy: model ---
def make_model(facts, num_classes, drop_path=None):
    """The timm model that a row or a checkpoint describes; transformers are made for its image size."""
    arch, kwargs = facts["arch"], dict(facts["model_args"])
    card = timm.get_pretrained_cfg(arch)
    if card and card.fixed_input_size:
        kwargs.setdefault("img_size", facts["img_size"])
    try:
        return timm.create_model(arch, in_chans=facts["in_chans"], num_classes=num_classes,
                                 drop_path_rate=drop_path, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
        fail(f"timm cannot make {arch} with {kwargs}: {' '.join(str(problem).split())[:200]}")
# --- end copy: model ---


# --- begin copy: drop path ---
class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382) that is told which images skip the branch and does not draw them:
    so any number of processes, any micro-batch and any resume leave out the same."""

    def forward(self, x):
        return x * self.kept.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) if self.training else x


def take_drop_path(model):
    """Replace timm's DropPath in a model; returns the replacements, to be told by `set_drop_path`."""
    modules = [module for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    for module in modules:
        module.__class__ = DropPath
    return modules


def set_drop_path(modules, u):
    """u uniform [B, len(modules)]: image b skips module m where u[b, m] < its drop_prob."""
    for module, column in zip(modules, u.unbind(1)):
        module.kept = (column >= module.drop_prob) / (1 - module.drop_prob)
# --- end copy: drop path ---


# --- begin copy: weights ---
def start_file(init):
    """The file that `init` stands for where it is no name of random, timm's or torchvision's weights."""
    kind, _, key = init.partition(":")
    return Path(f"runs/{key}/pretrain/backbone.pt" if kind == "exp" else init)


def read_weights(file, key=None):
    """The state dict inside a checkpoint of any maker: a nested container is opened, tensors are kept.

    Returns: state dict, and the number of attention heads where the file tells it (MoCo-v3's ViT-S has 12,
    timm's 6), or None.
    """
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(file)
        else:
            # plain data, and what DINO, MoCo (arguments) and SimMIM (a configuration) store beside them
            known = [argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode")]
            with torch.serialization.safe_globals(known):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{file} does not exist")
    except Exception as problem:  # whatever a broken or hostile file raises
        fail(f"{file} is not a plain tensor checkpoint ({' '.join(str(problem).split())[:120]})")
    facts = state.get("model_args") if isinstance(state, dict) else None
    heads = facts.get("num_heads") if isinstance(facts, dict) else None
    for name in [key] if key else ["teacher", "student", "model", "state_dict", "net", "SiT_model"]:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)} \
        if isinstance(state, dict) else {}
    if not state:
        fail(f"{file} holds no weights" + (f" under '{key}'" if key else ""))
    if any("base_encoder." in name and value.shape[-1:] == (384,) for name, value in state.items()):
        heads = 12
    return state, heads


def timm_names(state):
    """Rename a state dict to timm's keys: wrappers' prefixes stripped, pre-training heads left out."""
    for prefix in ("module.", "student.", "base_encoder.", "backbone.", "encoder."):
        inner = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
        state = inner or state
    heads = ("head.", "fc.", "rec_head.", "cls_head.", "projection", "last_layer", "decoder.", "predictor.",
             "momentum_encoder.", "mask_token")
    buffers = ("relative_position_index", "attn_mask")                      # older timm and Swin store these
    state = {name: value for name, value in state.items() if not name.endswith(buffers)
             and (name.startswith("head.norm.") or not name.startswith(heads))}      # ConvNeXt's last norm
    if "layers.0.downsample.reduction.weight" in state:  # Swin's release: one stage earlier
        shift = lambda name: name.split(".")
        state = {".".join(["layers", str(int(shift(name)[1]) + 1), *shift(name)[2:]])
                 if ".downsample." in name else name: value for name, value in state.items()}
    return state


def fit_channels(kernel, in_chans, how):
    """First convolution [D, C, h, w] for other input channels: average | sum, duplicate | duplicate_mean."""
    if kernel.shape[1] == in_chans:
        return kernel
    if in_chans == 1:
        return kernel.mean(1, keepdim=True) if how == "average" else kernel.sum(1, keepdim=True)
    return kernel.repeat(1, in_chans, 1, 1) / (in_chans if how == "duplicate_mean" else 1)


def fit_positions(value, wanted):
    """Position embeddings [1, 1 + h*h, D] or bias tables [(2w-1)^2, heads] on another grid, bicubic.

    What is no grid stays: the CLS row in front, BEiT's three further biases at the end of its table.
    """
    table = value.ndim == 2
    rows, n_wanted = (value, wanted[0]) if table else (value[0], wanted[1])
    old = math.isqrt(len(rows))
    n_extra = len(rows) - old ** 2
    grid, extra = (rows[:old ** 2], rows[old ** 2:]) if table else (rows[n_extra:], rows[:n_extra])
    image, new = grid.float().T.reshape(1, -1, old, old), math.isqrt(n_wanted - n_extra)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    resized = image[0].flatten(1).T.to(grid.dtype)
    return torch.cat([resized, extra]) if table else torch.cat([extra, resized])[None]


def prefixes(model, key):
    """How the tensors of a timm model's "first_conv" or "classifier" begin."""
    names = model.pretrained_cfg.get(key) or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def load_backbone(model, config, weights_dir="weights"):
    """Fill a timm model from config["init"]; returns one line saying what was loaded, adapted and left out.

    init: "random"; "timm" or "timm:NAME" or "torchvision" (their own download, or weights_dir/NAME.pth or
    .safetensors where there is no network); "exp:KEY", what another row's pre-training made; or a file of
    timm, torchvision, DINO, MoCo-v3, SiT, SimMIM or ours.
    """
    init, adapt = config["init"], config["channel_adapt"]
    if init == "random":
        return "random initialisation"
    if adapt not in ("average", "sum", "duplicate", "duplicate_mean"):
        fail(f"channel_adapt is '{adapt}'; expected average, sum, duplicate or duplicate_mean")
    source, _, name = init.partition(":")
    n_heads = None
    if source in ("timm", "torchvision"):
        name = name or config["arch"]
        local = [path for path in sorted(Path(weights_dir).glob(f"{name}*"))
                 if path.suffix in (".pth", ".pt", ".safetensors")]
        if local:
            state, n_heads = read_weights(local[0], config["init_key"])
            init = f"{init} ({local[0]})"
        else:
            try:
                if source == "timm":
                    state = timm.create_model(name, pretrained=True).state_dict()
                else:
                    import torchvision
                    state = torchvision.models.get_model(name, weights="IMAGENET1K_V1").state_dict()
            except Exception as problem:                                    # no network raises what it likes
                fail(f"cannot download {source}'s weights of {name} ({type(problem).__name__}); fetch them "
                     f"elsewhere into {weights_dir}/{name}.pth or .safetensors, or use --init FILE")
    else:
        init = start_file(init)
        state, n_heads = read_weights(init, config["init_key"])
    state, wanted, notes = timm_names(state), model.state_dict(), []
    heads, first, loaded, misfits = prefixes(model, "classifier"), prefixes(model, "first_conv"), {}, []
    for name, target in wanted.items():
        value = state.pop(name, None)
        if value is None or name.startswith(heads):
            continue
        if name.startswith(first) and value.ndim == 4 and value.shape[1] != target.shape[1]:
            how = adapt if target.shape[1] > 1 or adapt == "sum" else "average"
            how = how if target.shape[1] == 1 or how.startswith("duplicate") else "duplicate"
            notes.append(f"{name} {value.shape[1]} -> {target.shape[1]} channels ({how})")
            value = fit_channels(value, target.shape[1], how)
        resizable = name.endswith(("pos_embed", "relative_position_bias_table"))
        if resizable and value.shape != target.shape and value.ndim == target.ndim:
            notes.append(f"{name} {tuple(value.shape)} -> {tuple(target.shape)}")
            value = fit_positions(value, target.shape)
        if value.shape != target.shape:
            misfits.append(f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}")
        loaded[name] = value
    if misfits:
        fail(f"{init} does not fit {config['arch']}: {misfits[0]}, {len(misfits)} misfits in all")
    absent = [name for name in wanted if name not in loaded and not name.startswith(heads)]
    if absent:
        fail(f"{init} fills {len(loaded)} of the {len(loaded) + len(absent)} tensors of {config['arch']}; "
             f"the first absent one is {absent[0]}")
    ours = next((module.num_heads for module in model.modules() if hasattr(module, "num_heads")), None)
    if isinstance(n_heads, int) and n_heads != ours:
        notes.append(f"ATTENTION: made with {n_heads} heads, used with {ours}; see model_args num_heads")
    model.load_state_dict(loaded, strict=False)  # heads stay as they are: checked above
    left = f"; left out {', '.join(sorted(state)[:3])}{' ...' if len(state) > 3 else ''}" if state else ""
    return f"loaded {len(loaded)} tensors from {init}" + "".join(f"; {note}" for note in notes) + left
# --- end copy: weights ---


# --- begin copy: schedule ---
def cosine(step, n_steps, start, end, n_warm=0):
    """Value at `step`: linear warm-up 0 to start (reached in its last step), then a cosine to end."""
    if step < n_warm:
        return start * step / max(1, n_warm - 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - n_warm) / max(1, n_steps - n_warm))) / 2


def decay_groups(model):
    """Two parameter groups: tensors of two or more dimensions (weight decay), biases and norms (none)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1]), dict(params=[p for p in trained if p.ndim <= 1])]


def clip_each(parameters, largest):
    """Scale down the gradient of each parameter tensor whose norm exceeds `largest` (each its own)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    factors = (largest / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, factors.unbind())
# --- end copy: schedule ---


# --- begin copy: sync batch norm ---
class MeanOverProcesses(torch.autograd.Function):
    """mean_over_processes with its gradient."""

    @staticmethod
    def forward(ctx, x):
        return mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return mean_over_processes(gradient.clone())


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all processes (equal shares of the batch), on the CPU as on GPUs."""

    def forward(self, x):
        """x [B, D] -> [B, D] of the same dtype; statistics in fp32."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        mean = MeanOverProcesses.apply(x.float().mean(0))
        centred = x.float() - mean
        var = MeanOverProcesses.apply(centred.square().mean(0))
        with torch.no_grad():
            n = len(x) * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        y = centred * (var + self.eps).rsqrt()
        return (y * self.weight + self.bias if self.affine else y).to(x.dtype)
# --- end copy: sync batch norm ---


# --- begin copy: forward all ---
@torch.inference_mode()
def forward_all(forward, source, n_outputs, batch, rank, world_size):
    """Outputs of all images of a source, float32 [N, n_outputs] on the CPU of every process.

    Batch b is done by process b mod world_size: an image stands in the same batch with any number of
    processes, counts once, and gets the same bits. forward: images of a batch -> [B, n_outputs].
    """
    outputs = torch.zeros(len(source), n_outputs)
    begins = range(rank * batch, len(source), world_size * batch)
    plans = ((np.arange(begin, min(begin + batch, len(source))), begin) for begin in begins)
    for (chosen, begin), images in source.prefetch(plans):
        outputs[begin:begin + len(chosen)] = forward(images).float().cpu()
    if world_size > 1:
        dist.all_reduce(outputs)                    # the others hold zeros in these rows: an exact sum
    return outputs
# --- end copy: forward all ---


# --- begin copy: checkpoint ---
def write_atomic(path, write):
    """Let write(file) fill a temporary file, flush, rename: a crash leaves the old file or the new one."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:
        # torch.save raises an error of its own over that of a full disk
        reason = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(reason, OSError):
            raise
        part.unlink(missing_ok=True)
        fail(f"cannot write {path}: {reason.strerror}; the last complete checkpoint is untouched")


def fail_diverged(what, out):
    """The end of a run whose numbers are none any more: what is no number, and what is left of the run."""
    last = Path(out) / "last.pt"
    kept = f"{last} is the last good checkpoint" if last.is_file() else "no checkpoint was saved before"
    fail(f"{what} is no number; {kept}; try a lower lr or a longer warm-up")


def save_atomic(content, path):
    """torch.save of a checkpoint; one whose weights are no numbers is not written and stops the run."""
    for part in content.values():
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                fail_diverged(f"{name} after step {content['step']}", Path(path).parent)
    write_atomic(path, lambda file: torch.save(content, file))


def digest(*files):
    """SHA-256 of what the files hold, those that exist; it tells a run that its inputs have changed."""
    total = hashlib.sha256()
    for file in filter(Path.is_file, map(Path, files)):
        with open(file, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def note_inputs(config, *manifests):
    """Add digests of images (manifest.csv, pack.json) and start to the config, in which a run must agree."""
    packs = [Path(manifest).with_name("pack.json") for manifest in manifests]
    config.update(data_sha256=digest(*manifests, *packs), init_sha256=digest(start_file(config["init"])))


def open_run(out, config, resume, main):
    """Create the run folder, lock it (the main process alone), and return the state to resume from, or None.

    The lock is held on the folder itself and goes with the process, however that ends.
    """
    out = Path(out)
    if main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if hasattr(open_run, "lock"):  # of the run before in this process: another seed
                os.close(open_run.lock)
            open_run.lock = os.open(out, os.O_RDONLY)
            fcntl.flock(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{out} is in use by another run; wait for it or choose another --out")
        except OSError as problem:
            fail(f"cannot write into {out}: {problem.strerror}; choose another --out")
        for part in out.glob("*.part"):
            part.unlink()
    last, log = out / "last.pt", out / "log.jsonl"
    if resume == "never" or not last.is_file():
        if main:
            last.unlink(missing_ok=True)                # first: without it no run goes on from the rest
            log.unlink(missing_ok=True)
        return None
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file raises what it likes
        fail(f"{last} cannot be read ({' '.join(str(problem).split())[:120]}); --resume never starts anew")
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or "step" not in state:
        fail(f"{last} is no checkpoint of this script; --resume never starts anew")
    changed = [key for key in config if state["config"].get(key) != config[key]]
    if changed:
        key = changed[0]
        fail(f"{last} was made with {key}={state['config'].get(key)!r}, now it is {config[key]!r}; "
             "--resume never starts anew, another --out keeps both")
    if main and log.exists():  # lines after the checkpoint come again
        lines = log.read_text().splitlines(keepends=True)
        try:
            lines = [line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= state["step"]]
        except (ValueError, TypeError, KeyError) as problem:
            fail(f"{log} has a line that is no log line ({problem}); mend or remove the file")
        write_atomic(log, lambda file: file.write("".join(lines).encode()))
    return state


def record_run(out, config, world_size, device):
    """run.json: what makes the files of this folder, as far as a rerun would have to know."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
                             capture_output=True, text=True).stdout.strip()
    except OSError:                                     # no git here
        git = ""
    facts = dict(command=sys.argv, config=config, processes=world_size, host=platform.node(), commit=git,
                 device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                 python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                 numpy=np.__version__)
    write_atomic(Path(out) / "run.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))


def restore(state, out, **parts):
    """Load the parts of last.pt back into the modules, the optimiser and so on that bear their names."""
    try:
        for name, part in parts.items():
            if name != "scaler" or state[name]:         # empty: of a device that needs no loss scaler
                part.load_state_dict(state[name])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as problem:
        fail(f"{out}/last.pt does not fit this script ({' '.join(str(problem).split())[:120]}); "
             "--resume never starts anew")
# --- end copy: checkpoint ---


# --- begin copy: progress ---
def log_line(out, entry):
    """One more line in log.jsonl."""
    try:
        with open(Path(out) / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
    except OSError as problem:
        fail(f"cannot write {out}/log.jsonl: {problem.strerror}; the last complete checkpoint is untouched")


class Progress:
    """Means of the loss terms since the last line, as a line on the terminal and one in log.jsonl."""

    def __init__(self, out, n_steps, step, images_a_step, main, meter=None):
        self.out, self.n_steps, self.images_a_step, self.main = out, n_steps, images_a_step, main
        self.sums = dict(meter or {})  # name -> sum, on the device: no waiting
        self.seen = step - int(self.sums.get("n", 0))                       # step of the last line
        self.first, self.begun = step, time.monotonic()

    def add(self, **terms):
        finite = torch.as_tensor(terms["loss"]).isfinite()
        for name, value in {**terms, "finite": finite, "n": 1}.items():
            self.sums[name] = self.sums.get(name, 0) + (value.detach() if torch.is_tensor(value) else value)

    def means(self):
        """Plain numbers of the means so far; stops the run where the loss is no longer a number."""
        sums = {name: float(value) for name, value in self.sums.items()}
        means = {name: value / sums["n"] for name, value in sums.items() if name not in ("n", "finite")}
        if sums.get("finite", 0) < sums.get("n", 0):
            fail_diverged(f"the loss of step {self.seen + int(sums['finite']) + 1}", self.out)
        return means

    def meter(self):
        self.means()
        return {name: float(value) for name, value in self.sums.items()}

    def line(self, step, epoch, **facts):
        """Write the line of `step` (steps done so far)."""
        means, elapsed = self.means(), time.monotonic() - self.begun
        rate = (step - self.first) * self.images_a_step / max(elapsed, 1e-9)
        left = int((self.n_steps - step) * elapsed / max(1, step - self.first))
        self.sums, self.seen = {}, step
        if not self.main:
            return
        entry = dict(step=step, epoch=epoch, **means, **facts, img_per_s=round(rate, 1), time=time.time())
        log_line(self.out, entry)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in {**means, **facts}.items())
        days = f"{left // 86400} d " if left >= 86400 else ""
        print(f"epoch {epoch}  step {step}/{self.n_steps}  {terms}  {rate:,.0f} img/s  "
              f"eta {days}{left % 86400 // 3600:02}:{left % 3600 // 60:02}:{left % 60:02}", flush=True)
# --- end copy: progress ---


class LabelledImages:
    """Images, labels (0 or 1) and which labels are known, of one split of a manifest."""

    def __init__(self, manifest, split, config, device, workers):
        self.rows = read_manifest(manifest, split)
        if config["label_names"] is None:
            columns = [column for column in self.rows if column not in FACTS]
            config["label_names"] = NIH14 if set(NIH14) <= set(columns) else columns
        names = config["label_names"]
        for name in names:
            if name not in self.rows:
                near = difflib.get_close_matches(name, self.rows.columns, n=1)
                fail(f"{manifest} has no label column '{name}'" + (f"; nearest: {near[0]}" if near else ""))
        if len({*names}) < len(names):
            fail(f"label_names is {names}; expected each label once")
        if not names:
            fail(f"{manifest} has no label columns; fine-tuning needs at least one")
        values, known = read_labels(manifest, self.rows, names, config["uncertain"], config["blank"])
        self.values, self.known = torch.from_numpy(values), torch.from_numpy(known)
        self.source = ImageSource(manifest, self.rows, config["in_chans"], device, workers)


def patient_subset(rows, positive, share, seed):
    """Places of the rows of `share` of the patients: the same share of those with each finding.

    A patient belongs to his rarest finding (or to none); of each such group the first of a seeded order are
    taken, rounded up, so that every finding keeps a patient and a smaller share lies within a larger one.
    Args: rows: a manifest (blank patient: each image its own); positive: bool [N, K].
    """
    patient = rows.get("patient", rows["path"])
    number = pd.factorize(patient.where(patient != "", rows["path"]))[0]
    findings = pd.DataFrame(positive).groupby(number).any().to_numpy()                      # [P, K]
    frequency = np.where(findings, findings.sum(0), len(findings) + 1)
    group = pd.Series(np.where(findings.any(1), frequency.argmin(1), -1)).sample(frac=1, random_state=seed)
    place, size = group.groupby(group).cumcount(), group.map(group.value_counts())
    return np.flatnonzero(np.isin(number, place.index[place < share * size]))


def augment(images, u, config):
    """Training views: bilinear crop of area 0.08-1, flip, rotation within 7 degrees, normalised."""
    x = random_resized_crop(images, u, config["crop_scale"], config["img_size"], cubic=False)
    x = normalise(rotate(x, u[:, N_CROP], config["rotation"]), config)
    return x.contiguous(memory_format=torch.channels_last)


def validation_view(images, config):
    """Images stretched to img_size / crop_pct (224 of 256), their centre cut out, normalised."""
    size = config["img_size"]
    x = resize(images, round(size / config["crop_pct"]))
    edge = round((x.shape[2] - size) / 2)
    x = normalise(x[:, :, edge:edge + size, edge:edge + size], config)
    return x.contiguous(memory_format=torch.channels_last)


def label_loss(logits, values, known, pos_weight=None):
    """Binary cross-entropy summed over known labels; logits, values, known [B, K]."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), values, pos_weight=pos_weight, reduction="none")
    return (loss * known).sum()


def learning_rate(epoch, config):
    """Rate of an epoch (from 0; a fraction counts): a line from warmup_lr to lr, then the rest of a cosine.

    The cosine spans all epochs, warm-up included: timm's CosineLRScheduler, stepped once an epoch.
    """
    if epoch < config["warmup_epochs"]:
        return config["warmup_lr"] + (config["lr"] - config["warmup_lr"]) * epoch / config["warmup_epochs"]
    wave = (1 + math.cos(math.pi * min(epoch / config["epochs"], 1))) / 2
    return config["min_lr"] + (config["lr"] - config["min_lr"]) * wave


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(model, config):
    """AdamW, Adam or Nesterov SGD; weight decay spares biases and norms."""
    groups = [{**group, "weight_decay": wd} for group, wd in zip(decay_groups(model), (config["wd"], 0.0))]
    if config["optimizer"] == "sgd":    # not fused: its momentum is arbitrary where the first step was skipped
        return torch.optim.SGD(groups, lr=config["lr"], momentum=0.9, nesterov=True)
    kind = dict(adamw=torch.optim.AdamW, adam=torch.optim.Adam)[config["optimizer"]]
    return kind(groups, lr=config["lr"], fused=True)


# --- begin copy: sync batch norm of maps ---
class SyncBatchNorm2d(SyncBatchNorm):
    """SyncBatchNorm for maps [B, C, H, W]: every pixel is a row."""

    def forward(self, x):
        rows = x.movedim(1, -1)
        return super().forward(rows.flatten(0, -2)).view_as(rows).movedim(-1, 1)


def synchronise_batch_norm(model, device):
    """Let BatchNorm2d use the statistics of all processes, so that their number does not matter."""
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
# --- end copy: sync batch norm of maps ---


def auc(truth, score):
    """Area under the ROC curve (scikit-learn), or None without both classes."""
    from sklearn.metrics import roc_auc_score
    return float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else None


def scores(logits, data, labels):
    """val_loss, val_auc (mean over labels with both classes; None if there is none), val_auc_<label>."""
    loss = label_loss(logits, data.values, data.known).item() / max(1, data.known.sum().item())
    columns = zip(data.values.numpy().T, logits.numpy().T, data.known.numpy().T > 0)
    aucs = [auc(values[known], column[known]) for values, column, known in columns]
    defined = [value for value in aucs if value is not None]
    return dict(val_loss=loss, val_auc=float(np.mean(defined)) if defined else None,
                **{f"val_auc_{label}": value for label, value in zip(labels, aucs)})


def validate(model, val, config, out, step, epoch, rank, world_size):
    """Scores of all validation images, the same in every process; in fp32, where AUC has no false ties."""
    labels = config["label_names"]
    model.eval()
    logits = forward_all(lambda images: model(validation_view(images, config)), val.source, len(labels),
                         config["batch"], rank, world_size)
    model.train()
    if not logits.isfinite().all():
        fail_diverged(f"an output of the network after step {step}", out)
    facts = scores(logits, val, labels)
    if rank == 0:
        log_line(out, dict(step=step, epoch=epoch, **facts, time=time.time()))
        mean = "undefined" if facts["val_auc"] is None else f"{facts['val_auc']:.4f}"
        print(f"epoch {epoch}  val_loss {facts['val_loss']:.4f}  val_auc {mean}", flush=True)
    return facts


def judge(best, facts, epoch, config):
    """Note the scores of an epoch in `best`; returns whether it is the best epoch so far."""
    value = facts["val_auc"] if config["select"] == "auc" else -facts["val_loss"]
    if value is None:
        fail("no label has both classes among the validation images, hence no AUC; use --select loss")
    best["stale"] = 0 if facts["val_loss"] < best["val_loss"] else best["stale"] + 1
    best["val_loss"] = min(best["val_loss"], facts["val_loss"])
    if not value > best["value"]:
        return False
    best.update(value=value, epoch=epoch)
    return True


def draw_curve(out, steps_an_epoch):
    """curve.png: loss, validation AUC and learning rate over the epochs of log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, key, name in ((axes[0], "loss", "training"), (axes[0], "val_loss", "validation"),
                            (axes[1], "val_auc", None), (axes[2], "lr", None)):
        points = [(line["step"] / steps_an_epoch, line[key]) for line in lines if line.get(key) is not None]
        style = ".-" if key.startswith("val") else "-"
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], style, label=name)
    for axis, title in zip(axes, ("loss", "mean validation AUC", "learning rate")):
        axis.set(title=title, xlabel="epoch")
    axes[0].legend(frameon=False)
    plt.close(figure)
    write_atomic(out / "curve.png", lambda file: figure.savefig(file, format="png", dpi=100))


def start(config):
    """The network of a seed at its start, with a new head, and one line on where its weights come from."""
    torch.manual_seed(config["seed"])
    model = make_model(config, len(config["label_names"]), config["drop_path"])
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        fail(f"arch {config['arch']} has no linear head to learn labels with; choose another")
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return model, load_backbone(model, config)


def export(model, config, step, epoch, path):
    """Write classifier.pt: weights under timm's names, and all that is needed to use them."""
    keys = ("arch", "model_args", "in_chans", "img_size", "mean", "std", "exp", "seed")
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_atomic(dict(model=weights, labels=config["label_names"], **{key: config[key] for key in keys},
                     step=step, epoch=epoch, config=config), path)


def positive_weight(wanted, values, known, device):
    """pos_weight of the loss, float [K] or None, from its key and the training images' labels [N, K]."""
    if wanted is None:
        return None
    if wanted == "balanced":
        wanted = ((1 - values) * known).sum(0).clamp(min=1) / (values * known).sum(0).clamp(min=1)
    try:
        return torch.as_tensor(wanted, dtype=torch.float32, device=device).expand(values.shape[1])
    except (RuntimeError, TypeError, ValueError):
        fail(f"pos_weight is {wanted!r}; expected balanced, a number or {values.shape[1]} numbers")


def train(config, data, val, chosen, args, rank, world_size, device):
    """Fine-tune one seed on the images `chosen`; random numbers of a step depend on (seed, step) alone."""
    out, labels = Path(args.out) / f"seed{config['seed']}", config["label_names"]
    batch = min(config["batch"], len(chosen))
    steps_an_epoch = len(chosen) // batch
    n_steps = config["epochs"] * steps_an_epoch
    last_step = min(n_steps, args.steps or n_steps)
    state = open_run(out, config, args.resume, rank == 0)
    begun = state["step"] if state else 0
    best = state["best"] if state else dict(epoch=0, value=-math.inf, val_loss=math.inf, stale=0)
    if begun >= last_step or best["stale"] >= (config["patience"] or math.inf):
        if rank == 0:
            print(f"{out}: finished, best epoch {best['epoch']}", flush=True)
        return

    model, note = start(config)
    model.to(device, memory_format=torch.channels_last)
    drop_paths = take_drop_path(model)
    if world_size > 1:
        model = synchronise_batch_norm(model, device)
    optimizer = make_optimizer(model, config)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5, threshold=1e-4)
    slipped = config["variant"] == "paper" and config["recipe"] in ("a", "b")
    amp, scaler = autocast(device)
    if state:
        restore(state, out, model=model, optimizer=optimizer, scaler=scaler, plateau=plateau)
    elif config["schedule"] == "cosine":
        set_rate(optimizer, learning_rate(0, config))
    pos_weight = positive_weight(config["pos_weight"], data.values[chosen], data.known[chosen], device)
    progress = Progress(out, last_step, begun, batch, rank == 0, state and state["meter"])
    if rank == 0:
        print(f"{out}: {note}; {sum(p.numel() for p in model.parameters()):,} parameters; "
              f"{len(labels)} labels; {len(chosen):,} images, {len(val.source):,} to validate; "
              f"steps {begun} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
        record_run(out, config, world_size, device)
    ddp = model
    if world_size > 1:
        ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    net = torch.compile(ddp) if args.compile else ddp
    largest_share = math.ceil(batch / world_size)
    n_parts = math.ceil(largest_share / (args.micro_batch or largest_share))
    saved = time.monotonic()

    def plans():
        for step in range(begun, last_step):
            if step == begun or step % steps_an_epoch == 0:
                order = chosen[epoch_order(len(chosen), config["seed"], step // steps_an_epoch)]
            generator = step_generator(config["seed"], step)
            u = torch.rand(batch, N_CROP + 1 + len(drop_paths), generator=generator)
            images = order[step % steps_an_epoch * batch:][:batch]
            n_known = max(1.0, data.known[images].sum().item())
            yield images[rank::world_size], u[rank::world_size], n_known, step

    def save(step):
        save_atomic(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                         scaler=scaler.state_dict(), plateau=plateau.state_dict(), meter=progress.meter(),
                         best=best, config=config, exp=config["exp"], seed=config["seed"], labels=labels,
                         step=step, epoch=step // steps_an_epoch), out / "last.pt")

    for (own, u, n_known, step), images in data.source.prefetch(plans()):
        x = augment(images, u, config)
        values, known, depth = (tensor.to(device, non_blocking=True) for tensor in (
            data.values[own], data.known[own], u[:, N_CROP + 1:]))
        torch.manual_seed(step_generator(config["seed"], step, 1 + rank).initial_seed())     # dropout, if any
        loss = torch.zeros((), device=device)
        optimizer.zero_grad()
        parts = zip(*(tensor.tensor_split(n_parts) for tensor in (x, values, known, depth)))
        for part, (x_part, values_part, known_part, depth_part) in enumerate(parts):
            set_drop_path(drop_paths, depth_part)
            with contextlib.nullcontext() if part == n_parts - 1 or world_size == 1 else ddp.no_sync(), amp():
                part_loss = label_loss(net(x_part), values_part, known_part, pos_weight)
                # divided by the known labels of the global batch: averaged by DDP it is their mean
                part_loss = part_loss * world_size / n_known
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        scaler.step(optimizer)
        scaler.update()
        progress.add(loss=mean_over_processes(loss))

        done, epoch = step + 1, step // steps_an_epoch + 1
        epoch_ends, ending = done % steps_an_epoch == 0, done == last_step
        if done % args.log_steps == 0 or epoch_ends or ending:
            progress.line(done, epoch, lr=optimizer.param_groups[0]["lr"])
        if epoch_ends:
            facts = validate(model, val, config, out, done, epoch, rank, world_size)
            if judge(best, facts, epoch, config) and rank == 0:
                export(model, config, done, epoch, out / "classifier.pt")
            if config["schedule"] == "plateau":
                plateau.step(facts["val_loss"])
            else:                       # the paper face has the loss where the epoch belongs (divergence 14)
                set_rate(optimizer, learning_rate(facts["val_loss"] if slipped else epoch, config))
            ending = ending or best["stale"] >= (config["patience"] or math.inf)
        elif ending and not best["epoch"] and rank == 0:        # --steps ends within the first epoch
            export(model, config, done, epoch, out / "classifier.pt")
        stopping = any_process(args.stop["now"])
        if rank == 0 and (stopping or ending or time.monotonic() - saved > 60 * args.save_minutes):
            draw_curve(out, steps_an_epoch)
            save(done)
            saved = time.monotonic()
        if ending:
            break
        if stopping:
            any_process(False)              # torchrun ends all once one has left: not before rank 0 has saved
            sys.exit(75)  # EX_TEMPFAIL: run the same command again


def probe(config, data, val, chosen, args, rank, world_size, device):
    """Linear probe: logistic regressions on the frozen backbone's standardised features become the head."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    out = Path(args.out) / f"seed{config['seed']}"
    if args.resume == "auto" and (out / "classifier.pt").is_file():
        if torch.load(out / "classifier.pt", weights_only=True)["config"] != config:
            fail(f"{out}/classifier.pt is of another configuration; choose another --out or --resume never")
        print(f"{out}: finished", flush=True)
        return
    open_run(out, config, "never", rank == 0)
    model, note = start(config)
    model.to(device, memory_format=torch.channels_last).eval()
    head = model.get_classifier()

    def features(part):
        maps = lambda images: model.forward_features(validation_view(images, config))
        return forward_all(lambda images: model.forward_head(maps(images), pre_logits=True), part.source,
                           head.in_features, config["batch"], rank, world_size).numpy()
    train_features, val_features = features(data)[chosen], features(val)
    if rank > 0:
        return
    print(f"{out}: {note}; {len(chosen):,} images x {head.in_features} features", flush=True)
    record_run(out, config, world_size, device)
    scaler = StandardScaler().fit(train_features)
    train_features, val_features = scaler.transform(train_features), scaler.transform(val_features)
    weight, bias = np.zeros((len(val.values[0]), head.in_features)), np.zeros(len(val.values[0]))
    for k, label in enumerate(config["label_names"]):
        if args.stop["now"]:
            sys.exit(75)                                    # nothing to save: a probe takes minutes
        seen, judged = data.known[chosen, k] > 0, val.known[:, k] > 0
        x, y = train_features[seen], data.values[chosen, k][seen].numpy()
        if not 0 < y.sum() < len(y):                    # one class only: a constant far on its side
            bias[k] = 10.0 if y.sum() else -10.0
            continue
        best, regression = None, LogisticRegression(max_iter=1000, warm_start=True)
        for strength in PROBE_C:                        # the strongest penalty where no AUC can choose
            regression.set_params(C=strength).fit(x, y)
            score = regression.decision_function(val_features[judged])
            value = auc(val.values[judged, k].numpy(), score)
            if strength == PROBE_C[0] or value is not None and value > best:
                best, weight[k], bias[k] = value, regression.coef_[0], regression.intercept_[0]
        print(f"{label}  val_auc {'undefined' if best is None else f'{best:.4f}'}", flush=True)
    weight /= scaler.scale_                             # the scaler folded into the head
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))
    validate(model, val, config, out, step=0, epoch=0, rank=0, world_size=1)
    export(model, config, 0, 0, out / "classifier.pt")


def own_checkpoint(init):
    """What a checkpoint of ours says beside its weights; {} for any other start."""
    kind, _, key = init.partition(":")
    file = start_file(init)
    if kind == "exp" and not file.is_file():
        fail(f"{file} does not exist; run the pre-training of row {key} first, or give --init FILE")
    if init in ("random", "timm", "torchvision") or kind == "timm" or not file.is_file():
        return {}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                                   # another maker's file: load_backbone judges it
        return {}
    return content if isinstance(content, dict) and "arch" in content else {}


def resolve(args, config):
    """Lay the start's facts and the recipe below what the row and the flags say; check the choices."""
    own = {*args.flags, *args.row, *(args.row.get("finetune") or {})}
    if "pretrain" in args.row and "init" not in args.flags:
        config["init"] = f"exp:{config['exp']}"
    checkpoint = own_checkpoint(config["init"])
    for key in ("arch", "model_args", "in_chans", "img_size"):
        if key in checkpoint and key not in own:
            config[key] = checkpoint[key]
    for key in ("mean", "std"):
        if checkpoint and key not in own:
            config[key] = checkpoint[key] if checkpoint["in_chans"] == config["in_chans"] else None
    fit_to_channels(config)
    choices = dict(recipe=RECIPES, optimizer=("adamw", "sgd", "adam"), schedule=("cosine", "plateau"),
                   select=("auc", "loss"), uncertain=("zeros", "ones", "ignore"), blank=("zero", "ignore"),
                   variant=("corrected", "paper"))
    if config["recipe"] in RECIPES:
        for key, value in RECIPES[config["recipe"]].items():
            config[key] = value if config[key] is None else cast(config[key], value, f"key {key}")
    for key, allowed in choices.items():
        if config[key] not in allowed:
            fail(f"{key} is {config[key]!r}; expected {', '.join(allowed)}")
    for key in ("epochs", "batch"):
        if config[key] < 1:
            fail(f"{key} is {config[key]}; expected at least 1")
    for key in ("labels", "crop_pct"):
        if not 0 < config[key] <= 1:
            fail(f"{key} is {config[key]}; expected a share above 0 and up to 1")
    if isinstance(config["label_names"], str):
        config["label_names"] = config["label_names"].split(",")
    seeds = config.pop("seeds")
    if seeds is None:
        paper = config["variant"] == "paper" and config["recipe"] == "resnet"
        seeds = [0] if args.probe else [0, 1, 2] if paper else [0, 11, 21, 42, 100]
    try:
        numbers = [int(seed) for seed in (seeds if isinstance(seeds, list) else str(seeds).split(","))]
    except (ValueError, TypeError):
        numbers = []
    if not numbers or min(numbers) < 0:
        fail(f"seeds is {seeds!r}; expected numbers from 0 such as 0,11,21")
    return numbers


def main():
    args, config = options()
    seeds = resolve(args, config)
    args.train = args.train or Path(args.data) / config["dataset"] / "manifest.csv"
    args.out = args.out or Path("runs", config["exp"] or "", "probe" if args.probe else "finetune")

    rank, world_size, device = init_distributed(args.device)
    if config["batch"] % world_size:
        fail(f"{world_size} processes do not divide the global batch of {config['batch']}; "
             "change --nproc_per_node or --batch")
    data = LabelledImages(args.train, args.train_split, config, device, args.workers)
    val = LabelledImages(args.val or args.train, args.val_split, config, device, args.workers)
    note_inputs(config, args.train, args.val or args.train)
    if rank == 0:
        print(json.dumps(config), flush=True)
        both = {*data.rows.get("patient", [])} & {*val.rows.get("patient", [])} - {""}
        if both:
            print(f"warning: {len(both):,} patients are in training and in validation", file=sys.stderr)
    args.stop = catch_sigterm()
    try:
        for seed in seeds:
            if any_process(args.stop["now"]):
                sys.exit(75)
            chosen = np.arange(len(data.source))
            if config["labels"] < 1:
                positive = (data.values * data.known).numpy() > 0
                chosen = patient_subset(data.rows, positive, config["labels"], seed)
            run = probe if args.probe else train
            run({**config, "seed": seed}, data, val, chosen, args, rank, world_size, device)
    except torch.cuda.OutOfMemoryError:
        micro = args.micro_batch or config["batch"] // world_size
        fail(f"GPU memory is too small for {micro} images a pass; try --micro-batch {max(1, micro // 2)}")
    except RuntimeError as problem:
        end_if_peer_died(problem, rank)
    finally:
        leave()


if __name__ == "__main__":
    main()
