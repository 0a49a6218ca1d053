// A gated mixture of experts: the tokens of each expert together, experts and parts of their weights side by side.
#pragma once

#include "elementwise.h"
#include "pool.h"
#include "product.h"

namespace zif {
namespace ZIF_ISA {
namespace {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Which entries (token, choice) go to which expert. An entry is token * chosen + choice; its place is where it stands
// when entries are ordered by expert, and by entry within one.
struct Dispatch {
    int64_t* order;   // [entries], entry by place
    int64_t* places;  // [entries], place by entry
    int64_t* starts;  // [experts + 1], first place of each expert
    int64_t* used;    // [experts], the experts that have entries, rising
    int64_t num_used;

    // Returns false when an id is no expert.
    bool fill(const int64_t* ids, int64_t entries, int64_t experts) {
        for (int64_t i = 0; i <= experts; ++i) starts[i] = 0;
        for (int64_t i = 0; i < entries; ++i) {
            if (ids[i] < 0 || ids[i] >= experts) return false;
            ++starts[ids[i] + 1];
        }
        num_used = 0;
        for (int64_t i = 0; i < experts; ++i) {
            if (starts[i + 1] > 0) used[num_used++] = i;
            starts[i + 1] += starts[i];
        }
        for (int64_t i = 0; i < entries; ++i) {
            const int64_t place = starts[ids[i]]++;
            order[place] = i;
            places[i] = place;
        }
        for (int64_t i = experts; i > 0; --i) starts[i] = starts[i - 1];
        starts[0] = 0;
        return true;
    }
};

template <class T>
class Experts {
public:
    explicit Experts(const zif_cpu_experts_call& call) : call_(call), entries_(call.tokens * call.chosen) {}

    // Tokens in pieces whose scratch memory is bounded.
    int32_t run_pieces() const {
        const int64_t token_bytes = call_.chosen * (call_.channels + 3 * call_.inner) * int64_t(sizeof(T));
        const int64_t piece = kPieceBytes / token_bytes > kLeastTokens ? kPieceBytes / token_bytes : kLeastTokens;
        for (int64_t first = 0; first < call_.tokens; first += piece) {
            zif_cpu_experts_call part = call_;
            part.x = typed(call_.x) + first * call_.x_stride;
            part.y = const_cast<T*>(typed(call_.y)) + first * call_.channels;
            part.weights += first * call_.chosen;
            part.ids += first * call_.chosen;
            part.tokens = call_.tokens - first < piece ? call_.tokens - first : piece;
            if (Experts(part).run() != 0) return -1;
        }
        return 0;
    }

private:
    static constexpr int64_t kPieceBytes = 256 << 20;
    static constexpr int64_t kLeastTokens = 64;

    int32_t run() {
        auto* table = static_cast<int64_t*>(scratch(0, 1, (2 * entries_ + 2 * call_.experts + 1) * 8));
        dispatch_ = {table, table + entries_, table + 2 * entries_, table + 2 * entries_ + call_.experts + 1, 0};
        if (!dispatch_.fill(call_.ids, entries_, call_.experts)) return -1;
        lay_out();
        parallel_for(entries_, [&](int64_t place, int) {
            const int64_t token = dispatch_.order[place] / call_.chosen;
            std::memcpy(rows_ + place * call_.channels, typed(call_.x) + token * call_.x_stride,
                        call_.channels * sizeof(T));
        });
        multiply(rows_, call_.channels, call_.gate_up, call_.gate_up_bias, gate_up_, 2 * call_.inner);
        const zif_cpu_gating gating = {gate_up_, inner_, 2 * call_.inner, entries_, call_.inner, call_.activation,
                                       call_.dtype};
        gated_activation(&gating);
        multiply(inner_, call_.inner, call_.down, call_.down_bias, rows_, call_.channels);
        parallel_for(call_.tokens, [&](int64_t token, int) { combine(token); });
        return 0;
    }

    static const T* typed(const void* array) { return static_cast<const T*>(array); }

    void lay_out() {
        const int64_t widths[] = {call_.channels, 2 * call_.inner, call_.inner};
        int64_t offsets[4] = {};
        for (int i = 0; i < 3; ++i) offsets[i + 1] = offsets[i] + aligned(entries_ * widths[i] * int64_t(sizeof(T)));
        auto* memory = static_cast<char*>(scratch(0, 2, offsets[3]));
        rows_ = reinterpret_cast<T*>(memory + offsets[0]);
        gate_up_ = reinterpret_cast<T*>(memory + offsets[1]);
        inner_ = reinterpret_cast<T*>(memory + offsets[2]);
    }

    int64_t count(int64_t expert) const { return dispatch_.starts[expert + 1] - dispatch_.starts[expert]; }

    // The operand of one expert's rows.
    Operand<T> operand(const T* x, int64_t inputs, int64_t expert, char* memory) const {
        const int64_t first = dispatch_.starts[expert];
        return {x + first * inputs, inputs, count(expert), inputs, memory};
    }

    // y = x @ weight[expert].T + bias[expert] for the rows of each expert. x: [entries, inputs]. y: [entries, outputs].
    void multiply(const T* x, int64_t inputs, const void* weight, const void* bias, T* y, int64_t outputs) const {
        auto* offsets = static_cast<int64_t*>(scratch(0, 3, (dispatch_.num_used + 1) * 8));
        offsets[0] = 0;
        for (int64_t i = 0; i < dispatch_.num_used; ++i) {
            offsets[i + 1] = offsets[i] + aligned(Operand<T>::bytes(count(dispatch_.used[i]), inputs));
        }
        auto* memory = static_cast<char*>(scratch(0, 0, offsets[dispatch_.num_used]));
        parallel_for(dispatch_.num_used, [&](int64_t i, int) {
            const Operand<T> rows = operand(x, inputs, dispatch_.used[i], memory + offsets[i]);
            for (int64_t part = 0; part < rows.num_parts(); ++part) rows.prepare(part);
        });
        const bool many = Operand<T>::many(entries_ / dispatch_.num_used);
        const int64_t chunk = many ? large_chunk(outputs, dispatch_.num_used) : kChunk;
        const int64_t chunks = (outputs + chunk - 1) / chunk;
        parallel_for(dispatch_.num_used * chunks, [&](int64_t task, int thread) {
            const int64_t i = task / chunks, begin = task % chunks * chunk, expert = dispatch_.used[i];
            const int64_t end = begin + chunk < outputs ? begin + chunk : outputs;
            const T* own_bias = bias == nullptr ? nullptr : typed(bias) + expert * outputs;
            const T* own_weight = typed(weight) + expert * outputs * inputs;
            const Target<T> target = {y + dispatch_.starts[expert] * outputs, outputs, own_bias};
            const Operand<T> rows = operand(x, inputs, expert, memory + offsets[i]);
            for (int64_t block = 0; block < rows.num_blocks(); ++block) {
                rows.multiply(block, own_weight, begin, end, target, thread);
            }
        });
    }

    // The choices of a token in the order of expert ids, so that the sum does not depend on how they were listed.
    int64_t next_choice(int64_t token, int64_t last_place) const {
        int64_t best = entries_;
        for (int64_t choice = 0; choice < call_.chosen; ++choice) {
            const int64_t place = dispatch_.places[token * call_.chosen + choice];
            if (place > last_place && place < best) best = place;
        }
        return best;
    }

    void combine(int64_t token) const {
        T* y = const_cast<T*>(typed(call_.y)) + token * call_.channels;
        for (int64_t k = 0; k < call_.channels; k += kLanes) {
            const int64_t left = call_.channels - k;
            Float total = {};
            int64_t place = next_choice(token, -1);
            for (; place < entries_; place = next_choice(token, place)) {
                const T* row = rows_ + place * call_.channels + k;
                const Float part = left >= kLanes ? load(row) : load_some(row, left);
                total += part * call_.weights[dispatch_.order[place]];
            }
            if (left >= kLanes) {
                store(y + k, total);
            } else {
                store_some(y + k, total, left);
            }
        }
    }

    zif_cpu_experts_call call_;
    int64_t entries_;
    Dispatch dispatch_ = {};
    T* rows_ = nullptr;     // [entries, channels], by place: inputs at first, outputs at last
    T* gate_up_ = nullptr;  // [entries, 2 * inner]
    T* inner_ = nullptr;    // [entries, inner]
};

int32_t experts(const zif_cpu_experts_call* call) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return Experts<float>(*call).run_pieces();
        case ZIF_BFLOAT16: return Experts<BFloat16>(*call).run_pieces();
        case ZIF_FLOAT16: return Experts<Float16>(*call).run_pieces();
    }
    return -1;
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
