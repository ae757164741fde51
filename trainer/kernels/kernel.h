// What every source of kernels includes.
#pragma once

// A function that Python calls. Write its declaration on one line or several, beginning with "KERNEL void" at the first column,
// with arguments of the types that trainer/kernels/__init__.py lists: the loader reads it there.
#define KERNEL extern "C" __attribute__((visibility("default")))
