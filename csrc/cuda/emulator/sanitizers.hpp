// The sanitizers' interfaces, as symbols that are null unless the program is linked with one of them: the run time is
// the same object in every build.
#pragma once

#include <cstddef>

extern "C" {
#define BITFOLD_WEAK [[gnu::weak]]
BITFOLD_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
BITFOLD_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
BITFOLD_WEAK void* __asan_region_is_poisoned(void* begin, size_t size);
BITFOLD_WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t size);

BITFOLD_WEAK void* __tsan_get_current_fiber(void);
BITFOLD_WEAK void* __tsan_create_fiber(unsigned flags);
BITFOLD_WEAK void __tsan_destroy_fiber(void* fiber);
BITFOLD_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
BITFOLD_WEAK void __tsan_acquire(void* address);
BITFOLD_WEAK void __tsan_release(void* address);
BITFOLD_WEAK void __tsan_read_range(void* address, unsigned long size);
BITFOLD_WEAK void __tsan_write_range(void* address, unsigned long size);
BITFOLD_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
BITFOLD_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
BITFOLD_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
BITFOLD_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef BITFOLD_WEAK
}

namespace bitfold::cuda::emulator {

inline bool with_asan() { return __asan_region_is_poisoned != nullptr; }
inline bool with_tsan() { return __tsan_create_fiber != nullptr; }

// A thread of CUDA is one of ThreadSanitizer's too. Nothing orders two of them but these: what one did before it
// released a token comes before what another does after it acquired it.
inline void release(void* token) {
  if (with_tsan()) __tsan_release(token);
}
inline void acquire(void* token) {
  if (with_tsan()) __tsan_acquire(token);
}

// While one lives, what this thread does by way of intercepted functions (memcpy, malloc, free) is not looked at.
class Unseen {
 public:
  Unseen() {
    if (!with_tsan()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!with_tsan()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

}  // namespace bitfold::cuda::emulator
