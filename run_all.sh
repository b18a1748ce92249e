#!/usr/bin/env bash
# The whole study as a chain of commands a person could type: data, rows (pre-train, fine-tune, predict), results.
#
#   bash run_all.sh --demo [--scale S]   the question in miniature on (S times) drawn stand-ins: no download, no GPU
#   bash run_all.sh --open               the half that needs no application, on MedMNIST's files: says what to fetch
#   bash run_all.sh --exp '3.4,4.*'      these rows of experiments.yaml, with the data they need
#   bash run_all.sh                      every row of the study (--exp '*': and the controls), resumable, over days
#
#   --raw DIR     raw downloads, a folder a dataset (raw)       --data DIR   packed data (data)
#   --out DIR     where runs/ and results/ go (.)               --nproc N    processes of a training (the GPUs)
#   --tests LIST  test sets, as nih_test,vindr_test (all)       --only PART  data, pretrain, rows (with it) or results
#   --dry-run     print the commands, run nothing               --plan       cost and inputs of every row
#   --rates FILE  for --plan: measured rates, a gpu.json        --slurm DIR  write job.sh and submit.sh there
#
# Relative paths begin at this file's folder. A step is skipped if its command has run since its inputs changed. Stopped
# or killed, the same command goes on (SIGTERM: exit 75). tmux, not nohup, keeps torchrun. PYTHON=python uses your own.
set -euo pipefail; cd "$(dirname "$0")"
usage() { echo "error: $1; bash run_all.sh --help lists the options" >&2; exit 2; }
demo="" open="" dry_run="" plan="" exp="" raw="" data="" out="" nproc="" tests="" only="" scale="" slurm="" rates=""
stopping="" given=() packs=() tested=() sets=() predictions=()
while [ $# -gt 0 ]; do
  case "$1" in
    --demo | --open | --plan | --dry-run) option=${1#--}; declare "${option/-/_}=1"; given+=("$1") ;;
    --exp | --raw | --data | --out | --nproc | --tests | --only | --scale | --slurm | --rates)
      [[ ${2:---} != --* ]] || usage "$1 needs a value"
      declare "${1#--}=$2"; [ "$1" = --slurm ] || given+=("$1" "$2"); shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p;}' "$0"; exit ;;
    *) usage "unknown option $1" ;;
  esac; shift
done

study="" size=224 all=nih_test,vindr_test,padchest,chexpert_test,chexpert_valid
if [ "$demo" ]; then
  study=/demo${scale:+-$scale} size=64 exp=${exp:-2.1,2.2,3.3,3.4,3.5} raw=${raw:-${data:-data$study}/raw}
elif [ "$open" ]; then
  study=/open exp=${exp:-2.1,2.2,3.1,3.2,3.5,3.6} all=nih_test,pneumonia_test
fi
[[ ($demo || ! $scale) && ($plan || ! $rates) && $demo$open$plan != 11* ]] ||
  usage "--scale goes with --demo, --rates with --plan; --demo, --open and --plan exclude each other"
raw=${raw:-raw} data=${data:-data$study} tests=${tests:-$all}
out=${out:+${out%/}/} results="${out}results$study" runs="$out${study:+results$study/}runs"
for test in ${tests//,/ }; do [[ ,$all, = *",$test,"* ]] || usage "--tests has no $test, only $all"; done
[[ $only =~ ^(data|pretrain|rows|results)?$ ]] || usage "--only is $only, not data, pretrain, rows or results"
[ "${nproc:-1}" -ge 1 ] 2>/dev/null || usage "--nproc is $nproc, not a number of processes"
trap 'exit 75' TERM INT HUP                 # until there is a step to stop
. tests/setup_env.sh
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || usage "$PYTHON has no torch"
nproc=${nproc:-$(( gpus > 1 ? gpus : 1 ))}
if [ "$gpus" = 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( nproc > 1 ? 1 : 2 ))}; fi    # whatever the cores
[ -z "$plan" ] || exec "$PYTHON" evaluate/plan.py --data "$data" ${exp:+--exp "$exp"} ${rates:+--rates "$rates"}
train=("$PYTHON"); [ "$nproc" = 1 ] || train+=(-m torch.distributed.run --standalone "--nproc_per_node=$nproc")
rows=$("$PYTHON" evaluate/plan.py --list --exp "${exp:-[0-9]*}" ${demo:+--miniature})   # exp strategy data parent seeds
[ -z "$slurm" ] || exec bash evaluate/slurm.sh "$slurm" "${given[@]}" <<<"$rows"

trap 'stopping=1; kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT HUP
step() {        # PART OUTPUT INPUT... -- COMMAND...: run the command unless it has run since every input changed
  local part=$1 output=$2 fresh=1 code=0; shift 2
  while [ "$1" != -- ]; do                      # what lies below the output is made by the step: it has to exist
    [[ -e $1 && ($1 = "$output"/* || $output.done -nt $1) ]] || fresh=""; shift
  done; shift
  local command="$*"; command=${command#*.py }                          # whatever the number of processes
  [[ -e $output && $(cat "$output.done" 2>/dev/null) = "$command" ]] || fresh=""
  [[ $part = *"$only"* ]] || return 0
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; return; fi
  if [ "$stopping" ]; then echo "stopped before $output; the same command goes on from there" >&2; exit 75; fi
  if [ "$fresh" ]; then echo "$output is complete"; return; fi
  mkdir -p "$(dirname "$output")" && rm -f "$output.done" || exit 2
  echo "$command" > "$output.begun" || exit 2                   # with its time: an input that changes now is newer
  echo "$(date +%H:%M:%S) $(printf '%q ' "$@")"
  "$@" </dev/null > >(trap '' TERM INT HUP; exec tee "$output.log") 2>&1 &
  while wait $! || code=$?; kill -0 $! 2>/dev/null; do code=0; done       # a signal interrupts wait
  if [ "$code" = 0 ]; then mv "$output.begun" "$output.done"; return; fi
  if [ "$stopping" ]; then echo "stopped in $output; the same command goes on from there" >&2; exit 75; fi
  echo "error: $output was not made (exit code $code); its log is $output.log" >&2; exit "$code"
}

prepare() {     # FOLDER: download -> index -> pack; samples have 100 images to spare: a few may be unreadable
  local here="$data/$1" reader=$1 index="" pack=--require-files size=$size file="" sample="" n="--n-pretrain 100100"
  [[ " ${packs[*]} " != *" $here "* ]] || return 0; packs+=("$here")
  case "$1" in
    nih) file=chestmnist ;; pneumonia) file=pneumoniamnist ;; mimic_cxr) index="--n-pretrain 250100" ;;
    nih_pretrain) reader=nih index="--pretrain all $n" file=chestmnist sample="--pretrain train,val,test" ;;
    nih_*) reader=nih index="--pretrain trainval --n-pretrain all" file=chestmnist sample="--pretrain train,val" ;;
    mimic_cxr_supervised) reader=mimic_cxr index="$n --views frontal --labelled-only" ;;
    chexpert) pack+=" --splits val,test" ;; vindr_cxr) pack+=" --splits test" ;;
    covidx_ct) index=$n pack+=" --splits pretrain" ;; imagenet) index=$n pack+=" --splits pretrain --channels 3" ;;
    oct) index=$n pack+=" --splits pretrain" file=octmnist sample="--pretrain train,val,test" ;;
  esac
  [[ $1 != *_original ]] || size=original
  if [ "$open" ]; then
    [ "$file" ] || usage "$1 is not among MedMNIST's files; leave its rows out of --exp"
    file="$raw/${file}_224.npz"
    [[ -e $file || $dry_run || data != *"$only"* ]] || usage "fetch ${file##*/} (zenodo.org, record 10519652) into $raw"
    step data "$here/manifest.csv" "$file" -- \
      "$PYTHON" data_prep/medmnist.py --raw "$file" --out "$here" $sample; return
  fi
  if [ "$demo" ] && [[ $index$pack = *pretrain* ]]; then index+=" --n-pretrain all"; fi
  [ "$dry_run" ] || [ -e "$here/manifest.csv.done" ] || rm -f "$here/index.csv.done"    # images may have come since
  step data "$here/index.csv" ${demo:+"$raw/demo.json"} -- \
    "$PYTHON" "data_prep/$reader.py" --raw "$raw/$reader" --out "$here/index.csv" $index
  step data "$here/manifest.csv" "$here/index.csv" -- \
    "$PYTHON" data_prep/pack.py --index "$here/index.csv" --raw "$raw/$reader" --out "$here" --size "$size" $pack
}

row() {         # EXP STRATEGY DATA PARENT SEEDS: pre-train, fine-tune, predict
  local here="$runs/$1" start="" classifiers=() files=() common=(--exp "$1" ${demo:+--miniature true} --data "$data")
  [ "$4" = - ] || start="$runs/$4/pretrain/backbone.pt"
  if [[ $2 != - && ( $only$5 != rows- || ! -e $here/pretrain/backbone.pt.done ) ]]; then    # rows may share a parent
    prepare "$3"
    [[ $3 = *_original ]] || seen["$data/$3:pretrain"]=1                    # packed in pre-training
    step pretrain,rows "$here/pretrain/backbone.pt" experiments.yaml "$data/$3/manifest.csv" ${start:+"$start"} -- \
      "${train[@]}" "pretrain/$2.py" "${common[@]}" --out "$here/pretrain" ${start:+--init "$start"}
    start="$here/pretrain/backbone.pt"
  fi
  [ "$5" != - ] || return 0                     # a parent that was not asked for
  for seed in ${5//,/ }; do
    classifiers+=("$here/finetune/seed$seed/classifier.pt")
    for test in ${tests//,/ }; do files+=("$here/predictions/seed$seed/$test.csv"); done
  done
  step rows "$here/finetune" experiments.yaml "$data/nih/manifest.csv" ${start:+"$start"} "${classifiers[@]}" -- \
    "${train[@]}" finetune/classify.py "${common[@]}" --out "$here/finetune" ${start:+--init "$start"}
  step rows "$here/predictions" "${classifiers[@]}" "${manifests[@]}" "${files[@]}" -- \
    "$PYTHON" evaluate/predict.py --checkpoint "${classifiers[@]}" "${sets[@]}" --out "$here/predictions/seed{seed}"
  predictions+=("${files[@]}")
}

[ -z "$demo" ] || step data "$raw/demo.json" -- "$PYTHON" data_prep/demo.py --out "$raw" --scale "${scale:-1}" --keep
declare -A seen=() split=([nih_val]=nih:val [nih_test]=nih:test [vindr_test]=vindr_cxr:test [padchest]=padchest:test
          [chexpert_test]=chexpert:test [chexpert_valid]=chexpert:val [pneumonia_test]=pneumonia:test)
for test in nih_val ${tests//,/ }; do
  prepare "${split[$test]%:*}"
  sets+=(--set "$test=$data/${split[$test]/:/\/manifest.csv:}")
  [ "$test" = nih_val ] || tested+=("$data/${split[$test]}")
done
manifests=("${packs[@]/%//manifest.csv}")       # of the test sets
while IFS=$'\t' read -r -a fields <&3; do row "${fields[@]}"; done 3<<<"$rows"

step results "$results/metrics.csv" "${predictions[@]}" -- \
  "$PYTHON" evaluate/metrics.py "${predictions[@]}" --manifest "${manifests[@]}" --out "$results/metrics.csv"
step results "$results/verdicts.csv" "$results/metrics.csv" evaluate/reported/claims.csv -- \
  "$PYTHON" evaluate/compare.py --metrics "$results/metrics.csv" --out "$results"
step results "$results/published/verdicts.csv" evaluate/reported/claims.csv -- \
  "$PYTHON" evaluate/compare.py --reported --out "$results/published"
step results "$results/figures/figure1.svg" "${packs[@]/%//manifest.csv}" -- \
  "$PYTHON" data_prep/describe.py --index "${packs[@]/%//index.csv}" --packs "${packs[@]}" --out "$results/figures" \
  --overlap "${!seen[@]}" --against "${tested[@]}"
step results "$results/report.html" "$results"/{,published/}verdicts.csv "$results/figures/overlaps.csv" -- \
  "$PYTHON" evaluate/report.py --metrics "$results/metrics.csv" --out "$results" --runs "$runs" --predictions "$runs" \
  --data "$data" --verdicts "$results"/{,published/}verdicts.csv ${seen[*]:+--overlaps "$results/figures/overlaps.csv"}
[ "$dry_run$only" ] || echo "complete; the report is $results/report.html"
