# LibTorch's stable ABI as the target `torch_stable`: headers and the umbrella library of an installed torch. A binary built
# against any torch >= 2.10 runs with every torch >= 2.10, so it matters little whose headers they are.
#
# torch's own CMake package is left alone: it demands the whole tool chain that torch was built with (CUDA, MKL).
if(NOT BITFOLD_TORCH_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/backend/bitfold_build.py
    OUTPUT_VARIABLE BITFOLD_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE torch_error ERROR_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_result)
  if(NOT torch_result EQUAL 0)
    message(FATAL_ERROR "${torch_error}")
  endif()
endif()
message(STATUS "torch: ${BITFOLD_TORCH_DIR}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${BITFOLD_TORCH_DIR}/include)
target_compile_options(torch_stable INTERFACE -ffile-prefix-map=${BITFOLD_TORCH_DIR}/=torch/)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020A000000000000)
# The umbrella library and not libtorch_cpu.so: torch loads its libraries RTLD_LOCAL, and what depends on libtorch_cpu.so alone
# never sees the symbols of libtorch_cuda.so. No symbol is taken from the umbrella itself, hence --no-as-needed.
target_link_libraries(torch_stable INTERFACE
  "-Wl,--push-state,--no-as-needed" ${BITFOLD_TORCH_DIR}/lib/libtorch.so "-Wl,--pop-state")
