#!/usr/bin/env bash
# Takes this project to a machine without network, in parts of a size that its way in allows:
#
#   launch/offline.sh pack OUT [--python=3.12] [--have=jax,jaxlib,numpy|FILE|all]
#       [--records=data/camvid/2.0.0] [--weights=FILE] [--part_mib=60]
#   launch/offline.sh unpack IN DIR
#   launch/offline.sh measure OUT [--seconds=N] [JOB ...]        all jobs without
#
# pack downloads what the package needs and the other machine lacks, at the versions of
# constraints.txt (TensorFlow is left out: training and evaluation run without it), and cuts the
# wheels, the records and the weights into OUT/part-N. --have names packages that are there, with
# what they need themselves, or a FILE of all that is there: what `pip freeze` says.
# unpack, there, joins the parts again, checks their sums, and installs the wheels into DIR/site.
# measure, there, from a checkout with DIR/site on PYTHONPATH, writes JSON to OUT: nothing is built,
# nothing is downloaded. A job that fails does not end the others: its name comes last, and the exit
# code is 1. Each row is in the JSON as soon as it is measured, and what the JSON holds is not
# measured again (AGAIN=1: it is): a command that is cut off goes on when it is given again. With
# --seconds nothing is begun that might not end in time; smaller things that come later may be, and
# what was not begun is said. Compiled programs are kept in OUT/cache, or where
# JAX_COMPILATION_CACHE_DIR says. OUT/figures.json has what was measured, profile.json the profiles
# and jobs.jsonl the seconds of each job; `python -m duc_dlc_jax.benchmark.tables OUT/figures.json
# OUT/profile.json` prints the tables.
#
# The jobs, what tells most first, with the seconds that one might take on a GPU with nothing
# compiled, by estimate: a program of the training step compiles for 35 to 50.
#
#   options  training with options of XLA, the first of them train.deterministic's (20, and 45 each
#           of 4)
#   step    training and labelling with XLA's defaults beside PyTorch, eager and torch.compile (350),
#           and in a second process, with CUDA graphs off, a profile (100)
#   remat   training with remat and accumulation by the clock (20, and 45 each of 3)
#   layers  dilated convolutions and the loss, one by one, beside PyTorch (200)
#   networks  training of other depths, output strides and crops (20, and 45 each of 11)
#   resume  200 steps straight, twice, and killed after 100, resumed with the compilation cache and
#           without (300). Needs camvid in DATA_DIR
#   fed     training fed by threads, by workers, and from images on the device, beside training on
#           one batch (150). Needs camvid in DATA_DIR
#   largest  the largest batch per device, with remat and without (200 each of 3)
#   bundle  a network of `resume` exported, and timed beside PyTorch (150; after resume)
#   camvid  the whole recipe, one seed (200). Needs camvid in DATA_DIR, and WEIGHTS (a ResNet-50)
#   grid    the first variants of configs/ablation_camvid.py (900). Needs what camvid does
#
# PYTHON  interpreter (default: python3)
# EPOCHS  of camvid (default: 200); SOURCE, STRIDE_ON: of WEIGHTS (default: torchvision, 3x3)
# OPTIONS, NETWORKS, TIMED, LARGEST  of options, networks, remat and largest: their rows, as
#         xla_gpu_deterministic_ops=true, 101/8@768x8 and 50/32@480x16+model.remat=blocks
# WAYS, SIZE  of step: PyTorch's ways (default: eager,compile); of the image (1024x2048)
# FIELDS  more --config.NAME=VALUE of all jobs but bundle
# RESUME, RESUME_MEM_FRACTION  of resume: pairs of deterministic,cache (default: False,true
#         False,false), each one's part (0.15); STEPS (200)
# ALONE_MEM_FRACTION, BUNDLE_MEM_FRACTION  parts of a GPU that a process of remat, networks and
#         largest, and of bundle, takes (0.92, 0.25)
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
  local out="$1" version=3.12 have="" records="" weights="" part=60 pins="" name
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
  if [[ "$have" != all ]]; then
    pins="$("$python" - "$root" "$version" "$have" <<'PY'
import contextlib, pathlib, re, sys, tomllib
from importlib import metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as name

root, version, have = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
there = {"python_version": version, "python_full_version": f"{version}.0"}
# Neither training nor evaluation imports them; pyarrow is for records that are not ours.
seen = {"tensorflow", "tensorflow-cpu", "keras", "tensorboard", "pyarrow"}
needed = set()


def add(texts, extras=("",)):
    """What they need, and what that needs, but for what is there."""
    for need in map(Requirement, texts):
        key, marker = name(need.name), need.marker
        if key in seen or marker and not any(marker.evaluate(there | {"extra": e}) for e in extras):
            continue
        seen.add(key)
        needed.add(key)
        add(metadata.requires(need.name) or (), need.extras | {""})


if pathlib.Path(have).is_file():
    lines = pathlib.Path(have).read_text().splitlines()
    seen |= {name(re.match(r"[\w.-]*", line)[0]) for line in lines}
else:
    for one in filter(None, have.split(",")):
        with contextlib.suppress(metadata.PackageNotFoundError):
            add([one])
    needed.clear()
try:
    add(tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"])
except metadata.PackageNotFoundError as error:
    sys.exit(f"error: {error}: set PYTHON to an environment that the package is installed in")
for line in (root / "constraints.txt").read_text().splitlines():
    if line.strip() and not line.startswith("#"):
        pin = Requirement(line)
        if name(pin.name) in needed and (not pin.marker or pin.marker.evaluate(there)):
            print(f"{pin.name}{pin.specifier}")
PY
    )" || exit 2
  fi
  mkdir -p "$stage/wheels"
  for name in $pins; do  # one by one: a package that has no wheel is said, not fatal
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
      --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
      --dest "$stage/wheels" "$name" 2>"$stage/why" || pure "$name" "$stage" || {
      cat "$stage/why" >&2
      printf 'no wheel of %s\n' "$name" >&2
    }
  done
  rm -f "$stage/why"
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

# Builds the wheel of a package in Python alone that comes as source only.
pure() {
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$2/built" "$1" 2>>"$2/why" &&
    mv "$2"/built/*-none-any.whl "$2/wheels" 2>>"$2/why"
  local status="$?"
  rm -rf "$2/built"
  return "$status"
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

jobs=(options step remat layers networks resume fed largest bundle camvid grid)

measure() {
  local out="$1" job status start lost=()
  shift
  deadline=""
  if [[ "${1:-}" == --* ]]; then
    [[ "$1" =~ ^--seconds=[1-9][0-9]*$ ]] || fail "unknown option $1; --seconds=N is one"
    deadline=$((SECONDS + ${1#*=}))
    shift
  fi
  (($#)) || set -- "${jobs[@]}"
  for job in "$@"; do
    [[ " ${jobs[*]} " == *" $job "* ]] || fail "unknown job $job; there are ${jobs[*]}"
  done
  mkdir -p "$out"
  out="$(cd "$out" && pwd)"
  read -ra fields <<<"${FIELDS:-}"
  export PYTHONUNBUFFERED=1  # a command that is cut off has said what it did
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

# Whether --seconds leaves that many for what is named.
time_for() {
  [[ -z "$deadline" ]] || ((SECONDS + $1 <= deadline)) || {
    printf 'not begun, for want of time: %s\n' "$2"
    return 1
  }
}

# Runs a part of a job; the job goes on where it fails, and ends with `return "$failed"`.
part() {
  "$@" || failed="$?"
}

# Its rows know how long they take; to start and to end, a process takes some 20 s more.
benchmark() {
  time_for 30 "benchmark $*" || return 0
  "$python" -m duc_dlc_jax.benchmark --steps=10 ${AGAIN:+--again} "$@" "${fields[@]}" \
    ${deadline:+--stop_after_s=$((deadline - SECONDS - 20))}
}

# The benchmark where PyTorch needs no memory beside it.
alone() {
  XLA_PYTHON_CLIENT_MEM_FRACTION="${ALONE_MEM_FRACTION:-0.92}" benchmark "$@"
}

measure_options() {
  local options=xla_gpu_deterministic_ops=true,xla_gpu_enable_latency_hiding_scheduler=true
  options+=,xla_gpu_enable_triton_gemm=false
  benchmark --config=configs/ade20k.py --what=train,networks --rounds=3 \
    --json="$1/figures.json" --xla_options="${OPTIONS-$options}"
}

measure_step() {
  local failed=0 way ways=() wanted="${WAYS:-eager,compile}"
  local what=(--config=configs/ade20k.py "--what=train,infer" "--size=${SIZE:-1024x2048}")
  for way in ${wanted//,/ }; do ways+=("--ways=$way"); done
  part benchmark "${what[@]}" --peer=torch --rounds=3 --json="$1/figures.json" "${ways[@]}"
  # Without CUDA graphs, in which the profile would not see single kernels.
  XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}" part benchmark "${what[@]}" \
    --profile --rounds=1 --json="$1/profile.json"
  return "$failed"
}

measure_networks() {
  local networks=101/32@480x16,50/16@480x16,50/8@480x16,101/16@480x16,101/8@480x16,50/32@768x8
  networks+=,101/32@768x8,50/16@768x8,50/8@768x8,101/16@768x8,101/8@768x8
  alone --config=configs/ade20k.py --what=networks --rounds=3 \
    --json="$1/figures.json" --networks="${NETWORKS-$networks}"
}

measure_layers() {
  benchmark --config=configs/ade20k.py --peer=torch --what=layers --json="$1/figures.json"
}

measure_remat() {
  local plain=50/32@480x16
  local timed="$plain+model.remat=blocks,$plain+model.remat=all,$plain+train.accumulate=2"
  alone --config=configs/ade20k.py --what=train,networks --rounds=3 --json="$1/figures.json" \
    --networks="${TIMED-$timed}"
}

measure_largest() {
  local plain=50/32@480x16
  local largest="$plain,$plain+model.remat=blocks,$plain+model.remat=all"
  alone --config=configs/ade20k.py --what=memory --json="$1/figures.json" \
    --networks="${LARGEST-$largest}"
}

measure_fed() {
  local failed=0 how
  for how in --config.data.threads=8 --config.data.workers=4 --config.data.on_device=True; do
    part benchmark --config=configs/camvid.py --what=fed --steps=50 --json="$1/figures.json" \
      --config.data.dir="${DATA_DIR:?the folder of the prepared records}" \
      --config.model.dtype=bfloat16 "$how"
  done
  return "$failed"
}

measure_resume() {
  local out="$1" pair kind failed=0 pids=() names=()
  time_for 300 resume || return 0
  for pair in ${RESUME:-False,true False,false}; do
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
  local i status said
  for i in "${!pids[@]}"; do
    status=0 said="equal"
    wait "${pids[i]}" || status="$?" said="not equal"
    ((status == 0 || status == 6)) || failed="$status" said="failed ($status)"
    printf '%s: %s\n' "$said" "${names[i]}"
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
  return "$failed"
}

measure_bundle() {
  local run="$1/resume/deterministic-False-cache-true/verify_resume/straight"
  time_for 150 bundle || return 0
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
    --config.train.eval_every=0 --config.train.checkpoint_every=100000 "$@" "${fields[@]}" \
    ${deadline:+--stop_after_s=$((deadline - SECONDS - 20))}
}

measure_camvid() {
  time_for 200 camvid || return 0
  ablate --workdir="$1/camvid" --only=duc_dlc --seeds=0 --weights \
    --config.train.epochs="${EPOCHS:-200}" --config.data.workers=4 --config.data.threads=2
}

# Two at once fill a GPU that one, fed by threads, leaves half idle.
measure_grid() {
  local i pid pids=() failed=0
  time_for 120 grid || return 0
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
