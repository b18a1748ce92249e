"""Time pack.py against the decoders alone: drawn radiographs of each kind of file, on all cores.

Each round decodes the files in a process pool (Pillow, pydicom), decodes and shrinks them (8 bits, 224 x 224,
as one would write it down), and packs N and 4 N of them by the command; the best round counts. By hand:

    python tests/bench/pack.py --out bench_pack.json
    python tests/bench/pack.py --images 16 --rounds 1 --kinds png jpeg --out /tmp/pack.json    # half a minute

The files are hard links to at most 16 different ones, in a temporary folder. Rates are images a second of
wall time; `packed` is the whole command on 4 N files, with start-up. The shares compare CPU time an image,
which a busy machine changes little: that of the decoder (or of decode and shrink) over that of the command,
from N to 4 N files, so without its start-up. Memory: the largest sum of the processes' proportional shares.
Writes --out: JSON, a row a kind; a Markdown table on the terminal.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1,
                         SecondaryCaptureImageStorage)

PACK = Path(__file__).resolve().parents[2] / "data_prep" / "pack.py"
DISTINCT = 16           # files drawn of a kind; the others are links, decoded all the same
SIZE = 224              # side of a packed image


# ---- drawing: a smooth body and the grain of a detector, so that files compress as radiographs do ----

def radiograph(rng, height, width, bits, grain):
    """Draw a radiograph. Args: bits: 8-16; grain: its standard deviation. Returns: uint8 or uint16 [H, W]."""
    body = Image.fromarray(rng.uniform(0.05, 0.95, (9, 7)).astype(np.float32))
    values = np.asarray(body.resize((width, height), Image.Resampling.BICUBIC)) * (2 ** bits - 1)
    values += rng.normal(0, grain, (height, width))
    return np.clip(values, 0, 2 ** bits - 1).astype(np.uint8 if bits == 8 else np.uint16)


def jpeg_lossless(pixels, bits):
    """Encode a grey image. Returns: a JPEG stream. Source: ITU-T T.81, process 14, predictor 1."""
    rows = pixels.astype(np.int32)
    before = np.empty_like(rows)
    before[:, 1:], before[1:, 0], before[0, 0] = rows[:, :-1], rows[:-1, 0], 1 << (bits - 1)
    bit = np.arange(15, -1, -1)
    parts = []
    for difference in rows - before:                        # a row at a time: 21 cells a pixel are many
        size = np.frexp(np.abs(difference))[1]              # bits of its magnitude
        rest = np.where(difference < 0, difference - 1, difference)
        cells = np.hstack([size[:, None] >> bit[-5:] & 1, rest[:, None] >> bit & 1])
        used = np.hstack([np.ones((len(size), 5), bool), bit < size[:, None]])
        parts.append(cells[used].astype(np.uint8))
    stream = np.concatenate(parts)
    data = np.packbits(np.append(stream, np.ones(-len(stream) % 8, np.uint8))).tobytes()
    height, width = (side.to_bytes(2, "big") for side in pixels.shape)
    frame = bytes([bits, *height, *width, 1, 1, 0x11, 0])
    codes = bytes([0, *(17 * (length == 5) for length in range(1, 17)), *range(17)])    # 17 codes of 5 bits
    segments = [(0xC3, frame), (0xC4, codes), (0xDA, bytes([1, 1, 0, 1, 0, 0]))]
    head = [bytes([0xFF, mark]) + (len(body) + 2).to_bytes(2, "big") + body for mark, body in segments]
    return b"\xff\xd8" + b"".join(head) + data.replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def dicom(path, pixels, syntax):
    """Save 14-bit pixels as a DICOM file of a transfer syntax, with a window."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 14, 13
    ds.WindowCenter, ds.WindowWidth = 8000, 14000
    ds.PixelData = pixels.tobytes()
    if syntax == JPEG2000Lossless:
        ds.compress(syntax)
    elif syntax == JPEGLosslessSV1:
        ds.PixelData = encapsulate([jpeg_lossless(pixels, 14)])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)


def picture(path, pixels, **options):
    """Save pixels by Pillow, the format as the ending says."""
    Image.fromarray(pixels).save(path, **options)


# kind: what it is, share of --images, height, width, bits, grain, ending, how it is saved, options
KINDS = {
    "png": ("PNG 1024 x 1024", 4, 1024, 1024, 8, 3, ".png", picture, {}),
    "jpeg": ("JPEG 1024 x 1024", 4, 1024, 1024, 8, 3, ".jpg", picture, {"quality": 95}),
    "png16": ("16-bit PNG 2000 x 2500", 1, 2500, 2000, 16, 200, ".png", picture, {}),
    "dicom": ("DICOM 2500 x 3000", 2, 3000, 2500, 14, 20, ".dcm", dicom, {"syntax": ExplicitVRLittleEndian}),
    "j2k": ("DICOM 2500 x 3000, JPEG 2000", 0.25, 3000, 2500, 14, 20, ".dcm", dicom,
            {"syntax": JPEG2000Lossless}),
    "jpegll": ("DICOM 2500 x 3000, JPEG lossless", 0.5, 3000, 2500, 14, 20, ".dcm", dicom,
               {"syntax": JPEGLosslessSV1}),
}


def draw(raw, kind, n):
    """Draw n files of a kind into the folder `raw`. Returns: their names."""
    _, _, height, width, bits, grain, ending, save, options = KINDS[kind]
    names = [f"{i:06}{ending}" for i in range(n)]
    for i, name in enumerate(names):
        if i < DISTINCT:
            save(raw / name, radiograph(np.random.default_rng(i), height, width, bits, grain), **options)
        else:
            os.link(raw / names[i % DISTINCT], raw / name)
    return names


# ---- the decoders alone ----

def decode(path):
    """Decode a file. Returns: its pixels as Pillow or pydicom give them, and the DICOM dataset if any."""
    if path.endswith(".dcm"):
        ds = pydicom.dcmread(path)
        return ds.pixel_array, ds
    image = Image.open(path)
    image.load()
    return image, None


def decode_only(path):
    """A pool's task. Returns: its CPU seconds; no pixels are sent back."""
    begun = time.process_time()
    decode(path)
    return time.process_time() - begun


def decode_and_shrink(path):
    """A pool's task: 8 bits as the libraries' own functions make them, then resize. Returns: CPU seconds."""
    begun = time.process_time()
    image, ds = decode(path)
    if ds is not None:
        values = apply_voi_lut(apply_modality_lut(image, ds), ds)
        image = Image.fromarray((values / (2 ** ds.BitsStored - 1) * 255).astype(np.uint8))
    elif image.mode == "I;16":
        image = Image.fromarray(np.rint(np.asarray(image) / np.float32(65535) * 255).astype(np.uint8))
    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return time.process_time() - begun


def time_pool(task, paths, workers):
    """Wall and CPU seconds an image for a task by a pool that is up and running."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(task, paths[:2 * workers]))           # imports and the first decoder
        begun = time.perf_counter()
        cpu = sum(pool.map(task, paths, chunksize=4))
        return (time.perf_counter() - begun) / len(paths), cpu / len(paths)


# ---- the command ----

def memory(pid):
    """Bytes of a process and its descendants, a page shared by k of them counted as 1/k (PSS)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory(child) for child in (task / "children").read_text().split())
    except (OSError, ValueError):                           # it has just ended
        pass
    return total


def time_pack(folder, names, workers):
    """Wall and CPU seconds of the command for these images, and its peak memory in bytes."""
    (folder / "index.csv").write_text("path\n" + "\n".join(names) + "\n")
    command = [sys.executable, PACK, "--index", folder / "index.csv", "--raw", folder / "raw", "--out",
               folder / "out", "--size", str(SIZE), "--workers", str(workers)]
    shutil.rmtree(folder / "out", ignore_errors=True)
    begun, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or json.loads((folder / "out" / "pack.json").read_text())["N"] != len(names):
        sys.exit(f"{PACK} failed or rejected images")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def measure(kind, n, workers, rounds):
    """One kind of file. Returns: a row of the table."""
    with tempfile.TemporaryDirectory(prefix="bench_pack_") as folder:
        folder = Path(folder)
        (folder / "raw").mkdir()
        names = draw(folder / "raw", kind, 4 * n)
        paths = [str(folder / "raw" / name) for name in names]
        size = sum(map(os.path.getsize, paths)) / len(paths)
        best = np.min([[*time_pool(decode_only, paths, workers),
                        *time_pool(decode_and_shrink, paths[:n], workers),
                        *time_pack(folder, names[:n], workers), *time_pack(folder, names, workers)]
                       for _ in range(rounds)], axis=0)
    decode_wall, decode_cpu, both_wall, both_cpu, _, few_cpu, few_peak, pack_wall, pack_cpu, pack_peak = best
    pack_cpu = (pack_cpu - few_cpu) / (3 * n)               # of the other 3 N images: no start-up in it
    return {"kind": KINDS[kind][0], "images": len(names), "mb_a_file": size / 1e6,
            "packed": len(names) / pack_wall, "decoded": 1 / decode_wall, "decoded_and_shrunk": 1 / both_wall,
            "cpu_ms_packed": 1e3 * pack_cpu, "cpu_ms_decoded": 1e3 * decode_cpu,
            "cpu_ms_decoded_and_shrunk": 1e3 * both_cpu, "of_decoder": decode_cpu / pack_cpu,
            "of_decode_and_shrink": both_cpu / pack_cpu,
            "mb_at_n": few_peak / 1e6, "mb_at_4n": pack_peak / 1e6}


COLUMNS = {"kind": "", "images": "", "mb_a_file": ".1f", "packed": ".1f", "decoded": ".1f",
           "decoded_and_shrunk": ".1f", "cpu_ms_packed": ".1f", "cpu_ms_decoded": ".1f",
           "cpu_ms_decoded_and_shrunk": ".1f", "of_decoder": ".0%", "of_decode_and_shrink": ".0%",
           "mb_at_n": ".0f", "mb_at_4n": ".0f"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--images", type=int, default=64, metavar="K",
                        help="N of 16-bit PNG; quick kinds have more, slow ones fewer (default 64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="K", help="the best of K counts (default 3)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes (default: as many as cores)")
    args = parser.parse_args()

    load = os.getloadavg()[0]
    print(f"{args.workers} processes on {os.cpu_count()} cores, load before: {load:.2f}\n")
    print("|", " | ".join(COLUMNS).replace("_", " "), "|\n" + "|---" * len(COLUMNS) + "|", flush=True)
    rows = []
    for kind in args.kinds:
        n = max(args.workers, round(args.images * KINDS[kind][1]))
        rows.append(measure(kind, n, args.workers, args.rounds))
        print("|", " | ".join(format(rows[-1][name], how) for name, how in COLUMNS.items()), "|", flush=True)
    report = {"workers": args.workers, "cores": os.cpu_count(), "rounds": args.rounds, "load_before": load,
              "load_after": os.getloadavg()[0], "machine": platform.machine(), "numpy": np.__version__,
              "pillow": Image.__version__, "pydicom": pydicom.__version__, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
