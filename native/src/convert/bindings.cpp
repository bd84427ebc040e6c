// native.convert. Documentation: convert.pyi.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings/common.h"
#include "convert/api.h"

namespace elasticmoe::convert {

namespace baseline {
extern const Conversions kConversions;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Conversions kConversions;
}
namespace avx512 {
extern const Conversions kConversions;
}
#endif

const Built& built_conversions() {
  static const Built built = [] {
    Built found{};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
      found.sets[found.count++] = &avx512::kConversions;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.sets[found.count++] = &avx2::kConversions;
    }
#endif
    found.sets[found.count++] = &baseline::kConversions;
    return found;
  }();
  return built;
}

const Conversions* conversions(std::string_view name) {
  const Built& built = built_conversions();
  for (int64_t i = 0; i < built.count; ++i) {
    if (name == built.sets[i]->name) return built.sets[i];
  }
  return nullptr;
}

namespace {

namespace nb = nanobind;
using bindings::natural;

template <typename T>
T* memory(const char* name, uint64_t addr, uint64_t count) {
  require_memory(name, addr, checked_mul(count, sizeof(T)));
  require(addr % alignof(T) == 0, "an address is not aligned to its elements");
  return reinterpret_cast<T*>(static_cast<uintptr_t>(addr));
}

uint64_t ceil_div(uint64_t value, uint64_t by) {
  return value / by + (value % by != 0);
}

bool dequantize(uint64_t src, int64_t first, int64_t count, int64_t num_rows, int64_t depth, int64_t block_rows,
                int64_t block_cols, uint64_t scales, int64_t itemsize, uint64_t out, const std::string& name) {
  const uint64_t rows = natural("num_rows", num_rows), cols = natural("depth", depth);
  const uint64_t tall = natural("block_rows", block_rows), wide = natural("block_cols", block_cols);
  require(tall > 0 && wide > 0, "a block must have rows and columns");
  const uint64_t end = checked_add(natural("first", first), natural("count", count));
  require_range("first + count", end, 0, checked_mul(rows, cols));
  require(itemsize == 2 || itemsize == 4, "itemsize must be 2 or 4");
  const Conversions* set = name.empty() ? built_conversions().sets[0] : conversions(name);
  require(set != nullptr, "there is no such instruction set here");
  const uint64_t grid_cols = ceil_div(cols, wide), length = static_cast<uint64_t>(count);
  const Blocks blocks{memory<const uint8_t>("src", src, length),
                      first,
                      count,
                      depth,
                      block_rows,
                      block_cols,
                      memory<const float>("scales", scales, checked_mul(ceil_div(rows, tall), grid_cols)),
                      static_cast<int64_t>(grid_cols)};
  if (count == 0) return true;
  return itemsize == 4 ? set->e4m3_to_float32(blocks, memory<float>("out", out, length))
                       : set->e4m3_to_bfloat16(blocks, memory<uint16_t>("out", out, length));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int64_t i = 0; i < built_conversions().count; ++i) names.emplace_back(built_conversions().sets[i]->name);
  return names;
}

}  // namespace

NB_MODULE(convert, m) {
  m.def("instruction_sets", &instruction_sets);
  m.def("dequantize_e4m3", &dequantize, nb::call_guard<nb::gil_scoped_release>(), nb::arg("src_addr"), nb::arg("first"),
        nb::arg("count"), nb::arg("num_rows"), nb::arg("depth"), nb::arg("block_rows"), nb::arg("block_cols"),
        nb::arg("scales_addr"), nb::arg("itemsize"), nb::arg("out_addr"), nb::arg("instruction_set") = "");
}

}  // namespace elasticmoe::convert
