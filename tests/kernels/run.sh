#!/usr/bin/env bash
# The kernels of every instruction set against each other, those that this machine lacks through an emulator: AVX-512 through SIMDe
# (Debian's libsimde-dev), NEON through QEMU (g++-aarch64-linux-gnu, qemu-user). What is not installed is left out, and said.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/kernels
failed=0
reference=

build() {  # folder, then arguments for CMake
  local folder=$out/$1
  shift
  cmake -S . -B "$folder" -DBITFOLD_PYTHON=OFF -DBITFOLD_AGREEMENT=ON "$@" >/dev/null
  cmake --build "$folder" --target agreement -j 2 >/dev/null
}

compare() {  # instruction set, then the command
  local isa=$1 hash
  shift
  hash=$(BITFOLD_ISA=$isa "$@") || { echo "$isa: failed"; failed=1; return; }
  reference=${reference:-$hash}
  if [ "$hash" = "$reference" ]; then echo "$isa agrees"; else echo "$isa: differs from the first"; failed=1; fi
}

if [ "$(uname -m)" = x86_64 ]; then
  flags=$(grep -m1 ^flags /proc/cpuinfo)
  emulate=OFF
  case "$flags" in *avx512dq*) ;; *) [ -e /usr/include/simde/x86/avx512.h ] && emulate=ON ;; esac
  build native -DBITFOLD_EMULATE_AVX512=$emulate
  isas=scalar
  case "$flags" in *avx2*) isas="$isas avx2" ;; esac
  case "$flags$emulate" in *avx512dq* | *ON) isas="$isas avx512" ;; *) echo "avx512 left out: neither the CPU nor libsimde-dev has it" ;; esac
  for isa in $isas; do compare "$isa" $out/native/agreement; done
fi
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_EXE_LINKER_FLAGS=-static
  compare neon qemu-aarch64 $out/aarch64/agreement
else
  echo "neon left out: it needs g++-aarch64-linux-gnu and qemu-user"
fi
exit $failed
