// A stream for compute and one of high priority for communication, forked from it and joined again, also inside of a capture.
#pragma once
#include "kernels/common/cuda_check.h"

struct Streams {
    cudaStream_t compute = nullptr, communication = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;

    Streams() {
        int lowest = 0, highest = 0;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
        CUDA_CHECK(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
        CUDA_CHECK(cudaStreamCreateWithPriority(&communication, cudaStreamNonBlocking, highest));
        for (cudaEvent_t* event : {&forked, &joined}) CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    ~Streams() {
        cudaEventDestroy(forked), cudaEventDestroy(joined);
        cudaStreamDestroy(compute), cudaStreamDestroy(communication);
    }
    Streams(const Streams&) = delete;
    Streams& operator=(const Streams&) = delete;

    void fork() const { fork_from(compute); }
    void join() const { join_to(compute); }
    void fork_from(cudaStream_t stream) const {
        CUDA_CHECK(cudaEventRecord(forked, stream));
        CUDA_CHECK(cudaStreamWaitEvent(communication, forked));
    }
    void join_to(cudaStream_t stream) const {
        CUDA_CHECK(cudaEventRecord(joined, communication));
        CUDA_CHECK(cudaStreamWaitEvent(stream, joined));
    }
};
