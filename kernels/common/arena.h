// All device memory of a run, from one allocation at start. First every user requests its buffers, then allocate() gets
// the memory, zeroes it and fills in the pointers. Nothing is allocated in a step.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // `pointer` must stay where it is until allocate(), which writes to it. `row` names the line of the memory table that
    // the bytes are counted in. A count of zero leaves a null pointer.
    template <class T>
    void request(T*& pointer, size_t count, const std::string& row) {
        pointer = nullptr;
        if (count > 0) requests_.push_back({reinterpret_cast<void**>(&pointer), count * sizeof(T), row});
    }

    void require_fits() const;  // Error that states the total and what is free, when it does not
    // `take`: where the memory comes from; it is given back with the arena. cudaMalloc's without it, or where it returns null.
    void allocate(const std::function<std::shared_ptr<void>(size_t bytes)>& take = {});

    struct Row {
        std::string what;
        size_t bytes;
    };
    std::vector<Row> table() const;  // in order of first request
    size_t total_bytes() const;

  private:
    struct Request {
        void** pointer;
        size_t bytes;
        std::string row;
    };
    std::vector<Request> requests_;
    std::shared_ptr<void> base_;
};
