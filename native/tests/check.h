/* The one assertion of the tests and of the fuzz targets. Not assert(3): it is there in every build, and says errno. */
#ifndef PBK_CHECK_H
#define PBK_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);                          \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
