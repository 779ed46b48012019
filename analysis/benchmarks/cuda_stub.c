/* The CUDA driver and runtime of a machine without a GPU, for fake tensors.
 *
 * PyTorch asks them for a device before it runs a backward pass or enters autocast on CUDA, even where no kernel is launched.
 * Loaded by LD_PRELOAD, this library answers that there is one: an H100 without memory of its own. Calls succeed and do
 * nothing, those that are not written here through functions that `fake_cuda.py` generates.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define ANSWER(call, value) int call { value; return 0; }

ANSWER(cudaGetDeviceCount(int *count), *count = 1)
ANSWER(cudaGetDevice(int *device), *device = 0)
ANSWER(cudaDriverGetVersion(int *version), *version = 13000)
ANSWER(cudaDeviceGetStreamPriorityRange(int *least, int *greatest), (*least = 0, *greatest = -1))
ANSWER(cudaDeviceCanAccessPeer(int *can, int device, int peer), *can = 0)
ANSWER(cudaDeviceGetAttribute(int *value, int attribute, int device), *value = 0)
ANSWER(cudaMemGetInfo(size_t *free, size_t *total), *free = *total = (size_t)80 << 30)
ANSWER(cudaStreamIsCapturing(void *stream, int *status), *status = 0)
ANSWER(cudaStreamGetPriority(void *stream, int *priority), *priority = 0)
ANSWER(cudaHostAlloc(void **memory, size_t bytes, unsigned flags), *memory = malloc(bytes))
ANSWER(cudaFreeHost(void *memory), free(memory))
ANSWER(cudaMalloc(void **memory, size_t bytes), *memory = (void *)((size_t)1 << 40)) /* nobody reads or writes it */
ANSWER(cudaPointerGetAttributes(void *attributes, const void *memory), memset(attributes, 0, 24))
ANSWER(cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active), (*flags = 0, *is_active = 1))
ANSWER(cuDeviceGetCount(int *count), *count = 1)

static void *fresh(void) {
    static size_t number = 0;
    return (void *)__atomic_add_fetch(&number, 1, __ATOMIC_RELAXED);
}
ANSWER(cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority), *stream = fresh())
ANSWER(cudaStreamCreateWithFlags(void **stream, unsigned flags), *stream = fresh())
ANSWER(cudaEventCreateWithFlags(void **event, unsigned flags), *event = fresh())

/* Offsets in cudaDeviceProp; the number of multiprocessors lies at 388 before CUDA 13. */
int cudaGetDeviceProperties(char *properties, int device) {
    memset(properties, 0, 640);
    strcpy(properties, "fake tensors");
    *(size_t *)(properties + 288) = (size_t)80 << 30;
    *(int *)(properties + 308) = 32; /* threads of a warp */
    *(int *)(properties + 360) = 9;  /* compute capability 9.0 */
    *(int *)(properties + 384) = *(int *)(properties + 388) = 132;
    return 0;
}
ANSWER(cudaGetDeviceProperties_v2(char *properties, int device), cudaGetDeviceProperties(properties, device))

static int nothing(void) { return 0; }

/* PyTorch looks up the driver's functions by name. */
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (*function == NULL) *function = (void *)nothing;
    if (status != NULL) *status = 0;
    return 0;
}
ANSWER(cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status),
       cudaGetDriverEntryPointByVersion(name, function, 0, flags, status))
