// The vector form of embedding_bag, written once over a class of vector operations `V` that the including file defines
// inside its `#pragma GCC target` region. Everything stands in the includer's unnamed namespace: each instruction set
// must get its own copy.
//
// V::Reg is a register of V::kLanes floats; V::load(p), V::load_part(p, n) for float and int8 (other lanes zero);
// V::store, V::store_part; V::zero, V::set, V::add, V::mul, V::div.

// Adds the rows of one bag for columns [column, column + (kRegs - 1) * lanes + rest), 1 <= rest <= lanes.
template <class V, int kRegs, class Value, class Index>
inline void sum_panel(const Args<Value, Index>& args, std::int64_t bag, std::int64_t column, int rest,
                      std::int64_t stop, FirstError& error) noexcept {
  typename V::Reg sum[kRegs];
  for (int k = 0; k < kRegs; ++k) sum[k] = V::zero();
  const auto rows = static_cast<std::uint64_t>(args.table.rows);
  const Index* ids = args.indices.data();
  const std::int64_t begin = args.begin(bag);
  const std::int64_t end = args.begin(bag + 1);
  const auto table = reinterpret_cast<std::uintptr_t>(args.table.data);
  const auto row_bytes = static_cast<std::uint64_t>(args.table.stride) * sizeof(Value);
  const bool near = static_cast<std::uint64_t>(args.table.rows) * row_bytes <= kNearBytes;
  const std::uint64_t last_byte = static_cast<std::uint64_t>(args.table.width) * sizeof(Value) - 1;
  for (std::int64_t i = begin; i < end; ++i) {
    if (column == 0 && i + kAhead < stop) {  // later panels find the row in the cache
      const auto next = static_cast<std::uint64_t>(ids[i + kAhead]);
      const std::uintptr_t start = table + next * row_bytes;
      // The last byte without a branch: a row that starts inside a line touches one line more.
      if (near) {
        for (std::uint64_t at = 0; at < last_byte; at += 64) {
          __builtin_prefetch(reinterpret_cast<const void*>(start + at), 0, 3);
        }
        __builtin_prefetch(reinterpret_cast<const void*>(start + last_byte), 0, 3);
      } else {
        for (std::uint64_t at = 0; at < last_byte; at += 64) {
          __builtin_prefetch(reinterpret_cast<const void*>(start + at), 0, 2);
        }
        __builtin_prefetch(reinterpret_cast<const void*>(start + last_byte), 0, 2);
      }
      if constexpr (std::is_same_v<Value, std::int8_t>) {
        const auto step = reinterpret_cast<std::uintptr_t>(args.step) + next * sizeof(float);
        __builtin_prefetch(reinterpret_cast<const void*>(step), 0, 2);
      }
    }
    const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
    if (id >= rows) {
      error.report(i);
      continue;
    }
    const Value* row = args.table[static_cast<std::int64_t>(id)] + column;
    const Value* last = row + (kRegs - 1) * V::kLanes;
    const typename V::Reg tail = rest == V::kLanes ? V::load(last) : V::load_part(last, rest);
    if (std::is_same_v<Value, std::int8_t> || args.weights != nullptr) {
      float factor = args.weights == nullptr ? 1.0f : args.weights[i];
      if constexpr (std::is_same_v<Value, std::int8_t>) {
        factor = args.weights == nullptr ? args.step[id] : args.step[id] * factor;
      }
      const typename V::Reg scale = V::set(factor);
      for (int k = 0; k < kRegs - 1; ++k) sum[k] = V::add(sum[k], V::mul(scale, V::load(row + k * V::kLanes)));
      sum[kRegs - 1] = V::add(sum[kRegs - 1], V::mul(scale, tail));
    } else {
      for (int k = 0; k < kRegs - 1; ++k) sum[k] = V::add(sum[k], V::load(row + k * V::kLanes));
      sum[kRegs - 1] = V::add(sum[kRegs - 1], tail);
    }
  }
  if (args.mean && end > begin) {
    const typename V::Reg length = V::set(static_cast<float>(end - begin));
    for (int k = 0; k < kRegs; ++k) sum[k] = V::div(sum[k], length);
  }
  float* out = args.out + bag * args.table.width + column;
  for (int k = 0; k < kRegs - 1; ++k) V::store(out + k * V::kLanes, sum[k]);
  if (rest == V::kLanes) {
    V::store(out + (kRegs - 1) * V::kLanes, sum[kRegs - 1]);
  } else {
    V::store_part(out + (kRegs - 1) * V::kLanes, sum[kRegs - 1], rest);
  }
}

// Bags [first, last): full panels of eight registers, then what is left of the width.
template <class V, class Value, class Index>
inline void bags(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  constexpr std::int64_t kPanel = 8 * V::kLanes;
  const std::int64_t width = args.table.width;
  if (width == 0) return;
  const std::int64_t panels = (width - 1) / kPanel;  // full ones before the last, which has 1 to kPanel columns
  const std::int64_t left = width - panels * kPanel;
  const auto registers = static_cast<int>((left + V::kLanes - 1) / V::kLanes);
  const auto rest = static_cast<int>(left - (registers - 1) * V::kLanes);
  const std::int64_t stop = args.begin(last);
  for (std::int64_t bag = first; bag < last; ++bag) {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      sum_panel<V, 8>(args, bag, panel * kPanel, V::kLanes, stop, error);
    }
    const std::int64_t column = panels * kPanel;
    switch (registers) {
      case 1: sum_panel<V, 1>(args, bag, column, rest, stop, error); break;
      case 2: sum_panel<V, 2>(args, bag, column, rest, stop, error); break;
      case 3: sum_panel<V, 3>(args, bag, column, rest, stop, error); break;
      case 4: sum_panel<V, 4>(args, bag, column, rest, stop, error); break;
      case 5: sum_panel<V, 5>(args, bag, column, rest, stop, error); break;
      case 6: sum_panel<V, 6>(args, bag, column, rest, stop, error); break;
      case 7: sum_panel<V, 7>(args, bag, column, rest, stop, error); break;
      default: sum_panel<V, 8>(args, bag, column, rest, stop, error); break;
    }
  }
}
