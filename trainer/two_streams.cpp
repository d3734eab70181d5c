#include "trainer/two_streams.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"

namespace {
bool communicates(const Schedule& schedule) {
    return std::any_of(schedule.begin(), schedule.end(), [](const Operation& o) { return communicates(o.task); });
}
}  // namespace

TwoStreams::~TwoStreams() {
    if (communication_ == nullptr) return;
    cudaStreamSynchronize(communication_);
    for (const cudaEvent_t event : ended_) cudaEventDestroy(event);
    cudaEventDestroy(forked_);
    cudaEventDestroy(joined_);
    cudaStreamDestroy(communication_);
}

void TwoStreams::prepare(const Schedule& schedule) {
    if (!communicates(schedule)) return;
    if (communication_ == nullptr) {
        int lowest = 0, highest = 0;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
        CUDA_CHECK(cudaStreamCreateWithPriority(&communication_, cudaStreamNonBlocking, highest));
        for (cudaEvent_t* event : {&forked_, &joined_}) CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    while (ended_.size() < schedule.size()) {
        cudaEvent_t event = nullptr;
        CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        ended_.push_back(event);
    }
}

void TwoStreams::run(const Schedule& schedule, cudaStream_t compute, const Work& work) {
    if (!communicates(schedule)) {
        for (const Operation& operation : schedule) work(operation, compute);
        return;
    }
    REQUIRE(ended_.size() >= schedule.size(), "two streams: %zu operations, prepared for %zu", schedule.size(), ended_.size());
    std::vector<bool> awaited(schedule.size());
    for (const Operation& operation : schedule)
        if (operation.after != kNothing) awaited[size_t(operation.after)] = true;

    CUDA_CHECK(cudaEventRecord(forked_, compute));
    CUDA_CHECK(cudaStreamWaitEvent(communication_, forked_));
    for (size_t i = 0; i < schedule.size(); ++i) {
        const Operation& operation = schedule[i];
        const cudaStream_t stream = communicates(operation.task) ? communication_ : compute;
        if (operation.after != kNothing) CUDA_CHECK(cudaStreamWaitEvent(stream, ended_[size_t(operation.after)]));
        work(operation, stream);
        if (awaited[i]) CUDA_CHECK(cudaEventRecord(ended_[i], stream));
    }
    CUDA_CHECK(cudaEventRecord(joined_, communication_));
    CUDA_CHECK(cudaStreamWaitEvent(compute, joined_));
}
