// out[m, n] (+)= x[m] · w[n] by the best means of this instruction set. Included only by isa.cpp.
#pragma once

#include "kernels/dot.h"
#if defined(__AMX_BF16__)
#include "kernels/dot_tiles.h"
#endif

namespace elasticmoe::kernels::ELASTICMOE_ISA {

#if defined(__AMX_BF16__)
template <typename T>
inline constexpr bool kOnTiles = sizeof(typename T::Element) == 2;
// Of bfloat16, that a float of the other side is cut into: all of its 24 bits, or as many as it is rounded to.
template <typename T>
inline constexpr int64_t kTermsOf = 3;
template <>
inline constexpr int64_t kTermsOf<Rounded> = 1;
#else
template <typename T>
inline constexpr bool kOnTiles = false;
#endif

// Floats that `make_operand` writes.
template <typename T>
int64_t operand_floats(int64_t num_rows, int64_t depth) {
#if defined(__AMX_BF16__)
  if constexpr (kOnTiles<T>) return tiled_floats<kTermsOf<T>>(num_rows, depth);
#endif
  return num_rows * packed_floats<T>(depth);
}

// Rows as `product` takes them. `to`: aligned to 64 bytes.
template <typename T>
void make_operand(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, float* to) {
#if defined(__AMX_BF16__)
  if constexpr (kOnTiles<T>) return tile_rows<kTermsOf<T>>(x, x_stride, num_rows, depth, to);
#endif
  pack_rows<T>(x, x_stride, num_rows, depth, to);
}

// out[m, n] (+)= x[m] · w[n] for x from `make_operand` and contiguous w. `after`: as in Linear.
template <typename T>
void product(const float* x, int64_t num_rows, const typename T::Element* w, int64_t num_cols, int64_t depth,
             float* out, int64_t out_stride, bool add, const void* after = nullptr) {
  const char* next = static_cast<const char*>(after);
#if defined(__AMX_BF16__)
  if constexpr (kOnTiles<T>) {
    return tile_product<kTermsOf<T>>(x, num_rows, w, num_cols, depth, out, out_stride, add, next);
  }
#endif
  vector_product<T>(x, num_rows, w, num_cols, depth, out, out_stride, add, next);
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
