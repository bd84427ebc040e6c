// The kernels under sanitizers: every set, on memory of exactly the size that they may touch. What they compute is
// tested from Python (tests/unit/test_kernels*.py); here only that it is the same in one step as in many. Longer than
// 400 lines, since all of them go through one list of sets.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "kernels/api.h"
#include "kernels/crew.h"
#include "kernels/shared.h"
#include "testing.h"

using namespace elasticmoe::kernels;

#if defined(ELASTICMOE_EMULATED_TILES)
namespace elasticmoe::kernels::emulated {
extern const Kernels kKernels;
}
#endif

namespace {

// All sets that can run here; the kernels for tiles also with emulated ones, which needs the vectors of AVX-512.
std::vector<const Kernels*> all_sets() {
  std::vector<const Kernels*> sets(built_kernels().sets, built_kernels().sets + built_kernels().count);
#if defined(ELASTICMOE_EMULATED_TILES)
  const bool has_vectors =
      std::any_of(sets.begin(), sets.end(), [](const Kernels* set) { return set->name == std::string("avx512"); });
  if (has_vectors) sets.push_back(&elasticmoe::kernels::emulated::kKernels);
  static const bool told = [&] {
    std::printf(has_vectors ? "kernels for tiles: emulated\n" : "kernels for tiles: left out, there is no AVX-512\n");
    return true;
  }();
  (void)told;
#endif
  return sets;
}

// Numbers between -1 and 1; on the heap, so that a sanitizer sees what is read beyond.
std::vector<float> floats(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> numbers(static_cast<size_t>(count));
  for (float& number : numbers) number = uniform(random);
  return numbers;
}

std::vector<uint16_t> halves(const std::vector<float>& numbers) {
  std::vector<uint16_t> stored;
  for (const float number : numbers) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    stored.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return stored;
}

// To bfloat16 and back: to nearest, ties to even.
std::vector<float> rounded(std::vector<float> numbers) {
  for (float& number : numbers) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    std::memcpy(&number, &bits, sizeof bits);
  }
  return numbers;
}

// How products take their other side, with bfloat16 weights.
constexpr Dtype kTaken[] = {Dtype::kBfloat16, Dtype::kRounded};

struct Form {
  int64_t heads, nope, v, rank, turned, size;
};

// One sequence of `length` tokens, in as many blocks as it needs, stored and read in chunks of `chunk`.
std::vector<float> attend(const Kernels& set, const Form& form, Dtype dtype, int64_t length, int64_t chunk) {
  const int64_t width = form.rank + form.turned, blocks = (length + form.size - 1) / form.size;
  const int64_t stride = form.size * width * element_bytes(dtype);
  std::vector<char> memory(static_cast<size_t>((blocks * stride + 3) / 4 * 4), char(0xff));
  const KvCache cache{memory.data(), blocks, stride, 1, 1, 1, form.size, width, dtype};
  std::vector<int32_t> table;
  for (int64_t i = blocks; i > 0; --i) table.push_back(static_cast<int32_t>(i - 1));
  const std::vector<float> weights = floats(form.heads * (form.nope + form.v) * form.rank, 1);
  const std::vector<uint16_t> narrow = halves(weights);
  const void* kv_b = dtype == Dtype::kBfloat16 ? static_cast<const void*>(narrow.data()) : weights.data();
  const std::vector<float> norm = floats(form.rank, 2), rope = floats(length * form.turned, 3);
  const int64_t query = form.heads * (form.nope + form.turned);
  std::vector<float> out(static_cast<size_t>(length * form.heads * form.v), NAN);
  for (int64_t begin = 0; begin < length; begin += chunk) {
    const int64_t count = std::min(chunk, length - begin);
    const int32_t row_starts[] = {0, static_cast<int32_t>(count)}, kv_len = static_cast<int32_t>(begin + count);
    const int32_t block_starts[] = {0, static_cast<int32_t>(blocks)};
    const Parts parts{1, row_starts, &kv_len, block_starts, table.data()};
    const std::vector<float> all_q = floats(length * query, 4), all_kv = floats(length * width, 5);
    std::vector<float> q(all_q.begin() + begin * query, all_q.begin() + (begin + count) * query);
    std::vector<float> kv(all_kv.begin() + begin * width, all_kv.begin() + (begin + count) * width);
    std::vector<float> chunk_out(static_cast<size_t>(count * form.heads * form.v));
    const Rope turn{rope.data() + begin * form.turned, form.turned, true};
    set.store_latent({cache, parts, 0, q.data(), form.heads, form.nope, kv.data(), turn, norm.data(), 1e-6f});
    set.latent_attention(
        {cache, parts, 0, q.data(), form.heads, form.nope, form.v, form.rank, kv_b, 0.3f, chunk_out.data()});
    std::copy(chunk_out.begin(), chunk_out.end(), out.begin() + begin * form.heads * form.v);
  }
  return out;
}

// out[row, col] += x[row] · w[col] in double, and what its rounding to float32 may come to.
void check_product(const std::vector<float>& x, const std::vector<uint16_t>& w, int64_t rows, int64_t cols,
                   int64_t depth, float before, const std::vector<float>& out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      double sum = before, size = std::fabs(before);
      for (int64_t k = 0; k < depth; ++k) {
        const uint32_t bits = static_cast<uint32_t>(w[static_cast<size_t>(col * depth + k)]) << 16;
        float weight;
        std::memcpy(&weight, &bits, sizeof weight);
        const double term = static_cast<double>(x[static_cast<size_t>(row * depth + k)]) * static_cast<double>(weight);
        sum += term;
        size += std::fabs(term);
      }
      CHECK(std::fabs(sum - static_cast<double>(out[static_cast<size_t>(row * cols + col)])) <= 1e-6 * size);
    }
  }
}

std::vector<float> part_of(const std::vector<float>& all, int64_t begin, int64_t count) {
  return {all.begin() + begin, all.begin() + begin + count};
}

}  // namespace

TEST(products_are_as_exact_as_float32_and_do_not_depend_on_other_rows) {
  constexpr int64_t kRows = 300;  // more than are packed at once on tiles, rounded or not
  struct Shape {
    int64_t cols, depth;
  };
  const auto check = [](const Kernels& set, Dtype dtype, const Shape& shape) {
    const std::vector<float> x = floats(kRows * shape.depth, 1), bias = floats(shape.cols, 3);
    const std::vector<float> taken = dtype == Dtype::kRounded ? rounded(x) : x;
    const std::vector<uint16_t> w = halves(floats(shape.cols * shape.depth, 2));
    const auto run = [&](int64_t first, int64_t rows, const std::vector<float>& before, const float* added) {
      const std::vector<float> some = part_of(x, first * shape.depth, rows * shape.depth);
      std::vector<float> out = before;
      set.linear({some.data(), rows, w.data(), dtype, shape.cols, shape.depth, out.data(), before[0] != 0, added});
      return out;
    };
    const std::vector<float> zeros(static_cast<size_t>(kRows * shape.cols)), ones(zeros.size(), 1);
    const std::vector<float> all = run(0, kRows, zeros, nullptr);
    check_product(taken, w, kRows, shape.cols, shape.depth, 0, all);
    check_product(taken, w, kRows, shape.cols, shape.depth, 1, run(0, kRows, ones, nullptr));
    for (const int64_t rows : {1, 2, 4, 5, 6, 10, 11, 16, 17, 20, 33, 79, 80, 81, 85, 256, 257}) {
      const int64_t first = rows % 7;
      const std::vector<float> some = run(first, rows, part_of(zeros, 0, rows * shape.cols), nullptr);
      CHECK(some == part_of(all, first * shape.cols, rows * shape.cols));
    }
    const std::vector<float> biased = run(0, 3, part_of(zeros, 0, 3 * shape.cols), bias.data());
    for (size_t i = 0; i < biased.size(); ++i) {
      CHECK(std::fabs(biased[i] - (all[i] + bias[i % bias.size()])) <= 1e-4f);
    }
  };
  for (const Kernels* set : all_sets()) {
    for (const Dtype dtype : kTaken) {
      for (const Shape& shape : {Shape{1, 7}, {16, 32}, {33, 100}, {64, 64}, {150, 48}, {70, 256}}) {
        check(*set, dtype, shape);
      }
    }
  }
}

TEST(a_number_that_is_not_finite_stays_in_its_row) {
  for (const Kernels* set : all_sets()) {
    const std::vector<uint16_t> w = halves(floats(20 * 40, 2));
    for (const Dtype dtype : kTaken) {
      for (const float odd : {NAN, -NAN, INFINITY, 3.4e38f}) {  // the last is infinite once it is rounded
        if (odd == 3.4e38f && dtype != Dtype::kRounded) continue;
        std::vector<float> x = floats(9 * 40, 1), out(9 * 20), want(9 * 20);
        set->linear({x.data(), 9, w.data(), dtype, 20, 40, want.data(), false, nullptr});
        x[4 * 40 + 10] = odd;
        set->linear({x.data(), 9, w.data(), dtype, 20, 40, out.data(), false, nullptr});
        for (size_t i = 0; i < out.size(); ++i) CHECK(i / 20 == 4 ? !std::isfinite(out[i]) : out[i] == want[i]);
      }
    }
  }
}

TEST(a_weight_that_is_not_finite_stays_in_its_column) {
  for (const Kernels* set : all_sets()) {
    for (const Dtype dtype : kTaken) {
      for (const int64_t depth : {40, 64}) {  // the last step of 40 is not whole: what follows it is the next weight
        const std::vector<float> x = floats(3 * depth, 1);
        std::vector<uint16_t> w = halves(floats(20 * depth, 2));
        std::vector<float> out(3 * 20), want(3 * 20);
        set->linear({x.data(), 3, w.data(), dtype, 20, depth, want.data(), false, nullptr});
        w[static_cast<size_t>(5 * depth)] = w[static_cast<size_t>(18 * depth)] = 0x7f80;  // infinity
        set->linear({x.data(), 3, w.data(), dtype, 20, depth, out.data(), false, nullptr});
        for (size_t i = 0; i < out.size(); ++i) {
          CHECK(i % 20 == 5 || i % 20 == 18 ? !std::isfinite(out[i]) : out[i] == want[i]);
        }
      }
    }
  }
}

TEST(experts_stay_within_their_memory_and_do_not_depend_on_other_rows) {
  constexpr int64_t kHidden = 72, kWidth = 24, kExperts = 4;
  const std::vector<int32_t> counts{0, 3, 1, 90};
  const std::vector<float> rows = floats(94 * kHidden, 1), gate = floats(kHidden, 2);
  const std::vector<float> w13 = floats(kExperts * 2 * kWidth * kHidden, 3),
                           w2 = floats(kExperts * kHidden * kWidth, 4);
  const std::vector<uint16_t> narrow13 = halves(w13), narrow2 = halves(w2);
  const auto check = [&](const Kernels& set, Dtype dtype, std::vector<float>& before) {
    const auto run = [&](const std::vector<int32_t>& some, int64_t first, int64_t count, const float* gated) {
      const std::vector<float> x = part_of(rows, first * kHidden, count * kHidden);
      std::vector<float> out(x.size());
      set.experts({x.data(), some.data(), kExperts, reinterpret_cast<const char*>(narrow13.data()),
                   2 * kWidth * kHidden * 2, reinterpret_cast<const char*>(narrow2.data()), kHidden * kWidth * 2, dtype,
                   kHidden, kWidth, gated, out.data(), false});
      return out;
    };
    const std::vector<float> all = run(counts, 0, 94, gate.data());
    CHECK(run({0, 3, 0, 0}, 0, 3, gate.data()) == part_of(all, 0, 3 * kHidden));
    CHECK(run({0, 0, 0, 7}, 50, 7, gate.data()) == part_of(all, 50 * kHidden, 7 * kHidden));
    if (before.empty()) before = all;
    // What lies between two numbers of bfloat16 may be rounded to one here and to the other there.
    const float tolerance = dtype == Dtype::kRounded ? 2e-2f : 1e-4f;
    for (size_t i = 0; i < all.size(); ++i) CHECK(std::fabs(all[i] - before[i]) <= tolerance);
  };
  for (const Dtype dtype : kTaken) {
    std::vector<float> before;
    for (const Kernels* set : all_sets()) check(*set, dtype, before);
  }
}

TEST(threads_change_no_bit_of_products_and_experts) {
  constexpr int64_t kHidden = 512, kWidth = 256, kCols = 900;
  Dtype dtype = Dtype::kBfloat16;
  const std::vector<uint16_t> w = halves(floats(kCols * kHidden, 2));
  const std::vector<float> x = floats(300 * kHidden, 1), bias = floats(kCols, 3), gate = floats(kHidden, 4);
  const std::vector<uint16_t> w13 = halves(floats(9 * 2 * kWidth * kHidden, 5));
  const std::vector<uint16_t> w2 = halves(floats(9 * kHidden * kWidth, 6));
  const auto linear = [&](int64_t rows) {
    std::vector<float> out(static_cast<size_t>(rows * kCols), 1);
    shared::linear(
        {x.data(), rows, w.data(), dtype, kCols, kHidden, out.data(), true, rows == 7 ? bias.data() : nullptr});
    return out;
  };
  const auto experts = [&](const std::vector<int32_t>& counts, const float* gated) {
    int64_t rows = 0;
    for (const int32_t count : counts) rows += count;
    std::vector<float> out = part_of(x, 0, rows * kHidden);  // in its place, as ranks do
    shared::experts({out.data(), counts.data(), static_cast<int64_t>(counts.size()),
                     reinterpret_cast<const char*>(w13.data()), 2 * kWidth * kHidden * 2,
                     reinterpret_cast<const char*>(w2.data()), kHidden * kWidth * 2, dtype, kHidden, kWidth, gated,
                     out.data(), false});
    return out;
  };
  const std::vector<std::vector<int32_t>> loads{
      {1}, {0, 1, 0, 1, 1}, {2, 0, 5, 1, 1, 3, 1, 0, 9}, {100, 0, 0, 0, 1, 100}, {30, 30, 30, 30, 30, 30, 30, 30, 30}};
  const auto all = [&] {
    std::vector<std::vector<float>> results;
    for (const int64_t rows : {1, 7, 100, 300}) results.push_back(linear(rows));
    for (const std::vector<int32_t>& counts : loads) results.push_back(experts(counts, nullptr));
    results.push_back(experts({40}, gate.data()));
    for (const int64_t rows :
         {3, 500}) {  // a shared expert: more rows than are computed at once, added to what is there
      const std::vector<float> many = floats(rows * kHidden, 7);
      std::vector<float> out = floats(rows * kHidden, 8);
      const int32_t count = static_cast<int32_t>(rows);
      shared::experts({many.data(), &count, 1, reinterpret_cast<const char*>(w13.data()), 0,
                       reinterpret_cast<const char*>(w2.data()), 0, dtype, kHidden, kWidth, gate.data(), out.data(),
                       true});
      results.push_back(out);
    }
    return results;
  };
  for (const Dtype taken : kTaken) {
    dtype = taken;
    const std::vector<std::vector<float>> alone = all();
    for (const int64_t threads : {2, 3, 7}) {
      set_threads(threads);
      CHECK(all() == alone);
      set_threads(1);
    }
  }
}

TEST(threads_change_no_bit_of_attention) {
  constexpr int64_t kHeads = 4, kQueries = 8, kDim = 64, kSize = 16, kLatent = 160, kTurned = 32;
  struct Load {
    std::vector<int32_t> rows, lens;
  };
  const std::vector<Load> loads{
      {{1}, {900}}, {{1, 1, 1, 1, 1}, {300, 900, 17, 500, 640}}, {{200, 1, 1}, {260, 700, 1}}};
  for (const Load& load : loads) {
    std::vector<int32_t> row_starts{0}, block_starts{0}, blocks;
    for (size_t i = 0; i < load.rows.size(); ++i) {
      row_starts.push_back(row_starts.back() + load.rows[i]);
      for (int64_t block = 0; block * kSize < load.lens[i]; ++block)
        blocks.push_back(static_cast<int32_t>(blocks.size()));
      block_starts.push_back(static_cast<int32_t>(blocks.size()));
    }
    const int64_t rows = row_starts.back(), num_blocks = static_cast<int64_t>(blocks.size());
    const Parts parts{static_cast<int64_t>(load.rows.size()), row_starts.data(), load.lens.data(), block_starts.data(),
                      blocks.data()};
    std::vector<uint16_t> memory = halves(floats(num_blocks * 2 * kHeads * kSize * kDim, 1));
    const KvCache cache{reinterpret_cast<char*>(memory.data()),
                        num_blocks,
                        2 * kHeads * kSize * kDim * 2,
                        1,
                        2,
                        kHeads,
                        kSize,
                        kDim,
                        Dtype::kBfloat16};
    const std::vector<float> qkv = floats(rows * (kQueries + 2 * kHeads) * kDim, 2);
    std::vector<uint16_t> latents = halves(floats(num_blocks * kSize * kLatent, 3));
    const KvCache latent_cache{reinterpret_cast<char*>(latents.data()),
                               num_blocks,
                               kSize * kLatent * 2,
                               1,
                               1,
                               1,
                               kSize,
                               kLatent,
                               Dtype::kBfloat16};
    const int64_t rank = kLatent - kTurned;
    const std::vector<float> q = floats(rows * kQueries * (24 + kTurned), 4);
    const std::vector<uint16_t> kv_b = halves(floats(kQueries * (24 + 20) * rank, 5));
    const auto all = [&] {
      std::vector<float> out(static_cast<size_t>(rows * kQueries * kDim)),
          other(static_cast<size_t>(rows * kQueries * 20));
      shared::attention({cache, parts, 0, qkv.data(), kQueries, 0.2f, out.data()});
      shared::latent_attention(
          {latent_cache, parts, 0, q.data(), kQueries, 24, 20, rank, kv_b.data(), 0.3f, other.data()});
      out.insert(out.end(), other.begin(), other.end());
      return out;
    };
    const std::vector<float> alone = all();
    for (const float value : alone) CHECK(std::isfinite(value));
    for (const int64_t threads : {2, 3, 7}) {
      set_threads(threads);
      CHECK(all() == alone);
      set_threads(1);
    }
  }
}

TEST(latent_attention_stays_within_its_memory_and_does_not_depend_on_chunks) {
  const Form forms[] = {{4, 6, 5, 24, 4, 4}, {16, 32, 32, 128, 32, 16}, {20, 10, 12, 50, 6, 3}, {1, 3, 2, 7, 2, 1}};
  for (const Kernels* set : all_sets()) {
    for (const Form& form : forms) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
        const std::vector<float> whole = attend(*set, form, dtype, 70, 70);
        for (const float value : whole) CHECK(std::isfinite(value));
        CHECK(attend(*set, form, dtype, 70, 1) == whole);
        CHECK(attend(*set, form, dtype, 70, 33) == whole);
      }
    }
  }
}

TEST(latent_attention_over_many_tiles_of_keys_is_the_same_in_every_set) {
  // Rows of whole steps, which tiles read where they lie, and others; DeepSeek's width; blocks smaller and larger than
  // a tile.
  const Form forms[] = {
      {4, 16, 8, 128, 32, 16}, {3, 16, 8, 512, 64, 48}, {2, 8, 6, 140, 20, 16}, {20, 8, 6, 96, 64, 256}};
  for (const Form& form : forms) {
    std::vector<float> before;
    for (const Kernels* set : all_sets()) {
      const std::vector<float> whole = attend(*set, form, Dtype::kBfloat16, 400, 400);
      if (before.empty()) before = whole;
      for (size_t i = 0; i < whole.size(); ++i) {
        CHECK(std::isfinite(whole[i]) && std::fabs(whole[i] - before[i]) <= 2e-4f * (1 + std::fabs(before[i])));
      }
      CHECK(attend(*set, form, Dtype::kBfloat16, 400, 130) == whole);
    }
  }
}

TEST(deep_products_are_exact_too) {  // of which tiles pack fewer rows at once
  constexpr int64_t kRows = 85, kCols = 20, kDepth = 12'000;
  const std::vector<float> x = floats(kRows * kDepth, 1);
  const std::vector<uint16_t> w = halves(floats(kCols * kDepth, 2));
  for (const Kernels* set : all_sets()) {
    for (const Dtype dtype : kTaken) {
      std::vector<float> out(static_cast<size_t>(kRows * kCols)), alone(static_cast<size_t>(kCols));
      set->linear({x.data(), kRows, w.data(), dtype, kCols, kDepth, out.data(), false, nullptr});
      check_product(dtype == Dtype::kRounded ? rounded(x) : x, w, kRows, kCols, kDepth, 0, out);
      for (const int64_t row : {0, 21, 46, 84}) {
        set->linear({x.data() + row * kDepth, 1, w.data(), dtype, kCols, kDepth, alone.data(), false, nullptr});
        CHECK(alone == part_of(out, row * kCols, kCols));
      }
    }
  }
}

TEST(nothing_is_shared_where_there_are_no_rows) {
  set_threads(2);
  const std::vector<uint16_t> w = halves(floats(1024 * 512, 2));
  shared::linear({nullptr, 0, w.data(), Dtype::kBfloat16, 1024, 512, nullptr, false, nullptr});
  const int32_t none = 0;
  shared::experts({nullptr, &none, 1, reinterpret_cast<const char*>(w.data()), 0,
                   reinterpret_cast<const char*>(w.data()), 0, Dtype::kBfloat16, 512, 256, nullptr, nullptr, true});
  set_threads(1);
}

TEST(routers_stay_within_their_memory) {
  for (const Kernels* set : all_sets()) {
    for (const int64_t experts : {1, 7, 60, 64}) {
      for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
        const int64_t groups = experts == 60 ? 6 : 1, top = experts < 4 ? experts : 4;
        const std::vector<float> x = floats(3 * 20, 1), gate = floats(experts * 20, 2), bias = floats(experts, 3);
        std::vector<int32_t> ids(static_cast<size_t>(3 * top), -1);
        std::vector<float> weights(ids.size(), NAN);
        set->router({x.data(), 3, 20, gate.data(), bias.data(), experts, top, scoring, groups, groups == 1 ? 1 : 2,
                     true, 2.5f, ids.data(), weights.data()});
        for (const int32_t id : ids) CHECK(id >= 0 && id < experts);
        for (const float weight : weights) CHECK(std::isfinite(weight));
      }
    }
  }
}
