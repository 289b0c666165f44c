// Tiles of float32 in the cache, padded with zeros to multiples of 16 rows and columns so that products need no edges:
// products in registers, transposition, to and from rows of other types. All inlined into functions that are compiled
// for several instruction sets.
#pragma once

#include "common.h"

namespace {

#define LB_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define LB_WIDE __attribute__((target("arch=x86-64-v4")))
inline bool has_wide() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
}
#else
#define LB_WIDE
inline bool has_wide() { return false; }
#endif

constexpr int64_t LANES = 16;

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(64)));

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bf16(*p); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) { *p = to_bf16(v); }

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

enum Shape { ALL, LOWER, UP_TO_ROW, FROM_ROW };

// MR x (NV * 16) of c = or += a b: a element by element at any strides, b by rows.
template <int MR, int NV>
static LB_INLINE void product_tile(int64_t from, int64_t to, const float *a, int64_t a_row, int64_t a_column,
                                   const float *b, int64_t b_row, float *c, int64_t c_row, bool adds) {
    Vector sums[MR][NV];
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j)
            sums[i][j] = adds ? *reinterpret_cast<const Vector *>(c + i * c_row + j * LANES) : Vector{};
    for (int64_t k = from; k < to; ++k) {
        Vector right[NV];
        for (int j = 0; j < NV; ++j) right[j] = *reinterpret_cast<const Vector *>(b + k * b_row + j * LANES);
        for (int i = 0; i < MR; ++i) {
            const float left = a[i * a_row + k * a_column];
            for (int j = 0; j < NV; ++j) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) *reinterpret_cast<Vector *>(c + i * c_row + j * LANES) = sums[i][j];
}

// c [m, n] = or += a [m, k] b [k, n]. LOWER: only what lies on or below the diagonal is needed; UP_TO_ROW, FROM_ROW:
// row i of a is zero behind, before column i.
template <int MR, int NV>
static LB_INLINE void product(Shape shape, int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row,
                              int64_t a_column, const float *b, float *c, bool adds) {
    int64_t j = 0;
    while (j < n) {
        const bool is_full = n - j >= NV * LANES;
        for (int64_t i = 0; i < m; i += MR) {
            if (shape == LOWER && j >= i + MR) continue;
            const int64_t from = shape == FROM_ROW ? i : 0, to = shape == UP_TO_ROW ? i + MR : k;
            const float *left = a + i * a_row;
            if (is_full) product_tile<MR, NV>(from, to, left, a_row, a_column, b + j, n, c + i * n + j, n, adds);
            else product_tile<MR, 1>(from, to, left, a_row, a_column, b + j, n, c + i * n + j, n, adds);
        }
        j += is_full ? NV * LANES : LANES;
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LB_SHUFFLES
#endif
#endif

// to [columns, rows] = from [rows, columns], in blocks of 16 x 16.
static LB_INLINE void transpose(const float *from, int64_t rows, int64_t columns, float *to) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
#if defined(LB_SHUFFLES)
            Vector block[16], mixed[16];
            for (int i = 0; i < 16; ++i) block[i] = *reinterpret_cast<const Vector *>(from + (r + i) * columns + c);
            for (int round = 0; round < 4; ++round) {  // interleaving halves four times puts rows into columns
                for (int i = 0; i < 8; ++i) {
                    mixed[2 * i] = __builtin_shufflevector(block[i], block[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                                           5, 21, 6, 22, 7, 23);
                    mixed[2 * i + 1] = __builtin_shufflevector(block[i], block[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                                               12, 28, 13, 29, 14, 30, 15, 31);
                }
                for (int i = 0; i < 16; ++i) block[i] = mixed[i];
            }
            for (int i = 0; i < 16; ++i) *reinterpret_cast<Vector *>(to + (c + i) * rows + r) = block[i];
#else
            for (int64_t i = 0; i < LANES; ++i)
                for (int64_t j = 0; j < LANES; ++j) to[(c + j) * rows + r + i] = from[(r + i) * columns + c + j];
#endif
        }
}

template <typename T>
static LB_INLINE void load_tile(const T *from, int64_t stride, int64_t rows, int64_t columns, float *to,
                                int64_t to_rows, int64_t to_columns) {
    for (int64_t r = 0; r < to_rows; ++r) {
        float *row = to + r * to_columns;
        int64_t c = 0;
        if (r < rows)
            for (; c < columns; ++c) row[c] = load(from + r * stride + c);
        for (; c < to_columns; ++c) row[c] = 0.0f;
    }
}

template <typename T>
static LB_INLINE void store_tile(const float *from, int64_t from_columns, T *to, int64_t stride, int64_t rows,
                                 int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) store(to + r * stride + c, from[r * from_columns + c]);
}

// to = factor * from by rows; a factor of zero gives zeros whatever it meets.
static LB_INLINE void scale_rows(const float *from, const float *factors, float *to, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
        const float factor = factors[r];
        const float *source = from + r * columns;
        float *target = to + r * columns;
        if (factor == 0.0f)
            for (int64_t c = 0; c < columns; ++c) target[c] = 0.0f;
        else
            for (int64_t c = 0; c < columns; ++c) target[c] = factor * source[c];
    }
}

static LB_INLINE float dot(const float *a, const float *b, int64_t size) {
    Vector sums = {};
    for (int64_t i = 0; i < size; i += LANES)
        sums += *reinterpret_cast<const Vector *>(a + i) * *reinterpret_cast<const Vector *>(b + i);
    float sum = 0.0f;
    for (int i = 0; i < LANES; ++i) sum += sums[i];
    return sum;
}

}  // namespace
