// A captured sequence of kernel launches, or the same launches made one by one (--no-graph).
#pragma once
#include <cuda_runtime.h>

#include <functional>

#include "kernels/common/cuda_check.h"

class CudaGraph {
  public:
    CudaGraph() = default;
    ~CudaGraph() {
        if (exec_ != nullptr) cudaGraphExecDestroy(exec_);  // of null it would leave an error behind for the next caller
    }
    CudaGraph(const CudaGraph&) = delete;
    CudaGraph& operator=(const CudaGraph&) = delete;

    // Enqueues `work` on the stream: eagerly, or by launching the graph of it, captured at the first call. The work must
    // use the same pointers and sizes every time.
    void run(bool use_graph, cudaStream_t stream, const std::function<void()>& work) {
        if (!use_graph) return work();
        if (exec_ == nullptr) capture(stream, work);
        CUDA_CHECK(cudaGraphLaunch(exec_, stream));
    }

  private:
    void capture(cudaStream_t stream, const std::function<void()>& work) {
        cudaGraph_t graph = nullptr;
        // Relaxed: libraries may load a kernel's code at its first launch, which the stricter modes forbid.
        CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
        try {
            work();
        } catch (...) {
            cudaStreamEndCapture(stream, &graph);
            cudaGraphDestroy(graph);
            cudaGetLastError();
            throw;
        }
        CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
        // Kernels keep the priority of the stream that they were captured from: communication goes first.
        const cudaError_t status = cudaGraphInstantiate(&exec_, graph, cudaGraphInstantiateFlagUseNodePriority);
        cudaGraphDestroy(graph);
        CUDA_CHECK(status);
    }
    cudaGraphExec_t exec_ = nullptr;
};
