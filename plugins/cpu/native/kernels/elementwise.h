// Norms, rotations and gated activations: every row by itself, in float32. Of norms and rotations the functions
// of the table compute one row.
#pragma once

#include "pool.h"
#include "simd.h"
#include "zif_cpu.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// How the elements of one step lie: a whole vector, or the rest of a row.
struct Whole {
    template <class T>
    Float load(const T* from) const {
        return ZIF_ISA::load(from);
    }
    template <class T>
    void store(T* to, Float vector) const {
        ZIF_ISA::store(to, vector);
    }
};

struct Rest {
    int64_t count;
    template <class T>
    Float load(const T* from) const {
        return load_some(from, count);
    }
    template <class T>
    void store(T* to, Float vector) const {
        store_some(to, vector, count);
    }
};

// Run step(place, lanes) on the vectors of `count` elements from `begin`.
template <class Step>
inline void for_vectors(int64_t begin, int64_t count, const Step& step) {
    int64_t place = begin;
    for (; place + kLanes <= count; place += kLanes) step(place, Whole{});
    if (place < count) step(place, Rest{count - place});
}

// The sum of squares of what value(place, lanes) returns. Four chains of additions, so that one need not wait for
// another.
template <class Value>
inline float sum_of_squares(int64_t channels, const Value& value) {
    Float sums[4] = {};
    int64_t place = 0;
    for (; place + 4 * kLanes <= channels; place += 4 * kLanes) {
        for (int chain = 0; chain < 4; ++chain) {
            const Float one = value(place + chain * kLanes, Whole{});
            sums[chain] += one * one;
        }
    }
    for_vectors(place, channels, [&](int64_t at, auto lanes) {
        const Float one = value(at, lanes);
        sums[0] += one * one;
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
inline void scale_row(const T* x, float squares, const zif_cpu_norm& call, T* y) {
    const T* weight = static_cast<const T*>(call.weight);
    const Float scale = splat(1.0f / __builtin_sqrtf(squares / static_cast<float>(call.channels) + call.eps));
    const Float offset = splat(call.weight_offset);
    for_vectors(0, call.channels, [&](int64_t at, auto lanes) {
        lanes.store(y + at, lanes.load(x + at) * scale * (lanes.load(weight + at) + offset));
    });
}

template <class T>
void rms_norm_typed(const zif_cpu_norm& call, int64_t row) {
    const int64_t channels = call.channels;
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    T* y = static_cast<T*>(call.y) + row * call.heads * channels;
    for (int64_t head = 0; head < call.heads; ++head, x += channels, y += channels) {
        const float squares = sum_of_squares(channels, [&](int64_t at, auto lanes) { return lanes.load(x + at); });
        scale_row(x, squares, call, y);
    }
}

// Write residual + x, rounded, and return the sum of its squares.
template <class T>
inline float add_row(const T* x, const T* residual, T* total, int64_t channels) {
    return sum_of_squares(channels, [&](int64_t at, auto lanes) {
        lanes.store(total + at, lanes.load(residual + at) + lanes.load(x + at));
        return lanes.load(total + at);
    });
}

template <class T>
void add_rms_norm_typed(const zif_cpu_norm& call, int64_t row) {
    const int64_t channels = call.channels, size = call.heads * channels;
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    const T* residual = static_cast<const T*>(call.residual) + row * call.residual_stride;
    T* total = static_cast<T*>(call.sum) + row * size;
    T* y = static_cast<T*>(call.y) + row * size;
    for (int64_t at = 0; at < size; at += channels) {
        scale_row(total + at, add_row(x + at, residual + at, total + at, channels), call, y + at);
    }
}

void rms_norm(const zif_cpu_norm* call, int64_t row, int) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return rms_norm_typed<float>(*call, row);
        case ZIF_BFLOAT16: return rms_norm_typed<BFloat16>(*call, row);
        case ZIF_FLOAT16: return rms_norm_typed<Float16>(*call, row);
    }
}

void add_rms_norm(const zif_cpu_norm* call, int64_t row, int) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return add_rms_norm_typed<float>(*call, row);
        case ZIF_BFLOAT16: return add_rms_norm_typed<BFloat16>(*call, row);
        case ZIF_FLOAT16: return add_rms_norm_typed<Float16>(*call, row);
    }
}

// The angles of one token as the loops want them. Halves: cos, sin, `rotated` of each. Pairs: every cosine twice, and
// every sine twice, the first time negative.
struct Turn {
    const float* cos;
    const float* sin;
    int64_t rotated;
};

inline Turn turn_of_pairs(const float* cos, const float* sin, int64_t rotated, float* memory) {
    for (int64_t i = 0; i < rotated; ++i) {
        memory[2 * i] = memory[2 * i + 1] = cos[i];
        memory[2 * (rotated + i)] = -sin[i];
        memory[2 * (rotated + i) + 1] = sin[i];
    }
    return {memory, memory + 2 * rotated, rotated};
}

typedef uint64_t Long __attribute__((vector_size(ZIF_VECTOR_BYTES)));

inline Float neighbours_swapped(Float vector) {
    const Long pairs = bits_as<Long>(vector);
    return bits_as<Float>(pairs << 32 | pairs >> 32);
}

template <class T>
inline void rotate_halves(const T* x, const Turn& turn, T* y) {
    const int64_t rotated = turn.rotated;
    for_vectors(0, rotated, [&](int64_t at, auto lanes) {
        const Float first = lanes.load(x + at), second = lanes.load(x + rotated + at);
        const Float cos = lanes.load(turn.cos + at), sin = lanes.load(turn.sin + at);
        lanes.store(y + at, first * cos - second * sin);
        lanes.store(y + rotated + at, second * cos + first * sin);
    });
}

template <class T>
inline void rotate_pairs(const T* x, const Turn& turn, T* y) {
    for_vectors(0, 2 * turn.rotated, [&](int64_t at, auto lanes) {
        const Float pairs = lanes.load(x + at);
        const Float cos = lanes.load(turn.cos + at), sin = lanes.load(turn.sin + at);
        lanes.store(y + at, pairs * cos + neighbours_swapped(pairs) * sin);
    });
}

template <class T>
inline void rotate_heads(const T* x, const Turn& turn, T* y, int64_t heads, const zif_cpu_rotation& call) {
    const int64_t head_dim = call.head_dim, end = 2 * turn.rotated;
    for (int64_t head = 0; head < heads; ++head, x += head_dim, y += head_dim) {
        call.interleaved ? rotate_pairs(x, turn, y) : rotate_halves(x, turn, y);
        if (end < head_dim) std::memcpy(y + end, x + end, (head_dim - end) * sizeof(T));
    }
}

template <class T>
void rotate_typed(const zif_cpu_rotation& call, int64_t token, int thread) {
    const int64_t rotated = call.rotated;
    Turn turn = {call.cos + token * rotated, call.sin + token * rotated, rotated};
    if (call.interleaved) {
        auto* memory = static_cast<float*>(scratch(thread, 0, 4 * rotated * sizeof(float)));
        turn = turn_of_pairs(turn.cos, turn.sin, rotated, memory);
    }
    const T* query = static_cast<const T*>(call.query) + token * call.query_stride;
    const T* key = static_cast<const T*>(call.key) + token * call.key_stride;
    T* rotated_query = static_cast<T*>(call.rotated_query) + token * call.heads * call.head_dim;
    T* rotated_key = static_cast<T*>(call.rotated_key) + token * call.kv_heads * call.head_dim;
    rotate_heads(query, turn, rotated_query, call.heads, call);
    rotate_heads(key, turn, rotated_key, call.kv_heads, call);
}

void rotate(const zif_cpu_rotation* call, int64_t row, int thread) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return rotate_typed<float>(*call, row, thread);
        case ZIF_BFLOAT16: return rotate_typed<BFloat16>(*call, row, thread);
        case ZIF_FLOAT16: return rotate_typed<Float16>(*call, row, thread);
    }
}

constexpr float kSwigluLimit = 7.0f;
constexpr float kSwigluAlpha = 1.702f;

inline Float silu(Float x) { return x / (1.0f + exp(-x)); }

// x times the normal distribution function, which is 1 - Q(x) or Q(-x). Q(a) = exp(-a * a / 2) * t * p(t) with
// t = 1 / (1 + 0.35 a): p fitted over a from 0 to 14.5, 3.2e-8 off in proportion, so small results keep their digits.
inline Float gelu(Float x) {
    const Float away = x < 0.0f ? -x : x;
    const Float t = 1.0f / (1.0f + 0.35f * away);
    Float p = splat(-0.0291580302f);
    p = p * t + 0.144031611f;
    p = p * t - 0.255840403f;
    p = p * t + 0.159321254f;
    p = p * t - 0.0232133942f;
    p = p * t + 0.105552927f;
    p = p * t + 0.119821185f;
    p = p * t + 0.139863529f;
    p = p * t + 0.139621306f;
    const Float tail = exp(x * x * -0.5f) * t * p;
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 * x**3).
inline Float gelu_tanh(Float x) { return x / (1.0f + exp(x * (-1.5957691216f + x * x * -0.0713548163f))); }

inline Float swiglu_clamped(Float gate, Float up) {
    const Float limit = splat(kSwigluLimit);  // as the first argument: the other one may be no number, and stays so
    const Float low = min(limit, gate), inside = min(limit, max(-limit, up));
    return (inside + 1.0f) * low / (1.0f + exp(low * -kSwigluAlpha));
}

template <int kActivation>
inline Float gated(Float gate, Float up) {
    if constexpr (kActivation == ZIF_SILU) return silu(gate) * up;
    if constexpr (kActivation == ZIF_GELU) return gelu(gate) * up;
    if constexpr (kActivation == ZIF_GELU_TANH) return gelu_tanh(gate) * up;
    if constexpr (kActivation == ZIF_SWIGLU_CLAMPED) return swiglu_clamped(gate, up);
}

template <class T, int kActivation>
inline void gate_row(const T* gate, const T* up, T* y, int64_t channels) {
    for_vectors(0, channels, [&](int64_t at, auto lanes) {
        lanes.store(y + at, gated<kActivation>(lanes.load(gate + at), lanes.load(up + at)));
    });
}

// y = f(gate) * up of one row. Other kernels fuse it.
template <class T>
inline void gate_row(const T* gate, const T* up, T* y, int64_t channels, int32_t activation) {
    switch (activation) {
        case ZIF_SILU: return gate_row<T, ZIF_SILU>(gate, up, y, channels);
        case ZIF_GELU: return gate_row<T, ZIF_GELU>(gate, up, y, channels);
        case ZIF_GELU_TANH: return gate_row<T, ZIF_GELU_TANH>(gate, up, y, channels);
        case ZIF_SWIGLU_CLAMPED: return gate_row<T, ZIF_SWIGLU_CLAMPED>(gate, up, y, channels);
    }
}

template <class T>
void gated_activation_typed(const zif_cpu_gating& call) {
    const int64_t channels = call.channels;
    for_rows(call.rows, 2 * channels, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T* gate = static_cast<const T*>(call.gate_up) + row * call.stride;
            gate_row(gate, gate + channels, static_cast<T*>(call.y) + row * channels, channels, call.activation);
        }
    });
}

void gated_activation(const zif_cpu_gating* call) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return gated_activation_typed<float>(*call);
        case ZIF_BFLOAT16: return gated_activation_typed<BFloat16>(*call);
        case ZIF_FLOAT16: return gated_activation_typed<Float16>(*call);
    }
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
