// Threads that help the one that computes: of a replica with more cores than ranks. Owned by the process; whoever
// computes shares its work with them, and does alone what comes while another thread has them.
#pragma once

#include <cstdint>

namespace elasticmoe::kernels {

// From now on so many threads compute, the calling one among them: 1 to kMostThreads. Threads that are no longer wanted
// sleep. Waits for the job in progress, so no item may call it. Throws std::system_error where one cannot be started;
// then there are as many as before.
inline constexpr int64_t kMostThreads = 64;
void set_threads(int64_t count);
int64_t num_threads();

// Calls work(context, item) for each item below `count`, in any order, on several threads at once, and returns when all
// are done. What a call throws other than std::bad_alloc ends the process. Throws std::bad_alloc if one did.
void share(int64_t count, void (*work)(void* context, int64_t item), void* context);

template <typename Work>
void share(int64_t count, Work&& work) {
  share(count, [](void* context, int64_t item) { (*static_cast<Work*>(context))(item); }, &work);
}

}  // namespace elasticmoe::kernels
