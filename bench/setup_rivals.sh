#!/bin/sh
# Builds the engines that engines.py compares with ours, each in an environment of its own: bench/setup_rivals.sh [FOLDER]
# Needs Python 3.11, a C++ compiler, CMake and some ten minutes; nothing is installed outside FOLDER.
set -eu
folder=${1:-runs/rivals}
python=${PYTHON:-python3}
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

"$python" -m venv "$folder/llama"
"$folder/llama/bin/python" -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36

"$python" -m venv "$folder/chatglm"
CMAKE_ARGS=-DCMAKE_POLICY_VERSION_MINIMUM=3.5 \
    "$folder/chatglm/bin/python" -m pip install --quiet --no-binary chatglm-cpp chatglm-cpp==0.4.2

# chatglm.cpp has a thread for each core, or for each second one of more than four, and takes no other number: this
# library, loaded before it, tells it of so many cores that it has HARDWARE_CONCURRENCY threads.
cc -shared -fPIC -o "$folder/chatglm/hardware_concurrency.so" -x c - <<'END'
#include <stdlib.h>

/* std::thread::hardware_concurrency() */
unsigned _ZNSt6thread20hardware_concurrencyEv(void) {
    const char *text = getenv("HARDWARE_CONCURRENCY");
    unsigned threads = text ? (unsigned)atoi(text) : 0;
    return threads > 4 ? 2 * threads : threads;
}
END
