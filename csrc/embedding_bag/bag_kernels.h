// The second stage of a bag kernel: rows become sums. Templates over a vector type V (one of embedding_bag_*.cpp) and a
// Code; included inside an instruction set's region, in an unnamed namespace, after resolver.h.
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
  const auto scale = V::template prepare<C>(factor);
  typename V::Reg x[C::kPer];
  for (std::int64_t g = 0; g < groups.full; ++g) {
    V::template expand<C>(scale, V::template raw<C>(codes + g * G::kBytes), x);
    V::interleave(x);
    store_columns<V>(out + g * G::kColumns, x, G::kColumns);
  }
  const std::uint8_t* last = codes + groups.full * G::kBytes;
  V::template expand<C>(scale, V::template raw_part<C>(last, static_cast<int>(groups.bytes), last - row), x);
  V::interleave(x);
  store_columns<V>(out + groups.full * G::kColumns, x, groups.columns);
}

// Sums, means and single rows; the bag stays in kGroups * C::kPer registers.
template <class V, class C, int kGroups>
void sum_bags(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  using G = Groups<V, C>;
  using Real = typename V::Real;
  const G groups(args.table.width);
  const bool whole = groups.bytes == G::kBytes;
  const auto bytes = static_cast<int>(groups.bytes);
  const std::int64_t width = args.table.width;
  const bool mean = args.mode == Mode::kMean;
  const auto* weights = static_cast<const Real*>(args.weights);
  const std::int64_t* offsets = args.lookups.offsets;
  auto* out = static_cast<Real*>(args.out) + first * width;
  Resolver resolver(args, first, last, error);
  std::int64_t position = resolver.start();
  std::int64_t known = position;  // positions before this one are resolved
  for (std::int64_t bag = first; bag < last; ++bag, out += width) {
    typename V::Reg sum[kGroups][C::kPer];
    for (auto& group : sum) {
      for (auto& x : group) x = V::zero();
    }
    [[maybe_unused]] Real bias{0};
    const std::int64_t end = offsets == nullptr ? bag + 1 : offsets[bag + 1];
    std::int64_t count = end - position;
    while (position < end) {
      if (position == known) {
        resolver.next();
        known += Resolver::kBlock;
      }
      const std::int64_t until = std::min(end, known);
      for (; position < until; ++position) {
        const std::uintptr_t address = resolver.row(position);
        if (address <= Resolver::kOutside) [[unlikely]] {
          count -= address == Resolver::kMissing ? 1 : 0;
          continue;
        }
        const auto* row = reinterpret_cast<const std::uint8_t*>(address);
        const Head<C> head = head_of<V, C>(row);
        Real factor{1};
        if constexpr (C::kHeader == Header::kNone) {
          if (weights != nullptr) factor = weights[position];
        } else {
          factor = head.factor;
          if (weights != nullptr) factor *= weights[position];
          if constexpr (C::kHeader == Header::kAffine) {
            bias += weights == nullptr ? head.bias : head.bias * weights[position];
          }
        }
        const auto scale = V::template prepare<C>(factor);
        const std::uint8_t* codes = row + C::kCodes;
        typename V::Reg x[C::kPer];
        for (int g = 0; g < kGroups - 1; ++g) {
          V::template expand<C>(scale, V::template raw<C>(codes + g * G::kBytes), x);
          for (int k = 0; k < C::kPer; ++k) sum[g][k] = V::add(sum[g][k], x[k]);
        }
        const std::uint8_t* tail = codes + (kGroups - 1) * G::kBytes;
        const auto raw = whole ? V::template raw<C>(tail) : V::template raw_part<C>(tail, bytes, tail - row);
        V::template expand<C>(scale, raw, x);
        for (int k = 0; k < C::kPer; ++k) sum[kGroups - 1][k] = V::add(sum[kGroups - 1][k], x[k]);
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (C::kHeader == Header::kAffine) {
        for (auto& x : sum[g]) x = V::add(x, V::set(bias));
      }
      if (mean && count > 0) {
        for (auto& x : sum[g]) x = V::div(x, V::set(static_cast<Real>(count)));
      }
      V::interleave(sum[g]);
      store_columns<V>(out + g * G::kColumns, sum[g], g == kGroups - 1 ? groups.columns : G::kColumns);
    }
  }
}

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
  std::int64_t known = position;
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
      if (position == known) {
        resolver.next();
        known += Resolver::kBlock;
      }
      const std::uintptr_t address = resolver.row(position);
      count += address == Resolver::kMissing ? 0 : 1;
      if (address <= Resolver::kOutside) continue;
      const auto* row = reinterpret_cast<const std::uint8_t*>(address);
      const Head<C> head = head_of<V, C>(row);
      Real factor = C::kHeader == Header::kNone ? Real{1} : static_cast<Real>(head.factor);
      if (weights != nullptr) factor *= weights[position];
      if constexpr (C::kHeader == Header::kAffine && !kMax) {
        bias += weights == nullptr ? head.bias : head.bias * weights[position];
      }
      for (std::int64_t column = 0; column < width; column += kPiece) {
        const std::int64_t columns = std::min(kPiece, width - column);
        products<V, C>(row, column, columns, factor, piece);
        Real* target = out + column;
        if constexpr (!kMax) {
          for (std::int64_t d = 0; d < columns; ++d) target[d] += piece[d];
        } else {
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
  std::int64_t known = position;
  alignas(64) Real piece[kPiece];
  for (std::int64_t bag = first; bag < last; ++bag) {
    const std::int64_t begin = position;
    const std::int64_t end = args.lookups.begin(bag + 1);
    std::int64_t count = 0;
    for (; position < end; ++position) {
      if (position == known) {
        resolver.next();
        known += Resolver::kBlock;
      }
      out[position] = 0;
      const std::uintptr_t address = resolver.row(position);
      count += address == Resolver::kMissing ? 0 : 1;
      if (address <= Resolver::kOutside) continue;
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
