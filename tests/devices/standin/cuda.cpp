// A stand-in for libcuda.so.1, compiled against the vendor's own declarations: a call that differs from them does not
// compile. What it refuses, and by which code, is in ../rules/cuda.toml, with the sources. Longer than other files
// because one state is behind all calls.
#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <set>

#include "memory.h"

using namespace standin;

namespace {

std::atomic<uint64_t> calls, num_fences;
std::atomic<uint64_t> num_events;  // that there are

struct Context {
  uint32_t device;
  bool is_lost = false;
};

thread_local Context* current = nullptr;

struct State {
  State() : space(pool) {
    for (uint32_t device = 0; device < kDevicesMax; ++device) contexts[device].device = device;
  }
  std::mutex mutex;
  Pool pool;
  AddressSpace space;
  bool is_initialized = false;
  Context contexts[kDevicesMax];
  std::set<Physical*> handles;
  std::set<Stream*> streams;
};

State& state() {
  static State* made = new State;  // never ended: threads may outlive main
  return *made;
}

CUresult code_of(Why why) {
  switch (why) {
    case Why::kFine:
      return CUDA_SUCCESS;
    case Why::kNoMemory:
    case Why::kNoAddresses:
      return CUDA_ERROR_OUT_OF_MEMORY;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

bool is_device(int device) {
  return device >= 0 && device < static_cast<int>(state().pool.num_devices());
}

bool has_lost(const Context& context) {
  return context.is_lost || state().pool.has_faulted();
}

// One call at a time, after cuInit. `needs_context`: of a thread that has one which has not failed.
struct Call {
  explicit Call(bool needs_context = false) : lock(state().mutex), code(CUDA_SUCCESS) {
    ++calls;
    if (!state().is_initialized) {
      code = CUDA_ERROR_NOT_INITIALIZED;
    } else if (needs_context && !current) {
      code = CUDA_ERROR_INVALID_CONTEXT;
    } else if (needs_context && state().pool.is_gone(current->device)) {
      code = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    } else if (needs_context && has_lost(*current)) {
      code = CUDA_ERROR_ILLEGAL_ADDRESS;
    }
  }
  std::unique_lock<std::mutex> lock;
  CUresult code;
};

CUresult run(Stream* stream, uint64_t last, bool is_due) {
  if (state().pool.is_gone(stream->device())) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  Context& context = state().contexts[stream->device()];
  if (has_lost(context) || !stream->run(state().space, last, is_due)) context.is_lost = true;
  return context.is_lost ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

CUresult check(const CUmemAllocationProp* prop) {
  if (prop->type != CU_MEM_ALLOCATION_TYPE_PINNED || prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (prop->requestedHandleTypes != 0 && prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  return is_device(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

Stream* made(CUstream stream) {
  return reinterpret_cast<Stream*>(stream);
}
Event* made(CUevent event) {
  return reinterpret_cast<Event*>(event);
}

CUresult copy_now(uint64_t dst, uint64_t src, size_t nbytes, bool to_host, bool from_host) {
  Stream stream(current->device);
  stream.copy(state().space, dst, src, nbytes, to_host, from_host);
  return run(&stream, stream.last(), false);
}

}  // namespace

#define ENTER(needs_context) \
  Call call(needs_context);  \
  if (call.code != CUDA_SUCCESS) return call.code

#pragma GCC visibility push(default)
extern "C" {

uint64_t standin_calls() {
  return calls;
}
uint64_t standin_num_fences() {
  return num_fences;
}
uint64_t standin_num_events() {
  return num_events;
}
uint64_t standin_used(uint32_t device) {
  return state().pool.used(device);
}

CUresult cuInit(unsigned flags) {
  ++calls;
  const std::lock_guard lock(state().mutex);
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (!state().pool.num_devices()) return CUDA_ERROR_NO_DEVICE;
  state().is_initialized = true;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  ENTER(false);
  *count = static_cast<int>(state().pool.num_devices());
  return CUDA_SUCCESS;
}

#ifndef STANDIN_V1
// Of one error that the product has a meaning of, and one that it has none of.
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_SYSTEM_NOT_READY ? "CUDA_ERROR_SYSTEM_NOT_READY"
          : error == CUDA_ERROR_INVALID_VALUE  ? "CUDA_ERROR_INVALID_VALUE"
                                               : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_SYSTEM_NOT_READY ? "system not yet\n  initialized"
          : error == CUDA_ERROR_INVALID_VALUE  ? "invalid argument"
                                               : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
#endif

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  ENTER(true);
  *total = state().pool.nbytes();
  *free = *total - state().pool.used(current->device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  ENTER(false);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  const bool is_asked = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
                        attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
  *value = is_asked && !std::getenv("STANDIN_NO_SHARING");
  return CUDA_SUCCESS;
}

#ifndef STANDIN_V1
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  ENTER(false);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::memset(uuid->bytes, 0xD0, sizeof uuid->bytes);
  uuid->bytes[sizeof uuid->bytes - 1] = static_cast<char>(state().pool.hardware(static_cast<uint32_t>(device)));
  return CUDA_SUCCESS;
}
#endif

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  ENTER(false);
  if (!is_device(device) || !is_device(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer && state().pool.can_access(static_cast<uint32_t>(device), static_cast<uint32_t>(peer));
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER(false);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (state().pool.is_gone(static_cast<uint32_t>(device))) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  *context = reinterpret_cast<CUcontext>(&state().contexts[device]);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER(false);
  current = reinterpret_cast<Context*>(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  ENTER(true);
  ++num_fences;
  CUresult code = CUDA_SUCCESS;
  for (Stream* stream : state().streams) {
    if (stream->device() == current->device && code == CUDA_SUCCESS) code = run(stream, stream->last(), false);
  }
  return code;
}

CUresult cuMemGetAllocationGranularity(size_t* nbytes, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags) {
  ENTER(false);
  *nbytes = kGranule;
  return check(prop);
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr,
                             unsigned long long flags) {
  ENTER(false);
  if (flags || !size || size % static_cast<size_t>(sysconf(_SC_PAGESIZE)) || (alignment & (alignment - 1))) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  uint64_t made_at = 0;
  const Why why = state().space.reserve(size, made_at);
  *address = made_at;
  return code_of(why);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  ENTER(false);
  return size ? code_of(state().space.unreserve(address, size)) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* prop,
                     unsigned long long flags) {
  ENTER(false);
  if (flags || !size || size % kGranule) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult code = check(prop); code != CUDA_SUCCESS) return code;
  Physical* physical = state().pool.create(static_cast<uint32_t>(prop->location.id), size);
  if (!physical) return code_of(Why::kNoMemory);
  physical->is_exported = prop->requestedHandleTypes != 0;  // it may be
  state().handles.insert(physical);
  *handle = reinterpret_cast<uint64_t>(physical);
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  ENTER(false);
  auto* physical = reinterpret_cast<Physical*>(handle);
  if (!state().handles.erase(physical)) return code_of(Why::kNoHandle);
  return code_of(state().space.release(physical));  // mappings hold the memory for as long as they last
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  ENTER(false);
  auto* physical = reinterpret_cast<Physical*>(handle);
  if (flags || !state().handles.count(physical)) return CUDA_ERROR_INVALID_VALUE;
  if (offset || size > physical->nbytes) return CUDA_ERROR_NOT_SUPPORTED;
  return code_of(state().space.map(address, size, offset, physical, PROT_NONE, false));
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  ENTER(false);
  return size ? code_of(state().space.unmap(address, size)) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access, size_t count) {
  ENTER(false);
  if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(access->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  for (uint64_t at = address; at < address + size; at += kGranule) {
    const uint32_t owner = state().space.device_of(at);
    if (owner != kDevicesMax && !state().pool.can_access(static_cast<uint32_t>(access->location.id), owner)) {
      return CUDA_ERROR_INVALID_DEVICE;
    }
  }
  if (access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
    return code_of(state().space.protect(address, size, PROT_READ | PROT_WRITE));
  }
  if (access->flags != CU_MEM_ACCESS_FLAGS_PROT_READ) return CUDA_ERROR_INVALID_VALUE;
  if (std::getenv("STANDIN_NO_READ_ONLY")) return CUDA_ERROR_NOT_SUPPORTED;
  return code_of(state().space.protect(address, size, PROT_READ));
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  ENTER(false);
  auto* physical = reinterpret_cast<Physical*>(handle);
  if (flags || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  if (!state().handles.count(physical) || !physical->is_exported) return CUDA_ERROR_INVALID_VALUE;
  const int fd = state().pool.descriptor(*physical);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(shareable) = fd;
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* shareable,
                                        CUmemAllocationHandleType type) {
  ENTER(false);
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  Physical* physical = state().pool.adopt(static_cast<int>(reinterpret_cast<intptr_t>(shareable)));
  if (!physical) return CUDA_ERROR_UNKNOWN;
  physical->is_exported = true;
  state().handles.insert(physical);
  *handle = reinterpret_cast<uint64_t>(physical);
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8(CUdeviceptr address, unsigned char value, size_t count) {
  ENTER(true);
  if (!state().space.can_touch(address, count, true)) return CUDA_ERROR_INVALID_VALUE;
  if (value == 0) {
    zero(address, count);
  } else {
    std::memset(reinterpret_cast<void*>(address), value, count);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr dst, const void* src, size_t count) {
  ENTER(true);
  if (!state().space.can_touch(dst, count, true)) return CUDA_ERROR_INVALID_VALUE;
  return copy_now(dst, reinterpret_cast<uint64_t>(src), count, false, true);
}

CUresult cuMemcpyDtoH(void* dst, CUdeviceptr src, size_t count) {
  ENTER(true);
  if (!state().space.can_touch(src, count, false)) return CUDA_ERROR_INVALID_VALUE;
  return copy_now(reinterpret_cast<uint64_t>(dst), src, count, true, false);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr dst, CUdeviceptr src, size_t count, CUstream stream) {
  ENTER(true);
  const uint32_t device = current->device;
  const AddressSpace& space = state().space;
  for (const uint64_t address : {dst, src}) {
    if (!space.is_in_range(address)) return CUDA_ERROR_INVALID_VALUE;
    if (space.device_of(address) != kDevicesMax && space.device_of(address) != device) return CUDA_ERROR_INVALID_VALUE;
  }
  made(stream)->copy(space, dst, src, count, false, false);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyPeerAsync(CUdeviceptr dst, CUcontext dst_context, CUdeviceptr src, CUcontext src_context, size_t count,
                           CUstream stream) {
  ENTER(true);
  const auto device_of = [](CUcontext context) { return reinterpret_cast<Context*>(context)->device; };
  const AddressSpace& space = state().space;
  if (space.device_of(dst) != device_of(dst_context) || space.device_of(src) != device_of(src_context)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  made(stream)->copy(space, dst, src, count, false, false);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  ENTER(true);
  auto* one = new Stream(current->device);
  state().streams.insert(one);
  *stream = reinterpret_cast<CUstream>(one);
  return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
  ENTER(true);
  ++num_events;
  *event = reinterpret_cast<CUevent>(new Event);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
  ENTER(true);
  --num_events;
  delete made(event);
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  ENTER(true);
  *made(event) = Event{made(stream), made(stream)->last()};
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
  ENTER(false);
  const Event& one = *made(event);
  if (const CUresult code = run(one.stream, one.last, true); code != CUDA_SUCCESS) return code;
  return one.stream->is_done(one.last) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent event) {
  ENTER(true);
  return run(made(event)->stream, made(event)->last, false);
}

}  // extern "C"
#pragma GCC visibility pop
