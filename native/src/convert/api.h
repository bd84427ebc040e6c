// From the dtypes that checkpoints are quantized in to those that are served. Documentation: convert.pyi. Everything
// here takes checked arguments and runs on one thread.
#pragma once

#include <cstdint>
#include <string_view>

namespace elasticmoe::convert {

// A run of elements of a row-major matrix of `depth` columns: `count` of them from the element `first` on. Blocks of
// `block_rows` x `block_cols` elements have one scale each, in rows of `grid_cols` scales.
struct Blocks {
  const uint8_t* from;
  int64_t first;
  int64_t count;
  int64_t depth;
  int64_t block_rows;
  int64_t block_cols;
  const float* scales;
  int64_t grid_cols;
};

// One instruction set's functions. Each gives false where one of the elements is not a number.
struct Conversions {
  const char* name;
  bool (*e4m3_to_float32)(const Blocks&, float* out);
  bool (*e4m3_to_bfloat16)(const Blocks&, uint16_t* out);
};

// All that are built and can run here, the best first.
struct Built {
  const Conversions* sets[3];
  int64_t count;
};
const Built& built_conversions();

// The one called `name`; null if it is not among the built ones.
const Conversions* conversions(std::string_view name);

}  // namespace elasticmoe::convert
