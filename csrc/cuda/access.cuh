// Walking the tiles of a table, and reading and writing elements of any dtype.
#pragma once

#include "table.h"

// Where tests compile the kernels for the host, these count bytes and check that accesses are aligned.
#ifndef ROSE_GLOBAL_READ
#define ROSE_GLOBAL_READ(pointer, bytes)
#define ROSE_GLOBAL_WRITE(pointer, bytes)
#endif

namespace rose {
namespace cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

#define ROSE_DEVICE static __device__ __forceinline__
#define ROSE_METHOD __device__ __forceinline__

// The number of this thread in its warp, and below that of its warp in the block.
ROSE_DEVICE int lane() { return (int)threadIdx.x % kWarp; }

// A mask of the lanes of a warp that come before this one.
ROSE_DEVICE unsigned lanes_below() { return (1u << lane()) - 1; }

// After this, the compiler has to read shared memory again. It would keep what it has read in
// registers, and there are too few of those.
ROSE_DEVICE void keep_in_memory() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}
ROSE_DEVICE int warp() { return (int)threadIdx.x / kWarp; }

// Addresses of tensors are read from memory, so that the compiler cannot know which kind of memory they
// point to. Without being told that it is global memory, it would use slower instructions, which work
// for any kind.
#if !defined(__CUDA_ARCH__)
#define ROSE_ASSUME_GLOBAL(pointer)
#else
#define ROSE_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#endif

// Reads and writes a T, at `index` in units of T. All global memory that is as large as the parameters
// is accessed by these two functions, since they are what tests count.
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

// The index of the segment that holds a tile (with &Segment::first_line, a line). It is the last one
// that starts at or before the tile, so it is never an empty one.
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

// Consecutive elements of one segment, which a block treats together: few enough to be counted by an
// int.
struct Run {
  int segment;    // its index in the table
  int count;      // of elements
  int64_t begin;  // index of the first one in the segment
};

// Calls body(run) for every run of this block's share of the tiles. The run is in shared memory. All
// threads of a block have to call it.
template <typename Body>
ROSE_DEVICE void for_each_run(const Table& table, Body body) {
  constexpr int64_t kMostTiles = 1 << 16;
  __shared__ Run run;
  __shared__ int64_t tile, stop;  // the tiles from `tile` on, before `stop`, are left
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

// Sets at[k] to where element `index` of a segment, in row-major order, is in the memory of operand
// `operand` + k, in elements from its start.
template <int kCount>
ROSE_DEVICE void locate(const Dim* dims, const Segment& segment, int64_t index, int64_t (&at)[kCount],
                        int operand = 0) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) at[k] = segment.dims == 0 ? index : 0;
#pragma unroll 1
  for (int d = segment.dims - 1; d >= 0; --d) {
    const Dim& dim = dims[segment.first_dim + d];
    // A 64-bit division would be a call of a function, for which registers have to be spilled to
    // memory. The product is a quotient that is off by at most one, for numbers below 2^52; that is
    // corrected.
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

// Elements of 16 bits as float32, and below (`narrow`) float32 rounded to them.
ROSE_DEVICE float widen(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
}

ROSE_DEVICE float read_element(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32 ? read<float>(data, at) : widen(read<uint16_t>(data, at), dtype);
}

// read_element() in two steps, for those who want several loads to be under way before the first result
// is needed.
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

// kCount elements as they are in memory: a word holds one float32, or two elements of 16 bits. Kernels
// read all operands like this before they convert any to float32, so that the loads overlap.
template <int kCount>
struct Raw {
  uint32_t words[kCount];
};

// Reads kCount elements from `index` on, which is a multiple of kCount, in accesses of up to 16 bytes.
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

// Element j of a vector, as float32.
template <int kCount>
ROSE_DEVICE float get(const Raw<kCount>& raw, Dtype dtype, int j) {
  if (dtype == Dtype::kFloat32) return bits_float(raw.words[j]);
  const uint32_t word = raw.words[j / 2];
  if (dtype == Dtype::kBFloat16) return bits_float(j % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
  return half_to_float((uint16_t)(word >> (j % 2 * 16)));
}

// Two numbers, rounded to the nearest bfloat16, in one word: the first is in its lower half. Not for
// NaN.
ROSE_DEVICE uint32_t pack_bf16(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // this instruction does not flush denormals: tests/test_gpu.py tries all numbers
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return float_to_bf16(first) | (uint32_t)float_to_bf16(second) << 16;
#endif
}

// The upper halves of two words in one: two float32 as bfloat16, without rounding.
ROSE_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xFFFF0000u);
}

// Sets element j of a vector: of 16 bits, or rounded to its dtype.
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

// A loop is compiled once for each usual combination of dtypes, and then knows the dtype of parameters
// and gradients (kValues), that of moments (kMoments), and how many elements of each a thread has
// (kCount). It is compiled once more for all the rest, with `Mixed`: dtypes are looked up, and a kernel
// may use that loop for what is not usual in other ways, too. of(operand, dtype) is the dtype of an
// operand, by what is known or by what was looked up.
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

// Calls loop(types, middle) to treat the elements before `middle` of a run of `count` elements as
// vectors, with `types` a Known or Mixed; all lanes of a warp have work in every round. A thread takes
// kTimes as many elements as the types say. Returns `middle`: the caller treats the others one at a
// time, fewer than a warp takes in one round, or all of a segment that is not fit for vectors. With
// `is_usual` false, the types are Mixed.
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

// The address of element `begin` of an operand that is contiguous.
ROSE_DEVICE char* data_from(const Segment& segment, int operand, Dtype dtype, int64_t begin) {
  return segment.data[operand] + begin * (dtype == Dtype::kFloat32 ? 4 : 2);
}

// ---------------------------------------------------------------------------------------- reductions

// The sum of x over all threads of a block, in a fixed order. Only thread 0 gets it. `scratch` is
// shared memory with a place for each warp.
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

// Whether this block is the last one of the grid to call this. If so, it sees what all other blocks
// have written before. `ticket` counts the calls, and is 0 before the first one.
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
