#include "ledger/ledger.h"

#include <algorithm>
#include <cstring>

#include "core/checked.h"
#include "core/system.h"

namespace elasticmoe::ledger {
namespace {

constexpr uint64_t kMagic = 0x3152474C454F4D45;  // "EMOELGR1"
constexpr uint32_t kVersion = 2;
constexpr size_t kLine = 64;

// Widths of the three numbers in `counts`; they bound the geometry.
constexpr int kTokenBits = 22;
constexpr int kBlockBits = 20;
static_assert(2 * kTokenBits + kBlockBits == 64);

// `state` is version << 2 | one of these. The version grows with each opening, so a reader notices that a row was
// reused.
constexpr uint64_t kFree = 0;
constexpr uint64_t kOpening = 1;
constexpr uint64_t kLive = 2;
constexpr uint64_t kStateMask = 3;

struct alignas(kLine) Header {
  std::atomic<uint64_t> magic;  // written last
  uint32_t version;
  Geometry geometry;
  uint64_t nbytes;
};
static_assert(sizeof(Header) == kLine && std::atomic<uint64_t>::is_always_lock_free);

struct Offsets {
  uint64_t tokens, blocks, stride, nbytes;
};

Offsets derive_offsets(const Geometry& geometry) {
  require_range("num_rows", geometry.num_rows, 1, 1U << 20);
  require_range("max_tokens", geometry.max_tokens, 1, (1U << kTokenBits) - 1);
  require_range("max_blocks", geometry.max_blocks, 1, (1U << kBlockBits) - 1);
  require_range("blob_bytes", geometry.blob_bytes, 0, 1U << 20);
  Offsets offsets{};
  offsets.tokens = align_up(kLine + uint64_t{geometry.blob_bytes}, kLine);
  offsets.blocks = checked_add(offsets.tokens, checked_mul(geometry.max_tokens, sizeof(int32_t)));
  offsets.stride = align_up(checked_add(offsets.blocks, checked_mul(geometry.max_blocks, sizeof(int32_t))), kLine);
  offsets.nbytes = checked_add(sizeof(Header), checked_mul(offsets.stride, geometry.num_rows));
  return offsets;
}

std::byte* checked_base(uint64_t addr, uint64_t nbytes) {
  require_memory("addr", addr, nbytes);
  require(addr != 0 && is_aligned(addr, kLine), "addr must be a multiple of 64");
  require(nbytes >= sizeof(Header), "the segment is too small for a ledger");
  return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(addr));
}

void require_not_negative(const std::vector<int32_t>& values, const char* text) {
  for (const int32_t value : values) require(value >= 0, text);
}

void write(int32_t* to, const std::vector<int32_t>& values) {
  if (!values.empty()) std::memcpy(to, values.data(), values.size() * sizeof(int32_t));
}

}  // namespace

struct Ledger::RowHeader {
  alignas(kLine) std::atomic<uint64_t> state;
  std::atomic<uint64_t> counts;
  uint32_t num_prompt;
  uint32_t blob_len;
  std::atomic<uint64_t> mark;
};

struct Ledger::Counts {
  uint64_t num_tokens;
  uint64_t kv_len;
  uint64_t num_blocks;

  static Counts unpack(uint64_t word) {
    constexpr uint64_t kTokenMask = (1U << kTokenBits) - 1;
    return {word >> (kTokenBits + kBlockBits), word >> kBlockBits & kTokenMask, word & ((1U << kBlockBits) - 1)};
  }
  uint64_t pack() const { return num_tokens << (kTokenBits + kBlockBits) | kv_len << kBlockBits | num_blocks; }
};

uint64_t ledger_bytes(const Geometry& geometry) {
  return derive_offsets(geometry).nbytes;
}

void format_ledger(uint64_t addr, uint64_t nbytes, const Geometry& geometry) {
  std::byte* base = checked_base(addr, nbytes);
  const uint64_t needed = derive_offsets(geometry).nbytes;
  if (nbytes < needed) {
    invalid("the segment has " + std::to_string(nbytes) + " bytes, the ledger takes " + std::to_string(needed));
  }
  auto* header = reinterpret_cast<Header*>(base);
  require(header->magic.load(std::memory_order_acquire) == 0, "the segment is already formatted");
  header->version = kVersion;
  header->geometry = geometry;
  header->nbytes = needed;
  header->magic.store(kMagic, std::memory_order_release);
}

Ledger::Ledger(uint64_t addr, uint64_t nbytes) {
  static_assert(sizeof(RowHeader) == kLine);
  std::byte* base = checked_base(addr, nbytes);
  const auto* header = reinterpret_cast<const Header*>(base);
  require(header->magic.load(std::memory_order_acquire) == kMagic, "the segment is no ledger (wrong magic)");
  if (header->version != kVersion) {
    invalid("the ledger has version " + std::to_string(header->version) + ", this build reads " +
            std::to_string(kVersion));
  }
  geometry_ = header->geometry;
  const Offsets offsets = derive_offsets(geometry_);
  require(header->nbytes == offsets.nbytes, "the ledger header's size does not fit its geometry");
  require(offsets.nbytes <= nbytes, "the segment is smaller than its ledger");
  rows_ = base + sizeof(Header);
  stride_ = offsets.stride;
  tokens_offset_ = offsets.tokens;
  blocks_offset_ = offsets.blocks;
}

Ledger::RowHeader& Ledger::header_of(int64_t row) const {
  require(row >= 0 && row < geometry_.num_rows, "row must be from 0 to num_rows - 1");
  return *reinterpret_cast<RowHeader*>(rows_ + stride_ * static_cast<uint64_t>(row));
}

Ledger::RowHeader& Ledger::live_header_of(int64_t row) const {
  RowHeader& header = header_of(row);
  if ((header.state.load(std::memory_order_acquire) & kStateMask) != kLive) {
    invalid("row " + std::to_string(row) + " is not live");
  }
  return header;
}

char* Ledger::blob_of(RowHeader& header) const {
  return reinterpret_cast<char*>(&header) + kLine;
}

int32_t* Ledger::tokens_of(RowHeader& header) const {
  return reinterpret_cast<int32_t*>(reinterpret_cast<std::byte*>(&header) + tokens_offset_);
}

int32_t* Ledger::blocks_of(RowHeader& header) const {
  return reinterpret_cast<int32_t*>(reinterpret_cast<std::byte*>(&header) + blocks_offset_);
}

Ledger::Counts Ledger::checked_counts(const RowHeader& header) const {
  const Counts counts = Counts::unpack(header.counts.load(std::memory_order_acquire));
  if (counts.num_tokens > geometry_.max_tokens || counts.kv_len > counts.num_tokens ||
      counts.num_blocks > geometry_.max_blocks) {
    throw Corrupt("a ledger row's counts are out of bounds");
  }
  return counts;
}

void Ledger::open_row(int64_t row, std::string_view blob, const std::vector<int32_t>& tokens,
                      const std::vector<int32_t>& blocks, int64_t mark) {
  RowHeader& header = header_of(row);
  const uint64_t state = header.state.load(std::memory_order_acquire);
  if ((state & kStateMask) == kLive) invalid("row " + std::to_string(row) + " is live already");
  require_range("blob length", blob.size(), 0, geometry_.blob_bytes);
  require_range("number of tokens", tokens.size(), 0, geometry_.max_tokens);
  require_range("number of blocks", blocks.size(), 0, geometry_.max_blocks);
  require_not_negative(tokens, "tokens must not be negative");
  require_not_negative(blocks, "blocks must not be negative");
  require(mark >= 0, "mark must not be negative");

  const uint64_t version = ((state >> 2) + 1) << 2;
  header.state.store(version | kOpening, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // readers of the old row see it reused before it changes
  if (!blob.empty()) std::memcpy(blob_of(header), blob.data(), blob.size());
  write(tokens_of(header), tokens);
  write(blocks_of(header), blocks);
  header.blob_len = static_cast<uint32_t>(blob.size());
  header.num_prompt = static_cast<uint32_t>(tokens.size());
  header.mark.store(static_cast<uint64_t>(mark), std::memory_order_relaxed);
  header.counts.store(Counts{tokens.size(), 0, blocks.size()}.pack(), std::memory_order_release);
  header.state.store(version | kLive, std::memory_order_release);
}

void Ledger::append_blocks(int64_t row, const std::vector<int32_t>& blocks) {
  RowHeader& header = live_header_of(row);
  Counts counts = checked_counts(header);
  require_not_negative(blocks, "blocks must not be negative");
  require_range("number of blocks", counts.num_blocks + blocks.size(), 0, geometry_.max_blocks);
  write(blocks_of(header) + counts.num_blocks, blocks);
  counts.num_blocks += blocks.size();
  header.counts.store(counts.pack(), std::memory_order_release);
}

// What a commit would publish; throws where it must not.
Ledger::Counts Ledger::after_commit(const RowHeader& header, int64_t kv_len, size_t num_new) const {
  const Counts counts = checked_counts(header);
  const uint64_t num_tokens = checked_add(counts.num_tokens, num_new);
  require_range("number of tokens", num_tokens, 0, geometry_.max_tokens);
  require(kv_len >= 0, "kv_len must not be negative");
  require_range("kv_len", static_cast<uint64_t>(kv_len), counts.kv_len, num_tokens);
  return {num_tokens, static_cast<uint64_t>(kv_len), counts.num_blocks};
}

void Ledger::commit(int64_t row, int64_t kv_len, const std::vector<int32_t>& new_tokens) {
  RowHeader& header = live_header_of(row);
  require_not_negative(new_tokens, "tokens must not be negative");
  const Counts counts = after_commit(header, kv_len, new_tokens.size());
  write(tokens_of(header) + (counts.num_tokens - new_tokens.size()), new_tokens);
  header.counts.store(counts.pack(), std::memory_order_release);
}

void Ledger::commit_many(const std::vector<Commit>& commits) {
  std::vector<int64_t> rows;
  for (const auto& [row, kv_len, token] : commits) {
    rows.push_back(row);
    require(token >= 0 && token <= INT32_MAX, "tokens must be from 0 to 2**31 - 1");
    after_commit(live_header_of(row), kv_len, 1);
  }
  std::sort(rows.begin(), rows.end());
  require(std::adjacent_find(rows.begin(), rows.end()) == rows.end(), "a row comes twice");
  for (const auto& [row, kv_len, token] : commits) {
    RowHeader& header = header_of(row);
    const Counts counts = after_commit(header, kv_len, 1);
    tokens_of(header)[counts.num_tokens - 1] = static_cast<int32_t>(token);
    header.counts.store(counts.pack(), std::memory_order_release);
  }
}

void Ledger::rewind(int64_t row, int64_t kv_len, int64_t num_blocks) {
  RowHeader& header = live_header_of(row);
  Counts counts = checked_counts(header);
  require(kv_len >= 0 && num_blocks >= 0, "kv_len and num_blocks must not be negative");
  require_range("kv_len", static_cast<uint64_t>(kv_len), 0, counts.kv_len);
  require_range("num_blocks", static_cast<uint64_t>(num_blocks), 0, counts.num_blocks);
  counts.kv_len = static_cast<uint64_t>(kv_len);
  counts.num_blocks = static_cast<uint64_t>(num_blocks);
  header.counts.store(counts.pack(), std::memory_order_seq_cst);
  // The next append overwrites what the old counts still showed: it must not move ahead of the new ones.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Ledger::mark_rows(const std::vector<int64_t>& rows, int64_t mark) {
  require(mark >= 0, "mark must not be negative");
  for (const int64_t row : rows) live_header_of(row);
  for (const int64_t row : rows) header_of(row).mark.store(static_cast<uint64_t>(mark), std::memory_order_release);
  // What the mark announces must not begin before it can be seen.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Ledger::close_row(int64_t row) {
  RowHeader& header = live_header_of(row);
  const uint64_t state = header.state.load(std::memory_order_acquire);
  header.state.store((state & ~kStateMask) | kFree, std::memory_order_release);
}

std::optional<Row> Ledger::read_row(int64_t row) const {
  RowHeader& header = header_of(row);
  constexpr int kMaxTries = 100;
  for (int attempt = 0; attempt < kMaxTries; ++attempt) {
    const uint64_t before = header.state.load(std::memory_order_acquire);
    if ((before & kStateMask) == kStateMask) throw Corrupt("a ledger row's state is unknown");
    if ((before & kStateMask) != kLive) return std::nullopt;
    const Counts counts = checked_counts(header);
    const uint32_t blob_len = header.blob_len;
    const uint32_t num_prompt = header.num_prompt;
    const bool is_sound = blob_len <= geometry_.blob_bytes && num_prompt <= counts.num_tokens;
    Row copy{};
    if (is_sound) {
      const int32_t* tokens = tokens_of(header);
      const int32_t* blocks = blocks_of(header);
      copy = {std::string(blob_of(header), blob_len),
              {tokens, tokens + counts.num_tokens},
              {blocks, blocks + counts.num_blocks},
              static_cast<uint32_t>(counts.kv_len),
              num_prompt,
              header.mark.load(std::memory_order_relaxed)};
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (header.state.load(std::memory_order_relaxed) != before) continue;  // closed or reused meanwhile
    if (!is_sound) throw Corrupt("a ledger row's lengths are out of bounds");
    return copy;
  }
  throw_errno(EAGAIN, "the row is reopened faster than it can be read");
}

std::vector<uint32_t> Ledger::live_rows() const {
  std::vector<uint32_t> live;
  for (uint32_t row = 0; row < geometry_.num_rows; ++row) {
    if ((header_of(row).state.load(std::memory_order_acquire) & kStateMask) == kLive) live.push_back(row);
  }
  return live;
}

}  // namespace elasticmoe::ledger
