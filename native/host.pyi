"""Host memory: address ranges, page mappings, page allocation, bulk copies.

Addresses are plain integers of this process. Unless said otherwise memory is owned by the caller, who keeps it mapped
during the call; the functions check arithmetic and bounds, not that an address is mapped. Sizes are bytes. Every function
that may block or touch much memory releases the GIL. A failing system call raises ``OSError`` with its ``errno``, a bad
argument raises ``ValueError``.
"""

class Reservation:
    """One range of address space without memory, into which parts of files are mapped at fixed places.

    Owns the range: ``close`` and the destructor unmap everything. File descriptors stay the caller's; a mapping outlives
    the descriptor it was made from. Not for use by several threads at once, except for reading the attributes.
    """

    def __init__(self, nbytes: int, alignment: int = 4096) -> None:
        """Reserve ``nbytes`` (a multiple of the page size) at a multiple of ``alignment`` (a power of two, ≥ the page size)."""

    @property
    def base(self) -> int:
        """First address of the range; 0 after ``close``."""

    @property
    def nbytes(self) -> int:
        """Length of the range; 0 after ``close``."""

    def map(self, offset: int, fd: int, fd_offset: int, nbytes: int, writable: bool, populate: bool = False) -> None:
        """Map ``nbytes`` of ``fd`` from ``fd_offset`` at ``base + offset``, shared with every other mapper.

        All three are multiples of the page size and the part lies inside the file and inside the range, else ``ValueError``;
        so it does over a live mapping. ``populate`` maps all pages now (may block long) rather than at their first touch.
        """

    def map_many(self, parts: list[tuple[int, int, int, int]], writable: bool, populate: bool = False) -> None:
        """Map many parts ``(offset, fd, fd_offset, nbytes)`` as ``map`` does. All or none: a failure unmaps what it had mapped."""

    def unmap(self, offset: int, nbytes: int) -> None:
        """Unmap exactly what one ``map`` call (or one part of ``map_many``) mapped; the place becomes inaccessible again.

        Nobody may be using the memory: the caller fences first. ``ValueError`` where no mapping is exactly ``(offset, nbytes)``.
        """

    def mapped(self) -> list[tuple[int, int]]:
        """Live mappings as ``(offset, nbytes)``, by offset."""

    def collapse(self, offset: int, nbytes: int) -> bool:
        """Ask the kernel to gather mapped pages into huge pages now. Blocks while it copies.

        An advice: False where the kernel does not support it, or could not do it for this memory now.
        """

    def make_large(self, offset: int, nbytes: int, large_bytes: int) -> bool:
        """Make pages of ``large_bytes`` (the kernel's huge ones) behind a writable part of which nothing is there yet, as zeros.

        Both ends are multiples of it, as addresses and as places in the file. False where the kernel could not, or does not
        support it: then some pages may be there, large or small. ``OSError`` with ``ENOMEM`` as ``allocate`` raises it. Blocks.
        """

    def close(self) -> None:
        """Unmap everything and give the range back. May be called again. Later ``map`` calls raise ``ValueError``."""

def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Give ``fd`` real pages for a part of the file, growing it where needed (``fallocate`` mode 0). Blocks.

    Existing content stays. ``OSError`` with ``ENOSPC`` or ``ENOMEM`` where memory is short, and then nothing was allocated.
    On memory files more than the machine has available now is refused with ``ENOMEM`` outright (the kernel would kill processes
    instead), even if part of it was allocated before. Budgets below that are the caller's.
    """

def write_from(fd: int, file_offset: int, addr: int, nbytes: int) -> None:
    """Write memory to a part of a file, with new pages where it has none: cheaper than ``allocate`` and ``copy``, which clear
    them first. Blocks. Raises as ``allocate``; some of it may have been written then.
    """

def punch_hole(fd: int, offset: int, nbytes: int) -> bool:
    """Give back the pages of a part of the file, which then reads as zeros; the file's size stays. Blocks.

    False where some pages are still there: the kernel cannot split a large page while somebody touches the rest of it.
    A later call may succeed. Mappings of the part stay valid; touching them allocates again. Moves the file's position.
    """

def copy(dst_addr: int, src_addr: int, nbytes: int) -> None:
    """Copy memory. The two parts must not overlap (``ValueError``)."""

def checksum(addr: int, nbytes: int) -> int:
    """XXH64 of memory with seed 0: 64 bits, not cryptographic."""

def read_into(fd: int, file_offset: int, addr: int, nbytes: int) -> None:
    """Read exactly ``nbytes`` of a file from ``file_offset`` to memory, without moving the file's position. Blocks.

    ``OSError`` with ``EIO`` if the file ends early; what was read by then stays in memory.
    """
