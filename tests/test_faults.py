"""Predictions killed at random moments end in the same bytes; what any script writes outlasts a power cut.

Training is killed in test_training.py.
KILLS (default 2): how often the script is killed, as in KILLS=20 bash tests/run.sh tests/test_faults.py
"""

import os
import signal
import time

import numpy as np
import pytest
import timm
import torch
from conftest import Run, blobs, fork_script, load_script, write_pack

KILLS = int(os.environ.get("KILLS", 2))
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def test_predictions_killed_at_random_moments_are_whole_or_absent_and_end_in_the_same_bytes(tmp_path):
    manifest = write_pack(tmp_path, blobs(64), A=[0, 1] * 32, split=["val", "test"] * 32)
    model = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=1, **MODEL)
    facts = dict(arch="vit_small_patch16_224", model_args=MODEL, in_chans=1, img_size=32, mean=[0.485],
                 std=[0.229])
    torch.save(dict(model=model.state_dict(), labels=["A"], **facts), tmp_path / "classifier.pt")
    sets = [word for split in ("val", "test") for word in ("--set", f"{split}={manifest}:{split}")]
    command = ["--checkpoint", tmp_path / "classifier.pt", "--device", "cpu", "--batch", 1, *sets, "--out"]
    fork_script("evaluate/predict.py", "--help")                            # starts the server of forks
    begun = time.monotonic()
    result = fork_script("evaluate/predict.py", *command, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    seconds = time.monotonic() - begun
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(expected) == 4 and expected["val.csv"].count(b"\n") == 33

    def written():
        files = [path for path in (tmp_path / "cut").glob("*") if path.suffix != ".part"]
        return {path.name: path.read_bytes() for path in files}

    rng, kills = np.random.default_rng(0), 0
    while kills < KILLS:
        cut = Run("evaluate/predict.py", [*command, tmp_path / "cut"])
        cut.process.join(rng.uniform(0, seconds))
        cut.kill()
        kills += cut.result().returncode == -signal.SIGKILL
        assert written().items() <= expected.items()
    assert fork_script("evaluate/predict.py", *command, tmp_path / "cut").returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == expected


@pytest.mark.parametrize("script, name", [
    ("data_prep/pack.py", "replacing"), ("pretrain/gmml.py", "write_atomic"),
    ("evaluate/predict.py", "write_atomic"), ("evaluate/metrics.py", "write")])
def test_a_file_is_on_disk_in_full_before_it_takes_its_name(script, name, tmp_path, monkeypatch):
    """After a power cut a file renamed earlier could be empty, and pass for whole."""
    sync, rename, synced, renamed = os.fsync, os.replace, {}, []

    def fsync(number):
        sync(number)
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    def replace(source, target):
        renamed.append((target, synced.get(os.stat(source).st_ino)))
        rename(source, target)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write, path = getattr(load_script(script), name), tmp_path / "file"
    if name == "replacing":
        with write(path, tmp_path, mode="wb") as file:
            file.write(b"nine byte")
    else:
        write(path, lambda file: file.write(b"nine byte"))
    assert renamed == [(path, 9)] and path.read_bytes() == b"nine byte"
