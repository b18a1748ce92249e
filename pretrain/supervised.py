"""Supervised pre-training: a network learns the labels of its dataset and is exported without its classifier.

With one column a label (MIMIC-CXR's 14 findings) it minimises binary cross-entropy, uncertain and blank cells
counting as negative ("U-zeros" of Irvin et al., "CheXpert", arXiv:1901.07031); where every image has exactly
one class (ImageNet) it minimises cross-entropy. The study does not state its optimiser and augmentation: here
the optimiser is that of its self-supervised arms, the augmentation that of its fine-tuning.

    torchrun --nproc_per_node=4 pretrain/supervised.py --exp 2.4      one row of experiments.yaml on 4 GPUs
    python pretrain/supervised.py --manifest my/manifest.csv --split all --out my/run    your own images
    python pretrain/supervised.py --dataset imagenet --arch resnet50 --in_chans 3

Reads   manifest.csv and images.npy beside it (without it the 8-bit PNG and JPEG files named in `path`).
Writes  --out: backbone.pt (weights for timm), last.pt (to resume), log.jsonl.
The same command resumes a run that was killed; SIGTERM saves and exits with code 75.
"""

import argparse
import contextlib
import csv
import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import yaml

DEFAULTS = dict(                    # keys of a row; comments are the help, with a | b in front the choices
    strategy="supervised",          # the method of this script; a row of another strategy is refused
    arch="vit_small_patch16_224",   # any timm model, resnet50 too
    model_args={},                  # arguments of timm.create_model; of a DenseNet {"drop_path_rate": null}
    in_chans=1,                     # 1 | 3; channels of the input; grey images are repeated to 3
    img_size=224,                   # side of the network's input in pixels
    mean=None,                      # mean of pixels in 0..1, one or one a channel; none: ImageNet, grey 0.485
    std=None,                       # standard deviation, likewise; none: ImageNet, grey 0.229
    init="random",                  # random | timm[:NAME] | torchvision[:NAME] | exp:KEY | a checkpoint file
    init_key="",                    # load only names with this in them, as student; none: of several the EMA
    channel_adapt="average",        # average | sum | duplicate | duplicate_mean; first layer 3 to 1, 1 to 3
    dataset="mimic_cxr",            # folder below --data with manifest.csv and images.npy
    samples=0,                      # use only this many images, the first of the split; 0: all
    task="auto",                    # auto | multilabel | classes; auto: classes in a column or one 1 a row
    epochs=1000,                    # passes over the images
    warmup_epochs=10,               # epochs of linear warm-up of the learning rate from 0
    batch=256,                      # images per optimiser step, all processes together
    lr=1e-4,                        # peak for a batch of 256, scaled by batch / 256
    min_lr=1e-6,                    # learning rate at the end of the cosine, scaled likewise
    wd=0.04,                        # weight decay at the start
    wd_end=0.04,                    # weight decay at the end, by a cosine
    clip=3.0,                       # largest gradient norm of each parameter tensor; 0: no clipping
    drop_path=0.1,                  # stochastic depth of the last block, linear from 0
    seed=0,                         # of all random numbers
    variant="corrected",            # corrected | paper; paper validates on the first training images
    crop_scale=[0.08, 1.0],         # area of the random resized crop, range of fractions
    rotation=7.0,                   # degrees, either way
    val_samples=5000,               # validation images, spread over split val; none there: no validation
    val_epochs=10,                  # validate every so many epochs; the last epoch's weights are exported
)
FLAGS = dict(                       # of the command line only, not of a row
    exp="",                         # row of experiments.yaml, as in 2.4; none: the defaults
    experiments="",                 # file of the rows; none: the experiments.yaml above this script
    miniature=False,                # override the row by the block `miniature` of that file
    data="data",                    # folder of the packed datasets
    manifest="",                    # manifest.csv of the images; none: <data>/<dataset>/manifest.csv
    split="pretrain",               # splits to use, comma-separated, or all
    out="",                         # run folder; none: runs/<exp>/pretrain or runs/<strategy>
    device="",                      # cpu | cuda; default cuda where there is one
    steps=0,                        # stop after this many steps of the schedule; 0: all steps
    resume="auto",                  # auto | never; auto: from last.pt, if any; for changed code take never
    micro_batch=0,                  # images per pass and process, gradients accumulate; 0: all at once
    log_steps=50,                   # steps between two lines of the log; 0: only validation's and the last
    save_minutes=10.0,              # minutes between two writes of last.pt
    compile=False,                  # torch.compile the network; the first step takes minutes
)

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --- begin copy: flags ---
def typed(default):
    """A type for argparse from a flag's default value: text, a number of 0 or more, or what YAML reads."""
    kind = type(default)

    def read(text):
        try:
            value = kind(text) if kind in (str, float) else yaml.safe_load(text)
        except yaml.YAMLError as problem:
            raise ValueError from problem                                   # argparse expects it
        if default is not None and type(value) is not kind or kind in (int, float) and not value >= 0:
            raise ValueError
        if kind is list:                                                    # all are ranges of fractions
            low, high = value
            if not 0 < low <= high <= 1:
                raise ValueError
        return value
    read.__name__ = kind.__name__
    return read
# --- end copy: flags ---


# --- begin copy: options ---
def read_row(file, exp, section, miniature):
    """A row of experiments.yaml as flags: `defaults`, the row, the miniature, each with its `section`."""
    try:
        table = yaml.safe_load(Path(file).read_text())
        if exp not in table:
            near = difflib.get_close_matches(exp, map(str, table)) or ["none"]
            fail(f'{file} has no row "{exp}" (keys stand in quotes); nearest: {", ".join(near)}')
        layers = [table["defaults"], table[exp]]
        if miniature:
            strategy = table[exp].get("pretrain", {}).get("strategy")
            layers += [table["miniature"], table.get(f"miniature.{strategy}", {})]
        row = {"strategy": "none"} if section == "pretrain" else {}
        for layer in layers:
            row |= layer | layer.get(section, {})
    except Exception as problem:
        fail(f"cannot read {file}: {' '.join(str(problem).split())}")
    text = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [f"--{key}={text(value)}" for key, value in row.items()
            if key not in ("about", "pretrain", "finetune")]


def options(section):
    """All flags (args) and the keys of a row (config): command line over row of --exp over DEFAULTS."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False,
                                     usage="%(prog)s [--KEY VALUE]...")
    helps = dict(re.findall(r"^    (\w+)=[^#\n]*#? ?(.*)$", Path(__file__).read_text(), re.M))
    for key, default in (FLAGS | DEFAULTS).items():
        listed = re.match(r"\w+( \| \w+)+(?=;|$)", helps[key])              # a comment may begin with choices
        choices = [typed(default)(word) for word in listed[0].split(" | ")] if listed else None
        if key == "strategy":
            choices = [default]                                             # the one this script does
        switch = dict(nargs="?", const=True) if isinstance(default, bool) else {}
        parser.add_argument(f"--{key}", type=typed(default), default=default, choices=choices,
                            help=f"{helps[key]} [{default}]", **switch)
    parser.error = fail
    underscored = lambda name: name[0].replace("-", "_")
    flags = [re.sub("(?<=^--)[^=]+", underscored, word) for word in sys.argv[1:]]
    args, unknown = parser.parse_known_args(flags)
    if args.exp and not unknown:
        file = args.experiments or Path(__file__).resolve().parents[1] / "experiments.yaml"
        parser.error = lambda message: fail(f"{file} row {args.exp}: {message}")
        args, unknown = parser.parse_known_args(read_row(file, args.exp, section, args.miniature) + flags)
    for word in unknown:
        name = word[2:].split("=")[0]
        near = difflib.get_close_matches(name, vars(args), 1) or ["none"]
        parser.error(f"unknown {word}; nearest: {near[0]} (a flag takes one value)")
    return args, {"exp": args.exp or None, **{key: getattr(args, key) for key in DEFAULTS}}
# --- end copy: options ---


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take seconds
    options("pretrain")

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import distributed as dist, nn
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale


def augment(images, u, config):
    """The views of fine-tuning: bilinear crop of area crop_scale, flip, rotation, normalised.

    images uint8 [B, C, H, W] or a list of [C, H, W]; u uniform [B, >= N_CROP + 1].
    """
    x = random_resized_crop(images, u, config["crop_scale"], config["img_size"], cubic=False)
    x = normalise(rotate(x, u[:, N_CROP], config["rotation"]), config)
    return x.contiguous(memory_format=torch.channels_last)    # the faster layout for convolutions


def label_loss(logits, targets):
    """Mean binary cross-entropy of labels (targets float [B, L]) or cross-entropy of classes (int [B])."""
    if targets.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def scores(logits, targets):
    """Loss, and accuracy of classes or the mean AUC of those labels that have positives and negatives."""
    from sklearn.metrics import roc_auc_score
    loss = label_loss(logits, targets).item()
    if targets.ndim == 1:
        return dict(val_loss=loss, val_accuracy=(logits.argmax(1) == targets).float().mean().item())
    aucs = [roc_auc_score(truth, score) for truth, score in zip(targets.T, logits.T) if 0 < truth.mean() < 1]
    return dict(val_loss=loss, val_auc=float(np.mean(aucs))) if aucs else dict(val_loss=loss)


def read_rows(manifest, split, config):
    """Rows to train on and, behind them, to validate on: {column: texts}; and how many the former are.

    Validated are rows spread over split `val`, as they may lie class by class; variant paper: the first of
    the training images, as in the released loader.
    """
    rows = read_manifest(manifest, split, config["samples"])
    val = rows
    if config["variant"] != "paper":
        val = read_manifest(manifest)
        places = [place for place, name in enumerate(val.get("split", ())) if name == "val"]
        n_val = min(len(places), config["val_samples"])
        spread = [places[number * len(places) // n_val] for number in range(n_val)]
        val = {name: [cells[place] for place in spread] for name, cells in val.items()}
    both = {name: cells + val[name][:config["val_samples"]] for name, cells in rows.items()}
    return both, len(rows["path"])


def read_targets(manifest, rows, task):
    """The targets of manifest rows, and the names of the labels or classes.

    A single label column holds the class; several hold 1, 0, -1 (uncertain) or blank. Task "auto" takes
    columns with exactly one 1 in every row for classes.
    Returns: float32 [N, L] with uncertain and blank as 0 (multilabel), or int64 [N] (classes).
    """
    labels = [name for name in rows if name not in FACTS]
    if not labels:
        fail(f"{manifest} has no label column; supervised pre-training needs labels")
    cells = rows[labels[0]]
    where = f"in column '{labels[0]}' (1, 0, -1 and blank of a label: --task multilabel)"
    if len(labels) == 1 and (task == "classes" or task == "auto" and not {"-1", "-1.0"} & {*cells}):
        if "" in cells:
            fail(f"{manifest} row {rows['row'][cells.index('')]}: no class {where}")
        names = sorted(set(cells), key=lambda name: (len(name), name))      # numbers in numeric order
        if len(names) < 2:
            fail(f"{manifest} has the one class '{names[0]}' {where}")
        numbers = {name: number for number, name in enumerate(names)}
        return torch.tensor([numbers[cell] for cell in cells]), names
    values, _ = read_labels(manifest, rows, labels)
    odd = (values.sum(1) != 1).nonzero()[:1, 0]                             # up to one row without a single 1
    if task == "multilabel" or task == "auto" and len(odd):
        return values, labels
    for place in odd:
        fail(f"{manifest} row {rows['row'][place]}: task=classes needs exactly one label that is 1")
    return values.argmax(1), labels


def check_targets(manifest, rows, labels, targets, n_images):
    """Warn of images in training and validation; say how many unknown labels count as negative."""
    both = {*rows["path"][:n_images]} & {*rows["path"][n_images:]}
    if both:
        print(f"warning: {len(both):,} images are in training and in validation", file=sys.stderr)
    if targets.ndim == 2:
        _, certain = read_labels(manifest, rows, labels, "ignore", "ignore")
        n_guessed = (certain[:n_images] == 0).sum()
        if n_guessed:
            print(f"note: {n_guessed:,} uncertain or blank training labels count as 0")


def train(config, args, rank, world_size, device):
    """Pre-train. Random numbers of a step depend on (seed, step) only, so a resumed run is the same run."""
    rows, n_images = read_rows(args.manifest, args.split, config)
    targets, labels = read_targets(args.manifest, rows, config["task"])
    images = open_images(args.manifest, rows["path"], config["in_chans"], device)
    n_val, batch = len(targets) - n_images, config["batch"]
    val_targets, targets = targets[n_images:], targets[:n_images].to(device)
    steps_an_epoch = n_images // batch if batch else 0
    n_steps, n_warm = config["epochs"] * steps_an_epoch, config["warmup_epochs"] * steps_an_epoch
    if batch % world_size or not n_steps:
        fail(f"--batch {batch} has to be at most the {n_images} images and a multiple of the processes, "
             f"{world_size}; --epochs at least 1")
    last_step = min(n_steps, args.steps or n_steps)

    def val_views(places):
        return normalise(resize(images(places + n_images), config["img_size"]), config)

    torch.manual_seed(config["seed"])
    model = make_model(config, len(labels))
    drop_paths, note = replace_drop_path(model), load_backbone(model, config)
    model.to(device, memory_format=torch.channels_last)
    if world_size > 1 and device.type == "cuda":    # on CPUs each process normalises by its own share
        model = timm.layers.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    optimizer = torch.optim.AdamW(decay_groups(model), fused=True)          # lr, wd: in each step
    amp, scaler = mixed_precision(device)
    meter = torch.zeros(2, device=device)                                   # sum of the losses, steps
    state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    first_step = open_run(args.out, [args.manifest], config, state, args.resume, rank)
    if rank == 0:
        check_targets(args.manifest, rows, labels, targets, n_images)
        kind = "labels" if targets.ndim == 2 else "classes"
        print(json.dumps(config))
        print(f"{note}; {sum(p.numel() for p in model.parameters()):,} parameters; {len(labels)} {kind}; "
              f"{n_images:,} images, {n_val:,} to validate; "
              f"steps {first_step} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
        if n_warm >= n_steps:
            print("warning: the run ends within its warm-up (--warmup_epochs)", file=sys.stderr)
    net = model                     # what the loop calls; of several processes DDP, which averages gradients
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    local = np.split(np.arange(batch), world_size)[rank]                    # own places in the batch
    micro = args.micro_batch or len(local)
    stop_asked = catch_sigterm()
    started = saved = time.monotonic()

    for step in range(first_step, last_step):
        epoch, number = divmod(step, steps_an_epoch)
        lr = cosine(step, n_steps, config["lr"], config["min_lr"], n_warm) * batch / 256
        wd = cosine(step, n_steps, config["wd"], config["wd_end"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = wd                      # group 1: 0, see decay_groups

        if number == 0 or step == first_step:
            order = np.random.default_rng([config["seed"], epoch]).permutation(n_images)
        places = order[number * batch + local]
        torch.manual_seed(step_seed(config["seed"], step))                  # dropout's seed, too
        draw = lambda n: send(torch.rand(batch, n)[local], device)
        u, depth = draw(N_CROP + 1), draw(len(drop_paths))
        views = augment(images(places), u, config)
        truth = targets[send(torch.from_numpy(places), device)]

        loss = 0                    # parts of the batch's mean, to be added over passes and processes
        optimizer.zero_grad()
        for begin in range(0, len(local), micro):
            part = slice(begin, begin + micro)
            set_drop_path(drop_paths, depth[part])
            net.require_backward_grad_sync = begin + micro >= len(local)    # DDP: only after the last pass
            with amp:
                logits = net(views[part])
            part_loss = label_loss(logits.float(), truth[part]) * len(logits) / batch       # its share
            scaler.scale(part_loss * world_size).backward()                 # DDP averages over processes
            loss += part_loss.detach()
        scaler.unscale_(optimizer)
        clip_each(model.parameters(), config["clip"])
        scaler.step(optimizer)
        scaler.update()
        meter[0] += sum_over_processes(loss)
        meter[1] += 1

        done, stopping, scored = step + 1, stop_asked(), {}
        ending, val_steps = done == last_step, config["val_epochs"] * steps_an_epoch
        if n_val and (ending or val_steps and done % val_steps == 0):
            model.eval()
            outputs = forward_all(model, val_views, n_val, len(labels), batch, rank, world_size)
            model.train()
            stop_if_nan([outputs], done, args.out)
            scored = scores(outputs, val_targets)
        if args.log_steps and done % args.log_steps == 0 or ending or scored:
            seconds = (time.monotonic() - started) / (done - first_step)        # a step
            log_line(args.out, rank, (last_step - done) * seconds, step=done, epoch=epoch + 1,
                     loss=(meter[0] / meter[1]).item(), lr=lr, wd=wd, **scored,
                     img_per_s=round(batch / seconds, 1))
            meter.zero_()
        if rank == 0 and (stopping or time.monotonic() - saved > 60 * args.save_minutes):
            save_run(args.out, done, config, state, epoch=done // steps_an_epoch)
            saved = time.monotonic()
        if stopping and not ending:
            sys.exit(75)                # EX_TEMPFAIL: run the same command again
    if rank == 0:
        done = max(first_step, last_step)                                   # a finished run exports again
        backbone = {name: value for name, value in model.state_dict().items()
                    if not name.startswith(prefixes(model, "classifier"))}
        save_run(args.out, done, config, state, backbone, classes=labels, epoch=done // steps_an_epoch)


def main():
    args, config = options("pretrain")
    config = {**fill_defaults(config), "split": args.split}                 # part of what a resume compares
    args.manifest = args.manifest or f"{args.data}/{config['dataset']}/manifest.csv"
    args.out = args.out or f"runs/{args.exp + '/pretrain' if args.exp else config['strategy']}"
    rank, world_size, device = init_processes(args.device)
    try:
        train(config, args, rank, world_size, device)
    except torch.cuda.OutOfMemoryError:
        micro = args.micro_batch or config["batch"] // world_size
        fail(f"GPU memory is too small for {micro} images per pass; try --micro-batch {max(1, micro // 2)} "
             "or a smaller --batch")
    finally:
        end_processes()


# ------------------------------------------------------------------------------------- shared by all scripts

# --- begin copy: reading ---
@contextlib.contextmanager
def or_fail(doing):
    """Turn an exception about a user's file or value into one sentence: cannot <doing>: <reason>."""
    try:
        yield
    except Exception as problem:
        text = " ".join(str(getattr(problem, "strerror", None) or problem).split())
        if "weights_only" in text:                                          # torch.load's long message
            what = re.search(r"GLOBAL [\w.]+|$", text)[0]
            text = (f"{what or 'its content'} is not a tensor; if you trust the file, load it with "
                    "weights_only=False and save its state_dict alone")
        fail(f"cannot {doing}: {text[:300] or type(problem).__name__}")
# --- end copy: reading ---


# --- begin copy: processes ---
def init_processes(device):
    """Join the processes that torchrun started (plain python is one); returns rank, world size, device."""
    device = torch.device(device or ("cuda" if torch.cuda.device_count() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        with or_fail(f"use {device} of {torch.cuda.device_count()} GPUs (--nproc_per_node, --device)"):
            torch.cuda.set_device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device
    # DDP warns about the strides of a kernel of one channel, harmlessly
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with or_fail("join the processes of torchrun"):
        store, rank, world_size = next(dist.rendezvous("env://"))
        # after a restart (torchrun --max-restarts) the store still holds old addresses, and nodes may count
        # restarts differently: a prefix of new random words, on which all have to agree
        store.set(str(rank), os.urandom(8).hex())
        ranks, agreed = [*map(str, range(world_size))], False
        while not agreed:
            words = str(store.multi_get(ranks))
            store.set(words + str(rank), "")
            agreed = store.check([words + other for other in ranks])
            time.sleep(0.1)
        store = dist.PrefixStore(words, store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"        # gloo: no wait for GPUs
        wait = timedelta(hours=12)                                          # while one probes or saves
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    return rank, world_size, device


def sum_over_processes(x):
    """The sum of a tensor over all processes, in its place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def catch_sigterm():
    """A function, to call in all processes: has any of them got SIGTERM or lost its torchrun? -> bool"""
    asked, launcher = [], os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    orphan = lambda: "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher
    return lambda: sum_over_processes(torch.tensor(len(asked) + orphan())).item() > 0


def end_processes():
    """In a `finally`: leave the process group; after an error at once, or NCCL would wait for the others."""
    error = sys.exception()
    code = getattr(error, "code", 1) if error else 0
    if dist.is_initialized() and code in (0, 75):
        sum_over_processes(torch.zeros(1))      # wait for the one that saves: an exit code 75 ends them all
        time.sleep(0.1)                         # gloo's threads let go of tensors, or torch <= 2.10 may hang
        dist.destroy_process_group()
    elif dist.is_initialized():
        dead = "by peer|Broken pipe|remote process"                         # another process has ended
        if not (isinstance(error, SystemExit) or re.search(dead, str(error))):
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)
# --- end copy: processes ---


# --- begin copy: mixed precision ---
def mixed_precision(device):
    """(autocast, loss scaler): on a GPU bf16, or fp16 and scaling where bf16 is not native; fp32 on a CPU."""
    cuda = device.type == "cuda"
    bf16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    amp = torch.autocast(device.type, torch.bfloat16 if bf16 else torch.float16, enabled=cuda)
    return amp, torch.amp.GradScaler(device.type, enabled=not bf16)
# --- end copy: mixed precision ---


# --- begin copy: manifest ---
def read_manifest(manifest, split="all", samples=0):
    """The first `samples` rows of some splits (names with commas, or all) of a manifest.csv.

    Returns: {column: list of texts}; a further column, row, has their numbers in the file, whose header is 1.
    """
    with or_fail(f"read the manifest {manifest}"):
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = list(reader)
        if "path" not in header or "" in header or len({*header}) < len(header):
            raise ValueError("it needs columns with different names, one of them path, and commas between "
                             f"them; it has {', '.join(header)}")
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has another number of cells than the header, {len(header)}")
            row["row"] = number
        names = {*split.split(",")}
        if "all" not in names and "split" in header:
            splits = {row["split"] for row in rows}
            for name in names - splits:
                raise ValueError(f"no row is of split {name!r}; there are {', '.join(sorted(splits))}")
            rows = [row for row in rows if row["split"] in names]
        if len(rows) < (samples or 1):
            raise ValueError(f"{len(rows)} rows of split {split}, {samples or 1} are needed (what "
                             "packing left out is in rejected.csv beside it)")
    return {name: [row[name] for row in rows[:samples or None]] for name in rows[0]}


def read_pack(manifest):
    """What the pack.json beside a manifest says, {} where there is none."""
    file = Path(manifest).with_name("pack.json")
    with or_fail(f"read {file}"):
        return {**json.loads(file.read_text())} if file.is_file() else {}      # of a list: an error
# --- end copy: manifest ---


# --- begin copy: send ---
def send(x, device):
    """A tensor on the device, from pinned memory: other copies wait for all the work a GPU has queued."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
# --- end copy: send ---


# --- begin copy: images ---
def open_images(manifest, paths, in_chans, device):
    """A function from an array of places among the paths [B] to images, uint8 [B, C, H, W] on the device.

    They come from images.npy beside the manifest, whose rows are those of manifest.csv there, held in GPU
    memory if they fit a third of it. Without images.npy the 8-bit PNG and JPEG files themselves are decoded,
    into a list as they may differ in size.
    """
    folder, facts = Path(manifest).parent, read_pack(manifest)
    file, own = folder / "images.npy", folder / "manifest.csv"
    if not file.is_file():
        root = Path(facts.get("raw") or folder)
        absent = [path for path in paths if not Path(root, path).is_file()]
        if absent:
            fail(f"{len(absent):,} of {len(paths):,} images of {manifest} are not there, the first is "
                 f"{root / absent[0]}; paths count from {root}")
        pool, mode = ThreadPoolExecutor(8), "L" if in_chans == 1 else "RGB"

        def read(place):
            path = root / paths[place]
            try:
                image = Image.open(path, formats=["PNG", "JPEG"])
                if image.mode[0] in "IF":
                    raise ValueError(f"its mode is {image.mode}")
                return pil_to_tensor(image.convert(mode)).to(device)
            except Exception as problem:
                raise ValueError(f"{path}: {problem}") from problem

        def read_all(places):
            with or_fail("read an 8-bit PNG or JPEG (data_prep/pack.py packs others)"):
                return list(pool.map(read, places))
        return read_all

    packed_paths = read_manifest(own)["path"]
    number_of = {path: number for number, path in enumerate(packed_paths)}
    order = hashlib.sha256("".join(path + "\n" for path in packed_paths).encode()).hexdigest()
    with or_fail(f"read {file}; rename {own} to keep it, or remove it, and pack the dataset again"):
        packed = np.load(file, mmap_mode="r")
        n, *sides = packed.shape
        matched = n == len(packed_paths) == len(number_of) and order == facts.get("order", order)
        if packed.dtype != np.uint8 or len(sides) != 2 and sides[2:] != [3] or not matched:
            raise ValueError(f"{packed.dtype} {(n, *sides)} are not the images of {own} in its order, "
                             f"{len(packed_paths)} rows of {len(number_of)} paths")
    with or_fail(f"find an image of {manifest} in {own}, whose images {file} holds"):
        numbers = np.array([number_of[path] for path in paths])
    packed = packed.reshape(*packed.shape[:3], -1).transpose(0, 3, 1, 2)
    read_all = lambda places: send(torch.from_numpy(packed[numbers[places]]), device)
    n_bytes = len(numbers) * packed[0].size
    if device.type == "cpu" or n_bytes > torch.cuda.mem_get_info()[0] // 3:     # the rest is to train
        return read_all
    held = torch.cat([read_all(slice(begin, begin + 4096))                  # host memory for a part at a time
                      for begin in range(0, len(numbers), 4096)])
    return lambda places: held[send(torch.from_numpy(places), device)]
# --- end copy: images ---


# --- begin copy: random ---
def step_seed(*numbers):
    """A seed made from (seed, step): any number of processes and any resume draw the same numbers."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64).item()
# --- end copy: random ---


# --- begin copy: label columns ---
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race", "row"]           # no labels


def read_labels(manifest, rows, columns, uncertain="zeros", blank="zero"):
    """Label columns of manifest rows: values 0 or 1 and whether they count, float32 [N, K] each.

    Cells are 1, 0, -1 (uncertain: zeros, ones or ignore) or blank (zero or ignore), or the run ends.
    """
    policy = {"zeros": 0, "zero": 0, "ones": 1, "ignore": 2}
    codes = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": policy[blank]}
    codes["-1"] = codes["-1.0"] = policy[uncertain]
    table = np.array([[codes.get(cell, 3) for cell in rows[column]] for column in columns])
    for column, place in np.argwhere(table == 3)[:1]:
        name = columns[column]
        fail(f"{manifest} row {rows['row'][place]}: label '{name}' is '{rows[name][place]}'; "
             "expected 1, 0, -1 or blank")
    table = torch.from_numpy(table).T
    return (table == 1).float(), (table < 2).float()
# --- end copy: label columns ---


# --- begin copy: crop ---
N_CROP = 23     # uniforms of a random resized crop: 10 areas, 10 aspect ratios, top, left, flip


def crop_boxes(u, height, width, scale):
    """Boxes of a random resized crop: the first of ten tries that fits, else the first try cut to the image.

    Args: u uniform [B, >= 22]; scale: least and largest area as fractions.
    Returns: (top, height) and (left, width), each [B], in pixels. torchvision differs after ten tries that do
    not fit: it takes a central box.
    """
    low, high = scale
    area = height * width * (low + u[:, :10] * (high - low))
    ratio = (4 / 3) ** (1 - 2 * u[:, 10:20])                                # height / width, 3/4 to 4/3
    heights = (area * ratio).sqrt().round()
    widths = (area / ratio).sqrt().round()
    fits = (heights <= height) & (widths <= width)
    first = fits.int().argmax(1, keepdim=True)

    def box(tries, side, place):
        length = tries.gather(1, first)[:, 0].clamp(1, side)
        return ((side - length + 1) * place).floor(), length
    return box(heights, height, u[:, 20]), box(widths, width, u[:, 21])


def resample_matrix(begin, length, in_size, out_size, cubic):
    """Pillow's antialiased resampling of [begin, begin + length), both [B], as a matrix [B, out, in]."""
    begin, length = begin[:, None, None], length[:, None, None]
    scale = length / out_size                                               # source pixels a target pixel
    pixels = torch.arange(in_size, device=begin.device)
    targets = torch.arange(out_size, device=begin.device)[:, None]
    distance = pixels + 0.5 - begin - scale * (targets + 0.5)
    t = (distance / scale.clamp_min(1)).abs().clamp_max(2)                  # [B, out, in]
    weights = (1 - t).clamp_min(0)
    if cubic:
        weights = (1 - t) * (2 - t) ** 2 / 2 + weights ** 2 * (2 * t - 1)   # Keys' kernel with a = -0.5
    weights = weights * ((pixels >= begin) & (pixels < begin + length))
    return weights / weights.sum(2, keepdim=True)


def random_resized_crop(images, u, scale, size, cubic=True):
    """Cut, resize to size x size and mirror each image as torchvision does, by one matrix per axis.

    Args: images uint8 [B, C, H, W] or a list of [C, H, W]; u uniform [B, >= N_CROP]; scale: see crop_boxes.
    Returns: float [B, C, size, size], 0-255.
    """
    if isinstance(images, list):
        return torch.cat([random_resized_crop(image[None], row[None], scale, size, cubic)
                          for image, row in zip(images, u)])
    height, width = images.shape[2:]
    vertical, horizontal = crop_boxes(u, height, width, scale)
    rows = resample_matrix(*vertical, height, size, cubic)[:, None]
    columns = resample_matrix(*horizontal, width, size, cubic)[:, None]
    x = (rows @ images.float() @ columns.mT).clamp_(0, 255)
    return torch.where(u[:, 22, None, None, None] < 0.5, x.flip(3), x)
# --- end copy: crop ---


# --- begin copy: rotation ---
def rotate(x, u, degrees):
    """Turn x float [B, C, S, S] by U(-degrees, degrees), u uniform [B]: nearest pixel, black outside."""
    angle = torch.deg2rad((2 * u - 1) * degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, x.shape, align_corners=False), "nearest", align_corners=False)
# --- end copy: rotation ---


# --- begin copy: resize ---
def resize(images, size):
    """Stretch uint8 [B, C, H, W], or a list of [C, H, W], to float [B, C, size, size] (Pillow's bilinear)."""
    if isinstance(images, list):
        return torch.cat([resize(image[None], size) for image in images])
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
# --- end copy: resize ---


# --- begin copy: normalise ---
def fill_defaults(config):
    """The config with one mean and sd a channel; an image size among model_args replaces img_size."""
    n, size = config["in_chans"], config["model_args"].get("img_size", config["img_size"])
    config = {**config, "img_size": size}
    imagenet = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    for key, default in zip(("mean", "std"), imagenet):
        with or_fail(f"use {key} {config[key]}, one number or {n} of pixels in 0..1"):
            given = default[:n] if config[key] is None else config[key]
            config[key] = np.broadcast_to(given, n).astype(float).tolist()
            if max(config[key]) > 1:
                raise ValueError("above 1")
    return config


def normalise(x, config):
    """Pixels 0-255 [B, 1 or 3, H, W] to the network's input [B, in_chans, H, W]; grey is repeated."""
    stats = send(torch.tensor([config["mean"], config["std"]]), x.device)
    mean, std = stats[..., None, None]
    x = rgb_to_grayscale(x) if config["in_chans"] == 1 else x
    return (x / 255 - mean) / std
# --- end copy: normalise ---


# --- begin copy: model ---
def make_model(config, num_classes):
    """The timm model that a row or a checkpoint describes; transformers are made for its image size."""
    arch = config["arch"]
    with or_fail(f"make {arch} with model_args {config['model_args']} (null leaves one out)"):
        fixed = getattr(timm.get_pretrained_cfg(arch), "fixed_input_size", False)
        args = {"drop_path_rate": config.get("drop_path"), "img_size": config["img_size"] if fixed else None,
                **config["model_args"]}                                     # timm leaves out what is None
        model = timm.create_model(arch, in_chans=config["in_chans"], num_classes=num_classes, **args)
        patches = getattr(model, "patch_embed", None)
        if isinstance(patches, timm.layers.PatchEmbed) and config["img_size"] % patches.patch_size[0]:
            raise ValueError(f"img_size {config['img_size']} is no multiple of the patches, "
                             f"{patches.patch_size}")
        return model


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382) from given draws: the same on any number of processes."""

    def forward(self, x):
        if not self.training:
            return x
        kept = self.kept.repeat_interleave(len(x) // len(self.kept))        # MobileViT has rows of patches
        kept = kept.view(-1, *[1] * (x.ndim - 1))
        return x * kept.to(x.dtype)


def replace_drop_path(model):
    """Make timm's DropPath modules in a model ours; returns them."""
    modules = [module for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    for module in modules:
        module.__class__ = DropPath
    return modules


def set_drop_path(modules, u):
    """u uniform [B, len(modules)]: image b skips module m where u[b, m] < its drop_prob."""
    for module, column in zip(modules, u.T):
        module.kept = (column >= module.drop_prob) / (1 - module.drop_prob)
# --- end copy: model ---


# --- begin copy: read weights ---
RENAMED = {r"blocks\.\d+\.(\d+\.(norm|attn|ls|mlp))": r"blocks.\1",          # DINOv2's chunks
           r"attn\.q_bias": "attn.query.bias", r"attn\.v_bias": "attn.value.bias",     # SimMIM; Hugging Face:
           r"embeddings\.(cls|mask)_token": r"\1_token", r"embeddings\.position_embeddings": "pos_embed",
           r"embeddings\.patch_embeddings\.projection": "patch_embed.proj", r"encoder\.layer\.": "blocks.",
           "layernorm_before": "norm1", "layernorm_after": "norm2", r"layernorm\.": "norm.",
           r"attention\.attention": "attn", r"attention\.output\.dense": "attn.proj",
           r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2",
           r"layer_scale(\d)\.lambda1": r"ls\1.gamma"}


def read_weights(init, arch):
    """The content of the checkpoint that `init` names; timm's with the mean and sd of its model card."""
    from safetensors.torch import load_file
    source, _, name = init.partition(":")
    name = name or arch
    file = Path(f"runs/{name}/pretrain/backbone.pt" if source == "exp" else init)
    if source in ("timm", "torchvision"):
        folder = Path("weights")
        file = [*folder.glob(f"{name}.pth"), *folder.glob(f"{name}.safetensors"), None][0]
    known = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]      # in files of DINO, MoCo, SimMIM
    with or_fail(f"read {file or f'{init} (there is no weights/{name}.pth)'}"):
        if file is None and source == "timm":
            content = timm.create_model(name, pretrained=True).state_dict()
        elif file is None:
            from torchvision.models import get_model
            content = get_model(name, weights="IMAGENET1K_V1").state_dict()
        elif file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with torch.serialization.safe_globals(known):
                content = torch.load(file, map_location="cpu", weights_only=True)
        card = timm.get_pretrained_cfg(name) if source == "timm" else None
        return {"model": content, "mean": [*card.mean], "std": [*card.std]} if card else content
# --- end copy: read weights ---


# --- begin copy: timm names ---
def flatten(content, path=""):
    """{dotted path: tensor} of nested dicts; only floating-point tensors: no counts, nothing quantised."""
    flat = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(value, torch.Tensor):
            flat |= flatten(value, f"{path}{name}.")
        elif value.is_floating_point():
            flat[f"{path}{name}"] = value
    return flat


def timm_names(state, wanted):
    """The tensors below the prefix where most wanted names are, under timm's names; and that prefix.

    Of two networks with as many of them the average is taken (DINO's teacher, an EMA), but not MoCo's
    momentum encoder.
    """
    for old, new in RENAMED.items():
        if not any(re.search(old, name) for name in wanted):                # MobileNetV4 has such names
            state = {re.sub(old, new, name): value for name, value in state.items()}
    for name in list(state):
        if ".attn.query." in name:
            q, v = state.pop(name), state.pop(name.replace("query", "value"))
            k = state.pop(name.replace("query", "key"), torch.zeros_like(q))        # SimMIM: no bias of keys
            state[name.replace("query", "qkv")] = torch.cat([q, k, v])
    found = Counter(name.removesuffix(key) for name in state for key in wanted
                    if f".{name}".endswith(f".{key}"))
    preferred = r"\b(\w*_)?(ema|swa|teacher|(base|target)_encoder|encoder_q)"
    best = max(found, default="", key=lambda prefix: (found[prefix], bool(re.search(preferred, prefix))))
    return {name.removeprefix(best): x for name, x in state.items() if name.startswith(best)}, best
# --- end copy: timm names ---


# --- begin copy: adapt ---
# Names in a checkpoint: what no backbone needs (classifier, mask token, computed tables), what its own does
SPARE = r"^head\.|mask_token|num_batches_tracked|relative_position_index|relative_coords_table|attn_mask"
NEEDED = (r"gamma|bias_table|reg\w*_token|^(blocks|layers?\d?|stages|norm|norm_pre|fc_norm|pos_embed"
          r"|absolute_pos_embed|cls_token|dist_token)\b")


def of_network(given, wanted):
    """The given tensors that the checkpoint's network needs: of all parts with wanted names, and NEEDED.

    One that the model lacks, as of a further block or norm, shows that it is another network.
    """
    parts = {name.partition(".")[0] for name in wanted}
    needed = lambda name: name.partition(".")[0] in parts or re.search(NEEDED, name)
    return {name: x for name, x in given.items() if needed(name) and not re.search(SPARE, name)}


def fit_channels(kernel, in_chans, how):
    """First layer [D, C, h, w] for other channels: average | sum of 3, duplicate | duplicate_mean of 1."""
    if kernel.shape[1] == in_chans:
        return kernel
    divisors = {"average": kernel.shape[1], "duplicate_mean": in_chans}
    grey = kernel.sum(1, keepdim=True) / divisors.get(how, 1)
    return grey.repeat(1, in_chans, 1, 1)


def loading_note(content, prefix, given, loaded, config, n_heads):
    """A line about an initialisation: tensors loaded, adapted and left out, differences from its checkpoint.

    Args: content: the checkpoint; given {name: tensor}: those below the prefix; loaded: those that the model
    has taken, adapted where need be; n_heads: of the model, as weights do not show them.
    """
    adapted = [name for name, x in loaded.items() if x.shape != given[name].shape]
    left_out = [name for name in given if name not in loaded]
    notes = [f"{len(loaded)} tensors of {config['init']} ({prefix}*)"]
    notes += [f"{len(names)} {what}: {', '.join(names[:3])}"
              for what, names in (("adapted", adapted), ("left out", left_out)) if names]
    args = content.get("model_args")
    theirs = content | (args if isinstance(args, dict) else {})             # of another maker: anything
    if "base_encoder" in prefix and n_heads and "config" not in theirs:
        theirs["num_heads"] = 12                                            # of MoCo-v3's ViT-S; timm's has 6
    ours = {"num_heads": n_heads, "mean": config["mean"], "std": config["std"]}
    notes += [f"ATTENTION: made with {key} {theirs[key]}, used with {value}"
              for key, value in ours.items() if theirs.get(key, value) != value]
    return "; ".join(notes)
# --- end copy: adapt ---


# --- begin copy: positions ---
def fit_positions(value, shape):
    """Position embeddings [1, 1 + h * h, D] or a bias table [(2 w - 1)^2, heads] on another grid, bicubic.

    Other rows stay as they are: the class token's in front, BEiT's three further biases at the table's end.
    """
    side = math.isqrt(shape[-2])
    if value.ndim == 2:
        window = (side + 1) // 2
        return timm.layers.resize_rel_pos_bias_table_simple(value, (window, window), shape)
    return timm.layers.resample_abs_pos_embed(
        value, [side, side], num_prefix_tokens=shape[1] - side ** 2, antialias=False)
# --- end copy: positions ---


# --- begin copy: load backbone ---
STAND_INS = {                       # for what a file lacks: BEiT's pooled norm, bias tables, layer scale
    r"^fc_norm": "norm", r"^blocks\.\d+\.attn\.(rel)": r"rel_pos_bias.\1", r"ls(\d)\.gamma": r"gamma_\1"}


def prefixes(model, key):
    """How the names of the "classifier" or the "first_conv" of a timm model begin."""
    return tuple(f"{name}." for name in np.ravel(model.pretrained_cfg.get(key)))


def load_backbone(model, config):
    """Fill all of any timm model but its classifier from `init`, or fail; returns a line about it."""
    init, arch, first = config["init"], config["arch"], prefixes(model, "first_conv")
    if init == "random":
        return "random initialisation"
    content = read_weights(init, arch)
    named = {name: x for name, x in flatten(content).items() if config["init_key"] in name}
    head = {name: x for name, x in model.state_dict().items()
            if name.startswith(prefixes(model, "classifier")) or not x.is_floating_point()}
    wanted = {name: x.shape for name, x in model.state_dict().items() if name not in head}
    # a ResNet's children in a Sequential, as RadImageNet's and lightly's
    if "layer1.0.conv1.weight" in wanted and not any("layer1." in name for name in named):
        children = dict(zip("014567", "conv1 bn1 layer1 layer2 layer3 layer4".split()))
        child = re.compile(r"^(|.*?\.)([014567])\.(?=\d+\.\w+\.|weight|bias|running)")
        named = {child.sub(lambda found: f"{found[1]}{children[found[2]]}.", name): x
                 for name, x in named.items()}
    loaded, has = {}, ", ".join(list(named)[:3]) or "no tensors"
    with or_fail(f"fill {arch} (--arch, --model_args) from {init}, which has {has}"):
        given, prefix = timm_names(named, wanted)
        if "layers.0.downsample.reduction.weight" in given:                 # Swin's release: a stage earlier
            later = lambda stage: str(int(stage[0]) + 1)
            given = {re.sub(r"(?<=^layers\.)\d(?=\.downsample)", later, name): x for name, x in given.items()}
        rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if rename and wanted.keys() - given.keys() and not any("pos" in name for name in wanted):
            if any("downsample_layers" in name for name in named):          # ConvNeXt's release
                content = timm_names(named, ["downsample_layers.0.0.weight"])[0]
            given = rename(content, model)                                  # it would resample positions
        for old, new in STAND_INS.items():
            others = {name: re.sub(old, new, name) for name in wanted.keys() - given.keys()}
            found = {name: given[other] for name, other in others.items() if other in given}
            given = {name: x for name, x in given.items() if name not in others.values()} | found
        for name in [name for name in wanted if name in given]:
            x, shape = given[name].detach().float(), wanted[name]
            if name.startswith(first) and x.ndim == 4:
                x = fit_channels(x, shape[1], config["channel_adapt"])
            if name.endswith(("pos_embed", "bias_table")) and x.shape != shape:
                x = fit_positions(x, shape)
            loaded[name] = x
        model.load_state_dict(of_network(given, wanted) | head | loaded)    # strict
    config["stand_in"] = content.get("stand_in")
    numbers = b"".join(x.numpy().tobytes() for x in loaded.values())
    config["start"] = hashlib.sha256(numbers).hexdigest()
    heads = next((module.num_heads for module in model.modules() if hasattr(module, "num_heads")), None)
    heads = config["model_args"].get("num_heads", heads)                    # Swin's differ by stage
    return loading_note(content, prefix, given, loaded, config, heads)
# --- end copy: load backbone ---


# --- begin copy: schedule ---
def cosine(step, n_steps, start, end, n_warm=0):
    """Value at `step`: linear warm-up 0 to start (reached in its last step), then a cosine to end."""
    if step < n_warm:
        return start * step / max(1, n_warm - 1)
    progress = (step - n_warm) / (n_steps - n_warm)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def decay_groups(model):
    """Two parameter groups: tensors of two or more dimensions (weight decay), biases and norms (none)."""
    spared, decayed = param_groups_weight_decay(model)
    return [dict(params=decayed["params"]), spared]


def clip_each(parameters, largest):
    """Clip the norm of the gradient of each parameter tensor, one by one, to `largest`; 0: none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = ((largest or math.inf) / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, factors.unbind())
# --- end copy: schedule ---


# --- begin copy: forward all ---
@torch.inference_mode()
def forward_all(forward, images, n_images, n_outputs, batch, rank, world_size):
    """Outputs of all images, float32 [n_images, n_outputs], on the CPU of every process.

    Batch b is computed by process b mod world_size: the batches, and so all bits of the outputs, are the same
    with any number of processes. forward: images of a batch -> [B, n_outputs].
    """
    if dist.is_initialized() and isinstance(forward, nn.Module):
        for buffer in forward.buffers():            # on CPUs each process has statistics of BatchNorm of its
            dist.broadcast(buffer, 0)               # own; those of the first are saved
    outputs = torch.zeros(n_images, n_outputs)
    for begin in range(rank * batch, n_images, world_size * batch):
        places = np.arange(begin, min(begin + batch, n_images))
        outputs[places] = forward(images(places)).float().cpu()
    return sum_over_processes(outputs)              # the others hold zeros in these rows: an exact sum
# --- end copy: forward all ---


# --- begin copy: write ---
def write_atomic(path, write):
    """Let write(file) fill a temporary file, flush, rename: a crash leaves the old file or the new one."""
    with or_fail(f"write {path}; the last complete one is untouched"):
        with open(f"{path}.part", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
# --- end copy: write ---


# --- begin copy: run folder ---
def open_run(out, manifests, config, parts, resume, rank):
    """Make and lock the run folder, load its last.pt into the parts of the state; returns the steps done.

    A last.pt of another config is refused. The config gets two more keys: the hash of manifests and pack.json
    and the mark of drawn images, which a pack or the initial weights carry.
    """
    packs = [read_pack(manifest) for manifest in manifests]
    contents = [Path(manifest).read_bytes() for manifest in manifests]
    config["data"] = hashlib.sha256(repr([contents, packs]).encode()).hexdigest()
    marks = {config.get("stand_in"), *(pack.get("stand_in") for pack in packs)} - {None}
    config["stand_in"] = "; ".join(sorted(marks)) or None
    last, log = Path(out, "last.pt"), Path(out, "log.jsonl")
    if rank == 0:
        with or_fail(f"write into {out} (--out)"):
            Path(out).mkdir(parents=True, exist_ok=True)
            open_run.lock = open(Path(out, ".lock"), "w")    # held until the process ends
            try:
                fcntl.flock(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"{out} is in use by another run; wait for it or choose another --out")
            except OSError:
                pass                                                        # a file system without locks
    fresh = resume == "never" or not last.is_file()
    if sum_over_processes(torch.tensor([fresh, not fresh]).int()).all():
        fail(f"some processes have {last}, others not: all need one --out, on a file system they share")
    if fresh:
        exported = Path(out, "backbone.pt"), Path(out, "classifier.pt")
        if Path(config["init"]).resolve() in [file.resolve() for file in exported]:
            fail(f"{config['init']}, to start from, would be overwritten; choose another --out")
        for file in (last, log, *exported) if rank == 0 else ():            # first what a resume would read
            file.unlink(missing_ok=True)
        return 0
    with or_fail(f"resume from {last} (with --resume never the run begins anew, another --out keeps both)"):
        state = torch.load(last, map_location="cpu", weights_only=True)
        made = state["config"]
        for key in config | made:                                           # a key may be new in the script
            if config.get(key) != made.get(key):
                raise ValueError(f"it was made with {key}={made.get(key)!r}, now it is {config.get(key)!r}")
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                part.copy_(state[name])
            elif state[name]:                                               # a scaler in bf16 has none
                part.load_state_dict(state[name])
        if rank == 0 and log.is_file():                                     # later lines will come again
            lines = [line for line in log.read_bytes().splitlines(True)
                     if line.endswith(b"}\n") and json.loads(line)["step"] <= state["step"]]
            write_atomic(log, lambda file: file.writelines(lines))
    return state["step"]
# --- end copy: run folder ---


# --- begin copy: save ---
def save_run(out, step, config, parts, weights=None, name="backbone", **values):
    """Write last.pt and before it, if given, `weights` as <name>.pt; NaN in the state ends the run."""
    keys = "arch", "model_args", "in_chans", "img_size", "mean", "std", "exp", "seed", "stand_in"
    values.update(step=step, config=config, **{key: config[key] for key in keys})
    state = {part: x if isinstance(x, torch.Tensor) else x.state_dict() for part, x in parts.items()}
    stop_if_nan(flatten(state).values(), step, out)
    if weights:
        model = {key: value.cpu() for key, value in weights.items()}
        write_atomic(f"{out}/{name}.pt", lambda file: torch.save({**values, "model": model}, file))
        print(f"wrote {out}/{name}.pt", flush=True)
    write_atomic(f"{out}/last.pt", lambda file: torch.save({**values, **state}, file))
# --- end copy: save ---


# --- begin copy: log ---
def stop_if_nan(values, step, out):
    """End a run that has diverged, before anything of it is written."""
    if not all(torch.as_tensor(value).isfinite().all() for value in values):
        fail(f"the loss or a weight is NaN by step {step}; {out}/last.pt, if there, is the last good "
             "checkpoint; try a lower --lr or a longer warm-up")


def log_line(out, rank, left, **values):
    """A line of log.jsonl, and one for people that ends with the `left` seconds."""
    stop_if_nan([values["loss"]], values["step"], out)
    if rank == 0:
        for name, value in values.items():
            if not name.startswith("val_auc_"):                             # of a label: in the file alone
                print(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}", end="  ")
        print(f"eta {timedelta(seconds=int(left))}", flush=True)
        with or_fail(f"write {out}/log.jsonl"), open(f"{out}/log.jsonl", "a") as log:
            log.write(json.dumps({**values, "time": time.time()}) + "\n")
# --- end copy: log ---


if __name__ == "__main__":
    main()
