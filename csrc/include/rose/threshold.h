// The statistics of a threshold: what a sample says of where it is, and how surely. Written once, for
// the host and the device. Derivation: step_ in rose_ops/reference.py.
#pragma once

#include "element.h"

namespace rose {

constexpr int kLine = 16;                 // elements that are sampled together: a cache line of float32
constexpr uint32_t kSampleKey = 0x5A3Bu;  // together with the draw, the seed of a sample

// A statistical bound fails with a probability of at most exp(-l). The first l is for results; the
// second one is for where a failure only costs time (three more passes over the data).
constexpr double kLogOfFailure = 26.0;
constexpr double kLogOfFailureIfCounted = 8.0;

// Rankings over several processes count a key's 31 bits in two digits.
constexpr int kLowDigitBits = 15;
constexpr int kHighDigits = 1 << 16, kLowDigits = 1 << kLowDigitBits;

constexpr int64_t kFewestOfApprox = int64_t{1} << 20;  // with fewer elements, "approx" is exact

// -------------------------------------------------------------------------------------------- samples

// All lines are divided into strata of `size` consecutive ones, and one line is drawn from each. The
// last stratum may be shorter; the line drawn from it may then not exist.
struct Strata {
  int64_t size, count;
};

ROSE_INLINE Strata strata_of(int64_t lines, int64_t wanted) {
  const int64_t size = wanted < 1 ? lines : lines / wanted, least = size < 1 ? 1 : size;
  return {least, (lines + least - 1) / least};
}

ROSE_INLINE int64_t drawn_line(uint32_t key, int64_t stratum, int64_t size) {
  const uint64_t random = random_bits(key, (uint32_t)((uint64_t)stratum >> 32), (uint32_t)stratum);
  return stratum * size + (int64_t)(random * (uint64_t)size >> 32);
}

// The log shrinks as 1 / sqrt(lines sampled), so that with about c * n^(2/3) lines the sample and the
// log cost the same.
ROSE_INLINE double balanced_lines(double c, int64_t elements) {
  const double root = cbrt((double)elements);
  return c * root * root;
}

ROSE_INLINE int64_t lines_of_approx(int64_t lines) {
  const int64_t few = lines / 8 < (1 << 14) ? lines / 8 : 1 << 14;
  const int64_t wanted = lines / 128 > few ? lines / 128 : few;
  return wanted < (1 << 16) ? wanted : 1 << 16;
}

// The memory that a log may take: 1 bit for each element, and 14 MiB.
ROSE_INLINE int64_t bytes_of_log(int64_t elements) { return elements / 8 + (14 << 20); }

// ----------------------------------------------------------------------------------- how sure they are

// How far a window reaches on each side of quantile q of a small sample of `size` elements, in ranks of
// that sample: so many standard errors, assuming that elements of a line are as alike as 2 in 3. A
// threshold outside of the window only costs time.
ROSE_INLINE double window_margin(double errors, double q, double size) {
  return errors * sqrt(2.0 * size * q * (1.0 - q)) + 2 * kLine;
}

// U of the derivation. Let r be the number of ranked elements of a line, and c that of those at or
// below the threshold; cc, cr and rr are sums, over pairs of neighbouring lines, of products of the
// differences between their c and r.
ROSE_INLINE double squared_differences(double cc, double cr, double rr, double q) {
  const double u = cc - 2 * q * cr + q * q * rr;
  return u > 0.0 ? u : 0.0;
}

// The half-width of a bracket, in elements of the sample.
ROSE_INLINE double half_width(double u, double l) {
  const double r = kLine * sqrt(2 * l);
  const double deviation = r / 2 + sqrt(r * r / 4 + u);
  return sqrt(2 * l) * deviation + 2.0 / 3.0 * kLine * l;
}

// Whether a key lies before or behind the threshold. `estimate` is the estimated number of elements up
// to the key, less the threshold's rank, which is known to within 1.
ROSE_INLINE bool is_surely_before(double estimate, double half_width) {
  return estimate < -1.0 - half_width;
}
ROSE_INLINE bool is_surely_behind(double estimate, double half_width) { return estimate > half_width; }

// Whether a bracket may collapse onto one key: `below` and `upto` are the estimates for the elements
// below it, and for those together with its own.
ROSE_INLINE bool is_surely_between(double below, double upto, double half_width) {
  return is_surely_before(below, half_width) && is_surely_behind(upto, half_width);
}

// An upper bound of the number of elements somewhere, of which the sample has `sampled`. It fails with
// a probability of exp(-l): the lower tail of a sum of independent terms between 0 and kLine, whose
// squares are at most kLine times as large.
ROSE_INLINE double at_most(double sampled, int64_t stratum) {
  if (stratum == 1) return sampled;
  constexpr double half = kLine / 2 * kLogOfFailure;
  const double root = sqrt(sampled + half) + sqrt(half);
  return root * root * (double)stratum;
}

}  // namespace rose
