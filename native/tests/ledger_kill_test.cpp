// A writer killed at random moments, and one stopped after every single instruction: whatever it leaves must be a state
// between two of its operations.
#include <signal.h>

#include <random>
#include <thread>

#include "ledger/ledger.h"
#include "tracing.h"

using namespace elasticmoe::ledger;
using testing::SharedMemory;

namespace {

constexpr Geometry kGeometry{.num_rows = 8, .max_tokens = 64, .max_blocks = 16, .blob_bytes = 64};

// Everything in a row follows from its number and its life, which the blob tells.
int32_t value_of(uint64_t row, uint64_t life, uint64_t index, int32_t kind) {
  return static_cast<int32_t>((row * 7919 + life * 104729 + index * 31 + static_cast<uint64_t>(kind)) & 0x7FFFFFFF);
}

std::vector<int32_t> values_of(uint64_t row, uint64_t life, uint64_t first, uint64_t num, int32_t kind) {
  std::vector<int32_t> values;
  for (uint64_t index = first; index < first + num; ++index) values.push_back(value_of(row, life, index, kind));
  return values;
}

uint64_t num_prompt_of(uint64_t row, uint64_t life) {
  return (row + life) % 9;
}

std::string blob_of(uint64_t life) {
  return std::to_string(life) + ":" + std::string(life % 50, '.');
}

// Does random valid operations for ever.
[[noreturn]] void write_for_ever(Ledger& ledger, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (uint64_t life = seed * 1'000'000;; ++life) {
    const uint64_t number = random() % kGeometry.num_rows;
    const auto row = static_cast<int64_t>(number);
    const std::optional<Row> old = ledger.read_row(row);
    if (!old) {
      const uint64_t num_prompt = num_prompt_of(number, life);
      ledger.open_row(row, blob_of(life), values_of(number, life, 0, num_prompt, 0), values_of(number, life, 0, 1, 1));
      continue;
    }
    const uint64_t of_life = std::stoull(old->blob);
    const uint64_t num_new = random() % 4;
    const bool is_full =
        old->tokens.size() + num_new > kGeometry.max_tokens || old->blocks.size() >= kGeometry.max_blocks;
    if (is_full || random() % 20 == 0) {
      ledger.close_row(row);
    } else if (random() % 10 == 0) {
      ledger.rewind(row, old->kv_len / 2, static_cast<int64_t>(old->blocks.size() / 2));
    } else if (random() % 3 == 0) {
      ledger.append_blocks(row, values_of(number, of_life, old->blocks.size(), 1, 1));
    } else {
      const uint64_t num_tokens = old->tokens.size() + num_new;
      ledger.commit(row, static_cast<int64_t>(num_tokens), values_of(number, of_life, old->tokens.size(), num_new, 0));
    }
  }
}

void check_row(uint64_t number, const Row& row) {
  const uint64_t life = std::stoull(row.blob);
  CHECK(row.blob == blob_of(life));
  CHECK(row.num_prompt == num_prompt_of(number, life));
  CHECK(row.tokens == values_of(number, life, 0, row.tokens.size(), 0));
  CHECK(row.blocks == values_of(number, life, 0, row.blocks.size(), 1));
  CHECK(row.tokens.size() >= row.num_prompt && row.kv_len <= row.tokens.size());
}

bool is_same(const std::optional<Row>& one, const std::optional<Row>& other) {
  if (!one || !other) return one.has_value() == other.has_value();
  return one->blob == other->blob && one->tokens == other->tokens && one->blocks == other->blocks &&
         one->kv_len == other->kv_len && one->num_prompt == other->num_prompt && one->mark == other->mark;
}

struct Operation {
  const char* name;
  std::function<void(Ledger&)> run;
};

// In order, on rows 0 and 1. Row 0 is opened again over what its first life left.
const std::vector<Operation> kOperations = {
    {"open", [](Ledger& ledger) { ledger.open_row(0, "first", {1, 2, 3}, {4, 5}); }},
    {"open other", [](Ledger& ledger) { ledger.open_row(1, "other", {9}, {9}); }},
    {"append blocks", [](Ledger& ledger) { ledger.append_blocks(0, {6, 7}); }},
    {"commit", [](Ledger& ledger) { ledger.commit(0, 5, {11, 12, 13}); }},
    {"commit position", [](Ledger& ledger) { ledger.commit(0, 6, {}); }},
    {"commit many", [](Ledger& ledger) { ledger.commit_many({{0, 7, 14}, {1, 1, 15}}); }},
    {"mark", [](Ledger& ledger) { ledger.mark_rows({0, 1}, 3); }},
    {"rewind", [](Ledger& ledger) { ledger.rewind(0, 0, 1); }},
    {"append over rewound", [](Ledger& ledger) { ledger.append_blocks(0, {77, 78, 79}); }},
    {"close", [](Ledger& ledger) { ledger.close_row(0); }},
    {"open again", [](Ledger& ledger) { ledger.open_row(0, "second life", {101, 102, 103}, {105, 106, 107}, 9); }},
    {"commit again", [](Ledger& ledger) { ledger.commit(0, 3, {201, 202}); }},
};

}  // namespace

TEST(every_instruction_leaves_whole_rows) {
  const SharedMemory memory(ledger_bytes(kGeometry));
  const SharedMemory rehearsal(ledger_bytes(kGeometry));
  for (const SharedMemory* segment : {&memory, &rehearsal}) {
    format_ledger(segment->addr(), segment->nbytes(), kGeometry);
  }
  const Ledger reader(memory.addr(), memory.nbytes());
  Ledger expected(rehearsal.addr(), rehearsal.nbytes());
  for (const Operation& operation : kOperations) {
    const std::optional<Row> before[] = {expected.read_row(0), expected.read_row(1)};
    operation.run(expected);
    const std::optional<Row> after[] = {expected.read_row(0), expected.read_row(1)};
    testing::TracedProcess writer([&] {
      Ledger ledger(memory.addr(), memory.nbytes());
      operation.run(ledger);
    });
    if (!writer.is_traceable()) {
      std::printf("      skipped: this machine forbids tracing\n");
      return;
    }
    bool is_done[] = {false, false};
    while (writer.step()) {
      for (int row = 0; row < 2; ++row) {
        const std::optional<Row> now = reader.read_row(row);
        is_done[row] |= is_same(now, after[row]);
        if (!is_same(now, is_done[row] ? after[row] : before[row])) {
          testing::fail(__FILE__, __LINE__, std::string("a half-done row was seen in: ") + operation.name);
        }
      }
    }
    CHECK(is_done[0] && is_done[1]);
  }
}

TEST(a_killed_writer_leaves_whole_rows) {
  const SharedMemory memory(ledger_bytes(kGeometry));
  format_ledger(memory.addr(), memory.nbytes(), kGeometry);
  const Ledger reader(memory.addr(), memory.nbytes());
  std::mt19937_64 random(3);
  uint64_t num_seen = 0;
  for (uint64_t round = 1; round <= 150; ++round) {
    const pid_t pid = testing::spawn([&] {
      Ledger ledger(memory.addr(), memory.nbytes());
      write_for_ever(ledger, round);
    });
    std::this_thread::sleep_for(std::chrono::microseconds(500 + random() % 3000));
    kill(pid, SIGKILL);
    CHECK(WIFSIGNALED(testing::wait_status(pid)));
    for (const uint32_t row : reader.live_rows()) {
      check_row(row, *reader.read_row(row));
      ++num_seen;
    }
  }
  CHECK(num_seen > 100);
}
