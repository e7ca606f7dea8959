// The first stage of a bag kernel: ids become addresses of rows, and the rows are asked for ahead of their use. It knows
// nothing of formats, and the second stage nothing of ids, so that neither multiplies the other. Included inside an
// instruction set's region of embedding_bag_*.cpp, in an unnamed namespace.

// How far ahead rows are asked for, and into which cache. Rows in memory go to the second cache: on the way to the first
// one the few misses that a core may have open are the limit. Rows of a table that the last cache holds go to the first.
struct Ahead {
  std::int64_t blocks;
  bool near;
};

inline Ahead choose_ahead(const Table& table) noexcept {
  constexpr std::int64_t kNearBytes = std::int64_t{12} << 20;
  const bool near = table.rows * table.stride <= kNearBytes;
  return {.blocks = near ? 1 : 2, .near = near};
}

class Resolver {
 public:
  static constexpr std::int64_t kBlock = 16;
  static constexpr std::int64_t kRing = 128;
  static constexpr std::int64_t kMostBlocks = kRing / kBlock - 1;

  // For the bags [first, last); the positions are counted from that of the first.
  Resolver(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept
      : args_(args),
        error_(error),
        base_(reinterpret_cast<std::uintptr_t>(args.table.data)),
        start_(args.lookups.begin(first)),
        stop_(args.lookups.begin(last)),
        last_byte_(args.table.used_bytes() - 1),
        bag_(first),
        ahead_(choose_ahead(args.table)) {
    const Lookups& lookups = args.lookups;
    if (lookups.features > 0) {
      feature_ = lookups.feature_of(first);
      run_end_ = end_of_run();
    }
    resolved_ = start_;
    for (std::int64_t block = 0; block < ahead_.blocks; ++block) resolve();
  }

  // Resolves one block more; the rows of the next kBlock positions are then known.
  __attribute__((noinline)) void next() noexcept { resolve(); }

  // The address of a position's row, or one of these two.
  static constexpr std::uintptr_t kMissing = 0;
  static constexpr std::uintptr_t kOutside = 1;
  [[nodiscard]] std::uintptr_t row(std::int64_t position) const noexcept {
    return ring_[(position - start_) & (kRing - 1)];
  }

  [[nodiscard]] std::int64_t start() const noexcept { return start_; }

 private:
  void resolve() noexcept {
    const std::int64_t count = std::min(kBlock, stop_ - resolved_);
    if (count <= 0) return;
    const Lookups& lookups = args_.lookups;
    std::uintptr_t* slots = ring_ + ((resolved_ - start_) & (kRing - 1));
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
    ask_for(count, slots);
    resolved_ += kBlock;
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
    std::uint64_t wrong = 0;
    const auto one = [&](std::int64_t i) {
      const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
      const bool inside = id < limit;
      slots[i] = inside ? first + id * stride : kMissing;
      wrong |= inside ? 0 : 1;
    };
    if (count == kBlock) {
      for (std::int64_t i = 0; i < kBlock; ++i) one(i);
    } else {
      for (std::int64_t i = 0; i < count; ++i) one(i);
    }
    return wrong != 0;
  }

  bool interleaved(std::int64_t position, std::int64_t count, std::uintptr_t* slots) noexcept {
    const Lookups& lookups = args_.lookups;
    std::int64_t feature = feature_;
    bool wrong = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<std::uint64_t>(lookups.id(position + i));
      const bool inside = id < static_cast<std::uint64_t>(lookups.feature_rows[feature]);
      const std::uint64_t row = static_cast<std::uint64_t>(lookups.feature_first[feature]) + id;
      slots[i] = inside ? base_ + row * static_cast<std::uint64_t>(args_.table.stride) : kMissing;
      wrong |= !inside;
      feature = feature + 1 == lookups.features ? 0 : feature + 1;
    }
    feature_ = feature;
    return wrong;
  }

  // Tells the ids outside from the missing ones.
  __attribute__((noinline)) void report(std::int64_t count, std::uintptr_t* slots) const noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      if (slots[i] != kMissing) continue;
      if (args_.lookups.skip_missing && args_.lookups.id(resolved_ + i) == -1) continue;
      slots[i] = kOutside;
      error_.report(resolved_ + i);
    }
  }

  void ask_for(std::int64_t count, const std::uintptr_t* slots) const noexcept {
    if (ahead_.near) {
      ask_into<3>(count, slots);
    } else {
      ask_into<2>(count, slots);
    }
  }

  template <int kLocality>
  void ask_into(std::int64_t count, const std::uintptr_t* slots) const noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uintptr_t row = slots[i] <= kOutside ? base_ : slots[i];
      // First and last byte without a branch: whether a short row crosses a line cannot be predicted.
      __builtin_prefetch(reinterpret_cast<const void*>(row), 0, kLocality);
      for (std::int64_t at = 64; at < last_byte_; at += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<std::uintptr_t>(at)), 0, kLocality);
      }
      __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<std::uintptr_t>(last_byte_)), 0, kLocality);
    }
  }

  alignas(64) std::uintptr_t ring_[kRing];
  const Args& args_;
  FirstError& error_;
  std::uintptr_t base_;
  std::int64_t start_;
  std::int64_t stop_;
  std::int64_t last_byte_;
  std::int64_t resolved_;
  std::int64_t bag_;
  std::int64_t feature_ = 0;
  std::int64_t run_end_ = 0;
  Ahead ahead_;
};
