// Threads that work on items in any order; the items come back in the order in which they were given.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

template <typename Item>
class OrderedPool {
  public:
    using Work = std::function<void(Item&, int thread)>;

    OrderedPool(int threads, Work work) : work_(std::move(work)) {
        for (int thread = 0; thread < threads; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
    }
    ~OrderedPool() {  // what nobody has begun is dropped
        {
            const std::lock_guard lock(mutex_);
            closed_ = true;
            waiting_.clear();
        }
        more_.notify_all();
    }
    OrderedPool(const OrderedPool&) = delete;
    OrderedPool& operator=(const OrderedPool&) = delete;

    void push(std::unique_ptr<Item> item) {
        const std::lock_guard lock(mutex_);
        jobs_.push_back(std::make_shared<Job>(std::move(item)));
        waiting_.push_back(jobs_.back());
        more_.notify_one();
    }

    bool empty() const { return jobs_.empty(); }  // of the thread that pushes and pops

    // The oldest item, as soon as it is done; throws what its work threw.
    std::unique_ptr<Item> pop() {
        std::unique_lock lock(mutex_);
        done_.wait(lock, [&] { return jobs_.front()->done; });
        const std::shared_ptr<Job> job = std::move(jobs_.front());
        jobs_.pop_front();
        if (job->error) std::rethrow_exception(job->error);
        return std::move(job->item);
    }

  private:
    struct Job {
        explicit Job(std::unique_ptr<Item> its) : item(std::move(its)) {}
        std::unique_ptr<Item> item;
        std::exception_ptr error;
        bool done = false;
    };

    void serve(int thread) {
        std::unique_lock lock(mutex_);
        while (true) {
            more_.wait(lock, [&] { return closed_ || !waiting_.empty(); });
            if (closed_) return;
            const std::shared_ptr<Job> job = std::move(waiting_.front());
            waiting_.pop_front();
            lock.unlock();
            try {
                work_(*job->item, thread);
            } catch (...) {
                job->error = std::current_exception();
            }
            lock.lock();
            job->done = true;
            done_.notify_one();
        }
    }

    Work work_;
    std::mutex mutex_;
    std::condition_variable more_, done_;
    std::deque<std::shared_ptr<Job>> jobs_, waiting_;
    bool closed_ = false;
    std::vector<std::jthread> threads_;  // last: joined before the rest goes
};
