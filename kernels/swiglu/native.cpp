// silu(gate) * up and its gradients, row by row; rows may lie apart in memory, columns side by side.
//
// Every output may be one of the inputs: numbers are read before they are written, and no others are.
#include "vector.h"

namespace {

template <typename T>
struct Rows {
    T *start;
    int64_t stride;
    LB_INLINE T *at(int64_t row) const { return start + row * stride; }
};

template <typename T>
struct Forward {
    Rows<const T> gate, up;
    Rows<T> out;
    int64_t width;
};

template <typename T>
struct Backward {
    Rows<const T> grad, gate, up;
    Rows<T> grad_gate, grad_up, hidden;  // hidden may start at null: not wanted
    int64_t width;
};

template <typename L, typename T>
LB_INLINE void forward_rows(const Forward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t row = begin; row < end; ++row) {
        const T *gate = a.gate.at(row), *up = a.up.at(row);
        T *out = a.out.at(row);
        L::each(a.width, LB_LANES {
            const floats g = L::load(gate + i, count);
            L::store(out + i, g / (1.0f + L::exp(-g)) * L::load(up + i, count), count);
        });
    }
}

template <typename L, typename T>
LB_INLINE void backward_rows(const Backward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t row = begin; row < end; ++row) {
        const T *grad = a.grad.at(row), *gate = a.gate.at(row), *up = a.up.at(row);
        T *grad_gate = a.grad_gate.at(row), *grad_up = a.grad_up.at(row);
        T *hidden = a.hidden.start ? a.hidden.at(row) : nullptr;
        L::each(a.width, LB_LANES {
            const floats g = L::load(gate + i, count), d = L::load(grad + i, count), u = L::load(up + i, count);
            const floats s = 1.0f / (1.0f + L::exp(-g));
            L::store(grad_up + i, d * g * s, count);
            L::store(grad_gate + i, d * u * s * (1.0f + g * (1.0f - s)), count);
            if (hidden) L::store(hidden + i, g * s * u, count);
        });
    }
}

LB_BY_LANES(forward_f32, forward_rows, Forward<float>)
LB_BY_LANES(forward_bf16, forward_rows, Forward<uint16_t>)
LB_BY_LANES(backward_f32, backward_rows, Backward<float>)
LB_BY_LANES(backward_bf16, backward_rows, Backward<uint16_t>)

}  // namespace

#define LB_SWIGLU(NAME, T)                                                                                           \
    LB_EXPORT void swiglu_##NAME(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, T *out,         \
                                 int64_t out_stride, int64_t rows, int64_t width, int64_t threads) {                 \
        const Forward<T> a{{gate, gate_stride}, {up, up_stride}, {out, out_stride}, width};                          \
        parallel(rows, threads, [&](int64_t begin, int64_t end) { forward_##NAME(a, begin, end); });                 \
    }                                                                                                                \
    LB_EXPORT void swiglu_grad_##NAME(const T *grad, int64_t grad_stride, const T *gate, int64_t gate_stride,        \
                                      const T *up, int64_t up_stride, T *grad_gate, int64_t grad_gate_stride,        \
                                      T *grad_up, int64_t grad_up_stride, T *hidden, int64_t hidden_stride,          \
                                      int64_t rows, int64_t width, int64_t threads) {                                \
        const Backward<T> a{{grad, grad_stride},                                                                     \
                            {gate, gate_stride},                                                                     \
                            {up, up_stride},                                                                         \
                            {grad_gate, grad_gate_stride},                                                           \
                            {grad_up, grad_up_stride},                                                               \
                            {hidden, hidden_stride},                                                                 \
                            width};                                                                                  \
        parallel(rows, threads, [&](int64_t begin, int64_t end) { backward_##NAME(a, begin, end); });                \
    }

LB_SWIGLU(f32, float)
LB_SWIGLU(bf16, uint16_t)
