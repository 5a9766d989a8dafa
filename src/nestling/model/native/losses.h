// The losses of positions by their logits, and the gradients, which take the logits' place.
//
//     kl T² KL(softmax(teacher / T) ‖ softmax(student / T)) - ce log softmax(student)[target]
#pragma once

#include "pointwise.h"

template <class R> struct Losses {
    int64_t rows, vocabulary, threads;
    R *student, *teacher; // [row, vocabulary], the teacher's may be null; both are overwritten
    const int64_t* targets;
    double temperature, kl, ce; // where ce is not 0, T is 1
    R* losses;                  // [row]
};

template <class R> inline R largest(const R* from, int64_t count) {
    constexpr int LANES = Simd<R>::LANES;
    R found = from[0];
    int64_t i = 0;
    if (count >= LANES) {
        Vector<R> most = load(from);
        for (; i + LANES <= count; i += LANES) {
            Vector<R> v = load(from + i);
            most = v > most ? v : most;
        }
        for (int lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    }
    for (; i < count; i++) found = from[i] > found ? from[i] : found;
    return found;
}

template <class R> void losses_task(const Losses<R>& s, int64_t row) {
    constexpr int LANES = Simd<R>::LANES, BLOCK = 64 * LANES; // of a block there are sums in R, of a row in double
    typedef Vector<R> V;
    int64_t count = s.vocabulary;
    R *student = s.student + row * count, *teacher = s.teacher ? s.teacher + row * count : nullptr;
    R per = R(1 / s.temperature), s_most = largest(student, count), t_most = teacher ? largest(teacher, count) : 0;
    double at_target = s.ce ? (double)student[s.targets[row]] - s_most : 0;
    double s_total = 0, t_total = 0, cross = 0; // Σ exp s, Σ exp t, Σ exp t · (t - s)
    for (int64_t first = 0; first < count; first += BLOCK) {
        V s_sum{}, t_sum{}, cross_sum{};
        for (int64_t i = first; i < least(first + BLOCK, count); i += LANES) {
            int64_t left = count - i;
            V a = (load(student + i, left) - s_most) * per, ea = exponential<R>(within<R>(a, R(-80), R(80)));
            for (int lane = left; lane < LANES; lane++) ea[lane] = 0;
            s_sum += ea;
            store(student + i, ea, left);
            if (!teacher) continue;
            V b = (load(teacher + i, left) - t_most) * per, eb = exponential<R>(within<R>(b, R(-80), R(80)));
            for (int lane = left; lane < LANES; lane++) eb[lane] = 0;
            t_sum += eb;
            cross_sum += eb * (b - a);
            store(teacher + i, eb, left);
        }
        s_total += sum<R>(s_sum), t_total += sum<R>(t_sum), cross += sum<R>(cross_sum);
    }
    double loss = s.ce * (std::log(s_total) - at_target);
    if (teacher)
        loss += s.kl * s.temperature * s.temperature * (cross / t_total + std::log(s_total) - std::log(t_total));
    s.losses[row] = R(loss);
    double kl = teacher ? s.kl * s.temperature : 0;
    R by_student = R((kl + s.ce) / s_total), by_teacher = teacher ? R(kl / t_total) : 0;
    for (int64_t i = 0; i < count; i += LANES) {
        V slope = load(student + i, count - i) * by_student;
        if (teacher) slope -= load(teacher + i, count - i) * by_teacher;
        store(student + i, slope, count - i);
    }
    if (s.ce) student[s.targets[row]] -= R(s.ce);
}
