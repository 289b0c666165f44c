"""LightBulb's own fast paths, one folder per operation.

``reference`` is the naive twin, ``kernel`` the Triton kernels, ``native`` the C++ rows of the CPU, ``benchmark`` the
comparison with the peers. The folder's ``__init__`` chooses. Models come here through :mod:`lightbulb.ops` only.
Kernels know torch and triton, and nothing else of LightBulb.
"""
