# The CUDA kernels' units: the one list of them. nvcc compiles them for GPUs (bitfold_cuda), the C++ compiler for the tests'
# emulator (bitfold_cuda_emulated, which needs no CUDA).
#
# A unit is a file csrc/cuda/<name>.cu, or <name>/<PART>: that file with BITFOLD_PART defined as PART, for kernels that have
# too many instances for one unit.
set(planes kE4m3 kE5m2 kInt8 kInt4 kInt3 kInt2 kNf4)  # kNf4 is fp4's too
set(blocks kQ4_0 kQ4_1 kQ5_0 kQ5_1 kQ8_0 kQ2K kQ3K kQ4K kQ5K kQ6K kIq4Nl kIq4Xs kMxfp4)
set(BITFOLD_CUDA_UNITS gpu arrange tile kv_attention kv_chunk kv_packed kv_merge rows_sums linear_rows/kRagged)
foreach(row IN LISTS planes blocks)
  list(APPEND BITFOLD_CUDA_UNITS linear_rows/${row} linear_tile/${row})
endforeach()
# Those that promise the CPU's bytes: nvcc must not contract a multiplication and an addition.
set(BITFOLD_CUDA_EXACT_UNITS
  decode pack
  linear_floor gptq step_search round_fp8 kv_pack kv_unpack
  linear_int8 int8_round int8_rows int8_tile int8_finish
  encode encode_blocks encode_affine encode_symmetric encode_iq4 encode_legacy)
set(BITFOLD_CUDA_HOST csrc/cuda/linear.cpp csrc/cuda/linear_rows.cpp)

# The generated source of `unit`, which ends in `.extension`, into `out`.
function(cuda_unit unit extension out)
  string(REPLACE "/" ";" parts ${unit})
  list(GET parts 0 name)
  string(REPLACE "/" "_" flat ${unit})
  set(text "#include \"cuda/${name}.cu\"\n")
  list(LENGTH parts count)
  if(count EQUAL 2)
    list(GET parts 1 part)
    set(text "#define BITFOLD_PART ${part}\n${text}")
  endif()
  set(path ${CMAKE_CURRENT_BINARY_DIR}/cuda/${flat}.${extension})
  file(CONFIGURE OUTPUT ${path} CONTENT "${text}")
  set(${out} ${path} PARENT_SCOPE)
endfunction()

include(csrc/cuda/emulator/emulator.cmake)
set(BITFOLD_EMULATED_UNITS ".*" CACHE STRING "For tests only: a regular expression of the units to emulate")
add_library(bitfold_cuda_emulated STATIC EXCLUDE_FROM_ALL ${BITFOLD_CUDA_HOST})
target_link_libraries(bitfold_cuda_emulated PUBLIC bitfold_formats bitfold_cuda_emulator)
foreach(unit IN LISTS BITFOLD_CUDA_UNITS BITFOLD_CUDA_EXACT_UNITS)
  if(unit MATCHES "^(${BITFOLD_EMULATED_UNITS})$")
    cuda_unit(${unit} cpp source)
    if(unit STREQUAL gpu)
      set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS BITFOLD_CUDA_ARCHITECTURES="90a-real 90-virtual")
    endif()
    target_sources(bitfold_cuda_emulated PRIVATE ${source})
  endif()
endforeach()

if(BITFOLD_HAVE_CUDA)
  add_library(bitfold_cuda STATIC ${BITFOLD_CUDA_HOST})
  target_link_libraries(bitfold_cuda PUBLIC bitfold_formats)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  # The functions of csrc/formats are constexpr, which makes them the device's too; -lineinfo costs nothing at run time and
  # tells profilers and sanitizers the line.
  target_compile_options(bitfold_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo;-Xfatbin=-compress-all;-Xcompiler=-Wall>"
    "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${BITFOLD_WERROR}>>:-Werror=all-warnings>")
  foreach(unit IN LISTS BITFOLD_CUDA_UNITS BITFOLD_CUDA_EXACT_UNITS)
    cuda_unit(${unit} cu source)
    if(unit STREQUAL gpu)
      set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS BITFOLD_CUDA_ARCHITECTURES="${architectures}")
    endif()
    target_sources(bitfold_cuda PRIVATE ${source})
    if(unit IN_LIST BITFOLD_CUDA_EXACT_UNITS)
      # 1675: csrc/search has pragmas that only the C++ compilers know.
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-fmad=false;-diag-suppress=1675")
    endif()
  endforeach()
endif()
