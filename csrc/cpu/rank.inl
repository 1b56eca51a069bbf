// Keys, their place among thresholds, and the loops that only rank.

// Keys of lanes whose gradients are g, as first_order_key() and second_order_key() of element.h.
ROSE_INLINE Words first_order_keys(Lanes g, const Risk& risk) {
  const Words a = absolute(as_words(g));
  const Words inactive = risk.rank_inactive ? a : words<kInactiveKey>();
  const Words key = choose(equal(a, words<0>()), inactive, a);
  return choose(at_most(a, words<kInfinityBits - 1>()), key, words<kNonfiniteKey>());
}

ROSE_INLINE Words second_order_keys(Lanes g, Lanes m, const Risk& risk) {
  const Words ag = absolute(as_words(g)), am = absolute(as_words(m)), zero = words<0>();
  const Lanes ratio = div(mul(risk.alpha, as_lanes(ag)), as_lanes(am));
  const Words ranked = absolute(as_words(sub(ratio, all_lanes(1.0f))));
  const Words literal = choose(equal(ag, zero), words<0x3F800000u>(), words<kInfinityBits>());
  const Words key =
      choose(equal(am, zero), risk.rank_inactive ? literal : words<kInactiveKey>(), ranked);
  const Words largest = words<kInfinityBits - 1>();
  return choose(both(at_most(ag, largest), at_most(am, largest)), key, words<kNonfiniteKey>());
}

ROSE_INLINE unsigned reads(const Risk& risk) { return risk.second_order ? kFirst | kSecond : kFirst; }

template <typename G, typename M>
ROSE_INLINE Words keys_of(G g_type, M m_type, const At& at, const Run& run, const Risk& risk) {
  const Lanes g = load_gradient(g_type, at, 0, run, true);
  return risk.second_order ? second_order_keys(g, load(m_type, at, 1), risk)
                           : first_order_keys(g, risk);
}

// Which side of a bracket a risk is on, without a key. In second order, with a = alpha |g| and b = |m|,
// a risk of at most x is |a - b| <= x b but for roundings: u = 2^-24 of each operation, and of the
// quotient where that is near 1. Widened by more than these (8 u x + 2 u), the comparison is sure of
// its answer. Moments so small that products would lose digits, and what is not finite, are never sure.
struct Fence {
  float below, above;
};

ROSE_INLINE Fence fence_of(Bracket bracket, const Risk& risk) {
  const float low = bits_float((uint32_t)bracket.low), high = bits_float((uint32_t)bracket.high);
  if (!risk.second_order) return {low, high};
  const double u = 0x1p-24;
  const double x = (double)low * (1 - 8 * u) - 2 * u, y = (double)high * (1 + 8 * u) + 2 * u;
  return {x > 0x1p-20 ? (float)x : -1.0f, (float)(y * (1 + u))};
}

struct Compared {
  Condition below, above;  // surely
};

struct SecondOrder {
  Lanes g, m;
  Lanes a, b, s;
  Condition fit;

  ROSE_MEMBER SecondOrder(Lanes g, Lanes m, const Risk& risk)
      : g(g), m(m), a(mul(risk.alpha, magnitude(g))), b(magnitude(m)), s(magnitude(sub(a, b))) {
    fit = less(at_most(all_lanes(kSmall), b), s, all_lanes(kLarge));
  }
  ROSE_MEMBER Compared compare(const Fence& fence) const {
    return {at_most(fit, s, mul(b, fence.below)), less(fit, mul(b, fence.above), s)};
  }
  // Lanes whose keys are those of plain_keys(), and the keys of all.
  ROSE_MEMBER Condition plain() const { return fit; }
  ROSE_MEMBER Words plain_keys() const { return absolute(as_words(sub(div(a, b), all_lanes(1.0f)))); }
  ROSE_MEMBER Words keys(const Risk& risk) const { return second_order_keys(g, m, risk); }
  ROSE_MEMBER Condition inactive() const {
    return both(at_most(b, all_lanes(0.0f)), less(s, all_lanes(bits_float(kInfinityBits))));
  }
  // Above although the moment, which is not 0, is small: it would be if that were larger.
  ROSE_MEMBER Condition above_if_small(const Fence& fence) const {
    const Lanes small = all_lanes(kSmall);
    return both(both(less(mul(small, fence.above), s), less(s, all_lanes(kLarge))),
                both(less(all_lanes(0.0f), b), less(b, small)));
  }

 private:
  static constexpr float kSmall = 0x1p-100f, kLarge = 0x1p127f;
};

struct FirstOrder {  // zeros are inactive, unless they are ranked
  Lanes g, a;
  Condition fit;

  ROSE_MEMBER FirstOrder(Lanes g, const Risk& risk) : g(g), a(magnitude(g)) {
    fit = less(less(all_lanes(risk.rank_inactive ? -1.0f : 0.0f), a), a,
               all_lanes(bits_float(kInfinityBits)));
  }
  ROSE_MEMBER Compared compare(const Fence& fence) const {
    return {less(fit, a, all_lanes(fence.below)), less(fit, all_lanes(fence.above), a)};
  }
  ROSE_MEMBER Condition plain() const { return fit; }
  ROSE_MEMBER Words plain_keys() const { return as_words(a); }
  ROSE_MEMBER Words keys(const Risk& risk) const { return first_order_keys(g, risk); }
  ROSE_MEMBER Condition inactive() const { return at_most(a, all_lanes(0.0f)); }
  ROSE_MEMBER Condition above_if_small(const Fence&) const { return condition(0); }
};

// What a ranking says of a vector: which lanes are selected, and which are not finite.
struct Answers {
  Condition selected, bad;
};

// What a ranking needs on its way through a run.
struct RankedRun {
  const Risk& risk;
  const Stage& stage;
  Notes& notes;
  Fence fences[2];
  bool two;
  int below[2] = {}, inactive = 0, selected = 0;  // counted where it is frequent

  ROSE_MEMBER RankedRun(const Risk& risk, const Stage& stage, Notes& notes)
      : risk(risk),
        stage(stage),
        notes(notes),
        fences{fence_of(stage.brackets[0], risk), fence_of(stage.brackets[1], risk)},
        two(stage.count == 2) {}

  ROSE_MEMBER void finish() {
    if (!two) selected += below[0];
    notes.below[0] += below[0];
    notes.below[1] += below[1];
    notes.inactive += inactive;
  }

  // Of a vector's first lanes. log(inside, marked keys) is called where some are inside of a bracket.
  template <typename Order, typename Log>
  ROSE_MEMBER Answers answer(const Order& order, int lanes, Log log) {
    const Condition valid = first_lanes(lanes);
    const Compared upper = order.compare(fences[0]);
    if (__builtin_expect(two, 0)) return answer_two(order, upper, valid, log);
    Answers answers = {both(upper.below, valid), condition(0)};
    below[0] += count(answers.selected);
    if (__builtin_expect(!cover(upper.below, upper.above, lanes), 0)) {
      settle(order, except(valid, either(upper.below, upper.above)), log, answers);
    }
    return answers;
  }

 private:
  template <typename Order, typename Log>
  ROSE_MEMBER Answers answer_two(const Order& order, const Compared& upper, Condition valid, Log log) {
    const Compared lower = order.compare(fences[1]);
    const Condition sure =
        both(both(either(upper.below, upper.above), valid), either(lower.below, lower.above));
    const Condition under = both(upper.below, sure);
    Answers answers = {both(under, lower.above), condition(0)};
    below[0] += count(under);
    below[1] += count(both(lower.below, sure));
    selected += count(answers.selected);
    const Condition open = except(valid, sure);
    if (any(open)) settle(order, open, log, answers);
    return answers;
  }

  // Lanes that comparisons with brackets leave open: where there is one there are often many, rows of
  // zeros or moments on their way to zero, which need no key either.
  template <typename Order, typename Log>
  ROSE_MEMBER void settle(const Order& order, Condition open, Log log, Answers& answers) {
    Words key;
    if (!any(except(open, order.plain()))) {
      key = order.plain_keys();
    } else {
      if (!risk.rank_inactive) {
        const Condition zeros = both(open, order.inactive());
        inactive += count(zeros);
        selected += count(zeros);
        answers.selected = either(answers.selected, zeros);
        open = except(open, either(zeros, order.above_if_small(fences[0])));
        if (!any(open)) return;
      }
      key = order.keys(risk);
      answers.bad = both(open, equal(key, words<kNonfiniteKey>()));
      notes.nonfinite += count(answers.bad);
      open = except(open, answers.bad);
    }
    const auto upto = [&](int32_t bound) ROSE_ALWAYS_INLINE {  // of ranked keys
      return at_most_signed(key, all_words((uint32_t)bound));
    };
    Condition is_selected = both(open, upto(stage.bounds.high));
    if (two) is_selected = except(is_selected, upto(stage.bounds.low));
    answers.selected = either(answers.selected, is_selected);
    selected += count(is_selected);
    Condition inside = condition(0);
    for (int t = 0; t < stage.count; ++t) {
      const Bracket bracket = stage.brackets[t];
      const uint32_t low = (uint32_t)bracket.low;
      const Condition pivot = both(open, equal(key, all_words((uint32_t)bracket.pivot)));
      notes.below[t] += count(except(open, at_most(all_words(low), key)));
      notes.at_pivot[t] += count(pivot);
      const Condition ranged = both(open, in_range(key, low, (uint32_t)bracket.high - low));
      inside = either(inside, except(ranged, pivot));
    }
    if (any(inside)) log(inside, choose(is_selected, key | words<kInactiveKey>(), key));
  }
};

// fn(dtype of g, dtype of m), known as this is compiled for the frequent ones.
template <typename Fn>
ROSE_INLINE void with_types(const Run& run, const Risk& risk, Fn fn) {
  const Dtype g = run.dtypes[0], m = risk.second_order ? run.dtypes[1] : g;
  if (g == Dtype::kFloat32 && m == Dtype::kFloat32) return fn(Float32(), Float32());
  if (g == Dtype::kBFloat16 && m == Dtype::kBFloat16) return fn(BFloat16(), BFloat16());
  fn(g, m);
}

template <bool kSecondOrder, typename G, typename M>
ROSE_INLINE void rank_as(G g_type, M m_type, const Run& run, const Risk& risk, const Stage& stage,
                         uint8_t* bits, Notes& out) {
  Notes notes = out;
  RankedRun ranking(risk, stage, notes);
  const bool scaled = scales(run);
  for_each_vector(run, reads(risk), 0, [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
    const auto log = [&](Condition inside, Words marked) ROSE_ALWAYS_INLINE {
      append(notes.keys + notes.logged, inside, marked);
      if (notes.places) {
        append(notes.places + notes.logged, inside, words_from(run.place + (uint32_t)at.i));
      }
      notes.logged += count(inside);
    };
    const Lanes g = load_gradient(g_type, at, 0, run, scaled);
    const Answers answers = kSecondOrder
                                ? ranking.answer(SecondOrder(g, load(m_type, at, 1), risk), lanes, log)
                                : ranking.answer(FirstOrder(g, risk), lanes, log);
    if (bits) store_bits(bits, at.i, lanes, bits_of(answers.selected));
  });
  ranking.finish();
  out = notes;
}

void rank(const Run& run, const Risk& risk, const Stage& stage, uint8_t* bits, Notes& notes) {
  with_types(run, risk, [&](auto g_type, auto m_type) ROSE_ALWAYS_INLINE {
    if (risk.second_order) {
      rank_as<true>(g_type, m_type, run, risk, stage, bits, notes);
    } else {
      rank_as<false>(g_type, m_type, run, risk, stage, bits, notes);
    }
  });
}

void digits(const Run& run, const Risk& risk, uint32_t prefix, int shift, int bins, uint32_t* counts,
            Notes& notes) {
  with_types(run, risk, [&](auto g_type, auto m_type) ROSE_ALWAYS_INLINE {
    for_each_vector(run, reads(risk), 0, [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
      const Condition valid = first_lanes(lanes);
      const Words key = keys_of(g_type, m_type, at, run, risk);
      notes.inactive += count(both(valid, equal(key, words<kInactiveKey>())));
      notes.nonfinite += count(both(valid, equal(key, words<kNonfiniteKey>())));
      uint32_t keys[kLanes];
      store_words(keys, key);
      for (int i = 0; i < lanes; ++i) {
        const uint32_t digit = (keys[i] >> shift) - prefix * (uint32_t)bins;
        if (digit < (uint32_t)bins && keys[i] < kInactiveKey) ++counts[digit];
      }
    });
  });
}

void sample(const SampledLine* lines, int n, const Run& like, const Risk& risk, const Window* windows,
            int window_count, LineCounts* counts, uint32_t* const* inside) {
  uint32_t* ends[2] = {inside[0], window_count > 1 ? inside[1] : nullptr};
  with_types(like, risk, [&](auto g_type, auto m_type) ROSE_ALWAYS_INLINE {
    for (int l = 0; l < n; ++l) {
      LineCounts of_line[2] = {};
      Run run = like;
      run.data[0] = (char*)lines[l].g;
      run.data[1] = (char*)lines[l].m;
      run.n = lines[l].n;
      const auto body = [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
        const Words key = keys_of(g_type, m_type, at, run, risk);
        const Condition ranked = except(first_lanes(lanes), at_most(words<kInactiveKey>(), key));
        for (int t = 0; t < window_count; ++t) {
          const Window window = windows[t];
          const Condition below = except(ranked, at_most(all_words(window.low), key));
          const Condition within = both(ranked, in_range(key, window.low, window.high - window.low));
          const Condition upto = both(ranked, at_most(key, all_words(window.middle)));
          append(ends[t], within, key);
          ends[t] += count(within);
          of_line[t].ranked += (uint8_t)count(ranked);
          of_line[t].below += (uint8_t)count(below);
          of_line[t].upto_middle += (uint8_t)count(upto);
          of_line[t].inside += (uint8_t)count(within);
        }
      };
      for_each_vector(run, reads(risk), 0, body);
      for (int t = 0; t < window_count; ++t) counts[l * window_count + t] = of_line[t];
    }
  });
}

int logged_between(const uint32_t* keys, int n, uint32_t low, uint32_t span, uint32_t* out) {
  int found = 0;
  Run run = {{(char*)keys}, {Dtype::kFloat32}, n, {}, 0};
  for_each_vector(run, kFirst, 0, [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
    const Words key = absolute(load_words((const uint32_t*)at.data[0] + at.offset));
    const Condition within = both(first_lanes(lanes), in_range(key, low, span));
    append(out + found, within, key);
    found += count(within);
  });
  return found;
}

int logged_wrongly(const uint32_t* keys, int n, Bounds bounds, uint32_t* places) {
  int found = 0;
  Run run = {{(char*)keys}, {Dtype::kFloat32}, n, {}, 0};
  for_each_vector(run, kFirst, 0, [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
    const Words marked = load_words((const uint32_t*)at.data[0] + at.offset), key = absolute(marked);
    const Condition was = at_most(words<kInactiveKey>(), marked);
    const Condition is = except(at_most_signed(key, all_words((uint32_t)bounds.high)),
                                at_most_signed(key, all_words((uint32_t)bounds.low)));
    const Condition wrong = both(first_lanes(lanes), either(except(was, is), except(is, was)));
    append(places + found, wrong, words_from((uint32_t)at.i));
    found += count(wrong);
  });
  return found;
}
