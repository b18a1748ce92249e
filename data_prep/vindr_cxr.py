"""VinDr-CXR -> index.csv: 3,000 PA radiographs as DICOM, labelled by the consensus of five radiologists.

Nguyen et al., arXiv:2012.15029. PhysioNet credentialed access (training certificate, signed agreement);
nothing derived from single images may be passed on. 190 GB, of which the study needs test/ (32 GB) and
annotations/:
    wget -r -N -c -np -P raw/vindr_cxr --user <you> --ask-password \\
        https://physionet.org/files/vindr-cxr/1.0.0/
Kaggle's release cannot stand in: other ids, no labelled test set.

    python data_prep/vindr_cxr.py --raw raw/vindr_cxr --out data/vindr_cxr/index.csv

Reads annotations/image_labels_{test,train}.csv; images lie in test/ and train/ as <id>.dicom or .dcm. Writes
split test, and on request train, where three readers vote and votes.csv keeps their counts. Labels are 28
columns of 0/1; one that the file lacks (Edema may be absent) is blank. There is no patient id: every image is
a patient."""

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

LABELS = ["Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture",
          "Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity",
          "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion",
          "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD",
          "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"]


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


def read_labels(path):
    """LABELS and image_id of an annotation file, blank where it lacks the column; case does not count."""
    table = read_table(path)
    plain = {name.lower().replace("diseases", "disease"): name for name in table}
    if "image_id" not in plain:
        fail(f"{path} row 1: no column 'image_id'; download the file again")
    known = {label: plain.get(label.lower().replace("diseases", "disease")) for label in LABELS}
    if not any(known.values()):
        fail(f"{path} row 1: none of the 28 labels is a column; download the file again")
    labels = pd.DataFrame({label: table[name] if name else "" for label, name in known.items()}, table.index)
    return label_values(labels, LABELS, path).assign(image_id=table[plain["image_id"]])


def vote(readings, rule):
    """Labels of each image by its readers' votes, and the votes. rule: majority, or any (one is enough)."""
    marks = readings[LABELS].apply(pd.to_numeric)
    by_image = (marks > 0).astype(float).where(marks.notna()).groupby(readings.image_id)
    votes = by_image.sum(min_count=1).astype("Int64")                       # what the file lacks stays blank
    readers = by_image.size()
    needed = readers // 2 + 1 if rule == "majority" else 1
    labels = votes.ge(needed, axis=0).astype("Int64").astype(object).where(votes.notna(), "")
    first_row = readings.index.to_series().groupby(readings.image_id).min()
    return labels.reset_index().set_axis(first_row), votes.assign(readers=readers).reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, default="raw/vindr_cxr", help="the download (%(default)s)")
    parser.add_argument("--out", type=Path, default="data/vindr_cxr/index.csv", help="index (%(default)s)")
    parser.add_argument("--require-files", action="store_true", help="refuse absent images")
    parser.add_argument("--with-train", action="store_true", help="index the 15,000 training images too")
    parser.add_argument("--train-vote", choices=["majority", "any"], default="majority",
                        help="a training image has the labels of most of its three readers, or of any")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    sources = [find(args.raw, "image_labels_test.csv*")]
    tables, beside = [read_labels(sources[0]).assign(split="test")], {}
    if args.with_train:
        sources.append(find(sources[0].parent, "image_labels_train.csv*"))
        labels, votes = vote(read_labels(sources[1]), args.train_vote)
        tables.append(labels.assign(split="train"))
        beside["votes.csv"] = votes.to_csv(index=False, lineterminator="\n")
    table = pd.concat(tables)
    home = sources[0].parent
    if home.name == "annotations" and home != args.raw:
        home = home.parent
    where = {path.rpartition("/")[2].rpartition(".")[0]: path for path in scan(args.raw, ".dicom", ".dcm")}
    home = home.relative_to(args.raw)
    table["path"] = [where.get(image, (home / split / f"{image}.dicom").as_posix())
                     for image, split in zip(table.image_id, table.split)]
    table["patient"] = table["study"] = table.image_id
    blank = [label for label in LABELS if (table[label] == "").all()]
    notes = [f"not in the file, so left blank: {', '.join(blank)}"] if blank else []
    table = table.drop(columns="image_id").assign(view="PA").sort_values("path")
    write_index(table, " or ".join(map(str, sources)), args, notes, beside=beside, dataset="vindr_cxr",
                available=len(table), train_vote=args.train_vote if args.with_train else None)


if __name__ == "__main__":
    main()
