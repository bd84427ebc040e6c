// A stand-in for libascendcl.so, compiled against the vendor's own declarations: a call that differs from them does not
// compile. What it refuses, and by which code, is in ../rules/ascend.toml, with the sources.
// Longer than other files because a driver is one library with one state.
#include <acl/acl_rt.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <utility>

#include "memory.h"

using namespace standin;

namespace {

constexpr uint64_t kRangeMax = 128'000'000'000;
constexpr uint64_t kKey = 0xA5CEull << 48;
constexpr uint64_t kQueuedAlign = 64;

std::atomic<uint64_t> calls;
std::atomic<uint64_t> num_copied, bytes_copied;  // copies within devices and between them
std::atomic<uint64_t> num_fences, num_let_in;
std::atomic<uint64_t> num_events;   // that there are
thread_local int32_t current = -1;  // the device that this thread has set
// Of the calls of this thread that were refused, until somebody asks for it.
thread_local std::string told;

struct State {
  State() : space(pool), tgid(0), start(0) {}
  std::mutex mutex;
  Pool pool;
  AddressSpace space;
  int32_t tgid;
  uint64_t start;
  bool exports = false, imports = false;
  std::set<Physical*> handles;
  std::set<uint64_t> imported;
  std::set<Stream*> streams;
  std::set<std::pair<uint32_t, uint32_t>> peers;
  bool is_lost[kDevicesMax] = {};
};

State& state() {
  static State* made = new State;  // never ended: threads may outlive main
  return *made;
}

aclError code_of(Why why) {
  if (why != Why::kFine) told = "EZ9999: Inner Error!\n        a rule of the driver is broken";
  switch (why) {
    case Why::kFine:
      return ACL_SUCCESS;
    case Why::kNoMemory:
    case Why::kNoAddresses:
      return ACL_ERROR_RT_MEMORY_ALLOCATION;
    case Why::kNoHandle:
      return ACL_ERROR_RT_INVALID_HANDLE;
    case Why::kNotAdmitted:
      return ACL_ERROR_RT_NO_PERMISSION;
    case Why::kLive:
    case Why::kTwoDevices:
    case Why::kTwoOrigins:
    case Why::kStillMapped:
    case Why::kTwice:
    case Why::kOwnProcess:
      return ACL_ERROR_RT_DRV_INTERNAL_ERROR;
    default:
      return ACL_ERROR_RT_PARAM_INVALID;
  }
}

// One call at a time, of a thread that has a device.
struct Call {
  Call() : lock(state().mutex), code(current < 0 ? ACL_ERROR_RT_CONTEXT_NULL : ACL_SUCCESS) {
    ++calls;
    if (current >= 0 && state().pool.is_gone(static_cast<uint32_t>(current))) code = ACL_ERROR_RT_LOST_HEARTBEAT;
  }
  std::unique_lock<std::mutex> lock;
  aclError code;
};

bool run(Stream* stream, uint64_t last, bool is_due) {
  State& all = state();
  if (all.is_lost[stream->device()] || !stream->run(all.space, last, is_due)) all.is_lost[stream->device()] = true;
  return !all.is_lost[stream->device()];
}

bool run_all(uint32_t device) {
  bool is_fine = !state().is_lost[device];
  for (Stream* stream : state().streams) {
    if (stream->device() == device) is_fine = run(stream, stream->last(), false) && is_fine;
  }
  return is_fine;
}

aclError export_to(aclrtDrvMemHandle handle, uint64_t flags, uint64_t* shareable) {
  State& all = state();
  auto* physical = static_cast<Physical*>(handle);
  if (!all.handles.count(physical)) return code_of(Why::kNoHandle);
  if (physical->is_imported || all.imports) return code_of(Why::kOwnProcess);
  if (physical->is_exported) return code_of(Why::kTwice);
  if (flags & ~ACL_RT_VMM_EXPORT_FLAG_DISABLE_PID_VALIDATION) return ACL_ERROR_RT_PARAM_INVALID;
  all.exports = physical->is_exported = true;
  Entry& entry = all.pool.registry().entries[physical->serial % kEntries];
  entry.exporter = all.tgid;
  entry.is_open = flags != 0;
  *shareable = kKey | physical->serial;
  return ACL_SUCCESS;
}

Entry* shared(uint64_t shareable) {
  const uint64_t serial = shareable ^ kKey;
  Entry& entry = state().pool.registry().entries[serial % kEntries];
  return serial && serial < kKey && entry.serial == serial && entry.exporter ? &entry : nullptr;
}

aclError admit(uint64_t shareable, const int32_t* pids, size_t num) {
  State& all = state();
  Entry* entry = shared(shareable);
  if (!entry) return ACL_ERROR_RT_PARAM_INVALID;
  if (entry->exporter != all.tgid) return code_of(Why::kNotAdmitted);
  const uint64_t now = all.pool.tick();
  for (size_t i = 0; i < num; ++i) {
    uint32_t at = 0;
    while (at < entry->num_admitted && entry->admitted[at].tgid != pids[i]) ++at;
    if (at == kAdmittedMax) {  // no page gives the driver's limit: this is the stand-in's own room
      std::fprintf(stderr, "the stand-in has no room for a handle's process %u: kAdmittedMax\n", at + 1);
      std::abort();
    }
    if (at == entry->num_admitted) ++entry->num_admitted;
    entry->admitted[at] = {pids[i], now};
  }
  return ACL_SUCCESS;
}

aclError import_from(uint64_t shareable, int32_t device, aclrtDrvMemHandle* handle) {
  State& all = state();
  if (device < 0 || device >= static_cast<int32_t>(all.pool.num_devices())) return ACL_ERROR_RT_INVALID_DEVICEID;
  const Entry* entry = shared(shareable);
  if (!entry) return ACL_ERROR_RT_PARAM_INVALID;
  if (all.exports) return code_of(Why::kOwnProcess);
  if (all.imported.count(entry->serial)) return code_of(Why::kTwice);
  bool is_admitted = entry->is_open;
  for (uint32_t at = 0; at < entry->num_admitted; ++at) {
    is_admitted = is_admitted || (entry->admitted[at].tgid == all.tgid && entry->admitted[at].when > all.start);
  }
  if (!is_admitted) return code_of(Why::kNotAdmitted);
  if (!all.pool.can_access(static_cast<uint32_t>(device), entry->device)) return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
  Physical* physical = all.pool.open(entry->serial);
  if (!physical) return ACL_ERROR_RT_PARAM_INVALID;
  all.imports = true;
  all.imported.insert(physical->serial);
  all.peers.insert({static_cast<uint32_t>(device), physical->device});  // who imports is let in by that
  all.handles.insert(physical);
  *handle = physical;
  return ACL_SUCCESS;
}

bool is_reachable(uint64_t address, uint32_t from) {
  const uint32_t device = state().space.device_of(address);
  return device == kDevicesMax || device == from || state().peers.count({from, device});
}

aclError copy(void* dst, const void* src, size_t count, aclrtMemcpyKind kind, Stream* stream) {
  const bool to_host = kind == ACL_MEMCPY_DEVICE_TO_HOST, from_host = kind == ACL_MEMCPY_HOST_TO_DEVICE;
  if (!to_host && !from_host && kind != ACL_MEMCPY_DEVICE_TO_DEVICE) return ACL_ERROR_RT_PARAM_INVALID;
  const auto to = reinterpret_cast<uint64_t>(dst), from = reinterpret_cast<uint64_t>(src);
  // What torch has of a device lies in the host's memory where torch computes on the CPU instead. One end is ours.
  const AddressSpace& space = state().space;
  const bool is_to_ours = space.is_in_range(to), is_from_ours = space.is_in_range(from);
  if (kind == ACL_MEMCPY_DEVICE_TO_DEVICE && !is_to_ours && !is_from_ours) return ACL_ERROR_RT_PARAM_INVALID;
  if ((!to_host && !is_reachable(to, stream->device())) || (!from_host && !is_reachable(from, stream->device()))) {
    return ACL_ERROR_RT_PARAM_INVALID;
  }
  if (state().is_lost[stream->device()]) return ACL_ERROR_RT_SYS_DMA;
  stream->copy(space, to, from, count, to_host || !is_to_ours, from_host || !is_from_ours);
  return ACL_SUCCESS;
}

void note(aclrtMemcpyKind kind, size_t count) {
  if (kind != ACL_MEMCPY_DEVICE_TO_DEVICE) return;
  ++num_copied;
  bytes_copied += count;
}

}  // namespace

#define ENTER \
  Call call;  \
  if (call.code != ACL_SUCCESS) return call.code

extern "C" {

__attribute__((visibility("default"))) uint64_t standin_calls() {
  return calls;
}
__attribute__((visibility("default"))) uint64_t standin_num_copied() {
  return num_copied;
}
__attribute__((visibility("default"))) uint64_t standin_bytes_copied() {
  return bytes_copied;
}
__attribute__((visibility("default"))) uint64_t standin_num_fences() {
  return num_fences;
}
__attribute__((visibility("default"))) uint64_t standin_num_let_in() {
  return num_let_in;
}
__attribute__((visibility("default"))) uint64_t standin_num_events() {
  return num_events;
}
__attribute__((visibility("default"))) uint64_t standin_used(uint32_t device) {
  return state().pool.used(device);
}

aclError aclInit(const char*) {
  ++calls;
  const std::lock_guard lock(state().mutex);
  if (state().tgid) {
    told = "EE1001: initialized again";
    return ACL_ERROR_REPEAT_INITIALIZE;
  }
  state().start = state().pool.tick();
  const char* named = std::getenv("STANDIN_TGID");
  state().tgid = named ? std::atoi(named) : 1'000'000 + static_cast<int32_t>(state().start);
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  ++calls;
  *count = state().pool.num_devices();
  return *count ? ACL_SUCCESS : ACL_ERROR_RT_NO_DEVICE;
}

aclError aclrtSetDevice(int32_t device) {
  ++calls;
  if (!state().tgid) return ACL_ERROR_UNINITIALIZE;
  if (device < 0 || device >= static_cast<int32_t>(state().pool.num_devices())) return ACL_ERROR_RT_INVALID_DEVICEID;
  if (state().pool.is_gone(static_cast<uint32_t>(device))) return ACL_ERROR_RT_LOST_HEARTBEAT;
  current = device;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  ENTER;
  *pid = state().tgid;
  return ACL_SUCCESS;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp* prop, aclrtMemGranularityOptions option, size_t* size) {
  ENTER;
  if (prop->memAttr != ACL_HBM_MEM_HUGE || option == ACL_RT_MEM_ALLOC_GRANULARITY_UNDEF) {
    return ACL_ERROR_RT_PARAM_INVALID;
  }
  *size = kGranule;
  return ACL_SUCCESS;
}

aclError aclrtReserveMemAddress(void** address, size_t size, size_t alignment, void* expected, uint64_t) {
  ENTER;
  if (!size || size % kGranule) return code_of(Why::kNotGranular);
  if (alignment || expected) return ACL_ERROR_RT_PARAM_INVALID;
  if (size > kRangeMax) return code_of(Why::kNoAddresses);
  uint64_t made = 0;
  const Why why = state().space.reserve(size, made);
  *address = reinterpret_cast<void*>(made);
  return code_of(why);
}

aclError aclrtReleaseMemAddress(void* address) {
  ENTER;
  return code_of(state().space.unreserve(reinterpret_cast<uint64_t>(address), 0));
}

#ifndef STANDIN_V1
const char* aclGetRecentErrMsg() {
  thread_local std::string taken;
  taken = std::exchange(told, {});
  return taken.empty() ? nullptr : taken.c_str();
}
#endif

aclError aclrtGetVersion(int32_t* major, int32_t* minor, int32_t* patch) {
  *major = ACL_MAJOR_VERSION;
  *minor = ACL_MINOR_VERSION;
  *patch = ACL_PATCH_VERSION;
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t* free, size_t* total) {
  ENTER;
  if (attr != ACL_HBM_MEM) return ACL_ERROR_RT_PARAM_INVALID;
  *total = state().pool.nbytes();
  *free = *total - state().pool.used(static_cast<uint32_t>(current));
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp* prop, uint64_t flags) {
  ENTER;
  if (!size || size % kGranule) return code_of(Why::kNotGranular);
  if (flags || prop->handleType != ACL_MEM_HANDLE_TYPE_NONE || prop->memAttr != ACL_HBM_MEM_HUGE ||
      prop->allocationType != ACL_MEM_ALLOCATION_TYPE_PINNED || prop->location.type != ACL_MEM_LOCATION_TYPE_DEVICE ||
      prop->reserve) {
    return ACL_ERROR_RT_PARAM_INVALID;
  }
  if (prop->location.id >= state().pool.num_devices()) return ACL_ERROR_RT_INVALID_DEVICEID;
  Physical* physical = state().pool.create(prop->location.id, size);
  if (!physical) return code_of(Why::kNoMemory);
  state().handles.insert(physical);
  *handle = physical;
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  ENTER;
  auto* physical = static_cast<Physical*>(handle);
  if (!state().handles.count(physical)) return code_of(Why::kNoHandle);
  if (physical->num_mappings) return code_of(Why::kStillMapped);
  state().handles.erase(physical);
  if (physical->is_imported) state().imported.erase(physical->serial);
  return code_of(state().space.release(physical));
}

aclError aclrtMapMem(void* address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
  ENTER;
  auto* physical = static_cast<Physical*>(handle);
  if (!state().handles.count(physical)) return code_of(Why::kNoHandle);
  if (flags) return ACL_ERROR_RT_PARAM_INVALID;
  const auto at = reinterpret_cast<uint64_t>(address);
  return code_of(state().space.map(at, size, offset, physical, PROT_READ | PROT_WRITE, true));
}

aclError aclrtUnmapMem(void* address) {
  ENTER;
  return code_of(state().space.unmap(reinterpret_cast<uint64_t>(address), 0));
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType type, uint64_t flags,
                                         uint64_t* shareable) {
  ENTER;
  if (type != ACL_MEM_HANDLE_TYPE_NONE) return ACL_ERROR_RT_PARAM_INVALID;
  return export_to(handle, flags, shareable);
}

aclError aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t* pids, size_t num) {
  ENTER;
  return admit(shareable, pids, num);
}

aclError aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t device, aclrtDrvMemHandle* handle) {
  ENTER;
  return import_from(shareable, device, handle);
}

#ifndef STANDIN_V1
aclError aclrtMemExportToShareableHandleV2(aclrtDrvMemHandle handle, uint64_t flags, aclrtMemSharedHandleType type,
                                           void* shareable) {
  ENTER;
  if (flags || type != ACL_MEM_SHARE_HANDLE_TYPE_DEFAULT) return ACL_ERROR_RT_PARAM_INVALID;
  return export_to(handle, flags, static_cast<uint64_t*>(shareable));
}

aclError aclrtMemSetPidToShareableHandleV2(void* shareable, aclrtMemSharedHandleType type, int32_t* pids, size_t num) {
  ENTER;
  if (type != ACL_MEM_SHARE_HANDLE_TYPE_DEFAULT) return ACL_ERROR_RT_PARAM_INVALID;
  return admit(*static_cast<uint64_t*>(shareable), pids, num);
}

aclError aclrtMemImportFromShareableHandleV2(void* shareable, aclrtMemSharedHandleType type, uint64_t flags,
                                             aclrtDrvMemHandle* handle) {
  ENTER;
  if (flags || type != ACL_MEM_SHARE_HANDLE_TYPE_DEFAULT) return ACL_ERROR_RT_PARAM_INVALID;
  return import_from(*static_cast<uint64_t*>(shareable), current, handle);
}
#endif

#ifndef STANDIN_V1
aclError aclrtGetPhyDevIdByLogicDevId(const int32_t device, int32_t* const number) {
  ENTER;
  if (device < 0 || device >= static_cast<int32_t>(state().pool.num_devices())) return ACL_ERROR_RT_INVALID_DEVICEID;
  *number = static_cast<int32_t>(state().pool.hardware(static_cast<uint32_t>(device)));
  return ACL_SUCCESS;
}
#endif

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  ENTER;
  const auto num = static_cast<int32_t>(state().pool.num_devices());
  if (device < 0 || device >= num || peer < 0 || peer >= num) return ACL_ERROR_RT_INVALID_DEVICEID;
  *can = device != peer && state().pool.can_access(static_cast<uint32_t>(device), static_cast<uint32_t>(peer));
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
  ENTER;
  if (flags || peer == current) return ACL_ERROR_RT_PARAM_INVALID;
  if (peer < 0 || peer >= static_cast<int32_t>(state().pool.num_devices())) return ACL_ERROR_RT_INVALID_DEVICEID;
  if (!state().pool.can_access(static_cast<uint32_t>(current), static_cast<uint32_t>(peer))) {
    return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
  }
  ++num_let_in;
  state().peers.insert({static_cast<uint32_t>(current), static_cast<uint32_t>(peer)});
  return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) {
  ENTER;
  auto* made = new Stream(static_cast<uint32_t>(current));
  state().streams.insert(made);
  *stream = made;
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* dst, size_t room, const void* src, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  ENTER;
  auto* one = static_cast<Stream*>(stream);
  const bool is_aligned = (reinterpret_cast<uint64_t>(dst) | reinterpret_cast<uint64_t>(src)) % kQueuedAlign == 0;
  if (count > room || !is_aligned) return ACL_ERROR_RT_PARAM_INVALID;
  if (!state().streams.count(one) || one->device() != static_cast<uint32_t>(current))
    return ACL_ERROR_RT_STREAM_CONTEXT;
  const aclError code = copy(dst, src, count, kind, one);
  if (code == ACL_SUCCESS) note(kind, count);
  return code;
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  ENTER;
  auto* one = static_cast<Stream*>(stream);
  if (!state().streams.count(one)) return ACL_ERROR_RT_STREAM_CONTEXT;
  return run(one, one->last(), false) ? ACL_SUCCESS : ACL_ERROR_RT_SYS_DMA;
}

aclError aclrtMemcpy(void* dst, size_t room, const void* src, size_t count, aclrtMemcpyKind kind) {
  ENTER;
  if (count > room) return ACL_ERROR_RT_PARAM_INVALID;
  Stream stream(static_cast<uint32_t>(current));
  const aclError code = copy(dst, src, count, kind, &stream);
  if (code != ACL_SUCCESS) return code;
  note(kind, count);
  return run(&stream, stream.last(), false) ? ACL_SUCCESS : ACL_ERROR_RT_SYS_DMA;
}

aclError aclrtMemset(void* address, size_t room, int32_t value, size_t count) {
  ENTER;
  if (state().is_lost[current]) return ACL_ERROR_RT_SYS_DMA;
  const auto at = reinterpret_cast<uint64_t>(address);
  if (count > room || !state().space.can_touch(at, count, true)) return ACL_ERROR_RT_PARAM_INVALID;
  if (value == 0) {
    zero(at, count);
  } else {
    std::memset(address, value, count);
  }
  return ACL_SUCCESS;
}

aclError aclrtCreateEvent(aclrtEvent* event) {
  ENTER;
  ++num_events;
  *event = new Event;
  return ACL_SUCCESS;
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  ENTER;
  --num_events;
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  ENTER;
  auto* one = static_cast<Stream*>(stream);
  *static_cast<Event*>(event) = Event{one, one->last()};
  return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  ENTER;
  const auto* one = static_cast<Event*>(event);
  if (!run(one->stream, one->last, true)) return ACL_ERROR_RT_SYS_DMA;
  const bool is_done = one->stream->is_done(one->last);
  *status = is_done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  ENTER;
  const auto* one = static_cast<Event*>(event);
  return run(one->stream, one->last, false) ? ACL_SUCCESS : ACL_ERROR_RT_SYS_DMA;
}

aclError aclrtSynchronizeDevice() {
  ENTER;
  ++num_fences;
  return run_all(static_cast<uint32_t>(current)) ? ACL_SUCCESS : ACL_ERROR_RT_SYS_DMA;
}

}  // extern "C"
