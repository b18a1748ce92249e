"""Recomputes Tables 9-13 of the study from index.csv files, draws Figure 1, finds images that packs share.

Percentages and ages are over images, as in the study, also where it says "of patients".

    python data_prep/describe.py --index data/*/index.csv --packs data/nih data/oct --out results/data --check
    python data_prep/describe.py --overlap data/mimic_cxr data/nih:test data/chexpert --out results/data

Reads   index.csv files (or a pack's manifest.csv) with index.json beside them, evaluate/reported/*.csv, packs
Writes  distributions.csv; figure1.png and figure1.svg if packs are given (images of MIMIC-CXR and VinDr-CXR
        must not be passed on); overlap.csv, a line a shared image, and overlaps.csv, a line a pair of packs
--check exits with 1 if an index misses its counts or a patient is in two splits (not OCT, CT). --overlap: the
first pack against the others, or all with --against. Equal: every pixel; near: r 0.995 at 16 x 16 pixels."""

import argparse
import hashlib
import json
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

REPORTED = Path(__file__).resolve().parent.parent / "evaluate" / "reported"
FACTS = pd.Index("path patient study split view sex age race".split())             # other columns are labels
MAY_SHARE = ("oct", "covidx_ct")        # their makers' splits do not promise to keep patients apart
# 2,500 radiographs keep this recompressed, halved, doubled, shifted by 20 grey levels; of 8.1 million pairs
# of different ones none has it, of a set of CT slices 0.03 % do. A cropped image is not found.
NEAR = 0.995

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def read(path, load, **options):
    """load(path, **options); where the file is broken, a sentence."""
    try:
        return load(path, **options)
    except (ValueError, TypeError, EOFError) as problem:
        fail(f"{path} cannot be read ({str(problem).strip()}); make it anew")


def read_table(path, *columns):
    """A CSV file as text, '' where blank, with these columns."""
    rows = read(path, pd.read_csv, dtype=str, keep_default_na=False, engine="python")
    for column in columns:
        if column not in rows:
            fail(f"{path} row 1: no column '{column}'; make it anew")
    odd = rows.isna().any(axis=1) | (rows.index != pd.RangeIndex(len(rows)))    # short rows, long ones
    if odd.any():
        fail(f"{path} row {odd.argmax() + 2}: more or fewer cells than the header has; make it anew")
    return rows


def read_json(path):
    """The object in a JSON file, {} without one."""
    return read(path, lambda path: dict(json.loads(path.read_text()))) if path.exists() else {}


def read_index(path):
    """(dataset, rows, facts) of an index; facts are those of index.json, and the mark in pack.json."""
    rows = read_table(path, "path", "split")
    facts = read_json(path.with_name("index.json"))
    facts["stand_in"] = read_json(path.with_name("pack.json")).get("stand_in")
    columns = FACTS.union(rows.columns, sort=False)
    rows = rows.reindex(columns=columns, fill_value="").replace("1.0", "1")
    rows["patient"] = rows.patient.mask(rows.patient == "")
    rows["sex"] = rows.sex.str[:1].str.upper()
    rows["age"] = rows.age.str.rstrip("Y")                          # 061Y, in DICOM
    return facts.get("dataset", path.absolute().parent.name), rows, facts


def part(indexes, dataset, splits):
    """Rows of some splits of a dataset, out of its index that has most of them, and that index's facts."""
    found = pd.DataFrame(columns=FACTS), {}
    for name, rows, facts in reversed(indexes):                     # of two as long: the first
        chosen = rows[rows.split.isin(splits)]
        if name == dataset and len(chosen) >= len(found[0]):
            found = chosen, facts
    return found


def half_up(numerator, denominator, digits):
    """A quotient rounded half up to the place of `digits`, such as 1E3 or 0.1, as text."""
    quotient = Decimal(int(numerator)) / Decimal(denominator)
    return f"{quotient.quantize(Decimal(digits), ROUND_HALF_UP):f}"


def measure(rows, facts, what):
    """What datasets.csv asks of these rows: numerator (None: not known), denominator (None: 1) and factor."""
    counts = {"images": len(rows), "patients": rows.patient.nunique(), "available": facts.get("available"),
              "frontal": (rows["view"] != "Lateral").sum()}
    if what in counts or rows.empty:
        return counts.get(what) or None, None, 1
    if what.startswith("age "):
        age = pd.to_numeric(rows.age, errors="coerce").dropna()
        if age.empty:
            return None, None, 1
        n = int(age.agg(what.removeprefix("age ")))
        of = len(age) if what == "age sum" else None
        return n, of, 1
    cells = rows.filter(regex=f"^{what}$")
    if cells.size and (cells == "").all(axis=None):
        return None, None, 1
    marked = cells.isin(["1", "F"]).any(axis=1)                 # no column, in PadChest: it does not occur
    return int(marked.sum()), len(rows), 100


def compare(indexes):
    """Tables 9-13 as a frame: cells as printed and computed, counts. Table 11's validation is not printed."""
    cells = read_table(REPORTED / "datasets.csv").to_dict("records")
    for cell in cells:
        rows, facts = part(indexes, cell["dataset"], cell["splits"].split())
        rows = rows[rows.race.str.contains(cell["race"], case=False)]
        n, of, factor = measure(rows, facts, cell["what"])
        computed = "" if n is None else half_up(factor * n, of or 1, cell["digits"])
        cell |= {"computed": computed, "numerator": n, "denominator": of, "agrees": ""}
        if cell["printed"] and computed:
            cell["agrees"] = "yes" if cell["printed"] == computed else "no"
        if cell["agrees"] == "yes":
            cell["why"] = ""
    columns = "table part quantity group printed computed why numerator denominator agrees".split()
    return pd.DataFrame(cells, columns=columns, dtype=object)


def misses(indexes):
    """A sentence for every exact count that an index misses; of two forms of a split the nearer in length."""
    said = []
    counts = read_table(REPORTED / "counts.csv").astype({"n": int})
    for (dataset, split), lines in counts.groupby(["dataset", "split"], sort=False):
        rows, _ = part(indexes, dataset, [split])
        if rows.empty:                      # not given, or all of it is in a sample
            continue
        positives = (rows.drop(columns=FACTS) == "1").sum()
        found = {"images": len(rows), "patients": rows.patient.nunique(), **positives}
        lines = lines.assign(found=[found.get(what, 0) for what in lines.what])
        images = lines[lines.what == "images"].set_index("form")
        form = (images.n - images.found).abs().idxmin()
        name = f"{dataset} {split} ({form})" if form else f"{dataset} {split}"
        for line in lines[(lines.form == form) & (lines.n != lines.found)].itertuples():
            said.append(f"{name}, {line.what}: expected {line.n:,}, found {line.found:,}")
    return said


def shared(indexes):
    """A row an index: its dataset, patients in more than one split, and the mark of a stand-in."""
    sides = []
    for dataset, rows, facts in indexes:
        splits = rows.groupby("patient").split.nunique()            # of blank patients nothing is known
        sides.append([dataset, (splits > 1).sum(), facts["stand_in"]])
    return pd.DataFrame(sides, columns=["dataset", "patients in two splits", "stand-in"])


def audit(indexes, out, check):
    """Write distributions.csv and print what disagrees; with `check` exit 1 on a miss or shared patient."""
    cells, sides = compare(indexes), shared(indexes)
    cells.to_csv(out / "distributions.csv", index=False)
    printed = cells[cells.printed != ""]
    summary = pd.crosstab(printed.table, printed.agrees).rename(columns={"": "not computable"})
    for table in (summary, cells.loc[cells.agrees == "no", "table":"why"], sides):
        print(table.to_string(), end="\n\n")
    missed = misses(indexes)
    for dataset, n, _ in sides.itertuples(index=False):
        if n and dataset not in MAY_SHARE:
            missed.append(f"{dataset}, patients in two splits: expected 0, found {n:,}")
    if check and missed:
        print("check failed:", "\ncheck failed: ".join(missed), file=sys.stderr)
        sys.exit(1)


def figure1(packs, out):
    """Figure 1 of the study: an image of each dataset, the first of its pack, in two rows of four."""
    from matplotlib import pyplot as plt
    plt.rcParams["svg.hashsalt"] = "figure1"                        # the same bytes for the same images
    panels = {"imagenet": "ImageNet", "mimic_cxr": "MIMIC-CXR", "oct": "OCT", "covidx_ct": "COVIDx-CT",
              "nih": "NIH ChestX-ray", "chexpert": "CheXpert", "padchest": "PadChest",
              "vindr_cxr": "VinDr-CXR"}
    folders = {folder.absolute().name: folder for folder in packs}          # of a link, its own name
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for axis, (dataset, title) in zip(axes.flat, panels.items()):
        folder = folders.get(dataset) or folders.get(f"{dataset}_pretrain")
        axis.set(xticks=[], yticks=[], frame_on=False, title=title)
        pack = read_json(folder / "pack.json") if folder else {}
        if folder and pack.get("size") != "original":                               # which has no array
            images = read(folder / "images.npy", np.load, mmap_mode="r")
            axis.imshow(images[0], cmap="gray", vmin=0, vmax=255)
            if pack.get("stand_in"):
                axis.set(title=f"{title} (stand-in)")
    figure.savefig(out / "figure1.png", dpi=150)
    figure.savefig(out / "figure1.svg", metadata={"Date": None})


def fingerprints(text):
    """PACK or PACK:SPLIT -> paths, hashes of the pixels, thumbnails [N, 256] of mean 0 and length 1."""
    folder, _, split = text.partition(":")
    images = read(Path(folder, "images.npy"), np.load, mmap_mode="r")
    rows = read_table(Path(folder, "manifest.csv"), "path")
    chosen = rows.index[rows.get("split", rows.path).eq(split) | (split == "")]
    if len(rows) != len(images) or chosen.empty:
        fail(f"--overlap {text}: no images of split '{split}', or not one a row of {folder}/manifest.csv")
    hashes, thumbnails = [], np.empty((len(chosen), 256), np.float32)
    for place, number in enumerate(chosen):
        hashes.append(hashlib.blake2b(images[number].tobytes()).digest())
        image = Image.fromarray(images[number]).convert("L")
        thumbnails[place] = np.ravel(image.resize((16, 16), Image.BICUBIC))
    thumbnails -= thumbnails.mean(1, keepdims=True)
    lengths = np.linalg.norm(thumbnails, axis=1, keepdims=True)
    thumbnails /= np.maximum(lengths, 1e-6)
    return rows.path[chosen].tolist(), hashes, thumbnails


def overlap(first, other):
    """Images of one pack in another, as rows: path, path of the most like one, equal or near, correlation."""
    paths, hashes, thumbnails = first
    places = {digest: place for place, digest in enumerate(other[1])}
    found = []
    for begin in range(0, len(paths), 256):                         # 100 MB at a time with 100,000 others
        table = thumbnails[begin:begin + 256] @ other[2].T
        for number, correlations in enumerate(table, start=begin):
            kind = "equal" if hashes[number] in places else "near"
            best = places.get(hashes[number], correlations.argmax())
            correlation = float(correlations[best])
            if kind == "equal" or correlation >= NEAR:
                found.append([paths[number], other[0][best], kind, round(correlation, 5)])
    return found


def write_overlaps(packs, others, out):
    """Write overlap.csv, and overlaps.csv, which is printed."""
    images, numbers = [], []
    others = {name: fingerprints(name) for name in others}
    for pack in packs:
        first = fingerprints(pack)
        for name, other in others.items():
            found = overlap(first, other)
            images += [[*row, pack, name] for row in found]
            equal = sum(kind == "equal" for _, _, kind, _ in found)
            numbers.append([pack, name, len(first[0]), len(other[0]), equal, len(found) - equal])
    columns = "path other_path kind correlation pack other".split()
    pd.DataFrame(images, columns=columns).to_csv(out / "overlap.csv", index=False)
    numbers = pd.DataFrame(numbers, columns="pack other images other_images equal near".split())
    numbers.to_csv(out / "overlaps.csv", index=False)
    print(numbers.to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--index", type=Path, nargs="+", default=[], help="index.csv files")
    option("--out", type=Path, required=True, help="folder to write to")
    option("--packs", type=Path, nargs="+", default=[], help="packed folders, for Figure 1")
    option("--overlap", nargs="*", default=[], help="packs that may share images, each PACK or PACK:SPLIT")
    option("--against", nargs="*", default=[], help="with each of these, likewise")
    option("--check", action="store_true", help="exit 1 on a missed count or shared patient")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    packs, others = args.overlap, args.against
    if not others:
        packs, others = packs[:1], packs[1:]
    if packs and not others or not (args.index or args.packs or others):
        fail("give --index, --packs, or --overlap with two packs")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.packs:
            figure1(args.packs, args.out)
        if others:
            write_overlaps(packs, others, args.out)
        if args.index:
            audit([read_index(path) for path in args.index], args.out, args.check)
    except OSError as problem:
        fail(f"{problem.filename or args.out}: {problem.strerror}")


if __name__ == "__main__":
    main()
