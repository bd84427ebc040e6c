// Threads that share work: every item once, whoever comes and goes meanwhile.
#include "kernels/crew.h"

#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/float_mode.h"
#include "testing.h"

using namespace elasticmoe::kernels;

namespace {

// Of so many items, how often each was done.
std::vector<int> do_all(int64_t count) {
  std::vector<std::atomic<int>> times(static_cast<size_t>(count));
  share(count, [&](int64_t item) { times[static_cast<size_t>(item)].fetch_add(1, std::memory_order_relaxed); });
  return {times.begin(), times.end()};
}

struct OneThreadAgain {
  ~OneThreadAgain() { set_threads(1); }
};

}  // namespace

TEST(each_item_is_done_once_by_any_number_of_threads) {
  const OneThreadAgain after;
  for (const int64_t threads : {1, 2, 3, 8, 2, 1, 5}) {
    set_threads(threads);
    CHECK(num_threads() == threads);
    for (int round = 0; round < 300; ++round) {
      for (const int64_t count : {0, 1, 2, 3, 17, 100}) {
        CHECK(do_all(count) == std::vector<int>(static_cast<size_t>(count), 1));
      }
    }
  }
}

TEST(helpers_take_part_also_after_they_slept) {
  const OneThreadAgain after;
  set_threads(2);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // longer than helpers look for work
    std::atomic<int> inside{0};
    std::atomic<bool> have_met{false};
    share(2, [&](int64_t) {  // neither ends before both have begun
      if (inside.fetch_add(1) == 1) have_met = true;
      while (!have_met) std::this_thread::yield();
    });
    CHECK(have_met);
  }
}

TEST(helpers_compute_in_the_mode_of_the_calling_thread) {
  const OneThreadAgain after;
  set_threads(2);
  const uint32_t before = elasticmoe::float_mode();
#if defined(__SSE__)
  constexpr uint32_t flushes = 0x8040;
#elif defined(__aarch64__)
  constexpr uint32_t flushes = 1U << 24;
#else
  constexpr uint32_t flushes = 0;  // this processor's mode is not known
#endif
  for (const uint32_t mode : {before ^ flushes, before}) {  // the smallest numbers are zero, and are not
    elasticmoe::set_float_mode(mode);
    std::atomic<int> inside{0};
    std::atomic<int> others{0};
    std::atomic<bool> have_met{false};
    share(2, [&](int64_t) {  // one of them is the helper's
      if (inside.fetch_add(1) == 1) have_met = true;
      while (!have_met) std::this_thread::yield();
      others += elasticmoe::float_mode() != mode;
    });
    elasticmoe::set_float_mode(before);
    CHECK(others == 0);
  }
}

TEST(who_comes_while_another_thread_has_the_helpers_computes_alone) {
  const OneThreadAgain after;
  set_threads(3);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 500; ++round) {
        share(10, [&](int64_t item) { sum.fetch_add(item, std::memory_order_relaxed); });
      }
    });
  }
  for (int round = 0; round < 50; ++round) set_threads(1 + round % 4);
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == int64_t{4} * 500 * 45);
}

TEST(an_item_may_share_work_itself) {
  const OneThreadAgain after;
  set_threads(2);
  std::atomic<int> sum{0};
  share(4, [&](int64_t) { share(5, [&](int64_t) { sum.fetch_add(1); }); });
  CHECK(sum == 20);
}

TEST(an_item_that_finds_no_memory_is_told_when_all_are_done) {
  const OneThreadAgain after;
  for (const int64_t threads : {1, 2, 3}) {
    set_threads(threads);
    std::atomic<int> others{0};
    CHECK_THROWS(std::bad_alloc, share(20, [&](int64_t item) {
                   if (item == 7) throw std::bad_alloc();
                   others.fetch_add(1);
                 }));
    CHECK(others == 19);
    CHECK(do_all(9) == std::vector<int>(9, 1));
  }
}

TEST(threads_that_slept_come_and_go) {
  const OneThreadAgain after;
  for (const int64_t threads : {4, 2, 4, 1, 3}) {
    set_threads(threads);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than helpers look for work
    for (int round = 0; round < 20; ++round) CHECK(do_all(50) == std::vector<int>(50, 1));
  }
}

TEST(numbers_of_threads_out_of_range_are_refused) {
  for (const int64_t count : {int64_t{0}, int64_t{-1}, kMostThreads + 1}) {
    CHECK_THROWS(std::invalid_argument, set_threads(count));
  }
  CHECK(num_threads() == 1);
}
