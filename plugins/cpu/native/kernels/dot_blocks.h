// Products of many tokens by inner products: weights are widened once for all tokens, in blocks that the caches hold.
//
// A panel is some inputs of 16 rows of weights, as `Multiplier` wants them; it stays in the first cache while a block of
// tokens passes by it, some tokens by some rows at once. Sums wait as vectors, whose lanes are added at the end, in the
// order of dots.h: both give the same bits.
#pragma once

#include "dots.h"
#include "pool.h"

namespace zif {
namespace ZIF_ISA {
namespace {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kPanelSteps = 32;  // vectors of a row
constexpr int64_t kGroupPanels = 4;  // whose sums wait together, in the second cache
constexpr int64_t kPassTokens = 132;
constexpr int64_t kRowsAtOnce = 4;  // with kTokensAtOnce: as many sums as registers hold beside the operands
constexpr int64_t kTokensAtOnce = ZIF_VECTOR_BYTES == 64 ? 6 : 3;

// Tokens `first` to `last` - 1, at most kPassTokens, times outputs `begin` to `end` - 1. Rows of x are aligned, and
// zeros fill them up to whole vectors.
template <class T>
class DotBlocks {
public:
    typedef Multiplier<T> Mul;
    typedef typename Mul::Held Held;

    DotBlocks(const Rows<T>& x, int64_t first, int64_t last, const T* weight, int64_t begin, int64_t end,
              const Target<T>& target)
        : x_(x), first_(first), last_(last), weight_(weight), begin_(begin), end_(end), target_(target) {}

    void run(int thread) {
        constexpr int64_t kSums = kGroupPanels * kPassTokens * kPanelRows;
        sums_ = static_cast<Float*>(scratch(thread, 4, (kSums + kPanelRows * kPanelSteps) * sizeof(Float)));
        panel_ = reinterpret_cast<Held*>(sums_ + kSums);
        for (Part part = part_at(begin_, 0, 0); part.num_rows > 0;) {
            const Part next = following(part);
            fill(part);
            pass(part, next);
            part = next;
        }
    }

private:
    static constexpr int64_t kLine = 64 / sizeof(T);

    // What the panel holds: `count` steps of inputs of some rows. Panels of a group take turns with the same inputs, so
    // that the second cache keeps those of the tokens.
    struct Part {
        int64_t group;  // its first output
        int64_t panel;  // of the group
        int64_t step;
        int64_t count;
        int64_t num_rows;  // 0: there is nothing left
        bool last;         // of these rows

        int64_t output() const { return group + panel * kPanelRows; }
    };

    static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

    Part part_at(int64_t group, int64_t step, int64_t panel) const {
        const int64_t steps = (x_.inputs + Mul::kStep - 1) / Mul::kStep, left = end_ - group - panel * kPanelRows;
        return {group, panel, step, smaller_of(steps - step, kPanelSteps), smaller_of(left, kPanelRows),
                step + kPanelSteps >= steps};
    }

    Part following(const Part& part) const {
        const int64_t group_end = smaller_of(end_, part.group + kGroupPanels * kPanelRows);
        if (part.output() + kPanelRows < group_end) return part_at(part.group, part.step, part.panel + 1);
        return part.last ? part_at(group_end, 0, 0) : part_at(part.group, part.step + kPanelSteps, 0);
    }

    // Ask the caches for a row of what `fill` reads next.
    void ask(const Part& next, int64_t row) const {
        const int64_t k = next.step * Mul::kStep, count = smaller_of(x_.inputs - k, kPanelSteps * Mul::kStep);
        const T* from = weight_ + (next.output() + row) * x_.inputs + k;
        for (int64_t at = 0; at < count; at += kLine) __builtin_prefetch(from + at, 0, 2);
    }

    void fill(const Part& part) const {
        const int64_t k = part.step * Mul::kStep, left = x_.inputs - k;
        for (int64_t row = 0; row < kPanelRows; ++row) {
            Held* to = panel_ + row * kPanelSteps * Mul::kStep;
            const T* from = weight_ + (part.output() + row) * x_.inputs + k;
            for (int64_t i = 0; i < part.count; ++i, to += Mul::kStep, from += Mul::kStep) {
                const int64_t some = row >= part.num_rows ? 0 : left - i * Mul::kStep;
                typename Mul::Words words = {};
                if (some >= Mul::kStep) words = Mul::words(from);
                else if (some > 0) words = Mul::some_words(from, some);
                std::memcpy(to, &words, sizeof(words));
            }
        }
    }

    // All tokens by the panel.
    void pass(const Part& part, const Part& next) const {
        const int64_t calls = (last_ - first_) / kTokensAtOnce;
        int64_t token = first_;
        for (int64_t call = 0; call < calls; ++call, token += kTokensAtOnce) {
            rows<kTokensAtOnce>(token, part);
            const int64_t end = (call + 1) * next.num_rows / calls;
            for (int64_t row = call * next.num_rows / calls; row < end; ++row) ask(next, row);
        }
        some_rows<kTokensAtOnce - 1>(last_ - token, token, part);
    }

    // rows<tokens>, for 0 <= tokens <= M.
    template <int64_t M>
    void some_rows(int64_t tokens, int64_t token, const Part& part) const {
        if constexpr (M > 0) {
            if (tokens == M) return rows<M>(token, part);
            some_rows<M - 1>(tokens, token, part);
        }
    }

    template <int64_t M>
    void rows(int64_t token, const Part& part) const {
        const Held* x = x_.data + token * x_.stride + part.step * Mul::kStep;
        Float* sums = sums_ + (part.panel * kPassTokens + token - first_) * kPanelRows;
        for (int64_t row = 0; row < kPanelRows; row += kRowsAtOnce) {
            tile<M>(panel_ + row * kPanelSteps * Mul::kStep, x, part.count, part.step > 0, sums + row);
        }
        if (!part.last) return;
        for (int64_t m = 0; m < M; ++m) finish(token + m, part, sums + m * kPanelRows);
    }

    // Rows of the panel by M tokens. sums: [M][kPanelRows].
    template <int64_t M>
    void tile(const Held* weight, const Held* x, int64_t count, bool go_on, Float* sums) const {
        constexpr int64_t kStride = kPanelSteps * Mul::kStep;
        Float own[M][kRowsAtOnce] = {};
        if (go_on) {
            for (int64_t m = 0; m < M; ++m) {
                for (int64_t n = 0; n < kRowsAtOnce; ++n) own[m][n] = sums[m * kPanelRows + n];
            }
        }
        for (int64_t i = 0; i < count; ++i, weight += Mul::kStep, x += Mul::kStep) {
            typename Mul::Words words[kRowsAtOnce];
            for (int64_t n = 0; n < kRowsAtOnce; ++n) words[n] = Mul::words(weight + n * kStride);
            for (int64_t m = 0; m < M; ++m) {
                const auto held = Mul::words(x + m * x_.stride);
                for (int64_t n = 0; n < kRowsAtOnce; ++n) own[m][n] = Mul::add(own[m][n], words[n], held);
            }
        }
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t n = 0; n < kRowsAtOnce; ++n) sums[m * kPanelRows + n] = own[m][n];
        }
    }

    void finish(int64_t token, const Part& part, const Float* sums) const {
        for (int64_t row = 0; row < part.num_rows; row += kLanes) {
            target_.put_some(token, part.output() + row, sum_each(sums + row), smaller_of(part.num_rows - row, kLanes));
        }
    }

    const Rows<T>& x_;
    int64_t first_;
    int64_t last_;
    const T* weight_;
    int64_t begin_;
    int64_t end_;
    const Target<T>& target_;
    Float* sums_ = nullptr;  // [kGroupPanels][kPassTokens][kPanelRows]
    Held* panel_ = nullptr;  // [kPanelRows][kPanelSteps]
};

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
