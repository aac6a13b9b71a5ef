// Kernels, modules and cuBLAS: accepted, never run.

#include "host.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// -- what the compiler registers before main -------------------------------------------

typedef struct {
  const void *host; // the variable's shadow, by which the program knows it
  void *device;
  size_t bytes;
} Variable;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Variable *variables;
static size_t variable_count, variable_room;

EXPORT void **__cudaRegisterFatBinary(UNUSED void *binary) { return calloc(1, sizeof(void *)); }
EXPORT void __cudaRegisterFatBinaryEnd(UNUSED void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) { free(handle); }
EXPORT char __cudaInitModule(UNUSED void **handle) { return 1; }

EXPORT void __cudaRegisterFunction(UNUSED void **handle, UNUSED const char *host,
                                   UNUSED char *device, UNUSED const char *name,
                                   UNUSED int threads, UNUSED uint3 *thread,
                                   UNUSED uint3 *block, UNUSED dim3 *block_size,
                                   UNUSED dim3 *grid_size, UNUSED int *warp_size) {}

EXPORT void __cudaRegisterVar(UNUSED void **handle, char *host, UNUSED char *address,
                              UNUSED const char *name, UNUSED int external, size_t bytes,
                              UNUSED int is_constant, UNUSED int is_global) {
  pthread_mutex_lock(&mutex);
  if (variable_count == variable_room) {
    variable_room = variable_room ? 2 * variable_room : 1024;
    variables = realloc(variables, variable_room * sizeof(Variable));
  }
  variables[variable_count++] = (Variable){host, NULL, bytes};
  pthread_mutex_unlock(&mutex);
}

EXPORT cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
  cudaError_t error = cudaErrorInvalidSymbol;
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < variable_count; i++) {
    if (variables[i].host != symbol) continue;
    if (!variables[i].device) variables[i].device = calloc(1, variables[i].bytes);
    *out = variables[i].device;
    error = cudaSuccess;
    break;
  }
  pthread_mutex_unlock(&mutex);
  return host_error(error);
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes,
                                      size_t offset, UNUSED enum cudaMemcpyKind kind) {
  void *to;
  cudaError_t error = cudaGetSymbolAddress(&to, symbol);
  if (!error) memcpy((char *)to + offset, from, bytes);
  return error;
}

// -- launches --------------------------------------------------------------------------

typedef struct {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
} Launch;

// <<<…>>> pushes a launch, which the kernel's stub pops; a stub may launch another.
static __thread Launch launches[16];
static __thread int launch_count;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                            struct CUstream_st *stream) {
  if (launch_count == 16) return 1;
  launches[launch_count++] = (Launch){grid, block, shared_bytes, stream};
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes,
                                              void *stream) {
  if (!launch_count) return cudaErrorMissingConfiguration;
  Launch *launch = &launches[--launch_count];
  *grid = launch->grid;
  *block = launch->block;
  *shared_bytes = launch->shared_bytes;
  *(cudaStream_t *)stream = launch->stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function) {
  *out = (cudaKernel_t)function;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(UNUSED cudaKernel_t kernel, UNUSED dim3 grid,
                                      UNUSED dim3 block, UNUSED void **arguments,
                                      UNUSED size_t shared_bytes, cudaStream_t stream) {
  return host_error(host_capture_work(stream));
}

EXPORT cudaError_t cudaLaunchKernel(UNUSED const void *function, UNUSED dim3 grid,
                                    UNUSED dim3 block, UNUSED void **arguments,
                                    UNUSED size_t shared_bytes, cudaStream_t stream) {
  return host_error(host_capture_work(stream));
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config,
                                       UNUSED const void *function, UNUSED void **arguments) {
  return host_error(host_capture_work(config->stream));
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(UNUSED const void *function, UNUSED dim3 grid,
                                               UNUSED dim3 block, UNUSED void **arguments,
                                               UNUSED size_t shared_bytes,
                                               cudaStream_t stream) {
  return host_error(host_capture_work(stream));
}

// Every kernel is taken to use 32 registers and to be compiled for the card: what a kernel
// really uses stands in its machine code, which nothing here reads. CUB sizes its scratch
// by the version, PyTorch its grids by the occupancy.
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out,
                                         UNUSED const void *function) {
  const Settings *s = host_settings();
  memset(out, 0, sizeof *out);
  out->numRegs = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxDynamicSharedSizeBytes = 48 << 10;
  out->binaryVersion = out->ptxVersion = 10 * s->major + s->minor;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(UNUSED const void *function,
                                        UNUSED enum cudaFuncAttribute attribute,
                                        UNUSED int value) {
  return cudaSuccess;
}

// As many blocks as their threads allow, at most 32. Source: Guide.
static int blocks_of(int threads) {
  int blocks = threads > 0 ? host_max_threads_per_multiprocessor() / threads : 1;
  return blocks < 1 ? 1 : blocks > 32 ? 32 : blocks;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out,
                                                                 UNUSED const void *function,
                                                                 int threads,
                                                                 UNUSED size_t shared_bytes) {
  *out = blocks_of(threads);
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *out, UNUSED const void *function, int threads, UNUSED size_t shared_bytes,
    UNUSED unsigned flags) {
  *out = blocks_of(threads);
  return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// -- the driver's modules: kernels compiled as the program runs ------------------------

EXPORT CUresult cuModuleLoad(CUmodule *out, UNUSED const char *path) {
  *out = host_new_handle();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *out, UNUSED const void *image) {
  *out = host_new_handle();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *out, UNUSED const void *image,
                                   UNUSED unsigned count, UNUSED CUjit_option *options,
                                   UNUSED void **values) {
  *out = host_new_handle();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(UNUSED CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *out, UNUSED CUmodule module,
                                    UNUSED const char *name) {
  *out = host_new_handle();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *out, UNUSED CUfunction_attribute attribute,
                                   UNUSED CUfunction function) {
  *out = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(UNUSED CUfunction function,
                                   UNUSED CUfunction_attribute attribute, UNUSED int value) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(UNUSED CUfunction function, UNUSED CUfunc_cache config) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(UNUSED CUfunction function, UNUSED unsigned grid_x,
                               UNUSED unsigned grid_y, UNUSED unsigned grid_z,
                               UNUSED unsigned block_x, UNUSED unsigned block_y,
                               UNUSED unsigned block_z, UNUSED unsigned shared_bytes,
                               UNUSED CUstream stream, UNUSED void **arguments,
                               UNUSED void **extra) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchCooperativeKernel(UNUSED CUfunction function, UNUSED unsigned grid_x,
                                          UNUSED unsigned grid_y, UNUSED unsigned grid_z,
                                          UNUSED unsigned block_x, UNUSED unsigned block_y,
                                          UNUSED unsigned block_z,
                                          UNUSED unsigned shared_bytes, UNUSED CUstream stream,
                                          UNUSED void **arguments) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out,
                                                            UNUSED CUfunction function,
                                                            int threads,
                                                            UNUSED size_t shared_bytes) {
  *out = blocks_of(threads);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLinkCreate(UNUSED unsigned count, UNUSED CUjit_option *options,
                             UNUSED void **values, CUlinkState *out) {
  *out = host_new_handle();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLinkAddData(UNUSED CUlinkState state, UNUSED CUjitInputType type,
                              UNUSED void *data, UNUSED size_t bytes, UNUSED const char *name,
                              UNUSED unsigned count, UNUSED CUjit_option *options,
                              UNUSED void **values) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLinkComplete(UNUSED CUlinkState state, void **out, size_t *bytes) {
  static char image[16];
  *out = image;
  *bytes = sizeof image;
  return CUDA_SUCCESS;
}

// -- cuBLAS: whatever is not here answers "success", from the generated part -----------

EXPORT int cublasCreate_v2(void **out) {
  *out = host_new_handle();
  return 0;
}

EXPORT int cublasGetMathMode(UNUSED void *handle, int *out) {
  *out = 0;
  return 0;
}

EXPORT int cublasGetPointerMode_v2(UNUSED void *handle, int *out) {
  *out = 0;
  return 0;
}

EXPORT size_t cublasLtGetVersion(void) { return 130101; } // of CUDA 13.0's cuBLAS

EXPORT int cublasLtMatmulDescCreate(void **out) { return cublasCreate_v2(out); }
EXPORT int cublasLtMatmulPreferenceCreate(void **out) { return cublasCreate_v2(out); }
EXPORT int cublasLtMatrixLayoutCreate(void **out) { return cublasCreate_v2(out); }

// One algorithm, which needs no workspace. Source of the 96 bytes:
// cublasLtMatmulHeuristicResult_t of cublasLt.h.
EXPORT int cublasLtMatmulAlgoGetHeuristic(UNUSED void *handle, UNUSED void *operation,
                                          UNUSED void *a, UNUSED void *b, UNUSED void *c,
                                          UNUSED void *d, UNUSED void *preference,
                                          int room, void *results, int *count) {
  *count = room > 0;
  if (*count) memset(results, 0, 96);
  return 0;
}
