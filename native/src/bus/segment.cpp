#include "bus/segment.h"

#include <string>

#include "core/checked.h"

namespace elasticmoe::bus {
namespace {

// First touch decides where a page lives, so no two ranks share one.
constexpr uint64_t kAreaAlignment = 4096;

struct Offsets {
  uint64_t membership, wakeup, slots, areas, area_stride;
  uint64_t ids, x, returned, halves, plan;  // within a rank's area
  uint64_t nbytes;
};

void check_geometry(const Geometry& geometry) {
  require_range("max_ranks", geometry.max_ranks, 1, kMaxRanks);
  require_range("max_tokens", geometry.max_tokens, 1, 1U << 20);
  require_range("hidden", geometry.hidden, 1, 1U << 20);
  require_range("top_k", geometry.top_k, 1, kMaxTopK);
  require_range("half_elements", geometry.half_elements, 0, 1U << 30);
  require_range("plan_bytes", geometry.plan_bytes, 0, 1U << 30);
}

Offsets derive_offsets(const Geometry& geometry) {
  check_geometry(geometry);
  const uint64_t pairs = checked_mul(geometry.max_tokens, geometry.top_k);
  const uint64_t row_bytes = checked_mul(geometry.hidden, sizeof(float));
  Offsets offsets{};
  offsets.membership = sizeof(Header);
  offsets.wakeup = offsets.membership + sizeof(Membership);
  offsets.slots = offsets.wakeup + sizeof(Wakeup);
  offsets.areas = align_up(offsets.slots + sizeof(Slot) * geometry.max_ranks, kAreaAlignment);
  offsets.ids = sizeof(Mailbox);
  offsets.x = align_up(checked_add(offsets.ids, checked_mul(pairs, sizeof(int32_t))), kLine);
  offsets.returned = align_up(checked_add(offsets.x, checked_mul(geometry.max_tokens, row_bytes)), kLine);
  offsets.halves = align_up(checked_add(offsets.returned, checked_mul(pairs, row_bytes)), kLine);
  const uint64_t halves_bytes = checked_mul(uint64_t{2} * geometry.half_elements, sizeof(float));
  offsets.plan = align_up(checked_add(offsets.halves, halves_bytes), kLine);
  const uint64_t area_end = checked_add(offsets.plan, geometry.plan_bytes);
  offsets.area_stride = align_up(area_end, kAreaAlignment);
  offsets.nbytes = checked_add(offsets.areas, checked_mul(offsets.area_stride, geometry.max_ranks));
  require(offsets.nbytes <= static_cast<uint64_t>(INT64_MAX), "the bus would take 2**63 bytes or more");
  return offsets;
}

std::byte* checked_base(uint64_t addr, uint64_t nbytes) {
  require_memory("addr", addr, nbytes);
  require(addr != 0 && is_aligned(addr, kLine), "addr must be a multiple of 64");
  require(nbytes >= sizeof(Header), "the segment is too small for a bus");
  return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(addr));
}

}  // namespace

uint64_t bus_bytes(const Geometry& geometry) {
  return derive_offsets(geometry).nbytes;
}

void format_bus(uint64_t addr, uint64_t nbytes, const Geometry& geometry) {
  std::byte* base = checked_base(addr, nbytes);
  const uint64_t needed = derive_offsets(geometry).nbytes;
  if (nbytes < needed) {
    invalid("the segment has " + std::to_string(nbytes) + " bytes, the bus takes " + std::to_string(needed));
  }
  auto* header = reinterpret_cast<Header*>(base);
  require(header->magic.load(std::memory_order_acquire) == 0, "the segment is already formatted");
  header->version = kVersion;
  header->geometry = geometry;
  header->nbytes = needed;
  header->magic.store(kMagic, std::memory_order_release);
}

Segment::Segment(uint64_t addr, uint64_t nbytes) {
  std::byte* base = checked_base(addr, nbytes);
  const auto* header = reinterpret_cast<const Header*>(base);
  require(header->magic.load(std::memory_order_acquire) == kMagic, "the segment is no bus (wrong magic)");
  if (header->version != kVersion) {
    invalid("the bus has version " + std::to_string(header->version) + ", this build reads " +
            std::to_string(kVersion));
  }
  geometry_ = header->geometry;
  const Offsets offsets = derive_offsets(geometry_);
  require(header->nbytes == offsets.nbytes, "the bus header's size does not fit its geometry");
  require(offsets.nbytes <= nbytes, "the segment is smaller than its bus");
  membership_ = reinterpret_cast<Membership*>(base + offsets.membership);
  wakeup_ = reinterpret_cast<Wakeup*>(base + offsets.wakeup);
  slots_ = reinterpret_cast<Slot*>(base + offsets.slots);
  areas_ = base + offsets.areas;
  area_stride_ = offsets.area_stride;
  ids_offset_ = offsets.ids;
  x_offset_ = offsets.x;
  returned_offset_ = offsets.returned;
  halves_offset_ = offsets.halves;
  plan_offset_ = offsets.plan;
}

}  // namespace elasticmoe::bus
