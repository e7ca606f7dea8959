// Bag kernels: rows become sums. Templates over a vector type V (one of embedding_bag_*.cpp) and a Code; included inside
// an instruction set's region, in an unnamed namespace, after resolver.h.
//
// A group is the least that a kernel decodes at once: V::kLanes bytes of int4 or int2 (two or four vectors of columns,
// which stay in the order "column within its byte" until a bag is stored), V::kLanes columns of all else (one vector).

template <Format F, Header H>
struct Code {
  static constexpr Format kFormat = F;
  static constexpr Header kHeader = H;
  static constexpr int kBits = bits_of(F);
  static constexpr int kPer = kBits < 8 ? 8 / kBits : 1;  // vectors of a group
  static constexpr int kCodes = H == Header::kNone ? 0 : static_cast<int>(kHeaderBytes);
};

// How the columns of a row fall into groups.
template <class V, class C>
struct Groups {
  static constexpr std::int64_t kColumns = V::kLanes * C::kPer;
  static constexpr std::int64_t kBytes = kColumns * C::kBits / 8;

  std::int64_t full;    // groups before the last
  std::int64_t columns; // of the last: 1 to kColumns
  std::int64_t bytes;   // of the last

  explicit Groups(std::int64_t width) noexcept
      : full((width - 1) / kColumns), columns(width - full * kColumns), bytes((columns * C::kBits + 7) / 8) {}
};

template <class C>
struct Head {
  float factor = 1.0f;
  float bias = 0.0f;
};

template <class V, class C>
inline Head<C> head_of(const std::uint8_t* row) noexcept {
  if constexpr (C::kHeader == Header::kStep) return {.factor = read_at<float>(row)};
  if constexpr (C::kHeader == Header::kAffine) {
    return {.factor = V::half(read_at<std::uint16_t>(row)), .bias = V::half(read_at<std::uint16_t>(row + 2))};
  }
  return {};
}

template <class V, int kRegs>
inline void store_columns(typename V::Real* out, const typename V::Reg (&x)[kRegs], std::int64_t columns) noexcept {
  for (int k = 0; k < kRegs; ++k) {
    const std::int64_t left = columns - k * V::kLanes;
    if (left >= V::kLanes) {
      V::store(out + k * V::kLanes, x[k]);
    } else if (left > 0) {
      V::store_part(out + k * V::kLanes, x[k], static_cast<int>(left));
    }
  }
}

// factor * code of columns [column, column + count), which begin a group.
template <class V, class C>
inline void products(const std::uint8_t* row, std::int64_t column, std::int64_t count, typename V::Real factor,
                     typename V::Real* out) noexcept {
  using G = Groups<V, C>;
  const G groups(count);
  const std::uint8_t* codes = row + C::kCodes + column * C::kBits / 8;
  const typename V::Reg scale = V::set(factor);
  typename V::Reg x[C::kPer];
  const auto put = [&](auto raw, typename V::Real* to, std::int64_t columns) {
    V::template expand<C>(raw, x);
    for (auto& value : x) value = V::mul(scale, value);
    V::interleave(x);
    store_columns<V>(to, x, columns);
  };
  for (std::int64_t g = 0; g < groups.full; ++g) {
    put(V::template raw<C>(codes + g * G::kBytes), out + g * G::kColumns, G::kColumns);
  }
  const std::uint8_t* last = codes + groups.full * G::kBytes;
  put(V::template raw_part<C>(last, static_cast<int>(groups.bytes), last - row), out + groups.full * G::kColumns,
      groups.columns);
}

// The sums of a bag, in registers.
template <class V, class C, int kGroups>
using Sums = typename V::Reg[kGroups][C::kPer];

// sum += factor * codes, fused (or + codes, not kScaled: the same bits, as the factor is 1).
template <class V, class C, int kGroups, bool kScaled>
__attribute__((always_inline)) inline void add_row(const std::uint8_t* codes, typename V::Real factor, bool whole,
                                                   int bytes, Sums<V, C, kGroups>& sum) noexcept {
  constexpr std::int64_t kBytes = Groups<V, C>::kBytes;
  const typename V::Reg scale = V::set(factor);
  const auto add = [&](auto raw, typename V::Reg(&to)[C::kPer]) __attribute__((always_inline)) {
    typename V::Reg x[C::kPer];
    V::template expand<C>(raw, x);
    for (int k = 0; k < C::kPer; ++k) to[k] = kScaled ? V::fma(scale, x[k], to[k]) : V::add(to[k], x[k]);
  };
  for (int g = 0; g < kGroups - 1; ++g) add(V::template raw<C>(codes + g * kBytes), sum[g]);
  const std::uint8_t* tail = codes + (kGroups - 1) * kBytes;
  const std::int64_t before = (kGroups - 1) * kBytes + C::kCodes;
  add(whole ? V::template raw<C>(tail) : V::template raw_part<C>(tail, bytes, before), sum[kGroups - 1]);
}

// Bytes of a row that are there whatever the width of its last group.
template <class V, class C, int kGroups>
constexpr std::uintptr_t inside_of() noexcept {
  return (kGroups - 1) * Groups<V, C>::kBytes + C::kCodes + 1;
}

// Sums, means and single rows; a bag stays in kGroups * C::kPer registers.
template <class V, class C, int kGroups>
class Summer {
  using G = Groups<V, C>;
  using Real = typename V::Real;
  using Sum = Sums<V, C, kGroups>;

  static constexpr std::int64_t kOutAhead = 4;   // bags
  static constexpr std::int64_t kTogether = 64;  // bags
  static constexpr std::uintptr_t kInside = inside_of<V, C, kGroups>();
  static constexpr bool kScaled = C::kHeader != Header::kNone;

 public:
  Summer(const Args& args, FirstError& error) noexcept
      : args_(args),
        lookups_(args.lookups),
        error_(error),
        groups_(args.table.width),
        whole_(groups_.bytes == G::kBytes),
        bytes_(static_cast<int>(groups_.bytes)),
        mean_(args.mode == Mode::kMean),
        weights_(static_cast<const Real*>(args.weights)),
        out_(static_cast<Real*>(args.out)),
        // A masked load waits for all lines that it spans, of columns it leaves out, too.
        last_byte_(C::kBits < 16 ? static_cast<std::uintptr_t>(std::max<std::int64_t>(args.table.used_bytes(), 1) - 1)
                                 : C::kCodes + kGroups * G::kBytes - 1),
        ahead_(choose_ahead(args.table.rows * args.table.stride, args.table.used_bytes())) {}

  void run(std::int64_t first, std::int64_t last) const noexcept {
    if (lookups_.features == 0) return one_table(first, last, 0, lookups_.rows);
    if (lookups_.features == 1) return one_table(first, last, lookups_.feature_first[0], lookups_.feature_rows[0]);
    if (lookups_.bag_splits == nullptr) return interleaved(first, last);
    for (std::int64_t feature = lookups_.feature_of(first); first < last; ++feature) {
      const std::int64_t until = std::min(last, lookups_.bag_splits[feature + 1]);
      if (first < until) one_table(first, until, lookups_.feature_first[feature], lookups_.feature_rows[feature]);
      first = std::max(first, until);
    }
  }

 private:
  // The ids of bags that all look into one table.
  template <class Index>
  struct Ids {
    const Index* ids;
    std::uintptr_t base;
    std::uintptr_t stride;
    Index highest;  // -1 without rows

    [[nodiscard]] std::uintptr_t address(Index id) const noexcept {
      return base + static_cast<std::uintptr_t>(id) * stride;
    }
  };

  __attribute__((always_inline)) static void clear(Sum& sum) noexcept {
#pragma GCC unroll 8
    for (auto& group : sum) {
#pragma GCC unroll 4
      for (auto& x : group) x = V::zero();
    }
  }

  // Asks for the lines of a bag some way on, which will be written.
  __attribute__((always_inline)) static void ask_out(const Real* out, std::int64_t width) noexcept {
    const auto later =
        reinterpret_cast<std::uintptr_t>(out) + static_cast<std::uintptr_t>(kOutAhead * width) * sizeof(Real);
    for (std::uintptr_t at = 0; at < sizeof(Sum); at += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(later + at), 1, 3);
    }
  }

  // `mean_of`: the rows to divide by, or 0.
  __attribute__((always_inline)) static void store(Sum& sum, Real bias, std::int64_t mean_of, std::int64_t last_columns,
                                                   Real* out) noexcept {
#pragma GCC unroll 8
    for (auto& group : sum) {
      if constexpr (C::kHeader == Header::kAffine) {
        for (auto& x : group) x = V::add(x, V::set(bias));
      }
      if (mean_of > 0) {
        for (auto& x : group) x = V::div(x, V::set(static_cast<Real>(mean_of)));
      }
      V::interleave(group);
    }
    for (int g = 0; g < kGroups - 1; ++g) store_columns<V>(out + g * G::kColumns, sum[g], G::kColumns);
    store_columns<V>(out + (kGroups - 1) * G::kColumns, sum[kGroups - 1], last_columns);
  }

  // One row, with its weight.
  __attribute__((always_inline)) void add(std::uintptr_t address, std::int64_t position, Sum& sum,
                                          Real& bias) const noexcept {
    const auto* const row = reinterpret_cast<const std::uint8_t*>(address);
    const Head<C> head = head_of<V, C>(row);
    if (weights_ == nullptr) {
      if constexpr (C::kHeader == Header::kAffine) bias += head.bias;
      add_row<V, C, kGroups, kScaled>(row + C::kCodes, head.factor, whole_, bytes_, sum);
    } else {
      const Real weight = weights_[position];
      if constexpr (C::kHeader == Header::kAffine) bias += head.bias * weight;
      add_row<V, C, kGroups, true>(row + C::kCodes, head.factor * weight, whole_, bytes_, sum);
    }
  }

  void one_table(std::int64_t first, std::int64_t last, std::int64_t first_row, std::int64_t rows) const noexcept {
    const auto stride = static_cast<std::uintptr_t>(args_.table.stride);
    const auto data = reinterpret_cast<std::uintptr_t>(args_.table.data);
    // Rows of whole lines, of which each is asked for once.
    constexpr bool kLines = C::kHeader == Header::kNone && kGroups * G::kBytes % 64 == 0;
    const bool lines = kLines && whole_ && (data | stride) % 64 == 0;
    const auto with = [&](const auto* ids) {
      using Index = std::remove_const_t<std::remove_pointer_t<decltype(ids)>>;
      constexpr auto kMost = static_cast<std::int64_t>(std::numeric_limits<Index>::max());
      const Ids<Index> table{ids, data + static_cast<std::uintptr_t>(first_row) * stride, stride,
                             static_cast<Index>(std::min(rows - 1, kMost))};
      if (ahead_.hint == Hint::kFar) {
        bags_of<Index, 2, false>(table, first, last);
      } else if (lines) {
        bags_of<Index, 3, kLines>(table, first, last);
      } else {
        bags_of<Index, 3, false>(table, first, last);
      }
    };
    lookups_.wide ? with(static_cast<const std::int64_t*>(lookups_.indices))
                  : with(static_cast<const std::int32_t*>(lookups_.indices));
  }

  // A few bags at a time, so that checking their ids costs next to nothing.
  template <class Index, int kLocality, bool kLines>
  void bags_of(const Ids<Index> table, std::int64_t first, std::int64_t last) const noexcept {
    for (; first < last; first += kTogether) {
      const std::int64_t until = std::min(last, first + kTogether);
      const std::int64_t begin = lookups_.begin(first);
      if (weights_ == nullptr && V::inside(table.ids + begin, lookups_.begin(until) - begin, table.highest)) {
        usual_bags<Index, kLocality, kLines>(table, first, until);
      } else {
        any_bags(table, first, until);
      }
    }
  }

  // As many ids as a bag has, so much later as there are any. They may be outside, but asking for a row does no harm.
  template <class Index>
  __attribute__((always_inline)) static const Index* later_ids(const Ids<Index>& table, std::int64_t begin,
                                                               std::int64_t end, std::int64_t ahead,
                                                               std::int64_t total) noexcept {
    return table.ids + std::min(begin + ahead, total - (end - begin));
  }

  // What nearly every bag is, without weights and with all of its ids in the table: one loop without a question. All
  // that it needs is copied first, since a vector that is stored may alias anything but what never left the function.
  template <class Index, int kLocality, bool kLines>
  __attribute__((noinline)) void usual_bags(const Ids<Index> table, std::int64_t first,
                                            std::int64_t last) const noexcept {
    const std::int64_t* const offsets = lookups_.offsets;
    const std::int64_t total = lookups_.total;
    const std::int64_t ahead = ahead_.positions;
    const std::uintptr_t last_byte = last_byte_;
    const std::int64_t width = args_.table.width;
    const std::int64_t last_columns = groups_.columns;
    const bool whole = whole_;
    const int bytes = bytes_;
    const bool mean = mean_;
    Real* out = out_ + first * width;
    std::int64_t position = lookups_.begin(first);
    for (std::int64_t bag = first; bag < last; ++bag, out += width) {
      Sum sum;
      clear(sum);
      [[maybe_unused]] Real bias{0};
      ask_out(out, width);
      const std::int64_t begin = position;
      const std::int64_t end = offsets == nullptr ? bag + 1 : offsets[bag + 1];
      const Index* later = later_ids(table, begin, end, ahead, total);
#pragma GCC unroll 1
      for (; position < end; ++position, ++later) {
        Resolver::ask_into<kLocality, !kLines>(table.address(*later), kInside, last_byte);
        const auto* const row = reinterpret_cast<const std::uint8_t*>(table.address(table.ids[position]));
        const Head<C> head = head_of<V, C>(row);
        if constexpr (C::kHeader == Header::kAffine) bias += head.bias;
        add_row<V, C, kGroups, kScaled>(row + C::kCodes, head.factor, whole, bytes, sum);
      }
      store(sum, bias, mean ? end - begin : 0, last_columns, out);
    }
  }

  // Bags with weights, or with ids that stand for no row.
  template <class Index>
  __attribute__((noinline)) void any_bags(const Ids<Index> table, std::int64_t first,
                                          std::int64_t last) const noexcept {
    const std::int64_t width = args_.table.width;
    Real* out = out_ + first * width;
    std::int64_t position = lookups_.begin(first);
    for (std::int64_t bag = first; bag < last; ++bag, out += width) {
      Sum sum;
      clear(sum);
      Real bias{0};
      ask_out(out, width);
      const std::int64_t end = lookups_.begin(bag + 1);
      std::int64_t count = end - position;
      const Index* later = later_ids(table, position, end, ahead_.positions, lookups_.total);
      for (; position < end; ++position, ++later) {
        Resolver::ask_into<3>(table.address(*later), kInside, last_byte_);
        const Index id = table.ids[position];
        if (id >= 0 && id <= table.highest) {
          add(table.address(id), position, sum, bias);
        } else if (lookups_.skip_missing && id == -1) {
          --count;
        } else {
          error_.report(position);
        }
      }
      store(sum, bias, mean_ ? count : 0, groups_.columns, out);
    }
  }

  // Bags of which each looks into another table than the one before it.
  void interleaved(std::int64_t first, std::int64_t last) const noexcept {
    Resolver resolver(args_, first, last, error_);
    const std::int64_t width = args_.table.width;
    Real* out = out_ + first * width;
    std::int64_t position = resolver.start();
    for (std::int64_t bag = first; bag < last; ++bag, out += width) {
      Sum sum;
      clear(sum);
      Real bias{0};
      ask_out(out, width);
      const std::int64_t end = lookups_.begin(bag + 1);
      std::int64_t count = end - position;
      while (position < end) {
        const std::int64_t until = std::min(end, position + Resolver::kMost);
        resolver.resolve(until);
        const std::uintptr_t* slot = resolver.slots(position);
        const bool clean = resolver.clean(position);
        for (; position < until; ++position, ++slot) {
          resolver.ask(slot, kInside, last_byte_);
          if (clean || Resolver::is_row(*slot)) {
            add(*slot, position, sum, bias);
          } else {
            count -= *slot == Resolver::missing() ? 1 : 0;
          }
        }
      }
      store(sum, bias, mean_ ? count : 0, groups_.columns, out);
    }
  }

  const Args& args_;
  const Lookups& lookups_;
  FirstError& error_;
  const G groups_;
  const bool whole_;
  const int bytes_;
  const bool mean_;
  const Real* const weights_;
  Real* const out_;
  const std::uintptr_t last_byte_;
  const Ahead ahead_;
};

template <class V, class C, int kGroups>
void sum_bags(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  Summer<V, C, kGroups>(args, error).run(first, last);
}

inline float fused(float a, float b, float c) noexcept { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) noexcept { return __builtin_fma(a, b, c); }

// Rows too wide for registers, and max: a row is decoded to memory piece by piece and joined to the bag there.
template <class V, class C, bool kMax>
void wide_bags(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  using Real = typename V::Real;
  constexpr std::int64_t kPiece = 256;
  const std::int64_t width = args.table.width;
  const auto* weights = static_cast<const Real*>(args.weights);
  const std::int64_t* offsets = args.lookups.offsets;
  Resolver resolver(args, first, last, error);
  std::int64_t position = resolver.start();
  alignas(64) Real piece[kPiece];
  alignas(64) std::int32_t unused[kPiece];
  for (std::int64_t bag = first; bag < last; ++bag) {
    Real* out = static_cast<Real*>(args.out) + bag * width;
    std::fill(out, out + width, Real{0});
    std::int32_t* argmax = args.argmax == nullptr ? nullptr : args.argmax + bag * width;
    if (argmax != nullptr) std::fill(argmax, argmax + width, -1);
    [[maybe_unused]] Real bias{0};
    const std::int64_t end = offsets == nullptr ? bag + 1 : offsets[bag + 1];
    std::int64_t count = 0;
    [[maybe_unused]] bool begun = false;
    for (; position < end; ++position) {
      resolver.resolve(position + 1);
      const std::uintptr_t* slot = resolver.slots(position);
      resolver.ask(slot, resolver.last_byte(), resolver.last_byte());
      const std::uintptr_t address = *slot;
      count += address == Resolver::missing() ? 0 : 1;
      if (!Resolver::is_row(address)) continue;
      const auto* row = reinterpret_cast<const std::uint8_t*>(address);
      const Head<C> head = head_of<V, C>(row);
      Real factor = C::kHeader == Header::kNone ? Real{1} : static_cast<Real>(head.factor);
      if (weights != nullptr) factor *= weights[position];
      if constexpr (C::kHeader == Header::kAffine && !kMax) {
        bias += weights == nullptr ? head.bias : head.bias * weights[position];
      }
      for (std::int64_t column = 0; column < width; column += kPiece) {
        const std::int64_t columns = std::min(kPiece, width - column);
        Real* target = out + column;
        if constexpr (!kMax) {
          products<V, C>(row, column, columns, Real{1}, piece);
          for (std::int64_t d = 0; d < columns; ++d) target[d] = fused(factor, piece[d], target[d]);
        } else {
          products<V, C>(row, column, columns, factor, piece);
          if constexpr (C::kHeader == Header::kAffine) {
            for (std::int64_t d = 0; d < columns; ++d) piece[d] += head.bias;
          }
          std::int32_t* at = argmax == nullptr ? unused : argmax + column;
          const auto here = static_cast<std::int32_t>(position);
          if (!begun) {
            for (std::int64_t d = 0; d < columns; ++d) {
              target[d] = piece[d];
              at[d] = here;
            }
          } else {
            for (std::int64_t d = 0; d < columns; ++d) {
              const bool larger = !(piece[d] <= target[d]) && target[d] == target[d];
              target[d] = larger ? piece[d] : target[d];
              at[d] = larger ? here : at[d];
            }
          }
        }
      }
      begun = true;
    }
    if constexpr (C::kHeader == Header::kAffine && !kMax) {
      for (std::int64_t d = 0; d < width; ++d) out[d] += bias;
    }
    if (args.mode == Mode::kMean && count > 0) {
      for (std::int64_t d = 0; d < width; ++d) out[d] /= static_cast<Real>(count);
    }
  }
}

template <class V, class C>
Form* pick_sum(std::int64_t groups) noexcept {
  constexpr int kMost = V::kMostRegs / C::kPer;
  if constexpr (kMost >= 1) {
    if (groups == 1) return &sum_bags<V, C, 1>;
  }
  if constexpr (kMost >= 2) {
    if (groups == 2) return &sum_bags<V, C, 2>;
  }
  if constexpr (kMost >= 4) {
    if (groups == 3) return &sum_bags<V, C, 3>;
    if (groups == 4) return &sum_bags<V, C, 4>;
  }
  if constexpr (kMost >= 8) {
    if (groups == 5) return &sum_bags<V, C, 5>;
    if (groups == 6) return &sum_bags<V, C, 6>;
    if (groups == 7) return &sum_bags<V, C, 7>;
    if (groups == 8) return &sum_bags<V, C, 8>;
  }
  return &wide_bags<V, C, false>;
}

// Calls use(Code<...>{}) with the code of a table.
template <class Use>
inline auto with_code(const Table& table, const Use& use) noexcept {
  const bool affine = table.header == Header::kAffine;
  switch (table.format) {
    case Format::kBFloat16: return use(Code<Format::kBFloat16, Header::kNone>{});
    case Format::kFloat16: return use(Code<Format::kFloat16, Header::kNone>{});
    case Format::kFloat8: return use(Code<Format::kFloat8, Header::kStep>{});
    case Format::kInt8:
      return affine ? use(Code<Format::kInt8, Header::kAffine>{}) : use(Code<Format::kInt8, Header::kStep>{});
    case Format::kInt4:
      return affine ? use(Code<Format::kInt4, Header::kAffine>{}) : use(Code<Format::kInt4, Header::kStep>{});
    case Format::kInt2:
      return affine ? use(Code<Format::kInt2, Header::kAffine>{}) : use(Code<Format::kInt2, Header::kStep>{});
    default: return use(Code<Format::kFloat32, Header::kNone>{});
  }
}

template <class V>
void bags(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  const auto pick = [&](auto code) -> Form* {
    using C = decltype(code);
    if (args.mode == Mode::kMax) return &wide_bags<V, C, true>;
    return pick_sum<V, C>(Groups<V, C>(args.table.width).full + 1);
  };
  with_code(args.table, pick)(args, first, last, error);
}

template <class V, class C>
void decode_as(const Table&, const std::uint8_t* row, std::int64_t column, std::int64_t count, float* out) noexcept {
  const Head<C> head = head_of<V, C>(row);
  products<V, C>(row, column, count, head.factor, out);
  if constexpr (C::kHeader == Header::kAffine) {
    for (std::int64_t d = 0; d < count; ++d) out[d] += head.bias;
  }
}

template <class V>
DecodeForm* pick_decode(const Table& table) noexcept {
  return with_code(table, [](auto code) -> DecodeForm* { return &decode_as<V, decltype(code)>; });
}

// The gradient of the weights: <row, gradient of the bag> of each position.
template <class V, class C>
void dots(const Args& args, const void* gradient, void* result, std::int64_t first, std::int64_t last) noexcept {
  using Real = typename V::Real;
  constexpr std::int64_t kPiece = 256;
  constexpr std::int64_t kSums = 16;
  const std::int64_t width = args.table.width;
  const auto* grad = static_cast<const Real*>(gradient);
  auto* out = static_cast<Real*>(result);
  FirstError ignored;  // the forward pass has told
  Resolver resolver(args, first, last, ignored);
  std::int64_t position = resolver.start();
  alignas(64) Real piece[kPiece];
  for (std::int64_t bag = first; bag < last; ++bag) {
    const std::int64_t begin = position;
    const std::int64_t end = args.lookups.begin(bag + 1);
    std::int64_t count = 0;
    for (; position < end; ++position) {
      resolver.resolve(position + 1);
      out[position] = 0;
      const std::uintptr_t* slot = resolver.slots(position);
      resolver.ask(slot, resolver.last_byte(), resolver.last_byte());
      const std::uintptr_t address = *slot;
      count += address == Resolver::missing() ? 0 : 1;
      if (!Resolver::is_row(address)) continue;
      const auto* row = reinterpret_cast<const std::uint8_t*>(address);
      const Head<C> head = head_of<V, C>(row);
      Real sums[kSums] = {};
      for (std::int64_t column = 0; column < width; column += kPiece) {
        const std::int64_t columns = std::min(kPiece, width - column);
        products<V, C>(row, column, columns, static_cast<Real>(head.factor), piece);
        if constexpr (C::kHeader == Header::kAffine) {
          for (std::int64_t d = 0; d < columns; ++d) piece[d] += head.bias;
        }
        const Real* g = grad + bag * width + column;
        std::int64_t d = 0;
        for (; d + kSums <= columns; d += kSums) {
          for (std::int64_t k = 0; k < kSums; ++k) sums[k] += piece[d + k] * g[d + k];
        }
        for (std::int64_t k = 0; d + k < columns; ++k) sums[k] += piece[d + k] * g[d + k];
      }
      for (std::int64_t step = kSums / 2; step > 0; step /= 2) {
        for (std::int64_t k = 0; k < step; ++k) sums[k] += sums[k + step];
      }
      out[position] = sums[0];
    }
    if (args.mode == Mode::kMean && count > 0) {
      for (std::int64_t i = begin; i < end; ++i) out[i] /= static_cast<Real>(count);
    }
  }
}

template <class V>
WeightForm* pick_dots(const Table& table) noexcept {
  return with_code(table, [](auto code) -> WeightForm* { return &dots<V, decltype(code)>; });
}
