// Which kernels serve: a table of functions per instruction set.
#pragma once

#include "zif_cpu.h"

namespace zif {

// One row of a call whose rows are computed each by itself. `thread` as in pool.h.
template <class Call>
using RowKernel = void (*)(const Call* call, int64_t row, int thread);

// The kernels of one instruction set. Arguments as in zif_cpu.h.
struct Kernels {
    const char* isa;
    decltype(&zif_cpu_linear) linear;
    RowKernel<zif_cpu_norm> rms_norm;
    RowKernel<zif_cpu_norm> add_rms_norm;
    RowKernel<zif_cpu_rotation> rotate;
    decltype(&zif_cpu_gated_activation) gated_activation;
    RowKernel<zif_cpu_kv_rows> store_kv;
    RowKernel<zif_cpu_kv_rows> ask_for_kv;  // ask the caches for where store_kv will write
    decltype(&zif_cpu_attend) attend;
    decltype(&zif_cpu_experts) experts;
    decltype(&zif_cpu_choose) choose;
    decltype(&zif_cpu_quantized_linear) quantized_linear;
    decltype(&zif_cpu_gated_linear) gated_linear;
    decltype(&zif_cpu_gated_quantized_linear) gated_quantized_linear;
    decltype(&zif_cpu_quantized_experts) quantized_experts;
    decltype(&zif_cpu_compact_weight) compact_weight;
    decltype(&zif_cpu_unpack_weight) unpack_weight;
};

// The table in use: at first the best that this processor runs.
const Kernels& kernels();

}  // namespace zif
