// silu(gate) * up and its gradients, row by row; rows may lie apart in memory, columns side by side.
#include "common.h"

namespace {

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bf16(*p); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) { *p = to_bf16(v); }

template <typename T>
inline __attribute__((always_inline)) void forward_row(const T *gate, const T *up, T *out, int64_t width) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
        const float g = load(gate + i);
        store(out + i, g / (1.0f + exp_fast(-g)) * load(up + i));
    }
}

// Every output may be one of the inputs: an element is read before it is written, and no other one is.
template <typename T>
inline __attribute__((always_inline)) void backward_row(
    const T *grad, const T *gate, const T *up, T *grad_gate, T *grad_up, T *hidden, int64_t width) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
        const float g = load(gate + i), d = load(grad + i), u = load(up + i);
        const float s = 1.0f / (1.0f + exp_fast(-g));
        store(grad_up + i, d * g * s);
        store(grad_gate + i, d * u * s * (1.0f + g * (1.0f - s)));
        if (hidden) store(hidden + i, g * s * u);
    }
}

LB_CLONES void forward_f32(const float *g, const float *u, float *o, int64_t w) { forward_row(g, u, o, w); }
LB_CLONES void forward_bf16(const uint16_t *g, const uint16_t *u, uint16_t *o, int64_t w) { forward_row(g, u, o, w); }
LB_CLONES void backward_f32(const float *d, const float *g, const float *u, float *dg, float *du, float *h,
                            int64_t w) {
    h ? backward_row(d, g, u, dg, du, h, w) : backward_row<float>(d, g, u, dg, du, nullptr, w);
}
LB_CLONES void backward_bf16(
    const uint16_t *d, const uint16_t *g, const uint16_t *u, uint16_t *dg, uint16_t *du, uint16_t *h,
    int64_t w) {
    h ? backward_row(d, g, u, dg, du, h, w) : backward_row<uint16_t>(d, g, u, dg, du, nullptr, w);
}

}  // namespace

#define LB_SWIGLU(NAME, T)                                                                                           \
    LB_EXPORT void swiglu_##NAME(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, T *out,         \
                                 int64_t out_stride, int64_t rows, int64_t width, int64_t threads) {                 \
        parallel(rows, threads, [=](int64_t begin, int64_t end) {                                                    \
            for (int64_t r = begin; r < end; ++r)                                                                    \
                forward_##NAME(gate + r * gate_stride, up + r * up_stride, out + r * out_stride, width);             \
        });                                                                                                          \
    }                                                                                                                \
    LB_EXPORT void swiglu_grad_##NAME(const T *grad, int64_t grad_stride, const T *gate, int64_t gate_stride,        \
                                      const T *up, int64_t up_stride, T *grad_gate, int64_t grad_gate_stride,        \
                                      T *grad_up, int64_t grad_up_stride, T *hidden, int64_t hidden_stride,          \
                                      int64_t rows, int64_t width, int64_t threads) {                                \
        parallel(rows, threads, [=](int64_t begin, int64_t end) {                                                    \
            for (int64_t r = begin; r < end; ++r)                                                                    \
                backward_##NAME(grad + r * grad_stride, gate + r * gate_stride, up + r * up_stride,                  \
                                grad_gate + r * grad_gate_stride, grad_up + r * grad_up_stride,                     \
                                hidden ? hidden + r * hidden_stride : nullptr, width);                               \
        });                                                                                                          \
    }

LB_SWIGLU(f32, float)
LB_SWIGLU(bf16, uint16_t)
