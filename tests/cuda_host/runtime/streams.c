// Streams and events. Work ends at once, unless events are held: then an event, and its
// stream's work up to it, is pending until somebody waits for it.

#include "host.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct Stream Stream;

// That a stream waits for what another had been given up to a moment.
typedef struct {
  Stream *on;
  uint64_t up_to;
} Wait;

struct Stream {
  uint64_t given, done; // numbers of events recorded, and of those that are over
  int priority, ordinal;
  Wait *waits;
  size_t wait_count;
  Stream *next; // all streams; one is kept for good, since events may outlive its handle
};

typedef struct {
  Stream *stream; // where it was recorded last, or NULL
  uint64_t number;
} Event;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Stream default_streams[MAX_DEVICES];
static Stream *streams;
static int holds_events = -1; // not asked yet
static uint64_t last_handle = 0x7000;

void *host_new_handle(void) {
  return (void *)__atomic_add_fetch(&last_handle, 16, __ATOMIC_RELAXED);
}

// Hold events from now on (1) or let all of them end (0).
EXPORT void cuda_host_hold_events(int hold) {
  pthread_mutex_lock(&mutex);
  holds_events = hold;
  pthread_mutex_unlock(&mutex);
}

static int holding(void) { // mutex held
  if (holds_events < 0) {
    const char *text = getenv("CUDA_HOST_EVENTS");
    holds_events = text && !strcmp(text, "held");
  }
  return holds_events;
}

// NULL and the two reserved handles are the device's default stream. Source: CUDA Runtime
// API, "Stream synchronization behavior": cudaStreamLegacy 0x1, cudaStreamPerThread 0x2.
static Stream *stream_of(cudaStream_t handle) {
  return (uintptr_t)handle <= 2 ? &default_streams[host_current_device()] : (Stream *)handle;
}

// The stream's work up to a moment is over, and with it what it had waited for.
static void finish(Stream *stream, uint64_t up_to) {
  if (stream->done >= up_to) return;
  stream->done = up_to;
  for (size_t i = 0; i < stream->wait_count; i++)
    finish(stream->waits[i].on, stream->waits[i].up_to);
}

static cudaError_t state_of(Stream *stream, uint64_t up_to) {
  return stream && holding() && stream->done < up_to ? cudaErrorNotReady : cudaSuccess;
}

// -- streams ---------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, UNUSED unsigned flags,
                                                int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->priority = priority;
  stream->ordinal = host_current_device();
  pthread_mutex_lock(&mutex);
  stream->next = streams;
  streams = stream;
  pthread_mutex_unlock(&mutex);
  *out = (cudaStream_t)stream;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *out) {
  return cudaStreamCreateWithPriority(out, 0, 0);
}

EXPORT cudaError_t cudaStreamDestroy(UNUSED cudaStream_t handle) { return cudaSuccess; }

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *out) {
  *out = stream_of(handle)->priority;
  return cudaSuccess;
}

// Source: "0 is the least, -5 the greatest" on cards from compute capability 7.0 on.
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  cudaError_t error = state_of(stream, stream->given);
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  finish(stream, stream->given);
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
  int ordinal = host_current_device();
  pthread_mutex_lock(&mutex);
  finish(&default_streams[ordinal], default_streams[ordinal].given);
  for (Stream *each = streams; each; each = each->next)
    if (each->ordinal == ordinal) finish(each, each->given);
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle,
                                       UNUSED unsigned flags) {
  Event *event = (Event *)event_handle;
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  if (event->stream && event->stream != stream && holding()) {
    stream->waits = realloc(stream->waits, (stream->wait_count + 1) * sizeof(Wait));
    stream->waits[stream->wait_count++] = (Wait){event->stream, event->number};
    stream->given++; // a wait is work, too
  }
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t call,
                                         void *argument, UNUSED unsigned flags) {
  call(handle, cudaSuccess, argument);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(UNUSED cudaStream_t handle, cudaHostFn_t call,
                                      void *argument) {
  call(argument);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(UNUSED cudaStream_t handle,
                                         enum cudaStreamCaptureStatus *out) {
  *out = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(
    UNUSED enum cudaStreamCaptureMode *mode) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(UNUSED cudaStream_t handle,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (graph) *graph = NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

// -- events ----------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, UNUSED unsigned flags) {
  *out = calloc(1, sizeof(Event));
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  free(handle);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle,
                                            UNUSED unsigned flags) {
  Event *event = (Event *)handle;
  pthread_mutex_lock(&mutex);
  event->stream = stream_of(stream_handle);
  event->number = ++event->stream->given;
  if (!holding()) finish(event->stream, event->number);
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  pthread_mutex_lock(&mutex);
  cudaError_t error = state_of(event->stream, event->number);
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  pthread_mutex_lock(&mutex);
  if (event->stream) finish(event->stream, event->number);
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, UNUSED cudaEvent_t start,
                                        UNUSED cudaEvent_t end) {
  *milliseconds = 0.001F; // no work takes any time here
  return cudaSuccess;
}
