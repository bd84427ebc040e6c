// native.bus. Documentation: bus.pyi.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <utility>
#include <vector>

#include "bindings/py_bus.h"

namespace elasticmoe::bindings {
namespace {

Geometry geometry_from(int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k, int64_t half_elements,
                       int64_t plan_bytes) {
  return {natural<uint32_t>("max_ranks", max_ranks),
          natural<uint32_t>("max_tokens", max_tokens),
          natural<uint32_t>("hidden", hidden),
          natural<uint32_t>("top_k", top_k),
          natural<uint32_t>("half_elements", half_elements),
          natural<uint32_t>("plan_bytes", plan_bytes)};
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
      .def_prop_ro("half_elements", [](PyBus& bus) { return bus.geometry().half_elements; })
      .def_prop_ro("plan_bytes", [](PyBus& bus) { return bus.geometry().plan_bytes; })
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
      .def(
          "set_kv_blocks",
          [](PyBus& bus, int64_t num_blocks) {
            bus.slot(bus.meeting().slot())
                .kv_blocks.store(natural<uint32_t>("num_blocks", num_blocks), std::memory_order_seq_cst);
          },
          "num_blocks"_a)
      .def(
          "kv_blocks",
          [](PyBus& bus, int64_t slot) { return bus.slot(slot).kv_blocks.load(std::memory_order_seq_cst); }, "slot"_a)
      .def(
          "tell_shortage",
          [](PyBus& bus, int64_t said) {
            bus.slot(bus.meeting().slot()).shortage.store(natural<uint64_t>("said", said), std::memory_order_seq_cst);
          },
          "said"_a)
      .def(
          "shortage", [](PyBus& bus, int64_t slot) { return bus.slot(slot).shortage.load(std::memory_order_seq_cst); },
          "slot"_a)
      .def("step", &PyBus::step, "generation"_a, "num_tokens"_a, "flags"_a, "deadline_ms"_a)
      .def("idle_wait", &PyBus::idle_wait, "generation"_a, "deadline_ms"_a)
      .def("dispatch", &PyBus::dispatch, "routing"_a, "generation"_a, "x_addr"_a, "ids_addr"_a, "w_addr"_a, "n"_a,
           "rows_addr"_a, "rows_cap"_a, "counts_addr"_a, "deadline_ms"_a)
      .def("combine", &PyBus::combine, "routing"_a, "generation"_a, "y_addr"_a, "out_addr"_a, "n"_a, "deadline_ms"_a)
      .def("plan", &PyBus::plan, "routing"_a, "generation"_a, "ids_addr"_a, "n"_a, "fetched_addr"_a, "answered_addr"_a,
           "rows_cap"_a, "returned_addr"_a, "counts_addr"_a, "deadline_ms"_a)
      .def("meet_combined", &PyBus::meet_combined, "routing"_a, "generation"_a, "n"_a, "deadline_ms"_a)
      .def("set_replica", &PyBus::set_replica, "slots"_a)
      .def("set_cores", &PyBus::set_cores, "cores"_a)
      .def("reduce", &PyBus::reduce, "generation"_a, "x_addr"_a, "rows_addr"_a, "out_addr"_a, "n"_a, "width"_a,
           "deadline_ms"_a)
      .def("gather", &PyBus::gather, "generation"_a, "x_addr"_a, "out_addr"_a, "n"_a, "total"_a, "deadline_ms"_a)
      .def("write_plan", &PyBus::write_plan, "plan"_a)
      .def("read_plan", &PyBus::read_plan, "generation"_a)
      .def("take_wait_ns", &PyBus::take_wait_ns)
      .def("take_exchange_ns", &PyBus::take_exchange_ns);
}

void bind_functions(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "bus_bytes",
      [](int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k, int64_t half_elements,
         int64_t plan_bytes) {
        return bus_bytes(geometry_from(max_ranks, max_tokens, hidden, top_k, half_elements, plan_bytes));
      },
      "max_ranks"_a, "max_tokens"_a, "hidden"_a, "top_k"_a, "half_elements"_a = 0, "plan_bytes"_a = 0);
  module.def(
      "format_bus",
      [](uint64_t addr, int64_t nbytes, int64_t max_ranks, int64_t max_tokens, int64_t hidden, int64_t top_k,
         int64_t half_elements, int64_t plan_bytes) {
        format_bus(addr, natural("nbytes", nbytes),
                   geometry_from(max_ranks, max_tokens, hidden, top_k, half_elements, plan_bytes));
      },
      "addr"_a, "nbytes"_a, "max_ranks"_a, "max_tokens"_a, "hidden"_a, "top_k"_a, "half_elements"_a = 0,
      "plan_bytes"_a = 0);
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
