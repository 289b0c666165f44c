// Products of one or two blocks of outputs, written in terms of the few operations on 64 bytes and 16 sums that each
// instruction set defines before it includes this file: Bytes, Sums, load, store, all, both, add, less, least, right,
// dot, shifted, plus, minus3; kWide says whether dot takes unsigned bytes up to 255.
// No include guard: included once per instruction set, in its namespace.

// The digits of 64 bytes, each 0 to 2, in the order in which inputs are arranged.
template <int D>
static inline void digits_of(Bytes packed, Bytes *digits) {
    if (D == 4) {
        for (int i = 0; i < D; ++i) digits[i] = both(right(packed, 2 * i), all(3));
        return;
    }
    for (int i = 0; i < D; ++i) {
        // floor(3 b / 256): one for b >= 86, one more for b >= 171; what remains is 3 b mod 256.
        digits[i] = add(least(less(packed, all(85)), all(1)), least(less(packed, all(170)), all(1)));
        packed = add(packed, add(packed, packed));
    }
}

// Sums of one block's codes plus 1 with N tokens, straight from the packed bytes. For few tokens: the bytes are read
// once and no digit is written anywhere.
template <int D, int N>
static void stream(const uint8_t *block, int64_t groups, const int32_t *x, int64_t stride, int32_t *out) {
    constexpr int64_t kAhead = 4096;
    for (int n = 0; n < N; ++n) std::memset(out + n * kTileOutputs, 0, kOutputs * sizeof(int32_t));
    for (int64_t begin = 0; begin < groups; begin += kFlush) {
        const int64_t end = begin + kFlush < groups ? begin + kFlush : groups;
        Sums first[N][D], second[N][D];
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < D; ++i) first[n][i] = second[n][i] = zero();
        for (int64_t g = begin; g < end; ++g) {
            __builtin_prefetch(block + g * kGroup + kAhead);
            const Bytes packed = load(block + g * kGroup);
            if (D == 4) {
                // Digit i stays where it is, 4^i times itself; the sum is shifted once at the end.
                for (int i = 0; i < D; ++i) {
                    const Bytes digit = both(packed, all(static_cast<uint8_t>(3 << (2 * i))));
                    for (int n = 0; n < N; ++n) first[n][i] = dot(first[n][i], digit, x[n * stride + g * D + i]);
                }
            } else if (kWide) {
                // With b' = 3 b mod 256 the digit is (3 b - b') / 256: both are multiplied, no digit is computed.
                Bytes rest = packed;
                for (int i = 0; i < D; ++i) {
                    const Bytes next = add(rest, add(rest, rest));
                    for (int n = 0; n < N; ++n) {
                        first[n][i] = dot(first[n][i], rest, x[n * stride + g * D + i]);
                        second[n][i] = dot(second[n][i], next, x[n * stride + g * D + i]);
                    }
                    rest = next;
                }
            } else {
                Bytes digits[D];
                digits_of<D>(packed, digits);
                for (int i = 0; i < D; ++i)
                    for (int n = 0; n < N; ++n) first[n][i] = dot(first[n][i], digits[i], x[n * stride + g * D + i]);
            }
        }
        for (int n = 0; n < N; ++n) {
            Sums total = load(out + n * kTileOutputs);
            if (D == 5 && kWide) {
                Sums a = zero(), b = zero();
                for (int i = 0; i < D; ++i) {
                    a = plus(a, first[n][i]);
                    b = plus(b, second[n][i]);
                }
                total = plus(total, shifted(minus(plus(a, plus(a, a)), b), 8));
            } else {
                for (int i = 0; i < D; ++i) total = plus(total, shifted(first[n][i], D == 4 ? 2 * i : 0));
            }
            store(out + n * kTileOutputs, total);
        }
    }
}

// out[n][outputs] += tile x inputs of N tokens, each `stride` words behind the one before; tile: [words][kBlocks][64] digits.
template <int N>
static void multiply(const uint8_t *tile, int64_t words, const int32_t *x, int64_t stride, int32_t *out) {
    Sums sums[N][kBlocks];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < kBlocks; ++m) sums[n][m] = load(out + n * kTileOutputs + m * kOutputs);
    for (int64_t w = 0; w < words; ++w) {
        Bytes digit[kBlocks];
        for (int m = 0; m < kBlocks; ++m) digit[m] = load(tile + (w * kBlocks + m) * kGroup);
    #pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
            for (int m = 0; m < kBlocks; ++m) sums[n][m] = dot(sums[n][m], digit[m], x[n * stride + w]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < kBlocks; ++m) store(out + n * kTileOutputs + m * kOutputs, sums[n][m]);
}

using Multiply = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int32_t *);
static const Multiply of_tokens[kTokens] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                            multiply<5>, multiply<6>, multiply<7>, multiply<8>};

// out[tokens][kTileOutputs] = sums of up to kBlocks blocks with any number of tokens, digits unpacked tile by tile.
template <int D>
static void multiply_all(
    const uint8_t *blocks, int64_t count, int64_t groups, const int32_t *x, int64_t stride, int64_t tokens,
    int32_t *out) {
    alignas(64) uint8_t tile[kTileGroups * D * kBlocks * kGroup];
    std::memset(out, 0, tokens * kTileOutputs * sizeof(int32_t));
    for (int64_t begin = 0; begin < groups; begin += kTileGroups) {
        const int64_t size = begin + kTileGroups < groups ? kTileGroups : groups - begin;
        for (int64_t m = 0; m < count; ++m) {
            const uint8_t *block = blocks + (m * groups + begin) * kGroup;
            for (int64_t g = 0; g < size; ++g) {
                __builtin_prefetch(block + g * kGroup + kTileGroups * kGroup);
                Bytes digits[D];
                digits_of<D>(load(block + g * kGroup), digits);
                for (int i = 0; i < D; ++i) store(tile + ((g * D + i) * kBlocks + m) * kGroup, digits[i]);
            }
        }
        if (begin == 0 && count < kBlocks)  // the tile's other blocks are multiplied too, and not used
            for (int64_t w = 0; w < kTileGroups * D; ++w) store(tile + (w * kBlocks + 1) * kGroup, all(0));
        const int32_t *inputs = x + begin * D;
        // Shares of about one size: a last token alone would wait for each of its sums.
        const int64_t shares = (tokens + kTokens - 1) / kTokens;
        for (int64_t share = 0; share < shares; ++share) {
            const int64_t n = tokens * share / shares, next = tokens * (share + 1) / shares;
            of_tokens[next - n - 1](tile, size * D, inputs + n * stride, stride, out + n * kTileOutputs);
        }
    }
}

// The same, choosing between the two by the number of tokens.
template <int D>
static void sums_of(
    const uint8_t *blocks, int64_t count, int64_t groups, const int32_t *x, int64_t stride, int64_t tokens,
    int32_t *out) {
    // As many tokens as have their sums in registers.
    if (tokens > (D == 4 ? 4 : 2)) return multiply_all<D>(blocks, count, groups, x, stride, tokens, out);
    for (int64_t m = 0; m < count; ++m, blocks += groups * kGroup, out += kOutputs) {
        if (tokens == 1) stream<D, 1>(blocks, groups, x, stride, out);
        if (tokens == 2) stream<D, 2>(blocks, groups, x, stride, out);
        if constexpr (D == 4) {
            if (tokens == 3) stream<D, 3>(blocks, groups, x, stride, out);
            if (tokens == 4) stream<D, 4>(blocks, groups, x, stride, out);
        }
    }
}
