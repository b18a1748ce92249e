"""Prediction: a trained classifier's probability of every label, for packed test sets or a folder of files.

    python evaluate/predict.py --checkpoint classifier.pt --manifest data/nih/manifest.csv --out nih_test.csv
    python evaluate/predict.py --checkpoint run/seed*/classifier.pt --out 'predictions/seed{seed}' \\
        --set nih_test=data/nih/manifest.csv:test --set padchest=data/padchest/manifest.csv:test
    python evaluate/predict.py --checkpoint classifier.pt --images my_radiographs --out predictions.csv
    python evaluate/predict.py --checkpoint backbone.pt --features --images my_radiographs --out features.csv
Reads   classifier.pt of finetune/classify.py; manifest.csv and images.npy beside it (without it the 8-bit PNG
        and JPEG files named in `path`), or all files below a folder, which data_prep/pack.py packs first.
Writes  --out: path, patient, true_<label> (1, 0, blank: unknown) and prob_<label> of the labels that the
        manifest has under any of their spellings ("Pleural Effusion" is Effusion), if not blank in every row,
        in the order of the classifier; prob_<label> of all where it has none. Beside it, under its name,
        .json: checkpoint, exp, seed, manifest (or folder), split, n, test_crops, and stand_in: the mark of
            stand-ins among the images of this set or of training, else null;
        .npy (--features): float32 [n, D], the last layer's input, timm's forward_head(pre_logits=True);
        .csv.rejected.csv (--images): path and reason of every file that pack.py could not read.
Computed in fp32; any number of processes writes the same bytes. Exit code 3: some files of --images were
rejected, all others predicted (under torchrun 1, as any failure).
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ.get("RANK", 0))                   # of torchrun; plain python is one process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


@contextlib.contextmanager
def or_fail(doing):
    """Turn an exception about a user's file or value into one sentence: cannot <doing>: <reason>."""
    try:
        yield
    except Exception as problem:
        text = " ".join(str(getattr(problem, "strerror", None) or problem).split())
        if "weights_only" in text:                      # of torch.load: name the object it refuses, if any
            text = re.search(r"GLOBAL [\w.]+|$", text)[0] or "no checkpoint"
        fail(f"cannot {doing}: {text[:300] or type(problem).__name__}")


def named_set(text):
    """NAME=MANIFEST[:SPLIT], of a flag: the file's name below --out, manifest, split."""
    name, manifest = text.split("=", 1)
    manifest, _, split = manifest.partition(":")
    return f"/{name}.csv", manifest, split


def options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                 # one sentence, like every other mistake
    add = parser.add_argument
    add("--checkpoint", required=True, nargs="+", help="classifier.pt, or several; --features: backbone.pt")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--manifest", help="manifest.csv of the images")
    what("--images", help="folder of image files of any kind that pack.py reads")
    what("--set", action="append", type=named_set,
         help="NAME=MANIFEST[:SPLIT]; may be repeated, --out is then the folder of <NAME>.csv")
    add("--split", default="test", help="splits, comma-separated, or all; no column split: all rows [test]")
    add("--out", required=True, help="the .csv to write; {seed} in it becomes that of the checkpoint")
    add("--mask", action="store_true", help="leave true_<label> of -1 and blank cells blank; else it is 0")
    add("--test-crops", type=int, choices=[1, 10], default=1, help="views averaged an image [1]")
    add("--features", action="store_true", help="write the pooled features, too, into the .npy beside --out")
    add("--keep", action="store_true", help="keep <out>.pack, the pack of --images")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--batch", type=int, default=64, help="images a pass [64]")
    args = parser.parse_args()
    if not args.set and Path(args.out).suffix != ".csv":
        fail(f"--out {args.out}: give the name of a .csv")
    return args


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take seconds
    options()

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import distributed as dist
from torchvision.transforms.functional import normalize, pil_to_tensor, resize, rgb_to_grayscale, ten_crop


def load_network(file, features):
    """The network of a checkpoint and the facts beside its weights; for features it needs no labels."""
    with or_fail(f"find in {file} what a classifier.pt has (finetune/classify.py --init makes one of it)"):
        facts = torch.load(file, map_location="cpu", weights_only=True)
        facts["file"] = file
        if features:
            facts.setdefault("labels", [])
        normalise(torch.zeros(1, 1, 1, 1), facts)           # mean and std are those of its channels
        args = {}
        if getattr(timm.get_pretrained_cfg(facts["arch"]), "fixed_input_size", False):
            args["img_size"] = facts["img_size"]
        args |= facts["model_args"]
        model = timm.create_model(
            facts["arch"], in_chans=facts["in_chans"], num_classes=len(facts["labels"]), **args)
        model.load_state_dict(facts["model"])
    return model.eval(), facts


def normalise(x, facts):
    """Pixels 0-255 [B, 1 or 3, H, W] to the network's input [B, in_chans, H, W]; grey is repeated."""
    if x.shape[1] > facts["in_chans"]:
        x = rgb_to_grayscale(x)
    x = x.expand(-1, facts["in_chans"], -1, -1)
    return normalize(x / 255, facts["mean"], facts["std"])


def views(images, size, crops):
    """Whole images, or ten crops of larger ones (256 for 224): a list of float [B, C, size, size], 0-255."""
    side = size if crops == 1 else round(size * 256 / 224)
    x = torch.stack([resize(image.float(), [side, side]) for image in images])
    return [x] if crops == 1 else ten_crop(x, size)


@torch.inference_mode()
def forward_all(model, images, n, facts, batch, crops, device):
    """Probabilities and features of n images, means over their views: float32 [n, K + D] in all processes."""
    n_labels = len(facts["labels"])
    outputs = torch.zeros(n, n_labels + model.head_hidden_size, device=device)
    for begin in range(RANK * batch, n, WORLD_SIZE * batch):                # the same batches on any number
        places = np.arange(begin, min(begin + batch, n))
        for view in views(images(places), facts["img_size"], crops):
            maps = model.forward_features(normalise(view.to(device), facts))
            features = model.forward_head(maps, pre_logits=True)
            logits = model.forward_head(maps)[:, :n_labels].double()        # none in a backbone
            probabilities = logits.sigmoid().where(logits.isfinite(), torch.nan)
            outputs[begin:begin + batch] += torch.cat([probabilities, features], 1) / crops
    outputs = outputs.cpu()
    if WORLD_SIZE > 1:
        dist.all_reduce(outputs)                        # the others hold zeros in these rows: an exact sum
    return outputs


def means(column, label):
    """Whether a column is about a label: case, spaces and underscores apart; any kind of atelectasis is."""
    plain = [re.sub(r"[\W_]", "", name).lower() for name in (column, label)]
    column, label = [name.replace("pleuraleffusion", "effusion") for name in plain]
    return column == label or label == "atelectasis" and label in column


def truth(manifest, rows, labels):
    """1, 0 or NaN (unknown) of every row, for labels that are not blank throughout: a frame, float [n, K]."""
    codes = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": 0.5, "-1.0": 0.5, "": 0.5}
    known = {}
    for label in labels:
        names = [label] if label in rows else [name for name in rows if means(name, label)]
        for name in names:
            for row, cell in zip(rows["row"], rows[name]):
                if cell not in codes:
                    fail(f"{manifest} row {row}: label '{name}' is '{cell}'; expected 1, 0, -1 or blank")
            if any(rows[name]):
                values = [codes[cell] for cell in rows[name]]
                known[label] = np.maximum(values, known.get(label, 0))      # 1 counts, unknown hides 0
    return pd.DataFrame(known).replace(0.5, np.nan)


def write_atomic(path, write):
    """Let write(file) fill a temporary file, flush, rename: a crash leaves the old file or the new one."""
    part = Path(f"{path}.part")
    with or_fail(f"write {path}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def pack_folder(folder, facts, args):
    """Pack all files below --images into a folder by data_prep/pack.py; returns how many it rejected."""
    here = Path(__file__).resolve().parent
    packer = next(here.glob("pack.py"), here.parent / "data_prep/pack.py")
    if not packer.is_file():
        fail(f"--images needs pack.py, which reads the files; copy it to {here}")
    root, index, rejected = Path(args.images), folder / "index.csv", folder / "rejected.csv"
    found = [file for file in root.rglob("*") if file.is_file() or file.is_symlink()]
    if not found:
        fail(f"--images {root} is not a folder with files; check the path")
    rows = sorted((file.relative_to(root).as_posix(), file.lstat().st_mtime_ns) for file in found)
    # "changed" tells a kept pack from older files; path is last: the \r of macOS's "Icon\r" then ends the row
    rows = pd.DataFrame(rows, columns=["path", "changed"])[["changed", "path"]]
    write_atomic(index, lambda file: rows.to_csv(file, mode="wb", index=False, errors="replace"))
    command = [sys.executable, packer, "--index", index, "--raw", root, "--out", folder,
               "--size", facts["img_size"], "--channels", facts["in_chans"]]
    done = subprocess.run(map(str, command), stderr=subprocess.PIPE, errors="replace")
    beside = folder.with_suffix(".rejected.csv")            # the predictions
    if rejected.is_file():
        write_atomic(beside, lambda file: file.write(rejected.read_bytes()))    # a kept pack has it again
    if done.returncode:
        said = done.stderr.replace(str(rejected), str(beside)).strip()
        fail(f"--images {args.images} cannot be packed: {said.rpartition('error: ')[2]}")
    return len(pd.read_csv(beside))


def predict(model, facts, manifest, split, file, args, device):
    """Predict the images of a manifest; process 0 writes them to `file`, facts and features beside it."""
    own = file.resolve() == Path(manifest).resolve() or file.stem in ("images", "manifest", "pack")
    if own:                                             # .json and .npy get the same stem
        fail(f"--out {file}: give a name other than {manifest}, images, manifest or pack")
    rows, labels = read_manifest(manifest, split), facts["labels"]
    known = truth(manifest, rows, labels)
    marks = {read_pack(manifest).get("stand_in"), facts.get("stand_in")} - {None}
    images, n = open_images(manifest, rows["path"], facts["in_chans"], device), len(rows["path"])
    outputs = forward_all(model, images, n, facts, args.batch, args.test_crops, device).numpy()
    for place in np.flatnonzero(~np.isfinite(outputs).all(1))[:1]:
        fail(f"{facts['file']} gives NaN or infinity for {rows['path'][place]}; it has diverged")
    if RANK > 0:
        return
    card = {"checkpoint": facts["file"], "exp": facts.get("exp"), "seed": facts.get("seed"),
            "manifest": args.images or manifest, "split": split, "n": n, "test_crops": args.test_crops,
            "stand_in": "; ".join(sorted(marks)) or None}
    columns = pd.DataFrame({"path": rows["path"], "patient": rows.get("patient", "")})
    scores = pd.DataFrame(outputs[:, :len(labels)], columns=labels)[list(known) or labels]
    true = known if args.mask else known.fillna(0)
    table = pd.concat([columns, true.add_prefix("true_"), scores.add_prefix("prob_")], axis=1)

    def save(stream):
        table.to_csv(stream, mode="wb", index=False, float_format="%.8g", lineterminator="\n")
        stream.flush()
        file.unlink(missing_ok=True)            # after a kill no older table stands beside what follows
        write_atomic(file.with_suffix(".json"), lambda stream: stream.write(json.dumps(card).encode()))
        if args.features:
            write_atomic(file.with_suffix(".npy"), lambda stream: np.save(stream, outputs[:, len(labels):]))
    write_atomic(file, save)                    # last: if it is there, all is
    said = f"{file}: {n:,} images, {known.shape[1]} of {len(labels)} labels with truth"
    if known.isna().any(axis=None):
        counted = "are left out" if args.mask else "count as 0, with --mask they are left out"
        said += f"; {known.isna().sum().sum():,} unknown cells {counted}"
    if len(known) and "patient" not in rows:
        said += "; no column patient: intervals will take images for patients"
    if args.features:
        said += f"; {model.head_hidden_size} features an image in {file.with_suffix('.npy')}"
    print(said)


def main():
    args, rejected = options(), 0
    if args.batch < 1:
        fail("--batch has to be 1 or more")
    device = torch.device(args.device or ("cuda" if torch.cuda.device_count() else "cpu"))
    with or_fail(f"use {device} in {WORLD_SIZE} processes"):
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if WORLD_SIZE > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))      # --images: one packs, others wait
    torch.backends.cudnn.allow_tf32 = False                                 # scores are not rounded to TF32
    networks = {}
    for checkpoint in args.checkpoint:
        model, facts = load_network(checkpoint, args.features)
        out = args.out.replace("{seed}", str(facts.get("seed")))
        networks[out] = model, facts
    if len(networks) < len(args.checkpoint) or args.images and len(networks) > 1:
        fail("several --checkpoint need seeds that differ, {seed} in --out, and a --manifest or --set")
    folder = Path(f"{out}.pack")                        # of --images
    if args.set and len({name for name, *_ in args.set}) < len(args.set):
        fail("two --set have one NAME; give each its own")
    sets = args.set or [("", args.manifest or str(folder / "manifest.csv"), args.images and "all")]
    try:
        if args.images and RANK == 0:
            rejected = pack_folder(folder, facts, args)
        if WORLD_SIZE > 1:
            dist.barrier()                              # the others wait for the pack
        for out, (model, facts) in networks.items():
            model.to(device, memory_format=torch.channels_last)
            for name, manifest, split in sets:
                predict(model, facts, manifest, split or args.split, Path(out + name), args, device)
    except torch.cuda.OutOfMemoryError:
        fail(f"the GPU has no memory for {args.batch} images a pass; try --batch {args.batch // 2 or 1}")
    finally:
        if args.images and RANK == 0 and not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if WORLD_SIZE > 1:
        dist.barrier()                                  # the others wait for the one that writes
        dist.destroy_process_group()
    if rejected:
        print(f"warning: {rejected} files are rejected, see {out}.rejected.csv", file=sys.stderr)
        sys.exit(3)


# --------------------------------------------------------------------------------- shared by all scripts

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


if __name__ == "__main__":
    main()
