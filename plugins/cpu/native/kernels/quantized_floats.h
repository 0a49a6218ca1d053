// Products of weights held in 8 or 4 bits with activations that keep their precision, in float32.
//
// An element is (code - zero) * scale, rounded to float32 once. Words of codes are turned and unpacked to elements, in
// registers for few tokens and into a panel for many; both go through the inputs in one order, so a token's result
// does not depend on how many there are.
#pragma once

#include "quantized_integers.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

inline int64_t row_bytes_of(const zif_cpu_quantized& weight) { return weight.inputs * weight.bits / 8; }

// The zero of codes without zeros.
inline float middle_of(int bits) { return bits == 8 ? 0.0f : 8.0f; }

// `count` elements that lie `stride` apart, zeros behind them.
inline Float strided(const float* from, int64_t stride, int64_t count) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(stride)));
    const auto valid = static_cast<__mmask16>((1u << count) - 1);
    return bits_as<Float>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, places, from, 4));
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i places = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(static_cast<int32_t>(stride)));
    const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lanes);
    return bits_as<Float>(_mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, places, bits_as<__m256>(valid), 4));
#else
    float some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i * stride];
    return load(some);
#endif
}

// How a word of codes is multiplied: as many elements of a row, one after another.
template <int kBits>
struct Elements {
    typedef Float Sum;
    static constexpr int kParts = 32 / kBits;

    static Float add(Float sum, Float w, const float* x) { return fused(w, splat(*x), sum); }
};

// What words of codes of kLanes rows stand for: goes through them, group by group.
//
// Codes become floats without being converted: as the last bits of a large power of two, from which they may lie some
// bits away, if the power is the smaller. So the two or four of a half word need no shift, and the power is taken off
// with the zero, exactly.
template <int kBits>
class Decoder {
public:
    Decoder() = default;

    // From word `word` of rows `row` to `row` + `count` - 1 on.
    Decoder(const zif_cpu_quantized& weight, int64_t row, int64_t count, int64_t word)
        : weight_(&weight), groups_(weight.inputs / weight.group), group_words_(weight.group * kBits / 32),
          group_(word / group_words_), left_(group_words_ - word % group_words_), row_(row), count_(count) {
        use_zeros(splat(middle_of(kBits)));
        use_group();
    }

    // How many of the `most` words that follow are of one group. They are to be decoded next.
    int64_t run(int64_t most) {
        if (left_ == 0) {
            ++group_;
            left_ = group_words_;
            use_group();
        }
        const int64_t words = left_ < most ? left_ : most;
        left_ -= words;
        return words;
    }

    __attribute__((always_inline)) void decode(Float word, Float* elements) const {
        UInt codes = bits_as<UInt>(word);
        if constexpr (kBits == 8) codes ^= 0x80808080u;
        const UInt halves[] = {codes, codes >> 16};
#pragma GCC unroll 8
        for (int i = 0; i < kParts; ++i) {
            const int place = i % kHalf;
            const UInt bits = (halves[i / kHalf] & (kMask << (place * kBits))) | power_bits(place);
            elements[i] = (bits_as<Float>(bits) - offsets_[place]) * scale_;
        }
    }

private:
    static constexpr int kParts = 32 / kBits;
    static constexpr int kHalf = kParts / 2;
    static constexpr uint32_t kMask = (1u << kBits) - 1;
    static constexpr float kRaised = kBits == 8 ? 128.0f : 0.0f;  // what codes have too much

    // 2 to the 23 - place * kBits, whose last bit but place * kBits counts one.
    static constexpr uint32_t power_bits(int place) { return (150u - place * kBits) << 23; }

    void use_group() {
        const bool ended = group_ >= groups_;
        const int64_t place = row_ * groups_ + group_;
        scale_ = ended ? Float{} : strided(weight_->scales + place, groups_, count_);
        if (ended || weight_->zeros == nullptr) return;
        float zeros[kLanes] = {};
        for (int64_t i = 0; i < count_; ++i) zeros[i] = weight_->zeros[place + i * groups_];
        use_zeros(load(zeros));
    }

    void use_zeros(Float zeros) {
        for (int i = 0; i < kHalf; ++i) offsets_[i] = zeros + (kRaised + bits_as<float>(power_bits(i)));
    }

    const zif_cpu_quantized* weight_;
    int64_t groups_;
    int64_t group_words_;
    int64_t group_;
    int64_t left_;  // words of the group
    int64_t row_;
    int64_t count_;
    Float scale_;
    Float offsets_[kHalf];
};

// Rows of codes whose groups are whole words.
template <int kBits>
struct CodeRows {
    typedef Elements<kBits> Mul;
    static constexpr int kParts = Mul::kParts;

    const zif_cpu_quantized& weight;
    PlainRows<int8_t> bytes;

    explicit CodeRows(const zif_cpu_quantized& weight)
        : weight(weight), bytes{static_cast<const int8_t*>(weight.codes), row_bytes_of(weight)} {}

    int64_t num_blocks() const { return bytes.num_blocks(); }
    void ask(int64_t row, int64_t block) const { bytes.ask(row, block); }

    template <int kStep>
    void unpack(int64_t row, int64_t count, int64_t begin, int64_t end, Float* to) const {
        Decoder<kBits> decoder(weight, row, count, begin * kLanes);
        for (int64_t block = begin; block < end; ++block) {
            Float words[kLanes];
            bytes.read(row, count, block, words);
            for (int64_t i = 0; i < kLanes;) {
                for (const int64_t last = i + decoder.run(kLanes - i); i < last; ++i, to += kParts * kStep) {
                    Float parts[kParts];
                    decoder.decode(words[i], parts);
#pragma GCC unroll 8
                    for (int part = 0; part < kParts; ++part) to[part * kStep] = parts[part];
                }
            }
        }
    }
};

// Rows of any groups, decoded one by one.
struct AnyRows {
    typedef Multiplier<float> Mul;
    static constexpr int kParts = 1;

    const zif_cpu_quantized& weight;

    int64_t num_blocks() const { return (weight.inputs + kLanes - 1) / kLanes; }

    void ask(int64_t row, int64_t block) const {
        __builtin_prefetch(static_cast<const char*>(weight.codes) + row * row_bytes_of(weight) +
                           block * kLanes * weight.bits / 8);
    }

    void read(int64_t row, int64_t count, int64_t block, Float* words) const {
        for (int64_t i = 0; i < kLanes; ++i) {
            float elements[kLanes] = {};
            for (int64_t k = 0; i < count && k < kLanes && block * kLanes + k < weight.inputs; ++k) {
                elements[k] = element(row + i, block * kLanes + k);
            }
            words[i] = load(elements);
        }
        transpose(words);
    }

    template <int kStep>
    void unpack(int64_t row, int64_t count, int64_t begin, int64_t end, Float* to) const {
        unpack_blocks<kStep>(*this, row, count, begin, end, to);
    }

private:
    // Input `k` in the order of `widen_row`.
    float element(int64_t row, int64_t k) const {
        const int64_t place = row * (weight.inputs / weight.group) + k / weight.group;
        const auto* codes = static_cast<const uint8_t*>(weight.codes) + row * row_bytes_of(weight);
        const float code = weight.bits == 8 ? static_cast<int8_t>(codes[k]) : codes[k / 2] >> k % 2 * 4 & 15;
        const float zero = weight.zeros == nullptr ? middle_of(weight.bits) : weight.zeros[place];
        return (code - zero) * weight.scales[place];
    }
};

// Words of a row of activations.
inline int64_t float_words(const zif_cpu_quantized& weight) {
    return rounded_up(weight.inputs, kLanes * 32 / weight.bits);
}

// One row in float32, in the order in which words of codes are unpacked, zeros behind it up to `width`: of 4 bits the
// first of a group's first half, the first of its second half, and so on.
template <class T>
inline void widen_row(const T* x, const zif_cpu_quantized& weight, float* to, int64_t width) {
    const int64_t halves = weight.bits == 8 ? 1 : 2, half = weight.group / halves;
    for (float* const end = to + weight.inputs; to < end; x += halves * half) {
        for (int64_t k = 0; k < half; k += kLanes) {
            const int64_t count = half - k < kLanes ? half - k : kLanes;
            float some[2][kLanes];
            for (int64_t i = 0; i < halves; ++i) {
                store(some[i], count == kLanes ? load(x + i * half + k) : load_some(x + i * half + k, count));
            }
            if (halves == 1) {
                std::memcpy(to, some[0], count * sizeof(float));
            } else {
                for (int64_t i = 0; i < count; ++i) {
                    to[2 * i] = some[0][i];
                    to[2 * i + 1] = some[1][i];
                }
            }
            to += halves * count;
        }
    }
    std::memset(to, 0, (width - weight.inputs) * sizeof(float));
}

// The tokens of a group as words. x: its first token; memory: for their rows.
template <class T>
inline void widen_group(const T* x, int64_t stride, const zif_cpu_quantized& weight, const Words& to, int64_t group,
                        float* memory) {
    for (int64_t i = 0; i < to.width(group); ++i) widen_row(x + i * stride, weight, memory + i * to.words, to.words);
    hold_group(memory, to.words, to.words, to, group);
}

// M tokens times kWide vectors of rows from `output` on, `count` of the last one.
template <int kWide, int M, int kBits>
inline void decode_vectors(const CodeRows<kBits>& rows, const Words& x, int64_t output, int64_t count, bool ask,
                           const Sums<Float>& sink) {
    constexpr int kParts = 32 / kBits;
    const auto count_of = [&](int wide) { return wide + 1 < kWide ? kLanes : count; };
    Decoder<kBits> decoders[kWide];
    for (int i = 0; i < kWide; ++i) decoders[i] = {rows.weight, output + i * kLanes, count_of(i), 0};
    Float sums[kWide][M] = {}, totals[kWide][M];
    for (int i = 0; i < kWide * M; ++i) totals[i / M][i % M] = splat(-0.0f);  // nothing, even to a sum of -0
    const float* own = x.data;
    for (int64_t block = 0; block < rows.num_blocks(); ++block) {
        if (block > 0 && block % kPanelBlocks<Elements<kBits>> == 0) {
#pragma GCC unroll 32
            for (int i = 0; i < kWide * M; ++i) {
                totals[i / M][i % M] += sums[i / M][i % M];
                sums[i / M][i % M] = Float{};
            }
        }
        Float words[kWide][kLanes];
        for (int i = 0; i < kWide; ++i) rows.bytes.read(output + i * kLanes, count_of(i), block, words[i]);
        for (int64_t word = 0; word < kLanes;) {
            int64_t last = word;
            for (int i = 0; i < kWide; ++i) last = word + decoders[i].run(kLanes - word);
            for (; word < last; ++word, own += kParts * M) {
#pragma GCC unroll 2
                for (int i = 0; i < kWide; ++i) {
                    if (ask) rows.ask(output + kWide * kLanes, (block * kLanes + word) * kWide + i);
                    Float parts[kParts];
                    decoders[i].decode(words[i][word], parts);
#pragma GCC unroll 128
                    for (int at = 0; at < kParts * M; ++at) {
                        sums[i][at % M] = Elements<kBits>::add(sums[i][at % M], parts[at / M], own + at);
                    }
                }
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kWide * M; ++i) totals[i / M][i % M] += sums[i / M][i % M];
    for (int i = 0; i < kWide; ++i) sink.put({0, M}, output + i * kLanes, totals[i], 1, count_of(i));
}

// `multiply_few` of words that are decoded: of 1 to M tokens.
template <int M = kFewTokens, int kBits>
inline void decode_few(const CodeRows<kBits>& rows, const Words& x, int64_t begin, int64_t end,
                       const Sums<Float>& sink) {
    if constexpr (M > 1) {
        if (x.tokens < M) return decode_few<M - 1>(rows, x, begin, end, sink);
    }
    constexpr int kWide = M <= 2 && (kBits == 4 || kLanes < 16) ? 2 : 1;  // one sum alone waits for itself
    int64_t output = begin;
    for (; output + kWide * kLanes <= end; output += kWide * kLanes) {
        decode_vectors<kWide, M>(rows, x, output, kLanes, output + 2 * kWide * kLanes <= end, sink);
    }
    for (; output < end; output += kLanes) {
        decode_vectors<1, M>(rows, x, output, end - output < kLanes ? end - output : kLanes, false, sink);
    }
}

// `multiply_rows` of codes.
template <int kBits>
inline void multiply_rows(const CodeRows<kBits>& rows, const Words& x, int64_t first, int64_t last, int64_t begin,
                          int64_t end, const Sums<Float>& sink, int thread) {
    if (x.few()) return decode_few(rows, x, begin, end, sink);
    PanelProduct<CodeRows<kBits>, Sums<Float>>(rows, x, first, last, begin, end, sink).run(thread);
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
