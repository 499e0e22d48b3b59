/* The noise stream of seeds.py in C: MT19937 (Matsumoto, Nishimura 1998), of which most words are
   only stepped over, and -log1p(-u) where a sample is looked at. */

#include <math.h>
#include <stdint.h>

#define N 624
#define M 397
#define EXPORT __attribute__((visibility("default")))

/* A stream: the twister's words, then how many of them are spent. */
typedef struct {
    uint32_t words[N];
    uint32_t spent;
} stream;

static inline uint32_t mix(uint32_t high, uint32_t low, uint32_t far)
{
    uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return far ^ (y >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define VARIANTS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VARIANTS
#endif

VARIANTS static void twist(uint32_t *w)
{
    /* Each loop reads at least 227 words ahead of or behind what it writes: safe to vectorise. */
    for (int i = 0; i < N - M; i++)
        w[i] = mix(w[i], w[i + 1], w[i + M]);
#pragma GCC ivdep
    for (int i = N - M; i < N - 1; i++)
        w[i] = mix(w[i], w[i + 1], w[i + M - N]);
    w[N - 1] = mix(w[N - 1], w[0], w[M - 1]);
}

static inline uint32_t temper(uint32_t y)
{
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* Two words make a uniform number in [0, 1) of 53 bits. */
static inline double uniform(const uint32_t *w)
{
    uint64_t bits = (uint64_t)temper(w[0]) << 32 | temper(w[1]);
    return (double)(int64_t)(bits & ((1ull << 53) - 1)) * 0x1p-53;
}

static inline float exponential(double u)
{
    return (float)-log1p(-u);
}

/* Noise of `count` ascending ids of a row of `vocab` samples; a negative id ends them early. */
EXPORT void tgis_noise_at(stream *s, int64_t vocab, const int64_t *ids, int64_t count, float *noise)
{
    int64_t first = -(int64_t)s->spent; /* of the words held, counted from the row's first */
    for (int64_t i = 0; i < count && ids[i] >= 0; i++) {
        for (; 2 * ids[i] >= first + N; first += N)
            twist(s->words);
        noise[i] = exponential(uniform(s->words + (2 * ids[i] - first)));
    }
    for (; 2 * vocab > first + N; first += N)
        twist(s->words);
    s->spent = (uint32_t)(2 * vocab - first);
}

/* The uniform numbers of some pairs of words. */
VARIANTS static void uniforms(const uint32_t *w, int64_t count, double *u)
{
    for (int64_t i = 0; i < count; i++)
        u[i] = uniform(w + 2 * i);
}

/* The id of the highest probability / noise of a row, the lowest of equals. Noise is never less
   than its uniform number: where even that is too much, the logarithm is not taken. */
EXPORT int64_t tgis_noise_winner(stream *s, int64_t vocab, const float *probs)
{
    float best = -1.0f;
    double enough = -1.0; /* of probability / uniform number, to be looked at */
    int64_t winner = 0;
    for (int64_t i = 0; i < vocab;) {
        if (s->spent == N) {
            twist(s->words);
            s->spent = 0;
        }
        double u[N / 2];
        int64_t count = (N - s->spent) / 2 < vocab - i ? (N - s->spent) / 2 : vocab - i;
        uniforms(s->words + s->spent, count, u);
        s->spent += 2 * count;
        for (int64_t end = i + count, j = 0; i < end; i++, j++) {
            if (probs[i] < enough * u[j])
                continue;
            float ratio = probs[i] / exponential(u[j]);
            if (ratio > best) {
                best = ratio;
                enough = (1 - 1e-5) * ratio;
                winner = i;
            }
        }
    }
    return winner;
}
