# CUDA's compiler and run time: whether the kernels of csrc/cuda are built (BITFOLD_HAVE_CUDA), and for which GPUs.
#
# BITFOLD_CUDA  on: they are, or it is an error. off: they are not. auto: where nvcc is found; other builds than a wheel's have to
# be quick, and build them only where a GPU is visible as well, for that one.
# BITFOLD_CUDA_ARCHS  the GPUs as CMake writes them (90a-real is machine code, 90-virtual PTX for all that come later). Else the
# visible GPU's, else those below. Never PTX of 90a: it runs on that alone. None is older than 8.0; one that nvcc is too old for
# gets PTX of 9.0, which its driver compiles.
set(BITFOLD_CUDA auto CACHE STRING "CUDA kernels: auto, on or off")
set_property(CACHE BITFOLD_CUDA PROPERTY STRINGS auto on off)
set(default_archs 80-real 86-real 89-real 90a-real 90-virtual)
set(BITFOLD_CUDA_ARCHS "" CACHE STRING "GPUs to compile for; empty: the visible one, else ${default_archs}")

string(TOLOWER "${BITFOLD_CUDA}" BITFOLD_CUDA_MODE)
set(BITFOLD_HAVE_CUDA FALSE)
if(NOT BITFOLD_CUDA_MODE MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "BITFOLD_CUDA is '${BITFOLD_CUDA}': it must be auto, on or off.")
elseif(BITFOLD_CUDA_MODE STREQUAL "off")
  return()
endif()

# Why there are no kernels: an error where they are asked for.
macro(build_without_cuda reason)
  if(BITFOLD_CUDA_MODE STREQUAL "on")
    message(FATAL_ERROR "BITFOLD_CUDA=on, but ${reason}.")
  endif()
  message(STATUS "CUDA: ${reason}: building for the CPU alone")
  return()
endmacro()

set(visible)  # as the driver's tool writes them: 8.6
find_program(NVIDIA_SMI nvidia-smi)
if(NVIDIA_SMI)
  execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE output OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE result)
  if(result EQUAL 0)
    string(REGEX MATCHALL "[0-9]+[.][0-9]" visible "${output}")
    list(REMOVE_DUPLICATES visible)
  endif()
endif()

set(archs ${BITFOLD_CUDA_ARCHS})
foreach(arch IN LISTS archs)
  if(NOT arch MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "BITFOLD_CUDA_ARCHS has '${arch}': it must be 80 or more, as in 80-real, 90a-real or 90-virtual.")
  endif()
endforeach()
if(NOT archs)
  foreach(capability IN LISTS visible)
    if(capability VERSION_LESS 8.0)
      message(STATUS "CUDA: there are no kernels for the GPU of compute capability ${capability}; they begin with 8.0")
    else()
      string(REPLACE "." "" arch ${capability})
      string(REGEX REPLACE "^90$" "90a" arch ${arch})  # machine code for this GPU alone may use all of it
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  if(visible AND NOT archs)
    build_without_cuda("no visible GPU has compute capability 8.0 or more (BITFOLD_CUDA_ARCHS names others to build for)")
  endif()
endif()
if(NOT archs)
  if(BITFOLD_CUDA_MODE STREQUAL "auto" AND NOT "${SKBUILD_STATE}" STREQUAL "wheel")
    build_without_cuda("no GPU is visible (BITFOLD_CUDA=on builds for ${default_archs})")
  endif()
  set(archs ${default_archs})
endif()

include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES 80)  # which every nvcc knows
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  build_without_cuda("no nvcc was found that works (CUDACXX names one)")
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE output ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+[.][0-9]+)" output "${output}")
if(CMAKE_MATCH_1 VERSION_LESS 12.4)
  build_without_cuda("${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_MATCH_1}, and bitfold needs 12.4 or newer (CUDACXX names another)")
endif()

if(NOT BITFOLD_CUDA_ARCHS AND visible)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known)
  foreach(arch IN LISTS archs)
    string(REGEX MATCH "^[0-9]+" number ${arch})
    if(NOT known MATCHES "sm_${number}\n")
      message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} doesn't know sm_${number}, building PTX of 9.0 for it")
      list(TRANSFORM archs REPLACE "^${arch}$" 90-virtual)
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
endif()
set(CMAKE_CUDA_ARCHITECTURES ${archs})

if(CCACHE AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the module loads where there is no CUDA
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake before 3.26
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(BITFOLD_HAVE_CUDA TRUE)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${archs}")
