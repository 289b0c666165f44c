// Sixteen floats at a time, in the compilers' own vector types: split where the processor's registers are narrower.
//
// Sums over a row go by lane, then over the lanes in one fixed order, so that a row's bits depend on nothing else.
#pragma once

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: no such vector is ever passed

#define LB_INLINE inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

static constexpr int64_t LANES = 16;

// body(i, count) for the lanes from i on: sixteen as long as there are so many, known to the compiler, then the rest.
template <typename Body>
static LB_INLINE void by_lanes(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, LANES);
    if (i < size) body(i, size - i);
}

#define LB_LANES [&](int64_t i, int64_t count) __attribute__((always_inline))

static LB_INLINE floats all(float value) { return value - floats{}; }

// The first `count` numbers at p, up to sixteen; `rest` in the other lanes.
static LB_INLINE floats load(const float *p, int64_t count, float rest = 0.0f) {
    floats v = all(rest);
    if (count >= LANES)
        std::memcpy(&v, p, sizeof v);
    else
        for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}

static LB_INLINE floats load(const uint16_t *p, int64_t count, float rest = 0.0f) {
    if (count < LANES) {
        floats v = all(rest);
        for (int64_t i = 0; i < count; ++i) v[i] = from_bf16(p[i]);
        return v;
    }
    halves bits;
    std::memcpy(&bits, p, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

static LB_INLINE void store(float *p, floats v, int64_t count) {
    if (count >= LANES)
        std::memcpy(p, &v, sizeof v);
    else
        for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

static LB_INLINE void store(uint16_t *p, floats v, int64_t count) {
    if (count < LANES) {
        for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(v[i]);
        return;
    }
    const words bits = (words)v;
    const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const words quiet = words{} + 0x7fc0u;
    const halves out = __builtin_convertvector((v != v) ? quiet : rounded, halves);
    std::memcpy(p, &out, sizeof out);
}

static LB_INLINE float sum(floats v) {
    for (int64_t step = LANES / 2; step; step /= 2)
        for (int64_t i = 0; i < step; ++i) v[i] += v[i + step];
    return v[0];
}

// Of the lanes that are not NaN.
static LB_INLINE float largest(floats v) {
    for (int64_t step = LANES / 2; step; step /= 2)
        for (int64_t i = 0; i < step; ++i) v[i] = v[i + step] > v[i] ? v[i + step] : v[i];
    return v[0];
}

// True (all bits set) where one of the first `count` bytes at p is not zero.
static LB_INLINE ints load_mask(const uint8_t *p, int64_t count) {
    bytes found{};
    if (count >= LANES)
        std::memcpy(&found, p, sizeof found);
    else
        for (int64_t i = 0; i < count; ++i) found[i] = p[i];
    return (ints)__builtin_convertvector(__builtin_convertvector(found, halves), words) != 0;  // GCC widens once at a time
}

// As the scalar exp_fast, but 0 below -87.3.
static LB_INLINE floats exp_fast(floats x) {
    const floats low = all(-87.33f), high = all(88.72f);
    const floats y = x > high ? high : x;
    const floats n = (y * 1.44269504088896f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
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
