// The operators register themselves when the library is loaded; this only makes it a Python module.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cpu() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1,      nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
