/* Teams of threads that run the tasks of one call; the caller is one of them. */
#ifndef INFINITE_LLM_THREADS_H
#define INFINITE_LLM_THREADS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef struct thread_team thread_team;

/* worker is 0 .. num_threads - 1, constant within a task: it names the scratch memory that the task may use. */
typedef void (*task_function)(void *argument, int64_t task, int32_t worker);

/* The process's team of so many threads: whoever opens it shares it. NULL without memory or threads. */
thread_team *team_open(int32_t num_threads);
void team_close(thread_team *team);
/* Runs tasks 0 .. count - 1 and returns when all are done. They are begun in this order, each on any thread; while the team
 * is another caller's, all on this one. */
void team_run(thread_team *team, task_function function, void *argument, int64_t count);
/* While they run: the task that is begun next, as a hint. */
const atomic_int_fast64_t *team_next(const thread_team *team);

#endif
