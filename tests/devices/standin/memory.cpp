#include "memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace standin {
namespace {

constexpr auto kDelay = std::chrono::milliseconds(2);

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// One process at a time changes what devices have: the files of their memory and its count. Whoever is killed in its
// turn loses it, for the kernel ends the lock with the process. A turn's end is said, because a child that was forked
// within it has the file open as well.
class Turn {
 public:
  explicit Turn(const std::string& folder)
      : fd_(::open((folder + "/turn").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
    while (fd_ >= 0 && flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~Turn() {
    if (fd_ < 0) return;
    flock(fd_, LOCK_UN);
    ::close(fd_);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  int fd_;
};

// Memory of a device comes as the last one left it.
void soil(int fd, uint64_t nbytes) {
  char dirt[4096];
  std::memset(dirt, 0xCD, sizeof dirt);
  for (uint64_t at = 0; at < nbytes; at += kGranule) {
    if (pwrite(fd, dirt, sizeof dirt, at) < 0) return;
    if (pwrite(fd, dirt, sizeof dirt, at + kGranule - sizeof dirt) < 0) return;
  }
}

}  // namespace

Pool::Pool()
    : folder_(std::getenv("STANDIN_FOLDER") ? std::getenv("STANDIN_FOLDER") : "/dev/shm"),
      num_devices_(std::min<uint64_t>(setting("STANDIN_DEVICES", 4), kDevicesMax)),
      nbytes_(setting("STANDIN_BYTES", 1ull << 30)) {
  const int fd = ::open((folder_ + "/registry").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || ftruncate(fd, sizeof(Registry)) != 0) std::abort();
  void* at = mmap(nullptr, sizeof(Registry), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (at == MAP_FAILED) std::abort();
  registry_ = static_cast<Registry*>(at);  // all zeros is a new one
}

bool Pool::can_access(uint32_t device, uint32_t peer) const {
  const char* pairs = std::getenv("STANDIN_NO_PEERS");
  for (const char* at = pairs; at; at = std::strchr(at, ',')) {
    at += *at == ',';
    unsigned one, other;
    if (std::sscanf(at, "%u-%u", &one, &other) != 2) std::abort();
    if ((one == device && other == peer) || (one == peer && other == device)) return false;
  }
  return true;
}

uint32_t Pool::hardware(uint32_t device) const {
  const char* at = std::getenv("STANDIN_HARDWARE");
  for (uint32_t before = 0; at && before < device; ++before) {
    at = std::strchr(at, ',');
    at += at != nullptr;
  }
  return at ? static_cast<uint32_t>(std::strtoul(at, nullptr, 10)) : device;
}

bool Pool::is_gone(uint32_t device) const {
  return access((folder_ + "/lost." + std::to_string(device)).c_str(), F_OK) == 0;
}

bool Pool::has_faulted() const {
  return access((folder_ + "/fault." + std::to_string(getpid())).c_str(), F_OK) == 0;
}

std::string Pool::path(uint32_t device, uint64_t serial, uint64_t nbytes) const {
  char name[96];
  std::snprintf(name, sizeof name, "/memory.%u.%" PRIu64 ".%" PRIu64, device, serial, nbytes);
  return folder_ + name;
}

uint64_t Pool::used(uint32_t device) {
  const Turn turn(folder_);
  return counted(device);
}

uint64_t Pool::counted(uint32_t device) {
  uint64_t total = 0;
  DIR* folder = opendir(folder_.c_str());
  if (!folder) std::abort();
  while (dirent* one = readdir(folder)) {
    unsigned of;
    uint64_t serial, nbytes;
    if (std::sscanf(one->d_name, "memory.%u.%" SCNu64 ".%" SCNu64, &of, &serial, &nbytes) != 3 || of != device)
      continue;
    const std::string name = folder_ + "/" + one->d_name;
    const int fd = ::open(name.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) continue;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
      unlink(name.c_str());
    } else {
      total += nbytes;
    }
    ::close(fd);
  }
  closedir(folder);
  registry_->used[device] = static_cast<int64_t>(total);
  return total;
}

Physical* Pool::create(uint32_t device, uint64_t nbytes) {
  const Turn turn(folder_);
  if (static_cast<uint64_t>(registry_->used[device]) + nbytes > nbytes_ && counted(device) + nbytes > nbytes_)
    return nullptr;
  const uint64_t serial = ++registry_->serial;
  const int fd = ::open(path(device, serial, nbytes).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0 || flock(fd, LOCK_SH) != 0 || ftruncate(fd, static_cast<off_t>(nbytes)) != 0) {
    if (fd >= 0) ::close(fd);
    return nullptr;
  }
  soil(fd, nbytes);
  registry_->used[device] += static_cast<int64_t>(nbytes);
  Entry& entry = registry_->entries[serial % kEntries];
  entry = Entry{};
  entry.serial = serial;
  entry.nbytes = nbytes;
  entry.device = device;
  return held(fd, device, nbytes, serial, false);
}

Physical* Pool::held(int fd, uint32_t device, uint64_t nbytes, uint64_t serial, bool is_imported) {
  void* hold = mmap(nullptr, 1, PROT_NONE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (hold == MAP_FAILED) return nullptr;
  return new Physical{device, nbytes, serial, hold, is_imported, false, 0, false};
}

Physical* Pool::open(uint64_t serial) {
  const Turn turn(folder_);
  const Entry& entry = registry_->entries[serial % kEntries];
  if (!serial || entry.serial != serial) return nullptr;
  const std::string name = path(entry.device, serial, entry.nbytes);
  const int fd = ::open(name.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) {  // nobody had it any more
    unlink(name.c_str());
    ::close(fd);
    return nullptr;
  }
  flock(fd, LOCK_SH);
  return held(fd, entry.device, entry.nbytes, serial, true);
}

Physical* Pool::adopt(int fd) {
  char name[PATH_MAX], link[64];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, name, sizeof name - 1);
  if (length < 0) return nullptr;
  name[length] = 0;
  unsigned device;
  uint64_t serial, nbytes;
  const char* base = std::strrchr(name, '/');
  if (!base || std::sscanf(base, "/memory.%u.%" SCNu64 ".%" SCNu64, &device, &serial, &nbytes) != 3) return nullptr;
  return open(serial);
}

int Pool::descriptor(const Physical& physical) const {
  const int fd = ::open(path(physical.device, physical.serial, physical.nbytes).c_str(), O_RDWR | O_CLOEXEC);
  if (fd >= 0) flock(fd, LOCK_SH);
  return fd;
}

void Pool::close(Physical* physical) {
  const Turn turn(folder_);
  munmap(physical->hold, 1);
  const int fd = ::open(path(physical->device, physical->serial, physical->nbytes).c_str(), O_RDWR | O_CLOEXEC);
  if (fd >= 0) {
    const std::string name = path(physical->device, physical->serial, physical->nbytes);
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && unlink(name.c_str()) == 0) {
      registry_->used[physical->device] -= static_cast<int64_t>(physical->nbytes);
    }
    ::close(fd);
  }
  delete physical;
}

Why AddressSpace::reserve(uint64_t nbytes, uint64_t& address) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* whole = mmap(nullptr, nbytes + kGranule, PROT_NONE, flags, -1, 0);
  if (whole == MAP_FAILED) return Why::kNoAddresses;
  const uint64_t begin = reinterpret_cast<uint64_t>(whole);
  address = (begin + kGranule - 1) / kGranule * kGranule;
  if (address > begin) munmap(whole, address - begin);
  const uint64_t left = begin + kGranule - address;
  if (left) munmap(reinterpret_cast<void*>(address + nbytes), left);
  ranges_[address] = Range{nbytes, {}};
  return Why::kFine;
}

Why AddressSpace::unreserve(uint64_t address, uint64_t nbytes) {
  const auto range = ranges_.find(address);
  if (range == ranges_.end() || (nbytes && nbytes != range->second.nbytes)) return Why::kOutside;
  if (!range->second.mappings.empty()) return Why::kStillMapped;
  munmap(reinterpret_cast<void*>(address), range->second.nbytes);
  ranges_.erase(range);
  return Why::kFine;
}

std::map<uint64_t, Range>::iterator AddressSpace::find(uint64_t address) {
  auto range = ranges_.upper_bound(address);
  if (range == ranges_.begin()) return ranges_.end();
  --range;
  return address < range->first + range->second.nbytes ? range : ranges_.end();
}

Why AddressSpace::map(uint64_t address, uint64_t nbytes, uint64_t offset, Physical* physical, int protection,
                      bool is_strict) {
  if (!nbytes || nbytes % kGranule || address % kGranule) return Why::kNotGranular;
  const auto range = find(address);
  if (range == ranges_.end() || address + nbytes > range->first + range->second.nbytes) return Why::kOutside;
  if (offset || nbytes != physical->nbytes) return Why::kNotWhole;
  auto& mappings = range->second.mappings;
  auto next = mappings.lower_bound(address);
  if (next != mappings.end() && next->first < address + nbytes) return Why::kLive;
  if (next != mappings.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.physical->nbytes > address) return Why::kLive;
  }
  if (is_strict && !mappings.empty()) {
    const Physical& other = *mappings.begin()->second.physical;
    if (other.device != physical->device) return Why::kTwoDevices;
    if (other.is_imported != physical->is_imported) return Why::kTwoOrigins;
  }
  const int fd = pool_.descriptor(*physical);
  void* at = mmap(reinterpret_cast<void*>(address), nbytes, protection, MAP_SHARED | MAP_FIXED, fd, 0);
  ::close(fd);
  if (at == MAP_FAILED) return Why::kNoAddresses;
  mappings[address] = Mapping{physical, protection, ++num_mapped_};
  ++physical->num_mappings;
  return Why::kFine;
}

Why AddressSpace::protect(uint64_t address, uint64_t nbytes, int protection) {
  const auto range = find(address);
  if (range == ranges_.end() || !nbytes) return Why::kOutside;
  auto& mappings = range->second.mappings;
  uint64_t end = address;
  for (auto one = mappings.find(address); one != mappings.end() && one->first == end && end < address + nbytes; ++one) {
    end += one->second.physical->nbytes;
  }
  if (end != address + nbytes) return Why::kNotMapped;
  for (auto one = mappings.find(address); one != mappings.end() && one->first < end; ++one) {
    one->second.protection = protection;
  }
  mprotect(reinterpret_cast<void*>(address), nbytes, protection);
  return Why::kFine;
}

Why AddressSpace::unmap(uint64_t address, uint64_t nbytes) {
  const auto range = find(address);
  if (range == ranges_.end()) return Why::kOutside;
  const auto mapping = range->second.mappings.find(address);
  if (mapping == range->second.mappings.end()) return Why::kNotMapped;
  Physical* physical = mapping->second.physical;
  if (nbytes && nbytes != physical->nbytes) return Why::kNotMapped;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(reinterpret_cast<void*>(address), physical->nbytes, PROT_NONE, flags, -1, 0);
  range->second.mappings.erase(mapping);
  if (!--physical->num_mappings && physical->is_released) pool_.close(physical);
  return Why::kFine;
}

Why AddressSpace::release(Physical* physical) {
  physical->is_released = true;
  if (!physical->num_mappings) pool_.close(physical);
  return Why::kFine;
}

const Mapping* AddressSpace::mapping_at(uint64_t address, uint64_t& end) const {
  const auto range = const_cast<AddressSpace*>(this)->find(address);
  if (range == ranges_.end()) return nullptr;
  auto mapping = range->second.mappings.upper_bound(address);
  if (mapping == range->second.mappings.begin()) return nullptr;
  --mapping;
  end = mapping->first + mapping->second.physical->nbytes;
  return address < end ? &mapping->second : nullptr;
}

bool AddressSpace::can_touch(uint64_t address, uint64_t nbytes, bool writes) const {
  for (uint64_t at = address; at < address + nbytes;) {
    uint64_t end;
    const Mapping* mapping = mapping_at(at, end);
    if (!mapping || !(mapping->protection & (writes ? PROT_WRITE : PROT_READ))) return false;
    at = end;
  }
  return true;
}

std::vector<uint64_t> AddressSpace::numbers(uint64_t address, uint64_t nbytes) const {
  std::vector<uint64_t> found;
  for (uint64_t at = address, end = 0; at < address + nbytes; at = end) {
    const Mapping* mapping = mapping_at(at, end);
    found.push_back(mapping ? mapping->number : 0);
    if (!mapping) break;
  }
  return found;
}

bool AddressSpace::is_in_range(uint64_t address) const {
  return const_cast<AddressSpace*>(this)->find(address) != ranges_.end();
}

uint32_t AddressSpace::device_of(uint64_t address) const {
  uint64_t end;
  const Mapping* mapping = mapping_at(address, end);
  return mapping ? mapping->physical->device : kDevicesMax;
}

void Stream::copy(const AddressSpace& space, uint64_t dst, uint64_t src, uint64_t nbytes, bool to_host,
                  bool from_host) {
  Copy asked{dst, src, nbytes, to_host, from_host, {}, {}, std::chrono::steady_clock::now() + kDelay};
  if (!to_host) asked.to = space.numbers(dst, nbytes);
  if (!from_host) asked.from = space.numbers(src, nbytes);
  copies_.push_back(std::move(asked));
  ++num_asked_;
}

bool Stream::run(const AddressSpace& space, uint64_t last, bool is_due) {
  while (num_done_ < last) {
    const Copy& copy = copies_.front();
    if (is_due && std::chrono::steady_clock::now() < copy.due) break;
    const auto is_there = [&](uint64_t address, bool writes, const std::vector<uint64_t>& numbers) {
      return space.can_touch(address, copy.nbytes, writes) && space.numbers(address, copy.nbytes) == numbers;
    };
    const bool can =
        (copy.to_host || is_there(copy.dst, true, copy.to)) && (copy.from_host || is_there(copy.src, false, copy.from));
    if (!can) return false;
    std::memcpy(reinterpret_cast<void*>(copy.dst), reinterpret_cast<const void*>(copy.src), copy.nbytes);
    copies_.pop_front();
    ++num_done_;
  }
  return true;
}

void zero(uint64_t address, uint64_t nbytes) {
  constexpr uint64_t kPage = 4096;
  const uint64_t begin = (address + kPage - 1) / kPage * kPage, end = (address + nbytes) / kPage * kPage;
  if (begin >= end) {
    std::memset(reinterpret_cast<void*>(address), 0, nbytes);
    return;
  }
  std::memset(reinterpret_cast<void*>(address), 0, begin - address);
  std::memset(reinterpret_cast<void*>(end), 0, address + nbytes - end);
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_REMOVE) != 0) {
    std::memset(reinterpret_cast<void*>(begin), 0, end - begin);
  }
}

}  // namespace standin
