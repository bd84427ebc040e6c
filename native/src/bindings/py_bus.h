// What native.bus's class Bus is: the calls, with their arguments checked and their outcomes raised. Documentation:
// bus.pyi.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/common.h"
#include "bus/collectives.h"
#include "bus/exchange.h"
#include "bus/meeting.h"
#include "bus/segment.h"
#include "core/clock.h"

namespace elasticmoe::bindings {

using namespace elasticmoe::bus;

// The module owns one reference to each of its exceptions for the life of the process.
struct Errors {
  PyObject* aborted;
  PyObject* timeout;
  PyObject* desync;
};
inline Errors errors;

inline PyObject* new_error(nb::module_& module, const char* name, PyObject* base) {
  const std::string full_name = std::string("elasticmoe.native.bus.") + name;
  PyObject* type = PyErr_NewException(full_name.c_str(), base, nullptr);
  if (type == nullptr) throw nb::python_error();
  module.attr(name) = nb::borrow(type);
  return type;
}

[[noreturn]] inline void raise_aborted(uint32_t generation, uint32_t current) {
  const std::string text = "generation " + std::to_string(generation) + " is over, membership is now at generation " +
                           std::to_string(current);
  nb::object error = nb::borrow(errors.aborted)(text.c_str());
  error.attr("generation") = current;
  PyErr_SetObject(errors.aborted, error.ptr());
  throw nb::python_error();
}

[[noreturn]] inline void raise(PyObject* type, const char* text) {
  PyErr_SetString(type, text);
  throw nb::python_error();
}

template <typename Element>
Element* buffer(const char* name, uint64_t addr, uint64_t num_elements) {
  require_memory(name, addr, checked_mul(num_elements, sizeof(Element)));
  if (!is_aligned(addr, alignof(Element))) invalid(std::string(name) + " is misaligned");
  return reinterpret_cast<Element*>(static_cast<uintptr_t>(addr));
}

class PyBus {
 public:
  PyBus(uint64_t addr, uint64_t nbytes, int slot)
      : segment_(addr, nbytes),
        meeting_(segment_, slot),
        exchange_(meeting_),
        replica_(segment_, slot, Lane::replica),
        collectives_(replica_) {}

  const Geometry& geometry() const { return segment_.geometry(); }
  Meeting& meeting() { return meeting_; }
  Slot& slot(int64_t index) const {
    if (index < 0 || index >= geometry().max_ranks) invalid("slot must be from 0 to max_ranks - 1");
    return segment_.slot(static_cast<uint32_t>(index));
  }

  using MembershipTuple = std::tuple<uint32_t, uint64_t, bool, uint64_t>;

  MembershipTuple membership() const {
    const MembershipView view = meeting_.membership();
    return {view.generation, view.members, view.is_running, view.epoch};
  }

  std::tuple<uint32_t, uint64_t, uint64_t> staged() const {
    const MembershipView view = meeting_.staged();
    return {view.generation, view.members, view.epoch};
  }

  void join(uint64_t incarnation) {
    const Busy busy(*this);
    meeting_.join(incarnation);
    replica_.follow(incarnation);
  }

  void set_replica(const std::vector<int64_t>& slots) {
    std::vector<uint32_t> checked;
    for (const int64_t slot : slots) checked.push_back(natural<uint32_t>("slot", slot));
    const Busy busy(*this);
    collectives_.set_replica(std::move(checked));
  }

  void set_cores(int64_t cores) {
    if (cores < 1) invalid("cores must be at least 1");
    const int checked = static_cast<int>(std::min<int64_t>(cores, std::numeric_limits<int>::max()));
    meeting_.num_cores = replica_.num_cores = checked;
  }

  std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> step(int64_t generation, int64_t num_tokens, int64_t flags,
                                                             double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto own_tokens = natural<uint32_t>("num_tokens", num_tokens);
    const auto own_flags = natural<uint32_t>("flags", flags);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    std::vector<StepEntry> entries;
    block(wanted, [&] { return meeting_.step(wanted, own_tokens, own_flags, deadline, entries); });
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> result;
    for (const StepEntry& entry : entries) result.emplace_back(entry.slot, entry.num_tokens, entry.flags);
    return result;
  }

  bool idle_wait(int64_t generation, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    return block_or_time_out(wanted, [&] { return meeting_.idle_wait(wanted, deadline); });
  }

  uint64_t dispatch(const Routing& routing, int64_t generation, uint64_t x_addr, uint64_t ids_addr, uint64_t w_addr,
                    int64_t n, uint64_t rows_addr, int64_t rows_cap, uint64_t counts_addr, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_tokens = checked_tokens(n);
    const uint64_t num_pairs = uint64_t{num_tokens} * geometry().top_k;
    const uint64_t cap = natural("rows_cap", rows_cap);
    const Exchange::Tokens tokens{buffer<const float>("x_addr", x_addr, uint64_t{num_tokens} * geometry().hidden),
                                  buffer<const int32_t>("ids_addr", ids_addr, num_pairs),
                                  buffer<const float>("w_addr", w_addr, num_pairs), num_tokens};
    const Exchange::Rows rows{buffer<float>("rows_addr", rows_addr, checked_mul(cap, geometry().hidden)), cap,
                              buffer<int32_t>("counts_addr", counts_addr, routing.num_experts())};
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    uint64_t num_rows = 0;
    block(wanted, [&] { return exchange_.dispatch(routing, wanted, tokens, rows, deadline, num_rows); });
    return num_rows;
  }

  void combine(const Routing& routing, int64_t generation, uint64_t y_addr, uint64_t out_addr, int64_t n,
               double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_tokens = checked_tokens(n);
    const auto* y = buffer<const float>("y_addr", y_addr, 0);
    auto* out = buffer<float>("out_addr", out_addr, uint64_t{num_tokens} * geometry().hidden);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    block(wanted, [&] { return exchange_.combine(routing, wanted, y, out, num_tokens, deadline); });
  }

  using ShareTuple = std::tuple<uint32_t, uint32_t, uint64_t, uint64_t>;

  std::vector<ShareTuple> plan(const Routing& routing, int64_t generation, uint64_t ids_addr, int64_t n,
                               uint64_t fetched_addr, uint64_t answered_addr, int64_t rows_cap, uint64_t returned_addr,
                               uint64_t counts_addr, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_tokens = checked_tokens(n);
    const uint64_t num_pairs = uint64_t{num_tokens} * geometry().top_k;
    const uint64_t cap = natural("rows_cap", rows_cap);
    const auto* ids = buffer<const int32_t>("ids_addr", ids_addr, num_pairs);
    const Exchange::Plan out{buffer<int64_t>("fetched_addr", fetched_addr, cap),
                             buffer<int64_t>("answered_addr", answered_addr, cap), cap,
                             buffer<int64_t>("returned_addr", returned_addr, num_pairs),
                             buffer<int32_t>("counts_addr", counts_addr, routing.num_experts())};
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    std::vector<Exchange::Share> shares;
    block(wanted, [&] { return exchange_.plan(routing, wanted, ids, num_tokens, out, deadline, shares); });
    std::vector<ShareTuple> result;
    for (const auto& share : shares) {
      result.emplace_back(share.slot, share.num_tokens, share.num_rows, share.returned_at);
    }
    return result;
  }

  void meet_combined(const Routing& routing, int64_t generation, int64_t n, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_tokens = checked_tokens(n);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    block(wanted, [&] { return exchange_.meet_combined(routing, wanted, num_tokens, deadline); });
  }

  void reduce(int64_t generation, uint64_t x_addr, uint64_t rows_addr, uint64_t out_addr, int64_t n, int64_t width,
              double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_rows = natural<uint32_t>("n", n), row_width = natural<uint32_t>("width", width);
    const uint64_t num_elements = checked_mul(num_rows, row_width);
    const auto* x = x_addr != 0 ? buffer<const float>("x_addr", x_addr, num_elements) : nullptr;
    const auto* rows = rows_addr != 0 ? buffer<const float>("rows_addr", rows_addr, num_elements) : nullptr;
    auto* out = buffer<float>("out_addr", out_addr, num_elements);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    block(wanted, [&] { return collectives_.reduce(wanted, x, rows, out, num_rows, row_width, deadline); });
  }

  void gather(int64_t generation, uint64_t x_addr, uint64_t out_addr, int64_t n, int64_t total, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const auto num_rows = natural<uint32_t>("n", n), width = natural<uint32_t>("total", total);
    const auto* x = buffer<const float>("x_addr", x_addr, 0);
    auto* out = out_addr != 0 ? buffer<float>("out_addr", out_addr, checked_mul(num_rows, width)) : nullptr;
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    const Stopwatch stopwatch(exchange_ns_);
    block(wanted, [&] { return collectives_.gather(wanted, x, out, num_rows, width, deadline); });
  }

  void write_plan(const nb::bytes& plan) {
    const Busy busy(*this);
    collectives_.write_plan(plan.data(), plan.size());
  }

  nb::bytes read_plan(int64_t generation) {
    const auto wanted = natural<uint32_t>("generation", generation);
    std::string plan;
    if (collectives_.read_plan(wanted, plan) == Outcome::aborted) {
      raise_aborted(wanted, meeting_.membership().generation);
    }
    return nb::bytes(plan.data(), plan.size());
  }

  int64_t take_wait_ns() { return meeting_.take_wait_ns() + replica_.take_wait_ns(); }
  int64_t take_exchange_ns() { return exchange_ns_.exchange(0, std::memory_order_relaxed); }

 private:
  // One thread at a time in the calls that keep state between them.
  class Busy {
   public:
    explicit Busy(PyBus& bus) : bus_(bus) {
      require(!bus_.is_busy_.exchange(true, std::memory_order_acquire), "another thread is in a call of this bus");
    }
    ~Busy() { bus_.is_busy_.store(false, std::memory_order_release); }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    PyBus& bus_;
  };

  class Stopwatch {
   public:
    explicit Stopwatch(std::atomic<int64_t>& total) : total_(total), start_(now_ns()) {}
    ~Stopwatch() { total_.fetch_add(now_ns() - start_, std::memory_order_relaxed); }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

   private:
    std::atomic<int64_t>& total_;
    int64_t start_;
  };

  uint32_t checked_tokens(int64_t n) const {
    const auto num_tokens = natural<uint32_t>("n", n);
    require_range("n", num_tokens, 0, geometry().max_tokens);
    return num_tokens;
  }

  // Runs the slices of a blocking operation, with Python's signal handlers in between. False at the deadline.
  template <typename Operation>
  bool block_or_time_out(uint32_t generation, Operation operation) {
    for (;;) {
      Outcome outcome;
      {
        nb::gil_scoped_release released;
        outcome = operation();
      }
      switch (outcome) {
        case Outcome::done:
          return true;
        case Outcome::timeout:
          return false;
        case Outcome::aborted:
          raise_aborted(generation, meeting_.membership().generation);
        case Outcome::desync:
          raise(errors.desync, "members made different calls, used different routings, or published nonsense");
        case Outcome::interrupted:
          if (PyErr_CheckSignals() != 0) throw nb::python_error();
      }
    }
  }

  template <typename Operation>
  void block(uint32_t generation, Operation operation) {
    if (!block_or_time_out(generation, operation)) {
      raise(errors.timeout, "not every member arrived before the deadline");
    }
  }

  Segment segment_;
  Meeting meeting_;
  Exchange exchange_;
  Meeting replica_;
  Collectives collectives_;
  std::atomic<bool> is_busy_{false};
  std::atomic<int64_t> exchange_ns_{0};
};

}  // namespace elasticmoe::bindings
