// Rotary positions: halves of a head's features turned against each other; any order of positions, samples and heads.
#include "vector.h"

namespace {

struct Strides {
    int64_t position, sample, head;
    LB_INLINE int64_t at(int64_t l, int64_t b, int64_t h) const { return l * position + b * sample + h * head; }
};

template <typename T>
struct Rotation {
    const T *x;
    T *out;
    const float *cosine, *sine;
    Strides from, to, angle;
    int64_t samples, heads, half;
    float sign;
};

template <typename L, typename T>
LB_INLINE void rotate(const Rotation<T> &a, int64_t begin, int64_t end) {
    using floats = typename L::floats;
    for (int64_t l = begin; l < end; ++l)
        for (int64_t b = 0; b < a.samples; ++b)
            for (int64_t h = 0; h < a.heads; ++h) {
                const T *x = a.x + a.from.at(l, b, h);
                T *out = a.out + a.to.at(l, b, h);
                const float *cosine = a.cosine + a.angle.at(l, b, h), *sine = a.sine + a.angle.at(l, b, h);
                L::each(a.half, LB_LANES {
                    const floats first = L::load(x + i, count), second = L::load(x + a.half + i, count);
                    const floats c = L::load(cosine + i, count), s = L::load(sine + i, count) * a.sign;
                    L::store(out + i, first * c - second * s, count);
                    L::store(out + a.half + i, second * c + first * s, count);
                });
            }
}

LB_BY_LANES(rotate_f32, rotate, Rotation<float>)
LB_BY_LANES(rotate_bf16, rotate, Rotation<uint16_t>)

}  // namespace

// Sizes: positions, samples, heads, half of the width. Strides: of x, of out, of the angles, three each.
#define LB_ROPE(NAME, T)                                                                                             \
    LB_EXPORT void rope_##NAME(const T *x, T *out, const float *cosine, const float *sine, const int64_t *strides,   \
                               const int64_t *sizes, float sign, int64_t threads) {                                  \
        const auto three = [&](int64_t i) { return Strides{strides[i], strides[i + 1], strides[i + 2]}; };           \
        const Rotation<T> a{x,        out,      cosine,   sine,     three(0),                                        \
                            three(3), three(6), sizes[1], sizes[2], sizes[3], sign};                                 \
        parallel(sizes[0], threads, [&](int64_t begin, int64_t end) { rotate_##NAME(a, begin, end); });              \
    }

LB_ROPE(f32, float)
LB_ROPE(bf16, uint16_t)
