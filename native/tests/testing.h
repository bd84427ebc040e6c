// A minimal test harness: TEST registers, CHECK stops the test, main runs all or those whose name contains its
// argument.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace testing {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases();

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static const testing::Registration reg_##name{#name, test_##name}; \
  static void test_##name()

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) testing::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_THROWS(type, expression)                                                       \
  do {                                                                                       \
    bool has_thrown = false;                                                                 \
    try {                                                                                    \
      (void)(expression);                                                                    \
    } catch (const type&) {                                                                  \
      has_thrown = true;                                                                     \
    }                                                                                        \
    if (!has_thrown) testing::fail(__FILE__, __LINE__, #expression " did not throw " #type); \
  } while (false)

// Anonymous memory that forked processes share.
class SharedMemory {
 public:
  explicit SharedMemory(uint64_t nbytes) : nbytes_(nbytes) {
    fd_ = memfd_create("elasticmoe-test", MFD_CLOEXEC);
    if (fd_ < 0 || ftruncate(fd_, static_cast<off_t>(nbytes)) != 0)
      throw std::system_error(errno, std::generic_category());
    data_ = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  }
  ~SharedMemory() {
    munmap(data_, nbytes_);
    close(fd_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  uint64_t addr() const { return reinterpret_cast<uint64_t>(data_); }
  uint64_t nbytes() const { return nbytes_; }
  int fd() const { return fd_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  uint64_t nbytes_;
  int fd_;
  void* data_;
};

// Runs `work` in a forked process; its exit status is 0 unless it throws.
inline pid_t spawn(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid < 0) throw std::system_error(errno, std::generic_category());
  if (pid != 0) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // nothing outlives a test that is killed
  try {
    work();
    _exit(0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "child %d: %s\n", getpid(), error.what());
  }
  _exit(1);
}

inline int wait_status(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) throw std::system_error(errno, std::generic_category());
  }
  return status;
}

}  // namespace testing
