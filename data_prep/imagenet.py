"""ImageNet-1k -> index.csv: 100,000 natural images for pre-training, and the 50,000 of the validation set.

Russakovsky et al., arXiv:1409.0575. Registration, non-commercial research; no redistribution. 138 + 6 GB of
JPEG:
    kaggle competitions download -c imagenet-object-localization-challenge -p raw/imagenet      # then unzip
or the two tar files of https://image-net.org/download.php, unpacked as torchvision and timm expect.

    python data_prep/imagenet.py --raw raw/imagenet --out data/imagenet/index.csv

Reads file names: .../train/<wnid>/*.JPEG, and val likewise or flat beside LOC_val_solution.csv (Kaggle). The
sample is drawn from train; val stays whole. The one label column, `class`, is the index of the wnid in sorted
order, as everywhere; a thousand columns of 0/1 would be mostly commas. Files may be grey, CMYK or a PNG under
a JPEG name: packing sorts that out."""

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/imagenet", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/imagenet/index.csv", help="the index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--n-pretrain", type=count, default=100_000, help="or all, or 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    table = pd.DataFrame({"path": scan(args.raw, ".jpeg")}, dtype=str)
    place = table.path.str.extract(r"(?:^|/)(train|val)/(?:(n\d{8})/)?([^/]+)\.[^./]+$")
    table[["split", "wnid", "name"]] = place
    table = table[(table.split == "val") | (table.wnid.notna() & (table.split == "train"))]
    if table.empty:
        tar = find(args.raw, "*.tar", required=False)
        fail(f"{tar} is not unpacked: tar -xf it into train/, then each class's tar into train/<wnid>/" if tar
             else f"{args.raw}: no train/<wnid>/*.JPEG at any depth; unpack the download or mend --raw")
    flat = table.wnid.isna()
    if flat.any():
        solution = find(args.raw, "LOC_val_solution.csv*")
        rows = read_table(solution, ["ImageId", "PredictionString"])
        answers = dict(zip(rows.ImageId, rows.PredictionString.str.split(" ").str[0]))
        table.loc[flat, "wnid"] = [answers.get(name, "") for name in table.name[flat]]
        unknown = table.name[table.wnid == ""]
        if len(unknown):
            fail(f"{solution}: no row for {unknown.iloc[0]!r}; download the file again")
    wnids = pd.Categorical(table.wnid)                                      # in sorted order
    table["patient"], table["class"] = table.name, wnids.codes
    pool, rest = table[table.split == "train"], table[table.split == "val"]
    chosen = sample(pool, rest, args.n_pretrain, args.seed)
    write_index(chosen.drop(columns=["name", "wnid"]), args.raw, args, dataset="imagenet", seed=args.seed,
                available=len(table), eligible=len(pool), wnids=list(wnids.categories))


if __name__ == "__main__":
    main()
