/* One end of a connection: a pair of rings with doorbells, or a stream of frames. Over an emulated link every message
 * carries a stamp, and is not there before it is due. */
#ifndef INFINITE_LLM_CHANNEL_H
#define INFINITE_LLM_CHANNEL_H

#include <sys/socket.h>

#include "abi.h"
#include "awake.h"
#include "ring.h"
#include "stream.h"

#define STAMP 64 /* a mark, the time it was sent at, nothing */
#define STAMP_MARK "IFLLMLK1"

static inline uint64_t stamp_bytes(const channel *c) { return c->link ? STAMP : 0; }

static inline double now_s(void) { return 1e-9 * (double)now_ns(); }

/* Takes the stamp off a message that is due. */
static inline enum ring_state channel_unstamp(channel *c, ring_message *message) {
    const emulated_link *link = c->link;
    double sent_at;
    if (message->size < STAMP || memcmp(message->data, STAMP_MARK, 8)) return RING_BROKEN;
    memcpy(&sent_at, message->data + 8, sizeof sent_at);
    const double now = now_s();
    if (!(sent_at < now)) sent_at = now;
    message->data += STAMP;
    message->size -= STAMP;
    c->left_at = (sent_at > link->free_at ? sent_at : link->free_at) + (double)message->size / link->bytes_per_s;
    return now < c->left_at + link->latency_s ? RING_EMPTY : RING_MESSAGE;
}

/* The next message that has come, which stays there until channel_release. */
static inline enum ring_state channel_peek(channel *c, ring_message *message) {
    const enum ring_state state = c->is_stream ? stream_peek(&c->stream, c->fd, c->max_message, message)
                                               : ring_peek(&c->in, c->max_message, message);
    return state == RING_MESSAGE && c->link ? channel_unstamp(c, message) : state;
}

static inline void channel_release(channel *c, const ring_message *message) {
    if (c->link) c->link->free_at = c->left_at;
    if (c->is_stream)
        stream_release(&c->stream, message->end, message->size + stamp_bytes(c));
    else
        ring_release(&c->in, message->end);
}

/* Room for a message, or NULL; end is for channel_publish. */
static inline char *channel_reserve(channel *c, uint64_t size, uint64_t *end) {
    size += stamp_bytes(c);
    if (size > c->max_message) return NULL;
    char *room = c->is_stream ? stream_reserve(&c->stream, size) : ring_reserve(&c->out, size, end);
    return room ? room + stamp_bytes(c) : NULL;
}

static inline void channel_publish(channel *c, char *message, uint64_t size, uint64_t end) {
    if (c->link) {
        const double now = now_s();
        message -= STAMP;
        size += STAMP;
        memset(message, 0, STAMP);
        memcpy(message, STAMP_MARK, 8);
        memcpy(message + 8, &now, sizeof now);
    }
    if (c->is_stream)
        stream_publish(&c->stream, c->fd, size);
    else if (ring_publish(&c->out, message, size, end))
        send(c->fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

#endif
