// Products of weights held in 8 or 4 bits with bfloat16 by AMX.
//
// Codes are turned into bfloat16 a few tiles at a time, as integers, which it holds exactly: of 4 bits as 128 + code,
// whose last bits are those of the code. What a code has too much, its zero with it, is the same for a whole group: it
// is taken off by the sum of the group's activations, and scales come after that.
#pragma once

#include "quantized_pairs.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

// Tiles of inputs that are decoded at once. Where they meet few tokens the first cache holds them and what is decoded
// next; where they meet many, sums are fetched and stored less often. What a group's sums are does not depend on it.
inline int64_t most_steps_of(int64_t tokens) { return tokens > 2 * kTile ? 64 : 4; }

// 32 codes of 8 bits as pairs of bfloat16: (i, 16 + i).
inline __m512i decoded_bytes(const uint8_t* codes) {
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
    const __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(low));
    const __m512i second = _mm512_castps_si512(_mm512_cvtepi32_ps(high));
    // The lower halves are zeros: the pair takes the upper ones, first | (second & mask).
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, _mm512_set1_epi32(0xffff0000), 0xf8);
}

constexpr int32_t kRaised = 128;  // what decoded codes of 4 bits have too much

// The last 4 bits of each word as bfloat16, raised: (words & 15) | 128.0.
inline __m512i decoded_halves(__m512i words) {
    return _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(0x000f), _mm512_set1_epi16(0x4300), 0xea);
}

// A run of steps within one group. start: its first byte within a row; bytes: how many it takes there.
struct Piece {
    int64_t group;
    int64_t first_step;  // of the row
    int64_t steps;
    int64_t start;
    int64_t bytes;
    bool begins;  // a group begins, ends
    bool ends;

    Piece(const zif_cpu_quantized& weight, int64_t most_steps, int64_t index) {
        const int64_t group_steps = weight.group / kTileInputs, pieces = num_tiles(group_steps, most_steps);
        const int64_t first = index % pieces * most_steps, step_bytes = kTileInputs * weight.bits / 8;
        group = index / pieces;
        first_step = group * group_steps + first;
        steps = group_steps - first < most_steps ? group_steps - first : most_steps;
        start = first_step * step_bytes;
        bytes = steps * step_bytes;
        begins = first == 0;
        ends = first + steps == group_steps;
    }

    static int64_t count(const zif_cpu_quantized& weight, int64_t most_steps) {
        return weight.inputs / weight.group * num_tiles(weight.group / kTileInputs, most_steps);
    }
};

// 32 rows of a weight that are decoded piece by piece; `asks_ahead`: the next 32 will be too.
struct Block {
    const zif_cpu_quantized& weight;
    int64_t output;
    int64_t rows;
    bool asks_ahead;
    int64_t row_bytes;
    const uint8_t* codes;

    Block(const zif_cpu_quantized& weight, int64_t output, int64_t end)
        : weight(weight), output(output), rows(end - output < kBlockRows ? end - output : kBlockRows),
          asks_ahead(output + 2 * kBlockRows <= end), row_bytes(weight.inputs * weight.bits / 8),
          codes(static_cast<const uint8_t*>(weight.codes) + output * row_bytes) {}
};

// Decode the piece of one row into tiles: `to` is its place in the first one.
template <Order kOrder>
inline void decode_row(const uint8_t* codes, int64_t steps, uint32_t* to) {
    constexpr int64_t kStep = 2 * kTileWords;
    if constexpr (kOrder == Order::kQuarters) {
        for (int64_t step = 0; step < steps; step += 4, codes += 64, to += 4 * kStep) {
            const __m512i words = _mm512_loadu_si512(codes);
            _mm512_store_si512(to, decoded_halves(words));
            _mm512_store_si512(to + kStep, decoded_halves(_mm512_srli_epi32(words, 4)));
            _mm512_store_si512(to + 2 * kStep, decoded_halves(_mm512_srli_epi32(words, 8)));
            _mm512_store_si512(to + 3 * kStep, decoded_halves(_mm512_srli_epi32(words, 12)));
        }
    } else if constexpr (kOrder == Order::kHalves) {
        for (int64_t step = 0; step < steps; ++step, codes += 16, to += kStep) {
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
            _mm512_store_si512(to, decoded_halves(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12))));
        }
    } else {
        for (int64_t step = 0; step < steps; ++step, codes += kTileInputs, to += kStep) {
            _mm512_store_si512(to, decoded_bytes(codes));
        }
    }
}

// Decode rows `begin` to `end` - 1 of a piece into tiles [steps][2][16 rows][32 inputs]: zeros where rows end.
template <Order kOrder>
inline void decode_rows(const Block& block, const Piece& piece, int64_t begin, int64_t end, uint32_t* tiles) {
    const int64_t row_bytes = block.row_bytes, last = end < block.rows ? end : block.rows;
    const uint8_t* codes = block.codes + begin * row_bytes + piece.start;
    // Memory is read best in order: line by line of the rows that follow.
    const uint8_t* ahead = block.codes + kBlockRows * row_bytes + piece.start * kBlockRows + begin * piece.bytes;
    int64_t i = begin;
    for (; i < last; ++i, codes += row_bytes, ahead += piece.bytes) {
        if (block.asks_ahead) {
            for (int64_t byte = 0; byte < piece.bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
        }
        decode_row<kOrder>(codes, piece.steps, tiles + i * kTile);
    }
    for (; i < end; ++i) {
        for (int64_t step = 0; step < piece.steps; ++step) {
            _mm512_store_si512(tiles + i * kTile + step * 2 * kTileWords, _mm512_setzero_si512());
        }
    }
}

// What the codes of a group mean, by row: element = (decoded - shift) * scale.
struct alignas(64) Meaning {
    float scale[kBlockRows] = {};
    float shift[kBlockRows] = {};

    void read(const Block& block, int64_t group) {
        const zif_cpu_quantized& weight = block.weight;
        const int64_t groups = weight.inputs / weight.group, first = block.output * groups + group;
        for (int64_t i = 0; i < block.rows; ++i) {
            scale[i] = weight.scales[first + i * groups];
            const int32_t zero = weight.zeros != nullptr ? weight.zeros[first + i * groups] : weight.bits == 4 ? 8 : 0;
            shift[i] = static_cast<float>(zero + (weight.bits == 4 ? kRaised : 0));
        }
    }
};

// Where sums go, each [tiles of tokens][2][16 outputs][width]: `running` within a group, as they are decoded; `totals`
// at its end.
struct Totals {
    float* running;
    float* totals;

    static int64_t bytes(int64_t tokens) {
        return num_tiles(tokens, kTile) * 2 * kTile * PackedPairs::width_of(tokens) * 4;
    }
};

// Some tokens meet one piece: one token, a tile of them, or two. Where a group goes on, so do its sums: their order is
// the same for any number of tokens.
enum class Some { kToken, kTile, kTwoTiles };

template <Some kSome>
class PieceProduct {
public:
    static constexpr bool kTwo = kSome == Some::kTwoTiles;
    static constexpr int64_t kWidth = kSome == Some::kToken ? 1 : kTile;
    static constexpr int64_t kWords = kTile * kWidth;

    PieceProduct(const PackedPairs& x, const Totals& totals, int64_t tile, const Piece& piece, const uint32_t* decoded)
        : x_(x), piece_(piece), tile_(tile), decoded_(decoded), running_(totals.running + tile * 2 * kWords),
          totals_(totals.totals + tile * 2 * kWords) {
        if (piece.begins) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (kTwo) {
                _tile_zero(2);
                _tile_zero(3);
            }
            return;
        }
        _tile_loadd(0, running_, kWidth * 4);
        _tile_loadd(1, running_ + kWords, kWidth * 4);
        if constexpr (kTwo) {
            _tile_loadd(2, running_ + 2 * kWords, kWidth * 4);
            _tile_loadd(3, running_ + 3 * kWords, kWidth * 4);
        }
    }

    void step(int64_t step) const {
        _tile_loadd(4, decoded_ + step * 2 * kTileWords, 64);
        _tile_loadd(6, x_.tile(tile_, piece_.first_step + step), kWidth * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, decoded_ + (step * 2 + 1) * kTileWords, 64);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (kTwo) {
            _tile_loadd(7, x_.tile(tile_ + 1, piece_.first_step + step), kWidth * 4);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

    void finish(const Meaning& meaning) const {
        _tile_stored(0, running_, kWidth * 4);
        _tile_stored(1, running_ + kWords, kWidth * 4);
        if constexpr (kTwo) {
            _tile_stored(2, running_ + 2 * kWords, kWidth * 4);
            _tile_stored(3, running_ + 3 * kWords, kWidth * 4);
        }
        stored();
        if (!piece_.ends) return;
        for (int64_t part = 0; part < (kTwo ? 2 : 1); ++part) {
            const float* sums = x_.group_sums(tile_ + part, piece_.group);
            const __m512 common = kSome == Some::kToken ? _mm512_set1_ps(*sums) : _mm512_loadu_ps(sums);
            for (int64_t i = 0; i < 2 * kWidth; ++i) add(part * 2 * kWidth + i, i * kTile / kWidth, common, meaning);
        }
    }

private:
    // Add 16 running sums to their totals: of one output by 16 tokens, or of 16 outputs from `row` on by one token.
    void add(int64_t place, int64_t row, __m512 sums, const Meaning& meaning) const {
        const bool alone = kSome == Some::kToken;
        const __m512 scale = alone ? _mm512_load_ps(meaning.scale + row) : _mm512_set1_ps(meaning.scale[row]);
        const __m512 shift = alone ? _mm512_load_ps(meaning.shift + row) : _mm512_set1_ps(meaning.shift[row]);
        const __m512 sum = _mm512_fnmadd_ps(shift, sums, _mm512_load_ps(running_ + place * kTile));
        float* to = totals_ + place * kTile;
        _mm512_store_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(to)));
    }

    const PackedPairs& x_;
    const Piece& piece_;
    int64_t tile_;
    const uint32_t* decoded_;
    float* running_;
    float* totals_;
};

// Decode piece `next`, if any, while the first tokens meet piece `own`: tiles work beside vectors, each waiting for its
// memory, if their instructions are near each other.
template <Some kSome, Order kOrder>
inline void overlap(const Block& block, const PieceProduct<kSome>& product, const Piece& own, const Meaning& meaning,
                    const Piece* next, uint32_t* tiles) {
    for (int64_t step = 0; step < own.steps; ++step) {
        product.step(step);
        if (next == nullptr) continue;
        decode_rows<kOrder>(block, *next, kBlockRows * step / own.steps, kBlockRows * (step + 1) / own.steps, tiles);
    }
    stored();
    product.finish(meaning);
}

template <Some kSome>
inline void meet(const PackedPairs& x, const Totals& totals, int64_t tile, const Piece& piece, const uint32_t* decoded,
                 const Meaning& meaning) {
    const PieceProduct<kSome> product(x, totals, tile, piece, decoded);
    for (int64_t step = 0; step < piece.steps; ++step) product.step(step);
    product.finish(meaning);
}

// All tokens times one block. tiles: memory for two decoded pieces.
template <Some kSome, Order kOrder>
inline void multiply_block(const Block& block, const PackedPairs& x, const Totals& totals, uint32_t* tiles) {
    const int64_t most_steps = most_steps_of(x.tokens), piece_words = most_steps * 2 * kTileWords;
    const int64_t count = Piece::count(block.weight, most_steps);
    Meaning meaning;
    Piece own(block.weight, most_steps, 0);
    decode_rows<kOrder>(block, own, 0, kBlockRows, tiles);
    stored();
    for (int64_t index = 0; index < count; ++index) {
        const Piece next(block.weight, most_steps, index + 1);
        const uint32_t* decoded = tiles + index % 2 * piece_words;
        if (own.begins) meaning.read(block, own.group);
        const PieceProduct<kSome> product(x, totals, 0, own, decoded);
        overlap<kSome, kOrder>(block, product, own, meaning, index + 1 < count ? &next : nullptr,
                               tiles + (index + 1) % 2 * piece_words);
        for (int64_t tile = 2; tile < x.tiles(); tile += 2) {
            if (tile + 1 < x.tiles()) {
                meet<Some::kTwoTiles>(x, totals, tile, own, decoded, meaning);
            } else {
                meet<Some::kTile>(x, totals, tile, own, decoded, meaning);
            }
        }
        own = next;
    }
}

template <Some kSome>
inline void multiply_block(const Block& block, const PackedPairs& x, const Totals& totals, uint32_t* tiles) {
    switch (order_of(block.weight)) {
        case Order::kBytes: return multiply_block<kSome, Order::kBytes>(block, x, totals, tiles);
        case Order::kHalves: return multiply_block<kSome, Order::kHalves>(block, x, totals, tiles);
        case Order::kQuarters: return multiply_block<kSome, Order::kQuarters>(block, x, totals, tiles);
    }
}

// Totals of 16 outputs from `output` on, with the bias, to the rows of their tokens. rows: by token.
inline void put_decoded(const __m512i* rows, int64_t first, int64_t tokens, int64_t output, int64_t end,
                        const Target<BFloat16>& target) {
    const int64_t count = end - output < kTile ? end - output : kTile;
    const Float bias = target.bias_of(output, count);
    for (int64_t i = 0; i < kTile && first + i < tokens; ++i) {
        target.put_biased(first + i, output, bits_as<Float>(rows[i]) + bias, count);
    }
}

inline void put_block(const float* totals, int64_t tokens, int64_t output, int64_t end,
                      const Target<BFloat16>& target) {
    const int64_t words = kTile * PackedPairs::width_of(tokens);
    for (int64_t part = 0; part < 2 * num_tiles(tokens, kTile); ++part) {
        const int64_t place = output + part % 2 * kTile;
        if (place >= end) continue;
        __m512i rows[16];
        if (tokens == 1) {
            rows[0] = _mm512_loadu_si512(totals + part * words);
        } else {
            load_transposed(totals + part * words, rows);
        }
        put_decoded(rows, part / 2 * kTile, tokens, place, end, target);
    }
}

// All tokens times outputs `begin` to `end` - 1.
inline void multiply_decoded(const PackedPairs& x, const zif_cpu_quantized& weight, int64_t begin, int64_t end,
                             int thread, const Target<BFloat16>& target) {
    const NarrowTiles registers(x.width() * 4);
    const int64_t bytes = Totals::bytes(x.tokens);
    auto* memory = static_cast<char*>(scratch(thread, 3, 2 * bytes + 2 * most_steps_of(x.tokens) * 2 * kTileWords * 4));
    auto* decoded = reinterpret_cast<uint32_t*>(memory + 2 * bytes);
    const Totals totals = {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory + bytes)};
    for (int64_t output = begin; output < end; output += kBlockRows) {
        const Block block(weight, output, end);
        std::memset(totals.totals, 0, bytes);
        if (x.tokens == 1) {
            multiply_block<Some::kToken>(block, x, totals, decoded);
        } else if (x.tiles() == 1) {
            multiply_block<Some::kTile>(block, x, totals, decoded);
        } else {
            multiply_block<Some::kTwoTiles>(block, x, totals, decoded);
        }
        put_block(totals.totals, x.tokens, output, end, target);
    }
}

}  // namespace quantized
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif

#endif
