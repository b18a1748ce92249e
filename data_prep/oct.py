"""Retina OCT (Kermany 2018) -> index.csv: 100,000 of 109,309 B-scans, for pre-training without labels.

Kermany et al., Cell 172:1122, 2018. CC BY 4.0. The study's release is v3, which alone has the 109,309 (8.4 GB
zip):
    https://data.mendeley.com/datasets/rscbjbr9sj/3  ->  unzip ZhangLabData.zip -d raw/oct
v2 (OCT2017.tar.gz, 5.8 GB) and its Kaggle copy (paultimothymooney/kermany2018) hold 84,484: --n-pretrain all.

    python data_prep/oct.py --raw raw/oct --out data/oct/index.csv

Reads file names alone: .../{train,val,test}/{CNV,DME,DRUSEN,NORMAL}/CNV-<patient>-<number>.jpeg, at any depth
(Kaggle nests the tree twice and ends a folder's name in a blank); CellData/chest_xray is not looked at. All
splits are eligible. Writes split pretrain in the order of the draw and the class folders as four 0/1 labels.
Patients stand in train and test alike, a known leak of this dataset, whose size is printed and stored."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES = ["CNV", "DME", "DRUSEN", "NORMAL"]


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/oct", help="the download (%(default)s)")
    option("--out", type=Path, default="data/oct/index.csv", help="the index (%(default)s)")
    option("--n-pretrain", metavar="N", default="100000", help="or all (%(default)s)")
    option("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    table = pd.DataFrame({"path": scan(args.raw, ".jpeg", ".jpg")}, dtype=str)
    table = table[~table.path.str.contains("chest_xray/", case=False)]
    folders = rf"(?i)(?:^|/)(train|val|test) */({'|'.join(CLASSES)}) */([^/]+)\.[^.]+$"
    place = table.path.str.extract(folders)
    table["split"] = place[0].str.lower()
    table["class"] = place[1].str.upper()
    table["name"] = place[2]
    elsewhere = int(table.name.isna().sum())
    table = table.dropna()
    if table.empty:
        fail(f"{args.raw}: no train/CNV/*.jpeg at any depth; unpack ZhangLabData.zip there or change --raw")
    found = len(table)
    table = table.drop_duplicates(["split", "class", "name"])          # Kaggle's copy holds the tree twice
    if args.n_pretrain.isdecimal() and int(args.n_pretrain) > len(table):
        fail(f"--n-pretrain {args.n_pretrain}: only {len(table):,} images here; the study's release is v3 "
             "(ZhangLabData.zip, 109,309); for v2 use --n-pretrain all")
    if 100_000 <= len(table) != 109_309:
        print(f"warning: {len(table):,} images, not 109,309: the sample is another one")
    middle = table.name.str.extract("^[A-Z]+-([^-]+)-")[0]
    table["patient"] = middle.fillna(table.name)                        # a name of another form: a patient
    for label in CLASSES:
        table[label] = (table["class"] == label).astype(int)        # of the folder, whatever the name says
    test = table.patient[table.split == "test"]
    leak = test[test.isin(table.patient[table.split == "train"])].nunique()
    rows = sample(table.drop(columns=["class", "name"]), args.n_pretrain, args.seed)
    write_index(rows, args.out, dataset="oct", available=len(table), second_copies=found - len(table),
                in_other_folders=elsewhere, test_patients_in_train=leak)


# --- begin copy: scan ---
def scan(raw, *endings):
    """Sorted paths, relative to `raw`, of all files that end so; macOS's ._* files are left out."""
    def stop(problem):
        fail(f"{problem.filename} cannot be read ({problem.strerror}); check --raw")
    found = [f"{folder}/{name}" for folder, _, names in os.walk(raw, onerror=stop) for name in names
             if name.lower().endswith(endings) and not name.startswith("._")]
    paths = sorted(os.path.relpath(path, raw) for path in found)
    fair = [path for path in paths if path.isprintable()]
    if len(fair) < len(paths):
        print(f"warning: {len(paths) - len(fair):,} files left out, as their paths are unprintable")
    return fair
# --- end copy: scan ---

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
