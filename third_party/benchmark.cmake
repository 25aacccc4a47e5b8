# google-benchmark, for BITFOLD_BENCH=ON alone: the system's (libbenchmark-dev), else fetched.
find_package(benchmark 1.6 CONFIG QUIET)
if(NOT benchmark_FOUND)
  include(FetchContent)
  set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(benchmark
    GIT_REPOSITORY https://github.com/google/benchmark.git
    GIT_TAG v1.9.4
    GIT_SHALLOW ON)
  FetchContent_MakeAvailable(benchmark)
endif()
