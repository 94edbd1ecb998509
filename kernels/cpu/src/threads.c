#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "awake.h"

/* The caller looks out for so long for helpers that are about to finish: to be woken takes as long. */
#define FINISH_NS 50000

/* Helpers sleep between calls. A round is one call of team_run: mutex guards all fields but atomic ones. */
struct thread_team {
    pthread_mutex_t mutex;
    pthread_cond_t started, finished;
    int32_t num_helpers;
    atomic_int busy; /* helpers that have not finished the round; changes under mutex */
    int64_t round;
    int closing;
    task_function function;
    void *argument;
    int64_t count;
    atomic_int_fast64_t next; /* next task to be taken */
    struct helper {
        thread_team *team;
        pthread_t thread;
        int32_t worker;
    } helpers[];
};

static void take_tasks(thread_team *team, int32_t worker) {
    for (;;) {
        int64_t task = atomic_fetch_add(&team->next, 1);
        if (task >= team->count) return;
        team->function(team->argument, task, worker);
    }
}

static void *helper_main(void *argument) {
    struct helper *self = argument;
    thread_team *team = self->team;
    int64_t round = 0;
    pthread_mutex_lock(&team->mutex);
    for (;;) {
        while (team->round == round && !team->closing) pthread_cond_wait(&team->started, &team->mutex);
        if (team->closing) break;
        round = team->round;
        pthread_mutex_unlock(&team->mutex);
        take_tasks(team, self->worker);
        pthread_mutex_lock(&team->mutex);
        if (atomic_fetch_sub(&team->busy, 1) == 1) pthread_cond_signal(&team->finished);
    }
    pthread_mutex_unlock(&team->mutex);
    return NULL;
}

/* Whether all helpers have finished before long. */
static int finished_soon(thread_team *team) {
    awake wait = stay_awake(FINISH_NS);
    int32_t ending;
    do
        for (int look = 0; look < LOOKS; look++) {
            if (!atomic_load_explicit(&team->busy, memory_order_acquire)) return 1;
            pause_core();
        }
    while (!glance(&wait, -1, &ending));
    return 0;
}

thread_team *team_open(int32_t num_threads) {
    thread_team *team = calloc(1, sizeof(thread_team) + sizeof(struct helper) * (size_t)(num_threads - 1));
    if (!team) return NULL;
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->started, NULL);
    pthread_cond_init(&team->finished, NULL);
    for (int32_t i = 0; i < num_threads - 1; i++) {
        struct helper *helper = &team->helpers[i];
        helper->team = team;
        helper->worker = i + 1;
        if (pthread_create(&helper->thread, NULL, helper_main, helper)) {
            team_close(team);
            return NULL;
        }
        team->num_helpers++;
    }
    return team;
}

void team_close(thread_team *team) {
    pthread_mutex_lock(&team->mutex);
    team->closing = 1;
    pthread_cond_broadcast(&team->started);
    pthread_mutex_unlock(&team->mutex);
    for (int32_t i = 0; i < team->num_helpers; i++) pthread_join(team->helpers[i].thread, NULL);
    pthread_cond_destroy(&team->finished);
    pthread_cond_destroy(&team->started);
    pthread_mutex_destroy(&team->mutex);
    free(team);
}

const atomic_int_fast64_t *team_next(const thread_team *team) { return &team->next; }

void team_run(thread_team *team, task_function function, void *argument, int64_t count) {
    if (team->num_helpers == 0 || count < 2) {
        for (int64_t task = 0; task < count; task++) {
            atomic_store_explicit(&team->next, task + 1, memory_order_relaxed);
            function(argument, task, 0);
        }
        return;
    }
    pthread_mutex_lock(&team->mutex);
    team->function = function;
    team->argument = argument;
    team->count = count;
    atomic_store(&team->next, 0);
    team->busy = team->num_helpers;
    team->round++;
    pthread_cond_broadcast(&team->started);
    pthread_mutex_unlock(&team->mutex);
    take_tasks(team, 0);
    if (finished_soon(team)) return;
    pthread_mutex_lock(&team->mutex);
    while (team->busy) pthread_cond_wait(&team->finished, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}
