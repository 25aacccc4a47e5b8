#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one run, whose steps have limits that add up to nine minutes: builds for the GPU at
# hand, runs the tests on it, compute-sanitizer on a few small cases, and the benchmarks; prints a summary and leaves one JSON.
#
#   bench/gpu.sh [--full] [--profile] [OUT]
#
# OUT: a folder, by default build/gpu/out. --full: the whole grid, which takes longer. --profile: what Nsight Compute sees of
# some calls, and when the kernels of calls in a row begin and end, which takes up to three minutes more.
#
# It needs nvcc, CMake, ninja, and a Python with torch (for CUDA), pybind11, pytest and hypothesis; PYTHON names another one.
# Nothing is fetched: WHEELS names a folder of wheels to install from (bitsandbytes, torchao, typer, rich, ...), BENCHMARK a
# source folder of google-benchmark. What is absent is left out, and said so.
set -uo pipefail
cd "$(dirname "$0")/.."

grid=quick profiles=no
while [[ ${1:-} == --* ]]; do
  case $1 in
    --full) grid=full ;;
    --profile) profiles=yes ;;
    *) echo "bench/gpu.sh: $1 is no option; it must be --full or --profile" >&2; exit 2 ;;
  esac
  shift
done
out=${1:-build/gpu/out}
python=${PYTHON:-python3}
build=build/gpu
site=$PWD/$build/site
mkdir -p "$out" "$site"
out=$(cd "$out" && pwd)
steps=$out/steps.tsv
: >"$steps"

# step NAME SECONDS COMMAND...: its output goes to a file of its own; a failure is noted and the others go on. A command may be one
# of the functions below, which timeout only reaches through another bash.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" bash -c '"$@"' "$name" "$@" >"$out/$name.log" 2>&1
  local code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$steps"
  if [ "$code" != 0 ]; then tail -n 15 "$out/$name.log"; fi
  return "$code"
}
skip() { printf '%s\tskipped: %s\t0\n' "$1" "$2" | tee -a "$steps"; }
has() { "$python" -c "import $1" 2>/dev/null; }

configure() {
  local bench=OFF
  if [ -n "${BENCHMARK:-}" ] || [ -e /usr/include/benchmark/benchmark.h ]; then bench=ON; fi
  cmake -S . -B "$build" -G Ninja -DBITFOLD_CUDA=on -DBITFOLD_BENCH=$bench ${BENCHMARK:+-DFETCHCONTENT_SOURCE_DIR_BENCHMARK="$BENCHMARK"} \
    -DPython_EXECUTABLE="$(command -v "$python")"
}
compile() {
  # An editable bitfold of this Python would come before PYTHONPATH.
  echo 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]' >"$site/sitecustomize.py"
  cmake --build "$build" && cp -r python/bitfold "$site/" && cp "$build"/_C*.so "$site/bitfold/"
}
run_instructions() {
  nvcc -std=c++20 --expt-relaxed-constexpr -arch=sm_90a -Icsrc tests/cuda/gpu_instructions.cu -o "$build/gpu_instructions" && "$build/gpu_instructions"
}
run_tests() { "$python" -m pytest -q -p no:cacheprovider $abreast "$@"; }
run_profile() {
  local sections=()
  for section in SourceCounters WarpStateStats SpeedOfLight SchedulerStats LaunchStats Occupancy; do
    sections+=(--section "$section")  # what profile.py tells of; all of them would take twice as long
  done
  ncu --profile-from-start off --clock-control none "${sections[@]}" -f -o "$out/profile" \
    "$python" bench/gpu/calls.py "$@" &&
    ncu -i "$out/profile.ncu-rep" --page details >"$out/details.txt" &&
    ncu -i "$out/profile.ncu-rep" --page source --print-source sass --csv >"$out/source.csv" &&
    "$python" bench/gpu/profile.py "$out/details.txt" "$out/source.csv" >"$out/profile.txt"
}
abreast=
if has xdist; then abreast="-n $(($(nproc) > 12 ? 12 : $(nproc))) --dist worksteal"; fi
export -f configure compile run_instructions run_tests run_profile
export build python site out abreast

if [ -n "${WHEELS:-}" ]; then
  step wheels 10 "$python" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv >"$out/gpu.csv" 2>&1

# bench NAME SECONDS OPTIONS...: a step of its own, so that what fails leaves the others.
bench() {
  local name=$1 limit=$2
  shift 2
  if has typer && has rich; then
    step "$name" "$limit" "$python" -m bitfold bench --device cuda "$@" --out "$out/$name.json"
  else
    skip "$name" "this Python has no typer and rich, which bitfold's command line needs"
  fi
}

# What the emulator knows of Hopper's instructions from their documents alone; it needs nothing that is built.
if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qx 9.0; then
  step tests_instructions 20 run_instructions
else
  skip tests_instructions "the GPU is no Hopper"
fi

if step configure 20 configure && step compile 130 compile; then
  export BITFOLD_TEST_DEVICES=cuda  # of the tests that run on every device
  step tests_gpu 55 run_tests tests/cuda/test_gpu.py
  step tests_conformance 65 run_tests tests/test_linear.py tests/test_encode_decode.py tests/test_embedding.py -k cuda -x
  step tests_inputs 60 run_tests tests/test_cuda_int8.py tests/test_linear_fp8.py tests/test_kv_ops.py tests/test_step_search.py -k cuda
  if command -v compute-sanitizer >/dev/null; then
    step sanitizer 25 compute-sanitizer --error-exitcode 9 "$python" bench/gpu/small.py
    if grep -q "Device not supported\|Unable to attach" "$out/sanitizer.log"; then
      skip sanitizer "compute-sanitizer can't attach to this GPU"
    fi
  else
    skip sanitizer "there is no compute-sanitizer"
  fi
  if [ $grid = full ]; then
    bench bench 1800 --ops linear,encode,decode --shape 8192x28672 --shape 28672x8192 \
      --shape 14336x4096 --shape 4096x4096 --batches 1,2,4,8,16,32,64,128,256,512,1024,4096 --dtypes bf16,fp16 \
      --formats int4-g128,int4-g128-asym,nf4,nf4-dq,fp4,int8,fp8,int3-g64,q4_k,q6_k,q8_0 --seconds 1
    bench bench_inputs 900 --ops int8,kv --shape 8192x28672 --shape 28672x8192 --shape 4096x4096 \
      --batches 1,2,4,8,16,32,64,128,256,512,1024,4096 --tokens 1024,4096,16384,32768,131072 --dtypes bf16,fp16 --peers none --seconds 1
  else
    bench bench 75 --ops linear,decode --shape 8192x28672 \
      --batches 1,16,64,128,256,1024,4096 --dtypes bf16 --formats int4-g128,nf4,q4_k --seconds 0.5
    bench bench_inputs 45 --ops int8,kv --shape 8192x28672 \
      --batches 1,8,16,64,128,1024,4096 --tokens 4096,32768 --dtypes bf16 --peers none --seconds 0.3
  fi
  if [ $profiles = yes ]; then
    step timeline 40 "$python" bench/gpu/calls.py --timeline \
      linear:int4-g128:1 linear:int4-g128:16 linear:int4-g128:64 int8:16 int8:128 kv:int8:32768
    if command -v ncu >/dev/null; then
      step profile 140 run_profile linear:int4-g128:1 linear:int4-g128:16 linear:int4-g128:64 linear:nf4:64 \
        linear:int4-g128:128 linear:int4-g128:256 int8:16 int8:128 int8:4096 kv:int8:4096 kv:int8:32768
    else
      skip profile "there is no ncu"
    fi
  fi
  if [ -x "$build/bench/bench_gpu" ]; then
    step kernels $([ $grid = full ] && echo 3000 || echo 35) \
      "$build/bench/bench_gpu" --grid=$grid --benchmark_out="$out/kernels.json" --benchmark_out_format=json
  else
    skip kernels "google-benchmark or cuBLAS was not found"
  fi
fi

"$python" bench/gpu/report.py "$out"
