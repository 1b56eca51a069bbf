// Walking the tiles of a table, and reading and writing elements of any dtype.
#pragma once

#include "table.h"

// The host build in tests counts bytes and checks alignment here.
#ifndef ROSE_GLOBAL_READ
#define ROSE_GLOBAL_READ(pointer, bytes)
#define ROSE_GLOBAL_WRITE(pointer, bytes)
#endif

namespace rose {
namespace cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

#define ROSE_DEVICE static __device__ __forceinline__
#define ROSE_METHOD __device__ __forceinline__

ROSE_DEVICE int lane() { return (int)threadIdx.x % kWarp; }
ROSE_DEVICE int warp() { return (int)threadIdx.x / kWarp; }

// A pointer that was itself read from memory could point anywhere: without the assumptions, accesses
// would be of the slower generic kind.
#if !defined(__CUDA_ARCH__)
#define ROSE_ASSUME_GLOBAL(pointer)
#else
#define ROSE_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#endif

template <typename T>
ROSE_DEVICE T read(const void* pointer, int64_t index) {
  const T* at = (const T*)pointer + index;
  ROSE_ASSUME_GLOBAL(at);
  ROSE_GLOBAL_READ(at, sizeof(T));
  return *at;
}

template <typename T>
ROSE_DEVICE void write(void* pointer, int64_t index, T value) {
  T* at = (T*)pointer + index;
  ROSE_ASSUME_GLOBAL(at);
  ROSE_GLOBAL_WRITE(at, sizeof(T));
  *at = value;
}

ROSE_DEVICE float scalar_or_one(const float* scalar) { return scalar == nullptr ? 1.0f : *scalar; }

// Segment that holds a tile (or line): the last that starts at or before it, so never an empty one.
template <int64_t Segment::* kFirst = &Segment::first_tile>
ROSE_DEVICE int find_segment(const Table& table, int64_t tile) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (table.segments[middle].*kFirst <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// body(segment index, tile, position of its first element in the segment, its length) for this block's
// share of the tiles, which is one run.
template <typename Body>
ROSE_DEVICE void for_each_tile(const Table& table, Body body) {
  int64_t tile = table.share * blockIdx.x;
  if (tile >= table.tiles) return;
  const int64_t after = table.tiles - tile;
  int left = after < table.share ? (int)after : table.share;
  int index = find_segment(table, tile);
#pragma unroll 1
  for (; left > 0; --left, ++tile) {
    while (index + 1 < table.count && table.segments[index + 1].first_tile <= tile) ++index;
    const int64_t start = (tile - table.segments[index].first_tile) * kTile;
    const int64_t rest = table.segments[index].n - start;
    body(index, tile, start, rest < kTile ? (int)rest : kTile);
  }
}

// Elements of a tile that are accessed kVector at a time: whole bytes of masks, so the rest, too,
// starts with a byte.
ROSE_DEVICE int vector_part(const Segment& segment, int count) {
  return segment.vector ? count / 8 * 8 : 0;
}

// Where element `index` of a segment (row-major) is in the memory of each operand from `operand` on.
template <int kCount>
ROSE_DEVICE void locate(const Table& table, const Segment& segment, int64_t index,
                        int64_t (&at)[kCount], int operand = 0) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) at[k] = segment.dims == 0 ? index : 0;
#pragma unroll 1
  for (int d = segment.dims - 1; d >= 0; --d) {
    const Dim& dim = table.dims[segment.first_dim + d];
    // A 64-bit division would be a call that spills. The quotient is off by one at most, below 2^52.
    int64_t rest = (int64_t)((double)index * dim.inverse);
    int64_t coordinate = index - rest * dim.size;
    if (coordinate < 0) {
      coordinate += dim.size;
      --rest;
    } else if (coordinate >= dim.size) {
      coordinate -= dim.size;
      ++rest;
    }
    index = rest;
#pragma unroll
    for (int k = 0; k < kCount; ++k) at[k] += coordinate * dim.strides[operand + k];
  }
}

ROSE_DEVICE float widen(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
}

ROSE_DEVICE float read_element(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32 ? read<float>(data, at) : widen(read<uint16_t>(data, at), dtype);
}

ROSE_DEVICE uint16_t narrow(float x, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? float_to_bf16(x) : float_to_half(x);
}

ROSE_DEVICE void write_element(void* data, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::kFloat32) {
    write<float>(data, at, x);
  } else {
    write<uint16_t>(data, at, narrow(x, dtype));
  }
}

// kVector elements as they lie in memory. Reading all operands before widening any lets the loads
// overlap.
struct Raw {
  uint32_t words[kVector];
};

ROSE_DEVICE Raw read_vector(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat32) {
    const uint4 w = read<uint4>(data, index / kVector);
    return {{w.x, w.y, w.z, w.w}};
  }
  const uint2 w = read<uint2>(data, index / kVector);
  return {{w.x, w.y, 0, 0}};
}

ROSE_DEVICE void widen(const Raw& raw, Dtype dtype, float (&x)[kVector]) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = bits_float(raw.words[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      x[j] = widen((uint16_t)(raw.words[j / 2] >> (j % 2 * 16)), dtype);
    }
  }
}

ROSE_DEVICE uint2 pack(const uint16_t (&h)[kVector]) {
  return make_uint2(h[0] | (uint32_t)h[1] << 16, h[2] | (uint32_t)h[3] << 16);
}

ROSE_DEVICE void write_vector(void* data, Dtype dtype, int64_t index, const float (&x)[kVector]) {
  if (dtype == Dtype::kFloat32) {
    write<uint4>(data, index / kVector,
                 make_uint4(float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])));
    return;
  }
  uint16_t h[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) h[j] = narrow(x[j], dtype);
  write<uint2>(data, index / kVector, pack(h));
}

// ---------------------------------------------------------------------------------------- reductions

// Sum over the block in a fixed order, for thread 0. `scratch` is shared, one for each warp.
template <typename T>
ROSE_DEVICE T block_sum(T x, T* scratch) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_down_sync(kFullWarp, x, d);
  __syncthreads();  // of the last use of scratch
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kThreads / kWarp; ++w) x += scratch[w];
  }
  return x;
}

// Adds a count of each thread to one in global memory.
ROSE_DEVICE void add_to(Count* total, Count count, Count* scratch) {
  const Count sum = block_sum(count, scratch);
  if (threadIdx.x == 0 && sum != 0) atomicAdd(total, sum);
}

// Whether this block is the last to come here, so that it sees what all others wrote before.
ROSE_DEVICE bool is_last_block(uint32_t* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace cuda
}  // namespace rose
