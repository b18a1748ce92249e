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


# --- begin copy: scan ---
def scan(raw, *endings):
    """Sorted paths, relative to `raw`, of files that end so, macOS's ._* ones apart; links aren't entered."""
    return sorted(f"{folder}/{name}".removeprefix(f"{raw}/") for folder, _, names in os.walk(raw)
                  for name in names if name.lower().endswith(endings) and not name.startswith("._"))
# --- end copy: scan ---


# --- begin copy: sample ---
def count(text):
    """Type of --n-pretrain: a number, or None for `all`."""
    return None if text == "all" else int(text)


def sample(pool, rest, n, seed, remedy="ask for fewer with --n-pretrain, or for `all`"):
    """The pre-training sample: `pool` sorted by path, one seeded permutation, its first n rows in order.

    So the samples of one seed are nested. They become split `pretrain`, followed by `rest`; what is not
    drawn is left out. n = 0 draws nothing and returns every row as it is.
    """
    if n is not None and not 0 <= n <= len(pool):
        fail(f"--n-pretrain {n}: {len(pool):,} images are eligible; {remedy}")
    if n == 0:
        return pd.concat([pool, rest]).sort_values("path")
    order = np.random.default_rng(seed).permutation(len(pool))[:n]
    drawn = pool.sort_values("path").iloc[order].assign(split="pretrain")
    return pd.concat([drawn, rest.sort_values("path")])
# --- end copy: sample ---


# --- begin copy: write index ---
COLUMNS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]     # all others are labels


def write_index(table, source, args, notes=(), may_share=False, beside=None, **facts):
    """Check and write the index, and beside it index.json with its counts, `facts` and `notes`; print them.

    table: one row an image, numbered as in `source`; those of COLUMNS it lacks are written blank.
    beside: {file name: text} of further files in the same folder.
    """
    if table.empty:
        fail(f"{source}: no image is left to write; see --help for which are kept")
    table = table.reindex(columns=COLUMNS + [name for name in table if name not in COLUMNS], fill_value="")
    table["sex"] = table.sex.where(table.sex.isin(["M", "F", "O"]), "")
    outside = table.path.str.contains(r"(?:^|/)\.{0,2}(?:/|$)|\\") | ~table.path.map(str.isprintable)
    absent = table.path.map(lambda path: args.require_files and not os.path.isfile(args.raw / path))
    for wrong, what in [(outside, "names no file below the raw folder; mend or remove the row"),
                        (table.path.duplicated(), "is listed twice; remove one of the rows"),
                        (absent, "is absent; unpack it, or leave out --require-files")]:
        if wrong.any():
            fail(f"{source} row {table.index[wrong][0]}: image {table.path[wrong].iloc[0]!r} {what}")
    shared = int((table.groupby("patient").split.nunique() > 1).sum())
    if shared and not may_share:
        fail(f"{source}: {shared} patients stand in more than one split; mend the split lists")
    splits = {split: {"images": len(rows), "patients": rows.patient.nunique()}
              for split, rows in table.groupby("split")}
    facts |= {"images": len(table), "splits": splits, "patients_in_two_splits": shared, "notes": list(notes)}
    texts = {args.out.with_name(name): text for name, text in (beside or {}).items()} | {
        args.out: table.to_csv(index=False, lineterminator="\n"),
        args.out.with_suffix(".json"): json.dumps(facts, indent=1) + "\n"}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():               # whole or not at all: written beside, then renamed
            with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
    except OSError as problem:
        fail(f"{args.out} cannot be written ({problem.strerror}); choose another --out")
    print(f"{args.out}: {len(table):,} images of {table.patient.nunique():,} patients")
    for split, number in splits.items():
        print(f"  {split:<8} {number['images']:>9,} images {number['patients']:>8,} patients")
    for note in notes:
        print(f"  {note}")
# --- end copy: write index ---


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/oct", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/oct/index.csv", help="the index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--n-pretrain", type=count, default=100_000, help="or all, or 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    table = pd.DataFrame({"path": scan(args.raw, ".jpeg", ".jpg")}, dtype=str)
    place = table.path.str.extract(rf"(?:^|/)(train|val|test)/({'|'.join(CLASSES)})/([^/]+)$")
    table[["split", "class", "name"]] = place
    table = table[table.name.notna() & ~table.path.str.contains("chest_xray/")]
    if table.empty:
        fail(f"{args.raw}: no train/CNV/*.jpeg at any depth; unpack ZhangLabData.zip there or mend --raw")
    found = len(table)
    table = table.sort_values("path", key=lambda paths: paths.str.len(), kind="stable")
    table = table.drop_duplicates(["split", "class", "name"])          # Kaggle's copy holds the tree twice
    named = table.name.str.extract(r"^([A-Z]+)-([^-]+)-")
    table["patient"] = named[1].where(named[1].notna(), table.name.str.rpartition(".")[0])
    for label in CLASSES:
        table[label] = (table["class"] == label).astype(int)
    in_train, in_test = (set(table.patient[table.split == split]) for split in ("train", "test"))
    notes = [f"{len(in_train & in_test):,} of the {len(in_test):,} test patients stand in train too"]
    for number, what in [(found - len(table), "images of a second copy of the tree are left out"),
                         (named[1].isna().sum(), "names tell no patient: each is taken for one"),
                         ((named[0] != table["class"])[named[0].notna()].sum(),
                          "names begin with another class than their folder's, which is the one written")]:
        if number:
            notes.append(f"{number:,} {what}")
    chosen = sample(table, table[:0], args.n_pretrain, args.seed,
                    "the study's release is v3 (ZhangLabData.zip, 109,309); for v2 use --n-pretrain all")
    write_index(chosen.drop(columns=["class", "name"]), args.raw, args, notes, may_share=True, dataset="oct",
                available=len(table), eligible=len(table), seed=args.seed,
                drawn_from=table.split[chosen.index].value_counts().to_dict(),
                test_patients_in_train=len(in_train & in_test))


if __name__ == "__main__":
    main()
