// The ledger: rows that survive the rank that writes them.
//
//   Header | for each row, a cache line's multiple: RowHeader, blob, tokens, blocks
//
// A row's arrays only grow, and nothing in them counts until one word says so: `counts` holds the numbers of tokens, of
// tokens with KV, and of blocks, and is stored last (release). `state` goes free -> opening -> live -> free; a row left
// opening by a kill is as good as free. So a kill at any instruction leaves the row before or after the operation.
//
// `mark` is a word of the writer's beside all that: what it notes of a row before it does what may kill it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace elasticmoe::ledger {

struct Geometry {
  uint32_t num_rows;
  uint32_t max_tokens;
  uint32_t max_blocks;
  uint32_t blob_bytes;
};

struct Row {
  std::string blob;
  std::vector<int32_t> tokens;
  std::vector<int32_t> blocks;
  uint32_t kv_len;
  uint32_t num_prompt;
  uint64_t mark;
};

// Somebody who is no ledger wrote into the segment.
struct Corrupt : std::runtime_error {
  using std::runtime_error::runtime_error;
};

uint64_t ledger_bytes(const Geometry& geometry);
void format_ledger(uint64_t addr, uint64_t nbytes, const Geometry& geometry);

// A view of the segment, which the caller keeps mapped. For one thread at a time; one writer per row among all
// processes.
class Ledger {
 public:
  using Commit = std::tuple<int64_t, int64_t, int64_t>;  // row, kv_len, token

  Ledger(uint64_t addr, uint64_t nbytes);

  const Geometry& geometry() const { return geometry_; }

  void open_row(int64_t row, std::string_view blob, const std::vector<int32_t>& tokens,
                const std::vector<int32_t>& blocks, int64_t mark = 0);
  void append_blocks(int64_t row, const std::vector<int32_t>& blocks);
  void commit(int64_t row, int64_t kv_len, const std::vector<int32_t>& new_tokens);
  void commit_many(const std::vector<Commit>& commits);
  void rewind(int64_t row, int64_t kv_len, int64_t num_blocks);
  void mark_rows(const std::vector<int64_t>& rows, int64_t mark);
  void close_row(int64_t row);
  std::optional<Row> read_row(int64_t row) const;
  std::vector<uint32_t> live_rows() const;

 private:
  struct RowHeader;
  struct Counts;

  RowHeader& header_of(int64_t row) const;
  RowHeader& live_header_of(int64_t row) const;
  Counts checked_counts(const RowHeader& header) const;
  Counts after_commit(const RowHeader& header, int64_t kv_len, size_t num_new) const;
  char* blob_of(RowHeader& header) const;
  int32_t* tokens_of(RowHeader& header) const;
  int32_t* blocks_of(RowHeader& header) const;

  Geometry geometry_;
  std::byte* rows_;
  uint64_t stride_;
  uint64_t tokens_offset_;
  uint64_t blocks_offset_;
};

}  // namespace elasticmoe::ledger
