"""MIMIC-CXR-JPG -> index.csv: 100,000 pre-training images of 377,110, official validation and test images.

Johnson et al., arXiv:1901.07042. PhysioNet credentialed access (training certificate, signed agreement);
nothing derived from single images may be passed on, so keep index and pack to yourself. 570 GB of JPEG:
    wget -rNc -np -P raw/mimic_cxr --user YOU --ask-password https://physionet.org/files/mimic-cxr-jpg/2.0.0/

    python data_prep/mimic_cxr.py --raw raw/mimic_cxr --out data/mimic_cxr/index.csv
    python data_prep/mimic_cxr.py --n-pretrain 250000                   # holds its first 50,000, 100,000
    python data_prep/mimic_cxr.py --views frontal --labelled-only --out data/mimic_cxr_supervised/index.csv

Reads mimic-cxr-2.0.0-{split,metadata,chexpert}.csv[.gz]; images: files/p10/p<subject>/s<study>/<dicom>.jpg.
Labels of a study go to each of its images: 1, 0, -1 (uncertain), blank (not mentioned). Of the split(s) drawn
from, no other images are kept; the filters hold for every split. Sex and age are not in these tables."""

import argparse
import json
import sys
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

def released_rows(n_eligible, n, seed):
    """Row numbers the released loaders draw, by choice(n_eligible, n, replace=False): nested as well."""
    return np.random.RandomState(seed).permutation(n_eligible)[:n]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/mimic_cxr", help="the download (%(default)s)")
    option("--out", type=Path, default="data/mimic_cxr/index.csv", help="the index (%(default)s)")
    option("--views", choices=["all", "frontal"], default="all", help="frontal: AP, PA (%(default)s)")
    option("--labelled-only", action="store_true", help="leave out images of studies without any label")
    option("--splits", nargs="+", choices=["train", "validate", "test"], default=["train"], help="drawn from")
    option("--n-pretrain", metavar="N", default="100000", help="or all, or 0 for no sample (%(default)s)")
    option("--seed", type=int, default=42, help="of the sample (%(default)s)")
    option("--sample-like", choices=["ours", "paper"], default="ours", help="paper: as the released loader")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    source = find(args.raw, "mimic-cxr-2.*-split.csv*")
    ids = ["dicom_id", "subject_id", "study_id"]
    table = read_table(source, [*ids, "split"])
    path = find(source.parent, "mimic-cxr-2.*-metadata.csv*")
    table = join(table, read_table(path, [*ids, "ViewPosition"]), ids, path)
    path = find(source.parent, "mimic-cxr-2.*-chexpert.csv*")
    labels = read_table(path, [*ids[1:], *LABELS])
    labels[LABELS] = labels[LABELS].map(lambda cell: cell.removesuffix(".0"))
    table = join(table, labels, ids[1:], path)
    table = table.rename(columns={"subject_id": "patient", "study_id": "study", "ViewPosition": "view"})
    files = (source.parent.relative_to(args.raw) / "files").as_posix()
    folder = files + "/p" + table.patient.str[:2] + "/p" + table.patient + "/s" + table.study
    table["path"] = folder + "/" + table.pop("dicom_id") + ".jpg"
    labelled, frontal = (table[LABELS] != "").any(axis=1), table.view.isin(["AP", "PA"])
    rows = table[(frontal | (args.views == "all")) & (labelled | (not args.labelled_only))]
    eligible = rows.split.isin(args.splits)
    pool, rest = rows[eligible], rows[~eligible].sort_values("path")
    drawn = pool.sort_values("path")
    if args.n_pretrain != "0":
        drawn = sample(pool, args.n_pretrain, args.seed)
        if args.sample_like == "paper":
            drawn = pool.iloc[released_rows(len(pool), len(drawn), args.seed)].assign(split="pretrain")
    rows = pd.concat([drawn, rest]).replace({"split": {"validate": "val"}})
    write_index(rows, args.out, dataset="mimic_cxr", available=len(table), eligible=len(pool))

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

# --- begin copy: join ---
def join(table, other, keys, path):
    """`table` with the columns of `other`, read from `path`: every row stays, blank without a partner."""
    joined = table.join(other.set_index(keys), on=keys)
    if len(joined) > len(table):
        fail(f"{path}: a row of its {' and '.join(keys)} stands there twice; remove one")
    met = joined[other.columns[-1]].notna().mean()
    if met == 0:
        fail(f"{path}: no image has a row in it; its first {' and '.join(keys)} are "
             f"{other[keys].values[:1].tolist()}, those of the images {table[keys].values[:1].tolist()}")
    print(f"{path.name}: rows for {met:.1%} of the images")
    return joined.fillna("")
# --- end copy: join ---

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
