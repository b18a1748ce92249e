"""Recomputes Tables 9-13 of the study from index.csv files, draws Figure 1, finds images that packs share.

Each cell is put beside the printed number with its count and denominator; what disagrees is shown and, where
known, explained. Every percentage and age is over images, as in the study, also where it says "of patients".

    python data_prep/describe.py --index data/*/index.csv --out results/data --check
    python data_prep/describe.py --index data/*/index.csv --out results/data --packs data/nih data/oct
    python data_prep/describe.py --overlap data/mimic_cxr data/nih:test data/chexpert:val --out results/data

Reads   index.csv files (or a pack's manifest.csv) with index.json beside them, evaluate/reported/*.csv, packs
Writes  distributions.csv; figure1.png and figure1.svg if packs are given (images of MIMIC-CXR and VinDr-CXR
        must not be passed on); overlap.csv, a line a shared image, and overlaps.csv, a line a pair of packs
--check exits with 1 if an index misses its exact counts or a patient is in two splits, and says which.
--overlap compares the first pack, or one split of it, with each of the others; with --against all of them with
each of these. Equal: every pixel. Near: the 16 x 16 thumbnails correlate by NEAR or more.
"""

import argparse
import hashlib
import json
import sys
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations
from pathlib import Path

import pandas as pd

REPORTED = Path(__file__).resolve().parent.parent / "evaluate" / "reported"
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]         # other columns are labels
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
    rows = rows.reindex(columns=FACTS + [name for name in rows if name not in FACTS], fill_value="")
    return facts.get("dataset", path.parent.name), rows, facts


def part(indexes, dataset, *splits):
    """Rows of some splits of a dataset, out of its index that has most of them; () if there are none."""
    found = [rows[rows.split.isin(splits)] for name, rows, _ in indexes if name == dataset]
    return max(found, key=len, default=())


# ---- Tables 9-13 ----

def half_up(numerator, denominator, like):
    """A quotient rounded half up to the decimals of the text `like`, as text."""
    return str((Decimal(numerator) / Decimal(denominator)).quantize(Decimal(like), ROUND_HALF_UP))


def positives(rows, dataset, finding):
    """Images with a finding, under the dataset's own name for it; None if the dataset cannot tell."""
    labels = rows.columns.difference(FACTS)
    plain = NAMES.get((dataset, finding), finding).lower()
    columns = [name for name in labels if name.lower().replace("_", " ") == plain]
    if (dataset, finding) == ("padchest", "Atelectasis"):           # as the study: any label that contains it
        columns = [name for name in labels if "atelectasis" in name]
    if not columns and dataset == "padchest":                       # only labels that occur are columns
        return 0
    known = (rows[columns] != "").any(axis=None)
    return int((rows[columns] == "1").any(axis=1).sum()) if known else None


def measure(rows, dataset, quantity):
    """A quantity of Tables 10-13, as numerator, denominator (None: 1) and factor; None if it is not known."""
    if quantity == "Patients":
        return rows.patient.nunique(), None, 1
    if quantity == "Scans":
        return len(rows), None, 1
    if quantity.startswith("Age"):
        age = pd.to_numeric(rows.age, errors="coerce").dropna()
        if age.empty:
            return None
        if quantity == "Age mean":
            return int(age.sum()), len(age), 1
        return int(age.agg(quantity.removeprefix("Age "))), None, 1             # min or max
    if quantity == "Female":
        n = int((rows.sex == "F").sum()) if (rows.sex != "").any() else None
    else:
        n = positives(rows, dataset, quantity)
    return None if n is None else (n, len(rows), 100)


def table9(indexes, reported):
    """The cells of Table 9, used and available images, printed as 86k, 1.9k or 202."""
    available = {name: facts.get("available") for name, _, facts in indexes}
    for line in reported.itertuples():
        dataset, splits = PRINTED[line.dataset], USED[line.role]
        if line.dataset == "CheXpert vali":
            rows = part(indexes, dataset, "val")
            counts = [len(rows) and (rows["view"] != "Lateral").sum(), len(rows)]
        else:
            counts = [len(part(indexes, dataset, *splits)), available.get(dataset)]
        for quantity, n in zip(["used", "available"], counts):
            printed, text = getattr(line, quantity), ""
            if n:
                unit = 10 ** min(3, len(printed) - len(printed.rstrip("0")))
                text = str(int(half_up(int(n), unit, "1")) * unit)
            yield 9, line.role, f"{line.dataset} {quantity}", "", printed, text, n or None, None


def tables10_to_13(indexes, reported):
    """The cells of Tables 10-13; of Table 11 also those of the validation images, which are not printed."""
    for table, dataset in AUDITED.items():
        lines = reported[table].to_dict("records")
        lines += [line | {"split": "val", "printed": ""} for line in lines if line.get("split") == "train"]
        for line in lines:
            split, place, like = line.get("split", "test"), line.get("part", ""), line["value"]
            group = line.get("group", line.get("split", ""))
            if place == "chexpert_valid":
                split = "val"
            rows = part(indexes, dataset, split)
            if len(rows) and table == 10 and group != "all":
                rows = rows[rows.race.str.contains(group, case=False)]      # none where no race is known
            n, of, text = None, None, ""
            found = measure(rows, dataset, line["quantity"]) if len(rows) else None
            if found:
                n, of, factor = found
                text = half_up(factor * n, of or 1, like)
            yield table, place, line["quantity"], group, line.get("printed", like), text, n, of


def compare(indexes, reported, notes):
    """The cells of Tables 9-13: a frame of printed and computed values, counts, and whether they agree."""
    cells = []
    found = [*table9(indexes, reported[9]), *tables10_to_13(indexes, reported)]
    for *place, printed, computed, n, of in found:
        agrees = ""
        if printed and computed:
            agrees = "yes" if printed == computed else "no"
        why = "" if agrees == "yes" else notes.get((str(place[0]), *place[1:3]), "")
        cells.append([*place, printed, computed, n, of, agrees, why])
    columns = "table part quantity group printed computed numerator denominator agrees why".split()
    return pd.DataFrame(cells, columns=columns, dtype=object)


# ---- exact counts and leaks ----

def misses(indexes, counts):
    """A sentence for every exact count that an index of its dataset does not have.

    Where a dataset is known in two forms, such as a table and a copy of it, those of the nearer are meant.
    """
    said = []
    for (dataset, split), forms in counts.groupby(["dataset", "split"], sort=False):
        rows = part(indexes, dataset, split)
        if not len(rows):
            continue                                                # not given, or all of it is in a sample
        frontal = rows[rows["view"] != "Lateral"]
        wrong = []
        for form, expected in forms.groupby("form"):
            some = rows if form == "all views" else frontal
            if form == "all views" and len(some) == len(frontal):
                continue                                            # an index of frontal views
            found = {"images": len(some), "patients": some.patient.nunique()}
            found |= (some.drop(columns=FACTS) == "1").sum().to_dict()
            name = f"{dataset} {split} ({form})" if form else f"{dataset} {split}"
            wrong.append([f"{name}, {what}: expected {int(n):,}, found {found.get(what, 0):,}"
                          for what, n in zip(expected.what, expected.n) if found.get(what, 0) != int(n)])
        said += min(wrong, key=len) if dataset == "padchest" else sum(wrong, [])
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


# ---- packs ----

def open_pack(folder):
    """images.npy, mapped."""
    import numpy as np
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
        if read_json(folder / "pack.json").get("size") != "original":           # which has no images.npy
            images[folder.resolve().name] = folder, open_pack(folder)
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for axis, (dataset, title) in zip(axes.flat, panels.items()):
        axis.set(xticks=[], yticks=[], frame_on=False, title=title)
        found = images.get(dataset) or images.get(f"{dataset}_pretrain")
        if found:
            folder, array = found
            axis.imshow(array[0], cmap="gray", vmin=0, vmax=255)
            if read_json(folder / "pack.json").get("stand_in"):
                axis.set_title(f"{title} (stand-in)")
    figure.savefig(out / "figure1.png", dpi=150)
    figure.savefig(out / "figure1.svg", metadata={"Date": None})


def fingerprints(text):
    """PACK or PACK:SPLIT -> paths, hashes of the pixels, thumbnails [N, 256] of mean 0 and length 1."""
    import numpy as np
    from PIL import Image
    folder, _, split = text.partition(":")
    images, rows = open_pack(Path(folder)), read_table(Path(folder, "manifest.csv"), "path")
    chosen = rows.index
    if split:
        chosen = chosen[rows.get("split", rows.path) == split]
    if len(rows) != len(images) or not len(chosen):
        fail(f"--overlap {text}: no images of split '{split}', or not one a row of {folder}/manifest.csv")
    hashes, thumbnails = [], np.empty((len(chosen), 16, 16), np.float32)
    for place, number in enumerate(chosen):
        hashes.append(hashlib.blake2b(images[number].tobytes()).digest())
        image = Image.fromarray(images[number]).convert("L")
        thumbnails[place] = image.resize((16, 16), Image.Resampling.BICUBIC)
    thumbnails -= thumbnails.mean((1, 2), keepdims=True)
    thumbnails /= np.maximum(np.linalg.norm(thumbnails, axis=(1, 2), keepdims=True), 1e-6)
    return rows.path[chosen].tolist(), hashes, thumbnails.reshape(-1, 256)


def overlap(first, other):
    """Images of a pack that are in another: path, that of the most like one, equal or near, correlation.

    first, other: as fingerprints returns them. Returns: a frame.
    """
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
            numbers.append({"pack": pack, "other": name, "images": len(first[0]),
                            "other_images": len(other[0]), "equal": equal, "near": len(found) - equal})
    images = pd.concat(images) if images else pd.DataFrame(columns=["path", "other_path", "pack", "other"])
    images.to_csv(out / "overlap.csv", index=False)
    numbers = pd.DataFrame(numbers, columns=["pack", "other", "images", "other_images", "equal", "near"])
    numbers.to_csv(out / "overlaps.csv", index=False)
    print(numbers.to_string(index=False))


def write_audit(indexes, out):
    """Write distributions.csv and print what it says, and the leaks. Returns: what --check misses."""
    reported = {table: read_table(REPORTED / f"table{table}.csv") for table in range(9, 14)}
    notes = read_table(REPORTED / "table_notes.csv").itertuples(index=False)
    cells = compare(indexes, reported, {tuple(row[:3]): row.why for row in notes})
    cells.to_csv(out / "distributions.csv", index=False)
    printed = cells[cells.printed != ""]
    summary = pd.crosstab(printed.table, printed.agrees).rename(columns={"": "not computable"})
    found = leaks(indexes)
    sides = pd.DataFrame(found, columns=["dataset", "on two sides", "number", "must be 0"])
    for table in (summary, cells[cells.agrees == "no"], sides):
        print(table.to_string(), end="\n\n")
    shared = [f"{dataset}, {what}: expected 0, found {n:,}" for dataset, what, n, zero in found if zero and n]
    return misses(indexes, read_table(REPORTED / "counts.csv")) + shared


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
    if packs and not others:
        packs, others = packs[:1], packs[1:]
    if not (args.index or args.packs or others) or packs and not others:
        fail("give --index, --packs or --overlap with two packs or more")
    indexes = [read_index(path) for path in args.index]
    missed = []
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.packs:
            figure1(args.packs, args.out)
        if others:
            write_overlaps(packs, others, args.out)
        if indexes:
            missed = write_audit(indexes, args.out)
    except OSError as problem:
        fail(f"{args.out} cannot be written ({problem.strerror}); choose another --out")
    if args.check and missed:
        print(*(f"check failed: {sentence}" for sentence in missed), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
