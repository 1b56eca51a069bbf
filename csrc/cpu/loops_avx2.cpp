#if defined(__x86_64__)

// The headers whose functions are not this project's; the target is for the others.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#endif

#define ROSE_ISA loops_avx2
#define ROSE_ISA_NAME "avx2"
#define ROSE_VECTOR_BITS 256
#include "loops.h"
#include "loops.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
