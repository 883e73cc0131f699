#!/usr/bin/env bash
# Stands in for gcloud and, on the hosts of its slice, for curl, uv and Python. In the folder $CLOUD:
#
# states      the queued resource's state at each look: NONE, ACTIVE, ..., UNKNOWN: gcloud fails
# failures    patterns; the next call that begins so fails, and takes its line away
# trainer-N   what the trainer of host N does, at each start
# host-N      its home
# calls       all calls, each ended by a NUL
set -uo pipefail

next() {  # the next line of a file, whose last one stays
  head -n 1 "$CLOUD/$1"
  if (($(wc -l <"$CLOUD/$1") > 1)); then sed -i 1d "$CLOUD/$1"; fi
}

called="${0##*/} $*"
printf '%s\0' "$called" >>"$CLOUD/calls"
mapfile -t failures <"$CLOUD/failures"
for i in "${!failures[@]}"; do
  # shellcheck disable=SC2053
  if [[ "$called" == ${failures[i]}* ]]; then
    sed -i "$((i + 1))d" "$CLOUD/failures"
    printf 'ERROR: the test wants it\n' >&2
    exit 1
  fi
done

on_host() {  # a connection ends when nobody holds its output any more
  HOST="$1" HOME="$CLOUD/host-$1" bash -c 'cd && bash -c "$1" | cat; exit "${PIPESTATUS[0]}"' - "$2"
}

case "$called" in
  'gcloud compute tpus queued-resources list '*)
    state="$(next states)"
    printf 'another\tFAILED\n'
    case "$state" in
      NONE) ;;
      UNKNOWN) printf 'ERROR: log in again\n' >&2; exit 1 ;;
      *) printf 'run1\t%s\n' "$state" ;;
    esac ;;
  'gcloud compute tpus queued-resources create '*)
    rm -rf "$CLOUD"/host-*
    for trainer in "$CLOUD"/trainer-*; do mkdir "$CLOUD/host-${trainer##*-}"; done ;;
  'gcloud compute tpus queued-resources describe '*) printf 'state: no such topology\n' ;;
  'gcloud compute tpus tpu-vm scp '*)
    for home in "$CLOUD"/host-*; do cp "$5" "$home/${6#run1:}"; done ;;
  'gcloud compute tpus tpu-vm ssh '*)
    code=0 pids=()
    for word in "$@"; do
      case "$word" in
        --worker=all) workers=("$CLOUD"/host-*) ;;
        --worker=*) workers=("$CLOUD/host-${word#*=}") ;;
        --command=*) command="${word#*=}" ;;
      esac
    done
    for home in "${workers[@]}"; do
      on_host "${home##*-}" "$command" &
      pids+=("$!")
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit "$code" ;;
  'curl '*)  # an installer
    # shellcheck disable=SC2016
    printf 'mkdir -p "$UV_UNMANAGED_INSTALL" && ln -sf "%s" "$UV_UNMANAGED_INSTALL/uv"\n' "$0" >"${*: -1}" ;;
  'uv venv '*) mkdir -p .venv/bin && ln -sf "$0" .venv/bin/python ;;
  'uv pip '*) [[ -f pyproject.toml && -x .venv/bin/python ]] ;;
  'python -m duc_dlc_jax.main '*)
    printf 'host %s trains\n' "$HOST"
    eval "$(next "trainer-$HOST")" ;;
esac
