// Kernel calls that were recorded, one after the other.

#include <time.h>

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
  double *seconds;  // null, or to what each call's time is added
  int64_t num_copies, num_calls;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// Returns 0, or the first error of a call; later calls are not made then.
EXPORT int tgis_replay(const struct replay_args *args) {
  const struct replay_args a = *args;
  for (int64_t i = 0; i < a.num_copies; i++)
    memcpy(a.copies[i].to, a.copies[i].from, a.copies[i].bytes);
  for (int64_t i = 0; i < a.num_calls; i++) {
    const double start = a.seconds ? now() : 0;
    const int error = a.calls[i].kernel(a.calls[i].args);
    if (error) return error;
    if (a.seconds) a.seconds[i] += now() - start;
  }
  return 0;
}
