// A stand-in for CUDA's driver: device memory is POSIX shared memory, a handle is its name. For tests of who calls it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST 256
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400 };

typedef struct {
  char bytes[64];
} Handle;

static struct {
  uint64_t base;
  size_t size;
  Handle handle;
  int shareable, opened;
} known[MOST];
static int count = 0;

static int add(const Handle* handle, size_t size, int shareable, int opened, int flags) {
  const int file = shm_open(handle->bytes, flags, 0600);
  if (file < 0) return -1;
  if (flags & O_CREAT && ftruncate(file, (off_t)size)) return -1;
  void* memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED || count == MOST) return -1;
  known[count].base = (uint64_t)memory;
  known[count].size = size;
  known[count].handle = *handle;
  known[count].shareable = shareable;
  known[count].opened = opened;
  return count++;
}

// For tests: memory that a trainer allocates. shareable: 0 for that of expandable segments.
uint64_t fake_alloc(const char* name, size_t size, int shareable) {
  Handle handle = {{0}};
  snprintf(handle.bytes, sizeof handle.bytes, "/%s", name);
  const int at = add(&handle, size, shareable, 0, O_CREAT | O_RDWR);
  return at < 0 ? 0 : known[at].base;
}

int fake_opened(void) {
  int opened = 0;
  for (int i = 0; i < count; ++i) opened += known[i].opened;
  return opened;
}

int cuMemGetAddressRange_v2(uint64_t* base, size_t* size, uint64_t pointer) {
  for (int i = 0; i < count; ++i)
    if (known[i].base <= pointer && pointer < known[i].base + known[i].size) {
      *base = known[i].base;
      *size = known[i].size;
      return 0;
    }
  return INVALID_VALUE;
}

int cuIpcGetMemHandle(Handle* handle, uint64_t base) {
  for (int i = 0; i < count; ++i)
    if (known[i].base == base && known[i].shareable) {
      *handle = known[i].handle;
      return 0;
    }
  return INVALID_VALUE;
}

int cuIpcOpenMemHandle_v2(uint64_t* pointer, Handle handle, unsigned flags) {
  const int file = flags == 1 ? shm_open(handle.bytes, O_RDWR, 0600) : -1;
  struct stat found;
  if (file < 0 || fstat(file, &found)) return INVALID_HANDLE;
  close(file);
  const int at = add(&handle, (size_t)found.st_size, 1, 1, O_RDWR);
  if (at < 0) return OUT_OF_MEMORY;
  *pointer = known[at].base;
  return 0;
}

int cuIpcCloseMemHandle(uint64_t pointer) {
  for (int i = 0; i < count; ++i)
    if (known[i].base == pointer && known[i].opened) {
      munmap((void*)pointer, known[i].size);
      known[i] = known[--count];
      return 0;
    }
  return INVALID_VALUE;
}
