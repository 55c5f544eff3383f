/*
 * pbkfs._native.Dispatcher: the dispatcher as a Python object. Called with the interpreter's lock; what may wait releases it.
 */
#include "binding.h"

#include <errno.h>

#include "pbk/dispatcher.h"

typedef struct {
    PyObject_HEAD
    PyObject *nodes; /* kept alive for as long as the dispatcher uses what is inside */
    struct pbk_dispatcher *dispatcher;
} Dispatcher;

static int dispatcher_init(Dispatcher *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nodes", "fuse_fd", "n_readers", "n_fsync", "log_fd", "hold_s", "supervised", "init", NULL};
    PyObject *nodes_object;
    int fuse_fd;
    int is_supervised = 0;
    const char *init = NULL;
    Py_ssize_t init_length = 0;
    struct pbk_dispatcher_options options = {.n_readers = 0, .n_fsync = 4, .log_fd = -1, .hold_s = 0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi|$IIiipy#:Dispatcher", names, &nodes_object, &fuse_fd,
                                     &options.n_readers, &options.n_fsync, &options.log_fd, &options.hold_s,
                                     &is_supervised, &init, &init_length))
        return -1;
    options.is_supervised = is_supervised != 0;
    options.init = init;
    options.init_length = (size_t)init_length;
    if (self->dispatcher) {
        PyErr_SetString(PyExc_RuntimeError, "the dispatcher is already made");
        return -1;
    }
    struct pbk_nodes *nodes = pbk_binding_nodes(nodes_object);
    if (!nodes)
        return -1;
    int error = pbk_dispatcher_new(nodes, fuse_fd, &options, &self->dispatcher);
    if (error) {
        self->dispatcher = NULL;
        pbk_binding_raise(-error);
        return -1;
    }
    self->nodes = Py_NewRef(nodes_object);
    return 0;
}

static void dispatcher_dealloc(Dispatcher *self)
{
    PyTypeObject *type = Py_TYPE(self);
    struct pbk_dispatcher *dispatcher = self->dispatcher;
    self->dispatcher = NULL;
    if (dispatcher) {
        Py_BEGIN_ALLOW_THREADS
        pbk_dispatcher_free(dispatcher);
        Py_END_ALLOW_THREADS
    }
    Py_CLEAR(self->nodes);
    type->tp_free(self);
    Py_DECREF(type);
}

/* NULL with ValueError if __init__ did not succeed. */
static struct pbk_dispatcher *get_dispatcher(Dispatcher *self)
{
    if (!self->dispatcher)
        PyErr_SetString(PyExc_ValueError, "the dispatcher was not made");
    return self->dispatcher;
}

static PyObject *none_or_raise(int error)
{
    if (error)
        return pbk_binding_raise(-error);
    Py_RETURN_NONE;
}

static PyObject *dispatcher_start(Dispatcher *self, PyObject *Py_UNUSED(ignored))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher)
        return NULL;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = pbk_dispatcher_start(dispatcher);
    Py_END_ALLOW_THREADS
    return none_or_raise(error);
}

static PyObject *dispatcher_stop(Dispatcher *self, PyObject *Py_UNUSED(ignored))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_dispatcher_stop(dispatcher);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *dispatcher_invalidate(Dispatcher *self, PyObject *args)
{
    unsigned long long ino;
    long long offset, length;
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher || !PyArg_ParseTuple(args, "KLL:invalidate", &ino, &offset, &length))
        return NULL;
    return none_or_raise(pbk_dispatcher_invalidate(dispatcher, ino, offset, length));
}

static PyObject *dispatcher_invalidate_entry(Dispatcher *self, PyObject *args)
{
    unsigned long long parent;
    const char *name;
    Py_ssize_t length;
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher || !PyArg_ParseTuple(args, "Ky#:invalidate_entry", &parent, &name, &length))
        return NULL;
    return none_or_raise(pbk_dispatcher_invalidate_entry(dispatcher, parent, name, (size_t)length));
}

static PyObject *dispatcher_request(Dispatcher *self, PyObject *args)
{
    unsigned token;
    uint64_t unique = 0;
    uint32_t pid = 0;
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher || !PyArg_ParseTuple(args, "I:request", &token))
        return NULL;
    pbk_dispatcher_request(dispatcher, token, &unique, &pid);
    return Py_BuildValue("KI", (unsigned long long)unique, (unsigned)pid);
}

static PyObject *dispatcher_is_known(Dispatcher *self, PyObject *args)
{
    unsigned long long ino;
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher || !PyArg_ParseTuple(args, "K:is_known", &ino))
        return NULL;
    int found;
    Py_BEGIN_ALLOW_THREADS
    found = pbk_dispatcher_is_known(dispatcher, ino);
    Py_END_ALLOW_THREADS
    if (found < 0)
        return pbk_binding_raise(-found);
    return PyBool_FromLong(found);
}

static PyObject *dispatcher_init_request(Dispatcher *self, void *Py_UNUSED(closure))
{
    char said[256];
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher)
        return NULL;
    size_t length = pbk_dispatcher_init_request(dispatcher, said, sizeof said);
    return PyBytes_FromStringAndSize(said, (Py_ssize_t)(length < sizeof said ? length : sizeof said));
}

static PyObject *dispatcher_init_answer(PyObject *Py_UNUSED(type), PyObject *args)
{
    char answer[256];
    const char *request;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "y#:init_answer", &request, &length))
        return NULL;
    size_t n = pbk_dispatcher_init_answer(request, (size_t)length, answer, sizeof answer);
    return PyBytes_FromStringAndSize(answer, (Py_ssize_t)(n < sizeof answer ? n : sizeof answer));
}

struct visit {
    PyObject *dict;
    bool failed;
};

static void add_counter(void *arg, const char *name, uint64_t value)
{
    struct visit *visit = arg;
    if (visit->failed)
        return;
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    visit->failed = !number || PyDict_SetItemString(visit->dict, name, number) < 0;
    Py_XDECREF(number);
}

static PyObject *dispatcher_counters(Dispatcher *self, PyObject *Py_UNUSED(ignored))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher)
        return NULL;
    struct visit visit = {.dict = PyDict_New(), .failed = false};
    if (!visit.dict)
        return NULL;
    pbk_dispatcher_counters(dispatcher, add_counter, &visit);
    if (visit.failed)
        Py_CLEAR(visit.dict);
    return visit.dict;
}

static PyObject *dispatcher_reset_counters(Dispatcher *self, PyObject *Py_UNUSED(ignored))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    if (!dispatcher)
        return NULL;
    pbk_dispatcher_reset_counters(dispatcher);
    Py_RETURN_NONE;
}

static PyObject *dispatcher_socket_fd(Dispatcher *self, void *Py_UNUSED(closure))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    return dispatcher ? PyLong_FromLong(pbk_dispatcher_socket_fd(dispatcher)) : NULL;
}

static PyObject *dispatcher_event_fd(Dispatcher *self, void *Py_UNUSED(closure))
{
    struct pbk_dispatcher *dispatcher = get_dispatcher(self);
    return dispatcher ? PyLong_FromLong(pbk_dispatcher_event_fd(dispatcher)) : NULL;
}

static PyMethodDef dispatcher_methods[] = {
    {"start", (PyCFunction)dispatcher_start, METH_NOARGS, "Start the threads."},
    {"stop", (PyCFunction)dispatcher_stop, METH_NOARGS, "End and join the threads; may be called again."},
    {"invalidate", (PyCFunction)dispatcher_invalidate, METH_VARARGS,
     "invalidate(ino, offset, length): have the kernel drop cached pages and attributes; does not wait."},
    {"invalidate_entry", (PyCFunction)dispatcher_invalidate_entry, METH_VARARGS,
     "invalidate_entry(parent, name): have the kernel drop a cached name; does not wait."},
    {"request", (PyCFunction)dispatcher_request, METH_VARARGS,
     "request(token): number and process of a request that is not answered yet; zeros for an unknown one."},
    {"is_known", (PyCFunction)dispatcher_is_known, METH_VARARGS,
     "is_known(ino): whether the kernel has this inode. May wait for readers; not for the trio thread."},
    {"init_answer", dispatcher_init_answer, METH_VARARGS | METH_STATIC,
     "init_answer(request): what this program says to what the kernel said at INIT."},
    {"counters", (PyCFunction)dispatcher_counters, METH_NOARGS, "Requests by kind, and the state of the queues."},
    {"reset_counters", (PyCFunction)dispatcher_reset_counters, METH_NOARGS, "Set the counters of events to zero."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef dispatcher_attributes[] = {
    {"socket_fd", (getter)dispatcher_socket_fd, NULL, "pyfuse3's end of the socketpair; owned here, hand out a dup.",
     NULL},
    {"event_fd", (getter)dispatcher_event_fd, NULL, "Readable once the kernel has let go of the connection.", NULL},
    {"init_request", (getter)dispatcher_init_request, NULL, "What the kernel said at INIT; empty before that.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot dispatcher_slots[] = {
    {Py_tp_doc,
     "Dispatcher(nodes, fuse_fd, *, n_readers=0, n_fsync=4, log_fd=-1, hold_s=0, supervised=False, init=b\"\")"},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, dispatcher_init},
    {Py_tp_dealloc, dispatcher_dealloc},
    {Py_tp_methods, dispatcher_methods},
    {Py_tp_getset, dispatcher_attributes},
    {0, NULL},
};

static PyType_Spec dispatcher_spec = {
    .name = "pbkfs._native.Dispatcher",
    .basicsize = sizeof(Dispatcher),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = dispatcher_slots,
};

int pbk_add_dispatcher(PyObject *module)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    PyObject *type = PyType_FromModuleAndSpec(module, &dispatcher_spec, NULL);
    if (!type || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    if (state)
        state->dispatcher_type = (PyTypeObject *)type; /* the state's reference */
    else
        Py_DECREF(type);
    return 0;
}
