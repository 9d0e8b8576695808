"""What the GPU kernels compile to, for GPUs that need not be there: registers, spills, access widths, instructions."""
