#include "tile.h"

#define ROSE_ISA tile_kernels_default
#define ROSE_ISA_NAME "default"
#include "tile.inl"
