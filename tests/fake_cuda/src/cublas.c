/* cuBLAS and cuBLASLt: every product is counted, and none computed. */
#include <stdlib.h>

#include "device.h"

#define OK return 0

static int handle(void **made) { *made = calloc(1, 64); OK; }

#define ACCEPT(name) int name() { OK; }
#define PRODUCT(name) int name() { fake_count(#name, FAKE_LAUNCH); OK; }

int cublasCreate_v2(void **made) { return handle(made); }
int cublasGetMathMode(void *of, int *mode) { *mode = 0; OK; }
int cublasGetPointerMode_v2(void *of, int *mode) { *mode = 0; OK; }
ACCEPT(cublasDestroy_v2) ACCEPT(cublasSetMathMode) ACCEPT(cublasSetPointerMode_v2) ACCEPT(cublasSetSmCountTarget)
ACCEPT(cublasSetStream_v2) ACCEPT(cublasSetWorkspace_v2)
PRODUCT(cublasDdot_v2) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx) PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSdot_v2)
PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemv_v2)

size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **made) { return handle(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatrixLayoutCreate(void **made) { return handle(made); }
int cublasLtMatmulAlgoGetHeuristic(void *of, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  *found = 1;
  OK;
}
ACCEPT(cublasLtMatmulAlgoCheck) ACCEPT(cublasLtMatmulAlgoConfigGetAttribute)
ACCEPT(cublasLtMatmulAlgoConfigSetAttribute) ACCEPT(cublasLtMatmulAlgoInit) ACCEPT(cublasLtMatmulDescDestroy)
ACCEPT(cublasLtMatmulDescSetAttribute) ACCEPT(cublasLtMatmulPreferenceDestroy)
ACCEPT(cublasLtMatmulPreferenceSetAttribute) ACCEPT(cublasLtMatrixLayoutDestroy)
ACCEPT(cublasLtMatrixLayoutSetAttribute)
PRODUCT(cublasLtMatmul)
