#include <cstring>

#include "testing.h"

namespace testing {
std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
}  // namespace testing

int main(int argc, char** argv) {
  int num_failed = 0;
  int num_passed = 0;
  for (const testing::Case& test : testing::cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    try {
      test.run();
      std::printf("ok    %s\n", test.name);
      ++num_passed;
    } catch (const std::exception& error) {
      std::printf("FAIL  %s: %s\n", test.name, error.what());
      ++num_failed;
    }
  }
  std::printf("%d passed, %d failed\n", num_passed, num_failed);
  return num_failed == 0 && num_passed > 0 ? 0 : 1;
}
