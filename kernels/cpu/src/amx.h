/* Whether this process may use the tiles of AMX. */
#ifndef INFINITE_LLM_AMX_H
#define INFINITE_LLM_AMX_H

/* Whether this compiler and system know AMX at all. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define KNOWS_AMX 1
#else
#define KNOWS_AMX 0
#endif

/* 1 if the processor multiplies tiles of bfloat16 and the system lets this process use them. Any thread may call it;
 * the system is asked once, for the whole process. */
int amx_allowed(void);

#endif
