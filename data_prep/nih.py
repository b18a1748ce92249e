"""NIH ChestX-ray14 -> index.csv: 112,120 frontal radiographs of 30,805 patients, 14 labels from reports.

Wang et al., arXiv:1705.02315. Free use: cite the paper, link to the download, name the NIH Clinical Center as
provider. 45 GB of PNG: https://nihcc.app.box.com/v/ChestXray-NIHCC (12 archives), or
    kaggle datasets download -d nih-chest-xrays/data -p raw/nih --unzip
The study's Xray14_{train,val,test}_official.txt: https://github.com/jlianglab/BenchmarkTransferLearning;
without them the official train_val list is cut by a seeded draw of patients (fallback_split).

    python data_prep/nih.py --raw raw/nih --out data/nih/index.csv
    python data_prep/nih.py --raw raw/nih --out data/nih_pretrain/index.csv --pretrain all

Reads Data_Entry_2017*.csv and the lists; images lie anywhere below --raw. Labels are 1 or 0."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

LABELS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
          "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

def draw_validation(patients, n, seed):
    """Patients with n images in all, or nearly: shuffled, each is taken if it fits; the last close a gap."""
    images, chosen = patients.value_counts().sort_index(), set()
    for patient in np.random.default_rng(seed).permutation(images.index):
        if images[patient] <= n:
            chosen.add(patient)
            n -= images[patient]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/nih", help="the download (%(default)s)")
    option("--out", type=Path, default="data/nih/index.csv", help="the index (%(default)s)")
    option("--pretrain", choices=["trainval", "all"], help="a sample of these alone; all: with test images")
    option("--n-pretrain", metavar="N", default="100000", help="its size, or all (%(default)s)")
    option("--seed", type=int, default=42, help="of sample and fallback split (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    if args.seed < 0:
        fail(f"--seed {args.seed}: 0 or more")
    source = find(args.raw, "Data_Entry_2017_v2020.csv*", "Data_Entry_2017*.csv*")
    columns = ["Image Index", "Finding Labels", "Patient Age", "Patient Gender", "View Position"]
    table = read_table(source, columns)
    table.columns = "path findings age sex view".split()
    findings = table.pop("findings").str.split("|").explode()
    unknown = findings[~findings.isin([*LABELS, "No Finding"])]
    if len(unknown):
        fail(f"{source} row {unknown.index[0]}: finding {unknown.iloc[0]!r} is none of the 14; correct it")
    for label in LABELS:
        table[label] = table.index.isin(findings.index[findings == label]).astype(int)
    table["patient"], table["study"] = table.path.str[:8], table.path.str.removesuffix(".png")
    age = pd.to_numeric(table.age.str.rstrip("Y"), errors="coerce")       # 58; 058Y and 413 in older files
    table["age"] = age.where(age.between(0, 120)).round().astype("Int64")
    table["split"] = ""
    fallback = not find(args.raw, "Xray14_train*", "Xray14_val*", "train_list*", "val_list*", required=False)
    for split in ["train_val", "test"] if fallback else ["train", "val", "test"]:
        path = find(args.raw, f"Xray14_{split}_official.txt*", f"{split}_list*.txt*")       # _NIH: of 224 px
        names = read_table(path, sep=r"\s+", header=None)[0]
        odd = names[~names.isin(table.path[table.split == ""])]
        if len(odd):
            fail(f"{path}: {odd.iloc[0]!r} is not in {source} or is in another list, too; download all again")
        table.loc[table.path.isin(names), "split"] = split
    if fallback:
        pool = table.patient[table.split == "train_val"]
        val = draw_validation(pool, round(len(pool) * 11_212 / 86_524), args.seed)      # the study's share
        table.loc[pool.index, "split"] = np.where(pool.isin(val), "val", "train")
    rows = table[table.split != ""].sort_values("path")                 # by name in every layout
    facts = {"available": len(table), "in_no_list": len(table) - len(rows), "fallback_split": fallback}
    if args.pretrain:
        rows = sample(rows[(rows.split != "test") | (args.pretrain == "all")], args.n_pretrain, args.seed)
        facts["test_images"] = int((table.split[rows.index] == "test").sum())
    files = sorted(args.raw.rglob("*.png"), key=lambda path: -len(str(path)))
    where = {path.name: path for path in files}                         # of two copies, the shorter path
    home = source.parent / "images"
    rows["path"] = [where.get(name, home / name).relative_to(args.raw).as_posix() for name in rows.path]
    write_index(rows, args.out, dataset="nih_pretrain" if args.pretrain else "nih", **facts)

# --- begin copy: tables ---
def find(raw, *names, required=True):
    """The first file of one of these names (patterns) in `raw` or, level by level, in folders below."""
    for depth in range(6 if required else 3):       # 5: physionet.org/files/<dataset>/<version>/<folder>
        for name in names:
            for path in sorted(raw.glob("*/" * depth + name)):
                return path
    if required:
        fail(f"{raw}: no {' or '.join(names)} in it or in folders below; unpack the download or change --raw")


def read_table(path, columns=(), **options):
    """A CSV file, plain or .gz, as stripped strings, '' where blank; its index is the row number."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, engine="python", **options)
    except Exception as problem:                    # a broken file is anything to pandas, gzip and zlib
        fail(f"{path}: not a readable table ({str(problem).strip()}); download it again")
    for name in columns:
        if name not in table or f"{name}.1" in table:
            fail(f"{path} row 1: no column '{name}', or two; download the file again")
    odd = table.isna().any(axis=1)                      # short rows: a blank cell is ''
    odd |= table.index != pd.RangeIndex(len(table))     # long ones: pandas makes an index of them
    if odd.any():
        fail(f"{path} row {odd.argmax() + 2}: more or fewer cells than the header has; download it again")
    table.index += 1 if "header" in options else 2
    return table[[*(columns or table)]].map(str.strip).replace(["NA", "N/A", "None", "nan"], "")
# --- end copy: tables ---

# --- begin copy: sample ---
def sample(pool, n, seed):
    """n (a number or `all`) rows of `pool`. Sorted by path, a seeded permutation, its first n: so nested."""
    size = len(pool) if n == "all" else int(n) if n.isdecimal() else 0
    if not 0 < size <= len(pool) or seed < 0:
        fail(f"--n-pretrain {n}: {len(pool):,} images are eligible, or `all`; --seed {seed}: 0 or more")
    order = np.random.default_rng(seed).permutation(len(pool))[:size]
    return pool.sort_values("path").iloc[order].assign(split="pretrain")
# --- end copy: sample ---

# --- begin copy: write index ---
def write_index(table, out, **facts):
    """Write index.csv, a row an image, labels behind the first eight columns, and index.json with `facts`."""
    first = pd.Index("path patient study split view sex age race".split())
    table = table.reindex(columns=first.union(table.columns, sort=False))
    facts["splits"] = table.groupby("split").patient.agg(images="size", patients="nunique").to_dict("index")
    part = out.with_suffix(".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(part, index=False, errors="replace")       # a name not in UTF-8: packing misses it
        part.replace(out)
        part.write_text(json.dumps(facts, indent=1) + "\n")
        part.replace(out.with_suffix(".json"))
    except OSError as problem:
        if part.exists():
            part.unlink()
        fail(f"--out {out} cannot be written ({problem.strerror}); choose another")
    print(f"{out}: {facts}")
# --- end copy: write index ---

if __name__ == "__main__":
    main()
