"""PadChest -> index.csv: the study's 1,861 manually reviewed PA and AP radiographs of archive 0, a test set.

Bustos et al., arXiv:1901.07441. Registration with BIMCV, research use, no redistribution. 1 TB in 55
archives, of which the study needs 0.zip (some tens of GB) and the table:
    https://bimcv.cipf.es/bimcv-projects/padchest  ->  unzip 0.zip -d raw/padchest/0

    python data_prep/padchest.py --raw raw/padchest --out data/padchest/index.csv

Reads PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz]; images lie anywhere below --raw. Kept are
rows with Projection PA or AP, ImageDir 0 and MethodProjection "Manual review of DICOM fields", which tells
how the projection was found, not who labelled; all kept rows happen to be labelled by physicians. Rows whose
Labels are blank are dropped. Writes split test and every label that occurs as a 0/1 column of the source's
name; atelectasis and effusion have subcategories, whose grouping is left to evaluation.

The original table gives 1,861 rows of 1,758 patients. The study's authors evaluated on a copy that lacks one
row (effusion, a woman) and has ids rounded to six digits: 1,860 rows, 1,754 patients. Either is read. Other
projects leave the image of this row out, 232387753838738339711526121280969069202_3kz4uc.png, as unreadable;
if it is, packing rejects it."""

import argparse
import ast
import json
import sys
from pathlib import Path

import pandas as pd

COLUMNS = ["ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "Labels", "PatientBirth",
           "PatientSex_DICOM", "Projection", "MethodProjection"]

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

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
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    source = find(args.raw, "PADCHEST_chest_x_ray_images_labels_160K*.csv*")
    # Ids as text: PatientID has up to 39 digits, and as numbers they would be rounded and patients merged.
    images = read_table(source, COLUMNS)
    archive = pd.to_numeric(images.ImageDir, errors="coerce")               # 0 or 0.0
    reviewed = images.MethodProjection == "Manual review of DICOM fields"
    table = images[images.Projection.isin(["PA", "AP"]) & reviewed & (archive == 0)]
    blank = table.Labels == ""
    table = table[~blank]
    labels = table.Labels.map(parse_labels)
    if labels.isna().any():
        row = table.index[labels.isna()][0]
        fail(f"{source} row {row}: Labels {table.Labels[row][:40]!r} is not a list of texts; correct the row")
    names = sorted(set().union(*labels))
    findings = pd.DataFrame({name: labels.map(lambda row: int(name in row)) for name in names}, table.index)

    by_length = sorted(args.raw.rglob("*.png"), key=lambda path: -len(str(path)))
    where = {path.name: path for path in by_length}                         # of two copies, the shorter path
    paths = [where.get(name, source.parent / "0" / name) for name in table.ImageID]
    birth = pd.to_numeric(table.PatientBirth, errors="coerce")
    age = pd.to_numeric(table.StudyDate_DICOM.str[:4], errors="coerce") - birth
    index = pd.DataFrame({"path": [path.relative_to(args.raw).as_posix() for path in paths],
                          "patient": table.PatientID, "study": table.StudyID, "split": "test",
                          "view": table.Projection, "sex": table.PatientSex_DICOM,
                          "age": age.where(age.between(0, 120)).round().astype("Int64")}, table.index)
    rounded = table.PatientID.str.contains("[eE][+]").any()
    release = "the authors' copy, ids rounded" if rounded else "the original table"
    write_index(index.join(findings).sort_values("path"), args.out, dataset="padchest", available=len(images),
                without_labels=int(blank.sum()), release=release)

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
