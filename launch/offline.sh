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
# nothing is downloaded. A job that fails does not end the others: its name comes last, and the exit
# code is 1. Each row is in the JSON as soon as it is measured, and what the JSON holds is not
# measured again (AGAIN=1: it is): a command that is cut off goes on when it is given again.
# Compiled programs are kept in OUT/cache, or where JAX_COMPILATION_CACHE_DIR says. OUT/jobs.jsonl
# says how long each job took. Its jobs, with the seconds that one might take on a GPU with nothing
# compiled, by estimate: a program of the training step compiles for 35 to 50:
#
#   step    training and labelling with XLA's defaults beside PyTorch, and in a second process, with
#           CUDA graphs off, a profile (WAYS=eager 250; torch.compile 100 more)
#   networks  training with options of XLA, the first of them train.deterministic's, and of other
#           depths, output strides and crops (20, and 45 each of 16)
#   layers  dilated convolutions and the loss, one by one, beside PyTorch (200)
#   memory  training with remat and accumulation by the clock (20, and 45 each of 4), and the largest
#           batch per device with remat (200 each of 3)
#   fed     training fed by threads, by workers, and from images on the device, beside training on
#           one batch (150). Needs camvid in DATA_DIR
#   resume  200 steps straight, twice, and killed after 100, resumed with the compilation cache and
#           without; with train.deterministic and without (300). Needs camvid in DATA_DIR
#   bundle  a network of `resume` exported, and timed beside PyTorch (150; after resume)
#   camvid  the whole recipe, one seed (200). Needs camvid in DATA_DIR, and WEIGHTS (a ResNet-50)
#   grid    the first variants of configs/ablation_camvid.py (900). Needs what camvid does
#
# PYTHON  interpreter (default: python3)
# EPOCHS  of camvid (default: 200); SOURCE, STRIDE_ON: of WEIGHTS (default: torchvision, 3x3)
# WAYS    of step: PyTorch's, as eager,compile (default: all)
# NETWORKS, OPTIONS  of networks: as 101/8@768x8,50/8@480x16 (11 of them), and options of XLA (4)
# TIMED, LARGEST  of memory: networks, as 50/32@480x16+model.remat=blocks, timed (4), and whose
#         largest batch is found (3); "" for none
# FIELDS  more --config.NAME=VALUE of fed, resume, camvid and grid
# RESUME, RESUME_MEM_FRACTION  of resume: pairs of deterministic,cache (all four), each one's part (0.15)
# MEMORY_MEM_FRACTION, BUNDLE_MEM_FRACTION  parts of a GPU that a process of theirs takes (0.92, 0.25)
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

jobs=(step networks layers memory fed resume bundle camvid grid)

measure() {
  local out="$1" job status start lost=()
  shift
  (($#)) || set -- "${jobs[@]}"
  for job in "$@"; do
    [[ " ${jobs[*]} " == *" $job "* ]] || fail "unknown job $job; there are ${jobs[*]}"
  done
  mkdir -p "$out"
  out="$(cd "$out" && pwd)"
  read -ra fields <<<"${FIELDS:-}"
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}"
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/cache}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
  for job in "$@"; do
    start="$SECONDS"
    printf '%s begins after %s s\n' "$job" "$start"
    set +e  # in a condition, bash would go on after what fails within the job
    (set -e; "measure_$job" "$out")
    status="$?"
    set -e
    ((status == 0)) || lost+=("$job ($status)")
    printf '{"job": "%s", "seconds": %s, "status": %s}\n' "$job" "$((SECONDS - start))" "$status" |
      tee -a "$out/jobs.jsonl"
  done
  ((${#lost[@]} == 0)) && return
  printf 'error: failed, with exit status: %s\n' "${lost[*]}" >&2
  return 1
}

# Runs a part of a job; the job goes on where it fails, and ends with `return "$failed"`.
part() {
  "$@" || failed="$?"
}

benchmark() {
  "$python" -m duc_dlc_jax.benchmark --steps=10 ${AGAIN:+--again} "$@"
}

measure_step() {
  local failed=0 way ways=() wanted="${WAYS:-}"
  local what=(--config=configs/ade20k.py "--what=train,infer" --size=1024x2048)
  for way in ${wanted//,/ }; do ways+=("--ways=$way"); done
  part benchmark "${what[@]}" --peer=torch --rounds=3 --json="$1/step.json" "${ways[@]}"
  # Without CUDA graphs, in which the profile would not see single kernels.
  XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}" part benchmark "${what[@]}" \
    --profile --rounds=1 --json="$1/profile.json"
  return "$failed"
}

measure_networks() {
  local networks=50/16@480x16,50/8@480x16,101/32@480x16,101/16@480x16,101/8@480x16,50/32@768x8
  networks+=,50/16@768x8,50/8@768x8,101/32@768x8,101/16@768x8,101/8@768x8
  local options=xla_gpu_deterministic_ops=true,xla_gpu_enable_latency_hiding_scheduler=true
  options+=,xla_gpu_enable_triton_gemm=false,xla_gpu_all_reduce_combine_threshold_bytes=268435456
  benchmark --config=configs/ade20k.py --what=train,networks --rounds=3 \
    --json="$1/networks.json" --xla_options="${OPTIONS-$options}" --networks="${NETWORKS-$networks}"
}

measure_layers() {
  benchmark --config=configs/ade20k.py --peer=torch --what=layers --json="$1/layers.json"
}

measure_memory() {
  local failed=0 plain=50/32@480x16
  local largest="$plain,$plain+model.remat=blocks,$plain+model.remat=all"
  local timed="$largest,$plain+train.accumulate=2"
  timed="${TIMED-$timed}" largest="${LARGEST-$largest}"
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${MEMORY_MEM_FRACTION:-0.92}"
  [[ -z "$timed" ]] || part benchmark --config=configs/ade20k.py --what=networks --rounds=3 \
    --json="$1/memory.json" --networks="$timed"
  [[ -z "$largest" ]] || part benchmark --config=configs/ade20k.py --what=memory \
    --json="$1/memory.json" --networks="$largest"
  return "$failed"
}

measure_fed() {
  local failed=0 how
  for how in --config.data.threads=8 --config.data.workers=4 --config.data.on_device=True; do
    part benchmark --config=configs/camvid.py --what=fed --steps=50 --json="$1/fed.json" \
      --config.data.dir="${DATA_DIR:?the folder of the prepared records}" \
      --config.model.dtype=bfloat16 "$how" "${fields[@]}"
  done
  return "$failed"
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
  [[ -d "$1/bundle" ]] || "$python" -m duc_dlc_jax.export --workdir="$run" --output="$1/bundle" \
    --format=stablehlo --dtype=bfloat16
  # This process, the bundle's and PyTorch's share the GPU.
  XLA_PYTHON_CLIENT_MEM_FRACTION="${BUNDLE_MEM_FRACTION:-0.25}" \
    "$python" -m duc_dlc_jax.benchmark.bundles --model="$1/bundle" --workdir="$run" --rounds=2 \
    --calls=10 --json="$1/bundles.json"
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
  local i pid pids=() failed=0
  for ((i = 0; i < ${PROCESSES:-2}; i++)); do
    XLA_PYTHON_CLIENT_MEM_FRACTION="${GRID_MEM_FRACTION:-0.4}" ablate --workdir="$1/grid" \
      --only="${GRID:-fcn,bilinear,duc,dlc,duc_dlc,deeplabv3}" --seeds="${GRID_SEEDS:-0,1,2}" \
      --config.train.epochs="${GRID_EPOCHS:-24}" >"$1/grid-$i.txt" 2>&1 &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do part wait "$pid"; done
  tail -n 12 "$1"/grid-*.txt
  return "$failed"
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
