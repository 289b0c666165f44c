// What the library was compiled with, and which of its versions this processor runs.
#include "common.h"

// level: 4, 3 or 1 for x86-64-v4, v3 and the baseline as LB_CLONES has them, 0 elsewhere; openmp: whether it has threads.
LB_EXPORT void native_facts(int64_t *level, int64_t *openmp) {
#if defined(__x86_64__) && defined(__linux__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    *level = v4 ? 4 : v3 ? 3 : 1;
#else
    *level = 0;
#endif
#if defined(_OPENMP)
    *openmp = 1;
#else
    *openmp = 0;
#endif
}
