#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "vectors.h"

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

namespace pool {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr microseconds IDLE_SPIN{60};  // a worker's wait for the next job before it sleeps
constexpr microseconds END_SPIN{20};   // the caller's wait for the last chunks before it sleeps
constexpr int MAX_THREADS = 255;
constexpr int BITS = 28;  // of a chunk's number
constexpr int64_t MAX_CHUNKS = (1 << BITS) - 1;

// Per caller: a kernel's working memory is for as many threads as its jobs get, even if another thread
// of Python sets another number meanwhile.
thread_local int n_threads = 1;

void relax() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Return whether `ready` came true within `time`.
template <class Ready>
bool spin(microseconds time, Ready ready) {
  const auto end = steady_clock::now() + time;
  do
    for (int i = 0; i < 16; i++) {
      if (ready()) return true;
      relax();
    }
  while (steady_clock::now() < end);
  return false;
}

// The chunks [first, end) that are left of a thread's share, and the threads of the job, in one word: a
// chunk is taken by a change of the word, which fails if anything has changed meanwhile.
struct Share {
  int64_t first, end;
  int threads;

  explicit Share(uint64_t word)
      : first(word >> BITS & MAX_CHUNKS), end(word & MAX_CHUNKS), threads((int)(word >> 2 * BITS)) {}
  Share(int64_t first, int64_t end, int threads) : first(first), end(end), threads(threads) {}
  uint64_t word() const {
    return (uint64_t)threads << 2 * BITS | (uint64_t)first << BITS | (uint64_t)end;
  }
};

class Pool {
 public:
  // Run a job, or return false if another thread's job is running.
  bool run(int64_t n, int wanted, Body body, void* context) {
    std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    if (!only) return false;
    start_workers(wanted - 1);
    body_ = body;
    context_ = context;
    finished_ = 0;
    threads_ = wanted;
    for (int slot = 0; slot < wanted; slot++)
      shares_[slot].word = Share(n * slot / wanted, n * (slot + 1) / wanted, wanted).word();
    job_++;
    if (sleeping_ > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    wait_for(n - take_chunks(0));
    return true;
  }

 private:
  // Take a chunk of the share of thread `owner`: the owner from its start, another from its end.
  bool take(int owner, int slot, int64_t* chunk) {
    std::atomic<uint64_t>& word = shares_[owner].word;
    for (uint64_t before = word;;) {
      Share share(before);
      if (share.first >= share.end || slot >= share.threads) return false;
      *chunk = owner == slot ? share.first++ : --share.end;
      if (word.compare_exchange_weak(before, share.word())) return true;
    }
  }

  // Compute chunks until none is left; return how many. A thread starts with its own share, which is
  // the same in each job of a size: its part of the values is then still in its cache.
  int64_t take_chunks(int slot) {
    int64_t taken = 0, chunk;
    const int n = threads_;
    for (int i = 0; i < n; i++)
      while (take((slot + i) % n, slot, &chunk)) {
        // The job cannot end before this chunk does, so its fields are stable from here on.
        body_.load()(context_, chunk, slot);
        taken++;
        if (slot > 0) finish_one();
      }
    return taken;
  }

  void finish_one() {
    finished_++;
    if (!caller_sleeps_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }

  // Wait until the workers have finished n chunks. The caller soon sleeps: its processor is then free
  // for a worker that has lost its own to another program.
  void wait_for(int64_t n) {
    auto ready = [&] { return finished_ == n; };
    if (ready() || spin(END_SPIN, ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_ = true;
    done_.wait(lock, ready);
    caller_sleeps_ = false;
  }

  void work(int slot) {
    for (;;) {
      const uint64_t job = job_;
      auto next = [&] { return job_ != job; };
      take_chunks(slot);
      if (spin(IDLE_SPIN, next)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;
      wake_.wait(lock, next);
      sleeping_--;
    }
  }

  void start_workers(int wanted) {
    if (n_workers_ >= wanted) return;
#ifndef _WIN32
    sigset_t all, before;  // signals are for the threads of Python
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    try {
      for (; n_workers_ < wanted; n_workers_++) {
        const int slot = n_workers_ + 1;
        std::thread([this, slot] { work(slot); }).detach();
      }
    } catch (...) {  // no more threads to be had: those that are there do the work
    }
#ifndef _WIN32
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  struct alignas(64) Line {
    std::atomic<uint64_t> word{0};
  };
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  Line shares_[MAX_THREADS];
  alignas(64) std::atomic<uint64_t> job_{0};      // how many jobs have started
  alignas(64) std::atomic<int64_t> finished_{0};  // chunks that workers have finished
  std::atomic<int> sleeping_{0}, threads_{1};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  int n_workers_ = 0;
};

// Never destroyed: its threads may sleep in it until the process ends.
std::atomic<Pool*> current{nullptr};

Pool& instance() {
  static const bool once = [] {
    current = new Pool;
#ifndef _WIN32
    // A child process has no workers: it starts its own.
    pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    return true;
  }();
  (void)once;
  return *current;
}

}  // namespace

int threads() { return n_threads; }

void run(int64_t n, Body body, void* context) {
  struct Slice {
    Body body;
    void* context;
    int64_t first;
  } slice{body, context, 0};
  auto shifted = [](void* slice, int64_t chunk, int slot) {
    Slice& it = *(Slice*)slice;
    it.body(it.context, it.first + chunk, slot);
  };
  for (int64_t first = 0; first < n; first += MAX_CHUNKS) {
    slice.first = first;
    const int64_t here = std::min(n - first, MAX_CHUNKS);
    const int wanted = (int)std::min<int64_t>(threads(), here);
    if (wanted > 1 && instance().run(here, wanted, shifted, &slice)) continue;
    for (int64_t i = 0; i < here; i++) shifted(&slice, i, 0);
  }
}

}  // namespace pool

EXPORT void chargpt_set_threads(int n) {
  pool::n_threads = std::max(1, std::min(n, pool::MAX_THREADS));
}
