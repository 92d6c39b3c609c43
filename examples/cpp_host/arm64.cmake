# Build for 64-bit Arm Linux on another machine: cmake -DCMAKE_TOOLCHAIN_FILE=examples/cpp_host/arm64.cmake
# The compiler is Debian's g++-aarch64-linux-gnu; CMAKE_PREFIX_PATH must be that of an aarch64 wheel of executorch.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
