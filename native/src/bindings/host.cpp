// native.host. Documentation: host.pyi.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings/common.h"
#include "host/pages.h"
#include "host/reservation.h"

namespace elasticmoe::bindings {
namespace {

using PartTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

MapPart part_from(const PartTuple& part) {
  const auto& [offset, fd, fd_offset, nbytes] = part;
  return {natural("offset", offset), descriptor(fd), natural("fd_offset", fd_offset), natural("nbytes", nbytes)};
}

void map_parts(Reservation& self, const std::vector<PartTuple>& parts, bool writable, bool populate) {
  std::vector<MapPart> native;
  native.reserve(parts.size());
  for (const PartTuple& part : parts) native.push_back(part_from(part));
  without_gil([&] { self.map(native, writable, populate); });
}

void bind_reservation(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Reservation>(module, "Reservation")
      .def(
          "__init__",
          [](Reservation* self, int64_t nbytes, int64_t alignment) {
            new (self) Reservation(natural("nbytes", nbytes), natural("alignment", alignment));
          },
          "nbytes"_a, "alignment"_a = 4096)
      .def_prop_ro("base", &Reservation::base)
      .def_prop_ro("nbytes", &Reservation::nbytes)
      .def(
          "map",
          [](Reservation& self, int64_t offset, int64_t fd, int64_t fd_offset, int64_t nbytes, bool writable,
             bool populate) { map_parts(self, {{offset, fd, fd_offset, nbytes}}, writable, populate); },
          "offset"_a, "fd"_a, "fd_offset"_a, "nbytes"_a, "writable"_a, "populate"_a = false)
      .def("map_many", &map_parts, "parts"_a, "writable"_a, "populate"_a = false)
      .def(
          "unmap",
          [](Reservation& self, int64_t offset, int64_t nbytes) {
            without_gil([&] { self.unmap(natural("offset", offset), natural("nbytes", nbytes)); });
          },
          "offset"_a, "nbytes"_a)
      .def("mapped", &Reservation::mapped)
      .def(
          "collapse",
          [](Reservation& self, int64_t offset, int64_t nbytes) {
            nb::gil_scoped_release released;
            return self.collapse(natural("offset", offset), natural("nbytes", nbytes));
          },
          "offset"_a, "nbytes"_a)
      .def(
          "make_large",
          [](Reservation& self, int64_t offset, int64_t nbytes, int64_t large_bytes) {
            bool is_large = false;
            without_gil([&] {
              is_large = self.make_large(natural("offset", offset), natural("nbytes", nbytes),
                                         natural("large_bytes", large_bytes));
            });
            return is_large;
          },
          "offset"_a, "nbytes"_a, "large_bytes"_a)
      .def("close", [](Reservation& self) {
        nb::gil_scoped_release released;
        self.close();
      });
}

void bind_pages(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "allocate",
      [](int64_t fd, int64_t offset, int64_t nbytes) {
        without_gil([&] { allocate(descriptor(fd), natural("offset", offset), natural("nbytes", nbytes)); });
      },
      "fd"_a, "offset"_a, "nbytes"_a);
  module.def(
      "punch_hole",
      [](int64_t fd, int64_t offset, int64_t nbytes) {
        bool is_gone = false;
        without_gil(
            [&] { is_gone = punch_hole(descriptor(fd), natural("offset", offset), natural("nbytes", nbytes)); });
        return is_gone;
      },
      "fd"_a, "offset"_a, "nbytes"_a);
  module.def(
      "write_from",
      [](int64_t fd, int64_t file_offset, uint64_t addr, int64_t nbytes) {
        without_gil(
            [&] { write_from(descriptor(fd), natural("file_offset", file_offset), addr, natural("nbytes", nbytes)); });
      },
      "fd"_a, "file_offset"_a, "addr"_a, "nbytes"_a);
  module.def(
      "copy",
      [](uint64_t dst_addr, uint64_t src_addr, int64_t nbytes) {
        without_gil([&] { copy_memory(dst_addr, src_addr, natural("nbytes", nbytes)); });
      },
      "dst_addr"_a, "src_addr"_a, "nbytes"_a);
  module.def(
      "checksum",
      [](uint64_t addr, int64_t nbytes) {
        uint64_t hash = 0;
        without_gil([&] { hash = checksum_memory(addr, natural("nbytes", nbytes)); });
        return hash;
      },
      "addr"_a, "nbytes"_a);
  module.def(
      "read_into",
      [](int64_t fd, int64_t file_offset, uint64_t addr, int64_t nbytes) {
        uint64_t done = 0;
        without_gil([&] {
          read_into(descriptor(fd), natural("file_offset", file_offset), addr, natural("nbytes", nbytes), done);
        });
      },
      "fd"_a, "file_offset"_a, "addr"_a, "nbytes"_a);
}

}  // namespace
}  // namespace elasticmoe::bindings

NB_MODULE(host, module) {
  elasticmoe::bindings::register_system_error();
  elasticmoe::bindings::bind_reservation(module);
  elasticmoe::bindings::bind_pages(module);
}
