/* The Python type Journal. Its methods may be called from any thread; those that touch the disk give up the GIL. */
#include "binding.h"

#include "pbk/journal.h"

struct journal_object {
    PyObject_HEAD
    struct pbk_journal *journal;
};

struct pbk_journal *pbk_binding_journal(PyObject *module, PyObject *object)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    if (!PyObject_TypeCheck(object, state->journal_type)) {
        PyErr_SetString(PyExc_TypeError, "journal is not a Journal");
        return NULL;
    }
    return ((struct journal_object *)object)->journal;
}

static PyObject *journal_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "end", NULL};
    int fd;
    uint64_t end;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO&:Journal", names, &fd, pbk_binding_u64, &end))
        return NULL;
    if (end < PBK_JOURNAL_HEADER || end > INT64_MAX) {
        PyErr_SetString(PyExc_ValueError, "end of the journal is out of range");
        return NULL;
    }
    struct journal_object *self = (struct journal_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->journal = pbk_journal_new(fd, end);
    if (self->journal == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void journal_dealloc(struct journal_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    pbk_journal_free(self->journal);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *journal_append(struct journal_object *self, PyObject *payload)
{
    Py_buffer data;
    int err;
    if (PyObject_GetBuffer(payload, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    if (data.len < 1 || data.len > (Py_ssize_t)PBK_JOURNAL_MAX_PAYLOAD) {
        PyErr_SetString(PyExc_ValueError, "payload is empty or longer than 16 MiB");
        PyBuffer_Release(&data);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    err = pbk_journal_append(self->journal, data.buf, (size_t)data.len, NULL);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *journal_sync(struct journal_object *self, PyObject *Py_UNUSED(unused))
{
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_journal_sync(self->journal);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *journal_get_end(struct journal_object *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(pbk_journal_end(self->journal));
}

static PyObject *journal_get_synced(struct journal_object *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(pbk_journal_synced(self->journal));
}

static PyMethodDef methods[] = {
    {"append", (PyCFunction)journal_append, METH_O, "Append one frame; a failed append leaves no trace."},
    {"sync", (PyCFunction)journal_sync, METH_NOARGS, "Return when everything appended before is durable."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"end", (getter)journal_get_end, NULL, "position behind the newest frame", NULL},
    {"synced", (getter)journal_get_synced, NULL, "position up to which the journal is durable", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Journal(fd, end): appends checksummed frames to fd, which stays the caller's."},
    {Py_tp_new, (void *)journal_new},
    {Py_tp_dealloc, (void *)journal_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "pbkfs._native.Journal",
    .basicsize = sizeof(struct journal_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int pbk_add_journal(PyObject *module)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    state->journal_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->journal_type == NULL ? -1 : PyModule_AddType(module, state->journal_type);
}
