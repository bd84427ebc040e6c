// What products with weights take, beside what bounds them: the bandwidth of one thread that only reads the same
// weights, and the peak of fused multiply-adds in float32. A dense layer and experts as of qwen3-moe-1b, in bfloat16.
// Usage: products_bench [rounds]. Weights are never those of the call before, and of all calls the best one counts:
// what else runs on the machine falls out.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bench.h"
#include "kernels/api.h"
#include "kernels/crew.h"

using namespace elasticmoe::bench;
using namespace elasticmoe::kernels;

namespace {

constexpr int64_t kHidden = 1024, kColumns = 3072, kExperts = 64, kTopK = 8, kWidth = 384;
constexpr int64_t kDense = kHidden * kColumns, kExpert = 3 * kHidden * kWidth;  // elements
constexpr int64_t kSets = 3;                                                    // of experts' weights

struct Figure {
  std::string name;
  double gigabytes, gflop;
  std::function<void(int64_t)> run;  // with the weights of that number
  double best = INFINITY;
};

// How many rows each expert gets of so many tokens.
std::vector<int32_t> route(int64_t tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> counts(kExperts), experts(kExperts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t token = 0; token < tokens; ++token) {
    std::shuffle(experts.begin(), experts.end(), random);
    for (int64_t i = 0; i < kTopK; ++i) ++counts[static_cast<size_t>(experts[static_cast<size_t>(i)])];
  }
  return counts;
}

// Bytes a second that so many threads read together, each a part of its own; the best of some rounds by the clock, so
// on a machine where nothing else runs.
double read_together(const std::vector<uint16_t>& numbers, int64_t threads, int64_t rounds) {
  const int64_t nbytes = static_cast<int64_t>(numbers.size()) * 2 / threads;
  double best = INFINITY;
  set_threads(threads);
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    share(threads, [&](int64_t part) {
      [[maybe_unused]] volatile float kept =
          read_all(reinterpret_cast<const char*>(numbers.data()) + part * nbytes, nbytes);
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  set_threads(1);
  return static_cast<double>(nbytes * threads) / best;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 40;
  const int64_t num_dense = kSets * kExperts * kExpert / kDense;
  const std::vector<uint16_t> weights = make_numbers(kSets * kExperts * kExpert);
  const std::vector<uint16_t> dense = make_numbers(num_dense * kDense);
  const std::vector<float> x = make_floats(128 * kTopK * kHidden);
  std::vector<float> out(static_cast<size_t>(128 * kTopK * kColumns));
  const auto dense_at = [&](int64_t i) { return dense.data() + i % num_dense * kDense; };
  volatile float kept = 0;
  std::vector<Figure> figures;
  figures.push_back({"read", kDense * 2e-9, 0,
                     [&](int64_t i) { kept = read_all(reinterpret_cast<const char*>(dense_at(i)), kDense * 2); }});
  for (int64_t n = 0; n < built_kernels().count; ++n) {
    const Kernels* set = built_kernels().sets[n];
    for (const Dtype dtype : {Dtype::kBfloat16, Dtype::kRounded}) {
      const std::string how = std::string(set->name) + (dtype == Dtype::kRounded ? ", rounded" : "");
      for (const int64_t rows : {1, 2, 4, 6, 8, 12, 16, 32}) {
        const std::string name = how + " dense, " + std::to_string(rows) + " rows";
        const auto run = [&, set, rows, dtype](int64_t i) {
          set->linear({x.data(), rows, dense_at(i), dtype, kColumns, kHidden, out.data(), false, nullptr});
        };
        figures.push_back({name, kDense * 2e-9, static_cast<double>(2 * rows * kDense) * 1e-9, run});
      }
      for (const int64_t tokens : {1, 8, 32, 128}) {
        const std::string name = how + " experts, " + std::to_string(tokens) + " tokens";
        const std::vector<int32_t> counts = route(tokens, static_cast<uint32_t>(tokens));
        const auto hit =
            static_cast<double>(std::count_if(counts.begin(), counts.end(), [](int32_t c) { return c > 0; }));
        const double gflop = static_cast<double>(2 * tokens * kTopK * kExpert) * 1e-9;
        const auto run = [&, set, counts, dtype](int64_t i) {
          const char* base = reinterpret_cast<const char*>(weights.data() + i % kSets * kExperts * kExpert);
          set->experts({x.data(), counts.data(), kExperts, base, kExpert * 2, base + 2 * kHidden * kWidth * 2,
                        kExpert * 2, dtype, kHidden, kWidth, nullptr, out.data(), false});
        };
        figures.push_back({name, hit * kExpert * 2e-9, gflop, run});
      }
    }
  }
  double peak = 0;
  int64_t call = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    peak = std::max(peak, fma_gflops());
    for (Figure& figure : figures) figure.best = std::min(figure.best, seconds_of([&] { figure.run(call++); }));
  }
  std::printf("bfloat16 weights, one thread; reading %.1f GB/s, multiply-adds of float32 %.0f GFLOP/s\n",
              figures[0].gigabytes / figures[0].best, peak);
  const int64_t cores = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, kMostThreads);
  std::printf("by the clock: one thread reads %.1f GB/s, %lld together %.1f GB/s\n",
              read_together(weights, 1, 10) * 1e-9, static_cast<long long>(cores),
              read_together(weights, cores, 10) * 1e-9);
  const double bandwidth = figures[0].gigabytes / figures[0].best;
  for (const Figure& figure : figures) {
    const double speed = figure.gigabytes / figure.best, gflops = figure.gflop / figure.best;
    std::printf("%-40s %8.0f us  %5.1f GB/s (%3.0f %% of reading)  %5.0f GFLOP/s (%3.0f %%)\n", figure.name.c_str(),
                figure.best * 1e6, speed, 100 * speed / bandwidth, gflops, 100 * gflops / peak);
  }
  return 0;
}
