"""`jax.jit` for tests whose time goes into compiling: LLVM's optimizations are skipped, XLA's own are not.

Compiling takes a half to a fifth of the time. The golden tests run fully optimized programs.
"""

import functools

import jax

COMPILER_OPTIONS = {'xla_backend_optimization_level': 0}
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
