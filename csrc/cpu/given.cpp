#include <mutex>

#include "pass.h"

namespace rose {
namespace cpu {

Selection given_pass(const Segments& segments, const std::vector<size_t>& chosen, Selection selection,
                     Body& body, UpdateCounts& counts) {
  // Brackets of one key each, with nothing to log. Where nothing is selected, the key is any.
  Stage stage;
  stage.count = selection.low >= 0 ? 2 : 1;
  stage.bounds = selection.bounds();
  const int32_t keys[2] = {std::max(stage.bounds.high, 0), std::max(stage.bounds.low, 0)};
  for (int t = 0; t < 2; ++t) stage.brackets[t] = {keys[t], keys[t], keys[t]};
  std::vector<char> is_ranked(segments.size());
  for (const size_t i : chosen) is_ranked[i] = 1;
  const Chunks chunks(segments.tiles());
  body.begin();
  Notes total;
  int64_t elements = 0;
  std::mutex mutex;
  share_out(chunks.count, [&](auto next) {
    Notes notes;
    UpdateCounts own;
    int64_t own_elements = 0;
    for (int64_t chunk = next(); chunk >= 0; chunk = next()) {
      for_each_run(segments, chunks.begin(chunk), chunks.end(chunk),
                   [&](size_t index, int64_t start, int n) {
                     body.run(index, start, n, 0, stage, notes, own);
                     if (is_ranked[index]) own_elements += n;
                   });
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int t = 0; t < 2; ++t) {
      total.below[t] += notes.below[t];
      total.at_pivot[t] += notes.at_pivot[t];
    }
    total.inactive += notes.inactive;
    total.nonfinite += notes.nonfinite;
    elements += own_elements;
    counts.updated += own.updated;
    counts.nonfinite += own.nonfinite;
  });
  const auto upto = [&](int t) { return total.below[t] + total.at_pivot[t]; };
  selection.ranked = elements - total.inactive - total.nonfinite;
  selection.inactive = total.inactive;
  selection.nonfinite = total.nonfinite;
  selection.kept = selection.high < 0 ? 0 : upto(0) - (stage.count == 2 ? upto(1) : 0);
  selection.kept = std::max<int64_t>(0, selection.kept);
  return selection;
}

}  // namespace cpu
}  // namespace rose
