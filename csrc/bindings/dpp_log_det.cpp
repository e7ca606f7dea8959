#include "dpp_log_det/dpp_log_det.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

template <class T>
void log_det(std::int64_t lists, std::int64_t picks, std::int64_t width, double gamma, Address features,
             Address lengths, Address mask, Address log_dets, Address solved, Address scratch) {
  py::gil_scoped_release unlocked;
  recfast::dpp_log_det::run(recfast::dpp_log_det::Args<T>{.lists = lists,
                                                          .picks = picks,
                                                          .width = width,
                                                          .gamma = gamma,
                                                          .features = at<const T>(features),
                                                          .lengths = at<const std::int64_t>(lengths),
                                                          .mask = at<const bool>(mask),
                                                          .log_det = at<T>(log_dets),
                                                          .solved = at<T>(solved),
                                                          .scratch = at<std::byte>((scratch + 63) / 64 * 64)});
}

}  // namespace

void bind_dpp_log_det(py::module_& m) {
  m.def("dpp_log_det_float32", &log_det<float>);
  m.def("dpp_log_det_float64", &log_det<double>);
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("dpp_log_det_scratch", &recfast::dpp_log_det::scratch_bytes);
}

}  // namespace recfast::bindings
