// Rows of logits: log-sum-exp, and the gradient of the cross-entropy written over them. Rows may lie apart in memory.
#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kIgnore = -100;

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bf16(*p); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) { *p = to_bf16(v); }

template <typename T>
inline __attribute__((always_inline)) float lse_row(const T *x, int64_t width) {
    float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; ++i) {
        const float v = load(x + i);
        largest = v > largest ? v : largest;
    }
    const float offset = largest == -INFINITY ? 0.0f : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += exp_nonpositive(load(x + i) - offset);
    return offset + std::log(sum);
}

template <typename T>
inline __attribute__((always_inline)) void gradient_row(T *x, int64_t width, float lse, float factor) {
    for (int64_t i = 0; i < width; ++i) store(x + i, factor * exp_nonpositive(load(x + i) - lse));
}

LB_CLONES float lse_f32(const float *x, int64_t width) { return lse_row(x, width); }
LB_CLONES float lse_bf16(const uint16_t *x, int64_t width) { return lse_row(x, width); }
LB_CLONES void gradient_f32(float *x, int64_t width, float lse, float factor) { gradient_row(x, width, lse, factor); }
LB_CLONES void gradient_bf16(uint16_t *x, int64_t w, float lse, float factor) { gradient_row(x, w, lse, factor); }

template <typename T, typename Lse, typename Gradient>
void rows_of(T *logits, int64_t stride, const int64_t *labels, int64_t first, float *lse, float *target, float z_loss,
             int64_t rows, int64_t width, bool measures, bool writes, int64_t threads, Lse lse_of, Gradient gradient) {
    parallel(rows, threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            T *row = logits + r * stride;
            const int64_t column = labels[r] - first;
            const bool ignored = labels[r] == kIgnore, mine = !ignored && column >= 0 && column < width;
            if (ignored) {
                lse[r] = target[r] = 0.0f;
                if (writes) std::memset(row, 0, sizeof(T) * width);
                continue;
            }
            if (measures) {
                lse[r] = lse_of(row, width);
                target[r] = mine ? load(row + column) : 0.0f;
            }
            if (!writes) continue;
            const float pull = 2.0f * z_loss * lse[r];
            gradient(row, width, lse[r], 1.0f + pull);
            if (mine) {  // not from the stored probability, which may be rounded to 1
                const float log_probability = target[r] - lse[r];
                store(row + column, std::expm1(log_probability) + pull * std::exp(log_probability));
            }
        }
    });
}

}  // namespace

#define LB_CROSS_ENTROPY(NAME, T)                                                                                   \
    LB_EXPORT void cross_entropy_##NAME(T *logits, int64_t stride, const int64_t *labels, int64_t first, float *lse, \
                                        float *target, float z_loss, int64_t rows, int64_t width, int64_t measures,  \
                                        int64_t writes, int64_t threads) {                                          \
        rows_of(logits, stride, labels, first, lse, target, z_loss, rows, width, measures != 0, writes != 0,        \
                threads, lse_##NAME, gradient_##NAME);                                                              \
    }

LB_CROSS_ENTROPY(f32, float)
LB_CROSS_ENTROPY(bf16, uint16_t)
