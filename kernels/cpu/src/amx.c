/* Linux gives the memory for tiles, 8 KiB a thread, only to processes that ask for it. */
#include "amx.h"

#if KNOWS_AMX
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static int is_allowed;

static void ask(void) {
    __builtin_cpu_init();
    is_allowed = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                 !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

int amx_allowed(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask);
    return is_allowed;
}
#else
int amx_allowed(void) { return 0; }
#endif
