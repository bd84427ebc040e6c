#include "host/reservation.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <iterator>
#include <string>

#include "core/checked.h"
#include "core/system.h"
#include "host/pages.h"

namespace elasticmoe {
namespace {

void* pointer(uint64_t addr) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(addr));
}

constexpr int kTries = 3;  // to make large pages of what others touch
constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

// A mapping past the end of its file would kill whoever touches it (SIGBUS). Remembers the last file it asked about, as
// many parts come from one file.
class FileSizes {
 public:
  void require_inside(const MapPart& part) {
    if (part.fd != fd_) {
      struct stat status;
      if (fstat(part.fd, &status) != 0) throw_errno(errno, "fstat");
      fd_ = part.fd;
      nbytes_ = static_cast<uint64_t>(status.st_size);
      is_sized_ = S_ISREG(status.st_mode);
    }
    const uint64_t end = checked_add(part.fd_offset, part.nbytes);
    if (is_sized_ && end > nbytes_) {
      invalid("part ends at " + std::to_string(end) + " in a file of " + std::to_string(nbytes_) + " bytes");
    }
  }

 private:
  int fd_ = -1;
  uint64_t nbytes_ = 0;
  bool is_sized_ = false;
};

}  // namespace

Reservation::Reservation(uint64_t nbytes, uint64_t alignment) {
  const uint64_t page = page_bytes();
  require(nbytes > 0 && is_aligned(nbytes, page), "nbytes must be a positive multiple of the page size");
  require(is_power_of_two(alignment) && alignment >= page, "alignment must be a power of two, at least the page size");
  // Reserve enough to find an aligned place inside, then give both ends back.
  const uint64_t slack = alignment - page;
  const uint64_t whole = checked_add(nbytes, slack);
  void* found = mmap(nullptr, whole, PROT_NONE, kReserveFlags, -1, 0);
  if (found == MAP_FAILED) throw_errno(errno, "reserving " + std::to_string(nbytes) + " bytes of address space");
  const auto start = reinterpret_cast<uint64_t>(found);
  base_ = align_up(start, alignment);
  nbytes_ = nbytes;
  if (base_ > start) munmap(found, base_ - start);
  const uint64_t tail = (start + whole) - (base_ + nbytes);
  if (tail > 0) munmap(pointer(base_ + nbytes), tail);
}

void Reservation::check_part(const MapPart& part) const {
  const uint64_t page = page_bytes();
  require(base_ != 0, "the reservation is closed");
  require(part.fd >= 0, "fd must not be negative");
  require(part.nbytes > 0, "nbytes must be greater than zero");
  require(is_aligned(part.offset, page) && is_aligned(part.fd_offset, page) && is_aligned(part.nbytes, page),
          "offset, fd_offset and nbytes must be multiples of the page size");
  require(checked_add(part.offset, part.nbytes) <= nbytes_, "part passes the end of the reservation");
  require(checked_add(part.fd_offset, part.nbytes) <= INT64_MAX, "fd_offset + nbytes must be below 2**63");
}

// Notes a mapping as live; throws where it would overlap another.
void Reservation::insert(uint64_t offset, uint64_t nbytes) {
  const auto next = live_.lower_bound(offset);
  const bool hits_next = next != live_.end() && next->first < offset + nbytes;
  const bool hits_previous = next != live_.begin() && std::prev(next)->first + std::prev(next)->second > offset;
  if (hits_next || hits_previous) {
    invalid("part at " + std::to_string(offset) + " of " + std::to_string(nbytes) + " bytes overlaps a live mapping");
  }
  live_.emplace_hint(next, offset, nbytes);
}

bool Reservation::try_make_inaccessible(uint64_t offset, uint64_t nbytes) const {
  // Replaces in one step: the range never has a hole that another thread's mmap could take.
  return mmap(pointer(base_ + offset), nbytes, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0) != MAP_FAILED;
}

void Reservation::map(const std::vector<MapPart>& parts, bool writable, bool populate) {
  FileSizes sizes;
  for (const MapPart& part : parts) {
    check_part(part);
    sizes.require_inside(part);
  }
  const int protection = PROT_READ | (writable ? PROT_WRITE : 0);
  const int flags = MAP_SHARED | MAP_FIXED | (populate ? MAP_POPULATE : 0);
  size_t num_noted = 0;
  try {
    for (; num_noted < parts.size(); ++num_noted) insert(parts[num_noted].offset, parts[num_noted].nbytes);
    for (const MapPart& part : parts) {
      void* got = mmap(pointer(base_ + part.offset), part.nbytes, protection, flags, part.fd,
                       static_cast<off_t>(part.fd_offset));
      if (got == MAP_FAILED) throw_errno(errno, "mapping " + std::to_string(part.nbytes) + " bytes");
    }
  } catch (...) {
    for (size_t index = 0; index < num_noted; ++index) {
      // What cannot be undone stays noted: the notes must never say less than the truth.
      if (try_make_inaccessible(parts[index].offset, parts[index].nbytes)) live_.erase(parts[index].offset);
    }
    throw;
  }
}

void Reservation::unmap(uint64_t offset, uint64_t nbytes) {
  const auto found = live_.find(offset);
  if (found == live_.end() || found->second != nbytes) {
    invalid("no mapping is exactly " + std::to_string(nbytes) + " bytes at " + std::to_string(offset));
  }
  if (!try_make_inaccessible(offset, nbytes)) throw_errno(errno, "unmapping");
  live_.erase(found);
}

void Reservation::check_advised(uint64_t offset, uint64_t nbytes) const {
  require(base_ != 0, "the reservation is closed");
  require(nbytes > 0 && is_aligned(offset, page_bytes()) && is_aligned(nbytes, page_bytes()),
          "offset and nbytes must be multiples of the page size, nbytes not zero");
  require(checked_add(offset, nbytes) <= nbytes_, "part passes the end of the reservation");
}

bool Reservation::collapse(uint64_t offset, uint64_t nbytes) {
  check_advised(offset, nbytes);
  return madvise(pointer(base_ + offset), nbytes, MADV_COLLAPSE) == 0;
}

bool Reservation::make_large(uint64_t offset, uint64_t nbytes, uint64_t large_bytes) {
  check_advised(offset, nbytes);
  require(is_power_of_two(large_bytes) && is_aligned(base_ + offset, large_bytes) && is_aligned(nbytes, large_bytes),
          "both ends must be multiples of a large page, which is a power of two");
  require_available(nbytes);
  // A collapse makes what is missing of a large page, as zeros, but refuses where nothing of it is there.
  for (uint64_t at = offset; at < offset + nbytes; at += large_bytes) {
    if (madvise(pointer(base_ + at), page_bytes(), MADV_POPULATE_WRITE) != 0) return false;
  }
  for (int tries = 0; madvise(pointer(base_ + offset), nbytes, MADV_COLLAPSE) != 0;) {
    if (errno != EAGAIN || ++tries == kTries) return false;  // somebody had a page of it for a moment
  }
  return true;
}

void Reservation::close() noexcept {
  if (base_ != 0) munmap(pointer(base_), nbytes_);
  base_ = 0;
  nbytes_ = 0;
  live_.clear();
}

}  // namespace elasticmoe
