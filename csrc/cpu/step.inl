// The loops that update.

constexpr unsigned kAll = kFirst | kSecond | kThird | kFourth;

struct Elements {
  Lanes p, m, v, g;
};

// M by one mask.
ROSE_INLINE void update(Elements& x, Condition on, const Update& u) {
  moments_step(x.m, x.v, x.g, on, u);
  parameter_step(x.p, x.m, x.v, on, all_lanes(u.step_size[3]), all_lanes(u.decay[3]), u);
}

// M by both: gamma where only `first` has it, 1 - gamma where only `second` has it.
ROSE_INLINE void update(Elements& x, Condition first, Condition second, const Update& u) {
  const Condition all = both(first, second), on = either(first, second);
  // Where not both are set, `first` means gamma, or nothing is on.
  const Lanes weight = choose(first, all_lanes(u.m[1]), all_lanes(u.m[2]));
  const Lanes rest = choose(first, all_lanes(u.m[2]), all_lanes(u.m[1]));
  const Lanes g = choose(all, x.g, add(mul(weight, x.g), mul(rest, x.m)));
  const auto by_kind = [&](const float* table) ROSE_ALWAYS_INLINE {
    return choose(all, all_lanes(table[3]), choose(first, all_lanes(table[1]), all_lanes(table[2])));
  };
  moments_step(x.m, x.v, g, on, u);
  parameter_step(x.p, x.m, x.v, on, by_kind(u.step_size), by_kind(u.decay), u);
}

struct Random {
  RandomBits v, p;

  ROSE_MEMBER explicit Random(const Step& step)
      : v(step, Rounded::kSecondMoment), p(step, Rounded::kParameter) {}
};

// The dtypes of a run's operands.
template <typename P, typename G, typename M, typename V>
struct Types {
  P p;
  G g;
  M m;
  V v;

  ROSE_MEMBER Elements load_all(const At& at, const Run& run, bool scaled) const {
    return {load(p, at, 0), load(m, at, 2), load(v, at, 3), load_gradient(g, at, 1, run, scaled)};
  }
  ROSE_MEMBER void store_all(const At& at, const Elements& x, const Step& step, Random& random) const {
    store(m, at, 2, x.m);
    store_rounded(v, at, 3, x.v, random.v);
    if (step.stochastic) {
      store_rounded(p, at, 0, x.p, random.p);
    } else {
      store(p, at, 0, x.p);
    }
  }
};

// fn(types), known as this is compiled for the frequent ones.
template <typename Fn>
ROSE_INLINE void with_all_types(const Run& run, Fn fn) {
  const Dtype *d = run.dtypes, f = Dtype::kFloat32, b = Dtype::kBFloat16;
  const auto are = [d](Dtype p, Dtype g, Dtype moments) {
    return d[0] == p && d[1] == g && d[2] == moments && d[3] == moments;
  };
  if (are(f, f, f)) return fn(Types<Float32, Float32, Float32, Float32>());
  if (are(f, f, b)) return fn(Types<Float32, Float32, BFloat16, BFloat16>());
  if (are(b, b, f)) return fn(Types<BFloat16, BFloat16, Float32, Float32>());
  if (are(b, b, b)) return fn(Types<BFloat16, BFloat16, BFloat16, BFloat16>());
  fn(Types<Dtype, Dtype, Dtype, Dtype>{d[0], d[1], d[2], d[3]});
}

ROSE_INLINE Condition load_mask(const MaskOfRun& mask, int i, int n) {
  return mask.bits ? load_bits(mask.bits, i, n) : condition(mask.all ? 0xFFFFu : 0);
}

// (A function of its own for each: compilers leave constants inside of loops where functions are long.)
template <bool kRanked, bool kFractional, typename T>
__attribute__((noinline)) void masked_as(T types, const Run& run, const Step& step, const Risk& risk,
                                         const Stage& stage, Notes& out, UpdateCounts& counts) {
  const Update u = *step.update;
  Notes notes = out;
  RankedRun ranking(risk, stage, notes);
  Random random(step);
  const bool scaled = scales(run);
  int updated = 0, nonfinite = 0;
  for_each_vector(run, kAll, kAll & ~kSecond, [&](const At& at, int lanes) ROSE_ALWAYS_INLINE {
    const Condition valid = first_lanes(lanes);
    Elements x = types.load_all(at, run, scaled);
    Answers answers;  // of the second-order mask
    if (kRanked) {
      answers = ranking.answer(
          SecondOrder(x.g, x.m, risk), lanes, [&](Condition inside, Words marked) ROSE_ALWAYS_INLINE {
            const int64_t to = notes.logged;
            append(notes.keys + to, inside, marked);
            append(notes.places + to, inside, words_from(run.place + (uint32_t)at.i));
            append(notes.old[0] + to, inside, x.p);
            append(notes.old[1] + to, inside, x.m);
            append(notes.old[2] + to, inside, x.v);
            append(notes.old[3] + to, inside, x.g);
            notes.logged = to + count(inside);
          });
    } else {
      const Lanes infinity = all_lanes(bits_float(kInfinityBits));
      const Condition finite = both(less(magnitude(x.g), infinity), less(magnitude(x.m), infinity));
      answers.bad = except(valid, finite);
      answers.selected = both(load_mask(step.second, at.i, lanes), both(valid, finite));
      nonfinite += count(answers.bad);
    }
    if (kFractional) {
      const Condition first = except(both(load_mask(step.first, at.i, lanes), valid), answers.bad);
      updated += count(either(first, answers.selected));
      update(x, first, answers.selected, u);
    } else {
      if (!kRanked) updated += count(answers.selected);
      update(x, answers.selected, u);
    }
    types.store_all(at, x, step, random);
  });
  ranking.finish();
  counts.updated += kRanked && !kFractional ? ranking.selected : updated;
  counts.nonfinite += nonfinite + (notes.nonfinite - out.nonfinite);
  out = notes;
}

void masked(const Run& run, const Step& step, const Risk& risk, const Stage& stage, Notes& notes,
            UpdateCounts& counts) {
  with_all_types(run, [&](auto types) ROSE_ALWAYS_INLINE {
    if (step.ranked && step.fractional) {
      masked_as<true, true>(types, run, step, risk, stage, notes, counts);
    } else if (step.ranked) {
      masked_as<true, false>(types, run, step, risk, stage, notes, counts);
    } else if (step.fractional) {
      masked_as<false, true>(types, run, step, risk, stage, notes, counts);
    } else {
      masked_as<false, false>(types, run, step, risk, stage, notes, counts);
    }
  });
}

template <typename T>
__attribute__((noinline)) void adamw_as(T types, const Run& run, const Step& step) {
  const Update u = *step.update;
  Random random(step);
  const bool scaled = scales(run);
  for_each_vector(run, kAll, kAll & ~kSecond, [&](const At& at, int) ROSE_ALWAYS_INLINE {
    Elements x = types.load_all(at, run, scaled);
    moments_step(x.m, x.v, x.g, true, u);
    parameter_step(x.p, x.m, x.v, true, all_lanes(u.step_size[3]), all_lanes(u.decay[3]), u);
    types.store_all(at, x, step, random);
  });
}

void adamw(const Run& run, const Step& step) {
  with_all_types(run, [&](auto types) { adamw_as(types, run, step); });
}

void decay(const Run& run, const Step& step) {
  const Update u = *step.update;
  const auto loop = [&](auto m, auto v) ROSE_ALWAYS_INLINE {
    RandomBits random(step, Rounded::kSecondMoment);
    for_each_vector(run, kThird | kFourth, kFourth, [&](const At& at, int) ROSE_ALWAYS_INLINE {
      store_rounded(v, at, 3, second_moment(load(v, at, 3), load(m, at, 2), u), random);
    });
  };
  const Dtype m = run.dtypes[2], v = run.dtypes[3];
  if (m == Dtype::kFloat32 && v == Dtype::kFloat32) return loop(Float32(), Float32());
  if (m == Dtype::kBFloat16 && v == Dtype::kBFloat16) return loop(BFloat16(), BFloat16());
  loop(m, v);
}
