// Helpers sleep until a door opens behind which there is work, look for the next one for a while, and
// sleep again. What happens behind a door is shared by all who are inside: turns of a loop, or the
// calls of a sequence, which open the doors of loops.
//
// A thread that is taken off its core in the middle of a turn holds the others up. So each offers its
// core between turns, five times a millisecond: whoever waits for it comes in then.

#define _GNU_SOURCE
#include "team.h"

#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_HELPERS 255
#define OPEN (1u << 16)       // beside the number of threads inside
#define OFFER_NS 200000       // how long a thread keeps its core for itself
#define KEEP_NS 20000         // the same of one without work
#define SPIN_NS 2000000       // how long that looks for work before it sleeps
#define LONGEST_NS 50000000   // that it sleeps where nobody would wake it

struct door {
  _Atomic uint32_t state;
  void (*enter)(void *inside);
  void *inside;
};

struct loop {
  span_of_loop span;
  void *what;
  void (*leave)(void);
  _Atomic int64_t next;
  int64_t count, each;
};

struct sequence {
  int (*next)(void *what);
  void *what;
  _Atomic int over;
};

static struct door loops, sequences;
static _Atomic int led;                // a thread leads: it alone opens the doors of loops
static _Thread_local int leads;        // this one
static _Thread_local int64_t offered;  // when it last offered its core, ns
static _Atomic int taken;              // a sequence is under way
static _Atomic int wanted, started;    // helpers
static _Atomic uint32_t bell, asleep;
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void offer(void) {
  sched_yield();
  offered = now_ns();
}

static int is_due(void) { return now_ns() - offered > OFFER_NS; }

// Lets some time pass between two looks; returns how long this has gone on. `since` is 0 at first.
static int64_t look_away(int64_t *since) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (!*since) *since = now_ns();
  const int64_t waited = now_ns() - *since;
  if (waited > KEEP_NS) offer();
  return waited;
}

// The same for one whom nobody wakes. It sleeps in the end: who is stuck must not seem to compute.
static void wait_a_little(int64_t *since) {
  const int64_t waited = look_away(since);
  if (waited < SPIN_NS) return;
  const struct timespec nap = {0, min64(waited / 4, LONGEST_NS)};
  nanosleep(&nap, NULL);
}

static void futex(int operation, uint32_t value) {
  syscall(SYS_futex, &bell, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

// Comes in too, and returns when nobody is inside any more.
static void open_door(struct door *d, void (*enter)(void *), void *inside) {
  d->enter = enter;
  d->inside = inside;
  atomic_store(&d->state, OPEN);
  if (atomic_load(&asleep)) {
    atomic_fetch_add(&bell, 1);
    futex(FUTEX_WAKE, MAX_HELPERS);
  }
  enter(inside);
  atomic_fetch_and(&d->state, ~OPEN);
  int64_t since = 0;
  while (atomic_load_explicit(&d->state, memory_order_acquire)) wait_a_little(&since);
}

static int go_through(struct door *d) {
  uint32_t state = atomic_load_explicit(&d->state, memory_order_relaxed);
  do {
    if (!(state & OPEN)) return 0;
  } while (!atomic_compare_exchange_weak_explicit(&d->state, &state, state + 1,
                                                  memory_order_acquire, memory_order_relaxed));
  d->enter(d->inside);
  atomic_fetch_sub_explicit(&d->state, 1, memory_order_release);
  return 1;
}

static void rest(uint32_t heard, int is_wanted) {
  atomic_fetch_add(&asleep, 1);
  const uint32_t open = atomic_load(&sequences.state) | atomic_load(&loops.state);
  if (!is_wanted || !(open & OPEN)) futex(FUTEX_WAIT, heard);
  atomic_fetch_sub(&asleep, 1);
}

static void *help(void *number) {
  for (int64_t since = 0;;) {
    const uint32_t heard = atomic_load(&bell);
    const int is_wanted = (intptr_t)number < atomic_load_explicit(&wanted, memory_order_relaxed);
    if (is_wanted && (go_through(&sequences) || go_through(&loops))) {
      if (is_due()) offer();
      since = 0;
    } else if (look_away(&since) > SPIN_NS || !is_wanted) {
      rest(heard, is_wanted);
      since = 0;
    }
  }
  return NULL;
}

// A child process has none of the threads.
static void forget(void) {
  pthread_mutex_init(&starting, NULL);
  atomic_store(&started, 0);
  atomic_store(&asleep, 0);
  atomic_store(&led, 0);
  atomic_store(&taken, 0);
  atomic_store(&loops.state, 0);
  atomic_store(&sequences.state, 0);
}

__attribute__((constructor)) static void prepare(void) { pthread_atfork(NULL, NULL, forget); }

// There will be so many helpers, or fewer if threads cannot be had. Signals are for others.
static void want(int helpers) {
  atomic_store(&wanted, helpers);
  if (atomic_load(&started) >= helpers) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_mutex_lock(&starting);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (pthread_t thread; atomic_load(&started) < helpers; atomic_fetch_add(&started, 1)) {
    if (pthread_create(&thread, NULL, help, (void *)(intptr_t)atomic_load(&started))) break;
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_mutex_unlock(&starting);
}

static int lead(void) {
  int nobody = 0;
  return leads = atomic_compare_exchange_strong(&led, &nobody, 1);
}

static void follow(void) {
  leads = 0;
  atomic_store(&led, 0);
}

int64_t team_threads(void) {
  return leads ? atomic_load(&wanted) + 1 : min64(omp_get_max_threads(), MAX_HELPERS + 1);
}

static void take_turns(void *inside) {
  struct loop *l = inside;
  for (;;) {
    const int64_t begin = atomic_fetch_add_explicit(&l->next, l->each, memory_order_relaxed);
    if (begin >= l->count) break;
    l->span(l->what, begin, min64(begin + l->each, l->count));
  }
  l->leave();
}

static void just_leave(void) {}

void team_loop(int64_t count, int64_t each, span_of_loop span, void *what) {
  team_loop_then(count, each, span, what, just_leave);
}

void team_loop_then(int64_t count, int64_t each, span_of_loop span, void *what,
                    void (*leave)(void)) {
  if (count <= each) {
    if (count > 0) span(what, 0, count);
    return leave();
  }
  struct loop loop = {span, what, leave, 0, count, each};
  if (leads) return open_door(&loops, take_turns, &loop);
#pragma omp parallel
  take_turns(&loop);
}

static void make_calls(void *inside) {
  struct sequence *s = inside;
  for (int64_t since = 0; !atomic_load_explicit(&s->over, memory_order_acquire);) {
    if (lead()) {
      while (!s->over && !is_due())
        if (!s->next(s->what)) s->over = 1;
      follow();
    } else if (!go_through(&loops)) {
      wait_a_little(&since);
      continue;
    }
    since = 0;
    if (is_due()) offer();
  }
}

void team_sequence(int (*next)(void *what), void *what) {
  int nobody = 0;
  const int64_t threads = team_threads();
  if (threads == 1 || leads || !atomic_compare_exchange_strong(&taken, &nobody, 1)) {
    while (next(what)) continue;
    return;
  }
  struct sequence sequence = {next, what, 0};
  want(threads - 1);
  open_door(&sequences, make_calls, &sequence);
  atomic_store(&taken, 0);
}
