// What the library was compiled with, and which of its versions this processor runs.
#include "vector.h"

// level: see processor_level; openmp: whether functions use several threads.
LB_EXPORT void native_facts(int64_t *level, int64_t *openmp) {
    *level = processor_level();
#if defined(_OPENMP)
    *openmp = 1;
#else
    *openmp = 0;
#endif
}
