// The chunked scan of Mamba-2, forward and backward (Dao & Gu 2024, arXiv 2405.21060, section 6).
//
// What it computes, and the gradient of the decays, are those of model/scan.py. A task is some heads of one group of
// one row; it goes through the chunks in order, and everything of a chunk stays in the cache. States are kept
// transposed, [n, p], so that every product reads whole vectors. x may be convolved on the way: then neither the result
// nor its gradient is ever in memory as a whole.
#pragma once

#include "pointwise.h"

constexpr int MOST_TAPS = 4;

template <class R, class W = R> struct Scan {                   // W: of x
    int64_t rows, length, groups, heads, channels, size, chunk; // heads of a group; size: of the state
    int64_t parts, threads;                                     // into how many tasks the heads of a group are divided
    const W* x;
    const R *dt, *A, *B, *C, *D;
    int64_t x_row, x_step, B_row, B_step, C_row, C_step; // strides; what is inside is contiguous
    const int64_t* documents;                            // [row, length], or null
    int64_t taps;                                        // of the convolution of x; 0: there is none
    const R *weight, *bias, *window;                     // [k, c], [c], [row, k - 1, c]; window may be null: zeros
    int64_t weight_step, window_row, window_step;

    int64_t chunks() const { return (length + chunk - 1) / chunk; }
    int64_t wide() const { return up<R>(channels); }
    int64_t state() const { return rows_of(size) * wide(); } // elements of one, [n, p] with zeros around
    int64_t share() const { return (heads + parts - 1) / parts; }
    int64_t tasks() const { return rows * groups * parts; }
};

// Rows that lie far apart, as the machine cannot guess: they are on their way while something else is computed.
template <class R> inline void soon(const R* from, int64_t step, int64_t rows, int64_t count) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < count; i += 64 / sizeof(R)) __builtin_prefetch(from + t * step + i, 0, 2);
}

// A state [p, n], or zeros, as it is kept here, [n, p] with zeros around
template <class R, class W> void kept(R* to, const R* state, const Scan<R, W>& s) {
    memset(to, 0, s.state() * sizeof(R));
    if (state == nullptr) return;
    for (int64_t p = 0; p < s.channels; p++)
        for (int64_t n = 0; n < s.size; n++) to[n * s.wide() + p] = state[p * s.size + n];
}

template <class R, class W> void given(R* state, const R* from, const Scan<R, W>& s) {
    for (int64_t p = 0; p < s.channels; p++)
        for (int64_t n = 0; n < s.size; n++) state[p * s.size + n] = from[n * s.wide() + p];
}

// One chunk as one head sees it: the logarithms of its decays and what follows from them.
template <class R, class W> struct Chunk {
    int64_t start, count, row, group, before; // before: the document that the state before it belongs to
    const int64_t* documents;
    bool whole;                                // all of one document, that of the state before it
    R *dt, *log, *from_start, *to_end, *input; // [T]; input: dt · to_end
    R through;

    Chunk(const Scan<R, W>& s, Scratch& scratch, int64_t row, int64_t group) : row(row), group(group) {
        int64_t width = up<R>(rows_of(s.chunk));
        for (R** each : {&dt, &log, &from_start, &to_end, &input}) *each = scratch.take<R>(width);
    }
    void at(const Scan<R, W>& s, int64_t number) {
        start = number * s.chunk;
        count = least(s.chunk, s.length - start);
        whole = true;
        if (s.documents == nullptr) return;
        const int64_t* of = s.documents + row * s.length;
        documents = of + start;
        before = of[most(start - 1, 0)];
        for (int64_t t = 0; t < count; t++) whole = whole && documents[t] == before;
    }
    void of(const Scan<R, W>& s, int64_t head) {
        int64_t width = up<R>(rows_of(s.chunk)), heads = s.groups * s.heads;
        const R* given = s.dt + (row * s.length + start) * heads + group * s.heads + head;
        R a = s.A[group * s.heads + head], total = 0;
        for (int64_t t = 0; t < width; t++) {
            dt[t] = t < count ? given[t * heads] : 0;
            log[t] = total += dt[t] * a;
        }
        for (int64_t t = 0; t < width; t += Simd<R>::LANES) {
            store(from_start + t, faded<R>(load(log + t)));
            store(to_end + t, faded<R>(log[count - 1] - load(log + t)));
        }
        through = from_start[count - 1];
        for (int64_t t = 0; t < width; t++) {
            if (t >= count) from_start[t] = to_end[t] = 0;
            if (!whole && t < count && documents[t] != before) from_start[t] = 0;
            if (!whole && t < count && documents[t] != documents[count - 1]) to_end[t] = 0;
            input[t] = dt[t] * to_end[t];
        }
        if (!whole && documents[count - 1] != before) through = 0;
    }

    // f(s, decay from s to t) over vectors of s that cover 0 … t and its tile; zero after t and in other documents
    template <class F> inline void decays(int64_t t, F f) const {
        for (int64_t s = 0; s < rows_of(t + 1); s += Simd<R>::LANES) {
            Vector<R> decay = faded<R>(log[t] - load(log + s));
            if (!whole || s + Simd<R>::LANES > t + 1)
                for (int lane = 0; lane < Simd<R>::LANES; lane++)
                    if (s + lane > t || (!whole && documents[s + lane] != documents[t])) decay[lane] = 0;
            f(s, decay);
        }
    }
};

// The x of one chunk of one head, in tiles [T, P]: as it lies in memory, or convolved. Fewer taps than K are K of which
// the first are zero.
template <class R, class W> class Inputs {
    typedef Vector<R> V;
    static constexpr int LANES = Simd<R>::LANES, K = MOST_TAPS;
    const Scan<R, W>& s;
    const int64_t P, missing; // missing: taps that are zero
    R *seen, *taps;           // [K - 1 + T, P] from K - 1 positions before the chunk; [K, P]
    R *bias, *slopes;         // [P]; [T + K - 1, P] of x by what the convolution weighed to, if gradients are made

    const W* lies(int64_t row, int64_t t, int64_t head) const {
        return s.x + row * s.x_row + t * s.x_step + head * s.channels;
    }
    template <class From> void row(R* to, const From* from) const { // null: zeros
        int64_t have = from ? s.channels : 0;
        if (have) moved(to, from, have);
        memset(to + have, 0, (P - have) * sizeof(R));
    }
    void before(R* to, int64_t row, int64_t t, int64_t head) const { // of the window, or zeros
        const R* window = s.window && t >= 1 - s.taps ? s.window : nullptr;
        if (window) window += row * s.window_row + (s.taps - 1 + t) * s.window_step + head * s.channels;
        this->row(to, window);
    }
    // Whether tap k of the position at t is of another document
    bool apart(int64_t row, int64_t t, int k) const {
        if (s.documents == nullptr || t >= s.length) return false;
        const int64_t* of = s.documents + row * s.length;
        return of[t] != of[most(t - (K - 1 - k), 0)];
    }

  public:
    static constexpr int64_t LEFT = 2 * K; // rows [P] that `write` keeps of each head

    static int64_t room(const Scan<R, W>& s) {
        return s.taps ? (2 * (up<R>(rows_of(s.chunk)) + K) + K + 1) * s.wide() + 64 : 0;
    }
    Inputs(const Scan<R, W>& s, Scratch& scratch) : s(s), P(s.wide()), missing(K - s.taps) {
        if (s.taps == 0) return;
        int64_t rows = up<R>(rows_of(s.chunk)) + K;
        seen = scratch.take<R>(rows * P), slopes = scratch.take<R>(rows * P);
        taps = scratch.take<R>(K * P), bias = scratch.take<R>(P);
    }
    // head: of all groups; sloped: whether `write` follows
    void read(R* x, const Chunk<R, W>& chunk, int64_t head, bool sloped) {
        if (s.taps == 0) return copied(x, P, lies(chunk.row, chunk.start, head), s.x_step, chunk.count, s.channels);
        int64_t first = head * s.channels;
        for (int k = 0; k < K; k++)
            row<R>(taps + k * P, k < missing ? nullptr : s.weight + (k - missing) * s.weight_step + first);
        row(bias, s.bias + first);
        for (int64_t r = 0; r < K - 1 + chunk.count; r++) {
            int64_t t = chunk.start + r - (K - 1);
            t < 0 ? before(seen + r * P, chunk.row, t, head) : row(seen + r * P, lies(chunk.row, t, head));
        }
        for (int64_t p = 0; p < P; p += LANES)
            for (int64_t t = 0; t < chunk.count; t++) {
                V v = load(bias + p);
#pragma GCC unroll 4
                for (int k = 0; k < K; k++)
                    if (!apart(chunk.row, chunk.start + t, k))
                        v += load(taps + k * P + p) * load(seen + (t + k) * P + p);
                V gate = sigmoid<R>(v);
                store(x + t * P + p, v * gate);
                if (sloped) store(slopes + t * P + p, gate * (R(1) + v * (R(1) - gate)));
            }
        memset(x + chunk.count * P, 0, (rows_of(chunk.count) - chunk.count) * P * sizeof(R));
    }
    void soon(const Chunk<R, W>& chunk, int64_t head) const {
        ::soon(lies(chunk.row, chunk.start, head), s.x_step, chunk.count, s.channels);
    }
    // Gradients of what was read last, from those of x. left: [K - 1, P] what the positions after the chunk leave to
    // it, and then what it leaves to those before; and the sums of the gradients of the taps and the bias, [K + 1, P].
    void write(const R* dx, const Chunk<R, W>& chunk, R* left, W* to, int64_t step) {
        if (s.taps == 0) {
            for (int64_t t = 0; t < chunk.count; t++) moved(to + t * step, dx + t * P, s.channels);
            return;
        }
        R *later = left, *sums = left + (K - 1) * P;
        for (int64_t p = 0; p < P; p += LANES) {
            V dbias = load(sums + K * P + p), dtaps[K];
            for (int k = 0; k < K; k++) dtaps[k] = load(sums + k * P + p);
            for (int64_t t = 0; t < chunk.count; t++) {
                V slope = load(dx + t * P + p) * load(slopes + t * P + p);
                store(slopes + t * P + p, slope); // of what was weighed to
                dbias += slope;
#pragma GCC unroll 4
                for (int k = 0; k < K; k++)
                    if (!apart(chunk.row, chunk.start + t, k)) dtaps[k] += slope * load(seen + (t + k) * P + p);
            }
            store(sums + K * P + p, dbias);
            for (int k = 0; k < K; k++) store(sums + k * P + p, dtaps[k]);
            for (int64_t j = 0; j < K - 1; j++) store(slopes + (chunk.count + j) * P + p, load(later + j * P + p));
            for (int64_t j = 0; j < K - 1; j++) store(later + j * P + p, load(slopes + j * P + p));
            for (int64_t t = 0; t < chunk.count; t++) {
                V total{};
#pragma GCC unroll 4
                for (int k = 0; k < K; k++) {
                    int64_t at = t + K - 1 - k; // it sees this one by tap k
                    if (!apart(chunk.row, chunk.start + at, k))
                        total += load(taps + k * P + p) * load(slopes + at * P + p);
                }
                store(to + t * step + p, total, s.channels - p);
            }
        }
    }
    // The sums that `write` made of one head, as one row of all of them
    void sums(const R* left, int64_t row, int64_t head, R* dweight, R* dbias) const {
        if (s.taps == 0) return;
        int64_t first = head * s.channels;
        for (int k = missing; k < K; k++)
            memcpy(dweight + (row * s.taps + k - missing) * s.weight_step + first, left + (K - 1 + k) * P,
                   s.channels * sizeof(R));
        memcpy(dbias + row * s.weight_step + first, left + (K - 1 + K) * P, s.channels * sizeof(R));
    }
};

// G = C Bᵀ where s <= t, in whole tiles
template <class R>
void scores(R* G, int64_t T, const R* C, const R* B_turned, int64_t state, int64_t count, int64_t wide) {
    for (int64_t t = 0; t < count; t += ROWS)
        across<R>(least(up<R>(t + ROWS), T), [&](auto& tile, int64_t s) {
            tile.add(C + t * wide, wide, 1, B_turned + s, T, 0, state);
            tile.put(G + t * T + s, T);
        });
}

template <class R, class W>
void scan_task(const Scan<R, W>& s, int64_t task, const R* first, R* y, R* states, R* last) {
    thread_local Scratch scratch;
    int64_t part = task % s.parts, group = task / s.parts % s.groups, row = task / s.parts / s.groups;
    int64_t T = up<R>(rows_of(s.chunk)), P = s.wide(), N = up<R>(s.size), all = s.groups * s.heads;
    int64_t room = s.share() * s.state() + 2 * T * (T + N + P) + rows_of(s.size) * T + 8 * T + Inputs<R, W>::room(s);
    scratch.reserve(room * sizeof(R) + 4096);
    R* own = scratch.take<R>(s.share() * s.state());
    R *B = scratch.take<R>(T * N), *C = scratch.take<R>(T * N), *turn = scratch.take<R>(rows_of(s.size) * T);
    R *G = scratch.take<R>(T * T), *M = scratch.take<R>(T * T), *x = scratch.take<R>(T * P),
      *ended = scratch.take<R>(T * P);
    Chunk<R, W> chunk(s, scratch, row, group);
    Inputs<R, W> inputs(s, scratch);

    int64_t from = part * s.share(), to = least(from + s.share(), s.heads);
    auto place = [&](int64_t number, int64_t head) { // of a state before a chunk
        return states + ((number * s.rows + row) * all + group * s.heads + head) * s.state();
    };
    auto outside = [&](int64_t head) { return ((row * s.groups + group) * s.heads + head) * s.channels * s.size; };
    for (int64_t head = from; head < to; head++)
        kept(states ? place(0, head) : own + (head - from) * s.state(), first ? first + outside(head) : nullptr, s);
    for (int64_t number = 0; number < s.chunks(); number++) {
        chunk.at(s, number);
        int64_t count = chunk.count, start = chunk.start;
        copied(C, N, s.C + row * s.C_row + start * s.C_step + group * s.size, s.C_step, count, s.size);
        copied(B, N, s.B + row * s.B_row + start * s.B_step + group * s.size, s.B_step, count, s.size);
        turned(turn, T, B, N, count, s.size);
        scores(G, T, C, turn, s.size, count, N);
        for (int64_t head = from; head < to; head++) {
            chunk.of(s, head);
            R d = s.D[group * s.heads + head];
            R* before = states ? place(number, head) : own + (head - from) * s.state();
            R* after = states ? place(number + 1, head) : before;
            inputs.read(x, chunk, group * s.heads + head, false);
            if (head + 1 < to) inputs.soon(chunk, group * s.heads + head + 1);
            for (int64_t t = 0; t < rows_of(count); t++)
                for (int64_t p = 0; p < P; p += Simd<R>::LANES)
                    store(ended + t * P + p, load(x + t * P + p) * chunk.input[t]);
            for (int64_t t = 0; t < count; t++)
                chunk.decays(t, [&](int64_t i, Vector<R> decay) {
                    store(M + t * T + i, load(G + t * T + i) * decay * load(chunk.dt + i));
                });
            for (int64_t t = 0; t < count; t += ROWS)
                across<R>(P, [&](auto& tile, int64_t p) {
                    tile.add(C + t * N, N, 1, before + p, P, 0, s.size);
                    tile.scale(chunk.from_start + t);
                    tile.add(M + t * T, T, 1, x + p, P, 0, least(t + ROWS, count));
                    int64_t at = ((row * s.length + start + t) * all + group * s.heads + head) * s.channels + p;
                    tile.each(count - t, s.channels - p, [&](int64_t r, int64_t i, Vector<R> found, int64_t left) {
                        store(y + at + r * all * s.channels + i, found + d * load(x + (t + r) * P + p + i), left);
                    });
                });
            for (int64_t n = 0; n < s.size; n += ROWS)
                across<R>(P, [&](auto& tile, int64_t p) {
                    tile.add_times(before + n * P + p, chunk.through, P);
                    tile.add(B + n, 1, N, ended + p, P, 0, count);
                    tile.put(after + n * P + p, P);
                });
        }
    }
    for (int64_t head = from; head < to && last; head++)
        given(last + outside(head), states ? place(s.chunks(), head) : own + (head - from) * s.state(), s);
}

template <class R, class W = R> struct Gradients {
    const R* states;
    const W* dy;
    const R* dlast; // or null: zeros
    int64_t dy_row, dy_step;
    W* dx;
    R *ddt, *dA, *dB, *dC, *dD, *dfirst;            // dA and dD per row [row, head], dB and dC per part [part, row, …]
    int64_t dx_row, dx_step, part, dB_row, dB_step; // strides; those of dB are dC's
    R *dweight, *dbias;                             // of the convolution, per row [row, k, c], [row, c]
};

// With a_t the sum of dt A up to t in its chunk, its gradient is dy_t · r_t - du_t · u_t, as in model/scan.py. Here
// r_t = y_t - D x_t is not kept: dy_t · r_t is what the products that give dC and dG hold, times C and G.
template <class R, class W> void scan_backward_task(const Scan<R, W>& s, int64_t task, const Gradients<R, W>& g) {
    thread_local Scratch scratch;
    typedef Vector<R> V;
    constexpr int LANES = Simd<R>::LANES;
    int64_t part = task % s.parts, group = task / s.parts % s.groups, row = task / s.parts / s.groups;
    int64_t T = up<R>(rows_of(s.chunk)), P = s.wide(), N = up<R>(s.size), all = s.groups * s.heads;
    int64_t tall = rows_of(s.channels), state = s.state();
    int64_t room = s.share() * state + T * (4 * N + 4 * P + 4 * T + 4 * rows_of(s.size) + 2 * tall) + 16 * T;
    room += Inputs<R, W>::room(s) + s.share() * Inputs<R, W>::LEFT * P;
    scratch.reserve(room * sizeof(R) + 8192);
    R* own = scratch.take<R>(s.share() * state); // the gradient of the state after the chunk
    R *B = scratch.take<R>(T * N), *C = scratch.take<R>(T * N);
    R *B_turned = scratch.take<R>(rows_of(s.size) * T), *C_turned = scratch.take<R>(rows_of(s.size) * T);
    R *dB = scratch.take<R>(T * N), *dC = scratch.take<R>(T * N);
    R *dB_turned = scratch.take<R>(rows_of(s.size) * T), *dC_turned = scratch.take<R>(rows_of(s.size) * T);
    R *x_turned = scratch.take<R>(tall * T), *dy_turned = scratch.take<R>(tall * T);
    R *G = scratch.take<R>(T * T), *dG = scratch.take<R>(T * T), *M = scratch.take<R>(T * T),
      *reached = scratch.take<R>(T * T);
    R *x = scratch.take<R>(T * P), *dy = scratch.take<R>(T * P), *read = scratch.take<R>(T * P),
      *dinput = scratch.take<R>(T * P);
    R *dlog = scratch.take<R>(T), *dinput_x = scratch.take<R>(T);
    Chunk<R, W> chunk(s, scratch, row, group);
    Inputs<R, W> inputs(s, scratch);
    R* left = scratch.take<R>(s.share() * Inputs<R, W>::LEFT * P); // of each head
    memset(left, 0, s.share() * Inputs<R, W>::LEFT * P * sizeof(R));

    int64_t from = part * s.share(), to = least(from + s.share(), s.heads);
    auto place = [&](int64_t number, int64_t head) {
        return g.states + ((number * s.rows + row) * all + group * s.heads + head) * state;
    };
    auto outside = [&](int64_t head) { return ((row * s.groups + group) * s.heads + head) * s.channels * s.size; };
    for (int64_t head = from; head < to; head++) {
        kept(own + (head - from) * state, g.dlast ? g.dlast + outside(head) : nullptr, s);
        g.dA[row * all + group * s.heads + head] = g.dD[row * all + group * s.heads + head] = 0;
    }
    for (int64_t number = s.chunks() - 1; number >= 0; number--) {
        chunk.at(s, number);
        int64_t count = chunk.count, start = chunk.start;
        copied(C, N, s.C + row * s.C_row + start * s.C_step + group * s.size, s.C_step, count, s.size);
        copied(B, N, s.B + row * s.B_row + start * s.B_step + group * s.size, s.B_step, count, s.size);
        turned(B_turned, T, B, N, count, s.size);
        turned(C_turned, T, C, N, count, s.size);
        scores(G, T, C, B_turned, s.size, count, N);
        memset(dG, 0, rows_of(count) * T * sizeof(R));
        memset(dB_turned, 0, rows_of(s.size) * T * sizeof(R));
        memset(dC_turned, 0, rows_of(s.size) * T * sizeof(R));
        for (int64_t head = from; head < to; head++) {
            chunk.of(s, head);
            R *after = own + (head - from) * state, d = s.D[group * s.heads + head], a = s.A[group * s.heads + head];
            const R* known = place(number, head);
            int64_t channel = (group * s.heads + head) * s.channels;
            const W* dy_at = g.dy + row * g.dy_row + start * g.dy_step + channel;
            inputs.read(x, chunk, group * s.heads + head, true);
            copied(dy, P, dy_at, g.dy_step, count, s.channels);
            if (head + 1 < to) {
                inputs.soon(chunk, group * s.heads + head + 1);
                soon(dy_at + s.channels, g.dy_step, count, s.channels);
            }
            turned(x_turned, T, x, P, count, s.channels);
            turned(dy_turned, T, dy, P, count, s.channels);
            for (int64_t t = 0; t < rows_of(count); t++)
                for (int64_t p = 0; p < P; p += LANES)
                    store(read + t * P + p, load(dy + t * P + p) * chunk.from_start[t]);

            for (int64_t t = 0; t < count; t += ROWS)
                across<R>(least(up<R>(t + ROWS), T), [&](auto& tile, int64_t i) {
                    tile.add(dy + t * P, P, 1, x_turned + i, T, 0, s.channels);
                    tile.put(reached + t * T + i, T);
                });
            for (int64_t t = 0; t < count; t++) {
                V total{};
                chunk.decays(t, [&](int64_t i, V decay) {
                    int64_t at = t * T + i;
                    V score = load(G + at), change = load(reached + at) * decay * load(chunk.dt + i);
                    store(M + at, score * decay);
                    store(dG + at, load(dG + at) + change);
                    total += score * change;
                });
                dlog[t] = sum<R>(total);
            }
            for (int64_t t = 0; t < count; t += ROWS)
                across<R>(P, [&](auto& tile, int64_t p) {
                    tile.add(B + t * N, N, 1, after + p, P, 0, s.size);
                    tile.scale(chunk.to_end + t);
                    tile.add(M + t, 1, T, dy + p, P, t, count);
                    tile.put(dinput + t * P + p, P);
                });
            for (int64_t n = 0; n < s.size; n += ROWS) {
                across<R>(up<R>(count), [&](auto& tile, int64_t t) {
                    tile.add(after + n * P, P, 1, x_turned + t, T, 0, s.channels);
                    tile.scale_columns(chunk.input + t);
                    tile.add_to(dB_turned + n * T + t, T);
                });
                across<R>(up<R>(count), [&](auto& tile, int64_t t) {
                    tile.add(known + n * P, P, 1, dy_turned + t, T, 0, s.channels);
                    tile.scale_columns(chunk.from_start + t);
                    tile.add_to(dC_turned + n * T + t, T);
                    tile.each(s.size - n, count - t, [&](int64_t r, int64_t i, V found, int64_t) {
                        store(dlog + t + i, load(dlog + t + i) + found * load(C_turned + (n + r) * T + t + i));
                    });
                });
            }
            R dD = 0, dA = 0;
            for (int64_t t = 0; t < count; t++) {
                V input_x{}, y_x{};
                for (int64_t p = 0; p < P; p += LANES) {
                    V du = load(dinput + t * P + p), v = load(dy + t * P + p), w = load(x + t * P + p);
                    input_x += du * w, y_x += v * w;
                    store(dinput + t * P + p, d * v + chunk.dt[t] * du); // the gradient of x
                }
                dinput_x[t] = sum<R>(input_x);
                dlog[t] -= dinput_x[t] * chunk.dt[t];
                dD += sum<R>(y_x);
            }
            inputs.write(dinput, chunk, left + (head - from) * Inputs<R, W>::LEFT * P,
                         g.dx + row * g.dx_row + start * g.dx_step + channel, g.dx_step);
            V ended{};
            const R* next = place(number + 1, head);
            for (int64_t i = 0; i < s.size * P; i += LANES) ended += load(after + i) * load(next + i);
            dlog[count - 1] += sum<R>(ended);
            R total = 0;
            for (int64_t t = count - 1; t >= 0; t--) {
                total += dlog[t]; // of dt A: it is in every later sum
                g.ddt[(row * s.length + start + t) * all + group * s.heads + head] = dinput_x[t] + total * a;
                dA += total * chunk.dt[t];
            }
            g.dA[row * all + group * s.heads + head] += dA;
            g.dD[row * all + group * s.heads + head] += dD;
            for (int64_t n = 0; n < s.size; n += ROWS)
                across<R>(P, [&](auto& tile, int64_t p) {
                    tile.add_times(after + n * P + p, chunk.through, P);
                    tile.add(C + n, 1, N, read + p, P, 0, count);
                    tile.put(after + n * P + p, P);
                });
        }
        turned(dB, N, dB_turned, T, s.size, count);
        turned(dC, N, dC_turned, T, s.size, count);
        int64_t out = part * g.part + row * g.dB_row + start * g.dB_step + group * s.size;
        for (int64_t t = 0; t < count; t += ROWS) {
            across<R>(N, [&](auto& tile, int64_t n) {
                tile.add(dG + t, 1, T, C + n, N, t, count);
                tile.add_to(dB + t * N + n, N);
            });
            across<R>(N, [&](auto& tile, int64_t n) {
                tile.add(dG + t * T, T, 1, B + n, N, 0, least(t + ROWS, count));
                tile.add_to(dC + t * N + n, N);
            });
        }
        for (int64_t t = 0; t < count; t++) {
            memcpy(g.dB + out + t * g.dB_step, dB + t * N, s.size * sizeof(R));
            memcpy(g.dC + out + t * g.dB_step, dC + t * N, s.size * sizeof(R));
        }
    }
    for (int64_t head = from; head < to; head++) {
        if (g.dfirst) given(g.dfirst + outside(head), own + (head - from) * state, s);
        inputs.sums(left + (head - from) * Inputs<R, W>::LEFT * P, row, group * s.heads + head, g.dweight, g.dbias);
    }
}
