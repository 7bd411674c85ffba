/* One call of C that launches a whole pass. The text is compiled by `replayer` in driver.py, which defines BASES and PARAMETERS.

   A captured pass is the context of the GPU and the launches. A parameter of a kernel is a base and an offset from it: base 0 is 0,
   base 1 the bits of the scale, the others are the addresses of the pass's tensors. */
#include <Python.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { RELAXED = 2 }; /* a thread's capture mode: it may allocate and free while another captures */
struct launch { uint64_t kernel; uint32_t programs, threads, shared, count; }; /* and then its parameters */
struct parameter { uint64_t base, offset; };
struct node { void *kernel; unsigned grid[3], block[3], shared; void **parameters, **extra, *kern, *context; };

/* The functions of the driver that are used, in the order of DRIVER; each returns a CUresult. */
struct driver {
    int (*launch)(void *kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*is_capturing)(void *stream, int *status);
    int (*exchange_capture_mode)(int *mode);
    int (*graph_create)(void **graph, unsigned flags);
    int (*graph_destroy)(void *graph);
    int (*add_node)(void **added, void *graph, void **after, size_t count, const struct node *);
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*exec_destroy)(void *exec);
    int (*set_node)(void *exec, void *node, const struct node *);
    int (*graph_launch)(void *exec, void *stream);
    int (*get_context)(void **context);
    int (*set_context)(void *context);
};

/* A pass as a CUDA graph. Who has made it busy may set its nodes and launch it; nobody waits for that, for who has may be a
   thread that a fork left behind. Nodes are those of `all`, which has to stay. */
struct graph { struct driver driver; atomic_flag busy; pid_t maker; void *all, *exec, *nodes[]; };

/* Read one launch of a captured pass, with parameters put together in `values`; returns where the next begins. */
static const char *next(const char *at, const uint64_t *bases, uint64_t *values, struct node *node) {
    const struct launch *launch = (const struct launch *)at;
    const struct parameter *parameter = (const struct parameter *)(launch + 1);
    node->kernel = (void *)launch->kernel;
    node->grid[0] = launch->programs;
    node->block[0] = launch->threads;
    node->shared = launch->shared;
    for (uint32_t i = 0; i < launch->count; i++, parameter++)
        values[i] = bases[parameter->base] + parameter->offset;
    return (const char *)parameter;
}

static struct node blank(uint64_t *values, void **parameters) {
    for (int i = 0; i < PARAMETERS; i++)
        parameters[i] = &values[i];
    return (struct node){.grid = {1, 1, 1}, .block = {1, 1, 1}, .parameters = parameters};
}

/* The launches of a captured pass, with its context current: a thread that has launched nothing yet may have none. */
static const char *open_captured(const struct driver *driver, const char *captured) {
    void *context = NULL;
    if (!driver->get_context(&context) && !context)
        driver->set_context(*(void *const *)captured);
    return captured + sizeof(void *);
}

static void release(struct graph *graph) {
    int mode = RELAXED;
    if (graph->maker == getpid()) { /* a fork has the driver of its parent, and must not call it */
        graph->driver.exchange_capture_mode(&mode);
        if (graph->exec)
            graph->driver.exec_destroy(graph->exec); /* what runs, runs on */
        if (graph->all)
            graph->driver.graph_destroy(graph->all);
        graph->driver.exchange_capture_mode(&mode);
    }
    PyMem_Free(graph);
}

static void forget(PyObject *capsule) { release(PyCapsule_GetPointer(capsule, NULL)); }

/* graph(driver, captured, launches, stream): the pass as a CUDA graph, one kernel after the other; False if the driver fails, and
   None while the stream is captured, which needs no graph. */
static PyObject *make_graph(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *functions, *captured;
    Py_ssize_t count;
    unsigned long long stream;
    uint64_t bases[BASES] = {0}, values[PARAMETERS] = {0};
    void *parameters[PARAMETERS];
    struct node node = blank(values, parameters);
    if (!PyArg_ParseTuple(arguments, "SSnK", &functions, &captured, &count, &stream))
        return NULL;
    const struct driver *driver = (const struct driver *)PyBytes_AS_STRING(functions);
    const char *at = open_captured(driver, PyBytes_AS_STRING(captured));
    int capturing = 0, mode = RELAXED;
    if (driver->is_capturing((void *)stream, &capturing) || capturing)
        Py_RETURN_NONE;
    struct graph *graph = PyMem_Malloc(sizeof(struct graph) + count * sizeof(void *));
    if (!graph)
        return PyErr_NoMemory();
    graph->driver = *driver;
    graph->all = graph->exec = NULL;
    graph->maker = getpid();
    atomic_flag_clear(&graph->busy);
    driver->exchange_capture_mode(&mode);
    int error = driver->graph_create(&graph->all, 0);
    for (Py_ssize_t i = 0; i < count && !error; i++) {
        at = next(at, bases, values, &node);
        error = driver->add_node(&graph->nodes[i], graph->all, i ? &graph->nodes[i - 1] : NULL, i > 0, &node);
    }
    if (!error)
        error = driver->instantiate(&graph->exec, graph->all, 0);
    driver->exchange_capture_mode(&mode);
    PyObject *capsule = error ? NULL : PyCapsule_New(graph, NULL, forget);
    if (!capsule)
        release(graph);
    if (error)
        Py_RETURN_FALSE;
    return capsule;
}

/* run(driver, captured, graph, stream, scale, *addresses): what the driver says of the first launch that fails, or 0. As a graph
   whose nodes are set first; launch by launch where there is none, it is busy, or the stream is captured. Also where the
   driver refuses to set or to launch the graph: -1 then. */
static PyObject *run(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    uint64_t bases[BASES] = {0}, values[PARAMETERS];
    void *parameters[PARAMETERS];
    struct node node = blank(values, parameters);
    if (count < 5 || count - 3 > BASES || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "run: expected the driver and a captured pass, bytes, a graph, a stream, a scale, addresses");
        return NULL;
    }
    const struct driver *driver = (const struct driver *)PyBytes_AS_STRING(arguments[0]);
    const char *captured = PyBytes_AS_STRING(arguments[1]), *end = captured + PyBytes_GET_SIZE(arguments[1]), *at;
    struct graph *graph = PyCapsule_CheckExact(arguments[2]) ? PyCapsule_GetPointer(arguments[2], NULL) : NULL;
    void *stream = PyLong_AsVoidPtr(arguments[3]);
    union { float scale; uint32_t bits; } scale = {(float)PyFloat_AsDouble(arguments[4])};
    bases[1] = scale.bits;
    for (Py_ssize_t i = 5; i < count; i++)
        bases[i - 3] = PyLong_AsUnsignedLongLong(arguments[i]);
    if (PyErr_Occurred())
        return NULL;

    int error = 0, capturing = 0, launched = 0, refused = 0;
    Py_BEGIN_ALLOW_THREADS
    captured = open_captured(driver, captured);
    if (graph && !driver->is_capturing(stream, &capturing) && !capturing && !atomic_flag_test_and_set(&graph->busy)) {
        at = captured;
        for (int i = 0; at < end && !refused; i++) {
            at = next(at, bases, values, &node);
            refused = driver->set_node(graph->exec, graph->nodes[i], &node);
        }
        if (!refused)
            refused = driver->graph_launch(graph->exec, stream);
        launched = !refused;
        atomic_flag_clear(&graph->busy);
    }
    for (at = captured; at < end && !launched && !error;) {
        at = next(at, bases, values, &node);
        error = driver->launch(node.kernel, node.grid[0], 1, 1, node.block[0], 1, 1, node.shared, stream, parameters, NULL);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error ? error : refused ? -1 : 0);
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL}, {"graph", make_graph, METH_VARARGS, NULL}, {0} };
static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "llsa_replay", .m_size = -1, .m_methods = methods};
PyMODINIT_FUNC PyInit_llsa_replay(void) { return PyModule_Create(&module); }
