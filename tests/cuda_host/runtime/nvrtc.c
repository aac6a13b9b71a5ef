// NVRTC, which compiles kernels as the program runs: here they are never run, so nothing is
// compiled. PyTorch must keep none of it: USE_PYTORCH_KERNEL_CACHE=0.

#include "host.h"

#include <stdlib.h>

typedef int nvrtcResult; // NVRTC_SUCCESS is 0
typedef struct {
  char name[1]; // what a kernel is called once it is compiled
} Program;

EXPORT nvrtcResult nvrtcCreateProgram(Program **out, UNUSED const char *source,
                                      UNUSED const char *name, UNUSED int count,
                                      UNUSED const char *const *headers,
                                      UNUSED const char *const *names) {
  *out = calloc(1, sizeof(Program));
  return 0;
}

EXPORT nvrtcResult nvrtcDestroyProgram(Program **program) {
  free(*program);
  *program = NULL;
  return 0;
}

EXPORT nvrtcResult nvrtcAddNameExpression(UNUSED Program *program, UNUSED const char *name) {
  return 0;
}

EXPORT nvrtcResult nvrtcCompileProgram(UNUSED Program *program, UNUSED int count,
                                       UNUSED const char *const *options) {
  return 0;
}

EXPORT nvrtcResult nvrtcGetLoweredName(Program *program, UNUSED const char *name,
                                       const char **out) {
  *out = program->name;
  return 0;
}

static nvrtcResult size_of_nothing(size_t *out) {
  *out = 1;
  return 0;
}

static nvrtcResult nothing(char *out) {
  *out = 0;
  return 0;
}

EXPORT nvrtcResult nvrtcGetPTXSize(UNUSED Program *program, size_t *out) {
  return size_of_nothing(out);
}
EXPORT nvrtcResult nvrtcGetPTX(UNUSED Program *program, char *out) { return nothing(out); }
EXPORT nvrtcResult nvrtcGetCUBINSize(UNUSED Program *program, size_t *out) {
  return size_of_nothing(out);
}
EXPORT nvrtcResult nvrtcGetCUBIN(UNUSED Program *program, char *out) { return nothing(out); }
EXPORT nvrtcResult nvrtcGetProgramLogSize(UNUSED Program *program, size_t *out) {
  return size_of_nothing(out);
}
EXPORT nvrtcResult nvrtcGetProgramLog(UNUSED Program *program, char *out) {
  return nothing(out);
}

EXPORT nvrtcResult nvrtcVersion(int *major, int *minor) {
  *major = CUDA_VERSION / 1000;
  *minor = CUDA_VERSION % 1000 / 10;
  return 0;
}

EXPORT const char *nvrtcGetErrorString(UNUSED nvrtcResult result) { return "NVRTC_SUCCESS"; }
