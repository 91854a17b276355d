/* The pass of _sums.c, once for every kind of processor: TARGET, LANES and ROWS say which, and
   REACHED in which lanes one number is not less than another, as bits.

   Vectors are GCC's and Clang's own, so that one text serves all architectures. */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(flags) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

/* Half as many lanes, of twice the size, and what they are converted to and from. */
typedef double NAME(doubles) __attribute__((vector_size(4 * LANES)));
typedef int64_t NAME(longs) __attribute__((vector_size(4 * LANES)));
typedef float NAME(singles) __attribute__((vector_size(2 * LANES)));
typedef uint32_t NAME(bits32) __attribute__((vector_size(2 * LANES)));
typedef int32_t NAME(marks) __attribute__((vector_size(2 * LANES)));
typedef uint16_t NAME(bits16) __attribute__((vector_size(LANES)));

#define floats NAME(floats)
#define words NAME(words)
#define flags NAME(flags)
#define halves NAME(halves)
#define doubles NAME(doubles)
#define longs NAME(longs)
#define bits16 NAME(bits16)
#define marks NAME(marks)
#define bits32 NAME(bits32)
#define singles NAME(singles)

/* Adds what the lanes have summed to the doubles, and clears them. */
TARGET static inline void NAME(flush)(floats *lanes, double *sum)
{
    for (int i = 0; i < LANES; i++)
        *sum += (double)(*lanes)[i];
    *lanes = (floats){0};
}

/* Widens k columns of a row; gives no less than their length, but for rounding. */
TARGET static inline __attribute__((always_inline)) float NAME(spread)(
    const uint16_t *from, ptrdiff_t k, float *to)
{
    floats squares = {0};
    for (ptrdiff_t t = 0; t < k; t += LANES) {
        halves stored;
        memcpy(&stored, from + t, sizeof stored);
        const floats w = (floats)(WIDE(stored) << 16);
        squares += w * w;
        memcpy(to + t, &w, sizeof w);
    }
    float all[LANES];
    memcpy(all, &squares, sizeof all);
    for (int some = LANES / 2; some; some /= 2)
        for (int l = 0; l < some; l++)
            all[l] += all[l + some];
    return root(all[0]);
}

/* `rows` rows of W + Δ from row `i` on, all but the columns that fill no panel. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const struct sums *s, ptrdiff_t i, const int rows, const int scaled, const int turned,
    struct moments *m)
{
    const ptrdiff_t n = s->n, k = s->k;
    const uint16_t *const base = s->base;
    uint16_t *const out = s->out;
    const floats zero = {0}, half = zero + (scaled ? HALF_PLACE - SCALED : HALF_PLACE - SUM);
    floats base2 = zero, delta2 = zero, dot = zero, miss2 = zero;
    flags same = {0};
    ptrdiff_t doubtful[WAITING + 2 * ROWS * LANES];
    float own[ROWS * WIDEST], length[ROWS] = {0};
    const float *const u = turned ? own : s->u + i * k;
    int count = 0;
    for (ptrdiff_t j = 0; j + PANEL <= n; j += PANEL) {
        const float *panel = s->panels + j * k;
        if (turned && j % k == 0)
            for (int r = 0; r < rows; r++)
                length[r] = NAME(spread)(base + (i + r) * n + j, k, own + r * k);
        for (int c = 0; c < PANEL; c += 2 * LANES) {
            floats sum[ROWS][2];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                sum[r][0] = sum[r][1] = zero;
            for (ptrdiff_t t = 0; t < k;) {
                const ptrdiff_t stop = turned && t + CHUNK < k ? t + CHUNK : k;
                floats part[ROWS][2];
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    part[r][0] = part[r][1] = zero;
                for (; t < stop; t++) {
                    floats v0, v1;
                    memcpy(&v0, panel + t * PANEL + c, sizeof v0);
                    memcpy(&v1, panel + t * PANEL + c + LANES, sizeof v1);
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) {
                        const float factor = u[r * k + t];
                        part[r][0] += factor * v0;
                        part[r][1] += factor * v1;
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    sum[r][0] += part[r][0];
                    sum[r][1] += part[r][1];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
            {
                const float gain = scaled ? s->gain[i + r] : 1;
                const float off = turned ? s->bound[j / PANEL] * length[r] + TINY : s->bound[i + r];
                const float bound = off * (gain < 0 ? -gain : gain);
                const ptrdiff_t start = (i + r) * n + j + c;
                unsigned set = 0;
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const ptrdiff_t at = start + h * LANES;
                    halves stored;
                    memcpy(&stored, base + at, sizeof stored);
                    const words before = WIDE(stored) << 16;
                    const floats w = (floats)before;
                    floats delta = sum[r][h], total = w + delta;
                    if (scaled) {
                        total *= gain;
                        delta = total - w;
                    }
                    if (scaled || turned)
                        delta2 += delta * delta;
                    const words near = ((words)total + (1u << 15)) & 0xFFFF0000u;
                    const floats miss = (floats)near - total;
                    const floats place = (floats)((words)total & EXPONENT);
                    const floats size = (floats)((words)miss & ~SIGN);
                    stored = __builtin_convertvector(near >> 16, halves);
                    memcpy(out + at, &stored, sizeof stored);
                    base2 += w * w;
                    dot += miss * delta;
                    miss2 += miss * miss;
                    same -= (flags)(near == before);
                    set |= REACHED(size, place * half - bound) << h * LANES;
                }
                for (; set; set &= set - 1)
                    doubtful[count++] = start + __builtin_ctz(set);
            }
            if (count >= WAITING)
                settle_all(s, doubtful, &count, m);
        }
        if (j / PANEL % 8 == 7 || j + 2 * PANEL > n) {
            NAME(flush)(&base2, &m->base2);
            NAME(flush)(&delta2, &m->delta2);
            NAME(flush)(&dot, &m->dot);
            NAME(flush)(&miss2, &m->miss2);
        }
    }
    settle_all(s, doubtful, &count, m);
    for (int l = 0; l < LANES; l++)
        m->same += same[l];
}

/* Rounds sums in double precision, all but the last few, and measures them against `delta`, or
   against what they are more than the base where that is NULL. */
TARGET static ptrdiff_t NAME(nearest)(const struct exact *e, struct moments *m)
{
    ptrdiff_t i = 0;
    doubles base2 = {0}, delta2 = {0}, dot = {0}, miss2 = {0};
    marks same = {0};
    for (; i + LANES / 2 <= e->size; i += LANES / 2) {
        bits16 stored;
        doubles exact, delta;
        memcpy(&stored, e->base + i, sizeof stored);
        memcpy(&exact, e->sums + i, sizeof exact);
        const bits32 before = __builtin_convertvector(stored, bits32) << 16;
        const doubles w = __builtin_convertvector((singles)before, doubles);
        const singles single = __builtin_convertvector(exact, singles);
        const doubles back = __builtin_convertvector(single, doubles);
        /* To odd: a step towards zero where it went away from it, and the last bit where cut. */
        const doubles off = back - exact;
        const marks away = __builtin_convertvector(
            (off != 0) & (((longs)off ^ (longs)exact) >= 0), marks);
        const marks cut = __builtin_convertvector(back != exact, marks);
        bits32 bits = ((bits32)single + (bits32)away) | ((bits32)cut & 1);
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        stored = __builtin_convertvector(bits, bits16);
        memcpy(e->out + i, &stored, sizeof stored);
        const doubles made = __builtin_convertvector((singles)(bits << 16), doubles);
        if (e->delta)
            memcpy(&delta, e->delta + i, sizeof delta);
        else
            delta = exact - w;
        const doubles moved = made - w, miss = moved - delta;
        base2 += w * w;
        delta2 += delta * delta;
        dot += moved * delta;
        miss2 += miss * miss;
        same -= __builtin_convertvector(moved == 0, marks);
    }
    for (int l = 0; l < LANES / 2; l++) {
        m->base2 += base2[l], m->delta2 += delta2[l], m->dot += dot[l], m->miss2 += miss2[l];
        m->same += same[l];
    }
    return i;
}

/* The same, of one of four kinds, each of which is compiled apart. */
TARGET static inline __attribute__((always_inline)) void NAME(some)(
    const struct sums *s, ptrdiff_t i, const int rows, struct moments *m)
{
    if (s->turned && s->scaled)
        NAME(tile)(s, i, rows, 1, 1, m);
    else if (s->turned)
        NAME(tile)(s, i, rows, 0, 1, m);
    else if (s->scaled)
        NAME(tile)(s, i, rows, 1, 0, m);
    else
        NAME(tile)(s, i, rows, 0, 0, m);
}

TARGET static void NAME(pass)(const struct sums *s, struct moments *m)
{
    ptrdiff_t i = 0;
    for (; i + ROWS <= s->rows; i += ROWS)
        NAME(some)(s, i, ROWS, m);
    for (; i < s->rows; i++)
        NAME(some)(s, i, 1, m);
}

#undef floats
#undef words
#undef flags
#undef halves
#undef doubles
#undef longs
#undef bits16
#undef marks
#undef bits32
#undef singles
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef REACHED
#undef WIDE
