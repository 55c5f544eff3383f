/* A file without a name whose content is the input's. */
#ifndef PBK_FUZZ_FILE_H
#define PBK_FUZZ_FILE_H

#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "pbk/io.h"

static inline int make_memory_file(const uint8_t *data, size_t n)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    CHECK(fd >= 0 && pbk_pwrite_full(fd, data, n, 0) == 0);
    return fd;
}

#endif
