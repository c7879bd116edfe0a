"""The results of one experiment, or of many, as tables and figures.

===============  ==========================================================================
``experiment``   one experiment on a self-contained page: a table, curves, settings
``overview``     many runs on one page: methods by tasks, robustness to the rate, distances
``curves``       loss, distance and bound over the steps, as PNG files
``figures``      the paper's kinds of figures, from plain rows
``samples``      what a run answered or drew while it trained
``pages``        tables that sort, pictures that say their values: one file, no network
===============  ==========================================================================
"""
