// Kernel calls that were recorded, one after the other.

#include "vec.h"

struct call {
  int (*kernel)(const void *);
  const void *args;
};

struct copy {
  void *to;
  const void *from;
  int64_t bytes;
};

struct replay_args {
  const struct copy *copies;  // before the calls
  const struct call *calls;
  int64_t num_copies, num_calls;
};

// Returns 0, or the first error of a call; later calls are not made then.
EXPORT int tgis_replay(const struct replay_args *args) {
  const struct replay_args a = *args;
  for (int64_t i = 0; i < a.num_copies; i++)
    memcpy(a.copies[i].to, a.copies[i].from, a.copies[i].bytes);
  for (int64_t i = 0; i < a.num_calls; i++) {
    const int error = a.calls[i].kernel(a.calls[i].args);
    if (error) return error;
  }
  return 0;
}
