"""PadChest -> index.csv: the study's 1,860 manually reviewed PA and AP radiographs of archive 0, a test set.

Bustos et al., arXiv:1901.07441. Registration with BIMCV, research use, no redistribution. 1 TB in 54
archives, of which the study needs 0.zip (some tens of GB) and the table:
    https://bimcv.cipf.es/bimcv-projects/padchest  ->  unzip 0.zip -d raw/padchest/0

    python data_prep/padchest.py --raw raw/padchest --out data/padchest/index.csv

Reads PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz]; images lie in 0/ ... 54/ or in one folder.
Kept are rows with Projection PA or AP, ImageDir 0 and MethodProjection "Manual review of DICOM fields", which
tells how the projection was found, not who labelled; all kept rows happen to be labelled by physicians. Rows
whose Labels are blank are dropped and counted. Writes split test and every label that occurs as a 0/1 column
of the source's name: there are subcategories of atelectasis and effusion, whose grouping is left to
evaluation."""

import argparse
import ast
import fnmatch
import gzip
import io
import json
import os
import sys
import zlib
from pathlib import Path

import pandas as pd

REVIEWED = "Manual review of DICOM fields"


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


def parse_labels(text):
    """The labels in the text of a Python list, stripped, without empty ones; None if it is no such list."""
    try:
        items = ast.literal_eval(text)
        return {item.strip() for item in items if item.strip()} if isinstance(items, list) else None
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/padchest", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/padchest/index.csv", help="the index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    source = find(args.raw, "PADCHEST_chest_x_ray_images_labels_160K*.csv*")
    # Ids as text: PatientID has up to 39 digits, and as numbers they would be rounded and patients merged.
    images = read_table(source, ["ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "Labels",
                                 "PatientBirth", "PatientSex_DICOM", "Projection", "MethodProjection"])
    table = images[images.Projection.isin(["PA", "AP"]) & (images.MethodProjection == REVIEWED)
                   & (pd.to_numeric(images.ImageDir, errors="coerce") == 0)]               # 0 or 0.0
    blank = table.Labels == ""
    table = table[~blank]
    labels = table.Labels.map(parse_labels)
    if labels.isna().any():
        row = table.index[labels.isna()][0]
        fail(f"{source} row {row}: Labels {table.Labels[row][:40]!r} is not a list of texts; mend the row")
    names = sorted(set().union(*labels))
    findings = pd.DataFrame({name: labels.map(lambda row: int(name in row)) for name in names}, table.index)

    by_length = sorted(scan(args.raw, ".png"), key=len, reverse=True)      # of two copies, the shorter path
    where = {path.rpartition("/")[2]: path for path in by_length}
    folder = (source.parent.relative_to(args.raw) / "0").as_posix()
    age = pd.to_numeric(table.StudyDate_DICOM.str[:4], errors="coerce") \
        - pd.to_numeric(table.PatientBirth, errors="coerce")
    index = pd.DataFrame({
        "path": [where.get(name, f"{folder}/{name}") for name in table.ImageID], "patient": table.PatientID,
        "study": table.StudyID, "split": "test", "view": table.Projection,
        "sex": table.PatientSex_DICOM, "age": age.where(age.between(0, 120)).round().astype("Int64"),
    }).join(findings)
    rounded = table.PatientID.str.contains("e+", case=False, regex=False).sum()
    notes = [f"{blank.sum():,} rows without labels dropped"] if blank.any() else []
    notes += [f"{rounded:,} patient ids were rounded to numbers, patients may be merged"] if rounded else []
    write_index(index.sort_values("path"), source, args, notes, dataset="padchest", available=len(images),
                without_labels=int(blank.sum()), rounded_ids=int(rounded))


if __name__ == "__main__":
    main()
