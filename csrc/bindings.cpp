// recfast._C: the kernels for the CPU. The only file that knows pybind11 (bindings_cuda.cpp is its twin for the GPU).
// Tensors arrive as addresses and sizes; dtypes, shapes and contiguity have been checked in Python by then.
#include <dlfcn.h>
#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "code_rows/code_rows.h"
#include "code_search/code_search.h"
#include "common/huge_pages.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "din_attention/din_attention.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/gather_probe.h"
#include "embedding_bag/gradient.h"
#include "embedding_bag/quantize.h"
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

recfast::embedding_bag::Table table_at(Address rows, std::int64_t count, std::int64_t width, std::int64_t stride,
                                       int format, int header) {
  return {.data = at<const std::uint8_t>(rows),
          .rows = count,
          .width = width,
          .stride = stride,
          .format = static_cast<recfast::Format>(format),
          .header = static_cast<recfast::Header>(header)};
}

// What the ids of a call stand for, made once and passed on.
recfast::embedding_bag::Lookups lookups_at(Address indices, bool wide, std::int64_t total, Address offsets,
                                           std::int64_t bags, std::int64_t rows, std::int64_t features, Address first,
                                           Address feature_rows, Address splits, bool skip_missing) {
  return {.indices = at<const void>(indices),
          .wide = wide,
          .total = total,
          .offsets = at<const std::int64_t>(offsets),
          .bags = bags,
          .rows = rows,
          .features = features,
          .feature_first = at<const std::int64_t>(first),
          .feature_rows = at<const std::int64_t>(feature_rows),
          .bag_splits = at<const std::int64_t>(splits),
          .skip_missing = skip_missing};
}

// None, or (kind, position) of what is wrong.
py::object as_object(const recfast::embedding_bag::Status& status) {
  if (status.kind == recfast::embedding_bag::Status::Kind::kDone) return py::none();
  return py::make_tuple(static_cast<int>(status.kind), status.position);
}

py::object embedding_bag(Address table, std::int64_t rows, std::int64_t width, std::int64_t stride, int format,
                         int header, Address indices, bool wide, std::int64_t total, Address offsets,
                         std::int64_t bags, std::int64_t features, Address first, Address feature_rows, Address splits,
                         bool skip_missing, Address weights, int mode, Address out, Address argmax) {
  using namespace recfast::embedding_bag;
  Status status;
  {
    py::gil_scoped_release unlocked;
    status = run({.table = table_at(table, rows, width, stride, format, header),
                  .lookups = lookups_at(indices, wide, total, offsets, bags, rows, features, first, feature_rows, splits,
                                        skip_missing),
                  .weights = at<const void>(weights),
                  .mode = static_cast<Mode>(mode),
                  .out = at<void>(out),
                  .argmax = at<std::int32_t>(argmax)});
  }
  return as_object(status);
}

// grad [bags, width] -> out [total]. The lookups have been through the forward pass.
void embedding_bag_weight_gradient(Address table, std::int64_t rows, std::int64_t width, std::int64_t stride,
                                   int format, int header, Address indices, bool wide, std::int64_t total,
                                   Address offsets, std::int64_t bags, std::int64_t features, Address first,
                                   Address feature_rows, Address splits, bool skip_missing, int mode, Address grad,
                                   Address out) {
  using namespace recfast::embedding_bag;
  py::gil_scoped_release unlocked;
  weight_gradient({.table = table_at(table, rows, width, stride, format, header),
                   .lookups = lookups_at(indices, wide, total, offsets, bags, rows, features, first, feature_rows,
                                         splits, skip_missing),
                   .weights = nullptr,
                   .mode = static_cast<Mode>(mode),
                   .out = nullptr,
                   .argmax = nullptr},
                  at<const void>(grad), at<void>(out));
}

// Scratch: row_of [total], keys [2 total], starts [total + 1], bag_of [total] (with offsets), coefficient [total]
// (weights or mean); of mode max only row_of. `out` holds zeros.
template <class T>
py::object embedding_bag_table_gradient(Address grad, std::int64_t rows, std::int64_t width, Address indices, bool wide,
                                        std::int64_t total, Address offsets, std::int64_t bags, std::int64_t features,
                                        Address first, Address feature_rows, Address splits, bool skip_missing,
                                        Address weights, int mode, Address argmax, Address row_of, Address keys,
                                        Address starts, Address bag_of, Address coefficient, Address out) {
  using namespace recfast::embedding_bag;
  const auto work = [&]() -> Status {
    py::gil_scoped_release unlocked;
    const Lookups lookups = lookups_at(indices, wide, total, offsets, bags, rows, features, first, feature_rows, splits,
                                       skip_missing);
    const Status status = check_lookups(lookups);
    if (status.kind != Status::Kind::kDone) return status;
    recfast::FirstError error;
    resolve_rows(lookups, at<std::int64_t>(row_of), error);
    if (error.position() >= 0) return {Status::Kind::kIndex, error.position()};
    if (static_cast<Mode>(mode) == Mode::kMax) {
      max_gradient(at<const T>(grad), at<const std::int32_t>(argmax), at<const std::int64_t>(row_of), bags, width,
                   at<T>(out));
      return {};
    }
    PositionGradient<T> gradient{at<const T>(grad), width, nullptr, at<const T>(weights)};
    if (offsets != 0) {
      spread_bags(lookups.offsets, bags, at<const T>(weights), static_cast<Mode>(mode) == Mode::kMean,
                  at<std::int32_t>(bag_of), at<T>(coefficient), at<const std::int64_t>(row_of), rows);
      gradient.bag_of = at<const std::int32_t>(bag_of);
      gradient.coefficient = at<const T>(coefficient);
    }
    // A missing id has row number `rows`, and so the last run, which is left out.
    auto* words = at<std::uint64_t>(keys);
    const std::uint64_t* sorted =
        recfast::sort_ids(span_at<const std::int64_t>(row_of, total), rows + 1, words, words + total, error);
    std::int64_t runs = recfast::find_runs(sorted, total, at<std::int64_t>(starts));
    if (runs > 0 && recfast::group_row(sorted[total - 1]) == rows) --runs;
    table_gradient(gradient, sorted, at<const std::int64_t>(starts), runs, at<T>(out));
    return {};
  };
  return as_object(work());
}

void bind_embedding_bag(py::module_& m) {
  m.def("embedding_bag", &embedding_bag);
  m.def("embedding_bag_weight_gradient", &embedding_bag_weight_gradient);
  m.def("embedding_bag_table_gradient_float32", &embedding_bag_table_gradient<float>);
  m.def("embedding_bag_table_gradient_float64", &embedding_bag_table_gradient<double>);
  // (flat position of the first value that is not finite or -1, how many were saturated)
  m.def("quantize", [](Address source, int source_format, std::int64_t rows, std::int64_t width, Address target,
                       std::int64_t stride, int format, Address step, bool stochastic, std::uint64_t seed) {
    recfast::embedding_bag::QuantizeOutcome outcome{};
    {
      py::gil_scoped_release unlocked;
      outcome = recfast::embedding_bag::quantize({.source = at<const void>(source),
                                                  .source_format = static_cast<recfast::Format>(source_format),
                                                  .rows = rows,
                                                  .width = width,
                                                  .target = at<std::uint8_t>(target),
                                                  .stride = stride,
                                                  .format = static_cast<recfast::Format>(format),
                                                  .step = at<const float>(step),
                                                  .stochastic = stochastic,
                                                  .seed = seed});
    }
    return py::make_tuple(outcome.not_finite, outcome.saturated);
  });
  m.def("dequantize", [](Address table, std::int64_t rows, std::int64_t width, std::int64_t stride, int format,
                         int header, Address out) {
    py::gil_scoped_release unlocked;
    recfast::embedding_bag::dequantize(table_at(table, rows, width, stride, format, header), at<float>(out));
  });
  m.def("advise_huge_pages", &recfast::advise_huge_pages);
  m.def("gather_probe", [](Address table, std::int64_t row_bytes, Address ids, std::int64_t total, std::int64_t ahead,
                           bool near) {
    py::gil_scoped_release unlocked;
    return recfast::embedding_bag::gather_probe(at<const std::uint8_t>(table), row_bytes,
                                                span_at<const std::int64_t>(ids, total), ahead, near);
  });
}

// The arguments of embedding_update come in tuples, in the order of the fields they fill.
class Fields {
 public:
  explicit Fields(const py::tuple& values) : values_(values) {}

  template <class T>
  [[nodiscard]] T next() {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(values_[at_++].cast<Address>());  // NOLINT: an address is what Python has
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(values_[at_++].cast<int>());
    } else {
      return values_[at_++].cast<T>();
    }
  }

 private:
  const py::tuple& values_;
  std::size_t at_ = 0;
};

recfast::embedding_update::Table update_table(const py::tuple& values) {
  Fields in(values);
  return {.data = in.next<std::uint8_t*>(),
          .rows = in.next<std::int64_t>(),
          .width = in.next<std::int64_t>(),
          .stride = in.next<std::int64_t>(),
          .format = in.next<recfast::Format>()};
}

recfast::embedding_update::State update_state(const py::tuple& values) {
  Fields in(values);
  return {.row = in.next<float*>(),
          .row_stride = in.next<std::int64_t>(),
          .second_column = in.next<int>(),
          .step_second_column = in.next<int>(),
          .step_first_column = in.next<int>(),
          .moment = in.next<std::uint8_t*>(),
          .moment_stride = in.next<std::int64_t>(),
          .moment_short = in.next<bool>(),
          .second = in.next<float*>()};
}

recfast::embedding_update::Call update_call(const py::tuple& lookups, const py::tuple& gradient,
                                            const py::tuple& memory) {
  using recfast::embedding_update::Phase;
  Fields ids(lookups);
  Fields grad(gradient);
  Fields kept(memory);
  return {.lookups = {.indices = ids.next<const std::uint8_t*>(),
                      .wide = ids.next<bool>(),
                      .total = ids.next<std::int64_t>(),
                      .offsets = ids.next<const std::int64_t*>(),
                      .bags = ids.next<std::int64_t>(),
                      .rows = ids.next<std::int64_t>(),
                      .features = ids.next<std::int64_t>(),
                      .feature_first = ids.next<const std::int64_t*>(),
                      .feature_rows = ids.next<const std::int64_t*>(),
                      .bag_splits = ids.next<const std::int64_t*>(),
                      .skip_missing = ids.next<bool>()},
          .grad = grad.next<const float*>(),
          .weights = grad.next<const float*>(),
          .argmax = grad.next<const std::int32_t*>(),
          .mean = grad.next<bool>(),
          .check = grad.next<bool>(),
          .phase = grad.next<Phase>(),
          .keys = kept.next<std::uint64_t*>(),
          .starts = kept.next<std::int32_t*>(),
          .counts = kept.next<std::int64_t*>(),
          .floats = kept.next<float*>(),
          .scratch = kept.next<std::uint8_t*>()};
}

recfast::embedding_update::Rule update_rule(const py::tuple& values) {
  using namespace recfast::embedding_update;
  Fields in(values);
  Rule rule{};
  rule.optimizer = in.next<Optimizer>();
  const auto lr = in.next<double>();
  const auto beta1 = in.next<double>();
  const auto beta2 = in.next<double>();
  rule.eps = in.next<float>();
  const auto decay = in.next<double>();
  const bool decoupled = in.next<bool>();
  rule.grad_scale = in.next<float>();
  rule.step_rule = in.next<StepRule>();
  rule.step_lr = in.next<float>();
  rule.step_scale = in.next<float>();
  rule.step_floor = in.next<StepFloor>();
  rule.grow = in.next<bool>();
  rule.stochastic = in.next<bool>();
  rule.seed = in.next<std::uint64_t>();
  rule.step_count = in.next<std::uint32_t>();
  rule.table_id = in.next<std::uint32_t>();

  const double time = static_cast<double>(rule.step_count) + 1.0;
  const double correction1 = 1.0 - std::pow(beta1, time);
  const double correction2 = 1.0 - std::pow(beta2, time);
  rule.lr = static_cast<float>(lr);
  rule.adam_rate = static_cast<float>(lr * std::sqrt(correction2) / correction1);
  rule.beta1 = static_cast<float>(beta1);
  rule.beta2 = static_cast<float>(beta2);
  rule.one_less_beta1 = static_cast<float>(1.0 - beta1);
  rule.one_less_beta2 = static_cast<float>(1.0 - beta2);
  rule.step_correction1 = static_cast<float>(1.0 / correction1);
  rule.step_correction2 = static_cast<float>(1.0 / correction2);
  rule.decay = decoupled ? 0.0f : static_cast<float>(decay);
  rule.keep = decoupled ? static_cast<float>(1.0 - lr * decay) : 1.0f;
  return rule;
}

// Returns (outcome, clipped values or the position of what is wrong).
py::tuple embedding_update(const py::tuple& table, const py::tuple& state, const py::tuple& lookups,
                           const py::tuple& gradient, const py::tuple& rule, const py::tuple& memory) {
  const auto table_args = update_table(table);
  const auto state_args = update_state(state);
  const auto rule_args = update_rule(rule);
  const auto call = update_call(lookups, gradient, memory);
  recfast::embedding_update::Result result;
  {
    py::gil_scoped_release unlocked;
    result = recfast::embedding_update::run(table_args, state_args, rule_args, call);
  }
  return py::make_tuple(static_cast<int>(result.outcome), result.value);
}

// Returns (outcome, position of what is wrong, the gradient).
py::tuple embedding_step_gradient(const py::tuple& table, const py::tuple& lookups, const py::tuple& gradient,
                                  const py::tuple& rule, const py::tuple& memory) {
  const auto table_args = update_table(table);
  const auto rule_args = update_rule(rule);
  const auto call = update_call(lookups, gradient, memory);
  double sum = 0.0;
  recfast::embedding_update::Result result;
  {
    py::gil_scoped_release unlocked;
    result = recfast::embedding_update::table_step_gradient(table_args, rule_args, call, &sum);
  }
  return py::make_tuple(static_cast<int>(result.outcome), result.value, sum);
}

std::int64_t requantize(const py::tuple& table, const py::tuple& lookups, const py::tuple& gradient,
                        const py::tuple& rule, const py::tuple& memory, float step) {
  const auto table_args = update_table(table);
  const auto rule_args = update_rule(rule);
  const auto call = update_call(lookups, gradient, memory);
  py::gil_scoped_release unlocked;
  return recfast::embedding_update::requantize(table_args, rule_args, step, call);
}

void bind_embedding_update(py::module_& m) {
  m.def("embedding_update", &embedding_update);
  m.def("embedding_step_gradient", &embedding_step_gradient);
  m.def("requantize", &requantize);
  m.def("embedding_update_scratch", &recfast::embedding_update::scratch_bytes);
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
