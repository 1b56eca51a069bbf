// What processes that share a ranking add up: see rose_ops/distributed.py.
#pragma once

#include <vector>

#include "../arguments.h"

namespace rose {
namespace cpu {

class Ranks {
 public:
  explicit Ranks(const Shared& shared) : handle_(shared.ranks) {}

  // Makes numbers of this process the sums over all. each(visit) calls visit(number) for every number,
  // an int64_t&, twice; on every process for as many.
  template <typename Each>
  void add_up(Each each) const {
    std::vector<int64_t> state;
    each([&](int64_t& number) { state.push_back(number); });
    add_up(state);
    auto sum = state.begin();
    each([&](int64_t& number) { number = *sum++; });
  }

 private:
  // Raises where torch.distributed does.
  void add_up(std::vector<int64_t>& state) const;

  int64_t handle_;
};

// Whether keys, or -1, are the same on all processes: once the numbers are added up.
class Comparison {
 public:
  explicit Comparison(int32_t key) : Comparison(key & 0xFFFF, key >> 16) {}
  template <typename Visit>
  void visit(Visit fn) {
    for (int64_t& number : numbers_) fn(number);
  }
  int64_t ranks() const { return numbers_[0]; }  // how many there are
  // Squares of what is not the same add up to more.
  bool alike() const {
    return ranks() * numbers_[2] == numbers_[1] * numbers_[1] &&
           ranks() * numbers_[4] == numbers_[3] * numbers_[3];
  }

 private:
  Comparison(int64_t low, int64_t high) : numbers_{1, low, low * low, high, high * high} {}

  int64_t numbers_[5];
};

}  // namespace cpu
}  // namespace rose
