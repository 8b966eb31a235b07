// What the bindings accept: every check on an argument, with the argument's name in the message.
// All of it happens before the first CUDA call, so a refusal needs no GPU.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "params.h"

namespace fastdpo {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& what) {
  throw py::value_error(std::string(name) + " should " + what);
}

inline int64_t integer(const py::int_& value, const char* name, int64_t least, int64_t most) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) refuse(name, "fit in 64 bits, got " + py::str(value).cast<std::string>());
  if (number < least || number > most) {
    refuse(name, "be between " + std::to_string(least) + " and " + std::to_string(most) + ", got " +
                     std::to_string(number));
  }
  return number;
}

constexpr int64_t kMostElements = std::numeric_limits<int64_t>::max();
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostColumns =
    int64_t{1} << 30;  // columns are counted in 32 bits, with room for one stretch more

inline int64_t count(const py::int_& value, const char* name) {
  return integer(value, name, 0, kMostElements);
}
inline int columns(const py::int_& value, const char* name) {
  return static_cast<int>(integer(value, name, 1, kMostColumns));
}

inline DType dtype(const py::int_& value, const char* name) {
  const int64_t tag = integer(value, name, std::numeric_limits<int64_t>::min(), kMostElements);
  if (tag < 0 || tag > 2) {
    refuse(name, "be the tag 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(tag));
  }
  return static_cast<DType>(tag);
}

inline float number(double value, const char* name) {
  if (!std::isfinite(value) || std::fabs(value) > std::numeric_limits<float>::max()) {
    refuse(name, "be a finite float32, got " + std::to_string(value));
  }
  return static_cast<float>(value);
}

// The address of a device array whose elements have `size` bytes, or null where `optional` and 0.
template <class T>
T* pointer(const py::int_& value, const char* name, int64_t size, bool optional = false) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    refuse(name, "be an address, got " + py::str(value).cast<std::string>());
  }
  if (address == 0) {
    if (optional) return nullptr;
    refuse(name, "be an address, got the null pointer");
  }
  if (address % static_cast<unsigned long long>(size) != 0) {
    refuse(name, "be a multiple of the element's " + std::to_string(size) + " bytes, got " +
                     std::to_string(address));
  }
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

template <class T>
T* array(const py::int_& value, const char* name, bool optional = false) {
  return pointer<T>(value, name, static_cast<int64_t>(sizeof(T)), optional);
}

// A matrix of `rows` rows, `stride` elements apart: its last byte must be addressable.
struct Matrix {
  uintptr_t address;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  int64_t element;

  void check(const char* stride_name) const {
    const auto most = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    int64_t bytes = 0;
    if (__builtin_mul_overflow(rows > 0 ? rows - 1 : 0, stride, &bytes) ||
        __builtin_add_overflow(bytes, columns, &bytes) ||
        __builtin_mul_overflow(bytes, element, &bytes) || static_cast<uint64_t>(address) > most ||
        __builtin_add_overflow(bytes, static_cast<int64_t>(address), &bytes)) {
      refuse(stride_name, "leave " + std::to_string(rows) + " rows within 64 bits, got " +
                              std::to_string(stride));
    }
  }

  uintptr_t end() const {
    return address + static_cast<uintptr_t>(((rows - 1) * stride + columns) * element);
  }

  // Whether the two share an element, exactly where their strides are equal and conservatively
  // elsewhere.
  bool overlaps(const Matrix& other) const {
    if (end() <= other.address || other.end() <= address) return false;
    if (stride * element != other.stride * other.element || stride == 0) return true;
    const auto pitch = static_cast<uintptr_t>(stride * element);
    const uintptr_t apart = other.address >= address
                                ? (other.address - address) % pitch
                                : pitch - 1 - (address - other.address - 1) % pitch;
    return apart < static_cast<uintptr_t>(columns * element) ||
           apart + static_cast<uintptr_t>(other.columns * other.element) > pitch;
  }
};

}  // namespace fastdpo
