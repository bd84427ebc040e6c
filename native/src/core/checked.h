// Checked 64-bit size arithmetic and argument checks. Everything that derives an address from numbers goes through
// here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace elasticmoe {

[[noreturn]] inline void invalid(const std::string& text) {
  throw std::invalid_argument(text);
}

inline void require(bool condition, const char* text) {
  if (!condition) invalid(text);
}

inline uint64_t checked_add(uint64_t a, uint64_t b) {
  uint64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) invalid("size overflows 64 bits");
  return sum;
}

inline uint64_t checked_mul(uint64_t a, uint64_t b) {
  uint64_t product;
  if (__builtin_mul_overflow(a, b, &product)) invalid("size overflows 64 bits");
  return product;
}

// `alignment` is a power of two.
inline uint64_t align_up(uint64_t value, uint64_t alignment) {
  return checked_add(value, alignment - 1) & ~(alignment - 1);
}

inline bool is_aligned(uint64_t value, uint64_t alignment) {
  return (value & (alignment - 1)) == 0;
}

inline bool is_power_of_two(uint64_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

inline void require_range(const char* name, uint64_t value, uint64_t low, uint64_t high) {
  if (value < low || value > high) {
    invalid(std::string(name) + " is " + std::to_string(value) + ", must be " + std::to_string(low) + " to " +
            std::to_string(high));
  }
}

// A part of memory of this process: not null, and not past the end of the address space.
inline void require_memory(const char* name, uint64_t addr, uint64_t nbytes) {
  if (addr == 0 && nbytes != 0) invalid(std::string(name) + " is null");
  if (addr > UINT64_MAX - nbytes) invalid(std::string(name) + " passes the end of the address space");
}

}  // namespace elasticmoe
