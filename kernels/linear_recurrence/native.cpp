// Linear recurrences with decay, chunk by chunk, in float32: all products of a chunk while its rows are in the cache.
//
// One unit of work is some heads of a group, which share their queries and keys.
#include "tiles.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t SHARE = 4;  // heads of a unit, which form their scores once
constexpr double LEAST = -800.0;  // exp of less is zero, and would swallow the digits of the decays that follow

// What Python passes: addresses and strides in elements; every field has eight bytes.
struct Tensor {
    void *data;
    int64_t batch, head, row;
    template <typename T>
    T *at(int64_t b, int64_t h, int64_t t = 0) const {
        return static_cast<T *>(data) + b * batch + h * head + t * row;
    }
};

struct Arguments {
    Tensor query, key, value, decay, starts;      // decay float64, starts bytes or null
    Tensor first, last, entering, result;         // states float32; `row` of entering: from chunk to chunk
    Tensor grad, grad_state;                      // backward only, as all that follow
    Tensor grad_query, grad_key;                  // float32, `head`: from unit to unit of a batch
    Tensor grad_value, grad_decay, grad_first;    // decay float32 or null
    int64_t batches, heads, groups, length, state, width, rows, threads;

    int64_t share() const { return heads / groups; }
    int64_t parts() const { return (share() + SHARE - 1) / SHARE; }  // units of a group
    int64_t chunks() const { return (length + rows - 1) / rows; }
};

// What one chunk of one head multiplies by.
struct Decay {
    float *high, *low;    // running sums of log decays, in two parts whose differences are exact enough
    float *to_row;        // from the state before the chunk to a row
    float *to_end;        // from a row to the state behind the chunk
    float across;         // from the one to the other
    int32_t *first;       // first row of the row's document in the chunk
    int32_t *document;    // starts up to the row
};

static LB_INLINE void read_documents(const Arguments &x, int64_t b, int64_t begin, int64_t count, int64_t rows,
                                     Decay &d) {
    int32_t document = 0, first = 0;
    for (int64_t i = 0; i < rows; ++i) {
        if (x.starts.data && i < count && *x.starts.at<uint8_t>(b, 0, begin + i)) {
            ++document;
            first = static_cast<int32_t>(i);
        }
        d.first[i] = first;
        d.document[i] = document;
    }
}

static LB_INLINE void read_decay(const Arguments &x, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t rows,
                                 Decay &d) {
    double total = 0.0;
    for (int64_t i = 0; i < rows; ++i) {
        if (i < count) {
            const double step = *x.decay.at<double>(b, h, begin + i);
            total += step < LEAST ? LEAST : step;
        }
        d.high[i] = static_cast<float>(total);
        d.low[i] = static_cast<float>(total - static_cast<double>(d.high[i]));
    }
    const float high = d.high[rows - 1], low = d.low[rows - 1];
    for (int64_t i = 0; i < rows; ++i) {
        d.to_row[i] = exp_fast(d.high[i] + d.low[i]);
        d.to_end[i] = exp_fast((high - d.high[i]) + (low - d.low[i]));
    }
    d.across = d.document[rows - 1] == 0 ? exp_fast(high + low) : 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        d.to_row[i] = d.document[i] == 0 ? d.to_row[i] : 0.0f;
        d.to_end[i] = d.document[i] == d.document[rows - 1] ? d.to_end[i] : 0.0f;
    }
}

// within [rows, rows]: the decay from column to row inside a document; zero between documents and right of the
// diagonal, as far as products read there.
static LB_INLINE void decay_within(const Decay &d, int64_t rows, float *within) {
    for (int64_t i = 0; i < rows; ++i) {
        const float high = d.high[i], low = d.low[i];
        const int32_t first = d.first[i], last = static_cast<int32_t>(i);
        float *row = within + i * rows;
        const int32_t end = static_cast<int32_t>((i / LANES + 1) * LANES);
        for (int32_t j = 0; j < end; ++j) {
            const float span = (high - d.high[j]) + (low - d.low[j]);
            const bool is_seen = (j >= first) & (j <= last);
            const float weight = exp_fast(is_seen ? span : 0.0f);
            row[j] = is_seen ? weight : 0.0f;
        }
    }
}

// to = a * b where within is not zero, elsewhere zero: what lies right of the diagonal may be anything.
static LB_INLINE void multiply_lower(const float *a, const float *within, float *to, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t end = (i / LANES + 1) * LANES, at = i * rows;
        for (int64_t j = 0; j < end; ++j) to[at + j] = within[at + j] != 0.0f ? a[at + j] * within[at + j] : 0.0f;
    }
}

static LB_INLINE float *take(float *&scratch, int64_t size) {
    float *taken = scratch;
    scratch += padded(size);
    return taken;
}

static LB_INLINE Decay take_decay(float *&scratch, int64_t rows) {
    Decay d;
    d.high = take(scratch, rows);
    d.low = take(scratch, rows);
    d.to_row = take(scratch, rows);
    d.to_end = take(scratch, rows);
    d.first = reinterpret_cast<int32_t *>(take(scratch, rows));
    d.document = reinterpret_cast<int32_t *>(take(scratch, rows));
    d.across = 1.0f;
    return d;
}

inline int64_t scratch_size(const Arguments &x) {
    const int64_t rows = x.rows, state = padded(x.state), width = padded(x.width);
    return (SHARE + 4) * state * width + 8 * rows * (state + width + rows) + 16 * rows;
}

struct Unit {
    int64_t b, group, head, heads;  // its heads: [head, head + heads)
};

static LB_INLINE Unit unit_of(const Arguments &x, int64_t unit) {
    const int64_t part = unit % x.parts(), group = unit / x.parts() % x.groups, begin = part * SHARE;
    return {unit / x.parts() / x.groups, group, group * x.share() + begin, std::min(SHARE, x.share() - begin)};
}

template <typename T, int MR, int NV>
static LB_INLINE void forward_unit(const Arguments &x, int64_t unit, float *scratch) {
    const Unit u = unit_of(x, unit);
    const int64_t rows = x.rows, ks = padded(x.state), ws = padded(x.width);
    float *q = take(scratch, rows * ks), *k = take(scratch, rows * ks), *k_turned = take(scratch, rows * ks);
    float *v = take(scratch, rows * ws), *v_faded = take(scratch, rows * ws), *y = take(scratch, rows * ws);
    float *scores = take(scratch, rows * rows), *weights = take(scratch, rows * rows);
    float *states = take(scratch, SHARE * ks * ws);
    Decay d = take_decay(scratch, rows);
    for (int64_t i = 0; i < u.heads; ++i)
        load_tile(x.first.at<float>(u.b, u.head + i), x.width, x.state, x.width, states + i * ks * ws, ks, ws);
    for (int64_t chunk = 0; chunk < x.chunks(); ++chunk) {
        const int64_t begin = chunk * rows, count = std::min(rows, x.length - begin);
        load_tile(x.query.at<const T>(u.b, u.group, begin), x.query.row, count, x.state, q, rows, ks);
        load_tile(x.key.at<const T>(u.b, u.group, begin), x.key.row, count, x.state, k, rows, ks);
        transpose(k, rows, ks, k_turned);
        product<MR, NV>(LOWER, rows, rows, ks, q, ks, 1, k_turned, scores, false);
        read_documents(x, u.b, begin, count, rows, d);
        for (int64_t i = 0; i < u.heads; ++i) {
            const int64_t h = u.head + i;
            float *s = states + i * ks * ws;
            load_tile(x.value.at<const T>(u.b, h, begin), x.value.row, count, x.width, v, rows, ws);
            read_decay(x, u.b, h, begin, count, rows, d);
            if (x.entering.data)
                store_tile(s, ws, x.entering.at<float>(u.b, h, chunk), x.width, x.state, x.width);
            product<MR, NV>(ALL, rows, ws, ks, q, ks, 1, s, y, false);
            scale_rows(y, d.to_row, y, rows, ws);
            decay_within(d, rows, weights);
            multiply_lower(scores, weights, weights, rows);
            product<MR, NV>(UP_TO_ROW, rows, ws, rows, weights, rows, 1, v, y, true);
            store_tile(y, ws, x.result.at<T>(u.b, h, begin), x.result.row, count, x.width);
            scale_rows(v, d.to_end, v_faded, rows, ws);
            for (int64_t e = 0; e < ks * ws; ++e) s[e] = d.across != 0.0f ? d.across * s[e] : 0.0f;
            product<MR, NV>(ALL, ks, ws, rows, k, 1, ks, v_faded, s, true);
        }
    }
    for (int64_t i = 0; i < u.heads; ++i)
        store_tile(states + i * ks * ws, ws, x.last.at<float>(u.b, u.head + i), x.width, x.state, x.width);
}

// Each log decay's gradient is the sum of what passes through it: of pairs, from the earlier row's next to the later
// row's own; of what is read from the state, up to the row's own; of what is written to it, those after the row.
struct Passing {
    float *later, *earlier, *read, *written;  // pairs by their later and by their earlier row
};

static LB_INLINE void sum_pairs(const float *weighted, const float *scores, int64_t rows, Passing &p) {
    for (int64_t j = 0; j < rows; ++j) p.earlier[j] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        Vector sums = {};
        for (int64_t j = 0; j < i; j += LANES) {
            Mask index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            index += static_cast<int32_t>(j);
            const Vector a = *reinterpret_cast<const Vector *>(weighted + i * rows + j);
            const Vector b = *reinterpret_cast<const Vector *>(scores + i * rows + j);
            const Vector pairs = index < static_cast<int32_t>(i) ? a * b : Vector{};
            *reinterpret_cast<Vector *>(p.earlier + j) += pairs;
            sums += pairs;
        }
        float sum = 0.0f;
        for (int l = 0; l < LANES; ++l) sum += sums[l];
        p.later[i] = sum;
    }
}

static LB_INLINE void write_decay_gradient(const Arguments &x, int64_t b, int64_t h, int64_t begin, int64_t count,
                                           float along, const Decay &d, const Passing &p) {
    float *out = x.grad_decay.at<float>(b, h, begin), sum = 0.0f;
    for (int64_t i = count - 1; i >= 0; --i) {
        if (i + 1 < count && d.document[i + 1] != d.document[i]) sum = 0.0f;
        sum += p.later[i] + p.read[i] - p.earlier[i];
        out[i] = sum + along;
    }
    sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const bool begins = d.document[i] != (i ? d.document[i - 1] : 0);
        if (begins) sum = 0.0f;
        out[i] = begins ? 0.0f : out[i] + sum;  // nothing passes a first token's
        sum += p.written[i];
    }
}

template <typename T, int MR, int NV>
static LB_INLINE void backward_unit(const Arguments &x, int64_t unit, float *scratch) {
    const Unit u = unit_of(x, unit);
    const int64_t rows = x.rows, ks = padded(x.state), ws = padded(x.width);
    float *q = take(scratch, rows * ks), *k = take(scratch, rows * ks), *k_turned = take(scratch, rows * ks);
    float *dq = take(scratch, rows * ks), *dk = take(scratch, rows * ks), *read = take(scratch, rows * ks);
    float *v = take(scratch, rows * ws), *v_turned = take(scratch, rows * ws), *v_faded = take(scratch, rows * ws);
    float *dy = take(scratch, rows * ws), *dy_faded = take(scratch, rows * ws), *dv = take(scratch, rows * ws);
    float *scores = take(scratch, rows * rows), *d_scores = take(scratch, rows * rows);
    float *within = take(scratch, rows * rows), *weights = take(scratch, rows * rows);
    float *grads = take(scratch, SHARE * ks * ws), *s = take(scratch, ks * ws), *turned = take(scratch, ks * ws);
    Decay d = take_decay(scratch, rows);
    Passing p = {take(scratch, rows), take(scratch, rows), take(scratch, rows), take(scratch, rows)};
    for (int64_t i = 0; i < u.heads; ++i)
        load_tile(x.grad_state.at<float>(u.b, u.head + i), x.width, x.state, x.width, grads + i * ks * ws, ks, ws);
    for (int64_t chunk = x.chunks() - 1; chunk >= 0; --chunk) {
        const int64_t begin = chunk * rows, count = std::min(rows, x.length - begin);
        load_tile(x.query.at<const T>(u.b, u.group, begin), x.query.row, count, x.state, q, rows, ks);
        load_tile(x.key.at<const T>(u.b, u.group, begin), x.key.row, count, x.state, k, rows, ks);
        transpose(k, rows, ks, k_turned);
        product<MR, NV>(LOWER, rows, rows, ks, q, ks, 1, k_turned, scores, false);
        read_documents(x, u.b, begin, count, rows, d);
        for (int64_t i = 0; i < u.heads; ++i) {
            const int64_t h = u.head + i;
            float *ds = grads + i * ks * ws;
            load_tile(x.value.at<const T>(u.b, h, begin), x.value.row, count, x.width, v, rows, ws);
            load_tile(x.grad.at<const T>(u.b, h, begin), x.grad.row, count, x.width, dy, rows, ws);
            load_tile(x.entering.at<const float>(u.b, h, chunk), x.width, x.state, x.width, s, ks, ws);
            read_decay(x, u.b, h, begin, count, rows, d);
            decay_within(d, rows, within);
            // Pairs inside the chunk.
            transpose(v, rows, ws, v_turned);
            product<MR, NV>(LOWER, rows, rows, ws, dy, ws, 1, v_turned, weights, false);
            multiply_lower(weights, within, weights, rows);
            if (x.grad_decay.data) sum_pairs(weights, scores, rows, p);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < (r / LANES + 1) * LANES; ++c)
                    d_scores[r * rows + c] = weights[r * rows + c] + (i ? d_scores[r * rows + c] : 0.0f);
            multiply_lower(scores, within, weights, rows);
            // Through the state behind the chunk.
            product<MR, NV>(ALL, rows, ws, ks, k, ks, 1, ds, dv, false);
            scale_rows(dv, d.to_end, dv, rows, ws);
            if (x.grad_decay.data)
                for (int64_t r = 0; r < rows; ++r) p.written[r] = dot(dv + r * ws, v + r * ws, ws);
            product<MR, NV>(FROM_ROW, rows, ws, rows, weights, 1, rows, dy, dv, true);
            store_tile(dv, ws, x.grad_value.at<T>(u.b, h, begin), x.grad_value.row, count, x.width);
            transpose(ds, ks, ws, turned);
            scale_rows(v, d.to_end, v_faded, rows, ws);
            product<MR, NV>(ALL, rows, ks, ws, v_faded, ws, 1, turned, dk, i > 0);
            // Through the state before the chunk.
            transpose(s, ks, ws, turned);
            scale_rows(dy, d.to_row, dy_faded, rows, ws);
            product<MR, NV>(ALL, rows, ks, ws, dy_faded, ws, 1, turned, read, false);
            for (int64_t e = 0; e < rows * ks; ++e) dq[e] = read[e] + (i ? dq[e] : 0.0f);
            if (x.grad_decay.data) {
                for (int64_t r = 0; r < rows; ++r) p.read[r] = dot(read + r * ks, q + r * ks, ks);
                const float along = d.across != 0.0f ? d.across * dot(ds, s, ks * ws) : 0.0f;
                write_decay_gradient(x, u.b, h, begin, count, along, d, p);
            }
            for (int64_t e = 0; e < ks * ws; ++e) ds[e] = d.across != 0.0f ? d.across * ds[e] : 0.0f;
            product<MR, NV>(ALL, ks, ws, rows, q, 1, ks, dy_faded, ds, true);
        }
        product<MR, NV>(UP_TO_ROW, rows, ks, rows, d_scores, rows, 1, k, dq, true);
        product<MR, NV>(FROM_ROW, rows, ks, rows, d_scores, 1, rows, q, dk, true);
        const int64_t place = unit % (x.groups * x.parts());
        store_tile(dq, ks, x.grad_query.at<float>(u.b, place, begin), x.grad_query.row, count, x.state);
        store_tile(dk, ks, x.grad_key.at<float>(u.b, place, begin), x.grad_key.row, count, x.state);
    }
    for (int64_t i = 0; i < u.heads; ++i)
        store_tile(grads + i * ks * ws, ws, x.grad_first.at<float>(u.b, u.head + i), x.width, x.state, x.width);
}

// A few tokens of one head, one by one: decoding.
template <typename T>
static LB_INLINE void step_head(const Arguments &x, int64_t b, int64_t h, float *scratch) {
    const int64_t group = h / x.share(), width = x.width;
    float *__restrict v = take(scratch, width), *__restrict y = take(scratch, width);
    const float *from = x.first.at<float>(b, h);
    float *last = x.last.at<float>(b, h);
    for (int64_t t = 0; t < x.length; ++t) {
        const T *q = x.query.at<const T>(b, group, t), *k = x.key.at<const T>(b, group, t);
        const T *value = x.value.at<const T>(b, h, t);
        const bool begins = x.starts.data && *x.starts.at<uint8_t>(b, 0, t);
        const double step = *x.decay.at<double>(b, h, t);
        const float kept = begins ? 0.0f : static_cast<float>(__builtin_exp(step));
        for (int64_t c = 0; c < width; ++c) {
            v[c] = load(value + c);
            y[c] = 0.0f;
        }
        for (int64_t r = 0; r < x.state; ++r) {
            const float key = load(k + r), query = load(q + r);
            const float *before = from + r * width;
            float *after = last + r * width;
            for (int64_t c = 0; c < width; ++c) {
                const float s = (begins ? 0.0f : kept * before[c]) + key * v[c];
                after[c] = s;
                y[c] += query * s;
            }
        }
        for (int64_t c = 0; c < width; ++c) store(x.result.at<T>(b, h, t) + c, y[c]);
        from = last;
    }
}

LB_WIDE void forward_wide(const Arguments &x, int64_t u, float *s, float) { forward_unit<float, 8, 2>(x, u, s); }
LB_WIDE void forward_wide(const Arguments &x, int64_t u, float *s, uint16_t) { forward_unit<uint16_t, 8, 2>(x, u, s); }
LB_WIDE void backward_wide(const Arguments &x, int64_t u, float *s, float) { backward_unit<float, 8, 2>(x, u, s); }
LB_WIDE void backward_wide(const Arguments &x, int64_t u, float *s, uint16_t) {
    backward_unit<uint16_t, 8, 2>(x, u, s);
}
// Sixteen registers of 32 bytes hold four rows.
LB_CLONES void forward_f32(const Arguments &x, int64_t u, float *s) { forward_unit<float, 4, 1>(x, u, s); }
LB_CLONES void forward_bf16(const Arguments &x, int64_t u, float *s) { forward_unit<uint16_t, 4, 1>(x, u, s); }
LB_CLONES void backward_f32(const Arguments &x, int64_t u, float *s) { backward_unit<float, 4, 1>(x, u, s); }
LB_CLONES void backward_bf16(const Arguments &x, int64_t u, float *s) { backward_unit<uint16_t, 4, 1>(x, u, s); }
LB_CLONES void step_f32(const Arguments &x, int64_t b, int64_t h, float *s) { step_head<float>(x, b, h, s); }
LB_CLONES void step_bf16(const Arguments &x, int64_t b, int64_t h, float *s) { step_head<uint16_t>(x, b, h, s); }

float *thread_scratch(int64_t size) {
    static thread_local std::vector<float> memory;  // kept: fresh pages cost more than a short sequence
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
}

}  // namespace

#define LB_LINEAR_RECURRENCE(NAME, T)                                                                         \
    LB_EXPORT void linear_recurrence_forward_##NAME(const Arguments *x) {                                     \
        parallel(x->batches * x->groups * x->parts(), x->threads, [=](int64_t begin, int64_t end) {           \
            float *scratch = thread_scratch(scratch_size(*x));                                                \
            for (int64_t unit = begin; unit < end; ++unit)                                                    \
                has_wide() ? forward_wide(*x, unit, scratch, T{}) : forward_##NAME(*x, unit, scratch);        \
        });                                                                                                   \
    }                                                                                                         \
    LB_EXPORT void linear_recurrence_backward_##NAME(const Arguments *x) {                                    \
        parallel(x->batches * x->groups * x->parts(), x->threads, [=](int64_t begin, int64_t end) {           \
            float *scratch = thread_scratch(scratch_size(*x));                                                \
            for (int64_t unit = begin; unit < end; ++unit)                                                    \
                has_wide() ? backward_wide(*x, unit, scratch, T{}) : backward_##NAME(*x, unit, scratch);      \
        });                                                                                                   \
    }                                                                                                         \
    LB_EXPORT void linear_recurrence_steps_##NAME(const Arguments *x) {                                       \
        parallel(x->batches * x->heads, x->threads, [=](int64_t begin, int64_t end) {                         \
            float *scratch = thread_scratch(2 * padded(x->width));                                            \
            for (int64_t i = begin; i < end; ++i) step_##NAME(*x, i / x->heads, i % x->heads, scratch);       \
        });                                                                                                   \
    }

LB_LINEAR_RECURRENCE(f32, float)
LB_LINEAR_RECURRENCE(bf16, uint16_t)
