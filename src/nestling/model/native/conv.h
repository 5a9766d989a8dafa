// The short causal convolution and its silu, forward and backward: what model/conv.py computes, in one pass.
//
// A task is some positions of one row. A vector of channels goes through them with its inputs and gradients in
// registers. The last vector may overlap the one before it: both write the same.
#pragma once

#include "pointwise.h"

template <class R, class W = R> struct Conv {      // W: of x
    int64_t rows, length, channels, step, threads; // step: positions of a task
    const W* x;
    const R *weight, *bias, *window;                // [k, c], [c], [row, k - 1, c]
    int64_t x_row, x_step, window_row, window_step; // strides; channels are contiguous
    int64_t weight_step;                            // between taps
    const int64_t* documents;                       // [row, length], or null

    int64_t blocks() const { return (length + step - 1) / step; }
    int64_t tasks() const { return rows * blocks(); }
    // the input at a position; before the sequence that of the window, or zeros where there is none
    template <int K> inline Vector<R> input(int64_t row, int64_t t, int64_t c) const {
        if (t >= 0) return load(x + row * x_row + t * x_step + c);
        return window ? load(window + row * window_row + (K - 1 + t) * window_step + c) : Vector<R>{};
    }
    // 1 if the input `back` positions before is of the same document
    inline R same(int64_t row, int64_t t, int64_t back) const {
        const int64_t* of = documents + row * length;
        return of[t] == of[most(t - back, 0)] ? R(1) : R(0);
    }
};

// what the positions of a task weigh to before the silu, one after the other
template <class R, int K, class W> struct Weighed {
    Vector<R> weight[K], bias, seen[K];
    const Conv<R, W>& s;
    int64_t row, c;

    Weighed(const Conv<R, W>& s, int64_t row, int64_t c, int64_t t) : s(s), row(row), c(c) {
        bias = load(s.bias + c);
        for (int k = 0; k < K; k++) weight[k] = load(s.weight + k * s.weight_step + c);
        for (int k = 1; k < K; k++) seen[k] = s.template input<K>(row, t - K + k, c);
    }
    inline Vector<R> at(int64_t t) {
        for (int k = 0; k < K - 1; k++) seen[k] = seen[k + 1];
        seen[K - 1] = s.template input<K>(row, t, c);
        Vector<R> total = bias;
        for (int k = 0; k < K; k++) total += weight[k] * visible(t, k);
        return total;
    }
    inline Vector<R> visible(int64_t t, int k) const {
        return s.documents == nullptr || k == K - 1 ? seen[k] : seen[k] * s.same(row, t, K - 1 - k);
    }
};

template <class R, int K, class W> void conv_task(const Conv<R, W>& s, int64_t task, R* y) {
    int64_t row = task / s.blocks(), first = task % s.blocks() * s.step, last = least(first + s.step, s.length);
    for (int64_t c = 0; c < s.channels; c += Simd<R>::LANES) {
        c = least(c, s.channels - Simd<R>::LANES);
        Weighed<R, K, W> weighed(s, row, c, first);
        for (int64_t t = first; t < last; t++) {
            Vector<R> v = weighed.at(t);
            store(y + (row * s.length + t) * s.channels + c, v * sigmoid<R>(v));
        }
    }
}

template <class R, class W = R> struct ConvGradients {
    const R* dy;
    W* dx;
    R *dweight, *dbias, *dwindow;             // dweight [task, k, c], dbias [task, c]; dwindow may be null
    int64_t dy_row, dy_step, dx_row, dx_step; // strides; channels are contiguous
};

template <class R, int K, class W>
void conv_backward_task(const Conv<R, W>& s, int64_t task, const ConvGradients<R, W>& g) {
    typedef Vector<R> V;
    int64_t row = task / s.blocks(), first = task % s.blocks() * s.step, last = least(first + s.step, s.length);
    for (int64_t c = 0; c < s.channels; c += Simd<R>::LANES) {
        c = least(c, s.channels - Simd<R>::LANES);
        Weighed<R, K, W> weighed(s, row, c, first);
        V dbias{}, dweight[K]{}, dsum[K]{}; // dsum: of the last K positions
        for (int64_t t = first; t < last + K - 1; t++) {
            for (int k = 0; k < K - 1; k++) dsum[k] = dsum[k + 1];
            dsum[K - 1] = V{};
            if (t < s.length) {
                V v = weighed.at(t), gate = sigmoid<R>(v);
                dsum[K - 1] = load(g.dy + row * g.dy_row + t * g.dy_step + c) * gate * (R(1) + v * (R(1) - gate));
            }
            if (t < last) {
                dbias += dsum[K - 1];
                for (int k = 0; k < K; k++) dweight[k] += dsum[K - 1] * weighed.visible(t, k);
            }
            int64_t to = t - (K - 1); // every position that sees this one is known
            if (to < first && (first > 0 || g.dwindow == nullptr)) continue;
            V total{};
            for (int back = 0; back < K; back++) {
                V part = dsum[back] * weighed.weight[K - 1 - back];
                bool apart = s.documents != nullptr && to + back >= 0 && to + back < s.length &&
                             s.same(row, to + back, back) == 0;
                total += apart ? V{} : part;
            }
            if (to < 0)
                store(g.dwindow + (row * (K - 1) + K - 1 + to) * s.channels + c, total);
            else
                store(g.dx + row * g.dx_row + to * g.dx_step + c, total);
        }
        store(g.dbias + task * s.channels + c, dbias);
        for (int k = 0; k < K; k++) store(g.dweight + (task * K + k) * s.channels + c, dweight[k]);
    }
}
