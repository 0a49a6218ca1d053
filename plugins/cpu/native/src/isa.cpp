#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace zif {

#define ZIF_DECLARE(name) namespace name { extern const Kernels kernels; }
ZIF_DECLARE(portable)
ZIF_DECLARE(avx2)
ZIF_DECLARE(avx512)
ZIF_DECLARE(avx512_vnni)
ZIF_DECLARE(avx512_bf16)
ZIF_DECLARE(amx)

namespace {

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// AMX also needs the system's leave to use the tile registers (Linux, arch_prctl ARCH_REQ_XCOMP_PERM, for XTILEDATA).
bool has_amx() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool tiles = edx & (1u << 24), bf16 = edx & (1u << 22), int8 = edx & (1u << 25);
    return tiles && bf16 && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

#endif

struct Level {
    const Kernels* kernels;
    bool runs;
};

constexpr int kMaxLevels = 6;

struct Levels {
    Level levels[kMaxLevels];
    int count = 0;
    std::string names;

    void add(const Kernels& kernels, bool runs) {
        if (!runs) return;
        levels[count++] = {&kernels, runs};
        names += names.empty() ? "" : " ";
        names += kernels.isa;
    }
};

const Levels& levels() {
    static const Levels* const found = [] {
        auto* all = new Levels;
        all->add(portable::kernels, true);
#if defined(ZIF_HAS_avx2)
        all->add(avx2::kernels, has_avx2());
        all->add(avx512::kernels, has_avx512());
#endif
#if defined(ZIF_HAS_avx512_vnni)
        all->add(avx512_vnni::kernels, has_avx512_vnni());
#endif
#if defined(ZIF_HAS_avx512_bf16)
        all->add(avx512_bf16::kernels, has_avx512_bf16());
#endif
#if defined(ZIF_HAS_amx)
        all->add(amx::kernels, has_amx());
#endif
        return all;
    }();
    return *found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& best_kernels() { return *levels().levels[levels().count - 1].kernels; }

}  // namespace

const Kernels& kernels() {
    const Kernels* in_use = chosen.load(std::memory_order_acquire);
    return in_use != nullptr ? *in_use : best_kernels();
}

}  // namespace zif

const char* zif_cpu_isas(void) { return zif::levels().names.c_str(); }

int32_t zif_cpu_use_isa(const char* name) {
    for (int i = 0; i < zif::levels().count; ++i) {
        const zif::Kernels* one = zif::levels().levels[i].kernels;
        if (std::strcmp(one->isa, name) == 0) {
            zif::chosen.store(one, std::memory_order_release);
            return 0;
        }
    }
    return -1;
}
