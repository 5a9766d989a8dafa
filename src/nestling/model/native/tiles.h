// y = x Wᵀ + bias for some rows of x by bfloat16 weights that are read as they lie, where the processor multiplies
// tiles of them (AMX): 16 outputs by 32 inputs of W, by 32 inputs of 16 rows of x.
//
// A number of x becomes the sum of two of bfloat16, so that products are exact to 2^-17 of it. A row's result does not
// depend on what else is computed with it.
#pragma once

#include "product.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int64_t EDGE = 16, DEPTH = 32, SIDES = 2;      // rows and columns of a tile; tiles of W side by side
constexpr int64_t PART = EDGE * DEPTH / 2;               // words of a tile, each of two numbers
constexpr int64_t TILED_OUTPUTS = 128, LEAST_TILED = 32; // of a task

// Whether the system lets this process have the registers, once asked
inline bool tiles_granted() {
    constexpr long ASK = 0x1023, DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    static const bool granted = syscall(SYS_arch_prctl, ASK, DATA) == 0;
    return granted;
}

struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes() {
        for (int tile = 0; tile < 8; tile++) bytes[tile] = 64, rows[tile] = EDGE;
    }
};

inline void memory_as_it_is() { asm volatile("" ::: "memory"); } // loads of tiles are hidden from the compiler

// Pieces of the kept columns are divided into steps of DEPTH inputs; the last one of each is filled up with zeros.
inline int64_t steps_of(const Product& s) {
    int64_t steps = 0;
    s.each_piece([&](int64_t, int64_t, int64_t length) { steps += (length + DEPTH - 1) / DEPTH; });
    return steps;
}

// 16 rows of x: [step][the upper half, what it lacks][two inputs, row], zeros behind the last row
inline void split_task(const Product& s, uint32_t* to, int64_t steps, int64_t block) {
    constexpr int LANES = Simd<float>::LANES;
    static_assert(LANES == EDGE);
    to += block * steps * 2 * PART;
    s.each_piece([&](int64_t first, int64_t, int64_t length) {
        for (int64_t k = 0; k < length; k += DEPTH, to += 2 * PART) {
            Floats upper[EDGE], rest[EDGE];
            for (int64_t i = 0; i < EDGE; i++) {
                alignas(64) bfloat16 high[DEPTH], low[DEPTH];
                for (int64_t half = 0; half < 2; half++) {
                    int64_t row = block * EDGE + i, at = k + half * LANES;
                    Floats v{};
                    if (row < s.count && at < length) v = load(s.x + row * s.inputs + first + at, length - at);
                    store(high + half * LANES, v);
                    store(low + half * LANES, v - load(high + half * LANES));
                }
                upper[i] = load((const float*)high), rest[i] = load((const float*)low);
            }
            turn<float>(upper), turn<float>(rest);
            for (int64_t i = 0; i < EDGE; i++)
                store((float*)to + i * EDGE, upper[i]), store((float*)to + PART + i * EDGE, rest[i]);
        }
    });
}

// 32 outputs by one or two blocks of rows
template <int BLOCKS>
inline void tile_products(const Product& s, const uint32_t* x, int64_t steps, int64_t output, int64_t block) {
    const bfloat16 *weight[SIDES * EDGE], *next[SIDES * EDGE];
    for (int64_t i = 0; i < SIDES * EDGE; i++) {
        weight[i] = s.row<bfloat16>(output + i);
        next[i] = s.row<bfloat16>(output + SIDES * EDGE + i);
    }
    bool even[SIDES]; // rows that lie one after the other
    for (int64_t side = 0; side < SIDES; side++) {
        even[side] = true;
        for (int64_t i = 1; i < EDGE; i++)
            even[side] = even[side] && weight[side * EDGE + i] - weight[side * EDGE + i - 1] == s.width;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    alignas(64) bfloat16 near[SIDES][EDGE * DEPTH];
    const uint32_t *own = x + block * steps * 2 * PART, *other = own + (BLOCKS - 1) * steps * 2 * PART;
    s.each_piece([&](int64_t, int64_t column, int64_t length) {
        for (int64_t k = 0; k < length; k += DEPTH, own += 2 * PART, other += 2 * PART) {
            int64_t count = least(DEPTH, length - k);
            const bfloat16* from[SIDES];
            int64_t step[SIDES];
            for (int64_t side = 0; side < SIDES; side++) {
                const bfloat16** rows = weight + side * EDGE;
                from[side] = rows[0] + column + k, step[side] = 2 * s.width;
                if (even[side] && count == DEPTH) continue;
                for (int64_t i = 0; i < EDGE; i++) {
                    bfloat16* to = near[side] + i * DEPTH;
                    memcpy(to, rows[i] + column + k, count * sizeof(bfloat16));
                    memset(to + count, 0, (DEPTH - count) * sizeof(bfloat16));
                }
                from[side] = near[side], step[side] = 2 * DEPTH;
            }
            // the machine alone asks for another row too late
            for (int64_t i = 0; i < SIDES * EDGE; i++) __builtin_prefetch(next[i] + column + k, 0, 2);
            memory_as_it_is();
            _tile_loadd(4, from[0], step[0]);
            _tile_loadd(5, from[1], step[1]);
            for (int64_t half = 0; half < 2; half++) {
                _tile_loadd(6, own + half * PART, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
                if (BLOCKS == 1) continue;
                _tile_loadd(7, other + half * PART, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    });
    alignas(64) float found[4][EDGE * EDGE];
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    _tile_stored(2, found[2], 64);
    _tile_stored(3, found[3], 64);
    memory_as_it_is();
    for (int64_t part = 0; part < SIDES * BLOCKS; part++) {
        int64_t first = output + part % SIDES * EDGE, row = (block + part / SIDES) * EDGE;
        Floats square[EDGE];
        for (int64_t i = 0; i < EDGE; i++) square[i] = load(found[part] + i * EDGE);
        turn<float>(square);
        if (first >= s.outputs) continue;
        Floats bias = s.bias ? load(s.bias + first, s.outputs - first) : Floats{};
        for (int64_t i = 0; i < least(EDGE, s.count - row); i++)
            store(s.y + (row + i) * s.outputs + first, square[i] + bias, s.outputs - first);
    }
}

inline void tiled(const Product& s) {
    static thread_local Scratch scratch;
    int64_t steps = steps_of(s), blocks = (s.count + EDGE - 1) / EDGE;
    int64_t outputs = outputs_of(s, TILED_OUTPUTS, LEAST_TILED), tasks = (s.outputs + outputs - 1) / outputs;
    scratch.reserve(blocks * steps * 2 * PART * sizeof(uint32_t));
    uint32_t* x = scratch.take<uint32_t>(blocks * steps * 2 * PART);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) split_task(s, x, steps, block);
        TileShapes shapes;
        memory_as_it_is();
        _tile_loadconfig(&shapes);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++)
            for (int64_t output = task * outputs; output < least((task + 1) * outputs, s.outputs);
                 output += SIDES * EDGE) { // W's tiles stay in the cache
                int64_t block = 0;
                for (; block + 2 <= blocks; block += 2) tile_products<2>(s, x, steps, output, block);
                if (block < blocks) tile_products<1>(s, x, steps, output, block);
            }
        _tile_release();
    }
}
#else
inline bool tiles_granted() { return false; }
inline void tiled(const Product&) {}
#endif

constexpr int64_t SINGLE = 2; // rows, up to which a row of W by a row of x is faster than tiles

inline void multiply(Product s) {
    s.threads = threads_for(s.threads, s.count * s.outputs * s.inputs);
    if (s.bfloat && s.count > SINGLE && tiles_granted())
        tiled(s);
    else
        s.count <= FEW ? few(s) : many(s);
}
