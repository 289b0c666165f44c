"""Parts of benchmarks/upcycling.py: texts, the plan of runs, training, ensembles and results."""
