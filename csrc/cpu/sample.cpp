#include "sample.h"

#include <algorithm>

namespace rose {
namespace cpu {

int64_t lines_of_bracket(int64_t elements, bool counts_only) {
  const auto all = static_cast<double>(elements);
  const double lines = counts_only
                           ? std::max(balanced_lines(0.1, elements), std::min(4096.0, all / 256))
                           : std::max(balanced_lines(0.4, elements), std::min(8192.0, all / 128));
  return static_cast<int64_t>(lines);
}

Lines::Lines(const RiskSource& source, int64_t stratum, uint32_t draw) : source_(source) {
  const Segments& segments = source.segments;
  sources_.reserve(segments.size() + 1);
  int64_t lines = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    Source to = {lines, {}, {}, segments[i].linear(), 0};
    bool alike = i > 0 && source.alpha[i] == source.alpha[i - 1];
    for (size_t k = 0; k < segments[i].operands.size(); ++k) {
      const Operand& operand = segments[i].operands[k];
      to.data[k] = operand.data;
      to.items[k] = operand.element_size();
      alike = alike && operand.dtype == segments[i - 1].operands[k].dtype;
    }
    to.kind = i == 0 ? 0 : sources_[i - 1].kind + !alike;
    sources_.push_back(to);
    lines += (segments[i].n + kLine - 1) / kLine;
  }
  sources_.push_back({lines, {}, {}, true, 0});
  key_ = random_key(draw, kSampleKey);
  strata_ = {stratum, (lines + stratum - 1) / stratum};
}

int64_t Lines::count(const Segments& segments) {
  int64_t lines = 0;
  for (size_t i = 0; i < segments.size(); ++i) lines += (segments[i].n + kLine - 1) / kLine;
  return lines;
}

Lines::Place Lines::place(int64_t line, size_t index) const {
  const int64_t at = drawn_line(key_, line, strata_.size);
  if (at >= sources_.back().first_line) {
    const size_t last = sources_.size() - 2;
    return {last, std::max<int64_t>(0, source_.segments[last].n - 1), 0};
  }
  if (at >= sources_[index + 1].first_line) {
    const auto after =
        std::upper_bound(sources_.begin() + static_cast<int64_t>(index), sources_.end(), at,
                         [](int64_t line, const Source& s) { return line < s.first_line; });
    index = static_cast<size_t>(after - sources_.begin()) - 1;
  }
  const int64_t start = (at - sources_[index].first_line) * kLine;
  return {index, start, static_cast<int>(std::min<int64_t>(kLine, source_.segments[index].n - start))};
}

int64_t Lines::plan(Batch& batch, int64_t line, int64_t last, int64_t step, size_t& index) const {
  for (batch.size = 0; batch.size < kBatch && line < last; line += step) {
    const Place at = place(line, index);
    const Source& source = sources_[at.index];
    index = at.index;
    if (batch.size > 0 && source.kind != sources_[batch.places[0].index].kind) break;
    SampledLine& to = batch.lines[batch.size];
    to = {source.data[0] + at.start * source.items[0], source.data[1] + at.start * source.items[1],
          at.n};
    if (!source.linear && at.n > 0) {
      Buffers buffers;
      const Run run = open_run(source_.segments[index], at.start, at.n, buffers);
      char (*const own)[kLine * sizeof(float)] = batch.buffers[batch.size];
      for (int k = 0; k < (source_.second_order ? 2 : 1); ++k) {
        std::copy(run.data[k], run.data[k] + at.n * run.item(k), own[k]);
      }
      to = {own[0], own[1], at.n};
    } else {
      __builtin_prefetch(to.g);
      __builtin_prefetch(to.m);
    }
    batch.places[batch.size++] = at;
  }
  return line;
}

void Lines::count(const Batch& batch, const std::vector<Window>& windows, LineCounts* counts,
                  uint32_t* const* room) const {
  const size_t index = batch.places[0].index;
  const Segment& segment = source_.segments[index];
  Run like = {};
  for (size_t k = 0; k < segment.operands.size(); ++k) like.dtypes[k] = segment.operands[k].dtype;
  like.factors[0] = source_.factors[0];
  like.factors[1] = source_.factors[1];
  loops().sample(batch.lines, batch.size, like, source_.risk(index), windows.data(),
                 static_cast<int>(windows.size()), counts, room);
}

std::vector<uint32_t> Lines::some_keys(int64_t wanted) const {
  const int64_t step = std::max<int64_t>(1, size() / wanted);
  std::vector<uint32_t> keys(
      static_cast<size_t>((size() / step + 1) * kLine + kBatch * kLine + kMostLanes));
  size_t found = 0;
  const std::vector<Window> everything = {{0, kInfinityBits, kInfinityBits}};
  for_each_batch(0, size(), step, [&](int64_t, const Batch& batch) {
    LineCounts counts[kBatch];
    uint32_t* const room[1] = {keys.data() + found};
    count(batch, everything, counts, room);
    for (int i = 0; i < batch.size; ++i) found += counts[i].inside;
  });
  keys.resize(found);
  return keys;
}

void add(PhaseSample& to, const PhaseSample& from) {
  to.ranked += from.ranked;
  to.below += from.below;
  to.cc += from.cc;
  to.cr += from.cr;
  to.rr += from.rr;
  to.keys.insert(to.keys.end(), from.keys.begin(), from.keys.end());
}

void add(Profile& to, const Profile& from) {
  for (int k = 0; k < Profile::kCells; ++k) {
    to.cc[k] += from.cc[k];
    to.cr[k] += from.cr[k];
  }
  for (int b = 0; b < kBins; ++b) to.bins[b] += from.bins[b];
  to.under_middle += from.under_middle;
  to.at_middle += from.at_middle;
}

}  // namespace cpu
}  // namespace rose
