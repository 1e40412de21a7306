/* The CUDA runtime, first half: counters, registration and launches of kernels, devices, errors. Nothing is computed. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <execinfo.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "runtime.h"

#define OK return cudaSuccess

/* ---- counters, read through ctypes by tests/fake_cuda/counters.py ---- */
typedef struct { char *name; long calls; } Count;
static Count counts[8192];
static int names;
static long launches, syncs;
static int tracing; /* 1: count by name, 2: also print where the host waits for the device */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void count_by_name(const char *name) {
  int i = 0;
  while (i < names && strcmp(counts[i].name, name)) i++;
  if (i == names) {
    if (names == sizeof counts / sizeof *counts) return;
    counts[names++].name = strdup(name);
  }
  counts[i].calls++;
}

void fake_count(const char *name, int kind) {
  pthread_mutex_lock(&lock);
  launches += kind == FAKE_LAUNCH;
  syncs += kind == FAKE_SYNC;
  if (tracing) count_by_name(name);
  pthread_mutex_unlock(&lock);
  if (kind == FAKE_SYNC && tracing > 1) {
    void *stack[40];
    fprintf(stderr, "fake CUDA: the host waits: %s\n", name);
    backtrace_symbols_fd(stack, backtrace(stack, 40), 2);
  }
}

int fake_tracing(void) { return tracing; }
void fake_trace(int level) { tracing = level; }
long fake_launches(void) { return launches; }
long fake_syncs(void) { return syncs; }
void fake_reset(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < names; i++) counts[i].calls = 0;
  launches = syncs = 0;
  pthread_mutex_unlock(&lock);
}
void fake_dump(const char *path) {
  FILE *file = fopen(path, "w");
  if (!file) return;
  for (int i = 0; i < names; i++)
    if (counts[i].calls) fprintf(file, "%ld\t%s\n", counts[i].calls, counts[i].name);
  fclose(file);
}

/* ---- registration: which name belongs to the host's address of a kernel ---- */
typedef struct { const void *host; const char *name; } Kernel;
static Kernel *kernels;
static int registered, room, sorted;

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external, size_t size,
                       int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *thread,
                            uint3 *block, dim3 *blocks, dim3 *grid, int *warp) {
  pthread_mutex_lock(&lock);
  if (registered == room) kernels = realloc(kernels, (room = room ? 2 * room : 65536) * sizeof *kernels);
  kernels[registered++] = (Kernel){host, name};
  sorted = 0;
  pthread_mutex_unlock(&lock);
}

static int by_address(const void *a, const void *b) {
  const void *x = ((const Kernel *)a)->host, *y = ((const Kernel *)b)->host;
  return x < y ? -1 : x > y;
}
static const char *name_of(const void *host) {
  pthread_mutex_lock(&lock);
  if (!sorted) qsort(kernels, registered, sizeof *kernels, by_address);
  sorted = 1;
  Kernel key = {host, NULL}, *found = bsearch(&key, kernels, registered, sizeof *kernels, by_address);
  pthread_mutex_unlock(&lock);
  return found ? found->name : "a kernel that was not registered";
}

/* ---- launches ---- */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  OK;
}
static cudaError_t launched(const void *kernel, dim3 grid, dim3 block) {
  const char *name = name_of(kernel);
  fake_count(name, FAKE_LAUNCH);
  if (launch_fits(grid.x, grid.y, grid.z, block.x * block.y * block.z)) OK;
  fprintf(stderr, "fake CUDA: %s launched on a grid of %u x %u x %u, blocks of %u x %u x %u\n", name, grid.x, grid.y,
          grid.z, block.x, block.y, block.z);
  return fake_fail(cudaErrorInvalidConfiguration);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  return launched(kernel, grid, block);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  return launched(kernel, grid, block);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  return launched(kernel, config->gridDim, config->blockDim);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) { function(argument); OK; }

/* ---- kernels' attributes ---- */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  OK;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) { OK; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  OK;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
  *kernel = (cudaKernel_t)8;
  OK;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *a, void **b, unsigned c,
                                enum cudaLibraryOption *d, void **e, unsigned f) {
  *library = (cudaLibrary_t)8;
  OK;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t library) { OK; }

/* ---- devices ---- */
static __thread int current_device;

static int number_from(const char *variable, int otherwise) {
  const char *value = getenv(variable);
  return value ? atoi(value) : otherwise;
}
cudaError_t cudaGetDeviceCount(int *count) { *count = number_from("FAKE_CUDA_DEVICES", 1); OK; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; OK; }
cudaError_t cudaSetDevice(int device) { current_device = device; OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; OK; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { OK; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:%02d:00.0", device + 1);
  OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; OK; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = device_attribute((int)attribute);
  OK;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (fake)");
  p->totalGlobalMem = 80ull << 30;
  p->sharedMemPerBlock = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->sharedMemPerBlockOptin = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  p->sharedMemPerMultiprocessor = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->warpSize = p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = device_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->maxThreadsPerMultiProcessor = 2048;
  p->l2CacheSize = device_attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->memoryBusWidth = device_attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  OK;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { *address = calloc(1, 4096); OK; }
cudaError_t cudaProfilerStart(void) { OK; }
cudaError_t cudaProfilerStop(void) { OK; }

static int accepted(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = (void *)accepted;
  if (result) *result = cudaDriverEntryPointSuccess;
  OK;
}

/* ---- errors: as in CUDA, one stays until it is asked for ---- */
static __thread cudaError_t last_error;

cudaError_t fake_fail(cudaError_t error) { return last_error = error; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "fakeCudaError" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : error                                    ? "an error of the stand-in CUDA runtime"
                                                    : "no error";
}
