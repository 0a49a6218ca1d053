// Inner products of weights held in 8 or 4 bits with activations that keep their precision, in float32.
//
// An element is (code - zero) * scale, rounded to float32 once. It is decoded in registers for few tokens and into
// memory for many; both ways sum in the same order, so a token's result does not depend on how many there are.
#pragma once

#include "quantized_integers.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

// How codes and elements of a row lie: groups of `runs` of codes; of 4 bits the lower halves of the bytes are one run
// and the upper ones another. Elements go by vectors: those of one step of every run, then the next step.
struct Layout {
    int64_t groups;
    int64_t run;    // codes of a run
    int64_t steps;  // vectors of a run; the last one may be filled with zeros
    int runs;

    explicit Layout(const zif_cpu_quantized& weight)
        : groups(weight.inputs / weight.group), run(weight.bits == 8 ? weight.group : weight.group / 2),
          steps((run + kLanes - 1) / kLanes), runs(weight.bits == 8 ? 1 : 2) {}

    int64_t row_bytes() const { return groups * run; }
    int64_t width() const { return groups * steps * runs * kLanes; }
};

// kLanes bytes as integers, with or without a sign.
template <int kBits>
inline Int widened(const void* from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return bits_as<Int>(kBits == 8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(from));
    return bits_as<Int>(kBits == 8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    typedef int8_t Signed __attribute__((vector_size(kLanes)));
    typedef uint8_t Unsigned __attribute__((vector_size(kLanes)));
    if constexpr (kBits == 8) {
        Signed bytes;
        std::memcpy(&bytes, from, sizeof(bytes));
        return __builtin_convertvector(bytes, Int);
    } else {
        Unsigned bytes;
        std::memcpy(&bytes, from, sizeof(bytes));
        return __builtin_convertvector(bytes, Int);
    }
#endif
}

// What the codes of one group stand for.
template <int kBits>
class Decoder;

template <>
class Decoder<8> {
public:
    Decoder() = default;
    Decoder(float zero, float scale) : zero_(zero), scale_(scale) {}

    static constexpr int kRuns = 1;
    void decode(Int codes, Float* elements) const {
        elements[0] = (__builtin_convertvector(codes, Float) - zero_) * scale_;
    }

private:
    float zero_;
    float scale_;
};

template <>
class Decoder<4> {
public:
    static constexpr int kRuns = 2;
    Decoder() = default;
#if defined(__AVX512F__)
    Decoder(float zero, float scale) {
        const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        table_ = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }

    // A look-up takes the lower 4 bits of an index.
    void decode(Int codes, Float* elements) const {
        const __m512i bytes = bits_as<__m512i>(codes);
        elements[0] = bits_as<Float>(_mm512_permutexvar_ps(bytes, table_));
        elements[1] = bits_as<Float>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table_));
    }

private:
    __m512 table_;
#else
    Decoder(float zero, float scale) : zero_(zero), scale_(scale) {}

    void decode(Int codes, Float* elements) const {
        elements[0] = (__builtin_convertvector(codes & 15, Float) - zero_) * scale_;
        elements[1] = (__builtin_convertvector(codes >> 4, Float) - zero_) * scale_;
    }

private:
    float zero_;
    float scale_;
#endif
};

template <int kBits>
inline Decoder<kBits> decoder(const zif_cpu_quantized& weight, int64_t output, int64_t group, int64_t groups) {
    const int64_t place = output * groups + group;
    const float zero = weight.zeros == nullptr ? (kBits == 8 ? 0.0f : 8.0f) : weight.zeros[place];
    return {zero, weight.scales[place]};
}

// Step `step` of a run of codes, with zeros behind its end.
template <int kBits>
inline Int codes_of(const uint8_t* run, int64_t step, const Layout& layout) {
    const int64_t left = layout.run - step * kLanes;
    if (left >= kLanes) return widened<kBits>(run + step * kLanes);
    uint8_t some[kLanes] = {};
    std::memcpy(some, run + step * kLanes, left);
    return widened<kBits>(some);
}

// Rows of activations in float32, in the order of `Layout`.
struct FloatRows {
    const float* data;  // [tokens, layout.width()], zeros where a run has ended
    int64_t tokens;
};

// N outputs for M tokens, decoded on the way.
template <int kBits, int N, int M>
inline void decoded_tile(const FloatRows& x, const zif_cpu_quantized& weight, const Layout& layout, int64_t output,
                         int64_t token, float* sums) {
    constexpr int kRuns = Decoder<kBits>::kRuns;
    const int64_t bytes = layout.row_bytes(), width = layout.width();
    const auto* codes = static_cast<const uint8_t*>(weight.codes) + output * bytes;
    const float* rows = x.data + token * width;
    Float held[N][M] = {};
    for (int64_t group = 0; group < layout.groups; ++group, codes += layout.run) {
        Decoder<kBits> decoders[N];
        for (int n = 0; n < N; ++n) decoders[n] = decoder<kBits>(weight, output + n, group, layout.groups);
        for (int64_t step = 0; step < layout.steps; ++step, rows += kRuns * kLanes) {
            for (int n = 0; n < N; ++n) {
                Float w[kRuns];
                decoders[n].decode(codes_of<kBits>(codes + n * bytes, step, layout), w);
                for (int m = 0; m < M; ++m) {
                    for (int run = 0; run < kRuns; ++run) held[n][m] += w[run] * load(rows + m * width + run * kLanes);
                }
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m * kPanel + n] = sum(held[n][m]);
    }
}

// `count` outputs as floats, [count, layout.width()].
template <int kBits>
inline void decode_panel(const zif_cpu_quantized& weight, const Layout& layout, int64_t output, int64_t count,
                         float* panel) {
    constexpr int kRuns = Decoder<kBits>::kRuns;
    const auto* codes = static_cast<const uint8_t*>(weight.codes) + output * layout.row_bytes();
    for (int64_t n = 0; n < count; ++n) {
        for (int64_t group = 0; group < layout.groups; ++group, codes += layout.run) {
            const Decoder<kBits> own = decoder<kBits>(weight, output + n, group, layout.groups);
            for (int64_t step = 0; step < layout.steps; ++step, panel += kRuns * kLanes) {
                Float w[kRuns];
                own.decode(codes_of<kBits>(codes, step, layout), w);
                for (int run = 0; run < kRuns; ++run) store(panel + run * kLanes, w[run]);
            }
        }
    }
}

// N rows of a decoded panel for M tokens: the same sums, in the same order, as those of `decoded_tile`.
template <int N, int M>
inline void float_tile(const FloatRows& x, const float* panel, int64_t width, int64_t token, float* sums) {
    const float* rows = x.data + token * width;
    Float held[N][M] = {};
    for (int64_t k = 0; k < width; k += kLanes) {
        Float own[M];
        for (int m = 0; m < M; ++m) own[m] = load(rows + m * width + k);
        for (int n = 0; n < N; ++n) {
            const Float w = load(panel + n * width + k);
            for (int m = 0; m < M; ++m) held[n][m] += w * own[m];
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m * kPanel + n] = sum(held[n][m]);
    }
}

template <class T>
inline void put_floats(const float* sums, int64_t count, int64_t token, int64_t output, const Target<T>& target) {
    for (int64_t i = 0; i < count; ++i) target.put(token, output + i, sums[i]);
}

// A panel for a few tokens, M at once.
template <int kBits, int M>
inline void decoded_panel(const FloatRows& x, const zif_cpu_quantized& weight, const Layout& layout, int64_t output,
                          int64_t count, float* sums) {
    constexpr int kOutputs = ZIF_VECTOR_BYTES == 64 ? (M == 1 ? 8 : 4) : 2;
    int64_t n = 0;
    for (; n + kOutputs <= count; n += kOutputs) {
        decoded_tile<kBits, kOutputs, M>(x, weight, layout, output + n, 0, sums + n);
    }
    for (; n < count; ++n) decoded_tile<kBits, 1, M>(x, weight, layout, output + n, 0, sums + n);
}

template <int M>
inline void float_panel(const FloatRows& x, const float* panel, int64_t width, int64_t token, int64_t count,
                        float* sums) {
    constexpr int kOutputs = ZIF_VECTOR_BYTES == 64 ? 4 : 2;
    int64_t n = 0;
    for (; n + kOutputs <= count; n += kOutputs) float_tile<kOutputs, M>(x, panel + n * width, width, token, sums + n);
    for (; n < count; ++n) float_tile<1, M>(x, panel + n * width, width, token, sums + n);
}

constexpr int64_t kDecodedOnTheWay = 3;  // tokens up to which codes are not decoded into memory first

inline int64_t panel_bytes(const Layout& layout) { return kPanel * layout.width() * 4; }

// All tokens times outputs `begin` to `end` - 1. panel: memory of `panel_bytes`.
template <int kBits, class T>
void multiply_floats(const FloatRows& x, const zif_cpu_quantized& weight, int64_t begin, int64_t end, float* panel,
                     const Target<T>& target) {
    const Layout layout(weight);
    PanelSums<float> sums;
    for (int64_t output = begin; output < end; output += kPanel) {
        const int64_t count = end - output < kPanel ? end - output : kPanel;
        const bool at_once = x.tokens <= kDecodedOnTheWay;
        if (!at_once) decode_panel<kBits>(weight, layout, output, count, panel);
        for (int64_t token = 0; token < x.tokens; token += kTokens) {
            const int64_t some = x.tokens - token < kTokens ? x.tokens - token : kTokens;
            const int64_t width = layout.width();
            switch (at_once ? some : some + kTokens) {
                case 1: decoded_panel<kBits, 1>(x, weight, layout, output, count, sums.at[0]); break;
                case 2: decoded_panel<kBits, 2>(x, weight, layout, output, count, sums.at[0]); break;
                case 3: decoded_panel<kBits, 3>(x, weight, layout, output, count, sums.at[0]); break;
                case 5: float_panel<1>(x, panel, width, token, count, sums.at[0]); break;
                case 6: float_panel<2>(x, panel, width, token, count, sums.at[0]); break;
                case 7: float_panel<3>(x, panel, width, token, count, sums.at[0]); break;
                case 8: float_panel<4>(x, panel, width, token, count, sums.at[0]); break;
            }
            for (int64_t m = 0; m < some; ++m) put_floats(sums.at[m], count, token + m, output, target);
        }
    }
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
