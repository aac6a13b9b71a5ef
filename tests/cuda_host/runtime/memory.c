// A card's memory: host address space that nothing has touched, charged in pages.

#include "host.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Where the cards' ranges lie: far from what malloc hands out, one TiB for each card, and
// above them what cuMemAddressReserve hands out.
#define RANGE_BASE UINT64_C(0x200000000000)
#define RANGE_BYTES (UINT64_C(1) << 40)
#define VIRTUAL_BASE UINT64_C(0x300000000000)
#define VIRTUAL_BYTES (UINT64_C(1) << 45)
#define VIRTUAL_ALIGNMENT (UINT64_C(1) << 30)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static uint64_t pages_of(uint64_t bytes) {
  return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

static int map_range(uint64_t address, uint64_t bytes) {
  void *wanted = (void *)address;
  void *got = mmap(wanted, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (got == wanted) madvise(got, bytes, MADV_DONTDUMP);
  return got == wanted;
}

// -- ranges: cudaMalloc and cudaFree ---------------------------------------------------

typedef struct {
  uint64_t address, asked_bytes, bytes;
} Range;

typedef struct {
  Range *items; // by address
  size_t count, room;
} Ranges;

static Ranges ranges[MAX_DEVICES];

static uint64_t base_of(int ordinal) { return RANGE_BASE + (uint64_t)ordinal * RANGE_BYTES; }

// The lowest free range that is large enough; its place in the list.
static size_t first_fit(const Ranges *all, uint64_t bytes, uint64_t *address) {
  size_t place = 0;
  for (; place < all->count; place++) {
    if (all->items[place].address - *address >= bytes) break;
    *address = all->items[place].address + all->items[place].bytes;
  }
  return place;
}

static uint64_t new_range(int ordinal, uint64_t asked_bytes) {
  Ranges *all = &ranges[ordinal];
  uint64_t bytes = pages_of(asked_bytes), address = base_of(ordinal);
  if (bytes < asked_bytes || bytes > RANGE_BYTES) return 0;
  if (!host_take(host_physical(ordinal), bytes)) return 0;
  size_t place = first_fit(all, bytes, &address);
  if (address + bytes > base_of(ordinal) + RANGE_BYTES || !map_range(address, bytes)) {
    host_give(host_physical(ordinal), bytes);
    return 0;
  }
  if (all->count == all->room) {
    all->room = all->room ? 2 * all->room : 256;
    all->items = realloc(all->items, all->room * sizeof(Range));
  }
  memmove(all->items + place + 1, all->items + place, (all->count - place) * sizeof(Range));
  all->items[place] = (Range){address, asked_bytes, bytes};
  all->count++;
  return address;
}

static Range *range_around(uint64_t address) {
  if (address < RANGE_BASE || address >= RANGE_BASE + MAX_DEVICES * RANGE_BYTES) return NULL;
  Ranges *all = &ranges[(address - RANGE_BASE) / RANGE_BYTES];
  for (size_t i = 0; i < all->count; i++)
    if (address >= all->items[i].address &&
        address < all->items[i].address + all->items[i].bytes)
      return &all->items[i];
  return NULL;
}

EXPORT cudaError_t cudaMalloc(void **out, size_t bytes) {
  if (!out) return host_error(cudaErrorInvalidValue);
  int ordinal = host_current_device();
  cudaError_t error = host_use(ordinal);
  if (error) return host_error(error);
  *out = NULL;
  if (!bytes) return cudaSuccess;
  pthread_mutex_lock(&mutex);
  uint64_t address = new_range(ordinal, bytes);
  pthread_mutex_unlock(&mutex);
  error = address ? cudaSuccess : cudaErrorMemoryAllocation;
  host_log("cudaMalloc", bytes, error, address);
  *out = (void *)address;
  return host_error(error);
}

EXPORT cudaError_t cudaFree(void *pointer) {
  // The usual way to make a context: cudaFree(NULL).
  if (!pointer) return host_error(host_use(host_current_device()));
  uint64_t address = (uint64_t)pointer;
  pthread_mutex_lock(&mutex);
  Range *found = range_around(address);
  if (!found || found->address != address) {
    pthread_mutex_unlock(&mutex);
    return host_error(cudaErrorInvalidValue);
  }
  int ordinal = (int)((address - RANGE_BASE) / RANGE_BYTES);
  Range range = *found;
  Ranges *all = &ranges[ordinal];
  memmove(found, found + 1, (size_t)(all->items + all->count - found - 1) * sizeof(Range));
  all->count--;
  munmap(pointer, range.bytes);
  host_give(host_physical(ordinal), range.bytes);
  pthread_mutex_unlock(&mutex);
  host_log("cudaFree", range.asked_bytes, cudaSuccess, address);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMallocAsync(void **out, size_t bytes, UNUSED cudaStream_t stream) {
  return cudaMalloc(out, bytes);
}

EXPORT cudaError_t cudaFreeAsync(void *pointer, UNUSED cudaStream_t stream) {
  return cudaFree(pointer);
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  int ordinal = host_current_device();
  cudaError_t error = host_use(ordinal);
  if (error) return host_error(error);
  *total_bytes = host_settings()->total_bytes;
  *free_bytes = *total_bytes - host_used_bytes(host_physical(ordinal));
  return cudaSuccess;
}

EXPORT CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr pointer) {
  pthread_mutex_lock(&mutex);
  Range *found = range_around(pointer);
  if (found && base) *base = found->address;
  if (found && bytes) *bytes = found->asked_bytes;
  pthread_mutex_unlock(&mutex);
  return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// -- pages and mappings: expandable segments -------------------------------------------

typedef struct {
  uint64_t bytes;
  int ordinal, references;
} Pages;

typedef struct {
  uint64_t address, bytes;
  size_t handle;
} Mapping;

static Pages *pages; // a handle is its place here, from 1 on
static size_t page_count = 1, page_room;
static Mapping *mappings;
static size_t mapping_count, mapping_room;
static uint64_t next_virtual = VIRTUAL_BASE;

static void release(size_t handle) {
  Pages *held = &pages[handle];
  if (--held->references) return;
  host_give(host_physical(held->ordinal), held->bytes);
  host_log("physFree", held->bytes, CUDA_SUCCESS, handle);
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *out, UNUSED const CUmemAllocationProp *prop,
                                              UNUSED CUmemAllocationGranularity_flags option) {
  *out = PAGE_BYTES;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *out, size_t bytes, UNUSED size_t alignment,
                                    UNUSED CUdeviceptr wanted, UNUSED unsigned long long flags) {
  pthread_mutex_lock(&mutex);
  uint64_t address = next_virtual;
  int reserved = bytes <= VIRTUAL_BASE + VIRTUAL_BYTES - address && map_range(address, bytes);
  if (reserved)
    next_virtual += (bytes + VIRTUAL_ALIGNMENT - 1) / VIRTUAL_ALIGNMENT * VIRTUAL_ALIGNMENT;
  pthread_mutex_unlock(&mutex);
  CUresult result = reserved ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
  host_log("cuMemAddressReserve", bytes, (int)result, address);
  *out = address;
  return result;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
  munmap((void *)address, bytes);
  host_log("cuMemAddressFree", bytes, CUDA_SUCCESS, address);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *out, size_t bytes,
                            const CUmemAllocationProp *prop, UNUSED unsigned long long flags) {
  int ordinal = prop->location.id;
  if (!bytes || bytes % PAGE_BYTES || ordinal < 0 || ordinal >= host_visible_count())
    return CUDA_ERROR_INVALID_VALUE;
  // Pages are mapped into a context; the first call of torch's that needs one is this.
  if (host_use(ordinal)) return CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&mutex);
  int taken = host_take(host_physical(ordinal), bytes);
  if (taken) {
    if (page_count >= page_room) {
      page_room = page_room ? 2 * page_room : 1024;
      pages = realloc(pages, page_room * sizeof(Pages));
    }
    pages[page_count] = (Pages){bytes, ordinal, 1};
    *out = page_count++;
  }
  pthread_mutex_unlock(&mutex);
  CUresult result = taken ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
  host_log("cuMemCreate", bytes, (int)result, taken ? *out : 0);
  return result;
}

static int is_handle(CUmemGenericAllocationHandle handle) {
  return handle > 0 && handle < page_count && pages[handle].references > 0;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  pthread_mutex_lock(&mutex);
  int known = is_handle(handle);
  if (known) release(handle);
  pthread_mutex_unlock(&mutex);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, UNUSED size_t offset,
                         CUmemGenericAllocationHandle handle, UNUSED unsigned long long flags) {
  pthread_mutex_lock(&mutex);
  int known = is_handle(handle);
  if (known) {
    if (mapping_count == mapping_room) {
      mapping_room = mapping_room ? 2 * mapping_room : 1024;
      mappings = realloc(mappings, mapping_room * sizeof(Mapping));
    }
    mappings[mapping_count++] = (Mapping){address, bytes, handle};
    pages[handle].references++;
  }
  pthread_mutex_unlock(&mutex);
  host_log("cuMemMap", bytes, CUDA_SUCCESS, address);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < mapping_count;) {
    if (mappings[i].address >= address && mappings[i].address < address + bytes) {
      release(mappings[i].handle);
      mappings[i] = mappings[--mapping_count];
    } else {
      i++;
    }
  }
  pthread_mutex_unlock(&mutex);
  madvise((void *)address, bytes, MADV_DONTNEED);
  host_log("cuMemUnmap", bytes, CUDA_SUCCESS, address);
  return CUDA_SUCCESS;
}

static Mapping *mapping_around(uint64_t address) {
  for (size_t i = 0; i < mapping_count; i++)
    if (address >= mappings[i].address && address < mappings[i].address + mappings[i].bytes)
      return &mappings[i];
  return NULL;
}

EXPORT CUresult cuMemSetAccess(UNUSED CUdeviceptr address, UNUSED size_t bytes,
                               UNUSED const CUmemAccessDesc *access, UNUSED size_t count) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *out, void *pointer) {
  pthread_mutex_lock(&mutex);
  Mapping *found = mapping_around((uint64_t)pointer);
  if (found) {
    *out = found->handle;
    pages[found->handle].references++;
  }
  pthread_mutex_unlock(&mutex);
  return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *out,
                                                       CUmemGenericAllocationHandle handle) {
  pthread_mutex_lock(&mutex);
  int known = is_handle(handle);
  memset(out, 0, sizeof *out);
  out->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  out->location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  out->location.id = known ? pages[handle].ordinal : 0;
  pthread_mutex_unlock(&mutex);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// No process can map another's pages here.
EXPORT CUresult cuMemExportToShareableHandle(UNUSED void *out,
                                             UNUSED CUmemGenericAllocationHandle handle,
                                             UNUSED CUmemAllocationHandleType type,
                                             UNUSED unsigned long long flags) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuMemImportFromShareableHandle(UNUSED CUmemGenericAllocationHandle *out,
                                               UNUSED void *handle,
                                               UNUSED CUmemAllocationHandleType type) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// -- which memory an address is of -----------------------------------------------------

typedef struct {
  uint64_t address, bytes;
} Pinned;

static Pinned *pinned; // of the host, known to CUDA
static size_t pinned_count, pinned_room;

int host_device_of(const void *pointer) {
  uint64_t address = (uint64_t)pointer;
  if (address >= RANGE_BASE && address < RANGE_BASE + MAX_DEVICES * RANGE_BYTES)
    return (int)((address - RANGE_BASE) / RANGE_BYTES);
  if (address < VIRTUAL_BASE || address >= VIRTUAL_BASE + VIRTUAL_BYTES) return -1;
  pthread_mutex_lock(&mutex);
  Mapping *found = mapping_around(address);
  int ordinal = found ? pages[found->handle].ordinal : -1;
  pthread_mutex_unlock(&mutex);
  return ordinal;
}

static void pin(void *pointer, size_t bytes) {
  pthread_mutex_lock(&mutex);
  if (pinned_count == pinned_room) {
    pinned_room = pinned_room ? 2 * pinned_room : 256;
    pinned = realloc(pinned, pinned_room * sizeof(Pinned));
  }
  pinned[pinned_count++] = (Pinned){(uint64_t)pointer, bytes};
  pthread_mutex_unlock(&mutex);
}

static void unpin(void *pointer) {
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < pinned_count; i++) {
    if (pinned[i].address != (uint64_t)pointer) continue;
    pinned[i] = pinned[--pinned_count];
    break;
  }
  pthread_mutex_unlock(&mutex);
}

EXPORT cudaError_t cudaHostAlloc(void **out, size_t bytes, UNUSED unsigned flags) {
  if (posix_memalign(out, 4096, bytes ? bytes : 1)) return host_error(cudaErrorMemoryAllocation);
  pin(*out, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void *pointer) {
  unpin(pointer);
  free(pointer);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *pointer, size_t bytes, UNUSED unsigned flags) {
  pin(pointer, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *pointer) {
  unpin(pointer);
  return cudaSuccess;
}

// Source for what is said of memory that CUDA does not know: CUDA Runtime API,
// cudaPointerGetAttributes: type Unregistered, device -2 (cudaInvalidDeviceId).
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out,
                                            const void *pointer) {
  int ordinal = host_device_of(pointer);
  memset(out, 0, sizeof *out);
  if (ordinal >= 0) {
    out->type = cudaMemoryTypeDevice;
    out->device = ordinal;
    out->devicePointer = (void *)pointer;
    return cudaSuccess;
  }
  out->type = cudaMemoryTypeUnregistered;
  out->device = cudaInvalidDeviceId;
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < pinned_count; i++) {
    uint64_t address = (uint64_t)pointer;
    if (address < pinned[i].address || address >= pinned[i].address + pinned[i].bytes) continue;
    out->type = cudaMemoryTypeHost;
    out->device = 0;
    out->devicePointer = out->hostPointer = (void *)pointer;
    break;
  }
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

EXPORT CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute,
                                      CUdeviceptr pointer) {
  int ordinal = host_device_of((void *)pointer);
  if (ordinal < 0) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
    *(int *)out = ordinal;
    return CUDA_SUCCESS;
  }
  if (attribute == CU_POINTER_ATTRIBUTE_CONTEXT)
    return cuDevicePrimaryCtxRetain((CUcontext *)out, ordinal);
  return CUDA_ERROR_NOT_SUPPORTED;
}

// -- copies and memsets ----------------------------------------------------------------

static unsigned long reads;

// How many copies from a card to the host's memory there were: whoever makes one may act
// on a value that nothing computed.
EXPORT unsigned long cuda_host_reads(void) { return __atomic_load_n(&reads, __ATOMIC_RELAXED); }

static cudaError_t copy(void *to, const void *from, size_t bytes) {
  if (bytes && host_device_of(from) >= 0 && host_device_of(to) < 0)
    __atomic_add_fetch(&reads, 1, __ATOMIC_RELAXED);
  if (bytes && (host_settings()->copies_values || host_device_of(to) < 0))
    memmove(to, from, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes,
                              UNUSED enum cudaMemcpyKind kind) {
  return copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                   UNUSED enum cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = host_capture_work(stream);
  return error ? host_error(error) : copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, UNUSED int to_device, const void *from,
                                       UNUSED int from_device, size_t bytes,
                                       UNUSED cudaStream_t stream) {
  return copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from,
                                     size_t from_pitch, size_t width, size_t height,
                                     UNUSED enum cudaMemcpyKind kind,
                                     UNUSED cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
  if (bytes && host_settings()->copies_values) memset(pointer, value, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes,
                                   cudaStream_t stream) {
  cudaError_t error = host_capture_work(stream);
  return error ? host_error(error) : cudaMemset(pointer, value, bytes);
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr pointer, unsigned value, size_t count,
                                 UNUSED CUstream stream) {
  for (size_t i = 0; host_settings()->copies_values && i < count; i++)
    ((unsigned *)pointer)[i] = value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWriteValue32(UNUSED CUstream stream, CUdeviceptr pointer,
                                     cuuint32_t value, UNUSED unsigned flags) {
  *(volatile uint32_t *)pointer = value;
  return CUDA_SUCCESS;
}

// -- the driver's pools: cudaMallocAsync -----------------------------------------------

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int ordinal) {
  *out = (cudaMemPool_t)(uintptr_t)(0x1000 + ordinal);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool,
                                           UNUSED enum cudaMemPoolAttr attribute, void *out) {
  int ordinal = (int)((uintptr_t)pool - 0x1000);
  uint64_t bytes = 0;
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < ranges[ordinal].count; i++) bytes += ranges[ordinal].items[i].bytes;
  pthread_mutex_unlock(&mutex);
  *(uint64_t *)out = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolSetAttribute(UNUSED cudaMemPool_t pool,
                                           UNUSED enum cudaMemPoolAttr attribute,
                                           UNUSED void *value) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolSetAccess(UNUSED cudaMemPool_t pool,
                                        UNUSED const struct cudaMemAccessDesc *access,
                                        UNUSED size_t count) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolTrimTo(UNUSED cudaMemPool_t pool, UNUSED size_t bytes) {
  return cudaSuccess;
}
