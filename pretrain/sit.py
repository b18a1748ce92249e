"""SiT: self-supervised vision transformer (Atito, Awais, Kittler, arXiv:2104.03602, as released later).

A student sees images with blocks removed or replaced. It restores them, as in GMML, and from its CLS token
finds, among all images of the batch, the one whose other, clean view its teacher, a moving average, has seen.

    torchrun --nproc_per_node=4 pretrain/sit.py --exp 4.3.1-100k     one row of experiments.yaml on 4 GPUs
    python pretrain/sit.py --manifest my/manifest.csv --out my/run    your own images, one process
    python pretrain/sit.py --exp 4.3.1-100k --lr 5e-4 --wd_end 0.1    the released fork's defaults

Reads   manifest.csv (+ images.npy beside it; without it the images named in `path` are read from disk).
Writes  --out: backbone.pt (weights for timm), last.pt (to resume), log.jsonl, recon_<epoch>.png, run.json.
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
    strategy="sit",                 # what this script does; a row with another strategy is refused
    arch="vit_small_patch16_224",   # any timm vision transformer with a CLS token
    model_args={},                  # further arguments of timm.create_model, e.g. {"depth": 4}
    in_chans=1,                     # 1 or 3; grey images are repeated to 3
    img_size=224,                   # pixels
    mean=None, std=None,            # of pixels in 0..1; none: 0.485 / 0.229, in 3 channels ImageNet's
    init="random",                  # random | timm | timm:NAME | a checkpoint file
    init_key=None,                  # which weights of the file (teacher, student, ...); none: the usual one
    channel_adapt="average",        # 3 -> 1: average (as in the study) | sum; 1 -> 3: duplicate[_mean]
    dataset="mimic_cxr",            # folder below --data with the packed images
    samples=None,                   # use the first so many images of the split; none: all
    epochs=300, warmup_epochs=10,
    batch=256,                      # images an optimiser step, over all processes together
    lr=1e-4, min_lr=1e-6,           # peak for a batch of 256 (scaled by batch / 256) and end of the cosine
    wd=0.04, wd_end=0.04,           # weight decay; the released fork goes to 0.1 by a cosine
    clip=3.0,                       # largest gradient norm of each parameter tensor
    drop_path=0.1,                  # stochastic depth of the student
    seed=0,
    variant="corrected",            # stored with the weights; this script has no second face
    drop=0.5,                       # empty blocks cover a fraction U(min(0.5, drop), drop) of the image
    fill="zeros",                   # what they show: zeros, the mean grey | noise (as in GMML)
    replace=0.3,                    # half of the images: another image's pixels cover this fraction
    align=1,                        # blocks start and end on multiples of so many pixels
    crop_scale=[0.05, 1.0],         # area of the random resized crop
    hidden_dim=4096, out_dim=256,   # widths of the contrastive head
    temperature=0.2,                # of the contrastive softmax
    recon_weight=5.0,               # lambda: loss = contrast + lambda * recon; first publication: 1
    ema=0.996,                      # momentum of the teacher, by a cosine to 1
    export="teacher",               # whose backbone becomes backbone.pt: teacher | student
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


# --- begin copy: reconstruction head ---
class ReconstructionHead(nn.Module):
    """Three linear layers with GELU on every token, then one transposed convolution that paints its patch."""

    def __init__(self, dim, out_chans, patch_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())
        self.convTrans = nn.ConvTranspose2d(dim, out_chans, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens, grid_size):
        """tokens [B, N, D] in a grid [h, w] -> image [B, C, h * patch, w * patch]."""
        return self.convTrans(self.mlp(tokens).mT.unflatten(2, grid_size))
# --- end copy: reconstruction head ---


# --- begin copy: group masking ---
def n_blocks_for(fraction):
    """Blocks to draw so that `fraction` is reached: some 61 * -log(1 - fraction) do, this is 7 sd more."""
    return 62 * math.ceil((100 * -math.log(1 - fraction) + 25) / 62)


def block_masks(u, fraction, side, align=1):
    """Random blocks, one after the other, until the masked fraction of the image reaches its target.

    Top and left are uniform in [0, side - align), height and width in [align, 0.3 side), cut at the border.
    A block is small: painting a hundred of them on the CPU is cheaper than one pass over the image per block.

    Args: u uniform [B, K, 4] on the CPU; fraction: target of each image [B]; side, align: in pixels.
    Returns: bool [B, side, side], True = corrupted. Source: GMML (arXiv:2205.14986) and its released code.
    """
    begin = (u[..., :2] * (side - align)).floor()
    size = align + (u[..., 2:] * (int(0.3 * side) - align)).floor()
    if align > 1:
        begin, size = (begin / align).floor() * align, (size / align).round() * align
    boxes = torch.cat([begin, begin + size], 2).int().tolist()
    masks = np.zeros((len(u), side, side), bool)
    for mask, image_boxes, target in zip(masks, boxes, (fraction * side * side).tolist()):
        covered = 0
        for top, left, bottom, right in image_boxes:
            if covered >= target:
                break
            block = mask[top:bottom, left:right]
            covered += block.size - np.count_nonzero(block)
            block[:] = True
    return torch.from_numpy(masks)


def draw_masks(u, blocks, side, drop=0.75, replace=0.3, align=1):
    """Masks of GMML's two corruptions: every image is either dropped into or replaced, with equal chance.

    Args:
        u: uniform [B, 2]: replace if u[:, 0] < 0.5; u[:, 1]: where in min(0.5, drop)..drop the fraction lies.
        blocks: uniform [B, K, 4], K = n_blocks_for(the larger of drop and replace).
    Returns: masks bool [B, side, side], True = corrupted, and replaced bool [B].
    """
    replaced, least = u[:, 0] < 0.5, min(0.5, drop)
    fraction = torch.where(replaced, replace, least + (drop - least) * u[:, 1])
    return block_masks(blocks, fraction, side, align), replaced


def corrupt(clean, fill, masks):
    """Overwrite masked pixels by those of the same place in `fill`, noise or another image's view.

    Args: clean, fill float [B, C, S, S]; masks bool [B, S, S].
    """
    return torch.where(masks[:, None], fill, clean)


def masked_l1(recon, clean, masks):
    """Sum of absolute differences over masked pixels and channels: the loss times their number.

    Args: recon, clean float [B, C, S, S]; masks bool [B, S, S].
    """
    return ((recon.float() - clean).abs() * masks[:, None]).sum()


def plan_step(config, order, step, rank, world_size):
    """Which images a step needs and all its random numbers, drawn for the global batch; own rows are kept.

    Donor images of the replacement that belong to another process are gathered and cropped here again, which
    costs little and lets any number of processes do the same step.
    Returns: image indices [own, foreign donors of view 1, of view 2], one dict a view, the step.
    """
    generator = step_generator(config["seed"], step)
    batch, views = config["batch"], []
    own = torch.arange(rank, batch, world_size)
    needed = [own]
    n_blocks = n_blocks_for(max(config["drop"], config["replace"]))
    for _ in range(2):
        crop, colour, corruption, blocks = (torch.rand(batch, *shape, generator=generator)
                                            for shape in ([N_CROP], [N_COLOUR], [3], [n_blocks, 4]))
        masks, replaced = draw_masks(corruption[own], blocks[own], config["img_size"],
                                     config["drop"], config["replace"], config["align"])
        donors = (corruption[own[replaced], 2] * batch).long()
        foreign = donors % world_size != rank
        places = torch.where(foreign, len(own) - 1 + foreign.cumsum(0), donors // world_size)
        needed.append(donors[foreign])
        seen = torch.cat([own, donors[foreign]])
        views.append(dict(crop=crop[seen], colour=colour[seen], masks=masks,
                          replaced=replaced.nonzero()[:, 0], donors=places))
    begin = step % (len(order) // batch) * batch
    return order[begin:begin + batch][torch.cat(needed).numpy()], views, step


def augment(images, crop, colour, config):
    """The study's view: crop of area 0.05-1, flip, light jitter (p 0.3), light blur (p 0.1), normalised."""
    x = random_resized_crop(images, crop, config["crop_scale"], config["img_size"])
    x = colour_jitter(x, colour, strength=(0.1, 0.1, 0.1, 0.01), p=0.3)
    return normalise(gaussian_blur(x, colour[:, 9:], p=0.1), config)


def make_views(images, plan, config, rank, world_size, device):
    """Both views of a process's images: clean, corrupted [2B, C, S, S] and masks [2B, S, S]."""
    _, views, step = plan
    n = begin = len(views[0]["masks"])
    results = []
    for number, view in enumerate(views):
        end = begin + len(view["crop"]) - n
        foreign = images[begin:end]
        both = [*images[:n], *foreign] if isinstance(images, list) else torch.cat([images[:n], foreign])
        seen = augment(both, view["crop"], view["colour"], config)          # own images, then foreign donors
        clean = seen[:n]
        if config["fill"] == "noise":
            generator = step_generator(config["seed"], step, 1 + number, device)
            fill = torch.randn(config["batch"], *clean.shape[1:], device=device, generator=generator)
            fill = fill[rank::world_size]
        else:
            fill = torch.zeros_like(clean)
        masks = view["masks"].pin_memory() if device.type == "cuda" else view["masks"]      # some MB
        masks, replaced, donors = (part.to(device, non_blocking=True)
                                   for part in (masks, view["replaced"], view["donors"]))
        fill[replaced] = seen[donors]
        results.append((clean, corrupt(clean, fill, masks), masks))
        begin = end
    return (torch.cat(parts) for parts in zip(*results))
# --- end copy: group masking ---


# --- begin copy: reconstruction picture ---
def reconstruction_picture(clean, corrupted, recon, masks, config, path):
    """Rows of images: clean, corrupted, reconstructed, and the clean image restored in the masked places."""
    recon = recon.detach().float()
    rows = torch.cat([clean, corrupted, recon, torch.where(masks[:, None], recon, clean)], 2)  # [B, C, 4S, S]
    mean, std = (rows.new_tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    pixels = ((rows * std + mean) * 255).round().clamp(0, 255).byte().permute(2, 0, 3, 1).flatten(1, 2)
    image = Image.fromarray(pixels.expand(-1, -1, 3).cpu().numpy())
    write_atomic(path, lambda file: image.save(file, format="png"))
# --- end copy: reconstruction picture ---


class ContrastiveHead(nn.Sequential):
    """Three linear layers with batch norm, the last without affine: CLS features [B, D] -> [B, out_dim]."""

    def __init__(self, dim, hidden_dim=4096, out_dim=256):
        super().__init__(
            nn.Linear(dim, hidden_dim), SyncBatchNorm(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), SyncBatchNorm(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, out_dim), SyncBatchNorm(out_dim, affine=False))


class SiT(nn.Module):
    """Student or teacher: a timm vision transformer, a head on its CLS token and one on its patch tokens."""

    def __init__(self, backbone, in_chans, hidden_dim=4096, out_dim=256):
        super().__init__()
        self.backbone = backbone
        self.cls_head = ContrastiveHead(backbone.embed_dim, hidden_dim, out_dim)
        self.rec_head = ReconstructionHead(backbone.embed_dim, in_chans, backbone.patch_embed.patch_size[0])

    def embed(self, x):
        """x [B, C, S, S] -> embedding [B, out_dim], and the tokens [B, 1 + N, D] after the final norm."""
        tokens = self.backbone.forward_features(x)
        return self.cls_head(tokens[:, 0]), tokens

    def forward(self, x):
        """x [B, C, S, S] -> embedding [B, out_dim] and reconstruction [B, C, S, S]."""
        embedding, tokens = self.embed(x)
        patches = tokens[:, self.backbone.num_prefix_tokens:]
        return embedding, self.rec_head(patches, self.backbone.patch_embed.grid_size)


def contrast(student, keys, own, temperature):
    """Symmetric InfoNCE: each view's student embedding finds the teacher's of the other view; both summed.

    Args: student [2b, D], view 1 before view 2; keys: the teacher's of all processes, for each view [B, D];
    own: rows of the student's images in them, int64 [b]. No gradient goes to the keys.
    """
    first, second = student.chunk(2)
    return info_nce(first, keys[1], own, temperature) + info_nce(second, keys[0], own, temperature)


def train(config, args, rank, world_size, device):
    """Pre-train. All random numbers of a step depend on (seed, step) alone: a resumed run is the same run."""
    torch.manual_seed(config["seed"])
    backbone = make_model(config, 0, config["drop_path"])
    if getattr(backbone, "num_prefix_tokens", 0) == 0 or isinstance(backbone.norm, nn.Identity):
        fail(f"arch {config['arch']} is no vision transformer with a CLS token and a final norm")
    for key, known in (("export", ("teacher", "student")), ("fill", ("zeros", "noise"))):
        if config[key] not in known:
            fail(f"{key} is '{config[key]}'; expected {' or '.join(known)}")
    if config["img_size"] % backbone.patch_embed.patch_size[0]:
        fail(f"img_size {config['img_size']} is no multiple of patch {backbone.patch_embed.patch_size[0]}")
    drop_paths, note = take_drop_path(backbone), load_backbone(backbone, config)
    student = SiT(backbone, config["in_chans"], config["hidden_dim"], config["out_dim"]).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)                  # its batch norm: as the student's
    teacher.backbone.eval()                                                 # no stochastic depth
    groups = decay_groups(student)
    optimizer = torch.optim.AdamW(groups, lr=config["lr"], weight_decay=config["wd"], fused=True)
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
        restore(state, args.out, student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)
    progress = Progress(args.out, last_step, begun, config["batch"], rank == 0, state and state["meter"])
    if rank == 0:
        print(f"{note}; {sum(p.numel() for p in student.parameters()):,} parameters; {len(source):,} images; "
              f"steps {begun} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
        if begun < last_step:
            record_run(args.out, config, world_size, device)
    net = student
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    n_own = config["batch"] // world_size
    micro = args.micro_batch or n_own
    parts = [slice(begin, begin + micro) for begin in range(0, n_own, micro)]
    own = torch.arange(rank, config["batch"], world_size, device=device)    # places in the global batch
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
            chosen = teacher if config["export"] == "teacher" else student
            weights = {name: value.cpu() for name, value in chosen.backbone.state_dict().items()}
            save_atomic(dict(model=weights, **{key: config[key] for key in (
                "arch", "model_args", "in_chans", "img_size", "mean", "std")}, **facts), out / "backbone.pt")
        save_atomic(dict(student=student.state_dict(), teacher=teacher.state_dict(),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         meter=progress.meter(), **facts), out / "last.pt")

    for plan, images in source.prefetch(plans()):
        step = plan[-1]
        lr = cosine(step, n_steps, config["lr"], config["min_lr"], n_warm) * config["batch"] / 256
        wd = cosine(step, n_steps, config["wd"], config["wd_end"])
        for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
            group.update(lr=lr, weight_decay=decay)

        torch.manual_seed(step_generator(config["seed"], step, 4 + rank).initial_seed())  # dropout, if any
        depth = torch.rand(2, config["batch"], len(drop_paths),
                           generator=step_generator(config["seed"], step, 3))
        depth = depth[:, rank::world_size].to(device, non_blocking=True)
        views = make_views(images, plan, config, rank, world_size, device)
        clean, corrupted, masks = (x.unflatten(0, (2, n_own)) for x in views)       # [2, b, ...]: by view
        n_masked = mean_over_processes(masks.sum().double()) * clean.shape[2]
        with torch.no_grad(), amp():
            outputs = [teacher.embed(clean[:, part].flatten(0, 1)) for part in parts]
        keys = zip(*(embedding.float().chunk(2) for embedding, _ in outputs))
        keys = [gather_rows(torch.cat(view), world_size) for view in keys]                  # two of [B, D]
        contrast_loss, recon_loss = torch.zeros(2, device=device)
        optimizer.zero_grad()
        for part in parts:
            x, target, masked, depth_part = (
                views[:, part].flatten(0, 1) for views in (corrupted, clean, masks, depth))
            set_drop_path(drop_paths, depth_part)
            with contextlib.nullcontext() if part is parts[-1] or world_size == 1 else net.no_sync():
                with amp():
                    embedding, recon = net(x)
                part_contrast = contrast(embedding, keys, own[part], config["temperature"])
                part_contrast = part_contrast * len(own[part]) / n_own
                # a sum over the mean count of all processes: averaged by DDP it is the global mean
                part_recon = masked_l1(recon, target, masked) / n_masked
                scaler.scale(part_contrast + config["recon_weight"] * part_recon).backward()
            contrast_loss += part_contrast.detach()
            recon_loss += part_recon.detach()
        scaler.unscale_(optimizer)
        clip_each(student.parameters(), config["clip"])
        scaler.step(optimizer)
        scaler.update()
        update_teacher(teacher, student, cosine(step, n_steps, config["ema"], 1.0))
        contrast_loss, recon_loss = mean_over_processes(torch.stack([contrast_loss, recon_loss]))
        cls = torch.cat([tokens[:, 0] for _, tokens in outputs])
        progress.add(loss=contrast_loss + config["recon_weight"] * recon_loss, contrast=contrast_loss,
                     recon=recon_loss, feature_std=feature_std(cls))

        done, epoch_ends = step + 1, (step + 1) % steps_an_epoch == 0
        if done % args.log_steps == 0 or done == last_step:
            progress.line(done, step // steps_an_epoch + 1, lr=lr, wd=wd)
        epoch = math.ceil(done / steps_an_epoch)
        if rank == 0 and (epoch_ends and epoch % args.picture_epochs == 0 or done == last_step):
            student.eval()
            with torch.no_grad():
                recon = student(corrupted[0, :8])[1]
            student.train()
            picture = out / f"recon_{epoch:04}.png"
            reconstruction_picture(clean[0, :8], corrupted[0, :8], recon, masks[0, :8], config, picture)
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
