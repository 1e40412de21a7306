/* What the two halves of the runtime know of each other. */
#ifndef FAKE_CUDA_RUNTIME_H
#define FAKE_CUDA_RUNTIME_H

#include <cuda_runtime_api.h>

cudaError_t fake_fail(cudaError_t error); /* leaves the error for cudaGetLastError and returns it */
int fake_tracing(void);                   /* whether calls are counted by name */

#endif
