// bitfold._C: importing it registers the ops; what it holds is for the Python layer: the format table, the plan, the
// machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.hpp"
#include "cpu/plan.hpp"
#include "cuda/architectures.hpp"
#include "cuda/plan.hpp"
#include "formats/format.hpp"
#include "formats/kv.hpp"
#include "torch/stream.hpp"

namespace py = pybind11;

namespace bitfold {
namespace {

const char* grid_name(Grid grid) {
  constexpr const char* kNames[] = {"cast", "minifloat", "integer", "codebook", "block"};
  return kNames[static_cast<int>(grid)];
}
const char* scale_name(Scale scale) {
  constexpr const char* kNames[] = {"none", "fp16", "bf16", "fp32", "nested"};
  return kNames[static_cast<int>(scale)];
}
const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"uint8", "float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}
DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::F16, DType::BF16, DType::F32, DType::F64}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype is '" + name + "'; it must be float32, bfloat16, float16 or float64");
}

py::list families() {
  py::list list;
  for (const FormatRow& row : kFormats) {
    py::dict item;
    item["family"] = row.family;
    item["grid"] = grid_name(row.grid);
    item["bits"] = row.bits;
    item["grid_max"] = row.grid_max;
    item["default"] = to_string(parse_format(row.family));
    item["scale"] = scale_name(row.scale);
    item["asymmetric"] = row.asymmetric;
    item["nested"] = row.nested;
    item["min_group"] = row.min_group;
    item["max_group"] = row.max_group;
    item["group_letter"] = std::string(1, row.group_letter);
    item["tall"] = row.tall;
    list.append(item);
  }
  return list;
}

py::dict format_info(const std::string& text) {
  const Format format = parse_format(text);
  py::dict info;
  info["canonical"] = to_string(format);
  info["family"] = format.info().family;
  info["grid"] = grid_name(format.info().grid);
  info["bits"] = format.bits();
  info["group"] = format.group;
  info["group_rows"] = int64_t{1} << format.row_shift;
  info["asymmetric"] = format.zero == Zero::Integer;
  info["scale"] = scale_name(format.scale);
  py::list planes;
  const PlaneLaws laws = plane_laws(format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    py::dict plane;
    plane["name"] = law.name;
    plane["dtype"] = dtype_name(law.dtype);
    plane["rows_per"] = law.rows_per;
    plane["per"] = law.per;
    plane["bits"] = law.bits;
    plane["unit"] = law.unit;
    plane["nested_per"] = law.nested_per;
    planes.append(plane);
  }
  info["planes"] = planes;
  return info;
}

// On a GPU: tensor cores multiply halves, bf16 activations among them scaled by row.
py::dict linear_plan_on_gpu(const Format& format, Layout layout, int64_t m, int64_t n, const std::string& dtype,
                            Activations kind, bool wgmma, int64_t shared_bytes) {
  if (kind != Activations::Float)
    throw std::invalid_argument("activations is 'int8', which the CPU alone has; on a GPU it must be 'float'");
  const cuda::LinearPlan plan = cuda::plan_linear(format, layout, m, n, parse_dtype(dtype), wgmma, shared_bytes);
  py::dict info;
  info["regime"] = cuda::to_string(plan.regime);
  info["reason"] = plan.reason;
  info["operands"] = plan.regime == cuda::Regime::Floor    ? "float64"
                     : plan.regime == cuda::Regime::Matmul ? dtype.c_str()
                                                           : "float16";
  info["isa"] = "cuda";
  return info;
}

py::dict linear_plan(const std::string& format, const std::string& layout, int64_t m, int64_t n, int64_t k,
                     const std::string& dtype, const std::string& activations, int capability) {
  if (m < 0 || n < 0 || k < 0) throw std::invalid_argument("m, n and k must not be negative");
  const Format parsed = parse_format(format);
  const Activations kind = parse_activations(activations, parsed);
  if (capability > 0) {
#ifdef BITFOLD_HAVE_CUDA
    const bool wgmma = cuda::has_wgmma(BITFOLD_CUDA_ARCHITECTURES, capability);
#else
    const bool wgmma = capability == 90;
#endif
    return linear_plan_on_gpu(parsed, parse_layout(layout), m, n, dtype, kind, wgmma,
                              cuda::shared_bytes_of(capability));
  }
  const cpu::LinearPlan plan = cpu::plan_linear(parsed, parse_layout(layout), m, parse_dtype(dtype), kind);
  py::dict info;
  info["regime"] = cpu::to_string(plan.regime);
  info["reason"] = plan.reason;
  info["operands"] = kind == Activations::Int8           ? "int8"
                     : plan.regime == cpu::Regime::Floor ? "float64"
                     : plan.regime == cpu::Regime::Fused
                         ? "float32"
                         : cpu::to_string(cpu::tiled_operands(cpu::kernels(), parsed, parse_dtype(dtype)));
  info["isa"] = cpu::kernels().isa;
  return info;
}

py::dict kv_block(const std::string& format, int64_t group, int64_t head, int64_t value_group) {
  const KvShape shape{parse_kv_format(format), group, head, value_group};
  check_kv_shape(shape);
  const KvLayout at = kv_layout(shape);
  py::dict info;
  info["bits"] = shape.info().bits;
  info["most"] = shape.info().most;
  info["offsets"] = shape.info().offsets;
  info["value_row"] = shape.value_row();
  info["key_steps"] = at.key_steps;
  info["key_offsets"] = at.key_offsets;
  info["value_codes"] = at.value_codes;
  info["value_steps"] = at.value_steps;
  info["value_offsets"] = at.value_offsets;
  info["bytes"] = at.bytes;
  return info;
}

py::list kv_formats() {
  py::list names;
  for (const KvFormatRow& row : kKvFormats) names.append(row.name);
  return names;
}

py::dict cpu_features() {
  py::dict features;
  for (const cpu::IsaInfo& isa : cpu::isas()) features[isa.name] = isa.available;
  return features;
}

py::dict build_info() {
  py::dict info;
  info["version"] = BITFOLD_VERSION;
  info["compiler"] = __VERSION__;
#if defined(BITFOLD_HAVE_CUDA)
  info["cuda"] = BITFOLD_CUDA_VERSION;
  info["cuda_architectures"] = BITFOLD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

PYBIND11_MODULE(_C, module) {
  cpu::kernels();  // a wrong BITFOLD_ISA is an error of the import
  module.attr("__version__") = BITFOLD_VERSION;
  module.def("families", &families, "The format table: one dict for each family.");
  module.def("parse_format", &format_info, py::arg("text"),
             "A format string, parsed: its parameters and the laws of its planes.");
  module.def("plan_linear", &linear_plan, py::arg("format"), py::arg("layout"), py::arg("m"), py::arg("n"),
             py::arg("k"), py::arg("dtype"), py::arg("activations"), py::arg("capability"),
             "Which kernel multiplies m rows of activations; capability: a GPU's, 90 for 9.0, or 0 for the CPU.");
  module.def("kv_formats", &kv_formats, "The formats of the KV cache.");
  module.def("kv_block", &kv_block, py::arg("format"), py::arg("group"), py::arg("head"), py::arg("value_group"),
             "Where the parts of a block of the KV cache begin (csrc/formats/kv.hpp).");
  module.def("cpu_features", &cpu_features, "Instruction sets that were built, and whether this CPU has them.");
  module.def("isa", [] { return cpu::kernels().isa; }, "The instruction set in use.");
  module.def("build_info", &build_info, "How this module was built.");
  module.def(
      "current_stream", [](int32_t device) { return reinterpret_cast<uintptr_t>(border::current_stream(device)); },
      py::arg("device"), "torch's current CUDA stream of a device, as ops find it: a cudaStream_t.");
}

}  // namespace
}  // namespace bitfold
