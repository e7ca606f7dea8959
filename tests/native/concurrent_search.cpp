// Sixteen threads search one set of items at the same time, each with queries and masks of its own, and every answer must
// be the one that was found alone before. Compiled with -fsanitize=thread and without OpenMP, so that ThreadSanitizer
// sees every thread there is; tests/native/test_threads.py builds and runs it.
//
// RECFAST_DELIBERATE_RACE: one thread changes an item in place while the others search, as CodeIndex.update would
// without its lock. ThreadSanitizer must report it, or this check would prove nothing.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

#include "code_postings/code_postings.h"
#include "code_rows/code_rows.h"
#include "code_rows/packed_rows.h"
#include "code_search/code_search.h"
#include "code_search/packed.h"
#include "common/isa.h"

namespace {

using recfast::Scored;

constexpr int kThreads = 16;
constexpr int kRounds = 2;
constexpr std::int64_t kQueries = 3;
constexpr std::int64_t kBest = 20;

// A generator small enough to read: what matters is that every thread has other numbers.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint64_t below(std::uint64_t limit) { return next() % limit; }
  float real() { return static_cast<float>(static_cast<std::int64_t>(next() % 2001) - 1000) / 256.0f; }
  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 8;
  }

 private:
  std::uint64_t state_;
};

struct Answer {
  std::vector<float> scores = std::vector<float>(kQueries * kBest);
  std::vector<std::int64_t> ids = std::vector<std::int64_t>(kQueries * kBest);

  bool operator==(const Answer& other) const {
    return std::memcmp(scores.data(), other.scores.data(), scores.size() * sizeof(float)) == 0 && ids == other.ids;
  }
};

// Items, shared by all threads and written by none.
template <class Code>
struct Items {
  static constexpr std::int64_t size = 20000;
  static constexpr std::int64_t books = 4;
  static constexpr std::int64_t entries = sizeof(Code) == 1 ? 256 : 300;
  static constexpr std::int64_t blocks = (size + 63) / 64;
  static constexpr std::int64_t shift = sizeof(Code) == 1 ? 0 : 1;  // codes that share a bit of a bitmap: 2^shift

  std::vector<Code> rows = std::vector<Code>(size * books);
  std::vector<Code> planes = std::vector<Code>(blocks * books * 64);
  std::vector<std::int32_t> slots = std::vector<std::int32_t>(size);
  std::vector<std::uint64_t> live = std::vector<std::uint64_t>(blocks, ~std::uint64_t{0});
  static constexpr std::int64_t lanes = 2;  // 79 groups are two words
  std::vector<std::uint64_t> held = std::vector<std::uint64_t>(books * 256 * lanes);
  std::vector<std::int64_t> indptr = std::vector<std::int64_t>(books * entries + 1);
  std::vector<std::int32_t> positions = std::vector<std::int32_t>(size * books);
  std::vector<std::int32_t> order = std::vector<std::int32_t>(size);
  recfast::code_search::Items<Code> packed;

  Items() {
    Random random(7);
    for (std::int64_t i = 0; i < size; ++i) {
      for (std::int64_t m = 0; m < books; ++m) {
        // Codes rise with the slot, so that there is something to skip.
        const std::int64_t code = m == 0 ? i * entries / size : static_cast<std::int64_t>(random.below(entries));
        rows[i * books + m] = static_cast<Code>(code);
      }
      slots[i] = static_cast<std::int32_t>(size - 1 - i);
      order[i] = static_cast<std::int32_t>(size - 1 - i);
      if (i % 11 == 0) live[i / 64] &= ~(std::uint64_t{1} << (i % 64));
    }
    recfast::code_search::pack_planes(rows.data(), slots.data(), size, books, planes.data());
    for (std::int64_t i = 0; i < size; ++i) {
      for (std::int64_t m = 0; m < books; ++m) {
        const std::int64_t bit = planes[i / 64 * books * 64 + m * 64 + i % 64] >> shift;
        const std::int64_t group = i / 256;
        held[(m * 256 + bit) * lanes + group / 64] |= std::uint64_t{1} << (group % 64);
      }
    }
    std::vector<std::int64_t> starts(books * entries);
    recfast::code_postings::build(planes.data(), size, books, entries, indptr.data(), positions.data(), starts.data());
    packed.planes = planes.data();
    packed.slots = slots.data();
    packed.live = live.data();
    packed.held = held.data();
    packed.lanes = lanes;
    packed.size = size;
    packed.books = books;
    packed.entries = entries;
  }
};

// One thread's queries: a dense table, a sparse one, a mask for each.
template <class Code>
struct Queries {
  using Of = Items<Code>;
  std::vector<float> table = std::vector<float>(kQueries * Of::books * Of::entries);
  std::vector<std::int64_t> codes;
  std::vector<float> values;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint64_t> mask = std::vector<std::uint64_t>(kQueries * Of::blocks);

  explicit Queries(std::uint64_t seed) {
    Random random(seed);
    for (float& value : table) value = random.real();
    for (std::int64_t query = 0; query < kQueries; ++query) {
      for (std::int64_t code = 0; code < Of::books * Of::entries; ++code) {
        if (random.below(40) != 0) continue;
        codes.push_back(code);
        values.push_back(random.real());
      }
      offsets.push_back(static_cast<std::int64_t>(codes.size()));
    }
    for (std::uint64_t& word : mask) word = random.next() << 20 ^ random.next();
    for (std::int64_t query = 0; query < kQueries; ++query) {
      mask[(query + 1) * Of::blocks - 1] &= (std::uint64_t{1} << (Of::size % 64)) - 1;
    }
  }
};

template <class Code>
Answer packed_search(const Items<Code>& items, const Queries<Code>& queries, recfast::code_search::Plan plan,
                     bool sparse) {
  Answer answer;
  recfast::code_search::Request request;
  if (sparse) {
    request.entries = queries.codes.data();
    request.values = queries.values.data();
    request.offsets = queries.offsets.data();
  } else {
    request.table = queries.table.data();
  }
  request.mask = queries.mask.data();
  request.mask_stride = Items<Code>::blocks;
  request.queries = kQueries;
  request.k = kBest;
  request.plan = plan;
  request.scores = answer.scores.data();
  request.found = answer.ids.data();
  std::vector<std::byte> scratch(recfast::code_search::scratch_size(items.packed, request) + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(scratch.data());
  request.scratch = scratch.data() + (64 - address % 64) % 64;
  recfast::code_search::search(items.packed, request);
  return answer;
}

template <class Code>
Answer row_search(const Items<Code>& items, const Queries<Code>& queries) {
  Answer answer;
  std::vector<std::uint8_t> mask(kQueries * Items<Code>::size);
  std::vector<std::uint8_t> live(Items<Code>::size);
  for (std::int64_t i = 0; i < Items<Code>::size; ++i) {
    const std::int64_t slot = items.slots[i];
    live[slot] = items.live[i / 64] >> (i % 64) & 1;
    for (std::int64_t query = 0; query < kQueries; ++query) {
      mask[query * Items<Code>::size + slot] =
          queries.mask[query * Items<Code>::blocks + slot / 64] >> (slot % 64) & 1;
    }
  }
  std::vector<Scored> heaps((kQueries + 1) * kBest);
  recfast::code_search::Args<Code> args;
  args.table = queries.table.data();
  args.codes = items.rows.data();
  args.live = live.data();
  args.mask = mask.data();
  args.mask_stride = Items<Code>::size;
  args.heaps = heaps;
  args.scores = answer.scores.data();
  args.found = answer.ids.data();
  args.queries = kQueries;
  args.items = Items<Code>::size;
  args.books = Items<Code>::books;
  args.entries = Items<Code>::entries;
  args.k = kBest;
  recfast::code_search::run(args);
  return answer;
}

template <class Code>
Answer posting_search(const Items<Code>& items, const Queries<Code>& queries) {
  using Of = Items<Code>;
  using recfast::code_postings::kTile;
  Answer answer;
  const std::int64_t longest = static_cast<std::int64_t>(queries.codes.size());
  std::vector<float> sums(kTile);
  std::vector<std::uint64_t> touched(kTile / 64);
  std::vector<std::uint64_t> named(Of::books * Of::entries / 64 + 1);
  std::vector<std::int64_t> cursors(longest);
  std::vector<Scored> heaps(kBest);
  recfast::code_postings::Args<Code> args;
  args.planes = items.planes.data();
  args.indptr = items.indptr.data();
  args.positions = items.positions.data();
  args.order = items.order.data();
  args.slots = items.slots.data();
  args.live = items.live.data();
  args.mask = queries.mask.data();
  args.mask_stride = Of::blocks;
  args.codes = queries.codes.data();
  args.values = queries.values.data();
  args.offsets = queries.offsets.data();
  args.sums = sums;
  args.touched = touched;
  args.named = named;
  args.cursors = cursors;
  args.heaps = heaps;
  args.scores = answer.scores.data();
  args.found = answer.ids.data();
  args.queries = kQueries;
  args.items = Of::size;
  args.books = Of::books;
  args.entries = Of::entries;
  args.longest = longest;
  args.k = kBest;
  recfast::code_postings::run(args);
  return answer;
}

// The lists of the items serve as a matrix of rows too: row = code, with scores that depend on both.
struct Rows {
  using Of = Items<std::uint8_t>;
  static constexpr std::int64_t count = Of::books * Of::entries;
  static constexpr std::int64_t width = 5;  // rows a query names
  static constexpr std::int64_t levels_each = 15;

  const Of& items;
  std::vector<float> scores = std::vector<float>(Of::size * Of::books);
  std::vector<std::int64_t> group_ptr = std::vector<std::int64_t>(count + 1);
  std::vector<std::uint64_t> present;
  std::vector<recfast::code_rows::Start> starts;
  std::vector<std::uint8_t> levels;
  std::vector<std::uint32_t> groups;
  std::vector<float> upper = std::vector<float>(count * levels_each);
  std::vector<float> lowest = std::vector<float>(count);
  recfast::code_rows::Packed packed;

  explicit Rows(const Of& of) : items(of) {
    Random random(3);
    for (float& score : scores) score = random.real();
    packed.indptr = items.indptr.data();
    packed.scores = scores.data();
    packed.group_ptr = group_ptr.data();
    packed.n_rows = count;
    packed.n_items = Of::size;
    packed.level_count = levels_each;
    recfast::code_rows::count_groups(packed, items.positions.data());
    std::int64_t longest = 0;
    for (std::int64_t row = 0; row < count; ++row) longest = std::max(longest, group_ptr[row + 1] - group_ptr[row]);
    present.resize(count * packed.chunks());
    starts.resize(count * (packed.chunks() + 1));
    levels.resize(group_ptr[count] + recfast::code_rows::kLevelPadding);
    groups.resize(group_ptr[count] + 1);
    packed.present = present.data();
    packed.starts = starts.data();
    packed.levels = levels.data();
    packed.groups = groups.data();
    packed.upper = upper.data();
    packed.lowest = lowest.data();
    std::vector<float> maxima(2 * longest);
    recfast::code_rows::fill(packed, items.positions.data(), maxima.data(), longest);
  }
};

std::vector<std::int64_t> rows_named(std::uint64_t seed) {
  Random random(seed);
  std::vector<std::int64_t> rows(kQueries * Rows::width);
  for (std::int64_t& row : rows) row = static_cast<std::int64_t>(random.below(Rows::count + 1)) - 1;
  return rows;
}

recfast::code_rows::Masks bits_of(const Queries<std::uint8_t>& queries) {
  return {.kind = recfast::code_rows::MaskKind::kBits,
          .data = reinterpret_cast<const std::uint8_t*>(queries.mask.data()),
          .stride = 8 * Rows::Of::blocks};
}

Answer packed_rows_search(const Rows& matrix, const Queries<std::uint8_t>& queries, std::uint64_t seed) {
  Answer answer;
  const std::vector<std::int64_t> rows = rows_named(seed);
  std::vector<std::byte> scratch(recfast::code_rows::scratch_bytes(matrix.packed, Rows::width, kBest) + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(scratch.data());
  recfast::code_rows::Query query;
  query.rows = rows.data();
  query.masks = bits_of(queries);
  query.scratch = scratch.data() + (64 - address % 64) % 64;
  query.out_scores = answer.scores.data();
  query.out_ids = answer.ids.data();
  query.queries = kQueries;
  query.width = Rows::width;
  query.k = kBest;
  recfast::code_rows::run(matrix.packed, query);
  return answer;
}

Answer rows_search(const Rows& matrix, const Queries<std::uint8_t>& queries, std::uint64_t seed) {
  using Of = Rows::Of;
  constexpr std::int64_t kWidth = Rows::width;
  const Of& items = matrix.items;
  const std::vector<float>& scores = matrix.scores;
  Answer answer;
  const std::vector<std::int64_t> rows = rows_named(seed);
  std::vector<float> sums(recfast::code_rows::kTile);
  std::vector<std::uint64_t> touched(recfast::code_rows::kTile / 64);
  std::vector<std::int64_t> cursors(kWidth);
  std::vector<Scored> heaps(kBest);
  recfast::code_rows::Args<std::int32_t> args;
  args.indptr = items.indptr.data();
  args.item_ids = items.positions.data();
  args.scores = scores.data();
  args.rows = rows.data();
  args.masks = bits_of(queries);
  args.sums = sums;
  args.touched = touched;
  args.cursors = cursors;
  args.heaps = heaps;
  args.out_scores = answer.scores.data();
  args.out_ids = answer.ids.data();
  args.queries = kQueries;
  args.width = kWidth;
  args.n_rows = Of::books * Of::entries;
  args.n_items = Of::size;
  args.k = kBest;
  recfast::code_rows::run(args);
  return answer;
}

template <class Code>
std::vector<Answer> all(const Items<Code>& items, const Rows* rows, int thread) {
  using recfast::code_search::Plan;
  const Queries<Code> queries(static_cast<std::uint64_t>(thread) + 1);
  std::vector<Answer> answers;
  for (const Plan plan : {Plan::kScan, Plan::kBlockMax, Plan::kScalar}) {
    answers.push_back(packed_search(items, queries, plan, false));
    answers.push_back(packed_search(items, queries, plan, true));
  }
  answers.push_back(row_search(items, queries));
  answers.push_back(posting_search(items, queries));
  if constexpr (sizeof(Code) == 1) {
    answers.push_back(rows_search(*rows, queries, static_cast<std::uint64_t>(thread) + 1));
    answers.push_back(packed_rows_search(*rows, queries, static_cast<std::uint64_t>(thread) + 1));
  }
  return answers;
}

void refuse(bool wrong, const char* what) {
  if (!wrong) return;
  std::fprintf(stderr, "concurrent_search: %s\n", what);
  std::exit(2);
}

template <class Code>
void check() {
  Items<Code> items;
  std::optional<Rows> matrix;
  if constexpr (sizeof(Code) == 1) matrix.emplace(items);
  const Rows* const rows = matrix ? &*matrix : nullptr;
  std::vector<std::vector<Answer>> wanted;
  for (int thread = 0; thread < kThreads; ++thread) {
    wanted.push_back(all(items, rows, thread));
    const std::vector<Answer>& answers = wanted.back();
    // All ways over a dense table agree, and all over a sparse one.
    for (const std::size_t other : {std::size_t{2}, std::size_t{4}, std::size_t{6}}) {
      refuse(!(answers[0] == answers[other]), "two ways to search a dense table differ");
    }
    for (const std::size_t other : {std::size_t{3}, std::size_t{5}, std::size_t{7}}) {
      refuse(!(answers[1] == answers[other]), "two ways to search a sparse table differ");
    }
    refuse(rows != nullptr && !(answers[8] == answers[9]), "two ways to add rows differ");
    refuse(thread > 0 && answers[0] == wanted[0][0], "two threads search for the same");
  }
  std::vector<int> wrong(kThreads);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&items, &wanted, &wrong, rows, thread] {
      for (int round = 0; round < kRounds; ++round) {
#ifdef RECFAST_DELIBERATE_RACE
        if (thread == 0) items.planes[static_cast<std::size_t>(round)] = Code{1};
#endif
        if (all(items, rows, thread) != wanted[static_cast<std::size_t>(thread)]) ++wrong[static_cast<std::size_t>(thread)];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  refuse(std::any_of(wrong.begin(), wrong.end(), [](int count) { return count != 0; }), "an answer has changed");
}

}  // namespace

int main() {
  check<std::uint8_t>();
  check<std::uint16_t>();
  std::puts(recfast::kIsaNames[static_cast<std::size_t>(recfast::active_isa())].data());
  return 0;
}
