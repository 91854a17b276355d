/* The pass of _sums.c, once for every kind of processor: TARGET, LANES and ROWS say which.

   Vectors are GCC's and Clang's own, so that one text serves all architectures. */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(flags) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

#define floats NAME(floats)
#define words NAME(words)
#define flags NAME(flags)
#define halves NAME(halves)

/* Adds what the lanes have summed to the doubles, and clears them. */
TARGET static inline void NAME(flush)(floats *lanes, double *sum)
{
    for (int i = 0; i < LANES; i++)
        *sum += (double)(*lanes)[i];
    *lanes = (floats){0};
}

/* `rows` rows of W + u·v from row `i` on, all but the columns that fill no panel. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const struct sums *s, ptrdiff_t i, const int rows, const int scaled, struct moments *m)
{
    const ptrdiff_t n = s->n, k = s->k;
    const floats zero = {0}, half = zero + (scaled ? HALF_PLACE - SCALED : HALF_PLACE - SUM);
    floats base2 = zero, delta2 = zero, dot = zero, miss2 = zero;
    flags same = {0};
    for (ptrdiff_t j = 0; j + PANEL <= n; j += PANEL) {
        const float *panel = s->panels + j * k;
        for (int c = 0; c < PANEL; c += 2 * LANES) {
            floats sum[ROWS][2];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                sum[r][0] = sum[r][1] = zero;
            for (ptrdiff_t t = 0; t < k; t++) {
                floats v0, v1;
                memcpy(&v0, panel + t * PANEL + c, sizeof v0);
                memcpy(&v1, panel + t * PANEL + c + LANES, sizeof v1);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const float u = s->u[(i + r) * k + t];
                    sum[r][0] += u * v0;
                    sum[r][1] += u * v1;
                }
            }
            flags doubtful[ROWS][2], some = {0};
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const ptrdiff_t at = (i + r) * n + j + c + h * LANES;
                    halves stored;
                    memcpy(&stored, s->base + at, sizeof stored);
                    const words before = __builtin_convertvector(stored, words);
                    const floats w = (floats)(before << 16);
                    floats delta = sum[r][h], total = w + delta;
                    float bound = s->bound[i + r];
                    if (scaled) {
                        const float gain = s->gain[i + r];
                        total *= gain;
                        delta = total - w;
                        delta2 += delta * delta;
                        bound *= gain < 0 ? -gain : gain;
                    }
                    const words bits = ((words)total + (1u << 15)) >> 16;
                    const floats miss = (floats)(bits << 16) - total;
                    const floats place = (floats)((words)total & EXPONENT);
                    const floats size = (floats)((words)miss & ~SIGN);
                    stored = __builtin_convertvector(bits, halves);
                    memcpy(s->out + at, &stored, sizeof stored);
                    base2 += w * w;
                    dot += miss * delta;
                    miss2 += miss * miss;
                    same -= (flags)(bits == before);
                    doubtful[r][h] = (flags)(size >= place * half - bound);
                    some |= doubtful[r][h];
                }
            if (any_of(&some, sizeof some))
                for (int r = 0; r < rows; r++)
                    for (int h = 0; h < 2; h++)
                        if (any_of(&doubtful[r][h], sizeof some))
                            for (int l = 0; l < LANES; l++)
                                if (doubtful[r][h][l])
                                    settle(s, i + r, j + c + h * LANES + l, m);
        }
        if (j / PANEL % 8 == 7 || j + 2 * PANEL > n) {
            NAME(flush)(&base2, &m->base2);
            NAME(flush)(&delta2, &m->delta2);
            NAME(flush)(&dot, &m->dot);
            NAME(flush)(&miss2, &m->miss2);
        }
    }
    for (int l = 0; l < LANES; l++)
        m->same += same[l];
}

TARGET static void NAME(pass)(const struct sums *s, struct moments *m)
{
    ptrdiff_t i = 0;
    for (; i + ROWS <= s->rows; i += ROWS)
        if (s->scaled)
            NAME(tile)(s, i, ROWS, 1, m);
        else
            NAME(tile)(s, i, ROWS, 0, m);
    for (; i < s->rows; i++)
        if (s->scaled)
            NAME(tile)(s, i, 1, 1, m);
        else
            NAME(tile)(s, i, 1, 0, m);
}

#undef floats
#undef words
#undef flags
#undef halves
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
