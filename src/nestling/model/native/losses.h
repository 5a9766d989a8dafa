// The losses of positions by their logits, and the gradients, which take the logits' place.
//
//     kl T² KL(softmax(teacher / T) ‖ softmax(student / T)) - ce log softmax(student)[target]
#pragma once

#include "pointwise.h"

template <class R, class W> struct Losses { // W: of logits
    int64_t rows, vocabulary, threads;
    W *student, *teacher; // [row, vocabulary], the teacher's may be null; both are overwritten
    const int64_t* targets;
    double temperature, kl, ce, share; // where ce is not 0, T is 1; share: what gradients are multiplied by
    R* losses;                         // [row]
};

template <class R, class W> inline R largest(const W* from, int64_t count) {
    constexpr int LANES = Simd<R>::LANES;
    R found;
    moved(&found, from, 1);
    Vector<R> none{}, most = none + found;
    for (int64_t i = 0; i < count; i += LANES) {
        Vector<R> v = load(from + i, count - i);
        for (int lane = count - i; lane < LANES; lane++) v[lane] = found;
        most = v > most ? v : most;
    }
    for (int lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    return found;
}

template <class R, class W> void losses_task(const Losses<R, W>& s, int64_t row) {
    constexpr int LANES = Simd<R>::LANES, BLOCK = 64 * LANES; // of a block there are sums in R, of a row in double
    typedef Vector<R> V;
    thread_local Scratch scratch;
    int64_t count = s.vocabulary;
    W *student = s.student + row * count, *teacher = s.teacher ? s.teacher + row * count : nullptr;
    R *of_student, *of_teacher; // exponentials, where the logits were if they are as wide
    if constexpr (std::is_same_v<R, W>) {
        of_student = student, of_teacher = teacher;
    } else {
        scratch.reserve(2 * count * sizeof(R) + 128);
        of_student = scratch.take<R>(count), of_teacher = scratch.take<R>(count);
    }
    R per = R(1 / s.temperature), s_most = largest<R>(student, count),
      t_most = teacher ? largest<R>(teacher, count) : 0;
    R target = 0;
    if (s.ce) moved(&target, student + s.targets[row], 1);
    double at_target = (double)target - s_most;
    double s_total = 0, t_total = 0, cross = 0; // Σ exp s, Σ exp t, Σ exp t · (t - s)
    for (int64_t first = 0; first < count; first += BLOCK) {
        V s_sum{}, t_sum{}, cross_sum{};
        for (int64_t i = first; i < least(first + BLOCK, count); i += LANES) {
            int64_t left = count - i;
            V a = (load(student + i, left) - s_most) * per, ea = exponential<R>(within<R>(a, R(-80), R(80)));
            for (int lane = left; lane < LANES; lane++) ea[lane] = 0;
            s_sum += ea;
            store(of_student + i, ea, left);
            if (!teacher) continue;
            V b = (load(teacher + i, left) - t_most) * per, eb = exponential<R>(within<R>(b, R(-80), R(80)));
            for (int lane = left; lane < LANES; lane++) eb[lane] = 0;
            t_sum += eb;
            cross_sum += eb * (b - a);
            store(of_teacher + i, eb, left);
        }
        s_total += sum<R>(s_sum), t_total += sum<R>(t_sum), cross += sum<R>(cross_sum);
    }
    double loss = s.ce ? s.ce * (std::log(s_total) - at_target) : 0;
    if (teacher)
        loss += s.kl * s.temperature * s.temperature * (cross / t_total + std::log(s_total) - std::log(t_total));
    s.losses[row] = R(loss);
    double kl = teacher ? s.kl * s.temperature : 0;
    R by_student = R((kl + s.ce) * s.share / s_total), by_teacher = teacher ? R(kl * s.share / t_total) : 0;
    auto slope = [&](int64_t i, int64_t left) {
        V found = load(of_student + i, left) * by_student;
        return teacher ? found - load(of_teacher + i, left) * by_teacher : found;
    };
    if (s.ce) target = slope(s.targets[row], 1)[0] - R(s.ce * s.share);
    for (int64_t i = 0; i < count; i += LANES) store(student + i, slope(i, count - i), count - i);
    if (s.ce) moved(student + s.targets[row], &target, 1);
}
