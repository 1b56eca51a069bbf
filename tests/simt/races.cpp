// All kernels on two OS threads, for ThreadSanitizer: no Python and no PyTorch, so that whatever it
// reports is in a kernel. Prints a digest of the results, which must not depend on the order.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "cuda_runtime.h"

using namespace rose;
using namespace rose::cuda;

namespace {

constexpr int kSegments = 3;
constexpr int64_t kSizes[kSegments] = {9000, 77, 4096};
constexpr float clip[2] = {0.5f, 0.5f};

uint64_t digest = 0;

template <typename T>
void add_to_digest(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

void check(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

void run(bool sampled) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> data[4];
  std::vector<std::vector<uint8_t>> masks;
  std::vector<Segment> segments(kSegments);
  std::vector<float> steps(kSegments, 3.0f);
  const Hyper hyper = {0.9, 0.999, 1e-8, 0.1, 1.0, 1.0};
  // The second segment is read backwards in rows of 7: it goes the way of tensors that are not linear.
  const Dim dims[2] = {{11, 1.0 / 11, {7, 7, 7, 7}}, {7, 1.0 / 7, {1, 1, 1, 1}}};
  int64_t tiles = 0;
  for (int i = 0; i < kSegments; ++i) {
    Segment& segment = segments[i];
    segment = {};
    segment.n = kSizes[i];
    segment.first_tile = tiles;
    tiles += (kSizes[i] + kTile - 1) / kTile;
    segment.dims = i == 1 ? 2 : 0;
    segment.alpha = 0.1f;
    segment.sign = 1.0f;
    segment.selective = true;
    segment.vector = i != 1;
    segment.step = &steps[i];
    for (auto& operand : data) {
      operand.emplace_back(kSizes[i]);
      for (float& x : operand.back()) x = std::fabs(normal(random)) < 0.2f ? 0.0f : normal(random);
    }
    for (float& x : data[3].back()) x = x * x;
    masks.emplace_back((kSizes[i] + 7) / 8);
    segment.bits = masks.back().data();
  }
  const auto table_of = [&](std::vector<int> operands) {
    for (int i = 0; i < kSegments; ++i) {
      for (size_t k = 0; k < operands.size(); ++k) {
        segments[i].data[k] = reinterpret_cast<char*>(data[operands[k]][i].data());
      }
    }
    return Table{segments.data(), &hyper, dims, tiles, kSegments, 0};
  };
  static Sample sample;
  std::vector<SelectState> state(1);
  const int64_t capacity = sampled ? 512 : 1 << 15;
  std::vector<uint32_t> log(2 * capacity);
  std::vector<int64_t> record(8);
  const Risk risk = {table_of({1, 2}), nullptr, clip, true, false};
  check(select({risk, &sample, sampled ? 32 : 0, tiles * kTile / 32, state.data(), log.data(), capacity,
                0.04, record.data(), 600000000, 300000000, false},
               nullptr));
  check(capture({risk, record.data()}, nullptr));
  std::vector<double> partial(tiles);
  std::vector<double> sums(kSegments);
  check(sums_of_squares({risk.table, nullptr, partial.data(), sums.data()}, nullptr));
  std::vector<Prepared> prepared(kSegments);
  std::vector<Count> counts(2);
  const double lr = 1e-2;
  for (int i = 0; i < kSegments; ++i) {
    segments[i].mask_kinds[0] = MaskKind::kBits;
    segments[i].masks[0] = masks[i].data();
  }
  UpdateArguments a = {
      table_of({0, 1, 2, 3}), &lr, nullptr, clip, nullptr, record.data(), true, prepared.data(),
      counts.data(),          0.3, 1,       2,    true,    false,         true, 5};
  check(update(a, nullptr));
  add_to_digest(record);
  add_to_digest(sums);
  add_to_digest(counts);
  for (auto& operand : data) {
    for (auto& values : operand) add_to_digest(values);
  }
  for (auto& mask : masks) add_to_digest(mask);
}

}  // namespace

int main(int argc, char** argv) {
  simt::settings = {argc > 1 ? simt::Order::kRandom : simt::Order::kForward,
                    argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, 2, 3};
  run(false);
  run(true);
  std::printf("%016" PRIx64 "\n", digest);
}
