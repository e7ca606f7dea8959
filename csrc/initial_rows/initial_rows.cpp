#include "initial_rows/initial_rows.h"

#include "common/parallel.h"
#include "common/random.h"

namespace recfast::initial_rows {
namespace {

[[nodiscard]] float centred(std::uint32_t a, std::uint32_t b) noexcept {
  const std::uint32_t sum = (a & 0xFFFFu) + (a >> 16) + (b & 0xFFFFu) + (b >> 16);
  return static_cast<float>(static_cast<std::int32_t>(sum) - 131070);
}

[[nodiscard]] float uniform(std::uint32_t word) noexcept {
  return static_cast<float>(2 * static_cast<std::int32_t>(word >> 8) + 1 - (1 << 24));
}

}  // namespace

void run(const Args& args) noexcept {
  const Philox philox(args.seed);
  parallel_for(static_cast<std::int64_t>(args.ids.size()), 256, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const auto id = static_cast<std::uint64_t>(args.ids[static_cast<std::size_t>(i)]);
      float* row = args.out + i * args.width;
      for (std::int64_t d = 0; d < args.width; d += 2) {
        std::uint32_t words[4];
        philox(static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(id >> 32), static_cast<std::uint32_t>(d / 2),
               static_cast<std::uint32_t>(args.kind), words);
        const bool normal = args.kind == Kind::kNormal;
        row[d] = (normal ? centred(words[0], words[1]) : uniform(words[0])) * args.scale;
        if (d + 1 == args.width) break;
        row[d + 1] = (normal ? centred(words[2], words[3]) : uniform(words[2])) * args.scale;
      }
    }
  });
}

}  // namespace recfast::initial_rows
