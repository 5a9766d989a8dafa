// What is between the two projections of a Mamba-2 layer: dt, the convolution, the scan and the gated norm, forward and
// backward (what they compute: model/mamba2.py). Nothing is put together or taken apart by copies: each step reads and
// writes its columns of what the projection made, and of its gradient.
#pragma once

#include "conv.h"
#include "scan.h"

template <class R, class W = R> struct Sequence {        // W: of what is read from a product, and of what one reads
    int64_t rows, length, groups, heads, channels, size; // heads of a group; size: of the state
    int64_t taps, chunk, parts, threads;                 // parts: into how many the scan divides the heads of a group
    double floor, eps;                                   // floor: of dt
    const W* projected; // [row, t, z + x + B + C + dt]: z and x [g, h, p], B and C [g, n], dt [g, h]
    const R *weight, *bias, *dt_bias, *A, *D, *norm; // [k, c], [c], [g, h] thrice, [g, h p]
    const int64_t* documents;                        // [row, t], or null
    R* window;                                       // [row, k - 1, c] by its strides, or null: zeros
    int64_t window_row, window_step;
    R* state;                            // [row, g, h, p, n], or null: zeros. It and the window go on where they are
    R *mixed, *dt, *y, *states, *scales; // kept for backward; the last two may be null then, and y be `normed`
    W* normed;                           // [row, t, g h p]

    int64_t positions() const { return rows * length; }
    int64_t all() const { return groups * heads; }
    int64_t inner() const { return all() * channels; }
    int64_t pair() const { return 2 * groups * size; } // B and C
    int64_t convolved() const { return inner() + pair(); }
    int64_t step() const { return inner() + convolved() + all(); }
    bool one() const { return state && length == 1; } // a token that follows others
    const W* x() const { return projected + inner(); }

    // Of the channels from the first: all of them for a single token, else B and C, for the scan convolves x.
    Conv<R, W> conv(int64_t first) const {
        int64_t spread = (positions() + 2 * threads - 1) / (2 * threads);
        return {.rows = rows,
                .length = length,
                .channels = convolved() - first,
                .step = most(least(64, spread), 8),
                .threads = threads,
                .x = x() + first,
                .weight = weight + first,
                .bias = bias + first,
                .window = window ? window + first : nullptr,
                .x_row = length * step(),
                .x_step = step(),
                .window_row = window_row,
                .window_step = window_step,
                .weight_step = convolved(),
                .documents = documents};
    }
    Scan<R, W> scan() const {
        return {.rows = rows,
                .length = length,
                .groups = groups,
                .heads = heads,
                .channels = channels,
                .size = size,
                .chunk = chunk,
                .parts = parts,
                .threads = threads,
                .x = x(),
                .dt = dt,
                .A = A,
                .B = mixed,
                .C = mixed + groups * size,
                .D = D,
                .x_row = length * step(),
                .x_step = step(),
                .B_row = length * pair(),
                .B_step = pair(),
                .C_row = length * pair(),
                .C_step = pair(),
                .documents = documents,
                .taps = taps,
                .weight = weight,
                .bias = bias,
                .window = window,
                .weight_step = convolved(),
                .window_row = window_row,
                .window_step = window_step};
    }
    Norm<R, W> gated() const {
        return {.positions = positions(),
                .groups = groups,
                .width = heads * channels,
                .active = heads * channels,
                .step = positions() < 64 ? 1 : 16,
                .threads = threads,
                .x = y,
                .gate = projected,
                .weight = norm,
                .gate_step = step(),
                .eps = eps};
    }
};

// Tasks that go through positions one after the other, so that every thread has work
inline int64_t share_of(int64_t positions, int64_t threads) {
    return most((positions + 4 * threads - 1) / (4 * threads), 1);
}

// dt = softplus(raw + bias), or the floor
template <class R, class W> void dt_row(const Sequence<R, W>& s, int64_t at) {
    const W* raw = s.projected + (at + 1) * s.step() - s.all();
    for (int64_t i = 0; i < s.all(); i += Simd<R>::LANES) {
        int64_t left = s.all() - i;
        Vector<R> none{}, soft = softplus<R>(load(raw + i, left) + load(s.dt_bias + i, left));
        store(s.dt + at * s.all() + i, soft < R(s.floor) ? none + R(s.floor) : soft, left);
    }
}

// S = exp(dt A) S + dt x ⊗ B and y = S C + D x, of one head of one token; mixed is [row, c] here
template <class R, class W> void state_task(const Sequence<R, W>& s, int64_t task) {
    constexpr int LANES = Simd<R>::LANES;
    typedef Vector<R> V;
    int64_t head = task % s.all(), size = s.channels * s.size;
    const R* convolved = s.mixed + task / s.all() * s.convolved();
    const R *x = convolved + head * s.channels, *B = convolved + s.inner() + head / s.heads * s.size;
    const R* C = B + s.groups * s.size;
    R dt = s.dt[task], left = std::exp(dt * s.A[head]), *state = s.state + task * size, *to = s.y + task * s.channels;
    for (int64_t p = 0; p < s.channels; p += LANES) {
        int64_t count = least(LANES, s.channels - p);
        V found[LANES]{};
        for (int i = 0; i < count; i++) {
            R input = dt * x[p + i], *at = state + (p + i) * s.size;
            for (int64_t n = 0; n < s.size; n += LANES) {
                int64_t rest = s.size - n;
                V v = load(at + n, rest) * left + input * load(B + n, rest);
                store(at + n, v, rest);
                found[i] += v * load(C + n, rest);
            }
        }
        store(to + p, sums<R>(found) + s.D[head] * load(x + p, count), count);
    }
}

// The last inputs of a row are its window.
template <class R, class W> void window_row(const Sequence<R, W>& s, int64_t row) {
    R* window = s.window + row * s.window_row;
    for (int64_t k = 0; k < s.taps - 1; k++) {
        int64_t from = s.length + k; // of the window and the inputs behind it
        R* to = window + k * s.window_step;
        if (from < s.taps - 1)
            moved(to, window + from * s.window_step, s.convolved());
        else
            moved(to, s.x() + (row * s.length + from - s.taps + 1) * s.step(), s.convolved());
    }
}

template <class R, class W> void between(const Sequence<R, W>& s) {
    Conv<R, W> conv = s.conv(s.one() ? 0 : s.inner());
    Scan<R, W> scan = s.scan();
    Norm<R, W> norm = s.gated();
    auto convolve = s.taps == 2 ? conv_task<R, 2, W> : s.taps == 3 ? conv_task<R, 3, W> : conv_task<R, 4, W>;
#pragma omp parallel num_threads(threads_for(s.threads, s.positions() * s.inner() * s.size))
    {
#pragma omp for nowait
        for (int64_t at = 0; at < s.positions(); at++) dt_row(s, at);
#pragma omp for
        for (int64_t task = 0; task < conv.tasks(); task++) convolve(conv, task, s.mixed);
        if (s.one()) {
#pragma omp for
            for (int64_t task = 0; task < s.rows * s.all(); task++) state_task(s, task);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < scan.tasks(); task++) scan_task(scan, task, s.state, s.y, s.states, s.state);
        }
        if (s.window) {
#pragma omp for nowait
            for (int64_t row = 0; row < s.rows; row++) window_row(s, row);
        }
#pragma omp for
        for (int64_t task = 0; task < norm.tasks(); task++) norm_task(norm, task, s.normed, s.scales);
    }
}

template <class R, class W = R> struct SequenceGradients {
    const W* dnormed; // [row, t, g h p]
    W* dprojected;    // as what they are of
    R *dweight, *dbias, *ddt_bias, *dA, *dD, *dnorm;
    R *dmixed, *ddt; // work: [part, row, t, B + C], [row, t, g, h]
};

// Sums over the first axis of from [part, step], the first `count` of each
template <class R> void summed(R* to, const R* from, int64_t parts, int64_t step, int64_t count) {
    for (int64_t i = 0; i < count; i += Simd<R>::LANES) {
        Vector<R> total{};
        for (int64_t part = 0; part < parts; part++) total += load(from + part * step + i, count - i);
        store(to + i, total, count - i);
    }
}

// Of the raw dt of some positions, and their sum
template <class R, class W>
void dt_backward(const Sequence<R, W>& s, const SequenceGradients<R, W>& g, int64_t from, int64_t to, R* sum) {
    for (int64_t i = 0; i < s.all(); i += Simd<R>::LANES) {
        int64_t left = s.all() - i;
        Vector<R> total{};
        for (int64_t at = from; at < to; at++) {
            int64_t place = (at + 1) * s.step() - s.all() + i;
            Vector<R> none{}, raw = load(s.projected + place, left) + load(s.dt_bias + i, left);
            Vector<R> slope = raw > R(20) ? none + R(1) : sigmoid<R>(raw), dt = load(s.dt + at * s.all() + i, left);
            Vector<R> found = dt > R(s.floor) ? load(g.ddt + at * s.all() + i, left) * slope : none;
            store(g.dprojected + place, found, left);
            total += found;
        }
        store(sum + i, total, left);
    }
}

template <class R, class W> void between_backward(const Sequence<R, W>& s, const SequenceGradients<R, W>& g) {
    int64_t step = s.step(), pair = s.pair(), c = s.convolved(), inner = s.inner(), all = s.all(), rows = s.rows;
    Conv<R, W> conv = s.conv(inner);
    Scan<R, W> scan = s.scan();
    Norm<R, W> norm = s.gated();
    int64_t some = share_of(s.positions(), s.threads), shares = (s.positions() + some - 1) / some;
    norm.step = some, conv.step = most(least(some, s.length), 1);
    static thread_local Scratch scratch; // for sums of tasks
    int64_t taps = s.taps * (rows * c + conv.tasks() * pair), biases = rows * c + conv.tasks() * pair;
    scratch.reserve((norm.tasks() * inner + taps + biases + (2 * rows + shares) * all) * sizeof(R) + 1024);
    R* dnorm = scratch.take<R>(norm.tasks() * inner);
    R *dweight_x = scratch.take<R>(rows * s.taps * c), *dbias_x = scratch.take<R>(rows * c);
    R *dweight = scratch.take<R>(conv.tasks() * s.taps * pair), *dbias = scratch.take<R>(conv.tasks() * pair);
    R *dA = scratch.take<R>(rows * all), *dD = scratch.take<R>(rows * all), *ddt_bias = scratch.take<R>(shares * all);
    // z and x get the gradients of the gate and of y; what the latter becomes takes its place
    NormGradients<R, W> of_norm{.scales = s.scales,
                                .dy = g.dnormed,
                                .dx = g.dprojected + inner,
                                .dgate = g.dprojected,
                                .dweight = dnorm,
                                .dx_step = step,
                                .dgate_step = step};
    Gradients<R, W> of_scan{.states = s.states,
                            .dy = g.dprojected + inner,
                            .dlast = nullptr,
                            .dy_row = s.length * step,
                            .dy_step = step,
                            .dx = g.dprojected + inner,
                            .ddt = g.ddt,
                            .dA = dA,
                            .dB = g.dmixed,
                            .dC = g.dmixed + pair / 2,
                            .dD = dD,
                            .dfirst = nullptr,
                            .dx_row = s.length * step,
                            .dx_step = step,
                            .part = s.positions() * pair,
                            .dB_row = s.length * pair,
                            .dB_step = pair,
                            .dweight = dweight_x,
                            .dbias = dbias_x};
    ConvGradients<R, W> of_conv{.dy = g.dmixed,
                                .dx = g.dprojected + 2 * inner,
                                .dweight = dweight,
                                .dbias = dbias,
                                .dwindow = nullptr,
                                .dy_row = s.length * pair,
                                .dy_step = pair,
                                .dx_row = s.length * step,
                                .dx_step = step};
    auto convolve_back = s.taps == 2   ? conv_backward_task<R, 2, W>
                         : s.taps == 3 ? conv_backward_task<R, 3, W>
                                       : conv_backward_task<R, 4, W>;
#pragma omp parallel num_threads(threads_for(s.threads, s.positions() * inner * s.size))
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < norm.tasks(); task++) norm_backward_task(norm, task, of_norm);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < scan.tasks(); task++) scan_backward_task(scan, task, of_scan);
        if (scan.parts > 1) {
#pragma omp for
            for (int64_t at = 0; at < s.positions(); at++)
                summed(g.dmixed + at * pair, g.dmixed + at * pair, scan.parts, of_scan.part, pair);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < conv.tasks(); task++) convolve_back(conv, task, of_conv);
#pragma omp for
        for (int64_t task = 0; task < shares; task++)
            dt_backward(s, g, task * some, least((task + 1) * some, s.positions()), ddt_bias + task * all);
#pragma omp single
        {
            summed(g.dnorm, dnorm, norm.tasks(), inner, inner);
            for (int64_t k = 0; k < s.taps; k++) {
                summed(g.dweight + k * c, dweight_x + k * c, rows, s.taps * c, inner);
                summed(g.dweight + k * c + inner, dweight + k * pair, conv.tasks(), s.taps * pair, pair);
            }
            summed(g.dbias, dbias_x, rows, c, inner);
            summed(g.dbias + inner, dbias, conv.tasks(), pair, pair);
            summed(g.dA, dA, rows, all, all);
            summed(g.dD, dD, rows, all, all);
            summed(g.ddt_bias, ddt_bias, shares, all, all);
        }
    }
}
