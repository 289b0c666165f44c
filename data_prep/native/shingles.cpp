// Shingles and MinHash of data_prep/shingles.py and data_prep/minhash.py, to the bit.
#include "common.h"

namespace {

inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Hashes of the words of one text; gives how many there are.
int64_t words_of(const uint8_t *text, int64_t size, const uint8_t *is_letter, const uint64_t *byte_values,
                 const uint64_t *places, uint64_t *words) {
    int64_t count = 0, place = 0;
    uint64_t hash = 0;
    bool inside = false;
    for (int64_t i = 0; i < size; ++i) {
        const uint8_t byte = text[i];
        const bool letter = is_letter[byte];
        const bool starts = letter && (!inside || (byte >= 0xE3 && byte <= 0xED));
        if (inside && (!letter || starts)) words[count++] = mixed(hash);
        if (starts) hash = 0, place = 0;
        if (letter) hash += byte_values[byte] * places[place++ & 255];
        inside = letter;
    }
    if (inside) words[count++] = mixed(hash);
    return count;
}

LB_CLONES void smallest(const uint64_t *hashes, int64_t count, const uint64_t *factors, const uint64_t *shifts,
                        uint32_t *out, int64_t permutations) {
    for (int64_t p = 0; p < permutations; ++p) out[p] = 0xFFFFFFFFu;
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t key = hashes[i] >> 32;
        for (int64_t p = 0; p < permutations; ++p) {
            const uint32_t value = static_cast<uint32_t>((key * factors[p] + shifts[p]) >> 32);
            out[p] = value < out[p] ? value : out[p];
        }
    }
}

}  // namespace

// Fills hashes with the shingles of all texts and offsets [texts + 1] with where each text's begin; words is room for
// as many numbers as the longest text has bytes, hashes for as many as all texts have.
LB_EXPORT void shingle_texts(const uint8_t *data, const int64_t *begins, int64_t texts, int64_t words_per_shingle,
                             const uint8_t *is_letter, const uint64_t *byte_values, const uint64_t *places,
                             const uint64_t *order, uint64_t *words, uint64_t *hashes, int64_t *offsets) {
    int64_t total = 0;
    for (int64_t t = 0; t < texts; ++t) {
        offsets[t] = total;
        const int64_t count =
            words_of(data + begins[t], begins[t + 1] - begins[t], is_letter, byte_values, places, words);
        const int64_t length = count < words_per_shingle ? count : words_per_shingle;
        for (int64_t first = 0; first + length <= count && length > 0; ++first) {
            uint64_t hash = 0;
            for (int64_t i = 0; i < length; ++i) hash += words[first + i] * order[i];
            hashes[total++] = mixed(hash);
        }
    }
    offsets[texts] = total;
}

// MinHash signatures [texts, permutations] of shingles; all ones for a text without any.
LB_EXPORT void minhash(const uint64_t *hashes, const int64_t *offsets, int64_t texts, const uint64_t *factors,
                       const uint64_t *shifts, int64_t permutations, uint32_t *signatures) {
    for (int64_t t = 0; t < texts; ++t)
        smallest(hashes + offsets[t], offsets[t + 1] - offsets[t], factors, shifts, signatures + t * permutations,
                 permutations);
}
