// Which GPUs this binary can run on. setup.py defines FASTDPO_SASS_ARCHS (e.g. 80,86,90) and
// FASTDPO_PTX_ARCHS.
#pragma once

#include <string>
#include <vector>

namespace fastdpo {

// Machine code runs on its own major version, from its minor version up; PTX on everything at or
// above it.
inline const std::vector<int>& sass_architectures() {
  static const std::vector<int> built{FASTDPO_SASS_ARCHS};
  return built;
}

inline const std::vector<int>& ptx_architectures() {
  static const std::vector<int> built{FASTDPO_PTX_ARCHS};
  return built;
}

inline std::string with_point(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

inline bool runs_on(int major, int minor) {
  for (const int arch : sass_architectures()) {
    if (arch / 10 == major && arch % 10 <= minor) return true;
  }
  for (const int arch : ptx_architectures()) {
    if (arch <= 10 * major + minor) return true;
  }
  return false;
}

// "8.0, 9.0, 12.0 and PTX 12.0"
inline std::string built_for() {
  std::string text;
  for (const int arch : sass_architectures()) text += (text.empty() ? "" : ", ") + with_point(arch);
  for (const int arch : ptx_architectures())
    text += (text.empty() ? "PTX " : " and PTX ") + with_point(arch);
  return text;
}

}  // namespace fastdpo
