// What decoding's attention takes, beside what bounds it: the bandwidth of one thread that only reads the same KV, and
// the peak of fused multiply-adds in float32. Latent attention as of DeepSeek-V2-Lite, grouped as of Qwen3-MoE.
// Usage: kernels_bench [context [sequences [steps [rounds]]]]. All are measured in turn, step by step, round after
// round, and of each step the best round counts: what else runs on the machine falls out. Reading is of what a step has
// to read: the KV of its sequences and, for latent attention, kv_b once.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench.h"
#include "kernels/api.h"

using namespace elasticmoe::bench;
using namespace elasticmoe::kernels;

namespace {

constexpr int64_t kBlockSize = 16;
// Steps of one row for each of their sequences, which have `context` tokens on blocks that lie anywhere.
struct Steps {
  std::vector<uint16_t> memory;
  std::vector<int32_t> blocks, row_starts, kv_lens, block_starts;
  int64_t blocks_of_step;
  KvCache cache;

  Steps(int64_t steps, int64_t sequences, int64_t context, int64_t planes, int64_t heads, int64_t width) {
    const int64_t per_sequence = (context + kBlockSize - 1) / kBlockSize;
    for (int64_t i = 0; i <= sequences; ++i) {
      row_starts.push_back(static_cast<int32_t>(i));
      block_starts.push_back(static_cast<int32_t>(i * per_sequence));
      kv_lens.push_back(static_cast<int32_t>(context));
    }
    blocks_of_step = sequences * per_sequence;
    const int64_t count = steps * blocks_of_step;
    const int64_t elements = planes * heads * kBlockSize * width;
    memory = make_numbers(count * elements);
    blocks.resize(static_cast<size_t>(count));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(2));
    cache = {reinterpret_cast<char*>(memory.data()),
             count,
             elements * 2,
             1,
             planes,
             heads,
             kBlockSize,
             width,
             Dtype::kBfloat16};
  }

  double gigabytes() const { return static_cast<double>(memory.size()) * 2e-9; }

  Parts step(int64_t number) const {
    return {static_cast<int64_t>(row_starts.size()) - 1, row_starts.data(), kv_lens.data(), block_starts.data(),
            blocks.data() + number * blocks_of_step};
  }

  // Reads all blocks of a step, and `weights`; returns something that depends on all.
  float read(int64_t number, const std::vector<uint16_t>& weights) const {
    float total = read_all(reinterpret_cast<const char*>(weights.data()), static_cast<int64_t>(weights.size()) * 2);
    for (int64_t i = 0; i < blocks_of_step; ++i) {
      const int64_t block = blocks[static_cast<size_t>(number * blocks_of_step + i)];
      total += read_all(cache.base + block * cache.stride, cache.stride);
    }
    return total;
  }
};

struct Figure {
  std::string name;
  double gigabytes = 0, gflop = 0;
  int64_t tokens = 0;
  std::function<void(int64_t)> run;
  std::vector<double> best;  // of each step

  double seconds() const { return std::accumulate(best.begin(), best.end(), 0.0); }
};

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int index, int64_t usual) { return argc > index ? std::atoll(argv[index]) : usual; };
  const int64_t context = number(1, 4096), sequences = number(2, 4), steps = number(3, 4), rounds = number(4, 15);
  constexpr int64_t kHeads = 16, kNope = 128, kTurned = 64, kV = 128, kRank = 512, kDim = 128, kKvHeads = 4;
  const int64_t q_dim = kNope + kTurned, grouped_heads = 32;
  const Steps latent(steps, sequences, context, 1, 1, kRank + kTurned),
      grouped(steps, sequences, context, 2, kKvHeads, kDim);
  const std::vector<uint16_t> kv_b = make_numbers(kHeads * (kNope + kV) * kRank);
  const std::vector<float> q = make_floats(sequences * kHeads * q_dim);
  const std::vector<float> qkv = make_floats(sequences * (grouped_heads + 2 * kKvHeads) * kDim);
  std::vector<float> out(static_cast<size_t>(sequences * grouped_heads * kDim));
  const double keys = static_cast<double>(steps * sequences * context);
  const double latent_read = latent.gigabytes() + static_cast<double>(steps) * static_cast<double>(kv_b.size()) * 2e-9;
  std::vector<Figure> figures;
  volatile float kept = 0;
  figures.push_back({"read latent KV", latent_read, 0, 0, [&](int64_t i) { kept = latent.read(i, kv_b); }});
  figures.push_back({"read grouped KV", grouped.gigabytes(), 0, 0, [&](int64_t i) { kept = grouped.read(i, {}); }});
  for (int64_t n = 0; n < built_kernels().count; ++n) {
    const Kernels* set = built_kernels().sets[n];
    const double latent_gflop = keys * 2 * kHeads * (2 * kRank + kTurned) * 1e-9;
    const double absorbed = static_cast<double>(steps * sequences * kHeads * kRank * (kNope + kV)) * 2e-9;
    figures.push_back({std::string("latent ") + set->name, latent_read, latent_gflop + absorbed, steps * sequences,
                       [&, set](int64_t i) {
                         set->latent_attention({latent.cache, latent.step(i), 0, q.data(), kHeads, kNope, kV, kRank,
                                                kv_b.data(), 0.05f, out.data()});
                       }});
    figures.push_back(
        {std::string("grouped ") + set->name, grouped.gigabytes(),
         keys * 4 * static_cast<double>(grouped_heads * kDim) * 1e-9, steps * sequences, [&, set](int64_t i) {
           set->attention({grouped.cache, grouped.step(i), 0, qkv.data(), grouped_heads, 0.05f, out.data()});
         }});
  }
  double peak = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < 20; ++i) peak = std::max(peak, fma_gflops());
    for (int64_t i = 0; i < steps; ++i) {
      for (Figure& figure : figures) {
        figure.best.resize(static_cast<size_t>(steps), INFINITY);
        double& best = figure.best[static_cast<size_t>(i)];
        best = std::min(best, seconds_of([&] { figure.run(i); }));
      }
    }
  }
  std::printf("steps of %lld sequences of %lld tokens, bfloat16, one thread; multiply-adds of float32: %.0f GFLOP/s\n",
              static_cast<long long>(sequences), static_cast<long long>(context), peak);
  for (const Figure& figure : figures) {
    const bool is_latent = figure.name.find("latent") != std::string::npos;
    const Figure& read = figures[is_latent ? 0 : 1];
    const double speed = figure.gigabytes / figure.seconds();
    std::printf("%-18s %7.2f ms  %6.2f GB/s (%3.0f %% of reading)", figure.name.c_str(), figure.seconds() * 1e3, speed,
                100 * speed / (read.gigabytes / read.seconds()));
    if (figure.gflop > 0) {
      const double gflops = figure.gflop / figure.seconds();
      std::printf("  %6.0f GFLOP/s (%3.0f %% of float32's)  %7.0f tokens/s and layer", gflops, 100 * gflops / peak,
                  static_cast<double>(figure.tokens) / figure.seconds());
    }
    std::printf("\n");
  }
  return 0;
}
