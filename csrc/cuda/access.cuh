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

// The lanes before this one.
ROSE_DEVICE unsigned lanes_below() { return (1u << lane()) - 1; }

// What is in shared memory is read anew after this, rather than kept in registers that are needed.
ROSE_DEVICE void keep_in_memory() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}
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

// Elements of one segment that a block walks: few enough to be counted by an int.
struct Run {
  int segment;
  int count;
  int64_t begin;
};

// body(run, in shared memory) for this block's share of the tiles. For a whole block.
template <typename Body>
ROSE_DEVICE void for_each_run(const Table& table, Body body) {
  constexpr int64_t kMostTiles = 1 << 16;
  __shared__ Run run;
  __shared__ int64_t tile, stop;  // that are left
  if (threadIdx.x == 0) {
    tile = (int64_t)table.share * blockIdx.x;
    stop = tile + table.share < table.tiles ? tile + table.share : table.tiles;
    if (tile < stop) run.segment = find_segment(table, tile);
  }
#pragma unroll 1
  while (true) {
    __syncthreads();  // of the last body
    if (threadIdx.x == 0) {
      run.count = 0;
      while (tile < stop && run.count == 0) {
        const Segment& segment = table.segments[run.segment];
        run.begin = (tile - segment.first_tile) * kTile;
        const int64_t tiles = stop - tile < kMostTiles ? stop - tile : kMostTiles;
        const int64_t rest = segment.n - run.begin;
        if (rest <= 0) {
          ++run.segment;
          continue;
        }
        run.count = (int)(rest < tiles * kTile ? rest : tiles * kTile);
        tile += (run.count + kTile - 1) / kTile;
      }
    }
    __syncthreads();
    if (run.count == 0) return;
    body(run);
  }
}

// Where element `index` of a segment (row-major) is in the memory of each operand from `operand` on.
template <int kCount>
ROSE_DEVICE void locate(const Dim* dims, const Segment& segment, int64_t index, int64_t (&at)[kCount],
                        int operand = 0) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) at[k] = segment.dims == 0 ? index : 0;
#pragma unroll 1
  for (int d = segment.dims - 1; d >= 0; --d) {
    const Dim& dim = dims[segment.first_dim + d];
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

// The same in two steps, of which the first has the load.
ROSE_DEVICE uint32_t read_bits(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32 ? read<uint32_t>(data, at) : read<uint16_t>(data, at);
}
ROSE_DEVICE float from_bits(uint32_t bits, Dtype dtype) {
  return dtype == Dtype::kFloat32 ? bits_float(bits) : widen((uint16_t)bits, dtype);
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

// kCount elements as they lie in memory: a word for each, or for two of 16 bits. Reading all operands
// before widening any lets the loads overlap.
template <int kCount>
struct Raw {
  uint32_t words[kCount];
};

template <int kCount>
ROSE_DEVICE Raw<kCount> read_vector(const void* data, Dtype dtype, int index) {
  Raw<kCount> raw = {};
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint4 w = read<uint4>(data, (index + i) / 4);
      raw.words[i] = w.x, raw.words[i + 1] = w.y, raw.words[i + 2] = w.z, raw.words[i + 3] = w.w;
    }
  } else if (kCount >= 8) {
#pragma unroll
    for (int i = 0; i < kCount / 2; i += 4) {
      const uint4 w = read<uint4>(data, index / 8 + i / 4);
      raw.words[i] = w.x, raw.words[i + 1] = w.y, raw.words[i + 2] = w.z, raw.words[i + 3] = w.w;
    }
  } else {
    const uint2 w = read<uint2>(data, index / 4);
    raw.words[0] = w.x, raw.words[1] = w.y;
  }
  return raw;
}

template <int kCount>
ROSE_DEVICE void write_vector(void* data, Dtype dtype, int index, const Raw<kCount>& raw) {
  const uint32_t* w = raw.words;
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      write<uint4>(data, (index + i) / 4, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
    }
  } else if (kCount == 8) {
    write<uint4>(data, index / 8, make_uint4(w[0], w[1], w[2], w[3]));
  } else {
    write<uint2>(data, index / 4, make_uint2(w[0], w[1]));
  }
}

template <int kCount>
ROSE_DEVICE float get(const Raw<kCount>& raw, Dtype dtype, int j) {
  if (dtype == Dtype::kFloat32) return bits_float(raw.words[j]);
  const uint32_t word = raw.words[j / 2];
  if (dtype == Dtype::kBFloat16) return bits_float(j % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
  return half_to_float((uint16_t)(word >> (j % 2 * 16)));
}

// Two numbers to nearest, the first in the lower half; not for NaN.
ROSE_DEVICE uint32_t pack_bf16(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // keeps denormals: tests/test_gpu.py tries all numbers
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return float_to_bf16(first) | (uint32_t)float_to_bf16(second) << 16;
#endif
}

ROSE_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xFFFF0000u);
}

template <int kCount>
ROSE_DEVICE void put(Raw<kCount>& raw, int j, uint16_t bits) {
  uint32_t& word = raw.words[j / 2];
  word = j % 2 == 0 ? (word & 0xFFFF0000u) | bits : (word & 0xFFFFu) | (uint32_t)bits << 16;
}

template <int kCount>
ROSE_DEVICE void put(Raw<kCount>& raw, Dtype dtype, int j, float x) {
  if (dtype == Dtype::kFloat32) {
    raw.words[j] = float_bits(x);
  } else {
    put(raw, j, narrow(x, dtype));
  }
}

// ------------------------------------------------------------------------------- loops by data types

// What a loop knows of its operands when it is compiled: how many elements a thread has of each, and
// the dtypes of parameters with gradients, and of moments. Those of Mixed are looked up, and it is for
// what is not usual in other ways, too (see their users).
template <Dtype kValues, Dtype kMoments>
struct Known {
  static constexpr bool kIsUsual = true;
  static constexpr bool kNarrow = kValues != Dtype::kFloat32 && kMoments != Dtype::kFloat32;
  static constexpr int kCount = kNarrow ? 8 : 4;
  static ROSE_METHOD Dtype of(int operand, Dtype) { return operand < 2 ? kValues : kMoments; }
};
struct Mixed {
  static constexpr bool kIsUsual = false;
  static constexpr int kCount = 4;
  static ROSE_METHOD Dtype of(int, Dtype dtype) { return dtype; }
};

// loop(types, middle) for the elements before `middle` of a run of `count`: vectors, by whole warps.
// A thread has kTimes as many elements as the types say. Returns `middle`; the others, fewer than a
// warp has in its vectors or all of a segment that has none, come one at a time.
template <int kTimes = 1, typename Loop>
ROSE_DEVICE int for_vectors(const Segment& segment, bool is_usual, int count, Loop loop) {
  constexpr Dtype kFloat = Dtype::kFloat32, kBf16 = Dtype::kBFloat16;
  constexpr int kFour = 4 * kTimes * kWarp, kEight = 8 * kTimes * kWarp;
  const int four = count / kFour * kFour, eight = count / kEight * kEight;
  if (segment.access == Access::kSingle) return 0;
  switch (is_usual ? segment.access : Access::kMixed) {
    case Access::kFloats:
      loop(Known<kFloat, kFloat>(), four);
      return four;
    case Access::kNarrowMoments:
      loop(Known<kFloat, kBf16>(), four);
      return four;
    case Access::kWideMoments:
      loop(Known<kBf16, kFloat>(), four);
      return four;
    case Access::kNarrow:
      loop(Known<kBf16, kBf16>(), eight);
      return eight;
    default:
      loop(Mixed(), four);
      return four;
  }
}

// Where the elements from `begin` on of a linear operand are.
ROSE_DEVICE char* data_from(const Segment& segment, int operand, Dtype dtype, int64_t begin) {
  return segment.data[operand] + begin * (dtype == Dtype::kFloat32 ? 4 : 2);
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
