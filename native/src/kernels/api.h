// CPU kernels of a decoder with experts. Documentation: kernels.pyi. Activations are float32, weights and KV float32 or
// bfloat16. Everything here takes checked arguments.
#pragma once

#include <cstdint>
#include <string_view>

namespace elasticmoe::kernels {

// Of weights and KV. kRounded: weights of bfloat16, in products whose rows are rounded to it, too.
enum class Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kRounded = 2 };

inline int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// A KV cache: blocks of [layers, planes, heads, block_size, width], `stride` bytes apart.
struct KvCache {
  char* base;
  int64_t num_blocks;
  int64_t stride;
  int64_t num_layers;
  int64_t num_planes;
  int64_t num_heads;
  int64_t block_size;
  int64_t width;
  Dtype dtype;

  // Elements from a block's start to the first token of a layer's plane and head.
  int64_t offset(int64_t layer, int64_t plane, int64_t head) const {
    return ((layer * num_planes + plane) * num_heads + head) * block_size * width;
  }
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

// The table has the tokens from `first` on, `num_held` of them; the rows of others are zeros.
struct Embed {
  const int32_t* ids;
  int64_t num_rows;
  const void* table;
  int64_t first;
  int64_t num_held;
  Dtype dtype;
  int64_t hidden;
  float factor;
  float* out;
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
  const float* bias;       // [num_cols]; may be null
  int64_t x_stride = 0;    // floats from row to row; 0: depth
  int64_t out_stride = 0;  // likewise; 0: num_cols
  // Weights that are read next, whose beginning is fetched at the end of these; null: those that lie behind them.
  const void* after = nullptr;
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

// How pairs of elements rotate. `table`: [rows, 2, dims / 2], cosines and sines.
struct Rope {
  const float* table;
  int64_t dims;
  bool interleaved;  // element 2 i with 2 i + 1; else i with i + dims / 2
};

struct StoreKv {
  KvCache cache;
  Parts parts;
  int64_t layer;
  float* qkv;  // [rows, (q_heads + 2 heads) * width]; normed, cut and rotated in place
  int64_t q_heads;
  Rope rope;            // of the first elements of each head
  const float* q_norm;  // [width], or [q_heads * width] if norms_token; null: none
  const float* k_norm;  // [width], or [heads * width]
  bool norms_token;     // one norm over all heads of a token
  float eps;
  float clip;  // 0: nothing is cut
};

struct Attention {
  KvCache cache;
  Parts parts;
  int64_t layer;
  const float* qkv;
  int64_t q_heads;
  float scale;
  float* out;              // [rows, q_heads * width]
  int64_t first_head = 0;  // of the cache's
  int64_t end_head = 0;    // 0: all
};

struct StoreLatent {
  KvCache cache;  // of one plane and head: latent, then shared key of rope.dims
  Parts parts;
  int64_t layer;
  float* q;  // [rows, q_heads, nope_dim + rope.dims]; the last rope.dims rotate in place
  int64_t q_heads;
  int64_t nope_dim;
  float* kv;  // [rows, width]; normed and rotated in place
  Rope rope;
  const float* norm;  // [width - rope.dims]
  float eps;
};

struct LatentAttention {
  KvCache cache;
  Parts parts;
  int64_t layer;
  const float* q;
  int64_t q_heads;
  int64_t nope_dim;
  int64_t v_dim;
  int64_t rank;      // of the latent; the rest of the cache's width is the shared key
  const void* kv_b;  // [q_heads, nope_dim + v_dim, rank] in the cache's dtype
  float scale;
  float* out;  // [rows, q_heads * v_dim]
};

enum class Scoring : int64_t { kSoftmax = 0, kSigmoid = 1 };

struct Router {
  const float* x;
  int64_t num_rows;
  int64_t hidden;
  const float* gate;
  const float* bias;  // [num_experts], added for the choice alone; may be null
  int64_t num_experts;
  int64_t top_k;
  Scoring scoring;
  int64_t num_groups;
  int64_t top_groups;
  bool renormalize;
  float scaling;
  int32_t* ids;
  float* weights;
};

inline constexpr int64_t kRowsAtOnce = 384;  // of an expert, or of what threads share: bounds each one's scratch memory

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
  const float* gate;            // [hidden]: each row's output is multiplied by sigmoid(row · gate); may be null
  float* out;                   // may be `rows`, unless `add`
  bool add;                     // to out
  const void* after = nullptr;  // as in Linear, behind the last one's
};

// What experts do between their two products: silu of the first half of each row of `wide`, times the second half.
struct Activate {
  float* wide;  // [num_rows, 2 * width]; the result is in the first halves
  int64_t num_rows;
  int64_t width;
  const float* rows;  // [num_rows, hidden]
  int64_t hidden;
  const float* gate;  // see Experts
};

// One instruction set's kernels. Each computes on the calling thread; shared.h has several threads compute.
struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*norm)(const Norm&);
  void (*store_kv)(const StoreKv&);
  void (*attention)(const Attention&);
  void (*store_latent)(const StoreLatent&);
  void (*latent_attention)(const LatentAttention&);
  void (*router)(const Router&);
  void (*experts)(const Experts&);
  void (*activate)(const Activate&);
  void (*embed)(const Embed&);
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
  const Kernels* sets[5];
  int64_t count;
};
const Built& built_kernels();

// Memory of the calling thread that lasts until its next call for the same purpose. Aligned to 64 bytes. Throws
// std::bad_alloc.
enum class Scratch { kPacked, kWide, kPackedWide, kScores, kSums, kTurned, kTiles, kCopy, kShared, kCount };
float* scratch(Scratch purpose, int64_t count);

}  // namespace elasticmoe::kernels
