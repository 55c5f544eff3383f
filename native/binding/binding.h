/*
 * What the binding's files share. Only files of native/binding include Python.h.
 */
#ifndef PBK_BINDING_H
#define PBK_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "pbk/node.h"

extern struct PyModuleDef pbk_module_def;

struct pbk_module_state {
    PyTypeObject *journal_type;
    PyTypeObject *nodes_type;
    PyTypeObject *dispatcher_type; /* set by pbk_add_dispatcher, may be NULL */
};

/* Adds the type Dispatcher to the module: 0, or -1 with an exception. Defined in dispatcher_binding.c; weak, so that the
 * module also links without it. */
int pbk_add_dispatcher(PyObject *module) __attribute__((weak));

/* The nodes inside a Python object of type Nodes; borrowed: keep a reference to the object for as long as they are used.
 * NULL with TypeError (another type) or ValueError (closed). */
struct pbk_nodes *pbk_binding_nodes(PyObject *object);

/* Raises OSError for a positive errno and returns NULL. */
PyObject *pbk_binding_raise(int error_number);
/* The same for a result of the core: a negative errno, or PBK_NO_OBJECT as ENOTSUP. reason, if not NULL, replaces the errno's
 * text. */
PyObject *pbk_binding_fail(int result, const char *reason);

/* Converters for "O&": range-checked, unlike "I" and "K". */
int pbk_binding_u32(PyObject *object, void *to);
int pbk_binding_u64(PyObject *object, void *to);
int pbk_binding_i64(PyObject *object, void *to);
/* const char * out of bytes without NUL; borrowed. */
int pbk_binding_path(PyObject *object, void *to);

int pbk_add_journal(PyObject *module);
int pbk_add_nodes(PyObject *module);

struct pbk_journal;
/* The journal inside of a Python object of type Journal, borrowed; NULL with TypeError. */
struct pbk_journal *pbk_binding_journal(PyObject *module, PyObject *object);

#endif
