#include "upload.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <list>
#include <map>
#include <mutex>

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
  STD_TORCH_CHECK(current_stream(device.index(), &stream_),
                  "this build of PyTorch gives no CUDA stream; install one with CUDA");
}

Context::~Context() = default;

Tensor Context::empty(int64_t numel, ScalarType dtype) const {
  return torch::stable::empty({numel}, dtype, std::nullopt, device_);
}

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
    to.vector = true;
    bool linear = true;
    for (size_t k = 0; k < from.operands.size(); ++k) {
      const Operand& operand = from.operands[k];
      to.data[k] = operand.data;
      to.dtype[k] = operand.dtype;
      const auto address = reinterpret_cast<uintptr_t>(operand.data);
      linear = linear && operand.linear;
      to.vector = to.vector && address % (kVector * operand.element_size()) == 0;
    }
    to.vector = to.vector && linear;
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
  std::vector<char> bytes;
  Tensor memory;
};

// Never destroyed: at exit, CUDA may be gone before it.
struct Uploads {
  std::mutex mutex;
  std::list<Upload> recent;  // the latest first
  std::map<std::pair<int32_t, Stream>, Tensor> zeros;
  std::list<Tensor> of_graphs;  // what graphs read when they are replayed
  Tensor ahead;                 // pinned memory for the tables of graphs to come
};

Uploads& uploads() {
  static Uploads* all = new Uploads;
  return *all;
}

bool captures_graph(const Context& context) {
  bool capturing = false;
  const char* error = is_capturing(context.stream(), capturing);
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error);
  return capturing;
}

Tensor pinned(int64_t size, const Context& context) {
  return torch::stable::empty({size}, ScalarType::Byte, std::nullopt, std::nullopt,
                              !context.device().is_cpu());
}

// Pinned memory must not be allocated during a capture (PyTorch's allocator asks for events then, too),
// and what a graph copies from it must be there for every replay. So steps outside of graphs keep room
// ahead for some tables, and each captured table takes its part of it for ever.
Tensor staging(Uploads& all, int64_t size, bool capturing, const Context& context) {
  constexpr int64_t kTables = 8;  // a step has fewer
  const int64_t room = all.ahead.defined() ? all.ahead.numel() : 0;
  if (!capturing) {
    if (room < kTables * size) all.ahead = pinned(2 * kTables * size, context);
    return pinned(size, context);
  }
  STD_TORCH_CHECK(size <= room, "a CUDA graph is being captured, and of the pinned memory for tables ",
                  room, " bytes are left of ", size,
                  " needed; expected the step to have run outside of ",
                  "a graph first: run it once, as it is captured, before each capture");
  all.of_graphs.push_back(torch::stable::narrow(all.ahead, 0, 0, size));
  all.ahead = torch::stable::narrow(all.ahead, 0, size, room - size);
  return all.of_graphs.back();
}

Tensor upload(std::vector<char> bytes, const Context& context) {
  constexpr size_t kKept = 32;
  const bool capturing = captures_graph(context);
  Uploads& all = uploads();
  std::lock_guard<std::mutex> lock(all.mutex);
  const int32_t device = context.device().index();
  for (auto it = all.recent.begin(); it != all.recent.end(); ++it) {
    // A graph has a stream of its own, and comes after the steps before it whatever theirs was.
    const bool ordered = capturing || it->stream == context.stream();
    if (ordered && it->device == device && it->bytes == bytes) {
      all.recent.splice(all.recent.begin(), all.recent, it);
      if (capturing) all.of_graphs.push_back(it->memory);
      return it->memory;
    }
  }
  const int64_t size = static_cast<int64_t>(bytes.size());
  Tensor host = staging(all, size, capturing, context);
  std::memcpy(host.mutable_data_ptr(), bytes.data(), bytes.size());
  Tensor memory = context.empty(size, ScalarType::Byte);
  torch::stable::copy_(memory, host, true);
  if (!capturing) {
    all.recent.push_front({device, context.stream(), std::move(bytes), memory});
    if (all.recent.size() > kKept) all.recent.pop_back();
  }
  return memory;
}

template <typename T>
size_t append(std::vector<char>& bytes, const std::vector<T>& values) {
  static_assert(sizeof(T) % 8 == 0, "the next part must be aligned");
  const size_t at = bytes.size();
  bytes.resize(at + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

}  // namespace

#ifdef ROSE_SIMT
std::vector<Tensor> kept_for_graphs() {
  return {uploads().of_graphs.begin(), uploads().of_graphs.end()};
}

void forget_uploads() {
  uploads().recent.clear();
  uploads().of_graphs.clear();
  uploads().ahead = Tensor();
}
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
  std::vector<char> bytes;
  const size_t segments = append(bytes, host.segments), groups = append(bytes, host.groups);
  const size_t dims = append(bytes, host.dims), lrs = append(bytes, host.lr);
  memory_ = upload(std::move(bytes), context);
  const char* base = static_cast<const char*>(memory_.const_data_ptr());
  table = {reinterpret_cast<const Segment*>(base + segments),
           reinterpret_cast<const Hyper*>(base + groups),
           reinterpret_cast<const Dim*>(base + dims),
           host.tiles,
           host.lines,
           static_cast<int32_t>(host.segments.size()),
           0};
  lr = reinterpret_cast<const double*>(base + lrs);
}

}  // namespace cuda
}  // namespace rose
