#!/usr/bin/env bash
# Runs the benchmarks one after the other, keeps the figures of each as JSON, and writes the README's table of targets from them
#   bash tools/bench/run.sh [--quick] [--out DIR] [NAME...]      without NAME: all
#   --quick   small sizes: whether everything runs, in some minutes, with figures that mean little
#   --out     where the JSON goes (default tools/bench/results; with --quick a temporary folder); the README follows the default alone
#   VENV, VLLM_VENV, TRL_VENV   environments (default .venv, .venv-vllm, .venv-trl)
# The machine should have nothing else to do. Exit status 1 where a benchmark failed; the others have run.
set -uo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv} VLLM_VENV=${VLLM_VENV:-.venv-vllm} TRL_VENV=${TRL_VENV:-.venv-trl}
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 PYTHONPATH=${PYTHONPATH:-$PWD}
# Compiled, as pip leaves a package that it installs.
unset PYTHONDONTWRITEBYTECODE
"$VENV/bin/python" -m compileall -q opd_cache
quick= out= names=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 ;;
    --out) out=$2 && shift ;;
    -*) sed -n '2,7s/^# \?//p' "$0" && exit 2 ;;
    *) names+=("$1") ;;
    esac
    shift
done
if [ -z "$out" ]; then if [ "$quick" ]; then out=$(mktemp -d); else out=tools/bench/results; fi; fi
mkdir -p "$out"
failed=()

# bench NAME "FULL OPTIONS" "QUICK OPTIONS" VENV SCRIPT: where the figures are what --json prints.
bench() { measure "$1" "$2" "$3" "$4" "$5" --json; }
# filed NAME ...: the same where --json names a file.
filed() { measure "$1" "$2" "$3" "$4" "$5" --json "$out/$1.json.part"; }
measure() {
    local name=$1 options=$2 venv=$4 script=$5
    if [ "$quick" ]; then options=$3; fi
    shift 5
    if [ ${#names[@]} -gt 0 ] && [[ " ${names[*]} " != *" $name "* ]]; then return; fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "== $name: no $venv, see tools/install.sh" >&2
        failed+=("$name")
        return
    fi
    echo "== $name: $script $options" >&2
    local start=$SECONDS part="$out/$name.json.part" printed="$out/$name.txt"
    # shellcheck disable=SC2086
    if "$venv/bin/python" "tools/bench/$script" $options "$@" >"$printed"; then
        if [ -e "$part" ]; then
            mv "$part" "$out/$name.json"
            cat "$printed" >&2
        else
            tail -n 1 "$printed" >"$out/$name.json" # before it, libraries may have said something
        fi
        rm "$printed"
        echo "   $((SECONDS - start)) s" >&2
    else
        failed+=("$name")
    fi
}

task=$(mktemp -d)
trap 'rm -rf "$task"' EXIT
bench quickstart_loop "$task/task" "--repeats 1 $task/task" "$VENV" quickstart_loop.py
filed letters "--task letters --trl-python $TRL_VENV/bin/python" \
    "--task letters --episodes 2 --repeats 1 --trl-python $TRL_VENV/bin/python" "$VENV" opd_vs_trl.py
filed vocabulary "--task vocabulary --trl-python $TRL_VENV/bin/python" \
    "--task vocabulary --tokens 8 --repeats 1 --trl-python $TRL_VENV/bin/python" "$VENV" opd_vs_trl.py
filed rollout "" "--tokens 20 --repeats 1" "$VENV" rollout.py
filed rollout_vllm "--engine vllm" "--engine vllm --tokens 20 --repeats 1" "$VLLM_VENV" rollout.py
filed scale "" "--shards 30 100 --repeats 1" "$VENV" scale.py
bench learn "--repeats 3 --steps 2" "--repeats 1 --steps 2" "$VENV" learn.py
bench cache "" "--model quickstart --passes 1" "$VENV" cache.py
bench join "" "--tokens 500000 --repeats 1" "$VENV" join.py
bench verify "" "--tokens 500000 --repeats 1" "$VENV" verify.py
bench verify_large "--tokens 80000000" "--tokens 1000000 --repeats 1" "$VENV" verify.py
# The quickstart's run, made for it.
bench bytes "--quickstart $task/task" "--quickstart $task/task --episodes 1" "$VENV" bytes.py
bench score_small "--model small" "--model small --repeats 1" "$VLLM_VENV" score.py
bench score_vocabulary "--model vocabulary" "--model vocabulary --repeats 1 --only stock vllm_shared" \
    "$VLLM_VENV" score.py
bench query "" "--tokens 500000 --repeats 1" "$VENV" query.py
bench serve "" "--tokens 500000 --repeats 1" "$VENV" serve.py
bench health "" "--tokens 1000000" "$VENV" health.py
bench submit "" "--shards 10 --episodes 1" "$VENV" submit.py
echo "figures: $out" >&2
if [ "$out" = tools/bench/results ]; then "$VENV/bin/python" tools/render_readme.py; fi
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}" >&2 && exit 1; fi
