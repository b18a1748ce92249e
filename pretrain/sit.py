"""SiT: self-supervised vision transformer (Atito, Awais, Kittler, arXiv:2104.03602, as released later).

A student sees images with blocks emptied or replaced (function corrupt) and has two tasks: to restore them,
as in GMML (masked_l1), and to find by its class token, among all images of the batch, the same image as seen
clean in its other view by the teacher, the student's moving average (contrast).

    torchrun --nproc_per_node=4 pretrain/sit.py --exp 4.3.1-100k     one row of experiments.yaml on 4 GPUs
    python pretrain/sit.py --manifest my/manifest.csv --split all --out my/run    your own images
    python pretrain/sit.py --exp 4.3.1-100k --wd_end 0.1             any key of a row is a flag

Reads   manifest.csv and images.npy beside it (without it the 8-bit PNG and JPEG files named in `path`).
Writes  --out: backbone.pt (the teacher's, for timm), last.pt (to resume), log.jsonl, recon_<epoch>.png.
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
    strategy="sit",                 # the method of this script; a row of another strategy is refused
    arch="vit_small_patch16_224",   # any VisionTransformer of timm with a class token, but no hybrid
    model_args={},                  # further arguments of timm.create_model, as in {"depth": 4}
    in_chans=1,                     # 1 | 3; channels of the input; grey images are repeated to 3
    img_size=224,                   # side of the network's input in pixels
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
    lr=1e-4,                        # peak for a batch of 256, scaled by batch / 256; the released fork: 5e-4
    min_lr=1e-6,                    # learning rate at the end of the cosine, scaled likewise
    wd=0.04,                        # weight decay at the start
    wd_end=0.04,                    # weight decay at the end, by a cosine; the released fork goes to 0.1
    clip=3.0,                       # largest gradient norm of each parameter tensor; 0: no clipping
    drop_path=0.1,                  # stochastic depth of the student's last block, linear from 0
    seed=0,                         # of all random numbers
    variant="corrected",            # corrected | paper; the same in this script, only stored with the weights
    drop=0.5,                       # empty blocks cover a fraction U(min(0.5, drop), drop); at most 0.85
    replace=0.3,                    # in half of the images (drop 0: all) another covers this share; 0: none
    align=1,                        # blocks begin and end at multiples of this many pixels
    crop_scale=[0.2, 1.0],          # area of the random resized crop, range of fractions
    hidden_dim=4096,                # width of the contrastive head
    out_dim=256,                    # length of an embedding
    temperature=0.2,                # of the contrastive softmax
    recon_weight=5.0,               # lambda: loss = contrast + lambda * recon; SiT's own code: 1
    ema=0.996,                      # momentum of the teacher, by a cosine to 1
)
FLAGS = dict(                       # of the command line only, not of a row
    exp="",                         # row of experiments.yaml, as in 4.3.1-100k; none: the defaults
    experiments="",                 # file of the rows; none: the experiments.yaml above this script
    miniature=False,                # override the row by the block `miniature` of that file
    data="data",                    # folder of the packed datasets
    manifest="",                    # manifest.csv of the images; none: <data>/<dataset>/manifest.csv
    split="pretrain",               # splits to use, comma-separated, or all
    out="",                         # run folder; none: runs/<exp>/pretrain or runs/<strategy>
    device="",                      # cpu | cuda; default cuda where there is one
    steps=0,                        # stop after this many steps of the schedule; 0: all steps
    resume="auto",                  # auto | never; auto: from last.pt, if any; for changed code take never
    micro_batch=0,                  # images per pass and process, recomputed for gradients; 0: all at once
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
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale


class ContrastiveHead(nn.Sequential):
    """Three linear layers with batch norm, the last without affine: class tokens [B, D] -> [B, out_dim]."""

    def __init__(self, dim, hidden_dim=4096, out_dim=256):
        super().__init__(
            nn.Linear(dim, hidden_dim), SyncBatchNorm(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim), SyncBatchNorm(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, out_dim), SyncBatchNorm(out_dim, affine=False))
        for layer in list(self)[::3]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class SiT(nn.Module):
    """Student or teacher: a timm vision transformer, a head on the class token, one on the patch tokens.

    The model needs `cls_token`, `embed_dim`, `num_prefix_tokens`, a final `norm`, `forward_features` to
    normalised tokens, and `patch_embed` with `patch_size` and `grid_size`.
    """

    def __init__(self, backbone, in_chans, hidden_dim=4096, out_dim=256):
        super().__init__()
        if backbone.cls_token is None or isinstance(backbone.norm, nn.Identity):
            raise ValueError("it needs a class token and a final norm (fc_norm false in model_args)")
        self.backbone = backbone
        self.cls_head = ContrastiveHead(backbone.embed_dim, hidden_dim, out_dim)
        self.rec_head = ReconstructionHead(backbone.embed_dim, in_chans, backbone.patch_embed.patch_size[0])

    def forward(self, x, *how):
        """x [B, C, S, S] -> embedding [B, out_dim] and reconstruction [B, C, S, S]; how: see in_passes."""
        tokens = in_passes(self.backbone, x, *how)                          # [B, 1 + N, D]
        patches = tokens[:, self.backbone.num_prefix_tokens:]
        return self.cls_head(tokens[:, 0]), self.rec_head(patches, self.backbone.patch_embed.grid_size)


# --- begin copy: passes ---
def in_passes(backbone, x, micro=None, drop_paths=(), u=None):
    """Tokens [B, 1 + N, D] of images x [B, C, S, S], with `micro` < B so many at a time.

    The activations of a pass are recomputed for its gradients, so that memory holds one pass at a time, while
    the loss and the batch norm of the heads see all images. drop_paths and u [B, len(drop_paths)]: see
    set_drop_path.
    """
    def one_pass(x, u):
        set_drop_path(drop_paths, u)
        return backbone.forward_features(x)

    u = x.new_zeros(len(x), 0) if u is None else u                          # none: no stochastic depth
    if not micro or micro >= len(x):
        return one_pass(x, u)
    passes = zip(x.split(micro), u.split(micro))
    return torch.cat([checkpoint(one_pass, *part, use_reentrant=False) for part in passes])
# --- end copy: passes ---


# --- begin copy: reconstruction head ---
class ReconstructionHead(nn.Module):
    """Three linear layers with GELU on every token, then one transposed convolution that paints its patch."""

    def __init__(self, dim, out_chans, patch_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(),
            nn.Linear(dim, dim), nn.GELU(),
            nn.Linear(dim, dim), nn.GELU())
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.convTrans = nn.ConvTranspose2d(dim, out_chans, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens, grid_size):
        """tokens [B, N, D] in a grid [h, w] -> image [B, C, h * patch, w * patch]."""
        return self.convTrans(self.mlp(tokens).mT.unflatten(2, grid_size))
# --- end copy: reconstruction head ---


def contrast(student, keys, positives, temperature):
    """Symmetric InfoNCE: each view's student embedding against the teacher's of the other view, both summed.

    Args: student [2b, D], view 1 before view 2; keys: the teacher's of the whole batch, for each view [B, D];
    positives: rows of the student's images among them, int64 [b]. No gradient goes to the keys.
    """
    pairs = zip(student.chunk(2), reversed(keys))
    return sum(info_nce(queries, others, positives, temperature) for queries, others in pairs)


# --- begin copy: contrastive loss ---
def similarities(queries, keys, temperature):
    """Cosines of queries [b, D] and keys [B, D] over the temperature: logits [b, B]."""
    return F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature


def info_nce(queries, keys, positives, temperature):
    """Mean over queries of -log softmax(q . k / temperature) at the query's own key, times 2 temperature.

    Args: queries [b, D] and keys [B, D], not normalised; positives: row of each query's key, int64 [b].
    Source: MoCo v3 (arXiv:2104.02057), algorithm 1.
    """
    return 2 * temperature * F.cross_entropy(similarities(queries, keys, temperature), positives)
# --- end copy: contrastive loss ---


# --- begin copy: group masking ---
N_BLOCKS = 248      # drawn for every image: enough to mask 0.85 of it, but not always more


def block_masks(u, fraction, side, align=1):
    """Random blocks, one after the other, until the masked fraction of the image reaches its target.

    Top and left are uniform in [0, side - align), height and width in [align, 0.3 side), cut at the border.

    Args: u uniform [B, K, 4], K at most 250; fraction: target of each image [B]; side, align: in pixels.
    Returns: bool [B, side, side], True = corrupted. Source: GMML (arXiv:2205.14986) and its released code.
    """
    begin = (u[..., :2] * (side - align) / align).floor() * align
    size = align + (u[..., 2:] * (int(0.3 * side) - align)).floor()
    size = (size / align).round() * align
    pixels = torch.arange(side, device=u.device)
    inside = (pixels >= begin[..., None]) & (pixels < (begin + size)[..., None])
    rows, columns = inside.float().unbind(2)                                # [B, K, side]
    # block k gives its pixels 2^(126 - k): the exponent of a pixel's sum tells the first block that covers it
    powers = 2.0 ** (126 - torch.arange(u.shape[1], device=u.device).float())
    total = (rows * powers[:, None]).mT @ columns + powers[-1] / 2
    first = 127 - torch.frexp(total).exponent.flatten(1).long()             # [B, side * side]; K: none does
    added = first.new_zeros(len(u), u.shape[1] + 1).scatter_add(1, first, torch.ones_like(first))
    needed = fraction[:, None] * side * side
    last = (added.cumsum(1)[:, :-2] < needed).sum(1, keepdim=True)    # the block that reaches it, or the last
    return ((first <= last) & (needed > 0)).unflatten(1, (side, side))


def draw_masks(u, blocks, side, drop=0.75, replace=0.3, align=1):
    """Masks of GMML's two corruptions: in each image pixels are dropped or replaced, with equal chance.

    Args:
        u: uniform [B, 2]: whether to replace, then where in min(0.5, drop)..drop the fraction lies.
        blocks: uniform [B, K, 4].
    Returns: masks bool [B, side, side], True = corrupted, and replaced bool [B].
    """
    share = 0.5 if drop and replace else float(replace > 0)                 # 0 switches a corruption off
    replaced = u[:, 0] < share
    least = min(0.5, drop)
    fraction = torch.where(replaced, replace, least + (drop - least) * u[:, 1])
    return block_masks(blocks, fraction, side, align), replaced


def corrupt(clean, fill, masks):
    """Overwrite masked pixels by those of the same place in `fill`: noise, zeros or another image's view.

    Args: clean, fill float [B, C, S, S]; masks bool [B, S, S].
    """
    return torch.where(masks[:, None], fill, clean)


def masked_l1(recon, clean, masks):
    """Sum of absolute differences over masked pixels and channels; the loss is this over their number.

    Args: recon, clean float [B, C, S, S]; masks bool [B, S, S].
    """
    return ((recon - clean).abs() * masks[:, None]).sum()
# --- end copy: group masking ---


def draw_step(config, step, places, n_drop_paths, device):
    """The random numbers of a step for b + 1 places of the global batch; the last image only gives pixels.

    They are drawn for the whole batch: any number of processes draws the same. Returns uniforms of two views
    of each image [2, b + 1, N_VIEW] and, for the views of the first b images, uniforms of stochastic depth
    [2b, n], masks bool [2b, S, S] and whether the pixels are replaced, bool [2b].
    """
    sizes = [N_VIEW, n_drop_paths, 2, 4 * N_BLOCKS]
    torch.manual_seed(step_seed(config["seed"], step))                      # dropout's seed, too
    draws = torch.rand(len(VIEWS), config["batch"], sum(sizes))[:, places]
    uniforms, *draws = send(draws, device).split(sizes, 2)
    depth, corruption, blocks = (part[:, :-1].flatten(0, 1) for part in draws)
    masks, replaced = draw_masks(corruption, blocks.unflatten(1, (N_BLOCKS, 4)), config["img_size"],
                                 config["drop"], config["replace"], config["align"])
    return uniforms, depth, masks, replaced


VIEWS = [(1.0, 0.0), (0.1, 0.2)]        # of its two views: the share blurred, the share solarised


def make_views(images, uniforms, masks, replaced, config):
    """Two views of b images, clean and corrupted, float [2b, C, S, S], from b + 1 images.

    Uniforms [2, b + 1, N_VIEW]. Masked pixels, masks bool [2b, S, S], become 0, the mean grey, or, in
    replaced views, bool [2b], those of the next image of the batch; as the order is random, it may be any
    other image.
    """
    views = torch.stack([
        strong_view(images, u, config["crop_scale"], config["img_size"], *shares, config)
        for u, shares in zip(uniforms, VIEWS)])
    clean, donors = views[:, :-1].flatten(0, 1), views[:, 1:].flatten(0, 1)
    return clean, corrupt(clean, donors * replaced[:, None, None, None], masks)


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
    if not 0 < max(config["drop"], config["replace"]) <= 0.85:
        fail(f"--drop {config['drop']} and --replace {config['replace']}: give shares up to 0.85, not both 0")
    last_step = min(n_steps, args.steps or n_steps)

    torch.manual_seed(config["seed"])
    backbone = make_model(config, 0)
    if not 1 <= config["align"] < 0.2 * config["img_size"]:                 # above: no block at the end
        fail(f"--align {config['align']}: give 1 to less than a fifth of the {config['img_size']} pixels")
    drop_paths, note = replace_drop_path(backbone), load_backbone(backbone, config)
    with or_fail(f"use {config['arch']}, which has to be a vision transformer with a class token"):
        student = SiT(backbone, config["in_chans"], config["hidden_dim"], config["out_dim"])
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)                  # its batch norm stays in training
    teacher.backbone.eval()                                                 # no stochastic depth
    if args.compile:
        for block in [*backbone.blocks, *teacher.backbone.blocks]:
            block.compile()                                                 # compiled once for all blocks
    optimizer = torch.optim.AdamW(decay_groups(student), fused=True)        # lr, wd: in each step
    amp, scaler = mixed_precision(device)
    meter = torch.zeros(4, device=device)               # sums of contrast, recon and feature_std; steps
    state = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler, meter=meter)
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
    local_batch = batch // world_size
    micro = len(VIEWS) * args.micro_batch                                   # views a pass; 0: all
    # places of this process's images in the batch, and of the next, which only replaces pixels of the last
    local = (rank * local_batch + torch.arange(local_batch + 1)) % batch
    positives = local[:-1].to(device)
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
        chosen = images(order[number * batch + local])
        uniforms, depth, masks, replaced = draw_step(config, step, local, len(drop_paths), device)
        clean, corrupted = make_views(chosen, uniforms, masks, replaced, config)
        n_masked = sum_over_processes(masks.sum()) * clean.shape[1]

        optimizer.zero_grad()           # before the passes: their peak of memory is then without gradients
        with torch.no_grad(), amp:
            features = in_passes(teacher.backbone, clean, micro)[:, 0]
            keys = [gather_rows(view) for view in teacher.cls_head(features).chunk(2)]  # each [B, out_dim]
        with amp:
            embedding, recon = net(corrupted, micro, drop_paths, depth)
        contrast_loss = contrast(embedding, keys, positives, config["temperature"]) / world_size
        recon_loss = masked_l1(recon, clean, masks) / n_masked              # both: shares of global means
        loss = contrast_loss + config["recon_weight"] * recon_loss
        scaler.scale(loss * world_size).backward()                          # DDP averages over processes
        scaler.unscale_(optimizer)
        clip_each(student.parameters(), config["clip"])
        scaler.step(optimizer)
        scaler.update()
        update_teacher(teacher, student, cosine(step, n_steps, config["ema"], 1.0))
        losses = sum_over_processes(torch.stack([contrast_loss, recon_loss]).detach())
        meter += torch.stack([*losses, feature_std(features, world_size), torch.ones_like(loss)])

        done, stopping = step + 1, stop_asked()
        if args.log_steps and done % args.log_steps == 0 or done == last_step:
            seconds = (time.monotonic() - started) / (done - first_step)        # a step
            contrast_mean, recon_mean, spread = (meter[:-1] / meter[-1]).tolist()
            log_line(args.out, rank, (last_step - done) * seconds, step=done, epoch=epoch + 1,
                     loss=contrast_mean + config["recon_weight"] * recon_mean, contrast=contrast_mean,
                     recon=recon_mean, feature_std=spread, lr=lr, wd=wd, img_per_s=round(batch / seconds, 1))
            meter.zero_()
        picture_steps = args.picture_epochs * steps_an_epoch
        if rank == 0 and (done == last_step or picture_steps and done % picture_steps == 0):
            student.eval()
            with torch.no_grad():
                _, recon = student(corrupted[:8])
            student.train()
            restored = corrupt(clean[:8], recon, masks[:8])
            picture(f"{args.out}/recon_{epoch + 1:04}.png", config, clean[:8], corrupted[:8], recon, restored)
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


# --- begin copy: sync batch norm ---
def gather_rows(x):
    """Rows [b, D] of each process -> the rows of all processes [B, D], in the order of the batch."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.detach().contiguous())
    shares[dist.get_rank()] = x                         # the one that takes a gradient:
    rows = torch.cat(shares)
    if rows.requires_grad:                              # the sum over the processes, as all use the rows
        rows.register_hook(lambda gradient: sum_over_processes(gradient.clone()))
    return rows


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batch of all processes: each normalises all rows and keeps its share."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        return super().forward(gather_rows(x)).split(len(x))[dist.get_rank()]
# --- end copy: sync batch norm ---


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


# --- begin copy: picture ---
def picture(path, config, *rows):
    """Rows of images, each normalised [B, C, S, S], as one PNG."""
    from torchvision.utils import save_image
    mean, std = torch.tensor([config["mean"], config["std"]])[..., None, None]
    images = torch.cat(rows).float().cpu() * std + mean
    write_atomic(path, lambda file: save_image(images, file, format="png", nrow=len(rows[0]), padding=0))
# --- end copy: picture ---


if __name__ == "__main__":
    main()
