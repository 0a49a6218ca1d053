// A gated mixture of experts whose weights are held as integers: what experts.h does, by the products of quantized.h.
#pragma once

#include "experts.h"
#include "quantized.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace quantized {

template <class T>
class Mixture {
public:
    explicit Mixture(const zif_cpu_quantized_experts_call& call)
        : call_(call), channels_(call.down.outputs), inner_width_(call.down.inputs),
          entries_(call.tokens * call.chosen) {}

    // Tokens in pieces whose scratch memory is bounded.
    int32_t run_pieces() const {
        const int64_t token_bytes = call_.chosen * (channels_ + 3 * inner_width_) * int64_t(sizeof(T));
        const int64_t piece = kPieceBytes / token_bytes > kLeastPiece ? kPieceBytes / token_bytes : kLeastPiece;
        for (int64_t first = 0; first < call_.tokens; first += piece) {
            zif_cpu_quantized_experts_call part = call_;
            part.x = typed(call_.x) + first * call_.x_stride;
            part.y = const_cast<T*>(typed(call_.y)) + first * channels_;
            part.weights += first * call_.chosen;
            part.ids += first * call_.chosen;
            part.tokens = call_.tokens - first < piece ? call_.tokens - first : piece;
            if (Mixture(part).run() != 0) return -1;
        }
        return 0;
    }

private:
    static constexpr int64_t kPieceBytes = 256 << 20;
    static constexpr int64_t kLeastPiece = 64;

    static const T* typed(const void* array) { return static_cast<const T*>(array); }

    int32_t run() {
        auto* table = static_cast<int64_t*>(scratch(0, 1, (2 * entries_ + 3 * call_.experts + 2) * 8));
        offsets_ = table + 2 * entries_ + 2 * call_.experts + 1;
        dispatch_ = {table, table + entries_, table + 2 * entries_, table + 2 * entries_ + call_.experts + 1, 0};
        if (!dispatch_.fill(call_.ids, entries_, call_.experts)) return -1;
        lay_out();
        parallel_for(entries_, [&](int64_t place, int) {
            const int64_t token = dispatch_.order[place] / call_.chosen;
            std::memcpy(rows_ + place * channels_, typed(call_.x) + token * call_.x_stride, channels_ * sizeof(T));
        });
        multiply(rows_, call_.gate_up, call_.gate_up_bias, gate_up_);
        const zif_cpu_gating gating = {gate_up_, inner_, 2 * inner_width_, entries_, inner_width_, call_.activation,
                                       call_.dtype};
        gated_activation(&gating);
        multiply(inner_, call_.down, call_.down_bias, rows_);
        parallel_for(call_.tokens, [&](int64_t token, int) { combine(token); });
        return 0;
    }

    void lay_out() {
        const int64_t widths[] = {channels_, 2 * inner_width_, inner_width_};
        int64_t offsets[4] = {};
        for (int i = 0; i < 3; ++i) offsets[i + 1] = offsets[i] + rounded_up(entries_ * widths[i] * sizeof(T), 64);
        auto* memory = static_cast<char*>(scratch(0, 2, offsets[3]));
        rows_ = reinterpret_cast<T*>(memory + offsets[0]);
        gate_up_ = reinterpret_cast<T*>(memory + offsets[1]);
        inner_ = reinterpret_cast<T*>(memory + offsets[2]);
    }

    int64_t count(int64_t expert) const { return dispatch_.starts[expert + 1] - dispatch_.starts[expert]; }

    // The rows of one expert, made ready for its weight.
    Activations<T> activations(const T* x, const zif_cpu_quantized& weight, int64_t i, char* memory) const {
        const int64_t expert = dispatch_.used[i], first = dispatch_.starts[expert];
        return {x + first * weight.inputs, weight.inputs, count(expert), entry(weight, expert), memory + offsets_[i]};
    }

    // y = x @ weight[expert].T + bias[expert] for the rows of each expert. x: [entries, inputs]. y: [entries, outputs].
    void multiply(const T* x, const zif_cpu_quantized& weight, const void* bias, T* y) const {
        offsets_[0] = 0;
        for (int64_t i = 0; i < dispatch_.num_used; ++i) {
            const int64_t bytes = Activations<T>::bytes(weight, count(dispatch_.used[i]));
            offsets_[i + 1] = offsets_[i] + rounded_up(bytes, 64);
        }
        auto* memory = static_cast<char*>(scratch(0, 0, offsets_[dispatch_.num_used]));
        parallel_for(dispatch_.num_used, [&](int64_t i, int thread) {
            const Activations<T> rows = activations(x, weight, i, memory);
            for (int64_t part = 0; part < rows.num_parts(); ++part) rows.prepare(part, thread);
        });
        const int64_t chunk = chunk_rows(weight), chunks = num_tasks(weight.outputs, chunk);
        parallel_for(dispatch_.num_used * chunks, [&](int64_t task, int thread) {
            const int64_t i = task / chunks, begin = task % chunks * chunk, expert = dispatch_.used[i];
            const int64_t end = begin + chunk < weight.outputs ? begin + chunk : weight.outputs;
            const T* own_bias = bias == nullptr ? nullptr : typed(bias) + expert * weight.outputs;
            const Target<T> target = {y + dispatch_.starts[expert] * weight.outputs, weight.outputs, own_bias};
            activations(x, weight, i, memory).multiply(begin, end, target, thread);
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
        T* y = const_cast<T*>(typed(call_.y)) + token * channels_;
        for_vectors(0, channels_, [&](int64_t k, auto lanes) {
            Float total = {};
            for (int64_t place = next_choice(token, -1); place < entries_; place = next_choice(token, place)) {
                total += lanes.load(rows_ + place * channels_ + k) * call_.weights[dispatch_.order[place]];
            }
            lanes.store(y + k, total);
        });
    }

    zif_cpu_quantized_experts_call call_;
    int64_t channels_;
    int64_t inner_width_;
    int64_t entries_;
    Dispatch dispatch_ = {};
    int64_t* offsets_ = nullptr;  // [experts + 1], of the activations of each used expert
    T* rows_ = nullptr;           // [entries, channels], by place: inputs at first, outputs at last
    T* gate_up_ = nullptr;        // [entries, 2 * inner]
    T* inner_ = nullptr;          // [entries, inner]
};

}  // namespace quantized

int32_t quantized_experts(const zif_cpu_quantized_experts_call* call) {
    switch (call->dtype) {
        case ZIF_FLOAT32: return quantized::Mixture<float>(*call).run_pieces();
        case ZIF_BFLOAT16: return quantized::Mixture<BFloat16>(*call).run_pieces();
        case ZIF_FLOAT16: return quantized::Mixture<Float16>(*call).run_pieces();
    }
    return -1;
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
