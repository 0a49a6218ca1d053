// Weights of bfloat16 in 12 bits, without loss, so that what waits for memory reads three quarters of the bytes.
//
// The upper byte of a number, sign and upper bits of the exponent, takes few values in a matrix: 4 bits name one of
// eight, with either sign. The lower byte is kept as it is. Numbers with another upper byte are exceptions, listed
// apart and put back when their surroundings are unpacked.
//
// A piece is 128 numbers: their lower bytes, 64 by 64, then 64 bytes of codes, the first 64 in the low halves. Of 64
// numbers byte 16 * j + i belongs to number 8 * j + i, byte 16 * j + 8 + i to number 32 + 8 * j + i: as instructions
// interleave bytes. For tiles, a row is pieces of 128 inputs. Without tiles, 16 rows are blocks of 32 inputs, turned to
// words as products by vectors want them (words.h), and four pieces hold a block. Either way exceptions are listed by
// 16 rows and 128 inputs.
#pragma once

#include "pool.h"
#include "target.h"
#include "words.h"
#include "zif_cpu.h"

// Not with AVX512-BF16 alone: torch's products of many tokens are faster there, and want matrices as they are. Shorter
// vectors have no such form.
#if defined(__AMX_BF16__) || (defined(__AVX512BW__) && !defined(__AVX512BF16__))
#define ZIF_COMPACTS 1
#endif

namespace zif {
namespace ZIF_ISA {
namespace {

#if defined(ZIF_COMPACTS)

#if defined(__AMX_BF16__)
constexpr bool kTurned = false;
#else
constexpr bool kTurned = true;
#endif

constexpr int64_t kPieceInputs = ZIF_COMPACT_INPUTS;
constexpr int64_t kPieceNumbers = 128;
constexpr int64_t kPieceBytes = kPieceNumbers / 2 * 3;
constexpr int64_t kPieceVectors = 4;
constexpr int64_t kGroupRows = ZIF_COMPACT_ROWS;  // whose exceptions in a piece follow each other
constexpr int kUppers = 8;
constexpr int64_t kBlockInputs = 32;  // of 16 rows, turned
constexpr int64_t kBlockPieces = kGroupRows * kBlockInputs / kPieceNumbers;
constexpr int64_t kBlockBytes = kBlockPieces * kPieceBytes;

// A piece, 32 numbers a vector: inputs of a row, or one word of 16 rows.
__attribute__((always_inline)) inline void unpack_piece(const uint8_t* piece, __m512i uppers, __m512i* words) {
    const __m512i low = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(piece + 128);
    const __m512i lower = _mm512_loadu_si512(piece), others = _mm512_loadu_si512(piece + 64);
    const __m512i upper = _mm512_shuffle_epi8(uppers, _mm512_and_si512(codes, low));
    const __m512i other_upper = _mm512_shuffle_epi8(uppers, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
    words[0] = _mm512_unpacklo_epi8(lower, upper);
    words[1] = _mm512_unpackhi_epi8(lower, upper);
    words[2] = _mm512_unpacklo_epi8(others, other_upper);
    words[3] = _mm512_unpackhi_epi8(others, other_upper);
}

struct CompactWeight {
    typedef BFloat16 Element;

    const zif_cpu_compact* held;
    int64_t outputs;
    int64_t inputs;

    int64_t num_pieces() const { return inputs / kPieceInputs; }
    int64_t row_bytes() const { return num_pieces() * kPieceBytes; }
    // Where rows are as they were: 128 inputs of one.
    const uint8_t* piece(int64_t row, int64_t index) const {
        return held->rows + row * row_bytes() + index * kPieceBytes;
    }
    // Where rows are turned: 32 inputs of those from `row` on, a multiple of kGroupRows.
    const uint8_t* block(int64_t row, int64_t index) const {
        return held->rows + row * row_bytes() + index * kBlockBytes;
    }
    __m512i uppers() const {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(held->uppers)));
    }

    // Call put(row, input of the piece, number) for each exception of some rows in a piece. Rows count from `row`.
    template <class Put>
    __attribute__((always_inline)) void exceptions(int64_t row, int64_t count, int64_t piece, const Put& put) const {
        for (int64_t group = row / kGroupRows; group * kGroupRows < row + count; ++group) {
            const uint32_t* bounds = held->first + group * num_pieces() + piece;
            for (uint32_t i = bounds[0]; __builtin_expect(i < bounds[1], 0); ++i) {
                const uint32_t one = held->exceptions[i];
                const int64_t place = group * kGroupRows + (one >> 23) - row;
                if (place >= 0 && place < count) put(place, one >> 16 & 127, static_cast<uint16_t>(one));
            }
        }
    }
};

// A matrix into its compact form.
class Compaction {
public:
    explicit Compaction(const zif_cpu_compaction& call)
        : call_(call), numbers_(static_cast<const uint16_t*>(call.weight)),
          rows_(const_cast<uint8_t*>(call.compact->rows)), first_(const_cast<uint32_t*>(call.compact->first)),
          exceptions_(const_cast<uint32_t*>(call.compact->exceptions)),
          uppers_(const_cast<uint8_t*>(call.compact->uppers)) {}

    // Returns false when there are more exceptions than there is room, or where the second half of a gated product, turned,
    // would begin within a group of rows.
    bool run() {
        if (kTurned && call_.outputs % (2 * kGroupRows) != 0) return false;
        choose_uppers();
        parallel_for(num_groups(call_), [this](int64_t group, int) { pack_group(group); });
        int64_t total = 0;
        first_[0] = 0;
        for (int64_t i = 1; i <= num_groups(call_) * pieces(); ++i) {
            total += first_[i];
            if (total > call_.capacity) return false;
            first_[i] = static_cast<uint32_t>(total);
        }
        parallel_for(num_groups(call_), [this](int64_t group, int) { list_group(group); });
        return true;
    }

    static int64_t num_groups(const zif_cpu_compaction& call) {
        return (call.outputs + kGroupRows - 1) / kGroupRows;
    }

    static Range rows_of(const zif_cpu_compaction& call, int64_t group) {
        const int64_t first = group * kGroupRows;
        return {first, first + kGroupRows < call.outputs ? first + kGroupRows : call.outputs};
    }

private:
    static constexpr int64_t kSampled = 1 << 18;  // numbers that are looked at to choose the upper bytes

    int64_t pieces() const { return call_.inputs / kPieceInputs; }
    const uint16_t* numbers(int64_t row, int64_t piece) const {
        return numbers_ + row * call_.inputs + piece * kPieceInputs;
    }

    // Those that numbers have most often; first without signs, then with.
    void choose_uppers() {
        int64_t counts[128] = {};
        const int64_t rows = kSampled / call_.inputs + 1, step = call_.outputs > rows ? call_.outputs / rows : 1;
        for (int64_t row = 0; row < call_.outputs; row += step) {
            for (int64_t i = 0; i < call_.inputs; ++i) ++counts[numbers(row, 0)[i] >> 8 & 127];
        }
        for (int code = 0; code < kUppers; ++code) {
            int most = 0;
            for (int i = 0; i < 128; ++i) most = counts[i] > counts[most] ? i : most;
            uppers_[code] = static_cast<uint8_t>(most);
            uppers_[code + kUppers] = static_cast<uint8_t>(most | 128);
            counts[most] = -1;
        }
    }

    void pack_group(int64_t group) {
        uint32_t* counts = first_ + group * pieces() + 1;
        for (int64_t piece = 0; piece < pieces(); ++piece) counts[piece] = 0;
        const Range own = rows_of(call_, group);
        if (kTurned) return pack_turned(own.first, counts);
        for (int64_t row = own.first; row < own.last; ++row) {
            for (int64_t piece = 0; piece < pieces(); ++piece) {
                uint8_t* to = rows_ + (row * pieces() + piece) * kPieceBytes;
                counts[piece] += static_cast<uint32_t>(pack_piece(numbers(row, piece), to));
            }
        }
    }

    void pack_turned(int64_t row, uint32_t* counts) {
        uint8_t* to = rows_ + row * pieces() * kPieceBytes;
        for (int64_t input = 0; input < call_.inputs; input += kBlockInputs) {
            __m512i words[kGroupRows];
            for (int64_t i = 0; i < kGroupRows; ++i) {
                words[i] = _mm512_loadu_si512(numbers(row + i, 0) + input);
            }
            transpose_words(words);
            alignas(64) uint16_t turned[kGroupRows * kBlockInputs];
            for (int64_t i = 0; i < kGroupRows; ++i) _mm512_store_si512(turned + i * kBlockInputs, words[i]);
            for (int64_t i = 0; i < kBlockPieces; ++i, to += kPieceBytes) {
                counts[input / kPieceInputs] += static_cast<uint32_t>(pack_piece(turned + i * kPieceNumbers, to));
            }
        }
    }

    // Returns how many of its numbers are exceptions.
    int64_t pack_piece(const uint16_t* from, uint8_t* to) const {
        __m512i codes[2];
        int64_t count = 0;
        for (int half = 0; half < 2; ++half) {
            const Half some = half_of(from + half * 64);
            _mm512_storeu_si512(to + half * 64, some.lower);
            codes[half] = some.codes;
            count += __builtin_popcountll(some.lost);
        }
        _mm512_storeu_si512(to + 128, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
        return count;
    }

    // Half a piece. lost: a bit for each byte whose number has no code.
    struct Half {
        __m512i lower;
        __m512i codes;
        uint64_t lost;
    };

    Half half_of(const uint16_t* from) const {
        const __m512i some = _mm512_loadu_si512(from), others = _mm512_loadu_si512(from + 32);
        const __m512i byte = _mm512_set1_epi16(255), size = _mm512_set1_epi8(127);
        const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(some, byte), _mm512_and_si512(others, byte));
        const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(some, 8), _mm512_srli_epi16(others, 8));
        const __m512i sizes = _mm512_and_si512(upper, size);
        __m512i codes = _mm512_srli_epi16(_mm512_andnot_si512(size, upper), 4);
        uint64_t found = 0;
        for (int code = 0; code < kUppers; ++code) {
            const __mmask64 same = _mm512_cmpeq_epi8_mask(sizes, _mm512_set1_epi8(static_cast<char>(uppers_[code])));
            codes = _mm512_or_si512(codes, _mm512_maskz_set1_epi8(same, static_cast<char>(code)));
            found |= same;
        }
        return {lower, codes, ~found};
    }

    void list_group(int64_t group) {
        const Range own = rows_of(call_, group);
        for (int64_t piece = 0; piece < pieces(); ++piece) {
            const uint32_t* bounds = first_ + group * pieces() + piece;
            uint32_t* to = exceptions_ + bounds[0];
            for (int64_t row = own.first; row < own.last && to < exceptions_ + bounds[1]; ++row) {
                for (int64_t half = 0; half < 2; ++half) {
                    const uint16_t* from = numbers(row, piece) + half * 64;
                    for (uint64_t lost = half_of(from).lost; lost != 0; lost &= lost - 1) {
                        const int64_t byte = __builtin_ctzll(lost);
                        const int64_t input = byte / 16 * 8 + byte % 8 + byte / 8 % 2 * 32;
                        const int64_t place = (row - own.first) << 23 | (half * 64 + input) << 16;
                        *to++ = static_cast<uint32_t>(place | from[input]);
                    }
                }
            }
        }
    }

    const zif_cpu_compaction& call_;
    const uint16_t* numbers_;
    uint8_t* rows_;
    uint32_t* first_;
    uint32_t* exceptions_;
    uint8_t* uppers_;
};

int32_t compact_weight(const zif_cpu_compaction* call) { return Compaction(*call).run() ? 0 : -1; }

// A block of 16 rows as words.
__attribute__((always_inline)) inline void unpack_block(const uint8_t* block, __m512i uppers, __m512i* words) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBlockPieces; ++i) {
        unpack_piece(block + i * kPieceBytes, uppers, words + i * kPieceVectors);
    }
}

// 128 inputs of `count` rows: of kGroupRows, or fewer where rows are not turned. to: the first number.
inline void unpack_rows(const CompactWeight& weight, int64_t row, int64_t count, int64_t piece, uint16_t* to) {
    if constexpr (kTurned) {
        for (int64_t i = 0; i < kPieceInputs / kBlockInputs; ++i, to += kBlockInputs) {
            __m512i words[kGroupRows];
            unpack_block(weight.block(row, piece * (kPieceInputs / kBlockInputs) + i), weight.uppers(), words);
            transpose_words(words);
            for (int64_t j = 0; j < kGroupRows; ++j) _mm512_storeu_si512(to + j * weight.inputs, words[j]);
        }
    } else {
        for (int64_t i = 0; i < count; ++i, to += weight.inputs) {
            __m512i words[kPieceVectors];
            unpack_piece(weight.piece(row + i, piece), weight.uppers(), words);
            for (int64_t j = 0; j < kPieceVectors; ++j) _mm512_storeu_si512(to + j * kBlockInputs, words[j]);
        }
    }
}

void unpack_weight(const zif_cpu_compaction* call) {
    const CompactWeight weight = {call->compact, call->outputs, call->inputs};
    auto* numbers = static_cast<uint16_t*>(const_cast<void*>(call->weight));
    parallel_for(Compaction::num_groups(*call), [&](int64_t group, int) {
        const Range rows = Compaction::rows_of(*call, group);
        for (int64_t piece = 0; piece < weight.num_pieces(); ++piece) {
            uint16_t* to = numbers + rows.first * call->inputs + piece * kPieceInputs;
            unpack_rows(weight, rows.first, rows.count(), piece, to);
            weight.exceptions(rows.first, rows.count(), piece, [&](int64_t row, int64_t input, uint16_t number) {
                to[row * call->inputs + input] = number;
            });
        }
    });
}

#else

int32_t compact_weight(const zif_cpu_compaction*) { return -1; }

void unpack_weight(const zif_cpu_compaction*) {}

#endif

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
