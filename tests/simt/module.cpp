// The CUDA operators over the simulated device, as torch.ops.rose_simt, and what tests set and read.
#include <pybind11/pybind11.h>

#include "cuda/ops_cuda.h"
#include "cuda/upload.h"
#include "cuda_runtime.h"

STABLE_TORCH_LIBRARY(rose_simt, m) { rose::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(rose_simt, CompositeExplicitAutograd, m) { rose::implement_hooks(m); }

STABLE_TORCH_LIBRARY_IMPL(rose_simt, CPU, m) { rose::implement_operators<rose::cuda::Operators>(m); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "configure",
      [](const std::string& order, uint64_t seed, int os_threads, int resident, bool no_stream) {
        using simt::Order;
        simt::settings = {order == "forward"   ? Order::kForward
                          : order == "reverse" ? Order::kReverse
                                               : Order::kRandom,
                          seed, os_threads, resident, no_stream};
      },
      "Order of threads and blocks (forward, reverse, random), OS threads, blocks of a grid, and "
      "whether there is no stream.",
      pybind11::arg("order") = "forward", pybind11::arg("seed") = 0, pybind11::arg("os_threads") = 1,
      pybind11::arg("resident") = 3, pybind11::arg("no_stream") = false);
  pybind11::class_<simt::Graph>(m, "Graph", "Of launches that were captured, not executed.")
      .def(pybind11::init<>())
      .def("__enter__", [](simt::Graph& graph) { simt::capturing = &graph; })
      .def("__exit__", [](simt::Graph&, const pybind11::args&) { simt::capturing = nullptr; })
      .def("__len__", [](const simt::Graph& graph) { return graph.launches.size(); })
      .def("replay", [](const simt::Graph& graph) {
        for (const auto& launch : graph.launches) launch();
      });
  m.def("guards", [] { return simt::guards; }, "Guards of the current device that are alive.");
  m.def("forget_uploads", &rose::cuda::forget_uploads, "As if no table had ever been uploaded.");
  m.def("kept_uploads", &rose::cuda::kept_uploads, "Number of tables that are kept.");
  m.def(
      "take_counters",
      [] {
        const simt::Counters counters = simt::take_counters();
        pybind11::dict result;
        result["launches"] = counters.launches;
        result["bytes_read"] = counters.bytes_read;
        result["bytes_written"] = counters.bytes_written;
        result["uploads"] = counters.uploads;
        return result;
      },
      "Launches, bytes of tensors, masks and logs, and uploads since the last call.");
}
