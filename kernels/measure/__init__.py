"""What measures the rules: shapes, peers and charts of the benchmark, and the accelerators' own compilers.

The commands are `python -m kernels.bench`, `kernels.chart`, `kernels.gpu_check`, `kernels.static_tpu` and
`kernels.static_gpu`; where the package is installed, `python -m sleep_jax.kernels.bench` and so on.
"""
