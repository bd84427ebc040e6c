// native.ledger. Documentation: ledger.pyi.
#include "ledger/ledger.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string_view>
#include <vector>

#include "bindings/common.h"

namespace elasticmoe::bindings {
namespace {

using namespace elasticmoe::ledger;

Geometry geometry_from(int64_t num_rows, int64_t max_tokens, int64_t max_blocks, int64_t blob_bytes) {
  return {natural<uint32_t>("num_rows", num_rows), natural<uint32_t>("max_tokens", max_tokens),
          natural<uint32_t>("max_blocks", max_blocks), natural<uint32_t>("blob_bytes", blob_bytes)};
}

void bind_functions(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "ledger_bytes",
      [](int64_t num_rows, int64_t max_tokens, int64_t max_blocks, int64_t blob_bytes) {
        return ledger_bytes(geometry_from(num_rows, max_tokens, max_blocks, blob_bytes));
      },
      "num_rows"_a, "max_tokens"_a, "max_blocks"_a, "blob_bytes"_a);
  module.def(
      "format_ledger",
      [](uint64_t addr, int64_t nbytes, int64_t num_rows, int64_t max_tokens, int64_t max_blocks, int64_t blob_bytes) {
        format_ledger(addr, natural("nbytes", nbytes), geometry_from(num_rows, max_tokens, max_blocks, blob_bytes));
      },
      "addr"_a, "nbytes"_a, "num_rows"_a, "max_tokens"_a, "max_blocks"_a, "blob_bytes"_a);
}

void bind_ledger(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Row>(module, "Row")
      .def_prop_ro("blob", [](const Row& row) { return nb::bytes(row.blob.data(), row.blob.size()); })
      .def_prop_ro("tokens", [](const Row& row) { return row.tokens; })
      .def_prop_ro("num_prompt", [](const Row& row) { return row.num_prompt; })
      .def_prop_ro("blocks", [](const Row& row) { return row.blocks; })
      .def_prop_ro("kv_len", [](const Row& row) { return row.kv_len; })
      .def_prop_ro("mark", [](const Row& row) { return row.mark; });

  nb::class_<Ledger>(module, "Ledger")
      .def(
          "__init__",
          [](Ledger* self, uint64_t addr, int64_t nbytes) { new (self) Ledger(addr, natural("nbytes", nbytes)); },
          "addr"_a, "nbytes"_a)
      .def_prop_ro("num_rows", [](const Ledger& ledger) { return ledger.geometry().num_rows; })
      .def_prop_ro("max_tokens", [](const Ledger& ledger) { return ledger.geometry().max_tokens; })
      .def_prop_ro("max_blocks", [](const Ledger& ledger) { return ledger.geometry().max_blocks; })
      .def_prop_ro("blob_bytes", [](const Ledger& ledger) { return ledger.geometry().blob_bytes; })
      .def(
          "open_row",
          [](Ledger& ledger, int64_t row, const nb::bytes& blob, const std::vector<int32_t>& tokens,
             const std::vector<int32_t>& blocks,
             int64_t mark) { ledger.open_row(row, std::string_view(blob.c_str(), blob.size()), tokens, blocks, mark); },
          "row"_a, "blob"_a, "tokens"_a, "blocks"_a, "mark"_a = 0)
      .def("append_blocks", &Ledger::append_blocks, "row"_a, "blocks"_a)
      .def("commit", &Ledger::commit, "row"_a, "kv_len"_a, "new_tokens"_a)
      .def("commit_many", &Ledger::commit_many, "commits"_a)
      .def("rewind", &Ledger::rewind, "row"_a, "kv_len"_a, "num_blocks"_a)
      .def("mark_rows", &Ledger::mark_rows, "rows"_a, "mark"_a)
      .def("close_row", &Ledger::close_row, "row"_a)
      .def("read_row", &Ledger::read_row, "row"_a)
      .def("rows", &Ledger::live_rows);
}

}  // namespace
}  // namespace elasticmoe::bindings

NB_MODULE(ledger, module) {
  using namespace elasticmoe::bindings;
  register_system_error();
  nanobind::exception<elasticmoe::ledger::Corrupt>(module, "LedgerCorrupt", PyExc_RuntimeError);
  bind_functions(module);
  bind_ledger(module);
}
