// Arguments of attention kernels by name; place() and sequences() of ops/_histories.py give them.
#pragma once

#include <string>

#include "bindings/bindings.h"
#include "common/heads.h"

namespace recfast::bindings {

// `name` and its strides `name`_batch, `name`_row and `name`_head.
template <class S>
Heads<S> heads_of(const Named& named, const std::string& name) {
  return {named.pointer<S>(name.c_str()), named.number((name + "_batch").c_str()),
          named.number((name + "_row").c_str()), named.number((name + "_head").c_str())};
}

inline Sequences sequences_of(const Named& named) {
  return {named.number("sequences"), named.pointer<const std::int64_t>("offsets"),
          named.pointer<const std::int64_t>("lengths")};
}

}  // namespace recfast::bindings
