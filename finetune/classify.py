"""Fine-tuning: a network from any initialisation learns the labels of radiographs by a recipe of the study.

The loss is the binary cross-entropy of the labels; the epoch that is best on the validation images is
kept. Recipes a and b: Ma et al., "Benchmarking and boosting transformers for medical image classification",
2022; deit: Marikkar et al., "LT-ViT", 2023; resnet: Hosseinzadeh Taher et al., DART 2021.

    torchrun --nproc_per_node=4 finetune/classify.py --exp 3.4        all seeds of a row, one after the other
    python finetune/classify.py --init weights.pth --train my/manifest.csv --out my/run --seeds 0
    python finetune/classify.py --exp 3.4 --labels 0.01               1 % of the patients have labels
    python finetune/classify.py --exp 3.4 --probe                     a linear probe of the frozen backbone

Reads   manifest.csv with split train and val (images as in pre-training) and the weights that `init` names.
        Flags and row of --exp beat what a checkpoint of ours says of network and pixels, and the recipe.
Writes  --out/seed<k>: classifier.pt (best epoch, weights for timm and labels), last.pt, log.jsonl.
The same command resumes a run that was killed and repeats no finished seed; SIGTERM saves and exits with 75.
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
    arch="vit_small_patch16_224",   # any timm model with a linear head
    model_args={},                  # arguments of timm.create_model; of a DenseNet {"drop_path_rate": null}
    in_chans=1,                     # 1 | 3; channels of the input; grey images are repeated to 3
    img_size=224,                   # side of the network's input in pixels
    mean=None,                      # mean of pixels in 0..1, one or one a channel; none: ImageNet, grey 0.485
    std=None,                       # standard deviation, likewise; none: ImageNet, grey 0.229
    init="random",                  # random | timm[:NAME] | torchvision[:NAME] | exp:KEY | a checkpoint file
    init_key="",                    # load only names with this in them, as student; none: of several the EMA
    channel_adapt="average",        # average | sum | duplicate | duplicate_mean; first layer 3 to 1, 1 to 3
    dataset="nih",                  # folder below --data with manifest.csv and images.npy
    label_names="",                 # columns to learn, in this order, as in A,C; none: all the manifest has
    labels=1.0,                     # share of the training patients of each finding whose labels are used
    uncertain="zeros",              # zeros | ones | ignore; what -1 in a label column counts as
    blank="zero",                   # zero | ignore; what a blank label cell counts as
    pos_weight=None,                # of positives in training, not val_loss: a number, one a label, balanced
    recipe="deit",                  # a | b | deit | resnet; deit: these defaults, others change some of them
    optimizer="adamw",              # adamw | adam | sgd; sgd has Nesterov's momentum, 0.9
    lr=6.25e-5,                     # peak of the learning rate, whatever the batch
    warmup_lr=1e-6,                 # learning rate at the start of the warm-up
    warmup_epochs=5,                # epochs of linear warm-up to the peak, of the cosine schedule alone
    min_lr=1e-5,                    # learning rate at the end of the cosine, which spans all epochs
    schedule="cosine",              # cosine | plateau; plateau: halved after > 5 epochs without a lower loss
    wd=0.05,                        # weight decay
    drop_path=0.1,                  # stochastic depth of the last block, linear from 0
    select="auc",                   # auc | loss; best epoch by highest mean validation AUC or lowest loss
    crop_pct=0.875,                 # share of a validation image's side in its central crop; of a probe 1
    epochs=30,                      # passes over the images
    batch=64,                       # images per optimiser step, all processes together
    patience=10,                    # stop after more than so many epochs without a lower validation loss
    crop_scale=[0.08, 1.0],         # area of the random resized crop, range of fractions
    rotation=7.0,                   # degrees, either way
    seed=0,                         # of the row's pre-training; as a flag: this one instead of seeds
    seeds="0,11,21,42,100",         # one fine-tuning run each, one after the other; comma-separated
    variant="corrected",            # corrected | paper; paper steps the cosine of recipes a and b by the loss
)
FLAGS = dict(                       # of the command line only, not of a row
    exp="",                         # row of experiments.yaml, as in 3.4; none: the defaults
    experiments="",                 # file of the rows; none: the experiments.yaml above this script
    miniature=False,                # override the row by the block `miniature` of that file
    data="data",                    # folder of the packed datasets
    train="",                       # manifest.csv to train on; none: <data>/<dataset>/manifest.csv
    val="",                         # manifest.csv to choose the best epoch on; none: that of --train
    train_split="train",            # splits to use, comma-separated, or all
    val_split="val",                # likewise
    out="",                         # folder of the seeds; none: runs/<exp>/finetune, runs/<exp>/probe
    device="",                      # cpu | cuda; default cuda where there is one
    steps=0,                        # stop each seed after so many steps of the schedule; 0: all
    resume="auto",                  # auto | never; auto: from last.pt, if any; for changed code take never
    micro_batch=0,                  # images per pass and process, gradients accumulate; 0: all at once
    log_steps=50,                   # steps between two lines of the log; 0: only those of validation
    save_minutes=10.0,              # minutes between two writes of last.pt
    compile=False,                  # torch.compile the network; the first step takes minutes
    probe=False,                    # a linear probe of the frozen backbone instead, without pos_weight
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
    options("finetune")

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import distributed as dist, nn
from torchvision.transforms.functional import center_crop, pil_to_tensor, rgb_to_grayscale


def augment(images, u, config):
    """Training views [B, in_chans, S, S]: bilinear crop of area crop_scale, flip, rotation; normalised.

    images uint8 [B, C, H, W] or a list of [C, H, W]; u uniform [B, >= N_CROP + 1].
    """
    x = random_resized_crop(images, u, config["crop_scale"], config["img_size"], cubic=False)
    return normalise(rotate(x, u[:, N_CROP], config["rotation"]), config)


def validation_view(images, config):
    """Images stretched to img_size / crop_pct (224 of 256), their centre cut out, normalised."""
    size = config["img_size"]
    x = resize(images, round(size / config["crop_pct"]))
    return normalise(center_crop(x, size), config)


def label_loss(logits, values, known, pos_weight=None):
    """Binary cross-entropy summed over known labels; logits, values, known float [B, K]."""
    return F.binary_cross_entropy_with_logits(logits, values, known, pos_weight=pos_weight, reduction="sum")


def positive_weight(wanted, values, known):
    """The weight of positives, float [K] or None, from its key and the training labels, float [N, K]."""
    if wanted == "balanced":
        positives = values.sum(0)
        return (known.sum(0) - positives).clamp_min(1) / positives.clamp_min(1)
    with or_fail(f"take {wanted!r} as pos_weight, a number, {values.shape[1]} numbers or balanced"):
        return None if wanted is None else values.new_tensor(wanted).expand(values.shape[1])


RECIPES = dict(                     # what they change in the defaults, unless flags or row state the key
    deit=dict(),
    a=dict(lr=2.5e-6, min_lr=5e-7, drop_path=0.0, select="loss"),
    b=dict(optimizer="sgd", lr=0.01, warmup_epochs=0, wd=0.0, drop_path=0.0, select="loss"),
    resnet=dict(optimizer="adam", lr=2e-4, schedule="plateau", wd=0.0, drop_path=0.0, select="loss",
                crop_pct=1.0),
)


def make_optimizer(model, config):
    """AdamW, Adam or Nesterov SGD, and the scheduler of its learning rate, stepped once an epoch.

    Biases, norms and what timm's no_weight_decay() names do not decay. The cosine spans all epochs, warm-up
    included, and takes fractions of an epoch too. Source: timm, as in the released code.
    """
    fused = config["optimizer"] != "sgd" or None        # None: PyTorch's choice
    optimizer = create_optimizer_v2(model, config["optimizer"], config["lr"], config["wd"], fused=fused)
    if config["schedule"] == "plateau":
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    return optimizer, CosineLRScheduler(optimizer, config["epochs"], config["min_lr"],
                                        warmup_t=config["warmup_epochs"], warmup_lr_init=config["warmup_lr"])


def initial_model(config):
    """The network of a seed with a new head, and a line on its initial weights."""
    torch.manual_seed(config["seed"])
    model = make_model(config, len(config["label_names"]))
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        fail(f"arch {config['arch']} has no linear head to learn labels with; choose another")
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    before = config.get("start")                        # hash of the weights that the last seed began with
    note = load_backbone(model, config)
    if before not in (None, config.get("start")):
        fail(f"the weights of {config['init']} have changed since the previous seed")
    return model, note


def train(out, config, chosen, data, val, args, rank, world_size, device):
    """Fine-tune a seed. What is random in a step depends on (seed, step): a resumed run is the same run."""
    labels, batch = config["label_names"], config["batch"]
    steps_an_epoch = len(chosen) // batch if batch else 0
    n_steps = config["epochs"] * steps_an_epoch
    if batch % world_size or not n_steps:
        fail(f"--batch {batch} has to be at most the {len(chosen)} images and a multiple of the processes, "
             f"{world_size}; --epochs at least 1")
    # the truth as its own scores: is there a label with an AUC?
    if config["select"] == "auc" and "val_auc" not in scores_of(val.values, val.values, val.known, labels):
        fail("no label has both classes among the validation images, hence no AUC; use --select loss")
    last_step = min(n_steps, args.steps or n_steps)

    model, note = initial_model(config)
    drop_paths = replace_drop_path(model)
    model.to(device, memory_format=torch.channels_last)                     # faster for convolutions
    if device.type == "cuda" and world_size > 1:
        model = timm.layers.convert_sync_batchnorm(model)                   # on CPUs: of each process's share
    if args.compile:
        model.compile()
    optimizer, scheduler = make_optimizer(model, config)
    # variant paper steps the cosine by the loss in place of the epoch, as the released code does
    slipped = config["variant"] == "paper" and config["recipe"] in ("a", "b")
    by_loss = slipped or config["schedule"] == "plateau"
    amp, scaler = mixed_precision(device)
    values, known = data.values.to(device), data.known.to(device)
    pos_weight = positive_weight(config["pos_weight"], values[chosen], known[chosen])
    meter = torch.zeros(2, device=device)                                   # sum of the losses, steps
    # validation loss of each epoch, and what is lowest in the best one; 1e9: not there yet
    curve = torch.full((config["epochs"], 2), 1e9).double()
    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, meter=meter,
                 curve=curve)
    first_step = open_run(out, [args.train, args.val], config, state, args.resume, rank)

    def ended(step):
        """Whether a run ends: after all steps, or more than `patience` epochs without a lower loss."""
        n_stale = step // steps_an_epoch - 1 - curve[:, 0].argmin()
        return step == last_step or n_stale > config["patience"]

    if rank == 0:
        print(f"{out}: {note}; {sum(p.numel() for p in model.parameters()):,} parameters; "
              f"{len(labels)} labels; {len(chosen):,} images, {len(val.values):,} to validate; "
              f"steps {first_step} to {last_step} of {n_steps} on {world_size} x {device}", flush=True)
    net = model                     # what the loop calls; of several processes DDP, which averages gradients
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    local_batch = batch // world_size
    micro = args.micro_batch or local_batch
    local = slice(rank * local_batch, (rank + 1) * local_batch)
    started = saved = time.monotonic()

    for step in range(first_step, last_step):
        if ended(step):
            break
        epoch, number = divmod(step, steps_an_epoch)
        if number == 0 or step == first_step:
            order = np.random.default_rng([config["seed"], epoch]).permutation(chosen)
        places = order[number * batch:][:batch]
        there = send(torch.from_numpy(places), device)                      # the same on the device
        n_known = known[there].sum().clamp_min(1)                           # of the global batch
        truth, seen = values[there[local]], known[there[local]]
        torch.manual_seed(step_seed(config["seed"], step))
        sizes = [N_CROP + 1, len(drop_paths)]                               # numbers drawn for an image
        u, depth = send(torch.rand(batch, sum(sizes))[local], device).split(sizes, 1)
        torch.manual_seed(torch.initial_seed() + rank)                      # for dropout, if any
        views = augment(data.images(places[local]), u, config)

        loss = 0                    # parts of the batch's mean, to be added over passes and processes
        optimizer.zero_grad()
        for begin in range(0, local_batch, micro):
            part = slice(begin, begin + micro)
            set_drop_path(drop_paths, depth[part])
            net.require_backward_grad_sync = begin + micro >= local_batch  # DDP: only after the last pass
            with amp:
                part_loss = label_loss(net(views[part]), truth[part], seen[part], pos_weight) / n_known
            scaler.scale(part_loss * world_size).backward()             # DDP averages over processes
            loss += part_loss.detach()
        scaler.step(optimizer)
        scaler.update()
        meter[0] += sum_over_processes(loss)
        meter[1] += 1

        done, stopping, scores = step + 1, args.stop_asked(), {}
        lr = optimizer.param_groups[0]["lr"]
        if number + 1 == steps_an_epoch:
            model.eval()
            logits = forward_all(model, val.views, len(val.values), len(labels), batch, rank, world_size)
            model.train()
            stop_if_nan([logits], done, out)
            scores = scores_of(logits, val.values, val.known, labels)
            curve[epoch, 0] = scores["val_loss"]
            curve[epoch, 1] = -scores["val_auc"] if config["select"] == "auc" else scores["val_loss"]
            scheduler.step(scores["val_loss"] if by_loss else epoch + 1)
        ending = ended(done)
        if args.log_steps and done % args.log_steps == 0 or scores or ending:
            seconds = (time.monotonic() - started) / (done - first_step)        # a step
            log_line(out, rank, (last_step - done) * seconds, step=done, epoch=epoch + 1,
                     loss=(meter[0] / meter[1]).item(), lr=lr, img_per_s=round(batch / seconds, 1), **scores)
            meter.zero_()
        best = (scores or ending) and curve[:, 1].argmin() == epoch         # without a validation: the first
        if rank == 0 and (stopping or ending or best or time.monotonic() - saved > 60 * args.save_minutes):
            weights = model.state_dict() if best else None
            save_run(out, done, config, state, weights, "classifier", labels=labels, epoch=epoch + 1)
            saved = time.monotonic()
        if stopping and not ending:
            sys.exit(75)                # EX_TEMPFAIL: run the same command again
    if rank == 0:
        if not Path(out, "classifier.pt").exists():
            fail(f"{out}/classifier.pt is gone; last.pt is not of the best epoch: use --resume never")
        print(f"{out}/classifier.pt is of epoch {curve[:, 1].argmin() + 1}", flush=True)


PROBE_C = np.logspace(-4, 0, 5)     # 1e-4 to 1, inverse penalties of the probe, chosen by validation AUC


@torch.no_grad()
def probe(out, config, chosen, data, val, args, rank, world_size, device):
    """Linear probe: logistic regressions on the frozen backbone's standardised features become the head."""
    from sklearn.linear_model import LogisticRegression
    labels = config["label_names"]
    model, note = initial_model(config)
    head = model.to(device).eval().get_classifier()
    if open_run(out, [args.train, args.val], config, {}, args.resume, rank):
        return
    features = lambda x: model.forward_head(model.forward_features(x), pre_logits=True)
    x, val_x = (forward_all(features, part.views, len(part.values), head.in_features, config["batch"], rank,
                            world_size) for part in (data, val))
    if args.stop_asked():
        sys.exit(75)
    if rank > 0:
        return
    print(f"{out}: {note}; {len(chosen):,} images x {head.in_features} features", flush=True)
    x, values, known = x[chosen], data.values[chosen], data.known[chosen]
    mean, sd = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x, val_x = (x - mean) / sd, (val_x - mean) / sd
    model.cpu()
    head.weight.zero_()
    for k in range(len(labels)):
        seen = known[:, k] > 0
        y = values[seen, k]
        if len(y.unique()) < 2:
            head.bias[k] = 10 if y.any() else -10       # for a label of one class: a constant logit
            continue
        fits = [LogisticRegression(C=strength, max_iter=1000).fit(x[seen], y) for strength in PROBE_C]
        score = lambda fit: auc(fit.decision_function(val_x), val.values[:, k], val.known[:, k]) or 0
        best = max(fits, key=score)                     # without an AUC: the strongest penalty
        head.weight[k], head.bias[k] = torch.from_numpy(best.coef_[0]), best.intercept_[0]
    loss = scores_of(head(x), values, known, labels)["val_loss"]
    scores = scores_of(head(val_x), val.values, val.known, labels)
    log_line(out, rank, 0, step=1, epoch=0, loss=loss, **scores)
    head.weight /= sd                                   # standardising becomes part of the head
    head.bias -= head.weight @ mean
    save_run(out, 1, config, {}, model.state_dict(), "classifier", labels=labels, epoch=0)


def auc(logits, values, known):
    """AUC of a label over the images where it is known, float [N] each; None where these are of one class."""
    seen = known > 0
    return float(roc_auc_score(values[seen], logits[seen])) if len(values[seen].unique()) == 2 else None


def scores_of(logits, values, known, labels):
    """val_loss, val_auc_<label> of the labels that have both classes, and val_auc, the mean of these."""
    loss = label_loss(logits, values, known).item() / max(1, known.sum().item())
    found = [auc(*columns) for columns in zip(logits.T, values.T, known.T)]
    aucs = {f"val_auc_{label}": value for label, value in zip(labels, found) if value is not None}
    mean = {"val_auc": sum(aucs.values()) / len(aucs)} if aucs else {}
    return {"val_loss": loss, **mean, **aucs}


def open_labelled(what, manifest, split, config, rank, device):
    """Rows, labels, images and validation views for "training" or "validation"; sets empty label_names.

    Says how many unknown labels count as if they were known, and which labels have one class only.
    """
    rows = read_manifest(manifest, split)
    columns = [name for name in rows if name not in FACTS]
    names = config["label_names"] or columns
    if not names or len({*names} & {*columns}) < len(names):
        fail(f"{manifest} has the label columns {', '.join(columns) or '(none)'}; label_names has to be some "
             f"of them, each once, and is {', '.join(names)}")
    config["label_names"] = names
    values, known = read_labels(manifest, rows, names, config["uncertain"], config["blank"])
    _, certain = read_labels(manifest, rows, names, "ignore", "ignore")
    n_guessed = (known > certain).sum()
    if rank == 0 and n_guessed:
        print(f"note: {n_guessed:,} uncertain or blank {what} labels count as 0 or 1 (--uncertain, --blank)")
    columns = zip(names, values.T, known.T)
    one_class = ", ".join(name for name, x, seen in columns if len(x[seen > 0].unique()) < 2)
    if rank == 0 and one_class:
        print(f"warning: {what} images do not have both classes of {one_class}", file=sys.stderr)
    images = open_images(manifest, rows["path"], config["in_chans"], device)
    views = lambda places: validation_view(images(places), config)
    return argparse.Namespace(rows=rows, images=images, views=views, values=values, known=known)


def check_apart(args, data, val):
    """Refuse to validate on the training images without --val_split all; warn of paths, patients in both."""
    if Path(args.train).samefile(args.val) and "split" not in data.rows and args.val_split != "all":
        fail(f"{args.train} has no column split: give --val another manifest, or validate on the images of "
             "training by --val_split all")
    for column in ("path", "patient"):
        both = {*data.rows.get(column, ())} & {*val.rows.get(column, ())} - {""}
        if both:
            print(f"warning: {len(both):,} {column}s are in training and in validation", file=sys.stderr)


def patient_subset(rows, values, share, seed):
    """Places of the rows of a share of the patients, stratified by finding.

    A patient belongs to the stratum of his rarest finding, or of none. Of each the first patients in a seeded
    order are taken, their number rounded up: every stratum keeps a patient, a smaller share is a subset of a
    larger one, and the order of the rows does not matter.

    Args: rows {column: texts}, where an image with a blank patient is its own patient; values float [N, K],
    1 = finding.
    """
    patients = pd.Series(rows.get("patient", rows["path"]))
    patients = patients.where(patients != "", rows["path"])
    findings = pd.DataFrame(values.numpy()).groupby(patients).max()         # a row a patient, by name
    findings["none"] = 1 - findings.max(axis=1)
    rarest = np.where(findings, findings.sum(), np.inf).argmin(1)
    order = np.random.default_rng(seed).permutation(len(findings))
    stratum = pd.Series(rarest, findings.index).iloc[order]
    members = stratum.groupby(stratum)
    chosen = stratum.index[members.cumcount() / members.transform("size") < share]
    return np.flatnonzero(patients.isin(chosen))


def checkpoint_facts(config):
    """What a checkpoint of ours, named by `init`, says of its network and pixels."""
    if config["init"].partition(":")[0] in ("random", "timm", "torchvision"):
        return {}
    content = read_weights(config["init"], config["arch"])
    keys = "arch", "model_args", "in_chans", "img_size", "mean", "std"
    with contextlib.suppress(KeyError, TypeError, IndexError):              # another maker's has none
        return {key: content[key] for key in keys}
    return {}


def resolve(args, config):
    """The config of a run and its seeds: flags, row and miniature beat checkpoint, recipe and DEFAULTS."""
    flags = [word[2:].split("=")[0] for word in sys.argv if word.startswith("--")]
    stated = {flag.replace("-", "_") for flag in flags}
    if args.exp:
        file = args.experiments or Path(__file__).resolve().parents[1] / "experiments.yaml"
        table = yaml.safe_load(Path(file).read_text())
        row = table[args.exp]
        if "pretrain" in row and "init" not in {*stated, *row.get("finetune", {})}:
            config["init"] = f"exp:{args.exp}"          # the row's own pre-training
        for layer in row, table["miniature"] if args.miniature else {}:
            stated |= {*layer, *layer.get("finetune", {})}
    facts = checkpoint_facts(config)
    if "img_size" in stated:
        facts.get("model_args", {}).pop("img_size", None)
    if "in_chans" in stated and config["in_chans"] != facts.get("in_chans"):
        stated |= {"mean", "std"}                       # the checkpoint's are of other channels
    layers = RECIPES[config["recipe"]] | facts
    config |= {key: value for key, value in layers.items() if key not in stated}
    for key in ("labels", "crop_pct"):
        if not 0 < config[key] <= 1:
            fail(f"{key} is {config[key]}, not a share above 0 and up to 1")
    if args.probe:
        config["crop_pct"] = 1.0                        # it learns from whole images, as they are tested

    def listed(text):                                   # a label's name may have commas, in double quotes
        line = text.strip("[] ").replace("\n", " ")
        words = next(csv.reader([line], skipinitialspace=True))
        return [word.strip(" '") for word in words if word]
    config["label_names"], seeds = listed(config["label_names"]), listed(config.pop("seeds"))
    if "seed" in flags:
        seeds = [str(config["seed"])]
    if not "".join(seeds).isdecimal():
        fail(f"seeds are {seeds}, not whole numbers such as 0,11")
    return fill_defaults(config), [int(seed) for seed in seeds]


def main():
    args, config = options("finetune")
    config, seeds = resolve(args, config)
    args.train = args.train or f"{args.data}/{config['dataset']}/manifest.csv"
    args.val = args.val or args.train
    config |= dict(splits=[args.train_split, args.val_split], probe=args.probe)     # what a resume compares
    args.out = args.out or Path("runs", args.exp, "probe" if args.probe else "finetune")
    rank, world_size, device = init_processes(args.device)
    try:
        args.stop_asked = catch_sigterm()
        data = open_labelled("training", args.train, args.train_split, config, rank, device)
        val = open_labelled("validation", args.val, args.val_split, config, rank, device)
        if rank == 0:
            check_apart(args, data, val)
            print(json.dumps(config))
            cosine = config["schedule"] == "cosine"
            if cosine and config["warmup_epochs"] >= config["epochs"] > 0:
                print("warning: the run ends within its warm-up (--warmup_epochs)", file=sys.stderr)
            if cosine and config["min_lr"] > config["lr"]:
                print("warning: the rate rises to --min_lr, which is above --lr", file=sys.stderr)
        run = probe if args.probe else train
        for seed in seeds:
            config["seed"] = seed
            chosen = patient_subset(data.rows, data.values, config["labels"], seed)
            run(f"{args.out}/seed{seed}", config, chosen, data, val, args, rank, world_size, device)
    except torch.cuda.OutOfMemoryError:
        micro = args.micro_batch or config["batch"] // world_size
        fail(f"GPU memory is too small for {micro} images per pass; try --micro-batch {max(1, micro // 2)}")
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
