// The cards' bytes, shared among processes.
//
// A process has a slot in the shared file and holds a record lock on the byte of the
// slot's number. The kernel drops the lock when the process ends, however it ends, so a
// slot that nobody holds is one whose bytes the driver has taken back.

#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
  int pid; // 0: free
  uint64_t used_bytes[MAX_DEVICES];
  uint8_t context[MAX_DEVICES];
} Slot;

typedef struct {
  Slot slots[MAX_PROCESSES];
} State;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static Settings settings;
static State *state;
static int state_file = -1;
static int own = -1; // this process's slot
static int forked_child;
static FILE *log_file;

static void fail(const char *what) {
  fprintf(stderr, "cuda-host: %s: %s\n", what, strerror(errno));
  abort();
}

// -- settings --------------------------------------------------------------------------

static size_t size_setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  if (!text || !*text) return otherwise;
  char *end;
  long double number = strtold(text, &end);
  switch (*end) {
  case 'K': number *= 1024.0L; break;
  case 'M': number *= 1048576.0L; break;
  case 'G': number *= 1073741824.0L; break;
  }
  return (size_t)number;
}

// Multiprocessors of one card of each capability: K80 (one half), V100, T4, A100, A10,
// L4, H100 SXM. Source: NVIDIA's data sheets of these cards.
static int usual_multiprocessors(int major, int minor) {
  switch (10 * major + minor) {
  case 37: return 13;
  case 70: return 80;
  case 75: return 40;
  case 80: return 108;
  case 86: return 72;
  case 89: return 58;
  default: return 132;
  }
}

static void read_settings(void) {
  settings.devices = (int)size_setting("CUDA_HOST_DEVICES", 2);
  if (settings.devices < 1 || settings.devices > MAX_DEVICES) {
    errno = EINVAL;
    fail("CUDA_HOST_DEVICES is not 1 to 8");
  }
  settings.total_bytes = size_setting("CUDA_HOST_TOTAL", (size_t)16 << 30);
  settings.context_bytes = size_setting("CUDA_HOST_CONTEXT", 0);
  settings.other_bytes = size_setting("CUDA_HOST_OTHERS", 0);
  settings.major = 8;
  const char *capability = getenv("CUDA_HOST_CC");
  if (capability && sscanf(capability, "%d.%d", &settings.major, &settings.minor) != 2) {
    errno = EINVAL;
    fail("CUDA_HOST_CC is not MAJOR.MINOR");
  }
  settings.multiprocessors = (int)size_setting(
      "CUDA_HOST_SMS", (size_t)usual_multiprocessors(settings.major, settings.minor));
  const char *name = getenv("CUDA_HOST_NAME");
  snprintf(settings.name, sizeof settings.name, "%s", name ? name : "Substitute card");
  const char *values = getenv("CUDA_HOST_VALUES");
  settings.copies_values = !(values && !strcmp(values, "none"));
}

// -- the shared file -------------------------------------------------------------------

// The child of a fork has a file of its own: locks on the inherited one are the parent's.
static void before_fork(void) { pthread_mutex_lock(&mutex); }
static void in_parent(void) { pthread_mutex_unlock(&mutex); }
static void in_forked_child(void) {
  forked_child = own >= 0;
  own = -1;
  if (state_file >= 0) {
    close(state_file);
    state_file = open(getenv("CUDA_HOST_STATE"), O_RDWR | O_CLOEXEC);
    if (state_file < 0) fail("the shared state");
  }
  pthread_mutex_unlock(&mutex);
}

static void start(void) {
  read_settings();
  const char *log_path = getenv("CUDA_HOST_LOG");
  if (log_path && *log_path) log_file = fopen(log_path, "a");
  const char *path = getenv("CUDA_HOST_STATE");
  int sharing = MAP_PRIVATE | MAP_ANONYMOUS;
  if (path && *path) {
    state_file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    // New bytes of a file are zero: free slots.
    if (state_file < 0 || ftruncate(state_file, sizeof(State))) fail(path);
    sharing = MAP_SHARED;
  }
  state = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, sharing, state_file, 0);
  if (state == MAP_FAILED) fail("the shared state");
  pthread_atfork(before_fork, in_parent, in_forked_child);
}

const Settings *host_settings(void) {
  pthread_once(&once, start);
  return &settings;
}

static void lock(void) {
  pthread_once(&once, start);
  pthread_mutex_lock(&mutex);
  if (state_file >= 0) flock(state_file, LOCK_EX); // dropped if this process dies
}

static void unlock(void) {
  if (state_file >= 0) flock(state_file, LOCK_UN);
  pthread_mutex_unlock(&mutex);
}

static struct flock record_of(int slot) {
  return (struct flock){
      .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1};
}

// Tell whether a slot's process lives; free the slot if it does not.
static int is_live(int slot) {
  if (!state->slots[slot].pid) return 0;
  if (slot == own || state_file < 0) return 1;
  struct flock record = record_of(slot);
  if (fcntl(state_file, F_GETLK, &record) || record.l_type != F_UNLCK) return 1;
  memset(&state->slots[slot], 0, sizeof(Slot));
  return 0;
}

static Slot *own_slot(void) {
  for (int slot = 0; own < 0 && slot < MAX_PROCESSES; slot++) {
    if (is_live(slot)) continue;
    struct flock record = record_of(slot);
    if (state_file >= 0 && fcntl(state_file, F_SETLK, &record)) continue;
    state->slots[slot].pid = getpid();
    own = slot;
  }
  if (own < 0) {
    errno = EAGAIN;
    fail("more than 64 processes use the cards");
  }
  return &state->slots[own];
}

// -- bytes -----------------------------------------------------------------------------

static size_t sum_of(int device) {
  size_t sum = settings.other_bytes;
  for (int slot = 0; slot < MAX_PROCESSES; slot++) {
    if (!is_live(slot)) continue;
    sum += state->slots[slot].used_bytes[device];
    sum += state->slots[slot].context[device] ? settings.context_bytes : 0;
  }
  return sum;
}

static int has_room(int device, size_t bytes) {
  size_t used = sum_of(device);
  return used <= settings.total_bytes && bytes <= settings.total_bytes - used;
}

int host_take(int device, size_t bytes) {
  lock();
  int taken = has_room(device, bytes);
  if (taken) own_slot()->used_bytes[device] += bytes;
  unlock();
  return taken;
}

void host_give(int device, size_t bytes) {
  lock();
  own_slot()->used_bytes[device] -= bytes;
  unlock();
}

int host_make_context(int device) {
  lock();
  int made = own_slot()->context[device];
  if (!made && has_room(device, settings.context_bytes))
    made = own_slot()->context[device] = 1;
  unlock();
  return made;
}

int host_has_context(int device) {
  lock();
  int has = own >= 0 && state->slots[own].context[device];
  unlock();
  return has;
}

size_t host_used_bytes(int device) {
  lock();
  size_t sum = sum_of(device);
  unlock();
  return sum < settings.total_bytes ? sum : settings.total_bytes;
}

int host_holdings(int device, Holding *out, int room) {
  lock();
  int count = 0;
  for (int slot = 0; slot < MAX_PROCESSES; slot++) {
    if (!is_live(slot) || !state->slots[slot].context[device]) continue;
    if (count < room)
      out[count] = (Holding){state->slots[slot].pid,
                             state->slots[slot].used_bytes[device] + settings.context_bytes};
    count++;
  }
  unlock();
  return count;
}

int host_is_forked_child(void) { return forked_child; }

void host_log(const char *call, size_t bytes, int code, uint64_t address) {
  pthread_once(&once, start);
  if (!log_file) return;
  fprintf(log_file, "%s %zu %d 0x%llx\n", call, bytes, code, (unsigned long long)address);
  fflush(log_file);
}
