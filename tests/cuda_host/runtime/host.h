// A substitute for NVIDIA's CUDA runtime, driver, cuBLAS, NVRTC and NVML on a machine
// without a GPU, so that PyTorch's own CUDA host code runs there unmodified. Preloaded,
// three libraries of gcc's making stand under the names that torch and pynvml load:
// libcuda.so.1 (runtime, driver, cuBLAS), libnvrtc.so.13 or .12 and libnvidia-ml.so.1 (NVML).
//
// Real: everything that PyTorch's C++ decides (the caching allocator's rounding, pools,
// splitting, retries, fractions, texts and statistics; workspaces; which kernel a size
// gets; what is kept for backward), since it is PyTorch's own code. Copies and memsets.
// The card's capacity, charged in pages, shared among processes through a file.
//
// Not real: kernels and cuBLAS do nothing, so the values of a result are whatever its
// memory held. Only bytes, calls, errors, texts, statistics and snapshots mean something;
// a program that branches on values, or takes a size from the card, may go another way
// than on a card: transformers, for one, looks at positions and masks, and so an SDPA model
// builds a mask here that it does without on a card. Work ends at once, unless events are held (below). A context, where one
// is asked for, has the bytes that it is told to have. Missing altogether: cuDNN (say
// torch.backends.cudnn.enabled = False), cuSOLVER, cuSPARSE, NCCL, sharing a block
// between processes, peer access, MIG.
//
// Settings, from the environment; SIZE is bytes, or a number with K, M or G (KiB, MiB,
// GiB):
//   CUDA_HOST_DEVICES=1..8   cards (2)
//   CUDA_HOST_TOTAL=SIZE     bytes of each card (16G)
//   CUDA_HOST_CC=8.0         compute capability
//   CUDA_HOST_SMS=COUNT      multiprocessors (those of a card of that capability)
//   CUDA_HOST_NAME=TEXT      name of each card
//   CUDA_HOST_CONTEXT=SIZE   bytes that a process's context takes on each card it uses (0)
//   CUDA_HOST_OTHERS=SIZE    bytes of each card that nobody listed holds (0)
//   CUDA_HOST_STATE=PATH     the file through which processes share the cards; without
//                            it each process has cards of its own
//   CUDA_HOST_EVENTS=held    events are pending until somebody waits for them; see
//                            cuda_host_hold_events
//   CUDA_HOST_VALUES=none    no copies to a card and no memsets: large models need no
//                            memory of the host's
//   CUDA_HOST_LOG=PATH       one line for each call that takes or gives memory
//   CUDA_VISIBLE_DEVICES     as in CUDA: ordinals or UUIDs
//
// A constant names its source beside it. "Guide" is NVIDIA's CUDA C++ Programming Guide,
// the table of technical specifications for each compute capability.
#ifndef CUDA_HOST_H
#define CUDA_HOST_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

// Pages of the driver. Source: cuMemGetAllocationGranularity answers 2 MiB on current
// cards.
#define PAGE_BYTES (UINT64_C(2) << 20)
#define MAX_DEVICES 8
#define MAX_PROCESSES 64

typedef struct {
  int devices;
  size_t total_bytes, context_bytes, other_bytes;
  int major, minor, multiprocessors;
  int copies_values;
  char name[256];
} Settings;

// One process's part of the cards.
typedef struct {
  int pid;
  uint64_t used_bytes; // without its context
} Holding;

// nvml.c is a library of its own and calls these.
#pragma GCC visibility push(default)

// state.c: the cards, shared among processes. Devices are physical here: before
// CUDA_VISIBLE_DEVICES. Every function may be called from any thread.
const Settings *host_settings(void);
int host_take(int device, size_t bytes); // 1: taken, 0: the card has no room
void host_give(int device, size_t bytes);
int host_make_context(int device); // 1: there is one now, 0: the card has no room for it
int host_has_context(int device);
size_t host_used_bytes(int device); // by all processes, contexts and others included
int host_holdings(int device, Holding *out, int room); // of processes with a context
void host_log(const char *call, size_t bytes, int code, uint64_t address);
int host_is_forked_child(void); // CUDA cannot be used in it, as its parent used it

// device.c: what CUDA shows of them.
int host_visible_count(void);
int host_physical(int ordinal); // of a visible device
void host_uuid(int physical, unsigned char uuid[16]);
void host_uuid_text(int physical, char *text, size_t room); // "GPU-…", as NVML writes it
int host_current_device(void); // an ordinal of this thread's
cudaError_t host_use(int ordinal); // make its context if there is none
int host_max_threads_per_multiprocessor(void);

// memory.c
int host_device_of(const void *address); // an ordinal, or -1 for the host's memory

// streams.c
void *host_new_handle(void); // that is no address of anything
cudaError_t host_capture_work(cudaStream_t stream); // call it for all that a graph keeps

cudaError_t host_error(cudaError_t error); // note a runtime call's error and return it

#pragma GCC visibility pop

#endif
