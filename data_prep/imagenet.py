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
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/imagenet", help="the download (%(default)s)")
    option("--out", type=Path, default="data/imagenet/index.csv", help="the index (%(default)s)")
    option("--n-pretrain", metavar="N", default="100000", help="or all (%(default)s)")
    option("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    table = pd.DataFrame({"path": scan(args.raw, ".jpeg")}, dtype=str)
    place = table.path.str.extract(r"(?:^|/)(train|val)/(?:(n\d{8})/)?([^/]+)\.[^./]+$")
    table[["split", "wnid", "patient"]] = place
    table = table[(table.split == "val") | (table.wnid.notna() & (table.split == "train"))]
    if table.empty:
        fail(f"{args.raw}: no train/<wnid>/*.JPEG at any depth; unpack the download (tar -xf it into train/, "
             "then each class's tar into train/<wnid>/) or change --raw")
    flat = table.wnid.isna()
    solution = find(args.raw, "LOC_val_solution.csv*", required=False)
    if flat.any() and not solution:
        print(f"warning: {flat.sum():,} images of val/ left out, as there is no LOC_val_solution.csv")
        table = table[~flat]
    elif flat.any():
        rows = read_table(solution, ["ImageId", "PredictionString"])
        answers = dict(zip(rows.ImageId, rows.PredictionString.str.split(" ").str[0]))
        table.loc[flat, "wnid"] = [answers.get(name, "") for name in table.patient[flat]]
        unknown = table.patient[table.wnid == ""]
        if len(unknown):
            fail(f"{solution}: no row for {unknown.iloc[0]!r}; download the file again")
    wnids = pd.Categorical(table.pop("wnid"))                               # in sorted order
    table["class"] = wnids.codes
    train = table[table.split == "train"]
    if 100_000 <= len(train) != 1_281_167:
        print(f"warning: {len(train):,} training images, not 1,281,167: the sample is another one")
    drawn = sample(train, args.n_pretrain, args.seed)
    rows = pd.concat([drawn, table[table.split == "val"].sort_values("path")])
    write_index(rows, args.out, dataset="imagenet", available=len(table), wnids=list(wnids.categories))

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
