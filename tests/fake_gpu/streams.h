// A stand-in for the GPU on the CPU: memory is the host's, streams are queues whose work runs when somebody waits for it, in any
// order that streams and events allow, drawn at random. What a schedule forgot to wait for so shows as wrong numbers.
// Of the CUDA runtime (runtime.cpp) and of the kernels (kernels.cpp) there is what trainer/gpu_parameters calls.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace fake_gpu {

// Appends work to a stream, like a kernel's launch. The null stream is one as any other.
void enqueue(cudaStream_t stream, std::function<void()> work);
// Until all streams are empty; an Error if one waits for what nobody will do.
void run_all();
// Collectives take part in the order of the communication stream of every rank; the draws need not agree.
void seed(uint32_t value);

}  // namespace fake_gpu
