// What stands between the products, in one pass: the norm over a width, gated or not, and the squared ReLU.
#pragma once

#include "vectors.h"

template <class R> inline Vector<R> sigmoid(Vector<R> v) {
    return R(1) / (R(1) + exponential<R>(within<R>(-v, R(-80), R(80))));
}

// log(1 + exp(v)); log(1 + u) is twice the area tangent of u / (2 + u), at most 1/3
template <class R> inline Vector<R> softplus(Vector<R> v) {
    Vector<R> none{}, faint = exponential<R>(within<R>(v < R(0) ? v : -v, R(-80), R(0)));
    Vector<R> s = faint / (R(2) + faint), square = s * s, series{};
    for (int n = 2 * Simd<R>::DEGREE + 3; n > 0; n -= 2) series = series * square + R(1) / R(n);
    Vector<R> found = R(2) * s * series + (v < R(0) ? none : v);
    return v > R(20) ? v : found; // as torch has it
}

// y = v · scale · weight with v = x silu(gate) and scale = (Σ v² / active + eps)^-½, for every group of every position.
// W: of the gate and of y
template <class R, class W = R> struct Norm {
    int64_t positions, groups, width, active, step, threads; // step: positions of a task
    const R* x;                                              // contiguous
    const W* gate;                                           // or null
    const R* weight;                                         // [group, width]
    int64_t gate_step;                                       // between positions; what is inside is contiguous
    double eps;

    int64_t tasks() const { return (positions + step - 1) / step; }
};

template <class R, class W> void norm_task(const Norm<R, W>& s, int64_t task, W* y, R* scales) {
    constexpr int LANES = Simd<R>::LANES;
    thread_local Scratch scratch;
    scratch.reserve(up<R>(s.width) * sizeof(R));
    R* gated = scratch.take<R>(s.width);
    for (int64_t at = task * s.step; at < least((task + 1) * s.step, s.positions); at++)
        for (int64_t group = 0; group < s.groups; group++) {
            int64_t row = at * s.groups + group, left = s.width;
            const R *x = s.x + row * s.width, *weight = s.weight + group * s.width;
            const W* gate = s.gate ? s.gate + at * s.gate_step + group * s.width : nullptr;
            W* out = y + row * s.width;
            Vector<R> squares{};
            for (int64_t i = 0; i < s.width; i += LANES, left -= LANES) {
                Vector<R> v = load(x + i, left);
                if (gate) {
                    Vector<R> z = load(gate + i, left);
                    v *= z * sigmoid<R>(z);
                    store(gated + i, v);
                }
                squares += v * v;
            }
            R scale = R(1) / std::sqrt(sum<R>(squares) / s.active + R(s.eps));
            const R* from = gate ? gated : x;
            left = s.width;
            for (int64_t i = 0; i < s.width; i += LANES, left -= LANES)
                store(out + i, load(from + i, left) * scale * load(weight + i, left), left);
            if (scales) scales[row] = scale;
        }
}

template <class R, class W = R> struct NormGradients {
    const R* scales;
    const W* dy;
    W *dx, *dgate;
    R* dweight;                  // [task, group, width]
    int64_t dx_step, dgate_step; // between positions; what is inside is contiguous
};

// dv = scale · weight · dy - v · scale³ · Σ weight · dy · v / active
template <class R, class W> void norm_backward_task(const Norm<R, W>& s, int64_t task, const NormGradients<R, W>& g) {
    constexpr int LANES = Simd<R>::LANES;
    thread_local Scratch scratch;
    scratch.reserve(up<R>(s.width) * sizeof(R));
    R* sigmoids = scratch.take<R>(s.width);
    R* dweight = g.dweight + task * s.groups * s.width;
    memset(dweight, 0, s.groups * s.width * sizeof(R));
    for (int64_t at = task * s.step; at < least((task + 1) * s.step, s.positions); at++)
        for (int64_t group = 0; group < s.groups; group++) {
            int64_t row = at * s.groups + group, left = s.width;
            const R *x = s.x + row * s.width, *weight = s.weight + group * s.width;
            const W *gate = s.gate ? s.gate + at * s.gate_step + group * s.width : nullptr, *dy = g.dy + row * s.width;
            W* dx = g.dx + at * g.dx_step + group * s.width;
            R* dw = dweight + group * s.width;
            W* dgate = g.dgate ? g.dgate + at * g.dgate_step + group * s.width : nullptr;
            R scale = g.scales[row];
            Vector<R> along{};
            for (int64_t i = 0; i < s.width; i += LANES, left -= LANES) {
                Vector<R> v = load(x + i, left), d = load(dy + i, left);
                if (gate) {
                    Vector<R> z = load(gate + i, left), opened = sigmoid<R>(z);
                    v *= z * opened;
                    store(sigmoids + i, opened);
                }
                along += v * d * load(weight + i, left);
                store(dw + i, load(dw + i, left) + v * d * scale, left);
            }
            R back = sum<R>(along) * scale * scale * scale / s.active;
            left = s.width;
            for (int64_t i = 0; i < s.width; i += LANES, left -= LANES) {
                Vector<R> v = load(x + i, left), d = load(dy + i, left) * load(weight + i, left) * scale;
                if (gate) {
                    Vector<R> z = load(gate + i, left), opened = load(sigmoids + i), silu = z * opened;
                    d -= v * silu * back;
                    store(dgate + i, d * v * (opened + silu * (R(1) - opened)), left);
                    store(dx + i, d * silu, left);
                } else {
                    store(dx + i, d - v * back, left);
                }
            }
        }
}

// relu(x)², or its gradient 2 relu(x) dy where dy is given
template <class R, class W> void squared_relu_task(const W* x, const W* dy, W* out, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += Simd<R>::LANES) {
        Vector<R> none{}, v = load(x + i, last - i);
        v = v < R(0) ? none : v; // NaN stays
        store(out + i, v * (dy ? R(2) * load(dy + i, last - i) : v), last - i);
    }
}
