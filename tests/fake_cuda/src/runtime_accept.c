/* Functions of the CUDA runtime that need only exist and succeed. Without CUDA's headers, whose prototypes they lack. */
#include <stddef.h>

#define ACCEPT(name) int name() { return 0; }
ACCEPT(cudaDeviceSetGraphMemAttribute) ACCEPT(cudaGraphConditionalHandleCreate) ACCEPT(cudaGraphDestroy)
ACCEPT(cudaGraphExecDestroy) ACCEPT(cudaGraphRetainUserObject) ACCEPT(cudaIpcCloseMemHandle)
ACCEPT(cudaIpcGetEventHandle) ACCEPT(cudaIpcGetMemHandle) ACCEPT(cudaIpcOpenEventHandle)
ACCEPT(cudaIpcOpenMemHandle) ACCEPT(cudaMemPoolSetAccess) ACCEPT(cudaMemPoolSetAttribute) ACCEPT(cudaMemPoolTrimTo)
ACCEPT(cudaStreamUpdateCaptureDependencies) ACCEPT(cudaThreadExchangeStreamCaptureMode) ACCEPT(cudaUserObjectRelease)

#define HANDLE ((void *)8) /* never looked into */
int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = HANDLE; return 0; }
int cudaDeviceGetGraphMemAttribute(int device, int attribute, size_t *value) { *value = 0; return 0; }
int cudaGraphAddNode(void **node, void *graph) { *node = HANDLE; return 0; }
int cudaGraphNodeGetDependencies(void *node, void **on, void *edges, size_t *n) { *n = 0; return 0; }
int cudaMemPoolGetAttribute(void *pool, int attribute, size_t *value) { *value = 0; return 0; }
int cudaUserObjectCreate(void **object) { *object = HANDLE; return 0; }
