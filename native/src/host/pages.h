// Pages of files and bulk work on mapped memory. System errors are std::system_error, bad arguments
// std::invalid_argument.
#pragma once

#include <cstdint>

namespace elasticmoe {

uint64_t page_bytes();

// Each of these may be cut short by a signal: they then throw EINTR (`allocate`, `punch_hole`: without effect) and may
// be called again, so that the caller gets to handle the signal.
void allocate(int fd, uint64_t offset, uint64_t nbytes);

// Throws ENOMEM where the machine has not so much memory available now.
void require_available(uint64_t nbytes);

// Whether all pages are gone. The kernel only clears its part of a large page that it cannot split at this moment
// (mm/truncate.c, truncate_inode_partial_folio): somebody is touching the rest. Another call may succeed. Moves the
// file's position.
bool punch_hole(int fd, uint64_t offset, uint64_t nbytes);

// Pages that are allocated by being written need not be cleared first.
void write_from(int fd, uint64_t file_offset, uint64_t addr, uint64_t nbytes);

// Reads on from `done` to `nbytes`, which lets a caller resume after EINTR. EIO where the file ends early.
void read_into(int fd, uint64_t file_offset, uint64_t addr, uint64_t nbytes, uint64_t& done);

void copy_memory(uint64_t dst_addr, uint64_t src_addr, uint64_t nbytes);
uint64_t checksum_memory(uint64_t addr, uint64_t nbytes);

}  // namespace elasticmoe
