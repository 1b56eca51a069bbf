#include "upload.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <numeric>

#include "../check.h"

#ifdef ROSE_SIMT
#include "cuda_runtime.h"
#else
// In PyTorch's CUDA builds only. Weak, so that one library loads with any build of PyTorch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);
#endif

namespace rose {
namespace cuda {

#ifdef ROSE_SIMT  // the host build in tests: the device is the CPU
struct Context::Guard {
  explicit Guard(int32_t) { ++simt::guards; }
  ~Guard() { --simt::guards; }
};

namespace {
bool current_stream(int32_t, Stream*) { return !simt::settings.no_stream; }
}  // namespace
#else
struct Context::Guard {
  explicit Guard(int32_t device) : guard(device) {}
  torch::stable::accelerator::DeviceGuard guard;
};

namespace {
bool current_stream(int32_t device, Stream* stream) {
  return aoti_torch_get_current_cuda_stream != nullptr &&
         aoti_torch_get_current_cuda_stream(device, stream) == 0;
}
}  // namespace
#endif

Context::Context(torch::stable::Device device)
    : device_(device), guard_(std::make_unique<Guard>(device.index())) {
  ROSE_CHECK(current_stream(device.index(), &stream_),
             "this build of PyTorch gives no CUDA stream; install one with CUDA");
}

Context::~Context() = default;

Tensor Context::empty(int64_t numel, ScalarType dtype) const {
  Tensor memory = torch::stable::empty({numel}, dtype, std::nullopt, device_);
#ifdef ROSE_SIMT
  simt::own_in_graph(memory);
#endif
  return memory;
}

namespace {

// Of linear operands: parameter and gradient, then moments; or gradient and moment; or one.
Access access_of(const std::vector<Operand>& operands) {
  const size_t values = (operands.size() + 1) / 2;
  const auto are = [&](size_t from, size_t upto, Dtype dtype) {
    bool all = true;
    for (size_t k = from; k < upto; ++k) all = all && operands[k].dtype == dtype;
    return all;
  };
  const auto are_aligned = [&](int64_t elements) {
    bool all = true;
    for (const Operand& operand : operands) {
      const auto address = reinterpret_cast<uintptr_t>(operand.data);
      all = all && address % (elements * operand.element_size()) == 0;
    }
    return all;
  };
  const bool wide = are(0, values, Dtype::kFloat32), narrow = are(0, values, Dtype::kBFloat16);
  const bool wide_moments = are(values, operands.size(), Dtype::kFloat32);
  const bool narrow_moments = are(values, operands.size(), Dtype::kBFloat16);
  if (narrow && narrow_moments && are_aligned(8)) return Access::kNarrow;
  if (!are_aligned(4)) return Access::kSingle;
  if (wide && wide_moments) return Access::kFloats;
  if (wide && narrow_moments) return Access::kNarrowMoments;
  if (narrow && wide_moments) return operands.size() > 1 ? Access::kWideMoments : Access::kMixed;
  return Access::kMixed;
}

}  // namespace

HostTable::HostTable(const Segments& layout, const Groups* table, bool all_ranked)
    : tiles(layout.tiles()) {
  for (int64_t row = 0; table != nullptr && row < table->count(); ++row) {
    groups.push_back(table->of_row(row));
  }
  segments.resize(layout.size());
  for (size_t i = 0; i < layout.size(); ++i) {
    const rose::Segment& from = layout[i];
    // Tables are compared as bytes, padding and all.
    std::memset(static_cast<void*>(&segments[i]), 0, sizeof(Segment));
    Segment& to = segments[i];
    to.n = from.n;
    to.first_tile = from.first_tile;
    if (table != nullptr) {
      to.group = static_cast<int32_t>(table->row(i));
      to.alpha = table->alpha(i);
      to.sign = static_cast<float>((*table)[i].sign);
      to.selective = all_ranked || (*table)[i].selective != 0;
    }
    to.first_line = lines;
    if (to.selective) lines += (to.n + kLine - 1) / kLine;
    bool linear = true;
    for (size_t k = 0; k < from.operands.size(); ++k) {
      to.data[k] = from.operands[k].data;
      to.dtype[k] = from.operands[k].dtype;
      linear = linear && from.operands[k].linear;
    }
    to.access = linear ? access_of(from.operands) : Access::kSingle;
    if (linear) continue;
    to.first_dim = static_cast<int64_t>(dims.size());
    to.dims = static_cast<int32_t>(from.sizes.size());
    for (size_t d = 0; d < from.sizes.size(); ++d) {
      Dim dim = {from.sizes[d], 1.0 / static_cast<double>(from.sizes[d]), {}};
      for (size_t k = 0; k < from.operands.size(); ++k) dim.strides[k] = from.operands[k].strides[d];
      dims.push_back(dim);
    }
  }
}

namespace {

struct Upload {
  int32_t device;
  Stream stream;
  uint64_t sum;  // of its words: tables that differ are told apart by it, but for a few
  std::vector<uint64_t> words;
  Tensor memory;
};

// Never destroyed: at exit, CUDA may be gone before it.
struct Uploads {
  std::mutex mutex;
  std::list<Upload> recent;  // the latest first
  std::map<std::pair<int32_t, Stream>, Tensor> zeros;
};

Uploads& uploads() {
  static Uploads* all = new Uploads;
  return *all;
}

void check(const char* error) { ROSE_CHECK(error == nullptr, "CUDA: ", error); }

bool captures_graph(const Context& context) {
  bool capturing = false;
  check(is_capturing(context.stream(), capturing));
  return capturing;
}

template <typename T>
size_t append(std::vector<uint64_t>& words, const std::vector<T>& values) {
  static_assert(sizeof(T) % sizeof(uint64_t) == 0, "the next part must be aligned");
  const size_t at = words.size();
  words.resize(at + values.size() * (sizeof(T) / sizeof(uint64_t)));
  if (!values.empty()) std::memcpy(words.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

}  // namespace

Tensor upload(std::vector<uint64_t> words, const Context& context) {
  constexpr size_t kKept = 32;
  const int64_t size = static_cast<int64_t>(words.size());
  if (captures_graph(context)) {
    // The graph owns what is allocated during its capture, and the arguments of its launches. It must
    // not read anything else: nobody could tell when it is gone.
    Tensor memory = context.empty(size, ScalarType::Long);
    check(write_words(write_to<uint64_t>(memory), words.data(), size, context.stream()));
    return memory;
  }
  Uploads& all = uploads();
  std::lock_guard<std::mutex> lock(all.mutex);
  const int32_t device = context.device().index();
  const uint64_t sum = std::accumulate(words.begin(), words.end(), uint64_t{0});
  for (auto it = all.recent.begin(); it != all.recent.end(); ++it) {
    if (it->sum == sum && it->stream == context.stream() && it->device == device &&
        it->words == words) {
      all.recent.splice(all.recent.begin(), all.recent, it);
      return it->memory;
    }
  }
  Tensor host = torch::stable::empty({size}, ScalarType::Long, std::nullopt, std::nullopt,
                                     !context.device().is_cpu());
  std::copy(words.begin(), words.end(), write_to<uint64_t>(host));
  Tensor memory = context.empty(size, ScalarType::Long);
  torch::stable::copy_(memory, host, true);
  all.recent.push_front({device, context.stream(), sum, std::move(words), memory});
  if (all.recent.size() > kKept) all.recent.pop_back();
#ifdef ROSE_SIMT
  simt::count_upload();
#endif
  return memory;
}

#ifdef ROSE_SIMT
size_t kept_uploads() { return uploads().recent.size(); }
void forget_uploads() { uploads().recent.clear(); }
#endif

Tensor zeros_of_stream(const Context& context, int64_t words) {
  const auto make = [&] {
    Tensor zeros = context.empty(words, ScalarType::Long);
    return torch::stable::zero_(zeros);
  };
  if (captures_graph(context)) return make();  // in the graph's own memory, cleared by every replay
  std::lock_guard<std::mutex> lock(uploads().mutex);
  Tensor& zeros = uploads().zeros[{context.device().index(), context.stream()}];
  if (!zeros.defined()) zeros = make();
  return zeros;
}

DeviceTable::DeviceTable(const HostTable& host, const Context& context) {
  std::vector<uint64_t> words;
  const size_t segments = append(words, host.segments), groups = append(words, host.groups);
  const size_t dims = append(words, host.dims);
  memory_ = upload(std::move(words), context);
  const uint64_t* base = write_to<uint64_t>(memory_);
  table = {reinterpret_cast<const Segment*>(base + segments),
           reinterpret_cast<const Hyper*>(base + groups),
           reinterpret_cast<const Dim*>(base + dims),
           host.tiles,
           host.lines,
           static_cast<int32_t>(host.segments.size()),
           0};
}

}  // namespace cuda
}  // namespace rose
