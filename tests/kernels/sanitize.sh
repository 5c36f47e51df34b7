#!/usr/bin/env bash
# Repeats the recorded calls of the kernels, and stresses the thread pool, in two builds: one finds wrong
# accesses to memory and undefined behaviour, the other finds races. `make test-kernels` runs it.
#
# usage: sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
cpp=chargpt/compute/cpp
out=build/kernels
flags="-std=c++17 -O1 -g -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -w
    -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -pthread -I$cpp"

build() {  # name, flags
    ${CXX:-g++} $flags $2 tests/kernels/replay.cpp $cpp/*.cpp -o "$out/replay-$1"
    ${CXX:-g++} $flags $2 tests/kernels/pool_stress.cpp $cpp/pool.cpp -o "$out/pool_stress-$1"
}

replay() {  # name, threads; prints only differences
    "$out/replay-$1" "$out/calls" "$2" | { grep -v ' values equal$' || true; }
}

mkdir -p "$out"
build races "-fsanitize=thread" &
races=$!
build memory "-fsanitize=address,undefined -fno-sanitize-recover=all"
wait "$races"
"$1" tests/kernels/record.py "$out/calls"

replay memory 1
replay memory 3
# After a fork, the sanitizer takes the parent's threads for leaks.
ASAN_OPTIONS=detect_leaks=0 timeout 60 "$out/pool_stress-memory" 50000
# Threads after a fork are intended, and so are threads that sleep at the end.
export TSAN_OPTIONS=die_after_fork=0:atexit_sleep_ms=0
replay races 3
timeout 60 "$out/pool_stress-races" 50000
echo "no difference, and no report of a sanitizer"
