// Encoding, decoding, packing and unpacking: what format_cases.py has cases of.
#include <stdexcept>

#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {

Outputs decode(const CaseFile& file) {
  DecodeArgs args{.w = file.weight(),
                  .ids = static_cast<const int64_t*>(file.data("ids")),
                  .rows = file.number("rows"),
                  .dtype = file.dtype("dtype"),
                  .out = nullptr,
                  .parallel_for = nullptr};
  Memory out(bytes_of(args.dtype, args.rows * args.w.k), kUnwritten);
  args.out = out.data();
  cuda::decode(args, nullptr);
  Outputs outputs;
  outputs["out"] = std::move(out);
  return outputs;
}

Outputs encode(const CaseFile& file) {
  EncodeArgs args{.format = file.format(),
                  .w = file.matrix("w"),
                  .out = {},
                  .clamp = false,
                  .nested_offset = nullptr,
                  .importance = static_cast<const float*>(file.data("importance")),
                  .parallel_for = nullptr};
  Outputs outputs;
  const PlaneLaws laws = plane_laws(args.format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    const int64_t elements = plane_extent(law, args.w.rows, args.w.columns).elements();
    Memory& plane = outputs["out " + std::string(law.name)] =
        Memory(static_cast<size_t>(elements * law.unit / 8), kUnwritten);
    set_plane(&args.out, law.plane, plane.data());
  }
  Memory workspace(static_cast<size_t>(cuda::encode_workspace(args)), kUnwritten);
  const EncodeStatus status = cuda::encode(args, workspace.data(), nullptr);
  if (status.fault != EncodeFault::None) throw std::runtime_error("could not encode");
  return outputs;
}

Outputs pack(const CaseFile& file) {
  Memory codes(file.tensor("codes").bytes(), kUnwritten), zeros(file.has("zeros") ? file.tensor("zeros").bytes() : 0);
  Memory packed(static_cast<size_t>(file.number("packed_bytes")), kUnwritten);
  Memory packed_zeros(static_cast<size_t>(file.number("packed_zeros_bytes")), kUnwritten);
  PackArgs args{.format = file.format(),
                .layout = file.layout(),
                .n = file.number("n"),
                .k = file.number("k"),
                .codes = static_cast<uint8_t*>(file.data("codes")),
                .zeros = static_cast<uint8_t*>(file.data("zeros")),
                .packed_codes = packed.as<uint8_t>(),
                .packed_zeros = packed_zeros.as<uint8_t>(),
                .parallel_for = nullptr};
  cuda::pack(args, nullptr);
  args.codes = codes.as<uint8_t>();
  args.zeros = zeros.as<uint8_t>();
  cuda::unpack(args, nullptr);
  emulator::synchronize();
  Outputs outputs;
  outputs["out codes"] = std::move(packed);
  outputs["out logical codes"] = std::move(codes);
  if (packed_zeros.data()) outputs["out zeros"] = std::move(packed_zeros);
  return outputs;
}

}  // namespace bitfold::cuda::test
