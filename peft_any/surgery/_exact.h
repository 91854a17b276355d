/* What _sums.c is given, and the sums of it that are formed in double precision, one by one. */

struct sums {
    const uint16_t *base;                /* (rows, n) */
    uint16_t *out;                       /* (rows, n) */
    const float *u, *panels;             /* (rows, k), (n / PANEL, k, PANEL) */
    const double *exact_u, *columns;     /* (rows, k), (n, b) */
    const float *bound;                  /* (rows,); (n / PANEL,) where turned, for W of length 1 */
    const float *gain;                   /* (rows,) */
    const double *exact_gain;            /* (rows,) */
    ptrdiff_t rows, n, k, b;
    int scaled, turned; /* turned: no u, but the k columns of W that a panel lies in, b of a block */
};

struct exact {
    const double *sums, *delta;          /* (size,); delta may be NULL */
    const uint16_t *base;                /* (size,) */
    uint16_t *out;                       /* (size,) */
    ptrdiff_t size;
};

struct moments {
    double base2, delta2, dot, miss2;
    int64_t same;
};

typedef double four_doubles __attribute__((vector_size(32)));
typedef float four_floats __attribute__((vector_size(16)));
typedef uint32_t four_words __attribute__((vector_size(16)));
typedef uint16_t four_halves __attribute__((vector_size(8)));

static inline float wide(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to odd first, so that the second rounding cannot go wrong: `odd` in rounding.py. */
static uint16_t nearest(double exact)
{
    const float single = (float)exact;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if ((double)single != exact) {
        const double a = single < 0 ? -(double)single : single, b = exact < 0 ? -exact : exact;
        bits = (bits - (a > b)) | 1;
    }
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Adds what became of one weight. */
static void measured(struct moments *m, double base, double moved, double delta)
{
    m->base2 += base * base;
    m->delta2 += delta * delta;
    m->dot += moved * delta;
    m->miss2 += (moved - delta) * (moved - delta);
    m->same += moved == 0;
}

/* One sum in double precision, in the order of sums.py: of every fourth product, then of the four.
   Products are rounded before they are added, as NumPy does. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
static double exact_sum(const struct sums *s, ptrdiff_t row, ptrdiff_t column)
{
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
    const double *u = s->turned ? NULL : s->exact_u + row * s->k;
    const double *v = s->columns + column * s->b;
    const uint16_t *w = s->base + row * s->n, *own = w + (s->turned ? column / s->b * s->b : 0);
    four_doubles part = {0}, left, right;
    ptrdiff_t t = 0;
    for (; t + 4 <= s->b; t += 4) {
        if (s->turned) {
            four_halves stored;
            memcpy(&stored, own + t, sizeof stored);
            const four_words bits = __builtin_convertvector(stored, four_words) << 16;
            left = __builtin_convertvector((four_floats)bits, four_doubles);
        } else
            memcpy(&left, u + t, sizeof left);
        memcpy(&right, v + t, sizeof right);
        part += left * right;
    }
    for (; t < s->b; t++)
        part[t % 4] += (s->turned ? wide(own[t]) : u[t]) * v[t];
    const double sum = wide(w[column]) + ((part[0] + part[1]) + (part[2] + part[3]));
    return s->scaled ? sum * s->exact_gain[row] : sum;
}

/* Forms a doubtful sum again, and corrects what was measured. */
static void settle(const struct sums *s, ptrdiff_t at, struct moments *m)
{
    const double exact = exact_sum(s, at / s->n, at % s->n);
    const double before = wide(s->base[at]), old = wide(s->out[at]);
    s->out[at] = nearest(exact);
    const double made = wide(s->out[at]);
    if (made == old)
        return;
    const double was = old - exact, now = made - exact;
    m->dot += (now - was) * (exact - before);
    m->miss2 += now * now - was * was;
    m->same += (made == before) - (old == before);
}

/* Settles the sums at `count` places, and leaves none: together, so that the processor computes
   several at a time. */
static void settle_all(const struct sums *s, const ptrdiff_t *at, int *count, struct moments *m)
{
    for (int i = 0; i < *count; i++)
        settle(s, at[i], m);
    *count = 0;
}

/* The columns that fill no panel, one by one. */
static void rest(const struct sums *s, struct moments *m)
{
    for (ptrdiff_t i = 0; i < s->rows; i++)
        for (ptrdiff_t j = s->n / PANEL * PANEL; j < s->n; j++) {
            const ptrdiff_t at = i * s->n + j;
            const double exact = exact_sum(s, i, j), before = wide(s->base[at]);
            s->out[at] = nearest(exact);
            const double delta = exact - before, miss = wide(s->out[at]) - exact;
            m->base2 += before * before;
            m->delta2 += s->scaled ? delta * delta : 0;
            m->dot += miss * delta;
            m->miss2 += miss * miss;
            m->same += s->out[at] == s->base[at];
        }
}
