#!/bin/bash
# {{title}}
# Written by opd-cache submit. It may be edited: an edited script is kept, and used, until it is deleted.
#   sbatch --array=0-7 THIS NUMBER 8     tasks 0 to 7 of 8, of the episode (of eval: the policy version) NUMBER
#
#SBATCH --output={{log}}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{{warning_s}}
#SBATCH --propagate=NONE
{{sbatch}}

number=$1 num_tasks=${2:-1} task=${SLURM_ARRAY_TASK_ID:-0}
# The last task of an array has the array's own SLURM_JOB_ID: to queue that again would queue all tasks.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
# srun does not take over sbatch's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# Slurm may run a job twice at once, when it has lost a node for a while: its ranks must not meet the other's.
export OPD_CACHE_LAUNCH=$RANDOM$RANDOM MASTER_PORT=$((20000 + RANDOM % 20000))
cd {{folder}} || exit 1
{{setup}}

warned= ended=
# Before a time limit or a preemption: the stage stops, and the job is queued again below.
trap 'warned=1; {{stop}}; (sleep {{patience_s}}; kill -KILL "$stage") 2>/dev/null &' USR1
# A cancelled job stays cancelled, and a preempted one is queued again by Slurm itself.
trap 'ended=1; {{stop}}' TERM

{{command}} &
stage=$!
# A signal ends `wait` early.
while kill -0 "$stage" 2>/dev/null; do wait "$stage"; done
wait "$stage"
status=$?
[[ $status -eq 0 ]] && exit 0
echo "$(date +%T) {{stage}} $number ended with status $status on $(hostname)"

# 75: worth another try. Above 128: a signal ended the process, or one of its ranks (lost memory, a watchdog, a fault).
# 3: stopped by health.fail_on; to queue that again would find the same.
if [[ ($status -eq 75 || $status -gt 128 || -n $warned) && $status -ne 3 && -z $ended ]] &&
  [[ ${SLURM_RESTART_COUNT:-0} -lt {{max_requeues}} ]] &&
  [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; then
  echo "$(date +%T) queued again, after ${SLURM_RESTART_COUNT:-0} of at most {{max_requeues}} times"
  trap 'exit 75' TERM
  scontrol requeue "$job" && { sleep 300 & wait; }
fi
exit "$status"
