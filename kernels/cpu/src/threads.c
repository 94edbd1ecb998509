#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "awake.h"

/* So long helpers look out for the next round, and the caller for the end of one, before they sleep: to be woken takes as
 * long. The layers of a step follow closer upon each other. */
#define LOOK_OUT_NS 50000

/* A round is one call of team_run by whoever has locked in_use. Helpers read what it is about when they have seen its
 * number, and the next one begins when all of them have finished. */
struct thread_team {
    thread_team *other; /* of the process */
    int32_t num_threads, num_helpers, users;
    pthread_mutex_t in_use;
    pthread_mutex_t mutex; /* of both conditions */
    pthread_cond_t started, finished;
    atomic_int_fast64_t round;
    atomic_int closing;
    atomic_int busy; /* helpers that have not finished the round */
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

static pthread_mutex_t teams_mutex = PTHREAD_MUTEX_INITIALIZER;
static thread_team *teams;

static void take_tasks(thread_team *team, int32_t worker) {
    for (;;) {
        int64_t task = atomic_fetch_add(&team->next, 1);
        if (task >= team->count) return;
        team->function(team->argument, task, worker);
    }
}

static int has_begun(thread_team *team, int64_t last_round) {
    return atomic_load_explicit(&team->round, memory_order_acquire) != last_round || atomic_load(&team->closing);
}

static int has_finished(thread_team *team, int64_t unused) {
    (void)unused;
    return !atomic_load_explicit(&team->busy, memory_order_acquire);
}

/* Whether it happens before long. */
static int happens_soon(int (*has_happened)(thread_team *, int64_t), thread_team *team, int64_t round) {
    awake wait = stay_awake(LOOK_OUT_NS);
    int32_t ending;
    do
        for (int look = 0; look < LOOKS; look++) {
            if (has_happened(team, round)) return 1;
            pause_core();
        }
    while (!glance(&wait, -1, &ending));
    return 0;
}

/* Returns when it has happened. */
static void await(
    int (*has_happened)(thread_team *, int64_t), thread_team *team, int64_t round, pthread_cond_t *condition
) {
    if (happens_soon(has_happened, team, round)) return;
    pthread_mutex_lock(&team->mutex);
    while (!has_happened(team, round)) pthread_cond_wait(condition, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

/* Wakes those that have not seen it: no less than all that check it under the mutex. */
static void tell(thread_team *team, pthread_cond_t *condition) {
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(&team->mutex);
}

static void *helper_main(void *argument) {
    struct helper *self = argument;
    thread_team *team = self->team;
    for (int64_t round = 0;; round++) {
        await(has_begun, team, round, &team->started);
        if (atomic_load(&team->closing)) return NULL;
        take_tasks(team, self->worker);
        if (atomic_fetch_sub(&team->busy, 1) == 1) tell(team, &team->finished);
    }
}

static void team_free(thread_team *team) {
    atomic_store(&team->closing, 1);
    tell(team, &team->started);
    for (int32_t i = 0; i < team->num_helpers; i++) pthread_join(team->helpers[i].thread, NULL);
    pthread_cond_destroy(&team->finished);
    pthread_cond_destroy(&team->started);
    pthread_mutex_destroy(&team->mutex);
    pthread_mutex_destroy(&team->in_use);
    free(team);
}

static thread_team *team_make(int32_t num_threads) {
    thread_team *team = calloc(1, sizeof(thread_team) + sizeof(struct helper) * (size_t)(num_threads - 1));
    if (!team) return NULL;
    team->num_threads = num_threads;
    pthread_mutex_init(&team->in_use, NULL);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->started, NULL);
    pthread_cond_init(&team->finished, NULL);
    for (int32_t i = 0; i < num_threads - 1; i++) {
        struct helper *helper = &team->helpers[i];
        helper->team = team;
        helper->worker = i + 1;
        if (pthread_create(&helper->thread, NULL, helper_main, helper)) {
            team_free(team);
            return NULL;
        }
        team->num_helpers++;
    }
    return team;
}

thread_team *team_open(int32_t num_threads) {
    pthread_mutex_lock(&teams_mutex);
    thread_team *team = teams;
    while (team && team->num_threads != num_threads) team = team->other;
    if (!team && (team = team_make(num_threads))) {
        team->other = teams;
        teams = team;
    }
    if (team) team->users++;
    pthread_mutex_unlock(&teams_mutex);
    return team;
}

void team_close(thread_team *team) {
    pthread_mutex_lock(&teams_mutex);
    if (--team->users == 0) {
        thread_team **link = &teams;
        while (*link != team) link = &(*link)->other;
        *link = team->other;
        team_free(team);
    }
    pthread_mutex_unlock(&teams_mutex);
}

const atomic_int_fast64_t *team_next(const thread_team *team) { return &team->next; }

void team_run(thread_team *team, task_function function, void *argument, int64_t count) {
    if (team->num_helpers == 0 || count < 2 || pthread_mutex_trylock(&team->in_use)) {
        for (int64_t task = 0; task < count; task++) {
            if (team->num_helpers == 0) atomic_store_explicit(&team->next, task + 1, memory_order_relaxed);
            function(argument, task, 0);
        }
        return;
    }
    team->function = function;
    team->argument = argument;
    team->count = count;
    atomic_store(&team->next, 0);
    atomic_store(&team->busy, team->num_helpers);
    atomic_fetch_add_explicit(&team->round, 1, memory_order_release);
    tell(team, &team->started);
    take_tasks(team, 0);
    await(has_finished, team, 0, &team->finished);
    pthread_mutex_unlock(&team->in_use);
}
