// What all modules share: numbers from Python that must not be negative, and system errors as OSError.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <limits>
#include <string>
#include <system_error>

#include "core/checked.h"

namespace elasticmoe::bindings {

namespace nb = nanobind;

// Sizes and counts come as signed numbers, so that a negative one is a ValueError rather than a TypeError.
template <typename Number = uint64_t>
Number natural(const char* name, int64_t value) {
  if (value < 0) invalid(std::string(name) + " must not be negative");
  if constexpr (sizeof(Number) < sizeof(int64_t)) {
    require_range(name, static_cast<uint64_t>(value), 0, std::numeric_limits<Number>::max());
  }
  return static_cast<Number>(value);
}

inline int descriptor(int64_t fd) {
  if (fd < 0 || fd > std::numeric_limits<int>::max()) invalid("fd is out of range");
  return static_cast<int>(fd);
}

inline void raise_os_error(const std::system_error& error) {
  // OSError picks the subclass (TimeoutError, PermissionError …) by errno when called with (errno, text).
  nb::object arguments = nb::make_tuple(error.code().value(), error.what());
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

inline void register_system_error() {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      raise_os_error(error);
    }
  });
}

// Runs `work` without the GIL. If a signal cut it short (EINTR), lets Python handle the signal and runs it again.
template <typename Work>
void without_gil(Work work) {
  for (;;) {
    try {
      nb::gil_scoped_release released;
      work();
      return;
    } catch (const std::system_error& error) {
      if (error.code().value() != EINTR) throw;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

}  // namespace elasticmoe::bindings
