// Several floats at a time, in the compilers' own vector types, as many as the processor's registers hold: wider vectors
// would be taken apart number by number.
//
// Sums over a row go by lane, then over the lanes in one fixed order, so that a row's bits depend on nothing else.
#pragma once

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: no such vector is ever passed

#define LB_INLINE inline __attribute__((always_inline))

// The body of a loop over lanes, see Lanes::each.
#define LB_LANES [&](int64_t i, int64_t count) __attribute__((always_inline))

// 4, 3 or 1 for x86-64-v4 (AVX-512), v3 (AVX2) and the baseline, 0 for other processors.
static inline int processor_level() {
#if defined(__x86_64__) && defined(__linux__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    return v4 ? 4 : v3 ? 3 : 1;
#else
    return 0;
#endif
}

// NAME(arguments, begin, end) by BODY<Lanes<N>>, with sixteen lanes where there is AVX-512.
#if defined(__x86_64__) && defined(__linux__)
#define LB_BY_LANES(NAME, BODY, ARGUMENTS)                                                                            \
    __attribute__((target("arch=x86-64-v4"))) void NAME##_wide(const ARGUMENTS &a, int64_t begin, int64_t end) {      \
        BODY<Lanes<16>>(a, begin, end);                                                                               \
    }                                                                                                                 \
    __attribute__((target_clones("arch=x86-64-v3", "default"))) void NAME##_narrow(const ARGUMENTS &a, int64_t begin, \
                                                                                   int64_t end) {                     \
        BODY<Lanes<8>>(a, begin, end);                                                                                \
    }                                                                                                                 \
    void NAME(const ARGUMENTS &a, int64_t begin, int64_t end) {                                                       \
        processor_level() == 4 ? NAME##_wide(a, begin, end) : NAME##_narrow(a, begin, end);                           \
    }
#else
#define LB_BY_LANES(NAME, BODY, ARGUMENTS) \
    void NAME(const ARGUMENTS &a, int64_t begin, int64_t end) { BODY<Lanes<4>>(a, begin, end); }
#endif

template <int N>
struct Vectors;  // GCC takes no vector_size that depends on a template's argument

#define LB_VECTORS(N)                                           \
    template <>                                                 \
    struct Vectors<N> {                                         \
        typedef float floats __attribute__((vector_size(4 * N)));   \
        typedef int32_t ints __attribute__((vector_size(4 * N)));   \
        typedef uint32_t words __attribute__((vector_size(4 * N))); \
        typedef uint16_t halves __attribute__((vector_size(2 * N))); \
        typedef uint8_t bytes __attribute__((vector_size(N)));  \
    };
LB_VECTORS(4)
LB_VECTORS(8)
LB_VECTORS(16)

template <int N>
struct Lanes {
    using floats = typename Vectors<N>::floats;
    using ints = typename Vectors<N>::ints;
    using words = typename Vectors<N>::words;
    using halves = typename Vectors<N>::halves;
    using bytes = typename Vectors<N>::bytes;

    // body(i, count) for the numbers from i on: N as long as there are so many, known to the compiler, then the rest.
    template <typename Body>
    static LB_INLINE void each(int64_t size, Body body) {
        int64_t i = 0;
        for (; i + N <= size; i += N) body(i, int64_t{N});
        if (i < size) body(i, size - i);
    }

    static LB_INLINE floats all(float value) { return value - floats{}; }

    // The first `count` numbers at p, up to N; `rest` in the other lanes.
    static LB_INLINE floats load(const float *p, int64_t count, float rest = 0.0f) {
        floats v = all(rest);
        if (count >= N)
            std::memcpy(&v, p, sizeof v);
        else
            for (int64_t i = 0; i < count; ++i) v[i] = p[i];
        return v;
    }

    static LB_INLINE floats load(const uint16_t *p, int64_t count, float rest = 0.0f) {
        if (count < N) {
            floats v = all(rest);
            for (int64_t i = 0; i < count; ++i) v[i] = from_bf16(p[i]);
            return v;
        }
        halves bits;
        std::memcpy(&bits, p, sizeof bits);
        return (floats)(__builtin_convertvector(bits, words) << 16);
    }

    static LB_INLINE void store(float *p, floats v, int64_t count) {
        if (count >= N)
            std::memcpy(p, &v, sizeof v);
        else
            for (int64_t i = 0; i < count; ++i) p[i] = v[i];
    }

    static LB_INLINE void store(uint16_t *p, floats v, int64_t count) {
        if (count < N) {
            for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(v[i]);
            return;
        }
        const words bits = (words)v;
        const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const words quiet = words{} + 0x7fc0u;
        const halves out = __builtin_convertvector((v != v) ? quiet : rounded, halves);
        std::memcpy(p, &out, sizeof out);
    }

    // True (all bits set) where one of the first `count` bytes at p is not zero.
    static LB_INLINE ints load_mask(const uint8_t *p, int64_t count) {
        bytes found{};
        if (count >= N)
            std::memcpy(&found, p, sizeof found);
        else
            for (int64_t i = 0; i < count; ++i) found[i] = p[i];
        // In two steps: at once, GCC 12 takes the vector apart.
        return (ints)__builtin_convertvector(__builtin_convertvector(found, halves), words) != 0;
    }

    static LB_INLINE float sum(floats v) {
        for (int64_t step = N / 2; step; step /= 2)
            for (int64_t i = 0; i < step; ++i) v[i] += v[i + step];
        return v[0];
    }

    // Of the lanes that are not NaN.
    static LB_INLINE float largest(floats v) {
        for (int64_t step = N / 2; step; step /= 2)
            for (int64_t i = 0; i < step; ++i) v[i] = v[i + step] > v[i] ? v[i + step] : v[i];
        return v[0];
    }

    // As exp_fast of a number, but 0 below -87.3.
    static LB_INLINE floats exp(floats x) {
        const floats low = all(-87.33f), high = all(88.72f);
        const floats y = x > high ? high : x;
        const floats n = (y * 1.44269504088896f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds
        const floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;         // n ln 2 in two parts
        floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        p *= (floats)((__builtin_convertvector(n, ints) + 127) << 23);
        return x < low ? floats{} : p;
    }
};
