// Failing system calls as exceptions that carry errno (the bindings turn them into OSError).
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace elasticmoe {

[[noreturn]] inline void throw_errno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

}  // namespace elasticmoe
