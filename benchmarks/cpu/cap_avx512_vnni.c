// Preloaded into a process, this makes the processor one with AVX-512 and VNNI that has no AMX and no instructions for
// 16-bit floats. Cap of `benchmarks/cpu.py --isa avx512_vnni`, built and explained by cap.py.
//
// CPUID is made to fault (arch_prctl ARCH_CPUID_SET), and the handler of the fault answers without the instruction sets
// that are hidden, so that every library of the process chooses as it would on such a processor, children included.
// Beyond that the kernel refuses the process the state of AMX tiles: whoever uses AMX without asking dies of SIGILL.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { CPUID_SET = 0x1012, REQUEST_STATE = 0x1023, FAILED = 97 };  // of arch_prctl(2), and an exit status
// Bits are those of the Intel SDM, volume 2, CPUID.
static void hide(unsigned leaf, unsigned subleaf, unsigned out[4]) {
    if (leaf == 7 && subleaf == 0) out[3] &= ~(1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);  // AMX, AVX512-FP16
    if (leaf == 7 && subleaf == 1) out[0] = out[3] = 0;           // AVX512-BF16, AVX-VNNI, AMX-FP16, AVX10 and later
    if (leaf == 0xd && subleaf == 0) out[0] &= ~(3u << 17);       // the state of tiles
    if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) memset(out, 0, 4 * sizeof *out);  // tiles, AVX10's version
}

// What the program wants done with SIGSEGV: it is told that it is. After a fault that is not CPUID's it really is.
static struct sigaction wanted;
static volatile int is_over;

static int set_action(int number, const struct sigaction *action, struct sigaction *before) {
    static int (*next)(int, const struct sigaction *, struct sigaction *);
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "sigaction");
    return next(number, action, before);
}

int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
    if (number != SIGSEGV || is_over) return set_action(number, action, before);
    struct sigaction was = wanted;
    if (action) wanted = *action;
    if (before) *before = was;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &action, &before) ? SIG_ERR : before.sa_handler;
}

static void answer(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)reg[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0xa2) {  // no CPUID: a fault as any other, met again by the program's handler
        is_over = 1;
        set_action(number, &wanted, NULL);
        return;
    }
    unsigned leaf = (unsigned)reg[REG_RAX], subleaf = (unsigned)reg[REG_RCX], out[4];
    int error = errno;
    syscall(SYS_arch_prctl, CPUID_SET, 1);
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
    syscall(SYS_arch_prctl, CPUID_SET, 0);
    errno = error;
    hide(leaf, subleaf, out);
    reg[REG_RAX] = out[0], reg[REG_RBX] = out[1], reg[REG_RCX] = out[2], reg[REG_RDX] = out[3];
    reg[REG_RIP] += 2;
}

static void fail(const char *said) {
    ssize_t written = write(STDERR_FILENO, said, strlen(said));
    _exit(written < 0 ? FAILED + 1 : FAILED);
}

static void refuse_tiles(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, REQUEST_STATE, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    // Without the flag some kernels slow a filtered process down, which would be no property of the processor.
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program))
        fail("the cap cannot refuse AMX: the system takes no filter of system calls\n");
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer, action.sa_flags = SA_SIGINFO | SA_RESTART;
    set_action(SIGSEGV, &action, &wanted);
    refuse_tiles();
    if (syscall(SYS_arch_prctl, CPUID_SET, 0))
        fail("the cap cannot hide instruction sets: CPUID does not fault on this processor\n");
}
