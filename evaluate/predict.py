"""Prediction: a trained classifier's probability of every label, for packed test sets or a folder of files.

    python evaluate/predict.py --checkpoint runs/3.4/finetune/seed0/classifier.pt \\
        --manifest data/nih/manifest.csv --split test --out runs/3.4/predictions/seed0/nih_test.csv
    python evaluate/predict.py --checkpoint classifier.pt --images my_radiographs --out predictions.csv
    python evaluate/predict.py --checkpoint classifier.pt --set nih_test=data/nih/manifest.csv:test \\
        --set padchest=data/padchest/manifest.csv:test --out runs/3.4/predictions/seed0

Reads   classifier.pt (of finetune/classify.py) and manifest.csv (+ images.npy beside it; without it the
        images named in `path`), or PNG, JPEG, TIFF and DICOM files below a folder, stretched as packing does.
Writes  --out: path, patient, true_<label> and prob_<label> of the labels that the manifest has under any of
        their spellings ("Pleural Effusion" is Effusion), uncertain and blank counting as 0; without any such
        column, prob_<label> of all. With --set, --out is a folder of <name>.csv.
Computed in fp32; torchrun with any number of processes writes the same bytes as one.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SPELLINGS = {"pleuraleffusion": "effusion"}     # besides case, spaces and underscores, which do not matter
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")

# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


def options():
    """The command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="classifier.pt of finetune/classify.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--manifest", metavar="FILE", help="manifest.csv of the images")
    what.add_argument("--images", metavar="DIR", help="folder of PNG, JPEG, TIFF or DICOM files")
    what.add_argument("--set", action="append", metavar="NAME=FILE:SPLIT", help="a manifest and its split; "
                      "may be repeated, --out is then a folder")
    add("--split", default="test", help="splits of --manifest, comma-separated, or all (default test)")
    add("--out", required=True, metavar="FILE", help="predictions to write; the folder is made if need be")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--test-crops", type=int, choices=[1, 10], default=1, help="views averaged an image (default 1)")
    add("--batch", type=int, default=64, metavar="N", help="images a pass (default 64)")
    add("--workers", type=int, default=4, metavar="N", help="threads that decode unpacked images (default 4)")
    parser.error = fail                                 # one sentence, like every other mistake
    args = parser.parse_args()
    if args.batch < 1 or args.workers < 1:
        fail("--batch and --workers have to be at least 1")
    return args


if __name__ == "__main__":      # help and mistakes are answered before the imports below, which take seconds
    options()

import numpy as np
import pandas as pd
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image


# --- begin copy: distributed ---
def init_distributed(device):
    """Join the processes torchrun started (plain python is one process); returns rank, world size, device."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda, but PyTorch sees no GPU here; use --device cpu")
        place, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= n_gpus:
            fail(f"process {place} of this machine has no GPU, there are {n_gpus}; lower --nproc_per_node")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        # what is computed in fp32, scores above all, is not to be rounded to TF32
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:     # one machine
        # the store of torchrun --max-restarts still has the addresses of the processes before the restart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # with one channel the stride of that dimension means nothing, and DDP says so at length
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # gloo beside nccl: small agreements between the processes need no GPU synchronisation
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            store=store, rank=rank, world_size=world_size)
    return rank, world_size, device


def any_process(flag):
    """True in every process if `flag` is true in one of them."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def mean_over_processes(value):
    """The mean of a tensor over all processes (of its own where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def end_if_peer_died(problem, rank):
    """For an `except RuntimeError`: torchrun reports the process that died, the others need no traceback."""
    if not any(name in str(problem) for name in ("gloo", "NCCL")):
        raise problem
    if rank == 0:
        said = " ".join(str(problem).split())[:150]
        print(f"error: another process died, torchrun says which ({said}); run the same command again",
              file=sys.stderr)
    sys.exit(1)


def leave():
    """In a `finally`: out of the process group. After an error at once, or NCCL would wait for the others."""
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    if not dist.is_initialized():
        return
    if code in (0, 75):
        dist.destroy_process_group()
        return
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def catch_sigterm():
    """SIGTERM (SLURM: before the time limit) sets `stop["now"]`: save at the end of the step, leave."""
    stop = {"now": False}
    signal.signal(signal.SIGTERM, lambda *_: stop.update(now=True))
    return stop


def autocast(device):
    """Mixed precision on a GPU (bf16 where it is native, else fp16 with a loss scaler); fp32 on the CPU."""
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if bf16 else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bf16)
    return lambda: torch.autocast(device.type, dtype=half, enabled=cuda), scaler
# --- end copy: distributed ---


# --- begin copy: packed images ---
def read_manifest(manifest, split, samples=None):
    """Rows of a manifest.csv whose `split` is one of the comma-separated names (or `all`), in its order.

    The index of the returned frame are the row numbers of the file, which are those of images.npy.
    """
    if not Path(manifest).is_file():
        fail(f"{manifest} does not exist; pack the dataset (data_prep/pack.py) or name another --manifest")
    try:
        table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as problem:
        fail(f"{manifest} cannot be read as CSV: {' '.join(str(problem).split())}")
    if "path" not in table:
        fail(f"{manifest} has no column 'path'; its columns are {', '.join(table.columns[:8])}")
    table.attrs["n_rows"] = len(table)
    if "split" in table and split != "all":
        kept = table[table["split"].isin(split.split(","))]
        if kept.empty:
            fail(f"{manifest} has no rows of split '{split}'; only {', '.join(sorted(set(table['split'])))}")
        table = kept
    if samples is not None and samples > len(table):
        fail(f"{manifest} has {len(table)} rows of split '{split}', fewer than samples={samples}")
    return table if samples is None else table.iloc[:samples]


class ImageSource:
    """Images of manifest rows as uint8 batches on the device.

    Packed (images.npy beside the manifest): a gather, from GPU memory if it fits, else from the mapped file.
    Not packed: files are decoded by `workers` threads and may differ in size; a batch is then a list.
    """

    def __init__(self, manifest, rows, in_chans, device, workers=4):
        folder, self.rows = Path(manifest).parent, rows.index.to_numpy()
        self.in_chans, self.device = in_chans, device
        self.pool, self.ahead = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        self.packed = None
        if (folder / "images.npy").is_file():
            try:
                self.packed = np.lib.format.open_memmap(folder / "images.npy", mode="r")
            except (ValueError, EOFError, OSError) as problem:
                fail(f"{folder / 'images.npy'} is not a NumPy array file ({problem}); pack the dataset again")
            n_rows = rows.attrs["n_rows"]
            n, *sides = self.packed.shape
            fits = len(sides) == 2 or len(sides) == 3 and sides[2] == 3
            if self.packed.dtype != np.uint8 or n != n_rows or not fits or 0 in sides:
                fail(f"{folder / 'images.npy'} holds {self.packed.dtype} {self.packed.shape}, "
                     f"but {manifest} has {n_rows} rows; pack the dataset again")
            if device.type == "cuda" and self.packed.nbytes < torch.cuda.mem_get_info(device)[0] // 3:
                packed, self.packed = self.packed, torch.empty(
                    (len(self.rows), *self.packed.shape[1:]), dtype=torch.uint8, device=device)
                for begin in range(0, len(self.rows), 4096):                # host memory for a part at a time
                    part = slice(begin, begin + 4096)
                    self.packed[part] = torch.from_numpy(packed[self.rows[part]])
                self.rows = np.arange(len(self.rows))
        else:
            pack = folder / "pack.json"
            try:
                root = Path(json.loads(pack.read_text()).get("raw", folder)) if pack.is_file() else folder
            except (ValueError, AttributeError, TypeError):
                fail(f"{pack} was not written by pack.py; pack the dataset again")
            self.files = [root / path for path in rows["path"]]

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """indices: int64 array [B] into the selected rows -> uint8 [B, C, H, W], or a list of [C, H, W]."""
        if self.packed is None:
            images = list(self.pool.map(self.read, indices))
            channels = max(len(image) for image in images)                  # grey and colour may be mixed
            return [image.expand(channels, -1, -1).to(self.device) for image in images]
        rows = self.rows[indices]
        if isinstance(self.packed, torch.Tensor):
            images = self.packed[torch.from_numpy(rows).to(self.device, non_blocking=True)]
        else:
            order = np.argsort(rows, kind="stable")             # ascending reads from the mapped file
            images = torch.empty((len(rows), *self.packed.shape[1:]), dtype=torch.uint8)
            images.numpy()[order] = self.packed[rows[order]]
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
        return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)

    def read(self, index):
        path = self.files[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):  # convert("L") would clip at 255 instead of scaling
                    image = Image.fromarray((np.asarray(image, np.float32) / 257 + 0.5).astype(np.uint8))
                grey = image.mode in ("1", "L", "LA", "I", "F") or self.in_chans == 1
                pixels = np.array(image.convert("L" if grey else "RGB"))
        except (OSError, SyntaxError, ValueError) as problem:
            fail(f"{path} cannot be read as an image ({problem}); pack.py sorts such files out")
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)

    def prefetch(self, plans):
        """Yield each plan (a tuple beginning with indices) of a generator with its batch.

        The next plan and batch are made by a thread in the meantime.
        """
        def fetch():
            plan = next(plans, None)
            return plan, None if plan is None else self.batch(plan[0])

        waiting = self.ahead.submit(fetch)
        while True:
            plan, images = waiting.result()
            if plan is None:
                return
            waiting = self.ahead.submit(fetch)
            yield plan, images


def epoch_order(n, seed, epoch):
    """The order in which epoch `epoch` visits n images: the same in every process."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_generator(seed, step, stream=0, device="cpu"):
    """A generator made from (seed, step, stream) alone: any process count and any resume draw the same."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(2)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 ^ int(state[1]))
# --- end copy: packed images ---


# --- begin copy: label columns ---
# Columns of a manifest that are not labels.
FACTS = ["path", "patient", "study", "split", "view", "sex", "age", "race"]


def read_labels(manifest, rows, columns, uncertain="zeros", blank="zero"):
    """Label columns of manifest rows: values 0 or 1 and whether they count, float32 [N, K] each."""
    codes = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1, "": 2}
    table = np.empty((len(rows), len(columns)), np.float32)
    for place, column in enumerate(columns):
        code = rows[column].map(codes)
        for row in rows.index[code.isna()][:1]:
            fail(f"{manifest} row {row + 2}: label '{column}' is '{rows[column][row]}'; "
                 "expected 1, 0, -1 or blank")
        table[:, place] = code
    known = ~((table == -1) & (uncertain == "ignore") | (table == 2) & (blank == "ignore"))
    values = (table == 1) | (table == -1) & (uncertain == "ones")
    return values.astype(np.float32), known.astype(np.float32)
# --- end copy: label columns ---


# --- begin copy: resize ---
def resize(images, size):
    """Stretch uint8 [B, C, H, W], or a list of [C, H, W], to float [B, C, size, size] (Pillow's bilinear)."""
    if isinstance(images, list):
        return torch.cat([resize(image[None], size) for image in images])
    if images.shape[2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
# --- end copy: resize ---


# --- begin copy: normalise ---
def normalise(x, config):
    """Pixels 0-255 [B, 1 or 3, H, W] to the network's input [B, in_chans, H, W]; grey images are repeated."""
    mean, std = (torch.tensor(config[key], dtype=x.dtype).to(x.device, non_blocking=True).view(1, -1, 1, 1)
                 for key in ("mean", "std"))
    if x.shape[1] > config["in_chans"]:
        grey = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).to(x.device, non_blocking=True)
        x = (x * grey.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return torch.addcmul(-mean / std, x, 1 / (255 * std))    # in one pass; a grey channel broadcasts to three
# --- end copy: normalise ---


# --- begin copy: model ---
def make_model(facts, num_classes, drop_path=None):
    """The timm model that a row or a checkpoint describes; transformers are made for its image size."""
    arch, kwargs = facts["arch"], dict(facts["model_args"])
    card = timm.get_pretrained_cfg(arch)
    if card and card.fixed_input_size:
        kwargs.setdefault("img_size", facts["img_size"])
    try:
        return timm.create_model(arch, in_chans=facts["in_chans"], num_classes=num_classes,
                                 drop_path_rate=drop_path, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
        fail(f"timm cannot make {arch} with {kwargs}: {' '.join(str(problem).split())[:200]}")
# --- end copy: model ---


# --- begin copy: forward all ---
@torch.inference_mode()
def forward_all(forward, source, n_outputs, batch, rank, world_size):
    """Outputs of all images of a source, float32 [N, n_outputs] on the CPU of every process.

    Batch b is done by process b mod world_size: an image stands in the same batch with any number of
    processes, counts once, and gets the same bits. forward: images of a batch -> [B, n_outputs].
    """
    outputs = torch.zeros(len(source), n_outputs)
    begins = range(rank * batch, len(source), world_size * batch)
    plans = ((np.arange(begin, min(begin + batch, len(source))), begin) for begin in begins)
    for (chosen, begin), images in source.prefetch(plans):
        outputs[begin:begin + len(chosen)] = forward(images).float().cpu()
    if world_size > 1:
        dist.all_reduce(outputs)                    # the others hold zeros in these rows: an exact sum
    return outputs
# --- end copy: forward all ---


def load_classifier(file, device):
    """The network of a classifier.pt, ready to predict, and the facts that lie beside its weights."""
    try:
        facts = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{file} does not exist; finetune/classify.py writes it")
    except Exception as problem:                        # whatever a broken or hostile file raises
        fail(f"{file} is not a plain tensor checkpoint ({' '.join(str(problem).split())[:120]})")
    kinds = dict(model=dict, arch=str, model_args=dict, in_chans=int, img_size=int, mean=list, std=list,
                 labels=list)
    facts = facts if isinstance(facts, dict) else {}
    absent = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    if absent:
        fail(f"{file} is no classifier, it has no '{absent[0]}'; give a classifier.pt of classify.py")
    for key in ("mean", "std"):
        if len(facts[key]) != facts["in_chans"]:
            fail(f"{file} has {len(facts[key])} values of {key} for {facts['in_chans']} channels")
    model = make_model(facts, len(facts["labels"]))
    try:
        model.load_state_dict(facts["model"])
    except RuntimeError as problem:
        fail(f"{file} does not fit {facts['arch']}: {' '.join(str(problem).split())[:200]}")
    return model.to(device, memory_format=torch.channels_last).eval(), facts


def views(images, size, crops):
    """Test views of a batch, each float [B, C, size, size]: the whole image, or ten crops of a larger one."""
    if crops == 1:
        return [resize(images, size)]
    x = resize(images, round(size * 256 / 224))
    edge = x.shape[2] - size
    corners = ((0, 0), (0, edge), (edge, 0), (edge, edge), (round(edge / 2), round(edge / 2)))
    return [side[:, :, top:top + size, left:left + size] for side in (x, x.flip(3)) for top, left in corners]


def probabilities(model, images, facts, crops):
    """Mean over the test views of the sigmoid of the logits, float64 [B, K]."""
    inputs = (normalise(view, facts).contiguous(memory_format=torch.channels_last)
              for view in views(images, facts["img_size"], crops))
    return torch.stack([model(x).double().sigmoid() for x in inputs]).mean(0)


def plain(label):
    """A label without case, spaces and underscores, under its usual name."""
    letters = re.sub(r"[\W_]", "", label).lower()
    return SPELLINGS.get(letters, letters)


def columns_of(label, columns):
    """The columns that mean a label; atelectasis is any that contains the word (PadChest has five kinds)."""
    if plain(label) == "atelectasis":
        return [column for column in columns if "atelectasis" in column.lower()]
    return [column for column in columns if plain(column) == plain(label)]


def truth(manifest, rows, labels):
    """{label: 0 or 1 for every row} of the labels that a manifest knows."""
    found = {label: columns_of(label, [column for column in rows if column not in FACTS]) for label in labels}
    return {label: read_labels(manifest, rows, columns)[0].max(1).astype(np.int8)
            for label, columns in found.items() if columns}


def is_dicom(file):
    """A DICOM file by its suffix or by the mark behind its preamble."""
    if file.suffix.lower() in (".dcm", ".dicom"):
        return True
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_dicom(file):
    """A DICOM image as displayed: VOI LUT, window or 0.5-99.5 percentiles, MONOCHROME1 inverted; uint8."""
    import pydicom                                      # loads slowly, and only folders have such files
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    ds = pydicom.dcmread(file, force=True)
    stored = ds.pixel_array
    if stored.ndim != 2 or not ds.PhotometricInterpretation.startswith("MONOCHROME"):
        raise ValueError(f"DICOM {ds.PhotometricInterpretation} of shape {stored.shape}, not one grey image")
    padded = np.zeros(stored.shape, bool)
    if ds.get("PixelPaddingValue") is not None:
        ends = ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
        padded = (stored >= min(ends)) & (stored <= max(ends))
    values = apply_modality_lut(stored, ds)
    if ds.get("VOILUTSequence"):
        shown, black, white = apply_voi_lut(values, ds), 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif None not in (ds.get("WindowCenter"), ds.get("WindowWidth")):
        shown = apply_voi_lut(values, ds)
        black, white = apply_voi_lut(np.array([-np.inf, np.inf]), ds)       # either side of the window
    else:
        shown, (black, white) = values, np.percentile(values[~padded], (0.5, 99.5))
    grey = np.rint(np.clip((shown - float(black)) / max(white - black, 1), 0, 1) * 255).astype(np.uint8)
    grey = 255 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey
    grey[padded] = 0
    return grey


class FolderSource(ImageSource):
    """The image files below a folder, stretched to one size as data_prep/pack.py does it."""

    def __init__(self, folder, size, in_chans, device, workers):
        if not Path(folder).is_dir():
            fail(f"--images {folder} is not a folder")
        self.files = sorted(file for file in Path(folder).rglob("*") if file.is_file() and (
            file.suffix.lower() in SUFFIXES or is_dicom(file)))
        if not self.files:
            fail(f"--images {folder} holds no image files ({', '.join(SUFFIXES)})")
        self.rows, self.packed, self.size = np.arange(len(self.files)), None, size
        self.in_chans, self.device = in_chans, device
        self.pool, self.ahead = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)

    def read(self, index):
        if is_dicom(self.files[index]):
            try:
                image = Image.fromarray(read_dicom(self.files[index]))
            except Exception as problem:                # pydicom and its decoders raise what they like
                reason = " ".join(str(problem).split())[:200]
                fail(f"{self.files[index]} cannot be read as an image ({reason}); take it out of the folder")
        else:
            pixels = super().read(index)
            image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1)


def write_csv(table, file):
    """Write predictions under a temporary name, which other runs cannot write at the same time; flush, rename."""
    part = Path(f"{file}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a", encoding="utf-8", newline="") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.truncate(0)                          # of a run that was killed
            table.to_csv(stream, index=False, float_format="%.8g", lineterminator="\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BlockingIOError:
        fail(f"{file} is being written by another run; wait for it or choose another --out")
    except OSError as problem:
        if part.is_file():
            part.unlink()
        fail(f"cannot write {file}: {problem.strerror}; choose another --out")


def predict(model, facts, source, rows, known, file, args, rank, world_size):
    """Predict one test set and write its file; rows: path and patient of the images of `source`."""
    begun = time.monotonic()
    table = forward_all(lambda images: probabilities(model, images, facts, args.test_crops), source,
                        len(facts["labels"]), args.batch, rank, world_size).numpy()
    if rank > 0:
        return
    labels = list(known) or facts["labels"]
    columns = {"path": rows["path"], "patient": rows.get("patient", pd.Series("", rows.index))}
    columns |= {f"true_{label}": values for label, values in known.items()}
    columns |= {f"prob_{label}": table[:, facts["labels"].index(label)] for label in labels}
    write_csv(pd.DataFrame(columns), file)
    print(f"{file}: {len(rows):,} images, {len(known)} of {len(facts['labels'])} labels with truth, "
          f"{len(rows) / (time.monotonic() - begun):,.0f} img/s", flush=True)


def main():
    args = options()
    sets = [(args.out, args.manifest, args.split)]
    if args.set:
        parts = [re.fullmatch(r"(?P<name>[^=/]+)=(?P<file>.+):(?P<split>[^:]+)", text) for text in args.set]
        for text, part in zip(args.set, parts):
            if part is None:
                fail(f"--set {text}; expected NAME=FILE:SPLIT such as nih_test=data/nih/manifest.csv:test")
        sets = [(Path(args.out) / f"{part['name']}.csv", part["file"], part["split"]) for part in parts]

    rank, world_size, device = init_distributed(args.device)
    try:
        model, facts = load_classifier(args.checkpoint, device)
        for file, manifest, split in sets:
            if args.images:
                source = FolderSource(args.images, facts["img_size"], facts["in_chans"], device, args.workers)
                known = {}
                paths = [path.relative_to(args.images).as_posix() for path in source.files]
                rows = pd.DataFrame({"path": paths})
            else:
                rows = read_manifest(manifest, split)
                known = truth(manifest, rows, facts["labels"])
                source = ImageSource(manifest, rows, facts["in_chans"], device, args.workers)
            predict(model, facts, source, rows, known, file, args, rank, world_size)
    except torch.cuda.OutOfMemoryError:
        fail(f"GPU memory is too small for {args.batch} images a pass; try --batch {max(1, args.batch // 2)}")
    except RuntimeError as problem:
        end_if_peer_died(problem, rank)
    finally:
        leave()


if __name__ == "__main__":
    main()
