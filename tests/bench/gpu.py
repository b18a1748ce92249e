"""One run on a GPU: is everything right there, how fast is it, and the study's question in miniature.

    python tests/bench/gpu.py --out DIR --raw PACKS         nine minutes on one GPU, no network
    python tests/bench/gpu.py --out DIR --device cpu --quick        all of it in small, to see it run

right   tests/test_cuda.py
fast    each script's main() at the study's size on 20,000 drawn images: whole loop, step alone (its input is
        computed once), views alone; against eager loops of timm under autocast, and for GMML and DINO against
        their published input, one image at a time (gpu_plain.py); on a GPU the loop with --compile too
real    GMML on equal numbers of each pack of PACKS (cxr, oct, chest_ct, natural) at 64 pixels, then probe and
        fine-tuning with 5 % of the labels of `pneumonia`, test AUC of five seeds; without --raw on drawn
        images: no answer. starts.py --raw asks the same on a CPU, with intervals
Each part has its share of --minutes, what is left goes to the next; a failure costs what failed and no more.
Writes  --out: gpu.json (card, driver, versions, every figure with its spread, goals met or missed), logs.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
# read out by the mean of the tokens, as in starts.py: GMML teaches the class token nothing
VIT64 = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3,
         "global_pool": "avg", "fc_norm": False}
LABELS = [f"label{k}" for k in range(14)]
SWIN = ["--arch", "swin_base_patch4_window7_224", "--img_size", 192, "--model_args", '{"window_size": 6}']
RESNET = ["--arch", "resnet50", "--recipe", "resnet"]
METHODS = {     # most telling first: script, batch, flags, those of --quick, what makes the input
    "gmml": ("pretrain/gmml.py", 256, [], [], ["draw_step", "make_views"]),
    "dino": ("pretrain/dino.py", 256, [], ["--out_dim", 64, "--hidden_dim", 64], ["make_crops"]),
    "simmim": ("pretrain/simmim.py", 256, SWIN, ["--mask_unit", 8], ["make_views"]),
    "classify resnet50": ("finetune/classify.py", 64, RESNET, ["--recipe", "resnet"], ["augment"]),
    "predict": ("evaluate/predict.py", 64, [], [], []),
    "moco_v3": ("pretrain/moco_v3.py", 256, [], ["--hidden_dim", 64], ["make_views"]),
    "sit": ("pretrain/sit.py", 256, [], ["--hidden_dim", 64], ["draw_step", "make_views"]),
    "supervised": ("pretrain/supervised.py", 256, ["--val_samples", 0], ["--val_samples", 0], ["augment"]),
    "classify": ("finetune/classify.py", 64, [], [], ["augment"]),
}
KINDS = ["cxr", "oct", "chest_ct", "natural"]
SEEDS = [0, 11, 21, 42, 100]


def load(name):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_main(module, *flags):
    """main() with these flags, quiet."""
    sys.argv = [module.__file__, *map(str, flags)]
    with contextlib.redirect_stdout(io.StringIO()):
        module.main()


def draw_pack(folder, n, side, splits, device):
    """n smooth random images with labels, packed; splits {name: number}; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, rng = torch.Generator(device).manual_seed(0), np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, side, side))
    for begin in range(0, n, 1000):
        coarse = torch.rand(min(1000, n - begin), 1, 14, 14, generator=generator, device=device)
        smooth = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255
        images[begin:begin + len(coarse)] = smooth[:, 0].byte().cpu().numpy()
    names = np.repeat(list(splits), list(splits.values()))
    lines = [",".join(["path", "patient", "split", *LABELS])]
    for i, (name, labels) in enumerate(zip(names, rng.integers(0, 2, (n, len(LABELS))))):
        lines.append(",".join([f"{i}.png", str(i), name, *map(str, labels)]))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def spread(values):
    """Median, least, greatest and number of some measurements."""
    return dict(median=statistics.median(values), least=min(values), greatest=max(values), n=len(values))


def rates(lines, batch):
    """Images a second between the lines of a log.jsonl; the steps before the first are left out."""
    pairs = list(zip(lines, lines[1:]))
    return spread([(b["step"] - a["step"]) * batch / (b["time"] - a["time"]) for a, b in pairs])


# --------------------------------------------------------------- fast: one script, in a process of its own

class Measurement:
    """The stages of one script, each on its own; what is known is written after each."""

    def __init__(self, name, args):
        script, batch, flags, small, inputs = METHODS[name]
        self.name, self.quick, self.device, self.pack = name, args.quick, args.device, args.out / "pack"
        self.batch, self.size = (8, 32) if self.quick else (batch, 224)
        self.out = args.out / name.replace(" ", "_")
        self.module, self.inputs, self.calls = load(script), inputs, {}
        flags = ["--model_args", json.dumps(SMALL), *small] if self.quick else flags
        named = dict(zip(flags[::2], flags[1::2]))
        arch, size = named.get("--arch", "vit_small_patch16_224"), named.get("--img_size", self.size)
        self.row = dict(batch=self.batch, script=Path(script).stem, arch=arch, img_size=size)
        source = ["--seeds", 0, "--train"] if "classify" in script else ["--split", "train", "--manifest"]
        self.flags = [*flags, "--device", self.device, *source, self.pack / "manifest.csv"]
        self.flags += ["--resume", "never"]

    def all(self):
        stages = [self.predict] if self.name == "predict" else [self.loop, self.views, self.step, self.flops]
        stages += [self.compiled] if self.name != "predict" and self.device == "cuda" else []
        stages += [self.memory64] if self.name == "gmml" and self.device == "cuda" else []
        stages += [self.pipeline] if self.name in ("gmml", "dino") else []
        stages += [self.eager] if self.name == "gmml" or not self.quick else []     # ViT-S, slow on a CPU
        for stage in stages:
            try:
                stage()
            except (Exception, SystemExit):
                self.row.setdefault("failed", {})[stage.__name__] = traceback.format_exc(limit=-3)
            self.out.with_suffix(".json").write_text(json.dumps(self.row))

    def run(self, stage, steps, every, *flags, batch=None):
        """The script's own loop; the lines of its log."""
        folder = self.out / stage
        call_main(self.module, *self.flags, "--batch", batch or self.batch, "--out", folder, "--steps", steps,
                  "--log-steps", every, *flags)
        file = next(folder.rglob("log.jsonl"))
        return [json.loads(line) for line in file.read_text().splitlines()]

    def rate(self, function, repeats, images):
        """Images a second of calls, each waited for, after two to warm up."""
        wait, found = torch.cuda.synchronize if self.device == "cuda" else int, []
        for _ in range(1 if self.quick else repeats + 2):
            wait()
            begun = time.perf_counter()
            function()
            wait()
            found.append(images / (time.perf_counter() - begun))
        return spread(found if self.quick else found[2:])

    def peak(self):
        """GiB of GPU memory, or of the process."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

    def loop(self):
        for name in self.inputs:
            self.calls[name] = [getattr(self.module, name), None]

            def noted(*args, call=self.calls[name]):
                call[1] = args
                return call[0](*args)
            setattr(self.module, name, noted)
        steps, every = (5, 1) if self.quick else (200, 10) if self.name == "gmml" else (60, 10)
        lines = self.run("loop", steps, every)
        losses = [line["loss"] for line in lines]
        self.row.update(loop=rates(lines, self.batch), peak_gib=self.peak(), loss=losses)

    def views(self):
        everything = lambda: [make(*args) for make, args in self.calls.values()]
        self.row["views"] = self.rate(everything, 20, self.batch)

    def step(self):
        for name, (make, args) in self.calls.items():
            setattr(self.module, name, lambda *_, made=make(*args): made)
        self.row["step"] = rates(self.run("step", *((4, 1) if self.quick else (50, 10))), self.batch)
        for name, (make, _) in self.calls.items():
            setattr(self.module, name, make)

    def compiled(self):
        lines = self.run("compiled", 60, 10, "--compile")                   # compiled before the first line
        self.row.update(compiled=rates(lines, self.batch), compiled_loss=[line["loss"] for line in lines])

    def flops(self):
        """Of the second of two steps, an image; the function that asks for SIGTERM ends each step."""
        counts, batch, asked = [], min(16, self.batch), self.module.catch_sigterm
        with FlopCounterMode(display=False) as counter:
            self.module.catch_sigterm = lambda: lambda: counts.append(counter.get_total_flops())
            self.run("flops", 2, 1, batch=batch)
        self.module.catch_sigterm = asked
        self.row["flops"] = (counts[1] - counts[0]) / batch

    def memory64(self):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.run("memory64", 3, 1, batch=64)
        self.row["peak_gib_64"] = self.peak()

    def eager(self):
        batch = 2 if self.quick else self.batch
        step = load("tests/bench/gpu_plain.py").plain_step(self.name, self.module, batch, 224, self.device)
        if step:
            self.row["eager"] = self.rate(step, 10, batch)

    def pipeline(self):
        images = np.load(self.pack / "images.npy", mmap_mode="r")
        how = (2, 2, 3) if self.quick else (16, 32, 32)                     # workers, batch, batches
        plain = load("tests/bench/gpu_plain.py")
        self.row["pipeline"] = plain.pipeline_rate(self.name, images, self.size, *how)

    def predict(self):
        self.out.mkdir(exist_ok=True)
        facts = dict(arch="vit_small_patch16_224", model_args=SMALL if self.quick else {}, in_chans=1,
                     img_size=self.size, mean=[0.485], std=[0.229], labels=LABELS, exp=None, seed=0)
        model = timm.create_model(facts["arch"], in_chans=1, num_classes=len(LABELS), **facts["model_args"])
        torch.save(dict(model=model.state_dict(), **facts), self.out / "classifier.pt")
        forward_all, found = self.module.forward_all, []

        def clocked(model, images, n, *rest):
            begun = time.perf_counter()
            outputs = forward_all(model, images, n, *rest)
            found.append(n / (time.perf_counter() - begun))
            return outputs
        self.module.forward_all = clocked
        flags = ["--checkpoint", self.out / "classifier.pt", "--manifest", self.pack / "manifest.csv",
                 "--split", "val", "--device", self.device, "--batch", self.batch,
                 "--out", self.out / "val.csv"]
        for _ in range(4):
            call_main(self.module, *flags)
        self.row.update(loop=spread(found[1:]), peak_gib=self.peak())


def matrix_rate(device):
    """Multiplications and additions a second of large products: bf16 on a GPU, fp32 on a CPU."""
    cuda = device == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, times = torch.randn(side, side, device=device, dtype=dtype), []
    for _ in range(13):
        begun = time.perf_counter()
        a @ a
        torch.cuda.synchronize() if cuda else None
        times.append(time.perf_counter() - begun)
    return spread([2 * side ** 3 / s for s in times[3:]])


# ------------------------------------------------------------------------------------------- the three parts

def right(args, end):
    """Passed, failed and skipped tests of tests/test_cuda.py, the names and messages of the failed."""
    report = args.out / "right.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests/test_cuda.py",
               f"--junitxml={report}"]
    command += ["-k", "gmml or predict"] if args.quick else []
    with open(args.out / "right.txt", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, env=args.env)
        try:
            process.wait(max(1, end - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)                              # pytest reports what it has done
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        finally:
            process.kill()
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {case.get("name"): child.get("message", "")[:500] for case in cases for child in case
           if child.tag in ("failure", "error")}
    skipped = sum(case.find("skipped") is not None for case in cases)
    return dict(passed=len(cases) - len(bad) - skipped, skipped=skipped, failed=bad, code=process.returncode)


def fast(args, end):
    """The measurements of every script, {name: row}, and the rate of matrix products."""
    n, side, train = (96, 40, 64) if args.quick else (20000, 224, 18000)
    draw_pack(args.out / "pack", n, side, dict(train=train, val=n - train), args.device)
    found = dict(matrix=matrix_rate(args.device))
    for names in [list(METHODS)] if args.quick else [[name] for name in METHODS]:   # a process each
        left = end - time.time()
        command = [sys.executable, __file__, "--out", args.out, "--device", args.device, "--method", *names]
        command += ["--quick"] if args.quick else []
        with contextlib.suppress(subprocess.TimeoutExpired), open(args.out / "fast.txt", "a") as log:
            subprocess.run(list(map(str, command)), stdout=log, stderr=log, timeout=max(1, left))
    for name in METHODS:
        file = (args.out / name.replace(" ", "_")).with_suffix(".json")
        found[name] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def side_by_side(args, commands, end):
    """Run scripts at the same time; their output to real.txt."""
    with open(args.out / "real.txt", "a") as log:
        how = dict(stdout=log, stderr=log, env=args.env)
        started = [subprocess.Popen([sys.executable, *map(str, command)], **how) for command in commands]
        try:
            codes = [process.wait(max(1, end - time.time())) for process in started]
        finally:
            for process in started:
                process.kill()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}, see real.txt")


def real(args, end):
    """Epochs of pre-training and {start: {probe, finetune: test AUC of each seed}} on `pneumonia`."""
    kinds, seeds, raw = KINDS[:1 if args.quick else 4], SEEDS[:2 if args.quick else 5], args.raw
    if raw is None:
        raw = args.out / "drawn"
        for kind in kinds:
            draw_pack(raw / kind, 64, 64, dict(pretrain=64), args.device)
        draw_pack(raw / "pneumonia", 96, 28, dict(train=32, val=32, test=32), args.device)
    test = raw / "pneumonia/manifest.csv"
    manifests = {kind: raw / kind / "manifest.csv" for kind in kinds}
    numbers = [pd.read_csv(manifest)["split"].eq("pretrain").sum() for manifest in manifests.values()]
    common = ["--arch", "vit_small_patch16_224", "--model_args", json.dumps(SMALL if args.quick else VIT64),
              "--device", args.device, "--resume", "never", "--log-steps", 5]
    end += 45                               # rather late than nothing

    def pretrain(out, epochs):
        flags = ["--batch", 64, "--lr", 2e-3, "--epochs", epochs, "--warmup_epochs", epochs // 10, *common]
        flags += ["--samples", min(numbers)]
        side_by_side(args, [[ROOT / "pretrain/gmml.py", "--manifest", manifests[kind],
                             "--out", args.out / out / kind, *flags] for kind in kinds], end)
    epochs = 2
    if not args.quick:                      # as many as take a fifth of the time, by a few at the same load
        pretrain("timed", 5)
        logs = [file.read_text().splitlines() for file in (args.out / "timed").rglob("log.jsonl")]
        pairs = [(json.loads(lines[0]), json.loads(lines[-1])) for lines in logs]
        slowest = max((b["time"] - a["time"]) / (b["step"] - a["step"]) * b["step"] / 5 for a, b in pairs)
        epochs = max(5, min(1000, int(0.2 * (end - time.time()) / slowest)))
    pretrain("pretrained", epochs)
    starts = {"random": "random"} | {kind: args.out / "pretrained" / kind / "backbone.pt" for kind in kinds}
    flags = ["--train", test, "--labels", 0.05 if args.raw else 1.0, "--batch", 32, "--lr", 5e-4,
             "--warmup_epochs", 1, "--epochs", 2 if args.quick else 30,
             "--seeds", ",".join(map(str, seeds)), *common]
    ways = dict(probe=["--probe"], finetune=[])
    pairs = [(way, name) for way in ways for name in starts]
    side_by_side(args, [[ROOT / "finetune/classify.py", *flags, *ways[way], "--init", starts[name],
                         "--out", args.out / way / name] for way, name in pairs], end)
    predict, table = load("evaluate/predict.py"), {}
    for way, name in pairs:
        for seed in seeds:
            out = args.out / way / name / f"seed{seed}"
            call_main(predict, "--checkpoint", out / "classifier.pt", "--manifest", test,
                      "--out", out / "test.csv", "--device", args.device)
            cells = np.genfromtxt(out / "test.csv", delimiter=",", names=True)
            label = next(column for column in cells.dtype.names if column.startswith("true_"))
            auc = roc_auc_score(cells[label], cells[label.replace("true_", "prob_")])
            table.setdefault(name, {}).setdefault(way, []).append(float(auc))
    return dict(epochs=epochs, drawn=args.raw is None, auc=table)


# ------------------------------------------------------------------------------------------------ the result

def goals(found):
    """The goals with their values; None where something was not measured, which misses the goal."""
    median = lambda row, key: row[key]["median"] if key in row else None
    ratio = lambda a, b: a / b if a and b else None

    def ratios(a, b):
        rows = [found.get(name, {}) for name in METHODS]
        return [median(row, a) / median(row, b) for row in rows if a in row and b in row]
    gmml = found.get("gmml", {})
    loop, step, eager = (median(gmml, key) for key in ("loop", "step", "eager"))
    slower = min(gmml.get("pipeline", 0), eager or 0)       # as if the faster hid behind it without loss
    least = lambda values: min(values, default=None)
    table = [("loop / step alone, least of all scripts", least(ratios("loop", "step")), ">=", 0.95),
             ("views / step in time, most", max(ratios("step", "views"), default=None), "<=", 0.1),
             ("step / eager timm under autocast, least", least(ratios("step", "eager")), ">=", 1.05),
             ("compiled loop / eager timm under autocast, least", least(ratios("compiled", "eager")), ">=", 1.3),
             ("GMML loop / published pipeline and eager step", ratio(loop, slower), ">=", 8),
             ("GMML step, share of the matrix rate",
              ratio(gmml.get("flops", 0) * (step or 0), median(found, "matrix")), ">=", 0.25),
             ("row 3.4, 1,000 epochs of 100,000 images, hours", ratio(1e8 / 3600, loop), "<=", 12),
             ("GMML, peak GiB at batch 256", gmml.get("peak_gib"), "<=", 40),
             ("GMML, peak GiB at batch 64", gmml.get("peak_gib_64"), "<=", 15)]
    return [dict(goal=f"{goal} {sign} {limit}", value=value,
                 met=value is not None and (value >= limit if sign == ">=" else value <= limit))
            for goal, value, sign, limit in table]


def show(result):
    """The result as Markdown tables."""
    figure = lambda x: f"{x['median']:,.0f} ({x['least']:,.0f}-{x['greatest']:,.0f})" if x else "-"
    parts = result["parts"]
    print(f"\n{result['card']}; torch {result['torch']}; {result['seconds']:.0f} s")
    checked = parts["right"]
    print(", ".join(f"{checked.get(key)} {key}" for key in ("passed", "skipped", "failed")))
    print("\nImages a second, median (least-greatest)\n")
    print("| script, batch | loop | compiled | step | views | eager timm | pipeline | peak GiB | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in METHODS:
        row = parts["fast"].get(name, {})
        cells = [figure(row.get(key)) for key in ("loop", "compiled", "step", "views", "eager")]
        cells += [f"{row.get(key, float('nan')):,.1f}" for key in ("pipeline", "peak_gib")]
        print(f"| {name}, {row.get('batch')} | {' | '.join(cells)} | {', '.join(row.get('failed', []))} |")
    print("\n| goal, of the study's size on a GPU | value | |\n|---|---|---|")
    for row in result["goals"]:
        met = "in small" if result["quick"] else "met" if row["met"] else "missed"
        print(f"| {row['goal']} | {row['value'] and round(row['value'], 3)} | {met} |")
    study = parts["real"]
    drawn = "drawn images, not an answer" if study.get("drawn") else "mean ± sd of test AUC"
    print(f"\n| start, GMML {study.get('epochs')} epochs; {drawn} | probe | fine-tuned |\n|---|---|---|")
    for name, ways in study.get("auc", {}).items():
        cells = [f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" for values in ways.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    for name, part in parts.items():
        if "error" in part:
            print(f"\n{name} failed:\n{part['error']}")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write into")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="everything in small")
    add("--minutes", type=float, default=9, help="for all parts together (9)")
    add("--raw", type=Path, help="folder of real packs")
    add("--method", choices=METHODS, nargs="+", help=argparse.SUPPRESS)     # measures these scripts alone
    args = parser.parse_args()
    for name in args.method or ():
        Measurement(name, args).all()
    if args.method:
        return
    args.out, args.raw = args.out.resolve(), args.raw and args.raw.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.env = {"OMP_NUM_THREADS": "4", **os.environ, "CUDA_TESTS_ON": args.device}
    begun, result = time.time(), dict(parts={})
    for part, share in ((right, 2 / 9), (fast, 7 / 9), (real, 1)):          # of the time, when it has to end
        try:
            found = part(args, begun + share * args.minutes * 60)
        except Exception:
            found = dict(error=traceback.format_exc(limit=-3))
        result["parts"][part.__name__] = found
        with contextlib.suppress(KeyError):
            result["goals"] = goals(result["parts"]["fast"])
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1))
    versions = {name: sys.modules[name].__version__ for name in ("torch", "numpy", "timm")}
    result.update(card=card(), python=platform.python_version(), **versions, quick=args.quick,
                  seconds=time.time() - begun, goals=result.get("goals", []))
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1))
    show(result)


def card():
    """Name and driver of the GPU, or the processor's."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"no GPU, {os.cpu_count()} cores of {platform.machine()}"


if __name__ == "__main__":
    main()
