// Which version of the C interface a library has. A function that takes something else than before is called all the same, with whatever comes
// of it, by Python that is newer than the library or older; so this number counts up with every change of linattn.h or runs.h, here and in
// hf_linattn/ops/cuda.py, and a library of another one is not called.
#pragma once

#define LINATTN_INTERFACE 2

#ifdef __cplusplus
extern "C" {
#endif

int linattn_interface(void);

#ifdef __cplusplus
}
#endif
