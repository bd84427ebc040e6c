#include "kernels/shared.h"

#include <algorithm>
#include <vector>

#include "kernels/crew.h"

namespace elasticmoe::kernels::shared {
namespace {

// Less work than this, in bytes to be read or in multiply-adds, takes less time than to wake a thread that sleeps.
constexpr int64_t kBytesMin = 512 * 1024, kProductsMin = 4'000'000;
// Columns are cut by so many: whole tiles of every instruction set.
constexpr int64_t kColumns = 64;
// Into so many pieces of at least so many bytes for each thread, so that one that comes late takes fewer. Each piece
// packs all rows for itself: with many rows it is one piece for each thread.
constexpr int64_t kPieces = 4, kPieceBytes = 128 * 1024, kFewRows = 32;

bool is_worth_it(int64_t bytes, int64_t products) {
  return num_threads() > 1 && (bytes >= kBytesMin || products >= kProductsMin);
}

// Some rows of a batch, one after the other. Where they are not all of a part's, the others after them are not there
// yet.
struct Group {
  int64_t first_row = 0;
  std::vector<int32_t> row_starts{0}, kv_lens, block_starts;

  void add(const Parts& parts, int64_t part, int64_t from, int64_t to) {
    if (kv_lens.empty()) first_row = from;
    row_starts.push_back(static_cast<int32_t>(to - first_row));
    kv_lens.push_back(parts.kv_lens[part] - static_cast<int32_t>(parts.row_starts[part + 1] - to));
    block_starts.push_back(parts.block_starts[part]);
  }

  Parts parts(const int32_t* blocks) {
    block_starts.push_back(0);  // where the last one's end: nobody asks
    return {static_cast<int64_t>(kv_lens.size()), row_starts.data(), kv_lens.data(), block_starts.data(), blocks};
  }
};

// Rows one after the other in groups that see about as many keys each.
std::vector<Group> make_groups(const Parts& parts, int64_t count) {
  std::vector<Group> groups(1);
  const auto keys_of = [&](int64_t part, int64_t row) {
    return parts.first_position(part) + row - parts.row_starts[part] + 1;
  };
  int64_t total = 0, seen = 0;
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    for (int64_t row = parts.row_starts[part]; row < parts.row_starts[part + 1]; ++row) total += keys_of(part, row);
  }
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    int64_t from = parts.row_starts[part];
    for (int64_t row = from; row < parts.row_starts[part + 1]; ++row) {
      seen += keys_of(part, row);
      if (seen * count < total * static_cast<int64_t>(groups.size())) continue;
      groups.back().add(parts, part, from, row + 1);
      groups.emplace_back();
      from = row + 1;
    }
    if (from < parts.row_starts[part + 1]) groups.back().add(parts, part, from, parts.row_starts[part + 1]);
  }
  if (groups.back().kv_lens.empty()) groups.pop_back();
  return groups;
}

// Keys that all rows see together, and those that are read for it.
struct Keys {
  int64_t seen = 0, read = 0;
};

Keys count_keys(const Parts& parts) {
  Keys keys;
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    keys.read += parts.kv_lens[part];
    keys.seen += int64_t{parts.kv_lens[part]} * (parts.row_starts[part + 1] - parts.row_starts[part]);
  }
  return keys;
}

// One expert, its two products cut into columns.
void one_expert(const Experts& a) {
  const int64_t most = std::min<int64_t>(a.counts[0], kRowsAtOnce);
  float* wide = scratch(Scratch::kShared, most * 2 * a.width);
  for (int64_t row = 0; row < a.counts[0]; row += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, a.counts[0] - row);
    const float* rows = a.rows + row * a.hidden;
    linear({rows, count, a.w13, a.dtype, 2 * a.width, a.hidden, wide, false, nullptr});
    kernels().activate({wide, count, a.width, rows, a.hidden, a.gate});
    linear({wide, count, a.w2, a.dtype, a.hidden, a.width, a.out + row * a.hidden, a.add, nullptr, 2 * a.width});
  }
}

}  // namespace

void linear(const Linear& a) {
  const Kernels& set = kernels();
  const int64_t column_bytes = a.depth * element_bytes(a.dtype), threads = num_threads();
  const int64_t blocks = a.num_cols / kColumns;
  const bool is_shared =
      a.num_rows > 0 && blocks > 1 && is_worth_it(a.num_cols * column_bytes, a.num_rows * a.num_cols * a.depth);
  if (!is_shared) return set.linear(a);
  const int64_t out_stride = a.out_stride == 0 ? a.num_cols : a.out_stride;
  const int64_t x_stride = a.x_stride == 0 ? a.depth : a.x_stride;
  for (int64_t row = 0; row < a.num_rows; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, a.num_rows - row);
    const int64_t most =
        rows > kFewRows ? threads : std::min(kPieces * threads, a.num_cols * column_bytes / kPieceBytes);
    const int64_t pieces = std::clamp<int64_t>(most, 2, blocks);
    share(pieces, [&](int64_t piece) {
      const int64_t from = blocks * piece / pieces * kColumns;
      const int64_t to = piece + 1 == pieces ? a.num_cols : blocks * (piece + 1) / pieces * kColumns;
      Linear part = a;
      part.x = a.x + row * x_stride;
      part.num_rows = rows;
      part.w = static_cast<const char*>(a.w) + from * column_bytes;
      part.num_cols = to - from;
      part.out = a.out + row * out_stride + from;
      part.x_stride = x_stride;
      part.out_stride = out_stride;
      // Pieces are taken from the last one on: each thread's next is likely the one before those of the others.
      if (piece >= threads) {
        part.after = static_cast<const char*>(a.w) + blocks * (piece - threads) / pieces * kColumns * column_bytes;
      }
      if (a.bias != nullptr) part.bias = a.bias + from;
      set.linear(part);
    });
  }
}

void experts(const Experts& a) {
  const Kernels& set = kernels();
  const int64_t elements = 3 * a.hidden * a.width, threads = num_threads();
  int64_t hit = 0, num_rows = 0;
  for (int64_t expert = 0; expert < a.num_experts; ++expert) {
    hit += a.counts[expert] > 0;
    num_rows += a.counts[expert];
  }
  if (!is_worth_it(hit * elements * element_bytes(a.dtype), num_rows * elements)) return set.experts(a);
  std::vector<Experts> each;
  each.reserve(static_cast<size_t>(hit));
  int64_t row = 0;
  for (int64_t expert = 0; expert < a.num_experts; row += a.counts[expert], ++expert) {
    if (a.counts[expert] == 0) continue;
    each.push_back(a);
    Experts& one = each.back();
    one.rows = a.rows + row * a.hidden;
    one.counts = a.counts + expert;
    one.num_experts = 1;
    one.w13 = a.w13 + expert * a.w13_stride;
    one.w2 = a.w2 + expert * a.w2_stride;
    one.out = a.out + row * a.hidden;
  }
  // Few experts do not come out even: what is left over is cut.
  const int64_t whole = hit < kPieces * threads ? hit / threads * threads : hit;
  for (int64_t expert = threads; expert < whole; ++expert) {  // as pieces are taken
    each[static_cast<size_t>(expert)].after = each[static_cast<size_t>(expert - threads)].w13;
  }
  share(whole, [&](int64_t expert) { set.experts(each[static_cast<size_t>(expert)]); });
  for (int64_t expert = whole; expert < hit; ++expert) one_expert(each[static_cast<size_t>(expert)]);
}

void attention(const Attention& a) {
  const Kernels& set = kernels();
  const KvCache& cache = a.cache;
  const Keys keys = count_keys(a.parts);
  const int64_t bytes = keys.read * cache.num_heads * cache.width * 2 * element_bytes(cache.dtype);
  if (!is_worth_it(bytes, keys.seen * a.q_heads * cache.width * 2)) return set.attention(a);
  share(a.parts.num_parts * cache.num_heads, [&](int64_t item) {
    const int64_t part = item / cache.num_heads, head = item % cache.num_heads;
    const Parts& all = a.parts;
    Attention one = a;
    one.parts = {1, all.row_starts + part, all.kv_lens + part, all.block_starts + part, all.blocks};
    one.first_head = head;
    one.end_head = head + 1;
    set.attention(one);
  });
}

void latent_attention(const LatentAttention& a) {
  const Kernels& set = kernels();
  const KvCache& cache = a.cache;
  const Keys keys = count_keys(a.parts);
  const int64_t bytes = keys.read * cache.width * element_bytes(cache.dtype);
  if (!is_worth_it(bytes, keys.seen * a.q_heads * cache.width * 2)) return set.latent_attention(a);
  std::vector<Group> groups = make_groups(a.parts, num_threads());
  share(static_cast<int64_t>(groups.size()), [&](int64_t item) {
    Group& group = groups[static_cast<size_t>(item)];
    LatentAttention some = a;
    some.parts = group.parts(a.parts.blocks);
    some.q = a.q + group.first_row * a.q_heads * (a.nope_dim + cache.width - a.rank);
    some.out = a.out + group.first_row * a.q_heads * a.v_dim;
    set.latent_attention(some);
  });
}

}  // namespace elasticmoe::kernels::shared
