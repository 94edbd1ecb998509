/* Frames over a stream socket, as services/dataplane/tcp_frames.py describes them: the same layout, promise and distrust.
 * Nothing that has been received is held while compiled code reads on. */
#ifndef INFINITE_LLM_STREAM_H
#define INFINITE_LLM_STREAM_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include "abi.h"
#include "ring.h"

#define FRAME_HEADER 16 /* length, freed */
#define FRAME_LINE 64
#define FRAME_REPORT UINT64_MAX
#define SMALLEST_CHARGE 256
#define STREAM_READ (1 << 20) /* in one turn */

static inline uint64_t frame_bytes(uint64_t size) { return (size + FRAME_HEADER + FRAME_LINE - 1) & -(uint64_t)FRAME_LINE; }

static inline uint64_t charge_of(uint64_t size) { return size > SMALLEST_CHARGE ? size : SMALLEST_CHARGE; }

/* The message that has been received in full, behind any reports. */
static inline enum ring_state stream_parse(stream_view *stream, uint64_t max_message, ring_message *message) {
    uint64_t header[2];
    while (stream->filled - stream->at >= sizeof header) {
        const uint64_t have = stream->filled - stream->at;
        memcpy(header, stream->in + stream->at, sizeof header);
        const uint64_t size = header[0], freed = header[1];
        if (freed < stream->freed_by_peer || freed > stream->sent) return RING_BROKEN;
        if (size != FRAME_REPORT && size > max_message) return RING_BROKEN;
        stream->freed_by_peer = freed;
        if (size != FRAME_REPORT && have >= frame_bytes(size)) {
            *message = (ring_message){stream->in + stream->at + FRAME_HEADER, size, stream->at + frame_bytes(size)};
            return RING_MESSAGE;
        }
        if (size != FRAME_REPORT || have < FRAME_LINE) break;
        stream->at += FRAME_LINE;
    }
    return RING_EMPTY;
}

/* The next message, which stays there until stream_release. Takes from the socket once, and only if none is there. */
static inline enum ring_state stream_peek(stream_view *stream, int32_t fd, uint64_t max_message, ring_message *message) {
    enum ring_state state = stream_parse(stream, max_message, message);
    if (state != RING_EMPTY) return state;
    if (stream->at == stream->filled) stream->at = stream->filled = 0;
    if (stream->at && stream->capacity - stream->at < frame_bytes(max_message)) {
        memmove(stream->in, stream->in + stream->at, stream->filled - stream->at);
        stream->filled -= stream->at;
        stream->at = 0;
    }
    const uint64_t room = stream->capacity - stream->filled;
    const ssize_t got = recv(fd, stream->in + stream->filled, room < STREAM_READ ? room : STREAM_READ, MSG_DONTWAIT);
    if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR) ? RING_EMPTY : RING_BROKEN;
    stream->filled += (uint64_t)got;
    return stream_parse(stream, max_message, message);
}

static inline void stream_release(stream_view *stream, uint64_t end, uint64_t size) {
    stream->at = end;
    stream->freed += charge_of(size);
}

/* Room for a message that is to be sent, or NULL: what was sent before has not gone out, or the peer does not keep up. */
static inline char *stream_reserve(stream_view *stream, uint64_t size) {
    if (stream->unsent || stream->sent + charge_of(size) - stream->freed_by_peer > stream->most_outstanding) return NULL;
    return stream->out + FRAME_HEADER;
}

/* Sends what stream_reserve gave room for, as far as the kernel takes it. */
static inline void stream_publish(stream_view *stream, int32_t fd, uint64_t size) {
    const uint64_t header[2] = {size, stream->freed}, total = frame_bytes(size);
    memcpy(stream->out, header, sizeof header);
    memset(stream->out + FRAME_HEADER + size, 0, total - FRAME_HEADER - size);
    stream->reported = stream->freed;
    stream->sent += charge_of(size);
    const ssize_t sent = send(fd, stream->out, total, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) {
        stream->unsent_at = (uint64_t)sent;
        stream->unsent = total - (uint64_t)sent;
    } else if (errno == EAGAIN || errno == EINTR) {
        stream->unsent_at = 0;
        stream->unsent = total;
    } /* else hung up: the caller's next look says so, behind what has come before */
}

#endif
