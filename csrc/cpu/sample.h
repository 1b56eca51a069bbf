// Samples of the index space.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "select.h"

namespace rose {
namespace cpu {

// Lines of the index space, drawn one from each stratum.
class Lines {
 public:
  Lines(const RiskSource& source, int64_t wanted, uint32_t draw) : source_(source) {
    const Segments& segments = source.segments;
    first_.reserve(segments.size() + 1);
    first_.push_back(0);
    for (size_t i = 0; i < segments.size(); ++i) {
      first_.push_back(first_.back() + (segments[i].n + kLine - 1) / kLine);
    }
    key_ = random_key(draw, 0x5A3Bu);
    stratum_ = std::max<int64_t>(1, first_.back() / wanted);
    count_ = (first_.back() + stratum_ - 1) / stratum_;
  }

  int64_t count() const { return count_; }
  double weight() const {
    return static_cast<double>(stratum_);
  }  // lines that a sampled one stands for

  struct Place {
    size_t index;
    int64_t start;
    int n;  // 0: the last stratum is shorter than the others, and its line is not there
  };

  // `index` is that of an earlier line, or 0.
  Place place(int64_t line, size_t index) const {
    const uint64_t random = random_bits(key_, static_cast<uint32_t>(static_cast<uint64_t>(line) >> 32),
                                        static_cast<uint32_t>(line));
    const int64_t at =
        line * stratum_ + static_cast<int64_t>(random * static_cast<uint64_t>(stratum_) >> 32);
    if (at >= first_.back()) return {index, 0, 0};
    if (at >= first_[index + 1]) {
      index =
          static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), at) - first_.begin()) - 1;
    }
    const int64_t start = (at - first_[index]) * kLine;
    return {index, start,
            static_cast<int>(std::min<int64_t>(kLine, source_.segments[index].n - start))};
  }

  // body(line, place, keys) for lines first, first + step, ... before last. Lines are far apart: while
  // one batch is at work, the next one is on its way.
  template <typename Body>
  void for_each(int64_t first, int64_t last, int64_t step, Body body) const {
    struct Batch {
      Place places[kBatch];
      int size = 0;
    } batches[2];
    int64_t next = first;
    size_t index = 0;
    const auto plan = [&](Batch& batch) {
      batch.size = 0;
      for (; batch.size < kBatch && next < last; ++batch.size, next += step) {
        const Place at = batch.places[batch.size] = place(next, index);
        index = at.index;
        if (batch.size > 0 && source_.alpha[index] != source_.alpha[batch.places[0].index]) break;
      }
    };
    float g[kBatch * kLine], m[kBatch * kLine], scaled[kBatch * kLine];
    uint32_t keys[kBatch * kLine];
    plan(batches[0]);
    for (int i = 0; i < batches[0].size; ++i) prefetch(batches[0].places[i]);
    for (int64_t line = first, k = 0; line < last; ++k) {
      const Batch& batch = batches[k % 2];
      Batch& following = batches[(k + 1) % 2];
      plan(following);
      for (int i = 0; i < batch.size; ++i) {
        copy(batch.places[i], 0, g + i * kLine);
        if (source_.second_order) copy(batch.places[i], 1, m + i * kLine);
      }
      source_.keys(batch.places[0].index, batch.size * kLine, g, m, scaled, keys);
      for (int i = 0; i < std::max(batch.size, following.size); ++i) {
        if (i < following.size) prefetch(following.places[i]);
        if (i >= batch.size) continue;
        body(line, batch.places[i], keys + i * kLine);
        line += step;
      }
    }
  }

 private:
  static constexpr int kBatch = 64;

  // (Compilers drop a call of a function that does nothing else.)
  ROSE_ALWAYS_INLINE void prefetch(const Place& place) const {
    for (const Operand& from : source_.segments[place.index].operands) {
      if (from.linear) __builtin_prefetch(from.data + place.start * from.element_size());
    }
  }

  void copy(const Place& place, size_t operand, float* to) const {
    const Segment& segment = source_.segments[place.index];
    if (place.n < kLine) std::memset(to, 0, kLine * sizeof(float));
    if (place.n == 0) return;
    const float* from = load(segment, segment.operands[operand], place.start, place.n, to);
    if (from != to) std::memcpy(to, from, static_cast<size_t>(place.n) * sizeof(float));
  }

  const RiskSource& source_;
  std::vector<int64_t> first_;  // line of each segment, and their total
  uint32_t key_;
  int64_t stratum_, count_;
};

}  // namespace cpu
}  // namespace rose
