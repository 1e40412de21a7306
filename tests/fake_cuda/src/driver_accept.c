/* Functions of the CUDA driver that need only exist and succeed. Without CUDA's headers, whose prototypes they lack. */
#define ACCEPT(name) int name() { return 0; }
ACCEPT(cuCtxFromGreenCtx) ACCEPT(cuCtxPopCurrent) ACCEPT(cuCtxPushCurrent) ACCEPT(cuDeviceGetDevResource)
ACCEPT(cuFuncLoad) ACCEPT(cuGreenCtxCreate) ACCEPT(cuGreenCtxDestroy) ACCEPT(cuGreenCtxStreamCreate)
ACCEPT(cuLaunchCooperativeKernel) ACCEPT(cuLibraryUnload) ACCEPT(cuLinkAddData_v2) ACCEPT(cuMemAddressFree)
ACCEPT(cuMemAddressReserve) ACCEPT(cuMemCreate) ACCEPT(cuMemExportToShareableHandle)
ACCEPT(cuMemGetAllocationGranularity) ACCEPT(cuMemGetAllocationPropertiesFromHandle)
ACCEPT(cuMemHostGetDevicePointer_v2) ACCEPT(cuMemImportFromShareableHandle) ACCEPT(cuMemMap) ACCEPT(cuMemRelease)
ACCEPT(cuMemRetainAllocationHandle) ACCEPT(cuMemSetAccess) ACCEPT(cuMemUnmap) ACCEPT(cuMemcpyHtoDAsync_v2)
ACCEPT(cuMemsetD32Async) ACCEPT(cuMulticastAddDevice) ACCEPT(cuMulticastBindMem) ACCEPT(cuMulticastCreate)
ACCEPT(cuMulticastUnbind) ACCEPT(cuStreamWriteValue32) ACCEPT(cuTensorMapEncodeTiled)
ACCEPT(cuDeviceGetUuid) ACCEPT(cuMemGetAddressRange) /* the old ones, beside those of driver.c */

int cuStreamGetCaptureInfo_v3(void *stream, int *status) { *status = 0; return 0; }
int cuStreamGetCaptureInfo_v2(void *stream, int *status) { *status = 0; return 0; }
