// A whole layer for a few tokens: the norm, the mixer and its residual write (what they compute:
// model/block.py). Everything between what is read and what is written is in float.
#pragma once

#include "conv.h"
#include "product.h"
#include "scan.h"

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

inline void store(uint16_t* to, Floats v, int64_t count) { // rounded to the nearest, or the even one of two
    typedef uint32_t Wholes __attribute__((vector_size(BYTES)));
    typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
    Wholes bits = (Wholes)v, rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    Wholes nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    Halves half = __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16, Halves);
    memcpy(to, &half, least(count, Simd<float>::LANES) * 2);
}

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
        for (int64_t i = 0; i < size; i += LANES) store(wide + i, load((const uint16_t*)s.x + i, size - i), size - i);
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
        s.bfloat ? written_row<uint16_t>(s, row, hidden, out) : written_row<float>(s, row, hidden, out);
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
        each(s.rows, threads_for(s.threads, s.rows * inner),
             [&](int64_t row) { squared_relu_task<float>(hidden, nullptr, hidden, row * inner, (row + 1) * inner); });
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

    int64_t sequences() const { return stream.rows / length; }
    int64_t inner() const { return groups * heads * channels; }
    int64_t convolved() const { return inner() + 2 * groups * states; } // x [g, h, p], B [g, n], C [g, n]
};

// softplus(dt + bias), in place of what the projection made
inline void dt_row(const Mamba& a, float* dt) {
    for (int64_t head = 0; head < a.groups * a.heads; head++) {
        float raw = dt[head] + a.dt_bias[head], soft = raw > 20 ? raw : std::log1p(std::exp(raw));
        dt[head] = a.floored && soft < a.floor ? float(a.floor) : soft;
    }
}

// S = exp(dt A) S + dt x ⊗ B and y = S C + D x, of one head of one token
inline void state_task(const Mamba& a, const float* dts, const float* convolved, float* y, int64_t task) {
    constexpr int LANES = Simd<float>::LANES;
    int64_t row = task / (a.groups * a.heads), head = task % (a.groups * a.heads), size = a.channels * a.states;
    convolved += row * a.convolved();
    const float *x = convolved + head * a.channels, *B = convolved + a.inner() + head / a.heads * a.states;
    const float* C = B + a.groups * a.states;
    float dt = dts[task], left = std::exp(dt * a.A[head]), *state = a.state + task * size, *to = y + task * a.channels;
    for (int64_t p = 0; p < a.channels; p += LANES) {
        int64_t count = least(LANES, a.channels - p);
        Floats found[LANES]{};
        for (int i = 0; i < count; i++) {
            float input = dt * x[p + i], *at = state + (p + i) * a.states;
            for (int64_t n = 0; n < a.states; n += LANES) {
                int64_t rest = a.states - n;
                Floats v = load(at + n, rest) * left + input * load(B + n, rest);
                store(at + n, v, rest);
                found[i] += v * load(C + n, rest);
            }
        }
        store(to + p, sums(found) + a.D[head] * load(x + p, count), count);
    }
}

// The last inputs of a sequence are its window.
inline void window_task(const Mamba& a, const float* input, int64_t sequence) {
    float* window = a.window + sequence * a.window_row;
    for (int64_t k = 0; k < a.taps - 1; k++) {
        int64_t from = a.length + k; // of the window and the inputs behind it
        memcpy(window + k * a.window_step,
               from < a.taps - 1 ? window + from * a.window_step
                                 : input + (sequence * a.length + from - a.taps + 1) * a.in.outputs,
               a.convolved() * sizeof(float));
    }
}

inline void mamba(const Mamba& a) {
    const Stream& s = a.stream;
    int64_t heads = a.groups * a.heads, projected_size = s.rows * a.in.outputs, size = s.rows * a.convolved();
    int64_t inner = s.rows * a.inner();
    layer(a.ends, s, projected_size + size + inner + s.rows * heads + 64, [&](const float* normed, float* out) {
        Scratch& scratch = scratch_of_layers();
        float* projected = scratch.take<float>(projected_size); // [row, z + x + B + C + dt]
        float *x = scratch.take<float>(size), *y = scratch.take<float>(inner),
              *dt = scratch.take<float>(s.rows * heads);
        multiply({a.in, s.rows, s.threads, normed, projected});
        const float *input = projected + a.inner(), *B = x + a.inner(), *C = B + a.groups * a.states;
        int64_t step = a.in.outputs, c = a.convolved(), row = a.length * c, sequences = a.sequences();
        Conv<float> conv{.rows = sequences,
                         .length = a.length,
                         .channels = c,
                         .step = 16,
                         .threads = s.threads,
                         .x = input,
                         .weight = a.weight,
                         .bias = a.bias,
                         .window = a.window,
                         .x_row = a.length * step,
                         .x_step = step,
                         .window_row = a.window_row,
                         .window_step = a.window_step,
                         .documents = nullptr};
        int64_t parts = least(a.heads, (2 * s.threads + sequences * a.groups - 1) / (sequences * a.groups));
        Scan<float> scan{.rows = sequences,
                         .length = a.length,
                         .groups = a.groups,
                         .heads = a.heads,
                         .channels = a.channels,
                         .size = a.states,
                         .chunk = 64,
                         .parts = parts,
                         .threads = s.threads,
                         .x = x,
                         .dt = dt,
                         .A = a.A,
                         .B = B,
                         .C = C,
                         .D = a.D,
                         .x_row = row,
                         .x_step = c,
                         .B_row = row,
                         .B_step = c,
                         .C_row = row,
                         .C_step = c,
                         .documents = nullptr};
        int64_t group = a.heads * a.channels;
        Norm<float> norm{.positions = s.rows,
                         .groups = a.groups,
                         .width = group,
                         .active = group,
                         .step = 1,
                         .threads = s.threads,
                         .x = y,
                         .gate = projected,
                         .weight = a.norm,
                         .gate_step = step,
                         .eps = a.ends.eps};
        auto convolve = a.taps == 2 ? conv_task<float, 2> : a.taps == 3 ? conv_task<float, 3> : conv_task<float, 4>;
#pragma omp parallel num_threads(threads_for(s.threads, inner* a.states))
        {
#pragma omp for nowait
            for (int64_t at = 0; at < s.rows; at++) {
                memcpy(dt + at * heads, input + at * step + c, heads * sizeof(float));
                dt_row(a, dt + at * heads);
            }
#pragma omp for
            for (int64_t task = 0; task < conv.tasks(); task++) convolve(conv, task, x);
#pragma omp for nowait
            for (int64_t sequence = 0; sequence < sequences; sequence++) window_task(a, input, sequence);
            if (a.length == 1) {
#pragma omp for
                for (int64_t task = 0; task < s.rows * heads; task++) state_task(a, dt, x, y, task);
            } else {
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < scan.tasks(); task++)
                    scan_task<float>(scan, task, a.state, y, nullptr, a.state);
            }
#pragma omp for
            for (int64_t task = 0; task < norm.tasks(); task++) norm_task<float>(norm, task, y, nullptr);
        }
        multiply({a.out, s.rows, s.threads, y, out});
    });
}
