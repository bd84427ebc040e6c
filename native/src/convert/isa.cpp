// The conversions of one instruction set. Compiled once for each, with ELASTICMOE_ISA naming it (convert.cmake).
#include "convert/api.h"
#include "kernels/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elasticmoe::convert {

#define ELASTICMOE_TEXT_OF(name) #name
#define ELASTICMOE_TEXT(name) ELASTICMOE_TEXT_OF(name)

namespace ELASTICMOE_ISA {

using kernels::ELASTICMOE_ISA::bits;
using kernels::ELASTICMOE_ISA::F32;
using kernels::ELASTICMOE_ISA::I32;
using kernels::ELASTICMOE_ISA::kLanes;
using kernels::ELASTICMOE_ISA::splat;
using kernels::ELASTICMOE_ISA::U32;

using U8 = uint8_t __attribute__((vector_size(kLanes)));
using U16 = uint16_t __attribute__((vector_size(kLanes * 2)));

// Compilers take __builtin_convertvector apart into single elements, so that x86 needs to be told.
inline U32 widen(const uint8_t* from) {
#if defined(__AVX512F__)
  __m128i codes;
  std::memcpy(&codes, from, sizeof codes);
  return bits<U32>(_mm512_cvtepu8_epi32(codes));
#elif defined(__AVX2__)
  int64_t codes;
  std::memcpy(&codes, from, sizeof codes);
  return bits<U32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes)));
#elif defined(__x86_64__)
  int32_t codes;
  std::memcpy(&codes, from, sizeof codes);
  const __m128i zero = _mm_setzero_si128();
  return bits<U32>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(codes), zero), zero));
#else
  U8 codes;
  std::memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, U32);
#endif
}

// The upper halves.
inline U16 narrow(U32 v) {
#if defined(__AVX512F__)
  return bits<U16>(_mm512_cvtepi32_epi16(bits<__m512i>(v >> 16)));
#elif defined(__AVX2__)
  const __m256i upper = bits<__m256i>(v >> 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  return bits<U16>(_mm256_castsi256_si128(packed));
#elif defined(__x86_64__)
  const __m128i upper = _mm_srai_epi32(bits<__m128i>(v), 16);  // signed, as packing saturates
  return bits<U16>(_mm_cvtsi128_si64(_mm_packs_epi32(upper, upper)));
#else
  return __builtin_convertvector(v >> 16, U16);
#endif
}

// E4M3 has 4 bits of exponent with a bias of 7, 3 of mantissa, no infinities, and NaN only where all bits but the sign
// are set (https://arxiv.org/abs/2209.05433). `nan` collects where one was met.
inline F32 decode(U32 code, I32& nan) {
  const U32 magnitude = code & 0x7fu;
  const U32 normal = (magnitude << 20) + (120u << 23);  // the mantissa's place, and float32's bias of 127
  // Below the least exponent the mantissa counts in steps of 2^-9: as float32 it is put behind a 1 that is taken off.
  const F32 subnormal = bits<F32>(normal + (1u << 23)) - splat(0.015625f);
  const I32 is_nan = magnitude == 0x7fu;
  nan |= is_nan;
  U32 value = magnitude < 8u ? bits<U32>(subnormal) : normal;
  value = is_nan ? U32{} + 0x7fc00000u : value;
  return bits<F32>(value | ((code & 0x80u) << 24));
}

struct Float32Out {
  using Element = float;
  using Vector = F32;
  static Vector narrow(F32 v) { return v; }
};

struct Bfloat16Out {
  using Element = uint16_t;
  using Vector = U16;
  // Round to nearest, ties to even. The only NaN that comes here has no low bits that could carry.
  static Vector narrow(F32 v) {
    const U32 u = bits<U32>(v);
    return convert::ELASTICMOE_ISA::narrow(u + 0x7fffu + ((u >> 16) & 1u));
  }
};

// `count` elements that share a scale.
template <typename Out>
inline void scale(const uint8_t* from, int64_t count, float scale, typename Out::Element* out, I32& nan) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const typename Out::Vector result = Out::narrow(decode(widen(from + i), nan) * scale);
    std::memcpy(out + i, &result, sizeof result);
  }
  if (i == count) return;
  const auto rest = static_cast<size_t>(count - i);
  uint8_t codes[kLanes] = {};
  std::memcpy(codes, from + i, rest);
  const typename Out::Vector result = Out::narrow(decode(widen(codes), nan) * scale);
  std::memcpy(out + i, &result, rest * sizeof(typename Out::Element));
}

template <typename Out>
bool convert(const Blocks& blocks, typename Out::Element* out) {
  I32 nan{};
  int64_t row = blocks.first / blocks.depth, column = blocks.first % blocks.depth;
  for (int64_t done = 0; done < blocks.count;) {
    const float* scales = blocks.scales + row / blocks.block_rows * blocks.grid_cols;
    const int64_t left = blocks.count - done;
    const int64_t end = blocks.depth - column < left ? blocks.depth : column + left;
    while (column < end) {
      const int64_t block = column / blocks.block_cols, next = (block + 1) * blocks.block_cols;
      const int64_t count = (next < end ? next : end) - column;
      scale<Out>(blocks.from + done, count, scales[block], out + done, nan);
      column += count;
      done += count;
    }
    column = 0;
    ++row;
  }
  int32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= nan[lane];
  return any == 0;
}

extern const Conversions kConversions;
const Conversions kConversions = {ELASTICMOE_TEXT(ELASTICMOE_ISA), convert<Float32Out>, convert<Bfloat16Out>};

}  // namespace ELASTICMOE_ISA
}  // namespace elasticmoe::convert
