#include "bindings/bindings.h"

#include "common/huge_pages.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/gather_probe.h"
#include "embedding_bag/gradient.h"
#include "embedding_bag/quantize.h"

namespace recfast::bindings {
namespace {

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

}  // namespace

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

}  // namespace recfast::bindings
