// y = x Wᵀ + bias for few rows of x: W is read once, as it lies, in float or bfloat16; sums are in float.
//
// A sum is a vector of partial sums until its end, the same ones however many rows there are, so that a row's result
// does not depend on what else is computed with it.
#pragma once

#include "pointwise.h"

struct Few {
    int64_t count, outputs, inputs, step, threads; // rows of x; step: outputs of a task
    const float* x;                                // contiguous
    const void* weight;                            // [output, input]
    int64_t width, bfloat;                         // elements between its rows; whether they are bfloat16
    const float* bias;                             // or null
    float* y;                                      // [count, output]
};

inline Floats load(const uint16_t* from, int64_t count) {
    constexpr int LANES = Simd<float>::LANES;
    typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
    typedef uint32_t Wholes __attribute__((vector_size(LANES * 4)));
    Halves half{};
    memcpy(&half, from, least(count, LANES) * 2);
    return (Floats)(__builtin_convertvector(half, Wholes) << 16);
}

// Lane i of the result is the sum of vector i.
inline Floats sums(Floats* vectors) {
    constexpr int LANES = Simd<float>::LANES;
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) {
            Floats a = vectors[2 * i], b = vectors[2 * i + 1];
#if defined(__clang__)
            Floats found;
            for (int lane = 0; lane < LANES / 2; lane++) {
                found[lane] = a[2 * lane] + a[2 * lane + 1];
                found[lane + LANES / 2] = b[2 * lane] + b[2 * lane + 1];
            }
            vectors[i] = found;
#else
            Simd<float>::Bits even, odd;
            for (int lane = 0; lane < LANES; lane++) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
            vectors[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
        }
    return vectors[0];
}

// R rows of x by as many outputs as fill a vector with sums, from an output on; fewer outputs where there are no more.
template <int R, class W> inline void few_tile(const Few& s, int64_t row, int64_t output, int64_t last) {
    constexpr int LANES = Simd<float>::LANES, COLUMNS = LANES / R;
    const W* weight[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) weight[c] = (const W*)s.weight + least(output + c, last - 1) * s.width;
    const float* x = s.x + row * s.inputs;
    Floats found[LANES];
    for (int i = 0; i < LANES; i++) found[i] = Floats{};
    auto add = [&](int64_t k, int64_t left) {
        Floats seen[R];
        for (int r = 0; r < R; r++) seen[r] = load(x + r * s.inputs + k, left);
        for (int c = 0; c < COLUMNS; c++) {
            Floats w = load(weight[c] + k, left);
            for (int r = 0; r < R; r++) found[r * COLUMNS + c] += seen[r] * w;
        }
    };
    int64_t k = 0;
    for (; k + LANES <= s.inputs; k += LANES) add(k, LANES);
    if (k < s.inputs) add(k, s.inputs - k);
    Floats total = sums(found);
    for (int r = 0; r < R; r++)
        for (int64_t c = 0; c < least(COLUMNS, last - output); c++)
            s.y[(row + r) * s.outputs + output + c] = total[r * COLUMNS + c] + (s.bias ? s.bias[output + c] : 0);
}

template <int R, class W> inline int64_t few_rows(const Few& s, int64_t row, int64_t first, int64_t last) {
    for (; row + R <= s.count; row += R)
        for (int64_t output = first; output < last; output += Simd<float>::LANES / R)
            few_tile<R, W>(s, row, output, last);
    return row;
}

template <class W> void few_task(const Few& s, int64_t task) {
    int64_t first = task * s.step, last = least(first + s.step, s.outputs);
    int64_t row = few_rows<4, W>(s, 0, first, last);
    few_rows<1, W>(s, few_rows<2, W>(s, row, first, last), first, last);
}
