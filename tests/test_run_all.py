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
import yaml
from conftest import ROOT, fork_script
from PIL import Image

META = ["path", "patient", "study", "split", "view", "sex", "age", "race"]
EXP, PLACE, DATA = "3.4", "results/demo-0.1", "data/demo-0.1"       # it needs the weights of c.0
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the scripts in a folder of its own, as a fresh checkout would be; its name is a hard one."""
    folder = tmp_path_factory.mktemp("pro ject #1's")
    for name in ("data_prep", "pretrain", "finetune", "evaluate", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "experiments.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    # a python that says at once how many GPUs there are: 0
    ENV["PYTHON"] = str(folder / "python")
    (folder / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec echo 0\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    # the miniature's miniature
    text = (folder / "experiments.yaml").read_text()
    text, n = re.subn(r"(samples: 0, batch: 16, epochs: )\d+", r"\g<1>2", text)
    text, m = re.subn(r"(finetune: \{epochs: )\d+(.*?seeds: )\[0, 11, 21\]", r"\g<1>2\2[0, 11]", text, flags=re.S)
    assert n == m == 1
    (folder / "experiments.yaml").write_text(text)
    return folder


def run_all(project, *flags, **popen):
    command = ["bash", "run_all.sh", *map(str, flags)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, **{"env": ENV, **popen})


def state(project):
    """Content hash and time of every file a run made, logs apart."""
    files = [path for top in ("data", "results") for path in sorted((project / top).rglob("*"))
             if path.is_file() and path.suffix != ".log"]
    return {path.relative_to(project): (hashlib.sha256(path.read_bytes()).hexdigest(),
                                        path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def demo(project):
    """One arm on a tenth of the stand-ins."""
    result = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP, env={**ENV, "PYTHON": sys.executable})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_the_demo_ends_in_a_report(project, demo):
    page = (project / PLACE / "report.html").read_text()
    assert EXP in page and "stand-in" in page.lower()
    loads = re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not loads, "the page must not load anything from elsewhere"
    assert f"report is {PLACE}/report.html" in demo.stdout
    verdicts = pd.read_csv(project / PLACE / "verdicts.csv")
    assert len(verdicts) > 60
    # what is drawn says so at every stage
    assert json.loads((project / DATA / "mimic_cxr/pack.json").read_text())["stand_in"]
    assert json.loads((project / DATA / "nih/pack.json").read_text())["stand_in"]


@pytest.mark.slow
def test_running_twice_does_no_work_twice_and_a_newer_input_is_worked_on(project, demo):
    before = state(project)
    again = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP)
    assert again.returncode == 0 and state(project) == before
    steps = again.stdout.splitlines()
    assert len(steps) > 10 and all(line.endswith("is complete") for line in steps[:-1]), again.stdout
    (project / PLACE / "verdicts.csv.done").touch()
    again = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP)
    worked = [line for line in again.stdout.splitlines() if not line.endswith("is complete")]
    assert again.returncode == 0 and "verdicts.csv is complete" in again.stdout
    (project / PLACE / "metrics.csv").touch()
    worked = [line for line in run_all(project, "--demo", "--scale", 0.1, "--exp", EXP).stdout.splitlines()
              if re.match(r"\d\d:", line)]
    assert [re.search(r"(\w+)\.py", line)[1] for line in worked] == ["compare", "report"]


@pytest.mark.slow
def test_index_and_manifest_contracts(project, demo):
    folders = [path for path in (project / DATA).iterdir() if (path / "manifest.csv").exists()]
    assert {path.name for path in folders} == {
        "nih", "mimic_cxr", "chexpert", "padchest", "vindr_cxr", "imagenet"}
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
    backbone = torch.load(project / f"{PLACE}/runs/{EXP}/pretrain/backbone.pt", weights_only=True)
    classifier = torch.load(project / f"{PLACE}/runs/{EXP}/finetune/seed11/classifier.pt", weights_only=True)
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
        table = pd.read_csv(project / f"{PLACE}/runs/{EXP}/predictions/seed0/{name}.csv", dtype={"patient": str})
        assert table.columns[:2].tolist() == ["path", "patient"] and table["path"].is_unique
        truths = [c[5:] for c in table if c.startswith("true_")]
        assert truths == [c[5:] for c in table if c.startswith("prob_")]
        assert {"Atelectasis", "Effusion"} <= set(truths)
        assert table[[f"true_{label}" for label in truths]].isin([0, 1]).all(axis=None)
        assert table[[f"prob_{label}" for label in truths]].stack().between(0, 1).all()
    metrics = pd.read_csv(project / PLACE / "metrics.csv", dtype={"exp": str})
    assert metrics.columns.tolist() == ["exp", "seed", "dataset", "labels", "metric", "variant", "label",
                                        "threshold", "value", "ci_low", "ci_high", "stand_in"]
    assert set(metrics["variant"]) == {"paper", "corrected"} and set(metrics["seed"].dropna()) == {0, 11}
    mean = metrics[(metrics["metric"] == "auc_mean") & (metrics["variant"] == "corrected")]
    assert (mean["ci_low"] <= mean["value"]).all() and (mean["value"] <= mean["ci_high"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kill, only", [(os.kill, "rows"), (os.killpg, "pretrain")])     # as SLURM does
def test_sigterm_lets_the_step_save_and_the_same_command_goes_on(project, demo, kill, only):
    out = f"stop#ped {kill.__name__}'s"
    command = ["bash", "run_all.sh", "--demo", "--scale", "0.1", "--exp", "3.3", "--data", DATA,
               "--out", out, "--tests", "nih_test", "--nproc", "1", "--only", only]
    rows = project / "experiments.yaml"
    text, times = rows.read_text(), rows.stat()
    rows.write_text(text.replace("batch: 16, epochs: 2", "batch: 16, epochs: 8"))
    try:
        with open(project / f"{out}.txt", "w") as output:
            chain = subprocess.Popen(command, cwd=project, stdout=output, stderr=output, env=ENV,
                                     start_new_session=True)
            log = project / out / PLACE / "runs/3.3/pretrain/backbone.pt.log"
            while not (log.exists() and "steps 0 to" in log.read_text()):
                assert chain.poll() is None
                time.sleep(0.05)
            time.sleep(1)                                       # somewhere in the first steps
            kill(chain.pid, signal.SIGTERM)
            assert chain.wait(60) == 75
        said = (project / f"{out}.txt").read_text()
        assert "stopped in" in said and "3.3/pretrain/backbone.pt" in said and "error" not in said
        again = run_all(project, *command[2:])
    finally:
        rows.write_text(text)
        os.utime(rows, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"steps (\d+) to", log.read_text())[1]) > 0            # not from the beginning
    tested = {path.name for path in (project / out).rglob("predictions/*/*.csv")}
    assert tested == ({"nih_val.csv", "nih_test.csv"} if only == "rows" else set())


@pytest.mark.slow
def test_slurm_jobs_are_chained_and_do_what_the_chain_does(project, demo, tmp_path):
    """With stand-ins for SLURM's commands: sbatch runs the job at once, srun its command."""
    before = state(project)
    result = run_all(project, "--demo", "--scale", 0.1, "--exp", EXP, "--slurm", tmp_path / "jobs")
    assert result.returncode == 0 and "hands in 2 rows" in result.stdout    # a row and the one it starts from
    (tmp_path / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "sbatch").write_text("""#!/bin/bash
        echo "$@" >> "$QUEUE/submitted"
        id=$(wc -l < "$QUEUE/submitted")
        echo "$id;cluster"                          # as where there are several
        while [[ $1 = --* ]]; do shift; done
        bash "$@" > "$QUEUE/$id.out" 2>&1 || touch "$QUEUE/failed"
    """)
    for name in ("srun", "sbatch"):
        (tmp_path / name).chmod(0o755)
    env = {**ENV, "QUEUE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "jobs/submit.sh", "--account=me"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert done.returncode == 0 and not (tmp_path / "failed").exists(), done.stderr
    assert all("--account=me" in line for line in submitted)
    # without it a job whose forerunner failed waits for ever
    assert all(("--dependency=" in line) == ("--kill-on-invalid-dep=yes" in line) for line in submitted)
    jobs = [(re.search(r"--dependency=(\S+)", line), line.split("job.sh ")[1]) for line in submitted]
    assert [(after and after[1], what) for after, what in jobs] == [
        (None, "--only data"), ("afterok:1", "--only pretrain --exp c.0"),
        ("afterok:1:2", f"--only rows --exp {EXP}"), ("afterok:2:3", "--only results")] or jobs[3][0][1] == "afterok:3:2"
    names = [re.search(r"--job-name=(\S+)", line)[1] for line in submitted]
    assert names == ["data", "c.0", EXP, "results"]                 # what squeue and the logs show
    assert f"{EXP}/pretrain/backbone.pt is complete" in (tmp_path / "3.out").read_text()
    assert "c.0/pretrain/backbone.pt is complete" in (tmp_path / "2.out").read_text()
    assert state(project) == before             # nothing but what the chain does: c.0 is not fine-tuned


def test_a_slurm_job_has_the_python_of_its_submission_and_all_its_cpus(project, tmp_path):
    """With a stand-in for srun that only notes what it sees; a job that was stopped is queued again, no other."""
    python = tmp_path / "my py#thon's"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "srun").write_text("""#!/bin/bash
        printf '%s\\n' "$PYTHON" "$SRUN_CPUS_PER_TASK" "$PWD" "$@" > "$QUEUE/seen"
        exit "$CODE"
    """)
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$CODE $@" >> "$QUEUE/again"\n')
    for file in (python, tmp_path / "srun", tmp_path / "scontrol"):
        file.chmod(0o755)
    made = run_all(project, "--exp", "2.1", "--slurm", tmp_path / "jobs", env={**ENV, "PYTHON": str(python)})
    assert made.returncode == 0, made.stderr
    env = {**ENV, "QUEUE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "123",
           "SLURM_CPUS_PER_TASK": "12"}
    env.pop("PYTHON")
    for code in ("0", "2", "75"):
        job = subprocess.run(["bash", tmp_path / "jobs/job.sh", "--only", "data"], cwd=tmp_path, env={**env, "CODE": code})
        assert job.returncode == int(code)
        assert (tmp_path / "seen").read_text().splitlines() == [
            str(python), "12", str(project), "bash", "run_all.sh", "--exp", "2.1", "--only", "data"]
    assert (tmp_path / "again").read_text() == "75 requeue 123\n"


@pytest.mark.slow
def test_two_nodes_are_two_launchers_that_meet(project, demo):
    """An arm on two torchrun agents of this machine, as on two nodes: what one process writes."""
    def on_two(*command):
        port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                    f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=study", "--local_addr=127.0.0.1"]
        running = [subprocess.Popen([sys.executable, *launcher, *command], cwd=project, env=ENV, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
        said = [node.communicate(timeout=120)[0] for node in running]
        assert [node.returncode for node in running] == [0, 0] and "on 2 x cpu" in "".join(said), said

    def on_one(*command):
        done = fork_script(*command, "--experiments", project / "experiments.yaml", cwd=project)
        assert done.returncode == 0, done.stderr

    row = ["--exp", "3.3", "--miniature", "true", "--data", DATA, "--device", "cpu"]
    for out, run in (("on1", on_one), ("on2", on_two)):
        run("pretrain/gmml.py", *row, "--steps", "6", "--out", f"{out}/pretrain")
        run("finetune/classify.py", *row, "--seeds", "0", "--steps", "4", "--out", f"{out}/finetune",
            "--init", f"{out}/pretrain/backbone.pt")
    for name in ("pretrain/backbone.pt", "finetune/seed0/classifier.pt"):
        one, two = (torch.load(project / out / name, weights_only=True)["model"] for out in ("on1", "on2"))
        assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5, name


def test_dry_run_prints_commands_and_runs_nothing(project):
    result = run_all(project, "--exp", "3.4,0.1.6b", "--dry-run", "--data", "pa cks", "--nproc", 4)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and not (project / "pa cks").exists(), result.stderr
    assert sum("pretrain/gmml.py --exp 3.4" in line and "--nproc_per_node=4" in line for line in lines) == 1
    assert any("pretrain/simmim.py --exp 0.1.6 " in line for line in lines)     # 0.1.6b starts from 0.1.6
    assert not any("classify.py --exp 0.1.6 " in line for line in lines)        # which was not asked for
    packing = [line for line in lines if "data_prep/pack.py" in line and "--out pa\\ cks/nih --size" in line]
    assert len(packing) == 1


def test_a_sample_has_images_to_spare_for_files_that_cannot_be_read(project):
    rows = yaml.safe_load((project / "experiments.yaml").read_text())
    readers = [line for line in run_all(project, "--exp", "*", "--only", "data", "--dry-run").stdout.splitlines()
               if "/index.csv" in line and "pack.py" not in line]
    drawn = {re.search(r"--out data/(\w+)/index", line)[1]: re.findall(r"--n-pretrain (\w+)", line) for line in readers}
    for exp, row in rows.items():
        pretrain = row.get("pretrain", {}) if exp[0].isdigit() or exp.startswith("c.") else {}
        if pretrain:
            [size] = drawn[pretrain.get("dataset", "nih_pretrain")]
            assert size == "all" or int(size) == pretrain.get("samples", 100_000) + 100 or int(size) == 250_100, exp


def test_the_name_of_a_row_may_hold_blanks(project, tmp_path):
    rows = project / "experiments.yaml"
    text, times = rows.read_text(), rows.stat()
    rows.write_text(text + '"my row": {init: "exp:3.3", pretrain: {strategy: gmml}}\n"its child": {init: "exp:my row"}\n')
    lines = run_all(project, "--exp", "my row", "--only", "rows", "--dry-run").stdout.splitlines()
    made = run_all(project, "--exp", "its child", "--slurm", tmp_path / "jobs")
    rows.write_text(text)
    os.utime(rows, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [re.search(r"(\w+)\.py", line)[1] for line in lines] == ["gmml", "gmml", "classify", "predict"]
    assert "--exp my\\ row " in lines[1] and "--init runs/3.3/pretrain/backbone.pt" in lines[1]
    assert made.returncode == 0, made.stderr
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s|" "$@" >&2\necho >&2\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    env = {**ENV, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    jobs = subprocess.run(["bash", tmp_path / "jobs/submit.sh"], env=env, capture_output=True, text=True)
    assert jobs.returncode == 0, jobs.stderr
    assert "--job-name=its child|--kill-on-invalid-dep=yes|--dependency=afterok:7:7|job.sh|--only|rows|--exp|its child|" in jobs.stderr


def test_results_alone_name_every_pack_that_the_rows_read(project):
    lines = run_all(project, "--exp", "3.5", "--only", "results", "--dry-run").stdout.splitlines()
    assert [re.search(r"(\w+)\.py", line)[1] for line in lines] == [
        "metrics", "compare", "compare", "describe", "report"]
    packs = lines[3].split("--packs ")[1].split(" --out")[0].split()
    assert packs == [f"data/{name}" for name in ("nih", "vindr_cxr", "padchest", "chexpert", "oct")]


def test_stand_ins_are_few_so_every_sample_takes_them_all(project):
    rows = "2.3,3.1,3.2,3.3,3.5,3.7,0.2.2,0.2.3,c.0"
    lines = run_all(project, "--demo", "--exp", rows, "--only", "data", "--dry-run").stdout.splitlines()
    readers = {re.search(r"data/demo/(\w+)/index.csv", line)[1]: line for line in lines if "--out data/demo" in line
               and "index.csv" in line and "pack.py" not in line}
    drawn = {name for name, line in readers.items() if line.rstrip().endswith("--n-pretrain all")}
    assert drawn == set(readers) - {"nih", "vindr_cxr", "padchest", "chexpert"} and len(drawn) == 8


@pytest.mark.slow
def test_folders_and_python_may_have_blanks_and_quotes_in_their_names(project, tmp_path):
    python = tmp_path / "my py#thon's"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    flags = ["--demo", "--only", "data", "--exp", "2.1", "--tests", "nih_test", "--scale", 0.02]
    flags += ["--data", "pa cks #1's", "--raw", "ra w#'s"]
    result = run_all(project, *flags, env={**ENV, "PYTHON": str(python)})
    assert result.returncode == 0, result.stderr
    images = np.load(project / "pa cks #1's/nih/images.npy", mmap_mode="r")
    assert len(images) > 3 and (project / "ra w#'s/nih/Data_Entry_2017_v2020.csv").exists()
    # At another scale into the same folder: drawn and packed anew.
    flags[flags.index("--scale") + 1] = 0.03
    assert run_all(project, *flags).returncode == 0
    assert len(np.load(project / "pa cks #1's/nih/images.npy", mmap_mode="r")) > len(images)
    assert all(line.endswith("is complete") for line in run_all(project, *flags).stdout.splitlines())


def test_a_dry_run_at_another_scale_leaves_the_demo_as_it_is(project, demo):
    before = state(project)
    assert "demo.py" in run_all(project, "--demo", "--scale", 0.2, "--dry-run").stdout
    assert state(project) == before


def test_the_open_half_says_what_to_fetch_and_packs_it(project):
    lines = run_all(project, "--open", "--dry-run").stdout.splitlines()
    packs = {re.search(r"--out (\S+)", line)[1]: line for line in lines if "medmnist.py" in line}
    assert {Path.split("/")[-1]: re.search(r"(\w+)_224", line)[1] for Path, line in packs.items()} == {
        "nih": "chestmnist", "pneumonia": "pneumoniamnist", "nih_pretrain": "chestmnist", "oct": "octmnist"}
    assert sum("pretrain/gmml.py" in line for line in lines) == 4 and not any("--miniature" in line for line in lines)
    result = run_all(project, "--open")
    assert result.returncode == 2 and "fetch chestmnist_224.npz" in result.stderr


def test_the_whole_grid_is_planned(project):
    planned = run_all(project, "--dry-run").stdout
    assert "--exp 4.1.1-250k" in planned and "--exp c.1 " not in planned
    assert "--exp c.9 " in run_all(project, "--exp", "*", "--dry-run").stdout


@pytest.mark.parametrize("flags, fragment", [
    (["--exp", "3.44"], "no experiment '3.44'; nearest: 3.4"), (["--fast"], "unknown option --fast"),
    (["--nproc", "two"], "not a number of processes"), (["--exp"], "--exp needs a value"),
    (["--dry-run", "--exp", ""], "--exp needs a value"), (["--data", "--dry-run"], "--data needs a value"),
    (["--tests", "nih_tets"], "--tests has no nih_tets"), (["--only", "some"], "--only is some"),
    (["--tests", "nih_val"], "--tests has no nih_val"),             # which chooses the epoch
    (["--scale", "0.1", "--exp", "2.1"], "--scale goes with --demo"), (["--rates", "gpu.json"], "--rates with --plan"),
    (["--demo", "--open"], "exclude each other"), (["--plan", "--demo"], "exclude each other"),     # of full size
    (["--dry-run", "--open", "--plan"], "exclude each other")])
def test_mistakes_on_the_command_line(project, flags, fragment):
    result = run_all(project, *flags)
    assert result.returncode == 2 and fragment in result.stderr.strip().splitlines()[-1]


def test_a_python_without_torch_is_one_sentence(project, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho Traceback >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    result = run_all(project, env={**ENV, "PYTHON": str(tmp_path / "python")})
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path}/python has no torch")
    assert result.stderr.count("\n") == 1


# The chain's own logic, with scripts that only write down their names and make their files

STUB = '''#!{python}
import os, re, sys
from pathlib import Path
if sys.argv[1] == "-c":
    sys.exit(print(0))
if sys.argv[1] == "evaluate/plan.py":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
line = " ".join(sys.argv[1:])
name = Path(sys.argv[1]).stem
out = Path(sys.argv[sys.argv.index("--out") + 1])
with open("{calls}", "a") as calls:
    calls.write(name + "\\n")
if name == os.environ.get("FAIL"):
    sys.exit("error: it fails")
made = {{"pack": ["manifest.csv"], "medmnist": ["manifest.csv"], "gmml": ["backbone.pt"],
        "simmim": ["backbone.pt"],
        "classify": [f"seed{{seed}}/classifier.pt" for seed in (0, 11, 21, 42, 100)], "compare": ["verdicts.csv"],
        "describe": ["figure1.svg", "overlaps.csv"], "report": ["report.html"]}}.get(name, [""])
files = [out / file for file in made]
if name == "predict":
    tests = re.findall("--set (\\\\w+)=", line)
    files = [Path(str(out).format(seed=seed), f"{{test}}.csv") for seed in (0, 11, 21, 42, 100) for test in tests]
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line)
if os.environ.get("TOUCH") == name:
    Path(os.environ["TOUCHED"]).touch()
'''


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_sigterm_before_the_first_step_asks_to_go_on_as_later_ones_do(project, tmp_path, kill):
    (tmp_path / "python").write_text(f"#!/bin/sh\ntouch '{tmp_path}/begun'\nsleep 1\necho 0\n")
    (tmp_path / "python").chmod(0o755)
    chain = subprocess.Popen(["bash", "run_all.sh", "--exp", "2.1", "--data", tmp_path / "data"], cwd=project,
                             start_new_session=True, env={**ENV, "PYTHON": str(tmp_path / "python")},
                             stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    kill(chain.pid, signal.SIGTERM)
    said = chain.communicate(timeout=30)[1]
    assert chain.returncode == 75 and "error" not in said and not (tmp_path / "data").exists()


@pytest.fixture
def chain(project, tmp_path):
    """Call run_all.sh with the stub. Returns: the names of the scripts it ran, or its mistake."""
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(STUB.format(python=sys.executable, calls=calls))
    python.chmod(0o755)

    def call(*flags, **env):
        calls.write_text("")
        result = run_all(project, "--data", tmp_path / "data", "--out", tmp_path / "out", "--tests", "nih_test",
                         *flags, env={**ENV, "PYTHON": str(python), **env})
        return calls.read_text().split() if result.returncode == 0 else result.stderr
    return call


def test_a_step_runs_again_when_its_command_changes(chain, tmp_path):
    assert chain("--exp", "2.1") == ["nih", "pack", "classify", "predict", "metrics", "compare", "compare",
                                     "describe", "report"]
    assert chain("--exp", "2.1") == []
    assert chain("--exp", "2.2") == ["classify", "predict", "metrics", "compare", "report"]
    assert "2.2/predictions" in (tmp_path / "out/results/metrics.csv").read_text()
    assert chain("--exp", "2.1") == ["metrics", "compare", "report"]
    assert "2.1/predictions" in (tmp_path / "out/results/metrics.csv").read_text()
    assert chain("--exp", "2.1", "--nproc", 2) == []                # the same command on more processes


def test_other_claims_are_judged_anew_and_reported(chain, project):
    chain("--exp", "2.1")
    (project / "evaluate/reported/claims.csv").touch()
    assert chain("--exp", "2.1") == ["compare", "compare", "report"]            # ours, the published numbers
    assert chain("--exp", "2.1") == []


def test_the_report_shows_overlaps_where_a_row_pretrains_on_a_pack(chain, tmp_path):
    report = tmp_path / "out/results/report.html"
    chain("--exp", "2.1,0.2.3")                                     # which reads the files themselves
    assert "--overlaps" not in report.read_text()
    chain("--exp", "2.1,3.1")
    assert f"--overlaps {report.parent}/figures/overlaps.csv" in report.read_text()


def test_a_step_that_failed_runs_again_though_an_older_run_ended_well(chain):
    chain("--exp", "2.1")
    assert "metrics.csv was not made" in chain("--exp", "2.2", FAIL="metrics")
    assert chain("--exp", "2.1") == ["metrics", "compare", "report"]


def test_an_input_that_changes_while_its_step_runs_is_newer(chain, tmp_path):
    index = tmp_path / "data/nih/index.csv"
    chain("--exp", "2.1", TOUCH="pack", TOUCHED=str(index))
    assert chain("--exp", "2.1")[0] == "pack"
    assert chain("--exp", "2.1") == []


def test_the_index_is_made_again_until_its_images_are_packed(chain, tmp_path):
    assert "manifest.csv was not made" in chain("--exp", "2.1", FAIL="pack")
    assert chain("--exp", "2.1", "--only", "data") == ["nih", "pack"]
    assert chain("--exp", "2.1", "--only", "data") == []


def test_an_index_made_by_hand_is_not_the_chains(chain, tmp_path):
    (tmp_path / "data/nih").mkdir(parents=True)
    (tmp_path / "data/nih/index.csv").write_text("path\n")
    assert chain("--exp", "2.1", "--only", "data") == ["nih", "pack"]
    (tmp_path / "data/nih/index.csv").write_text("path\n")          # pack.py compares it with the one it packed
    assert chain("--exp", "2.1", "--only", "data") == ["pack"]


def test_a_folder_that_cannot_be_made_is_one_sentence(project, tmp_path):
    (tmp_path / "data").write_text("a file")
    result = run_all(project, "--exp", "2.1", "--data", tmp_path / "data")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and f"{tmp_path}/data" in result.stderr


def test_pretraining_alone_is_no_fine_tuning(chain):
    assert chain("--exp", "3.1", "--only", "data") == ["nih", "pack", "nih", "pack"]
    assert chain("--exp", "3.1", "--only", "pretrain") == ["gmml"]
    assert chain("--exp", "3.1", "--only", "rows") == ["classify", "predict"]


def test_rows_that_share_a_parent_leave_it_alone_side_by_side(chain, project):
    assert chain("--exp", "0.1.6", "--only", "data")[:2] == ["nih", "pack"]
    assert chain("--exp", "0.1.6b", "--only", "rows") == ["simmim", "classify", "predict"]      # there is none yet
    assert chain("--exp", "0.1.6b", "--only", "rows") == []
    (project / "experiments.yaml").touch()
    assert chain("--exp", "0.1.6b", "--only", "rows") == ["classify", "predict"]
    assert chain("--exp", "0.1.6b,0.1.6", "--only", "rows")[0] == "simmim"      # it was asked for
    (project / "experiments.yaml").touch()
    assert chain("--exp", "0.1.6b")[0] == "simmim"


def test_finished_packs_of_the_open_half_need_no_download(chain, tmp_path):
    raw = tmp_path / "files"
    assert "fetch chestmnist_224.npz" in chain("--open", "--exp", "2.1", "--raw", raw)
    raw.mkdir()
    (raw / "chestmnist_224.npz").touch()
    assert chain("--open", "--exp", "2.1", "--raw", raw, "--only", "data") == ["medmnist"]
    (raw / "chestmnist_224.npz").unlink()
    assert chain("--open", "--exp", "2.1", "--raw", raw, "--only", "rows") == ["classify", "predict"]


def test_a_download_that_is_not_complete_stops_the_chain_and_the_same_command_goes_on(project, tmp_path):
    raw = tmp_path / "raw/nih"
    (raw / "images").mkdir(parents=True)
    names = [f"0000000{i}_000.png" for i in range(1, 7)]
    header = "Image Index,Finding Labels,Patient Age,Patient Gender,View Position\n"
    (raw / "Data_Entry_2017_v2020.csv").write_text(header + "".join(f"{name},Mass,50,F,PA\n" for name in names))
    for split, some in (("train", names[:2]), ("val", names[2:4]), ("test", names[4:])):
        (raw / f"{split}_list.txt").write_text("\n".join(some))

    def download(names, folder="images"):
        (raw / folder).mkdir(exist_ok=True)
        for name in names:
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(raw / folder / name)

    command = ["--exp", "2.1", "--tests", "nih_test", "--only", "data", "--raw", raw.parent, "--data", tmp_path / "data"]
    download(names[:4])
    result = run_all(project, *command)
    assert result.returncode == 2 and "missing; complete the download" in result.stdout, result.stderr
    assert not (tmp_path / "data/nih/manifest.csv").exists()
    download(names[4:], "images_002")                               # elsewhere than the index of before said
    assert run_all(project, *command).returncode == 0
    assert list(pd.read_csv(tmp_path / "data/nih/manifest.csv").path) == [
        f"{'images' if name in names[:4] else 'images_002'}/{name}" for name in names]
    assert all(line.endswith("is complete") for line in run_all(project, *command).stdout.splitlines())


@pytest.mark.parametrize("there, made", [
    ([], True), (["bin/python"], False), (["requirements.txt", "old"], True)])
def test_a_virtual_environment_of_somebody_else_is_left_alone(project, tmp_path, there, made):
    """With a stand-in for python3 that makes the environment's python, which pip's command fails under FAIL."""
    for name in there:
        (tmp_path / ".venv" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv" / name).write_text("theirs")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    (tmp_path / "python3").write_text("""#!/bin/sh
        [ "$1" = -m ] || exit 0
        mkdir -p .venv/bin
        printf '#!/bin/sh\\n[ -z "$FAIL" ]' > .venv/bin/python
        chmod +x .venv/bin/python
    """)
    (tmp_path / "python3").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("PYTHON", None)

    def set_up(**more):
        command = ["bash", "-euc", f'. "{project}/tests/setup_env.sh"; echo "$PYTHON"']
        return subprocess.run(command, cwd=tmp_path, env=env | more, capture_output=True, text=True)

    result = set_up(FAIL="1")
    assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
    if not made:
        assert ".venv was not made" in result.stderr and (tmp_path / ".venv/bin/python").read_text() == "theirs"
        return
    assert "pip could not install" in result.stderr                 # and the half of it is no obstacle
    result = set_up()
    assert result.returncode == 0 and result.stdout.endswith(".venv/bin/python\n")
    assert not (tmp_path / ".venv/old").exists() and set_up().stdout == ".venv/bin/python\n"


def test_the_first_failure_stops_the_chain_with_output_and_log(project):
    result = run_all(project, "--exp", "2.1", "--raw", "nowhere", "--data", "elsewhere")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: elsewhere/nih/index.csv was not made (exit code 2)")
    log = re.search(r"its log is (\S+)$", last)[1]
    assert "error: " in (project / log).read_text() and "data_prep/nih.py --raw nowhere/nih" in result.stdout


def test_the_plan_names_costs_and_missing_inputs(project):
    result = run_all(project, "--plan", "--exp", "3.4,4.1.1-50k,0.1.4")
    assert result.returncode == 0, result.stderr
    row = next(line.split() for line in result.stdout.splitlines()
               if line.split()[:2] == ["3.4", "pretrain"])
    assert row[2] == "390,000" and row[3] == "99,840,000"       # 100,000 // 256 steps an epoch, 1,000 epochs
    # ViT-S/16: 4.6 billion multiply-adds, two views, backward twice the forward
    assert abs(float(row[4].replace(",", "")) * 1e15 / (99_840_000 * 6 * 2 * 4.6e9) - 1) < 0.03
    missing = result.stdout.partition("missing:")[2].split()
    assert "weights/simmim_pretrain__swin_base__img192_window6__800ep.pth" in missing


def test_a_reader_that_leaves_ends_the_plan_without_a_word(project):
    command = [sys.executable, "evaluate/plan.py", "--exp", "2.1"]
    plan = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    plan.stdout.close()                                             # as `| head` does
    assert plan.stderr.read() == "" and plan.wait() == -signal.SIGPIPE
