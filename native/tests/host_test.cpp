// Reservations, page allocation and bulk memory work.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstring>

#include "core/checked.h"
#include "core/xxh64.h"
#include "host/pages.h"
#include "host/reservation.h"
#include "testing.h"

using namespace elasticmoe;
using testing::SharedMemory;

namespace {

const uint64_t kPage = page_bytes();

char* at(uint64_t addr) {
  return reinterpret_cast<char*>(addr);
}

int open_readonly(int fd) {
  const int readonly = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(readonly >= 0);
  return readonly;
}

uint64_t allocated_bytes(int fd) {
  struct stat status;
  CHECK(fstat(fd, &status) == 0);
  return static_cast<uint64_t>(status.st_blocks) * 512;
}

}  // namespace

TEST(sizes_are_checked) {
  CHECK(checked_add(2, 3) == 5 && checked_mul(4, 5) == 20 && align_up(65, 64) == 128 && align_up(64, 64) == 64);
  CHECK_THROWS(std::invalid_argument, checked_add(UINT64_MAX, 1));
  CHECK_THROWS(std::invalid_argument, checked_mul(UINT64_MAX, 2));
  CHECK_THROWS(std::invalid_argument, align_up(UINT64_MAX, 64));
  CHECK_THROWS(std::invalid_argument, require_memory("addr", UINT64_MAX - 3, 5));
}

TEST(reservation_is_aligned_and_empty) {
  for (uint64_t alignment = kPage; alignment <= 8 << 20; alignment *= 2) {
    const Reservation range(3 * kPage, alignment);
    CHECK(range.base() % alignment == 0 && range.nbytes() == 3 * kPage && range.mapped().empty());
  }
  CHECK_THROWS(std::invalid_argument, Reservation(0, kPage));
  CHECK_THROWS(std::invalid_argument, Reservation(kPage + 1, kPage));
  CHECK_THROWS(std::invalid_argument, Reservation(kPage, 3 * kPage));
  CHECK_THROWS(std::invalid_argument, Reservation(kPage, 512));
  CHECK_THROWS(std::system_error, Reservation(uint64_t{1} << 60, kPage));
}

TEST(mapping_shares_the_file) {
  SharedMemory file(8 * kPage);
  Reservation range(16 * kPage, kPage);
  range.map({{4 * kPage, file.fd(), 2 * kPage, 3 * kPage}}, true, false);
  std::strcpy(at(range.base() + 4 * kPage), "hello");
  CHECK(std::strcmp(file.as<char>() + 2 * kPage, "hello") == 0);
  CHECK(range.mapped() == (std::vector<std::pair<uint64_t, uint64_t>>{{4 * kPage, 3 * kPage}}));
  range.unmap(4 * kPage, 3 * kPage);
  CHECK(range.mapped().empty());
  range.map({{4 * kPage, file.fd(), 2 * kPage, kPage}}, false, true);
  CHECK(std::strcmp(at(range.base() + 4 * kPage), "hello") == 0);
}

TEST(mapping_refuses_what_is_wrong) {
  SharedMemory file(8 * kPage);
  Reservation range(8 * kPage, kPage);
  range.map({{2 * kPage, file.fd(), 0, 2 * kPage}}, true, false);
  const auto refused = [&](uint64_t offset, uint64_t fd_offset, uint64_t nbytes) {
    CHECK_THROWS(std::invalid_argument, range.map({{offset, file.fd(), fd_offset, nbytes}}, true, false));
  };
  refused(kPage, 0, 2 * kPage);      // overlaps from the left
  refused(3 * kPage, 0, 2 * kPage);  // overlaps from the right
  refused(2 * kPage, 0, 2 * kPage);  // the same place
  refused(kPage, 0, 4 * kPage);      // encloses
  refused(5 * kPage + 1, 0, kPage);
  refused(5 * kPage, 1, kPage);
  refused(5 * kPage, 0, kPage + 1);
  refused(5 * kPage, 0, 0);
  refused(7 * kPage, 0, 2 * kPage);          // passes the range's end
  refused(5 * kPage, 7 * kPage, 2 * kPage);  // passes the file's end
  refused(5 * kPage, UINT64_MAX & ~(kPage - 1), kPage);
  refused(UINT64_MAX & ~(kPage - 1), 0, kPage);
  CHECK_THROWS(std::invalid_argument, range.map({{5 * kPage, -1, 0, kPage}}, true, false));
  CHECK_THROWS(std::system_error, range.map({{5 * kPage, 9999, 0, kPage}}, true, false));
  CHECK_THROWS(std::invalid_argument, range.unmap(2 * kPage, kPage));
  CHECK_THROWS(std::invalid_argument, range.unmap(3 * kPage, kPage));
  CHECK(range.mapped().size() == 1);
}

TEST(many_mappings_are_all_or_none) {
  SharedMemory file(8 * kPage);
  Reservation range(8 * kPage, kPage);
  CHECK_THROWS(
      std::invalid_argument,
      range.map({{0, file.fd(), 0, kPage}, {kPage, file.fd(), 0, kPage}, {0, file.fd(), 0, kPage}}, true, false));
  CHECK(range.mapped().empty());
  // A descriptor without write access fails in the kernel, after the first part was mapped.
  const int readonly = open_readonly(file.fd());
  CHECK_THROWS(std::system_error, range.map({{0, file.fd(), 0, kPage}, {kPage, readonly, 0, kPage}}, true, false));
  CHECK(range.mapped().empty());
  range.map({{0, file.fd(), 0, kPage}, {kPage, file.fd(), kPage, kPage}}, true, false);
  range.map({{2 * kPage, readonly, 0, kPage}}, false, false);
  CHECK(range.mapped().size() == 3);
  close(readonly);
}

TEST(closing_twice_is_harmless) {
  SharedMemory file(kPage);
  Reservation range(kPage, kPage);
  range.map({{0, file.fd(), 0, kPage}}, true, false);
  range.close();
  range.close();
  CHECK(range.base() == 0 && range.nbytes() == 0 && range.mapped().empty());
  CHECK_THROWS(std::invalid_argument, range.map({{0, file.fd(), 0, kPage}}, true, false));
  CHECK_THROWS(std::invalid_argument, range.collapse(0, kPage));
}

TEST(unmapped_places_are_inaccessible) {
  const Reservation range(kPage, kPage);
  const pid_t pid = testing::spawn([&] { *reinterpret_cast<volatile char*>(range.base()) = 1; });
  const int status = testing::wait_status(pid);
  CHECK(!WIFEXITED(status) || WEXITSTATUS(status) != 0);
}

TEST(allocation_takes_and_gives_back_pages) {
  SharedMemory file(8 * kPage);
  CHECK(allocated_bytes(file.fd()) == 0);
  allocate(file.fd(), kPage, 4 * kPage);
  CHECK(allocated_bytes(file.fd()) == 4 * kPage);
  std::memset(file.as<char>() + kPage, 7, 2 * kPage);
  std::memset(file.as<char>() + 3 * kPage, 8, 2 * kPage);
  CHECK(punch_hole(file.fd(), kPage, kPage));
  CHECK(allocated_bytes(file.fd()) == 3 * kPage);
  CHECK(file.as<char>()[kPage] == 0 && file.as<char>()[2 * kPage] == 7);
  CHECK_THROWS(std::invalid_argument, allocate(file.fd(), 0, 0));
  CHECK_THROWS(std::invalid_argument, allocate(-1, 0, kPage));
  CHECK_THROWS(std::invalid_argument, allocate(file.fd(), UINT64_MAX, kPage));
  const int readonly = open_readonly(file.fd());
  CHECK_THROWS(std::system_error, allocate(readonly, 0, kPage));
  close(readonly);
}

TEST(writing_allocates_what_is_written) {
  SharedMemory file(8 * kPage);
  std::vector<char> source(3 * kPage, 5);
  write_from(file.fd(), 2 * kPage, reinterpret_cast<uint64_t>(source.data()), 3 * kPage);
  CHECK(allocated_bytes(file.fd()) == 3 * kPage);
  CHECK(file.as<char>()[2 * kPage] == 5 && file.as<char>()[5 * kPage - 1] == 5);
  CHECK_THROWS(std::invalid_argument, write_from(file.fd(), 0, reinterpret_cast<uint64_t>(source.data()), 0));
  CHECK_THROWS(std::invalid_argument, write_from(file.fd(), UINT64_MAX, reinterpret_cast<uint64_t>(source.data()), 1));
  CHECK_THROWS(std::invalid_argument, write_from(file.fd(), 0, 0, kPage));
  const int readonly = open_readonly(file.fd());
  CHECK_THROWS(std::system_error, write_from(readonly, 0, reinterpret_cast<uint64_t>(source.data()), kPage));
  close(readonly);
}

TEST(allocation_beyond_the_machine_is_refused) {
  const SharedMemory file(kPage);
  const pid_t pid = testing::spawn([&] {
    // Should the refusal under test be missing, this limit is what keeps the machine alive.
    const rlimit limit{1 << 20, 1 << 20};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0 && signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    try {
      allocate(file.fd(), 0, uint64_t{1} << 50);
    } catch (const std::system_error& error) {
      if (error.code().value() == ENOMEM) return;
    }
    throw testing::Failure("not refused with ENOMEM");
  });
  CHECK(testing::wait_status(pid) == 0);
}

TEST(copies_and_reads) {
  SharedMemory memory(4 * kPage);
  char* data = memory.as<char>();
  std::strcpy(data, "moe");
  copy_memory(memory.addr() + kPage, memory.addr(), 4);
  CHECK(std::strcmp(data + kPage, "moe") == 0);
  CHECK_THROWS(std::invalid_argument, copy_memory(memory.addr() + 3, memory.addr(), 4));
  CHECK_THROWS(std::invalid_argument, copy_memory(0, memory.addr(), 4));
  uint64_t done = 0;
  read_into(memory.fd(), kPage, memory.addr() + 2 * kPage, 4, done);
  CHECK(done == 4 && std::strcmp(data + 2 * kPage, "moe") == 0);
  done = 0;
  CHECK_THROWS(std::system_error, read_into(memory.fd(), 3 * kPage, memory.addr(), kPage + 1, done));
  CHECK(done == kPage);
}

TEST(hash_is_xxh64) {
  CHECK(xxh64("", 0) == 0xEF46DB3751D8E999);
  CHECK(xxh64("a", 1) == 0xD24EC4F1A98C6E5B);
  CHECK(xxh64("abc", 3) == 0x44BC2CF5AD770999);
  const char* sentence = "Nobody inspects the spammish repetition";
  CHECK(xxh64(sentence, std::strlen(sentence)) == 0xFBCEA83C8A378BF1);
  SharedMemory memory(kPage);
  const uint64_t zeros = checksum_memory(memory.addr(), kPage);
  for (uint64_t bit = 0; bit < 8 * kPage; bit += 997) {
    memory.as<unsigned char>()[bit / 8] ^= static_cast<unsigned char>(1U << bit % 8);
    CHECK(checksum_memory(memory.addr(), kPage) != zeros);
    memory.as<unsigned char>()[bit / 8] = 0;
  }
}

TEST(collapse_is_an_advice) {
  constexpr uint64_t kHuge = 2 << 20;
  SharedMemory file(kHuge);
  std::memset(file.as<char>(), 5, kHuge);
  Reservation range(kHuge, kHuge);
  range.map({{0, file.fd(), 0, kHuge}}, true, true);
  (void)range.collapse(0, kHuge);  // either answer is right; the content must stay
  CHECK(at(range.base())[kHuge - 1] == 5);
}

TEST(large_pages_are_made_of_nothing) {
  constexpr uint64_t kHuge = 2 << 20;
  SharedMemory file(2 * kHuge);
  Reservation range(2 * kHuge, kHuge);
  range.map({{0, file.fd(), 0, 2 * kHuge}}, true, false);
  (void)range.make_large(kHuge, kHuge, kHuge);  // either answer is right
  CHECK(at(range.base())[kHuge] == 0 && at(range.base())[2 * kHuge - 1] == 0);
  CHECK(allocated_bytes(file.fd()) <= kHuge);
  CHECK_THROWS(std::invalid_argument, range.make_large(kPage, kHuge, kHuge));
  CHECK_THROWS(std::invalid_argument, range.make_large(0, kHuge, 3 * kPage));
}
