// The instructions of AMX in software: what their manual says of each (Intel SDM volume 2, TDPBF16PS: denormals are
// zeros, products of even and of odd elements are summed up by themselves over a row, then added). Included before
// everything else in the set `emulated`, so that the kernels for tiles run where no processor has them.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace elasticmoe::emulated {

void load_config(const void* config);
void release();
void zero(int tile);
void load(int tile, const void* from, size_t stride);
void store(int tile, void* to, size_t stride);
void multiply(int sums, int left, int right);

}  // namespace elasticmoe::emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) elasticmoe::emulated::load_config(config)
#define _tile_release() elasticmoe::emulated::release()
#define _tile_zero(tile) elasticmoe::emulated::zero(tile)
#define _tile_loadd(tile, from, stride) elasticmoe::emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) elasticmoe::emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) elasticmoe::emulated::multiply(sums, left, right)
