#include "ops_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../check.h"
#include "upload.h"

namespace rose {
namespace cuda {
namespace ops {
namespace {

void check(const char* error) { ROSE_CHECK(error == nullptr, "CUDA: ", error); }

torch::stable::Device device_of(const std::vector<Tensor>& tensors) {
#ifdef ROSE_SIMT
  return torch::headeronly::DeviceType::CPU;
#else
  if (!tensors.empty()) return tensors[0].device();
  return {torch::headeronly::DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex()};
#endif
}

// Data of an optional float32 tensor on the device.
const float* floats(const std::optional<Tensor>& tensor, int64_t numel, const char* name,
                    const Context& context) {
  if (!tensor) return nullptr;
  check_table(*tensor, ScalarType::Float, numel, name, context.device());
  return read_from<float>(*tensor, name);
}

const int64_t* record(const Tensor& selection, const Context& context) {
  check_table(selection, ScalarType::Long, 8, "selection", context.device());
  return read_from<int64_t>(selection, "selection");
}

// Of gradients and, in second order, first moments.
Risk risk_of(const DeviceTable& table, const std::optional<Tensor>& inv_scale,
             const std::optional<Tensor>& clip, bool second_order, bool rank_inactive,
             const Context& context) {
  return {table.table,
          floats(inv_scale, 1, "inv_scale", context),
          floats(clip, 2, "clip", context),
          second_order,
          rank_inactive,
          0};
}

// Where masks are to be written.
void set_bits(HostTable& host, const std::vector<Tensor>& masks, const Context& context) {
  ROSE_CHECK(masks.size() == host.segments.size(), "masks has ", masks.size(),
             " tensors; expected one for each of ", host.segments.size(), " gradients");
  for (size_t i = 0; i < masks.size(); ++i) {
    Segment& segment = host.segments[i];
    check_table(masks[i], ScalarType::Byte, (segment.n + 7) / 8, "masks", context.device());
    segment.bits = write_to<uint8_t>(masks[i], {"masks", static_cast<int64_t>(i)});
  }
}

// What is to be found of the risks: quantiles, in a sample or with its help.
struct Wanted {
  int64_t upper, lower, draw;
};

// The arguments of a selection of n ranked elements, and the memory they point to.
class Selecting {
 public:
  SelectArguments arguments = {};

  Selecting(const Risk& risk, int64_t n, Wanted wanted, const Context& context)
      : context_(context),
        n_(n),
        state_(context.empty((sizeof(SelectState) + 7) / 8, ScalarType::Long)),
        sample_(zeros_of_stream(context, (sizeof(Sample) + 7) / 8)) {
    arguments.risk = risk;
    arguments.state = write_to<SelectState>(state_);
    arguments.sample = write_to<Sample>(sample_);
    arguments.upper = wanted.upper;
    arguments.lower = wanted.lower;
    arguments.draw = random_key(static_cast<uint32_t>(wanted.draw), 0x5A3Bu);
    arguments.elements = n;
    arguments.width = 1.0;
  }

  // Room for the keys of the windows around the thresholds. Where that is room for all keys, there is
  // nothing to sample.
  void log_keys() {
    const int64_t thresholds = arguments.lower > 0 ? 2 : 1;
    const int64_t capacity = std::max(n_ / 32 * thresholds, std::min<int64_t>(n_, 1 << 18));
    if (n_ > capacity) sample_lines(balanced_lines(0.1));
    allocate_log(capacity + unused_at_most(), 1);
  }

  // Room for the keys of a sample, whose thresholds are taken for those of all: see `sampled` in
  // rose_ops/reference.py.
  void log_sample() {
    constexpr int64_t kFewest = 1 << 20;
    if (n_ < kFewest) return log_keys();
    const int64_t lines = arguments.risk.table.lines;
    const int64_t most = std::max(lines / 128, std::min<int64_t>(lines / 8, 1 << 14));
    sample_lines(std::min<int64_t>(most, 1 << 16));
    allocate_log(arguments.lines * kLine, 1);
    arguments.approx = true;
  }

  // Room for what lies in brackets: within 1 bit for each element and 14 MiB. A selection without
  // brackets has the same memory for keys alone.
  void log_brackets(bool updates, double width) {
    constexpr int64_t kFewest = 1 << 16;  // below, the sample would be too large a part
    if (n_ >= kFewest) sample_lines(balanced_lines(0.5));
    arguments.width = width;
    arguments.speculative = true;
    const int64_t words = updates ? 6 : 3;  // key, place; p, m, v
    const int64_t most = (n_ / 8 + (14 << 20)) / (4 * words);
    const int64_t capacity = std::min({n_ + unused_at_most(), most, int64_t{1} << 30});
    uint32_t* const end = allocate_log(capacity, words);
    arguments.log.places = reinterpret_cast<int64_t*>(end);
    if (updates) arguments.log.old = reinterpret_cast<float*>(end + 2 * arguments.log.capacity);
  }

 private:
  // Of a log: warps take it in chunks. It need not be true of more than this many blocks.
  int64_t unused_at_most() const {
    return std::min<int64_t>(arguments.risk.table.tiles, 2048) * kThreads;
  }

  // Of `capacity` entries of so many words; returns where their keys end.
  uint32_t* allocate_log(int64_t capacity, int64_t words) {
    capacity = capacity / 2 * 2;  // even, since places are of 8 bytes
    log_ = context_.empty(words * capacity, ScalarType::Int);
    arguments.log.capacity = capacity;
    arguments.log.keys = write_to<uint32_t>(log_);
    return arguments.log.keys + capacity;
  }

  // A log shrinks as 1 / sqrt(lines of the sample), so about c * n^(2/3) balance its cost and theirs.
  int64_t balanced_lines(double c) const {
    const double root = std::cbrt(static_cast<double>(n_));
    return static_cast<int64_t>(c * root * root);
  }

  void sample_lines(int64_t wanted) {
    const int64_t lines = arguments.risk.table.lines;
    arguments.stratum = std::max<int64_t>(1, lines / std::max<int64_t>(1, wanted));
    arguments.lines = (lines + arguments.stratum - 1) / arguments.stratum;
  }

  const Context& context_;
  int64_t n_;
  Tensor state_, sample_, log_;
};

struct UpdateTensors {
  std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &steps, &first_masks, &second_masks;
};

struct UpdateScalars {
  const Tensor &lr, &hyper, &group, &offsets;
  const std::optional<Tensor>&inv_scale, &clip, &found_inf;
  double gamma;
  bool rank_inactive;
  int64_t seed;
  bool stochastic;
};

// The arguments of an update, and the memory they point to.
class Updating {
 public:
  UpdateArguments arguments = {};
  int64_t ranked = 0;  // elements of selective tensors

  // Checks everything, changes nothing.
  Updating(const UpdateTensors& tensors, const UpdateScalars& scalars, bool from_risk,
           const Context& context);

 private:
  void set_lrs(const Tensor& lr, int64_t count, const Context& context);

  std::optional<DeviceTable> table_;
  std::optional<Tensor> lrs_;
  Tensor prepared_;
};

void Updating::set_lrs(const Tensor& lr, int64_t count, const Context& context) {
  const double* const lrs = read_from<double>(lr, "lr");
  if (!lr.is_cpu()) {
    arguments.lrs = lrs;
  } else if (count <= kFewGroups) {
    std::copy(lrs, lrs + count, arguments.few_lrs);
  } else {
    std::vector<uint64_t> words(static_cast<size_t>(count));
    std::memcpy(words.data(), lrs, words.size() * sizeof(double));
    lrs_ = upload(std::move(words), context);
    arguments.lrs = write_to<double>(*lrs_);
  }
}

Updating::Updating(const UpdateTensors& tensors, const UpdateScalars& scalars, bool from_risk,
                   const Context& context) {
  const Segments layout({{"params", &tensors.params, true},
                         {"grads", &tensors.grads, false},
                         {"exp_avgs", &tensors.exp_avgs, true},
                         {"exp_avg_sqs", &tensors.exp_avg_sqs, true}},
                        kTile);
  const size_t count = layout.size();
  const Groups groups(scalars.hyper, scalars.group, count);
  const Tensor& lr = scalars.lr;
  check_table(scalars.offsets, ScalarType::Long, static_cast<int64_t>(count), "offsets");
  check_table(lr, ScalarType::Double, groups.count(), "lr",
              lr.is_cpu() ? lr.device() : context.device());
  ROSE_CHECK(tensors.steps.size() == count, "steps has ", tensors.steps.size(),
             " tensors; expected one for each of ", count, " parameters");
  const bool has_first = !tensors.first_masks.empty();
  const bool has_second = from_risk || !tensors.second_masks.empty();
  const auto first = check_masks(tensors.first_masks, layout, "first_masks", context.device());
  const auto second = check_masks(tensors.second_masks, layout, "second_masks", context.device());

  const auto* offsets = read_from<int64_t>(scalars.offsets, "offsets");
  HostTable host(layout, &groups);
  for (size_t i = 0; i < count; ++i) {
    check_table(tensors.steps[i], ScalarType::Float, 1, "steps", context.device());
    Segment& segment = host.segments[i];
    ROSE_CHECK(!segment.selective || has_first || has_second, "params[", i,
               "] is selective; expected first_masks, second_masks or a selection");
    segment.step = write_to<float>(tensors.steps[i], {"steps", static_cast<int64_t>(i)});
    segment.offset = offsets[i];
    const auto mask = [&](const std::vector<Tensor>& masks, const char* name) {
      return masks.empty() ? nullptr : read_from<uint8_t>(masks[i], {name, static_cast<int64_t>(i)});
    };
    const uint8_t* const masks[2] = {mask(tensors.first_masks, "first_masks"),
                                     mask(tensors.second_masks, "second_masks")};
    if (!segment.selective) continue;
    ranked += segment.n;
    segment.mask_kinds[0] = first[i];
    segment.mask_kinds[1] = second[i];
    std::copy(masks, masks + 2, segment.masks);
  }
  table_.emplace(host, context);
  prepared_ = context.empty(static_cast<int64_t>(count * sizeof(Prepared)), ScalarType::Byte);

  arguments.table = table_->table;
  set_lrs(scalars.lr, groups.count(), context);
  arguments.inv_scale = floats(scalars.inv_scale, 1, "inv_scale", context);
  arguments.clip = floats(scalars.clip, 2, "clip", context);
  arguments.found_inf = floats(scalars.found_inf, 1, "found_inf", context);
  arguments.from_risk = from_risk;
  arguments.prepared = write_to<Prepared>(prepared_);
  arguments.gamma = scalars.gamma;
  arguments.fractional = has_first && has_second;
  arguments.first_weight = arguments.fractional ? 1 : 3;
  arguments.second_weight = arguments.fractional ? 2 : 3;
  arguments.rank_inactive = scalars.rank_inactive;
  arguments.stochastic = scalars.stochastic;
  arguments.seed = static_cast<uint32_t>(scalars.seed);
}

}  // namespace

Tensor select(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper, int64_t lower,
              bool rank_inactive, bool approx, int64_t draw) {
  check_fractions(upper, lower);
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  const DeviceTable table(HostTable(layout, &groups, true), context);
  const Risk risk = risk_of(table, inv_scale, clip, !exp_avgs.empty(), rank_inactive, context);
  Selecting selecting(risk, layout.elements(), {upper, lower, draw}, context);
  Tensor result = context.empty(8, ScalarType::Long);
  selecting.arguments.selection = write_to<int64_t>(result);
  approx ? selecting.log_sample() : selecting.log_keys();
  check(cuda::select(selecting.arguments, context.stream()));
  return result;
}

void capture_(std::vector<Tensor> masks, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              Tensor hyper, Tensor group, std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              Tensor selection, bool rank_inactive) {
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  HostTable host(layout, &groups, true);
  set_bits(host, masks, context);
  const DeviceTable table(host, context);
  const Risk risk = risk_of(table, inv_scale, clip, !exp_avgs.empty(), rank_inactive, context);
  check(cuda::capture({risk, record(selection, context)}, context.stream()));
}

Tensor bracket_capture_(std::vector<Tensor> masks, std::vector<Tensor> grads,
                        std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
                        std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper,
                        int64_t lower, bool rank_inactive, int64_t draw, double width, bool approx) {
  check_fractions(upper, lower);
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  HostTable host(layout, &groups, true);
  set_bits(host, masks, context);
  const DeviceTable table(host, context);
  const Risk risk = risk_of(table, inv_scale, clip, !exp_avgs.empty(), rank_inactive, context);
  Selecting selecting(risk, layout.elements(), {upper, lower, draw}, context);
  Tensor result = context.empty(8, ScalarType::Long);
  selecting.arguments.selection = write_to<int64_t>(result);
  approx ? selecting.log_sample() : selecting.log_brackets(false, width);
  check(cuda::bracket_capture(selecting.arguments, context.stream()));
  return result;
}

Tensor adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
              std::vector<Tensor> first_masks, std::vector<Tensor> second_masks,
              std::optional<Tensor> selection, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              std::optional<Tensor> found_inf, double gamma, bool rank_inactive, int64_t seed,
              bool stochastic) {
  const Context context(device_of(params));
  ROSE_CHECK(!selection || second_masks.empty(),
             "both selection and second_masks are given; expected one second-order mask");
  Updating updating(
      {params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks},
      {lr, hyper, group, offsets, inv_scale, clip, found_inf, gamma, rank_inactive, seed, stochastic},
      selection.has_value(), context);
  updating.arguments.selection = selection ? record(*selection, context) : nullptr;
  Tensor counts = context.empty(2, ScalarType::Long);
  updating.arguments.counts = write_to<Count>(counts);
  check(cuda::update(updating.arguments, context.stream()));
  return counts;
}

Tensor bracket_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                      std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> steps, std::vector<Tensor> first_masks, Tensor lr,
                      Tensor hyper, Tensor group, Tensor offsets, std::optional<Tensor> inv_scale,
                      std::optional<Tensor> clip, std::optional<Tensor> found_inf, double gamma,
                      int64_t upper, int64_t lower, bool rank_inactive, int64_t seed, bool stochastic,
                      int64_t draw, double width, bool approx) {
  check_fractions(upper, lower);
  const Context context(device_of(params));
  std::vector<Tensor> no_masks;
  Updating updating(
      {params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, no_masks},
      {lr, hyper, group, offsets, inv_scale, clip, found_inf, gamma, rank_inactive, seed, stochastic},
      true, context);
  UpdateArguments& update = updating.arguments;
  const Risk risk = {update.table, update.inv_scale, update.clip, true, rank_inactive, 1};
  Selecting selecting(risk, updating.ranked, {upper, lower, draw}, context);
  approx ? selecting.log_sample() : selecting.log_brackets(true, width);
  Tensor result = context.empty(8 + 2, ScalarType::Long);
  int64_t* const record = write_to<int64_t>(result);
  selecting.arguments.selection = record;
  update.selection = record;
  update.counts = reinterpret_cast<Count*>(record + 8);
  check(cuda::bracket_update({selecting.arguments, update}, context.stream()));
  return result;
}

Tensor sums_of_squares(std::vector<Tensor> tensors, std::optional<Tensor> inv_scale) {
  const Context context(device_of(tensors));
  const Segments layout({{"tensors", &tensors, false}}, kTile);
  const int64_t count = static_cast<int64_t>(layout.size());
  const DeviceTable table(HostTable(layout), context);
  Tensor partial = context.empty(layout.tiles(), ScalarType::Double);
  Tensor result = context.empty(count, ScalarType::Double);
  check(cuda::sums_of_squares({table.table, floats(inv_scale, 1, "inv_scale", context),
                               write_to<double>(partial), write_to<double>(result)},
                              context.stream()));
  return result;
}

Tensor clip_factors(Tensor sums, double max_norm) {
  const Context context(sums.device());
  const int64_t count = sums.numel();
  check_table(sums, ScalarType::Double, count, "sums", context.device());
  Tensor result = context.empty(3, ScalarType::Float);
  check(cuda::clip_factors(
      {read_from<double>(sums, "sums"), count, static_cast<float>(max_norm), write_to<float>(result)},
      context.stream()));
  return result;
}

Tensor select_tensors_(Tensor mask, Tensor sums, std::optional<Tensor> exp_avg_sums, Tensor hyper,
                       Tensor group, std::optional<Tensor> clip, int64_t upper, int64_t lower,
                       bool rank_inactive) {
  const Context context(mask.device());
  const int64_t count = mask.numel();
  check_tensors(mask, sums, exp_avg_sums, upper, lower);
  const Groups groups(hyper, group, static_cast<size_t>(count));
  std::vector<uint64_t> words(static_cast<size_t>((count + 1) / 2));
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = float_bits(groups.alpha(static_cast<size_t>(i)));
    words[static_cast<size_t>(i / 2)] |= bits << 32 * (i % 2);
  }
  Tensor alphas = upload(std::move(words), context);
  Tensor keys = context.empty(count, ScalarType::Int);
  Tensor result = context.empty(8, ScalarType::Long);
  check(cuda::select_tensors(
      {read_from<double>(sums, "sums"),
       exp_avg_sums ? read_from<double>(*exp_avg_sums, "exp_avg_sums") : nullptr,
       write_to<float>(alphas), floats(clip, 2, "clip", context), count, upper, lower, rank_inactive,
       write_to<uint32_t>(keys), write_to<bool>(mask, "mask"), write_to<int64_t>(result)},
      context.stream()));
  return result;
}

}  // namespace ops
}  // namespace cuda
}  // namespace rose
