// What low-rank adapters add to a layer's output: y += (x A') B', each row with its own adapter.
//
// Rows of one adapter are computed together, so that its weights are read once for up to 8 of them.
// Weights lie as [outputs / 16][inputs / 2][16][2] in bfloat16, as [outputs / 16][inputs][16] in
// float32: they are read from one end to the other. Outputs are rounded up to a multiple of 16, and so
// are all ranks together; a part's rank is even.

#include <stdlib.h>

#include "team.h"

#define MAX_PARTS 3  // of a layer's output, one after the other: queries, keys, values
#define GROUP 8      // rows that are computed together
#define CHUNK 256    // outputs that a thread takes at a time
#define STEP 64      // bytes of the weights of 16 outputs from one input, or pair of them
#define AHEAD 2048   // bytes between what is asked for and what is computed

struct site {               // one adapter's weights of one layer
  const void *a;            // inputs -> ranks of all parts; null: it has none
  const void *b[MAX_PARTS];  // ranks of a part -> its outputs
  int64_t rank[MAX_PARTS];
};

struct low_rank_args {
  void *y;                 // rows x width[0] + width[1] + width[2]
  const void *x;           // rows x in
  const int64_t *adapter;  // rows: the address of an adapter's sites, or 0
  int64_t rows, in, site;
  int64_t width[MAX_PARTS];
  int64_t bf16, y_bf16;  // x and weights; y
};

struct group {
  const struct site *site;
  int64_t n, row[GROUP];
};

// Adds the products of a pair of bfloat16 weights in each lane with two values of x.
INLINE vf add_pairs(vf sum, vu w, const char *x) {
  uint32_t pair;
  memcpy(&pair, x, 4);
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)w);
#else
  const uint32_t odd = pair & 0xffff0000u;
  float second;
  memcpy(&second, &odd, 4);
  return sum + (vf)(w << 16) * bf16_to_float((uint16_t)pair) + (vf)(w & 0xffff0000u) * second;
#endif
}

// VL outputs of m rows.
INLINE void multiply(const char *w, int64_t in, const char *const *x, int m, int bf16, vf *sums) {
  for (int i = 0; i < m; i++) sums[i] = splat(0);
  if (!bf16) {
    for (int64_t k = 0; k < in; k++, w += STEP) {
      __builtin_prefetch(w + AHEAD);
      const vf v = load(w, 0);
      for (int i = 0; i < m; i++) sums[i] += v * ((const float *)x[i])[k];
    }
    return;
  }
  vu v;
  int64_t k = 0;
  for (; k + 2 <= in; k += 2, w += STEP) {
    __builtin_prefetch(w + AHEAD);
    memcpy(&v, w, sizeof v);
    for (int i = 0; i < m; i++) sums[i] = add_pairs(sums[i], v, x[i] + 2 * k);
  }
  if (k < in) {
    memcpy(&v, w, sizeof v);
    for (int i = 0; i < m; i++) {
      char last[4] = {x[i][2 * k], x[i][2 * k + 1], 0, 0};
      sums[i] = add_pairs(sums[i], v, last);
    }
  }
}

// For a group of any size; what it computes beyond its rows is of no use.
INLINE void multiply_any(const char *w, int64_t in, const char *const *x, int64_t n, int bf16,
                         vf *sums) {
  if (n > 4)
    multiply(w, in, x, 8, bf16, sums);
  else if (n > 2)
    multiply(w, in, x, 4, bf16, sums);
  else if (n == 2)
    multiply(w, in, x, 2, bf16, sums);
  else
    multiply(w, in, x, 1, bf16, sums);
}

// Weights of outputs c, ...
INLINE const char *block(const void *w, int64_t c, int64_t in, int bf16) {
  return (const char *)w + c / 16 * STEP * (bf16 ? (in + 1) / 2 : in) + c % 16 * 4;
}

static int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }

static int64_t ranks(const struct site *s) { return s->rank[0] + s->rank[1] + s->rank[2]; }

// Returns the number of groups. Rows of a full group's adapter open the next one, so that the
// latest group of an adapter is the only one with room.
static int64_t make_groups(const struct low_rank_args *a, struct group *groups, int64_t *most) {
  int64_t count = 0;
  for (int64_t row = 0; row < a->rows; row++) {
    if (!a->adapter[row]) continue;
    const struct site *site = (const struct site *)a->adapter[row] + a->site;
    if (!site->a) continue;
    int64_t g = count - 1;
    while (g >= 0 && groups[g].site != site) g--;
    if (g < 0 || groups[g].n == GROUP) {
      g = count++;
      groups[g] = (struct group){site, 0, {0}};
      *most = max64(*most, round16(ranks(site)));
    }
    groups[g].row[groups[g].n++] = row;
  }
  return count;
}

INLINE void row_pointers(const struct group *g, const void *base, int64_t width, int64_t first,
                         int bf16, const char **x) {
  for (int64_t i = 0; i < GROUP; i++)
    x[i] = at(base, g->row[i < g->n ? i : 0] * width + first, bf16);
}

// All ranks of a group's rows: `t`, rows x `most`.
INLINE void reduce(const struct low_rank_args *a, const struct group *g, void *t, int64_t most,
                   int bf16) {
  const char *x[GROUP];
  row_pointers(g, a->x, a->in, 0, bf16, x);
  const int64_t n = round16(ranks(g->site));
  for (int64_t c = 0; c < n; c += VL) {
    vf sums[GROUP];
    multiply_any(block(g->site->a, c, a->in, bf16), a->in, x, g->n, bf16, sums);
    for (int64_t i = 0; i < g->n; i++)
      store((char *)at(t, g->row[i] * most + c, bf16), sums[i], bf16);
  }
}

// Outputs `begin` .. of a part.
INLINE void expand(const struct low_rank_args *a, const struct group *g, const void *t,
                   int64_t most, int part, int64_t begin, int bf16, int y_bf16) {
  int64_t first_rank = 0, first = 0, width = 0;
  for (int p = 0; p < MAX_PARTS; p++) {
    width += a->width[p];
    if (p >= part) continue;
    first_rank += g->site->rank[p];
    first += a->width[p];
  }
  const char *ranks_of[GROUP];
  row_pointers(g, t, most, first_rank, bf16, ranks_of);
  const int64_t n = a->width[part], rank = g->site->rank[part];
  for (int64_t c = begin; c < min64(begin + CHUNK, n); c += VL) {
    vf sums[GROUP];
    multiply_any(block(g->site->b[part], c, rank, bf16), rank, ranks_of, g->n, bf16, sums);
    for (int64_t i = 0; i < g->n; i++) {
      void *y = (char *)at(a->y, g->row[i] * width + first, y_bf16);
      store_at(y, c, n, load_at(y, c, n, y_bf16) + sums[i], y_bf16);
    }
  }
}

struct job {
  const struct low_rank_args *a;
  const struct group *groups;
  void *t;
  int64_t most;
  int64_t chunks[MAX_PARTS], all;  // of outputs: in each part, in all
};

INLINE void reduce_groups(const struct job *job, int64_t begin, int64_t end, int bf16) {
  for (int64_t g = begin; g < end; g++)
    reduce(job->a, &job->groups[g], job->t, job->most, bf16);
}

INLINE void expand_groups(const struct job *job, int64_t begin, int64_t end, int bf16, int y_bf16) {
  for (int64_t i = begin; i < end; i++) {
    int part = 0;
    int64_t chunk = i % job->all;
    while (chunk >= job->chunks[part]) chunk -= job->chunks[part++];
    const struct group *g = &job->groups[i / job->all];
    if (g->site->rank[part])
      expand(job->a, g, job->t, job->most, part, chunk * CHUNK, bf16, y_bf16);
  }
}

static void reduce_some(void *what, int64_t begin, int64_t end) {
  const struct job *job = what;
  if (job->a->bf16)
    reduce_groups(job, begin, end, 1);
  else
    reduce_groups(job, begin, end, 0);
}

static void expand_some(void *what, int64_t begin, int64_t end) {
  const struct job *job = what;
  if (!job->a->bf16)
    expand_groups(job, begin, end, 0, 0);
  else if (job->a->y_bf16)
    expand_groups(job, begin, end, 1, 1);
  else
    expand_groups(job, begin, end, 1, 0);
}

EXPORT int tgis_low_rank(const struct low_rank_args *args) {
  const struct low_rank_args a = *args;
  struct group *groups = malloc(a.rows * sizeof *groups + 1);
  if (!groups) return ERROR_MEMORY;
  int64_t most = 0;
  const int64_t count = make_groups(&a, groups, &most);
  void *t = malloc(a.rows * most * 4 + 1);
  if (t && count) {
    struct job job = {&a, groups, t, most};
    for (int p = 0; p < MAX_PARTS; p++)
      job.all += job.chunks[p] = (a.width[p] + CHUNK - 1) / CHUNK;
    team_loop(count, 1, reduce_some, &job);
    team_loop(count * job.all, 4, expand_some, &job);
  }
  free(groups);
  free(t);
  return t ? 0 : ERROR_MEMORY;
}
