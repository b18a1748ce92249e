"""On a GPU: every training script and the prediction against themselves on the CPU, and what only a GPU has.

Skipped where there is none. CUDA_TESTS_ON=cpu runs the same tests on the CPU instead, to exercise the tests, and
CUDA_TESTS_ON=emulated those in single precision on the device of emulated_gpu.py.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, blobs, load_script, log_of, run_here, write_pack
from torch import distributed as dist

DEVICE = os.environ.get("CUDA_TESTS_ON", "cuda")
if DEVICE == "emulated":
    import emulated_gpu
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU")
not_emulated = pytest.mark.skipif(DEVICE == "emulated", reason="needs more than the emulated device has")

MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
SCRIPTS = {                         # the script and flags that make it small
    "gmml": ["pretrain/gmml.py", "--lr", 0.2],          # slower, six steps change its loss by less than 1e-4
    "sit": ["pretrain/sit.py", "--hidden_dim", 64, "--out_dim", 32],
    "dino": ["pretrain/dino.py", "--hidden_dim", 64, "--out_dim", 64, "--bottleneck_dim", 32],
    "moco_v3": ["pretrain/moco_v3.py", "--hidden_dim", 64, "--out_dim", 32],
    "simmim": ["pretrain/simmim.py", "--mask_unit", 8],
    "supervised": ["pretrain/supervised.py", "--val_samples", 0],
    "classify": ["finetune/classify.py", "--seeds", 0],
}
CASES = {                           # how six steps are done: (device, last step) of each leg, flags
    "whole": ([(DEVICE, 6)], []),
    "resumed": ([(DEVICE, 3), (DEVICE, 6)], []),
    "from the CPU and back": ([("cpu", 2), (DEVICE, 4), ("cpu", 6)], []),
    "micro-batches": ([(DEVICE, 6)], ["--micro-batch", 4]),
    "mapped": ([(DEVICE, 6)], []),
}
every_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A pack of 192 images to train on and 16 to validate and predict, with two labels."""
    rng, split = np.random.default_rng(0), ["train"] * 192 + ["val"] * 16
    labels = {label: rng.integers(0, 2, 208) for label in "AB"}
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(208), split=split, patient=range(208), **labels)


@pytest.fixture
def same_numbers(monkeypatch):
    """Convolutions without TF32, and normal deviates of the CPU: its generator and a GPU's differ."""
    drawn = torch.randn
    def on_cpu(*shape, generator=None, device=None):
        if generator is not None:
            generator = torch.Generator().manual_seed(generator.initial_seed())
        return drawn(*shape, generator=generator).to(device)
    monkeypatch.setattr(torch, "randn", on_cpu)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def run_on(device, script, monkeypatch, *flags):
    """Run a script in this process on a device; its --device does not know the emulated one."""
    module = load_script(script)
    options = module.options

    def emulated(*section):
        found = options(*section)
        args = found[0] if section else found
        args.device = emulated_gpu.DEVICE
        return found
    with monkeypatch.context() as patch:
        if device == "emulated":
            patch.setattr(module, "options", emulated)
        run_here(module, monkeypatch, "--device", "cpu" if device == "emulated" else device, *flags)


@pytest.fixture
def train(manifest, monkeypatch):
    """A function: a script's steps on a device, in a precision; the losses of all its steps."""
    # a scaler begins with 65,536 and skips steps until it fits, for DINO below 256; 1 fits at once
    def run(name, out, device, steps, *flags, dtype=torch.float32):
        script, *small = SCRIPTS[name]
        module = load_script(script)
        half = dtype != torch.float32 and DEVICE != "emulated"      # it has no rules of autocast
        precision = lambda device: (torch.autocast(device.type, dtype if half else None, enabled=half),
                                    torch.amp.GradScaler(device.type, 1.0, enabled=dtype == torch.float16))
        monkeypatch.setattr(module, "mixed_precision", precision)
        source = ["--train"] if name == "classify" else ["--split", "train", "--manifest"]
        turn = ["--rotation", 0] if name in ("supervised", "classify") else []      # nearest pixels flip
        run_on(device, script, monkeypatch, *source, manifest, "--out", out, "--steps", steps,
               "--model_args", json.dumps(MODEL), "--batch", 12, "--epochs", 2, "--warmup_epochs", 0,
               "--lr", 1e-3, "--log-steps", 1, "--save-minutes", 100, *turn, *small, *flags)
        return [line["loss"] for line in log_of(out / "seed0" if name == "classify" else out)]
    return run


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """A function: the losses of six steps on the CPU in single precision, computed once."""
    known = {}

    def losses(name, train, *flags):
        if (name, flags) not in known:
            known[name, flags] = train(name, tmp_path_factory.mktemp(name) / "run", "cpu", 6, *flags)
        return known[name, flags]
    return losses


@every_script
@pytest.mark.parametrize("case", CASES)
def test_six_steps_have_the_losses_of_the_cpu(name, case, train, on_cpu, same_numbers, monkeypatch, tmp_path):
    expected, (legs, flags) = on_cpu(name, train), CASES[case]
    if case == "mapped":                                # no room in GPU memory
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    for device, steps in legs:
        losses = train(name, tmp_path / "run", device, steps, *flags)
    assert len(losses) == 6 and losses == pytest.approx(expected, rel=1e-4)
    [last] = (tmp_path / "run").rglob("last.pt")
    optimizer = torch.load(last, map_location="cpu", weights_only=True)["optimizer"]
    assert {part["step"].item() for part in optimizer["state"].values()} == {6}


@not_emulated
@every_script
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_within_two_per_cent(name, dtype, train, on_cpu, same_numbers, tmp_path):
    slow = ["--lr", 1e-4]                               # ten times faster MoCo's few negatives are 3 % apart
    losses = train(name, tmp_path / "run", DEVICE, 6, *slow, dtype=dtype)
    assert len(losses) == 6 and losses == pytest.approx(on_cpu(name, train, *slow), rel=0.02)


@pytest.mark.skipif(DEVICE != "cuda", reason="a scaler for a GPU is off where there is none")
@pytest.mark.parametrize("name", SCRIPTS)
def test_fp16_is_scaled_and_only_where_bf16_is_not_native(name, monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        amp, scaler = load_script(SCRIPTS[name][0]).mixed_precision(torch.device(DEVICE))
        assert amp.fast_dtype == dtype and scaler.is_enabled() == (not native)


@every_script
def test_no_step_waits_for_the_gpu(name, train, monkeypatch, tmp_path):
    """Of 14 steps ten, after two that set up: the function that asks for SIGTERM is called once a step."""
    calls = []

    def watch():
        calls.append(len(calls) + 1)
        if DEVICE != "cpu" and calls[-1] in (2, 12):
            torch.cuda.set_sync_debug_mode("error" if calls[-1] == 2 else "default")
        return False
    monkeypatch.setattr(load_script(SCRIPTS[name][0]), "catch_sigterm", lambda: watch)
    try:
        train(name, tmp_path / "run", DEVICE, 14, "--log-steps", 100, dtype=torch.bfloat16)
    finally:
        if DEVICE != "cpu":
            torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 14


@every_script
def test_a_share_of_two_processes_runs_under_nccl(name, train, monkeypatch, tmp_path):
    """As one GPU holds one process of NCCL, process 0 of two computes and sums with itself alone."""
    module, device = load_script(SCRIPTS[name][0]), torch.device(f"{DEVICE}:0")
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(module, "init_processes", lambda _: (0, 2, device))
    try:
        losses = train(name, tmp_path / "run", DEVICE, 3, "--micro-batch", 3, dtype=torch.bfloat16)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(losses) == 3 and np.isfinite(losses).all()


@not_emulated
def test_torchrun_starts_one_process(manifest, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    flags = ["--manifest", manifest, "--split", "train", "--out", tmp_path / "run", "--device", DEVICE,
             "--steps", 2, "--model_args", json.dumps(MODEL), "--batch", 12]
    command += map(str, [ROOT / "pretrain/gmml.py", *flags])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "run/backbone.pt").is_file(), done.stderr


@pytest.mark.parametrize("crops", [1, 10])
def test_predictions_are_those_of_the_cpu(crops, train, manifest, monkeypatch, tmp_path):
    train("classify", tmp_path / "run", DEVICE, 6)
    for device in ("cpu", DEVICE, "mapped"):
        if device == "mapped":
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
        run_on(DEVICE if device == "mapped" else device, "evaluate/predict.py", monkeypatch,
               "--manifest", manifest, "--split", "val", "--batch", 6, "--test-crops", crops,
               "--checkpoint", tmp_path / "run/seed0/classifier.pt", "--out", tmp_path / f"{device}.csv")
    cpu, gpu, mapped = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("cpu", DEVICE, "mapped"))
    assert len(cpu) == 16 and cpu["prob_A"].nunique() == 16
    np.testing.assert_allclose(gpu[["prob_A", "prob_B"]], cpu[["prob_A", "prob_B"]], rtol=1e-4)
    pd.testing.assert_frame_equal(gpu, mapped)
