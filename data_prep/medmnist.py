"""MedMNIST v2 -> a pack: sets of small images that anyone may download, in the form of the others.

Yang et al., Scientific Data 10:41, 2023, arXiv:2110.14795. CC BY 4.0. No registration; a set and size (28,
64, 128 or 224 pixels) is a file of https://zenodo.org/records/10519652:
    wget https://zenodo.org/records/10519652/files/chestmnist_64.npz

    python data_prep/medmnist.py --raw chestmnist_64.npz --out data/open/nih
    python data_prep/medmnist.py --raw octmnist_64.npz --out data/open/oct --pretrain train,val,test

Reads {train,val,test}_images, uint8 [N, S, S], and {train,val,test}_labels, [N, 14] of 0 and 1 or [N, 1], the
number of a class. Writes index.csv, index.json, images.npy, manifest.csv, rejected.csv and pack.json, as a
reader and pack.py do. The splits are MedMNIST's own, not NIH's lists: `stand_in` in pack.json keeps printed
numbers away. No file has patients, sex or age: an image is a patient. Source: INFO of medmnist 3.0.2."""

import argparse
import hashlib
import json
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

NIH = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
       "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]
ORGANS = ["bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver",
          "lung-left", "lung-right", "pancreas", "spleen"]
SPLITS = ["train", "val", "test"]
# Label columns in the order of the file, numbers in the file that stand for them, images of each split.
SETS = {"chestmnist": (NIH, [1], (78_468, 11_219, 22_433)),
        "octmnist": (["CNV", "DME", "DRUSEN", "NORMAL"], range(4), (97_477, 10_832, 1_000)),
        "pneumoniamnist": (["Pneumonia"], [1], (4_708, 524, 624)),                      # 0: normal
        "organamnist": (ORGANS, range(11), (34_561, 6_491, 17_778)),
        "organcmnist": (ORGANS, range(11), (12_975, 2_392, 8_216)),
        "organsmnist": (ORGANS, range(11), (13_932, 2_452, 8_827))}
COLUMNS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]
STAND_IN = "MedMNIST's splits and crops, not the study's"

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

def read(path, name):
    """An array of an .npz file, which is unpacked whole."""
    try:
        return np.load(path)[name]
    except (OSError, EOFError, KeyError, IndexError, ValueError, zipfile.BadZipFile, zlib.error) as problem:
        fail(f"{path}: no array {name} can be read from it ({problem}); download the file again")


def read_rows(path, name, split):
    """The index rows of a split, labels as 0 and 1."""
    labels, classes, sizes = SETS[name]
    marks = read(path, f"{split}_labels")
    wide = len(labels) // len(classes)
    if marks.shape[1:] != (wide,) or not np.isin(marks, range(max(classes) + 1)).all():
        fail(f"{path}: {split}_labels have shape {marks.shape}; not [N, {wide}] of 0 to {max(classes)}")
    published = sizes[SPLITS.index(split)]
    if len(marks) != published:
        print(f"warning: {path} has {len(marks):,} images of {split}, {published:,} were published")
    rows = pd.DataFrame((marks == np.array(classes)).astype(int), columns=labels)       # [N, labels]
    rows["path"] = rows["patient"] = [f"{name}/{split}/{number:06}" for number in range(len(rows))]
    return rows.assign(split=split).reindex(columns=[*COLUMNS, *labels], fill_value="")


def write_images(target, path, splits, sizes, order):
    """Write images.npy: row i is image order[i] of the splits joined. Returns: side, pixels by grey level."""
    counts = np.zeros(256, np.int64)
    array, begin = None, 0
    for split, n in zip(splits, sizes):
        images = read(path, f"{split}_images")
        side = (images if array is None else array).shape[-1:]
        if images.dtype != np.uint8 or images.shape != (n, *side, *side):
            fail(f"{path}: {split}_images {images.dtype} {images.shape}; not uint8 [{n}, S, S]")
        if array is None:
            array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(order), *side, *side))
            with open(target, "r+b") as file:               # a full disk is an error here, not a crash later
                os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
        rows = np.flatnonzero((order >= begin) & (order < begin + n))
        for some in np.array_split(rows, n // 1000 + 1):                    # little at a time
            array[some] = part = images[order[some] - begin]
            counts += np.bincount(part.ravel(), minlength=256)
        begin += n
    array.flush()
    return side[0], counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, required=True, help="the file: SET.npz or SET_64.npz, SET being one of\n"
           + ", ".join(SETS))
    option("--out", type=Path, required=True, help="folder of the pack")
    option("--pretrain", default="", metavar="A,B", help="these splits alone, shuffled, as split pretrain")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    name = args.raw.stem.split("_")[0]
    if name not in SETS:
        fail(f"--raw {args.raw}: its name begins with none of {', '.join(SETS)}; keep the published one")
    splits = args.pretrain.split(",") if args.pretrain else SPLITS
    if not set(splits) <= set(SPLITS):
        fail(f"--pretrain {args.pretrain}: give one or more of train, val and test, joined by commas")
    tables = [read_rows(args.raw, name, split) for split in splits]
    sizes = [len(rows) for rows in tables]
    rows = pd.concat(tables)
    order = np.arange(len(rows))
    if args.pretrain:
        order = np.random.default_rng(42).permutation(order)
        rows = rows.iloc[order].assign(split="pretrain")
    text = rows.to_csv(index=False)
    facts = {"dataset": name, "available": sum(SETS[name][2]),
             "splits": rows.groupby("split").patient.agg(images="size", patients="nunique").to_dict("index")}
    part = args.out / "images.npy.part"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        target = args.out / "pack.json"                                     # it is written last
        if target.exists() and STAND_IN not in target.read_text(errors="replace"):
            fail(f"{args.out} holds the pack of another maker; use another --out or remove it")
        side, counts = write_images(part, args.raw, splits, sizes, order)
        level, n = np.arange(256), counts.sum()
        mean = counts @ level / n
        std = float(counts @ (level - mean) ** 2 / n) ** 0.5
        pack = {"dataset": args.out.resolve().name, "index_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "splits": [], "raw": os.path.abspath(args.raw), "size": side, "channels": 1, "reasons": {},
                "variant": "corrected", "dicom": "display", "N": len(rows), "rejected": 0, "monochrome1": 0,
                "sixteen_bit": 0, "sixteen_bit_below_4096": 0, "mean": mean / 255, "std": std / 255,
                "stand_in": STAND_IN, "order": hashlib.sha256("".join(rows.path + "\n").encode()).hexdigest()}
        target.unlink(missing_ok=True)
        part.replace(args.out / "images.npy")
        texts = {"index.csv": text, "index.json": json.dumps(facts, indent=1) + "\n", "manifest.csv": text,
                 "rejected.csv": "path,reason\n", "pack.json": json.dumps(pack, indent=1) + "\n"}
        for file, content in texts.items():
            part.write_text(content)
            part.replace(args.out / file)
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another")
    finally:
        if part.exists():
            part.unlink()
    print(f"{args.out}: {len(rows):,} images of {side} x {side} pixels, {facts['splits']}")


if __name__ == "__main__":
    main()
