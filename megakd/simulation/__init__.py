"""One rank of a run on a GPU that is not there: CPU tensors are real, those of the device have a shape, a type and a size, and no numbers.

    records = simulate([Simulated(flags=..., student=..., rank=0, world_size=4), ...])

settings.py says what is asked, record.py what was seen. The code of a run is unchanged: data, batching, schedules and decoding loops
run, and every operation on the device is seen. So are

    mismatches    an operation that mixes devices or types raises, as on a GPU
    memory        live bytes of all device tensors, their peak in each part of an iteration, and what was alive then
    waiting       whatever makes the host wait for the device, with its line
    capture       what a CUDA graph forbids
    messages      collectives and sends with their group, bytes and order
    work          launches, operations and bytes, and a time by roofline

Not seen: values, what happens inside a Triton kernel, checks that only CUDA's own kernels make, NCCL, races, fragmentation, real times.
"""
