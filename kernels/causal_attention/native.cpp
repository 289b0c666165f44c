// Causal attention on CPUs, block by block of queries: scores, softmax and weighted values while a block is in cache.
// One thread takes a key head with all query heads that share it, so that gradients of keys need no sums over threads.
#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kBlock = 64;  // queries of a block
constexpr int64_t kRows = 8;    // rows of C that stay in registers
constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bf16(*p); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) { *p = to_bf16(v); }

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// C[8 x 16 kVectors] (+)= A B over `depth`; A is read by any strides, rows of B and C lie side by side.
template <int kVectors, bool kAdds>
inline __attribute__((always_inline)) void tile(const float *a, int64_t a_row, int64_t a_depth, const float *b,
                                                int64_t b_depth, float *c, int64_t c_row, int64_t depth) {
    Lanes sums[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j)
            sums[i][j] = kAdds ? *reinterpret_cast<const Lanes *>(c + i * c_row + j * kLanes) : Lanes{};
    for (int64_t k = 0; k < depth; ++k) {
        Lanes from_b[kVectors];
        for (int j = 0; j < kVectors; ++j) from_b[j] = *reinterpret_cast<const Lanes *>(b + k * b_depth + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const float value = a[i * a_row + k * a_depth];
            for (int j = 0; j < kVectors; ++j) sums[i][j] += value * from_b[j];
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Lanes *>(c + i * c_row + j * kLanes) = sums[i][j];
}

// The same over all columns of C, a multiple of 16.
template <bool kAdds>
inline __attribute__((always_inline)) void strip(const float *a, int64_t a_row, int64_t a_depth, const float *b,
                                                 int64_t b_depth, float *c, int64_t c_row, int64_t width,
                                                 int64_t depth) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes)
        tile<2, kAdds>(a, a_row, a_depth, b + j, b_depth, c + j, c_row, depth);
    if (j < width) tile<1, kAdds>(a, a_row, a_depth, b + j, b_depth, c + j, c_row, depth);
}

// Sizes: `length` and `width` of a head, both as padded in scratch memory; `before` queries come before the block.
struct Shape {
    int64_t length, width, padded_length, padded_width;
    float scale;
};

struct Block {
    int64_t before, rows, padded_rows;
};

// Places in scratch memory, float32, padded with zeros.
struct Scratch {
    float *keys, *values, *keys_t, *values_t, *grad_keys, *grad_values;  // of the key head
    float *query, *grad, *mixed, *scores, *grad_scores;                  // of the block
};

inline Block block_at(const Shape &s, int64_t before) {
    const int64_t rows = least(kBlock, s.length - before);
    return {before, rows, up(rows, kRows)};
}

template <typename T>
inline __attribute__((always_inline)) void pack(const T *x, int64_t stride, int64_t rows, const Shape &s, float scale,
                                                int64_t padded_rows, float *out, float *transposed) {
    for (int64_t r = 0; r < padded_rows; ++r) {
        float *row = out + r * s.padded_width;
        if (r < rows)
            for (int64_t i = 0; i < s.width; ++i) row[i] = load(x + r * stride + i) * scale;
        const int64_t filled = r < rows ? s.width : 0;
        std::memset(row + filled, 0, sizeof(float) * (s.padded_width - filled));
    }
    if (transposed)
        for (int64_t i = 0; i < s.padded_width; ++i)
            for (int64_t r = 0; r < padded_rows; ++r)
                transposed[i * s.padded_length + r] = out[r * s.padded_width + i];
}

template <typename T>
inline __attribute__((always_inline)) void unpack(const float *x, int64_t rows, const Shape &s, float scale, T *out,
                                                  int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < s.width; ++i) store(out + r * stride + i, x[r * s.padded_width + i] * scale);
}

// rows[block] times all keys that a tile of rows reaches.
inline __attribute__((always_inline)) void against_keys(const float *rows, const float *keys_t, const Shape &s,
                                                        const Block &block, float *out) {
    for (int64_t j = 0; j < block.before + block.padded_rows; j += 2 * kLanes) {
        int64_t i = j - block.before - kRows + 1;  // the first tile of rows that reaches column j
        for (i = i <= 0 ? 0 : up(i, kRows); i < block.padded_rows; i += kRows)
            tile<2, false>(rows + i * s.padded_width, s.padded_width, 1, keys_t + j, s.padded_length,
                           out + i * s.padded_length + j, s.padded_length, s.padded_width);
    }
}

// out[block] = weights times what lies at the keys.
inline __attribute__((always_inline)) void weighted(const float *weights, const float *values, const Shape &s,
                                                    const Block &block, float *out) {
    for (int64_t i = 0; i < block.padded_rows; i += kRows)
        strip<false>(weights + i * s.padded_length, s.padded_length, 1, values, s.padded_width,
                     out + i * s.padded_width, s.padded_width, s.padded_width, block.before + i + kRows);
}

// to_keys += weights^T rows[block].
inline __attribute__((always_inline)) void add_to_keys(const float *weights, const float *rows, const Shape &s,
                                                       const Block &block, float *to_keys) {
    for (int64_t key = 0; key < block.before + block.padded_rows; key += kRows) {
        const int64_t first = key < block.before ? 0 : key - block.before;  // the first row that sees one of these
        strip<true>(weights + first * s.padded_length + key, 1, s.padded_length, rows + first * s.padded_width,
                    s.padded_width, to_keys + key * s.padded_width, s.padded_width, s.padded_width,
                    block.padded_rows - first);
    }
}

// Hides what row r does not see; columns to go through, whole vectors.
inline __attribute__((always_inline)) int64_t hide(float *row, int64_t seen) {
    const int64_t end = up(seen, kLanes);
    for (int64_t i = seen; i < end; ++i) row[i] = -INFINITY;
    return end;
}

// Unnormalised weights over the scores; the row's log-sum-exp and its factor.
inline __attribute__((always_inline)) float softmax_row(float *row, int64_t seen, float *factor) {
    const int64_t end = hide(row, seen);
    float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < end; ++i) largest = row[i] > largest ? row[i] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < end; ++i) {
        row[i] = exp_nonpositive(row[i] - largest);
        sum += row[i];
    }
    *factor = 1.0f / sum;
    return largest + std::log(sum);
}

// Weights from scores, and the gradient of the scores over that of the weights.
inline __attribute__((always_inline)) void gradient_row(float *row, float *grad, int64_t seen, float lse) {
    const int64_t end = hide(row, seen);
    std::memset(grad + seen, 0, sizeof(float) * (end - seen));
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < end; ++i) {
        row[i] = exp_nonpositive(row[i] - lse);
        sum += row[i] * grad[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < end; ++i) grad[i] = row[i] * (grad[i] - sum);
}

template <typename T>
struct Head {
    const T *query, *key, *value, *grad;
    T *out, *grad_query, *grad_key, *grad_value;
    float *lse;
    int64_t query_row, key_row, value_row, grad_row, out_row, grad_query_row, grad_key_row, grad_value_row;
};

template <typename T>
inline __attribute__((always_inline)) void forward_head(const Head<T> &h, const Shape &s, const Scratch &m) {
    for (int64_t before = 0; before < s.length; before += kBlock) {
        const Block block = block_at(s, before);
        pack(h.query + before * h.query_row, h.query_row, block.rows, s, s.scale, block.padded_rows, m.query,
             static_cast<float *>(nullptr));
        against_keys(m.query, m.keys_t, s, block, m.scores);
        float factors[kBlock];
        for (int64_t r = 0; r < block.rows; ++r)
            h.lse[before + r] = softmax_row(m.scores + r * s.padded_length, before + r + 1, factors + r);
        weighted(m.scores, m.values, s, block, m.mixed);
        for (int64_t r = 0; r < block.rows; ++r)
            unpack(m.mixed + r * s.padded_width, 1, s, factors[r], h.out + (before + r) * h.out_row, h.out_row);
    }
}

template <typename T>
inline __attribute__((always_inline)) void backward_head(const Head<T> &h, const Shape &s, const Scratch &m) {
    for (int64_t before = 0; before < s.length; before += kBlock) {
        const Block block = block_at(s, before);
        pack(h.query + before * h.query_row, h.query_row, block.rows, s, s.scale, block.padded_rows, m.query,
             static_cast<float *>(nullptr));
        pack(h.grad + before * h.grad_row, h.grad_row, block.rows, s, 1.0f, block.padded_rows, m.grad,
             static_cast<float *>(nullptr));
        against_keys(m.query, m.keys_t, s, block, m.scores);
        against_keys(m.grad, m.values_t, s, block, m.grad_scores);
        for (int64_t r = 0; r < block.padded_rows; ++r) {
            float *row = m.scores + r * s.padded_length, *grad = m.grad_scores + r * s.padded_length;
            if (r < block.rows) {
                gradient_row(row, grad, before + r + 1, h.lse[before + r]);
            } else {  // padding
                std::memset(row, 0, sizeof(float) * (before + block.padded_rows));
                std::memset(grad, 0, sizeof(float) * (before + block.padded_rows));
            }
        }
        add_to_keys(m.scores, m.grad, s, block, m.grad_values);
        add_to_keys(m.grad_scores, m.query, s, block, m.grad_keys);
        weighted(m.grad_scores, m.keys, s, block, m.mixed);
        unpack(m.mixed, block.rows, s, s.scale, h.grad_query + before * h.grad_query_row, h.grad_query_row);
    }
}

template <typename T>
inline __attribute__((always_inline)) void pack_keys(const Head<T> &h, const Shape &s, const Scratch &m) {
    // Padding beyond the keys: a tile of rows reaches at most so far.
    const int64_t rows = up(s.length, kRows);
    pack(h.key, h.key_row, s.length, s, 1.0f, rows, m.keys, m.keys_t);
    pack(h.value, h.value_row, s.length, s, 1.0f, rows, m.values, m.values_t);
}

template <typename T>
inline __attribute__((always_inline)) void unpack_keys(const Head<T> &h, const Shape &s, const Scratch &m) {
    unpack(m.grad_keys, s.length, s, 1.0f, h.grad_key, h.grad_key_row);
    unpack(m.grad_values, s.length, s, 1.0f, h.grad_value, h.grad_value_row);
}

#define LB_HEAD(NAME, T)                                                                                       \
    LB_CLONES void forward_##NAME(const Head<T> &h, const Shape &s, const Scratch &m) { forward_head(h, s, m); }   \
    LB_CLONES void backward_##NAME(const Head<T> &h, const Shape &s, const Scratch &m) { backward_head(h, s, m); } \
    LB_CLONES void pack_##NAME(const Head<T> &h, const Shape &s, const Scratch &m) { pack_keys(h, s, m); }         \
    LB_CLONES void unpack_##NAME(const Head<T> &h, const Shape &s, const Scratch &m) { unpack_keys(h, s, m); }

LB_HEAD(f32, float)
LB_HEAD(bf16, uint16_t)

// A tensor [batch, heads, length, width] with features side by side.
template <typename T>
struct Tensor {
    T *data;
    int64_t batch, head, row;
    T *at(int64_t b, int64_t h) const { return data ? data + b * batch + h * head : nullptr; }
};

inline Shape shape_of(int64_t length, int64_t width, float scale) {
    // Rows of scores end on other cache sets.
    return {length, width, up(length, 2 * kLanes) + kLanes, up(width, kLanes), scale};
}

inline Scratch scratch_in(std::vector<float> &memory, const Shape &s) {
    const int64_t keys = s.padded_length * s.padded_width, rows = kBlock * s.padded_width;
    const int64_t scores = kBlock * s.padded_length;
    memory.assign(6 * keys + 3 * rows + 2 * scores, 0.0f);
    float *p = memory.data(), *blocks = p + 6 * keys;
    return {p,          p + keys,      p + 2 * keys,      p + 3 * keys,      p + 4 * keys,              p + 5 * keys,
            blocks,     blocks + rows, blocks + 2 * rows, blocks + 3 * rows, blocks + 3 * rows + scores};
}

}  // namespace

#define LB_TENSOR(T, NAME) T *NAME, int64_t NAME##_batch, int64_t NAME##_head, int64_t NAME##_row
#define LB_AS(T, NAME) \
    const Tensor<T> NAME##_at { NAME, NAME##_batch, NAME##_head, NAME##_row }

#define LB_CAUSAL_ATTENTION(NAME, T)                                                                               \
    LB_EXPORT void causal_attention_##NAME(LB_TENSOR(const T, query), LB_TENSOR(const T, key),                     \
                                           LB_TENSOR(const T, value), LB_TENSOR(T, out), float *lse, int64_t batch, \
                                           int64_t heads, int64_t kv_heads, int64_t length, int64_t width,         \
                                           float scale, int64_t threads) {                                         \
        LB_AS(const T, query);                                                                                     \
        LB_AS(const T, key);                                                                                       \
        LB_AS(const T, value);                                                                                     \
        LB_AS(T, out);                                                                                             \
        const int64_t group = heads / kv_heads;                                                                    \
        const Shape s = shape_of(length, width, scale);                                                            \
        parallel(batch * kv_heads, threads, [=](int64_t begin, int64_t end) {                                      \
            std::vector<float> memory;                                                                             \
            const Scratch m = scratch_in(memory, s);                                                               \
            for (int64_t pair = begin; pair < end; ++pair) {                                                       \
                const int64_t b = pair / kv_heads, kv = pair % kv_heads;                                           \
                Head<T> h{};                                                                                       \
                h.key = key_at.at(b, kv), h.key_row = key_row;                                                     \
                h.value = value_at.at(b, kv), h.value_row = value_row;                                             \
                pack_##NAME(h, s, m);                                                                              \
                for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {                                 \
                    h.query = query_at.at(b, head), h.query_row = query_row;                                       \
                    h.out = out_at.at(b, head), h.out_row = out_row;                                               \
                    h.lse = lse + (b * heads + head) * length;                                                     \
                    forward_##NAME(h, s, m);                                                                       \
                }                                                                                                  \
            }                                                                                                      \
        });                                                                                                        \
    }                                                                                                              \
    LB_EXPORT void causal_attention_grad_##NAME(                                                                   \
        LB_TENSOR(const T, query), LB_TENSOR(const T, key), LB_TENSOR(const T, value), LB_TENSOR(const T, grad),   \
        LB_TENSOR(T, grad_query), LB_TENSOR(T, grad_key), LB_TENSOR(T, grad_value), float *lse, int64_t batch,     \
        int64_t heads, int64_t kv_heads, int64_t length, int64_t width, float scale, int64_t threads) {            \
        LB_AS(const T, query);                                                                                     \
        LB_AS(const T, key);                                                                                       \
        LB_AS(const T, value);                                                                                     \
        LB_AS(const T, grad);                                                                                      \
        LB_AS(T, grad_query);                                                                                      \
        LB_AS(T, grad_key);                                                                                        \
        LB_AS(T, grad_value);                                                                                      \
        const int64_t group = heads / kv_heads;                                                                    \
        const Shape s = shape_of(length, width, scale);                                                            \
        parallel(batch * kv_heads, threads, [=](int64_t begin, int64_t end) {                                      \
            std::vector<float> memory;                                                                             \
            const Scratch m = scratch_in(memory, s);                                                               \
            for (int64_t pair = begin; pair < end; ++pair) {                                                       \
                const int64_t b = pair / kv_heads, kv = pair % kv_heads;                                           \
                Head<T> h{};                                                                                       \
                h.key = key_at.at(b, kv), h.key_row = key_row;                                                     \
                h.value = value_at.at(b, kv), h.value_row = value_row;                                             \
                h.grad_key = grad_key_at.at(b, kv), h.grad_key_row = grad_key_row;                                 \
                h.grad_value = grad_value_at.at(b, kv), h.grad_value_row = grad_value_row;                         \
                pack_##NAME(h, s, m);                                                                              \
                std::memset(m.grad_keys, 0, sizeof(float) * 2 * s.padded_length * s.padded_width);                 \
                for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {                                 \
                    h.query = query_at.at(b, head), h.query_row = query_row;                                       \
                    h.grad = grad_at.at(b, head), h.grad_row = grad_row;                                           \
                    h.grad_query = grad_query_at.at(b, head), h.grad_query_row = grad_query_row;                   \
                    h.lse = lse + (b * heads + head) * length;                                                     \
                    backward_##NAME(h, s, m);                                                                      \
                }                                                                                                  \
                unpack_##NAME(h, s, m);                                                                            \
            }                                                                                                      \
        });                                                                                                        \
    }

LB_CAUSAL_ATTENTION(f32, float)
LB_CAUSAL_ATTENTION(bf16, uint16_t)
