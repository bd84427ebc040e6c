// What both stand-in drivers are made of: physical memory that outlives whoever made it, address ranges of one process,
// and streams whose copies are done later. It knows no vendor: it says what was wrong, a vendor's file has its code.
//
// STANDIN_FOLDER: where the processes of a test find the memory (a folder on tmpfs). STANDIN_DEVICES, STANDIN_BYTES:
// how many devices there are and what each has. STANDIN_TGID: the process's number on the machine, else one of its own.
// STANDIN_HARDWARE: of each device in its order, which hardware it is to this process (1,0,2: the first two are
// exchanged), else what its number says; only who asks for a device's identity sees it. STANDIN_NO_PEERS: pairs of
// devices of which none can access the other's memory (0-1,2-3). Both are looked at whenever they matter, and so are
// files of the folder: lost.N, the device of that number is lost to every process; fault.P, what the process with that
// pid computes has touched what is not mapped, which only a driver sees whose devices have contexts.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace standin {

inline constexpr uint64_t kGranule = 2 << 20;
inline constexpr uint32_t kDevicesMax = 16;
inline constexpr uint32_t kAdmittedMax = 256;  // more than a deployment's ranks, with their successors
inline constexpr uint32_t kEntries = 1 << 16;

enum class Why {
  kFine,
  kNotGranular,  // a size or address
  kOutside,      // of the range, or of every range
  kNotWhole,     // another size than the handle's, or not from its beginning
  kLive,         // something is mapped there
  kTwoDevices,   // in one range
  kTwoOrigins,   // in one range: made here and imported
  kNotMapped,    // or not to that extent
  kNoMemory,     // of the device
  kNoAddresses,  // of the process
  kNoHandle,     // of that number
  kStillMapped,  // what was to be given back
  kTwice,        // exported or imported again
  kOwnProcess,   // exports and imports
  kNotAdmitted,  // to a shared handle
};

// A shared handle, as all processes of the machine know it.
struct Entry {
  uint64_t serial;
  uint64_t nbytes;
  uint32_t device;
  int32_t exporter;  // 0: it is not exported
  bool is_open;      // to anybody
  uint32_t num_admitted;
  struct {
    int32_t tgid;
    uint64_t when;
  } admitted[kAdmittedMax];
};

struct Registry {
  std::atomic<uint64_t> clock;  // counts events: what is later has the larger number
  std::atomic<uint64_t> serial;
  std::atomic<int64_t> used[kDevicesMax];
  Entry entries[kEntries];
};

// Memory that is there as long as anybody holds its open file: a handle, a mapping, a descriptor. The kernel knows, by
// a shared lock on that open file (flock(2)), so kill -9 leaves nothing behind.
struct Physical {
  uint32_t device;
  uint64_t nbytes;
  uint64_t serial;
  void* hold;
  bool is_imported;
  bool is_exported;
  uint32_t num_mappings;
  bool is_released;
};

class Pool {
 public:
  Pool();
  uint32_t num_devices() const { return num_devices_; }
  uint64_t nbytes() const { return nbytes_; }
  Registry& registry() { return *registry_; }
  uint64_t tick() { return ++registry_->clock; }
  bool can_access(uint32_t device, uint32_t peer) const;
  uint32_t hardware(uint32_t device) const;
  bool is_gone(uint32_t device) const;
  bool has_faulted() const;  // this process
  // What of a device is held by anybody, after a look at each piece.
  uint64_t used(uint32_t device);
  Physical* create(uint32_t device, uint64_t nbytes);  // nullptr: no memory
  Physical* open(uint64_t serial);                     // nullptr: it is gone
  Physical* adopt(int fd);                             // a descriptor of a process; nullptr: not ours
  void close(Physical* physical);
  int descriptor(const Physical& physical) const;  // of its memory, the caller's to close

 private:
  std::string path(uint32_t device, uint64_t serial, uint64_t nbytes) const;
  uint64_t counted(uint32_t device);
  static Physical* held(int fd, uint32_t device, uint64_t nbytes, uint64_t serial, bool is_imported);
  std::string folder_;
  uint32_t num_devices_;
  uint64_t nbytes_;
  Registry* registry_;
};

struct Mapping {
  Physical* physical;
  int protection;
  uint64_t number;  // no other one of the process has it, before or after
};

struct Range {
  uint64_t nbytes;
  std::map<uint64_t, Mapping> mappings;
};

class AddressSpace {
 public:
  explicit AddressSpace(Pool& pool) : pool_(pool) {}
  Why reserve(uint64_t nbytes, uint64_t& address);
  Why unreserve(uint64_t address, uint64_t nbytes);  // nbytes 0: whatever it has
  // `is_strict`: of one device and one origin a range.
  Why map(uint64_t address, uint64_t nbytes, uint64_t offset, Physical* physical, int protection, bool is_strict);
  Why protect(uint64_t address, uint64_t nbytes, int protection);
  Why unmap(uint64_t address, uint64_t nbytes);  // nbytes 0: whatever is mapped from there
  Why release(Physical* physical);
  bool can_touch(uint64_t address, uint64_t nbytes, bool writes) const;
  // Of the mappings there, in their order; 0 ends them where nothing is mapped.
  std::vector<uint64_t> numbers(uint64_t address, uint64_t nbytes) const;
  bool is_in_range(uint64_t address) const;
  uint32_t device_of(uint64_t address) const;  // of what is mapped there; kDevicesMax: nothing

 private:
  std::map<uint64_t, Range>::iterator find(uint64_t address);
  const Mapping* mapping_at(uint64_t address, uint64_t& end) const;
  Pool& pool_;
  std::map<uint64_t, Range> ranges_;
  uint64_t num_mapped_ = 0;
};

// Copies in their order, done when somebody waits for them, or looks a while later. One that touches what is not
// mapped, or was mapped since it was asked for, is a fault, after which nothing of the device is done any more.
class Stream {
 public:
  explicit Stream(uint32_t device) : device_(device) {}
  uint32_t device() const { return device_; }
  void copy(const AddressSpace& space, uint64_t dst, uint64_t src, uint64_t nbytes, bool to_host, bool from_host);
  uint64_t last() const { return num_asked_; }
  // Do what was asked up to the `last`; `is_due`: only what has waited long enough. False: there was a fault.
  bool run(const AddressSpace& space, uint64_t last, bool is_due);
  bool is_done(uint64_t last) const { return num_done_ >= last; }

 private:
  struct Copy {
    uint64_t dst, src, nbytes;
    bool to_host, from_host;
    std::vector<uint64_t> to, from;  // mappings of the ends when it was asked for
    std::chrono::steady_clock::time_point due;
  };
  uint32_t device_;
  std::deque<Copy> copies_;
  uint64_t num_asked_ = 0;
  uint64_t num_done_ = 0;
};

struct Event {
  Stream* stream = nullptr;
  uint64_t last = 0;
};

void zero(uint64_t address, uint64_t nbytes);

}  // namespace standin
