// Attention over the row cache, for decode rows and short prefill chunks.
//
// Work is cut into tasks (sequence, KV head, block of query rows, split of SPLIT positions). A query
// row is one query head of one new token; the rows of a block share a KV head, so each key is read
// once for all of them. A split's result is complete in itself: (max, sum, weighted values); where a
// sequence has several, they are combined afterwards in order (flash decoding, Dao et al. 2023).
// Splits lie at fixed positions, so a sequence's result does not depend on its neighbours in the
// batch or on the number of threads.

#include <stdlib.h>

#include "attention_rows.h"

struct task {
  int32_t seq, kv_head, row, split;
};

INLINE int64_t num_splits(int64_t kv_len) { return max64(1, (kv_len + SPLIT - 1) / SPLIT); }

// Fills `tasks` (or only counts, where null) and, per sequence, where its partial results begin.
static int64_t make_tasks(const struct attention_args *a, struct task *tasks, int64_t *partial,
                          int64_t *num_partial) {
  const int64_t group = a->heads / a->kv_heads;
  int64_t count = 0, partials = 0;
  for (int64_t s = 0; s < a->seqs; s++) {
    const int64_t q_len = a->q_start[s + 1] - a->q_start[s], rows = q_len * group;
    const int64_t splits = num_splits(a->kv_len[s]);
    if (tasks) partial[s] = partials;
    if (splits > 1) partials += q_len * a->heads * splits;
    for (int64_t h = 0; h < a->kv_heads; h++)
      for (int64_t r = 0; r < rows; r += MAX_ROWS)
        for (int64_t i = 0; i < splits; i++, count++)
          if (tasks) tasks[count] = (struct task){s, h, r, i};
  }
  *num_partial = partials;
  return count;
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

static int valid(const struct attention_args *a) {
  if (a->seqs && a->q_start[0] != 0) return 0;
  for (int64_t s = 0; s < a->seqs; s++) {
    const int64_t q_len = a->q_start[s + 1] - a->q_start[s];
    if (a->slot[s] < 0 || a->slot[s] >= a->slots) return 0;
    if (a->kv_len[s] < 0 || a->kv_len[s] > a->slot_tokens) return 0;
    if (q_len < 0 || (a->causal && q_len > a->kv_len[s])) return 0;
  }
  return a->q_start[a->seqs] == a->tokens;
}

// Returns 0, ERROR_INDEX where lengths or slots lie outside the tensors, or ERROR_MEMORY.
EXPORT int tgis_attention(const struct attention_args *args) {
  const struct attention_args a = *args;
  if (!valid(&a)) return ERROR_INDEX;
  int64_t num_partial;
  const int64_t count = make_tasks(&a, NULL, NULL, &num_partial);
  struct task *tasks = malloc(count * sizeof *tasks + a.seqs * sizeof(int64_t));
  float *partials = num_partial ? malloc(num_partial * PARTIAL(a.head_dim) * 4) : NULL;
  if (!tasks || (num_partial && !partials)) {
    free(tasks);
    free(partials);
    return ERROR_MEMORY;
  }
  int64_t *partial = (int64_t *)(tasks + count);
  make_tasks(&a, tasks, partial, &num_partial);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      const struct task t = tasks[i];
      const int64_t splits = num_splits(a.kv_len[t.seq]);
      float *to = splits > 1 ? partials + partial[t.seq] * PARTIAL(a.head_dim) : NULL;
      attend(&a, t.seq, t.kv_head, t.row, t.split, splits, to);
    }
    if (num_partial) {
#pragma omp for schedule(dynamic, 16)
      for (int64_t i = 0; i < a.tokens * a.heads; i++) {
        int64_t s = 0, token = i / a.heads;
        while (a.q_start[s + 1] <= token) s++;
        const int64_t splits = num_splits(a.kv_len[s]);
        const int64_t row = i - a.q_start[s] * a.heads;
        if (splits > 1)
          combine(&a, i, partials + (partial[s] + row * splits) * PARTIAL(a.head_dim), splits);
      }
    }
  }
  free(tasks);
  free(partials);
  return 0;
}
