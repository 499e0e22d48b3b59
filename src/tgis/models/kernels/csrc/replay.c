// Kernel calls that were recorded, one after the other.

#include <time.h>

#include "team.h"

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

struct progress {
  struct replay_args a;
  int64_t next;
  int error;
};

static int next_call(void *what) {
  struct progress *p = what;
  if (p->error || p->next == p->a.num_calls) return 0;
  const struct call *call = &p->a.calls[p->next];
  const double start = p->a.seconds ? now() : 0;
  p->error = call->kernel(call->args);
  if (p->a.seconds) p->a.seconds[p->next] += now() - start;
  p->next++;
  return 1;
}

// Returns 0, or the first error of a call; later calls are not made then.
EXPORT int tgis_replay(const struct replay_args *args) {
  struct progress p = {.a = *args};
  for (int64_t i = 0; i < p.a.num_copies; i++)
    memcpy(p.a.copies[i].to, p.a.copies[i].from, p.a.copies[i].bytes);
  team_sequence(next_call, &p);
  return p.error;
}
