// Digests of what the loops of csrc/cpu compute, for tests/test_arm.py: two builds, or two sets of
// instructions, that print the same lines compute the same bits. NaNs are digested as one: their signs
// and payloads differ between architectures.
#include <cstdio>
#include <string>

#include "data.h"

using namespace rose;
using namespace rose::cpu;

namespace {

// One line of the output: 64 bits of FNV-1a over words. Its name is what its data is drawn from.
class Group {
 public:
  explicit Group(const std::string& name) : name_(name) {
    for (const char c : name) word(static_cast<uint8_t>(c));
    state = hash_;
  }
  ~Group() { std::printf("%016llx %s\n", static_cast<unsigned long long>(hash_), name_.c_str()); }
  void word(uint32_t x) { hash_ = (hash_ ^ x) * 0x100000001B3u; }
  void count(int64_t x) {
    word(static_cast<uint32_t>(x));
    word(static_cast<uint32_t>(x >> 32));
  }
  void number(float x) { word(x != x ? 0x7FC00000u : float_bits(x)); }
  void operand(Operand& x) {
    for (int i = -Operand::kAround; i < x.n + Operand::kAround; ++i) number(x.value(i));
  }
  void words(const uint32_t* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) word(x[i]);
  }

 private:
  std::string name_;
  uint64_t hash_ = 0xCBF29CE484222325u;
};

struct Log {
  std::vector<uint32_t> keys, places;
  std::vector<float> old[4];
  Notes notes;

  explicit Log(bool all) : keys(kRun + 2 * kMostLanes), places(keys.size()) {
    notes.keys = keys.data();
    notes.places = all || coin() ? places.data() : nullptr;
    for (int k = 0; k < 4; ++k) {
      old[k].resize(all ? keys.size() : 0);
      notes.old[k] = old[k].data();
    }
    notes.logged = draw(kMostLanes);  // of the run before
  }
  void digest(Group& group) {
    for (int t = 0; t < 2; ++t) {
      group.count(notes.below[t]);
      group.count(notes.at_pivot[t]);
    }
    for (const int64_t x : {notes.inactive, notes.nonfinite, notes.logged}) group.count(x);
    group.words(keys.data(), notes.logged);
    if (notes.places) group.words(places.data(), notes.logged);
    for (const auto& column : old) {
      for (int64_t i = 0; !column.empty() && i < notes.logged; ++i) group.number(column[i]);
    }
  }
};

// run(data of n elements) some times for each length.
template <typename Fn>
void for_each_length(Group& group, const std::vector<Dtype>& dtypes, Fn run) {
  for (const int n : lengths()) {
    for (int repeat = 0; repeat < (n > 70 ? 3 : 6); ++repeat) {
      Data data(dtypes, n);
      run(data);
      for (Operand& operand : data.operands) group.operand(operand);
    }
  }
}

std::string named(std::string name, const std::vector<Dtype>& dtypes) {
  static const char* const names[] = {" f32", " bf16", " f16"};
  for (const Dtype dtype : dtypes) name += names[static_cast<int>(dtype)];
  return name;
}

void updates(const std::vector<Dtype>& dtypes) {
  for (const bool ranked : {false, true}) {
    for (const bool fractional : {false, true}) {
      Group group(
          named(std::string("masked") + (ranked ? " ranked" : "") + (fractional ? " fractional" : ""),
                dtypes));
      for_each_length(group, dtypes, [&](Data& data) {
        const SomeStep step(data.run.n, ranked, fractional);
        const Risk risk = some_risk(true);
        const Stage stage = some_stage(data.keys(1, risk));
        Log log(true);
        UpdateCounts counts;
        loops().masked(data.run, step, risk, stage, log.notes, counts);
        group.count(counts.updated);
        group.count(counts.nonfinite);
        log.digest(group);
      });
    }
  }
  for (const bool selective : {false, true}) {
    Group group(named(selective ? "decay" : "adamw", dtypes));
    for_each_length(group, dtypes, [&](Data& data) {
      const SomeStep step(data.run.n, false, false);
      (selective ? loops().decay : loops().adamw)(data.run, step);
    });
  }
}

void rankings(const std::vector<Dtype>& dtypes) {
  const bool second_order = dtypes.size() == 2;
  {
    Group group(named("rank", dtypes));
    for_each_length(group, dtypes, [&](Data& data) {
      const Risk risk = some_risk(second_order);
      const Stage stage = some_stage(data.keys(0, risk));
      std::vector<uint8_t> bits((data.run.n + 7) / 8 + 1, 0xA5);
      Log log(false);
      loops().rank(data.run, risk, stage, coin() ? bits.data() : nullptr, log.notes);
      log.digest(group);
      for (const uint8_t byte : bits) group.word(byte);
    });
  }
  {
    Group group(named("digits", dtypes));
    for_each_length(group, dtypes, [&](Data& data) {
      const Risk risk = some_risk(second_order);
      const uint32_t key = pick({pick_of(data.keys(0, risk)), 0u, kInfinityBits});
      for (int shift = 20; shift >= 0; shift -= 10) {
        const int bins = shift == 20 ? 2048 : 1024;
        std::vector<uint32_t> counts(bins);
        Notes notes;
        loops().digits(data.run, risk, shift == 20 ? 0 : key >> (shift + 10), shift, bins,
                       counts.data(), notes);
        group.words(counts.data(), bins);
        group.count(notes.inactive);
        group.count(notes.nonfinite);
      }
    });
  }
  Group group(named("sample", dtypes));
  for_each_length(group, dtypes, [&](Data& data) {
    const Risk risk = some_risk(second_order);
    const std::vector<uint32_t> keys = data.keys(0, risk);
    const int windows = coin() ? 2 : 1;
    Window window[2] = {};
    for (Window& w : window) {
      w.middle = pick_of(keys);
      w.low = std::min(w.middle, pick_of(keys));
      w.high = std::max(w.middle, pick_of(keys));
    }
    std::vector<SampledLine> lines;
    for (int i = 0; i < data.run.n; i += kLine) {
      const char* m = second_order ? data.operands[1].data(i) : nullptr;
      lines.push_back({data.operands[0].data(i), m, std::min(kLine, data.run.n - i)});
    }
    std::vector<LineCounts> counts(windows * lines.size());
    std::vector<uint32_t> inside[2];
    for (auto& own : inside) own.resize((kLine + kMostLanes) * lines.size());
    uint32_t* const to[] = {inside[0].data(), inside[1].data()};
    loops().sample(lines.data(), static_cast<int>(lines.size()), data.run, risk, window, windows,
                   counts.data(), to);
    int64_t found[2] = {};
    for (size_t i = 0; i < counts.size(); ++i) {
      const LineCounts& c = counts[i];
      for (const uint8_t x : {c.ranked, c.below, c.upto_middle, c.inside}) group.word(x);
      found[i % windows] += c.inside;
    }
    for (int t = 0; t < windows; ++t) group.words(inside[t].data(), found[t]);
  });
}

void logs() {
  Group between("logged_between"), wrongly("logged_wrongly");
  for (const int n : lengths()) {
    std::vector<uint32_t> keys, out(n + kMostLanes);
    const Kind kind = pick(kKinds);
    for (int i = 0; i < n; ++i) keys.push_back(float_of(kind));
    const uint32_t low = pick_of(keys) & 0x7FFFFFFFu, span = draw() >> draw(31);
    int found = loops().logged_between(keys.data(), n, low, span, out.data());
    between.count(found);
    between.words(out.data(), found);
    const uint32_t other = pick_of(keys) & 0x7FFFFFFFu;
    Bounds bounds = {static_cast<int32_t>(std::max(low, other)),
                     static_cast<int32_t>(std::min(low, other))};
    if (coin()) bounds.low = -1;
    if (draw(8) == 0) bounds.high = -1;
    found = loops().logged_wrongly(keys.data(), n, bounds, out.data());
    wrongly.count(found);
    wrongly.words(out.data(), found);
  }
}

void sums(Dtype dtype) {
  Group group(named("sum_of_squares", {dtype}));
  for_each_length(group, {dtype}, [&](Data& data) {
    const int n = std::min(data.run.n, kTile);
    const double sum = loops().sum_of_squares(data.run.data[0], dtype, n, data.run.factors[0]);
    int64_t bits = INT64_C(0x7FF8000000000000);
    if (sum == sum) __builtin_memcpy(&bits, &sum, sizeof bits);
    group.count(bits);
  });
}

}  // namespace

int main() {
  std::printf("%s\n", loops().name);
  const Dtype f = Dtype::kFloat32, b = Dtype::kBFloat16, h = Dtype::kFloat16;
  const std::vector<Dtype> updated[] = {{f, f, f, f}, {f, f, b, b}, {b, b, f, f}, {b, b, b, b},
                                        {h, h, h, h}, {f, h, b, f}, {h, b, f, h}, {b, h, h, b}};
  for (const auto& dtypes : updated) updates(dtypes);
  const std::vector<Dtype> ranked[] = {{f}, {b}, {h}, {f, f}, {b, b}, {h, h}, {f, b}, {h, f}, {b, h}};
  for (const auto& dtypes : ranked) rankings(dtypes);
  logs();
  for (const Dtype dtype : {f, b, h}) sums(dtype);
}
