// One token of a Mamba-2 layer between its two projections: the convolution, the recurrence, the gated norm. The window
// of inputs and the state are changed in place.
#pragma once

#include "conv.h"

struct Step {
    Conv<float> conv;   // of one position
    float *convolved;   // [row, c]: x [g, h, p], B [g, n], C [g, n]
    float *window;      // the conv's own
    int64_t groups, heads, channels, states;
    const float *dt;    // [row, g, h], before the softplus
    int64_t dt_row;     // between its rows
    const float *dt_bias, *A, *D;
    float *state;       // [row, g, h, p, n]
    Norm<float> norm;   // of [row, g, h p], gated, in place

    int64_t tasks() const { return conv.rows * groups * heads; }
};

// S = exp(dt A) S + dt x ⊗ B and y = S C + D x, of one head
inline void state_task(const Step& s, float* y, int64_t task) {
    constexpr int LANES = Simd<float>::LANES;
    int64_t row = task / (s.groups * s.heads), head = task % (s.groups * s.heads), size = s.channels * s.states;
    const float* convolved = s.convolved + row * s.conv.channels;
    const float* B = convolved + s.groups * s.heads * s.channels + head / s.heads * s.states;
    const float *x = convolved + head * s.channels, *C = B + s.groups * s.states;
    float raw = s.dt[row * s.dt_row + head] + s.dt_bias[head];
    float dt = raw > 20 ? raw : std::log1p(std::exp(raw)), left = std::exp(dt * s.A[head]);
    float *state = s.state + task * size, *to = y + task * s.channels;
    for (int64_t p = 0; p < s.channels; p += LANES) {
        int64_t count = least(LANES, s.channels - p);
        Floats found[LANES]{};
        for (int i = 0; i < count; i++) {
            float input = dt * x[p + i], *at = state + (p + i) * s.states;
            for (int64_t n = 0; n < s.states; n += LANES) {
                int64_t rest = s.states - n;
                Floats v = load(at + n, rest) * left + input * load(B + n, rest);
                store(at + n, v, rest);
                found[i] += v * load(C + n, rest);
            }
        }
        store(to + p, sums(found) + s.D[head] * load(x + p, count), count);
    }
}

// The inputs of a row move one place on.
inline void window_task(const Step& s, int64_t taps, int64_t row) {
    float* window = s.window + row * s.conv.window_row;
    size_t bytes = s.conv.channels * sizeof(float);
    for (int64_t k = 0; k < taps - 1; k++)
        memcpy(window + k * s.conv.window_step,
               k < taps - 2 ? window + (k + 1) * s.conv.window_step : s.conv.x + row * s.conv.x_row, bytes);
}
