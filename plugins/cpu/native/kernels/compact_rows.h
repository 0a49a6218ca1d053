// Compact weights as rows of products by vectors: blocks are unpacked to words where others are turned.
#pragma once

#include "compact.h"
#include "panels.h"

namespace zif {
namespace ZIF_ISA {
namespace {

#if defined(ZIF_COMPACTS) && !defined(__AMX_BF16__)

// As PlainRows (panels.h) of the same weight; `row` is a multiple of kGroupRows and `count` is kGroupRows.
struct CompactRows {
    typedef Multiplier<BFloat16> Mul;
    static constexpr int kParts = Mul::kParts;
    static_assert(kGroupRows == kLanes && kBlockInputs == Mul::kElements && kParts == 2);

    const CompactWeight& weight;
    const __m512i uppers;
    const uint8_t* blocks;
    int64_t group_bytes;

    explicit CompactRows(const CompactWeight& weight)
        : weight(weight), uppers(weight.uppers()), blocks(weight.held->rows),
          group_bytes(kGroupRows * weight.row_bytes()) {}

    int64_t num_blocks() const { return weight.inputs / kBlockInputs; }

    __attribute__((always_inline)) void read(int64_t row, int64_t, int64_t block, Float* words) const {
        __m512i some[kLanes];
        unpack_block(weight.block(row, block), uppers, some);
        if (__builtin_expect(has_exceptions(row, block), 0)) {
            alignas(64) uint16_t mended[kLanes * kBlockInputs];
            for (int i = 0; i < kLanes; ++i) _mm512_store_si512(mended + i * kBlockInputs, some[i]);
            exceptions(row, block, [&](int64_t lane, int64_t input, uint16_t number) {
                mended[input / 2 * kBlockInputs + lane * 2 + input % 2] = number;
            });
            for (int i = 0; i < kLanes; ++i) some[i] = _mm512_load_si512(mended + i * kBlockInputs);
        }
        for (int i = 0; i < kLanes; ++i) words[i] = bits_as<Float>(some[i]);
    }

    template <int kStep>
    void unpack(int64_t row, int64_t, int64_t begin, int64_t end, Float* to) const {
        const uint8_t* from = weight.block(row, begin);
        Float* at = to;
        for (int64_t i = 0; i < (end - begin) * kBlockPieces; ++i, from += kPieceBytes) {
            __m512i words[kPieceVectors];
            unpack_piece(from, uppers, words);
            for (int j = 0; j < kPieceVectors; ++j) {
                Float parts[kParts];
                Mul::unpack(bits_as<Float>(words[j]), parts);
                for (int part = 0; part < kParts; ++part, at += kStep) *at = parts[part];
            }
        }
        static_assert(kPanelBlocks<Mul> == kBlocks);  // a panel's exceptions are one list
        weight.exceptions(row, kGroupRows, begin / kBlocks, [&](int64_t lane, int64_t input, uint16_t number) {
            reinterpret_cast<float*>(to + input * kStep)[lane] = bits_as<float>(uint32_t(number) << 16);
        });
    }

    // A block is 12 lines, asked for as the first 12 of its 16 rows. Unsigned rows are divided by a shift.
    void ask(uint64_t row, int64_t block) const {
        ask_line(row / kGroupRows * kGroupRows, block, row % kGroupRows);
    }

    __attribute__((always_inline)) void ask_line(uint64_t row, int64_t block, int64_t line) const {
        if (line >= kBlockBytes / 64) return;
        __builtin_prefetch(blocks + row / kGroupRows * group_bytes + block * kBlockBytes + line * 64, 0, 2);
    }

private:
    static constexpr int64_t kBlocks = kPieceInputs / kBlockInputs;  // whose exceptions are one list

    bool has_exceptions(int64_t row, int64_t block) const {
        const uint32_t* bounds = weight.held->first + row / kGroupRows * weight.num_pieces() + block / kBlocks;
        for (uint32_t i = bounds[0]; __builtin_expect(i < bounds[1], 0); ++i) {
            if ((weight.held->exceptions[i] >> 16 & 127) / kBlockInputs == block % kBlocks) return true;
        }
        return false;
    }

    template <class Put>
    void exceptions(int64_t row, int64_t block, const Put& put) const {
        weight.exceptions(row, kGroupRows, block / kBlocks, [&](int64_t lane, int64_t input, uint16_t number) {
            if (input / kBlockInputs == block % kBlocks) put(lane, input % kBlockInputs, number);
        });
    }
};

template <>
constexpr bool kLieInBlocks<CompactRows> = true;

#endif

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
