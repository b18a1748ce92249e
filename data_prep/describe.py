"""Recomputes Tables 9-13 of the study from index.csv files, draws Figure 1, finds images that packs share.

Each cell is put beside the printed number with its count and denominator; what disagrees is shown and, where
known, explained. Every percentage and age is over images, as in the study, also where it says "of patients".

    python data_prep/describe.py --index data/*/index.csv --packs data/nih data/oct --out results/data --check
    python data_prep/describe.py --overlap data/mimic_cxr data/nih:test data/chexpert:val --out results/data

Reads   index.csv files (or a pack's manifest.csv) with index.json beside them, evaluate/reported/*.csv, packs
Writes  distributions.csv; figure1.png and figure1.svg if packs are given (images of MIMIC-CXR and VinDr-CXR
        must not be passed on); overlap.csv, a line a shared image, and overlaps.csv, a line a pair of packs
--check exits with 1 if an index misses its exact counts or a patient is in two splits, and says which.
--overlap compares the first pack, or one split of it, with each of the others; with --against all of them
with each of these. Equal: every pixel. Near: the 16 x 16 thumbnails correlate by NEAR or more.
"""

import argparse
import hashlib
import json
import sys
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

REPORTED = Path(__file__).resolve().parent.parent / "evaluate" / "reported"
FACTS = pd.Index("path patient study split view sex age race".split())             # other columns are labels
MAY_SHARE = ("oct", "covidx_ct")        # their makers' splits do not promise to keep patients apart
KNOWN = ("test_images", "test_patients_in_train", "patients_in_two_lists", "fallback_split")      # index.json

# All of 2,500 chest radiographs of 64 pixels keep this when recompressed (JPEG, quality 50), halved, doubled
# or shifted by 20 grey levels. Of different ones, a patient's own included, none of 3.1 million pairs has
# 0.988, and of 28 pixels none of 5.0 million has 0.995: fewer than 4 in 10 million (95 %). Neighbouring CT
# slices do have it (0.03 % of all pairs of a set). An image that was cropped is not found.
NEAR = 0.995

# Table 9: dataset as printed -> as here; role -> the splits that count as used.
PRINTED = {"ImageNet": "imagenet", "NIH ChestX-ray8": "nih_pretrain", "MIMIC-IV-CXR": "mimic_cxr",
           "CovidxCT": "covidx_ct", "OCT": "oct", "NIH ChestX-ray14": "nih", "CheXpert test": "chexpert",
           "CheXpert vali": "chexpert", "PadChest": "padchest", "VinDr-CXR": "vindr_cxr"}
AUDITED = {10: "chexpert", 11: "nih", 12: "padchest", 13: "vindr_cxr"}
USED = {"pretraining": ["pretrain"], "finetuning": ["train", "val"], "evaluation": ["test"]}

# Findings whose printed name differs from the column's in more than case and underscores.
NAMES = {("nih", "Pleural Effusion"): "Effusion", ("chexpert", "Support device"): "Support Devices",
         ("chexpert", "Enlarged Cardiom."): "Enlarged Cardiomediastinum"}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def read_table(path, *columns):
    """A CSV file as text, '' where blank, with these columns."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as problem:
        fail(f"{path} cannot be read ({' '.join(str(problem).split())}); make it anew")
    for column in columns:
        if column not in rows:
            fail(f"{path} row 1: no column '{column}'; make it anew")
    return rows


def read_json(path):
    """The object in a JSON file, {} without one."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as problem:
        fail(f"{path} cannot be read ({problem}); make it anew")


def read_index(path):
    """(dataset, rows, facts) of an index; facts are those of index.json, and the mark in pack.json."""
    rows, facts = read_table(path, "path", "split"), read_json(path.with_name("index.json"))
    facts["stand_in"] = read_json(path.with_name("pack.json")).get("stand_in")
    rows = rows.reindex(columns=FACTS.union(rows.columns, sort=False), fill_value="")
    return facts.get("dataset", path.parent.name), rows, facts


def part(indexes, dataset, *splits):
    """Rows of some splits of a dataset, out of its index that has most of them."""
    found = [rows[rows.split.isin(splits)] for name, rows, _ in indexes if name == dataset]
    return max(found, key=len, default=pd.DataFrame(columns=FACTS))


def half_up(numerator, denominator, like):
    """A quotient rounded half up to the decimals of the text `like`, as text."""
    quotient = Decimal(int(numerator)) / Decimal(denominator)
    return f"{quotient.quantize(Decimal(like), ROUND_HALF_UP):f}"


def measure(rows, dataset, quantity):
    """A quantity of Tables 10-13: numerator (None: not known), denominator (None: 1) and factor."""
    age = pd.to_numeric(rows.age, errors="coerce").dropna()
    if rows.empty or quantity.startswith("Age") and age.empty:
        return None, None, 1
    if quantity == "Patients":
        return rows.patient.nunique(), None, 1
    if quantity == "Scans":
        return len(rows), None, 1
    if quantity == "Age mean":
        return int(age.sum()), len(age), 1
    if quantity.startswith("Age"):
        return int(age.agg(quantity.removeprefix("Age "))), None, 1                 # min or max
    labels, mark = rows.columns.difference(FACTS), "1"
    plain = NAMES.get((dataset, quantity), quantity).lower()
    columns = [name for name in labels if name.lower().replace("_", " ") == plain]
    if quantity == "Female":
        columns, mark = ["sex"], "F"
    if (dataset, quantity) == ("padchest", "Atelectasis"):          # as the study: any label that contains it
        columns = [name for name in labels if "atelectasis" in name]
    if not (rows[columns] != "").any(axis=None) and (columns or dataset != "padchest"):
        return None, None, 1                                        # in PadChest only what occurs is a column
    return int((rows[columns] == mark).any(axis=1).sum()), len(rows), 100


def compare(indexes, reported, notes):
    """The cells of Tables 9-13: a frame of printed and computed values, counts, and whether they agree. Of
    Table 11 also those of the validation images, which are not printed."""
    found = []
    available = {name: facts.get("available") for name, _, facts in indexes}
    for line in reported[9].to_dict("records"):
        name, role = line["dataset"], line["role"]
        validation = name == "CheXpert vali"
        rows = part(indexes, PRINTED[name], *(["val"] if validation else USED[role]))
        counts = {"used": (rows["view"] != "Lateral").sum(), "available": available.get(PRINTED[name])}
        if validation:
            counts["available"] = len(rows)
        for quantity, n in counts.items():
            printed = line[quantity]                                    # as 86k, 1.9k or 202
            like = f"1E{min(3, len(printed) - len(printed.rstrip('0')))}"
            found.append(((9, role, f"{name} {quantity}", ""), printed, like, n or None, None, 1))
    for table, dataset in AUDITED.items():
        lines = reported[table].to_dict("records")
        lines += [line | {"split": "val", "printed": ""} for line in lines if line.get("split") == "train"]
        for line in lines:
            split, group = line.get("split", "test"), line.get("group", line.get("split", ""))
            place = table, line.get("part", ""), line["quantity"], group
            rows = part(indexes, dataset, "val" if "chexpert_valid" in place else split)
            if table == 10 and group != "all":
                rows = rows[rows.race.str.contains(group, case=False)]          # none where no race is known
            measured = measure(rows, dataset, line["quantity"])
            found.append((place, line.get("printed", line["value"]), line["value"], *measured))
    cells = []
    for place, printed, like, n, of, factor in found:
        computed = "" if n is None else half_up(factor * n, of or 1, like)
        agrees = ("yes" if printed == computed else "no") if printed and computed else ""
        why = "" if agrees == "yes" else notes.get((str(place[0]), *place[1:3]), "")
        cells.append([*place, printed, computed, n, of, agrees, why])
    columns = "table part quantity group printed computed numerator denominator agrees why".split()
    return pd.DataFrame(cells, columns=columns, dtype=object)


def misses(indexes, counts):
    """A sentence for every exact count that an index does not have. PadChest is known as a table and as a
    copy of it: the nearer is meant."""
    said = []
    for (dataset, split), forms in counts.groupby(["dataset", "split"], sort=False):
        rows = part(indexes, dataset, split)                # empty: not given, or all of it is in a sample
        frontal = rows[rows["view"] != "Lateral"]
        wrong = []
        for form, expected in forms.groupby("form"):
            some = rows if form == "all views" else frontal
            if rows.empty or form == "all views" and len(some) == len(frontal):
                continue                                    # an index of frontal views
            found = {"images": len(some), "patients": some.patient.nunique()}
            found |= (some.drop(columns=FACTS) == "1").sum().to_dict()
            name = f"{dataset} {split} ({form})" if form else f"{dataset} {split}"
            wrong.append([f"{name}, {what}: expected {int(n):,}, found {found.get(what, 0):,}"
                          for what, n in zip(expected.what, expected.n) if found.get(what, 0) != int(n)])
        said += min(wrong, key=len, default=[]) if dataset == "padchest" else sum(wrong, [])
    return said


def leaks(indexes):
    """(dataset, what, number, whether it must be 0): patients and images that are on two sides."""
    found = []
    for dataset, rows, facts in indexes:
        groups = {split: set(some.patient) - {""} for split, some in rows.groupby("split")}
        found += [(dataset, f"patients in {one} and {two}", len(groups[one] & groups[two]),
                   dataset not in MAY_SHARE) for one, two in combinations(groups, 2)]
        found += [(dataset, key.replace("_", " "), int(facts[key]), False) for key in KNOWN if facts.get(key)]
        if facts["stand_in"]:
            found.append((dataset, f"stand-ins, {facts['stand_in']}", len(rows), False))
    return found


def open_pack(folder):
    """images.npy, mapped."""
    try:
        return np.load(folder / "images.npy", mmap_mode="r")
    except (OSError, ValueError) as problem:
        fail(f"{folder}: no pack with images ({problem}); give folders that pack.py wrote")


def figure1(packs, out):
    """Figure 1 of the study: an image of each dataset, the first of its pack, in two rows of four."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "figure1"                 # the same bytes for the same images
    from matplotlib import pyplot as plt

    panels = {"imagenet": "ImageNet", "mimic_cxr": "MIMIC-CXR", "oct": "OCT", "covidx_ct": "COVIDx-CT",
              "nih": "NIH ChestX-ray", "chexpert": "CheXpert", "padchest": "PadChest",
              "vindr_cxr": "VinDr-CXR"}
    images = {}
    for folder in packs:
        facts = read_json(folder / "pack.json")
        if facts.get("size") != "original":                                     # which has no images.npy
            images[folder.resolve().name] = open_pack(folder)[0], facts.get("stand_in")
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for axis, (dataset, title) in zip(axes.flat, panels.items()):
        image, mark = images.get(dataset) or images.get(f"{dataset}_pretrain") or (None, None)
        axis.set(xticks=[], yticks=[], frame_on=False, title=f"{title} (stand-in)" if mark else title)
        if image is not None:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
    figure.savefig(out / "figure1.png", dpi=150)
    figure.savefig(out / "figure1.svg", metadata={"Date": None})


def fingerprints(text):
    """PACK or PACK:SPLIT -> paths, hashes of the pixels, thumbnails [N, 256] of mean 0 and length 1."""
    folder, _, split = text.partition(":")
    images, rows = open_pack(Path(folder)), read_table(Path(folder, "manifest.csv"), "path")
    chosen = rows.index
    if split:
        chosen = chosen[rows.get("split", rows.path) == split]
    if len(rows) != len(images) or not len(chosen):
        fail(f"--overlap {text}: no images of split '{split}', or not one a row of {folder}/manifest.csv")
    hashes, thumbnails = [], np.empty((len(chosen), 256), np.float32)
    for place, number in enumerate(chosen):
        hashes.append(hashlib.blake2b(images[number].tobytes()).digest())
        image = Image.fromarray(images[number]).convert("L")
        thumbnails[place] = np.ravel(image.resize((16, 16), Image.Resampling.BICUBIC))
    thumbnails -= thumbnails.mean(1, keepdims=True)
    thumbnails /= np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-6)
    return rows.path[chosen].tolist(), hashes, thumbnails


def overlap(first, other):
    """Images of a pack that are in another, each given as fingerprints returns it: a frame of path, path of
    the most like one, equal or near, correlation."""
    paths, hashes, thumbnails = first
    places = {digest: place for place, digest in enumerate(other[1])}
    found = []
    for begin in range(0, len(paths), 256):                         # 100 MB at a time with 100,000 others
        table = thumbnails[begin:begin + 256] @ other[2].T
        for number, correlations in enumerate(table, start=begin):
            kind = "equal" if hashes[number] in places else "near"
            best = places.get(hashes[number], correlations.argmax())
            if kind == "equal" or correlations[best] >= NEAR:
                found.append((paths[number], other[0][best], kind, round(float(correlations[best]), 5)))
    return pd.DataFrame(found, columns=["path", "other_path", "kind", "correlation"])


def write_overlaps(packs, others, out):
    """Write overlap.csv, and overlaps.csv, which is printed."""
    images, numbers = [], []
    others = {name: fingerprints(name) for name in others}
    for pack in packs:
        first = fingerprints(pack)
        for name, other in others.items():
            found = overlap(first, other)
            images.append(found.assign(pack=pack, other=name))
            equal = (found.kind == "equal").sum()
            numbers.append([pack, name, len(first[0]), len(other[0]), equal, len(found) - equal])
    images = pd.concat(images) if images else pd.DataFrame(columns=["path", "other_path", "pack", "other"])
    images.to_csv(out / "overlap.csv", index=False)
    numbers = pd.DataFrame(numbers, columns=["pack", "other", "images", "other_images", "equal", "near"])
    numbers.to_csv(out / "overlaps.csv", index=False)
    print(numbers.to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--index", type=Path, nargs="+", default=[], help="index.csv files")
    option("--out", type=Path, required=True, help="folder to write to")
    option("--packs", type=Path, nargs="+", default=[], help="packed folders, for Figure 1")
    option("--overlap", nargs="*", default=[], metavar="PACK[:SPLIT]", help="the first against the others")
    option("--against", nargs="+", default=[], metavar="PACK[:SPLIT]", help="all of --overlap against these")
    option("--check", action="store_true", help="exit 1 on a missed count or shared patient")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    packs, others = args.overlap, args.against
    if not others:
        packs, others = packs[:1], packs[1:]
    if not (args.index or args.packs or others) or packs and not others:
        fail("give --index, --packs or --overlap with two packs or more")
    indexes = [read_index(path) for path in args.index]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.packs:
            figure1(args.packs, args.out)
        if others:
            write_overlaps(packs, others, args.out)
        if not indexes:
            return
        reported = {table: read_table(REPORTED / f"table{table}.csv") for table in range(9, 14)}
        notes = read_table(REPORTED / "table_notes.csv").set_index(["table", "part", "quantity"]).why
        cells = compare(indexes, reported, notes.to_dict())
        cells.to_csv(args.out / "distributions.csv", index=False)
    except OSError as problem:
        fail(f"{args.out} cannot be written ({problem.strerror}); choose another --out")
    printed = cells[cells.printed != ""]
    summary = pd.crosstab(printed.table, printed.agrees).rename(columns={"": "not computable"})
    found = leaks(indexes)
    sides = pd.DataFrame(found, columns=["dataset", "on two sides", "number", "must be 0"])
    for table in (summary, cells[cells.agrees == "no"], sides):
        print(table.to_string(), end="\n\n")
    missed = misses(indexes, read_table(REPORTED / "counts.csv"))
    for dataset, what, n, must_be_0 in found:
        if must_be_0 and n:
            missed.append(f"{dataset}, {what}: expected 0, found {n:,}")
    if args.check and missed:
        for sentence in missed:
            print(f"check failed: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
