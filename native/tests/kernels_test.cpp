// The kernels under sanitizers: every set, on memory of exactly the size that they may touch. What they compute is
// tested from Python (tests/unit/test_kernels*.py); here only that it is the same in one step as in many.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/api.h"
#include "testing.h"

using namespace elasticmoe::kernels;

namespace {

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

}  // namespace

TEST(latent_attention_stays_within_its_memory_and_does_not_depend_on_chunks) {
  const Form forms[] = {{4, 6, 5, 24, 4, 4}, {16, 32, 32, 128, 32, 16}, {20, 10, 12, 50, 6, 3}, {1, 3, 2, 7, 2, 1}};
  for (int64_t i = 0; i < built_kernels().count; ++i) {
    for (const Form& form : forms) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
        const std::vector<float> whole = attend(*built_kernels().sets[i], form, dtype, 70, 70);
        for (const float value : whole) CHECK(std::isfinite(value));
        CHECK(attend(*built_kernels().sets[i], form, dtype, 70, 1) == whole);
        CHECK(attend(*built_kernels().sets[i], form, dtype, 70, 33) == whole);
      }
    }
  }
}

TEST(routers_stay_within_their_memory) {
  for (int64_t i = 0; i < built_kernels().count; ++i) {
    for (const int64_t experts : {1, 7, 60, 64}) {
      for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
        const int64_t groups = experts == 60 ? 6 : 1, top = experts < 4 ? experts : 4;
        const std::vector<float> x = floats(3 * 20, 1), gate = floats(experts * 20, 2), bias = floats(experts, 3);
        std::vector<int32_t> ids(static_cast<size_t>(3 * top), -1);
        std::vector<float> weights(ids.size(), NAN);
        built_kernels().sets[i]->router({x.data(), 3, 20, gate.data(), bias.data(), experts, top, scoring, groups,
                                         groups == 1 ? 1 : 2, true, 2.5f, ids.data(), weights.data()});
        for (const int32_t id : ids) CHECK(id >= 0 && id < experts);
        for (const float weight : weights) CHECK(std::isfinite(weight));
      }
    }
  }
}
