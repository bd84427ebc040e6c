// Vectors of one instruction set. Included only by isa.cpp, which is compiled once for each set with its own compiler
// flags and with ELASTICMOE_ISA as its namespace: nothing here may have external linkage outside of it, or the linker
// could pick a copy that the machine cannot run. Hence no std:: functions either.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace elasticmoe::kernels::ELASTICMOE_ISA {

#if defined(__AVX512F__)
inline constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int64_t kLanes = 8;
#else
inline constexpr int64_t kLanes = 4;
#endif

using F32 = float __attribute__((vector_size(kLanes * 4)));
using U32 = uint32_t __attribute__((vector_size(kLanes * 4)));
using I32 = int32_t __attribute__((vector_size(kLanes * 4)));
using F32x4 = float __attribute__((vector_size(16)));

inline F32 load(const float* from) {
  F32 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, F32 v) {
  std::memcpy(to, &v, sizeof v);
}

// Subtraction: the compiler may drop x - 0, but not 0 + x, which changes -0.
inline F32 splat(float value) {
  return value - F32{};
}

template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

// Elements of a stored dtype, `kStep` at a time, as `kParts` vectors of floats. The bfloat16 vectors hold the even and
// the odd elements: one shift and one mask widen 2 × kLanes of them. Whatever meets them in a product is permuted
// likewise, and rounded as `rounded` does.
struct Float32 {
  using Element = float;
  static constexpr int64_t kParts = 1;
  static constexpr int64_t kStep = kLanes;

  template <int64_t kPart>
  static F32 part(const Element* from) {
    return load(from);
  }
  static F32 multiply_add(F32 sum, F32 weights, F32 x) { return sum + weights * x; }
  static Element narrow(float value) { return value; }
  static float widen(Element value) { return value; }
  static float rounded(float value) { return value; }
};

struct Bfloat16 {
  using Element = uint16_t;
  static constexpr int64_t kParts = 2;
  static constexpr int64_t kStep = 2 * kLanes;

  template <int64_t kPart>
  static F32 part(const Element* from) {
    U32 pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return kPart == 0 ? bits<F32>(pairs << 16) : bits<F32>(pairs & 0xffff0000u);
  }
  static F32 multiply_add(F32 sum, F32 weights, F32 x) { return sum + weights * x; }
  // Round to nearest, ties to even; a NaN stays one.
  static Element narrow(float value) {
    const uint32_t u = bits<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<Element>((u >> 16) | 0x40u);
    return static_cast<Element>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  static float widen(Element value) { return bits<float>(static_cast<uint32_t>(value) << 16); }
  static float rounded(float value) { return value; }
};

// Weights of bfloat16 whose other side is rounded to bfloat16, too. With AVX512-BF16 both sides stay pairs of elements
// as they lie in memory, and one instruction multiplies and adds 2 × kLanes of them.
struct Rounded : Bfloat16 {
  static float rounded(float value) { return widen(narrow(value)); }
#if defined(__AVX512BF16__)
  static constexpr int64_t kParts = 1;

  template <int64_t kPart>
  static F32 part(const Element* from) {
    F32 pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
  }
  static F32 multiply_add(F32 sum, F32 weights, F32 x) {
    return F32(_mm512_dpbf16_ps(__m512(sum), bits<__m512bh>(weights), bits<__m512bh>(x)));
  }
#endif
};

template <typename T>
inline int64_t padded(int64_t count) {
  return (count + T::kStep - 1) / T::kStep * T::kStep;
}

// Floats that `pack` writes.
template <typename T>
inline int64_t packed_floats(int64_t count) {
  return padded<T>(count) / T::kStep * T::kParts * kLanes;
}

// Permute `count` floats to the order of T's vectors, each vector `to_stride` floats after the one before, and fill the
// last step up with zeros.
template <typename T>
inline void pack(const float* from, int64_t count, float* to, int64_t to_stride = kLanes) {
  int64_t i = 0;
  if constexpr (T::kStep > T::kParts * kLanes) {  // pairs stay pairs
    for (; i < count; i += T::kStep, to += to_stride) {
      typename T::Element pairs[T::kStep] = {};
      const int64_t left = count - i < T::kStep ? count - i : T::kStep;
      for (int64_t j = 0; j < left; ++j) pairs[j] = T::narrow(from[i + j]);
      std::memcpy(to, pairs, sizeof pairs);
    }
    return;
  }
  for (; i + T::kStep <= count; i += T::kStep, to += T::kParts * to_stride) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t part = 0; part < T::kParts; ++part) {
        to[part * to_stride + lane] = T::rounded(from[i + lane * T::kParts + part]);
      }
    }
  }
  if (i == count) return;
  for (int64_t j = 0; j < T::kStep; ++j) {
    to[j % T::kParts * to_stride + j / T::kParts] = i + j < count ? T::rounded(from[i + j]) : 0.0f;
  }
}

// The inverse of pack, each value times `factor`.
template <typename T>
inline void unpack(const float* from, int64_t count, float factor, float* to) {
  int64_t i = 0;
  for (; i + T::kStep <= count; i += T::kStep) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t part = 0; part < T::kParts; ++part) {
        to[i + lane * T::kParts + part] = from[i + part * kLanes + lane] * factor;
      }
    }
  }
  for (int64_t j = 0; i + j < count; ++j) to[i + j] = from[i + j % T::kParts * kLanes + j / T::kParts] * factor;
}

template <auto kIndex, int64_t... kLane>
inline F32 shuffle(F32 a, F32 b, std::integer_sequence<int64_t, kLane...> /*lanes*/) {
  return __builtin_shufflevector(a, b, kIndex(kLane)...);
}

// Lane i of the result is lane kIndex(i) of a and b one after the other.
template <auto kIndex>
inline F32 shuffle(F32 a, F32 b) {
  return shuffle<kIndex>(a, b, std::make_integer_sequence<int64_t, kLanes>());
}

// A vector's sum is taken in this order: halves onto each other until four lanes are left, then (0 + 2) + (1 + 3).
// Quads: a vector in four neighbouring lanes each, of kQuads vectors.
inline constexpr int64_t kQuads = kLanes / 4;

inline F32 fold(const F32 (&v)[kQuads]) {
  if constexpr (kQuads == 4) {
    constexpr auto kLow = [](int64_t i) { return i < 8 ? i : i + 8; };
    constexpr auto kHigh = [](int64_t i) { return i < 8 ? i + 8 : i + 16; };
    constexpr auto kEven = [](int64_t i) { return i / 4 * 8 + i % 4; };
    constexpr auto kOdd = [](int64_t i) { return i / 4 * 8 + i % 4 + 4; };
    const F32 ab = shuffle<kLow>(v[0], v[1]) + shuffle<kHigh>(v[0], v[1]);
    const F32 cd = shuffle<kLow>(v[2], v[3]) + shuffle<kHigh>(v[2], v[3]);
    return shuffle<kEven>(ab, cd) + shuffle<kOdd>(ab, cd);
  } else if constexpr (kQuads == 2) {
    constexpr auto kLow = [](int64_t i) { return i < 4 ? i : i + 4; };
    constexpr auto kHigh = [](int64_t i) { return i < 4 ? i + 4 : i + 8; };
    return shuffle<kLow>(v[0], v[1]) + shuffle<kHigh>(v[0], v[1]);
  } else {
    return v[0];
  }
}

// Quad q of the result holds the sums of quad q of a, b, c and d.
inline F32 sum_quads(F32 a, F32 b, F32 c, F32 d) {
  constexpr auto kFirst = [](int64_t i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes; };
  constexpr auto kSecond = [](int64_t i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes + 2; };
  constexpr auto kLeft = [](int64_t i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes; };
  constexpr auto kRight = [](int64_t i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes + 2; };
  const F32 ab = shuffle<kFirst>(a, b) + shuffle<kSecond>(a, b);
  const F32 cd = shuffle<kFirst>(c, d) + shuffle<kSecond>(c, d);
  return shuffle<kLeft>(ab, cd) + shuffle<kRight>(ab, cd);
}

template <int64_t kQuad>
inline F32x4 quad(F32 v) {
  constexpr int kLane = static_cast<int>(kQuad * 4);
  return __builtin_shufflevector(v, v, kLane, kLane + 1, kLane + 2, kLane + 3);
}

inline float sum(F32 v) {
  F32 same[kQuads];
  for (F32& one : same) one = v;
  const F32x4 q = quad<0>(fold(same));
  return (q[0] + q[2]) + (q[1] + q[3]);
}

inline F32 max(F32 a, F32 b) {
  return a > b ? a : b;
}
inline F32 min(F32 a, F32 b) {
  return a < b ? a : b;
}

// e^x within 2 units in the last place for -87 <= x <= 88; clamped to that interval outside of it. NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 kept = x;
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const F32 shifted = x * 1.44269504088896341f + magic;
  const F32 n = shifted - magic;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I32 exponent = bits<I32>(shifted) - bits<I32>(magic);
  const F32 result = bits<F32>(bits<I32>(p) + (exponent << 23));
  return kept == kept ? result : kept;
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
