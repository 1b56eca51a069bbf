// The flattened index space: each tensor (a parameter with its gradient and moments) is a segment, each
// segment a run of tiles. Work is divided over tiles, not tensors, and the tiles of a segment do not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "data.h"
#include "rose/element.h"

namespace rose {

using torch::headeronly::ScalarType;

// One tensor of a segment. `strides` are those of Segment::sizes; linear: none are needed.
struct Operand {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  bool linear = true;
  std::vector<int64_t> strides;

  int64_t element_size() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

struct Segment {
  int64_t n = 0;
  int64_t first_tile = 0;
  std::vector<int64_t> sizes;  // collapsed; empty if every operand is linear
  std::vector<Operand> operands;

  bool linear() const {
    return std::all_of(operands.begin(), operands.end(), [](const Operand& x) { return x.linear; });
  }
};

// A list of tensors that makes up one operand of every segment.
struct Role {
  const char* name;
  const std::vector<Tensor>* tensors;
  bool written;
};

class Segments {
 public:
  // All tensors must be on the device of the first. `tile`: elements of a tile.
  Segments(const std::vector<Role>& roles, int64_t tile);

  size_t size() const { return segments_.size(); }
  int64_t tiles() const { return tiles_; }
  int64_t elements() const { return elements_; }
  const Segment& operator[](size_t i) const { return segments_[i]; }

  // Segment that holds a tile.
  size_t find(int64_t tile) const {
    auto after = std::upper_bound(segments_.begin(), segments_.end(), tile,
                                  [](int64_t t, const Segment& s) { return t < s.first_tile; });
    return static_cast<size_t>(after - segments_.begin()) - 1;
  }

 private:
  std::vector<Segment> segments_;
  int64_t tiles_ = 0, elements_ = 0;
};

}  // namespace rose
