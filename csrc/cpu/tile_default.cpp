#include "tile.h"

#define ROSE_ISA tile_kernels_default
#define ROSE_ISA_NAME "default"
#define ROSE_VECTOR_BITS 0
#include "tile.inl"
