"""MoCo-v3: momentum contrast for vision transformers (Chen, Xie, He, arXiv:2104.02057).

Two views of an image go through an encoder and through its momentum average; each query has to find the
key of its own image among the keys of the whole batch.

    torchrun --nproc_per_node=4 pretrain/moco_v3.py --exp c.10-moco   one row of experiments.yaml on 4 GPUs
    python pretrain/moco_v3.py --manifest my/manifest.csv --out my/run    your own images, one process
    python pretrain/moco_v3.py --variant paper --epochs 10                any key of a row is a flag

Reads   manifest.csv (+ images.npy beside it; without it the images named in `path` are read from disk).
Writes  --out: backbone.pt (weights for timm), last.pt (to resume), log.jsonl, run.json.
Killed or stopped, the same command continues where it left off; SIGTERM saves first and exits with code 75.
With --micro-batch every pass of that many images has batch-norm statistics of its own; the keys are always
those of the global batch.
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

DEFAULTS = dict(
    strategy="moco_v3",             # what this script does; a row with another strategy is refused
    arch="vit_small_patch16_224",   # any timm vision transformer with a CLS token
    model_args={"num_heads": 12},   # of timm.create_model; the publication's ViT-S has 12 heads, timm's 6
    in_chans=1,                     # 1 or 3; grey images are repeated to 3
    img_size=224,                   # pixels
    mean=None, std=None,            # of pixels in 0..1; none: 0.485 / 0.229, in 3 channels ImageNet's
    init="random",                  # random | timm[:NAME] | exp:KEY | a checkpoint file
    init_key=None,                  # which weights of the file (teacher, student, ...); none: the usual one
    channel_adapt="average",        # 3 -> 1: average (as in the study) | sum; 1 -> 3: duplicate[_mean]
    dataset="nih_pretrain",         # folder below --data with the packed images
    samples=None,                   # use the first so many images of the split; none: all
    epochs=300, warmup_epochs=10,
    batch=256,                      # images an optimiser step, over all processes together
    lr=5e-4, min_lr=0.0,            # peak for a batch of 256 (scaled by batch / 256) and end of the cosine
    wd=0.04,                        # weight decay of all parameters, biases and norms too
    seed=0,
    variant="corrected",            # paper: temperature 1, the default of the released fork
    temperature=None,               # of the softmax; none: 0.2 as published, 1 in the paper face
    ema=0.99,                       # momentum of the key encoder, by a cosine to 1
    hidden_dim=4096, out_dim=256,   # widths of projector and predictor
    stop_grad_conv1=True,           # the patch projection stays as it was initialised
    crop_scale=[0.08, 1.0],         # area of the random resized crops
)

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


# --- begin copy: pre-training options ---
def options():
    """The command line and the row it names: (args, config)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--exp", help="row of experiments.yaml, e.g. 3.4; none: the defaults below and the flags")
    add("--experiments", metavar="FILE", default=Path(__file__).resolve().parent.parent / "experiments.yaml")
    add("--data", default="data", metavar="DIR", help="folder of the packed datasets (default data)")
    add("--manifest", metavar="FILE", help="default: <data>/<dataset>/manifest.csv")
    add("--split", default="pretrain", help="splits to use, comma-separated, or all (default pretrain)")
    add("--out", metavar="DIR", help="run folder (default runs/<exp>/pretrain, or runs/<strategy>)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--steps", type=from_one, metavar="N", help="stop after N steps of the schedule")
    add("--resume", choices=["auto", "never"], default="auto", help="go on from last.pt (default auto)")
    add("--micro-batch", type=from_one, metavar="N", help="images a pass and process, accumulated")
    add("--workers", type=from_one, default=4, metavar="N", help="threads that decode loose files (default 4)")
    add("--log-steps", type=from_one, default=50, metavar="N", help="a log line every N steps (default 50)")
    add("--save-minutes", type=float, default=10, metavar="M", help="last.pt every M minutes (default 10)")
    add("--picture-epochs", type=from_one, default=10, metavar="N", help="picture every N epochs (10)")
    args, config = experiment_row(parser, DEFAULTS, "pretrain")
    if config["strategy"] != DEFAULTS["strategy"]:
        fail(f"{config['exp']} is a row of {config['strategy']}; run pretrain/{config['strategy']}.py")
    args.manifest = args.manifest or Path(args.data) / config["dataset"] / "manifest.csv"
    args.out = args.out or f"runs/{config['exp'] + '/pretrain' if config['exp'] else config['strategy']}"
    return args, config


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take seconds
    options()
# --- end copy: pre-training options ---

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


# --- begin copy: colour and blur ---
N_COLOUR = 11   # uniforms: apply jitter, 4 strengths, 4 order keys, apply blur, blur width


def shift_hue(rgb, turn):
    """Turn the hue of RGB images [B, 3, H, W] in 0..1 by `turn` [B, 1, 1] of a full circle (HSV)."""
    value, chroma = rgb.amax(1), rgb.amax(1) - rgb.amin(1)
    r, g, b = rgb.unbind(1)
    safe = chroma.clamp_min(1e-8)
    sixth = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    sixth = torch.where(value == r, (g - b) / safe, sixth)
    k = (5 - 2 * torch.arange(3, device=rgb.device).view(1, 3, 1, 1) + (sixth + 6 * turn)[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def luminance(x):
    """Grey value [B, 1, H, W] of images [B, C, H, W]."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).to(x.device, non_blocking=True)
    return torch.einsum("bchw,c->bhw", x, weights)[:, None]


def colour_jitter(x, u, strength, p):
    """Brightness, contrast, saturation and hue in random order, for a share p of the images; changes x.

    Args: x float [B, C, H, W], 0-255; u uniform [B, >= 9] on the CPU (known there: no synchronisation);
    strength: (brightness, contrast, saturation, hue). Grey images have neither saturation nor hue.
    """
    order = u[:, 5:9].argsort(1)
    for place in range(4):
        for op in range(4 if x.shape[1] == 3 else 2):
            chosen = ((u[:, 0] < p) & (order[:, place] == op)).nonzero()[:, 0]
            if len(chosen) == 0 or strength[op] == 0:
                continue
            amount = (2 * u[chosen, 1 + op] - 1) * strength[op]             # U(-strength, strength)
            amount = amount.to(x.device, non_blocking=True).view(-1, 1, 1, 1)
            chosen = chosen.to(x.device, non_blocking=True)
            part = x[chosen]
            if op == 3:
                part = shift_hue(part / 255, amount[:, 0]) * 255
            else:                       # away from black, from the mean grey, from each pixel's grey
                grey = luminance(part) if op else torch.zeros_like(amount)
                grey = grey.mean((1, 2, 3), keepdim=True) if op == 1 else grey
                part = torch.lerp(grey, part, 1 + amount).clamp_(0, 255)
            x[chosen] = part
    return x


def gaussian_blur(x, u, p, sigma=(0.1, 2.0)):
    """Blur a share p of the images x [B, C, H, W] with width U(sigma) pixels; u uniform [B, 2] on the CPU.

    The kernel ends at 4 widths, edges are continued. Changes x.
    """
    chosen = (u[:, 0] < p).nonzero()[:, 0]
    if len(chosen) == 0:
        return x
    width = (sigma[0] + u[chosen, 1] * (sigma[1] - sigma[0])).to(x.device, non_blocking=True)
    chosen = chosen.to(x.device, non_blocking=True)
    part, radius = x[chosen], math.ceil(4 * sigma[1])
    place = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (place / width[:, None]) ** 2)
    weights = F.threshold(weights / weights.sum(1, keepdim=True), 1e-12, 0)     # denormal numbers are slow
    part = F.pad(part, [radius] * 4, mode="replicate")
    for size in (x.shape[3], x.shape[2]):       # products with banded matrices: faster than convolutions
        band = F.pad(weights, (0, size))[:, None].expand(-1, size, -1).flatten(1)  # next row, next pixel
        band = band[:, :size * (size + 2 * radius)].view(-1, size, size + 2 * radius)
        part = (part.flatten(1, 2) @ band.mT).unflatten(1, part.shape[1:3]).mT
    x[chosen] = part
    return x
# --- end copy: colour and blur ---


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


# --- begin copy: strong views ---
N_VIEW = N_CROP + N_COLOUR + 2  # uniforms a view consumes: crop, colour and blur, greyscale, solarise


def strong_view(images, u, crop_scale, size, blur, solarise, config, cubic=True):
    """Crop and flip, jitter (0.4, 0.4, 0.2, 0.1; p 0.8), greyscale (p 0.2), blur, solarise; normalised.

    Args: images uint8 [B, C, H, W] or a list; u uniform [B, N_VIEW] on the CPU; blur, solarise: their shares.
    Returns: float [B, in_chans, size, size].
    """
    x = random_resized_crop(images, u, crop_scale, size, cubic)
    u = u[:, N_CROP:]
    x = colour_jitter(x, u, strength=(0.4, 0.4, 0.2, 0.1), p=0.8)
    chosen = (u[:, N_COLOUR:] < u.new_tensor([0.2, solarise])).to(x.device, non_blocking=True)
    grey, solarised = chosen.T[..., None, None, None]                       # [B, 1, 1, 1] each
    x = torch.where(grey, luminance(x), x)
    x = gaussian_blur(x, u[:, 9:], p=blur)
    x = torch.where(solarised & (x >= 128), 255 - x, x)
    return normalise(x, config)
# --- end copy: strong views ---


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


# --- begin copy: momentum teacher ---
@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, every parameter; buffers stay its own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
# --- end copy: momentum teacher ---


# --- begin copy: contrastive loss ---
def gather_rows(x, world_size):
    """Rows [b, D] of all processes as [B, D], no gradient; process r holds rows r, r + world_size, ..."""
    if world_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def info_nce(queries, keys, own, temperature):
    """Mean over queries of -log softmax(q . k / temperature) at the query's own key, times 2 temperature.

    Args: queries [b, D] and keys [B, D], of any length; own: row of each query's key, int64 [b].
    Source: MoCo v3 (arXiv:2104.02057), algorithm 1.
    """
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, own)
# --- end copy: contrastive loss ---

# --- begin copy: feature spread ---
def feature_std(features):
    """Spread of unit features [b, D] over the batch of all processes: 1 in all directions, 0 collapsed.

    The root of the summed variances of the D components, which for unit vectors is sqrt(1 - |mean|^2).
    """
    mean = mean_over_processes(F.normalize(features.float(), dim=1).mean(0))
    return (1 - mean.square().sum()).clamp_min(0).sqrt()
# --- end copy: feature spread ---


def sincos_positions(rows, columns, dim):
    """Fixed position embeddings [1, 1 + rows * columns, dim]; the CLS token's is zero.

    The row stands in the first half of the channels, the column in the second, each as sines, then cosines.
    """
    frequency = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))                 # [N, 2]
    angle = place[..., None] * frequency                                                    # [N, 2, dim / 4]
    grid = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)                              # [N, dim]
    return torch.cat([torch.zeros(1, dim), grid])[None]


def make_backbone(config):
    """The vision transformer of MoCo-v3: fixed positions, patch projection frozen at its random start.

    Weights of `init` take the place of both; they stay fixed all the same. Returns: backbone, a note on them.
    """
    vit = make_model(config, 0)
    rows, columns = vit.patch_embed.grid_size if hasattr(vit, "patch_embed") else (0, 0)
    if getattr(vit, "pos_embed", None) is None or vit.pos_embed.shape[1] != 1 + rows * columns:
        fail(f"arch {config['arch']} is no vision transformer with a CLS token and absolute positions")
    if vit.embed_dim % 4:
        fail(f"{config['arch']} has {vit.embed_dim} channels; sin-cos positions need a multiple of 4")
    vit.init_weights("moco")                        # Xavier, with q, k and v as three layers
    kernel = vit.patch_embed.proj.weight
    bound = math.sqrt(6 / (kernel[0].numel() + vit.embed_dim))
    nn.init.uniform_(kernel, -bound, bound)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    vit.pos_embed.data.copy_(sincos_positions(rows, columns, vit.embed_dim))
    note = load_backbone(vit, config)
    vit.pos_embed.requires_grad_(False)
    vit.patch_embed.proj.requires_grad_(not config["stop_grad_conv1"])
    return vit, note


def mlp(*sizes):
    """Linear layers without bias, each with batch norm, ReLU between; the last norm has no affine part."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out, bias=False), SyncBatchNorm(n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], SyncBatchNorm(sizes[-1], affine=False))


class Encoder(nn.Module):
    """Backbone and projector: the part of the network that the momentum encoder averages."""

    def __init__(self, backbone, hidden_dim, out_dim):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, hidden_dim, hidden_dim, out_dim)

    def forward(self, views):
        """views [V, B, C, S, S] -> projections [V, B, out_dim], CLS features [V, B, D]; norms see a view."""
        features = self.backbone(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return torch.stack([self.projector(view) for view in features]), features


class MoCo(nn.Module):
    """The trained network: encoder and predictor."""

    def __init__(self, backbone, hidden_dim=4096, out_dim=256):
        super().__init__()
        self.base_encoder = Encoder(backbone, hidden_dim, out_dim)
        self.predictor = mlp(out_dim, hidden_dim, out_dim)

    def forward(self, views):
        """views [V, B, C, S, S] -> queries [V, B, out_dim]."""
        return torch.stack([self.predictor(view) for view in self.base_encoder(views)[0]])


def symmetric_loss(queries, keys, own, temperature):
    """Queries [2, b, D] of view 1 against keys [2, B, D] of view 2, and the reverse; own: see info_nce."""
    return sum(info_nce(q, k, own, temperature) for q, k in zip(queries, keys.flip(0)))


@torch.no_grad()
def retrieval(queries, keys, own, temperature):
    """How view 1 finds its keys: entropy of the softmax over them (log B at chance) and top-1 accuracy."""
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
    entropy = torch.special.entr(logits.softmax(1)).sum(1).mean()
    return entropy, (logits.argmax(1) == own).float().mean()


def plan_step(config, order, step, rank, world_size):
    """Own images of a step and the uniforms of their two views [2, b, N_VIEW], drawn for the global batch."""
    uniforms = torch.rand(2, config["batch"], N_VIEW, generator=step_generator(config["seed"], step))
    begin = step % (len(order) // config["batch"]) * config["batch"]
    return order[begin + rank:begin + config["batch"]:world_size], uniforms[:, rank::world_size], step


def make_views(images, uniforms, config):
    """Two views [2, b, C, S, S]: the first always blurred; the second rarely blurred, sometimes solarised."""
    scale, size = config["crop_scale"], config["img_size"]
    return torch.stack([strong_view(images, u, scale, size, *shares, config, cubic=False)
                        for u, shares in zip(uniforms, [(1.0, 0.0), (0.1, 0.2)])])


def train(config, args, rank, world_size, device):
    """Pre-train. All random numbers of a step depend on (seed, step) alone: a resumed run is the same run."""
    torch.manual_seed(config["seed"])
    backbone, note = make_backbone(config)
    model = MoCo(backbone, config["hidden_dim"], config["out_dim"]).to(device)
    momentum_encoder = copy.deepcopy(model.base_encoder).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config["wd"], fused=True)
    temperature = config["temperature"] or (1.0 if config["variant"] == "paper" else 0.2)
    amp, scaler = autocast(device)

    rows = read_manifest(args.manifest, args.split, config["samples"])
    source = ImageSource(args.manifest, rows, config["in_chans"], device, args.workers)
    steps_an_epoch = len(source) // config["batch"]
    if steps_an_epoch == 0:
        fail(f"{args.manifest} has {len(source)} images of split '{args.split}', "
             f"fewer than one batch of {config['batch']}")
    n_steps, n_warm = (config[key] * steps_an_epoch for key in ("epochs", "warmup_epochs"))
    last_step = min(n_steps, args.steps or n_steps)

    state = open_run(args.out, config, args.resume, rank == 0)
    begun = state["step"] if state else 0
    if state:
        restore(state, args.out, model=model, momentum_encoder=momentum_encoder, optimizer=optimizer,
                scaler=scaler)
    progress = Progress(args.out, last_step, begun, config["batch"], rank == 0, state and state["meter"])
    if rank == 0:
        print(f"{note}; {sum(p.numel() for p in model.parameters()):,} parameters; {len(source):,} images; "
              f"steps {begun} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
        if begun < last_step:
            record_run(args.out, config, world_size, device)
    net = model
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    own = torch.arange(rank, config["batch"], world_size, device=device)    # rows of the global batch
    micro = args.micro_batch or len(own)
    if len(own) % micro or micro * world_size < 2:
        fail(f"--micro-batch {micro} and {len(own)} images a process: batch norm needs passes of equal size "
             "and more than one image")
    parts = [slice(begin, begin + micro) for begin in range(0, len(own), micro)]
    stop, saved, out = catch_sigterm(), time.monotonic(), Path(args.out)

    def plans():
        for step in range(begun, last_step):
            if step == begun or step % steps_an_epoch == 0:
                order = epoch_order(len(source), config["seed"], step // steps_an_epoch)
            yield plan_step(config, order, step, rank, world_size)

    def save(step):
        epoch = step // steps_an_epoch
        facts = dict(config=config, exp=config["exp"], seed=config["seed"], step=step, epoch=epoch)
        if step == last_step:         # before last.pt, which says that nothing is left to do
            weights = {name: value.cpu() for name, value in backbone.state_dict().items()}
            save_atomic(dict(model=weights, **{key: config[key] for key in (
                "arch", "model_args", "in_chans", "img_size", "mean", "std")}, **facts), out / "backbone.pt")
        save_atomic(dict(model=model.state_dict(), momentum_encoder=momentum_encoder.state_dict(),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         meter=progress.meter(), **facts), out / "last.pt")

    for (_, uniforms, step), images in source.prefetch(plans()):
        lr = cosine(step, n_steps, config["lr"], config["min_lr"], n_warm) * config["batch"] / 256
        ema = cosine(step, n_steps, config["ema"], 1.0)
        optimizer.param_groups[0]["lr"] = lr

        views = make_views(images, uniforms, config)
        # The publication passes the queries first. They don't depend on the momentum encoder, and with all
        # keys at hand they may come in parts; what counts is that it averages weights from before the step.
        update_teacher(momentum_encoder, model.base_encoder, ema)
        with torch.no_grad(), amp():
            keys, features = (torch.cat(outputs, 1) for outputs in zip(
                *(momentum_encoder(views[:, part]) for part in parts)))
        keys = torch.stack([gather_rows(view, world_size) for view in keys])            # [2, global batch, D]
        loss, queries = torch.zeros((), device=device), []
        optimizer.zero_grad()
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] or world_size == 1 else net.no_sync():
                with amp():
                    q = net(views[:, part])
                part_loss = symmetric_loss(q, keys, own[part], temperature) * q.shape[1] / len(own)
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            queries.append(q[0].detach())
        scaler.step(optimizer)
        scaler.update()
        entropy, accuracy = retrieval(torch.cat(queries), keys[1], own, temperature)
        loss, entropy, accuracy = mean_over_processes(torch.stack([loss, entropy, accuracy]))
        progress.add(loss=loss, entropy=entropy, accuracy=accuracy, feature_std=feature_std(features[0]))

        done = step + 1
        if done % args.log_steps == 0 or done == last_step:
            progress.line(done, step // steps_an_epoch + 1, lr=lr, ema=ema)
        stopping = any_process(stop["now"])
        if rank == 0 and (stopping or done == last_step or time.monotonic() - saved > 60 * args.save_minutes):
            save(done)
            saved = time.monotonic()
        if stopping and done < last_step:
            any_process(False)              # torchrun ends all once one has left: not before rank 0 has saved
            sys.exit(75)  # EX_TEMPFAIL: run the same command again


# --- begin copy: pre-training command line ---
def main():
    args, config = options()
    rank, world_size, device = init_distributed(args.device)
    if config["batch"] % world_size:
        fail(f"{world_size} processes do not divide the global batch of {config['batch']}; "
             "change --nproc_per_node or --batch")
    note_inputs(config, args.manifest)
    if rank == 0:
        print(json.dumps(config), flush=True)
    try:
        train(config, args, rank, world_size, device)
    except torch.cuda.OutOfMemoryError:
        micro = args.micro_batch or config["batch"] // world_size
        fail(f"GPU memory is too small for {micro} images a pass; try --micro-batch {max(1, micro // 2)}")
    except RuntimeError as problem:
        end_if_peer_died(problem, rank)
    finally:
        leave()


if __name__ == "__main__":
    main()
# --- end copy: pre-training command line ---
