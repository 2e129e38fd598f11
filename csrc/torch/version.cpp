// What this library was built from: dtokd_kernels/libraries.py looks for the mark before it loads
// the file, so that a library of other sources than the Python files beside it is never called.

#ifndef DTOKD_VERSION  // the emulation, which is built for the tests alone
#define DTOKD_VERSION "unknown"
#endif

extern "C" __attribute__((used, visibility("default"))) const char dtokd_version[] =
    "dtokd-version:" DTOKD_VERSION;
