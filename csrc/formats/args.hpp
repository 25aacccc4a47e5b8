// The seam between the rooms: what a kernel is told, on any device. Plain pointers and sizes; nothing here owns memory.
#pragma once

#include <cstdint>

#include "formats/format.hpp"

namespace bitfold {

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), each at least `grain` long where possible.
// Kernels give every output element to one range and never let a result depend on where the ranges are cut.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

// A quantized n x k matrix. Planes that the format lacks are null; blocks are its codes, and k is whole blocks.
struct Weight {
  Format format;
  Layout layout;
  int64_t n;
  int64_t k;
  const void* codes;
  const void* scales;
  const uint8_t* zeros;
  const float* nested_scales;
  const float* nested_offset;

  // Rows and columns as the planes see them: a flat matrix is one long row.
  constexpr int64_t plane_rows() const { return layout == Layout::Flat ? 1 : n; }
  constexpr int64_t plane_columns() const { return layout == Layout::Flat ? n * k : k; }
};

// A strided matrix of floats; strides in elements.
struct MatrixIn {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// y[m, n] = x[m, k] w[n, k]^T + bias[n]; y is contiguous and has x's dtype, bias likewise. With row_scales, row j of x
// stands for row_scales[j] times what it holds.
struct LinearArgs {
  Weight w;
  MatrixIn x;
  const void* bias;  // may be null
  void* y;
  ParallelFor parallel_for;
  Activations activations = Activations::Float;  // Int8: w is of blocks
  const float* row_scales = nullptr;             // the CPU's alone
};

// dx[m, k] = dy[m, n] w[n, k]; dx is contiguous and has dy's dtype.
struct LinearGradArgs {
  Weight w;
  MatrixIn dy;
  void* dx;
  ParallelFor parallel_for;
};

// out[rows, k] of `dtype`: row i is decoded row ids[i] (all rows in order when ids is null).
struct DecodeArgs {
  Weight w;
  const int64_t* ids;
  int64_t rows;
  DType dtype;
  void* out;
  ParallelFor parallel_for;
};

// Planes to write, all with layout Rows; canonical shapes, contiguous.
struct PlanesOut {
  void* codes;
  void* scales;
  uint8_t* zeros;
  float* nested_scales;
  float* nested_offset;
};

// Puts a plane's bytes where a kernel looks for them.
inline void set_plane(Weight* w, PlaneIndex plane, const void* data) {
  switch (plane) {
    case kCodes: w->codes = data; break;
    case kScales: w->scales = data; break;
    case kZeros: w->zeros = static_cast<const uint8_t*>(data); break;
    case kNestedScales: w->nested_scales = static_cast<const float*>(data); break;
    default: w->nested_offset = static_cast<const float*>(data); break;
  }
}
inline void set_plane(PlanesOut* out, PlaneIndex plane, void* data) {
  switch (plane) {
    case kCodes: out->codes = data; break;
    case kScales: out->scales = data; break;
    case kZeros: out->zeros = static_cast<uint8_t*>(data); break;
    case kNestedScales: out->nested_scales = static_cast<float*>(data); break;
    default: out->nested_offset = static_cast<float*>(data); break;
  }
}

struct EncodeArgs {
  Format format;
  MatrixIn w;
  PlanesOut out;
  bool clamp;                  // cast families: saturate; blocks: store a scale beyond fp16 as infinity
  const float* nested_offset;  // dq: given offset, or null for the mean
  const float* importance;     // blocks: weights of the squared error, one for each column; may be null
  ParallelFor parallel_for;
};

// The first (in row-major order) thing that could not be encoded, whatever the number of threads.
enum class EncodeFault : uint8_t { None, NotFinite, CastOverflow, ScaleOverflow, ScaleUnderflow };
struct EncodeStatus {
  EncodeFault fault = EncodeFault::None;
  int64_t row = 0;
  int64_t column = 0;  // the first column of the group, for the scale faults
  double value = 0;    // the weight, or the scale that did not fit
  int64_t count = 0;   // CastOverflow: how many values
};

// Logical codes [n, k] uint8 and logical zeros [n or 1, G] uint8 <-> their bit streams. Cast families have no packing.
struct PackArgs {
  Format format;
  Layout layout;
  int64_t n;
  int64_t k;
  uint8_t* codes;
  uint8_t* zeros;  // may be null
  uint8_t* packed_codes;
  uint8_t* packed_zeros;  // may be null
  ParallelFor parallel_for;
};

}  // namespace bitfold
