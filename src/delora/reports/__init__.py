"""What came of an experiment, and of many.

===============  ==========================================================================
``experiment``   one experiment: a table, its curves, one self-contained page
``overview``     many runs on one page: methods by tasks, robustness to the rate, distances
``curves``       loss, distance and bound over the steps, as PNG files
``figures``      the paper's kinds of figures, from plain rows
===============  ==========================================================================
"""
