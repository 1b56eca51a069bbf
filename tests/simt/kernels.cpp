// The kernels and their launchers, for the host. -I puts this folder's cuda_runtime.h first.
#include "cuda/launch.cu"
#include "cuda/norms.cu"
