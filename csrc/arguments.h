// Checks of operator arguments, shared by the backends.
#pragma once

#include <optional>
#include <vector>

#include "segments.h"

namespace rose {

constexpr int64_t kFractionUnit = 1000000000;  // fractions are integers of 1e-9

// Raises unless `tensor` is contiguous, of `dtype`, with `numel` elements, and where `place` says.
void check_table(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name,
                 torch::stable::Device device = torch::headeronly::DeviceType::CPU);

void check_fractions(int64_t upper, int64_t lower);

// How a ranking's thresholds are found; see rose_ops/definitions.py.
enum class Mode : int64_t {
  kGiven,    // not at all: a record has them
  kExact,    // in passes of their own, before they are used
  kBracket,  // in the pass that uses them
  kApprox,   // as those of a sample
};

// Of a ranking that processes share: more numbers of the `ranking` of an operator.
struct Shared {
  int64_t ranks;      // who adds up: what rose_ops::_add_over_ranks knows them by
  int64_t elements;   // of all processes
  int32_t latest[2];  // keys of the upper and lower threshold of an earlier step; -1: not known
  std::vector<size_t> others;  // of the ranked tensors, those that another process counts
};

// What is asked of a ranking: the `ranking` of an operator, and the record that comes with it.
struct Ranking {
  bool ranks = false;  // else there is no ranking
  Mode mode = Mode::kGiven;
  int64_t upper = 0, lower = 0;  // fractions
  bool rank_inactive = false;
  uint32_t draw = 0;         // which sample
  double bracket_width = 1;  // that half-widths are multiplied by; else than 1 in tests
  std::optional<Shared> shared;

  // Raises unless `ranking` is mode, upper, lower, rank_inactive and draw, followed by what Shared has,
  // if it may be shared; or empty, if it may be.
  Ranking(const std::vector<int64_t>& ranking, const std::optional<Tensor>& record, bool may_be_empty,
          bool may_be_shared = false);

  bool finds() const { return mode != Mode::kGiven; }  // thresholds
};

// For tests. Returns what it was.
double set_bracket_width(double width);

// Raises unless these can be the arguments of a ranking of whole tensors.
void check_tensors(const Tensor& mask, const Tensor& sums, const std::optional<Tensor>& exp_avg_sums,
                   int64_t upper, int64_t lower);

// The group table and each tensor's row in it; both on the CPU, whatever the device of the tensors.
class Groups {
 public:
  Groups(const Tensor& hyper, const Tensor& group, size_t tensors);

  int64_t count() const { return count_; }
  int64_t row(size_t i) const { return group_[i]; }
  const Hyper& of_row(int64_t row) const { return hyper_[row]; }
  const Hyper& operator[](size_t i) const { return hyper_[group_[i]]; }
  float alpha(size_t i) const { return static_cast<float>(1.0 - (*this)[i].beta1); }

 private:
  int64_t count_;
  const Hyper* hyper_;
  const int64_t* group_;
};

// Where captured masks are written.
std::vector<uint8_t*> mask_bits(const std::vector<Tensor>& masks, const Segments& segments,
                                torch::stable::Device device);

// The numbers of a record.
const int64_t* read_record(const Tensor& record, torch::stable::Device device);

// What gradients and, for second order, first moments make up.
std::vector<Role> risk_roles(const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs);

}  // namespace rose
