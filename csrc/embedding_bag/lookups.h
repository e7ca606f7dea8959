// The lookups of one call: which row each position of each bag stands for. Shared by the forward pass, its gradients
// and the update, so that all of them agree on what an id means.
#pragma once

#include <cstdint>

namespace recfast::embedding_bag {

// Many tables may lie one after the other in one; a feature is a stretch of rows that a column of ids looks into.
struct Lookups {
  const void* indices;          // [total], int32 or int64
  bool wide;                    // int64
  std::int64_t total;
  const std::int64_t* offsets;  // [bags + 1]; null: position i is bag i
  std::int64_t bags;
  std::int64_t rows;                  // of the whole table
  std::int64_t features;              // 0: ids are rows of the table
  const std::int64_t* feature_first;  // [features]: the row that id 0 stands for
  const std::int64_t* feature_rows;   // [features]: ids of feature f lie in [0, feature_rows[f])
  const std::int64_t* bag_splits;     // [features + 1]: bags of feature f are bag_splits[f] .. bag_splits[f + 1];
                                      // null: bag b belongs to feature b % features
  bool skip_missing;                  // an id of -1 stands for nothing; otherwise it is outside the table

  [[nodiscard]] std::int64_t begin(std::int64_t bag) const noexcept { return offsets == nullptr ? bag : offsets[bag]; }

  [[nodiscard]] std::int64_t id(std::int64_t position) const noexcept {
    return wide ? static_cast<const std::int64_t*>(indices)[position]
                : static_cast<const std::int32_t*>(indices)[position];
  }

  // The feature of a bag, found from that of an earlier bag (0 to begin with).
  [[nodiscard]] std::int64_t feature_of(std::int64_t bag, std::int64_t earlier = 0) const noexcept {
    if (features == 0) return 0;
    if (bag_splits == nullptr) return bag % features;
    while (bag >= bag_splits[earlier + 1]) ++earlier;
    return earlier;
  }

  static constexpr std::int64_t kMissing = -1;
  static constexpr std::int64_t kOutside = -2;

  // The row of an id, or kMissing (to be skipped), or kOutside.
  [[nodiscard]] std::int64_t row(std::int64_t id_value, std::int64_t feature) const noexcept {
    const std::int64_t limit = features == 0 ? rows : feature_rows[feature];
    if (static_cast<std::uint64_t>(id_value) < static_cast<std::uint64_t>(limit)) {
      return features == 0 ? id_value : feature_first[feature] + id_value;
    }
    return skip_missing && id_value == -1 ? kMissing : kOutside;
  }
};

}  // namespace recfast::embedding_bag
