/* The calls of the CUDA driver that Triton makes, each of which does nothing and says that it worked: `bench.host`. */

#include <string.h>

#define DOES_NOTHING(name) int name(void) { return 0; }

static int something;

DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuLaunchKernelEx)
DOES_NOTHING(cuModuleUnload)

int cuCtxGetCurrent(void **context) { *context = &something; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &something; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &something; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &something; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters) { *clusters = 1; return 0; }
int cuPointerGetAttribute(unsigned long long *value, int attribute, unsigned long long address) { *value = address; return 0; }
int cuTensorMapEncodeTiled(void *map) { memset(map, 0, 128); return 0; }
int cuTensorMapEncodeIm2col(void *map) { memset(map, 0, 128); return 0; }

/* Of a kernel: 1024 threads fit (CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK is 0), it spills nothing. */
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }

/* Of the device: as an H100's compute capability (75, 76) and multiprocessors (16); shared memory, clocks and widths. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 232448;
  return 0;
}
