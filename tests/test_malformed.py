"""The malformed inputs of malformed.yaml: each is one sentence and exit code 2, and nothing else happens."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import ROOT, blobs, load_script, run_script, write_pack
from PIL import Image
from pydicom import examples
from pydicom.encaps import encapsulate

CASES = yaml.safe_load(Path(__file__).with_suffix("").with_name("malformed.yaml").read_text())
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
FACTS = dict(arch="vit_small_patch16_224", model_args=MODEL, in_chans=1, img_size=32, mean=[0.485],
             std=[0.229], labels=["A", "B"])
TRAIN = ["--out", "out", "--model_args", json.dumps(MODEL), "--device", "cpu", "--steps", "1", "--batch", "8"]
READERS = ("nih", "mimic_cxr", "chexpert", "padchest", "vindr_cxr", "covidx_ct", "oct", "imagenet")
PRETRAIN = ("gmml", "sit", "dino", "moco_v3", "simmim", "supervised")
SOME = ["--n-pretrain", "5"]
SQUARES = {"simmim": ["--mask_unit", "8"]}
COMMANDS = {                        # base: the command that reads its input, in/, and writes out/
    **{name: [f"data_prep/{name}.py", "--raw", "in", "--out", "out/index.csv",
              *(SOME if name in ("mimic_cxr", "covidx_ct", "oct", "imagenet") else [])] for name in READERS},
    "describe": ["data_prep/describe.py", "--index", "in/index.csv", "--out", "out"],
    "demo": ["data_prep/demo.py", "--out", "out", "--scale", "0.001"],
    "pack": ["data_prep/pack.py", "--index", "in/index.csv", "--raw", "in", "--out", "out", "--size", "16"],
    **{name: [f"pretrain/{name}.py", "--manifest", "in/manifest.csv", *TRAIN, *SQUARES.get(name, [])]
       for name in PRETRAIN},
    "loose": ["pretrain/gmml.py", "--manifest", "in/manifest.csv", *TRAIN],
    "weights": ["pretrain/gmml.py", "--manifest", "in/manifest.csv", *TRAIN, "--init", "in/weights.pt"],
    "row": ["pretrain/gmml.py", "--manifest", "in/manifest.csv", *TRAIN, "--experiments", "in/rows.yaml",
            "--exp", "1"],
    "resume": ["pretrain/gmml.py", "--manifest", "in/manifest.csv", *TRAIN, "--out", "in/run"],
    "classify": ["finetune/classify.py", "--train", "in/manifest.csv", *TRAIN, "--seeds", "0"],
    "predict": ["evaluate/predict.py", "--checkpoint", "in/classifier.pt", "--manifest", "in/manifest.csv",
                "--split", "val", "--out", "out/p.csv"],
    "folder": ["evaluate/predict.py", "--checkpoint", "in/classifier.pt", "--images", "in/images",
               "--out", "out/p.csv"],
    "metrics": ["evaluate/metrics.py", "in/1/predictions/seed0/nih_test.csv", "--out", "out/m.csv",
                "--bootstrap", "9", "--workers", "1"],
    "compare": ["evaluate/compare.py", "--metrics", "in/metrics.csv", "--out", "out"],
    "report": ["evaluate/report.py", "--metrics", "in/metrics.csv", "--out", "out"],
    "plan": ["evaluate/plan.py", "--exp", "3.4"],
    "run_all": ["run_all.sh", "--dry-run"],
}
LEFT = {"run.json", ".lock", "rejected.csv", "p.csv.rejected.csv"}             # what a refused command may leave in out/


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A well-formed in/ for every base, in a folder of its name."""
    root = tmp_path_factory.mktemp("inputs")
    assert run_script("data_prep/demo.py", "--out", root, "--scale", 0.02).returncode == 0
    for name in COMMANDS:
        (root / name).mkdir(exist_ok=True)
    labels = {"A": [0, 1] * 12, "B": [0, 0, 1] * 8, "split": ["pretrain"] * 8 + ["train"] * 8 + ["val"] * 8}
    for name in (*PRETRAIN, "weights", "row", "resume", "classify", "predict"):
        write_pack(root / name, blobs(24), **labels)
    torch.manual_seed(0)
    backbone = timm.create_model(FACTS["arch"], in_chans=1, num_classes=0, **MODEL).state_dict()
    torch.save(dict(model=backbone, **FACTS), root / "weights/weights.pt")
    classifier = timm.create_model(FACTS["arch"], in_chans=1, num_classes=2, **MODEL)
    torch.nn.init.normal_(classifier.head.weight)
    for name in ("predict", "folder"):
        torch.save(dict(model=classifier.state_dict(), **FACTS), root / name / "classifier.pt")
    row = {"pretrain": {"strategy": "gmml", "epochs": 2, "warmup_epochs": 1}}
    (root / "row/rows.yaml").write_text(yaml.safe_dump({"defaults": {"in_chans": 1}, "1": row}))
    for name in ("describe", "pack", "loose", "folder/images"):
        (root / name).mkdir(exist_ok=True)
        for i, image in enumerate(blobs(8 if name == "loose" else 1)):
            Image.fromarray(image).save(root / name / f"{i}.png")
    for name in ("describe", "pack"):
        (root / name / "index.csv").write_text("path,patient,split\n0.png,1,test\n")
    pd.DataFrame({"path": [f"{i}.png" for i in range(8)], "split": "pretrain"}).to_csv(
        root / "loose/manifest.csv", index=False)
    rows = [f"{i}.png,{i // 2},{i % 2},{i % 3 // 2},0.{i},0.{9 - i}" for i in range(9)]
    for name, exp, seed in [("metrics", 1, 0), ("compare", 1, 0), ("compare", 2, 0)]:
        file = root / name / f"{exp}/predictions/seed{seed}/nih_test.csv"
        file.parent.mkdir(parents=True)
        file.write_text("path,patient,true_Edema,true_Mass,prob_Edema,prob_Mass\n" + "\n".join(rows) + "\n")
    files = sorted(str(path.relative_to(root)) for path in (root / "compare").rglob("nih_test.csv"))
    for name in ("report", "compare"):
        run_case(["evaluate/metrics.py", *files, "--out", f"{name}/metrics.csv", "--bootstrap", "9",
                  "--workers", "1"], root)
    shutil.rmtree(root / "compare/1")
    shutil.rmtree(root / "compare/2")
    command = [re.sub("^in/", f"{root}/resume/", word) for word in COMMANDS["resume"]]
    assert run_case(command, root) == (0, [])
    return root


def throw(problem):
    raise problem


def run_case(command, cwd):
    """A command line in `cwd`, in this process. Returns: exit code, lines of stderr but Python's warnings."""
    script, *words = command
    if script.endswith(".sh"):
        result = subprocess.run(["bash", ROOT / script, *words], cwd=cwd, capture_output=True, text=True,
                                env={**os.environ, "PYTHON": sys.executable})
        return result.returncode, result.stderr.strip().splitlines()
    module, stderr = load_script(script), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script, *words]
    workers = vars(module).get("pack_shards")
    if workers:                                 # of pack.py: without the second that they take to start
        problems = SimpleNamespace(put=throw)
        module.pack_shards = lambda shards, _, config: module.work(0, shards, {-1}, [-1], problems, config)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            module.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        if workers:
            module.pack_shards = workers
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = stderr.getvalue().splitlines()
    return code, [line for line in lines if "Warning" not in line and line[:1] != " "]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


def change(path, case):
    """Do to a file what a case says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "text" in case:                          # its whole content
        path.write_text(case["text"])
    if "sub" in case:                           # [old, new]: a piece of text
        old, new = case["sub"]
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    if {"cell", "drop", "name", "again"} & set(case):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "cell" in case:                      # [row, as in a spreadsheet, column, value]
            row, column, value = case["cell"]
            table.loc[row - 2, column] = value
        if "drop" in case:                      # a column
            table = table.drop(columns=case["drop"])
        if "name" in case:                      # {old: new} names of columns
            table.columns = [case["name"].get(name, name) for name in table]
        if "again" in case:                     # a row, once more at the end
            table.loc[len(table)] = table.loc[case["again"] - 2]
        table.to_csv(path, index=False)
    if "add" in case:                           # text at the end
        path.write_text(path.read_text() + case["add"])
    if "keep" in case:                          # so many bytes
        path.write_bytes(path.read_bytes()[:case["keep"]])
    if "put" in case:                           # [offset, bytes in hex]
        offset, data = case["put"]
        old, new = path.read_bytes(), bytes.fromhex(data)
        path.write_bytes(old[:offset] + new + old[offset + len(new):])
    if case.get("gone"):                        # no such file
        path.unlink()
    if "npy" in case:                           # [dtype, shape] of an array of zeros
        dtype, shape = case["npy"]
        np.save(path, np.zeros(shape, object if dtype == "object" else dtype), allow_pickle=True)
    if "image" in case:                         # [mode, size, value] of an image of one value
        mode, size, value = case["image"]
        Image.new(mode, size, tuple(value) if isinstance(value, list) else value).save(path)
    if "dicom" in case:                         # {attribute: value, null to remove it} of a CT slice
        ds = examples.ct.copy()
        for name, value in case["dicom"].items():
            if name == "TransferSyntaxUID":
                ds.file_meta.TransferSyntaxUID = value
            elif value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, bytes.fromhex(value) if name == "PixelData" else value)
        if str(ds.file_meta.TransferSyntaxUID).startswith("1.2.840.10008.1.2.4"):
            ds.PixelData = encapsulate([bytes(20)])     # of a compressed syntax; nothing that can be decoded
        ds.save_as(path, enforce_file_format=False)
    if "set" in case or "del" in case or "weight" in case:
        state = torch.load(path, weights_only=True)
        state.update(case.get("set", {}))       # {key: value} of a checkpoint
        state.pop(case.get("del"), None)        # a key
        for name, shape in case.get("weight", {}).items():      # {weight: shape, null to remove it}
            state["model"].pop(name) if shape is None else state["model"].update({name: torch.zeros(shape)})
        torch.save(state, path)
    if "content" in case:                       # a checkpoint that holds something else
        torch.save({"list": [1], "tensor": torch.zeros(3), "hostile": Hostile(), "array": np.zeros(3),
                    "function": os.system, "empty": {}, "scalar": {"best": np.float64(1.0)},
                    "path": {"out": path}, "others": {"net": {
                        "encoder.0.weight": torch.zeros(3, 3), "encoder.0.bias": torch.zeros(3),
                        "decoder.weight": torch.zeros(3, 3)}}}[case["content"]], path)
    if case.get("pickle"):                      # no zip archive but a bare pickle that runs a command
        path.write_bytes(pickle.dumps({"model": Hostile()}))


def listing(folder):
    """{path: content} of all files."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("base", COMMANDS)
def test_the_inputs_are_good_before_they_are_changed(base, inputs, tmp_path):
    shutil.copytree(inputs / base, tmp_path / "in")
    code, lines = run_case(COMMANDS[base], tmp_path)
    assert code == 0, lines


@pytest.mark.parametrize("base, case", [
    pytest.param(base, case, id=" ".join([base, *(str(case[key])[:40] for key in case if key != "says")]))
    for base, cases in CASES.items() for case in cases])
def test_a_malformed_input_is_one_sentence_and_exit_code_2(base, case, inputs, tmp_path, monkeypatch):
    for name, value in case.get("env", {}).items():
        monkeypatch.setenv(name, value)
    shutil.copytree(inputs / base, tmp_path / "in")
    if "file" in case:
        change(tmp_path / "in" / case["file"], case)
    before = listing(tmp_path)
    code, lines = run_case([*COMMANDS[base], *map(str, case.get("flags", []))], tmp_path)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    says = case["says"] if isinstance(case["says"], list) else [case["says"]]
    assert not [words for words in says if str(words) not in lines[0]], lines[0]
    assert len(lines[0]) < 600 and lines[0].rstrip()[-1] != ":" and "set to `False`" not in lines[0], lines[0]
    after = listing(tmp_path)
    assert all(after.get(path) == content for path, content in before.items() if path.name != "run.json")
    assert {path.name for path in after.keys() - before.keys()} <= LEFT and not (tmp_path / "owned").exists()
