// The memory of tensors: every pointer to it is asked for here, and nowhere else.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <ostream>

namespace rose {

using torch::stable::Tensor;

// What an argument is called: its name, and its place if it is one of a list.
struct Argument {
  Argument(const char* name, int64_t index = -1) : name(name), index(index) {}

  const char* name;
  int64_t index;
};

std::ostream& operator<<(std::ostream& out, const Argument& argument);

enum class Use { kRead, kWrite };

// Raises unless the storage has all elements: it may have been freed or made smaller since.
void* memory_of(const Tensor& tensor, const Argument& argument, Use use);

template <typename T>
const T* read_from(const Tensor& tensor, const Argument& argument) {
  return static_cast<const T*>(memory_of(tensor, argument, Use::kRead));
}
template <typename T>
T* write_to(const Tensor& tensor, const Argument& argument = "a workspace") {
  return static_cast<T*>(memory_of(tensor, argument, Use::kWrite));
}

}  // namespace rose
