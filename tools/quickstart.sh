#!/usr/bin/env bash
# From a fresh clone to a distilled student: makes an environment, installs, and runs the quickstart recipe.
#   VENV=dir  environment (default .venv)      RUN=dir  run directory (default runs/quickstart)
#   further arguments go to the recipe: bash tools/quickstart.sh learn.loss.name=reverse_kl_pg
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
VENV=${VENV:-.venv}
RUN=${RUN:-runs/quickstart}
install_into "$VENV" ""
export OMP_WAIT_POLICY=PASSIVE
start=$(date +%s)
"$VENV/bin/opd-cache" run configs/recipes/quickstart.yaml "run_dir=$RUN" "$@"
echo "The quickstart took $(($(date +%s) - start)) s. The commands above are in $VENV/bin; activate it: source $VENV/bin/activate"
