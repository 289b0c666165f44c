// Softmax of rows: some keys hidden by a mask, and one more logit, the sink, whose share is not written.
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace {

// Where something broadcast over the rows lies; a row's number counts through three dimensions.
struct Place {
    int64_t middle, inner, strides[3];
    LB_INLINE int64_t at(int64_t row) const {
        return row / (middle * inner) * strides[0] + row / inner % middle * strides[1] + row % inner * strides[2];
    }
};

template <typename T>
struct Forward {
    const T *scores;
    int64_t stride;
    const uint8_t *mask;  // null for every key
    Place mask_place;
    const float *sink;  // null for none
    Place sink_place;
    T *out;
    int64_t out_stride;
    float *share;  // of the sink
    int64_t keys;
};

template <typename L, typename T>
LB_INLINE void forward_rows(const Forward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    const float none = -std::numeric_limits<float>::infinity();
    std::vector<float> memory(a.keys);
    float *buffer = memory.data();
    for (int64_t row = begin; row < end; ++row) {
        const T *scores = a.scores + row * a.stride;
        T *out = a.out + row * a.out_stride;
        const uint8_t *mask = a.mask ? a.mask + a.mask_place.at(row) : nullptr;
        floats highest = L::all(none);
        L::each(a.keys, LB_LANES {
            floats v = L::load(scores + i, count, none);
            if (mask) v = L::load_mask(mask + i, count) ? v : L::all(none);
            highest = v > highest ? v : highest;
            L::store(buffer + i, v, count);
        });
        float most = L::largest(highest), total = 0.0f;
        if (a.sink) {
            const float sink = a.sink[a.sink_place.at(row)];
            most = sink > most ? sink : most;
            a.share[row] = total = std::exp(sink - most);
        }
        if (most == none) most = 0.0f;  // a row without a key: every exponential is 0
        floats sums{};
        L::each(a.keys, LB_LANES {
            const floats e = L::exp(L::load(buffer + i, count, none) - most);
            sums += e;
            L::store(buffer + i, e, count);
        });
        total += L::sum(sums);
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        if (a.sink) a.share[row] *= factor;
        L::each(a.keys, LB_LANES { L::store(out + i, L::load(buffer + i, count) * factor, count); });
    }
}

template <typename T>
struct Backward {
    const T *grad;
    int64_t grad_stride;
    const T *weights;
    int64_t stride;
    T *out;
    int64_t out_stride;
    float *dots;
    int64_t keys;
};

template <typename L, typename T>
LB_INLINE void backward_rows(const Backward<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t row = begin; row < end; ++row) {
        const T *grad = a.grad + row * a.grad_stride, *weights = a.weights + row * a.stride;
        T *out = a.out + row * a.out_stride;
        floats products{};
        L::each(a.keys, LB_LANES { products += L::load(grad + i, count) * L::load(weights + i, count); });
        const float dot = L::sum(products);
        L::each(a.keys, LB_LANES {
            L::store(out + i, (L::load(grad + i, count) - dot) * L::load(weights + i, count), count);
        });
        a.dots[row] = dot;
    }
}

LB_BY_LANES(forward_f32, forward_rows, Forward<float>)
LB_BY_LANES(forward_bf16, forward_rows, Forward<uint16_t>)
LB_BY_LANES(backward_f32, backward_rows, Backward<float>)
LB_BY_LANES(backward_bf16, backward_rows, Backward<uint16_t>)

}  // namespace

// Places: sizes of the middle and the inner dimension, then three strides of the mask and three of the sink.
#define LB_SOFTMAX(NAME, T)                                                                                          \
    LB_EXPORT void softmax_##NAME(const T *scores, int64_t stride, const uint8_t *mask, const float *sink,           \
                                  const int64_t *places, T *out, int64_t out_stride, float *share, int64_t rows,     \
                                  int64_t keys, int64_t threads) {                                                   \
        const auto place = [&](int64_t i) {                                                                          \
            return Place{places[0], places[1], {places[i], places[i + 1], places[i + 2]}};                           \
        };                                                                                                           \
        const Forward<T> a{scores, stride, mask, place(2), sink, place(5), out, out_stride, share, keys};            \
        parallel(rows, threads, [&](int64_t begin, int64_t end) { forward_##NAME(a, begin, end); });                 \
    }                                                                                                                \
    LB_EXPORT void softmax_grad_##NAME(const T *grad, int64_t grad_stride, const T *weights, int64_t stride, T *out, \
                                       int64_t out_stride, float *dots, int64_t rows, int64_t keys,                  \
                                       int64_t threads) {                                                            \
        const Backward<T> a{grad, grad_stride, weights, stride, out, out_stride, dots, keys};                        \
        parallel(rows, threads, [&](int64_t begin, int64_t end) { backward_##NAME(a, begin, end); });                \
    }

LB_SOFTMAX(f32, float)
LB_SOFTMAX(bf16, uint16_t)
