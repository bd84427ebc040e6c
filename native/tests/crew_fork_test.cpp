// Helpers and processes: a child of a fork has none.
#include <vector>

#include "kernels/crew.h"
#include "testing.h"

using namespace elasticmoe::kernels;

TEST(a_child_computes_alone_and_may_have_helpers_of_its_own) {
  set_threads(3);
  std::vector<int> done(10);
  share(10, [&](int64_t item) { ++done[static_cast<size_t>(item)]; });
  const pid_t child = testing::spawn([] {
    CHECK(num_threads() == 1);
    for (const int64_t threads : {1, 2}) {
      set_threads(threads);
      std::vector<int> times(10);
      share(10, [&](int64_t item) { ++times[static_cast<size_t>(item)]; });
      CHECK(times == std::vector<int>(10, 1));
    }
  });
  const int status = testing::wait_status(child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  share(10, [&](int64_t item) { ++done[static_cast<size_t>(item)]; });
  CHECK(done == std::vector<int>(10, 2));
  set_threads(1);
}
