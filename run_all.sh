#!/usr/bin/env bash
# The whole study as a chain of commands a person could type: data, rows (pre-train, fine-tune, predict), results.
#
#   bash run_all.sh --demo               the question in miniature on drawn stand-ins: no download, no GPU, minutes
#   bash run_all.sh --open               the half that needs no application, on MedMNIST's files: says what to fetch
#   bash run_all.sh --exp '3.4,4.*'      these rows of experiments.yaml, with the data they need
#   bash run_all.sh                      every row of the study (--exp '*': and the controls), resumable, over days
#
#   --raw DIR     raw downloads, a folder a dataset (raw)       --data DIR   packed data (data)
#   --out DIR     where runs/ and results/ go (.)               --nproc N    processes of a training (the GPUs here)
#   --tests LIST  test sets, as nih_test,vindr_test (all)       --only PART  data, rows or results
#   --dry-run     print the commands, run nothing               --plan       cost and inputs of every row
#   --scale S     size of the demo's stand-ins (1.0)            --slurm DIR  write job.sh and submit.sh
#
# A step is skipped when its output is newer than its inputs. Stopped or killed, the same command goes on; SIGTERM is
# passed on, the exit code is then 75. PYTHON=python bash run_all.sh uses an environment that has the packages.
set -euo pipefail
cd "$(dirname "$0")"
usage() { echo "error: $1; bash run_all.sh --help lists the options" >&2; exit 2; }

demo="" open="" exp="" raw="" data="" out="." nproc="" tests="" only="" scale=1.0 slurm="" dry="" plan="" given=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --demo) demo=1 ;; --open) open=1 ;; --dry-run) dry=1 ;; --plan) plan=1 ;;
    --exp | --raw | --data | --out | --nproc | --tests | --only | --scale | --slurm)
      [ $# -ge 2 ] || usage "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit 0 ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
case "$only" in "" | data | rows | results) ;; *) usage "--only is $only, not data, rows or results" ;; esac
. tests/setup_env.sh
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi

[ "$out" = . ] && out="" || out="${out%/}/"
results="${out}results" runs="${out}runs" size=224 small=() keep=()
all=nih_test,vindr_test,padchest,chexpert_test,chexpert_valid
if [ "$demo" ]; then                        # small networks: on CPUs two processes of one thread beat one of two
  [ -z "$raw" ] || keep=(--keep)            # datasets that --raw has are used, only the others are drawn
  data=${data:-data/demo} exp=${exp:-2.1,2.2,3.3,3.4,3.5} results+=/demo runs="$results/runs" size=64
  raw=${raw:-$data/raw} small=(--miniature true)
  if [ "$gpus" = 0 ] && [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ]; then nproc=${nproc:-2}; fi
elif [ "$open" ]; then
  data=${data:-data/open} exp=${exp:-2.1,2.2,3.1,3.2,3.5,3.6} results+=/open runs="$results/runs"
  all=nih_test,pneumonia_test
fi
raw=${raw:-raw} data=${data:-data} tests=${tests:-$all} nproc=${nproc:-$(( gpus > 1 ? gpus : 1 ))}
[ "$nproc" -ge 1 ] 2>/dev/null || usage "--nproc is $nproc, not a number of processes"
if [ "$plan" ]; then exec "$PYTHON" evaluate/plan.py ${exp:+--exp "$exp"} --data "$data"; fi
train=("$PYTHON")
if [ "$nproc" != 1 ]; then train+=(-m torch.distributed.run --standalone "--nproc_per_node=$nproc"); fi
rows=$("$PYTHON" evaluate/plan.py --list --exp "${exp:-[0-9]*}" ${demo:+--miniature})   # exp strategy data parent seeds

if [ "$slurm" ]; then                       # a job for the data, one a row after its parent's, one for the results
  mkdir -p "$slurm"
  { echo '#!/bin/bash'
    echo '#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=32 --mem=128G --time=24:00:00'
    echo '#SBATCH --requeue --open-mode=append --signal=TERM@600 --output=%x-%j.log     # ten minutes to save'
    printf 'cd %q\nsrun bash run_all.sh' "$PWD"
    before=""; for word in "${given[@]}"; do
      [ "$word" = --slurm ] || [ "$before" = --slurm ] || printf ' %q' "$word"; before=$word; done
    printf ' "$@"\ncode=$?\n[ $code = 75 ] && scontrol requeue "$SLURM_JOB_ID"\nexit $code\n'; } > "$slurm/job.sh"
  { printf '#!/bin/bash\nset -e\ndeclare -A job\ncd %q\n' "$slurm"
    echo 'data=$(sbatch --parsable "$@" job.sh --only data)'
    while IFS=$'\t' read -r name _ _ parent _; do
      after='$data'; [ "$parent" = - ] || after="\$data:\${job[$parent]}"
      echo "job[$name]=\$(sbatch --parsable --dependency=afterok:$after \"\$@\" job.sh --only rows --exp $name)"
    done <<<"$rows"
    echo 'sbatch --dependency=afterok$(printf ":%s" "${job[@]}") "$@" job.sh --only results'; } > "$slurm/submit.sh"
  echo "bash $slurm/submit.sh [options of sbatch] hands in $(wc -l <<<"$rows") rows"; exit
fi

declare -A seen
running="" stopping=""
trap 'stopping=1; [ -z "$running" ] || kill -TERM "$running" 2>/dev/null || true' TERM INT HUP
step() {        # PART OUTPUT INPUT... -- COMMAND...: run the command unless the output is newer than every input
  local part=$1 output=$2 fresh=1 code=0; shift 2
  while [ "$1" != -- ]; do [ "$output.done" -nt "$1" ] || fresh=""; shift; done; shift
  if [ "${seen[$output]:-}" ] || { [ "$only" ] && [ "$only" != "$part" ]; }; then return; fi
  seen[$output]=1
  if [ "$dry" ]; then printf '%q ' "$@"; echo; return; fi
  if [ "$stopping" ]; then echo "stopped before $output; the same command goes on from there" >&2; exit 75; fi
  if [ "$fresh" ] && [ -e "$output" ] && [ -e "$output.done" ]; then echo "$output is complete"; return; fi
  mkdir -p "$(dirname "$output")"
  echo "$(date +%H:%M:%S) $(printf '%q ' "$@")"
  "$@" </dev/null > >(trap '' TERM INT HUP; exec tee "$output.log") 2>&1 &
  running=$!
  while wait "$running" || code=$?; kill -0 "$running" 2>/dev/null; do code=0; done     # a signal interrupts wait
  running=""
  if [ "$code" = 0 ]; then touch "$output.done"; return; fi
  if [ "$stopping" ]; then echo "stopped in $output; the same command goes on from there" >&2; exit 75; fi
  echo "error: $output was not made (exit code $code); its log is $output.log" >&2
  exit "$code"
}

prepare() {     # FOLDER: download -> index -> pack
  local here="$data/$1" reader=$1 index=() pack=() set="" splits=""
  case "$1" in
    nih) set=chestmnist ;;
    nih_pretrain) reader=nih index=(--pretrain all) set=chestmnist ;;
    nih_pretrain_*) reader=nih index=(--pretrain trainval --n-pretrain all) set=chestmnist splits=train,val ;;
    mimic_cxr) index=(--n-pretrain 250000) ;;
    mimic_cxr_supervised) reader=mimic_cxr index=(--views frontal --labelled-only) ;;
    chexpert) pack=(--splits val,test) ;;
    vindr_cxr) pack=(--splits test) ;;
    covidx_ct) pack=(--splits pretrain) ;;
    oct) pack=(--splits pretrain) set=octmnist ;;
    imagenet) pack=(--splits pretrain --channels 3) ;;
    pneumonia) set=pneumoniamnist ;;
  esac
  if [ "$open" ]; then
    [ -n "$set" ] || usage "$1 is not among MedMNIST's files; leave its rows out of --exp"
    if [ ! -e "$raw/${set}_224.npz" ] && [ -z "$dry" ]; then
      usage "fetch ${set}_224.npz (zenodo.org, record 10519652) into $raw"
    fi
    case "$1" in nih | pneumonia) ;; *) index=(--pretrain "${splits:-train,val,test}") ;; esac
    step data "$here/manifest.csv" -- \
      "$PYTHON" data_prep/medmnist.py --raw "$raw/${set}_224.npz" --out "$here" "${index[@]}"
    return
  fi
  if [ "$1" = nih_pretrain_original ]; then pack=(--size original); else pack+=(--size "$size"); fi
  if [ "$demo" ]; then
    grep -qsE "\"scale\": $scale[.0]*(,|}|\$)" "$raw/demo.json" || rm -f "$raw/demo.json.done"     # another scale: anew
    step data "$raw/demo.json" -- "$PYTHON" data_prep/demo.py --out "$raw" --scale "$scale" "${keep[@]}"
    case "$1" in nih_pretrain* | mimic_cxr | covidx_ct | oct | imagenet) index+=(--n-pretrain all) ;; esac
  fi
  step data "$here/index.csv" ${demo:+"$raw/demo.json"} -- \
    "$PYTHON" "data_prep/$reader.py" --raw "$raw/$reader" --out "$here/index.csv" "${index[@]}"
  step data "$here/manifest.csv" "$here/index.csv" -- \
    "$PYTHON" data_prep/pack.py --index "$here/index.csv" --raw "$raw/$reader" --out "$here" "${pack[@]}"
}

predictions=() sets=() folders=(nih) manifests=()
for test in nih_val ${tests//,/ }; do
  case "$test" in
    nih_val) place=nih:val ;; nih_test) place=nih:test ;; vindr_test) place=vindr_cxr:test ;;
    padchest) place=padchest:test ;; chexpert_test) place=chexpert:test ;; chexpert_valid) place=chexpert:val ;;
    pneumonia_test) place=pneumonia:test ;; *) usage "--tests has no $test" ;;
  esac
  sets+=(--set "$test=$data/${place%:*}/manifest.csv:${place#*:}")
  [[ " ${folders[*]} " = *" ${place%:*} "* ]] || folders+=("${place%:*}")
done
for folder in "${folders[@]}"; do prepare "$folder"; manifests+=("$data/$folder/manifest.csv"); done

row() {         # EXP STRATEGY DATA PARENT SEEDS: pre-train, fine-tune, predict
  local here="$runs/$1" start=() init=() seed last=${5##*,}
  local common=(--exp "$1" "${small[@]}" --data "$data")
  if [ "$4" != - ]; then start=("$runs/$4/pretrain/backbone.pt") init=(--init "$runs/$4/pretrain/backbone.pt"); fi
  if [ "$2" != - ]; then
    prepare "$3"
    step rows "$here/pretrain/backbone.pt" experiments.yaml "$data/$3/manifest.csv" "${start[@]}" -- \
      "${train[@]}" "pretrain/$2.py" "${common[@]}" --out "$here/pretrain" "${init[@]}"
    start=("$here/pretrain/backbone.pt") init=(--init "$here/pretrain/backbone.pt")
  fi
  [ "$5" != - ] || return 0
  step rows "$here/finetune/seed$last/classifier.pt" experiments.yaml "$data/nih/manifest.csv" "${start[@]}" -- \
    "${train[@]}" finetune/classify.py "${common[@]}" --out "$here/finetune" "${init[@]}"
  for seed in ${5//,/ }; do
    for test in ${tests//,/ }; do               # a test set more than last time: predict again
      [ -e "$here/predictions/seed$seed/$test.csv" ] || rm -f "$here/predictions/seed$seed/${tests##*,}.csv.done"
      predictions+=("$here/predictions/seed$seed/$test.csv")
    done
    step rows "$here/predictions/seed$seed/${tests##*,}.csv" "$here/finetune/seed$last/classifier.pt" "${manifests[@]}" -- \
      "$PYTHON" evaluate/predict.py --checkpoint "$here/finetune/seed$seed/classifier.pt" "${sets[@]}" \
      --out "$here/predictions/seed$seed"
  done
}
while IFS=$'\t' read -r name strategy dataset parent seeds <&3; do
  row "$name" "$strategy" "$dataset" "$parent" "$seeds"
done 3<<<"$rows"

step results "$results/metrics.csv" "${predictions[@]}" -- \
  "$PYTHON" evaluate/metrics.py "${predictions[@]}" --manifest "${manifests[@]}" --out "$results/metrics.csv"
step results "$results/verdicts.csv" "$results/metrics.csv" -- \
  "$PYTHON" evaluate/compare.py --metrics "$results/metrics.csv" --out "$results"
step results "$results/published/verdicts.csv" -- "$PYTHON" evaluate/compare.py --reported --out "$results/published"
packs=()
for output in "${!seen[@]}"; do [[ $output != */manifest.csv ]] || packs+=("$(dirname "$output")"); done
step results "$results/figures/figure1.svg" "${packs[@]/%//manifest.csv}" -- \
  "$PYTHON" data_prep/describe.py --index "${packs[@]/%//index.csv}" --packs "${packs[@]}" --out "$results/figures"
step results "$results/report.html" "$results/verdicts.csv" -- "$PYTHON" evaluate/report.py --metrics "$results/metrics.csv" \
  --out "$results" --runs "$runs" --predictions "$runs" --verdicts "$results/verdicts.csv" "$results/published/verdicts.csv"
[ "$dry$only" ] || echo "complete; the report is $results/report.html"
