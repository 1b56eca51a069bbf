#include "arguments.h"

#include <utility>

#include "check.h"

namespace rose {

static_assert(sizeof(Hyper) == 6 * sizeof(double), "hyper is a float64 tensor of 6 columns");
constexpr int64_t kColumns = 6;

namespace {
double latest_width = 1;
}  // namespace

void check_table(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name,
                 torch::stable::Device device) {
  ROSE_CHECK(tensor.device() == device && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                 tensor.numel() == numel,
             name, " must be a contiguous tensor of ", torch::headeronly::toString(dtype), " with ",
             numel, " elements, on ", device.is_cpu() ? "the CPU" : "the device of the parameters");
}

void check_fractions(int64_t upper, int64_t lower) {
  ROSE_CHECK(0 <= lower && lower < upper && upper <= kFractionUnit,
             "expected 0 <= lower < upper <= ", kFractionUnit, " (units of 1e-9); got lower ", lower,
             " and upper ", upper);
}

Ranking::Ranking(const std::vector<int64_t>& ranking, const std::optional<Tensor>& record,
                 bool may_be_empty, bool may_be_shared)
    : ranks(!ranking.empty()), bracket_width(latest_width) {
  constexpr size_t kNumbers = 5, kOfShared = 4;
  const bool is_shared = may_be_shared && ranking.size() >= kNumbers + kOfShared;
  ROSE_CHECK(is_shared || ranking.size() == kNumbers || (may_be_empty && ranking.empty()),
             "ranking has ", ranking.size(), " numbers; expected ", may_be_empty ? "none or " : "",
             "mode, upper, lower, rank_inactive and draw");
  if (ranks) {
    ROSE_CHECK(0 <= ranking[0] && ranking[0] <= static_cast<int64_t>(Mode::kApprox), "ranking[0] is ",
               ranking[0], "; expected a mode: given (0), exact, bracket or approx");
    mode = static_cast<Mode>(ranking[0]);
    upper = ranking[1];
    lower = ranking[2];
    rank_inactive = ranking[3] != 0;
    draw = static_cast<uint32_t>(ranking[4]);
    if (finds()) check_fractions(upper, lower);
  }
  if (is_shared) {
    ROSE_CHECK(mode == Mode::kBracket || mode == Mode::kExact, "ranking has ", ranking.size(),
               " numbers; expected ", kNumbers, ", as its mode is neither exact (1) nor bracket (2)");
    const int64_t* const more = ranking.data() + kNumbers;
    shared = {more[0], more[1], {static_cast<int32_t>(more[2]), static_cast<int32_t>(more[3])}, {}};
    shared->others.assign(ranking.begin() + kNumbers + kOfShared, ranking.end());
  }
  ROSE_CHECK(record.has_value() == (ranks && !finds()), "record is ", record ? "" : "not ",
             "given; expected it with a ranking of mode given (0), and with no other");
}

double set_bracket_width(double width) { return std::exchange(latest_width, width); }

void check_tensors(const Tensor& mask, const Tensor& sums, const std::optional<Tensor>& exp_avg_sums,
                   int64_t upper, int64_t lower) {
  check_fractions(upper, lower);
  const int64_t count = mask.numel();
  ROSE_CHECK(count <= UINT32_MAX, "mask has ", count, " elements; expected less than 2^32");
  check_table(mask, ScalarType::Bool, count, "mask", mask.device());
  check_table(sums, ScalarType::Double, count, "sums", mask.device());
  if (exp_avg_sums) {
    check_table(*exp_avg_sums, ScalarType::Double, count, "exp_avg_sums", mask.device());
  }
}

Groups::Groups(const Tensor& hyper, const Tensor& group, size_t tensors)
    : count_(hyper.numel() / kColumns) {
  check_table(hyper, ScalarType::Double, count_ * kColumns, "hyper");
  check_table(group, ScalarType::Long, static_cast<int64_t>(tensors), "group");
  hyper_ = read_from<Hyper>(hyper, "hyper");
  group_ = read_from<int64_t>(group, "group");
  for (size_t i = 0; i < tensors; ++i) {
    ROSE_CHECK(group_[i] >= 0 && group_[i] < count_, "group[", i, "] is ", group_[i],
               "; expected a row of hyper, which has ", count_);
  }
}

std::vector<uint8_t*> mask_bits(const std::vector<Tensor>& masks, const Segments& segments,
                                torch::stable::Device device) {
  ROSE_CHECK(masks.size() == segments.size(), "masks has ", masks.size(),
             " tensors; expected one for each of ", segments.size(), " gradients");
  std::vector<uint8_t*> bits(masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    check_table(masks[i], ScalarType::Byte, (segments[i].n + 7) / 8, "masks", device);
    bits[i] = write_to<uint8_t>(masks[i], {"masks", static_cast<int64_t>(i)});
  }
  return bits;
}

const int64_t* read_record(const Tensor& record, torch::stable::Device device) {
  check_table(record, ScalarType::Long, kFields, "record", device);
  return read_from<int64_t>(record, "record");
}

std::vector<Role> risk_roles(const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs) {
  std::vector<Role> roles{{"grads", &grads, false}};
  if (!exp_avgs.empty()) roles.push_back({"exp_avgs", &exp_avgs, false});
  return roles;
}

}  // namespace rose
