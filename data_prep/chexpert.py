"""CheXpert -> index.csv: the hand-labelled validation set, and a test set of 38,240 images out of train.csv.

Irvin et al., arXiv:1901.07031. Stanford research use agreement: non-commercial, no redistribution. 11 GB
(small) or 440 GB; register at https://stanfordmlgroup.github.io/competitions/chexpert, then
    azcopy copy "<your signed link>" raw/chexpert --recursive
Test split of Glocker et al.: chexpert_split_2021_08_20.csv of https://github.com/biomedia-mira/chexploration

    python data_prep/chexpert.py --raw raw/chexpert --out data/chexpert/index.csv

Reads valid.csv, train.csv, the split and "CHEXPERT DEMO.csv" (race: the download's .xlsx, saved as CSV) if
it is there. train/ lies beside the tables or spread over folders such as "CheXpert-v1.0 batch 2 (train 1)".
Writes split val (202 frontal images) and test. Labels: 1, 0, -1 (uncertain) and blank (not mentioned)."""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

LABELS = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
          "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
          "Fracture", "Support Devices"]
SPLIT_ROWS, SPLIT_PATIENTS = 127_118, {"train": 25_730, "validate": 4_288, "test": 12_866}      # as published

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

def read_rows(path):
    """The rows of train.csv, valid.csv or a file in their form; paths below the release: train/..."""
    table = read_table(path, ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS])
    rows = table.Path.str.extract(r"^[^/]+/(?P<path>\w+/(?P<study>(?P<patient>patient\d+)/[^/.]+)/[^/]+)$")
    odd = rows.index[rows.path.isna()]
    if len(odd):
        fail(f"{path} row {odd[0]}: Path {table.Path[odd[0]]!r} is not like X/train/patient1/study1/a.jpg")
    rows["view"] = table["AP/PA"].where(table["Frontal/Lateral"] == "Frontal", "Lateral")
    rows["sex"] = table.Sex.map({"Female": "F", "Male": "M"})
    rows["age"] = table.Age.replace("0", "")                                # 0 is unknown
    return rows.join(table[LABELS].map(lambda cell: cell.removesuffix(".0")))


def read_test(raw):
    """The test rows: the split file holds 0-based row numbers of train.csv, or the rows themselves."""
    path = find(raw, "chexpert_split_2021_08_20.csv*", "CheXpert_test_Glocker.csv*")
    if "Glocker" in path.name:
        return read_rows(path).assign(split="test")
    split, source = read_table(path, ["index", "split"]), find(raw, "train.csv*")
    split["index"] = pd.to_numeric(split["index"], errors="coerce") + 2     # the row number: the header is 1
    rows = split.join(read_rows(source), on="index")
    patients = rows.groupby("split").patient.nunique()
    wrong = (rows["view"].fillna("Lateral") == "Lateral") | ~rows.split.isin(SPLIT_PATIENTS)
    # In a train.csv of another order lateral rows or none are hit, patients shared, counts wrong.
    if wrong.any() or patients.sum() > rows.patient.nunique() or (
            len(rows) == SPLIT_ROWS and patients.to_dict() != SPLIT_PATIENTS):
        fail(f"{path}: its row numbers don't fit {source}; take train.csv as published, in its order")
    return rows[rows.split == "test"].drop(columns="index")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/chexpert", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/chexpert/index.csv", help="the index (%(default)s)")
    parser.add_argument("--views", choices=["frontal", "all"], default="frontal", help="(%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    source = find(args.raw, "valid.csv*")
    table = pd.concat([read_rows(source).assign(split="val"), read_test(args.raw)])
    table = table[(table.view != "Lateral") | (args.views == "all")]
    path = find(args.raw, "CHEXPERT?DEMO*.csv*", "CHEXPERT?DEMO*.xlsx", required=False)
    if path and path.suffix == ".xlsx":
        print(f"warning: {path} is not read and race stays blank; save it as CSV beside it")
    elif path:
        people = read_table(path, ["PATIENT", "PRIMARY_RACE"]).set_axis(["patient", "race"], axis=1)
        table = join(table, people.groupby("patient", as_index=False).max(), ["patient"], path)  # '' < text
    parts = [part for level in ("", "*/", "*/*/") for part in args.raw.glob(f"{level}*batch*")]
    paths = []
    for path in table.path:
        choices = [source.parent / path, *(part / path.removeprefix("train/") for part in parts)]
        paths.append(next(filter(Path.is_file, choices), choices[0]).relative_to(args.raw).as_posix())
    table["path"] = paths
    write_index(table.sort_values("path"), args.out, dataset="chexpert")

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
