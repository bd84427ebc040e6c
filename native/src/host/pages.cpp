#include "host/pages.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

#include "core/checked.h"
#include "core/system.h"
#include "core/xxh64.h"

namespace elasticmoe {
namespace {

// Parts of files are addressed with a signed 64-bit offset.
void require_file_part(int fd, uint64_t offset, uint64_t nbytes) {
  require(fd >= 0, "fd must not be negative");
  require(checked_add(offset, nbytes) <= static_cast<uint64_t>(INT64_MAX), "offset + nbytes must be below 2**63");
}

template <typename T>
T* pointer(uint64_t addr) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(addr));
}

// Memory files have no size limit of their own: the kernel would fill the machine and then kill processes rather than
// answer ENOSPC. So what cannot possibly fit is refused here. Small parts are not worth the look.
void require_room(int fd, uint64_t nbytes) {
  constexpr uint64_t kSmall = 1 << 20;
  struct statfs filesystem;
  if (nbytes < kSmall || fstatfs(fd, &filesystem) != 0 || filesystem.f_type != TMPFS_MAGIC) return;
  require_available(nbytes);
}

// One request reads at most this much, so that signals are seen now and then.
constexpr uint64_t kReadChunk = 64ULL << 20;

}  // namespace

uint64_t page_bytes() {
  static const auto value = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return value;
}

void require_available(uint64_t nbytes) {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  uint64_t kib = 0;
  for (std::string unit; meminfo >> key >> kib; std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") break;
  }
  if (key == "MemAvailable:" && nbytes / 1024 > kib) {
    throw_errno(ENOMEM, "allocating " + std::to_string(nbytes) + " bytes of memory where " + std::to_string(kib) +
                            " KiB are available");
  }
}

void allocate(int fd, uint64_t offset, uint64_t nbytes) {
  require_file_part(fd, offset, nbytes);
  require(nbytes > 0, "nbytes must be greater than zero");
  require_room(fd, nbytes);
  if (fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes)) != 0) throw_errno(errno, "fallocate");
}

bool punch_hole(int fd, uint64_t offset, uint64_t nbytes) {
  require_file_part(fd, offset, nbytes);
  require(nbytes > 0, "nbytes must be greater than zero");
  if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                static_cast<off_t>(nbytes)) != 0) {
    throw_errno(errno, "fallocate punch hole");
  }
  const off_t data = lseek(fd, static_cast<off_t>(offset), SEEK_DATA);
  if (data < 0 && errno != ENXIO) throw_errno(errno, "lseek");
  return data < 0 || static_cast<uint64_t>(data) >= offset + nbytes;
}

void write_from(int fd, uint64_t file_offset, uint64_t addr, uint64_t nbytes) {
  require_file_part(fd, file_offset, nbytes);
  require_memory("addr", addr, nbytes);
  require(nbytes > 0, "nbytes must be greater than zero");
  require_room(fd, nbytes);
  for (uint64_t done = 0; done < nbytes;) {
    const ssize_t put =
        pwrite(fd, pointer<const char>(addr + done), nbytes - done, static_cast<off_t>(file_offset + done));
    if (put < 0) throw_errno(errno, "pwrite");
    if (put == 0) throw_errno(ENOSPC, "pwrite");
    done += static_cast<uint64_t>(put);
  }
}

void read_into(int fd, uint64_t file_offset, uint64_t addr, uint64_t nbytes, uint64_t& done) {
  require_file_part(fd, file_offset, nbytes);
  require_memory("addr", addr, nbytes);
  while (done < nbytes) {
    const uint64_t chunk = std::min(nbytes - done, kReadChunk);
    const ssize_t got = pread(fd, pointer<char>(addr + done), chunk, static_cast<off_t>(file_offset + done));
    if (got < 0) throw_errno(errno, "pread");
    if (got == 0) {
      throw_errno(EIO, "short read: the file ends at " + std::to_string(file_offset + done) + ", " +
                           std::to_string(nbytes - done) + " bytes early");
    }
    done += static_cast<uint64_t>(got);
  }
}

void copy_memory(uint64_t dst_addr, uint64_t src_addr, uint64_t nbytes) {
  require_memory("dst_addr", dst_addr, nbytes);
  require_memory("src_addr", src_addr, nbytes);
  const uint64_t distance = dst_addr > src_addr ? dst_addr - src_addr : src_addr - dst_addr;
  require(distance >= nbytes, "source and destination overlap");
  if (nbytes != 0) std::memcpy(pointer<void>(dst_addr), pointer<const void>(src_addr), nbytes);
}

uint64_t checksum_memory(uint64_t addr, uint64_t nbytes) {
  require_memory("addr", addr, nbytes);
  return xxh64(pointer<const void>(addr), nbytes);
}

}  // namespace elasticmoe
