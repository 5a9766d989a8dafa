// A whole layer for a few tokens: the norm, the mixer and its residual write (what they compute:
// model/block.py). Everything between what is read and what is written is in float.
#pragma once

#include "sequence.h"
#include "tiles.h"

struct Ends { // of a layer: the norm of the residual stream
    int64_t hidden, active;
    double eps;
    const float* norm;
};

struct Stream {
    int64_t rows, threads, bfloat; // bfloat: whether x and y are bfloat16
    const void* x;                 // [row, hidden]
    void* y;                       // x and what the mixer writes
};

// y = x + what is written
template <class W> void written_row(const Stream& s, int64_t row, int64_t hidden, const float* written) {
    constexpr int LANES = Simd<float>::LANES;
    const W* x = (const W*)s.x + row * hidden;
    W* y = (W*)s.y + row * hidden;
    for (int64_t i = 0; i < hidden; i += LANES)
        store(y + i, load(x + i, hidden - i) + load(written + row * hidden + i, hidden - i), hidden - i);
}

// Memory for one layer after the other; what each of them takes is left over from the one before.
inline Scratch& scratch_of_layers() {
    static thread_local Scratch scratch;
    return scratch;
}

// What is between the norm and the residual write: f(normalized input [row, hidden], output [row, hidden])
template <class F> inline void layer(const Ends& ends, const Stream& s, int64_t room, F f) {
    constexpr int LANES = Simd<float>::LANES;
    Scratch& scratch = scratch_of_layers();
    int64_t hidden = ends.hidden, size = s.rows * hidden;
    scratch.reserve((3 * (size + 16) + room) * sizeof(float));
    float *wide = scratch.take<float>(size), *normed = scratch.take<float>(size), *out = scratch.take<float>(size);
    const float* x = (const float*)s.x;
    if (s.bfloat) {
        for (int64_t i = 0; i < size; i += LANES) store(wide + i, load((const bfloat16*)s.x + i, size - i), size - i);
        x = wide;
    }
    Norm<float> norm{.positions = s.rows,
                     .groups = 1,
                     .width = hidden,
                     .active = ends.active,
                     .step = 1,
                     .threads = s.threads,
                     .x = x,
                     .gate = nullptr,
                     .weight = ends.norm,
                     .gate_step = 0,
                     .eps = ends.eps};
    int64_t threads = threads_for(s.threads, size);
    each(norm.tasks(), threads, [&](int64_t task) { norm_task<float>(norm, task, normed, nullptr); });
    f(normed, out);
    each(s.rows, threads, [&](int64_t row) {
        s.bfloat ? written_row<bfloat16>(s, row, hidden, out) : written_row<float>(s, row, hidden, out);
    });
}

struct Mlp {
    Ends ends;
    Weight up, down;
    Stream stream;
};

inline void mlp(const Mlp& a) {
    const Stream& s = a.stream;
    int64_t inner = a.up.outputs;
    layer(a.ends, s, s.rows * inner + 16, [&](const float* normed, float* out) {
        float* hidden = scratch_of_layers().take<float>(s.rows * inner);
        multiply({a.up, s.rows, s.threads, normed, hidden});
        each(s.rows, threads_for(s.threads, s.rows * inner), [&](int64_t row) {
            squared_relu_task<float, float>(hidden, nullptr, hidden, row * inner, (row + 1) * inner);
        });
        multiply({a.down, s.rows, s.threads, hidden, out});
    });
}

struct Mamba {
    Ends ends;
    Weight in, out;
    int64_t groups, heads, channels, states, taps; // heads of a group
    double floor;                                  // of dt
    const float *weight, *bias;                    // of the convolution: [k, c], [c]
    const float *dt_bias, *A, *D, *norm;           // [g, h], [g, h p]
    int64_t length, floored;                       // tokens of each sequence; whether dt has its floor
    float* window;                                 // [sequence, k - 1, c] by its strides, changed in place
    int64_t window_row, window_step;
    float* state;  // [sequence, g, h, p, n], changed in place
    Stream stream; // its rows: tokens, one sequence after the other
};

inline void mamba(const Mamba& a) {
    const Stream& s = a.stream;
    int64_t whole = s.rows / a.length * a.groups; // groups that are not divided
    Sequence<float> sequence{.rows = s.rows / a.length,
                             .length = a.length,
                             .groups = a.groups,
                             .heads = a.heads,
                             .channels = a.channels,
                             .size = a.states,
                             .taps = a.taps,
                             .chunk = 64,
                             .parts = least(a.heads, (2 * s.threads + whole - 1) / whole),
                             .threads = s.threads,
                             .floor = a.floored ? a.floor : 0,
                             .eps = a.ends.eps,
                             .weight = a.weight,
                             .bias = a.bias,
                             .dt_bias = a.dt_bias,
                             .A = a.A,
                             .D = a.D,
                             .norm = a.norm,
                             .documents = nullptr,
                             .window = a.window,
                             .window_row = a.window_row,
                             .window_step = a.window_step,
                             .state = a.state};
    int64_t mixed = s.rows * (sequence.one() ? sequence.convolved() : sequence.pair());
    int64_t projected = s.rows * sequence.step(), inner = s.rows * sequence.inner(), heads = s.rows * sequence.all();
    layer(a.ends, s, projected + mixed + inner + heads + 64, [&](const float* normed, float* out) {
        Scratch& scratch = scratch_of_layers();
        float* from = scratch.take<float>(projected);
        sequence.projected = from;
        sequence.mixed = scratch.take<float>(mixed);
        sequence.dt = scratch.take<float>(heads);
        sequence.y = sequence.normed = scratch.take<float>(inner);
        multiply({a.in, s.rows, s.threads, normed, from});
        between(sequence);
        multiply({a.out, s.rows, s.threads, sequence.y, out});
    });
}
