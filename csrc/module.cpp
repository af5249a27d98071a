// The Python module las_fast._C. It is empty: importing it loads the library, which registers the C++ ops with torch.
// Their schemas are in las_fast/ops.

#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
