#include "ops_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "../update_plan.h"
#include "upload.h"

namespace rose {
namespace cuda {
namespace {

void check(const char* error) { ROSE_CHECK(error == nullptr, "CUDA: ", error); }

torch::stable::Device device_of(const Tensors& tensors) {
#ifdef ROSE_SIMT
  return torch::headeronly::DeviceType::CPU;
#else
  if (!tensors.empty()) return tensors[0].device();
  return {torch::headeronly::DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex()};
#endif
}

// Data of an optional float32 tensor on the device.
const float* floats(const MaybeTensor& tensor, int64_t numel, const char* name,
                    const Context& context) {
  if (!tensor) return nullptr;
  check_table(*tensor, ScalarType::Float, numel, name, context.device());
  return read_from<float>(*tensor, name);
}

// The arguments of a ranking of n elements, and the memory they point to.
class Selecting {
 public:
  SelectArguments arguments = {};

  Selecting(const Risk& risk, int64_t n, const Ranking& wanted, int64_t* record, const Context& context)
      : context_(context),
        n_(n),
        state_(context.empty((sizeof(SelectState) + 7) / 8, ScalarType::Long)),
        sample_(zeros_of_stream(context, (sizeof(Sample) + 7) / 8)) {
    arguments.risk = risk;
    arguments.state = write_to<SelectState>(state_);
    arguments.sample = write_to<Sample>(sample_);
    arguments.record = record;
    arguments.upper = wanted.upper;
    arguments.lower = wanted.lower;
    arguments.draw = random_key(wanted.draw, kSampleKey);
    arguments.elements = n;
    arguments.width = wanted.bracket_width;
  }

  // Room for what is logged in the pass that the thresholds are for.
  void log_on_the_way(Mode mode, bool updates) {
    mode == Mode::kApprox ? log_sample() : log_brackets(updates);
  }

  // Room for the keys of the windows around the thresholds. Where that is room for all keys, there is
  // nothing to sample.
  void log_keys() {
    const int64_t thresholds = arguments.lower > 0 ? 2 : 1;
    const int64_t capacity = std::max(n_ / 32 * thresholds, std::min<int64_t>(n_, 1 << 18));
    if (n_ > capacity) sample_lines(balanced_lines(0.1, n_));
    allocate_log(capacity + unused_at_most(), 1);
  }

  // Room for the keys of a sample, whose thresholds are taken for those of all: see `sampled` in
  // rose_ops/definitions.py.
  void log_sample() {
    if (n_ < kFewestOfApprox) return log_keys();
    sample_lines(static_cast<double>(lines_of_approx(arguments.risk.table.lines)));
    allocate_log(arguments.strata.count * kLine, 1);
    arguments.approx = true;
  }

 private:
  // Room for what lies in brackets. A selection without them has the same memory for keys alone.
  void log_brackets(bool updates) {
    constexpr int64_t kFewest = 1 << 16;  // below, the sample would be too large a part
    if (n_ >= kFewest) sample_lines(balanced_lines(0.5, n_));
    arguments.speculative = true;
    const int64_t words = updates ? 6 : 3;  // key, place; p, m, v
    const int64_t most = bytes_of_log(n_) / (4 * words);
    const int64_t capacity = std::min({n_ + unused_at_most(), most, int64_t{1} << 30});
    uint32_t* const end = allocate_log(capacity, words);
    arguments.log.places = reinterpret_cast<int64_t*>(end);
    if (updates) arguments.log.old = reinterpret_cast<float*>(end + 2 * arguments.log.capacity);
  }

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

  void sample_lines(double wanted) {
    arguments.strata = strata_of(arguments.risk.table.lines, static_cast<int64_t>(wanted));
  }

  const Context& context_;
  int64_t n_;
  Tensor state_, sample_, log_;
};

// The arguments of an update, and the memory they point to.
class Updating {
 public:
  UpdateArguments arguments = {};

  // `record`: that its own and its counts are written to.
  Updating(const UpdatePlan& plan, const Tensor& lr, const Ranking& wanted, const Rounding& rounding,
           int64_t* record, const Context& context);

 private:
  void set_lrs(const double* lrs, bool on_host, int64_t count, const Context& context);

  std::optional<DeviceTable> table_;
  std::optional<Tensor> lrs_;
  Tensor prepared_;
};

void Updating::set_lrs(const double* lrs, bool on_host, int64_t count, const Context& context) {
  if (!on_host) {
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

Updating::Updating(const UpdatePlan& plan, const Tensor& lr, const Ranking& wanted,
                   const Rounding& rounding, int64_t* record, const Context& context) {
  const size_t count = plan.segments.size();
  HostTable host(plan.segments, &plan.groups);
  for (size_t i = 0; i < count; ++i) {
    Segment& segment = host.segments[i];
    segment.step = plan.steps[i];
    segment.offset = plan.offsets[i];
    for (size_t k = 0; k < 2; ++k) {
      segment.mask_kinds[k] = plan.masks[i][k].kind;
      segment.masks[k] = plan.masks[i][k].data;
    }
  }
  table_.emplace(host, context);
  prepared_ = context.empty(static_cast<int64_t>(count * sizeof(Prepared)), ScalarType::Byte);

  arguments.table = table_->table;
  set_lrs(plan.lr, lr.is_cpu(), plan.groups.count(), context);
  arguments.prepared = write_to<Prepared>(prepared_);
  arguments.record = record;
  arguments.counts = reinterpret_cast<Count*>(record + kFields);
  arguments.weights = plan.weights;
  arguments.fractional = plan.fractional;
  arguments.rank_inactive = wanted.rank_inactive;
  arguments.stochastic = rounding.stochastic;
  arguments.seed = rounding.seed;
}

}  // namespace

Tensor Operators::rank_(Tensors masks, Tensors grads, Tensors exp_avgs, Tensor hyper, Tensor group,
                        MaybeTensor inv_scale, MaybeTensor clip, MaybeTensor record, Integers ranking) {
  const Ranking wanted(ranking, record, false);
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  HostTable host(layout, &groups, true);
  const bool captures = !masks.empty() || !wanted.finds();
  if (captures) {
    const auto bits = mask_bits(masks, layout, context.device());
    for (size_t i = 0; i < bits.size(); ++i) host.segments[i].bits = bits[i];
  }
  const DeviceTable table(host, context);
  const Risk risk = {table.table,
                     floats(inv_scale, 1, "inv_scale", context),
                     floats(clip, 2, "clip", context),
                     !exp_avgs.empty(),
                     wanted.rank_inactive,
                     0};
  Tensor result = context.empty(kFields, ScalarType::Long);
  auto* const own = write_to<int64_t>(result);
  if (!wanted.finds()) {
    check(capture({risk, read_record(*record, context.device()), own}, context.stream()));
    return result;
  }
  Selecting selecting(risk, layout.elements(), wanted, own, context);
  if (captures && wanted.mode != Mode::kExact) {
    selecting.log_on_the_way(wanted.mode, false);
    check(bracket_capture(selecting.arguments, context.stream()));
    return result;
  }
  wanted.mode == Mode::kApprox ? selecting.log_sample() : selecting.log_keys();
  check(select(selecting.arguments, context.stream()));
  if (captures) check(capture({risk, own, own}, context.stream()));
  return result;
}

Tensor Operators::step_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                        Tensors steps, Tensors first_masks, Tensors second_masks, MaybeTensor record,
                        Tensor lr, Tensor hyper, Tensor group, Tensor offsets, MaybeTensor inv_scale,
                        MaybeTensor clip, MaybeTensor found_inf, double gamma, Integers ranking,
                        Integers rounding) {
  const Ranking wanted(ranking, record, true);
  const Context context(device_of(params));
  const UpdatePlan plan({params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks},
                        {lr, hyper, group, offsets}, wanted, context.device(), kTile);
  Tensor result = context.empty(kFields + 2, ScalarType::Long);
  auto* const own = write_to<int64_t>(result);
  Updating updating(plan, lr, wanted, Rounding(rounding), own, context);
  UpdateArguments& update = updating.arguments;
  update.inv_scale = floats(inv_scale, 1, "inv_scale", context);
  update.clip = floats(clip, 2, "clip", context);
  update.found_inf = floats(found_inf, 1, "found_inf", context);
  update.gamma = gamma;
  if (!wanted.finds()) {
    update.known = record ? read_record(*record, context.device()) : nullptr;
    check(cuda::update(update, context.stream()));
    return result;
  }
  update.known = own;
  int64_t ranked = 0;
  for (const size_t i : plan.selective) ranked += plan.segments[i].n;
  const Risk risk = {update.table, update.inv_scale, update.clip, true, wanted.rank_inactive, 1};
  Selecting selecting(risk, ranked, wanted, own, context);
  if (wanted.mode == Mode::kExact) {
    selecting.log_keys();
    check(select(selecting.arguments, context.stream()));
    check(cuda::update(update, context.stream()));
  } else {
    selecting.log_on_the_way(wanted.mode, true);
    check(bracket_update({selecting.arguments, update}, context.stream()));
  }
  return result;
}

Tensor Operators::sums_of_squares(Tensors tensors, MaybeTensor inv_scale) {
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

Tensor Operators::clip_factors(Tensor sums, double max_norm) {
  const Context context(sums.device());
  const int64_t count = sums.numel();
  check_table(sums, ScalarType::Double, count, "sums", context.device());
  Tensor result = context.empty(3, ScalarType::Float);
  check(cuda::clip_factors(
      {read_from<double>(sums, "sums"), count, static_cast<float>(max_norm), write_to<float>(result)},
      context.stream()));
  return result;
}

Tensor Operators::select_tensors_(Tensor mask, Tensor sums, MaybeTensor exp_avg_sums, Tensor hyper,
                                  Tensor group, MaybeTensor clip, int64_t upper, int64_t lower,
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
  Tensor result = context.empty(kFields, ScalarType::Long);
  check(cuda::select_tensors(
      {read_from<double>(sums, "sums"),
       exp_avg_sums ? read_from<double>(*exp_avg_sums, "exp_avg_sums") : nullptr,
       write_to<float>(alphas), floats(clip, 2, "clip", context), count, upper, lower, rank_inactive,
       write_to<uint32_t>(keys), write_to<bool>(mask, "mask"), write_to<int64_t>(result)},
      context.stream()));
  return result;
}

}  // namespace cuda
}  // namespace rose
