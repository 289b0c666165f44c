// Products of 8-bit inputs with packed ternary weights (W2A8), exact in int32.
//
// Weights are interleaved: 16 outputs to a block, four bytes of each in turn, so that 64 bytes are one vector whose 16
// lanes of 32 bits are the outputs. Inputs are arranged to match: the word of digit i of group g holds the inputs that
// the four bytes' i-th digits are multiplied with. Digits are codes plus 1, so the sum of the inputs is taken off.
#include "common.h"

#include <cmath>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LB_X86_LEVELS
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kOutputs = 16;                      // of a block
constexpr int64_t kGroup = 64;                        // bytes: four of each output
constexpr int64_t kBlocks = 2;                        // multiplied at once
constexpr int64_t kTileOutputs = kBlocks * kOutputs;  // sums of one token
constexpr int64_t kTileGroups = 32;                   // unpacked at once: 20 KB at most, which stay in the first cache
constexpr int64_t kFlush = 1024;                      // groups whose sums fit in int32, times 256
constexpr int64_t kPanel = 128;                       // tokens for which a tile is unpacked once

constexpr int64_t kTokens = 8;                        // multiplied at once

using SumsOf = void (*)(const uint8_t *, int64_t, int64_t, const int32_t *, int64_t, int64_t, int32_t *);

namespace plain {
struct Bytes { uint8_t at[64]; };
struct Sums { int32_t at[16]; };
constexpr bool kWide = true;
#define LB_EACH(T, COUNT, VALUE)                    \
    T r;                                            \
    for (int k = 0; k < COUNT; ++k) r.at[k] = VALUE; \
    return r
inline Bytes load(const uint8_t *p) { LB_EACH(Bytes, 64, p[k]); }
inline void store(uint8_t *p, const Bytes &a) { std::memcpy(p, a.at, 64); }
inline Bytes all(uint8_t v) { LB_EACH(Bytes, 64, v); }
inline Bytes both(const Bytes &a, const Bytes &b) { LB_EACH(Bytes, 64, a.at[k] & b.at[k]); }
inline Bytes add(const Bytes &a, const Bytes &b) { LB_EACH(Bytes, 64, static_cast<uint8_t>(a.at[k] + b.at[k])); }
inline Bytes less(const Bytes &a, const Bytes &b) {
    LB_EACH(Bytes, 64, static_cast<uint8_t>(a.at[k] > b.at[k] ? a.at[k] - b.at[k] : 0));
}
inline Bytes least(const Bytes &a, const Bytes &b) { LB_EACH(Bytes, 64, a.at[k] < b.at[k] ? a.at[k] : b.at[k]); }
inline Bytes right(const Bytes &a, int n) { LB_EACH(Bytes, 64, static_cast<uint8_t>(a.at[k] >> n)); }
inline Sums load(const int32_t *p) { LB_EACH(Sums, 16, p[k]); }
inline void store(int32_t *p, const Sums &a) { std::memcpy(p, a.at, 64); }
inline Sums zero() { LB_EACH(Sums, 16, 0); }
inline Sums plus(const Sums &a, const Sums &b) { LB_EACH(Sums, 16, int32_t(uint32_t(a.at[k]) + uint32_t(b.at[k]))); }
inline Sums minus(const Sums &a, const Sums &b) { LB_EACH(Sums, 16, int32_t(uint32_t(a.at[k]) - uint32_t(b.at[k]))); }
inline Sums shifted(const Sums &a, int n) { LB_EACH(Sums, 16, a.at[k] >> n); }
inline Sums dot(const Sums &a, const Bytes &b, int32_t x) {
    int8_t in[4];
    std::memcpy(in, &x, 4);
    const uint8_t *p = b.at;
    LB_EACH(Sums, 16, int32_t(uint32_t(a.at[k]) + uint32_t(
        p[4 * k] * in[0] + p[4 * k + 1] * in[1] + p[4 * k + 2] * in[2] + p[4 * k + 3] * in[3])));
}
#include "product.h"
}  // namespace plain

#if defined(LB_X86_LEVELS)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
struct Bytes { __m256i low, high; };
struct Sums { __m256i low, high; };
constexpr bool kWide = false;  // pairs of products are added in 16 bits, which saturate
#define LB_PAIR(T, F, ...) return T{F(a.low, ##__VA_ARGS__), F(a.high, ##__VA_ARGS__)}
#define LB_PAIRS(T, F) return T{F(a.low, b.low), F(a.high, b.high)}
inline __m256i load_half(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline Bytes load(const uint8_t *p) { return {load_half(p), load_half(p + 32)}; }
inline void store(uint8_t *p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 32), a.high);
}
inline Bytes all(uint8_t v) { return {_mm256_set1_epi8(char(v)), _mm256_set1_epi8(char(v))}; }
inline Bytes both(Bytes a, Bytes b) { LB_PAIRS(Bytes, _mm256_and_si256); }
inline Bytes add(Bytes a, Bytes b) { LB_PAIRS(Bytes, _mm256_add_epi8); }
inline Bytes less(Bytes a, Bytes b) { LB_PAIRS(Bytes, _mm256_subs_epu8); }
inline Bytes least(Bytes a, Bytes b) { LB_PAIRS(Bytes, _mm256_min_epu8); }
inline Bytes right(Bytes a, int n) {
    const Bytes inside = all(static_cast<uint8_t>(0xff >> n));
    return {_mm256_and_si256(_mm256_srli_epi16(a.low, n), inside.low),
            _mm256_and_si256(_mm256_srli_epi16(a.high, n), inside.high)};
}
inline Sums load(const int32_t *p) { return {load_half(p), load_half(p + 8)}; }
inline void store(int32_t *p, Sums a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 8), a.high);
}
inline Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Sums plus(Sums a, Sums b) { LB_PAIRS(Sums, _mm256_add_epi32); }
inline Sums minus(Sums a, Sums b) { LB_PAIRS(Sums, _mm256_sub_epi32); }
inline Sums shifted(Sums a, int n) { LB_PAIR(Sums, _mm256_srai_epi32, n); }
inline __m256i dot_half(__m256i sums, __m256i bytes, __m256i x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1)));
}
inline Sums dot(Sums a, Bytes b, int32_t x) {
    const __m256i wide = _mm256_set1_epi32(x);
    return {dot_half(a.low, b.low, wide), dot_half(a.high, b.high, wide)};
}
#include "product.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
namespace vnni {
using Bytes = __m512i;
using Sums = __m512i;
constexpr bool kWide = true;
inline Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes all(uint8_t v) { return _mm512_set1_epi8(char(v)); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes less(Bytes a, Bytes b) { return _mm512_subs_epu8(a, b); }
inline Bytes least(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
inline Bytes right(Bytes a, int n) {
    return _mm512_and_si512(_mm512_srli_epi16(a, n), all(static_cast<uint8_t>(0xff >> n)));
}
inline Sums load(const int32_t *p) { return _mm512_loadu_si512(p); }
inline void store(int32_t *p, Sums a) { _mm512_storeu_si512(p, a); }
inline Sums zero() { return _mm512_setzero_si512(); }
inline Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums minus(Sums a, Sums b) { return _mm512_sub_epi32(a, b); }
inline Sums shifted(Sums a, int n) { return _mm512_srai_epi32(a, n); }
// As assembly: with the intrinsic GCC 12 copies each sum to another register and back in every round of a loop.
inline Sums dot(Sums a, Bytes b, int32_t x) {
    asm("vpdpbusd %2, %1, %0" : "+&v"(a) : "v"(b), "v"(_mm512_set1_epi32(x)));
    return a;
}
#include "product.h"
}  // namespace vnni
#pragma GCC pop_options
#endif

// 0: plain C++, 1: AVX2, 2: AVX-512 with VNNI.
int64_t best_level() {
#if defined(LB_X86_LEVELS)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

SumsOf product_of(int64_t level, int64_t digits) {
#if defined(LB_X86_LEVELS)
    if (level == 2) return digits == 4 ? vnni::sums_of<4> : vnni::sums_of<5>;
    if (level == 1) return digits == 4 ? avx2::sums_of<4> : avx2::sums_of<5>;
#endif
    (void)level;
    return digits == 4 ? plain::sums_of<4> : plain::sums_of<5>;
}

// How a token becomes codes; what is given for codes that are already there is its scale alone.
enum Kind : int64_t { kCodes = 0, kFloat = 1, kBfloat16 = 2 };
struct Quantisation {
    float levels;     // the largest code
    float factor;     // what the largest magnitude becomes before it is rounded
    float least;      // no largest magnitude is below
    float norm_eps;   // of the root mean square by which scales are divided; negative: none
    int64_t bounded;  // inputs from 0 to 1, which become codes from 0 to levels
};

inline float value(const float *p) { return *p; }
inline float value(const uint16_t *p) { return from_bf16(*p); }

// Codes of one token and its scale; not a number where an input is not finite (a bounded one: not a number).
template <typename T>
inline __attribute__((always_inline)) float quantise_row(const T *x, int64_t size, const Quantisation &how, int8_t *codes) {
    if (how.bounded) {
        int32_t nans = 0;
        for (int64_t i = 0; i < size; ++i) {
            const float v = __builtin_rintf(value(x + i) * how.levels);
            nans |= v != v;
            codes[i] = static_cast<int8_t>(v > how.levels ? how.levels : (v > 0.0f ? v : 0.0f));
        }
        return nans ? NAN : 1.0f / how.levels;
    }
    int32_t bits = 0;  // those of magnitudes have the order of the magnitudes, infinity and NaN on top
    float squares[16] = {};
    for (int64_t i = 0; i < size; ++i) {
        const float v = value(x + i);
        int32_t own;
        std::memcpy(&own, &v, sizeof own);
        own &= 0x7fffffff;
        bits = own > bits ? own : bits;
    }
    if (how.norm_eps >= 0.0f) {
        for (int64_t i = 0; i < size; i += 16) {
            const int64_t width = size - i < 16 ? size - i : 16;
            for (int64_t k = 0; k < width; ++k) squares[k] += value(x + i + k) * value(x + i + k);
        }
    }
    if (bits >= 0x7f800000) {
        std::memset(codes, 0, size);
        return NAN;
    }
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    largest = largest < how.least ? how.least : largest;
    const float factor = (1.0f / largest) * how.factor;
    for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<int8_t>(__builtin_rintf(value(x + i) * factor));
    float total = 0.0f;
    for (int k = 0; k < 16; ++k) total += squares[k];
    const float scale = largest / how.levels;
    return how.norm_eps < 0.0f ? scale : scale * (1.0f / std::sqrt(total / static_cast<float>(size) + how.norm_eps));
}

LB_CLONES float quantise(const float *x, int64_t size, const Quantisation &how, int8_t *codes) {
    return quantise_row(x, size, how, codes);
}
LB_CLONES float quantise(const uint16_t *x, int64_t size, const Quantisation &how, int8_t *codes) {
    return quantise_row(x, size, how, codes);
}

// words[g][d], byte j: the input of digit d of byte j of group g; `codes` has groups * 4 * D of them. Returns the sum.
template <int D>
inline __attribute__((always_inline)) int32_t arrange_row(const int8_t *codes, int64_t groups, int32_t *words) {
    int8_t *bytes = reinterpret_cast<int8_t *>(words);
    int32_t sum = 0;
    for (int64_t g = 0; g < groups; ++g) {
        for (int d = 0; d < D; ++d) {
            // Base 3 gives its highest digit first.
            const int8_t *from = codes + g * 4 * D + (D == 4 ? d : D - 1 - d);
            for (int j = 0; j < 4; ++j) {
                bytes[(g * D + d) * 4 + j] = from[j * D];
                sum += from[j * D];
            }
        }
    }
    return sum;
}

LB_CLONES int32_t arrange4(const int8_t *codes, int64_t groups, int32_t *words) {
    return arrange_row<4>(codes, groups, words);
}
LB_CLONES int32_t arrange5(const int8_t *codes, int64_t groups, int32_t *words) {
    return arrange_row<5>(codes, groups, words);
}

// Sums of one token and up to kTileOutputs outputs to values.
template <typename T>
inline __attribute__((always_inline)) void finish(
    const int32_t *sums, int32_t inputs, const float *scale, float token_scale, int64_t count, T *out) {
    for (int64_t o = 0; o < count; ++o) {
        const float v = static_cast<float>(sums[o] - inputs) * scale[o] * token_scale;
        if constexpr (sizeof(T) == 4) out[o] = v;
        else out[o] = to_bf16(v);
    }
}

LB_CLONES void finish_f32(const int32_t *s, int32_t i, const float *w, float t, int64_t n, float *o) {
    finish(s, i, w, t, n, o);
}
LB_CLONES void finish_bf16(const int32_t *s, int32_t i, const float *w, float t, int64_t n, uint16_t *o) {
    finish(s, i, w, t, n, o);
}

struct Part {  // rows of one expert
    int64_t expert, begin, end;
};

}  // namespace

LB_EXPORT void ternary_level(int64_t *level) { *level = best_level(); }

// out [rows, out_features] = x [rows, in_features] times weights [experts][blocks][groups][64], counts[experts] rows
// each. kind: of x; token_scale: of codes, with a stride of 0 one for all. scale: [experts, parts].
LB_EXPORT void ternary_matmul(
    const void *x, int64_t kind, int64_t x_stride, int64_t in_features, const float *token_scale, int64_t scale_stride,
    const Quantisation *how, const uint8_t *weights, int64_t digits, const float *scale, int64_t parts,
    int64_t out_features, const int64_t *counts, int64_t experts, void *out, int64_t is_bf16, int64_t level,
    int64_t threads) {
    const int64_t groups = (in_features + 4 * digits - 1) / (4 * digits), words = groups * digits;
    const int64_t blocks = (out_features + kOutputs - 1) / kOutputs, tiles = (blocks + kBlocks - 1) / kBlocks;
    std::vector<Part> active;
    int64_t rows = 0;
    for (int64_t e = 0; e < experts; ++e) {
        for (int64_t begin = 0; begin < counts[e]; begin += kPanel)
            active.push_back({e, rows + begin, rows + (begin + kPanel < counts[e] ? begin + kPanel : counts[e])});
        rows += counts[e];
    }
    std::vector<int32_t> arranged(rows * words), input_sums(rows);
    std::vector<float> token_scales(rows);
    parallel(rows, rows * in_features < (1 << 15) ? 1 : threads, [&](int64_t begin, int64_t end) {
        std::vector<int8_t> codes(words * 4);
        for (int64_t r = begin; r < end; ++r) {
            if (kind == kCodes) {
                std::memcpy(codes.data(), static_cast<const int8_t *>(x) + r * x_stride, in_features);
                token_scales[r] = token_scale[r * scale_stride];
            } else if (kind == kFloat) {
                token_scales[r] = quantise(static_cast<const float *>(x) + r * x_stride, in_features, *how, codes.data());
            } else {
                const uint16_t *row = static_cast<const uint16_t *>(x) + r * x_stride;
                token_scales[r] = quantise(row, in_features, *how, codes.data());
            }
            input_sums[r] = (digits == 4 ? arrange4 : arrange5)(codes.data(), groups, arranged.data() + r * words);
        }
    });
    const SumsOf sums_of = product_of(level, digits);
    const int64_t items = static_cast<int64_t>(active.size()) * tiles, each = out_features / parts;
    const int64_t work = rows * out_features * in_features;
    parallel(items, work < (1 << 18) ? 1 : threads, [&](int64_t begin, int64_t end) {
        alignas(64) int32_t sums[kPanel * kTileOutputs];
        float own_scale[kTileOutputs];
        for (int64_t item = begin; item < end; ++item) {
            const Part part = active[item / tiles];
            const int64_t first = item % tiles * kBlocks, count = blocks - first < kBlocks ? blocks - first : kBlocks;
            const int64_t output = first * kOutputs;
            const int64_t width = out_features - output < kTileOutputs ? out_features - output : kTileOutputs;
            sums_of(weights + (part.expert * blocks + first) * groups * kGroup, count, groups,
                    arranged.data() + part.begin * words, words, part.end - part.begin, sums);
            for (int64_t o = 0; o < width; ++o) own_scale[o] = scale[part.expert * parts + (output + o) / each];
            for (int64_t r = part.begin; r < part.end; ++r) {
                const int32_t *row = sums + (r - part.begin) * kTileOutputs;
                const int64_t place = r * out_features + output;
                if (is_bf16)
                    finish_bf16(row, input_sums[r], own_scale, token_scales[r], width, static_cast<uint16_t *>(out) + place);
                else
                    finish_f32(row, input_sums[r], own_scale, token_scales[r], width, static_cast<float *>(out) + place);
            }
        }
    });
}
