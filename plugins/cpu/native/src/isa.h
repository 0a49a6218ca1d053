// Which kernels serve: a table of functions per instruction set.
#pragma once

#include "zif_cpu.h"

namespace zif {

// The kernels of one instruction set. Arguments as in zif_cpu.h.
struct Kernels {
    const char* isa;
    decltype(&zif_cpu_linear) linear;
    decltype(&zif_cpu_rms_norm) rms_norm;
    decltype(&zif_cpu_add_rms_norm) add_rms_norm;
    decltype(&zif_cpu_rotate) rotate;
    decltype(&zif_cpu_gated_activation) gated_activation;
    decltype(&zif_cpu_store_kv) store_kv;
    decltype(&zif_cpu_attend) attend;
    decltype(&zif_cpu_experts) experts;
    decltype(&zif_cpu_choose) choose;
    decltype(&zif_cpu_quantized_linear) quantized_linear;
    decltype(&zif_cpu_quantized_experts) quantized_experts;
};

// The table in use: at first the best that this processor runs.
const Kernels& kernels();

}  // namespace zif
