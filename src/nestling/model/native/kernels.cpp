// What the library gives away: one function per kernel and type. Arguments are the structs, field by field.

#include "conv.h"
#include "losses.h"
#include "pointwise.h"
#include "product.h"
#include "scan.h"
#include "step.h"

template <class F> static void each(int64_t tasks, int64_t threads, F f) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) f(task);
}

template <class R, int K> static void convolve(const Conv<R>& s, R* y) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_task<R, K>(s, task, y); });
}
template <class R, int K> static void convolve_back(const Conv<R>& s, const ConvGradients<R>& g) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_backward_task<R, K>(s, task, g); });
}

template <class R> struct ScanRun {
    Scan<R> scan;
    const R* first;
    R *y, *states, *last; // states may be null: nothing is kept for backward
};
template <class R> struct ScanBackwardRun {
    Scan<R> scan;
    Gradients<R> gradients;
};
template <class R> struct ConvRun {
    int64_t taps;
    Conv<R> conv;
    R* y;
};
template <class R> struct ConvBackwardRun {
    int64_t taps;
    Conv<R> conv;
    ConvGradients<R> gradients;
};
struct StepRun {
    int64_t taps;
    Step step;
    float* y;
};
template <class R> struct NormRun {
    Norm<R> norm;
    R *y, *scales; // scales may be null
};
template <class R> struct NormBackwardRun {
    Norm<R> norm;
    NormGradients<R> gradients;
};
template <class R> struct SquaredReluRun {
    int64_t count, step, threads;
    const R *x, *dy; // dy may be null
    R* out;
};

#define EXPORT(R)                                                                                                      \
    int64_t lanes_##R() { return Simd<R>::LANES; }                                                                     \
    void scan_##R(const ScanRun<R>* a) {                                                                               \
        each(a->scan.tasks(), a->scan.threads,                                                                         \
             [&](int64_t task) { scan_task<R>(a->scan, task, a->first, a->y, a->states, a->last); });                  \
    }                                                                                                                  \
    void scan_backward_##R(const ScanBackwardRun<R>* a) {                                                              \
        each(a->scan.tasks(), a->scan.threads,                                                                         \
             [&](int64_t task) { scan_backward_task<R>(a->scan, task, a->gradients); });                               \
    }                                                                                                                  \
    void conv_##R(const ConvRun<R>* a) {                                                                               \
        auto run = a->taps == 2 ? convolve<R, 2> : a->taps == 3 ? convolve<R, 3> : convolve<R, 4>;                     \
        run(a->conv, a->y);                                                                                            \
    }                                                                                                                  \
    void conv_backward_##R(const ConvBackwardRun<R>* a) {                                                              \
        auto run = a->taps == 2 ? convolve_back<R, 2> : a->taps == 3 ? convolve_back<R, 3> : convolve_back<R, 4>;      \
        run(a->conv, a->gradients);                                                                                    \
    }                                                                                                                  \
    void norm_##R(const NormRun<R>* a) {                                                                               \
        each(a->norm.tasks(), a->norm.threads, [&](int64_t task) { norm_task<R>(a->norm, task, a->y, a->scales); });   \
    }                                                                                                                  \
    void norm_backward_##R(const NormBackwardRun<R>* a) {                                                              \
        each(a->norm.tasks(), a->norm.threads,                                                                         \
             [&](int64_t task) { norm_backward_task<R>(a->norm, task, a->gradients); });                               \
    }                                                                                                                  \
    void losses_##R(const Losses<R>* s) {                                                                              \
        each(s->rows, s->threads, [&](int64_t row) { losses_task<R>(*s, row); });                                      \
    }                                                                                                                  \
    void squared_relu_##R(const SquaredReluRun<R>* a) {                                                                \
        each((a->count + a->step - 1) / a->step, a->threads, [&](int64_t task) {                                       \
            squared_relu_task<R>(a->x, a->dy, a->out, task * a->step, least((task + 1) * a->step, a->count));          \
        });                                                                                                            \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
void step_float(const StepRun* a) {
    const Step& s = a->step;
    auto convolved = a->taps == 2 ? conv_task<float, 2> : a->taps == 3 ? conv_task<float, 3> : conv_task<float, 4>;
#pragma omp parallel num_threads(s.conv.threads)
    {
#pragma omp for
        for (int64_t row = 0; row < s.conv.rows; row++) {
            convolved(s.conv, row, s.convolved);
            window_task(s, a->taps, row);
        }
#pragma omp for
        for (int64_t task = 0; task < s.tasks(); task++) state_task(s, a->y, task);
#pragma omp for
        for (int64_t task = 0; task < s.norm.tasks(); task++) norm_task<float>(s.norm, task, a->y, nullptr);
    }
}
void few_float(const Product* s) {
    each((s->outputs + FEW_OUTPUTS - 1) / FEW_OUTPUTS, s->threads,
         [&](int64_t task) { s->bfloat ? few_task<uint16_t>(*s, task) : few_task<float>(*s, task); });
}
void many_float(const Product* s) {
    constexpr int LANES = Simd<float>::LANES;
    static thread_local Scratch scratch;
    int64_t size = up<float>(s->count) * s->inputs;
    scratch.reserve(size * sizeof(float));
    float* turned = scratch.take<float>(size);
#pragma omp parallel num_threads(s->threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < (s->inputs + LANES - 1) / LANES; task++) turn_task(*s, turned, task);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (s->outputs + many_outputs(*s) - 1) / many_outputs(*s); task++)
            s->bfloat ? many_task<uint16_t>(*s, turned, task) : many_task<float>(*s, turned, task);
    }
}
}
