"""What the Triton and CUDA kernels compile to: registers, local memory, accesses, matrix instructions, occupancy."""
