"""Shared test tools: load a script as a module, run it as a person would, find the optional real data."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"      # optional folder with real metadata and images, beside the checkout


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than five seconds; runs in CI all the same")


def load_script(name):
    """Import a script by its path below the project root, e.g. load_script("pretrain/gmml.py")."""
    path = ROOT / name
    module_name = "script_" + name.removesuffix(".py").replace("/", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def run_script(name, *args, nproc=1, timeout=300, cwd=ROOT, **env):
    """Run a script in a subprocess (under torchrun if nproc > 1); its CompletedProcess, output as text."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return subprocess.run(launcher + [str(ROOT / name), *map(str, args)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


# A script in a process forked from one that has imported torch: as a subprocess, without its 4 seconds

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torchvision", "timm", "safetensors.torch", "sklearn.metrics",
                              "sklearn.linear_model", "pandas", "pytest"])


def forked(command, nproc, folder, cwd, env):
    """Body of the forked process. With nproc > 1 it launches so many, ends all when one fails."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if nproc > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ.update(WORLD_SIZE=str(nproc), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                          TORCHELASTIC_RUN_ID="none")
        workers = set()
        for rank in range(nproc):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            worker = os.fork()
            if not worker:
                break
            workers.add(worker)
        else:
            while workers:
                ended, status = os.wait()
                workers.remove(ended)
                if status:
                    for worker in workers:
                        os.kill(worker, signal.SIGKILL)
                    sys.exit(os.waitstatus_to_exitcode(status))
            return
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Run:
    """A running script: its process, leader of a group of its own, and what it has said."""

    def __init__(self, name, args, nproc=1, cwd=ROOT, **env):
        self.folder = tempfile.TemporaryDirectory()
        os.environ.setdefault("OMP_NUM_THREADS", "1")                       # before torch is imported
        command = [str(ROOT / name), *map(str, args)]
        self.process = FORKS.Process(target=forked, args=(command, nproc, self.folder.name, cwd, env))
        self.process.start()
        self.pid = self.process.pid

    def said(self, name="stdout"):
        file = Path(self.folder.name, name)
        return file.read_text() if file.exists() else ""

    def workers(self):
        """Ids of the processes of a run with several."""
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def kill(self, number=signal.SIGKILL):
        """A signal for all its processes, where it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait_for(self, happened, seconds=60):
        """Wait until happened() is true."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.exitcode is None and time.monotonic() < end, self.said() + self.said("stderr")
            time.sleep(0.003)

    def result(self, timeout=120):
        """Wait for its end: a CompletedProcess as of run_script."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout, self.said(), self.said("stderr"))
        said = self.said(), self.said("stderr")
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *said)


def fork_script(name, *args, timeout=120, **kwargs):
    """As run_script, forked."""
    return Run(name, args, **kwargs).result(timeout)


def write_pack(folder, images, **columns):
    """A packed dataset as pack.py leaves it, all rows of split pretrain unless said; returns its manifest."""
    np.save(folder / "images.npy", images)
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(len(images))], "split": "pretrain", **columns})
    rows.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def blobs(n):
    """n grey images of smooth random blobs, uint8 [n, 40, 40]."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 5, 5), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((40, 40), Image.BICUBIC)) for image in coarse])


def run_here(module, monkeypatch, *args):
    """A script's main() in this process, as from its command line but without the seconds of importing."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
    module.main()


def log_of(run):
    """The lines of a run folder's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_user_error(result, *fragments):
    """A user's mistake: exit code 2, the last line on stderr starts with 'error:', no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), result.stderr
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} not in {line!r}"


@pytest.fixture
def shared():
    """The folder of real metadata and images; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data folder {SHARED} is absent")
    return SHARED


def pytest_collection_modifyitems(items):
    """The files that take longest go first: on several cores the last file to end is waited for."""
    longest = ["test_run_all.py", "test_training.py", "test_emulated_gpu.py", "test_gpu_bench.py"]
    items.sort(key=lambda item: (longest + [item.path.name]).index(item.path.name))
