// Threads that compute together. Within a sequence a loop's iterations are taken by whoever comes:
// nobody waits for a thread that is not there because its core does something else, as a barrier
// would. Other loops run on OpenMP's threads, which torch's operators between them use too.
#pragma once

#include "vec.h"

// Part of a loop: iterations begin .. end of what `what` describes.
typedef void (*span_of_loop)(void *what, int64_t begin, int64_t end);

// Runs `count` iterations, `each` of which are taken at a time. Where all are taken at once, this
// thread does them.
void team_loop(int64_t count, int64_t each, span_of_loop span, void *what);

// The same; a thread that has had its last turn calls leave().
void team_loop_then(int64_t count, int64_t each, span_of_loop span, void *what,
                    void (*leave)(void));

// Calls next(what), which may use team_loop, until it returns 0: each call by one of the threads, one
// after the other; the others help it. None of them has to be there all the time.
void team_sequence(int (*next)(void *what), void *what);

// How many threads compute at most: as many as torch would use.
int64_t team_threads(void);

// A part of `count` iterations that lets threads take some turns each, but not many.
INLINE int64_t team_part(int64_t count) { return max64(1, count / (8 * team_threads())); }
