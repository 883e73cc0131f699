#!/usr/bin/env bash
# Trains on a Cloud TPU slice, and goes on when its machines are taken away:
#
#   launch/tpu_pod.sh --name=run1 --zone=us-west4-a --type=v5litepod-16 --spot \
#     -- --config=configs/ade20k.py --workdir=gs://BUCKET/run1
#
# Creates the slice as a queued resource, installs this checkout (the package and configs/) on all of
# its hosts, trains, shows the first host's log, and deletes the slice at the end. A slice that is
# preempted is deleted, created anew, and the run resumes from its workdir, which must be on storage
# that all hosts see and that outlives them: a bucket, or what --setup mounts. Needs gcloud, with a
# project set.
#
# --name=NAME      of the slice and of the queued resource
# --zone=ZONE      --type=ACCELERATOR_TYPE, v5litepod-16 for instance
# --version=NAME   of the TPU software (default: what Google names for the type)
# --spot           cheaper, may be taken away; without it the request is on demand
# --setup=COMMAND  runs on every host after the installation, to mount storage for instance
# --keep           leaves the slice running at the end
# --restarts=N     most times that training is started again, on a new slice or this one (default 20)
# --poll=SECONDS   between two looks at the slice (default 30)
# --patience=SECONDS  for what may pass: gcloud or hosts that do not answer, hosts that still train
#                  when one has ended (default 600)
# --dry_run        prints each command and runs none
# What follows -- goes to `python -m duc_dlc_jax.main` on every host.
#
# Ends with the trainer's exit code (docs/clusters.md), or with 1 where there is no slice to be had
# or it cannot be deleted. If the slice still exists then, the last line says so. The same command
# goes on with a slice that exists: it ends what trains there, and resumes.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

name='' zone='' type='' version='' setup=true spot='' keep='' restarts=20 poll=30 patience=600 dry=''
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --patience=*) patience="${1#*=}" ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; what goes to the program follows --" 2 ;;
  esac
  shift
done
for option in name zone type; do
  [[ -n "${!option}" ]] || fail "--$option=... is missing; see --help" 2
done
for option in restarts poll patience; do
  [[ "${!option}" =~ ^[0-9]+$ ]] || fail "--$option=${!option}: a whole number" 2
done
(($#)) || fail 'nothing to train: after -- come --config=... and --workdir=...' 2
if [[ -z "$version" ]]; then  # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) fail "--type=$type: name its TPU software by --version=... (https://cloud.google.com/tpu/docs/runtimes)" 2 ;;
  esac
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
archive="$(mktemp --suffix=.tar.gz)"

run() {  # prints a command as it could be typed, and runs it unless this is a dry run
  { printf '+'; printf ' %q' "$@"; printf '\n'; } >&2
  [[ -n "$dry" ]] || "$@"
}

tpu() { run gcloud compute tpus "$@" --zone="$zone"; }
on_hosts() { tpu tpu-vm ssh "$name" --worker="$1" --ssh-flag='-o ServerAliveInterval=30' --command="$2"; }

exists=''  # whether there may be a slice that is paid for
delete=(queued-resources delete "$name" --force --quiet)
leave() {
  rm -f "$archive"
  if [[ -n "$exists" && -z "$dry" ]]; then
    printf 'the slice %s still exists and is paid for; this deletes it: gcloud compute tpus' "$name" >&2
    printf ' %q' "${delete[@]}" --zone="$zone" >&2
    printf '\n' >&2
  fi
}
trap leave EXIT
trap 'exit 130' INT  # gcloud handles it, and bash would go on

# Sets `state` to that of the queued resource: ACTIVE, SUSPENDED, ..., or NONE where there is none.
# gcloud that fails (the network, a login that expired) says nothing of the slice.
look() {
  local start=$SECONDS listed
  state="${exists:+ACTIVE}" state="${state:-NONE}"
  [[ -z "$dry" ]] || return 0
  until listed="$(gcloud compute tpus queued-resources list --zone="$zone" --format='value(name.basename(), state.state)')"; do
    if ((SECONDS - start >= patience)); then
      fail "gcloud lists no queued resources of $zone, see above; when it does, the same command goes on"
    fi
    printf 'gcloud fails; it is asked again\n' >&2
    sleep "$poll"
  done
  state="$(awk -v name="$name" '$1 == name { found = $2 } END { print found ? found : "NONE" }' <<<"$listed")"
  if [[ "$state" == NONE ]]; then exists=''; else exists=1; fi
}

delete() {
  local start=$SECONDS
  until tpu "${delete[@]}"; do
    look
    if [[ "$state" == NONE ]]; then return; fi
    if ((SECONDS - start >= patience)); then fail 'the slice cannot be deleted, see above'; fi
    sleep "$poll"
  done
  exists=''
}

finish() {
  if [[ -z "$keep" && -n "$exists" ]]; then delete; fi
  exit "$code"
}

started=0
again() {  # $1: why
  if ((++started > restarts)); then
    printf 'error: %s, after %d restarts (--restarts)\n' "$1" "$restarts" >&2
    finish
  fi
  printf '%s: attempt %d of %d follows\n' "$1" "$started" "$restarts" >&2
}

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  if [[ -n "$spot" ]]; then options+=(--spot); fi
  exists=1
  tpu queued-resources create "$name" "${options[@]}"
}

ready() {  # waits for an active slice
  local waiting='' made=''
  while true; do
    look
    case "$state" in
      ACTIVE) return ;;
      NONE)
        made=1
        if ! create; then
          look
          if [[ "$state" == NONE ]]; then
            if ((!started)); then fail 'gcloud refuses the request, see above'; fi
            again 'gcloud refuses the request, see above'
          fi
        fi ;;
      FAILED)
        gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='yaml(state)' >&2 || true
        again 'the request failed, see above'
        delete ;;
      SUSPENDED)
        if [[ -n "$made" ]]; then again 'the slice was taken away before it was ready'; fi
        delete ;;
      "$waiting") ;;
      *) printf 'waiting for the slice: %s\n' "$state" >&2 ;;
    esac
    waiting="$state"
    [[ -n "$dry" ]] || sleep "$poll"
  done
}

# The images have Python 3.10 (Ubuntu 22.04), hence uv, which brings another.
# shellcheck disable=SC2016
unpack='set -e
mkdir -p duc_dlc_jax
tar -xzf duc_dlc_jax.tar.gz -C duc_dlc_jax
cd duc_dlc_jax
uv="$HOME/.uv/uv"
if [ ! -x "$uv" ]; then
  curl -LsSf https://astral.sh/uv/install.sh -o uv.sh && UV_UNMANAGED_INSTALL="$HOME/.uv" sh uv.sh ||
    { echo "error: $(hostname) cannot install uv; does it reach the internet?" >&2; exit 1; }
fi
"$uv" venv --quiet --allow-existing --python 3.12 .venv ||
  { echo "error: $(hostname) gets no Python 3.12" >&2; exit 1; }
"$uv" pip install --quiet --python .venv -c constraints.txt -e ".[tpu,cloud]"'

install() {
  tpu tpu-vm scp "$archive" "$name:duc_dlc_jax.tar.gz" --worker=all &&
    on_hosts all "$unpack" && on_hosts all "$setup"
}

# A trainer outlives the connection: it is a session of its own whose exit code goes to a file. One
# that is there already would keep the TPU: it may save a checkpoint, and is killed after a minute.
# shellcheck disable=SC2016
start='cd duc_dlc_jax || exit
old="$(cat trainer.pid 2>/dev/null)"
if [ -n "$old" ] && kill -TERM -- "-$old" 2>/dev/null; then
  for i in $(seq 300); do kill -0 -- "-$old" 2>/dev/null || break; sleep 0.2; done
  kill -KILL -- "-$old" 2>/dev/null
fi
rm -f exit_code
setsid sh -c '\''"$@"; echo $? >exit_code'\'' sh .venv/bin/python -m duc_dlc_jax.main'
# shellcheck disable=SC2016
started_as=' >train.log 2>&1 </dev/null &
echo $! >trainer.pid'
# shellcheck disable=SC2016
report='cd duc_dlc_jax && if kill -0 "$(cat trainer.pid)" 2>/dev/null; then echo trainer running
elif [ -s exit_code ]; then echo "trainer $(cat exit_code)"; else echo trainer 137; fi'

final() {  # an exit code that no restart mends
  case "$1" in
    2 | 3 | 4 | 6) ;;
    *) return 1 ;;
  esac
}

judge() {  # sets `code` to that of the run, from the hosts' codes
  local one
  code=0
  for one in "$@"; do
    if final "$one"; then code="$one"; return; fi
    if ((code == 0)); then code="$one"; fi
  done
}

train() {  # sets `code`, and `why` training is to be started again
  local answers codes lines=+1 silent='' ended=''
  code=75 why='the trainer cannot be started on all hosts'
  on_hosts all "$start$(printf ' %q' "$@")$started_as" || return 0
  while true; do
    if [[ -z "$ended" ]]; then
      on_hosts 0 "cd duc_dlc_jax && tail -n $lines -s 0.1 --pid=\"\$(cat trainer.pid)\" -F train.log" || true
      lines=20
    fi
    if [[ -n "$dry" ]]; then code=0; return; fi
    look
    why="the slice is $state"
    if [[ "$state" != ACTIVE ]]; then code=75; return; fi
    if answers="$(on_hosts all "$report")"; then
      silent=''
      mapfile -t codes < <(awk '$1 == "trainer" && $2 != "running" { print $2 }' <<<"$answers")
      judge "${codes[@]}"
      why="exit code $code"
      if final "$code" || ! grep -q '^trainer running' <<<"$answers"; then return; fi
      if ((${#codes[@]})); then
        : "${ended:=$SECONDS}"
        if ((SECONDS - ended >= patience)); then
          why="exit code $code on one host, while others go on after $patience s"
          if ((code == 0)); then code=75; fi
          return
        fi
      fi
    else
      : "${silent:=$SECONDS}"
      if ((SECONDS - silent >= patience)); then
        code=75 why="hosts of the slice do not answer for $patience s"
        delete
        return
      fi
    fi
    sleep "$poll"
  done
}

run tar -czf "$archive" -C "$root" --exclude=__pycache__ \
  pyproject.toml README.md LICENSE constraints.txt configs duc_dlc_jax
code=1
while true; do
  ready
  if install; then train "$@"; else code=1 why='the installation failed, see above'; fi
  if ((code == 0)) || final "$code"; then finish; fi
  again "$why"
done
