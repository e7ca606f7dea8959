// recfast._C: the kernels for the CPU. The only file that knows pybind11 (bindings_cuda.cpp is its twin for the GPU).
// Tensors arrive as addresses and sizes; dtypes, shapes and contiguity have been checked in Python by then.
#include <dlfcn.h>
#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "code_rows/code_rows.h"
#include "code_search/code_search.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "din_attention/din_attention.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/gather_probe.h"
#include "embedding_bag/gradient.h"
#include "embedding_update/embedding_update.h"
#include "dpp_greedy/dpp_greedy.h"
#include "example_axpy/example_axpy.h"
#include "id_map/id_map.h"
#include "initial_rows/initial_rows.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: an address is what Python has
}

template <class T>
std::span<T> span_at(Address address, std::int64_t size) {
  return {at<T>(address), static_cast<std::size_t>(size)};
}

recfast::Isa isa_by_name(const std::string& name) {
  for (std::size_t level = 0; level < recfast::kIsaNames.size(); ++level) {
    if (recfast::kIsaNames[level] == name) return static_cast<recfast::Isa>(level);
  }
  throw std::invalid_argument("set_isa: level must be one of scalar, avx2, avx512, got " + name);
}

std::string isa_name(recfast::Isa level) { return std::string(recfast::kIsaNames[static_cast<std::size_t>(level)]); }

// The file of the OpenMP runtime that this module was bound to. torch's own must be the same one, or
// torch.set_num_threads would not reach these kernels.
std::string openmp_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) == 0 || info.dli_fname == nullptr) return "";
  return info.dli_fname;
}

void bind_runtime(py::module_& m) {
  m.attr("__version__") = RECFAST_VERSION;
  m.def("isa", [] { return isa_name(recfast::active_isa()); });
  m.def("detected_isa", [] { return isa_name(recfast::detected_isa()); });
  m.def("has_vbmi", &recfast::has_vbmi);
  m.def("set_isa", [](const std::string& name) { recfast::set_isa(isa_by_name(name)); });
  m.def("max_threads", &recfast::max_threads);
  m.def("set_threads", [](int threads) { omp_set_num_threads(threads); });
  m.def("openmp_library", &openmp_library);
  // The generator itself, so that a test can hold it against the published answers.
  m.def("philox4x32", [](std::uint64_t seed, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
    std::uint32_t words[4];
    recfast::Philox{seed}(c0, c1, c2, c3, words);
    return py::make_tuple(words[0], words[1], words[2], words[3]);
  });
}

// What stays the same however the users are cut: one struct instead of a dozen numbers in a row.
struct DppShape {
  std::int64_t users, items, width, picks, shown_width, window;
  double gamma;
  int exhausted;
  bool exact;
};

template <class T>
py::tuple dpp(const DppShape& shape, Address features, std::int64_t user_stride, Address relevance, Address weight,
              Address lengths, Address mask, Address shown, Address indices, Address count, Address gains,
              Address log_det, Address scratch) {
  using namespace recfast::dpp_greedy;
  Outcome outcome;
  {
    py::gil_scoped_release unlocked;
    outcome = run(Args<T>{.users = shape.users,
                          .items = shape.items,
                          .width = shape.width,
                          .picks = shape.picks,
                          .shown_width = shape.shown_width,
                          .window = shape.window,
                          .gamma = shape.gamma,
                          .exhausted = static_cast<Exhausted>(shape.exhausted),
                          .exact = shape.exact,
                          .features = at<const T>(features),
                          .user_stride = user_stride,
                          .relevance = at<const double>(relevance),
                          .weight = at<const double>(weight),
                          .lengths = at<const std::int64_t>(lengths),
                          .mask = at<const bool>(mask),
                          .shown = at<const std::int64_t>(shown),
                          .indices = at<std::int64_t>(indices),
                          .count = at<std::int64_t>(count),
                          .gains = at<double>(gains),
                          .log_det = at<double>(log_det),
                          .scratch = at<std::byte>((scratch + 63) / 64 * 64)});
  }
  return py::make_tuple(outcome.wrong_feature, outcome.wrong_relevance);
}

void bind_dpp_greedy(py::module_& m) {
  py::class_<DppShape>(m, "DppShape")
      .def(py::init([](std::int64_t users, std::int64_t items, std::int64_t width, std::int64_t picks,
                       std::int64_t shown_width, std::int64_t window, double gamma, int exhausted, bool exact) {
        return DppShape{users, items, width, picks, shown_width, window, gamma, exhausted, exact};
      }));
  m.def("dpp_greedy_float32", &dpp<float>);
  m.def("dpp_greedy_float64", &dpp<double>);
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("dpp_greedy_scratch", &recfast::dpp_greedy::scratch_bytes);
}

template <class T>
void axpy(Address x, Address y, Address out, std::int64_t size, T alpha) {
  using namespace recfast::example_axpy;
  py::gil_scoped_release unlocked;
  run(Args<T>{.x = span_at<const T>(x, size), .y = span_at<const T>(y, size), .out = span_at<T>(out, size), .alpha = alpha});
}

void bind_example_axpy(py::module_& m) {
  m.def("example_axpy_float32", &axpy<float>);
  m.def("example_axpy_float64", &axpy<double>);
}

template <class Id>
py::tuple code_rows(Address indptr, Address item_ids, Address scores, Address rows, Address weights,
                                   Address mask, std::int64_t mask_stride, Address sums, Address touched,
                                   Address cursors, Address heaps, std::int64_t threads, Address out_scores,
                                   Address out_ids, std::int64_t queries, std::int64_t width, std::int64_t n_rows,
                                   std::int64_t n_items, std::int64_t k, bool all) {
  using namespace recfast::code_rows;
  const Args<Id> args{.indptr = at<const std::int64_t>(indptr),
                      .item_ids = at<const Id>(item_ids),
                      .scores = at<const float>(scores),
                      .rows = at<const std::int64_t>(rows),
                      .weights = at<const float>(weights),
                      .mask = at<const std::uint8_t>(mask),
                      .mask_stride = mask_stride,
                      .sums = span_at<float>(sums, threads * kTile),
                      .touched = span_at<std::uint64_t>(touched, threads * kTile / 64),
                      .cursors = span_at<std::int64_t>(cursors, threads * width),
                      .heaps = span_at<recfast::Scored>(heaps, threads * std::min(k, n_items)),
                      .out_scores = at<float>(out_scores),
                      .out_ids = at<std::int64_t>(out_ids),
                      .queries = queries,
                      .width = width,
                      .n_rows = n_rows,
                      .n_items = n_items,
                      .k = k};
  Faults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = check(args, all);
    if (std::max({faults.rows, faults.weights, faults.outside, faults.unsorted, faults.scores}) < 0) run(args);
  }
  return py::make_tuple(faults.rows, faults.weights, faults.outside, faults.unsorted, faults.scores);
}

void bind_code_rows(py::module_& m) {
  m.attr("CODE_ROWS_TILE") = recfast::code_rows::kTile;
  m.def("code_rows_int32", &code_rows<std::int32_t>);
  m.def("code_rows_int64", &code_rows<std::int64_t>);
}

template <class Code>
py::tuple code_search(Address codes, Address table, Address bias, Address ids, Address live, Address mask,
                                     std::int64_t mask_stride, Address heaps, std::int64_t n_heaps, Address scores,
                                     Address found, std::int64_t queries, std::int64_t items, std::int64_t books,
                                     std::int64_t entries, std::int64_t k, bool all) {
  using namespace recfast::code_search;
  const Args<Code> args{.table = at<const float>(table),
                        .codes = at<const Code>(codes),
                        .bias = at<const float>(bias),
                        .ids = at<const std::int64_t>(ids),
                        .live = at<const std::uint8_t>(live),
                        .mask = at<const std::uint8_t>(mask),
                        .mask_stride = mask_stride,
                        .heaps = span_at<recfast::Scored>(heaps, n_heaps * std::min(k, items)),
                        .scores = at<float>(scores),
                        .found = at<std::int64_t>(found),
                        .queries = queries,
                        .items = items,
                        .books = books,
                        .entries = entries,
                        .k = k};
  Faults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = check(args, all);
    if (std::max({faults.table, faults.codes, faults.bias}) < 0) run(args);
  }
  return py::make_tuple(faults.table, faults.codes, faults.bias);
}

void bind_code_search(py::module_& m) {
  m.def("code_search_heaps",
        [](std::int64_t queries, std::int64_t items) { return recfast::code_search::plan(queries, items).heaps; });
  m.def("code_search_uint8", &code_search<std::uint8_t>);
  m.def("code_search_uint16", &code_search<std::uint16_t>);
}

// Arguments by name, for ops with too many to count: a missing one raises KeyError.
class Named {
 public:
  explicit Named(const py::kwargs& arguments) : arguments_(arguments) {}

  [[nodiscard]] std::int64_t number(const char* name) const { return arguments_[name].cast<std::int64_t>(); }

  // A tensor's address; 0 gives the null pointer.
  template <class T>
  [[nodiscard]] T* pointer(const char* name) const {
    return at<T>(arguments_[name].cast<Address>());
  }

 private:
  const py::kwargs& arguments_;
};

recfast::din_attention::Shape din_shape(const Named& named) {
  return {.users = named.number("users"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .hidden1 = named.number("hidden1"),
          .hidden2 = named.number("hidden2"),
          .longest = named.number("longest")};
}

template <class T>
recfast::din_attention::Args<T> din_args(const Named& named) {
  using namespace recfast::din_attention;
  const Shape shape = din_shape(named);
  const std::int64_t candidates = named.number("candidate_rows");
  return {.shape = shape,
          .activation = static_cast<Activation>(named.number("activation")),
          .mode = static_cast<Mode>(named.number("mode")),
          .query = {named.pointer<const T>("query"), candidates, shape.dim, named.number("query_stride")},
          .keys = {named.pointer<const T>("keys"), 0, shape.dim, named.number("keys_stride")},
          .values = {named.pointer<const T>("values"), 0, shape.value_dim, named.number("values_stride")},
          .begin = named.pointer<const std::int64_t>("begin"),
          .end = named.pointer<const std::int64_t>("end"),
          .candidates = named.pointer<const std::int64_t>("candidates"),
          .weights = {named.pointer<const T>("w1"), named.pointer<const T>("b1"), named.pointer<const T>("w2"),
                      named.pointer<const T>("b2"), named.pointer<const T>("w3"), named.pointer<const T>("b3"),
                      named.pointer<const T>("slope")},
          .out = {named.pointer<T>("out"), candidates, shape.value_dim, shape.value_dim},
          .lse = named.pointer<T>("lse"),
          .scratch = named.pointer<T>("scratch")};
}

template <class T>
void din_forward(const py::kwargs& arguments) {
  const auto args = din_args<T>(Named(arguments));
  py::gil_scoped_release unlocked;
  recfast::din_attention::forward(args);
}

template <class T>
void din_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = din_args<T>(named);
  const recfast::Rows<T> keys{named.pointer<T>("dkeys"), 0, args.shape.dim, args.shape.dim};
  const recfast::din_attention::Gradients<T> gradients{
      .grad = {named.pointer<const T>("grad"), args.query.rows, args.shape.value_dim, args.shape.value_dim},
      .query = {named.pointer<T>("dquery"), args.query.rows, args.shape.dim, args.shape.dim},
      .keys = keys,
      .values = {named.pointer<T>("dvalues"), 0, args.shape.value_dim, args.shape.value_dim},
      .weights = {named.pointer<T>("dw1"), named.pointer<T>("db1"), named.pointer<T>("dw2"), named.pointer<T>("db2"),
                  named.pointer<T>("dw3"), named.pointer<T>("db3"), named.pointer<T>("dslope")}};
  py::gil_scoped_release unlocked;
  recfast::din_attention::backward(args, gradients);
}

void bind_din_attention(py::module_& m) {
  m.def("din_attention_forward_float32", &din_forward<float>);
  m.def("din_attention_forward_float64", &din_forward<double>);
  m.def("din_attention_backward_float32", &din_backward<float>);
  m.def("din_attention_backward_float64", &din_backward<double>);
  m.def("din_attention_scratch", [](bool backward, const py::kwargs& arguments) {
    return recfast::din_attention::scratch_size(din_shape(Named(arguments)), backward);
  });
  // (the first wrong position or -1, the longest list)
  m.def("din_attention_check_offsets", [](Address offsets, std::int64_t size, std::int64_t total) {
    std::int64_t longest = 0;
    const std::int64_t wrong =
        recfast::din_attention::check_offsets(span_at<const std::int64_t>(offsets, size), total, longest);
    return py::make_tuple(wrong, longest);
  });
}

template <class Value, class Index>
recfast::embedding_bag::Args<Value, Index> bag_args(Address table, Address step, std::int64_t rows, std::int64_t width,
                                                    Address indices, std::int64_t total, Address offsets,
                                                    std::int64_t bags, Address weights, bool mean, Address out) {
  using recfast::embedding_bag::Real;
  return {.table = {at<const Value>(table), rows, width, width},
          .step = at<const float>(step),
          .indices = span_at<const Index>(indices, total),
          .offsets = at<const std::int64_t>(offsets),
          .bags = bags,
          .weights = at<const Real<Value>>(weights),
          .mean = mean,
          .out = at<Real<Value>>(out)};
}

// -1: done. p >= 0: indices[p] is wrong. -2 - p: offsets[p] is wrong.
template <class Value, class Index>
std::int64_t embedding_bag(Address table, Address step, std::int64_t rows, std::int64_t width, Address indices,
                           std::int64_t total, Address offsets, std::int64_t bags, Address weights, bool mean,
                           Address out) {
  py::gil_scoped_release unlocked;
  const auto status = recfast::embedding_bag::run(
      bag_args<Value, Index>(table, step, rows, width, indices, total, offsets, bags, weights, mean, out));
  return status.bad_offset >= 0 ? -2 - status.bad_offset : status.bad_index;
}

// grad [bags, width] -> out [total]
template <class Value, class Index>
void embedding_bag_weight_gradient(Address table, Address step, std::int64_t rows, std::int64_t width, Address indices,
                                   std::int64_t total, Address offsets, std::int64_t bags, bool mean, Address grad,
                                   Address out) {
  using recfast::embedding_bag::Real;
  py::gil_scoped_release unlocked;
  recfast::embedding_bag::weight_gradient(
      bag_args<Value, Index>(table, step, rows, width, indices, total, offsets, bags, 0, mean, 0),
      at<const Real<Value>>(grad), at<Real<Value>>(out));
}

// Scratch: keys [2 total], starts [total + 1], bag_of [total] (with offsets), coefficient [total] (weights or mean).
// Returns -1, or the position of the first id outside the table.
template <class T, class Index>
std::int64_t embedding_bag_table_gradient(Address grad, std::int64_t rows, std::int64_t width, Address indices,
                                          std::int64_t total, Address offsets, std::int64_t bags, Address weights,
                                          bool mean, Address keys, Address starts, Address bag_of, Address coefficient,
                                          Address out) {
  using namespace recfast::embedding_bag;
  py::gil_scoped_release unlocked;
  recfast::FirstError error;
  auto* words = at<std::uint64_t>(keys);
  const auto ids = span_at<const Index>(indices, total);
  const std::uint64_t* sorted = recfast::sort_ids(ids, rows, words, words + total, error);
  if (error.position() >= 0) return error.position();
  PositionGradient<T> gradient{at<const T>(grad), width, nullptr, at<const T>(weights)};
  if (offsets != 0) {
    spread_bags(at<const std::int64_t>(offsets), bags, at<const T>(weights), mean, at<std::int32_t>(bag_of),
                at<T>(coefficient));
    gradient.bag_of = at<const std::int32_t>(bag_of);
    gradient.coefficient = at<const T>(coefficient);
  }
  const std::int64_t runs = recfast::find_runs(sorted, total, at<std::int64_t>(starts));
  table_gradient(gradient, sorted, at<const std::int64_t>(starts), runs, at<T>(out));
  return -1;
}

void bind_embedding_bag(py::module_& m) {
  m.def("embedding_bag_float32_int32", &embedding_bag<float, std::int32_t>);
  m.def("embedding_bag_float32_int64", &embedding_bag<float, std::int64_t>);
  m.def("embedding_bag_float64_int32", &embedding_bag<double, std::int32_t>);
  m.def("embedding_bag_float64_int64", &embedding_bag<double, std::int64_t>);
  m.def("embedding_bag_int8_int32", &embedding_bag<std::int8_t, std::int32_t>);
  m.def("embedding_bag_int8_int64", &embedding_bag<std::int8_t, std::int64_t>);
  m.def("embedding_bag_weight_gradient_float32_int32", &embedding_bag_weight_gradient<float, std::int32_t>);
  m.def("embedding_bag_weight_gradient_float32_int64", &embedding_bag_weight_gradient<float, std::int64_t>);
  m.def("embedding_bag_weight_gradient_float64_int32", &embedding_bag_weight_gradient<double, std::int32_t>);
  m.def("embedding_bag_weight_gradient_float64_int64", &embedding_bag_weight_gradient<double, std::int64_t>);
  m.def("embedding_bag_weight_gradient_int8_int32", &embedding_bag_weight_gradient<std::int8_t, std::int32_t>);
  m.def("embedding_bag_weight_gradient_int8_int64", &embedding_bag_weight_gradient<std::int8_t, std::int64_t>);
  m.def("embedding_bag_table_gradient_float32_int32", &embedding_bag_table_gradient<float, std::int32_t>);
  m.def("embedding_bag_table_gradient_float32_int64", &embedding_bag_table_gradient<float, std::int64_t>);
  m.def("embedding_bag_table_gradient_float64_int32", &embedding_bag_table_gradient<double, std::int32_t>);
  m.def("embedding_bag_table_gradient_float64_int64", &embedding_bag_table_gradient<double, std::int64_t>);
  m.def("gather_probe", [](Address table, std::int64_t row_bytes, Address ids, std::int64_t total, std::int64_t ahead,
                           bool near) {
    py::gil_scoped_release unlocked;
    return recfast::embedding_bag::gather_probe(at<const std::uint8_t>(table), row_bytes,
                                                span_at<const std::int64_t>(ids, total), ahead, near);
  });
}

enum UpdateOutcome { kUpdated, kBadIndex, kBadOffset, kBadGradient, kBadWeight };

// Scratch: as for the table gradient, and rows [max_threads, 2 * padded(width)]. Nothing is written to the table unless
// all arguments are sound. Returns (outcome, clipped codes or the position of what is wrong).
template <class Value, class Index>
py::tuple embedding_update(Address table, Address step, Address moment, Address step_moment, std::int64_t rows,
                           std::int64_t width, Address indices, std::int64_t total, Address offsets, std::int64_t bags,
                           Address grad, Address weights, bool mean, int optimizer, float lr, float eps,
                           float weight_decay, float grad_scale, int step_rule, float step_lr, float step_scale,
                           bool grow, bool stochastic, std::uint64_t seed, std::uint32_t step_count,
                           std::uint32_t table_id, bool check, Address keys, Address starts, Address bag_of,
                           Address coefficient, Address scratch) {
  using namespace recfast::embedding_update;
  const auto work = [&]() -> std::pair<UpdateOutcome, std::int64_t> {
    py::gil_scoped_release unlocked;
    if (offsets != 0) {
      const auto* o = at<const std::int64_t>(offsets);
      const std::int64_t wrong = recfast::embedding_bag::first_bad_offset(o, bags, total);
      if (wrong >= 0) return {kBadOffset, wrong};
    }
    recfast::FirstError error;
    auto* words = at<std::uint64_t>(keys);
    const auto ids = span_at<const Index>(indices, total);
    const std::uint64_t* sorted = recfast::sort_ids(ids, rows, words, words + total, error);
    if (error.position() >= 0) return {kBadIndex, error.position()};
    if (check) {
      std::int64_t wrong = first_not_finite(at<const float>(grad), bags * width);
      if (wrong >= 0) return {kBadGradient, wrong};
      wrong = weights == 0 ? -1 : first_not_finite(at<const float>(weights), total);
      if (wrong >= 0) return {kBadWeight, wrong};
    }
    recfast::embedding_bag::PositionGradient<float> gradient{at<const float>(grad), width, nullptr,
                                                             at<const float>(weights)};
    if (offsets != 0) {
      recfast::embedding_bag::spread_bags(at<const std::int64_t>(offsets), bags, at<const float>(weights), mean,
                                          at<std::int32_t>(bag_of), at<float>(coefficient));
      gradient.bag_of = at<const std::int32_t>(bag_of);
      gradient.coefficient = at<const float>(coefficient);
    }
    const std::int64_t runs = recfast::find_runs(sorted, total, at<std::int64_t>(starts));
    return {kUpdated, run(Args<Value>{.table = {at<Value>(table), rows, width, width},
                                      .step = at<float>(step),
                                      .moment = at<float>(moment),
                                      .step_moment = at<float>(step_moment),
                                      .gradient = gradient,
                                      .sorted = sorted,
                                      .starts = at<const std::int64_t>(starts),
                                      .runs = runs,
                                      .optimizer = static_cast<Optimizer>(optimizer),
                                      .lr = lr,
                                      .eps = eps,
                                      .weight_decay = weight_decay,
                                      .grad_scale = grad_scale,
                                      .step_rule = static_cast<StepRule>(step_rule),
                                      .step_lr = step_lr,
                                      .step_scale = step_scale,
                                      .grow = grow,
                                      .stochastic = stochastic,
                                      .seed = seed,
                                      .step_count = step_count,
                                      .table_id = table_id,
                                      .scratch = at<float>(scratch)})};
  };
  const auto [outcome, value] = work();
  return py::make_tuple(static_cast<int>(outcome), value);
}

void bind_embedding_update(py::module_& m) {
  m.def("embedding_update_float32_int32", &embedding_update<float, std::int32_t>);
  m.def("embedding_update_float32_int64", &embedding_update<float, std::int64_t>);
  m.def("embedding_update_int8_int32", &embedding_update<std::int8_t, std::int32_t>);
  m.def("embedding_update_int8_int64", &embedding_update<std::int8_t, std::int64_t>);
}

template <class S, class T>
recfast::id_map::Map<S, T> id_map(Address slots, Address seen, std::int64_t size) {
  return {.slots = span_at<S>(slots, size), .seen = span_at<T>(seen, seen == 0 ? 0 : size)};
}

void bind_id_map(py::module_& m) {
  using namespace recfast::id_map;
  m.attr("ID_MAP_MAX_ROWS") = kMaxRows;
  m.def("id_map_find",
        [](Address slots, std::int64_t size, Address ids, std::int64_t total, bool slot_numbers, Address out) {
          py::gil_scoped_release unlocked;
          find({.map = id_map<const Slot, const std::int32_t>(slots, 0, size),
                .ids = span_at<const std::int64_t>(ids, total),
                .slot_numbers = slot_numbers,
                .out = at<std::int64_t>(out)});
        });
  // Returns (reached, slots taken, free rows left, next row, admitted, late).
  m.def("id_map_observe",
        [](Address slots, Address seen, std::int64_t size, Address ids, std::int64_t total, std::int64_t first,
           std::int32_t now, std::int64_t min_count, std::int64_t taken, std::int64_t limit, Address free_rows,
           std::int64_t free, std::int64_t next_row, std::int64_t max_rows, Address out, Address admitted) {
          Observed done{};
          {
            py::gil_scoped_release unlocked;
            done = observe({.map = id_map<Slot, std::int32_t>(slots, seen, size),
                            .ids = span_at<const std::int64_t>(ids, total),
                            .first = first,
                            .now = now,
                            .min_count = min_count,
                            .size = taken,
                            .limit = limit,
                            .free_rows = at<const std::int64_t>(free_rows),
                            .free = free,
                            .next_row = next_row,
                            .max_rows = max_rows,
                            .out = at<std::int64_t>(out),
                            .admitted = at<std::int64_t>(admitted)});
          }
          return py::make_tuple(done.reached, done.size, done.free, done.next_row, done.admitted, done.late);
        });
  // Returns (ids kept, rows freed).
  m.def("id_map_rebuild", [](Address slots, Address seen, std::int64_t size, Address new_slots, Address new_seen,
                             std::int64_t new_size, std::int32_t before, Address freed) {
    Rebuilt done{};
    {
      py::gil_scoped_release unlocked;
      done = rebuild({.from = id_map<const Slot, const std::int32_t>(slots, seen, size),
                      .to = id_map<Slot, std::int32_t>(new_slots, new_seen, new_size),
                      .before = before,
                      .freed = at<std::int64_t>(freed)});
    }
    return py::make_tuple(done.kept, done.freed);
  });
}

void bind_initial_rows(py::module_& m) {
  m.def("initial_rows", [](Address ids, std::int64_t total, std::int64_t width, double deviation, std::uint64_t seed,
                           bool uniform, Address out) {
    using namespace recfast::initial_rows;
    py::gil_scoped_release unlocked;
    run({.ids = span_at<const std::int64_t>(ids, total),
         .width = width,
         .kind = uniform ? Kind::kUniform : Kind::kNormal,
         .scale = static_cast<float>(deviation / (uniform ? kUniformDeviation : kNormalDeviation)),
         .seed = seed,
         .out = at<float>(out)});
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "recfast kernels for the CPU; no torch symbol is needed to load them";
  bind_runtime(m);
  bind_code_rows(m);
  bind_code_search(m);
  bind_dpp_greedy(m);
  bind_example_axpy(m);
  bind_din_attention(m);
  bind_embedding_bag(m);
  bind_embedding_update(m);
  bind_id_map(m);
  bind_initial_rows(m);
}
