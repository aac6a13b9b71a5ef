// How torch finds the driver's functions: by name, at run time.

#define _GNU_SOURCE // Dl_info
#include "host.h"

#include <dlfcn.h>
#include <stdio.h>

static void *find(const char *name) {
  Dl_info here;
  if (!dladdr((void *)&find, &here)) return NULL;
  void *self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  char versioned[256];
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  void *found = dlsym(self, name);
  return found ? found : dlsym(self, versioned);
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **out, UNUSED unsigned version, UNUSED unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  *out = find(name);
  if (result)
    *result = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

EXPORT CUresult cuGetProcAddress(const char *name, void **out, UNUSED int version,
                                 UNUSED cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *result) {
  *out = find(name);
  if (result)
    *result = *out ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
