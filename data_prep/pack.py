"""Pack the images an index names into one uint8 array, or check that every one of them can be read.

Each file is decoded in full and stretched to S x S, 8-bit grey or colour, or listed with the reason why not.
Parts are joined at the end, in twice the space: killed at any time, the same command ends in the same bytes.

    python data_prep/pack.py --index data/nih/index.csv --raw raw/nih --out data/nih

Reads   the index (its column path is relative to --raw; no image outside --raw is opened) and the images
Writes  images.npy      uint8 [N, S, S] or [N, S, S, 3]; none with --size original
        manifest.csv    the packed rows; row i describes images.npy[i]; blank sex and age as in DICOM headers
        rejected.csv    path, reason; and pack.json: settings, counts, mean and deviation (0..1), stand-in"""

import argparse
import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "WEBP")   # no EPS: that runs Ghostscript
SHARD = 32                              # most rows of a part: the work of a worker that a kill can cost
CRASHED = {"reason": "unreadable: the decoder crashed"}, b""
STAND_IN = "drawn by data_prep/demo.py"         # says demo.py's README.txt in a dataset's folder or above
DICOM = {"corrected": "display", "paper": "paper"}      # the conversion of each variant
OF_THE_FILE = None, errno.EINVAL, errno.EOVERFLOW, errno.ENAMETOOLONG       # other errors are the disk's
TEXT = {"mode": "w", "newline": "", "encoding": "utf-8"}

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---

class Rejected(Exception):
    """Why an image is not packed: the reason in rejected.csv, its kind standing before the first colon."""


def percentile_window(levels, counts):
    """np.percentile's 0.5 and 99.5 of counts[i] pixels of levels[i]; the extremes where those coincide."""
    used = np.flatnonzero(counts)
    used = used[np.argsort(levels[used])]
    levels, ends = levels[used], np.cumsum(counts[used])
    ranks = np.column_stack([ends - counts[used], ends - 1]).ravel()        # first and last of every level
    black, white = np.interp([0.005 * ranks[-1], 0.995 * ranks[-1]], ranks, np.repeat(levels, 2))
    return (black, white) if black < white else (levels[0], max(levels[-1], levels[0] + 1))


def prepare_lut(ds, name, values):
    """Bits of this LUT's entries, 0 without it. A first input above all values is negative, as unsigned."""
    item = ds[name].value[0] if ds.get(name) else {}
    if not (item.get("LUTDescriptor") and item.get("LUTData")):             # both may be blank
        return 0
    if item.LUTDescriptor[1] > values.max():
        item.LUTDescriptor[1] -= 65536
    bits, item.LUTDescriptor[2] = item.LUTDescriptor[2], 16     # of 12 pydicom fails, of 8 positions wrap
    return bits


def dicom_display(values, code, ds):
    """What a viewer shows: modality LUT or rescale, then VOI LUT or first window or else the 0.5-99.5
    percentiles; MONOCHROME1 inverted once, padding black. Source: DICOM PS3.3, C.7.5.1.1.2, C.11.1, C.11.2.
    values: int32, the value behind each code; code: uint8 or uint16 [H, W]. Returns: uint8, their grey."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    padded = np.zeros(len(values), bool)
    if ds.get("PixelPaddingValue") is not None:
        ends = ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
        ends = np.array(ends).astype(f"{'ui'[ds.PixelRepresentation]}{code.itemsize}")     # 65535 may mean -1
        padded = (values >= ends.min()) & (values <= ends.max())
    prepare_lut(ds, "ModalityLUTSequence", values)
    ds.RescaleSlope = 1 if ds.get("RescaleSlope") is None else ds.RescaleSlope    # pydicom wants both,
    ds.RescaleIntercept = ds.get("RescaleIntercept") or 0                         # and neither blank
    values = apply_modality_lut(values, ds)
    if bits := prepare_lut(ds, "VOILUTSequence", values):
        black, white = 0, 2 ** bits - 1
        values = apply_voi_lut(values, ds)
    else:
        black, ds.VOILUTFunction = -np.inf, ds.get("VOILUTFunction") or "LINEAR"     # it may be empty
        with contextlib.suppress(TypeError, ValueError):                # no window, or one that cannot be
            black, white = apply_voi_lut(np.array([-np.inf, np.inf]), ds)
        if np.isfinite(black):
            values = apply_voi_lut(values, ds)
        else:
            counts = np.where(padded, 0, np.bincount(code.ravel(), minlength=len(values)))
            black, white = percentile_window(values, counts) if counts.any() else (0, 1)
    table = np.rint(np.clip((values - float(black)) / (float(white) - float(black)), 0, 1) * 255)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        table = 255 - table
    return np.where(padded, 0, table).astype(np.uint8)


def read_dicom(file, dicom="display"):
    """Decode a single-frame grey DICOM file: uint8 [H, W], and facts: monochrome1, person (sex and age in
    years, '' if unknown). Raises: Rejected, or what pydicom raises."""
    import pydicom                              # here: PNG and JPEG are packed without it
    ds = pydicom.dcmread(file, force=True)      # force: a file may lack the preamble
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise Rejected(f"multi-frame: {ds.NumberOfFrames} frames")
    kind, bits = ds.get("PhotometricInterpretation"), ds.get("BitsAllocated")
    if kind not in ("MONOCHROME1", "MONOCHROME2") or bits not in (8, 16):
        raise Rejected(f"wrong type: DICOM {kind} of {bits} bits; expected 8 or 16 bits of grey")
    syntax = ds.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    ds.file_meta.TransferSyntaxUID = syntax
    plain = not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless
    unused = plain * max(0, ds.get("HighBit", 0) + 1 - ds.BitsStored)       # those below: read, shifted out
    ds.BitsStored += unused
    stored = ds.pixel_array
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    code = stored.view(f"u{stored.itemsize}")   # a grey level is worked out once a value, then looked up
    values = np.arange(256 ** code.itemsize, dtype=code.dtype).view(stored.dtype).astype(np.int32) >> unused
    if dicom == "paper":                        # as the released notebook: MONOCHROME1 stays a negative
        top = max(int(stored.max()) >> unused, 1)
        table = (np.maximum(values, 0) / top * 255).astype(np.uint8)
    else:
        table = dicom_display(values, code, ds)
    sex = re.fullmatch("[MFO]", str(ds.get("PatientSex")))
    age = re.fullmatch(r"0*([1-9]\d?|1[01]\d|120)Y", str(ds.get("PatientAge")))
    person = {"sex": sex[0] if sex else "", "age": age[1] if age else ""}
    return table[code], {"monochrome1": kind == "MONOCHROME1", "person": person}


def read_image(file, channels=1, variant="corrected", dicom="display"):
    """Decode a file of any supported kind to 8 bits at its own size. Alpha is dropped, not composited; colour
    becomes Pillow's L (0.299, 0.587, 0.114). A TIFF is turned as its tag says, by EXIF nothing is. Returns: a
    Pillow image, mode L (1 channel) or RGB (3), and facts for pack.json. Raises: Rejected, or a decoder's."""
    with open(file, "rb") as stream:
        head = stream.read(132)
    facts = {"monochrome1": False, "sixteen_bit": False, "sixteen_bit_below_4096": False, "person": {}}
    if head[128:] == b"DICM" or Path(file).suffix.lower() in (".dcm", ".dicom"):
        grey, found = read_dicom(file, dicom)
        facts, image = facts | found, Image.fromarray(grey)
    else:
        with open(file, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise Rejected(f"multi-frame: {image.n_frames} frames")
            image.load()            # of a file given by name Pillow maps a plain TIFF, garbling a turned one
    tags = getattr(image, "tag_v2", {})         # of a TIFF
    if image.mode == "F" or image.mode == "I" and tags:
        raise Rejected("wrong type: floating-point, signed or 32-bit pixels")
    if image.mode.startswith("I"):              # 16 bits: convert("L") would clip at 255
        values = np.asarray(image)
        facts.update(sixteen_bit=True, sixteen_bit_below_4096=bool(values.max() < 4096))
        top = 2 ** tags.get(258, (16,))[0] - 1                              # BitsPerSample: 12 or 16
        if tags.get(262) == 0:                                              # WhiteIsZero
            values = top - values
        whole = np.trunc if variant == "paper" else np.rint
        image = Image.fromarray(whole(values / np.float32(top) * 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB"), facts


def locate(root, path):
    """The file behind an index path. Raises: Rejected if it is no file in `root`, OSError without root."""
    file = Path(os.path.realpath(os.path.join(root, path)))
    if path.startswith("/") or ".." in path.split("/") or not file.is_relative_to(os.path.realpath(root)):
        raise Rejected("outside the raw root: only --raw itself may be a link")
    if not file.is_file():
        if not any(os.scandir(root)):               # nor anything else: its disk is not mounted, say
            raise OSError(errno.ENOENT, "the raw folder is empty", root)
        raise Rejected("wrong type: not a regular file" if os.path.exists(file) else "missing")
    return file


def pack_row(path, config):
    """Answer one index row. Returns: its record, and its pixels as bytes, none if it is rejected or kept at
    original size. Raises: OSError where memory or the storage failed, which says nothing about the file."""
    size = config["size"]
    try:
        file = locate(config["raw"], path)
        image, facts = read_image(file, config["channels"], config["variant"], config["dicom"])
        if size != "original":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        histogram = np.reshape(image.histogram(), (-1, 256))
        if (histogram > 0).sum() == len(histogram):
            raise Rejected("all-constant")
    except Rejected as error:
        return {"reason": str(error)}, b""
    except MemoryError:
        raise OSError(errno.ENOMEM, "memory is short", path)
    except Exception as error:                  # a decoder may raise anything at all on a broken file
        if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
            error.filename = error.filename or path
            raise
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return {"reason": f"unreadable: {text}"}, b""
    pixels, level = image.tobytes(), np.arange(256)
    facts |= {"pixels": len(pixels), "sum": int((histogram @ level).sum()),
              "square": int((histogram @ level ** 2).sum())}
    return {"person": facts.pop("person"), "facts": facts}, b"" if size == "original" else pixels


@contextlib.contextmanager
def replacing(path, folder, **how):
    """Write a file under a temporary name in `folder`; move it to `path` once it is whole and on disk."""
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"      # a worker may outlive its parent for a moment
    try:
        with open(temporary, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def work(k, shards, crashed, rows, problems, config):
    """Worker k: writes the parts that are not there, a line of JSON with a record a row, then the pixels.
    rows[k] is the row it is at; rows `crashed` are not opened; an OSError is put into `problems`."""
    warnings.simplefilter("ignore")                 # remarks on odd headers; what matters becomes a reason
    parent = multiprocessing.parent_process()
    try:
        for part, first, paths in shards:
            if part.exists():
                continue
            answers = []
            for row, path in enumerate(paths, start=first):
                if parent and not parent.is_alive():
                    return
                rows[k] = row
                answers.append(CRASHED if row in crashed else pack_row(path, config))
            records, pixels = zip(*answers)
            with replacing(part, part.parent, mode="wb") as file:
                file.write(json.dumps(records).encode() + b"\n")
                file.writelines(pixels)
    except OSError as problem:                      # such as a full disk
        problems.put(problem)


def pack_shards(shards, workers, config):
    """Pack shards (part, number of its first row, paths) by worker processes. One that crashes did so on the
    row it was at: another goes on in its place, without opening that one."""
    context = multiprocessing.get_context("spawn")
    problems, rows = context.SimpleQueue(), context.RawArray("q", [-1] * workers)
    crashed, team = {-1}, {}                        # team: {sentinel: (number, worker)}

    def employ(k):
        given = k, shards[k::workers], crashed, rows, problems, config
        worker = context.Process(target=work, args=given, daemon=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)            # inherited: Ctrl-C is for the parent
        worker.start()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        team[worker.sentinel] = k, worker
    for k in range(min(workers, len(shards))):
        employ(k)
    begun, total = time.monotonic(), sum(len(paths) for _, _, paths in shards)
    while team:
        ended = wait(team, timeout=5)
        if not ended:
            done = sum(len(paths) for part, _, paths in shards if part.exists())
            rate, left = max(done, 1) / (time.monotonic() - begun), total - done
            print(f"pack  {done:,}/{total:,}  {rate:,.1f} img/s  eta {left / rate:,.0f} s", flush=True)
        for k, worker in map(team.pop, ended):
            worker.join()
            if not problems.empty():
                raise problems.get()
            if worker.exitcode and (worker.exitcode in (-9, -15) or rows[k] in crashed):    # killed, or again
                fail(f"a worker ended with {worker.exitcode} (-9: is memory short?); take fewer --workers")
            if worker.exitcode:
                crashed.add(rows[k])
                employ(k)


def index_rows(index, splits):
    """Yield the index rows of these splits (of all, if empty) as {column: cell}."""
    try:
        with open(index, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if "path" not in names or "" in names or len(set(names)) < len(names):
                fail(f"{index} row 1: expected a column path, no name blank or twice; not {names[:30]}")
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    fail(f"{index} row {number}: expected as many cells as the header has, {len(names)}")
                if not splits or row.get("split") in splits:
                    yield row
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f"{index}: not a CSV file in UTF-8 ({error}); save it as one")


def is_finished(out, config):
    """Whether `out` holds a finished pack of these settings, with its manifest.csv and images.npy. One of
    another maker or of other settings is refused, but for drawn images, which are packed anew."""
    there, facts = {path.name for path in out.iterdir()}, out / "pack.json"
    try:
        found = dict(json.loads(facts.read_text())) if facts.exists() else {}
    except (ValueError, TypeError):
        fail(f"{facts}: not a JSON object; remove it or choose another folder")
    other = [key for key in config if found and found.get(key) != config[key]]
    if other and found.get("stand_in") != STAND_IN:
        fail(f"{out}: its {other[0]} is {found.get(other[0])!r}, not {config[other[0]]!r}; remove the folder "
             f"{out} and make its index again, or use another --out")
    if not found and {"manifest.csv", "images.npy"} & there and not any(out.glob("parts-*")):
        fail(f"{out}: holds a manifest.csv or images.npy of another maker; use another --out")
    whole = "manifest.csv" in there and ("images.npy" in there or config["size"] == "original")
    return bool(found) and not other and whole


def join(shards, out, config, index):
    """Join the parts into images.npy and the tables. Returns: what pack.json is to say."""
    folder, tally, reasons, order = shards[0][0].parent, Counter(N=0), Counter(), hashlib.sha256()
    rows = index_rows(index, config["splits"])
    with replacing(out / "manifest.csv", folder, **TEXT) as file, \
            replacing(out / "rejected.csv", folder, **TEXT) as other:       # renamed after images.npy
        manifest, rejected = csv.writer(file, lineterminator="\n"), csv.writer(other, lineterminator="\n")
        rejected.writerow(["path", "reason"])
        for part, _, _ in shards:
            with open(part, "rb") as file:
                records = json.loads(file.readline())
            for record, row in zip(records, rows):
                if "reason" in record:
                    rejected.writerow([row["path"], record["reason"]])
                    reasons[record["reason"].partition(":")[0]] += 1
                    continue
                if not tally["N"]:
                    manifest.writerow(row)
                row |= {name: cell for name, cell in record["person"].items() if row.get(name) == ""}
                manifest.writerow(row.values())
                order.update(row["path"].encode() + b"\n")
                tally.update(record["facts"], N=1)
        if config["size"] != "original":
            with replacing(out / "images.npy", folder, mode="wb") as images:
                shape = (tally["N"], config["size"], config["size"], 3)[:3 + (config["channels"] == 3)]
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(images, header)
                for part, _, _ in shards:
                    with open(part, "rb") as file:
                        file.readline()
                        shutil.copyfileobj(file, images)
    n, total, square = (tally.pop(key, 1) for key in ("pixels", "sum", "square"))
    return {**config, **tally, "rejected": reasons.total(), "reasons": dict(reasons), "mean": total / n / 255,
            "std": (n * square - total ** 2) ** 0.5 / n / 255, "order": order.hexdigest()}


def pack(args):
    """Check index and folder, then pack, join and report, unless that was done before."""
    out, splits = args.out, args.splits.split(",") if args.splits else []
    config = {"index_sha256": hashlib.sha256(args.index.read_bytes()).hexdigest(), "splits": splits,
              "raw": os.path.abspath(args.raw), "size": args.size, "channels": args.channels,
              "variant": args.variant, "dicom": args.dicom or DICOM[args.variant]}
    rows = [(row["path"], row.get("split")) for row in index_rows(args.index, splits)]
    if not rows or not {split for _, split in rows} >= set(splits):
        fail(f"{args.index}: no rows of split {args.splits or 'any'}")
    paths = [path for path, _ in rows]
    twice, n = Counter(map(os.path.normpath, paths)).most_common(1)[0]      # ./a.png is a.png
    if n > 1:
        fail(f"{args.index}: the path {twice!r} stands in several rows; leave one of them")
    size = max(1, min(SHARD, len(paths) // 64))                 # few rows keep all workers busy, too
    folder = out / f"parts-{hashlib.sha256(repr((size, config)).encode()).hexdigest()[:12]}"
    out.mkdir(parents=True, exist_ok=True)
    try:                                            # held until this process ends, however it ends
        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):      # not NFS, for one, which locks no folders
            fail(f"{out}: another run is packing into this folder; wait for it or use another --out")
    if is_finished(out, config):
        print(f"{out} is packed already: nothing to do (to pack it again, remove {out}/manifest.csv)")
    else:
        for path in paths if args.require_files else ():
            try:
                locate(args.raw, path)
            except Rejected as reason:
                fail(f"{path!r} in {args.raw}: {reason}; complete the download or drop --require-files")
        folder.mkdir(exist_ok=True)
        for part in folder.iterdir():               # what was rejected may have been downloaded since
            if part.suffix == ".tmp" or b'"reason"' in part.open("rb").readline():
                part.unlink()
        shards = [(folder / f"{first // size:06}", first, paths[first:first + size])
                  for first in range(0, len(paths), size)]
        pack_shards([shard for shard in shards if not shard[0].exists()], args.workers, config)
        (out / "pack.json").unlink(missing_ok=True)             # before the files that it describes
        facts = {"dataset": out.resolve().name, **join(shards, out, config, args.index)}
        notes = [folder / "README.txt" for folder in (args.raw.resolve(), *args.raw.resolve().parents)]
        drawn = any(STAND_IN in note.read_text(errors="replace") for note in notes if note.is_file())
        facts["stand_in"] = STAND_IN if drawn else None
        if not facts["N"]:
            shutil.rmtree(folder)
            for name in ("manifest.csv", "images.npy"):
                (out / name).unlink(missing_ok=True)
            fail(f"{args.index}: no row could be packed {facts['reasons']}; see {out}/rejected.csv, --raw")
        with replacing(out / "pack.json", folder, **TEXT) as file:
            json.dump(facts, file, indent=1)
        print("packed {N:,} images, rejected {rejected:,} {reasons}; {sixteen_bit:,} of 16 bits, "
              "{monochrome1:,} MONOCHROME1 (DICOM as {dicom}); stand-in: {stand_in}".format(**facts))
        if 2 * facts["sixteen_bit_below_4096"] > facts["sixteen_bit"]:
            print("warning: most 16-bit files stay below 4096: 12-bit values, which leave 16 grey levels")
    for parts in out.glob("parts-*"):
        shutil.rmtree(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, option = fail, parser.add_argument            # one sentence, like every other mistake
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)        # macOS has it not
    option("--index", type=Path, required=True, metavar="FILE", help="index.csv, any with a column path")
    option("--raw", type=Path, required=True, metavar="DIR", help="folder the index's paths are relative to")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if need be")
    option("--size", type=lambda text: text if text == "original" else int(text), default=224, metavar="S",
           help="side in pixels, or 'original': pack nothing, only validate the files (default 224)")
    option("--channels", type=int, default=1, choices=(1, 3), help="1: grey; 3: colour (default 1)")
    option("--variant", default="corrected", choices=DICOM, help="16 bits, DICOM: corrected or as released")
    option("--dicom", choices=DICOM.values(), help="paper: raw / maximum (default: as --variant says)")
    option("--splits", metavar="A,B", help="pack the rows of these splits only (default: all)")
    option("--require-files", action="store_true", help="stop if an image is missing, not reject it")
    option("--workers", type=int, default=len(cores), help="processes (default: all cores)")
    args = parser.parse_args()
    if args.workers < 1 or args.size != "original" and args.size < 1:
        fail("--workers and --size have to be at least 1")
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C is a kill like any other
    try:
        pack(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; the same command goes on from there")


if __name__ == "__main__":
    main()
