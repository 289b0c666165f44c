// Root-mean-square normalisation of rows, and of sums of two rows; statistics in float32.
#include <cmath>

#include "vector.h"

namespace {

template <typename T>
struct Forward {
    const T *x;
    int64_t x_stride;
    const T *delta;  // null, or added to x
    int64_t delta_stride;
    const float *weight;  // null for ones
    T *total, *y;
    float *scale;
    int64_t dim;
    float eps;
};

template <typename T>
struct Backward {
    const T *grad;
    int64_t grad_stride;
    const T *grad_total;  // null, or what else reaches the rows
    int64_t grad_total_stride;
    const T *x;
    int64_t x_stride;
    const float *weight, *scale;
    T *grad_x;
    float *partial;  // null, or each block's part of the weight's gradient
    int64_t rows, dim, blocks;
};

template <typename L, typename T>
LB_INLINE void forward_rows(const Forward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t r = begin; r < end; ++r) {
        const T *x = a.x + r * a.x_stride, *delta = a.delta ? a.delta + r * a.delta_stride : nullptr;
        T *total = a.delta ? a.total + r * a.dim : nullptr, *y = a.y + r * a.dim;
        floats squares{};
        L::each(a.dim, LB_LANES {
            floats v = L::load(x + i, count);
            if (delta) {
                L::store(total + i, v + L::load(delta + i, count), count);
                v = L::load(total + i, count);  // as rounded: the backward knows no other
            }
            squares += v * v;
        });
        const float scale = 1.0f / std::sqrt(L::sum(squares) / static_cast<float>(a.dim) + a.eps);
        const T *rows = delta ? total : x;
        L::each(a.dim, LB_LANES {
            const floats unit = L::load(rows + i, count) * scale;
            L::store(y + i, a.weight ? unit * L::load(a.weight + i, count) : unit, count);
        });
        a.scale[r] = scale;
    }
}

// Row blocks, not threads, have parts of the weight's gradient: its bits do not depend on the threads.
template <typename L, typename T>
LB_INLINE void backward_blocks(const Backward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t b = begin; b < end; ++b) {
        float *partial = a.partial ? a.partial + b * a.dim : nullptr;
        if (partial) std::memset(partial, 0, a.dim * sizeof(float));
        for (int64_t r = a.rows * b / a.blocks; r < a.rows * (b + 1) / a.blocks; ++r) {
            const T *grad = a.grad + r * a.grad_stride, *x = a.x + r * a.x_stride;
            const T *more = a.grad_total ? a.grad_total + r * a.grad_total_stride : nullptr;
            T *grad_x = a.grad_x + r * a.dim;
            const float scale = a.scale[r];
            floats products{};
            L::each(a.dim, LB_LANES {
                const floats product = L::load(grad + i, count) * (L::load(x + i, count) * scale);
                products += a.weight ? product * L::load(a.weight + i, count) : product;
                if (partial) L::store(partial + i, L::load(partial + i, count) + product, count);
            });
            // The part of the gradient along the row changes only its length, which the norm removes.
            const float along = L::sum(products) / static_cast<float>(a.dim);
            L::each(a.dim, LB_LANES {
                floats d = L::load(grad + i, count);
                if (a.weight) d *= L::load(a.weight + i, count);
                d = (d - L::load(x + i, count) * (scale * along)) * scale;
                if (more) d += L::load(more + i, count);
                L::store(grad_x + i, d, count);
            });
        }
    }
}

LB_BY_LANES(forward_f32, forward_rows, Forward<float>)
LB_BY_LANES(forward_bf16, forward_rows, Forward<uint16_t>)
LB_BY_LANES(backward_f32, backward_blocks, Backward<float>)
LB_BY_LANES(backward_bf16, backward_blocks, Backward<uint16_t>)

LB_CLONES void add_up(const float *partial, float *total, int64_t dim, int64_t blocks) {
    std::memset(total, 0, dim * sizeof(float));
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < dim; ++i) total[i] += partial[b * dim + i];
}

}  // namespace

#define LB_RMS_NORM(NAME, T)                                                                                         \
    LB_EXPORT void rms_norm_##NAME(const T *x, int64_t x_stride, const T *delta, int64_t delta_stride,               \
                                   const float *weight, T *total, T *y, float *scale, int64_t rows, int64_t dim,     \
                                   float eps, int64_t threads) {                                                     \
        const Forward<T> a{x, x_stride, delta, delta_stride, weight, total, y, scale, dim, eps};                     \
        parallel(rows, threads, [&](int64_t begin, int64_t end) { forward_##NAME(a, begin, end); });                 \
    }                                                                                                                \
    LB_EXPORT void rms_norm_grad_##NAME(const T *grad, int64_t grad_stride, const T *grad_total,                     \
                                        int64_t grad_total_stride, const T *x, int64_t x_stride,                     \
                                        const float *weight, const float *scale, T *grad_x, float *partial,          \
                                        float *grad_weight, int64_t rows, int64_t dim, int64_t blocks,               \
                                        int64_t threads) {                                                           \
        const Backward<T> a{grad,   grad_stride, grad_total, grad_total_stride, x,   x_stride, weight,               \
                            scale,  grad_x,      partial,    rows,              dim, blocks};                        \
        parallel(blocks, threads, [&](int64_t begin, int64_t end) { backward_##NAME(a, begin, end); });              \
        if (partial) add_up(partial, grad_weight, dim, blocks);                                                      \
    }

LB_RMS_NORM(f32, float)
LB_RMS_NORM(bf16, uint16_t)
