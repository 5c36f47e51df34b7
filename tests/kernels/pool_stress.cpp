// Jobs of the thread pool under stress, for a build with a sanitizer. Prints nothing if all is well.
//
// usage: pool_stress ROUNDS

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

extern "C" void chargpt_set_threads(int);

namespace {

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(1);
}

// Run a job. Each chunk must run once; chunks at the same time must have different slots.
void job(int64_t chunks, int slots) {
  std::vector<int64_t> values(chunks);  // not atomic: a sanitizer reports a chunk that runs twice
  std::vector<int64_t> sums(slots);     // likewise two chunks in one slot, and a slot out of range
  parallel(chunks, [&](int64_t chunk, int slot) {
    values[chunk] += chunk + 1;
    sums[slot] += chunk + 1;
  });
  int64_t by_chunk = 0, by_slot = 0;
  for (int64_t value : values) by_chunk += value;
  for (int64_t sum : sums) by_slot += sum;
  check(by_chunk == chunks * (chunks + 1) / 2, "the sum over chunks");
  check(by_slot == by_chunk, "the sum over slots");
}

// Many small jobs; the number of threads changes between them.
void small_jobs(int rounds) {
  for (int i = 0; i < rounds; i++) {
    const int threads = i * 7 % 4 + 1;
    chargpt_set_threads(threads);
    job(i % 23, threads);
    if (i % 64 == 0) usleep(200);  // long enough for the workers to sleep
  }
}

// Several callers at once: one has the workers, the others compute alone. Each has a number of threads
// of its own, as PyTorch's threads have, and its working memory is for that number.
void callers_at_once(int rounds) {
  std::vector<std::thread> callers;
  for (int threads : {2, 3, 4})
    callers.emplace_back([=] {
      chargpt_set_threads(threads);
      for (int j = 0; j < rounds; j++) job(1 + j % 17, threads);
    });
  for (std::thread& caller : callers) caller.join();
}

// While one thread's job runs, another's must neither wait for it nor disturb it.
void caller_during_a_job() {
  chargpt_set_threads(2);
  std::atomic<bool> done{false};
  std::thread other;
  parallel(2, [&](int64_t chunk, int) {
    if (chunk > 0) return;
    other = std::thread([&] {
      chargpt_set_threads(2);
      job(100, 2);
      done = true;
    });
    while (!done) std::this_thread::yield();
  });
  other.join();
}

// More chunks than a job can hold: the pool cuts them.
void many_chunks() {
  chargpt_set_threads(4);
  job((1 << 18) + 1000, 4);
}

// The child has none of its parent's workers. Both compute, and end right after a job.
void fork_between_jobs(int rounds) {
  for (int i = 0; i < rounds; i++) {
    chargpt_set_threads(1 + i % 4);
    job(9, 4);
    const pid_t child = fork();
    check(child >= 0, "fork");
    job(50, 4);
    if (child == 0) {
      small_jobs(20);
      std::exit(0);
    }
    int status = 0;
    check(waitpid(child, &status, 0) == child && status == 0, "the child's exit");
  }
}

// Another thread forks while a job runs. These jobs allocate nothing: a sanitizer's allocator, unlike
// the C library's, does not survive a fork during an allocation.
void fork_during_jobs(int rounds) {
  chargpt_set_threads(3);
  std::atomic<int> jobs{0};
  std::atomic<bool> done{false}, ended{false};
  std::thread([&] {
    chargpt_set_threads(3);
    int64_t values[40] = {};
    for (; !done; jobs++) parallel(40, [&](int64_t chunk, int) { values[chunk]++; });
    for (int64_t value : values) check(value == jobs, "the number of jobs");
    ended = true;
  }).detach();  // ThreadSanitizer does not know that a joinable thread is gone after a fork
  while (jobs == 0) std::this_thread::yield();
  for (int i = 0; i < rounds; i++) {
    const pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
      small_jobs(20);
      std::exit(0);
    }
    int status = 0;
    check(waitpid(child, &status, 0) == child && status == 0, "the exit of a child of a busy parent");
  }
  done = true;
  while (!ended) std::this_thread::yield();
}

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  small_jobs(rounds);
  callers_at_once(rounds / 4);
  caller_during_a_job();
  many_chunks();
  fork_between_jobs(rounds / 500);
  fork_during_jobs(rounds / 500);
  chargpt_set_threads(4);
  job(1000, 4);
}
