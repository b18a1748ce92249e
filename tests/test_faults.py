"""Long runs under attack: killed at random moments they end in the same bytes; no other fault loses anything.

KILLS (default 2): how often each script is killed, as in KILLS=20 bash tests/run.sh tests/test_faults.py
"""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, blobs, load_script, log_of, run_here, write_pack
from PIL import Image

KILLS = int(os.environ.get("KILLS", 2))
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY = ["--model_args", json.dumps(MODEL), "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1,
        "--save-minutes", 0]
TRAIN = ["--manifest", "{data}/manifest.csv", "--out", "{out}", *TINY, "--batch", 8, "--epochs", 4,
         "--picture-epochs", 2]
SETS = [word for name in ("train", "val", "all")
        for word in ("--set", f"{name}={{data}}/manifest.csv:{name}")]
TINY_HEAD = ["--hidden_dim", 32, "--out_dim", 16]
RUNS = {                            # every long-running script, and a command that takes some seconds
    "pack": ["data_prep/pack.py", "--index", "{data}/index.csv", "--raw", "{data}/raw", "--out", "{out}",
             "--size", 32, "--workers", 2],
    "gmml": ["pretrain/gmml.py", *TRAIN],
    "sit": ["pretrain/sit.py", *TRAIN, *TINY_HEAD],
    "dino": ["pretrain/dino.py", *TRAIN, *TINY_HEAD, "--bottleneck_dim", 16, "--n_local_crops", 2],
    "moco_v3": ["pretrain/moco_v3.py", *TRAIN, *TINY_HEAD],
    "simmim": ["pretrain/simmim.py", *TRAIN, "--mask_unit", 8],
    "supervised": ["pretrain/supervised.py", *TRAIN],
    "classify": ["finetune/classify.py", "--train", "{data}/manifest.csv", "--out", "{out}", *TINY,
                 "--batch", 12, "--epochs", 3, "--seeds", "0,1"],
    "predict": ["evaluate/predict.py", "--checkpoint", "{data}/classifier.pt", "--out", "{out}", "--batch", 1,
                *SETS],
}
TRAINING = [name for name in RUNS if name not in ("pack", "predict")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Inputs of all the commands: raw files with an index, some of them bad; a pack; a classifier."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "raw").mkdir()
    big = Image.fromarray(blobs(1)[0]).resize((1500, 1500))
    big.save(folder / "raw/0.png")
    (folder / "raw/bad.png").write_bytes((folder / "raw/0.png").read_bytes()[:9999])
    for i in range(1, 2 * min(KILLS, 20) ** 2):         # for many kills so much that pack commits in between
        os.link(folder / "raw/0.png", folder / f"raw/{i}.png")
    files = pd.DataFrame({"path": sorted(os.listdir(folder / "raw")) + ["none.png"], "split": "train"})
    files.to_csv(folder / "index.csv", index=False)
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, 2, 64) for name in "AB"}
    write_pack(folder, blobs(64), split=["pretrain"] * 24 + ["train"] * 24 + ["val"] * 16, **labels)
    facts = dict(arch="vit_small_patch16_224", model_args=MODEL, in_chans=1, img_size=32, mean=[0.485],
                 std=[0.229], labels=["A", "B"])
    model = timm.create_model(facts["arch"], in_chans=1, num_classes=2, **MODEL)
    torch.save(dict(model=model.state_dict(), **facts), folder / "classifier.pt")
    return folder


def words(name, data, out, *flags):
    """Script and command line of a run."""
    places = {"{data}": str(data), "{out}": str(out)}
    return [re.sub("{data}|{out}", lambda place: places[place[0]], str(word))
            for word in (*RUNS[name], *flags)]


# Imports what the scripts import, then forks for every line of its input (log, command): a run without the
# seconds of importing. Answers with the process id, later with the exit code.
FORK = """
import json, os, runpy, sys
import matplotlib.pyplot, pandas, sklearn.metrics, timm, torch, torchvision
for line in sys.stdin:
    log, sys.argv = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """A process that forks runs."""
    process = subprocess.Popen([sys.executable, "-c", FORK], text=True, bufsize=1, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait()


class Run:
    """A command running as the leader of its own process group, its output in the file `log`."""

    def __init__(self, forks, command, log):
        log.unlink(missing_ok=True)
        self.forks, self.log, self.code = forks, log, None
        print(json.dumps([str(log), [str(ROOT / command[0]), *command[1:]]]), file=forks.stdin)
        self.pid = int(forks.stdout.readline())

    def ends_within(self, seconds):
        """Wait so long; whether it has ended, its exit code is then in `code`."""
        if self.code is None and select.select([self.forks.stdout], [], [], seconds)[0]:
            self.code = int(self.forks.stdout.readline())
        return self.code is not None

    def says_something(self):
        """Wait for its first output, or its end."""
        while not (self.log.exists() and self.log.stat().st_size) and not self.ends_within(0.01):
            pass

    def kill(self):
        """SIGKILL for the whole group; whether it was in time."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self.ends_within(60)
        return self.code == -signal.SIGKILL


def plain(value):
    """The content of a checkpoint in comparable form, tensors as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def content(folder):
    """{file name: what a rerun has to reproduce}: bytes, but of logs no times and of run.json no command."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.name == "log.jsonl":
            value = [{key: cell for key, cell in line.items() if key not in ("time", "img_per_s")}
                     for line in log_of(path.parent)]
        elif path.name == "run.json":
            value = {key: cell for key, cell in json.loads(value).items() if key != "command"}
        elif path.name == "last.pt":
            value = plain(torch.load(path, weights_only=True))
        found[str(path.relative_to(folder))] = value
    return found


def assert_same(folder, expected):
    found = content(folder)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(name, data, forks, tmp_path):
    log, out, begun = tmp_path / "log", tmp_path / "cut/run", time.monotonic()
    whole = Run(forks, words(name, data, tmp_path / "whole/run"), log)
    whole.says_something()
    first = time.monotonic() - begun
    assert whole.ends_within(300) and whole.code == 0, log.read_text()
    seconds, expected = time.monotonic() - begun, content(tmp_path / "whole/run")
    assert not [path for path in expected if path.endswith((".part", ".tmp"))]
    for path, lines in expected.items():
        if path.endswith("log.jsonl"):
            assert [line["step"] for line in lines if "lr" in line] == list(range(1, lines[-1]["step"] + 1))

    rng, kills, runs = np.random.default_rng(zlib.crc32(name.encode())), 0, 1
    while kills < KILLS:
        run = Run(forks, words(name, data, out), log)
        if not run.ends_within(rng.uniform(0, seconds)) and run.kill():
            kills += 1
        else:                                           # faster than the shot: check, begin anew
            assert run.code == 0, log.read_text()
            assert_same(out, expected)
            shutil.rmtree(out)
            runs += 1
    last = Run(forks, words(name, data, out), log)
    assert last.ends_within(300) and last.code == 0, log.read_text()
    assert_same(out, expected)
    print(f"{name}: {kills} kills over {runs} runs of {seconds:.1f} s ({first:.1f} s to the first word)")


# Faults within one run: main() in this process

def run(name, data, out, monkeypatch, *flags):
    """A run in this process, as its command line would do it. Returns: exit code, last line on stderr."""
    script, *line = words(name, data, out, *flags)
    stderr, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            run_here(load_script(script), monkeypatch, *line)
    except SystemExit as stop:
        return stop.code, stderr.getvalue().strip().split("\n")[-1]
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0, stderr.getvalue()


def run_folder(name, out):
    return out / "seed0" if name == "classify" else out


@pytest.mark.parametrize("name", TRAINING)
def test_sigterm_saves_at_the_end_of_the_step_and_leaves_with_75(name, data, tmp_path, monkeypatch):
    line = load_script(RUNS[name][0]).Progress.line

    def terminate(self, step, *args, **facts):
        line(self, step, *args, **facts)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(load_script(RUNS[name][0]).Progress, "line", terminate)
    assert run(name, data, tmp_path, monkeypatch, "--save-minutes", 60) == (75, "")
    folder = run_folder(name, tmp_path)
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    assert [line["step"] for line in log_of(folder) if "lr" in line] == [1, 2, 3]
    assert not (folder / "backbone.pt").exists() and not list(folder.glob("*.part"))


NO_NUMBERS = [                      # last step, flags, what is said
    (5, ["--save-minutes", 60], " after step 5"),                           # nothing is exported
    (None, ["--save-minutes", 0], " after step 5"),                         # saved, hence noticed at once
    (None, ["--save-minutes", 60, "--log-steps", 100], "step 6 is no number; {kept}")]


@pytest.mark.parametrize("name, case", [
    *((name, 0) for name in TRAINING), *((name, case) for name in ("gmml", "classify") for case in (1, 2))])
def test_weights_that_are_no_numbers_name_the_step_and_are_never_saved(name, case, data, tmp_path, monkeypatch):
    """The update of step 5 goes wrong, after three steps that were saved."""
    last_step, flags, says = NO_NUMBERS[case]
    flags = ["--seeds" if name == "classify" else "--seed", 0, "--epochs", 6, "--batch", 8, *flags]
    assert run(name, data, tmp_path, monkeypatch, "--steps", 3, *flags)[0] == 0
    folder = run_folder(name, tmp_path)
    update, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        update(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    code, error = run(name, data, tmp_path, monkeypatch, *flags, *["--steps", last_step] * bool(last_step))
    says = says.format(kept=f"{folder}/last.pt is the last good checkpoint")
    if name == "classify" and case == 2:                # validation looks at its outputs before
        says = "no number"
    assert code == 2 and error.startswith("error: ") and says in error, error
    assert torch.load(folder / "last.pt", weights_only=True)["step"] in (3, 4)
    for file in folder.glob("*.pt"):
        weights = torch.load(file, weights_only=True)
        assert all(value.isfinite().all() for part in weights.values() if isinstance(part, dict)
                   for value in part.values() if isinstance(value, torch.Tensor)), file
    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    assert run(name, data, tmp_path, monkeypatch, *flags)[0] == 0           # goes on where numbers were good


@pytest.mark.parametrize("name", ["gmml", "classify"])
def test_other_images_are_not_taken_for_those_of_the_checkpoint(name, data, tmp_path, monkeypatch):
    moved = tmp_path / "data"
    shutil.copytree(data, moved, ignore=shutil.ignore_patterns("raw"))
    assert run(name, moved, tmp_path / "run", monkeypatch, "--steps", 3)[0] == 0
    before = content(tmp_path / "run")
    shutil.copy(moved / "manifest.csv", tmp_path)
    text = (moved / "manifest.csv").read_text()
    (moved / "manifest.csv").write_text(text[:-2] + {"0": "1", "1": "0"}[text[-2]] + "\n")
    code, error = run(name, moved, tmp_path / "run", monkeypatch, "--steps", 3)
    assert code == 2 and "was made with data_sha256=" in error
    assert content(tmp_path / "run") == before
    shutil.copy(tmp_path / "manifest.csv", moved)
    assert run(name, moved, tmp_path / "run", monkeypatch, "--steps", 3)[0] == 0


def test_another_start_is_not_taken_for_that_of_the_checkpoint(data, tmp_path, monkeypatch):
    assert run("gmml", data, tmp_path / "start", monkeypatch, "--steps", 1)[0] == 0
    given = ["--init", tmp_path / "start/backbone.pt", "--steps", 2]
    assert run("gmml", data, tmp_path / "run", monkeypatch, *given)[0] == 0
    assert run("gmml", data, tmp_path / "start", monkeypatch, "--steps", 2)[0] == 0
    code, error = run("gmml", data, tmp_path / "run", monkeypatch, *given)
    assert code == 2 and "was made with init_sha256=" in error


def test_a_refused_run_leaves_the_record_of_the_one_before(data, tmp_path, monkeypatch):
    assert run("gmml", data, tmp_path, monkeypatch, "--steps", 2)[0] == 0
    before = content(tmp_path)
    assert run("gmml", data, tmp_path, monkeypatch, "--steps", 2, "--lr", 0.5)[0] == 2
    assert content(tmp_path) == before
    assert run("gmml", data, tmp_path, monkeypatch, "--steps", 2)[0] == 0   # nothing to do, nothing to record
    assert content(tmp_path) == before


def test_a_new_beginning_that_is_killed_does_not_go_on_from_the_run_before(data, tmp_path, monkeypatch):
    assert run("gmml", data, tmp_path / "whole", monkeypatch)[0] == 0
    assert run("gmml", data, tmp_path / "run", monkeypatch)[0] == 0
    module = load_script("pretrain/gmml.py")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("gmml", data, tmp_path / "run", patch, "--resume", "never")
    assert run("gmml", data, tmp_path / "run", monkeypatch)[0] == 0
    assert_same(tmp_path / "run", content(tmp_path / "whole"))


def test_a_run_needs_no_git(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("gmml", data, tmp_path / "run", monkeypatch, "--steps", 1)[0] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["commit"] == ""


def test_sigterm_ends_a_probe_too(data, tmp_path, monkeypatch):
    module = load_script("finetune/classify.py")
    whole = module.forward_all

    def terminate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args)
    monkeypatch.setattr(module, "forward_all", terminate)
    assert run("classify", data, tmp_path, monkeypatch, "--probe") == (75, "")
    assert not list(tmp_path.rglob("*.pt"))


def test_two_predictions_into_one_file_do_not_mix(data, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/train.csv.part", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, error = run("predict", data, tmp_path / "run", monkeypatch)
        assert code == 2 and "train.csv is being written by another run" in error
    assert run("predict", data, tmp_path / "run", monkeypatch)[0] == 0


@contextlib.contextmanager
def disk_full(size):
    """No file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", [*TRAINING, "predict"])       # pack: test_pack.py
def test_a_full_disk_is_one_sentence_with_the_path_and_loses_nothing(name, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if name != "predict":
        assert run(name, data, out, monkeypatch, "--steps", 3)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    sizes = (0, 100, 1000) if name == "predict" else (0, 100, 1000, 5000, 30000)     # each stops another file
    for size in sizes:
        with disk_full(size):
            code, error = run(name, data, out, monkeypatch)
        assert code == 2 and error.startswith("error: ") and str(out) in error, (size, error)
        assert not [path for path in out.rglob("*") if path.suffix in (".part", ".tmp")], size
        assert all(path.read_bytes() == content for path, content in before.items())
    assert run(name, data, out, monkeypatch)[0] == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_that_cannot_be_written_is_one_sentence(name, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, error = run(name, data, tmp_path / "file/run", monkeypatch)
    assert code == 2 and error.startswith("error: ") and str(tmp_path / "file/run") in error, error
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", TRAINING)
def test_a_clock_that_goes_backwards_changes_neither_saving_nor_rates(name, data, tmp_path, monkeypatch):
    module, saved, clock = load_script(RUNS[name][0]), [], iter(range(10 ** 9, 0, -3600))
    save = module.save_atomic
    monkeypatch.setattr(module, "save_atomic",
                        lambda value, path: (saved.append(value["step"]), save(value, path)))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert run(name, data, tmp_path, monkeypatch, "--steps", 3)[0] == 0
    assert {1, 2, 3} <= set(saved)
    rates = [line["img_per_s"] for line in log_of(run_folder(name, tmp_path)) if "lr" in line]
    assert len(rates) == 3 and all(0 < rate < 1e5 for rate in rates)


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_folder_says_what_made_it(name, data, tmp_path, monkeypatch):
    assert run(name, data, tmp_path, monkeypatch, "--steps", 1)[0] == 0
    facts = json.loads((run_folder(name, tmp_path) / "run.json").read_text())
    assert facts["command"][1:] == words(name, data, tmp_path, "--steps", 1)[1:] and facts["device"] == "cpu"
    assert [facts[name] for name in ("torch", "timm", "numpy")] == [
        torch.__version__, timm.__version__, np.__version__]
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert facts["commit"] == head.strip() and facts["config"]["seed"] == 0


@pytest.mark.parametrize("name", ["gmml", "classify", "predict"])
def test_the_number_of_decoding_threads_changes_no_byte(name, data, tmp_path, monkeypatch):
    loose = tmp_path / "loose"                          # no images.npy: files are read on the fly
    loose.mkdir()
    shutil.copy(data / "classifier.pt", loose)
    for i, image in enumerate(blobs(64)):
        Image.fromarray(image).save(loose / f"{i}.png")
    shutil.copy(data / "manifest.csv", loose)
    flags = [] if name == "predict" else ["--steps", 2]
    for n in (1, 3):
        assert run(name, loose, tmp_path / f"{n}/run", monkeypatch, *flags, "--workers", n)[0] == 0
    assert_same(tmp_path / "3/run", content(tmp_path / "1/run"))


@pytest.mark.parametrize("name", ["pack", "gmml", "classify"])
def test_a_second_run_is_refused_until_the_first_is_gone(name, data, forks, tmp_path, monkeypatch):
    long, short = ([], []) if name == "pack" else (["--epochs", 2000], ["--epochs", 2000, "--steps", 3])
    out, log = tmp_path / "run", tmp_path / "log"
    first = Run(forks, words(name, data, out, *long), log)
    while not list(out.rglob("*.part")):                # it writes, hence has the lock
        assert not first.ends_within(0.001), log.read_text()
    os.kill(first.pid, signal.SIGSTOP)
    code, error = run(name, data, out, monkeypatch, *long)
    assert code == 2 and "another run" in error and str(out) in error
    assert first.kill()
    again = Run(forks, words(name, data, out, *short), log)
    assert again.ends_within(300) and again.code == 0, log.read_text()


# Several processes

@contextlib.contextmanager
def torchrun(name, data, out, *flags):
    """A run of two processes: torchrun's Popen and a function that returns the ids of the two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1"]
    script, *line = words(name, data, out, *flags)
    with open(out.with_suffix(".log"), "w") as log:
        agent = subprocess.Popen([*command, ROOT / script, *line], stdout=log, stderr=log,
                                 start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    try:
        yield agent, lambda: map(int, children.read_text().split())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)


def wait_for_step(out, agent, step):
    """Wait until the log has the line of a step."""
    while not ((out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= step):
        assert agent.poll() is None, out.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_restarts_from_the_checkpoint_and_a_dead_process_ends_the_job_at_once(data, tmp_path):
    out = tmp_path / "run"
    with torchrun("gmml", data, out, "--epochs", 2000) as (agent, workers):
        wait_for_step(out, agent, 4)
        os.kill(min(workers()), signal.SIGKILL)                             # the process that writes
        begun = len(log_of(out))
        wait_for_step(out, agent, begun + 3)
        assert re.findall(r"steps (\d+) to", out.with_suffix(".log").read_text())[1:] != ["0"]
        os.kill(max(workers()), signal.SIGKILL)                             # no restart is left
        assert agent.wait(20) == 1
    said = out.with_suffix(".log").read_text()
    assert said.count("error: another process died") == 1 and "[rank" not in said       # no traceback of the others
    assert [line["step"] for line in log_of(out)] == list(range(1, len(log_of(out)) + 1))


@pytest.mark.slow
def test_sigterm_for_torchrun_saves_and_any_number_of_processes_goes_on(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with torchrun("gmml", data, out, "--epochs", 9) as (agent, _):
        wait_for_step(out, agent, 4)
        agent.terminate()
        assert agent.wait(20) == 1                      # torchrun's code, whatever its workers' is
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert 4 <= step < 27 and [line["step"] for line in log_of(out)] == list(range(1, step + 1))
    for folder in (out, tmp_path / "whole"):                                # one process
        assert run("gmml", data, folder, monkeypatch, "--epochs", 9)[0] == 0
    one, two = (torch.load(folder / "backbone.pt", weights_only=True)["model"]
                for folder in (tmp_path / "whole", out))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
