"""What all training scripts do alike, seen from command line, files, exit codes and checkpoints alone.

KILLS (default 2): how often each script is killed, as in KILLS=20 bash tests/run.sh tests/test_training.py
"""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import (
    ROOT, Run, assert_user_error, blobs, fork_script, load_script, log_of, run_here, write_pack)
from PIL import Image

KILLS = int(os.environ.get("KILLS", 2))
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SCRIPTS = {                         # the script and flags that make it small
    "gmml": ["pretrain/gmml.py"],
    "sit": ["pretrain/sit.py", "--hidden_dim", 32, "--out_dim", 16],
    "dino": ["pretrain/dino.py", "--hidden_dim", 32, "--out_dim", 16, "--bottleneck_dim", 16,
             "--n_local_crops", 2],
    "moco_v3": ["pretrain/moco_v3.py", "--hidden_dim", 32, "--out_dim", 16],
    "simmim": ["pretrain/simmim.py", "--mask_unit", 8],
    "supervised": ["pretrain/supervised.py", "--val_epochs", 1],
    "classify": ["finetune/classify.py"],
}
TERMS = {                           # of a line of the log, beside step, epoch, loss, lr, img_per_s and time
    "gmml": {"wd"},
    "sit": {"wd", "contrast", "recon", "feature_std"},
    "dino": {"wd", "entropy", "batch_entropy", "feature_std", "teacher_temp"},
    "moco_v3": {"ema", "entropy", "accuracy", "feature_std"},
    "simmim": {"wd"},
    "supervised": {"wd"},
    "classify": set(),
}
PICTURES = {"gmml": "recon", "sit": "recon", "simmim": "recon", "dino": "attention"}
NO_GRADIENT = {                     # biases that a batch norm takes up: in the head, in the norm before it
    "sit": r"cls_head\.\d\.bias|cls_head\.\d\.running_mean|backbone\.norm\.bias",
    "moco_v3": r"backbone\.norm\.bias|running_mean",
}
every_script = pytest.mark.parametrize("name", SCRIPTS)


def command(name, data, out, *flags):
    """Script and arguments of a run: 4 epochs of 2 steps, each logged and saved, unless flags differ."""
    script, *own = SCRIPTS[name]
    manifest = ["--train" if name == "classify" else "--manifest", f"{data}/manifest.csv"]
    seeds = [] if "--seed" in flags or name != "classify" else ["--seeds", 0]
    flags = [{"--seed": "--seeds"}.get(word, word) if name == "classify" else word for word in flags]
    pictures = ["--picture-epochs", 2] if name in PICTURES else []
    return [script, *manifest, "--out", out, "--model_args", json.dumps(MODEL), "--device", "cpu",
            "--batch", 12, "--epochs", 4, "--warmup_epochs", 1, "--log-steps", 1, "--save-minutes", 0,
            *pictures, *seeds, *own, *flags]


def run(name, data, out, *flags, **kwargs):
    """A run to its end, forked: its CompletedProcess."""
    script, *args = command(name, data, out, *flags)
    return fork_script(script, *args, **kwargs)


def begin(name, data, out, *flags, **kwargs):
    """A run that has logged three steps and goes on."""
    script, *args = command(name, data, out, *flags)
    started = Run(script, args, **kwargs)
    log = folder(name, out) / "log.jsonl"
    started.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    return started


def folder(name, out):
    """Where a run writes its checkpoints."""
    return out / "seed0" if name == "classify" else out


def exported(name, out):
    return folder(name, out) / ("classifier.pt" if name == "classify" else "backbone.pt")


def steps_of(name, out):
    """Step numbers of the training lines of the log."""
    return [line["step"] for line in log_of(folder(name, out)) if "lr" in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A pack of 24 images to pre-train on, 24 to train and 16 to validate on, with unsorted labels."""
    place, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = {name: rng.integers(0, 2, 64) for name in "AB"}
    split = ["pretrain"] * 24 + ["train"] * 24 + ["val"] * 16
    write_pack(place, blobs(64), split=split, patient=[f"p{i // 2}" for i in range(64)], **labels)
    return place


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """The same as PNG files beside their manifest, not packed."""
    place = tmp_path_factory.mktemp("files")
    shutil.copy(data / "manifest.csv", place)
    for i, image in enumerate(blobs(64)):
        Image.fromarray(image).save(place / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A function: the undisturbed run of a script, as (folder, its result, seconds); each is made once."""
    made = {}
    run("gmml", data, None, "--help")                   # starts the server of forks, which takes seconds

    def undisturbed(name, log_steps=1):
        if (name, log_steps) not in made:
            out, begun = tmp_path_factory.mktemp(name) / "run", time.monotonic()
            result = run(name, data, out, "--log-steps", log_steps)
            assert result.returncode == 0, result.stderr
            made[name, log_steps] = out, result, time.monotonic() - begun
        return made[name, log_steps]
    return undisturbed


# Comparisons

def plain(value):
    """The content of a checkpoint in comparable form, tensors as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def content(place):
    """{file name: what a rerun has to reproduce}: bytes, but of logs no times."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.name == "log.jsonl":
            lines = log_of(path.parent)
            value = [{key: cell for key, cell in line.items() if key not in ("time", "img_per_s")}
                     for line in lines]
        elif path.name == "last.pt":
            value = plain(torch.load(path, weights_only=True))
        found[str(path.relative_to(place))] = value
    return found


def assert_same(place, expected):
    found = content(place)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


def tensors(value, path=""):
    """{path: tensor} of the floating-point tensors of a checkpoint."""
    if isinstance(value, torch.Tensor):
        return {path: value} if value.is_floating_point() else {}
    parts = value.items() if isinstance(value, dict) else []
    return {name: tensor for key, part in parts for name, tensor in tensors(part, f"{path}{key}.").items()}


def assert_close(name, one, two, atol=1e-5):
    """Weights of two runs, but for biases without a gradient: of the noise left there Adam makes whole steps.

    These are key biases, under softmax, and those of NO_GRADIENT.
    """
    one, two = (torch.load(folder(name, out) / "last.pt", weights_only=True) for out in (one, two))
    assert one["step"] == two["step"]
    one, two = ({key: tensor for key, tensor in tensors(part).items() if not key.startswith("optimizer")}
                for part in (one, two))
    assert one.keys() == two.keys() and len(one) > 20
    for key, value in one.items():
        if re.search(NO_GRADIENT.get(name, "^$"), key):
            continue
        difference = (value - two[key]).abs()
        if key.endswith("qkv.bias."):
            difference = difference.view(3, -1)[[0, 2]]
        assert difference.max() <= atol, f"{key}: {difference.max():.2g}"


# Killed, stopped, restarted

@every_script
def test_killed_at_random_moments_it_ends_in_the_same_bytes(name, data, whole, tmp_path):
    """Saved at every step, also between two lines of the log, whose means go on."""
    out, _, seconds = whole(name, 3)
    expected, rng, kills = content(out), np.random.default_rng(zlib.crc32(name.encode())), 0
    assert not [path for path in expected if path.endswith(".part")]
    script, *args = command(name, data, tmp_path / "cut", "--log-steps", 3)
    while kills < KILLS:
        cut = Run(script, args)
        cut.process.join(rng.uniform(0, seconds))
        cut.kill()
        code = cut.result().returncode
        if code == 0:                                   # faster than the shot: check, begin anew
            assert_same(tmp_path / "cut", expected)
            shutil.rmtree(tmp_path / "cut")
        else:
            assert code == -signal.SIGKILL, cut.said("stderr")
            kills += 1
    assert run(name, data, tmp_path / "cut", "--log-steps", 3).returncode == 0
    assert_same(tmp_path / "cut", expected)


@every_script
def test_sigterm_for_one_of_two_processes_saves_and_one_process_goes_on(name, data, tmp_path):
    long = ["--epochs", 500, "--lr", 0.01, "--save-minutes", 60]            # some more than five steps, as it comes
    cut = begin(name, data, tmp_path / "cut", *long, nproc=2)
    os.kill(cut.workers()[1], signal.SIGTERM)
    result = cut.result(30)
    assert result.returncode == 75 and not re.search("^error|Traceback", result.stderr, re.M), result
    step = torch.load(folder(name, tmp_path / "cut") / "last.pt", weights_only=True)["step"]
    assert steps_of(name, tmp_path / "cut") == list(range(1, step + 1)) and step >= 3
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("backbone.pt"))
    for out in ("cut", "whole"):
        assert run(name, data, tmp_path / out, *long, "--steps", step + 2).returncode == 0
    assert steps_of(name, tmp_path / "cut") == list(range(1, step + 3))
    assert_close(name, tmp_path / "whole", tmp_path / "cut")


@every_script
def test_processes_whose_launcher_is_killed_end_soon(name, data, tmp_path):
    cut = begin(name, data, tmp_path, "--epochs", 5000, nproc=2)
    workers = cut.workers()
    os.kill(cut.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end, "orphans go on training"
        time.sleep(0.01)
    steps = steps_of(name, tmp_path)
    assert run(name, data, tmp_path, "--epochs", 5000, "--steps", steps[-1] + 1).returncode == 0
    assert steps_of(name, tmp_path) == [*steps, steps[-1] + 1]


def alive(pid):
    """Whether a process runs; one that waits to be collected does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_torchrun_restarts_from_the_checkpoint_and_its_workers_end_with_it(data, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              "--max-restarts=2"]
    script, *args = map(str, command("gmml", data, tmp_path / "run", "--epochs", 5000))
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen([*launch, ROOT / script, *args], stdout=log, stderr=log,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
    children = f"/proc/{agent.pid}/task/{agent.pid}/children"

    def workers():
        with open(children) as file:
            return [int(word) for word in file.read().split()]

    def steps(n):
        """Wait for n more steps; their numbers so far."""
        begun = len(steps_of("gmml", tmp_path / "run")) if (tmp_path / "run/log.jsonl").exists() else 0
        end = time.monotonic() + 60
        log = tmp_path / "run/log.jsonl"
        while not log.exists() or len(steps_of("gmml", tmp_path / "run")) < begun + n:
            assert agent.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        return steps_of("gmml", tmp_path / "run")

    try:
        steps(3)
        for choose in (min, max):                       # the process that writes, the other one
            os.kill(choose(workers()), signal.SIGKILL)
            restarts = len(re.findall(r"steps (\d+) to", (tmp_path / "log").read_text()))
            while len(begun := re.findall(r"steps (\d+) to", (tmp_path / "log").read_text())) == restarts:
                assert agent.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.05)
            assert int(begun[-1]) >= 2                  # a line of the log comes before its checkpoint
            seen = steps(3)
            assert seen == list(range(1, len(seen) + 1))
        left = workers()
        agent.kill()
        end = time.monotonic() + 20
        while any(alive(worker) for worker in left):
            assert time.monotonic() < end, "orphans go on training"
            time.sleep(0.05)
    finally:
        for worker in workers() if agent.poll() is None else []:
            os.kill(worker, signal.SIGKILL)
        agent.kill()
        agent.wait()
    assert run("gmml", data, tmp_path / "run", "--epochs", 5000, "--steps", len(seen) + 1).returncode == 0


def test_nodes_that_count_restarts_differently_find_each_other(data, tmp_path):
    """torchrun on another node restarts processes that are well without counting it: between the sums of a step."""
    script, *args = command("gmml", data, tmp_path, "--steps", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [Run(script, args, WORLD_SIZE="2", RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=str(port),
                 TORCHELASTIC_RESTART_COUNT=rank) for rank in "01"]
    try:
        assert [node.result(40).returncode for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()


@every_script
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(name, data, tmp_path):
    first = begin(name, data, tmp_path, "--epochs", 5000)
    os.kill(first.pid, signal.SIGSTOP)
    before = content(tmp_path)
    assert_user_error(run(name, data, tmp_path, "--epochs", 5000), str(folder(name, tmp_path)), "another run")
    assert content(tmp_path) == before
    first.kill()
    first.result()
    assert run(name, data, tmp_path, "--epochs", 5000, "--steps", 3).returncode == 0


@every_script
def test_a_new_beginning_is_a_new_run_and_another_configuration_is_not_resumed(name, data, whole, tmp_path):
    assert run(name, data, tmp_path, "--lr", 0.1, "--steps", 5).returncode == 0
    before = content(tmp_path)
    assert_user_error(run(name, data, tmp_path), "last.pt", "lr")
    assert_same(tmp_path, before)
    assert run(name, data, tmp_path, "--resume", "never").returncode == 0
    expected = content(whole(name)[0])
    found = content(tmp_path)
    assert not [path for path in expected if found[path] != expected[path]]
    assert run(name, data, tmp_path).returncode == 0                        # nothing is left to do
    assert_same(tmp_path, found)
    exported(name, tmp_path).unlink()
    result = run(name, data, tmp_path)
    if name == "classify":                              # last.pt holds the last epoch, not the best
        assert_user_error(result, "classifier.pt", "--resume never")
    else:
        assert result.returncode == 0
        assert_same(tmp_path, found)


def test_a_key_that_a_script_has_got_since_is_another_configuration(data, tmp_path):
    """A run of before must not go on, or be exported again, as one of the changed method."""
    assert run("gmml", data, tmp_path, "--steps", 2).returncode == 0
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    del last["config"]["clip"]
    torch.save(last, tmp_path / "last.pt")
    before = content(tmp_path)
    assert_user_error(run("gmml", data, tmp_path), "last.pt", "clip=None", "3.0")
    assert_same(tmp_path, before)


def test_a_run_in_bf16_goes_on_where_losses_are_scaled(data, tmp_path, monkeypatch):
    gmml = load_script("pretrain/gmml.py")
    monkeypatch.chdir(ROOT)
    assert run("gmml", data, tmp_path, "--steps", 3).returncode == 0        # its scaler is off and has no state
    amp = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(gmml, "mixed_precision", lambda device: (amp, torch.amp.GradScaler("cpu", 1.0)))
    _, *args = command("gmml", data, tmp_path)
    run_here(gmml, monkeypatch, *args)
    assert [line["step"] for line in log_of(tmp_path)] == [*range(1, 9)]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]["scale"] == 1.0


@pytest.mark.parametrize("words, shown", [
    ("NCCL error: Error while creating shared memory segment /dev/shm/nccl-x", True),
    ("[/gloo/transport/tcp/pair.cc:5] Timed out waiting 1800000ms for recv operation to complete", True),
    ("[/gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:3", False),
    ("[/gloo/transport/tcp/pair.cc:5] writev [127.0.0.1]:3: Broken pipe", False),
    ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely", False)])
def test_errors_of_the_network_are_shown_but_for_those_of_a_dead_peer(words, shown, monkeypatch, capsys):
    gmml, codes = load_script("pretrain/gmml.py"), []
    monkeypatch.setattr(gmml.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gmml.os, "_exit", codes.append)
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError(words)
        finally:
            gmml.end_processes()
    assert codes == [1] and (words in capsys.readouterr().err) == shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that works")
@pytest.mark.parametrize("script", ["pretrain/gmml.py", "evaluate/predict.py"])
def test_a_gpu_that_its_driver_cannot_use_is_a_mistake_and_no_reason_for_the_cpu(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    flags = ["--manifest", "m.csv"] if "gmml" in script else ["--checkpoint", "c.pt", "--manifest", "m", "--out", "o.csv"]
    with pytest.raises(SystemExit) as ended:
        run_here(load_script(script), monkeypatch, *flags)
    assert ended.value.code == 2 and "cannot use cuda" in capsys.readouterr().err


def test_what_is_sent_to_a_gpu_is_pinned(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: sent.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: sent.append((where, how)) or x)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        load_script("pretrain/gmml.py").send(torch.zeros(3), device)
    there, here = [((device,), {"non_blocking": True}) for device in (torch.device("cuda", 1), torch.device("cpu"))]
    assert sent == ["pinned", there, here]


@pytest.mark.parametrize("name", ["gmml", "sit", "dino", "simmim", "supervised"])
def test_a_clip_of_0_is_none(name, data, tmp_path):
    weights = {}
    for clip in ("0", "1e9", "1e-3"):
        assert run(name, data, tmp_path / clip, "--clip", clip, "--steps", 3).returncode == 0
        weights[clip] = plain(torch.load(exported(name, tmp_path / clip), weights_only=True)["model"])
    assert weights["0"] == weights["1e9"] != weights["1e-3"]


@every_script
def test_dropout_is_the_same_after_a_resume(name, data, tmp_path):
    dropout = ["--model_args", json.dumps({**MODEL, "proj_drop_rate": 0.2})]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert run(name, data, tmp_path / out, *dropout, "--steps", steps).returncode == 0
    whole, parts = ([log_line["loss"] for log_line in log_of(folder(name, tmp_path / out)) if "loss" in log_line]
                    for out in ("whole", "parts"))
    assert whole == parts and len(whole) >= 4


@every_script
def test_processes_that_see_different_checkpoints_are_stopped(name, data, tmp_path, monkeypatch):
    """As two nodes with a folder of their own: one finds last.pt, the other does not."""
    script, args = load_script(SCRIPTS[name][0]), (tmp_path, [data / "manifest.csv"], {"exp": None, "init": "random"}, {}, "auto", 1)
    assert script.open_run(*args) == 0
    monkeypatch.setattr(script, "sum_over_processes", lambda x: x + torch.tensor([0, 1]))
    with pytest.raises(SystemExit) as stop:
        script.open_run(*args)
    assert stop.value.code == 2


@every_script
def test_other_images_or_labels_are_not_taken_for_those_of_the_checkpoint(name, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    assert run(name, tmp_path / "data", tmp_path / "run", "--steps", 2).returncode == 0
    text = (data / "manifest.csv").read_text()
    (tmp_path / "data/manifest.csv").write_text(text[:-2] + str(1 - int(text[-2])) + "\n")
    assert_user_error(run(name, tmp_path / "data", tmp_path / "run", "--steps", 3), "last.pt", "data")
    (tmp_path / "data/manifest.csv").write_text(text)
    assert run(name, tmp_path / "data", tmp_path / "run", "--steps", 3).returncode == 0


# Processes and micro-batches

@every_script
def test_processes_and_micro_batches_do_not_change_the_weights(name, data, tmp_path):
    flags = ["--steps", 5, "--lr", 0.02] + ["--drop_path", 0.3] * (name != "moco_v3")
    micro = {"micro": dict(flags=["--micro-batch", 5])}
    runs = {"1": {}, **micro, "2": dict(nproc=2), "3": dict(nproc=3, flags=["--micro-batch", 3])}
    for place, how in runs.items():
        more = how.pop("flags", [])
        result = run(name, data, tmp_path / place, *flags, *more, **how)
        assert result.returncode == 0, result.stderr
    for place in ("micro", "2", "3"):
        assert_close(name, tmp_path / "1", tmp_path / place)
        one, two = (log_of(folder(name, tmp_path / run)) for run in ("1", place))
        assert len(one) == len(two)
        for line, other in zip(one, two):
            for key in line.keys() - {"time", "img_per_s"}:
                assert math.isclose(line[key], other[key], rel_tol=1e-4, abs_tol=1e-6), (place, key)


@every_script
def test_a_scaled_loss_makes_the_same_steps(name, data, whole, tmp_path, monkeypatch):
    """As in fp16; a power of two is taken back to the bit, before gradients are clipped."""
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    script, amp = load_script(SCRIPTS[name][0]), torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(script, "mixed_precision", lambda device: (amp, scaler))
    assert run_inside(name, data, tmp_path, monkeypatch, "--steps", 4) == 0
    losses, wanted = ([line["loss"] for line in log_of(folder(name, out)) if "lr" in line][:4]
                      for out in (tmp_path, whole(name)[0]))
    assert losses == wanted and len(losses) == 4


@every_script
def test_the_network_sees_a_micro_batch_at_a_time(name, data, tmp_path, monkeypatch):
    embed, sizes = timm.layers.PatchEmbed.forward, []
    monkeypatch.setattr(timm.layers.PatchEmbed, "forward", lambda self, x: sizes.append(len(x)) or embed(self, x))
    assert run_inside(name, data, tmp_path, monkeypatch, "--steps", 1, "--micro-batch", 3) == 0
    assert sizes[0] in (3, 6)           # one view of each image, or two at once; of the whole batch: 12, 24


@every_script
def test_processes_with_one_image_each_are_one_with_two(name, data, tmp_path):
    for out, nproc in (("one", 1), ("two", 2)):
        result = run(name, data, tmp_path / out, "--batch", 2, "--steps", 2, nproc=nproc)
        assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in log_of(folder(name, tmp_path / out))] for out in ("one", "two")]
    assert np.allclose(*losses, rtol=1e-4), losses


@every_script
def test_a_compiled_network_is_the_same_network(name, data, whole, tmp_path, monkeypatch):
    """Traced and run by default operators; what a compiler makes of them is slow on CPUs."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="eager"))
    script, *args = command(name, data, tmp_path, "--compile")
    run_here(load_script(script), monkeypatch, *args)
    assert_close(name, whole(name)[0], tmp_path)


@every_script
def test_a_mistake_that_one_of_the_processes_finds_ends_all_with_its_sentence(name, files, tmp_path):
    shutil.copytree(files, tmp_path / "files")
    bad = 30 if name == "classify" else 5
    (tmp_path / f"files/{bad}.png").write_text("no picture")
    result = run(name, tmp_path / "files", tmp_path / "run", nproc=2, timeout=60)
    assert result.returncode in (1, 2), result              # 1: the other, whose peer is gone, was first
    errors = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and f"{bad}.png" in errors.pop(), result.stderr


# Numbers that are none, memory, disk

@every_script
def test_a_run_that_diverges_names_the_last_good_checkpoint_and_saves_nothing_bad(name, data, tmp_path):
    assert run(name, data, tmp_path, "--lr", 1e30, "--steps", 1).returncode == 0        # its rate is 0
    result = run(name, data, tmp_path, "--lr", 1e30)
    place = folder(name, tmp_path)
    assert_user_error(result, f"{place}/last.pt", "NaN")
    assert torch.load(place / "last.pt", weights_only=True)["step"] < 8
    for file in tmp_path.rglob("*.pt"):
        saved = tensors(torch.load(file, weights_only=True))
        assert all(value.isfinite().all() for value in saved.values()), file
    assert all(math.isfinite(line["loss"]) for line in log_of(place) if "loss" in line)


@contextlib.contextmanager
def disk_full(size):
    """No file of this process can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_inside(name, data, out, monkeypatch, *flags):
    """A run in this process, its exit code."""
    script, *args = command(name, data, out, *flags)
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_here(load_script(script), monkeypatch, *args)
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


@every_script
def test_a_batch_that_the_images_or_the_processes_do_not_allow_is_refused(
        name, data, tmp_path, monkeypatch, capsys):
    """With no step to make, the initial weights would be exported as if trained."""
    script = load_script(SCRIPTS[name][0])
    for processes, *flags in ((1, "--batch", 25), (1, "--batch", 0), (1, "--epochs", 0), (5, "--batch", 12)):
        monkeypatch.setattr(script, "init_processes", lambda device: (0, processes, torch.device("cpu")))
        assert run_inside(name, data, tmp_path / "run", monkeypatch, *flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        batch = 12 if "--epochs" in flags else flags[1]
        assert f"--batch {batch}" in error and "24 images" in error and f", {processes};" in error, flags
    assert not [*(tmp_path / "run").rglob("*.pt")]


@every_script
def test_a_full_disk_is_one_sentence_with_the_path_and_loses_nothing(
        name, data, whole, tmp_path, monkeypatch, capsys):
    assert run(name, data, tmp_path, "--steps", 4).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    for size in (0, 100, 1000, 30000):                  # each stops another file
        with disk_full(size):
            code = run_inside(name, data, tmp_path, monkeypatch)
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and error.startswith("error: ") and str(tmp_path) in error, (size, error)
        assert all(path.read_bytes() == saved for path, saved in before.items())
    assert run_inside(name, data, tmp_path, monkeypatch) == 0
    assert content(tmp_path) == {**content(tmp_path), **content(whole(name)[0])}


@every_script
def test_a_gpu_that_is_too_small_is_told_the_micro_batch_that_may_fit(
        name, data, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    for optimizer in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam):
        monkeypatch.setattr(optimizer, "step", full)
    assert run_inside(name, data, tmp_path, monkeypatch) == 2
    assert "--micro-batch 6" in capsys.readouterr().err.splitlines()[-1]


# What is written

@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "classify"])
def test_without_paths_a_run_reads_its_rows_dataset_and_writes_into_its_rows_folder(name, monkeypatch):
    script, seen = load_script(SCRIPTS[name][0]), []
    monkeypatch.setattr(script, "train", lambda config, args, *_: seen.append((args.manifest, args.out)))
    run_here(script, monkeypatch, "--data", "packs", "--dataset", "mine")
    table = yaml.safe_load((ROOT / "experiments.yaml").read_text())
    rows = {exp: row["pretrain"]["dataset"] for exp, row in table.items()
            if row.get("pretrain", {}).get("strategy") == name and "dataset" in row["pretrain"]}
    for exp in rows:
        run_here(script, monkeypatch, "--exp", exp)
    assert seen == [("packs/mine/manifest.csv", f"runs/{name}"),
                    *((f"data/{dataset}/manifest.csv", f"runs/{exp}/pretrain") for exp, dataset in rows.items())]
    assert len(seen) > 1


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "classify"])
def test_the_state_is_saved_after_so_many_minutes_and_not_at_every_step(name, data, tmp_path, monkeypatch):
    script, minutes, steps = load_script(SCRIPTS[name][0]), [0], []

    def a_minute_later():
        minutes[0] += 1
        return False                                                        # nobody asks to stop
    monkeypatch.setattr(script, "catch_sigterm", lambda: a_minute_later)
    clock = SimpleNamespace(monotonic=lambda: 60 * minutes[0], time=time.time)
    monkeypatch.setattr(script, "time", clock)
    monkeypatch.setattr(script, "save_run", lambda out, step, *_, **__: steps.append(step))
    assert run_inside(name, data, tmp_path, monkeypatch, "--steps", 5, "--save-minutes", 2.5) == 0
    assert steps == [3, 5]


@every_script
def test_the_log_the_terminal_and_the_pictures_of_a_run(name, whole):
    out, result, _ = whole(name)
    lines = log_of(folder(name, out))
    training = [line for line in lines if "lr" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert [line["epoch"] for line in training] == [1, 1, 2, 2, 3, 3, 4, 4]
    keys = {"step", "epoch", "loss", "lr", "img_per_s", "time"} | TERMS[name]
    assert all({key for key in line if not key.startswith("val_")} == keys for line in training)
    if name in ("supervised", "classify"):
        assert [line["epoch"] for line in lines if "val_auc" in line] == [1, 2, 3, 4]
    said = [line for line in result.stdout.splitlines() if "eta" in line]
    line_of_terminal = re.compile(r"step.*loss.*lr.*eta (\d+ d )?\d+:\d\d:\d\d")
    assert len(said) == 8 and all(line_of_terminal.search(line) for line in said)
    assert all("img" in line for line in said) and "\r" not in result.stdout
    assert f"wrote {exported(name, out)}" in result.stdout.splitlines()
    pictures = sorted(path.name for path in out.glob("*.png"))
    if name in PICTURES:
        assert pictures == [f"{PICTURES[name]}_{epoch:04}.png" for epoch in (2, 4)]
        image = np.array(Image.open(out / pictures[0]))
        assert image.shape[0] >= 128 and image.std() > 10


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_without_stochastic_depth(name, data, tmp_path):
    """A step of rate 0, of blocks skipped with two probabilities; a large deviation shows small differences."""
    rate = ["--warmup_lr", 0] if name == "simmim" else []
    for share in (0.5, 0.9):
        result = run(name, data, tmp_path / str(share), "--drop_path", share, "--std", 1, "--steps", 1, *rate)
        assert result.returncode == 0, result.stderr
    one, two = ((tmp_path / share / f"{PICTURES[name]}_0001.png").read_bytes() for share in ("0.5", "0.9"))
    assert one == two


@every_script
def test_a_sparse_log_has_means_and_the_last_line(name, whole):
    every = [line for line in log_of(folder(name, whole(name)[0])) if "lr" in line]
    sparse = [line for line in log_of(folder(name, whole(name, 3)[0])) if "lr" in line]
    assert sparse[-1]["step"] == 8
    begun = 0
    for line in sparse:
        means = {key: np.mean([other[key] for other in every[begun:line["step"]]])
                 for key in {"loss", "contrast", "recon", "entropy", "accuracy", "feature_std"} & line.keys()}
        assert all(math.isclose(line[key], mean, rel_tol=1e-5) for key, mean in means.items()), line
        assert line["lr"] == every[line["step"] - 1]["lr"]
        begun = line["step"]
    assert weights(name, whole(name, 3)[0]) == weights(name, whole(name)[0])


LOAD = """
import sys, timm, torch
for file in sys.argv[1:]:
    card = torch.load(file, weights_only=True)
    n = len(card["labels"]) if file.endswith("classifier.pt") else 0
    model = timm.create_model(card["arch"], in_chans=card["in_chans"], num_classes=n, **card["model_args"])
    model.load_state_dict(card["model"], strict=True)
    n_outputs = model(torch.zeros(1, card["in_chans"], 32, 32)).shape[1]
    print(n_outputs, len(card["mean"]), card["seed"], card["img_size"])
"""


def test_exported_checkpoints_load_strictly_into_timm_without_this_project(whole, tmp_path):
    paths = [exported(name, whole(name)[0]) for name in SCRIPTS]
    python = [sys.executable, "-I", "-c", LOAD]
    result = subprocess.run([*python, *paths], cwd=tmp_path, capture_output=True, text=True)
    wanted = [f"{2 if name == 'classify' else 24} 1 0 32" for name in SCRIPTS]
    assert result.stdout.splitlines() == wanted, result


@every_script
def test_the_copied_file_alone_trains_on_image_files_of_any_size(name, files, tmp_path):
    shutil.copy(ROOT / SCRIPTS[name][0], tmp_path / "copied.py")
    shutil.copytree(files, tmp_path / "files")
    sizes = np.random.default_rng(0).integers(33, 70, (64, 2)).tolist()
    for i, size in enumerate(sizes):
        image = Image.open(files / f"{i}.png").resize(size)
        image.save(tmp_path / f"files/{i}.png", format="JPEG" if i % 2 else "PNG")
    script, *args = command(name, "files", "run", "--steps", 2)
    result = fork_script(tmp_path / "copied.py", *args, cwd=tmp_path)
    assert result.returncode == 0 and exported(name, tmp_path / "run").exists(), result.stderr


def test_blank_lines_of_a_manifest_are_no_rows(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,split\n\na.png,pretrain\n\n")
    assert load_script("pretrain/gmml.py").read_manifest(tmp_path / "manifest.csv")["path"] == ["a.png"]


def test_colour_files_train_as_their_pack_does(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    manifest, weights = write_pack(tmp_path, images), []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for out in (tmp_path / "packed", tmp_path / "files"):
        result = run("gmml", manifest.parent, out, "--in_chans", 3, "--steps", 1, "--warmup_epochs", 0)
        assert result.returncode == 0, result.stderr
        weights.append(torch.load(out / "backbone.pt", weights_only=True)["model"])
        (tmp_path / "images.npy").unlink(missing_ok=True)                   # for the second run
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())


@every_script
def test_help_comes_at_once_and_explains_every_key(name):
    script, before = ROOT / SCRIPTS[name][0], os.times()
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 0
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    described = dict(re.findall(r"^  --(\w+) .*?\n?\s{3,}(\S.*?)(?=^  -|\Z)", result.stdout, re.M | re.S))
    module = load_script(SCRIPTS[name][0])
    for key in (*module.DEFAULTS, *module.FLAGS):
        assert re.match(r"\w+", described[key]), key


# Schedules, samples, order, seeds

@every_script
def test_a_warm_up_longer_than_the_run_is_pointed_out(name, data, tmp_path):
    long = run(name, data, tmp_path / "long", "--warmup_epochs", 9, "--steps", 1)
    assert long.returncode == 0 and "warning" in long.stderr and "warm" in long.stderr
    assert "warm" not in run(name, data, tmp_path / "short", "--steps", 1).stderr


def weights(name, out):
    return plain(torch.load(exported(name, out), weights_only=True)["model"])


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "classify"])
def test_a_sample_is_the_first_images_of_the_split_so_that_samples_nest(name, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    rows = pd.read_csv(data / "manifest.csv")
    rows.loc[14:23, "split"] = "other"
    rows.to_csv(tmp_path / "data/manifest.csv", index=False)
    assert run(name, tmp_path / "data", tmp_path / "cut").returncode == 0
    assert run(name, data, tmp_path / "sample", "--samples", 14).returncode == 0
    assert run(name, data, tmp_path / "all").returncode == 0
    sample, cut, everything = (weights(name, tmp_path / place) for place in ("sample", "cut", "all"))
    assert sample == cut != everything


@every_script
def test_images_come_in_another_order_in_every_epoch_and_with_every_seed(name, files, tmp_path, monkeypatch):
    """Seen from the files that are opened in each step; a step has been done when its line is in the log."""
    opened, current = Image.open, {}

    def watched(path, *args, **kwargs):
        if str(path).startswith(str(files)):
            log = current["folder"] / "log.jsonl"
            step = log.read_text().count('"lr"') if log.exists() else 0
            current["steps"].setdefault(step, set()).add(int(path.stem))
        return opened(path, *args, **kwargs)
    monkeypatch.setattr(Image, "open", watched)
    orders = {}
    for seed in (0, 11):
        out = tmp_path / f"{seed}"
        current.update(folder=out / f"seed{seed}" if name == "classify" else out, steps={})
        flags = ["--seed", seed, "--batch", 6, "--epochs", 2]
        assert run_inside(name, files, out, monkeypatch, *flags) == 0
        images = range(24, 48) if name == "classify" else range(24)
        batches = [current["steps"][step] & set(images) for step in range(8)]
        for epoch in (0, 1):
            order = batches[4 * epoch:4 * epoch + 4]
            assert sorted(i for batch in order for i in batch) == [*images]     # each image once
            orders[seed, epoch] = tuple(frozenset(batch) for batch in order)
    assert len(set(orders.values())) == 4


@every_script
def test_the_seed_decides_the_initial_weights(name, data, tmp_path):
    still = ["--lr", 0, "--warmup_lr", 0] if name in ("simmim", "classify") else ["--lr", 0]
    started = {}
    for place, seed in (("a", 0), ("b", 0), ("c", 11)):
        out = tmp_path / place
        assert run(name, data, out, "--seed", seed, "--steps", 1, *still, "--wd", 0).returncode == 0
        file = out / f"seed{seed}/classifier.pt" if name == "classify" else exported(name, out)
        started[place] = plain(torch.load(file, weights_only=True)["model"])
    assert started["a"] == started["b"] and started["a"]["cls_token"] != started["c"]["cls_token"]
