# pybind11: the Python package's (a build requirement) or the system's; else fetched.
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_hint OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 2.13 CONFIG QUIET HINTS ${pybind11_hint})
if(NOT pybind11_FOUND)
  include(FetchContent)
  FetchContent_Declare(pybind11
    URL https://files.pythonhosted.org/packages/76/f3/95b0f40b31df41dbfe6bb0857419c9442c15839cbac4796f1c26ae0b6081/pybind11-3.1.0.tar.gz
    URL_HASH SHA256=a1cc06b524ab3edca51f8ad3895f9c4fa20b8b19283173dff4ae781449dc9639)
  FetchContent_MakeAvailable(pybind11)
endif()
