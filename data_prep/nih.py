"""NIH ChestX-ray14 -> index.csv: 112,120 frontal radiographs of 30,805 patients, 14 labels from reports.

Wang et al., "ChestX-ray8", arXiv:1705.02315. Free use: cite the paper, link to the download, name the NIH
Clinical Center as provider. 45 GB of PNG: https://nihcc.app.box.com/v/ChestXray-NIHCC (12 archives), or
    kaggle datasets download -d nih-chest-xrays/data -p raw/nih --unzip
The study's Xray14_{train,val,test}_official.txt: https://github.com/jlianglab/BenchmarkTransferLearning

    python data_prep/nih.py --raw raw/nih --out data/nih/index.csv
    python data_prep/nih.py --raw raw/nih --out data/nih_pretrain/index.csv --pretrain all

Reads Data_Entry_2017*.csv and the lists; images lie in images/, images_001/images/ ... images_012/images/,
images-224/ or in the root. Writes split train | val | test by the lists; without a train and a val list, the
official train_val list is cut by a seeded draw of patients, marked as fallback. With --pretrain it writes the
sample alone: the study's 100,000 are more than the 86,524 of train and val, so test images are among them;
their number is printed and stored.
"""

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

# The order of the published lists and of every classifier head.
LABELS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
          "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]
TRAINVAL, VAL = 86_524, 11_212        # images of the official train_val list and of the study's val list


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


# --- begin copy: scan ---
def scan(raw, *endings):
    """Sorted paths, relative to `raw`, of files that end so, macOS's ._* ones apart; links aren't entered."""
    return sorted(f"{folder}/{name}".removeprefix(f"{raw}/") for folder, _, names in os.walk(raw)
                  for name in names if name.lower().endswith(endings) and not name.startswith("._"))
# --- end copy: scan ---


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


def draw_validation(patients, n, seed):
    """Patients of a validation set of n images: shuffled, each taken if it fits, so the last close the gap.

    patients: the patient of every image. Fewer than n images only where no patient is small enough.
    """
    images, chosen = patients.value_counts().sort_index(), set()
    for patient in np.random.default_rng(seed).permutation(images.index):
        if images[patient] <= n:
            chosen.add(patient)
            n -= images[patient]
    return chosen


def assign_splits(table, args):
    """Split of every image by the list files ('' in none), and whether the train/val cut is the fallback."""
    lists = {split: getattr(args, f"{split}_list") or
             find(args.raw, f"Xray14_{split}_official.txt*", f"{split}_list.txt*", required=split == "test")
             for split in ("train", "val", "test")}
    if (lists["train"] is None) != (lists["val"] is None):
        fail(f"{lists['train'] or lists['val']}: train and val lists go together; give both or none")
    fallback = lists["train"] is None
    if fallback:
        lists = {"train": find(args.raw, "train_val_list.txt*"), "test": lists["test"]}
    splits = pd.Series("", table.index)
    for split, path in lists.items():
        names = read_table(path, sep=r"\s+", header=None, usecols=[0], names=["name"]).name
        listed = table.name.isin(names)
        if not listed.any():
            fail(f"{path}: none of its images stands in Data_Entry; check that the two belong together")
        if (splits[listed] != "").any():
            fail(f"{path}: {table.name[listed & (splits != '')].iloc[0]!r} stands in two lists; mend one")
        splits[listed] = split
    if fallback:
        both = splits == "train"
        n = VAL if both.sum() == TRAINVAL else round(both.sum() * VAL / TRAINVAL)
        splits[both & table.patient.isin(draw_validation(table.patient[both], n, args.seed))] = "val"
    return splits, fallback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/nih", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, help="index (data/nih/index.csv or data/nih_pretrain/index.csv)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-list", type=Path, help="one image a line, its 14 labels may follow "
                            f"(Xray14_{split}_official.txt or {split}_list.txt below --raw)")
    parser.add_argument("--pretrain", choices=["trainval", "all"], help="write a sample of these alone")
    parser.add_argument("--n-pretrain", type=count, default=100_000, help="its size, or all (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of sample and fallback split (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    dataset = "nih_pretrain" if args.pretrain else "nih"
    args.out = args.out or Path("data", dataset, "index.csv")

    source = find(args.raw, "Data_Entry_2017_v2020.csv*", "Data_Entry_2017*.csv*")
    # Columns by name: the older file ends every line with a comma, a twelfth column.
    columns = ["Image Index", "Finding Labels", "Patient Age", "Patient Gender", "View Position"]
    table = read_table(source, columns).set_axis(["name", "findings", "age", "sex", "view"], axis=1)
    findings = table.findings.str.split("|").explode()
    unknown = findings[~findings.isin([*LABELS, "No Finding"])]
    if len(unknown):
        fail(f"{source} row {unknown.index[0]}: finding {unknown.iloc[0]!r} is none of the 14; mend the row")
    for label in LABELS:
        table[label] = table.index.isin(findings.index[findings == label]).astype(int)
    table["patient"], table["study"] = table.name.str[:8], table.name.str.removesuffix(".png")
    age = pd.to_numeric(table.age.str.rstrip("Yy"), errors="coerce")       # 58; 058Y and 413 in older files
    table["age"] = age.where(age.between(0, 120)).round().astype("Int64")
    table["split"], fallback = assign_splits(table, args)

    listed = table[table.split != ""].assign(path=table.name)     # drawn by name: one sample for every layout
    facts = {"dataset": dataset, "available": len(table), "in_no_list": len(table) - len(listed),
             "seed": args.seed, "fallback_split": fallback}
    notes = ["fallback split: no train and val lists, so validation patients were drawn"] if fallback else []
    if args.pretrain:
        pool = listed[(listed.split != "test") | (args.pretrain == "all")]
        chosen = sample(pool, pool[:0], args.n_pretrain, args.seed, "see --pretrain all and --n-pretrain all")
        test = chosen[listed.split[chosen.index] == "test"]
        facts |= {"eligible": len(pool), "test_images": len(test), "test_patients": test.patient.nunique()}
        notes += [f"{len(test):,} images ({test.patient.nunique():,} patients) are of the official test set"]
    else:
        chosen = listed.sort_values("path")
    by_length = sorted(scan(args.raw, ".png"), key=len, reverse=True)      # of two copies, the shorter path
    where = {path.rpartition("/")[2]: path for path in by_length}
    images = (source.parent.relative_to(args.raw) / "images").as_posix()
    chosen["path"] = [where.get(name, f"{images}/{name}") for name in chosen.name]
    write_index(chosen.drop(columns=["name", "findings"]), source, args, notes, **facts)


if __name__ == "__main__":
    main()
