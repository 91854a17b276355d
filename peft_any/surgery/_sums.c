/* One pass over bfloat16 weights: W + Δ, or g ⊙ (W + Δ), rounded once, and what that did, where Δ
   is u·v, or W·v with v of blocks along a diagonal.

   surgery/sums.py says the same in NumPy, with added.py and turned.py, and what each number is
   for; where no compiler was there, it is what runs. Its merged weights are these, bit for bit. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 32 /* columns that stand together in `panels` */
#define WIDEST 512 /* the most rows of a block that W is multiplied by */
#define WAITING 256 /* doubtful sums from which they are settled */
#define HALF_PLACE 0x1p-8f
#define SUM 0x1p-22f
#define SCALED 0x1p-20f
#define TINY 0x1p-100f
#define EXPONENT 0x7F800000u
#define SIGN 0x80000000u

struct sums {
    const uint16_t *base;                /* (rows, n) */
    uint16_t *out;                       /* (rows, n) */
    const float *u, *panels;             /* (rows, k), (n / PANEL, k, PANEL) */
    const double *exact_u, *columns;     /* (rows, k), (n, b) */
    const float *bound;                  /* (rows,); (n / PANEL,) where turned, of |W| */
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

/* One sum in double precision, in the order of sums.py. */
static double exact_sum(const struct sums *s, ptrdiff_t row, ptrdiff_t column)
{
    const double *u = s->exact_u + row * s->k, *v = s->columns + column * s->b;
    const uint16_t *w = s->base + row * s->n;
    double product = 0;
    for (ptrdiff_t t = 0; t < s->b; t++)
        product += (s->turned ? wide(w[column / s->b * s->b + t]) : u[t]) * v[t];
    const double sum = wide(w[column]) + product;
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

static inline unsigned four_signs(const void *mask)
{
    uint64_t two[2];
    memcpy(two, mask, sizeof two);
    if (!(two[0] | two[1]))
        return 0;
    return (two[0] >> 31 & 1) | (two[0] >> 62 & 2) | (two[1] >> 29 & 4) | (two[1] >> 60 & 8);
}

#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 4
#define WIDE(stored) __builtin_convertvector(stored, words)
#define REACHED(a, b) four_signs(&(const flags[1]){(a) >= (b)})
#include "_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#define WIDE(stored) __builtin_convertvector(stored, words)
#define REACHED(a, b) (unsigned)_mm256_movemask_ps((__m256)((a) >= (b)))
#include "_tile.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LANES 16
#define ROWS 8
#define WIDE(stored) (words)_mm512_cvtepu16_epi32((__m256i)(stored))
#define REACHED(a, b) (unsigned)_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GE_OS)
#include "_tile.h"
#endif

struct level {
    const char *name;
    void (*pass)(const struct sums *, struct moments *);
    ptrdiff_t (*nearest)(const struct exact *, struct moments *);
};

#define MOST 3

/* The levels that this processor can run, the quickest last. */
static int levels_here(struct level *found)
{
    int count = 0;
    found[count++] = (struct level){"plain", pass_plain, nearest_plain};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found[count++] = (struct level){"avx2", pass_avx2, nearest_avx2};
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found[count++] = (struct level){"avx512", pass_avx512, nearest_avx512};
    }
#endif
    return count;
}

static PyObject *levels(PyObject *self, PyObject *nothing)
{
    (void)self, (void)nothing;
    struct level found[MOST];
    const int count = levels_here(found);
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *name = PyUnicode_FromString(found[i].name);
        if (!name || PyList_SetItem(list, i, name) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* Finds the level called `name`; 0 and an error where there is none. */
static int find(const char *name, struct level *level)
{
    struct level found[MOST];
    for (int i = levels_here(found) - 1; i >= 0; i--)
        if (!strcmp(name, found[i].name)) {
            *level = found[i];
            return 1;
        }
    PyErr_Format(PyExc_ValueError, "%s: no such pass on this processor", name);
    return 0;
}

/* Takes the buffers of `count` objects, of which the one at `out` is written to and None is left
   out; gives 0 and an error, with none held, where that fails. */
static int hold(PyObject *const *given, Py_buffer *views, int count, int out)
{
    for (int i = 0; i < count; i++) {
        const int flags = PyBUF_C_CONTIGUOUS | (i == out ? PyBUF_WRITABLE : 0);
        memset(&views[i], 0, sizeof views[i]);
        if (given[i] != Py_None && PyObject_GetBuffer(given[i], &views[i], flags) < 0) {
            while (i--)
                PyBuffer_Release(&views[i]);
            return 0;
        }
    }
    return 1;
}

/* Lets the buffers go; gives what was measured, or an error where they were no good. */
static PyObject *told(Py_buffer *views, int count, const struct moments *m, int fine)
{
    while (count--)
        PyBuffer_Release(&views[count]);
    if (!fine) {
        PyErr_SetString(PyExc_ValueError, "these arrays do not belong together");
        return NULL;
    }
    return Py_BuildValue("ddddL", m->base2, m->delta2, m->dot, m->miss2, (long long)m->same);
}

static PyObject *add(PyObject *self, PyObject *args)
{
    (void)self;
    enum { BASE, OUT, U, PANELS, EXACT_U, COLUMNS, BOUND, GAIN, EXACT_GAIN, COUNT };
    const char *name;
    struct level level;
    PyObject *given[COUNT];
    Py_buffer of[COUNT];
    if (!PyArg_ParseTuple(args, "sOOOOOOOOO:add", &name, &given[BASE], &given[OUT], &given[U],
                          &given[PANELS], &given[EXACT_U], &given[COLUMNS], &given[BOUND],
                          &given[GAIN], &given[EXACT_GAIN]) ||
        !find(name, &level) || !hold(given, of, COUNT, OUT))
        return NULL;

    struct sums s = {.scaled = given[GAIN] != Py_None, .turned = given[U] == Py_None};
    if (s.turned) {
        s.n = of[BOUND].len / 4 * PANEL;
        s.rows = s.n ? of[BASE].len / 2 / s.n : 0;
        s.k = s.n ? of[PANELS].len / 4 / s.n : 0;
        s.b = s.n ? of[COLUMNS].len / 8 / s.n : 0;
    } else {
        s.rows = of[BOUND].len / 4;
        s.n = s.rows ? of[BASE].len / 2 / s.rows : 0;
        s.k = s.b = s.rows ? of[U].len / 4 / s.rows : 0;
    }
    s.base = of[BASE].buf, s.out = of[OUT].buf, s.u = of[U].buf, s.panels = of[PANELS].buf;
    s.exact_u = of[EXACT_U].buf, s.columns = of[COLUMNS].buf, s.bound = of[BOUND].buf;
    s.gain = of[GAIN].buf, s.exact_gain = of[EXACT_GAIN].buf;
    const int fine =
        of[BASE].len == 2 * s.rows * s.n && of[OUT].len == of[BASE].len &&
        of[EXACT_U].len == 2 * of[U].len && (s.turned || of[U].len == 4 * s.rows * s.k) &&
        of[PANELS].len == 4 * (s.n / PANEL * PANEL) * s.k && of[COLUMNS].len == 8 * s.n * s.b &&
        (!s.turned || (s.b && s.k && s.k <= WIDEST && !(s.k % PANEL || s.k % s.b || s.n % s.k))) &&
        of[GAIN].len == (s.scaled ? 4 * s.rows : 0) && of[EXACT_GAIN].len == 2 * of[GAIN].len;
    struct moments m = {0};
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        level.pass(&s, &m);
        rest(&s, &m);
        Py_END_ALLOW_THREADS
    }
    return told(of, COUNT, &m, fine);
}

static PyObject *round_sums(PyObject *self, PyObject *args)
{
    (void)self;
    enum { BASE, OUT, SUMS, DELTA, COUNT };
    const char *name;
    struct level level;
    PyObject *given[COUNT];
    Py_buffer of[COUNT];
    if (!PyArg_ParseTuple(args, "sOOOO:round", &name, &given[BASE], &given[OUT], &given[SUMS],
                          &given[DELTA]) ||
        !find(name, &level) || !hold(given, of, COUNT, OUT))
        return NULL;

    struct exact e = {of[SUMS].buf, of[DELTA].buf, of[BASE].buf, of[OUT].buf, of[BASE].len / 2};
    const int fine = of[OUT].len == of[BASE].len && of[SUMS].len == 4 * of[BASE].len &&
                     (given[DELTA] == Py_None || of[DELTA].len == of[SUMS].len);
    struct moments m = {0};
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        for (ptrdiff_t i = level.nearest(&e, &m); i < e.size; i++) {
            const double w = wide(e.base[i]), delta = e.delta ? e.delta[i] : e.sums[i] - w;
            e.out[i] = nearest(e.sums[i]);
            measured(&m, w, wide(e.out[i]) - w, delta);
        }
        Py_END_ALLOW_THREADS
    }
    return told(of, COUNT, &m, fine);
}

static PyMethodDef functions[] = {
    {"levels", levels, METH_NOARGS, "Name the passes that this processor can run."},
    {"add", add, METH_VARARGS,
     "Add a product and round: (level, base, out, u, panels, exact_u, columns, bound, gain, "
     "exact_gain) gives (base2, delta2, dot, miss2, same); dot without the product's own. "
     "Without u, the base is multiplied by blocks."},
    {"round", round_sums, METH_VARARGS,
     "Round sums in double precision: (level, base, out, sums, delta or None) gives (base2, "
     "delta2, dot, miss2, same)."},
    {0},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sums", "One pass over bfloat16 weights.", 0, functions,
};

PyMODINIT_FUNC PyInit__sums(void)
{
    return PyModuleDef_Init(&module);
}
