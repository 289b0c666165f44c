// AdamW: weights, moments, gradients and the weights' bfloat16 copies of many tensors in one pass over memory.
#include <cmath>

#include "common.h"

namespace {

// first and second are 1 - beta1 and 1 - beta2, which float32 would not subtract exactly.
struct Rule {
    float lr_decay, beta1, first, beta2, second, eps;
};

// One tensor's flat contiguous memory; copy may be absent. step_size is lr / (1 - beta1^t), root 1 / sqrt(1 - beta2^t).
template <typename G>
struct Slot {
    float *param;
    const G *grad;
    float *exp_avg, *exp_avg_sq;
    uint16_t *copy;
    float step_size, root;
};

inline float wide(float v) { return v; }
inline float wide(uint16_t v) { return from_bf16(v); }

template <bool COPY, typename G>
inline __attribute__((always_inline)) void span(const Slot<G> &slot, const Rule &rule, int64_t begin, int64_t end) {
    // Distinct tensors: nothing here overlaps.
    float *__restrict param = slot.param, *__restrict m = slot.exp_avg, *__restrict v = slot.exp_avg_sq;
    const G *__restrict grad = slot.grad;
    uint16_t *__restrict copy = slot.copy;
    const float step_size = slot.step_size, root = slot.root;
    const float lr_decay = rule.lr_decay, eps = rule.eps;
    const float beta1 = rule.beta1, first = rule.first, beta2 = rule.beta2, second = rule.second;
    for (int64_t i = begin; i < end; ++i) {
        const float g = wide(grad[i]);
        const float mean = m[i] * beta1 + first * g;
        const float square = v[i] * beta2 + second * g * g;
        const float kept = param[i] - lr_decay * param[i];
        const float next = kept - step_size * mean / (std::sqrt(square) * root + eps);
        m[i] = mean;
        v[i] = square;
        param[i] = next;
        if (COPY) copy[i] = to_bf16(next);
    }
}

LB_CLONES void run_f32(const Slot<float> &s, const Rule &r, int64_t begin, int64_t end) {
    s.copy ? span<true>(s, r, begin, end) : span<false>(s, r, begin, end);
}
LB_CLONES void run_bf16(const Slot<uint16_t> &s, const Rule &r, int64_t begin, int64_t end) {
    s.copy ? span<true>(s, r, begin, end) : span<false>(s, r, begin, end);
}

}  // namespace

// places: [count, 6] addresses of weight, gradient, both moments and copy (0 for none), and the number of values.
// factors: [count, 2] step_size and root. The values of all tensors are shared out evenly.
#define LB_ADAMW(NAME, G)                                                                                            \
    LB_EXPORT void adamw_##NAME(const int64_t *places, const float *factors, int64_t count, float lr_decay,          \
                                float beta1, float first, float beta2, float second, float eps,                      \
                                int64_t threads) {                                                                   \
        int64_t total = 0;                                                                                           \
        for (int64_t t = 0; t < count; ++t) total += places[6 * t + 5];                                              \
        const Rule rule{lr_decay, beta1, first, beta2, second, eps};                                                 \
        parallel(total, threads, [=](int64_t begin, int64_t end) {                                                   \
            int64_t start = 0;                                                                                       \
            for (int64_t t = 0; t < count && start < end; ++t) {                                                     \
                const int64_t *p = places + 6 * t, size = p[5];                                                      \
                const int64_t from = begin > start ? begin - start : 0, to = end - start < size ? end - start : size; \
                if (from < to) {                                                                                     \
                    const Slot<G> slot{reinterpret_cast<float *>(p[0]),    reinterpret_cast<const G *>(p[1]),         \
                                       reinterpret_cast<float *>(p[2]),    reinterpret_cast<float *>(p[3]),           \
                                       reinterpret_cast<uint16_t *>(p[4]), factors[2 * t], factors[2 * t + 1]};       \
                    run_##NAME(slot, rule, from, to);                                                                \
                }                                                                                                    \
                start += size;                                                                                       \
            }                                                                                                        \
        });                                                                                                          \
    }

LB_ADAMW(f32, float)
LB_ADAMW(bf16, uint16_t)
