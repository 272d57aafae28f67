// A persistent pool of threads that runs one function on all of them, with cheap barriers inside it.
// Between runs the workers watch for the next one for kWatch, then sleep (an idle server costs nothing); inside a run
// barriers spin, since phases last microseconds.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arm {

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : size_(threads < 1 ? 1 : threads) {
    try {
      for (int i = 1; i < size_; i++) workers_.emplace_back([this, i] { loop(i); });
    } catch (...) {  // the system gives no more threads: a started one must be joined before it is destroyed
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }
  int size() const { return size_; }

  // Runs job(thread) on every thread, the caller being thread 0; returns when all are done.
  void run(const std::function<void(int)>& job) {
    if (size_ == 1) return job(0);
    pending_.store(size_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire); spins++) spins < kSpins ? relax() : std::this_thread::yield();
  }

  // All threads of a run meet here. After kSpins it yields, so that a machine with fewer free cores than threads moves on.
  void barrier() {
    if (size_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) spins < kSpins ? relax() : std::this_thread::yield();
    }
  }

 private:
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  static constexpr int kSpins = 4000;
  static constexpr std::chrono::microseconds kWatch{300};

  void loop(int index) {
    unsigned seen = 0;
    for (;;) {
      const auto started = std::chrono::steady_clock::now();
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() - started < kWatch) relax();
      const std::function<void(int)>* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (stop_) return;
        job = job_;
      }
      (*job)(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int)>* job_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<unsigned> generation_{0};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace arm
