// Launchers of the kernels, callable from plain C++. Each enqueues a constant number of launches on
// `stream` and returns null, or what CUDA said went wrong.
#pragma once

#include "table.h"

namespace rose {
namespace cuda {

using Stream = void*;  // cudaStream_t

const char* select(SelectArguments arguments, Stream stream);
const char* capture(CaptureArguments arguments, Stream stream);
const char* bracket_capture(SelectArguments arguments, Stream stream);
const char* bracket_update(StepArguments arguments, Stream stream);
const char* update(UpdateArguments arguments, Stream stream);
const char* sums_of_squares(SquaresArguments arguments, Stream stream);
const char* clip_factors(ClipArguments arguments, Stream stream);
const char* select_tensors(TensorsArguments arguments, Stream stream);

// Whether `stream` is being captured into a CUDA graph.
const char* is_capturing(Stream stream, bool& capturing);

// Copies words to device memory, as arguments of as many launches as that takes. A graph copies
// arguments where it would read a host's memory again at every replay.
const char* write_words(uint64_t* to, const uint64_t* words, int64_t count, Stream stream);

}  // namespace cuda
}  // namespace rose
