"""COVIDx CT-3 -> index.csv: 100,000 axial slices of chest CT out of 425,024, for pre-training without labels.

Gunraj et al., "COVID-Net CT-2", arXiv:2101.07433; https://github.com/haydengunraj/COVIDNet-CT. Creative
Commons by source, several of them non-commercial. Tens of GB of PNG:
    kaggle datasets download -d hgunraj/covidxct -p raw/covidx_ct --unzip
Kaggle carries 3A. 3B, the "430k" of the study, adds weakly verified training slices and is built by its
makers' scripts: see --release.

    python data_prep/covidx_ct.py --raw raw/covidx_ct --out data/covidx_ct/index.csv

Reads {train,val,test}_COVIDx_CT-3A.txt (name class xmin ymin xmax ymax) and metadata.csv; images lie in
3A_images/, images/ or COVIDx_CT-3A/. All splits are eligible. Writes split pretrain in the order of the draw,
the class as three 0/1 columns, and boxes.csv with the body's box in pixels, for pack.py --crop-box (the
study does not crop). The slices of a volume are near-copies: look at the number of patients, too."""

import argparse
import fnmatch
import gzip
import io
import json
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES = ["Normal", "Pneumonia", "COVID-19"]           # 0, 1, 2 of the lists, `finding` of the metadata
BOX = ["xmin", "ymin", "xmax", "ymax"]                  # pixels, max exclusive; slices need not be 512 x 512


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# --- begin copy: find ---
def find(raw, *patterns, required=True):
    """First match in `raw` or folders below; links, and folders of many folders (images), are not entered."""
    found, home = [], os.path.realpath(raw) + os.sep
    for folder, inner, names in os.walk(raw):
        depth = len(Path(folder).relative_to(raw).parts)
        found += [(depth, rank, Path(folder, name)) for rank, pattern in enumerate(patterns)
                  for name in fnmatch.filter(filter(str.isprintable, inner + names), pattern)
                  if os.path.realpath(os.path.join(folder, name)).startswith(home)]
        if depth == 5 or len(inner) > 100:          # 5: physionet.org/files/<name>/<version>/<folder>
            inner.clear()
    if found or not required:
        return min(found)[2] if found else None
    fail(f"{raw}: no {' or '.join(patterns)} in it or the folders below; unpack the download or mend --raw")
# --- end copy: find ---


# --- begin copy: read table ---
def read_table(path, columns=None, **options):
    """A CSV file (.gz too) as stripped strings, '' where blank, indexed by row number; `columns` alone."""
    if columns:
        options["usecols"] = lambda name: name in columns
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        table = pd.read_csv(io.StringIO(text), dtype=str, index_col=False, keep_default_na=False,
                            na_values=["NaN", "nan", "None"], **options).fillna("")
    except UnicodeDecodeError as problem:
        row = problem.object[:problem.start].count(b"\n") + 1
        fail(f"{path} row {row}: not UTF-8 text; download the file again or convert it")
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        fail(f"{path}: not a readable table ({' '.join(str(problem).split())}); download it again")
    absent = [name for name in columns or [] if name not in table]
    if absent:
        fail(f"{path} row 1: no column '{absent[0]}'; download the file again")
    table.index += 1 if "names" in options else 2              # a file without header starts at row 1
    return table[columns or list(table)].apply(lambda cells: cells.str.strip())
# --- end copy: read table ---


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


def patient_of(name, known):
    """Patient of a slice, None if unknown: in COVID-CTset's names what stands before _SR_ (prefix apart);
    else the longest beginning of the name, cut at _ or -, that is a patient of the metadata.
    """
    covid_ctset = re.search(r"(patient\d+)_SR_", name)
    rest = covid_ctset[1] if covid_ctset else name.rpartition(".")[0]
    while rest and not covid_ctset and rest not in known:
        rest = rest[:max(rest.rfind("_"), rest.rfind("-"), 0)]
    return rest or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/covidx_ct", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/covidx_ct/index.csv", help="index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--release", choices=["3A", "3B", "2A"], default="3A", help="(%(default)s)")
    parser.add_argument("--splits", default="train,val,test", help="draw from these (%(default)s)")
    parser.add_argument("--n-pretrain", type=count, default=100_000, help="or all, or 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    splits = args.splits.split(",")
    if not set(splits) <= {"train", "val", "test"}:
        fail(f"--splits {args.splits}: give one or more of train, val and test, joined by commas")

    first = find(args.raw, f"*_COVIDx_CT-{args.release}.txt*")
    lists = {split: find(first.parent, f"{split}_COVIDx_CT-{args.release}.txt*", required=False)
             for split in ("train", "val", "test")}
    tables = []
    for split, path in lists.items():
        if path:
            table = read_table(path, sep=r"\s+", header=None, names=["name", "class", *BOX])
            if table.empty:
                fail(f"{path}: no slice in it; download the file again")
            numbers = table[BOX].apply(lambda cells: cells.str.isdecimal()).all(axis=1)
            wrong = ~table["class"].isin(["0", "1", "2"]) | ~numbers
            if wrong.any():
                fail(f"{path} row {table.index[wrong][0]}: not `name class xmin ymin xmax ymax`; mend it")
            tables.append(table.assign(split=split))
    table = pd.concat(tables)

    patients = read_table(find(args.raw, "metadata.csv*"), ["patient id", "sex", "age", "finding", "view"])
    patients = patients.drop_duplicates("patient id").set_index("patient id")
    known = set(patients.index)
    found = table.name.map(lambda name: patient_of(name, known))
    table["study"] = table.name.str.replace(r"[_-][^_-]*$", "", regex=True)                 # the volume
    table["patient"] = found.where(found.notna(), table.study)
    for column in ("sex", "view", "finding"):
        table[column] = table.patient.map(patients[column]).fillna("")
    age = pd.to_numeric(table.patient.map(patients.age), errors="coerce")
    table["age"] = age.where(age.between(0, 120)).round().astype("Int64")
    for number, label in enumerate(CLASSES):
        table[label] = (table["class"] == str(number)).astype(int)
    folder = find(args.raw, f"{args.release}_images", "images", f"COVIDx_CT-{args.release}", required=False)
    folder = folder or first.parent / f"{args.release}_images"
    table["path"] = folder.relative_to(args.raw).as_posix() + "/" + table.name

    finding = table["class"].map(lambda number: CLASSES[int(number)])
    contrary = (table.finding != "") & (table.finding != finding)
    notes = [f"{split}: no list, so none of its slices" for split, path in lists.items() if not path]
    for number, what in [(found.isna().sum(), "slices: no patient in the metadata, their volume is taken"),
                         (contrary.sum(), "slices have another class than their patient's finding")]:
        if number:
            notes.append(f"{number:,} {what}")
    shared = int((table.groupby("patient").split.nunique() > 1).sum())
    notes.append(f"{shared:,} patients stand in more than one list")

    table["official"] = table.split
    eligible = table.split.isin(splits)
    chosen = sample(table[eligible], table[~eligible], args.n_pretrain, args.seed)
    drawn_from = chosen.official[chosen.split == "pretrain"].value_counts().to_dict()
    boxes = chosen[["path", *BOX]].to_csv(index=False, lineterminator="\n")
    chosen = chosen.drop(columns=["name", "class", "finding", "official", *BOX])
    source = " or ".join(str(path) for path in lists.values() if path)
    write_index(chosen, source, args, notes, may_share=True, beside={"boxes.csv": boxes}, dataset="covidx_ct",
                release=args.release, available=len(table), eligible=int(eligible.sum()), seed=args.seed,
                drawn_from=drawn_from, patients_in_two_lists=shared)


if __name__ == "__main__":
    main()
