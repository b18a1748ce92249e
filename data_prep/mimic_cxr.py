"""MIMIC-CXR-JPG -> index.csv: 100,000 pre-training images of 377,110, official validation and test images.

Johnson et al., arXiv:1901.07042. PhysioNet credentialed access (training certificate, signed agreement);
nothing derived from single images may be passed on, so keep index and pack to yourself. 570 GB of JPEG:
    wget -r -N -c -np -P raw/mimic_cxr --user <you> --ask-password \\
        https://physionet.org/files/mimic-cxr-jpg/2.0.0/

    python data_prep/mimic_cxr.py --raw raw/mimic_cxr --out data/mimic_cxr/index.csv
    python data_prep/mimic_cxr.py --n-pretrain 250000                   # holds its first 50,000, 100,000
    python data_prep/mimic_cxr.py --views frontal --labelled-only       # for supervised pre-training

Reads mimic-cxr-2.0.0-{split,metadata,chexpert}.csv[.gz]; images lie in
files/p10/p<subject>/s<study>/<dicom>.jpg. Labels belong to a study and go to each of its images: 1, 0, -1
(uncertain), blank (not mentioned). The sample is drawn from the split(s) --splits, of which no other images
are kept; the filters hold for every split."""

import argparse
import fnmatch
import gzip
import io
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

LABELS = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture",
          "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia",
          "Pneumothorax", "Support Devices"]


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


# --- begin copy: label values ---
def label_values(table, labels, source):
    """The label columns as they stand in `source`: 1, 0, -1 or blank, where 1.0 is 1."""
    values = table[labels].apply(lambda cells: cells.str.removesuffix(".0"))
    wrong = ~values.isin(["1", "0", "-1", ""])
    if wrong.any(axis=None):
        row, label = wrong.stack().idxmax()
        fail(f"{source} row {row}: label '{label}' is {values.loc[row, label]!r}; expected 1, 0, -1 or blank")
    return values
# --- end copy: label values ---


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


def attach(table, path, other, keys):
    """Join the columns of `other`, read from `path`, by `keys`: every row stays, blank without a partner."""
    twice = other.duplicated(keys)
    if twice.any():
        fail(f"{path} row {other.index[twice][0]}: its {' and '.join(keys)} stand there twice; remove one")
    return table.merge(other, on=keys, how="left").set_index(table.index).fillna("")


def released_rows(n_eligible, n, seed):
    """Row numbers drawn by the released loaders: the head of NumPy's legacy permutation, so nested as well.

    Equal to RandomState(seed).choice(n_eligible, n, replace=False) and pandas' sample(n, random_state=seed).
    """
    return np.random.RandomState(seed).permutation(n_eligible)[:n]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/mimic_cxr", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/mimic_cxr/index.csv", help="index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--views", choices=["all", "frontal"], default="all", help="frontal: AP, PA (all)")
    parser.add_argument("--labelled-only", action="store_true", help="leave out what has no label")
    parser.add_argument("--splits", default="train", help="draw from: of train,validate,test (%(default)s)")
    parser.add_argument("--n-pretrain", type=count, default=100_000, help="or all, or 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.add_argument("--sample-like", choices=["ours", "paper"], default="ours",
                        help="paper: as the released loader, rows as in the split file (%(default)s)")
    parser.add_argument("--patients", type=Path, help="MIMIC-IV's patients.csv.gz: sex, age (anchor_age)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    splits = args.splits.replace("validate", "val").split(",")
    if not set(splits) <= {"train", "val", "test"}:
        fail(f"--splits {args.splits}: give one or more of train, validate and test, joined by commas")

    source = find(args.raw, "mimic-cxr-2.*-split.csv*")
    table = read_table(source, ["dicom_id", "subject_id", "study_id", "split"])
    path = find(source.parent, "mimic-cxr-2.*-metadata.csv*")
    ids = ["dicom_id", "subject_id", "study_id"]
    table = attach(table, path, read_table(path, [*ids, "ViewPosition"]), ids)
    path = find(source.parent, "mimic-cxr-2.*-chexpert.csv*")
    labels = read_table(path, ["subject_id", "study_id", *LABELS])
    labels[LABELS] = label_values(labels, LABELS, path)
    table = attach(table, path, labels, ["subject_id", "study_id"])
    if args.patients:
        persons = read_table(args.patients, ["subject_id", "gender", "anchor_age"])
        table = attach(table, args.patients, persons, ["subject_id"]).rename(columns={"gender": "sex"})
        age = pd.to_numeric(table.pop("anchor_age"), errors="coerce")
        table["age"] = age.where(age.between(0, 120)).astype("Int64")
    files = (source.parent.relative_to(args.raw) / "files").as_posix()
    table["path"] = (files + "/p" + table.subject_id.str[:2] + "/p" + table.subject_id + "/s" + table.study_id
                     + "/" + table.dicom_id + ".jpg")
    table["split"] = table.split.replace("validate", "val")
    table = table.rename(columns={"subject_id": "patient", "study_id": "study", "ViewPosition": "view"})

    labelled, available = (table[LABELS] != "").any(axis=1), len(table)
    kept = (table.view.isin(["AP", "PA"]) | (args.views == "all")) & (labelled | (not args.labelled_only))
    table = table[kept].drop(columns="dicom_id")
    pool, rest = table[table.split.isin(splits)], table[~table.split.isin(splits)]
    chosen = sample(pool, rest, args.n_pretrain, args.seed)
    if args.sample_like == "paper":
        drawn = pool.iloc[released_rows(len(pool), args.n_pretrain, args.seed)].assign(split="pretrain")
        chosen = pd.concat([drawn, chosen[chosen.split != "pretrain"]])
    drawn = chosen[chosen.split == "pretrain"]
    official = table.split[drawn.index].value_counts().to_dict()
    notes = [f"the sample's {len(drawn):,} images are of {drawn.study.nunique():,} studies, split {official}",
             f"{(~labelled).sum():,} of {available:,} images have no label"]
    write_index(chosen, source, args, notes, dataset="mimic_cxr", available=available, eligible=len(pool),
                drawn_from=official, sample_like=args.sample_like, seed=args.seed, views=args.views,
                labelled_only=args.labelled_only)


if __name__ == "__main__":
    main()
