"""Fast paths beside naive twins: `kernels/<op>/{reference,kernel,benchmark}.py`. None yet: models run on torch."""
