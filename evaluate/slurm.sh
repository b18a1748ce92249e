#!/usr/bin/env bash
# Writes DIR/job.sh and DIR/submit.sh, which hand the rows to SLURM: a job for the data, one a row after that of its
# parent, one for the results. Called by run_all.sh --slurm DIR.
#
#   python evaluate/plan.py --list | bash evaluate/slurm.sh DIR [options of run_all.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 python=${PYTHON:-}; shift
mkdir -p "$folder"
cat > "$folder/job.sh" <<END
#!/bin/bash
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=32 --mem=128G --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=TERM@600 --output=%x-%j.log     # ten minutes to save
cd ${PWD@Q}
export PYTHON=${python@Q} SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK     # srun inherits them no more
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500                               # torchrun's own patience is 30 s
srun bash run_all.sh ${*@Q} "\$@"
code=\$?
[ \$code = 75 ] && scontrol requeue "\$SLURM_JOB_ID"
exit \$code
END
exec 3> "$folder/submit.sh"
cat >&3 <<'END'
#!/bin/bash
set -e
cd "$(dirname "$0")"
declare -A job
data=$(sbatch --parsable --job-name=data "$@" job.sh --only data)       # with several clusters: number;name
END
rows=0
while IFS=$'\t' read -r name _ _ parent seeds; do
  after='${data%;*}' part=rows
  [ "$parent" = - ] || after+=":\${job[${parent@Q}]%;*}"
  [ "$seeds" != - ] || part=pretrain                            # a parent that was not asked for
  options="--parsable --job-name=${name@Q} --kill-on-invalid-dep=yes --dependency=afterok:$after"
  echo "job[${name@Q}]=\$(sbatch $options \"\$@\" job.sh --only $part --exp ${name@Q})" >&3
  rows=$(( rows + 1 ))
done
echo 'after=afterok$(printf ":%s" "${job[@]%;*}")' >&3
echo 'sbatch --job-name=results --kill-on-invalid-dep=yes --dependency=$after "$@" job.sh --only results' >&3
echo "bash $folder/submit.sh [options of sbatch] hands in $rows rows"
