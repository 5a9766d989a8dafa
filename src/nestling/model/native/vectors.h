// Vectors as wide as the machine's, products of small matrices out of its registers, and scratch memory.
//
// Every matrix in scratch has rows of whole vectors and a multiple of ROWS rows; what is beyond its edge is zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4; // COLUMNS: vectors side by side that a product keeps in registers
#elif defined(__AVX__)
constexpr int BYTES = 32, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, COLUMNS = 4;
#else
constexpr int BYTES = 16, COLUMNS = 2;
#endif
constexpr int ROWS = 4; // rows that a product keeps in registers

typedef float Floats __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(BYTES), aligned(8), may_alias));

template <class R> struct Simd;

template <> struct Simd<float> {
    typedef Floats Vector;
    typedef int32_t Bits __attribute__((vector_size(BYTES)));
    static constexpr int LANES = BYTES / 4, MANTISSA = 23, BIAS = 127, DEGREE = 7;
    static constexpr float MAGIC = 12582912.0f; // 1.5 · 2^23: adding it rounds to a whole number
    static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
};

template <> struct Simd<double> {
    typedef Doubles Vector;
    typedef int64_t Bits __attribute__((vector_size(BYTES)));
    static constexpr int LANES = BYTES / 8, MANTISSA = 52, BIAS = 1023, DEGREE = 13;
    static constexpr double MAGIC = 6755399441055744.0; // 1.5 · 2^52
    static constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
};

template <class R> using Vector = typename Simd<R>::Vector;

typedef uint16_t bfloat16; // the upper half of a float: numbers are kept in it, and sums are in float
typedef uint32_t Wholes __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

template <class R> inline Vector<R> load(const R* from) { return *(const Vector<R>*)from; }
template <class R> inline void store(R* to, Vector<R> v) { *(Vector<R>*)to = v; }

template <class R> inline void store(R* to, Vector<R> v, int64_t count) { // no more than the first
    if (count >= Simd<R>::LANES)
        store(to, v);
    else
        memcpy(to, &v, count * sizeof(R));
}

template <class R> inline Vector<R> load(const R* from, int64_t count) { // zeros after the first
    if (count >= Simd<R>::LANES) return load(from);
    Vector<R> found{};
    memcpy(&found, from, count * sizeof(R));
    return found;
}

inline Floats load(const bfloat16* from) {
    Halves half;
    memcpy(&half, from, sizeof(half));
    return (Floats)(__builtin_convertvector(half, Wholes) << 16);
}

inline Floats load(const bfloat16* from, int64_t count) { // zeros after the first
    if (count >= Simd<float>::LANES) return load(from);
    bfloat16 some[Simd<float>::LANES] = {};
    memcpy(some, from, count * sizeof(bfloat16));
    return load(some);
}

inline Halves narrowed(Floats v) { // to the nearest, or the even of two
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    Wholes bits = (Wholes)v, rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    Wholes nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    return __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16, Halves);
#endif
}

inline void store(bfloat16* to, Floats v) {
    Halves half = narrowed(v);
    memcpy(to, &half, sizeof(half));
}

inline void store(bfloat16* to, Floats v, int64_t count) { // no more than the first
    Halves half = narrowed(v);
    if (count >= Simd<float>::LANES)
        memcpy(to, &half, sizeof(half));
    else
        memcpy(to, &half, count * sizeof(bfloat16));
}

// The first numbers of a row, as what they are there
template <class To, class From> inline void moved(To* to, const From* from, int64_t count) {
    if constexpr (std::is_same_v<To, From>)
        memcpy(to, from, count * sizeof(To));
    else
        for (int64_t i = 0; i < count; i += Simd<float>::LANES) store(to + i, load(from + i, count - i), count - i);
}

template <class R> inline R sum(Vector<R> v) {
    R total = 0;
    for (int lane = 0; lane < Simd<R>::LANES; lane++) total += v[lane];
    return total;
}

// Lane i of the result is the sum of vector i.
template <class R> inline Vector<R> sums(Vector<R>* vectors) {
    constexpr int LANES = Simd<R>::LANES;
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) {
            Vector<R> a = vectors[2 * i], b = vectors[2 * i + 1];
#if defined(__clang__)
            Vector<R> found;
            for (int lane = 0; lane < LANES / 2; lane++) {
                found[lane] = a[2 * lane] + a[2 * lane + 1];
                found[lane + LANES / 2] = b[2 * lane] + b[2 * lane + 1];
            }
            vectors[i] = found;
#else
            typename Simd<R>::Bits even, odd;
            for (int lane = 0; lane < LANES; lane++) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
            vectors[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
        }
    return vectors[0];
}

template <class R> inline int64_t up(int64_t size) { // to whole vectors
    return (size + Simd<R>::LANES - 1) / Simd<R>::LANES * Simd<R>::LANES;
}
inline int64_t rows_of(int64_t size) { return (size + ROWS - 1) / ROWS * ROWS; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 1 / n!
template <class R> struct Series {
    R at[Simd<R>::DEGREE + 1];

    constexpr Series() : at{1} {
        for (int n = 1; n <= Simd<R>::DEGREE; n++) at[n] = at[n - 1] / R(n);
    }
};

// exp(x) for -87 < x < 88: 2^k times the Taylor series of what is left, at most ln 2 / 2.
template <class R> inline Vector<R> exponential(Vector<R> x) {
    typedef Simd<R> S;
    static constexpr Series<R> TERM;
    Vector<R> none{}, shifted = x * R(1.4426950408889634) + S::MAGIC;
    Vector<R> whole = shifted - S::MAGIC;
    Vector<R> rest = x - whole * S::LN2_HIGH - whole * S::LN2_LOW;
    Vector<R> series = none + TERM.at[S::DEGREE];
    for (int n = S::DEGREE - 1; n >= 0; n--) series = series * rest + TERM.at[n];
    typename S::Bits power = (typename S::Bits)shifted << S::MANTISSA; // the low bits of `shifted` are k
    return (Vector<R>)((typename S::Bits)series + power);
}

template <class R> inline Vector<R> within(Vector<R> x, R low, R high) {
    Vector<R> none{};
    x = x < low ? none + low : x;
    return x > high ? none + high : x;
}

constexpr double FAINT = -60; // as in model/scan.py

// exp(x) for x <= 0; what is fainter than FAINT is as faint
template <class R> inline Vector<R> faded(Vector<R> x) { return exponential<R>(within<R>(x, R(FAINT), R(0))); }

// Turn a square of LANES vectors about its diagonal: each step puts the first half between the second.
template <class R> inline void turn(Vector<R>* square) {
    constexpr int LANES = Simd<R>::LANES;
#if defined(__clang__)
    R flat[LANES * LANES];
    for (int r = 0; r < LANES; r++) store(flat + r * LANES, square[r]);
    for (int r = 0; r < LANES; r++)
        for (int c = 0; c < LANES; c++) square[c][r] = flat[r * LANES + c];
#else
    typedef Vector<R> V;
    typename Simd<R>::Bits low, high;
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
    }
    for (int step = 1; step < LANES; step *= 2) {
        V mixed[LANES];
        for (int r = 0; r < LANES / 2; r++) {
            mixed[2 * r] = __builtin_shuffle(square[r], square[r + LANES / 2], low);
            mixed[2 * r + 1] = __builtin_shuffle(square[r], square[r + LANES / 2], high);
        }
        for (int r = 0; r < LANES; r++) square[r] = mixed[r];
    }
#endif
}

// V vectors of each of ROWS rows of a product, in registers.
template <class R, int V> struct Tile {
    Vector<R> at[ROWS][V];

    Tile() {
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) at[r][v] = Vector<R>{};
    }
    // += A[rows, first..last) · B[first..last, columns); A by its strides, B by rows
    inline void add(const R* a, int64_t row, int64_t column, const R* b, int64_t width, int64_t first, int64_t last) {
        for (int64_t k = first; k < last; k++) {
            Vector<R> right[V];
            for (int v = 0; v < V; v++) right[v] = load(b + k * width + v * Simd<R>::LANES);
            for (int r = 0; r < ROWS; r++) {
                R left = a[r * row + k * column];
                for (int v = 0; v < V; v++) at[r][v] += left * right[v];
            }
        }
    }
    inline void scale(const R* by) { // each row
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) at[r][v] *= by[r];
    }
    inline void scale_columns(const R* by) {
        for (int v = 0; v < V; v++) {
            Vector<R> factor = load(by + v * Simd<R>::LANES);
            for (int r = 0; r < ROWS; r++) at[r][v] *= factor;
        }
    }
    inline void put(R* to, int64_t width) const {
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) store(to + r * width + v * Simd<R>::LANES, at[r][v]);
    }
    inline void add_to(R* to, int64_t width) const { // to += this
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) {
                R* place = to + r * width + v * Simd<R>::LANES;
                store(place, load(place) + at[r][v]);
            }
    }
    // f(row, column, vector, how many columns of it there are) inside the first rows and columns
    template <class F> inline void each(int64_t rows, int64_t columns, F f) const {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                int64_t left = columns - v * Simd<R>::LANES;
                if (r < rows && left > 0) f(r, v * Simd<R>::LANES, at[r][v], left);
            }
    }
    inline void add_rows(const R* from, const R* by, int64_t width) { // this += from, each row times its factor
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) at[r][v] += by[r] * load(from + r * width + v * Simd<R>::LANES);
    }
    inline void add_times(const R* from, R by, int64_t width) { // this += by · from
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) at[r][v] += by * load(from + r * width + v * Simd<R>::LANES);
    }
};

// f(tile, column) for the tiles of ROWS rows that cover `width` columns.
template <class R, class F> inline void across(int64_t width, F f) {
    int64_t vectors = width / Simd<R>::LANES, v = 0;
    for (; v + COLUMNS <= vectors; v += COLUMNS) {
        Tile<R, COLUMNS> tile;
        f(tile, v * Simd<R>::LANES);
    }
    int64_t rest = vectors - v;
    if (COLUMNS > 3 && rest == 3) {
        Tile<R, 3> tile;
        f(tile, v * Simd<R>::LANES);
    } else if (COLUMNS > 2 && rest == 2) {
        Tile<R, 2> tile;
        f(tile, v * Simd<R>::LANES);
    } else if (rest == 1) {
        Tile<R, 1> tile;
        f(tile, v * Simd<R>::LANES);
    }
}

// Rows of so many numbers, into scratch
template <class R, class S>
void copied(R* to, int64_t width, const S* from, int64_t step, int64_t rows, int64_t count) {
    for (int64_t t = 0; t < rows_of(rows); t++) {
        int64_t have = t < rows ? count : 0;
        if (have) moved(to + t * width, from + t * step, have);
        memset(to + t * width + have, 0, (width - have) * sizeof(R));
    }
}

// to[column][row] = from[row][column], both in rows of whole vectors
template <class R> void turned(R* to, int64_t to_width, const R* from, int64_t width, int64_t rows, int64_t columns) {
    constexpr int LANES = Simd<R>::LANES;
    for (int64_t r = 0; r < to_width; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            Vector<R> square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = r + i < rows ? load(from + (r + i) * width + c) : Vector<R>{};
            turn<R>(square);
            for (int i = 0; i < LANES && c + i < rows_of(columns); i++) store(to + (c + i) * to_width + r, square[i]);
        }
}

// Threads for so many numbers to go through: a second one that something else keeps from running is waited for.
inline int64_t threads_for(int64_t threads, int64_t numbers) { return numbers < 1 << 17 ? 1 : threads; }

// f(task) on several threads; one that ends early takes another task
template <class F> inline void each(int64_t tasks, int64_t threads, F f) {
    if (tasks == 1) return f(0);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) f(task);
}

// Memory of a thread that is kept from call to call.
class Scratch {
    char* memory = nullptr;
    size_t size = 0, used = 0;

  public:
    ~Scratch() { free(memory); }
    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        free(memory);
        memory = (char*)aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (memory == nullptr) abort();
        size = bytes;
    }
    template <class R> R* take(int64_t count) { // multiples of 64 bytes
        R* found = (R*)(memory + used);
        used += (count * sizeof(R) + 63) / 64 * 64;
        return found;
    }
};
