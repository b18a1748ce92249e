"""run_all.sh: the demo from raw stand-ins to the report at a small size, and every contract of its files."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT

META = ["path", "patient", "study", "split", "view", "sex", "age", "race"]
EXP = "demo.gmml-mimic-imagenet"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the scripts in a folder of its own, as a fresh checkout would be."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("data_prep", "pretrain", "finetune", "evaluate", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "experiments.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def run_all(project, *flags, **popen):
    command = ["bash", "run_all.sh", *map(str, flags)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, **{"env": ENV, **popen})


def state(project):
    """Content hash and time of every file a run made, logs apart."""
    files = [path for top in ("data", "runs", "results") for path in sorted((project / top).rglob("*"))
             if path.is_file() and "logs" not in path.parts]
    return {path.relative_to(project): (hashlib.sha256(path.read_bytes()).hexdigest(),
                                        path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def demo(project):
    """The demo arm that needs another one's weights, on a tenth of the stand-ins."""
    result = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_the_demo_ends_in_a_report(project, demo):
    page = (project / "results/demo/report.html").read_text()
    assert EXP in page and "stand-in" in page.lower()
    loads = re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not loads, "the page must not load anything from elsewhere"
    assert "report: results/demo/report.html" in demo.stdout
    verdicts, components = (pd.read_csv(project / f"results/demo/{name}.csv", dtype={"exp": str})
                            for name in ("verdicts", "components"))
    assert set(verdicts["verdict"]) == {"not run"}                  # stand-ins judge no claim
    assert set(components["exp"]) == {EXP} and (components["se_patients"] > 0).any()


@pytest.mark.slow
def test_running_twice_does_no_work_twice(project, demo):
    before = state(project)
    again = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP)
    assert again.returncode == 0 and state(project) == before
    stages = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert stages and all(line.endswith(": complete") for line in stages)


@pytest.mark.slow
def test_a_changed_row_runs_again_and_what_it_does_not_touch_does_not(project, demo):
    rows = project / "experiments.yaml"
    text = rows.read_text()
    try:
        begin = "finetune: &demo_finetune {epochs: "
        rows.write_text(text.replace(f"{begin}10", f"{begin}9"))
        assert rows.read_text() != text
        plan = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP, "--dry-run")
        # one process: torchrun would turn the script's exit code 2 into its own 1
        result = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP, "--nproc", 1)
    finally:
        rows.write_text(text)
    assert plan.returncode == 0
    assert f"{EXP} pretrain: complete" in result.stdout
    # it is another run's folder
    assert result.returncode == 2 and f"stage '{EXP} finetune' failed" in result.stderr
    assert "epochs=10, now it is 9" in result.stdout + result.stderr


@pytest.mark.slow
def test_a_demo_of_another_scale_needs_another_folder(project, demo):
    result = run_all(project, "--demo", "--scale", 0.2, "--dry-run")
    assert result.returncode == 2 and "data/demo/raw has stand-ins of another scale than 0.2" in result.stderr


@pytest.mark.slow
def test_index_and_manifest_contracts(project, demo):
    folders = [path for path in (project / "data/demo").iterdir() if (path / "manifest.csv").exists()]
    assert {path.name for path in folders} == {
        "nih", "mimic_cxr", "chexpert", "padchest", "vindr_cxr", "imagenet", "covidx_ct"}
    for folder in folders:
        index, manifest = (pd.read_csv(folder / name, dtype=str, keep_default_na=False)
                           for name in ("index.csv", "manifest.csv"))
        assert index.columns[:8].tolist() == META and manifest.columns.tolist() == index.columns.tolist()
        assert set(index["split"]) <= {"pretrain", "train", "val", "test"}
        labels = index[index.columns[8:]]
        if folder.name != "imagenet":
            assert labels.isin(["1", "0", "-1", ""]).all(axis=None), folder
        images = np.load(folder / "images.npy", mmap_mode="r")
        assert images.dtype == np.uint8 and len(images) == len(manifest)
        assert images.shape[1:] == ((64, 64, 3) if folder.name == "imagenet" else (64, 64))
        rejected = pd.read_csv(folder / "rejected.csv")
        assert list(rejected.columns) == ["path", "reason"]
        facts = json.loads((folder / "pack.json").read_text())
        assert facts["N"] == len(manifest) and facts["size"] == 64
        assert abs(facts["mean"] - images.mean() / 255) < 1e-3 if np.ndim(facts["mean"]) == 0 else True
        one_split = (manifest.groupby("patient")["split"].nunique() == 1).all()
        assert folder.name == "imagenet" or one_split, f"a patient of {folder.name} is in two splits"


@pytest.mark.slow
def test_checkpoint_contracts(project, demo):
    backbone = torch.load(project / f"runs/{EXP}/pretrain/backbone.pt", weights_only=True)
    classifier = torch.load(project / f"runs/{EXP}/finetune/seed11/classifier.pt", weights_only=True)
    keys = {"model", "arch", "model_args", "in_chans", "img_size", "mean", "std", "exp", "seed", "epoch",
            "config"}
    assert keys <= set(backbone) and keys | {"labels"} <= set(classifier)
    for content, classes in ((backbone, 0), (classifier, len(classifier["labels"]))):
        model = timm.create_model(content["arch"], in_chans=content["in_chans"], num_classes=classes,
                                  **content["model_args"])
        model.load_state_dict(content["model"], strict=True)
    assert classifier["seed"] == 11 and backbone["exp"] == classifier["exp"] == EXP


@pytest.mark.slow
def test_prediction_and_metric_contracts(project, demo):
    for name in ("nih_test", "vindr_test", "padchest", "chexpert_test", "chexpert_valid"):
        table = pd.read_csv(project / f"runs/{EXP}/predictions/seed0/{name}.csv", dtype={"patient": str})
        assert table.columns[:2].tolist() == ["path", "patient"] and table["path"].is_unique
        truths = [c[5:] for c in table if c.startswith("true_")]
        assert truths == [c[5:] for c in table if c.startswith("prob_")]
        assert {"Atelectasis", "Effusion"} <= set(truths)
        assert table[[f"true_{label}" for label in truths]].isin([0, 1]).all(axis=None)
        assert table[[f"prob_{label}" for label in truths]].stack().between(0, 1).all()
    metrics = pd.read_csv(project / "results/demo/metrics.csv", dtype={"exp": str})
    assert metrics.columns.tolist() == ["exp", "seed", "dataset", "labels", "metric", "variant", "label",
                                        "threshold", "value", "ci_low", "ci_high"]
    assert set(metrics["variant"]) == {"paper", "corrected"} and set(metrics["seed"]) == {0, 11}
    mean = metrics[(metrics["metric"] == "auc_mean") & (metrics["variant"] == "corrected")]
    assert (mean["ci_low"] <= mean["value"]).all() and (mean["value"] <= mean["ci_high"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [os.kill, os.killpg])          # the script alone, or as SLURM does
def test_sigterm_lets_the_stage_save_and_the_same_command_goes_on(project, demo, kill):
    out = f"stopped_{kill.__name__}"
    command = ["bash", "run_all.sh", "--demo", "--scale", "0.1", "--exp", "demo.gmml-mimic",
               "--out", out, "--tests", "nih_test", "--nproc", "1"]
    with open(project / f"{out}.txt", "w") as output:
        chain = subprocess.Popen(command, cwd=project, stdout=output, stderr=output, env=ENV,
                                 start_new_session=True)
        log = project / out / "runs/demo.gmml-mimic/pretrain/run.json"
        while not log.exists():
            assert chain.poll() is None
            time.sleep(0.05)
        time.sleep(1)                                       # somewhere in the first steps
        kill(chain.pid, signal.SIGTERM)
        assert chain.wait(60) == 75
    said = (project / f"{out}.txt").read_text()
    assert "stopped in stage 'demo.gmml-mimic pretrain'" in said and "error" not in said
    again = run_all(project, *command[2:])
    assert again.returncode == 0, again.stderr
    pretraining = re.search(r"demo.gmml-mimic pretrain: .*?^\[", again.stdout, re.S | re.M)[0]
    assert int(re.search(r"steps (\d+) to", pretraining)[1]) > 0            # not from the beginning
    tested = {path.name for path in (project / out / "runs").rglob("predictions/*/*.csv")}
    assert tested == {"nih_val.csv", "nih_test.csv"}


@pytest.mark.slow
def test_slurm_jobs_are_chained_and_do_what_the_chain_does(project, demo, tmp_path):
    """With stand-ins for SLURM's commands: sbatch runs the job at once, srun its command."""
    before = state(project)
    flags = ["--demo", "--scale", 0.1, "--exp", EXP]
    result = run_all(project, *flags, "--slurm", tmp_path / "jobs")
    assert result.returncode == 0 and "hands in 2 rows" in result.stdout    # a row and the one it starts from
    (tmp_path / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "sbatch").write_text("""#!/bin/bash
        echo "$@" >> "$QUEUE/submitted"
        id=$(wc -l < "$QUEUE/submitted")
        echo "$id"
        while [[ $1 = --* ]]; do shift; done
        SLURM_ARRAY_TASK_ID=0 bash "$@" > "$QUEUE/$id.out" 2>&1 || touch "$QUEUE/failed"
    """)
    for name in ("srun", "sbatch"):
        (tmp_path / name).chmod(0o755)
    env = {**ENV, "QUEUE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "jobs/submit.sh", "--account=me"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert done.returncode == 0 and not (tmp_path / "failed").exists(), done.stderr
    assert all("--account=me" in line for line in submitted)
    assert [re.findall(r"--dependency=(\S+)|(?<=job.sh )(.*)", line) for line in submitted] == [
        [("", f"data {EXP} demo.imagenet")],
        [("afterok:1", ""), ("", "rows demo.imagenet")],
        [("afterok:2_0", ""), ("", f"rows {EXP}")],
        [("afterok:2:3", ""), ("", f"results {EXP} demo.imagenet")]]
    new = {str(path).split("/")[1] for path in set(state(project)) - set(before) if path.parts[0] == "runs"}
    assert new == {"demo.imagenet"}                 # its fine-tuning, which the chain of EXP has no use for
    assert f"{EXP} pretrain: complete" in (tmp_path / "3.out").read_text()


@pytest.mark.slow
def test_two_nodes_are_two_launchers_that_meet(project, demo):
    """An arm on two torchrun agents of this machine, as on two nodes: what one process writes."""
    def run(command, nodes):
        port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1",
                    "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=study",
                    "--local_addr=127.0.0.1"]
        running = [subprocess.Popen([sys.executable, *(launcher if nodes > 1 else []), *command,
                                     "--device", "cpu"], cwd=project, env=ENV, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(nodes)]
        said = [node.communicate(timeout=120)[0] for node in running]
        assert [node.returncode for node in running] == [0] * nodes, said
        return "".join(said)

    row = ["--exp", "demo.gmml-mimic", "--data", "data/demo"]
    for nodes in (1, 2):
        out = f"on{nodes}"
        said = run(["pretrain/gmml.py", *row, "--steps", "6", "--out", f"{out}/pretrain"], nodes)
        assert nodes == 1 or "on 2 x cpu" in said
        run(["finetune/classify.py", *row, "--seeds", "0", "--steps", "4", "--out", f"{out}/finetune",
             "--init", f"{out}/pretrain/backbone.pt"], nodes)
        run(["evaluate/predict.py", "--checkpoint", f"{out}/finetune/seed0/classifier.pt", "--manifest",
             "data/demo/nih/manifest.csv", "--batch", "8", "--out", f"{out}/nih_test.csv"], nodes)
    for name in ("pretrain/backbone.pt", "finetune/seed0/classifier.pt"):
        one, two = (torch.load(project / f"on{nodes}" / name, weights_only=True)["model"] for nodes in (1, 2))
        assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5, name
    one, two = (pd.read_csv(project / f"on{nodes}/nih_test.csv").filter(like="prob_") for nodes in (1, 2))
    assert len(one) > 20 and one.std().min() > 0 and np.allclose(one, two, rtol=0, atol=1e-5)


def test_dry_run_prints_commands_and_runs_nothing(project):
    result = run_all(project, "--exp", "3.4,0.1.6b", "--dry-run", "--data", "packs", "--nproc", 4)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and not (project / "packs").exists()
    assert sum("pretrain/gmml.py --exp 3.4" in line and "--nproc_per_node=4" in line for line in lines) == 1
    assert any("pretrain/simmim.py --exp 0.1.6 " in line for line in lines)     # 0.1.6b starts from 0.1.6
    packing = [line for line in lines if "data_prep/pack.py" in line and "--out packs/nih --size" in line]
    assert len(packing) == 1


def test_verdicts_are_on_the_rows_that_are_run(project):
    for flags, exps, out in ((["--demo", "--scale", 0.1, "--exp", EXP], EXP, "results/demo"),
                             (["--exp", "3.4,2.2"], "3.4,2.2", "results")):
        command = f"evaluate/compare.py --predictions runs --exp {exps} --out {out}"
        assert command in run_all(project, *flags, "--dry-run").stdout


def test_the_whole_grid_is_planned(project):
    planned = run_all(project, "--dry-run").stdout
    assert "--exp 4.1.1-250k" in planned and "--exp c.1" not in planned
    assert "--exp c.9" in run_all(project, "--exp", "all", "--dry-run").stdout


@pytest.mark.parametrize("flags, fragment", [
    (["--exp", "3.44"], "no experiment '3.44'; nearest: 3.4"), (["--fast"], "unknown option --fast"),
    (["--nproc", "two"], "not a number of processes"), (["--exp"], "--exp needs a value"),
    (["--tests", "nih_tets"], "--tests has no nih_tets"), (["--only", "some"], "--only is some")])
def test_mistakes_on_the_command_line(project, flags, fragment):
    result = run_all(project, *flags)
    assert result.returncode == 2 and fragment in result.stderr.strip().splitlines()[-1]


def test_the_first_failure_stops_the_chain_with_command_and_log(project):
    result = run_all(project, "--exp", "2.1", "--raw", "nowhere", "--data", "elsewhere")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: stage 'nih index' failed with exit code 2")
    log = re.search(r"its log is (\S+);", last)[1]
    assert "error: " in (project / log).read_text() and "data_prep/nih.py --raw nowhere/nih" in last


def test_the_plan_names_costs_and_missing_inputs(project):
    result = run_all(project, "--plan", "--exp", "3.4,4.1.1-50k,0.1.4")
    assert result.returncode == 0, result.stderr
    row = next(line.split() for line in result.stdout.splitlines()
               if line.startswith("3.4 ") and "pretrain" in line)
    assert row[2] == "390,000" and row[3] == "99,840,000"       # 100,000 // 256 steps an epoch, 1,000 epochs
    # ViT-S/16: 4.6 billion multiply-adds, two views, backward twice the forward
    assert abs(float(row[4].replace(",", "")) * 1e15 / (99_840_000 * 6 * 2 * 4.6e9) - 1) < 0.03
    assert "missing: weights/simmim_pretrain__swin_base__img192_window6__800ep.pth" in result.stdout


def test_a_reader_that_leaves_ends_the_plan_without_a_word(project):
    command = [sys.executable, "evaluate/plan.py", "--exp", "2.1"]
    plan = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    plan.stdout.close()                                             # as `| head` does
    assert plan.stderr.read() == "" and plan.wait() == -signal.SIGPIPE


@pytest.mark.slow
def test_other_content_of_an_input_runs_the_stage_again(project, demo):
    """Last of all, as it leaves a record that is not true."""
    done = project / "data/demo/mimic_cxr/manifest.csv.done"
    done.write_text(done.read_text().splitlines()[0] + "\nother content\n")
    again = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP, "--only", "rows")
    assert again.returncode == 0, again.stderr
    stages = re.findall(r"^\[\d+/\d+\] (.*?): (complete$)?", again.stdout, re.M)
    assert [name for name, complete in stages if not complete] == [f"{EXP} pretrain"]  # gave the same weights
