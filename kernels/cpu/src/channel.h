/* One end of a connection: a pair of rings with doorbells, or a stream of frames. */
#ifndef INFINITE_LLM_CHANNEL_H
#define INFINITE_LLM_CHANNEL_H

#include <sys/socket.h>

#include "abi.h"
#include "ring.h"
#include "stream.h"

/* The next message that has come, which stays there until channel_release. */
static inline enum ring_state channel_peek(channel *c, ring_message *message) {
    return c->is_stream ? stream_peek(&c->stream, c->fd, c->max_message, message)
                        : ring_peek(&c->in, c->max_message, message);
}

static inline void channel_release(channel *c, const ring_message *message) {
    if (c->is_stream)
        stream_release(&c->stream, message);
    else
        ring_release(&c->in, message);
}

/* Room for a message, or NULL; end is for channel_publish. */
static inline char *channel_reserve(channel *c, uint64_t size, uint64_t *end) {
    if (size > c->max_message) return NULL;
    return c->is_stream ? stream_reserve(&c->stream, size) : ring_reserve(&c->out, size, end);
}

static inline void channel_publish(channel *c, char *message, uint64_t size, uint64_t end) {
    if (c->is_stream)
        stream_publish(&c->stream, c->fd, size);
    else if (ring_publish(&c->out, message, size, end))
        send(c->fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

#endif
