/* libcuda.so.1: the part of the CUDA driver that Triton and PyTorch ask for directly. No kernel is run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

#define OK return CUDA_SUCCESS
#define HANDLE(type) ((type)8) /* never looked into */

static CUresult launched(const char *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned threads) {
  if (fake_count) fake_count(kernel, FAKE_LAUNCH);
  if (launch_fits(gx, gy, gz, threads)) OK;
  fprintf(stderr, "fake CUDA: %s launched on a grid of %u x %u x %u, %u threads\n", kernel, gx, gy, gz, threads);
  return CUDA_ERROR_INVALID_VALUE;
}

/* ---- device and context ---- */
CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; OK; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; OK; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) { snprintf(name, length, "fake H100"); OK; }
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { memset(uuid, 7, sizeof *uuid); OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = device_attribute(attribute);
  OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = HANDLE(CUcontext); OK; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0; *active = 1; OK; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = HANDLE(CUcontext); OK; }
CUresult cuCtxSetCurrent(CUcontext context) { OK; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
CUresult cuGetErrorString(CUresult result, const char **text) { *text = "an error of the stand-in driver"; OK; }
CUresult cuGetErrorName(CUresult result, const char **text) { *text = "FAKE_ERROR"; OK; }

/* ---- modules and kernels: a function is its own name ---- */
CUresult cuModuleLoad(CUmodule *module, const char *path) { *module = HANDLE(CUmodule); OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = HANDLE(CUmodule); OK; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
  *module = HANDLE(CUmodule);
  OK;
}
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  char *kernel = malloc(strlen(name) + sizeof "triton:");
  sprintf(kernel, "triton:%s", name);
  *function = (CUfunction)kernel;
  OK;
}
CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) { *function = (CUfunction)kernel; OK; }
CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *a, void **b, unsigned c,
                           CUlibraryOption *d, void **e, unsigned f) {
  *library = HANDLE(CUlibrary);
  OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 64
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  return launched((const char *)function, c->gridDimX, c->gridDimY, c->gridDimZ,
                  c->blockDimX * c->blockDimY * c->blockDimZ);
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  return launched((const char *)function, gx, gy, gz, bx * by * bz);
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) { *n = 1; OK; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int threads, size_t shared) {
  *n = 2;
  OK;
}

/* ---- memory and streams ---- */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr *)value = pointer;
  else
    *(int *)value = CU_MEMORYTYPE_DEVICE;
  OK;
}
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
  if (base) *base = pointer;
  if (size) *size = 1 << 20;
  OK;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  OK;
}

/* ---- everything that is asked for by name ---- */
static int accepted(void) { return 0; }
CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *result) {
  *function = (void *)accepted;
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  OK;
}
