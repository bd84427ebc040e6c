#include "kernels/crew.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>

#include "core/clock.h"
#include "core/float_mode.h"
#include "core/futex.h"

namespace elasticmoe::kernels {
namespace {

// How long a helper without work looks for more before it sleeps: longer than what lies between two products of a
// layer.
constexpr int64_t kLookNs = 50'000;
constexpr int kLooks = 64;      // between two looks at the clock
constexpr int kPauses = 2'000;  // that the calling thread waits for the others' last items before it gives way

// One job at a time. `state` says which one (the upper bits) and how many of its items nobody has taken yet: who takes
// one by compare-and-exchange knows that the job is that one, and it cannot end before the item is counted in `done`.
struct Crew {
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<uint32_t> bell{0};
  std::atomic<int64_t> num_sleeping{0};         // until the bell rings
  alignas(64) std::atomic<uint32_t> roster{0};  // rung when there are to be more or fewer threads
  std::atomic<int64_t> num_threads{1};          // that take items
  std::atomic<bool> is_taken{false};
  std::atomic<bool> lacks_memory{false};
  void (*work)(void*, int64_t) = nullptr;
  void* context = nullptr;
  uint32_t mode = 0;        // of the calling thread's floats, in which everybody computes
  int64_t num_started = 0;  // helpers; changed under is_taken
};

constexpr uint64_t kItems = (uint64_t{1} << 24) - 1;

// Never destroyed: helpers sleep on it while the process ends. A child of a fork has none of them, and begins anew.
constinit Crew first;
constinit std::atomic<Crew*> instance{&first};

Crew& crew() {
  return *instance.load(std::memory_order_acquire);
}

void begin_anew() {
  instance.store(new Crew, std::memory_order_release);
}

// Once in a process and its children, which have what it registered.
void tell_of_forks() {
  static constinit std::atomic<bool> is_told{false};
  if (is_told.load(std::memory_order_acquire)) return;
  if (const int error = pthread_atfork(nullptr, nullptr, begin_anew); error != 0) {
    throw std::system_error(error, std::generic_category(), "threads for kernels");
  }
  is_told.store(true, std::memory_order_release);
}

// False if there was no memory for it.
bool run(void (*work)(void*, int64_t), void* context, int64_t item) noexcept {
  try {
    work(context, item);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// Takes and does one item. False if there is none.
bool take(Crew& of) noexcept {
  uint64_t state = of.state.load(std::memory_order_acquire);
  do {
    if ((state & kItems) == 0) return false;
  } while (!of.state.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire));
  if (float_mode() != of.mode) set_float_mode(of.mode);
  if (!run(of.work, of.context, static_cast<int64_t>((state & kItems) - 1))) {
    of.lacks_memory.store(true, std::memory_order_relaxed);
  }
  of.done.fetch_add(1, std::memory_order_release);
  return true;
}

// Whether a helper without work found some while it looked.
bool look(const Crew& of) {
  const int64_t end = now_ns() + kLookNs;
  do {
    for (int i = 0; i < kLooks; ++i) {
      if ((of.state.load(std::memory_order_acquire) & kItems) != 0) return true;
      cpu_pause();
    }
  } while (now_ns() < end);
  return false;
}

void help(Crew& of, int64_t number) {
  for (;;) {
    const uint32_t roster = of.roster.load(std::memory_order_acquire);
    if (number >= of.num_threads.load(std::memory_order_acquire)) {
      futex_wait(of.roster, roster, kNever);
      continue;
    }
    if (take(of) || look(of)) continue;
    of.num_sleeping.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t bell = of.bell.load(std::memory_order_seq_cst);
    if ((of.state.load(std::memory_order_seq_cst) & kItems) == 0) futex_wait(of.bell, bell, kNever);
    of.num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
  }
}

struct Start {
  Crew* of;
  int64_t number;
};

void* run_helper(void* start) {
  const std::unique_ptr<Start> given(static_cast<Start*>(start));
  help(*given->of, given->number);
  return nullptr;
}

// Signals are the calling thread's: an interpreter's handlers are not for helpers. But for those that a thread's own
// faults raise: they end the process, and say why.
void start_helper(Crew& of, int64_t number) {
  auto start = std::make_unique<Start>(Start{&of, number});
  pthread_t thread;
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int error = pthread_create(&thread, nullptr, run_helper, start.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) throw std::system_error(error, std::generic_category(), "a thread for kernels");
  static_cast<void>(start.release());
  pthread_detach(thread);
#if defined(__linux__)
  pthread_setname_np(thread, "kernels");
#endif
}

struct Taken {
  Crew& of;
  ~Taken() { of.is_taken.store(false, std::memory_order_release); }
};

}  // namespace

int64_t num_threads() {
  return crew().num_threads.load(std::memory_order_acquire);
}

void set_threads(int64_t count) {
  if (count < 1 || count > kMostThreads) throw std::invalid_argument("threads must be from 1 to 64");
  Crew& of = crew();
  while (of.is_taken.exchange(true, std::memory_order_acquire)) sched_yield();
  const Taken taken{of};
  if (count > 1) tell_of_forks();
  for (; of.num_started < count - 1; ++of.num_started) start_helper(of, of.num_started + 1);
  of.num_threads.store(count, std::memory_order_release);
  of.roster.fetch_add(1, std::memory_order_release);
  futex_wake_all(of.roster);
}

void share(int64_t count, void (*work)(void*, int64_t), void* context) {
  Crew& of = crew();
  const bool is_shared = count > 1 && count <= static_cast<int64_t>(kItems) &&
                         of.num_threads.load(std::memory_order_acquire) > 1 &&
                         !of.is_taken.exchange(true, std::memory_order_acquire);
  if (!is_shared) {
    bool lacks_memory = false;
    for (int64_t item = 0; item < count; ++item) lacks_memory |= !run(work, context, item);
    if (lacks_memory) throw std::bad_alloc();
    return;
  }
  const Taken taken{of};
  of.work = work;
  of.context = context;
  of.mode = float_mode();
  of.lacks_memory.store(false, std::memory_order_relaxed);
  of.done.store(0, std::memory_order_relaxed);
  const uint64_t job = (of.state.load(std::memory_order_relaxed) | kItems) + 1;
  of.state.store(job | static_cast<uint64_t>(count), std::memory_order_seq_cst);
  if (of.num_sleeping.load(std::memory_order_seq_cst) > 0) {
    of.bell.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(of.bell);
  }
  while (take(of)) {
  }
  for (int waited = 0; of.done.load(std::memory_order_acquire) < count; ++waited) {
    waited < kPauses ? cpu_pause() : static_cast<void>(sched_yield());
  }
  if (of.lacks_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

}  // namespace elasticmoe::kernels
