// The Python module las_fast._C: empty, since importing it is what registers the ops of the other files with torch.

#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
