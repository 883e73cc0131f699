#!/usr/bin/env bash
# Takes this project to a machine without network, in parts of a size that its way in allows:
#
#   launch/offline.sh pack OUT [--python=3.12] [--have=jax,jaxlib,numpy] [--records=data/camvid/2.0.0]
#       [--weights=FILE] [--part_mib=60]
#   launch/offline.sh unpack IN DIR
#   launch/offline.sh measure OUT [JOB ...]        all jobs without
#
# pack downloads the wheels of constraints.txt that the other machine lacks (TensorFlow is left out:
# training and evaluation run without it) and cuts them, the records and the weights into OUT/part-N.
# unpack, there, joins the parts again, checks their sums, and installs the wheels into DIR/site.
# measure, there, from a checkout with DIR/site on PYTHONPATH, writes JSON to OUT: nothing is built,
# nothing is downloaded. Its jobs:
#
#   layers  dilated convolutions and the loss, one by one, beside PyTorch
#   step    training and labelling beside PyTorch, with a profile
#   networks  training of other depths, output strides and crops, and under options of XLA
#   resume  200 steps straight, twice, and killed after 100, resumed with the compilation cache and
#           without; with train.deterministic and without. Needs camvid in DATA_DIR
#   bundle  a network of `resume` exported, and timed beside PyTorch (after resume)
#   camvid  the whole recipe, one seed. Needs camvid in DATA_DIR, and WEIGHTS (a ResNet-50)
#   grid    the first variants of configs/ablation_camvid.py. Needs what camvid does
#
# PYTHON  interpreter (default: python3)
# EPOCHS  of camvid (default: 200); SOURCE, STRIDE_ON: of WEIGHTS (default: torchvision, 3x3)
# WAYS    of step: PyTorch's, eager,compile (default: both)
# NETWORKS, OPTIONS  of networks: as 101/8@768x8,50/8@480x16 (11 of them), and options of XLA (2);
#         options come first, and each row is in the JSON as soon as it is measured
# FIELDS  more --config.NAME=VALUE of resume, camvid and grid
# RESUME, RESUME_MEM_FRACTION  of resume: pairs of deterministic,cache (all four), each one's part (0.15)
# GRID, GRID_EPOCHS, GRID_SEEDS  of grid: patterns of variants (default: the first six), 24, 0,1,2
# PROCESSES, GRID_MEM_FRACTION  of grid: how many share it, and each one's part of a GPU (2, 0.4)
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
  out="$(cd "$out" && pwd)"
  (($#)) || set -- layers step networks resume bundle camvid grid
  for job in "$@"; do
    case "$job" in
      layers | step | networks | resume | bundle | camvid | grid) ;;
      *) fail "unknown job $job; there are layers, step, networks, resume, bundle, camvid, grid" ;;
    esac
  done
  read -ra fields <<<"${FIELDS:-}"
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}"
  for job in "$@"; do
    printf '%s begins after %s s\n' "$job" "$SECONDS"
    "measure_$job" "$out"
  done
}

benchmark() {
  "$python" -m duc_dlc_jax.benchmark --config=configs/ade20k.py --steps=10 "$@"
}

measure_layers() {
  benchmark --peer=torch --what=layers --json="$1/layers.json"
}

# Without CUDA graphs, in which the profile would not see single kernels.
measure_step() {
  local way ways=() wanted="${WAYS:-}"
  for way in ${wanted//,/ }; do ways+=("--ways=$way"); done
  XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}" benchmark --peer=torch \
    --what=train,infer --size=1024x2048 --profile --rounds=3 --json="$1/step.json" "${ways[@]}"
}

measure_networks() {
  local networks=50/16@480x16,50/8@480x16,101/32@480x16,101/16@480x16,101/8@480x16,50/32@768x8
  networks+=,50/16@768x8,50/8@768x8,101/32@768x8,101/16@768x8,101/8@768x8
  local options=xla_gpu_deterministic_ops=true,xla_gpu_enable_triton_gemm=false
  benchmark --what=train,networks --rounds=3 --json="$1/networks.json" \
    --xla_options="${OPTIONS-$options}" --networks="${NETWORKS-$networks}"
}

measure_resume() {
  local out="$1" pair kind pids=() names=()
  for pair in ${RESUME:-True,true True,false False,true False,false}; do
    local dir="$out/resume/deterministic-${pair%,*}-cache-${pair#*,}"
    mkdir -p "$dir"
    XLA_PYTHON_CLIENT_MEM_FRACTION="${RESUME_MEM_FRACTION:-0.15}" \
      JAX_ENABLE_COMPILATION_CACHE="${pair#*,}" "$python" -m duc_dlc_jax.main --workdir="$dir" \
      --config=configs/camvid.py --config.data.crop_size=240 --config.data.threads=3 \
      --config.data.dir="${DATA_DIR:?the folder of the prepared records}" \
      --config.model.dtype=bfloat16 --config.train.eval_every=0 \
      --config.train.deterministic="${pair%,*}" "${fields[@]}" \
      --verify_resume --verify_steps="${STEPS:-200}" >"$dir.txt" 2>&1 &
    pids+=("$!") names+=("$dir")
  done
  local i
  for i in "${!pids[@]}"; do
    wait "${pids[i]}" && printf 'equal: %s\n' "${names[i]}" || printf 'not equal: %s\n' "${names[i]}"
    tail -n 4 "${names[i]}.txt"
  done
  for kind in True False; do
    local one="$out/resume/deterministic-$kind-cache"
    [[ -d "$one-true" && -d "$one-false" ]] || continue
    printf 'straight twice, deterministic %s: ' "$kind"
    JAX_PLATFORMS=cpu "$python" - "$one-true" "$one-false" "${STEPS:-200}" <<'PY' || true
import sys
from etils import epath
from duc_dlc_jax.verify_resume import compare
from duc_dlc_jax.errors import NotEqual
one, other = (epath.Path(folder) / "verify_resume" / "straight" for folder in sys.argv[1:3])
try:
    print(compare(one, other, int(sys.argv[3])))
except NotEqual as error:
    print("\n".join(str(error).splitlines()[:6]))
PY
  done
}

measure_bundle() {
  local run="$1/resume/deterministic-False-cache-true/verify_resume/straight"
  "$python" -m duc_dlc_jax.export --workdir="$run" --output="$1/bundle" --format=stablehlo \
    --dtype=bfloat16
  "$python" -m duc_dlc_jax.benchmark.bundles --model="$1/bundle" --workdir="$run" --rounds=2 \
    --calls=10 | tee "$1/bundles.txt"
}

ablate() {
  "$python" -m duc_dlc_jax.ablate --config=configs/ablation_camvid.py \
    --config.data.dir="${DATA_DIR:?the folder of the prepared records}" \
    --config.init.weights="${WEIGHTS:?an ImageNet ResNet-50}" \
    --config.init.source="${SOURCE:-torchvision}" \
    --config.model.stride_on="${STRIDE_ON:-3x3}" \
    --config.train.eval_every=0 --config.train.checkpoint_every=100000 "$@" "${fields[@]}"
}

measure_camvid() {
  ablate --workdir="$1/camvid" --only=duc_dlc --seeds=0 --weights \
    --config.train.epochs="${EPOCHS:-200}" --config.data.workers=4 --config.data.threads=2
}

# Two at once fill a GPU that one, fed by threads, leaves half idle.
measure_grid() {
  local i
  for ((i = 0; i < ${PROCESSES:-2}; i++)); do
    XLA_PYTHON_CLIENT_MEM_FRACTION="${GRID_MEM_FRACTION:-0.4}" ablate --workdir="$1/grid" \
      --only="${GRID:-fcn,bilinear,duc,dlc,duc_dlc,deeplabv3}" --seeds="${GRID_SEEDS:-0,1,2}" \
      --config.train.epochs="${GRID_EPOCHS:-24}" >"$1/grid-$i.txt" 2>&1 &
  done
  wait
  tail -n 12 "$1"/grid-*.txt
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
