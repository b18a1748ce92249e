"""Recomputes Tables 9-13 of the study from index.csv files, beside the printed numbers, and draws Figure 1.

Each cell stands with its count and denominator; each disagreement is marked and, where known, explained.
Every percentage and age is over images, as in the study, also where its row says "of patients".

    python data_prep/describe.py --index data/*/index.csv --out results/data --check
    python data_prep/describe.py --index data/*/index.csv --out results/data --packs data/nih data/oct

Reads   index.csv files with the index.json beside them, evaluate/reported/table9.csv ... table13.csv, packs.
Writes  distributions.csv and distributions.md; figure1.png and figure1.svg if packs are given (images of
        MIMIC-CXR and VinDr-CXR must not be passed on).
--check exits with 1 if an index misses its exact counts or a patient stands in two splits, and says which.
"""

import argparse
import contextlib
import json
import os
import sys
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations
from pathlib import Path

import pandas as pd

REPORTED = Path(__file__).resolve().parent.parent / "evaluate" / "reported"
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]         # other columns are labels

# Images, patients and positives a label, counted in the published metadata; labels in the order of the index.
# PadChest has 156 of them; its original file, whose ids are not rounded, may tell more patients than 1,754.
EXACT = {
    ("nih", "train"): (75_312, 24_342, [7205, 1501, 7649, 12036, 3574, 4060, 770, 2244, 2480, 1210, 1250,
                                        1083, 1927, 126]),
    ("nih", "val"): (11_212, 3_666, [1075, 206, 1010, 1746, 460, 648, 106, 393, 372, 168, 173, 168, 315, 15]),
    ("nih", "test"): (25_596, 2_797, [3279, 1069, 4658, 6112, 1748, 1623, 555, 2665, 1815, 925, 1093, 435,
                                      1143, 86]),
    ("chexpert", "val"): (202, 200, [26, 105, 66, 117, 1, 42, 32, 8, 75, 7, 64, 1, 0, 99]),
    ("chexpert", "val, all views"): (234, 200, [38, 109, 68, 126, 1, 45, 33, 8, 80, 8, 67, 1, 0, 107]),
    ("chexpert", "test"): (38_240, 12_866, [3316, 1842, 4889, 19339, 1534, 9909, 2510, 961, 5819, 3582, 15510,
                                            530, 1526, 21169]),
    ("padchest", "test"): (1_860, None, {"atelectasis": 28, "laminar atelectasis": 71, "cardiomegaly": 162,
                                         "consolidation": 13, "pleural effusion": 51}),
    ("covidx_ct", "val"): (33_725, 560, [17570, 8008, 8147]),
    ("covidx_ct", "test"): (33_781, 503, [17922, 7965, 7894]),
}
MAY_SHARE = ("oct", "covidx_ct")        # their makers' splits do not promise to keep patients apart

# Table 9: role and dataset as printed -> dataset, and its splits that count as used.
USED = {
    ("pretraining", "ImageNet"): ("imagenet", ["pretrain"]),
    ("pretraining", "NIH ChestX-ray8"): ("nih_pretrain", ["pretrain"]),
    ("pretraining", "MIMIC-IV-CXR"): ("mimic_cxr", ["pretrain"]),
    ("pretraining", "CovidxCT"): ("covidx_ct", ["pretrain"]),
    ("pretraining", "OCT"): ("oct", ["pretrain"]),
    ("finetuning", "NIH ChestX-ray14"): ("nih", ["train", "val"]),
    ("evaluation", "NIH ChestX-ray14"): ("nih", ["test"]),
    ("evaluation", "CheXpert test"): ("chexpert", ["test"]),
    ("evaluation", "CheXpert vali"): ("chexpert", ["val"]),
    ("evaluation", "PadChest"): ("padchest", ["test"]),
    ("evaluation", "VinDr-CXR"): ("vindr_cxr", ["test"]),
}

# Findings whose printed name differs from the column's in more than case and underscores.
NAMES = {("nih", "Pleural Effusion"): "Effusion", ("chexpert", "Support device"): "Support Devices",
         ("chexpert", "Enlarged Cardiom."): "Enlarged Cardiomediastinum"}

# Known disagreements: table, part, quantity -> why.
WHY = {
    (9, "pretraining", "ImageNet available"): "14 million is the full ImageNet; the study used ImageNet-1k",
    (9, "pretraining", "NIH ChestX-ray8 available"): "109k is ChestX-ray8, the labels are ChestX-ray14's",
    (9, "pretraining", "MIMIC-IV-CXR used"): "the index holds the size series, arms take its first 100,000",
    (9, "pretraining", "CovidxCT available"): "430k is release 3B; 3A has 425,024, 67,506 without train",
    (9, "finetuning", "NIH ChestX-ray14 used"): "86k is cut, not rounded",
    (9, "evaluation", "CheXpert vali available"): "valid.csv has 234 rows; the text says 235",
    (9, "evaluation", "PadChest available"): "160,868 in the full table; the one read was filtered before",
    (9, "evaluation", "VinDr-CXR available"): "100,000 were gathered, 18,000 are public",
    (10, "chexpert_valid", "Scans"): "printed with laterals: index with --views all",
    (12, "", "Scans"): "the stated filter gives 1,860 rows",
    (12, "", "Atelectasis"): "printed are 106 mentions, in 104 images",
    (12, "", "Pleural Effusion"): "printed with a loculated one; evaluation takes the exact label",
    (13, "", "Female"): "quoted from the dataset's publication, its files have no sex",
}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


@contextlib.contextmanager
def replacing(path):
    """Give a temporary name to write to; what was written is brought to disk, then renamed to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_index(path):
    """(dataset, rows, facts) of an index: cells as text, blank where unknown; facts are its index.json's."""
    described = path.with_suffix(".json")
    try:
        facts = json.loads(described.read_text()) if described.exists() else {}
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as problem:                # ValueError: bad JSON, not UTF-8, not a table
        fail(f"{path} or its .json cannot be read ({' '.join(str(problem).split())}); make the index anew")
    if not isinstance(facts, dict):
        fail(f"{path} or its .json cannot be read (no object in {described.name}); make the index anew")
    for column in ("path", "split"):
        if column not in rows:
            fail(f"{path} row 1: no column '{column}'; make the index anew")
    rows = rows.reindex(columns=FACTS + [name for name in rows if name not in FACTS], fill_value="")
    return facts.get("dataset", path.parent.name), rows, facts


def part(indexes, dataset, splits):
    """Rows of some splits of a dataset, out of its index that has most of them; None if there are none."""
    found = [rows[rows.split.isin(splits)] for name, rows, _ in indexes if name == dataset]
    found = max(found, key=len, default=())
    return found if len(found) else None


def half_up(numerator, denominator, like):
    """A quotient rounded half up to the decimals of the text `like`, as text."""
    return str((Decimal(numerator) / Decimal(denominator)).quantize(Decimal(like), ROUND_HALF_UP))


def positives(rows, dataset, finding):
    """Images with a finding, under the dataset's own name for it; None if the dataset cannot tell."""
    plain = NAMES.get((dataset, finding), finding).lower()
    columns = [name for name in rows if name not in FACTS and name.lower().replace("_", " ") == plain]
    if (dataset, finding) == ("padchest", "Atelectasis"):           # as the study: any label that contains it
        columns = [name for name in rows if "atelectasis" in name]
    if not columns and dataset == "padchest":                       # only labels that occur are columns
        return 0
    if not columns or (rows[columns] == "").all(axis=None):
        return None
    return int((rows[columns] == "1").any(axis=1).sum())


def measure(rows, dataset, quantity, like):
    """A quantity of Tables 10-13: (text rounded as printed, numerator, denominator or None), or None."""
    if quantity in ("Patients", "Scans"):
        n = rows.patient.nunique() if quantity == "Patients" else len(rows)
        return str(n), n, None
    if quantity.startswith("Age"):
        age = pd.to_numeric(rows.age, errors="coerce").dropna()
        if age.empty:
            return None
        n = int({"Age mean": age.sum, "Age min": age.min, "Age max": age.max}[quantity]())
        of = len(age) if quantity == "Age mean" else None
        return half_up(n, of or 1, like), n, of
    if quantity == "Female":
        n = int((rows.sex == "F").sum()) if (rows.sex != "").any() else None
    else:
        n = positives(rows, dataset, quantity)
    return None if n is None else (half_up(100 * n, len(rows), like), n, len(rows))


def compare(indexes, reported):
    """The cells of Tables 9-13: a frame of printed and computed values, counts, and whether they agree."""
    cells = []

    def add(table, where, quantity, group, printed, rows, found):
        text, numerator, denominator = found or ("", None, None)
        agrees = "" if not printed or not found else "yes" if text == printed else "no"
        open_question = agrees == "no" or (printed and not found and rows is not None)
        why = WHY.get((table, where, quantity), "") if open_question else ""
        cells.append(dict(table=table, part=where, quantity=quantity, group=group, printed=printed,
                          computed=text, numerator=numerator, denominator=denominator,
                          agrees=agrees, why=why))

    for _, line in reported[9].iterrows():
        dataset, splits = USED[line.role, line.dataset]
        rows = part(indexes, dataset, splits)
        available = {name: facts.get("available") for name, _, facts in indexes}.get(dataset)
        if line.dataset == "CheXpert vali" and rows is not None:
            available, rows = len(rows), rows[rows["view"] != "Lateral"]
        for quantity, n in (("used", None if rows is None else len(rows)), ("available", available)):
            zeros = len(line[quantity]) - len(line[quantity].rstrip("0"))
            unit = 10 ** min(3, zeros)                              # printed as 86k, 1.9k, 202
            found = None if n is None else (str(int(half_up(n, unit, "1")) * unit), n, None)
            add(9, line.role, f"{line.dataset} {quantity}", "", line[quantity], rows, found)

    for where, split in (("chexpert_valid", "val"), ("chexpert_test", "test")):
        everyone = part(indexes, "chexpert", [split])
        for group in reported[10].group.unique():
            rows = everyone
            if everyone is not None and group != "all":
                rows = everyone[everyone.race.str.contains(group, case=False)]
            known = rows is not None and len(rows) > 0              # no race known: nothing to compare
            lines = reported[10][(reported[10].part == where) & (reported[10].group == group)]
            for _, line in lines.iterrows():
                found = measure(rows, "chexpert", line.quantity, line.value) if known else None
                add(10, where, line.quantity, group, line.value, rows, found)

    printed = {(line.quantity, line.split): line.value for _, line in reported[11].iterrows()}
    for split in ("train", "val", "test"):                          # val is not printed
        rows = part(indexes, "nih", [split])
        for quantity in reported[11].quantity.unique():
            found = rows if rows is None else measure(rows, "nih", quantity, printed[quantity, "train"])
            add(11, "", quantity, split, printed.get((quantity, split), ""), rows, found)

    for table, dataset in ((12, "padchest"), (13, "vindr_cxr")):
        rows = part(indexes, dataset, ["test"])
        for _, line in reported[table].iterrows():
            found = rows if rows is None else measure(rows, dataset, line.quantity, line.value)
            add(table, "", line.quantity, "", line.value, rows, found)
    return pd.DataFrame(cells, dtype=object)


def misses(indexes):
    """A sentence for every exact count that an index of its dataset does not have."""
    said = []
    for (dataset, split), (images, patients, labels) in EXACT.items():
        name, _, views = split.partition(", ")
        sampled = dataset == "covidx_ct" and part(indexes, dataset, ["pretrain"]) is not None
        if sampled or dataset not in {known for known, *_ in indexes}:
            continue                                                # a sample has not the counts of the lists
        rows = part(indexes, dataset, [name])
        rows = pd.DataFrame(columns=FACTS) if rows is None else rows
        lateral = rows["view"] == "Lateral"
        if views and not lateral.any():
            continue                                                # an index of frontal views
        rows = rows if views else rows[~lateral]
        columns = [column for column in rows if column not in FACTS]
        found = {"images": len(rows), "patients": rows.patient.nunique()} | {
            column: int((rows[column] == "1").sum()) for column in columns}
        expected = {"images": images, "patients": patients or found["patients"]} | (
            labels if isinstance(labels, dict) else dict(zip(columns, labels)))
        said += [f"{dataset} {split}, {what}: expected {n:,}, found {found.get(what, 0):,}"
                 for what, n in expected.items() if found.get(what, 0) != n]
    return said


def leaks(indexes):
    """(dataset, what, number, whether it must be 0): patients and images that stand on two sides."""
    found = []
    for dataset, rows, facts in indexes:
        groups = {split: set(some.patient) for split, some in rows.groupby("split")}
        found += [(dataset, f"patients in {one} and {two}", len(groups[one] & groups[two]),
                   dataset not in MAY_SHARE) for one, two in combinations(groups, 2)]
        for key, what in (("test_patients_in_train", "test patients in train, before the sample was drawn"),
                          ("patients_in_two_lists", "patients in two lists, before the sample was drawn")):
            if key in facts:
                found.append((dataset, what, facts[key], False))
        if facts.get("fallback_split"):
            found.append((dataset, "images of a fallback val split", int((rows.split == "val").sum()), False))
    sample, test = part(indexes, "nih_pretrain", ["pretrain"]), part(indexes, "nih", ["test"])
    if sample is not None and test is not None:
        drawn, names = (set(rows.path.str.rpartition("/")[2]) for rows in (sample, test))
        found += [("nih_pretrain", "images of the sample in NIH's test split", len(drawn & names), False),
                  ("nih_pretrain", "patients of the sample in NIH's test split",
                   len(set(sample.patient) & set(test.patient)), False)]
    return found


def show(cell):
    """One cell of a Markdown table: the value with its count, and what is printed where it differs."""
    if not cell.computed:
        return f"– (printed {cell.printed})"
    value = f"{cell.numerator:,}" if cell.denominator is None else \
        f"{cell.computed} ({cell.numerator:,}/{cell.denominator:,})"
    return {"yes": f"{value} ✓", "no": f"**{value}** ✗ printed {cell.printed}", "": value}[cell.agrees]


def markdown(cells, found, missed):
    """The report as Markdown: how many cells agree, which differ, exact counts, leaks, then every cell."""
    text = ["# Distributions of the data", "",
            "Printed against computed; every percentage and age is over images.",
            "✓ agrees, ✗ differs, – cannot be computed from the indexes given.", "",
            "| table | cells | agree | differ | not computable |", "|---|---|---|---|---|"]
    for table, rows in cells[cells.printed != ""].groupby("table"):
        numbers = [(rows.agrees == verdict).sum() for verdict in ("yes", "no", "")]
        text.append(f"| {table} | {len(rows)} | {' | '.join(map(str, numbers))} |")
    text += ["", "| table | quantity | printed | computed | count | why |", "|---|---|---|---|---|---|"]
    for cell in cells[(cells.agrees == "no") | (cells.why != "")].itertuples():
        counts = "–" if cell.numerator is None else f"{cell.numerator:,}"
        counts += f" of {cell.denominator:,}" if cell.denominator else ""
        what = " ".join(filter(None, [cell.part, cell.quantity, cell.group]))
        values = f"{cell.printed} | {cell.computed or '–'} | {counts}"
        text.append(f"| {cell.table} | {what} | {values} | {cell.why} |")
    text += ["", "## Exact counts", "", *([f"- {sentence}" for sentence in missed] or ["None missed."]),
             "", "## On two sides", "", "| dataset | what | number | |", "|---|---|---|---|"]
    text += [f"| {dataset} | {what} | {n:,} | {'must be 0' * zero} |" for dataset, what, n, zero in found]
    for (table, where), rows in cells.groupby(["table", "part"], sort=False):
        groups = rows.group.unique()
        text += ["", f"## Table {table}{': ' * bool(where)}{where}", "", f"| | {' | '.join(groups)} |",
                 "|---" * (len(groups) + 1) + "|"]
        text += [f"| {quantity} | {' | '.join(show(cell) for cell in line.itertuples())} |"
                 for quantity, line in rows.groupby("quantity", sort=False)]
    return "\n".join(text) + "\n"


def figure1(packs, out):
    """Figure 1 of the study: an image of each dataset, the first of its pack, in two rows of four."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "figure1"                 # the same bytes for the same images
    from matplotlib import pyplot as plt
    import numpy as np

    panels = {"imagenet": "ImageNet", "mimic_cxr": "MIMIC-CXR", "oct": "OCT", "covidx_ct": "COVIDx-CT",
              "nih": "NIH ChestX-ray", "chexpert": "CheXpert", "padchest": "PadChest",
              "vindr_cxr": "VinDr-CXR"}
    images = {}
    for folder in packs:
        try:
            dataset = json.loads((folder / "pack.json").read_text())["dataset"]
            image = np.load(folder / "images.npy", mmap_mode="r")[0]
        except (OSError, ValueError, KeyError, IndexError) as problem:
            fail(f"{folder}: no pack with images ({problem}); give folders that pack.py wrote")
        images.setdefault(dataset.removesuffix("_pretrain"), image)
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for axis, (dataset, title) in zip(axes.flat, panels.items()):
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_title(title, fontsize=11)
        if dataset in images:
            axis.imshow(images[dataset], cmap="gray", vmin=0, vmax=255)
        else:
            axis.text(0.5, 0.5, "no pack given", ha="center", color="0.5", transform=axis.transAxes)
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        with replacing(out / f"figure1.{kind}") as path:
            figure.savefig(path, format=kind, dpi=150, metadata=metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", type=Path, nargs="+", required=True, help="index.csv files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--packs", type=Path, nargs="+", default=[], help="packed folders, for Figure 1")
    parser.add_argument("--reported", type=Path, default=REPORTED, help="folder of the printed tables")
    parser.add_argument("--check", action="store_true", help="exit 1 on a missed count or shared patient")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    indexes = [read_index(path) for path in args.index]
    try:
        reported = {table: pd.read_csv(args.reported / f"table{table}.csv", dtype=str, keep_default_na=False)
                    for table in range(9, 14)}
    except (OSError, ValueError) as problem:
        fail(f"{args.reported}: {problem}; give the folder of the printed tables with --reported")

    cells, found, missed = compare(indexes, reported), leaks(indexes), misses(indexes)
    texts = {"distributions.csv": cells.to_csv(index=False, lineterminator="\n"),
             "distributions.md": markdown(cells, found, missed)}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.packs:
            figure1(args.packs, args.out)
        for name, text in texts.items():
            with replacing(args.out / name) as path, open(path, "w", encoding="utf-8", newline="") as file:
                file.write(text)
    except OSError as problem:
        fail(f"{args.out} cannot be written ({problem.strerror}); choose another --out")
    head = texts["distributions.md"].partition("| table | quantity")[0]
    print(f"{head}every cell: {args.out}/distributions.md")
    wrong = missed + [f"{dataset}, {what}: expected 0, found {n:,}"
                      for dataset, what, n, zero in found if zero and n]
    if args.check and wrong:
        print(*(f"check failed: {sentence}" for sentence in wrong), sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
