#!/usr/bin/env bash
# Takes this project to a machine without network, in parts of a size that its way in allows:
#
#   launch/offline.sh pack OUT [--python=3.12] [--have=jax,jaxlib,numpy] [--records=data/camvid/2.0.0]
#       [--weights=FILE] [--part_mib=60]
#   launch/offline.sh unpack IN DIR
#   launch/offline.sh measure OUT [JOB ...]        jobs: layers step camvid (all three without)
#
# pack downloads the wheels of constraints.txt that the other machine lacks (TensorFlow is left out:
# training and evaluation run without it) and cuts them, the records and the weights into OUT/part-N.
# unpack, there, joins the parts again, checks their sums, and installs the wheels into DIR/site.
# measure, there, from a checkout with DIR/site on PYTHONPATH, writes JSON to OUT: nothing is built,
# nothing is downloaded. camvid needs DATA_DIR (records) and WEIGHTS (an ImageNet ResNet-50).
#
# PYTHON  interpreter (default: python3)
# EPOCHS  of camvid (default: 200); SOURCE, STRIDE_ON: of WEIGHTS (default: torchvision, 3x3)
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

python="${PYTHON:-python3}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

pack() {
  local out="$1" version=3.12 have="" records="" weights="" part=60 name
  shift
  while (($#)); do
    case "$1" in
      --python=*) version="${1#*=}" ;;
      --have=*) have="${1#*=}" ;;
      --records=*) records="${1#*=}" ;;
      --weights=*) weights="${1#*=}" ;;
      --part_mib=*) part="${1#*=}" ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    shift
  done
  [[ "$part" =~ ^[1-9][0-9]*$ ]] || fail "--part_mib=$part: a number of MiB"
  [[ ! -e "$out" ]] || fail "$out exists; name a new folder"
  local stage="$out/stage"
  mkdir -p "$stage/wheels"
  if [[ "$have" != all ]]; then
    mapfile -t pins < <("$python" - "$root" "$version" "$have" <<'PY'
import re, sys, tomllib, pathlib
root, version, have = pathlib.Path(sys.argv[1]), sys.argv[2], {n.lower() for n in sys.argv[3].split(",")}
name = lambda text: re.match(r"[\w.-]+", text)[0].lower().replace("_", "-")
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
extras = {name(d) for listed in project["optional-dependencies"].values() for d in listed}
left_out = {"tensorflow", "tensorflow-cpu", "keras", "tensorboard", "torch", "torchvision"}
for line in (root / "constraints.txt").read_text().splitlines():
    pin, _, marker = line.partition(";")
    if not line or line.startswith("#") or name(pin) in have | left_out | (extras - {"safetensors"}):
        continue
    if marker and ("3.11" in marker and "==" in marker) != (version == "3.11"):
        continue
    print(pin.strip())
PY
    )
    for name in "${pins[@]}"; do  # one by one: a package that has no wheel is said, not fatal
      "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
        --dest "$stage/wheels" "$name" || printf 'no wheel of %s\n' "$name" >&2
    done
  fi
  if [[ -n "$records" ]]; then
    [[ -d "$records" ]] || fail "--records=$records: no such folder"
    mkdir -p "$stage/data/$(basename "$(dirname "$records")")"
    cp -r "$records" "$stage/data/$(basename "$(dirname "$records")")/"
  fi
  if [[ -n "$weights" ]]; then
    [[ -f "$weights" ]] || fail "--weights=$weights: no such file"
    cp "$weights" "$stage/"
  fi
  tar -C "$stage" -cf - . | split --bytes "${part}MiB" --numeric-suffixes --suffix-length 3 - "$out/part-"
  rm -r "$stage"
  (cd "$out" && sha256sum part-* > SHA256SUMS)
  ls -l "$out"
}

unpack() {
  local from="$1" into="$2"
  (cd "$from" && sha256sum --quiet --check SHA256SUMS) || fail "a part of $from is not as packed"
  mkdir -p "$into"
  cat "$from"/part-* | tar -C "$into" -xf -
  if compgen -G "$into/wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$into/site" "$into"/wheels/*.whl
  fi
  printf 'export PYTHONPATH=%q:%q\n' "$root" "$into/site"
}

measure() {
  local out="$1" job
  shift
  mkdir -p "$out"
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}"
  (($#)) || set -- layers step camvid
  for job in "$@"; do
    case "$job" in
      layers | step)
        local what=(--what=layers)
        [[ "$job" == layers ]] || what=(--what="train,infer" --size=1024x2048 --profile)
        "$python" -m duc_dlc_jax.benchmark --config=configs/ade20k.py --peer=torch --steps=10 \
          "${what[@]}" --json="$out/$job.json"
        ;;
      camvid)
        "$python" -m duc_dlc_jax.ablate --config=configs/ablation_camvid.py --workdir="$out/camvid" \
          --only=duc_dlc --seeds=0 --weights --config.train.epochs="${EPOCHS:-200}" \
          --config.data.dir="${DATA_DIR:?the folder of the prepared records}" \
          --config.init.weights="${WEIGHTS:?an ImageNet ResNet-50}" \
          --config.init.source="${SOURCE:-torchvision}" --config.model.stride_on="${STRIDE_ON:-3x3}"
        ;;
      *) fail "unknown job $job; there are layers, step, camvid" ;;
    esac
  done
}

case "${1:-}" in
  pack | unpack | measure)
    (($# >= 2)) || fail "$1 needs a folder; see --help"
    [[ "$1" != unpack ]] || (($# == 3)) || fail "unpack needs the folder of the parts and a target"
    "$@"
    ;;
  --help | -h) usage ;;
  *) fail "pack, unpack or measure; see --help" ;;
esac
