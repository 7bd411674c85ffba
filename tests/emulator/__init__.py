"""An emulator of PTX for H100, in NumPy: it runs the kernels in Gluon, which Triton's interpreter cannot, on a CPU.

`ptx` reads what Triton made of a kernel; `machine` runs programs of it, many at once: a lane of NumPy's is a thread.
`operations` are the arithmetic, `transfers` what goes between registers and memory, `tensor_cores` the products;
`memory` is that of the GPU, `shared` that of a multiprocessor, with copies on their way, and `races` says when two
threads meet there. `passes` runs forward and backward over the tensors of a `fuzz.Case`, where `stand_ins` do what
kernels in Triton do.

Whatever may be late is as late as can be: a copy arrives, and a product is there, when a wait says so and not before.
A wait that is too lax is so found by what comes out, and by the check that nobody touches what is on its way. Registers
of products that have not been waited for are not to be touched either, and others need a `wgmma.fence` before them.
"""
