#!/usr/bin/env bash
# The kernels of every instruction set against the scalar ones, those that this machine lacks through an emulator:
# AVX-512 through SIMDe (Debian's libsimde-dev; EMULATE=1 does so on a machine that has AVX-512 too), NEON through QEMU
# (g++-aarch64-linux-gnu, qemu-user). What is not installed is left out, and said. Arguments: the parts to compare
# (plain activations gptq kv blocks; agreement.cpp), all where there are none; blocks take by far the longest.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/kernels
failed=0
parts=("$@")

build() {  # folder, then arguments for CMake
  local folder=$out/$1
  shift
  cmake -S . -B "$folder" -DBITFOLD_PYTHON=OFF -DBITFOLD_AGREEMENT=ON "$@" >"$folder.log"
  cmake --build "$folder" --target agreement -j "${JOBS:-2}" >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
}

compare() {  # instruction set, what to call it, then the command
  local isa=$1 name=$2
  shift 2
  BITFOLD_ISA=$isa "$@" ${parts[@]+"${parts[@]}"} >"$out/$name.txt" || { echo "$name: failed"; failed=1; return; }
  [ -e "$out/reference.txt" ] || cp "$out/$name.txt" "$out/reference.txt"
  if cmp -s "$out/reference.txt" "$out/$name.txt"; then
    echo "$name agrees"
  else
    echo "$name differs from the first in"
    { diff "$out/reference.txt" "$out/$name.txt" || true; } | sed -n 's/^> \(.*\) [0-9a-f]*$/  \1/p'
    failed=1
  fi
}

mkdir -p $out
rm -f $out/reference.txt
if [ "$(uname -m)" = x86_64 ]; then
  flags=" $(grep -m1 ^flags /proc/cpuinfo) "
  has() { case "$flags" in *" $1 "*) ;; *) return 1 ;; esac; }
  build native
  compare scalar scalar $out/native/agreement
  has avx2 && compare avx2 avx2 $out/native/agreement
  has avx512dq && compare avx512 avx512 $out/native/agreement
  has avx512_vnni && compare avx512_vnni avx512_vnni $out/native/agreement
  has avx512_bf16 && compare avx512_bf16 avx512_bf16 $out/native/agreement
  if has avx2 && { ! has avx512dq || [ -n "${EMULATE:-}" ]; }; then
    if [ -e /usr/include/simde/x86/avx512.h ]; then
      build emulated -DBITFOLD_EMULATE_AVX512=ON
      compare avx512 avx512-emulated $out/emulated/agreement
    else
      echo "avx512 left out: neither the CPU nor libsimde-dev has it"
    fi
  fi
fi
if [ "$(uname -m)" = aarch64 ]; then
  build native
  compare scalar scalar $out/native/agreement
  compare neon neon $out/native/agreement
elif command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_EXE_LINKER_FLAGS=-static
  compare scalar scalar-aarch64 qemu-aarch64 $out/aarch64/agreement
  compare neon neon qemu-aarch64 $out/aarch64/agreement
else
  echo "neon left out: it needs g++-aarch64-linux-gnu and qemu-user"
fi
exit $failed
