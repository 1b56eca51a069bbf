// All kernels on two OS threads, for ThreadSanitizer: no Python and no PyTorch, so that whatever it
// reports is in a kernel. Prints a digest of the results, which must not depend on the order of
// threads, and checks that they do not depend on how thresholds are found.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "cuda_runtime.h"

using namespace rose;
using namespace rose::cuda;

namespace {

constexpr int kSegments = 3;
constexpr int64_t kSizes[kSegments] = {9000, 77, 4096};
constexpr float kClip[2] = {0.5f, 0.5f};

// How thresholds are found: always the same ones, but for a miss.
enum class Way {
  kLogged,       // all keys are logged
  kSampled,      // those of a window
  kSpeculative,  // in the pass that updates or captures
  kNoRoom,       // that pass has no room for a bracket
  kOverflow,     // its log overflows, and it misses
  kApprox,       // those of a sample, which here is everything
};

// Which loops are taken.
enum class Loops {
  kGeneral,  // for any dtypes, and two thresholds
  kFloats,   // one threshold
  kNarrow,   // and bfloat16
};

class Digest {
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
  uint64_t value = 0;
};

void check(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

// Risks all over [0, 1] where a line is sampled, and elsewhere close to the upper threshold of those.
void mislead(const SelectArguments& s, std::vector<std::vector<float>> (&data)[4]) {
  float next[2] = {};
  const auto uniform = [&](bool is_sampled) {  // evenly, so that quantiles are what they should be
    float& x = next[is_sampled];
    x += x < 0.382f ? 0.618f : -0.382f;
    return x;
  };
  for (int i = 0; i < kSegments; ++i) {
    const Segment& segment = s.risk.table.segments[i];
    for (int64_t e = 0; e < segment.n; ++e) {
      const int64_t line = segment.first_line + e / kLine, stratum = line / s.strata.size;
      const bool is_sampled = line == drawn_line(s.draw, stratum, s.strata.size);
      const float m = data[2][i][e];
      if (m == 0) continue;
      const float risk = is_sampled ? uniform(true) : 0.5995f + 0.001f * uniform(false);
      data[1][i][e] = m * (1.0f - risk) / (kClip[0] * segment.alpha);
    }
  }
}

void to_bf16(std::vector<float>& values) {
  auto* narrow = reinterpret_cast<uint16_t*>(values.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = float_to_bf16(values[i]);
    std::memcpy(narrow + i, &bits, sizeof(bits));  // at or before what is read next
  }
}

uint64_t run(Way way, Loops loops) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> data[4];
  std::vector<std::vector<uint8_t>> masks;
  std::vector<Segment> segments(kSegments);
  std::vector<float> steps(kSegments, 3.0f);
  const Hyper hyper = {0.9, 0.999, 1e-8, 0.1, 1.0, 1.0};
  // The second segment is in rows of 7: it goes the way of tensors that are not linear.
  const Dim dims[2] = {{11, 1.0 / 11, {7, 7, 7, 7}}, {7, 1.0 / 7, {1, 1, 1, 1}}};
  int64_t n = 0, tiles = 0, lines = 0;
  for (int i = 0; i < kSegments; ++i) {
    Segment& segment = segments[i];
    segment = {};
    segment.n = kSizes[i];
    segment.first_tile = tiles;
    segment.first_line = lines;
    n += kSizes[i];
    tiles += (kSizes[i] + kTile - 1) / kTile;
    lines += (kSizes[i] + kLine - 1) / kLine;
    segment.dims = i == 1 ? 2 : 0;
    segment.alpha = 0.1f;
    segment.sign = 1.0f;
    segment.selective = true;
    const bool is_narrow = loops == Loops::kNarrow;
    segment.access = i == 1 ? Access::kSingle : is_narrow ? Access::kNarrow : Access::kFloats;
    for (Dtype& dtype : segment.dtype) dtype = is_narrow ? Dtype::kBFloat16 : Dtype::kFloat32;
    segment.step = &steps[i];
    for (auto& operand : data) {
      operand.emplace_back(kSizes[i]);
      for (float& x : operand.back()) x = std::fabs(normal(random)) < 0.2f ? 0.0f : normal(random);
    }
    for (float& x : data[3].back()) x = x * x;
    masks.emplace_back((kSizes[i] + 7) / 8);
    segment.bits = masks.back().data();
    for (int k = 0; k < 4; ++k) segment.data[k] = reinterpret_cast<char*>(data[k][i].data());
  }
  const Table table = {segments.data(), &hyper, dims, tiles, lines, kSegments, 0};
  const Risk risk = {table, nullptr, kClip, true, false, 1};
  static Sample sample;
  std::vector<SelectState> state(1);
  std::vector<int64_t> record(8), places;
  std::vector<float> old;
  SelectArguments s = {};
  s.risk = risk;
  s.sample = &sample;
  s.state = state.data();
  s.record = record.data();
  s.elements = n;
  s.upper = 600000000;
  s.lower = loops == Loops::kGeneral ? 300000000 : 0;
  s.width = 1.0;
  if (way != Way::kLogged) {
    const int64_t size = way == Way::kOverflow ? 3 : way == Way::kApprox ? 1 : 8;
    s.strata = {size, (lines + size - 1) / size};
  }
  const bool is_one_pass = way != Way::kLogged && way != Way::kSampled;
  const int64_t unused = 3 * kThreads;                       // of three blocks
  s.log.capacity = way == Way::kSampled    ? 512             // fewer than there are in a window
                   : way == Way::kOverflow ? 5600 + unused   // more than what two samples may not show
                   : way == Way::kNoRoom   ? n - 1 + unused  // it would have if all could be used
                   : way == Way::kApprox   ? lines * kLine
                                           : n + unused;
  std::vector<uint32_t> keys(s.log.capacity);
  s.log.keys = keys.data();
  s.approx = way == Way::kApprox;
  if (is_one_pass && !s.approx) {
    s.speculative = true;
    s.width = way == Way::kOverflow ? 0.005 : 0.2;
    places.resize(s.log.capacity);
    old.resize(3 * s.log.capacity);
    s.log.places = places.data();
    s.log.old = old.data();
  }
  if (way == Way::kOverflow) mislead(s, data);
  if (loops == Loops::kNarrow) {
    for (auto& operand : data) {
      for (auto& values : operand) to_bf16(values);
    }
  }
  const Course course = !is_one_pass || way == Way::kNoRoom ? Course::kExact : Course::kSpeculative;
  const auto check_course = [&] {
    const bool overflows = course == Course::kSpeculative && state[0].overflowed != 0;
    if (state[0].course != course || overflows != (way == Way::kOverflow)) {
      check("thresholds were not found in the way meant");
    }
  };

  if (s.approx) check(select(s, nullptr));
  if (is_one_pass) {
    check(bracket_capture(s, nullptr));
  } else {
    check(select(s, nullptr));
    check(capture({risk, record.data(), record.data()}, nullptr));
  }
  check_course();
  std::vector<double> partial(tiles);
  std::vector<double> sums(kSegments);
  check(sums_of_squares({table, nullptr, partial.data(), sums.data()}, nullptr));
  constexpr int kTensors = 300;
  std::vector<double> norms(kTensors);
  for (int i = 0; i < kTensors; ++i) norms[i] = i * 37 % 101;
  std::vector<float> factors(3), alphas(kTensors, 0.1f);
  check(clip_factors({norms.data(), kTensors, 1.0f, factors.data()}, nullptr));
  std::vector<uint32_t> keys_of_tensors(kTensors);
  std::vector<int64_t> record_of_tensors(8);
  bool chosen[kTensors];
  check(select_tensors({norms.data(), nullptr, alphas.data(), nullptr, kTensors, 600000000, 300000000,
                        false, keys_of_tensors.data(), chosen, record_of_tensors.data()},
                       nullptr));
  std::vector<Prepared> prepared(kSegments);
  std::vector<Count> counts(2);
  const double lr = 1e-2;
  for (int i = 0; i < kSegments; ++i) {
    segments[i].mask_kinds[0] = MaskKind::kBits;
    segments[i].masks[0] = masks[i].data();
  }
  UpdateArguments a = {};
  a.table = table;
  a.lrs = &lr;
  a.clip = kClip;
  a.known = a.record = record.data();
  a.prepared = prepared.data();
  a.counts = counts.data();
  a.gamma = 0.3;
  a.weights = kWeightsOfEnsemble;
  a.fractional = a.stochastic = true;
  a.seed = 5;
  if (is_one_pass) {
    if (way != Way::kOverflow) s.draw = 1;
    check(bracket_update({s, a}, nullptr));
    check_course();
  } else {
    check(update(a, nullptr));
  }
  Digest digest;
  digest.add(record);
  digest.add(sums);
  digest.add(factors);
  digest.add(record_of_tensors);
  digest.add(counts);
  for (auto& operand : data) {
    for (auto& values : operand) digest.add(values);
  }
  for (auto& mask : masks) digest.add(mask);
  return digest.value;
}

}  // namespace

int main(int argc, char** argv) {
  simt::settings = {argc > 1 ? simt::Order::kRandom : simt::Order::kForward,
                    argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, 2, 3};
  for (const Loops loops : {Loops::kGeneral, Loops::kFloats, Loops::kNarrow}) {
    const uint64_t digest = run(Way::kLogged, loops);
    for (const Way way : {Way::kSpeculative, Way::kSampled, Way::kNoRoom, Way::kApprox}) {
      if (run(way, loops) != digest) check("results depend on how thresholds are found");
      if (loops != Loops::kGeneral) break;  // what is left has no loop of its own
    }
    if (loops == Loops::kGeneral) run(Way::kOverflow, loops);
    std::printf("%016" PRIx64 "\n", digest);
  }
}
