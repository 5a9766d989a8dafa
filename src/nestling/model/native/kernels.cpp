// What the library gives away: one function per kernel and type. Arguments are the structs, field by field.

#include "attention.h"
#include "conv.h"
#include "layer.h"
#include "losses.h"

template <class R> static void attend_back(const Attention<R>& s, const AttentionGradients<R>& g) {
    each(s.rows * s.all() * s.parts, s.working(), [&](int64_t task) { attention_backward_task<R>(s, task, g); });
    each(2 * s.tasks(), s.working(), [&](int64_t task) {
        task % 2 ? attention_sum_task<R>(s, task / 2, g.partial_dkey, g.dkey)
                 : attention_sum_task<R>(s, task / 2, g.partial_dvalue, g.dvalue);
    });
}
template <class R, int K> static void convolve(const Conv<R>& s, R* y) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_task<R, K>(s, task, y); });
}
template <class R, int K> static void convolve_back(const Conv<R>& s, const ConvGradients<R>& g) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_backward_task<R, K>(s, task, g); });
}

template <class R> struct AttentionRun {
    Attention<R> attention;
    R *y, *logsumexp; // logsumexp may be null
};
template <class R> struct AttentionBackwardRun {
    Attention<R> attention;
    AttentionGradients<R> gradients;
};
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
template <class R> struct SequenceBackwardRun {
    Sequence<R> sequence;
    SequenceGradients<R> gradients;
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
    void attention_##R(const AttentionRun<R>* a) {                                                                     \
        each(a->attention.tasks(), a->attention.working(),                                                             \
             [&](int64_t task) { attention_task<R>(a->attention, task, a->y, a->logsumexp); });                        \
    }                                                                                                                  \
    void attention_backward_##R(const AttentionBackwardRun<R>* a) { attend_back<R>(a->attention, a->gradients); }      \
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
    void sequence_##R(const Sequence<R>* s) { between(*s); }                                                           \
    void sequence_backward_##R(const SequenceBackwardRun<R>* a) { between_backward(a->sequence, a->gradients); }       \
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
void few_float(const Product* s) { few(*s); }
void many_float(const Product* s) { many(*s); }
void mlp_float(const Mlp* s) { mlp(*s); }
void mamba_float(const Mamba* s) { mamba(*s); }
}
