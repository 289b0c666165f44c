// What the C++ kernels share: versions by instruction set, threads, bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

// One function compiled for several instruction sets; the loader picks the best (GCC and Clang on x86 Linux). May be
// given as empty, to compile once.
#if defined(LB_CLONES)
#elif defined(__x86_64__) && defined(__linux__)
#define LB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LB_CLONES
#endif

#define LB_EXPORT extern "C" __attribute__((visibility("default")))

// body(begin, end) over [0, count), in up to `threads` parts.
template <typename Body>
static inline void parallel(int64_t count, int64_t threads, Body body) {
    if (threads > count) threads = count;
    if (threads <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int64_t part = 0; part < threads; ++part) {
        body(count * part / threads, count * (part + 1) / threads);
    }
}

static inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// e^x of -87.3 <= x <= 88.7 within two units in the last place, in a form that compilers vectorise.
static inline __attribute__((always_inline)) float exp_bounded(float x) {
    const float n = __builtin_rintf(x * 1.44269504088896f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // n ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// e^x; 0 below -87.3, finite above 88.7.
static inline float exp_fast(float x) {
    return exp_bounded(x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x));
}

// e^x of x <= 0; 0 below -87, where the result would be denormal, which is slow to compute with. NaN stays NaN.
static inline __attribute__((always_inline)) float exp_nonpositive(float x) {
    const float e = exp_bounded(x < -87.0f ? -87.0f : x);
    return x < -87.0f ? 0.0f : e;
}
