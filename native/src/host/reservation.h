// A range of address space into which parts of files are mapped at fixed places.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace elasticmoe {

struct MapPart {
  uint64_t offset;
  int fd;
  uint64_t fd_offset;
  uint64_t nbytes;
};

// Owns the range and its mappings, not the file descriptors. For one thread at a time.
class Reservation {
 public:
  Reservation(uint64_t nbytes, uint64_t alignment);
  ~Reservation() { close(); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  uint64_t base() const { return base_; }
  uint64_t nbytes() const { return nbytes_; }

  // All parts or none.
  void map(const std::vector<MapPart>& parts, bool writable, bool populate);
  void unmap(uint64_t offset, uint64_t nbytes);
  // An advice: whether all of it lies in large pages now. What is there stays.
  bool collapse(uint64_t offset, uint64_t nbytes);
  // Of a writable part of which nothing is there. Where it is false, some may be, in pages of any size.
  bool make_large(uint64_t offset, uint64_t nbytes, uint64_t large_bytes);
  std::vector<std::pair<uint64_t, uint64_t>> mapped() const { return {live_.begin(), live_.end()}; }
  void close() noexcept;

 private:
  void check_part(const MapPart& part) const;
  void check_advised(uint64_t offset, uint64_t nbytes) const;
  void insert(uint64_t offset, uint64_t nbytes);
  bool try_make_inaccessible(uint64_t offset, uint64_t nbytes) const;

  uint64_t base_ = 0;
  uint64_t nbytes_ = 0;
  std::map<uint64_t, uint64_t> live_;  // offset -> nbytes
};

}  // namespace elasticmoe
