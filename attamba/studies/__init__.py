"""Studies: recipes of many runs, their results, and the tables and plots made from those.

recipe.py reads a recipe, engine.py trains and scores its runs, results.py keeps what they gave,
report.py makes tables and plots of that alone, solver.py finds rivals of equal cost.
"""
