// The oracle model's attention (docs/oracle.md): exact, and wrong as soon as one value of the cache is.
#pragma once

#include <cstdint>

#include "kernels/api.h"

namespace elasticmoe::kernels {

struct OracleMix {
  KvCache cache;  // float32, one head
  Parts parts;
  int64_t layer;
  const float* kv;  // [rows, planes, width]: whole numbers to write at each row's position
  int64_t modulus;
  int64_t base;
  float* out;  // [rows, planes, width]: sum over positions j <= own of kv[j] * base^(own - j), modulo modulus
};

void oracle_mix(const OracleMix& a);

}  // namespace elasticmoe::kernels
