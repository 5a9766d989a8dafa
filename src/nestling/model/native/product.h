// y = x Wᵀ + bias for some rows of x, with W read as it lies: the kept part of a stored weight, in float or bfloat16.
// Sums are in float.
//
// A few rows: a vector is a part of a row of W, a sum a vector of partial sums until its end. More rows: a vector is
// the same number of several rows of x, and every number of W is multiplied with all of them at once. Either way a
// row's result does not depend on what else is computed with it.
#pragma once

#include "pointwise.h"

struct Weight {
    int64_t outputs, inputs; // that are kept
    const void* weight;
    int64_t width, bfloat;  // elements between its rows; whether they are bfloat16
    const int64_t* rows;    // of W, one per output; null: the first ones
    const int64_t* columns; // first and number of each piece of the kept columns; null: the first ones
    int64_t pieces;
    const float* bias; // or null
};

struct Product : Weight {
    int64_t count, threads; // rows of x
    const float* x;         // contiguous
    float* y;               // [count, output]

    template <class W> const W* row(int64_t output) const {
        output = least(output, outputs - 1);
        return (const W*)weight + (rows ? rows[output] : output) * width;
    }
    // f(first input, column of W, how many) for each piece
    template <class F> inline void each_piece(F f) const {
        if (columns == nullptr) return f(0, 0, inputs);
        int64_t input = 0;
        for (int64_t p = 0; p < pieces; input += columns[2 * p + 1], p++) f(input, columns[2 * p], columns[2 * p + 1]);
    }
};

// ---- a few rows

constexpr int FEW = 8; // rows, up to which a vector is a part of a row of W

constexpr int FEW_OUTPUTS = 256, LEAST_OUTPUTS = 64; // of a task, at most and at least

// So many that the first tile of a task, which nobody asked for beforehand, is one of several; but work for every
// thread.
inline int64_t outputs_of(const Product& s, int64_t most, int64_t fewest) {
    while (most > fewest && s.outputs < most * 2 * s.threads) most /= 2;
    return most;
}

// R rows of x by as many outputs as fill a vector with sums, from an output on; fewer outputs where there are no more.
template <int R, class W> inline void few_tile(const Product& s, int64_t row, int64_t output, int64_t last) {
    constexpr int LANES = Simd<float>::LANES, OUTPUTS = LANES / R;
    const W *weight[OUTPUTS], *next[OUTPUTS];
    for (int c = 0; c < OUTPUTS; c++) {
        weight[c] = s.row<W>(least(output + c, last - 1));
        next[c] = s.row<W>(output + OUTPUTS + c);
    }
    const float* x = s.x + row * s.inputs;
    Floats found[LANES];
    for (int i = 0; i < LANES; i++) found[i] = Floats{};
    auto add = [&](int64_t input, int64_t column, int64_t left) {
        Floats seen[R];
        for (int r = 0; r < R; r++) seen[r] = load(x + r * s.inputs + input, left);
        for (int c = 0; c < OUTPUTS; c++) {
            __builtin_prefetch(next[c] + column, 0, 2); // the machine alone asks for another row too late
            Floats w = load(weight[c] + column, left);
            for (int r = 0; r < R; r++) found[r * OUTPUTS + c] += seen[r] * w;
        }
    };
    s.each_piece([&](int64_t input, int64_t column, int64_t length) {
        int64_t k = 0;
        for (; k + LANES <= length; k += LANES) add(input + k, column + k, LANES);
        if (k < length) add(input + k, column + k, length - k);
    });
    Floats total = sums<float>(found);
    for (int r = 0; r < R; r++)
        for (int64_t c = 0; c < least(OUTPUTS, last - output); c++)
            s.y[(row + r) * s.outputs + output + c] = total[r * OUTPUTS + c] + (s.bias ? s.bias[output + c] : 0);
}

template <int R, class W> inline int64_t few_rows(const Product& s, int64_t row, int64_t first, int64_t last) {
    for (; row + R <= s.count; row += R)
        for (int64_t output = first; output < last; output += Simd<float>::LANES / R)
            few_tile<R, W>(s, row, output, last);
    return row;
}

inline int64_t few_outputs(const Product& s) { return outputs_of(s, FEW_OUTPUTS, LEAST_OUTPUTS); }

template <class W> void few_task(const Product& s, int64_t task) {
    int64_t step = few_outputs(s), first = task * step, last = least(first + step, s.outputs);
    int64_t row = few_rows<4, W>(s, 0, first, last);
    few_rows<1, W>(s, few_rows<2, W>(s, row, first, last), first, last);
}

// ---- more rows

constexpr int MANY_OUTPUTS = 96; // of a task, or half as many: a multiple of what a tile has, and of any vector
constexpr int MANY_ROWS = 512;   // of x that are turned at a time
constexpr int MANY_VECTORS = 4;  // of rows of x that a task goes through its outputs with
constexpr int SUMS = BYTES == 64 || (BYTES == 16 && COLUMNS == 4) ? 24 : 12; // vectors that stay in registers
constexpr int TILE = SUMS / 2;                                               // outputs of a tile

// V vectors of rows of x (turned: [input, row]) by the outputs of a tile, into [output, row]. What is needed of W next
// is copied side by side, so that one pointer finds all of it.
template <int V, class W>
void many_tile(const Product& s, const float* turned, int64_t output, float* out, int64_t step) {
    constexpr int LANES = Simd<float>::LANES;
    constexpr int64_t STEP = 64 / sizeof(W);
    const W *weight[TILE], *next[TILE];
    for (int c = 0; c < TILE; c++) weight[c] = s.row<W>(output + c), next[c] = s.row<W>(output + TILE + c);
    Floats found[TILE][V];
    for (int c = 0; c < TILE; c++)
        for (int v = 0; v < V; v++) found[c][v] = Floats{};
    alignas(64) float near[TILE][STEP];
    const float* x = turned;
    s.each_piece([&](int64_t, int64_t column, int64_t length) {
        for (int64_t first = column; first < column + length; first += STEP) {
            int64_t count = least(STEP, column + length - first);
            for (int c = 0; c < TILE; c++) {
                __builtin_prefetch(next[c] + first, 0, 2); // the machine alone asks for another row too late
                for (int64_t k = 0; k < count; k += LANES) store(near[c] + k, load(weight[c] + first + k, count - k));
            }
            for (int64_t k = 0; k < count; k++, x += V * LANES) {
                Floats seen[V];
                for (int v = 0; v < V; v++) seen[v] = load(x + v * LANES);
                for (int c = 0; c < TILE; c++)
                    for (int v = 0; v < V; v++) found[c][v] += near[c][k] * seen[v];
            }
        }
    });
    for (int c = 0; c < TILE; c++)
        for (int v = 0; v < V; v++) store(out + c * step + v * LANES, found[c][v]);
}

// f(first row, how many vectors, at most two) for the parts of x that are multiplied at a time, from a row on
template <class F> inline void each_part(int64_t row, int64_t last, F f) {
    constexpr int LANES = Simd<float>::LANES;
    for (; row < last; row += 2 * LANES) f(row, last - row > LANES ? 2 : 1);
}

inline int64_t many_outputs(const Product& s) { return outputs_of(s, MANY_OUTPUTS, MANY_OUTPUTS / 2); }

template <class W> void many_task(const Product& s, const float* turned, int64_t task) {
    constexpr int LANES = Simd<float>::LANES, ROOM = MANY_VECTORS * LANES;
    int64_t first = task * many_outputs(s), outputs = least(many_outputs(s), s.outputs - first);
    alignas(64) float out[MANY_OUTPUTS * ROOM];
    for (int64_t row = 0; row < s.count; row += ROOM) {
        int64_t last = least(row + ROOM, s.count);
        for (int64_t c = 0; c < outputs; c += TILE) // a tile of W stays in the nearest cache
            each_part(row, last, [&](int64_t at, int vectors) {
                auto run = vectors == 1 ? many_tile<1, W> : many_tile<2, W>;
                run(s, turned + at * s.inputs, first + c, out + c * ROOM + at - row, ROOM);
            });
        for (int64_t c = 0; c < outputs; c += LANES)
            for (int64_t at = row; at < last; at += LANES) {
                Floats square[LANES];
                for (int i = 0; i < LANES; i++) square[i] = load(out + (c + i) * ROOM + at - row);
                turn<float>(square);
                Floats bias = s.bias ? load(s.bias + first + c, outputs - c) : Floats{};
                for (int i = 0; i < least(LANES, last - at); i++)
                    store(s.y + (at + i) * s.outputs + first + c, square[i] + bias, outputs - c);
            }
    }
}

// LANES inputs of every row of x, turned: [part][input, row of the part], zeros behind the last row.
inline void turn_task(const Product& s, float* turned, int64_t task) {
    constexpr int LANES = Simd<float>::LANES;
    int64_t input = task * LANES, inputs = least(LANES, s.inputs - input);
    each_part(0, s.count, [&](int64_t row, int vectors) {
        float* to = turned + row * s.inputs + input * vectors * LANES;
        for (int v = 0; v < vectors; v++) {
            Floats square[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t from = row + v * LANES + i;
                square[i] = from < s.count ? load(s.x + from * s.inputs + input, inputs) : Floats{};
            }
            turn<float>(square);
            for (int64_t k = 0; k < inputs; k++) store(to + (k * vectors + v) * LANES, square[k]);
        }
    });
}

// ---- either

inline void few(const Product& s) {
    each((s.outputs + few_outputs(s) - 1) / few_outputs(s), s.threads,
         [&](int64_t task) { s.bfloat ? few_task<bfloat16>(s, task) : few_task<float>(s, task); });
}

inline void many(Product s) {
    constexpr int LANES = Simd<float>::LANES;
    for (; s.count > MANY_ROWS; s.count -= MANY_ROWS, s.x += MANY_ROWS * s.inputs, s.y += MANY_ROWS * s.outputs) {
        Product part = s;
        part.count = MANY_ROWS;
        many(part);
    }
    static thread_local Scratch scratch;
    int64_t size = up<float>(s.count) * s.inputs;
    scratch.reserve(size * sizeof(float));
    float* turned = scratch.take<float>(size);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < (s.inputs + LANES - 1) / LANES; task++) turn_task(s, turned, task);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (s.outputs + many_outputs(s) - 1) / many_outputs(s); task++)
            s.bfloat ? many_task<bfloat16>(s, turned, task) : many_task<float>(s, turned, task);
    }
}
