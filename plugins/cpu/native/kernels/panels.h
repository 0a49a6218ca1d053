// Products of rows of weights, as they lie, with rows of activations, by vectors whose lanes are outputs.
//
// Few tokens: a block of weights is turned in registers and multiplied there, so each is read once, in order. Many: a
// panel, some words of two vectors of rows, is turned into the first cache and stays while all tokens pass by it (Goto
// and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). A token's sums go through the inputs in
// one order either way, panel by panel, so they have the same bits however many tokens there are.
#pragma once

#include <type_traits>

#include "pool.h"
#include "target.h"
#include "words.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// Tokens whose sums fit into registers: twice, beside two vectors of weights; once, beside most of a turned block.
constexpr int kTokensAtOnce = ZIF_VECTOR_BYTES == 64 ? 12 : ZIF_VECTOR_BYTES == 32 ? 6 : 4;
constexpr int kFewTokens = kLanes;
constexpr int64_t kPassTokens = 32 * kTokensAtOnce;  // that pass by a panel: the second cache keeps them and their sums
constexpr int64_t kPanelRows = 2 * kLanes;
// Of a row, unpacked: 16 KiB at most, to leave room in the first cache. Summed apart, so errors do not grow with inputs.
constexpr int64_t kPanelWords = ZIF_VECTOR_BYTES == 64 ? 128 : 256;
constexpr int64_t kGroupPanels = 4;  // that take turns with the same inputs
constexpr int64_t kFollowingTokens = 4 * kTokensAtOnce;  // up to as many, panels follow memory's order
constexpr int64_t kWordsAhead = 32;  // words of tokens are asked for so far ahead

// Activations in words, as `Multiplier::hold` makes them, zeros behind the inputs up to whole blocks. Few tokens
// are one group, of many kTokensAtOnce are, but for the last: [groups][words][tokens of the group].
struct Words {
    float* data;
    int64_t tokens;
    int64_t words;

    bool few() const { return tokens <= kFewTokens; }
    int64_t group_tokens() const { return few() ? kFewTokens : kTokensAtOnce; }
    int64_t num_groups() const { return (tokens + group_tokens() - 1) / group_tokens(); }
    int64_t width(int64_t group) const {
        const int64_t left = tokens - group * group_tokens();
        return left < group_tokens() ? left : group_tokens();
    }
    float* group(int64_t index) const { return data + index * group_tokens() * words; }

    // Tokens that pass by a panel: as equal numbers as can be.
    int64_t pass_tokens() const {
        const int64_t passes = (tokens + kPassTokens - 1) / kPassTokens;
        if (passes <= 1) return kPassTokens;
        return ((tokens + passes - 1) / passes + kTokensAtOnce - 1) / kTokensAtOnce * kTokensAtOnce;
    }
};

// What `unpack` of rows does whose words need nothing but themselves.
template <int kStep, class Rows>
inline void unpack_blocks(const Rows& rows, int64_t row, int64_t count, int64_t begin, int64_t end, Float* to) {
    typedef typename Rows::Mul Mul;
    for (int64_t block = begin; block < end; ++block, to += kLanes * Mul::kParts * kStep) {
        Float words[kLanes];
        rows.read(row, count, block, words);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            Float parts[Mul::kParts];
            Mul::unpack(words[i], parts);
#pragma GCC unroll 16
            for (int j = 0; j < Mul::kParts; ++j) to[(i * Mul::kParts + j) * kStep] = parts[j];
        }
    }
}

// Rows of weights in turned blocks. Another kind of weight is another class with the same members.
template <class T>
struct PlainRows {
    typedef Multiplier<T> Mul;
    static constexpr int kParts = Mul::kParts;

    const T* data;
    int64_t inputs;

    int64_t num_blocks() const { return (inputs + Mul::kElements - 1) / Mul::kElements; }

    // Block `block` of `count` rows from `row` on: words[i] has word i of each.
    __attribute__((always_inline)) void read(int64_t row, int64_t count, int64_t block, Float* words) const {
        const int64_t k = block * Mul::kElements, left = inputs - k;
        const T* from = data + row * inputs + k;
        if (count == kLanes && left >= Mul::kElements) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) words[i] = Mul::words(from + i * inputs);
        } else {
            for (int64_t i = 0; i < kLanes; ++i, from += inputs) {
                if (i >= count) words[i] = Float{};
                else words[i] = left >= Mul::kElements ? Mul::words(from) : Mul::some_words(from, left);
            }
        }
        transpose(words);
    }

    // Blocks `begin` to `end` - 1, unpacked to every kStep-th vector.
    template <int kStep>
    void unpack(int64_t row, int64_t count, int64_t begin, int64_t end, Float* to) const {
        unpack_blocks<kStep>(*this, row, count, begin, end, to);
    }

    // Ask the second cache for a block of a row.
    void ask(int64_t row, int64_t block) const {
        __builtin_prefetch(data + row * inputs + block * Mul::kElements, 0, 2);
    }
};

// Words of a group of tokens. x: its first token, [tokens of the group, inputs], first axis strided.
template <class T>
inline void hold_group(const T* x, int64_t stride, int64_t inputs, const Words& to, int64_t group) {
    typedef Multiplier<T> Mul;
    const int64_t width = to.width(group);
    float* own = to.group(group);
    const float* end = own + width * to.words;
    for (int64_t k = 0; k < inputs; k += Mul::kElements) {
        Float vectors[Mul::kParts][kLanes] = {};
        for (int64_t token = 0; token < width; ++token) {
            Float held[Mul::kParts];
            Mul::hold(x + token * stride + k, inputs - k, held);
            for (int part = 0; part < Mul::kParts; ++part) vectors[part][token] = held[part];
        }
        for (int part = 0; part < Mul::kParts; ++part) {
            transpose(vectors[part]);
            for (int i = 0; i < kLanes; ++i, own += width) {
                // Beyond its place is that of the next word, but not at the end.
                if (end - own >= kLanes) store(own, vectors[part][i]);
                else store_some(own, vectors[part][i], width);
            }
        }
    }
}

// The same, x: all tokens.
template <class T>
inline void hold_words(const T* x, int64_t stride, int64_t inputs, const Words& to, int64_t group) {
    hold_group(x + group * to.group_tokens() * stride, stride, inputs, to, group);
}

// Whether sums are integers, which are exact.
template <class Mul>
constexpr bool kExact = std::is_same_v<typename Mul::Sum, Int>;

template <class Mul>
constexpr int64_t kPanelBlocks = [] {
    constexpr int64_t blocks = kPanelWords / (kLanes * Mul::kParts);
    static_assert(blocks > 0);
    return blocks;
}();

// Whether kLanes rows lie block by block in memory.
template <class Rows>
constexpr bool kLieInBlocks = false;

// M tokens times outputs `begin` to `end` - 1.
template <int M, class Rows, class Sink>
inline void multiply_few(const Rows& rows, const Words& x, int64_t begin, int64_t end, const Sink& sink) {
    typedef typename Rows::Mul Mul;
    for (int64_t output = begin; output < end; output += kLanes) {
        const int64_t count = end - output < kLanes ? end - output : kLanes;
        const bool ask = output + 2 * kLanes <= end;
        const float* own = x.data;
        typename Mul::Sum totals[M];
        for (int64_t first = 0; first < rows.num_blocks(); first += kPanelBlocks<Mul>) {
            typename Mul::Sum sums[M] = {};
            const int64_t next = first + kPanelBlocks<Mul>, last = next < rows.num_blocks() ? next : rows.num_blocks();
            for (int64_t block = first; block < last; ++block, own += kLanes * Mul::kParts * M) {
                Float words[kLanes];
                rows.read(output, count, block, words);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    // Of 1 or 2 tokens, whose products wait for memory, row by row; else in memory's order.
                    if constexpr (kLieInBlocks<Rows>) {
                        if (ask) rows.ask_line(output + kLanes, block, i);
                    } else {
                        if (ask && M <= 2) rows.ask(output + kLanes + i, block);
                        if (ask && M > 2) rows.ask(output + kLanes, block * kLanes + i);
                    }
                    Float parts[Mul::kParts];
                    Mul::unpack(words[i], parts);
#pragma GCC unroll 64
                    for (int at = 0; at < Mul::kParts * M; ++at) {
                        sums[at % M] = Mul::add(sums[at % M], parts[at / M], own + i * Mul::kParts * M + at);
                    }
                }
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) totals[m] = first > 0 ? totals[m] + sums[m] : sums[m];
        }
        sink.put({0, M}, output, totals, 1, count);
    }
}

// `multiply_few` of all tokens, 1 to M.
template <int M = kFewTokens, class Rows, class Sink>
inline void multiply_some(const Rows& rows, const Words& x, int64_t begin, int64_t end, const Sink& sink) {
    if (x.tokens == M) return multiply_few<M>(rows, x, begin, end, sink);
    if constexpr (M > 1) multiply_some<M - 1>(rows, x, begin, end, sink);
}

// Tokens `first` to `last` - 1, at most kPassTokens, times outputs `begin` to `end` - 1.
template <class Rows, class Sink>
class PanelProduct {
public:
    PanelProduct(const Rows& rows, const Words& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                 const Sink& sink)
        : rows_(rows), x_(x), first_(first), last_(last), begin_(begin), end_(end), sink_(sink) {}

    void run(int thread) {
        constexpr int64_t kSums = kGroupPanels * kPassTokens * kWide;
        sums_ = static_cast<Sum*>(scratch(thread, 4, (kSums + kWide * kPanelWords) * sizeof(Float)));
        panel_ = reinterpret_cast<Float*>(sums_ + kSums);
        for (Part part = part_at(begin_, 0, 0); part.num_rows > 0;) {
            const Part next = following(part);
            fill(part);
            pass(part, Ahead(*this, part, next));
            part = next;
        }
    }

private:
    typedef typename Rows::Mul Mul;
    typedef typename Mul::Sum Sum;
    static constexpr int kWide = kPanelRows / kLanes;
    static constexpr int64_t kBlockWords = kLanes * Mul::kParts;

    // What the panel holds: `count` blocks of some rows.
    struct Part {
        int64_t group;  // its first output
        int64_t panel;  // of the group
        int64_t block;
        int64_t count;
        int64_t num_rows;  // 0: there is nothing left
        bool last;         // of these rows

        int64_t output() const { return group + panel * kPanelRows; }
    };

    static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

    Part part_at(int64_t group, int64_t block, int64_t panel) const {
        const int64_t blocks = rows_.num_blocks(), left = end_ - group - panel * kPanelRows;
        return {group, panel, block, smaller_of(blocks - block, kPanelBlocks<Mul>), smaller_of(left, kPanelRows),
                block + kPanelBlocks<Mul> >= blocks};
    }

    Part following(const Part& part) const {
        const int64_t panels = last_ - first_ <= kFollowingTokens ? 1 : kGroupPanels;
        const int64_t group_end = smaller_of(end_, part.group + panels * kPanelRows);
        if (part.output() + kPanelRows < group_end) return part_at(part.group, part.block, part.panel + 1);
        return part.last ? part_at(group_end, 0, 0) : part_at(part.group, part.block + kPanelBlocks<Mul>, 0);
    }

    void fill(const Part& part) const {
        for (int wide = 0; wide < kWide; ++wide) {
            const int64_t row = wide * kLanes, count = smaller_of(part.num_rows - row, kLanes);
            Float* to = panel_ + wide;
            if (count > 0) {
                rows_.template unpack<kWide>(part.output() + row, count, part.block, part.block + part.count, to);
            } else {
                for (int64_t i = 0; i < kPanelWords; ++i) to[i * kWide] = Float{};
            }
        }
    }

    // Asks the caches for the blocks of the next part, evenly while this one is multiplied.
    class Ahead {
    public:
        Ahead(const PanelProduct& product, const Part& part, const Part& next)
            : rows_(product.rows_), next_(next), blocks_(next.num_rows * next.count),
              steps_(product.num_calls() * part.count) {}

        void step() {
            for (due_ += blocks_; due_ >= steps_; due_ -= steps_) {
                rows_.ask(next_.output() + row_, next_.block + block_);
                if (++block_ == next_.count) {
                    block_ = 0;
                    ++row_;
                }
            }
        }

    private:
        const Rows& rows_;
        const Part& next_;
        int64_t blocks_;
        int64_t steps_;
        int64_t due_ = 0;
        int64_t row_ = 0;
        int64_t block_ = 0;
    };

    int64_t num_calls() const { return (last_ - first_ + kTokensAtOnce - 1) / kTokensAtOnce; }

    // All tokens by the panel.
    void pass(const Part& part, Ahead ahead) const {
        const int64_t group = first_ / kTokensAtOnce;
        for (int64_t call = 0; call < num_calls(); ++call) {
            some_tokens<kTokensAtOnce>(x_.width(group + call), group + call, part, ahead);
        }
    }

    template <int M>
    void some_tokens(int64_t tokens, int64_t group, const Part& part, Ahead& ahead) const {
        if (tokens == M) return tile<M>(group, part, ahead);
        if constexpr (M > 1) some_tokens<M - 1>(tokens, group, part, ahead);
    }

    // The panel by the M tokens of a group.
    template <int M>
    void tile(int64_t group, const Part& part, Ahead& ahead) const {
        const int64_t token = group * kTokensAtOnce;
        Sum own[M][kWide] = {};
        Sum* sums = sums_ + (part.panel * kPassTokens + token - first_) * kWide;
        if (part.last) sink_.ask({token, token + M}, part.output());
        const float* x = x_.group(group) + part.block * kBlockWords * M;
        const Float* panel = panel_;
        for (int64_t block = 0; block < part.count; ++block) {
            ahead.step();
            for (int64_t word = 0; word < kBlockWords; ++word, panel += kWide, x += M) {
                // Tokens come from the second cache. Float products did not gain by asking; of few tokens, they lost.
                if constexpr (kExact<Mul>) __builtin_prefetch(x + kWordsAhead * M, 0, 3);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
                    for (int wide = 0; wide < kWide; ++wide) own[m][wide] = Mul::add(own[m][wide], panel[wide], x + m);
                }
            }
        }
#pragma GCC unroll 64
        for (int i = 0; i < M * kWide; ++i) {
            const Sum some = own[i / kWide][i % kWide];
            sums[i] = part.block > 0 ? sums[i] + some : some;
        }
        if (part.last) finish({token, token + M}, part, sums);
    }

    void finish(const Range& tokens, const Part& part, const Sum* sums) const {
        for (int wide = 0; wide < kWide; ++wide) {
            const int64_t row = wide * kLanes, count = smaller_of(part.num_rows - row, kLanes);
            if (count <= 0) return;
            sink_.put(tokens, part.output() + row, sums + wide, kWide, count);
        }
    }

    const Rows& rows_;
    const Words& x_;
    int64_t first_;
    int64_t last_;
    int64_t begin_;
    int64_t end_;
    const Sink& sink_;
    Sum* sums_ = nullptr;     // [kGroupPanels][kPassTokens][kWide]
    Float* panel_ = nullptr;  // [words][kWide]
};

// Tokens `first` to `last` - 1, first a multiple of kTokensAtOnce, times outputs `begin` to `end` - 1, in whichever way
// suits their number. `sink` takes the sums: put(token, output, sum of each of some outputs, how many).
template <class Rows, class Sink>
inline void multiply_rows(const Rows& rows, const Words& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                          const Sink& sink, int thread) {
    if (x.few()) return multiply_some(rows, x, begin, end, sink);
    PanelProduct<Rows, Sink>(rows, x, first, last, begin, end, sink).run(thread);
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
