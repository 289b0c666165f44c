"""Fast paths, each beside a naive twin: `kernels/<op>/{reference,kernel,benchmark}.py`. None yet: models run on torch."""
