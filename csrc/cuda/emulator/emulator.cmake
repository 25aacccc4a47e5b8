# bitfold_cuda_emulator: what CUDA kernels that are compiled as C++ run on (README.md). It needs no CUDA.
#
# Built without sanitizers in every build, also in theirs: they are to see the kernels, and are told of the rest.
add_library(bitfold_cuda_emulator STATIC EXCLUDE_FROM_ALL
  csrc/cuda/emulator/barriers.cpp
  csrc/cuda/emulator/fiber.cpp
  csrc/cuda/emulator/launches.cpp
  csrc/cuda/emulator/memory.cpp
  csrc/cuda/emulator/runtime.cpp
  csrc/cuda/emulator/warp.cpp
  csrc/cuda/emulator/wgmma.cpp)
target_link_libraries(bitfold_cuda_emulator PUBLIC bitfold_options)
target_compile_options(bitfold_cuda_emulator
  PRIVATE -O2 -fno-sanitize=all
  INTERFACE
    -Wno-unknown-pragmas  # of nvcc: unroll
    -fsanitize=alignment -fno-sanitize-recover=alignment)  # whose library's place memory.cpp takes
