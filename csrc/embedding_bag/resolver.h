// Where neighbouring bags look into different tables, and for the kernels that keep a bag in memory: ids become
// addresses of rows, some way ahead. It knows nothing of formats. Included inside an instruction set's region of
// embedding_bag_*.cpp, in an unnamed namespace.

class Resolver {
 public:
  static constexpr std::int64_t kBlock = 16;
  static constexpr std::int64_t kRing = 256;
  static constexpr std::int64_t kMost = 64;       // positions that a caller may read before it resolves again

  // For the bags [first, last); the positions are counted from that of the first.
  Resolver(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept
      : args_(args),
        error_(error),
        base_(reinterpret_cast<std::uintptr_t>(args.table.data)),
        start_(args.lookups.begin(first)),
        stop_(args.lookups.begin(last)),
        last_byte_(static_cast<std::uintptr_t>(std::max<std::int64_t>(args.table.used_bytes(), 1) - 1)),
        bag_(first),
        ahead_(choose_ahead(args.table.rows * args.table.stride, args.table.used_bytes())) {
    const Lookups& lookups = args.lookups;
    if (lookups.features > 0) {
      feature_ = lookups.feature_of(first);
      run_end_ = end_of_run();
    }
    resolved_ = start_;
  }

  // Makes known the rows of all positions below `until`, which is at most kMost after the first one still in use, and
  // of those that ask() will come to.
  __attribute__((always_inline)) void resolve(std::int64_t until) noexcept {
    until += ahead_.positions;
    while (resolved_ < until) next();
  }

  // The address of a position's row, or one of these two.
  static std::uintptr_t missing() noexcept { return reinterpret_cast<std::uintptr_t>(kNoRow); }
  static std::uintptr_t outside() noexcept { return reinterpret_cast<std::uintptr_t>(kNoRow) + 64; }
  static bool is_row(std::uintptr_t address) noexcept { return address - missing() > 64; }
  // The addresses from a position on; those of the kMost + ahead() next ones, as far as they are resolved, follow.
  [[nodiscard]] const std::uintptr_t* slots(std::int64_t position) const noexcept {
    return ring_ + ((position - start_) & (kRing - 1));
  }

  // Whether all resolved positions from this one on stand for rows.
  [[nodiscard]] bool clean(std::int64_t position) const noexcept { return position >= clean_from_; }

  [[nodiscard]] std::uintptr_t last_byte() const noexcept { return last_byte_; }

  // Asks for a row: for each 64 bytes of its first `inside` ones, and for its last. There is no branch on where a row
  // lies: whether a short one crosses a line cannot be predicted.
  // Inlined by force: a function of prefetches alone has no effect in GCC's eyes, and calls of it go.
  template <int kLocality, bool kLast = true>
  __attribute__((always_inline)) static void ask_into(std::uintptr_t row, std::uintptr_t inside,
                                                      std::uintptr_t last) noexcept {
    for (std::uintptr_t at = 0; at < inside; at += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(row + at), 0, kLocality);
    }
    if (kLast) __builtin_prefetch(reinterpret_cast<const void*>(row + last), 0, kLocality);
  }

  // Asks for the row `ahead` positions after that of a slot.
  __attribute__((always_inline)) void ask(const std::uintptr_t* slot, std::uintptr_t inside,
                                          std::uintptr_t last) const noexcept {
    if (ahead_.hint == Hint::kNear) {
      ask_into<3>(slot[ahead_.positions], inside, last);
    } else {
      ask_into<2>(slot[ahead_.positions], inside, last);
    }
  }

  [[nodiscard]] std::int64_t start() const noexcept { return start_; }

 private:
  __attribute__((noinline)) void next() noexcept {
    const std::int64_t count = std::clamp<std::int64_t>(stop_ - resolved_, 0, kBlock);
    const Lookups& lookups = args_.lookups;
    std::uintptr_t* slots = ring_ + ((resolved_ - start_) & (kRing - 1));
    for (std::int64_t i = count; i < kBlock; ++i) slots[i] = missing();  // behind the last bag
    bool wrong;
    if (lookups.features == 0) {
      wrong = run(resolved_, count, base_, lookups.rows, slots);
    } else if (lookups.offsets == nullptr && lookups.bag_splits == nullptr) {
      wrong = interleaved(resolved_, count, slots);
    } else {
      wrong = false;
      for (std::int64_t done = 0; done < count;) {
        const std::int64_t position = resolved_ + done;
        while (position >= run_end_) next_run();
        const std::int64_t length = std::min(run_end_ - position, count - done);
        const std::uintptr_t first = base_ + offset_of(lookups.feature_first[feature_]);
        wrong |= run(position, length, first, lookups.feature_rows[feature_], slots + done);
        done += length;
      }
    }
    if (wrong) [[unlikely]] report(count, slots);
    std::copy(slots, slots + kBlock, slots + kRing);
    resolved_ += kBlock;
    if (wrong) clean_from_ = resolved_;
  }

  [[nodiscard]] std::uintptr_t offset_of(std::int64_t row) const noexcept {
    return static_cast<std::uintptr_t>(row) * static_cast<std::uintptr_t>(args_.table.stride);
  }

  // With bag_splits a run is all of a feature, otherwise a bag.
  [[nodiscard]] std::int64_t end_of_run() const noexcept {
    const Lookups& lookups = args_.lookups;
    return lookups.begin(lookups.bag_splits != nullptr ? lookups.bag_splits[feature_ + 1] : bag_ + 1);
  }

  void next_run() noexcept {
    ++bag_;
    ++feature_;
    if (args_.lookups.bag_splits == nullptr && feature_ == args_.lookups.features) feature_ = 0;
    run_end_ = end_of_run();
  }

  bool run(std::int64_t position, std::int64_t count, std::uintptr_t first, std::int64_t rows,
           std::uintptr_t* slots) const noexcept {
    const void* ids = args_.lookups.indices;
    return args_.lookups.wide ? fill(static_cast<const std::int64_t*>(ids) + position, count, first, rows, slots)
                              : fill(static_cast<const std::int32_t*>(ids) + position, count, first, rows, slots);
  }

  template <class Index>
  bool fill(const Index* ids, std::int64_t count, std::uintptr_t first, std::int64_t rows,
            std::uintptr_t* slots) const noexcept {
    const auto limit = static_cast<std::uint64_t>(rows);
    const auto stride = static_cast<std::uint64_t>(args_.table.stride);
    const std::uintptr_t none = missing();
    std::uint64_t largest = 0;  // no id that is inside is as large as `limit`
    const auto one = [&](std::int64_t i) {
      const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
      slots[i] = id < limit ? first + id * stride : none;
      largest = id > largest ? id : largest;
    };
    if (count == kBlock) {
      for (std::int64_t i = 0; i < kBlock; ++i) one(i);
    } else {
#pragma GCC unroll 1
      for (std::int64_t i = 0; i < count; ++i) one(i);
    }
    return count > 0 && largest >= limit;
  }

  bool interleaved(std::int64_t position, std::int64_t count, std::uintptr_t* slots) noexcept {
    const Lookups& lookups = args_.lookups;
    const std::uintptr_t none = missing();
    std::int64_t feature = feature_;
    bool wrong = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<std::uint64_t>(lookups.id(position + i));
      const bool inside = id < static_cast<std::uint64_t>(lookups.feature_rows[feature]);
      const std::uint64_t row = static_cast<std::uint64_t>(lookups.feature_first[feature]) + id;
      slots[i] = inside ? base_ + row * static_cast<std::uint64_t>(args_.table.stride) : none;
      wrong |= !inside;
      feature = feature + 1 == lookups.features ? 0 : feature + 1;
    }
    feature_ = feature;
    return wrong;
  }

  // Tells the ids outside from the missing ones.
  __attribute__((noinline)) void report(std::int64_t count, std::uintptr_t* slots) const noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      if (slots[i] != missing()) continue;
      if (args_.lookups.skip_missing && args_.lookups.id(resolved_ + i) == -1) continue;
      slots[i] = outside();
      error_.report(resolved_ + i);
    }
  }

  alignas(64) static constexpr char kNoRow[128] = {};

  alignas(64) std::uintptr_t ring_[2 * kRing];  // twice, so that what follows a slot never wraps
  const Args& args_;
  FirstError& error_;
  std::uintptr_t base_;
  std::int64_t start_;
  std::int64_t stop_;
  std::uintptr_t last_byte_;  // of a row
  std::int64_t resolved_;
  std::int64_t clean_from_ = 0;
  std::int64_t bag_;
  std::int64_t feature_ = 0;
  std::int64_t run_end_ = 0;
  Ahead ahead_;
};
