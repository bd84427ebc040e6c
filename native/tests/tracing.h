// Runs a forked process one machine instruction at a time, so that "killed at any instruction" can be taken at its
// word.
#pragma once

#include <sys/ptrace.h>

#include "testing.h"

namespace testing {

inline constexpr int kCannotTrace = 77;

// A child that stops before `work` and is then advanced by step(). Killed by the destructor.
class TracedProcess {
 public:
  explicit TracedProcess(const std::function<void()>& work) {
    pid_ = spawn([&] {
      if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kCannotTrace);
      raise(SIGSTOP);
      work();
      raise(SIGSTOP);
    });
    const int status = wait_status(pid_);
    is_traceable_ = WIFSTOPPED(status);
    if (!is_traceable_) pid_ = 0;
    if (!is_traceable_ && WEXITSTATUS(status) != kCannotTrace) throw Failure("the traced process ended early");
  }
  ~TracedProcess() { kill_now(); }
  TracedProcess(const TracedProcess&) = delete;
  TracedProcess& operator=(const TracedProcess&) = delete;

  // Some sandboxes forbid tracing; a test that cannot trace says so and proves nothing.
  bool is_traceable() const { return is_traceable_; }

  // Executes one instruction; false when `work` has ended.
  bool step() {
    if (ptrace(PTRACE_SINGLESTEP, pid_, nullptr, nullptr) != 0) throw std::system_error(errno, std::generic_category());
    const int status = wait_status(pid_);
    if (!WIFSTOPPED(status)) {
      pid_ = 0;
      throw Failure("the traced process died by itself");
    }
    return WSTOPSIG(status) != SIGSTOP;
  }

  void kill_now() {
    if (pid_ == 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
  bool is_traceable_ = false;
};

}  // namespace testing
