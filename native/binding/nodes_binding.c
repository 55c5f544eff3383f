/*
 * The Python type Nodes. Any thread; every method that can wait for a disk or a lock gives up the GIL. Contexts (buffers and
 * a decompressor) are kept in a small pool that the GIL guards.
 */
#include "binding.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pbk/bytes.h"
#include "pbk/nodes.h"

#define MAX_IO (1u << 20)
#define MAX_IDLE_CTX 4

struct nodes_object {
    PyObject_HEAD
    struct pbk_nodes *nodes;
    PyObject *journals;          /* list: the current one is the last, but an fsync may still work with those before */
    struct pbk_seal *seal;       /* prepared, or NULL */
    struct pbk_restack *restack; /* prepared, or NULL */
    bool is_closed;
    unsigned n_idle;
    struct pbk_ctx *idle[MAX_IDLE_CTX];
};

struct pbk_nodes *pbk_binding_nodes(PyObject *object)
{
    PyObject *module = PyType_GetModuleByDef(Py_TYPE(object), &pbk_module_def);
    struct pbk_module_state *state = module != NULL ? PyModule_GetState(module) : NULL;
    if (state == NULL || !PyObject_TypeCheck(object, state->nodes_type)) {
        PyErr_Clear();
        PyErr_SetString(PyExc_TypeError, "nodes is not a Nodes");
        return NULL;
    }
    struct nodes_object *self = (struct nodes_object *)object;
    if (self->is_closed) {
        PyErr_SetString(PyExc_ValueError, "nodes are closed");
        return NULL;
    }
    return self->nodes;
}

/* ---- life ---- */

static PyObject *nodes_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"journal", "objects_fd", "log_fd", "index_bytes", NULL};
    PyObject *journal;
    int objects_fd;
    int log_fd;
    Py_ssize_t index_bytes = 64 << 20;
    struct pbk_journal *core_journal = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oii|$n:Nodes", names, &journal, &objects_fd, &log_fd, &index_bytes))
        return NULL;
    if (index_bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "index_bytes is negative");
        return NULL;
    }
    if (journal != Py_None) {
        PyObject *module = PyType_GetModuleByDef(type, &pbk_module_def);
        if (module == NULL)
            return NULL;
        core_journal = pbk_binding_journal(module, journal);
        if (core_journal == NULL)
            return NULL;
    }
    struct nodes_object *self = (struct nodes_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->nodes = pbk_nodes_new(core_journal, objects_fd, log_fd, (size_t)index_bytes);
    if (self->nodes == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->journals = PyList_New(0);
    if (self->journals == NULL || PyList_Append(self->journals, journal) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void nodes_dealloc(struct nodes_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    pbk_nodes_cancel_seal(self->seal);
    pbk_nodes_cancel_restack(self->restack);
    pbk_nodes_free(self->nodes);
    while (self->n_idle > 0)
        pbk_ctx_free(self->idle[--self->n_idle]);
    Py_XDECREF(self->journals);
    type->tp_free(self);
    Py_DECREF(type);
}

static bool is_open(struct nodes_object *self)
{
    if (self->is_closed)
        PyErr_SetString(PyExc_ValueError, "nodes are closed");
    return !self->is_closed;
}

static PyObject *nodes_close(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    self->is_closed = true;
    pbk_nodes_cancel_seal(self->seal);
    self->seal = NULL;
    pbk_nodes_cancel_restack(self->restack);
    self->restack = NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_nodes_clear(self->nodes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static struct pbk_ctx *take_ctx(struct nodes_object *self)
{
    struct pbk_ctx *ctx = self->n_idle > 0 ? self->idle[--self->n_idle] : pbk_ctx_new(MAX_IO);
    if (ctx == NULL)
        PyErr_NoMemory();
    return ctx;
}

static void give_ctx(struct nodes_object *self, struct pbk_ctx *ctx)
{
    if (self->n_idle < MAX_IDLE_CTX)
        self->idle[self->n_idle++] = ctx;
    else
        pbk_ctx_free(ctx);
}

/* A registered node with a reference, or NULL with OSError(ENOENT). */
static struct pbk_node *get_node(struct nodes_object *self, uint64_t ino)
{
    if (!is_open(self))
        return NULL;
    struct pbk_node *node = pbk_nodes_get_any(self->nodes, ino);
    if (node == NULL)
        pbk_binding_fail(-ENOENT, NULL);
    return node;
}

/* Both at once, for calls that move data. */
static struct pbk_node *begin(struct nodes_object *self, uint64_t ino, struct pbk_ctx **ctx)
{
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    *ctx = take_ctx(self);
    if (*ctx == NULL) {
        pbk_node_put(node);
        return NULL;
    }
    return node;
}

/* The last reference closes files: without the GIL. */
static void put_node(struct pbk_node *node)
{
    Py_BEGIN_ALLOW_THREADS
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
}

static PyObject *end(struct nodes_object *self, struct pbk_node *node, struct pbk_ctx *ctx, int err)
{
    give_ctx(self, ctx);
    put_node(node);
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

/* ---- registering ---- */

static int text_of(PyObject *object, void *to)
{
    const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : NULL;
    if (text == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "label is not a str");
        return 0;
    }
    *(const char **)to = text;
    return 1;
}

static int parse_headers(PyObject *headers, struct pbk_source_spec *spec)
{
    if (headers == Py_None)
        return 1;
    spec->has_headers = true;
    return PyArg_ParseTuple(headers, "iO&O&O&O&O&;headers of a source", &spec->headers_fd, pbk_binding_path,
                            &spec->headers_path, pbk_binding_i64, &spec->headers_off, pbk_binding_i64,
                            &spec->headers_size, pbk_binding_u32, &spec->headers_crc, pbk_binding_u32,
                            &spec->n_headers);
}

/* object_path: room for the path of an object. */
static int parse_source(PyObject *source, struct pbk_source_spec *spec, char object_path[32])
{
    const char *kind;
    memset(spec, 0, sizeof(*spec));
    spec->limit = PBK_NO_LIMIT;
    if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) == 0 || !PyUnicode_Check(PyTuple_GET_ITEM(source, 0))) {
        PyErr_SetString(PyExc_TypeError, "source is not a tuple that begins with its kind");
        return 0;
    }
    kind = PyUnicode_AsUTF8(PyTuple_GET_ITEM(source, 0));
    if (kind == NULL)
        return 0;
    if (strcmp(kind, "raw") == 0) {
        spec->kind = PBK_SOURCE_RAW;
        return PyArg_ParseTuple(source, "siO&O&O&;raw source", &kind, &spec->dir_fd, pbk_binding_path, &spec->path,
                                pbk_binding_u64, &spec->size, text_of, &spec->label);
    }
    if (strcmp(kind, "pages") == 0) {
        PyObject *headers;
        int padded;
        int zlib_8192;
        spec->kind = PBK_SOURCE_PAGES;
        if (!PyArg_ParseTuple(source, "siO&O&O&iO&ppO;pages source", &kind, &spec->dir_fd, pbk_binding_path,
                              &spec->path, pbk_binding_u64, &spec->size, text_of, &spec->label, &spec->compress,
                              pbk_binding_u32, &spec->limit, &padded, &zlib_8192, &headers))
            return 0;
        spec->is_padded = padded != 0;
        spec->is_zlib_8192 = zlib_8192 != 0;
        return parse_headers(headers, spec);
    }
    if (strcmp(kind, "object") == 0) {
        PyObject *bitmap;
        uint64_t object;
        spec->kind = PBK_SOURCE_OBJECT;
        if (!PyArg_ParseTuple(source, "siO&O&OO&;object source", &kind, &spec->dir_fd, pbk_binding_u64, &object,
                              text_of, &spec->label, &bitmap, pbk_binding_u32, &spec->limit))
            return 0;
        snprintf(object_path, 32, "%02x/%llx", (unsigned)(object & 255), (unsigned long long)object);
        spec->path = object_path;
        if (bitmap == Py_None) {
            spec->is_whole = true;
            return 1;
        }
        if (!PyBytes_Check(bitmap)) {
            PyErr_SetString(PyExc_TypeError, "bitmap of a source is neither bytes nor None");
            return 0;
        }
        spec->bitmap = (const uint8_t *)PyBytes_AS_STRING(bitmap);
        spec->bitmap_bytes = (size_t)PyBytes_GET_SIZE(bitmap);
        return 1;
    }
    PyErr_Format(PyExc_ValueError, "unknown kind of source %R", PyTuple_GET_ITEM(source, 0));
    return 0;
}

typedef int (*sources_taker)(struct nodes_object *, uint64_t ino, uint64_t size, const struct pbk_source_spec *,
                             unsigned);

/* Calls take with what args, (ino, size, sources), say. */
static PyObject *with_sources(struct nodes_object *self, PyObject *args, sources_taker take)
{
    uint64_t ino;
    uint64_t size;
    PyObject *sources;
    PyObject *result = NULL;
    struct pbk_source_spec *specs = NULL;
    char (*object_paths)[32] = NULL;
    if (!PyArg_ParseTuple(args, "O&O&O", pbk_binding_u64, &ino, pbk_binding_u64, &size, &sources) || !is_open(self))
        return NULL;
    /* The specs borrow from the tuples, which this keeps. */
    PyObject *list = PySequence_Fast(sources, "sources is not a sequence");
    if (list == NULL)
        return NULL;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(list);
    if (n > (Py_ssize_t)PBK_MAX_SOURCES) {
        PyErr_SetString(PyExc_ValueError, "too many sources");
        goto out;
    }
    specs = PyMem_Calloc(n > 0 ? (size_t)n : 1, sizeof(*specs));
    object_paths = PyMem_Calloc(n > 0 ? (size_t)n : 1, sizeof(*object_paths));
    if (specs == NULL || object_paths == NULL) {
        PyErr_NoMemory();
        goto out;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (!parse_source(PySequence_Fast_GET_ITEM(list, i), &specs[i], object_paths[i]))
            goto out;
    int err = take(self, ino, size, specs, (unsigned)n);
    if (err)
        pbk_binding_fail(err, err == -EINVAL ? "sources make no sense" : NULL);
    else
        result = Py_NewRef(Py_None);
out:
    PyMem_Free(specs);
    PyMem_Free(object_paths);
    Py_DECREF(list);
    return result;
}

static int take_for_add(struct nodes_object *self, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                        unsigned n)
{
    return pbk_nodes_add(self->nodes, ino, size, specs, n);
}

static PyObject *nodes_add(struct nodes_object *self, PyObject *args)
{
    return with_sources(self, args, take_for_add);
}

static int take_for_restack(struct nodes_object *self, uint64_t ino, uint64_t size, const struct pbk_source_spec *specs,
                            unsigned n)
{
    return pbk_nodes_prepare_restack(self->nodes, ino, size, specs, n, &self->restack);
}

static PyObject *nodes_prepare_restack(struct nodes_object *self, PyObject *args)
{
    return with_sources(self, args, take_for_restack);
}

static PyObject *nodes_cancel_restack(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    struct pbk_restack *restack = self->restack;
    self->restack = NULL;
    pbk_nodes_cancel_restack(restack);
    Py_RETURN_NONE;
}

static PyObject *nodes_restack(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    struct pbk_restack *restack = self->restack;
    if (!is_open(self))
        return NULL;
    self->restack = NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_nodes_restack(restack);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

struct bitmap {
    const uint8_t *bytes;
    size_t n;
};

/* A bitmap that is None or bytes; borrowed. */
static int bitmap_of(PyObject *object, void *to)
{
    struct bitmap *bitmap = to;
    if (object == Py_None)
        return 1;
    if (!PyBytes_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "bitmap is neither bytes nor None");
        return 0;
    }
    bitmap->bytes = (const uint8_t *)PyBytes_AS_STRING(object);
    bitmap->n = (size_t)PyBytes_GET_SIZE(object);
    return 1;
}

static PyObject *nodes_attach(struct nodes_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ino", "object_id", "bitmap", "limit", "mapped", "fresh", "hydrated", "whole", NULL};
    uint64_t ino;
    int is_mapped = 0;
    int is_fresh = -1;
    int is_whole = 0;
    struct pbk_ctx *ctx;
    struct pbk_attach attach = {0};
    int err;
    struct bitmap bitmap = {0};
    struct bitmap hydrated = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&|$O&O&ppO&p:attach", names, pbk_binding_u64, &ino,
                                     pbk_binding_u64, &attach.object, bitmap_of, &bitmap, pbk_binding_u32,
                                     &attach.limit, &is_mapped, &is_fresh, bitmap_of, &hydrated, &is_whole))
        return NULL;
    if (is_fresh < 0) {
        /* Of keywords only all or none can be required. */
        PyErr_SetString(PyExc_TypeError, "attach() needs bitmap, limit, mapped and fresh");
        return NULL;
    }
    attach.is_mapped = is_mapped != 0;
    attach.is_fresh = is_fresh != 0;
    attach.is_whole = is_mapped != 0 && is_whole != 0;
    attach.bitmap = bitmap.bytes;
    attach.bitmap_bytes = bitmap.n;
    attach.hydrated = hydrated.bytes;
    attach.hydrated_bytes = hydrated.n;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_attach(node, ctx, &attach);
    Py_END_ALLOW_THREADS
    return end(self, node, ctx, err);
}

/* Names: the calls take no longer than a look into a table, so the GIL stays. */

static PyObject *change_name(struct nodes_object *self, PyObject *const *args, Py_ssize_t n_args, const char *what,
                             void (*change)(struct pbk_names *, uint64_t, const void *, size_t))
{
    uint64_t directory;
    char *name;
    Py_ssize_t length;
    if (n_args != 2) {
        PyErr_Format(PyExc_TypeError, "%s takes a directory and a name", what);
        return NULL;
    }
    if (!pbk_binding_u64(args[0], &directory) || PyBytes_AsStringAndSize(args[1], &name, &length) < 0 || !is_open(self))
        return NULL;
    change(pbk_nodes_names(self->nodes), directory, name, (size_t)length);
    Py_RETURN_NONE;
}

static PyObject *nodes_name_added(struct nodes_object *self, PyObject *const *args, Py_ssize_t n_args)
{
    return change_name(self, args, n_args, "name_added", pbk_names_add);
}

static PyObject *nodes_name_removed(struct nodes_object *self, PyObject *const *args, Py_ssize_t n_args)
{
    return change_name(self, args, n_args, "name_removed", pbk_names_remove);
}

static PyObject *nodes_names_known(struct nodes_object *self, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t directory;
    if (n_args != 2) {
        PyErr_SetString(PyExc_TypeError, "names_known takes a directory and its names");
        return NULL;
    }
    if (!pbk_binding_u64(args[0], &directory) || !is_open(self))
        return NULL;
    PyObject *all = PyObject_GetIter(args[1]);
    if (all == NULL)
        return NULL;
    struct pbk_names *names = pbk_nodes_names(self->nodes);
    PyObject *item;
    while ((item = PyIter_Next(all)) != NULL) {
        char *name;
        Py_ssize_t length;
        int err = PyBytes_AsStringAndSize(item, &name, &length);
        if (err == 0)
            pbk_names_add(names, directory, name, (size_t)length);
        Py_DECREF(item);
        if (err != 0)
            break;
    }
    Py_DECREF(all);
    if (PyErr_Occurred())
        return NULL;
    pbk_names_complete(names, directory);
    Py_RETURN_NONE;
}

static struct timespec to_timespec(long long ns)
{
    long long seconds = ns / 1000000000, rest = ns % 1000000000;
    if (rest < 0) {
        seconds--;
        rest += 1000000000;
    }
    return (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)rest};
}

static PyObject *nodes_directory_is(struct nodes_object *self, PyObject *args)
{
    unsigned long long ino, nlink, size, blocks;
    long long atime_ns, mtime_ns, ctime_ns;
    unsigned mode, uid, gid;
    if (!PyArg_ParseTuple(args, "KIKIIKLLLK:directory_is", &ino, &mode, &nlink, &uid, &gid, &size, &atime_ns, &mtime_ns,
                          &ctime_ns, &blocks) ||
        !is_open(self))
        return NULL;
    struct stat st;
    memset(&st, 0, sizeof st);
    st.st_mode = mode;
    st.st_nlink = nlink;
    st.st_uid = uid;
    st.st_gid = gid;
    st.st_size = (off_t)size;
    st.st_blocks = (blkcnt_t)blocks;
    st.st_atim = to_timespec(atime_ns);
    st.st_mtim = to_timespec(mtime_ns);
    st.st_ctim = to_timespec(ctime_ns);
    /* An answer may be on its way: wait without the GIL. */
    Py_BEGIN_ALLOW_THREADS
    pbk_directories_set(pbk_nodes_directories(self->nodes), ino, &st);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *nodes_directory_changes(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    if (!pbk_binding_u64(arg, &ino) || !is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_directories_drop(pbk_nodes_directories(self->nodes), ino);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *nodes_set_links(struct nodes_object *self, PyObject *args)
{
    unsigned long long ino;
    unsigned n_links;
    if (!PyArg_ParseTuple(args, "KI:set_links", &ino, &n_links))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    pbk_node_set_links(node, n_links);
    pbk_node_put(node);
    Py_RETURN_NONE;
}

static PyObject *nodes_is_absent(struct nodes_object *self, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t directory;
    char *name;
    Py_ssize_t length;
    if (n_args != 2) {
        PyErr_SetString(PyExc_TypeError, "is_absent takes a directory and a name");
        return NULL;
    }
    if (!pbk_binding_u64(args[0], &directory) || PyBytes_AsStringAndSize(args[1], &name, &length) < 0 || !is_open(self))
        return NULL;
    return PyBool_FromLong(pbk_nodes_is_absent(self->nodes, directory, name, (size_t)length));
}

static PyObject *change_table(struct nodes_object *self, PyObject *arg, int (*change)(struct pbk_nodes *, uint64_t))
{
    uint64_t ino;
    int err;
    if (!pbk_binding_u64(arg, &ino) || !is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = change(self->nodes, ino);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *nodes_publish(struct nodes_object *self, PyObject *arg)
{
    return change_table(self, arg, pbk_nodes_publish);
}

static PyObject *nodes_remove(struct nodes_object *self, PyObject *arg)
{
    return change_table(self, arg, pbk_nodes_remove);
}

static PyObject *nodes_has(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    if (!pbk_binding_u64(arg, &ino) || !is_open(self))
        return NULL;
    struct pbk_node *node = pbk_nodes_get_any(self->nodes, ino);
    if (node == NULL)
        Py_RETURN_FALSE;
    put_node(node);
    Py_RETURN_TRUE;
}

static PyObject *nodes_has_object(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    bool has;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    has = pbk_node_has_object(node);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(has);
}

/* ---- data ---- */

static PyObject *nodes_stat(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    struct stat st;
    int err;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_stat(node, &st);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    if (err == PBK_NO_OBJECT)
        Py_RETURN_NONE;
    if (err)
        return pbk_binding_fail(err, NULL);
#define NS(ts) ((long long)(ts).tv_sec * 1000000000 + (ts).tv_nsec)
    return Py_BuildValue("(IIILLLLLK)", (unsigned)st.st_mode, (unsigned)st.st_uid, (unsigned)st.st_gid,
                         (long long)st.st_size, NS(st.st_atim), NS(st.st_mtim), NS(st.st_ctim), (long long)st.st_blocks,
                         (unsigned long long)st.st_nlink);
#undef NS
}

static PyObject *nodes_size(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    uint64_t size = pbk_node_size(node);
    put_node(node);
    return PyLong_FromUnsignedLongLong(size);
}

/* Without the GIL: up to n bytes into to, in as many pieces as the context's size asks for. */
static ssize_t read_all(struct pbk_node *node, struct pbk_ctx *ctx, uint64_t off, uint8_t *to, size_t n)
{
    struct iovec iov[MAX_IO / PBK_BLCKSZ + 3];
    size_t done = 0;
    while (done < n) {
        int n_iov;
        ssize_t r = pbk_node_read(node, ctx, off + done, n - done, iov, sizeof(iov) / sizeof(iov[0]), &n_iov);
        if (r < 0)
            return r;
        if (r == 0)
            break;
        for (int i = 1; i < n_iov; i++) {
            memcpy(to + done, iov[i].iov_base, iov[i].iov_len);
            done += iov[i].iov_len;
        }
    }
    return (ssize_t)done;
}

static PyObject *nodes_read(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    uint64_t off;
    uint64_t length;
    struct pbk_ctx *ctx;
    ssize_t r;
    if (!PyArg_ParseTuple(args, "O&O&O&:read", pbk_binding_u64, &ino, pbk_binding_u64, &off, pbk_binding_u64, &length))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    uint64_t size = pbk_node_size(node);
    uint64_t left = off < size ? size - off : 0;
    if (length > left)
        length = left;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (bytes == NULL) {
        end(self, node, ctx, 0);
        return NULL;
    }
    uint8_t *to = (uint8_t *)PyBytes_AS_STRING(bytes);
    Py_BEGIN_ALLOW_THREADS
    r = read_all(node, ctx, off, to, (size_t)length);
    Py_END_ALLOW_THREADS
    give_ctx(self, ctx);
    put_node(node);
    if (r < 0) {
        Py_DECREF(bytes);
        return pbk_binding_fail((int)r, NULL);
    }
    if ((uint64_t)r < length)
        _PyBytes_Resize(&bytes, (Py_ssize_t)r);
    return bytes;
}

static PyObject *nodes_write(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    uint64_t off;
    Py_buffer data;
    struct pbk_ctx *ctx;
    ssize_t r;
    if (!PyArg_ParseTuple(args, "O&O&y*:write", pbk_binding_u64, &ino, pbk_binding_u64, &off, &data))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL) {
        PyBuffer_Release(&data);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    r = pbk_node_write(node, ctx, off, data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    give_ctx(self, ctx);
    put_node(node);
    return r < 0 ? pbk_binding_fail((int)r, NULL) : PyLong_FromSsize_t(r);
}

static PyObject *nodes_truncate(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    uint64_t size;
    struct pbk_ctx *ctx;
    int err;
    if (!PyArg_ParseTuple(args, "O&O&:truncate", pbk_binding_u64, &ino, pbk_binding_u64, &size))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_truncate(node, ctx, size);
    Py_END_ALLOW_THREADS
    return end(self, node, ctx, err);
}

static PyObject *nodes_fallocate(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    int mode;
    uint64_t off;
    uint64_t length;
    struct pbk_ctx *ctx;
    int err;
    if (!PyArg_ParseTuple(args, "O&iO&O&:fallocate", pbk_binding_u64, &ino, &mode, pbk_binding_u64, &off,
                          pbk_binding_u64, &length))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_fallocate(node, ctx, mode, off, length);
    Py_END_ALLOW_THREADS
    return end(self, node, ctx, err);
}

static PyObject *nodes_fsync(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    int datasync;
    int err;
    if (!PyArg_ParseTuple(args, "O&p:fsync", pbk_binding_u64, &ino, &datasync))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_fsync(node, datasync != 0);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *nodes_check_synced(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    int err;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_sync_error(node);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *nodes_copy_to(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    int fd;
    struct pbk_ctx *ctx;
    int err;
    if (!PyArg_ParseTuple(args, "O&i:copy_to", pbk_binding_u64, &ino, &fd))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_copy_to(node, ctx, fd);
    Py_END_ALLOW_THREADS
    return end(self, node, ctx, err);
}

/* ---- hydration ---- */

static PyObject *nodes_hydrate(struct nodes_object *self, PyObject *args)
{
    uint64_t ino;
    uint64_t off;
    uint64_t length;
    uint64_t next = 0;
    struct pbk_ctx *ctx;
    ssize_t r;
    if (!PyArg_ParseTuple(args, "O&O&O&:hydrate", pbk_binding_u64, &ino, pbk_binding_u64, &off, pbk_binding_u64,
                          &length))
        return NULL;
    struct pbk_node *node = begin(self, ino, &ctx);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    r = pbk_node_hydrate(node, ctx, off, length, &next);
    Py_END_ALLOW_THREADS
    give_ctx(self, ctx);
    put_node(node);
    if (r < 0)
        return pbk_binding_fail((int)r, NULL);
    if (next == UINT64_MAX)
        return Py_BuildValue("(nO)", (Py_ssize_t)r, Py_None);
    return Py_BuildValue("(nK)", (Py_ssize_t)r, (unsigned long long)next);
}

static PyObject *nodes_hydrate_sync(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    int r;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    r = pbk_node_hydrate_sync(node);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    return r < 0 ? pbk_binding_fail(r, NULL) : PyBool_FromLong(r);
}

static PyObject *nodes_count_blocks(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    struct pbk_block_counts counts;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_node_count_blocks(node, &counts);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(IIIO)", counts.n_blocks, counts.n_present, counts.n_changed,
                         counts.is_whole ? Py_True : Py_False);
}

/* What a visit of the table finds: inodes, and a number for each. */
struct numbers {
    uint64_t (*entries)[2];
    size_t n;
    size_t room;
    bool is_short;
};

static void collect_number(void *arg, uint64_t ino, uint64_t number)
{
    struct numbers *found = arg;
    if (found->n == found->room) {
        size_t room = found->room ? found->room * 2 : 256;
        uint64_t (*entries)[2] = PyMem_RawRealloc(found->entries, room * sizeof(*entries));
        if (entries == NULL) {
            found->is_short = true;
            return;
        }
        found->entries = entries;
        found->room = room;
    }
    found->entries[found->n][0] = ino;
    found->entries[found->n++][1] = number;
}

typedef void (*table_visitor)(struct pbk_nodes *, void (*)(void *, uint64_t, uint64_t), void *);

static PyObject *numbers_of(struct nodes_object *self, table_visitor visit)
{
    struct numbers found = {0};
    if (!is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    visit(self->nodes, collect_number, &found);
    Py_END_ALLOW_THREADS
    PyObject *dict = found.is_short ? PyErr_NoMemory() : PyDict_New();
    for (size_t i = 0; dict != NULL && i < found.n; i++) {
        PyObject *key = PyLong_FromUnsignedLongLong(found.entries[i][0]);
        PyObject *value = PyLong_FromUnsignedLongLong(found.entries[i][1]);
        if (key == NULL || value == NULL || PyDict_SetItem(dict, key, value) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    PyMem_RawFree(found.entries);
    return dict;
}

static PyObject *nodes_heat(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    return numbers_of(self, pbk_nodes_visit_heat);
}

static PyObject *nodes_opened(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    return numbers_of(self, pbk_nodes_visit_opened);
}

/* ---- all of them ---- */

static PyObject *nodes_verify(struct nodes_object *self, PyObject *args)
{
    unsigned long long ino;
    unsigned int first_blkno;
    int has_checksums;
    if (!PyArg_ParseTuple(args, "KIp:verify", &ino, &first_blkno, &has_checksums))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    int err = pbk_node_verify(node, first_blkno, has_checksums);
    pbk_node_put(node);
    if (err)
        return pbk_binding_raise(-err);
    Py_RETURN_NONE;
}

static PyObject *nodes_give_back_files(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    bool has_given;
    if (!is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    has_given = pbk_nodes_give_back_files(self->nodes);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(has_given);
}

static PyObject *nodes_set_reserve(struct nodes_object *self, PyObject *arg)
{
    unsigned long long bytes = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || !is_open(self))
        return NULL;
    pbk_nodes_set_reserve(self->nodes, bytes);
    Py_RETURN_NONE;
}

static PyObject *nodes_drop_indexes(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    size_t bytes;
    if (!is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    bytes = pbk_nodes_drop_indexes(self->nodes);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(bytes);
}

static PyObject *nodes_gate_close(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    if (!is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_nodes_gate_close(self->nodes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *nodes_gate_open(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    if (!is_open(self))
        return NULL;
    if (pbk_nodes_gate_open(self->nodes) != 0) {
        PyErr_SetString(PyExc_ValueError, "the gate is open");
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- sealing ---- */

static PyObject *nodes_prepare_seal(struct nodes_object *self, PyObject *arg)
{
    int err;
    struct pbk_seal *seal = NULL;
    const char *label = PyUnicode_AsUTF8(arg);
    if (label == NULL || !is_open(self))
        return NULL;
    if (self->seal != NULL) {
        PyErr_SetString(PyExc_ValueError, "a seal is prepared already");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    err = pbk_nodes_prepare_seal(self->nodes, label, &seal);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    self->seal = seal;
    Py_RETURN_NONE;
}

static PyObject *nodes_cancel_seal(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    struct pbk_seal *seal = self->seal;
    self->seal = NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_nodes_cancel_seal(seal);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *nodes_seal(struct nodes_object *self, PyObject *args)
{
    PyObject *journal;
    int objects_fd;
    if (!PyArg_ParseTuple(args, "Oi:seal", &journal, &objects_fd) || !is_open(self))
        return NULL;
    PyObject *module = PyType_GetModuleByDef(Py_TYPE(self), &pbk_module_def);
    struct pbk_journal *core_journal = module != NULL ? pbk_binding_journal(module, journal) : NULL;
    if (core_journal == NULL)
        return NULL;
    if (self->seal == NULL) {
        PyErr_SetString(PyExc_ValueError, "no seal is prepared");
        return NULL;
    }
    if (PyList_Append(self->journals, journal) < 0)
        return NULL;
    struct pbk_seal *seal = self->seal;
    self->seal = NULL;
    Py_BEGIN_ALLOW_THREADS
    pbk_nodes_seal(seal, core_journal, objects_fd);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *nodes_sync(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    int err;
    if (!is_open(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_nodes_sync(self->nodes);
    Py_END_ALLOW_THREADS
    if (err)
        return pbk_binding_fail(err, NULL);
    Py_RETURN_NONE;
}

static PyObject *bytes_of_words(const uint64_t *words, size_t n_words)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(n_words * 8));
    uint8_t *to = bytes != NULL ? (uint8_t *)PyBytes_AS_STRING(bytes) : NULL;
    for (size_t i = 0; bytes != NULL && i < n_words; i++)
        pbk_put_u64(to + i * 8, words[i]);
    return bytes;
}

static PyObject *nodes_page_map(struct nodes_object *self, PyObject *arg)
{
    uint64_t ino;
    int err;
    struct pbk_page_map map;
    PyObject *result = NULL;
    if (!pbk_binding_u64(arg, &ino))
        return NULL;
    struct pbk_node *node = get_node(self, ino);
    if (node == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pbk_node_page_map(node, &map);
    pbk_node_put(node);
    Py_END_ALLOW_THREADS
    if (err == PBK_NO_OBJECT)
        Py_RETURN_NONE;
    if (err)
        return pbk_binding_fail(err, NULL);
    PyObject *changed = bytes_of_words(map.changed, map.n_words);
    PyObject *hydrated = bytes_of_words(map.hydrated, map.n_words);
    if (changed != NULL && hydrated != NULL)
        result = Py_BuildValue("(OIOO)", changed, map.limit, map.is_whole ? Py_True : Py_False, hydrated);
    Py_XDECREF(changed);
    Py_XDECREF(hydrated);
    free(map.changed);
    free(map.hydrated);
    return result;
}

static PyObject *nodes_counters(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    struct pbk_counter counters[64];
    if (!is_open(self))
        return NULL;
    size_t n = pbk_nodes_counters(self->nodes, counters, sizeof(counters) / sizeof(counters[0]));
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < n; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(counters[i].value);
        if (value == NULL || PyDict_SetItemString(dict, counters[i].name, value) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *nodes_reset_counters(struct nodes_object *self, PyObject *Py_UNUSED(unused))
{
    if (!is_open(self))
        return NULL;
    pbk_nodes_reset_counters(self->nodes);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)nodes_add, METH_VARARGS, "Register a file without an object."},
    {"attach", (PyCFunction)(void (*)(void))nodes_attach, METH_VARARGS | METH_KEYWORDS,
     "Make an object the top of a node."},
    {"publish", (PyCFunction)nodes_publish, METH_O, "Let requests of the kernel find a node."},
    {"remove", (PyCFunction)nodes_remove, METH_O, "Forget a node; readers finish with it."},
    {"name_added", (PyCFunction)(void (*)(void))nodes_name_added, METH_FASTCALL, "A directory has one more name."},
    {"name_removed", (PyCFunction)(void (*)(void))nodes_name_removed, METH_FASTCALL, "A directory has lost a name."},
    {"names_known", (PyCFunction)(void (*)(void))nodes_names_known, METH_FASTCALL,
     "These are all names of a directory; what is not among them is absent."},
    {"directory_is", (PyCFunction)nodes_directory_is, METH_VARARGS, "The attributes of a directory."},
    {"directory_changes", (PyCFunction)nodes_directory_changes, METH_O, "They are no longer known."},
    {"set_links", (PyCFunction)nodes_set_links, METH_VARARGS, "How many names a file has."},
    {"is_absent", (PyCFunction)(void (*)(void))nodes_is_absent, METH_FASTCALL,
     "Whether a directory is known not to have a name."},
    {"has", (PyCFunction)nodes_has, METH_O, "Whether the inode is registered."},
    {"has_object", (PyCFunction)nodes_has_object, METH_O, "Whether the node has an object."},
    {"stat", (PyCFunction)nodes_stat, METH_O, "Attributes of the object, or None."},
    {"size", (PyCFunction)nodes_size, METH_O, "Size in bytes as a reader sees it."},
    {"read", (PyCFunction)nodes_read, METH_VARARGS, "Bytes at an offset, up to the end of the file."},
    {"write", (PyCFunction)nodes_write, METH_VARARGS, "Write all of data; OSError(ENOTSUP) without an object."},
    {"truncate", (PyCFunction)nodes_truncate, METH_VARARGS, "Set the size."},
    {"fallocate", (PyCFunction)nodes_fallocate, METH_VARARGS, "fallocate(2): allocate, punch, zero."},
    {"fsync", (PyCFunction)nodes_fsync, METH_VARARGS, "Make what was written and the journal durable."},
    {"check_synced", (PyCFunction)nodes_check_synced, METH_O, "Raise what a sync of the object has failed with."},
    {"copy_to", (PyCFunction)nodes_copy_to, METH_VARARGS, "Write the whole visible content to a regular file."},
    {"hydrate", (PyCFunction)nodes_hydrate, METH_VARARGS,
     "Copy blocks up unchanged: (bytes copied, offset to go on from or None)."},
    {"hydrate_sync", (PyCFunction)nodes_hydrate_sync, METH_O,
     "Record what was hydrated; whether nothing comes from below any more."},
    {"count_blocks", (PyCFunction)nodes_count_blocks, METH_O, "(blocks, in the object, changed, whether it is whole)."},
    {"opened", (PyCFunction)nodes_opened, METH_NOARGS, "Inode -> handles that the kernel has open."},
    {"heat", (PyCFunction)nodes_heat, METH_NOARGS, "Inode -> reads and changes since it was registered."},
    {"verify", (PyCFunction)nodes_verify, METH_VARARGS, "Look at pages of the base when they are first read."},
    {"give_back_files", (PyCFunction)nodes_give_back_files, METH_NOARGS,
     "Close some descriptors that can be opened again."},
    {"set_reserve", (PyCFunction)nodes_set_reserve, METH_O, "How much free space fallocate has to leave."},
    {"drop_indexes", (PyCFunction)nodes_drop_indexes, METH_NOARGS, "Drop all loaded page indexes; bytes freed."},
    {"gate_close", (PyCFunction)nodes_gate_close, METH_NOARGS, "Hold all changes; returns when none is under way."},
    {"gate_open", (PyCFunction)nodes_gate_open, METH_NOARGS, "Let changes pass again."},
    {"prepare_restack", (PyCFunction)nodes_prepare_restack, METH_VARARGS, "Take what new sources of a file need."},
    {"cancel_restack", (PyCFunction)nodes_cancel_restack, METH_NOARGS, "Give that back."},
    {"restack", (PyCFunction)nodes_restack, METH_NOARGS, "The files that were prepared get their new sources."},
    {"prepare_seal", (PyCFunction)nodes_prepare_seal, METH_O, "Take what a seal needs; the gate is closed."},
    {"cancel_seal", (PyCFunction)nodes_cancel_seal, METH_NOARGS, "Give that back."},
    {"seal", (PyCFunction)nodes_seal, METH_VARARGS, "All objects become what is below; go on in another layer."},
    {"sync", (PyCFunction)nodes_sync, METH_NOARGS, "Make all objects and the journal durable."},
    {"page_map", (PyCFunction)nodes_page_map, METH_O, "(changed, limit, whole, hydrated) of a mapped object, or None."},
    {"counters", (PyCFunction)nodes_counters, METH_NOARGS, "Counters since the last reset, and gauges."},
    {"reset_counters", (PyCFunction)nodes_reset_counters, METH_NOARGS, "Set the counters, not the gauges, to zero."},
    {"close", (PyCFunction)nodes_close, METH_NOARGS, "Forget all nodes."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Nodes(journal, objects_fd, log_fd, *, index_bytes): the data of all open files of a mount."},
    {Py_tp_new, (void *)nodes_new},
    {Py_tp_dealloc, (void *)nodes_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "pbkfs._native.Nodes",
    .basicsize = sizeof(struct nodes_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int pbk_add_nodes(PyObject *module)
{
    struct pbk_module_state *state = PyModule_GetState(module);
    state->nodes_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->nodes_type == NULL ? -1 : PyModule_AddType(module, state->nodes_type);
}
