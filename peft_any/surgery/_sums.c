/* One pass over bfloat16 weights: W + u·v, or g ⊙ (W + u·v), rounded once, and what that did.

   surgery/sums.py says the same in NumPy, and what each number is for; where no compiler was
   there, it is what runs. Its merged weights are these, bit for bit. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 32 /* columns that stand together in `panels` */
#define HALF_PLACE 0x1p-8f
#define SUM 0x1p-22f
#define SCALED 0x1p-20f
#define EXPONENT 0x7F800000u
#define SIGN 0x80000000u

struct sums {
    const uint16_t *base;                /* (rows, n) */
    uint16_t *out;                       /* (rows, n) */
    const float *u, *panels;             /* (rows, k), (n / PANEL, k, PANEL) */
    const double *exact_u, *columns;     /* (rows, k), (n, k) */
    const float *bound, *gain;           /* (rows,) */
    const double *exact_gain;            /* (rows,) */
    ptrdiff_t rows, n, k;
    int scaled;
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

/* One sum in double precision, in the order of sums.py. */
static double exact_sum(const struct sums *s, ptrdiff_t row, ptrdiff_t column)
{
    const double *u = s->exact_u + row * s->k, *v = s->columns + column * s->k;
    double product = 0;
    for (ptrdiff_t t = 0; t < s->k; t++) {
        const volatile double next = u[t] * v[t]; /* volatile: not fused with the sum */
        product += next;
    }
    const double sum = wide(s->base[row * s->n + column]) + product;
    return s->scaled ? sum * s->exact_gain[row] : sum;
}

/* Forms a doubtful sum again, and corrects what was measured. */
static void settle(const struct sums *s, ptrdiff_t row, ptrdiff_t column, struct moments *m)
{
    const ptrdiff_t at = row * s->n + column;
    const double exact = exact_sum(s, row, column);
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

static inline int any_of(const void *mask, size_t size)
{
    uint64_t some = 0, part;
    for (size_t i = 0; i < size; i += sizeof part) {
        memcpy(&part, (const char *)mask + i, sizeof part);
        some |= part;
    }
    return some != 0;
}

#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 4
#include "_tile.h"

#if defined(__x86_64__)
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#include "_tile.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LANES 16
#define ROWS 8
#include "_tile.h"
#endif

typedef void (*pass)(const struct sums *, struct moments *);

/* The passes that this processor can run, the quickest last. */
static int passes(const char **names, pass *found)
{
    int count = 0;
    names[count] = "plain", found[count++] = pass_plain;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        names[count] = "avx2", found[count++] = pass_avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            names[count] = "avx512", found[count++] = pass_avx512;
    }
#endif
    return count;
}

#define MOST 3

static PyObject *levels(PyObject *self, PyObject *nothing)
{
    (void)self, (void)nothing;
    const char *names[MOST];
    pass found[MOST];
    const int count = passes(names, found);
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_SetItem(list, i, name) < 0)
            Py_CLEAR(list);
    }
    return list;
}

enum { BASE, OUT, U, PANELS, EXACT_U, COLUMNS, BOUND, GAIN, EXACT_GAIN, BUFFERS };

static PyObject *add(PyObject *self, PyObject *args)
{
    (void)self;
    const char *names[MOST], *level;
    pass found[MOST], chosen = NULL;
    PyObject *given[BUFFERS];
    if (!PyArg_ParseTuple(args, "sOOOOOOOOO:add", &level, &given[BASE], &given[OUT], &given[U],
                          &given[PANELS], &given[EXACT_U], &given[COLUMNS], &given[BOUND],
                          &given[GAIN], &given[EXACT_GAIN]))
        return NULL;
    for (int i = passes(names, found) - 1; i >= 0; i--)
        if (!strcmp(level, names[i]))
            chosen = found[i];
    if (!chosen)
        return PyErr_Format(PyExc_ValueError, "%s: no such pass on this processor", level);

    const int scaled = given[GAIN] != Py_None;
    Py_buffer views[BUFFERS];
    int held = 0;
    for (; held < (scaled ? BUFFERS : GAIN); held++)
        if (PyObject_GetBuffer(given[held], &views[held],
                               PyBUF_C_CONTIGUOUS | (held == OUT ? PyBUF_WRITABLE : 0)) < 0)
            break;
    PyObject *result = NULL;
    if (held == (scaled ? BUFFERS : GAIN)) {
        struct sums s = {.rows = views[BOUND].len / 4, .scaled = scaled};
        s.k = s.rows ? views[U].len / 4 / s.rows : 0;
        s.n = s.rows ? views[BASE].len / 2 / s.rows : 0;
        if (views[BASE].len != 2 * s.rows * s.n || views[OUT].len != 2 * s.rows * s.n ||
            views[U].len != 4 * s.rows * s.k || views[EXACT_U].len != 8 * s.rows * s.k ||
            views[PANELS].len != 4 * (s.n / PANEL * PANEL) * s.k ||
            views[COLUMNS].len != 8 * s.n * s.k ||
            (scaled && (views[GAIN].len != 4 * s.rows || views[EXACT_GAIN].len != 8 * s.rows))) {
            PyErr_SetString(PyExc_ValueError, "add: these arrays do not belong together");
        } else {
            struct moments m = {0};
            s.base = views[BASE].buf, s.out = views[OUT].buf;
            s.u = views[U].buf, s.panels = views[PANELS].buf;
            s.exact_u = views[EXACT_U].buf, s.columns = views[COLUMNS].buf;
            s.bound = views[BOUND].buf;
            if (scaled)
                s.gain = views[GAIN].buf, s.exact_gain = views[EXACT_GAIN].buf;
            Py_BEGIN_ALLOW_THREADS
            chosen(&s, &m);
            rest(&s, &m);
            Py_END_ALLOW_THREADS
            result = Py_BuildValue("ddddL", m.base2, m.delta2, m.dot, m.miss2, (long long)m.same);
        }
    }
    while (held--)
        PyBuffer_Release(&views[held]);
    return result;
}

static PyMethodDef functions[] = {
    {"levels", levels, METH_NOARGS, "Name the passes that this processor can run."},
    {"add", add, METH_VARARGS,
     "Add a product and round: (level, base, out, u, panels, exact_u, columns, bound, gain, "
     "exact_gain) gives (base2, delta2, dot, miss2, same)."},
    {0},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sums", "One pass over bfloat16 weights.", 0, functions,
};

PyMODINIT_FUNC PyInit__sums(void)
{
    return PyModuleDef_Init(&module);
}
