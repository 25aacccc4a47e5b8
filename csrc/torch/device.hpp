// The device that an op runs on, that of its tensors, and the kernels there. In the tests' module the kernels for GPUs
// run on the CPU's tensors, through the emulator (BITFOLD_EMULATED).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "cpu/block_codes.hpp"
#include "formats/args.hpp"
#include "formats/fp8.hpp"
#include "formats/gptq.hpp"
#include "formats/int8.hpp"
#include "formats/kv.hpp"

namespace bitfold::border {

using torch::stable::Tensor;

class Device {
 public:
  // The device of `tensor`, which messages call `what`. It is the current one for as long as this lives.
  Device(const Tensor& tensor, std::string what);

  // An error unless `tensor` is on this device too.
  void require(const Tensor& tensor, const std::string& what) const;
  // Whether kernels for GPUs run here.
  bool gpu() const { return gpu_; }
  // The same numbers where the border can read them, which on a GPU waits for it.
  Tensor host(const Tensor& tensor) const;

  EncodeStatus encode(EncodeArgs args, const Tensor& like) const;
  void decode(DecodeArgs args) const;
  void pack(PackArgs args) const;
  void unpack(PackArgs args) const;
  void linear(LinearArgs args, const Tensor& like) const;  // `like`: workspace is allocated beside it
  void linear_grad_x(LinearGradArgs args) const;
  void linear_int8(LinearInt8Args args, const Tensor& like) const;
  void linear_fp8(LinearFp8Args args) const;  // the CPU's
  void round_fp8(RoundFp8Args args) const;
  int capability() const;  // 90 for a GPU of 9.0; the emulator has none and does all that is asked of it
  bool wgmma() const;      // whether the GPU and this build have it
  int64_t block_shape(const Format& format, int64_t* levels) const;  // columns with a step of their own
  void block_grid(cpu::BlockGridArgs args) const;
  void put_block_codes(cpu::BlockCodesArgs args) const;
  int64_t gptq_factor(GptqFactorArgs args) const;
  void gptq_columns(GptqColumnsArgs args, const Tensor& like) const;  // `like`: as above
  void search_steps(StepSearchArgs args) const;
  void kv_pack(KvPackArgs args) const;
  void kv_unpack(KvUnpackArgs args) const;
  void kv_attention(KvAttentionArgs args, const Tensor& like) const;  // `like`: as above

 private:
  std::string what_;
  int32_t index_ = 0;
  bool cuda_;
  bool gpu_;
  void* stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace bitfold::border
