// Latencies of the bus between processes: barrier, step and the exchange of one MoE layer, beside the same layer alone.
// Usage: bus_bench [ranks [tokens [hidden [top_k [rounds [spin_us]]]]]]
#include <algorithm>

#include "exchange_model.h"

using namespace testing;

namespace {

struct Options {
  uint32_t num_ranks = 2, num_tokens = 4, hidden = 1024, top_k = 8, rounds = 20'000;
  int spin_us = Meeting::kSpinAuto;
};

void report(const char* what, std::vector<int64_t>& samples_ns) {
  std::sort(samples_ns.begin(), samples_ns.end());
  const auto at = [&](double share) {
    return static_cast<double>(samples_ns[static_cast<size_t>(share * static_cast<double>(samples_ns.size() - 1))]) /
           1e3;
  };
  std::printf("%-28s median %8.2f us   p10 %8.2f   p90 %8.2f   p99 %8.2f\n", what, at(0.5), at(0.1), at(0.9), at(0.99));
}

template <typename Operation>
void measure(const char* what, const Options& options, bool is_reporter, Operation operation) {
  std::vector<int64_t> samples;
  samples.reserve(options.rounds);
  for (uint32_t round = 0; round < options.rounds; ++round) {
    const int64_t start = now_ns();
    if (operation() != Outcome::done) throw Failure("the bench was disturbed");
    samples.push_back(now_ns() - start);
  }
  if (is_reporter) report(what, samples);
}

void run_rank(const Options& options, const SharedMemory& memory, uint32_t slot, uint64_t members,
              uint32_t generation) {
  const Segment segment(memory.addr(), memory.nbytes());
  Meeting meeting(segment, static_cast<int>(slot));
  Exchange exchange(meeting);
  meeting.spin_us = options.spin_us;
  meeting.join(generation * 64 + slot + 1);
  constexpr uint32_t kNumExperts = 64;
  const Routing routing = make_routing_for(kNumExperts, members, 0);
  std::mt19937 random(slot);
  const size_t num_pairs = size_t{options.num_tokens} * options.top_k;
  std::vector<float> x(size_t{options.num_tokens} * options.hidden, 1.0F);
  std::vector<float> weights(num_pairs, 0.5F);
  std::vector<int32_t> ids(num_pairs);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % kNumExperts);
  const uint64_t cap = num_pairs * options.num_ranks;
  std::vector<float> rows(cap * options.hidden);
  std::vector<float> out(x.size());
  std::vector<int32_t> counts(kNumExperts);
  std::vector<StepEntry> entries;
  const bool is_reporter = slot == 0;
  measure("barrier", options, is_reporter,
          [&] { return finish([&] { return meeting.meet(generation, Kind::combine, 0, kNever); }); });
  measure("step", options, is_reporter,
          [&] { return finish([&] { return meeting.step(generation, 1, 2, kNever, entries); }); });
  measure("dispatch + combine", options, is_reporter, [&] {
    uint64_t num_rows = 0;
    const Outcome outcome = finish([&] {
      return exchange.dispatch(routing, generation, {x.data(), ids.data(), weights.data(), options.num_tokens},
                               {rows.data(), cap, counts.data()}, kNever, num_rows);
    });
    if (outcome != Outcome::done) return outcome;
    return finish(
        [&] { return exchange.combine(routing, generation, rows.data(), out.data(), options.num_tokens, kNever); });
  });
}

void run(const Options& options, uint32_t num_ranks) {
  const Geometry geometry{num_ranks, options.num_tokens, options.hidden, options.top_k};
  const SharedMemory memory(bus_bytes(geometry));
  format_bus(memory.addr(), memory.nbytes(), geometry);
  const uint64_t members = num_ranks == 64 ? ~uint64_t{0} : (uint64_t{1} << num_ranks) - 1;
  Meeting(Segment(memory.addr(), memory.nbytes()), -1).set_membership(1, members, true);
  std::printf("%u ranks, %u tokens each, hidden %u, top_k %u, spin_us %d\n", num_ranks, options.num_tokens,
              options.hidden, options.top_k, options.spin_us);
  std::vector<pid_t> pids;
  for (uint32_t slot = 0; slot < num_ranks; ++slot) {
    pids.push_back(spawn([&] {
      run_rank(options, memory, slot, members, 1);
      std::fflush(nullptr);
    }));
  }
  for (const pid_t pid : pids) {
    if (wait_status(pid) != 0) throw Failure("a rank failed");
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  uint32_t* const numbers[] = {&options.num_ranks, &options.num_tokens, &options.hidden, &options.top_k,
                               &options.rounds};
  for (int index = 1; index < argc && index <= 5; ++index)
    *numbers[index - 1] = static_cast<uint32_t>(std::atoi(argv[index]));
  if (argc > 6) options.spin_us = std::atoi(argv[6]);
  run(options, options.num_ranks);
  if (options.num_ranks > 1) run(options, 1);
  return 0;
}
