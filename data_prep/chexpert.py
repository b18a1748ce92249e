"""CheXpert -> index.csv: the hand-labelled validation set, and a test set of 38,240 images out of train.csv.

Irvin et al., arXiv:1901.07031. Stanford research use agreement: non-commercial, no redistribution. 11 GB
(small) or 440 GB; register at https://stanfordmlgroup.github.io/competitions/chexpert, then
    azcopy copy "<your signed link>" raw/chexpert --recursive
Test split of Glocker et al.: chexpert_split_2021_08_20.csv of https://github.com/biomedia-mira/chexploration

    python data_prep/chexpert.py --raw raw/chexpert --out data/chexpert/index.csv
    python data_prep/chexpert.py --raw raw/chexpert --out data/chexpert_all_views/index.csv --views all

Reads valid.csv, train.csv, the split and, where there is one, the demographics (for `race`). Images lie in
CheXpert-v1.0/, CheXpert-v1.0-small/ or the parts of the full release ("CheXpert-v1.0 batch 2 (train 1)/"),
whatever release the column Path names. Writes split val (202 frontal images of 200 patients) and test, and
train if asked. Labels are 1, 0, -1 (uncertain) and blank (not mentioned)."""

import argparse
import fnmatch
import gzip
import io
import json
import os
import sys
import zlib
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


def read_rows(path):
    """One of CheXpert's tables in the index's columns, with `folder` (train or valid) and `frontal`."""
    table = read_table(path, ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS])
    # Path begins with the name of a release, which need not be the one on disk.
    parts = table.Path.str.extract(r"^(?:[^/]+/)?(train|valid)/((patient\d+)/study\d+)/([^/]+)$")
    wrong = parts.isna().any(axis=1)
    if wrong.any():
        row = table.index[wrong][0]
        fail(f"{path} row {row}: Path {table.Path[row]!r} is unlike release/train/patient1/study1/image.jpg")
    folder, study, patient, image = (parts[column] for column in parts)
    frontal, age = table["Frontal/Lateral"] == "Frontal", pd.to_numeric(table.Age, errors="coerce")
    rows = pd.DataFrame({"path": study + "/" + image, "patient": patient, "study": study, "folder": folder,
                         "frontal": frontal, "view": table["AP/PA"].where(frontal, table["Frontal/Lateral"]),
                         "sex": table.Sex.map({"Female": "F", "Male": "M"}).fillna(""),
                         "age": age.where(age.between(1, 120)).astype("Int64")})    # 0 is unknown
    return rows.join(label_values(table, LABELS, path))


def read_split(path, raw):
    """The rows of train.csv which a split file names, with its split (train | validate | test).

    The file holds the test rows themselves, or 0-based row numbers of train.csv. Numbers mean nothing for a
    train.csv in another order; that shows in lateral rows, shared patients or other counts than published.
    """
    split = read_table(path)
    if "Path" in split:
        return read_rows(path).assign(split="test")
    split, source = read_table(path, ["index", "split"]), find(raw, "train.csv*")
    train, numbers = read_rows(source), pd.to_numeric(split["index"], errors="coerce")
    wrong = ~numbers.isin(range(len(train))) | ~split.split.isin(SPLIT_PATIENTS)
    if wrong.any():
        fail(f"{path} row {split.index[wrong][0]}: not a row number of {source} and train, validate or test")
    rows = train.iloc[numbers.astype(int)].assign(split=split.split.to_numpy())
    if not rows.frontal.all() or (rows.groupby("patient").split.nunique() > 1).any() or (
            len(rows) == SPLIT_ROWS and rows.groupby("split").patient.nunique().to_dict() != SPLIT_PATIENTS):
        fail(f"{path}: its row numbers don't fit {source}; take train.csv as published, in its order")
    return rows


def read_race(path):
    """{patient: race as given} by the demographics (PATIENT, PRIMARY_RACE) or by patient_id and race."""
    table = read_table(path).rename(columns=str.lower)
    table = table.rename(columns={"patient_id": "patient", "primary_race": "race"})
    if not {"patient", "race"} <= set(table):
        fail(f"{path} row 1: no columns PATIENT and PRIMARY_RACE; export the demographics sheet as CSV")
    return table.groupby("patient").race.max().to_dict()                    # a blank gives way to a text


def locate(rows, raw):
    """Paths of the rows below `raw`: train/ lies in one folder, or in the three parts of the full release."""
    held = {}                                                               # patient: folders that hold it
    for folder, names, _ in os.walk(raw):
        for name in names:
            held.setdefault(name, []).append(os.path.relpath(folder, raw))
        names[:] = [name for name in names if not name.startswith("patient")]
    source = find(raw, "train.csv*", "valid.csv*", required=False) or raw / "train.csv"
    home = source.parent.relative_to(raw).as_posix()
    paths = []
    for patient, folder, study, path in zip(rows.patient, rows.folder, rows.study, rows.path):
        folders = held.get(patient, [f"{home}/{folder}"])
        if len(folders) > 1:                # two releases side by side, or a patient in two parts
            folders.sort(key=lambda here: (not (raw / here / study).is_dir(), not here.startswith(home)))
        paths.append(f"{folders[0]}/{path}".removeprefix("./"))
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/chexpert", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/chexpert/index.csv", help="the index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--views", choices=["frontal", "all"], default="frontal", help="(%(default)s)")
    parser.add_argument("--splits", default="val,test", help="of train,val,test (val,test); train is marked\n"
                        "in the split file or, where test is not asked for, the whole train.csv")
    parser.add_argument("--split-file", type=Path, help="chexpert_split_2021_08_20.csv (row numbers) or\n"
                        "CheXpert_test_Glocker.csv (test rows); else looked for below --raw")
    parser.add_argument("--demographics", type=Path, help="CHEXPERT DEMO.csv, else looked for below --raw")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    splits = args.splits.split(",")
    if not set(splits) <= {"train", "val", "test"}:
        fail(f"--splits {args.splits}: give one or more of train, val and test, joined by commas")

    sources, tables = [], []
    if "val" in splits:
        sources.append(find(args.raw, "valid.csv*"))
        tables.append(read_rows(sources[-1]).assign(split="val"))
    if "test" in splits:
        names = "chexpert_split_2021_08_20.csv*", "CheXpert_test_Glocker.csv*"
        sources.append(args.split_file or find(args.raw, *names))
        tables.append(read_split(sources[-1], args.raw))
    elif "train" in splits:
        sources.append(find(args.raw, "train.csv*"))
        tables.append(read_rows(sources[-1]).assign(split="train"))
    table = pd.concat(tables)
    table = table[table.split.isin(splits) & (table.frontal | (args.views == "all"))]
    demographics = args.demographics or find(args.raw, "CHEXPERT?DEMO*.csv*", required=False)
    if demographics:
        table["race"] = table.patient.map(read_race(demographics)).fillna("")
    table["path"] = locate(table, args.raw)
    table = table.drop(columns=["folder", "frontal"]).sort_values("path")
    published = [find(args.raw, name, required=False) for name in ("train.csv*", "valid.csv*")]
    available = sum(len(read_table(path, ["Path"])) for path in published if path)
    write_index(table, " or ".join(map(str, sources)), args, dataset="chexpert", views=args.views,
                available=available)


if __name__ == "__main__":
    main()
