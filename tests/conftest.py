"""Shared test tools: load a script as a module, run it as a person would, find the optional real data."""

import importlib.util
import json
import os
import subprocess
import sys
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
    """The file that takes longest goes first: on several cores the last file to end is waited for."""
    items.sort(key=lambda item: item.path.name != "test_run_all.py")
