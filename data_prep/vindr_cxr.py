"""VinDr-CXR -> index.csv: 3,000 PA radiographs as DICOM, labelled by the consensus of five radiologists.

Nguyen et al., arXiv:2012.15029. PhysioNet credentialed access (training certificate, signed agreement);
nothing derived from single images may be passed on. 190 GB, of which the study needs test/ (32 GB) and
annotations/:
    wget -rNc -np -P raw/vindr_cxr --user YOU --ask-password https://physionet.org/files/vindr-cxr/1.0.0/
Kaggle's release cannot stand in: other ids, no labelled test set.

    python data_prep/vindr_cxr.py --raw raw/vindr_cxr --out data/vindr_cxr/index.csv

Reads annotations/image_labels_{test,train}.csv; images lie in test/ and train/ as <id>.dicom or .dcm. Writes
split test, and on request train, where three readers vote. Labels are 28 columns of 0/1; one that the file
lacks (Edema may be absent) is blank. There is no patient id: every image is a patient. Sex and age stand in
the images' own headers, from which pack.py takes them."""

import argparse
import json
import os
import sys
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

def label_values(table, path):
    """The columns LABELS of a table as 1, 0, -1 or blank, where 1.0 is 1. Anything else is refused."""
    values = table[LABELS].map(lambda cell: cell.removesuffix(".0"))
    wrong = ~values.isin(["1", "0", "-1", ""])
    if wrong.any(axis=None):
        row, label = wrong.stack().idxmax()
        fail(f"{path} row {row}: label '{label}' is {values.loc[row, label]!r}; expected 1, 0, -1 or blank")
    return values


def read_labels(path):
    """LABELS and image_id of an annotation file, blank where it lacks the column; case does not count."""
    table = read_table(path)
    plain = {name.lower().replace("diseases", "disease"): name for name in table}
    known = {label: plain.get(label.lower().replace("diseases", "disease")) for label in LABELS}
    if "image_id" not in table or not any(known.values()):
        fail(f"{path} row 1: no column 'image_id', or none of the 28 labels; download the file again")
    labels = pd.DataFrame({label: table[name] if name else "" for label, name in known.items()}, table.index)
    return label_values(labels, path).assign(patient=table.image_id)


def vote(readings, rule):
    """Labels of each image by its readers. rule: majority, or any: one is enough. Empty columns stay so."""
    marks = readings[LABELS].apply(pd.to_numeric) > 0
    share = marks.groupby(readings.patient).mean()
    labels = (share > (0.5 if rule == "majority" else 0)).astype(int).astype(object)
    absent = [label for label in LABELS if (readings[label] == "").all()]
    return labels.assign(**dict.fromkeys(absent, "")).reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/vindr_cxr", help="the download (%(default)s)")
    option("--out", type=Path, default="data/vindr_cxr/index.csv", help="the index (%(default)s)")
    option("--with-train", action="store_true", help="index the 15,000 training images too")
    option("--train-vote", choices=["majority", "any"], default="majority",
           help="a training image has the labels of most of its three readers, or of any (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()

    source = find(args.raw, "image_labels_test.csv*")
    table = read_labels(source).assign(split="test")
    if args.with_train:
        readings = read_labels(find(source.parent, "image_labels_train.csv*"))
        table = pd.concat([table, vote(readings, args.train_vote).assign(split="train")])
    home = source.parent.parent if source.parent.name == "annotations" else source.parent
    where = {path.stem: path for ending in ("dicom", "dcm") for path in args.raw.rglob(f"*.{ending}")}
    paths = [where.get(image, home / split / f"{image}.dicom")
             for image, split in zip(table.patient, table.split)]
    table["path"] = [Path(os.path.relpath(path, args.raw)).as_posix() for path in paths]
    table["study"], table["view"] = table.patient, "PA"
    blank = [label for label in LABELS if (table[label] == "").all()]
    table = table.sort_values("path")
    write_index(table, args.out, dataset="vindr_cxr", available=len(table), blank_labels=blank)

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
