// NVML: the cards of the machine, whatever CUDA_VISIBLE_DEVICES says, and the bytes of
// every process on them. Layouts and codes are those of nvml.h, which no package with
// CUDA's headers carries.

#include "host.h"

#include <stdio.h>
#include <string.h>

enum { // nvmlReturn_t
  SUCCESS = 0,
  INVALID_ARGUMENT = 2,
  NOT_SUPPORTED = 3,
  NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7,
};

typedef struct { // nvmlProcessInfo_v1_t
  unsigned pid;
  unsigned long long used_bytes;
} ProcessV1;

typedef struct { // nvmlProcessInfo_t, of the second and third call
  unsigned pid;
  unsigned long long used_bytes;
  unsigned gpu_instance, compute_instance;
} Process;

typedef struct { // nvmlProcessDetail_v1_t
  unsigned pid;
  unsigned long long used_bytes;
  unsigned gpu_instance, compute_instance;
  unsigned long long protected_bytes;
} Detail;

typedef struct { // nvmlProcessDetailList_t
  unsigned version, mode, count;
  Detail *items;
} DetailList;

typedef struct { // nvmlMemory_t
  unsigned long long total, free, used;
} Memory;

typedef struct { // nvmlMemory_v2_t
  unsigned version;
  unsigned long long total, reserved, free, used;
} MemoryV2;

typedef struct { // nvmlPciInfo_t
  char legacy_bus_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
} Pci;

// A handle is its card's number and one, since NULL is no handle.
static void *handle_of(int device) { return (void *)(uintptr_t)(device + 1); }

static int device_of(void *handle) {
  uintptr_t number = (uintptr_t)handle;
  return number >= 1 && number <= (uintptr_t)host_settings()->devices ? (int)number - 1 : -1;
}

EXPORT int nvmlInit(void) { return SUCCESS; }
EXPORT int nvmlInit_v2(void) { return SUCCESS; }
EXPORT int nvmlInitWithFlags(UNUSED unsigned flags) { return SUCCESS; }
EXPORT int nvmlShutdown(void) { return SUCCESS; }

EXPORT const char *nvmlErrorString(int code) {
  switch (code) {
  case SUCCESS: return "The operation was successful";
  case INVALID_ARGUMENT: return "Invalid Argument";
  case NOT_SUPPORTED: return "Not Supported";
  case NOT_FOUND: return "Not Found";
  case INSUFFICIENT_SIZE: return "Insufficient Size";
  default: return "Unknown Error";
  }
}

// Versions of a driver of CUDA 13.0. Source: CUDA 13.0 release notes.
EXPORT int nvmlSystemGetDriverVersion(char *out, unsigned room) {
  snprintf(out, room, "580.65.06");
  return SUCCESS;
}

EXPORT int nvmlSystemGetNVMLVersion(char *out, unsigned room) {
  snprintf(out, room, "13.580.65.06");
  return SUCCESS;
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *out) {
  *out = 13000;
  return SUCCESS;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *out) {
  return nvmlSystemGetCudaDriverVersion(out);
}

// -- cards -----------------------------------------------------------------------------

EXPORT int nvmlDeviceGetCount_v2(unsigned *out) {
  *out = (unsigned)host_settings()->devices;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
  if (index >= (unsigned)host_settings()->devices) return INVALID_ARGUMENT;
  *out = handle_of((int)index);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
  for (int device = 0; device < host_settings()->devices; device++) {
    char text[64];
    host_uuid_text(device, text, sizeof text);
    if (strcmp(text, uuid)) continue;
    *out = handle_of(device);
    return SUCCESS;
  }
  return NOT_FOUND;
}

// Bus numbers as device.c gives them out: the card's number and one.
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **out) {
  unsigned domain, bus;
  if (sscanf(bus_id, "%x:%x:", &domain, &bus) != 2) return INVALID_ARGUMENT;
  if (bus < 1 || bus > (unsigned)host_settings()->devices) return NOT_FOUND;
  *out = handle_of((int)bus - 1);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetIndex(void *handle, unsigned *out) {
  *out = (unsigned)device_of(handle);
  return device_of(handle) < 0 ? INVALID_ARGUMENT : SUCCESS;
}

EXPORT int nvmlDeviceGetMinorNumber(void *handle, unsigned *out) {
  return nvmlDeviceGetIndex(handle, out);
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *out, unsigned room) {
  if (device_of(handle) < 0) return INVALID_ARGUMENT;
  host_uuid_text(device_of(handle), out, room);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetName(void *handle, char *out, unsigned room) {
  if (device_of(handle) < 0) return INVALID_ARGUMENT;
  snprintf(out, room, "%s", host_settings()->name);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetPciInfo_v3(void *handle, Pci *out) {
  int device = device_of(handle);
  if (device < 0) return INVALID_ARGUMENT;
  memset(out, 0, sizeof *out);
  out->bus = (unsigned)device + 1;
  snprintf(out->legacy_bus_id, sizeof out->legacy_bus_id, "0000:%02X:00.0", out->bus & 15);
  snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  if (device_of(handle) < 0) return INVALID_ARGUMENT;
  *major = host_settings()->major;
  *minor = host_settings()->minor;
  return SUCCESS;
}

// These cards are never split, and have neither NVLink nor a fabric.
EXPORT int nvmlDeviceGetMigMode(UNUSED void *handle, UNUSED unsigned *current,
                                UNUSED unsigned *pending) {
  return NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(UNUSED void *handle, UNUSED unsigned link,
                                               UNUSED int *out) {
  return NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(UNUSED void *handle, UNUSED unsigned link,
                                               UNUSED Pci *out) {
  return NOT_SUPPORTED;
}

// Behind its version: 32 bytes, in which zero is "not supported" of NVSwitch's fabric.
// Source: nvmlGpuFabricInfo_v2_t.
EXPORT int nvmlDeviceGetGpuFabricInfoV(UNUSED void *handle, void *out) {
  memset((char *)out + 4, 0, 32);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetP2PStatus(UNUSED void *a, UNUSED void *b, UNUSED int kind, int *out) {
  *out = 1; // NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED
  return SUCCESS;
}

// -- bytes -----------------------------------------------------------------------------

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, Memory *out) {
  int device = device_of(handle);
  if (device < 0) return INVALID_ARGUMENT;
  out->total = host_settings()->total_bytes;
  out->used = host_used_bytes(device);
  out->free = out->total - out->used;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, MemoryV2 *out) {
  Memory memory;
  int code = nvmlDeviceGetMemoryInfo(handle, &memory);
  if (code) return code;
  out->total = memory.total;
  out->reserved = 0; // what the driver keeps for itself: nothing here
  out->free = memory.free;
  out->used = memory.used;
  return SUCCESS;
}

// Every call that lists processes: too little room is answered by how much is needed.
static int listed(void *handle, unsigned *count, Holding *all) {
  int device = device_of(handle);
  if (device < 0) return INVALID_ARGUMENT;
  unsigned room = *count;
  *count = (unsigned)host_holdings(device, all, MAX_PROCESSES);
  return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, ProcessV1 *out) {
  Holding all[MAX_PROCESSES];
  int code = listed(handle, count, all);
  for (unsigned i = 0; !code && i < *count; i++)
    out[i] = (ProcessV1){(unsigned)all[i].pid, all[i].used_bytes};
  return code;
}

// A card that is not split has no instances: 0xFFFFFFFF. Source: nvml.h.
EXPORT int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, Process *out) {
  Holding all[MAX_PROCESSES];
  int code = listed(handle, count, all);
  for (unsigned i = 0; !code && i < *count; i++)
    out[i] = (Process){(unsigned)all[i].pid, all[i].used_bytes, 0xFFFFFFFF, 0xFFFFFFFF};
  return code;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *out) {
  return nvmlDeviceGetComputeRunningProcesses_v2(handle, count, out);
}

EXPORT int nvmlDeviceGetRunningProcessDetailList(void *handle, DetailList *list) {
  Holding all[MAX_PROCESSES];
  int code = listed(handle, &list->count, all);
  for (unsigned i = 0; !code && i < list->count; i++)
    list->items[i] =
        (Detail){(unsigned)all[i].pid, all[i].used_bytes, 0xFFFFFFFF, 0xFFFFFFFF, 0};
  return code;
}

// No process draws pictures here.
EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(UNUSED void *handle, unsigned *count,
                                                    UNUSED Process *out) {
  *count = 0;
  return SUCCESS;
}
