"""Time the training scripts against plain loops of the same mathematics, side by side in one process.

Three comparisons for each script, on drawn 224-pixel images, with ratios of medians:
  input  the views of a step, masks drawn, against Pillow and torchvision image by image; both alone and
         warm, the latter's time divided by the cores
  step   everything but the views, against eager timm with PyTorch's default AdamW, a forward a crop, clipping
         and moving averages parameter by parameter; beside it the share of the machine's sgemm rate
  loop   both together, input and step
Beside them the peak memory of two steps in a process of their own, and what an image more in the batch adds.

    python tests/bench/training.py --out bench_training.json              some 25 minutes on two cores
    python tests/bench/training.py --methods gmml predict --steps 3

Writes  a Markdown table on the terminal; --out: JSON, a row a method, with the machine it was measured on.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
CORES = os.cpu_count()
SIZE, N_IMAGES = 224, 64
LABELS = 14


def load(name):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_pack(folder):
    """Smooth random images with labels, packed; returns the manifest."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (N_IMAGES, 14, 14), dtype=np.uint8)
    images = [np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.BICUBIC)) for image in coarse]
    np.save(folder / "images.npy", np.stack(images))
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(N_IMAGES)], "split": "pretrain"})
    names = [f"label{k}" for k in range(LABELS)]
    labels = pd.DataFrame(rng.integers(0, 2, (N_IMAGES, LABELS)), columns=names)
    rows.join(labels).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


# ------------------------------------------------------------------------------------ the scripts as they are

def run_script(module, *flags):
    """main() with these flags, quiet."""
    sys.argv = [module.__file__, *map(str, flags)]
    with contextlib.redirect_stdout(io.StringIO()):
        module.main()


def script_step(module, flags, out, steps):
    """Median seconds of a step of a training script, by the time stamps of its log."""
    run_script(module, *flags, "--out", out, "--steps", steps + 2, "--log-steps", 1, "--resume", "never",
               "--picture-epochs" if "pretrain" in module.__file__ else "--workers", 1000)
    file = next(out.rglob("log.jsonl"))
    times = [line["time"] for line in map(json.loads, file.read_text().splitlines()) if "loss" in line]
    return statistics.median(np.diff(times)[1:])


PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""     # what wait4 says of a process includes the one it was started from


def memory(script, flags, out, batch):
    """MiB of a process of two steps at its peak, and how many an image more in the batch takes."""
    peaks = []
    for size in (batch, 2 * batch):
        command = [sys.executable, "-c", PEAK, ROOT / script, *flags, "--batch", size,
                   "--out", out / f"memory{size}"]
        command += ["--steps", 2] * ("predict" not in script)
        process = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"error: {script} failed; its message is above")
        peaks.append(int(process.stdout.split()[-1]) / 1024)
    return dict(memory=peaks[0], memory_an_image=(peaks[1] - peaks[0]) / batch)


def cached(function):
    """The function, but it computes once for each size and count of images: steps without their input."""
    known = {}

    def recall(images, *args, **how):
        key = (len(images), *(arg for arg in args if isinstance(arg, int)))
        if key not in known:
            known[key] = function(images, *args, **how)
        return known[key].clone()
    return recall


def timed(function, seconds):
    """The function, but it notes how long it takes."""
    def clocked(*args):
        begun = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - begun)
        return result
    return clocked


def noted(function, calls):
    """The function, but it notes its arguments."""
    def noting(*args):
        calls.append(args)
        return function(*args)
    return noting


INPUT = {   # what makes a step's input, after plan_step where there is one
    "gmml": "make_views", "sit": "make_views", "dino": "make_crops", "moco_v3": "make_views",
    "simmim": "make_views", "supervised": "augment", "classify": "augment"}
VIEWS = {   # what makes the views of a script
    "gmml": "augment", "sit": "augment", "dino": "strong_view", "moco_v3": "strong_view",
    "simmim": "random_resized_crop", "supervised": "augment", "classify": "augment"}


# --------------------------------------------------------------- views by Pillow and torchvision, one by one

class Pillow(Dataset):
    """uint8 images through a transform, as a data loader of the publications does it."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return 10 ** 6

    def __getitem__(self, index):
        random.seed(index)
        torch.manual_seed(index)
        return self.transform(Image.fromarray(self.images[index % len(self.images)]))


def finish(*transforms):
    return T.Compose([*transforms, T.ToTensor(), T.Normalize([0.485], [0.229])])


class Blur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


class DropBlocks:
    """Block after block of noise until three quarters (at most) are covered, as GMML's loader does it."""

    def __call__(self, image):
        mask, target = torch.zeros(image.shape[1:], dtype=torch.bool), random.uniform(0.5, 0.75)
        while mask.float().mean() < target:
            top, left = (random.randrange(SIZE) for _ in range(2))
            h, w = (random.randrange(1, int(0.3 * SIZE)) for _ in range(2))
            mask[top:top + h, left:left + w] = True
            block = image[:, top:top + h, left:left + w]
            block.normal_()
        return image, mask


def gmml_views():
    view = finish(T.RandomResizedCrop(SIZE, (0.05, 1), interpolation=T.InterpolationMode.BICUBIC),
                  T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.1, 0.1, 0.1, 0.01)], 0.3),
                  Blur(0.1))
    corrupt = DropBlocks()

    def both(image):
        clean = [view(image), view(image)]
        return [(x, *corrupt(x.clone())) for x in clean]
    return both


def strong(scale, size, blur, solarise, how=T.InterpolationMode.BICUBIC):
    return finish(T.RandomResizedCrop(size, scale, interpolation=how),
                  T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                  T.RandomGrayscale(0.2), Blur(blur),
                  T.Lambda(lambda x: ImageOps.solarize(x) if random.random() < solarise else x))


def dino_views():
    crops = [strong((0.4, 1), SIZE, 1.0, 0.0), strong((0.4, 1), SIZE, 0.1, 0.2)]
    crops += [strong((0.05, 0.4), 96, 0.5, 0.0)] * 8
    return lambda image: [crop(image) for crop in crops]


def moco_views():
    crops = [strong((0.08, 1), SIZE, *shares, T.InterpolationMode.BILINEAR)
             for shares in ((1.0, 0.0), (0.1, 0.2))]
    return lambda image: [crop(image) for crop in crops]


def simmim_views():
    view = finish(T.RandomResizedCrop(SIZE, (0.67, 1)), T.RandomHorizontalFlip())

    def masked(image):
        units = np.zeros(49, bool)
        units[np.random.permutation(49)[:30]] = True
        return view(image), torch.from_numpy(units.reshape(7, 7).repeat(32, 0).repeat(32, 1))
    return masked


def label_views():
    return finish(T.RandomResizedCrop(SIZE, (0.08, 1)), T.RandomHorizontalFlip(), T.RandomRotation(7))


# ---------------------------------------------------------------------- plain loops of the same mathematics

def plain_vit(drop_path):
    return timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, drop_path_rate=drop_path)


def plain_update(model, loss, optimizer, clip=3.0):
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        if clip and parameter.grad is not None:
            nn.utils.clip_grad_norm_([parameter], clip)
    optimizer.step()


def plain_average(teacher, student, momentum=0.996):
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters()):
            slow.mul_(momentum).add_((1 - momentum) * fast)


def plain_gmml(module):
    model = module.GMML(plain_vit(0.1), 1)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(views):
        losses = [((model(spoilt) - clean).abs() * mask[:, None]).sum() / mask.sum()
                  for clean, spoilt, mask in views]
        plain_update(model, sum(losses) / 2, optimizer)
    return model, step


def plain_nce(q, k, temperature=0.2):
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


def plain_sit(module):
    model = module.SiT(plain_vit(0.1), 1)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(views):
        with torch.no_grad():
            keys = [teacher.embed(clean)[0] for clean, _, _ in views]
        outputs = [model(spoilt) for _, spoilt, _ in views]
        losses = [((recon - clean).abs() * mask[:, None]).sum() / mask.sum()
                  for (_, recon), (clean, _, mask) in zip(outputs, views)]
        contrast = plain_nce(outputs[0][0], keys[1]) + plain_nce(outputs[1][0], keys[0])
        plain_update(model, contrast + 5 * sum(losses) / 2, optimizer)
        plain_average(teacher, model)
    return model, step


def plain_dino(module):
    vit = plain_vit(0.1)
    vit.patch_embed.strict_img_size = False
    model = module.DINO(vit)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    for drop_path in model.drop_paths:
        drop_path.kept = torch.ones(1)
    optimizer, centre = torch.optim.AdamW(model.parameters()), torch.zeros(65536)

    def step(crops):
        with torch.no_grad():
            targets = [teacher([crop[None]])[0][0] for crop in crops[:2]]
        outputs = [model([crop[None]])[0][0] for crop in crops]
        loss, terms = 0, 0
        for i, target in enumerate(targets):
            for j, output in enumerate(outputs):
                if i != j:
                    p = F.softmax((target - centre) / 0.04, -1)
                    loss, terms = loss - (p * F.log_softmax(output / 0.1, -1)).sum(-1).mean(), terms + 1
        plain_update(model, loss / terms, optimizer)
        plain_average(teacher, model)
        centre.mul_(0.9).add_(0.1 * torch.cat(targets).mean(0))
    return model, step


def plain_moco(module):
    config = {**module.DEFAULTS, "mean": [0.485], "std": [0.229]}
    model = module.MoCo(module.make_backbone(config)[0], config["hidden_dim"], config["out_dim"])
    slow = copy.deepcopy(model.base_encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step(views):
        queries = [model(view[None])[0] for view in views]
        plain_average(slow, model.base_encoder, 0.99)
        with torch.no_grad():
            keys = [slow(view[None])[0][0] for view in views]
        loss = 2 * 0.2 * (plain_nce(queries[0], keys[1]) + plain_nce(queries[1], keys[0]))
        plain_update(model, loss, optimizer, clip=None)
    return model, step


def plain_simmim(module):
    model = module.SimMIM(plain_vit(0.0), 1, SIZE)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(views):
        clean, mask = views
        loss = ((model(clean, mask) - clean).abs() * mask[:, None]).sum() / mask.sum()
        plain_update(model, loss, optimizer, clip=None)
        return loss
    return model, step


def plain_classifier(arch, drop_path, clip=None):
    def make(module):
        model = timm.create_model(arch, num_classes=LABELS, in_chans=1, drop_path_rate=drop_path)
        optimizer = torch.optim.AdamW(model.parameters())

        def step(x):
            loss = F.binary_cross_entropy_with_logits(model(x), torch.zeros(len(x), LABELS))
            plain_update(model, loss, optimizer, clip)
        return model, step
    return make


def plain_prediction(module):
    model = timm.create_model("vit_small_patch16_224", num_classes=LABELS, in_chans=1).eval()

    def step(x):
        with torch.no_grad():
            model(x).sigmoid()
    return model, step


TRAIN = ["--train-split", "pretrain", "--val-split", "pretrain", "--seeds", 0]
METHODS = {     # name: script, its flags, views by Pillow, plain loop, images a step
    "gmml": ("pretrain/gmml.py", [], gmml_views, plain_gmml, 8),
    "sit": ("pretrain/sit.py", ["--drop", 0.75], gmml_views, plain_sit, 8),
    "dino": ("pretrain/dino.py", [], dino_views, plain_dino, 8),
    "moco_v3": ("pretrain/moco_v3.py", [], moco_views, plain_moco, 8),
    "simmim": ("pretrain/simmim.py", [], simmim_views, plain_simmim, 16),
    "supervised": ("pretrain/supervised.py", ["--val_samples", 0], label_views,
                   plain_classifier("vit_small_patch16_224", 0.1, clip=3.0), 16),
    "classify": ("finetune/classify.py", TRAIN, label_views,
                 plain_classifier("vit_small_patch16_224", 0.1), 16),
    "classify resnet50": ("finetune/classify.py", [*TRAIN, "--arch", "resnet50", "--recipe", "resnet"],
                          label_views, plain_classifier("resnet50", 0.0), 16),
    "predict": ("evaluate/predict.py", [], None, plain_prediction, 32),
}


# -------------------------------------------------------------------------------------------- the measurement

def median_seconds(function, repeats):
    function()                                                              # warm up
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def sgemm_rate():
    """Floating-point operations a second of a large fp32 matrix product on all cores."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / median_seconds(lambda: a @ b, 10)


def measure(name, manifest, folder, steps):
    """A row of the table: seconds an image of input, step and loop, of the script and of the plain loop."""
    script, flags, views, plain, batch = METHODS[name]
    module, images = load(script), np.load(manifest.parent / "images.npy")
    row = dict(method=name, batch=batch)
    if name == "predict":
        return {**row, **measure_prediction(module, manifest, folder, plain, batch, steps)}
    source = "--train" if script.startswith("finetune") else "--manifest"
    flags = [*flags, source, manifest, "--device", "cpu", "--warmup_epochs", 1]
    row.update(memory(script, flags, folder, batch))
    flags += ["--batch", batch]
    parts = {part: (getattr(module, part), []) for part in ("plan_step", INPUT[module.__name__])
             if hasattr(module, part)}
    for part, (function, calls) in parts.items():
        setattr(module, part, noted(function, calls))
    row["loop"] = script_step(module, flags, folder / "loop", steps) / batch
    row["input"] = median_seconds(lambda: [function(*calls[-1]) for function, calls in parts.values()],
                                  steps) / batch
    for part, (function, _) in parts.items():
        setattr(module, part, function)
    makes = VIEWS[module.__name__]
    setattr(module, makes, cached(getattr(module, makes)))
    row["step"] = script_step(module, flags, folder / "step", steps) / batch

    _, step = plain(load(script))
    pillow = Pillow(images, views())
    first = default_collate([pillow[i] for i in range(batch)])
    with FlopCounterMode(display=False) as counter:
        step(first)
    row["flops"] = counter.get_total_flops() / batch
    row["plain_step"] = median_seconds(lambda: step(first), steps) / batch
    batches = iter(DataLoader(pillow, batch, num_workers=CORES))
    row["plain_loop"] = median_seconds(lambda: step(next(batches)), steps) / batch
    one_by_one = median_seconds(lambda: [pillow[i] for i in range(batch)], steps)
    row["plain_input"] = one_by_one / batch / CORES         # as if the workers shared it without loss
    return row


def measure_prediction(module, manifest, folder, plain, batch, steps):
    """Predicting packed images with a classifier.pt, against an eager forward of a tensor at hand."""
    model, step = plain(module)
    flags = ["--checkpoint", folder / "classifier.pt", "--manifest", manifest, "--split", "pretrain",
             "--device", "cpu"]
    facts = dict(arch="vit_small_patch16_224", model_args={}, in_chans=1, img_size=SIZE, mean=[0.485],
                 std=[0.229], labels=[f"label{k}" for k in range(LABELS)])
    torch.save(dict(model=model.state_dict(), exp=None, seed=0, epoch=0, config=dict(crop_pct=0.875),
                    **facts), folder / "classifier.pt")
    seconds = []
    module.forward_all = timed(module.forward_all, seconds)
    for _ in range(max(2, steps // 2)):
        run_script(module, *flags, "--out", folder / "p.csv", "--batch", batch)
        (folder / "p.csv").unlink()
    x = torch.randn(batch, 1, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        step(x)
    return dict(loop=statistics.median(seconds) / N_IMAGES, flops=counter.get_total_flops() / batch,
                plain_step=median_seconds(lambda: step(x), steps) / batch,
                **memory("evaluate/predict.py", flags, folder, batch))


def markdown(rows, rate):
    """The rows as a table: images a second of the script, ratios to the plain loop, share of sgemm."""
    ratio = lambda row, what: f"{row[f'plain_{what}'] / row[what]:.2f}" if row.get(what, 0) > 0 else "–"
    lines = ["| script, batch | loop, img/s | input | step | loop | step, share of sgemm | peak, MiB | "
             "an image, MiB |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["method"] == "predict":
            row = {**row, "plain_loop": row["plain_step"]}
        share = row["flops"] / row.get("step", row["loop"]) / rate
        ratios = " | ".join(ratio(row, what) for what in ("input", "step", "loop"))
        lines.append(f"| {row['method']}, {row['batch']} | {1 / row['loop']:.1f} | {ratios} | {share:.0%} | "
                     f"{row['memory']:.0f} | {row['memory_an_image']:.0f} |")
    return "\n".join(lines)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=6, help="steps timed of each (6)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(CORES)
    rate, rows = sgemm_rate(), []
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, draw_pack(Path(folder)), Path(folder), args.steps))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows, rate))
    print(f"\nsgemm: {rate / 1e9:.0f} GFLOP/s on {CORES} cores; ratios above 1: the script is faster.")
    if args.out:
        machine = dict(cores=CORES, machine=platform.machine(), torch=torch.__version__,
                       timm=timm.__version__)
        args.out.write_text(json.dumps(dict(sgemm=rate, machine=machine, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
