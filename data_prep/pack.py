"""Pack the images an index names into one uint8 array, or check that every one of them can be read.

Each file is decoded in full, turned into 8-bit grey (or colour), stretched to S x S and added to images.npy
in index order; what cannot be used is listed with its reason, never repaired. Workers write parts, joined at
the end (in twice the space): killed at any moment, the same command goes on with the parts that are missing
and ends in the same bytes, whatever the number of workers.

    python data_prep/pack.py --index data/nih/index.csv --raw raw/nih --out data/nih
    python data_prep/pack.py --index data/nih/index.csv --raw raw/nih --out data/nih_full --size original

Reads   the index (its column path is relative to --raw; nothing outside --raw is opened) and the images
Writes  images.npy      uint8 [N, S, S] or [N, S, S, 3]; none with --size original
        manifest.csv    the packed rows; row i describes images.npy[i]; blank sex and age as in DICOM headers
        rejected.csv    path, reason
        pack.json       written last: settings, counts, mean and standard deviation of the pixels (0..1),
                        stand_in: "drawn by data_prep/demo.py" or null"""

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
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "WEBP")   # no EPS: that runs Ghostscript
MAX_PIXELS = 89_478_485                 # Pillow's mark of a decompression bomb; radiographs have 5-20 million
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # at twice this Pillow refuses, before that it only warns
MAX_BYTES = 1 << 30                     # a DICOM file is read whole before its header can be judged
SHARD = 32                              # most rows of a part: the work of a worker that a kill can cost
CRASHED = {"reason": "unreadable: the decoder crashed"}, b""
STAND_IN = "drawn by data_prep/demo.py"
DICOM = {"corrected": "display", "paper": "paper"}      # the conversion of each variant
# Errors that come of a file itself, a decoder's own (None) or of a seek to nowhere: others are the storage's,
# such as a permission that is lacking.
OF_THE_FILE = None, errno.EINVAL, errno.EOVERFLOW, errno.ENAMETOOLONG
TEXT = {"mode": "w", "newline": "", "encoding": "utf-8"}
STOPS = signal.SIGINT, signal.SIGTERM


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


class Rejected(Exception):
    """Why an image is not packed: the reason in rejected.csv, its kind standing before the first colon."""


def to_grey8(values, variant="corrected", top=65535):
    """Scale 16-bit grey, x / top * 255, rounded (corrected) or cut toward zero (paper). Returns: uint8."""
    scaled = values / np.float32(top) * 255
    return (scaled if variant == "paper" else np.rint(scaled)).astype(np.uint8)


def percentile_window(levels, counts):
    """The 0.5 and 99.5 percentiles, as np.percentile's, of pixels, counts[i] of them of value levels[i];
    minimum and maximum, at least 1 apart, where those coincide."""
    used = np.flatnonzero(counts)
    used = used[np.argsort(levels[used])]
    levels, ends = levels[used], np.cumsum(counts[used])
    ranks = np.column_stack([ends - counts[used], ends - 1]).ravel()        # first and last of every level
    black, white = np.interp([0.005 * ranks[-1], 0.995 * ranks[-1]], ranks, np.repeat(levels, 2))
    return (black, white) if black < white else (levels[0], max(levels[-1], levels[0] + 1))


def prepare_lut(ds, name, values):
    """Whether the dataset has this LUT. Some files write its first input, a negative number, as unsigned:
    where all values lie below it, it is put right."""
    item = ds[name].value[0] if ds.get(name) else {}
    if "LUTDescriptor" in item and item.LUTDescriptor[1] > values.max():
        item.LUTDescriptor[1] -= 65536
    return "LUTDescriptor" in item and "LUTData" in item


def dicom_display(values, code, ds):
    """What a viewer shows: modality LUT or rescale, then VOI LUT or first window or else the 0.5-99.5
    percentiles; MONOCHROME1 inverted once, padding black. Source: DICOM PS3.3, C.7.5.1.1.2, C.11.1, C.11.2.
    values: int32, the stored value behind every code; code: uint8 or uint16 [H, W], the pixels' words.
    Returns: uint8, the grey level of each of the values."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    padded = np.zeros(len(values), bool)
    if ds.get("PixelPaddingValue") is not None:
        ends = ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
        kind = f"{'ui'[ds.PixelRepresentation]}{code.itemsize}"
        ends = np.array(ends).astype(kind)              # some files have them unsigned for signed pixels
        padded = (values >= ends.min()) & (values <= ends.max())
    prepare_lut(ds, "ModalityLUTSequence", values)
    values = apply_modality_lut(values, ds)
    if prepare_lut(ds, "VOILUTSequence", values):
        descriptor = ds.VOILUTSequence[0].LUTDescriptor
        black, white = 0, 2 ** descriptor[2] - 1
        descriptor[2] = 16              # given 8, pydicom keeps positions in 8 bits, too, and they wrap
        values = apply_voi_lut(values, ds)
    else:
        black = -np.inf
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
    if ds.Rows * ds.Columns > MAX_PIXELS:
        raise Rejected(f"too large: {ds.Columns} x {ds.Rows} pixels, a decompression bomb")
    syntax = ds.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    ds.file_meta.TransferSyntaxUID = syntax
    # Bits below the stored ones, such as 4 of 16 below 12: read as if they were stored, then shifted out.
    unused = 0
    if not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless:
        unused = max(0, ds.get("HighBit", 0) + 1 - ds.BitsStored)
    ds.BitsStored += unused
    stored = ds.pixel_array
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    # A grey level depends on the stored value alone: worked out once a value, then looked up for each pixel.
    code = stored.view(f"u{stored.itemsize}")
    values = np.arange(256 ** code.itemsize, dtype=code.dtype).view(stored.dtype).astype(np.int32) >> unused
    if dicom == "paper":                        # as the released notebook: MONOCHROME1 stays a negative
        top = max(int(stored.max()) >> unused, 1)
        table = (np.maximum(values, 0) / top * 255).astype(np.uint8)
    else:
        table = dicom_display(values, code, ds)
    # By strips, as NumPy widens indices to 8 bytes, which so stay in the cache; "clip" spares it a check.
    grey = [np.take(table, strip, mode="clip") for strip in np.array_split(code, len(code) // 64 + 1)]
    sex = re.fullmatch("[MFO]", str(ds.get("PatientSex")))
    age = re.fullmatch(r"0*([1-9]\d?|1[01]\d|120)Y", str(ds.get("PatientAge")))
    person = {"sex": sex[0] if sex else "", "age": age[1] if age else ""}
    return np.concatenate(grey), {"monochrome1": kind == "MONOCHROME1", "person": person}


def read_image(file, channels=1, variant="corrected", dicom="display"):
    """Decode a file of any supported kind to 8 bits at its own size. Alpha is dropped, not composited; colour
    becomes Pillow's L (0.299, 0.587, 0.114); no EXIF rotation. Returns: a Pillow image of mode L (1 channel)
    or RGB (3), and facts: monochrome1, sixteen_bit, sixteen_bit_below_4096 (bool), person. Raises: Rejected,
    or what the decoder raises."""
    if os.path.getsize(file) > MAX_BYTES:
        raise Rejected(f"too large: {os.path.getsize(file):,} bytes")
    with open(file, "rb") as stream:
        head = stream.read(132)
    facts = {"monochrome1": False, "sixteen_bit": False, "sixteen_bit_below_4096": False, "person": {}}
    if head[128:] == b"DICM" or Path(file).suffix.lower() in (".dcm", ".dicom"):
        grey, found = read_dicom(file, dicom)
        facts, image = facts | found, Image.fromarray(grey)
    else:
        with Image.open(file, formats=FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise Rejected(f"multi-frame: {image.n_frames} frames")
            image.load()
    tags = getattr(image, "tag_v2", {})         # of a TIFF
    if image.mode == "F" or image.mode == "I" and tags:
        raise Rejected("wrong type: floating-point, signed or 32-bit pixels")
    if image.mode.startswith("I"):              # 16 bits: convert("L") would clip at 255
        values = np.asarray(image)
        facts.update(sixteen_bit=True, sixteen_bit_below_4096=bool(values.max() < 4096))
        top = 2 ** tags.get(258, (16,))[0] - 1                              # BitsPerSample: 12 or 16
        if tags.get(262) == 0:                                              # WhiteIsZero
            values = top - values
        image = Image.fromarray(to_grey8(values, variant, top))
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode), facts          # convert would copy


def locate(root, path):
    """The file behind an index path. Raises: Rejected where there is no regular file inside `root`."""
    file = Path(os.path.realpath(os.path.join(root, path)))
    if path.startswith("/") or ".." in path.split("/") or not file.is_relative_to(os.path.realpath(root)):
        raise Rejected("outside the raw root: only --raw itself may be a link")
    if not file.is_file():
        raise Rejected("wrong type: not a regular file" if os.path.exists(file) else "missing")
    return file


def pack_row(path, earlier, config):
    """Answer one index row, `earlier` being the number of an earlier row of this path, or None. Returns: its
    record, and its pixels as bytes, none if it is rejected or kept at original size. Raises: OSError where
    memory or the storage failed, which says nothing about the file."""
    size = config["size"]
    try:
        if earlier:
            raise Rejected(f"duplicate path: first in row {earlier}")
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
            error.filename = path
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


def pack_shard(part, rows, crashed, config, say):
    """Write a part: a line of JSON with a record a row, then the pixels. Rows `crashed` are not opened."""
    answers = []
    for number, row in enumerate(rows):
        say(number)
        answers.append(CRASHED if number in crashed else pack_row(*row, config))
    records, pixels = zip(*answers)
    with replacing(part, part.parent, mode="wb") as file:
        file.write(json.dumps(records).encode() + b"\n")
        file.writelines(pixels)


def work(pipe, config):
    """A worker process: receives shards (part, rows, rows that crash) until one is None. Sends the number of
    a row before it opens the file, None when the part is written, an OSError when it cannot go on."""
    warnings.simplefilter("ignore")                 # remarks on odd headers; what matters becomes a reason
    try:
        while shard := pipe.recv():
            pack_shard(*shard, config, pipe.send)
            pipe.send(None)
    except (EOFError, ConnectionError):             # the parent was killed
        pass
    except OSError as problem:                      # such as a full disk
        pipe.send(problem)


def pack_shards(shards, workers, config):
    """Pack an iterator's shards, yielding at each row. A worker that dies did so on the row it announced
    last: another one is given its shard, with that row among those that are not opened."""
    context, team = multiprocessing.get_context("spawn"), {}        # team: {pipe: [worker, shard, row]}

    def employ(shard):
        pipe, other_end = context.Pipe()
        worker = context.Process(target=work, args=(other_end, config))
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)             # inherited: these are for the parent
        worker.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        other_end.close()
        pipe.send(shard)
        team[pipe] = [worker, shard, None]

    try:
        for shard in islice(shards, workers):
            employ(shard)
        while team:
            for pipe in wait(list(team)):
                worker, shard, row = team[pipe]
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    worker.join()
                    if row is None or worker.exitcode == -signal.SIGKILL:
                        fail(f"a worker ended with {worker.exitcode} (-9: killed, is memory short?); the "
                             "same command goes on, with fewer --workers if need be")
                    del team[pipe]
                    employ((*shard[:2], {*shard[2], row}))
                    continue
                if isinstance(answer, OSError):
                    raise answer
                team[pipe][2] = answer
                if answer is not None:
                    yield
                    continue
                team[pipe][1] = shard = next(shards, None)          # the part is written
                pipe.send(shard)
                if shard is None:
                    del team[pipe]
    finally:
        for worker, *_ in team.values():
            worker.kill()


def index_rows(index, splits=()):
    """Yield the index rows of these splits (of all, if empty) as {column: cell}, each with the number of the
    earlier row that has the same path, or None."""
    first = {}
    try:
        with open(index, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if "path" not in names or "" in names or len(set(names)) < len(names):
                fail(f"{index} row 1: expected a column path, no name blank or twice; not {names[:30]}")
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    fail(f"{index} row {number}: expected as many cells as the header has, {len(names)}")
                if not splits or row.get("split") in splits:
                    earlier = first.setdefault(row["path"], number)
                    yield row, earlier if earlier < number else None
    except UnicodeDecodeError as error:
        fail(f"{index}: not UTF-8 (byte {error.object[error.start]:#x}: {error.reason}); save it as UTF-8")
    except (csv.Error, OSError) as error:
        fail(f"{index}: {getattr(error, 'strerror', None) or error}")


def check_index(args, splits):
    """Refuse an index without rows of these splits; warn of shared patients. Returns: the number of rows."""
    counts, homes, shared = Counter(), {}, set()
    for row, _ in index_rows(args.index):
        split, patient = row.get("split", ""), row.get("patient")
        counts[split] += 1
        if patient and homes.setdefault(patient, split) != split:
            shared.add(patient)
    if not counts or not counts.keys() >= set(splits):
        fail(f"{args.index}: no rows of split {args.splits or 'any'}; it has {dict(counts)}")
    if shared:
        print(f"warning: {args.index}: {len(shared):,} patients are in more than one split", flush=True)
    return sum(counts[split] for split in splits or counts)


def stand_in(raw):
    """The mark of drawn data: the README.txt that demo.py puts into each dataset's folder, `raw` or above."""
    for note in (folder / "README.txt" for folder in (raw.resolve(), *raw.resolve().parents)):
        if note.is_file() and STAND_IN in note.read_text(errors="replace"):
            return STAND_IN


def is_finished(out, config):
    """Whether `out` holds a finished pack of these settings, with its manifest.csv and images.npy. One of
    another maker or of other settings is refused, but for drawn images, which are packed anew."""
    there, facts = {path.name for path in out.iterdir()}, out / "pack.json"
    try:
        found = {**json.loads(facts.read_text())} if facts.exists() else {}
    except (ValueError, TypeError):
        fail(f"{facts}: not a JSON object; remove it or choose another folder")
    for key, value in config.items():
        if found and found.get(key) != value:
            if found.get("stand_in"):
                return False
            fail(f"{out}: its {key} is {found.get(key)!r}, not {value!r}; remove the folder {out} and make "
                 "its index again, or use another --out")
    if not found and {"manifest.csv", "images.npy"} & there and not any(out.glob("parts-*")):
        fail(f"{out}: holds a manifest.csv or images.npy of another maker; use another --out")
    return bool(found) and "manifest.csv" in there and ("images.npy" in there or config["size"] == "original")


def join(parts, out, config, index):
    """Join the parts into images.npy and the tables. Returns: what pack.json is to say."""
    folder, tally, reasons = parts[0].parent, Counter(N=0), Counter()
    rows = index_rows(index, config["splits"])
    with contextlib.ExitStack() as files:           # renamed in reverse order
        manifest, rejected = (csv.writer(files.enter_context(replacing(out / name, folder, **TEXT)),
                                         lineterminator="\n") for name in ("manifest.csv", "rejected.csv"))
        rejected.writerow(["path", "reason"])
        for part in parts:
            with open(part, "rb") as file:
                records = json.loads(file.readline())
            for record, (row, _) in zip(records, rows):
                if "reason" in record:
                    rejected.writerow([row["path"], record["reason"]])
                    reasons[record["reason"].partition(":")[0]] += 1
                    continue
                if not tally["N"]:
                    manifest.writerow(row)
                row |= {name: cell for name, cell in record["person"].items() if row.get(name) == ""}
                manifest.writerow(row.values())
                tally.update(record["facts"], N=1)
        if config["size"] != "original":
            images = files.enter_context(replacing(out / "images.npy", folder, mode="wb"))
            shape = (tally["N"], config["size"], config["size"], 3)[:3 + (config["channels"] == 3)]
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(images, header)
            for part in parts:
                with open(part, "rb") as file:
                    file.readline()
                    shutil.copyfileobj(file, images)
    n, total, square = (tally.pop(key, 1) for key in ("pixels", "sum", "square"))
    return {**config, **tally, "rejected": reasons.total(), "reasons": dict(reasons),
            "mean": total / n / 255, "std": (n * square - total ** 2) ** 0.5 / n / 255}


def pack_parts(parts, size, total, args, config):
    """Pack the rows of the parts that are missing, `size` of the `total` rows each, and say how far it is."""
    rows = ((row["path"], earlier) for row, earlier in index_rows(args.index, config["splits"]))
    shards = ((part, list(islice(rows, size)), ()) for part in parts)
    shards = (shard for shard in shards if not shard[0].exists())
    before = size * sum(part.exists() for part in parts)
    begun = said = time.monotonic()
    for done, _ in enumerate(pack_shards(shards, args.workers, config), start=1):
        now = time.monotonic()
        if now - said > 5:
            said, rate = now, done / (now - begun)
            print(f"pack {args.out.name}  {before + done:,}/{total:,} rows  {rate:,.1f} img/s  "
                  f"eta {(total - before - done) / rate:,.0f} s", flush=True)


def pack(args):
    """Check index and folder, then pack, join and report, unless that was done before."""
    index, out = args.index, args.out
    splits = args.splits.split(",") if args.splits else []
    total, mark = check_index(args, splits), stand_in(args.raw)
    out.mkdir(parents=True, exist_ok=True)
    try:                                            # held until this process ends, however it ends
        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out}: another run is packing into this folder")
    except OSError as error:                        # NFS, for one, locks no folders
        print(f"warning: {out} cannot be locked ({error.strerror}): start no second run into it", flush=True)
    config = {"index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(), "splits": splits,
              "raw": os.path.abspath(args.raw), "size": args.size, "channels": args.channels,
              "variant": args.variant, "dicom": args.dicom or DICOM[args.variant]}
    size = max(1, min(SHARD, total // 64))          # of a part: few rows keep all workers busy, too
    folder = out / f"parts-{hashlib.sha256(repr((size, config)).encode()).hexdigest()[:12]}"
    if is_finished(out, config):
        print(f"{out} is packed already: nothing to do (to pack it again, remove {out}/manifest.csv)")
    else:
        if args.require_files:
            absent = []
            for row, _ in index_rows(index, splits):
                try:
                    locate(args.raw, row["path"])
                except (Rejected, ValueError) as error:             # of a path that holds a NUL
                    absent.append((row["path"], error))
            if absent:
                path, reason = absent[0]
                fail(f"{path!r} in {args.raw}: {reason}; {len(absent):,} of {total:,} images are not there: "
                     "complete the download and make the index again, or drop --require-files")
        folder.mkdir(exist_ok=True)
        parts = [folder / f"{number:06}" for number in range(-(-total // size))]
        pack_parts(parts, size, total, args, config)
        (out / "pack.json").unlink(missing_ok=True)                 # before the files that it describes
        facts = {"dataset": out.resolve().name, **join(parts, out, config, index), "stand_in": mark}
        if not facts["N"]:
            shutil.rmtree(folder)
            for name in ("manifest.csv", "images.npy"):
                (out / name).unlink(missing_ok=True)
            fail(f"{index}: none of its rows could be packed, the reasons are in {out / 'rejected.csv'} "
                 f"{facts['reasons']}; is --raw {args.raw} the right folder?")
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
    parser.error = fail                             # one sentence, like every other mistake
    option = parser.add_argument
    option("--index", type=Path, required=True, metavar="FILE", help="index.csv, any with a column path")
    option("--raw", type=Path, required=True, metavar="DIR", help="folder the index's paths are relative to")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if need be")
    option("--size", type=lambda text: text if text == "original" else int(text), default=224, metavar="S",
           help="side in pixels, or 'original': pack nothing, only validate the files (default 224)")
    option("--channels", type=int, default=1, choices=(1, 3), help="1: grey; 3: colour (default 1)")
    option("--variant", default="corrected", choices=DICOM,
           help="corrected: 16 bits rounded, DICOM as displayed; paper: 16 bits cut, DICOM raw / maximum")
    option("--dicom", choices=DICOM.values(), help="the DICOM conversion alone (default: as --variant says)")
    option("--splits", default="", metavar="A,B", help="pack the rows of these splits only (default: all)")
    option("--require-files", action="store_true", help="stop if an image is missing, not reject it")
    option("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
           help="processes (default: as many as cores)")
    args = parser.parse_args()
    if args.workers < 1 or args.size != "original" and args.size < 1:
        fail("--workers and --size have to be at least 1")
    if not args.raw.is_dir():
        fail(f"--raw {args.raw}: no such folder")
    for stop in STOPS:                              # what is packed stays, as with any other end
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    try:
        pack(args)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; what is packed stays, and the same "
             "command goes on")


if __name__ == "__main__":
    main()
