// Descriptor tables in device memory.
#pragma once

#include <memory>

#include "../arguments.h"
#include "launch.h"

namespace rose {
namespace cuda {

// The current device while it lives, and its current stream.
class Context {
 public:
  explicit Context(torch::stable::Device device);
  ~Context();
  Context(const Context&) = delete;

  torch::stable::Device device() const { return device_; }
  Stream stream() const { return stream_; }
  Tensor empty(int64_t numel, ScalarType dtype) const;

 private:
  struct Guard;
  torch::stable::Device device_;
  std::unique_ptr<Guard> guard_;
  Stream stream_ = nullptr;
};

// `words` zeros of int64, the same for every call on a stream: its users leave zeros behind.
Tensor zeros_of_stream(const Context& context, int64_t words);

// A table as it is made on the host.
struct HostTable {
  std::vector<Segment> segments;
  std::vector<Hyper> groups;
  std::vector<Dim> dims;
  int64_t tiles = 0, lines = 0;

  // Without groups, tensors are not selective and have no hyperparameters. `all_ranked`: tensors count
  // as selective whatever their group.
  explicit HostTable(const Segments& layout, const Groups* groups = nullptr, bool all_ranked = false);
};

// A copy in device memory, not to be written. What was uploaded lately is there already; the rest is
// copied from pinned memory without waiting. A CUDA graph has a copy of its own, which every replay
// makes again.
Tensor upload(std::vector<uint64_t> words, const Context& context);

// A table in device memory.
class DeviceTable {
 public:
  DeviceTable(const HostTable& host, const Context& context);

  Table table;

 private:
  Tensor memory_;
};

#ifdef ROSE_SIMT
size_t kept_uploads();
void forget_uploads();
#endif

}  // namespace cuda
}  // namespace rose
