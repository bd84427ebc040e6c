// CPU kernels of a decoder with experts. Documentation: kernels.pyi. Activations are float32, weights and KV float32 or
// bfloat16. Everything here takes checked arguments and runs on one thread.
#pragma once

#include <cstdint>
#include <string_view>

namespace elasticmoe::kernels {

enum class Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1 };

inline int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// A KV cache: blocks of [layers, 2, heads, block_size, head_dim], `stride` bytes apart.
struct KvCache {
  char* base;
  int64_t num_blocks;
  int64_t stride;
  int64_t num_layers;
  int64_t num_heads;
  int64_t block_size;
  int64_t head_dim;
  Dtype dtype;
};

// The parts of a batch, as services/worker/model/batch.py has them.
struct Parts {
  int64_t num_parts;
  const int32_t* row_starts;
  const int32_t* kv_lens;
  const int32_t* block_starts;
  const int32_t* blocks;

  int64_t first_position(int64_t part) const { return kv_lens[part] - (row_starts[part + 1] - row_starts[part]); }
};

struct Linear {
  const float* x;
  int64_t num_rows;
  const void* w;
  Dtype dtype;
  int64_t num_cols;
  int64_t depth;
  float* out;
  bool add;
};

struct Norm {
  float* x;
  int64_t num_rows;
  int64_t hidden;
  const float* delta;   // added to x before; may be null
  const int32_t* rows;  // which rows of x; null: all, and x keeps the sum
  const float* weight;
  float eps;
  float* out;
};

struct StoreKv {
  KvCache cache;
  Parts parts;
  int64_t layer;
  float* qkv;  // [rows, (q_heads + 2 heads) * head_dim]; q is normed and rotated in place
  int64_t q_heads;
  const float* rope;    // [rows, 2, head_dim / 2]: cosines, sines
  const float* q_norm;  // [head_dim]; null: none
  const float* k_norm;
  float eps;
};

struct Attention {
  KvCache cache;
  Parts parts;
  int64_t layer;
  const float* qkv;
  int64_t q_heads;
  float scale;
  float* out;  // [rows, q_heads * head_dim]
};

struct Router {
  const float* x;
  int64_t num_rows;
  int64_t hidden;
  const float* gate;
  int64_t num_experts;
  int64_t top_k;
  bool renormalize;
  int32_t* ids;
  float* weights;
};

struct Experts {
  const float* rows;
  const int32_t* counts;
  int64_t num_experts;
  const char* w13;
  int64_t w13_stride;
  const char* w2;
  int64_t w2_stride;
  Dtype dtype;
  int64_t hidden;
  int64_t width;
  float* out;  // may be `rows`
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*norm)(const Norm&);
  void (*store_kv)(const StoreKv&);
  void (*attention)(const Attention&);
  void (*router)(const Router&);
  void (*experts)(const Experts&);
  void (*embed)(const int32_t* ids, int64_t num_rows, const void* table, Dtype dtype, int64_t hidden, float* out);
  // Weights of a softmax before division by their sum: e^((x - peak) * factor), 0 where x is -inf.
  void (*exponentials)(const float* x, int64_t count, float peak, float factor, float* out);
  // Index of the first greatest of `count` values; -1 if one of them is not finite.
  int64_t (*greatest)(const float* x, int64_t count);
};

// The kernels in use: the best that this machine can run, unless another set was asked for.
const Kernels& kernels();

// Use the set called `name` from now on, in all threads. False if it is not among the built ones.
bool use_instruction_set(std::string_view name);

// All that are built and can run here, the best first.
struct Built {
  const Kernels* sets[3];
  int64_t count;
};
const Built& built_kernels();

// Memory of the calling thread that lasts until its next call for the same purpose. Aligned to 64 bytes. Throws
// std::bad_alloc.
enum class Scratch { kPacked, kWide, kPackedWide, kScores, kSums, kCount };
float* scratch(Scratch purpose, int64_t count);

}  // namespace elasticmoe::kernels
