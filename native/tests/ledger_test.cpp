// The ledger in one process.
#include "ledger/ledger.h"

#include <atomic>
#include <numeric>
#include <thread>

#include "testing.h"

using namespace elasticmoe::ledger;
using testing::SharedMemory;

namespace {

constexpr Geometry kGeometry{.num_rows = 5, .max_tokens = 20, .max_blocks = 4, .blob_bytes = 10};

struct Fixture {
  SharedMemory memory{ledger_bytes(kGeometry)};
  Fixture() { format_ledger(memory.addr(), memory.nbytes(), kGeometry); }
  Ledger open() const { return Ledger(memory.addr(), memory.nbytes()); }
};

using Ints = std::vector<int32_t>;

}  // namespace

TEST(a_row_lives) {
  const Fixture segment;
  Ledger writer = segment.open();
  const Ledger reader = segment.open();
  CHECK(reader.live_rows().empty() && !reader.read_row(2));
  writer.open_row(2, "request", {1, 2, 3}, {7});
  writer.append_blocks(2, {8, 9});
  writer.commit(2, 3, {4});
  writer.commit(2, 4, {});
  writer.commit_many({{2, 5, 5}});
  const Row row = *reader.read_row(2);
  CHECK(row.blob == "request" && row.tokens == (Ints{1, 2, 3, 4, 5}) && row.blocks == (Ints{7, 8, 9}));
  CHECK(row.kv_len == 5 && row.num_prompt == 3);
  CHECK(reader.live_rows() == std::vector<uint32_t>{2});
  writer.rewind(2, 0, 1);
  writer.append_blocks(2, {3});
  writer.mark_rows({2}, 77);
  writer.commit(2, 1, {});
  const Row again = *reader.read_row(2);
  CHECK(row.mark == 0 && again.mark == 77);
  CHECK(again.kv_len == 1 && again.blocks == (Ints{7, 3}) && again.tokens == row.tokens);
  writer.close_row(2);
  CHECK(reader.live_rows().empty() && !reader.read_row(2));
  writer.open_row(2, "", {}, {});
  CHECK(reader.read_row(2)->tokens.empty() && reader.read_row(2)->blob.empty() && reader.read_row(2)->mark == 0);
  writer.open_row(0, "", {}, {}, 5);
  CHECK(reader.read_row(0)->mark == 5);
}

TEST(limits_are_exact) {
  const Fixture segment;
  Ledger ledger = segment.open();
  Ints most(20);
  std::iota(most.begin(), most.end(), 0);
  ledger.open_row(4, "0123456789", most, {1, 2, 3, 4});
  CHECK(ledger.read_row(4)->tokens == most && ledger.read_row(4)->blob == "0123456789");
  CHECK_THROWS(std::invalid_argument, ledger.commit(4, 0, {1}));
  CHECK_THROWS(std::invalid_argument, ledger.append_blocks(4, {5}));
  ledger.commit(4, 20, {});
  CHECK(ledger.read_row(4)->kv_len == 20);
}

TEST(what_is_wrong_is_refused_and_changes_nothing) {
  const Fixture segment;
  Ledger ledger = segment.open();
  ledger.open_row(0, "a", {1, 2}, {1});
  ledger.open_row(1, "b", {1, 2}, {1});
  ledger.commit(0, 2, {});
  CHECK_THROWS(std::invalid_argument, ledger.open_row(0, "", {}, {}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(5, "", {}, {}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(-1, "", {}, {}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(3, "01234567890", {}, {}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(3, "", {-1}, {}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(3, "", {}, {1, 2, 3, 4, 5}));
  CHECK_THROWS(std::invalid_argument, ledger.open_row(3, "", {}, {}, -1));
  CHECK_THROWS(std::invalid_argument, ledger.mark_rows({0, 3}, 1));
  CHECK_THROWS(std::invalid_argument, ledger.mark_rows({0, 1}, -1));
  CHECK(ledger.read_row(0)->mark == 0);
  CHECK_THROWS(std::invalid_argument, ledger.commit(3, 0, {}));
  CHECK_THROWS(std::invalid_argument, ledger.commit(0, 1, {}));   // falls
  CHECK_THROWS(std::invalid_argument, ledger.commit(0, 4, {9}));  // beyond the tokens
  CHECK_THROWS(std::invalid_argument, ledger.commit(0, -1, {}));
  CHECK_THROWS(std::invalid_argument, ledger.commit(0, 2, {-1}));
  CHECK_THROWS(std::invalid_argument, ledger.append_blocks(0, {-1}));
  CHECK_THROWS(std::invalid_argument, ledger.rewind(0, 3, 1));
  CHECK_THROWS(std::invalid_argument, ledger.rewind(0, 0, 2));
  CHECK_THROWS(std::invalid_argument, ledger.rewind(0, -1, 0));
  CHECK_THROWS(std::invalid_argument, ledger.commit_many({{0, 2, 5}, {1, 9, 5}}));
  CHECK_THROWS(std::invalid_argument, ledger.commit_many({{0, 2, 5}, {0, 2, 5}}));
  CHECK_THROWS(std::invalid_argument, ledger.commit_many({{0, 2, 5}, {3, 0, 5}}));
  CHECK_THROWS(std::invalid_argument, ledger.commit_many({{0, 2, int64_t{1} << 31}}));
  CHECK_THROWS(std::invalid_argument, ledger.close_row(3));
  CHECK(ledger.read_row(0)->tokens.size() == 2 && ledger.read_row(0)->kv_len == 2);
  CHECK(ledger.live_rows() == (std::vector<uint32_t>{0, 1}));
}

TEST(segment_and_geometry_are_verified) {
  const Fixture segment;
  CHECK_THROWS(std::invalid_argument, Ledger(segment.memory.addr(), segment.memory.nbytes() - 64));
  CHECK_THROWS(std::invalid_argument, Ledger(segment.memory.addr() + 64, segment.memory.nbytes() - 64));
  CHECK_THROWS(std::invalid_argument, Ledger(segment.memory.addr() + 4, segment.memory.nbytes() - 4));
  CHECK_THROWS(std::invalid_argument, format_ledger(segment.memory.addr(), segment.memory.nbytes(), kGeometry));
  CHECK_THROWS(std::invalid_argument, ledger_bytes({0, 1, 1, 1}));
  CHECK_THROWS(std::invalid_argument, ledger_bytes({1, 1 << 22, 1, 1}));
  CHECK_THROWS(std::invalid_argument, ledger_bytes({1, 1, 1 << 20, 1}));
  CHECK(ledger_bytes({1 << 20, (1 << 22) - 1, (1 << 20) - 1, 1 << 20}) > uint64_t{1} << 40);
}

TEST(impossible_counts_are_noticed) {
  const Fixture segment;
  Ledger ledger = segment.open();
  ledger.open_row(0, "a", {1}, {1});
  auto* words = segment.memory.as<std::atomic<uint64_t>>() + 8;  // the first row's header: state, counts
  const uint64_t counts = words[1];
  words[1] = UINT64_MAX;
  CHECK_THROWS(Corrupt, ledger.read_row(0));
  CHECK_THROWS(Corrupt, ledger.commit(0, 0, {}));
  words[1] = counts;
  CHECK(ledger.read_row(0)->tokens == Ints{1});
  words[2] = UINT64_MAX;  // lengths of prompt and blob
  CHECK_THROWS(Corrupt, ledger.read_row(0));
  words[0] = 3;
  CHECK_THROWS(Corrupt, ledger.read_row(0));
}

TEST(a_reader_sees_whole_commits_meanwhile) {
  const Fixture segment;
  std::atomic<bool> is_over{false};
  Ledger writer = segment.open();
  writer.open_row(1, "x", {0}, {});
  std::thread thread([&] {
    for (int32_t token = 1; token < 20; ++token) {
      writer.commit(1, token, {token});
      for (int spin = 0; spin < 2000; ++spin) std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    is_over = true;
  });
  const Ledger reader = segment.open();
  bool is_whole = true;
  do {
    const Row row = *reader.read_row(1);
    for (size_t index = 0; index < row.tokens.size(); ++index)
      is_whole &= row.tokens[index] == static_cast<int32_t>(index);
    is_whole &= row.kv_len + 1 == row.tokens.size();
  } while (!is_over);
  thread.join();
  CHECK(is_whole);
}
