/* The module pbkfs._native: its functions, and what the binding's files share. Runs under the GIL. */
#include "binding.h"

#include <errno.h>

#include "pbk/crc32c.h"
#include "pbk/io.h"
#include "pbk/journal.h"
#include "pbk/pagestream.h"
#include "pbk/pglz.h"
#include "pbk/step.h"

#include <fcntl.h>
#include <unistd.h>

/* ---- shared ---- */

PyObject *pbk_binding_fail(int result, const char *reason)
{
    int error_number = result == PBK_NO_OBJECT ? ENOTSUP : -result;
    if (error_number == ENOMEM && reason == NULL)
        return PyErr_NoMemory();
    if (reason == NULL) {
        errno = error_number;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *args = Py_BuildValue("(is)", error_number, reason);
    if (args != NULL) {
        PyErr_SetObject(PyExc_OSError, args);
        Py_DECREF(args);
    }
    return NULL;
}

PyObject *pbk_binding_raise(int error_number)
{
    return pbk_binding_fail(-error_number, NULL);
}

int pbk_binding_u64(PyObject *object, void *to)
{
    PyObject *number = PyNumber_Index(object);
    if (number == NULL)
        return 0;
    unsigned long long value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred())
        return 0;
    *(uint64_t *)to = value;
    return 1;
}

int pbk_binding_u32(PyObject *object, void *to)
{
    uint64_t value;
    if (!pbk_binding_u64(object, &value))
        return 0;
    if (value > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "number does not fit into 32 bits");
        return 0;
    }
    *(uint32_t *)to = (uint32_t)value;
    return 1;
}

int pbk_binding_i64(PyObject *object, void *to)
{
    PyObject *number = PyNumber_Index(object);
    if (number == NULL)
        return 0;
    long long value = PyLong_AsLongLong(number);
    Py_DECREF(number);
    if (value == -1 && PyErr_Occurred())
        return 0;
    *(int64_t *)to = value;
    return 1;
}

int pbk_binding_path(PyObject *object, void *to)
{
    char *text;
    if (PyBytes_AsStringAndSize(object, &text, NULL) < 0)
        return 0;
    *(const char **)to = text;
    return 1;
}

/* ---- functions ---- */

static PyObject *binding_crc32c(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    uint32_t crc = 0;
    if (!PyArg_ParseTuple(args, "y*|O&:crc32c", &data, pbk_binding_u32, &crc))
        return NULL;
    /* The switch of threads costs more than the checksum of a small buffer. */
    if (data.len > 65536) {
        Py_BEGIN_ALLOW_THREADS
        crc = pbk_crc32c(crc, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    } else {
        crc = pbk_crc32c(crc, data.buf, (size_t)data.len);
    }
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *binding_pglz_decompress(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    Py_ssize_t raw_size;
    PyObject *out = NULL;
    if (!PyArg_ParseTuple(args, "y*n:pglz_decompress", &data, &raw_size))
        return NULL;
    if (raw_size < 0 || raw_size > 1 << 30)
        PyErr_SetString(PyExc_ValueError, "raw size is out of range");
    else
        out = PyBytes_FromStringAndSize(NULL, raw_size);
    if (out != NULL &&
        pbk_pglz_decompress(data.buf, (size_t)data.len, (uint8_t *)PyBytes_AS_STRING(out), (size_t)raw_size) != 0) {
        Py_CLEAR(out);
        PyErr_SetString(PyExc_ValueError, "pglz data is damaged");
    }
    PyBuffer_Release(&data);
    return out;
}

static PyObject *binding_open_beneath(PyObject *Py_UNUSED(module), PyObject *args)
{
    int root_fd;
    const char *path;
    if (!PyArg_ParseTuple(args, "iO&:open_beneath", &root_fd, pbk_binding_path, &path))
        return NULL;
    int fd = pbk_open_beneath(root_fd, path, O_RDONLY);
    if (fd < 0)
        return pbk_binding_fail(fd, NULL);
    return PyLong_FromLong(fd);
}

static PyObject *binding_scan_pages(PyObject *Py_UNUSED(module), PyObject *args)
{
    int root_fd;
    const char *path;
    uint64_t stored_size;
    int padded;
    struct pbk_page_walk walk = {0};
    int err;
    if (!PyArg_ParseTuple(args, "iO&O&p:scan_pages", &root_fd, pbk_binding_path, &path, pbk_binding_u64, &stored_size,
                          &padded))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    int fd = pbk_open_beneath(root_fd, path, O_RDONLY);
    err = fd;
    if (fd >= 0) {
        err = pbk_pages_walk(fd, stored_size, padded != 0, NULL, NULL, &walk);
        close(fd);
    }
    Py_END_ALLOW_THREADS
    if (err < 0)
        return pbk_binding_fail(err, walk.reason);
    if (walk.has_marker)
        return Py_BuildValue("(KII)", (unsigned long long)walk.n_pages, walk.end_block, walk.marker);
    return Py_BuildValue("(KIO)", (unsigned long long)walk.n_pages, walk.end_block, Py_None);
}

/* A visit of pbk_journal_scan, which runs under the GIL: it makes Python objects all the time. */
static int collect_payload(void *arg, const uint8_t *payload, size_t n)
{
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)payload, (Py_ssize_t)n);
    if (bytes == NULL)
        return -ENOMEM;
    int err = PyList_Append(arg, bytes) < 0 ? -ENOMEM : 0;
    Py_DECREF(bytes);
    return err;
}

static PyObject *bits_to_python(const struct pbk_bits *bits)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(bits->n_words * 8));
    if (bytes == NULL)
        return NULL;
    uint8_t *p = (uint8_t *)PyBytes_AS_STRING(bytes);
    for (size_t i = 0; i < bits->n_words; i++)
        for (unsigned k = 0; k < 8; k++)
            p[i * 8 + k] = (uint8_t)(bits->words[i] >> (8 * k));
    return bytes;
}

static PyObject *map_to_python(const struct pbk_object_map *map)
{
    PyObject *changed = bits_to_python(&map->changed);
    PyObject *hydrated = bits_to_python(&map->hydrated);
    if (changed == NULL || hydrated == NULL) {
        Py_XDECREF(changed);
        Py_XDECREF(hydrated);
        return NULL;
    }
    return Py_BuildValue("(NION)", changed, map->limit, map->whole ? Py_True : Py_False, hydrated);
}

static PyObject *binding_scan_journal(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    Py_buffer session;
    struct pbk_journal_scan scan;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "iy*:scan_journal", &fd, &session))
        return NULL;
    if (session.len != 16) {
        PyErr_SetString(PyExc_ValueError, "session is not 16 bytes long");
        PyBuffer_Release(&session);
        return NULL;
    }
    PyObject *names = PyList_New(0);
    PyObject *maps = PyDict_New();
    if (names == NULL || maps == NULL)
        goto out;
    int err = pbk_journal_scan(fd, session.buf, collect_payload, names, &scan);
    if (err && !PyErr_Occurred())
        pbk_binding_fail(err, err == -EIO ? scan.reason : NULL);
    for (size_t i = 0; !PyErr_Occurred() && i < scan.n_maps; i++) {
        if (!scan.maps[i].is_known)
            continue; /* writes of another session are all that there was of it */
        PyObject *key = PyLong_FromUnsignedLongLong(scan.maps[i].object);
        PyObject *value = map_to_python(&scan.maps[i]);
        if (key != NULL && value != NULL)
            PyDict_SetItem(maps, key, value);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    if (!PyErr_Occurred())
        result = Py_BuildValue("(KOO)", (unsigned long long)scan.end, names, maps);
    pbk_journal_scan_free(&scan);
out:
    Py_XDECREF(names);
    Py_XDECREF(maps);
    PyBuffer_Release(&session);
    return result;
}

/* ---- steps ---- */

static PyObject *binding_arm_steps(PyObject *Py_UNUSED(module), PyObject *args)
{
    static PyObject *kept; /* the strings, for good */
    const char *log;
    const char *die_at;
    unsigned n;
    int by_signal;
    if (!PyArg_ParseTuple(args, "ssIp:arm_steps", &log, &die_at, &n, &by_signal))
        return NULL;
    Py_XSETREF(kept, Py_NewRef(args));
    pbk_steps_arm(log, die_at, n, by_signal != 0);
    Py_RETURN_NONE;
}

static PyObject *binding_step(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *label;
    if (!PyArg_ParseTuple(args, "s:step", &label))
        return NULL;
    pbk_step(label);
    Py_RETURN_NONE;
}

/* ---- the module ---- */

static PyMethodDef functions[] = {
    {"crc32c", binding_crc32c, METH_VARARGS, "CRC-32C of data, continuing from crc."},
    {"pglz_decompress", binding_pglz_decompress, METH_VARARGS, "Exactly raw_size bytes; ValueError if damaged."},
    {"open_beneath", binding_open_beneath, METH_VARARGS,
     "Open a file for reading; no component of its path may be a symbolic link. OSError."},
    {"scan_pages", binding_scan_pages, METH_VARARGS,
     "Walk the records of a stored data file: (pages, highest block + 1, truncation marker or None)."},
    {"scan_journal", binding_scan_journal, METH_VARARGS,
     "Read a journal: (valid length, payloads of name records, object id -> (changed, limit, whole, hydrated))."},
    {"arm_steps", binding_arm_steps, METH_VARARGS,
     "For tests: log all labelled steps and die at the n-th of one label."},
    {"step", binding_step, METH_VARARGS, "A labelled step of a caller in Python."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    if (PyModule_AddIntConstant(module, "BLCKSZ", PBK_BLCKSZ) < 0)
        return -1;
    PyObject *no_limit = PyLong_FromUnsignedLong(PBK_NO_LIMIT);
    if (no_limit == NULL || PyModule_AddObjectRef(module, "NO_LIMIT", no_limit) < 0) {
        Py_XDECREF(no_limit);
        return -1;
    }
    Py_DECREF(no_limit);
    if (PyModule_AddStringConstant(module, "INFLATE_LIBRARY", pbk_inflate_library()) < 0)
        return -1;
    if (pbk_add_journal(module) < 0 || pbk_add_nodes(module) < 0)
        return -1;
    return pbk_add_dispatcher != NULL ? pbk_add_dispatcher(module) : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    Py_VISIT(state->journal_type);
    Py_VISIT(state->nodes_type);
    Py_VISIT(state->dispatcher_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->journal_type);
    Py_CLEAR(state->nodes_type);
    Py_CLEAR(state->dispatcher_type);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

struct PyModuleDef pbk_module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pbkfs._native",
    .m_doc = "The data of files: page reads, writes, journal, and the dispatcher of FUSE requests, in C.",
    .m_size = sizeof(struct pbk_module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&pbk_module_def);
}
