// What CUDA tells of its devices, which of them it shows, and contexts.

#include "host.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int visible[MAX_DEVICES]; // physical devices, by ordinal
static int visible_count;
static __thread int current;
static __thread cudaError_t last_error;

// -- CUDA_VISIBLE_DEVICES --------------------------------------------------------------

void host_uuid(int physical, unsigned char uuid[16]) {
  memset(uuid, 0, 16);
  memcpy(uuid, "cuda-host", 9);
  uuid[15] = (unsigned char)physical;
}

void host_uuid_text(int physical, char *text, size_t room) {
  unsigned char u[16];
  host_uuid(physical, u);
  snprintf(text, room,
           "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
           u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
           u[14], u[15]);
}

// The one device that an entry means, or -1. A UUID may be shortened while it is unique.
static int meant_by(const char *entry, size_t length) {
  int found = -1;
  char *end;
  long number = strtol(entry, &end, 10);
  if (end == entry + length)
    return number >= 0 && number < host_settings()->devices ? (int)number : -1;
  for (int device = 0; device < host_settings()->devices; device++) {
    char text[64];
    host_uuid_text(device, text, sizeof text);
    if (length < 4 || strncmp(text, entry, length)) continue;
    if (found >= 0) return -1;
    found = device;
  }
  return found;
}

// Source: CUDA C++ Programming Guide, "CUDA Environment Variables": only devices before
// the first invalid entry are visible; none if one is named twice.
static void read_visible(void) {
  const char *text = getenv("CUDA_VISIBLE_DEVICES");
  for (int device = 0; !text && device < host_settings()->devices; device++)
    visible[visible_count++] = device;
  while (text && *text) {
    text += strspn(text, " ");
    size_t length = strcspn(text, ",");
    size_t trimmed = length;
    while (trimmed && text[trimmed - 1] == ' ') trimmed--;
    int device = trimmed ? meant_by(text, trimmed) : -1;
    if (device < 0) return;
    for (int i = 0; i < visible_count; i++) {
      if (visible[i] != device) continue;
      visible_count = 0;
      return;
    }
    visible[visible_count++] = device;
    text += length + (text[length] == ',');
  }
}

int host_visible_count(void) {
  pthread_once(&once, read_visible);
  return visible_count;
}

int host_physical(int ordinal) { return ordinal < host_visible_count() ? visible[ordinal] : 0; }

int host_current_device(void) { return current; }

// Source for the errors: CUDA Runtime API, cudaSetDevice; a child of fork finds
// cudaErrorInitializationError.
cudaError_t host_use(int ordinal) {
  if (host_is_forked_child()) return cudaErrorInitializationError;
  if (!host_visible_count()) return cudaErrorNoDevice;
  if (ordinal < 0 || ordinal >= host_visible_count()) return cudaErrorInvalidDevice;
  return host_make_context(host_physical(ordinal)) ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaGetDeviceCount(int *out) {
  *out = 0;
  if (host_is_forked_child()) return host_error(cudaErrorInitializationError);
  *out = host_visible_count();
  return host_error(*out ? cudaSuccess : cudaErrorNoDevice);
}

EXPORT cudaError_t cudaGetDevice(int *out) {
  *out = current;
  return host_error(host_visible_count() ? cudaSuccess : cudaErrorNoDevice);
}

// From CUDA 12 on it makes the device's context.
// Source: CUDA Runtime API, cudaSetDevice.
EXPORT cudaError_t cudaSetDevice(int ordinal) {
  cudaError_t error = host_use(ordinal);
  if (!error) current = ordinal;
  return host_error(error);
}

EXPORT cudaError_t cudaDeviceReset(void) { return cudaSuccess; }

EXPORT cudaError_t cudaDriverGetVersion(int *out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *out, UNUSED int device, UNUSED int peer) {
  *out = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(UNUSED int peer, UNUSED unsigned flags) {
  return host_error(cudaErrorPeerAccessUnsupported);
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *out, int room, int ordinal) {
  snprintf(out, (size_t)room, "0000:%02X:00.0", host_physical(ordinal) + 1);
  return cudaSuccess;
}

// -- properties ------------------------------------------------------------------------

// Source of the three: Guide, "Maximum amount of shared memory per SM", "… per thread
// block", "Maximum number of resident threads per SM".
static int shared_bytes_per_multiprocessor(void) {
  const Settings *s = host_settings();
  switch (10 * s->major + s->minor) {
  case 70: return 96 << 10;
  case 75: return 64 << 10;
  case 80: case 87: return 164 << 10;
  case 86: case 89: case 120: return 100 << 10;
  case 90: case 100: return 228 << 10;
  default: return 48 << 10;
  }
}

static int shared_bytes_per_block_optin(void) {
  int all = shared_bytes_per_multiprocessor();
  return host_settings()->major >= 8 ? all - (1 << 10) : all;
}

int host_max_threads_per_multiprocessor(void) {
  const Settings *s = host_settings();
  switch (10 * s->major + s->minor) {
  case 75: return 1024;
  case 86: case 87: case 89: case 120: return 1536;
  default: return 2048;
  }
}

// Bytes of the second-level cache of the cards that state.c takes for each capability.
// Source: NVIDIA's data sheets and architecture white papers.
static int l2_bytes(void) {
  const Settings *s = host_settings();
  switch (10 * s->major + s->minor) {
  case 70: return 6 << 20;
  case 75: return 4 << 20;
  case 80: return 40 << 20;
  case 86: return 6 << 20;
  case 89: return 48 << 20;
  case 90: return 50 << 20;
  default: return 1536 << 10;
  }
}

// Grid, block and register limits are the same from compute capability 3.0 on. Source:
// Guide.
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int ordinal) {
  if (ordinal < 0 || ordinal >= host_visible_count()) return host_error(cudaErrorInvalidDevice);
  const Settings *s = host_settings();
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%s", s->name);
  host_uuid(host_physical(ordinal), (unsigned char *)out->uuid.bytes);
  out->totalGlobalMem = s->total_bytes;
  out->major = s->major;
  out->minor = s->minor;
  out->multiProcessorCount = s->multiprocessors;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 0x7fffffff;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsPerMultiProcessor = host_max_threads_per_multiprocessor();
  out->maxBlocksPerMultiProcessor = 32;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->sharedMemPerBlock = 48 << 10;
  out->sharedMemPerBlockOptin = (size_t)shared_bytes_per_block_optin();
  out->sharedMemPerMultiprocessor = (size_t)shared_bytes_per_multiprocessor();
  out->reservedSharedMemPerBlock = s->major >= 8 ? 1 << 10 : 0;
  out->totalConstMem = 65536;
  out->memPitch = 0x7fffffff;
  out->textureAlignment = 512;
  out->texturePitchAlignment = 32;
  out->l2CacheSize = l2_bytes();
  out->pciBusID = host_physical(ordinal) + 1;
  out->canMapHostMemory = out->unifiedAddressing = out->managedMemory = 1;
  out->concurrentKernels = out->cooperativeLaunch = 1;
  out->streamPrioritiesSupported = out->hostRegisterSupported = 1;
  out->concurrentManagedAccess = out->computePreemptionSupported = 1;
  out->canUseHostPointerForRegisteredMem = out->memoryPoolsSupported = 1;
  out->asyncEngineCount = 3;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr attribute, int ordinal) {
  struct cudaDeviceProp p;
  cudaError_t error = cudaGetDeviceProperties(&p, ordinal);
  if (error) return error;
  switch (attribute) {
  case cudaDevAttrMaxThreadsPerBlock: *out = p.maxThreadsPerBlock; break;
  case cudaDevAttrMaxBlockDimX:
  case cudaDevAttrMaxBlockDimY: *out = p.maxThreadsDim[0]; break;
  case cudaDevAttrMaxBlockDimZ: *out = p.maxThreadsDim[2]; break;
  case cudaDevAttrMaxGridDimX: *out = p.maxGridSize[0]; break;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ: *out = p.maxGridSize[1]; break;
  case cudaDevAttrMaxSharedMemoryPerBlock: *out = (int)p.sharedMemPerBlock; break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = (int)p.sharedMemPerBlockOptin; break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    *out = (int)p.sharedMemPerMultiprocessor;
    break;
  case cudaDevAttrReservedSharedMemoryPerBlock: *out = (int)p.reservedSharedMemPerBlock; break;
  case cudaDevAttrWarpSize: *out = p.warpSize; break;
  case cudaDevAttrMaxRegistersPerBlock:
  case cudaDevAttrMaxRegistersPerMultiprocessor: *out = p.regsPerBlock; break;
  case cudaDevAttrMultiProcessorCount: *out = p.multiProcessorCount; break;
  case cudaDevAttrMaxThreadsPerMultiProcessor: *out = p.maxThreadsPerMultiProcessor; break;
  case cudaDevAttrMaxBlocksPerMultiprocessor: *out = p.maxBlocksPerMultiProcessor; break;
  case cudaDevAttrComputeCapabilityMajor: *out = p.major; break;
  case cudaDevAttrComputeCapabilityMinor: *out = p.minor; break;
  case cudaDevAttrL2CacheSize: *out = p.l2CacheSize; break;
  case cudaDevAttrClockRate: *out = 1410000; break; // kHz, an A100's
  case cudaDevAttrMemoryClockRate: *out = 1215000; break;
  case cudaDevAttrUnifiedAddressing:
  case cudaDevAttrCooperativeLaunch:
  case cudaDevAttrManagedMemory:
  case cudaDevAttrConcurrentKernels:
  case cudaDevAttrMemoryPoolsSupported: *out = 1; break;
  default: *out = 0; // what it has not
  }
  return cudaSuccess;
}

// -- errors ----------------------------------------------------------------------------

cudaError_t host_error(cudaError_t error) {
  // NotReady is an answer. Source: CUDA Runtime API, cudaEventQuery.
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

EXPORT cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }

// Source of the texts: those of libcudart 13.0.
static const struct {
  cudaError_t error;
  const char *name, *text;
} texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorPeerAccessUnsupported, "cudaErrorPeerAccessUnsupported",
     "peer access is not supported between these two devices"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
     "capturing stream has unjoined work"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
};

EXPORT const char *cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    if (texts[i].error == error) return texts[i].name;
  return "cudaErrorUnknown";
}

EXPORT const char *cudaGetErrorString(cudaError_t error) {
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    if (texts[i].error == error) return texts[i].text;
  return "unknown error";
}

// -- the driver's view -----------------------------------------------------------------

EXPORT CUresult cuInit(UNUSED unsigned flags) {
  return host_visible_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *out) { return (CUresult)cudaDriverGetVersion(out); }

EXPORT CUresult cuDeviceGetCount(int *out) {
  *out = host_visible_count();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *out, int ordinal) {
  *out = ordinal;
  return ordinal >= 0 && ordinal < host_visible_count() ? CUDA_SUCCESS
                                                        : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char *out, int room, UNUSED CUdevice device) {
  snprintf(out, (size_t)room, "%s", host_settings()->name);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem(size_t *out, UNUSED CUdevice device) {
  *out = host_settings()->total_bytes;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute attribute, CUdevice device) {
  if (attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
      attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) {
    *out = 1;
    return CUDA_SUCCESS;
  }
  // The two lists number the same attributes alike.
  return (CUresult)cudaDeviceGetAttribute(out, (enum cudaDeviceAttr)attribute, device);
}

static CUcontext context_of(int ordinal) { return (CUcontext)(uintptr_t)(0x5000 + ordinal); }

EXPORT CUresult cuCtxGetCurrent(CUcontext *out) {
  int made = host_visible_count() && host_has_context(host_physical(current));
  *out = made ? context_of(current) : NULL;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) current = (int)((uintptr_t)context - 0x5000);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
  *out = context_of(device);
  return (CUresult)host_use(device);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = host_has_context(host_physical(device));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **out) {
  *out = cudaGetErrorString((cudaError_t)error); // the common codes are the same
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **out) {
  *out = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
