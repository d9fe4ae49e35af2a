#!/usr/bin/env bash
# Everything a GPU machine can tell about this project, in one call of at most nine minutes.
#
#   bash bench/gpu.sh OUT_FOLDER
#
# Needs an NVIDIA GPU, nvcc, and a python3 (or PYTHON=...) with PyTorch, Triton, pybind11, cmake, ninja, pytest and
# pytest-benchmark; no network. Builds, runs the tests that touch the GPU, memcheck and racecheck, the tuner and the
# benchmarks. A step that fails or runs out of time does not stop the next one. OUT_FOLDER gets summary.txt, the results
# as JSON, pytest's report and logs.tar.gz. Exit code: 0 if every step passed, else 1.
#
#   SECONDS_IN_ALL=540   another limit
#   REHEARSE=1           without a GPU: the same steps on the CPU, as far as they go
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash bench/gpu.sh OUT_FOLDER" >&2
    exit 2
fi
mkdir -p "$1/logs" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
limit=${SECONDS_IN_ALL:-540}
device=cuda
[ "${REHEARSE:-0}" = 1 ] && device=cpu
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer
SECONDS=0
failures=0
: >"$out/summary.txt"

say() {
    echo "$*" | tee -a "$out/summary.txt"
}

# step NAME SECONDS COMMAND...: at most that long, and never past the limit; the log's end goes into the summary.
step() {
    local name=$1 most=$2 left=$((limit - SECONDS)) began=$SECONDS code
    shift 2
    if [ $left -lt 10 ]; then
        say "== $name: skipped, no time left"
        failures=$((failures + 1))
        return 1
    fi
    [ "$most" -gt "$left" ] && most=$left
    # An interrupt first: python -m bench then still prints its table.
    timeout --signal=INT --kill-after=10 "$most" "$@" >"$out/logs/$name.log" 2>&1
    code=$?
    case $code in
        0) say "== $name: passed in $((SECONDS - began)) s" ;;
        124 | 137) say "== $name: stopped after $most s" ;;
        *) say "== $name: FAILED with exit code $code in $((SECONDS - began)) s" ;;
    esac
    tail -n 12 "$out/logs/$name.log" | cut -c1-220 | sed 's/^/   /' | tee -a "$out/summary.txt"
    [ $code -eq 0 ] || failures=$((failures + 1))
    return $code
}

machine() {
    uname -a
    command -v nvidia-smi && nvidia-smi
    command -v nvcc && nvcc --version | tail -n 2
    command -v compute-sanitizer
    "$python" -c 'import sys, torch, triton; print(sys.version); print("torch", torch.__version__, "triton", triton.__version__, "GPUs", torch.cuda.device_count())'
}

build() {
    # Only for the GPU at hand: a quarter of the compiling. Without nvcc this fails rather than building for the CPU.
    local capability install
    capability=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
    export SPOS_FAST_CUDA_ARCHITECTURES=${SPOS_FAST_CUDA_ARCHITECTURES:-$capability}
    [ "$device" = cuda ] && export SPOS_FAST_CUDA=1
    install=(-m pip install -v --no-build-isolation --no-deps --no-index -e .)
    "$python" "${install[@]}" || "$python" "${install[@]}" --break-system-packages || return
    "$python" -c 'import spos_fast; print(spos_fast.explain())'
}

sanitize() {
    local tool=$1
    if [ "$device" = cpu ]; then
        "$python" -m bench.sanitize --device cpu
        return
    fi
    # Not PyTorch's own kernels (mangled at::native): they would take most of the time.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --kernel-name-exclude kns=at6native "$python" -m bench.sanitize
}

# tests NAME ARGUMENTS...: pytest's report is kept only of a run that came to its end.
tests() {
    local name=$1 code
    shift
    "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors --durations=5 \
        --junit-xml="$out/$name.xml" "$@"
    code=$?
    [ $code -le 1 ] || rm -f "$out/$name.xml"
    return $code
}

benchmarks() {
    local left=$((limit - SECONDS - 40)) name reports=()
    for name in tests_gpu tests_cpu; do
        # Without a report there is no verdict, and without a verdict no ratio; times there are all the same.
        [ -s "$out/$name.xml" ] || echo "<testsuites/>" >"$out/$name.xml"
        # Made in this call; the code's own dates may come from another machine's clock.
        touch -d "+1 day" "$out/$name.xml"
        reports+=(--junit "$out/$name.xml")
    done
    "$python" -m bench --device "$device" "${reports[@]}" --budget "$left" --seconds 0.4 --out "$out"
}

say "spos_fast on $(date -u +%Y-%m-%dT%H:%MZ), at most $limit s"
export -f machine build sanitize tests benchmarks
export python device out limit
step machine 30 bash -c machine
step build 180 bash -c build
# The verdicts of the benchmarks rest on these two: bench reads the reports instead of running the tests again.
step tests_gpu 150 bash -c "tests tests_gpu tests/ops/test_every_op.py tests/test_gpu.py"
step tests_cpu 120 bash -c "tests tests_cpu tests/ops/test_batchnorm.py tests/bench/test_registry.py \
    tests/test_supernet.py tests/test_training.py tests/test_evaluation.py tests/test_calibration.py \
    $([ "$device" = cpu ] && echo tests/nasbench)"
step memcheck 60 bash -c "sanitize memcheck"
step racecheck 60 bash -c "sanitize racecheck"
step tune 45 "$python" -m bench.tune --device "$device" --out "$out/tune.json"
step benchmarks 9999 env SECONDS_SO_FAR=$SECONDS bash -c "SECONDS=\$SECONDS_SO_FAR; benchmarks"

say "$([ $failures -eq 0 ] && echo "all steps passed" || echo "$failures steps did not pass") in $SECONDS s"
tar -czf "$out/logs.tar.gz" -C "$out" logs && rm -r "$out/logs"
[ $failures -eq 0 ]
