// XXH64, the 64-bit hash of the xxHash family (specification: github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace elasticmoe {

uint64_t xxh64(const void* data, size_t nbytes, uint64_t seed = 0);

}  // namespace elasticmoe
