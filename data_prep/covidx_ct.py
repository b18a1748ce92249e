"""COVIDx CT-3 -> index.csv: 100,000 axial slices of chest CT out of 425,024, for pre-training without labels.

Gunraj et al., "COVID-Net CT-2", arXiv:2101.07433; https://github.com/haydengunraj/COVIDNet-CT. Creative
Commons by source, several of them non-commercial. Tens of GB of PNG:
    kaggle datasets download -d hgunraj/covidxct -p raw/covidx_ct --unzip
Kaggle has 3A; 3B, the "430k" of the study, adds weakly verified slices and is built by its makers' scripts.

    python data_prep/covidx_ct.py --raw raw/covidx_ct --out data/covidx_ct/index.csv

Reads {train,val,test}_COVIDx_CT-3A.txt, metadata.csv, and 3A_images/, images/ or COVIDx_CT-3A/; all splits.
Writes split pretrain in the order of the draw, three class columns. Slices of a volume are near-copies."""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES = ["Normal", "Pneumonia", "COVID-19"]           # 0, 1, 2 of the lists, `finding` of the metadata

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

def patient_of(name, known):
    """Patient of a slice, None if unknown: `patient45` before _SR_, or the longest beginning in `known`."""
    covid_ctset = re.search(r"(patient\d+)_SR_", name)
    rest = covid_ctset[1] if covid_ctset else name.rpartition(".")[0]
    while rest and not covid_ctset and rest not in known:
        rest = rest[:max(rest.rfind("_"), rest.rfind("-"), 0)]
    return rest or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--raw", type=Path, default="raw/covidx_ct", help="the download (%(default)s)")
    option("--out", type=Path, default="data/covidx_ct/index.csv", help="the index (%(default)s)")
    option("--release", choices=["3A", "3B", "2A"], default="3A", help="(%(default)s)")
    option("--n-pretrain", metavar="N", default="100000", help="or all, or 0 for no sample (%(default)s)")
    option("--seed", type=int, default=42, help="of the sample (%(default)s)")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    lists = f"*_COVIDx_CT-{args.release}.txt*"
    home, tables = find(args.raw, lists).parent, {}
    for path in sorted(home.glob(f"[!.]{lists}")):                  # not macOS's ._*
        print("list:", path.name)
        lines = read_table(path, sep="\t", header=None)[0]                  # whole lines: there is no tab
        rows = lines.str.extract(r"^(?P<path>\S+) +(?P<number>[012])(?: +\d+){4}$")
        if rows.path.isna().any():
            fail(f"{path} row {rows.path.isna().idxmax()}: not `name class and four numbers`; download again")
        tables[path.name.partition("_")[0]] = rows              # one list, though it may lie there as .gz too
    table = pd.concat(tables).reset_index(0, names="split")
    path = find(args.raw, "metadata.csv*")
    people = read_table(path, ["patient id", "sex", "age", "view"]).rename(columns={"patient id": "patient"})
    known = set(people.patient)
    table["study"] = table.path.str.replace(r"[_-][^_-]*$", "", regex=True)                 # the volume
    table["patient"] = table.path.map(lambda name: patient_of(name, known)).fillna(table.study)
    table = join(table, people.drop_duplicates("patient"), ["patient"], path)
    age = pd.to_numeric(table.age, errors="coerce")
    table["age"] = age.where(age.between(0, 120)).round().astype("Int64")
    table[CLASSES] = np.eye(3, dtype=int)[table.pop("number").astype(int)]
    names = [f"{args.release}_images", "images", f"COVIDx_CT-{args.release}"]
    folder = find(args.raw, *names, required=False) or home / names[0]
    table["path"] = f"{folder.relative_to(args.raw).as_posix()}/" + table.path
    absent = sorted({"train", "val", "test"} - set(table.split))
    rows = table.sort_values("path") if args.n_pretrain == "0" else sample(table, args.n_pretrain, args.seed)
    write_index(rows, args.out, dataset="covidx_ct", available=len(table), absent_lists=absent,
                patients_in_two_lists=int((table.groupby("patient").split.nunique() > 1).sum()))

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

# --- begin copy: sample ---
def sample(pool, n, seed):
    """n (a number or `all`) rows of `pool`. Sorted by path, a seeded permutation, its first n: so nested."""
    size = len(pool) if n == "all" else int(n) if n.isdecimal() else 0
    if not 0 < size <= len(pool) or seed < 0:
        fail(f"--n-pretrain {n}: {len(pool):,} images are eligible, or `all`; --seed {seed}: 0 or more")
    order = np.random.default_rng(seed).permutation(len(pool))[:size]
    return pool.sort_values("path").iloc[order].assign(split="pretrain")
# --- end copy: sample ---

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
