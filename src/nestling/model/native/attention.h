// Causal attention within the documents of a row, forward and backward, by blocks of queries and of keys (Dao 2023,
// arXiv 2307.08691).
//
// Scores are kept transposed, [key, query]: what belongs to a query (the largest score, the sum of weights) is then a
// lane of a vector, and nothing but queries is turned. A query sees keys from the first of its document to its own;
// products go over the tiles in which one sees any, and weights are zero in the rest of those.
#pragma once

#include <limits>

#include "vectors.h"

constexpr int64_t QUERIES = 64, KEYS = 64; // of a block
// Queries that stay together: whole vectors, whole tiles
template <class R> constexpr int64_t STEP = Simd<R>::LANES > ROWS ? Simd<R>::LANES : ROWS;

template <class R> struct Rows { // of channels
    const R* at;
    int64_t step;
};

template <class R, class W> struct Attention {     // W: of what is read and written
    int64_t rows, length, groups, heads, channels; // heads of queries that share one of keys
    int64_t parts, threads;                        // backward: into how many tasks a head's queries are divided
    const W *query, *key, *value;
    // strides; the channels of a head are contiguous
    int64_t query_row, query_step, query_head, key_row, key_step, key_head, value_row, value_step, value_head;
    const int64_t* documents; // [row, length], or null

    int64_t all() const { return groups * heads; }
    int64_t wide() const { return up<R>(channels); }
    int64_t blocks() const { return (length + QUERIES - 1) / QUERIES; }
    int64_t working() const { return threads_for(threads, rows * length * length * all() * channels / 2); }
    int64_t tasks() const { return rows * groups * blocks(); }
    R scale() const { return R(1) / std::sqrt(R(channels)); }
    int64_t at(int64_t row, int64_t t, int64_t head) const { return ((row * length + t) * all() + head) * channels; }
    // Where they lie, or in `room`, if products could not read them or would read beyond them
    Rows<R> rows_at(R* room, const W* from, int64_t step, int64_t count) const {
        if constexpr (std::is_same_v<R, W>)
            if (channels == wide() && count % ROWS == 0) return {from, step};
        copied(room, wide(), from, step, count, channels);
        return {room, wide()};
    }
    Rows<R> queries_of(R* room, int64_t row, int64_t t, int64_t head, int64_t count) const {
        return rows_at(room, query + row * query_row + t * query_step + head * query_head, query_step, count);
    }
    Rows<R> keys_of(R* room, int64_t row, int64_t s, int64_t group, int64_t count) const {
        return rows_at(room, key + row * key_row + s * key_step + group * key_head, key_step, count);
    }
    Rows<R> values_of(R* room, int64_t row, int64_t s, int64_t group, int64_t count) const {
        return rows_at(room, value + row * value_row + s * value_step + group * value_head, value_step, count);
    }
};

// Where the document of each position of a row begins (a number that R holds exactly) and ends.
template <class R> struct Documents {
    R* first;
    int64_t* end;

    static size_t room(int64_t length) { return (length + QUERIES) * (sizeof(R) + sizeof(int64_t)) + 128; }
    template <class W> Documents(const Attention<R, W>& s, Scratch& scratch, int64_t row) {
        first = scratch.take<R>(s.length + QUERIES);
        end = scratch.take<int64_t>(s.length + QUERIES);
        const int64_t* of = s.documents ? s.documents + row * s.length : nullptr;
        auto begins = [&](int64_t t) { return of && of[t] != of[t - 1]; };
        first[0] = 0;
        for (int64_t t = 1; t < s.length; t++) first[t] = begins(t) ? R(t) : first[t - 1];
        for (int64_t t = s.length; t < s.length + QUERIES; t++) first[t] = R(s.length); // sees nothing
        for (int64_t t = s.length - 1; t >= 0; t--) end[t] = t + 1 == s.length || begins(t + 1) ? t + 1 : end[t + 1];
    }
};

// Some queries and some keys of a row: t and s are counted from the first of the block.
template <class R> struct Block {
    const Documents<R>& row;
    int64_t query, queries, key, keys;

    // every query sees every key
    bool whole() const { return key + keys <= query + 1 && row.first[query + queries - 1] <= key; }
    // keys that some of a tile of queries see
    int64_t first_key(int64_t t) const { return most((int64_t)row.first[query + t] - key, 0); }
    int64_t last_key(int64_t t, int64_t step = ROWS) const { return least(query + t + step - key, keys); }
    // queries that see some of a tile of keys
    int64_t first_query(int64_t s) const { return most(key + s - query, 0); }
    int64_t last_query(int64_t s) const { return least(row.end[key + least(s + ROWS, keys) - 1] - query, queries); }
    int64_t first_step(int64_t s) const { return first_query(s) / STEP<R> * STEP<R>; }
    int64_t last_step(int64_t s) const { return (last_query(s) + STEP<R> - 1) / STEP<R> * STEP<R>; }

    typename Simd<R>::Bits sees(int64_t t, int64_t s) const { // a vector of queries, one key
        Vector<R> place;
        for (int lane = 0; lane < Simd<R>::LANES; lane++) place[lane] = R(query + t + lane);
        return (load(row.first + query + t) <= R(key + s)) & (place >= R(key + s));
    }
    // to[s, t] = a of the keys · b of the queries, turned
    void scores(R* to, Rows<R> a, const R* b, int64_t channels) const {
        for (int64_t s = 0; s < keys; s += ROWS) {
            int64_t first = first_step(s);
            across<R>(most(last_step(s) - first, 0), [&](auto& tile, int64_t t) {
                tile.add(a.at + s * a.step, a.step, 1, b + first + t, QUERIES, 0, channels);
                tile.put(to + s * QUERIES + first + t, QUERIES);
            });
        }
    }
};

// f(first key, how many) for the blocks of keys that some queries see
template <class R, class F> void each_block(const Documents<R>& row, int64_t query, int64_t queries, F f) {
    for (int64_t key = (int64_t)row.first[query] / KEYS * KEYS; key < query + queries; key += KEYS)
        f(Block<R>{row, query, queries, key, least(KEYS, query + queries - key)});
}

template <class R> struct Softmax { // of a block's queries, so far
    R *top, *sum, *left, scale;     // the largest score; the sum of weights; what is left of the ones before

    Softmax(Scratch& scratch, R scale) : scale(scale) {
        for (R** each : {&top, &sum, &left}) *each = scratch.take<R>(QUERIES);
        for (int64_t t = 0; t < QUERIES; t++) top[t] = std::numeric_limits<R>::lowest() / 2, sum[t] = 0;
    }
    // scores become weights
    template <bool WHOLE> void add(const Block<R>& block, R* S) const {
        typedef Vector<R> V;
        R scale = this->scale;
        for (int64_t t = 0; t < block.queries; t += Simd<R>::LANES) {
            int64_t tile = t / STEP<R> * STEP<R>, from = block.first_key(tile), to = block.last_key(tile, STEP<R>);
            V old = load(top + t), high = old, total{}, none{};
            for (int64_t s = from; s < to; s++) {
                V score = load(S + s * QUERIES + t);
                if (!WHOLE) score = block.sees(t, s) ? score : old;
                high = score > high ? score : high;
            }
            for (int64_t s = from; s < to; s++) {
                V weight = faded<R>((load(S + s * QUERIES + t) - high) * scale);
                if (!WHOLE) weight = block.sees(t, s) ? weight : none;
                total += weight;
                store(S + s * QUERIES + t, weight);
            }
            V kept = faded<R>((old - high) * scale);
            store(left + t, kept);
            store(sum + t, load(sum + t) * kept + total);
            store(top + t, high);
        }
    }
};

// A block of queries of the heads that share keys; long ones first.
template <class R, class W> void attention_task(const Attention<R, W>& s, int64_t task, W* y, R* logsumexp) {
    thread_local Scratch scratch;
    int64_t group = task % s.groups, row = task / s.groups % s.rows, P = s.wide(), T = QUERIES;
    int64_t query = (s.blocks() - 1 - task / s.groups / s.rows) * T, queries = least(T, s.length - query);
    int64_t turn = rows_of(s.channels) * T;
    scratch.reserve((s.heads * (turn + T * P + 3 * T) + 2 * KEYS * P + KEYS * T) * sizeof(R) + 4096 + s.heads * 192 +
                    Documents<R>::room(s.length));
    Documents<R> documents(s, scratch, row);
    R *Q_turned = scratch.take<R>(s.heads * turn), *out = scratch.take<R>(s.heads * T * P);
    R *K_room = scratch.take<R>(KEYS * P), *V_room = scratch.take<R>(KEYS * P), *S = scratch.take<R>(KEYS * T);
    Softmax<R>* softmax = scratch.take<Softmax<R>>(s.heads);
    for (int64_t head = 0; head < s.heads; head++) {
        Rows<R> Q = s.queries_of(out, row, query, group * s.heads + head, queries);
        turned(Q_turned + head * turn, T, Q.at, Q.step, queries, s.channels);
        softmax[head] = Softmax<R>(scratch, s.scale());
    }
    memset(out, 0, s.heads * T * P * sizeof(R));
    each_block(documents, query, queries, [&](const Block<R>& block) {
        Rows<R> K = s.keys_of(K_room, row, block.key, group, block.keys);
        Rows<R> V = s.values_of(V_room, row, block.key, group, block.keys);
        bool whole = block.whole();
        for (int64_t head = 0; head < s.heads; head++) {
            R* own = out + head * T * P;
            block.scores(S, K, Q_turned + head * turn, s.channels);
            whole ? softmax[head].template add<true>(block, S) : softmax[head].template add<false>(block, S);
            for (int64_t t = 0; t < queries; t += ROWS)
                across<R>(P, [&](auto& tile, int64_t c) {
                    tile.add_rows(own + t * P + c, softmax[head].left + t, P);
                    tile.add(S + t, 1, T, V.at + c, V.step, block.first_key(t), block.last_key(t));
                    tile.put(own + t * P + c, P);
                });
        }
    });
    for (int64_t head = 0; head < s.heads; head++)
        for (int64_t t = 0; t < queries; t++) {
            R sum = softmax[head].sum[t];
            W* to = y + s.at(row, query + t, group * s.heads + head);
            for (int64_t c = 0; c < s.channels; c += Simd<R>::LANES)
                store(to + c, load(out + (head * T + t) * P + c) / sum, s.channels - c);
            if (logsumexp)
                logsumexp[(row * s.all() + group * s.heads + head) * s.length + query + t] =
                    softmax[head].top[t] * s.scale() + std::log(sum);
        }
}

template <class R, class W> struct AttentionGradients {
    const W* y;
    const R* logsumexp;
    const W* dy;
    W *dquery, *dkey, *dvalue;        // contiguous
    R *partial_dkey, *partial_dvalue; // of each part of each head, [row, head, part, s, c] in whole tiles
};

// Scores become weights P, and dy · v becomes their gradient, P (dy · v - dy · y).
template <bool WHOLE, class R>
void weights(const Block<R>& block, R* S, R* dS, const R* logsumexp, const R* dy_y, R scale) {
    typedef Vector<R> V;
    for (int64_t s = 0; s < block.keys; s++) {
        int64_t tile = s / ROWS * ROWS, last = block.last_step(tile);
        for (int64_t t = block.first_step(tile); t < last; t += Simd<R>::LANES) {
            V none{}, weight = faded<R>(load(S + s * QUERIES + t) * scale - load(logsumexp + t));
            if (!WHOLE) weight = block.sees(t, s) ? weight : none;
            store(S + s * QUERIES + t, weight);
            store(dS + s * QUERIES + t, weight * scale * (load(dS + s * QUERIES + t) - load(dy_y + t)));
        }
    }
}

// The queries of a part of a head, one block after the other.
template <class R, class W>
void attention_backward_task(const Attention<R, W>& s, int64_t task, const AttentionGradients<R, W>& g) {
    thread_local Scratch scratch;
    typedef Vector<R> V;
    constexpr int64_t T = QUERIES, LANES = Simd<R>::LANES;
    int64_t part = task % s.parts, head = task / s.parts % s.all(), row = task / s.parts / s.all();
    int64_t group = head / s.heads, P = s.wide(), turn = rows_of(s.channels) * T, held = rows_of(s.length) * P;
    scratch.reserve((3 * T * P + 2 * turn + 2 * KEYS * P + 2 * KEYS * T + 2 * T) * sizeof(R) + 4096 +
                    Documents<R>::room(s.length));
    Documents<R> documents(s, scratch, row);
    R *Q_room = scratch.take<R>(T * P), *dy_room = scratch.take<R>(T * P), *dQ = scratch.take<R>(T * P);
    R *Q_turned = scratch.take<R>(turn), *dy_turned = scratch.take<R>(turn);
    R *K_room = scratch.take<R>(KEYS * P), *value_room = scratch.take<R>(KEYS * P);
    R *S = scratch.take<R>(KEYS * T), *dS = scratch.take<R>(KEYS * T);
    R *logsumexp = scratch.take<R>(T), *dy_y = scratch.take<R>(T);
    R *dkey = g.partial_dkey + task * held, *dvalue = g.partial_dvalue + task * held;
    memset(dkey, 0, held * sizeof(R));
    memset(dvalue, 0, held * sizeof(R));
    for (int64_t number = part; number < s.blocks(); number += s.parts) {
        int64_t query = number * T, queries = least(T, s.length - query), at = s.at(row, query, head);
        Rows<R> Q = s.queries_of(Q_room, row, query, head, queries);
        Rows<R> dy = s.rows_at(dy_room, g.dy + at, s.all() * s.channels, queries);
        turned(Q_turned, T, Q.at, Q.step, queries, s.channels);
        turned(dy_turned, T, dy.at, dy.step, queries, s.channels);
        copied(dQ, P, g.y + at, s.all() * s.channels, queries, s.channels);
        for (int64_t t = 0; t < T; t++) {
            V total{};
            for (int64_t c = 0; t < queries && c < P; c += LANES)
                total += load(dy.at + t * dy.step + c) * load(dQ + t * P + c);
            dy_y[t] = sum<R>(total);
            logsumexp[t] = t < queries ? g.logsumexp[(row * s.all() + head) * s.length + query + t] : 0;
        }
        memset(dQ, 0, T * P * sizeof(R));
        each_block(documents, query, queries, [&](const Block<R>& block) {
            Rows<R> K = s.keys_of(K_room, row, block.key, group, block.keys);
            Rows<R> value = s.values_of(value_room, row, block.key, group, block.keys);
            block.scores(S, K, Q_turned, s.channels);
            block.scores(dS, value, dy_turned, s.channels);
            auto weigh = block.whole() ? weights<true, R> : weights<false, R>;
            weigh(block, S, dS, logsumexp, dy_y, s.scale());
            for (int64_t k = 0; k < block.keys; k += ROWS) {
                int64_t first = block.first_query(k), last = block.last_query(k), to = (block.key + k) * P;
                if (first >= last) continue;
                across<R>(P, [&](auto& tile, int64_t c) {
                    tile.add(S + k * T, T, 1, dy.at + c, dy.step, first, last);
                    tile.add_to(dvalue + to + c, P);
                });
                across<R>(P, [&](auto& tile, int64_t c) {
                    tile.add(dS + k * T, T, 1, Q.at + c, Q.step, first, last);
                    tile.add_to(dkey + to + c, P);
                });
            }
            for (int64_t t = 0; t < queries; t += ROWS)
                across<R>(P, [&](auto& tile, int64_t c) {
                    tile.add(dS + t, 1, T, K.at + c, K.step, block.first_key(t), block.last_key(t));
                    tile.add_to(dQ + t * P + c, P);
                });
        });
        for (int64_t t = 0; t < queries; t++)
            for (int64_t c = 0; c < s.channels; c += LANES)
                store(g.dquery + at + t * s.all() * s.channels + c, load(dQ + t * P + c), s.channels - c);
    }
}

// The gradient of a key (or a value) is the sum over the parts of the heads that share it.
template <class R, class W> void attention_sum_task(const Attention<R, W>& s, int64_t task, const R* partial, W* out) {
    int64_t group = task % s.groups, row = task / s.groups % s.rows, first = task / s.groups / s.rows * QUERIES;
    int64_t P = s.wide(), held = rows_of(s.length) * P, many = s.heads * s.parts;
    const R* from = partial + (row * s.groups + group) * many * held;
    for (int64_t t = first; t < least(first + QUERIES, s.length); t++)
        for (int64_t c = 0; c < s.channels; c += Simd<R>::LANES) {
            Vector<R> total{};
            for (int64_t each = 0; each < many; each++) total += load(from + each * held + t * P + c);
            store(out + ((row * s.length + t) * s.groups + group) * s.channels + c, total, s.channels - c);
        }
}
