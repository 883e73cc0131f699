#!/usr/bin/env bash
# Trains on a Cloud TPU slice, and goes on when its machines are taken away:
#
#   launch/tpu_pod.sh --name=run1 --zone=us-west4-a --type=v5litepod-16 --spot \
#     -- --config=configs/ade20k.py --workdir=/mnt/shared/run1
#
# Creates the slice as a queued resource, installs this checkout on all of its hosts, trains, shows
# the first host's log, and deletes the slice at the end. A slice that is preempted is deleted,
# created anew, and the run resumes from its workdir, which must be on storage that all hosts see
# and that outlives them (--setup can mount it). Needs gcloud, with a project set.
#
# --name=NAME      of the slice and of the queued resource
# --zone=ZONE      --type=ACCELERATOR_TYPE, v5litepod-16 for instance
# --version=NAME   of the TPU software (default v2-alpha-tpuv5-lite)
# --spot           cheaper, may be taken away; without it the request is on demand
# --setup=COMMAND  runs on every host after the installation, to mount storage for instance
# --keep           leaves the slice running at the end
# --restarts=N     most times that the slice is created anew (default 20)
# --poll=SECONDS   between two looks at the slice (default 30)
# --dry_run        prints each command and runs none
# What follows -- goes to `python -m duc_dlc_jax.main` on every host.
#
# Ends with the trainer's exit code (docs/clusters.md).
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

name='' zone='' type='' version=v2-alpha-tpuv5-lite setup=true spot='' keep='' restarts=20 poll=30 dry=''
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) printf 'error: unknown option %s; what goes to the program follows --\n' "$1" >&2; exit 2 ;;
  esac
  shift
done
for option in name zone type; do
  if [[ -z "${!option}" ]]; then
    printf 'error: --%s=... is missing; see --help\n' "$option" >&2
    exit 2
  fi
done
if ((!$#)); then
  printf 'error: nothing to train: after -- come --config=... and --workdir=...\n' >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

run() {  # prints a command as it could be typed, and runs it unless this is a dry run
  { printf '+'; printf ' %q' "$@"; printf '\n'; } >&2
  [[ -n "$dry" ]] || "$@"
}

tpu() { run gcloud compute tpus "$@" --zone="$zone"; }
on_hosts() { tpu tpu-vm ssh "$name" --worker="$1" --command="$2"; }

state() {  # of the queued resource: ACTIVE, SUSPENDED, ...; empty where there is none
  if [[ -n "$dry" ]]; then printf 'ACTIVE\n'; return; fi
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true
}

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  if [[ -n "$spot" ]]; then options+=(--spot); fi
  tpu queued-resources create "$name" "${options[@]}"
  while true; do
    found="$(state)"
    case "$found" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) delete; tpu queued-resources create "$name" "${options[@]}" ;;
      *) printf 'waiting for the slice: %s\n' "$found" >&2 ;;
    esac
    sleep "$poll"
  done
}

delete() { tpu queued-resources delete "$name" --force --quiet || true; }

install() {
  local archive
  archive="$(mktemp --suffix=.tar.gz)"
  run tar -czf "$archive" -C "$root" --exclude=.git --exclude='.venv*' --exclude=.cache --exclude=data --exclude=runs .
  tpu tpu-vm scp "$archive" "$name:duc_dlc_jax.tar.gz" --worker=all
  rm -f "$archive"
  on_hosts all 'mkdir -p duc_dlc_jax && tar -xzf duc_dlc_jax.tar.gz -C duc_dlc_jax && cd duc_dlc_jax && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[tpu]"'
  on_hosts all "$setup"
}

# The trainer survives a broken connection: it runs in the background on each host, and its exit
# code is kept in a file there.
train() {
  local arguments
  arguments="$(printf ' %q' "$@")"
  on_hosts all "cd duc_dlc_jax && rm -f exit_code && (nohup sh -c '.venv/bin/python -m duc_dlc_jax.main$(printf '%s' "${arguments//\'/\'\\\'\'}"); echo \$? >exit_code' >train.log 2>&1 </dev/null &)"
  while true; do
    # Follows the log until the trainer ends; a lost connection ends it too.
    on_hosts 0 'cd duc_dlc_jax && tail -n +1 -F train.log & while [ ! -s duc_dlc_jax/exit_code ]; do sleep 2; done; sleep 3; kill $!' || true
    if [[ -n "$dry" ]]; then return 0; fi
    if [[ "$(state)" != ACTIVE ]]; then return 75; fi
    code="$(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command='cat duc_dlc_jax/exit_code' 2>/dev/null || true)"
    if [[ "$code" =~ ^[0-9]+$ ]]; then return "$code"; fi
    sleep "$poll"
  done
}

code=1
for ((attempt = 0; attempt <= restarts; attempt++)); do
  found="$(state)"
  if [[ "$found" != ACTIVE || -n "$dry" ]]; then
    if [[ -n "$found" && -z "$dry" ]]; then delete; fi
    create
  fi
  code=0
  if install; then train "$@" || code=$?; else code=75; fi
  case "$code" in
    0 | 2 | 3 | 4 | 6) break ;;
    *) printf 'exit code %d: attempt %d of %d follows\n' "$code" $((attempt + 1)) "$restarts" >&2 ;;
  esac
done
if [[ -z "$keep" ]]; then delete; fi
exit "$code"
