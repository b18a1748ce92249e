"""Pack the images an index names into one uint8 array, or check that every one of them can be read.

Each file is decoded in full, turned into 8-bit grey (or colour), stretched to S x S and added to images.npy
in index order; what cannot be used is listed with its reason, never repaired. Killed at any moment, the same
command goes on where it stopped and ends in the same bytes, whatever the number of workers.

    python data_prep/pack.py --index data/nih/index.csv --raw raw/nih --out data/nih
    python data_prep/pack.py --index data/nih/index.csv --raw raw/nih --out data/nih_full --size original
    python data_prep/pack.py --index data/oct/index.csv --raw raw/oct --out data/oct --workers 16
    python data_prep/pack.py --index data/covidx_ct/index.csv --raw raw/covidx_ct --out data/covidx_ct_body \\
        --crop-box data/covidx_ct/boxes.csv

Reads   the index (its column path is relative to --raw; nothing outside --raw is opened) and the images
        boxes on request: path, xmin, ymin, xmax, ymax in pixels, xmax and ymax not included
Writes  images.npy      uint8 [N, S, S] or [N, S, S, 3]; none with --size original
        manifest.csv    the packed rows of the index; row i describes images.npy[i]
        rejected.csv    path, reason
        duplicates.csv  path, duplicate_of: equal in every packed pixel; reported, not removed
        pack.json       settings, counts, mean and standard deviation of the pixels (0..1)
Rows are counted as in a spreadsheet: the header is row 1.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from importlib.metadata import version
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "WEBP")   # no EPS: that runs Ghostscript
MAX_PIXELS = Image.MAX_IMAGE_PIXELS     # 89 million, Pillow's mark of a decompression bomb; radiographs: 5-20
MAX_BYTES = 1 << 30                     # a DICOM file is read whole before its header can be judged
COMMIT_SECONDS = 5                      # the work a kill can cost, and the time between progress lines
TASK = 4                                # rows a worker takes at once: fewer messages, and still a fine grain
AHEAD = 4                               # tasks a worker may be ahead of the last row written
FACES = {"corrected": "display", "paper": "paper"}      # the DICOM conversion of each variant
BOX = ("xmin", "ymin", "xmax", "ymax")
UNFINISHED = ("images.npy.part", "journal.part")
OUTPUTS = ("pack.json", "images.npy", "manifest.csv", "rejected.csv", "duplicates.csv")


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


class Rejected(Exception):
    """Why an image is not packed: the reason in rejected.csv, its kind standing before the first colon."""


# ---- pixels: any file to 8 bits ----

def to_grey8(values, variant="corrected"):
    """Scale 16-bit grey, x / 65535 * 255, rounded (corrected) or cut toward zero (paper). Returns: uint8."""
    scaled = np.divide(values, 65535, dtype=np.float32)
    scaled *= 255
    return (scaled if variant == "paper" else np.rint(scaled, out=scaled)).astype(np.uint8)


def window_to_grey8(values, black, white):
    """Map black..white linearly to 0..255, clipped, rounded; black > white: a negative. Returns: uint8."""
    return np.rint(np.clip((values - black) / (white - black), 0, 1) * 255).astype(np.uint8)


def percentile_window(levels, counts):
    """The 0.5 and 99.5 percentiles of pixels, counts[i] of them at levels[i], equal to np.percentile's;
    minimum and maximum, at least 1 apart, where those coincide."""
    if not counts.any():
        return 0, 1
    order = np.argsort(levels, kind="stable")
    levels, ends = levels[order], np.cumsum(counts[order])      # the pixel of rank r: the first end beyond r
    ranks = [quantile * (ends[-1] - 1) for quantile in (0.005, 0.995)]
    black, white = (np.quantile(levels[np.searchsorted(ends, (rank // 1, np.ceil(rank)), "right")], rank % 1)
                    for rank in ranks)
    if black < white:
        return black, white
    used = levels[np.diff(ends, prepend=0) > 0]
    return float(used[0]), max(used[-1], used[0] + 1.0)


def strips(pixels):
    """Views of some 64 rows each: NumPy widens indices to 8 bytes, which for a strip stay in the cache."""
    return np.array_split(pixels, max(1, len(pixels) // 64))


def dicom_paper(values, stored, ds):
    """What the released notebook did: stored value / maximum * 255, cut; MONOCHROME1 stays a negative.

    Args, Returns: as dicom_display.
    """
    return (np.maximum(values, 0) / max(int(stored.max()), 1) * 255).astype(np.uint8)


def dicom_display(values, stored, ds):
    """What a viewer shows: modality LUT or rescale, then VOI LUT or first window or else the 0.5-99.5
    percentiles; MONOCHROME1 inverted once, padding black.

    Args: values: int32, every value that 8 or 16 bits can hold, in the order of their unsigned codes;
        stored: the pixels, 8- or 16-bit integers [H, W]; ds: the pydicom dataset.
    Returns: uint8, the grey level of each of the values.
    Source: DICOM PS3.3, C.7.5.1.1.2, C.11.1, C.11.2.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    padded = np.zeros(len(values), bool)
    if ds.get("PixelPaddingValue") is not None:
        ends = ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
        padded = (values >= min(ends)) & (values <= max(ends))

    values = apply_modality_lut(values, ds)
    voi = ds.VOILUTSequence[0] if ds.get("VOILUTSequence") else {}
    if "LUTDescriptor" in voi and "LUTData" in voi:
        black, white = 0, 2 ** voi.LUTDescriptor[2] - 1
        voi.LUTDescriptor[2] = 16       # told 8, pydicom keeps positions in 8 bits, too, and they wrap
        shown = apply_voi_lut(values, ds)
    elif None not in (ds.get("WindowCenter"), ds.get("WindowWidth")):
        black, white = apply_voi_lut(np.array([-np.inf, np.inf]), ds)     # either side of the window
        shown = apply_voi_lut(values, ds)
    else:
        counts = sum(np.bincount(strip.ravel(), minlength=len(values))
                     for strip in strips(stored.view(f"u{stored.itemsize}")))
        black, white = percentile_window(values, np.where(padded, 0, counts))
        shown = values
    table = window_to_grey8(shown, float(black), float(white))
    if ds.PhotometricInterpretation == "MONOCHROME1":
        table = 255 - table
    table[padded] = 0
    return table


def read_dicom(file, dicom="display"):
    """Decode a single-frame grey DICOM file. Returns: uint8 [H, W], is it MONOCHROME1? Raises: Rejected."""
    import pydicom                              # here: it loads slowly, and most datasets have no use for it
    from pydicom.pixels import get_decoder
    ds = pydicom.dcmread(file, force=True)      # force: a file may lack the preamble
    if "PixelData" not in ds:
        raise Rejected("wrong type: not a DICOM file with pixels")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise Rejected(f"multi-frame: {ds.NumberOfFrames} frames")
    kind = ds.get("PhotometricInterpretation")
    if kind not in ("MONOCHROME1", "MONOCHROME2") or ds.BitsAllocated not in (8, 16):
        raise Rejected(f"wrong type: DICOM {kind} of {ds.BitsAllocated} bits; expected 8 or 16 bits of grey")
    if ds.Rows * ds.Columns > MAX_PIXELS:
        raise Rejected(f"too large: {ds.Columns} x {ds.Rows} pixels, a decompression bomb")
    syntax = ds.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    ds.file_meta.TransferSyntaxUID = syntax
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Rejected(f"unsupported transfer syntax: {syntax.name}, unknown to pydicom") from None
    if not decoder.is_available:
        raise Rejected(f"unsupported transfer syntax: {syntax.name}; install what one of these requires: "
                       + ", ".join(decoder.missing_dependencies))
    stored = ds.pixel_array
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    # A grey level depends on the stored value alone: worked out once a value, then looked up for each pixel.
    code = stored.view(f"u{stored.itemsize}")
    values = np.arange(256 ** code.itemsize, dtype=code.dtype).view(stored.dtype).astype(np.int32)
    table = (dicom_paper if dicom == "paper" else dicom_display)(values, stored, ds)
    grey = [np.take(table, strip, mode="clip") for strip in strips(code)]   # "clip" spares NumPy a check
    return np.concatenate(grey), kind == "MONOCHROME1"


def read_pillow(file):
    """Load a file of one of FORMATS, whatever its name says. Returns: a Pillow image. Raises: Rejected."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Rejected(f"too large: more than {MAX_PIXELS:,} pixels, a decompression bomb") from None
    except UnidentifiedImageError:
        raise Rejected(f"wrong type: none of {', '.join(FORMATS)}, DICOM") from None
    with image:
        if getattr(image, "n_frames", 1) > 1:
            raise Rejected(f"multi-frame: {image.n_frames} frames")
        image.load()
    return image


def read_image(file, channels=1, variant="corrected", dicom="display", stretch=False):
    """Decode a file of any supported kind to 8 bits at its own size.

    Alpha is dropped, not composited; colour becomes Pillow's L (0.299, 0.587, 0.114); no EXIF rotation.

    Returns: a Pillow image of mode L (1 channel) or RGB (3), and what is worth counting about the file:
    monochrome1, sixteen_bit, sixteen_bit_below_4096 (bool). Raises: Rejected, or whatever the decoder raises.
    """
    if os.path.getsize(file) > MAX_BYTES:
        raise Rejected(f"too large: {os.path.getsize(file):,} bytes")
    with open(file, "rb") as stream:
        head = stream.read(132)
    if not head:
        raise Rejected("zero bytes")
    mode, facts = "L" if channels == 1 else "RGB", {}
    if head[128:] == b"DICM" or Path(file).suffix.lower() in (".dcm", ".dicom"):
        grey, facts["monochrome1"] = read_dicom(file, dicom)
        image = Image.fromarray(grey)
    else:
        image = read_pillow(file)
    if image.mode == "F":
        raise Rejected("wrong type: floating-point pixels")
    if image.mode.startswith("I"):              # 16 bits: convert("L") would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("wrong type: more than 16 bits a pixel")
        facts.update(sixteen_bit=True, sixteen_bit_below_4096=bool(values.max() < 4096))
        if not stretch:
            image = Image.fromarray(to_grey8(values, variant))
    elif stretch:
        values = np.asarray(image.convert(mode))
    if stretch:
        counts = np.bincount(values.ravel())
        levels = np.arange(len(counts))
        image = Image.fromarray(window_to_grey8(levels, *percentile_window(levels, counts))[values])
    return image if image.mode == mode else image.convert(mode), facts


def is_constant(image):
    """Whether all pixels are alike; a coarse sample settles it at once for all but nearly empty images."""
    sample = image.resize((32, 32), Image.Resampling.NEAREST)
    return all(np.ptp(np.reshape(picture.getextrema(), (-1, 2)), axis=1).max() == 0     # [channels, 2]
               for picture in (sample, image))


def crop(image, box):
    """Cut out (xmin, ymin, xmax, ymax), xmax and ymax not included. Raises: Rejected if it does not fit."""
    if box[2] > image.width or box[3] > image.height:
        raise Rejected(f"box outside the image: {box} in {image.width} x {image.height} pixels")
    return image.crop(box)


def fit(image, size, resample="bicubic", keep_aspect=False):
    """Stretch a Pillow image to size x size; with keep_aspect it is first padded to a square with black."""
    if keep_aspect:
        side = max(image.size)
        square = Image.new(image.mode, (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((size, size), Image.Resampling[resample.upper()])


# ---- rows: in worker processes, answered in the order of the index ----

def locate(root, path):
    """The file behind an index path. Raises: Rejected where there is no regular file inside `root`."""
    if not path.strip():
        raise Rejected("no path")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise Rejected("outside the raw root")
    if "\0" in path:                            # no file has such a name, and the next line would raise
        raise Rejected("missing")
    file = Path(os.path.realpath(os.path.join(root, path)))
    if not file.is_relative_to(os.path.realpath(root)):
        raise Rejected("outside the raw root")
    if not os.path.exists(file):
        raise Rejected("missing")
    if not file.is_file():
        raise Rejected("wrong type: not a regular file")
    return file


def pack_row(path, earlier, box, config):
    """Answer one index row: its journal record, and its bytes (none if rejected or kept at original size).

    earlier: number of an earlier row of this path, or None; box: (xmin, ymin, xmax, ymax) or None: no crop.
    """
    try:
        if earlier:
            raise Rejected(f"duplicate path: first in row {earlier}")
        image, facts = read_image(locate(config["raw"], path), config["channels"], config["variant"],
                                  config["dicom"], config["stretch"])
        if box:
            image = crop(image, box)
        if is_constant(image):
            raise Rejected("all-constant")
        if config["size"] != "original":
            facts["upscaled"] = min(image.size) < config["size"]
            image = fit(image, config["size"], config["resample"], config["keep_aspect"])
    except Rejected as error:
        return {"reason": str(error)}, b""
    except Exception as error:                  # a decoder may raise anything at all on a broken file
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return {"reason": f"truncated or unreadable: {text}"}, b""
    pixels, level = image.tobytes(), np.arange(256)
    histogram = np.reshape(image.histogram(), (-1, 256)).sum(0)
    sums = {"pixels": len(pixels), "sum": int(histogram @ level), "square": int(histogram @ level ** 2)}
    record = {"hash": hashlib.blake2b(pixels, digest_size=16).hexdigest(), "tally": {**sums, **facts}}
    return record, b"" if config["size"] == "original" else pixels


def pack_some(rows, config):
    """Answer several rows."""
    return [pack_row(*row, config) for row in rows]


def begin_work():
    """Set up a worker process; it ends with its parent, even with one that was killed."""
    warnings.simplefilter("ignore")                 # remarks on odd headers; what matters becomes a reason
    logging.disable()
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: wait([parent]) and os._exit(1), daemon=True).start()


def answers_in_order(rows, workers, config):
    """Yield pack_row(*row, config) for each row of an iterator, in order, from `workers` processes.

    No more than AHEAD tasks a process are in memory. A file that crashes its decoder takes the pool down; the
    rows in flight are then read one at a time, which finds it.
    """
    def pool(size):
        return ProcessPoolExecutor(size, multiprocessing.get_context("spawn"), begin_work)

    executor, pending, futures = pool(workers), deque(), deque()
    try:
        while True:
            try:
                # New processes inherit the mask: Ctrl-C is for the parent.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                while len(pending) < AHEAD * workers and (some := list(islice(rows, TASK))):
                    pending.append(some)
                    futures.append(executor.submit(pack_some, some, config))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                if not pending:
                    return
                answers = futures[0].result()
                pending.popleft(), futures.popleft()
                yield from answers
            except BrokenProcessPool:
                executor = pool(1)
                for row in chain.from_iterable(pending):
                    try:
                        yield executor.submit(pack_row, *row, config).result()
                    except BrokenProcessPool:
                        yield {"reason": "truncated or unreadable: the decoder crashed"}, b""
                        executor = pool(1)
                executor, pending, futures = pool(workers), deque(), deque()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


# ---- files: the index, the unfinished pack, the finished one ----

def read_rows(path, *columns):
    """Yield (number, {column: cell}) for each row of a CSV file that has these columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if not set(columns) <= set(names) or len(set(names)) < len(names):
                fail(f"{path} row 1: expected a column {', '.join(columns)}, no name twice; "
                     f"not {','.join(names)[:300]}")
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    fail(f"{path} row {number}: expected as many cells as the header has, {len(names)}")
                yield number, row
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 (byte {error.object[error.start]:#x}: {error.reason}); save it as UTF-8")
    except (csv.Error, OSError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")


def index_rows(index, splits=()):
    """Yield the index rows of these splits (of all, if empty) as {column: cell}, each with the number of the
    earlier row that has the same path, or None."""
    first = {}
    for number, row in read_rows(index, "path"):
        if not splits or row.get("split") in splits:
            earlier = first.setdefault(row["path"], number)
            yield row, earlier if earlier < number else None


def read_boxes(path):
    """The file of --crop-box as {path: (xmin, ymin, xmax, ymax)}."""
    boxes = {}
    for number, row in read_rows(path, "path", *BOX):
        text = ",".join(row[name] for name in BOX)
        box = tuple(map(int, text.split(","))) if re.fullmatch(r"([0-9]{1,9},){3}[0-9]{1,9}", text) else None
        if not box or box[0] >= box[2] or box[1] >= box[3]:
            fail(f"{path} row {number}: {text[:99]!r} is no box of whole pixels, xmin < xmax and ymin < ymax")
        if row["path"] in boxes:
            fail(f"{path} row {number}: a second box for {row['path']!r}; remove one")
        boxes[row["path"]] = box
    return boxes


def image_shape(config):
    """Shape of one packed image; at original size nothing is packed."""
    return (0,) if config["size"] == "original" else (config["size"],) * 2 + (3,) * (config["channels"] == 3)


def npy_header(n, config):
    """The head of images.npy; NumPy pads it to the same length for every n."""
    file = io.BytesIO()
    head = {"descr": "|u1", "fortran_order": False, "shape": (n, *image_shape(config))}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


@contextlib.contextmanager
def replacing(path):
    """Write a text file under a temporary name and rename it once it is whole and on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path):
    """Hash of a file's bytes, None without a file."""
    return path and hashlib.sha256(path.read_bytes()).hexdigest()


def remove(out, names):
    """Delete what there is of these files."""
    for name in names:
        (out / name).unlink(missing_ok=True)


def check_same(found, config, out):
    """Refuse a folder that holds a pack of other settings."""
    for key, value in config.items():
        if found.get(key) != value:
            fail(f"{out}: its {key} is {found.get(key)!r}, not {value!r}; use another --out or --overwrite")


def is_finished(out, config):
    """Whether `out` holds a finished pack of these settings; one of other settings or makers is refused."""
    there = {path.name for path in out.iterdir()}
    if "pack.json" in there:
        try:
            check_same(json.loads((out / "pack.json").read_text()), config, out)
        except (ValueError, AttributeError):
            fail(f"{out / 'pack.json'}: not written here; use another --out or --overwrite")
    elif "journal.part" not in there and there & {"manifest.csv", "images.npy"}:
        fail(f"{out}: holds a manifest.csv or images.npy of another maker; use another --out or --overwrite")
    return there.issuperset(OUTPUTS if config["size"] != "original" else set(OUTPUTS) - {"images.npy"})


def resume(out, config):
    """Open images.npy.part and journal.part, both cut back to the last row that both hold.

    The journal's first line holds the settings, each further one a row's record, written when its pixels are
    on disk. Returns: the two files, positioned at their ends, and the number of rows they hold.
    """
    images_path, journal_path = (out / name for name in UNFINISHED)
    images, journal = (open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
                       for path in (images_path, journal_path))
    done, images_end, journal_end = -1, len(npy_header(0, config)), 0
    for line in journal:
        try:
            record = json.loads(line if line.endswith(b"\n") else b"")
        except ValueError:                                          # cut in the middle by the kill
            break
        if done < 0:
            check_same(record, config, out)
        elif "hash" in record:
            images_end += math.prod(image_shape(config))
        done, journal_end = done + 1, journal_end + len(line)
    if done < 0 or os.path.getsize(images_path) < images_end:       # nothing of use: start
        done, images_end = 0, images.write(npy_header(0, config))
        journal.seek(0)
        journal_end = journal.write(json.dumps(config).encode() + b"\n")
    for file, end in (images, images_end), (journal, journal_end):
        file.seek(end)
        file.truncate()
    return images, journal, done


def pack_rows(out, config, index, boxes, total, workers):
    """Pack the rows that are not packed yet. Returns: images.npy.part and journal.part, open and complete."""
    images, journal, begun = resume(out, config)
    started = committed = time.monotonic()
    rows = ((row["path"], earlier, boxes.get(row["path"]))
            for row, earlier in index_rows(index, config["splits"]))
    answers = answers_in_order(islice(rows, begun, None), workers, config)
    lines = []
    for done, (record, pixels) in enumerate(answers, start=begun + 1):
        images.write(pixels)
        lines.append(json.dumps(record).encode() + b"\n")
        now = time.monotonic()
        if now - committed > COMMIT_SECONDS or done == total:
            images.flush()
            os.fsync(images.fileno())
            journal.writelines(lines)               # after the pixels: the journal never runs ahead of them
            journal.flush()
            os.fsync(journal.fileno())
            lines, committed, rate = [], now, (done - begun) / (now - started)
            print(f"pack {out.name}  {done:,}/{total:,} rows  {rate:,.1f} img/s  "
                  f"eta {timedelta(seconds=round((total - done) / rate))}", flush=True)
    return images, journal


def finish(out, config, index, images, journal):
    """Write the tables and pack.json from index and journal, and last give images.npy its name."""
    tally = Counter(dict.fromkeys(("N", "rejected", "upscaled", "monochrome1", "sixteen_bit",
                                   "sixteen_bit_below_4096", "duplicates"), 0))
    reasons, first = Counter(), {}
    journal.seek(0)
    next(journal)                                   # the settings
    with (replacing(out / "manifest.csv") as manifest, replacing(out / "rejected.csv") as rejected,
          replacing(out / "duplicates.csv") as duplicates):
        manifest, rejected, duplicates = (csv.writer(file, lineterminator="\n")
                                          for file in (manifest, rejected, duplicates))
        rejected.writerow(["path", "reason"])
        duplicates.writerow(["path", "duplicate_of"])
        for position, ((row, _), line) in enumerate(zip(index_rows(index, config["splits"]), journal)):
            record = json.loads(line)
            if position == 0:
                manifest.writerow(row)
            if "reason" in record:
                rejected.writerow([row["path"], record["reason"]])
                reasons[record["reason"].partition(":")[0]] += 1
                continue
            manifest.writerow(row.values())
            same = first.setdefault(record["hash"], row["path"])
            if same != row["path"]:
                duplicates.writerow([row["path"], same])
            tally.update(record["tally"], N=1, duplicates=same != row["path"])
    if not tally["N"]:
        remove(out, (*UNFINISHED, "manifest.csv", "duplicates.csv"))
        fail(f"{index}: none of its rows could be packed, the reasons are in {out / 'rejected.csv'} "
             f"({', '.join(reasons)}); is --raw {config['raw']} the right folder?")

    n, total, square = (tally.pop(key) for key in ("pixels", "sum", "square"))
    tally["rejected"] = reasons.total()
    summary = {"dataset": Path(os.path.abspath(out)).name, **config, **tally,
               "reasons": dict(sorted(reasons.items())), "mean": total / n / 255,
               "std": (n * square - total ** 2) ** 0.5 / n / 255,
               "versions": {name: version(name) for name in ("numpy", "pillow", "pydicom")}}
    images.seek(0)
    images.write(npy_header(tally["N"], config))
    images.flush()
    os.fsync(images.fileno())
    with replacing(out / "pack.json") as file:
        file.write(json.dumps(summary, indent=1) + "\n")
    if config["size"] != "original":
        os.replace(out / "images.npy.part", out / "images.npy")
    return summary


def report(summary):
    """Print what was packed, and what to know before training on it."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in summary["reasons"].items()) or "none"
    print("packed {N:,} images, mean {mean:.4f}, std {std:.4f}, {upscaled:,} upscaled, "
          "{duplicates:,} duplicates; rejected: ".format(**summary) + reasons)
    if summary["monochrome1"]:
        face = "left as photographic negatives" if summary["dicom"] == "paper" else "inverted"
        print(f"{summary['monochrome1']:,} MONOCHROME1 files, {face}")
    if 2 * summary["sixteen_bit_below_4096"] > summary["sixteen_bit"] and not summary["stretch"]:
        print("warning: {sixteen_bit_below_4096:,} of {sixteen_bit:,} 16-bit files stay below 4096; 12-bit "
              "values that were never stretched leave 16 grey levels (see --stretch)".format(**summary))


def pack(args):
    """Check index and folder, then pack, finish and report, unless that was done before."""
    index, out, counts = args.index, args.out, Counter()
    if index.parent.resolve() == out.resolve() and index.name in OUTPUTS:
        fail(f"{index}: packing into {out} would overwrite this index; take another --out")
    for row, _ in index_rows(index):
        counts[row.get("split", "")] += 1
    splits = [split for split in args.splits.split(",") if split]
    total = sum(counts[split] for split in splits or counts)
    if not total or not counts.keys() >= set(splits):
        fail(f"{index}: no rows{' of split ' + ', '.join(splits) if splits else ''} "
             f"(rows by split: {dict(counts) or 'none'})")
    if args.require_files:
        gone = [row["path"] for row, _ in index_rows(index, splits) if not (args.raw / row["path"]).is_file()]
        if gone:
            fail(f"{index}: {len(gone):,} of {total:,} images are missing in {args.raw}, first {gone[0]!r}")
    boxes = {}
    if args.crop_box:
        boxes = read_boxes(args.crop_box)
        bare = [row["path"] for row, _ in index_rows(index, splits) if row["path"] not in boxes]
        if bare:
            fail(f"{args.crop_box}: no box for {len(bare):,} of {total:,} images, first {bare[0]!r}")

    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)                # held until this process ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out}: another run is packing into this folder")
    except OSError as error:                        # NFS, for one, locks no folders
        print(f"warning: {out} cannot be locked ({error.strerror}): start no second run into it", flush=True)
    if args.overwrite:
        remove(out, OUTPUTS + UNFINISHED)
    config = {"index_sha256": sha256(index), "crop_box_sha256": sha256(args.crop_box), "splits": splits,
              "raw": os.path.abspath(args.raw), "size": args.size, "channels": args.channels,
              "variant": args.variant, "dicom": args.dicom or FACES[args.variant], "resample": args.resample,
              "keep_aspect": args.keep_aspect, "stretch": args.stretch}
    if is_finished(out, config):
        print(f"{out} is packed already: nothing to do")
    else:
        report(finish(out, config, index, *pack_rows(out, config, index, boxes, total, args.workers)))
    remove(out, UNFINISHED)


def size_or_original(text):
    """The value of --size."""
    return text if text == "original" else int(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                             # one sentence, like every other mistake
    option = parser.add_argument
    option("--index", type=Path, required=True, metavar="FILE", help="index.csv of a dataset")
    option("--raw", type=Path, required=True, metavar="DIR", help="folder the index's paths are relative to")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if need be")
    option("--size", type=size_or_original, default=224, metavar="S",
           help="side in pixels, or 'original': pack nothing, only validate the files (default 224)")
    option("--channels", type=int, default=1, choices=(1, 3), help="1: grey; 3: colour (default 1)")
    option("--variant", default="corrected", choices=FACES,
           help="corrected: 16 bits rounded, DICOM as displayed; paper: 16 bits cut, DICOM raw / maximum")
    option("--dicom", choices=FACES.values(), help="the DICOM conversion alone (default: as --variant says)")
    option("--resample", default="bicubic", choices=("bicubic", "bilinear", "hamming", "box"),
           help="Pillow's filter for resizing (default bicubic)")
    option("--crop-box", type=Path, metavar="FILE",
           help="crop each image to its box before it is resized: CSV of path, xmin, ymin, xmax, ymax")
    option("--keep-aspect", action="store_true", help="pad to a square with black instead of stretching")
    option("--stretch", action="store_true", help="map each image's own 0.5-99.5 percentile range to 0..255")
    option("--splits", default="", metavar="A,B", help="pack the rows of these splits only (default: all)")
    option("--require-files", action="store_true", help="stop if an image is missing, not reject it")
    option("--overwrite", action="store_true", help="delete the pack in --out, if any, and start over")
    option("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
           help="processes (default: as many as cores)")
    args = parser.parse_args()
    if args.workers < 1 or args.size != "original" and args.size < 1:
        fail("--workers and --size have to be at least 1")
    if args.crop_box and args.size == "original":
        fail("--crop-box crops what is packed, and --size original packs nothing; leave out one of them")
    if not args.raw.is_dir():
        fail(f"--raw {args.raw}: no such folder")
    for stop in (signal.SIGTERM, signal.SIGINT):    # what is packed stays, as with any other end
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    try:
        pack(args)
    except OSError as error:
        fail(f"{args.out}: {error.strerror or error}; what is packed stays, and the same command goes on")


if __name__ == "__main__":
    main()
