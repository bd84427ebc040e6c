#include "emulated_tiles.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace elasticmoe::emulated {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct State {
  Config config;
  unsigned char data[kTiles][kRows][kRowBytes];
};

thread_local State state{};

// A fault of the processor.
void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

void check_tile(int tile) {
  check(state.config.palette == 1, "no configuration is loaded");
  check(tile >= 0 && tile < kTiles && state.config.rows[tile] > 0 && state.config.row_bytes[tile] > 0, "no such tile");
}

float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? 0.0f : value;
}

// A tile's numbers of bfloat16.
void widen(const unsigned char (&rows)[kRows][kRowBytes], float (&to)[kRows][kRowBytes / 2]) {
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kRowBytes / 2; ++i) {
      uint16_t stored;
      std::memcpy(&stored, rows[row] + 2 * i, sizeof stored);
      const uint32_t bits = static_cast<uint32_t>(stored) << 16;
      std::memcpy(&to[row][i], &bits, sizeof bits);
      to[row][i] = flushed(to[row][i]);
    }
  }
}

}  // namespace

void load_config(const void* config) {
  std::memcpy(&state.config, config, sizeof state.config);
  check(state.config.palette == 1 && state.config.start_row == 0, "palette or first row");
  for (const uint8_t byte : state.config.reserved) check(byte == 0, "reserved bytes are not zero");
  for (int tile = 0; tile < 16; ++tile) {
    const bool fits = state.config.rows[tile] <= kRows && state.config.row_bytes[tile] <= kRowBytes;
    check(tile < kTiles ? fits : state.config.rows[tile] == 0 && state.config.row_bytes[tile] == 0, "size of a tile");
  }
  std::memset(state.data, 0, sizeof state.data);
}

void release() {
  state = {};
}

void zero(int tile) {
  check_tile(tile);
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
}

void load(int tile, const void* from, size_t stride) {
  zero(tile);
  for (size_t row = 0; row < state.config.rows[tile]; ++row) {
    std::memcpy(state.data[tile][row], static_cast<const char*>(from) + row * stride, state.config.row_bytes[tile]);
  }
}

void store(int tile, void* to, size_t stride) {
  check_tile(tile);
  for (size_t row = 0; row < state.config.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, state.data[tile][row], state.config.row_bytes[tile]);
  }
}

void multiply(int sums, int left, int right) {
  check_tile(sums);
  check_tile(left);
  check_tile(right);
  const Config& config = state.config;
  check(sums != left && sums != right && left != right, "a tile is named twice");
  check(config.rows[sums] == config.rows[left] && config.row_bytes[sums] == config.row_bytes[right] &&
            config.row_bytes[left] == config.rows[right] * 4,
        "sizes of three tiles");
  const int columns = config.row_bytes[sums] / 4, pairs = config.rows[right];
  float lefts[kRows][kRowBytes / 2], rights[kRows][kRowBytes / 2];
  widen(state.data[left], lefts);
  widen(state.data[right], rights);
  for (int m = 0; m < config.rows[sums]; ++m) {
    float even[kRows] = {}, odd[kRows] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int n = 0; n < columns; ++n) {  // products of bfloat16 numbers are exact: this is fused
        even[n] = flushed(even[n] + lefts[m][2 * k] * rights[k][2 * n]);
        odd[n] = flushed(odd[n] + lefts[m][2 * k + 1] * rights[k][2 * n + 1]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, state.data[sums][m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
      std::memcpy(state.data[sums][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace elasticmoe::emulated
