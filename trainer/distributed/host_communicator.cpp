#include "trainer/distributed/host_communicator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace {

// Of `ranks` slices of n elements each, the sum or maximum into `out` (which may be one of the slices).
void sum_f32(const float* slices, int64_t n, int ranks, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        float sum = slices[i];
        for (int r = 1; r < ranks; ++r) sum += slices[r * n + i];
        out[i] = sum;
    }
}

float value(uint16_t bf16) { return std::bit_cast<float>(uint32_t(bf16) << 16); }
uint16_t rounded(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return uint16_t(std::isnan(x) ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void sum_bf16(const uint16_t* slices, int64_t n, int ranks, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        float sum = value(slices[i]);
        for (int r = 1; r < ranks; ++r) sum += value(slices[r * n + i]);
        out[i] = rounded(sum);
    }
}

void max_u32(const uint32_t* slices, int64_t n, int ranks, uint32_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t most = slices[i];
        for (int r = 1; r < ranks; ++r) most = std::max(most, slices[r * n + i]);
        out[i] = most;
    }
}

void reduce(const void* slices, int64_t n, int ranks, Element element, void* out) {
    switch (element) {
        case Element::f32: return sum_f32(static_cast<const float*>(slices), n, ranks, static_cast<float*>(out));
        case Element::bf16: return sum_bf16(static_cast<const uint16_t*>(slices), n, ranks, static_cast<uint16_t*>(out));
        case Element::u32: return max_u32(static_cast<const uint32_t*>(slices), n, ranks, static_cast<uint32_t*>(out));
    }
}

}  // namespace

HostCommunicator::HostCommunicator(int rank, int size, std::unique_ptr<Transport> transport, Watch* watch)
    : Communicator(rank, size), transport_(std::move(transport)), watch_(watch) {}

void HostCommunicator::do_all_gather(void* data, int64_t bytes, CUstream_st*) {
    const Watch::Waiting waiting(watch_, "all_gather");
    transport_->all_gather(data, bytes);
}

void HostCommunicator::do_all_reduce(void* data, int64_t count, Element element, Reduction, CUstream_st*) {
    const int64_t bytes = count * bytes_of(element);
    buffer_.resize(size_t(bytes) * size_t(size()));
    std::memcpy(buffer_.data() + bytes * rank(), data, size_t(bytes));
    {
        const Watch::Waiting waiting(watch_, "all_reduce");
        transport_->all_gather(buffer_.data(), bytes);
    }
    reduce(buffer_.data(), count, size(), element, data);
}

void HostCommunicator::do_reduce_scatter(void* data, int64_t count, Element element, CUstream_st*) {
    const int64_t bytes = count * bytes_of(element);
    {
        const Watch::Waiting waiting(watch_, "reduce_scatter");
        transport_->all_to_all(data, bytes);
    }
    buffer_.resize(size_t(bytes));  // the slices are read while the result is written
    reduce(data, count, size(), element, buffer_.data());
    std::memcpy(static_cast<char*>(data) + bytes * rank(), buffer_.data(), size_t(bytes));
}

void HostCommunicator::do_broadcast(void* data, int64_t bytes, int root, CUstream_st*) {
    buffer_.resize(size_t(bytes) * size_t(size()));
    if (rank() == root) std::memcpy(buffer_.data() + bytes * rank(), data, size_t(bytes));
    const Watch::Waiting waiting(watch_, "broadcast");
    transport_->all_gather(buffer_.data(), bytes);
    std::memcpy(data, buffer_.data() + bytes * root, size_t(bytes));
}
