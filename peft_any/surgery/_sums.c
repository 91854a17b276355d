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
#define CHUNK 16 /* products that are summed before they are added to others */
#define WAITING 256 /* doubtful sums from which they are settled */
#define HALF_PLACE 0x1p-8f
#define SUM 0x1p-22f
#define SCALED 0x1p-20f
#define TINY 0x1p-100f
#define EXPONENT 0x7F800000u
#define SIGN 0x80000000u

#include "_exact.h"

/* A square root, or hardly more: Heron's step from a guess that halves the exponent. */
static inline float root(float square)
{
    uint32_t bits;
    float guess;
    memcpy(&bits, &square, sizeof bits);
    bits = (bits >> 1) + 0x1FBD1DF5u;
    memcpy(&guess, &bits, sizeof guess);
    return (guess + square / guess) / 2;
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
