#!/usr/bin/env bash
# Trains with several processes on this machine, joined by jax.distributed:
#
#   launch/local.sh --processes=2 -- --config=configs/demo.py --workdir=runs/two
#
# What follows -- goes to `python -m duc_dlc_jax.main`. Process 0 writes to this terminal, the others
# to a file each. When one process fails, the others are ended and its exit code is the script's.
# SIGTERM, Ctrl-C, SIGUSR1 or SIGHUP: all processes save a checkpoint and end with code 75, as long as
# that takes; a second one kills them. Needs bash 5.1.
#
# DEVICES_PER_PROCESS  CPU devices of each process, or GPUs of each process (default 1)
# JAX_PLATFORMS        cpu (default) or cuda
# PYTHON               interpreter (default: .venv/bin/python if there is one, else python3)
# LOG_DIR              folder for the output of processes 1 and up (default: a temporary one)
# KILL_AFTER           seconds that the others have to end when one failed (default 5)
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

processes=2
while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) printf 'error: unknown option %s; what goes to the program follows --\n' "$1" >&2; exit 2 ;;
  esac
  shift
done
devices="${DEVICES_PER_PROCESS:-1}"
for number in "$processes" "$devices"; do
  if [[ ! "$number" =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: --processes and DEVICES_PER_PROCESS are counts from 1, not %s\n' "$number" >&2
    exit 2
  fi
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  if [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
logs="${LOG_DIR:-$(mktemp -d)}"
mkdir -p "$logs"
port="$("$python" -c 'import socket; s = socket.create_server(("localhost", 0)); print(s.getsockname()[1])')"

pids=()
finish() {  # SIGTERM, and SIGKILL later: jax.distributed catches the first
  local tries
  ((${#pids[@]})) || return 0
  kill "${pids[@]}" 2>/dev/null || true
  for ((tries = 0; tries < 10 * ${KILL_AFTER:-5}; tries++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}
trap finish EXIT

stopping=
stop() {
  local signal=KILL
  if [[ -z "$stopping" ]]; then
    stopping=1 signal=TERM
    printf 'stopping with a checkpoint; a second signal kills the processes\n' >&2
  fi
  kill -s "$signal" "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM USR1 HUP

for ((i = 0; i < processes; i++)); do
  command=("$python" -m duc_dlc_jax.main "$@"
    "--coordinator=localhost:$port" "--processes=$processes" "--process=$i")
  if [[ "$JAX_PLATFORMS" == cpu ]]; then
    export JAX_NUM_CPU_DEVICES="$devices"
  else
    cards="$(seq -s , $((i * devices)) $((i * devices + devices - 1)))"
    export CUDA_VISIBLE_DEVICES="$cards"
  fi
  if ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >"$logs/process-$i.log" 2>&1 &
  fi
  pids[i]=$!
done
if ((processes > 1)); then
  printf 'output of the other processes: %s/process-N.log\n' "$logs" >&2
fi

if [[ -n "$stopping" ]]; then kill "${pids[@]}" 2>/dev/null || true; fi  # those started since, too

result=0
while ((${#pids[@]})); do
  code=0 ended=
  wait -n -p ended "${pids[@]}" || code=$?
  if [[ -z "${ended:-}" ]]; then continue; fi  # a signal ended the wait
  for i in "${!pids[@]}"; do
    if [[ "${pids[i]}" == "$ended" ]]; then break; fi
  done
  unset "pids[i]"
  if ((code == 75)); then  # told to stop, and so are the others: none is to be killed while it saves
    result=75
  elif ((code != 0)); then
    if ((i != 0)); then tail -n 20 "$logs/process-$i.log" >&2; fi
    printf 'process %d of %d ended with exit code %d; ending the others\n' "$i" "$processes" "$code" >&2
    exit "$code"
  fi
done
if ((result)); then exit "$result"; fi
