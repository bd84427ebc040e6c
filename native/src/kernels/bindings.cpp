// native.kernels. Documentation: kernels.pyi. Longer than 400 lines, so that all arguments are checked in one place.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "bindings/common.h"
#include "kernels/api.h"
#include "kernels/crew.h"
#include "kernels/oracle.h"
#include "kernels/sampling.h"
#include "kernels/shared.h"

namespace elasticmoe::kernels {
namespace {

namespace nb = nanobind;
using bindings::natural;

constexpr int64_t kMost =
    int64_t{1} << 31;  // of any count: products of three stay below 2^63 with what memory can hold

int64_t number(const char* name, int64_t value, int64_t low) {
  require_range(name, natural(name, value), static_cast<uint64_t>(low), static_cast<uint64_t>(kMost));
  return value;
}

// The product of counts that are not negative. Raises where it passes 2^63.
int64_t elements(std::initializer_list<int64_t> counts) {
  uint64_t product = 1;
  for (const int64_t count : counts) product = checked_mul(product, static_cast<uint64_t>(count));
  return static_cast<int64_t>(std::min(product, static_cast<uint64_t>(INT64_MAX)));
}

Dtype dtype_of(int64_t code) {
  if (code != 0 && code != 1) invalid("dtype must be FLOAT32 or BFLOAT16");
  return static_cast<Dtype>(code);
}

// Of the weights of a product.
Dtype product_dtype_of(int64_t code) {
  if (code < 0 || code > 2) invalid("dtype must be FLOAT32, BFLOAT16 or ROUNDED");
  return static_cast<Dtype>(code);
}

// Address of `count` elements; null only if there are none.
template <typename T>
T* memory(const char* name, int64_t address, int64_t count) {
  const uint64_t addr = natural(name, address);
  require_memory(name, addr, checked_mul(natural(name, count), sizeof(T)));
  if (!is_aligned(addr, alignof(T))) invalid(std::string(name) + " is not aligned");
  return reinterpret_cast<T*>(addr);
}

template <typename T>
T* optional_memory(const char* name, int64_t address, int64_t count) {
  return address == 0 ? nullptr : memory<T>(name, address, count);
}

const void* stored(const char* name, int64_t address, int64_t count, Dtype dtype) {
  return dtype == Dtype::kFloat32 ? static_cast<const void*>(memory<const float>(name, address, count))
                                  : memory<const uint16_t>(name, address, count);
}

void init_cache(KvCache* self, int64_t base, int64_t num_blocks, int64_t stride, int64_t num_layers, int64_t num_planes,
                int64_t num_heads, int64_t block_size, int64_t width, int64_t dtype_code) {
  const Dtype dtype = dtype_of(dtype_code);
  KvCache cache{nullptr,
                number("num_blocks", num_blocks, 0),
                number("block_stride", stride, 1),
                number("num_layers", num_layers, 1),
                number("num_planes", num_planes, 1),
                number("num_heads", num_heads, 1),
                number("block_size", block_size, 1),
                number("width", width, 1),
                dtype};
  uint64_t bytes = static_cast<uint64_t>(element_bytes(dtype));
  for (const int64_t factor : {num_layers, num_planes, num_heads, block_size, width}) {
    bytes = checked_mul(bytes, static_cast<uint64_t>(factor));
  }
  require(bytes <= static_cast<uint64_t>(stride), "block_stride is less than a block");
  require(is_aligned(static_cast<uint64_t>(stride), 4), "block_stride is not a multiple of 4");
  checked_mul(static_cast<uint64_t>(num_blocks), static_cast<uint64_t>(stride));
  cache.base = reinterpret_cast<char*>(memory<float>("base_addr", base, num_blocks * (stride / 4)));
  new (self) KvCache(cache);
}

// The parts of a batch over a cache, checked once for all layers.
struct CheckedParts {
  KvCache cache;
  Parts parts;
  int64_t num_rows;
};

void init_parts(CheckedParts* self, const KvCache& cache, int64_t num_rows, int64_t num_parts, int64_t row_starts,
                int64_t kv_lens, int64_t block_starts, int64_t blocks) {
  number("num_rows", num_rows, 0);
  number("num_parts", num_parts, 0);
  Parts parts{num_parts, memory<const int32_t>("row_starts", row_starts, num_parts + 1),
              memory<const int32_t>("kv_lens", kv_lens, num_parts),
              memory<const int32_t>("block_starts", block_starts, num_parts + 1), nullptr};
  require(parts.row_starts[0] == 0 && parts.row_starts[num_parts] == num_rows, "row_starts must go from 0 to num_rows");
  require(parts.block_starts[0] == 0, "block_starts must begin with 0");
  for (int64_t i = 0; i < num_parts; ++i) {
    const int64_t rows = int64_t{parts.row_starts[i + 1]} - parts.row_starts[i];
    const int64_t table = int64_t{parts.block_starts[i + 1]} - parts.block_starts[i];
    require(rows > 0, "row_starts must grow");
    require(parts.kv_lens[i] >= rows, "kv_lens must be at least the part's rows");
    require(table >= 0 && table * cache.block_size >= parts.kv_lens[i], "a part has too few blocks");
  }
  const int64_t num_ids = parts.block_starts[num_parts];
  parts.blocks = memory<const int32_t>("blocks", blocks, num_ids);
  for (int64_t i = 0; i < num_ids; ++i) {
    if (parts.blocks[i] < 0 || parts.blocks[i] >= cache.num_blocks) {
      invalid("block " + std::to_string(parts.blocks[i]) + " is not among the " + std::to_string(cache.num_blocks) +
              " of the cache");
    }
  }
  new (self) CheckedParts{cache, parts, num_rows};
}

int64_t layer_of(const CheckedParts& parts, int64_t layer) {
  require_range("layer", natural("layer", layer), 0, static_cast<uint64_t>(parts.cache.num_layers - 1));
  return layer;
}

// Elements of the batch's queries, keys and values over a cache of two planes.
int64_t qkv_count(const CheckedParts& parts, int64_t q_heads) {
  number("q_heads", q_heads, 1);
  require(parts.cache.num_planes == 2, "the cache must have two planes");
  require(q_heads % parts.cache.num_heads == 0, "q_heads must be a multiple of the cache's heads");
  return parts.num_rows * (q_heads + 2 * parts.cache.num_heads) * parts.cache.width;
}

Rope rope_of(const CheckedParts& parts, int64_t table, int64_t dims, bool interleaved, int64_t most) {
  require_range("rope_dims", natural("rope_dims", dims), 2, static_cast<uint64_t>(most));
  require(dims % 2 == 0, "rope_dims must be even");
  return {memory<const float>("rope", table, parts.num_rows * dims), dims, interleaved};
}

void linear(int64_t x, int64_t num_rows, int64_t w, int64_t dtype_code, int64_t num_cols, int64_t depth, int64_t out,
            bool accumulate, int64_t bias) {
  const Dtype dtype = product_dtype_of(dtype_code);
  number("num_rows", num_rows, 0);
  number("num_cols", num_cols, 1);
  number("depth", depth, 1);
  shared::linear({memory<const float>("x", x, num_rows * depth), num_rows, stored("w", w, num_cols * depth, dtype),
                  dtype, num_cols, depth, memory<float>("out", out, num_rows * num_cols), accumulate,
                  optional_memory<const float>("bias", bias, num_cols)});
}

void rms_norm(int64_t x, int64_t delta, int64_t rows, int64_t num_rows, int64_t hidden, int64_t weight, double eps,
              int64_t out) {
  number("num_rows", num_rows, 0);
  const int64_t count = num_rows * number("hidden", hidden, 1);
  const int64_t reach = rows == 0 ? count : hidden;  // with `rows` it is up to the caller
  kernels().norm({memory<float>("x", x, num_rows == 0 ? 0 : reach), num_rows, hidden,
                  optional_memory<const float>("delta", delta, reach),
                  optional_memory<const int32_t>("rows", rows, num_rows), memory<const float>("weight", weight, hidden),
                  static_cast<float>(eps), memory<float>("out", out, count)});
}

void embed(int64_t ids, int64_t num_rows, int64_t table, int64_t dtype_code, int64_t vocab, int64_t hidden,
           double factor, int64_t out, int64_t first, int64_t num_held) {
  const Dtype dtype = dtype_of(dtype_code);
  number("vocab", vocab, 1);
  if (num_held < 0) num_held = vocab - number("first", first, 0);
  require(number("num_held", num_held, 0) <= vocab - number("first", first, 0), "the table ends beyond the vocabulary");
  const int32_t* tokens = memory<const int32_t>("ids", ids, number("num_rows", num_rows, 0));
  for (int64_t i = 0; i < num_rows; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      invalid("token " + std::to_string(tokens[i]) + " is not below the vocabulary's " + std::to_string(vocab));
    }
  }
  kernels().embed({tokens, num_rows, stored("table", table, elements({num_held, number("hidden", hidden, 1)}), dtype),
                   first, num_held, dtype, hidden, static_cast<float>(factor),
                   memory<float>("out", out, num_rows * hidden)});
}

void make_rope(const CheckedParts& parts, int64_t inv_freq, int64_t dims, double amplitude, int64_t out) {
  require(number("dims", dims, 2) % 2 == 0, "dims must be even");
  rope_table(parts.parts, memory<const float>("inv_freq", inv_freq, dims / 2), dims / 2, static_cast<float>(amplitude),
             memory<float>("out", out, parts.num_rows * dims));
}

void store(const CheckedParts& parts, int64_t layer, int64_t qkv, int64_t q_heads, int64_t rope, int64_t rope_dims,
           bool interleaved, int64_t q_norm, int64_t k_norm, bool norms_token, double eps, double clip) {
  const int64_t dim = parts.cache.width, count = qkv_count(parts, q_heads);
  require(clip >= 0, "clip must not be negative");
  kernels().store_kv({parts.cache, parts.parts, layer_of(parts, layer), memory<float>("qkv", qkv, count), q_heads,
                      rope_of(parts, rope, rope_dims, interleaved, dim),
                      optional_memory<const float>("q_norm", q_norm, norms_token ? q_heads * dim : dim),
                      optional_memory<const float>("k_norm", k_norm, norms_token ? parts.cache.num_heads * dim : dim),
                      norms_token, static_cast<float>(eps), static_cast<float>(clip)});
}

void attend(const CheckedParts& parts, int64_t layer, int64_t qkv, int64_t q_heads, double scale, int64_t out) {
  shared::attention({parts.cache, parts.parts, layer_of(parts, layer),
                     memory<const float>("qkv", qkv, qkv_count(parts, q_heads)), q_heads, static_cast<float>(scale),
                     memory<float>("out", out, parts.num_rows * q_heads * parts.cache.width)});
}

// The rank of the latents in the cache, beside shared keys of `rope_dims`.
int64_t rank_of(const CheckedParts& parts, int64_t rope_dims) {
  const KvCache& cache = parts.cache;
  require(cache.num_planes == 1 && cache.num_heads == 1, "the cache must have one plane with one head");
  require_range("rope_dims", natural("rope_dims", rope_dims), 2, static_cast<uint64_t>(cache.width - 1));
  return cache.width - rope_dims;
}

void save_latent(const CheckedParts& parts, int64_t layer, int64_t q, int64_t q_heads, int64_t nope_dim, int64_t kv,
                 int64_t rope, int64_t rope_dims, bool interleaved, int64_t norm, double eps) {
  const int64_t rank = rank_of(parts, rope_dims);
  number("q_heads", q_heads, 1);
  number("nope_dim", nope_dim, 1);
  kernels().store_latent({parts.cache, parts.parts, layer_of(parts, layer),
                          memory<float>("q", q, elements({parts.num_rows, q_heads, nope_dim + rope_dims})), q_heads,
                          nope_dim, memory<float>("kv", kv, parts.num_rows * parts.cache.width),
                          rope_of(parts, rope, rope_dims, interleaved, rope_dims),
                          memory<const float>("norm", norm, rank), static_cast<float>(eps)});
}

void attend_latent(const CheckedParts& parts, int64_t layer, int64_t q, int64_t q_heads, int64_t nope_dim,
                   int64_t v_dim, int64_t rope_dims, int64_t kv_b, int64_t dtype_code, double scale, int64_t out) {
  const int64_t rank = rank_of(parts, rope_dims);
  const Dtype dtype = dtype_of(dtype_code);
  require(dtype == parts.cache.dtype, "kv_b must have the dtype of the cache");
  number("q_heads", q_heads, 1);
  number("nope_dim", nope_dim, 1);
  number("v_dim", v_dim, 1);
  shared::latent_attention(
      {parts.cache, parts.parts, layer_of(parts, layer),
       memory<const float>("q", q, elements({parts.num_rows, q_heads, nope_dim + rope_dims})), q_heads, nope_dim, v_dim,
       rank, stored("kv_b", kv_b, elements({q_heads, nope_dim + v_dim, rank}), dtype), static_cast<float>(scale),
       memory<float>("out", out, elements({parts.num_rows, q_heads, v_dim}))});
}

void route(int64_t x, int64_t num_rows, int64_t hidden, int64_t gate, int64_t bias, int64_t num_experts, int64_t top_k,
           int64_t scoring, int64_t num_groups, int64_t top_groups, bool renormalize, double scaling, int64_t ids,
           int64_t weights) {
  number("num_rows", num_rows, 0);
  number("hidden", hidden, 1);
  number("num_experts", num_experts, 1);
  if (scoring != 0 && scoring != 1) invalid("scoring must be SOFTMAX or SIGMOID");
  require_range("num_groups", natural("num_groups", num_groups), 1, static_cast<uint64_t>(num_experts));
  require(num_experts % num_groups == 0, "num_experts must be a multiple of num_groups");
  require_range("top_groups", natural("top_groups", top_groups), 1, static_cast<uint64_t>(num_groups));
  const int64_t of_group = num_experts / num_groups;
  require(num_groups == 1 || scoring == 0 || of_group >= 2, "groups chosen by two experts must have two");
  require_range("top_k", natural("top_k", top_k), 1, static_cast<uint64_t>(top_groups * of_group));
  kernels().router({memory<const float>("x", x, num_rows * hidden), num_rows, hidden,
                    memory<const float>("gate", gate, num_experts * hidden),
                    optional_memory<const float>("bias", bias, num_experts), num_experts, top_k,
                    static_cast<Scoring>(scoring), num_groups, top_groups, renormalize, static_cast<float>(scaling),
                    memory<int32_t>("ids", ids, num_rows * top_k),
                    memory<float>("weights", weights, num_rows * top_k)});
}

void run_experts(int64_t rows, int64_t num_rows, int64_t counts, int64_t num_experts, int64_t w13, int64_t w13_stride,
                 int64_t w2, int64_t w2_stride, int64_t dtype_code, int64_t hidden, int64_t width, int64_t out) {
  const Dtype dtype = product_dtype_of(dtype_code);
  number("num_rows", num_rows, 0);
  number("num_experts", num_experts, 1);
  number("hidden", hidden, 1);
  number("width", width, 1);
  const int32_t* each = memory<const int32_t>("counts", counts, num_experts);
  int64_t total = 0;
  for (int64_t i = 0; i < num_experts; ++i) {
    require(each[i] >= 0, "counts must not be negative");
    total += each[i];
  }
  require(total == num_rows, "counts must sum to num_rows");
  const int64_t align = element_bytes(dtype);
  require(natural("w13_stride", w13_stride) % static_cast<uint64_t>(align) == 0, "w13_stride splits an element");
  require(natural("w2_stride", w2_stride) % static_cast<uint64_t>(align) == 0, "w2_stride splits an element");
  shared::experts({memory<const float>("rows", rows, num_rows * hidden), each, num_experts,
                   static_cast<const char*>(stored("w13", w13, 2 * width * hidden, dtype)), w13_stride,
                   static_cast<const char*>(stored("w2", w2, hidden * width, dtype)), w2_stride, dtype, hidden, width,
                   nullptr, memory<float>("out", out, num_rows * hidden), false});
}

void run_shared_experts(int64_t x, int64_t num_rows, int64_t w13, int64_t w2, int64_t dtype_code, int64_t hidden,
                        int64_t width, int64_t gate, int64_t out) {
  const Dtype dtype = product_dtype_of(dtype_code);
  const int32_t count = natural<int32_t>("num_rows", num_rows);
  number("hidden", hidden, 1);
  number("width", width, 1);
  shared::experts({memory<const float>("x", x, num_rows * hidden), &count, 1,
                   static_cast<const char*>(stored("w13", w13, 2 * width * hidden, dtype)), 0,
                   static_cast<const char*>(stored("w2", w2, hidden * width, dtype)), 0, dtype, hidden, width,
                   optional_memory<const float>("gate", gate, hidden), memory<float>("out", out, num_rows * hidden),
                   true});
}

void mix(const CheckedParts& parts, int64_t layer, int64_t kv, int64_t modulus, int64_t base, int64_t out) {
  require(parts.cache.dtype == Dtype::kFloat32 && parts.cache.num_heads == 1,
          "the cache must be float32 with one head");
  require_range("modulus", natural("modulus", modulus), 2, 65535);
  require_range("base", natural("base", base), 1, 65535);
  const int64_t count = parts.num_rows * parts.cache.num_planes * parts.cache.width;
  oracle_mix({parts.cache, parts.parts, layer_of(parts, layer), memory<const float>("kv", kv, count), modulus, base,
              memory<float>("out", out, count)});
}

std::vector<int64_t> greatest(int64_t logits, int64_t num_rows, int64_t vocab) {
  number("num_rows", num_rows, 0);
  number("vocab", vocab, 1);
  const float* rows = memory<const float>("logits", logits, num_rows * vocab);
  std::vector<int64_t> tokens(static_cast<size_t>(num_rows));
  for (int64_t i = 0; i < num_rows; ++i) tokens[static_cast<size_t>(i)] = kernels().greatest(rows + i * vocab, vocab);
  return tokens;
}

int64_t draw_token(int64_t logits, int64_t vocab, double temperature, int64_t top_k, double top_p, double min_p,
                   double uniform) {
  number("vocab", vocab, 1);
  number("top_k", top_k, 0);
  // Written so that a NaN is out of range.
  require(temperature >= kTemperatureMin && temperature <= kTemperatureMax, "temperature must be from 1e-6 to 1e6");
  require(top_p >= 0 && top_p <= 1, "top_p must be from 0 to 1");
  require(min_p >= 0 && min_p <= 1, "min_p must be from 0 to 1");
  require(uniform >= 0 && uniform < 1, "uniform must be from 0 to below 1");
  return draw(memory<const float>("logits", logits, vocab), vocab,
              {static_cast<float>(temperature), top_k, top_p, min_p, uniform});
}

double log_total_of(int64_t logits, int64_t vocab) {
  return log_total(memory<const float>("logits", logits, number("vocab", vocab, 1)), vocab);
}

std::vector<int32_t> top_of(int64_t logits, int64_t vocab, int64_t count) {
  return top_tokens(memory<const float>("logits", logits, number("vocab", vocab, 1)), vocab, number("count", count, 0));
}

void select_instruction_set(const std::string& name) {
  if (!use_instruction_set(name)) invalid("instruction set " + name + " is not built or cannot run here");
}

void use_threads(int64_t count) {
  require_range("count", natural("count", count), 1, static_cast<uint64_t>(kMostThreads));
  set_threads(count);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int64_t i = 0; i < built_kernels().count; ++i) names.emplace_back(built_kernels().sets[i]->name);
  return names;
}

}  // namespace

NB_MODULE(kernels, m) {
  using released = nb::call_guard<nb::gil_scoped_release>;
  m.attr("FLOAT32") = static_cast<int64_t>(Dtype::kFloat32);
  m.attr("BFLOAT16") = static_cast<int64_t>(Dtype::kBfloat16);
  m.attr("ROUNDED") = static_cast<int64_t>(Dtype::kRounded);
  m.attr("SOFTMAX") = static_cast<int64_t>(Scoring::kSoftmax);
  m.attr("SIGMOID") = static_cast<int64_t>(Scoring::kSigmoid);
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &select_instruction_set, nb::arg("name"));
  m.def("threads", &num_threads);
  m.def("use_threads", &use_threads, released(), nb::arg("count"));

  nb::class_<KvCache>(m, "KvView")
      .def("__init__", &init_cache, nb::arg("base_addr"), nb::arg("num_blocks"), nb::arg("block_stride"),
           nb::arg("num_layers"), nb::arg("num_planes"), nb::arg("num_heads"), nb::arg("block_size"), nb::arg("width"),
           nb::arg("dtype"));
  nb::class_<CheckedParts>(m, "Parts")
      .def("__init__", &init_parts, nb::arg("cache"), nb::arg("num_rows"), nb::arg("num_parts"),
           nb::arg("row_starts_addr"), nb::arg("kv_lens_addr"), nb::arg("block_starts_addr"), nb::arg("blocks_addr"));

  m.def("linear", &linear, released(), nb::arg("x_addr"), nb::arg("num_rows"), nb::arg("w_addr"), nb::arg("dtype"),
        nb::arg("num_cols"), nb::arg("depth"), nb::arg("out_addr"), nb::arg("accumulate"), nb::arg("bias_addr"));
  m.def("rms_norm", &rms_norm, released(), nb::arg("x_addr"), nb::arg("delta_addr"), nb::arg("rows_addr"),
        nb::arg("num_rows"), nb::arg("hidden"), nb::arg("weight_addr"), nb::arg("eps"), nb::arg("out_addr"));
  m.def("embed", &embed, released(), nb::arg("ids_addr"), nb::arg("num_rows"), nb::arg("table_addr"), nb::arg("dtype"),
        nb::arg("vocab"), nb::arg("hidden"), nb::arg("factor"), nb::arg("out_addr"), nb::arg("first") = 0,
        nb::arg("num_held") = -1);
  m.def("rope_table", &make_rope, released(), nb::arg("parts"), nb::arg("inv_freq_addr"), nb::arg("dims"),
        nb::arg("amplitude"), nb::arg("out_addr"));
  m.def("store_kv", &store, released(), nb::arg("parts"), nb::arg("layer"), nb::arg("qkv_addr"), nb::arg("q_heads"),
        nb::arg("rope_addr"), nb::arg("rope_dims"), nb::arg("interleaved"), nb::arg("q_norm_addr"),
        nb::arg("k_norm_addr"), nb::arg("norms_token"), nb::arg("eps"), nb::arg("clip"));
  m.def("attention", &attend, released(), nb::arg("parts"), nb::arg("layer"), nb::arg("qkv_addr"), nb::arg("q_heads"),
        nb::arg("scale"), nb::arg("out_addr"));
  m.def("store_latent", &save_latent, released(), nb::arg("parts"), nb::arg("layer"), nb::arg("q_addr"),
        nb::arg("q_heads"), nb::arg("nope_dim"), nb::arg("kv_addr"), nb::arg("rope_addr"), nb::arg("rope_dims"),
        nb::arg("interleaved"), nb::arg("norm_addr"), nb::arg("eps"));
  m.def("latent_attention", &attend_latent, released(), nb::arg("parts"), nb::arg("layer"), nb::arg("q_addr"),
        nb::arg("q_heads"), nb::arg("nope_dim"), nb::arg("v_dim"), nb::arg("rope_dims"), nb::arg("kv_b_addr"),
        nb::arg("dtype"), nb::arg("scale"), nb::arg("out_addr"));
  m.def("route", &route, released(), nb::arg("x_addr"), nb::arg("num_rows"), nb::arg("hidden"), nb::arg("gate_addr"),
        nb::arg("bias_addr"), nb::arg("num_experts"), nb::arg("top_k"), nb::arg("scoring"), nb::arg("num_groups"),
        nb::arg("top_groups"), nb::arg("renormalize"), nb::arg("scaling"), nb::arg("ids_addr"),
        nb::arg("weights_addr"));
  m.def("experts", &run_experts, released(), nb::arg("rows_addr"), nb::arg("num_rows"), nb::arg("counts_addr"),
        nb::arg("num_experts"), nb::arg("w13_addr"), nb::arg("w13_stride"), nb::arg("w2_addr"), nb::arg("w2_stride"),
        nb::arg("dtype"), nb::arg("hidden"), nb::arg("width"), nb::arg("out_addr"));
  m.def("shared_experts", &run_shared_experts, released(), nb::arg("x_addr"), nb::arg("num_rows"), nb::arg("w13_addr"),
        nb::arg("w2_addr"), nb::arg("dtype"), nb::arg("hidden"), nb::arg("width"), nb::arg("gate_addr"),
        nb::arg("out_addr"));

  m.def("oracle_mix", &mix, released(), nb::arg("parts"), nb::arg("layer"), nb::arg("kv_addr"), nb::arg("modulus"),
        nb::arg("base"), nb::arg("out_addr"));

  m.def("greatest", &greatest, released(), nb::arg("logits_addr"), nb::arg("num_rows"), nb::arg("vocab"));
  m.def("draw", &draw_token, released(), nb::arg("logits_addr"), nb::arg("vocab"), nb::arg("temperature"),
        nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("uniform"));
  m.def("log_total", &log_total_of, released(), nb::arg("logits_addr"), nb::arg("vocab"));
  m.def("top_tokens", &top_of, released(), nb::arg("logits_addr"), nb::arg("vocab"), nb::arg("count"));
}

}  // namespace elasticmoe::kernels
