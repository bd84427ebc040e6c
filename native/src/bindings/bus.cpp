// native.bus. Documentation: bus.pyi.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "bindings/common.h"
#include "bus/exchange.h"
#include "bus/meeting.h"
#include "bus/segment.h"
#include "core/clock.h"

namespace elasticmoe::bindings {
namespace {

using namespace elasticmoe::bus;

// The module owns one reference to each of its exceptions for the life of the process.
struct Errors {
  PyObject* aborted;
  PyObject* timeout;
  PyObject* desync;
};
Errors errors;

PyObject* new_error(nb::module_& module, const char* name, PyObject* base) {
  const std::string full_name = std::string("elasticmoe.native.bus.") + name;
  PyObject* type = PyErr_NewException(full_name.c_str(), base, nullptr);
  if (type == nullptr) throw nb::python_error();
  module.attr(name) = nb::borrow(type);
  return type;
}

[[noreturn]] void raise_aborted(uint32_t generation, uint32_t current) {
  const std::string text = "generation " + std::to_string(generation) + " is over, membership is now at generation " +
                           std::to_string(current);
  nb::object error = nb::borrow(errors.aborted)(text.c_str());
  error.attr("generation") = current;
  PyErr_SetObject(errors.aborted, error.ptr());
  throw nb::python_error();
}

[[noreturn]] void raise(PyObject* type, const char* text) {
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
      : segment_(addr, nbytes), meeting_(segment_, slot), exchange_(meeting_) {}

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
  }

  void barrier(int64_t generation, double deadline_ms) {
    const auto wanted = natural<uint32_t>("generation", generation);
    const int64_t deadline = deadline_from_ms(deadline_ms);
    const Busy busy(*this);
    block(wanted, [&] { return meeting_.meet(wanted, Kind::barrier, 0, deadline); });
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
  std::atomic<bool> is_busy_{false};
  std::atomic<int64_t> exchange_ns_{0};
};

Geometry geometry_from(int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k) {
  return {natural<uint32_t>("max_ranks", max_ranks), natural<uint32_t>("max_tokens", max_tokens),
          natural<uint32_t>("hidden", hidden), natural<uint32_t>("top_k", top_k)};
}

void bind_bus(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<PyBus>(module, "Bus")
      .def(
          "__init__",
          [](PyBus* self, uint64_t addr, int64_t nbytes, int64_t slot) {
            if (slot < -1 || slot >= kMaxRanks) invalid("slot must be -1 or below the bus's max_ranks");
            new (self) PyBus(addr, natural("nbytes", nbytes), static_cast<int>(slot));
          },
          "addr"_a, "nbytes"_a, "slot"_a = -1)
      .def_prop_ro("slot", [](PyBus& bus) { return bus.meeting().slot_or_observer(); })
      .def_prop_ro("max_ranks", [](PyBus& bus) { return bus.geometry().max_ranks; })
      .def_prop_ro("max_tokens", [](PyBus& bus) { return bus.geometry().max_tokens; })
      .def_prop_ro("hidden", [](PyBus& bus) { return bus.geometry().hidden; })
      .def_prop_ro("top_k", [](PyBus& bus) { return bus.geometry().top_k; })
      .def(
          "set_membership",
          [](PyBus& bus, int64_t generation, uint64_t members, bool running, uint64_t epoch) {
            bus.meeting().set_membership(natural("generation", generation), members, running, epoch);
          },
          "generation"_a, "members"_a, "running"_a, "epoch"_a = 0)
      .def(
          "stage_membership",
          [](PyBus& bus, int64_t generation, uint64_t members, uint64_t epoch) {
            bus.meeting().stage_membership(natural("generation", generation), members, epoch);
          },
          "generation"_a, "members"_a, "epoch"_a)
      .def("staged", &PyBus::staged)
      .def(
          "flip",
          [](PyBus& bus, int64_t generation) {
            return bus.meeting().flip(natural<uint32_t>("generation", generation));
          },
          "generation"_a)
      .def("membership", &PyBus::membership)
      .def("join", &PyBus::join, "incarnation"_a)
      .def("leave", [](PyBus& bus) { bus.meeting().leave(); })
      .def(
          "incarnation",
          [](PyBus& bus, int64_t slot) { return bus.slot(slot).incarnation.load(std::memory_order_seq_cst); }, "slot"_a)
      .def("bump_progress",
           [](PyBus& bus) { bus.slot(bus.meeting().slot()).progress.fetch_add(1, std::memory_order_relaxed); })
      .def(
          "progress", [](PyBus& bus, int64_t slot) { return bus.slot(slot).progress.load(std::memory_order_relaxed); },
          "slot"_a)
      .def(
          "set_waiting_for_device",
          [](PyBus& bus, bool is_waiting) {
            bus.slot(bus.meeting().slot()).is_waiting_for_device.store(is_waiting, std::memory_order_relaxed);
          },
          "is_waiting"_a)
      .def(
          "is_waiting_for_device",
          [](PyBus& bus, int64_t slot) {
            return bus.slot(slot).is_waiting_for_device.load(std::memory_order_relaxed) != 0;
          },
          "slot"_a)
      .def("barrier", &PyBus::barrier, "generation"_a, "deadline_ms"_a)
      .def("step", &PyBus::step, "generation"_a, "num_tokens"_a, "flags"_a, "deadline_ms"_a)
      .def("idle_wait", &PyBus::idle_wait, "generation"_a, "deadline_ms"_a)
      .def("dispatch", &PyBus::dispatch, "routing"_a, "generation"_a, "x_addr"_a, "ids_addr"_a, "w_addr"_a, "n"_a,
           "rows_addr"_a, "rows_cap"_a, "counts_addr"_a, "deadline_ms"_a)
      .def("combine", &PyBus::combine, "routing"_a, "generation"_a, "y_addr"_a, "out_addr"_a, "n"_a, "deadline_ms"_a)
      .def("plan", &PyBus::plan, "routing"_a, "generation"_a, "ids_addr"_a, "n"_a, "fetched_addr"_a, "answered_addr"_a,
           "rows_cap"_a, "returned_addr"_a, "counts_addr"_a, "deadline_ms"_a)
      .def("meet_combined", &PyBus::meet_combined, "routing"_a, "generation"_a, "n"_a, "deadline_ms"_a)
      .def("take_wait_ns", [](PyBus& bus) { return bus.meeting().take_wait_ns(); })
      .def("take_exchange_ns", &PyBus::take_exchange_ns);
}

void bind_functions(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "bus_bytes",
      [](int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k) {
        return bus_bytes(geometry_from(max_ranks, max_tokens, hidden, top_k));
      },
      "max_ranks"_a, "max_tokens"_a, "hidden"_a, "top_k"_a);
  module.def(
      "format_bus",
      [](uint64_t addr, int64_t nbytes, int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k) {
        format_bus(addr, natural("nbytes", nbytes), geometry_from(max_ranks, max_tokens, hidden, top_k));
      },
      "addr"_a, "nbytes"_a, "max_ranks"_a, "max_tokens"_a, "hidden"_a, "top_k"_a);
  nb::class_<Routing>(module, "Routing")
      .def_prop_ro("num_experts", &Routing::num_experts)
      .def_prop_ro("owners", [](const Routing& routing) { return routing.owners(); });
  module.def("make_routing", [](std::vector<int32_t> owners) { return Routing(std::move(owners)); }, "owners"_a);
}

}  // namespace
}  // namespace elasticmoe::bindings

NB_MODULE(bus, module) {
  using namespace elasticmoe::bindings;
  module.attr("MAX_RANKS") = elasticmoe::bus::kMaxRanks;
  errors.aborted = new_error(module, "BusAborted", PyExc_RuntimeError);
  errors.timeout = new_error(module, "BusTimeout", PyExc_TimeoutError);
  errors.desync = new_error(module, "BusDesync", PyExc_RuntimeError);
  bind_functions(module);
  bind_bus(module);
}
