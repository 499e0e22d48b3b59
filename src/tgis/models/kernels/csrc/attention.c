// Attention over the row cache, for decode rows and prefill chunks in one batch.
//
// A query row is one query head of one new token; rows that share a KV head are worked on together,
// so that each key is read once for all of them.
//
// Few rows (decoding, and drafts behind it): tasks are (sequence, KV head, block of rows, split of SPLIT positions). A
// split's result is complete in itself: (max, sum, weighted values); where a sequence has several,
// they are combined afterwards in order (flash decoding, Dao et al. 2023). Splits lie at fixed
// positions, so a token's result depends neither on its neighbours in the batch, nor on those in
// its own sequence, nor on the number of threads.
// Many rows in bfloat16: tasks are (sequence, KV head, block of rows) on AMX tiles, where CPUs have
// them.

#include <stdlib.h>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "team.h"

struct task {
  int32_t seq, kv_head, row, split;
};

struct plan {
  int64_t num_tasks, num_packs, num_partials, vt_size;
  struct task *tasks;  // those of tiles first: they are the longest
  struct task *packs;  // V^T: `row` is the first position
  int64_t *scratch;    // per sequence: where its partial results, or its V^T, begin
};

INLINE int64_t num_splits(int64_t kv_len) { return max64(1, (kv_len + SPLIT - 1) / SPLIT); }

INLINE int64_t num_rows(const struct attention_args *a, int64_t seq) {
  return (a->q_start[seq + 1] - a->q_start[seq]) * (a->heads / a->kv_heads);
}

#ifdef HAVE_TILES
#define PACK_POSITIONS 256  // of a packing task

INLINE int on_tiles(const struct attention_args *a, int64_t seq) {
  return a->bf16 && a->head_dim % 2 == 0 && a->scale > 0 && a->kv_len[seq] > 0 &&
         a->q_start[seq + 1] - a->q_start[seq] > FEW_TOKENS && tgis_amx(NULL);
}

INLINE int64_t vt_head(const struct attention_args *a, int64_t seq) {
  return (a->kv_len[seq] + 31) / 32 * VT_BLOCK(a->head_dim);
}

static void plan_tiles(const struct attention_args *a, struct plan *p, int64_t s) {
  if (p->tasks) p->scratch[s] = p->vt_size;
  p->vt_size += a->kv_heads * vt_head(a, s);
  for (int64_t h = 0; h < a->kv_heads; h++) {
    for (int64_t j = 0; j < a->kv_len[s]; j += PACK_POSITIONS, p->num_packs++)
      if (p->tasks) p->packs[p->num_packs] = (struct task){s, h, j, 0};
    for (int64_t r = (num_rows(a, s) - 1) / TILE_ROWS * TILE_ROWS; r >= 0; r -= TILE_ROWS)
      if (p->tasks)
        p->tasks[p->num_tasks++] = (struct task){s, h, r, 0};
      else
        p->num_tasks++;
  }
}

static void pack(const struct attention_args *a, const struct plan *p, struct task t,
                 uint16_t *vt) {
  const int64_t d = a->head_dim, end = min64(t.row + PACK_POSITIONS, a->kv_len[t.seq]);
  const uint16_t *v =
      (const uint16_t *)a->v + a->slot[t.seq] * a->slot_stride + t.kv_head * a->head_stride;
  vt += p->scratch[t.seq] + t.kv_head * vt_head(a, t.seq);
  for (int64_t j = t.row; j < end; j += 32)
    pack_values(v + j * d, min64(32, end - j), d, vt + j / 32 * VT_BLOCK(d));
}
#else
#define on_tiles(a, seq) 0
#define plan_tiles(a, p, seq) (void)(a)
#endif

static void plan_rows(const struct attention_args *a, struct plan *p, int64_t s) {
  const int64_t splits = num_splits(a->kv_len[s]), rows = num_rows(a, s);
  if (p->tasks) p->scratch[s] = p->num_partials;
  if (splits > 1) p->num_partials += rows * a->kv_heads * splits;
  for (int64_t h = 0; h < a->kv_heads; h++)
    for (int64_t r = 0; r < rows; r += block_rows(a))
      for (int64_t i = 0; i < splits; i++, p->num_tasks++)
        if (p->tasks) p->tasks[p->num_tasks] = (struct task){s, h, r, i};
}

// Counts, and where p->tasks is not null also fills in.
static void make_plan(const struct attention_args *a, struct plan *p) {
  p->num_tasks = p->num_packs = p->num_partials = p->vt_size = 0;
  for (int64_t s = 0; s < a->seqs; s++)
    if (on_tiles(a, s)) plan_tiles(a, p, s);
  for (int64_t s = 0; s < a->seqs; s++)
    if (!on_tiles(a, s)) plan_rows(a, p, s);
}

static void combine(const struct attention_args *a, int64_t row, const float *partial,
                    int64_t splits) {
  const int64_t d = a->head_dim, size = PARTIAL(d);
  float max = -INFINITY, total = 0, out[MAX_HEAD_DIM] = {0};
  for (int64_t i = 0; i < splits; i++) max = fmaxf(max, partial[i * size]);
  for (int64_t i = 0; i < splits; i++) {
    const float *p = partial + i * size;
    if (p[1] == 0) continue;
    const float weight = expf(p[0] - max);
    total += weight * p[1];
    for (int64_t j = 0; j < d; j++) out[j] += weight * p[2 + j];
  }
  const float scale = total > 0 ? 1.0f / total : 0.0f;
  void *to = (char *)at(a->out, row * d, a->bf16);
  for (int64_t j = 0; j < d; j += VL) store_at(to, j, d, load_at(out, j, d, 0) * scale, a->bf16);
}

// All heads of one new token.
static void combine_token(const struct attention_args *a, const struct plan *p, int64_t token,
                          const float *partials) {
  int64_t s = 0;
  while (a->q_start[s + 1] <= token) s++;
  const int64_t splits = num_splits(a->kv_len[s]), size = PARTIAL(a->head_dim);
  if (splits == 1 || on_tiles(a, s)) return;
  for (int64_t h = 0; h < a->heads; h++) {
    const int64_t row = (token - a->q_start[s]) * a->heads + h;
    combine(a, token * a->heads + h, partials + (p->scratch[s] + row * splits) * size, splits);
  }
}

struct job {
  const struct attention_args *a;
  const struct plan *p;
  float *partials;
  uint16_t *vt;
};

#ifdef HAVE_TILES
static void packs(void *what, int64_t begin, int64_t end) {
  const struct job *job = what;
  for (int64_t i = begin; i < end; i++) pack(job->a, job->p, job->p->packs[i], job->vt);
}
#endif

static void tasks(void *what, int64_t begin, int64_t end) {
  const struct job *job = what;
  const struct attention_args *a = job->a;
  const struct plan *p = job->p;
  for (int64_t i = begin; i < end; i++) {
    const struct task t = p->tasks[i];
#ifdef HAVE_TILES
    if (on_tiles(a, t.seq)) {
      const int64_t head = p->scratch[t.seq] + t.kv_head * vt_head(a, t.seq);
      configure_attention(a->head_dim);
      attend_tiles(a, t.seq, t.kv_head, t.row, job->vt + head);
      continue;
    }
#endif
    const int64_t splits = num_splits(a->kv_len[t.seq]);
    float *to = splits > 1 ? job->partials + p->scratch[t.seq] * PARTIAL(a->head_dim) : NULL;
    attend(a, t.seq, t.kv_head, t.row, t.split, splits, to);
  }
#ifdef HAVE_TILES
  if (few_on_tiles(a)) _tile_release();
#endif
}

static void tokens(void *what, int64_t begin, int64_t end) {
  const struct job *job = what;
  for (int64_t token = begin; token < end; token++)
    combine_token(job->a, job->p, token, job->partials);
}

static void run(const struct attention_args *a, const struct plan *p, float *partials,
                uint16_t *vt) {
  struct job job = {a, p, partials, vt};
#ifdef HAVE_TILES
  team_loop(p->num_packs, 1, packs, &job);
#endif
  team_loop(p->num_tasks, 1, tasks, &job);
  if (p->num_partials) team_loop(a->tokens, 1, tokens, &job);
}

static int valid(const struct attention_args *a) {
  if (a->q_start[0] != 0 || a->q_start[a->seqs] != a->tokens) return 0;
  for (int64_t s = 0; s < a->seqs; s++) {
    const int64_t q_len = a->q_start[s + 1] - a->q_start[s];
    if (a->slot[s] < 0 || a->slot[s] >= a->slots) return 0;
    if (a->kv_len[s] < 0 || a->kv_len[s] > a->slot_tokens) return 0;
    if (q_len < 0 || (a->causal && q_len > a->kv_len[s])) return 0;
  }
  return 1;
}

// Returns 0, ERROR_INDEX where lengths or slots lie outside the tensors, or ERROR_MEMORY.
EXPORT int tgis_attention(const struct attention_args *args) {
  const struct attention_args a = *args;
  if (!valid(&a)) return ERROR_INDEX;
  struct plan p = {0};
  make_plan(&a, &p);
  const int64_t tasks = p.num_tasks + p.num_packs;
  p.scratch = malloc(tasks * sizeof *p.tasks + a.seqs * sizeof *p.scratch + 1);
  float *partials = malloc(p.num_partials * PARTIAL(a.head_dim) * sizeof *partials + 1);
  uint16_t *vt = malloc(p.vt_size * sizeof *vt + 1);
  const int complete = p.scratch && partials && vt;
  if (complete) {
    p.tasks = (struct task *)(p.scratch + a.seqs);
    p.packs = p.tasks + p.num_tasks;
    make_plan(&a, &p);
    run(&a, &p, partials, vt);
  }
  free(p.scratch);
  free(partials);
  free(vt);
  return complete ? 0 : ERROR_MEMORY;
}
