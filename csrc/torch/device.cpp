#include "torch/device.hpp"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <new>
#include <stdexcept>
#include <utility>

#include "cpu/cpu.hpp"
#include "cpu/gptq.hpp"
#include "cpu/kv.hpp"
#include "cpu/linear_fp8.hpp"
#include "cuda/architectures.hpp"
#include "cuda/cuda.hpp"
#include "cuda/fp8.hpp"
#include "cuda/gptq.hpp"
#include "cuda/kv.hpp"
#include "cuda/linear_int8.hpp"
#include "torch/border.hpp"
#include "torch/stream.hpp"

namespace bitfold::border {
namespace {

#if !defined(BITFOLD_CUDA_ARCHITECTURES)
#define BITFOLD_CUDA_ARCHITECTURES ""
#endif
#if defined(BITFOLD_EMULATED)
constexpr bool kEmulated = true, kCuda = true;
#elif defined(BITFOLD_HAVE_CUDA)
constexpr bool kEmulated = false, kCuda = true;
#else
constexpr bool kEmulated = false, kCuda = false;
#endif

// torch's thread pool.
void parallel_for(int64_t count, int64_t grain, RangeBody body, void* context) {
  struct Call {
    RangeBody body;
    void* context;
  } call{body, context};
  const AOTITorchError error = torch_parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const auto* inner = static_cast<const Call*>(opaque);
        inner->body(inner->context, begin, end);
      },
      &call);
  if (error != AOTI_TORCH_SUCCESS) throw std::bad_alloc();  // the only exception a kernel can raise
}

std::string name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another kind of device";
}

// Of the current device, once for each.
[[maybe_unused]] void check_architecture(int32_t index) {
  static std::array<std::atomic<bool>, 64> covered{};
  const auto place = static_cast<size_t>(index);
  if (place < covered.size() && covered[place]) return;
  const int capability = cuda::gpu().capability;
  if (!cuda::covers(BITFOLD_CUDA_ARCHITECTURES, capability)) {
    throw std::runtime_error("cuda:" + std::to_string(index) + " has compute capability " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                             "; this build of bitfold has kernels for " + BITFOLD_CUDA_ARCHITECTURES +
                             ", and BITFOLD_CUDA_ARCHS says what to build for");
  }
  if (place < covered.size()) covered[place] = true;
}

// One of the two, where this module has both.
template <class OnGpu, class OnCpu>
auto on(bool gpu, const OnGpu& on_gpu, const OnCpu& on_cpu) {
  if constexpr (kEmulated) return on_gpu();
  else if constexpr (kCuda) return gpu ? on_gpu() : on_cpu();
  else return on_cpu();
}

[[noreturn]] void only_on_the_cpu() { fail("there are kernels for the CPU alone; tensors must be on the CPU"); }

}  // namespace

Device::Device(const Tensor& tensor, std::string what)
    : what_(std::move(what)), cuda_(tensor.is_cuda()), gpu_(cuda_ || kEmulated) {
  if (!cuda_ && !tensor.is_cpu()) fail(what_ + " is on " + name(tensor) + "; it must be on the CPU or a CUDA device");
  if (!cuda_) return;
  if constexpr (!kCuda || kEmulated) {
    fail(what_ + " is on " + name(tensor) +
         ", and this build of bitfold has kernels for the CPU alone; it must be on the " +
         "CPU, or bitfold built with BITFOLD_CUDA=on");
  }
  index_ = tensor.get_device_index();
  guard_.emplace(index_);
  if constexpr (kCuda && !kEmulated) check_architecture(index_);
  stream_ = current_stream(index_);
}

void Device::require(const Tensor& tensor, const std::string& what) const {
  if (tensor.is_cuda() == cuda_ && tensor.is_cpu() != cuda_ && (!cuda_ || tensor.get_device_index() == index_)) return;
  fail(what + " is on " + name(tensor) + "; it must be on " + (cuda_ ? "cuda:" + std::to_string(index_) : "the CPU") +
       " like " + what_);
}

Tensor Device::host(const Tensor& tensor) const {
  if (!cuda_) return tensor;
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

EncodeStatus Device::encode(EncodeArgs args, const Tensor& like) const {
  args.parallel_for = parallel_for;
  return on(
      gpu_,
      [&] {
        const Tensor workspace = empty_beside(like, {cuda::encode_workspace(args)}, ScalarType::Byte);
        return cuda::encode(args, workspace.mutable_data_ptr(), stream_);
      },
      [&] { return cpu::encode(args); });
}

void Device::decode(DecodeArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::decode(args, stream_); }, [&] { cpu::decode(args); });
}

void Device::pack(PackArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::pack(args, stream_); }, [&] { cpu::pack(args); });
}

void Device::unpack(PackArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::unpack(args, stream_); }, [&] { cpu::unpack(args); });
}

void Device::linear(LinearArgs args, const Tensor& like) const {
  args.parallel_for = parallel_for;
  on(
      gpu_,
      [&] {
        const Tensor workspace = empty_beside(like, {cuda::linear_workspace(args)}, ScalarType::Byte);
        cuda::linear(args, workspace.mutable_data_ptr(), stream_);
      },
      [&] { cpu::linear(args); });
}

void Device::linear_grad_x(LinearGradArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::linear_grad_x(args, stream_); }, [&] { cpu::linear_grad_x(args); });
}

void Device::linear_int8(LinearInt8Args args, const Tensor& like) const {
  args.parallel_for = parallel_for;
  on(
      gpu_,
      [&] {
        const Tensor workspace = empty_beside(like, {cuda::linear_int8_workspace(args)}, ScalarType::Byte);
        cuda::linear_int8(args, workspace.mutable_data_ptr(), stream_);
      },
      [&] { cpu::linear_int8(args); });
}

void Device::round_fp8(RoundFp8Args args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::round_fp8(args, stream_); }, [&] { cpu::round_fp8(args); });
}

int Device::capability() const {
  int capability = 0;
  on(gpu_, [&] { capability = cuda::gpu().capability; }, [] {});
  return capability;
}

bool Device::wgmma() const {
  bool wgmma = false;
  on(gpu_, [&] { wgmma = cuda::gpu().wgmma; }, [] {});
  return wgmma;
}

// What only the CPU has: the border has said so already where `gpu_` holds.
void Device::linear_fp8(LinearFp8Args args) const {
  args.linear.parallel_for = parallel_for;
  on(gpu_, only_on_the_cpu, [&] { cpu::linear_fp8(args); });
}

void Device::block_grid(cpu::BlockGridArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, only_on_the_cpu, [&] { cpu::block_grid(args); });
}

void Device::put_block_codes(cpu::BlockCodesArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, only_on_the_cpu, [&] { cpu::put_block_codes(args); });
}

int64_t Device::block_shape(const Format& format, int64_t* levels) const {
  int64_t span = 0;
  on(gpu_, only_on_the_cpu, [&] {
    const cpu::BlockShape shape = cpu::block_shape(format);
    span = shape.span;
    *levels = shape.levels;
  });
  return span;
}

int64_t Device::gptq_factor(GptqFactorArgs args) const {
  args.parallel_for = parallel_for;
  int64_t failed = 0;
  on(gpu_, only_on_the_cpu, [&] { failed = cpu::gptq_factor(args); });
  return failed;
}

void Device::gptq_columns(GptqColumnsArgs args, const Tensor& like) const {
  args.parallel_for = parallel_for;
  on(
      gpu_,
      [&] {
        const Tensor workspace = empty_beside(like, {cuda::gptq_columns_workspace(args)}, ScalarType::Byte);
        cuda::gptq_columns(args, workspace.mutable_data_ptr(), stream_);
      },
      [&] { cpu::gptq_columns(args); });
}

void Device::search_steps(StepSearchArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::search_steps(args, stream_); }, [&] { cpu::search_steps(args); });
}

void Device::kv_pack(KvPackArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::kv_pack(args, stream_); }, [&] { cpu::kv_pack(args); });
}

void Device::kv_unpack(KvUnpackArgs args) const {
  args.parallel_for = parallel_for;
  on(gpu_, [&] { cuda::kv_unpack(args, stream_); }, [&] { cpu::kv_unpack(args); });
}

void Device::kv_attention(KvAttentionArgs args, const Tensor& like) const {
  args.parallel_for = parallel_for;
  on(
      gpu_,
      [&] {
        const Tensor workspace = empty_beside(like, {cuda::kv_attention_workspace(args)}, ScalarType::Byte);
        cuda::kv_attention(args, workspace.mutable_data_ptr(), stream_);
      },
      [&] { cpu::kv_attention(args); });
}

}  // namespace bitfold::border
