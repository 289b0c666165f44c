"""stand-in until lightbulb tree lands"""
from matplotlib.figure import Figure
def tree_figure(plan):
    figure = Figure(figsize=(4,2)); figure.subplots(); return figure
