// D (M, N) = alpha * A (M, K) * B (K, N) [+ bias (N)] [+ D] in float, row-major; an operand may be stored transposed.
//
// Each element is summed over k in order, in groups of 256 whose sums are then added: the same bits for any number of
// threads and any vector width. A linear's three products:
//
//   forward      y  = x * W^T    a = x,               b = W, b_transposed
//   grad_input   dx = dy * W     a = dy,              b = W
//   grad_weight  dW = dy^T * x   a = dy, a_transposed b = x
#pragma once

namespace reference {

struct Matmul {
    const float* a;
    bool a_transposed = false;  // stored (K, M)
    const float* b;
    bool b_transposed = false;  // stored (N, K)
    float* d;
    const float* bias = nullptr;
    float alpha = 1.0f;
    bool accumulate = false;
    int M, N, K;
};
void matmul(const Matmul& p);

}  // namespace reference
