#!/usr/bin/env bash
# Everything that needs a GPU, within a time budget: build, tests, benchmarks, one profile.
#
#   benchmarks/gpu.sh [--cpu] OUT [SECONDS [STAGE...]]
#
# OUT receives at most eight files: log.txt (with the profile in it), tests.txt, kernels.json,
# tuned.json, loss.json, accuracy.json, step.json and max-tokens.json. SECONDS (600 by default) is
# for all of it.
# A stage that runs out of time is cut off and leaves what it has; one that finds no time left is
# skipped and said so. Naming stages (build tests sanitizer kernels loss tune step accuracy ncu
# max-tokens) runs those alone, and gives them the time of the others: ten minutes do not hold all of
# it. A quarter of an hour, the machine's start included, holds these, one right after the other:
#
#   benchmarks/gpu.sh OUT 420 build tests sanitizer kernels
#   benchmarks/gpu.sh OUT 240 loss tune                        ("build" first on another machine)
#
# and what is left is benchmarks/gpu.sh OUT 300 step accuracy ncu max-tokens.
# "tune" looks for a faster tile: log.txt then has the line for configs.py. --cpu runs the same stages
# at CPU sizes, to prove the script where there is no GPU.
# PYTHON names the interpreter (the first of python and python3 that has PyTorch), WHEELS a folder
# of wheels to install first, for peers where there is no registry (TRL's needs: datasets,
# multiprocess, dill), FASTDPO_COMMIT the commit where the tree came without its repository. With
# pytest-xdist the tests run ten at a time.
set -uo pipefail

usage() {
  echo "usage: benchmarks/gpu.sh [--cpu] OUT [SECONDS [STAGE...]]" >&2
  exit 2
}

device=cuda
if [ "${1:-}" = "--cpu" ]; then
  device=cpu
  shift
fi
[ $# -ge 1 ] || usage
budget=${2:-600}
case $budget in '' | *[!0-9]*) usage ;; esac
all="build tests sanitizer kernels loss tune step accuracy ncu max-tokens"
chosen=" ${*:3} "
for name in $chosen; do
  case " $all " in *" $name "*) ;; *) usage ;; esac
done

mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-}
if [ -z "$python" ]; then
  for python in python python3; do
    if "$python" -c 'import torch' 2>/dev/null; then break; fi
  done
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + budget))
log=$out/log.txt

say() { echo "[$SECONDS s] $*" | tee -a "$log"; }

# wanted NAME: whether this stage was named, or none was.
wanted() { [ "$chosen" = "  " ] || [[ $chosen = *" $1 "* ]]; }

left() { echo $((end - SECONDS)); }

# The seconds that each stage should do with.
declare -A most=([build]=120 [tests]=180 [sanitizer]=90 [kernels]=60 [loss]=160 [tune]=60 [step]=60
  [accuracy]=45 [ncu]=40 [max-tokens]=60)

# later NAME: what the wanted stages after this one should do with.
later() {
  local name seen=no sum=0
  for name in $all; do
    if [ $seen = yes ] && wanted "$name"; then sum=$((sum + most[$name])); fi
    [ "$name" != "$1" ] || seen=yes
  done
  echo $sum
}

# stage NAME LEAST COMMAND...: runs COMMAND for as long as the stage may, more where those after it
# do not need what is left, and not at all where less than LEAST is left. $limit, which COMMAND may
# use, is the time it has.
stage() {
  local name=$1 least=$2 longest status
  shift 2
  wanted "$name" || return 0
  limit=$(left)
  longest=$((limit - $(later "$name")))
  [ "$longest" -ge "${most[$name]}" ] || longest=${most[$name]}
  if [ "$limit" -lt "$least" ]; then
    say "$name: skipped, $limit s left and it needs $least"
    return 0
  fi
  [ "$limit" -le "$longest" ] || limit=$longest
  say "$name: at most $limit s"
  status=0
  "$@" >>"$log" 2>&1 || status=$?
  case $status in
    0) say "$name: done" ;;
    124 | 137) say "$name: cut off after $limit s" ;;
    *) say "$name: failed with status $status (see log.txt)" ;;
  esac
}

# within COMMAND...: killed when $limit is over; interrupted before, so that it can still say what it
# has found.
within() {
  local grace=$((limit > 60 ? 20 : 5))
  timeout --signal=INT --kill-after=$grace $((limit - grace)) "$@"
}

# benchmark MODULE ARGUMENTS...: stops by itself shortly before it would be cut off.
benchmark() {
  local module=$1
  shift
  within "$python" -m "benchmarks.$module" --time-limit "$((limit > 60 ? limit - 30 : limit))" "$@"
}

build() {
  local capability
  if [ $device = cpu ]; then
    echo "no GPU, no architecture to build for"
    return 0
  fi
  capability=$("$python" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())') || return
  FASTDPO_BUILD_CUDA=1 FASTDPO_CUDA_ARCHS=$capability FASTDPO_BUILD_JOBS=$(nproc) \
    within "$python" setup.py build_ext --inplace
}

# tests MARKS: adds to tests.txt.
tests() {
  local workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 10); fi
  # -v names each test as it ends, so that a run that is cut off has said what failed.
  within "$python" -m pytest -m "$1" -v --tb=short --maxfail=200 --durations=5 \
    -p no:cacheprovider "${workers[@]}" >>"$out/tests.txt" 2>&1
  local status=$?
  tail -n 3 "$out/tests.txt"
  [ $status -eq 5 ] || return $status # 5: no test is marked
}

profile() {
  # The clocks stay as they are.
  within ncu --clock-control none --set full -k regex:exp_logits -c 1 \
    "$python" -m benchmarks.kernels.one_launch
}

if [ $device = cuda ] && ! "$python" -c 'import sys, torch
sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
  say "PyTorch sees no GPU here: nothing is measured (--cpu proves the script without one)"
  exit 1
fi
if [ $device = cuda ]; then
  say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1)"
  suite=full kernels=full tuned=quick accuracy=(--lengths 512 2048 8192) step=(--model qwen2.5-0.5b --batch-size 4) size=16GiB
  pair=(--head llama-3-8b)
else
  suite=tiny kernels=tiny tuned=tiny accuracy=(--head tiny --lengths 16 32) step=(--model tiny --steps 3) size=64MiB
  pair=(--head tiny --dtype fp32 --tokens 64 --sequences 4)
fi

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --no-index --no-deps "$WHEELS"/*.whl >>"$log" 2>&1 ||
    say "wheels: not all of $WHEELS could be installed (see log.txt)"
fi
if [ $device = cuda ]; then
  if [ -z "${FASTDPO_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    say "the commit is unknown: results will not name it (set FASTDPO_COMMIT)"
  fi
  for peer in trl.trainer.utils liger_kernel.chunked_loss cut_cross_entropy \
    liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 \
    flash_attn.ops.triton.cross_entropy; do
    "$python" -c "import $peer" 2>>"$log" || say "$peer cannot be imported: absent from the results"
  done
fi
if wanted tests || wanted sanitizer; then rm -f "$out/tests.txt"; fi
stage build 30 build
stage tests 20 tests "gpu and not slow"
stage sanitizer 20 tests "gpu and slow"
stage kernels 20 benchmark kernels --suite "$kernels" --device "$device" --out "$out/kernels"
stage loss 20 benchmark loss --suite "$suite" --device "$device" --no-plots --out "$out/loss" \
  --providers fastdpo fastdpo-w0 eager compiled trl-selective torch-lce torch-lce-chunked \
  torch-lce-twice trl-chunked liger-1 liger-1-compiled liger-scaled liger-sm90 flash-attn \
  cce cce-exact
FASTDPO_AUTOTUNE=1 stage tune 30 benchmark kernels --suite "$tuned" --device "$device" \
  --primitives exp_logits "exp_logits with E" --out "$out/tuned"
stage step 30 benchmark step --device "$device" "${step[@]}" --no-plots --out "$out/step"
stage accuracy 20 benchmark accuracy --device "$device" "${accuracy[@]}" --no-plots \
  --out "$out/accuracy"
if command -v ncu >/dev/null; then
  stage ncu 20 profile
elif wanted ncu; then
  say "ncu: not here, no profile"
fi
stage max-tokens 20 benchmark loss "${pair[@]}" --device "$device" --find-max-tokens "$size" \
  --providers fastdpo fastdpo-w0 eager trl-chunked --out "$out/max-tokens"
say "done with $(left) s left: $(cd "$out" && echo ./*)"
