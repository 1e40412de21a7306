/* The CUDA runtime, second half: memory, streams, events and graphs. Memory is the host's, copies are made at once. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "device.h"
#include "runtime.h"

#define OK return cudaSuccess

/* ---- which memory is whose ---- */
enum { REGISTERED = 1, DEVICE, PINNED };
typedef struct { char *start; size_t size; int kind; } Range;
static Range ranges[65536];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(void *start, size_t size, int kind) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < used && ranges[i].start) i++;
  if (i == sizeof ranges / sizeof *ranges) abort();
  if (i == used) used++;
  ranges[i] = (Range){start, size, kind};
  pthread_mutex_unlock(&lock);
}
static size_t forget(void *start, int kind) { /* its size, 0 where it was not known */
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used && !size; i++)
    if (ranges[i].start == start && ranges[i].kind == kind) {
      size = ranges[i].size;
      ranges[i].start = NULL;
    }
  pthread_mutex_unlock(&lock);
  return size;
}
static int kind_of(const char *pointer) { /* 0 where it is ordinary memory of the host */
  int kind = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used && !kind; i++)
    if (ranges[i].start && pointer >= ranges[i].start && pointer < ranges[i].start + ranges[i].size)
      kind = ranges[i].kind;
  pthread_mutex_unlock(&lock);
  return kind;
}

static cudaError_t allocate(void **made, size_t size, int kind) { /* zeros, which take no memory until written */
  void *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return fake_fail(cudaErrorMemoryAllocation);
  remember(*made = memory, size, kind);
  OK;
}
static cudaError_t release(void *memory, int kind) {
  size_t size = forget(memory, kind);
  if (size) munmap(memory, size);
  OK;
}
cudaError_t cudaMalloc(void **made, size_t size) { return allocate(made, size, DEVICE); }
cudaError_t cudaMallocAsync(void **made, size_t size, cudaStream_t stream) { return allocate(made, size, DEVICE); }
cudaError_t cudaFree(void *memory) { return release(memory, DEVICE); }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { return release(memory, DEVICE); }
cudaError_t cudaHostAlloc(void **made, size_t size, unsigned flags) {
  fake_count("cudaHostAlloc", FAKE_EVENT);
  return allocate(made, size, PINNED);
}
cudaError_t cudaFreeHost(void *memory) { return release(memory, PINNED); }
cudaError_t cudaHostRegister(void *memory, size_t size, unsigned flags) {
  fake_count("cudaHostRegister", FAKE_EVENT);
  if (getenv("FAKE_CUDA_REFUSE_PIN")) return fake_fail(cudaErrorNotSupported);
  remember(memory, size, REGISTERED);
  OK;
}
cudaError_t cudaHostUnregister(void *memory) {
  if (!forget(memory, REGISTERED)) return fake_fail(cudaErrorHostMemoryNotRegistered);
  OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  int kind = kind_of(pointer);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = kind == DEVICE ? cudaMemoryTypeDevice : kind ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (kind) attributes->devicePointer = attributes->hostPointer = (void *)pointer;
  OK;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = 78ull << 30; *total = 79ull << 30; OK; }

/* ---- streams: all work is done when it is asked for, so waiting never takes time ---- */
static long streams = 16;
static int capturing;
static unsigned long long captures;
static cudaStream_t captured;

static cudaError_t host_waits(const char *name) {
  fake_count(name, FAKE_SYNC);
  return capturing ? fake_fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return host_waits("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return host_waits("cudaStreamSynchronize"); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = (cudaStream_t)(streams += 16); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; OK; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  fake_count("cudaStreamWaitEvent", FAKE_EVENT);
  OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *argument, unsigned flags) {
  function(stream, cudaSuccess, argument);
  OK;
}

/* ---- copies ---- */
static void count_copy(const void *to, const void *from, size_t size, enum cudaMemcpyKind kind, const char *how) {
  static const char *const directions[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
  if (!fake_tracing()) return;
  const void *host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : NULL;
  const char *pages = !host ? "" : kind_of(host) ? " pinned" : " pageable";
  char name[100];
  snprintf(name, sizeof name, "copy %s%s%s %s", directions[kind], pages, how, size > 65536 ? "large" : "small");
  fake_count(name, FAKE_EVENT);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  count_copy(to, from, size, kind, "");
  memcpy(to, from, size);
  return host_waits("cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  count_copy(to, from, size, kind, " async");
  memcpy(to, from, size);
  OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int s, size_t size, cudaStream_t stream) {
  memcpy(to, from, size);
  OK;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
  OK;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) { memset(memory, value, size); OK; }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
  fake_count("cudaMemsetAsync", FAKE_LAUNCH);
  memset(memory, value, size);
  OK;
}

/* ---- events: they know the time when they were recorded ---- */
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = calloc(1, sizeof(struct timespec)); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
  OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  struct timespec *a = (struct timespec *)start, *b = (struct timespec *)end;
  *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
  if (*milliseconds <= 0) *milliseconds = 1e-3f;
  OK;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { /* waits for one copy or step, not for all that was asked for */
  const char *delay = getenv("FAKE_CUDA_EVENT_MS");
  fake_count("cudaEventSynchronize", FAKE_EVENT);
  if (delay) usleep(1000 * atoi(delay));
  OK;
}

/* ---- graphs: nothing is captured, and one launch stands for all ---- */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = 1;
  captures++;
  captured = stream;
  fake_count("cudaStreamBeginCapture", FAKE_EVENT);
  OK;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *nodes,
                                          const cudaGraphEdgeData *edges, size_t n, enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  capturing = 0;
  *graph = calloc(1, 64);
  OK;
}
static enum cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  return capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capture_status(stream);
  OK;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *n) {
  if (edges) *edges = NULL;
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                        unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                        size_t *n) {
#endif
  *status = capture_status(stream);
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)8;
  if (nodes) *nodes = NULL;
  if (n) *n = 0;
  OK;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { *n = 100; OK; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  *made = calloc(1, 64);
  OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  fake_count("cudaGraphLaunch", FAKE_LAUNCH);
  OK;
}
