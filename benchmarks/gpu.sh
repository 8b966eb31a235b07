#!/usr/bin/env bash
# Everything that needs a GPU, within a time budget: smoke, a profile, tests, benchmarks.
# None of it has run on a GPU yet; --cpu has run the same stages at CPU sizes.
#
#   benchmarks/gpu.sh [--cpu] OUT [SECONDS [STAGE...]]
#
# OUT receives log.txt, and what the stages write: smoke.json, ncu.txt, tests.txt, kernels.json and
# so on. What a stage shows goes to the screen as well, line by line. SECONDS (600 by default) is for
# all of it. A stage that runs out of time is cut off and leaves what it has; one that finds no time
# left is skipped and said so. Naming stages runs those alone, and gives them the time of the others:
# all of them need half an hour. A quarter of an hour, two starts of the machine included, holds the
# first visit and, when what it has shown is mended, the second:
#
#   benchmarks/gpu.sh OUT 440 build smoke ncu tests
#   WHEELS=FOLDER benchmarks/gpu.sh OUT 330 times loss kernels tune
#
# and a third and a fourth hold the rest:
#
#   WHEELS=FOLDER benchmarks/gpu.sh OUT 440 build rows compiled step accuracy max-tokens
#   benchmarks/gpu.sh OUT 400 build every-test sanitizer
#
# The stages, with the seconds that each should do with:
#
#   build       60  the extension, where fastdpo._cuda cannot be imported: bring it, and this is free
#   smoke      170  every kernel and public path in a process of its own, then times beside floors
#   times       60  those times alone; only where it is named
#   ptxas       70  those checks by nvcc's ptxas: where smoke found anything wrong, or it is named
#   ncu         45  a profile of one launch of exp_logits
#   tests      170  the files of tests that are about kernels
#   loss       120  the loss step against peers, but for torch.compile's
#   kernels     50  exp_logits, with and without E, on every shape
#   tune        60  looks for a faster tile: log.txt then has the line for configs.py
#   rows        90  the other primitives on every shape
#   compiled   160  the loss step against those of torch.compile
#   step        60  a whole training step
#   accuracy    45  errors against fp64
#   max-tokens  60  the longest pair in 16 GiB
#   every-test 180  all tests that can run on a GPU
#   sanitizer   90  the kernels under compute-sanitizer: slow to begin, and last
#
# --cpu runs the same stages at CPU sizes, to prove the script where there is no GPU. PYTHON names
# the interpreter (the first of python and python3 that has PyTorch), WHEELS a folder of wheels for
# peers where there is no registry (TRL's needs: datasets, multiprocess, dill), which are installed
# beside the environment; FASTDPO_COMMIT the commit where the tree came without its repository.
# pytest-xdist and pytest-timeout are used where they are installed.
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
declare -A most=([build]=60 [smoke]=170 [times]=60 [ptxas]=70 [ncu]=45 [tests]=170 [loss]=120
  [kernels]=50 [tune]=60 [rows]=90 [compiled]=160 [step]=60 [accuracy]=45 [max-tokens]=60
  [every-test]=180 [sanitizer]=90)
all="build smoke ptxas times ncu tests loss kernels tune rows compiled step accuracy max-tokens"
all="$all every-test sanitizer"
chosen=" ${*:3} "
for name in $chosen; do
  case " $all " in *" $name "*) ;; *) usage ;; esac
done

mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + budget))
log=$out/log.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { echo "[$SECONDS s] $*" | tee -a "$log"; }

asked= # a stage that another has asked for

# wanted NAME: whether this stage was named, or none was.
wanted() {
  if [ "$1" = "$asked" ]; then
    return 0
  elif [ "$chosen" = "  " ]; then
    [[ " times ptxas " != *" $1 "* ]] # smoke has the former, and asks for the latter
  else
    [[ $chosen = *" $1 "* ]]
  fi
}

left() { echo $((end - SECONDS)); }

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
# use, is the time it has; $status is what it ended with, 0 where it did not run.
stage() {
  local name=$1 least=$2 longest
  shift 2
  status=0
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
  "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) say "$name: done" ;;
    124 | 137) say "$name: cut off after $limit s" ;;
    *) say "$name: failed with status $status" ;;
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
  if [ $device = cpu ]; then
    echo "no GPU, no architecture to build for"
  elif [ "$extension" = yes ]; then
    echo "fastdpo._cuda is here already"
  elif ! FASTDPO_BUILD_CUDA=1 FASTDPO_CUDA_ARCHS=$capability FASTDPO_BUILD_JOBS=$(nproc) \
    within "$python" setup.py build_ext --inplace >"$scratch/build.txt" 2>&1; then
    tail -n 20 "$scratch/build.txt"
    return 1
  fi
}

# smoke OUT OPTIONS...: ends by itself; its checks end by themselves as well.
smoke() {
  local folder=$1
  shift
  within "$python" -m benchmarks.smoke "$folder" $((limit > 60 ? limit - 25 : limit - 8)) \
    --device "$device" "${checks[@]}" "$@"
}

# The ptxas that Triton brings is older than nvcc's, and has compiled others' kernels wrongly.
other_ptxas() {
  local nvcc
  nvcc=$(command -v ptxas || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ptxas")
  if [ ! -x "$nvcc" ]; then
    echo "there is no $nvcc"
    return 1
  fi
  TRITON_PTXAS_PATH=$nvcc TRITON_CACHE_DIR=$scratch/triton smoke "$out/ptxas" --no-times
}

# The files that are about kernels, not all that could run on a GPU: to collect those takes longer.
files=(tests/backends/test_triton_{gpu,primitives,public,ops,language}.py tests/backends/test_cuda_gpu.py)

# tests MARKS FILE...: tests.txt has all of it, the screen the end.
tests() {
  local marks=$1 status
  shift
  # -v names each test as it ends, so that a run that is cut off has said what failed.
  within "$python" -m pytest "$@" -m "$marks" -v --tb=short --maxfail=60 --durations=5 -rfE \
    -p no:cacheprovider "${plugins[@]}" >>"$out/tests.txt" 2>&1
  status=$?
  tail -n 25 "$out/tests.txt"
  [ $status -eq 5 ] || return $status # 5: no test is marked
}

profile() {
  # The clocks stay as they are.
  within ncu --clock-control none --set full -k regex:exp_logits_tma -c 1 \
    "$python" -m benchmarks.kernels.one_launch >"$out/ncu.txt" 2>&1
  local status=$?
  grep -E 'Duration|SM Frequency|Throughput  |L2 Hit|Registers|Warp Cycles|Tensor' "$out/ncu.txt" |
    head -n 25
  return $status
}

# One process tells all that must be known of PyTorch: to import it takes seconds.
look='
import importlib.util
import sys


def here(name):
    return "yes" if importlib.util.find_spec(name) else "no"


there, capability, extension = "yes", "none", "no"
if sys.argv[1] == "cuda":
    import torch

    there = "yes" if torch.cuda.is_available() else "no"
    if there == "yes":
        capability = "%d.%d" % torch.cuda.get_device_capability()
    try:
        import fastdpo._cuda

        extension = "yes"
    except ImportError:
        pass
peers = [name for name in ("trl", "liger_kernel", "cut_cross_entropy", "flash_attn")
         if here(name) == "no"]
print(there, capability, extension, here("xdist"), here("pytest_timeout"), *peers)
'

python=${PYTHON:-}
if [ -z "$python" ]; then
  for python in python python3; do
    if "$python" -c 'import importlib.util, sys
sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then break; fi
  done
fi
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" "$WHEELS"/*.whl >>"$log" 2>&1 ||
    say "wheels: not all of $WHEELS could be installed (see log.txt)"
  export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
read -r there capability extension xdist timeouts missing \
  < <("$python" -c "$look" "$device" 2>>"$log") || there=no
if [ "$there" != yes ]; then
  say "PyTorch sees no GPU here: nothing is measured (--cpu proves the script without one)"
  exit 1
fi
plugins=()
if [ "$xdist" = yes ]; then plugins+=(-n 8 --dist worksteal); fi
# A kernel that waits for itself never returns.
if [ "$timeouts" = yes ]; then plugins+=(--timeout 90); fi
if [ $device = cuda ]; then
  say "$(nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv,noheader 2>&1)"
  if [ -z "${FASTDPO_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    say "the commit is unknown: results will not name it (set FASTDPO_COMMIT)"
  fi
  [ -z "$missing" ] || say "not here, and absent from the results: $missing"
  suite=full kernels=full tuned=quick accuracy=(--lengths 512 2048 8192) step=(--model qwen2.5-0.5b --batch-size 4) size=16GiB
  pair=(--head llama-3-8b) checks=()
else
  suite=tiny kernels=tiny tuned=tiny accuracy=(--head tiny --lengths 16 32) step=(--model tiny --steps 3) size=64MiB
  pair=(--head tiny --dtype fp32 --tokens 64 --sequences 4)
  # The interpreter takes minutes for all of them.
  checks=(--check machine pytorch "exp_logits bf16 with E" "logits triton bf16" "step trained head")
fi

# loss OUT PROVIDER...
loss() {
  local to=$1
  shift
  benchmark loss --suite "$suite" --device "$device" --no-plots --out "$to" --providers "$@"
}

# primitives OUT SUITE NAME...
primitives() {
  local to=$1 shapes=$2
  shift 2
  benchmark kernels --suite "$shapes" --device "$device" --out "$to" --primitives "$@"
}

if wanted tests || wanted every-test || wanted sanitizer; then rm -f "$out/tests.txt"; fi
stage build 20 build
stage smoke 20 smoke "$out"
if [ "$status" -ne 0 ] && [ $device = cuda ]; then asked=ptxas; fi
stage ptxas 20 other_ptxas
stage times 20 smoke "$out/times" --no-checks
if command -v ncu >/dev/null; then
  stage ncu 20 profile
elif wanted ncu; then
  say "ncu: not here, no profile"
fi
stage tests 20 tests "gpu and not slow" "${files[@]}"
stage loss 20 loss "$out/loss" fastdpo fastdpo-rows fastdpo-w0 eager trl-selective trl-chunked \
  torch-lce torch-lce-chunked liger-1 liger-scaled liger-sm90 flash-attn cce cce-exact
stage kernels 20 primitives "$out/kernels" "$kernels" exp_logits "exp_logits with E"
FASTDPO_AUTOTUNE=1 stage tune 30 primitives "$out/tuned" "$tuned" exp_logits "exp_logits with E"
stage rows 20 primitives "$out/rows" "$kernels" target_logits logits_logps logits_logps_backward \
  logits_sequence_loss sequence_loss
stage compiled 20 loss "$out/compiled" fastdpo fastdpo-rows compiled liger-1-compiled cce-compile
stage step 30 benchmark step --device "$device" "${step[@]}" --no-plots --out "$out/step"
stage accuracy 20 benchmark accuracy --device "$device" "${accuracy[@]}" --no-plots \
  --out "$out/accuracy"
stage max-tokens 20 benchmark loss "${pair[@]}" --device "$device" --find-max-tokens "$size" \
  --providers fastdpo fastdpo-w0 eager trl-chunked --out "$out/max-tokens"
stage every-test 20 tests "gpu and not slow" tests
stage sanitizer 20 tests "gpu and slow" "${files[@]}"
say "done with $(left) s left: $(cd "$out" && echo ./*)"
