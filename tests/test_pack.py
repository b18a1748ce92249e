"""Packing: the bytes of every kind of file, the reason of every rejection, and packs that survive a kill."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT, assert_user_error, load_script, run_script
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (ExplicitVRLittleEndian, JPEGLosslessSV1, MPEG2MPML, RLELossless,
                         SecondaryCaptureImageStorage, generate_uid)

pack = load_script("data_prep/pack.py")
RNG = np.random.default_rng(7)
QUICK = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- small real files ----

def noise(height, width, high=256, dtype=np.uint8):
    return RNG.integers(0, high, (height, width)).astype(dtype)


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def dataset(pixels, photometric="MONOCHROME2", bits=None, **elements):
    """A minimal DICOM dataset around an integer array [H, W]."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid(entropy_srcs=["pack"])
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.BitsAllocated = 8 * pixels.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def dicom(path, pixels, *args, **elements):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset(pixels, *args, **elements).save_as(path, enforce_file_format=True)
    return path


def lut(values, first, bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", np.asarray(values, np.uint16).tobytes())
    return pydicom.Sequence([item])


def grey(path, **options):
    """The 8-bit pixels of a file as the packer sees them."""
    return np.asarray(pack.read_image(path, **options)[0])


def write_index(path, rows):
    """rows: paths, or dicts with further columns."""
    rows = [row if isinstance(row, dict) else {"path": row} for row in rows]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def run_pack(folder, *options, out="out", **env):
    return run_script("data_prep/pack.py", "--index", folder / "index.csv", "--raw", folder / "raw",
                      "--out", folder / out, "--workers", 2, "--size", 16, *options, **env)


def run_main(folder, *options):
    """The command in this process, for mistakes that stop it early. Returns: as run_pack."""
    output, error = io.StringIO(), io.StringIO()
    command = ["pack.py", "--index", folder / "index.csv", "--raw", folder / "raw", "--out", folder / "out",
               *options]
    argv, handlers = sys.argv, {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = list(map(str, command))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            pack.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
    return subprocess.CompletedProcess(command, code, output.getvalue(), error.getvalue())


def contents(folder):
    """{file name: hash} of everything in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mixed(folder, n=12):
    """A raw folder with good images of several kinds and one bad one of several kinds, and its index."""
    raw = folder / "raw"
    for i in range(n):
        save(raw / f"a/{i:03}.png", noise(20 + i, 33))
    save(raw / "grey16.png", noise(30, 20, 65536, np.uint16))
    save(raw / "twelve.png", noise(30, 20, 4096, np.uint16))
    save(raw / "colour.jpg", RNG.integers(0, 256, (40, 12, 3)).astype(np.uint8))
    dicom(raw / "one.dicom", noise(25, 31, 4096, np.uint16), "MONOCHROME1", 12)
    (raw / "copy.png").write_bytes((raw / "a/000.png").read_bytes())
    (raw / "empty.png").touch()
    save(raw / "flat.png", np.full((9, 9), 7, np.uint8))
    (raw / "cut.png").write_bytes((raw / "grey16.png").read_bytes()[:700])
    paths = sorted(str(path.relative_to(raw)) for path in raw.rglob("*.*"))
    rows = [{"path": path, "patient": f"{i:03}", "split": "train" if i % 3 else "val", "Mass": str(i % 2)}
            for i, path in enumerate([*paths, "absent.png", "../index.csv"])]
    write_index(folder / "index.csv", rows)
    return rows


# ---- pixels ----

def test_16_bit_values_are_rounded_or_cut_as_the_fraction_says(tmp_path):
    path = save(tmp_path / "x.png", np.arange(65536, dtype=np.uint16).reshape(256, 256))
    exact = [(2 * 255 * x + 65535) // (2 * 65535) for x in range(65536)]      # 255 x / 65535 to the nearest
    assert grey(path).ravel().tolist() == exact
    cut = grey(path, variant="paper").ravel().tolist()
    for x in range(0, 65536, 97):
        assert cut[x] == int(np.float32(x) / np.float32(65535) * np.float32(255)), x
    assert 0.49 < np.mean(np.array(exact) != cut) < 0.51      # one level apart on half of the values


def test_16_bit_png_is_scaled_where_pillow_would_clip(tmp_path):
    values = np.array([[0, 100, 300], [30000, 65000, 65535]], np.uint16)
    path = save(tmp_path / "x.png", values)
    assert grey(path).tolist() == [[0, 0, 1], [117, 253, 255]]
    assert grey(path, variant="paper").tolist() == [[0, 0, 1], [116, 252, 255]]
    assert grey(save(tmp_path / "x.tif", values)).tolist() == [[0, 0, 1], [117, 253, 255]]
    (tmp_path / "x.pgm").write_bytes(b"P5 3 2 65535 " + values.astype(">u2").tobytes())     # of mode I
    assert grey(tmp_path / "x.pgm").tolist() == [[0, 0, 1], [117, 253, 255]]
    _, facts = pack.read_image(path)
    assert facts == {"sixteen_bit": True, "sixteen_bit_below_4096": False, "monochrome1": False, "person": {}}


@pytest.mark.parametrize("bits", [12, 16])
def test_a_tiff_that_stores_white_as_zero_is_inverted_and_12_bits_span_the_range(tmp_path, bits):
    top = 2 ** bits - 1
    values = np.array([[0, 100, 300], [1000, 3000, top]], np.uint16)
    packed = values
    if bits == 12:                              # two values in three bytes; each row begins at a byte
        rows = ["".join(f"{value:012b}" for value in row) + "0000" for row in values]
        packed = np.array([[int(row[i:i + 8], 2) for i in range(0, 40, 8)] for row in rows], np.uint8)
    for white_is_zero in (False, True)[:bits - 14]:
        entries = [(256, 3), (257, 2), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8),
                   (277, 1), (278, 2), (279, packed.nbytes)]
        head = b"II*\0" + (8 + packed.nbytes).to_bytes(4, "little")
        directory = b"".join(tag.to_bytes(2, "little") + b"\4\0" + (1).to_bytes(4, "little")
                             + value.to_bytes(4, "little") for tag, value in entries)
        (tmp_path / "x.tif").write_bytes(head + packed.tobytes() + len(entries).to_bytes(2, "little")
                                         + directory + b"\0" * 4)
        expected = [[round((top - int(x) if white_is_zero else int(x)) / top * 255) for x in row]
                    for row in values]
        assert grey(tmp_path / "x.tif").tolist() == expected


def luma(rgb):
    """ITU-R 601 in Pillow's fixed point."""
    r, g, b = (np.asarray(rgb)[..., i].astype(np.int64) for i in range(3))
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_8_bit_grey_is_unchanged(tmp_path, suffix):
    pixels = noise(21, 34)
    assert (grey(save(tmp_path / f"x.{suffix}", pixels)) == pixels).all()


def test_colour_palette_and_alpha_become_luma_without_compositing(tmp_path):
    rgb = RNG.integers(0, 256, (12, 17, 3)).astype(np.uint8)
    rgba = np.dstack([rgb, noise(12, 17)])
    assert (grey(save(tmp_path / "rgb.png", rgb)) == luma(rgb)).all()
    assert (grey(save(tmp_path / "rgba.png", rgba)) == luma(rgb)).all()
    assert (grey(save(tmp_path / "la.png", rgba[..., 2:])) == rgba[..., 2]).all()
    palette = Image.fromarray(noise(12, 17, 5), "L").convert("P")
    palette.putpalette(rgb.reshape(-1)[:15].tolist())
    palette.save(tmp_path / "p.png", transparency=0)
    assert (grey(tmp_path / "p.png") == luma(np.asarray(palette.convert("RGB")))).all()


def test_one_bit_is_black_and_white(tmp_path):
    bits = noise(9, 13, 2).astype(bool)
    assert (grey(save(tmp_path / "x.png", bits)) == np.where(bits, 255, 0)).all()


def test_cmyk_jpeg_is_read_by_ink(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))      # magenta and yellow ink: red
    cmyk.paste((255, 255, 0, 0), (8, 0, 16, 16))      # cyan and magenta: blue
    found = grey(save(tmp_path / "x.jpg", cmyk, quality=100))
    red, blue = int(found[0, 0]), int(found[0, 15])
    assert abs(red - 0.299 * 255) <= 2 and abs(blue - 0.114 * 255) <= 2         # JPEG is not exact


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_that_lies_on_its_side_is_turned_as_its_tag_says(tmp_path, bits, compression):
    upright = noise(13, 17)                             # row 0 of the scene at the top, column 0 at the left
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1]}
    for orientation, pixels in stored.items():          # Source: TIFF 6.0, Orientation
        if bits == 16:
            pixels = pixels.astype(np.uint16) * 257
        path = save(tmp_path / "x.tif", pixels, tiffinfo={274: orientation}, compression=compression)
        assert np.array_equal(grey(path), upright), orientation


def test_a_png_named_jpeg_and_an_exif_orientation_change_nothing(tmp_path):
    pixels = noise(8, 11)
    (tmp_path / "x.JPEG").write_bytes(save(tmp_path / "x.png", pixels).read_bytes())
    assert (grey(tmp_path / "x.JPEG") == pixels).all()
    exif = Image.Exif()
    exif[0x0112] = 6      # turn by 90 degrees
    assert grey(save(tmp_path / "y.jpg", pixels, exif=exif)).shape == (8, 11)


def test_a_colour_pack_keeps_colour_and_repeats_grey(tmp_path):
    rgb = RNG.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    assert (grey(save(tmp_path / "rgb.png", np.dstack([rgb, noise(5, 6)])), channels=3) == rgb).all()
    pixels = noise(5, 6)
    assert (grey(save(tmp_path / "l.png", pixels), channels=3) == pixels[..., None]).all()
    deep = save(tmp_path / "deep.png", noise(5, 6, 65536, np.uint16))
    assert (grey(deep, channels=3) == grey(deep)[..., None]).all()


def test_colour_is_constant_where_all_channels_are_and_counts_in_every_channel(tmp_path):
    rgb = np.full((8, 8, 3), (1, 2, 3), np.uint8)
    save(tmp_path / "flat.png", rgb)
    rgb[..., 1] = noise(8, 8)
    save(tmp_path / "green.png", rgb)
    config = {**CONFIG, "raw": str(tmp_path), "channels": 3}
    assert pack.pack_row("flat.png", config)[0] == {"reason": "all-constant"}
    record, data = pack.pack_row("green.png", config)
    assert data == rgb.tobytes()
    sums = {"pixels": 192, "sum": rgb.sum(dtype=int), "square": (rgb.astype(int) ** 2).sum()}
    assert record["facts"] == {**record["facts"], **sums}


@QUICK
@given(pixels=st.lists(st.tuples(st.integers(0, 255), st.integers(1, 60)), min_size=1, max_size=30),
       slope=st.sampled_from([1, -2, 0.37]))
def test_percentiles_of_counted_levels_are_numpys(pixels, slope):
    levels = np.arange(256) * slope - 40
    values = np.concatenate([np.repeat(levels[level], n) for level, n in pixels])
    counts = np.bincount([level for level, n in pixels for _ in range(n)], minlength=256)
    black, white = np.percentile(values, (0.5, 99.5))
    if black == white:
        black, white = values.min(), max(values.max(), values.min() + 1)
    assert pack.percentile_window(levels, counts) == pytest.approx((black, white), abs=1e-9)


def test_a_wide_image_is_squeezed_not_turned(tmp_path):
    pixels = np.zeros((30, 90), np.uint8)
    pixels[:, 60:] = 240      # bright on the right
    save(tmp_path / "x.png", pixels)
    record, data = pack.pack_row("x.png", {**CONFIG, "raw": str(tmp_path), "size": 9})
    small = np.frombuffer(data, np.uint8).reshape(9, 9).astype(int)
    assert (small[:, 7:] > 230).all() and (small[:, :5] < 10).all()
    sums = {"sum": small.sum(), "square": (small ** 2).sum(), "pixels": 81}
    assert record["facts"] == {**record["facts"], **sums}


# ---- DICOM ----

def windowed(values, center, width):
    """PS3.3 C.11.2.1.2.1, pixel by pixel, to 0..255."""
    def one(x):
        if x <= center - 0.5 - (width - 1) / 2:
            return 0
        if x > center - 0.5 + (width - 1) / 2:
            return 255
        return round(((x - (center - 0.5)) / (width - 1) + 0.5) * 255)
    return [[one(float(x)) for x in row] for row in values]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_first_window_is_applied_and_monochrome1_inverted_once(tmp_path, photometric):
    pixels = noise(20, 30, 4096, np.uint16)
    path = dicom(tmp_path / "x", pixels, photometric, 12, WindowCenter=[1800, 50], WindowWidth=[2000, 10])
    expected = np.array(windowed(pixels, 1800, 2000))
    assert (grey(path) == (255 - expected if photometric == "MONOCHROME1" else expected)).all()
    assert pack.read_image(path)[1]["monochrome1"] == (photometric == "MONOCHROME1")


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_without_window_the_percentiles_span_the_range(tmp_path, photometric):
    pixels = noise(60, 50, 900, np.uint16) + np.uint16(77)
    low, high = np.percentile(pixels, [0.5, 99.5])
    expected = np.rint(np.clip((pixels - low) / (high - low), 0, 1) * 255)
    found = grey(dicom(tmp_path / "x.dcm", pixels, photometric, 10))
    assert (found == (255 - expected if photometric == "MONOCHROME1" else expected)).all()


def test_rescale_comes_before_the_window_even_with_a_negative_slope(tmp_path):
    pixels = noise(20, 30, 2000, np.int16) - np.int16(1000)
    for slope in (2.5, -2.5):
        path = dicom(tmp_path / "x.dcm", pixels, RescaleSlope=slope, RescaleIntercept=-24, WindowCenter=40,
                     WindowWidth=400)
        assert (grey(path) == windowed(pixels * slope - 24, 40, 400)).all()


def test_slope_or_intercept_alone_counts(tmp_path):
    pixels, window = noise(20, 30, 2000, np.int16), dict(WindowCenter=40, WindowWidth=400)
    path = dicom(tmp_path / "slope.dcm", pixels, RescaleSlope=2.5, **window)
    assert (grey(path) == windowed(pixels * 2.5, 40, 400)).all()
    path = dicom(tmp_path / "intercept.dcm", pixels, RescaleIntercept=-1000, **window)
    assert (grey(path) == windowed(pixels - 1000, 40, 400)).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_lut_is_looked_up_entry_by_entry(tmp_path, bits):
    entries = np.linspace(2 ** bits - 1, 0, 3000).round().astype(int)      # long, and falling: a negative
    pixels = noise(20, 30, 4096, np.uint16)
    path = dicom(tmp_path / "x.dcm", pixels, "MONOCHROME2", 12, VOILUTSequence=lut(entries, 100, bits),
                 WindowCenter=9, WindowWidth=9)
    expected = [[round(entries[min(max(int(x) - 100, 0), 2999)] / (2 ** bits - 1) * 255) for x in row]
                for row in pixels]
    assert grey(path).tolist() == expected


def test_a_modality_lut_is_looked_up_first(tmp_path):
    entries = RNG.integers(0, 65536, 256)
    pixels = noise(20, 30)
    path = dicom(tmp_path / "x.dcm", pixels, ModalityLUTSequence=lut(entries, 0, 16), WindowCenter=30000,
                 WindowWidth=40000)
    assert grey(path).tolist() == windowed(entries[pixels], 30000, 40000)


@pytest.mark.parametrize("bits", [8, 12])
def test_a_modality_lut_of_any_number_of_bits_is_looked_up(tmp_path, bits):
    entries = RNG.integers(0, 2 ** bits, 3000)          # 8 or 16 says the standard; files with 12 exist
    pixels = noise(20, 30, 4096, np.uint16)
    path = dicom(tmp_path / "x.dcm", pixels, "MONOCHROME1", 12, ModalityLUTSequence=lut(entries, 0, bits),
                 WindowCenter=100, WindowWidth=120)
    expected = windowed(entries[np.minimum(pixels, 2999)], 100, 120)
    assert (grey(path) == 255 - np.array(expected)).all()


def test_header_elements_without_a_value_are_as_good_as_none(tmp_path):
    pixels, window = noise(20, 30, 4096, np.uint16), {"WindowCenter": 1800, "WindowWidth": 2000}
    empty = Dataset()
    empty.add_new("LUTDescriptor", "SS", None)
    empty.add_new("LUTData", "OW", None)
    plain = grey(dicom(tmp_path / "plain.dcm", pixels, bits=12, **window))
    for elements in ({"RescaleSlope": None, "RescaleIntercept": None}, {"RescaleIntercept": None},
                     {"VOILUTSequence": [empty]}, {"VOILUTSequence": []}, {"PixelPaddingValue": None}):
        path = dicom(tmp_path / "x.dcm", pixels, bits=12, **window, **elements)
        assert (grey(path) == plain).all(), elements


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [
    {"PixelPaddingValue": -2000}, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990},
    {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}])
def test_padding_is_black_and_outside_the_percentiles(tmp_path, photometric, padding):
    inside = noise(40, 30, 500, np.int16) + np.int16(300)
    inside[:5] = -1989                                  # next to the padding, and none
    pixels = np.pad(inside, 10, constant_values=-2000)
    if "PixelPaddingRangeLimit" in padding:
        pixels[:10] = np.linspace(-2000, -1990, 50).round()             # Source: DICOM PS3.3, C.7.5.1.1.2
    path = dicom(tmp_path / "x.dcm", pixels, photometric, **padding)
    bare = grey(dicom(tmp_path / "y.dcm", inside, photometric))
    assert (grey(path) == np.pad(bare, 10, constant_values=0)).all()


def element(path, name, vr, value, pixels, *args, **elements):
    """A DICOM file with one element of a VR of one's choice, as other software writes it."""
    ds = dataset(pixels, *args, **elements)
    ds.add_new(name, vr, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_a_padding_value_written_unsigned_for_signed_pixels_is_the_negative_number(tmp_path):
    inside = noise(40, 30, 500, np.int16) + np.int16(300)
    pixels = np.pad(inside, 10, constant_values=-2000)
    bare = grey(dicom(tmp_path / "y.dcm", inside))
    path = element(tmp_path / "x.dcm", "PixelPaddingValue", "US", 65536 - 2000, pixels)
    assert (grey(path) == np.pad(bare, 10, constant_values=0)).all()


@pytest.mark.parametrize("syntax", [None, RLELossless])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_values_stored_above_bit_0_are_shifted_down_whatever_lies_below_them(tmp_path, kind, syntax):
    pixels = noise(20, 30, 4096, np.uint16).astype(np.int32) - (2048 if kind == np.int16 else 0)
    words = (pixels * 16 + noise(20, 30, 16, np.int32)).astype(kind)
    window = {"WindowCenter": 40, "WindowWidth": 3000}
    ds = dataset(words, "MONOCHROME1", 12, HighBit=15, **window)
    if syntax:
        ds.compress(syntax)
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    assert (grey(tmp_path / "x.dcm") == 255 - np.array(windowed(pixels, 40, 3000))).all()
    low, high = np.percentile(pixels, [0.5, 99.5])
    ds = dataset(words, "MONOCHROME2", 12, HighBit=15)
    ds.save_as(tmp_path / "y.dcm", enforce_file_format=True)
    assert (grey(tmp_path / "y.dcm") == np.rint(np.clip((pixels - low) / (high - low), 0, 1) * 255)).all()
    paper = np.maximum(pixels, 0) / pixels.max() * 255
    assert (grey(tmp_path / "y.dcm", dicom="paper") == paper.astype(int)).all()


def test_overlay_bits_above_the_stored_ones_are_no_pixels(tmp_path):
    pixels = noise(20, 30, 4096, np.uint16)
    words = pixels | noise(20, 30, 16, np.uint16) << 12
    path = dicom(tmp_path / "x.dcm", words, "MONOCHROME2", 12, WindowCenter=1800, WindowWidth=2000)
    assert (grey(path) == windowed(pixels, 1800, 2000)).all()


@pytest.mark.parametrize("width", [0, -5, 0.5])
def test_a_window_that_cannot_be_is_as_good_as_none(tmp_path, width):
    pixels = noise(60, 50, 900, np.uint16)
    plain = grey(dicom(tmp_path / "plain.dcm", pixels))
    assert (grey(dicom(tmp_path / "x.dcm", pixels, WindowCenter=40, WindowWidth=width)) == plain).all()


def test_an_empty_voi_lut_function_is_the_linear_one(tmp_path):
    pixels = noise(20, 30, 4096, np.uint16)
    path = dicom(tmp_path / "x.dcm", pixels, WindowCenter="1000", WindowWidth="501", VOILUTFunction="")
    expected = np.clip((pixels - 999.5) / 500 + 0.5, 0, 1) * 255        # Source: DICOM PS3.3, C.11.2.1.2
    assert np.abs(grey(path) - expected).max() <= 0.5


def test_a_narrow_window_of_another_function_is_one(tmp_path):
    pixels = noise(60, 50, 900, np.uint16)
    path = dicom(tmp_path / "x.dcm", pixels, RescaleSlope=1e-3, RescaleIntercept=0, WindowCenter=0.4,
                 WindowWidth=0.5, VOILUTFunction="LINEAR_EXACT")
    exact = np.clip((pixels / 1000 - 0.4) / 0.5 + 0.5, 0, 1) * 255          # PS3.3 C.11.2.1.3.2
    assert np.abs(grey(path) - exact).max() <= 0.5 + 1e-6


def test_a_lut_that_begins_at_a_negative_number_written_unsigned(tmp_path):
    entries = np.linspace(0, 4095, 3000).round().astype(int)
    pixels = noise(20, 30, 2600, np.int16) - np.int16(800)
    ds = dataset(pixels, VOILUTSequence=lut(entries, 65536 - 1000, 12))
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    expected = [[round(entries[min(max(int(x) + 1000, 0), 2999)] / 4095 * 255) for x in row]
                for row in pixels]
    assert grey(tmp_path / "x.dcm").tolist() == expected


@pytest.mark.parametrize("age, years", [("058Y", "58"), ("107Y", "107"), ("000Y", ""), ("011M", ""),
                                        ("120Y", "120"), ("121Y", ""), ("413Y", "")])
def test_sex_and_age_come_from_the_header(tmp_path, age, years):
    path = dicom(tmp_path / "x.dcm", noise(9, 9), PatientAge=age, PatientSex="F" if years else "")
    assert pack.read_image(path)[1]["person"] == {"sex": "F" if years else "", "age": years}


@pytest.mark.parametrize("sex, known", [("F", "F"), ("O", "O"), ("W", ""), ("MALE", ""), ("", "")])
def test_a_sex_in_the_header_is_m_f_or_o(tmp_path, sex, known):
    file = dicom(tmp_path / "x.dcm", noise(8, 8), PatientSex=sex)
    assert pack.read_image(file)[1]["person"] == {"sex": known, "age": ""}


def test_the_paper_face_is_raw_over_maximum_cut(tmp_path):
    pixels = noise(20, 30, 3000, np.uint16)
    path = dicom(tmp_path / "x.dcm", pixels, "MONOCHROME1", 12, WindowCenter=100, WindowWidth=10)
    expected = [[int(x / int(pixels.max()) * 255) for x in row] for row in pixels.tolist()]
    assert grey(path, dicom="paper").tolist() == expected


def test_every_lossless_syntax_gives_the_bytes_of_the_uncompressed_file():
    plain = grey(get_testdata_file("MR_small.dcm"))
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
                 "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_expb.dcm"):
        assert (grey(get_testdata_file(name)) == plain).all(), name


@pytest.mark.parametrize("name", [
    "JPEG2000.dcm", "JPGExtended.dcm", "693_J2KI.dcm", "CT_small.dcm", "image_dfl.dcm",
    "examples_overlay.dcm", "JPEGLSNearLossless_16.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_pydicoms_own_files_look_as_pydicom_and_the_window_formula_say(name):
    ds = pydicom.dcmread(get_testdata_file(name))
    values = ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
    if "WindowCenter" in ds:
        center, width = (float(np.ravel(ds[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
        expected = np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
    else:
        low, high = np.percentile(values[ds.pixel_array != ds.get("PixelPaddingValue")], [0.5, 99.5])
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
    expected = np.where(ds.pixel_array == ds.get("PixelPaddingValue"), 0, np.rint(expected))
    assert np.abs(grey(get_testdata_file(name)) - expected).max() <= 1      # halves may round either way
    assert np.mean(grey(get_testdata_file(name)) != expected) < 1e-3


def jpeg_lossless(pixels, bits):
    """An encoder after ITU-T T.81, process 14 with predictor 1, and a table of 17 five-bit codes."""
    height, width = pixels.shape
    out = []
    for y in range(height):
        for x in range(width):
            before = pixels[y, x - 1] if x else pixels[y - 1, x] if y else 1 << (bits - 1)
            difference = int(pixels[y, x]) - int(before)
            size = abs(difference).bit_length()
            out.append(f"{size:05b}")
            if size:
                code = difference if difference > 0 else difference - 1
                out.append(f"{code & ((1 << size) - 1):0{size}b}")
    stream = "".join(out)
    stream += "1" * (-len(stream) % 8)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = bytes([bits, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 1, 1, 0x11, 0])
    huffman = bytes([0] + [17 if length == 5 else 0 for length in range(1, 17)] + list(range(17)))
    segments = [(0xC3, frame), (0xC4, huffman), (0xDA, bytes([1, 1, 0, 1, 0, 0]))]
    return (b"\xff\xd8" + b"".join(b"\xff" + bytes([mark]) + (len(body) + 2).to_bytes(2, "big") + body
                                   for mark, body in segments) + data + b"\xff\xd9")


def test_jpeg_lossless_and_rle_give_the_stored_values_back(tmp_path):
    pixels = noise(24, 37, 4096, np.uint16)
    plain = grey(dicom(tmp_path / "plain.dcm", pixels, "MONOCHROME1", 12))
    ds = dataset(pixels, "MONOCHROME1", 12, PixelData=encapsulate([jpeg_lossless(pixels, 12)]))
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.save_as(tmp_path / "lossless.dicom", enforce_file_format=True)
    assert (grey(tmp_path / "lossless.dicom") == plain).all()
    ds = dataset(pixels, "MONOCHROME1", 12)
    ds.compress(RLELossless)
    ds.save_as(tmp_path / "rle", enforce_file_format=True)      # known by its preamble alone
    assert (grey(tmp_path / "rle") == plain).all()


def test_a_dicom_file_without_preamble_is_known_by_its_extension(tmp_path):
    pixels = noise(10, 12, 256)
    ds = dataset(pixels)
    del ds.file_meta
    ds.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True)
    assert (grey(tmp_path / "bare.dcm") == grey(dicom(tmp_path / "full.dcm", pixels))).all()


# ---- rejection ----

def bomb(path):
    Image.new("1", (30000, 10000)).save(path)      # 300 million pixels in some 40 kB


def frames(path):
    images = [Image.fromarray(noise(8, 8)) for _ in range(3)]
    images[0].save(path, save_all=True, append_images=images[1:])


BAD = {     # name: (how to make it, what the reason starts with)
    "empty.png": (lambda path: path.touch(), "unreadable: cannot identify image file"),
    "empty.dcm": (lambda path: path.touch(), "wrong type: DICOM None"),
    "text.png": (lambda path: path.write_text("<html>404</html>"), "unreadable: cannot identify image file"),
    "far.tif": (lambda path: path.write_bytes(b"II+\0\x08\0\0\0" + b"\xff" * 7 + b"\x7f"), "unreadable: [Errno 22]"),
    "text.dcm": (lambda path: path.write_text("not a dicom file at all, just words " * 9), "wrong type"),
    "folder.png": (lambda path: path.mkdir(), "wrong type: not a regular file"),
    "pipe.png": (os.mkfifo, "wrong type: not a regular file"),
    "drawing.eps": (lambda path: save(path, noise(9, 9)), "unreadable: cannot identify"),
    "float.tif": (lambda path: save(path, noise(9, 9).astype(np.float32)), "wrong type: floating-point"),
    "deep.tif": (lambda path: save(path, noise(9, 9, 2 ** 30, np.int32)), "wrong type: floating-point, sign"),
    "signed.tif": (lambda path: save(path, noise(9, 9, 99, np.int32) - 50), "wrong type: floating-point"),
    "flat.png": (lambda path: save(path, np.full((90, 80), 7, np.uint8)), "all-constant"),
    "flat.dcm": (lambda path: dicom(path, np.full((9, 8), 7, np.uint8)), "all-constant"),
    "padding.dcm": (lambda path: dicom(path, np.full((9, 8), 7, np.uint8), PixelPaddingValue=7), "all-const"),
    "dark.png": (lambda path: save(path, noise(40, 40, 100, np.uint16)), "all-constant"),     # 0 in 8 bits
    "colour.png": (lambda path: save(path, np.full((90, 80, 3), (1, 2, 3), np.uint8)), "all-constant"),
    "film.gif": (frames, "multi-frame: 3 frames"),
    "film.tif": (frames, "multi-frame: 3 frames"),
    "film.dcm": (lambda path: dicom(path, noise(8, 8), NumberOfFrames=2), "multi-frame: 2 frames"),
    "bomb.png": (bomb, "unreadable: Image size (300000000 pixels) exceeds limit"),
    "bomb.dcm": (lambda path: dicom(path, noise(8, 8), Rows=60000, Columns=60000), "unreadable: The number of"),
    "short.dcm": (lambda path: dicom(path, noise(8, 8), Rows=9), "unreadable: The number of bytes"),
    "film.mpeg.dcm": (lambda path: relabelled(path, MPEG2MPML), "unreadable: Unable to decode the pixel data"),
    "wide.dcm": (lambda path: dicom(path, noise(8, 8), HighBit=20), "unreadable: "),
}


def relabelled(path, syntax):
    ds = dataset(noise(8, 8), PixelData=encapsulate([b"\0" * 64]))
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)


CONFIG = {"channels": 1, "variant": "corrected", "dicom": "display", "size": 8}


def reason(root, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pack.pack_row(path, {**CONFIG, "raw": str(root)})[0].get("reason")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_rejected_with_its_reason(tmp_path, name):
    make, expected = BAD[name]
    make(tmp_path / name)
    assert reason(tmp_path, name).startswith(expected)


def test_colour_and_deep_dicom_files_are_of_the_wrong_type():
    for name in ("examples_rgb_color.dcm", "examples_palette.dcm", "rtdose_1frame.dcm", "rtplan.dcm"):
        path = Path(get_testdata_file(name))
        assert reason(path.parent, path.name).startswith("wrong type"), name


@pytest.mark.parametrize("kind", ["png", "jpg", "16", "tif", "bmp", "dcm"])
def test_a_file_cut_anywhere_is_rejected(tmp_path, kind):
    if kind == "dcm":
        path = dicom(tmp_path / "x.dcm", noise(60, 50, 4096, np.uint16))
    else:
        path = save(tmp_path / f"x.{'png' if kind == '16' else kind}",
                    noise(60, 50, 65536, np.uint16) if kind == "16" else noise(60, 50))
    whole = path.read_bytes()
    assert reason(tmp_path, path.name) is None
    for share in (0.002, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        path.write_bytes(whole[:int(len(whole) * share)])
        assert reason(tmp_path, path.name).startswith(("unreadable", "wrong type")), share


@QUICK
@given(kind=st.sampled_from(["x.png", "x.jpg", "x.gif", "x.tif", "x.bmp", "x.dcm", "MR_small_RLE.dcm"]),
       changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_damage_to_a_file_escapes_the_packer(tmp_path, kind, changes):
    """Changed bytes either still decode or become a reason; nothing else comes out."""
    path, pixels = tmp_path / kind, np.arange(144, dtype=np.uint8).reshape(12, 12)
    if kind == "MR_small_RLE.dcm":
        path.write_bytes(Path(get_testdata_file(kind)).read_bytes())
    elif kind == "x.dcm":
        dicom(path, pixels.astype(np.uint16), WindowCenter=100, WindowWidth=100)
    else:
        save(path, pixels)
    damaged = bytearray(path.read_bytes())
    for position, value in changes:
        damaged[position % len(damaged)] = value
    path.write_bytes(damaged)
    found = reason(tmp_path, path.name)
    assert found is None or "\n" not in found and " at 0x" not in found


def test_a_missing_decoder_is_named(tmp_path):
    """A package that cannot be imported is as good as absent."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text("import sys; sys.modules['pylibjpeg'] = None\n")
    (tmp_path / "raw").mkdir()
    shutil.copy(get_testdata_file("MR_small_jpeg_ls_lossless.dcm"), tmp_path / "raw/x.dcm")
    save(tmp_path / "raw/y.png", noise(9, 9))
    write_index(tmp_path / "index.csv", ["x.dcm", "y.png"])
    assert run_pack(tmp_path, PYTHONPATH=str(tmp_path / "hide")).returncode == 0
    (row,) = table(tmp_path / "out/rejected.csv")
    assert "missing dependencies" in row["reason"]
    assert "pylibjpeg-libjpeg" in row["reason"]


# ---- paths ----

def test_nothing_outside_the_raw_root_is_read(tmp_path):
    root, outside = tmp_path / "raw", tmp_path / "private"
    good = save(root / "in/x.png", noise(9, 9))
    secret = save(outside / "x.png", noise(9, 9))
    (root / "link.png").symlink_to(secret)
    (root / "links").symlink_to(outside)
    (root / "loop").symlink_to("loop")
    (root / "alias.png").symlink_to("in/x.png")
    for path in ("../private/x.png", "in/../../private/x.png", str(secret), str(good), "in/../in/x.png"):
        assert reason(root, path).startswith("outside the raw root"), path
    for path in ("link.png", "links/x.png"):
        assert reason(root, path).startswith("outside the raw root"), path
    for path in ("loop", "none.png", "in/x.png/deeper", "in\0/x.png", "x" * 300, "nan", "raw/in/x.png", "  "):
        assert reason(root, path).startswith(("missing", "unreadable")), path
    assert reason(root, "") == "wrong type: not a regular file"
    assert reason(root, "alias.png") is None and reason(root, "in//x.png") is None


OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(args[0]) if event == "open" else None)


@QUICK
@given(parts=st.lists(st.sampled_from(["..", ".", "", "in", "links", "private", "x.png", "link.png", " ",
                                       "é", "\0", "~", "\\", "C:", "\n"]), max_size=6), absolute=st.booleans())
def test_no_path_whatever_leads_out_of_the_root(tmp_path, parts, absolute):
    root, outside = tmp_path / "raw", tmp_path / "private"
    if not root.exists():
        save(root / "in/x.png", noise(9, 9))
        (root / "link.png").symlink_to(save(outside / "x.png", noise(9, 9)))
        (root / "links").symlink_to(outside)
    OPENED.clear()
    found = reason(root, "/" * absolute + "/".join(parts))
    opened = [str(path) for path in OPENED if str(path).startswith(str(tmp_path))]
    assert all(os.path.realpath(path) == str(root / "in/x.png") for path in opened)
    assert found is not None or opened


CELLS = st.sampled_from(["path", "split", "x.png", "nan", "", " ", "1", "-1", "é", '"', "'", ",", "\n",
                         "\r\n", "\r", "\0", "\ufeff", "a,b", "../x", "/etc/passwd", "\u2028", "9" * 40])


@QUICK
@given(text=st.lists(CELLS, max_size=30).map("".join), good=st.booleans(),
       encoding=st.sampled_from(["utf-8", "latin-1", "utf-16"]))
def test_any_index_gives_rows_or_one_sentence(tmp_path, capsys, text, encoding, good):
    index = tmp_path / "index.csv"
    index.write_bytes(("path,split\n" * good + text).encode(encoding, "replace"))
    try:
        rows = list(pack.index_rows(index, ()))
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.startswith(f"error: {index}") and message.count("\n") == 1
    else:
        for row in rows:
            assert reason(tmp_path, row["path"]) is not None


# ---- the command ----

def test_the_pack_is_what_the_contract_says(tmp_path):
    rows = mixed(tmp_path)
    result = run_pack(tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert set(contents(out)) == {"images.npy", "manifest.csv", "pack.json", "rejected.csv"}
    images = np.load(out / "images.npy", mmap_mode="r")
    rejected = {row["path"]: row["reason"] for row in table(out / "rejected.csv")}
    assert rejected.pop("cut.png").startswith("unreadable: ")
    assert rejected.pop("empty.png").startswith("unreadable: cannot identify image file")
    assert rejected == {"absent.png": "missing", "flat.png": "all-constant",
                        "../index.csv": "outside the raw root: only --raw itself may be a link"}
    kept = [row for row in rows if row["path"] not in {*rejected, "cut.png", "empty.png"}]
    assert table(out / "manifest.csv") == kept      # same columns, cells and order
    assert images.shape == (len(kept), 16, 16) and images.dtype == np.uint8
    for row, image in zip(kept, images):
        whole, _ = pack.read_image(tmp_path / "raw" / row["path"])
        assert (np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC)) == image).all(), row["path"]
    np.save(tmp_path / "again.npy", images)
    assert (tmp_path / "again.npy").read_bytes() == (out / "images.npy").read_bytes()
    summary = json.loads((out / "pack.json").read_text())
    assert summary["mean"] == pytest.approx(images.mean() / 255, abs=1e-12)
    assert summary["std"] == pytest.approx(images.std() / 255, abs=1e-12)
    digest = hashlib.sha256((tmp_path / "index.csv").read_bytes()).hexdigest()
    expected = {"dataset": "out", "size": 16, "channels": 1, "N": len(kept), "rejected": 5, "splits": [],
                "index_sha256": digest, "raw": str(tmp_path / "raw"), "variant": "corrected",
                "dicom": "display", "monochrome1": 1, "sixteen_bit": 2,
                "sixteen_bit_below_4096": 1, "stand_in": None}
    assert {key: summary[key] for key in expected} == expected
    assert "rejected 5 {" in result.stdout and "1 MONOCHROME1 (DICOM as display)" in result.stdout
    assert "stand-in: None" in result.stdout and "\r" not in result.stdout


def test_an_index_of_paths_alone_will_do_and_bad_files_do_not_stop_it(tmp_path):
    save(tmp_path / "raw/a.png", noise(20, 20))
    (tmp_path / "raw/._a.png").write_bytes(b"\0\5\x16\7 resource fork")
    (tmp_path / "raw/DICOMDIR").write_text("no image")
    write_index(tmp_path / "index.csv", ["._a.png", "DICOMDIR", "a.png"])
    result = run_pack(tmp_path)
    assert result.returncode == 0 and "packed 1 images, rejected 2 {'unreadable': 2}" in result.stdout
    assert (tmp_path / "out/manifest.csv").read_text() == "path\na.png\n"
    assert [row["path"] for row in table(tmp_path / "out/rejected.csv")] == ["._a.png", "DICOMDIR"]


def test_blank_sex_and_age_are_filled_from_the_headers_and_nothing_else(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("a.dicom", "b.dicom"):
        dicom(tmp_path / "raw" / name, noise(20, 20), PatientSex="M", PatientAge="041Y")
    save(tmp_path / "raw/c.png", noise(20, 20))
    rows = [{"path": "a.dicom", "sex": "", "age": "", "race": ""},
            {"path": "b.dicom", "sex": "F", "age": "7", "race": ""},
            {"path": "c.png", "sex": "", "age": "", "race": ""}]
    write_index(tmp_path / "index.csv", rows)
    assert run_pack(tmp_path).returncode == 0
    assert table(tmp_path / "out/manifest.csv") == [{**rows[0], "sex": "M", "age": "41"}, *rows[1:]]


def test_a_stand_in_is_marked_and_real_data_beside_it_is_not(tmp_path):
    save(tmp_path / "raw/nih/a.png", noise(20, 20))
    (tmp_path / "raw/oct").mkdir()
    write_index(tmp_path / "index.csv", ["a.png"])
    note = tmp_path / "raw/nih/README.txt"
    note.write_text(load_script("data_prep/demo.py").STAND_IN)
    result = run_pack(tmp_path, "--raw", tmp_path / "raw/nih", out="drawn")
    mark = json.loads((tmp_path / "drawn/pack.json").read_text())["stand_in"]
    assert mark == "drawn by data_prep/demo.py" and f"stand-in: {mark}" in result.stdout
    note.rename(tmp_path / "raw/oct/README.txt")
    assert run_pack(tmp_path, "--raw", tmp_path / "raw/nih", out="kept").returncode == 0
    assert json.loads((tmp_path / "kept/pack.json").read_text())["stand_in"] is None


def test_a_stand_in_that_was_copied_elsewhere_is_known_by_its_readme(tmp_path):
    save(tmp_path / "copy/images/a.png", noise(20, 20))
    write_index(tmp_path / "index.csv", ["a.png"])
    note = tmp_path / "copy/README.txt"
    for text, mark in ((f"{load_script('data_prep/demo.py').STAND_IN}.\n", "drawn by data_prep/demo.py"),
                       ("The download as of 2017.\n", None)):
        note.write_text(text)
        assert fork_pack(tmp_path, f"{mark is None}", "--raw", tmp_path / "copy/images") == 0
        assert json.loads((tmp_path / f"{mark is None}/pack.json").read_text())["stand_in"] == mark


def test_a_pack_of_drawings_gives_way_to_one_of_other_drawings(tmp_path):
    save(tmp_path / "raw/a.png", noise(20, 20))
    save(tmp_path / "raw/b.png", noise(20, 20))
    (tmp_path / "raw/README.txt").write_text(load_script("data_prep/demo.py").STAND_IN)
    for paths in (["a.png"], ["a.png", "b.png"]):
        write_index(tmp_path / "index.csv", paths)
        assert fork_pack(tmp_path, "out") == 0
        assert [row["path"] for row in table(tmp_path / "out/manifest.csv")] == paths
        assert len(np.load(tmp_path / "out/images.npy")) == len(paths)


def test_the_conversion_of_dicom_is_chosen_apart_from_that_of_16_bits(tmp_path):
    files = [save(tmp_path / "raw/deep.png", noise(30, 20, 65536, np.uint16)),
             dicom(tmp_path / "raw/x.dcm", noise(25, 31, 4096, np.uint16), "MONOCHROME1", 12)]
    write_index(tmp_path / "index.csv", [file.name for file in files])
    for variant, conversion, flags in (("corrected", "paper", ["--dicom", "paper"]), ("paper", "paper", []),
                                       ("paper", "display", ["--dicom", "display"])):
        assert fork_pack(tmp_path, f"{variant} {conversion}", "--variant", variant, *flags) == 0
        out = tmp_path / f"{variant} {conversion}"
        for file, packed in zip(files, np.load(out / "images.npy"), strict=True):
            whole = Image.fromarray(grey(file, variant=variant, dicom=conversion))
            assert (np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC)) == packed).all(), flags
        facts = json.loads((out / "pack.json").read_text())
        assert (facts["variant"], facts["dicom"]) == (variant, conversion)


def test_the_number_of_workers_changes_no_byte_and_running_again_does_nothing(tmp_path):
    mixed(tmp_path)
    for out, workers in (("one", 1), ("two", 2), ("three", 3)):
        assert run_pack(tmp_path, "--workers", workers, "--variant", "paper", out=out).returncode == 0
    names = {"one": '"dataset": "one"', "two": '"dataset": "two"', "three": '"dataset": "three"'}
    for out, name in names.items():      # all that may differ
        text = (tmp_path / out / "pack.json").read_text()
        (tmp_path / out / "pack.json").write_text(text.replace(name, '"dataset": "x"'))
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two") == contents(tmp_path / "three")
    summary = json.loads((tmp_path / "one/pack.json").read_text())
    assert (summary["variant"], summary["dicom"]) == ("paper", "paper")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    again = run_pack(tmp_path, "--workers", 2, "--variant", "paper", out="one")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}


def test_other_settings_are_refused_by_name_and_a_pack_without_images_is_made_again(tmp_path):
    mixed(tmp_path)
    assert run_pack(tmp_path).returncode == 0
    before = contents(tmp_path / "out")
    said = run_pack(tmp_path, "--channels", 3)
    assert_user_error(said, "channels", "1, not 3", f"remove the folder {tmp_path / 'out'}", "--out")
    assert_user_error(run_pack(tmp_path, "--variant", "paper"), "variant", "'corrected'")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/images.npy").unlink()
    assert run_pack(tmp_path).returncode == 0
    assert contents(tmp_path / "out") == before
    with open(tmp_path / "index.csv", "a") as file:
        file.write("more.png,9,train,1\n")
    assert_user_error(run_pack(tmp_path), "index_sha256")
    assert run_pack(tmp_path, "--channels", 3, out="colour").returncode == 0
    assert np.load(tmp_path / "colour/images.npy", mmap_mode="r").shape[1:] == (16, 16, 3)


def test_original_size_validates_without_packing(tmp_path):
    mixed(tmp_path)
    assert run_pack(tmp_path, "--size", "original", "--splits", "train").returncode == 0
    out = tmp_path / "out"
    assert sorted(contents(out)) == ["manifest.csv", "pack.json", "rejected.csv"]
    kept = table(out / "manifest.csv")
    assert {row["split"] for row in kept + []} == {"train"}
    pixels = np.concatenate([grey(tmp_path / "raw" / row["path"]).ravel() for row in kept])
    summary = json.loads((out / "pack.json").read_text())
    assert summary["size"] == "original" and summary["N"] == len(kept) and summary["splits"] == ["train"]
    assert summary["mean"] == pytest.approx(pixels.mean() / 255, abs=1e-12)
    assert summary["std"] == pytest.approx(pixels.std() / 255, abs=1e-12)
    again = run_pack(tmp_path, "--size", "original", "--splits", "train").stdout
    assert "nothing to do" in again and f"remove {out}/manifest.csv" in again
    (out / "manifest.csv").unlink()
    assert "packed" in run_pack(tmp_path, "--size", "original", "--splits", "train").stdout
    assert table(out / "manifest.csv") == kept


def test_twelve_bit_values_in_sixteen_bits_are_warned_of(tmp_path):
    paths = [save(tmp_path / f"raw/{i}.png", noise(9, 9, 4096, np.uint16)).name for i in range(3)]
    write_index(tmp_path / "index.csv", paths)
    assert "warning: most 16-bit files stay below 4096" in run_pack(tmp_path).stdout


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    save(tmp_path / "raw/a b é.png", noise(9, 9))
    (tmp_path / "index.csv").write_bytes('\ufeffpath,split,"No, finding"\r\na b é.png,val,"1"\r\n'.encode())
    assert run_pack(tmp_path).returncode == 0
    manifest = (tmp_path / "out/manifest.csv").read_bytes()
    assert manifest == 'path,split,"No, finding"\na b é.png,val,1\n'.encode()


def test_mistakes_are_one_sentence(tmp_path):
    def attempt(index, *options, run=run_main):     # run_pack: where the folder is locked before the mistake
        (tmp_path / "index.csv").write_bytes(index)
        return run(tmp_path, *options)

    save(tmp_path / "raw/x.png", noise(9, 9))
    assert_user_error(attempt(b""), "index.csv row 1", "path")
    assert_user_error(attempt(b"file,split\nx.png,val\n"), "'file', 'split'")
    assert_user_error(attempt(b"path,Mass,Mass\nx.png,1,1\n"), "row 1", "'Mass', 'Mass'")
    assert_user_error(attempt(b",path\n0,x.png\n"), "row 1", "no name blank")
    assert_user_error(attempt(b"path,split\n"), "no rows")
    assert_user_error(attempt(b"path,split\nx.png,val\n", "--splits", "train"), "no rows of split train")
    assert_user_error(attempt(b"path\nx.png\ny.png\nx.png\n"), "'x.png' stands in several rows")
    for path in (b"./x.png", b".//x.png", b"a/./../x.png"):         # a leak between splits, were they two
        said = attempt(b"path,split\nx.png,train\n" + path + b",test\n")
        assert_user_error(said, "'x.png' stands in several rows")
    assert_user_error(attempt(b"path,split\nx.png,val\nx.png\n"), "row 3")
    assert_user_error(attempt(b"path,split\nx.png,val,1\n"), "row 2")
    assert_user_error(attempt(b'path,split\nx.png,"va'), "index.csv: not a CSV file", "end of data")   # cut
    assert_user_error(attempt("path\né.png\n".encode("latin-1")), "UTF-8")
    said = attempt(b"path\ny.png\nx.png\nz.png\n", "--require-files", run=run_pack)
    assert_user_error(said, "'y.png' in ", "missing; complete the download")
    assert not list((tmp_path / "out").iterdir())
    assert_user_error(attempt(b"path\ny.png\n", run=run_pack), "no row could be packed", "missing", "rejected.csv")
    assert table(tmp_path / "out/rejected.csv") == [{"path": "y.png", "reason": "missing"}]
    assert sorted(contents(tmp_path / "out")) == ["rejected.csv"]
    assert_user_error(attempt(b"path\nx.png\n", "--size", "big"), "--size")
    assert_user_error(attempt(b"path\nx.png\n", "--size", "0"), "--size")
    assert_user_error(attempt(b"path\nx.png\n", "--workers", "0"), "--workers")
    assert_user_error(attempt(b"path\nx.png\n", "--index", tmp_path / "no.csv"), "no.csv", "No such file")
    said = attempt(b"path\nx.png\n", "--raw", tmp_path / "no", run=run_pack)
    assert_user_error(said, f"{tmp_path / 'no'}: No such file")
    assert_user_error(attempt(b"path\nx.png\n", "--out", "/proc/pack"), "/proc/pack")
    assert_user_error(run_script("data_prep/pack.py"), "--index", "--raw", "--out")
    other = tmp_path / "other"
    other.mkdir()
    write_index(other / "manifest.csv", ["x.png"])
    assert_user_error(attempt(b"path\nx.png\n", "--out", other, run=run_pack), "manifest.csv", "--out")
    assert_user_error(run_pack(tmp_path, "--out", other, "--index", other / "manifest.csv"), "manifest.csv")
    assert list(contents(other)) == ["manifest.csv"]


# ---- trust ----

def finished_bytes(folder, out):
    """The contents of a finished pack but for its name in pack.json."""
    text = (folder / out / "pack.json").read_text().replace(f'"dataset": "{out}"', "")
    return {**contents(folder / out), "pack.json": text}


class Raised:
    """The queue of problems where there is one process."""
    def put(self, problem):
        raise problem


def in_this_process(shards, workers, config):
    """pack_shards without workers."""
    pack.work(0, shards, {-1}, [-1], Raised(), config)


def fork_pack(folder, out, *options, kill_at=0):
    """The command in a fork of this process, without workers, parts of one row, killed before its kill_at-th
    fsync, rename or removal. Returns: its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        calls = 0

        def deadly(call):
            def counted(*args, **kw):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kw)
            return counted

        os.fsync, os.replace, os.unlink, os.rmdir = map(deadly, (os.fsync, os.replace, os.unlink, os.rmdir))
        pack.SHARD, pack.pack_shards = 1, in_this_process
        sys.argv = ["pack.py", "--index", str(folder / "index.csv"), "--raw", str(folder / "raw"), "--out",
                    str(folder / out), "--size", "16", *map(str, options)]
        warnings.simplefilter("ignore")
        pack.main()
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code)
    finally:
        os._exit(1)


@pytest.mark.parametrize("options", [[], ["--size", "original"]])
def test_killed_before_any_step_on_disk_it_ends_in_the_same_bytes(tmp_path, options):
    rows = mixed(tmp_path, 1)
    write_index(tmp_path / "index.csv", rows[::3])      # two good rows, three bad ones
    assert fork_pack(tmp_path, "whole", *options) == 0
    expected = finished_bytes(tmp_path, "whole")
    kills = 0
    while fork_pack(tmp_path, f"cut{kills}", *options, kill_at=kills + 1) == -signal.SIGKILL:
        out = f"cut{kills}"
        kills += 1
        if kills % 3 == 0:      # sometimes a second and a third kill follow
            fork_pack(tmp_path, out, *options, kill_at=2)
            fork_pack(tmp_path, out, *options, kill_at=4)
        assert fork_pack(tmp_path, out, *options) == 0, kills
        assert finished_bytes(tmp_path, out) == expected, kills
    assert kills >= 19      # a part a row, two tables, images.npy, pack.json: synced, renamed; parts removed


def test_a_second_packing_killed_before_any_step_on_disk_ends_in_the_bytes_of_a_first(tmp_path):
    rows = mixed(tmp_path, 1)
    write_index(tmp_path / "index.csv", rows[::3])
    late = tmp_path / "raw" / next(row["path"] for row in rows[::3] if (tmp_path / "raw" / row["path"]).is_file())
    content = late.read_bytes()
    late.unlink()
    assert fork_pack(tmp_path, "old") == 0
    late.write_bytes(content)                           # it was missing at first
    assert fork_pack(tmp_path, "whole") == 0
    expected, kills, code = finished_bytes(tmp_path, "whole"), 0, -signal.SIGKILL
    assert expected != finished_bytes(tmp_path, "old")
    while code == -signal.SIGKILL:
        kills += 1
        out = f"cut{kills}"
        shutil.copytree(tmp_path / "old", tmp_path / out)
        text = (tmp_path / out / "pack.json").read_text()
        (tmp_path / out / "pack.json").write_text(text.replace('"dataset": "old"', f'"dataset": "{out}"'))
        (tmp_path / out / "images.npy").unlink()
        code = fork_pack(tmp_path, out, kill_at=kills)
        assert fork_pack(tmp_path, out) == 0, kills
        assert finished_bytes(tmp_path, out) == expected, kills
    assert code == 0 and kills >= 15


def test_images_may_be_missing_from_a_finished_pack(tmp_path):
    mixed(tmp_path, 1)
    assert fork_pack(tmp_path, "out") == 0
    missing = [row for row in table(tmp_path / "out/rejected.csv") if row["reason"] == "missing"]
    assert missing and fork_pack(tmp_path, "out", "--require-files") == 0
    assert fork_pack(tmp_path, "other", "--require-files") == 2


@pytest.mark.parametrize("path, reason", [
    ("batch 3/b.png", "outside the raw root"), ("..", "outside the raw root"), ("batch", "not a regular file")])
def test_a_path_that_cannot_be_packed_stops_a_run_that_requires_files(tmp_path, path, reason):
    save(tmp_path / "raw/a.png", noise(20, 20))
    save(tmp_path / "disk/b.png", noise(20, 20))
    (tmp_path / "raw/batch").mkdir()
    (tmp_path / "raw/batch 3").symlink_to(tmp_path / "disk")
    write_index(tmp_path / "index.csv", ["a.png", path])
    result = run_main(tmp_path, "--require-files")
    assert_user_error(result, f"{path!r} in {tmp_path}", reason, "--require-files")
    assert not list((tmp_path / "out").iterdir())
    assert fork_pack(tmp_path, "some") == 0             # without it the row is rejected
    assert [row["path"] for row in table(tmp_path / "some/rejected.csv")] == [path]


def start(folder, out, *options, **popen):
    """The command in the background, in a process group of its own, with parts of one row."""
    code = "import pack; pack.SHARD = 1; pack.main()"
    command = [sys.executable, "-c", code, "--index", folder / "index.csv", "--raw", folder / "raw",
               "--out", folder / out, "--workers", 2, "--size", 16, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, **popen,
                            env={**os.environ, "PYTHONPATH": str(ROOT / "data_prep"), "OMP_NUM_THREADS": "1"})


def parts(folder, out):
    return len([path for path in (folder / out).glob("parts-*/*") if path.suffix != ".tmp"])


def wait_for_parts(folder, out, n, process):
    """Wait until there are n parts, or the process has ended."""
    while process.poll() is None and parts(folder, out) < n:
        time.sleep(0.002)


def many(folder, n=150):
    for i in range(n):
        save(folder / f"raw/{i:04}.png", noise(150, 150))
    (folder / "raw/0031.png").write_text("no image")
    write_index(folder / "index.csv", [f"{i:04}.png" for i in range(n)])


def test_workers_end_with_a_killed_parent(tmp_path):
    many(tmp_path)
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 3, process)
    process.kill()
    process.wait()
    for _ in range(3000):
        try:
            os.killpg(process.pid, 0)      # is anybody left in its group?
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers outlived their parent")


def test_kills_and_stops_at_random_moments_change_no_byte(tmp_path):
    many(tmp_path)
    assert start(tmp_path, "whole").wait() == 0
    expected = finished_bytes(tmp_path, "whole")
    seed = random.randrange(10 ** 6)
    print("seed", seed)
    chance = random.Random(seed)
    for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = start(tmp_path, "cut")
        wait_for_parts(tmp_path, "cut", parts(tmp_path, "cut") + chance.randrange(1, 25), process)
        time.sleep(chance.random() / 100)
        (os.kill if sign == signal.SIGKILL else os.killpg)(process.pid, sign)   # the others reach the workers
        error = process.communicate(timeout=60)[1]
        assert process.returncode == -sign, error
        assert "Traceback" not in error, error
    assert parts(tmp_path, "cut") > 1
    assert start(tmp_path, "cut").wait() == 0
    assert finished_bytes(tmp_path, "cut") == expected


def test_a_second_run_into_the_folder_is_refused_and_harms_nothing(tmp_path):
    many(tmp_path)
    assert start(tmp_path, "whole").wait() == 0
    first = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 3, first)
    os.killpg(first.pid, signal.SIGSTOP)                # so that the second has the time to end
    for options in ([], ["--size", 8]):
        assert_user_error(run_pack(tmp_path, *options), f"{tmp_path / 'out'}: another run is packing")
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert finished_bytes(tmp_path, "out") == finished_bytes(tmp_path, "whole")
    assert run_pack(tmp_path).returncode == 0           # the lock went with its process


def test_where_folders_cannot_be_locked_packing_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")           # as NFS says

    save(tmp_path / "raw/x.png", noise(9, 9))
    write_index(tmp_path / "index.csv", ["x.png"])
    monkeypatch.setattr(pack.fcntl, "flock", refuse)
    monkeypatch.setattr(pack, "pack_shards", in_this_process)
    assert run_main(tmp_path, "--size", 8).returncode == 0
    assert len(np.load(tmp_path / "out/images.npy")) == 1


def test_where_a_process_has_no_set_of_cores_packing_goes_on(tmp_path, monkeypatch):
    save(tmp_path / "raw/x.png", noise(9, 9))
    write_index(tmp_path / "index.csv", ["x.png"])
    monkeypatch.delattr(os, "sched_getaffinity")                    # as on macOS
    monkeypatch.setattr(pack, "pack_shards", in_this_process)
    assert run_main(tmp_path, "--size", 8).returncode == 0


@pytest.mark.parametrize("mount_point", [True, False])
def test_a_raw_folder_that_goes_away_while_it_is_packed_costs_no_row(tmp_path, mount_point):
    many(tmp_path)
    assert start(tmp_path, "whole").wait() == 0
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 3, process)
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    if mount_point:
        (tmp_path / "raw").mkdir()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.startswith(f"error: {tmp_path / 'raw'}"), error
    assert "raw folder is empty" in error or "No such file" in error, error
    assert error.count("\n") == 1 and not (tmp_path / "out/manifest.csv").exists()
    shutil.rmtree(tmp_path / "raw", ignore_errors=True)
    (tmp_path / "elsewhere").rename(tmp_path / "raw")
    assert start(tmp_path, "out").wait() == 0
    assert finished_bytes(tmp_path, "out") == finished_bytes(tmp_path, "whole")


def test_what_was_rejected_before_a_kill_is_looked_at_again(tmp_path):
    many(tmp_path, 40)
    assert start(tmp_path, "whole").wait() == 0         # as after a download that ended in time
    whole = {name: (tmp_path / f"raw/{name}").read_bytes() for name in ("0000.png", "0001.png")}
    (tmp_path / "raw/0000.png").unlink()
    (tmp_path / "raw/0001.png").write_bytes(whole["0001.png"][:999])
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 12, process)
    process.kill()
    process.wait()
    for name, content in whole.items():
        (tmp_path / "raw" / name).write_bytes(content)
    assert parts(tmp_path, "out") < 40 and start(tmp_path, "out").wait() == 0
    assert finished_bytes(tmp_path, "out") == finished_bytes(tmp_path, "whole")


def test_what_a_killed_join_left_is_gone_before_packing_goes_on(tmp_path):
    many(tmp_path)
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 12, process)
    process.kill()
    process.wait()
    [folder] = (tmp_path / "out").glob("parts-*")
    (folder / "images.npy.1.tmp").write_bytes(b"half")              # as large as the pack
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", parts(tmp_path, "out") + 2, process)
    assert not (folder / "images.npy.1.tmp").exists() and process.wait() == 0


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    many(tmp_path)
    assert start(tmp_path, "whole").wait() == 0
    limit = (20_000, 20_000)                            # bytes a file: the parts fit, images.npy does not
    process = start(tmp_path, "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert "File too large" in error and "the same command goes on" in error
    assert parts(tmp_path, "out") == 150 and not (tmp_path / "out/manifest.csv").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))              # room for others on a full disk
    assert start(tmp_path, "out").wait() == 0
    assert finished_bytes(tmp_path, "out") == finished_bytes(tmp_path, "whole")


def test_a_file_that_crashes_its_decoder_is_rejected_alone(tmp_path):
    many(tmp_path, 60)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text("""
import os, sys
crashing = ("/0040.png", "/0043.png")
sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith(crashing) and os.abort())
""")
    result = run_pack(tmp_path, PYTHONPATH=str(tmp_path / "hook"))
    assert result.returncode == 0, result.stderr
    rejected = {row["path"]: row["reason"] for row in table(tmp_path / "out/rejected.csv")}
    assert rejected.pop("0031.png").startswith("unreadable: cannot identify")
    assert rejected == dict.fromkeys(["0040.png", "0043.png"], "unreadable: the decoder crashed")
    kept = [row["path"] for row in table(tmp_path / "out/manifest.csv")]
    assert kept == [f"{i:04}.png" for i in range(60) if i not in (31, 40, 43)]


@pytest.mark.parametrize("problem, said", [
    ("OSError(errno.ESTALE, os.strerror(errno.ESTALE))", "Stale file handle"),
    ("OSError(errno.EIO, os.strerror(errno.EIO))", "Input/output error"),
    ("PermissionError(errno.EACCES, 'Permission denied')", "Permission denied"),
    ("PermissionError(errno.EPERM, 'Operation not permitted')", "not permitted"),
    ("MemoryError()", "memory is short")])
def test_storage_or_memory_that_fails_for_a_moment_costs_no_file(tmp_path, problem, said):
    many(tmp_path, 60)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(f"""
import errno, os, sys
def fail(event, args):
    if event == "open" and str(args[0]).endswith("/0040.png"):
        raise {problem}
sys.addaudithook(fail)
""")
    result = run_pack(tmp_path, PYTHONPATH=str(tmp_path / "hook"))
    assert_user_error(result, "0040.png", said, "the same command goes on")
    assert run_pack(tmp_path).returncode == 0
    assert [row["path"] for row in table(tmp_path / "out/rejected.csv")] == ["0031.png"]


def test_an_error_of_the_decoder_or_of_the_name_rejects_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("truncated")

    save(tmp_path / "raw/a.png", noise(9, 9))
    monkeypatch.setattr(pack, "read_image", refuse)
    config = {"raw": tmp_path / "raw", "size": 16, "channels": 1, "variant": "corrected", "dicom": "display"}
    assert pack.pack_row("a.png", config)[0]["reason"].startswith("unreadable: ")
    assert "reason" in pack.pack_row(f"{'a' * 300}.png", config)[0]


def test_a_disk_that_is_full_in_a_worker_is_one_sentence(tmp_path):
    many(tmp_path, 20)
    process = start(tmp_path, "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert "File too large" in error


def test_a_worker_that_is_killed_stops_the_run_rather_than_cost_a_file(tmp_path):
    many(tmp_path)
    process = start(tmp_path, "out")
    wait_for_parts(tmp_path, "out", 5, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in workers if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.startswith("error: a worker ended with -9"), error
    assert start(tmp_path, "out").wait() == 0
    assert [row["path"] for row in table(tmp_path / "out/rejected.csv")] == ["0031.png"]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    peaks = []
    for n in (50, 800):
        for i in range(n):
            save(tmp_path / f"raw/{i:04}.png", noise(16, 16))
        write_index(tmp_path / "index.csv", [f"{i:04}.png" for i in range(n)])
        process = subprocess.Popen(
            [sys.executable, ROOT / "data_prep/pack.py", "--index", tmp_path / "index.csv", "--raw",
             tmp_path / "raw", "--out", tmp_path / str(n), "--workers", "2"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)         # the peak of the parent or of its largest worker
        assert status == 0
        peaks.append(usage.ru_maxrss / 1024)
    print("peak MB", peaks)
    assert peaks[1] - peaks[0] < 10      # the 750 further images take 38 MB in images.npy


def test_real_radiographs_keep_their_bytes_at_their_own_size(shared, tmp_path):
    raw = shared / "realdata/nih"
    if not raw.is_dir():
        pytest.skip(f"{raw} is absent")
    names = sorted(os.listdir(raw / "images"))[:200]
    write_index(tmp_path / "index.csv", [f"images/{name}" for name in names])
    assert run_pack(tmp_path, "--raw", raw, "--size", 64).returncode == 0
    images = np.load(tmp_path / "out/images.npy", mmap_mode="r")
    for name, image in zip(names, images, strict=True):
        assert (np.asarray(Image.open(raw / "images" / name)) == image).all(), name
