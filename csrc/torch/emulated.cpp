// The tests' module _emulated: importing it registers torch.ops.bitfold_emulated; what it holds is how the emulator
// runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/emulator/runtime.hpp"

namespace py = pybind11;

namespace bitfold {
namespace {

using namespace cuda::emulator;

void configure(uint64_t seed, const std::string& order, const std::string& delivery, int poison, int multiprocessors,
               int64_t shared_bytes, int capability) {
  Config config;
  config.seed = seed;
  config.poison = static_cast<uint8_t>(poison);
  config.multiprocessors = multiprocessors;
  config.shared_bytes = shared_bytes;
  config.capability = capability;
  if (order == "priority") config.order = Order::Priority;
  else if (order != "sequential")
    throw std::invalid_argument("order is '" + order + "'; it must be sequential or priority");
  if (delivery == "early") config.delivery = Delivery::Early;
  else if (delivery == "random") config.delivery = Delivery::Random;
  else if (delivery != "late")
    throw std::invalid_argument("delivery is '" + delivery + "'; it must be late, early or random");
  cuda::emulator::config() = config;
}

PYBIND11_MODULE(_emulated, module) {
  module.def("configure", &configure, py::kw_only(), py::arg("seed") = 1, py::arg("order") = "sequential",
             py::arg("delivery") = "late", py::arg("poison") = 0xff, py::arg("multiprocessors") = 132,
             py::arg("shared_bytes") = kSharedBytes, py::arg("capability") = 90,
             "How the launches that follow run: csrc/cuda/emulator/runtime.hpp.");
}

}  // namespace
}  // namespace bitfold
