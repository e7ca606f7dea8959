#include "bindings/bindings.h"

#include <cmath>
#include <cstddef>

#include "embedding_update/embedding_update.h"
#include "embedding_update/update_probe.h"

namespace recfast::bindings {
namespace {

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

}  // namespace

void bind_embedding_update(py::module_& m) {
  m.def("embedding_update", &embedding_update);
  m.def("embedding_step_gradient", &embedding_step_gradient);
  m.def("requantize", &requantize);
  m.def("embedding_update_scratch", &recfast::embedding_update::scratch_bytes);
  m.def("update_probe", [](Address table, std::int64_t row_bytes, Address state, std::int64_t state_bytes,
                           Address rows, std::int64_t count, std::int64_t ahead) {
    py::gil_scoped_release unlocked;
    recfast::embedding_update::update_probe(at<std::uint8_t>(table), row_bytes, at<std::uint8_t>(state), state_bytes,
                                            span_at<const std::int64_t>(rows, count), ahead);
  });
  m.def("embedding_update_buffer", &recfast::embedding_update::buffer_floats);
}

}  // namespace recfast::bindings
