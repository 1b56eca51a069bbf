#include "loops.h"

#define ROSE_ISA loops_default
#define ROSE_ISA_NAME "default"
#define ROSE_VECTOR_BITS 0
#include "loops.inl"
