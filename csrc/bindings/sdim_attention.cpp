#include "sdim_attention/sdim_attention.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

namespace sdim = recfast::sdim_attention;

sdim::Shape sdim_shape(const Named& named) {
  return {.users = named.number("users"),
          .tables = named.number("tables"),
          .bits = named.number("bits"),
          .width = named.number("width")};
}

recfast::Rows<const std::uint8_t> code_rows_of(const Named& named, std::int64_t rows, std::int64_t tables) {
  return {named.pointer<const std::uint8_t>("codes"), rows, tables, named.number("codes_stride")};
}

sdim::Events sdim_events(const Named& named, std::int64_t tables) {
  return {.codes = code_rows_of(named, 0, tables),
          .code_begin = named.pointer<const std::int64_t>("code_begin"),
          .value_begin = named.pointer<const std::int64_t>("value_begin"),
          .prefix = named.pointer<const std::int64_t>("prefix")};
}

template <class Stored, class T>
std::int64_t table(const py::kwargs& arguments) {
  const Named named(arguments);
  const sdim::Shape shape = sdim_shape(named);
  const sdim::TableArgs<Stored, T> args{
      .shape = shape,
      .events = sdim_events(named, shape.tables),
      .values = {named.pointer<const Stored>("values"), 0, shape.width, named.number("values_stride")},
      .start = named.pointer<const T>("start"),
      .table = named.pointer<T>("table")};
  py::gil_scoped_release unlocked;
  return sdim::build(args);
}

template <class Stored, class T>
void table_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const sdim::Shape shape = sdim_shape(named);
  const sdim::TableGradient<Stored, T> args{
      .shape = shape,
      .events = sdim_events(named, shape.tables),
      .dtable = named.pointer<const T>("dtable"),
      .dvalues = {named.pointer<Stored>("dvalues"), 0, shape.width, shape.width}};
  py::gil_scoped_release unlocked;
  sdim::build_backward(args);
}

template <class Stored, class T>
std::int64_t attention(const py::kwargs& arguments) {
  const Named named(arguments);
  const sdim::Shape shape = sdim_shape(named);
  const sdim::Lookup<Stored, T> args{.shape = shape,
                                     .codes = code_rows_of(named, named.number("rows"), shape.tables),
                                     .table = named.pointer<const Stored>("table"),
                                     .candidates = named.pointer<const std::int64_t>("candidates"),
                                     .normalize = named.number("normalize") != 0,
                                     .out = named.pointer<Stored>("out"),
                                     .scratch = named.pointer<T>("scratch")};
  py::gil_scoped_release unlocked;
  return sdim::lookup(args);
}

template <class Stored, class T>
void attention_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const sdim::Shape shape = sdim_shape(named);
  const std::int64_t rows = named.number("rows");
  const sdim::LookupGradient<Stored, T> args{.shape = shape,
                                             .codes = code_rows_of(named, rows, shape.tables),
                                             .table = named.pointer<const Stored>("table"),
                                             .candidates = named.pointer<const std::int64_t>("candidates"),
                                             .normalize = named.number("normalize") != 0,
                                             .grad = {named.pointer<const T>("grad"), rows, shape.width, shape.width},
                                             .dtable = named.pointer<T>("dtable")};
  py::gil_scoped_release unlocked;
  sdim::lookup_backward(args);
}

template <class Stored, class T>
sdim::Direct<Stored, T> direct_args(const Named& named) {
  const sdim::Shape shape = sdim_shape(named);
  return {.shape = shape,
          .events = sdim_events(named, shape.tables),
          .values = {named.pointer<const Stored>("values"), 0, shape.width, named.number("values_stride")},
          .query = {named.pointer<const std::uint8_t>("query"), named.number("rows"), shape.tables,
                    named.number("query_stride")},
          .candidates = named.pointer<const std::int64_t>("candidates"),
          .normalize = named.number("normalize") != 0,
          .grad = {},
          .dvalues = {},
          .scratch = named.pointer<T>("scratch")};
}

template <class Stored, class T>
py::tuple direct(const py::kwargs& arguments) {
  const Named named(arguments);
  sdim::Direct<Stored, T> args = direct_args<Stored, T>(named);
  args.out = named.pointer<T>("out");
  sdim::Faults faults;
  {
    py::gil_scoped_release unlocked;
    faults = sdim::direct(args);
  }
  return py::make_tuple(faults.codes, faults.query);
}

template <class Stored, class T>
void direct_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  sdim::Direct<Stored, T> args = direct_args<Stored, T>(named);
  args.grad = {named.pointer<const T>("grad"), args.query.rows, args.shape.width, args.shape.width};
  args.dvalues = {named.pointer<Stored>("dvalues"), 0, args.shape.width, args.shape.width};
  args.dvalue_begin = named.pointer<const std::int64_t>("dvalue_begin");
  py::gil_scoped_release unlocked;
  sdim::direct_backward(args);
}

template <class Stored, class T>
void bind_dtype(py::module_& m, const std::string& dtype) {
  m.def(("sdim_table_" + dtype).c_str(), &table<Stored, T>);
  m.def(("sdim_table_backward_" + dtype).c_str(), &table_backward<Stored, T>);
  m.def(("sdim_attention_" + dtype).c_str(), &attention<Stored, T>);
  m.def(("sdim_direct_" + dtype).c_str(), &direct<Stored, T>);
  m.def(("sdim_direct_backward_" + dtype).c_str(), &direct_backward<Stored, T>);
  m.def(("sdim_attention_backward_" + dtype).c_str(), &attention_backward<Stored, T>);
}

}  // namespace

void bind_sdim_attention(py::module_& m) {
  m.def("sdim_direct_scratch",
        [](const py::kwargs& arguments) { return sdim::direct_scratch(sdim_shape(Named(arguments))); });
  bind_dtype<float, float>(m, "float32");
  bind_dtype<std::uint16_t, float>(m, "bfloat16");
  bind_dtype<double, double>(m, "float64");
  m.def("sdim_attention_scratch",
        [](const py::kwargs& arguments) { return sdim::lookup_scratch(sdim_shape(Named(arguments))); });
}

}  // namespace recfast::bindings
