// GPTQ's loop over columns and its search for steps: what gptq_cases.py has cases of.
#include "cuda/device.hpp"
#include "cuda/gptq.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {

Outputs gptq_columns(const CaseFile& file) {
  const int64_t n = file.number("n"), columns = file.number("k");
  const bool rounds = file.number("round") != 0, hands_out = file.has("behind");
  const auto bytes = [&](bool wanted, size_t each) { return wanted ? static_cast<size_t>(n * columns) * each : 0; };
  Memory codes(bytes(rounds, 1), kUnwritten), errors(bytes(hands_out, sizeof(float)), kUnwritten);
  Memory loss(static_cast<size_t>(n) * sizeof(double), kUnwritten);
  const auto floats = [&](const char* name) { return static_cast<const float*>(file.data(name)); };
  const GptqColumnsArgs args{.weight = {file.data("weight"), DType::F32, n, columns, columns, 1},
                             .order = static_cast<const int64_t*>(file.data("order")),
                             .group = static_cast<const int64_t*>(file.data("group")),
                             .factor = floats("factor"),
                             .k = file.number("total"),
                             .begin = file.number("begin"),
                             .behind = floats("behind"),
                             .grid = {floats("step"), floats("offset"), file.number("groups"), floats("table"),
                                      file.number("low"), file.number("high"), rounds},
                             .codes = codes.as<uint8_t>(),
                             .errors = errors.as<float>(),
                             .loss = loss.as<double>(),
                             .parallel_for = nullptr};
  const Memory workspace(static_cast<size_t>(cuda::gptq_columns_workspace(args)), kUnwritten);
  cuda::gptq_columns(args, workspace.data(), nullptr);
  emulator::synchronize();
  Outputs outputs;
  if (rounds) outputs["out codes"] = std::move(codes);
  if (hands_out) outputs["out errors"] = std::move(errors);
  outputs["out loss"] = std::move(loss);
  return outputs;
}

Outputs search_steps(const CaseFile& file) {
  const int64_t n = file.number("n"), k = file.number("k");
  const size_t bytes = file.tensor("start").bytes();
  Memory step(bytes, kUnwritten), cost(bytes, kUnwritten);
  const auto floats = [&](const char* name) { return static_cast<const float*>(file.data(name)); };
  cuda::search_steps({.weight = {file.data("weight"), DType::F32, n, k, k, 1},
                      .group = file.number("group"),
                      .importance = floats("importance"),
                      .start = floats("start"),
                      .zeros = floats("zeros"),
                      .factors = floats("factors"),
                      .tried = file.number("tried"),
                      .stored = static_cast<Scale>(file.number("stored")),
                      .table = floats("table"),
                      .low = file.number("low"),
                      .high = file.number("high"),
                      .step = step.as<float>(),
                      .cost = cost.as<float>(),
                      .parallel_for = nullptr},
                     nullptr);
  Outputs outputs;
  outputs["out step"] = std::move(step);
  outputs["out cost"] = std::move(cost);
  return outputs;
}

}  // namespace bitfold::cuda::test
