// Streams, events, and captures of graphs. Work ends at once, unless events are held: then
// an event, and its stream's work up to it, is pending until somebody waits for it. A
// captured graph is a count of what was captured: no kernel computes anything here.

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

// A capture under way, and later its graph.
typedef struct {
  uint64_t id, nodes;
  int is_invalid;
} Capture;

struct Stream {
  uint64_t given, done; // numbers of events recorded, and of those that are over
  Capture *capture; // that it takes part in, or NULL
  int priority, ordinal;
  Wait *waits;
  size_t wait_count;
  Stream *next; // all streams; one is kept for good, since events may outlive its handle
};

typedef struct {
  Stream *stream; // where it was recorded last, or NULL
  uint64_t number;
  Capture *capture; // that this was part of, or NULL
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

// -- captures --------------------------------------------------------------------------

static uint64_t last_capture;

// What nothing may ask for or wait for while it is captured. Mutex held.
static cudaError_t refused(Capture *capture, cudaError_t error) {
  if (!capture) return cudaSuccess;
  capture->is_invalid = 1;
  return error;
}

// Count work on a stream that is being captured; it fails where the capture has.
cudaError_t host_capture_work(cudaStream_t handle) {
  pthread_mutex_lock(&mutex);
  Capture *capture = stream_of(handle)->capture;
  cudaError_t error = cudaSuccess;
  if (capture && capture->is_invalid) error = cudaErrorStreamCaptureInvalidated;
  else if (capture) capture->nodes++;
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle,
                                          UNUSED enum cudaStreamCaptureMode mode) {
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  cudaError_t error = refused(stream->capture, cudaErrorIllegalState);
  if (!error) {
    stream->capture = calloc(1, sizeof(Capture));
    stream->capture->id = ++last_capture;
  }
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *out) {
  pthread_mutex_lock(&mutex);
  Capture *capture = stream_of(handle)->capture;
  for (Stream *each = streams; each; each = each->next)
    if (each->capture == capture) each->capture = NULL;
  int failed = !capture || capture->is_invalid;
  *out = failed ? NULL : (cudaGraph_t)capture;
  pthread_mutex_unlock(&mutex);
  return failed ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

static void capture_info(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                         unsigned long long *id, cudaGraph_t *graph,
                         const cudaGraphNode_t **nodes, size_t *count) {
  pthread_mutex_lock(&mutex);
  Capture *capture = stream_of(handle)->capture;
  *status = !capture              ? cudaStreamCaptureStatusNone
            : capture->is_invalid ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = (cudaGraph_t)capture;
  if (nodes) *nodes = NULL;
  if (count) *count = 0;
  pthread_mutex_unlock(&mutex);
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle,
                                         enum cudaStreamCaptureStatus *out) {
  capture_info(handle, out, NULL, NULL, NULL, NULL);
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(
    UNUSED enum cudaStreamCaptureMode *mode) {
  return cudaSuccess;
}

// CUDA 13 has the form with edges under the name that had none before.
#if CUDART_VERSION < 13000
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes, size_t *count) {
  capture_info(handle, status, id, graph, nodes, count);
  return cudaSuccess;
}
#else
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
  capture_info(handle, status, id, graph, nodes, count);
  if (edges) *edges = NULL;
  return cudaSuccess;
}
#endif

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, UNUSED cudaGraphNode_t *nodes,
                                     size_t *count) {
  *count = ((Capture *)graph)->nodes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                                 UNUSED unsigned long long flags) {
  *out = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(UNUSED cudaGraphExec_t graph, cudaStream_t stream) {
  return host_capture_work(stream);
}

EXPORT cudaError_t cudaGraphDestroy(UNUSED cudaGraph_t graph) { return cudaSuccess; }

EXPORT cudaError_t cudaGraphExecDestroy(UNUSED cudaGraphExec_t graph) { return cudaSuccess; }

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
  cudaError_t error = refused(stream->capture, cudaErrorStreamCaptureUnsupported);
  if (!error) error = state_of(stream, stream->given);
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  cudaError_t error = refused(stream->capture, cudaErrorStreamCaptureUnsupported);
  if (!error) finish(stream, stream->given);
  pthread_mutex_unlock(&mutex);
  return host_error(error);
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
  int ordinal = host_current_device();
  pthread_mutex_lock(&mutex);
  cudaError_t error = cudaSuccess;
  finish(&default_streams[ordinal], default_streams[ordinal].given);
  for (Stream *each = streams; each; each = each->next) {
    if (each->ordinal != ordinal) continue;
    if (refused(each->capture, cudaErrorStreamCaptureUnsupported))
      error = cudaErrorStreamCaptureUnsupported;
    else
      finish(each, each->given);
  }
  pthread_mutex_unlock(&mutex);
  return host_error(error);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle,
                                       UNUSED unsigned flags) {
  Event *event = (Event *)event_handle;
  pthread_mutex_lock(&mutex);
  Stream *stream = stream_of(handle);
  if (event->capture && !stream->capture) stream->capture = event->capture;
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
  event->capture = event->stream->capture;
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
  cudaError_t error = refused(event->capture, cudaErrorCapturedEvent);
  if (!error) error = state_of(event->stream, event->number);
  pthread_mutex_unlock(&mutex);
  return error;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  pthread_mutex_lock(&mutex);
  cudaError_t error = refused(event->capture, cudaErrorCapturedEvent);
  if (!error && event->stream) finish(event->stream, event->number);
  pthread_mutex_unlock(&mutex);
  return host_error(error);
}

EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, UNUSED cudaEvent_t start,
                                        UNUSED cudaEvent_t end) {
  *milliseconds = 0.001F; // no work takes any time here
  return cudaSuccess;
}
