// What the library gives away: one function per kernel and type of its tensors, STORED; sums are in REAL. Arguments are
// the structs, field by field.

#include "attention.h"
#include "conv.h"
#include "losses.h"
#include "sequence.h"

typedef REAL R;
typedef STORED W;

static void attend_back(const Attention<R, W>& s, const AttentionGradients<R, W>& g) {
    each(s.rows * s.all() * s.parts, s.working(), [&](int64_t task) { attention_backward_task(s, task, g); });
    each(2 * s.tasks(), s.working(), [&](int64_t task) {
        task % 2 ? attention_sum_task(s, task / 2, g.partial_dkey, g.dkey)
                 : attention_sum_task(s, task / 2, g.partial_dvalue, g.dvalue);
    });
}
template <int K> static void convolve(const Conv<R>& s, R* y) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_task<R, K>(s, task, y); });
}
template <int K> static void convolve_back(const Conv<R>& s, const ConvGradients<R>& g) {
    each(s.tasks(), s.threads, [&](int64_t task) { conv_backward_task<R, K>(s, task, g); });
}

struct AttentionRun {
    Attention<R, W> attention;
    W* y;
    R* logsumexp; // or null
};
struct AttentionBackwardRun {
    Attention<R, W> attention;
    AttentionGradients<R, W> gradients;
};
struct ScanRun {
    Scan<R> scan;
    const R* first;
    R *y, *states, *last; // states may be null: nothing is kept for backward
};
struct ScanBackwardRun {
    Scan<R> scan;
    Gradients<R> gradients;
};
struct ConvRun {
    int64_t taps;
    Conv<R> conv;
    R* y;
};
struct ConvBackwardRun {
    int64_t taps;
    Conv<R> conv;
    ConvGradients<R> gradients;
};
struct SequenceBackwardRun {
    Sequence<R, W> sequence;
    SequenceGradients<R, W> gradients;
};
struct NormRun {
    Norm<R> norm;
    R *y, *scales; // scales may be null
};
struct NormBackwardRun {
    Norm<R> norm;
    NormGradients<R> gradients;
};
struct SquaredReluRun {
    int64_t count, step, threads;
    const W *x, *dy; // dy may be null
    W* out;
};

#define JOINED(name, type) name##_##type
#define NAMED(name, type) JOINED(name, type)
#define NAME(name) NAMED(name, STORED)

extern "C" {
int64_t NAME(lanes)() { return Simd<R>::LANES; }
void NAME(attention)(const AttentionRun* a) {
    each(a->attention.tasks(), a->attention.working(),
         [&](int64_t task) { attention_task(a->attention, task, a->y, a->logsumexp); });
}
void NAME(attention_backward)(const AttentionBackwardRun* a) { attend_back(a->attention, a->gradients); }
void NAME(sequence)(const Sequence<R, W>* s) { between(*s); }
void NAME(sequence_backward)(const SequenceBackwardRun* a) { between_backward(a->sequence, a->gradients); }
void NAME(losses)(const Losses<R, W>* s) {
    each(s->rows, s->threads, [&](int64_t row) { losses_task(*s, row); });
}
void NAME(squared_relu)(const SquaredReluRun* a) {
    each((a->count + a->step - 1) / a->step, a->threads, [&](int64_t task) {
        squared_relu_task<R>(a->x, a->dy, a->out, task * a->step, least((task + 1) * a->step, a->count));
    });
}

#ifndef NARROW // between these and the products numbers are widened
void NAME(scan)(const ScanRun* a) {
    each(a->scan.tasks(), a->scan.threads,
         [&](int64_t task) { scan_task<R>(a->scan, task, a->first, a->y, a->states, a->last); });
}
void NAME(scan_backward)(const ScanBackwardRun* a) {
    each(a->scan.tasks(), a->scan.threads, [&](int64_t task) { scan_backward_task<R>(a->scan, task, a->gradients); });
}
void NAME(conv)(const ConvRun* a) {
    auto run = a->taps == 2 ? convolve<2> : a->taps == 3 ? convolve<3> : convolve<4>;
    run(a->conv, a->y);
}
void NAME(conv_backward)(const ConvBackwardRun* a) {
    auto run = a->taps == 2 ? convolve_back<2> : a->taps == 3 ? convolve_back<3> : convolve_back<4>;
    run(a->conv, a->gradients);
}
void NAME(norm)(const NormRun* a) {
    each(a->norm.tasks(), a->norm.threads, [&](int64_t task) { norm_task<R>(a->norm, task, a->y, a->scales); });
}
void NAME(norm_backward)(const NormBackwardRun* a) {
    each(a->norm.tasks(), a->norm.threads, [&](int64_t task) { norm_backward_task<R>(a->norm, task, a->gradients); });
}
#endif
}
