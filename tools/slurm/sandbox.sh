#!/bin/bash
# sandbox.sh: a real Slurm on one machine, for the tests in tests/launch. No systemd, no cgroup, no root needed.
#
#   sandbox.sh start   DIR        make DIR, start munged + slurmctld + slurmd(s), wait till idle
#   sandbox.sh stop    DIR        end the jobs and exactly the daemons that `start DIR` started
#   sandbox.sh status  DIR        one line per daemon; exit 0 only when all are alive
#   sandbox.sh env     DIR        print the `export` lines a client needs (eval them)
#   sandbox.sh exec    DIR CMD..  run CMD with those exports
#   sandbox.sh kill    DIR NAME   SIGKILL one daemon (munged, slurmctld, slurmd-n1 ...): a fault
#   sandbox.sh down    DIR NAME   SIGTERM one daemon and wait: a planned restart (slurmctld saves its state)
#   sandbox.sh up      DIR NAME   start that one daemon again, state kept
#   sandbox.sh crash-node DIR N   SIGKILL slurmd-N and all its job steps: a power cut of node N
#
# Needs Debian's munge, slurmctld, slurmd, slurm-client (and coreutils, util-linux, sed, grep).
# Settings come from the environment (defaults in brackets):
#   SLURM_SANDBOX_NODES [2] _CPUS [4, per node] _MEM [4000, MB per node] _GPUS [2, pretend ones per node; 0: none]
#   _PORT_BASE [picked from DIR, must be free] _CRED_EXPIRE [5, the least Slurm takes] _KILL_WAIT [3] _SLURMD_TIMEOUT [10]
#   _MIN_JOB_AGE [300] _MAX_ARRAY [1001] _MAX_JOBS [10000] _GRACE [5] _ACCT_FREQ [5] _OVERMEM [0; 1: kill steps over --mem]
#   _KILL_INVALID_DEPEND [0] _LISTEN_ANY [0] _TIMEOUT [20] _EXTRA [file appended to slurm.conf]
#   _TEMPLATE [slurm.conf.template beside this script]
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
self=$(readlink -f "${BASH_SOURCE[0]}")

die() { echo "slurm_sandbox: $*" >&2; exit 1; }
opt() { local v="SLURM_SANDBOX_$1"; printf '%s' "${!v:-$2}"; }

# ---- processes: a pid counts as ours only while its start time is the one we wrote down
starttime() { # field 22 of /proc/PID/stat, read after the last ')' as the name may have blanks
  local s
  s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  s=${s##*) }
  # shellcheck disable=SC2086
  set -- $s
  [[ "$1" != Z ]] && printf '%s' "${20}"
}
alive() { # NAME -> 0 and prints the pid
  local pid st
  [[ -s "$DIR/run/$1.pid" ]] || return 1
  read -r pid st <"$DIR/run/$1.pid" || return 1
  [[ "$pid" =~ ^[0-9]+$ && -n "$st" && "$(starttime "$pid" || true)" == "$st" ]] || return 1
  printf '%s' "$pid"
}
spawn() { # NAME CMD...: start detached, note "pid starttime"; the fds of a caller (pytest's pipes) are not kept
  local name=$1 pid st
  shift
  (
    cd "$DIR"
    for fd in /proc/self/fd/*; do
      fd=${fd##*/}
      [[ $fd -gt 2 && $fd -ne 255 ]] && eval "exec $fd>&-" 2>/dev/null || true
    done
    exec env -i PATH="$PATH" HOME=/ LANG=C SLURM_CONF="$DIR/slurm.conf" SLURM_SANDBOX_DIR="$DIR" \
      SLURM_SANDBOX_NODE="${name#slurmd-}" setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1
  ) &
  pid=$!
  disown "$pid" 2>/dev/null || true
  st=$(starttime "$pid") || die "$name ended at once: $(tail -n 3 "$DIR/log/$name.out")"
  echo "$pid $st" >"$DIR/run/$name.pid.tmp" && mv "$DIR/run/$name.pid.tmp" "$DIR/run/$name.pid"
}
strays() { # [NODE]: pids of this sandbox's job steps and job processes, told by their environment
  local f node=${1:-}
  for f in $(grep -lszxF "SLURM_CONF=$DIR/slurm.conf" /proc/[0-9]*/environ || true); do
    if [[ "$(readlink "${f%/environ}/exe" 2>/dev/null)" == */slurmstepd* ]]; then
      has "$f" "SLURM_SANDBOX_NODE=" || continue
      [[ -z "$node" ]] || hasx "$f" "SLURM_SANDBOX_NODE=$node" || continue
    else # not a client, nor a caller that is itself inside a job of another cluster
      hasx "$f" "SLURM_CLUSTER_NAME=sandbox" && has "$f" "SLURM_JOB_ID=" || continue
      [[ -z "$node" ]] || hasx "$f" "SLURMD_NODENAME=$node" || continue
    fi
    f=${f#/proc/}
    [[ "${f%/environ}" == "$$" ]] || echo "${f%/environ}"
  done
}
has() { grep -qsz "^$2" "$1"; }
hasx() { grep -qszxF "$2" "$1"; }

wait_for() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.05
  done
}
daemons() { echo munged slurmctld; local n; for n in $(node_names); do echo "slurmd-$n"; done; }
node_names() { cat "$DIR/nodes" 2>/dev/null || true; }
launch() { # NAME
  case $1 in
    munged) rm -f "$DIR/run/munge.sock" "$DIR/run/munge.sock.lock"
      spawn munged munged --foreground --key-file="$DIR/munge.key" --socket="$DIR/run/munge.sock" \
        --pid-file="$DIR/run/munged.mungepid" --log-file="$DIR/log/munged.log" \
        --seed-file="$DIR/run/munged.seed" --num-threads=4 ;;
    slurmctld) spawn slurmctld slurmctld -D -i -f "$DIR/slurm.conf" ;;
    slurmd-*) spawn "$1" slurmd -D -N "${1#slurmd-}" -f "$DIR/slurm.conf" ;;
    *) die "no daemon named $1" ;;
  esac
}
munge_ok() { munge -S "$DIR/run/munge.sock" -n 2>/dev/null | unmunge -S "$DIR/run/munge.sock" >/dev/null 2>&1; }
ctld_ok() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
nodes_ok() { # every node reports in: no state with a trailing * (not responding), none unknown or down
  local s
  s=$(sinfo -h -N -o '%N %T' 2>/dev/null | sort -u) || return 1
  [[ $(grep -cE ' (idle|mixed|allocated|completing)$' <<<"$s") -eq $(node_names | wc -w) ]]
}

# ---- settings
settings() {
  local host addr gpus n base p
  host=$(hostname -s 2>/dev/null || uname -n) host=${host%%.*}
  [[ -n "$(getent ahostsv4 127.0.0.1 || true)" ]] || # AI_ADDRCONFIG, as Slurm asks for it, ignores 127.x
    die "there is no IPv4 address here but loopback (an empty network namespace?), and Slurm cannot look up names then: 'ip addr add 10.255.255.1/32 dev lo' is enough"
  # Slurm can bind only to what the host's own name resolves to, and srun is called back on 127.0.0.1
  addr=$({ getent ahostsv4 "$(uname -n)" || true; } | awk 'NR == 1 { print $1 }')
  if [[ "$addr" == 127.0.0.1 && "$(opt LISTEN_ANY 0)" != 1 ]]; then
    COMM='CommunicationParameters=NoInAddrAny,NoCtldInAddrAny'
  else # 127.0.1.1 (a stock Debian /etc/hosts) will not do: srun would wait for ever
    [[ "$(opt LISTEN_ANY 0)" == 1 ]] ||
      die "this host's name ($(uname -n)) resolves to '${addr:-nothing}', not to 127.0.0.1, so Slurm's ports cannot be kept to loopback: put '127.0.0.1 $(uname -n)' into /etc/hosts before any other line with that name, or set SLURM_SANDBOX_LISTEN_ANY=1 (ports open on all addresses, each message checked by munge)"
    COMM='# CommunicationParameters: none, the ports listen on all addresses'
    addr=127.0.0.1
  fi
  n=$(opt NODES 2) gpus=$(opt GPUS 2)
  base=$(opt PORT_BASE "")
  if [[ -z "$base" ]]; then # 20 ports from a start that depends on DIR, below the ephemeral range
    p=$(cksum <<<"$DIR$(id -u)" | cut -d' ' -f1)
    for ((i = 0; i < 50; i++)); do
      base=$((15000 + ((p + i * 37) % 800) * 20))
      ports_free "$base" $((n + 1)) "$addr" && break
      base=
    done
    [[ -n "$base" ]] || die "no free ports found"
  else
    ports_free "$base" $((n + 1)) "$addr" || die "ports $base.. are taken"
  fi
  HOST=$host ADDR=$addr NCOUNT=$n GPUS=$gpus BASE=$base
}
ports_free() { # BASE COUNT ADDR
  local q
  for ((q = $1; q < $1 + $2; q++)); do
    (exec 3<>"/dev/tcp/$3/$q") 2>/dev/null && return 1
  done
  return 0
}
write_conf() {
  local t g i overmem='' depend='' gres='' nodegres='' nodes ports
  t=$(opt TEMPLATE "$(dirname "$self")/slurm.conf.template")
  [[ -r "$t" ]] || die "no template at $t"
  if ((NCOUNT > 1)); then nodes="n[1-$NCOUNT]" ports="[$((BASE + 1))-$((BASE + NCOUNT))]"; else nodes=n1 ports=$((BASE + 1)); fi
  [[ "$(opt OVERMEM 0)" == 1 ]] && overmem='JobAcctGatherParams=OverMemoryKill'
  [[ "$(opt KILL_INVALID_DEPEND 0)" == 1 ]] && depend='DependencyParameters=kill_invalid_depend'
  rm -f "$DIR/gres.conf"
  if ((GPUS > 0)); then # links to /dev/null stand in for /dev/nvidia*: enough for --gres, --gpus and CUDA_VISIBLE_DEVICES
    mkdir -p "$DIR/dev"
    for ((g = 0; g < GPUS; g++)); do ln -sfn /dev/null "$DIR/dev/gpu$g"; done
    if ((GPUS > 1)); then i="[0-$((GPUS - 1))]"; else i=0; fi
    echo "NodeName=$nodes Name=gpu File=$DIR/dev/gpu$i" >"$DIR/gres.conf"
    gres='GresTypes=gpu' nodegres="Gres=gpu:$GPUS"
  fi
  : >"$DIR/plugstack.conf"
  sed -e "s|@DIR@|$DIR|g" -e "s|@HOST@|$HOST|g" -e "s|@ADDR@|$ADDR|g" -e "s|@COMM@|$COMM|g" \
    -e "s|@USER@|$(id -un)|g" -e "s|@CTLD_PORT@|$BASE|g" -e "s|@SLURMD_PORTS@|$ports|g" \
    -e "s|@NODES@|$nodes|g" -e "s|@CPUS@|$(opt CPUS 4)|g" -e "s|@MEM@|$(opt MEM 4000)|g" \
    -e "s|@CRED_EXPIRE@|$(opt CRED_EXPIRE 5)|g" -e "s|@KILL_WAIT@|$(opt KILL_WAIT 3)|g" \
    -e "s|@SLURMD_TIMEOUT@|$(opt SLURMD_TIMEOUT 10)|g" -e "s|@MIN_JOB_AGE@|$(opt MIN_JOB_AGE 300)|g" \
    -e "s|@MAX_ARRAY@|$(opt MAX_ARRAY 1001)|g" -e "s|@MAX_JOBS@|$(opt MAX_JOBS 10000)|g" -e "s|@GRACE@|$(opt GRACE 5)|g" -e "s|@ACCT_FREQ@|$(opt ACCT_FREQ 5)|g" \
    -e "s|@OVERMEM_LINE@|$overmem|g" -e "s|@DEPEND_LINE@|$depend|g" -e "s|@GRES_LINE@|$gres|g" \
    -e "s|@NODE_GRES@|$nodegres|g" -e "s|@OVERMEM@|OVERMEM=$(opt OVERMEM 0)|g" "$t" >"$DIR/slurm.conf.tmp"
  if [[ -n "$(opt EXTRA "")" ]]; then cat "$(opt EXTRA "")" >>"$DIR/slurm.conf.tmp"; fi
  if grep -v '^#' "$DIR/slurm.conf.tmp" | grep -nE '@[A-Z_]+@'; then die "template words left unfilled"; fi
  mv "$DIR/slurm.conf.tmp" "$DIR/slurm.conf"
  for ((i = 1; i <= NCOUNT; i++)); do echo "n$i"; done >"$DIR/nodes"
}

# ---- verbs
tools() {
  local t
  for t in munged munge unmunge slurmctld slurmd scontrol sinfo squeue scancel setsid flock getent cksum; do
    command -v "$t" >/dev/null || die "$t not found: apt-get install munge slurmctld slurmd slurm-client"
  done
}
start() {
  local d t0=$EPOCHREALTIME
  tools
  for d in $(daemons); do if alive "$d" >/dev/null; then die "$d is already running in $DIR: stop it first"; fi; done
  if [[ -d "$DIR" && -n "$(ls -A "$DIR" 2>/dev/null)" && ! -e "$DIR/.slurm-sandbox" ]]; then
    die "$DIR is not empty and was not made by this script"
  fi
  mkdir -p "$DIR"; chmod go-w "$DIR"; : >"$DIR/.slurm-sandbox"
  kill_strays || die "job processes of an earlier run of $DIR will not end"
  rm -rf "${DIR:?}"/{ctld,d,run,log,dev,nodes}
  mkdir -p "$DIR"/{ctld,d,run,log}
  settings
  write_conf
  for d in $(node_names); do mkdir -p "$DIR/d/$d"; done
  (umask 077; dd if=/dev/urandom of="$DIR/munge.key" bs=128 count=1 status=none)
  trap 'stop >/dev/null 2>&1 || true' EXIT # a start that fails leaves nothing behind
  local lim; lim=$(opt TIMEOUT 20)
  launch munged
  wait_for "$lim" munge_ok || die "munged: $(tail -n 3 "$DIR/log/munged.log" "$DIR/log/munged.out" 2>&1)"
  launch slurmctld # before the slurmds: one whose first report finds no controller waits long to try again
  wait_for "$lim" ctld_ok || die "slurmctld: $(tail -n 5 "$DIR/log/slurmctld.log" "$DIR/log/slurmctld.out" 2>&1)"
  for d in $(node_names); do launch "slurmd-$d"; done
  wait_for "$lim" nodes_ok || die "nodes: $(sinfo -N -l 2>&1; tail -n 5 "$DIR"/log/slurmd-*.log 2>&1)"
  trap - EXIT
  for d in $(daemons); do alive "$d" >/dev/null || die "$d has ended"; done
  echo "up in $(awk -v a="$t0" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }') s: SLURM_CONF=$DIR/slurm.conf"
}
end_all() { # SECONDS NAME...: TERM to each, then KILL to those left after SECONDS
  local d pid grace=$1
  shift
  for d in "$@"; do if pid=$(alive "$d"); then kill -TERM "$pid" 2>/dev/null || true; fi; done
  wait_for "$grace" all_gone "$@" || for d in "$@"; do
    if pid=$(alive "$d"); then kill -KILL "$pid" 2>/dev/null || true; fi
  done
  wait_for 5 all_gone "$@" || return 1
  for d in "$@"; do rm -f "$DIR/run/$d.pid"; done
}
all_gone() { local d; for d in "$@"; do if alive "$d" >/dev/null; then return 1; fi; done; }
kill_strays() { # [NODE]: a shot process may just have forked, so look again until there is none
  local p i
  for ((i = 0; i < 50; i++)); do
    p=$(strays "$@")
    [[ -n "$p" ]] || return 0
    # shellcheck disable=SC2086
    kill -KILL $p 2>/dev/null || true
    sleep 0.1
  done
  return 1
}
stop() { # the state is thrown away, so nothing waits for Slurm's own clean end of jobs
  local d rc=0 nodes=()
  [[ -e "$DIR/.slurm-sandbox" ]] || die "$DIR is not a sandbox"
  for d in $(node_names); do nodes+=("slurmd-$d"); done
  end_all 2 slurmctld "${nodes[@]}" || rc=1
  kill_strays || rc=1
  end_all 2 munged || rc=1
  for d in $(daemons); do if alive "$d" >/dev/null; then echo "still alive: $d" >&2; rc=1; fi; done
  return $rc
}
status() {
  local d pid rc=0
  for d in $(daemons); do
    if pid=$(alive "$d"); then echo "$d running $pid"; else echo "$d dead"; rc=1; fi
  done
  return $rc
}

[[ $# -ge 2 ]] || { sed -n '2,24s/^# \{0,1\}//p' "$self"; exit 2; }
verb=$1 DIR=$2
shift 2
DIR=$(readlink -m -- "$DIR")
[[ "$DIR" =~ ^/[A-Za-z0-9._/+-]+$ ]] || die "DIR may only have letters, digits and ._/+- : $DIR"
[[ ${#DIR} -le 64 ]] || die "DIR is longer than 64 characters (sockets lie in it): $DIR"
export SLURM_CONF="$DIR/slurm.conf"
if [[ "$verb" == start || "$verb" == stop || "$verb" == up ]]; then
  if [[ "$verb" == start ]]; then mkdir -p "$DIR"; fi
  [[ -d "$DIR" ]] || die "$DIR is not there"
  exec 9<"$DIR" # the lock is on the directory itself: nothing to clean up
  flock -w 30 9 || die "another start or stop of $DIR is under way"
fi
case $verb in
  start) start ;;
  stop) stop ;;
  status) status ;;
  env) # an outer job's SLURM_*, SBATCH_* would change what sbatch and srun do
    echo 'unset ${!SLURM_*} ${!SLURMD_*} ${!SBATCH_*} ${!SALLOC_*} ${!SRUN_*}'
    printf 'export SLURM_CONF=%q\nexport SLURM_SANDBOX_DIR=%q\n' "$DIR/slurm.conf" "$DIR" ;;
  exec) eval "$("$self" env "$DIR")"; exec "$@" ;;
  kill) pid=$(alive "$1") || die "$1 is not running"; kill -KILL "$pid"; wait_for 5 all_gone "$1" ;;
  down) alive "$1" >/dev/null || die "$1 is not running"; end_all 20 "$1" ;;
  up) if alive "$1" >/dev/null; then die "$1 is running"; fi; launch "$1"
    case $1 in munged) wait_for 10 munge_ok ;; slurmctld) wait_for 10 ctld_ok ;; *) wait_for 20 nodes_ok ;; esac ;;
  crash-node) pid=$(alive "slurmd-$1") || die "slurmd-$1 is not running"; kill -KILL "$pid"
    kill_strays "$1" ;;
  *) die "no verb $verb" ;;
esac
