#!/usr/bin/env bash
# The whole study as a chain of commands a person could type: prepare, pack, pre-train, fine-tune, predict, metrics, report.
#
#   bash run_all.sh --demo               everything in miniature on drawn stand-ins: no download, no GPU, some minutes
#   bash run_all.sh --exp '3.4,4.*'      these rows of experiments.yaml, with the data they need
#   bash run_all.sh                      every row of the study (--exp all: and the controls), resumable, over days
#
#   --raw DIR     raw downloads, one folder a dataset (default raw)    --data DIR   packed data (default data)
#                 (with --demo: datasets that it has are used, only the others are drawn)
#   --out DIR     where runs/ and results/ go (default .)              --nproc N    processes (default: the GPUs here)
#   --tests LIST  test sets to predict, e.g. nih_test,chexpert_valid (default all five)
#   --dry-run     print the exact commands and run nothing             --plan       cost and inputs of every row
#   --only PART   data, rows or results: that part of the chain        --scale S    size of the demo's stand-ins
#   --slurm DIR   write a job script and DIR/submit.sh: data, then a job a row, each after those it needs, results
#
# A stage is skipped when its output is there and was made by the same command, row and content of its inputs. Stopped
# or killed, run it again; SIGTERM is passed on, and the exit code is then 75. PYTHON=python bash run_all.sh ... uses an
# environment that has the packages already.
set -euo pipefail
cd "$(dirname "$0")"

usage_error() { echo "error: $1; bash run_all.sh --help lists the options" >&2; exit 2; }
demo=0 exp="" raw="" data="" out="." nproc="" scale=1.0 tests="" only="" slurm="" dry=0 plan=0 given=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --demo) demo=1 ;;
    --dry-run) dry=1 ;;
    --plan) plan=1 ;;
    --exp | --raw | --data | --out | --nproc | --scale | --tests | --only | --slurm)
      [ $# -ge 2 ] || usage_error "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit 0 ;;
    *) usage_error "unknown option $1" ;;
  esac
  shift
done
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" != 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
fi
if [ -z "$nproc" ]; then        # the demo's networks are small: on CPUs two processes of one thread beat one of two
  nproc=$gpus
  if [ "$gpus" = 0 ]; then nproc=1; [ "$demo" = 1 ] && [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && nproc=2; fi
fi
[ "$nproc" -ge 1 ] 2>/dev/null || usage_error "--nproc is $nproc, not a number of processes"
case "$only" in "" | data | rows | results) ;; *) usage_error "--only is $only, not data, rows or results" ;; esac
if [ "$gpus" = 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
. tests/setup_env.sh

if [ "$plan" = 1 ]; then exec "$PYTHON" evaluate/plan.py ${exp:+--exp "$exp"} ${data:+--data "$data"}; fi

# The chain, worked out from experiments.yaml: one line a stage with part, name, output, key (a hash of command, row
# and the keys of the inputs), command and the stages' outputs that it reads, tab-separated.
stages=$("$PYTHON" - "$demo" "$exp" "$raw" "$data" "$out" "$nproc" "$scale" "$tests" "$slurm" "${given[@]}" <<'PY'
import difflib, fnmatch, hashlib, json, os, re, shlex, sys
from pathlib import Path
import yaml

demo, chosen, raw, data, out, nproc, scale, tests, slurm, *given = sys.argv[1:]
demo, nproc = demo == "1", int(nproc)
keep = " --keep" if demo and raw else ""       # what lies below a --raw that was given
data = data or (f"data/demo{f'-{Path(raw).name}' * bool(raw)}" if demo else "data")
raw = raw or (f"{data}/raw" if demo else "raw")
if demo and Path(raw, "demo.json").is_file() and json.loads(Path(raw, "demo.json").read_text())["scale"] != float(scale):
    sys.exit(f"error: {raw} has stand-ins of another scale than {scale}; give the same --scale or another --data")
runs, results = f"{out}/runs".removeprefix("./"), f"{out}/results{'/demo' if demo else ''}".removeprefix("./")
python, torchrun = "$PYTHON", f"$PYTHON -m torch.distributed.run --standalone --nproc_per_node={nproc}"
table = yaml.safe_load(open("experiments.yaml"))
defaults = table.pop("defaults")
if demo and not chosen:
    chosen = "demo.*"
elif chosen in ("", "all"):
    chosen = ",".join(key for key in table if key[0].isdigit() or chosen == "all" and key.startswith("c."))
chosen = [key for part in chosen.split(",") for key in fnmatch.filter(table, part) or [part]]

READERS = {     # packed folder: reader and its flags, packing flags
    "nih": ("nih", "", ""),
    "nih_pretrain": ("nih", "--pretrain all", ""),
    "nih_pretrain_trainval": ("nih", "--pretrain trainval --n-pretrain all", ""),
    "nih_pretrain_original": ("nih", "--pretrain all", "--size original"),
    "mimic_cxr": ("mimic_cxr", "--n-pretrain 250000", ""),
    "mimic_cxr_supervised": ("mimic_cxr", "--views frontal --labelled-only", ""),
    "chexpert": ("chexpert", "", "--splits val,test"),
    "padchest": ("padchest", "", ""),
    "vindr_cxr": ("vindr_cxr", "", "--splits test"),
    "covidx_ct": ("covidx_ct", "", "--splits pretrain"),
    "oct": ("oct", "", "--splits pretrain"),
    "imagenet": ("imagenet", "", "--splits pretrain --channels 3"),
}
TESTS = {"nih_val": ("nih", "val"), "nih_test": ("nih", "test"), "vindr_test": ("vindr_cxr", "test"),
         "padchest": ("padchest", "test"), "chexpert_test": ("chexpert", "test"), "chexpert_valid": ("chexpert", "val")}
if unknown := [name for name in tests.split(",") if tests and name not in TESTS]:
    sys.exit(f"error: --tests has no {unknown[0]}; choose from {', '.join(TESTS)}")
tests = ["nih_val", *(name for name in TESTS if name in tests.split(",") and name != "nih_val")] if tests else list(TESTS)
keys = {}       # output -> key of the stage that makes it


def stage(name, output, command, inputs=(), row=None, launcher=python):
    """Print a stage once; its key covers the command, the row and the keys of its inputs, not the launcher."""
    if output not in keys:
        facts = [command, row, [keys[file] for file in inputs]]
        keys[output] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        part = "rows" if name.split()[0] in table else "results" if output.startswith(f"{results}/") else "data"
        if not slurm:
            print(part, name, output, keys[output], f"{launcher} {command}", "|".join(inputs), sep="\t")
    return output


def packed(folder, size):
    reader, flags, packing = READERS[folder]
    if demo and (folder.startswith("nih_pretrain") or reader in ("mimic_cxr", "covidx_ct", "oct", "imagenet")):
        flags = re.sub("--n-pretrain \\S+", "", flags) + " --n-pretrain all"      # stand-ins are few: all are drawn
    here, inputs = f"{data}/{folder}", []
    if demo:
        inputs = [stage("demo data", f"{raw}/demo.json", f"data_prep/demo.py --out {raw} --scale {scale}{keep}")]
    index = stage(f"{folder} index", f"{here}/index.csv",
                  f"data_prep/{reader}.py --raw {raw}/{reader} --out {here}/index.csv {flags}".strip(), inputs)
    packing = packing if "--size" in packing else f"--size {size} {packing}"
    return stage(f"{folder} pack", f"{here}/manifest.csv",
                 f"data_prep/pack.py --index {index} --raw {raw}/{reader} --out {here} {packing}".strip(), [index])


def size_of(row, part):
    return (row.get(part) or {}).get("img_size") or row.get("img_size") or (row.get("model_args") or {}).get("img_size", 224)


def row_of(exp):
    if exp not in table:
        near = difflib.get_close_matches(exp, table, n=3)
        sys.exit(f"error: experiments.yaml has no experiment '{exp}'" + (f"; nearest: {', '.join(near)}" if near else ""))
    return table[exp]


def start(exp, row):
    """Flag and input file of a row's starting weights, where another row makes them."""
    init = row.get("init", defaults.get("init", "random"))
    if init.startswith("exp:"):
        backbone = pretrain(init[4:])
        return f" --init {backbone}", [backbone]
    return "", []


def pretrain(exp):
    row = row_of(exp)
    part = row["pretrain"]
    flag, inputs = start(exp, row)
    inputs = inputs + [packed(part["dataset"], 224 if not demo else size_of(row, "pretrain"))]
    folder = f"{runs}/{exp}/pretrain"
    row = {key: value for key, value in {**defaults, **row}.items() if key not in ("finetune", "about")}
    return stage(f"{exp} pretrain", f"{folder}/backbone.pt",
                 f"pretrain/{part['strategy']}.py --exp {exp} --data {data} --out {folder}{flag}", inputs, row,
                 torchrun if nproc > 1 else python)


JOB = """#!/bin/bash
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=32 --mem=128G --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=TERM@600      # ten minutes to save, then the queue again
#SBATCH --output={folder}/%x-%A_%a.log
# job.sh PART ROW...: one part of run_all.sh; of several rows an array job takes that of its number.
part=$1; shift; rows=("$@")
[ "$part" = rows ] && rows=("${{rows[${{SLURM_ARRAY_TASK_ID:-0}}]}}")
cd {here}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK          # srun does not take it from the lines above
srun bash run_all.sh {flags} --only "$part" --exp "$(IFS=,; echo "${{rows[*]}}")"
code=$?
[ "$code" = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
SUBMIT = """#!/bin/bash
# bash submit.sh [options of sbatch, such as --account=NAME --partition=NAME]
set -euo pipefail
cd {folder}
all=({all})
data=$(sbatch --parsable "$@" --job-name=data --gpus-per-node=0 job.sh data "${{all[@]}}")
rows=({rows})
array=$(sbatch --parsable "$@" --job-name=rows --array=0-{last} --dependency=afterok:$data job.sh rows "${{rows[@]}}")
{children}
sbatch "$@" --job-name=results --gpus-per-node=0 --dependency=afterok:{every} job.sh results "${{all[@]}}"
"""


def write_jobs(folder):
    """SLURM: a job script, and submit.sh, which hands it in for the data, every row and the results."""
    parent = {}
    for exp in chosen:                                              # which grows: rows that others start from belong to it
        init = row_of(exp).get("init", "")
        parent[exp] = init[4:] if init.startswith("exp:") else None
        chosen.extend({parent[exp]} - {None, *chosen})
    rows = [exp for exp in chosen if not parent[exp]]
    job, children = {exp: f"${{array}}_{number}" for number, exp in enumerate(rows)}, []
    while left := [exp for exp in chosen if exp not in job]:
        for exp in (exp for exp in left if parent[exp] in job):
            job[exp] = f"$row{len(job)}"
            children.append(f'{job[exp][1:]}=$(sbatch --parsable "$@" --job-name=rows '
                            f"--dependency=afterok:{job[parent[exp]]} job.sh rows {shlex.quote(exp)})")
    flags = [word for before, word in zip(["", *given], given) if not {before, word} & {"--slurm", "--exp", "--only"}]
    facts = dict(folder=shlex.quote(str(folder.resolve())), here=shlex.quote(os.getcwd()), flags=shlex.join(flags),
                 all=shlex.join(chosen), rows=shlex.join(rows), last=len(rows) - 1, children="\n".join(children),
                 every=":".join(["$array", *(name for name in job.values() if name.startswith("$row"))]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.sh").write_text(JOB.format(**facts))
    (folder / "submit.sh").write_text(SUBMIT.format(**facts))
    print(f"bash {folder}/submit.sh hands in {len(chosen)} rows")


if slurm:
    write_jobs(Path(slurm))
    sys.exit()
predictions = []
for exp in chosen:
    row = row_of(exp)
    if row.get("pretrain"):
        backbone = pretrain(exp)
        flag, inputs = f" --init {backbone}", [backbone]
    else:
        flag, inputs = start(exp, row)
    size = size_of(row, "finetune") if demo else 224
    inputs = inputs + [packed("nih", size)]
    seeds = {**defaults["finetune"], **(row.get("finetune") or {})}["seeds"]
    facts = {key: value for key, value in {**defaults, **row}.items() if key not in ("pretrain", "about")}
    last = stage(f"{exp} finetune", f"{runs}/{exp}/finetune/seed{seeds[-1]}/classifier.pt",
                 f"finetune/classify.py --exp {exp} --data {data} --out {runs}/{exp}/finetune{flag}", inputs, facts,
                 torchrun if nproc > 1 else python)
    packs = {folder: packed(folder, size) for folder in dict.fromkeys(TESTS[name][0] for name in tests)}
    sets = " ".join(f"--set {name}={packs[TESTS[name][0]]}:{TESTS[name][1]}" for name in tests)
    for seed in seeds:
        folder = f"{runs}/{exp}/predictions/seed{seed}"
        predictions.append(stage(
            f"{exp} predict seed {seed}", f"{folder}/{tests[-1]}.csv",
            f"evaluate/predict.py --checkpoint {runs}/{exp}/finetune/seed{seed}/classifier.pt {sets} --out {folder}",
            [last, *packs.values()], None, torchrun if nproc > 1 and not demo else python))

files = " ".join(f"{prediction.rsplit('/', 1)[0]}/{name}.csv" for prediction in predictions for name in tests[1:])
metrics = stage("metrics", f"{results}/metrics.csv",                     # manifests: sex, age and race, for subgroups
                f"evaluate/metrics.py {files} --manifest {' '.join(packs.values())} --out {results}/metrics.csv", predictions)

if demo:                # Figure 1 shows all eight datasets
    packed("covidx_ct", size)
packs = [output.rsplit("/", 1)[0] for output in keys if output.endswith("/manifest.csv")]
figure = stage("data tables", f"{results}/figures/figure1.svg",
               f"data_prep/describe.py --index {' '.join(f'{pack}/index.csv' for pack in packs)} --packs {' '.join(packs)} "
               f"--out {results}/figures", [f"{pack}/manifest.csv" for pack in packs])
verdicts = [stage("verdicts", f"{results}/verdicts.csv",                  # of these rows: others may have other images
                  f"evaluate/compare.py --predictions {runs} --exp {','.join(chosen)} --out {results}", predictions),
            stage("verdicts on the published runs", f"{results}/published/verdicts.csv",
                  f"evaluate/compare.py --reported --out {results}/published")]
title = "Demo: drawn stand-in data and stand-in weights" if not keep else f"Demo: stand-in weights, drawn stand-ins of what {raw} lacks"
stage("report", f"{results}/report.html",
      f"evaluate/report.py --metrics {metrics} --out {results} --runs {runs} --predictions {runs} "
      f"--verdicts {' '.join(verdicts)}" + f" --title {shlex.quote(title)}" * demo, [metrics, figure, *verdicts])
PY
) || { echo "$stages" >&2; exit 2; }

if [ -n "$slurm" ]; then echo "$stages"; exit 0; fi
shorten() { if [ ${#1} -gt 600 ]; then echo "${1:0:600} ..."; else echo "$1"; fi; }
count=$(wc -l <<<"$stages") number=0 begun=$SECONDS
stopping=0 running=""
stop() { stopping=1; if [ -n "$running" ]; then kill -TERM "$running" || true; fi; }
trap stop TERM INT HUP
set -m                  # a stage is a process group of its own: a signal to this script or its group reaches it once
while IFS=$'\t' read -r part name output key command reads <&3; do
  number=$((number + 1))
  if [ "$stopping" = 1 ]; then echo "stopped before stage '$name'; the same command goes on from there" >&2; exit 75; fi
  if [ -n "$only" ] && [ "$only" != "$part" ]; then continue; fi
  if [ "$dry" = 1 ]; then echo "${command//\$PYTHON/$PYTHON}"; continue; fi
  IFS='|' read -ra inputs <<<"$reads"                     # output.done: the key, hash of the inputs, hash of the output
  made="$key $(for input in "${inputs[@]}"; do tail -n 1 "$input.done" 2>/dev/null || true; done | sha256sum)"
  if [ -e "$output" ] && [ "$(head -n 1 "$output.done" 2>/dev/null)" = "$made" ]; then
    echo "[$number/$count] $name: complete"
    continue
  fi
  log="$out/runs/logs/${name// /_}.log"
  mkdir -p "$(dirname "$log")" "$(dirname "$output")"
  echo "[$number/$count] $name: $(shorten "${command//\$PYTHON/$PYTHON}")"
  bash -c "exec $command" 2>&1 </dev/null | (trap '' TERM; exec tee "$log") | (trap '' TERM; exec sed -u 's/^/    /') &
  running=$(jobs -p %+)
  if [ "$stopping" = 1 ]; then stop; fi
  while code=0; wait %+ || code=$?; [ -n "$(jobs -rp)" ]; do :; done      # a signal interrupts wait
  running=""
  if [ "$stopping" = 1 ] && [ "$code" != 0 ]; then
    echo "stopped in stage '$name'; the same command goes on from there" >&2
    exit 75
  fi
  if [ "$code" != 0 ]; then
    echo "error: stage '$name' failed with exit code $code; its log is $log; its command: ${command//\$PYTHON/$PYTHON}" >&2
    exit "$code"
  fi
  printf '%s\n' "$made" "$(cat "$output" "${output%/*}/pack.json" 2>/dev/null | sha256sum)" > "$output.done"
done 3<<<"$stages"
if [ "$dry" = 1 ]; then exit 0; fi
if [ -n "$only" ]; then echo "part $only complete after $((SECONDS - begun)) s"; exit 0; fi
echo "all $count stages complete after $((SECONDS - begun)) s; the report: $(tail -n 1 <<<"$stages" | cut -f 3)"
