// Rows of a mixture of experts on the CPU: sums of gathered rows and their backward. Sums in float32; each row is
// written by one thread, in one order.
#include "common.h"

namespace {

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bf16(*p); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) { *p = to_bf16(v); }

#define LB_INLINE inline __attribute__((always_inline))

constexpr int64_t kBlock = 256;  // columns summed at a time, in cache

// out[t] = sum over k of weights[t, k] * rows[index[t, k]]; no weights: 1.
template <typename T>
LB_INLINE void sum_rows(const T *rows, const int64_t *index, const float *weights, T *out, int64_t top_k, int64_t dim,
                        int64_t begin, int64_t end) {
    float sum[kBlock];
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t first = 0; first < dim; first += kBlock) {
            const int64_t width = dim - first < kBlock ? dim - first : kBlock;
            for (int64_t i = 0; i < width; ++i) sum[i] = 0.0f;
            for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k) {
                const T *row = rows + index[k] * dim + first;
                const float weight = weights ? weights[k] : 1.0f;
                for (int64_t i = 0; i < width; ++i) sum[i] += weight * load(row + i);
            }
            for (int64_t i = 0; i < width; ++i) store(out + t * dim + first + i, sum[i]);
        }
    }
}

// For row r of pair p = order[r]: grad_rows[r] = gates[p] * grad[p / top_k], grad_gates[p] = <rows[r], grad[p / top_k]>.
template <typename T>
LB_INLINE void sum_rows_grad(const T *grad, const T *rows, const int64_t *order, const float *gates, T *grad_rows,
                             float *grad_gates, int64_t top_k, int64_t dim, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const int64_t pair = order[r];
        const T *g = grad + pair / top_k * dim, *row = rows + r * dim;
        T *out = grad_rows + r * dim;
        const float gate = gates[pair];
        float lanes[16] = {};
        const int64_t whole = dim / 16 * 16;
        for (int64_t i = 0; i < whole; i += 16) {
            for (int64_t j = 0; j < 16; ++j) {
                const float d = load(g + i + j);
                lanes[j] += d * load(row + i + j);
                store(out + i + j, gate * d);
            }
        }
        float total = 0.0f;
        for (int64_t i = whole; i < dim; ++i) {
            total += load(g + i) * load(row + i);
            store(out + i, gate * load(g + i));
        }
        for (int64_t j = 0; j < 16; ++j) total += lanes[j];
        grad_gates[pair] = total;
    }
}

#define LB_CLONED(NAME, T)                                                                                           \
    LB_CLONES void sum_##NAME(const T *rows, const int64_t *index, const float *weights, T *out, int64_t top_k,      \
                              int64_t dim, int64_t begin, int64_t end) {                                             \
        sum_rows(rows, index, weights, out, top_k, dim, begin, end);                                                 \
    }                                                                                                                \
    LB_CLONES void sum_grad_##NAME(const T *grad, const T *rows, const int64_t *order, const float *gates,           \
                                   T *grad_rows, float *grad_gates, int64_t top_k, int64_t dim, int64_t begin,       \
                                   int64_t end) {                                                                    \
        sum_rows_grad(grad, rows, order, gates, grad_rows, grad_gates, top_k, dim, begin, end);                      \
    }

LB_CLONED(f32, float)
LB_CLONED(bf16, uint16_t)

}  // namespace

#define LB_EXPERTS(NAME, T)                                                                                          \
    LB_EXPORT void experts_sum_##NAME(const T *rows, const int64_t *index, const float *weights, T *out,             \
                                      int64_t tokens, int64_t top_k, int64_t dim, int64_t threads) {                 \
        parallel(tokens, threads, [=](int64_t begin, int64_t end) {                                                  \
            sum_##NAME(rows, index, weights, out, top_k, dim, begin, end);                                           \
        });                                                                                                          \
    }                                                                                                                \
    LB_EXPORT void experts_sum_grad_##NAME(const T *grad, const T *rows, const int64_t *order, const float *gates,   \
                                           T *grad_rows, float *grad_gates, int64_t count, int64_t top_k,            \
                                           int64_t dim, int64_t threads) {                                           \
        parallel(count, threads, [=](int64_t begin, int64_t end) {                                                   \
            sum_grad_##NAME(grad, rows, order, gates, grad_rows, grad_gates, top_k, dim, begin, end);                \
        });                                                                                                          \
    }

LB_EXPERTS(f32, float)
LB_EXPERTS(bf16, uint16_t)
