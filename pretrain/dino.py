"""DINO: self-distillation with no labels (Caron et al., arXiv:2104.14294).

A student sees ten crops of an image, its teacher (the student's moving average) the two large ones. From each
crop the student predicts the teacher's output for another crop, a softmax over 65,536 dimensions: the loss is
the cross-entropy between the two (dino_loss). In the log collapse shows as an entropy near log(out_dim), or a
batch_entropy or feature_std near 0.

    torchrun --nproc_per_node=4 pretrain/dino.py --exp 4.1.1-100k     one row of experiments.yaml on 4 GPUs
    python pretrain/dino.py --manifest my/manifest.csv --split all --out my/run    your own images
    python pretrain/dino.py --exp 4.1.1-100k --teacher_temp 0.07 --warmup_teacher_temp_epochs 30

Reads   manifest.csv and images.npy beside it (without it the 8-bit PNG and JPEG files named in `path`).
Writes  --out: backbone.pt (the teacher's, for timm), last.pt (to resume), log.jsonl, attention_<epoch>.png.
The same command resumes a run that was killed; SIGTERM saves and exits with code 75.
"""

import argparse
import contextlib
import copy
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
    strategy="dino",                # the method of this script; a row of another strategy is refused
    arch="vit_small_patch16_224",   # any VisionTransformer of timm with a position for its class token
    model_args={},                  # further arguments of timm.create_model, as in {"depth": 4}
    in_chans=1,                     # 1 | 3; channels of the input; grey images are repeated to 3
    img_size=224,                   # pixels of a global crop; a local one is 96 / 224 of it, in whole patches
    mean=None,                      # mean of pixels in 0..1, one or one a channel; none: ImageNet, grey 0.485
    std=None,                       # standard deviation, likewise; none: ImageNet, grey 0.229
    init="random",                  # random | timm[:NAME] | exp:KEY | a checkpoint file
    init_key="",                    # load only names with this in them, as student; none: of several the EMA
    channel_adapt="average",        # average | sum | duplicate | duplicate_mean; first layer 3 to 1, 1 to 3
    dataset="mimic_cxr",            # folder below --data with manifest.csv and images.npy
    samples=0,                      # use only this many images, the first of the split; 0: all
    epochs=300,                     # passes over the images
    warmup_epochs=10,               # epochs of linear warm-up of the learning rate from 0
    batch=256,                      # images per optimiser step, all processes together
    lr=1e-4,                        # peak for a batch of 256, scaled by batch / 256
    min_lr=1e-6,                    # learning rate at the end of the cosine, scaled likewise
    wd=0.04,                        # weight decay at the start
    wd_end=0.4,                     # weight decay at the end, by a cosine
    clip=3.0,                       # largest gradient norm of each parameter tensor; 0: no clipping
    drop_path=0.1,                  # stochastic depth of the student's last block, linear from 0
    seed=0,                         # of all random numbers
    variant="corrected",            # corrected | paper; positions of local crops scaled by size, by a factor
    global_crop_scale=[0.4, 1.0],   # area of the two global crops
    local_crop_scale=[0.05, 0.4],   # area of the local crops
    n_local_crops=8,                # local crops an image
    out_dim=65536,                  # outputs of the head
    hidden_dim=2048,                # width of its hidden layers
    bottleneck_dim=256,             # width before its last layer
    norm_last_layer=True,           # rows of the last layer have length 1; published ViT-S recipe: false
    freeze_last_layer=1,            # epochs in which the last layer gets no gradient
    student_temp=0.1,               # temperature of the student
    teacher_temp=0.04,              # of the teacher after its warm-up; published ViT-S recipe: 0.07
    warmup_teacher_temp=0.04,       # of the teacher in the first epoch
    warmup_teacher_temp_epochs=0,   # of its linear warm-up; published ViT-S recipe: 30
    centre_momentum=0.9,            # of the mean teacher output
    ema=0.996,                      # momentum of the teacher, by a cosine to 1
)
FLAGS = dict(                       # of the command line only, not of a row
    exp="",                         # row of experiments.yaml, as in 4.1.1-100k; none: the defaults
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
    log_steps=50,                   # steps between two lines of the log; 0: only one at the end
    save_minutes=10.0,              # minutes between two writes of last.pt
    compile=False,                  # torch.compile the blocks of the network; the first step takes minutes
    picture_epochs=10,              # epochs between two pictures; 0: only one at the end
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


class DINO(nn.Module):
    """Student or teacher: a timm vision transformer and the head on its class token.

    The model needs `cls_token`, `pos_embed` of the class token and a square of patches, `patch_embed`,
    `pos_drop`, `patch_drop`, `norm_pre`, `blocks`, `norm` and `embed_dim`.
    """

    def __init__(self, backbone, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True,
                 by_scale=False):
        super().__init__()
        if backbone.pos_embed.shape[1] != 1 + backbone.patch_embed.num_patches:
            raise ValueError("its positions are not those of the patches and a class token")
        if isinstance(backbone.norm, nn.Identity):
            raise ValueError("it has no final norm; try fc_norm false in model_args")
        backbone.patch_embed.strict_img_size = False                        # local crops are smaller
        self.backbone, self.by_scale = backbone, by_scale
        self.drop_paths = replace_drop_path(backbone)
        self.head = DINOHead(backbone.embed_dim, out_dim, hidden_dim, bottleneck_dim, norm_last_layer)

    def forward(self, crops, depth=None):
        """Crops of every size -> logits [sum of V, B, K], features [sum of V, B, D].

        Args:
            crops: a tensor [V, B, C, s, s] for each size s.
            depth: uniforms [sum of V, B, drop paths], which a student in training needs.
        """
        vit, features, done = self.backbone, [], 0
        for views in crops:                                                 # one pass for each size
            if depth is not None:
                set_drop_path(self.drop_paths, depth[done:done + len(views)].flatten(0, 1))
            done += len(views)
            patches = vit.patch_embed(views.flatten(0, 1)).flatten(1, -2)   # [V * B, N, D]
            cls = vit.cls_token.expand(len(patches), -1, -1)
            positions = fit_to_grid(vit.pos_embed, math.isqrt(patches.shape[1]), self.by_scale)
            tokens = vit.pos_drop(torch.cat([cls, patches], 1) + positions)
            tokens = vit.norm_pre(vit.patch_drop(tokens))
            features.append(vit.norm(vit.blocks(tokens))[:, 0].unflatten(0, views.shape[:2]))
        features = torch.cat(features)
        return self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2]), features


class DINOHead(nn.Module):
    """Three linear layers, normalised to unit length, then a weight-normalised linear layer without bias."""

    def __init__(self, in_dim, out_dim, hidden_dim, bottleneck_dim, norm_last_layer):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        lengths = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad_(not norm_last_layer)

    def forward(self, features):
        """features [B, D] -> logits [B, out_dim]."""
        return self.last_layer(F.normalize(self.mlp(features), dim=1))


def fit_to_grid(pos_embed, side, by_scale=False):
    """Position embeddings [1, 1 + h * h, D] on a grid side x side, bicubic; the class token's is untouched.

    by_scale: as DINO's released code does, whose scale factor (side + 0.1) / h samples slightly other points.
    """
    h = math.isqrt(pos_embed.shape[1] - 1)
    if side == h:
        return pos_embed
    how = dict(scale_factor=(side + 0.1) / h) if by_scale else dict(size=(side, side))
    grid = F.interpolate(pos_embed[:, 1:].mT.unflatten(2, (h, h)), mode="bicubic", **how)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT], 1)


def teacher_targets(logits, centre, temperature):
    """The teacher's distributions [2, B, K]: softmax((logits - centre) / temperature), fp32 as the centre."""
    return ((logits.to(centre.dtype) - centre) / temperature).softmax(-1)


def dino_loss(logits, targets, temperature):
    """Cross-entropy of the student to the teacher, mean over all pairs of different crops and the batch.

    Args: logits [V, B, K] of the student, whose first crops are the teacher's; targets [2, B, K].
    """
    log_prob = (logits.to(targets.dtype) / temperature).log_softmax(-1)
    pairs = -torch.einsum("tbk,vbk->btv", targets, log_prob)
    same = pairs.diagonal(dim1=1, dim2=2)
    return (pairs.sum() - same.sum()) / (pairs.numel() - same.numel())


def teacher_temperature(config, epoch):
    """From warmup_teacher_temp to teacher_temp in equal steps an epoch (counted from 0), then constant."""
    first, last = config["warmup_teacher_temp"], config["teacher_temp"]
    n = config["warmup_teacher_temp_epochs"]
    return last if epoch >= n else first + (last - first) * epoch / max(1, n - 1)


# --- begin copy: teacher ---
@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, every parameter, no buffer."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def feature_std(features, world_size):
    """Spread of unit features [b, D] over the batch of all processes: 1 in all directions, 0 collapsed.

    The root of the summed variances of the D components, which for unit vectors is sqrt(1 - |mean|^2).
    """
    mean = sum_over_processes(F.normalize(features.float(), dim=1).mean(0)) / world_size
    return (1 - mean.square().sum()).clamp_min(0).sqrt()
# --- end copy: teacher ---


def make_crops(images, uniforms, patch_size, config):
    """Two global crops [2, b, C, S, S], and local ones [V, b, C, s, s] where there are any.

    s is 96 where S is 224, in whole patches. The first global crop is always blurred, the second rarely and
    sometimes solarised, half of the local are blurred.

    Args: images uint8 [b, C, H, W] or a list of [C, H, W]; uniforms [2 + V, b, N_VIEW].
    """
    local_size = max(1, round(config["img_size"] * 96 / 224 / patch_size)) * patch_size
    whole = config["global_crop_scale"], config["img_size"]
    kinds = [(*whole, 1.0, 0.0), (*whole, 0.1, 0.2)]                        # shares of blur and solarise
    kinds += [(config["local_crop_scale"], local_size, 0.5, 0.0)] * config["n_local_crops"]
    views = [strong_view(images, u, *kind, config) for u, kind in zip(uniforms, kinds, strict=True)]
    return [torch.stack(part) for part in (views[:2], views[2:]) if part]


@torch.no_grad()
def cls_attention(vit, x):
    """Attention of the class token to the patches in the last block: x [B, C, S, S] -> [B, heads, h, w]."""
    vit, seen = copy.deepcopy(vit), []                  # a copy is not compiled: hooks see its blocks
    attention = vit.blocks[-1].attn
    attention.fused_attn = False                        # which computes no attention map
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    vit(x)
    return seen[0][:, :, 0, 1:].unflatten(2, vit.patch_embed.grid_size)     # its row, patches' columns


def attention_picture(vit, images, config, path):
    """A row per image: the image and a map per head of the last block, white where the class token attends.

    Args: images uint8 [B, C, H, W] or a list of [C, H, W].
    """
    resize = lambda x: F.interpolate(x[None].float(), config["img_size"], mode="bicubic", antialias=True)
    whole = torch.cat([*map(resize, images)]).clamp(0, 255)
    maps = cls_attention(vit, normalise(whole, config))
    maps = F.interpolate(maps / maps.amax((2, 3), keepdim=True), whole.shape[2:]) * 255
    row = torch.cat([rgb_to_grayscale(whole), *maps.split(1, 1)], 3)        # [B, 1, S, (1 + heads) * S]
    pixels = row.flatten(0, 2).round().byte()
    image = Image.fromarray(pixels.cpu().numpy())
    write_atomic(path, lambda file: image.save(file, format="png"))


def train(config, args, rank, world_size, device):
    """Pre-train. Random numbers of a step depend on (seed, step) only, so a resumed run is the same run."""
    rows = read_manifest(args.manifest, args.split, config["samples"])
    images = open_images(args.manifest, rows["path"], config["in_chans"], device)
    n_images, batch = len(rows["row"]), config["batch"]
    steps_an_epoch = n_images // batch if batch else 0
    n_steps, n_warm = config["epochs"] * steps_an_epoch, config["warmup_epochs"] * steps_an_epoch
    if batch % world_size or not n_steps:
        fail(f"--batch {batch} has to be at most the {n_images} images and a multiple of the processes, "
             f"{world_size}; --epochs at least 1")
    last_step = min(n_steps, args.steps or n_steps)

    torch.manual_seed(config["seed"])
    backbone = make_model(config, 0)
    with or_fail(f"use {config['arch']}, which has to be a vision transformer with a class token"):
        student = DINO(backbone, config["out_dim"], config["hidden_dim"], config["bottleneck_dim"],
                       config["norm_last_layer"], by_scale=config["variant"] == "paper")
    note = load_backbone(backbone, config)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()           # no stochastic depth
    if args.compile:
        for block in [*backbone.blocks, *teacher.backbone.blocks]:
            block.compile()                                                 # compiled once for all blocks
    centre = torch.zeros(config["out_dim"], device=device)                  # mean teacher output
    optimizer = torch.optim.AdamW(decay_groups(student), fused=True)        # lr, wd: in each step
    amp, scaler = mixed_precision(device)
    meter = torch.zeros(5, device=device)                                   # sums of the logged terms, steps
    state = dict(student=student, teacher=teacher, centre=centre, optimizer=optimizer, scaler=scaler,
                 meter=meter)
    first_step = open_run(args.out, [args.manifest], config, state, args.resume, rank)
    if rank == 0:
        print(json.dumps(config))
        print(f"{note}; {sum(p.numel() for p in student.parameters()):,} parameters; {n_images:,} images; "
              f"steps {first_step} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
        if n_warm >= n_steps:
            print("warning: the run ends within its warm-up (--warmup_epochs)", file=sys.stderr)
    net = student                   # what the loop calls; of several processes DDP, which averages gradients
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    local = np.split(np.arange(batch), world_size)[rank]                    # own places in the batch
    micro = args.micro_batch or len(local)
    sizes = [N_VIEW, len(student.drop_paths)]                               # numbers drawn for a crop
    stop_asked = catch_sigterm()
    started = saved = time.monotonic()

    for step in range(first_step, last_step):
        epoch, number = divmod(step, steps_an_epoch)
        lr = cosine(step, n_steps, config["lr"], config["min_lr"], n_warm) * batch / 256
        wd = cosine(step, n_steps, config["wd"], config["wd_end"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = wd                      # group 1: 0, see decay_groups
        teacher_temp = teacher_temperature(config, epoch)

        if number == 0 or step == first_step:
            order = np.random.default_rng([config["seed"], epoch]).permutation(n_images)
        chosen = images(order[number * batch + local])
        torch.manual_seed(step_seed(config["seed"], step))                  # dropout's seed, too
        draws = torch.rand(2 + config["n_local_crops"], batch, sum(sizes))[:, local]
        uniforms, depth = send(draws, device).split(sizes, 2)
        crops = make_crops(chosen, uniforms, backbone.patch_embed.patch_size[0], config)

        sums, features = 0, []          # sums: loss, entropy, mean target, mean teacher logits: [2 + 2K]
        optimizer.zero_grad()
        for begin in range(0, len(local), micro):
            part = [views[:, begin:begin + micro] for views in crops]
            net.require_backward_grad_sync = begin + micro >= len(local)     # DDP: only after the last pass
            with torch.no_grad(), amp:
                teacher_logits, teacher_features = teacher(part[:1])
            with amp:
                logits, _ = net(part, depth[:, begin:begin + micro])
            targets = teacher_targets(teacher_logits, centre, teacher_temp)
            loss = dino_loss(logits, targets, config["student_temp"])
            share = part[0].shape[1] / batch                                # of these images in the batch
            scaler.scale(loss * share * world_size).backward()              # DDP averages over processes
            entropy = torch.special.entr(targets).sum(-1).mean()
            means = targets.mean((0, 1)), teacher_logits.mean((0, 1), dtype=centre.dtype)
            sums += share * torch.cat([torch.stack([loss.detach(), entropy]), *means])
            features.append(teacher_features[0])
        scaler.unscale_(optimizer)
        clip_each(student.parameters(), config["clip"])
        if epoch < config["freeze_last_layer"]:
            student.head.last_layer.zero_grad()                             # to None: AdamW skips it
        scaler.step(optimizer)
        scaler.update()
        update_teacher(teacher, student, cosine(step, n_steps, config["ema"], 1.0))
        terms, mean_target, mean_logits = sum_over_processes(sums).split([2, len(centre), len(centre)])
        centre.lerp_(mean_logits, 1 - config["centre_momentum"])
        spreads = torch.special.entr(mean_target).sum(), feature_std(torch.cat(features), world_size)
        meter += torch.stack([*terms, *spreads, torch.ones_like(loss)])

        done, stopping = step + 1, stop_asked()
        if args.log_steps and done % args.log_steps == 0 or done == last_step:
            seconds = (time.monotonic() - started) / (done - first_step)        # a step
            terms = zip(["loss", "entropy", "batch_entropy", "feature_std"], (meter[:4] / meter[4]).tolist())
            log_line(args.out, rank, (last_step - done) * seconds, step=done, epoch=epoch + 1, **dict(terms),
                     lr=lr, wd=wd, teacher_temp=teacher_temp, img_per_s=round(batch / seconds, 1))
            meter.zero_()
        picture_steps = args.picture_epochs * steps_an_epoch
        if rank == 0 and (done == last_step or picture_steps and done % picture_steps == 0):
            examples = images(np.arange(min(8, n_images)))
            attention_picture(teacher.backbone, examples, config, f"{args.out}/attention_{epoch + 1:04}.png")
        if rank == 0 and (stopping or time.monotonic() - saved > 60 * args.save_minutes):
            save_run(args.out, done, config, state, epoch=done // steps_an_epoch)
            saved = time.monotonic()
        if stopping and done < last_step:
            sys.exit(75)                # EX_TEMPFAIL: run the same command again
    if rank == 0:
        done = max(first_step, last_step)                                   # a finished run exports again
        save_run(args.out, done, config, state, teacher.backbone.state_dict(), epoch=done // steps_an_epoch)


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


# --- begin copy: colour and blur ---
N_COLOUR = 7    # uniforms: jitter or not, its 4 strengths, blur or not, its width


def shift_hue(rgb, turn):
    """Turn the hue of RGB images [B, 3, H, W], of any range, by `turn` [B, 1, 1, 1] of a circle (HSV)."""
    value, largest = rgb.max(1, keepdim=True)
    chroma = value - rgb.amin(1, keepdim=True)
    ahead = (rgb.roll(-1, 1) - rgb.roll(-2, 1)).gather(1, largest)          # green - blue where red is most
    sixth = 2 * largest + ahead / chroma.clamp_min(1e-8) + 6 * turn
    k = (sixth + torch.arange(5, 0, -2, device=rgb.device).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, u, strength, p):
    """Brightness, contrast, saturation, hue, in this order, of a share p of the images; the others stay.

    Args: x float [B, 1 or 3, H, W], 0-255; u uniform [B, >= 5]; strength: the four largest changes.
    """
    amounts = (2 * u[:, 1:5] - 1) * (u[:, :1] < p)                          # in -1..1, or 0
    brightness, contrast, saturation, hue = (
        largest * amount.view(-1, 1, 1, 1) for largest, amount in zip(strength, amounts.T))
    x = (x * (1 + brightness)).clamp_(0, 255)
    mean = rgb_to_grayscale(x).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, 1 + contrast).clamp_(0, 255)
    if x.shape[1] == 1:
        return x                                                            # grey has no colour to change
    x = torch.lerp(rgb_to_grayscale(x), x, 1 + saturation).clamp_(0, 255)
    return shift_hue(x, hue)


def gaussian_blur(x, u, p, sigma=(0.1, 2.0)):
    """Blur a share p of the images x [B, C, S, S] with sd U(sigma) pixels; u uniform [B, >= 2]."""
    sd = sigma[0] + u[:, 1] * (sigma[1] - sigma[0])
    sd = torch.where(u[:, 0] < p, sd, 0.01)                                 # 0.01: no blur
    pixels = torch.arange(x.shape[3], device=x.device)
    distance = (pixels - pixels[:, None]) / sd[:, None, None]
    exponent = (-0.5 * distance ** 2).clamp_min(-80)                        # denormal numbers are slow
    weights = exponent.exp()[:, None]
    matrix = weights / weights.sum(-1, keepdim=True)
    return matrix @ x @ matrix.mT
# --- end copy: colour and blur ---


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


# --- begin copy: strong view ---
N_VIEW = N_CROP + N_COLOUR + 2          # uniforms of a view: crop, jitter and blur, greyscale, solarise


def strong_view(images, u, scale, size, blur, solarise, config, cubic=True):
    """The view of DINO, MoCo-v3 and SiT, normalised float [B, C, size, size], from uniforms u [B, N_VIEW].

    Crop, flip, jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, greyscale with p 0.2, blur and solarise (at 128) with
    the shares given.
    """
    crop, colour, grey, inverted = u.split([N_CROP, N_COLOUR, 1, 1], 1)
    x = random_resized_crop(images, crop, scale, size, cubic)
    x = colour_jitter(x, colour, strength=(0.4, 0.4, 0.2, 0.1), p=0.8)
    x = torch.where(grey[..., None, None] < 0.2, rgb_to_grayscale(x), x)
    x = gaussian_blur(x, colour[:, 5:], blur)
    solarised = (inverted[..., None, None] < solarise) & (x >= 128)
    return normalise(torch.where(solarised, 255 - x, x), config)
# --- end copy: strong view ---


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


# --- begin copy: load transformer ---
def load_backbone(model, config):
    """Fill all of a timm vision transformer without a head from `init`, or fail; returns a line about it."""
    init, arch = config["init"], config["arch"]
    if init == "random":
        return "random initialisation"
    content, kernel = read_weights(init, arch), "patch_embed.proj.weight"
    named = {name: x for name, x in flatten(content).items() if config["init_key"] in name}
    wanted = model.state_dict()
    has = ", ".join(list(named)[:3]) or "no tensors"
    with or_fail(f"fill {arch} (--arch, --model_args) from {init}, which has {has}"):
        given, prefix = timm_names(named, wanted)
        loaded = {name: given[name].detach().float() for name in wanted if name in given}
        loaded[kernel] = fit_channels(loaded[kernel], config["in_chans"], config["channel_adapt"])
        if "pos_embed" in wanted:
            n_prefix = wanted["pos_embed"].shape[1] - model.patch_embed.num_patches
            loaded["pos_embed"] = timm.layers.resample_abs_pos_embed(
                loaded["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=n_prefix, antialias=False)
        model.load_state_dict(of_network(given, wanted) | loaded)           # strict
    config["stand_in"] = content.get("stand_in")
    numbers = b"".join(x.numpy().tobytes() for x in loaded.values())
    config["start"] = hashlib.sha256(numbers).hexdigest()
    return loading_note(content, prefix, given, loaded, config, model.blocks[0].attn.num_heads)
# --- end copy: load transformer ---


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
