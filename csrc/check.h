// Errors of the operators: a RuntimeError in Python whose text is the message alone. (STD_TORCH_CHECK
// starts its own with the function, and the path that the source had on the machine of the build.)
#pragma once

#include <sstream>
#include <stdexcept>

namespace rose {

template <typename... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace rose

// The parts of the message are evaluated only if `condition` is false.
#define ROSE_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::rose::fail(__VA_ARGS__); \
  } while (false)
